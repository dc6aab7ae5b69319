"""A head sharded over the ranks of a group: what they send each other, and what a step takes.

`torchrun --nproc-per-node 2 -m onepass bench --distributed`: all ranks run the same, the first one
prints and writes. Collectives are counted by torch's profiler and held against plan.py's formula;
time and memory stand beside gathered logits, a gathered head and torch's loss_parallel.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cli.errors import Failed, UsageError, unknown
from . import plan, report, run
from .plan import Collective
from .schema import Case, Provider, Size, wide

if TYPE_CHECKING:
    import torch

    from ..ops._shards import Shard
    from .measure import Contender, Truth
    from .schema import Inputs, Outputs

LAUNCH = "torchrun --nproc-per-node 2 -m onepass bench --distributed"
PROVIDERS = ("onepass", "onepass-dtensor", "gathered-logits", "gathered-head", "loss-parallel")
PATIENCE_S = 300  # that collectives wait for the other ranks

# ---- the cases: facts of one sharded head, or of two


class Ranks(NamedTuple):
    """The processes, each with its part of the vocabulary."""

    rank: int
    size: int
    device: torch.device
    backend: str
    group: Any
    mesh: Any

    @property
    def group_name(self) -> str:
        return str(self.group.group_name)

    def shard(self, vocab_size: int) -> Shard:
        from ..ops._dtensor import chunks
        from ..ops._shards import Shard

        return Shard(self.group_name, chunks(vocab_size, self.size), self.rank)

    def largest(self, of_rank: float) -> float:
        """The largest of the ranks' numbers, on all of them; they meet here."""
        import torch

        of_rank = float("inf") if of_rank != of_rank else of_rank
        number = torch.tensor(of_rank, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX, group=self.group)
        return float(number)

    def first(self, values: Any) -> Any:
        """The first rank's value that stands for something, on all of them."""
        import torch

        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, values, group=self.group)
        return next((value for value in found if value), None)


@dataclass(frozen=True)
class Sharded:
    """A case of the distributed benchmark."""

    name: str
    what: str
    lazy: Callable[..., Outputs]  # of LazyLogits, one for each head, and the inputs
    plain: Callable[..., Outputs]  # the same of logits; on fp64 copies the truth
    numbers: int  # a row that each rank sends
    heads: tuple[str, ...] = ("",)  # prefixes of the inputs' names
    trained: bool = True  # the first head; the second never is
    parallel: bool = False  # loss_parallel has it
    even_slabs: bool = True

    @property
    def case(self) -> Case:
        """As the rest of the benchmark knows cases."""
        return Case(
            name=self.name,
            what=self.what,
            inputs=partial(whole_inputs, self),
            wrt=("hidden", "weight") if self.trained else ("hidden",),
            providers=(),  # they depend on the ranks
            sizes=SIZES,
            more=MORE,
            has_roofline=False,
        )


def _cross_entropy(logits: torch.Tensor, inputs: Inputs) -> Outputs:
    from .. import cross_entropy

    return (cross_entropy(logits, inputs["labels"]),)


def _cross_entropy_plain(logits: torch.Tensor, inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(wide(logits), inputs["labels"]),)


def _kl(logits: torch.Tensor, target: torch.Tensor, inputs: Inputs) -> Outputs:
    from .. import vocab_pair_stats

    stats = vocab_pair_stats(logits, target, mask=inputs["labels"] != -100, want=("kl",))
    return (stats.kl,)


def _kl_plain(logits: torch.Tensor, target: torch.Tensor, inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp, logq = (wide(z).log_softmax(-1) for z in (logits, target))
    kl = F.kl_div(logp, logq, reduction="none", log_target=True).sum(-1)
    return (kl.where(inputs["labels"] != -100, 0.0),)


FACTS = (  # all that have a gradient
    *("lse", "label_logit", "contrast_logit", "logp", "entropy", "logit_sum", "logp_sum"),
    *("sum_sq_probs", "bag_mass"),
)
SUMS = ("logit_sum", "logp_sum")  # compared as means over columns: terms of either sign cancel


def _statistics(logits: torch.Tensor, inputs: Inputs) -> Outputs:
    from .. import vocab_stats

    stats = vocab_stats(
        logits,
        inputs["labels"],
        contrast_labels=inputs["contrast_labels"],
        bag_weights=inputs["bag_weights"],
        want=(*FACTS, "argmax"),
    )
    facts = stats._asdict()
    for name in SUMS:
        facts[name] = facts[name] / inputs["bag_weights"].numel()
    return tuple(facts[fact].mean() for fact in FACTS)


def _statistics_plain(logits: torch.Tensor, inputs: Inputs) -> Outputs:
    z, bag, labels = wide(logits), inputs["bag_weights"], inputs["labels"]
    lse = z.logsumexp(-1)
    logps = z - lse[:, None]
    p = logps.exp()

    def at(ids: torch.Tensor) -> torch.Tensor:
        return z.gather(-1, ids.clamp_min(0)[:, None]).squeeze(-1)

    facts = (
        *(lse, at(labels), at(inputs["contrast_labels"]), at(labels) - lse),
        *(-(p * logps).sum(-1), z.mean(-1), logps @ bag.to(z.dtype) / len(bag)),
        *(p.square().sum(-1).log(), p @ bag.to(z.dtype)),
    )
    return tuple(fact.where(labels != -100, 0.0).mean() for fact in facts)


CASES = (
    Sharded(
        "sharded_cross_entropy",
        "mean cross-entropy of a sharded head that is trained",
        _cross_entropy,
        _cross_entropy_plain,
        plan.numbers_of(("logp",)),
        parallel=True,
    ),
    Sharded(
        "sharded_cross_entropy_frozen",
        "the same with a frozen head",
        _cross_entropy,
        _cross_entropy_plain,
        plan.numbers_of(("logp",)),
        trained=False,
        parallel=True,
    ),
    Sharded(
        "sharded_kl",
        "KL of every row between two sharded heads, of which the teacher's is frozen",
        _kl,
        _kl_plain,
        plan.pair_numbers_of(("kl",)),
        heads=("", "teacher_"),
        even_slabs=False,
    ),
    Sharded(
        "sharded_statistics",
        "means of all facts of the rows, of a sharded head that is frozen",
        _statistics,
        _statistics_plain,
        plan.numbers_of((*FACTS, "argmax")),
        trained=False,  # rounded bf16 logits spoil its rows, in anybody's hands
    ),
)
SIZES = {
    "cpu": (Size(256, 8191, 64, dtype="float32", masked=0.25),),
    "cuda": (Size(8192, 128256, 4096), Size(8192, 128256, 4096, masked=0.5)),
}
MORE = {
    "cpu": (Size(1024, 32003, 256, masked=0.25), Size(1024, 32003, 256, dtype="float32")),
    "cuda": (Size(8192, 256000, 2304), Size(16384, 128256, 4096), Size(1024, 128256, 4096)),
}


def names() -> tuple[str, ...]:
    return tuple(case.name for case in CASES)


def whole_inputs(case: Sharded, size: Size, generator: torch.Generator) -> Inputs:
    """Hidden states, heads and labels, the same on every rank."""
    import torch

    from .heads import _head_inputs

    inputs = _head_inputs(size, generator)
    device = generator.device
    if "teacher_" in case.heads:
        teacher = _head_inputs(size, generator)
        inputs |= {f"teacher_{name}": teacher[name] for name in ("hidden", "weight")}
    if case.name == "sharded_statistics":
        assert size.V is not None
        inputs["contrast_labels"] = torch.randint(
            size.V, (size.N,), generator=generator, device=device
        )
        inputs["bag_weights"] = torch.rand(size.V, generator=generator, device=device)
    return inputs


def own_inputs(inputs: Inputs, ranks: Ranks) -> Inputs:
    """What one rank has of them: its rows of the heads."""

    def own(name: str, value: torch.Tensor) -> torch.Tensor:
        if not name.endswith("weight"):
            return value
        part = ranks.shard(value.shape[0]).columns(value, 0)
        assert part is not None
        return part.clone()

    return {name: own(name, value) for name, value in inputs.items()}


def slab_bytes(case: Sharded, size: Size, ranks: Ranks) -> int:
    """The package's own on a GPU; on a CPU those of a quarter of the rows, so that small sizes have
    several slabs too."""
    if ranks.device.type == "cuda":
        return plan.SLAB_BYTES
    return max(1, -(-size.N // 4)) * _row_bytes(case, size, ranks)


def _row_bytes(case: Sharded, size: Size, ranks: Ranks) -> int:
    assert size.V is not None
    element = 4 if size.dtype == "float32" else 2
    return element * max(ranks.shard(size.V).sizes) * len(case.heads)


def call_of(case: Sharded, size: Size, ranks: Ranks, dtensor: bool) -> plan.Call:
    """What the formula says of ours."""
    assert size.D is not None
    n_rows = size.N - round(size.N * size.masked)
    row_bytes = _row_bytes(case, size, ranks)
    element = 4 if size.dtype == "float32" else 2
    return plan.Call(
        n_rows=n_rows,
        slab_rows=plan.slab_rows(n_rows, row_bytes, slab_bytes(case, size, ranks), case.even_slabs),
        numbers=case.numbers,
        hidden_bytes=(size.N * size.D * element,),
        process_groups=0 if dtensor else len(case.heads),
    )


def providers(case: Sharded, size: Size, ranks: Ranks) -> tuple[Provider, ...]:
    """Every way to make the case's results from one rank's inputs."""
    import torch
    from torch.distributed.tensor import DTensor, Replicate, Shard
    from torch.nn import functional as F

    from .. import LazyLogits

    assert size.V is not None and size.D is not None
    shape, stride = torch.Size((size.V, size.D)), (size.D, 1)
    budget = None if ranks.device.type == "cuda" else slab_bytes(case, size, ranks)

    def head(inputs: Inputs, prefix: str) -> Any:
        own = inputs[prefix + "weight"]
        return DTensor.from_local(
            own, ranks.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def local(inputs: Inputs, prefix: str) -> torch.Tensor:
        states, weight = inputs[prefix + "hidden"], inputs[prefix + "weight"]
        return LazyLogits(states, weight, process_group=ranks.group, max_slab_bytes=budget)

    def dtensor(inputs: Inputs, prefix: str) -> torch.Tensor:
        states = inputs[prefix + "hidden"]
        return LazyLogits(states, head(inputs, prefix), max_slab_bytes=budget)

    def gathered_head(inputs: Inputs, prefix: str) -> torch.Tensor:
        return LazyLogits(inputs[prefix + "hidden"], head(inputs, prefix).full_tensor())

    def product(inputs: Inputs, prefix: str) -> Any:
        states = inputs[prefix + "hidden"]
        whole = DTensor.from_local(states, ranks.mesh, [Replicate()], run_check=False)
        return F.linear(whole, head(inputs, prefix))

    def gathered_logits(inputs: Inputs, prefix: str) -> Any:
        return product(inputs, prefix).redistribute(placements=[Replicate()]).to_local()

    def provider(name: str, logits: Callable[[Inputs, str], Any]) -> Provider:
        of = case.plain if name in ("gathered-logits", "loss-parallel") else case.lazy

        def function(inputs: Inputs) -> Outputs:
            outputs = of(*(logits(inputs, prefix) for prefix in case.heads), inputs)
            return tuple(o.to_local() if isinstance(o, DTensor) else o for o in outputs)

        return Provider(name, lambda: function)

    made = [local, dtensor, gathered_logits, gathered_head, product]
    named = zip(PROVIDERS, made, strict=True)
    return tuple(
        provider(name, logits) for name, logits in named if name != "loss-parallel" or case.parallel
    )


def truth_of(case: Sharded, whole: Inputs, ranks: Ranks, grads: bool) -> Truth:
    """The plain results on fp64 copies of the whole inputs, and of their gradients what one rank is
    to find: of d hidden all, of the head's its rows."""
    from . import measure

    def plain(inputs: Inputs) -> Outputs:
        pairs = [(inputs[p + "hidden"], inputs[p + "weight"]) for p in case.heads]
        return case.plain(*(states @ weight.T for states, weight in pairs), inputs)

    eager = replace(case.case, providers=(Provider("eager", lambda: plain),))
    truth = measure.truth(eager, whole, grads)
    if truth.gradients is not None and case.trained:
        of_hidden, of_weight = truth.gradients
        part = ranks.shard(of_weight.shape[0]).columns(of_weight, 0)
        assert part is not None
        truth.gradients = (of_hidden, part)
    return truth


# ---- what the ranks send

ELEMENT_BYTES = {
    **{"float": 4, "double": 8, "long int": 8, "int": 4, "signed char": 1, "unsigned char": 1},
    **{"bool": 1, "c10::BFloat16": 2, "c10::Half": 2, "short int": 2},  # as events of ops name them
    **{"Float": 4, "Double": 8, "Long": 8, "Int": 4, "Char": 1, "Byte": 1},
    **{"Bool": 1, "BFloat16": 2, "Half": 2, "Short": 2},  # as NCCL's do
}
KINDS = {
    "allgather": "all_gather",
    "allreduce": "all_reduce",
    "reducescatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "gather": "gather",
    "scatter": "scatter",
    "reduce": "reduce",
    "send": "send",
    "recv": "recv",
}


def _sent(event: dict[str, Any]) -> tuple[str, int] | None:
    """Kind and bytes of a collective, from an event of gloo's or NCCL's in the profiler's trace."""
    name, args = event.get("name", ""), event.get("args", {})
    if name == "record_param_comms":  # NCCL
        told, count = args.get("Collective name", ""), args.get("In msg nelems", 0)
        element = args.get("dtype", "")
    elif name.startswith("gloo:"):
        told, shapes, types = name, args.get("Input Dims", []), args.get("Input type", [])
        count, element = 1, types[0] if types else ""
        for length in shapes[0] if shapes else ():
            count *= length
    else:
        return None
    bare = told.removeprefix("gloo:").replace("_", "").lower()
    kind = next((kind for key, kind in KINDS.items() if bare.startswith(key)), None)
    if kind is None:  # a barrier, a wait, the start of a group
        return None
    if element not in ELEMENT_BYTES:
        raise Failed(f"the profiler tells of a {kind} in {element or 'no dtype'}: unknown here")
    return kind, count * ELEMENT_BYTES[element]


@contextmanager
def counted(found: list[Collective]) -> Iterator[None]:
    """Adds to `found` what this rank put into collectives meanwhile."""
    from .measure import profiled

    with profiled() as events:
        yield
    totals: dict[str, tuple[int, int]] = {}
    for kind, size in filter(None, map(_sent, events)):
        count, total = totals.get(kind, (0, 0))
        totals[kind] = (count + 1, total + size)
    found += [Collective(kind, *total) for kind, total in sorted(totals.items())]


def passes_of(contender: Contender) -> dict[str, list[Collective]]:
    """The collectives of the passes that the contender's mode has."""
    forward: list[Collective] = []
    backward: list[Collective] = []
    if contender.mode == "forward":
        contender.prepare()
        with counted(forward):
            contender.call()
        contender.release()
        return {"forward": forward}
    apart = replace(contender, mode="backward", ms=[], host_ms=[], errors={})
    with counted(forward):
        apart.prepare()
    with counted(backward):
        apart.call()
    apart.release()
    both = {"forward": forward, "backward": backward}
    return both if contender.mode == "full" else {"backward": backward}


def compared(
    passes: dict[str, list[Collective]], call: plan.Call | None
) -> tuple[list[dict[str, Any]], str]:
    """Rows of what was measured beside the formula, and what is wrong, if anything."""
    rows, wrong = [], ""
    for name, found in passes.items():
        wanted = {} if call is None else {c.kind: c for c in getattr(call, name)()}
        measured = {c.kind: c for c in found}
        for kind in dict.fromkeys([*measured, *wanted]):
            got = measured.get(kind, Collective(kind, 0, 0))
            row = {"pass": name, **asdict(got), "formula_count": None, "formula_bytes": None}
            if call is not None:
                said = wanted.get(kind, Collective(kind, 0, 0))
                row |= {"formula_count": said.count, "formula_bytes": said.bytes}
                if got != said and not wrong:
                    wrong = (
                        f"{name}: {got.count} {kind} of {got.bytes:,} bytes, the formula says "
                        f"{said.count} of {said.bytes:,}"
                    )
            rows.append(row)
    return rows, wrong


# ---- the run


def check_options(args: argparse.Namespace) -> None:
    """UsageError for options that go with the other cases."""
    given = {
        "an action": args.action != "run",
        "--plot": args.plot is not None,
        "--roofline": args.roofline,
        "--time-limit": args.time_limit is not None,
    }
    for option, is_there in given.items():
        if is_there:
            raise UsageError(f"{option} does not go with --distributed", hint=LAUNCH)
    for name in args.case or ():
        if name not in names():
            raise unknown("case of --distributed", name, names())
    for name in args.providers or ():
        if name not in PROVIDERS:
            raise unknown("provider of --distributed", name, PROVIDERS)


def start(args: argparse.Namespace) -> tuple[Ranks, bool]:
    """Joins the other processes; whether it was done here. UsageError where there are none."""
    rank, size = (os.environ.get(name) for name in ("RANK", "WORLD_SIZE"))
    if rank is None or size is None:
        raise UsageError("--distributed needs processes that torchrun starts", hint=LAUNCH)
    import torch
    from torch import distributed as dist

    local = int(os.environ.get("LOCAL_RANK", rank))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    if args.device == "cuda" and gpus < here:
        raise UsageError(
            f"--device cuda: {here} processes on this machine and {gpus} GPUs",
            hint="start as many processes as there are GPUs, or use --device cpu",
        )
    on_gpu = gpus >= here
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    begun = not dist.is_initialized()
    if begun:
        from datetime import timedelta

        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=PATIENCE_S))
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    group = mesh.get_group()
    return Ranks(
        dist.get_rank(), dist.get_world_size(), device, dist.get_backend(group), group, mesh
    ), begun


def listed() -> int:
    for case in CASES:
        print(f"{case.name}: {case.what}")
        for device, sizes in SIZES.items():
            print(f"    {device:<10} " + "; ".join(size.label for size in sizes))
            print(f"    {'more':<10} " + "; ".join(size.label for size in MORE[device]))
        told = [name for name in PROVIDERS if name != "loss-parallel" or case.parallel]
        print(f"    {'providers':<10} " + ", ".join(told))
    return 0


def run_distributed(args: argparse.Namespace) -> int:
    """`onepass bench --distributed`; the exit code, the same on every rank."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        check_options(args)
        if args.list:
            return listed() if first else 0
        if first:
            run.check_writable(args.output)
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch loads
        ranks, begun = start(args)
    except (UsageError, Failed) as error:
        if first:
            raise
        return 2 if isinstance(error, UsageError) else 1
    import torch
    from torch import distributed as dist

    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        return _run(args, ranks)
    finally:
        if begun:
            dist.destroy_process_group()


def _run(args: argparse.Namespace, ranks: Ranks) -> int:
    from torch.distributed.tensor.parallel import loss_parallel

    environment = run.gather(ranks.device)
    environment["device"] += f", {ranks.size} process" + ("es" if ranks.size > 1 else "")
    path = args.output / report.file_name(environment["device"])
    trouble = ""
    if not ranks.rank and path.exists():
        try:
            report.read_rows(path)
        except report.NotRows as error:
            trouble = str(error)
    if (trouble := ranks.first(trouble)) is not None:
        if ranks.rank:
            return 2
        raise UsageError(trouble)

    started = time.monotonic()
    rows: list[report.Row] = []
    chosen = [case for case in CASES if args.case is None or case.name in args.case]
    by_name = {case.name: case for case in chosen}
    planned = run.sizes_of([case.case for case in chosen], ranks.device.type, args)
    for of_name, size in planned:
        if not ranks.rank:
            run.say(f"{of_name.name}  {size.label}")
        with loss_parallel():  # in the backward too; it changes nothing but losses of DTensors
            new = run_size(by_name[of_name.name], size, ranks, args, environment)
        if not ranks.rank:
            args.output.mkdir(parents=True, exist_ok=True)
            report.append_rows(path, new)
        rows += new
    if not ranks.rank:
        _tell(args, rows, environment, path)
        run.say(f"added {len(rows)} rows to {path} ({time.monotonic() - started:.0f} s)")
    ours = [row for row in rows if row["provider"].startswith("onepass")]
    return 1 if any(row["status"] in ("refused", "failed") for row in ours) else 0


def _tell(
    args: argparse.Namespace, rows: list[report.Row], environment: dict[str, Any], path: Any
) -> None:
    if args.json:
        print(json.dumps({"environment": environment, "file": str(path), "rows": rows}, indent=1))
        return
    for name in ("device", "torch", "onepass", "commit", "load"):
        value = environment[name]
        print(f"{name:<18} {'unknown' if value is None else value}")
    print()
    report.print_details(rows)
    print()
    report.print_collectives(rows)


def run_size(
    case: Sharded,
    size: Size,
    ranks: Ranks,
    args: argparse.Namespace,
    environment: dict[str, Any],
) -> list[report.Row]:
    """Check, count, time and weigh the providers at one size; their rows, the same on all ranks but
    for the memory."""
    import torch

    from . import measure

    modes = tuple(args.mode or case.case.modes)
    whole = whole_inputs(case, size, torch.Generator(ranks.device).manual_seed(0))
    truth = truth_of(case, whole, ranks, any(mode != "forward" for mode in modes))
    inputs = own_inputs(whole, ranks)
    del whole
    rows: list[report.Row] = []
    for mode in modes:
        ready: list[tuple[Contender, report.Row]] = []
        for provider in providers(case, size, ranks):
            if args.providers is not None and provider.name not in args.providers:
                continue
            row = run.blank(case.case, size, mode, provider, environment)
            row |= {"processes": ranks.size, "backend": ranks.backend}
            rows.append(row)
            contender = _admit(provider, case, inputs, mode, size, ranks, truth, row)
            if contender is not None:
                ready.append((contender, row))
        effort = (run.QUICK_EFFORT if args.quick else run.EFFORT)[ranks.device.type]
        failures = measure.time_all([c for c, _ in ready], *effort, meet=ranks.largest)
        for contender, row in ready:
            if contender.name in failures:
                row.update(status="failed", why=run.told(failures[contender.name]))
            else:
                row.update(run.measured(contender, None))
    return rows


def _admit(
    provider: Provider,
    case: Sharded,
    inputs: Inputs,
    mode: str,
    size: Size,
    ranks: Ranks,
    truth: Truth,
    row: report.Row,
) -> Contender | None:
    """The contender after its check and the count of its collectives, which stand in its row; None
    where any rank has something against it."""
    from . import measure

    trouble = None
    contender = measure.Contender(provider.name, provider.load(), inputs, case.case, mode)
    try:
        contender.check(truth, size.dtype, ranks.largest)
    except measure.Refused as refusal:
        trouble = ("refused", str(refusal))
    except Exception as error:
        trouble = ("failed", run.told(error))
    row["reference"] = truth.precision
    row["output_error"] = contender.errors.get("output")
    row["gradient_error"] = contender.errors.get("gradient")
    trouble = ranks.first(trouble)
    if trouble is None:
        ours = provider.name.startswith("onepass")
        call = call_of(case, size, ranks, provider.name == "onepass-dtensor") if ours else None
        row["collectives"], wrong = compared(passes_of(contender), call)
        trouble = ranks.first(("refused", wrong) if wrong else None)
    if trouble is None:
        return contender
    row["status"], row["why"] = trouble
    return None
