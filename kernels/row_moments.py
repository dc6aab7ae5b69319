"""Second moments of pairs of hidden rows x, y [N, D]: up to five sums per row in one read of each,
and their gradient. What is None is neither computed nor stored.

The squared distance is summed directly, never as xx + yy - 2 xy, and the difference of the squares
on its own: near x = y the usual forms lose every digit. Many layers share one launch through a
table of their addresses. Rows outside the mask are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def layer_pointer(pointer, layer, TABLE: tl.constexpr, DTYPE: tl.constexpr):
    """The layer's matrix: from a table of addresses, or the pointer itself where there is one
    layer."""
    if TABLE:
        address = tl.load(pointer + layer).to(tl.pointer_type(DTYPE))
        return tl.multiple_of(address, 16)
    else:
        return pointer


@triton.jit
def row_moments_kernel(
    x_ptr,  # [N, D], or a table of L addresses of such
    y_ptr,  # like x
    mask_ptr,  # [N] bool, or None: every row counts
    dd_ptr,  # [L, N] fp32 sum of (x - y)^2; like those below it, or None
    xx_ptr,  # [L, N] sum of x^2
    yy_ptr,  # [L, N] sum of y^2
    xy_ptr,  # [L, N] sum of x y
    difference_ptr,  # [L, N] sum of (x - y)(x + y)
    hidden_size,
    x_stride,
    y_stride,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    x_row = layer_pointer(x_ptr, layer, TABLE, DTYPE) + row * x_stride
    y_row = layer_pointer(y_ptr, layer, TABLE, DTYPE) + row * y_stride
    lanes = tl.arange(0, BLOCK)
    dd = tl.zeros([BLOCK], tl.float32)
    xx = tl.zeros([BLOCK], tl.float32)
    yy = tl.zeros([BLOCK], tl.float32)
    xy = tl.zeros([BLOCK], tl.float32)
    difference = tl.zeros([BLOCK], tl.float32)
    stop = hidden_size
    if mask_ptr is not None:
        stop = tl.where(tl.load(mask_ptr + row) != 0, hidden_size, 0)
    for block in range(0, stop, BLOCK):
        columns = block + lanes
        valid = columns < hidden_size
        x = tl.load(x_row + columns, mask=valid, other=0.0).to(tl.float32)
        y = tl.load(y_row + columns, mask=valid, other=0.0).to(tl.float32)
        gap = x - y
        if dd_ptr is not None:
            dd += gap * gap
        if xx_ptr is not None:
            xx += x * x
        if yy_ptr is not None:
            yy += y * y
        if xy_ptr is not None:
            xy += x * y
        if difference_ptr is not None:
            difference += gap * (x + y)
    out = layer.to(tl.int64) * tl.num_programs(0) + row
    if dd_ptr is not None:
        tl.store(dd_ptr + out, tl.sum(dd))
    if xx_ptr is not None:
        tl.store(xx_ptr + out, tl.sum(xx))
    if yy_ptr is not None:
        tl.store(yy_ptr + out, tl.sum(yy))
    if xy_ptr is not None:
        tl.store(xy_ptr + out, tl.sum(xy))
    if difference_ptr is not None:
        tl.store(difference_ptr + out, tl.sum(difference))


@triton.jit
def load_upstream(pointer, at):
    """A row's upstream gradient; 0 where that moment was not used."""
    if pointer is not None:
        return tl.load(pointer + at)
    else:
        return 0.0


@triton.jit
def row_moments_backward_kernel(
    dx_ptr,  # [N, D] contiguous, or a table of L addresses, or None
    dy_ptr,  # like dx
    x_ptr,  # as in row_moments_kernel
    y_ptr,
    mask_ptr,
    on_dd_ptr,  # [L, N] upstream gradients, each or None
    on_xx_ptr,
    on_yy_ptr,
    on_xy_ptr,
    on_difference_ptr,
    hidden_size,
    x_stride,
    y_stride,
    TABLE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1)
    at = layer.to(tl.int64) * tl.num_programs(0) + row
    x_row = layer_pointer(x_ptr, layer, TABLE, DTYPE) + row * x_stride
    y_row = layer_pointer(y_ptr, layer, TABLE, DTYPE) + row * y_stride
    # Outside the loop, lest every turn look its address up.
    dx_row = x_row
    dy_row = y_row
    if dx_ptr is not None:
        dx_row = layer_pointer(dx_ptr, layer, TABLE, DTYPE) + row * hidden_size
    if dy_ptr is not None:
        dy_row = layer_pointer(dy_ptr, layer, TABLE, DTYPE) + row * hidden_size
    on_dd = 2.0 * load_upstream(on_dd_ptr, at)
    on_xy = load_upstream(on_xy_ptr, at)
    on_difference = 2.0 * load_upstream(on_difference_ptr, at)
    on_x = 2.0 * load_upstream(on_xx_ptr, at) + on_difference
    on_y = 2.0 * load_upstream(on_yy_ptr, at) - on_difference
    lanes = tl.arange(0, BLOCK)
    visible = hidden_size
    if mask_ptr is not None:
        visible = tl.where(tl.load(mask_ptr + row) != 0, hidden_size, 0)
    for block in range(0, hidden_size, BLOCK):
        columns = block + lanes
        valid = columns < hidden_size
        if visible > 0:
            x = tl.load(x_row + columns, mask=valid, other=0.0).to(tl.float32)
            y = tl.load(y_row + columns, mask=valid, other=0.0).to(tl.float32)
            pull = on_dd * (x - y)
            if dx_ptr is not None:
                dx = pull + on_x * x + on_xy * y
                tl.store(dx_row + columns, dx.to(DTYPE), mask=valid)
            if dy_ptr is not None:
                dy = on_y * y + on_xy * x - pull
                tl.store(dy_row + columns, dy.to(DTYPE), mask=valid)
        else:
            zeros = tl.zeros([BLOCK], DTYPE)
            if dx_ptr is not None:
                tl.store(dx_row + columns, zeros, mask=valid)
            if dy_ptr is not None:
                tl.store(dy_row + columns, zeros, mask=valid)
