"""Which implementation runs, on which device, and how a matrix of rows lies in memory.

`choose` decides between Triton and torch; `Rows` describes [..., V] logits to a kernel without
copying them.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_choice

IMPLS = ("auto", "triton", "torch")
GPU_TYPES = ("cuda", "xpu")  # ROCm devices call themselves cuda
ONE_STEP = 1 << 30  # more rows than anyone has
HAS_TRITON = importlib.util.find_spec("triton") is not None  # once: torch.compile cannot trace it
SLAB_BYTES = 1 << 22  # fp32 of a slab on the torch path: in cache, yet few calls where threads meet


def choose(impl: str, *tensors: Tensor | None) -> bool:
    """True for the Triton kernels, False for the torch path. An explicit "triton" that cannot be
    had raises.

    "auto" takes Triton on a GPU and torch on a CPU; ONEPASS_IMPL replaces that preference, and
    still falls back to torch where Triton cannot serve (float64, for one).
    """
    check_choice("impl", impl, IMPLS)
    given = [t for t in tensors if t is not None]
    wish = impl
    if impl == "auto":
        wish = os.environ.get("ONEPASS_IMPL") or "auto"
        check_choice("ONEPASS_IMPL", wish, IMPLS)
    on_gpu = all(t.device.type in GPU_TYPES for t in given)
    if wish == "torch" or (wish == "auto" and not on_gpu):
        return False
    reasons = _why_not_triton(given, on_gpu)
    if reasons and impl == "triton":
        raise ValueError(f"impl='triton' cannot serve this call: {'; '.join(reasons)}")
    return not reasons


def _why_not_triton(tensors: list[Tensor], on_gpu: bool) -> list[str]:
    reasons = []
    if not HAS_TRITON:
        reasons.append("triton is not installed (a CUDA, ROCm or XPU build of torch brings it)")
    if not on_gpu and not interpreting():
        devices = ", ".join(sorted({t.device.type for t in tensors}))
        reasons.append(f"tensors are on {devices}, kernels need a GPU (or TRITON_INTERPRET=1)")
    if any(t.dtype == torch.float64 for t in tensors):
        reasons.append("float64 is served by the torch path only")
    return reasons


def interpreting() -> bool:
    """Whether Triton interprets its kernels, as it reads its own variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches on the current device, not on the
    tensor's."""
    if tensor.device.type in GPU_TYPES:
        return getattr(torch, tensor.device.type).device(tensor.device)
    return contextlib.nullcontext()


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured: nothing may wait for the device then, nor be copied
    from host memory that will be gone at the replay."""
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def exponential(tensor: Tensor) -> Any:
    """The kernels' exponential for the tensor's device."""
    from ..kernels.online_softmax import flushed_exp, plain_exp

    return flushed_exp if tensor.device.type == "cuda" and torch.version.cuda else plain_exp


def warps(threads: int, tensor: Tensor) -> int:
    """Warps that make up so many threads: of 64 lanes on AMD, of 32 elsewhere."""
    is_amd = tensor.device.type == "cuda" and torch.version.hip is not None
    return threads // (64 if is_amd else 32)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and facts: float64 for float64, float32 for all else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def slabs(n_rows: int, row_numel: int, most: int = SLAB_BYTES) -> list[slice]:
    """Slices of rows that keep the torch path's temporaries in cache, or within `most` bytes."""
    step = max(1, min(SLAB_BYTES, most) // (4 * max(1, row_numel)))
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


class Rows(NamedTuple):
    """How the rows of [N, V], [B, S, V] or [K, B, S, V] lie in memory, for a kernel that wants
    16-byte loads.

    `base` starts at an aligned address `base_shift` elements before row 0; row i of a group k lies
    at k * group_stride + i // inner_size * outer_stride + i % inner_size * inner_stride after that.
    """

    base: Tensor
    n_rows: int
    inner_size: int  # ONE_STEP where rows step by one stride: no kernel is compiled anew for N
    group_stride: int
    outer_stride: int
    inner_stride: int
    base_shift: int
    vec: int

    @classmethod
    def of(cls, matrix: Tensor) -> Rows:
        """Describes such a tensor; copies it only if a row is not contiguous."""
        if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
            matrix = matrix.contiguous()
        sizes = (1, 1, *matrix.shape[:-1])[-3:]
        strides = (0, 0, *matrix.stride()[:-1])[-3:]
        # Where there is nothing to step to, a stride tells nothing and so must not differ.
        group, outer, inner = (s if n > 1 else 0 for n, s in zip(sizes, strides, strict=True))
        vec = 16 // matrix.element_size()
        shift = matrix.data_ptr() % 16 // matrix.element_size()
        if shift > matrix.storage_offset():  # the storage itself is not aligned: narrow loads
            shift, vec = 0, 1
        base = matrix.as_strided((1,), (1,), matrix.storage_offset() - shift)
        inner_size = sizes[-1] if sizes[-2] > 1 else ONE_STEP
        n_rows = matrix.shape[:-1].numel()
        return cls(base, n_rows, inner_size, group, outer, inner, shift, vec)

    def steps(self) -> tuple[int, int, int, int]:
        """Where rows start: group, outer and inner stride, shift of row 0."""
        return self.group_stride, self.outer_stride, self.inner_stride, self.base_shift

    def same_shift(self, other: Rows) -> bool:
        """Whether the rows of two matrices of one shape are equally far from alignment."""
        width = max(self.vec, other.vec)
        pairs = zip(self.steps(), other.steps(), strict=True)
        return all((own - theirs) % width == 0 for own, theirs in pairs)


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., V] as [N, V], or as [B, S, V] where only that needs no copy; a copy where neither can
    be had."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if tensor.dim() in (2, 3):
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])


def dense_like(tensor: Tensor) -> Tensor:
    """Uninitialised and contiguous, of the tensor's shape, dtype and device."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def gradient_like(logits: Tensor) -> Tensor:
    """An uninitialised gradient of `logits` whose rows lie as far from alignment as theirs, so that
    loads and stores are both wide; what lies between the rows is zeroed.

    A GEMM may multiply what lies beyond its columns by zero, hence the zeros (NaN there would
    become NaN in the result). Where the logits are a small part of their memory it is dense.
    """
    shape, ordered = logits.shape, logits.stride(-1) == 1 or logits.shape[-1] == 1
    strides, extents = [1], [logits.shape[-1]]  # from the last dimension to the first
    for size, stride in zip(shape[-2::-1], logits.stride()[-2::-1], strict=True):
        ordered = ordered and (size == 1 or stride >= extents[-1])
        strides.append(stride if size > 1 else extents[-1])
        extents.append((size - 1) * strides[-1] + extents[-1])
    numel = logits.numel()
    if not (ordered and numel and extents[-1] <= 1.25 * numel + 4096):
        return dense_like(logits)
    shift = logits.storage_offset() % (16 // logits.element_size())
    gaps = [stride - inside for stride, inside in zip(strides[1:], extents[:-1], strict=True)]
    room = logits.new_empty(shift + extents[-1] + sum(gaps))
    for level, gap in enumerate(gaps, start=1):
        if gap:
            outer = strides[: level - 1 : -1]
            sizes = (*shape[: len(outer)], gap)
            room.as_strided(sizes, (*outer, 1), shift + extents[level - 1]).zero_()
    return room.as_strided(shape, strides[::-1], shift)
