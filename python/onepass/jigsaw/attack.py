"""The nearest-embedding attack: each transformed embedding is taken for the row of the model's
embedding matrix that lies nearest to it.

The scores go through LazyLogits: their argmax is found without a tensor [n, V].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..lazy_logits import LazyLogits
from ..ops._check import check_choice, check_floating, check_weights
from ..reduce import masked_mean
from .embeddings import embedding_rows

METRICS = ("l2", "cosine")


class NearestEmbedding:
    """Finds the nearest rows of a model's input embeddings, as its embedding layer gives them.

    Args:
        model: with get_input_embeddings(). Its rows are taken once, in float32.
        metric: "l2" by distance, "cosine" by angle.

    Raises:
        ValueError: another metric, a model without input embeddings.
    """

    def __init__(self, model: nn.Module, metric: str = "l2") -> None:
        check_choice("metric", metric, METRICS)
        rows = torch.cat([part.float() for part in embedding_rows(model)])
        self.bias: Tensor | None = None
        if metric == "cosine":
            rows = nn.functional.normalize(rows, dim=-1)
        else:
            self.bias = rows.square().sum(-1) / -2
        self.rows = rows

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Token ids [...] of the rows nearest to `embeddings` [..., D].

        Raises:
            TypeError: not a tensor. ValueError: of another width than the rows.

        Formula: argmax_v <x, E_v> - |E_v|^2 / 2, or argmax_v <x, E_v> / |E_v|.
        """
        check_floating("embeddings", embeddings)
        width = self.rows.shape[-1]
        if embeddings.dim() == 0 or embeddings.shape[-1] != width:
            raise ValueError(
                f"embeddings must be [..., {width}] as the model's: got {list(embeddings.shape)}"
            )
        # Under autocast the products would be those of half-precision numbers.
        with torch.autocast(embeddings.device.type, enabled=False):
            return LazyLogits(embeddings.float(), self.rows, self.bias).argmax(-1)


def recovery_rate(found: Tensor, input_ids: Tensor, mask: Tensor) -> Tensor:
    """The share of the positions that `mask` keeps where `found` is the token; 0-dim.

    Args:
        found, input_ids, mask: [B, S].

    Raises:
        ValueError: shapes that do not fit.

    Formula: masked_mean(found == input_ids), 0 where nothing counts.
    """
    if found.shape != input_ids.shape:
        raise ValueError(
            f"found must have the shape of input_ids, {list(input_ids.shape)}:"
            f" got {list(found.shape)}"
        )
    check_weights("mask", mask, input_ids.shape)
    return masked_mean((found == input_ids).float(), mask)
