"""Fixtures of all tests: where they run, by which implementation, and on poisoned memory.

Without a GPU the kernels run in Triton's interpreter, mended to round as a GPU does; with one they
run compiled. support/environment.py decides that, so it is imported before anything else.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import torch

from support.environment import DEVICE, INTERPRETING, NO_INTERPRETER, NO_TRITON
from support.interpreter import patched_interpreter
from support.poison import poisoned_memory

try:
    import hypothesis
except ImportError:  # property tests skip themselves
    pass
else:
    hypothesis.settings.register_profile(
        "onepass",
        deadline=None,  # the first call of a kernel takes longer than the rest together
        derandomize=bool(os.environ.get("CI")),
        database=None,
        print_blob=True,  # repeats a failure without a database
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("onepass")

# Small tensors gain nothing from many threads, and parallel test processes share the cores.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(4, os.cpu_count() or 1))


@pytest.fixture(scope="session")
def device() -> str:
    """Where tensors live: "cuda" or "xpu" when kernels run compiled there, else "cpu"."""
    return DEVICE


# Wider than one test, so that hypothesis does not warn of a fixture that its examples share.
@pytest.fixture(
    scope="module",
    params=[
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON)),
    ],
)
def impl(request: pytest.FixtureRequest) -> str:
    """Both implementations in turn; "triton" is skipped where kernels cannot run."""
    return str(request.param)


@pytest.fixture(scope="session")
def interpreter_only() -> None:
    """Skips what observes the interpreter (guard, count_bytes) where kernels run compiled."""
    if NO_INTERPRETER:
        pytest.skip(NO_INTERPRETER)


@pytest.fixture(scope="session", autouse=True)
def gpu_like_interpreter() -> Iterator[None]:
    """While interpreting: bf16 rounds to nearest even, undefined lanes are poison."""
    with patched_interpreter() if INTERPRETING and not NO_TRITON else nullcontext():
        yield


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody wrote holds NaN or a large integer."""
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    """A warning that comes once a process comes once a test."""
    from onepass import lazy_logits

    lazy_logits._warned.clear()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers, alone or among others."""
    random.seed(0)
    torch.manual_seed(0)
