"""Pairs of rows, of logits and of hidden states: fp64 truths, torch's own way, layouts.

`PairTruth` states every fact of vocab_pair_stats by its definition, and the gradient of any mix of
them differentiated by hand; each comes with its natural scale (truth.Truth). `moments` does so for
row_moments. `laid_out` puts the same values into memory in the ways that callers do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .truth import Truth

FACTS = ("cross_entropy", "kl", "reverse_kl", "jsd", "lse", "target_lse")


def times(a: Tensor, b: Tensor) -> Tensor:
    """a * b where nothing times infinity is nothing: a weight of 0 leaves its column out."""
    return torch.where((a == 0) | (b == 0), 0.0, a * b)


def excess(x: Tensor) -> Tensor:
    """(1 + x) log(1 + x) - x, which is 1 at -1."""
    return torch.special.xlog1py(1 + x, x.clamp_min(-1)) - x


def truth_of(value: Tensor, scale: Tensor) -> Truth:
    """A Truth whose scale does not underflow with the probabilities of columns far below."""
    return Truth(value, scale + 1e-290)


class Side:
    """One side's softmax in fp64, and to how many u its numbers can be known."""

    def __init__(self, logits: Tensor) -> None:
        z = logits.detach().cpu().double()
        self.top, index = z.max(-1, keepdim=True)
        self.below = self.top - z  # how far every column lies below the maximum
        # The maximum itself stays out of sums that are small where its probability nears 1.
        self.others = torch.ones_like(z).scatter(-1, index, 0.0)
        log_mass = (self.others * (-self.below).exp()).sum(-1, keepdim=True).log1p()
        self.lse = (self.top + log_mass).squeeze(-1)
        self.log_p = -self.below - log_mass
        self.p = self.log_p.exp()
        self.rest = (self.others * self.p).sum(-1)
        # On a GPU exp(-x) comes with a relative error of about (1 + x) u.
        self.blur = 1 + torch.where(self.p > 0, self.below, 0.0)
        self.noise = (self.others * self.p * self.blur).sum(-1)  # of the log of the sum

    @property
    def lse_truth(self) -> Truth:
        return Truth(self.lse, self.top.abs().squeeze(-1) + 1 + self.noise)


class PairTruth:
    """Facts of logits against a target that broadcasts to it, and the gradients of their mixes.

    Everything lies on the CPU. Rows that are -inf throughout have no truth here.
    """

    def __init__(
        self, logits: Tensor, target: Tensor, *, probs: bool = False, beta: float = 0.5
    ) -> None:
        self.beta, self.probs, self.target_dims = beta, probs, target.dim()
        self.s = s = Side(logits)
        self.facts = {"lse": s.lse_truth}
        if probs:
            self.q = q = target.detach().cpu().double().expand(logits.shape)
            scale = times(q.abs(), -s.log_p).sum(-1) + q.abs().sum(-1) * s.noise
            self.facts["cross_entropy"] = Truth(-times(q, s.log_p).sum(-1), scale)
            return
        self.t = t = Side(target.expand(logits.shape))
        p, q = s.p, t.p
        cross_scale = times(q * t.blur, -s.log_p).sum(-1) + s.noise
        kl_scale = cross_scale + times(q * t.blur, -t.log_p).sum(-1) + t.noise
        reverse_scale = times(p * s.blur, -t.log_p).sum(-1) + t.noise
        reverse_scale = reverse_scale + times(p * s.blur, -s.log_p).sum(-1) + s.noise
        # To how many u the two logarithms of one column are known.
        self.depth = 1 + times(p.sign(), -s.log_p) + times(q.sign(), -t.log_p)
        self.depth = self.depth + (s.noise + t.noise)[..., None]
        self.facts |= {
            "target_lse": t.lse_truth,
            "cross_entropy": Truth(-times(q, s.log_p).sum(-1), cross_scale),
            "kl": Truth(times(q, t.log_p - s.log_p).sum(-1), kl_scale),
            "reverse_kl": Truth(times(p, s.log_p - t.log_p).sum(-1), reverse_scale),
            "jsd": self._jensen_shannon(),
        }

    def _jensen_shannon(self) -> Truth:
        s, t, beta, p, q = self.s, self.t, self.beta, self.s.p, self.t.p
        log_m = {0.0: s.log_p, 1.0: t.log_p}.get(beta)
        if log_m is None:
            log_m = torch.logaddexp(s.log_p + math.log1p(-beta), t.log_p + math.log(beta))
        self.s_over_m = times(p.sign(), s.log_p - log_m)
        self.t_over_m = times(q.sign(), t.log_p - log_m)
        self.jsd_q = beta * (q * self.t_over_m).sum(-1)
        self.jsd_p = (1 - beta) * (p * self.s_over_m).sum(-1)
        # With q / m = 1 + (1 - beta) w and p / m = 1 - beta w, column by column: no term is
        # negative, so nothing cancels near p = q. Where one side is 0 only the other counts.
        both = (p > 0) & (q > 0)
        d = torch.where(both, t.log_p - s.log_p, 0.0)
        small = (-d.abs()).exp()
        w = torch.where(
            d > 0, (1 - small) / ((1 - beta) * small + beta), d.expm1() / (1 - beta + beta * small)
        )
        terms = beta * excess((1 - beta) * w) + (1 - beta) * excess(-beta * w)
        value = torch.where(both, ((1 - beta) * p + beta * q) * terms, 0.0)
        value = value + torch.where(both, 0.0, (1 - beta) * p * self.s_over_m)
        value = value + torch.where(both, 0.0, beta * q * self.t_over_m)
        pull = (1 - beta) * p * self.s_over_m.abs() + beta * q * self.t_over_m.abs()
        return Truth(value.sum(-1), (pull * self.depth).sum(-1))

    def gradients(self, upstream: Mapping[str, Tensor]) -> tuple[Truth, Truth]:
        """(dlogits, dtarget) of sum_f <upstream_f, fact_f>."""
        s = self.s
        nothing = s.lse.new_zeros(*s.lse.shape, 1)
        up = {
            name: upstream[name].detach().cpu().double()[..., None] if name in upstream else nothing
            for name in FACTS
        }
        size = {name: value.abs() for name, value in up.items()}
        fact = {name: truth.value[..., None] for name, truth in self.facts.items()}
        scale = {name: truth.scale[..., None] for name, truth in self.facts.items()}
        if self.probs:
            mass = self.q.sum(-1, keepdim=True)
            cross = up["cross_entropy"]
            dz = up["lse"] * s.p + cross * (s.p * mass - self.q)
            dz_scale = (size["lse"] + (cross * mass).abs()) * s.p * s.blur + (cross * self.q).abs()
            dt = -times(cross, s.log_p)
            return truth_of(dz, dz_scale), self._shared(dt, dt.abs() + cross.abs())
        t, p, q = self.t, self.s.p, self.t.p
        # p - q where both sides agree on the maximum: what they leave to the other columns.
        both = (s.others == 0) & (t.others == 0)
        gap = torch.where(both, (t.rest - s.rest)[..., None], p - q)
        gap_scale = torch.where(both, (t.noise + s.noise)[..., None], p * s.blur + q * t.blur)
        d = s.log_p - t.log_p
        slack = {name: self.depth + scale[name] for name in ("cross_entropy", "kl", "reverse_kl")}
        slack["jsd"] = self.depth + scale["jsd"] + fact["jsd"].abs()

        dz = up["lse"] * p + (up["cross_entropy"] + up["kl"]) * gap
        dz = dz + times(up["reverse_kl"] * p, d - fact["reverse_kl"])
        dz = dz + up["jsd"] * p * ((1 - self.beta) * self.s_over_m - self.jsd_p[..., None])
        dz_scale = size["lse"] * p * s.blur + (size["cross_entropy"] + size["kl"]) * gap_scale
        pulled = times(p * s.blur, (d - fact["reverse_kl"]).abs()) + times(p, slack["reverse_kl"])
        dz_scale = dz_scale + times(size["reverse_kl"], pulled)
        dz_scale = dz_scale + times(size["jsd"] * p * s.blur, slack["jsd"])

        dt = up["target_lse"] * q - up["reverse_kl"] * gap
        dt = dt + times(up["cross_entropy"] * q, -s.log_p - fact["cross_entropy"])
        dt = dt + times(up["kl"] * q, -d - fact["kl"])
        dt = dt + up["jsd"] * q * (self.beta * self.t_over_m - self.jsd_q[..., None])
        dt_scale = size["target_lse"] * q * t.blur + size["reverse_kl"] * gap_scale
        for name, pull in (("cross_entropy", -s.log_p), ("kl", -d)):
            pulled = times(q * t.blur, (pull - fact[name]).abs()) + times(q, slack[name])
            dt_scale = dt_scale + times(size[name], pulled)
        dt_scale = dt_scale + times(size["jsd"] * q * t.blur, slack["jsd"])
        return truth_of(dz, dz_scale), self._shared(dt, dt_scale)

    def _shared(self, value: Tensor, scale: Tensor) -> Truth:
        """Summed over the rows that share one target row."""
        extra = tuple(range(value.dim() - self.target_dims))
        return truth_of(*((value.sum(extra), scale.sum(extra)) if extra else (value, scale)))


def unfused_pair_facts(
    logits: Tensor, target: Tensor, *, probs: bool = False, beta: float = 0.5
) -> dict[str, Tensor]:
    """The same facts as anyone would write them with torch's own functions: what to be no worse
    than. Differentiable; both sides go up to fp32 first."""
    wide = torch.float64 if logits.dtype == torch.float64 else torch.float32
    z, t = logits.to(wide), target.to(wide).expand(logits.shape)
    log_p = z.log_softmax(-1)
    facts = {"lse": z.logsumexp(-1)}
    if probs:
        return facts | {"cross_entropy": -(t * log_p).sum(-1)}
    log_q = t.log_softmax(-1)

    def kl(of: Tensor, against: Tensor) -> Tensor:
        loss = torch.nn.functional.kl_div(against, of, reduction="none", log_target=True)
        return loss.sum(-1)

    facts |= {
        "target_lse": t.logsumexp(-1),
        "cross_entropy": -(log_q.exp() * log_p).sum(-1),
        "kl": kl(log_q, log_p),
        "reverse_kl": kl(log_p, log_q),
    }
    if 0.0 < beta < 1.0:
        log_m = torch.logaddexp(log_p + math.log1p(-beta), log_q + math.log(beta))
        facts["jsd"] = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
    return facts


# ---------------------------------------------------------------- pairs of hidden rows


def moments(x: Tensor, y: Tensor) -> dict[str, Truth]:
    """Every field of row_moments."""
    a, b = x.detach().cpu().double(), y.detach().cpu().double()
    terms = {
        "dd": (a - b).square(),
        "xx": a.square(),
        "yy": b.square(),
        "xy": a * b,
        "difference_of_squares": (a - b) * (a + b),
    }
    return {name: Truth(term.sum(-1), term.abs().sum(-1)) for name, term in terms.items()}


def moments_gradients(x: Tensor, y: Tensor, upstream: Mapping[str, Tensor]) -> tuple[Truth, Truth]:
    """(dx, dy) of sum_f <upstream_f, moment_f>, differentiated by hand."""
    a, b = x.detach().cpu().double(), y.detach().cpu().double()
    zero = torch.zeros_like(a)
    slopes = {
        "dd": (2 * (a - b), 2 * (b - a)),
        "xx": (2 * a, zero),
        "yy": (zero, 2 * b),
        "xy": (b, a),
        "difference_of_squares": (2 * a, -2 * b),
    }
    terms = [
        [
            up.detach().cpu().double()[..., None] * slopes[name][side]
            for name, up in upstream.items()
        ]
        for side in (0, 1)
    ]
    dx, dy = (Truth(sum(side, zero), sum((t.abs() for t in side), zero)) for side in terms)
    return dx, dy


# ---------------------------------------------------------------- layouts

LAYOUTS = ("contiguous", "padded", "offset", "odd", "sliced", "strided", "transposed")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values [..., V] in other memory, with NaN wherever no element lies.

    padded: rows at a multiple of 64 elements; offset: the first row starts 3 elements after an
    aligned address; odd: rows at an odd distance, so that each is aligned differently; sliced:
    [..., S, V] out of [..., S + 1, V]; strided: every second column; transposed: leading dimensions
    laid out in reverse order.
    """
    *lead, width = values.shape

    def filled(shape: Sequence[int]) -> Tensor:
        return torch.full(tuple(shape), math.nan, dtype=values.dtype, device=values.device)

    if layout == "contiguous":
        return values.detach().clone(memory_format=torch.contiguous_format)
    if layout == "padded":
        place = filled((*lead, (width // 64 + 1) * 64))[..., :width]
    elif layout == "offset":
        place = filled((values.numel() + 8,))[3 : 3 + values.numel()].view(values.shape)
    elif layout == "odd":
        place = filled((*lead, width + 1 + width % 2))[..., :width]
    elif layout == "sliced":
        place = filled((*lead[:-1], lead[-1] + 1, width))[..., :-1, :]
    elif layout == "strided":
        place = filled((*lead, 2 * width))[..., ::2]
    elif layout == "transposed":
        dims = [*range(len(lead) - 1, -1, -1), len(lead)]
        place = filled([values.shape[d] for d in dims]).permute(dims)
    else:
        raise ValueError(f"no layout {layout!r}: choose among {', '.join(LAYOUTS)}")
    return place.copy_(values.detach())
