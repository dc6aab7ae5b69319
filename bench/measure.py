"""How a provider is held to the truth, timed, and weighed.

A contender is one provider at one size and mode. `check` runs before any timing and raises
`Refused` with the numbers. `time_all` takes the contenders of a case in turns, in random order,
so that a change of clock speed or a busy neighbour falls on all of them alike.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .schema import Case, Function, Inputs, Outputs

# Largest error that is still rounding, by dtype: of an output, of a gradient as a whole, of its
# worst row. All relative; the README of this folder says to what. Torch's own cross-entropy in
# bf16, which rounds log-probabilities before it takes their exponentials, sets the last of bf16's.
TOLERANCE = {
    "float32": (1e-4, 1e-4, 1e-3),
    "bfloat16": (2e-2, 2e-2, 1e-1),
    "float16": (5e-3, 5e-3, 2e-2),
}
# Nats. Near 0 an fp32 log-probability or entropy keeps the last place of numbers near 20, no more,
# in every package but ours; refusing them for it would leave nobody to compare with.
OUTPUT_FLOOR = 1.0
ROWS_AT_ONCE = 256  # of the gradient, compared in fp64


class Refused(Exception):
    """A provider that computes something else. `errors` holds what was measured."""

    def __init__(self, why: str, errors: dict[str, float | None]) -> None:
        super().__init__(why)
        self.errors = errors


def tensors(inputs: Inputs, names: tuple[str, ...] | None = None) -> Iterator[torch.Tensor]:
    """The tensors of `inputs` (those of `names`), lists of them included, in order."""
    for name in inputs if names is None else names:
        value = inputs[name]
        yield from value if isinstance(value, list) else [value]


def _map(inputs: Inputs, function: Any, names: tuple[str, ...] | None = None) -> Inputs:
    """`inputs` with `function` applied to the tensors of `names` (default: of all)."""
    result = dict(inputs)
    for name in inputs if names is None else names:
        value = inputs[name]
        result[name] = [function(v) for v in value] if isinstance(value, list) else function(value)
    return result


def _leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_(True)


def _same_layout(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` with its strides, padding between rows included."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def fingerprint(inputs: Inputs) -> list[int]:
    """A sum over the bits of each tensor: changes when a call wrote into its input."""
    width = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [
        int(sum(int(row.contiguous().view(width[t.element_size()]).sum()) for row in t.split(4096)))
        for t in tensors(inputs)
    ]


def upstreams(outputs: Outputs, weights: tuple[float, ...]) -> list[torch.Tensor]:
    """The gradient that reaches each output: a case's weights, uneven over the rows."""
    result = []
    for i, output in enumerate(outputs):
        weight = weights[i] if len(weights) == len(outputs) else 1.0
        if output.ndim == 0:
            upstream = torch.full((), weight, device=output.device, dtype=torch.float64)
        else:
            rows = torch.arange(output.numel(), device=output.device, dtype=torch.float64)
            upstream = (weight * (0.5 + (0.618 * rows).frac()) / output.numel()).view(output.shape)
        result.append(upstream.to(output.dtype))
    return result


def forward_backward(
    function: Function, inputs: Inputs, case: Case, scale: float = 1.0
) -> tuple[Outputs, tuple[torch.Tensor, ...]]:
    """Outputs and gradients of one call on leaves made from `inputs`."""
    leaves = _map(inputs, _leaf, case.wrt)
    outputs = function(leaves)
    if not case.wrt:
        return tuple(o.detach() for o in outputs), ()
    upstream = [scale * u for u in upstreams(outputs, case.upstream)]
    gradients: tuple[torch.Tensor, ...] = torch.autograd.grad(
        outputs, list(tensors(leaves, case.wrt)), upstream
    )
    return tuple(o.detach() for o in outputs), gradients


@dataclass
class Truth:
    """What the case's eager provider gives on inputs in a wider dtype."""

    outputs: Outputs
    gradients: tuple[torch.Tensor, ...] | None
    precision: str


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 4 << 30


def truth(case: Case, inputs: Inputs, with_gradients: bool) -> Truth:
    """The reference: in fp64, or in fp32 where eight fp64 copies of the inputs do not fit, or what
    eager makes of them."""
    elements = sum(t.numel() for t in tensors(inputs) if t.is_floating_point())
    if 8 * 8 * elements < _free_bytes(next(tensors(inputs)).device):
        with contextlib.suppress(torch.OutOfMemoryError):
            return _truth_in(torch.float64, case, inputs, with_gradients)
    return _truth_in(torch.float32, case, inputs, with_gradients)


def _truth_in(dtype: torch.dtype, case: Case, inputs: Inputs, with_gradients: bool) -> Truth:
    eager = next(p for p in case.providers if p.name == "eager").load()
    wide = _map(inputs, lambda t: t.to(dtype) if t.is_floating_point() else t)
    gradients = None
    if with_gradients:
        outputs, gradients = forward_backward(eager, wide, case)
    else:
        with torch.no_grad():
            outputs = eager(wide)
    return Truth(outputs, gradients, "fp64" if dtype == torch.float64 else "fp32")


def output_error(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Largest error relative to the value, or to OUTPUT_FLOOR where the value is smaller."""
    if output.shape != reference.shape:
        return float("inf")
    scale = reference.abs().clamp_min(OUTPUT_FLOOR)
    return float(((output.to(reference.dtype) - reference).abs() / scale).max())


def gradient_errors(
    gradient: torch.Tensor, reference: torch.Tensor, scale: float = 1.0
) -> tuple[float, float]:
    """Error of the whole relative to its norm, and of the worst row relative to that row's norm.

    The second, where a row is under a tenth of the rows' root mean square, is relative to that: one
    wrong row is seen among any number of right ones, and one that is nearly 0 may be rounded.
    """
    if gradient.shape != reference.shape:
        return float("inf"), float("inf")
    rows = reference.flatten(0, -2).split(ROWS_AT_ONCE)
    norms = torch.cat([row.norm(dim=-1) for row in rows]) * abs(scale)
    errors = torch.cat(
        [
            (ours.to(row.dtype) - scale * row).norm(dim=-1)
            for ours, row in zip(gradient.flatten(0, -2).split(ROWS_AT_ONCE), rows, strict=True)
        ]
    )
    floor = norms.square().mean().sqrt() / 10
    return float(errors.norm() / norms.norm()), float((errors / norms.clamp_min(floor)).max())


@dataclass
class Contender:
    """One provider at one size and mode, with what was measured of it."""

    name: str
    function: Function
    inputs: Inputs
    case: Case
    mode: str
    overwrites: tuple[str, ...] = ()
    ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    first_call_s: float | None = None
    peak_mib: float | None = None
    errors: dict[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = next(tensors(self.inputs)).device
        self.pristine = self.inputs
        if self.overwrites:
            self.inputs = _map(self.inputs, _same_layout, self.overwrites)
        self._leaves: Inputs = {}
        self._outputs: Outputs = ()
        self._gradients: tuple[torch.Tensor, ...] = ()
        self._upstream: list[torch.Tensor] = []  # made once: it is the caller's, not timed
        self._meet: Callable[[float], float] = float

    def restore(self) -> None:
        """Undo what the previous call wrote into its inputs."""
        for name in self.overwrites:
            for mine, original in zip(
                tensors(self.inputs, (name,)), tensors(self.pristine, (name,)), strict=True
            ):
                mine.copy_(original)

    def prepare(self) -> None:
        """What happens before the clock starts."""
        self._outputs, self._gradients = (), ()
        self.restore()
        if self.mode != "forward":
            self._leaves = _map(self.inputs, _leaf, self.case.wrt)
        if self.mode == "backward":
            self._forward()

    def call(self) -> None:
        """What the clock times."""
        if self.mode == "forward":
            with torch.no_grad():
                self._outputs = self.function(self.inputs)
            return
        if self.mode == "full":
            self._forward()
        self._gradients = torch.autograd.grad(
            self._outputs, list(tensors(self._leaves, self.case.wrt)), self._upstream
        )

    def _forward(self) -> None:
        self._outputs = self.function(self._leaves)
        if not self._upstream:
            self._upstream = upstreams(self._outputs, self.case.upstream)

    def release(self) -> None:
        """Drop results, so that they are not counted against the next contender."""
        self._outputs, self._gradients, self._leaves = (), (), {}

    def check(self, reference: Truth, dtype: str, meet: Callable[[float], float] = float) -> None:
        """Raise `Refused` unless outputs and gradients are the reference's and inputs are kept;
        `meet` makes one error of those of processes that compute together."""
        self._meet = meet
        limit_output, limit_gradient, limit_row = TOLERANCE[dtype]
        before = [] if self.overwrites else fingerprint(self.inputs)
        self.restore()
        started = time.perf_counter()
        gradients: tuple[torch.Tensor, ...] = ()
        if self.mode == "forward":
            with torch.no_grad():
                outputs = self.function(self.inputs)
        else:
            outputs, gradients = forward_backward(self.function, self.inputs, self.case)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.first_call_s = time.perf_counter() - started

        if len(outputs) != len(reference.outputs):
            raise Refused(f"{len(outputs)} outputs instead of {len(reference.outputs)}", {})
        self._judge(
            "output",
            [output_error(o, r) for o, r in zip(outputs, reference.outputs, strict=True)],
            limit_output,
        )
        del outputs
        if self.mode != "forward":
            self._judge_gradients("gradient", gradients, reference, 1.0, limit_gradient, limit_row)
            # An upstream gradient other than 1 takes another path in some packages.
            self.restore()
            del gradients
            gradients = forward_backward(self.function, self.inputs, self.case, -0.5)[1]
            what = "gradient times -0.5"
            self._judge_gradients(what, gradients, reference, -0.5, limit_gradient, limit_row)
        if not self.overwrites and fingerprint(self.inputs) != before:
            raise Refused("it wrote into its inputs", self.errors)

    def _judge_gradients(
        self,
        what: str,
        gradients: tuple[torch.Tensor, ...],
        reference: Truth,
        scale: float,
        limit: float,
        limit_row: float,
    ) -> None:
        assert reference.gradients is not None
        pairs = zip(gradients, reference.gradients, strict=True)
        errors = [gradient_errors(ours, theirs, scale) for ours, theirs in pairs]
        self._judge(what, [whole for whole, _ in errors], limit)
        self._judge(f"a row of the {what}", [row for _, row in errors], limit_row)

    def _judge(self, what: str, errors: list[float], limit: float) -> None:
        worst = self._meet(max(errors, key=lambda e: float("inf") if e != e else e))
        self.errors[what] = worst
        if not worst <= limit:  # NaN is not
            raise Refused(f"{what} off by {worst:.1e}, {limit:.0e} allowed", self.errors)

    def first_call(self) -> None:
        """The call that compiles what there is to compile, of a provider without a result."""
        self.prepare()
        started = time.perf_counter()
        self.call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.first_call_s = time.perf_counter() - started
        self.release()

    def weigh(self) -> None:
        """Peak memory of one call above its inputs, results included."""
        self.prepare()
        with _peak_bytes(self.device) as peak:
            self.call()
        self.release()
        self.peak_mib = peak[0] / 2**20

    def milliseconds(self) -> float:
        """One timed call. The caller has prepared it and flushed the caches."""
        if self.device.type != "cuda":
            started = time.perf_counter()
            self.call()
            return (time.perf_counter() - started) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        started = time.perf_counter()
        self.call()
        self.host_ms.append((time.perf_counter() - started) * 1e3)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


@contextmanager
def _peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Yields a list that holds, afterwards, the most bytes allocated above those held before.

    CUDA: the caching allocator's own count. CPU: the allocations and frees of torch's allocator,
    in order, from its profiler; that includes what compiled code and C++ operators allocate for
    themselves, which a dispatch mode does not see, and leaves out what never was a tensor (the
    packing buffers of a matrix library).
    """
    peak = [0]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak[0] = torch.cuda.max_memory_allocated(device) - held
        return
    with profiled(memory=True) as events:
        yield peak
    held = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak[0] = max(peak[0], held)


@contextmanager
def profiled(memory: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Yields a list that holds, afterwards, the events of the host in torch's profiler, with the
    shapes of what went in, or every allocation."""
    from torch.profiler import ProfilerActivity, profile

    events: list[dict[str, Any]] = []
    with _quiet_stderr(), warnings.catch_warnings():
        # acc_events=True would say nothing, and read every event in Python at the end.
        warnings.filterwarnings("ignore", message=".*Profiler clears events")
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=memory, record_shapes=not memory
        ) as profiler:
            yield events
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(trace))
            events += json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """The profiler's C++ side reports its start and stop on file descriptor 2: park that."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def flusher(device: torch.device) -> Any:
    """A call that pushes everything else out of the GPU's L2 cache; nothing on a CPU.

    A CPU case's tensors are larger than its caches, or (generation_rows) as warm as in use.
    """
    if device.type != "cuda":
        return lambda: None
    l2 = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    buffer = torch.empty(max(4 * l2, 128 << 20), dtype=torch.int8, device=device)
    return buffer.zero_


def time_all(
    contenders: list[Contender],
    budget_s: float,
    min_reps: int,
    max_reps: int,
    meet: Callable[[float], float] = float,
) -> dict[str, Exception]:
    """Fill each contender's `ms` and `peak_mib`: one call at a time in turns, `budget_s` in all.

    `meet` makes one number of those of several processes that time together, where they wait for
    each other. Returns the errors of those that passed their check and failed here (out of memory,
    mostly).
    """
    errors: dict[str, Exception] = {}
    if not contenders:
        return errors
    flush = flusher(contenders[0].device)

    def one(contender: Contender) -> float:
        contender.prepare()
        if contender.device.type == "cuda":
            torch.cuda.synchronize(contender.device)
        flush()
        ms = contender.milliseconds()
        contender.release()
        return meet(ms)

    round_s = 0.0
    for contender in contenders:
        try:
            contender.weigh()  # and warm-up: allocator and thread pools, clocks
            started = time.perf_counter()
            one(contender)
            round_s += time.perf_counter() - started
        except Exception as error:
            contender.release()
            errors[contender.name] = error.with_traceback(None)  # its frames hold tensors
        contender.host_ms.clear()
    running = [contender for contender in contenders if contender.name not in errors]
    round_s = meet(round_s)
    reps = int(min(max(budget_s / max(round_s, 1e-9), min_reps), max_reps))
    shuffled = random.Random(0)
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(reps):
            for contender in shuffled.sample(running, len(running)):
                contender.ms.append(one(contender))
    finally:
        if collects:
            gc.enable()
    return errors


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, interpolated between the two nearest of the sorted values."""
    ranked = sorted(values)
    position = q * (len(ranked) - 1)
    below = int(position)
    above = min(below + 1, len(ranked) - 1)
    return ranked[below] + (position - below) * (ranked[above] - ranked[below])
