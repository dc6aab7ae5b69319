"""Lazy heads on two gloo processes: gradients equal to one process's, or a sentence why not.

What the processes do stands in support/heads_on_two.py; they start once for all cases.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are those of transformers")

TESTS = Path(__file__).resolve().parent
CASES = (
    "ddp",
    "ddp_static_graph",
    "ddp_parameters_really_unused",
    "fsdp2",
    "fsdp2_head_alone",
    "fsdp2_root_resharded",
    "dtensor",
)
WITH_ACCELERATE = ("gather", "accelerate_loop")
HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None

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
    cases = " ".join(CASES + WITH_ACCELERATE if HAS_ACCELERATE else CASES)
    command = [sys.executable, "-m", "support.heads_on_two"]
    rest = [f"file://{folder}/rendezvous", cases, str(folder)]
    runs = [
        subprocess.Popen(
            [*command, str(rank), *rest],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [run.communicate(timeout=280)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    for rank, text in enumerate(said):
        (folder / f"all.{rank}").write_text(text, "utf-8")
    return folder


@pytest.mark.parametrize("case", [*CASES, *WITH_ACCELERATE])
def test_two_processes(case: str, answers: Path) -> None:
    if case in WITH_ACCELERATE and not HAS_ACCELERATE:
        pytest.skip("the loop is accelerate's")
    for rank in range(2):
        answer = answers / f"{case}.{rank}"
        assert answer.exists(), (answers / f"all.{rank}").read_text("utf-8")[-3000:]
        assert answer.read_text("utf-8") == ""
