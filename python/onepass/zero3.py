"""What LazyLogits do under DeepSpeed, which is never imported here.

ZeRO-3 gathers a head for its forward and releases it after: logits hold on to what was gathered.
The outputs of its modules go through an identity, whose backward gathers the head for its
gradient: gradients of LazyLogits pass there too, without anything of the logits' size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ops.head import Head


def is_sharded(tensor: object) -> bool:
    return hasattr(tensor, "ds_id")


def is_released(tensor: object) -> bool:
    """Whether a parameter of ZeRO-3's is not whole now."""
    status = getattr(tensor, "ds_status", None)
    return is_sharded(tensor) and getattr(status, "name", "") != "AVAILABLE"


def shape_of(weight: Tensor) -> torch.Size:
    """A parameter's shape, also while it is released."""
    return torch.Size(getattr(weight, "ds_shape", weight.shape))


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Tensor) -> Tensor:
        ctx.parameter = parameter
        return parameter.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        if is_released(ctx.parameter):
            raise RuntimeError(
                "the head's gradient came when ZeRO-3 had released its weight: logits of a module "
                "pass one backward, and those of a weight of one's own want it gathered in theirs "
                "(deepspeed.zero.register_external_parameter)"
            )
        return grads[0]


def held(parameter: Tensor) -> Tensor:
    """A gathered parameter as a tensor that stays when DeepSpeed releases the parameter, whose
    gradient is the parameter's; another tensor as it is. A new one each time: an older one's
    gradient would come when its forward's turn is, and the parameter be released by then."""
    if not is_sharded(parameter):
        return parameter
    whole: Tensor = _Held.apply(parameter)  # type: ignore[no-untyped-call]
    return whole


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
    hidden, weight, bias = list(head.hidden), list(head.weight), [head.bias]
    with torch.inference_mode(False), torch.enable_grad():  # the graph is there, whoever looks
        for parts in (hidden, weight, bias):
            for at, part in enumerate(parts):
                if part is not None and part.requires_grad:
                    parts[at] = _Through.apply(part, logits)  # type: ignore[no-untyped-call]
                    return head._replace(hidden=tuple(hidden), weight=tuple(weight), bias=bias[0])
    return head


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
