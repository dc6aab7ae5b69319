"""Checks of arguments: what came, what was wanted, how to mend it, before any kernel runs.

Checks that have to read values run where that is free, on a CPU; elsewhere with ONEPASS_STRICT=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

IGNORED = -100  # the label of a row that does not count
LARGEST = sys.float_info.max
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def switched_on(variable: str) -> bool:
    """Whether an environment variable says yes; ValueError for what is neither yes nor no."""
    value = os.environ.get(variable, "").lower()
    if value not in ("", "0", "false", "no", "off", "1", "true", "yes", "on"):
        raise ValueError(f"{variable} must be 1 or 0: got {value!r}")
    return value in ("1", "true", "yes", "on")


def values_checked(tensor: Tensor) -> bool:
    """Whether checks that read values may run: free on a CPU, a device sync elsewhere; a break in
    the graph under torch.compile, and nothing to read in the tensors that trace one."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, torch.nn.Parameter):
        return False
    return tensor.device.type == "cpu" or switched_on("ONEPASS_STRICT")


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


def check_above_0(name: str, value: float) -> None:
    """ValueError unless `value` is a finite number above 0."""
    check_number(name, value)
    if value <= 0:
        raise ValueError(f"{name} must be above 0: got {value}")


def check_floating(name: str, tensor: object) -> None:
    """ValueError unless `tensor` holds one of the dtypes that the kernels and references know."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
    check_strided(name, tensor)
    if tensor.dtype not in FLOATS:
        mend = "" if tensor.is_complex() else f"; convert it with {name}.float()"
        raise ValueError(
            f"{name} must be float32, bfloat16, float16 or float64: got {tensor.dtype}{mend}"
        )
    if torch.compiler.is_compiling():
        return
    # The operators would answer a forward-mode question with a silent 0.
    dual = forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
    if dual or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        raise NotImplementedError(
            f"{name} is inside forward-mode AD or a torch.func transform: onepass serves "
            "neither; use backward() or torch.autograd.grad (create_graph=True for a second one)"
        )


def check_strided(name: str, tensor: Tensor) -> None:
    """ValueError unless `tensor` is an ordinary dense one."""
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a dense tensor: got a {kind} one; convert it first")


def check_logits(logits: object) -> None:
    """Raises unless `logits` is a floating tensor [..., V] with V > 0."""
    check_floating("logits", logits)
    if isinstance(logits, Tensor) and (logits.dim() == 0 or logits.shape[-1] == 0):
        raise ValueError(f"logits must be [..., V] with V > 0: got shape {tuple(logits.shape)}")


def check_tokens(name: str, labels: object, logits: Tensor) -> Tensor:
    """`labels`, after checking that it holds an integer for each row of the logits, on their
    device."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(labels).__name__}")
    check_strided(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(
            f"{name} must hold class indices (integers): got {labels.dtype} {tuple(labels.shape)}"
        )
    rows = logits.shape[:-1]
    if labels.shape != rows:
        mend = ""
        if logits.dim() > 2 and labels.shape == (rows[0], logits.shape[-1], *rows[1:-1]):
            mend = "; classes are dimension 1 here: flatten both to rows, or masked_cross_entropy"
        raise ValueError(
            f"{name} must have one class index a row, shape {tuple(rows)}: "
            f"got {tuple(labels.shape)}{mend}"
        )
    check_same_device(name, labels, "logits", logits)
    return labels


def check_labels(
    name: str, labels: Tensor, vocab_size: int, ignore_index: int | None = IGNORED
) -> None:
    """IndexError naming the first label that is neither in the vocabulary nor to be ignored."""
    bad = (labels < 0) | (labels >= vocab_size)
    if ignore_index is not None:
        bad &= labels != ignore_index
    if bad.any():
        at = bad.nonzero()[0].tolist()
        mend = "" if ignore_index is None else f", or {ignore_index} to ignore the row"
        raise IndexError(
            f"{name}{at} is {int(labels[tuple(at)])}: wanted 0 <= label < {vocab_size} "
            f"(the vocabulary size){mend}"
        )


def check_weights(name: str, weights: object, rows: Sequence[int]) -> None:
    """Raises for a mask or weights that do not fit the rows, or that are not finite."""
    if weights is None:
        return
    if not isinstance(weights, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(weights).__name__}")
    check_strided(name, weights)
    if weights.shape != torch.Size(rows):
        raise ValueError(
            f"{name} must have the shape of its rows, {tuple(rows)}: got {tuple(weights.shape)}"
        )
    if weights.is_complex():
        raise ValueError(f"{name} must be bool, integer or floating: got {weights.dtype}")
    if weights.is_floating_point() and values_checked(weights) and not weights.isfinite().all():
        raise ValueError(f"{name} holds NaN or inf: rows that do not count have weight 0")


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


def check_rows_alike(name: str, x: Any, other_name: str, y: Any) -> None:
    """Raises unless both are floating tensors [..., D], D > 0, of one shape, dtype and device."""
    check_floating(name, x)
    check_floating(other_name, y)
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(
            f"{name} and {other_name} must agree in shape and dtype: got {tuple(x.shape)} "
            f"{x.dtype} and {tuple(y.shape)} {y.dtype}"
        )
    check_same_device(other_name, y, name, x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"{name} must be [..., D] with D > 0: got shape {tuple(x.shape)}")
