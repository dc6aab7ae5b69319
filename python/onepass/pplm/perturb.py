"""Gradient steps on a past: the heart of PPLM, as Uber's run_pplm.py takes them.

delta, what is added to the past, is one tensor over all layers: its gradient, the norms, the window
and the step are a few operations on the device, with no wait for it. Dathathri et al. 2020, arXiv
1912.02164.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._check import check_choice, check_number
from ..ops.steering import steering_stats
from ..training.hidden_states import without_adapter
from .bags import Bag, bag_weights
from .cache import pack, unpack
from .forward import (
    check_model,
    left_mask,
    materialized,
    run,
    soft_inputs,
    steady,
    token_embeddings,
)
from .heads import check_fits, class_logps

PPLM_BOW, PPLM_DISCRIM, PPLM_BOW_DISCRIM = 1, 2, 3
SMALL_CONST = 1e-15
SIDES = ("first", "last")


class Goal(NamedTuple):
    """What is steered to: bags of words, a class of a head, or both."""

    bags: tuple[Bag, ...] = ()
    classifier: Any = None  # hidden states [B, D] to logits [B, C]
    class_label: int = 0

    def class_loss(self, mean_hidden: Tensor) -> Tensor:
        """The class's cross-entropy per row, [B], of mean hidden states [B, D]."""
        weight = next(iter(getattr(self.classifier, "parameters", tuple)()), mean_hidden)
        return class_loss(self.classifier(mean_hidden.to(weight.dtype)), self.class_label)

    def on(self, device: Any) -> Goal:
        """With a copy of the bags there, which autograd may keep."""
        with torch.inference_mode(False):
            bags = [Bag(*(each.to(device, copy=True) for each in bag)) for bag in self.bags]
        return self._replace(bags=tuple(bags))


@dataclass(frozen=True)
class Steps:
    """How steps on a past are taken; the names are Uber's.

    Args:
        stepsize, gamma: a layer's delta moves by -stepsize * g / |g|^gamma an iteration.
        num_iterations: steps a token.
        horizon_length: mean next tokens that the classifier looks ahead.
        window_length: positions of the past that move; 0 for all, as with a shorter past.
        decay: weights 1/w, 2/w, ... 1 along the window.
        kl_scale: weight of KL(perturbed || unperturbed).
        window_side: "first", the oldest ones, as Uber's code has it, or "last", the newest, as its
            help and the paper say.
        per_row: each row of a batch as if it were alone; otherwise as Uber's code does it, one
            logarithm of a bag's mass and one norm a layer for the whole batch.
    """

    stepsize: float = 0.01
    num_iterations: int = 3
    horizon_length: int = 1
    window_length: int = 0
    decay: bool = False
    gamma: float = 1.5
    kl_scale: float = 0.01
    window_side: str = "first"
    per_row: bool = False

    def __post_init__(self) -> None:
        for name, low in (("num_iterations", 0), ("horizon_length", 1), ("window_length", 0)):
            check_count(name, getattr(self, name), low)
        for name in ("stepsize", "gamma", "kl_scale"):
            check_number(name, getattr(self, name), 0.0)
        check_choice("window_side", self.window_side, SIDES)
        if self.decay and not self.window_length:
            raise ValueError("decay is along a window: wanted window_length above 0 with it, got 0")


class Perturbed(NamedTuple):
    past: Tensor  # [L, 2, B, H, T, d]
    accumulated_hidden: Any  # [B, D]; None without an iteration
    grad_norms: Tensor | None  # [L, 1, B or 1, 1, 1, 1]
    losses: list[Tensor]  # one an iteration: a number, or [B] with per_row


def perturb_past(
    past: Any,
    model: Any,
    last: Tensor,
    unpert_past: Any = None,
    unpert_logits: Tensor | None = None,
    accumulated_hidden: Any = None,
    grad_norms: Any = None,
    stepsize: float = 0.01,
    one_hot_bows_vectors: Sequence[Any] | None = None,
    classifier: Any = None,
    class_label: int | None = None,
    loss_type: int = 0,
    num_iterations: int = 3,
    horizon_length: int = 1,
    window_length: int = 0,
    decay: bool = False,
    gamma: float = 1.5,
    kl_scale: float = 0.01,
    device: Any = None,
    verbosity_level: int = 1,
    *,
    window_side: str = "first",
    per_row: bool = False,
    attention_mask: Tensor | None = None,
) -> tuple[Any, Tensor | None, Any, list[Tensor]]:
    """(perturbed past, accumulated hidden states [B, D], gradient norms, losses), as Uber's.

    Args:
        past: keys and values of T tokens: a transformers Cache, a list of (2, B, H, T, d) or of
            pairs; neither it nor the model is changed.
        last: [B, 1] ids, the token after them.
        unpert_past: of T + 1 tokens, unperturbed; needed for a classifier.
        unpert_logits: [B, S, V], of which the last position counts; needed where kl_scale is not 0.
        accumulated_hidden: [B, D], the sum of unperturbed last hidden states over the T tokens.
        grad_norms: what the call for the token before gave. With bags alone the largest norm so far
            divides, over iterations and tokens.
        one_hot_bows_vectors: of each bag rows [n, V], or a `Bag`.
        classifier: hidden states [B, D] to logits [B, C]; class_label is 0-based.
        loss_type: 1 bags, 2 classifier, 3 both; 0 what is given.
        stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale,
        window_side, per_row: see `perturb.Steps`.
        device, verbosity_level: Uber's; all is where the model is, nothing is printed.
        attention_mask: [B, T + 1], 0 where a row is padded on the left.

    Returns:
        the past in the spelling it came in; hidden states with those of `last` (and of the look
        ahead) added, None where num_iterations is 0; norms [L], or [L, B] with per_row; of each
        iteration the loss before its step, a number, or [B] with per_row. Nothing is waited for:
        losses are on the device.

    Raises:
        TypeError, ValueError: a past of another kind, arguments out of range or missing, neither
            bag nor classifier, a head or bag that does not fit the model.

    Formula: loss = sum_bags -log(sum_v w_v p_v) + CE(classifier(hidden / (T + 1 + horizon)), label)
    + kl_scale KL(p || u); delta_l -= stepsize g_l / |g_l|^gamma with g_l = window * dloss/ddelta_l.
    """
    with torch.inference_mode(False):  # tensors that autograd may keep
        goal = goal_of(loss_type, one_hot_bows_vectors, classifier, class_label)
    how = Steps(
        stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale,
        window_side, per_row,
    )  # fmt: skip
    check_goal(goal, model)
    with torch.inference_mode(False):
        packed = pack(past)
        ahead = None if goal.classifier is None or unpert_past is None else pack(unpert_past)
    n_past, rows = packed.shape[-2], packed.shape[2]
    if last.shape != (rows, 1) or last.is_floating_point():
        raise ValueError(
            f"last must be [B, 1] = ({rows}, 1) ids: got {tuple(last.shape)} {last.dtype}"
        )
    check_past("past", packed, model, rows, n_past)
    if ahead is not None:
        check_past("unpert_past", ahead, model, rows, n_past + 1)
    elif goal.classifier is not None:
        raise ValueError("a classifier looks ahead of unpert_past: wanted that of T + 1 tokens")
    if kl_scale and unpert_logits is None:
        raise ValueError("kl_scale is above 0: wanted unpert_logits [B, S, V], got none")
    if not isinstance(accumulated_hidden, Tensor):  # upstream's first is 0
        accumulated_hidden = torch.full((rows, 1), float(accumulated_hidden or 0)).to(packed.device)
    if accumulated_hidden.dim() != 2 or len(accumulated_hidden) != rows:
        got = tuple(accumulated_hidden.shape)
        raise ValueError(f"accumulated_hidden must be [B, D] with B = {rows}: got {got}")
    mask = before = None
    if attention_mask is not None:
        with torch.inference_mode(False):
            mask = left_mask(attention_mask.clone(), (rows, n_past + 1))
            mask = None if mask is None else mask.to(packed.device)
    if grad_norms is not None:
        before = torch.stack([torch.as_tensor(norm).to(packed.device) for norm in grad_norms])
        shape = (len(packed), rows) if per_row else (len(packed),)
        if before.shape != shape:
            raise ValueError(f"grad_norms must be {shape}: got {tuple(before.shape)}")
        before = before.reshape(len(packed), 1, -1, 1, 1, 1)
    with steady(model, goal.classifier):
        log_u = None
        if unpert_logits is not None and kl_scale:
            log_u = materialized(unpert_logits[:, -1]).detach().clone().log_softmax(-1)
        found = perturbed(
            model,
            packed,
            last.to(packed.device),
            goal.on(packed.device),
            how,
            log_u=log_u,
            unpert_past=ahead,
            accumulated_hidden=accumulated_hidden.detach(),
            grad_norms=before,
            mask=mask,
        )
    norms = found.grad_norms
    if norms is not None:
        norms = norms.reshape(len(packed), -1) if per_row else norms.flatten()
    return unpack(found.past, past), found.accumulated_hidden, norms, found.losses


def perturbed(
    model: Any,
    past: Tensor,  # [L, 2, B, H, T, d]
    last: Tensor,  # [B, 1] ids
    goal: Goal,
    how: Steps,
    *,
    log_u: Tensor | None,  # [B, V] of the unperturbed model, after `last`
    unpert_past: Tensor | None = None,  # [L, 2, B, H, T + 1, d], for a classifier
    accumulated_hidden: Any = 0,  # [B, D]: the sum over earlier positions
    grad_norms: Tensor | None = None,
    mask: Tensor | None = None,  # [B, T + 1]
    embedding: Tensor | None = None,  # [V, E], `token_embeddings` of the model
) -> Perturbed:
    """`perturb_past` on one tensor, inside `steady`; goal and steps checked."""
    n_past, with_head = past.shape[-2], goal.classifier is not None
    if with_head and embedding is None:
        embedding = token_embeddings(model)
    log_u = floored(log_u) if how.kl_scale and log_u is not None else None
    of_past = None if mask is None else mask[:, :n_past]
    n_seen: Any = n_past if of_past is None else of_past.sum(-1, keepdim=True)
    delta = torch.zeros_like(past, dtype=torch.promote_types(past.dtype, torch.float32))
    moved = past.clone()  # past + delta; its gradient is delta's
    window = window_weights(how, of_past, delta)
    every = (1, 3, 4, 5) if how.per_row else (1, 2, 3, 4, 5)
    keeps_largest = bool(goal.bags) and not with_head
    total: Any = None
    losses = []
    for _ in range(how.num_iterations):
        moved.requires_grad_()
        with torch.enable_grad():
            out = run(model, last, moved, mask)
            assert out.logits is not None
            stats = steering_stats(out.logits, bags=goal.bags, log_u=log_u, embedding=embedding)
            total = accumulated_hidden + out.hidden.detach().to(delta.dtype).sum(1)
            terms = []  # [B], or numbers
            if goal.bags:
                masses = stats.masses if how.per_row else stats.masses.sum(0)
                least = torch.finfo(masses.dtype).tiny  # log 0 would make the whole past NaN
                terms.append(-masses.clamp(min=least).log().sum(-1))
            if stats.soft_embedding is not None:
                assert unpert_past is not None
                total = total + looked_ahead(
                    model, stats.soft_embedding, unpert_past, how.horizon_length, mask
                )
                mean = total / (n_seen + 1 + how.horizon_length)
                wrong = goal.class_loss(mean)
                terms.append(wrong if how.per_row else wrong.mean())
            if stats.kl is not None:
                terms.append(how.kl_scale * (stats.kl if how.per_row else stats.kl.sum()))
            loss = torch.stack(terms).sum(0)
            (gradient,) = torch.autograd.grad(loss.sum(), moved)
        losses.append(loss.detach())
        with torch.no_grad():
            gradient = gradient.to(delta.dtype)
            if window is not None:
                gradient = gradient * window
            norms = torch.linalg.vector_norm(gradient, dim=every, keepdim=True)
            if keeps_largest and grad_norms is not None:
                grad_norms = torch.maximum(grad_norms, norms)
            else:
                grad_norms = norms + SMALL_CONST
            # without a past, as in a row of one token, the power can be inf
            scale = (grad_norms**-how.gamma).where(norms > 0, 0.0)
            delta.addcmul_(gradient, scale, value=-how.stepsize)
            moved.copy_(past + delta)
    return Perturbed(moved.detach(), None if total is None else total.detach(), grad_norms, losses)


def looked_ahead(
    model: Any, soft_embedding: Tensor, past: Tensor, horizon_length: int, mask: Tensor | None
) -> Tensor:
    """The sum of the hidden states [B, D] at mean next tokens after the past, the same again and
    again."""
    tokens, total = soft_inputs(model, soft_embedding), torch.zeros_like(soft_embedding)
    cache: Any = past
    for _ in range(horizon_length):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        out = run(model, tokens, cache, mask, logits=False)
        cache, total = out.cache, total + out.hidden.to(total.dtype).sum(1)
    return total


def window_weights(how: Steps, mask: Tensor | None, like: Tensor) -> Tensor | None:
    """How much of the gradient each position of the past takes, [1 or B, 1, T, 1]; None for all.

    Counted along each row's own tokens, where `mask` [B, T] leaves padding out.
    """
    n_past, length = like.shape[-2], how.window_length
    if not 0 < length < n_past:
        return None
    place = torch.arange(n_past, device=like.device)[None]  # among the row's tokens
    n_tokens: Any = n_past
    if mask is not None:
        n_tokens = mask.sum(-1, keepdim=True)
        place = place - (n_past - n_tokens)
    start = 0 if how.window_side == "first" else n_tokens - length
    place = place - start
    weights = ((place >= 0) & (place < length)).to(like.dtype)
    if how.decay:
        weights = weights * (place + 1) / length
    if mask is not None:  # a row shorter than the window moves whole
        weights = torch.where(n_tokens <= length, torch.ones_like(weights), weights)
    return weights[:, None, :, None]


def floored(log_u: Tensor) -> Tensor:
    """log U for the KL, with the floor that Uber's code gives to probabilities near 0."""
    u = log_u.exp()
    return (u + SMALL_CONST * (u <= SMALL_CONST)).log()


def class_loss(logits: Tensor, label: int) -> Tensor:
    """Cross-entropy of a class per row, [B]; one logit is that of class 1 against class 0."""
    return -class_logps(logits.float())[:, label]


# -- what is asked for ----------------------------------------------------------------------------


def check_count(name: str, value: object, low: int) -> None:
    """Raises unless `value` is a whole number from `low`."""
    if type(value) is not int:
        raise TypeError(f"{name} must be an int: got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}: got {value}")


def goal_of(
    loss_type: int, bags: Sequence[Any] | None, classifier: Any, class_label: int | None
) -> Goal:
    """The goal that Uber's arguments name; with loss_type 0 what is given.

    Raises:
        ValueError: neither bag nor classifier, one that loss_type needs and that is not there, a
            class that is none of the classifier's.
    """
    if loss_type not in (0, PPLM_BOW, PPLM_DISCRIM, PPLM_BOW_DISCRIM):
        raise ValueError(f"loss_type must be 1 (bags), 2 (discriminator) or 3: got {loss_type!r}")
    has_bags = bags is not None and len(bags) > 0
    with_bags = has_bags if not loss_type else loss_type != PPLM_DISCRIM
    with_head = classifier is not None if not loss_type else loss_type != PPLM_BOW
    if not (with_bags or with_head):
        raise ValueError("neither a bag of words nor a discriminator: wanted one of them, or both")
    found: list[Bag] = []
    if with_bags:
        found = [bag if isinstance(bag, Bag) else bag_weights(bag) for bag in bags or ()]
        found = [bag for bag in found if len(bag.ids)]  # the mass of none is 0, which has no log
        if not found:
            raise ValueError("no bag of words with a word of one token: wanted at least one")
    if not with_head:
        return Goal(tuple(found))
    if classifier is None:
        raise ValueError(f"loss_type {loss_type} steers by a classifier: got none")
    n = getattr(classifier, "class_size", getattr(classifier, "out_features", None))
    end = None if n is None else max(n, 2)
    if type(class_label) is not int or class_label < 0 or (end is not None and class_label >= end):
        wanted = "a class's number from 0" + ("" if end is None else f" to {end - 1}")
        raise ValueError(f"class_label: got {class_label!r}, wanted {wanted}")
    return Goal(tuple(found), classifier, class_label)


def check_past(name: str, past: Tensor, model: Any, rows: int, n_tokens: int) -> None:
    """ValueError unless a packed past is the model's, of so many rows and tokens."""
    from transformers import DynamicCache

    wanted = len(DynamicCache(config=without_adapter(model).config).layers), rows, n_tokens
    got = past.shape[0], past.shape[2], past.shape[4]
    if got != wanted:
        raise ValueError(f"{name} has layers, rows and tokens {got}: wanted {wanted}")


def check_goal(goal: Goal, model: Any) -> None:
    """ValueError unless the model has a past to perturb, and bags and head fit it."""
    check_model(model)
    inner = without_adapter(model)
    for module in (model, goal.classifier):
        if isinstance(module, nn.Module) and any(p.is_inference() for p in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} was made inside torch.inference_mode, which allows no"
                " gradient: wanted it made outside"
            )
    if hasattr(goal.classifier, "embed_size"):
        check_fits(goal.classifier, inner)
    n_tokens = inner.get_input_embeddings().weight.shape[0]
    for n, bag in enumerate(goal.bags):
        if int(bag.ids.max()) >= n_tokens:
            raise ValueError(
                f"bag {n}: token {int(bag.ids.max())} is beyond the model's {n_tokens}: wanted bags"
                " made with the model's own tokenizer"
            )
