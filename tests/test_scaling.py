"""docs/scaling.md: its tables are those of bench/plan.py, and the formulas there are what happens.

Collectives are counted on ranks that are threads; memory was measured on a GPU, in bench/results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import LazyLogits
from onepass.bench import plan
from onepass.ops import head
from onepass.ops.vocab_pair_stats import FACTS as PAIR_FACTS
from onepass.ops.vocab_stats import FACTS
from support.ranks import Ranks

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "scaling.md").read_text("utf-8")
N, D, V = 6, 5, 37
SIZES = (3, 20, 14)


@pytest.mark.parametrize("name", plan.TABLES)
def test_the_page_has_the_tables_of_the_formulas(name: str) -> None:
    found = re.findall(rf"<!-- plan: {name} -->\n(.*?)\n<!-- end -->", PAGE, re.DOTALL)
    mend = "python -m onepass.bench.plan prints the tables"
    assert found == [plan.tables()[name]], mend


def test_the_page_has_no_other_marks() -> None:
    assert sorted(re.findall(r"<!-- plan: (\w+) -->", PAGE)) == sorted(plan.TABLES)


def test_the_page_has_what_was_counted() -> None:
    """Of the rows that bench/results keeps, which the formula still fits."""
    (path,) = (ROOT / "bench" / "results").glob("*-2-processes.json")
    rows = json.loads(path.read_text("utf-8"))
    assert path.name in PAGE and {row["status"] for row in rows} == {"ok"}
    names = {
        "onepass": "`LazyLogits`, `process_group=`",
        "onepass-dtensor": "`LazyLogits`, DTensor",
        "gathered-logits": "logits gathered",
        "gathered-head": "head gathered",
        "loss-parallel": "`loss_parallel`",
    }
    of_case = [row for row in rows if row["case"] == "sharded_cross_entropy"]
    assert [row["provider"] for row in of_case] == list(names)
    for row in of_case:
        cells = ["none: all ranks have the same rows"] * 2
        for sent in row["collectives"]:
            kind = sent["kind"].replace("_", "-") + ("s" if sent["count"] > 1 else "")
            cells[sent["pass"] == "backward"] = f"{sent['count']} {kind}, {sent['bytes']:,}"
        assert f"| {names[row['provider']]} | {' | '.join(cells)} |" in PAGE
    n_rows, dtensor = 192, plan.Call(192, 64, plan.CE_NUMBERS, (256 * 64 * 4,), process_groups=0)
    ours = plan.Call(n_rows, 64, plan.CE_NUMBERS, (256 * 64 * 4,))
    for row, call in zip(of_case, (ours, dtensor), strict=False):
        found = [(s["kind"], s["count"], s["bytes"]) for s in row["collectives"]]
        said = [(c.kind, c.count, c.bytes) for c in (*call.forward(), *call.backward())]
        assert found == said


# -- what is sent -----------------------------------------------------------------------------


def counted(
    call: Callable[[Callable[[int], Tensor]], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    trained: Sequence[int] = (0,),
    **options: Any,
) -> list[plan.Collective]:
    """Collectives of `call`, which gets what makes the k-th sharded head's logits, and of its
    backward; the k-th hidden states have a gradient where `trained` names them."""
    gen = torch.Generator().manual_seed(1)
    hidden = [torch.randn(N, D, generator=gen) for _ in range(2)]
    heads = [torch.randn(V, D, generator=gen) for _ in range(2)]
    ranks = Ranks(len(SIZES), monkeypatch)

    def on_rank(rank: int) -> None:
        def logits(k: int) -> Tensor:
            states = hidden[k].clone().requires_grad_(k in trained)
            own = heads[k].split(list(SIZES))[rank]
            return LazyLogits(states, own, process_group=ranks, **options)

        total = call(logits)
        if total.requires_grad:
            total.backward()

    ranks.run(on_rank)
    totals: dict[str, plan.Collective] = {}
    for kind, shape, dtype in ranks.counted:
        size = torch.empty(shape, dtype=dtype, device="meta").nbytes
        so_far = totals.get(kind, plan.Collective(kind, 0, 0))
        totals[kind] = plan.Collective(kind, so_far.count + 1, so_far.bytes + size)
    return list(totals.values())


def total_of(stats: Any) -> Tensor:
    facts = [f for f in stats if f is not None and f.requires_grad]
    return sum((f.sum() for f in facts), torch.zeros(()))


WANTS = [*((fact,) for fact in FACTS), ("logp", "label_logit"), ("lse", "logp", "entropy"), FACTS]


@pytest.mark.parametrize("want", WANTS, ids="+".join)
def test_statistics(want: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    labels, bag = torch.tensor([0, 36, 2, 20, 3, 35]), torch.rand(V)

    def call(logits: Callable[[int], Tensor]) -> Tensor:
        return total_of(
            onepass.vocab_stats(
                logits(0), labels, contrast_labels=labels, bag_weights=bag, want=want
            )
        )

    of_hidden = () if want == ("argmax",) else (4 * N * D,)
    wanted = plan.Call(N, N, plan.numbers_of(want), of_hidden)
    assert counted(call, monkeypatch) == [*wanted.forward(), *wanted.backward()]


PAIRS = [*((fact,) for fact in PAIR_FACTS), ("cross_entropy", "kl"), ("kl", "reverse_kl", "jsd")]


@pytest.mark.parametrize("trained", [(0,), (0, 1)], ids=["fixed teacher", "both trained"])
@pytest.mark.parametrize("want", PAIRS, ids="+".join)
def test_pair_statistics(
    want: tuple[str, ...], trained: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(logits: Callable[[int], Tensor]) -> Tensor:
        return total_of(onepass.vocab_pair_stats(logits(0), logits(1), want=want))

    numbers, jsd = plan.pair_numbers_of(want), "jsd" in want
    sums = tuple(4 * N * D for _ in trained)
    wanted = plan.Call(N, N, numbers, sums, process_groups=2, jsd=jsd)
    assert counted(call, monkeypatch, trained) == [*wanted.forward(), *wanted.backward()]


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 4])
def test_slabs_and_masks(rows: int, compact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of six rows count; slabs are of one size, but for a pair's."""
    labels = torch.tensor([0, -100, 2, 20, 3, 35])
    widest = max(SIZES)
    budget = 4 * widest * rows
    n_rows = 5 if compact else N

    def loss(logits: Callable[[int], Tensor]) -> Tensor:
        return onepass.cross_entropy(logits(0), labels)

    step = plan.slab_rows(n_rows, 4 * widest, budget)
    wanted = plan.Call(n_rows, step, plan.CE_NUMBERS, (4 * N * D,), compact=compact)
    found = counted(loss, monkeypatch, max_slab_bytes=budget, compact=compact)
    assert found == [*wanted.forward(), *wanted.backward()]

    def kl(logits: Callable[[int], Tensor]) -> Tensor:
        stats = onepass.vocab_pair_stats(logits(0), logits(1), mask=labels != -100, want=("kl",))
        return total_of(stats)

    row_bytes = 2 * 4 * widest
    budget = row_bytes * rows
    step = plan.slab_rows(n_rows, row_bytes, budget, even=False)
    numbers = plan.pair_numbers_of(("kl",))
    wanted = plan.Call(n_rows, step, numbers, (4 * N * D,), process_groups=2, compact=compact)
    found = counted(kl, monkeypatch, max_slab_bytes=budget, compact=compact)
    assert found == [*wanted.forward(), *wanted.backward()]


# -- what is held -----------------------------------------------------------------------------


def measured(provider: str) -> dict[str, Any]:
    """The newest row of the trained head's cross-entropy on an H200, all rows counting."""
    rows = json.loads((ROOT / "bench" / "results" / "nvidia-h200.json").read_text("utf-8"))
    key = ("head_cross_entropy", "8192x4096x128256 bfloat16", "full", provider)
    found = [r for r in rows if (r["case"], r["size"], r["mode"], r["provider"]) == key]
    return next(r for r in reversed(found) if r["peak_mib"])


def test_memory_is_what_was_measured() -> None:
    row = measured("onepass")
    memory, n_slabs = plan.lazy_memory(row["N"], row["V"], row["D"])
    assert memory / 2**20 == pytest.approx(row["peak_mib"], rel=1e-3) and n_slabs > 1
    assert f"{row['peak_mib']:,.0f} MiB for R = 1" in PAGE
    eager = measured("eager")
    of_a_logit = eager["peak_mib"] * 2**20 / (eager["N"] * eager["V"])
    assert of_a_logit == pytest.approx(plan.EAGER_BYTES, rel=1e-3)


def test_slabs_are_those_of_the_package() -> None:
    assert plan.SLAB_BYTES == head.SLAB_BYTES_ON_GPU


def test_a_second_way_to_the_plans_numbers() -> None:
    """8 ranks, N = 8192, from the page's own words."""
    cost = plan.sharded(8192, 8)
    assert cost.compute == pytest.approx(6 * 8192 * 2**18 * 8192 / 8 / 692.3e12)
    d_hidden, facts = 2 * 8192 * 8192, 4 * 3 * 8192
    assert cost.received == 2 * d_hidden * 7 / 8 + 7 * (facts + 88)
    assert cost.communication == pytest.approx(4 * 20e-6 + cost.received / 450e9)
    head_bytes = 2 * 2**18 * 8192
    gathered = plan.whole_head(8192, 8, 1)
    assert gathered.communication == pytest.approx(2 * (20e-6 + head_bytes * 7 / 8 / 450e9))
    assert gathered.compute == pytest.approx(8 * cost.compute)
    assert plan.bandwidth(16, 8) == 400e9 and plan.bandwidth(64, 1) == 50e9
