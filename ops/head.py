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

from ._cap import Cap
from ._check import IGNORED, check_labels, values_checked
from ._declare import declare
from ._launch import GPU_TYPES, accumulation_dtype, capturing, choose, slabs
from ._shards import Shard, check_alike, check_differentiable_twice, of_operator
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
    across_shards,
    is_softmax,
    keeps_gap,
    kept_rows,
    no_columns,
    of_shard,
    pick,
    row_coefficients,
    softmax_gradient,
    vocab_stats_backward_reference,
    vocab_stats_reference,
    weight_sum,
)

SLAB_BYTES_ON_GPU = 1 << 29
SLAB_BYTES_ON_CPU = 1 << 26
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
    shard: Shard | None = None  # which columns `weight` and `bias` hold; None: all
    versions: tuple[tuple[Tensor, int], ...] = ()  # weights, and how often they had been written to
    states: tuple[int | None, ...] = ()  # how often the hidden states had been

    def check_weights(self) -> None:
        """RuntimeError where hidden states or weights are not those any more that the logits stand
        for."""
        if torch.compiler.is_compiling():
            return
        for weight in self.weight:
            if weight.numel() and weight.untyped_storage().size() == 0:
                raise RuntimeError(
                    "the head's weights were freed after its forward (FSDP resharded them): shard "
                    "the head with reshard_after_forward=False, or as part of the root, and take "
                    "the loss inside the model's forward"
                )
        states = zip(self.hidden, self.states, strict=False)
        for tensor, version in (*self.versions, *states):
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    "the head's hidden states or weights were written to after its forward (an "
                    "optimizer's step?): use the logits before, or materialize() them then"
                )

    def logits(self) -> Tensor:
        """The logits themselves, [..., V]: the definition."""
        self.check_weights()
        rows = [states.reshape(-1, states.shape[-1]) for states in self.hidden]
        given = [t for t in (*rows, *self.weight, self.bias) if t is not None]
        learns = torch.is_grad_enabled() and any(t.requires_grad for t in given)
        if len(rows) == 1 and not learns and serves_onednn(*given):
            product = onednn_product(rows[0], self.weight[0], self.bias)
        else:
            product = head_product(rows, self.weight, self.bias)
        whole = self.cap.logits(product)
        whole = whole.view(*self.hidden[0].shape[:-1], whole.shape[-1])
        return whole if self.shard is None else self.shard.whole(whole)

    @property
    def vocab_size(self) -> int:
        return self.weight[0].shape[0] if self.shard is None else self.shard.vocab_size

    @property
    def cap(self) -> Cap:
        return Cap(self.softcap, self.scale)


def head_product(
    hidden: Sequence[Tensor],  # [n, D_k] each
    weight: Sequence[Tensor],  # [V, D_k] each
    bias: Tensor | None,  # [V]
    room: Tensor | None = None,  # [n, V] to write to
) -> Tensor:
    """sum_k hidden_k weight_k^T + bias, [n, V]: the definition, where no `room` is given."""
    if bias is None:
        product = torch.mm(hidden[0], weight[0].T, out=room)
    else:  # in one call, which rounds once
        product = torch.addmm(bias, hidden[0], weight[0].T, out=room)
    for states, matrix in zip(hidden[1:], weight[1:], strict=True):
        product = torch.addmm(product, states, matrix.T, out=room)
    return product


def slab_limit(row_bytes: int, like: Tensor, max_slab_bytes: int | None) -> int:
    """Rows of so many bytes that fit into a slab, on the device of `like`."""
    limit = max_slab_bytes
    if limit is None:
        limit = SLAB_BYTES_ON_GPU if like.device.type in GPU_TYPES else SLAB_BYTES_ON_CPU
        limit = max(limit, row_bytes)
    if limit < row_bytes:
        raise ValueError(
            f"max_slab_bytes must hold one row of logits, {row_bytes} bytes: got {max_slab_bytes}"
        )
    return limit // max(1, row_bytes)


def padded_room(like: Tensor, n_rows: int, vocab_size: int) -> Tensor:
    """[n_rows, V]; on a GPU with rows that start at 16 bytes, whatever V is."""
    width = 16 // like.element_size() if like.device.type in GPU_TYPES else 1
    room = like.new_empty(n_rows, -(-vocab_size // width) * width)
    room[:, vocab_size:] = 0  # a GEMM may multiply what lies there by zero
    return room[:, :vocab_size]


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
        t.device.type == "cpu" and t.dtype == torch.float32 and t.is_contiguous() and t.numel()
        for t in tensors
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
        cap: Cap,
        ids: Ids,  # [N] each
        n_rows: int,
        compact: bool = True,
    ) -> None:
        self.hidden, self.weight, self.bias = hidden, weight, bias
        self.cap, self.ids = cap, ids
        # Leaving rows out waits for the device once; a graph's capture cannot, and zeroes them.
        self.blind = ids[0] is not None and (not compact or capturing(hidden[0]))
        self.kept = None if self.blind else kept_rows(ids[0])
        self.total = hidden[0].shape[0] if self.kept is None else self.kept.shape[0]
        n_slabs = max(1, slab_count(self.total, n_rows))
        self.step = max(1, -(-self.total // n_slabs))  # slabs of one size
        self.onednn = serves_onednn(weight[0])
        # No rows where the product brings its own memory.
        self.room = padded_room(hidden[0], 0 if self.onednn else self.step, weight[0].shape[0])

    def product(self, hidden: Sequence[Tensor]) -> Tensor:
        if not self.onednn:
            return head_product(hidden, self.weight, self.bias, self.room[: hidden[0].shape[0]])
        u = onednn_product(hidden[0], self.weight[0], self.bias)
        for states, matrix in zip(hidden[1:], self.weight[1:], strict=True):
            u.addmm_(states, matrix.T)
        return u

    def __iter__(self) -> Iterator[tuple[Any, list[Tensor], Tensor]]:
        """(rows, their hidden states, u): u is the product, before any cap. To drop it before the
        next is asked for keeps one slab in memory at a time."""
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

    def gradient(
        self,
        u: Tensor,
        ids: Ids,
        bag_weights: Tensor | None,
        row_max: Tensor,
        row_rest: Tensor,
        coefficients: dict[str, Tensor | None],
        triton: bool,
    ) -> None:
        """The gradient with respect to u, in its place."""
        run = _backward_triton if triton else _backward_torch
        # The torch path zeroes the gradient of rows that do not count before it reads the others.
        source = u.clone() if self.blind and not triton else u
        run(u, source, *ids, bag_weights, row_max, row_rest, coefficients, self.cap)


def parts(u: Tensor, triton: bool) -> list[slice]:
    """Rows of a slab whose temporaries fit a CPU's cache and are no more than half the slab, whose
    size a caller chose for memory; all of them for the kernels, none of a shard without columns."""
    if not u.numel():
        return []
    return [slice(0, len(u))] if triton else slabs(len(u), u.shape[1], 2 * u.numel())


class Need(NamedTuple):
    """Of which terms' hidden states and matrices, and whether of the bias, a gradient is wanted."""

    hidden: Sequence[bool]
    weight: Sequence[bool]
    bias: bool

    @classmethod
    def of(cls, hidden: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None) -> Need:
        on = torch.is_grad_enabled()
        return cls(
            [on and t.requires_grad for t in hidden],
            [on and t.requires_grad for t in weight],
            on and bias is not None and bias.requires_grad,
        )

    def none(self) -> Need:
        return Need([False] * len(self.hidden), [False] * len(self.weight), False)

    @property
    def of_head(self) -> bool:
        return any(self.weight) or self.bias

    @property
    def any(self) -> bool:
        return any(self.hidden) or self.of_head


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
        need: Need,
        n_slabs: int = FEW_SLABS + 1,
        ahead: bool = False,  # of an upstream gradient: to be multiplied, and only then rounded
    ) -> None:
        self.matrices = weight
        wide = ahead and widens(hidden[0])
        few = n_slabs <= (FEW_SLABS if hidden[0].device.type == "cpu" else 1)

        def room(t: Tensor, in_sums: bool) -> Tensor:
            return torch.empty_like(t, dtype=accumulation_dtype(t.dtype) if in_sums else t.dtype)

        self.hidden = {k: room(t, wide) for k, t in enumerate(hidden) if need.hidden[k]}
        self.weight = {k: room(t, not few) for k, t in enumerate(weight) if need.weight[k]}
        self.bias = [room(bias, True)] if need.bias and bias is not None else []
        self.begun = False

    @property
    def all(self) -> list[Tensor]:
        return [*self.hidden.values(), *self.weight.values(), *self.bias]

    def zero(self, rows: int = 0, all_rows: bool = False) -> None:
        """Zeroes what slabs of so many rows, and whether they are all there are, do not write."""
        left = [
            *(() if all_rows and rows else self.hidden.values()),
            *(() if rows else self.weight.values()),
            *self.bias,
        ]
        for tensor in left:
            tensor.zero_()

    def add(self, rows: Any, states: Sequence[Tensor], du: Tensor) -> None:
        """One slab's share: its rows, their hidden states, the gradient of the product."""
        for k, grad in self.hidden.items():
            matrix = self.matrices[k]
            fits = serves_onednn(du, matrix)
            made = onednn_product(du, matrix.T) if fits else product(du, matrix, grad.dtype)
            grad[rows] = made
        for k, total in self.weight.items():
            add_product(total, du.T, states[k], self.begun)
        for total in self.bias:
            total += du.sum(0, dtype=total.dtype)
        self.begun = True


def rounds_products(tensor: Tensor) -> bool:
    """Whether products come rounded to bfloat16: those of a CPU."""
    return tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def widens(tensor: Tensor) -> bool:
    """Whether the device's library gives a product in fp32 before it rounds: NVIDIA's."""
    return tensor.device.type == "cuda" and torch.version.hip is None


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in `dtype`."""
    if a.dtype != dtype and widens(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor, begun: bool = True) -> None:
    """total += a b, in the dtype of `total`; total = a b where nothing has `begun`."""
    beta = 1 if begun else 0
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=beta, out=total)
    elif widens(a):
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        whole = [slice(None)]
        # rounded products beside it: 4 MB of them
        for part in slabs(a.shape[0], 4 * b.shape[1]) if a.device.type == "cpu" else whole:
            made = a[part] @ b
            total[part] = total[part] + made if begun else made


def scratch(n_rows: int, vocab_size: int, like: Tensor) -> Tensor:
    """[2, rows of the largest part, V] for all parts of slabs of so many rows.

    Fresh memory for every part may go back to the system each time: with parts of 8 MB that was
    141,000 page faults, and 1.25 of the time of the whole call.
    """
    largest = max((part.stop - part.start for part in slabs(n_rows, vocab_size)), default=0)
    return like.new_empty(2, largest, vocab_size)


def facts_and_gradient(
    u: Tensor,  # [n, V] of rows that count; its gradient is written in its place
    cap: Cap,
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
    if not cap.is_none:
        wide = cap.logits(u)
    else:
        wide = u if u.dtype == room.dtype else room[0].copy_(u)
    made = exponentials(wide, keeps_gap(want), room[1])
    found = vocab_stats_reference(wide, *ids, bag_weights, want, made)
    for name, values in facts.items():
        values.copy_(found[name])
    c = row_coefficients(found, grads, total_weight, bag_weights is not None)
    if not is_softmax(c):
        of_rows = (*ids, bag_weights, made.top, made.rest)
        u.copy_(cap.gradient(vocab_stats_backward_reference(wide, *of_rows, c), u))
    elif wide is u:
        softmax_gradient(made.e, ids[0], made.rest, c, out=u)
    else:
        u.copy_(cap.gradient(softmax_gradient(made.e, ids[0], made.rest, c), u))


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
    private: bool,  # whoever calls sees nothing of `made`, so that the backward may write to it
    exact: bool,  # rather makes the logits again than round a gradient once more
    group: str,  # whose ranks hold the other columns of the head; "": there are none
    sizes: list[int],  # columns of each rank
    need_hidden: list[bool],
    need_weight: list[bool],
    need_bias: bool,
    triton: bool,
) -> tuple[Any, ...]:
    asked = want.split()
    shard = Shard.of(group, sizes)
    facts = _empty_facts(hidden[0], asked, False)
    need = Need(need_hidden, need_weight, need_bias)
    n_slabs = slab_count(hidden[0].shape[0], n_rows)
    made = Gradients(hidden, weight, bias, need, n_slabs, ahead=True)
    if not facts["row_max"].numel():
        made.zero()
        return (*_as_outputs(hidden[0], facts), made.all)
    vocab_size = weight[0].shape[0] if shard is None else shard.vocab_size
    ids = (labels, contrast_labels)
    if values_checked(hidden[0]):
        for name, given in zip(("labels", "contrast_labels"), ids, strict=True):
            if given is not None:
                check_labels(name, given, vocab_size)
    total, own, weights = weight_sum(vocab_size, bag_weights), asked, bag_weights
    if shard is not None:
        ids, own, weights = shard.ids(*ids), of_shard(asked), shard.columns(bag_weights)
    slabs_ = Slabs(hidden, weight, bias, Cap(softcap, scale), ids, n_rows, compact)
    made.zero(slabs_.total, slabs_.kept is None)
    fused = bool(ahead) and not triton and not slabs_.blind and shard is None
    room = scratch(slabs_.step if fused else 0, weight[0].shape[0], facts["row_max"])
    for rows, states, u in slabs_:
        found = _empty_facts(u, own, triton)
        ones = torch.ones_like(found["row_max"])
        of_rows = [share[rows] for share in shares] or [ones]
        upstream = dict(zip(ahead.split(), of_rows, strict=False))
        of_slab = ids_of(ids, rows)
        for part in parts(u, triton):
            out = {name: values[part] for name, values in found.items()}
            of_part = ids_of(of_slab, part)
            if fused:
                grads = {name: grad[part] for name, grad in upstream.items()}
                args = (of_part, weights, asked, grads, total, out)
                facts_and_gradient(u[part], slabs_.cap, *args, room[:, : len(u[part])])
            elif triton:
                _forward_triton(u[part], *of_part, weights, out, slabs_.cap)
            else:
                _forward_torch(u[part], *of_part, weights, own, out, slabs_.cap)
        if shard is not None:
            if not shard.size:
                no_columns(found)
            found = across_shards(found, shard, asked, of_slab[0], bag_weights)
        if ahead and not fused:
            c = row_coefficients(found, upstream, total, bag_weights is not None)
            top, beside = found["row_max"], found["row_rest"]
            for part in parts(u, triton):
                of_rows_ = {name: pick(value, part) for name, value in c.items()}
                state = (weights, top[part], beside[part], of_rows_, triton)
                slabs_.gradient(u[part], ids_of(of_slab, part), *state)
        for name, values in found.items():
            facts[name][rows] = values
        if ahead:
            made.add(rows, states, u)
        del u  # or the next slab is made beside this one
    return (*_as_outputs(hidden[0], facts), made.all)


def _forward_fake(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    facts = _as_outputs(hidden[0], _empty_facts(hidden[0], rest[5].split(), True))
    n_slabs = slab_count(hidden[0].shape[0], rest[6])
    return (*facts, Gradients(hidden, weight, bias, Need(*rest[-4:-1]), n_slabs, ahead=True).all)


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
    need = Need(need_hidden, need_weight, need_bias)
    made = Gradients(hidden, weight, bias, need, slab_count(hidden[0].shape[0], n_rows))
    if not row_max.numel():
        made.zero()
        return made.all
    ids = (labels, contrast_labels)
    slabs_ = Slabs(hidden, weight, bias, Cap(softcap, scale), ids, n_rows, compact)
    made.zero(slabs_.total, slabs_.kept is None)
    for rows, states, u in slabs_:
        of_slab, top, beside = ids_of(ids, rows), row_max[rows], row_rest[rows]
        c = {name: pick(value, rows) for name, value in zip(COEFFICIENTS, values, strict=True)}
        for part in parts(u, triton):
            of_part = {name: pick(value, part) for name, value in c.items()}
            state = (bag_weights, top[part], beside[part], of_part, triton)
            slabs_.gradient(u[part], ids_of(of_slab, part), *state)
        made.add(rows, states, u)
        del u
    return made.all


def _backward_fake(
    hidden: list[Tensor], weight: list[Tensor], bias: Tensor | None, *rest: Any
) -> list[Tensor]:
    n_slabs = slab_count(hidden[0].shape[0], rest[-6])
    return Gradients(hidden, weight, bias, Need(*rest[-4:-1]), n_slabs).all


_OF_HEAD = (
    "Tensor[] hidden, Tensor[] weight, Tensor? bias, float softcap, float scale, "
    "Tensor? labels, Tensor? contrast_labels, Tensor? bag_weights, "
)
_NEEDS = "bool[] need_hidden, bool[] need_weight, bool need_bias, bool triton"

_head_stats_backward = declare(
    f"head_stats_backward({_OF_HEAD} Tensor row_max, Tensor row_rest, "
    + ", ".join(f"Tensor? {name}" for name in COEFFICIENTS)
    + f", int n_rows, bool compact, {_NEEDS}) -> Tensor[]",
    implementation=_backward_op,
    fake=_backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    hidden, weight, bias, softcap, scale, labels, contrast, bag, want, n_rows, *rest = inputs
    compact, ahead, shares, private, exact, group, sizes, *_, triton = rest
    *facts, made = output
    saved = dict(zip(("row_max", "row_rest", *FACTS), facts, strict=True))
    kept = [saved[name] for name in KEPT]
    ctx.save_for_backward(*hidden, *weight, bias, labels, contrast, bag, *kept, *shares, *made)
    ctx.sizes = (len(hidden), len(weight), 4, len(kept), len(shares), len(made))
    ctx.options = (
        softcap,
        scale,
        want.split(),
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
    softcap, scale, want, n_rows, compact, ahead, private, exact, shard, triton = ctx.options
    saved = iter(ctx.saved_tensors)
    hidden, weight, given, kept, shares, made = (
        [next(saved) for _ in range(size)] for size in ctx.sizes
    )
    bias, labels, contrast, bag = given
    none = [None] * len(hidden)
    of_sizes: Any = [] if shard is None else None  # an empty list comes back as one
    nothing = (*[None] * 9, [None] * len(shares), None, None, None, of_sizes, *[None] * 4)
    grads = {
        fact: grad.contiguous()
        for fact, grad in zip(FACTS, upstream[2:-1], strict=True)
        if grad is not None and fact in want and fact != "argmax"
    }
    if not grads:
        return (none, none, None, *nothing)
    of_hidden, of_weight, of_bias = ctx.needs_input_grad[:3]
    need = Need(of_hidden, of_weight, bias is not None and of_bias)
    wanted = [
        t
        for part, needed in ((hidden, need.hidden), (weight, need.weight), ([bias], [need.bias]))
        for t, n in zip(part, needed, strict=True)
        if n
    ]
    counts = None if labels is None else labels != IGNORED
    if torch.is_grad_enabled():
        check_differentiable_twice(shard)
        d_hidden, d_weight, d_bias = _twice_differentiable(
            hidden, weight, bias, softcap, scale, labels, contrast, bag, grads
        )
        needed = (*need.hidden, *need.weight, need.bias)
        both = zip((*d_hidden, *d_weight, d_bias), needed, strict=True)
        out = [d for d, n in both if n]
    elif (factor := factor_ahead(made, grads, ahead, shares, counts, exact)) is not None:
        out = scaled(made, factor, [t.dtype for t in wanted], private)
    else:
        facts = dict(zip(KEPT, kept, strict=True))
        vocab_size, ids, weights = weight[0].shape[0], (labels, contrast), bag
        if shard is not None:
            vocab_size, ids, weights = shard.vocab_size, shard.ids(*ids), shard.columns(bag)
        c = row_coefficients(facts, grads, weight_sum(vocab_size, bag), bag is not None)
        out = _head_stats_backward(
            hidden, weight, bias, softcap, scale, *ids, weights,
            facts["row_max"], facts["row_rest"], *c.values(),
            n_rows, compact, *need, triton,
        )  # fmt: skip
    rest = (d.to(t.dtype) for d, t in zip(out, wanted, strict=True))
    results = [[next(rest) if n else None for n in part] for part in need[:2]]
    return (*results, next(rest) if need.bias else None, *nothing)


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
        for part in (
            slabs(len(grad), grad.shape[1:].numel()) if grad.device.type == "cpu" else whole
        ):
            of_part = factor[part] if factor.dim() else factor
            torch.mul(grad[part], of_part, out=out[-1][part])
    if not (values_checked(factor) and bool((factor == 1).all())):
        for grad in own:
            grad.mul_(factor)
    return out


def factor_ahead(
    made: Sequence[Tensor],
    grads: Mapping[str, Tensor],
    ahead: Sequence[str],
    shares: Sequence[Tensor],
    counts: Tensor | None,  # rows that count; None for all
    exact: bool,
) -> Tensor | None:
    """What the gradients made in the forward are to be multiplied by, [] or [..., 1]; None where
    they do not serve and the logits are to be made again."""
    if not made or set(grads) != set(ahead):
        return None
    upstream = [grads[fact] if counts is None else grads[fact].where(counts, 0) for fact in ahead]
    if shares:
        factor = common_factor(upstream, shares, counts)
    else:
        factor = upstream[0][..., None]
    if exact and rounds_products(made[0]):  # already: only a power of two rounds nothing more
        mantissa = factor.frexp().mantissa.abs()
        if not ((mantissa == 0.5) | (mantissa == 0)).all():
            return None
    return factor


def common_factor(
    grads: Sequence[Tensor], shares: Sequence[Tensor], counts: Tensor | None
) -> Tensor:
    """What every upstream gradient is of the share that was foretold, over the rows that count: a
    power of two where only rounding keeps it from being one."""
    if counts is not None:
        shares = [share.where(counts, 0) for share in shares]
    told, came = torch.cat([s.flatten() for s in shares]), torch.cat([g.flatten() for g in grads])
    if told.numel() == 0:
        return told.sum()
    size = told.abs().max()  # lest squares leave the range
    told = told / torch.where(size == 0, 1.0, size)
    factor: Tensor = (came * told).sum() / torch.where(size == 0, 1.0, told.square().sum())
    if values_checked(factor) and (came - factor * told).abs().max() > 1e-5 * factor.abs():
        raise RuntimeError(
            "the loss foretold its upstream gradients as shares=...: they came otherwise; leave "
            "shares out"
        )
    factor = factor / torch.where(size == 0, 1.0, size)
    mantissa, exponent = factor.frexp()
    power = torch.ldexp((2 * mantissa).round() / 2, exponent)  # of the nearest half
    near = 8 * torch.finfo(factor.dtype).eps
    return torch.where((power - factor).abs() <= near * factor.abs(), power, factor)


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
    cap = Cap(softcap, scale)
    picked = (cap.logits(u), pick(labels, rows), pick(contrast_labels, rows))
    facts = vocab_stats_reference(*picked, bag_weights, want=tuple(grads))
    c = row_coefficients(
        facts,
        {fact: grad[rows] for fact, grad in grads.items()},
        weight_sum(u.shape[-1], bag_weights),
        bag_weights is not None,
    )
    top, rest = facts["row_max"], facts["row_rest"]
    dz = vocab_stats_backward_reference(*picked, bag_weights, top, rest, c)
    du = cap.gradient(dz, u).to(u.dtype)
    d_hidden = [du @ matrix for matrix in weight]
    if kept is not None:
        d_hidden = [
            torch.zeros_like(t).index_copy(0, kept, d)
            for t, d in zip(hidden, d_hidden, strict=True)
        ]
    return d_hidden, [du.T @ part for part in states], du.sum(0)


_head_stats = declare(
    f"head_stats({_OF_HEAD} str want, int n_rows, bool compact, str ahead, Tensor[] shares, "
    f"bool private, bool exact, str group, int[] sizes, {_NEEDS}) -> ("
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
    gradient_of: Sequence[str] | None = None,  # of the wanted facts; None for all
) -> tuple[Tensor, ...]:
    """The outputs of vocab_stats' operator for a head's logits; its arguments have been checked.

    Products' work, of N D V each: 1 without gradients. With a frozen head 2 where one fact is
    differentiated (3 in bfloat16 on a CPU) or `shares` foretell the upstream gradients, with a
    trained one 3 where they do; 4 otherwise (3 for a frozen head), and in float16.

    Bytes beside inputs and gradients, with b an element's, n = min(max_slab_bytes // (V b), N):
        n V b  +  n D b  +  32 MB on a CPU (parts of a slab in fp32)  +  40 N (facts, row vectors)
        +  4 V D  where a trained head's gradient is summed in fp32: slabs of another dtype than
                  fp32, over 3 on a CPU, over 1 on a GPU
    """
    head.check_weights()
    hidden = [states.reshape(-1, states.shape[-1]) for states in head.hidden]
    told = want if gradient_of is None else gradient_of
    smooth = [fact for fact in want if fact != "argmax" and fact in told]
    need = Need.of(hidden, head.weight, head.bias)
    foretold = shares is not None and set(shares) == set(smooth)
    can = need.any and (foretold or (not need.of_head and len(smooth) == 1))
    # Gradients of float16 underflow before a loss scale is known.
    can = can and hidden[0].dtype != torch.float16
    if head.mode == "ahead" and need.any and not can:
        kind = "trained" if need.of_head else "frozen"
        raise ValueError(
            "mode='ahead' needs a frozen head and one differentiable fact, or a loss that knows "
            f"its rows' weights, and no float16: got {', '.join(smooth)} of a {kind} head in "
            f"{hidden[0].dtype}"
        )
    # One that nothing was foretold of is seldom a power of two: see factor_ahead.
    in_vain = rounds_products(hidden[0]) and not foretold
    makes = {"auto": can and not in_vain, "ahead": can, "recompute": False}
    ahead = smooth if makes[head.mode] else []
    known = []
    if shares is not None and foretold:  # in the facts' dtype, which a cast of the logits is not
        known = [shares[fact].to(accumulation_dtype(hidden[0].dtype)) for fact in ahead]
    shard = head.shard
    widest = head.weight[0].shape[0] if shard is None else max(shard.sizes)
    rows = slab_limit(widest * hidden[0].element_size(), hidden[0], head.max_slab_bytes)
    if shard is not None and head.compact and not capturing(hidden[0]):
        needs = [need.any, *need.hidden]
        how = (want, ahead, needs, head.mode, head.cap, len(hidden), head.bias is None)
        check_alike(shard, len(hidden[0]), hidden[0], labels, bag_weights, how, rows)
    *outputs, _ = _head_stats(
        hidden, list(head.weight), head.bias, float(head.softcap), float(head.scale), labels,
        contrast_labels, bag_weights, " ".join(want), rows, head.compact, " ".join(ahead), known,
        True, head.mode != "ahead", *of_operator(shard), *(need if ahead else need.none()),
        choose(impl, *hidden, *head.weight),
    )  # fmt: skip
    shape, made = head.hidden[0].shape[:-1], {"row_max", "row_rest", *want}
    names = ("row_max", "row_rest", *FACTS)
    return tuple(
        fact.view(shape) if name in made else fact
        for name, fact in zip(names, outputs, strict=True)
    )
