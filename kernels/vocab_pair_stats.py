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
    LOWEST,
    collapse_rest,
    decayed_gap,
    edge_columns,
    first_maximum,
    gap_and_decay,
    log1p,
    merge_rest,
    row_offset,
    whole_vectors,
)

FAR = tl.constexpr(0.3)  # beyond this bend the direct form of a divergence is the more accurate one


@triton.jit
def bend_of(x):
    """expm1(x) - x to full relative accuracy, x within +-60."""
    series = x * x * (0.5 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x / 5040)))))
    return tl.where(tl.abs(x) < 0.25, series, tl.exp(x) - 1.0 - x)


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
        step = tl.minimum(tl.maximum(x - centre, -60.0), 60.0)
        shift = tl.where(stays, step, -step)
        bend = bend_of(shift)
        grow = bend + shift
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
        shift = tl.minimum(tl.maximum(centre - middle, -60.0), 60.0)
        bend = bend_of(shift)
        grow = bend + shift
        near = decay * ((1.0 + grow) * near + grow * drift + bend * mass)
        near = tl.sum(near, axis=-1, keep_dims=True)
        drift = tl.sum(decay * (drift + shift * mass), axis=-1, keep_dims=True)
        centre = middle
    return heat, cross, near, drift, centre


@triton.jit
def divergence(near, drift, cross, heat, rest, rest_other):
    """The KL divergence from one direction's sums: `rest` of the weighing side, `rest_other` of the
    other."""
    mass = 1.0 + rest
    bend = near / mass
    y = bend + drift / mass
    # The entropy and the cross-entropy, each without a difference of large numbers of its own.
    direct = (log1p(rest_other) + cross / mass) - (log1p(rest) - heat / mass)
    use_near = (bend < FAR) & (tl.abs(y) < 0.5) & (tl.abs(direct) < float("inf"))
    return tl.where(use_near, bend - log_bend_of(tl.where(use_near, y, 0.0)), direct)


@triton.jit
def pair_counts(mask_ptr, at, inside):
    """Which of these pairs of rows are wanted."""
    if mask_ptr is not None:
        return tl.load(mask_ptr + at, mask=inside, other=0) != 0
    return inside


@triton.jit
def put_plane(partials_ptr, plane, out, value, counts):
    """Stores one number of every partial state."""
    tl.store(partials_ptr + plane + out, value, mask=counts)


@triton.jit
def vocab_pair_stats_kernel(
    logits_ptr,  # [K, N, V], 16-byte aligned; row 0 starts logits_shift elements later
    target_ptr,  # [N, V] logits or probabilities, likewise
    mask_ptr,  # [K, N] bool, or None: every pair counts
    partials_ptr,  # [14, K, N, S] fp32: see the stores at the end
    n_pairs,  # K
    n_rows,  # N
    vocab_size,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_inner_size,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    PROBS: tl.constexpr,  # the target holds probabilities
    CROSS: tl.constexpr,  # cross-entropy is wanted
    KL: tl.constexpr,  # KL(q || p) is wanted
    REVERSE_KL: tl.constexpr,  # KL(p || q) is wanted
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

    t_start = target_shift + row_offset(
        row, target_inner_size, target_outer_stride, target_inner_stride
    )
    z_start = logits_shift + pairs * logits_outer_stride + row * logits_inner_stride
    shift = (t_start % VEC).to(tl.int32)
    t_row = target_ptr + t_start // VEC * VEC
    z_row = logits_ptr + z_start // VEC * VEC
    first, last = whole_vectors(shift, vocab_size, VEC)
    stop = tl.where(any_counts, tl.minimum((segment + 1) * SEGMENT, last), 0)
    lanes = tl.arange(0, BLOCK)[None, :]

    zeros = tl.zeros([PAIRS, BLOCK], tl.float32)
    top = zeros + LOWEST
    rest = zeros
    t_top = tl.full([1, BLOCK], LOWEST, tl.float32)
    t_rest = tl.zeros([1, BLOCK], tl.float32)  # of probabilities: their sum
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
        gap, decay = gap_and_decay(top, z)
        new_top = tl.maximum(top, z)
        if PROBS:
            weighed = scaled_lift(t, 1.0, 0.0, new_top - z)
            t_cross += scaled_lift(t_rest, 1.0, 0.0, new_top - top) + weighed
            t_rest += t
        else:
            t_stays = t_top >= t
            t_gap, t_decay = gap_and_decay(t_top, t)
            new_t_top = tl.maximum(t_top, t)
            x = tl.maximum(z, LOWEST) - tl.maximum(t, LOWEST)
            x = tl.minimum(tl.maximum(x, -1e30), 1e30)
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
            t_rest = merge_rest(t_stays, t_decay, t_rest, 0.0)
            t_top = new_t_top
        rest = merge_rest(stays, decay, rest, 0.0)
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
    plane = n_pairs.to(tl.int64) * n_rows * tl.num_programs(1)
    put_plane(partials_ptr, 0 * plane, out, top, counts)
    put_plane(partials_ptr, 1 * plane, out, rest, counts)
    put_plane(partials_ptr, 2 * plane, out, t_top, counts)
    put_plane(partials_ptr, 3 * plane, out, t_rest, counts)
    if CROSS or KL:
        put_plane(partials_ptr, 4 * plane, out, t_cross, counts)
    if KL:
        put_plane(partials_ptr, 5 * plane, out, t_heat, counts)
        put_plane(partials_ptr, 6 * plane, out, t_near, counts)
        put_plane(partials_ptr, 7 * plane, out, t_drift, counts)
        put_plane(partials_ptr, 8 * plane, out, t_centre, counts)
    if REVERSE_KL:
        put_plane(partials_ptr, 9 * plane, out, cross, counts)
        put_plane(partials_ptr, 10 * plane, out, heat, counts)
        put_plane(partials_ptr, 11 * plane, out, near, counts)
        put_plane(partials_ptr, 12 * plane, out, drift, counts)
        put_plane(partials_ptr, 13 * plane, out, centre, counts)


@triton.jit
def collapse_pair(
    order, top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
    heat, cross, near, drift, centre,
    PROBS: tl.constexpr, CROSS: tl.constexpr, KL: tl.constexpr, REVERSE_KL: tl.constexpr,
):  # fmt: skip
    """Merges the lanes' states [PAIRS, lanes] into one [PAIRS, 1]."""
    order = order + tl.zeros_like(top).to(tl.int32)
    summit, is_first = first_maximum(top, order)
    gap, decay = gap_and_decay(summit, top)
    if PROBS:
        t_cross += scaled_lift(t_rest, 1.0, 0.0, summit - top)
        t_cross = tl.sum(t_cross, axis=-1, keep_dims=True)
        t_rest = tl.sum(t_rest, axis=-1, keep_dims=True)
        t_top = summit
    else:
        t_summit, t_is_first = first_maximum(t_top, order)
        t_gap, t_decay = gap_and_decay(t_summit, t_top)
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
def load_plane(partials_ptr, plane, partial, is_segment, empty):
    """One number of every segment's partial state."""
    return tl.load(partials_ptr + plane + partial, mask=is_segment, other=empty)


@triton.jit
def put(pointer, out, value, counts):
    """Stores a pair's fact where it is wanted; pairs that do not count hold 0."""
    if pointer is not None:
        tl.store(pointer + out, tl.where(counts, value, 0.0))


@triton.jit
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
    n_segments,
    n_pairs,
    n_rows,
    vocab_size,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_inner_size,
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
    row = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1).to(tl.int64)
    out = pair * n_rows + row + tl.zeros([1, 1], tl.int32)
    counts = pair_counts(mask_ptr, out, out >= 0)
    n_visible = tl.max(tl.where(counts, n_segments, 0))
    visible = tl.max(tl.where(counts, vocab_size, 0))
    t_start = target_shift + row_offset(
        row, target_inner_size, target_outer_stride, target_inner_stride
    )
    z_start = logits_shift + pair * logits_outer_stride + row * logits_inner_stride
    shift = (t_start % VEC).to(tl.int32)
    lanes = tl.arange(0, LANES)[None, :]
    is_segment = lanes < n_visible
    positions, is_edge = edge_columns(lanes - n_segments, shift, visible, VEC)
    columns = positions - shift
    z = tl.load(logits_ptr + z_start + columns, mask=is_edge, other=float("-inf")).to(tl.float32)
    nothing = 0.0 if PROBS else float("-inf")
    t = tl.load(target_ptr + t_start + columns, mask=is_edge, other=nothing).to(tl.float32)

    partial = (pair * n_rows + row) * n_segments + lanes
    plane = n_pairs.to(tl.int64) * n_rows * n_segments
    top = load_plane(partials_ptr, 0 * plane, partial, is_segment, LOWEST)
    top = tl.maximum(top, z)
    rest = load_plane(partials_ptr, 1 * plane, partial, is_segment, 0.0)
    t_top = load_plane(partials_ptr, 2 * plane, partial, is_segment, LOWEST)
    t_rest = load_plane(partials_ptr, 3 * plane, partial, is_segment, 0.0)
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
        t_cross = load_plane(partials_ptr, 4 * plane, partial, is_segment, 0.0)
    if PROBS:
        t_rest += t
        t_cross += tl.where(is_edge, scaled_lift(t, 1.0, 0.0, top - z), 0.0)
    else:
        t_top = tl.maximum(t_top, t)
        # An edge column of -inf still lies below the maximum it is measured from.
        t_cross += tl.where(is_edge, top - z, 0.0)
        cross += tl.where(is_edge, t_top - t, 0.0)
    x = tl.maximum(z, LOWEST) - tl.maximum(t, LOWEST)
    x = tl.minimum(tl.maximum(x, -1e30), 1e30)
    if KL:
        t_heat = load_plane(partials_ptr, 5 * plane, partial, is_segment, 0.0)
        t_near = load_plane(partials_ptr, 6 * plane, partial, is_segment, 0.0)
        t_drift = load_plane(partials_ptr, 7 * plane, partial, is_segment, 0.0)
        t_centre = load_plane(partials_ptr, 8 * plane, partial, is_segment, 0.0)
        t_centre = tl.where(is_edge, x, t_centre)
    if REVERSE_KL:
        cross += load_plane(partials_ptr, 9 * plane, partial, is_segment, 0.0)
        heat = load_plane(partials_ptr, 10 * plane, partial, is_segment, 0.0)
        near = load_plane(partials_ptr, 11 * plane, partial, is_segment, 0.0)
        drift = load_plane(partials_ptr, 12 * plane, partial, is_segment, 0.0)
        centre = load_plane(partials_ptr, 13 * plane, partial, is_segment, 0.0)
        centre = tl.where(is_edge, -x, centre)
    (
        top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre,
    ) = collapse_pair(
        lanes, top, rest, t_top, t_rest, t_heat, t_cross, t_near, t_drift, t_centre,
        heat, cross, near, drift, centre, PROBS, CROSS, KL, REVERSE_KL,
    )  # fmt: skip
    top, rest, lse = finish(top, rest)
    put(row_max_ptr, out, top, counts)
    put(row_rest_ptr, out, rest, counts)
    put(lse_out, out, lse, counts)
    if PROBS:
        put(cross_entropy_out, out, t_rest * log1p(rest) + t_cross, counts)
        put(target_rest_ptr, out, t_rest, counts)
    else:
        t_top, t_rest, t_lse = finish(t_top, t_rest)
        put(target_lse_out, out, t_lse, counts)
        put(target_max_ptr, out, t_top, counts)
        put(target_rest_ptr, out, t_rest, counts)
        put(cross_entropy_out, out, log1p(rest) + t_cross / (1.0 + t_rest), counts)
        if KL:
            kl = divergence(t_near, t_drift, t_cross, t_heat, t_rest, rest)
            put(kl_out, out, kl, counts)
        if REVERSE_KL:
            reverse_kl = divergence(near, drift, cross, heat, rest, t_rest)
            put(reverse_kl_out, out, reverse_kl, counts)


@triton.jit
def finish(top, rest):
    """The row's maximum, rest and lse; without a finite maximum no probability is defined."""
    top = tl.where(top == LOWEST, float("-inf"), top)
    endless = tl.abs(top) == float("inf")
    rest = tl.where(endless, float("nan"), rest)
    return top, rest, tl.where(endless, top, top + log1p(rest))


@triton.jit
def log_share(log_own, log_other, weight):
    """log(m / own), m = (1 - weight) own + weight other: log1p(weight * expm1(d)), d = log_other -
    log_own."""
    d = log_other - log_own
    near = tl.minimum(tl.maximum(d, -60.0), 20.0)
    close = log1p_signed(weight * (bend_of(near) + near))
    return tl.where((d > 20.0) & (weight > 0.0), d + tl.log(tl.maximum(weight, 1e-30)), close)


@triton.jit
def log1p_signed(x):
    """log(1 + x) for x >= -1; at -1 a very negative number, so that 0 times it is 0."""
    u = tl.maximum(1.0 + x, 1e-30)
    exact = u == 1.0
    return tl.where(exact, x, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0)))


@triton.jit
def pair_of_logs(z, t, top, rest, t_top, t_rest):
    """p, q and their logarithms, -1e30 standing for -inf so that no difference is undefined."""
    log_p = tl.maximum((z - top) - log1p(rest), -1e30)
    log_q = tl.maximum((t - t_top) - log1p(t_rest), -1e30)
    return tl.exp(log_p), tl.exp(log_q), log_p, log_q


@triton.jit
def share_divergence(own, other, log_own, log_other, weight):
    """A column's share of KL(own || m): own * h(m / own - 1), h(y) = y - log1p(y) >= 0.

    The linear terms sum to 0 over both halves of the divergence: nothing cancels in the sum.
    """
    d = tl.minimum(tl.maximum(log_other - log_own, -60.0), 20.0)
    y = weight * (bend_of(d) + d)
    near = tl.abs(y) < 0.5
    close = own * log_bend_of(tl.where(near, y, 0.0))
    far = weight * (other - own) - own * log_share(log_own, log_other, weight)
    return tl.where(near, close, far)


@triton.jit
def vocab_jsd_kernel(
    logits_ptr,  # as in vocab_pair_stats_kernel
    target_ptr,
    mask_ptr,
    row_max_ptr,  # [K, N]
    row_rest_ptr,
    target_max_ptr,
    target_rest_ptr,
    parts_ptr,  # [2, K, N, S] fp32: beta * KL(q || m) and (1 - beta) * KL(p || m) of each segment
    n_pairs,
    n_rows,
    vocab_size,
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_inner_size,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    beta,
    VEC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    pair = tl.program_id(2).to(tl.int64)
    at = pair * n_rows + row
    visible = vocab_size
    if mask_ptr is not None:
        visible = tl.where(tl.load(mask_ptr + at) != 0, vocab_size, 0)
    z_start = logits_shift + pair * logits_outer_stride + row * logits_inner_stride
    t_start = target_shift + row_offset(
        row, target_inner_size, target_outer_stride, target_inner_stride
    )
    shift = (t_start % VEC).to(tl.int32)
    z_row = logits_ptr + z_start // VEC * VEC
    t_row = target_ptr + t_start // VEC * VEC
    first, last = whole_vectors(shift, visible, VEC)
    top = tl.load(row_max_ptr + at)
    rest = tl.load(row_rest_ptr + at)
    t_top = tl.load(target_max_ptr + at)
    t_rest = tl.load(target_rest_ptr + at)
    lanes = tl.arange(0, BLOCK)
    on_q = tl.zeros([BLOCK], tl.float32)
    on_p = tl.zeros([BLOCK], tl.float32)
    for block in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, last), BLOCK):
        positions = block + lanes
        valid = (positions >= first) & (positions < last)
        z = tl.load(z_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        p, q, log_p, log_q = pair_of_logs(z, t, top, rest, t_top, t_rest)
        on_q += tl.where(valid, share_divergence(q, p, log_q, log_p, 1.0 - beta), 0.0)
        on_p += tl.where(valid, share_divergence(p, q, log_p, log_q, beta), 0.0)
    if segment == 0:
        positions, valid = edge_columns(lanes, shift, visible, VEC)
        z = tl.load(z_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        t = tl.load(t_row + positions, mask=valid, other=float("-inf")).to(tl.float32)
        p, q, log_p, log_q = pair_of_logs(z, t, top, rest, t_top, t_rest)
        on_q += tl.where(valid, share_divergence(q, p, log_q, log_p, 1.0 - beta), 0.0)
        on_p += tl.where(valid, share_divergence(p, q, log_p, log_q, beta), 0.0)
    out = at * tl.num_programs(1) + segment
    plane = n_pairs.to(tl.int64) * n_rows * tl.num_programs(1)
    tl.store(parts_ptr + out, beta * tl.sum(on_q))
    tl.store(parts_ptr + plane + out, (1.0 - beta) * tl.sum(on_p))


@triton.jit
def load_upstream(pointer, at, counts):
    """An upstream gradient of every pair; 0 where that fact was not used or the pair does not
    count."""
    if pointer is not None:
        return tl.load(pointer + at, mask=counts, other=0.0)
    return 0.0


@triton.jit
def pair_gradient(
    z, t, counts, top, rest, t_top, t_rest, on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
    PROBS: tl.constexpr, REVERSE_KL: tl.constexpr, JSD: tl.constexpr, NEED_TARGET: tl.constexpr,
):  # fmt: skip
    """dlogits [PAIRS, columns] and, summed over the pairs, dtarget [1, columns]."""
    if PROBS:
        log_p = tl.maximum((z - top) - log1p(rest), -1e30)
        p = tl.exp(log_p)
        dz = on_p * p + on_cross * (t_rest * p - t)
        dt = tl.sum(tl.where(counts, -on_cross * log_p, 0.0), axis=0, keep_dims=True)
        return dz, dt
    p, q, log_p, log_q = pair_of_logs(z, t, top, rest, t_top, t_rest)
    # Where both sides agree on one near-certain column, p - q is the difference of what they leave
    # to the rest.
    missing = t_rest / (1.0 + t_rest) - rest / (1.0 + rest)
    gap = tl.where((z == top) & (t == t_top), missing, p - q)
    dz = on_p * p + (on_cross + on_kl) * gap
    d = log_p - log_q
    if REVERSE_KL:
        dz += on_reverse * p * d
    if JSD:
        dz -= on_jsd * (1.0 - beta) * p * log_share(log_p, log_q, beta)
    dt = 0.0 * q
    if NEED_TARGET:
        dt += q * (on_q - on_cross * log_p - on_kl * d)
        if REVERSE_KL:
            dt -= on_reverse * gap
        if JSD:
            dt -= on_jsd * beta * q * log_share(log_q, log_p, 1.0 - beta)
        dt = tl.sum(tl.where(counts, dt, 0.0), axis=0, keep_dims=True)
    return dz, dt


@triton.jit
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
    logits_outer_stride,
    logits_inner_stride,
    logits_shift,
    target_inner_size,
    target_outer_stride,
    target_inner_stride,
    target_shift,
    dlogits_stride,  # of a row; pairs lie n_rows rows apart
    dtarget_stride,
    beta,
    PROBS: tl.constexpr,
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
    z_start = logits_shift + pairs * logits_outer_stride + row * logits_inner_stride
    t_start = target_shift + row_offset(
        row, target_inner_size, target_outer_stride, target_inner_stride
    )
    shift = (t_start % VEC).to(tl.int32)
    z_row = logits_ptr + z_start // VEC * VEC
    t_row = target_ptr + t_start // VEC * VEC
    dz_row = dlogits_ptr
    dt_row = dtarget_ptr
    if dlogits_ptr is not None:
        dz_row = dlogits_ptr + at * dlogits_stride // VEC * VEC
    if dtarget_ptr is not None:
        dt_row = dtarget_ptr + row * dtarget_stride // VEC * VEC
    first, last = whole_vectors(shift, vocab_size, VEC)

    top = tl.load(row_max_ptr + at, mask=counts, other=0.0)
    rest = tl.load(row_rest_ptr + at, mask=counts, other=0.0)
    t_top = 0.0
    if not PROBS:
        t_top = tl.load(target_max_ptr + at, mask=counts, other=0.0)
    t_rest = tl.load(target_rest_ptr + at, mask=counts, other=0.0)
    on_p = load_upstream(on_p_ptr, at, counts)
    on_q = load_upstream(on_q_ptr, at, counts)
    on_cross = load_upstream(on_cross_ptr, at, counts)
    on_kl = load_upstream(on_kl_ptr, at, counts)
    on_reverse = load_upstream(on_reverse_ptr, at, counts)
    on_jsd = load_upstream(on_jsd_ptr, at, counts)
    lanes = tl.arange(0, BLOCK)[None, :]
    edges, is_edge = edge_columns(tl.arange(0, 2 * VEC)[None, :], shift, vocab_size, VEC)
    edges = tl.where(segment == 0, edges, vocab_size)
    is_edge = (
        is_edge & (edges < shift + vocab_size) & (edges < tl.where(segment == 0, 2147483647, 0))
    )

    for block in range(segment * SEGMENT, tl.minimum((segment + 1) * SEGMENT, last), BLOCK):
        positions = block + lanes
        valid = (positions >= first) & (positions < last)
        step(
            z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
            positions, valid, counts, inside, any_counts, top, rest, t_top, t_rest,
            on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
            PROBS, on_reverse_ptr, on_jsd_ptr,
        )  # fmt: skip
    step(
        z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
        edges, is_edge, counts, inside, any_counts, top, rest, t_top, t_rest,
        on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
        PROBS, on_reverse_ptr, on_jsd_ptr,
    )  # fmt: skip


@triton.jit
def step(
    z_row, t_row, dz_row, dt_row, dlogits_ptr, dtarget_ptr,
    positions, valid, counts, inside, any_counts, top, rest, t_top, t_rest,
    on_p, on_q, on_cross, on_kl, on_reverse, on_jsd, beta,
    PROBS: tl.constexpr, on_reverse_ptr, on_jsd_ptr,
):  # fmt: skip
    """Reads one block of all pairs, writes its gradients; pairs that do not count get zeros and are
    not read."""
    read = positions < tl.where(any_counts, 2147483647, 0)
    z = tl.load(z_row + positions, mask=valid & counts, other=0.0).to(tl.float32)
    t = tl.load(t_row + positions, mask=valid & read, other=0.0).to(tl.float32)
    dz, dt = pair_gradient(
        z, t, counts, top, rest, t_top, t_rest, on_p, on_q, on_cross, on_kl, on_reverse, on_jsd,
        beta, PROBS, on_reverse_ptr is not None, on_jsd_ptr is not None, dtarget_ptr is not None,
    )  # fmt: skip
    if dlogits_ptr is not None:
        dz = tl.where(counts, dz, 0.0).to(dlogits_ptr.dtype.element_ty)
        tl.store(dz_row + positions, dz, mask=valid & inside)
    if dtarget_ptr is not None:
        tl.store(dt_row + positions, dt.to(dtarget_ptr.dtype.element_ty), mask=valid)
