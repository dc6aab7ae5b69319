"""Two processes of one support module over gloo: their start, their joining and their end."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

TESTS = Path(__file__).parent.parent
LONGEST = 240  # seconds, of which pytest-timeout's 300 leave enough to read what was said


def run_two(module: str, folder: Path, *rest: str) -> None:
    """`python -m support.<module> rank rendezvous *rest` as rank 0 and 1; fails with what they
    said unless both end well."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name stands for
    command = [sys.executable, "-m", f"support.{module}"]
    heard = [folder / f"heard.{rank}" for rank in range(2)]
    runs = []
    for rank in range(2):
        arguments = [*command, str(rank), f"file://{folder}/rendezvous", *rest]
        with heard[rank].open("w", encoding="utf-8") as file:
            runs.append(subprocess.Popen(arguments, env=env, stdout=file, stderr=subprocess.STDOUT))
    try:
        codes = [run.wait(timeout=LONGEST + 20) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    assert codes == [0, 0], "\n".join(file.read_text(encoding="utf-8")[-6000:] for file in heard)


def join(rank: int, rendezvous: str) -> None:
    """Joins the other process; who hangs later says where, and ends."""
    import torch.distributed as dist

    faulthandler.dump_traceback_later(LONGEST, exit=True)
    dist.init_process_group(
        "gloo", rendezvous, timeout=timedelta(seconds=60), rank=rank, world_size=2
    )


def leave() -> NoReturn:
    """Ends both together and at once: gloo's destructors have waited for ever for a peer that was
    gone before them."""
    import torch.distributed as dist

    dist.barrier()
    time.sleep(0.5)  # the other's barrier must have ended before this one's sockets close
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
