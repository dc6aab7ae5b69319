"""The losses' own tests once more, with LazyLogits in the place of logits.

Hidden states are the logits, the head's matrix is the identity, so the numbers are the same to the
last bit. Logits that are not finite stay as they are, since 0 * inf is not 0: masked rows that hold
NaN have tests of their own in test_head.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
import test_cross_entropy
import test_losses
from onepass import LazyLogits

# What compares rows beside NaN with rows alone, to the bit (the former would stay as they are), and
# what looks at errors, at memory, at the interpreter or at compiled graphs of whole logits.
NOT_OF_LOGITS = (
    "error", "raises", "refus", "bad", "l2", "inner", "cosine", "masked_mean", "sigmoid_cap",
    "signature", "compile", "opinfo", "sync", "version", "in_place", "mutat", "guard", "bytes",
    "change_nothing",
)  # fmt: skip


def taken_from(module: Any) -> dict[str, Callable[..., Any]]:
    return {
        name: test
        for name, test in vars(module).items()
        if name.startswith("test_") and not any(word in name for word in NOT_OF_LOGITS)
    }


globals().update(taken_from(test_losses))
globals().update(
    {
        name.replace("test_", "test_ce_", 1): test
        for name, test in taken_from(test_cross_entropy).items()
    }
)


def lazily(logits: object) -> object:
    """The logits as LazyLogits, where they are [N, V] or [B, S, V] of numbers."""
    fits = (
        isinstance(logits, Tensor)
        and not isinstance(logits, LazyLogits)
        and logits.is_floating_point()
        and logits.dim() in (2, 3)
        and logits.shape[-1] > 0
        and bool(logits.isfinite().all())
    )
    if not fits:
        return logits
    assert isinstance(logits, Tensor)
    eye = torch.eye(logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return LazyLogits(logits, eye)


@pytest.fixture
def impl() -> str:
    return "torch"


@pytest.fixture(autouse=True)
def lazy_losses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every call of a loss is made on LazyLogits."""
    made: list[str] = []

    def wrapped(loss: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        @functools.wraps(loss)
        def call(logits: object, *args: Any, **kwargs: Any) -> Tensor:
            if name == "cross_entropy" and isinstance(logits, Tensor) and logits.dim() > 2:
                return loss(logits, *args, **kwargs)  # classes are dimension 1
            with onepass.strict():
                lazy = lazily(logits)
                made.append(type(lazy).__name__)
                return loss(lazy, *args, **kwargs)

        return call

    for name in ("cross_entropy", "masked_cross_entropy"):
        monkeypatch.setattr(onepass, name, wrapped(getattr(onepass, name), name))
    return made


def test_the_losses_get_lazy_logits(lazy_losses: list[str]) -> None:
    logits = torch.randn(3, 5, requires_grad=True)
    onepass.masked_cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
    onepass.cross_entropy(logits, torch.tensor([1, 2, 3])).backward()
    assert lazy_losses == ["LazyLogits", "LazyLogits"]
