"""`onepass` for launches of several processes: with FSDP on CPUs, which accelerate keeps for GPUs,
and with a process that dies, or hangs, in the middle of a step."""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import Any


def allow() -> None:
    """Let accelerate take FSDP's plugin on CPUs as it does on GPUs."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def make(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        is_new = not AcceleratorState._shared_state
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        wanted = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        if is_new and wanted and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type

    AcceleratorState.__init__ = make


def stop_at(rank: int, step: int, hangs: bool) -> None:
    """Let the process of this rank be killed, or hang, in the second batch of the step after."""
    from transformers import Trainer

    runs, seen = Trainer.training_step, []

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if int(os.environ["RANK"]) == rank and self.state.global_step == step:
            seen.append(step)
            if len(seen) == 2 and hangs:
                time.sleep(600)
            elif len(seen) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        return runs(self, *args, **kwargs)

    Trainer.training_step = run


if __name__ == "__main__":
    allow()
    for name in ("DIES", "HANGS"):
        if name in os.environ:
            rank, step = map(int, os.environ[name].split(","))
            stop_at(rank, step, name == "HANGS")
    from onepass.cli import main

    sys.exit(main())
