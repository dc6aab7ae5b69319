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
    "Sampling": ".generate",
    "SequenceLogps": ".logps",
    "check_loss": ".losses",
    "distinct": ".evaluate",
    "dpo_loss": ".losses",
    "draw_pairs": ".pairs",
    "ld_weights": ".logps",
    "measure": ".evaluate",
    "read_pairs": ".examples",
    "sample_answers": ".generate",
    "sequence_logps": ".logps",
    "token_entropy": ".evaluate",
    "wpo_weights": ".logps",
}
__all__ = [
    "DPOArguments",
    "DPOLoss",
    "DPOTrainer",
    "MyDPOTrainer",
    "PreferenceCollator",
    "PreferenceDataset",
    "Sampling",
    "SequenceLogps",
    "check_loss",
    "distinct",
    "dpo_loss",
    "draw_pairs",
    "ld_weights",
    "measure",
    "read_pairs",
    "sample_answers",
    "sequence_logps",
    "token_entropy",
    "wpo_weights",
]

if TYPE_CHECKING:
    from .arguments import DPOArguments
    from .data import PreferenceCollator, PreferenceDataset
    from .evaluate import distinct, measure, token_entropy
    from .examples import read_pairs
    from .generate import Sampling, sample_answers
    from .logps import SequenceLogps, ld_weights, sequence_logps, wpo_weights
    from .losses import DPOLoss, check_loss, dpo_loss
    from .pairs import draw_pairs
    from .trainer import DPOTrainer, MyDPOTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.dpo' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
