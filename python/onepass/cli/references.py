"""The ops and losses once more, in plain torch, for `onepass doctor` to measure against.

Each formula is what a user would write without onepass: in fp64 it is the truth, in the input's
dtype (statistics in fp32) the baseline. Nothing here imports the ops, so a fault there cannot hide.
Inputs and outputs go by name. An output "scale of X" is the size of the terms that X sums up,
"terms of X at L" that of the terms in the gradient at input L, for an upstream of 1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = dict[str, Tensor]
IGNORED = -100


def statistics(tensor: Tensor) -> Tensor:
    """The dtype of statistics: fp64 stays, all else becomes fp32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def pick(values: Tensor, ids: Tensor) -> Tensor:
    """values [..., V] at ids [...]."""
    return values.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def finite(values: Tensor) -> Tensor:
    """`values` with 0, and no gradient, where they are infinite."""
    return torch.where(values.isfinite(), values, 0.0)


def masked(values: Tensor, counts: Tensor) -> Tensor:
    """Rows [..., D] with 0, and no gradient, where `counts` [...] is False."""
    return torch.where(counts.unsqueeze(-1), values, 0.0)


DIVERGENCES = ("cross_entropy", "kl", "reverse_kl", "jsd")
HEAD = ("hidden", "matrix", "bias")
TARGET_HEAD = ("target_hidden", "target_matrix", "target_bias")


def head_logits(
    t: Tensors,
    counts: Tensor | None = None,
    names: tuple[str, str, str] = HEAD,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """The logits [..., V] of hidden states [..., D] and a head, whole, in the inputs' dtype; of a
    row that does not count no hidden state is used."""
    hidden = t[names[0]] if counts is None else masked(t[names[0]], counts)
    z = F.linear(hidden, t[names[1]], t.get(names[2])) * scale
    if softcap is not None:
        z = torch.tanh(z / softcap) * softcap
    return z / temperature


def vocab_stats(t: Tensors) -> Tensors:
    """Facts of logits [N, V] at labels and contrast [N], with optional bag_weights [V]."""
    counts = t["labels"] != IGNORED
    z = masked(statistics(t["logits"]), counts)
    labels = torch.where(counts, t["labels"], 0)
    logp = F.log_softmax(z, dim=-1)
    p = logp.exp()
    weights = t["bag_weights"].to(z.dtype) if "bag_weights" in t else torch.ones_like(z[0])
    facts = {
        "lse": z.logsumexp(-1),
        "label_logit": pick(z, labels),
        "contrast_logit": pick(z, t["contrast"]),
        "logp": pick(logp, labels),
        "entropy": -(p * finite(logp)).sum(-1),
        "logit_sum": z.sum(-1),
        "logp_sum": (weights * logp).sum(-1),
        "sum_sq_probs": (2 * logp).logsumexp(-1),
        "bag_mass": (weights * p).sum(-1),
        "argmax": z.detach().amax(-1),  # by its logit: ties may be broken either way
        "scale of logit_sum": z.detach().abs().sum(-1),
        "scale of logp_sum": (weights * logp.detach()).abs().sum(-1),
    }
    return {name: torch.where(counts, fact, 0.0) for name, fact in facts.items()}


def vocab_stats_certain(t: Tensors) -> Tensors:
    """logp and entropy from the gaps to the maximum, its own exp(0) = 1 left out of the sum.

    The usual spelling loses 1 - p and the entropy in rounding once the gap nears 37, in fp64 too.
    """
    z = t["logits"]
    top = z.argmax(-1, keepdim=True)
    gap = z - z.gather(-1, top)
    rest = gap.exp().scatter(-1, top, 0.0)
    log_norm = rest.sum(-1).log1p()
    entropy = log_norm - (rest * gap).sum(-1) / (1 + rest.sum(-1))
    # A gap of the maximum to itself is 0 by name: in autograd it would be 1 - 1 - (1 - p).
    own = torch.where(t["labels"] == top.squeeze(-1), 0.0, pick(gap, t["labels"]))
    return {"logp": own - log_norm, "entropy": entropy}


def vocab_pair_stats(t: Tensors) -> Tensors:
    """Facts of logits [..., N, V] against target_logits [N, V] or target_probs.

    Their gradients are p or q times a difference of logarithms and facts, so a row's largest
    gradient may be far smaller than what it was made of.
    """
    z = statistics(t["logits"])
    counts = t["mask"] if "mask" in t else torch.ones_like(z[..., 0], dtype=torch.bool)
    z = masked(z, counts)
    s, p = finite(F.log_softmax(z, dim=-1)), F.softmax(z, dim=-1)
    facts = {"lse": z.logsumexp(-1)}
    if "target_logits" in t:
        target = masked(statistics(t["target_logits"]), counts)
        log_q, q = finite(F.log_softmax(target, dim=-1)), F.softmax(target, dim=-1)
        facts["target_lse"] = target.logsumexp(-1)
    else:
        q = statistics(t["target_probs"])
        log_q = torch.where(q > 0, q, 1.0).log()
    both = (p + q) / 2
    mixture = torch.where(both > 0, both, 1.0).log()
    facts |= {
        "cross_entropy": -(q * s).sum(-1),
        "kl": (q * (log_q - s)).sum(-1),
        "reverse_kl": (p * (s - log_q)).sum(-1),
        "jsd": ((q * (log_q - mixture)).sum(-1) + (p * (s - mixture)).sum(-1)) / 2,
    }
    facts = {name: torch.where(counts, fact, 0.0) for name, fact in facts.items()}
    for name, fact in list(facts.items()):
        terms = (1 + s.abs() + log_q.abs() + fact.abs().unsqueeze(-1)) * counts.unsqueeze(-1)
        facts[f"terms of {name} at logits"] = (p * terms).detach()
        facts[f"terms of {name} at target_logits"] = (q * terms).detach()
    return facts


def at_head(
    terms: Tensor, t: Tensors, counts: Tensor | None, names: tuple[str, str, str] = HEAD
) -> Tensors:
    """What terms [..., V] of the logits' gradient make the terms of a head's gradients: those of
    the matrix and the bias row by row, to be summed once the upstream is known."""
    hidden, matrix = (statistics(t[name].detach()).abs() for name in names[:2])
    hidden = hidden if counts is None else masked(hidden, counts)
    at_matrix = terms[..., None] * hidden[..., None, :]
    return dict(zip(names, (terms @ matrix, at_matrix, terms), strict=True))


def head_stats(t: Tensors, **cap: Any) -> Tensors:
    """The facts of vocab_stats, of hidden states [N, D] and a head.

    A logit is a sum too, and carries the rounding of its terms into every probability.
    """
    counts = t["labels"] != IGNORED
    z = head_logits(t, counts, **cap)
    facts = vocab_stats(t | {"logits": z})
    with torch.no_grad():
        sizes = {name: t[name].abs() for name in HEAD if name in t}
        terms = F.softmax(statistics(z), -1) * (1 + statistics(head_logits(sizes, counts)))
        terms = masked(terms, counts)
    for leaf, value in at_head(terms, t, counts).items():
        facts |= {f"terms of {name} at {leaf}": value for name in list(facts) if " " not in name}
    return facts


def head_stats_certain(t: Tensors) -> Tensors:
    """vocab_stats_certain of hidden states [N, D] and a head."""
    return vocab_stats_certain(t | {"logits": head_logits(t)})


def head_pair_stats(t: Tensors) -> Tensors:
    """The facts of vocab_pair_stats, of hidden states and a head against target_logits or against
    other hidden states and another head."""
    counts = t.get("mask")
    made = {"logits": head_logits(t, counts)}
    if "target_hidden" in t:
        made["target_logits"] = head_logits(t, counts, TARGET_HEAD)
    facts = vocab_pair_stats(t | made)
    for side, names in (("logits", HEAD), ("target_logits", TARGET_HEAD)):
        if names[0] in t:
            for name in DIVERGENCES:
                of_head = at_head(facts[f"terms of {name} at {side}"], t, counts, names)
                facts |= {f"terms of {name} at {leaf}": v for leaf, v in of_head.items()}
    return facts


def row_moments(t: Tensors) -> Tensors:
    """Moments of x and y [N, D], or of x, x2 and y, y2 as two layers."""
    x, y = statistics(t["x"]), statistics(t["y"])
    if "x2" in t:
        x, y = torch.stack([x, statistics(t["x2"])]), torch.stack([y, statistics(t["y2"])])
    if "mask" in t:
        x, y = masked(x, t["mask"]), masked(y, t["mask"])
    d, s = x - y, x + y
    return {
        "dd": (d * d).sum(-1),
        "xx": (x * x).sum(-1),
        "yy": (y * y).sum(-1),
        "xy": (x * y).sum(-1),
        "difference_of_squares": (d * s).sum(-1),
        "scale of xy": (x * y).detach().abs().sum(-1),
        "scale of difference_of_squares": (d * s).detach().abs().sum(-1),
    }


def gaussian_stats(t: Tensors) -> Tensors:
    """Facts of x [..., D] under Gaussians of mean location + mean."""
    x, mean, location, std = (statistics(t[n]) for n in ("x", "mean", "location", "std"))
    if "mask" in t:
        x, mean, location = (masked(side, t["mask"]) for side in (x, mean, location))
        std = torch.where(t["mask"].unsqueeze(-1), std, 1.0)
    z = (x - location - mean) / std
    size = (x.abs() + location.abs() + mean.abs()).detach() / std.detach()
    log = std.log()
    return {
        "mahalanobis": (z * z).sum(-1),
        "log_det": log.expand(z.shape).sum(-1),
        "scale of mahalanobis": (2 * z.detach().abs() * size).sum(-1),
        "scale of log_det": log.detach().abs().expand(z.shape).sum(-1),
    }


def normals(seed: Tensor, count: int) -> Tensor:
    """Box-Muller of Philox-4x32-10: normals 4 i to 4 i + 3 of counter i."""
    word = 0xFFFFFFFF
    a = torch.arange(-(-count // 4), device=seed.device)
    b, c, d = torch.zeros_like(a), torch.zeros_like(a), torch.zeros_like(a)
    key, other = seed & word, seed >> 32 & word
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32 & word) ^ b ^ key, second & word
        c, d = (first >> 32 & word) ^ d ^ other, first & word
        key, other = key + 0x9E3779B9 & word, other + 0xBB67AE85 & word
    radius = torch.stack([a, c], -1).float() * 2.0**-32 + 2.0**-33
    radius = (-2 * radius.log()).sqrt()
    angle = torch.stack([b, d], -1)
    angle = (angle - (angle >> 31 << 32)).float() * (torch.pi * 2.0**-31)  # signed: half turns
    return torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten()[:count]


def cloak(t: Tensors) -> Tensors:
    """x + mean + std * normals, x where the mask is 0; in the dtype of x."""
    x, mean, std = (statistics(t[n]) for n in ("x", "mean", "std"))
    noisy = x + mean + std * normals(t["seed"], x.numel()).view(x.shape).to(x.dtype)
    if "mask" in t:
        noisy = torch.where(t["mask"].unsqueeze(-1), noisy, x)
    return {"rows": noisy.to(t["x"].dtype)}


def distances(t: Tensors) -> Tensors:
    """|x - y|^2 and 1 - cos of x and y [N, D], neither as a difference of large numbers."""
    x, y = statistics(t["x"]), statistics(t["y"])
    d = x / x.norm(dim=-1, keepdim=True) - y / y.norm(dim=-1, keepdim=True)
    return {"dd": (x - y).square().sum(-1), "1 - cos": d.square().sum(-1) / 2}


def token_losses(t: Tensors, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Cross-entropy of logits [N, V] against target [N] or [N, V], 0 where the mask [N] is 0."""
    z, target = statistics(t["logits"]), t["target"]
    if target.is_floating_point():
        target = target.to(z.dtype)
    if "mask" in t:
        z = masked(z, t["mask"] != 0)
    losses = F.cross_entropy(z, target, reduction="none", label_smoothing=label_smoothing)
    return losses + z_loss * z.logsumexp(-1).square()


def capped(loss: Tensor, max_loss: float, scaling_factor: float, form: str) -> Tensor:
    """`loss` under a sigmoid cap."""
    share = torch.sigmoid(scaling_factor * loss)
    return max_loss * (share if form == "sigmoid" else 2 * share - 1)


def reduced(rows: Tensor, t: Tensors, reduction: str = "mean") -> Tensor:
    """Rows [N] weighted by the mask, if there is one, and reduced."""
    weights = t["mask"].to(rows.dtype) if "mask" in t else torch.ones_like(rows)
    rows = weights * torch.where(weights != 0, rows, 0.0)
    if reduction == "none":
        return rows
    return rows.sum() / (weights.sum() if reduction == "mean" else 1)


def hidden_pair(t: Tensors) -> tuple[Tensor, Tensor]:
    """x and target [N, D], with rows of 0 where the mask [N] is 0."""
    x, target = statistics(t["x"]), statistics(t["target"])
    if "mask" in t:
        x, target = (masked(v, t["mask"] != 0) for v in (x, target))
    return x, target


def unit(x: Tensor) -> Tensor:
    """Rows [N, D] over their norm; a row of 0 stays."""
    norm = x.norm(dim=-1, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def distance_rows(t: Tensors, normalization: str) -> Tensor:
    """The normalized distance of each row of x from its target, [N]."""
    x, target = hidden_pair(t)
    if normalization == "unit":
        return (unit(x) - unit(target)).norm(dim=-1)
    if normalization == "dim":
        return (x - target).square().mean(-1)
    relative = (x - target).norm(dim=-1) / target.norm(dim=-1).clamp_min(1e-6)
    return relative if normalization == "target" else relative.square()
