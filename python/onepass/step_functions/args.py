"""What a step function is called with, under the names that inseq 0.7.1 gave its fields."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class StepFunctionBaseArgs:
    """One step of generation: a prefix, the model's output for it, and the token that follows.

    attribution_model       inseq's AttributionModel, or a transformers model; None will do for
                            scores that need no further forward
    forward_output          has `logits` [B, S, V], or LazyLogits; of a prefix padded on the left
                            those of positions that count from its first token, as in generate()
    target_ids              [B] or [B, 1], the tokens that follow
    decoder_input_ids       [B, S], the prefix
    decoder_input_embeds    [B, S, D], its embeddings
    decoder_attention_mask  [B, S]
    is_attributed_fn        the score is to be differentiated, not to be read
    """

    attribution_model: Any
    forward_output: Any
    target_ids: Tensor
    decoder_input_ids: Tensor | None = None
    decoder_input_embeds: Tensor | None = None
    decoder_attention_mask: Tensor | None = None
    is_attributed_fn: bool = False


@dataclass
class StepFunctionDecoderOnlyArgs(StepFunctionBaseArgs):
    """A step of a decoder-only model."""


@dataclass
class StepFunctionEncoderDecoderArgs(StepFunctionBaseArgs):
    """A step of an encoder-decoder model: its source beside, ids and mask [B, T], embeddings
    [B, T, D]."""

    encoder_input_ids: Tensor | None = None
    encoder_input_embeds: Tensor | None = None
    encoder_attention_mask: Tensor | None = None


StepFunctionArgs = StepFunctionDecoderOnlyArgs | StepFunctionEncoderDecoderArgs


StepFunction = Callable[..., Tensor]  # fn(args, **its own): a score [B] of one step
