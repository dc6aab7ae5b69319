"""A head whose rows, the vocabulary, lie on several ranks: as a DTensor, or as this rank's part and
its process group.

What LazyLogits then hold is this rank's part; hidden states that all ranks have get the sum of the
gradients that each finds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .ops._check import check_floating
from .ops._dtensor import is_dtensor, mesh_ranks, shard_of
from .ops._shards import Shard, alike, laid_out, ranks_in, summed_gradient, this_rank
from .ops._together import all_refuse
from .parallel import group_of

Parts = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias


def own_part(
    parts: Parts,
    process_group: Any,
    vocab_offset: int | None,
    mesh_dim: str | int | None,
    agrees: bool,
    check: Callable[..., None],
) -> tuple[Parts, Shard | None]:
    """This rank's part of a head and its hidden states, and which part it is; all of it and None
    where the head is not sharded. `agrees`: the ranks agree to a call before they make it; `check`
    raises for parts that make no logits."""
    hidden, weight, bias = parts
    if is_dtensor(weight):
        if process_group is not None or vocab_offset is not None:
            raise ValueError(
                "a DTensor knows its process group and its place: leave process_group and "
                "vocab_offset out"
            )
        return _of_dtensor(hidden, weight, bias, mesh_dim, agrees)
    if process_group is None:
        if vocab_offset is not None or mesh_dim is not None:
            name = "mesh_dim" if vocab_offset is None else "vocab_offset"
            wanted = "a weight that is a DTensor" if vocab_offset is None else "process_group="
            raise ValueError(f"{name} needs {wanted}: got {type(weight).__name__}")
        return parts, None
    if mesh_dim is not None:
        raise ValueError("mesh_dim names a dimension of a DTensor's mesh: leave process_group out")
    return _of_group(parts, process_group, vocab_offset, check)


def _of_group(
    parts: Parts, process_group: Any, vocab_offset: int | None, check: Callable[..., None]
) -> tuple[Parts, Shard | None]:
    hidden, weight, bias = parts
    group = getattr(process_group, "group_name", None)
    if group is None:
        group = group_of(process_group).group_name
    trouble: Exception | None = None
    try:  # whoever is wrong alone would leave the others waiting
        check(*parts)
        if vocab_offset is not None and (type(vocab_offset) is not int or vocab_offset < 0):
            raise ValueError(f"vocab_offset must be an int of 0 or more: got {vocab_offset!r}")
    except (TypeError, ValueError, NotImplementedError) as error:
        trouble = error
    shard = laid_out(group, vocab_offset, getattr(weight, "shape", ()), trouble, hidden)
    return (summed_gradient(hidden, group), weight, bias), shard


def _of_dtensor(
    hidden: Any, weight: Any, bias: Any, mesh_dim: str | int | None, agrees: bool
) -> tuple[Parts, Shard | None]:
    shard = shard_of("the head", weight, 0, mesh_dim)
    with all_refuse(shard if agrees else None, weight):
        return _parts(hidden, weight, bias, shard), shard


def _parts(hidden: Any, weight: Any, bias: Any, shard: Shard | None) -> Parts:
    check_floating("hidden", hidden)
    if is_dtensor(hidden):
        rows = _whole_rows(hidden, None if shard is None else shard.group)
    else:
        rows = hidden if shard is None else summed_gradient(hidden, shard.group)
    if is_dtensor(bias):
        if not alike(shard_of("the bias", bias, 0), shard):
            raise ValueError(
                f"{this_rank()}: the bias must be sharded as its weight, or a whole tensor: got "
                f"{list(bias.placements)}"
            )
        bias = _own_rows(bias, hidden)
    elif bias is not None and shard is not None:
        check_floating("bias", bias)
        if bias.requires_grad:
            raise ValueError(
                f"{this_rank()}: a trained bias must be sharded as its weight: got a whole one of "
                f"{tuple(bias.shape)}"
            )
        if bias.shape != (shard.vocab_size,):
            raise ValueError(
                f"{this_rank()}: the bias must be [V] = ({shard.vocab_size},): got "
                f"{tuple(bias.shape)}"
            )
        bias = shard.columns(bias)
    return rows, _own_rows(weight, hidden), bias


def _own_rows(weight: Any, hidden: Any) -> Tensor:
    """This rank's part of the head; where other ranks hold other rows of the hidden states, its
    gradient is a part of a sum."""
    apart = set()
    if is_dtensor(hidden):
        places = zip(mesh_ranks(hidden), hidden.placements, strict=True)
        apart = {ranks for ranks, placement in places if placement.is_shard()}
    from torch.distributed.tensor import Partial

    grads = [
        Partial() if ranks in apart and placement.is_replicate() else placement
        for ranks, placement in zip(mesh_ranks(weight), weight.placements, strict=True)
    ]
    own: Tensor = weight.to_local(grad_placements=grads)
    return own


def _whole_rows(hidden: Any, group: str | None) -> Tensor:
    """The local rows of hidden states, all of them on every rank of the head's group, where their
    gradient is then a part of a sum."""
    from torch.distributed.tensor import Partial, Replicate

    over, ours = mesh_ranks(hidden), None if group is None else tuple(ranks_in(group))
    if ours is not None and ours not in over:
        raise ValueError(
            f"{this_rank()}: hidden states and head must share a mesh dimension: got hidden states "
            f"over ranks {over}, the head over {ours}"
        )
    both = list(zip(over, hidden.placements, strict=True))
    wanted = [Replicate() if of == ours or p.is_partial() else p for of, p in both]
    grads = [Partial() if of == ours else w for (of, _), w in zip(both, wanted, strict=True)]
    rows: Tensor = hidden.redistribute(placements=wanted).to_local(grad_placements=grads)
    return rows
