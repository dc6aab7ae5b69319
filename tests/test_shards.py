"""Vocabularies in shards: every statistic, pair statistic and loss of a sharded head, forward and
backward, is that of the whole one, and what goes between the ranks is a few numbers a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import LazyLogits
from onepass.ops.vocab_stats import FACTS
from support.ranks import Ranks

V, D, N = 37, 5, 6
LAYOUTS = {"even": (19, 18), "uneven": (3, 20, 14), "empty": (36, 1, 0, 0), "one": (37,)}


class Case:
    """Hidden states [2, 3, D], a head [V, D], labels on all shards."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: float = 1.0) -> None:
        gen = torch.Generator().manual_seed(3)
        self.hidden = (size * torch.randn(2, 3, D, generator=gen)).to(dtype)
        self.weight = torch.randn(V, D, generator=gen).to(dtype)
        self.bias = torch.randn(V, generator=gen).to(dtype)
        self.labels = torch.tensor([[0, 36, 2], [20, 3, 35]])
        self.contrast = torch.tensor([[36, 1, -100], [5, 22, 0]])
        self.bag = torch.rand(V, generator=gen)
        self.upstream = torch.randn(2, 3, len(FACTS), generator=gen)

    def leaves(self, frozen: bool, bias: bool) -> list[Tensor]:
        found = [self.hidden.clone().requires_grad_()]
        found += [t.clone().requires_grad_(not frozen) for t in (self.weight, self.bias)]
        return found if bias else found[:2]


def part(tensor: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return tensor.detach().split(list(sizes))[rank].clone().requires_grad_(tensor.requires_grad)


def both(
    case: Case,
    sizes: tuple[int, ...],
    loss: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool = False,
    bias: bool = True,
    **options: Any,
) -> tuple[list[Tensor], list[list[Tensor]], Ranks]:
    """(value, gradients) of the whole head, and of each rank with its part of the head's gathered
    into whole ones."""

    def run(leaves: list[Tensor], **where: Any) -> list[Tensor]:
        logits = LazyLogits(leaves[0], leaves[1], *leaves[2:], **options, **where)
        value = loss(logits)
        if value.requires_grad:
            value.backward()
        return [value.detach(), *(t.grad for t in leaves if t.requires_grad and t.grad is not None)]

    whole = case.leaves(frozen, bias)
    wanted = run([t.detach().requires_grad_(t.requires_grad) for t in whole])
    ranks = Ranks(len(sizes), monkeypatch)

    def on_rank(rank: int) -> list[Tensor]:
        own = [part(t, sizes, rank) for t in whole[1:]]
        hidden = whole[0].detach().clone().requires_grad_()
        return run([hidden, *own], process_group=ranks)

    found = ranks.run(on_rank)
    gathered = [
        [*of_rank[:2], *(torch.cat(grads) for grads in zip(*(f[2:] for f in found), strict=True))]
        for of_rank in found
    ]
    return wanted, gathered, ranks


def check(wanted: list[Tensor], found: list[list[Tensor]], rtol: float = 2e-5) -> None:
    for of_rank in found:
        assert len(of_rank) == len(wanted)
        for value, truth in zip(of_rank, wanted, strict=True):
            size = float(truth.abs().max())
            torch.testing.assert_close(value, truth, rtol=rtol, atol=rtol * size)


def mixed(stats: Any, case: Case) -> Tensor:
    """All facts at once, each weighed by numbers of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for at, (name, fact) in enumerate(stats._asdict().items()):
        if fact is not None and name != "argmax":
            total = total + (fact.double() * case.upstream[..., at % len(FACTS)]).sum()
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("fact", [*FACTS, "all"])
def test_every_statistic(
    fact: str, frozen: bool, layout: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case()
    case.labels[1, 1] = -100
    want = FACTS if fact == "all" else (fact,)

    def loss(logits: Tensor) -> Tensor:
        stats = onepass.vocab_stats(
            logits, case.labels, contrast_labels=case.contrast, bag_weights=case.bag,
            want=want, impl=impl,
        )  # fmt: skip
        return stats.argmax.sum() if fact == "argmax" else mixed(stats, case)

    wanted, found, _ = both(case, LAYOUTS[layout], loss, monkeypatch, frozen)
    check(wanted, found)
