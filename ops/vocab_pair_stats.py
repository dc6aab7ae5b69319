"""vocab_pair_stats: what two rows over one vocabulary have to tell a loss, each target shared by
many rows.

In this order: the result type, the reference (the definition, and the CPU path), the Triton
launchers, the operators, the gradient, the public function. p = softmax(logits), q =
softmax(target_logits) or target_probs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _pair_cross_entropy
from ._bend import bend, entropy_bend, log_bend
from ._check import (
    check_choice,
    check_floating,
    check_logits,
    check_number,
    check_same_device,
    check_want,
    values_checked,
)
from ._declare import declare
from ._dtensor import own_rows, own_side, shard_of_sides
from ._launch import (
    IMPLS,
    Rows,
    accumulation_dtype,
    capturing,
    choose,
    dense_like,
    device_of,
    exponential,
    gradient_like,
    slabs,
    warps,
)
from ._merge import merged_pair_stats
from ._shards import Shard, check_alike, check_differentiable_twice, of_operator
from ._softmax import exponentials
from ._together import together
from .vocab_stats import FORWARD_THREADS, SEGMENT, THREADS, mask_rows


class VocabPairStats(NamedTuple):
    """Per-row facts, each of shape `logits.shape[:-1]`; None where not asked for by `want`.

    With p = softmax(logits), q the target's probabilities, natural logarithms:

        cross_entropy  -sum_v q_v log p_v
        kl             KL(q || p) = sum_v q_v (log q_v - log p_v)
        reverse_kl     KL(p || q)
        jsd            beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p
        lse            log sum_v exp(logits_v)
        target_lse     the same of the target logits
    """

    cross_entropy: Tensor
    kl: Tensor
    reverse_kl: Tensor
    jsd: Tensor
    lse: Tensor
    target_lse: Tensor


FACTS = VocabPairStats._fields
NEAR_ORIGIN = 1.0  # maxima this close: the two rows' logits may be subtracted
MOST_PAIRS = 64  # that a backward program holds at a time
OF_PROBS = ("cross_entropy", "lse")
STATES = ("row_max", "row_rest", "target_max", "target_rest", "jsd_q", "jsd_p")
# What the merge kernel makes: log_ratio, log(sum exp(logits) / sum exp(target)), for shards alone.
MERGED = ("cross_entropy", "kl", "reverse_kl", "lse", "target_lse", "log_ratio")
COEFFICIENTS = ("on_p", "on_q", "on_cross", "on_kl", "on_reverse", "on_jsd")


class Side(NamedTuple):
    """A row's softmax: its exponentials, and the mass beside the maximum."""

    z: Tensor  # [n, V]
    top: Tensor  # [n]
    gap: Tensor  # [n, V] z - top
    e: Tensor  # [n, V] exp(gap)
    rest: Tensor  # [n]

    @classmethod
    def of(cls, logits: Tensor, top: Tensor | None = None, rest: Tensor | None = None) -> Side:
        z = logits.to(accumulation_dtype(logits.dtype))
        if top is None or rest is None:
            top, gap, e, rest = exponentials(z)
        else:
            gap = z - top[:, None]
            e = gap.exp()
        return cls(z, top, gap, e, rest)

    def rows(self, index: Tensor) -> Side:
        return Side(*(part[index] for part in self))

    @property
    def p(self) -> Tensor:
        return self.e * (1 / (1 + self.rest))[:, None]

    @property
    def logp(self) -> Tensor:
        return (self.gap - self.rest.log1p()[:, None]).clamp_min(-1e18)

    @property
    def lse(self) -> Tensor:
        return torch.where(self.top.isinf(), self.top, self.top + self.rest.log1p())

    @property
    def entropy(self) -> Tensor:
        # A gap of -inf goes with an exponential of 0, which the clamp lets count as 0.
        heat = (self.e * self.gap.clamp_min(-1e18)).sum(-1)
        return self.rest.log1p() - heat / (1 + self.rest)

    def cross_entropy(self, other: Side) -> Tensor:
        """-sum p log p_other, with the probabilities of this side."""
        lift = torch.where(self.e > 0, self.e * other.gap, 0.0).sum(-1)
        return other.rest.log1p() - lift / (1 + self.rest)


def divergence(own: Side, other: Side, cross_entropy: Tensor) -> Tensor:
    """KL(own || other) of every row, [n], to full relative accuracy where the two are nearly
    equal; of rows that are not, cross-entropy less entropy."""
    direct = cross_entropy - own.entropy
    near = (direct < 0.5).nonzero().squeeze(-1)
    if near.numel() == 0:
        return direct
    own, other = own.rows(near), other.rows(near)
    live = own.e > 1e-30
    p, d = torch.where(live, own.p, 0.0), log_ratio(other, own)
    bent = (p * bend(d)).sum(-1)
    y = (p * torch.expm1(d.clamp_max(80.0))).sum(-1)
    # What the other side gives to columns that this one rules out.
    lost = torch.where(live, 0.0, other.p).sum(-1)
    usable = (bent < 0.3) & (y.abs() < 0.5) & (lost < 0.5)
    bent = bent - log_bend(torch.where(usable, y, 0.0))
    bent = bent - torch.log1p(-torch.where(usable, lost, 0.0))
    # Where a column's exponential overflowed the two disagree by more than `direct` can be wrong.
    agree = (bent - direct[near]).abs() <= 1e-5 * (1 + cross_entropy[near])
    return direct.index_copy(0, near, torch.where(usable & agree, bent, direct[near]))


def log_ratio(above: Side, below: Side) -> Tensor:
    """log-probabilities of `above` less those of `below`; 0 where neither has any probability.

    Of rows with a common origin the logits' own difference is exact near equality; of others it
    would carry that origin's rounding.
    """
    log_rests = (above.rest.log1p() - below.rest.log1p())[:, None]
    offset = (above.top - below.top)[:, None]
    own = (above.z - below.z) - (offset + log_rests)
    apart = (above.gap - below.gap) - log_rests
    d = torch.where(offset.abs() <= NEAR_ORIGIN, own, apart)
    return torch.where((above.e > 0) | (below.e > 0), d, 0.0).clamp(-1e15, 1e15)


def mass_ratio(above: Side, below: Side) -> Tensor:
    """log(sum of exp(above) / sum of exp(below)) of every row, [n], exact where the two rows are
    nearly equal: their own sums have rounded, and by how much their difference does tell."""
    apart = (above.top - below.top) + (above.rest.log1p() - below.rest.log1p())
    live = below.e > 1e-30
    ratio = log_ratio(above, below).clamp_max(80.0)
    grown = torch.where(live, below.p * torch.expm1(ratio), above.p).sum(-1)
    return apart + torch.where(grown.abs() < 0.5, grown, 0.0).log1p()


FAR_APART = 20.0  # log-ratio beyond which one side is all that counts of p - q
LAST_EXP = 80.0  # beyond it expm1 overflows, and one side makes up the mixture to the last digit


def mixture_logs(d: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """log(m / q), log(p / m) and m / q - 1 of the mixture m = beta q + (1 - beta) p, given
    d = log p - log q; 0 < beta < 1.

    Each logarithm is log1p of what the mixture differs by, or d less the other one where that
    difference nears -1 and would have lost its digits.
    """
    x = (1 - beta) * torch.expm1(d.clamp_max(LAST_EXP))
    y = beta * torch.expm1((-d).clamp_max(LAST_EXP))
    log_m, above = x.clamp_min(-0.5).log1p(), -y.clamp_min(-0.5).log1p()
    log_m, above = torch.where(x > -0.5, log_m, d - above), torch.where(y > -0.5, above, d - log_m)
    p_rules, q_rules = d > LAST_EXP, d < -LAST_EXP
    log_m = torch.where(q_rules, math.log(beta), log_m)
    above = torch.where(p_rules, -math.log1p(-beta), above)
    log_m = torch.where(p_rules, d + math.log1p(-beta), log_m)
    above = torch.where(q_rules, d - math.log(beta), above)
    return log_m, above, x


def is_one_side(beta: float) -> bool:
    """Whether the mixture is one of the sides: the divergence and its gradients are then 0."""
    return beta in (0.0, 1.0)


def jensen_shannon(s: Side, t: Side, beta: float) -> tuple[Tensor, Tensor]:
    """The divergence of every row and its part beta * KL(q || m), [n] each: the entropy of the
    mixture less the mixture of the entropies, but for rows that are close."""
    p, q = s.p, t.p
    m = beta * q + (1 - beta) * p
    log_m = m.clamp_min(torch.finfo(m.dtype).tiny).log()
    part = -beta * ((q * log_m).sum(-1) + t.entropy)
    direct = part - (1 - beta) * ((p * log_m).sum(-1) + s.entropy)
    near = (direct < 0.05).nonzero().squeeze(-1)
    if near.numel() == 0:
        return direct, part
    close, close_part = close_jensen_shannon(s.rows(near), t.rows(near), beta)
    return direct.index_copy(0, near, close), part.index_copy(0, near, close_part)


def close_jensen_shannon(s: Side, t: Side, beta: float) -> tuple[Tensor, Tensor]:
    """The same for p near q: q ((1 - beta) psi(u) - psi((1 - beta) u)), u = p / q - 1 and
    psi(x) = (1 + x) log(1 + x) - x. The terms of first order are gone before anything is rounded.

    From u = 2 beta (1 - beta) on those terms cost less than the difference of the two psi does.
    """
    p, q = s.p, t.p
    d = log_ratio(s, t)
    log_m, above, x = mixture_logs(d, beta)
    u = torch.expm1(d.clamp_max(1.0))  # larger ones are not near
    near = u.abs() < 2 * beta * (1 - beta)
    close = q * ((1 - beta) * entropy_bend(u, d) - entropy_bend(x.clamp_max(1.0), log_m))
    far = (1 - beta) * p * above - beta * q * log_m
    excess = torch.where(d > FAR_APART, (1 - beta) * (p - q), q * x)
    return (
        torch.where(near, close, far).sum(-1),
        beta * (excess - q * log_m).sum(-1),
    )


def vocab_pair_stats_reference(
    logits: Tensor,  # [n, V]
    target: Tensor,  # [n, V] logits or probabilities
    probs: bool,
    want: Sequence[str],
    beta: float,
) -> dict[str, Tensor]:
    """The definition."""
    s = Side.of(logits)
    facts = {"row_max": s.top, "row_rest": s.rest, "lse": s.lse}
    if probs:
        q = target.to(s.z.dtype)
        lift = torch.where(q == 0, 0.0, q * s.gap).sum(-1)
        facts["target_rest"] = q.sum(-1)
        facts["cross_entropy"] = facts["target_rest"] * s.rest.log1p() - lift
        return facts
    t = Side.of(target)
    facts.update(target_max=t.top, target_rest=t.rest, target_lse=t.lse)
    if "cross_entropy" in want or "kl" in want:
        facts["cross_entropy"] = t.cross_entropy(s)
    if "kl" in want:
        facts["kl"] = divergence(t, s, facts["cross_entropy"])
    if "reverse_kl" in want:
        facts["reverse_kl"] = divergence(s, t, s.cross_entropy(t))
    if "log_ratio" in want:
        facts["log_ratio"] = mass_ratio(s, t)
    if "jsd" in want and not is_one_side(beta):
        facts["jsd"], facts["jsd_q"] = jensen_shannon(s, t, beta)
        facts["jsd_p"] = facts["jsd"] - facts["jsd_q"]
    return facts


def pair_coefficients(
    facts: dict[str, Tensor], grads: dict[str, Tensor], probs: bool
) -> dict[str, Tensor | None]:
    """The gradients of any mix of facts, as one coefficient per row:

    dz = p (on_p + on_reverse d + on_jsd c) + (on_cross + on_kl) (p - q), d = log p - log q
    dt = q (on_q - on_cross log p - on_kl d + on_jsd c') + on_reverse (q - p)
    with c = (1 - beta) (log p - log m), c' = beta (log q - log m); for probabilities dq = -on_cross
    log p.
    """

    def total(*parts: Tensor | None) -> Tensor | None:
        held = [part for part in parts if part is not None]
        return sum(held[1:], held[0]) if held else None

    def minus(name: str, fact: str) -> Tensor | None:
        return -grads[name] * facts[fact] if name in grads else None

    on_q = None
    if not probs:
        on_q = total(
            grads.get("target_lse"),
            minus("cross_entropy", "cross_entropy"),
            minus("kl", "kl"),
            minus("jsd", "jsd_q"),
        )
    return {
        "on_p": total(grads.get("lse"), minus("reverse_kl", "reverse_kl"), minus("jsd", "jsd_p")),
        "on_q": on_q,
        "on_cross": grads.get("cross_entropy"),
        "on_kl": grads.get("kl"),
        "on_reverse": grads.get("reverse_kl"),
        "on_jsd": grads.get("jsd"),
    }


def vocab_pair_stats_backward_reference(
    logits: Tensor,  # [n, V]
    target: Tensor,  # [n, V]
    probs: bool,
    facts: dict[str, Tensor],
    coefficients: dict[str, Tensor | None],
    beta: float,
    need_target: bool = True,
) -> tuple[Tensor, Any]:
    """(dlogits, dtarget) [n, V] from the rows' coefficients, in the accumulation dtype."""
    c = {name: 0.0 if value is None else value[:, None] for name, value in coefficients.items()}
    s = Side.of(logits, facts["row_max"], facts["row_rest"])
    p = s.p
    if probs:
        q = target.to(p.dtype)
        dz = p * (c["on_p"] + c["on_cross"] * facts["target_rest"][:, None]) - c["on_cross"] * q
        return dz, -c["on_cross"] * s.logp if need_target else None
    t = Side.of(target, facts["target_max"], facts["target_rest"])
    q = t.p
    gap = beside_one(s, t, p - q)
    dz = (c["on_cross"] + c["on_kl"]) * gap
    if coefficients["on_p"] is not None:
        dz = dz + p * c["on_p"]
    has_jsd = coefficients["on_jsd"] is not None
    if has_jsd or coefficients["on_reverse"] is not None or need_target:
        d = log_ratio(s, t)
    if coefficients["on_reverse"] is not None:
        dz = dz + c["on_reverse"] * p * d
    if has_jsd:
        log_m, above, _ = mixture_logs(d, beta)
        dz = dz + c["on_jsd"] * (1 - beta) * p * above
    if not need_target:
        return dz, None
    dt = q * (c["on_q"] - c["on_cross"] * s.logp - c["on_kl"] * d) - c["on_reverse"] * gap
    if has_jsd:
        dt = dt - c["on_jsd"] * beta * q * log_m
    return dz, dt


def beside_one(s: Side, t: Side, gap: Tensor) -> Tensor:
    """p - q, made exact where both sides agree on one near-certain column: there it is the
    difference of what they leave to the rest. Only the value is corrected, not the graph."""
    sure = ((s.rest < 1) & (t.rest < 1)).nonzero().squeeze(-1)
    if sure.numel() == 0:
        return gap
    both = (s.gap[sure] == 0) & (t.gap[sure] == 0)
    missing = (t.rest / (1 + t.rest) - s.rest / (1 + s.rest))[sure, None]
    correction = torch.where(both, missing - gap[sure], 0.0).detach()
    return gap.index_add(0, sure, correction)


def _pairs(n_pairs: int, n_rows: int, mask: Tensor | None) -> list[tuple[int, Any]]:
    """(pair, rows that count) for every one of the K outputs; a slice where all do."""
    if mask is None or mask.all():
        return [(k, None) for k in range(n_pairs)]
    return [(k, mask.view(n_pairs, n_rows)[k].nonzero().squeeze(-1)) for k in range(n_pairs)]


def _forward_torch(
    logits: Tensor,  # [K, N, V]
    target: Tensor,  # [N, V]
    mask: Tensor | None,  # [K, N]
    probs: bool,
    want: Sequence[str],
    beta: float,
    out: dict[str, Tensor],  # [K, N] each
) -> None:
    if _pair_cross_entropy.serves(want):
        _pair_cross_entropy.forward_torch(logits, target, mask, probs, out)
        return
    n_pairs, n_rows, vocab_size = logits.shape
    for k, kept in _pairs(n_pairs, n_rows, mask):
        for slab in slabs(n_rows if kept is None else kept.shape[0], 2 * vocab_size):
            rows = slab if kept is None else kept[slab]
            facts = vocab_pair_stats_reference(logits[k][rows], target[rows], probs, want, beta)
            for name, place in out.items():
                if name in facts:
                    place[k, rows] = facts[name]


def _jsd_torch(
    logits: Tensor,  # [K, N, V]
    target: Tensor,  # [N, V]
    mask: Tensor | None,  # [K, N]
    beta: float,
    out: dict[str, Tensor],  # [K, N] each; the states of both sides are there, jsd and jsd_q come
) -> None:
    """Sums over these columns of what `jensen_shannon` sums over all."""
    n_pairs, n_rows, vocab_size = logits.shape
    for k, kept in _pairs(n_pairs, n_rows, mask):
        for slab in slabs(n_rows if kept is None else kept.shape[0], 2 * vocab_size):
            rows = slab if kept is None else kept[slab]
            top, rest, t_top, t_rest = (out[name][k, rows] for name in STATES[:4])
            s = Side.of(logits[k][rows], top, rest)
            t = Side.of(target[rows], t_top, t_rest)
            out["jsd"][k, rows], out["jsd_q"][k, rows] = close_jensen_shannon(s, t, beta)


def of_shard(want: Sequence[str]) -> list[str]:
    """What a shard's own pass is asked for, so that `across_shards` can tell what is wanted."""
    own = [fact for fact in want if fact in ("cross_entropy", "kl", "reverse_kl")]
    return [*own, "log_ratio"] if {"kl", "reverse_kl"} & set(own) else own


def no_columns(facts: Mapping[str, Tensor]) -> None:
    """Fills in the facts of a shard that holds no column."""
    for name, values in facts.items():
        values.fill_(-torch.inf if name in ("row_max", "target_max") else 0)


def pair_facts(
    logits: Tensor,  # [K, N, V] and [N, V]; for the kernels [K, B, S, V] and [B, S, V]
    target: Tensor,
    mask: Tensor | None,  # [K, N]
    probs: bool,
    want: Sequence[str],
    beta: float,
    shard: Shard | None,  # which columns they hold; None: all
    triton: bool,
) -> dict[str, Tensor]:
    """States and wanted facts, [K, N] each."""
    own = want if shard is None else of_shard(want)
    room = _empty_facts(logits, own, triton)
    found = {name: fact.view(logits.shape[0], -1) for name, fact in room.items()}
    if not logits.shape[-1]:
        no_columns(found)
    else:
        run = _forward_triton if triton else _forward_torch
        run(logits, target, mask, probs, own, beta, found)
    if shard is None:
        return found
    return across_shards(found, shard, want, logits, target, mask, probs, beta, triton)


def across_shards(
    found: Mapping[str, Tensor],  # [K, N] each, of this rank's columns: `of_shard`
    shard: Shard,
    want: Sequence[str],
    logits: Tensor,  # the slab that they were found in, as the forward took it
    target: Tensor,
    mask: Tensor | None,  # [K, N]; facts of pairs that do not count are 0
    probs: bool,
    beta: float,
    triton: bool,
) -> dict[str, Tensor]:
    """The facts of whole rows."""
    facts = merged_pair_stats(shard.gather(found), want, probs)
    wanted = {name: facts[name] for name in (*STATES[:4], *want) if name in facts}
    if mask is not None:
        counts = mask.view(wanted["row_max"].shape)
        wanted = {name: torch.where(counts, fact, 0.0) for name, fact in wanted.items()}
    if "jsd" in want:
        wanted |= {name: torch.zeros_like(wanted["row_max"]) for name in ("jsd", "jsd_q", "jsd_p")}
        if not is_one_side(beta):
            if shard.size:
                run = _jsd_triton if triton else _jsd_torch
                run(logits, target, mask, beta, wanted)
            sums = shard.gather({name: wanted[name] for name in ("jsd", "jsd_q")})
            wanted["jsd"], wanted["jsd_q"] = sums["jsd"].sum(0), sums["jsd_q"].sum(0)
            wanted["jsd_p"] = wanted["jsd"] - wanted["jsd_q"]
    return wanted


def _backward_torch(
    dlogits: Tensor | None,  # [K, N, V], zeros where there is a mask
    dtarget: Tensor | None,  # [N, V]
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    probs: bool,
    beta: float,
    facts: dict[str, Tensor],
    coefficients: dict[str, Tensor | None],
) -> None:
    if _pair_cross_entropy.serves_gradient(coefficients, probs, dtarget is not None):
        rest = (logits, target, mask, probs, facts, coefficients)
        _pair_cross_entropy.backward_torch(dlogits, dtarget, *rest)
        return
    n_pairs, n_rows, vocab_size = logits.shape
    # Rows outside, pairs inside: a target row's gradient is summed in one accumulation dtype,
    # rounded once.
    kept_of = dict(_pairs(n_pairs, n_rows, mask))
    for slab in slabs(n_rows, 2 * vocab_size):
        held = None
        if dtarget is not None:
            held = torch.zeros(
                (slab.stop - slab.start, vocab_size),
                dtype=facts["row_max"].dtype,
                device=target.device,
            )
        for k in range(n_pairs):
            kept = kept_of[k]
            rows: Any = slab
            if kept is not None:
                rows = kept[(kept >= slab.start) & (kept < slab.stop)]
            dz, dt = vocab_pair_stats_backward_reference(
                logits[k][rows],
                target[rows],
                probs,
                {name: fact[k, rows] for name, fact in facts.items() if fact.numel()},
                {name: None if c is None else c[k, rows] for name, c in coefficients.items()},
                beta,
                dtarget is not None,
            )
            if dlogits is not None:
                dlogits[k, rows] = dz.to(dlogits.dtype)
            if held is not None and dt is not None:
                held[slice(None) if kept is None else rows - slab.start] += dt
        if dtarget is not None and held is not None:
            dtarget[slab] = held.to(dtarget.dtype)


class _Layout(NamedTuple):
    """Matrices as the kernels take them: logits, target, and where they are wanted the gradients of
    either."""

    sizes: tuple[int, int, int]  # K, N, V
    z: Rows
    t: Rows
    dz: Rows | None
    dt: Rows | None

    @classmethod
    def of(
        cls,
        logits: Tensor,  # [K, B, S, V]
        target: Tensor,  # [B, S, V]
        dlogits: Tensor | None = None,
        dtarget: Tensor | None = None,
    ) -> _Layout:
        n_pairs, outer, inner, vocab_size = logits.shape
        gradients = (None if g is None else Rows.of(g) for g in (dlogits, dtarget))
        sizes = (n_pairs, outer * inner, vocab_size)
        return cls(sizes, Rows.of(logits), Rows.of(target), *gradients)

    @property
    def arguments(self) -> tuple[int, ...]:
        return (*self.sizes, self.z.inner_size, *self.z.steps(), *self.t.steps()[1:])

    @property
    def gradient_arguments(self) -> tuple[int, ...]:
        nowhere = (0, 0, 0, 0)
        dz_steps = nowhere if self.dz is None else self.dz.steps()
        dt_steps = nowhere if self.dt is None else self.dt.steps()
        return (*dz_steps, *dt_steps[1:])

    @property
    def vec(self) -> int:
        """The width of loads where all rows are equally far from alignment, else 1."""
        others = [side for side in (self.z, self.dz, self.dt) if side is not None]
        if not all(self.t.same_shift(side) for side in others):
            return 1
        return max(side.vec for side in (self.t, *others))


def _block(threads: int, pairs: int, logits: Tensor, target: Tensor) -> int:
    """Columns per loop turn: a 16-byte load a thread, over all pairs; less for a short row."""
    import triton

    size = max(logits.element_size(), target.element_size())
    tile = threads * 16 // size // pairs
    return max(64, min(tile, triton.next_power_of_2(logits.shape[-1] + 16)))


def _forward_triton(
    logits: Tensor,  # [K, B, S, V]
    target: Tensor,  # [B, S, V]
    mask: Tensor | None,
    probs: bool,
    want: Sequence[str],
    beta: float,
    out: dict[str, Tensor],
) -> None:
    import triton

    from ..kernels.vocab_pair_stats import (
        PARTS,
        vocab_pair_stats_kernel,
        vocab_pair_stats_merge_kernel,
    )

    layout = _Layout.of(logits, target)
    n_pairs, n_rows, vocab_size = layout.sizes
    vec = layout.vec
    n_segments = triton.cdiv(vocab_size + vec, SEGMENT)
    tile = min(4, triton.next_power_of_2(n_pairs))
    many_sums = tile > 1 and ("kl" in want or "reverse_kl" in want)
    threads = FORWARD_THREADS if tile > 1 else FORWARD_THREADS // 2  # measured on an H200
    flags = {
        "PROBS": probs,
        "CROSS": "cross_entropy" in want,
        "KL": "kl" in want,
        "REVERSE_KL": "reverse_kl" in want,
        "VEC": vec,
    }
    states = (out["row_max"], out["row_rest"], out["target_max"], out["target_rest"])
    partials = torch.empty(
        (n_pairs, n_rows, n_segments, PARTS.value), dtype=torch.float32, device=logits.device
    )
    with device_of(logits):
        vocab_pair_stats_kernel[(n_rows, n_segments, triton.cdiv(n_pairs, tile))](
            layout.z.base,
            layout.t.base,
            mask,
            partials,
            *layout.arguments,
            **flags,
            EXP=exponential(logits),
            SEGMENT=SEGMENT,
            PAIRS=tile,
            # Half the load a thread: else the sums of several pairs would not fit the registers.
            BLOCK=_block(threads, tile * 2 if many_sums else tile, logits, target),
            num_warps=warps(threads, logits),
        )
        vocab_pair_stats_merge_kernel[(n_rows * n_pairs,)](
            layout.z.base,
            layout.t.base,
            mask,
            partials,
            *states,
            *(out.get(name) for name in MERGED),
            n_segments,
            *layout.arguments,
            **flags,
            LANES=triton.next_power_of_2(n_segments + 2 * vec),
            num_warps=1,
        )
    if "jsd" in want and is_one_side(beta):
        for name in ("jsd", "jsd_q", "jsd_p"):
            out[name].zero_()
    elif "jsd" in want:
        _jsd_triton(logits, target, mask, beta, out)
        torch.sub(out["jsd"], out["jsd_q"], out=out["jsd_p"])


def _jsd_triton(
    logits: Tensor,  # [K, B, S, V]
    target: Tensor,  # [B, S, V]
    mask: Tensor | None,
    beta: float,
    out: dict[str, Tensor],  # [K, N] each; the states of both sides are there, jsd and jsd_q come
) -> None:
    import triton

    from ..kernels.vocab_pair_stats import vocab_jsd_kernel

    layout = _Layout.of(logits, target)
    n_pairs, n_rows, vocab_size = layout.sizes
    n_segments = triton.cdiv(vocab_size + layout.vec, SEGMENT)
    parts = out["row_max"].new_empty((n_pairs, n_rows, n_segments, 2))
    with device_of(logits):
        vocab_jsd_kernel[(n_rows * n_pairs, n_segments)](
            layout.z.base,
            layout.t.base,
            mask,
            *(out[name] for name in STATES[:4]),
            parts,
            *layout.arguments,
            float(beta),
            EXP=exponential(logits),
            VEC=layout.vec,
            SEGMENT=SEGMENT,
            BLOCK=_block(THREADS, 1, logits, target),
            num_warps=warps(THREADS, logits),
        )
        for name, part in zip(("jsd", "jsd_q"), parts.sum(2).unbind(-1), strict=True):
            if mask is not None:  # a pair that does not count has no maxima to measure from
                part = torch.where(mask.view(n_pairs, n_rows), part, 0.0)
            out[name].copy_(part)


def _backward_triton(
    dlogits: Tensor | None,  # of the shape of logits
    dtarget: Tensor | None,  # of the shape of target
    logits: Tensor,  # [K, B, S, V]
    target: Tensor,  # [B, S, V]
    mask: Tensor | None,
    probs: bool,
    beta: float,
    facts: dict[str, Tensor],
    coefficients: dict[str, Tensor | None],
) -> None:
    import triton

    from ..kernels.vocab_pair_stats import vocab_pair_stats_backward_kernel

    if logits.shape[0] > MOST_PAIRS:
        _backward_in_parts(dlogits, dtarget, logits, target, mask, probs, beta, facts, coefficients)
        return
    layout = _Layout.of(logits, target, dlogits, dtarget)
    n_pairs, n_rows, vocab_size = layout.sizes
    vec = layout.vec
    tile = triton.next_power_of_2(n_pairs)
    with device_of(logits):
        vocab_pair_stats_backward_kernel[(n_rows, triton.cdiv(vocab_size + vec, SEGMENT))](
            None if layout.dz is None else layout.dz.base,
            None if layout.dt is None else layout.dt.base,
            layout.z.base,
            layout.t.base,
            mask,
            *(facts[name] for name in STATES[:4]),
            *(coefficients[name] for name in COEFFICIENTS),
            *layout.arguments,
            *layout.gradient_arguments,
            float(beta),
            PROBS=probs,
            EXP=exponential(logits),
            VEC=vec,
            SEGMENT=SEGMENT,
            PAIRS=tile,
            BLOCK=_block(THREADS, tile, logits, target),
            num_warps=warps(THREADS, logits),
        )


def _backward_in_parts(
    dlogits: Tensor | None,
    dtarget: Tensor | None,
    logits: Tensor,  # [K, B, S, V]
    target: Tensor,  # [B, S, V]
    mask: Tensor | None,
    probs: bool,
    beta: float,
    facts: dict[str, Tensor],
    coefficients: dict[str, Tensor | None],
) -> None:
    """The backward for more pairs than a program holds; the target's gradient is summed in fp32."""
    total = None if dtarget is None else torch.zeros_like(dtarget, dtype=torch.float32)
    for start in range(0, logits.shape[0], MOST_PAIRS):
        part = slice(start, start + MOST_PAIRS)
        share = None if total is None else torch.empty_like(total)
        _backward_triton(
            None if dlogits is None else dlogits[part],
            share,
            logits[part],
            target,
            None if mask is None else mask.view(logits.shape[0], -1)[part],
            probs,
            beta,
            {name: fact[part] for name, fact in facts.items()},
            {name: None if c is None else c[part] for name, c in coefficients.items()},
        )
        if total is not None and share is not None:
            total += share
    if dtarget is not None and total is not None:
        dtarget.copy_(total)


def _stack(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits as [K, B, S, V] and target as [B, S, V]: sliced batches need no copy for that."""
    inner, vocab_size = (1, *target.shape)[-2:]
    outer = target.shape[:-2].numel()
    n_pairs = logits.shape[: logits.dim() - target.dim()].numel()
    z = logits.reshape(n_pairs, outer, inner, vocab_size)
    return z, target.reshape(outer, inner, vocab_size)


def _flat_stack(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """logits as [K, N, V] and target as [N, V]."""
    z, t = _stack(logits, target)
    return z.flatten(1, 2), t.flatten(0, 1)


def _empty_facts(logits: Tensor, want: Sequence[str], triton: bool) -> dict[str, Tensor]:
    """Room for the facts: the kernels write all of it, the torch path only pairs that count."""
    dtype = accumulation_dtype(logits.dtype)
    names = (*STATES[:4], *(STATES[4:] if "jsd" in want else ()), *want)
    room = torch.empty if triton else torch.zeros
    return {name: room(logits.shape[:-1], dtype=dtype, device=logits.device) for name in names}


def _as_outputs(logits: Tensor, facts: dict[str, Tensor]) -> tuple[Tensor, ...]:
    absent = accumulation_dtype(logits.dtype)
    return tuple(
        facts[name] if name in facts else logits.new_empty(0, dtype=absent)
        for name in (*STATES, *FACTS)
    )


def _forward(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    probs: bool,
    want: Sequence[str],
    beta: float,
    group: str,  # whose ranks hold the other columns; "": there are none
    sizes: Sequence[int],  # columns of each rank
    triton: bool,
) -> tuple[Tensor, ...]:
    rows = logits.shape[:-1]
    if rows.numel():
        z, t = (_stack if triton else _flat_stack)(logits, target)
        found = pair_facts(z, t, mask, probs, want, beta, Shard.of(group, sizes), triton)
        facts = {name: fact.view(rows) for name, fact in found.items()}
    else:
        facts = _empty_facts(logits, want, triton)
    clamp_jsd(facts, beta)
    return _as_outputs(logits, facts)


def clamp_jsd(facts: dict[str, Tensor], beta: float) -> None:
    """Probabilities that sum to 1 and a few digits may exceed what the divergence can be."""
    if "jsd" in facts and not is_one_side(beta):
        facts["jsd"].clamp_(max=-beta * math.log(beta) - (1 - beta) * math.log1p(-beta))


def _forward_fake(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    probs: bool,
    want: Sequence[str],
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _as_outputs(logits, _empty_facts(logits, want, rest[-1]))


def _empty_grads(
    logits: Tensor, target: Tensor, need_logits: bool, need_target: bool, triton: bool
) -> tuple[Tensor, Tensor]:
    """Uninitialised gradients of both sides; empty where nobody asks."""
    room = gradient_like if triton else dense_like
    z, t = _stack(logits, target)
    return (
        room(z).view(logits.shape) if need_logits else logits.new_empty(0),
        room(t).view(target.shape) if need_target else target.new_empty(0),
    )


def _backward_op(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    probs: bool,
    beta: float,
    row_max: Tensor,
    row_rest: Tensor,
    target_max: Tensor,
    target_rest: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    *values, need_logits, need_target, triton = rest
    dlogits, dtarget = _empty_grads(logits, target, need_logits, need_target, triton)
    if row_max.numel() and logits.shape[-1]:
        z, t = (_stack if triton else _flat_stack)(logits, target)
        shape = (z.shape[0], row_max.numel() // z.shape[0])
        if not triton and mask is not None:
            dlogits.zero_()
        run = _backward_triton if triton else _backward_torch
        run(
            dlogits.view(z.shape) if need_logits else None,
            dtarget.view(t.shape) if need_target else None,
            z,
            t,
            mask,
            probs,
            beta,
            {
                name: fact.view(shape)
                for name, fact in zip(
                    STATES, (row_max, row_rest, target_max, target_rest), strict=False
                )
            },
            {
                name: None if c is None else c.reshape(shape).contiguous()
                for name, c in zip(COEFFICIENTS, values, strict=True)
            },
        )
    else:
        dtarget.zero_()
    return dlogits, dtarget


def _backward_fake(logits: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _empty_grads(logits, target, *rest[-3:])


_vocab_pair_stats_backward = declare(
    "vocab_pair_stats_backward(Tensor logits, Tensor target, Tensor? mask, bool probs, float beta, "
    + ", ".join(f"Tensor {name}" for name in STATES[:4])
    + ", "
    + ", ".join(f"Tensor? {name}" for name in COEFFICIENTS)
    + ", bool need_logits, bool need_target, bool triton) -> (Tensor dlogits, Tensor dtarget)",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, target, mask, probs, want, beta, group, sizes, triton = inputs
    ctx.save_for_backward(logits, target, mask, *output)
    ctx.options = (probs, want, beta, Shard.of(group, sizes), triton)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, target, mask, *saved = ctx.saved_tensors
    probs, want, beta, shard, triton = ctx.options
    grads = {
        fact: grad
        for fact, grad in zip(FACTS, upstream[len(STATES) :], strict=True)
        if grad is not None and fact in want and not (fact == "jsd" and is_one_side(beta))
    }
    need_logits, need_target = ctx.needs_input_grad[:2]
    nothing = (None,) * 7
    if not grads:
        return (None, None, *nothing)
    if torch.is_grad_enabled():
        check_differentiable_twice(shard)
        dlogits, dtarget = _twice_differentiable(logits, target, mask, probs, grads, beta)
    else:
        facts = dict(zip((*STATES, *FACTS), saved, strict=True))
        dlogits, dtarget = _vocab_pair_stats_backward(
            logits,
            target,
            mask,
            probs,
            beta,
            *(facts[name] for name in STATES[:4]),
            *pair_coefficients(facts, grads, probs).values(),
            need_logits,
            need_target,
            triton,
        )
    return dlogits if need_logits else None, dtarget if need_target else None, *nothing


def _twice_differentiable(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    probs: bool,
    grads: dict[str, Tensor],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The same gradients in torch operations that autograd can follow, for create_graph=True."""
    z, t = _flat_stack(logits, target)
    n_pairs, n_rows, _ = z.shape
    dlogits, dtarget = [], torch.zeros_like(t, dtype=accumulation_dtype(t.dtype))
    for k, kept in _pairs(n_pairs, n_rows, mask):
        rows: Any = slice(None) if kept is None else kept
        facts = vocab_pair_stats_reference(z[k][rows], t[rows], probs, tuple(grads), beta)
        picked = {name: grad.reshape(n_pairs, n_rows)[k][rows] for name, grad in grads.items()}
        dz, dt = vocab_pair_stats_backward_reference(
            z[k][rows], t[rows], probs, facts, pair_coefficients(facts, picked, probs), beta
        )
        if kept is not None:
            dz = torch.zeros_like(z[k], dtype=dz.dtype).index_copy(0, kept, dz)
            dt = torch.zeros_like(t, dtype=dz.dtype).index_copy(0, kept, dt)
        dlogits.append(dz.to(z.dtype))
        dtarget = dtarget + dt
    return torch.stack(dlogits).view(logits.shape), dtarget.to(target.dtype).view(target.shape)


_vocab_pair_stats = declare(
    "vocab_pair_stats(Tensor logits, Tensor target, Tensor? mask, bool probs, str[] want, "
    "float beta, str group, int[] sizes, bool triton) -> ("
    + ", ".join(f"Tensor {name}" for name in (*STATES, *FACTS))
    + ")",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def check_probabilities(name: str, target: Tensor, flags: Tensor | None) -> None:
    """ValueError for NaN in the probabilities of rows that count."""
    bad = target.isnan().any(-1)
    if flags is not None and bad.any():
        bad = bad & flags.view(-1, *target.shape[:-1]).any(0)
    if bad.any():
        raise ValueError(f"{name} holds NaN: leave such rows out by mask, or give them numbers")


@together
def vocab_pair_stats(
    logits: Tensor,
    target_logits: Tensor | None = None,
    *,
    target_probs: Tensor | None = None,
    mask: Tensor | None = None,
    want: Sequence[str] = ("cross_entropy",),
    jsd_beta: float = 0.5,
    shares: Mapping[str, Tensor] | None = None,
    impl: str = "auto",
) -> VocabPairStats:
    """Per-row statistics of `logits` against target logits or probabilities, in one pass over the
    vocabulary.

    Args:
        logits: [..., V] float32, bfloat16, float16 (float64 through the torch path), any strides;
            either side may be `onepass.LazyLogits`, and their hidden sizes may differ.
        target_logits: [..., V], of the shape of logits or of its trailing part: logits [K, N, V]
            share each of the targets [N, V] among K rows, and a target row is read once for four
            of them (jsd reads both sides once more, each pair by itself). Any floating dtype.
        target_probs: the same, holding probabilities (taken as they are), for cross_entropy and
            lse.
        mask: logits.shape[:-1], rows that count (nonzero); others are not read, their facts and
            gradients 0.
        want: names of VocabPairStats fields.
        jsd_beta: weight of the target in the Jensen-Shannon divergence's mixture, between 0 and 1.
        shares: as in `vocab_stats`, for LazyLogits as `logits`.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        VocabPairStats with the wanted fields, float32 (float64 for float64 logits), differentiable
        with respect to both sides; one backward kernel serves whatever mix of upstream gradients
        arrives (a launch for each 64 rows that share a target).

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.

    Formula, q = softmax(target_logits), p = softmax(logits), m = beta q + (1 - beta) p:
    cross_entropy = -sum q log p, kl = sum q log(q / p), reverse_kl = sum p log(p / q),
    jsd = beta sum q log(q / m) + (1 - beta) sum p log(p / m).
    """
    check_logits(logits)
    mask = own_rows(mask, logits)
    if (target_logits is None) == (target_probs is None):
        came = "neither" if target_logits is None else "both"
        raise ValueError(f"pass one of target_logits and target_probs: got {came}")
    probs = target_probs is not None
    target: Any = target_probs if target_probs is not None else target_logits
    name = "target_probs" if probs else "target_logits"
    check_floating(name, target)
    if logits.shape[logits.dim() - target.dim() :] != target.shape or target.dim() == 0:
        raise ValueError(
            f"{name} must have the shape of logits, {tuple(logits.shape)}, or of its trailing "
            f"dimensions: got {tuple(target.shape)}"
        )
    check_same_device(name, target, "logits", logits)
    if (logits.dtype == torch.float64) != (target.dtype == torch.float64):
        raise ValueError(
            f"logits and {name} must both be float64 or neither: got {logits.dtype}, {target.dtype}"
        )
    want = check_want(want, FACTS)
    check_choice("impl", impl, IMPLS)
    for fact in want:
        if probs and fact not in OF_PROBS:
            raise ValueError(
                f"want={fact!r} needs target_logits: pass target_logits=target_probs.log()"
            )
    check_number("jsd_beta", jsd_beta, 0, 1)
    flags = None if mask is None else mask_rows(mask, logits)
    if probs and values_checked(target):
        check_probabilities(name, target, flags)
    given = (flags, probs, list(want), float(jsd_beta))
    if hasattr(logits, "onepass_head") or hasattr(target, "onepass_head"):
        from .head_pair import head_pair_stats

        foretold = None
        if shares is not None:
            facts = accumulation_dtype(logits.dtype)
            foretold = {
                name: share.detach().to(facts).expand(logits.shape[:-1])
                for name, share in shares.items()
            }
        outputs = head_pair_stats(logits, target, *given, impl, foretold)
    else:
        shard = shard_of_sides(logits, target)
        logits, target = own_side(logits, shard), own_side(target, shard)
        if shard is not None and not capturing(logits):
            counts = None if flags is None else flags.to(torch.int64)
            how = (want, probs, jsd_beta)
            check_alike(shard, logits.shape[:-1].numel(), logits, counts, None, how)
        where = (*of_operator(shard), choose(impl, logits, target))
        outputs = _vocab_pair_stats(logits, target, *given, *where)
    fields = dict(zip((*STATES, *FACTS), outputs, strict=True))
    wanted: Any = {fact: fields[fact] if fact in want else None for fact in FACTS}
    return VocabPairStats(**wanted)
