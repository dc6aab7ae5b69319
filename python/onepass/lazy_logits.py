"""LazyLogits: logits that are not there, only the hidden states and the head that would make them.

A Tensor without storage. What code does to logits before its loss (slicing rows, reshaping, casts,
scaling, a softcap, adding another head's) happens to the hidden states or to a few numbers; the
functions that a loss is made of are served by the statistics of `ops.head`; whatever else is asked
makes the logits, once and audibly.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .ops._check import check_choice, check_floating, check_number, check_same_device
from .ops._dtensor import is_dtensor
from .ops._together import all_refuse, refused_by_all
from .ops.head import MODES, Head
from .sharded_head import own_part
from .zero3 import held, is_released, through

GATHER = "gather it first (weight.full_tensor(), deepspeed.zero.GatheredParameters)"
_strict: ContextVar[bool] = ContextVar("onepass_strict", default=False)
_warned: set[tuple[str, str]] = set()  # the operation and the caller's line
Handler = Callable[..., Any]

# The other names that torch takes its arguments by.
SYNONYMS = {"axis": "dim", "keepdims": "keepdim", "x2": "other"}
FIRST = ("input", "self", "tensor", "tensors", "x", "a", "x1")


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


class Lazy(Tensor):
    """A tensor without storage, which knows how to make what it stands for."""

    def materialize(self) -> Tensor:
        raise NotImplementedError

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # Collectives ask nobody above autograd: evaluation gathers logits over processes.
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            return materialized(func, args, kwargs or {})
        raise RuntimeError(
            f"{cls.__name__} came to {func} below autograd: call materialize() first"
        )


class LazyLogits(Lazy):
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
        process_group: `weight` [V_r, D] and `bias` [V_r] are this rank's part of a head that the
            group's ranks hold one after the other; all of them have the same hidden states (whose
            gradient is summed over them) and get the same facts. A weight that is a DTensor,
            Shard(0), needs no group.
        vocab_offset: the token id of this rank's first row, to be checked; None: where the ranks
            before it end.
        mesh_dim: the name or number of the DTensor's mesh dimension that must be the sharded one.

    Every loss and statistic of this package takes it in the place of logits, and so do
    `torch.nn.functional.cross_entropy`, `log_softmax` followed by `gather` or `nll_loss`,
    `logsumexp`, `argmax` and `gather`. `materialize()` makes the logits.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes, devices or numbers that do not fit;
        on every rank of a group alike where their parts do not make one head.
    """

    _head: Head
    _passing = False  # through an autograd.Function of DeepSpeed's
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
        compact: bool = True,
        mode: str = "auto",
        process_group: Any = None,
        vocab_offset: int | None = None,
        mesh_dim: str | int | None = None,
    ) -> LazyLogits:
        given, where = (hidden, weight, bias), (process_group, vocab_offset, mesh_dim)
        (hidden, weight, bias), shard = own_part(given, *where, bool(compact), check_part)
        with all_refuse(shard if compact else None, weight):  # who uses the logits would wait
            check_head(hidden, weight, bias, part=shard is not None)
            check_options(softcap, scale, temperature, max_slab_bytes, compact, mode)
        weight, bias = held(weight), None if bias is None else held(bias)
        # A write to a DTensor counts there, and not in what it holds.
        pairs = zip((weight, bias), given[1:], strict=True)
        parts = [whole if is_dtensor(whole) else own for own, whole in pairs]
        written = [t for t in parts if t is not None and not t.is_inference()]
        versions = tuple((t, t._version) for t in written)
        options: Any = {"max_slab_bytes": max_slab_bytes, "compact": compact, "mode": mode}
        options["shard"] = shard
        states = versions_of((hidden,))
        head = Head((hidden,), (weight,), bias, versions=versions, states=states, **options)
        product = make(head, hidden.dtype)
        product = scaled(product, scale)
        if softcap is not None and scale:
            product = scaled(softcapped(scaled(product, 1 / softcap)), softcap)
        return scaled(product, 1 / temperature)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @property
    def onepass_head(self) -> Head:
        if self._passing:
            self._passing, head = False, self._head
            self._head = detached_head(head) if self.grad_fn is None else through(head, self)
        return self._head

    @onepass_head.setter
    def onepass_head(self, head: Head) -> None:
        self._head = head

    @property
    def placements(self) -> tuple[Any, ...]:
        """What torch's ColwiseParallel asks of a head's output: every rank has these whole."""
        from torch.distributed.tensor import Replicate

        return (Replicate(),)

    def redistribute(self, *_: Any, **__: Any) -> LazyLogits:
        """The same: whatever placements are asked for, no logit is there to be sent."""
        return self

    def to_local(self, **_: Any) -> LazyLogits:
        return self

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
            *(
                []
                if head.shard is None
                else [f"rows of {list(head.shard.sizes)} on rank {head.shard.rank}"]
            ),
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
        from .lazy_functions import HANDLERS

        if not all(issubclass(kind, LazyLogits) or not issubclass(kind, Lazy) for kind in types):
            return NotImplemented  # LazyProbs know what they do with LazyLogits
        return served(HANDLERS.get(func), func, args, kwargs or {})


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


def served(handler: Handler | None, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What a lazy tensor answers: an attribute, the handler's result, or that of whole logits."""
    if func in ATTRIBUTES:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)
    with refused_by_all(*args, *kwargs.values()):
        return _served(handler, func, args, kwargs)


def _served(handler: Handler | None, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if handler is not None and kwargs.get("out") is None:
        first, named = args, kwargs
        if kwargs:
            named = {SYNONYMS.get(k, k): v for k, v in kwargs.items() if k != "out"}
            given = [] if args else [name for name in FIRST if name in named]
            first = tuple(named.pop(name) for name in given) or args
        if takes(handler, func, first, named):
            result = handler(func, *first, **named)
            if result is not NotImplemented:
                return result
    return materialized(func, args, kwargs)


signature = functools.cache(inspect.signature)


def takes(handler: Handler, func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the handler knows these arguments."""
    try:
        signature(handler).bind(func, *args, **kwargs)
    except TypeError:
        return False
    return True


def check_softcap(softcap: object) -> None:
    """Raises unless `softcap` is None or a number above 0."""
    if softcap is not None:
        check_number("softcap", softcap, 0.0, hint=", or None for no cap")
        if softcap == 0:
            raise ValueError("softcap must be above 0, or None for no cap: got 0")


def check_options(
    softcap: object,
    scale: object,
    temperature: float,
    max_slab_bytes: object,
    compact: object,
    mode: object,
) -> None:
    """Raises for what LazyLogits cannot take."""
    check_choice("mode", mode, MODES)
    check_softcap(softcap)
    check_number("scale", scale)
    check_number("temperature", temperature)
    if temperature <= 0 or math.isinf(1 / temperature):
        raise ValueError(f"temperature must be above 0: got {temperature}")
    if max_slab_bytes is not None and type(max_slab_bytes) is not int:
        kind = type(max_slab_bytes).__name__
        raise TypeError(f"max_slab_bytes must be an int, or None: got {kind}")
    if type(compact) is not bool:
        raise TypeError(f"compact must be True or False: got {type(compact).__name__}")


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on there; of devices without, as meta, torch does not let itself be
    asked."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def check_head(
    hidden: object,
    weight: object,
    bias: object,
    names: tuple[str, str, str] = ("hidden", "weight", "bias"),
    part: bool = False,
) -> None:
    """Raises unless hidden [..., D], weight [V, D] and bias [V] make logits; `names` are those of
    the caller's arguments. A rank's `part` of a head may have no rows."""
    of_hidden, of_weight, of_bias = names
    check_floating(of_hidden, hidden)
    check_floating(of_weight, weight)
    assert isinstance(hidden, Tensor) and isinstance(weight, Tensor)
    for name, tensor in ((of_hidden, hidden), (of_weight, weight), (of_bias, bias)):
        kind = "a weight sharded by ZeRO-3" if is_released(tensor) else type(tensor).__name__
        if kind == "DTensor" or is_released(tensor):
            raise ValueError(f"{name} must be a whole tensor: got {kind}; {GATHER}")
        if isinstance(tensor, Tensor) and tensor.is_meta and hidden.device == weight.device:
            shapes = f"{tuple(hidden.shape)} and {tuple(weight.shape)}"
            raise ValueError(f"{name} is on meta, without numbers: load it first; got {shapes}")
    if weight.dim() != 2 or hidden.dim() == 0 or hidden.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"{of_hidden} must be [..., D] and {of_weight} [V, D]: "
            f"got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if (weight.shape[0] == 0 and not part) or weight.shape[1] == 0:
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
            of_part = "one number for each of this rank's rows," if part else "[V] ="
            raise ValueError(
                f"{of_bias} must be {of_part} ({weight.shape[0]},) {weight.dtype}: "
                f"got {tuple(bias.shape)} {bias.dtype}"
            )
        check_same_device(of_bias, bias, of_hidden, hidden)


check_part = functools.partial(check_head, part=True)


def make(
    head: Head, dtype: torch.dtype, normalized: float = 0.0, *, ungraphed: bool = True
) -> LazyLogits:
    """LazyLogits of a head; outside of a graph where gradients are off, as logits would be, unless
    `ungraphed` is False."""
    first = head.hidden[0]
    shape = (*first.shape[:-1], head.vocab_size)

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
            head = detached_head(head)
    lazy.onepass_head, lazy._normalized = head, float(normalized)
    made: LazyLogits = lazy
    return made


def detached_head(head: Head) -> Head:
    return head._replace(
        hidden=tuple(h.detach() for h in head.hidden),
        weight=tuple(w.detach() for w in head.weight),
        bias=None if head.bias is None else head.bias.detach(),
    )


def detached(lazy: LazyLogits) -> LazyLogits:
    return make(detached_head(lazy.onepass_head), lazy.dtype, lazy._normalized)


def with_head(lazy: LazyLogits, **changed: Any) -> LazyLogits:
    """The same logits but for what changes in their head."""
    head = lazy.onepass_head
    if "hidden" in changed:
        head.check_weights()
        changed["states"] = versions_of(changed["hidden"])
    return make(head._replace(**changed), lazy.dtype, lazy._normalized)


def versions_of(tensors: Iterable[Tensor]) -> tuple[int | None, ...]:
    """How often they have been written to; inference tensors do not say."""
    return tuple(None if t.is_inference() else t._version for t in tensors)


def identity(tensor: Tensor | None, in_graph: bool = True) -> Any:
    """The same for two tensors of one place: in a graph where there is one, else in memory."""
    if tensor is None or (in_graph and tensor.requires_grad):
        return id(tensor)
    where = tensor.untyped_storage()._cdata, tensor.storage_offset()
    return (*where, tensor.shape, tensor.stride(), tensor.dtype)


def materialized(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
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
        said += "Where more such calls follow, call materialize() once"
        warnings.warn(said, MaterializedWarning, stacklevel=3)

    def whole(value: Any) -> Any:
        return value.materialize() if isinstance(value, Lazy) else value

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
    if name == "out" or any(isinstance(t, Lazy) for t in pytree.tree_leaves(kwargs.get("out"))):
        raise RuntimeError(f"{name}(out=...) cannot write into LazyLogits: leave out= away")
    writes = name in OUT_OF_PLACE or (name.endswith("_") and not name.endswith("__"))
    if not args or not isinstance(args[0], Lazy) or not (writes or kwargs.get("inplace") is True):
        return
    mend = OUT_OF_PLACE.get(name) or name.removesuffix("_")
    if not writes:
        mend = f"{name}(..., inplace=False)"
    raise RuntimeError(
        f"{name} cannot write into LazyLogits, which hold no logits: use the out-of-place {mend}, "
        "or materialize() first"
    )


def frames() -> Iterator[FrameType]:
    """Those that called, the nearest first."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _caller() -> tuple[str, str]:
    """File and line of the code outside of torch and this package that called, and what to do about
    it where that is known."""
    for frame in frames():
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] not in ("onepass", "torch"):
            advice = ""
            if module.startswith("peft."):
                advice = " (was the adapter added after lazy_head? Call onepass.lazy_head again)"
            return f"{frame.f_code.co_filename}:{frame.f_lineno}", advice
    return "an unknown place", ""


def number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def over_vocabulary(lazy: Tensor, dim: Any) -> bool:
    dims = dim if isinstance(dim, (tuple, list)) else (dim,)
    return len(dims) == 1 and isinstance(dims[0], int) and dims[0] in (-1, lazy.dim() - 1)


def kept_dimension(values: Tensor, keepdim: bool) -> Tensor:
    return values.unsqueeze(-1) if keepdim else values


def plain(lazy: LazyLogits) -> LazyLogits:
    """The logits, of which `lazy` may be the log-probabilities."""
    return make(lazy.onepass_head, lazy.dtype)


def result_dtype(lazy: LazyLogits) -> torch.dtype:
    """That of a loss of these logits; float32 under autocast, as torch's."""
    if lazy.dtype.itemsize < 4 and autocasts(lazy.device):
        return torch.float32
    return lazy.dtype


def scaled(lazy: LazyLogits, factor: float) -> LazyLogits:
    return lazy if factor == 1 else with_head(lazy, scale=lazy.onepass_head.scale * factor)


def softcapped(lazy: LazyLogits) -> LazyLogits:
    """tanh(s u) is the cap 1 / |s|, scaled back by s."""
    scale = lazy.onepass_head.scale
    return with_head(lazy, softcap=1 / abs(scale), scale=scale)


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
