"""head_stats: what vocab_stats tells of logits that are never whole: hidden states times a head.

A slab of rows at a time: the vendor's matrix product, then the kernels of vocab_stats in place;
rows that do not count are left out before. A frozen head's one differentiable fact has its gradient
made in the forward and scaled in the backward; else the backward makes the logits again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import IGNORED
from ._declare import declare
from ._launch import GPU_TYPES, accumulation_dtype, capturing, choose
from .vocab_stats import (
    COEFFICIENTS,
    FACTS,
    KEPT,
    _as_outputs,
    _backward_torch,
    _backward_triton,
    _empty_facts,
    _forward_torch,
    _forward_triton,
    kept_rows,
    pick,
    row_coefficients,
    vocab_stats_backward_reference,
    vocab_stats_reference,
    weight_sum,
)

SLAB_BYTES_ON_GPU = 1 << 29
SLAB_BYTES_ON_CPU = 1 << 26


class Head(NamedTuple):
    """scale * cap(sum_k hidden_k weight_k^T + bias), cap(u) = softcap tanh(u / softcap): logits
    [..., V] by what they are made of."""

    hidden: tuple[Tensor, ...]  # [..., D_k] each
    weight: tuple[Tensor, ...]  # [V, D_k] each
    bias: Tensor | None = None  # [V]
    softcap: float = 0.0  # 0: none
    scale: float = 1.0
    max_slab_bytes: int | None = None

    def logits(self) -> Tensor:
        """The logits themselves, [..., V]: the definition."""
        rows = [states.reshape(-1, states.shape[-1]) for states in self.hidden]
        product = head_product(rows, self.weight, self.bias)
        whole = capped(product, self.softcap, self.scale)
        return whole.view(*self.hidden[0].shape[:-1], whole.shape[-1])


def head_product(
    hidden: Sequence[Tensor],  # [n, D_k] each
    weight: Sequence[Tensor],  # [V, D_k] each
    bias: Tensor | None,  # [V]
    room: Tensor | None = None,  # [n, V] to write to
) -> Tensor:
    """sum_k hidden_k weight_k^T + bias, [n, V]: the definition, where no `room` is given."""
    product = torch.mm(hidden[0], weight[0].T, out=room)
    for states, matrix in zip(hidden[1:], weight[1:], strict=True):
        product = torch.addmm(product, states, matrix.T, out=room)
    if bias is not None:
        product = torch.add(product, bias, out=room)
    return product


def capped(u: Tensor, softcap: float, scale: float) -> Tensor:
    """scale * softcap * tanh(u / softcap); a softcap of 0 is none."""
    if softcap == 0:
        return u if scale == 1 else u * scale
    return torch.tanh(u / softcap) * (softcap * scale)


def cap_slope(u: Tensor, softcap: float, scale: float) -> Tensor:
    """Its derivative, as 4 e / (1 + e)^2 with e = exp(-2 |u / softcap|): 1 - tanh^2 would be 0 long
    before a capped logit stops to move."""
    e = torch.exp(u.to(accumulation_dtype(u.dtype)).abs() * (-2 / softcap))
    return scale * 4 * e / (1 + e).square()


def slab_rows(vocab_size: int, logits: Tensor, max_slab_bytes: int | None) -> int:
    """Rows whose logits fit into so many bytes."""
    limit = max_slab_bytes
    if limit is None:
        limit = SLAB_BYTES_ON_GPU if logits.device.type in GPU_TYPES else SLAB_BYTES_ON_CPU
    least = vocab_size * logits.element_size()
    if limit < least:
        raise ValueError(
            f"max_slab_bytes must hold one row of logits, {least} bytes: got {max_slab_bytes}"
        )
    return limit // least


class Slabs:
    """The rows that count, a slab at a time, with the memory that all slabs share."""

    def __init__(
        self,
        hidden: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        softcap: float,
        scale: float,
        ids: Sequence[Tensor | None],  # labels and contrast labels, [N] each
        n_rows: int,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.scale = softcap, scale
        self.ids = ids
        # Leaving rows out waits for the device once; a graph's capture cannot, and zeroes them.
        self.blind = capturing(hidden[0]) and ids[0] is not None
        self.kept = None if self.blind else kept_rows(ids[0])
        self.total = hidden[0].shape[0] if self.kept is None else self.kept.shape[0]
        self.step = min(n_rows, max(1, self.total))
        self.room = self._room()

    def _room(self) -> Tensor:
        """[step, V]; on a GPU with rows that start at 16 bytes, whatever V is."""
        first, vocab_size = self.hidden[0], self.weight[0].shape[0]
        width = 16 // first.element_size() if first.device.type in GPU_TYPES else 1
        stride = -(-vocab_size // width) * width
        room = first.new_empty(self.step, stride)
        room[:, vocab_size:] = 0  # a GEMM may multiply what lies there by zero
        return room[:, :vocab_size]

    def __iter__(self) -> Iterator[tuple[Any, list[Tensor], Tensor, Tensor]]:
        """(rows, their hidden states, u, logits); u is the logits' memory where nothing caps."""
        for start in range(0, self.total, self.step):
            rows: Any = slice(start, min(start + self.step, self.total))
            n = rows.stop - start
            if self.kept is not None:
                rows = self.kept[rows]
            hidden = [states[rows] for states in self.hidden]
            labels = self.ids[0]
            if self.blind and labels is not None:
                counts = (labels[rows] != IGNORED)[:, None]
                hidden = [torch.where(counts, states, 0.0) for states in hidden]
            u = head_product(hidden, self.weight, self.bias, self.room[:n])
            yield rows, hidden, u, capped(u, self.softcap, self.scale)

    def gradient(
        self,
        rows: Any,
        u: Tensor,
        logits: Tensor,
        bag_weights: Tensor | None,
        row_max: Tensor,
        row_rest: Tensor,
        coefficients: dict[str, Tensor | None],
        triton: bool,
    ) -> Tensor:
        """The gradient with respect to u, in the place of the logits."""
        labels, contrast = (pick(t, rows) for t in self.ids)
        run = _backward_triton if triton else _backward_torch
        run(logits, logits, labels, contrast, bag_weights, row_max, row_rest, coefficients)
        if self.softcap:
            return logits * cap_slope(u, self.softcap, self.scale).to(logits.dtype)
        return logits if self.scale == 1 else logits.mul_(self.scale)


def _forward(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    softcap: float,
    scale: float,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    want: list[str],
    n_rows: int,
    with_gradient: str,
    triton: bool,
) -> tuple[Any, ...]:
    facts = _empty_facts(hidden[0], want, False)
    units = _empty_units(hidden, with_gradient)
    if facts["row_max"].numel():
        ids = (labels, contrast_labels)
        slabs = Slabs(hidden, weight, bias, softcap, scale, ids, n_rows)
        for unit in units:
            if slabs.kept is not None:
                unit.zero_()
        total = weight_sum(slabs.room, bag_weights)
        for rows, _, u, logits in slabs:
            labels_, contrast = (pick(t, rows) for t in ids)
            found = _empty_facts(logits, want, triton)
            if triton:
                _forward_triton(logits, labels_, contrast, bag_weights, found)
            else:
                _forward_torch(logits, labels_, contrast, bag_weights, want, found)
            for name, values in found.items():
                facts[name][rows] = values
            if with_gradient:
                grads = {with_gradient: torch.ones_like(found["row_max"])}
                c = row_coefficients(found, grads, total, bag_weights is not None)
                state = (found["row_max"], found["row_rest"], c, triton)
                du = slabs.gradient(rows, u, logits, bag_weights, *state)
                for unit, matrix in zip(units, weight, strict=True):
                    unit[rows] = (du @ matrix).to(unit.dtype)
    return (*_as_outputs(hidden[0], facts), units)


def _empty_units(hidden: list[Tensor], with_gradient: str) -> list[Tensor]:
    """Room for the hidden states' gradients of one fact; none where none is made ahead."""
    return [torch.empty_like(t) for t in hidden] if with_gradient else []


def _forward_fake(hidden: list[Tensor], *rest: Any) -> tuple[Any, ...]:
    want, with_gradient = rest[7], rest[9]
    facts = _as_outputs(hidden[0], _empty_facts(hidden[0], want, True))
    return (*facts, _empty_units(hidden, with_gradient))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in the dtype of `total`: fp32 whatever a and b are."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a @ b


def _backward_op(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    softcap: float,
    scale: float,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    row_max: Tensor,
    row_rest: Tensor,
    *rest: Any,
) -> list[Tensor]:
    *values, n_rows, need_hidden, need_weight, need_bias, triton = rest
    grads = _empty_gradients(hidden, weight, bias, need_hidden, need_weight, need_bias)
    d_hidden = grads[: len(hidden) if need_hidden else 0]
    d_weight = [
        torch.zeros_like(t, dtype=accumulation_dtype(t.dtype)) for t in weight if need_weight
    ]
    d_bias = None
    if need_bias and bias is not None:
        d_bias = torch.zeros_like(bias, dtype=accumulation_dtype(bias.dtype))
    if row_max.numel():
        slabs = Slabs(hidden, weight, bias, softcap, scale, (labels, contrast_labels), n_rows)
        if slabs.kept is not None:
            for grad in d_hidden:
                grad.zero_()
        for rows, states, u, logits in slabs:
            c = {name: pick(value, rows) for name, value in zip(COEFFICIENTS, values, strict=True)}
            state = (row_max[rows], row_rest[rows], c, triton)
            du = slabs.gradient(rows, u, logits, bag_weights, *state)
            for grad, matrix in zip(d_hidden, weight, strict=False):
                grad[rows] = du @ matrix
            for total, part in zip(d_weight, states, strict=False):
                add_product(total, du.T, part)
            if d_bias is not None:
                d_bias += du.sum(0, dtype=d_bias.dtype)
    summed = [*d_weight, *([] if d_bias is None else [d_bias])]
    for grad, total in zip(grads[len(d_hidden) :], summed, strict=True):
        grad.copy_(total)
    return grads


def _empty_gradients(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> list[Tensor]:
    """Uninitialised gradients: those of the hidden states, the weights, the bias, as needed."""
    wanted = [*(hidden if need_hidden else []), *(weight if need_weight else [])]
    if need_bias and bias is not None:
        wanted.append(bias)
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in wanted]


def _backward_fake(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    return _empty_gradients(hidden, weight, bias, *rest[-4:-1])


_OF_HEAD = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, float softcap, float scale, "
    "Tensor? labels, Tensor? contrast_labels, Tensor? bag_weights, "
)

_head_stats_backward = declare(
    f"head_stats_backward({_OF_HEAD} Tensor row_max, Tensor row_rest, "
    + ", ".join(f"Tensor? {name}" for name in COEFFICIENTS)
    + ", int n_rows, bool need_hidden, bool need_weight, bool need_bias, bool triton) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, softcap, scale, labels, contrast, bag, want, n_rows, ahead, triton = (
        inputs
    )
    *facts, units = output
    saved = dict(zip(("row_max", "row_rest", *FACTS), facts, strict=True))
    ctx.save_for_backward(
        *hidden, *weight, *units, bias, labels, contrast, bag, *(saved[name] for name in KEPT)
    )
    ctx.n_terms, ctx.options = len(hidden), (softcap, scale, want, n_rows, ahead, triton)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    softcap, scale, want, n_rows, ahead, triton = ctx.options
    n, nothing = ctx.n_terms, (None,) * 9
    grads = {
        fact: grad.contiguous()
        for fact, grad in zip(FACTS, upstream[2:-1], strict=True)
        if grad is not None and fact in want and fact != "argmax"
    }
    none = [None] * n
    if not grads:
        return (none, none, None, *nothing)
    saved = list(ctx.saved_tensors)
    hidden, weight = saved[:n], saved[n : 2 * n]
    units, rest = (saved[2 * n : 3 * n], saved[3 * n :]) if ahead else ([], saved[2 * n :])
    bias, labels, contrast, bag, *kept = rest
    need_hidden, need_weight = (any(need) for need in ctx.needs_input_grad[:2])
    need_bias = ctx.needs_input_grad[2]
    if torch.is_grad_enabled():
        found = _twice_differentiable(
            hidden, weight, bias, softcap, scale, labels, contrast, bag, grads
        )
        d_hidden, d_weight, d_bias = found
    elif set(grads) == {ahead}:
        column = grads[ahead][:, None]
        d_hidden, d_weight, d_bias = [(column * unit).to(unit.dtype) for unit in units], none, None
    else:
        facts = dict(zip(KEPT, kept, strict=True))
        total = bag.sum() if bag is not None else float(weight[0].shape[0])
        c = row_coefficients(facts, grads, total, bag is not None)
        out = _head_stats_backward(
            hidden, weight, bias, softcap, scale, labels, contrast, bag,
            facts["row_max"], facts["row_rest"], *c.values(),
            n_rows, need_hidden, need_weight, need_bias, triton,
        )  # fmt: skip
        d_hidden, out = (out[:n], out[n:]) if need_hidden else (none, out)
        d_weight, out = (out[:n], out[n:]) if need_weight else (none, out)
        d_bias = out[0] if out else None
    return (
        d_hidden if need_hidden else none,
        d_weight if need_weight else none,
        d_bias if need_bias else None,
        *nothing,
    )


def _twice_differentiable(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    softcap: float,
    scale: float,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    grads: dict[str, Tensor],
) -> tuple[list[Any], list[Any], Any]:
    """The same gradients in torch operations that autograd can follow, for create_graph=True; with
    whole logits."""
    kept = kept_rows(labels)
    rows: Any = slice(None) if kept is None else kept
    states = [t[rows] for t in hidden]
    u = head_product(states, weight, bias)
    picked = (capped(u, softcap, scale), pick(labels, rows), pick(contrast_labels, rows))
    facts = vocab_stats_reference(*picked, bag_weights, want=tuple(grads))
    c = row_coefficients(
        facts,
        {fact: grad[rows] for fact, grad in grads.items()},
        weight_sum(u, bag_weights),
        bag_weights is not None,
    )
    top, rest = facts["row_max"], facts["row_rest"]
    du = vocab_stats_backward_reference(*picked, bag_weights, top, rest, c)
    if softcap:
        du = du * cap_slope(u, softcap, scale)
    elif scale != 1:
        du = du * scale
    du = du.to(u.dtype)
    d_hidden = [du @ matrix for matrix in weight]
    if kept is not None:
        d_hidden = [
            torch.zeros_like(t).index_copy(0, kept, d)
            for t, d in zip(hidden, d_hidden, strict=True)
        ]
    return d_hidden, [du.T @ part for part in states], du.sum(0)


_head_stats = declare(
    f"head_stats({_OF_HEAD} str[] want, int n_rows, str with_gradient, bool triton) -> ("
    + ", ".join(f"Tensor {name}" for name in ("row_max", "row_rest", *FACTS))
    + ", Tensor[] units)",
    implementation=_forward,
    fake=_forward_fake,
    setup_context=_setup_context,
    backward=_backward,
)


def head_stats(
    head: Head,
    labels: Tensor | None,  # [N] int64, -100 for rows that do not count
    contrast_labels: Tensor | None,  # [N] int64
    bag_weights: Tensor | None,  # [V]
    want: Sequence[str],
    impl: str,
) -> tuple[Tensor, ...]:
    """The outputs of vocab_stats' operator for a head's logits; its arguments have been checked."""
    hidden = [states.reshape(-1, states.shape[-1]) for states in head.hidden]
    of_head = (*head.weight, *([] if head.bias is None else [head.bias]))
    asked = torch.is_grad_enabled() and any(t.requires_grad for t in hidden)
    frozen = not any(t.requires_grad for t in of_head)
    smooth = [fact for fact in want if fact != "argmax"]
    ahead = smooth[0] if asked and frozen and len(smooth) == 1 else ""
    rows = slab_rows(head.weight[0].shape[0], hidden[0], head.max_slab_bytes)
    *outputs, _ = _head_stats(
        hidden, list(head.weight), head.bias, float(head.softcap), float(head.scale), labels,
        contrast_labels, bag_weights, list(want), rows, ahead,
        choose(impl, *hidden, *head.weight),
    )  # fmt: skip
    shape = head.hidden[0].shape[:-1]
    return tuple(fact.view(shape) if fact.numel() else fact for fact in outputs)
