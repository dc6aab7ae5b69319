"""gaussian_stats and cloak: rows against a Gaussian with a mean and a standard deviation per
feature, and rows to which such noise is added.

In this order: the result type, how rows are broadcast, gaussian_stats (torch path, Triton
launchers, operators, gradient), cloak likewise, the public functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import (
    check_choice,
    check_floating,
    check_same_device,
    check_strided,
    check_want,
)
from ._declare import declare
from ._launch import IMPLS, accumulation_dtype, choose, device_of, warps
from ._philox import Normals


class GaussianStats(NamedTuple):
    """Sums over the features D that count, shape [...]; None where not asked for by `want`:

    mahalanobis  sum of ((x - location - mean) / std)^2
    log_det      sum of log(std)
    """

    mahalanobis: Tensor
    log_det: Tensor


STATS = GaussianStats._fields
KERNEL_DIMS = 3  # leading dimensions that the kernels step along


# ---------------------------------------------------------------- how rows are broadcast


def _lead(*tensors: Tensor | None) -> torch.Size:
    """The leading dimensions that the tensors' own broadcast to."""
    return torch.broadcast_shapes(*(t.shape[:-1] for t in tensors if t is not None))


def _widest(*tensors: Tensor | None) -> torch.dtype:
    """In what sums over the tensors are accumulated."""
    dtypes = [accumulation_dtype(t.dtype) for t in tensors if t is not None]
    return torch.float64 if torch.float64 in dtypes else torch.float32


SLAB_NUMEL = 1 << 17  # elements at a time on a CPU: all that a slab needs stays in a core's cache


def _dense(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised and contiguous, of this shape."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


def _boxes(lead: Sequence[int], like: Tensor) -> Iterator[tuple[slice, ...]]:
    """Cuts of the leading dimensions, in the order of the rows, each with few elements."""
    if math.prod(lead) == 0:
        return
    parts = torch.get_num_threads() if like.device.type == "cpu" else 32
    rows = max(1, parts * SLAB_NUMEL // like.shape[-1])
    steps = []
    for size in reversed(lead):
        steps.append(min(size, max(1, rows)))
        rows = rows // size if steps[-1] == size else 0
    steps.reverse()

    def cut(dims: int) -> Iterator[tuple[slice, ...]]:
        if dims == 0:
            yield ()
            return
        size, step = lead[dims - 1], steps[dims - 1]
        for outer in cut(dims - 1):
            for at in range(0, size, step):
                yield (*outer, slice(at, min(at + step, size)))

    yield from cut(len(lead))


def _part(tensor: Tensor, box: tuple[slice, ...]) -> Tensor:
    """The tensor's own share of a box: all of the one row that it has for a whole dimension."""
    skipped = len(box) - tensor.dim() + 1
    own = zip(box[skipped:], tensor.shape[:-1], strict=True)
    return tensor[tuple(part if size > 1 else slice(None) for part, size in own)]


def _like_shape(values: Tensor, shape: torch.Size) -> Tensor:
    """The sum of the values that were broadcast from one."""
    return values if values.shape == shape else values.sum_to_size(shape)


def _ready(tensor: Tensor | None) -> Tensor | None:
    """A tensor whose rows are contiguous."""
    if tensor is None or tensor.stride(-1) == 1 or tensor.shape[-1] == 1:
        return tensor
    return tensor.contiguous()


def _steps(lead: Sequence[int], *tensors: Tensor | None) -> tuple[list[int], list[list[int]]]:
    """(sizes, strides of each tensor) of the leading dimensions, adjoining ones merged where every
    tensor steps through both as through one. Always KERNEL_DIMS of them, sizes 1 in front."""
    sizes: list[int] = []
    strides: list[list[int]] = []
    expanded = [
        (0,) * len(lead) if t is None else t.expand(*lead, t.shape[-1]).stride() for t in tensors
    ]
    for dim, size in enumerate(lead):
        if size == 1:
            continue
        here = [step[dim] for step in expanded]
        if sizes and all(o == size * h for o, h in zip(strides[-1], here, strict=True)):
            sizes[-1], strides[-1] = sizes[-1] * size, here
        else:
            sizes.append(size)
            strides.append(here)
    missing = KERNEL_DIMS - len(sizes)
    sizes = [1] * missing + sizes
    strides = [[0] * len(tensors)] * missing + strides
    return sizes, [list(of_tensor) for of_tensor in zip(*strides, strict=True)]


def _launchable(lead: Sequence[int], *tensors: Tensor | None) -> list[Tensor | None]:
    """The tensors with contiguous rows; whole copies of them where they are broadcast in more ways
    than the kernels know."""
    ready = [_ready(t) for t in tensors]
    if len(_steps(lead, *ready)[0]) > KERNEL_DIMS:
        ready = [None if t is None else t.expand(*lead, t.shape[-1]).contiguous() for t in ready]
    return ready


def _meta(mask: Tensor | None, like: Tensor) -> dict[str, Any]:
    import triton

    return {
        "FEATURES": mask is not None and mask.shape[-1] > 1,
        "BLOCK": min(1024, max(128, triton.next_power_of_2(like.shape[-1]))),
        "num_warps": warps(128, like),
    }


# ---------------------------------------------------------------- gaussian_stats


def _distance(
    x: Tensor, mean: Tensor | None, location: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """x - location - mean."""
    d = x.to(dtype)
    for shift in (location, mean):
        d = d if shift is None else d - shift.to(dtype)
    return d


def gaussian_stats_backward_reference(
    sides: Sequence[Tensor | None],
    mask: Tensor | None,
    on_mahalanobis: Tensor | None,
    on_log_det: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x, mean, location and std (`sides`) in the accumulation dtype, each in its own
    shape, from upstream gradients [...]."""
    x, mean, location, std = sides
    assert std is not None
    dtype = _widest(*sides)
    s, pull, dstd = std.to(dtype), None, None
    counts = torch.ones((), dtype=torch.bool, device=std.device) if mask is None else mask
    s = torch.where(counts, s, 1.0)
    if on_mahalanobis is not None and x is not None:
        d = torch.where(counts, _distance(x, mean, location, dtype), 0.0)
        pull = torch.where(counts, 2 * on_mahalanobis.unsqueeze(-1) * (d / s) / s, 0.0)
        dstd = -pull * (d / s)
    if on_log_det is not None:
        slope = torch.where(counts, on_log_det.unsqueeze(-1) / s, 0.0)
        dstd = slope if dstd is None else dstd + slope
    made = (pull, None if pull is None else -pull, None if pull is None else -pull, dstd)
    return [
        None if side is None or grad is None else _like_shape(grad, side.shape)
        for side, grad in zip(sides, made, strict=True)
    ]


def _forward_torch(
    sides: Sequence[Tensor | None], mask: Tensor | None, out: dict[str, Tensor]
) -> None:
    *_, std = sides
    assert std is not None
    lead, dtype = next(iter(out.values())).shape, _widest(*sides)
    for box in _boxes(lead, std):
        x, mean, location, s = (None if t is None else _part(t, box) for t in sides)
        keep = None if mask is None else _part(mask, box)
        assert s is not None
        s = s.to(dtype)
        if "log_det" in out:
            _sum_rows(s.log(), keep, out["log_det"][box])
        if "mahalanobis" in out and x is not None:
            z = _distance(x, mean, location, dtype) / s
            _sum_rows(z.square_(), keep, out["mahalanobis"][box])


def _sum_rows(terms: Tensor, keep: Tensor | None, out: Tensor) -> None:
    """Sums over the features that count, of terms that nobody else holds."""
    if keep is not None and keep.shape[-1] > 1:
        terms = torch.where(keep, terms, 0.0)
    out.copy_(terms.sum(-1))
    if keep is not None and keep.shape[-1] == 1:
        out.masked_fill_(~keep.squeeze(-1), 0.0)


def _backward_torch(
    grads: Sequence[Tensor | None],
    sides: Sequence[Tensor | None],
    mask: Tensor | None,
    upstream: Sequence[Tensor | None],
) -> None:
    std = sides[-1]
    assert std is not None
    lead, dtype = next(g.shape for g in upstream if g is not None), _widest(*sides)
    totals: list[Tensor | None] = []  # where a gradient is a sum over boxes
    for side, grad in zip(sides, grads, strict=True):
        whole = side is None or grad is None or side.shape[:-1] == lead
        totals.append(None if whole or grad is None else torch.zeros_like(grad, dtype=dtype))
    on_mahalanobis, on_log_det = upstream
    for box in _boxes(lead, std):
        x, mean, location, s = (None if t is None else _part(t, box) for t in sides)
        assert s is not None
        hidden = None if mask is None else ~_part(mask, box)
        pull = dstd = None
        s = s.to(dtype)
        if on_log_det is not None:
            dstd = on_log_det[box].unsqueeze(-1) / s
        if on_mahalanobis is not None and x is not None:
            z = _distance(x, mean, location, dtype) / s
            pull = (z / s).mul_(2 * on_mahalanobis[box].unsqueeze(-1))
            if grads[3] is not None:
                dstd = z.mul_(pull).neg_() if dstd is None else dstd.addcmul_(z, pull, value=-1)
        if hidden is not None:  # set, not multiplied: NaN may stand there
            pull, dstd = (t if t is None else t.masked_fill_(hidden, 0.0) for t in (pull, dstd))
        for at, part in enumerate((pull, pull, pull, dstd)):
            if at == 1 and part is not None:
                part.neg_()  # the pull on x has reached its place
            grad, total = grads[at], totals[at]
            if part is None or grad is None:
                continue
            if total is None:
                grad[box].copy_(part)
            else:
                own = _part(total, box)
                own.add_(_like_shape(part, own.shape))
    for grad, total in zip(grads, totals, strict=True):
        if grad is not None and total is not None:
            grad.copy_(total)


def _forward_triton(
    sides: Sequence[Tensor | None], mask: Tensor | None, out: dict[str, Tensor]
) -> None:
    from ..kernels.gaussian import gaussian_stats_kernel

    lead = next(iter(out.values())).shape
    *ready, flags = _launchable(lead, *sides, mask)
    sizes, strides = _steps(lead, *ready, flags)
    std = ready[-1]
    assert std is not None
    with device_of(std):
        gaussian_stats_kernel[(math.prod(lead),)](
            *ready,
            flags,
            *(out.get(name) for name in STATS),
            std.shape[-1],
            *sizes[1:],
            *(step for of_tensor in strides for step in of_tensor),
            **_meta(flags, std),
        )


def _backward_triton(
    grads: Sequence[Tensor | None],
    sides: Sequence[Tensor | None],
    mask: Tensor | None,
    upstream: Sequence[Tensor | None],
) -> None:
    """One launch for all gradients that are summed along the same dimensions."""
    from ..kernels.gaussian import gaussian_stats_backward_kernel

    lead = next(g.shape for g in upstream if g is not None)
    *ready, flags = _launchable(lead, *sides, mask)
    std = ready[-1]
    assert std is not None
    # Too many ways to sum for the kernel: whole gradients, and torch sums them.
    too_many = any(len(_steps(lead, *ready, flags, grad)[0]) > KERNEL_DIMS for grad in grads)
    made = [
        std.new_empty((*lead, std.shape[-1]), dtype=torch.float32)
        if too_many and grad is not None
        else grad
        for grad in grads
    ]
    waiting = [at for at, grad in enumerate(made) if grad is not None]
    while waiting:
        first = made[waiting[0]]
        together = [at for at in waiting if _lead(made[at]) == _lead(first)]
        waiting = [at for at in waiting if at not in together]
        sizes, strides = _steps(lead, *ready, flags, first)
        *strides, of_gradient = strides
        summed = [
            n if n > 1 and step == 0 else 1 for n, step in zip(sizes, of_gradient, strict=True)
        ]
        own = [n // s for n, s in zip(sizes, summed, strict=True)]
        with device_of(std):
            gaussian_stats_backward_kernel[(math.prod(own),)](
                *(grad if at in together else None for at, grad in enumerate(made)),
                *ready,
                flags,
                *upstream,
                std.shape[-1],
                *own,
                *summed,
                *(step for of_tensor in strides for step in of_tensor),
                SUMMED=any(n > 1 for n in summed),
                **_meta(flags, std),
            )
    if too_many:
        for grad, whole in zip(grads, made, strict=True):
            if grad is not None and whole is not None:
                grad.copy_(whole.sum_to_size(grad.shape))


def _sides(
    x: Tensor | None, mean: Tensor | None, location: Tensor | None, std: Tensor
) -> tuple[Tensor | None, ...]:
    return x, mean, location, std


def _empty_stats(
    x: Tensor | None,
    mean: Tensor | None,
    location: Tensor | None,
    std: Tensor,
    mask: Tensor | None,
    want: Sequence[str],
) -> tuple[Tensor, ...]:
    lead, dtype = _lead(x, mean, location, std, mask), _widest(x, mean, location, std)
    return tuple(std.new_empty(lead if name in want else 0, dtype=dtype) for name in STATS)


def _forward(
    x: Tensor | None,
    mean: Tensor | None,
    location: Tensor | None,
    std: Tensor,
    mask: Tensor | None,
    want: Sequence[str],
    triton: bool,
) -> tuple[Tensor, ...]:
    stats = _empty_stats(x, mean, location, std, mask, want)
    out = {name: fact for name, fact in zip(STATS, stats, strict=True) if name in want}
    if any(fact.numel() for fact in out.values()):
        run = _forward_triton if triton else _forward_torch
        run(_sides(x, mean, location, std), mask, out)
    return stats


def _forward_fake(
    x: Tensor | None,
    mean: Tensor | None,
    location: Tensor | None,
    std: Tensor,
    mask: Tensor | None,
    want: Sequence[str],
    triton: bool,
) -> tuple[Tensor, ...]:
    return _empty_stats(x, mean, location, std, mask, want)


def _empty_grads(sides: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """Dense gradients, each in the shape of its side."""
    return [
        _dense(side, side.dtype) if need and side is not None else None
        for side, need in zip(sides, needs, strict=True)
    ]


def _backward_op(
    x: Tensor | None,
    mean: Tensor | None,
    location: Tensor | None,
    std: Tensor,
    mask: Tensor | None,
    on_mahalanobis: Tensor | None,
    on_log_det: Tensor | None,
    needs: Sequence[bool],
    triton: bool,
) -> list[Tensor]:
    sides = _sides(x, mean, location, std)
    grads = _empty_grads(sides, needs)
    upstream = [None if g is None else g.contiguous() for g in (on_mahalanobis, on_log_det)]
    if any(g is not None and g.numel() for g in upstream) and any(needs):
        run = _backward_triton if triton else _backward_torch
        run(grads, sides, mask, upstream)
    else:  # sums over no rows
        for grad in grads:
            if grad is not None:
                grad.zero_()
    return [grad for grad in grads if grad is not None]


def _backward_fake(
    x: Tensor | None,
    mean: Tensor | None,
    location: Tensor | None,
    std: Tensor,
    mask: Tensor | None,
    on_mahalanobis: Tensor | None,
    on_log_det: Tensor | None,
    needs: Sequence[bool],
    triton: bool,
) -> list[Tensor]:
    grads = _empty_grads(_sides(x, mean, location, std), needs)
    return [grad for grad in grads if grad is not None]


_gaussian_stats_backward = declare(
    "gaussian_stats_backward(Tensor? x, Tensor? mean, Tensor? location, Tensor std, Tensor? mask, "
    "Tensor? on_mahalanobis, Tensor? on_log_det, bool[] needs, bool triton) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, want, triton = inputs
    ctx.save_for_backward(*tensors)
    ctx.want, ctx.triton = want, triton
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *sides, mask = ctx.saved_tensors
    on_mahalanobis, on_log_det = (
        grad if name in ctx.want else None for name, grad in zip(STATS, upstream, strict=True)
    )
    if on_mahalanobis is None:  # of the log-determinant nothing but std has a gradient
        sides[:3] = [None] * 3
    needs = [
        need and side is not None
        for need, side in zip(ctx.needs_input_grad[:4], sides, strict=True)
    ]
    grads: list[Tensor | None] = [None] * 4
    if on_mahalanobis is None and on_log_det is None:
        return (*grads, None, None, None)
    if torch.is_grad_enabled():
        grads = gaussian_stats_backward_reference(sides, mask, on_mahalanobis, on_log_det)
        grads = [
            None if grad is None or not need else grad.to(side.dtype)
            for grad, side, need in zip(grads, sides, needs, strict=True)
        ]
    else:
        made = iter(
            _gaussian_stats_backward(*sides, mask, on_mahalanobis, on_log_det, needs, ctx.triton)
        )
        grads = [next(made) if need else None for need in needs]
    return (*grads, None, None, None)


_gaussian_stats = declare(
    "gaussian_stats(Tensor? x, Tensor? mean, Tensor? location, Tensor std, Tensor? mask, "
    "str[] want, bool triton) -> (Tensor mahalanobis, Tensor log_det)",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


# ---------------------------------------------------------------- cloak


def _cloak_torch(
    out: Tensor, x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, seed: Tensor
) -> None:
    dtype = _widest(x, mean, std)
    normals, first = Normals(seed), 0
    for box in _boxes(x.shape[:-1], x):
        rows = x[box]
        noise = normals.draw(first, rows.numel()).view(rows.shape).to(dtype)
        first += rows.numel()
        noise.mul_(std[box]).add_(mean[box])
        if mask is None:
            torch.add(rows, noise, out=out[box])
        else:  # where, not a product: x itself to the bit, whatever the noise holds
            out[box] = torch.where(_part(mask, box), noise.add_(rows).to(x.dtype), rows)


def _cloak_backward_torch(
    dmean: Tensor | None, dstd: Tensor | None, grad: Tensor, mask: Tensor | None, seed: Tensor
) -> None:
    dtype = accumulation_dtype(grad.dtype)
    normals, first = Normals(seed), 0
    for box in _boxes(grad.shape[:-1], grad):
        rows = grad[box]
        keep = None if mask is None else _part(mask, box)
        if dmean is not None:
            dmean[box] = rows if keep is None else torch.where(keep, rows, 0.0)
        if dstd is not None:
            noise = normals.draw(first, rows.numel()).view(rows.shape)
            slope = dstd[box]
            if slope.dtype == dtype:
                torch.mul(noise, rows, out=slope)
            else:
                slope.copy_(noise.mul_(rows))
            if keep is not None:
                slope.masked_fill_(~keep, 0.0)
        first += rows.numel()


def _cloak_triton(
    out: Tensor, x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, seed: Tensor
) -> None:
    from ..kernels.gaussian import cloak_kernel

    lead = x.shape[:-1]
    *ready, flags = _launchable(lead, x, mean, std, mask)
    sizes, strides = _steps(lead, *ready, flags)
    with device_of(x):
        cloak_kernel[(math.prod(lead),)](
            out,
            *ready,
            flags,
            seed,
            x.shape[-1],
            *sizes[1:],
            *(step for of_tensor in strides for step in of_tensor),
            ALIGNED=x.shape[-1] % 4 == 0,
            **_meta(flags, x),
        )


def _cloak_backward_triton(
    dmean: Tensor | None, dstd: Tensor | None, grad: Tensor, mask: Tensor | None, seed: Tensor
) -> None:
    from ..kernels.gaussian import cloak_backward_kernel

    lead = grad.shape[:-1]
    ready, flags = _launchable(lead, grad, mask)
    sizes, strides = _steps(lead, ready, flags)
    with device_of(grad):
        cloak_backward_kernel[(math.prod(lead),)](
            dmean,
            dstd,
            ready,
            flags,
            seed,
            grad.shape[-1],
            *sizes[1:],
            *(step for of_tensor in strides for step in of_tensor),
            ALIGNED=grad.shape[-1] % 4 == 0,
            **_meta(flags, grad),
        )


def _cloak_op(
    x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, seed: Tensor, triton: bool
) -> Tensor:
    out = _dense(x, x.dtype)
    if out.numel():
        (_cloak_triton if triton else _cloak_torch)(out, x, mean, std, mask, seed)
    return out


def _cloak_fake(
    x: Tensor, mean: Tensor, std: Tensor, mask: Tensor | None, seed: Tensor, triton: bool
) -> Tensor:
    return _dense(x, x.dtype)


def _cloak_backward_op(
    grad: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dtype: torch.dtype,
    need_mean: bool,
    need_std: bool,
    triton: bool,
) -> list[Tensor]:
    dmean = _dense(grad, dtype) if need_mean else None
    dstd = _dense(grad, dtype) if need_std else None
    if grad.numel():
        (_cloak_backward_triton if triton else _cloak_backward_torch)(dmean, dstd, grad, mask, seed)
    return [made for made in (dmean, dstd) if made is not None]


def _cloak_backward_fake(
    grad: Tensor,
    mask: Tensor | None,
    seed: Tensor,
    dtype: torch.dtype,
    need_mean: bool,
    need_std: bool,
    triton: bool,
) -> list[Tensor]:
    return [_dense(grad, dtype) for need in (need_mean, need_std) if need]


_cloak_backward = declare(
    "cloak_backward(Tensor grad, Tensor? mask, Tensor seed, ScalarType dtype, bool need_mean, "
    "bool need_std, bool triton) -> Tensor[]",
    implementation=_cloak_backward_op,
    fake=_cloak_backward_fake,
)


def _cloak_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, mean, _, mask, seed, triton = inputs
    ctx.save_for_backward(mask, seed)
    ctx.dtype, ctx.triton = mean.dtype, triton


def _cloak_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    mask, seed = ctx.saved_tensors
    need_x, need_mean, need_std = ctx.needs_input_grad[:3]
    dmean = dstd = None
    if torch.is_grad_enabled():
        dmean, dstd = _cloak_twice_differentiable(grad, mask, seed)
        dmean, dstd = dmean.to(ctx.dtype), dstd.to(ctx.dtype)
    else:
        is_same = mask is None and grad.dtype == ctx.dtype  # the mean's gradient is x's
        made = _cloak_backward(
            grad, mask, seed, ctx.dtype, need_mean and not is_same, need_std, ctx.triton
        )
        dmean = grad if is_same else made[0] if need_mean else None
        dstd = made[-1] if need_std else None
    return (
        grad if need_x else None,
        dmean if need_mean else None,
        dstd if need_std else None,
        None,
        None,
        None,
    )


def _cloak_twice_differentiable(
    grad: Tensor, mask: Tensor | None, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """The same gradients in torch operations that autograd can follow, for create_graph=True."""
    ones = torch.ones_like(grad, dtype=accumulation_dtype(grad.dtype))
    if not grad.numel():
        return grad.clone(), grad.clone()
    with torch.no_grad():
        (noise,) = _cloak_backward(ones, None, seed, ones.dtype, False, True, False)
    counts = torch.ones((), dtype=torch.bool, device=grad.device) if mask is None else mask
    return torch.where(counts, grad, 0.0), torch.where(counts, grad * noise, 0.0)


_cloak = declare(
    "cloak(Tensor x, Tensor mean, Tensor std, Tensor? mask, Tensor seed, bool triton) -> Tensor",
    implementation=_cloak_op,
    fake=_cloak_fake,
    setup_context=_cloak_setup,
    backward=_cloak_gradient,
)


# ---------------------------------------------------------------- public


def _check_side(name: str, tensor: Any, std: Tensor) -> None:
    """Raises unless the tensor is [..., D] with the D of std, on its device."""
    check_floating(name, tensor)
    check_same_device(name, tensor, "std", std)
    if tensor.dim() == 0 or tensor.shape[-1] != std.shape[-1]:
        raise ValueError(
            f"{name} and std must have the same last dimension, [..., D]: got "
            f"{tuple(tensor.shape)} and {tuple(std.shape)}"
        )


def _check_std(std: Any) -> None:
    check_floating("std", std)
    if std.dim() == 0 or std.shape[-1] == 0:
        raise ValueError(f"std must be [..., D] with D > 0: got shape {tuple(std.shape)}")


def _flags(mask: Any, lead: Sequence[int], std: Tensor) -> Tensor | None:
    """The mask as bool [..., 1] or [..., D] (nonzero counts), after checking that it fits."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a torch.Tensor: got {type(mask).__name__}")
    check_strided("mask", mask)
    check_same_device("mask", mask, "std", std)
    if mask.is_complex():
        raise ValueError(f"mask must be bool, integer or floating: got {mask.dtype}")
    features = (*lead, std.shape[-1])
    wanted = tuple(lead) if mask.dim() == len(lead) else features
    fits = mask.dim() == len(wanted) and all(
        own in (1, size) for own, size in zip(mask.shape, wanted, strict=True)
    )
    if not fits or (mask.dim() == len(features) and mask.shape[-1] != features[-1]):
        raise ValueError(
            f"mask must mark rows, {tuple(lead)}, or features, {features}: got {tuple(mask.shape)}"
        )
    flags = mask if mask.dtype == torch.bool else mask != 0
    return flags.unsqueeze(-1) if mask.dim() == len(lead) else flags


def gaussian_stats(
    x: Tensor | None,
    mean: Tensor | None,
    std: Tensor,
    mask: Tensor | None = None,
    *,
    location: Tensor | None = None,
    want: Sequence[str] = STATS,
    impl: str = "auto",
) -> GaussianStats:
    """Squared Mahalanobis distance of every row of `x` to a Gaussian with a mean and a standard
    deviation per feature, and the logarithm of its determinant, in one read of each.

    Args:
        x: [..., D] (float32, bfloat16, float16; float64 through the torch path); None where only
            log_det is wanted.
        mean: [..., D] or None, which is 0.
        std: [..., D], positive where it counts; not checked here.
        mask: [...] rows or [..., D] features that count (nonzero); the others are not read, add
            nothing and have a gradient of 0.
        location: [..., D] or None: added to the mean, as the clean row of a transform is.
        want: names of GaussianStats fields; by default both.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        GaussianStats, float32 (float64 for float64), in the shape that the leading dimensions of
        the tensors broadcast to: x[:, None] against mean[None] pairs every row with every one,
        without a copy. Gradients flow to all but the mask.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: mahalanobis = sum_D m ((x - location - mean) / std)^2, log_det = sum_D m log(std).
    """
    want = check_want(want, STATS)
    check_choice("impl", impl, IMPLS)
    _check_std(std)
    if "mahalanobis" not in want:
        x = mean = location = None
    else:
        _check_side("x", x, std)
    for name, side in (("mean", mean), ("location", location)):
        if side is not None:
            _check_side(name, side, std)
    sides = [side for side in (x, mean, location, std) if side is not None]
    try:
        lead = _lead(*sides)
    except RuntimeError:
        shapes = ", ".join(str(tuple(side.shape)) for side in sides)
        raise ValueError(
            f"the leading dimensions of x, mean, location and std must broadcast: got {shapes}"
        ) from None
    flags = _flags(mask, lead, std)
    stats = _gaussian_stats(x, mean, location, std, flags, list(want), choose(impl, *sides))
    wanted: Any = [s if name in want else None for name, s in zip(STATS, stats, strict=True)]
    return GaussianStats(*wanted)


def cloak(
    x: Tensor,
    mean: Tensor,
    std: Tensor,
    mask: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`x` with noise of a mean and a standard deviation per feature: x + mean + std * eps.

    Args:
        x: [..., D] (float32, bfloat16, float16; float64 through the torch path).
        mean: [..., D], broadcast to x.
        std: like mean, in its dtype.
        mask: [...] rows or [..., D] features that are changed (nonzero); the others come out as
            they are, to the bit.
        seed: one int64 on x's device; None draws one from torch's generator of that device.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        Tensor like x. eps is standard normal, a function of the seed and of an element's place in
        x alone; the backward draws it again, so that no tensor of it is kept.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: out = x + m (mean + std eps); eps by Box-Muller from Philox-4x32-10, four elements a
    counter.
    """
    check_choice("impl", impl, IMPLS)
    check_floating("x", x)
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must be [..., D] with D > 0: got shape {tuple(x.shape)}")
    for name, side in (("mean", mean), ("std", std)):
        check_floating(name, side)
        check_same_device(name, side, "x", x)
        # By hand: an expansion that fails says nothing of which argument it was.
        padded = (1,) * (x.dim() - side.dim()) + tuple(side.shape)
        if len(padded) != x.dim() or any(
            own not in (1, size) for own, size in zip(padded, x.shape, strict=True)
        ):
            raise ValueError(
                f"{name} must broadcast to x: got {tuple(side.shape)} for {tuple(x.shape)}"
            )
    if mean.dtype != std.dtype:
        raise ValueError(f"mean and std must have one dtype: got {mean.dtype} and {std.dtype}")
    flags = _flags(mask, x.shape[:-1], x)
    if seed is None:
        seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=x.device)
    elif not isinstance(seed, Tensor):
        raise TypeError(f"seed must be a torch.Tensor or None: got {type(seed).__name__}")
    elif seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be one int64: got {seed.dtype} of shape {tuple(seed.shape)}")
    check_same_device("seed", seed, "x", x)
    mean, std = mean.expand(x.shape), std.expand(x.shape)
    return _cloak(x, mean, std, flags, seed, choose(impl, x, mean, std))
