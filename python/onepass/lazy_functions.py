"""What torch's functions do with LazyLogits: HANDLERS, by function.

What code does to logits before its loss changes the hidden states or a few numbers; what a loss is
made of comes from the statistics. A handler answers NotImplemented where neither serves, and the
logits are made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .lazy_logits import (
    Handler,
    LazyLogits,
    detached,
    frames,
    identity,
    kept_dimension,
    make,
    number,
    over_vocabulary,
    plain,
    result_dtype,
    scaled,
    softcapped,
    versions_of,
    with_head,
)
from .lazy_probs import difference, exp, kl_div, softmax
from .losses import cross_entropy
from .ops._check import IGNORED, values_checked
from .ops._shards import alike, summed_gradient
from .ops.head import Head
from .ops.vocab_stats import vocab_stats
from .zero3 import hooked

# ---------------------------------------------------------------- what happens to rows


def is_lazy(value: Any) -> bool:
    return isinstance(value, LazyLogits)


def _on_rows(lazy: LazyLogits, change: Callable[[Tensor], Tensor]) -> LazyLogits:
    return with_head(lazy, hidden=tuple(change(h) for h in lazy.onepass_head.hidden))


def _reshaped(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """view, reshape, flatten, squeeze ...: whatever leaves the vocabulary last and whole."""
    if not is_lazy(lazy):
        return NotImplemented
    if args and isinstance(args[0], torch.dtype):  # view(dtype)
        return NotImplemented
    shape = func(torch.empty(lazy.shape, device="meta"), *args, **kwargs).shape
    vocab_size = lazy.shape[-1]
    if not shape or shape[-1] != vocab_size or (vocab_size == 1 and len(shape) < lazy.dim()):
        return NotImplemented
    return _on_rows(lazy, lambda h: h.reshape(*shape[:-1], h.shape[-1]))


def _row_dimensions(lazy: LazyLogits, dims: Sequence[Any]) -> list[int] | None:
    """The dimensions from the front, or None where one of them is the vocabulary's."""
    front = [_from_front(d, lazy.dim()) for d in dims]
    return None if any(d == lazy.dim() - 1 for d in front) else front


def _from_front(dim: int, n_dims: int) -> int:
    if not -n_dims <= dim < n_dims:
        raise IndexError(
            f"Dimension out of range (expected to be in range of [{-n_dims}, {n_dims - 1}], "
            f"but got {dim})"
        )
    return dim % n_dims


def _transposed(func: Any, lazy: Any, *dims: Any, **kwargs: Any) -> Any:
    known = {"dim0", "dim1", "axis0", "axis1"}
    dims = (*dims, *kwargs.values())
    if not is_lazy(lazy) or not kwargs.keys() <= known or not all(isinstance(d, int) for d in dims):
        return NotImplemented
    front = _row_dimensions(lazy, dims)
    return NotImplemented if front is None else _on_rows(lazy, lambda h: func(h, *front))


def _split(func: Any, lazy: Any, parts: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    if len(kwargs) > 1 or not is_lazy(lazy):
        return NotImplemented
    (parts,) = kwargs.values() or (parts,)  # whatever the function calls them
    front = _row_dimensions(lazy, [dim])
    if front is None:
        return NotImplemented
    pieces = zip(*(func(h, parts, front[0]) for h in lazy.onepass_head.hidden), strict=True)
    return tuple(with_head(lazy, hidden=piece) for piece in pieces)


def _unbound(func: Any, lazy: Any, dim: int = 0) -> Any:
    front = _row_dimensions(lazy, [dim])
    if front is None:
        return NotImplemented
    pieces = zip(*(h.unbind(front[0]) for h in lazy.onepass_head.hidden), strict=True)
    return tuple(with_head(lazy, hidden=piece) for piece in pieces)


def same_head(lazies: Sequence[Any]) -> bool:
    def of(lazy: LazyLogits) -> tuple[Any, ...]:
        head = lazy.onepass_head
        # Of a DTensor each forward takes its own part anew; which DTensor it was, `versions` say.
        in_graph = head.shard is None
        parts = tuple(identity(t, in_graph) for t in (*head.weight, head.bias))
        versions = tuple((id(t), version) for t, version in head.versions)
        options = head._replace(hidden=(), weight=(), bias=None, versions=(), states=())
        return parts, versions, options, lazy._normalized, lazy.dtype

    return all(is_lazy(lazy) for lazy in lazies) and len({of(lazy) for lazy in lazies}) == 1


def _joined(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """cat and stack of rows of one head."""
    if kwargs or not same_head(tensors):
        return NotImplemented
    extra = 1 if func is torch.stack else 0
    n_dims = tensors[0].dim() + extra
    dim = _from_front(dim, n_dims)
    if dim == n_dims - 1:
        return NotImplemented
    for lazy in tensors[1:]:
        lazy.onepass_head.check_weights()
    states = zip(*(lazy.onepass_head.hidden for lazy in tensors), strict=True)
    return with_head(tensors[0], hidden=tuple(func(parts, dim) for parts in states))


def _indexed(func: Any, lazy: Any, index: Any) -> Any:
    """lazy[index]: rows, and slices of the vocabulary."""
    if not is_lazy(lazy):
        return NotImplemented
    parts: list[Any] = list(index) if isinstance(index, tuple) else [index]
    dots = next((at for at, part in enumerate(parts) if part is Ellipsis), None)
    if dots is None:
        dots = len(parts)
        parts.append(Ellipsis)
    taken = sum(_dimensions_of(part) for part in parts)
    parts[dots : dots + 1] = [slice(None)] * (lazy.dim() - taken)
    *rows, columns = parts
    if not isinstance(columns, slice):
        return NotImplemented
    if columns != slice(None):
        head = lazy.onepass_head
        if lazy._normalized or head.shard is not None:
            return NotImplemented
        bias = None if head.bias is None else head.bias[columns]
        lazy = with_head(lazy, weight=tuple(w[columns] for w in head.weight), bias=bias)
    return _on_rows(lazy, lambda h: h[(*rows, slice(None))])


def _dimensions_of(index: Any) -> int:
    """How many dimensions one part of an index takes."""
    if index is None or index is Ellipsis:
        return 0
    is_mask = isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
    return index.dim() if is_mask else 1


def _selected(func: Any, lazy: Any, dim: int, index: Tensor) -> Any:
    front = _row_dimensions(lazy, [dim])
    return NotImplemented if front is None else _on_rows(lazy, lambda h: func(h, front[0], index))


def _detached(func: Any, lazy: Any, *_: Any) -> LazyLogits:
    if not called_by_deepspeed():
        return detached(lazy)
    passing = make(lazy.onepass_head, lazy.dtype, lazy._normalized, ungraphed=False)
    passing._passing = True
    return passing


def called_by_deepspeed() -> bool:
    """Whether the forward of an autograd.Function of DeepSpeed's asks: it detaches what it gives
    back as it came."""
    apply = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
    for frame in frames():
        package = frame.f_globals.get("__name__", "").split(".")[0]
        if package not in ("onepass", "torch"):
            above = frame.f_back
            return package == "deepspeed" and above is not None and above.f_code is apply
    return False


def _unchanged(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    head, graph = lazy.onepass_head, True
    if not torch.is_grad_enabled() and lazy.requires_grad:
        graph = _for_ddp()
    return make(head, lazy.dtype, lazy._normalized, ungraphed=not graph)


def _for_ddp() -> bool:
    """Whether DistributedDataParallel clones its outputs, as it does inside an autograd.Function
    where gradients are off; RuntimeError where it waits for gradients that never come."""
    for frame in frames():
        module = frame.f_globals.get("__name__", "")
        if module == "torch.nn.parallel.distributed" and "ddp_weakref" in frame.f_locals:
            ddp = frame.f_locals["ddp_weakref"]()
            outputs = frame.f_locals.get("inputs", ())
            others = [t for t in outputs if isinstance(t, Tensor) and not is_lazy(t)]
            if getattr(ddp, "static_graph", False) and not any(t.requires_grad for t in others):
                raise RuntimeError(
                    "DistributedDataParallel(static_graph=True) waits for a gradient through the "
                    "model's outputs, and LazyLogits pass none: return the loss too, or leave "
                    "static_graph away"
                )
            return True
        if module.split(".")[0] not in ("onepass", "torch"):
            return False
    return False


def _hooked(func: Any, lazy: Any, hook: Any) -> Any:
    """FSDP asks when the backward starts: its hooks go to the hidden states. DeepSpeed asks it too,
    and scales. Others ask for the gradient of the logits, which is never made."""
    of = getattr(hook, "func", hook)
    of = getattr(of, "__func__", of)
    if getattr(of, "__module__", "").startswith("deepspeed."):
        lazy.onepass_head, handles = hooked(lazy.onepass_head, hook)
        return handles
    if not getattr(of, "__module__", "").startswith("torch.distributed."):
        raise RuntimeError(
            "register_hook wants the gradient of LazyLogits, which is never made: materialize() "
            "first and use what it gives"
        )
    head = lazy.onepass_head
    place = next((states for states in head.hidden if states.grad_fn is not None), None)
    if place is not None:
        return place.register_hook(hook)
    # A hook on a leaf would outlive the step: on aliases, then.
    hidden, weight = (tuple(t.view_as(t) for t in part) for part in (head.hidden, head.weight))
    lazy.onepass_head = head._replace(hidden=hidden, weight=weight)
    return next(t for t in (*hidden, *weight) if t.requires_grad).register_hook(hook)


def _new(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """new_zeros and its kin want no more than the dtype and the device."""
    return func(_stand_in(lazy), *args, **kwargs)


def _alike(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """zeros_like and its kin want the shape besides."""
    return func(_stand_in(lazy, 1).expand(lazy.shape), *args, **kwargs)


def _stand_in(lazy: LazyLogits, size: int = 0) -> Tensor:
    return torch.empty(size, dtype=lazy.dtype, device=lazy.device)


# ---------------------------------------------------------------- what happens to logits


def cast(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """float(), to(dtype) ...: the logits are made in the hidden states' dtype and then cast."""
    args = tuple(_stand_in(arg) if is_lazy(arg) else arg for arg in args)
    if not is_lazy(lazy):
        return func(lazy, *args, **kwargs)
    probe = func(_stand_in(lazy), *args, **kwargs)
    if not isinstance(probe, Tensor):  # type()
        return probe
    if probe.device != lazy.device or not probe.dtype.is_floating_point:
        return NotImplemented
    return make(lazy.onepass_head, probe.dtype, lazy._normalized)


def _tanh_handler(func: Any, lazy: Any) -> Any:
    capped_already = lazy.onepass_head.softcap or lazy._normalized
    fits = not capped_already and lazy.onepass_head.scale
    return softcapped(lazy) if fits else NotImplemented


def _times(func: Any, a: Any, other: Any) -> Any:
    lazy, other = (a, other) if is_lazy(a) else (other, a)
    factor = number(other)
    if lazy._normalized:
        return _renormalized(lazy, factor)
    if factor is not None:
        return scaled(lazy, factor) if factor else NotImplemented
    return _by_rows(lazy, other, torch.mul)


def _renormalized(lazy: LazyLogits, factor: float | None) -> Any:
    if not factor:
        return NotImplemented
    return make(lazy.onepass_head, lazy.dtype, lazy._normalized * factor)


def _divided(func: Any, lazy: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or not is_lazy(lazy):
        return NotImplemented
    divisor = number(other)
    if lazy._normalized:
        return _renormalized(lazy, 1 / divisor if divisor else None)
    if divisor is not None:
        return scaled(lazy, 1 / divisor) if divisor else NotImplemented
    return _by_rows(lazy, other, torch.div)


def _by_rows(lazy: LazyLogits, other: Any, change: Callable[..., Tensor]) -> Any:
    """Times or divided by one number a row, [..., 1], as temperatures are."""
    fits = isinstance(other, Tensor) and not is_lazy(other) and other.is_floating_point()
    if not fits or lazy.onepass_head.softcap or (other.dim() and other.shape[-1] != 1):
        return NotImplemented
    if other.dim() > lazy.dim() or other.device != lazy.device:
        return NotImplemented
    dtype = torch.result_type(_stand_in(lazy), other)
    shard = lazy.onepass_head.shard
    if shard is not None:  # the hidden states' gradients are summed before they get here
        other = summed_gradient(other, shard.group)
    lazy = _on_rows(_with_bias_as_term(lazy), lambda h: change(h, other).to(h.dtype))
    return lazy if lazy.dtype == dtype else make(lazy.onepass_head, dtype)


def _with_bias_as_term(lazy: LazyLogits) -> LazyLogits:
    """The bias as one more hidden state that is 1 everywhere."""
    head = lazy.onepass_head
    if head.bias is None:
        return lazy
    one = head.hidden[0].new_ones(*lazy.shape[:-1], 1)
    weight = (*head.weight, head.bias[:, None])
    return with_head(lazy, hidden=(*head.hidden, one), weight=weight, bias=None)


def _plus(func: Any, a: Any, other: Any, *, alpha: float = 1) -> Any:
    a, b = (other, a) if func in REVERSED else (a, other)
    factor = number(alpha)
    if not factor:
        return NotImplemented
    sign = -factor if func in MINUS else factor
    if is_lazy(a) and is_lazy(b):
        if a._normalized and b._normalized:
            return difference(a, _renormalized(b, sign))
        return _summed(a, b, sign)
    if is_lazy(a) and sign == -1 and _is_own_lse(a, b):
        return make(a.onepass_head, torch.promote_types(a.dtype, b.dtype), normalized=1)
    if is_lazy(b):
        return _plus_bias(scaled(b, sign), a)
    return _plus_bias(a, b if sign == 1 else b * sign)


def _summed(a: LazyLogits, b: LazyLogits, sign: float) -> Any:
    """The terms of both, where neither is capped yet."""
    left, right = a.onepass_head, b.onepass_head
    uncapped = not (left.softcap or right.softcap or a._normalized or b._normalized)
    if (
        not uncapped
        or not alike(left.shard, right.shard)
        or a.shape != b.shape
        or a.device != b.device
    ):
        return NotImplemented
    left.check_weights()
    right.check_weights()
    wider = left if _width(left) >= _width(right) else right
    dtype = wider.hidden[0].dtype

    def terms(head: Head, factor: float) -> Head:
        head = _in_dtype(head, dtype)
        by = head.scale * factor
        if by == 1:
            return head
        bias = None if head.bias is None else head.bias * by
        return head._replace(hidden=tuple(h * by for h in head.hidden), bias=bias, scale=1.0)

    left, right = terms(left, 1), terms(right, sign)
    biases = [t for t in (left.bias, right.bias) if t is not None]
    hidden = (*left.hidden, *right.hidden)
    head = left._replace(
        hidden=hidden,
        states=versions_of(hidden),
        weight=(*left.weight, *right.weight),
        bias=sum(biases[1:], biases[0]) if biases else None,
        versions=(*left.versions, *right.versions),
    )
    return make(head, torch.promote_types(a.dtype, b.dtype))


def _width(head: Head) -> int:
    return sum(w.shape[1] for w in head.weight)


def _in_dtype(head: Head, dtype: torch.dtype) -> Head:
    """All terms in one dtype. A sum's is that of its larger product: a float32 adapter joins a
    bfloat16 head without a float32 copy of it."""
    if head.hidden[0].dtype == dtype:
        return head
    return head._replace(
        hidden=tuple(h.to(dtype) for h in head.hidden),
        weight=tuple(w.to(dtype) for w in head.weight),
        bias=None if head.bias is None else head.bias.to(dtype),
    )


def _plus_bias(lazy: LazyLogits, other: Any) -> Any:
    """Plus one number a column: [V], or a row of them as BART's final_logits_bias, [1, V]."""
    head = lazy.onepass_head
    if not isinstance(other, Tensor) or other.shape[-1:] != lazy.shape[-1:]:
        return NotImplemented
    if other.numel() != lazy.shape[-1] or other.dim() > lazy.dim():
        return NotImplemented
    fits = other.dtype == head.hidden[0].dtype and other.device == lazy.device
    if head.softcap or lazy._normalized or not fits or not head.scale:
        return NotImplemented
    other = other.reshape(-1) / head.scale
    if head.shard is not None:
        if other.requires_grad:  # of which each rank would find the gradient of its own columns
            return NotImplemented
        other = head.shard.columns(other)
    return with_head(lazy, bias=other if head.bias is None else head.bias + other)


def _negated(func: Any, lazy: Any) -> Any:
    return _renormalized(lazy, -1.0) if lazy._normalized else scaled(lazy, -1.0)


# ---------------------------------------------------------------- what a loss asks


def _fact(lazy: LazyLogits, fact: str, **given: Any) -> Tensor:
    values: Tensor = getattr(vocab_stats(lazy, want=(fact,), **given), fact)
    return values


def _logsumexp(func: Any, lazy: Any, dim: Any, keepdim: bool = False) -> Any:
    if not is_lazy(lazy) or not over_vocabulary(lazy, dim) or lazy._normalized:
        return NotImplemented
    lse: Any = kept_dimension(_fact(lazy, "lse").to(_wide_dtype(lazy)), keepdim)
    if lse.is_inference():
        with torch.inference_mode(False):  # which counts how often it is written to
            lse = lse.clone()
    lse.onepass_of = (lse._version, *_made_of(lazy))
    return lse


def _made_of(lazy: LazyLogits) -> tuple[list[Any], tuple[Any, ...]]:
    """The parts of its head, held weakly, and its numbers."""
    head = lazy.onepass_head
    parts = [t for t in (*head.hidden, *head.weight, head.bias) if t is not None]
    versions = tuple(version for _, version in head.versions)
    numbers = (head.softcap, head.scale, head.states, versions)
    return [weakref.ref(t) for t in parts], numbers


def _is_own_lse(lazy: LazyLogits, other: Any) -> bool:
    """Whether `other` is this very lazy tensor's logsumexp, to be subtracted from each column."""
    of = getattr(other, "onepass_of", None)
    if of is None or other.shape != (*lazy.shape[:-1], 1) or other._version != of[0]:
        return False
    if torch.is_grad_enabled() and other.requires_grad != lazy.requires_grad:
        return False
    parts, numbers = _made_of(lazy)
    alike = len(parts) == len(of[1]) and numbers == of[2]
    return alike and all(a() is b() for a, b in zip(parts, of[1], strict=True))


def _argmax(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None or not over_vocabulary(lazy, dim) or lazy._normalized < 0:
        return NotImplemented
    return kept_dimension(_fact(plain(lazy), "argmax"), keepdim)


def _max(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    """The largest element of a row and its column, in two passes."""
    columns = _argmax(func, lazy, dim, keepdim=True)
    if columns is NotImplemented:
        return NotImplemented
    values = lazy.gather(-1, columns)
    if not keepdim:
        values, columns = values.squeeze(-1), columns.squeeze(-1)
    return torch.return_types.max((values, columns))


def _amax(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if lazy.requires_grad and torch.is_grad_enabled():  # ties share torch's gradient
        return NotImplemented
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    found = _max(func, lazy, dims[0], keepdim) if len(dims) == 1 else NotImplemented
    return found if found is NotImplemented else found[0]


def _clamped(func: Any, lazy: Any, min: Any = None, max: Any = None) -> Any:
    """From below at the dtype's lowest number, as distributions do before they weigh log p by p: a
    -inf stays one, and p log p is 0 there."""
    lowest = torch.finfo(lazy.dtype).min
    return lazy if max is None and isinstance(min, float) and min <= lowest else NotImplemented


def _equal(func: Any, lazy: Any, other: Any) -> Any:
    """With itself, as distributions look for NaN: a row that holds one has no logsumexp."""
    if lazy is not other:
        return NotImplemented
    finite = _fact(detached(plain(lazy)), "lse").isfinite().all()
    return finite.expand(lazy.shape) if finite else NotImplemented


def _broadcast(func: Any, *tensors: Any) -> Any:
    lazies = [t for t in tensors if is_lazy(t)]
    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    if any(lazy.shape != shape for lazy in lazies):
        return NotImplemented
    return [t if is_lazy(t) else t.expand(shape) for t in tensors]


def log_softmax(func: Any, lazy: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    if dtype is None:
        dtype = next((a for a in args if isinstance(a, torch.dtype)), _wide_dtype(lazy))
    if dim is None or not over_vocabulary(lazy, dim) or lazy._normalized not in (0, 1):
        return NotImplemented
    return make(lazy.onepass_head, dtype, normalized=1)


def _gathered(func: Any, lazy: Any, dim: Any, index: Tensor, **kwargs: Any) -> Any:
    """One column a row: the logit or the log-probability."""
    fits = is_lazy(lazy) and over_vocabulary(lazy, dim) and index.dim() == lazy.dim()
    if not fits or index.shape != (*lazy.shape[:-1], 1):
        return NotImplemented
    fact = "logp" if lazy._normalized else "label_logit"
    if values_checked(index) and ((index < 0) | (index >= lazy.shape[-1])).any():
        raise IndexError(f"gather's index must be in [0, {lazy.shape[-1]}), the vocabulary's size")
    labels = index.squeeze(-1)
    labels = torch.where(labels == IGNORED, -1, labels)  # no row to leave out here: NaN
    values = _fact(plain(lazy), fact, labels=labels).to(lazy.dtype)
    if lazy._normalized not in (0, 1):
        values = values * lazy._normalized
    return values.unsqueeze(-1)


def _summed_over(
    func: Any, lazy: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not is_lazy(lazy) or dim is None or not over_vocabulary(lazy, dim):
        return NotImplemented
    values = _fact(plain(lazy), "logp_sum" if lazy._normalized else "logit_sum")
    if lazy._normalized not in (0, 1):
        values = values * lazy._normalized
    return kept_dimension(values.to(dtype or _wide_dtype(lazy)), keepdim)


def _wide_dtype(lazy: LazyLogits) -> torch.dtype:
    """That of sum, softmax, log_softmax, logsumexp: autocast widens them, but not on a CPU."""
    return lazy.dtype if lazy.device.type == "cpu" else result_dtype(lazy)


def _cross_entropy(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    fits = is_lazy(input) and not input._normalized and input.dim() <= 2
    if not fits or not isinstance(target, Tensor):
        return NotImplemented
    return cross_entropy(input, target, *args, **kwargs).to(result_dtype(input))


def _nll_loss(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    if not is_lazy(input) or input._normalized != 1 or input.dim() > 2:
        return NotImplemented
    return cross_entropy(plain(input), target, *args, **kwargs).to(result_dtype(input))


def _reshape_like(func: Any, lazy: Any, other: Any) -> Any:
    return _reshaped(Tensor.view, lazy, other.shape)


MINUS = {torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, Tensor.__rsub__}
REVERSED = {Tensor.__rsub__, torch.rsub}
MINUS |= REVERSED

# Of rows alone: probabilities and their products do as logits do.
_OF_ROWS: dict[Handler, tuple[Any, ...]] = {
    _reshaped: (
        Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten, Tensor.squeeze,
        torch.squeeze, Tensor.unsqueeze, torch.unsqueeze, Tensor.unflatten, torch.unflatten,
    ),
    _reshape_like: (Tensor.view_as, Tensor.reshape_as),
    _transposed: (Tensor.transpose, torch.transpose, Tensor.swapaxes, torch.swapaxes),
    _split: (
        Tensor.split, torch.split, Tensor.chunk, torch.chunk, Tensor.tensor_split,
        torch.tensor_split,
    ),
    _unbound: (Tensor.unbind, torch.unbind),
    _indexed: (Tensor.__getitem__,),
    _selected: (Tensor.index_select, torch.index_select),
    _detached: (Tensor.detach, torch.detach, Tensor.data.__get__),  # type: ignore[attr-defined]
    _unchanged: (Tensor.contiguous, Tensor.clone, torch.clone),
    cast: (
        Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type,
        Tensor.type_as, Tensor.cpu, Tensor.cuda,
    ),
}  # fmt: skip

_TABLE: dict[Handler, tuple[Any, ...]] = {
    **_OF_ROWS,
    _joined: (torch.cat, torch.concat, torch.concatenate, torch.stack),
    _hooked: (Tensor.register_hook,),
    _alike: (
        torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like,
        torch.zeros_like,
    ),
    _new: (
        Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros,
    ),
    _tanh_handler: (Tensor.tanh, torch.tanh, functional.tanh),
    _times: (
        Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.multiply, torch.multiply,
    ),
    _divided: (
        Tensor.div, torch.div, Tensor.__truediv__, Tensor.divide, torch.divide, Tensor.true_divide,
        torch.true_divide,
    ),
    _plus: (
        Tensor.add, torch.add, Tensor.__add__, Tensor.__radd__, *MINUS,
    ),
    _negated: (Tensor.neg, torch.neg, Tensor.__neg__, torch.negative, Tensor.negative),
    _logsumexp: (Tensor.logsumexp, torch.logsumexp, torch.special.logsumexp),
    _argmax: (Tensor.argmax, torch.argmax),
    _max: (Tensor.max, torch.max),
    _amax: (Tensor.amax, torch.amax),
    _clamped: (Tensor.clamp, torch.clamp),
    _equal: (Tensor.eq, torch.eq, Tensor.__eq__),
    _broadcast: (torch.broadcast_tensors,),
    softmax: (Tensor.softmax, torch.softmax, functional.softmax, torch.special.softmax),
    exp: (Tensor.exp, torch.exp),
    kl_div: (functional.kl_div,),
    log_softmax: (
        Tensor.log_softmax, torch.log_softmax, functional.log_softmax, torch.special.log_softmax,
    ),
    _gathered: (Tensor.gather, torch.gather),
    _summed_over: (Tensor.sum, torch.sum),
    _cross_entropy: (functional.cross_entropy,),
    _nll_loss: (functional.nll_loss,),
}  # fmt: skip
HANDLERS: dict[Any, Handler] = {f: handler for handler, fs in _TABLE.items() for f in fs}
OF_ROWS = {f for fs in _OF_ROWS.values() for f in fs}
