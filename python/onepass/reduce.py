"""Reductions of per-row losses: the only place that divides."""

from __future__ import annotations

import torch
from torch import Tensor

from .ops._check import (
    check_choice,
    check_number,
    check_same_device,
    check_weights,
    values_checked,
)
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
        values: [...] per-row losses, floating.
        mask: [...] weights; bool or integers count as 0/1. A row of weight 0 contributes nothing,
            whatever it holds.
        reduction: "mean", "sum" or "none".
        num_items: divides the sum instead of the sum of weights (gradient accumulation over
            micro-batches), where it is more than 0; only for "mean". As a tensor on the device of
            `values` it costs no sync.

    Raises:
        ValueError: a mask of another shape or on another device, num_items without a mean.

    Formula: mean = sum(mask * values) / max(sum(mask), 1): 0 with a live graph where no row counts.
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor: got {type(values).__name__}")
    check_choice("reduction", reduction, REDUCTIONS)
    check_weights("mask", mask, values.shape)
    check_num_items(num_items, reduction)
    if mask is not None:
        check_same_device("mask", mask, "values", values)
        weights = row_weights(mask, values.dtype)
        values = torch.where(weights != 0, values, 0.0) * weights
    if reduction == "none":
        return values
    total = values.sum()
    if reduction == "sum":
        return total
    return total / mean_divisor(values, None if mask is None else weights, num_items)


def row_weights(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask weighs its rows by: integers number segments as often as they mark rows, so they
    count and do not weigh."""
    return (mask if mask.is_floating_point() else mask != 0).to(dtype)


def mean_divisor(
    rows: Tensor, weights: Tensor | None, num_items: Tensor | float | None
) -> Tensor | float:
    """What the mean over `rows` [...] divides their sum by."""
    if isinstance(num_items, Tensor):
        wide = torch.promote_types(num_items.dtype, torch.float32)
        items = num_items.to(rows.device, wide).reshape(())
        return torch.where(items == 0, 1.0, items)
    if num_items is not None:
        return float(num_items) or 1.0
    return float(max(rows.numel(), 1)) if weights is None else weights.sum().clamp_min(1)


def check_num_items(num_items: object, reduction: str) -> None:
    """Raises unless `num_items` is None, or one number of items in the whole batch for a mean."""
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items divides a mean: got reduction="{reduction}"; leave one out')
    if not isinstance(num_items, Tensor):
        check_number("num_items", num_items, 0.0)
    elif num_items.numel() != 1:
        raise ValueError(f"num_items must be one number: got shape {tuple(num_items.shape)}")
    elif values_checked(num_items):
        check_number("num_items", num_items.item(), 0.0)


def masked_mean(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean of `values` [...] over the rows where `mask` [...] is set, weighted where it is a float;
    0-dim.

    No row set: 0, with a live graph and zero gradients, never NaN. A NaN in a row that is not set
    does not leak. The mean is float32 (float64 for float64 values).

    Formula: sum(mask * values) / max(sum(mask), 1).
    """
    if not isinstance(values, Tensor):
        raise TypeError(f"values must be a torch.Tensor: got {type(values).__name__}")
    if values.is_complex():
        raise ValueError(f"values must be real numbers: got {values.dtype}")
    check_weights("mask", mask, values.shape)
    return reduce_rows(values.to(accumulation_dtype(values.dtype)), mask)
