"""No vocabulary and no row stride is slow: what is launched for each, compiled and counted.

The launches of real calls are recorded and compiled ahead of time as Triton would specialise them
(which integers are multiples of 16, which are 1), and each byte is counted in the interpreter. Both
are held to the friendliest vocabulary: as wide, no more instructions, no more bytes an element.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import onepass
from onepass.bench.cases import VOCABULARIES
from onepass.ops import head as head_module
from support.aot import Compiled, Job, compile_kernels, function_arguments, why_not
from support.environment import NO_INTERPRETER
from support.guard import count_bytes

triton = pytest.importorskip("triton", reason="kernels cannot be compiled without Triton")
pytestmark = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER or "-")

TARGET = "sm_90"
KERNELS = {
    "vocab_stats": (
        "vocab_stats_kernel",
        "vocab_stats_merge_kernel",
        "vocab_stats_backward_kernel",
    ),
    "vocab_pair_stats": (
        *("vocab_pair_stats_kernel", "vocab_pair_stats_merge_kernel", "vocab_jsd_kernel"),
        "vocab_pair_stats_backward_kernel",
    ),
}


@dataclass
class Launch:
    """One launch: the kernel, its grid, every argument by name."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    @property
    def unspecialised(self) -> set[str]:
        """Arguments that Triton compiles nothing anew for."""
        return set(importlib.import_module(self.kernel.fn.__module__).COUNTS)

    def integers(self) -> dict[str, int]:
        """The arguments that are numbers at run time, save the unspecialised."""
        return {
            name: value
            for name, value in self.arguments.items()
            if isinstance(value, int) and not name.isupper() and name not in self.unspecialised
        }

    def job(self) -> Job:
        """What Triton compiles for it: 16 bytes where an address allows, integers as they are."""
        signature: dict[str, str] = {}
        constexprs: dict[str, Any] = {}
        multiples: list[str] = []
        flushed = importlib.import_module("onepass.kernels.online_softmax").flushed_exp
        for name in function_arguments(self.kernel):
            value = self.arguments[name]
            if isinstance(value, torch.Tensor):
                signature[name] = "*" + TYPES[value.dtype]
                if value.data_ptr() % 16 == 0:
                    multiples.append(name)
            elif name == "EXP":
                constexprs[name] = flushed  # what CUDA gets
            elif name.isupper() or value is None:
                constexprs[name] = value
            elif isinstance(value, float):
                signature[name] = "fp32"
            elif value == 1 and name not in self.unspecialised:
                constexprs[name] = 1
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0 and name not in self.unspecialised:
                    multiples.append(name)
        return Job(
            self.kernel, signature, constexprs, multiples, TARGET, self.arguments["num_warps"]
        )


TYPES = {
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}


class Recorder:
    """Stands for a kernel and notes its launches; nothing is computed."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*positional: Any, **named: Any) -> Any:
            names = function_arguments(self.kernel)
            arguments = {**dict(zip(names, positional, strict=False)), **named}
            self.launches.append(Launch(self.kernel, grid, arguments))

        return launch


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that the block would make, in order."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module, names in KERNELS.items():
            kernels = importlib.import_module(f"onepass.kernels.{module}")
            for name in names:
                patch.setattr(kernels, name, Recorder(getattr(kernels, name), launches))
        yield launches


# ---------------------------------------------------------------- what is called


def rows_of(rows: int, vocab_size: int, stride: int, start: int, dtype: torch.dtype) -> Any:
    """[rows, V] with such a stride, `start` elements behind an aligned address."""
    room = torch.zeros(start + rows * stride + 16, dtype=dtype)
    return room.as_strided((rows, vocab_size), (stride, 1), start).requires_grad_()


def of_logits(rows: int, vocab_size: int, stride: int, start: int, dtype: torch.dtype) -> Any:
    """log-probability and entropy with gradient, as CE, DPO and policy losses ask for."""
    logits = rows_of(rows, vocab_size, stride, start, dtype)
    labels = torch.zeros(rows, dtype=torch.int64)
    stats = onepass.vocab_stats(logits, labels, want=("logp", "entropy"), impl="triton")
    (stats.logp + stats.entropy).sum().backward()


def of_a_pair(rows: int, vocab_size: int, stride: int, start: int, dtype: torch.dtype) -> Any:
    logits, target = (rows_of(rows, vocab_size, stride, start, dtype) for _ in range(2))
    target = target.detach()
    stats = onepass.vocab_pair_stats(logits, target, want=("kl", "jsd"), impl="triton")
    (stats.kl + stats.jsd).sum().backward()


def of_a_head(rows: int, vocab_size: int, stride: int, start: int, dtype: torch.dtype) -> Any:
    """A trained head's cross-entropy; slabs have a stride of their own."""
    hidden = torch.zeros(rows, 8, dtype=dtype, requires_grad=True)
    weight = torch.zeros(vocab_size, 8, dtype=dtype, requires_grad=True)
    logits = onepass.LazyLogits(hidden, weight)
    onepass.cross_entropy(logits, torch.zeros(rows, dtype=torch.int64), impl="triton").backward()


CALLS = {"logits": of_logits, "pair": of_a_pair, "head": of_a_head}


def layouts(call: str, vocab_size: int) -> dict[str, tuple[int, int]]:
    """Stride and start: dense, odd, padded as slabs are, and off by one token (logits[:, :-1])."""
    odd = vocab_size + 1 + vocab_size % 2
    padded = -(-vocab_size // 8) * 8
    every = {"dense": (vocab_size, 0), "odd": (odd, 0), "padded": (padded, 0), "shifted": (odd, 3)}
    return {"slab": (0, 0)} if call == "head" else every


@pytest.fixture(autouse=True)
def slabs_as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "GPU_TYPES", ("cpu",))


# ---------------------------------------------------------------- compiled


def specialised(call: str, dtype: torch.dtype) -> dict[str, Job]:
    """Every different code that a GPU would run for these vocabularies and layouts, by a name that
    says for which first. A merge reads a few numbers of a row and has no loop: it is left out."""
    jobs: dict[str, Job] = {}
    for vocab_size in VOCABULARIES:
        for layout, (stride, start) in layouts(call, vocab_size).items():
            for rows in (2, 1) if call == "logits" else (2,):  # a single row has no stride
                with recorded() as launches:
                    CALLS[call](rows, vocab_size, stride, start, dtype)
                for launch in launches:
                    job = launch.job()
                    if "merge" not in launch.name and job not in jobs.values():
                        jobs[f"{launch.name} V={vocab_size} {layout} rows={rows}"] = job
    return jobs


def work(kernel: Compiled) -> list[tuple[int, int]]:
    """Of each loop over global memory: its instructions, and the bits that one thread moves."""
    return [(len(loop.opcodes), loop.bits_moved) for loop in kernel.innermost_loops]


@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        ("logits", torch.bfloat16),
        ("logits", torch.float32),
        ("pair", torch.bfloat16),
        ("head", torch.bfloat16),
    ],
    ids=["logits-bf16", "logits-fp32", "pair-bf16", "head-bf16"],
)
def test_every_vocabulary_runs_the_same_wide_code(call: str, dtype: torch.dtype) -> None:
    """16-byte accesses in every loop, and for a bit moved at most 3% more instructions than where
    size, stride and address are all multiples of 16."""
    if why_not(TARGET):
        pytest.skip(why_not(TARGET))
    jobs = specialised(call, dtype)
    assert len(jobs) > len({job.fn for job in jobs.values()}), "only one kind was launched"
    compiled = dict(zip(jobs, compile_kernels(list(jobs.values())), strict=True))
    friendliest: dict[str, list[tuple[int, int]]] = {}
    for name, kernel in compiled.items():
        loops = kernel.innermost_loops
        assert loops and {a.bits for loop in loops for a in loop.accesses} == {128}, name
        best = friendliest.setdefault(kernel.name, work(kernel))  # V = 32000, dense, comes first
        for (instructions, bits), (fewest, most) in zip(work(kernel), best, strict=True):
            assert instructions / bits <= 1.03 * fewest / most, f"{name}: {work(kernel)} {best}"
        assert not kernel.spills, name


@pytest.mark.parametrize("call", CALLS)
def test_no_batch_is_compiled_for_itself(call: str) -> None:
    """From 1 row to 16384 the programs are the same, as many for each row; only a single row, which
    has no stride, has its own."""
    found: dict[int, list[Any]] = {}
    for rows in (1, 2, 3, 64, 16384):
        with recorded() as launches:
            CALLS[call](rows, 1003, 1009, 1, torch.bfloat16)
        found[rows] = [(launch.name, launch.grid[1:], launch.integers()) for launch in launches]
        assert {launch.grid[0] for launch in launches} == {rows}
    for rows in (3, 64, 16384):
        assert found[rows] == found[2]
    assert [(name, grid) for name, grid, _ in found[1]] == [kind[:2] for kind in found[2]]


# ---------------------------------------------------------------- counted


def bytes_of(call: str, rows: int, vocab_size: int, stride: int, start: int) -> float:
    """Moved for each element of the logits, by all launches of one call and its backward."""
    with count_bytes() as moved:
        CALLS[call](rows, vocab_size, stride, start, torch.bfloat16)
    return (moved.read() + moved.written()) / (rows * vocab_size)


LEAST = {"logits": 2 * 3, "head": 2 * 3}  # read, read again, gradient written


@pytest.mark.parametrize("vocab_size", VOCABULARIES)
@pytest.mark.parametrize("call", LEAST)
def test_every_vocabulary_moves_as_little(call: str, vocab_size: int) -> None:
    for stride, start in list(layouts(call, vocab_size).values())[-1:]:  # the unfriendliest
        assert LEAST[call] <= bytes_of(call, 1, vocab_size, stride, start) <= 1.01 * LEAST[call]


@pytest.mark.parametrize("rows", [2, 7])
@pytest.mark.parametrize("call", LEAST)
def test_every_batch_moves_as_little(call: str, rows: int) -> None:
    assert LEAST[call] <= bytes_of(call, rows, 20001, 20003, 5) <= 1.01 * LEAST[call]


# ---------------------------------------------------------------- the head's own rows


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("vocab_size", (*VOCABULARIES, 1, 7))
def test_slabs_are_padded_with_zeros(vocab_size: int, dtype: torch.dtype) -> None:
    """Every row of a slab starts at 16 bytes, and what a product may multiply beyond V is 0."""
    room = head_module.padded_room(torch.zeros(3, 4, dtype=dtype), 3, vocab_size)
    width = 128 // torch.finfo(dtype).bits
    assert room.shape == (3, vocab_size) and room.stride(1) == 1
    assert room.stride(0) % width == 0 and room.stride(0) - vocab_size < width
    assert room.data_ptr() % 16 == 0
    beyond = room.as_strided((3, room.stride(0) - vocab_size), room.stride(), vocab_size)
    assert not beyond.any()
