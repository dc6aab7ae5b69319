"""LazyLogits: logits that are not there, only the hidden states and the head that would make them.

A Tensor without storage. What code does to logits before its loss (slicing rows, reshaping, casts,
scaling, a softcap, adding another head's) happens to the hidden states or to a few numbers; the
functions that a loss is made of are served by the statistics of `ops.head`; whatever else is asked
makes the logits, once and audibly.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .losses import cross_entropy
from .ops._check import check_choice, check_floating, check_same_device
from .ops.head import MODES, Head
from .ops.vocab_stats import vocab_stats

_strict: ContextVar[bool] = ContextVar("onepass_strict", default=False)


class MaterializedWarning(UserWarning):
    """Logits were made whole, where something asked for them that no statistic can serve."""


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
        compact: leave rows that do not count out of the products, for one wait for the device;
            without it they are multiplied as zeros, as under the capture of a CUDA graph.
        mode: "auto", "ahead" (gradients are made in the forward, or an error says why not) or
            "recompute" (never: less is held between forward and backward). docs/head.md has the
            table of work and memory.

    Every loss and statistic of this package takes it in the place of logits, and so do
    `torch.nn.functional.cross_entropy`, `log_softmax` followed by `gather` or `nll_loss`,
    `logsumexp`, `argmax` and `gather`. `materialize()` makes the logits.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes or devices that do not fit.
    """

    onepass_head: Head
    _normalized: bool  # they stand for log-probabilities

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
        compact: bool = True,
        mode: str = "auto",
    ) -> LazyLogits:
        check_head(hidden, weight, bias)
        check_choice("mode", mode, MODES)
        options: Any = {"max_slab_bytes": max_slab_bytes, "compact": compact, "mode": mode}
        head = Head((hidden,), (weight,), bias, **options)
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
        return logits.log_softmax(-1) if self._normalized else logits

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
            *(["log_softmax"] if self._normalized else []),
        ]
        inside = ", ".join([terms, *extras])
        return f"LazyLogits({list(self.shape)}, {self.dtype}, {self.device}: {inside})"

    @property
    def requires_grad(self) -> bool:  # type: ignore[override]
        """Whether the logits would: as their hidden states or their head do."""
        head = self.onepass_head
        parts = (*head.hidden, *head.weight, head.bias)
        return any(t.requires_grad for t in parts if t is not None)

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        """That of the hidden states: what a caller's test for a graph wants to see."""
        return next((h.grad_fn for h in self.onepass_head.hidden if h.grad_fn is not None), None)

    @property
    def is_leaf(self) -> bool:  # type: ignore[override]
        return not self.requires_grad

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
        if handler is not None:
            result = handler(func, *args, **kwargs)
            if result is not NotImplemented:
                return result
        return _materialized(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any, **__: Any) -> Any:  # type: ignore[override]
        raise RuntimeError(f"LazyLogits came to {func} below autograd: call materialize() first")


def check_head(hidden: object, weight: object, bias: object) -> None:
    """Raises unless hidden [..., D], weight [V, D] and bias [V] make logits."""
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            "hidden must be [..., D] and weight [V, D]: "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 or weight.shape[1] == 0:
        raise ValueError(f"weight must be [V, D], both above 0: got {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"hidden and weight must have one dtype: got {hidden.dtype} and {weight.dtype}"
        )
    check_same_device("weight", weight, "hidden", hidden)
    if bias is not None:
        check_floating("bias", bias)
        assert isinstance(bias, Tensor)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise ValueError(
                f"bias must be [V] = ({weight.shape[0]},) {weight.dtype}: "
                f"got {tuple(bias.shape)} {bias.dtype}"
            )
        check_same_device("bias", bias, "hidden", hidden)


def _make(head: Head, dtype: torch.dtype, normalized: bool = False) -> LazyLogits:
    first = head.hidden[0]
    shape = (*first.shape[:-1], head.weight[0].shape[0])
    lazy: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        LazyLogits, shape, dtype=dtype, device=first.device
    )
    lazy.onepass_head, lazy._normalized = head, normalized
    made: LazyLogits = lazy
    return made


def _with(lazy: LazyLogits, **changed: Any) -> LazyLogits:
    """The same logits but for what changes in their head."""
    return _make(lazy.onepass_head._replace(**changed), lazy.dtype, lazy._normalized)


def _materialized(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs `func` on the logits themselves, and says so."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    at = _caller()
    said = f"{name} at {at} needs whole logits: they were made. Statistics of onepass do without"
    if _strict.get():
        raise MaterializedError(
            f"{name} at {at} needs whole logits: call materialize(), or leave onepass.strict()"
        )
    warnings.warn(said, MaterializedWarning, stacklevel=3)

    def whole(value: Any) -> Any:
        if isinstance(value, LazyLogits):
            return value.materialize()
        if isinstance(value, (list, tuple)) and any(isinstance(v, LazyLogits) for v in value):
            return type(value)(whole(v) for v in value)
        return value

    return func(*(whole(a) for a in args), **{k: whole(v) for k, v in kwargs.items()})


def _caller() -> str:
    """File and line of the code outside of torch and this package that called."""
    for frame in inspect.stack(context=0)[2:]:
        path = frame.filename.replace("\\", "/")
        if "/onepass/" not in path and "/torch/" not in path:
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown place"


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


def _detached(func: Any, lazy: Any) -> LazyLogits:
    head = lazy.onepass_head
    bias = None if head.bias is None else head.bias.detach()
    weight = tuple(w.detach() for w in head.weight)
    return _with(_on_rows(lazy, torch.detach), weight=weight, bias=bias)


def _unchanged(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    return _with(lazy)


def _new(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """new_zeros and its kin want no more than the dtype and the device."""
    return func(torch.empty(0, dtype=lazy.dtype, device=lazy.device), *args, **kwargs)


# ---------------------------------------------------------------- what happens to logits


def _cast(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """float(), to(dtype) ...: the logits are made in the hidden states' dtype and then cast."""
    probe = func(torch.empty(0, dtype=lazy.dtype, device=lazy.device), *args, **kwargs)
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
        return NotImplemented
    if factor is not None:
        return _scaled(lazy, factor) if factor else NotImplemented
    return _by_rows(lazy, other, torch.mul)


def _divided(func: Any, lazy: Any, other: Any, **kwargs: Any) -> Any:
    if kwargs or not _is_lazy(lazy) or lazy._normalized:
        return NotImplemented
    divisor = _number(other)
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
    if not plain or a.shape != b.shape or left.hidden[0].dtype != right.hidden[0].dtype:
        return NotImplemented

    def terms(head: Head, factor: float) -> Head:
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
    )
    return _make(head, torch.promote_types(a.dtype, b.dtype))


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
    return NotImplemented if lazy._normalized else _scaled(lazy, -1.0)


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
        dtype = next((a for a in args if isinstance(a, torch.dtype)), lazy.dtype)
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
    return _fact(whole, fact, labels=index.squeeze(-1)).to(lazy.dtype).unsqueeze(-1)


def _cross_entropy(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    fits = _is_lazy(input) and not input._normalized and input.dim() <= 2
    if not fits or not isinstance(target, Tensor) or target.is_floating_point():
        return NotImplemented
    return cross_entropy(input, target, *args, **kwargs).to(input.dtype)


def _nll_loss(func: Any, input: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_lazy(input) or not input._normalized or input.dim() > 2:
        return NotImplemented
    whole = _make(input.onepass_head, input.dtype)
    return cross_entropy(whole, target, *args, **kwargs).to(input.dtype)


def _reshape_like(func: Any, lazy: Any, other: Any) -> Any:
    return _reshaped(Tensor.view, lazy, other.shape)


ATTRIBUTES = {
    getattr(Tensor, name).__get__
    for name in (
        "shape", "dtype", "device", "layout", "ndim", "is_nested", "is_sparse", "is_cuda", "is_cpu",
        "is_meta", "is_quantized", "is_mps", "is_xpu", "is_sparse_csr", "is_mkldnn", "itemsize",
        "names", "retains_grad", "output_nr", "grad", "_version", "_backward_hooks",
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
    _detached: (Tensor.detach, torch.detach),
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
    _cross_entropy: (functional.cross_entropy,),
    _nll_loss: (functional.nll_loss,),
}  # fmt: skip
HANDLERS: dict[Any, Handler] = {f: handler for handler, fs in _TABLE.items() for f in fs}
