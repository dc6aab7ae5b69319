"""A model's past, the keys and values of all layers, as one tensor [L, 2, B, H, T, d], and back.

It comes in three spellings: a transformers Cache, a list of tensors (2, B, H, T, d) as models gave
it once, a list of pairs (key, value). Only the public attributes of caches are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

SPELLINGS = "a transformers Cache, a list of tensors (2, B, H, T, d) or of pairs (key, value)"


def pack(past: Any) -> Tensor:
    """A copy of the past: [L, 2, B, H, T, d], keys before values.

    H is the number of key-value heads (of a grouped-query model fewer than its queries').

    Raises:
        TypeError: none of the three spellings.
        ValueError: an empty past; layers of unlike shapes, or that keep something else than all
            keys and values (linear attention, sliding windows, quantised or static caches).
    """
    if hasattr(past, "layers"):
        pairs = [_of_layer(layer, n) for n, layer in enumerate(past.layers)]
    elif isinstance(past, Sequence) and not isinstance(past, str):
        pairs = [_pair(entry, n) for n, entry in enumerate(past)]
    else:
        raise TypeError(f"past must be {SPELLINGS}: got {type(past).__name__}")
    if not pairs or not pairs[0][0].shape[-2]:
        raise ValueError("past holds no token: wanted the keys and values of at least one")
    first = pairs[0][0]
    for n, pair in enumerate(pairs):
        for name, tensor in zip(("key", "value"), pair, strict=True):
            if tensor.shape != first.shape or tensor.dtype != first.dtype:
                raise ValueError(
                    f"past: the {name}s of layer {n} are {tuple(tensor.shape)} {tensor.dtype}, the"
                    f" keys of layer 0 {tuple(first.shape)} {first.dtype}: wanted all alike"
                )
    return torch.stack([tensor.detach() for pair in pairs for tensor in pair]).unflatten(0, (-1, 2))


def unpack(packed: Tensor, like: Any) -> Any:
    """The past in the spelling of `like`: a DynamicCache, or a list or tuple of its kind."""
    if hasattr(like, "layers"):
        return as_cache(packed)
    entries = list(packed) if isinstance(like[0], Tensor) else [tuple(layer) for layer in packed]
    return tuple(entries) if isinstance(like, tuple) else entries


def as_cache(packed: Tensor) -> Any:
    """A new DynamicCache of these keys and values, through which gradients flow.

    Without a config: its layers grow without a bound, sliding windows are left to the mask.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    for n, (key, value) in enumerate(packed):
        cache.update(key, value, n)
    return cache


def _pair(entry: Any, n: int) -> tuple[Tensor, Tensor]:
    tensors = list(entry) if isinstance(entry, (Tensor, list, tuple)) else []
    if len(tensors) != 2 or any(not isinstance(t, Tensor) or t.dim() != 4 for t in tensors):
        got = tuple(entry.shape) if isinstance(entry, Tensor) else type(entry).__name__
        raise TypeError(f"past must be {SPELLINGS}: got {got} at layer {n}")
    return tensors[0], tensors[1]


def _of_layer(layer: Any, n: int) -> tuple[Tensor, Tensor]:
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    kind = type(layer).__name__
    quantised = any("Quantized" in base.__name__ for base in type(layer).__mro__)
    if hasattr(layer, "conv_states") or quantised:
        raise ValueError(
            f"past: layer {n} is a {kind}: wanted plain keys and values, DynamicCache()"
        )
    if not isinstance(key, Tensor) or not isinstance(value, Tensor):
        raise ValueError(f"past: layer {n} ({kind}) holds no token: wanted at least one")
    length = int(layer.get_seq_length())
    if key.dim() != 4 or key.shape[-2] != length:
        raise ValueError(
            f"past: layer {n} ({kind}) keeps {tuple(key.shape)} of {length} tokens: wanted all of"
            " them; run the model with past_key_values=DynamicCache()"
        )
    return key, value
