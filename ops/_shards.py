"""A vocabulary in shards: which columns a rank holds, and what its group's ranks tell each other.

Small all-gathers: of a few integers, by which all ranks see that they do the same, and of a few
numbers for each row, from which `_merge` makes facts about the whole vocabulary. Gradients of what
all ranks hold are summed once, in one all-reduce.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._check import FLOATS, IGNORED

ELSEWHERE = -(1 << 31)  # the label of a row whose label is a column of another shard
AGREED = 7  # numbers by which ranks see that they do the same


class Shard(NamedTuple):
    """The columns of a vocabulary that the ranks of a group hold, one after the other."""

    group: str  # the process group's name, which an operator can take
    sizes: tuple[int, ...]  # columns of every rank
    rank: int  # this one's, in the group

    @classmethod
    def of(cls, group: str, sizes: Sequence[int]) -> Shard | None:
        """From an operator's arguments; None where they name no group."""
        if not group:
            return None
        return cls(group, tuple(sizes), rank_in(group))

    @property
    def offset(self) -> int:
        return sum(self.sizes[: self.rank])

    @property
    def size(self) -> int:
        return self.sizes[self.rank]

    @property
    def vocab_size(self) -> int:
        return sum(self.sizes)

    def columns(self, of_all: Any, dim: int = -1) -> Any:
        """This rank's part of a tensor that holds all columns, if it is there."""
        return None if of_all is None else of_all.narrow(dim, self.offset, self.size)

    def labels(self, ids: Tensor | None, elsewhere: int = ELSEWHERE) -> Tensor | None:
        """Token ids as columns of this rank; `elsewhere` for those of another, -1 for what is
        nobody's."""
        if ids is None:
            return None
        here = ids - self.offset
        inside = (here >= 0) & (here < self.size)
        of_nobody = (ids < 0) | (ids >= self.vocab_size)
        outside = torch.where(of_nobody, -1, elsewhere).masked_fill(ids == IGNORED, IGNORED)
        return torch.where(inside, here, outside)

    def ids(self, labels: Tensor | None, contrast_labels: Tensor | None) -> tuple[Any, Any]:
        """Both as columns of this rank; a contrast label that is none counts nothing."""
        return self.labels(labels), self.labels(contrast_labels, elsewhere=IGNORED)

    def gather(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Every rank's tensors of one shape [...], in the order of ranks: [R, ...] each, of the
        first one's dtype."""
        dtype = next(iter(parts.values())).dtype
        of_all = all_gathered(torch.stack([part.to(dtype) for part in parts.values()]), self.group)
        return dict(zip(parts, of_all.unbind(1), strict=True))

    def whole(self, mine: Tensor) -> Tensor:
        """All columns [..., V] from every rank's own [..., V_r], differentiable. ValueError on
        every rank unless all have as many rows."""
        n_rows = torch.tensor(mine.shape[:-1].numel(), device=mine.device)
        check_same("number of rows", all_gathered(n_rows, self.group).tolist(), self.group)
        made: Tensor = _Whole.apply(mine, self)  # type: ignore[no-untyped-call]
        return made


def alike(one: Shard | None, other: Shard | None) -> bool:
    """Whether the same ranks hold the same columns, whatever their group is called."""
    if one is None or other is None:
        return one is other
    return one.sizes == other.sizes and ranks_in(one.group) == ranks_in(other.group)


def group_named(name: str) -> Any:
    resolve: Any = torch.distributed.distributed_c10d._resolve_process_group
    return resolve(name)


def ranks_in(group: str) -> list[int]:
    """Its members, by their numbers among all processes."""
    return torch.distributed.get_process_group_ranks(group_named(group))


def rank_in(group: str) -> int:
    return torch.distributed.get_rank(group_named(group))


def all_gathered(mine: Tensor, group: str) -> Tensor:
    """[R, ...] in the order of ranks."""
    process_group = group_named(group)
    of_all = mine.new_empty((torch.distributed.get_world_size(process_group), *mine.shape))
    torch.distributed.all_gather(list(of_all.unbind(0)), mine, group=process_group)
    return of_all


def all_summed(mine: Tensor, group: str) -> Tensor:
    total = mine.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=group_named(group))
    return total


def laid_out(
    group: str,
    offset: int | None,  # of this rank's columns; None: where the ranks before it end
    shape: Sequence[int],  # of this rank's part of the head, [V_r, D]
    trouble: Exception | None,  # what this rank has against it
    like: object,
) -> Shard:
    """The shards of all ranks. Raises on every rank where one has trouble, or where the parts do
    not make one head: whoever raised alone would leave the others waiting."""
    told = [1, -1, 0, 0] if trouble else [0, -1 if offset is None else offset, *shape]
    device = like.device if isinstance(like, Tensor) else None
    came = all_gathered(torch.tensor(told, device=device), group).T.tolist()
    if trouble is not None:
        raise trouble
    refused, offsets, sizes, widths = came
    check_none_refused("its part of the head", refused, group)
    if len(set(widths)) > 1:
        raise ValueError(
            f"{this_rank()}: the ranks' parts of the head must be [V_r, D] with one D: got D = "
            f"{on_ranks(group, widths)}; shard its rows"
        )
    starts = [sum(sizes[:rank]) for rank in range(len(sizes))]
    if any(offset not in (-1, start) for offset, start in zip(offsets, starts, strict=True)):
        raise ValueError(
            f"{this_rank()}: the ranks' parts must cover the vocabulary one after the other, in "
            f"the order of ranks: got vocab_offset {on_ranks(group, offsets)} with {sizes} rows; "
            f"wanted {starts}"
        )
    shard = Shard.of(group, sizes)
    assert shard is not None
    return shard


def of_operator(shard: Shard | None) -> tuple[str, list[int]]:
    """As an operator takes it: group and sizes."""
    return ("", []) if shard is None else (shard.group, list(shard.sizes))


# Within a call on a shard's logits, whether other ranks may be waiting for this one to agree.
awaited: ContextVar[list[bool] | None] = ContextVar("onepass_awaited", default=None)


def check_alike(
    shard: Shard,
    n_rows: int,
    like: Tensor,  # of the rows' dtype, on their device
    labels: Tensor | None,
    weights: Tensor | None,
    how: object,
    slab_rows: int = 0,
) -> None:
    """ValueError on every rank unless all came to do the same, `how` too, with as many rows and the
    same labels (or mask) and vocabulary weights, and none has refused; waits for the device."""
    numbers = {
        "number of rows": n_rows,
        "dtype": FLOATS.index(like.dtype),
        "max_slab_bytes (rows of a slab)": slab_rows,
        "call (a checksum of facts, gradients, caps and mode)": zlib.crc32(repr(how).encode()),
    }
    mine = torch.tensor([0, *numbers.values(), 0, 0], device=like.device)  # AGREED of them
    if labels is not None:
        order = torch.arange(1, labels.numel() + 1, device=labels.device)
        mine[-2] = (labels.reshape(-1) * order).sum()
    if weights is not None:
        mine[-1] = weights.double().sum().view(torch.int64)
    refused, *of_all = _agreement(mine, shard.group)
    check_none_refused("this call", refused, shard.group)
    names = (*numbers, "labels or mask (a checksum)", "weights of the vocabulary (a checksum)")
    for name, came in zip(names, of_all, strict=True):
        check_same(name, [FLOATS[n] for n in came] if name == "dtype" else came, shard.group)


def refuse(shard: Shard, like: Tensor) -> None:
    """Tells the ranks that wait in `check_alike` that this one does not come."""
    told = torch.zeros(AGREED, dtype=torch.int64, device=like.device)
    told[0] = 1
    _agreement(told, shard.group)


def _agreement(mine: Tensor, group: str) -> list[list[int]]:
    state = awaited.get()
    if state is not None:
        state[0] = False
    found: list[list[int]] = all_gathered(mine, group).T.tolist()
    return found


def check_none_refused(what: str, refused: Sequence[int], group: str) -> None:
    if any(refused):
        states = ["refused" if r else "fine" for r in refused]
        raise ValueError(
            f"{this_rank()}: another rank of the group refuses {what}, and says why: "
            f"{on_ranks(group, states)}"
        )


def check_same(name: str, came: Sequence[object], group: str) -> None:
    if len(set(came)) > 1:
        raise ValueError(
            f"{this_rank()}: ranks that share a vocabulary must come with the same {name}: "
            f"got {on_ranks(group, came)}"
        )


def check_fixed(shard: Shard, *whole: Tensor) -> None:
    """ValueError where a side that every rank holds whole is to be trained: each would find the
    gradient of its own columns alone."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in whole):
        raise ValueError(
            f"{this_rank()}: beside a sharded head the other side must be sharded too, or fixed: "
            f"got {tuple(whole[0].shape)} that requires a gradient; shard it, or pass .detach()"
        )


def this_rank() -> str:
    return f"rank {torch.distributed.get_rank()}"


def on_ranks(group: str, values: Sequence[object]) -> str:
    """Who came with what, for a message."""
    pairs = zip(ranks_in(group), values, strict=True)
    return ", ".join(f"{value} on rank {rank}" for rank, value in pairs)


def check_differentiable_twice(shard: Shard | None) -> None:
    """RuntimeError for a shard: what other ranks hold would be missing from a second derivative."""
    if shard is not None:
        raise RuntimeError(
            "create_graph=True is not served for a vocabulary in shards: gather the head or the "
            "logits first (weight.full_tensor())"
        )


def summed_gradient(tensor: Tensor, group: str) -> Tensor:
    """The same tensor, of whose gradient every rank finds a part: they are summed, once for all
    that was made of it."""
    if not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    summed: Tensor = _Summed.apply(tensor, group)  # type: ignore[no-untyped-call]
    return summed


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: str) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_summed(grad, ctx.group), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, shard: Shard) -> Tensor:
        ctx.shard = shard
        room = mine.new_zeros((*mine.shape[:-1], max(shard.sizes)))
        room[..., : shard.size] = mine
        of_all = all_gathered(room, shard.group)
        return torch.cat(
            [part[..., :size] for part, size in zip(of_all, shard.sizes, strict=True)], dim=-1
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.shard.columns(grad), None
