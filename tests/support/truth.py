"""What the ops should give, from independent formulas in fp64, and how far a result is from it.

A `Truth` is a value with its natural scale: the sum of the magnitudes that one rounding each would
move. `error_in_u` measures a result against both. Near p = 1, KL = 0 or x = y fp64 itself loses its
digits to cancellation; there the `exact_*` functions calculate with 60 decimal digits.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
DIGITS = 60


class Truth(NamedTuple):
    """A value and its natural scale, both fp64 and of one shape; a scale of 0 asks for equality."""

    value: Tensor
    scale: Tensor


def unit_roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of one rounding to this type."""
    return torch.finfo(dtype).eps / 2


def error_in_u(got: Tensor, truth: Truth, arithmetic: torch.dtype | None = None) -> Tensor:
    """Every element's |got - value| / (u * scale), [...] fp64; inf where it is plainly wrong.

    u is that of the arithmetic: fp64 for fp64 results, else fp32. The one rounding to the result's
    own type (and its smallest subnormal) is granted. Where the truth is not finite, so must the
    result be; where it leaves the result's range, infinity is right.
    """
    if got.shape != truth.value.shape:
        raise AssertionError(f"shape {tuple(got.shape)} where {tuple(truth.value.shape)} is right")
    if not got.is_floating_point():
        got = got.double()
    if arithmetic is None:
        arithmetic = torch.float64 if got.dtype == torch.float64 else torch.float32
    kind = torch.finfo(got.dtype)
    value, result = truth.value, got.detach().to(truth.value.device, torch.float64)
    beyond = value.isfinite() & (value.abs() > kind.max)
    value = torch.where(beyond, value.sign() * math.inf, value)
    granted = value.abs() * unit_roundoff(got.dtype) + kind.tiny * kind.eps
    if got.dtype == arithmetic:  # the rounding of the arithmetic itself is what is measured
        granted = torch.full_like(granted, kind.tiny)
    excess = ((result - value).abs() - granted).clamp_min(0.0)
    excess = excess / (unit_roundoff(arithmetic) * truth.scale)
    excess = torch.where(result == value, 0.0, excess)  # 0 / 0, and equal infinities
    excess = torch.where(result.isnan() & value.isnan(), 0.0, excess)
    # A result within one rounding of the largest number may be that number or infinity.
    at_edge = value.abs() * (1 + unit_roundoff(got.dtype)) >= kind.max
    excess = torch.where(at_edge & result.isinf() & (result * value > 0), 0.0, excess)
    return excess.nan_to_num(nan=math.inf, posinf=math.inf)


def worst_error(got: Tensor, truth: Truth, arithmetic: torch.dtype | None = None) -> float:
    """The largest error_in_u; 0 for an empty result."""
    errors = error_in_u(got, truth, arithmetic)
    return float(errors.max()) if errors.numel() else 0.0


def _nothing_where(undefined: Tensor, value: Tensor) -> Tensor:
    """`value`, and 0 where 0 * inf would make it NaN."""
    return torch.where(undefined, 0.0, value)


# ---------------------------------------------------------------- softmax of one row


class _Softmax(NamedTuple):
    """A row's softmax in fp64, with what a relative error of its exponentials costs."""

    z: Tensor  # [..., V]
    top: Tensor  # [..., 1]
    gap: Tensor  # [..., V] |z - top|, 0 where z is -inf: p is 0 there
    log_norm: Tensor  # [..., 1] lse - top
    logp: Tensor  # [..., V]
    p: Tensor  # [..., V]
    heat: Tensor  # [..., 1] sum of p * gap: relative error of the sum of exponentials, in u
    slack: Tensor  # [..., V] relative error of p in u: the exponential's argument, the sum, itself
    log_squares: Tensor  # [..., 1] log of the sum of p^2

    @classmethod
    def of(cls, logits: Tensor) -> _Softmax:
        z = logits.detach().double()
        top = z.amax(-1, keepdim=True)
        # The largest of the exponentials is 1 exactly and stays out of the sum, so that log1p
        # keeps the digits of the others.
        others = (z - top).exp().sort(-1).values[..., :-1]
        # An infinite maximum leaves every probability undefined.
        others = others.masked_fill(top.isinf(), math.nan)
        log_norm = others.sum(-1, keepdim=True).log1p()
        log_squares = others.square().sum(-1, keepdim=True).log1p() - 2 * log_norm
        logp = (z - top) - log_norm
        p = logp.exp()
        gap = _nothing_where(p == 0, top - z)
        heat = (p * gap).sum(-1, keepdim=True)
        return cls(z, top, gap, log_norm, logp, p, heat, 1 + gap + heat, log_squares)

    @property
    def entropy(self) -> Tensor:
        return -_nothing_where(self.p == 0, self.p * self.logp).sum(-1, keepdim=True)


def _column(tensor: Tensor, index: Tensor) -> Tensor:
    return tensor.gather(-1, index.clamp_min(0)[..., None])[..., 0]


def _indicator(index: Tensor, like: Tensor) -> Tensor:
    """1 in the column `index` of each row; nowhere for -100."""
    columns = torch.arange(like.shape[-1], device=like.device)
    return (columns == index[..., None]).to(like.dtype)


def vocab_facts(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    contrast_labels: Tensor | None = None,
    bag_weights: Tensor | None = None,
) -> dict[str, Truth]:
    """Every fact of vocab_stats that these arguments allow; rows labelled -100 are exactly 0."""
    s = _Softmax.of(logits)
    entropy = s.entropy[..., 0]
    top, log_norm, heat = s.top[..., 0], s.log_norm[..., 0], s.heat[..., 0]
    weights = torch.ones_like(s.z) if bag_weights is None else bag_weights.double().expand_as(s.z)
    shares = (2 * s.logp - s.log_squares).exp()  # of every p^2 in their sum
    facts = {
        "lse": Truth(torch.logsumexp(s.z, -1), top.abs() + log_norm + heat),
        "entropy": Truth(entropy, entropy + (s.p * s.gap * s.gap).sum(-1)),
        "logit_sum": Truth(s.z.sum(-1), s.z.abs().sum(-1)),
        "logp_sum": Truth(
            _nothing_where(weights == 0, weights * s.logp).sum(-1),
            (weights.abs() * (s.gap + s.log_norm + s.heat)).sum(-1),
        ),
        "sum_sq_probs": Truth(
            s.log_squares[..., 0], 3 * (log_norm + heat) + 2 * (shares * s.gap).sum(-1)
        ),
        "argmax": Truth(s.z.argmax(-1).double(), torch.zeros_like(entropy)),
    }
    if labels is not None:
        facts["label_logit"] = Truth(_column(s.z, labels), torch.zeros_like(entropy))
        away = _nothing_where(_column(s.p, labels) == 0, top - _column(s.z, labels))
        facts["logp"] = Truth(_column(s.logp, labels), away + log_norm + heat)
    if contrast_labels is not None:
        at = torch.where(contrast_labels == IGNORED, 0.0, _column(s.z, contrast_labels))
        facts["contrast_logit"] = Truth(at, torch.zeros_like(entropy))
    if bag_weights is not None:
        facts["bag_mass"] = Truth((weights * s.p).sum(-1), (weights.abs() * s.p * s.slack).sum(-1))
    if labels is not None:
        ignored = labels == IGNORED
        facts = {
            name: Truth(*(torch.where(ignored, 0.0, part) for part in truth))
            for name, truth in facts.items()
        }
    return facts


def vocab_gradient(
    logits: Tensor,
    labels: Tensor | None,
    upstream: Mapping[str, Tensor],
    *,
    contrast_labels: Tensor | None = None,
    bag_weights: Tensor | None = None,
) -> Truth:
    """d sum_f <upstream_f, fact_f> / d logits, differentiated by hand; 0 in rows labelled -100."""
    s = _Softmax.of(logits)
    weights = torch.ones_like(s.z) if bag_weights is None else bag_weights.double().expand_as(s.z)
    value, scale = torch.zeros_like(s.z), torch.zeros_like(s.z)
    for fact, given in upstream.items():
        up = given.detach().double()[..., None]
        p_scale = s.p * s.slack
        if fact == "lse":
            slope, size = s.p, p_scale
        elif fact == "logp":
            assert labels is not None
            at = _indicator(labels, s.p)
            # 1 - p as the sum of the others: that keeps its digits as p nears 1
            others = (s.p * (1 - at)).sum(-1, keepdim=True)
            slope = torch.where(at > 0, others, -s.p)
            size = torch.where(at > 0, others + s.p * (s.gap + s.heat), p_scale)
        elif fact == "entropy":
            own = _nothing_where(s.p == 0, s.logp)
            slope = -s.p * (own + s.entropy)
            size = p_scale * (s.gap + s.log_norm + s.entropy)
        elif fact == "logit_sum":
            slope, size = torch.ones_like(s.p), torch.ones_like(s.p)
        elif fact == "logp_sum":
            slope = weights - weights.sum(-1, keepdim=True) * s.p
            size = weights.abs() + weights.abs().sum(-1, keepdim=True) * p_scale
        elif fact == "sum_sq_probs":
            share = (2 * s.logp - s.log_squares).exp()
            slope, size = 2 * (share - s.p), 2 * (2 * share * s.slack + p_scale)
        elif fact == "bag_mass":
            mass = (weights * s.p).sum(-1, keepdim=True)
            size = p_scale * (weights.abs() + (weights.abs() * s.p).sum(-1, keepdim=True))
            slope = s.p * (weights - mass)
        else:
            index = {"label_logit": labels, "contrast_logit": contrast_labels}[fact]
            assert index is not None
            slope = size = _indicator(index, s.p)
        value, scale = value + up * slope, scale + up.abs() * size
    if labels is not None:
        ignored = (labels == IGNORED)[..., None]
        value, scale = torch.where(ignored, 0.0, value), torch.where(ignored, 0.0, scale)
    return Truth(value, scale)


def unfused_vocab_facts(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    contrast_labels: Tensor | None = None,
    bag_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """The same facts as anyone would write them with torch's own functions: what to be no worse
    than. Differentiable; logits go up to fp32 first."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    facts = {
        "lse": torch.logsumexp(z, -1),
        "entropy": -torch.where(p > 0, p * logp, 0.0).sum(-1),
        "logit_sum": z.sum(-1),
        "sum_sq_probs": torch.logsumexp(2 * logp, -1),
    }
    if bag_weights is None:
        facts["logp_sum"] = logp.sum(-1)
    else:
        facts["logp_sum"] = torch.where(bag_weights == 0, 0.0, bag_weights * logp).sum(-1)
        facts["bag_mass"] = (bag_weights * p).sum(-1)
    if labels is not None:
        facts["label_logit"] = _column(z, labels)
        facts["logp"] = _column(logp, labels)
    if contrast_labels is not None:
        facts["contrast_logit"] = torch.where(
            contrast_labels == IGNORED, 0.0, _column(z, contrast_labels)
        )
    if labels is not None:
        facts = {name: torch.where(labels == IGNORED, 0.0, fact) for name, fact in facts.items()}
    return facts


# ---------------------------------------------------------------- exact, where fp64 cancels


def decimals(row: Tensor) -> list[Decimal]:
    """The stored values of a row, exactly; -inf too."""
    return [Decimal(float(value)) for value in row.detach().cpu().double()]


def relative_error(got: Tensor | float, exact: Decimal) -> float:
    """|got - exact| / |exact|; inf unless `got` is finite."""
    value = float(got)
    if not math.isfinite(value):
        return math.inf
    if exact == 0:
        return 0.0 if value == 0 else math.inf
    return float(abs((Decimal(value) - exact) / exact))


class ExactRow(NamedTuple):
    """A row's softmax to 60 digits."""

    probs: list[Decimal]
    logps: list[Decimal]
    lse: Decimal
    entropy: Decimal

    def loss(self, label: int) -> Decimal:
        return -self.logps[label]

    def missing(self, label: int) -> Decimal:
        """1 - p of the label: its own gradient."""
        return sum((p for v, p in enumerate(self.probs) if v != label), Decimal(0))


def exact_row(logits: Tensor) -> ExactRow:
    """The softmax of logits [V], finite or -inf."""
    with decimal.localcontext(prec=DIGITS):
        z = decimals(logits)
        top = max(z)
        terms = [(value - top).exp() for value in z]
        total = sum(terms, Decimal(0))
        lse = top + total.ln()
        logps = [value - lse for value in z]
        probs = [term / total for term in terms]
        entropy = -sum((p * logp for p, logp in zip(probs, logps, strict=True) if p), Decimal(0))
        return ExactRow(probs, logps, lse, entropy)


class ExactDivergences(NamedTuple):
    kl: Decimal  # KL(q || p), q of the target
    reverse_kl: Decimal  # KL(p || q)
    jsd: Decimal


def exact_divergences(
    logits: Tensor, target_logits: Tensor, jsd_beta: float = 0.5
) -> ExactDivergences:
    """The divergences of two rows [V] of finite logits."""
    with decimal.localcontext(prec=DIGITS):
        p, q = exact_row(logits), exact_row(target_logits)
        beta = Decimal(jsd_beta)
        logm = [(beta * b + (1 - beta) * a).ln() for a, b in zip(p.probs, q.probs, strict=True)]

        def divergence(own: ExactRow, other: Sequence[Decimal]) -> Decimal:
            terms = zip(own.probs, own.logps, other, strict=True)
            return sum((w * (a - b) for w, a, b in terms), Decimal(0))

        jsd = beta * divergence(q, logm) + (1 - beta) * divergence(p, logm)
        return ExactDivergences(divergence(q, p.logps), divergence(p, q.logps), jsd)


class ExactPair(NamedTuple):
    one_minus_cosine: Decimal
    relative_distance_squared: Decimal  # |x - y|^2 / |y|^2


def exact_pair(x: Tensor, y: Tensor) -> ExactPair:
    """How far two hidden rows [D] are apart."""
    with decimal.localcontext(prec=DIGITS):
        a, b = decimals(x), decimals(y)
        xx = sum((v * v for v in a), Decimal(0))
        yy = sum((v * v for v in b), Decimal(0))
        xy = sum((v * w for v, w in zip(a, b, strict=True)), Decimal(0))
        dd = sum(((v - w) ** 2 for v, w in zip(a, b, strict=True)), Decimal(0))
        return ExactPair(1 - xy / (xx * yy).sqrt(), dd / yy)


def exact_sigmoid_slope(x: float) -> Decimal:
    """sigmoid'(x)."""
    with decimal.localcontext(prec=DIGITS):
        e = (-abs(Decimal(x))).exp()
        return e / (1 + e) ** 2
