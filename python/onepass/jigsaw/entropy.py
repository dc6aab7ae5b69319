"""How much transformed embeddings tell of the clean ones: entropies of Gaussians and their mixture,
and the mutual information estimated with one half of a batch as the other's mixture.

All are means in nats over the features that count; where none does they are 0 with a live graph.
"""

from __future__ import annotations

import math
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from ..ops._check import (
    check_choice,
    check_floating,
    check_number,
    check_same_device,
    check_strided,
    values_checked,
)
from ..ops._launch import accumulation_dtype
from ..ops.gaussian import gaussian_stats

LOG_CONSTANT = 0.5 * math.log(2 * math.pi)  # of a Gaussian's entropy, beside log(std) and 1/2
STD_EPS = 1e-8  # keeps log(std) finite in gaussian_entropy_log_loss
ESTIMATORS = ("pairwise", "mixture")
CANDIDATES = 4  # rows measured exactly, of those that a matrix product says are nearest
BLOCK_NUMEL = 1 << 22  # distances at a time

Losses = MutableMapping[str, Tensor]


def square_mahalanobis_distance(
    x: Tensor, y: Tensor, stds: Tensor, *, impl: str = "auto"
) -> Tensor:
    """Squared distance of the rows of x and y in standard deviations.

    Args:
        x: [..., D] floating.
        y: [..., D], broadcast against x.
        stds: [..., D] positive, likewise.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit; a standard deviation that is not positive.

    Formula: sum_D ((x - y) / stds)^2, shape [...].
    """
    _check_stds("stds", stds, None)
    return gaussian_stats(x, y, stds, want="mahalanobis", impl=impl).mahalanobis


def gaussian_entropy_log_loss(
    stds: Tensor, noise_mask: Tensor | None = None, *, impl: str = "auto"
) -> Tensor:
    """Negative entropy of the noise, a feature: minimising it raises every standard deviation.

    Args:
        stds: [..., D] standard deviations, 0 allowed.
        noise_mask: [...] positions or [..., D] features that count; by default all.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: a mask that does not fit, a negative standard deviation.

    Formula: mean(-log(stds + 1e-8)) - log(2 pi e) / 2.
    """
    check_floating("stds", stds)
    mask = None if noise_mask is None else _marks("noise_mask", noise_mask, stds)
    _check_stds("stds", stds, mask, or_zero=True)
    wide = stds.to(accumulation_dtype(stds.dtype)) + STD_EPS  # nothing in float16
    log_det = gaussian_stats(None, None, wide, mask, want="log_det", impl=impl).log_det
    return -_mean(log_det, mask, stds.shape, LOG_CONSTANT + 0.5)


def gaussian_mixture_entropy(
    clean_embeddings: Tensor,
    transformed_embeddings: Tensor,
    means: Tensor,
    stds: Tensor,
    mask: Tensor,
    losses: Losses | None = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Entropy of transformed embeddings, bounded from above by pairing each row with one component
    of the mixture.

    Args:
        clean_embeddings: [B, S, D] rows before the transform; with `means`, the centres of the
            components.
        transformed_embeddings: [B, S, D] transformed rows of *another* batch.
        means: [B, S, D] means of the noise of the clean rows.
        stds: [B, S, D] its standard deviations, positive where they count.
        mask: [B, S] positions or [B, S, D] features that count.
        losses: receives gaussian_mixture_mahalanobis_distance_loss and
            gaussian_mixture_log_constants_and_determinant_loss, which add up to the result.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes that do not fit; a standard deviation that is not positive.

    Formula: masked mean of log(2 pi) / 2 + log(s) + ((x~ - x - mu) / s)^2 / 2.
    """
    _check_alike(
        stds,
        clean_embeddings=clean_embeddings,
        transformed_embeddings=transformed_embeddings,
        means=means,
    )
    mask = _marks("mask", mask, stds)
    _check_stds("stds", stds, mask)
    stats = gaussian_stats(
        transformed_embeddings, means, stds, mask, location=clean_embeddings, impl=impl
    )
    distance = _mean(0.5 * stats.mahalanobis, mask, stds.shape)
    determinant = _mean(stats.log_det, mask, stds.shape, LOG_CONSTANT)
    _log(losses, distance, determinant)
    return distance + determinant


def mutual_information_sub_batch(
    means_tensor: Tensor,
    stds_tensor: Tensor,
    noise_mask: Tensor,
    clean_input_embeddings: Tensor,
    noisy_input_embeddings: Tensor,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
    losses: Losses | None = None,
    *,
    estimator: str = "pairwise",
    symmetrise: bool = False,
    attention_mask: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Mutual information of clean and noisy embeddings, in nats a feature: what minimising it costs
    an attacker. The entropy of the first half's noisy rows under the components of the second half,
    less that of their own noise; the odd last sequence is left out, a batch of one gives 0.

    Args:
        means_tensor: [B, S, D] means of the noise, like all below.
        stds_tensor: its standard deviations, positive where they count.
        noise_mask: [B, S] positions or [B, S, D] features that are transformed.
        clean_input_embeddings: before the transform.
        noisy_input_embeddings: after it.
        combine_noise_masks_for_mutual_information_sub_batches: a position counts where it is
            transformed in both halves (for "mixture": in all components too), else in the first.
        losses: receives the two parts of gaussian_mixture_entropy ("pairwise" only).
        estimator: "pairwise": sequence i of one half against i of the other, an upper bound;
            "mixture": against all of the other half at once, whole sequences, nearer the truth.
        symmetrise: average with the halves exchanged.
        attention_mask: [B, S] positions that are no padding; by default all.
        impl: "auto", "triton" or "torch".

    Raises:
        ValueError: shapes or options that do not fit; a standard deviation that is not positive.

    Formula: H - masked mean of log(2 pi e) / 2 + log(s_A); H as gaussian_mixture_entropy, or the
    mean over sequences a of -log(1/M sum_b N(x~_a; x_b + mu_b, s_b)) a feature.
    """
    check_choice("estimator", estimator, ESTIMATORS)
    _check_alike(
        stds_tensor,
        clean_input_embeddings=clean_input_embeddings,
        noisy_input_embeddings=noisy_input_embeddings,
        means_tensor=means_tensor,
    )
    if stds_tensor.dim() < 2:
        raise ValueError(f"stds_tensor must be [B, ..., D]: got shape {tuple(stds_tensor.shape)}")
    mask = _marks("noise_mask", noise_mask, stds_tensor)
    if attention_mask is not None:
        real = _marks("attention_mask", attention_mask, stds_tensor, of_features=False)
        mask = mask & (real if real.dim() == mask.dim() else real.unsqueeze(-1))
    _check_stds("stds_tensor", stds_tensor, mask)
    half = len(stds_tensor) // 2
    halves = [slice(half), slice(half, 2 * half)]
    everything = (clean_input_embeddings, noisy_input_embeddings, means_tensor, stds_tensor, mask)
    parts = [tuple(tensor[rows] for tensor in everything) for rows in halves]
    directions = (parts, parts[::-1]) if symmetrise else (parts,)
    estimate = _mixture if estimator == "mixture" and half else _pairwise
    found = [
        estimate(own, other, combine_noise_masks_for_mutual_information_sub_batches, impl)
        for own, other in directions
    ]
    total, *logged = (torch.stack(values).mean() for values in zip(*found, strict=True))
    if logged:
        _log(losses, *logged)
    return total


Half = tuple[Tensor, ...]  # clean, noisy, means, stds, mask


def _pairwise(own: Half, other: Half, combine: bool, impl: str) -> tuple[Tensor, ...]:
    """The estimate and the two logged parts of its entropy."""
    clean, _, means, stds, other_mask = other
    _, noisy, _, own_stds, mask = own
    mask = mask & other_mask if combine else mask
    parts: dict[str, Tensor] = {}
    entropy = gaussian_mixture_entropy(clean, noisy, means, stds, mask, parts, impl=impl)
    return entropy - _own_entropy(own_stds, mask, impl), *parts.values()


def _mixture(own: Half, other: Half, combine: bool, impl: str) -> tuple[Tensor]:
    clean, _, means, stds, other_mask = other
    _, noisy, _, own_stds, mask = own
    if combine:  # densities compare where all components have the same dimensions
        mask = mask & other_mask.all(0)
    _check_stds("stds_tensor", stds, mask.any(0).expand(mask.shape))
    stats = gaussian_stats(
        noisy[:, None],
        means[None],
        stds[None],
        mask[:, None],
        location=clean[None],
        impl=impl,
    )
    rows = (0.5 * stats.mahalanobis + stats.log_det).flatten(2).sum(-1)  # [A, M]
    surprise = math.log(rows.shape[1]) - torch.logsumexp(-rows, 1)
    count = _count(mask, own_stds.shape)
    entropy = surprise.sum() / count.clamp_min(1) + LOG_CONSTANT * (count > 0)
    return (entropy - _own_entropy(own_stds, mask, impl),)


def _own_entropy(stds: Tensor, mask: Tensor, impl: str) -> Tensor:
    """Entropy of the noise itself."""
    log_det = gaussian_stats(None, None, stds, mask, want="log_det", impl=impl).log_det
    return _mean(log_det, mask, stds.shape, LOG_CONSTANT + 0.5)


def _count(mask: Tensor | None, shape: torch.Size) -> Tensor:
    """How many features count."""
    if mask is None:
        return torch.tensor(shape.numel())
    return mask.sum() * (shape[-1] if mask.dim() < len(shape) else 1)


def _mean(rows: Tensor, mask: Tensor | None, shape: torch.Size, constant: float = 0.0) -> Tensor:
    """The rows' sums as a mean over the features that count, plus a constant; 0 where none does."""
    count = _count(mask, shape).to(rows.device)
    return rows.sum() / count.clamp_min(1) + constant * (count > 0)


def _log(losses: Losses | None, distance: Tensor, determinant: Tensor) -> None:
    if losses is not None:
        losses["gaussian_mixture_mahalanobis_distance_loss"] = distance
        losses["gaussian_mixture_log_constants_and_determinant_loss"] = determinant


def _check_alike(stds: Any, **tensors: Any) -> None:
    """ValueError unless all are floating, of one shape and on one device."""
    check_floating("stds", stds)
    for name, tensor in tensors.items():
        check_floating(name, tensor)
        check_same_device(name, tensor, "stds", stds)
        if tensor.shape != stds.shape:
            raise ValueError(
                f"{name} must have the shape of the standard deviations, {tuple(stds.shape)}: "
                f"got {tuple(tensor.shape)}"
            )


def _marks(name: str, mask: Any, like: Tensor, *, of_features: bool = True) -> Tensor:
    """The mask as bool, in the shape of the rows [...] or of the features [..., D]."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(mask).__name__}")
    check_strided(name, mask)
    check_same_device(name, mask, "the embeddings", like)
    fits = mask.shape == like.shape[:-1] or (of_features and mask.shape == like.shape)
    if not fits or mask.is_complex():
        features = f", or features, {tuple(like.shape)}" if of_features else ""
        raise ValueError(
            f"{name} must mark positions, {tuple(like.shape[:-1])}{features}: "
            f"got {mask.dtype} of shape {tuple(mask.shape)}"
        )
    return mask != 0


def _check_stds(name: str, stds: Tensor, mask: Tensor | None, *, or_zero: bool = False) -> None:
    """ValueError for a standard deviation that counts and is not positive, where that is free."""
    check_floating(name, stds)
    if not values_checked(stds):
        return
    bad = ~(stds >= 0) if or_zero else ~(stds > 0)
    if mask is not None:
        bad &= mask if mask.dim() == stds.dim() else mask.unsqueeze(-1)
    if bad.any():
        at = bad.nonzero()[0].tolist()
        wanted = "at least 0" if or_zero else "positive"
        raise ValueError(f"{name}{at} must be {wanted}: got {stds[tuple(at)].item()}")


@torch.no_grad()
def voronoi_characteristic_length(embeddings: Tensor, q: float = 0.05) -> float:
    """How far apart tokens lie: a low quantile of the distances of embedding rows to their nearest
    neighbour, the length for the inverse power-law catalyst.

    Args:
        embeddings: [V, D] with V > 1. Equal rows are each other's neighbours, at distance 0.
        q: which quantile, in [0, 1].

    Raises:
        ValueError: not a matrix of two rows or more, or a q that is no quantile.

    Formula: quantile_q over v of min_{w != v} |E_v - E_w|.
    """
    check_floating("embeddings", embeddings)
    check_number("q", q, 0.0, 1.0)
    if embeddings.dim() != 2 or len(embeddings) < 2 or embeddings.shape[1] == 0:
        raise ValueError(
            f"embeddings must be [V, D] with V > 1 and D > 0: got {tuple(embeddings.shape)}"
        )
    rows = embeddings.to(accumulation_dtype(embeddings.dtype))
    rows = rows - rows.mean(0)  # what all share cancels in a distance, and costs digits below
    squares = rows.square().sum(-1)
    n_rows = len(rows)
    nearest = rows.new_empty(n_rows)
    step = max(1, BLOCK_NUMEL // n_rows)
    for at in range(0, n_rows, step):
        block = rows[at : at + step]
        # |a - b|^2 but for |a|^2: the product tells who is near, not how near.
        distance = torch.addmm(squares, block, rows.T, alpha=-2)
        own = torch.arange(len(block), device=rows.device)
        distance[own, own + at] = math.inf
        near = distance.topk(min(CANDIDATES, n_rows - 1), largest=False).indices
        gaps = block[:, None] - rows[near]
        nearest[at : at + step] = gaps.square().sum(-1).amin(-1).sqrt()
    nearest, place = nearest.sort().values, q * (n_rows - 1)  # torch.quantile takes 2^24 at most
    low = min(int(place), n_rows - 2)
    return float(torch.lerp(nearest[low], nearest[low + 1], place - low))
