"""Which tokens a language model's next-token scores come from: gradients with respect to its input.

Names load on first use: the methods need torch and transformers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {"Attribution": ".result", "attribute": ".methods", "load_all": ".result"}
__all__ = ["Attribution", "attribute", "load_all"]

if TYPE_CHECKING:
    from .methods import attribute
    from .result import Attribution, load_all


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.attribution' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
