"""One step's loss of representation rerouting, for Infinity-style autoregressive image models.

The model is called as FoundationVision's Infinity is: prompts as one compact tensor of text
features, image tokens of all scales. Hidden states are those of its blocks.
"""

from __future__ import annotations

import contextlib
import functools
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...training.hidden_states import (
    blocks_of,
    capture,
    no_logits,
    only_blocks,
    without_adapter,
)
from ..hidden_states import blocks_needed
from ..loss import Rerouting, Runs, Terms, loss_of_parts
from ..losses import at_progress
from ..options import ADAPTER_OFF, SCHEDULES

TARGET_LAYERS = (0, 1, 2, 3, 4, 5)
EPS = 1e-8
# The scales of an image of 256 x 256 pixels.
SCALE_SCHEDULE = tuple((1, side, side) for side in (1, 2, 4, 6, 8, 12, 16))


def compute_infinity_circuit_breaker_loss(
    trainer: Any,
    model: nn.Module,
    inputs: Mapping[str, Any],
    target_layers: Sequence[int] = TARGET_LAYERS,
    alpha: float = 0.1,
    return_outputs: bool = False,
    tokenizer: Any = None,
    *,
    reference: str | nn.Module | None = None,
    scale_schedule: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """alpha p retain_loss + alpha (1 - p) circuit_breaker_loss of one batch, to be added to the
    loss of the training; with `return_outputs` (total, retain_loss, circuit_breaker_loss), the
    latter two detached.

    Args:
        trainer: progress p is its prog_it / max_it, 0.5 where it has none; its `reference_model`,
            where it has one, stands in for `reference`.
        model: called as model(text_cond_tuple, x_BLC_wo_prefix, scale_schedule=...), in any of its
            wrappers; `blocks`, or `unregistered_blocks`, are its blocks.
        inputs: `text_cond_tuple`, `text_cond_tuple_circuit_breaker`, each (kv_compact, lens,
            cu_seqlens_k, Ltext); `*_val` is not looked at. Images, if there are any, as
            `x_BLC_wo_prefix` [B, L - 1, d], for either side, and `scale_schedule`; else noise
            stands in for them, the same for either model.
        target_layers: blocks, from 0, at which harmful prompts are turned away. Retain looks at all
            blocks up to the last of them.
        alpha: what the two coefficients sum up to.
        tokenizer: not looked at.
        reference: the model before training: a frozen copy, or "adapter_off".
        scale_schedule: (t, h, w) of each scale, for images that the batch does not bring.
        seed: of the noise, to which prog_it is added.
        options: fields of `Rerouting` by name; `eps` is 1e-8 unless given.

    Raises:
        ValueError: nothing to compare with, layers that the model has not, a batch without prompts,
        masks of another shape.

    Source: document 003, with the formulas of its README (arXiv 2406.04313), not those of its code.
    """
    if reference is None:
        reference = getattr(trainer, "reference_model", None) or ADAPTER_OFF
    rerouting = infinity_rerouting(target_layers, reference, **options)
    done, of_all = getattr(trainer, "prog_it", None), getattr(trainer, "max_it", None)
    progress = done / of_all if done is not None and of_all else 0.5
    terms = infinity_rerouting_loss(
        model,
        inputs,
        at_progress(progress, alpha, SCHEDULES[0]),
        rerouting,
        scale_schedule=scale_schedule,
        seed=seed + int(done or 0),
        every_term=return_outputs,
    )
    if not return_outputs:
        return terms.loss
    return terms.loss, terms.facts["retain_loss"], terms.facts["cb_loss"]


def infinity_rerouting(
    target_layers: Sequence[int], reference: str | nn.Module = ADAPTER_OFF, **options: Any
) -> Rerouting:
    """What a step compares, with Infinity's defaults."""
    defaults: dict[str, Any] = {"layer_convention": "block", "eps": EPS}
    return Rerouting(tuple(target_layers), reference=reference, **{**defaults, **options})


def infinity_rerouting_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coefficients: tuple[float, float],
    options: Rerouting,
    *,
    scale_schedule: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
    monitor: bool = False,
    every_term: bool = False,
) -> Terms:
    """`rerouting_loss` of an Infinity-style model; see `compute_infinity_circuit_breaker_loss`."""
    options.check(model)
    runs = infinity_runs(model, schedule_of(inputs, scale_schedule), options, seed)
    layers = options.retain_layers(len(blocks_of(model)))
    return loss_of_parts(
        model,
        inputs,
        coefficients,
        options,
        runs,
        layers,
        monitor=monitor,
        every_term=every_term,
    )


def schedule_of(
    inputs: Mapping[str, Any], otherwise: Sequence[Sequence[int]] | None
) -> list[tuple[int, int, int]]:
    """The batch's scale schedule, or else the one given, or else that of 256 x 256 pixels."""
    found = inputs.get("scale_schedule") or otherwise or SCALE_SCHEDULE
    return [(int(t), int(h), int(w)) for t, h, w in found]


def infinity_runs(
    model: nn.Module, schedule: list[tuple[int, int, int]], options: Rerouting, seed: int
) -> Runs:
    """How prompts run through an Infinity-style model."""
    multiple = getattr(without_adapter(model), "pad_to_multiplier", None) or 1
    states = functools.partial(_states, options.layer_convention, schedule, seed)
    n_image_tokens = sum(math.prod(scale) for scale in schedule)
    mask = functools.partial(_image_mask, n_image_tokens, multiple)
    return Runs(states, mask, key="text_cond_tuple")


def _states(
    layer_convention: str,
    schedule: list[tuple[int, int, int]],
    seed: int,
    model: nn.Module,
    inputs: Mapping[str, Any],
    ending: str,
    layers: Sequence[int],
) -> list[Tensor]:
    key = f"text_cond_tuple{ending}"
    if key not in inputs:
        raise ValueError(f"the batch has no {key}: it has {sorted(inputs)}")
    text, lens, cu_seqlens, longest = inputs[key]
    images = inputs.get("x_BLC_wo_prefix")
    if images is not None and not ending and len(images) != len(lens):
        raise ValueError(f"x_BLC_wo_prefix has {len(images)} images for {len(lens)} prompts")
    # The same images under either side's prompts: nothing but the prompt tells the sides apart.
    if images is None or len(images) != len(lens):
        images = noise(model, len(lens), schedule, seed)
    with (
        text_kept(model),
        only_blocks(model, blocks_needed(layers, layer_convention)),
        no_logits(model),
        # final=-1: what follows the last block here are logits
        capture(model, layers, layer_convention, final=-1) as found,
    ):
        # A clone: Infinity writes what it drops into the text it was given.
        model((text.clone(), lens, cu_seqlens, longest), images, scale_schedule=schedule)
    return [found[layer] for layer in layers]


def noise(model: nn.Module, n_rows: int, schedule: Sequence[Sequence[int]], seed: int) -> Tensor:
    """Image tokens [B, L - 1, d] of no image, float32."""
    inner = without_adapter(model)
    n_tokens = sum(math.prod(scale) for scale in schedule) - math.prod(schedule[0])
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_rows, n_tokens, inner.word_embed.in_features, generator=generator)
    return drawn.to(next(inner.parameters()).device)


def _image_mask(
    n_image_tokens: int, multiple: int, inputs: Mapping[str, Any], ending: str, state: Tensor
) -> Tensor | None:
    """The attention mask where it is one of the hidden states. Where these are the image's tokens,
    all of them count (None), less what the model pads to a `multiple`."""
    found = inputs.get(f"attention_mask{ending}")
    n_rows, n_tokens = state.shape[:-1]
    if found is not None and found.shape == (n_rows, n_tokens):
        return found
    n_padded = -(-n_image_tokens // multiple) * multiple
    if n_tokens not in (n_image_tokens, n_padded) or (found is not None and len(found) != n_rows):
        mask = "no attention mask" if found is None else f"{tuple(found.shape)}"
        raise ValueError(
            f"attention_mask{ending} must match the hidden states' {(n_rows, n_tokens)}, or these"
            f" the {n_image_tokens} image tokens: got {mask}"
        )
    if found is not None:
        _warn_of_text_mask()
    if n_tokens == n_image_tokens:
        return None
    counts = torch.arange(n_tokens, device=state.device) < n_image_tokens
    return counts.expand(n_rows, n_tokens)


@functools.cache
def _warn_of_text_mask() -> None:
    """Once a process."""
    warnings.warn(
        "the attention mask is the text's, the hidden states are the image's tokens: all of these"
        " count (leave the attention mask out to say so)",
        stacklevel=2,
    )


@contextlib.contextmanager
def text_kept(model: nn.Module) -> Iterator[None]:
    """Drop no prompts for guidance inside: it is by its prompt that a pass is judged."""
    inner = without_adapter(model)
    if not getattr(inner, "cond_drop_rate", 0):
        yield
        return
    before = inner.cond_drop_rate
    inner.cond_drop_rate = 0.0
    try:
        yield
    finally:
        inner.cond_drop_rate = before
