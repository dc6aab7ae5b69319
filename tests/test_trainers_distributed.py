"""The trainers under DDP and FSDP2 on two gloo processes: the curves and weights of one process.

What the processes do stands in support/trainers_on_two.py; they start once for all cases.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.processes import run_processes

pytest.importorskip("transformers", reason="the trainers are transformers'")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
pytest.importorskip("peft", reason="the adapters are PEFT's")

from support import trainers_on_two as two  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each training in one process: curve.json and saved/."""
    folder = tmp_path_factory.mktemp("truths")
    for name, (system, options) in two.TRUTHS.items():
        found = two.curve(system, folder / name, **options)
        (folder / name / "curve.json").write_text(json.dumps(found))
    return folder


@pytest.fixture(scope="module")
def answers(truths: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(2, "trainers_on_two", folder, str(truths), str(folder))
    return folder


@pytest.mark.parametrize("case", two.CASES)
def test_two_processes(case: str, answers: Path) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""
