"""The benchmark's rooflines against what happens: products, launches and bytes are counted.

FLOP come from torch's profiler, which sees the products inside operators of C++ and of ours alike;
launches and bytes from the interpreter. Both run small sizes of the cases themselves.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from onepass.bench import command, report, roofline
from onepass.bench.cases import CASES, case
from onepass.bench.measure import Contender
from onepass.bench.roofline import CARDS, predict
from onepass.bench.schema import Case, Size
from onepass.ops import head as head_module
from support.environment import NO_INTERPRETER
from support.flops import counted_flops
from support.guard import Moved, count_bytes

LOGITS_CASES = [case for case in CASES if case.traffic is not None]
interpreted = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER or "-")


def run_once(case: Case, size: Size, mode: str, provider: str) -> Contender:
    """One call of a provider as the benchmark makes it, ready to be counted: `.call()`."""
    function = next(p for p in case.providers if p.name == provider).load()
    inputs = case.inputs(size, torch.Generator("cpu").manual_seed(0))
    contender = Contender(provider, function, inputs, case, mode)
    contender.prepare()
    contender.call()  # whatever is made once
    contender.prepare()
    return contender


UNITS = {  # of N D V multiply-adds, twice for each: forward without gradients, backward, both
    "head_cross_entropy": (2, 0, 6),
    "head_cross_entropy_frozen": (2, 0, 4),
    "head_logp_entropy": (2, 4, 6),  # two facts: made again rather than two gradients ahead
    "head_four_losses": (2, 6, 8),
}


MASKED = [(name, 0.75) for name in UNITS if "cross_entropy" in name]  # others' labels all count


@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize(("name", "masked"), [(name, 0.0) for name in UNITS] + MASKED)
def test_products_are_those_that_are_made(name: str, mode: str, masked: float) -> None:
    head_case, size = case(name), Size(40, 96, 24, dtype="float32", masked=masked)
    found = predict(head_case, size, mode, "onepass")
    assert found is not None
    units = UNITS[name][("forward", "backward", "full").index(mode)]
    assert found.gemm_units == units
    assert found.flops == units * 40 * (1 - masked) * 24 * 96
    assert counted_flops(run_once(head_case, size, mode, "onepass").call) == found.flops
    bare = predict(head_case, size, mode, "gemms")
    assert bare is not None and bare.launches is None
    assert counted_flops(run_once(head_case, size, mode, "gemms").call) == bare.flops


@interpreted
@pytest.mark.parametrize("slabs", [1, 3])
@pytest.mark.parametrize("mode", ["forward", "backward", "full"])
@pytest.mark.parametrize("name", UNITS)
def test_launches_and_bytes_of_a_head(
    name: str, mode: str, slabs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: its slabs, its kernels."""
    head_case, size = case(name), Size(6, 4001, 8, dtype="float32")
    monkeypatch.setenv("ONEPASS_IMPL", "triton")
    monkeypatch.setattr(head_module, "GPU_TYPES", ("cpu",))
    monkeypatch.setattr(head_module, "SLAB_BYTES_ON_GPU", 6 // slabs * 4001 * 4)
    found = predict(head_case, size, mode, "onepass")
    assert found is not None
    contender = run_once(head_case, size, mode, "onepass")
    with count_bytes() as moved:
        contender.call()
    assert len(moved.launches) == found.launches
    of_kernels = sum(p.bytes for p in found.phases if p.what in ("facts", "gradient"))
    assert_moved(moved, of_kernels, rows=6)


@interpreted
@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("of_logits", LOGITS_CASES, ids=lambda case: case.name)
def test_launches_and_bytes_of_logits(
    of_logits: Case, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = of_logits.sizes["cuda"][0]
    size = Size(
        4, first.V and 4001, first.D and 4000, "float32",
        masked=0.5 if first.masked else 0.0, students=first.students, layers=min(first.layers, 2),
    )  # fmt: skip
    monkeypatch.setenv("ONEPASS_IMPL", "triton")
    found = predict(of_logits, size, mode, "onepass")
    assert found is not None and found.products == 0
    contender = run_once(of_logits, size, mode, "onepass")
    with count_bytes() as moved:
        contender.call()
    assert len(moved.launches) == found.launches
    assert_moved(moved, found.bytes, rows=4 * size.students * size.layers)


def assert_moved(moved: Moved, least: float, rows: int) -> None:
    """The big tensors once, and for each row the few numbers that it is known by."""
    total = moved.read() + moved.written()
    assert least <= total <= 1.01 * least + 256 * rows, (moved.launches, total, least)


def test_phases_wait_for_each_other() -> None:
    """Products at a card's arithmetic, kernels at its memory's speed, one after another."""
    llama = Size(8192, 128256, 4096)
    h200, h100 = CARDS
    bare = predict(case("head_cross_entropy"), llama, "full", "gemms")
    ours = predict(case("head_cross_entropy"), llama, "full", "onepass")
    assert bare is not None and ours is not None
    product = 2 * 8192 * 4096 * 128256
    assert bare.milliseconds(h200) == pytest.approx(3 * product / 750e12 * 1e3)
    assert bare.milliseconds(h100) == pytest.approx(3 * product / 728e12 * 1e3)
    logits, head, states = 2 * 8192 * 128256, 2 * 128256 * 4096, 2 * 8192 * 4096
    kernels = 3 * logits + 2 * states + (2 + 1) * head
    assert ours.milliseconds(h200) == pytest.approx((3 * product / 750e12 + kernels / 4.3e12) * 1e3)
    assert ours.launches == 3 * 4  # slabs of 2093 rows
    small = Size(1024, 128256, 4096, dtype="float32")
    fp32 = predict(case("head_cross_entropy"), small, "full", "onepass")
    assert fp32 is not None and fp32.milliseconds(h200) is None  # no peak was measured
    assert predict(case("head_cross_entropy"), llama, "full", "eager") is None


def test_work_shrinks_with_the_rows_that_count() -> None:
    whole, masked = (
        predict(case("head_cross_entropy"), Size(8192, 128256, 4096, masked=m), "full", "onepass")
        for m in (0.0, 0.75)
    )
    assert whole is not None and masked is not None
    assert whole.flops == 4 * masked.flops and masked.bytes < whole.bytes / 2


@pytest.mark.parametrize(
    ("device", "card", "shown"),
    [("NVIDIA H200", "H200", True), ("NVIDIA H100 80GB HBM3", "H100", True), ("a CPU", "H200", 0)],
)
def test_measured_over_predicted_only_on_that_card(
    device: str, card: str, shown: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    size = Size(8192, 128256)
    of_row = roofline.columns(case("cross_entropy"), size, "full", "onepass", device)
    assert of_row["predicted_on"] == card
    row = dict.fromkeys(report.FIELDS) | {"ms": 2 * of_row["predicted_ms"], "device": device}
    row |= {"case": "cross_entropy", "size": size.label, "mode": "full", "provider": "onepass"}
    report.print_rooflines([row | of_row])
    out = capsys.readouterr().out
    assert f"what {card} would need for it (a prediction)" in out
    assert (" 2.00" in out) == bool(shown)


def test_predictions_are_printed_and_nothing_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = ["--roofline", "--case", "head_cross_entropy", "--mode", "full"]
    assert command.main(tokens) == 0
    table = capsys.readouterr().out.splitlines()
    sizes = case("head_cross_entropy").sizes["cuda"]
    assert len(table) == 3 + 2 * len(sizes), "ours and the bare products"
    assert command.main([*tokens, "--all-sizes", "--json", "--providers", "onepass"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == len(sizes) + len(case("head_cross_entropy").more["cuda"])
    assert {(row["predicted_on"], row["ms"]) for row in rows} == {("H200", None)}
    assert not list(tmp_path.iterdir())
