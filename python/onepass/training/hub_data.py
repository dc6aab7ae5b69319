"""Rows of a dataset of the Hub, or of one that `datasets` finds in a folder, by TRL's flags."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..cli.errors import Failed, UsageError, one_line
from .flags import flag


@dataclass
class DatasetFlags:
    """The dataset."""

    dataset_name: str | None = flag(
        None, "of the Hub, or a folder, in place of --data", metavar="NAME"
    )
    dataset_config: str | None = flag(None, "its configuration", metavar="NAME", advanced=True)
    dataset_train_split: str = flag("train", "trained on", metavar="NAME", advanced=True)
    dataset_test_split: str = flag(
        "test", "measured on, where there is one", metavar="NAME", advanced=True
    )
    rename_column: list[str] = flag([], "old=new ...: columns of another name", advanced=True)

    def check(self) -> None:
        """UsageError for names that are none."""
        for pair in self.rename_column:
            old, _, new = pair.partition("=")
            if not old or not new:
                raise UsageError(f"--rename_column: got {pair!r}, wanted old=new")
        for side in (0, 1):
            words = [pair.split("=", 1)[side] for pair in self.rename_column]
            if twice := [word for word in words if words.count(word) > 1]:
                raise UsageError(f"--rename_column: {twice[0]!r} is named twice")

    @property
    def names(self) -> dict[str, str]:
        """New names by old ones."""
        return dict(pair.split("=", 1) for pair in self.rename_column)

    def load(self) -> dict[str, list[dict[str, Any]]]:
        """Rows as "data" and, where there is a test split, "val"; `place` in a row is for errors.

        Raises:
            UsageError: no such dataset, configuration or split, a column to rename that is missing.
            Failed: no `datasets`.
        """
        try:
            import datasets
        except ImportError:
            raise Failed(
                '--dataset_name: needs datasets, not installed here: pip install "onepass[train]"'
            ) from None
        name = str(self.dataset_name)
        try:
            found = datasets.load_dataset(name, self.dataset_config)
        except Exception as error:  # of the Hub, of builders, of parsers
            why = one_line(error, 300) or type(error).__name__
            raise UsageError(f"--dataset_name: {name!r} cannot be loaded: {why}") from error
        if self.dataset_train_split not in found:
            raise UsageError(
                f"--dataset_train_split: {name!r} has no split {self.dataset_train_split!r}",
                allowed=list(found),
            )
        splits = {"data": self.dataset_train_split}
        if self.dataset_test_split in found:
            splits["val"] = self.dataset_test_split
        elif self.dataset_test_split != "test":
            raise UsageError(
                f"--dataset_test_split: {name!r} has no split {self.dataset_test_split!r}",
                allowed=list(found),
            )
        return {part: self._rows(found[split], split) for part, split in splits.items()}

    def _rows(self, split: Any, name: str) -> list[dict[str, Any]]:
        for old in self.names:
            if old not in split.column_names:
                columns = ", ".join(split.column_names)
                raise UsageError(f"--rename_column: no column {old!r}, the dataset has {columns}")
        place = f"{self.dataset_name}[{name}]: row"
        try:
            return [
                renamed(row, self.names) | {"place": f"{place} {n}"}
                for n, row in enumerate(split, 1)
            ]
        except ValueError as error:
            raise UsageError(f"--rename_column: {error}") from error


def renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The row, its columns under new names.

    Raises:
        ValueError: a new name that the row has already.
    """
    for old, new in names.items():
        if old in row and new in row and new not in names:
            raise ValueError(f"{old!r} is to be {new!r}, which is there already")
    return {names.get(name, name): value for name, value in row.items()}


def serialized(rows: Sequence[dict[str, Any]]) -> bytes:
    """What tells rows apart from others."""
    return json.dumps(rows, sort_keys=True, default=str).encode()
