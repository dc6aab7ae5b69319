"""The function of cut-cross-entropy (CCE), with its arguments, over LazyLogits.

Without CCE's gradient filter: the gradient is the whole one, which is what `filter_eps=None` asks
for there and what its other settings approximate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..head_loss import lazy_product
from ..losses import check_target, known_class_weights, label_losses, reduce_classes
from ..ops._check import IGNORED, check_choice, check_floating, check_number, check_tokens
from ..ops._launch import IMPLS
from ..reduce import REDUCTIONS

# What CCE's own implementations become: those that avoid Triton there avoid it here.
THEIRS = {
    "cce": "auto",
    "cce_exact": "auto",
    "cce_kahan": "auto",
    "cce_kahan_full": "auto",
    "cce_kahan_full_c": "auto",
    "cce_kahan_full_e": "auto",
    "torch_compile": "torch",
}


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = IGNORED,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: Any = "auto",
    vocab_parallel_options: None = None,
    *,
    use_kahan: bool = False,
) -> Any:
    """Cross-entropy of `targets` under e c^T + bias, as `cut_cross_entropy.linear_cross_entropy`;
    0-dim float32 (float64 for float64 e), or [..., T - shift] for "none".

    A mean over targets that are all ignored is 0 with zero gradients, where CCE gives NaN. The
    order of the arguments is that of CCE's repository; its release 25.1.1 has no `bias` and passes
    `ignore_index` in its place: pass what follows `targets` by name.

    Args:
        e: [..., T, D] embeddings. c: [V, D] classifier, in the dtype of e or cast to it.
        targets: [..., T] class indices. bias: [V].
        ignore_index: a label that does not count. softcap: None for no cap.
        reduction: "mean" (over the counted targets), "sum" or "none".
        shift: e at t predicts the target at t + shift; True is 1.
        return_lse: gives (loss, lse), lse [..., T - shift], 0 where ignored; differentiable.
        filter_eps, filter_e_grad, filter_c_grad: how much of the gradient CCE may leave out;
            nothing is left out here.
        accum_e_fp32, accum_c_fp32, use_kahan: sums are always held in float32 here.
        impl: "auto", "triton" or "torch"; of CCE's names "torch_compile" means "torch", all others
            "auto". Its enum is accepted too.
        vocab_parallel_options: must be None.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.
        IndexError: a label outside the classes.

    Formula: cross_entropy(softcap tanh((e c^T + bias) / softcap), targets).
    Source: Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.
    """
    if vocab_parallel_options is not None:
        raise ValueError(
            "vocab_parallel_options must be None: a vocabulary split over ranks is not served; "
            "gather c first"
        )
    if isinstance(bias, int):
        raise TypeError(
            f"bias must be a torch.Tensor or None: got {bias!r}; pass ignore_index by name"
        )
    name = str(getattr(impl, "name", impl)).lower()
    check_choice("impl", name, (*IMPLS, *THEIRS))
    check_choice("reduction", reduction, REDUCTIONS)
    if filter_eps is not None and filter_eps not in ("auto", "high"):
        check_number("filter_eps", filter_eps, 0.0, hint=', None or "auto"')
    check_floating("e", e)
    check_floating("c", c)
    if bias is not None:
        check_floating("bias", bias)
        bias = bias.to(e.dtype)
    logits: Tensor = lazy_product(e, c.to(e.dtype), bias, ("e", "c", "bias"), softcap=softcap)
    check_tokens("targets", targets, logits)
    length = max(targets.shape[-1:], default=1)
    if not isinstance(shift, int) or not (shift == 0 or 0 < shift < length):
        raise ValueError(f"shift must be an int in [0, {length}), as targets allow: got {shift}")
    if shift:
        logits, targets = logits[..., : -int(shift), :], targets[..., int(shift) :]
    targets = check_target(targets, logits, ignore_index)
    losses, stats = label_losses(
        logits,
        targets,
        label_smoothing=0.0,
        class_weights=None,
        also=("lse",) if return_lse else (),
        row_weights=known_class_weights(logits, targets, None, reduction),
        impl=THEIRS.get(name, name),
    )
    loss = reduce_classes(losses, targets, None, reduction)
    return (loss, stats.lse) if return_lse else loss
