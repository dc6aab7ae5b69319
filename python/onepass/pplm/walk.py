"""A steered text as it grows: the perturbed past and the unperturbed one, a token at a time.

Perturbations stay in the past, as in Uber's generate_text_pplm; the unperturbed model keeps a past
of its own, where there all tokens are run again for every new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._check import check_above_0, check_number
from .forward import (
    check_model,
    check_places,
    left_mask,
    materialized,
    run,
    steady,
    token_embeddings,
)
from .perturb import Goal, Steps, check_count, check_goal, check_past, perturbed
from .sampling import check_k, draw, fuse, top_k_filter


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen; the names are Uber's.

    Args:
        temperature: divides the perturbed model's logits, and only these.
        gm_scale: 1 takes the perturbed model alone, 0 the unperturbed one.
        top_k: the most probable tokens among which is chosen; 0 for all.
        sample: draw one, or take the most probable.
    """

    temperature: float = 1.0
    gm_scale: float = 0.9
    top_k: int = 10
    sample: bool = False

    def __post_init__(self) -> None:
        check_above_0("temperature", self.temperature)
        check_number("gm_scale", self.gm_scale, 0.0, 1.0)
        check_k(self.top_k)

    def fused(self, found: Next) -> Tensor:
        """log of P^gm_scale U^(1 - gm_scale), [B, V]; where nothing steers of P alone."""
        log_p = (found.logits / self.temperature).log_softmax(-1)
        return log_p if found.log_u is None else fuse(log_p, found.log_u, self.gm_scale)

    def token(self, found: Next, generator: torch.Generator | None = None) -> Tensor:
        """A token per row, [B]."""
        kept = top_k_filter(self.fused(found), self.top_k)
        if not self.sample:
            return kept.argmax(-1)
        return draw(kept.softmax(-1), generator)[:, 0]


class Next(NamedTuple):
    """What is known of the next token."""

    logits: Tensor  # [B, V] fp32, of the perturbed model
    log_u: Tensor | None  # [B, V] fp32, of the unperturbed one; None where nothing steers
    losses: list[Tensor]  # [B] an iteration, NaN in ended rows; empty where nothing was perturbed


class Walk:
    """A batch of texts, each row steered as if it were alone.

    Args:
        ids: [B, S], S at least 1.
        goal: None steers to nothing.
        steers: False measures the class's loss and steers to nothing.
        length: tokens that are to come; there must be positions for them.
        mask: [B, S], 0 where a row is padded on the left.
        grad_length: tokens after which the past is perturbed no more.
        past: perturbed already, [L, 2, B, H, S - 1, d]; None where it is not.

    Raises:
        ValueError: a goal or a model that does not fit, a mask or past of another shape, a model
            of too few positions.
    """

    def __init__(
        self,
        model: Any,
        ids: Tensor,
        goal: Goal | None,
        how: Steps,
        length: int,
        *,
        mask: Tensor | None = None,
        grad_length: int = 10000,
        past: Tensor | None = None,
        steers: bool = True,
    ) -> None:
        check_count("length", length, 0)
        check_count("grad_length", grad_length, 0)
        if ids.dim() != 2 or not ids.shape[1]:
            raise ValueError(f"ids must be [B, S] with at least a token: got {tuple(ids.shape)}")
        if mask is not None:
            mask = left_mask(mask, (ids.shape[0], ids.shape[1]))
        looks = steers and goal is not None and goal.classifier is not None
        n_ahead = how.horizon_length if looks else 0
        check_places(model, ids.shape[1], length, n_ahead)
        device = model.device
        if goal is None:
            check_model(model)
        else:
            check_goal(goal, model)
        if past is not None:
            check_past("past", past, model, ids.shape[0], ids.shape[1] - 1)
        self.model, self.how = model, replace(how, per_row=True)
        self.length = length
        self.steers = steers and goal is not None
        self.steps_left = grad_length if how.num_iterations and how.stepsize and steers else 0
        with torch.inference_mode(False):  # copies that autograd may keep
            self.goal = None if goal is None else goal.on(device)
            self.ids = ids.to(device, copy=True)
            self.mask = None if mask is None else mask.to(device, copy=True)
        self.past = past  # None while it is the unperturbed one
        self.unpert_past: Tensor | None = None
        self.hidden_sum: Any = 0  # [B, D], over the tokens of unpert_past
        self.grad_norms: Tensor | None = None
        self.class_losses: Tensor | None = None  # [B], of the unperturbed text so far
        self.ended: Tensor | None = None  # [B]; None while no row has
        self.embedding: Tensor | None = None
        if looks:
            with steady(model):
                self.embedding = token_embeddings(model)
        if self.ids.shape[1] > 1:
            before = None if self.mask is None else self.mask[:, :-1]
            with steady(model), torch.no_grad():
                out = run(model, self.ids[:, :-1], None, before, logits=False)
                hidden = out.hidden.to(torch.promote_types(out.hidden.dtype, torch.float32))
                kept = hidden if before is None else hidden * before[..., None]
                self.unpert_past, self.hidden_sum = out.past(), kept.sum(1)

    def next(self) -> Next:
        """Perturb the past for the token that follows; call `append` before it is called again."""
        goal = self.goal
        last = self.ids[:, -1:]
        with steady(self.model, None if goal is None else goal.classifier), torch.no_grad():
            unpert = run(self.model, last, self.unpert_past, self.mask)
            assert unpert.logits is not None
            logits = materialized(unpert.logits)
            log_u = logits.log_softmax(-1) if self.steers else None
            after = unpert.past()
            past, losses = self.past, []
            if goal is not None and self.unpert_past is not None and self.steps_left:
                found = perturbed(
                    self.model,
                    self.unpert_past if past is None else past,
                    last,
                    goal,
                    self.how,
                    log_u=log_u,
                    unpert_past=after,
                    accumulated_hidden=self.hidden_sum,
                    grad_norms=self.grad_norms,
                    mask=self.mask,
                    embedding=self.embedding,
                )
                past, losses, self.grad_norms = found.past, found.losses, found.grad_norms
                if self.ended is not None:
                    losses = [loss.masked_fill(self.ended, torch.nan) for loss in losses]
            self.steps_left = max(0, self.steps_left - 1)
            if past is not None:
                out = run(self.model, last, past, self.mask)
                assert out.logits is not None
                logits, past = materialized(out.logits), out.past()
            self.past, self.unpert_past = past, after
            self.hidden_sum = self.hidden_sum + unpert.hidden[:, 0].to(
                torch.promote_types(unpert.hidden.dtype, torch.float32)
            )
            if goal is not None and goal.classifier is not None:
                n_tokens: Any = self.ids.shape[1]
                if self.mask is not None:
                    n_tokens = self.mask.sum(-1, keepdim=True)
                of_class = goal.class_loss(self.hidden_sum / n_tokens)
                if self.ended is not None and self.class_losses is not None:
                    of_class = of_class.where(~self.ended, self.class_losses)
                self.class_losses = of_class
        return Next(logits, log_u, losses)

    def append(self, tokens: Tensor, ended: Sequence[bool] = ()) -> None:
        """The tokens [B] that were chosen; of rows that have ended with them no loss counts any
        more."""
        if any(ended):
            self.ended = torch.tensor(ended, device=tokens.device)
        with torch.inference_mode(False):  # autograd may keep them
            self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
            if self.mask is not None:
                self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
