"""What calls of a model's `generate` need: a token to pad with, no settings but their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .hidden_states import without_adapter


def padding_of(tokenizer: Any) -> int:
    """A token to pad with; what is padded is masked, so that any will do."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in found if token is not None)


@contextlib.contextmanager
def no_settings(model: Any) -> Iterator[None]:
    """Without the settings that a model brings for its sampling (min_p, repetition_penalty, ...),
    which transformers takes where a call says nothing; restored after."""
    from transformers import GenerationConfig

    before = {id(m): (m, m.generation_config) for m in (model, without_adapter(model))}
    try:
        for owner, _ in before.values():
            owner.generation_config = GenerationConfig()
        yield
    finally:
        for owner, config in before.values():
            owner.generation_config = config
