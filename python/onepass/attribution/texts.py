"""From texts to the tokens that a model reads and those that are explained."""

from __future__ import annotations

import functools
import logging
from typing import Any, NamedTuple

import torch

from ..training.generation import no_settings, padding_of

logger = logging.getLogger("onepass")


class Tokens(NamedTuple):
    """What the model reads, and where the targets begin."""

    encoder: list[int]  # empty of a model without one
    decoder: list[int]  # with the targets
    first: int  # of the targets, in `decoder`

    @property
    def targets(self) -> list[int]:
        return self.decoder[self.first :]


def encode(
    model: Any,
    tokenizer: Any,
    text: str,
    generated: str | None = None,
    max_new_tokens: int | None = None,
    name: str = "text",
) -> Tokens:
    """The text, and after it `generated` or what the model goes on with: the targets. Of neither
    each token of the text but the first is a target.

    Raises:
        ValueError: an empty text, no targets, more tokens than the model takes.
    """
    if not isinstance(text, str) or (generated is not None and not isinstance(generated, str)):
        kind = type(text if not isinstance(text, str) else generated).__name__
        raise TypeError(f"{name} and generated must be strings: got {kind}")
    if generated is not None and max_new_tokens is not None:
        raise ValueError("generated and max_new_tokens exclude each other")
    if generated == "":
        raise ValueError("generated is empty")
    encoder, start = prompt(model, tokenizer, text, name)
    if max_new_tokens is not None:
        _check_length(model, len(start) + max_new_tokens, name)
        decoder = _continued(model, tokenizer, encoder or start, max_new_tokens)
    elif encoder:
        if generated is None:
            raise ValueError("an encoder-decoder needs generated, or max_new_tokens")
        decoder = [*start, *_ids(tokenizer, text_target=generated)]
    elif generated is None:
        decoder, start = start, start[:1]
    else:
        rest = generated.removeprefix(text) or generated  # inseq's begin with the prompt
        if rest != generated:
            _tell_prompts(name)
        decoder = _ids(tokenizer, text + rest)
        cut_elsewhere = decoder[: len(start)] != start or len(decoder) == len(start)
        if cut_elsewhere or decoder[-1] == tokenizer.eos_token_id:
            decoder = [*start, *_ids(tokenizer, rest, add_special_tokens=False)]
    if len(decoder) == len(start):
        raise ValueError(f"{name} has one token, and none before it: wanted two or more")
    _check_length(model, max(len(encoder), len(decoder)), name)
    return Tokens(encoder, decoder, len(start))


@functools.cache
def _tell_prompts(name: str) -> None:
    logger.warning("%s: what was generated begins with it: it is taken off there", name)


def prompt(model: Any, tokenizer: Any, text: str, name: str) -> tuple[list[int], list[int]]:
    """What the encoder reads, empty without one, and what the decoder begins with.

    Raises:
        ValueError: there is nothing.
    """
    if not text.strip():
        raise ValueError(f"{name} is empty")
    ids = _ids(tokenizer, text)
    if not ids:
        raise ValueError(f"{name} has no tokens: got {text[:40]!r}")
    if model.config.is_encoder_decoder:
        return ids, [_decoder_start(model)]
    ends = tokenizer.eos_token_id
    if len(ids) > 1 and ids[-1] == ends and not text.endswith(tokenizer.eos_token):
        ids = ids[:-1]  # put there by the tokenizer: nothing follows it
    return [], ids


def _ids(tokenizer: Any, *text: str, **how: Any) -> list[int]:
    ids: list[int] = tokenizer(*text, **how)["input_ids"]
    return ids


def _decoder_start(model: Any) -> int:
    found = model.generation_config.decoder_start_token_id
    found = model.config.decoder_start_token_id if found is None else found
    found = model.config.bos_token_id if found is None else found
    if not isinstance(found, int):
        raise ValueError("the model's config has no decoder_start_token_id to begin with")
    return found


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, ids: list[int], max_new_tokens: int) -> list[int]:
    """The likeliest tokens one by one, after `ids` or, of an encoder-decoder, beside them."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id if ends is None else ends,
        pad_token_id=padding_of(tokenizer),
        use_cache=True,
    )
    if model.config.is_encoder_decoder:
        config.decoder_start_token_id = _decoder_start(model)
    given = torch.tensor([ids], device=model.device)
    with no_settings(model):
        out = model.generate(
            input_ids=given, attention_mask=torch.ones_like(given), generation_config=config
        )
    found: list[int] = out[0].tolist()
    return found


def _check_length(model: Any, n: int, name: str) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(most, int) and n > most:
        raise ValueError(f"{name} makes {n} tokens, more than the {most} that the model takes")
