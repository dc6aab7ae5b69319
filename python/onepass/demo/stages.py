"""The two things the demo trains, each as a loss of the step number: model, then adapter.

A stage draws its batches from the seed and the step alone, so that a resumed run needs no random
state to see what an unbroken one would have seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from .. import cross_entropy, masked_inner_product, masked_normalized_l2
from .model import autocast, hidden_states, original
from .settings import Settings
from .tokens import Rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

KINDS = ("code", "prose")  # the order of the two halves of every batch


@dataclass(frozen=True)
class Stage:
    """What the training loop needs to know; steps count from 0 within the stage."""

    name: str
    n_steps: int
    parameters: list[torch.nn.Parameter]
    learning_rate: Callable[[int], float]
    weight_decay: float
    loss: Callable[[int], tuple[torch.Tensor, dict[str, float]]]  # and what to note down


def batch(rows: Mapping[str, Rows], settings: Settings, seed: int, step: int) -> Rows:
    """Random windows, the code in the first half of the batch, the prose in the second."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    halves = []
    for kind in KINDS:
        drawn = torch.randint(
            len(rows[kind]), (settings.rows_of_each_kind,), generator=generator
        ).to(rows[kind].ids.device)
        halves.append(rows[kind].pick(drawn))
    code, prose = halves
    return Rows(
        torch.cat([code.ids, prose.ids]),
        torch.cat([code.mask, prose.mask]),
        torch.cat([code.labels, prose.labels]),
        torch.cat([code.n_bytes, prose.n_bytes]),
    )


def language_model_stage(
    model: LlamaForCausalLM, rows: Mapping[str, Rows], settings: Settings, seed: int
) -> Stage:
    """Next-token prediction on both kinds of text."""

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        b = batch(rows, settings, seed, step)
        with autocast(b.ids.device):
            logits = model(input_ids=b.ids).logits  # lazy: see pipeline.py
        # The line that `torch.nn.functional.cross_entropy` would stand in, with or without ours.
        loss = cross_entropy(logits.flatten(0, 1), b.labels.flatten())
        return loss, {}

    def learning_rate(step: int) -> float:
        warm = min((step + 1) / settings.lm_warmup_steps, 1.0)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / settings.lm_steps)
        return settings.lm_learning_rate * min(warm, max(cosine, 0.05))

    return Stage(
        "language model",
        settings.lm_steps,
        list(model.parameters()),
        learning_rate,
        settings.lm_weight_decay,
        loss,
    )


def coefficients(step: int, settings: Settings) -> tuple[float, float]:
    """Weights of (break, keep): first break, then keep, as Zou et al. 2024 schedule them.

    Here progress runs to 1 at the last step; theirs ends at 1/2, which leaves prose further off.
    """
    progress = min((step + 1) / settings.cb_steps, 1.0)
    return settings.cb_coefficient * (1 - progress), settings.cb_coefficient * progress


def circuit_breaker_stage(
    model: PeftModel, rows: Mapping[str, Rows], settings: Settings, seed: int
) -> Stage:
    """Turn code's hidden states away from the original ones, hold prose's where they were."""
    n_code = settings.rows_of_each_kind

    def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        b = batch(rows, settings, seed, settings.lm_steps + step)
        with original(model):
            before = hidden_states(model, b.ids)
        after = hidden_states(model, b.ids)
        broken = [
            masked_inner_product(
                after[layer][:n_code], before[layer][:n_code], b.mask[:n_code], relu=True
            )
            for layer in settings.target_layers
        ]
        kept = [
            masked_normalized_l2(a[n_code:], o[n_code:], b.mask[n_code:])
            # less the embeddings, which no adapter of the blocks can change
            for a, o in zip(after[1:], before[1:], strict=True)
        ]
        break_loss, keep_loss = torch.stack(broken).mean(), torch.stack(kept).mean()
        break_weight, keep_weight = coefficients(step, settings)
        noted = {"inner_product_code": break_loss.item(), "distance_prose": keep_loss.item()}
        return break_weight * break_loss + keep_weight * keep_loss, noted

    return Stage(
        "circuit breaker",
        settings.cb_steps,
        [p for p in model.parameters() if p.requires_grad],
        lambda step: settings.cb_learning_rate * (1 - step / settings.cb_steps),
        0.0,
        loss,
    )
