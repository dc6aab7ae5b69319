"""The prompt files of a training: what they may be called, and who is held out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from ...training.prompts import Prompt, read_prompts, split

RETAIN_FILES = (
    "{category}_sanitized_prompts.json",
    "retain_prompts.json",
    "sanitized_prompts.json",
)
HARMFUL_FILES = ("{category}_prompts.json", "circuit_breaker_prompts.json", "harmful_prompts.json")
RETAIN_FIELDS = ("sanitized_prompt", "prompt", "original_prompt")
# Never sanitized_prompt: a file of pairs may be given as both sides.
HARMFUL_FIELDS = ("prompt", "original_prompt")


class Sides(NamedTuple):
    retain: list[Prompt]
    circuit_breaker: list[Prompt]
    validation: list[Prompt]  # sanitized prompts that are not trained on


def read_sides(
    harmful: str | Path,
    sanitized: str | Path,
    *,
    category: str | None = None,
    validation_ratio: float = 0.1,
    num_examples: int | None = None,
    seed: int = 0,
) -> Sides:
    """The prompts of a training; see `InfinityCircuitBreakerDataset` for the arguments.

    Raises:
        FileNotFoundError: no prompt file there.
        ValueError: a prompt file or a ratio that does not serve; the message says why.
    """
    broken = read_prompts(
        harmful, names=_names(HARMFUL_FILES, category), category=category, fields=HARMFUL_FIELDS
    )[:num_examples]
    kept = read_prompts(
        sanitized, names=_names(RETAIN_FILES, category), category=category, fields=RETAIN_FIELDS
    )
    Random(seed).shuffle(kept)
    retain, validation = split(kept, validation_ratio, seed)
    return Sides(retain[:num_examples], broken, validation)


def _names(files: Sequence[str], category: str | None) -> list[str]:
    with_category = [name.format(category=category) for name in files]
    return with_category if category is not None else with_category[1:]
