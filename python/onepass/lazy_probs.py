"""LazyProbs: probabilities, and their products with log-probabilities, that are not there.

What entropies and divergences are spelled with in plain torch: p, p * log p, p * (log p - log q),
the elements of kl_div. Summed over the vocabulary they are statistics of the logits; what else is
asked of them makes them whole, audibly, as LazyLogits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lazy_logits import (
    ATTRIBUTES,
    Lazy,
    LazyLogits,
    kept_dimension,
    make,
    materialized,
    number,
    over_vocabulary,
    plain,
)
from .ops.vocab_pair_stats import vocab_pair_stats
from .ops.vocab_stats import vocab_stats

# Functions of rows: what they do to probabilities and log-probabilities they do to their product.
OF_ROWS = (
    Tensor.__getitem__, Tensor.view, Tensor.reshape, torch.reshape, Tensor.flatten, torch.flatten,
    Tensor.unsqueeze, torch.unsqueeze, Tensor.transpose, torch.transpose, Tensor.contiguous,
    Tensor.clone, torch.clone, Tensor.detach, torch.detach, Tensor.to, Tensor.float,
    Tensor.index_select, torch.index_select,
)  # fmt: skip


class LazyProbs(Lazy):
    """factor * p * sum_k x_k, [..., V]: p the probabilities of `of` (1 where that is None), x_k
    logits or multiples of log-probabilities (1 where there are none)."""

    of: LazyLogits | None
    terms: tuple[LazyLogits, ...]
    factor: float

    def materialize(self) -> Tensor:
        """The elements themselves, [..., V], differentiable."""
        parts: list[Tensor] = []
        if self.of is not None:
            parts.append(self.of.materialize().to(self.dtype).softmax(-1))
        if self.terms:
            first, *others = (term.materialize() for term in self.terms)
            parts.append(sum(others, first))
        whole = parts[0] if len(parts) == 1 else parts[0] * parts[1]
        return whole if self.factor == 1 else whole * self.factor

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        p = "" if self.of is None else f"softmax({self.of!r})"
        inside = " + ".join(repr(term) for term in self.terms)
        both = " * ".join(part for part in (p, f"({inside})" if inside else "") if part)
        return f"LazyProbs({list(self.shape)}, {self.dtype}: {self.factor:g} * {both})"

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
        return materialized(func, args, kwargs)


def probs(
    of: LazyLogits | None,
    terms: Sequence[LazyLogits] = (),
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> LazyProbs:
    first = of if of is not None else terms[0]
    parts = [t for t in (of, *terms) if t is not None]
    lazy: Any = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
        LazyProbs,
        first.shape,
        dtype=dtype or first.dtype,
        device=first.device,
        requires_grad=torch.is_grad_enabled() and any(t.requires_grad for t in parts),
    )
    lazy.of, lazy.terms, lazy.factor = of, tuple(terms), factor
    made: LazyProbs = lazy
    return made


def is_p(value: Any) -> bool:
    """Whether it stands for probabilities and nothing else."""
    return (
        isinstance(value, LazyProbs)
        and value.of is not None
        and not value.terms
        and value.factor == 1
    )


# ---------------------------------------------------------------- of LazyLogits


def softmax(func: Any, lazy: Any, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dim is None or not over_vocabulary(lazy, dim) or lazy._normalized not in (0, 1):
        return NotImplemented
    dtype = kwargs.get("dtype", next((a for a in args if isinstance(a, torch.dtype)), None))
    return probs(plain(lazy), dtype=dtype)


def exp(func: Any, lazy: Any) -> Any:
    return probs(plain(lazy)) if lazy._normalized == 1 else NotImplemented


def difference(a: LazyLogits, b: LazyLogits) -> Any:
    """log p + c log q: no logits of any head, but what a divergence weighs by p."""
    fits = a.shape == b.shape and a.device == b.device and a._normalized and b._normalized
    return probs(None, (a, b)) if fits else NotImplemented


def kl_div(
    func: Any,
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    """The elements of kl_div, reduced; p is the target's."""
    if not isinstance(input, LazyLogits) or input._normalized != 1 or input.shape != target.shape:
        return NotImplemented
    if size_average is not None or reduce is not None:
        reduction = torch.nn._reduction.legacy_get_string(size_average, reduce)
    if log_target and isinstance(target, LazyLogits) and target._normalized == 1:
        of = plain(target)
    elif not log_target and is_p(target):
        of = target.of
    else:
        return NotImplemented
    log_p, log_q = make(of.onepass_head, input.dtype, 1), input
    elements = probs(of, (log_p, make(log_q.onepass_head, input.dtype, -1)), dtype=input.dtype)
    if reduction == "none":
        return elements
    total = expected(elements).sum()
    divisors = {"sum": 1, "batchmean": max(1, input.shape[0]), "mean": max(1, input.numel())}
    return total / divisors[reduction] if reduction in divisors else NotImplemented


# ---------------------------------------------------------------- of LazyProbs


def expected(product: LazyProbs) -> Tensor:
    """factor * sum_v p_v sum_k x_kv of every row, from the statistics."""
    of, terms = product.of, product.terms
    assert of is not None
    divergence = as_divergence(of, terms)
    if divergence is not None:
        factor, other = divergence
        kl = vocab_pair_stats(other, target_logits=of, want=("kl",)).kl
        return (kl * (factor * product.factor)).to(product.dtype)
    total = sum(expectation(of, term) for term in terms)
    assert isinstance(total, Tensor)
    return (total * product.factor).to(product.dtype)


def as_divergence(of: LazyLogits, terms: Sequence[LazyLogits]) -> tuple[float, LazyLogits] | None:
    """c and q where the terms are c (log p - log q): KL keeps its digits where p nears q."""
    if len(terms) != 2:
        return None
    own = [term for term in terms if same(of, term)]
    others = [term for term in terms if not same(of, term)]
    if len(own) != 1 or not own[0]._normalized or own[0]._normalized != -others[0]._normalized:
        return None
    return own[0]._normalized, plain(others[0])


def expectation(of: LazyLogits, term: LazyLogits) -> Tensor:
    """sum_v p_v x_v of every row."""
    if same(of, term):
        stats = vocab_stats(of, want=("entropy",) if term._normalized else ("entropy", "lse"))
        log_p = -stats.entropy
        return log_p * term._normalized if term._normalized else stats.lse + log_p
    want = ("cross_entropy",) if term._normalized else ("cross_entropy", "lse")
    pair = vocab_pair_stats(plain(term), target_logits=of, want=want)
    log_q = -pair.cross_entropy
    return log_q * term._normalized if term._normalized else pair.lse + log_q


def same(a: LazyLogits, b: LazyLogits) -> bool:
    """Whether they stand for the same logits, by what they are made of."""

    def key(lazy: LazyLogits) -> tuple[Any, ...]:
        head = lazy.onepass_head
        parts = (*head.hidden, *head.weight, head.bias)
        return (*(id(t) for t in parts), head.softcap, head.scale)

    return key(a) == key(b)


def _summed(
    func: Any, lazy: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    whole = lazy.of is None or not lazy.terms
    if whole or dim is None or not over_vocabulary(lazy, dim):
        return NotImplemented
    return kept_dimension(expected(lazy).to(dtype or lazy.dtype), keepdim)


def _times(func: Any, a: Any, b: Any) -> Any:
    lazy, other = (a, b) if isinstance(a, LazyProbs) else (b, a)
    factor = number(other)
    if factor is not None:
        return _with(lazy, factor=lazy.factor * factor)
    if not isinstance(other, Lazy) or other.shape != lazy.shape or other.device != lazy.device:
        return NotImplemented
    dtype = torch.promote_types(lazy.dtype, other.dtype)
    if lazy.of is None and isinstance(other, LazyProbs):
        lazy, other = other, lazy
    if lazy.of is None or lazy.terms:
        return NotImplemented
    if isinstance(other, LazyLogits):
        return probs(lazy.of, (other,), lazy.factor, dtype)
    if isinstance(other, LazyProbs) and other.of is None:
        return probs(lazy.of, other.terms, lazy.factor * other.factor, dtype)
    return NotImplemented


def _divided(func: Any, lazy: Any, other: Any, **kwargs: Any) -> Any:
    divisor = number(other)
    if kwargs or not isinstance(lazy, LazyProbs) or not divisor:
        return NotImplemented
    return _with(lazy, factor=lazy.factor / divisor)


def _negated(func: Any, lazy: Any) -> Any:
    return _with(lazy, factor=-lazy.factor)


def _with(lazy: LazyProbs, factor: float) -> LazyProbs:
    return probs(lazy.of, lazy.terms, factor, lazy.dtype)


def _log(func: Any, lazy: Any) -> Any:
    if not is_p(lazy):
        return NotImplemented
    return make(lazy.of.onepass_head, lazy.dtype, 1)


def _gathered(func: Any, lazy: Any, dim: Any, index: Tensor, **kwargs: Any) -> Any:
    if not is_p(lazy):
        return NotImplemented
    log_p = make(lazy.of.onepass_head, lazy.dtype, 1)
    fits = over_vocabulary(lazy, dim) and index.shape == (*lazy.shape[:-1], 1)
    return log_p.gather(-1, index).exp() if fits else NotImplemented


def _on_rows(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(lazy, LazyProbs):
        return NotImplemented
    of = None if lazy.of is None else func(lazy.of, *args, **kwargs)
    terms = [func(term, *args, **kwargs) for term in lazy.terms]
    parts = [t for t in (of, *terms) if t is not None]
    if not all(isinstance(part, LazyLogits) for part in parts):
        return NotImplemented
    changed = parts[0].dtype if func in (Tensor.to, Tensor.float) else lazy.dtype
    return probs(of, terms, lazy.factor, changed)


HANDLERS: dict[Any, Any] = {
    **dict.fromkeys(OF_ROWS, _on_rows),
    **dict.fromkeys((Tensor.sum, torch.sum), _summed),
    **dict.fromkeys(
        (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
        _times,
    ),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__), _divided),
    **dict.fromkeys((Tensor.neg, torch.neg, Tensor.__neg__), _negated),
    **dict.fromkeys((Tensor.log, torch.log), _log),
    **dict.fromkeys((Tensor.gather, torch.gather), _gathered),
    torch.nn.functional.kl_div: kl_div,
}
