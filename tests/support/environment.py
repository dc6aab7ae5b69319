"""Decides, before Triton is imported, whether kernels run compiled on a GPU or in the interpreter.

Triton reads TRITON_INTERPRET when a kernel is decorated, so this module has to come first;
conftest.py sees to that. With a GPU nothing is set: the tests then run the compiled kernels,
unless the caller asked for the interpreter.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

_YES = {"1", "true", "on", "yes", "y"}


def _accelerator() -> str | None:
    if torch.cuda.is_available():  # ROCm answers here too
        return "cuda"
    if torch.xpu.is_available():
        return "xpu"
    return None


def _choose_interpreter(accelerator: str | None) -> bool:
    asked = os.environ.get("TRITON_INTERPRET")
    if asked is None and accelerator is None:
        if sys.modules.get("triton") is not None:
            raise RuntimeError(
                "triton was imported before tests/conftest.py could choose its interpreter: "
                "set TRITON_INTERPRET=1 in the environment, or remove the plugin that imports it"
            )
        os.environ["TRITON_INTERPRET"] = "1"
        return True
    return asked is not None and asked.lower() in _YES


def _why_no_triton(interpreting: bool, accelerator: str | None) -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it has no wheels for macOS and Windows)"
    if not interpreting and accelerator is None:
        return "no GPU, and TRITON_INTERPRET forbids the interpreter"
    return ""


ACCELERATOR = _accelerator()
INTERPRETING = _choose_interpreter(ACCELERATOR)
DEVICE = "cpu" if INTERPRETING or ACCELERATOR is None else ACCELERATOR

# Empty when kernels can run here; else the reason, in words fit for a skip.
NO_TRITON = _why_no_triton(INTERPRETING, ACCELERATOR)
NO_INTERPRETER = NO_TRITON or (
    "" if INTERPRETING else "kernels run compiled here: the interpreter's observers see nothing"
)
