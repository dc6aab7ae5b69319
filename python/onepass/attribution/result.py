"""What an attribution found: tokens, matrix, scores; to JSON and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..cli.files import replace_text, strict_json
from .names import PROGRAM, SCHEMA

DTYPES = {"float32": torch.float32, "float64": torch.float64}
DIGITS = {torch.float32: 9, torch.float64: 17}  # that tell a number from all others


@dataclass(frozen=True, eq=False)
class Attribution:
    """Of each token that was read [R], how much the scores of the targets [T] come from it."""

    text: str
    tokens: list[str]  # [R], those of an encoder first
    token_ids: list[int]
    targets: list[str]  # [T]
    target_ids: list[int]
    n_encoder: int  # how many of R the encoder read
    matrix: Tensor  # [R, T], NaN where a token comes after the target (see `read`)
    scores: dict[str, Tensor]  # [T] each: the target's, then the step scores
    deltas: Tensor | None  # [T], of a baseline: sum of the attributions - (f(x) - f(x0))
    method: str
    target: str
    reduction: str
    n_steps: int | None = None
    baseline: str | None = None
    batch_size: int | None = None  # rows at once in the end

    @property
    def read(self) -> Tensor:
        """Which tokens stand before which target, bool [R, T]."""
        return positions_read(*self.matrix.shape)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON has it; NaN is null."""
        found = {"program": PROGRAM, "schema": SCHEMA, **vars(self)}
        found["dtype"] = str(self.matrix.dtype).removeprefix("torch.")
        found["matrix"] = _listed(self.matrix)
        found["scores"] = {name: _listed(value) for name, value in self.scores.items()}
        found["deltas"] = None if self.deltas is None else _listed(self.deltas)
        return found

    def to_json(self) -> str:
        """Strict JSON, one line."""
        return strict_json(self.as_dict())

    def save(self, path: str | Path) -> None:
        """Write it as JSON, whole or not at all."""
        replace_text(Path(path), self.to_json() + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Attribution:
        """What `save` wrote.

        Raises:
            OSError: no such file. ValueError: another kind of file, or several attributions.
        """
        found = load_all(path)
        if len(found) != 1:
            raise ValueError(f"{path}: holds {len(found)} attributions, wanted one: use load_all")
        return found[0]

    @classmethod
    def from_dict(cls, found: Any) -> Attribution:
        """The inverse of `as_dict`.

        Raises:
            ValueError: it is not what that gave.
        """
        if not isinstance(found, dict) or found.get("program") != PROGRAM:
            raise ValueError(f"not an attribution: wanted an object of {PROGRAM!r}")
        if found.get("schema") != SCHEMA:
            got = found.get("schema")
            raise ValueError(f"schema {got!r}, wanted {SCHEMA}: written by another version")
        try:
            dtype = DTYPES[found["dtype"]]
            fields = {k: found[k] for k in cls.__dataclass_fields__}
            fields["matrix"] = _tensor(found["matrix"], dtype).reshape(-1, len(found["targets"]))
            fields["scores"] = {n: _tensor(v, dtype) for n, v in found["scores"].items()}
            if found["deltas"] is not None:
                fields["deltas"] = _tensor(found["deltas"], dtype)
            shape = (len(found["tokens"]), len(found["targets"]))
            whole = fields["matrix"].shape == shape
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"not an attribution: {type(error).__name__} {error}") from error
        if not whole:
            raise ValueError(f"not an attribution: its matrix is not {shape}")
        return cls(**fields)

    def _repr_html_(self) -> str:
        from .view import html

        return html([self])


def positions_read(n_tokens: int, n_targets: int) -> Tensor:
    """Bool [R, T]: the last target has all before it, each one before it a token less."""
    return torch.ones(n_tokens, n_targets, dtype=torch.bool).triu(n_targets - n_tokens)


def load_all(path: str | Path) -> list[Attribution]:
    """The attributions of a .json or .jsonl file.

    Raises:
        OSError: no such file. ValueError: a line that is none, by file and line.
    """
    found = []
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text") from error
    with contextlib.suppress(ValueError):  # an object over several lines, as other programs write
        text = json.dumps(json.loads(text))
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(Attribution.from_dict(json.loads(line)))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
    return found


def _listed(values: Tensor) -> Any:
    digits = DIGITS[values.dtype]

    def short(x: Any) -> Any:
        return [short(y) for y in x] if isinstance(x, list) else float(f"{x:.{digits}g}")

    return short(values.tolist())


def _tensor(values: Sequence[Any], dtype: torch.dtype) -> Tensor:
    def numbers(x: Any) -> Any:
        if isinstance(x, list):
            return [numbers(y) for y in x]
        return float("nan") if x is None else x

    return torch.tensor(numbers(values), dtype=dtype)
