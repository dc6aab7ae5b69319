"""Memory and race checks, and byte counts, for kernels that run in the interpreter.

`with guard(x, out): ...` fails a kernel that leaves the elements its tensors own (the padding
between the rows of a view is not theirs), or whose programs would race on a GPU.
`with count_bytes() as moved: ...` adds up what is moved.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from .interpreter import Access, KernelFault, observing


class OutOfBounds(KernelFault):
    """A load, store or atomic outside the elements that the tensors own."""


class Race(KernelFault):
    """Two accesses to one address whose order a GPU does not fix."""


# ---------------------------------------------------------------- which addresses a tensor owns


class Elements:
    """The addresses of one tensor's own elements, whatever its strides; or of its whole storage."""

    def __init__(self, tensor: torch.Tensor, whole_storage: bool = False) -> None:
        if whole_storage:
            length = tensor.untyped_storage().nbytes() // tensor.element_size()
            tensor = tensor.detach().as_strided((length,), (1,), 0)
        self.size = tensor.element_size()
        self.start = tensor.data_ptr()
        # A broadcast dimension (stride 0) and one of length 1 add no element.
        dims = [(s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1 and s]
        self.dims = sorted(dims, reverse=True)
        extent = sum((n - 1) * s for s, n in self.dims) + 1 if tensor.numel() else 0
        self.end = self.start + extent * self.size
        self.label = (
            f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} "
            f"with strides {tuple(tensor.stride())}"
        )
        self.overlapping: np.ndarray | None = None
        inner = 1
        for stride, length in reversed(self.dims):
            if (
                stride < inner
            ):  # windows that overlap: no division by strides can tell, so list them
                self.overlapping = self._offsets()
                break
            inner += (length - 1) * stride

    def _offsets(self) -> np.ndarray:
        offsets = np.zeros(1, np.int64)
        for stride, length in self.dims:
            offsets = np.unique((offsets[:, None] + np.arange(length) * stride).ravel())
        return offsets

    def _owns_first_byte(self, addresses: np.ndarray) -> np.ndarray:
        relative = addresses.astype(np.int64) - self.start
        inside = (relative >= 0) & (relative < self.end - self.start)
        offset = relative // self.size
        if self.overlapping is not None:
            return inside & np.isin(offset, self.overlapping)
        for stride, length in self.dims:
            index = np.minimum(offset // stride, length - 1)
            offset = offset - index * stride
        return inside & (offset == 0)

    def owns(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which of the accesses of `width` bytes lie wholly in elements of this tensor."""
        owned = self._owns_first_byte(addresses)
        for byte in [*range(self.size, width, self.size), width - 1]:
            if byte > 0:
                owned &= self._owns_first_byte(addresses + np.uint64(byte))
        return owned


class Memory:
    """The union of several tensors' elements, searched by storage."""

    def __init__(self, parts: list[Elements]) -> None:
        groups: list[list[Elements]] = []
        ends: list[int] = []
        for part in sorted((p for p in parts if p.end > p.start), key=lambda p: p.start):
            if groups and part.start < ends[-1]:
                groups[-1].append(part)
                ends[-1] = max(ends[-1], part.end)
            else:
                groups.append([part])
                ends.append(part.end)
        self.groups = groups
        self.ends = ends
        self.starts = [group[0].start for group in groups]

    def owns(self, addresses: np.ndarray, width: int) -> np.ndarray:
        if not self.groups:
            return np.zeros(addresses.shape, dtype=bool)
        low, high = int(addresses.min()), int(addresses.max()) + width
        place = bisect.bisect_right(self.starts, low) - 1
        near = self.groups[place] if place >= 0 and high <= self.ends[place] else None
        owned = np.zeros(addresses.shape, dtype=bool)
        for group in self.groups if near is None else [near]:
            for part in group:
                owned |= part.owns(addresses, width)
        return owned

    def describe(self, address: int) -> str:
        """Where an address lies that no tensor owns."""
        if not self.groups:
            return "no tensor was given"

        def distance(part: Elements) -> int:
            return max(part.start - address, address - part.end + 1, 0)

        part = min((part for group in self.groups for part in group), key=distance)
        if distance(part) == 0:
            return f"between the elements of {part.label}"
        if address < part.start:
            return f"{part.start - address} bytes before {part.label}"
        return f"{address - part.end} bytes past the end of {part.label}"


def _flatten(tensors: Any) -> list[torch.Tensor]:
    if tensors is None:
        return []
    if isinstance(tensors, torch.Tensor):
        return [tensors]
    return [tensor for item in tensors for tensor in _flatten(item)]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# ---------------------------------------------------------------- guard

_FACTORIES: tuple[tuple[Any, str], ...] = (
    *(
        (torch, name)
        for name in (
            "empty",
            "empty_like",
            "empty_strided",
            "zeros",
            "zeros_like",
            "ones",
            "ones_like",
            "full",
            "full_like",
            "tensor",
        )
    ),
    *(
        (torch.Tensor, name)
        for name in (
            "new_empty",
            "new_empty_strided",
            "new_zeros",
            "new_ones",
            "new_full",
            "new_tensor",
            "clone",
            "contiguous",
            "reshape",
            "to",
            "float",
        )
    ),
)


@contextmanager
def _recording_allocations(into: list[torch.Tensor]) -> Iterator[None]:
    """Keeps what Python code allocates: a kernel may reach it through a table of pointers."""

    def recording(original: Any) -> Any:
        def make(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            if type(made) is torch.Tensor and made.device.type == "cpu":
                into.append(made)
            return made

        return make

    originals = [(owner, name, getattr(owner, name)) for owner, name in _FACTORIES]
    for owner, name, original in originals:
        setattr(owner, name, recording(original))
    try:
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


_LOAD, _STORE, _ATOMIC = 0, 1, 2
_KINDS = {"load": _LOAD, "store": _STORE, "atomic": _ATOMIC}


@dataclass
class _Trace:
    """One launch's accesses, one array entry per active lane once `columns` has been called."""

    addresses: list[np.ndarray] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    programs: list[int] = field(default_factory=list)
    epochs: list[int] = field(default_factory=list)

    def columns(self) -> tuple[np.ndarray, ...]:
        """Addresses in common units, and for each the kind, program, barrier epoch and order."""
        unit = min(self.widths)
        if any((block % np.uint64(unit)).any() for block in self.addresses):
            unit = 1
        blocks = []
        for block, width in zip(self.addresses, self.widths, strict=True):
            steps = np.arange(0, width, unit, dtype=np.uint64)
            blocks.append((block[:, None] + steps).ravel())
        lengths = [len(block) for block in blocks]
        return (
            np.concatenate(blocks),
            np.repeat(np.array(self.kinds), lengths),
            np.repeat(np.array(self.programs), lengths),
            np.repeat(np.array(self.epochs), lengths),
            np.repeat(np.arange(len(blocks)), lengths),
        )


class _Guard:
    def __init__(self, given: list[torch.Tensor], arguments_too: bool) -> None:
        self.given = given
        self.arguments_too = arguments_too
        self.allocations: list[torch.Tensor] = []
        self.fault: KernelFault | None = None
        self.memory = Memory([Elements(tensor) for tensor in given])
        self.kernel = "kernel"
        self.trace = _Trace()
        self.program_ids: dict[tuple[int, int, int], int] = {}
        self.epochs: dict[tuple[int, int, int], int] = {}

    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.kernel = kernel
        self.trace = _Trace()
        self.program_ids = {}
        self.epochs = {}
        if self.arguments_too:
            # Of a storage that the test gave, only the given elements; of any other, all of it:
            # a launcher may pass one element as the base of a whole temporary.
            known = {_storage(tensor) for tensor in self.given}
            parts = [Elements(tensor) for tensor in self.given]
            for tensor in [*tensors, *self.allocations]:
                if _storage(tensor) not in known:
                    known.add(_storage(tensor))
                    parts.append(Elements(tensor, whole_storage=True))
            self.memory = Memory(parts)

    def access(self, access: Access) -> None:
        owned = self.memory.owns(access.addresses, access.width)
        if not owned.all():
            first = int(access.addresses[~owned][0])
            self._fail(
                OutOfBounds(
                    f"{self.kernel}, program {access.program}: {access.kind} of "
                    f"{int((~owned).sum())} elements of {access.width} bytes out of bounds, "
                    f"the first {self.memory.describe(first)}"
                )
            )
        if access.kind == "store" and access.values is not None:
            self._check_lanes(access)
        self.trace.addresses.append(access.addresses)
        self.trace.widths.append(access.width)
        self.trace.kinds.append(_KINDS[access.kind])
        self.trace.programs.append(
            self.program_ids.setdefault(access.program, len(self.program_ids))
        )
        self.trace.epochs.append(self.epochs.get(access.program, 0))

    def _check_lanes(self, access: Access) -> None:
        """Lanes of one store may share an address only when they write the same bits."""
        assert access.values is not None
        unique, first, inverse = np.unique(access.addresses, return_index=True, return_inverse=True)
        if len(unique) == len(access.addresses):
            return
        bits = np.ascontiguousarray(access.values).view(f"u{access.values.itemsize}")
        if (bits != bits[first][inverse.ravel()]).any():
            self._fail(
                Race(
                    f"{self.kernel}, program {access.program}: "
                    "lanes of one store write different values to one address"
                )
            )

    def barrier(self, program: tuple[int, int, int]) -> None:
        self.epochs[program] = self.epochs.get(program, 0) + 1

    def finish(self) -> None:
        """At the end of a launch all accesses are known, so programs are compared here."""
        if not self.trace.addresses:
            return
        addresses, kinds, programs, epochs, order = self.trace.columns()
        if not (kinds == _STORE).any() and not (kinds == _ATOMIC).any():
            return
        by_address = np.lexsort((order, programs, addresses))
        addresses, kinds, programs, epochs, order = (
            column[by_address] for column in (addresses, kinds, programs, epochs, order)
        )
        starts = np.flatnonzero(np.r_[True, addresses[1:] != addresses[:-1]])
        several = np.minimum.reduceat(programs, starts) != np.maximum.reduceat(programs, starts)
        stored = np.logical_or.reduceat(kinds == _STORE, starts)
        loaded = np.logical_or.reduceat(kinds == _LOAD, starts)
        atomic = np.logical_or.reduceat(kinds == _ATOMIC, starts)
        racing = np.flatnonzero(several & (stored | (atomic & loaded)))
        if len(racing):
            begin = starts[racing[0]]
            end = starts[racing[0] + 1] if racing[0] + 1 < len(starts) else len(addresses)
            self._fail(self._between_programs(kinds[begin:end], programs[begin:end], len(racing)))
        repeats = (
            (addresses[1:] == addresses[:-1])
            & (programs[1:] == programs[:-1])
            & (kinds[:-1] == _STORE)
            & (order[1:] != order[:-1])
            & (epochs[1:] == epochs[:-1])
        )
        if repeats.any():
            at = int(np.flatnonzero(repeats)[0])
            again = "writes again" if kinds[at + 1] == _STORE else "reads back"
            self._fail(
                Race(
                    f"{self.kernel}, program {self._name(programs[at])}: {again} "
                    f"{int(repeats.sum())} addresses it wrote, with no tl.debug_barrier() between"
                )
            )

    def _name(self, number: int) -> tuple[int, int, int]:
        return list(self.program_ids)[int(number)]

    def _between_programs(self, kinds: np.ndarray, programs: np.ndarray, count: int) -> Race:
        writers = np.unique(programs[kinds != _LOAD])
        if len(writers) > 1:
            names = f"programs {self._name(writers[0])} and {self._name(writers[1])} both write"
        else:
            reader = programs[programs != writers[0]][0]
            names = f"program {self._name(reader)} reads what {self._name(writers[0])} writes:"
        return Race(f"{self.kernel}: {names} one address ({count} such)")

    def _fail(self, fault: KernelFault) -> None:
        self.fault = self.fault or fault
        raise fault


@contextmanager
def guard(*tensors: Any, arguments_too: bool = True) -> Iterator[None]:
    """Fails any launch within the block that leaves its memory or races.

    Args:
        tensors: tensors (None and nested lists too) whose own elements kernels may touch.
        arguments_too: also allow the storages of what a launch receives and of what Python code
            allocates within the block, unless they are the storage of one of `tensors`.
    """
    watch = _Guard(_flatten(tensors), arguments_too)
    with observing(watch):
        if arguments_too:
            with _recording_allocations(watch.allocations):
                yield
        else:
            yield
    if watch.fault is not None:  # the code under test swallowed it
        raise watch.fault


# ---------------------------------------------------------------- byte counts


class Moved:
    """What the kernels within a `count_bytes` block loaded and stored."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self._accesses: list[Access] = []
        # Nothing a launch received may be freed meanwhile: its addresses would come again.
        self._alive: list[torch.Tensor] = []

    def launch(self, kernel: str, tensors: list[torch.Tensor]) -> None:
        self.launches.append(kernel)
        self._alive += tensors

    def access(self, access: Access) -> None:
        self._accesses.append(access)

    def barrier(self, program: tuple[int, int, int]) -> None:
        pass

    def finish(self) -> None:
        pass

    def _bytes(self, kinds: set[str], tensor: torch.Tensor | None, distinct: bool) -> int:
        elements = None if tensor is None else Elements(tensor)
        parts: list[np.ndarray] = []
        total = 0
        for access in self._accesses:
            if access.kind in kinds:
                hits = access.addresses
                if elements is not None:
                    hits = hits[elements.owns(hits, access.width)]
                total += len(hits) * access.width
                if distinct:
                    steps = np.arange(access.width, dtype=np.uint64)
                    parts.append(np.unique((hits[:, None] + steps).ravel()))
        if distinct:
            return len(np.unique(np.concatenate(parts))) if parts else 0
        return total

    def read(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes loaded by active lanes, from this tensor's elements or in all."""
        return self._bytes({"load", "atomic"}, tensor, False)

    def written(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes stored by active lanes, into this tensor's elements or in all."""
        return self._bytes({"store", "atomic"}, tensor, False)

    def distinct_read(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes loaded, each counted once: equal to `read` when nothing was read twice."""
        return self._bytes({"load", "atomic"}, tensor, True)

    def distinct_written(self, tensor: torch.Tensor | None = None) -> int:
        """Bytes stored, each counted once: equal to `written` when nothing was written twice."""
        return self._bytes({"store", "atomic"}, tensor, True)


@contextmanager
def count_bytes() -> Iterator[Moved]:
    """Counts what the launches within the block move; ask the result per tensor, then or later."""
    moved = Moved()
    with observing(moved):
        yield moved
