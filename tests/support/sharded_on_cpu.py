"""`onepass` with FSDP on CPUs, which accelerate keeps for accelerators."""

from __future__ import annotations

import os
import sys
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


if __name__ == "__main__":
    allow()
    from onepass.cli import main

    sys.exit(main())
