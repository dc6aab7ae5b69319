"""row_moments: the five sums over a pair of hidden rows that every hidden-state loss is made of.

In this order: the result type, the reference (the definition, and the CPU path), the Triton
launchers, the operators, the gradient, the public function.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import check_choice, check_rows_alike
from ._declare import declare
from ._launch import (
    IMPLS,
    accumulation_dtype,
    capturing,
    choose,
    dense_like,
    device_of,
    slabs,
    warps,
)
from .vocab_stats import mask_rows


class RowMoments(NamedTuple):
    """Sums over D of each pair of rows, shape `x.shape[:-1]`, with the layers in front where there
    are several:

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


def row_moments_reference(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The definition, for x, y [n, D]."""
    x, y = (t.to(accumulation_dtype(t.dtype)) for t in (x, y))
    gap = x - y
    return tuple((a * b).sum(-1) for a, b in ((gap, gap), (x, x), (y, y), (x, y), (gap, x + y)))


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


def _kept(mask: Tensor | None, n_rows: int) -> tuple[int, Tensor | None]:
    if mask is None or mask.all():
        return n_rows, None
    kept = mask.nonzero().squeeze(-1)
    return kept.shape[0], kept


def _forward_torch(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, out: list[Tensor]
) -> None:
    n_rows, kept = _kept(mask, x[0].shape[0])
    for slab in slabs(n_rows, x[0].shape[-1]):
        rows = slab if kept is None else kept[slab]
        for layer, (x_layer, y_layer) in enumerate(zip(x, y, strict=True)):
            moments = row_moments_reference(x_layer[rows], y_layer[rows])
            for target, moment in zip(out, moments, strict=True):
                target[layer, rows] = moment


def _backward_torch(
    dx: list[Tensor],
    dy: list[Tensor],
    x: list[Tensor],
    y: list[Tensor],
    mask: Tensor | None,
    upstream: list[Tensor | None],
) -> None:
    n_rows, kept = _kept(mask, x[0].shape[0])
    for slab in slabs(n_rows, x[0].shape[-1]):
        rows = slab if kept is None else kept[slab]
        for layer in range(len(x)):
            grads = row_moments_backward_reference(
                x[layer][rows],
                y[layer][rows],
                [None if g is None else g[layer, rows] for g in upstream],
            )
            for target, grad in zip((dx, dy), grads, strict=True):
                if target:
                    target[layer][rows] = grad.to(target[layer].dtype)


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
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, out: list[Tensor]
) -> None:
    from ..kernels.row_moments import row_moments_kernel

    if len(x) > 1 and capturing(x[0]):  # a replay would read a table that is long gone
        for layer in range(len(x)):
            _forward_triton(x[layer:][:1], y[layer:][:1], mask, [t[layer:][:1] for t in out])
        return
    x, y = _aligned(x), _aligned(y)
    n_rows, hidden_size = x[0].shape
    with device_of(x[0]):
        row_moments_kernel[(n_rows, len(x))](
            _address(x),
            _address(y),
            mask,
            *out,
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


def _forward(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, triton: bool
) -> tuple[Tensor, ...]:
    out = _forward_fake(x, y, mask, triton)
    if not triton and mask is not None:
        for moment in out:
            moment.zero_()
    if out[0].numel():
        run = _forward_triton if triton else _forward_torch
        run(_matrices(x), _matrices(y), mask, [t.view(len(x), -1) for t in out])
    return out


def _forward_fake(
    x: list[Tensor], y: list[Tensor], mask: Tensor | None, triton: bool
) -> tuple[Tensor, ...]:
    shape = (len(x), *x[0].shape[:-1])
    dtype = accumulation_dtype(x[0].dtype)
    return tuple(x[0].new_empty(shape, dtype=dtype) for _ in MOMENTS)


def _empty_grads(x: list[Tensor], need_x: bool, need_y: bool) -> tuple[list[Tensor], list[Tensor]]:
    def like() -> list[Tensor]:
        return [dense_like(t) for t in x]

    return like() if need_x else [], like() if need_y else []


def _backward_op(x: list[Tensor], y: list[Tensor], mask: Tensor | None, *rest: Any) -> list[Tensor]:
    *upstream, need_x, need_y, triton = rest
    dx, dy = _empty_grads(x, need_x, need_y)
    if x[0].numel():
        if not triton and mask is not None:
            for grad in (*dx, *dy):
                grad.zero_()
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
    x, y, mask, triton = inputs
    ctx.save_for_backward(*x, *y, mask)
    ctx.n_layers, ctx.triton = len(x), triton
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Any, ...]:
    *layers, mask = ctx.saved_tensors
    x, y = layers[: ctx.n_layers], layers[ctx.n_layers :]
    need_x, need_y = any(ctx.needs_input_grad[0]), any(ctx.needs_input_grad[1])
    nothing = [None] * ctx.n_layers
    if torch.is_grad_enabled():
        dx, dy = _twice_differentiable(x, y, mask, upstream)
    else:
        grads = _row_moments_backward(x, y, mask, *upstream, need_x, need_y, ctx.triton)
        dx, dy = grads[: len(x) * need_x], grads[len(x) * need_x :]
    return dx if need_x else nothing, dy if need_y else nothing, None, None


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
    "row_moments(Tensor[] x, Tensor[] y, Tensor? mask, bool triton) -> ("
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
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        RowMoments of float32 (float64 for float64) tensors of shape x.shape[:-1]; [L, ...] for
        lists.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: dd = sum (x - y)^2, xx = sum x^2, yy = sum y^2, xy = sum x y,
    difference_of_squares = sum (x - y)(x + y).
    """
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
    moments = _row_moments(xs, ys, flags, choose(impl, *xs, *ys))
    return RowMoments(*(m[0] for m in moments)) if single else RowMoments(*moments)
