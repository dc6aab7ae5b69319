"""DTensors whose one dimension is the vocabulary: which shard this rank holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._shards import Shard, alike, check_fixed, ranks_in, this_rank


def is_dtensor(tensor: object) -> bool:
    return type(tensor).__name__ == "DTensor"


def chunks(total: int, n_ranks: int) -> tuple[int, ...]:
    """What each rank holds under Shard: torch.chunk's pieces, of which the last may be short or
    empty."""
    step = -(-total // n_ranks)
    return tuple(max(0, min(step, total - rank * step)) for rank in range(n_ranks))


def sharded_mesh_dim(
    name: str, tensor: Any, dim: int, mesh_dim: str | int | None = None
) -> int | None:
    """The mesh dimension that dimension `dim` of the tensor is sharded over; None for one that all
    ranks have whole. ValueError for what is sharded otherwise, or over another mesh dimension than
    the one named."""
    mesh, placements = tensor.device_mesh, tensor.placements
    names = mesh.mesh_dim_names
    wanted = mesh_dim
    if isinstance(mesh_dim, str):
        if names is None or mesh_dim not in names:
            have = "without names" if names is None else f"of {', '.join(names)}"
            raise ValueError(
                f"{this_rank()}: {name} has no mesh dimension {mesh_dim!r}: got {mesh} {have}"
            )
        wanted = names.index(mesh_dim)
    elif mesh_dim is not None and not 0 <= mesh_dim < mesh.ndim:
        raise ValueError(
            f"{this_rank()}: {name} has no mesh dimension {mesh_dim}: got one of {mesh.ndim}"
        )
    found = [d for d, placement in enumerate(placements) if not placement.is_replicate()]
    if len(found) > 1 or (wanted is not None and found != [wanted]):
        over = "one mesh dimension" if mesh_dim is None else f"mesh dimension {mesh_dim!r} alone"
        raise ValueError(
            f"{this_rank()}: {name} must be sharded over {over}: got {list(placements)}; "
            "redistribute it, or take this rank's rows, DTensor.from_local(x.to_local(), "
            "mesh[dim], ...); what FSDP shards is whole inside the model's forward"
        )
    if not found:
        return None
    if not placements[found[0]].is_shard(dim % tensor.dim()):
        raise ValueError(
            f"{this_rank()}: {name} must be sharded over the vocabulary, "
            f"Shard({dim % tensor.dim()}): got {placements[found[0]]!r}; redistribute it"
        )
    return found[0]


def shard_of(name: str, tensor: Any, dim: int, mesh_dim: str | int | None = None) -> Shard | None:
    """The columns that this rank holds; None where it holds all. Raises as `sharded_mesh_dim`."""
    at = sharded_mesh_dim(name, tensor, dim, mesh_dim)
    if at is None:
        return None
    mesh, total = tensor.device_mesh, tensor.shape[dim]
    shard = Shard(
        mesh.get_group(at).group_name, chunks(total, mesh.size(at)), mesh.get_local_rank(at)
    )
    held = tensor.to_local().shape[dim]
    if held != shard.size:
        raise ValueError(
            f"{this_rank()}: {name}, {total} columns sharded over {mesh.size(at)} ranks, must have "
            f"{shard.size} of them here: got {held}"
        )
    return shard


def own_columns(name: str, logits: Tensor) -> tuple[Tensor, Shard | None]:
    """Logits as this rank has them, and which columns these are: all, for what is no DTensor."""
    if not is_dtensor(logits):
        return logits, None
    whole: Any = logits
    return whole.to_local(), shard_of(name, whole, -1)


def shard_of_sides(logits: Tensor, target: Tensor) -> Shard | None:
    """Which columns the sides of a pair hold, where one of them holds a part: LazyLogits of a
    sharded head, or a DTensor."""
    found = [shard for shard in map(_shard_of_side, (logits, target)) if shard is not None]
    if found and not alike(found[0], found[-1]):
        sides = " and ".join(f"{list(s.sizes)} on ranks {ranks_in(s.group)}" for s in found)
        raise ValueError(
            f"{this_rank()}: both sides must be sharded alike, over the same ranks: got columns "
            f"{sides}"
        )
    return found[0] if found else None


def _shard_of_side(logits: Tensor) -> Shard | None:
    head = getattr(logits, "onepass_head", None)
    return own_columns("logits", logits)[1] if head is None else head.shard


def own_side(logits: Tensor, shard: Shard | None) -> Tensor:
    """A side that is no LazyLogits, as this rank has it: of a whole one the shard's columns."""
    own, held = own_columns("logits", logits)
    if shard is None or held is not None:
        return own
    check_fixed(shard, own)
    columns: Tensor = shard.columns(own)
    return columns


def mesh_ranks(tensor: Any) -> list[tuple[int, ...]]:
    """Of every dimension of a DTensor's mesh, the ranks that this one shares it with."""
    mesh = tensor.device_mesh
    return [tuple(ranks_in(mesh.get_group(dim).group_name)) for dim in range(mesh.ndim)]


def own_rows(rows: Any, logits: Tensor) -> Any:
    """Labels or a mask, where they are a DTensor, for the rows that this rank has of the logits:
    all of those over the ranks that share the vocabulary."""
    if not is_dtensor(rows):
        return rows
    from torch.distributed.tensor import Replicate

    head = getattr(logits, "onepass_head", None)
    if head is None:
        return rows.full_tensor()
    ours = () if head.shard is None else tuple(ranks_in(head.shard.group))
    both = zip(mesh_ranks(rows), rows.placements, strict=True)
    wanted = [Replicate() if over == ours or p.is_partial() else p for over, p in both]
    return rows.redistribute(placements=wanted).to_local()
