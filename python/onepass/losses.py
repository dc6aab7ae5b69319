"""The headline losses: pure functions over the per-row facts that the ops return.

Each is written once, in plain torch, for [...] rows; masks, caps, schedules and reductions are
ordinary tensor code that autograd differentiates, and the ops' one backward turns the row gradients
back into logits or hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops._launch import IGNORED, accumulation_dtype, check_choice, check_floating, values_checked
from .ops.row_moments import RowMoments, row_moments
from .ops.vocab_pair_stats import vocab_pair_stats
from .ops.vocab_stats import vocab_stats
from .reduce import REDUCTIONS, reduce_rows

CAP_FORMS = ("sigmoid", "zero_at_zero")
CAP_SCOPES = ("mean", "token")
NORMALIZATIONS = ("target", "target_sq", "unit", "dim")


def check_weights(name: str, weights: Tensor | None, rows: torch.Size) -> None:
    """ValueError for a mask or weights that do not fit the rows, or that hold NaN (read only where
    that is free)."""
    if weights is None:
        return
    if not isinstance(weights, Tensor) or weights.shape != rows:
        came = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise ValueError(f"{name} must have the shape of its rows, {tuple(rows)}: got {came}")
    if weights.is_floating_point() and values_checked(weights) and weights.isnan().any():
        raise ValueError(f"{name} holds NaN: rows that do not count have weight 0")


def check_smoothing(label_smoothing: float) -> None:
    """ValueError unless the smoothing is a share."""
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0.0 and 1.0: got {label_smoothing}")


def token_losses(
    logits: Tensor,
    target: Tensor,
    *,
    mask: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    class_weights: Tensor | None,
    impl: str,
) -> Tensor:
    """Cross-entropy of every row, 0 where `target` is -100 or `mask` is 0; integer targets or
    probabilities."""
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise ValueError(
                f"target probabilities must have the shape of logits, {tuple(logits.shape)}: "
                f"got {tuple(target.shape)}"
            )
        if label_smoothing:
            wide = target.to(accumulation_dtype(logits.dtype))
            target = (1 - label_smoothing) * wide + label_smoothing / logits.shape[-1]
        if class_weights is not None:
            target = target * class_weights
        want = ("cross_entropy", "lse") if z_loss else ("cross_entropy",)
        pair = vocab_pair_stats(logits, target_probs=target, mask=mask, want=want, impl=impl)
        loss, lse = pair.cross_entropy, pair.lse
    else:
        wanted = ["logp"]
        if z_loss:
            wanted.append("lse")
        if label_smoothing:
            wanted.append("logp_sum")
        stats = vocab_stats(
            logits, target, bag_weights=class_weights, mask=mask, want=wanted, impl=impl
        )
        loss, lse, smooth = -stats.logp, stats.lse, stats.logp_sum
        if class_weights is not None:
            loss = loss * class_weights.to(loss.dtype)[target.clamp(0, logits.shape[-1] - 1)]
        if label_smoothing:
            loss = (1 - label_smoothing) * loss - label_smoothing / logits.shape[-1] * smooth
    if z_loss:
        loss = loss + z_loss * lse.square()
    return loss


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
        ValueError: shapes, dtypes or options that do not fit. IndexError: a label outside the
            classes.

    Formula: loss_i = -w_y log p_y; smoothed: (1 - s) loss_i - s / C sum_c w_c log p_c.
    """
    check_floating("input", input)
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    check_choice("reduction", reduction, REDUCTIONS)
    check_smoothing(label_smoothing)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor: got {type(target).__name__}")
    if input.dim() == 0:
        raise ValueError("input must be [C], [N, C] or [N, C, d1, ...]: got a scalar")
    logits = input if input.dim() < 3 else input.movedim(1, -1)
    if weight is not None:
        check_floating("weight", weight)
        if weight.shape != logits.shape[-1:]:
            raise ValueError(
                f"weight must hold one number for each of the {logits.shape[-1]} classes: "
                f"got shape {tuple(weight.shape)}"
            )
        check_weights("weight", weight, weight.shape)
        weight = weight.to(accumulation_dtype(input.dtype))
    if target.is_floating_point():
        if ignore_index >= 0:
            raise ValueError(
                f"ignore_index={ignore_index} has no meaning for probabilities: leave it at -100"
            )
        if target.shape != input.shape:
            raise ValueError(
                f"target probabilities must have the shape of input, {tuple(input.shape)}: "
                f"got {tuple(target.shape)}"
            )
        if input.dim() >= 3:
            target = target.movedim(1, -1)
        counted = None
    else:
        if target.dtype == torch.bool:
            raise ValueError("target must hold class indices or probabilities: got torch.bool")
        if target.shape != logits.shape[:-1]:
            raise ValueError(
                f"target must be {tuple(logits.shape[:-1])} for input {tuple(input.shape)}: "
                f"got {tuple(target.shape)}"
            )
        target = target.to(input.device, torch.int64)
        counts = target != ignore_index
        if (
            ignore_index != IGNORED
        ):  # a literal -100 is then a label out of range, not one to ignore
            target = torch.where(target == IGNORED, -1, target)
        target = torch.where(counts, target, IGNORED)
        counted = counts
    losses = token_losses(
        logits,
        target,
        mask=None,
        label_smoothing=label_smoothing,
        z_loss=0.0,
        class_weights=weight,
        impl=impl,
    )
    if reduction != "mean" or counted is None:
        return reduce_rows(losses, reduction=reduction)
    share = counted.to(losses.dtype)
    if weight is not None:
        share = share * weight[target.clamp(0, logits.shape[-1] - 1)]
    total = share.sum()
    return losses.sum() / torch.where(total == 0, 1.0, total)


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
        num_items: divides the sum instead of the mask's sum (gradient accumulation).
        reduction: "mean", "sum" or "none" (rows times mask; needs cap_scope="token" where there is
            a cap).
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or options that do not fit, NaN in the mask. IndexError: a label
            outside V.

    Formula: mean = sum(mask * ce) / max(sum(mask), 1). Source: Stained Glass Engine 2.8.1, jigsaw
        losses
    (compute_masked_cross_entropy).
    """
    check_floating("logits", logits)
    if not isinstance(target, Tensor):
        raise TypeError(f"target must be a torch.Tensor: got {type(target).__name__}")
    check_choice("cap_form", cap_form, CAP_FORMS)
    check_choice("cap_scope", cap_scope, CAP_SCOPES)
    check_choice("reduction", reduction, REDUCTIONS)
    check_smoothing(label_smoothing)
    if max_loss is not None and not max_loss > 0:
        raise ValueError(f"max_loss must be positive, or None for no cap: got {max_loss}")
    if max_loss is not None and cap_scope == "mean" and reduction == "none":
        raise ValueError('reduction="none" has no mean to cap: pass cap_scope="token"')
    rows = logits.shape[:-1]
    check_weights("mask", mask, rows)
    mask = None if mask is None else mask.to(logits.device)
    counts = mask
    if not target.is_floating_point():
        if target.dtype == torch.bool or target.shape != rows:
            raise ValueError(
                f"target must hold token ids of shape {tuple(rows)} (or probabilities "
                f"{tuple(logits.shape)}): got {target.dtype} {tuple(target.shape)}"
            )
        target = target.to(logits.device, torch.int64)
        labelled = target != ignore_index
        if ignore_index != IGNORED:
            target = torch.where(target == IGNORED, -1, target)
        target = torch.where(labelled, target, IGNORED)
        counts = labelled if mask is None else torch.where(labelled, mask, 0)
    losses = token_losses(
        logits,
        target,
        mask=mask,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        class_weights=None,
        impl=impl,
    )
    if max_loss is not None and cap_scope == "token":
        losses = sigmoid_cap(losses, max_loss, ce_scaling_factor, cap_form)
    loss = reduce_rows(losses, counts, reduction=reduction, num_items=num_items)
    if max_loss is not None and cap_scope == "mean":
        loss = sigmoid_cap(loss, max_loss, ce_scaling_factor, cap_form)
    return loss


def sigmoid_cap(
    loss: Tensor, max_loss: float, scaling_factor: float = 1.0, form: str = "sigmoid"
) -> Tensor:
    """`loss` [...] squeezed below `max_loss`: max_loss * sigmoid(k * loss), or that rescaled to be
    0 at 0.

    The slope keeps its relative accuracy far into saturation, so that a capped loss still has a
    direction.
    """
    squeezed = _Sigmoid.apply(scaling_factor * loss)
    return max_loss * (squeezed if form == "sigmoid" else 2 * squeezed - 1)


class _Sigmoid(torch.autograd.Function):
    """sigmoid(x) with slope e / (1 + e)^2, e = exp(-|x|): torch's s (1 - s) is 0 from x = 17 on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sigmoid(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        e = torch.exp(-x.abs())
        return upstream * e / (1 + e).square()


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt, with gradient 0 at 0 instead of infinity: two equal rows are at rest, and masked rows
    are equal."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


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
            the unit vectors, sqrt(2 - 2 cos); "dim" |x - t|^2 / D.
        reduction: "mean" (over the mask), "sum" or "none".
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        ValueError: shapes, dtypes or options that do not fit, NaN in the mask.

    Formula: mean = sum(mask * row) / max(sum(mask), 1). At x = t value and gradient are 0.
    Source: Stained Glass Engine 2.8.1, jigsaw losses (compute_masked_normalized_l2_loss).
    """
    check_choice("normalization", normalization, NORMALIZATIONS)
    moments = hidden_moments(x, target, mask, reduction, impl)
    if normalization == "dim":
        rows = moments.dd / x.shape[-1]
    elif normalization == "unit":
        rows = safe_sqrt(2 * one_minus_cosine(moments, eps))
    else:
        scale = safe_sqrt(moments.yy).clamp_min(eps)
        rows = moments.dd / scale.square()
        if normalization == "target":
            rows = safe_sqrt(moments.dd) / scale
    return reduce_rows(rows, mask, reduction=reduction)


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
        ValueError: shapes, dtypes or options that do not fit, relu with absolute, NaN in the mask.

    Formula: row = <x, t> / ((|x| + eps) (|t| + eps)); mean = sum(mask * row) / max(sum(mask), 1).
    Source: Zou et al. 2024, Circuit Breakers (arXiv 2406.04313).
    """
    if relu and absolute:
        raise ValueError("relu and absolute exclude each other: pass one of them")
    moments = hidden_moments(x, target, mask, reduction, impl)
    norms = (safe_sqrt(moments.xx) + eps) * (safe_sqrt(moments.yy) + eps)
    rows = moments.xy / torch.where(norms == 0, 1.0, norms)
    if relu:
        rows = rows.relu()
    if absolute:
        rows = rows.abs()
    return reduce_rows(rows, mask, reduction=reduction)


def hidden_moments(
    x: Tensor, target: Tensor, mask: Tensor | None, reduction: str, impl: str
) -> RowMoments:
    """row_moments of one pair of tensors, after the checks that the hidden-state losses share."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_floating("x", x)
    check_floating("target", target)
    if x.shape != target.shape or x.dtype != target.dtype:
        raise ValueError(
            f"x and target must agree in shape and dtype: got {tuple(x.shape)} {x.dtype} "
            f"and {tuple(target.shape)} {target.dtype}"
        )
    check_weights("mask", mask, x.shape[:-1])
    return row_moments(x, target, mask, impl=impl)


def one_minus_cosine(moments: RowMoments, eps: float = 0.0) -> Tensor:
    """1 - cos(x, y) of every row, to full relative accuracy near 0, where 1 - xy / (|x| |y|) is
    noise.

    0 where a row is shorter than `eps` or 0: it has no direction.

    Formula: (dd - (|x| - |y|)^2) / (2 |x| |y|), |x| - |y| = difference_of_squares / (|x| + |y|).
    """
    x_norm, y_norm = safe_sqrt(moments.xx), safe_sqrt(moments.yy)
    total, product = x_norm + y_norm, x_norm * y_norm
    gap = moments.difference_of_squares / torch.where(total == 0, 1.0, total)
    defined = product > eps * eps
    distance = (moments.dd - gap.square()) / (2 * torch.where(defined, product, 1.0))
    return torch.where(defined, distance, 0.0)
