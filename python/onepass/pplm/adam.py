"""PPLM.jl's perturbations: Adam on a copy of hidden states, of a model's past, of probabilities.

The loss is -log of the bag's probability, or the class's cross-entropy, plus fusion_kl_scale times
KL(U || P), P = softmax(logits / temperature) and U the same unperturbed. Only the last position's
logits are ever made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.vocab_pair_stats import vocab_pair_stats
from .cache import pack, unpack
from .forward import Forward, left_mask, materialized, run, steady
from .perturb import Goal, class_loss
from .settings import pplm

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Flux's and torch's defaults


def perturb_hidden_bow(
    hidden: Tensor, model: nn.Module, tokenizer: Any, args: pplm, *, per_row: bool = False
) -> Tensor:
    """The hidden states [B, S, D], moved so that the next token is rather one of the bags'.

    Args:
        hidden: the model's last, as its output head reads them.
        model: of transformers; its output head gives the logits (what it does to them after, a cap
            or a scale, is not known here; `sample_pplm` knows it).
        per_row: every row steered as if alone; else, as upstream, the bag's probability is summed
            over the batch before its log, and the KL is the rows' mean.

    Only the last position moves, as only it has a gradient.
    """
    goal = args.goal("BoW", model, tokenizer)
    check_hidden(hidden)
    with torch.inference_mode(False):
        new = hidden.detach().clone()
        moved = steer_hidden(new[:, -1], head_logits(model), goal, args, per_row=per_row)
        new[:, -1] = moved.last
    return new


def perturb_hidden_discrim(
    hidden: Tensor,
    model: nn.Module,
    tokenizer: Any,
    args: pplm,
    *,
    per_row: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """The hidden states [B, S, D], moved so that the discriminator sees rather the target class.

    Args:
        hidden, model, per_row: as of `perturb_hidden_bow`.
        tokenizer: not looked at.
        attention_mask: [B, S], 0 at padding, which neither counts nor moves.

    The loss is cross-entropy, of a head of one class binary, its mean over the batch. All positions
    but the last have one gradient, and move alike.
    """
    goal = args.goal("Discrim", model)
    check_hidden(hidden)
    with torch.inference_mode(False):
        new = hidden.detach().clone()
        before = new.new_ones(new.shape[:2]) if attention_mask is None else attention_mask.to(new)
        before = before[:, :-1].unsqueeze(-1)
        rest = (new[:, :-1].float() * before).sum(1), before.float().sum(1)
        moved = steer_hidden(new[:, -1], head_logits(model), goal, args, rest, per_row=per_row)
        assert moved.shift is not None
        new[:, :-1] += before * moved.shift.to(new.dtype).unsqueeze(1)
        new[:, -1] = moved.last
    return new


def perturb_probs(probs: Tensor, tokenizer: Any, args: pplm, *, per_row: bool = False) -> Tensor:
    """The probabilities [B, V] or [V] after Adam's steps on themselves, none below 0; their sum is
    not 1 any more.

    Upstream's, with its flaw: Adam moves by about `stepsize` whatever has a gradient, and the KL
    gives one to every token. Each gains the like of it, the bag's no more than others, unless
    stepsize is far below most probabilities or fusion_kl_scale is 0.
    """
    with torch.inference_mode(False):
        start = probs.detach().clone()
        goal = args.goal("BoW", None, tokenizer).on(start.device)
        rows = start.float().reshape(-1, start.shape[-1])
        moved = steer_probs(rows, goal, args, per_row=per_row)
    return moved.reshape(start.shape).to(start.dtype)


def perturb_past_bow(
    model: nn.Module,
    prev: Tensor,
    past: Any,
    original_probs: Tensor | None,
    tokenizer: Any,
    args: pplm,
    *,
    per_row: bool = False,
    attention_mask: Tensor | None = None,
) -> Any:
    """The past, moved so that after `prev` the next token is rather one of the bags'.

    Args:
        model: of transformers.
        prev: the last token, [B, 1] int64.
        past: keys and values of the tokens before it: a Cache, or a list of tensors (2, B, H, T, d)
            or of pairs. It is not written to; the result is of its kind.
        original_probs: [B, V] or [V], what the KL is to with args.seed_compat_offset; else not
            looked at, as the unperturbed probabilities after `prev` are known from the first step.
        per_row: as of `perturb_hidden_bow`.
        attention_mask: [B, T + 1], of a batch padded on the left.
    """
    goal = args.goal("BoW", model, tokenizer)
    return _perturb_past(model, prev, past, original_probs, goal, args, per_row, attention_mask)


def perturb_past_discrim(
    model: nn.Module,
    prev: Tensor,
    past: Any,
    original_probs: Tensor | None,
    args: pplm,
    *,
    per_row: bool = False,
    attention_mask: Tensor | None = None,
) -> Any:
    """The past, moved so that the discriminator sees the target class rather in the hidden state of
    `prev`. Arguments as of `perturb_past_bow`."""
    goal = args.goal("Discrim", model)
    return _perturb_past(model, prev, past, original_probs, goal, args, per_row, attention_mask)


def _perturb_past(
    model: nn.Module,
    prev: Tensor,
    past: Any,
    original_probs: Tensor | None,
    goal: Goal,
    args: pplm,
    per_row: bool,
    mask: Tensor | None,
) -> Any:
    log_u = None
    if args.seed_compat_offset:
        if original_probs is None:
            raise ValueError("seed_compat_offset: wanted original_probs, got None")
        log_u = original_probs.detach().reshape(len(prev), -1).float().log()
    packed = pack(past)
    if mask is not None:
        mask = left_mask(mask, (len(prev), packed.shape[-2] + 1))
    with steady(model):
        moved = steer_past(model, prev, packed, goal, args, mask, log_u, per_row=per_row)
    return unpack(moved.past, past)


def check_hidden(hidden: Tensor) -> None:
    if hidden.dim() != 3 or not hidden.shape[1]:
        raise ValueError(f"hidden must be [B, S, D] with S from 1: got {tuple(hidden.shape)}")


# -- what the functions above and `sample_pplm` share -------------------------------------------


class MovedHidden(NamedTuple):
    last: Tensor  # [B, D], in its dtype
    shift: Tensor | None  # [B, D] fp32, of every position before
    log_u: Tensor | None  # [B, V] fp32, unperturbed logits over the temperature; None: no step


class MovedPast(NamedTuple):
    past: Tensor  # [L, 2, B, H, T, d]
    log_u: Tensor | None  # [B, V], as above
    unperturbed: Tensor | None  # [L, 2, B, H, T + 1, d], the past with the last token's


def steer_hidden(
    last: Tensor,  # [B, D]
    logits_of: Callable[[Tensor], Tensor],  # [B, D] to [B, V]
    goal: Goal,
    args: pplm,
    rest: tuple[Tensor, Tensor] | None = None,  # sum [B, D] fp32 and number [B, 1] of those before
    *,
    per_row: bool,
) -> MovedHidden:
    """Adam on the last hidden state and, for a head, on what the positions before share."""
    known: list[Tensor] = []

    def loss(leaf: Tensor) -> Tensor:
        logits = logits_of(leaf[-1].to(last.dtype)).float() / args.temperature
        if not known:
            known.append(logits.detach())
        pooled = None
        if rest is not None:
            shift = leaf[0]
            # each position's gradient is that of the sum: once, however many move with it
            moved = rest[1] * shift.detach() + (shift - shift.detach())
            pooled = rest[0] + moved + leaf[-1]
            pooled = pooled / (rest[1] + 1) if args.pool == "mean" else pooled
        return steering_loss(logits, known[0], goal, pooled, args, per_row)

    start = last.float().unsqueeze(0)
    if rest is not None:
        start = torch.cat([torch.zeros_like(start), start])
    moved = adam(start, loss, args)
    shift = None if rest is None else moved[0]
    return MovedHidden(moved[-1].to(last.dtype), shift, known[0] if known else None)


def steer_past(
    model: nn.Module,
    prev: Tensor,
    past: Tensor,
    goal: Goal,
    args: pplm,
    mask: Tensor | None,
    log_u: Tensor | None = None,  # None: the unperturbed ones of the same position
    *,
    per_row: bool,
) -> MovedPast:
    """Adam on all keys and values. Its first step runs the model unperturbed: what comes out then
    is told beside."""
    known: list[Tensor] = []

    def loss(leaf: Tensor) -> Tensor:
        out = run(model, prev, leaf.to(past.dtype), mask)
        logits = logits_over(out, args.temperature)
        if not known:
            known.extend((logits.detach(), out.past()))
        target = known[0] if log_u is None else log_u
        pooled = out.hidden.float().sum(1)
        return steering_loss(logits, target, goal, pooled, args, per_row)

    moved = adam(past, loss, args).to(past.dtype)
    return MovedPast(moved, *(known or (None, None)))


def steer_probs(probs: Tensor, goal: Goal, args: pplm, *, per_row: bool) -> Tensor:
    """Adam on probabilities [B, V] fp32 themselves."""
    ids, weights = all_bags(goal)
    tiny = torch.finfo(probs.dtype).tiny  # below it neither log has a finite gradient

    def loss(leaf: Tensor) -> Tensor:
        mass = (leaf[:, ids] * weights).sum(-1)
        mass = mass if per_row else mass.sum()
        kl = (probs.xlogy(probs) - probs.xlogy(leaf.clamp_min(tiny))).sum(-1)
        kl = kl.sum() if per_row else kl.mean()
        return -mass.clamp_min(tiny).log().sum() + args.fusion_kl_scale * kl

    return adam(probs, loss, args).clamp_min(0)


def all_bags(goal: Goal) -> tuple[Tensor, Tensor]:
    """Ids and weights of all bags' words, which are one bag here."""
    return torch.cat([bag.ids for bag in goal.bags]), torch.cat([bag.weights for bag in goal.bags])


def steering_loss(
    logits: Tensor, log_u: Tensor, goal: Goal, pooled: Tensor | None, args: pplm, per_row: bool
) -> Tensor:
    """The loss of logits [B, V] fp32 over the temperature and of hidden states [B, D] for a head.

    Rows are coupled as upstream couples a batch, or, `per_row`, summed, which leaves each row's
    gradient its own.
    """
    told = vocab_pair_stats(logits, log_u, want=("lse", "kl"))
    if goal.bags:
        ids, weights = all_bags(goal)
        log_mass = logits[:, ids] - told.lse.unsqueeze(1) + weights.log()
        loss = -log_mass.logsumexp(1).sum() if per_row else -log_mass.flatten().logsumexp(0)
    else:
        losses = class_loss(goal.classifier(pooled), goal.class_label)
        loss = losses.sum() if per_row else losses.mean()
    if args.fusion_kl_scale:
        loss = loss + args.fusion_kl_scale * (told.kl.sum() if per_row else told.kl.mean())
    return loss


def adam(start: Tensor, loss: Callable[[Tensor], Tensor], args: pplm) -> Tensor:
    """`start`, in fp32, after args.num_iterations steps of a fresh Adam on `loss`."""
    value = start.detach().float().clone()
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    for n in range(1, args.num_iterations + 1):
        with torch.enable_grad():
            leaf = value.requires_grad_()
            # of the leaf alone: parameters that would be trained get none
            (gradient,) = torch.autograd.grad(loss(leaf), leaf)
        value = leaf.detach()
        mean.lerp_(gradient, 1 - BETAS[0])
        square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
        scale = square.sqrt().div_(math.sqrt(1 - BETAS[1] ** n)).add_(EPSILON)
        value = value.addcdiv(mean, scale, value=-args.stepsize / (1 - BETAS[0] ** n))
    return value


def logits_over(out: Forward, temperature: float) -> Tensor:
    """The last position's logits over the temperature, [B, V] fp32."""
    assert out.logits is not None
    return materialized(out.logits) / temperature


def head_logits(model: Any) -> Callable[[Tensor], Tensor]:
    """From hidden states [B, D] to logits [B, V], by the output head alone."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(model).__name__} has no output head: wanted a language model")
    return lambda last: materialized(head(last.unsqueeze(1))[:, -1])
