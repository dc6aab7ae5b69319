"""The nearest-embedding attack: each transformed embedding is taken for the row of the model's
embedding matrix that lies nearest to it; who has the transform looks among the rows it moved.

The scores go through LazyLogits: their argmax is found without a tensor [n, V].
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..lazy_logits import LazyLogits
from ..ops._check import check_choice, check_floating, check_weights
from ..reduce import masked_mean
from .embeddings import embedding_rows

if TYPE_CHECKING:
    from .cloak import TransformerCloak

METRICS = ("l2", "cosine")
INFORMED = "informed"  # the attack, by L2, of one who has the transform
MAX_SCORES = 2**24  # at a time, where ranks are asked for


class NearestEmbedding:
    """Finds the nearest rows of a model's input embeddings, as its embedding layer gives them.

    Args:
        model: with get_input_embeddings(). Its rows are taken once, in float32.
        metric: "l2" by distance, "cosine" by angle.
        cloak: look among the rows as this transform shifts them on average, which is what one can
            do who has it. Of one that looks at the tokens before (estimator "transformer") there
            are no such rows.

    Raises:
        ValueError: another metric, a model without input embeddings, a transform of another width
        or of another estimator than "mlp".
    """

    def __init__(
        self, model: nn.Module, metric: str = "l2", cloak: TransformerCloak | None = None
    ) -> None:
        check_choice("metric", metric, METRICS)
        if cloak is not None and not by_token(cloak):
            raise ValueError('cloak must have the estimator "mlp", which looks at a token alone')
        rows = torch.cat([_shifted(part, cloak) for part in embedding_rows(model)])
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
        self._check(embeddings)
        # Under autocast the products would be those of half-precision numbers.
        with torch.autocast(embeddings.device.type, enabled=False):
            return LazyLogits(embeddings.float(), self.rows, self.bias).argmax(-1)

    @torch.no_grad()
    def ranks(self, embeddings: Tensor, input_ids: Tensor) -> Tensor:
        """Of each token, 1 + the number of other rows that lie nearer to its embedding than its
        own row does, [...]: 1 where the token is recovered.

        Args:
            embeddings: [..., D]. input_ids: [...] the tokens.

        Raises:
            TypeError: not a tensor. ValueError: shapes that do not fit.
        """
        self._check(embeddings)
        if input_ids.shape != embeddings.shape[:-1]:
            raise ValueError(
                f"input_ids must be {list(embeddings.shape[:-1])} as the embeddings:"
                f" got {list(input_ids.shape)}"
            )
        x, ids = embeddings.float().flatten(0, -2), input_ids.flatten()
        n_nearer = torch.zeros_like(ids)
        n_rows = max(1, MAX_SCORES // max(1, len(ids)))
        with torch.autocast(embeddings.device.type, enabled=False):
            bias = self.rows.new_zeros(len(self.rows)) if self.bias is None else self.bias
            own = (x * self.rows[ids]).sum(-1, keepdim=True) + bias[ids, None]  # [n, 1]
            for start in range(0, len(self.rows), n_rows):
                part = slice(start, start + n_rows)
                nearer = x @ self.rows[part].T + bias[part] > own  # [n, n_rows]
                others = torch.arange(start, start + nearer.shape[-1], device=ids.device)
                n_nearer += (nearer & (others != ids[:, None])).sum(-1)  # not itself, by rounding
        return 1 + n_nearer.view(input_ids.shape)

    def _check(self, embeddings: Tensor) -> None:
        check_floating("embeddings", embeddings)
        width = self.rows.shape[-1]
        if embeddings.dim() == 0 or embeddings.shape[-1] != width:
            raise ValueError(
                f"embeddings must be [..., {width}] as the model's: got {list(embeddings.shape)}"
            )


def by_token(cloak: TransformerCloak) -> bool:
    """Whether the transform of a token depends on no other token."""
    return cloak.context is None


@torch.no_grad()
def _shifted(rows: Tensor, cloak: TransformerCloak | None) -> Tensor:
    """[n, D] rows, in float32, where the transform moves them on average."""
    return rows.float() if cloak is None else rows.float() + cloak(rows[None]).means[0]


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
