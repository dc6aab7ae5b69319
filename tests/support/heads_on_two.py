"""What two processes do with lazy heads; the single-process truth is worked out in each."""

from __future__ import annotations

import copy
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import onepass
from onepass import LazyLogits

from .processes import answer, join, leave
from .tiny_models import V, batch_of, tiny

Grads = dict[str, Tensor]


def loss_in_model(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def loss_of_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """As a loop of one's own takes it: the model's output holds logits and no loss."""
    logits = model(input_ids=batch["input_ids"]).logits
    rows, labels = logits[:, :-1].reshape(-1, V), batch["labels"][:, 1:].reshape(-1)
    return functional.cross_entropy(rows.float(), labels)


LOSSES: dict[str, Callable[..., Tensor]] = {"model": loss_in_model, "logits": loss_of_logits}


def share_of(rank: int) -> dict[str, Tensor]:
    """A row of the batch for each process, with as many labels that count."""
    batch = batch_of("llama")
    batch["labels"][:, :3] = -100
    return {key: value[rank : rank + 1] for key, value in batch.items()}


def truth(family: str) -> Grads:
    """The mean over both shares, on a plain model in one process."""
    model = tiny(family)
    for rank in range(2):
        (loss_in_model(model, share_of(rank)) / 2).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check(model: Any, wanted: Grads) -> None:
    size = max(float(grad.abs().max()) for grad in wanted.values())
    found = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, f"{name} has no gradient"
        whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
        found[name.removeprefix("module.")] = whole
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-5 * size, msg=name)


def train(model: Any, loss_of: Callable[..., Tensor], rank: int, steps: int = 2) -> None:
    """Backward twice, so that what a first step left behind would show; gradients of the last."""
    for _ in range(steps):
        model.zero_grad()
        with onepass.strict():
            loss_of(model, share_of(rank)).backward()


def ddp(rank: int) -> None:
    for family in ("llama", "qwen2_tied"):
        wanted = truth(family)
        for loss_of in LOSSES.values():
            for unused in (False, True):
                model = onepass.lazy_head(tiny(family))
                wrapped = DistributedDataParallel(model, find_unused_parameters=unused)
                assert onepass.report(wrapped).fused
                train(wrapped, loss_of, rank)
                check(wrapped, wanted)
    # the other order
    wrapped = DistributedDataParallel(tiny("llama"))
    onepass.lazy_head(wrapped)
    train(wrapped, loss_in_model, rank)
    check(wrapped, truth("llama"))


def ddp_static_graph(rank: int) -> None:
    wanted = truth("llama")
    model = DistributedDataParallel(onepass.lazy_head(tiny("llama")), static_graph=True)
    train(model, loss_in_model, rank, steps=3)
    check(model, wanted)
    model = DistributedDataParallel(onepass.lazy_head(tiny("llama")), static_graph=True)
    error = raised(lambda: train(model, loss_of_logits, rank))
    assert "static_graph=True) waits for a gradient" in error, error


def ddp_parameters_really_unused(rank: int) -> None:
    """A layer that a step leaves out is found unused, and only that."""
    wanted = truth("llama")
    for loss_of in LOSSES.values():
        model: Any = tiny("llama")
        model.spare = nn.Linear(3, 3)
        wrapped = DistributedDataParallel(onepass.lazy_head(model), find_unused_parameters=True)
        train(wrapped, loss_of, rank)
        assert model.spare.weight.grad is None or not model.spare.weight.grad.any()
        model.spare = None
        check(wrapped, wanted)


def sharded(model: Any, head: str, **options: Any) -> Any:
    for layer in model.model.layers:
        fully_shard(layer, **options)
    if head == "alone":
        fully_shard(model.lm_head, **options)
    if head == "alone_kept":
        fully_shard(model.lm_head, reshard_after_forward=False)
    return fully_shard(model)


def fsdp2(rank: int) -> None:
    for family in ("llama", "qwen2_tied"):
        wanted = truth(family)
        for loss_of in LOSSES.values():
            for first in (True, False):
                model = tiny(family)
                if first:
                    model = sharded(onepass.lazy_head(model), "root")
                else:
                    model = onepass.lazy_head(sharded(model, "root"))
                assert onepass.report(model).fused
                train(model, loss_of, rank)
                check(model, wanted)


def fsdp2_head_alone(rank: int) -> None:
    wanted = truth("llama")
    for loss_of in LOSSES.values():
        model = sharded(onepass.lazy_head(tiny("llama")), "alone_kept")
        train(model, loss_of, rank)
        check(model, wanted)
    model = sharded(onepass.lazy_head(tiny("llama")), "alone")
    error = raised(lambda: train(model, loss_in_model, rank))
    assert "reshard_after_forward=False" in error, error


def fsdp2_root_resharded(rank: int) -> None:
    """The loss inside the model sees the weights; the logits outside come too late, and say so."""
    model = tiny("llama")
    model = fully_shard(onepass.lazy_head(model), reshard_after_forward=True)
    train(model, loss_in_model, rank)
    check(model, truth("llama"))
    error = raised(lambda: train(model, loss_of_logits, rank))
    assert "freed after its forward" in error, error


def dtensor(rank: int) -> None:
    """Shards of the hidden size are refused; those of the vocabulary: sharded_on_ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    mesh = init_device_mesh("cpu", (2,))
    model: Any = tiny("llama")
    whole = model.lm_head.weight
    columns = nn.Parameter(distribute_tensor(whole.detach(), mesh, [Shard(1)]))
    model.lm_head.weight = columns
    error = raised(lambda: onepass.lazy_head(model))
    wanted = f"rank {rank}: it must be sharded over the vocabulary, Shard(0): got Shard(dim=1)"
    assert wanted in error, error
    assert "forward" not in model.lm_head.__dict__ and not onepass.report(model).fused
    model.lm_head.weight = whole
    onepass.lazy_head(model)
    model.lm_head.weight = columns
    error = raised(lambda: model(**share_of(rank)))
    assert f"rank {rank}: the head must be sharded over the vocabulary, Shard(0)" in error, error
    hidden = distribute_tensor(torch.randn(2, whole.shape[1]), mesh, [Shard(0)])
    error = raised(lambda: onepass.LazyLogits(hidden, whole))
    assert "hidden must be a whole tensor: got DTensor; gather it first" in error, error


def gather(rank: int) -> None:
    """What accelerate does to the logits of an evaluation."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    plain = tiny("llama").eval()
    lazy = accelerator.prepare(onepass.lazy_head(copy.deepcopy(plain)))
    ids = batch_of("llama")["input_ids"][:, : 9 - 2 * rank]
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        mine, wanted = lazy(input_ids=ids).logits, plain(input_ids=ids).logits
        assert isinstance(mine, LazyLogits)
        for change in (
            lambda t: accelerator.gather(t[:, :7]),
            lambda t: accelerator.gather(accelerator.pad_across_processes(t, dim=1)),
            lambda t: accelerator.gather_for_metrics(t[:, :7].argmax(-1)),
        ):
            torch.testing.assert_close(change(mine), change(wanted))


def accelerate_loop(rank: int) -> None:
    """A loop over Accelerator with accumulation, and its wrappers around forward and outputs."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()

    def trained(lazy: bool) -> Grads:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision="bf16")
        model = tiny("llama")
        if lazy:
            onepass.lazy_head(model)
        model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(4):
            with accelerator.accumulate(model), onepass.strict(lazy):
                accelerator.backward(model(**share_of(rank)).loss)
                optimizer.step()
                optimizer.zero_grad()
        accelerator.free_memory()
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    wanted, got = trained(False), trained(True)
    start = {f"module.{name}": p for name, p in tiny("llama").named_parameters()}
    for name, value in wanted.items():
        moved = (value - start[name]).abs().max()
        torch.testing.assert_close(got[name], value, rtol=0.0, atol=float(3e-2 * moved), msg=name)


def raised(call: Callable[[], Any]) -> str:
    try:
        call()
    except (RuntimeError, ValueError, TypeError) as error:
        dist.barrier()
        return str(error)
    return "nothing was raised"


def main(rank: int, rendezvous: str, cases: list[str], answers: Path) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # accelerate asks, in vain
    join(rank, rendezvous)
    answer({case: functools.partial(globals()[case], rank) for case in cases}, answers, rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3].split(), Path(sys.argv[4]))
