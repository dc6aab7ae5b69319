"""Attacks that take each transformed embedding for a token: for the row of the model's embedding
matrix that lies nearest to it, or, of one who has the transform, for the token that is likeliest to
have become it.

The scores go through LazyLogits: their argmax is found without a tensor [n, V].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..lazy_logits import LazyLogits
from ..ops._check import check_choice, check_floating, check_weights
from ..reduce import masked_mean
from ..training.processes import whole
from .embeddings import ROWS, embedding_rows

if TYPE_CHECKING:
    from .cloak import TransformerCloak

METRICS = ("l2", "cosine")
LIKELIHOOD = "likelihood"
INFORMED = "informed"  # the attack, by likelihood, of one who has the transform
MAX_SCORES = 2**24  # at a time, where ranks are asked for
ROUNDING = 2.0**-9  # of an embedding in bfloat16, relative: no attack knows it better than so
LEAST_STD = 1e-4  # over the root mean square of what the transform makes on average


class NearestEmbedding:
    """Finds the tokens that embeddings come from, by the input embeddings of a model as its layer
    gives them, and by a transform where there is one.

    Args:
        model: with get_input_embeddings(). Its rows are taken once, in float32.
        metric: "l2" by distance, "cosine" by angle; "likelihood", for one who has the transform: by
            the density of what it makes of each token. None: that with a cloak, without one "l2".
        cloak: the transform, as it is now; for the likelihood alone. Of one that looks at the
            tokens before (estimator "transformer") a token alone has no density.

    Raises:
        ValueError: another metric, one with a transform that it does not look at or without the one
        that it needs, a model without input embeddings, a transform of another width or of another
        estimator than "mlp".

    The likelihood takes embeddings for no better known than bfloat16 has them: to each variance it
    adds the rounding of the mean, so that numbers in half precision do not mislead it.
    """

    def __init__(
        self, model: nn.Module, metric: str | None = None, cloak: TransformerCloak | None = None
    ) -> None:
        if metric is None:
            metric = "l2" if cloak is None else LIKELIHOOD
        check_choice("metric", metric, (*METRICS, LIKELIHOOD))
        if (metric == LIKELIHOOD) != (cloak is not None):
            text = "needs a cloak" if cloak is None else "looks at no cloak: leave it out"
            raise ValueError(f"the metric {metric!r} {text}")
        self.center: Tensor | None = None
        self.weights: tuple[Tensor, ...]  # [V, D] each
        self.bias: Tensor | None = None
        if cloak is not None:
            if not by_token(cloak):
                raise ValueError(
                    'cloak must have the estimator "mlp", which looks at a token alone'
                )
            self.center, self.weights, self.bias = _density(model, cloak)
            return
        rows = torch.cat([part.float() for part in embedding_rows(model)])
        if metric == "cosine":
            rows = nn.functional.normalize(rows, dim=-1)
        else:
            self.bias = rows.square().sum(-1) / -2
        self.weights = (rows,)

    @torch.no_grad()
    def __call__(self, embeddings: Tensor) -> Tensor:
        """Token ids [...] that `embeddings` [..., D] are taken for.

        Raises:
            TypeError: not a tensor. ValueError: of another width than the rows.

        Formula: argmax_v of <x, E_v> - |E_v|^2 / 2, of <x, E_v> / |E_v|, or of
        -sum((x - E_v - mean_v)^2 / (2 std_v^2) + log std_v).
        """
        self._check(embeddings)
        with _full_precision(embeddings.device):
            first, *others = zip(self._terms(embeddings.float()), self.weights, strict=True)
            scores: Tensor = LazyLogits(*first, self.bias)
            for term in others:
                scores = scores + LazyLogits(*term)
            return scores.argmax(-1)

    @torch.no_grad()
    def ranks(self, embeddings: Tensor, input_ids: Tensor) -> Tensor:
        """Of each token, 1 + the number of others that its embedding would rather be taken for,
        [...]: 1 where the token is recovered.

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
        ids = input_ids.flatten()
        terms = [x.flatten(0, -2) for x in self._terms(embeddings.float())]
        n_nearer = torch.zeros_like(ids)
        vocab_size = len(self.weights[0])
        n_rows = max(1, MAX_SCORES // max(1, len(ids)))
        with _full_precision(embeddings.device):
            bias = terms[0].new_zeros(vocab_size) if self.bias is None else self.bias
            own = bias[ids, None]  # [n, 1]
            for x, weight in zip(terms, self.weights, strict=True):
                own = own + (x * weight[ids]).sum(-1, keepdim=True)
            for start in range(0, vocab_size, n_rows):
                part = slice(start, start + n_rows)
                scores = bias[part]
                for x, weight in zip(terms, self.weights, strict=True):
                    scores = torch.addmm(scores, x, weight[part].T)  # [n, n_rows]
                others = torch.arange(start, start + scores.shape[-1], device=ids.device)
                # Not itself, by rounding.
                n_nearer += ((scores > own) & (others != ids[:, None])).sum(-1)
        return 1 + n_nearer.view(input_ids.shape)

    def _terms(self, x: Tensor) -> tuple[Tensor, ...]:
        """What is multiplied by each of the weights, [..., D] each."""
        if self.center is None:
            return (x,)
        x = x - self.center
        return x.square(), x

    def _check(self, embeddings: Tensor) -> None:
        check_floating("embeddings", embeddings)
        width = self.weights[0].shape[-1]
        if embeddings.dim() == 0 or embeddings.shape[-1] != width:
            raise ValueError(
                f"embeddings must be [..., {width}] as the model's: got {list(embeddings.shape)}"
            )


def by_token(cloak: TransformerCloak) -> bool:
    """Whether the transform of a token depends on no other token."""
    return cloak.context is None


@torch.no_grad()
def _density(
    model: nn.Module, cloak: TransformerCloak
) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """(center [D], weights [V, D] of (x - center)^2 and of x - center, bias [V]): the logarithm of
    each token's density but for what all have alike. Without the center large squares would cancel.
    """
    cloak = whole(cloak)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rows in embedding_rows(model):
        shift, stds = cloak.estimate(rows[None])
        parts[0].append(rows.float() + shift[0])
        parts[1].append(stds[0].square())
    means = torch.cat(parts[0])
    parts[0].clear()
    variances = torch.cat(parts[1])
    parts[1].clear()
    center = means.mean(0)
    least = float(means.norm()) ** 2 / means.numel() * LEAST_STD**2 + torch.finfo().tiny
    biases = []
    for mean, variance in zip(means.split(ROWS), variances.split(ROWS), strict=True):
        variance += (mean * ROUNDING).square()  # in place: a table is large
        bias = variance.clamp_min_(least).log().sum(-1) / -2
        of_square = variance.reciprocal_().div_(-2)
        mean -= center
        biases.append(bias + (of_square * mean.square()).sum(-1))
        mean *= of_square * -2
    return center, (variances, means), torch.cat(biases)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 as they are: autocast would round the factors to half precision, TF32 to
    11 bits, and a likelihood is the small difference of large products."""
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in backends]
    try:
        overall: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # it does not speak of what was set backend by backend
        overall = None
    try:
        if overall is not None:  # else torch would complain that the two disagree
            torch.set_float32_matmul_precision("highest")
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if overall is not None:
            torch.set_float32_matmul_precision(overall)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


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
