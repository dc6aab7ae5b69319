"""Small kernels for the tests of the tools: each is right, or wrong in one known way.

They imitate the mistakes that kernels over rows of a vocabulary make: a label out of range, a tail
without a mask, a row stride taken for the width, programs that share an address.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy_rows(x_ptr, out_ptr, row_stride, out_stride, width, BLOCK: tl.constexpr):
    """Right: copies each row, whatever the strides."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = columns < width
        x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
        tl.store(out_ptr + row * out_stride + columns, x, mask=inside)


@triton.jit
def copy_rows_in_int32(x_ptr, out_ptr, row_stride, out_stride, width, BLOCK: tl.constexpr):
    """Wrong from row 2 on when the stride is 2^30: the product wraps."""
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row.to(tl.int64) * out_stride + columns, x, mask=inside)


@triton.jit
def copy_without_load_mask(x_ptr, out_ptr, row_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + columns)
    tl.store(out_ptr + row * out_stride + columns, x, mask=columns < width)


@triton.jit
def copy_without_store_mask(x_ptr, out_ptr, row_stride, out_stride, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * row_stride + columns, mask=columns < width, other=0.0)
    tl.store(out_ptr + row * out_stride + columns, x)


@triton.jit
def pick_label(x_ptr, labels_ptr, out_ptr, row_stride):
    """Reads one entry a row by scalar loads, and believes the label."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    tl.store(out_ptr + row, tl.load(x_ptr + row * row_stride + label).to(tl.float32))


@triton.jit
def sum_rows_through_table(table_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Reads each row through an address that a table of int64 holds."""
    row = tl.program_id(0)
    x_ptr = tl.load(table_ptr + row).to(tl.pointer_type(tl.float32))
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + columns, mask=columns < width, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@triton.jit
def write_one_place(out_ptr):
    tl.store(out_ptr, tl.program_id(0).to(tl.float32))


@triton.jit
def read_neighbour(out_ptr):
    """Each program reads what the next one writes."""
    row = tl.program_id(0)
    tl.store(out_ptr + row, tl.load(out_ptr + row + 1) + 1.0)


@triton.jit
def add_atomically(out_ptr):
    tl.atomic_add(out_ptr, 1.0)


@triton.jit
def write_then_read(out_ptr, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """A thread may read what another thread of its program has yet to write."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, lanes.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    tl.store(out_ptr + BLOCK + lanes, tl.load(out_ptr + BLOCK - 1 - lanes))


@triton.jit
def write_lanes_to_one_place(out_ptr, step, BLOCK: tl.constexpr):
    """Harmless only when all lanes write the same: with a step of 0."""
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes * 0, (lanes * step).to(tl.float32))


@triton.jit
def partial_sums(x_ptr, partial_ptr, width, SEGMENT: tl.constexpr):
    """First of two launches: one partial sum a segment."""
    row = tl.program_id(0)
    segment = tl.program_id(1)
    columns = segment * SEGMENT + tl.arange(0, SEGMENT)
    x = tl.load(x_ptr + row * width + columns, mask=columns < width, other=0.0)
    tl.store(partial_ptr + row * tl.num_programs(1) + segment, tl.sum(x, axis=0))


@triton.jit
def merge_sums(partial_ptr, out_ptr, SEGMENTS: tl.constexpr):
    """Second launch: reads what other programs of the first one wrote."""
    row = tl.program_id(0)
    partial = tl.load(partial_ptr + row * SEGMENTS + tl.arange(0, SEGMENTS))
    tl.store(out_ptr + row, tl.sum(partial, axis=0))


@triton.jit
def load_without_other(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out_ptr + columns, tl.load(x_ptr + columns, mask=columns < width))


# ---------------------------------------------------------------- for compiling ahead of time


@triton.jit
def sum_rows(x_ptr, out_ptr, row_stride, width, BLOCK: tl.constexpr):
    """16-byte loads only when row_stride and width are known to be multiples of 16."""
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * row_stride + columns, mask=columns < width, other=0.0)
        total += x.to(tl.float32)
    tl.store(out_ptr + row, tl.sum(total, axis=0))


@triton.jit
def double(x):
    return x + x


@triton.jit
def map_row_blocks(x_ptr, scale_ptr, out_ptr, n_rows, row_stride, width, FUNCTION: tl.constexpr):
    """A loop in a loop, an optional pointer, and a function as a constant."""
    for row in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        for start in range(0, width, 1024):
            columns = start + tl.arange(0, 1024)
            inside = columns < width
            x = tl.load(x_ptr + row * row_stride + columns, mask=inside, other=0.0)
            if scale_ptr is not None:
                x = x * tl.load(scale_ptr)
            tl.store(out_ptr + row * row_stride + columns, FUNCTION(x), mask=inside)


@triton.jit
def needs_too_many_registers(x_ptr, out_ptr, turns, BLOCK: tl.constexpr):
    """Two blocks of live values: no thread has registers for them when the block is large."""
    lanes = tl.arange(0, BLOCK)
    a = tl.load(x_ptr + lanes)
    b = tl.load(x_ptr + BLOCK + lanes)
    for turn in range(turns):
        a = a * b + turn
        b = b * a + turn
    tl.store(out_ptr + lanes, a * b)
