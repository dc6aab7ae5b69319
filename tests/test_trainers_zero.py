"""The trainers under DeepSpeed's ZeRO on two gloo processes, where DeepSpeed is installed: the
curves, weights and checkpoints of one process. What they do stands in support/trainers_on_zero.py.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from unittest import mock

import pytest
import torch

from support.processes import run_processes

NEEDED = ("deepspeed", "transformers", "accelerate", "peft")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
CASES = (
    "circuit_breaker-resumed",
    "dpo-resumed",
    "jigsaw-resumed",
    "dpo-precomputed",
    "dpo-all_weights",
    "dpo-zero2",
    "circuit_breaker-zero2",
    "circuit_breaker-reentrant",
    "circuit_breaker-own_reference",
    "dpo-own_reference",
)
COMPILED = {"TRITON_INTERPRET": "0"}  # torch's own code: Triton's interpreter takes minutes


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    if MISSING:
        pytest.skip(f"the engine is DeepSpeed's, under the trainers: no {MISSING[0]}")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    truths, folder = (tmp_path_factory.mktemp(name) for name in ("truths", "two_processes"))
    with mock.patch.dict(os.environ, COMPILED):
        run_processes(1, "trainers_on_two", truths, str(truths))
        run_processes(2, "trainers_on_zero", folder, str(truths), str(folder))
    assert {file.stem for file in folder.glob("*.0")} - {"heard"} == set(CASES)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, answers: Path) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""
