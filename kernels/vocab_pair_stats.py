"""Pairs of rows: logits z [K, N, V] against targets t [N, V], each target shared by K rows.

With d = (z - t) - c, c that difference at the target's likeliest column, KL(q || p) is
E_q[expm1(d) - d] - (y - log1p(y)), y = E_q[expm1(d)]: one pass, and accurate as p nears q. (Far
from q, cross-entropy minus entropy serves better.) c moves whenever a larger target logit turns up,
and the sums move with it. Jensen-Shannon needs both normalisers first: a second read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online_softmax import (
    EMPTY,
    LOWEST,
    add_to_rest,
    collapse_rest,
    decayed_gap,
    edge_columns,
    finish,
    first_maximum,
    gap_and_decay,
    log1p,
    plain_exp,
    put,
    row_offset,
    whole_vectors,
)

COUNTS = ("n_rows", "inner_size")  # change from batch to batch: no reason to compile anew
PARTS = tl.constexpr(14)  # numbers of a partial state
NEAR_ORIGIN = tl.constexpr(1.0)  # maxima this close: the two rows' logits may be subtracted
FAR_ORIGIN = tl.constexpr(32.0)  # beyond it their differences hold too few digits for a sum
FAR = tl.constexpr(0.3)  # beyond this bend the direct form of a divergence is the more accurate one


@triton.jit
def bend_and_growth(x):
    """expm1(x) - x and expm1(x) to full relative accuracy, x up to 80: exp overflows soon after."""
    x = tl.minimum(x, 80.0)
    e = tl.exp(x)
    small = tl.abs(x) < 0.25
    s = tl.where(small, x, 0.0)  # the series alone, whose powers of a large x would overflow
    series = s * s * (0.5 + s * (1 / 6 + s * (1 / 24 + s * (1 / 120 + s * (1 / 720 + s / 5040)))))
    return tl.where(small, series, e - 1.0 - x), tl.where(small, series + x, e - 1.0)


@triton.jit
def log_bend_of(y):
    """y - log1p(y) to full relative accuracy, y > -1."""
    w = y / (2.0 + y)
    v = w * w
    series = y * w - 2.0 * w * v * (1 / 3 + v * (1 / 5 + v * (1 / 7 + v * (1 / 9 + v / 11))))
    safe = tl.maximum(y, -0.9999999)
    return tl.where(tl.abs(y) < 0.5, series, safe - tl.log(1.0 + safe))


@triton.jit
def scaled_lift(scale, mass, cross, lift):
    """scale * (cross + mass * lift): a lifted sum of weighted gaps, in which no weight means no
    gap."""
    dead = scale == 0.0
    return scale * (tl.where(dead, 0.0, cross) + mass * tl.where(dead, 0.0, lift))


@triton.jit
def fold_direction(
    stays,
    gap,
    decay,
    rest,
    heat,
    cross,
    lift_old,
    lift_new,
    near,
    drift,
    centre,
    x,
    KL: tl.constexpr,
):
    """Adds one column to the sums weighted by one side's softmax; without KL only to `cross`.

    heat: sum of e * (own logit - own top); cross: sum of e * (other top - other logit);
    near, drift: sums of e * (expm1(d) - d) and e * d, d = x - centre; x: other logit - own logit.
    """
    old_scale = tl.where(stays, 1.0, decay)
    new_scale = tl.where(stays, decay, 1.0)
    mass = 1.0 + rest
    cross = scaled_lift(old_scale, mass, cross, lift_old) + scaled_lift(
        new_scale, 1.0, 0.0, lift_new
    )
    if KL:
        warmth = decayed_gap(decay, gap)
        heat = tl.where(stays, heat + warmth, decay * heat + mass * warmth)
        step = x - centre
        shift = tl.where(stays, step, -step)
        bend, grow = bend_and_growth(shift)
        moved = decay * ((1.0 + grow) * near + grow * drift + bend * mass)
        near = tl.where(stays, near + decay * bend, moved)
        drift = tl.where(stays, drift + decay * shift, decay * (drift + shift * mass))
        centre = tl.where(stays, centre, x)
    return heat, cross, near, drift, centre


@triton.jit
def collapse_direction(
    is_first, gap, decay, rest, heat, cross, lift, near, drift, centre, KL: tl.constexpr
):
    """Merges the lanes of one direction into one state."""
    mass = 1.0 + rest
    cross = tl.sum(scaled_lift(decay, mass, cross, lift), axis=-1, keep_dims=True)
    if KL:
        heat = decay * heat + tl.where(is_first, 0.0, mass * decayed_gap(decay, gap))
        heat = tl.sum(heat, axis=-1, keep_dims=True)
        middle = tl.sum(tl.where(is_first, centre, 0.0), axis=-1, keep_dims=True)
        shift = centre - middle
        bend, grow = bend_and_growth(shift)
        near = decay * ((1.0 + grow) * near + grow * drift + bend * mass)
        near = tl.sum(near, axis=-1, keep_dims=True)
        drift = tl.sum(decay * (drift + shift * mass), axis=-1, keep_dims=True)
        centre = middle
    return heat, cross, near, drift, centre


@triton.jit
def divergence(near, drift, cross, heat, rest, rest_other, offset):
    """The KL divergence from one direction's sums.

    `rest` is the weighing side's, `offset` the distance of the two rows' maxima.
    """
    mass = 1.0 + rest
    bend = near / mass
    y = bend + drift / mass
    # The cross-entropy less the entropy, each without a difference of large numbers of its own.
    scale = log1p(rest_other) + cross / mass
    entropy = log1p(rest) - heat / mass
    direct = scale - entropy
    is_near = (bend < FAR) & (tl.abs(y) < 0.5) & (tl.abs(offset) <= FAR_ORIGIN)
    bent = bend - log_bend_of(tl.where(is_near, y, 0.0))
    # Where a column's exponential overflowed the two disagree by more than `direct` can be wrong.
    agree = (direct < 0.5) & (tl.abs(bent - direct) <= 2e-6 * (scale + entropy))
    kl = tl.where(is_near & agree, bent, direct)
    return tl.where(kl < 0.0, 0.0, kl)  # rounding alone makes it negative


@triton.jit
def mass_ratio(near, drift, centre, rest, apart, offset):
    """The logarithm of what the other side's exponentials sum to over this one's. `apart`: the same
    from both rows' own sums, which have rounded."""
    mass = 1.0 + rest
    bend = near / mass
    y = bend + drift / mass
    is_near = (bend < FAR) & (tl.abs(y) < 0.5) & (tl.abs(offset) <= FAR_ORIGIN)
    return tl.where(is_near, centre + log1p(tl.where(is_near, y, 0.0)), apart)


@triton.jit
def pair_counts(mask_ptr, at, inside):
    """Which of these pairs of rows are wanted."""
    if mask_ptr is not None:
        return tl.load(mask_ptr + at, mask=inside, other=0) != 0
    else:
        return inside


@triton.jit
def put_part(partials_ptr, out, index: tl.constexpr, value, counts):
    """Stores one number of every partial state."""
    tl.store(partials_ptr + out * PARTS + index, value, mask=counts)


@triton.jit(do_not_specialize=COUNTS)
def vocab_pair_stats_kernel(
    logits_ptr,  # [K, N, V], 16-byte aligned; row 0 starts logits_shift elements later
    target_ptr,  # [N, V] logits or probabilities, likewise
    mask_ptr,  # [K, N] bool, or None: every pair counts
    partials_ptr,  # [K, N, S, PARTS] fp32: see the stores at the end
    n_pairs,  # K
    n_rows,  # N
    vocab_size,
    inner_size,  # either side's rows step by two strides: see row_offset
    logits_pair_stride,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    PROBS: tl.constexpr,  # the target holds probabilities
    CROSS: tl.constexpr,  # cross-entropy is wanted
    KL: tl.constexpr,  # KL(q || p) is wanted
    REVERSE_KL: tl.constexpr,  # KL(p || q) is wanted
    EXP: tl.constexpr,  # plain_exp or flushed_exp
    VEC: tl.constexpr,  # 1 where the rows of the two sides are not equally far from alignment
    SEGMENT: tl.constexpr,
    PAIRS: tl.constexpr,  # rows of logits a program holds, a power of two
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    pairs = (tl.program_id(2) * PAIRS + tl.arange(0, PAIRS)[:, None]).to(tl.int64)
    at = pairs * n_rows + row
    counts = pair_counts(mask_ptr, at, pairs < n_pairs)
    any_counts = tl.max(counts.to(tl.int32)) > 0

    t_start = target_shift + row_offset(row, inner_size, target_outer_stride, target_inner_stride)
    z_start = logits_shift + row_offset(row, inner_size, logits_outer_stride, logits_inner_stride)
    z_start = z_start + pairs * logits_pair_stride
    shift = (t_start % VEC).to(tl.int32)
    t_row = target_ptr + t_start // VEC * VEC
    z_row = logits_ptr + z_start // VEC * VEC
    first, last = whole_vectors(shift, vocab_size, VEC)
    stop = tl.where(any_counts, tl.minimum((segment + 1) * SEGMENT, last), 0)
    lanes = tl.arange(0, BLOCK)[None, :]

    zeros = tl.zeros([PAIRS, BLOCK], tl.float32)
    top = zeros + LOWEST
    rest = zeros + EMPTY
    t_top = tl.full([1, BLOCK], LOWEST, tl.float32)
    t_rest = tl.full([1, BLOCK], 0.0 if PROBS else EMPTY, tl.float32)  # of probabilities: their sum
    t_heat = zeros
    t_cross = zeros
    t_near = zeros
    t_drift = zeros
    t_centre = zeros
    heat = zeros
    cross = zeros
    near = zeros
    drift = zeros
    centre = zeros

    for block in range(segment * SEGMENT, stop, BLOCK):
        positions = block + lanes
        valid = (positions >= first) & (positions < last)
        z = tl.load(z_row + positions, mask=valid & counts, other=float("-inf")).to(tl.float32)
        z = tl.where(counts, z, 0.0)  # finite sums for pairs that nobody stores
        nothing = 0.0 if PROBS else float("-inf")
        t = tl.load(t_row + positions, mask=valid, other=nothing).to(tl.float32)
        stays = top >= z
        gap, decay = gap_and_decay(top, z, EXP)
        new_top = tl.maximum(top, z)
        if PROBS:
            weighed = scaled_lift(t, 1.0, 0.0, new_top - z)
            t_cross += scaled_lift(t_rest, 1.0, 0.0, new_top - top) + weighed
            t_rest += t
        else:
            t_stays = t_top >= t
            t_gap, t_decay = gap_and_decay(t_top, t, EXP)
            new_t_top = tl.maximum(t_top, t)
            x = tl.maximum(z, LOWEST) - tl.maximum(t, LOWEST)
            x = tl.minimum(tl.maximum(x, -1e15), 1e15)
            if CROSS or KL:
                t_heat, t_cross, t_near, t_drift, t_centre = fold_direction(
                    t_stays, t_gap, t_decay, t_rest, t_heat, t_cross,
                    new_top - top, new_top - z, t_near, t_drift, t_centre, x, KL,
                )  # fmt: skip
            if REVERSE_KL:
                heat, cross, near, drift, centre = fold_direction(
                    stays, gap, decay, rest, heat, cross,
                    new_t_top - t_top, new_t_top - t, near, drift, centre, -x, REVERSE_KL,
                )  # fmt: skip
            t_rest = add_to_rest(t_stays, t_decay, t_rest)
            t_top = new_t_top
        rest = add_to_rest(stays, decay, rest)
        top = new_top

    t_top += zeros
    t_rest += zeros
    (
        top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre,
    ) = collapse_pair(
        lanes, top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre, PROBS, CROSS, KL, REVERSE_KL,
    )  # fmt: skip
    out = at * tl.num_programs(1) + segment
    put_part(partials_ptr, out, 0, top, counts)
    put_part(partials_ptr, out, 1, rest, counts)
    put_part(partials_ptr, out, 2, t_top, counts)
    put_part(partials_ptr, out, 3, t_rest, counts)
    if CROSS or KL:
        put_part(partials_ptr, out, 4, t_cross, counts)
    if KL:
        put_part(partials_ptr, out, 5, t_heat, counts)
        put_part(partials_ptr, out, 6, t_near, counts)
        put_part(partials_ptr, out, 7, t_drift, counts)
        put_part(partials_ptr, out, 8, t_centre, counts)
    if REVERSE_KL:
        put_part(partials_ptr, out, 9, cross, counts)
        put_part(partials_ptr, out, 10, heat, counts)
        put_part(partials_ptr, out, 11, near, counts)
        put_part(partials_ptr, out, 12, drift, counts)
        put_part(partials_ptr, out, 13, centre, counts)


@triton.jit
def collapse_pair(
    order, top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
    heat, cross, near, drift, centre,
    PROBS: tl.constexpr, CROSS: tl.constexpr, KL: tl.constexpr, REVERSE_KL: tl.constexpr,
):  # fmt: skip
    """Merges the lanes' states [PAIRS, lanes] into one [PAIRS, 1]."""
    order = order + tl.zeros_like(top).to(tl.int32)
    summit, is_first = first_maximum(top, order)
    gap, decay = gap_and_decay(summit, top, plain_exp)
    if PROBS:
        t_cross += scaled_lift(t_rest, 1.0, 0.0, summit - top)
        t_cross = tl.sum(t_cross, axis=-1, keep_dims=True)
        t_rest = tl.sum(t_rest, axis=-1, keep_dims=True)
        t_top = summit
    else:
        t_summit, t_is_first = first_maximum(t_top, order)
        t_gap, t_decay = gap_and_decay(t_summit, t_top, plain_exp)
        if CROSS or KL:
            t_heat, t_cross, t_near, t_drift, t_centre = collapse_direction(
                t_is_first, t_gap, t_decay, t_rest, t_heat, t_cross, summit - top,
                t_near, t_drift, t_centre, KL,
            )  # fmt: skip
        if REVERSE_KL:
            heat, cross, near, drift, centre = collapse_direction(
                is_first, gap, decay, rest, heat, cross, t_summit - t_top,
                near, drift, centre, REVERSE_KL,
            )  # fmt: skip
        t_rest = collapse_rest(t_is_first, t_decay, t_rest)
        t_top = t_summit
    rest = collapse_rest(is_first, decay, rest)
    return (
        summit, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre,
    )  # fmt: skip


@triton.jit
def load_part(partials_ptr, partial, index: tl.constexpr, is_segment, empty):
    """One number of every segment's partial state."""
    return tl.load(partials_ptr + partial * PARTS + index, mask=is_segment, other=empty)


@triton.jit(do_not_specialize=COUNTS)
def vocab_pair_stats_merge_kernel(
    logits_ptr,  # as in vocab_pair_stats_kernel
    target_ptr,
    mask_ptr,
    partials_ptr,
    row_max_ptr,  # [K, N] fp32, kept for the backward: of the logits
    row_rest_ptr,
    target_max_ptr,  # [K, N] of the target; for probabilities nothing and their sum
    target_rest_ptr,
    cross_entropy_out,  # [K, N] fp32 facts, each or None
    kl_out,
    reverse_kl_out,
    lse_out,
    target_lse_out,
    log_ratio_out,  # [K, N] fp32 or None: log(sum of exp(logits) / sum of exp(target))
    n_segments,
    n_pairs,
    n_rows,
    vocab_size,
    inner_size,
    logits_pair_stride,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    PROBS: tl.constexpr,
    CROSS: tl.constexpr,
    KL: tl.constexpr,
    REVERSE_KL: tl.constexpr,
    VEC: tl.constexpr,
    LANES: tl.constexpr,  # at least n_segments + 2 * VEC
):
    row = tl.program_id(0).to(tl.int64) % n_rows  # one axis: the others end at 65,535
    pair = tl.program_id(0).to(tl.int64) // n_rows
    out = pair * n_rows + row + tl.zeros([1, 1], tl.int32)
    counts = pair_counts(mask_ptr, out, out >= 0)
    n_visible = tl.max(tl.where(counts, n_segments, 0))
    visible = tl.max(tl.where(counts, vocab_size, 0))
    t_start = target_shift + row_offset(row, inner_size, target_outer_stride, target_inner_stride)
    z_start = logits_shift + row_offset(row, inner_size, logits_outer_stride, logits_inner_stride)
    z_start += pair * logits_pair_stride
    shift = (t_start % VEC).to(tl.int32)
    lanes = tl.arange(0, LANES)[None, :]
    is_segment = lanes < n_visible
    positions, is_edge = edge_columns(lanes - n_segments, shift, visible, VEC)
    columns = positions - shift
    z = tl.load(logits_ptr + z_start + columns, mask=is_edge, other=float("-inf")).to(tl.float32)
    nothing = 0.0 if PROBS else float("-inf")
    t = tl.load(target_ptr + t_start + columns, mask=is_edge, other=nothing).to(tl.float32)

    partial = (pair * n_rows + row) * n_segments + lanes
    top = load_part(partials_ptr, partial, 0, is_segment, LOWEST)
    top = tl.maximum(top, z)
    rest = load_part(partials_ptr, partial, 1, is_segment, EMPTY)
    rest = tl.where(is_edge & (z != float("-inf")), 0.0, rest)
    t_top = load_part(partials_ptr, partial, 2, is_segment, LOWEST)
    t_rest = load_part(partials_ptr, partial, 3, is_segment, 0.0 if PROBS else EMPTY)
    if not PROBS:
        t_rest = tl.where(is_edge & (t != float("-inf")), 0.0, t_rest)
    zeros = tl.zeros([1, LANES], tl.float32)
    t_cross = zeros
    t_heat = zeros
    t_near = zeros
    t_drift = zeros
    t_centre = zeros
    heat = zeros
    cross = zeros
    near = zeros
    drift = zeros
    centre = zeros
    if CROSS or KL:
        t_cross = load_part(partials_ptr, partial, 4, is_segment, 0.0)
    if PROBS:
        t_rest += t
        t_cross += tl.where(is_edge, scaled_lift(t, 1.0, 0.0, top - z), 0.0)
    else:
        t_top = tl.maximum(t_top, t)
        # An edge column of -inf still lies below the maximum it is measured from.
        t_cross += tl.where(is_edge, top - z, 0.0)
        cross += tl.where(is_edge, t_top - t, 0.0)
    x = tl.maximum(z, LOWEST) - tl.maximum(t, LOWEST)
    x = tl.minimum(tl.maximum(x, -1e15), 1e15)
    if KL:
        t_heat = load_part(partials_ptr, partial, 5, is_segment, 0.0)
        t_near = load_part(partials_ptr, partial, 6, is_segment, 0.0)
        t_drift = load_part(partials_ptr, partial, 7, is_segment, 0.0)
        t_centre = load_part(partials_ptr, partial, 8, is_segment, 0.0)
        t_centre = tl.where(is_edge, x, t_centre)
    if REVERSE_KL:
        cross += load_part(partials_ptr, partial, 9, is_segment, 0.0)
        heat = load_part(partials_ptr, partial, 10, is_segment, 0.0)
        near = load_part(partials_ptr, partial, 11, is_segment, 0.0)
        drift = load_part(partials_ptr, partial, 12, is_segment, 0.0)
        centre = load_part(partials_ptr, partial, 13, is_segment, 0.0)
        centre = tl.where(is_edge, -x, centre)
    (
        top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre,
    ) = collapse_pair(
        lanes, top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre, PROBS, CROSS, KL, REVERSE_KL,
    )  # fmt: skip
    offset = top - t_top
    top, rest, lse = finish(top, rest)
    put(row_max_ptr, out, top, counts)
    put(row_rest_ptr, out, rest, counts)
    put(lse_out, out, lse, counts)
    if PROBS:
        put(cross_entropy_out, out, t_rest * log1p(rest) + t_cross, counts)
        put(target_max_ptr, out, 0.0 * t_rest, counts)
        put(target_rest_ptr, out, t_rest, counts)
    else:
        t_top, t_rest, t_lse = finish(t_top, t_rest)
        put(target_lse_out, out, t_lse, counts)
        put(target_max_ptr, out, t_top, counts)
        put(target_rest_ptr, out, t_rest, counts)
        put(cross_entropy_out, out, log1p(rest) + t_cross / (1.0 + t_rest), counts)
        if KL:
            kl = divergence(t_near, t_drift, t_cross, t_heat, t_rest, rest, offset)
            put(kl_out, out, kl, counts)
        if REVERSE_KL:
            reverse_kl = divergence(near, drift, cross, heat, rest, t_rest, offset)
            put(reverse_kl_out, out, reverse_kl, counts)
        if log_ratio_out is not None:
            apart = offset + (log1p(rest) - log1p(t_rest))
            if KL:
                ratio = mass_ratio(t_near, t_drift, t_centre, t_rest, apart, offset)
            else:
                ratio = -mass_ratio(near, drift, centre, rest, -apart, offset)
            put(log_ratio_out, out, ratio, counts)


@triton.jit
def mixture_logs(d, beta):
    """log(m / q), log(p / m), m / q - 1 and p / q - 1 of the mixture m = beta q + (1 - beta) p,
    d = log p - log q: as in the torch path."""
    _, u = bend_and_growth(d)
    _, v = bend_and_growth(-d)
    x = (1.0 - beta) * u
    y = beta * v
    log_m = log1p(tl.maximum(x, -0.5))
    above = -log1p(tl.maximum(y, -0.5))
    log_m, above = tl.where(x > -0.5, log_m, d - above), tl.where(y > -0.5, above, d - log_m)
    log_m = tl.where(d < -80.0, tl.log(beta), tl.where(d > 80.0, d + tl.log(1.0 - beta), log_m))
    above = tl.where(d > 80.0, -tl.log(1.0 - beta), tl.where(d < -80.0, d - tl.log(beta), above))
    return log_m, above, x, u


@triton.jit
def entropy_bend(x, log_1p):
    """(1 + x) log(1 + x) - x to full relative accuracy, given log(1 + x)."""
    small = tl.abs(x) < 0.25
    s = tl.where(small, x, 0.0)
    tail = 1 / 30 - s * (1 / 42 - s * (1 / 56 - s * (1 / 72 - s / 90)))
    series = s * s * (0.5 - s * (1 / 6 - s * (1 / 12 - s * (1 / 20 - s * tail))))
    return tl.where(small, series, (1.0 + x) * log_1p - x)


@triton.jit
def at_least(x, bound):
    """max(x, bound) that lets NaN through."""
    return tl.where(x < bound, bound, x)


@triton.jit
def pair_of_logs(z, t, top, rest, t_top, t_rest, EXP: tl.constexpr):
    """p, q, log p and log p - log q; -1e18 and +-1e15 stand for the infinities, so that
    a probability of 0 times them is 0.

    Of rows with a common origin the logits' own difference is exact near p = q; of others it would
    carry that origin's rounding.
    """
    gap = z - top
    t_gap = t - t_top
    log_rests = log1p(rest) - log1p(t_rest)
    log_p = at_least(gap - log1p(rest), -1e18)
    log_q = at_least(t_gap - log1p(t_rest), -1e18)
    own = tl.maximum(z, LOWEST) - tl.maximum(t, LOWEST) - ((top - t_top) + log_rests)
    apart = tl.maximum(gap, LOWEST) - tl.maximum(t_gap, LOWEST) - log_rests
    d = tl.where(tl.abs(top - t_top) <= NEAR_ORIGIN, own, apart)
    return EXP(log_p), EXP(log_q), log_p, tl.minimum(tl.maximum(d, -1e15), 1e15)


@triton.jit
def jsd_of(p, q, d, beta):
    """A column's shares of the divergence and of beta * KL(q || m), without their linear terms.

    q ((1 - beta) psi(u) - psi((1 - beta) u)), psi(x) = (1 + x) log(1 + x) - x, u = p / q - 1: the
    terms of first order are gone before anything is rounded, so that nothing cancels near p = q.
    From u = 2 beta (1 - beta) on they cost less than the difference of the two psi does.
    """
    log_m, above, x, u = mixture_logs(d, beta)
    near = tl.abs(u) < 2.0 * beta * (1.0 - beta)
    close = q * (
        (1.0 - beta) * entropy_bend(tl.minimum(u, 1.0), d) - entropy_bend(tl.minimum(x, 1.0), log_m)
    )
    far = (1.0 - beta) * p * above - beta * q * log_m
    excess = tl.where(d > 20.0, (1.0 - beta) * (p - q), q * x)
    return tl.where(near, close, far), beta * (excess - q * log_m)


@triton.jit(do_not_specialize=COUNTS)
def vocab_jsd_kernel(
    logits_ptr,  # as in vocab_pair_stats_kernel
    target_ptr,
    mask_ptr,
    row_max_ptr,  # [K, N]
    row_rest_ptr,
    target_max_ptr,
    target_rest_ptr,
    parts_ptr,  # [K, N, S, 2] fp32: of each segment, the divergence and its part beta * KL(q || m)
    n_pairs,
    n_rows,
    vocab_size,
    inner_size,
    logits_pair_stride,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    beta,
    EXP: tl.constexpr,
    VEC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) % n_rows
    pair = tl.program_id(0).to(tl.int64) // n_rows
    segment = tl.program_id(1)
    at = pair * n_rows + row
    visible = vocab_size
    if mask_ptr is not None:
        visible = tl.where(tl.load(mask_ptr + at) != 0, vocab_size, 0)
    z_start = logits_shift + row_offset(row, inner_size, logits_outer_stride, logits_inner_stride)
    z_start += pair * logits_pair_stride
    t_start = target_shift + row_offset(row, inner_size, target_outer_stride, target_inner_stride)
    shift = (t_start % VEC).to(tl.int32)
    z_row = logits_ptr + z_start // VEC * VEC
    t_row = target_ptr + t_start // VEC * VEC
    first, last = whole_vectors(shift, visible, VEC)
    top = tl.load(row_max_ptr + at)
    rest = tl.load(row_rest_ptr + at)
    t_top = tl.load(target_max_ptr + at)
    t_rest = tl.load(target_rest_ptr + at)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    on_q = tl.zeros([BLOCK], tl.float32)
    for block in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, last), BLOCK):
        positions = block + lanes
        valid = (positions >= first) & (positions < last)
        z = tl.load(z_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        p, q, _, d = pair_of_logs(z, t, top, rest, t_top, t_rest, EXP)
        both, part = jsd_of(p, q, d, beta)
        total += tl.where(valid, both, 0.0)
        on_q += tl.where(valid, part, 0.0)
    if segment == 0:
        positions, valid = edge_columns(lanes, shift, visible, VEC)
        z = tl.load(z_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        p, q, _, d = pair_of_logs(z, t, top, rest, t_top, t_rest, EXP)
        both, part = jsd_of(p, q, d, beta)
        total += tl.where(valid, both, 0.0)
        on_q += tl.where(valid, part, 0.0)
    out = at * tl.num_programs(1) + segment
    undefined = 0.0 * (rest + t_rest)  # NaN for a row without a softmax
    tl.store(parts_ptr + out * 2, tl.sum(total) + undefined)
    tl.store(parts_ptr + out * 2 + 1, tl.sum(on_q) + undefined)


@triton.jit
def load_upstream(pointer, at, counts):
    """An upstream gradient of every pair; 0 where that fact was not used or the pair does not
    count."""
    if pointer is not None:
        return tl.load(pointer + at, mask=counts, other=0.0)
    else:
        return 0.0


@triton.jit
def pair_gradient(
    z, t, counts, top, rest, t_top, t_rest, on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
    PROBS: tl.constexpr, REVERSE_KL: tl.constexpr, JSD: tl.constexpr, NEED_TARGET: tl.constexpr,
    EXP: tl.constexpr,
):  # fmt: skip
    """dlogits [PAIRS, columns] and, summed over the pairs, dtarget [1, columns]."""
    if PROBS:
        log_p = at_least((z - top) - log1p(rest), -1e18)
        p = EXP(log_p)
        dz = on_p * p + on_cross * (t_rest * p - t)
        dt = tl.sum(tl.where(counts, -on_cross * log_p, 0.0), axis=0, keep_dims=True)
        return dz, dt
    p, q, log_p, d = pair_of_logs(z, t, top, rest, t_top, t_rest, EXP)
    # Where both sides agree on one near-certain column, p - q is the difference of what they leave
    # to the rest.
    missing = t_rest / (1.0 + t_rest) - rest / (1.0 + rest)
    gap = tl.where((z == top) & (t == t_top), missing, p - q)
    dz = on_p * p + (on_cross + on_kl) * gap
    if REVERSE_KL:
        dz += on_reverse * p * d
    if JSD:
        log_m, above, _, _ = mixture_logs(d, beta)
        dz += on_jsd * (1.0 - beta) * p * above
    dt = 0.0 * q
    if NEED_TARGET:
        dt += q * (on_q - on_cross * log_p - on_kl * d)
        if REVERSE_KL:
            dt -= on_reverse * gap
        if JSD:
            dt -= on_jsd * beta * q * log_m
        dt = tl.sum(tl.where(counts, dt, 0.0), axis=0, keep_dims=True)
    return dz, dt


@triton.jit(do_not_specialize=COUNTS)
def vocab_pair_stats_backward_kernel(
    dlogits_ptr,  # [K, N, V], 16-byte aligned, or None
    dtarget_ptr,  # [N, V], 16-byte aligned, or None
    logits_ptr,  # as in vocab_pair_stats_kernel
    target_ptr,
    mask_ptr,
    row_max_ptr,  # [K, N]
    row_rest_ptr,
    target_max_ptr,
    target_rest_ptr,
    on_p_ptr,  # [K, N] coefficients, each or None: of p in dlogits
    on_q_ptr,  # of q in dtarget
    on_cross_ptr,  # upstream gradients of the facts
    on_kl_ptr,
    on_reverse_ptr,
    on_jsd_ptr,
    n_pairs,
    n_rows,
    vocab_size,
    inner_size,
    logits_pair_stride,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    dlogits_pair_stride,
    dlogits_outer_stride,
    dlogits_inner_stride,
    dlogits_shift,
    dtarget_outer_stride,
    dtarget_inner_stride,
    dtarget_shift,
    beta,
    PROBS: tl.constexpr,
    EXP: tl.constexpr,
    VEC: tl.constexpr,
    SEGMENT: tl.constexpr,
    PAIRS: tl.constexpr,  # at least n_pairs
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    pairs = tl.arange(0, PAIRS)[:, None].to(tl.int64)
    inside = pairs < n_pairs
    at = pairs * n_rows + row
    counts = pair_counts(mask_ptr, at, inside)
    any_counts = tl.max(counts.to(tl.int32)) > 0
    z_start = logits_shift + row_offset(row, inner_size, logits_outer_stride, logits_inner_stride)
    z_start = z_start + pairs * logits_pair_stride
    t_start = target_shift + row_offset(row, inner_size, target_outer_stride, target_inner_stride)
    shift = (t_start % VEC).to(tl.int32)
    z_row = logits_ptr + z_start // VEC * VEC
    t_row = target_ptr + t_start // VEC * VEC
    dz_row = dlogits_ptr
    dt_row = dtarget_ptr
    if dlogits_ptr is not None:
        dz_start = row_offset(row, inner_size, dlogits_outer_stride, dlogits_inner_stride)
        dz_start = dlogits_shift + dz_start + pairs * dlogits_pair_stride
        dz_row = dlogits_ptr + dz_start // VEC * VEC
    if dtarget_ptr is not None:
        dt_start = row_offset(row, inner_size, dtarget_outer_stride, dtarget_inner_stride)
        dt_row = dtarget_ptr + (dtarget_shift + dt_start) // VEC * VEC
    first, last = whole_vectors(shift, vocab_size, VEC)

    top = tl.load(row_max_ptr + at, mask=counts, other=0.0)
    rest = tl.load(row_rest_ptr + at, mask=counts, other=0.0)
    t_top = 0.0
    if not PROBS:
        # Of pairs that do not count the target's exponentials are 0, however large its logits.
        t_top = tl.load(target_max_ptr + at, mask=counts, other=float("inf"))
    t_rest = tl.load(target_rest_ptr + at, mask=counts, other=0.0)
    on_p = load_upstream(on_p_ptr, at, counts)
    on_q = load_upstream(on_q_ptr, at, counts)
    on_cross = load_upstream(on_cross_ptr, at, counts)
    on_kl = load_upstream(on_kl_ptr, at, counts)
    on_reverse = load_upstream(on_reverse_ptr, at, counts)
    on_jsd = load_upstream(on_jsd_ptr, at, counts)
    lanes = tl.arange(0, BLOCK)[None, :]
    edges, is_edge = edge_columns(tl.arange(0, 2 * VEC)[None, :], shift, vocab_size, VEC)
    is_edge = is_edge & (edges < tl.where(segment == 0, shift + vocab_size, 0))
    # Bounds that are multiples of VEC keep the loads wide; where no pair counts nothing is read.
    read_end = tl.multiple_of(tl.where(any_counts, last, 0), VEC)
    edge_end = tl.where(any_counts, shift + vocab_size, 0)

    for block in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, last), BLOCK):
        positions = block + lanes
        valid = (positions >= first) & (positions < last)
        step(
            z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
            positions, valid, read_end, counts, inside, top, rest, t_top, t_rest,
            on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
            PROBS, on_reverse_ptr, on_jsd_ptr, EXP,
        )  # fmt: skip
    step(
        z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
        edges, is_edge, edge_end, counts, inside, top, rest, t_top, t_rest,
        on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
        PROBS, on_reverse_ptr, on_jsd_ptr, EXP,
    )  # fmt: skip


@triton.jit
def step(
    z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
    positions, valid, read_end, counts, inside, top, rest, t_top, t_rest,
    on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
    PROBS: tl.constexpr, on_reverse_ptr, on_jsd_ptr, EXP: tl.constexpr,
):  # fmt: skip
    """Reads one block of all pairs, writes its gradients; pairs that do not count get zeros and are
    not read."""
    nothing = 0.0 if PROBS else float("-inf")
    z = tl.load(z_row + positions, mask=valid & counts, other=float("-inf")).to(tl.float32)
    t = tl.load(t_row + positions, mask=valid & (positions < read_end), other=nothing)
    t = t.to(tl.float32)
    dz, dt = pair_gradient(
        z, t, counts, top, rest, t_top, t_rest, on_p, on_q, on_cross, on_kl, on_reverse, on_jsd,
        beta, PROBS, on_reverse_ptr is not None, on_jsd_ptr is not None, dtarget_ptr is not None,
        EXP,
    )  # fmt: skip
    if dlogits_ptr is not None:
        dz = tl.where(counts, dz, 0.0).to(dlogits_ptr.dtype.element_ty)
        tl.store(dz_row + positions, dz, mask=valid & inside)
    if dtarget_ptr is not None:
        dt = tl.where(valid, dt, 0.0)  # other lanes may hold what the dtype cannot
        tl.store(dt_row + positions, dt.to(dtarget_ptr.dtype.element_ty), mask=valid)
