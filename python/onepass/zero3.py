"""What LazyLogits do under DeepSpeed, which is never imported here.

ZeRO-3 gathers a head before its forward and takes it away after: logits hold on to what was gathered.
Its modules' outputs go through an identity whose backward gathers the head for its gradient: that
of LazyLogits goes there as well, without anything of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from .ops.head import Head

_held = WeakIdKeyDictionary()  # by parameter: a reference to what was gathered of it last


def is_sharded(tensor: object) -> bool:
    return hasattr(tensor, "ds_id")


def is_released(tensor: object) -> bool:
    """Whether a parameter of ZeRO-3's is not whole now."""
    status = getattr(tensor, "ds_status", None)
    return is_sharded(tensor) and getattr(status, "name", "") != "AVAILABLE"


def shape_of(weight: Tensor) -> torch.Size:
    """A parameter's shape, also while it is released."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


def held(weight: Tensor) -> Tensor:
    """A gathered parameter as a tensor that stays when DeepSpeed releases the parameter; another
    tensor as it is. Its gradient is the parameter's. One tensor for one gathering, so that logits
    of two forwards are known to have one head."""
    if not is_sharded(weight):
        return weight
    found = _held[weight]() if weight in _held else None
    learns = weight.requires_grad and torch.is_grad_enabled()
    if found is None or found.requires_grad != learns or found.data_ptr() != weight.data_ptr():
        found = weight.view_as(weight)
        _held[weight] = TensorWeakRef(found)
    return found


class _Through(torch.autograd.Function):
    """A part of a head, whose gradient goes on to logits too, as none: the identities between them
    and the head run then."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, logits: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        return part.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        return *grads, None


def through(head: Head, logits: Tensor) -> Head:
    """The head of logits that came back from an autograd.Function as they were, so that its
    backward runs within theirs."""
    node: Any = logits.grad_fn
    node.set_materialize_grads(False)  # they would be of the logits' size
    with torch.inference_mode(False), torch.enable_grad():  # the graph is there, whoever looks
        return with_first(head, lambda part: _Through.apply(part, logits))


def with_first(head: Head, change: Callable[[Tensor], Tensor]) -> Head:
    """The head with one of its parts changed, through which gradients pass."""
    for name in ("hidden", "weight"):
        parts = list(getattr(head, name))
        for at, part in enumerate(parts):
            if part.requires_grad:
                parts[at] = change(part)
                return head._replace(**{name: tuple(parts)})
    assert head.bias is not None
    return head._replace(bias=change(head.bias))


class Handles(NamedTuple):
    """Of hooks, removed together."""

    of: list[Any]

    def remove(self) -> None:
        for handle in self.of:
            handle.remove()


def hooked(head: Head, hook: Callable[[Tensor], Tensor]) -> tuple[Head, Handles]:
    """A head whose gradients, all of them, pass a hook that scales: on aliases of its parts, since
    other logits have the parts too."""
    handles = []

    def alias(part: Tensor) -> Tensor:
        if part.requires_grad:
            part = part.view_as(part)
            handles.append(part.register_hook(hook))
        return part

    hidden, weight = (tuple(map(alias, parts)) for parts in (head.hidden, head.weight))
    bias = None if head.bias is None else alias(head.bias)
    return head._replace(hidden=hidden, weight=weight, bias=bias), Handles(handles)
