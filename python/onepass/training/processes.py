"""What training on several processes asks of a trainer: shards before the first step, a reference
beside them, weights gathered whole, and who is lost where a collective fails."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import distributed, nn

from ..cli.errors import one_line
from ..zero3 import is_released
from .run_folder import n_processes

ANSWER = 3.0  # seconds in which a process that lives says so
FAILED = ("gloo/", "NCCL", "ProcessGroup", "Connection closed by peer")  # in a RuntimeError

NO_SECOND = (
    "FSDP1 and ZeRO-3: a reference of its own would stand whole on every device: shard with FSDP2,"
    " train an adapter, whose reference is the model without it, or precompute it"
)


def shard_now(trainer: Any, *methods: str) -> None:
    """Shard the model under FSDP2 before the training does, so that it can be measured. accelerate
    does so only together with an optimizer: the training takes both. Under DeepSpeed, until
    `forget_measuring`, what is measured has no optimizer: ZeRO-3's shards, else whole weights.
    Elsewhere nothing.

    `methods`: what else of the model is called from outside, beside its forward.
    """
    accelerator = trainer.accelerator
    if trainer.is_deepspeed_enabled and trainer.deepspeed is None:
        _measure_without_optimizer(trainer)
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


def _measure_without_optimizer(trainer: Any) -> None:
    accelerator, model = trainer.accelerator, trainer.model
    plugin = accelerator.state.deepspeed_plugin
    if plugin.zero_stage < 3:  # transformers would refuse it
        trainer._measuring = trainer.deepspeed = model.to(trainer.args.device)
        accelerator._models.append(model)
        return
    from transformers.integrations.deepspeed import deepspeed_init

    config = plugin.deepspeed_config
    before = copy.deepcopy(config)
    config.pop("scheduler", None)
    deepspeed_init(trainer, num_training_steps=0, inference=True)
    engine = accelerator.prepare(model)
    trainer._measuring = trainer.deepspeed = trainer.model_wrapped = engine
    config.clear()  # the training's optimizer and scheduler, and what is "auto"
    config.update(before)


def forget_measuring(trainer: Any) -> None:
    """To be called before a training under DeepSpeed: its engine comes with an optimizer."""
    engine = trainer.__dict__.pop("_measuring", None)
    if engine is None:
        return
    if engine is not trainer.model:
        engine.destroy()
        for module in trainer.model.modules():  # kept, they would be of this engine in the next
            for name in ("pre_bwd_fn", "post_bwd_fn"):
                module.__dict__.pop(name, None)
    trainer.accelerator.free_memory()
    trainer.model_wrapped, trainer.deepspeed = trainer.model, None


def prepare_reference(trainer: Any, reference: nn.Module) -> nn.Module:
    """A frozen model as the engine has the trained one: sharded by FSDP2, else on the device and
    under its autocast.

    Raises:
        ValueError: as `check_reference`.
    """
    check_reference(trainer)
    accelerator = trainer.accelerator
    if getattr(accelerator, "is_fsdp2", False):
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, reference)  # type: ignore[no-any-return]
    return accelerator.prepare_model(reference, evaluation_mode=True)  # type: ignore[no-any-return]


def check_reference(trainer: Any, is_itself: bool = False) -> None:
    """ValueError for a reference of its own under FSDP1 or ZeRO-3, which keep no second model in
    shards; `is_itself`: for the model before its training under FSDP1, which does not shard it."""
    if not is_sharded(trainer) or getattr(trainer.accelerator, "is_fsdp2", False):
        return
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    if plugin is None or plugin.zero_stage == 3 and not is_itself:
        raise ValueError(NO_SECOND)


def is_sharded(trainer: Any) -> bool:
    """Whether FSDP or DeepSpeed keeps the model's weights in shards."""
    return bool(trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


def whole_state(trainer: Any) -> dict[str, torch.Tensor]:
    """All weights, gathered on the main process, of a sharded model too; to be called on all."""
    state: dict[str, torch.Tensor]
    if trainer.is_deepspeed_enabled and trainer.accelerator.state.deepspeed_plugin.zero_stage == 3:
        # accelerate's, also where the configuration has no checkpoint save the weights whole
        state = trainer.deepspeed._zero3_consolidated_16bit_state_dict()
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state


def whole(module: Any) -> Any:
    """The module; where FSDP2 or ZeRO-3 has it in shards, a copy with gathered weights and without
    hooks, to be made on all processes. It is not for training."""
    sharded = [p for p in module.parameters() if hasattr(p, "full_tensor") or is_released(p)]
    return _gathered(module) if sharded else module


def _gathered(module: Any) -> Any:
    made: Any = object.__new__(type(module))  # FSDP2's modules cannot be copied
    made.__dict__.update(module.__dict__)
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    made._parameters = {name: _full(value) for name, value in module._parameters.items()}
    made._modules = {name: _gathered(child) for name, child in module._modules.items()}
    return made


def _full(parameter: Any) -> Any:
    if hasattr(parameter, "full_tensor"):
        return parameter.detach().full_tensor()
    if not is_released(parameter):
        return parameter
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def fails_twice(model: nn.Module) -> bool:
    """Whether reentrant checkpoints fail a model that runs twice in one backward: DDP averages a
    weight's gradient at each of them, and so not the sum, and DeepSpeed wants it once;
    FSDP2's hooks end in a segmentation fault where transformers (below 5.2x) calls them inside of
    the checkpoint."""
    is_ddp = type(model).__name__ in ("DistributedDataParallel", "DeepSpeedEngine")
    if not is_ddp and not hasattr(model, "reshard"):
        return False
    for module in model.modules():
        made = getattr(module, "_gradient_checkpointing_func", None)
        if getattr(made, "keywords", {}).get("use_reentrant"):
            if is_ddp or type(module).__call__ is not nn.Module.__call__:
                return True
    return False


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
    if isinstance(error, getattr(distributed, "DistError", ())):
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
        ends = time.monotonic() + ANSWER
        while not store.check(lives) and time.monotonic() < ends:
            time.sleep(0.1)
        here = [store.check([key]) for key in lives]
    except (RuntimeError, ValueError):  # the process with the store is the one that is gone
        return [], True
    return [n for n, found in enumerate(here) if not found], here.index(True) == rank


class Ended(BaseException):
    """SIGTERM: a launcher ends the processes that are left where one has failed."""


@contextlib.contextmanager
def together(line: Callable[[str], str]) -> Iterator[None]:
    """In a launch of several processes: where one is lost, the first of the others tells it by
    `line` of what there is to say, and all end at once with exit code 1; elsewhere nothing."""
    if n_processes() == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _ended)
    try:
        yield
    except (Ended, RuntimeError) as error:
        if not (isinstance(error, Ended) or is_lost(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if distributed.is_initialized():
            gone, tells = who_is_lost()
            if tells:
                print(line(_told(error, gone)), file=sys.stderr, flush=True)
        os._exit(1)  # destructors of a process group have waited for ever for what is gone
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended(*_: object) -> None:
    raise Ended


def _told(error: BaseException, gone: list[int]) -> str:
    n = n_processes()
    if gone:
        ranks = f"rank{'s' * (len(gone) > 1)} {', '.join(map(str, gone))}"
        return f"{ranks} of {n} ended or hang{'s' * (len(gone) == 1)} (what was said stands above)"
    if isinstance(error, Ended):
        return f"ended by SIGTERM, as all {n} processes"
    return f"the {n} processes lost each other ({one_line(error, 120)})"
