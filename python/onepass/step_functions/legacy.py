"""The step functions as inseq 0.4 had them: keyword arguments in the place of one object.

crossentropy is in bits, and perplexity 2 to its power, 1 / p. Arguments that a function does not
name are taken and left aside, so that one call fits all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import registry
from .args import StepFunctionDecoderOnlyArgs, StepFunctionEncoderDecoderArgs
from .contrast import embedded, run_again
from .core import SCORES, Options, check_ids, counted
from .dropout import check_dropout, noisy_runs
from .functions import of_row
from .last_row import last_facts, last_pair, last_targets

LEGACY = Options(base="2", power="2")


def logit_fn(
    attribution_model: Any, forward_output: Any, target_ids: Tensor, **kwargs: Any
) -> Tensor:
    """z_t, the target's logit, [B]."""
    return of_row("logit", forward_output, target_ids, LEGACY)


def probability_fn(
    attribution_model: Any, forward_output: Any, target_ids: Tensor, **kwargs: Any
) -> Tensor:
    """p_t, the target's probability, [B]."""
    return of_row("probability", forward_output, target_ids, LEGACY)


def entropy_fn(
    attribution_model: Any, forward_output: Any, target_ids: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """-sum_v p_v log p_v of the next token, in nats, [B]."""
    if target_ids is None:
        logits = forward_output.logits
        target_ids = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return of_row("entropy", forward_output, target_ids, LEGACY)


def crossentropy_fn(
    attribution_model: Any, forward_output: Any, target_ids: Tensor, **kwargs: Any
) -> Tensor:
    """-log2 p_t, in bits, [B]."""
    return of_row("crossentropy", forward_output, target_ids, LEGACY)


def perplexity_fn(
    attribution_model: Any, forward_output: Any, target_ids: Tensor, **kwargs: Any
) -> Tensor:
    """2 to the power of the cross-entropy in bits, 1 / p_t, [B]."""
    return of_row("perplexity", forward_output, target_ids, LEGACY)


def contrast_prob_diff_fn(
    attribution_model: Any,
    forward_output: Any,
    encoder_input_embeds: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    target_ids: Tensor | None = None,
    contrast_ids: Tensor | None = None,
    contrast_attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The target's probability less that of the contrastive text's token after as many, [B].

    Args:
        contrast_ids, contrast_attention_mask: [B, S'] of the contrastive text.

    Raises:
        IndexError: a contrastive text that ends before the step. ValueError: another batch size,
        something missing.
    """
    given = {
        "decoder_input_ids": decoder_input_ids,
        "target_ids": target_ids,
        "contrast_ids": contrast_ids,
    }
    for name, value in given.items():
        if value is None:
            raise ValueError(f"contrast_prob_diff needs {name}: got None")
    assert decoder_input_ids is not None and target_ids is not None and contrast_ids is not None
    at = decoder_input_ids.shape[1]
    vocab_size = forward_output.logits.shape[-1]
    check_ids("contrast_ids", contrast_ids, vocab_size, len(decoder_input_ids))
    if contrast_ids.shape[1] <= at:
        raise IndexError(
            f"contrast_ids end after {contrast_ids.shape[1]} tokens: wanted one at position {at}"
        )
    ids = contrast_ids[:, :at].to(decoder_input_ids.device)
    mask = contrast_attention_mask
    mask = None if mask is None else mask[:, :at].to(decoder_input_ids.device)
    source = kwargs.get("encoder_input_ids"), encoder_input_embeds, encoder_attention_mask
    output = _run(attribution_model, forward_output, target_ids, (ids, None, mask), source)
    name = "contrast_prob_diff"
    facts = last_pair(name, forward_output, target_ids, output, contrast_ids[:, at])
    found = SCORES[name].of(facts, LEGACY)
    return counted(found, last_targets(target_ids, found))


def mc_dropout_prob_avg_fn(
    attribution_model: Any,
    forward_output: Any,
    encoder_input_embeds: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    decoder_input_ids: Tensor | None = None,
    decoder_input_embeds: Tensor | None = None,
    decoder_attention_mask: Tensor | None = None,
    target_ids: Tensor | None = None,
    aux_model: Any = None,
    n_mcd_steps: int = 10,
    eps: float = 0.0,
    seed: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """How many standard deviations p_t lies above the mean of noisy runs of `aux_model`, [B].

    Args:
        aux_model: a transformers model with dropout, of the category and the vocabulary of the
            attribution model.
        n_mcd_steps, eps, seed: as of `onepass.step_functions.mc_dropout_prob_avg_fn`.

    Raises:
        ValueError: no aux_model, one of another category or vocabulary or without dropout,
        n_mcd_steps below 2.
    """
    if not isinstance(aux_model, nn.Module):
        raise ValueError(
            "mc_dropout_prob_avg needs aux_model, a transformers model with dropout: got "
            f"{type(aux_model).__name__}"
        )
    if target_ids is None:
        raise ValueError("mc_dropout_prob_avg needs target_ids: got None")
    check_dropout(aux_model, n_mcd_steps, eps)
    _check_alike(attribution_model, aux_model, forward_output)
    own = last_facts(forward_output, target_ids, ["logp"])
    prefix = decoder_input_ids, decoder_input_embeds, decoder_attention_mask
    source = kwargs.get("encoder_input_ids"), encoder_input_embeds, encoder_attention_mask

    def run() -> Tensor:
        output = _run(aux_model, forward_output, target_ids, prefix, source)
        logp: Tensor = last_facts(output, target_ids, ["logp"]).logp
        return logp.to(own.logp.device)

    grad = bool(kwargs.get("is_attributed_fn")) and torch.is_grad_enabled()
    noisy = noisy_runs(aux_model, run, n_mcd_steps, seed, grad)
    facts = own._replace(noisy=noisy)
    found = SCORES["mc_dropout_prob_avg"].of(facts, LEGACY._replace(eps=eps))
    return counted(found, last_targets(target_ids, found))


def register_step_function(
    fn: Callable[..., Tensor], identifier: str, aggregate_map: Mapping[str, str] | None = None
) -> None:
    """Add a function of this style to the registry, in the place of whatever has its name."""

    def step_function(args: Any, **kwargs: Any) -> Tensor:
        return fn(**vars(args), **kwargs)

    registry.register_step_function(step_function, identifier, aggregate_map, overwrite=True)


Side = tuple[Tensor | None, Tensor | None, Tensor | None]  # ids, embeddings, mask


def _run(model: Any, output: Any, target_ids: Tensor, prefix: Side, source: Side) -> Any:
    """The model's output after a prefix, from a source where it has one."""
    args: Any
    if source[0] is None and source[1] is None:
        args = StepFunctionDecoderOnlyArgs(model, output, target_ids, *prefix)
        return run_again(args)
    args = StepFunctionEncoderDecoderArgs(model, output, target_ids, *prefix, False, *source)
    if args.decoder_input_embeds is None and args.decoder_input_ids is not None:
        args.decoder_input_embeds = embedded(args, args.decoder_input_ids, as_targets=True)
    return run_again(args)


def _check_alike(model: Any, aux_model: Any, forward_output: Any) -> None:
    """ValueError for models that cannot be compared; a warning where their names differ."""
    own = getattr(getattr(model, "model", model), "config", None)
    other = getattr(aux_model, "config", None)
    kinds = [bool(getattr(config, "is_encoder_decoder", False)) for config in (own, other)]
    if None not in (own, other) and kinds[0] != kinds[1]:
        names = ["encoder-decoder" if kind else "decoder-only" for kind in kinds]
        raise ValueError(
            f"aux_model must be of the attribution model's category, {names[0]}: got {names[1]}"
        )
    size, other_size = forward_output.logits.shape[-1], getattr(other, "vocab_size", None)
    if other_size is not None and other_size != size:
        raise ValueError(
            f"aux_model must have the attribution model's vocabulary, {size} tokens: got "
            f"{other_size}"
        )
    name, other_name = (getattr(config, "name_or_path", None) for config in (own, other))
    if name != other_name:
        warnings.warn(
            f"aux_model is {other_name!r}, the attribution model {name!r}: the score compares two "
            "models",
            stacklevel=3,
        )
