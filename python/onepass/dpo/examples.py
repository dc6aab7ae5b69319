"""Pairs of answers to a prompt, read from files and checked; needs no torch.

A side is a string or a list of {"role", "content"}.
"""

from __future__ import annotations

import logging
import math
import os.path
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..training.hub_data import renamed
from ..training.prompts import Prompt, read_prompts

SIDES = ("chosen", "rejected")
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")
logger = logging.getLogger("onepass")
Row = Mapping[str, Any]
TextOrTurns = str | list[dict[str, str]]  # a prompt: text, or a conversation


def read_pairs(path: str | Path) -> list[dict[str, Any]]:
    """The pairs of a .json or .jsonl file: objects with [prompt,] chosen, rejected; `place` is
    where each was found, for errors.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, empty or malformed, a pair that is
            none, by file and line.
    """
    return [prompt.record for prompt in read_preferences(path)]


def read_preferences(path: str | Path, names: Mapping[str, str] | None = None) -> list[Prompt]:
    """`read_pairs` as entries that `training.prompts.split` takes; `names` are new ones of columns
    by their old ones."""
    names = names or {}
    found: list[Prompt] = []
    seen: set[str] = set()
    called_chosen = [old for old, new in names.items() if new == "chosen"] or ["chosen"]
    for number, entry in enumerate(read_prompts(path, fields=called_chosen, what="pair"), 1):
        place = f"{entry.file}:{entry.line}" if entry.line else f"{entry.file}: entry {number}"
        seen |= set(entry.record)
        try:
            row = {**renamed(entry.record, names), "place": place}
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None
        check_pair(row, place)
        found.append(entry._replace(record=row))
    if missing := [name for name in names if name not in seen]:
        columns = ", ".join(sorted(seen))
        raise ValueError(f"{path}: no column {missing[0]!r} to rename, it has {columns}")
    return found


def check_pair(row: Row, place: str) -> None:
    """ValueError for what is no pair: `place`, what came, what was wanted."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{place}: got {_kind(row)}, wanted an object with chosen and rejected")
    for name in SIDES:
        if row.get(name) is None:
            keys = ", ".join(sorted(str(key) for key in row if key != "place")) or "nothing"
            raise ValueError(f"{place}: no {name!r}, wanted chosen and rejected; it has {keys}")
    for name in ("prompt", *SIDES):
        value = row.get(name)
        if value is not None and not isinstance(value, str) and not is_conversation(value):
            raise ValueError(
                f"{place}: got {_kind(value)} as {name!r}, wanted a string or a list of"
                ' {"role": ..., "content": text}'
            )
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(
            f"{place}: got {_kind(chosen)} as 'chosen' and {_kind(rejected)} as 'rejected', wanted"
            " both alike"
        )
    for name in SIDES:
        check_not_empty(row[name], name, place)
    if chosen == rejected:
        raise ValueError(f"{place}: 'chosen' and 'rejected' are equal: there is nothing to prefer")
    if prompt is not None and isinstance(prompt, str) != isinstance(chosen, str):
        if not (isinstance(prompt, str) and _asks(prompt, chosen) and _asks(prompt, rejected)):
            raise ValueError(
                f"{place}: got {_kind(prompt)} as 'prompt' and {_kind(chosen)} as 'chosen', wanted"
                " both alike"
            )
    given = [name for name in REFERENCE if row.get(name) is not None]
    for name in given:
        value = row[name]
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise ValueError(f"{place}: got {value!r} as {name!r}, wanted a finite number")
    if len(given) == 1:
        raise ValueError(f"{place}: got {given[0]!r} alone, wanted {' and '.join(REFERENCE)}")


def check_not_empty(side: Any, name: str, place: str, why: str = "") -> None:
    texts = [side] if isinstance(side, str) else [turn["content"] for turn in side]
    if not any(text.strip() for text in texts):
        raise ValueError(f"{place}: {name!r} is empty{why}, wanted text")


def is_conversation(value: Any) -> bool:
    """Whether it is a list of {"role", "content"}, both text."""
    return isinstance(value, list) and all(
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
        for turn in value
    )


def _asks(prompt: str, turns: Any) -> bool:
    """Whether a conversation begins with this prompt, as some datasets repeat it beside it."""
    return len(turns) > 1 and any(turn["content"] == prompt for turn in turns[:-1])


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    kinds = {str: "a string", list: "a list", dict: "an object", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)


def split_prompt(row: Row) -> dict[str, Any]:
    """Prompt, chosen and rejected of a checked row; without a prompt, what both begin with: whole
    messages of conversations, whole words of texts."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if prompt is not None and isinstance(prompt, str) == isinstance(chosen, str):
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str):
        common = os.path.commonprefix([chosen, rejected])
        at = max(common.rfind(" "), common.rfind("\n"))
        at = max(at, 0)  # the answers keep the space that their first word is written with
    else:
        at = 0
        while at < min(len(chosen), len(rejected)) and chosen[at] == rejected[at]:
            at += 1
    return {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}


def drop_repeated_prompts(pairs: list[dict[str, Any]], places: Sequence[str]) -> None:
    """Take the prompt off the answers where all pairs repeat it there; tell it."""

    def repeats(pair: Row) -> bool:
        n, prompt = len(pair["prompt"]), pair["prompt"]
        return n > 0 and all(pair[side][:n] == prompt for side in SIDES)

    repeating = [n for n, pair in enumerate(pairs) if repeats(pair)]
    if not repeating:
        return
    if len(repeating) < len(pairs):
        logger.warning(
            "%d of %d pairs repeat their prompt at the start of both answers (the first: %s): it"
            " is left there, where it counts as part of the answers",
            *(len(repeating), len(pairs), places[repeating[0]]),
        )
        return
    logger.warning(
        "all %d pairs repeat their prompt at the start of both answers: it is taken off there",
        len(pairs),
    )
    for pair, place in zip(pairs, places, strict=True):
        for side in SIDES:
            pair[side] = pair[side][len(pair["prompt"]) :]
            check_not_empty(pair[side], side, place, " once its prompt is taken off")
