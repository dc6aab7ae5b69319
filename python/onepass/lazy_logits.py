"""LazyLogits: logits that are not there, only the hidden states and the head that would make them.

A Tensor without storage. What code does to logits before its loss (slicing rows, reshaping, casts,
scaling, a softcap, adding another head's) happens to the hidden states or to a few numbers; the
functions that a loss is made of are served by the statistics of `ops.head`; whatever else is asked
makes the logits, once and audibly.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils import _pytree as pytree

from .losses import cross_entropy
from .ops._check import check_floating, check_same_device
from .ops.head import Head
from .ops.vocab_stats import vocab_stats

_strict: ContextVar[bool] = ContextVar("onepass_strict", default=False)
_warned: set[tuple[str, str]] = set()  # the operation and the caller's line


class MaterializedWarning(UserWarning):
    """Logits were made whole, where something asked for them that no statistic can serve. Said once
    for each operation and line."""


class MaterializedError(RuntimeError):
    """The same under `strict()`."""


@contextlib.contextmanager
def strict(on: bool = True) -> Iterator[None]:
    """Within it, whatever would make the logits whole raises MaterializedError instead."""
    token = _strict.set(on)
    try:
        yield
    finally:
        _strict.reset(token)


class LazyLogits(Tensor):
    """scale * cap(sum_k hidden_k weight_k^T + bias), cap(u) = softcap tanh(u / softcap); [..., V].

    Args:
        hidden: [..., D] hidden states; float32, bfloat16, float16 or float64.
        weight: [V, D] the head's matrix, of the same dtype and device.
        bias: [V].
        softcap: squeezes the logits into (-softcap, softcap); None for no cap.
        scale: multiplies the logits, before the cap.
        temperature: divides them, after it.
        max_slab_bytes: memory for the logits that are there at one time (default: 512 MB on a
            GPU, 64 MB on a CPU).

    Every loss and statistic of this package takes it in the place of logits, and so do
    `torch.nn.functional.cross_entropy`, `log_softmax` followed by `gather` or `nll_loss`,
    `logsumexp`, `argmax` and `gather`. `materialize()` makes the logits.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes or devices that do not fit.
    """

    onepass_head: Head
    _normalized: float  # they stand for log-probabilities times this; 0 where for logits

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        softcap: float | None = None,
        scale: float = 1.0,
        temperature: float = 1.0,
        max_slab_bytes: int | None = None,
    ) -> LazyLogits:
        check_head(hidden, weight, bias)
        written = [t for t in (weight, bias) if t is not None and not t.is_inference()]
        versions = tuple((t, t._version) for t in written)
        head = Head((hidden,), (weight,), bias, max_slab_bytes=max_slab_bytes, versions=versions)
        product = _make(head, hidden.dtype)
        product = _scaled(product, scale)
        if softcap is not None:
            product = _scaled(_tanh(_scaled(product, 1 / softcap)), softcap)
        return _scaled(product, 1 / temperature)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def materialize(self) -> Tensor:
        """The logits (or log-probabilities) themselves, [..., V], differentiable."""
        logits = self.onepass_head.logits().to(self.dtype)
        if not self._normalized:
            return logits
        log_probs = logits.log_softmax(-1)
        return log_probs if self._normalized == 1 else log_probs * self._normalized

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        head = self.onepass_head
        terms = " + ".join(
            f"hidden{list(h.shape)} weight{list(w.shape)}^T"
            for h, w in zip(head.hidden, head.weight, strict=True)
        )
        extras = [
            *(["bias"] if head.bias is not None else []),
            *([f"softcap={head.softcap:g}"] if head.softcap else []),
            *([f"scale={head.scale:g}"] if head.scale != 1 else []),
            *(["log_softmax"] if self._normalized == 1 else []),
            *([f"{self._normalized:g} log_softmax"] if self._normalized not in (0, 1) else []),
        ]
        inside = ", ".join([terms, *extras])
        return f"LazyLogits({list(self.shape)}, {self.dtype}, {self.device}: {inside})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in ATTRIBUTES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        handler = HANDLERS.get(func)
        if handler is not None and "out" not in kwargs:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _materialized(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Collectives ask nobody above autograd: evaluation gathers logits over processes.
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            return _materialized(func, args, kwargs or {})
        raise RuntimeError(f"LazyLogits came to {func} below autograd: call materialize() first")


class _Place(torch.autograd.Function):
    """The place of LazyLogits in autograd's graph, after hidden states and head: callers test it,
    and DistributedDataParallel looks there for parameters that a step does not use."""

    @staticmethod
    def forward(ctx: Any, make: Callable[[], Tensor], *parts: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.n_parts = len(parts)
        return make()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if grads == (None,):  # DDP passes on what it got for each output, here nothing
            return (None,) * (1 + ctx.n_parts)
        raise RuntimeError(
            "a gradient came to LazyLogits by another way than their statistics: call "
            "materialize() before the operation it came from"
        )


def check_head(
    hidden: object,
    weight: object,
    bias: object,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
) -> None:
    """Raises unless hidden [..., D], weight [V, D] and bias [V] make logits; `names` are those of
    the caller's arguments."""
    of_hidden, of_weight, of_bias = names
    check_floating(of_hidden, hidden)
    check_floating(of_weight, weight)
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{of_hidden} must be [..., D] and {of_weight} [V, D]: "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"{of_weight} must be [V, D], both above 0: got {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"{of_hidden} and {of_weight} must have one dtype: "
            f"got {hidden.dtype} and {weight.dtype}"
        )
    check_same_device(of_weight, weight, of_hidden, hidden)
    if bias is not None:
        check_floating(of_bias, bias)
        assert isinstance(bias, Tensor)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"{of_bias} must be [V] = ({weight.shape[0]},) {weight.dtype}: "
                f"got {tuple(bias.shape)} {bias.dtype}"
            )
        check_same_device(of_bias, bias, of_hidden, hidden)


def _make(
    head: Head, dtype: torch.dtype, normalized: float = 0.0, *, ungraphed: bool = True
) -> LazyLogits:
    """LazyLogits of a head; outside of a graph where gradients are off, as logits would be, unless
    `ungraphed` is False."""
    first = head.hidden[0]
    shape = (*first.shape[:-1], head.weight[0].shape[0])

    def wrapper() -> Tensor:
        empty: Tensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            LazyLogits, shape, dtype=dtype, device=first.device
        )
        return empty

    parts = [t for t in (*head.hidden, *head.weight, head.bias) if t is not None]
    graph = any(t.requires_grad for t in parts)
    lazy: Any
    if graph and torch.is_grad_enabled():
        lazy = _Place.apply(wrapper, *parts)  # type: ignore[no-untyped-call]
    else:
        lazy = wrapper()
        if graph and ungraphed:
            head = _detached_head(head)
    lazy.onepass_head, lazy._normalized = head, float(normalized)
    made: LazyLogits = lazy
    return made


def _detached_head(head: Head) -> Head:
    return head._replace(
        hidden=tuple(h.detach() for h in head.hidden),
        weight=tuple(w.detach() for w in head.weight),
        bias=None if head.bias is None else head.bias.detach(),
    )


def _with(lazy: LazyLogits, **changed: Any) -> LazyLogits:
    """The same logits but for what changes in their head."""
    return _make(lazy.onepass_head._replace(**changed), lazy.dtype, lazy._normalized)


def _materialized(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs `func` on the logits themselves, and says so."""
    name = getattr(func, "__name__", str(func))
    if name in ("__get__", "__set__"):
        name = getattr(getattr(func, "__self__", None), "__name__", name)
        if func.__name__ == "__set__":
            raise TypeError(f"LazyLogits have no {name} to set: call materialize() first")
    _check_out_of_place(name, args, kwargs)
    at, advice = _caller()
    if _strict.get():
        raise MaterializedError(
            f"{name} at {at} needs whole logits{advice}: call materialize(), or leave "
            "onepass.strict()"
        )
    if (name, at) not in _warned:
        _warned.add((name, at))
        said = f"{name} at {at} needs whole logits: they were made{advice}. "
        warnings.warn(said + "Statistics of onepass do without", MaterializedWarning, stacklevel=3)

    def whole(value: Any) -> Any:
        return value.materialize() if isinstance(value, LazyLogits) else value

    args, kwargs = pytree.tree_map(whole, (args, kwargs))
    return func(*args, **kwargs)


OUT_OF_PLACE = {
    "__setitem__": "torch.where",
    "__ipow__": "pow",
    "__ifloordiv__": "floor_divide",
    "copy_": "the other tensor",
    "fill_": "torch.full_like",
    "zero_": "torch.zeros_like",
}


def _check_out_of_place(name: str, args: Any, kwargs: dict[str, Any]) -> None:
    """Raises where the call would write into LazyLogits: it would write into a copy."""
    if name == "out" or any(_is_lazy(t) for t in pytree.tree_leaves(kwargs.get("out"))):
        raise RuntimeError(f"{name}(out=...) cannot write into LazyLogits: leave out= away")
    writes = name in OUT_OF_PLACE or (name.endswith("_") and not name.endswith("__"))
    if not args or not _is_lazy(args[0]) or not (writes or kwargs.get("inplace") is True):
        return
    mend = OUT_OF_PLACE.get(name) or name.removesuffix("_")
    if not writes:
        mend = f"{name}(..., inplace=False)"
    raise RuntimeError(
        f"{name} cannot write into LazyLogits, which hold no logits: use the out-of-place {mend}, "
        "or materialize() first"
    )


def _frames() -> Iterator[FrameType]:
    """Those that called, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller() -> tuple[str, str]:
    """File and line of the code outside of torch and this package that called, and what to do about
    it where that is known."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("onepass", "torch"):
            advice = ""
            if module.startswith("peft."):
                advice = " (was the adapter added after lazy_head? Call onepass.lazy_head again)"
            return f"{frame.f_code.co_filename}:{frame.f_lineno}", advice
    return "an unknown place", ""


# ---------------------------------------------------------------- what happens to rows

Handler = Callable[..., Any]


def _is_lazy(value: Any) -> bool:
    return isinstance(value, LazyLogits)


def _on_rows(lazy: LazyLogits, change: Callable[[Tensor], Tensor]) -> LazyLogits:
    return _with(lazy, hidden=tuple(change(h) for h in lazy.onepass_head.hidden))


def _reshaped(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """view, reshape, flatten, squeeze ...: whatever leaves the vocabulary last and whole."""
    if not _is_lazy(lazy):
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
    front = [d + lazy.dim() if d < 0 else d for d in dims]
    return None if any(d >= lazy.dim() - 1 for d in front) else front


def _transposed(func: Any, lazy: Any, *dims: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_lazy(lazy) or not all(isinstance(d, int) for d in dims):
        return NotImplemented
    front = _row_dimensions(lazy, dims)
    return NotImplemented if front is None else _on_rows(lazy, lambda h: func(h, *front))


def _split(func: Any, lazy: Any, parts: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    parts = kwargs.get("chunks", kwargs.get("split_size_or_sections", parts))
    parts = kwargs.get("split_size", parts)
    front = _row_dimensions(lazy, [dim]) if _is_lazy(lazy) else None
    if front is None:
        return NotImplemented
    pieces = zip(*(func(h, parts, front[0]) for h in lazy.onepass_head.hidden), strict=True)
    return tuple(_with(lazy, hidden=piece) for piece in pieces)


def _unbound(func: Any, lazy: Any, dim: int = 0) -> Any:
    front = _row_dimensions(lazy, [dim])
    if front is None:
        return NotImplemented
    pieces = zip(*(h.unbind(front[0]) for h in lazy.onepass_head.hidden), strict=True)
    return tuple(_with(lazy, hidden=piece) for piece in pieces)


def _same_head(lazies: Sequence[Any]) -> bool:
    def of(lazy: LazyLogits) -> tuple[Any, ...]:
        head = lazy.onepass_head
        parts = (*(id(t) for t in head.weight), id(head.bias))
        return (*parts, *head[3:], lazy._normalized, lazy.dtype)

    return all(_is_lazy(lazy) for lazy in lazies) and len({of(lazy) for lazy in lazies}) == 1


def _joined(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    """cat and stack of rows of one head."""
    if kwargs or not _same_head(tensors):
        return NotImplemented
    extra = 1 if func is torch.stack else 0
    dim = dim + tensors[0].dim() + extra if dim < 0 else dim
    if dim >= tensors[0].dim() - 1 + extra:
        return NotImplemented
    states = zip(*(lazy.onepass_head.hidden for lazy in tensors), strict=True)
    return _with(tensors[0], hidden=tuple(func(parts, dim) for parts in states))


def _indexed(func: Any, lazy: Any, index: Any) -> Any:
    """lazy[index]: rows, and slices of the vocabulary."""
    if not _is_lazy(lazy):
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
        if lazy._normalized:
            return NotImplemented
        head = lazy.onepass_head
        bias = None if head.bias is None else head.bias[columns]
        lazy = _with(lazy, weight=tuple(w[columns] for w in head.weight), bias=bias)
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
    return _make(_detached_head(lazy.onepass_head), lazy.dtype, lazy._normalized)


def _unchanged(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    head, graph = lazy.onepass_head, True
    if not torch.is_grad_enabled() and lazy.requires_grad:
        graph = _for_ddp()
    return _make(head, lazy.dtype, lazy._normalized, ungraphed=not graph)


def _for_ddp() -> bool:
    """Whether DistributedDataParallel clones its outputs, as it does inside an autograd.Function
    where gradients are off; RuntimeError where it waits for gradients that never come."""
    for frame in _frames():
        module = frame.f_globals.get("__name__", "")
        if module == "torch.nn.parallel.distributed" and "ddp_weakref" in frame.f_locals:
            ddp = frame.f_locals["ddp_weakref"]()
            outputs = frame.f_locals.get("inputs", ())
            others = [t for t in outputs if isinstance(t, Tensor) and not _is_lazy(t)]
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
    """FSDP asks when the backward starts: its hooks go to the hidden states. Others ask for the
    gradient of the logits, which is never made."""
    of = getattr(hook, "func", hook)
    of = getattr(of, "__func__", of)
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


def _cast(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """float(), to(dtype) ...: the logits are made in the hidden states' dtype and then cast."""
    args = tuple(_stand_in(arg) if _is_lazy(arg) else arg for arg in args)
    if not _is_lazy(lazy):
        return func(lazy, *args, **kwargs)
    probe = func(_stand_in(lazy), *args, **kwargs)
    if not isinstance(probe, Tensor):  # type()
        return probe
    if probe.device != lazy.device or not probe.dtype.is_floating_point:
        return NotImplemented
    return _make(lazy.onepass_head, probe.dtype, lazy._normalized)


def _scaled(lazy: LazyLogits, factor: float) -> LazyLogits:
    return lazy if factor == 1 else _with(lazy, scale=lazy.onepass_head.scale * factor)


def _tanh(lazy: LazyLogits) -> LazyLogits:
    """tanh(s u) is the cap 1 / |s|, scaled back by s."""
    scale = lazy.onepass_head.scale
    return _with(lazy, softcap=1 / abs(scale), scale=scale)


def _tanh_handler(func: Any, lazy: Any) -> Any:
    capped_already = lazy.onepass_head.softcap or lazy._normalized
    return NotImplemented if capped_already else _tanh(lazy)


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def _times(func: Any, a: Any, b: Any) -> Any:
    lazy, other = (a, b) if _is_lazy(a) else (b, a)
    factor = _number(other)
    if lazy._normalized:
        return _renormalized(lazy, factor)
    if factor is not None:
        return _scaled(lazy, factor) if factor else NotImplemented
    return _by_rows(lazy, other, torch.mul)


def _renormalized(lazy: LazyLogits, factor: float | None) -> Any:
    if not factor:
        return NotImplemented
    return _make(lazy.onepass_head, lazy.dtype, lazy._normalized * factor)


def _divided(func: Any, lazy: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_lazy(lazy):
        return NotImplemented
    divisor = _number(other)
    if lazy._normalized:
        return _renormalized(lazy, 1 / divisor if divisor else None)
    if divisor is not None:
        return _scaled(lazy, 1 / divisor) if divisor else NotImplemented
    return _by_rows(lazy, other, torch.div)


def _by_rows(lazy: LazyLogits, other: Any, change: Callable[..., Tensor]) -> Any:
    """Times or divided by one number a row, [..., 1], as temperatures are."""
    fits = isinstance(other, Tensor) and not _is_lazy(other) and other.is_floating_point()
    if not fits or lazy.onepass_head.softcap or (other.dim() and other.shape[-1] != 1):
        return NotImplemented
    if other.dim() > lazy.dim() or other.device != lazy.device:
        return NotImplemented
    lazy = _with_bias_as_term(lazy)
    return _on_rows(lazy, lambda h: change(h, other).to(h.dtype))


def _with_bias_as_term(lazy: LazyLogits) -> LazyLogits:
    """The bias as one more hidden state that is 1 everywhere."""
    head = lazy.onepass_head
    if head.bias is None:
        return lazy
    one = head.hidden[0].new_ones(*lazy.shape[:-1], 1)
    weight = (*head.weight, head.bias[:, None])
    return _with(lazy, hidden=(*head.hidden, one), weight=weight, bias=None)


def _plus(func: Any, a: Any, b: Any, *, alpha: float = 1) -> Any:
    if func in REVERSED:
        a, b = b, a
    sign = alpha * (-1 if func in MINUS else 1)
    if _is_lazy(a) and _is_lazy(b):
        return _summed(a, b, sign)
    if _is_lazy(b):
        return _plus_bias(_scaled(b, sign), a)
    return _plus_bias(a, b if sign == 1 else b * sign)


def _summed(a: LazyLogits, b: LazyLogits, sign: float) -> Any:
    """The terms of both, where neither is capped yet."""
    left, right = a.onepass_head, b.onepass_head
    plain = not (left.softcap or right.softcap or a._normalized or b._normalized)
    if not plain or a.shape != b.shape or a.device != b.device:
        return NotImplemented
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
    head = left._replace(
        hidden=(*left.hidden, *right.hidden),
        weight=(*left.weight, *right.weight),
        bias=sum(biases[1:], biases[0]) if biases else None,
        versions=(*left.versions, *right.versions),
    )
    return _make(head, torch.promote_types(a.dtype, b.dtype))


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
    """Plus one number a column."""
    head = lazy.onepass_head
    if not isinstance(other, Tensor) or other.shape != lazy.shape[-1:]:
        return NotImplemented
    fits = other.dtype == head.hidden[0].dtype and other.device == lazy.device
    if head.softcap or lazy._normalized or not fits:
        return NotImplemented
    other = other / head.scale
    return _with(lazy, bias=other if head.bias is None else head.bias + other)


def _negated(func: Any, lazy: Any) -> Any:
    return _renormalized(lazy, -1.0) if lazy._normalized else _scaled(lazy, -1.0)


# ---------------------------------------------------------------- what a loss asks


def _fact(lazy: LazyLogits, fact: str, **given: Any) -> Tensor:
    values: Tensor = getattr(vocab_stats(lazy, want=(fact,), **given), fact)
    return values


def _over_vocabulary(lazy: LazyLogits, dim: Any) -> bool:
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return len(dims) == 1 and dims[0] in (-1, lazy.dim() - 1)


def _kept_dimension(values: Tensor, keepdim: bool) -> Tensor:
    return values.unsqueeze(-1) if keepdim else values


def _logsumexp(func: Any, lazy: Any, dim: Any, keepdim: bool = False) -> Any:
    if not _is_lazy(lazy) or not _over_vocabulary(lazy, dim) or lazy._normalized:
        return NotImplemented
    return _kept_dimension(_fact(lazy, "lse").to(lazy.dtype), keepdim)


def _argmax(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    if dim is None or not _over_vocabulary(lazy, dim):
        return NotImplemented
    return _kept_dimension(_fact(lazy, "argmax"), keepdim)


def _log_softmax(func: Any, lazy: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    dtype = kwargs.get("dtype")
    if dtype is None:
        dtype = next((a for a in args if isinstance(a, torch.dtype)), _result_dtype(lazy))
    if dim is None or not _over_vocabulary(lazy, dim) or lazy._normalized:
        return NotImplemented
    return _make(lazy.onepass_head, dtype, normalized=True)


def _gathered(func: Any, lazy: Any, dim: Any, index: Tensor, **kwargs: Any) -> Any:
    """One column a row: the logit or the log-probability."""
    fits = _is_lazy(lazy) and _over_vocabulary(lazy, dim) and index.dim() == lazy.dim()
    if not fits or index.shape != (*lazy.shape[:-1], 1):
        return NotImplemented
    fact = "logp" if lazy._normalized else "label_logit"
    whole = _make(lazy.onepass_head, lazy.dtype)
    values = _fact(whole, fact, labels=index.squeeze(-1)).to(lazy.dtype)
    if lazy._normalized not in (0, 1):
        values = values * lazy._normalized
    return values.unsqueeze(-1)


def _summed_over(
    func: Any, lazy: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    if not _is_lazy(lazy) or dim is None or not _over_vocabulary(lazy, dim):
        return NotImplemented
    whole = _make(lazy.onepass_head, lazy.dtype)
    values = _fact(whole, "logp_sum" if lazy._normalized else "logit_sum")
    if lazy._normalized not in (0, 1):
        values = values * lazy._normalized
    return _kept_dimension(values.to(dtype or _result_dtype(lazy)), keepdim)


def _result_dtype(lazy: LazyLogits) -> torch.dtype:
    """That of a loss of these logits; float32 under autocast, as torch's."""
    if lazy.dtype.itemsize < 4 and torch.is_autocast_enabled(lazy.device.type):
        return torch.float32
    return lazy.dtype


def _cross_entropy(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    fits = _is_lazy(input) and not input._normalized and input.dim() <= 2
    if not fits or not isinstance(target, Tensor):
        return NotImplemented
    return cross_entropy(input, target, *args, **kwargs).to(_result_dtype(input))


def _nll_loss(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_lazy(input) or input._normalized != 1 or input.dim() > 2:
        return NotImplemented
    whole = _make(input.onepass_head, input.dtype)
    return cross_entropy(whole, target, *args, **kwargs).to(_result_dtype(input))


def _reshape_like(func: Any, lazy: Any, other: Any) -> Any:
    return _reshaped(Tensor.view, lazy, other.shape)


ATTRIBUTES = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "is_nested", "is_sparse", "is_cuda", "is_cpu",
        "is_meta", "is_quantized", "is_mps", "is_xpu", "is_sparse_csr", "is_mkldnn", "itemsize",
        "names", "retains_grad", "output_nr", "grad", "_version", "_backward_hooks", "_base",
        "requires_grad", "grad_fn", "is_leaf", "nbytes",
    )
    if hasattr(Tensor, name)
}  # fmt: skip
ATTRIBUTES |= {
    Tensor.dim, Tensor.ndimension, Tensor.size, Tensor.numel, Tensor.nelement, Tensor.__len__,
    Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.is_contiguous,
    Tensor.get_device, Tensor.is_inference, Tensor.is_signed, torch.is_floating_point,
    torch.is_complex, torch.numel, Tensor.stride, Tensor.__hash__,
}  # fmt: skip
MINUS = {torch.sub, torch.subtract, Tensor.sub, Tensor.subtract, Tensor.__sub__, Tensor.__rsub__}
REVERSED = {Tensor.__rsub__, torch.rsub}
MINUS |= REVERSED

_TABLE: dict[Handler, tuple[Any, ...]] = {
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
    _joined: (torch.cat, torch.concat, torch.concatenate, torch.stack),
    _indexed: (Tensor.__getitem__,),
    _selected: (Tensor.index_select, torch.index_select),
    _detached: (Tensor.detach, torch.detach, Tensor.data.__get__),  # type: ignore[attr-defined]
    _hooked: (Tensor.register_hook,),
    _alike: (
        torch.empty_like, torch.full_like, torch.ones_like, torch.rand_like, torch.randn_like,
        torch.zeros_like,
    ),
    _unchanged: (Tensor.contiguous, Tensor.clone, torch.clone),
    _new: (
        Tensor.new_empty, Tensor.new_full, Tensor.new_ones, Tensor.new_tensor, Tensor.new_zeros,
    ),
    _cast: (
        Tensor.to, Tensor.float, Tensor.double, Tensor.half, Tensor.bfloat16, Tensor.type,
        Tensor.type_as, Tensor.cpu, Tensor.cuda,
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
    _log_softmax: (
        Tensor.log_softmax, torch.log_softmax, functional.log_softmax, torch.special.log_softmax,
    ),
    _gathered: (Tensor.gather, torch.gather),
    _summed_over: (Tensor.sum, torch.sum),
    _cross_entropy: (functional.cross_entropy,),
    _nll_loss: (functional.nll_loss,),
}  # fmt: skip
HANDLERS: dict[Any, Handler] = {f: handler for handler, fs in _TABLE.items() for f in fs}
