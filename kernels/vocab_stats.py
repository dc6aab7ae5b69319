"""Row statistics of logits [N, V]: one pass over V, a few numbers per row, one backward.

One kernel reduces a segment of a row to a partial state, lane by lane; the second merges a row's
segments with the few columns that no aligned vector covers, and makes the facts; the third turns
per-row coefficients (made in torch) into dlogits, whatever was asked for. Segments depend on V
alone, so that a row's facts do not depend on the batch. A pointer that is None prunes its part.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .online_softmax import (
    EMPTY,
    LOWEST,
    add_to_rest,
    cap_gradient,
    cap_logits,
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
    weighted_gap,
    whole_vectors,
)

COUNTS = ("inner_size",)  # changes from batch to batch: no reason to compile anew
IGNORED = tl.constexpr(-100)
ELSEWHERE = tl.constexpr(-2147483648)  # the label of a row that lies in another shard
NOWHERE = tl.constexpr(1 << 30)  # and upwards: where lanes without a state have their maximum


@triton.jit
def row_counts(labels_ptr, row):
    """Whether the row is wanted at all."""
    if labels_ptr is not None:
        return tl.load(labels_ptr + row) != IGNORED
    else:
        return True


@triton.jit
def load_weight(weights_ptr, columns, valid):
    """Vocabulary weights of these columns; 1 where none were given, 0 outside the row."""
    if weights_ptr is not None:
        return tl.load(weights_ptr + columns, mask=valid, other=0.0).to(tl.float32)
    else:
        return tl.where(valid, 1.0, 0.0)


@triton.jit
def load_logit(row_ptr, label, vocab_size, softcap, logit_scale):
    """The logit of one column; 0 for an ignored label or one elsewhere, NaN for one outside the
    vocabulary (never memory of somebody else)."""
    inside = (label >= 0) & (label < vocab_size)
    u = tl.load(row_ptr + label, mask=inside, other=0.0).to(tl.float32)
    z = cap_logits(u, inside, softcap, logit_scale)
    nowhere = (label == IGNORED) | (label == ELSEWHERE)
    return tl.where(nowhere, 0.0, tl.where(inside, z, float("nan")))


@triton.jit
def collapse(
    top,
    rest,
    order,
    heat,
    squares,
    logit_sum,
    bag,
    seen,
    offsets,
    heat_ptr,
    squares_ptr,
    logit_sum_ptr,
    bag_ptr,
    offsets_ptr,
):
    """Merges the lanes' states into one; sums that nobody wants stay as they are."""
    summit, is_first = first_maximum(top, order)
    alike = top == summit  # which may be infinite, so no difference tells
    gap, decay = gap_and_decay(tl.where(alike, 0.0, summit), tl.where(alike, 0.0, top), plain_exp)
    index = tl.min(tl.where(is_first, order, 2147483647), axis=-1, keep_dims=True)
    if heat_ptr is not None:
        warmth = decayed_gap(decay, gap)
        heat = decay * heat + tl.where(is_first, 0.0, (1.0 + rest) * warmth)
        heat = tl.sum(heat, axis=-1, keep_dims=True)
    if squares_ptr is not None:
        squares = collapse_rest(is_first, decay * decay, squares)
    if logit_sum_ptr is not None:
        logit_sum = tl.sum(logit_sum, axis=-1, keep_dims=True)
    if bag_ptr is not None:
        bag = tl.sum(decay * bag, axis=-1, keep_dims=True)
    if offsets_ptr is not None:
        offsets = tl.sum(offsets + weighted_gap(seen, gap), axis=-1, keep_dims=True)
        seen = tl.sum(seen, axis=-1, keep_dims=True)
    rest = collapse_rest(is_first, decay, rest)
    return summit, rest, index, heat, squares, logit_sum, bag, seen, offsets


@triton.jit(do_not_specialize=COUNTS)
def vocab_stats_kernel(
    logits_ptr,  # [N, V], 16-byte aligned; row 0 starts base_shift elements later
    labels_ptr,  # [N] int64, or None: every row counts
    weights_ptr,  # [V], or None: all 1
    top_ptr,  # [N, S] fp32, S segments a row: the largest logit
    rest_ptr,  # [N, S] sum of exp(z - top) without the maximum
    index_ptr,  # [N, S] int32 column of the maximum, or None
    heat_ptr,  # [N, S] sum of exp(z - top) * (z - top), or None
    squares_ptr,  # [N, S] sum of exp(2 (z - top)) without the maximum, or None
    logit_sum_ptr,  # [N, S] sum of z, or None
    bag_ptr,  # [N, S] sum of weight * exp(z - top), or None
    seen_ptr,  # [N, S] sum of weight, or None
    offsets_ptr,  # [N, S] sum of weight * (z - top), or None
    vocab_size,
    inner_size,
    outer_stride,
    inner_stride,
    base_shift,
    softcap,  # fp32: the rows hold a head's product, capped here; or None
    logit_scale,  # fp32: and multiplied by this; or None
    EXP: tl.constexpr,  # plain_exp or flushed_exp
    VEC: tl.constexpr,
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    # A branch, not an early return: a return in mid-kernel makes the compiler spill.
    if row_counts(labels_ptr, row):
        start = base_shift + row_offset(row, inner_size, outer_stride, inner_stride)
        shift = (start % VEC).to(tl.int32)
        row_ptr = logits_ptr + start // VEC * VEC
        first, last = whole_vectors(shift, vocab_size, VEC)
        lanes = tl.arange(0, BLOCK)

        top = tl.full([BLOCK], LOWEST, tl.float32)
        rest = tl.full([BLOCK], EMPTY, tl.float32)
        # Each lane's first column, which is its maximum where it holds the lowest number.
        order = segment * SEGMENT + lanes
        order = order - shift + tl.where(order < first, BLOCK, 0)
        heat = tl.zeros([BLOCK], tl.float32)
        squares = tl.full([BLOCK], EMPTY, tl.float32)
        logit_sum = tl.zeros([BLOCK], tl.float32)
        bag = tl.zeros([BLOCK], tl.float32)
        seen = tl.zeros([BLOCK], tl.float32)
        offsets = tl.zeros([BLOCK], tl.float32)

        stop = tl.minimum((segment + 1) * SEGMENT, last)
        for block in tl.range(segment * SEGMENT, stop, BLOCK, loop_unroll_factor=4):
            positions = block + lanes
            valid = (positions >= first) & (positions < last)
            u = tl.load(row_ptr + positions, mask=valid, other=float("-inf")).to(tl.float32)
            z = cap_logits(u, valid, softcap, logit_scale)
            columns = positions - shift
            stays = top >= z
            gap, decay = gap_and_decay(top, z, EXP)
            if heat_ptr is not None:
                warmth = decayed_gap(decay, gap)
                heat = tl.where(stays, heat + warmth, decay * heat + (1.0 + rest) * warmth)
            if squares_ptr is not None:
                squares = add_to_rest(stays, decay * decay, squares)
            if logit_sum_ptr is not None:
                logit_sum += tl.where(valid, z, 0.0)
            if bag_ptr is not None:
                weight = load_weight(weights_ptr, columns, valid)
                bag = tl.where(stays, bag + decay * weight, decay * bag + weight)
            if offsets_ptr is not None:
                weight = load_weight(weights_ptr, columns, valid)
                offsets += weighted_gap(tl.where(stays, weight, seen), gap)
                seen += weight
            if index_ptr is not None:
                order = tl.where(stays, order, columns)
            rest = add_to_rest(stays, decay, rest)
            top = tl.maximum(top, z)

        # Where no index is kept, the lowest lane breaks ties: any one of them may stand for the
        # maximum.
        top, rest, order, heat, squares, logit_sum, bag, seen, offsets = collapse(
            top,
            rest,
            order,
            heat,
            squares,
            logit_sum,
            bag,
            seen,
            offsets,
            heat_ptr,
            squares_ptr,
            logit_sum_ptr,
            bag_ptr,
            offsets_ptr,
        )
        out = row * tl.num_programs(1) + segment + tl.zeros([1], tl.int32)
        tl.store(top_ptr + out, top)
        tl.store(rest_ptr + out, rest)
        if index_ptr is not None:
            tl.store(index_ptr + out, order)
        if heat_ptr is not None:
            tl.store(heat_ptr + out, heat)
        if squares_ptr is not None:
            tl.store(squares_ptr + out, squares)
        if logit_sum_ptr is not None:
            tl.store(logit_sum_ptr + out, logit_sum)
        if bag_ptr is not None:
            tl.store(bag_ptr + out, bag)
        if offsets_ptr is not None:
            tl.store(seen_ptr + out, seen)
            tl.store(offsets_ptr + out, offsets)


@triton.jit(do_not_specialize=COUNTS)
def vocab_stats_merge_kernel(
    logits_ptr,  # [N, V] as in vocab_stats_kernel
    labels_ptr,  # [N] int64 or None
    contrast_ptr,  # [N] int64 or None
    weights_ptr,  # [V] or None
    top_ptr,  # [N, S] partial states as vocab_stats_kernel wrote them
    rest_ptr,
    index_ptr,
    heat_ptr,
    squares_ptr,
    logit_sum_ptr,
    bag_ptr,
    seen_ptr,
    offsets_ptr,
    row_max_ptr,  # [N] fp32, kept for the backward
    row_rest_ptr,  # [N] fp32, kept for the backward
    lse_out,  # [N] fp32 facts, each or None
    label_logit_out,
    contrast_logit_out,
    logp_out,
    entropy_out,
    logit_sum_out,
    logp_sum_out,
    sum_sq_probs_out,
    bag_mass_out,
    argmax_out,  # [N] int64 or None
    n_segments,
    vocab_size,
    inner_size,
    outer_stride,
    inner_stride,
    base_shift,
    softcap,
    logit_scale,
    VEC: tl.constexpr,
    LANES: tl.constexpr,  # at least n_segments + 2 * VEC
):
    row = tl.program_id(0).to(tl.int64)
    out = row + tl.zeros([1], tl.int32)
    counts = row_counts(labels_ptr, row)
    start = base_shift + row_offset(row, inner_size, outer_stride, inner_stride)
    shift = (start % VEC).to(tl.int32)
    row_ptr = logits_ptr + start // VEC * VEC
    lanes = tl.arange(0, LANES)
    is_segment = lanes < tl.where(counts, n_segments, 0)
    partial = row * n_segments + lanes
    visible = tl.where(counts, vocab_size, 0)
    positions, is_edge = edge_columns(lanes - n_segments, shift, visible, VEC)
    columns = positions - shift

    edge = tl.load(row_ptr + positions, mask=is_edge, other=float("-inf")).to(tl.float32)
    edge = cap_logits(edge, is_edge, softcap, logit_scale)
    top = tl.load(top_ptr + partial, mask=is_segment, other=LOWEST)
    top = tl.where(is_segment, top, tl.maximum(edge, LOWEST))
    nothing = tl.where(edge == float("-inf"), EMPTY, 0.0)
    rest = tl.load(rest_ptr + partial, mask=is_segment, other=0.0)
    rest = tl.where(is_segment, rest, nothing)
    rest = tl.where(edge == edge, rest, edge)  # the maximum above has lost a NaN
    order = NOWHERE + lanes
    heat = tl.zeros([LANES], tl.float32)
    squares = tl.zeros([LANES], tl.float32)
    logit_sum = tl.zeros([LANES], tl.float32)
    bag = tl.zeros([LANES], tl.float32)
    seen = tl.zeros([LANES], tl.float32)
    offsets = tl.zeros([LANES], tl.float32)
    if index_ptr is not None:
        index = tl.load(index_ptr + partial, mask=is_segment, other=0)
        order = tl.where(is_segment, index, tl.where(is_edge, columns, order))
    if heat_ptr is not None:
        heat = tl.load(heat_ptr + partial, mask=is_segment, other=0.0)
    if squares_ptr is not None:
        squares = tl.load(squares_ptr + partial, mask=is_segment, other=0.0)
        squares = tl.where(is_segment, squares, nothing)
    if logit_sum_ptr is not None:
        logit_sum = tl.load(logit_sum_ptr + partial, mask=is_segment, other=0.0)
        logit_sum += tl.where(is_edge, edge, 0.0)
    if bag_ptr is not None:
        bag = tl.load(bag_ptr + partial, mask=is_segment, other=0.0)
        bag += load_weight(weights_ptr, columns, is_edge)
    if offsets_ptr is not None:
        seen = tl.load(seen_ptr + partial, mask=is_segment, other=0.0)
        seen += load_weight(weights_ptr, columns, is_edge)
        offsets = tl.load(offsets_ptr + partial, mask=is_segment, other=0.0)

    top, rest, order, heat, squares, logit_sum, bag, seen, offsets = collapse(
        top,
        rest,
        order,
        heat,
        squares,
        logit_sum,
        bag,
        seen,
        offsets,
        heat_ptr,
        squares_ptr,
        logit_sum_ptr,
        bag_ptr,
        offsets_ptr,
    )
    top, rest, lse = finish(top, rest)
    order = tl.where(order < vocab_size, order, 0)  # NaN, or -inf throughout
    endless = tl.abs(top) == float("inf")
    squares = tl.where(endless, float("nan"), squares)
    level = tl.where(endless, 0.0, top)  # inf - inf would warn where NaN is right
    log_norm = log1p(rest)
    put(row_max_ptr, out, top, counts)
    put(row_rest_ptr, out, rest, counts)
    put(lse_out, out, lse, counts)
    if label_logit_out is not None or logp_out is not None:
        label = tl.load(labels_ptr + out)
        z_label = load_logit(row_ptr + shift, label, vocab_size, softcap, logit_scale)
        put(label_logit_out, out, z_label, counts)
        put(logp_out, out, (z_label - level) - log_norm, counts)
    if contrast_logit_out is not None:
        contrast = tl.where(counts, tl.load(contrast_ptr + out), IGNORED)
        z_contrast = load_logit(row_ptr + shift, contrast, vocab_size, softcap, logit_scale)
        put(contrast_logit_out, out, z_contrast, counts)
    put(entropy_out, out, log_norm - heat / (1.0 + rest), counts)
    put(logit_sum_out, out, logit_sum, counts)
    put(logp_sum_out, out, offsets - seen * log_norm, counts)
    put(sum_sq_probs_out, out, log1p(squares) - 2.0 * log_norm, counts)
    put(bag_mass_out, out, bag / (1.0 + rest), counts)
    put(argmax_out, out, order.to(tl.int64), counts)


@triton.jit
def load_coefficient(pointer, row):
    """A row's coefficient, and 0 where that term is absent."""
    if pointer is not None:
        return tl.load(pointer + row)
    else:
        return 0.0


@triton.jit
def load_label(pointer, row, vocab_size):
    """A row's label, and whether it is one that nobody should have passed: then it is 0, where its
    coefficients put NaN."""
    label = tl.load(pointer + row)
    is_bad = (label < 0) | (label >= vocab_size)
    is_bad = is_bad & (label != IGNORED) & (label != ELSEWHERE)
    return tl.where(is_bad, 0, label).to(tl.int32), is_bad


@triton.jit
def logits_gradient(
    u, softcap, logit_scale, columns, valid, top, scale, label, contrast, weights_ptr,
    on_p, on_p_gap, on_p_squared, on_p_weight, on_one, on_weight, at_label, on_label, on_contrast,
    on_p_ptr, on_p_gap_ptr, on_p_squared_ptr, on_p_weight_ptr, on_one_ptr, on_weight_ptr,
    at_label_ptr, on_label_ptr, on_contrast_ptr,
    EXP: tl.constexpr,
):  # fmt: skip
    """dlogits of these columns; where a pointer is None its coefficient has no part in it."""
    z = cap_logits(u, valid, softcap, logit_scale)
    gap = z - top
    e = EXP(gap)
    p = e * scale
    dz = tl.zeros_like(z)
    if on_p_ptr is not None:
        dz = e * (scale * on_p)
    if at_label_ptr is not None:
        dz = tl.where(columns == label, at_label, dz)
    if on_p_gap_ptr is not None:
        dz += decayed_gap(p, gap) * on_p_gap
    if on_p_squared_ptr is not None:
        dz += p * p * on_p_squared
    if on_p_weight_ptr is not None or on_weight_ptr is not None:
        dz += load_weight(weights_ptr, columns, valid) * (p * on_p_weight + on_weight)
    if on_one_ptr is not None:
        dz += on_one
    if on_label_ptr is not None:
        dz += tl.where(columns == label, on_label, 0.0)
    if on_contrast_ptr is not None:
        dz += tl.where(columns == contrast, on_contrast, 0.0)
    return cap_gradient(dz, u, softcap, logit_scale)


@triton.jit(do_not_specialize=COUNTS)
def vocab_stats_backward_kernel(
    dlogits_ptr,  # [N, V], 16-byte aligned; row 0 starts dlogits_shift elements later
    logits_ptr,  # [N, V] as in vocab_stats_kernel
    labels_ptr,  # [N] int64 or None
    contrast_ptr,  # [N] int64 or None
    weights_ptr,  # [V] or None
    row_max_ptr,  # [N] fp32
    row_rest_ptr,  # [N] fp32
    on_p_ptr,  # [N] fp32 coefficients, each or None: of p
    on_p_gap_ptr,  # of p * (z - max)
    on_p_squared_ptr,  # of p^2
    on_p_weight_ptr,  # of p * weight
    on_one_ptr,  # of 1
    on_weight_ptr,  # of weight
    at_label_ptr,  # what p * on_p becomes at the label, where that would cancel
    on_label_ptr,  # of [v = label]
    on_contrast_ptr,  # of [v = contrast label]
    vocab_size,
    inner_size,
    dlogits_outer_stride,
    dlogits_inner_stride,
    dlogits_shift,
    outer_stride,
    inner_stride,
    base_shift,
    softcap,  # fp32: the rows hold a head's product, capped here; or None
    logit_scale,  # fp32: and multiplied by this; or None
    EXP: tl.constexpr,  # plain_exp or flushed_exp
    VEC: tl.constexpr,
    SAME_SHIFT: tl.constexpr,  # logits and dlogits rows are equally far from alignment
    SEGMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    segment = tl.program_id(1)
    out_start = dlogits_shift
    out_start += row_offset(row, inner_size, dlogits_outer_stride, dlogits_inner_stride)
    shift = (out_start % VEC).to(tl.int32)
    out_ptr = dlogits_ptr + out_start // VEC * VEC
    first, last = whole_vectors(shift, vocab_size, VEC)
    stop = tl.minimum((segment + 1) * SEGMENT, last)
    lanes = tl.arange(0, BLOCK)
    edge_lanes = tl.arange(0, 2 * VEC)
    edges, is_edge = edge_columns(edge_lanes, shift, vocab_size, VEC)
    if row_counts(labels_ptr, row):
        start = base_shift + row_offset(row, inner_size, outer_stride, inner_stride)
        if SAME_SHIFT:
            row_ptr = logits_ptr + start // VEC * VEC
        else:
            row_ptr = logits_ptr + (start - shift)
        top = tl.maximum(tl.minimum(tl.load(row_max_ptr + row), -LOWEST), LOWEST)
        scale = 1.0 / (1.0 + tl.load(row_rest_ptr + row))
        on_p = load_coefficient(on_p_ptr, row)
        on_p_gap = load_coefficient(on_p_gap_ptr, row)
        on_p_squared = load_coefficient(on_p_squared_ptr, row)
        on_p_weight = load_coefficient(on_p_weight_ptr, row)
        on_one = load_coefficient(on_one_ptr, row)
        on_weight = load_coefficient(on_weight_ptr, row)
        at_label = load_coefficient(at_label_ptr, row)
        on_label = load_coefficient(on_label_ptr, row)
        on_contrast = load_coefficient(on_contrast_ptr, row)
        label = -1
        contrast = -1
        if labels_ptr is not None:
            label, is_bad = load_label(labels_ptr, row, vocab_size)
            scale = tl.where(is_bad, float("nan"), scale)
            on_label = tl.where(is_bad, float("nan"), on_label)
        if contrast_ptr is not None:
            contrast, is_bad = load_label(contrast_ptr, row, vocab_size)
            on_contrast = tl.where(is_bad, float("nan"), on_contrast)
        for block in range(segment * SEGMENT, stop, BLOCK):
            positions = block + lanes
            valid = (positions >= first) & (positions < last)
            u = tl.load(row_ptr + positions, mask=valid, other=float("-inf")).to(tl.float32)
            dz = logits_gradient(
                u, softcap, logit_scale, positions - shift, valid, top, scale,
                label, contrast, weights_ptr,
                on_p, on_p_gap, on_p_squared, on_p_weight, on_one, on_weight,
                at_label, on_label, on_contrast,
                on_p_ptr, on_p_gap_ptr, on_p_squared_ptr, on_p_weight_ptr, on_one_ptr,
                on_weight_ptr, at_label_ptr, on_label_ptr, on_contrast_ptr,
                EXP,
            )  # fmt: skip
            tl.store(out_ptr + positions, dz.to(dlogits_ptr.dtype.element_ty), mask=valid)
        if segment == 0:
            u = tl.load(row_ptr + edges, mask=is_edge, other=float("-inf")).to(tl.float32)
            dz = logits_gradient(
                u, softcap, logit_scale, edges - shift, is_edge, top, scale,
                label, contrast, weights_ptr,
                on_p, on_p_gap, on_p_squared, on_p_weight, on_one, on_weight,
                at_label, on_label, on_contrast,
                on_p_ptr, on_p_gap_ptr, on_p_squared_ptr, on_p_weight_ptr, on_one_ptr,
                on_weight_ptr, at_label_ptr, on_label_ptr, on_contrast_ptr,
                EXP,
            )  # fmt: skip
            tl.store(out_ptr + edges, dz.to(dlogits_ptr.dtype.element_ty), mask=is_edge)
    else:
        for block in range(segment * SEGMENT, stop, BLOCK):
            positions = block + lanes
            valid = (positions >= first) & (positions < last)
            zeros = tl.zeros([BLOCK], dlogits_ptr.dtype.element_ty)
            tl.store(out_ptr + positions, zeros, mask=valid)
        if segment == 0:
            zeros = tl.zeros([2 * VEC], dlogits_ptr.dtype.element_ty)
            tl.store(out_ptr + edges, zeros, mask=is_edge)
