"""Runs a function in two gloo processes, and says what it raised there."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve()


def run_twice(module: str, functions: Sequence[str], folder: Path, timeout: float = 240) -> None:
    """`function(rank)` for functions of the tests' module `module`, one after the other, in two
    processes that know each other."""
    code = (
        "import sys, torch; import torch.distributed as dist; torch.set_num_threads(1); "
        "rank = int(sys.argv[1]); "
        "dist.init_process_group('gloo', init_method=sys.argv[2], rank=rank, world_size=2); "
        f"import {module} as cases; [getattr(cases, name)(rank) for name in {tuple(functions)}]; "
        "dist.destroy_process_group()"
    )
    path = os.pathsep.join([str(HERE.parents[1]), str(HERE.parents[2] / "python")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code]
    rendezvous = f"file://{folder}/rendezvous"
    runs = [
        subprocess.Popen(
            [*command, str(rank), rendezvous],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [run.communicate(timeout=timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert [run.returncode for run in runs] == [0, 0], "\n----\n".join(said)
