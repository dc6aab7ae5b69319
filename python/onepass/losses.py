"""The headline losses: pure functions over the per-row facts that the ops return.

Each is written once, in plain torch, for [...] rows; masks, caps, schedules and reductions are
ordinary tensor code that autograd differentiates, and the ops' one backward turns the row gradients
back into logits or hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .ops._check import (
    IGNORED,
    check_choice,
    check_floating,
    check_labels,
    check_logits,
    check_number,
    check_rows_alike,
    check_same_device,
    check_tokens,
    check_weights,
    values_checked,
)
from .ops._dtensor import own_rows
from .ops._launch import IMPLS, accumulation_dtype
from .ops._together import together
from .ops.row_moments import MOMENTS, RowMoments, row_moments
from .ops.vocab_pair_stats import check_probabilities, vocab_pair_stats
from .ops.vocab_stats import VocabStats, vocab_stats
from .reduce import REDUCTIONS, check_num_items, mean_divisor, reduce_rows, row_weights

CAP_FORMS = ("sigmoid", "zero_at_zero")
CAP_SCOPES = ("mean", "token")
NORMALIZATIONS = ("target", "target_sq", "unit", "dim")


def check_target(
    target: object, logits: Tensor, ignore_index: int, mask: Tensor | None = None
) -> Tensor:
    """Probabilities as they are, class indices as int64 with -100 in the rows to ignore and nowhere
    else. Raises for what is neither."""
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an int: got {type(ignore_index).__name__}")
    if isinstance(target, Tensor) and target.is_floating_point():
        check_floating("target", target)
        check_same_device("target", target, "logits", logits)
        if target.shape != logits.shape:
            raise ValueError(
                f"target probabilities must have the shape of the logits, {tuple(logits.shape)}: "
                f"got {tuple(target.shape)}"
            )
        if values_checked(target):
            check_probabilities("target", target, None if mask is None else mask != 0)
        dtype = accumulation_dtype(logits.dtype)
        same_width = (dtype == torch.float64) == (target.dtype == torch.float64)
        return target if same_width else target.to(dtype)
    target = check_tokens("target", own_rows(target, logits), logits).to(torch.int64)
    if mask is not None:
        target = torch.where(mask != 0, target, ignore_index)
    if values_checked(target):
        check_labels("target", target, logits.shape[-1], ignore_index)
    if ignore_index == IGNORED:
        return target
    # A literal -100 is then a label out of range, not one to ignore.
    other = torch.where(target == IGNORED, -1, target)
    return torch.where(target == ignore_index, IGNORED, other)


def check_class_weights(name: str, weight: object, logits: Tensor) -> Tensor | None:
    """Class weights [V] in the accumulation dtype, after checking that they fit the logits."""
    if weight is None:
        return None
    check_floating(name, weight)
    assert isinstance(weight, Tensor)
    if weight.shape != logits.shape[-1:]:
        raise ValueError(
            f"{name} must hold one number for each of the {logits.shape[-1]} classes: "
            f"got shape {tuple(weight.shape)}"
        )
    check_weights(name, weight, weight.shape)
    check_same_device(name, weight, "input", logits)
    return weight.to(accumulation_dtype(logits.dtype))


def label_losses(
    logits: Tensor,
    target: Tensor,  # class indices, -100 to ignore
    *,
    label_smoothing: float,
    class_weights: Tensor | None,
    impl: str,
    mask: Tensor | None = None,
    also: tuple[str, ...] = (),
    row_weights: Tensor | None = None,
) -> tuple[Tensor, VocabStats]:
    """Cross-entropy of every row, 0 where `target` is -100 or `mask` is 0, and the facts that it
    was made of, with those that `also` names. `row_weights`: see token_losses."""
    wanted = ["logp"]
    if label_smoothing:
        wanted.append("logp_sum")
    on_logp: Tensor | float = -(1 - label_smoothing)
    if class_weights is not None:
        on_logp = on_logp * class_weights[target.clamp(0, logits.shape[-1] - 1)]
    on_sum = -label_smoothing / logits.shape[-1]
    shares = None
    if row_weights is not None and set(also) <= {"argmax"}:
        shares = {"logp": on_logp * row_weights, "logp_sum": on_sum * row_weights}
        shares = {fact: shares[fact] for fact in wanted}
    stats = vocab_stats(
        logits,
        target,
        bag_weights=class_weights,
        mask=mask,
        want=(*wanted, *also),
        shares=shares,
        impl=impl,
    )
    losses = on_logp * stats.logp
    if label_smoothing:
        losses = losses + on_sum * stats.logp_sum
    return losses, stats


def token_losses(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    class_weights: Tensor | None,
    impl: str,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of every row, 0 where `target` is -100 or `mask` is 0; integer targets or
    probabilities. `row_weights` [...]: what the gradient of every row's loss will be a common
    multiple of, where the caller knows."""
    also = ("lse",) if z_loss else ()
    if target.is_floating_point():
        if label_smoothing:
            wide = target.to(accumulation_dtype(logits.dtype))
            target = (1 - label_smoothing) * wide + label_smoothing / logits.shape[-1]
        if class_weights is not None:
            target = target * class_weights
        want = ("cross_entropy", *also)
        shares = None
        if row_weights is not None and not z_loss:
            shares = {"cross_entropy": row_weights}
        pair = vocab_pair_stats(
            logits, target_probs=target, mask=mask, want=want, shares=shares, impl=impl
        )
        loss, lse = pair.cross_entropy, pair.lse
    else:
        loss, stats = label_losses(
            logits,
            target,
            mask=mask,
            label_smoothing=label_smoothing,
            class_weights=class_weights,
            also=also,
            row_weights=row_weights,
            impl=impl,
        )
        lse = stats.lse
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss


def class_shares(target: Tensor, class_weights: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What every row counts in torch's mean: the weight of its label, 0 for -100."""
    share = (target != IGNORED).to(dtype)
    if class_weights is None:
        return share
    return share * class_weights[target.clamp(0, class_weights.shape[0] - 1)]


def reduce_classes(
    losses: Tensor, target: Tensor, class_weights: Tensor | None, reduction: str
) -> Tensor:
    """torch's reductions of a classification's losses: the mean is over the weights of the labels
    that count (-100 does not), over all rows where `target` holds probabilities."""
    if reduction != "mean" or target.is_floating_point():
        return reduce_rows(losses, reduction=reduction)
    share = class_shares(target, class_weights, losses.dtype)
    nothing = (share == 0).all()
    return torch.where(nothing, 0.0, losses.sum() / torch.where(nothing, 1.0, share.sum()))


@together
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    impl: str = "auto",
) -> Tensor:
    """`torch.nn.functional.cross_entropy` in one pass over the logits: same arguments, same
    results, save two.

    A mean over rows that are all ignored (or all of weight 0) is 0 with zero gradients, where torch
    gives NaN; and the result is float32 for bfloat16 and float16 logits, as in torch under
    autocast.

    Args:
        input: logits [C], [N, C] or [N, C, d1, ...]; float32, bfloat16, float16, float64.
        target: class indices [], [N] or [N, d1, ...], or probabilities of the shape of `input`.
        weight: [C] class weights. size_average, reduce: torch's deprecated twins of `reduction`.
        ignore_index: a label that does not count; only for class indices.
        reduction: "mean" (over the weights of the counted labels), "sum" or "none".
        label_smoothing: share of the target spread evenly over the classes.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.
        IndexError: a label outside the classes.

    Formula: loss_i = -w_y log p_y; smoothed: (1 - s) loss_i - s / C sum_c w_c log p_c.
    """
    check_floating("input", input)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    if input.dim() == 0 or input.shape[min(1, input.dim() - 1)] == 0:
        shape = tuple(input.shape) or "a scalar"
        raise ValueError(f"input must be [C], [N, C] or [N, C, d1, ...] with C > 0: got {shape}")
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    weight = check_class_weights("weight", weight, logits)
    if isinstance(target, Tensor) and target.is_floating_point():
        if isinstance(ignore_index, int) and ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} has no meaning for probabilities: leave it at -100"
            )
        target = target.movedim(1, -1) if target.dim() >= 3 else target
    target = check_target(target, logits, ignore_index)
    if weight is not None and weight.requires_grad and not target.is_floating_point():
        raise ValueError(
            "weight is differentiated for probabilities only: pass weight.detach() with labels"
        )
    losses = token_losses(
        logits,
        target,
        mask=None,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        class_weights=weight,
        impl=impl,
        row_weights=known_class_weights(logits, target, weight, reduction),
    )
    return reduce_classes(losses, target, weight, reduction)


@together
def masked_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    max_loss: float | None = None,
    ce_scaling_factor: float = 1.0,
    cap_form: str = "sigmoid",
    cap_scope: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    ignore_index: int = -100,
    num_items: Tensor | float | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Cross-entropy over the rows that count, with an optional sigmoid cap; 0-dim, or [...] for
    "none".

    Args:
        logits: [..., V]. target: [...] token ids (ignore_index does not count), or [..., V]
            probabilities.
        mask: [...] bool, int or float; a float mask weighs the rows.
        max_loss: caps the loss with a sigmoid that saturates here; None: no cap, ce_scaling_factor
            unused.
        cap_form: "sigmoid" (max_loss * sigmoid(k * ce), max_loss / 2 at 0) or "zero_at_zero"
            (max_loss * (2 sigmoid(k * ce) - 1)), with k = ce_scaling_factor.
        cap_scope: "mean" caps the reduced loss, "token" every row before the reduction.
        label_smoothing: as in torch. z_loss: adds z_loss * lse^2 to every row, before any cap.
        num_items: divides the sum instead of the mask's sum (gradient accumulation); for "mean".
        reduction: "mean", "sum" or "none" (rows times mask; needs cap_scope="token" where there is
            a cap).
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit, NaN
        in the mask. IndexError: a label outside V.

    Formula: mean = sum(mask * ce) / max(sum(mask), 1).
    Source: Stained Glass Engine 2.8.1, jigsaw losses (compute_masked_cross_entropy).
    """
    check_logits(logits)
    check_choice("cap_form", cap_form, CAP_FORMS)
    check_choice("cap_scope", cap_scope, CAP_SCOPES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_number("z_loss", z_loss)
    check_num_items(num_items, reduction)
    check_cap(max_loss, ce_scaling_factor)
    if max_loss is not None and cap_scope == "mean" and reduction == "none":
        raise ValueError('reduction="none" has no mean to cap: pass cap_scope="token"')
    mask = own_rows(mask, logits)
    check_weights("mask", mask, logits.shape[:-1])
    if mask is not None:
        check_same_device("mask", mask, "logits", logits)
    target = check_target(target, logits, ignore_index, mask)
    counts = mask
    if not target.is_floating_point():
        labelled = target != IGNORED
        counts = labelled if mask is None else torch.where(labelled, mask, 0)
    weights = None if counts is None else row_weights(counts, accumulation_dtype(logits.dtype))
    divisor = None
    if reduction == "mean":
        rows = target[..., 0] if weights is None else weights
        divisor = mean_divisor(rows, weights, num_items)
    is_linear = max_loss is None or cap_scope == "mean"
    losses = token_losses(
        logits,
        target,
        mask=mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        class_weights=None,
        impl=impl,
        row_weights=known_weights(logits, weights, reduction, divisor) if is_linear else None,
    )
    if max_loss is not None and cap_scope == "token":
        losses = sigmoid_cap(losses, max_loss, ce_scaling_factor, cap_form)
    loss = reduce_rows(losses, weights, reduction=reduction, num_items=divisor)
    if max_loss is not None and cap_scope == "mean":
        loss = sigmoid_cap(loss, max_loss, ce_scaling_factor, cap_form)
    return loss


def check_cap(max_loss: object, ce_scaling_factor: object, name: str = "max_loss") -> None:
    """Raises unless the numbers make a cap, or `max_loss` is None."""
    check_number("ce_scaling_factor", ce_scaling_factor)
    if max_loss is not None:
        assert isinstance(ce_scaling_factor, (int, float))
        if ce_scaling_factor <= 0:
            raise ValueError(f"ce_scaling_factor must be above 0: got {ce_scaling_factor}")
        check_number(name, max_loss, hint=", or None for no cap")
        assert isinstance(max_loss, (int, float))
        if max_loss <= 0:
            raise ValueError(f"{name} must be positive, or None for no cap: got {max_loss}")


def known_weights(
    logits: Tensor, weights: Tensor | None, reduction: str, divisor: Tensor | float | None
) -> Tensor | None:
    """The rows' weights in a loss that is linear in them, the mean's divisor among them, so that
    gradients made ahead have nothing to be multiplied by but the loss's own upstream gradient; None
    where whole logits have no use for them."""
    if reduction == "none" or not hasattr(logits, "onepass_head"):
        return None
    if weights is None:
        weights = torch.ones((), dtype=accumulation_dtype(logits.dtype), device=logits.device)
    return weights if divisor is None else weights / divisor


def known_class_weights(
    logits: Tensor, target: Tensor, class_weights: Tensor | None, reduction: str
) -> Tensor | None:
    """The same for torch's reductions of a classification's losses."""
    if not hasattr(logits, "onepass_head"):
        return None
    divisor: Tensor | float | None = None
    if reduction == "mean" and target.is_floating_point():
        divisor = mean_divisor(target[..., 0], None, None)
    elif reduction == "mean":
        total = class_shares(target, class_weights, accumulation_dtype(logits.dtype)).sum()
        divisor = torch.where(total == 0, 1.0, total)
    return known_weights(logits, None, reduction, divisor)


def sigmoid_cap(
    loss: Tensor, max_loss: float, scaling_factor: float = 1.0, form: str = "sigmoid"
) -> Tensor:
    """`loss` [...] squeezed below `max_loss`: max_loss * sigmoid(k * loss), or that rescaled to be
    0 at 0, max_loss * (2 sigmoid(k * loss) - 1).

    From e = exp(-|x|) on, value and slope (e / (1 + e)^2, by autograd) keep their relative accuracy
    far into saturation, where torch's s (1 - s) is 0 from x = 17: a capped loss has a direction.
    """
    x = scaling_factor * loss
    size = torch.where(x >= 0, x, -x)  # unlike abs, with a slope of 1 at 0
    e = torch.exp(-size)
    if form == "sigmoid":
        return max_loss * (torch.where(x >= 0, 1.0, e) / (1 + e))
    # expm1 for the value near 0; far from it torch's derivative of expm1 has no digits left.
    squeezed = torch.where(size < 1, -torch.expm1(-size), 1 - e) / (1 + e)
    return max_loss * torch.where(x >= 0, squeezed, -squeezed)


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt, with gradient 0 at 0 instead of infinity: two equal rows are at rest, and masked rows
    are equal."""
    at_rest = x <= 0  # false for a NaN, which shall show
    return torch.where(at_rest, 0.0, torch.where(at_rest, 1.0, x).sqrt())


def masked_normalized_l2(
    x: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    normalization: str = "target",
    eps: float = 1e-6,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Normalized distance of every row of `x` from its target, over the rows that count; 0-dim, or
    [...].

    Args:
        x, target: [..., D] hidden states of one dtype; gradients flow to either side.
        mask: [...] bool, int or float (weights); rows of weight 0 are not read.
        normalization: "target" |x - t| / max(|t|, eps); "target_sq" its square; "unit" distance of
            the unit vectors, sqrt(2 - 2 cos) (a row shorter than eps is divided by eps); "dim"
            |x - t|^2 / D.
        reduction: "mean" (over the mask), "sum" or "none".
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit, NaN
        in the mask.

    Formula: mean = sum(mask * row) / max(sum(mask), 1). At x = t value and gradient are 0.
    Source: Stained Glass Engine 2.8.1, jigsaw losses (compute_masked_normalized_l2_loss).
    """
    check_choice("normalization", normalization, NORMALIZATIONS)
    want = wanted_moments(normalization)
    moments = hidden_moments(x, target, mask, reduction, eps, impl, want)
    rows = normalized_distances(moments, normalization, x.shape[-1], eps)
    return reduce_rows(rows, mask, reduction=reduction)


def wanted_moments(normalization: str) -> tuple[str, ...]:
    """What `normalized_distances` is made of."""
    return {"dim": ("dd",), "unit": MOMENTS}.get(normalization, ("dd", "yy"))


def normalized_distances(
    moments: RowMoments, normalization: str, hidden_size: int, eps: float = 1e-6
) -> Tensor:
    """The distance of every row of `x` from its target `y`, as `masked_normalized_l2` means it."""
    if normalization == "dim":
        return moments.dd / hidden_size
    if normalization == "unit":
        return safe_sqrt(unit_distance_squared(moments, eps))
    scale = safe_sqrt(moments.yy).clamp_min(eps)
    if normalization == "target":
        return safe_sqrt(moments.dd) / scale
    return moments.dd / scale.square()


def masked_inner_product(
    x: Tensor,
    target: Tensor,
    mask: Tensor | None = None,
    *,
    relu: bool = False,
    absolute: bool = False,
    eps: float = 0.0,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Inner product of the normalized rows of `x` and `target` (their cosine), over the rows that
    count.

    Args:
        x, target: [..., D] hidden states of one dtype; gradients flow to either side.
        mask: [...] bool, int or float (weights); rows of weight 0 are not read.
        relu: only positive cosines count (circuit breakers). absolute: their absolute value.
        eps: added to each norm; 0 gives the plain cosine, and 0 for a row of norm 0.
        reduction: "mean" (over the mask), "sum" or "none".
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit,
        relu with absolute, NaN in the mask.

    Formula: row = <x, t> / ((|x| + eps) (|t| + eps)); mean = sum(mask * row) / max(sum(mask), 1).
    Source: Zou et al. 2024, Circuit Breakers (arXiv 2406.04313).
    """
    if relu and absolute:
        raise ValueError("relu and absolute exclude each other: pass one of them")
    moments = hidden_moments(x, target, mask, reduction, eps, impl, ("xx", "yy", "xy"))
    rows = cosine_rows(moments, eps)
    if relu:
        rows = rows.relu()
    if absolute:
        rows = rows.abs()
    return reduce_rows(rows, mask, reduction=reduction)


def hidden_moments(
    x: Tensor,
    target: Tensor,
    mask: Tensor | None,
    reduction: str,
    eps: float,
    impl: str,
    want: Sequence[str],
) -> RowMoments:
    """row_moments, `want` of them, of one pair of tensors, after the checks that the hidden-state
    losses share."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("impl", impl, IMPLS)
    check_number("eps", eps, 0.0)
    check_rows_alike("x", x, "target", target)
    check_weights("mask", mask, x.shape[:-1])
    return row_moments(x, target, mask, want=want, impl=impl)


def cosine_rows(moments: RowMoments, eps: float = 0.0) -> Tensor:
    """<x, y> / ((|x| + eps) (|y| + eps)) of every row, 0 where that is 0 / 0."""
    norms = (safe_sqrt(moments.xx) + eps) * (safe_sqrt(moments.yy) + eps)
    return torch.where(norms == 0, 0.0, moments.xy / torch.where(norms == 0, 1.0, norms))


def unit_distance_squared(moments: RowMoments, eps: float) -> Tensor:
    """|x / max(|x|, eps) - y / max(|y|, eps)|^2 of every row: 2 - 2 cos, save for rows not longer
    than eps. They have no direction (a row of zeros lies 1 away from every other), so no gradient.
    """
    x_norm, y_norm = (safe_sqrt(square).clamp_min(eps) for square in (moments.xx, moments.yy))
    x_norm, y_norm = (torch.where(norm == 0, 1.0, norm) for norm in (x_norm, y_norm))
    short = moments.xx / x_norm.square() + moments.yy / y_norm.square()
    short = short - 2 * moments.xy / (x_norm * y_norm)
    no_direction = (x_norm <= eps) | (y_norm <= eps)
    return torch.where(no_direction, short.detach(), 2 * one_minus_cosine(moments, eps))


def one_minus_cosine(moments: RowMoments, eps: float = 0.0) -> Tensor:
    """1 - cos(x, y) of every row, to full relative accuracy near 0 for rows of nearly one length,
    where 1 - xy / (|x| |y|) is noise.

    0 where either row is not longer than `eps`: it has no direction. For parallel rows of lengths
    1 : c the error is about u (c - 1)^2 / c: the moments hold no more.

    Formula: (dd - (|x| - |y|)^2) / (2 |x| |y|), |x| - |y| = difference_of_squares / (|x| + |y|).
    """
    x_norm, y_norm = safe_sqrt(moments.xx), safe_sqrt(moments.yy)
    undefined = (x_norm <= eps) | (y_norm <= eps)
    gap = moments.difference_of_squares / torch.where(undefined, 1.0, x_norm + y_norm)
    product = torch.where(undefined, 1.0, x_norm * y_norm)
    distance = (moments.dd - gap.square()) / (2 * product)
    return torch.where(undefined, 0.0, distance)
