"""A tiny language model of bytes, prompts for it, and rewards as a user writes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .tiny_language_model import model, tokenizer

PROMPTS = ["the old", "def f", "a"]


def save(folder: Path) -> Path:
    """folder/model and folder/prompts.txt; returns the model's folder."""
    made = model(2)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        made.lm_head.weight.normal_(std=0.3)
    made.config.use_cache = True
    made.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    return folder / "model"


def save_classifier(folder: Path) -> Any:
    """A sequence classifier with three labels, saved in `folder`."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from .tiny_models import SIZES

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        config = LlamaConfig(**SIZES | {"vocab_size": 260, "num_hidden_layers": 1}, num_labels=3)
        config.pad_token_id = 0
        made = LlamaForSequenceClassification(config).eval()
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return made


def letters(texts: Sequence[str]) -> list[int]:
    """How many ASCII letters a text has."""
    return [sum(c.isascii() and c.isalpha() for c in text) for text in texts]


def constant(texts: Sequence[str]) -> list[float]:
    return [1.0] * len(texts)


def broken(texts: Sequence[str]) -> list[float]:
    raise KeyError("no such thing")


def too_few(texts: Sequence[str]) -> list[float]:
    return [1.0]


def not_finite(texts: Sequence[str]) -> list[float]:
    return [float("nan")] * len(texts)
