"""The jigsaw losses over a model's outputs: cross-entropies of three students against one teacher,
and their distances at a hidden layer.

Teacher and student each run on one super batch, its clean half first. T_c, T_n and S_c, S_n are
their outputs on either half; T_c is what all others are measured against, and never differentiated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..lazy_functions import same_head
from ..lazy_logits import LazyLogits
from ..losses import (
    CAP_FORMS,
    CAP_SCOPES,
    NORMALIZATIONS,
    check_cap,
    masked_cross_entropy,
    masked_normalized_l2,
    normalized_distances,
    sigmoid_cap,
    wanted_moments,
)
from ..ops._check import check_choice, check_floating, check_logits, check_number, check_want
from ..ops._check import check_weights as check_mask
from ..ops._launch import IMPLS
from ..ops.row_moments import row_moments
from ..ops.vocab_pair_stats import vocab_pair_stats
from ..reduce import masked_mean
from .activations import ActivationsDict, ComponentLossesDict

TARGETS = ("soft", "argmax")
CE_TERMS = ("performance", "protection", "guardrails")
L2_TERMS = ("performance", "protection")
COMPARED = {  # whose logits, and whether its noisy half's
    "performance": ("student", True),
    "protection": ("teacher", True),
    "guardrails": ("student", False),
}
CE_NAMES = {
    "performance": "jigsaw_ce_performance_loss",
    "protection": "jigsaw_ce_protection_loss",
    "guardrails": "jigsaw_clean_embeddings_guardrails_loss",
}


def compute_masked_cross_entropy(
    output_logits: Tensor,
    target_labels: Tensor,
    batch_size: int,
    sequence_length: int,
    mask: Tensor,
    max_loss: float | None = None,
    ce_scaling_factor: float = 1.0,
    *,
    cap_form: str = "sigmoid",
    cap_scope: str = "mean",
    impl: str = "auto",
) -> Tensor:
    """Mean cross-entropy over the positions that `mask` keeps, with an optional cap; 0-dim.

    Args:
        output_logits: [B*S, V] or [B, S, V], a tensor or `LazyLogits`.
        target_labels: class indices [B*S] or [B, S] (-100 does not count), or probabilities [B*S,
            V] or [B, S, V]. Positions are compared as they stand: nothing is shifted.
        batch_size, sequence_length: B and S.
        mask: [B, S] or [B*S]; a float mask weighs the positions.
        max_loss, ce_scaling_factor: the mean goes through max_loss * sigmoid(ce_scaling_factor *
            mean), which is max_loss / 2 where the mean is 0. None: no cap.
        cap_form, cap_scope, impl: as in `onepass.masked_cross_entropy`: a cap that is 0 at 0
            ("zero_at_zero"), or one of every token before the mean ("token").

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes or options that do not fit, max_loss not
        above 0. IndexError: a label outside the vocabulary.

    Formula: mean = sum(mask * ce) / max(sum(mask), 1).
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    check_logits(output_logits)
    n_rows = _n_rows(batch_size, sequence_length)
    vocab_size = output_logits.shape[-1]
    wanted = f"{batch_size} x {sequence_length} (batch_size x sequence_length)"
    if output_logits.shape[:-1].numel() != n_rows:
        raise ValueError(
            f"output_logits must have {wanted} rows: got shape {tuple(output_logits.shape)}"
        )
    for name, tensor in (("target_labels", target_labels), ("mask", mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
    width = (vocab_size,) if target_labels.is_floating_point() else ()
    rows = target_labels.shape[: target_labels.dim() - len(width)]
    if target_labels.shape[len(rows) :] != width or rows.numel() != n_rows:
        kind = f"probabilities [..., {vocab_size}]" if width else "class indices"
        raise ValueError(
            f"target_labels must hold {kind} for {wanted} rows: got {tuple(target_labels.shape)}"
        )
    if mask.shape not in ((batch_size, sequence_length), (n_rows,)):
        raise ValueError(
            f"mask must be [{batch_size}, {sequence_length}] or [{n_rows}]: got {tuple(mask.shape)}"
        )
    return masked_cross_entropy(
        output_logits.reshape(n_rows, vocab_size),
        target_labels.reshape(n_rows, *width),
        mask.reshape(n_rows),
        max_loss=max_loss,
        ce_scaling_factor=ce_scaling_factor,
        cap_form=cap_form,
        cap_scope=cap_scope,
        impl=impl,
    )


def compute_masked_normalized_l2_loss(
    embeddings: Tensor,
    target_embeddings: Tensor,
    mask: Tensor,
    *,
    normalization: str = "target",
    impl: str = "auto",
) -> Tensor:
    """Mean distance of hidden states from their targets, relative to the targets' norms; 0-dim.

    Args:
        embeddings, target_embeddings: [B, S, D] of one dtype; gradients flow to either.
        mask: [B, S] positions that count.
        normalization: "target" |x - t| / max(|t|, 1e-6); "target_sq" its square; "unit" the
            distance of the unit vectors; "dim" |x - t|^2 / D.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes or options that do not fit.

    Formula: mean = sum(mask * distance) / max(sum(mask), 1).
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    return masked_normalized_l2(
        embeddings, target_embeddings, mask, normalization=normalization, impl=impl
    )


def compute_jigsaw_ce_losses(
    activations: ActivationsDict,
    batch_size: int,
    sequence_length: int,
    vocab_size: int,
    attention_mask: Tensor,
    loss_mask: Tensor,
    losses: ComponentLossesDict,
    jigsaw_ce_protection_max_loss: float | None,
    jigsaw_ce_protection_loss_scaling_factor: float,
    *,
    terms: Sequence[str] = CE_TERMS,
    target: str = "soft",
    cap_form: str = "sigmoid",
    cap_scope: str = "mean",
    cap_guardrails: bool = False,
    impl: str = "auto",
) -> ComponentLossesDict:
    """The three cross-entropies against the clean teacher, added to `losses`, which is returned.

    Args:
        activations: teacher_logits and student_logits [2B, S, V], the clean half first; or hidden
            states and the head in their place, see `ActivationsDict`.
        batch_size, sequence_length, vocab_size: B, S and V.
        attention_mask: [B, S] positions that count for performance.
        loss_mask: [B, S] those that also count for protection and guardrails.
        losses: gets what is computed, in the sign in which it is minimised.
        jigsaw_ce_protection_max_loss, jigsaw_ce_protection_loss_scaling_factor: the cap of
            protection, as in `compute_masked_cross_entropy`; None: no cap.
        terms: which of "performance", "protection", "guardrails" to compute.
        target: "soft": the teacher's probabilities; "argmax": its most likely token.
        cap_form, cap_scope: of the cap. cap_guardrails: caps guardrails, too; they have no bound
            otherwise.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        KeyError: activations that are missing. TypeError, ValueError: what does not fit.

    Formula: jigsaw_ce_performance_loss = CE(S_n | T_c), jigsaw_ce_protection_loss = -cap(CE(T_n |
    T_c)), jigsaw_clean_embeddings_guardrails_loss = -CE(S_c | T_c), each a masked mean. LazyLogits
    of one head read T_c in one pass for all three, else the student's two share one; "argmax" reads
    it once, for the labels.
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    terms = check_want(terms, CE_TERMS)
    check_choice("target", target, TARGETS)
    check_choice("cap_form", cap_form, CAP_FORMS)
    check_choice("cap_scope", cap_scope, CAP_SCOPES)
    check_choice("impl", impl, IMPLS)
    max_loss, factor = jigsaw_ce_protection_max_loss, jigsaw_ce_protection_loss_scaling_factor
    check_cap(max_loss, factor, "jigsaw_ce_protection_max_loss")
    _n_rows(batch_size, sequence_length)
    shape = (2 * batch_size, sequence_length, vocab_size)
    masks = _masks(attention_mask, loss_mask, (batch_size, sequence_length))
    sides = {}
    for model in ("teacher", "student"):
        if model == "student" and set(terms) <= {"protection"}:
            continue
        logits = logits_of(activations, model)
        check_logits(logits)
        if logits.shape != shape:
            raise ValueError(
                f"{model}_logits must be a super batch [2 * batch_size, sequence_length,"
                f" vocab_size] = {list(shape)}, its clean half first: got {list(logits.shape)}"
            )
        sides[model] = logits
    clean_teacher = sides["teacher"][:batch_size].detach()
    rows = soft_rows if target == "soft" else _argmax_rows
    chosen = {term: (sides[COMPARED[term][0]], half_of(term, batch_size)) for term in terms}
    found = rows(chosen, clean_teacher, {term: masks[term] for term in terms}, impl)
    for term in terms:
        values, mask = found[term], masks[term]
        capped = term == "protection" or (term == "guardrails" and cap_guardrails)
        if not capped or max_loss is None:
            loss = masked_mean(values, mask)
        elif cap_scope == "token":
            loss = masked_mean(sigmoid_cap(values, max_loss, factor, cap_form), mask)
        else:
            loss = sigmoid_cap(masked_mean(values, mask), max_loss, factor, cap_form)
        losses[CE_NAMES[term]] = loss if term == "performance" else -loss
    return losses


def half_of(term: str, batch_size: int) -> slice:
    """The half of a super batch that a term compares with the clean teacher."""
    return slice(batch_size, None) if COMPARED[term][1] else slice(batch_size)


Chosen = Mapping[str, tuple[Tensor, slice]]  # a super batch, and the half of it that is meant


def soft_rows(
    chosen: Chosen,
    target: Tensor,
    masks: Mapping[str, Tensor],
    impl: str = "auto",
    fact: str = "cross_entropy",
) -> dict[str, Tensor]:
    """Cross-entropies [B, S] against the target's probabilities, or another fact of
    vocab_pair_stats, all in one pass over it where one head makes all logits.

    Logits that are there, or of different heads, are not copied to lie together: the halves of the
    student's super batch share a pass, the teacher's has its own.
    """
    want = (fact,)
    if same_head([side for side, _ in chosen.values()]):
        stacked = torch.cat([side[half] for side, half in chosen.values()])
        stacked = stacked.view(len(chosen), *target.shape)
        mask = torch.stack([masks[term] for term in chosen])
        pair = vocab_pair_stats(stacked, target, mask=mask, want=want, impl=impl)
        return dict(zip(chosen, getattr(pair, fact).unbind(0), strict=True))
    found = {}
    if "performance" in chosen and "guardrails" in chosen:
        both = chosen["performance"][0].reshape(2, *target.shape)
        mask = torch.stack([masks["guardrails"], masks["performance"]])
        pair = vocab_pair_stats(both, target, mask=mask, want=want, impl=impl)
        found["guardrails"], found["performance"] = getattr(pair, fact).unbind(0)
    for term, (side, half) in chosen.items():
        if term not in found:
            pair = vocab_pair_stats(side[half], target, mask=masks[term], want=want, impl=impl)
            found[term] = getattr(pair, fact)
    return found


def _argmax_rows(
    chosen: Chosen, target: Tensor, masks: Mapping[str, Tensor], impl: str
) -> dict[str, Tensor]:
    """Cross-entropies [B, S] of the target's most likely tokens."""
    labels = target.argmax(-1)
    return {
        term: masked_cross_entropy(
            side[half], labels, masks[term] != 0, reduction="none", impl=impl
        )
        for term, (side, half) in chosen.items()
    }


def compute_jigsaw_l2_losses(
    activations: ActivationsDict,
    super_batch_size: int,
    loss_mask: Tensor,
    losses: ComponentLossesDict,
    *,
    terms: Sequence[str] = L2_TERMS,
    normalization: str = "target",
    impl: str = "auto",
) -> ComponentLossesDict:
    """The distances from the clean teacher at the distillation layer, added to `losses`, which is
    returned.

    Args:
        activations: teacher_embeddings and student_embeddings [2B, S, D], the clean half first.
        super_batch_size: 2B.
        loss_mask: [B, S] positions that count, for both.
        losses: gets what is computed, in the sign in which it is minimised.
        terms: which of "performance", "protection" to compute.
        normalization, impl: as in `compute_masked_normalized_l2_loss`.

    Raises:
        KeyError: activations that are missing. TypeError, ValueError: what does not fit.

    Formula: jigsaw_l2_performance_loss = L2(S_n, T_c), jigsaw_l2_protection_loss = -L2(T_n, T_c),
    each a masked mean.
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    terms = check_want(terms, L2_TERMS)
    check_choice("normalization", normalization, NORMALIZATIONS)
    if isinstance(super_batch_size, bool) or not isinstance(super_batch_size, int):
        raise TypeError(f"super_batch_size must be an int: got {type(super_batch_size).__name__}")
    if super_batch_size < 0 or super_batch_size % 2:
        raise ValueError(
            f"super_batch_size must be even, a clean and a noisy half: got {super_batch_size}"
        )
    batch_size = super_batch_size // 2
    noisy, needed = [], {"performance": "student", "protection": "teacher"}
    sides = {}
    for model in ("teacher", *(needed[term] for term in terms)):
        states = _found(activations, f"{model}_embeddings")
        check_floating(f"{model}_embeddings", states)
        if states.dim() != 3 or states.shape[0] != super_batch_size:
            raise ValueError(
                f"{model}_embeddings must be a super batch [{super_batch_size}, S, D], its clean"
                f" half first: got {list(states.shape)}"
            )
        sides[model] = states
    clean_teacher = sides["teacher"][:batch_size].detach()
    check_mask("loss_mask", loss_mask, clean_teacher.shape[:-1])
    noisy = [sides[needed[term]][batch_size:] for term in terms]
    if not terms:
        return losses
    moments = row_moments(
        noisy,
        [clean_teacher] * len(noisy),
        loss_mask,
        want=wanted_moments(normalization),
        impl=impl,
    )
    distances = normalized_distances(moments, normalization, clean_teacher.shape[-1])
    for term, rows in zip(terms, distances.unbind(0), strict=True):
        loss = masked_mean(rows, loss_mask)
        losses[f"jigsaw_l2_{term}_loss"] = loss if term == "performance" else -loss
    return losses


def logits_of(activations: ActivationsDict, model: str) -> Tensor:
    """The logits of "teacher" or "student": those that are there, or lazy ones of its hidden states
    and the head."""
    if f"{model}_logits" in activations or f"{model}_hidden" not in activations:
        return _found(activations, f"{model}_logits")
    hidden = _found(activations, f"{model}_hidden")
    weight = _found(activations, "lm_head_weight")
    return LazyLogits(hidden, weight, activations.get("lm_head_bias"))


def _found(activations: ActivationsDict, name: str) -> Tensor:
    if name not in activations:
        raise KeyError(f"activations have no {name!r}: they have {sorted(activations)}")
    value: Tensor = activations[name]  # type: ignore[literal-required]
    return value


def _n_rows(batch_size: int, sequence_length: int) -> int:
    for name, size in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        check_number(name, size, 0)
    return batch_size * sequence_length


def _masks(attention_mask: Tensor, loss_mask: Tensor, rows: tuple[int, int]) -> dict[str, Tensor]:
    """What each term counts."""
    for name, mask in (("attention_mask", attention_mask), ("loss_mask", loss_mask)):
        if not isinstance(mask, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor: got {type(mask).__name__}")
        check_mask(name, mask, rows)
    both = torch.where(attention_mask != 0, loss_mask, 0)
    return {"performance": attention_mask, "protection": both, "guardrails": both}
