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
SLAB_BYTES = 1 << 20  # fp32 working set of the torch path on a CPU: a share of the L2 cache


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
        wish = os.environ.get("ONEPASS_IMPL", "auto")
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
    if importlib.util.find_spec("triton") is None:
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


def slabs(n_rows: int, row_numel: int) -> list[slice]:
    """Slices of rows that keep the torch path's temporaries in cache."""
    step = max(1, SLAB_BYTES // (4 * max(1, row_numel)))
    return [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]


class Rows(NamedTuple):
    """How the rows of [N, V] or [B, S, V] lie in memory, for a kernel that wants 16-byte loads.

    `base` starts at an aligned address `base_shift` elements before row 0; row i lies at
    i // inner_size * outer_stride + i % inner_size * inner_stride after that.
    """

    base: Tensor
    n_rows: int
    inner_size: int
    outer_stride: int
    inner_stride: int
    base_shift: int
    vec: int

    @classmethod
    def of(cls, matrix: Tensor) -> Rows:
        """Describes a [N, V] or [B, S, V] tensor; copies it only if a row is not contiguous."""
        if matrix.stride(-1) != 1 and matrix.shape[-1] > 1:
            matrix = matrix.contiguous()
        inner = matrix.shape[-2]
        outer_stride = matrix.stride(0) if matrix.dim() == 3 else 0
        vec = 16 // matrix.element_size()
        shift = matrix.data_ptr() % 16 // matrix.element_size()
        if (
            shift > matrix.storage_offset()
        ):  # the storage itself starts unaligned: loads stay narrow
            shift, vec = 0, 1
        base = matrix.as_strided((1,), (1,), matrix.storage_offset() - shift)
        return cls(
            base,
            matrix.shape[:-1].numel(),
            max(inner, 1),
            outer_stride,
            matrix.stride(-2),
            shift,
            vec,
        )


def as_matrix(tensor: Tensor) -> Tensor:
    """[..., V] as [N, V], or as [B, S, V] where only that needs no copy; a copy where neither can
    be had."""
    if tensor.dim() == 1:
        return tensor.unsqueeze(0)
    if tensor.dim() in (2, 3):
        return tensor
    return tensor.reshape(-1, tensor.shape[-1])
