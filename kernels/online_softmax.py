"""What every softmax statistic shares: partial states that merge, and where in memory a row lies.

A partial state of a set of columns is (max, rest, ...): `rest` is the sum of exp(z - max) *without*
the maximal element, so that log1p(rest) and rest / (1 + rest) keep full relative accuracy as one
probability nears 1. A single column z is the state (z, 0); an empty set is (LOWEST, EMPTY), finite
so that no difference is -inf + inf, with a mass 1 + rest of 0. Two states merge by decaying the
loser to the maximum of the winner: columns, lanes and segments share that algebra.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # float32's lowest: the maximum of no columns
EMPTY = tl.constexpr(-1.0)  # the rest of no columns, or of columns that are all -inf


@triton.jit
def log1p(x):
    """log(1 + x) to a few ulp; libdevice's does not run in the interpreter."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def tanh(x):
    """tanh(x) to a few ulp: a series where 1 - exp(-2 |x|) would lose digits."""
    near = tl.where(tl.abs(x) < 0.25, x, 0.0)
    w = near * near
    tail = -17.0 / 315 + w * (62.0 / 2835 - w * (1382.0 / 155925))
    series = near + near * w * (-1.0 / 3 + w * (2.0 / 15 + w * tail))
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -far, far))


@triton.jit
def cap_logits(u, valid, softcap, logit_scale):
    """Logits of a head's product u: logit_scale * softcap * tanh(u / softcap); without the part
    that is None. Lanes that are not valid hold -inf."""
    if softcap is not None:
        u = softcap * tanh(u / softcap)
    if logit_scale is not None:
        u = u * logit_scale
    if softcap is not None or logit_scale is not None:
        u = tl.where(valid, u, float("-inf"))
    return u


@triton.jit
def cap_gradient(dz, u, softcap, logit_scale):
    """The gradient of u from that of the logits. The slope 4 e / (1 + e)^2 stays above 0 long after
    1 - tanh^2 has become 0."""
    if softcap is not None:
        e = tl.exp(-2.0 * tl.abs(u / softcap))
        dz = dz * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    if logit_scale is not None:
        dz = dz * logit_scale
    return dz


@triton.jit
def plain_exp(x):
    """exp(x) by Triton's own means: any back-end, and the interpreter."""
    return tl.exp(x)


@triton.jit
def flushed_exp(x):
    """exp(x) on CUDA, flushed to 0 below 1e-38: without the instructions by which Triton's own
    serves the denormal range, which a sum next to 1 never sees."""
    return tl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        [x * 1.4426950408889634],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def gap_and_decay(a, b, EXP: tl.constexpr):
    """-|a - b| and its exponential; EXP is one of the two functions above."""
    gap = -tl.abs(a - b)
    return gap, EXP(gap)


@triton.jit
def decayed_gap(decay, gap):
    """decay * gap, where a gap of -inf counts nothing."""
    return decay * tl.maximum(gap, LOWEST)


@triton.jit
def merge_rest(a_wins, decay, rest_a, rest_b):
    """The winner keeps its rest; the loser adds all its mass, its own maximum included."""
    return tl.where(a_wins, rest_a + decay * (1.0 + rest_b), rest_b + decay * (1.0 + rest_a))


@triton.jit
def add_to_rest(a_wins, decay, rest):
    """`merge_rest` with a single column: rest + decay, or decay * rest + decay where that wins."""
    return tl.where(a_wins, 1.0, decay) * rest + decay


@triton.jit
def weighted_gap(weight, gap):
    """weight * gap, and 0 where the weight is 0 although the gap is infinite."""
    return weight * tl.where(weight == 0.0, 0.0, gap)


@triton.jit
def first_maximum(maxima, order):
    """The maximum over the last axis, and a mask of the one lane that holds it first by `order`."""
    top = tl.max(maxima, axis=-1, keep_dims=True)
    first = tl.min(tl.where(maxima == top, order, 2147483647), axis=-1, keep_dims=True)
    return top, (maxima == top) & (order == first)


@triton.jit
def collapse_rest(is_first, decay, rest):
    """The rest of all lanes together: only the first maximum stays out of the sum."""
    return tl.sum(tl.where(is_first, rest, decay * (1.0 + rest)), axis=-1, keep_dims=True)


@triton.jit
def finish(top, rest):
    """The row's maximum, rest and lse; without a finite maximum no probability is defined."""
    top = tl.where(rest == EMPTY, float("-inf"), top)
    endless = tl.abs(top) == float("inf")
    rest = tl.where(endless, float("nan"), rest)
    return top, rest, tl.where(endless, top, top + log1p(rest))


@triton.jit
def put(pointer, out, value, counts):
    """Stores a row's fact where it is wanted; those that do not count hold 0."""
    if pointer is not None:
        tl.store(pointer + out, tl.where(counts, value, 0))


@triton.jit
def row_offset(row, inner_size, outer_stride, inner_stride):
    """Offset of a row (int64) where rows step by two strides: [B, S, V] views without a copy."""
    return row // inner_size * outer_stride + row % inner_size * inner_stride


@triton.jit
def edge_columns(lanes, shift, vocab_size, VEC: tl.constexpr):
    """The columns that no whole aligned vector covers: at most VEC at either end of the row.

    Positions count from the aligned address at or below the row's start, `shift` elements before.
    Returns positions and their validity; only the first 2 * VEC lanes are ever valid.
    """
    end = shift + vocab_size
    head_end = tl.where(shift > 0, tl.minimum(end, VEC), 0)
    tail_start = tl.maximum(end // VEC * VEC, head_end)
    positions = tl.where(lanes < VEC, lanes, tail_start + lanes - VEC)
    in_head = (lanes < VEC) & (lanes >= shift) & (lanes < head_end)
    in_tail = (lanes >= VEC) & (lanes < 2 * VEC) & (positions < end)
    return positions, in_head | in_tail


@triton.jit
def whole_vectors(shift, vocab_size, VEC: tl.constexpr):
    """First and last position of the row's whole aligned vectors.

    Both are multiples of VEC: a mask made of them is constant over a vector, and loads stay
    16 bytes wide whatever the vocabulary's size.
    """
    start = tl.where(shift > 0, VEC, 0)
    end = (shift + vocab_size) // VEC * VEC
    return tl.multiple_of(start, VEC), tl.multiple_of(end, VEC)
