"""Jigsaw: a noise transform of input embeddings and the adapters that alone understand it.

Names load on first use: the losses need torch, the trainer transformers, an adapter PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "gaussian_entropy_log_loss": ".entropy",
    "gaussian_mixture_entropy": ".entropy",
    "mutual_information_sub_batch": ".entropy",
    "square_mahalanobis_distance": ".entropy",
    "voronoi_characteristic_length": ".entropy",
}
__all__ = [
    "gaussian_entropy_log_loss",
    "gaussian_mixture_entropy",
    "mutual_information_sub_batch",
    "square_mahalanobis_distance",
    "voronoi_characteristic_length",
]

if TYPE_CHECKING:
    from .entropy import (
        gaussian_entropy_log_loss,
        gaussian_mixture_entropy,
        mutual_information_sub_batch,
        square_mahalanobis_distance,
        voronoi_characteristic_length,
    )


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.jigsaw' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
