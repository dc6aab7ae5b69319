"""What training on several processes asks of a trainer: shards before the first step, a reference
beside them, weights gathered whole, and who is lost where a collective fails."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
from torch import distributed, nn

ANSWER = 3.0  # seconds in which a process that lives says so
FAILED = ("gloo/transport", "NCCL", "ProcessGroup", "Connection closed by peer", "DistStoreError")


def shard_now(trainer: Any, *methods: str) -> None:
    """Shard the model under FSDP2 before the training does, so that it can be measured; elsewhere
    nothing. accelerate does so only together with an optimizer: the training takes both.

    `methods`: what else of the model is called from outside, beside its forward.
    """
    accelerator = trainer.accelerator
    if not getattr(accelerator, "is_fsdp2", False) or accelerator._models:
        return
    trainer.create_optimizer()
    trainer.model, trainer.optimizer = accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.model_wrapped = trainer.model
    for name in methods:
        distributed.fsdp.register_fsdp_forward_method(trainer.model, name)
    prepare = accelerator.prepare

    def once(*objects: Any, **options: Any) -> Any:
        # Prepared again, parameters are told apart by the address of the shard: 0 for empty ones.
        if all(getattr(each, "_is_accelerate_prepared", False) for each in objects):
            return objects if len(objects) > 1 else objects[0]
        return prepare(*objects, **options)

    accelerator.prepare = once


def prepare_reference(trainer: Any, reference: nn.Module) -> nn.Module:
    """A frozen model as the engine has the trained one: sharded by FSDP2, else on the device and
    under its autocast.

    Raises:
        ValueError: FSDP1 or DeepSpeed, of which each device would hold it whole.
    """
    accelerator = trainer.accelerator
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)  # type: ignore[no-any-return]
    if is_sharded(trainer):
        raise ValueError(
            "FSDP1 and DeepSpeed: a reference of its own would stand whole on every device: use"
            " FSDP2, train an adapter, whose reference is the model without it, or precompute"
        )
    return accelerator.prepare_model(reference, evaluation_mode=True)  # type: ignore[no-any-return]


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed keeps the model's weights in shards."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered on the main process, of a sharded model too; to be called on all."""
    state: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state


def whole(module: Any) -> Any:
    """The module; where FSDP2 has it in shards, a copy with gathered weights and without hooks, to
    be made on all processes. It is not for training."""
    sharded = [p for p in module.parameters() if hasattr(p, "full_tensor")]
    return _gathered(module) if sharded else module


def _gathered(module: Any) -> Any:
    made: Any = object.__new__(type(module))  # FSDP2's modules cannot be copied
    made.__dict__.update(module.__dict__)
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    made._parameters = {
        name: value.detach().full_tensor() if hasattr(value, "full_tensor") else value
        for name, value in module._parameters.items()
    }
    made._modules = {name: _gathered(child) for name, child in module._modules.items()}
    return made


def rounds(n_items: int) -> Iterator[tuple[int, bool]]:
    """(index, whether it is this process's) of its share of the items. All processes go as many
    rounds, as a sharded model wants it: the last may be of an item that is another's."""
    rank, n_ranks = 0, 1
    if distributed.is_available() and distributed.is_initialized():
        rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
    for index in range(rank, -(-n_items // n_ranks) * n_ranks, n_ranks):
        yield min(index, n_items - 1), index < n_items


def agreed(value: Any) -> Any:
    """The main process's value, on all processes."""
    found = [value]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(found)
    return found[0]


def is_lost(error: BaseException) -> bool:
    """Whether a collective failed: another process ended, hangs, or cannot be reached."""
    kinds = [getattr(distributed, name, None) for name in ("DistError", "DistBackendError")]
    if isinstance(error, tuple(kind for kind in kinds if kind is not None)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in FAILED)


def who_is_lost() -> tuple[list[int], bool]:
    """The ranks that do not answer within ANSWER seconds, and whether this is the process to tell
    of it, the first that does. Without an answer of the store too: ([], True)."""
    rank, n_ranks = distributed.get_rank(), distributed.get_world_size()
    lives = [f"onepass/lives/{each}" for each in range(n_ranks)]
    try:
        store = distributed.distributed_c10d._get_default_store()
        store.set(lives[rank], "")
        with contextlib.suppress(RuntimeError):  # DistStoreError: some never did
            store.wait(lives, timedelta(seconds=ANSWER))
        here = [store.check([key]) for key in lives]
    except (RuntimeError, ValueError):  # the process with the store is the one that is gone
        return [], True
    return [n for n, found in enumerate(here) if not found], here.index(True) == rank
