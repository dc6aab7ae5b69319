"""vocab_stats: what a row of logits tells a loss, in one pass, with one backward for all of it.

In this order: the result type, the reference (the definition, and the CPU path), the Triton
launchers, the operator, its gradient, the public function.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._cap import NO_CAP, Cap
from ._check import (
    IGNORED,
    check_choice,
    check_floating,
    check_labels,
    check_logits,
    check_same_device,
    check_tokens,
    check_want,
    check_weights,
    values_checked,
)
from ._declare import declare
from ._dtensor import own_columns, own_rows
from ._launch import (
    IMPLS,
    Rows,
    accumulation_dtype,
    as_matrix,
    capturing,
    choose,
    dense_like,
    device_of,
    exponential,
    gradient_like,
    slabs,
    warps,
)
from ._merge import merged_stats
from ._shards import (
    ELSEWHERE,
    Shard,
    check_alike,
    check_differentiable_twice,
    of_operator,
)
from ._softmax import Exponentials, exponentials, sum_beside_one
from ._together import together


class VocabStats(NamedTuple):
    """Per-row facts of logits z [..., V], each of shape [...]; None where not asked for by `want`.

    With p = softmax(z), w = bag_weights (1 where none were given), natural logarithms:

        lse             log sum_v exp(z_v)
        label_logit     z at the label
        contrast_logit  z at the contrast label
        logp            log p at the label
        entropy         -sum_v p_v log p_v
        logit_sum       sum_v z_v
        logp_sum        sum_v w_v log p_v
        sum_sq_probs    log sum_v p_v^2
        bag_mass        sum_v w_v p_v
        argmax          first column of the largest logit, int64, not differentiable
    """

    lse: Tensor
    label_logit: Tensor
    contrast_logit: Tensor
    logp: Tensor
    entropy: Tensor
    logit_sum: Tensor
    logp_sum: Tensor
    sum_sq_probs: Tensor
    bag_mass: Tensor
    argmax: Tensor


FACTS = VocabStats._fields
NEEDS = {
    "label_logit": "labels",
    "logp": "labels",
    "contrast_logit": "contrast_labels",
    "bag_mass": "bag_weights",
}
KEPT = ("row_max", "row_rest", "logp", "entropy", "sum_sq_probs", "bag_mass")  # for the backward
COEFFICIENTS = (
    "on_p",
    "on_p_gap",
    "on_p_squared",
    "on_p_weight",
    "on_one",
    "on_weight",
    "at_label",
    "on_label",
    "on_contrast",
)


def vocab_stats_reference(
    logits: Tensor,  # [n, V]
    labels: Tensor | None,  # [n], within the vocabulary or ELSEWHERE
    contrast_labels: Tensor | None,  # [n], within the vocabulary or -100
    bag_weights: Tensor | None,  # [V]
    want: Sequence[str],
    made: Exponentials | None = None,  # the exponentials, where the caller has them
) -> dict[str, Tensor]:
    """The definition. `row_rest` sums exp(z - max) without the maximum: 1 + row_rest is the usual
    sum, but log1p(row_rest) and row_rest / (1 + row_rest) stay exact as one probability nears 1.
    """
    z = logits.to(accumulation_dtype(logits.dtype))
    top, gap, e, rest = exponentials(z, keeps_gap(want)) if made is None else made
    log_norm = rest.log1p()
    facts = {"row_max": top, "row_rest": rest}
    if "lse" in want:
        facts["lse"] = torch.where(top.isinf(), top, top + log_norm)
    if labels is not None and ("label_logit" in want or "logp" in want):
        facts["label_logit"] = at_column(z, labels)
        facts["logp"] = (facts["label_logit"] - top) - log_norm
    if contrast_labels is not None and "contrast_logit" in want:
        facts["contrast_logit"] = at_column(z, contrast_labels)
    if "entropy" in want:
        heat = torch.where(e > 0, gap, 0.0).mul_(e).sum(-1)
        facts["entropy"] = log_norm - heat / (1 + rest)
    if "logit_sum" in want:
        facts["logit_sum"] = z.sum(-1)
    if "logp_sum" in want:
        offsets = gap if bag_weights is None else weighted(bag_weights, gap)
        facts["logp_sum"] = offsets.sum(-1) - weight_sum(z.shape[-1], bag_weights) * log_norm
    if "sum_sq_probs" in want:
        facts["sum_sq_probs"] = sum_beside_one(e * e).log1p() - 2 * log_norm
    if bag_weights is not None and "bag_mass" in want:
        facts["bag_mass"] = (e * bag_weights).sum(-1) / (1 + rest)
    if "argmax" in want:
        facts["argmax"] = z.argmax(-1)
    return facts


def column_of(ids: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 1] each: the ids as columns, and which rows have one at all."""
    there = (ids != IGNORED) & (ids != ELSEWHERE)
    return torch.where(there, ids, 0)[:, None], there[:, None]


def at_column(z: Tensor, ids: Tensor) -> Tensor:
    """The logits [n] at the ids; 0 in rows without one."""
    column, there = column_of(ids)
    return torch.where(there, z.gather(-1, column), 0.0).squeeze(-1)


def keeps_gap(want: Sequence[str]) -> bool:
    """Whether a fact needs z - max beside its exponential."""
    return "entropy" in want or "logp_sum" in want


def weighted(bag_weights: Tensor, gap: Tensor) -> Tensor:
    """weights * gap, and 0 where the weight is 0 although the logit is -inf."""
    return torch.where(bag_weights == 0, 0.0, bag_weights * gap)


def weight_sum(vocab_size: int, bag_weights: Tensor | None) -> Tensor | float:
    """The sum of the vocabulary weights: V where there are none."""
    return float(vocab_size) if bag_weights is None else bag_weights.sum()


def row_coefficients(
    facts: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    total_weight: Tensor | float,
    has_weights: bool,
) -> dict[str, Tensor | None]:
    """The gradient of any mix of facts is p * (on_p + ...) + ...: these are its coefficients, one
    per row.

    dz = p (on_p + on_p_gap (z - max) + on_p_squared p + on_p_weight w) + on_one + on_weight w
         + on_label [v = label] + on_contrast [v = contrast label]
    and at the label p on_p gives way to at_label, in which nothing cancels as p nears 1.
    """
    out: dict[str, Tensor | None] = dict.fromkeys(COEFFICIENTS)

    def add(name: str, value: Tensor) -> None:
        held = out[name]
        out[name] = value if held is None else held + value

    for fact, grad in grads.items():
        if fact == "lse":
            add("on_p", grad)
        elif fact == "entropy":
            # dH/dz = -p (log p + H) = -p ((z - max) + H - log1p(rest)): nothing cancels at the
            # maximum.
            add("on_p", -grad * (facts["entropy"] - torch.log1p(facts["row_rest"])))
            add("on_p_gap", -grad)
        elif fact == "sum_sq_probs":
            add("on_p", -2 * grad)
            add("on_p_squared", 2 * grad * torch.exp(-facts["sum_sq_probs"]))
        elif fact == "bag_mass":
            add("on_p", -grad * facts["bag_mass"])
            add("on_p_weight", grad)
        elif fact == "logp_sum":
            add("on_p", -grad * total_weight)
            add("on_weight" if has_weights else "on_one", grad)
        elif fact == "logit_sum":
            add("on_one", grad)
        elif fact != "logp":
            add("on_label" if fact == "label_logit" else "on_contrast", grad)
    if "logp" in grads:
        logp, grad, others = facts["logp"], grads["logp"], out["on_p"]
        # The label's own share of the gradient is 1 - p = -expm1(logp), never p - 1 rounded.
        own = -grad * torch.expm1(logp)
        out["at_label"] = own if others is None else own + logp.exp() * others
        add("on_p", -grad)
    return out


def vocab_stats_backward_reference(
    logits: Tensor,  # [n, V]
    labels: Any,  # [n] or None, as the coefficients need it
    contrast_labels: Any,  # [n] or None
    bag_weights: Any,  # [V] or None
    row_max: Tensor,  # [n]
    row_rest: Tensor,  # [n]
    coefficients: dict[str, Tensor | None],  # each [n] or None
) -> Tensor:
    """dlogits [n, V] from the rows' coefficients, in the accumulation dtype."""
    z = logits.to(row_max.dtype)
    gap = z - row_max[:, None]
    scale = 1 / (1 + row_rest)
    e = gap.exp()
    c: dict[str, Any] = {
        name: None if value is None else value[:, None] for name, value in coefficients.items()
    }
    dz = torch.zeros_like(e) if c["on_p"] is None else e * (scale[:, None] * c["on_p"])
    if labels is not None:
        column, there = column_of(labels)
    if c["at_label"] is not None:
        dz = dz.scatter(-1, column, torch.where(there, c["at_label"], dz.gather(-1, column)))
    if any(c[name] is not None for name in ("on_p_gap", "on_p_squared", "on_p_weight")):
        p = e * scale[:, None]
    if c["on_p_gap"] is not None:
        dz = dz + p * torch.where(p > 0, gap, 0.0) * c["on_p_gap"]
    if c["on_p_squared"] is not None:
        dz = dz + p * p * c["on_p_squared"]
    if c["on_p_weight"] is not None:
        dz = dz + bag_weights * (p * c["on_p_weight"])
    if c["on_weight"] is not None:
        dz = dz + bag_weights * c["on_weight"]
    if c["on_one"] is not None:
        dz = dz + c["on_one"]
    if c["on_label"] is not None:
        dz = dz.scatter_add(-1, column, torch.where(there, c["on_label"], 0.0))
    if c["on_contrast"] is not None:
        column, there = column_of(contrast_labels)
        dz = dz.scatter_add(-1, column, torch.where(there, c["on_contrast"], 0.0))
    return dz


def softmax_gradient(
    e: Tensor,  # [n, V] exp(z - max), float32 or float64; overwritten where `out` is None
    labels: Any,  # [n] or None
    row_rest: Tensor,  # [n]
    coefficients: dict[str, Any],
    out: Tensor | None = None,  # [n, V] in the dtype of e
) -> Tensor:
    """The reference's gradient for on_p and at_label alone, which is all that a cross-entropy has:
    the same arithmetic in one piece of memory, half the time on a CPU."""
    share = (1 / (1 + row_rest) * coefficients["on_p"])[:, None]
    dz = torch.mul(e, share, out=e if out is None else out)
    if coefficients["at_label"] is not None:
        column, there = column_of(labels)
        own = torch.where(there, coefficients["at_label"][:, None], dz.gather(-1, column))
        dz.scatter_(-1, column, own)
    return dz


def is_softmax(coefficients: Mapping[str, Tensor | None]) -> bool:
    """Whether softmax_gradient serves these coefficients."""
    given = {name for name, value in coefficients.items() if value is not None}
    return given in ({"on_p"}, {"on_p", "at_label"})


def kept_rows(labels: Tensor | None) -> Tensor | None:
    """Indices of the rows that count; None where all do."""
    if labels is None:
        return None
    kept = (labels != IGNORED).nonzero().squeeze(-1)  # one wait for a GPU
    return None if kept.shape == labels.shape else kept


def pick(tensor: Tensor | None, rows: Any) -> Tensor | None:
    """tensor[rows], for a tensor that may be absent."""
    return None if tensor is None else tensor[rows]


def _forward_torch(
    logits: Tensor,  # [N, V]
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    want: Sequence[str],
    out: dict[str, Tensor],
    cap: Cap = NO_CAP,
) -> None:
    kept = kept_rows(labels)
    n_rows = logits.shape[0] if kept is None else kept.shape[0]
    for slab in slabs(n_rows, logits.shape[-1]):
        rows = slab if kept is None else kept[slab]
        z = cap.logits(logits[rows])
        facts = vocab_stats_reference(
            z, pick(labels, rows), pick(contrast_labels, rows), bag_weights, want
        )
        for name, target in out.items():
            target[rows] = facts[name]


def _backward_torch(
    dlogits: Tensor,  # [N, V]
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    row_max: Tensor,
    row_rest: Tensor,
    coefficients: dict[str, Tensor | None],
    cap: Cap = NO_CAP,
) -> None:
    kept = kept_rows(labels)
    if kept is not None:
        dlogits.zero_()
    of_softmax = cap.is_none and is_softmax(coefficients)
    in_place = of_softmax and kept is None and dlogits.dtype == row_max.dtype
    n_rows = logits.shape[0] if kept is None else kept.shape[0]
    for slab in slabs(n_rows, logits.shape[-1]):
        rows = slab if kept is None else kept[slab]
        z, ids, top, rest = logits[rows], pick(labels, rows), row_max[rows], row_rest[rows]
        c = {name: pick(value, rows) for name, value in coefficients.items()}
        if of_softmax:
            dz = z.to(row_max.dtype)
            dz = torch.sub(dz, top[:, None], out=dlogits[rows] if in_place else dz).exp_()
            softmax_gradient(dz, ids, rest, c)
        else:
            others = (pick(contrast_labels, rows), bag_weights)
            dz = vocab_stats_backward_reference(cap.logits(z), ids, *others, top, rest, c)
            dz = cap.gradient(dz, z)
        if not (of_softmax and in_place):
            dlogits[rows] = dz.to(dlogits.dtype)
        del dz  # or the next slab's is made beside it


SEGMENT = 16384  # columns a program reads: fixed, so that a row's sums do not depend on the batch
THREADS = 256
# A pass that keeps a state for each of its lanes is fastest with few of them: a load a thread, and
# many small programs to hide each other's loads (H200, bf16: 0.59 ms where 256 threads of two loads
# take 1.14, and reading alone 0.49).
FORWARD_THREADS = 128


def _block(vocab_size: int, element_size: int, threads: int, loads: int) -> int:
    """Columns per loop turn: so many 16-byte loads for each thread; less for a short row."""
    import triton

    full = loads * (16 // element_size) * threads
    return min(full, max(128, triton.next_power_of_2(vocab_size + 16)))


def _forward_triton(
    logits: Tensor,  # [N, V] or [B, S, V]
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    out: dict[str, Tensor],
    cap: Cap = NO_CAP,
) -> None:
    import triton

    from ..kernels.vocab_stats import vocab_stats_kernel, vocab_stats_merge_kernel

    vocab_size = logits.shape[-1]
    rows = Rows.of(logits)
    n_segments = triton.cdiv(vocab_size + rows.vec, SEGMENT)
    shape = (rows.n_rows, n_segments)

    def partial(wanted: bool, dtype: torch.dtype = torch.float32) -> Tensor | None:
        return torch.empty(shape, dtype=dtype, device=logits.device) if wanted else None

    states = (
        partial(True),
        partial(True),
        partial("argmax" in out, torch.int32),
        partial("entropy" in out),
        partial("sum_sq_probs" in out),
        partial("logit_sum" in out),
        partial("bag_mass" in out),
        partial("logp_sum" in out),
        partial("logp_sum" in out),
    )
    steps = (rows.inner_size, rows.outer_stride, rows.inner_stride, rows.base_shift)
    where = (vocab_size, *steps, *cap.for_kernels)
    with device_of(logits):
        vocab_stats_kernel[shape](
            rows.base,
            labels,
            bag_weights,
            *states,
            *where,
            EXP=exponential(logits),
            VEC=rows.vec,
            SEGMENT=SEGMENT,
            BLOCK=_block(vocab_size, logits.element_size(), FORWARD_THREADS, loads=1),
            num_warps=warps(FORWARD_THREADS, logits),
        )
        vocab_stats_merge_kernel[(rows.n_rows,)](
            rows.base,
            labels,
            contrast_labels,
            bag_weights,
            *states,
            out["row_max"],
            out["row_rest"],
            *(out.get(fact) for fact in FACTS),
            n_segments,
            *where,
            VEC=rows.vec,
            LANES=triton.next_power_of_2(n_segments + 2 * rows.vec),
            num_warps=1,
        )


def _backward_triton(
    dlogits: Tensor,  # of the shape of logits
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    row_max: Tensor,
    row_rest: Tensor,
    coefficients: dict[str, Tensor | None],
    cap: Cap = NO_CAP,
) -> None:
    import triton

    from ..kernels.vocab_stats import vocab_stats_backward_kernel

    vocab_size = logits.shape[-1]
    rows, out = Rows.of(logits), Rows.of(dlogits)
    with device_of(logits):
        vocab_stats_backward_kernel[(rows.n_rows, triton.cdiv(vocab_size + rows.vec, SEGMENT))](
            out.base,
            rows.base,
            labels,
            contrast_labels,
            bag_weights,
            row_max,
            row_rest,
            *(coefficients[name] for name in COEFFICIENTS),
            vocab_size,
            rows.inner_size,
            out.outer_stride,
            out.inner_stride,
            out.base_shift,
            rows.outer_stride,
            rows.inner_stride,
            rows.base_shift,
            *cap.for_kernels,
            EXP=exponential(logits),
            VEC=rows.vec,
            SAME_SHIFT=rows.same_shift(out),
            SEGMENT=SEGMENT,
            BLOCK=_block(vocab_size, logits.element_size(), THREADS, loads=2),
            num_warps=warps(THREADS, logits),
        )


def _empty_facts(logits: Tensor, want: Sequence[str], triton: bool) -> dict[str, Tensor]:
    """Room for the facts: the kernels write all of it, the torch path only rows that count."""
    dtype = accumulation_dtype(logits.dtype)
    names = ("row_max", "row_rest", *(fact for fact in FACTS if fact in want))
    room = torch.empty if triton else torch.zeros
    return {
        name: room(
            logits.shape[:-1],
            dtype=torch.int64 if name == "argmax" else dtype,
            device=logits.device,
        )
        for name in names
    }


def _as_outputs(logits: Tensor, facts: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """All outputs of the operator; those that nobody wants are empty."""
    absent = accumulation_dtype(logits.dtype)
    return tuple(
        facts[name] if name in facts else logits.new_empty(0, dtype=absent)
        for name in ("row_max", "row_rest", *FACTS)
    )


def of_shard(want: Sequence[str]) -> list[str]:
    """What a shard's own pass is asked for, so that `across_shards` can tell what is wanted."""
    own = ("label_logit" if fact == "logp" else fact for fact in want if fact != "lse")
    return list(dict.fromkeys(own))


def no_columns(facts: Mapping[str, Tensor]) -> None:
    """Fills in the facts of a shard that holds no column."""
    for name, values in facts.items():
        values.fill_(-torch.inf if name == "row_max" else 0)


def across_shards(
    found: Mapping[str, Tensor],  # [n] each, of this rank's columns: `of_shard`
    shard: Shard,
    want: Sequence[str],
    labels: Tensor | None,  # [n]; of rows labelled -100 all facts are 0
    bag_weights: Tensor | None,  # of all columns
) -> dict[str, Tensor]:
    """The facts of whole rows."""
    parts = dict(found)
    if "argmax" in parts:
        parts["argmax"] = parts["argmax"] + shard.offset
    if "logp_sum" in parts:
        weight = weight_sum(shard.size, shard.columns(bag_weights))
        parts["weight"] = torch.zeros_like(parts["row_max"]) + weight
    merged = merged_stats(shard.gather(parts), want)
    if labels is None:
        return merged
    return {name: torch.where(labels == IGNORED, 0, fact) for name, fact in merged.items()}


def _forward(
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    want: Sequence[str],
    group: str,  # whose ranks hold the other columns; "": there are none
    sizes: Sequence[int],  # columns of each rank
    triton: bool,
) -> tuple[Tensor, ...]:
    shard = Shard.of(group, sizes)
    own, ids, weights = want, (labels, contrast_labels), bag_weights
    if shard is not None:
        own, ids, weights = of_shard(want), shard.ids(*ids), shard.columns(bag_weights)
    facts = _empty_facts(logits, own, triton)
    if not facts["row_max"].numel():
        return _as_outputs(logits, _empty_facts(logits, want, triton))
    if values_checked(logits):
        vocab_size = logits.shape[-1] if shard is None else shard.vocab_size
        for name, given in (("labels", labels), ("contrast_labels", contrast_labels)):
            if given is not None:
                check_labels(name, given.view(logits.shape[:-1]), vocab_size)
    flat = {name: fact.view(-1) for name, fact in facts.items()}
    if not logits.shape[-1]:
        no_columns(flat)
    elif triton:
        _forward_triton(as_matrix(logits), *ids, weights, flat)
    else:
        _forward_torch(logits.reshape(-1, logits.shape[-1]), *ids, weights, own, flat)
    if shard is not None:
        merged = across_shards(flat, shard, want, labels, bag_weights)
        facts = {name: fact.view(logits.shape[:-1]) for name, fact in merged.items()}
    return _as_outputs(logits, facts)


def _forward_fake(
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    want: Sequence[str],
    *rest: Any,
) -> tuple[Tensor, ...]:
    return _as_outputs(logits, _empty_facts(logits, want, rest[-1]))


def _empty_gradient(logits: Tensor, triton: bool) -> Tensor:
    """Uninitialised; every path writes all of it."""
    return gradient_like(as_matrix(logits)).view(logits.shape) if triton else dense_like(logits)


def _backward_op(
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    row_max: Tensor,
    row_rest: Tensor,
    *rest: Any,
) -> Tensor:
    triton = rest[-1]
    coefficients = dict(zip(COEFFICIENTS, rest[:-1], strict=True))
    dlogits = _empty_gradient(logits, triton)
    if dlogits.numel():
        args = (labels, contrast_labels, bag_weights, row_max, row_rest, coefficients)
        if triton:
            _backward_triton(as_matrix(dlogits), as_matrix(logits), *args)
        else:
            flat = dlogits.view(-1, logits.shape[-1])
            _backward_torch(flat, logits.reshape(-1, logits.shape[-1]), *args)
    return dlogits


def _backward_fake(logits: Tensor, *rest: Any) -> Tensor:
    return _empty_gradient(logits, rest[-1])


_vocab_stats_backward = declare(
    "vocab_stats_backward(Tensor logits, Tensor? labels, Tensor? contrast_labels, "
    "Tensor? bag_weights, Tensor row_max, Tensor row_rest, "
    + ", ".join(f"Tensor? {name}" for name in COEFFICIENTS)
    + ", bool triton) -> Tensor",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, contrast_labels, bag_weights, want, group, sizes, triton = inputs
    facts = dict(zip(("row_max", "row_rest", *FACTS), output, strict=True))
    ctx.save_for_backward(
        logits,
        labels,
        contrast_labels,
        bag_weights,
        *(facts[name] for name in KEPT),
    )
    ctx.want, ctx.shard, ctx.triton = want, Shard.of(group, sizes), triton
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, labels, contrast_labels, bag_weights, *saved = ctx.saved_tensors
    grads = {
        fact: grad.reshape(-1).contiguous()
        for fact, grad in zip(FACTS, upstream[2:], strict=True)
        if grad is not None and fact in ctx.want and fact != "argmax"
    }
    shard, vocab_size = ctx.shard, logits.shape[-1]
    nothing = (None,) * 7
    if not grads:
        return (None, *nothing)
    if torch.is_grad_enabled():
        check_differentiable_twice(shard)
        dlogits = _twice_differentiable(logits, labels, contrast_labels, bag_weights, grads)
        return (dlogits, *nothing)
    facts = {name: fact.reshape(-1) for name, fact in zip(KEPT, saved, strict=True)}
    ids, weights = (labels, contrast_labels), bag_weights
    if shard is not None:
        ids, weights, vocab_size = shard.ids(*ids), shard.columns(weights), shard.vocab_size
    total = weight_sum(vocab_size, bag_weights)
    coefficients = row_coefficients(facts, grads, total, bag_weights is not None)
    dlogits = _vocab_stats_backward(
        logits,
        *ids,
        weights,
        facts["row_max"],
        facts["row_rest"],
        *coefficients.values(),
        ctx.triton,
    )
    return (dlogits, *nothing)


def _twice_differentiable(
    logits: Tensor,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    grads: dict[str, Tensor],
) -> Tensor:
    """The same gradient in torch operations that autograd can follow, for create_graph=True."""
    flat = logits.reshape(-1, logits.shape[-1])
    kept = kept_rows(labels)
    rows: Any = slice(None) if kept is None else kept
    picked = (flat[rows], pick(labels, rows), pick(contrast_labels, rows), bag_weights)
    facts = vocab_stats_reference(*picked, want=tuple(grads))
    coefficients = row_coefficients(
        facts,
        {fact: grad[rows] for fact, grad in grads.items()},
        weight_sum(logits.shape[-1], bag_weights),
        bag_weights is not None,
    )
    dz = vocab_stats_backward_reference(*picked, facts["row_max"], facts["row_rest"], coefficients)
    dz = dz.to(logits.dtype)
    if kept is not None:
        dz = torch.zeros_like(flat).index_copy(0, kept, dz)
    return dz.view(logits.shape)


_vocab_stats = declare(
    "vocab_stats(Tensor logits, Tensor? labels, Tensor? contrast_labels, Tensor? bag_weights, "
    "str[] want, str group, int[] sizes, bool triton) -> (Tensor row_max, Tensor row_rest, "
    + ", ".join(f"Tensor {fact}" for fact in FACTS)
    + ")",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def label_rows(name: str, labels: Tensor, logits: Tensor) -> Tensor:
    """Labels as int64 [N], after checking that they fit the logits."""
    check_tokens(name, labels, logits)
    return labels.to(torch.int64).reshape(-1).contiguous()


def mask_rows(mask: Tensor, logits: Tensor) -> Tensor:
    """A mask as bool [N] (nonzero counts), after checking that it fits."""
    check_weights("mask", mask, logits.shape[:-1])
    check_same_device("mask", mask, "the rows", logits)
    return (mask != 0).reshape(-1)


@together
def vocab_stats(
    logits: Tensor,
    labels: Tensor | None = None,
    *,
    contrast_labels: Tensor | None = None,
    bag_weights: Tensor | None = None,
    mask: Tensor | None = None,
    want: Sequence[str] | None = None,
    shares: Mapping[str, Tensor] | None = None,
    gradient_of: Sequence[str] | None = None,
    impl: str = "auto",
) -> VocabStats:
    """Per-row statistics of `logits`, shape `logits.shape[:-1]`, in one pass over the vocabulary.

    Args:
        logits: [..., V] float32, bfloat16, float16 (float64 through the torch path), any strides;
            or `onepass.LazyLogits`. A DTensor in shards of V (loss_parallel's) is not gathered.
        labels: [...] integer token ids for `logp` and `label_logit`; a row labelled -100 is not
            read: all its facts are 0 and so is its gradient.
        contrast_labels: [...] a second id per row, for `contrast_logit` (-100: 0 there).
        bag_weights: [V] weights of the vocabulary for `bag_mass` and `logp_sum`, without gradient.
        mask: [...] rows that count (nonzero); others are treated as labelled -100.
        want: names of VocabStats fields; by default ("lse",), or ("lse", "logp") with labels.
        shares: for LazyLogits, of every wanted fact the weights [...] that its upstream gradient
            will be one common multiple of, where a loss knows them: then the gradients of a head
            that is trained, too, are made in the forward.
        gradient_of: for LazyLogits, the wanted facts that will be differentiated, where the caller
            knows (default: all): a frozen head's gradient is made in the forward where that is one.
            Another's comes all the same, at the price of the logits once more.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        VocabStats with the wanted fields, float32 (float64 for float64 logits); all but `argmax`
        are differentiable, and one backward kernel serves any mix of upstream gradients.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or options that do not fit.
        IndexError: a label outside the vocabulary. On a GPU only with ONEPASS_STRICT=1, since the
            check has to wait for the device; without it the row's facts become NaN.

    Formula: logp = (z_y - m) - log1p(r), entropy = log1p(r) - sum_v e_v (z_v - m) / (1 + r),
    with m = max z, e = exp(z - m) and r = sum of e without the maximal element.
    """
    check_logits(logits)
    labels, contrast_labels, mask = (own_rows(t, logits) for t in (labels, contrast_labels, mask))
    if want is None:
        want = ("lse",) if labels is None else ("lse", "logp")
    want = check_want(want, FACTS)
    check_choice("impl", impl, IMPLS)
    if gradient_of is not None and not set(gradient_of) <= set(want):
        raise ValueError(
            f"gradient_of must name wanted facts, {', '.join(want)}: got {gradient_of}"
        )
    given = {"labels": labels, "contrast_labels": contrast_labels, "bag_weights": bag_weights}
    for fact in want:
        if fact in NEEDS and given[NEEDS[fact]] is None:
            raise ValueError(f"want={fact!r} needs {NEEDS[fact]}")
    if labels is not None:
        labels = label_rows("labels", labels, logits)
    if mask is not None:
        counts = mask_rows(mask, logits)
        labels = torch.where(counts, 0 if labels is None else labels, IGNORED)
    if contrast_labels is not None:
        contrast_labels = label_rows("contrast_labels", contrast_labels, logits)
    if bag_weights is not None:
        check_floating("bag_weights", bag_weights)
        check_weights("bag_weights", bag_weights, logits.shape[-1:])
        check_same_device("bag_weights", bag_weights, "logits", logits)
        if bag_weights.requires_grad:
            raise ValueError("bag_weights is not differentiated: pass bag_weights.detach()")
        bag_weights = bag_weights.to(accumulation_dtype(logits.dtype)).contiguous()
    given_rows = (labels, contrast_labels, bag_weights, list(want))
    head = getattr(logits, "onepass_head", None)
    if head is not None:
        from .head import head_stats

        foretold = None
        if shares is not None:
            facts = accumulation_dtype(logits.dtype)
            foretold = {
                name: share.detach().to(facts).expand(logits.shape[:-1]).reshape(-1)
                for name, share in shares.items()
            }
        outputs = head_stats(head, *given_rows, impl, foretold, gradient_of)
    else:
        logits, shard = own_columns("logits", logits)
        if shard is not None and not capturing(logits):
            n_rows = logits.shape[:-1].numel()
            check_alike(shard, n_rows, logits, labels, bag_weights, want)
        outputs = _vocab_stats(logits, *given_rows, *of_operator(shard), choose(impl, logits))
    fields = dict(zip(FACTS, outputs[2:], strict=True))
    wanted: Any = {fact: fields[fact] if fact in want else None for fact in FACTS}
    return VocabStats(**wanted)
