"""head_pair_stats: what vocab_pair_stats tells of logits that are never whole, on either side.

A slab of target rows at a time, with all the rows that share them: the vendor's matrix products of
whichever sides are heads, then the kernels of vocab_pair_stats in place. The strategies are those
of head.py; a teacher's product is made once for all its students.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._cap import NO_CAP, Cap
from ._declare import declare
from ._dtensor import own_side, shard_of_sides
from ._launch import accumulation_dtype, capturing, choose
from ._shards import (
    Shard,
    check_alike,
    check_differentiable_twice,
    check_fixed,
    of_operator,
    summed_gradient,
)
from .head import (
    Gradients,
    Head,
    Need,
    factor_ahead,
    head_product,
    padded_room,
    scaled,
    slab_count,
    slab_limit,
)
from .vocab_pair_stats import (
    COEFFICIENTS,
    FACTS,
    STATES,
    _as_outputs,
    _backward_torch,
    _backward_triton,
    _empty_facts,
    _twice_differentiable,
    clamp_jsd,
    is_one_side,
    pair_coefficients,
    pair_facts,
)


class Side:
    """Logits [G, N, V] (or probabilities) of one side of the pairs, a slab of rows at a time: a
    head's product, or a tensor as it is where there is no weight."""

    def __init__(
        self,
        hidden: Sequence[Tensor],  # [G, N, D_k] each; [G, N, V] without weights
        weight: Sequence[Tensor],  # [V, D_k] each
        bias: Tensor | None,
        cap: Cap,
        need: Need,
        n_slabs: int,
        ahead: bool,
    ) -> None:
        self.weight, self.bias, self.cap = weight, bias, cap
        self.n_groups, self.n_rows = hidden[0].shape[:2]
        self.vocab_size = weight[0].shape[0] if weight else hidden[0].shape[-1]
        self.hidden = hidden if not weight else [t.flatten(0, 1) for t in hidden]
        self.made = Gradients(self.hidden, weight, bias, need, n_slabs, ahead)

    def allocate(self, step: int) -> None:
        if self.weight:
            self.room = padded_room(self.hidden[0], self.n_groups * step, self.vocab_size)

    def slab(self, rows: Any, n: int, counts: Tensor | None) -> tuple[Any, list[Tensor], Tensor]:
        """Where the rows lie, their hidden states, and the product [G, n, V]; zeros for rows that
        do not count, `counts` [G, n]."""
        if not self.weight:
            return rows, [], self.hidden[0][:, rows]
        at = rows
        if self.n_groups > 1:
            index = torch.arange(self.n_rows, device=self.hidden[0].device)[rows]
            starts = torch.arange(self.n_groups, device=index.device)[:, None] * self.n_rows
            at = (starts + index).view(-1)
        states = [t[at] for t in self.hidden]
        if counts is not None:
            states = [torch.where(counts.reshape(-1, 1), t, 0.0) for t in states]
        u = head_product(states, self.weight, self.bias, self.room[: self.n_groups * n])
        return at, states, u.view(self.n_groups, n, self.vocab_size)

    def add(self, at: Any, states: Sequence[Tensor], u: Tensor, dlogits: Tensor) -> None:
        """One slab's share of the gradients, from that of the logits."""
        if self.weight:
            du = self.cap.gradient(dlogits, u).to(u.dtype)
            self.made.add(at, states, du.flatten(0, 1))
        elif self.made.hidden:
            self.made.hidden[0][:, at] = dlogits

    def results(self) -> list[Tensor]:
        if not self.weight:
            return self.made.all
        shape = (self.n_groups, self.n_rows, -1)
        rows = [t.view(shape) for t in self.made.hidden.values()]
        return [*rows, *self.made.weight.values(), *self.made.bias]


class Pairs:
    """The slabs of both sides, and the rows of them that count."""

    def __init__(self, z: Side, t: Side, mask: Tensor | None, n_rows: int, compact: bool) -> None:
        self.sides = (z, t)
        self.mask = None if mask is None else mask.view(z.n_groups, z.n_rows)
        self.kept = None
        if self.mask is not None and compact and not capturing(z.hidden[0]):
            kept = self.mask.any(0).nonzero().squeeze(-1)  # one wait for a GPU
            self.kept = kept if len(kept) < z.n_rows else None
        self.total = z.n_rows if self.kept is None else self.kept.shape[0]
        self.step = min(n_rows, max(1, self.total))
        for side in self.sides:
            side.allocate(self.step)
            side.made.zero(self.total, self.kept is None)

    def __iter__(self) -> Iterator[tuple[Any, Tensor | None, list[Any]]]:
        """(rows, their mask [K, n], of both sides what Side.slab returns)."""
        for start in range(0, self.total, self.step):
            rows: Any = slice(start, min(start + self.step, self.total))
            n = rows.stop - start
            if self.kept is not None:
                rows = self.kept[rows]
            z, t = self.sides
            counts = None if self.mask is None else self.mask[:, rows].contiguous()
            of_target = None if counts is None else counts.any(0, keepdim=True)
            yield rows, counts, [z.slab(rows, n, counts), t.slab(rows, n, of_target)]

    def gradient(
        self,
        rows: Any,
        counts: Tensor | None,
        slabs: Sequence[Any],
        logits: Sequence[Tensor],
        probs: bool,
        beta: float,
        facts: Mapping[str, Tensor],  # [K, n] each
        coefficients: Mapping[str, Tensor | None],  # [K, n] each
        triton: bool,
    ) -> None:
        """Adds a slab's share to both sides' gradients."""
        outs = []
        for side, whole in zip(self.sides, logits, strict=True):
            wanted = bool(side.made.all)
            # A head's logits are ours to overwrite; a caller's are not.
            outs.append(None if not wanted else whole if side.weight else torch.empty_like(whole))
        dz, dt = outs
        if not triton and counts is not None and dz is not None:
            dz.masked_fill_(~counts[..., None], 0.0)
        z, t = logits[0], logits[1][0]
        dt = None if dt is None else dt[0]
        args = (dict(facts), dict(coefficients))
        if not z.numel():  # a shard without columns
            pass
        elif triton:
            dz_, dt_ = (None if d is None else d.unsqueeze(-3) for d in (dz, dt))
            flat = None if counts is None else counts.view(-1)
            _backward_triton(dz_, dt_, z[:, None], t[None], flat, probs, beta, *args)
        else:
            _backward_torch(dz, dt, z, t, counts, probs, beta, *args)
        for side, (at, states, u), d in zip(self.sides, slabs, (dz, dt), strict=True):
            if d is not None:
                side.add(at, states, u, d.view(u.shape))


def _sides(
    args: Sequence[Any], needs: Sequence[Any], n_rows: int, ahead: bool
) -> tuple[Side, Side]:
    """Of the operators' first ten arguments."""
    hidden, weight, bias, softcap, scale = args[:5]
    n_slabs = slab_count(hidden[0].shape[1], n_rows)
    z = Side(hidden, weight, bias, Cap(softcap, scale), Need(*needs[:3]), n_slabs, ahead)
    hidden, weight, bias, softcap, scale = args[5:10]
    states, cap = [h[None] for h in hidden], Cap(softcap, scale)
    none = ([False] * len(hidden), [False] * len(weight), False)
    t = Side(states, weight, bias, cap, Need(*(needs[3:] or none)), n_slabs, False)
    return z, t


def _forward(*args: Any) -> tuple[Any, ...]:
    mask, probs, want, beta, n_rows, compact, ahead, shares, *rest = args[10:]
    group, sizes, *needs, triton = rest[2:]
    asked, shard = want.split(), Shard.of(group, sizes)
    z, t = _sides(args, needs, n_rows, bool(ahead))
    facts = _empty_facts(_rows_of(z), asked, False)
    if facts["row_max"].numel():
        pairs = Pairs(z, t, mask, n_rows, compact)
        for rows, counts, slabs in pairs:
            whole = [s.cap.logits(u) for s, (_, _, u) in zip((z, t), slabs, strict=True)]
            pair = (whole[0][:, None], whole[1]) if triton else (whole[0], whole[1][0])
            flat = None if counts is None else counts.view(-1) if triton else counts
            found = pair_facts(*pair, flat, probs, asked, beta, shard, triton)
            for name, values in found.items():
                facts[name][:, rows] = values
            if ahead:
                ones = torch.ones_like(found["row_max"])
                of_rows = [share[:, rows] for share in shares] or [ones]
                c = pair_coefficients(found, dict(zip(ahead.split(), of_rows, strict=True)), probs)
                pairs.gradient(rows, counts, slabs, whole, probs, beta, found, c, triton)
    else:
        z.made.zero()
    clamp_jsd(facts, beta)
    return (*_as_outputs(_rows_of(z), facts), z.results() if ahead else [])


def _rows_of(z: Side) -> Tensor:
    """Stands for logits [K, N, V] where only their rows matter."""
    first = z.hidden[0]
    return first.new_empty(()).expand(z.n_groups, z.n_rows, z.vocab_size)


def _forward_fake(*args: Any) -> tuple[Any, ...]:
    want, n_rows, ahead, needs = args[12], args[14], args[16], args[22:25]
    z, _ = _sides(args, needs, n_rows, bool(ahead))
    outputs = _as_outputs(_rows_of(z), _empty_facts(_rows_of(z), want.split(), True))
    return (*outputs, z.results() if ahead else [])


def _backward_op(*args: Any) -> list[Tensor]:
    mask, probs, beta, *rest = args[10:]
    states, values = rest[:4], rest[4 : 4 + len(COEFFICIENTS)]
    n_rows, compact, *needs, triton = rest[4 + len(COEFFICIENTS) :]
    z, t = _sides(args, needs, n_rows, False)
    if states[0].numel():
        pairs = Pairs(z, t, mask, n_rows, compact)
        for rows, counts, slabs in pairs:
            whole = [s.cap.logits(u) for s, (_, _, u) in zip((z, t), slabs, strict=True)]
            facts = {
                name: fact[:, rows].contiguous()
                for name, fact in zip(STATES, states, strict=False)
                if fact.numel()
            }
            c = {
                name: None if value is None else value[:, rows].contiguous()
                for name, value in zip(COEFFICIENTS, values, strict=True)
            }
            pairs.gradient(rows, counts, slabs, whole, probs, beta, facts, c, triton)
    else:
        for side in (z, t):
            side.made.zero()
    return [*z.results(), *t.results()]


def _backward_fake(*args: Any) -> list[Tensor]:
    z, t = _sides(args, args[-7:-1], args[-9], False)
    return [*z.results(), *t.results()]


_OF_SIDES = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, float softcap, float scale, "
    "Tensor[] target_hidden, Tensor[] target_weight, Tensor? target_bias, float target_softcap, "
    "float target_scale, Tensor? mask, bool probs, "
)
_OF_STUDENT = "bool[] need_hidden, bool[] need_weight, bool need_bias, "
_OF_TARGET = "bool[] need_target_hidden, bool[] need_target_weight, bool need_target_bias, "

_head_pair_stats_backward = declare(
    f"head_pair_stats_backward({_OF_SIDES} float beta, "
    + "".join(f"Tensor {name}, " for name in STATES[:4])
    + "".join(f"Tensor? {name}, " for name in COEFFICIENTS)
    + f"int n_rows, bool compact, {_OF_STUDENT}{_OF_TARGET} bool triton) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, softcap, scale, t_hidden, t_weight, t_bias, t_softcap, t_scale = inputs[
        :10
    ]
    mask, probs, want, beta, n_rows, compact, ahead, shares, *rest = inputs[10:]
    private, exact, group, sizes, *_, triton = rest
    *facts, made = output
    parts = (hidden, weight, [bias], t_hidden, t_weight, [t_bias], [mask], facts, shares, made)
    ctx.save_for_backward(*(t for part in parts for t in part))
    ctx.sizes = [len(part) for part in parts]
    ctx.caps = (Cap(softcap, scale), Cap(t_softcap, t_scale))
    ctx.options = (
        probs,
        want.split(),
        beta,
        n_rows,
        compact,
        ahead.split(),
        private,
        exact,
        Shard.of(group, sizes),
        triton,
    )
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    probs, want, beta, n_rows, compact, ahead, private, exact, shard, triton = ctx.options
    saved = iter(ctx.saved_tensors)
    hidden, weight, [bias], t_hidden, t_weight, [t_bias], [mask], facts, shares, made = (
        [next(saved) for _ in range(size)] for size in ctx.sizes
    )
    sides = ((hidden, weight, bias), (t_hidden, t_weight, t_bias))
    grads = {
        fact: grad
        for fact, grad in zip(FACTS, upstream[len(STATES) : -1], strict=True)
        if grad is not None and fact in want and not (fact == "jsd" and is_one_side(beta))
    }
    places = ctx.needs_input_grad
    needs = [places[at] for at in (0, 1, 2, 5, 6, 7)]
    flat = [
        (t, n)
        for at, (states, matrices, offset) in enumerate(sides)
        for part, of in zip((states, matrices, [offset]), needs[3 * at :], strict=False)
        for t, n in zip(part, of if isinstance(of, (list, tuple)) else [of], strict=True)
    ]
    wanted = [t for t, n in flat if n]
    of_shares = [None] * len(shares)
    of_needs: tuple[Any, Any] = (None, None if weight else [])  # empty lists come back empty
    of_sizes: Any = [] if shard is None else None
    tail = (*[None] * 7, of_shares, None, None, None, of_sizes, *of_needs, None, None)
    if not grads:
        return (*_nothing(hidden, weight), *_nothing(t_hidden, t_weight), *tail)
    counts = None if mask is None else mask.view(hidden[0].shape[:2])
    if torch.is_grad_enabled():
        check_differentiable_twice(shard)
        both = _twice(sides, ctx.caps, mask, probs, grads, beta)
        out = [d for d, (_, n) in zip(both, flat, strict=True) if n]
    elif (factor := factor_ahead(made, grads, ahead, shares, counts, exact)) is not None:
        out = scaled(made, factor, [t.dtype for t in wanted], private)
    else:
        held = dict(zip((*STATES, *FACTS), facts, strict=True))
        c = pair_coefficients(held, grads, probs)
        out = _head_pair_stats_backward(
            hidden, weight, bias, *ctx.caps[0], t_hidden, t_weight, t_bias, *ctx.caps[1], mask,
            probs, beta, *(held[name] for name in STATES[:4]), *c.values(), n_rows, compact,
            *needs, triton,
        )  # fmt: skip
    rest = (d.to(t.dtype).view_as(t) for d, t in zip(out, wanted, strict=True))
    given = iter([next(rest) if n else None for _, n in flat])
    results: list[Any] = []
    for states, matrices, _ in sides:
        results += [[next(given) for _ in states], [next(given) for _ in matrices], next(given)]
        results += [None, None]
    return (*results, *tail)


def _nothing(hidden: Sequence[Tensor], weight: Sequence[Tensor]) -> tuple[Any, ...]:
    return ([None] * len(hidden), [None] * len(weight), None, None, None)


def _twice(
    sides: Sequence[Any],
    caps: Sequence[Cap],
    mask: Tensor | None,
    probs: bool,
    grads: dict[str, Tensor],
    beta: float,
) -> list[Any]:
    """The gradients in torch operations that autograd can follow, for create_graph=True; with whole
    logits. Hidden states, weights and bias of either side in turn."""
    us, logits = [], []
    for (hidden, weight, bias), cap in zip(sides, caps, strict=True):
        u = hidden[0]
        if weight:
            flat = head_product([t.reshape(-1, t.shape[-1]) for t in hidden], weight, bias)
            u = flat.view(*u.shape[:-1], -1)
        us.append(u)
        logits.append(cap.logits(u))
    results: list[Any] = []
    both = _twice_differentiable(logits[0], logits[1], mask, probs, grads, beta)
    for (hidden, weight, bias), cap, u, d in zip(sides, caps, us, both, strict=True):
        du = cap.gradient(d, u).to(u.dtype)
        if not weight:
            results += [du, None]
            continue
        flat = du.reshape(-1, du.shape[-1])
        rows = [t.reshape(-1, t.shape[-1]) for t in hidden]
        results += [(flat @ matrix).view_as(t) for matrix, t in zip(weight, hidden, strict=True)]
        results += [flat.T @ states for states in rows]
        results.append(None if bias is None else flat.sum(0))
    return results


_head_pair_stats = declare(
    f"head_pair_stats({_OF_SIDES} str want, float beta, int n_rows, bool compact, str ahead, "
    "Tensor[] shares, bool private, bool exact, str group, int[] sizes, "
    f"{_OF_STUDENT} bool triton) -> ("
    + ", ".join(f"Tensor {name}" for name in (*STATES, *FACTS))
    + ", Tensor[] made)",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def head_pair_stats(
    logits: Tensor,  # [..., V] or LazyLogits
    target: Tensor,  # of the trailing shape; logits, probabilities or LazyLogits
    mask: Tensor | None,  # [...] flattened, bool
    probs: bool,
    want: Sequence[str],
    beta: float,
    impl: str,
    shares: Mapping[str, Tensor] | None = None,  # [...] each
) -> tuple[Tensor, ...]:
    """The outputs of vocab_pair_stats' operator where either side is a head; its arguments have
    been checked. Without gradients a product for each side that is a head; work with them as in
    head_stats, and the target's product once more where the backward makes the logits again."""
    rows = logits.shape[:-1]
    n_pairs = rows[: logits.dim() - target.dim()].numel()
    n_rows = target.shape[:-1].numel()
    shard = shard_of_sides(logits, target)
    student = _as_side(logits, (n_pairs, n_rows), shard)
    teacher = _as_side(target, (n_rows,), shard)
    needs = [Need.of(*side[:3]) for side in (student, teacher)]
    mode, compact, budget = _options(logits, target)
    foretold = shares is not None and set(shares) == set(want)
    is_one = not needs[0].of_head and len(want) == 1
    can = needs[0].any and not needs[1].any and bool(student[1]) and (foretold or is_one)
    if student[0][0].dtype == torch.float16 or (is_one_side(beta) and "jsd" in want):
        can = False
    if mode == "ahead" and needs[0].any and not can:
        raise ValueError(
            "mode='ahead' needs a frozen head and one differentiable fact, or a loss that knows "
            f"its rows' weights, a fixed target and no float16: got {', '.join(want)}"
        )
    ahead = can and mode != "recompute"
    known = []
    if ahead and shares is not None and foretold:
        counts = 1.0 if mask is None else mask.view(n_pairs, n_rows)
        dtype = accumulation_dtype(student[0][0].dtype)
        known = [shares[fact].to(dtype).reshape(n_pairs, n_rows) * counts for fact in want]
    widest = logits.shape[-1] if shard is None else max(shard.sizes)
    each = [
        (side[0][0], times * widest)
        for side, times in ((student, n_pairs), (teacher, 1))
        if side[1]
    ]
    least = sum(first.element_size() * numel for first, numel in each)
    step = slab_limit(least, each[0][0], budget)
    if shard is not None and compact and not capturing(each[0][0]):
        needed = [(need.any, *need.hidden) for need in needs]
        flags = None if mask is None else mask.to(torch.int64)
        caps = [side[3:] for side in (student, teacher)]
        how = (want, beta, probs, ahead, needed, mode, n_pairs, caps)
        check_alike(shard, n_pairs * n_rows, each[0][0], flags, None, how, step)
    tensors = [t for side in (student, teacher) for part in side[:2] for t in part]
    *outputs, _ = _head_pair_stats(
        *student, *teacher, mask, probs, " ".join(want), beta, step, compact,
        " ".join(want) if ahead else "", known, True, mode != "ahead", *of_operator(shard),
        *(needs[0] if ahead else needs[0].none()), choose(impl, *tensors),
    )  # fmt: skip
    return tuple(
        fact.view(rows) if name in want else fact
        for name, fact in zip((*STATES, *FACTS), outputs, strict=True)
    )


def _options(logits: Tensor, target: Tensor) -> tuple[str, bool, int | None]:
    """mode, compact and max_slab_bytes: the student's, the teacher's where it alone is a head."""
    heads = [getattr(side, "onepass_head", None) for side in (logits, target)]
    given = [head for head in heads if head is not None]
    budget = next((h.max_slab_bytes for h in given if h.max_slab_bytes is not None), None)
    return given[0].mode, all(h.compact for h in given), budget


def _as_side(logits: Tensor, rows: Sequence[int], shard: Shard | None) -> tuple[Any, ...]:
    """hidden, weight, bias, softcap, scale as the operators take them: of a side that is whole, the
    shard's columns."""
    head: Head | None = getattr(logits, "onepass_head", None)
    if head is None:
        logits = own_side(logits, shard)
        return [logits.reshape(*rows, logits.shape[-1])], [], None, *NO_CAP
    head.check_weights()
    hidden, weight, bias = list(head.hidden), list(head.weight), head.bias
    if shard is not None and head.shard is None:
        check_fixed(shard, *weight, *([] if bias is None else [bias]))
        hidden = [summed_gradient(t, shard.group) for t in hidden]
        weight = [shard.columns(w, dim=0) for w in weight]
        bias = shard.columns(bias)
    hidden = [t.reshape(*rows, t.shape[-1]) for t in hidden]
    return hidden, weight, bias, float(head.softcap), float(head.scale)
