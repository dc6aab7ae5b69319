"""Representation rerouting on two processes, under DDP and FSDP2, against one process's truth."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from onepass.circuit_breaker import LoraArguments, LorraArguments, Rerouting, jitter, lora_config
from onepass.circuit_breaker.loss import rerouting_loss

from .processes import answer, join, leave
from .tiny_language_model import model

OPTIONS = Rerouting((2, 3))
COEFFICIENTS = (2.0, 3.0)


def adapted() -> Any:
    from peft import get_peft_model

    base = model()
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = get_peft_model(
            base, lora_config(base, LoraArguments(lora_r=4, lora_dropout=0.0), LorraArguments())
        )
    jitter(wrapped, 0.1)
    return wrapped


def share_of(rank: int) -> dict[str, Tensor]:
    """Two rows of each kind for each process, with as many tokens that count."""
    generator = torch.Generator().manual_seed(rank)
    batch = {}
    for ending in ("", "_circuit_breaker", "_val"):
        batch[f"input_ids{ending}"] = torch.randint(4, 260, (2, 9), generator=generator)
        batch[f"attention_mask{ending}"] = (torch.arange(9) < 7).long().expand(2, 9)
    return batch


def truth() -> dict[str, Tensor]:
    """The mean over both shares in one process."""
    whole = adapted()
    for rank in range(2):
        (rerouting_loss(whole, share_of(rank), COEFFICIENTS, OPTIONS).loss / 2).backward()
    return {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}


def check(wrapped: Any, rank: int) -> None:
    wanted = truth()
    for _ in range(2):  # what a first step left behind would show in the second
        wrapped.zero_grad()
        terms = rerouting_loss(wrapped, share_of(rank), COEFFICIENTS, OPTIONS, monitor=True)
        terms.loss.backward()
    size = max(float(grad.abs().max()) for grad in wanted.values())
    found = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            grad = parameter.grad
            assert grad is not None, f"{name} has no gradient"
            whole = grad.full_tensor() if isinstance(grad, DTensor) else grad
            found[name.removeprefix("module.")] = whole
    assert found.keys() == wanted.keys()
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-4, atol=1e-5 * size, msg=name)


def ddp(rank: int) -> None:
    check(DistributedDataParallel(adapted()), rank)


def fsdp2(rank: int) -> None:
    wrapped = adapted()
    for block in wrapped.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(wrapped)
    check(wrapped, rank)


CASES: dict[str, Callable[[int], None]] = {"ddp": ddp, "fsdp2": fsdp2}


def main(rank: int, rendezvous: str, answers: str) -> None:
    join(rank, rendezvous)
    cases = {name: functools.partial(case, rank) for name, case in CASES.items()}
    answer(cases, Path(answers), rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
