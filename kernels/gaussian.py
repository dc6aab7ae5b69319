"""Gaussians with a mean and a standard deviation per feature: per row the squared Mahalanobis
distance and the log-determinant, their gradients, and the noisy rows x + mean + std * eps.

Rows are addressed by three indices with a stride each, 0 where a tensor is broadcast along one.
The noise is a function of the seed and of where an element lies, so that nothing of it is kept.
Rows outside the mask are not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .row_moments import load_upstream


@triton.jit
def load_rows(pointer, row, columns, valid, keep, other, FEATURES: tl.constexpr):
    """Features as fp32; `other` where they do not count, and of a tensor that is None.

    Where the mask is one of features all are loaded: a load that picks some is not a wide one.
    """
    if pointer is not None:
        if FEATURES:
            values = tl.load(pointer + row + columns, mask=valid, other=0.0).to(tl.float32)
            return tl.where(keep, values, other)
        else:
            return tl.load(pointer + row + columns, mask=keep, other=other).to(tl.float32)
    else:
        return other


@triton.jit
def visible_in(mask_ptr, mask_row, hidden_size, FEATURES: tl.constexpr):
    """How many features of a row a mask of rows leaves: all or none."""
    visible = hidden_size
    if not FEATURES:
        if mask_ptr is not None:
            visible = tl.where(tl.load(mask_ptr + mask_row) != 0, hidden_size, 0)
    return visible


@triton.jit
def kept(mask_ptr, mask_row, visible, columns, valid, FEATURES: tl.constexpr):
    """Which features count: those of a row that does, or one by one."""
    if FEATURES:
        return valid & (tl.load(mask_ptr + mask_row + columns, mask=valid, other=0) != 0)
    else:
        return valid & (columns < visible)


@triton.jit
def row_at(i, j, k, stride_i, stride_j, stride_k):
    """Where row (i, j, k) starts."""
    return i * stride_i + j * stride_j + k * stride_k


@triton.jit
def gaussian_stats_kernel(
    x_ptr,  # [I, J, K, D], like the four below it; None where the distance is not wanted
    mean_ptr,  # or None: 0
    location_ptr,  # or None: 0
    std_ptr,
    mask_ptr,  # bool [I, J, K, D], or of stride 0 within a row, or None: everything counts
    mahalanobis_ptr,  # [I, J, K] fp32 sum of ((x - location - mean) / std)^2, or None
    log_det_ptr,  # [I, J, K] fp32 sum of log(std), or None
    hidden_size,
    size_j,
    size_k,
    x_i,  # strides of the rows
    x_j,
    x_k,
    mean_i,
    mean_j,
    mean_k,
    location_i,
    location_j,
    location_k,
    std_i,
    std_j,
    std_k,
    mask_i,
    mask_j,
    mask_k,
    FEATURES: tl.constexpr,  # the mask has a value per feature
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = row % size_k
    j = row // size_k % size_j
    i = row // size_k // size_j
    x_row = row_at(i, j, k, x_i, x_j, x_k)
    mean_row = row_at(i, j, k, mean_i, mean_j, mean_k)
    location_row = row_at(i, j, k, location_i, location_j, location_k)
    std_row = row_at(i, j, k, std_i, std_j, std_k)
    mask_row = row_at(i, j, k, mask_i, mask_j, mask_k)
    lanes = tl.arange(0, BLOCK)
    mahalanobis = tl.zeros([BLOCK], tl.float32)
    log_det = tl.zeros([BLOCK], tl.float32)
    visible = visible_in(mask_ptr, mask_row, hidden_size, FEATURES)
    for block in range(0, visible, BLOCK):
        columns = block + lanes
        valid = columns < hidden_size
        keep = kept(mask_ptr, mask_row, visible, columns, valid, FEATURES)
        std = load_rows(std_ptr, std_row, columns, valid, keep, 1.0, FEATURES)
        if mahalanobis_ptr is not None:
            d = load_rows(x_ptr, x_row, columns, valid, keep, 0.0, FEATURES)
            d -= load_rows(location_ptr, location_row, columns, valid, keep, 0.0, FEATURES)
            d -= load_rows(mean_ptr, mean_row, columns, valid, keep, 0.0, FEATURES)
            z = tl.div_rn(d, std)
            mahalanobis += z * z
        if log_det_ptr is not None:
            log_det += tl.log(std)
    if mahalanobis_ptr is not None:
        tl.store(mahalanobis_ptr + row, tl.sum(mahalanobis))
    if log_det_ptr is not None:
        tl.store(log_det_ptr + row, tl.sum(log_det))


@triton.jit
def store_rows(pointer, row, columns, valid, values):
    if pointer is not None:
        tl.store(pointer + row + columns, values.to(pointer.dtype.element_ty), mask=valid)


@triton.jit
def gaussian_stats_backward_kernel(
    dx_ptr,  # rows [N, D] contiguous, like the three below it, each or None
    dmean_ptr,
    dlocation_ptr,
    dstd_ptr,
    x_ptr,  # as in gaussian_stats_kernel
    mean_ptr,
    location_ptr,
    std_ptr,
    mask_ptr,
    on_mahalanobis_ptr,  # [I, J, K] upstream gradients, each or None
    on_log_det_ptr,
    hidden_size,
    size_i,  # of the rows of the gradients: 1 where they are summed over an index
    size_j,
    size_k,
    summed_i,  # how many are summed there; 1 elsewhere
    summed_j,
    summed_k,
    x_i,
    x_j,
    x_k,
    mean_i,
    mean_j,
    mean_k,
    location_i,
    location_j,
    location_k,
    std_i,
    std_j,
    std_k,
    mask_i,
    mask_j,
    mask_k,
    FEATURES: tl.constexpr,
    SUMMED: tl.constexpr,  # some summed_* is not 1
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    own_k = row % size_k
    own_j = row // size_k % size_j
    own_i = row // size_k // size_j
    lanes = tl.arange(0, BLOCK)
    own_mask = row_at(own_i, own_j, own_k, mask_i, mask_j, mask_k)
    visible = visible_in(mask_ptr, own_mask, hidden_size, FEATURES)
    on_mahalanobis = load_upstream(on_mahalanobis_ptr, row)
    on_log_det = load_upstream(on_log_det_ptr, row)
    for block in range(0, hidden_size, BLOCK):
        columns = block + lanes
        valid = columns < hidden_size
        pull = tl.zeros([BLOCK], tl.float32)
        dstd = tl.zeros([BLOCK], tl.float32)
        for turn in range(0, summed_i * summed_j * summed_k):
            k = own_k + turn % summed_k
            j = own_j + turn // summed_k % summed_j
            i = own_i + turn // summed_k // summed_j
            mask_row = row_at(i, j, k, mask_i, mask_j, mask_k)
            if SUMMED:  # else they are those above, once for all blocks
                at = (i * (size_j * summed_j) + j) * (size_k * summed_k) + k
                visible = visible_in(mask_ptr, mask_row, hidden_size, FEATURES)
                on_mahalanobis = load_upstream(on_mahalanobis_ptr, at)
                on_log_det = load_upstream(on_log_det_ptr, at)
            keep = kept(mask_ptr, mask_row, visible, columns, valid, FEATURES)
            std_row = row_at(i, j, k, std_i, std_j, std_k)
            std = load_rows(std_ptr, std_row, columns, valid, keep, 1.0, FEATURES)
            slope = tl.zeros([BLOCK], tl.float32)
            if on_mahalanobis_ptr is not None:
                x_row = row_at(i, j, k, x_i, x_j, x_k)
                mean_row = row_at(i, j, k, mean_i, mean_j, mean_k)
                location_row = row_at(i, j, k, location_i, location_j, location_k)
                d = load_rows(x_ptr, x_row, columns, valid, keep, 0.0, FEATURES)
                d -= load_rows(location_ptr, location_row, columns, valid, keep, 0.0, FEATURES)
                d -= load_rows(mean_ptr, mean_row, columns, valid, keep, 0.0, FEATURES)
                z = tl.div_rn(d, std)
                force = tl.div_rn(2.0 * on_mahalanobis * z, std)
                # A row of upstream NaN or inf must not reach what the mask leaves out.
                pull += tl.where(keep, force, 0.0)
                slope -= force * z
            if on_log_det_ptr is not None:
                slope += tl.div_rn(tl.zeros([BLOCK], tl.float32) + on_log_det, std)
            dstd += tl.where(keep, slope, 0.0)
        store_rows(dx_ptr, row * hidden_size, columns, valid, pull)
        store_rows(dmean_ptr, row * hidden_size, columns, valid, -pull)
        store_rows(dlocation_ptr, row * hidden_size, columns, valid, -pull)
        store_rows(dstd_ptr, row * hidden_size, columns, valid, dstd)


@triton.jit
def normal_pair(first, second):
    """Two independent normals from two random words (Box-Muller), to a few ulp.

    The radius comes from a number in (0, 1], never 0; the angle from one in [-1, 1) half turns,
    reduced exactly to a quarter turn around 0, for libdevice's sine spills registers.
    """
    uniform = first.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(-2.0 * tl.log(uniform))
    turn = second.to(tl.int32, bitcast=True).to(tl.float32) * 4.656612873077393e-10
    quarter = tl.floor(2.0 * turn + 0.5)
    near = turn - 0.5 * quarter
    w = near * near
    sine = 3.1415927410125732 + w * (
        -5.167707920074463 + w * (2.5497610569000244 - w * 0.5890122056007385)
    )
    sine *= near
    cosine = 1.0 + w * (
        -4.934802055358887
        + w * (4.058706760406494 + w * (-1.3350359201431274 + w * 0.23126092553138733))
    )
    quadrant = quarter.to(tl.int32) & 3
    swapped = (quadrant & 1) != 0
    x = tl.where(swapped, sine, cosine)
    y = tl.where(swapped, cosine, sine)
    x = tl.where((quadrant == 1) | (quadrant == 2), -x, x)
    y = tl.where(quadrant >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(seed, counters):
    """Four normals a counter, one after the other."""
    low = (counters & 0xFFFFFFFF).to(tl.uint32)
    high = (counters >> 32).to(tl.uint32)
    zero = low * 0
    first, second, third, fourth = tl.philox(seed, low, high, zero, zero)
    a, b = normal_pair(first, second)
    c, d = normal_pair(third, fourth)
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def cloak_kernel(
    out_ptr,  # [N, D] contiguous
    x_ptr,  # [I, J, K, D], like the two below it
    mean_ptr,
    std_ptr,
    mask_ptr,  # as in gaussian_stats_kernel
    seed_ptr,  # int64
    hidden_size,
    size_j,
    size_k,
    x_i,
    x_j,
    x_k,
    mean_i,
    mean_j,
    mean_k,
    std_i,
    std_j,
    std_k,
    mask_i,
    mask_j,
    mask_k,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,  # D is a multiple of 4: no four normals belong to two rows
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = row % size_k
    j = row // size_k % size_j
    i = row // size_k // size_j
    x_row = row_at(i, j, k, x_i, x_j, x_k)
    mean_row = row_at(i, j, k, mean_i, mean_j, mean_k)
    std_row = row_at(i, j, k, std_i, std_j, std_k)
    mask_row = row_at(i, j, k, mask_i, mask_j, mask_k)
    visible = visible_in(mask_ptr, mask_row, hidden_size, FEATURES)
    seed = tl.load(seed_ptr)
    first = row * hidden_size // 4
    shift = 0 if ALIGNED else row * hidden_size % 4
    lanes = tl.arange(0, BLOCK)
    fours = tl.arange(0, BLOCK // 4)
    for block in range(0, hidden_size + shift, BLOCK):
        columns = block + lanes - shift
        valid = columns < hidden_size
        if not ALIGNED:
            valid &= columns >= 0
        keep = kept(mask_ptr, mask_row, visible, columns, valid, FEATURES)
        x = tl.load(x_ptr + x_row + columns, mask=valid, other=0.0).to(tl.float32)
        mean = load_rows(mean_ptr, mean_row, columns, valid, keep, 0.0, FEATURES)
        std = load_rows(std_ptr, std_row, columns, valid, keep, 0.0, FEATURES)
        noise = mean + std * normals(seed, first + block // 4 + fours)
        store_rows(out_ptr, row * hidden_size, columns, valid, tl.where(keep, x + noise, x))


@triton.jit
def cloak_backward_kernel(
    dmean_ptr,  # [N, D] contiguous, each or None
    dstd_ptr,
    grad_ptr,  # [I, J, K, D]
    mask_ptr,
    seed_ptr,
    hidden_size,
    size_j,
    size_k,
    grad_i,
    grad_j,
    grad_k,
    mask_i,
    mask_j,
    mask_k,
    FEATURES: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = row % size_k
    j = row // size_k % size_j
    i = row // size_k // size_j
    grad_row = row_at(i, j, k, grad_i, grad_j, grad_k)
    mask_row = row_at(i, j, k, mask_i, mask_j, mask_k)
    visible = visible_in(mask_ptr, mask_row, hidden_size, FEATURES)
    seed = tl.load(seed_ptr)
    first = row * hidden_size // 4
    shift = 0 if ALIGNED else row * hidden_size % 4
    lanes = tl.arange(0, BLOCK)
    fours = tl.arange(0, BLOCK // 4)
    for block in range(0, hidden_size + shift, BLOCK):
        columns = block + lanes - shift
        valid = columns < hidden_size
        if not ALIGNED:
            valid &= columns >= 0
        keep = kept(mask_ptr, mask_row, visible, columns, valid, FEATURES)
        grad = load_rows(grad_ptr, grad_row, columns, valid, keep, 0.0, FEATURES)
        store_rows(dmean_ptr, row * hidden_size, columns, valid, grad)
        if dstd_ptr is not None:
            slope = grad * normals(seed, first + block // 4 + fours)
            store_rows(dstd_ptr, row * hidden_size, columns, valid, slope)
