"""Lazy heads on two gloo processes: gradients equal to one process's, or a sentence why not.

What the processes do stands in support/heads_on_two.py; they start once for all cases.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from support.processes import run_processes

pytest.importorskip("transformers", reason="the models are those of transformers")

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
    cases = " ".join(CASES + WITH_ACCELERATE if HAS_ACCELERATE else CASES)
    run_processes(2, "heads_on_two", folder, cases, str(folder))
    return folder


@pytest.mark.parametrize("case", [*CASES, *WITH_ACCELERATE])
def test_two_processes(case: str, answers: Path) -> None:
    if case in WITH_ACCELERATE and not HAS_ACCELERATE:
        pytest.skip("the loop is accelerate's")
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""
