"""Whether a trainer puts DDP on after an evaluation over several processes."""

from __future__ import annotations

from typing import Any

import pytest
import transformers


def assert_forgets_evaluations(ours: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An evaluation over processes marks the model as prepared; see `forget_evaluation`."""
    seen: list[bool] = []
    monkeypatch.setattr(
        transformers.Trainer,
        "train",
        lambda self: seen.append("_is_accelerate_prepared" in vars(self.model)),
    )
    for n_processes in (1, 2):
        monkeypatch.setattr(type(ours.args), "world_size", n_processes)
        ours.model._is_accelerate_prepared = True
        ours.train()
    assert seen == [True, False]
