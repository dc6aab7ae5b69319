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
    Lazy,
    LazyLogits,
    detached,
    identity,
    kept_dimension,
    make,
    number,
    over_vocabulary,
    plain,
    result_dtype,
    served,
)
from .ops.vocab_pair_stats import vocab_pair_stats
from .ops.vocab_stats import vocab_stats


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
        from .lazy_functions import OF_ROWS, called_by_deepspeed

        if func is Tensor.detach and args[0].requires_grad and called_by_deepspeed():
            raise RuntimeError(
                "lazy probabilities cannot pass DeepSpeed's hooks on what a module takes and "
                "gives: take their loss where they are made, or materialize() them"
            )
        handler = HANDLERS.get(func, _on_rows if func in OF_ROWS else None)
        return served(handler, func, args, kwargs or {})


def probs(
    of: LazyLogits | None,
    terms: Sequence[LazyLogits] = (),
    factor: float = 1.0,
    dtype: torch.dtype | None = None,
) -> LazyProbs:
    if not torch.is_grad_enabled():
        of = None if of is None else detached(of)
        terms = [detached(term) for term in terms]
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
    from .lazy_functions import log_softmax

    log_p = log_softmax(func, lazy, dim, *args, **kwargs)  # which knows its dtype
    return log_p if log_p is NotImplemented else probs(plain(lazy), dtype=log_p.dtype)


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
    log_p = make(of.onepass_head, input.dtype, 1)
    log_q = make(input.onepass_head, input.dtype, -1)
    elements = probs(of, (log_p, log_q), dtype=result_dtype(input))
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
        versions = (head.states, *(version for _, version in head.versions))
        return (*(identity(t) for t in parts), head.softcap, head.scale, versions)

    return key(a) == key(b)


def _summed(
    func: Any, lazy: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Any:
    whole = lazy.of is None or not lazy.terms
    if whole or dim is None or not over_vocabulary(lazy, dim):
        return NotImplemented
    return kept_dimension(expected(lazy).to(dtype or lazy.dtype), keepdim)


def _times(func: Any, a: Any, other: Any) -> Any:
    lazy, other = (a, other) if isinstance(a, LazyProbs) else (other, a)
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


def _argmax(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    fits = dim is not None and lazy.of is not None and not lazy.terms and lazy.factor > 0
    if not fits or not over_vocabulary(lazy, dim):
        return NotImplemented
    return lazy.of.argmax(-1, keepdim)


def _max(func: Any, lazy: Any, dim: Any = None, keepdim: bool = False) -> Any:
    columns = _argmax(func, lazy, dim, keepdim=True) if is_p(lazy) else NotImplemented
    if columns is NotImplemented:
        return NotImplemented
    values = lazy.gather(-1, columns)
    if not keepdim:
        values, columns = values.squeeze(-1), columns.squeeze(-1)
    return torch.return_types.max((values, columns))


def _on_rows(func: Any, lazy: Any, *args: Any, **kwargs: Any) -> Any:
    """What logits do, to all of them; a slice of the vocabulary would have a softmax of its own."""
    from .lazy_functions import HANDLERS as OF_LOGITS
    from .lazy_functions import cast

    if not isinstance(lazy, LazyProbs):
        return NotImplemented
    logits = [*([] if lazy.of is None else [lazy.of]), *lazy.terms]
    changed = [OF_LOGITS[func](func, part, *args, **kwargs) for part in logits]
    several = isinstance(changed[0], tuple)
    pieces = list(zip(*changed, strict=True)) if several else [tuple(changed)]
    kept = all(
        isinstance(part, LazyLogits) and part.shape[-1] == lazy.shape[-1]
        for piece in pieces
        for part in piece
    )
    if not kept:
        return NotImplemented
    made = [
        probs(
            None if lazy.of is None else piece[0],
            piece if lazy.of is None else piece[1:],
            lazy.factor,
            piece[0].dtype if OF_LOGITS[func] is cast else lazy.dtype,
        )
        for piece in pieces
    ]
    return tuple(made) if several else made[0]


HANDLERS: dict[Any, Any] = {
    **dict.fromkeys((Tensor.sum, torch.sum), _summed),
    **dict.fromkeys(
        (Tensor.mul, torch.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply, Tensor.multiply),
        _times,
    ),
    **dict.fromkeys((Tensor.div, torch.div, Tensor.__truediv__), _divided),
    **dict.fromkeys((Tensor.neg, torch.neg, Tensor.__neg__), _negated),
    **dict.fromkeys((Tensor.log, torch.log), _log),
    **dict.fromkeys((Tensor.gather, torch.gather), _gathered),
    **dict.fromkeys((Tensor.argmax, torch.argmax), _argmax),
    **dict.fromkeys((Tensor.max, torch.max), _max),
    torch.nn.functional.kl_div: kl_div,
}
