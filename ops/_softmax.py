"""A row's exponentials in torch: what the references of both vocabulary families start from."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Exponentials(NamedTuple):
    """A row relative to its maximum, with the mass beside the maximum."""

    top: Tensor  # [n] the largest logit
    gap: Tensor  # [n, V] z - top; the exponentials in its place where it was not to be kept
    e: Tensor  # [n, V] exp(z - top): 1 at the maximum
    rest: Tensor  # [n] sum of e without the maximum; NaN where the maximum is not finite


def exponentials(z: Tensor, keep_gap: bool = True, room: Tensor | None = None) -> Exponentials:
    """Of logits [n, V], float32 or float64. Without `keep_gap` a temporary less, with `room` [n, V]
    another: on a CPU fresh memory costs as much as the exponential."""
    top = z.amax(dim=-1, keepdim=True)
    gap = torch.sub(z, top, out=room)
    e = gap.exp() if keep_gap else gap.exp_()
    top = top.squeeze(-1)
    rest = sum_beside_one(e).masked_fill(top.isinf(), float("nan"))
    return Exponentials(top, gap, e, rest)


def sum_beside_one(e: Tensor) -> Tensor:
    """sum(e) - 1 of rows [n, V] whose maximum is 1, to full relative accuracy however small it is.

    From 2 on the subtraction costs nothing. Below, float32 is summed in float64; where even that
    has too few digits, exactly one element is 1, and the others are summed without it.
    """
    rest = e.sum(-1) - 1
    small = rest < 1
    if e.dtype == torch.float32 and small.any():
        wide = (e.sum(-1, dtype=torch.float64) - 1).float()
        rest = torch.where(small, wide, rest)
        small = rest < 1e-8
    rows = small.nonzero().squeeze(-1)
    if rows.numel() == 0:
        return rest
    picked = e[rows]
    return rest.index_copy(0, rows, picked.masked_fill(picked == 1, 0.0).sum(-1))
