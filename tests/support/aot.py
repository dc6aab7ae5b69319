"""Compiles kernels ahead of time for GPUs that are not here, and reads their machine code.

`compile_kernels([Job(...), ...])` gives for each job its registers, spills, shared memory, every
access to global memory with its width, and the loops they sit in: `compiled.main_loop.loads` are
the loads that a long row repeats.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def why_not(target: str) -> str:
    """Why nothing can be compiled for this target here, fit for a skip; empty if it can."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return "Triton is not installed (it has no wheels for macOS and Windows)"
    backends = Path(spec.origin).parent / "backends"
    needed = backends / "nvidia/bin/nvdisasm" if target.startswith("sm_") else backends / "amd/lib"
    return "" if needed.exists() else f"this build of Triton comes without {needed.name}"


@dataclass(frozen=True)
class Job:
    """One kernel in one configuration for one target.

    Args:
        fn: the @triton.jit function, at the top level of a module.
        signature: Triton's type of each run-time argument by name ("*bf16", "i32", "fp32", ...).
        constexprs: the other arguments: numbers, None for an absent pointer, @triton.jit functions.
            A launch also makes a constant of an integer that is 1: put it here to see that code.
        multiples_of_16: arguments (addresses and integers) that the launch promises to be such.
        target: one of TARGETS.
        options: further compiler options (num_stages, enable_fp_fusion, maxnreg, ...).
    """

    fn: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    multiples_of_16: Collection[str] = ()
    target: str = "sm_90"
    num_warps: int = 4
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Access:
    """One vector instruction that touches global memory (AMD's scalar s_load is not listed)."""

    kind: str  # "load", "store", "atomic"
    opcode: str
    bits: int  # width per thread; 0 for an atomic


@dataclass(frozen=True)
class Loop:
    """A loop of the machine code with everything inside it, inner loops too."""

    opcodes: tuple[str, ...]
    depth: int  # 1 for an outermost loop
    innermost: bool

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        return _accesses(self.opcodes)

    @property
    def loads(self) -> list[Access]:
        return [access for access in self.accesses if access.kind == "load"]

    @property
    def stores(self) -> list[Access]:
        return [access for access in self.accesses if access.kind == "store"]

    @property
    def bits_moved(self) -> int:
        """Bits that one thread loads and stores in one turn."""
        return sum(access.bits for access in self.accesses)

    def count(self, prefix: str) -> int:
        """How many instructions start with this, e.g. "MUFU.EX2"."""
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)


@dataclass(frozen=True)
class Compiled:
    """What came out of one job."""

    name: str
    target: str
    registers: int  # per thread; on AMD vector registers
    stack_bytes: int  # local memory (NVIDIA) or scratch (AMD) per thread
    shared_bytes: int
    vgpr_spills: int  # AMD; 0 on NVIDIA
    sgpr_spills: int
    code: str  # the disassembly

    @cached_property
    def _instructions(self) -> list[_Instruction]:
        parse = _parse_sass if self.target.startswith("sm_") else _parse_amdgcn
        return parse(self.code, self.name)

    @cached_property
    def opcodes(self) -> tuple[str, ...]:
        return tuple(instruction.opcode for instruction in self._instructions)

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        return _accesses(self.opcodes)

    @property
    def loads(self) -> list[Access]:
        return [access for access in self.accesses if access.kind == "load"]

    @property
    def stores(self) -> list[Access]:
        return [access for access in self.accesses if access.kind == "store"]

    @property
    def spill_instructions(self) -> int:
        """Loads and stores of local (scratch) memory."""
        return sum(opcode.startswith(_LOCAL) for opcode in self.opcodes)

    @property
    def spills(self) -> bool:
        """Whether vector registers did not suffice.

        AMD's scalar registers spill into vector registers: those are counted by sgpr_spills.
        """
        return bool(self.stack_bytes or self.vgpr_spills or self.spill_instructions)

    @cached_property
    def loops(self) -> list[Loop]:
        """Every loop, outer ones before their inner ones, in the order of the code."""
        return _find_loops(self._instructions)

    @property
    def innermost_loops(self) -> list[Loop]:
        """The innermost loops that touch global memory."""
        return [loop for loop in self.loops if loop.innermost and loop.accesses]

    @property
    def main_loop(self) -> Loop:
        """The innermost loop that moves most per turn; ValueError when none or several do."""
        loops = sorted(self.innermost_loops, key=lambda loop: loop.bits_moved, reverse=True)
        if not loops:
            raise ValueError(f"{self.name} for {self.target} has no loop over global memory")
        if len(loops) > 1 and loops[0].bits_moved == loops[1].bits_moved:
            raise ValueError(
                f"{self.name} for {self.target} has several loops that move as much: "
                "use innermost_loops"
            )
        return loops[0]

    def __str__(self) -> str:
        """One line for an assertion's message."""
        inside = [dict(Counter(a.opcode for a in loop.accesses)) for loop in self.innermost_loops]
        return (
            f"{self.name} for {self.target}: {self.registers} registers, "
            f"{self.stack_bytes} bytes of stack, {self.vgpr_spills}+{self.sgpr_spills} spills, "
            f"{self.shared_bytes} bytes shared; in its loops {inside}; "
            f"in all {dict(Counter(a.opcode for a in self.accesses))}"
        )


# ---------------------------------------------------------------- compiling


def _reference(fn: Any) -> dict[str, str]:
    function = getattr(fn, "fn", fn)
    name = function.__qualname__
    if "." in name:
        raise ValueError(f"{name} is not at the top level of a module: a subprocess cannot find it")
    return {"module": function.__module__, "file": function.__code__.co_filename, "name": name}


def _portable(value: Any) -> Any:
    """A constexpr as JSON: functions by reference, Triton's dtypes by name."""
    if hasattr(value, "fn"):
        return {"fn": _reference(value)}
    if hasattr(value, "primitive_bitwidth"):
        return {"dtype": value.name}
    return value


def _request(job: Job) -> dict[str, Any]:
    names = function_arguments(job.fn)
    unknown = {*job.signature, *job.constexprs, *job.multiples_of_16} - set(names)
    missing = set(names) - {*job.signature, *job.constexprs}
    if unknown or missing:
        raise ValueError(
            f"arguments of {_reference(job.fn)['name']}: unknown {sorted(unknown)}, "
            f"without a type or value {sorted(missing)}"
        )
    return {
        "fn": _reference(job.fn),
        "signature": dict(job.signature),
        "constexprs": {name: _portable(value) for name, value in job.constexprs.items()},
        "multiples_of_16": sorted(job.multiples_of_16),
        "target": job.target,
        # Stated because its default changes in Triton 3.10; a job may state otherwise.
        "options": {"enable_fp_fusion": True, "num_warps": job.num_warps, **job.options},
    }


def function_arguments(fn: Any) -> list[str]:
    """The names of a kernel's arguments in order."""
    function = getattr(fn, "fn", fn)
    code = function.__code__
    return list(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])


def compile_kernels(jobs: Sequence[Job], timeout: float = 600.0) -> list[Compiled]:
    """Compiles all jobs in one subprocess with its own cache; RuntimeError names what fails."""
    requests = [_request(job) for job in jobs]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory(prefix="aot-") as folder:
        jobs_file, results_file = Path(folder, "jobs.json"), Path(folder, "results.json")
        jobs_file.write_text(json.dumps({"path": sys.path, "jobs": requests}))
        environment["TRITON_CACHE_DIR"] = str(Path(folder, "cache"))
        run = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("aot_worker.py"))]
            + [str(jobs_file), str(results_file)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if run.returncode:
            raise RuntimeError(f"the compiling process ended with {run.returncode}:\n{run.stderr}")
        results = json.loads(results_file.read_text())
    failures = [
        f"{request['fn']['name']} for {request['target']}: {result['error']}"
        for request, result in zip(requests, results, strict=True)
        if "error" in result
    ]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [
        Compiled(
            name=result["name"],
            target=request["target"],
            registers=result["registers"],
            stack_bytes=result["stack_bytes"],
            shared_bytes=result["shared_bytes"],
            vgpr_spills=result.get("vgpr_spills", 0),
            sgpr_spills=result.get("sgpr_spills", 0),
            code=result["code"],
        )
        for request, result in zip(requests, results, strict=True)
    ]


def compile_kernel(
    fn: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    multiples_of_16: Collection[str] = (),
    target: str = "sm_90",
    num_warps: int = 4,
    **options: Any,
) -> Compiled:
    """One kernel alone; see Job. Many at once go faster through compile_kernels."""
    job = Job(fn, signature, constexprs, multiples_of_16, target, num_warps, options)
    return compile_kernels([job])[0]


# ---------------------------------------------------------------- reading the code


@dataclass(frozen=True)
class _Instruction:
    opcode: str
    labels: tuple[str, ...]  # labels that stand before it
    targets: tuple[str, ...]  # labels it may jump to
    falls_through: bool


_LOCAL = ("LDL", "STL", "scratch_load", "scratch_store")
_SASS_LINE = re.compile(
    r"^\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(@!?U?P[0-9T]+\s+)?([A-Z][\w.]*)\s*([^;]*);"
)
_LABEL = re.compile(r"^([.\w$]+):")
_SASS_TARGET = re.compile(r"`\(([.\w$]+)\)")
_SASS_GLOBAL = {
    "LDG": "load",
    "LD": "load",
    "LDGSTS": "load",
    "STG": "store",
    "ST": "store",
    "RED": "atomic",
    "REDG": "atomic",
    "ATOM": "atomic",
    "ATOMG": "atomic",
    "UTMALDG": "load",
    "UTMASTG": "store",
    "UBLKCP": "load",
}
_SASS_WIDTHS = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
_AMD_GLOBAL = re.compile(r"^(?:global|flat|buffer)_(load|store|atomic)(?:_lds)?_(\w+)")
_AMD_WIDTHS = {"ubyte": 8, "sbyte": 8, "byte": 8, "ushort": 16, "sshort": 16, "short": 16}


def _parse_sass(code: str, name: str) -> list[_Instruction]:
    """The kernel's section of nvdisasm -c."""
    instructions: list[_Instruction] = []
    labels: list[str] = []
    inside = False
    for line in code.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            if label.group(1).startswith(".text."):
                inside = label.group(1) == f".text.{name}"
            labels.append(label.group(1))
            continue
        found = _SASS_LINE.match(line)
        if found is None or not inside:
            continue
        guard, opcode, operands = found.groups()
        family = opcode.split(".")[0]
        targets: tuple[str, ...] = ()
        falls_through = True
        if family in ("BRA", "BRX", "JMP", "CALL"):
            targets = tuple(_SASS_TARGET.findall(operands))
            # A condition stands before the opcode (@P0) or among the operands (UP0, or a mask).
            bare = guard is None and operands.strip().startswith("`(")
            falls_through = family == "CALL" or not bare
        elif family in ("EXIT", "RET", "KILL"):
            falls_through = guard is not None
        instructions.append(_Instruction(opcode, tuple(labels), targets, falls_through))
        labels = []
    return instructions


def _parse_amdgcn(code: str, name: str) -> list[_Instruction]:
    """The kernel's body in LLVM's assembly."""
    instructions: list[_Instruction] = []
    labels: list[str] = []
    inside = False
    for line in code.splitlines():
        label = _LABEL.match(line)
        if label is not None:
            if label.group(1) == name:
                inside = True
            elif label.group(1).startswith(".Lfunc_end"):
                inside = False
            labels.append(label.group(1))
            continue
        text = line.split(";")[0].split("//")[0].strip()
        if not inside or not text or text.startswith("."):
            continue
        opcode, _, operands = text.partition(" ")
        opcode, _, more = opcode.partition("\t")
        branches = opcode.startswith(("s_cbranch", "s_branch"))
        instructions.append(
            _Instruction(
                opcode,
                tuple(labels),
                ((more or operands).strip(),) if branches else (),
                opcode not in ("s_branch", "s_endpgm", "s_setpc_b64"),
            )
        )
        labels = []
    return instructions


def _accesses(opcodes: Sequence[str]) -> tuple[Access, ...]:
    return tuple(access for opcode in opcodes if (access := _access(opcode)) is not None)


def _access(opcode: str) -> Access | None:
    """The global access an opcode stands for, by the vendor's spelling of widths."""
    family, *modifiers = opcode.split(".")
    kind = _SASS_GLOBAL.get(family)
    if kind is not None:
        if kind == "atomic":
            return Access(kind, opcode, 0)
        bulk = (
            128 if family.startswith(("UTMA", "UBLK")) else 32
        )  # bulk copies move 16 bytes or more
        return Access(
            kind, opcode, next((_SASS_WIDTHS[m] for m in modifiers if m in _SASS_WIDTHS), bulk)
        )
    found = _AMD_GLOBAL.match(opcode)
    if found is None:
        return None
    kind, shape = found.groups()
    if kind == "atomic":
        return Access(kind, opcode, 0)
    plain = re.match(r"dword(?:x(\d))?", shape)
    if plain is not None:
        return Access(kind, opcode, 32 * int(plain.group(1) or 1))
    in_bits = re.match(r"[a-z]*(\d+)", shape)  # gfx11 and later: b128, u16, d16_b16
    if in_bits is not None and shape.split("_")[0] not in _AMD_WIDTHS:
        return Access(kind, opcode, int(in_bits.group(1)))
    return Access(kind, opcode, _AMD_WIDTHS[shape.split("_")[0]])


def _find_loops(instructions: list[_Instruction]) -> list[Loop]:
    """Loops as strongly connected parts of the flow graph, each searched again without its entry.

    Backward branches alone would not do: compilers move cold parts of a body out of line.
    """
    if not instructions:
        return []
    place = {label: i for i, one in enumerate(instructions) for label in one.labels}
    starts = {0} | {place[label] for one in instructions for label in one.targets if label in place}
    starts |= {
        i + 1 for i, one in enumerate(instructions[:-1]) if one.targets or not one.falls_through
    }
    order = sorted(starts)
    ends = [*order[1:], len(instructions)]
    blocks = {start: instructions[start:end] for start, end in zip(order, ends, strict=True)}
    after: dict[int, set[int]] = {}
    for start, end in zip(order, ends, strict=True):
        last = instructions[end - 1]
        after[start] = {place[label] for label in last.targets if label in place}
        if last.falls_through and end < len(instructions):
            after[start].add(end)
    reachable = set(_postorder({0}, after, set(blocks)))
    loops: list[Loop] = []

    def search(nodes: set[int], edges: dict[int, set[int]], depth: int) -> bool:
        found = False
        for part in sorted(_components(nodes, edges), key=min):
            if len(part) == 1 and not (part & edges[min(part)]):
                continue
            body = [one for block in sorted(part) for one in blocks[block]]
            if len(body) == 1:
                continue  # the branch to itself that pads a kernel's end
            found = True
            entries = {
                node
                for node in part
                if node == 0 or any(node in after[other] for other in reachable - part)
            }
            inner = {node: (edges[node] & part) - entries for node in part}
            at = len(loops)
            nested = search(part, inner, depth + 1)
            loops.insert(at, Loop(tuple(one.opcode for one in body), depth, not nested))
        return found

    search(reachable, after, 1)
    return loops


def _postorder(roots: set[int], edges: dict[int, set[int]], nodes: set[int]) -> list[int]:
    seen: set[int] = set()
    finished: list[int] = []
    for root in sorted(roots):
        stack = [] if root in seen else [(root, iter(sorted(edges[root] & nodes)))]
        seen.add(root)
        while stack:
            node, children = stack[-1]
            child = next((c for c in children if c not in seen), None)
            if child is None:
                finished.append(node)
                stack.pop()
            else:
                seen.add(child)
                stack.append((child, iter(sorted(edges[child] & nodes))))
    return finished


def _components(nodes: set[int], edges: dict[int, set[int]]) -> list[set[int]]:
    """Strongly connected components (Kosaraju)."""
    backward: dict[int, set[int]] = {node: set() for node in nodes}
    for node in nodes:
        for child in edges[node] & nodes:
            backward[child].add(node)
    left = set(nodes)
    components = []
    for root in reversed(_postorder(nodes, edges, nodes)):
        if root in left:
            part = set(_postorder({root}, backward, left))
            left -= part
            components.append(part)
    return components
