"""Representation rerouting under DDP and FSDP2 on two gloo processes: one process's gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    folder = tmp_path_factory.mktemp("two_processes")
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "support.rerouting_on_two"]
    runs = [
        subprocess.Popen([*command, str(rank), f"file://{folder}/rendezvous", str(folder)], env=env)
        for rank in range(2)
    ]
    try:
        codes = [run.wait(timeout=280) for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert codes == [0, 0]
    return folder


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(answers: Path, case: str) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text(encoding="utf-8") == ""
