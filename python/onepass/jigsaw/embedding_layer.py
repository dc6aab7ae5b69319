"""A model's input embeddings without the rest of it: what a client needs to protect a text."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"


class StoredEmbeddings(NamedTuple):
    """Where the matrix [V, D] of a model's input embeddings is saved."""

    path: Path
    key: str
    shape: tuple[int, ...]
    config: Any  # of the model without its blocks
    model_class: Any


def find_embeddings(name: str, config: Any) -> StoredEmbeddings | None:
    """Where a model's safetensors hold its input embeddings; None where that cannot be told, or
    they are no safetensors. Of a model of the Hub the one file that holds them is fetched.

    Args:
        name: the folder or the id on the Hub.
        config: the model's own.
    """
    from safetensors import safe_open
    from transformers import AutoModel

    bare = copy.deepcopy(config)
    sizes = bare.get_text_config()
    sizes.num_hidden_layers = 0
    if getattr(sizes, "layer_types", None):
        sizes.layer_types = []
    if hasattr(bare, "quantization_config"):  # it is of the blocks
        del bare.quantization_config
    try:
        with torch.device("meta"):
            model = AutoModel.from_config(bare)
            layer = model.get_input_embeddings()
        inner = next(n for n, module in model.named_modules() if module is layer) + ".weight"
        path = _file_with(name, inner)
        if path is None:
            return None
        with safe_open(path, framework="pt") as file:
            key = _match(inner, file.keys())
            if key is None:
                return None
            shape = tuple(file.get_slice(key).get_shape())
    # Any model class, with no blocks: whatever it says against that, the whole model serves.
    except Exception:
        return None
    return StoredEmbeddings(path, key, shape, bare, type(model))


def load_embeddings(stored: StoredEmbeddings) -> nn.Module | None:
    """The model without its blocks, for its get_input_embeddings(); it has read nothing else. None
    where its class cannot be made so."""
    from safetensors import safe_open

    with safe_open(stored.path, framework="pt") as file:
        weight = file.get_tensor(stored.key)
    try:
        made, found = stored.model_class.from_pretrained(
            None,
            config=stored.config,
            state_dict={stored.key: weight},
            dtype=weight.dtype,
            output_loading_info=True,
        )
        layer = made.get_input_embeddings()
        inner = next(n for n, module in made.named_modules() if module is layer) + ".weight"
    except Exception:  # as above
        return None
    if inner in found["missing_keys"] or found["mismatched_keys"]:
        return None
    model: nn.Module = made.eval().requires_grad_(False)
    return model


def _match(inner: str, keys: Any) -> str | None:
    """The one key that is `inner`, or ends in it."""
    found = [key for key in keys if key == inner or key.endswith("." + inner)]
    return found[0] if len(found) == 1 else None


def _file_with(name: str, inner: str) -> Path | None:
    """The file that holds the weight `inner`."""
    index = _fetched(name, INDEX)
    if index is None:
        return _fetched(name, WEIGHTS)
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    key = _match(inner, files)
    return None if key is None else _fetched(name, files[key])


def _fetched(name: str, file: str) -> Path | None:
    from transformers.utils import cached_file

    try:
        found = cached_file(name, file)
    except OSError:  # it has no such file
        return None
    return None if found is None else Path(found)
