"""DPO: preference losses over log-probabilities of pairs, and the trainer that they belong to.

Names load on first use: the losses need torch, the trainer transformers, an adapter PEFT.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "DPOArguments": ".arguments",
    "DPOLoss": ".losses",
    "DPOTrainer": ".trainer",
    "MyDPOTrainer": ".trainer",
    "PreferenceCollator": ".data",
    "PreferenceDataset": ".data",
    "SequenceLogps": ".logps",
    "check_loss": ".losses",
    "dpo_loss": ".losses",
    "ld_weights": ".logps",
    "read_pairs": ".examples",
    "sequence_logps": ".logps",
    "wpo_weights": ".logps",
}
__all__ = [
    "DPOArguments",
    "DPOLoss",
    "DPOTrainer",
    "MyDPOTrainer",
    "PreferenceCollator",
    "PreferenceDataset",
    "SequenceLogps",
    "check_loss",
    "dpo_loss",
    "ld_weights",
    "read_pairs",
    "sequence_logps",
    "wpo_weights",
]

if TYPE_CHECKING:
    from .arguments import DPOArguments
    from .data import PreferenceCollator, PreferenceDataset
    from .examples import read_pairs
    from .logps import SequenceLogps, ld_weights, sequence_logps, wpo_weights
    from .losses import DPOLoss, check_loss, dpo_loss
    from .trainer import DPOTrainer, MyDPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.dpo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
