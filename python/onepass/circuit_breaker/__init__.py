"""Circuit breakers: hidden states of harmful prompts turned away, all others held in place.

Names load on first use: the losses need torch, the trainer transformers, an adapter PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "CircuitBreakerDataset": ".data",
    "CircuitBreakerTrainer": ".trainer",
    "LoraArguments": ".arguments",
    "LorraArguments": ".arguments",
    "Rerouting": ".loss",
    "circuit_breaker_loss": ".losses",
    "compute_loss": ".loss",
    "data_collator": ".data",
    "jitter": ".adapter",
    "lora_config": ".adapter",
    "precompute": ".reference",
    "reference_hidden_states": ".loss",
    "rerouting_loss": ".loss",
    "retain_loss": ".losses",
    "schedule": ".losses",
}
__all__ = [
    "CircuitBreakerDataset",
    "CircuitBreakerTrainer",
    "LoraArguments",
    "LorraArguments",
    "Rerouting",
    "circuit_breaker_loss",
    "compute_loss",
    "data_collator",
    "infinity",
    "jitter",
    "lora_config",
    "precompute",
    "reference_hidden_states",
    "rerouting_loss",
    "retain_loss",
    "schedule",
]

if TYPE_CHECKING:
    from . import infinity as infinity
    from .adapter import jitter, lora_config
    from .arguments import LoraArguments, LorraArguments
    from .data import CircuitBreakerDataset, data_collator
    from .loss import Rerouting, compute_loss, reference_hidden_states, rerouting_loss
    from .losses import circuit_breaker_loss, retain_loss, schedule
    from .reference import precompute
    from .trainer import CircuitBreakerTrainer


def __getattr__(name: str) -> Any:
    if name == "infinity":
        return import_module(".infinity", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.circuit_breaker' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
