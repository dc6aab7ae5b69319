"""head_stats: what vocab_stats tells of logits that are never whole: hidden states times a head.

A slab of rows at a time: the vendor's matrix product, then the kernels of vocab_stats in place;
rows that do not count are left out before. A frozen head's one differentiable fact has its gradient
made in the forward and scaled in the backward; else the backward makes the logits again.
docs/head.md has the table of work and memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import IGNORED, values_checked
from ._declare import declare
from ._launch import GPU_TYPES, accumulation_dtype, capturing, choose, slabs
from ._softmax import exponentials
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
    is_softmax,
    keeps_gap,
    kept_rows,
    pick,
    row_coefficients,
    softmax_gradient,
    vocab_stats_backward_reference,
    vocab_stats_reference,
    weight_sum,
)

SLAB_BYTES_ON_GPU = 1 << 29
SLAB_BYTES_ON_CPU = 1 << 26
PARTS_OF_CAPPED = 8  # in which a GPU caps a slab: what that needs beside it is a part's size
FEW_SLABS = 3  # up to which a head's gradient is summed in its own dtype, see Gradients
MODES = ("auto", "ahead", "recompute")

Ids = tuple[Tensor | None, Tensor | None]  # labels and contrast labels


class Head(NamedTuple):
    """scale * cap(sum_k hidden_k weight_k^T + bias), cap(u) = softcap tanh(u / softcap): logits
    [..., V] by what they are made of."""

    hidden: tuple[Tensor, ...]  # [..., D_k] each
    weight: tuple[Tensor, ...]  # [V, D_k] each
    bias: Tensor | None = None  # [V]
    softcap: float = 0.0  # 0: none
    scale: float = 1.0
    max_slab_bytes: int | None = None
    compact: bool = True  # leave out rows that do not count: one wait for the device
    mode: str = "auto"  # "ahead": gradients in the forward, or an error; "recompute": never

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


def slab_count(n_rows: int, step: int) -> int:
    """Slabs that so many rows can need, whichever of them count."""
    return -(-n_rows // step)


def serves_onednn(*tensors: Tensor) -> bool:
    """Whether oneDNN's product is to be had, and better than that of torch.mm.

    On a CPU torch.mm gives float32 to MKL or OpenBLAS, which pack the whole head anew for every
    slab: at 256 rows of 1024 x 32000 oneDNN needs 0.67 of MKL's time for the logits, 0.83 for
    d hidden. bfloat16 and float16 go to oneDNN through torch.mm as well.
    """
    return torch.backends.mkldnn.is_available() and all(
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() for t in tensors
    )


def onednn_product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product


def ids_of(ids: Ids, rows: Any) -> Ids:
    return pick(ids[0], rows), pick(ids[1], rows)


class Slabs:
    """The rows that count, a slab at a time, with the memory that all slabs share."""

    def __init__(
        self,
        hidden: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        softcap: float,
        scale: float,
        ids: Ids,  # [N] each
        n_rows: int,
        compact: bool = True,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.softcap, self.scale = softcap, scale
        self.ids = ids
        # Leaving rows out waits for the device once; a graph's capture cannot, and zeroes them.
        self.blind = ids[0] is not None and (not compact or capturing(hidden[0]))
        self.kept = None if self.blind else kept_rows(ids[0])
        self.total = hidden[0].shape[0] if self.kept is None else self.kept.shape[0]
        n_slabs = max(1, slab_count(self.total, n_rows))
        self.step = max(1, -(-self.total // n_slabs))  # slabs of one size
        self.onednn = serves_onednn(weight[0])
        self.room = self._room()

    def _room(self) -> Tensor:
        """[step, V]; on a GPU with rows that start at 16 bytes, whatever V is. No rows where the
        product brings its own memory."""
        first, vocab_size = self.hidden[0], self.weight[0].shape[0]
        width = 16 // first.element_size() if first.device.type in GPU_TYPES else 1
        stride = -(-vocab_size // width) * width
        room = first.new_empty(0 if self.onednn else self.step, stride)
        room[:, vocab_size:] = 0  # a GEMM may multiply what lies there by zero
        return room[:, :vocab_size]

    def product(self, hidden: Sequence[Tensor]) -> Tensor:
        if not self.onednn:
            return head_product(hidden, self.weight, self.bias, self.room[: hidden[0].shape[0]])
        u = onednn_product(hidden[0], self.weight[0], self.bias)
        for states, matrix in zip(hidden[1:], self.weight[1:], strict=True):
            u.addmm_(states, matrix.T)
        return u

    def products(self) -> Iterator[tuple[Any, list[Tensor], Tensor]]:
        """(rows, their hidden states, u). To drop u before the next is asked for keeps one slab in
        memory at a time."""
        for start in range(0, self.total, self.step):
            rows: Any = slice(start, min(start + self.step, self.total))
            if self.kept is not None:
                rows = self.kept[rows]
            hidden = [states[rows] for states in self.hidden]
            labels = self.ids[0]
            if self.blind and labels is not None:
                counts = (labels[rows] != IGNORED)[:, None]
                hidden = [torch.where(counts, states, 0.0) for states in hidden]
            yield rows, hidden, self.product(hidden)

    def __iter__(self) -> Iterator[tuple[Any, list[Tensor], Tensor, Tensor]]:
        """(rows, their hidden states, u, logits); u is the logits' memory where nothing caps."""
        for rows, hidden, u in self.products():
            yield rows, hidden, u, capped(u, self.softcap, self.scale)
            del u

    def parts(self, u: Tensor, triton: bool) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(some of the slab's rows, their u, their logits): what is made beside the slab is small.
        The logits are u's memory where nothing caps."""
        n_rows, vocab_size = u.shape
        if triton:
            step = -(-n_rows // (PARTS_OF_CAPPED if self.softcap else 1))
            parts = [slice(i, min(i + step, n_rows)) for i in range(0, n_rows, step)]
        else:
            parts = slabs(n_rows, vocab_size)
        for part in parts:
            yield part, u[part], capped(u[part], self.softcap, self.scale)

    def gradient(
        self,
        logits: Tensor,
        ids: Ids,
        bag_weights: Tensor | None,
        row_max: Tensor,
        row_rest: Tensor,
        coefficients: dict[str, Tensor | None],
        triton: bool,
    ) -> None:
        """dlogits in the place of the logits."""
        run = _backward_triton if triton else _backward_torch
        # The torch path zeroes the gradient of rows that do not count before it reads the others.
        source = logits.clone() if self.blind and not triton else logits
        run(logits, source, *ids, bag_weights, row_max, row_rest, coefficients)

    def through_cap(self, dlogits: Tensor, u: Tensor) -> None:
        """Writes du over u; nothing is to do where the logits were u's memory."""
        if self.softcap:
            torch.mul(dlogits, cap_slope(u, self.softcap, self.scale).to(u.dtype), out=u)
        elif self.scale != 1:
            torch.mul(dlogits, self.scale, out=u)


class Gradients:
    """Gradients of the hidden states, row by row, and of the head, summed over slabs.

    One slab writes the head's gradient once, in its dtype. More are summed in fp32; yet on a CPU,
    whose products come rounded to the dtype of their factors, a sum of up to FEW_SLABS in the
    head's own dtype rounds no more than fp32 sums of rounded products that are rounded at the end.
    """

    def __init__(
        self,
        hidden: Sequence[Tensor],
        weight: Sequence[Tensor],
        bias: Tensor | None,
        need: Sequence[bool],
        n_slabs: int = FEW_SLABS + 1,
    ) -> None:
        self.matrices = weight
        self.hidden = [torch.empty_like(t) for t in hidden if need[0]]
        few = n_slabs <= (FEW_SLABS if hidden[0].device.type == "cpu" else 1)
        self.weight = [
            torch.empty_like(t, dtype=t.dtype if few else accumulation_dtype(t.dtype))
            for t in (weight if need[1] else ())
        ]
        self.bias = [
            torch.empty_like(bias, dtype=accumulation_dtype(bias.dtype))
            for bias in ([bias] if need[2] and bias is not None else [])
        ]
        self.begun = False

    @property
    def all(self) -> list[Tensor]:
        return [*self.hidden, *self.weight, *self.bias]

    def zero(self, slabs: Slabs | None = None) -> None:
        """Zeroes all that the slabs will not write; without slabs, all."""
        empty = slabs is None or slabs.total == 0
        rows_left_out = empty or (slabs is not None and slabs.kept is not None)
        for tensor in (
            *(self.hidden if rows_left_out else ()),
            *(self.weight if empty else ()),
            *self.bias,
        ):
            tensor.zero_()

    def add(self, rows: Any, states: Sequence[Tensor], du: Tensor) -> None:
        """One slab's share: its rows, their hidden states, the gradient of the product."""
        self.add_rows(rows, du)
        self.add_head(states, du)

    def add_rows(self, rows: Any, du: Tensor) -> None:
        for grad, matrix in zip(self.hidden, self.matrices, strict=False):
            fits = serves_onednn(du, matrix)
            grad[rows] = onednn_product(du, matrix.T) if fits else du @ matrix

    def add_head(self, states: Sequence[Tensor], du: Tensor) -> None:
        for total, part in zip(self.weight, states, strict=False):
            add_product(total, du.T, part, self.begun)
        for total in self.bias:
            total += du.sum(0, dtype=total.dtype)
        self.begun = True


def facts_and_gradient(
    logits: Tensor,  # [n, V], rows that count; the gradient is written in their place
    ids: Ids,  # [n] each
    bag_weights: Tensor | None,
    want: Sequence[str],
    grads: Mapping[str, Tensor],  # upstream, [n] each
    total_weight: Tensor | float,
    facts: dict[str, Tensor],  # [n] each, written
    room: Tensor,  # [2, n, V] in the facts' dtype
) -> None:
    """The torch path's forward and backward in one: the exponentials are made once where they are
    all that a gradient needs."""
    wide = logits if logits.dtype == room.dtype else room[0].copy_(logits)
    made = exponentials(wide, keeps_gap(want), room[1])
    found = vocab_stats_reference(wide, *ids, bag_weights, want, made)
    for name, values in facts.items():
        values.copy_(found[name])
    c = row_coefficients(found, grads, total_weight, bag_weights is not None)
    if not is_softmax(c):
        of_rows = (*ids, bag_weights, made.top, made.rest)
        logits.copy_(vocab_stats_backward_reference(wide, *of_rows, c))
    elif wide is logits:
        softmax_gradient(made.e, ids[0], made.rest, c, out=logits)
    else:
        logits.copy_(softmax_gradient(made.e, ids[0], made.rest, c))


def _forward(
    hidden: list[Tensor],
    weight: list[Tensor],
    bias: Tensor | None,
    softcap: float,
    scale: float,
    labels: Tensor | None,
    contrast_labels: Tensor | None,
    bag_weights: Tensor | None,
    want: str,  # facts, separated by spaces
    n_rows: int,
    compact: bool,
    ahead: str,  # facts whose gradients are made here
    shares: list[Tensor],
    private: bool,  # nobody else holds `made`: the backward may write to it
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
    triton: bool,
) -> tuple[Any, ...]:
    asked = want.split()
    facts = _empty_facts(hidden[0], asked, False)
    need = (need_hidden, need_weight, need_bias)
    made = Gradients(hidden, weight, bias, need, slab_count(hidden[0].shape[0], n_rows))
    if not facts["row_max"].numel():
        made.zero()
        return (*_as_outputs(hidden[0], facts), made.all)
    ids = (labels, contrast_labels)
    slabs_ = Slabs(hidden, weight, bias, softcap, scale, ids, n_rows, compact)
    made.zero(slabs_)
    total = weight_sum(slabs_.room, bag_weights)
    fused = bool(ahead) and not triton and not slabs_.blind
    # Fresh memory for every part may go back to the system each time: with parts of 8 MB that was
    # 141,000 page faults, and 1.25 of the time of the whole call.
    largest = max(part.stop - part.start for part in slabs(max(1, slabs_.step), weight[0].shape[0]))
    shape = (2, largest if fused else 0, weight[0].shape[0])
    room = facts["row_max"].new_empty(shape)
    for rows, states, u in slabs_.products():
        found = _empty_facts(u, asked, triton)
        ones = torch.ones_like(found["row_max"])
        of_rows = [share[rows] for share in shares] or [ones]
        upstream = dict(zip(ahead.split(), of_rows, strict=False))
        of_slab = ids_of(ids, rows)
        for part, u_, logits in slabs_.parts(u, triton):
            out = {name: values[part] for name, values in found.items()}
            grads = {name: grad[part] for name, grad in upstream.items()}
            of_part = ids_of(of_slab, part)
            if fused:
                here = room[:, : len(logits)]
                facts_and_gradient(logits, of_part, bag_weights, asked, grads, total, out, here)
            elif triton:
                _forward_triton(logits, *of_part, bag_weights, out)
            else:
                _forward_torch(logits, *of_part, bag_weights, asked, out)
            if ahead and not fused:
                c = row_coefficients(out, grads, total, bag_weights is not None)
                top, beside = out["row_max"], out["row_rest"]
                slabs_.gradient(logits, of_part, bag_weights, top, beside, c, triton)
            if ahead:
                slabs_.through_cap(logits, u_)
        for name, values in found.items():
            facts[name][rows] = values
        if ahead:
            made.add(rows, states, u)
        del u, u_, logits  # or the next slab is made beside this one
    return (*_as_outputs(hidden[0], facts), made.all)


def _forward_fake(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    facts = _as_outputs(hidden[0], _empty_facts(hidden[0], rest[5].split(), True))
    n_slabs = slab_count(hidden[0].shape[0], rest[6])
    return (*facts, Gradients(hidden, weight, bias, rest[-4:-1], n_slabs).all)


def add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool = True) -> None:
    """total += a b, in the dtype of `total`; total = a b where nothing has `begun`."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=1 if begun else 0, out=total)
        return
    if not begun:
        total.zero_()
    if a.device.type == "cuda":
        total += torch.mm(a, b, out_dtype=total.dtype)
        return
    for part in slabs(a.shape[0], 4 * b.shape[1]):  # rounded products beside it: 4 MB of them
        total[part] += a[part] @ b


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
    *values, n_rows, compact, need_hidden, need_weight, need_bias, triton = rest
    need = (need_hidden, need_weight, need_bias)
    made = Gradients(hidden, weight, bias, need, slab_count(hidden[0].shape[0], n_rows))
    if not row_max.numel():
        made.zero()
        return made.all
    ids = (labels, contrast_labels)
    slabs_ = Slabs(hidden, weight, bias, softcap, scale, ids, n_rows, compact)
    made.zero(slabs_)
    for rows, states, u in slabs_.products():
        of_slab, top, beside = ids_of(ids, rows), row_max[rows], row_rest[rows]
        c = {name: pick(value, rows) for name, value in zip(COEFFICIENTS, values, strict=True)}
        for part, u_, logits in slabs_.parts(u, triton):
            of_part = {name: pick(value, part) for name, value in c.items()}
            state = (bag_weights, top[part], beside[part], of_part, triton)
            slabs_.gradient(logits, ids_of(of_slab, part), *state)
            slabs_.through_cap(logits, u_)
        made.add(rows, states, u)
        del u, u_, logits
    return made.all


def _backward_fake(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    n_slabs = slab_count(hidden[0].shape[0], rest[-6])
    return Gradients(hidden, weight, bias, rest[-4:-1], n_slabs).all


_OF_HEAD = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, float softcap, float scale, "
    "Tensor? labels, Tensor? contrast_labels, Tensor? bag_weights, "
)
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias, bool triton"

_head_stats_backward = declare(
    f"head_stats_backward({_OF_HEAD} Tensor row_max, Tensor row_rest, "
    + ", ".join(f"Tensor? {name}" for name in COEFFICIENTS)
    + f", int n_rows, bool compact, {_NEEDS}) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, softcap, scale, labels, contrast, bag, want, n_rows, *rest = inputs
    compact, ahead, shares, private, *_, triton = rest
    *facts, made = output
    saved = dict(zip(("row_max", "row_rest", *FACTS), facts, strict=True))
    kept = [saved[name] for name in KEPT]
    ctx.save_for_backward(*hidden, *weight, bias, labels, contrast, bag, *kept, *shares, *made)
    ctx.sizes = (len(hidden), len(weight), 4, len(kept), len(shares), len(made))
    ctx.options = (softcap, scale, want.split(), n_rows, compact, ahead.split(), private, triton)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *upstream: Any) -> tuple[Any, ...]:
    softcap, scale, want, n_rows, compact, ahead, private, triton = ctx.options
    saved = iter(ctx.saved_tensors)
    hidden, weight, given, kept, shares, made = (
        [next(saved) for _ in range(size)] for size in ctx.sizes
    )
    bias, labels, contrast, bag = given
    none = [None] * len(hidden)
    nothing = (*[None] * 9, [None] * len(shares), *[None] * 5)
    grads = {
        fact: grad.contiguous()
        for fact, grad in zip(FACTS, upstream[2:-1], strict=True)
        if grad is not None and fact in want and fact != "argmax"
    }
    if not grads:
        return (none, none, None, *nothing)
    need_hidden, need_weight = (any(need) for need in ctx.needs_input_grad[:2])
    need_bias = bias is not None and ctx.needs_input_grad[2]
    if torch.is_grad_enabled():
        d_hidden, d_weight, d_bias = _twice_differentiable(
            hidden, weight, bias, softcap, scale, labels, contrast, bag, grads
        )
        out = [*d_hidden * need_hidden, *d_weight * need_weight, *[d_bias] * need_bias]
    elif made and shares and set(grads) == set(ahead):
        factor = common_factor([grads[fact] for fact in ahead], shares, labels)
        of_head = [*weight * need_weight, *[bias] * need_bias]
        dtypes = [t.dtype for t in (*hidden * need_hidden, *of_head)]
        out = scaled(made, factor, dtypes, private)
    elif made and not shares and list(grads) == ahead:
        out = [grads[ahead[0]][:, None] * grad for grad in made]
    else:
        facts = dict(zip(KEPT, kept, strict=True))
        total = bag.sum() if bag is not None else float(weight[0].shape[0])
        c = row_coefficients(facts, grads, total, bag is not None)
        out = _head_stats_backward(
            hidden, weight, bias, softcap, scale, labels, contrast, bag,
            facts["row_max"], facts["row_rest"], *c.values(),
            n_rows, compact, need_hidden, need_weight, need_bias, triton,
        )  # fmt: skip
    rest = iter(out)
    d_hidden, d_weight = (
        [next(rest).to(t.dtype) for t in part] if need else none
        for part, need in ((hidden, need_hidden), (weight, need_weight))
    )
    d_bias = next(rest).to(bias.dtype) if need_bias else None
    return (d_hidden, d_weight, d_bias, *nothing)


def scaled(
    made: Sequence[Tensor], factor: Tensor, dtypes: Sequence[torch.dtype], private: bool
) -> list[Tensor]:
    """made * factor in these dtypes: in its own memory where no later backward can want it, since a
    head's gradient may be larger than all else. What allocates comes first: a backward that runs
    out of memory has changed nothing."""
    if torch.compiler.is_compiling() or type(factor) is not Tensor:  # a graph's own affair
        return [(grad * factor).to(dtype) for grad, dtype in zip(made, dtypes, strict=True)]
    last = private and not torch._C._autograd._get_current_graph_task_keep_graph()
    own, out = [], []
    for grad, dtype in zip(made, dtypes, strict=True):
        if last and grad.dtype == dtype:
            out.append(grad.detach())
            own.append(out[-1])
            continue
        out.append(torch.empty_like(grad, dtype=dtype))
        whole = [slice(None)]  # a CPU makes what it casts whole first
        for part in slabs(len(grad), grad[0].numel()) if grad.device.type == "cpu" else whole:
            torch.mul(grad[part], factor, out=out[-1][part])
    if not (values_checked(factor) and float(factor) == 1):
        for grad in own:
            grad.mul_(factor)
    return out


def common_factor(
    grads: Sequence[Tensor], shares: Sequence[Tensor], labels: Tensor | None
) -> Tensor:
    """What every upstream gradient is of the share that was foretold, over the rows that count."""
    counts = 1.0 if labels is None else (labels != IGNORED).to(shares[0].dtype)
    both = list(zip(grads, shares, strict=True))
    along = torch.stack([(g * s * counts).sum() for g, s in both]).sum()
    length = torch.stack([(s * s * counts).sum() for s in shares]).sum()
    factor: Tensor = along / torch.where(length == 0, 1.0, length)
    if values_checked(factor):
        for grad, share in both:
            apart = (grad - factor * share) * counts
            if apart.abs().max() > 1e-3 * factor.abs() * share.abs().max() + 1e-30:
                raise RuntimeError(
                    "the loss foretold its upstream gradients as shares=...: they came otherwise; "
                    "leave shares out"
                )
    return factor


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
    f"head_stats({_OF_HEAD} str want, int n_rows, bool compact, str ahead, Tensor[] shares, "
    f"bool private, {_NEEDS}) -> ("
    + ", ".join(f"Tensor {name}" for name in ("row_max", "row_rest", *FACTS))
    + ", Tensor[] made)",
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
    shares: Mapping[str, Tensor] | None = None,  # [N] each
) -> tuple[Tensor, ...]:
    """The outputs of vocab_stats' operator for a head's logits; its arguments have been checked.

    Products' work, of N D V each: 1 without gradients. With a frozen head 2 where one fact is
    differentiated or `shares` foretell the upstream gradients, with a trained one 3 where they do;
    4 otherwise (3 for a frozen head).

    Bytes beside inputs and gradients, with b an element's, n = min(max_slab_bytes // (V b), N):
        n V b  +  n D b  +  32 MB on a CPU (parts of a slab in fp32)  +  40 N (facts, row vectors)
        +  4 V D  where a trained head's gradient is summed in fp32: slabs of another dtype than
                  fp32, over 3 on a CPU, over 1 on a GPU (there with 4 V D for a slab's product)
    """
    hidden = [states.reshape(-1, states.shape[-1]) for states in head.hidden]
    smooth = [fact for fact in want if fact != "argmax"]
    need = [
        torch.is_grad_enabled() and any(t.requires_grad for t in part if t is not None)
        for part in (hidden, head.weight, [head.bias])
    ]
    foretold = shares is not None and set(shares) == set(smooth)
    can = any(need) and (foretold or (not any(need[1:]) and len(smooth) == 1))
    if head.mode == "ahead" and any(need) and not can:
        kind = "trained" if any(need[1:]) else "frozen"
        raise ValueError(
            "mode='ahead' needs a frozen head and one differentiable fact, or a loss that knows "
            f"its rows' weights: got {', '.join(smooth)} of a {kind} head"
        )
    ahead = smooth if can and head.mode != "recompute" else []
    known = [shares[fact] for fact in ahead] if shares is not None and foretold else []
    rows = slab_rows(head.weight[0].shape[0], hidden[0], head.max_slab_bytes)
    *outputs, _ = _head_stats(
        hidden, list(head.weight), head.bias, float(head.softcap), float(head.scale), labels,
        contrast_labels, bag_weights, " ".join(want), rows, head.compact, " ".join(ahead), known,
        True,
        *(needed and bool(ahead) for needed in need), choose(impl, *hidden, *head.weight),
    )  # fmt: skip
    shape = head.hidden[0].shape[:-1]
    return tuple(fact.view(shape) if fact.numel() else fact for fact in outputs)
