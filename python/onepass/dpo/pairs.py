"""Pairs of answers to one prompt, drawn at random: the one with the higher score is chosen.

Chosen and rejected are the answers alone: the prompt, which the trainer puts before both, would
stand there twice otherwise.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ..cli.files import replace_text
from .examples import SIDES, TextOrTurns


class Pair(NamedTuple):
    prompt: TextOrTurns
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float


class Drawn(NamedTuple):
    """The pairs, and what was left out by reason."""

    pairs: list[Pair]
    counts: dict[str, int]


def draw_pairs(
    prompts: Sequence[TextOrTurns],
    answers: Sequence[Sequence[str]],
    scores: Sequence[Sequence[float]],
    pairs_per_prompt: int,
    seed: int,
) -> Drawn:
    """At most `pairs_per_prompt` different pairs of each prompt, drawn without replacement.

    Args:
        answers, scores: a list of each for every prompt.

    An answer that is blank or came before is in no pair, and no two of one score are paired.
    """
    shuffle = random.Random(seed)
    counts = dict.fromkeys(
        (
            *("prompts", "answers", "blank_answers", "repeated_answers", "tied_pairs", "pairs"),
            *("prompts_without_pairs", "prompts_with_fewer_pairs"),
        ),
        0,
    )
    pairs: list[Pair] = []
    for prompt, texts, values in zip(prompts, answers, scores, strict=True):
        counts["prompts"] += 1
        counts["answers"] += len(texts)
        known: dict[str, float] = {}
        for text, value in zip(texts, values, strict=True):
            if not text.strip():
                counts["blank_answers"] += 1
            elif text in known:
                counts["repeated_answers"] += 1
            else:
                known[text] = value
        every = list(combinations(known.items(), 2))
        apart = [(a, b) for a, b in every if a[1] != b[1]]
        counts["tied_pairs"] += len(every) - len(apart)
        if not apart:
            counts["prompts_without_pairs"] += 1
        elif len(apart) < pairs_per_prompt:
            counts["prompts_with_fewer_pairs"] += 1
        for two in shuffle.sample(apart, min(pairs_per_prompt, len(apart))):
            (rejected, low), (chosen, high) = sorted(two, key=lambda one: one[1])
            pairs.append(Pair(prompt, chosen, rejected, high, low))
    counts["pairs"] = len(pairs)
    return Drawn(pairs, counts)


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """A JSON object a line, whole or not at all; answers to a conversation are turns of it."""
    lines = []
    for pair in pairs:
        row = pair._asdict()
        if not isinstance(pair.prompt, str):
            row |= {s: [{"role": "assistant", "content": row[s]}] for s in SIDES}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    replace_text(path, "".join(lines))


def told(counts: dict[str, int], pairs_per_prompt: int) -> Iterator[str]:
    """What was left out, in words."""
    yield f"{counts['pairs']} pairs of {counts['answers']} answers to {counts['prompts']} prompts"
    n = counts["blank_answers"], counts["repeated_answers"]
    if any(n):
        yield f"left out: {n[0]} blank answers, {n[1]} that came before for the same prompt"
    if counts["tied_pairs"]:
        yield f"not paired: {counts['tied_pairs']} pairs of one score"
    if counts["prompts_with_fewer_pairs"]:
        fewer = counts["prompts_with_fewer_pairs"]
        yield f"{fewer} prompts have fewer than {pairs_per_prompt} pairs"
    if counts["prompts_without_pairs"]:
        yield f"{counts['prompts_without_pairs']} prompts have no pair: their answers score alike"
