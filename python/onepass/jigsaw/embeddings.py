"""The rows of a model's input embeddings, as its embedding layer gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..training.processes import whole

ROWS = 8192  # at a time


@torch.no_grad()
def embedding_rows(model: nn.Module) -> Iterator[Tensor]:
    """All rows, [n, D] at a time, in the order of their token ids. Some layers scale their weight
    (Gemma 3), so the layer is asked and not its weight.

    Raises:
        ValueError: a model without input embeddings.
    """
    getter: Any = getattr(model, "get_input_embeddings", None)
    layer: Any = None if getter is None else whole(getter())
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(
            f"{type(model).__name__} has no input embeddings: wanted get_input_embeddings() to"
            " return a layer with a weight [V, D]"
        )
    for start in range(0, weight.shape[0], ROWS):
        ids = torch.arange(start, min(start + ROWS, weight.shape[0]), device=weight.device)
        yield layer(ids)


def embedding_norms(model: nn.Module) -> Tensor:
    """The norm of each row, [V]."""
    return torch.cat([rows.float().norm(dim=-1) for rows in embedding_rows(model)])
