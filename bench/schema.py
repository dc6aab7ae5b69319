"""What a case of the benchmark is: its sizes, its providers, and how ours and torch's are made.

A provider is a function of the case's inputs that returns a tuple of tensors. "eager" is always
the plain torch one, and run on fp64 copies of the inputs it is also the truth that every provider
is held to before it is timed. Torch and the peers are imported when a provider is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    Inputs = dict[str, Any]
    Outputs = tuple[torch.Tensor, ...]
    Function = Callable[[Inputs], Outputs]


CAP, CAP_SLOPE = 20.0, 0.2  # so that the capped loss of these inputs is neither flat nor saturated


class NotHere(Exception):
    """A provider's reason not to run on this machine, as its table row shall say it."""


@dataclass(frozen=True)
class Size:
    """One point of a case. `N` rows of `V` logits, of `D` hidden states, or of both."""

    N: int
    V: int | None = None
    D: int | None = None
    dtype: str = "bfloat16"
    row_stride: int | None = None  # of the logits, where it is not V
    masked: float = 0.0  # share of rows whose label is -100
    students: int = 1  # rows of logits for each row of the target
    layers: int = 1  # pairs of hidden states
    inputs: str = "random"  # or another kind that the case knows how to make

    @property
    def label(self) -> str:
        """The size as it is written in tables and stored in rows."""
        name = "x".join(str(n) for n in (self.N, self.D, self.V) if n is not None)
        notes = [f"{name} {self.dtype}"]
        if self.row_stride is not None:
            notes.append(f"stride {self.row_stride}")
        if self.masked:
            notes.append(f"{self.masked:.0%} masked")
        if self.students > 1:
            notes.append(f"{self.students} students")
        if self.layers > 1:
            notes.append(f"{self.layers} layers")
        if self.inputs != "random":
            notes.append(self.inputs)
        return ", ".join(notes)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: `load()` imports what it needs and returns the function."""

    name: str
    load: Callable[[], Function]
    distribution: str | None = None  # a peer's name on the package index
    gpu_only: bool = False
    half_only: bool = False  # the same as eager in fp32, so listed for bf16 and fp16 alone
    compiled: bool = False  # worth a compiler run: left out of --quick
    overwrites: tuple[str, ...] = ()  # inputs that it destroys; restored before every call
    floor: bool = False  # a part of the work, to compare with: there is no result to check


@dataclass(frozen=True)
class Case:
    """A row of the benchmark."""

    name: str
    what: str
    inputs: Callable[[Size, torch.Generator], Inputs]
    wrt: tuple[str, ...]  # the inputs that get a gradient; a list of tensors counts as one
    providers: tuple[Provider, ...]
    # By device type; --quick takes the first, and `more` waits for --all-sizes.
    sizes: Mapping[str, tuple[Size, ...]]
    more: Mapping[str, tuple[Size, ...]] = field(default_factory=dict)
    modes: tuple[str, ...] = ("full",)
    # Elements that any provider must read in a pass, and gradients it must write; None where
    # arithmetic and not memory sets the time.
    traffic: Callable[[Size], tuple[int, int]] | None = None
    upstream: tuple[float, ...] = (1.0,)  # for scalar outputs; per-row outputs draw theirs
    # Triton launches of ours forward and backward; of a case with a head, for each slab.
    launches: tuple[int, int] = (2, 1)
    passes: int = 1  # of ours over the inputs in the forward
    foretold: bool = False  # a head's gradients are made in the forward: no second product
    has_roofline: bool = True  # roofline.py knows what ours does

    def bytes_moved(self, size: Size, mode: str) -> int | None:
        """Bytes of the big tensors that `mode` must move when its passes are separate."""
        if self.traffic is None:
            return None
        read, written = self.traffic(size)
        elements = {"forward": read, "backward": read + written, "full": 2 * read + written}[mode]
        return elements * (4 if size.dtype == "float32" else 2)

    def at(self, size: Size, dtype: str | None) -> Size:
        """`size` in another dtype, where one was asked for."""
        return size if dtype is None else replace(size, dtype=dtype)


def wide(x: torch.Tensor) -> torch.Tensor:
    """fp16 and bf16 as fp32, the upcast that training code does before its loss."""
    return x.float() if x.element_size() < 4 else x


def compiled(function: Function) -> Callable[[], Function]:
    def load() -> Function:
        import torch

        return torch.compile(function, dynamic=False)

    return load


def ours(load: Callable[[str], Function]) -> tuple[Provider, ...]:
    """The package as installed, and its torch path where that is another one."""
    return (
        Provider("onepass", lambda: load("auto")),
        Provider("onepass-torch", lambda: load("torch"), gpu_only=True),
    )


def plain(function: Function) -> tuple[Provider, ...]:
    return (
        Provider("eager", lambda: function),
        Provider("compile", compiled(function), compiled=True),
    )


def peer(name: str, load: Callable[[], Function], **options: Any) -> Provider:
    return Provider(name, load, distribution=name, **options)
