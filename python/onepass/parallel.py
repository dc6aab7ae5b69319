"""Means over rows that lie on several processes: sequence- and context-parallel inputs, data
parallel batches with unequal counts of tokens.

Each rank has its rows' losses; one all-reduce of three numbers makes sum and count those of all,
and tells whether a rank refused its arguments.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from .ops._check import (
    IGNORED,
    check_choice,
    check_floating,
    check_same_device,
    check_strided,
    check_weights,
    values_checked,
)
from .ops._launch import accumulation_dtype
from .ops._shards import this_rank
from .reduce import check_num_items, mean_divisor, reduce_rows, row_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

GRADIENTS = ("averaged", "summed")


def global_mean(
    rows: Tensor,
    mask: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    *,
    num_items: Tensor | float | None = None,
    gradients: str = "averaged",
) -> Tensor:
    """Mean of the rows of all ranks in a group, the same 0-dim value on each; its gradient reaches
    this rank's rows.

    One all-reduce of three numbers in the forward, none in the backward, no wait for the device.
    All ranks of the group must call it. A rank without any row that counts gets zero gradients, not
    none, so that whatever its engine does with them does not hang; where no rank has any, it is 0.

    Args:
        rows: [...] this rank's per-row losses (reduction="none"), any number of them, 0 too, not
            weighted yet: the loss that made them gets `mask != 0`, where it takes a mask.
        mask: [...] weights; bool or integers count as 0/1. Of labels: `labels != -100`.
        process_group: the ranks whose rows belong together, a group or a DeviceMesh of one
            dimension; None is all processes, or this one where torch.distributed is not set up.
        num_items: divides the sum instead of the weights of all ranks (see `count_items`): the
            values and gradients of micro-batches then add up to those of the whole batch.
        gradients: what becomes of the parameters' gradients over these ranks: "averaged" (DDP,
            FSDP, DeepSpeed) or "summed" (your own all-reduce).

    Returns:
        float32 (float64 for float64 rows).

    Raises:
        TypeError: not a tensor, no group. ValueError: shapes, dtypes or devices that do not fit, a
        mask that requires grad, a group without this rank, a mesh of several dimensions; on the
        other ranks, where one refuses its arguments (on a GPU with ONEPASS_STRICT=1, else NaN).

    Formula: sum over ranks of sum(mask * rows) / max(sum over ranks of sum(mask), 1); gradient of
    a row: mask / that divisor, times the number of ranks where they are averaged.
    """
    group = group_of(process_group)
    try:
        check_rows(rows, mask)
        check_choice("gradients", gradients, GRADIENTS)
        check_num_items(num_items, "mean")
    except (TypeError, ValueError):
        refuse(group, rows, 2)
        raise
    dtype = accumulation_dtype(rows.dtype)
    own = reduce_rows(rows.to(dtype), mask, reduction="sum")
    total, count = sums_over(group, own, weight_of(rows, mask)).unbind()
    divisor = count.clamp_min(1) if num_items is None else mean_divisor(rows, None, num_items)
    share = own / (divisor.to(dtype) if isinstance(divisor, Tensor) else divisor)
    if group is not None and gradients == "averaged":
        share = share * group.size()
    mean: Tensor = _ValueOf.apply((total / divisor).to(dtype), share)
    return mean


def count_items(
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    process_group: ProcessGroup | DeviceMesh | None = None,
    *,
    ignore_index: int = IGNORED,
) -> Tensor:
    """How many rows count on all ranks of a group, for `num_items`; 0-dim, the same on each.

    One all-reduce of two numbers; all ranks of the group must call it. For micro-batches, count
    their labels together, once: `torch.cat([labels.flatten() for labels in ...])`.

    Args:
        labels: [...] integers, already shifted where they are next tokens (see `shift_labels`);
            those that are not ignore_index count.
        mask: [...] bool or integers count as 0/1, floats as weights; beside labels, of both.
        process_group: as in `global_mean`.

    Returns:
        int64; float32 or float64 for a mask of weights.

    Raises:
        TypeError: neither labels nor mask, not a tensor. ValueError: shapes, dtypes or groups that
        do not fit.

    Formula: sum over ranks of sum((labels != ignore_index) * mask), as masked_cross_entropy's mean.
    """
    group = group_of(process_group)
    try:
        check_counted(labels, mask)
    except (TypeError, ValueError):
        refuse(group, mask if labels is None else labels, 1)
        raise
    counts = mask
    if labels is not None:
        counts = labels != ignore_index
        if mask is not None:
            counts = torch.where(counts, mask, 0)
    assert counts is not None
    dtype = accumulation_dtype(counts.dtype) if counts.is_floating_point() else torch.int64
    return sums_over(group, weight_of(counts, counts))[0].to(dtype)


def shift_labels(labels: Tensor, *, ignore_index: int = IGNORED) -> Tensor:
    """Labels [..., T] moved one place to the left, ignore_index in the last one: what each position
    predicts. Before the sequence is split: a shard's last label is the next shard's first token.

    Raises:
        TypeError: not a tensor. ValueError: not integers, no dimension of positions.

    Formula: shifted[..., t] = labels[..., t + 1].
    Source: `shift_labels` of transformers' causal losses.
    """
    check_integers("labels", labels)
    if labels.dim() == 0:
        raise ValueError("labels must be [..., T]: got a single number")
    return functional.pad(labels[..., 1:], (0, min(labels.shape[-1], 1)), value=ignore_index)


def check_rows(rows: Tensor, mask: Tensor | None) -> None:
    """Raises for what `global_mean` has no mean of."""
    check_floating("rows", rows)
    check_local("rows", rows)
    check_weights("mask", mask, rows.shape)
    if mask is not None:
        check_local("mask", mask)
        check_same_device("mask", mask, "rows", rows)
        if mask.requires_grad:
            raise ValueError("mask is not differentiated: got one that requires grad; detach it")


def check_counted(labels: Tensor | None, mask: Tensor | None) -> None:
    """Raises for what `count_items` cannot count."""
    if labels is None and mask is None:
        raise TypeError("count_items needs labels or a mask: got neither")
    if labels is not None:
        check_integers("labels", labels, "; a mask goes to mask=")
        check_local("labels", labels)
    check_weights("mask", mask, getattr(mask if labels is None else labels, "shape", ()))
    if mask is not None:
        check_local("mask", mask)
        if labels is not None:
            check_same_device("mask", mask, "labels", labels)


def check_integers(name: str, labels: object, mend: str = "") -> None:
    """Raises unless `labels` is a dense tensor of integers."""
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(labels).__name__}")
    check_strided(name, labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"{name} must hold integers: got {labels.dtype}{mend}")


def check_local(name: str, tensor: Tensor) -> None:
    """ValueError for a DTensor: what it holds of others' rows would count again there."""
    if hasattr(tensor, "to_local"):
        raise ValueError(f"{name} must be this rank's own: got a DTensor; {name}.to_local()")


def group_of(process_group: Any) -> Any:
    """The process group that is meant, None where this process is alone."""
    if not (dist.is_available() and dist.is_initialized()):
        if process_group is not None:
            raise ValueError(
                "process_group needs torch.distributed set up: got "
                f"{type(process_group).__name__} without; init_process_group() first"
            )
        return None
    if process_group is None:
        return dist.group.WORLD
    stranger = process_group == dist.GroupMember.NON_GROUP_MEMBER
    if hasattr(process_group, "get_coordinate"):  # a DeviceMesh
        if process_group.ndim != 1:
            raise ValueError(
                "process_group must be a DeviceMesh of one dimension: got "
                f"{process_group.mesh_dim_names or process_group.ndim}; name one, as mesh['cp']"
            )
        stranger = process_group.get_coordinate() is None
        process_group = process_group if stranger else process_group.get_group()
    elif not stranger:
        if not isinstance(process_group, dist.ProcessGroup):
            raise TypeError(
                "process_group must be a ProcessGroup, a DeviceMesh or None: got "
                f"{type(process_group).__name__}"
            )
        stranger = dist.get_rank(process_group) < 0
    if stranger:
        raise ValueError(f"process_group must hold this rank: rank {dist.get_rank()} is not in it")
    return process_group


def weight_of(rows: Tensor, mask: Tensor | None) -> Tensor:
    """The sum of the rows' weights; exact for counts."""
    if mask is None:
        return torch.full((), rows.numel(), dtype=torch.float64, device=rows.device)
    return row_weights(mask, torch.float64).sum()


def sums_over(group: Any, *numbers: Tensor) -> Tensor:
    """0-dim numbers, added up over the ranks in one collective. Always float64: exact for counts,
    and of one size whatever the dtype of a rank's rows. Where a rank refused, ValueError if values
    are checked, else NaN."""
    fine = torch.zeros((), dtype=torch.float64, device=numbers[0].device)
    sums = torch.stack([*(number.detach().to(torch.float64) for number in numbers), fine])
    if group is None or group.size() == 1:
        return sums[:-1]
    dist.all_reduce(sums, group=group)
    if values_checked(sums) and sums[-1] > 0:
        raise ValueError(
            f"{this_rank()}: {int(sums[-1])} other rank(s) of the group refused their arguments, "
            "and say why"
        )
    return torch.where(sums[-1] > 0, torch.nan, sums[:-1])


def refuse(group: Any, like: object, n: int) -> None:
    """Comes to the others' collective of n numbers and says so: they would wait for this rank."""
    if group is not None and group.size() > 1:
        device: Any = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        device = like.device if isinstance(like, Tensor) else device
        told = torch.zeros(n + 1, dtype=torch.float64, device=device)
        told[-1] = 1
        dist.all_reduce(told, group=group)


class _ValueOf(torch.autograd.Function):
    """`value`, with the gradient of `share`."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, share: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad
