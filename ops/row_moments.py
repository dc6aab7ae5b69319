"""row_moments: the five sums over a pair of hidden rows that every hidden-state loss is made of.

In this order: the result type, the gradient's definition, the torch path, the Triton launchers, the
operators, the gradient, the public function.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_choice, check_rows_alike, check_want
from ._declare import declare
from ._launch import IMPLS, accumulation_dtype, capturing, choose, dense_like, device_of, warps
from ._scratch import Scratch
from .vocab_stats import mask_rows


class RowMoments(NamedTuple):
    """Sums over D of each pair of rows, shape `x.shape[:-1]`, with the layers in front where there
    are several; None where not asked for by `want`:

        dd                     sum of (x - y)^2
        xx, yy, xy             sums of x^2, y^2, x y
        difference_of_squares  sum of (x - y)(x + y): xx - yy without its cancellation
    """

    dd: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    difference_of_squares: Tensor


MOMENTS = RowMoments._fields


def row_moments_backward_reference(
    x: Tensor, y: Tensor, upstream: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """(dx, dy) [n, D] in the accumulation dtype, from upstream gradients of the moments, [n] each
    or None."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    on_dd, on_xx, on_yy, on_xy, on_difference = (
        0.0 if g is None else g.unsqueeze(-1) for g in upstream
    )
    pull = 2 * on_dd * (x - y)
    dx = pull + 2 * (on_xx + on_difference) * x + on_xy * y
    dy = 2 * (on_yy - on_difference) * y + on_xy * x - pull
    return dx, dy


def _matrices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each [..., D] as [N, D] with contiguous rows at one common stride."""
    flat = [t.reshape(-1, t.shape[-1]) for t in tensors]
    if (
        any(t.stride(-1) != 1 and t.shape[-1] > 1 for t in flat)
        or len({t.stride(0) for t in flat}) > 1
    ):
        flat = [t.contiguous() for t in flat]
    return flat


SLAB_NUMEL = 1 << 17  # a thread's part of a slab: in its cache, yet few calls
FEWEST_PARTS = 4  # where few threads share the last cache, a call costs more than a miss in theirs
SHORT_GAP = 1 << 16  # elements that are read as fast as the calls for another slab are made


class _Slab(NamedTuple):
    rows: slice
    has_gaps: bool  # rows among them that do not count


def _kept_slabs(mask: Tensor | None, like: Tensor) -> list[_Slab]:
    """Slices of [N, D] with all rows that count, and short gaps between them: no row is copied."""
    n_rows, hidden_size = like.shape
    on_cpu = like.device.type == "cpu"
    parts = max(FEWEST_PARTS, torch.get_num_threads()) if on_cpu else 8 * FEWEST_PARTS
    if like.dtype != accumulation_dtype(like.dtype):
        parts = max(1, parts // 2)  # both sides are cast: three slabs at a time, not one
    step = max(1, parts * SLAB_NUMEL // hidden_size)
    spans = [(0, n_rows, n_rows)]  # first row, row after the last, rows that count
    if mask is not None and not mask.all():
        kept = mask.nonzero().squeeze(-1)
        apart = kept.diff() > max(1, SHORT_GAP // hidden_size)
        cuts = [0, *(apart.nonzero().squeeze(-1) + 1).tolist(), len(kept)] if len(kept) else [0]
        firsts = kept[cuts[:-1]].tolist()
        lasts = kept[[cut - 1 for cut in cuts[1:]]].tolist()
        counts = (after - at for at, after in pairwise(cuts))
        spans = [(f, n + 1, c) for f, n, c in zip(firsts, lasts, counts, strict=True)]
    return [
        _Slab(slice(at, min(at + step, stop)), count < stop - start)
        for start, stop, count in spans
        for at in range(start, stop, step)
    ]


def _scratch(slabs: Sequence[_Slab], like: Tensor) -> Scratch:
    n_rows = max((slab.rows.stop - slab.rows.start for slab in slabs), default=0)
    return Scratch(n_rows, like.shape[-1], accumulation_dtype(like.dtype), like.device)


def _forward_torch(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, out: dict[str, Tensor]
) -> None:
    slabs = _kept_slabs(mask, x[0])
    scratch = _scratch(slabs, x[0])
    for rows, _ in slabs:
        for layer in range(len(x)):
            a, b = scratch.load("x", x[layer][rows]), scratch.load("y", y[layer][rows])
            terms = scratch.room("terms", len(a))
            for name, left, right in (("xx", a, a), ("yy", b, b), ("xy", a, b)):
                if name in out:
                    torch.mul(left, right, out=terms)
                    torch.sum(terms, -1, out=out[name][layer, rows])
            if "difference_of_squares" in out:
                gap = torch.sub(a, b, out=scratch.room("gap", len(a)))
                torch.add(a, b, out=terms).mul_(gap)
                torch.sum(terms, -1, out=out["difference_of_squares"][layer, rows])
            if "dd" in out:
                torch.sub(a, b, out=terms).square_()
                torch.sum(terms, -1, out=out["dd"][layer, rows])
    if mask is not None:
        for moment in out.values():
            moment.masked_fill_(~mask, 0)


def _backward_torch(
    dx: list[Tensor],
    dy: list[Tensor],
    x: list[Tensor],
    y: list[Tensor],
    mask: Tensor | None,
    upstream: list[Tensor | None],
) -> None:
    slabs = _kept_slabs(mask, x[0])
    scratch = _scratch(slabs, x[0])
    on_gap, on_x, on_y, on_xy = _coefficients(upstream)
    ends = [0, *(end for rows, _ in slabs for end in (rows.start, rows.stop)), x[0].shape[0]]
    for start, stop in zip(ends[::2], ends[1::2], strict=True):
        if start < stop:
            for gradient in (*dx, *dy):
                gradient[start:stop].zero_()
    for rows, has_gaps in slabs:
        bits = _bits(mask[rows], x[0].dtype) if has_gaps and mask is not None else None
        for layer in range(len(x)):
            a, b = scratch.load("x", x[layer][rows]), scratch.load("y", y[layer][rows])
            for side, mine, other, on_mine in ((dx, a, b, on_x), (dy, b, a, on_y)):
                if not side:
                    continue
                target = side[layer][rows]
                is_wide = target.dtype == scratch.dtype
                made = target if is_wide else scratch.room("gradient", len(mine))
                factors = [
                    None if c is None else c[layer, rows, None] for c in (on_gap, on_mine, on_xy)
                ]
                _gradient(made, mine, other, factors)
                if not is_wide:
                    target.copy_(made)
                if bits is not None:
                    target.view(bits.dtype).bitwise_and_(bits)


def _bits(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a row's bits are masked with, all ones or none: zeroes the rows that do not count in one
    vectorised pass, whatever they hold."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    return mask.to(integers).neg_().unsqueeze(-1)


def _coefficients(upstream: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """What multiplies x - y, x in dx, y in dy, and the other side in both."""
    dd, xx, yy, xy, difference = upstream

    def doubled(square: Tensor | None, sign: int) -> Tensor | None:
        if difference is None:
            return None if square is None else 2 * square
        return 2 * sign * difference if square is None else 2 * (square + sign * difference)

    return None if dd is None else 2 * dd, doubled(xx, 1), doubled(yy, -1), xy


def _gradient(out: Tensor, mine: Tensor, other: Tensor, factors: Sequence[Tensor | None]) -> None:
    """out = on_gap (mine - other) + on_mine mine + on_other other, of the factors there are."""
    on_gap, *on_sides = factors
    if on_gap is not None:
        torch.sub(mine, other, out=out).mul_(on_gap)
    is_empty = on_gap is None
    for rows, factor in zip((mine, other), on_sides, strict=True):
        if factor is None:
            continue
        if is_empty:
            torch.mul(rows, factor, out=out)
        else:
            out.addcmul_(rows, factor)
        is_empty = False
    if is_empty:
        out.zero_()


def _address(layers: list[Tensor]) -> Tensor | None:
    """What a kernel takes for the matrices: the one there is, or a table of their addresses on the
    device."""
    if not layers:
        return None
    if len(layers) == 1:
        return layers[0]
    table = torch.tensor([t.data_ptr() for t in layers], dtype=torch.int64)
    if layers[0].device.type == "cpu":
        return table
    return table.pin_memory().to(layers[0].device, non_blocking=True)


def _meta(layers: list[Tensor]) -> dict[str, Any]:
    import triton
    import triton.language as tl

    dtypes = {
        torch.float32: tl.float32,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    return {
        "TABLE": len(layers) > 1,
        "DTYPE": dtypes[layers[0].dtype],
        "BLOCK": min(1024, max(128, triton.next_power_of_2(layers[0].shape[-1]))),
        "num_warps": warps(128, layers[0]),
    }


def _aligned(layers: list[Tensor]) -> list[Tensor]:
    """Copies of the layers that do not start at a 16-byte address: the table's loads promise
    that."""
    if len(layers) == 1:
        return layers
    if all(t.data_ptr() % 16 == 0 for t in layers):
        return layers
    return [t.clone(memory_format=torch.contiguous_format) for t in layers]  # one stride for all


def _forward_triton(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, out: dict[str, Tensor]
) -> None:
    from ..kernels.row_moments import row_moments_kernel

    if len(x) > 1 and capturing(x[0]):  # a replay would read a table that is long gone
        for layer in range(len(x)):
            of_layer = {name: moment[layer:][:1] for name, moment in out.items()}
            _forward_triton(x[layer:][:1], y[layer:][:1], mask, of_layer)
        return
    x, y = _aligned(x), _aligned(y)
    n_rows, hidden_size = x[0].shape
    with device_of(x[0]):
        row_moments_kernel[(n_rows, len(x))](
            _address(x),
            _address(y),
            mask,
            *(out.get(name) for name in MOMENTS),
            hidden_size,
            x[0].stride(0),
            y[0].stride(0),
            **_meta(x),
        )


def _backward_triton(
    dx: list[Tensor],
    dy: list[Tensor],
    x: list[Tensor],
    y: list[Tensor],
    mask: Tensor | None,
    upstream: list[Tensor | None],
) -> None:
    from ..kernels.row_moments import row_moments_backward_kernel

    if len(x) > 1 and capturing(x[0]):
        for layer in range(len(x)):
            dx_, dy_, x_, y_ = (layers[layer:][:1] for layers in (dx, dy, x, y))
            of_layer = [None if g is None else g[layer:][:1] for g in upstream]
            _backward_triton(dx_, dy_, x_, y_, mask, of_layer)
        return
    x, y = _aligned(x), _aligned(y)
    n_rows, hidden_size = x[0].shape
    with device_of(x[0]):
        row_moments_backward_kernel[(n_rows, len(x))](
            _address(dx),
            _address(dy),
            _address(x),
            _address(y),
            mask,
            *upstream,
            hidden_size,
            x[0].stride(0),
            y[0].stride(0),
            **_meta(x),
        )


def _empty_moments(x: list[Tensor], want: Sequence[str]) -> tuple[Tensor, ...]:
    """All outputs of the operator; those that nobody wants are empty."""
    dtype, shape = accumulation_dtype(x[0].dtype), (len(x), *x[0].shape[:-1])
    return tuple(x[0].new_empty(shape if name in want else 0, dtype=dtype) for name in MOMENTS)


def _forward(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, want: Sequence[str], triton: bool
) -> tuple[Tensor, ...]:
    moments = _empty_moments(x, want)
    if x[0].numel():
        flat = {
            name: moment.view(len(x), -1)
            for name, moment in zip(MOMENTS, moments, strict=True)
            if name in want
        }
        run = _forward_triton if triton else _forward_torch
        run(_matrices(x), _matrices(y), mask, flat)
    return moments


def _forward_fake(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, want: Sequence[str], triton: bool
) -> tuple[Tensor, ...]:
    return _empty_moments(x, want)


def _empty_grads(x: list[Tensor], need_x: bool, need_y: bool) -> tuple[list[Tensor], list[Tensor]]:
    def like() -> list[Tensor]:
        return [dense_like(t) for t in x]

    return like() if need_x else [], like() if need_y else []


def _backward_op(x: list[Tensor], y: list[Tensor], mask: Tensor | None, *rest: Any) -> list[Tensor]:
    *upstream, need_x, need_y, triton = rest
    dx, dy = _empty_grads(x, need_x, need_y)
    if x[0].numel():
        run = _backward_triton if triton else _backward_torch
        hidden_size = x[0].shape[-1]
        run(
            [t.view(-1, hidden_size) for t in dx],
            [t.view(-1, hidden_size) for t in dy],
            _matrices(x),
            _matrices(y),
            mask,
            [None if g is None else g.reshape(len(x), -1).contiguous() for g in upstream],
        )
    return dx + dy


def _backward_fake(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, *rest: Any
) -> list[Tensor]:
    dx, dy = _empty_grads(x, rest[-3], rest[-2])
    return dx + dy


_row_moments_backward = declare(
    "row_moments_backward(Tensor[] x, Tensor[] y, Tensor? mask, "
    + ", ".join(f"Tensor? on_{name}" for name in MOMENTS)
    + ", bool need_x, bool need_y, bool triton) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, mask, want, triton = inputs
    ctx.save_for_backward(*x, *y, mask)
    ctx.n_layers, ctx.want, ctx.triton = len(x), want, triton
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *layers, mask = ctx.saved_tensors
    x, y = layers[: ctx.n_layers], layers[ctx.n_layers :]
    need_x, need_y = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    nothing = [None] * ctx.n_layers
    upstream = tuple(
        grad if name in ctx.want else None for name, grad in zip(MOMENTS, upstream, strict=True)
    )
    if torch.is_grad_enabled():
        dx, dy = _twice_differentiable(x, y, mask, upstream)
    else:
        grads = _row_moments_backward(x, y, mask, *upstream, need_x, need_y, ctx.triton)
        dx, dy = grads[: len(x) * need_x], grads[len(x) * need_x :]
    return dx if need_x else nothing, dy if need_y else nothing, None, None, None


def _twice_differentiable(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, upstream: Sequence[Tensor | None]
) -> tuple[list[Tensor], list[Tensor]]:
    """The same gradients in torch operations that autograd can follow, for create_graph=True."""
    dx, dy = [], []
    for layer, (x_layer, y_layer) in enumerate(zip(x, y, strict=True)):
        counts = torch.ones((), dtype=torch.bool, device=x_layer.device)
        if mask is not None:
            counts = mask.view(x_layer.shape[:-1]).unsqueeze(-1)
        grads = row_moments_backward_reference(
            torch.where(counts, x_layer, 0.0),
            torch.where(counts, y_layer, 0.0),
            [None if g is None else g[layer] for g in upstream],
        )
        dx.append(torch.where(counts, grads[0], 0.0).to(x_layer.dtype))
        dy.append(torch.where(counts, grads[1], 0.0).to(y_layer.dtype))
    return dx, dy


_row_moments = declare(
    "row_moments(Tensor[] x, Tensor[] y, Tensor? mask, str[] want, bool triton) -> ("
    + ", ".join(f"Tensor {name}" for name in MOMENTS)
    + ")",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def row_moments(
    x: Tensor | Sequence[Tensor],
    y: Tensor | Sequence[Tensor],
    mask: Tensor | None = None,
    *,
    want: Sequence[str] = MOMENTS,
    impl: str = "auto",
) -> RowMoments:
    """Second moments over the last dimension of every pair of rows of `x` and `y`, in one read of
    each.

    Args:
        x: [..., D] hidden states (float32, bfloat16, float16; float64 through the torch path), or a
            list of L layers of that shape, which are not stacked.
        y: like x, same shape and dtype; gradients flow to either side.
        mask: [...] rows that count (nonzero); the others are not read, their moments and gradients
            are 0.
        want: names of RowMoments fields; by default all.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        RowMoments with the wanted fields, float32 (float64 for float64) tensors of shape
        x.shape[:-1]; [L, ...] for lists.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: dd = sum (x - y)^2, xx = sum x^2, yy = sum y^2, xy = sum x y,
    difference_of_squares = sum (x - y)(x + y).
    """
    want = check_want(want, MOMENTS)
    check_choice("impl", impl, IMPLS)
    single = isinstance(x, Tensor)
    for name, side in (("x", x), ("y", y)):
        if not isinstance(side, Tensor) and not isinstance(side, Sequence):
            kind = type(side).__name__
            raise TypeError(f"{name} must be a torch.Tensor or a list of layers: got {kind}")
    if single != isinstance(y, Tensor):
        kinds = f"{type(x).__name__} and {type(y).__name__}"
        raise TypeError(f"x and y must both be tensors or both lists of layers: got {kinds}")
    xs: list[Any] = [x] if single else list(x)
    ys: list[Any] = [y] if single else list(y)
    if not xs or len(xs) != len(ys):
        raise ValueError(
            f"x and y must hold the same number of layers: got {len(xs)} and {len(ys)}"
        )
    for layer, (x_layer, y_layer) in enumerate(zip(xs, ys, strict=True)):
        at = "" if single else f"[{layer}]"
        check_rows_alike(f"x{at}", x_layer, f"y{at}", y_layer)
        if x_layer.shape != xs[0].shape or x_layer.dtype != xs[0].dtype:
            raise ValueError(
                f"all layers must agree: x[0] is {tuple(xs[0].shape)} {xs[0].dtype}, "
                f"x{at} {tuple(x_layer.shape)} {x_layer.dtype}"
            )
    flags = None if mask is None else mask_rows(mask, xs[0])
    moments = _row_moments(xs, ys, flags, list(want), choose(impl, *xs, *ys))
    wanted: Any = [
        None if name not in want else moment[0] if single else moment
        for name, moment in zip(MOMENTS, moments, strict=True)
    ]
    return RowMoments(*wanted)
