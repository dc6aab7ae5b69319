"""Calls that all ranks of a sharded vocabulary make: what one of them refuses raises on all."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch import Tensor

from ._dtensor import is_dtensor, shard_of
from ._launch import capturing
from ._shards import Shard, awaited, refuse

Function = TypeVar("Function", bound=Callable[..., Any])


def together(function: Function) -> Function:
    """A function of logits that may be sharded: an error on this rank, before it has agreed with
    the others, raises on them too, instead of leaving them to wait."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with refused_by_all(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return cast(Function, call)


def sharded_among(values: tuple[Any, ...]) -> tuple[Shard | None, Tensor | None]:
    """The shard of the first logits that are one, with a tensor on their device; of those alone
    whose calls agree first."""
    for value in values:
        head = getattr(value, "onepass_head", None)
        if head is not None and head.shard is not None:
            agrees = head.compact and not capturing(head.hidden[0])
            return (head.shard, head.hidden[0]) if agrees else (None, None)
        if is_dtensor(value) and value.dim() and value.is_floating_point():
            with contextlib.suppress(ValueError):
                shard = shard_of("logits", value, -1)
                if shard is not None and not capturing(value):
                    return shard, value.to_local()
    return None, None


def refused_by_all(*values: Any) -> contextlib.AbstractContextManager[None]:
    """Within it, the same for a call on these values; nothing where none is sharded."""
    shard, rows = sharded_among(values)
    if shard is None or rows is None or awaited.get() is not None:  # an outer call tells
        return contextlib.nullcontext()
    return all_refuse(shard, rows)


@contextlib.contextmanager
def all_refuse(shard: Shard | None, like: Tensor) -> Iterator[None]:
    """Within it, what this rank raises before it has agreed with the shard's others raises on them
    when they come to agree."""
    if shard is None or awaited.get() is not None:
        yield
        return
    state = [True]
    token = awaited.set(state)
    try:
        yield
    except Exception:
        if state[0]:
            with contextlib.suppress(RuntimeError):  # nobody waited
                refuse(shard, like)
        raise
    finally:
        awaited.reset(token)
