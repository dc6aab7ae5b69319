"""The two losses of representation rerouting, their schedule, and what is logged of them.

All are plain torch on the row moments of hidden states, a list of layers at a time: no layers are
stacked, and the rows that a mask leaves out are not read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..losses import cosine_rows, safe_sqrt
from ..ops._check import check_choice, check_number, check_weights
from ..ops.row_moments import RowMoments, row_moments
from ..reduce import reduce_rows
from .options import RELU_SCOPES, RETAIN_REDUCTIONS, SCHEDULES

Layers = Tensor | Sequence[Tensor]


def retain_loss(
    hidden_states: Layers,
    reference_hidden_states: Layers,
    mask: Tensor | None = None,
    *,
    retain_reduction: str = "all",
    impl: str = "auto",
) -> Tensor:
    """Mean distance of hidden states from those of the model before training; 0-dim.

    Args:
        hidden_states, reference_hidden_states: [B, S, D], or lists of L such layers of one dtype.
        mask: [B, S] tokens that count, shared by the layers; the others are not read.
        retain_reduction: "all" divides by the number of tokens, the masked ones too, as published;
            "unmasked" by those that count.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not tensors. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: sum over layers and tokens of mask * |h - h_reference| / (L B S). At h = h_reference
    value and gradient are 0; a NaN at a token that counts is not skipped.
    Source: Zou et al. 2024, Circuit Breakers (arXiv 2406.04313).
    """
    check_choice("retain_reduction", retain_reduction, RETAIN_REDUCTIONS)
    moments = layer_moments(hidden_states, reference_hidden_states, mask, impl, ("dd",))
    return retain_of(moments, mask, retain_reduction)


def circuit_breaker_loss(
    hidden_states: Layers,
    reference_hidden_states: Layers,
    mask: Tensor | None = None,
    *,
    relu_scope: str = "token",
    eps: float = 0.0,
    impl: str = "auto",
) -> Tensor:
    """Mean cosine, where positive, of hidden states and those of the model before training; 0-dim.

    Args:
        hidden_states, reference_hidden_states: [B, S, D], or lists of L such layers of one dtype.
        mask: [B, S] tokens that count, shared by the layers; the others are not read.
        relu_scope: "token", the published one; "total" takes the positive part of the mean, so that
            tokens turned beyond a right angle make up for others.
        eps: added to each norm.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Raises:
        TypeError: not tensors. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula: sum over layers and tokens of mask * relu(cos(h, h_reference)) / max(sum(mask), 1).
    At h = h_reference the value is 1 and the gradient exactly 0: see `init_jitter` of the trainer.
    Source: Zou et al. 2024, Circuit Breakers (arXiv 2406.04313).
    """
    check_choice("relu_scope", relu_scope, RELU_SCOPES)
    check_number("eps", eps, 0.0)
    wanted = ("xx", "yy", "xy")
    moments = layer_moments(hidden_states, reference_hidden_states, mask, impl, wanted)
    return circuit_breaker_of(moments, mask, relu_scope, eps)


def layer_moments(
    hidden_states: Layers, reference: Layers, mask: Tensor | None, impl: str, want: tuple[str, ...]
) -> RowMoments:
    """`want` of the moments of all layers; the mask is one layer's, the reference constant."""
    first = hidden_states if isinstance(hidden_states, Tensor) else None
    if first is None and isinstance(hidden_states, Sequence) and len(hidden_states):
        first = hidden_states[0]
    if isinstance(first, Tensor):
        check_weights("mask", mask, first.shape[:-1])
    if isinstance(reference, Tensor):
        reference = reference.detach()
    elif isinstance(reference, Sequence):
        reference = [r.detach() if isinstance(r, Tensor) else r for r in reference]
    return row_moments(hidden_states, reference, mask, want=want, impl=impl)


def retain_of(moments: RowMoments, mask: Tensor | None, retain_reduction: str) -> Tensor:
    """`retain_loss` of moments [L, B, S]."""
    distances = safe_sqrt(moments.dd)
    every = distances.numel() if retain_reduction == "all" else None
    return reduce_rows(distances, each_layer(mask, distances), num_items=every)


def circuit_breaker_of(
    moments: RowMoments, mask: Tensor | None, relu_scope: str, eps: float
) -> Tensor:
    """`circuit_breaker_loss` of moments [L, B, S]."""
    cosines = cosine_rows(moments, eps)
    if relu_scope == "token":
        return reduce_rows(cosines.relu(), each_layer(mask, cosines))
    return reduce_rows(cosines, each_layer(mask, cosines)).relu()


@torch.no_grad()
def monitored(moments: RowMoments, mask: Tensor | None) -> dict[str, Tensor]:
    """Means over layers and tokens that count: the cosine, and the norms of either side; 0-dim."""
    rows = {
        "cosine": cosine_rows(moments),
        "norm": safe_sqrt(moments.xx),
        "reference_norm": safe_sqrt(moments.yy),
    }
    return {name: reduce_rows(r, each_layer(mask, r)) for name, r in rows.items()}


def each_layer(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    """One layer's mask, said of all layers of `rows`."""
    return None if mask is None else mask.expand(rows.shape)


def schedule(
    step: int, max_steps: int, alpha: float, kind: str = "linear_converge"
) -> tuple[float, float]:
    """(retain_coeff, cb_coeff) of a training step, which counts from 1.

    Args:
        step: steps done, this one included. max_steps: of the whole training.
        alpha: what the two sum up to.
        kind: "linear_converge" starts at the circuit breaker's (0, alpha) and meets in the middle
            at max_steps, as published; beyond, retain goes on to alpha at 2 max_steps, and stays.
            "constant" is (alpha / 2, alpha / 2) throughout. "readme_text" is the first with
            the sides changed: what Infinity's README says in words, against its own formula.

    Raises:
        ValueError: a step below 0, no steps, an alpha that is no number, an unknown kind.

    Formula: p = clamp(step / (2 max_steps), 0, 1); (alpha p, alpha (1 - p)).
    """
    if max_steps < 1 or step < 0:
        raise ValueError(
            f"a step from 0 of at least 1 is wanted: got step {step} of max_steps {max_steps}"
        )
    return at_progress(step / (2 * max_steps), alpha, kind)


def at_progress(progress: float, alpha: float, kind: str) -> tuple[float, float]:
    """`schedule` where p is known."""
    check_choice("kind", kind, SCHEDULES)
    if not math.isfinite(alpha) or alpha < 0:
        raise ValueError(f"alpha must be a finite number from 0: got {alpha}")
    progress = 0.5 if kind == "constant" else min(max(progress, 0.0), 1.0)
    coefficients = (alpha * progress, alpha * (1 - progress))
    return coefficients[::-1] if kind == "readme_text" else coefficients
