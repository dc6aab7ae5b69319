"""Log-probabilities of sequences, from logits or from hidden states and a head, in one pass.

What a trainer reports beside them (entropy, accuracy, mean logit) comes from the same pass, without
gradients; only tokens that count are multiplied with the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops._check import (
    IGNORED,
    check_floating,
    check_logits,
    check_number,
    check_same_device,
    check_tokens,
    check_want,
    check_weights,
)
from ..ops._launch import accumulation_dtype
from ..ops.vocab_stats import vocab_stats

FACTS = {
    "entropy": "entropy",
    "accuracy": "argmax",
    "logits": "logit_sum",
    "alignment": "sum_sq_probs",
}  # what may be wanted: the fact it is made of


class SequenceLogps(NamedTuple):
    """Of every sequence, [B] each; all but log-probabilities are detached, None where `want` does
    not ask for them, and sums over the tokens that count.

        logps        sum of (weighted) log p, or its mean
        lengths      tokens that count, int64
        entropy      of the token distributions, in nats
        correct      tokens that are the likeliest one
        mean_logits  means over the vocabulary
        alignment    log p - log sum_v p_v^2 (see `wpo_weights`)
        unweighted   logps without the weights, differentiable; None where there are none
    """

    logps: Tensor
    lengths: Tensor
    entropy: Tensor | None = None
    correct: Tensor | None = None
    mean_logits: Tensor | None = None
    alignment: Tensor | None = None
    unweighted: Tensor | None = None


def sequence_logps(
    logits: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    average: bool = False,
    want: Sequence[str] = (),
    shift: bool = True,
    impl: str = "auto",
) -> SequenceLogps:
    """log p of every sequence's labels, differentiable in the logits, or in hidden states and head.

    Args:
        logits: [B, S, V], or `onepass.LazyLogits`.
        labels: [B, S] token ids as they stand in the input; -100 does not count.
        weights: [B, S] factors of the tokens' log p, beside their labels (see `ld_weights`).
        average: divides by the number of tokens that count (at least 1), weighted or not.
        want: names of "entropy", "accuracy", "logits" and "alignment".
        shift: the label of a position is predicted by the logits before it; False: by its own.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or names that do not fit.
        IndexError: a label outside the vocabulary (on a GPU with ONEPASS_STRICT=1).

    With LazyLogits of a frozen head the gradient is made in the forward: two products of N D V in
    all, N being the tokens that count; under no_grad, as for a reference model, one.
    """
    check_logits(logits)
    if logits.dim() != 3:
        raise ValueError(f"logits must be [B, S, V]: got shape {tuple(logits.shape)}")
    check_tokens("labels", labels, logits)
    want = check_want(want, tuple(FACTS))
    if weights is not None:
        check_floating("weights", weights)
        check_weights("weights", weights, labels.shape)
        check_same_device("weights", weights, "labels", labels)
    if shift:  # the labels, not the logits, which may be large
        labels = predicted(labels, IGNORED)
        weights = None if weights is None else predicted(weights, 0)
    stats = vocab_stats(
        logits,
        labels,
        want=("logp", *(FACTS[name] for name in want)),
        gradient_of=("logp",),
        impl=impl,
    )
    counts = labels != IGNORED
    lengths = counts.sum(-1)
    logps = stats.logp.sum(-1)
    unweighted = None if weights is None else logps
    if weights is not None:
        logps = (stats.logp * weights).sum(-1)
    if average:
        logps = logps / lengths.clamp(min=1)
        unweighted = None if unweighted is None else unweighted / lengths.clamp(min=1)
    entropy = correct = mean_logits = alignment = None
    if "entropy" in want:
        entropy = stats.entropy.detach().sum(-1)
    if "accuracy" in want:
        correct = ((stats.argmax == labels) & counts).sum(-1)
    if "logits" in want:
        mean_logits = stats.logit_sum.detach().sum(-1) / logits.shape[-1]
    if "alignment" in want:
        alignment = (stats.logp.detach() - stats.sum_sq_probs.detach()).sum(-1)
    return SequenceLogps(logps, lengths, entropy, correct, mean_logits, alignment, unweighted)


def predicted(rows: Tensor, last: float) -> Tensor:
    """[B, S] moved to the positions whose logits predict them; `last` where nothing follows."""
    return torch.cat([rows[:, 1:], torch.full_like(rows[:, :1], last)], 1)


def ld_weights(labels: Tensor, ld_alpha: float, *, shift: bool = True) -> Tensor:
    """LD-DPO: `ld_alpha` for the tokens of a pair's longer answer beyond the length of the shorter,
    1 for all before; [2B, S] float32 for `sequence_logps`.

    Args:
        labels: [2B, S], the chosen answers and then the rejected ones; -100 does not count.
        ld_alpha: in [0, 1]; 1 is plain DPO.
        shift: as in `sequence_logps`, under which the first column predicts nothing.

    Source: Liu et al. 2409.06411.
    """
    check_number("ld_alpha", ld_alpha, 0.0, 1.0)
    _check_halves("labels", labels, 2)
    counts = labels != IGNORED
    if shift:
        counts = torch.cat([torch.zeros_like(counts[:, :1]), counts[:, 1:]], 1)
    place = counts.cumsum(-1)
    chosen, rejected = counts.sum(-1).chunk(2)
    shared = torch.minimum(chosen, rejected).repeat(2)
    return torch.where(place <= shared[:, None], 1.0, float(ld_alpha))


def wpo_weights(alignment: Tensor, lengths: Tensor) -> Tensor:
    """WPO: how likely a pair's answers are under the policy that is trained, [B], detached.

    Args:
        alignment, lengths: [2B] of `sequence_logps`, the chosen answers and then the rejected ones.

    Formula: product over both answers of exp(mean of (log p - log sum_v p_v^2)).
    Source: Zhou et al. 2406.11827, equation 2.
    """
    check_floating("alignment", alignment)
    _check_halves("alignment", alignment, 1)
    check_weights("lengths", lengths, alignment.shape)
    check_same_device("lengths", lengths, "alignment", alignment)
    dtype = accumulation_dtype(alignment.dtype)
    chosen, rejected = (alignment.detach().to(dtype) / lengths.clamp(min=1)).chunk(2)
    return (chosen + rejected).exp()


def _check_halves(name: str, tensor: object, n_dims: int) -> None:
    """Raises unless `tensor` has `n_dims` dimensions, the first of them even."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
    if tensor.dim() != n_dims or len(tensor) % 2:
        shape = "[2B, S]" if n_dims == 2 else "[2B]"
        raise ValueError(
            f"{name} must be {shape}, the chosen answers and then the rejected ones: "
            f"got shape {tuple(tensor.shape)}"
        )
