"""Heads in shards of their vocabulary on processes, over gloo or NCCL: DTensors, process groups,
tensor parallelism of transformers and torch, FSDP2 beside it, against one process.

What the processes do stands in support/sharded_on_ranks.py; they start once for all cases.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.processes import run_processes

CASES = (
    "process_group", "dtensor", "meshes_of_two", "no_linear_heads", "two_forwards",
    "linear_losses", "stale", "empty_shards", "sharded_logits",
    "torch_plans", "page", "refused",
)  # fmt: skip
MODELS = {
    2: ("tensor_parallel", "tensor_parallel_families", "tensor_parallel_lora"),
    4: ("tp_and_dp", "tp_and_fsdp"),
}
NEEDS = dict.fromkeys([*MODELS[2], "tp_and_fsdp"], "transformers")
NEEDS["tensor_parallel_lora"] = "peft"

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


def runs(case: str) -> bool:
    return case not in NEEDS or importlib.util.find_spec(NEEDS[case]) is not None


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """From a number of processes, which start once, a folder with a file for each case and rank:
    what was raised there."""

    @functools.cache
    def of(n: int) -> Path:
        folder = tmp_path_factory.mktemp(f"ranks_{n}")
        cases = [case for case in (*CASES, *MODELS[n]) if runs(case)]
        run_processes(n, "sharded_on_ranks", folder, " ".join(cases), str(folder), gpus=True)
        return folder

    return of


@pytest.mark.parametrize(
    ("n", "case"), [(n, case) for n in MODELS for case in (*CASES, *MODELS[n])]
)
def test_on_processes(n: int, case: str, answers: Callable[[int], Path]) -> None:
    if not runs(case):
        pytest.skip(f"needs {NEEDS[case]}")
    for rank in range(n):
        assert (answers(n) / f"{case}.{rank}").read_text("utf-8") == ""
