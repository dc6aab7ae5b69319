"""One forward of a frozen language model over new tokens after a past: hidden states, the last
position's logits (not made before something asks), the past that follows.

Left padding is told by a mask over past and new tokens, from which positions are counted.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..training.hidden_states import (
    check_language_model,
    lazy_within,
    training_mode,
    without_adapter,
)
from .cache import as_cache, pack


class Forward(NamedTuple):
    """What a forward gave; `cache` is a DynamicCache of past and new tokens."""

    hidden: Tensor  # [B, S, D], after the final norm
    logits: Tensor | None  # [B, V] of the last position, LazyLogits where the head can be fused
    cache: Any

    def past(self) -> Tensor:
        """A copy of the cache, [L, 2, B, H, T, d]."""
        return pack(self.cache)


@contextlib.contextmanager
def steady(*models: Any) -> Iterator[None]:
    """Modules among them in eval mode, no parameter differentiated, no logits made by heads that
    can be fused; modes and flags restored after. Gradients flow in `torch.inference_mode` too."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for model in models:
            if not isinstance(model, nn.Module):  # a classifier may be any function
                continue
            stack.enter_context(training_mode(model, False))
            for parameter in model.parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_)
                    parameter.requires_grad_(False)
            if hasattr(without_adapter(model), "get_output_embeddings"):
                stack.enter_context(lazy_within(model, None))
        yield


def check_model(model: Any) -> None:
    """ValueError for a model that keeps no plain past of keys and values."""
    from transformers import DynamicCache

    inner = without_adapter(model)
    kind = type(inner).__name__
    wanted = "wanted a causal language model of transformers with attention in all its layers"
    config = getattr(inner, "config", None)
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(f"{kind} has an adapter of prompt learning: wanted another kind")
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{kind} is an encoder-decoder: {wanted}")
    if config is None or getattr(inner, "base_model", inner) is inner:
        raise ValueError(f"{kind} has no base model that gives hidden states: {wanted}")
    check_language_model(model)
    if not _takes(type(inner).forward, "past_key_values"):
        raise ValueError(f"{kind} takes no past of keys and values: {wanted}")
    for n, layer in enumerate(DynamicCache(config=config).layers):
        if hasattr(layer, "conv_states") or not hasattr(layer, "keys"):
            raise ValueError(f"{kind}: layer {n} keeps no keys and values: {wanted}")


def check_places(model: Any, n_tokens: int, n_new: int, n_ahead: int = 0) -> None:
    """ValueError where the model has not as many positions: the last new token takes none, what is
    looked ahead at does."""
    n_places, limit = n_tokens + max(0, n_new - 1) + n_ahead, places_of(model)
    if limit is not None and n_places > limit:
        raise ValueError(
            f"{n_tokens} tokens and {n_new} new ones need {n_places} positions: the model has"
            f" {limit}"
        )


def places_of(model: Any) -> int | None:
    """How many positions the model has; None where its config does not limit them."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def left_mask(mask: Tensor, shape: tuple[int, int]) -> Tensor | None:
    """The mask, int64 [B, S]; None where it leaves nothing out.

    Raises:
        ValueError: another shape, or anything but 0s and then 1s in a row.
    """
    found = mask.to(torch.int64)
    if found.shape != shape:
        raise ValueError(f"attention_mask must be {shape}: got {tuple(found.shape)}")
    rises = (found.diff(dim=1) >= 0).all() & (found[:, 0] >= 0).all() & (found[:, -1] == 1).all()
    if not bool(rises & (found == mask).all()):
        raise ValueError(
            "attention_mask must be 0 where a row is padded on its left, then 1 to its end"
        )
    return None if bool(found.all()) else found


def run(
    model: Any,
    tokens: Tensor,
    past: Any = None,
    mask: Tensor | None = None,
    *,
    logits: bool = True,
) -> Forward:
    """The model on new tokens after a past; inside `steady`.

    Args:
        tokens: [B, S] ids, or embeddings [B, S, E].
        past: [L, 2, B, H, T, d], left as it is; or a Cache, which grows. Gradients flow into it.
        mask: [B, T + S], 0 where a row is padded on the left; None where none is.
        logits: whether the head runs.
    """
    from transformers import DynamicCache

    inner = without_adapter(model)
    inputs: dict[str, Any] = {
        "inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens
    }
    if isinstance(past, Tensor):
        past = as_cache(past)
    inputs["past_key_values"] = DynamicCache() if past is None else past
    inputs |= {"use_cache": True, "return_dict": True}
    if mask is not None:
        inputs["attention_mask"] = mask
        if _takes(type(inner).forward, "position_ids"):
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        elif hasattr(inner.get_decoder(), "embed_positions"):  # Bart and its kin
            raise ValueError(
                f"{type(inner).__name__} takes no position_ids and would count padding: wanted"
                " texts of as many tokens each"
            )
    if not logits:
        out = inner.base_model(**inputs)
        return Forward(out.last_hidden_state, None, out.past_key_values)
    if _takes(type(inner).forward, "output_router_logits"):
        inputs["output_router_logits"] = False  # their loss fails on a mask longer than the tokens
    if _takes(type(inner).forward, "logits_to_keep"):
        inputs["logits_to_keep"] = 1
    found: list[Tensor] = []
    # OPT's and Bart's heads call the decoder past their base model
    hook = inner.get_decoder().register_forward_hook(
        lambda module, args, output: found.append(output.last_hidden_state)
    )
    try:
        out = inner(**inputs)
    finally:
        hook.remove()
    return Forward(found[0], out.logits[:, -1], out.past_key_values)


def materialized(logits: Tensor) -> Tensor:
    """Logits [B, V] themselves, in float32."""
    return (logits.materialize() if hasattr(logits, "materialize") else logits).float()


def token_embeddings(model: Any) -> Tensor:
    """[V, E], before what `soft_inputs` scales; inside `steady`."""
    layer = without_adapter(model).get_input_embeddings()
    if isinstance(layer, nn.Embedding):
        return layer.weight
    with torch.no_grad():  # an adapter's, which adds to its weight
        found: Tensor = layer(torch.arange(len(layer.weight), device=layer.weight.device))
    return found


def soft_inputs(model: Any, soft_embedding: Tensor) -> Tensor:
    """Mean embeddings [B, E] as inputs [B, 1, E]: scaled where the embedding layer scales its
    output, in its dtype."""
    layer = without_adapter(model).get_input_embeddings()
    scale = getattr(layer, "embed_scale", 1.0) if isinstance(layer, nn.Embedding) else 1.0
    return (soft_embedding * scale).to(layer.weight.dtype)[:, None]


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    return name in inspect.signature(forward).parameters
