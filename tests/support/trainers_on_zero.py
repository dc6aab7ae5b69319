"""The three trainers under DeepSpeed's ZeRO on two processes, against `trainers_on_two`'s truths."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0"}
warnings.simplefilter("ignore")  # torch's, of what DeepSpeed calls
import deepspeed  # noqa: E402
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
        of = {"of": f"{system}_measured", "measures": True}
        add(f"{system}-resumed", two.resumes, 3, system, truths, folder / system, **of)
    of = {"of": "dpo_measured", "measures": True}
    precomputed = {"dpo": {"precompute_ref_log_probs": True}}
    at = folder / "precomputed"
    add("dpo-precomputed", two.same_as, 3, "dpo", truths, at, **of, **precomputed)
    add("dpo-zero2", two.same_as, 2, "dpo", truths, folder / "zero2", **of)
    add("dpo-all_weights", two.same_as, 3, "dpo", truths, folder / "all", "all_weights", rank=0,
        **precomputed)  # fmt: skip
    add("circuit_breaker-zero2", two.same_as, 2, "circuit_breaker", truths, folder / "cb2", frozen=True)
    add("circuit_breaker-checkpointed", two.same_as, 3, "circuit_breaker", truths, folder / "cbc", **two.CHECKPOINTED)
    add("circuit_breaker-reentrant", two.same_as, 3, "circuit_breaker", truths, folder / "cbr", **two.REENTRANT)
    add("jigsaw-checkpointed", two.same_as, 3, "jigsaw", truths, folder / "jc", **two.CHECKPOINTED)
    for system, options in (("circuit_breaker", {"frozen": True}), ("dpo", {"rank": 0})):
        add(f"{system}-refused", two.refuses, 3, system, folder / "r", ValueError,
            "ZeRO-3: a reference of its own would stand whole", **options)  # fmt: skip
    return found


if __name__ == "__main__":
    if os.environ["WORLD_SIZE"] == "1":
        del os.environ["LOCAL_RANK"]
        two.truths(Path(sys.argv[3]))
    else:
        os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
        join(int(sys.argv[1]), sys.argv[2])
        every = cases(Path(sys.argv[3]), Path(sys.argv[4]))
        if len(sys.argv) > 5:
            every = {n: c for n, c in every.items() if n in sys.argv[5:]}
        answer(every, Path(sys.argv[4]), int(sys.argv[1]))
        leave()
