"""Triton's interpreter made to behave like a GPU, and open to observers of all it does.

Mended here for Triton 3.6 to 3.9: conversions to and from bf16 (truncating, wrong for subnormals
and from fp64), an fma that rounds twice, a maximum that keeps NaN (up to 3.7). bf16 arithmetic,
which works on bit patterns, is refused; lanes masked off without `other` read poison, not 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch


@dataclass(frozen=True)
class Access:
    """One load, store or atomic of one program: the addresses of its active lanes."""

    kind: str  # "load", "store", "atomic"
    addresses: np.ndarray  # uint64, active lanes only
    width: int  # bytes per lane
    program: tuple[int, int, int]
    values: np.ndarray | None  # what a store writes, lane by lane


class Observer(Protocol):
    """Told of everything a kernel does; raising from `access` stops it before it happens."""

    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> None: ...

    def access(self, access: Access) -> None: ...

    def barrier(self, program: tuple[int, int, int]) -> None: ...

    def finish(self) -> None: ...


class KernelFault(AssertionError):
    """What an observer raises; it reaches the launching code as it is, not wrapped."""


_observers: list[Observer] = []
_patched = 0


def round_to_bf16_bits(values: np.ndarray) -> np.ndarray:
    """The bf16 bit patterns (uint16) of fp32 values, rounded to nearest even like a GPU."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    rounded = np.where(is_nan, (bits >> 16) | 0x40, rounded)
    return rounded.astype(np.uint16).reshape(np.shape(values))


def _bf16_bits_to_fp32_bits(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint16).astype(np.uint32) << 16


def fma_fp32(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """x * y + z of fp32 values with one rounding.

    The product is exact in fp64; the sum is rounded to odd there, which makes the rounding to fp32
    the only one that counts.
    """
    with np.errstate(all="ignore"):
        product = x.astype(np.float64) * y
        addend = z.astype(np.float64)
        total = np.asarray(product + addend)
        tail = total - product
        error = (product - (total - tail)) + (addend - tail)
        bits = total.view(np.int64)
        inexact = np.isfinite(total) & (error != 0) & (bits & 1 == 0)
        towards = np.where((error > 0) == (total > 0), 1, -1)
        odd = np.where(inexact, bits + towards, bits).view(np.float64)
        return odd.astype(np.float32)


def _tensors_in(arguments: Any) -> list[torch.Tensor]:
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    if isinstance(arguments, (list, tuple)):
        return [tensor for item in arguments for tensor in _tensors_in(item)]
    base = getattr(arguments, "base", None)  # tensor descriptors and dtype wrappers
    return [base] if isinstance(base, torch.Tensor) else []


def _tell(kind: str, builder: Any, pointers: Any, mask: Any, value: Any = None) -> None:
    if not _observers:
        return
    addresses = np.asarray(pointers.data).astype(np.uint64)
    active = np.broadcast_to(np.asarray(mask.data).astype(bool), addresses.shape)
    addresses = addresses[active].ravel()
    if addresses.size == 0:
        return
    values = None
    if value is not None:
        values = np.broadcast_to(np.asarray(value.data), active.shape)[active].ravel()
    width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    access = Access(kind, addresses, width, tuple(builder.grid_idx), values)
    for observer in tuple(_observers):
        observer.access(access)


def _undefined(interpreter: Any, tl: Any, pointers: Any) -> Any:
    """What masked-off lanes hold when a load names no `other`: poison, for a GPU gives anything."""
    element = pointers.get_element_ty()
    dtype = interpreter._get_np_dtype(element)
    if element == tl.bfloat16:
        fill: Any = 0x7FC0
    elif np.issubdtype(dtype, np.floating):
        fill = float("nan")
    elif dtype == np.bool_:
        fill = True
    else:
        fill = int.from_bytes(b"\x7a" * dtype.itemsize, "little")
    data = np.full(np.shape(pointers.data), fill, dtype=dtype)
    return interpreter.TensorHandle(data, element)


def _replacements(interpreter: Any) -> list[tuple[Any, str, Any]]:
    """(owner, name, new function) for every patched attribute of the interpreter."""
    import triton.language as tl

    builder_class = interpreter.InterpreterBuilder
    truncating = interpreter._ir.ROUNDING_MODE.RTZ

    original_load = builder_class.create_masked_load
    original_store = builder_class.create_masked_store
    original_rmw = builder_class.create_atomic_rmw
    original_cas = builder_class.create_atomic_cas
    original_barrier = builder_class.create_barrier
    original_convert = interpreter._convert_float
    original_cast = builder_class.cast_impl
    original_fma = builder_class.create_fma
    original_binary = builder_class.binary_op
    original_unary = builder_class.unary_op
    original_dot = builder_class.create_dot
    original_reduce = interpreter.ReduceScanOpInterface.apply
    original_patch_tensor = interpreter._patch_lang_tensor
    original_patch_lang = interpreter._patch_lang
    original_call = interpreter.GridExecutor.__call__
    launches: list[set[int]] = []  # in progress: the modules that each has patched

    def refuse_bf16(what: str, *operands: Any) -> None:
        if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            raise TypeError(
                f"bf16 {what}: the interpreter would compute on bit patterns; "
                "cast to fp32 right after the load"
            )

    def load(builder: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **named: Any) -> Any:
        _tell("load", builder, ptrs, mask)
        # Triton asks `other` for its truth value: of one element, a 0 arrives as None here.
        if other is None and not np.all(mask.data) and np.size(ptrs.data) > 1:
            other = _undefined(interpreter, tl, ptrs)
        return original_load(builder, ptrs, mask, other, *rest, **named)

    def store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        _tell("store", builder, ptrs, mask, value)
        return original_store(builder, ptrs, value, mask, *rest, **named)

    def atomic_rmw(builder: Any, op: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        _tell("atomic", builder, ptr, mask)
        return original_rmw(builder, op, ptr, val, mask, *rest)

    def atomic_cas(builder: Any, ptr: Any, *rest: Any) -> Any:
        everywhere = interpreter.TensorHandle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        _tell("atomic", builder, ptr, everywhere)
        return original_cas(builder, ptr, *rest)

    def barrier(builder: Any, *rest: Any) -> Any:
        for observer in tuple(_observers):
            observer.barrier(tuple(builder.grid_idx))
        return original_barrier(builder, *rest)

    def convert(values: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if source == tl.float32 and target == tl.bfloat16:
            if mode == truncating:
                return (values.view(np.uint32) >> 16).astype(np.uint16)
            return round_to_bf16_bits(values)
        if source == tl.bfloat16 and target == tl.float32:
            return _bf16_bits_to_fp32_bits(values)
        return original_convert(values, source, target, mode)

    def cast(builder: Any, src: Any, dst_type: Any) -> Any:
        ends = (src.dtype.scalar, dst_type.scalar)
        if tl.bfloat16 in ends and tl.float32 not in ends and ends[0] != ends[1]:
            src = original_cast(builder, src, tl.float32)
        return original_cast(builder, src, dst_type)

    def fma(builder: Any, x: Any, y: Any, z: Any) -> Any:
        refuse_bf16("fma", x, y, z)
        if z.dtype.scalar != tl.float32:
            return original_fma(builder, x, y, z)
        return interpreter.TensorHandle(fma_fp32(x.data, y.data, z.data), tl.float32)

    def binary(builder: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        refuse_bf16(op.__name__, lhs, rhs)
        return original_binary(builder, lhs, rhs, op)

    def unary(builder: Any, arg: Any, op: Any) -> Any:
        refuse_bf16(op.__name__, arg)
        return original_unary(builder, arg, op)

    def dot(builder: Any, a: Any, b: Any, *rest: Any) -> Any:
        refuse_bf16("dot", a, b)
        return original_dot(builder, a, b, *rest)

    def reduce(operation: Any, inputs: Any) -> Any:
        refuse_bf16("reduction or scan", *(inputs if isinstance(inputs, tuple) else (inputs,)))
        return original_reduce(operation, inputs)

    def patch_tensor(tensor: Any, scope: Any) -> Any:
        """Triton 3.6 makes an index by int(array), which NumPy deprecates and then forbids."""
        original_patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def patch_lang(function: Any) -> Any:
        """Every call of a device function patches triton.language anew, which takes more time than
        all else. Once per launch is enough."""
        modules = {id(m) for m in function.__globals__.values() if m is tl or m is tl.core}
        if launches and modules <= launches[-1]:
            return interpreter._LangPatchScope()
        for patched in launches[-1:]:
            patched |= modules
        return original_patch_lang(function)

    def call(executor: Any, *args: Any, **named: Any) -> Any:
        observers = tuple(_observers)
        tensors = _tensors_in([*args, *named.values()])
        for observer in observers:
            observer.launch(executor.fn.__name__, tensors)
        launches.append(set())
        try:
            result = original_call(executor, *args, **named)
        except Exception as error:
            fault: BaseException | None = error
            while fault is not None and not isinstance(fault, KernelFault):
                fault = fault.__cause__
            if fault is not None:
                raise fault from None
            raise
        finally:
            launches.pop()
        for observer in observers:
            observer.finish()
        return result

    return [
        (builder_class, "create_masked_load", load),
        (builder_class, "create_masked_store", store),
        (builder_class, "create_atomic_rmw", atomic_rmw),
        (builder_class, "create_atomic_cas", atomic_cas),
        (builder_class, "create_barrier", barrier),
        (builder_class, "cast_impl", cast),
        (builder_class, "create_fma", fma),
        (builder_class, "create_maxnumf", lambda self, a, b: self.binary_op(a, b, np.fmax)),
        (builder_class, "create_minnumf", lambda self, a, b: self.binary_op(a, b, np.fmin)),
        (builder_class, "binary_op", binary),
        (builder_class, "unary_op", unary),
        (builder_class, "create_dot", dot),
        (interpreter.ReduceScanOpInterface, "apply", reduce),
        (interpreter, "_convert_float", convert),
        (interpreter, "_patch_lang_tensor", patch_tensor),
        (interpreter, "_patch_lang", patch_lang),
        (interpreter.GridExecutor, "__call__", call),
    ]


@contextmanager
def patched_interpreter() -> Iterator[None]:
    """The GPU-like interpreter within the block; nested use is free, the last to leave restores."""
    global _patched
    import triton.runtime.interpreter as interpreter

    before: list[tuple[Any, str, Any]] = []
    if _patched == 0:
        for owner, name, replacement in _replacements(interpreter):
            before.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)
    _patched += 1
    try:
        yield
    finally:
        _patched -= 1
        for owner, name, original in before:
            setattr(owner, name, original)


@contextmanager
def observing(observer: Observer) -> Iterator[None]:
    """Tells the observer of every launch and access within the block."""
    with patched_interpreter():
        _observers.append(observer)
        try:
            yield
        finally:
            _observers.remove(observer)
