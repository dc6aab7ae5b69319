"""The last row of a forward's logits, and its facts, made once for all scores of a step.

They are kept as an attribute of the forward's output and go with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import (
    OWN,
    SCORES,
    Facts,
    against,
    contrast_needs,
    own_needs,
    row_facts,
    token_rows,
)

KEPT_UNDER = "_onepass_last_row"


class Kept(NamedTuple):
    """Facts, and what they were made of: the same objects, unwritten to since."""

    logits: Tensor
    target_ids: Tensor
    state: tuple[Any, ...]
    facts: Facts


def last_logits(forward_output: Any) -> Tensor:
    """[B, V] of the last position; LazyLogits stay lazy."""
    last: Tensor = forward_output.logits[:, -1]
    return last


def last_targets(target_ids: Tensor, logits: Tensor) -> Tensor:
    """inseq's [B], [B, 1] or, of a batch of one, [], as [B] beside the logits."""
    if target_ids.numel() != logits.shape[0]:
        raise ValueError(
            f"target_ids must hold a token for each of the {logits.shape[0]} rows of the logits: "
            f"got shape {tuple(target_ids.shape)}"
        )
    return target_ids.reshape(-1).to(logits.device)


def last_facts(forward_output: Any, target_ids: Tensor, needs: Iterable[str]) -> Facts:
    """Facts of the last position, [B] each, those in `needs` among them: one pass for all that are
    ever asked for. Where they will be differentiated, only what is asked for now: the gradient of
    one fact alone costs a lazy head no second product."""
    logits = forward_output.logits
    state = state_of(logits, target_ids)
    kept, facts = getattr(forward_output, KEPT_UNDER, None), Facts()
    if isinstance(kept, Kept) and kept.logits is logits and kept.target_ids is target_ids:
        facts = kept.facts if kept.state == state else facts
    missing = {fact for fact in needs if getattr(facts, fact) is None}
    if not missing:
        return facts
    rows = last_logits(forward_output)
    target = token_rows("target_ids", last_targets(target_ids, rows), rows)
    graph = torch.is_grad_enabled() and logits.requires_grad
    made = missing if graph else set(OWN)
    found = row_facts(rows, target, made, "auto")
    facts = facts._replace(**{fact: getattr(found, fact) for fact in made})
    if state is not None:
        with contextlib.suppress(AttributeError, TypeError):  # an output that takes no attribute
            setattr(forward_output, KEPT_UNDER, Kept(logits, target_ids, state, facts))
    return facts


def last_pair(
    name: str, output: Any, target_ids: Tensor, other_output: Any, other_ids: Tensor
) -> Facts:
    """The facts that a score of that name is made of, of a step and of its contrast."""
    needs = SCORES[name].needs
    own = last_facts(output, target_ids, own_needs(needs))
    theirs = last_facts(other_output, other_ids, contrast_needs(needs))
    device = output.logits.device
    return against(own, Facts(*(None if f is None else f.to(device) for f in theirs)))


def state_of(*tensors: Tensor) -> tuple[Any, ...] | None:
    """What has to be as it was: gradients on or off, and nothing written to. None where a tensor of
    inference mode, which counts no writes, cannot say so."""
    if any(t.is_inference() for t in tensors):
        return None
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*grad, *(t._version for t in tensors))
