"""Reductions of per-row losses: the only place that divides."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._check import check_weights
from .ops._launch import accumulation_dtype

REDUCTIONS = ("mean", "sum", "none")


def reduce_rows(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: str = "mean",
    num_items: Tensor | float | None = None,
) -> Tensor:
    """Weighted rows reduced to their mean, their sum, or left as they are.

    Args:
        values: [...] per-row losses.
        mask: [...] weights; bool or integers count as 0/1. A row of weight 0 contributes nothing,
            whatever it holds.
        reduction: "mean", "sum" or "none".
        num_items: divides the sum instead of the sum of weights (gradient accumulation over
            micro-batches).

    Formula: mean = sum(mask * values) / max(sum(mask), 1): 0 with a live graph where no row counts.
    """
    if mask is not None:
        # Integers number segments as often as they mark rows: they count, they do not weigh.
        weights = (mask if mask.is_floating_point() else mask != 0).to(values)
        values = torch.where(weights != 0, values, 0.0) * weights
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    if num_items is not None:
        items = torch.as_tensor(num_items, dtype=values.dtype, device=values.device)
        return total / torch.where(items == 0, 1.0, items)
    if mask is None:
        return total / max(values.numel(), 1)
    return total / weights.sum().clamp_min(1)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` [...] over the rows where `mask` [...] is set, weighted where it is a float;
    0-dim.

    No row set: 0, with a live graph and zero gradients, never NaN. A NaN in a row that is not set
        does not
    leak. The mean is float32 (float64 for float64 values).

    Formula: sum(mask * values) / max(sum(mask), 1).
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor: got {type(values).__name__}")
    if values.is_complex():
        raise ValueError(f"values must be real numbers: got {values.dtype}")
    check_weights("mask", mask, values.shape)
    return reduce_rows(values.to(accumulation_dtype(values.dtype)), mask)
