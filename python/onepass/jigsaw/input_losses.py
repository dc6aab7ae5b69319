"""The terms of a jigsaw loss over the input embeddings: how far, and where to, a transform moves
them.

All are masked means over the positions of a noise mask, [B, S] or, of single features, [B, S, D]; a
position counts where one of its features does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import masked_inner_product, safe_sqrt
from ..ops._check import (
    check_above_0,
    check_choice,
    check_floating,
    check_rows_alike,
)
from ..ops._launch import accumulation_dtype
from ..ops.row_moments import row_moments
from ..reduce import masked_mean

MEDIAN_NORM_FORMS = ("token", "batch")
STD_FORMS = ("mean", "entropy")
SHORTEST = 1e-12  # added to a squared distance, lest the power law's slope be infinite
LARGEST = 1e6  # of a row's power law, which has no bound at distance 0
LEAST_STD = 1e-8


def positions(noise_mask: Tensor, shape: Sequence[int]) -> Tensor:
    """The positions [B, S] at which a noise mask changes anything of embeddings of `shape` [B, S,
    D].

    Raises:
        TypeError: not a tensor. ValueError: a mask of another shape.
    """
    if not isinstance(noise_mask, Tensor):
        raise TypeError(f"noise_mask must be a torch.Tensor: got {type(noise_mask).__name__}")
    if tuple(noise_mask.shape) == tuple(shape):
        return (noise_mask != 0).any(-1)
    if tuple(noise_mask.shape) != tuple(shape[:-1]):
        raise ValueError(
            f"noise_mask must be {list(shape[:-1])} or {list(shape)}: got {list(noise_mask.shape)}"
        )
    return noise_mask != 0


def cosine_similarity_loss(
    clean_embeddings: Tensor,
    noisy_embeddings: Tensor,
    noise_mask: Tensor,
    *,
    absolute: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Mean cosine of embeddings before and after the transform, or of its absolute value; 0-dim.

    Args:
        clean_embeddings, noisy_embeddings: [B, S, D]. noise_mask: [B, S] or [B, S, D].
        absolute: as `absolute_cosine_similarity_penalty` has it; a cosine of -1 gives the token
            away as one of 1 does.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not tensors. ValueError: shapes or dtypes that do not fit.

    Formula: masked_mean(<x, y> / (|x| |y|)), 0 for a row of norm 0.
    """
    check_rows_alike("clean_embeddings", clean_embeddings, "noisy_embeddings", noisy_embeddings)
    mask = positions(noise_mask, clean_embeddings.shape)
    return masked_inner_product(
        noisy_embeddings, clean_embeddings, mask, absolute=absolute, impl=impl
    )


def median_norm_loss(
    clean_embeddings: Tensor,
    means: Tensor,
    median_norm: Tensor | float,
    noise_mask: Tensor,
    *,
    form: str = "token",
    impl: str = "auto",
) -> Tensor:
    """How far the norms of mean-shifted embeddings lie from the vocabulary's median norm; 0-dim.

    Args:
        clean_embeddings, means: [B, S, D]. noise_mask: [B, S] or [B, S, D].
        median_norm: median over the vocabulary of the embeddings' norms.
        form: "token" averages each position's distance from it; "batch" is the distance of the
            average norm.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not tensors. ValueError: shapes or dtypes that do not fit.

    Formula: token masked_mean(| |x + mean| - median |); batch | masked_mean(|x + mean|) - median |.
    """
    check_choice("form", form, MEDIAN_NORM_FORMS)
    check_floating("clean_embeddings", clean_embeddings)
    check_floating("means", means)
    wide = torch.promote_types(clean_embeddings.dtype, means.dtype)  # means may be the finer ones
    x, shift = clean_embeddings.to(wide), -means.to(wide)
    check_rows_alike("clean_embeddings", x, "means", shift)
    mask = positions(noise_mask, x.shape)
    norms = safe_sqrt(row_moments(x, shift, mask, want=("dd",), impl=impl).dd)
    if form == "token":
        return masked_mean((norms - median_norm).abs(), mask)
    return torch.where(mask.any(), (masked_mean(norms, mask) - median_norm).abs(), 0.0)


def std_log_ratio_loss(
    stds: Tensor, noise_mask: Tensor, *, reference: float = 1.0, form: str = "mean"
) -> Tensor:
    """Minus the logarithm of the standard deviations over a reference; 0-dim. Falls as they grow.

    Args:
        stds: [B, S, D], above 0. noise_mask: [B, S] or [B, S, D].
        reference: the scale to measure by, as the largest deviation the transform can have.
        form: "mean" the logarithm of the mean; "entropy" the mean of the logarithms.

    Raises:
        TypeError: not tensors. ValueError: shapes, dtypes or options that do not fit.

    Formula: mean -log(masked_mean(std) / reference), 0 where nothing counts; entropy masked_mean(
    -log((std + 1e-8) / reference)).
    """
    check_floating("stds", stds)
    check_choice("form", form, STD_FORMS)
    check_above_0("reference", reference)
    positions(noise_mask, stds.shape)
    mask = noise_mask if noise_mask.shape == stds.shape else noise_mask.unsqueeze(-1)
    mask = (mask != 0).expand(stds.shape)
    wide = stds.to(accumulation_dtype(stds.dtype))
    if form == "entropy":
        return masked_mean(-((wide + LEAST_STD) / reference).log(), mask)
    mean = masked_mean(wide, mask)
    nothing = ~mask.any()
    return torch.where(nothing, mean, -(torch.where(nothing, 1.0, mean) / reference).log())


def inverse_l2_power_law_loss(
    clean_embeddings: Tensor,
    noisy_embeddings: Tensor,
    noise_mask: Tensor,
    *,
    characteristic_length: float = 1.0,
    exponent_of_decay: float = 1.0,
    impl: str = "auto",
) -> Tensor:
    """Mean of an inverse power of how far embeddings moved: large near 0, about 1 at
    `characteristic_length`; 0-dim.

    Args:
        clean_embeddings, noisy_embeddings: [B, S, D]. noise_mask: [B, S] or [B, S, D].
        characteristic_length: see `onepass.jigsaw.entropy.voronoi_characteristic_length`.
        exponent_of_decay: the power.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not tensors. ValueError: shapes or dtypes that do not fit, a length or exponent
        not above 0.

    Formula: masked_mean(min((sqrt(|y - x|^2 + 1e-12) / length)^-exponent, 1e6)).
    """
    check_above_0("characteristic_length", characteristic_length)
    check_above_0("exponent_of_decay", exponent_of_decay)
    check_rows_alike("clean_embeddings", clean_embeddings, "noisy_embeddings", noisy_embeddings)
    mask = positions(noise_mask, clean_embeddings.shape)
    moments = row_moments(noisy_embeddings, clean_embeddings, mask, want=("dd",), impl=impl)
    distances = (moments.dd + SHORTEST).sqrt() / characteristic_length
    # Clamped before the power, which would overflow and leave a slope of 0 * inf.
    nearest = LARGEST ** (-1 / exponent_of_decay)
    return masked_mean(distances.clamp_min(nearest).pow(-exponent_of_decay), mask)
