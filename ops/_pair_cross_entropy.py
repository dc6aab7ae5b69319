"""The torch path of vocab_pair_stats where cross-entropies and log-sum-exps are all that is asked.

Passes in place over slabs that stay in cache: a target's exponentials are made once for all the
rows that share it. What it computes, and to which accuracy, is the reference's in
vocab_pair_stats.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import accumulation_dtype, slabs
from ._scratch import Scratch
from ._softmax import sum_beside_one

SERVED = frozenset(("cross_entropy", "lse", "target_lse"))


class _Rows(NamedTuple):
    """Those of one pair that count, in a slab."""

    at: slice | Tensor  # in [N, V]
    within: slice | Tensor  # in the slab
    n: int


def serves(want: Sequence[str]) -> bool:
    """Whether `want` is what this file computes."""
    return SERVED.issuperset(want)


def serves_gradient(
    coefficients: Mapping[str, Tensor | None], probs: bool, need_target: bool
) -> bool:
    """Whether the logits' gradient is a mix of both sides' probabilities and nothing else, and the
    target's, where it is wanted, that of probabilities."""
    others = ("on_kl", "on_reverse", "on_jsd")
    return all(coefficients[name] is None for name in others) and (probs or not need_target)


def _slabs_torch(
    n_rows: int, row_numel: int, mask: Tensor | None
) -> Iterator[tuple[slice, list[_Rows]]]:
    """Slabs of target rows, and of each pair the rows that count; slabs without any left out."""
    n_pairs = 1 if mask is None else mask.shape[0]
    whole = mask is None or bool(mask.all())
    for slab in slabs(n_rows, 2 * row_numel):
        n = slab.stop - slab.start
        if whole or mask is None:
            yield slab, [_Rows(slab, slice(0, n), n)] * n_pairs
            continue
        parts = []
        for k in range(n_pairs):
            within = mask[k, slab].nonzero().squeeze(-1)
            if len(within) == n:
                parts.append(_Rows(slab, slice(0, n), n))
            else:
                parts.append(_Rows(within + slab.start, within, len(within)))
        if any(part.n for part in parts):
            yield slab, parts


def _plan_torch(
    logits: Tensor, mask: Tensor | None
) -> tuple[list[tuple[slice, list[_Rows]]], Scratch]:
    """The slabs of logits [K, N, V], and room for one."""
    n_pairs, n_rows, vocab_size = logits.shape
    flags = None if mask is None else mask.view(n_pairs, n_rows)
    parts = list(_slabs_torch(n_rows, vocab_size, flags))
    most = max((slab.stop - slab.start for slab, _ in parts), default=0)
    return parts, Scratch(most, vocab_size, accumulation_dtype(logits.dtype), logits.device)


def _relative(rows: Tensor, room: Tensor) -> Tensor:
    """The maxima [n, 1] of the rows; the rows less their maxima go to `room`."""
    if rows.dtype != room.dtype:
        rows = room.copy_(rows)
    top = rows.amax(-1, keepdim=True)
    torch.sub(rows, top, out=room)
    return top


def _dot_torch(weights: Tensor, gaps: Tensor, room: Tensor) -> Tensor:
    """sum(weights * gaps) of every row, with 0 * -inf = 0."""
    total = torch.mul(weights, gaps, out=room).sum(-1)
    lost = (~total.isfinite()).nonzero().squeeze(-1)
    if lost.numel():
        product = torch.where(weights[lost] == 0, 0.0, room[lost])
        total = total.index_copy(0, lost, product.sum(-1))
    return total


def forward_torch(
    logits: Tensor,  # [K, N, V]
    target: Tensor,  # [N, V]
    mask: Tensor | None,  # [K, N]
    probs: bool,
    out: Mapping[str, Tensor],  # [K, N] each
) -> None:
    n_pairs, n_rows, vocab_size = logits.shape
    parts, scratch = _plan_torch(logits, mask)
    for slab, pairs in parts:
        n = slab.stop - slab.start
        q = scratch.room("target", n)
        top = None
        if probs:
            target_rest = q.copy_(target[slab]).sum(-1)
        else:
            top = _relative(target[slab], q).squeeze(-1)
            target_rest = sum_beside_one(q.exp_()).masked_fill(top.isinf(), float("nan"))
        for k in range(n_pairs):
            rows, within, n_kept = pairs[k if mask is not None else 0]
            if n_kept == 0:
                continue
            gap = scratch.room("gap", n_kept)
            row_max = _relative(logits[k][rows], gap).squeeze(-1)
            weights = q[within]
            lift = _dot_torch(weights, gap, scratch.room("product", n_kept))
            rest = sum_beside_one(gap.exp_()).masked_fill(row_max.isinf(), float("nan"))
            of_target = target_rest[within]
            found = {"row_max": row_max, "row_rest": rest, "target_rest": of_target}
            found["lse"] = torch.where(row_max.isinf(), row_max, row_max + rest.log1p())
            if top is None:
                found["cross_entropy"] = of_target * rest.log1p() - lift
            else:
                high = top[within]
                found["target_max"] = high
                found["target_lse"] = torch.where(high.isinf(), high, high + of_target.log1p())
                found["cross_entropy"] = rest.log1p() - lift / (1 + of_target)
            for name, place in out.items():
                if name in found:
                    place[k, rows] = found[name]


def backward_torch(
    dlogits: Tensor | None,  # [K, N, V], zeros where there is a mask; may be the logits themselves
    dtarget: Tensor | None,  # [N, V]; may be the target itself
    logits: Tensor,
    target: Tensor,  # [N, V]
    mask: Tensor | None,  # [K, N]
    probs: bool,
    facts: Mapping[str, Tensor],  # [K, N] each
    coefficients: Mapping[str, Tensor | None],  # [K, N] each
) -> None:
    """dlogits = p (on_p + on_cross) - on_cross q; of probabilities dtarget = -on_cross log p."""
    n_pairs, n_rows, vocab_size = logits.shape
    parts, scratch = _plan_torch(logits, mask)
    if dtarget is not None:
        written = {slab.start for slab, _ in parts}
        for slab in slabs(n_rows, 2 * vocab_size):
            if slab.start not in written:
                dtarget[slab] = 0
    for slab, pairs in parts:
        n = slab.stop - slab.start
        q = scratch.room("target", n)
        held = None if dtarget is None else scratch.room("dtarget", n).zero_()
        ones = None
        if probs:
            q.copy_(target[slab])
        else:
            # Of the whole row, of which these may be a shard's columns; pairs that do not count
            # have none.
            top = facts["target_max"][:, slab]
            if mask is not None:
                top = torch.where(mask.view(n_pairs, n_rows)[:, slab], top, -torch.inf)
            torch.sub(target[slab], top.amax(0)[:, None], out=q)
            q.exp_()
            # Of each row one column or a few; only where most of the mass is there.
            sure = (q.sum(-1) < 2).nonzero().squeeze(-1)
            if sure.numel():
                at = (q[sure] == 1).nonzero()
                ones = (sure[at[:, 0]], at[:, 1])
        for k in range(n_pairs):
            rows, within, n_kept = pairs[k if mask is not None else 0]
            if n_kept == 0:
                continue
            c = {name: v[k, rows] for name, v in coefficients.items() if v is not None}
            of_rows = {name: fact[k, rows] for name, fact in facts.items() if fact.numel()}
            rest, of_target = of_rows["row_rest"], of_rows["target_rest"]
            z = logits[k][rows]
            is_wide = dlogits is not None and z.dtype == scratch.dtype and isinstance(rows, slice)
            in_place = dlogits[k][rows] if is_wide and dlogits is not None else None
            dz = scratch.room("gap", n_kept) if in_place is None else in_place
            if z.dtype != scratch.dtype:
                z = dz.copy_(z)
            torch.sub(z, of_rows["row_max"][:, None], out=dz)
            if held is not None and "on_cross" in c:
                share = _target_torch(dz, rest, c["on_cross"], scratch)
                if isinstance(within, slice):
                    held.add_(share)
                else:
                    held.index_add_(0, within, share)
            if dlogits is None:
                continue
            dz.exp_()
            on_cross = c.get("on_cross", torch.zeros_like(rest))
            on_p = c.get("on_p", torch.zeros_like(rest))
            certain = None
            if ones is not None and "on_cross" in c:
                certain = _certain(dz, ones, within, n, rest, of_target)
            share = on_cross * of_target if probs else on_cross
            dz.mul_(((on_p + share) / (1 + rest))[:, None])
            if "on_cross" in c:
                down = on_cross if probs else on_cross / (1 + of_target)
                dz.addcmul_(q[within], down[:, None], value=-1)
            if certain is not None:
                row, column, missing = certain
                dz[row, column] = (on_p / (1 + rest))[row] + on_cross[row] * missing
            if not is_wide:
                dlogits[k][rows] = dz.to(dlogits.dtype)
        if dtarget is not None and held is not None:
            dtarget[slab] = held.to(dtarget.dtype)


def _target_torch(gap: Tensor, rest: Tensor, on_cross: Tensor, scratch: Scratch) -> Tensor:
    """One pair's share [n, V] of the gradient of the target's probabilities, from the logits less
    their maximum."""
    share = torch.sub(gap, rest.log1p()[:, None], out=scratch.room("product", len(gap)))
    return share.clamp_min_(-1e18).mul_(-on_cross[:, None])


def _certain(
    e: Tensor,  # [n_kept, V] exponentials of the logits, 1 at their maximum
    ones: tuple[Tensor, Tensor],  # rows in the slab and columns where those of the target are 1
    within: slice | Tensor,
    n: int,
    rest: Tensor,
    target_rest: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Where both sides agree on one near-certain column, and p - q there: the difference of what
    they leave to the rest."""
    row, column = ones
    if isinstance(within, Tensor):
        place = torch.full((n,), -1, device=row.device).index_copy_(
            0, within, torch.arange(len(within), device=row.device)
        )
        row = place[row]
        row, column = row[row >= 0], column[row >= 0]
    both = (e[row, column] == 1) & (rest[row] < 1) & (target_rest[row] < 1)
    row, column = row[both], column[both]
    missing = target_rest / (1 + target_rest) - rest / (1 + rest)
    return row, column, missing[row]
