"""Single operations of Triton, each in a kernel, for tests/test_interpreter.py to check.

The functions of two values are operations that `combine` takes as a constant.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def convert(x_ptr, out_ptr, BLOCK: tl.constexpr):
    """Loads in one type and stores in another."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes))


@triton.jit
def convert_explicitly(x_ptr, out_ptr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, x.to(tl.bfloat16, fp_downcast_rounding=ROUNDING))


@triton.jit
def combine(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr, OPERATION: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    y = tl.load(y_ptr + lanes)
    tl.store(out_ptr + lanes, OPERATION(x, y))


@triton.jit
def add(x, y):
    return x + y


@triton.jit
def subtract(x, y):
    return x - y


@triton.jit
def multiply(x, y):
    return x * y


@triton.jit
def divide(x, y):
    return x / y


@triton.jit
def floor_divide(x, y):
    return x // y


@triton.jit
def remainder(x, y):
    return x % y


@triton.jit
def wide_multiply(x, y):
    return x.to(tl.int64) * y


@triton.jit
def larger(x, y):
    return tl.maximum(x, y)


@triton.jit
def smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def larger_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def choose_first_if_larger(x, y):
    return tl.where(x > y, x, y)


@triton.jit
def is_less(x, y):
    return (x < y).to(tl.float32)


@triton.jit
def exponential(x, y):
    return tl.exp(x)


@triton.jit
def exponential_of_2(x, y):
    return tl.exp2(x)


@triton.jit
def logarithm(x, y):
    return tl.log(x)


@triton.jit
def square_root(x, y):
    return tl.sqrt(x)


@triton.jit
def magnitude(x, y):
    return tl.abs(x)


@triton.jit
def fused(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes)
    tl.store(out_ptr + lanes, tl.fma(x, tl.load(y_ptr + lanes), tl.load(z_ptr + lanes)))


@triton.jit
def masked(x_ptr, out_ptr, width, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + lanes, mask=lanes < width, other=OTHER)
    tl.store(out_ptr + lanes, x)


@triton.jit
def masked_without_other(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.load(x_ptr + lanes, mask=lanes < width))


@triton.jit
def running_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(out_ptr + lanes, tl.cumsum(tl.load(x_ptr + lanes), axis=0))


@triton.jit
def sum_in_a_loop(x_ptr, out_ptr, width, BLOCK: tl.constexpr):
    """Carries a value through a loop whose length is known only at run time."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        total += tl.load(x_ptr + start + lanes, mask=start + lanes < width, other=0.0)
    tl.store(out_ptr + lanes, total)


@triton.jit
def reduce_rows(x_ptr, sum_ptr, max_ptr, min_ptr, argmax_ptr, WIDTH: tl.constexpr):
    x = tl.load(x_ptr + tl.program_id(0) * WIDTH + tl.arange(0, WIDTH))
    row = tl.program_id(0) + tl.zeros([1], tl.int32)
    tl.store(sum_ptr + row, tl.sum(x, axis=-1, keep_dims=True))
    tl.store(max_ptr + row, tl.max(x, axis=-1, keep_dims=True))
    tl.store(min_ptr + tl.program_id(0), tl.min(x, axis=0))
    tl.store(argmax_ptr + tl.program_id(0), tl.argmax(x, axis=0))


@triton.jit
def keep_larger(value_a, place_a, value_b, place_b):
    take_b = value_b > value_a
    return tl.where(take_b, value_b, value_a), tl.where(take_b, place_b, place_a)


@triton.jit
def reduce_pairs(x_ptr, value_ptr, place_ptr, WIDTH: tl.constexpr):
    places = tl.arange(0, WIDTH)
    value, place = tl.reduce((tl.load(x_ptr + places), places), 0, keep_larger)
    tl.store(value_ptr, value)
    tl.store(place_ptr, place)


@triton.jit
def branch_on_scalars(labels_ptr, extra_ptr, out_ptr):
    """A branch at run time, one at compile time, and what the grid says."""
    row = tl.program_id(0)
    if tl.load(labels_ptr + row) >= 0:
        value = (row * 10 + tl.num_programs(0)).to(tl.float32)
        if extra_ptr is not None:
            value += tl.load(extra_ptr)
        tl.store(out_ptr + row, value)
