"""What a head sharded over the vocabulary sends, holds and multiplies: formulas, on paper.

`Call` is what `onepass bench --distributed` holds collectives against. `tables()` are those
of docs/scaling.md, for GPUs that nobody has run here: `python -m onepass.bench.plan` prints them,
and tests/test_scaling.py holds the page to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

# ---- what is sent


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in one pass; the bytes are what one rank puts in."""

    kind: str
    count: int
    bytes: int


def numbers_of(want: Iterable[str]) -> int:
    """Numbers a row that each rank sends for facts of vocab_stats: the maximum and the mass beside
    it, and one for each fact that is not made of these."""
    own = {"label_logit" if fact == "logp" else fact for fact in want} - {"lse"}
    return 2 + len(own) + ("logp_sum" in own)  # a share's weight goes with the sum


def pair_numbers_of(want: Iterable[str]) -> int:
    """The same for vocab_pair_stats: maximum and rest of both sides, and one for each fact made of
    the columns; JSD's own come in a second gather."""
    own = set(want) & {"cross_entropy", "kl", "reverse_kl"}
    return 4 + len(own) + bool(own - {"cross_entropy"})  # divergences: the two masses' log-ratio


JSD_NUMBERS = 2
SLAB_BYTES = 512 << 20  # what LazyLogits take on a GPU unless told otherwise


def slab_rows(n_rows: int, row_bytes: int, slab_bytes: int, even: bool = True) -> int:
    """Rows of a slab; `even`: slabs of one size."""
    most = max(1, slab_bytes // row_bytes)
    if not even:
        return max(1, min(most, n_rows))
    return max(1, math.ceil(n_rows / max(1, math.ceil(n_rows / most))))


@dataclass(frozen=True)
class Call:
    """Facts of sharded heads, forward and backward."""

    n_rows: int  # that count
    slab_rows: int
    numbers: int  # a row, from each rank: numbers_of, pair_numbers_of
    hidden_bytes: tuple[int, ...]  # of the hidden states [N, D] that get a gradient
    process_groups: int = 1  # heads given by process_group=; a DTensor knows its layout
    compact: bool = True  # False leaves the agreement out
    jsd: bool = False
    number_bytes: int = 4  # fp32; 8 for float64

    @property
    def n_slabs(self) -> int:
        return math.ceil(self.n_rows / self.slab_rows)

    def forward(self) -> list[Collective]:
        """Layout [4] and agreement [7] in int64, and facts [F, rows of a slab] of each slab."""
        a_row = self.numbers + JSD_NUMBERS * self.jsd
        count = self.process_groups + self.compact + self.n_slabs * (1 + self.jsd)
        small = 8 * (4 * self.process_groups + 7 * self.compact)
        return [Collective("all_gather", count, small + self.number_bytes * a_row * self.n_rows)]

    def backward(self) -> list[Collective]:
        """d hidden, summed over the ranks in its own dtype; of the head nothing."""
        if not self.hidden_bytes:
            return []
        return [Collective("all_reduce", len(self.hidden_bytes), sum(self.hidden_bytes))]


# ---- on paper: the GPUs, and what a collective takes

FLOPS = 0.7 * 989e12  # of an H100's or H200's dense bf16 peak
NVLINK = 450e9  # bytes/s each way
NIC = 50e9  # bytes/s of a GPU's own InfiniBand port
LATENCY = 20e-6  # seconds of a collective, between 10 and 30
PER_NODE = 8
VOCAB, WIDTH = 262_144, 8192
ROWS = (8192, 16384)
BF16, FP32 = 2, 4


def bandwidth(size: int, in_node: int) -> float:
    """Bytes/s through one rank of a ring over `size` GPUs, `in_node` of them in each node: a ring
    that leaves the node does so through as many ports."""
    return NVLINK if size <= in_node else min(NVLINK, NIC * in_node)


def all_gather(whole: float, size: int, in_node: int = PER_NODE) -> float:
    """Seconds until every rank has the `whole` bytes; a reduce-scatter takes as long."""
    if size == 1:
        return 0.0
    return LATENCY + whole * (size - 1) / size / bandwidth(size, in_node)


def all_reduce(each: float, size: int, in_node: int = PER_NODE) -> float:
    if size == 1:
        return 0.0
    return LATENCY + 2 * each * (size - 1) / size / bandwidth(size, in_node)


class Cost(NamedTuple):
    """Of one step, on each rank."""

    products: int  # of N D V multiply-adds, over all ranks of the vocabulary
    n_ranks: int  # that share the vocabulary
    n_rows: int
    collectives: int
    received: float  # bytes
    communication: float  # seconds
    memory: float  # bytes of head, gradients, hidden states and all that lives at the peak

    @property
    def compute(self) -> float:
        return self.products * 2 * self.n_rows * VOCAB * WIDTH / self.n_ranks / FLOPS


HEAD = VOCAB * WIDTH * BF16
STATES = 2 * WIDTH * BF16  # bytes a row: hidden states and their gradient
CE_NUMBERS = numbers_of(("logp",))


def lazy_memory(n_rows: int, columns: int, width: int = WIDTH) -> tuple[float, int]:
    """Bytes at the peak of LazyLogits under a cross-entropy that trains its head, in bf16 on an
    NVIDIA GPU (docs/head.md), beside head and hidden states; with the number of slabs."""
    step = slab_rows(n_rows, BF16 * columns, SLAB_BYTES)
    n_slabs = math.ceil(n_rows / step)
    head, ahead = columns * width, FP32 * n_rows * width
    d_hidden = BF16 * n_rows * width
    slab = BF16 * step * (columns + 2 * width)  # with its hidden states and their gradient
    if n_slabs == 1:  # the head's gradient is written once
        return BF16 * head + ahead + max(slab, d_hidden) + 40 * n_rows, n_slabs
    return FP32 * head + ahead + max(slab, BF16 * head + d_hidden) + 40 * n_rows, n_slabs


def sharded(n_rows: int, size: int) -> Cost:
    """Ours: LazyLogits(hidden, this rank's rows of the head, process_group=...)."""
    memory, n_slabs = lazy_memory(n_rows, VOCAB // size)
    rows, d_hidden = n_rows // n_slabs, n_rows * WIDTH * BF16
    call = Call(n_rows, rows, CE_NUMBERS, (d_hidden,))
    facts = call.forward()[0]
    seconds = facts.count * all_gather(facts.bytes * size / facts.count, size)
    seconds += all_reduce(d_hidden, size)
    received = facts.bytes * (size - 1) + 2 * d_hidden * (size - 1) / size
    memory += HEAD / size + d_hidden + FP32 * CE_NUMBERS * rows * size
    return Cost(3, size, n_rows, facts.count + 1, received, seconds, memory)


def whole_head(n_rows: int, gpus: int, gathers: int) -> Cost:
    """FSDP2 and ZeRO-3: the head gathered so often in a step, and its gradient scattered."""
    memory, _ = lazy_memory(n_rows, VOCAB)
    memory += HEAD + n_rows * WIDTH * BF16 + 2 * HEAD / gpus  # shard and its gradient stay
    seconds = (gathers + 1) * all_gather(HEAD, gpus)
    received = (gathers + 1) * HEAD * (gpus - 1) / gpus
    return Cost(3, 1, n_rows, gathers + 1, received, seconds, memory)


def on_logits(
    n_rows: int, size: int, sums: int, logit_bytes: float, gathers_logits: bool = False
) -> Cost:
    """A loss over materialised logits [N, V / R]: `sums` all-reduces of [N] fp32 numbers in all, so
    many bytes for each logit at the peak."""
    logits, shard = n_rows * VOCAB * BF16, VOCAB * WIDTH * BF16 / size
    d_hidden = n_rows * WIDTH * BF16
    seconds, received, count = all_reduce(d_hidden, size), 2 * d_hidden * (size - 1) / size, 1
    if gathers_logits:
        seconds += all_gather(logits, size)
        received += logits * (size - 1) / size
        count += 1
    of_rows = 3 * FP32 * n_rows  # maximum, label's logit, sum of exponentials
    if sums:
        seconds += sums * all_reduce(of_rows / sums, size)
        received += 2 * of_rows * (size - 1) / size
    width = VOCAB if gathers_logits else VOCAB / size
    memory = 2 * shard + logit_bytes * n_rows * width + STATES * n_rows
    if gathers_logits:
        memory += logits / size
    return Cost(3, size, n_rows, count + sums, received, seconds, memory)


EAGER_BYTES = 12  # a logit, the peak of an eager cross-entropy: bench/results/nvidia-h200.json
VOCAB_PARALLEL_BYTES = 6  # bf16 logits and their fp32 exponentials; then these and a bf16 gradient
LIGER_ROWS = 512  # of a chunk
LIGER_BYTES = 12  # at least: logits, exponentials and a temporary in fp32
MEGATRON_COLUMNS = 512 * 6  # of a split of the vocabulary


def liger_fused(n_rows: int, size: int) -> Cost:
    """LigerFusedLinearScaledCrossEntropyTPFunction's portable path: chunks of 512 rows, two
    all-reduces in each, logits again in the backward."""
    chunks, d_hidden = math.ceil(n_rows / LIGER_ROWS), n_rows * WIDTH * BF16
    shard = HEAD / size
    seconds = chunks * (
        all_reduce(FP32 * LIGER_ROWS, size) + all_reduce(2 * FP32 * LIGER_ROWS, size)
    )
    seconds += all_reduce(d_hidden, size)
    received = 2 * (3 * FP32 * n_rows + d_hidden) * (size - 1) / size
    memory = 2 * shard + LIGER_BYTES * LIGER_ROWS * VOCAB / size + STATES * n_rows
    return Cost(4, size, n_rows, 2 * chunks + 1, received, seconds, memory)


def megatron_fused(n_rows: int, size: int) -> Cost:
    """Megatron's linear_cross_entropy on Hopper: all-reduces of the maximum of every split of 3,072
    columns, of the label's log-probability and of the sum; logits again in the backward, whose
    d hidden is summed in fp32."""
    splits, d_hidden = math.ceil(VOCAB / size / MEGATRON_COLUMNS), n_rows * WIDTH * FP32
    of_rows = FP32 * n_rows
    seconds = all_reduce(splits * of_rows, size) + 2 * all_reduce(of_rows, size)
    seconds += all_reduce(d_hidden, size)
    received = 2 * ((splits + 2) * of_rows + d_hidden) * (size - 1) / size
    split = MEGATRON_COLUMNS * n_rows * BF16
    memory = 2 * HEAD / size + split + 2 * d_hidden + 3 * splits * of_rows + STATES * n_rows
    return Cost(4, size, n_rows, 4, received, seconds, memory)


# ---- the page's tables

Table = tuple[Sequence[str], list[Sequence[str]]]


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def _mb(count: float) -> str:
    return f"{count / 1e6:,.0f}"


def _us_a_token(cost: Cost) -> str:
    """Microseconds of all GPUs that share a token."""
    return f"{1e6 * (cost.compute + cost.communication) * cost.n_ranks / cost.n_rows:.1f}"


def table_numbers() -> Table:
    """F of every fact."""
    single = ["lse", "logp", "entropy", "argmax", "sum_sq_probs", "bag_mass", "logp_sum"]
    several = [("logp", "entropy"), ("logp", "entropy", "argmax")]
    pairs = ["cross_entropy", "kl", "reverse_kl"]
    rows: list[Sequence[str]] = []
    for want in [*((fact,) for fact in single), *several]:
        rows.append((f"`vocab_stats`: {', '.join(want)}", str(numbers_of(want))))
    for want in [*((fact,) for fact in pairs), ("kl", "reverse_kl")]:
        rows.append((f"`vocab_pair_stats`: {', '.join(want)}", str(pair_numbers_of(want))))
    jsd = f"{pair_numbers_of(('jsd',))}, then {JSD_NUMBERS}"
    rows.append(("`vocab_pair_stats`: jsd", jsd))
    return ("facts", "F"), rows


def table_sharded() -> Table:
    """Ours, from 2 to 64 ranks that share the vocabulary."""
    rows: list[Sequence[str]] = []
    for n_rows in ROWS:
        for size in (2, 4, 8, 16, 64):
            cost = sharded(n_rows, size)
            share = cost.communication / (cost.compute + cost.communication)
            rows.append(
                (
                    *(f"{n_rows:,}", str(size), _ms(cost.compute), str(cost.collectives)),
                    *(_mb(cost.received), _ms(cost.communication), f"{share:.0%}"),
                    _gb(cost.memory),
                )
            )
    heads = ("N", "TP", "products ms", "collectives", "received MB", "ms", "of the step")
    return (*heads, "memory GB"), rows


def table_gathered() -> Table:
    """A head that is gathered, from 2 to 512 GPUs that each have rows of their own."""
    rows: list[Sequence[str]] = []
    for gpus in (2, 8, 64, 512):
        for name, gathers in (("FSDP2, ZeRO-3", 1), ("gathered twice", 2)):
            cost = whole_head(ROWS[0], gpus, gathers)
            rows.append(
                (
                    *(str(gpus), name, _ms(cost.compute), str(cost.collectives)),
                    *(_mb(cost.received), _ms(cost.communication), _gb(cost.memory)),
                )
            )
    return ("GPUs", "engine", "products ms", "collectives", "received MB", "ms", "memory GB"), rows


STRATEGIES: tuple[tuple[str, Callable[[int, int], Cost]], ...] = (
    ("onepass, sharded head", sharded),
    ("logits gathered", lambda n, r: on_logits(n, r, 0, EAGER_BYTES, gathers_logits=True)),
    (
        "Megatron and Liger, over logits",
        lambda n, r: on_logits(n, r, 3, VOCAB_PARALLEL_BYTES),
    ),
    ("Megatron, over logits, fused", lambda n, r: on_logits(n, r, 2, VOCAB_PARALLEL_BYTES)),
    ("Megatron, fused with the product", megatron_fused),
    ("Liger, fused with the product", liger_fused),
)


def table_strategies() -> Table:
    """Who does what with a head in shards, for one batch."""
    rows: list[Sequence[str]] = []
    for size in (8, 16, 64):
        for name, of in STRATEGIES:
            cost = of(ROWS[0], size)
            rows.append(
                (
                    *(str(size), name, f"{2 * cost.products}", _ms(cost.compute)),
                    *(str(cost.collectives), _mb(cost.received), _ms(cost.communication)),
                    _gb(cost.memory),
                )
            )
    heads = ("TP", "strategy", "units", "products ms", "collectives", "received MB", "ms")
    return (*heads, "memory GB"), rows


def layout(n_rows: int, gpus: int, size: int) -> Cost:
    """TP x FSDP2: the head in `size` shards, each of them shared among gpus / size ranks, which
    gather it once a step and scatter its gradient."""
    replicas = gpus // size
    cost = sharded(n_rows, size) if size > 1 else whole_head(n_rows, gpus, 1)
    if size == 1 or replicas == 1:
        return cost
    shard, in_node = HEAD / size, max(1, PER_NODE // size)
    return cost._replace(
        collectives=cost.collectives + 2,
        received=cost.received + 2 * shard * (replicas - 1) / replicas,
        communication=cost.communication + 2 * all_gather(shard, replicas, in_node),
        memory=cost.memory + 2 * shard / replicas,
    )


def table_layouts() -> Table:
    """From 2 to 512 GPUs: TP x FSDP2."""
    rows: list[Sequence[str]] = []
    for gpus in (2, 4, 8, 16, 64, 512):
        for size in (1, 2, 4, 8, 16, 64):
            if size > gpus:
                continue
            cost = layout(ROWS[0], gpus, size)
            more = layout(ROWS[0] * size, gpus, size)
            rows.append(
                (
                    *(str(gpus), f"{size} x {gpus // size}", _ms(cost.compute)),
                    *(_ms(cost.communication), _gb(cost.memory), _us_a_token(cost)),
                    *(_us_a_token(more), _gb(more.memory)),
                )
            )
    heads = ("GPUs", "TP x FSDP2", "products ms", "communication ms", "memory GB")
    return (*heads, "GPU-us a token", "N = 8192 TP: us", "memory GB"), rows


TABLES: dict[str, Callable[[], Table]] = {
    "numbers": table_numbers,
    "sharded": table_sharded,
    "gathered": table_gathered,
    "strategies": table_strategies,
    "layouts": table_layouts,
}


def tables() -> dict[str, str]:
    """The page's tables by name, in markdown."""
    made = {}
    for name, make in TABLES.items():
        heads, rows = make()
        lines = [heads, ["---"] * len(heads), *rows]
        made[name] = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return made


if __name__ == "__main__":
    for name, text in tables().items():
        print(f"<!-- plan: {name} -->\n{text}\n<!-- end -->\n")
