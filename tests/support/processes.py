"""Several processes of one support module: their start, their joining and their end. Over gloo, or,
for a module that asks for it, over NCCL where each process finds a GPU of its own."""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from traceback import format_exc
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    import torch

TESTS = Path(__file__).parent.parent
LONGEST = 240  # seconds, of which pytest-timeout's 300 leave enough to read what was said


def run_processes(n: int, module: str, folder: Path, *rest: str, gpus: bool = False) -> None:
    """`python -m support.<module> rank rendezvous *rest` as ranks 0 to n - 1; fails with what they
    said unless all end well."""
    codes, heard = ends_of_processes(n, module, folder, *rest, gpus=gpus)
    assert codes == [0] * n, "\n".join(text[-6000:] for text in heard)


def ends_of_processes(
    n: int, module: str, folder: Path, *rest: str, gpus: bool = False
) -> tuple[list[int], list[str]]:
    """The same, whatever they end with: exit codes and what each said."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "python")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(n)}
    if not gpus:
        env["CUDA_VISIBLE_DEVICES"] = ""
    if sys.platform == "linux":
        env["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name stands for
    command = [sys.executable, "-m", f"support.{module}"]
    heard = [folder / f"heard.{rank}" for rank in range(n)]
    runs = []
    for rank in range(n):
        arguments = [*command, str(rank), f"file://{folder}/rendezvous", *rest]
        with heard[rank].open("w", encoding="utf-8") as file:
            runs.append(
                subprocess.Popen(
                    arguments,
                    env=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                )
            )
    try:
        codes = [run.wait(timeout=LONGEST + 20) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    return codes, [file.read_text(encoding="utf-8") for file in heard]


def join(rank: int, rendezvous: str, seconds: float = 60) -> None:
    """Joins the other processes, whose collectives wait so long for each other; who hangs later
    says where, and ends."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(LONGEST, exit=True)
    size, patience = int(os.environ["WORLD_SIZE"]), timedelta(seconds=seconds)
    place = device()
    if place.type == "cuda":
        torch.cuda.set_device(place)
    backend = "gloo" if place.type == "cpu" else "nccl"
    dist.init_process_group(backend, rendezvous, timeout=patience, rank=rank, world_size=size)


def device() -> torch.device:
    """Of this process: a GPU of its own where there is one for each."""
    import torch

    if torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"]):
        return torch.device("cuda", int(os.environ["RANK"]))
    return torch.device("cpu")


def answer(cases: Mapping[str, Callable[[], None]], answers: Path, rank: int) -> None:
    """Each case in turn; what it raised goes to the file <case>.<rank>, empty where it is right."""
    import torch.distributed as dist

    for name, case in cases.items():
        try:
            case()
            said = ""
        except Exception:
            said = format_exc()
            print(said, file=sys.stderr, flush=True)  # where the others hang, all that is heard
        (answers / f"{name}.{rank}").write_text(said, encoding="utf-8")
        dist.barrier()


def leave() -> NoReturn:
    """Ends all together and at once: gloo's destructors have waited for ever for a peer that was
    gone before them."""
    import torch.distributed as dist

    dist.barrier()
    time.sleep(0.5)  # the others' barrier must have ended before this one's sockets close
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
