"""From an estimator's output to the standard deviation and the mean of a transform's noise.

Each stays within its bounds, and has a slope as long as e^-|x| has one: an element that sits at a
bound still knows its way back, where tanh in single precision is flat from 9 on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ..losses import sigmoid_cap
from ..ops._check import check_number


def _checked_scale(scale: Any, largest: float) -> tuple[float, float]:
    try:
        low, high = (float(bound) for bound in scale)
    except (TypeError, ValueError):
        raise ValueError(f"scale must be (min, max), two numbers: got {scale!r}") from None
    if not 0 <= low < high <= largest:
        raise ValueError(f"scale must be (min, max) with 0 <= min < max: got {scale!r}")
    return low, high


@dataclass(frozen=True)
class CloakStandardDeviationParameterization:
    """Standard deviations in the open interval `scale`.

    Args:
        scale: (min, max).
        shallow: the larger, the less the standard deviation follows the estimator's output rho.

    Formula: std = min + (max - min) * (1 + tanh(rho / shallow)) / 2.
    """

    scale: tuple[float, float] = (1e-4, 2.0)
    shallow: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _checked_scale(self.scale, 1e300))
        _check_above_0("shallow", self.shallow)

    @property
    def max_std(self) -> float:
        return self.scale[1]

    def __call__(self, rhos: Tensor) -> Tensor:
        low, high = self.scale
        return low + sigmoid_cap(rhos, high - low, 2 / self.shallow)

    def inverse(self, std: float) -> float:
        """The rho that gives `std`; ValueError where none does."""
        low, high = self.scale
        if not low < std < high:
            raise ValueError(f"std must lie between {low} and {high}, the scale: got {std}")
        return self.shallow / 2 * math.log((std - low) / (high - std))


@dataclass(frozen=True)
class DirectStandardDeviationParameterization:
    """The estimator's output, clamped to `scale`, as the standard deviation; outside it has no
    gradient. The upper bound may be infinite."""

    scale: tuple[float, float] = (1e-4, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", _checked_scale(self.scale, math.inf))

    @property
    def max_std(self) -> float:
        return self.scale[1]

    def __call__(self, rhos: Tensor) -> Tensor:
        return rhos.clamp(*self.scale)

    def inverse(self, std: float) -> float:
        """`std`; ValueError outside the scale."""
        low, high = self.scale
        if not low <= std <= high:
            raise ValueError(f"std must lie from {low} to {high}, the scale: got {std}")
        return std


@dataclass(frozen=True)
class BoundedMeanParameterization:
    """Means between -bound and bound.

    Formula: mean = bound * tanh((rhos + init_shift) / bound).
    """

    bound: float
    init_shift: float = 0.0

    def __post_init__(self) -> None:
        _check_above_0("bound", self.bound)
        check_number("init_shift", self.init_shift)

    def __call__(self, rhos: Tensor) -> Tensor:
        return sigmoid_cap(rhos + self.init_shift, self.bound, 2 / self.bound, "zero_at_zero")


@dataclass(frozen=True)
class DirectMeanParameterization:
    """The estimator's output as the mean."""

    def __call__(self, rhos: Tensor) -> Tensor:
        return rhos


StdParameterization = (
    CloakStandardDeviationParameterization | DirectStandardDeviationParameterization
)
MeanParameterization = BoundedMeanParameterization | DirectMeanParameterization
_ALL = {
    kind.__name__: kind
    for kind in (
        CloakStandardDeviationParameterization,
        DirectStandardDeviationParameterization,
        BoundedMeanParameterization,
        DirectMeanParameterization,
    )
}


def _check_above_0(name: str, value: float) -> None:
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0: got {value}")


def to_config(parameterization: StdParameterization | MeanParameterization) -> dict[str, Any]:
    """What `from_config` makes the same of, for JSON: an infinite bound becomes None."""
    options = asdict(parameterization)
    if "scale" in options:
        options["scale"] = [x if math.isfinite(x) else None for x in options["scale"]]
    return {"type": type(parameterization).__name__, **options}


def from_config(config: Mapping[str, Any], kinds: Any) -> Any:
    """A parameterization of one of `kinds` from `to_config`; ValueError for anything else."""
    options = dict(config) if isinstance(config, Mapping) else {}
    kind = _ALL.get(str(options.pop("type", None)))
    if kind is None or not issubclass(kind, kinds):
        allowed = ", ".join(sorted(n for n, known in _ALL.items() if issubclass(known, kinds)))
        raise ValueError(f"a parameterization must be one of {allowed}: got {config!r}")
    if isinstance(options.get("scale"), list):
        options["scale"] = tuple(math.inf if x is None else x for x in options["scale"])
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{kind.__name__}: {error}") from None
