"""Circuit breakers for Infinity-style autoregressive image models. Names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "Infinity": ".model",
    "InfinityArguments": ".arguments",
    "InfinityCircuitBreakerDataset": ".data",
    "InfinityCircuitBreakerTrainer": ".trainer",
    "InfinityConfig": ".config",
    "T5TextEncoder": ".text",
    "TextEncoder": ".text",
    "WordEncoder": ".text",
    "build_circuit_breaker_dataset": ".data",
    "compute_infinity_circuit_breaker_loss": ".loss",
    "data_collator_infinity": ".data",
    "lora_target_modules": ".model",
}
__all__ = [
    "Infinity",
    "InfinityArguments",
    "InfinityCircuitBreakerDataset",
    "InfinityCircuitBreakerTrainer",
    "InfinityConfig",
    "T5TextEncoder",
    "TextEncoder",
    "WordEncoder",
    "build_circuit_breaker_dataset",
    "compute_infinity_circuit_breaker_loss",
    "data_collator_infinity",
    "lora_target_modules",
]

if TYPE_CHECKING:
    from .arguments import InfinityArguments
    from .config import InfinityConfig
    from .data import (
        InfinityCircuitBreakerDataset,
        build_circuit_breaker_dataset,
        data_collator_infinity,
    )
    from .loss import compute_infinity_circuit_breaker_loss
    from .model import Infinity, lora_target_modules
    from .text import T5TextEncoder, TextEncoder, WordEncoder
    from .trainer import InfinityCircuitBreakerTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
