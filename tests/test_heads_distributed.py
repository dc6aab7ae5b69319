"""Lazy heads on two gloo processes: gradients equal to one process's, or a sentence why not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the models are those of transformers")

from support.two_processes import run_twice

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)

# Grouped, since most of a case is the start of its two processes.
GROUPS = {
    "ddp": ("ddp", "ddp_static_graph", "ddp_parameters_really_unused"),
    "fsdp2": ("fsdp2", "fsdp2_head_alone", "fsdp2_root_resharded"),
    "dtensor": ("dtensor",),
    "accelerate": ("gather", "accelerate_loop"),
}


@pytest.mark.parametrize("group", GROUPS)
def test_two_processes(group: str, tmp_path: Path) -> None:
    if group == "accelerate":
        pytest.importorskip("accelerate", reason="the loop is accelerate's")
    run_twice("support.heads_on_two", GROUPS[group], tmp_path)
