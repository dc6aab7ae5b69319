"""The three trainers under DeepSpeed's ZeRO on two processes, against the truths of one."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
warnings.simplefilter("ignore")  # torch's, of what DeepSpeed calls
import deepspeed  # noqa: E402, F401
from accelerate.state import AcceleratorState  # noqa: E402

from . import trainers_on_two as two  # noqa: E402
from .processes import answer, join, leave  # noqa: E402

# What DeepSpeed would compile as it starts, for a minute.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]

AUTO = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")


def zero(stage: int) -> dict[str, Any]:
    settings = {
        "stage": stage,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    }
    config = {"zero_optimization": settings, "zero_allow_untested_optimizer": True}
    return {"deepspeed": config | dict.fromkeys(AUTO, "auto")}


def cases(truths: Path, folder: Path) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}

    def add(name: str, case: Callable[..., None], stage: int, *args: Any, **options: Any) -> None:
        def run() -> None:
            AcceleratorState._reset_state()
            case(*args, **zero(stage), **options)

        found[name] = run

    for system in ("circuit_breaker", "dpo", "jigsaw"):
        add(f"{system}-resumed", two.resumes, 3, system, truths, folder / system,
            of=f"{system}_measured", measures=True, **two.CHECKPOINTED)  # fmt: skip
    precomputed = {"dpo": {"precompute_ref_log_probs": True}}
    add("dpo-precomputed", two.same_as, 3, "dpo", truths, folder / "precomputed", **precomputed)
    add("dpo-all_weights", two.same_as, 3, "dpo", truths, folder / "all", "all_weights", rank=0,
        **precomputed)  # fmt: skip
    add("dpo-zero2", two.same_as, 2, "dpo", truths, folder / "zero2", "dpo_measured",
        measures=True)  # fmt: skip
    add("circuit_breaker-zero2", two.same_as, 2, "circuit_breaker", truths, folder / "copy",
        frozen=True)  # fmt: skip
    at = folder / "refused"
    add("circuit_breaker-reentrant", two.refuses, 3, "circuit_breaker", at, RuntimeError,
        "use_reentrant=True on several processes", **two.REENTRANT)  # fmt: skip
    for system, options in (("circuit_breaker", {"frozen": True}), ("dpo", {"rank": 0})):
        add(f"{system}-own_reference", two.refuses, 3, system, at, ValueError,
            "ZeRO-3: a reference of its own would stand whole", **options)  # fmt: skip
    return found


def main(rank: int, rendezvous: str, truths: str, folder: str) -> None:
    # accelerate and DeepSpeed ask
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    join(rank, rendezvous)
    answer(cases(Path(truths), Path(folder)), Path(folder), rank)
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
