"""Checks of arguments: what came, what was wanted, how to mend it, before any kernel runs.

Checks that have to read values run where that is free, on a CPU; elsewhere with ONEPASS_STRICT=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

IGNORED = -100  # the label of a row that does not count
LARGEST = sys.float_info.max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values_checked(tensor: Tensor) -> bool:
    """Whether checks that read values may run: free on a CPU, a device sync elsewhere, and a break
    in the graph under torch.compile."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("ONEPASS_STRICT") == "1"


def came(value: object) -> str:
    """What an argument was, for an error message."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}: got {value!r}")


def check_number(
    name: str, value: object, low: float = -LARGEST, high: float = LARGEST, hint: str = ""
) -> None:
    """TypeError unless `value` is a number, ValueError unless it is finite and in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number{hint}: got {type(value).__name__}")
    if not low <= value <= high:
        bounds = f"between {low} and {high}" if high < LARGEST else f"finite and at least {low}"
        bounds = "finite" if low == -LARGEST else bounds
        raise ValueError(f"{name} must be {bounds}{hint}: got {value}")


def check_floating(name: str, tensor: object) -> None:
    """ValueError unless `tensor` holds one of the dtypes that the kernels and references know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64: got {tensor.dtype}; "
            f"convert it with {name}.float()"
        )


def check_logits(logits: object) -> None:
    """Raises unless `logits` is a floating tensor [..., V] with V > 0."""
    check_floating("logits", logits)
    if isinstance(logits, Tensor) and (logits.dim() == 0 or logits.shape[-1] == 0):
        raise ValueError(f"logits must be [..., V] with V > 0: got shape {tuple(logits.shape)}")


def check_tokens(name: str, labels: Tensor, rows: Sequence[int]) -> None:
    """ValueError unless `labels` holds integers, one a row."""
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if not whole:
        raise ValueError(f"{name} must hold class indices (integers): got {came(labels)}")
    if labels.shape != torch.Size(rows):
        raise ValueError(f"{name} must have shape {tuple(rows)}: got {tuple(labels.shape)}")


def check_labels(name: str, labels: Tensor, vocab_size: int, ignore_index: int = IGNORED) -> None:
    """IndexError naming the first label that is neither in the vocabulary nor to be ignored."""
    bad = ((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        raise IndexError(
            f"{name}{at} is {int(labels[tuple(at)])}: wanted 0 <= label < {vocab_size} "
            f"(the vocabulary size), or {ignore_index} to ignore the row"
        )


def check_weights(name: str, weights: object, rows: Sequence[int]) -> None:
    """ValueError for a mask or weights that do not fit the rows, or that hold NaN."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.shape != torch.Size(rows):
        shape = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name} must have the shape of its rows, {tuple(rows)}: got {shape}")
    if weights.is_complex():
        raise ValueError(f"{name} must be bool, integer or floating: got {weights.dtype}")
    if weights.is_floating_point() and values_checked(weights) and weights.isnan().any():
        raise ValueError(f"{name} holds NaN: rows that do not count have weight 0")


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(
            f"{name} is on {tensor.device}, {other_name} on {other.device}: move one of them"
        )


def check_want(want: object, facts: tuple[str, ...]) -> tuple[str, ...]:
    """The wanted facts as a tuple, after checking that they are names of facts."""
    if isinstance(want, str):
        want = (want,)
    if not isinstance(want, Sequence):
        raise TypeError(f"want must be names of facts, {', '.join(facts)}: got {want!r}")
    for fact in want:
        if fact not in facts:
            raise ValueError(f"want has no {fact!r}: choose among {', '.join(facts)}")
    return tuple(want)
