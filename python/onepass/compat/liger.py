"""The two cross-entropy modules of Liger-Kernel, with their arguments, over this package's facts.

One pass gives the loss, the z-loss, the accuracy and the predictions. Neither module writes into
what it is given, and any upstream gradient is served.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..head_loss import lazy_product
from ..lazy_logits import check_softcap
from ..losses import (
    check_class_weights,
    check_target,
    known_class_weights,
    label_losses,
    reduce_classes,
)
from ..ops._check import IGNORED, check_choice, check_floating, check_number, check_tokens
from ..ops._launch import accumulation_dtype
from ..reduce import REDUCTIONS, reduce_rows


@dataclass
class CrossEntropyOutput:
    """What the modules give where more than the loss is asked for; None for what is not.

    loss: with the z-loss in it. z_loss: that part of it, without gradient. token_accuracy: the
    share of counted targets that are the most likely class, a row's 1.0 or 0.0 for "none".
    predicted_tokens: the most likely class of every row, int64, -1 where ignored.
    """

    loss: Tensor
    z_loss: Tensor | None = None
    token_accuracy: Tensor | None = None
    predicted_tokens: Tensor | None = None


class LigerCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy over logits with Liger's arguments; the loss 0-dim, or [N] for "none".

    Where Liger gives the dtype of the logits, the result is float32 (float64 for float64), and
    what Liger overwrites with its gradient, the logits, stays as it was.

    Args:
        weight: [V] class weights; the z-loss is not weighted.
        ignore_index: a label that does not count.
        lse_square_scale: adds lse_square_scale * lse^2 to every counted row, the z-loss.
        label_smoothing: as in torch.
        reduction: "mean" (over the weights of the counted labels), "sum" or "none".
        softcap: softcap * tanh(logits / softcap) in the place of the logits; whole float32 logits
            are then made once more (LigerFusedLinearCrossEntropyLoss makes none).
        return_z_loss, return_token_accuracy, return_predicted_tokens: give a CrossEntropyOutput.

    Called with _input [N, V] (or onepass.LazyLogits) and target [N] class indices.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.
        IndexError: a label outside the classes.

    Formula: sum_i ((1 - s) w_y (-log p_y) - s / V sum_c w_c log p_c) / sum_i w_y
             + lse_square_scale sum_i lse_i^2 / n.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = IGNORED,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        check_options(lse_square_scale, label_smoothing, reduction, softcap)
        self.weight = weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(self, _input: Tensor, target: Tensor) -> Tensor | CrossEntropyOutput:
        """The loss of logits [N, V] and class indices [N]."""
        check_floating("_input", _input)
        logits = _input
        if self.softcap is not None:
            wide = logits.to(accumulation_dtype(logits.dtype))
            logits = torch.tanh(wide / self.softcap) * self.softcap
        weights = check_class_weights("weight", self.weight, logits)
        return loss_of(self, logits, target, weights, token_scaling=False)


class LigerFusedLinearCrossEntropyLoss(torch.nn.Module):
    """Cross-entropy of _input lin_weight^T + bias with Liger's arguments, without the logits; the
    loss 0-dim, or [N] for "none".

    Args:
        ce_weight: [V] class weights; the z-loss is not weighted.
        ignore_index: a label that does not count.
        lse_square_scale: adds lse_square_scale * lse^2 to every counted row, the z-loss.
        label_smoothing: as in torch.
        reduction: "mean" (over the weights of the counted labels), "sum" or "none".
        softcap: squeezes the logits into (-softcap, softcap).
        return_z_loss: gives a CrossEntropyOutput.
        accum_dtype: None or torch.float32, in which the head's gradient is always summed here.
        use_token_scaling: weighs every row with the probability of its label, without gradient
            through that weight.
        return_token_accuracy, return_predicted_tokens: give a CrossEntropyOutput.

    Called with lin_weight [V, D], _input [N, D], target [N] class indices and bias [V] or None; in
    autocast's dtype where that is on. The result is float32 (float64 for float64).

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.
        IndexError: a label outside the classes.

    Formula: that of LigerCrossEntropyLoss; with token scaling every row times p_y.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = IGNORED,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> None:
        super().__init__()
        check_options(lse_square_scale, label_smoothing, reduction, softcap)
        if accum_dtype not in (None, torch.float32):
            raise ValueError(
                "accum_dtype must be None or torch.float32, in which gradients are always summed: "
                f"got {accum_dtype}"
            )
        self.ce_weight = ce_weight
        self.ignore_index = ignore_index
        self.lse_square_scale = lse_square_scale
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.softcap = softcap
        self.return_z_loss = return_z_loss
        self.accum_dtype = accum_dtype
        self.use_token_scaling = use_token_scaling
        self.return_token_accuracy = return_token_accuracy
        self.return_predicted_tokens = return_predicted_tokens

    def forward(
        self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None
    ) -> Tensor | CrossEntropyOutput:
        """The loss of hidden states [N, D] under a head [V, D] and class indices [N]."""
        names = ("_input", "lin_weight", "bias")
        logits = lazy_product(_input, lin_weight, bias, names, softcap=self.softcap)
        weights = check_class_weights("ce_weight", self.ce_weight, logits)
        return loss_of(self, logits, target, weights, token_scaling=self.use_token_scaling)


def check_options(
    lse_square_scale: object, label_smoothing: object, reduction: object, softcap: object
) -> None:
    check_number("lse_square_scale", lse_square_scale)
    check_number("label_smoothing", label_smoothing, 0.0, 1.0)
    check_choice("reduction", reduction, REDUCTIONS)
    check_softcap(softcap)


def loss_of(
    asked: LigerCrossEntropyLoss | LigerFusedLinearCrossEntropyLoss,
    logits: Tensor,
    target: Tensor,
    weights: Tensor | None,
    token_scaling: bool,
) -> Tensor | CrossEntropyOutput:
    """The loss, with whatever else the module was asked for."""
    target = check_target(check_tokens("target", target, logits), logits, asked.ignore_index)
    counted, reduction, scale = target != IGNORED, asked.reduction, asked.lse_square_scale
    with_z = bool(scale) or asked.return_z_loss
    with_best = asked.return_token_accuracy or asked.return_predicted_tokens
    losses, stats = label_losses(
        logits,
        target,
        label_smoothing=asked.label_smoothing,
        class_weights=weights,
        also=(*["lse"] * with_z, *["argmax"] * with_best),
        row_weights=None
        if token_scaling
        else known_class_weights(logits, target, weights, reduction),
        impl="auto",
    )
    share = stats.logp.detach().exp() if token_scaling else 1.0
    loss = reduce_classes(losses * share, target, weights, reduction)
    if with_z:
        z_loss = reduce_classes(scale * stats.lse.square() * share, target, None, reduction)
        loss = loss + z_loss
    if not (asked.return_z_loss or with_best):
        return loss
    out = CrossEntropyOutput(loss)
    if asked.return_z_loss:
        out.z_loss = z_loss.detach()
    if asked.return_token_accuracy:
        right = ((stats.argmax == target) & counted).float()
        out.token_accuracy = right if reduction == "none" else reduce_rows(right, counted)
    if asked.return_predicted_tokens:
        out.predicted_tokens = torch.where(counted, stats.argmax, -1)
    return out
