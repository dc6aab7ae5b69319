"""The last row of a forward's logits, and its facts, made once for all scores of a step.

They are kept as an attribute of the forward's output and go with it.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .core import Facts, row_facts, token_rows

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


def last_facts(forward_output: Any, target_ids: Tensor) -> Facts:
    """logit, logp and entropy [B] of the last position, from one pass however often asked for."""
    logits = forward_output.logits
    state = _state(logits, target_ids)
    kept = getattr(forward_output, KEPT_UNDER, None)
    if isinstance(kept, Kept) and kept.logits is logits and kept.target_ids is target_ids:
        if kept.state == state:
            return kept.facts
    rows = last_logits(forward_output)
    target = token_rows("target_ids", last_targets(target_ids, rows), rows)
    facts = row_facts(rows, target, {"logit", "logp", "entropy"}, None, None, "auto")
    with contextlib.suppress(AttributeError, TypeError):  # an output that takes no attribute
        setattr(forward_output, KEPT_UNDER, Kept(logits, target_ids, state, facts))
    return facts


def _state(*tensors: Tensor) -> tuple[Any, ...]:
    """What has to be as it was: gradients on or off, and nothing written to."""
    grad = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    return (*grad, *(None if t.is_inference() else t._version for t in tensors))
