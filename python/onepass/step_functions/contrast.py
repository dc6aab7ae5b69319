"""A step in another context: what the model says after a contrastive text, or from another source.

Through inseq's AttributionModel where that is the model, else a transformers model and token ids.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..lazy_logits import LazyLogits
from ..training.hidden_states import lazy_within, without_adapter
from .args import StepFunctionArgs
from .core import check_ids
from .last_row import state_of

KEPT_UNDER = "_onepass_contrasts"
Alignments = Sequence[tuple[int, int]] | Sequence[Sequence[tuple[int, int]]] | None


class Contrast(NamedTuple):
    """The tokens to compare with, and the output they are read from."""

    target_ids: Tensor
    output: Any


def contrast_of(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Contrast:
    """The contrast of a step; `args` stay as they are.

    The model runs once for all scores of a step that ask for the same contrast. Where the score is
    differentiated, only the token differs unless `contrast_force_inputs`: gradients do not pass
    through other inputs.

    Raises:
        ValueError: another batch size, a source for a decoder-only model, no model.
        IndexError: a contrastive text that ends before the step.
    """
    own_context = args.is_attributed_fn and not contrast_force_inputs
    grad = args.is_attributed_fn and torch.is_grad_enabled()
    asked = (
        *(contrast_sources, contrast_targets, contrast_targets_alignments, skip_special_tokens),
        *(args.attribution_model, args.forward_output.logits, grad),
    )
    state = state_of(*(value for value in asked if isinstance(value, Tensor)))
    kept = [] if own_context else getattr(args.forward_output, KEPT_UNDER, [])
    for before, was, found in kept:
        if was == state and all(a is b for a, b in zip(asked, before, strict=True)):
            return found  # type: ignore[no-any-return]
    other, target_ids = args, args.target_ids
    if contrast_targets is not None:
        aligned = contrast_targets_alignments
        other, target_ids = _after(args, contrast_targets, aligned, skip_special_tokens)
    if contrast_sources is not None:
        other = _from_source(other, contrast_sources, skip_special_tokens)
    if own_context:
        if other is not args:
            warnings.warn(
                "a score that is differentiated compares tokens in its own context: the contrast's"
                " inputs are left aside (contrast_force_inputs=True uses them)",
                stacklevel=4,
            )
        return Contrast(target_ids, args.forward_output)
    with torch.set_grad_enabled(grad):
        found = Contrast(target_ids.clone(), run_again(other))
    if state is None:
        return found
    with contextlib.suppress(AttributeError, TypeError):  # an output that takes no attribute
        setattr(args.forward_output, KEPT_UNDER, [*kept, (asked, state, found)])
    return found


def _after(
    args: Any, text: Any, alignments: Alignments, skip_special_tokens: bool
) -> tuple[Any, Tensor]:
    """The step after as long a prefix of another text, and that text's next token [B]."""
    ids, mask = _encoded(args, text, skip_special_tokens, as_targets=is_encoder_decoder(args))
    check_ids("contrast_targets", ids, args.forward_output.logits.shape[-1])
    prefix = args.decoder_input_ids
    if len(ids) != len(prefix):
        raise ValueError(
            f"contrast_targets must be as many texts as are scored, {len(prefix)}: got {len(ids)} "
            "(methods that expand their inputs, as integrated gradients do, expand no contrast)"
        )
    at = aligned_position(prefix.shape[1], alignments)
    if at >= ids.shape[1]:
        raise IndexError(
            f"contrast_targets end after {ids.shape[1]} tokens: wanted one at position {at}"
        )
    if at == prefix.shape[1] and torch.equal(ids[:, :at], prefix):
        return args, ids[:, at]
    embeds = embedded(args, ids[:, :at], as_targets=True) if is_encoder_decoder(args) else None
    changed = {
        "decoder_input_ids": ids[:, :at],
        "decoder_input_embeds": embeds,
        "decoder_attention_mask": None if mask is None else mask[:, :at],
    }
    return replace(args, **changed), ids[:, at]


def aligned_position(position: int, alignments: Alignments) -> int:
    """The contrast's position for one of the text: itself where nothing is said. Of alignments for
    each text the first counts, as in inseq."""
    pairs: Any = alignments if alignments is not None else []
    first = pairs[0] if len(pairs) else None
    if isinstance(first, list | tuple) and first and isinstance(first[0], list | tuple):
        pairs = first
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(
            f"contrast_targets_alignments must be pairs of positions, [(ours, theirs), ...]: got "
            f"{alignments!r:.60}"
        )
    found = [theirs for ours, theirs in pairs if ours == position]
    if len(pairs) and not found:
        raise ValueError(f"contrast_targets_alignments have no pair for position {position}")
    return min(found, default=position)


def _from_source(args: Any, source: Any, skip_special_tokens: bool) -> Any:
    """The same step of an encoder-decoder model, from another source."""
    if not is_encoder_decoder(args):
        raise ValueError(
            "contrast_sources are for encoder-decoder models: give a decoder-only model the other "
            "context as the beginning of contrast_targets"
        )
    ids, mask = _encoded(args, source, skip_special_tokens, as_targets=False)
    check_ids("contrast_sources", ids, sys.maxsize)  # an encoder may have tokens of its own
    if len(ids) != len(args.encoder_input_ids):
        raise ValueError(
            f"contrast_sources must be as many texts as are scored, {len(args.encoder_input_ids)}: "
            f"got {len(ids)}"
        )
    if torch.equal(ids, args.encoder_input_ids):
        return args
    changed = {
        "encoder_input_ids": ids,
        "encoder_input_embeds": embedded(args, ids, as_targets=False),
        "encoder_attention_mask": mask,
    }
    return replace(args, **changed)


def _encoded(
    args: Any, text: Any, skip_special_tokens: bool, as_targets: bool
) -> tuple[Tensor, Tensor | None]:
    """Ids and mask of a text, of an encoding, or ids as they are."""
    device = args.decoder_input_ids.device
    if isinstance(text, Tensor):
        return text.to(device), None
    if isinstance(text, str | list):
        encode = getattr(args.attribution_model, "encode", None)
        if encode is None:
            raise ValueError(
                "a contrast in words needs inseq's AttributionModel, which has the tokenizer: pass "
                "token ids [B, S]"
            )
        text = encode(text, as_targets=as_targets, add_special_tokens=not skip_special_tokens)
    mask = getattr(text, "attention_mask", None)
    return text.input_ids.to(device), None if mask is None else mask.to(device)


def is_encoder_decoder(args: Any) -> bool:
    """Whether a step has a source beside its prefix."""
    return hasattr(args, "encoder_input_ids")


def embedded(args: Any, ids: Tensor, as_targets: bool) -> Tensor | None:
    """Embeddings as inseq's model makes them; None for a model that takes ids."""
    embed = getattr(args.attribution_model, "embed", None)
    return None if embed is None else embed(ids, as_targets=as_targets)


def run_again(args: Any) -> Any:
    """The model's output for the inputs of a step, of which the last position alone is kept. As in
    inseq, an encoder-decoder model is given embeddings and a decoder-only model ids. Positions of a
    prefix that is padded on the left count from its first token, as in generate()."""
    model = args.attribution_model
    if model is None:
        raise ValueError("this score runs the model again: attribution_model is None")
    if hasattr(model, "get_forward_output"):
        batch = model.formatter.convert_args_to_batch(args)
        return last_of(model.get_forward_output(batch, use_embeddings=is_encoder_decoder(args)))
    given = _inputs("decoder_" if is_encoder_decoder(args) else "", args, "decoder")
    if is_encoder_decoder(args):
        given |= _inputs("", args, "encoder")
    elif (mask := given["attention_mask"]) is not None and not mask[:, 0].all():
        if "position_ids" in inspect.signature(without_adapter(model).forward).parameters:
            given["position_ids"] = ((mask != 0).cumsum(-1) - 1).clamp_min(0)
    with lazy_within(model, None):
        return last_of(model(**given, use_cache=False))


def last_of(output: Any) -> Any:
    """The last position's logits [B, 1, V], without what else an output holds."""
    last = output.logits[:, -1:]
    return SimpleNamespace(logits=last if isinstance(last, LazyLogits) else last.clone())


def _inputs(prefix: str, args: Any, side: str) -> dict[str, Any]:
    """A transformers model's arguments for one side of a step: embeddings where they are given to
    an encoder-decoder model, else ids."""
    ids, embeds, mask = (
        getattr(args, f"{side}_{name}") for name in ("input_ids", "input_embeds", "attention_mask")
    )
    by_embeds = is_encoder_decoder(args) and embeds is not None
    given = {"inputs_embeds": embeds} if by_embeds else {"input_ids": ids}
    return {prefix + name: value for name, value in {**given, "attention_mask": mask}.items()}
