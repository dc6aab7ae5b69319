"""How an estimator's output, which may be any number, becomes a standard deviation or a mean.

Each has an exact inverse. The curved ones keep the direction of their slope however far they
saturate; the direct standard deviation is clamped, and has slope 0 outside of its interval.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..losses import sigmoid_cap
from ..ops._check import check_above_0, check_number


class CloakStandardDeviationParameterization(nn.Module):
    """Standard deviations in an open interval.

    Args:
        scale: (min, max) of the standard deviations, 0 <= min < max.
        shallow: temperature: the larger, the flatter.

    Formula: std = min + (max - min) (1 + tanh(rho / shallow)) / 2.
    """

    def __init__(self, scale: tuple[float, float] = (1e-4, 2.0), shallow: float = 1.0) -> None:
        super().__init__()
        self.min, self.max = check_scale(scale)
        check_above_0("shallow", shallow)
        self.shallow = shallow

    def forward(self, rhos: Tensor) -> Tensor:
        """Standard deviations of `rhos`, any shape."""
        return self.min + sigmoid_cap(rhos, self.max - self.min, 2 / self.shallow)

    def inverse(self, stds: Tensor) -> Tensor:
        """The `rhos` that give these standard deviations, each within the interval."""
        share = (stds - self.min) / (self.max - self.min)
        return 0.5 * self.shallow * (share.log() - (-share).log1p())


class DirectStandardDeviationParameterization(nn.Module):
    """Standard deviations that are the estimator's output, clamped to `scale` = (min, max)."""

    def __init__(self, scale: tuple[float, float] = (1e-4, 2.0)) -> None:
        super().__init__()
        self.min, self.max = check_scale(scale)

    def forward(self, rhos: Tensor) -> Tensor:
        """Standard deviations of `rhos`, any shape."""
        return rhos.clamp(self.min, self.max)

    def inverse(self, stds: Tensor) -> Tensor:
        """The `rhos` that give these standard deviations."""
        return stds


class DirectMeanParameterization(nn.Module):
    """Means that are the estimator's output."""

    def forward(self, rhos: Tensor) -> Tensor:
        """Means of `rhos`, any shape."""
        return rhos

    def inverse(self, means: Tensor) -> Tensor:
        """The `rhos` that give these means."""
        return means


class BoundedMeanParameterization(nn.Module):
    """Means between -bound and bound.

    Formula: mean = bound tanh((rho + init_shift) / bound).
    """

    def __init__(self, bound: float, init_shift: float = 0.0) -> None:
        super().__init__()
        check_above_0("bound", bound)
        check_number("init_shift", init_shift)
        self.bound, self.init_shift = bound, init_shift

    def forward(self, rhos: Tensor) -> Tensor:
        """Means of `rhos`, any shape."""
        return sigmoid_cap(rhos + self.init_shift, self.bound, 2 / self.bound, "zero_at_zero")

    def inverse(self, means: Tensor) -> Tensor:
        """The `rhos` that give these means, each within the bound."""
        return self.bound * torch.atanh(means / self.bound) - self.init_shift


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    """`scale` as (min, max), ValueError unless 0 <= min < max."""
    try:
        low, high = scale
        fits = 0 <= low < high and math.isfinite(high)
    except (TypeError, ValueError):  # of two numbers
        fits = False
    if not fits:
        raise ValueError(f"scale must be (min, max) with 0 <= min < max: got {scale!r}")
    return low, high
