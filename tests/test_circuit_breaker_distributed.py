"""Representation rerouting under DDP and FSDP2 on two gloo processes: one process's gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.processes import run_processes

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(2, "rerouting_on_two", folder, str(folder))
    return folder


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_gradients_are_those_of_one_process(answers: Path, case: str) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text(encoding="utf-8") == ""
