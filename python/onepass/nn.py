"""Modules around the losses, for code that builds its criterion once and calls it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .head_loss import linear_cross_entropy
from .ops._check import check_choice, check_number
from .ops._launch import IMPLS
from .reduce import REDUCTIONS

if TYPE_CHECKING:
    from torch.nn import LinearCrossEntropyOptions


class LinearCrossEntropyLoss(torch.nn.Module):
    """`torch.nn.LinearCrossEntropyLoss` (torch 2.13) over `onepass.linear_cross_entropy`: same
    arguments, same parameters and names in its state_dict, whatever the installed torch.

    Args:
        in_features: D. num_classes: C.
        out_features: (d1, ...) for a loss at every position; () for one a row.
        bias: whether the head has one.
        device, dtype: of the head's parameters.
        reduction: "mean", "sum" or "none".
        weight: [C] class weights, a buffer.
        ignore_index, label_smoothing, options, impl: as in `onepass.linear_cross_entropy`.

    Called with input [D] or [N, D] and target [], [N] or [N, d1, ...] (or probabilities); 0-dim, or
    the target's shape for "none". `linear.weight` [C * d1 * ..., D] is the head, one matrix.

    Raises:
        TypeError: an option of another type. ValueError: an option that does not fit.

    Formula: cross_entropy(linear(input), target).
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: LinearCrossEntropyOptions | None = None,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("impl", impl, IMPLS)
        check_number("label_smoothing", label_smoothing, 0.0, 1.0)
        if weight is not None and weight.shape != (num_classes,):
            raise ValueError(f"weight must be ({num_classes},): got {tuple(weight.shape)}")
        self.num_classes = num_classes
        self.out_features = tuple(out_features)
        self.reduction = reduction
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.options = options
        self.impl = impl
        self.register_buffer("weight", weight)
        self.linear = torch.nn.Linear(
            in_features,
            math.prod(self.out_features, start=num_classes),
            bias=bias,
            device=device,
            dtype=dtype,
        )

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of input [D] or [N, D]; 0-dim, or the target's shape for "none"."""
        shape = (self.num_classes, *self.out_features)
        bias = None if self.linear.bias is None else self.linear.bias.view(shape)
        return linear_cross_entropy(
            input,
            self.linear.weight.view(*shape, self.linear.in_features),
            target,
            linear_bias=bias,
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        parts = ("num_classes", "out_features", "reduction", "ignore_index", "label_smoothing")
        return ", ".join(f"{part}={getattr(self, part)!r}" for part in parts)
