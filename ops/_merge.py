"""Facts of rows over a whole vocabulary from what is known of its shards: [R, ...] to [...].

With `share` the probability of a shard's columns together: a sum weighted by p is the shards' sums
weighted by their shares; an entropy, a cross-entropy or a divergence is the shards' own, weighted,
and that of the shares. Every such term is of one sign, so that nothing cancels that did not in one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._bend import bend, log_bend

Parts = Mapping[str, Tensor]  # of every shard, [R, ...] each


class Mass(NamedTuple):
    """How the probability of a row is spread over the shards."""

    top: Tensor  # [...] the row's largest logit
    rest: Tensor  # [...] sum of exp(z - top) without that one
    first: Tensor  # [R, ...] the shard that holds it, the first of several
    share: Tensor  # [R, ...] of the probability
    log_share: Tensor  # [R, ...]

    @classmethod
    def of(cls, top: Tensor, rest: Tensor) -> Mass:
        """From every shard's own two. A shard without columns has a maximum of -inf."""
        highest = top.amax(0)
        empty = top == -torch.inf
        holder = top.argmax(0, keepdim=True)
        first = torch.zeros_like(top, dtype=torch.bool).scatter(0, holder, True)
        gap = torch.where(empty, -torch.inf, top - highest)
        mass = torch.where(empty, 0.0, gap.exp() * (1 + rest))
        others = mass.masked_fill(first, 0.0).sum(0)
        own = rest.gather(0, holder).squeeze(0)
        whole = (own + others).masked_fill(highest.isinf(), torch.nan)
        log_share = gap + torch.where(empty, 0.0, rest.log1p()) - whole.log1p()
        return cls(highest, whole, first, mass / (1 + whole), log_share)

    @property
    def lse(self) -> Tensor:
        return torch.where(self.top.isinf(), self.top, self.top + self.rest.log1p())

    def mean(self, values: Tensor) -> Tensor:
        """The shards' values [R, ...] weighted by their shares; no share, no value."""
        return torch.where(self.share == 0, 0.0, self.share * values).sum(0)


def merged_stats(parts: Parts, want: Sequence[str]) -> dict[str, Tensor]:
    """The facts of vocab_stats that are wanted, with `row_max` and `row_rest`."""
    mass = Mass.of(parts["row_max"], parts["row_rest"])
    log_norm = mass.rest.log1p()
    facts = {"row_max": mass.top, "row_rest": mass.rest, "lse": mass.lse}
    for name in ("label_logit", "contrast_logit", "logit_sum"):
        if name in parts:
            facts[name] = parts[name].sum(0)
    if "logp" in want:
        facts["logp"] = (facts["label_logit"] - mass.top) - log_norm
    if "entropy" in want:
        facts["entropy"] = mass.mean(parts["entropy"] - mass.log_share)
    if "logp_sum" in want:
        weight = parts["weight"]
        lift = torch.where(weight == 0, 0.0, weight * mass.log_share)
        values = torch.where(mass.log_share == -torch.inf, lift, parts["logp_sum"] + lift)
        facts["logp_sum"] = values.sum(0)
    if "sum_sq_probs" in want:
        logs = 2 * mass.log_share + parts["sum_sq_probs"]
        facts["sum_sq_probs"] = log_sum(torch.where(mass.share == 0, -torch.inf, logs))
    if "bag_mass" in want:
        facts["bag_mass"] = mass.mean(parts["bag_mass"])
    if "argmax" in want:
        facts["argmax"] = torch.where(mass.first, parts["argmax"], 0.0).sum(0).to(torch.int64)
    return {name: facts[name] for name in ("row_max", "row_rest", *want)}


def log_sum(logs: Tensor) -> Tensor:
    """log sum_r exp(logs_r), to full relative accuracy near 0."""
    top, holder = logs.max(0, keepdim=True)
    others = (logs - top).exp().scatter(0, holder, 0.0).sum(0)
    return top.squeeze(0) + others.log1p()


def merged_pair_stats(parts: Parts, want: Sequence[str], probs: bool) -> dict[str, Tensor]:
    """The facts of vocab_pair_stats that are wanted (jsd needs the whole rows' maxima and rests
    first), with those."""
    p = Mass.of(parts["row_max"], parts["row_rest"])
    facts = {"row_max": p.top, "row_rest": p.rest, "lse": p.lse}
    ruled_out = p.log_share == -torch.inf
    if probs:
        weight = facts["target_rest"] = parts["target_rest"]
        lifted = parts["cross_entropy"] - weight * p.log_share
        lifted = torch.where(ruled_out, torch.where(weight == 0, 0.0, torch.inf), lifted)
        facts["target_rest"], facts["cross_entropy"] = weight.sum(0), lifted.sum(0)
        facts["target_max"] = torch.zeros_like(p.top)
        return facts
    q = Mass.of(parts["target_max"], parts["target_rest"])
    facts |= {"target_max": q.top, "target_rest": q.rest, "target_lse": q.lse}
    if "cross_entropy" in want:
        own = torch.where(ruled_out, torch.inf, parts["cross_entropy"] - p.log_share)
        facts["cross_entropy"] = q.mean(own)
    if "kl" in want:
        own = torch.where(ruled_out, torch.inf, parts["kl"])
        facts["kl"] = q.mean(own) + between_shares(q, p, parts["log_ratio"])
    if "reverse_kl" in want:
        own = torch.where(q.log_share == -torch.inf, torch.inf, parts["reverse_kl"])
        facts["reverse_kl"] = p.mean(own) + between_shares(p, q, -parts["log_ratio"])
    return facts


def between_shares(own: Mass, other: Mass, log_ratio: Tensor) -> Tensor:
    """KL(own || other) of the shares; `log_ratio` [R, ...] is what the shards' masses of unscaled
    exponentials differ by, log(other's / own's), exact where the two rows are nearly equal."""
    live = own.share > 1e-30  # of less, exp(80) makes nothing that would show
    direct = own.mean(own.log_share - other.log_share)
    largest = own.share.argmax(0, keepdim=True)
    shift = torch.where(live, log_ratio - log_ratio.gather(0, largest), 0.0)
    bent = own.mean(bend(shift))
    grown = own.mean(torch.expm1(shift.clamp_max(80.0)))
    lost = torch.where(live, 0.0, other.share).sum(0)
    usable = (bent < 0.3) & (grown.abs() < 0.5) & (lost < 0.5)
    bent = bent - log_bend(torch.where(usable, grown, 0.0))
    bent = bent - torch.log1p(-torch.where(usable, lost, 0.0))
    return torch.where(usable, bent, direct).clamp_min(0)
