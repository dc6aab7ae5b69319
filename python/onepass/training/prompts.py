"""Prompt files: JSON, JSON Lines or plain text, read into one list; a bad entry is named.

An entry is a string or an object; what an object holds beside its prompt stays in `record`, for
those who train on more than the prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FIELDS = ("sanitized_prompt", "prompt", "original_prompt", "text", "messages")
LINES = (".jsonl", ".ndjson")
SUFFIXES = (".json", *LINES, ".txt")
MAX_LISTED = 12


class Prompt(NamedTuple):
    text: str
    record: dict[str, Any]  # the whole entry; of a string, {"prompt": text}
    file: Path
    line: int | None  # None in a JSON document, whose entries have numbers, not lines
    category: str | None  # the entry's own, or else that of the document around it


def read_prompts(
    path: str | Path,
    *,
    names: Sequence[str] = (),
    category: str | None = None,
    fields: Sequence[str] = FIELDS,
    what: str = "prompt",
) -> list[Prompt]:
    """All prompts of a file, in its order.

    Args:
        path: .json (a list, or an object with the list as "prompts" and at will a "category"),
            .jsonl (an entry a line) or .txt (a prompt a line); or a folder.
        names: what the file may be called in a folder; the first that exists is read. A .jsonl
            stands in for a .json that is missing.
        category: entries of another category are left out; those without one stay.
        fields: where an object has its prompt; the first that it has counts. A conversation (a
            list of {"role", "content"}) gives its contents, a line each.
        what: an entry is called in errors.

    Raises:
        FileNotFoundError: no such file, or none of `names` in the folder.
        ValueError: an empty file, one that is not UTF-8 or not JSON, an entry without a prompt, no
            entry of `category`. The message names file and line (of a JSON document, the entry).
    """
    file = _find(Path(path), names)
    if file.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{file}: got a {file.suffix or 'nameless'} file, wanted {_or(SUFFIXES)}")
    text = utf8_text(file)
    if file.suffix.lower() == ".json":
        entries = _json_entries(file, text)
    elif file.suffix.lower() in LINES:
        entries = _jsonl_entries(file, text)
    else:
        entries = _txt_entries(text)
    prompts = [_prompt(file, fields, *entry) for entry in entries]
    if not prompts:
        raise ValueError(f"{file}: holds no {what}, wanted at least one")
    if category is None:
        return prompts
    kept = [prompt for prompt in prompts if prompt.category in (None, category)]
    if not kept:
        found = sorted({str(prompt.category) for prompt in prompts})
        raise ValueError(f"{file}: no prompt of category {category!r}, found {_listed(found)}")
    return kept


def split(
    prompts: list[Prompt], ratio: float, seed: int, what: str = "examples"
) -> tuple[list[Prompt], list[Prompt]]:
    """(training, held out): a share of `ratio`, drawn with `seed`, is held out; at least one where
    the share is not 0.

    Raises:
        ValueError: a ratio outside [0, 1), nothing left to train on.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"validation_ratio must be from 0 to below 1: got {ratio}")
    n_held_out = max(int(len(prompts) * ratio), 1) if ratio else 0
    if n_held_out >= len(prompts):
        raise ValueError(
            f"validation_ratio={ratio} of {len(prompts)} {what} of {prompts[0].file} leaves none"
            " to train on"
        )
    held_out = set(random.Random(seed).sample(range(len(prompts)), n_held_out))
    parts: tuple[list[Prompt], list[Prompt]] = [], []
    for n, prompt in enumerate(prompts):
        parts[n in held_out].append(prompt)
    return parts


# line, entry's number (from 1), the entry, the category around it
_Entry = tuple[int | None, int, Any, str | None]


def _find(path: Path, names: Sequence[str]) -> Path:
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file")
        return path
    if not names:
        raise ValueError(f"{path}: got a folder, wanted a file ({_or(SUFFIXES)})")
    for name in names:
        for file in (path / name, (path / name).with_suffix(".jsonl")):
            if file.is_file():
                return file
    found = sorted(file.name for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    raise FileNotFoundError(
        f"{path}: found {_listed(found) or 'no prompt file'}, wanted {_or(names)} (or .jsonl)"
    )


def utf8_text(file: Path) -> str:
    """The text of a file; ValueError names the line that is not UTF-8."""
    raw = file.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _json_entries(file: Path, text: str) -> Iterator[_Entry]:
    if not text.strip():
        return
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        mend = f"; call a file with one entry a line {file.stem}.jsonl"
        where = f"{file}:{error.lineno}:{error.colno}"
        raise ValueError(
            f"{where}: not JSON: {error.msg}{mend if error.msg == 'Extra data' else ''}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 5000 brackets
        raise ValueError(f"{file}: not JSON that can be read: {error}") from None
    category = None
    if isinstance(document, dict):
        if "prompts" not in document:
            keys = _listed(sorted(document)) or "no keys"
            raise ValueError(
                f'{file}: got an object with {keys}, wanted a list or {{"prompts": [...]}}'
            )
        category = _category(str(file), document)
        document = document["prompts"]
    if not isinstance(document, list):
        raise ValueError(f"{file}: got {_kind(document)}, wanted a list of prompts")
    for number, entry in enumerate(document, 1):
        yield None, number, entry, category


def _jsonl_entries(file: Path, text: str) -> Iterator[_Entry]:
    number = 0
    # not splitlines(): U+2028 and its like may stand in a JSON string
    for line, source in enumerate(text.split("\n"), 1):
        if not source or source.isspace():
            continue
        number += 1
        try:
            entry = json.loads(source)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{line}:{error.colno}: not JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file}:{line}: not JSON that can be read: {error}") from None
        yield line, number, entry, None


def _txt_entries(text: str) -> Iterator[_Entry]:
    lines = [(line, source.strip()) for line, source in enumerate(text.split("\n"), 1)]
    for number, (line, prompt) in enumerate([entry for entry in lines if entry[1]], 1):
        yield line, number, prompt, None


def _prompt(
    file: Path,
    fields: Sequence[str],
    line: int | None,
    number: int,
    entry: Any,
    category: str | None,
) -> Prompt:
    what = "prompt"
    if isinstance(entry, str):
        text: str | None = entry
        entry = {"prompt": entry}
    elif isinstance(entry, dict):
        field = next((name for name in fields if name in entry), None)
        if field is None:
            keys = _listed(sorted(entry)) or "no keys"
            raise ValueError(
                f"{_place(file, line, number)}: got an object with {keys}, wanted one with "
                f"{_or(fields)}"
            )
        what = what if field in FIELDS else field
        value = entry[field]
        text = value if isinstance(value, str) else _conversation(value)
        if text is None:
            raise ValueError(
                f"{_place(file, line, number)}: got {_kind(value)} as {field!r}, wanted a string "
                'or a list of {"role": ..., "content": text}'
            )
        if "category" in entry:
            category = _category(_place(file, line, number), entry)
    else:
        raise ValueError(
            f"{_place(file, line, number)}: got {_kind(entry)}, wanted a string or an object with "
            f"{_or(fields)}"
        )
    if not text or text.isspace():
        raise ValueError(f"{_place(file, line, number)}: got an empty {what}, wanted text")
    try:
        text.encode()  # what a JSON escape can hold and no tokenizer takes
    except UnicodeEncodeError:
        where = _place(file, line, number)
        raise ValueError(f"{where}: got half a surrogate pair, wanted whole characters") from None
    return Prompt(text, entry, file, line, category)


def _conversation(turns: Any) -> str | None:
    """The contents of a conversation's turns; None where it is not one."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return None
    contents = [turn.get("content") for turn in turns]
    if not all(isinstance(content, str) for content in contents):
        return None
    return "\n".join(contents)


def _category(place: str, entry: dict[str, Any]) -> str | None:
    category = entry.get("category")
    if category is not None and not isinstance(category, str):
        raise ValueError(f"{place}: got {_kind(category)} as 'category', wanted a string")
    return category


def _place(file: Path, line: int | None, number: int) -> str:
    return f"{file}: entry {number}" if line is None else f"{file}:{line}"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    kinds = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return kinds[type(value)]


def _or(words: Sequence[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _listed(words: Sequence[str]) -> str:
    rest = len(words) - MAX_LISTED
    return ", ".join(words[:MAX_LISTED]) + (f", ... ({rest} more)" if rest > 0 else "")
