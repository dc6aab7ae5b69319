"""Exponentials and logarithms without their linear part, which divergences of nearly equal rows are
sums of: series near 0, where the difference that each is would be rounding alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def bend(x: Tensor) -> Tensor:
    """expm1(x) - x without cancellation near 0."""
    small = x.abs() < (0.25 if x.dtype != torch.float64 else 1e-2)
    s = torch.where(small, x, 0.0)  # the series alone, whose powers of a large x would overflow
    terms = 1 / 24 + s * (1 / 120 + s * (1 / 720 + s * (1 / 5040 + s / 40320)))
    series = s * s * (0.5 + s * (1 / 6 + s * terms))
    return torch.where(small, series, torch.expm1(x.clamp_max(80.0)) - x)


def log_bend(y: Tensor) -> Tensor:
    """y - log1p(y) without cancellation near 0, y > -1."""
    w = y / (2 + y)
    v = w * w
    tail = 1 / 7 + v * (1 / 9 + v * (1 / 11 + v / 13))
    series = y * w - 2 * w * v * (1 / 3 + v * (1 / 5 + v * tail))
    small = y.abs() < (0.5 if y.dtype != torch.float64 else 2e-2)
    return torch.where(small, series, y - torch.log1p(y))


def entropy_bend(x: Tensor, log_1p: Tensor) -> Tensor:
    """(1 + x) log(1 + x) - x without cancellation near 0, given log(1 + x)."""
    small = x.abs() < (0.25 if x.dtype != torch.float64 else 1e-2)
    s = torch.where(small, x, 0.0)
    tail = 1 / 30 - s * (1 / 42 - s * (1 / 56 - s * (1 / 72 - s / 90)))
    series = s * s * (0.5 - s * (1 / 6 - s * (1 / 12 - s * (1 / 20 - s * tail))))
    return torch.where(small, series, (1 + x) * log_1p - x)
