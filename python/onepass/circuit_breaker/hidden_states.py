"""Hidden states of chosen layers, of the model being trained and of the one it started from.

No logits are made, and no block runs beyond the last one needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..heads import unwrapped
from ..ops._check import check_choice
from ..training.hidden_states import (
    adapter_off,
    blocks_of,
    capture,
    no_logits,
    only_blocks,
    same_draws,
    training_mode,
)
from .options import ADAPTER_OFF, CONVENTIONS


def check_layers(model: nn.Module, layers: Sequence[int], convention: str) -> None:
    """ValueError unless the model has hidden states of all `layers`."""
    check_choice("layer_convention", convention, CONVENTIONS)
    n_blocks = len(blocks_of(model))
    last = n_blocks if convention == "hf_hidden_states" else n_blocks - 1
    wrong = [layer for layer in layers if not 0 <= layer <= last]
    if wrong or not layers or len(set(layers)) < len(layers):
        raise ValueError(
            f"target_layers must be different numbers from 0 to {last} ({n_blocks} blocks,"
            f" layer_convention={convention!r}): got {list(layers)}"
        )


def all_layers(n_blocks: int, convention: str) -> list[int]:
    """The numbers of all hidden states that `n_blocks` blocks have."""
    return list(range(n_blocks + (convention == "hf_hidden_states")))


def blocks_needed(layers: Sequence[int], convention: str) -> int:
    """How many of the blocks must run for the hidden states of `layers`."""
    return max(max(layers) + (convention == "block"), 1)


@contextlib.contextmanager
def as_reference(model: nn.Module, reference: str | nn.Module) -> Iterator[nn.Module]:
    """The model before training, without dropout and without gradients: this one with its adapter
    off, or a frozen copy."""
    with contextlib.ExitStack() as stack:
        original = reference if isinstance(reference, nn.Module) else model
        if not isinstance(reference, nn.Module):
            check_choice("reference", reference, (ADAPTER_OFF,))
            inner: Any = unwrapped(model)
            if not hasattr(inner, "disable_adapter"):
                raise ValueError(
                    f"reference={ADAPTER_OFF!r} needs a PEFT adapter, {type(inner).__name__} has"
                    " none: wrap it with peft.get_peft_model, or pass a frozen copy as reference"
                )
            stack.enter_context(adapter_off(model))
        stack.enter_context(training_mode(original, False))
        stack.enter_context(same_draws(original))
        stack.enter_context(torch.no_grad())
        yield original


def language_model_states(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    layers: Sequence[int],
    *,
    layer_convention: str = "hf_hidden_states",
    final: int | None = None,
) -> list[Tensor]:
    """Hidden states [B, S, D] of `layers` of a causal language model, in their order.

    No logits are made, and no block runs beyond the last one needed. Layer `final` is taken after
    the final norm: where None that of the whole model, else the model ends after so many blocks.
    """
    needed = blocks_needed(layers, layer_convention)
    whole = len(blocks_of(model))
    with (
        only_blocks(model, needed),
        no_logits(model),
        capture(model, layers, layer_convention, whole if final is None else final) as found,
    ):
        model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
    return [found[layer] for layer in layers]
