"""The benchmark: what it refuses, what it measures, what it writes, its script for a GPU machine.

Small cases made here, whose providers are each wrong in one way, go through the runner that the
real cases go through; the command itself runs once from end to end.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from onepass.bench import MODES, cases, command, each_kernel, heads, measure, report, run
from onepass.bench.cases import CASES
from onepass.bench.heads import HEAD_CASES
from onepass.bench.schema import Case, NotHere, Provider, Size
from onepass.cli.errors import Parser
from support.environment import DEVICE, NO_TRITON

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = ROOT / "bench" / "on_gpu.sh"
ROWS, VOCAB = 6, 11
Inputs = dict[str, Any]
Outputs = tuple[torch.Tensor, ...]


def loss_of(inputs: Inputs) -> Outputs:
    return (F.cross_entropy(inputs["logits"], inputs["labels"]),)


def scaled_gradient(x: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
    """x, with its gradient multiplied by `factor`."""
    return x.detach() + (x - x.detach()) * factor


class IgnoresUpstream(torch.autograd.Function):
    """Cross-entropy whose backward takes the upstream gradient for 1."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(logits, labels)
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        onehot = F.one_hot(labels, logits.shape[-1])
        return (logits.softmax(-1) - onehot) / len(labels), None


class OverItsInput(torch.autograd.Function):
    """Cross-entropy that keeps its gradient where the logits were, as Liger's does."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(logits, labels)
        onehot = F.one_hot(labels, logits.shape[-1])
        logits.data.copy_((logits.softmax(-1) - onehot) / len(labels))
        ctx.save_for_backward(logits.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return ctx.saved_tensors[0] * upstream[0], None


def over_its_input(inputs: Inputs) -> Outputs:
    return (OverItsInput.apply(inputs["logits"], inputs["labels"]),)


def one_row_wrong(inputs: Inputs) -> Outputs:
    factor = torch.ones(ROWS, 1, device=inputs["logits"].device)
    factor[3] = 1.0 + 2e-3
    return (F.cross_entropy(scaled_gradient(inputs["logits"], factor), inputs["labels"]),)


def breaks(inputs: Inputs) -> Outputs:
    raise RuntimeError("no kernel image\nand a long story")


def writes(inputs: Inputs) -> Outputs:
    loss = loss_of(inputs)
    inputs["logits"].data[2, 5] += 1e-3
    return loss


WRONG: dict[str, tuple[Callable[[Inputs], Outputs], str, str]] = {
    "gradient": (
        lambda i: (F.cross_entropy(scaled_gradient(i["logits"], 1.01), i["labels"]),),
        "refused",
        "gradient off by",
    ),
    "one row": (one_row_wrong, "refused", "gradient off by"),
    "upstream": (
        lambda i: (IgnoresUpstream.apply(i["logits"], i["labels"]),),
        "refused",
        "gradient times -0.5 off by",
    ),
    "value": (lambda i: (loss_of(i)[0] * 1.001,), "refused", "output off by"),
    "NaN": (lambda i: (loss_of(i)[0] * float("nan"),), "refused", "output off by nan"),
    "shape": (lambda i: (loss_of(i)[0].reshape(1),), "refused", "output off by inf"),
    "count": (lambda i: loss_of(i) * 2, "refused", "2 outputs instead of 1"),
    "writes": (writes, "refused", "wrote into its inputs"),
    "raises": (breaks, "failed", "RuntimeError: no kernel image"),
}


@pytest.fixture
def device() -> str:
    """The benchmark knows two kinds of device; an XPU's tests run its CPU side."""
    return DEVICE if DEVICE == "cuda" else "cpu"


@pytest.fixture(autouse=True)
def few_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Toys need no second of timing to have a median; the tests' own environment stays."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    effort = dict.fromkeys(("cpu", "cuda"), (0.02, 3, 5))
    monkeypatch.setattr(run, "EFFORT", effort)
    monkeypatch.setattr(run, "QUICK_EFFORT", effort)


def provider(name: str, function: Callable[[Inputs], Outputs], **options: Any) -> Provider:
    return Provider(name, lambda: function, **options)


def toy(*providers: Provider, modes: tuple[str, ...] = ("full",)) -> Case:
    size = Size(ROWS, VOCAB, dtype="float32")
    return Case(
        name="toy",
        what="cross-entropy",
        inputs=cases.case("cross_entropy").inputs,
        wrt=("logits",),
        providers=(provider("eager", loss_of), *providers),
        sizes={"cpu": (size,), "cuda": (size,)},
        modes=modes,
        traffic=cases.case("cross_entropy").traffic,
    )


def arguments(*tokens: str) -> argparse.Namespace:
    parser = Parser(prog="onepass bench")
    command.add_arguments(parser)
    return parser.parse_args(tokens)


@functools.cache
def environment(device: str) -> dict[str, Any]:
    return run.gather(torch.device(device))


def run_toy(case: Case, device: str, *tokens: str, **options: Any) -> dict[str, report.Row]:
    where = torch.device(device)
    size = case.sizes[device][0]
    asked = arguments("--quick", *tokens)
    rows = run.run_size(case, size, where, asked, environment(device), **options)
    return {row["provider"]: row for row in rows}


# -- refusal ----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", WRONG)
def test_a_wrong_provider_is_listed_and_never_timed(fault: str, device: str) -> None:
    function, status, why = WRONG[fault]
    calls = 0

    def counted(inputs: Inputs) -> Outputs:
        nonlocal calls
        calls += 1
        return function(inputs)

    rows = run_toy(toy(provider("wrong", counted), provider("right", loss_of)), device)
    wrong, right = rows["wrong"], rows["right"]
    assert (wrong["status"], wrong["ms"], wrong["peak_mib"]) == (status, None, None)
    assert why in wrong["why"] and "\n" not in wrong["why"]
    assert calls <= 2, "it was called beyond its check"
    assert right["status"] == "ok" and right["ms"] > 0
    if fault == "gradient":
        assert wrong["gradient_error"] == pytest.approx(0.01, rel=0.05)
        assert right["gradient_error"] < 1e-5


def test_one_wrong_row_among_many_is_seen(device: str) -> None:
    reference = torch.randn(1000, 50, device=device, dtype=torch.float64)
    reference[7] *= 1e-9  # nearly 0: rounding of it is no fault
    wrong = reference.clone()
    wrong[500] *= 1.01
    wrong[7] += 1e-7
    whole, worst = measure.gradient_errors(wrong, reference)
    assert whole < 1e-3 and worst == pytest.approx(0.01)
    assert measure.gradient_errors(-0.5 * wrong, reference, -0.5)[1] == pytest.approx(0.01)
    assert measure.gradient_errors(wrong[:5], reference) == (float("inf"),) * 2
    wrong[999, 49] = float("nan")
    assert all(error != error for error in measure.gradient_errors(wrong, reference))


def test_a_wrong_forward_is_refused_without_gradients(device: str) -> None:
    case = toy(provider("wrong", lambda i: (loss_of(i)[0] + 0.01,)), modes=("forward",))
    assert run_toy(case, device)["wrong"]["status"] == "refused"


def test_overwriting_is_allowed_where_declared(device: str) -> None:
    declared = provider("in place", over_its_input, overwrites=("logits",))
    rows = run_toy(toy(declared, provider("hidden", over_its_input)), device)
    assert rows["in place"]["status"] == "ok" and rows["in place"]["in_place"]
    assert rows["in place"]["reps"] >= 3, "later calls must see the logits, not the gradient"
    assert rows["hidden"]["status"] == "refused"
    assert rows["eager"]["status"] == "ok"


def test_an_overwriting_contender_computes_the_same_every_time(device: str) -> None:
    case = toy()
    inputs = case.inputs(case.sizes[device][0], torch.Generator(device).manual_seed(1))
    kept = inputs["logits"].clone()
    contender = measure.Contender("in place", over_its_input, inputs, case, "full", ("logits",))
    wanted = measure.forward_backward(loss_of, inputs, case)[1][0]
    for _ in range(3):
        contender.prepare()
        contender.call()
        torch.testing.assert_close(contender._gradients[0], wanted)
    assert torch.equal(inputs["logits"], kept)


def test_providers_that_cannot_run_here_keep_their_rows(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "version", lambda name: None)

    def not_here() -> Any:
        raise NotHere("needs torch 9")

    case = toy(
        provider("trl", loss_of, distribution="trl"),
        provider("large", loss_of, gpu_only=True),
        provider("compiled", loss_of, compiled=True),
        Provider("newer", not_here),
    )
    rows = run_toy(case, device)
    assert (rows["trl"]["status"], rows["trl"]["why"]) == ("not installed", "pip install trl")
    assert rows["large"]["status"] == ("not here" if device == "cpu" else "ok")
    assert rows["compiled"]["status"] == "not run"
    assert (rows["newer"]["status"], rows["newer"]["why"]) == ("not here", "needs torch 9")
    assert all(row["status"] in report.STATUSES for row in rows.values())
    late = run_toy(case, device, not_run="time limit of 1 s")
    assert {row["status"] for row in late.values()} == {"not run"}


# -- numbers ----------------------------------------------------------------------------------


def test_quantiles_interpolate() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert [measure.quantile(values, q) for q in (0.0, 0.2, 0.5, 0.8, 1.0)] == pytest.approx(
        [1.0, 1.8, 3.0, 4.2, 5.0]
    )
    assert measure.quantile([7.0], 0.8) == 7.0


def test_medians_and_turns(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that the providers move, or on a GPU that they keep waiting."""
    order: list[str] = []
    now = [100.0]
    if device == "cpu":
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def taking(name: str, milliseconds: list[int]) -> Callable[[Inputs], Outputs]:
        turns = itertools.cycle(milliseconds)

        def function(inputs: Inputs) -> Outputs:
            order.append(name)
            taken = next(turns)
            now[0] += taken / 1e3
            if device == "cuda":
                torch.cuda._sleep(taken * 1_000_000)  # cycles
            return loss_of(inputs)

        return function

    case = toy(modes=("forward",))
    inputs = case.inputs(case.sizes[device][0], torch.Generator(device).manual_seed(0))
    times = {"a": [2], "b": [80, 10, 20, 30, 40], "c": [4]}
    contenders = [
        measure.Contender(name, taking(name, ms), inputs, case, "forward")
        for name, ms in times.items()
    ]
    errors = measure.time_all(contenders, budget_s=0.0, min_reps=10, max_reps=10)
    a, b, c = (measure.quantile(contender.ms, 0.5) for contender in contenders)
    assert not errors and [len(contender.ms) for contender in contenders] == [10, 10, 10]
    if device == "cpu":
        assert (a, b, c) == pytest.approx((2, 30, 4))  # the mean of b is 36
        assert measure.quantile(contenders[1].ms, 0.2) == pytest.approx(18)
    assert a < c < b
    rounds = ["".join(order[i : i + 3]) for i in range(len(order) - 30, len(order), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds), "not in turns"
    assert len(set(rounds)) > 1, "the order never changes"


def test_a_contender_that_fails_while_timed_takes_no_other_along(device: str) -> None:
    calls = 0

    def tires(inputs: Inputs) -> Outputs:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise torch.OutOfMemoryError("tried to allocate a lot\nand a paragraph")
        return loss_of(inputs)

    rows = run_toy(toy(provider("tires", tires)), device)
    assert (rows["tires"]["status"], rows["tires"]["why"]) == ("failed", "out of memory")
    assert rows["tires"]["ms"] is None and rows["eager"]["status"] == "ok"


def test_a_reference_that_does_not_fit_in_fp64_is_made_in_fp32(device: str) -> None:
    def hungry(inputs: Inputs) -> Outputs:
        if inputs["logits"].dtype == torch.float64:
            raise torch.OutOfMemoryError("tried to allocate a lot")
        return loss_of(inputs)

    case = toy(provider("onepass", loss_of))
    case = dataclasses.replace(case, providers=(provider("eager", hungry), *case.providers[1:]))
    row = run_toy(case, device)["onepass"]
    assert (row["status"], row["reference"]) == ("ok", "fp32")


def test_a_floor_is_timed_without_a_check(device: str) -> None:
    """It has no result to check, and is no provider of ours that could fail."""
    rows = run_toy(toy(provider("part", lambda i: (0 * loss_of(i)[0],), floor=True)), device)
    part = rows["part"]
    assert part["status"] == "ok" and part["ms"] > 0 and part["first_call_s"] is not None
    assert part["output_error"] is part["gradient_error"] is part["reference"] is None


def test_trained_states_have_the_spread_of_a_trained_model(device: str) -> None:
    """What README.md says of them: a loss of 3 to 5 nats, a third of the labels certain, and for
    what skips small gradients as much to skip as on real text."""
    size = Size(256, 151936, 64, dtype="float32", inputs="trained", masked=0.5)
    inputs = cases.case("head_cross_entropy").inputs(size, torch.Generator(device).manual_seed(0))
    labels = inputs["labels"]
    assert int((labels == -100).sum()) == 128
    counts = labels != -100
    p = (inputs["hidden"] @ inputs["weight"].T).softmax(-1)
    own = p[counts].gather(-1, labels[counts, None])
    assert 2.5 < float(-own.log().mean()) < 5
    assert 0.25 < float((own > 0.5).float().mean()) < 0.55
    large = p > 2**-12
    assert 5e-4 < float(large.float().mean()) < 3e-3
    tiles = large.view(2, 128, -1, 128).any(1).any(-1)
    assert 0.3 < float(tiles.float().mean()) < 0.75


def test_states_of_the_demo_need_what_the_demo_needs(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    demo = cases.case("head_cross_entropy").more["cpu"][-1]
    one = dataclasses.replace(cases.case("head_cross_entropy"), sizes={"cpu": (demo,)})
    args = arguments("--quick", "--device", "cpu", "--mode", "forward")
    rows = run.run_size(one, demo, torch.device("cpu"), args, environment(device))
    assert {row["status"] for row in rows} == {"not here"} and "onepass[train]" in rows[0]["why"]


def test_states_of_the_demo_are_of_a_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    monkeypatch.setattr(heads, "DEMO_STEPS", 15)
    size = cases.case("head_cross_entropy").more["cpu"][-1]
    inputs = cases.case("head_cross_entropy").inputs(size, torch.Generator("cpu").manual_seed(0))
    loss = F.cross_entropy(inputs["hidden"] @ inputs["weight"].T, inputs["labels"])
    assert inputs["hidden"].shape == (size.N, size.D) and 2 < float(loss) < 6.5  # log V is 6.9


def test_peak_memory_counts_temporaries_and_results_above_the_inputs(device: str) -> None:
    mib = 2**20

    def hungry(inputs: Inputs) -> Outputs:
        logits = inputs["logits"]
        first = torch.zeros(8 * mib // 4, device=logits.device)
        second = torch.zeros(4 * mib // 4, device=logits.device)
        total = first.sum() + second.sum()
        del first
        third = torch.zeros(2 * mib // 4, device=logits.device)  # below the peak by then
        return (loss_of(inputs)[0] + 0 * (total + third.sum()),)

    case = toy(modes=("forward",))
    inputs = case.inputs(case.sizes[device][0], torch.Generator(device).manual_seed(0))
    contender = measure.Contender("hungry", hungry, inputs, case, "forward")
    contender.weigh()
    assert contender.peak_mib == pytest.approx(12, abs=0.1)


def test_bytes_that_must_move() -> None:
    case = cases.case("cross_entropy")
    row = 100 * 1000
    assert case.bytes_moved(Size(100, 1000), "forward") == 2 * row
    assert case.bytes_moved(Size(100, 1000), "backward") == 2 * 2 * row
    assert case.bytes_moved(Size(100, 1000, dtype="float32"), "full") == 4 * 3 * row
    masked = Size(100, 1000, masked=0.8)  # rows that do not count are written, not read
    assert case.bytes_moved(masked, "full") == 2 * (2 * row // 5 + row)
    shared = Size(100, 1000, students=3)
    assert cases.case("shared_teacher").bytes_moved(shared, "full") == 2 * (2 * 4 + 3) * row
    layers = Size(100, D=1000, layers=4)
    assert cases.case("hidden_losses").bytes_moved(layers, "full") == 2 * (4 * 4 + 4) * row
    padded = Size(100, D=1000, layers=9, masked=0.2)  # and two layers of harmful prompts
    rerouting = cases.case("circuit_breaker").bytes_moved(padded, "full")
    assert rerouting == 2 * (4 * 11 * 4 * row // 5 + 11 * row)
    assert cases.case("head_cross_entropy").bytes_moved(Size(1, 2, 3), "full") is None


def test_rows_have_the_schema(device: str) -> None:
    row = run_toy(toy(), device)["eager"]
    assert tuple(row) == report.FIELDS
    assert json.loads(json.dumps(row)) == row
    assert (row["case"], row["provider"], row["mode"]) == ("toy", "eager", "full")
    assert (row["N"], row["V"], row["D"], row["dtype"]) == (ROWS, VOCAB, None, "float32")
    assert row["ms_p20"] <= row["ms"] <= row["ms_p80"] and row["peak_mib"] > 0
    assert row["gbps"] == pytest.approx(4 * 3 * ROWS * VOCAB / row["ms"] / 1e6, rel=0.02, abs=1e-4)
    assert row["torch"] == torch.__version__ and row["reference"] == "fp64"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["date"])
    assert row["status"] == "ok" and row["first_call_s"] >= 0 and row["reps"] >= 3


# -- the real cases ---------------------------------------------------------------------------

TINY = {
    "hidden_losses": Size(5, D=24, layers=3),
    "gaussian_stats": Size(5, D=24),
    "cloak": Size(5, D=26),
    "circuit_breaker": Size(8, D=24, layers=3, masked=0.25),
    **{case.name: Size(7, 33, 16) for case in HEAD_CASES},
    "jigsaw_cross_entropies": Size(8, 33, 16, masked=0.25),
    "shared_teacher": Size(5, 37, students=3),
    "step_scores": Size(6, 37, 8),
    "steered_token": Size(6, 37, 16, layers=2, inputs="classifier"),
    "dpo": Size(64, 37, 8),
    "dpo_precomputed": Size(64, 37, 8, masked=0.5),
    "masked_cross_entropy": Size(10, 37, masked=0.5),
    "cross_entropy": Size(9, 33, row_stride=40),
}
OWN = [
    pytest.param(case, provider, id=f"{case.name}-{provider.name}")
    for case in CASES
    for provider in case.providers
    if not provider.compiled and not provider.floor
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("case", "provider"), OWN)
def test_every_provider_of_every_case_agrees(
    case: Case, provider: Provider, dtype: str, device: str
) -> None:
    if provider.distribution is not None and run.version(provider.distribution) is None:
        pytest.skip(f"{provider.distribution} is not installed")
    if provider.gpu_only and device == "cpu":
        pytest.skip("runs on a GPU only")
    size = case.at(TINY.get(case.name, Size(9, 37)), dtype)
    try:
        function = provider.load()
    except NotHere as reason:
        pytest.skip(str(reason))
    inputs = case.inputs(size, torch.Generator(device).manual_seed(3))
    truth = measure.truth(case, inputs, with_gradients=True)
    with warnings.catch_warnings():
        if provider.distribution is not None:
            warnings.simplefilter("ignore")  # theirs to mend
        for mode in ("forward", "full") if case.wrt else ("forward",):
            contender = measure.Contender(
                provider.name, function, inputs, case, mode, provider.overwrites
            )
            contender.check(truth, dtype)


def test_case_tables_are_whole() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    for case in CASES:
        assert case.sizes.keys() == {"cpu", "cuda"} and all(case.sizes.values())
        own = [provider.name for provider in case.providers]
        assert len(set(own)) == len(own) and {"onepass", "eager"} <= set(own)
        assert set(case.modes) <= set(MODES)
        for device, sizes in case.sizes.items():
            labels = [size.label for size in (*sizes, *case.more.get(device, ()))]
            assert len(set(labels)) == len(labels), "two sizes that a row cannot tell apart"


@pytest.mark.skipif(bool(NO_TRITON), reason=NO_TRITON or "-")
@pytest.mark.skipif(DEVICE == "xpu", reason="for compute-sanitizer, which knows CUDA alone")
def test_each_kernel_runs(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert each_kernel.main(["--device", device, "--small"]) == 0
    assert capsys.readouterr().out.count("ok ") == 2


# -- files ------------------------------------------------------------------------------------


def test_rows_are_appended_and_the_file_is_always_whole(tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    report.append_rows(path, [{"case": "a"}])
    report.append_rows(path, [{"case": "b"}, {"case": "c"}])
    assert [row["case"] for row in report.read_rows(path)] == ["a", "b", "c"]
    before = path.read_bytes()
    with pytest.raises(TypeError):
        report.append_rows(path, [{"case": "d", "ms": torch}])  # no JSON
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["device.json"]
    report.append_rows(path, [])
    assert path.read_bytes() == before


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"rows": []}', "[{}]", "\xff"])
def test_a_file_of_something_else_is_named_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(report.NotRows, match=re.escape(str(path))):
        report.append_rows(path, [{"case": "a"}])
    assert path.read_text(encoding="latin-1") == text


def test_ratios_and_newest_rows() -> None:
    old = {"case": "a", "size": "s", "mode": "full", "provider": "eager", "ms": 4.0, "peak_mib": 8}
    new = {**old, "ms": 6.0}
    ours = {**old, "provider": "onepass", "ms": 2.0, "peak_mib": 2}
    by_provider = report.groups([old, ours, new])["a", "s", "full"]
    assert by_provider["eager"] is new
    assert report.ratio(ours, by_provider["eager"], "ms") == 3.0  # times faster
    assert report.ratio(ours, by_provider["eager"], "peak_mib") == 0.25  # of its memory
    assert report.ratio(ours, None, "ms") is None
    assert report.ratio({"ms": None}, by_provider["eager"], "ms") is None


def test_device_names_make_file_names() -> None:
    assert report.file_name("NVIDIA H200") == "nvidia-h200.json"
    assert (
        report.file_name("Some(R) CPU @ 2/3 GHz, 2 threads") == "some-r-cpu-2-3-ghz-2-threads.json"
    )


# -- the command ------------------------------------------------------------------------------


def test_the_command_from_end_to_end(tmp_path: Path) -> None:
    """One real case on the CPU in a process of its own: rows, tables of JSON, picture, exports."""
    out = tmp_path / "made" / "by it"
    options = ["--case", "generation_rows", "--mode", "full", "--quick", "--device", "cpu"]
    options += ["--threads", "1", "--json", "--output", str(out), "--plot", str(tmp_path / "a.png")]
    done = subprocess.run(
        [sys.executable, "-m", "onepass.bench", *options],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    (file,) = out.iterdir()
    rows = report.read_rows(file)
    assert printed["rows"] == rows and Path(printed["file"]) == file
    assert done.stderr.splitlines()[-2].startswith(f"added {len(rows)} rows to {file} (")
    assert printed["environment"]["threads"] == 1 and "trl" in printed["environment"]
    by_provider = {row["provider"]: row for row in rows}
    assert by_provider["onepass"]["status"] == by_provider["eager"]["status"] == "ok"
    assert by_provider["onepass"]["peak_mib"] > 0.5, "the gradient alone is 0.58 MiB"
    assert by_provider["compile"]["status"] == "not run" and "trl" in by_provider
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "made"]

    assert command.main(["plot", str(file), "-o", str(tmp_path / "b.png")]) == 0
    assert (tmp_path / "b.png").stat().st_size > 5_000
    assert command.main(["csv", str(file), "-o", str(tmp_path / "c.csv")]) == 0
    with (tmp_path / "c.csv").open(newline="") as lines:
        table = list(csv.DictReader(lines))
    assert tuple(table[0]) == report.LIGER_COLUMNS
    speeds = {r["kernel_provider"]: r["y_value_50"] for r in table if r["metric_name"] == "speed"}
    assert float(speeds["onepass"]) == by_provider["onepass"]["ms"]
    assert {row["metric_name"] for row in table} == {"speed", "memory"}


def run_main(monkeypatch: pytest.MonkeyPatch, device: str, case: Case, *tokens: str) -> int:
    monkeypatch.setattr(run, "CASES", (case,))
    return command.main(["--device", device, *tokens])


def test_exit_status_is_ours(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A refused peer is news; a refused provider of our own is a failure."""
    wrong = WRONG["value"][0]
    output = ("--output", str(tmp_path))
    peer = toy(provider("onepass", loss_of), provider("peer", wrong))
    assert run_main(monkeypatch, device, peer, *output) == 0
    shown = capsys.readouterr()
    assert re.search(r"^toy +6x11 float32 +full +peer .*refused: output off by", shown.out, re.M)
    assert re.search(r"^toy 6x11 float32 +full .*refused", shown.out, re.M), "not in the summary"
    assert "milliseconds, median" in shown.out and f"{tmp_path}" in shown.err
    assert run_main(monkeypatch, device, toy(provider("onepass", wrong)), *output) == 1


def test_a_picture_may_go_into_the_folder_that_the_run_makes(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    made, case = tmp_path / "made", toy(provider("onepass", loss_of))
    output = ("--output", str(made), "--plot", str(made / "a.png"))
    assert run_main(monkeypatch, device, case, *output) == 0
    assert (made / "a.png").is_file()


def test_an_interrupted_run_keeps_what_it_has(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupts(inputs: Inputs) -> Outputs:
        raise KeyboardInterrupt

    good, bad = toy(), dataclasses.replace(toy(provider("stops", interrupts)), name="second")
    monkeypatch.setattr(run, "CASES", (good, bad))
    assert command.main(["--device", device, "--output", str(tmp_path)]) == 130
    shown = capsys.readouterr()
    (file,) = tmp_path.iterdir()
    assert [row["provider"] for row in report.read_rows(file)] == ["eager"]
    assert "toy" in shown.out
    assert shown.err.splitlines()[-1] == f"onepass bench: interrupted; added 1 row to {file}"
    monkeypatch.setattr(run, "CASES", (bad,))
    assert command.main(["--device", device, "--output", str(tmp_path / "new")]) == 130
    shown = capsys.readouterr()
    assert shown.err.splitlines()[-1] == "onepass bench: interrupted before the first row"
    assert not (tmp_path / "new").exists()


def test_a_time_limit_says_what_was_not_run(
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = ("--output", str(tmp_path), "--time-limit", "1e-9")
    assert run_main(monkeypatch, device, toy(provider("onepass", loss_of)), *output) == 0
    shown = capsys.readouterr()
    assert shown.out.count("not run: time limit of 1e-09 s") == 2
    assert "toy  6x11 float32  not run: time limit" in shown.err


def test_a_time_limit_takes_the_later_sizes_of_every_case() -> None:
    plan = run.sizes_of(CASES, "cuda", arguments())
    first = plan[: len(CASES)]
    assert [case.name for case, _ in first] == [case.name for case in CASES]
    assert all(size == case.sizes["cuda"][0] for case, size in first)
    assert len(plan) == sum(len(case.sizes["cuda"]) for case in CASES)
    halves = run.sizes_of(CASES, "cuda", arguments("--dtype", "float16", "--quick"))
    quick = run.sizes_of(CASES, "cpu", arguments("--quick"))
    assert all(1 <= size.N <= case.sizes["cpu"][0].N / 4 + 1 for case, size in quick)
    assert len(halves) == len(CASES) and {size.dtype for _, size in halves} == {"float16"}


BAD = {
    "case": (["--case", "cros_entropy"], "did you mean cross_entropy?"),
    "provider": (["--providers", "ligerkernel"], "did you mean liger-kernel?"),
    "no provider": (["--providers", ""], "allowed: onepass, onepass-torch, eager"),
    "of another case": (["--case", "kl", "--providers", "trl"], "allowed: onepass"),
    "dtype": (["--dtype", "bf16"], "allowed: float32, bfloat16, float16"),
    "mode": (["--mode", "fwd"], "allowed: forward, backward, full"),
    "threads": (["--threads", "0"], "wanted a number above 0"),
    "limit": (["--time-limit", "soon"], "wanted a number"),
    "action": (["plt"], "did you mean plot?"),
    "no file": (["plot", "-o", "x.png"], "plot needs a FILE"),
    "no out": (["csv", "x.json"], "csv needs -o"),
    "absent": (["plot", "absent.json", "-o", "x.png"], "absent.json"),
    "not rows": (["plot", "notes.txt", "-o", "x.png"], "notes.txt"),
    "no rows": (["plot", "none.json", "-o", "x.png"], "no case has a timed eager"),
    "no folder": (["csv", "none.json", "-o", "absent/x.csv"], "no folder absent"),
    "folder": (["csv", "none.json", "-o", "."], "wanted the name of a file"),
    "output": (["--output", "notes.txt/x"], "--output: 'notes.txt' is a file, not a folder"),
    "plot": (["--plot", "absent/x.png", "--output", "."], "no folder absent"),
    "no yardstick": (
        ["--plot", "x.png", "--providers", "onepass", "--output", "."],
        "add eager to --providers",
    ),
    "stray": (["run", "x.json"], "unexpected argument 'x.json'"),
    "stray out": (["-o", "x.json"], "goes with plot and csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_wrong_invocations(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tokens, wanted = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not rows")
    (tmp_path / "none.json").write_text("[]")
    assert command.main(tokens) == 2
    shown = capsys.readouterr()
    assert wanted in shown.err and not shown.out
    assert len(shown.err.splitlines()) <= 3 and "Traceback" not in shown.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["none.json", "notes.txt"]


@pytest.mark.parametrize(("set_to", "seen"), [(None, "passive"), ("active", "active")])
def test_waiting_threads_are_told_not_to_spin_before_torch_loads(
    set_to: str | None, seen: str, tmp_path: Path
) -> None:
    code = (
        "import os, sys\n"
        "class Loading:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': sys.exit('waits: ' + os.environ.get('OMP_WAIT_POLICY', '-'))\n"
        "sys.meta_path.insert(0, Loading())\n"
        "from onepass.bench.command import main; sys.exit(main([]))"
    )
    inherited = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited
        | {"PYTHONPATH": str(ROOT / "python")}
        | ({"OMP_WAIT_POLICY": set_to} if set_to else {}),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, f"onepass bench: waits: {seen}\n")


@pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="no load average here")
@pytest.mark.parametrize("load", [1e3, 0.0])
def test_a_busy_machine_is_named(
    load: float,
    device: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    assert run_main(monkeypatch, device, toy(), "--output", str(tmp_path), "--json") == 0
    shown = capsys.readouterr()
    assert {row["load"] for row in json.loads(shown.out)["rows"]} == {load}
    assert ("onepass bench: load 1000 on " in shown.err) == (load > 100)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_no_gpu_is_said_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda", "--output", str(tmp_path / "new")]) == 2
    assert "torch sees no GPU" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_picture_without_matplotlib_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    output = ["--output", str(tmp_path), "--plot", str(tmp_path / "a.png")]
    assert command.main(output) == 1
    told = "onepass bench: a picture needs matplotlib: pip install 'onepass[bench]'\n"
    assert capsys.readouterr().err == told


def test_a_folder_with_a_file_of_something_else(
    device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = report.file_name(environment(device)["device"])
    (tmp_path / name).write_text("{}")
    assert command.main(["--device", device, "--output", str(tmp_path), "--quick"]) == 2
    assert "no list of benchmark rows" in capsys.readouterr().err
    assert (tmp_path / name).read_text() == "{}"


def test_listing_loads_no_torch() -> None:
    code = (
        "import sys; from onepass.bench import command, run, cases, report, plot, peers\n"
        "assert command.main(['--list']) == 0\n"
        "assert not {'torch', 'matplotlib', 'triton'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    for case in CASES:
        assert f"{case.name}: {case.what}" in done.stdout


# -- the script for a GPU machine -------------------------------------------------------------

STUB = """#!/usr/bin/env bash
# Stands for python: notes how it was called, and answers as each stage's command would.
echo "$*" >> "$STUB_LOG"
case "$*" in
    "-c import hypothesis" | "-c import pytest_timeout" | "-c import xdist") exit 1 ;;
    *"-m pytest"*) echo "1 failed"; exec sleep "${STUB_SLEEP:-0}"; ;;
    *"-m onepass.bench "*)
        echo "$TRITON_CACHE_DIR $PYTHONPATH ${TRITON_INTERPRET-unset}" >> "$STUB_LOG"
        mkdir -p "$TRITON_CACHE_DIR"
        echo "details"; echo "milliseconds, median"; echo "the table" ;;
esac
[ "$*" != "$STUB_FAILS" ]
"""


def on_gpu(tmp_path: Path, *arguments: str, **environment: str) -> tuple[int, str, str]:
    bash = shutil.which("bash")
    if bash is None or shutil.which("timeout") is None:
        pytest.skip("the script is for a Linux machine: no bash or no timeout here")
    stub = tmp_path / "python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    done = subprocess.run(
        [bash, str(ON_GPU), *arguments],
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHON": str(stub),
            "STUB_LOG": str(tmp_path / "calls"),
            "STUB_FAILS": "-",
            "TMPDIR": str(tmp_path),
            **environment,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def test_on_gpu_runs_every_stage_and_ends_with_the_table(tmp_path: Path) -> None:
    status, out, err = on_gpu(tmp_path, "results")
    calls = (tmp_path / "calls").read_text()
    assert status == 0, err
    assert out.endswith("milliseconds, median\nthe table\n") and "details" not in out
    assert "-m pytest -q" in calls and "-p no:cacheprovider" in calls
    assert "-o timeout=" in calls and "-n 6" not in calls  # plugins that the stub lacks
    assert re.search(r"-m onepass.bench --device cuda --output \S+/results --time-limit", calls)
    cache, path, interpreting = re.findall(r"^(/\S+) (\S+) (\w+)$", calls, re.M)[0]
    assert not Path(cache).exists() and not cache.startswith(str(tmp_path / "results"))
    assert path.split(":")[0] == str(ROOT / "python") and interpreting == "unset"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["calls", "python", "results"]
    assert len(list((tmp_path / "results").iterdir())) <= 6  # + PNG, JSON: eight


def test_on_gpu_goes_on_after_a_stage_that_does_not_end(tmp_path: Path) -> None:
    status, out, err = on_gpu(tmp_path, "results", STUB_SLEEP="30", TEST_SECONDS="1")
    assert status == 1
    assert re.search(r"^tests +out of time", out, re.M) and re.search(r"^bench +passed", out, re.M)
    assert out.endswith("the table\n")


def test_on_gpu_reports_a_failing_sanitizer(tmp_path: Path) -> None:
    status, out, err = on_gpu(tmp_path, "results", "--sanitize", PATH=f"{os.environ['PATH']}")
    if shutil.which("compute-sanitizer") is None:
        assert status == 1 and re.search(r"^sanitize +failed \(127\)", out, re.M)
    else:
        assert "sanitize" in out
    assert re.search(r"^bench +passed", out, re.M)
    assert len(list((tmp_path / "results").iterdir())) <= 6 + 1


@pytest.mark.parametrize("arguments", [(), ("--fast",), ("a", "b"), ("/proc/none/x",)])
def test_on_gpu_refuses_wrong_arguments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    status, out, err = on_gpu(tmp_path, *arguments)
    assert status == 2 and len(err.splitlines()) == 2 and not out
    assert not (tmp_path / "calls").exists(), "work began"


def test_on_gpu_is_a_sound_script() -> None:
    assert os.access(ON_GPU, os.X_OK)
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash here")
    assert subprocess.run([bash, "-n", str(ON_GPU)], timeout=20).returncode == 0
    text = ON_GPU.read_text(encoding="utf-8")
    assert text.splitlines()[0] == "#!/usr/bin/env bash" and "set -uo pipefail" in text
    names = set(re.findall(r'"\$out/([\w.]+)"', text))
    assert len(names) + 1 <= 8, f"{sorted(names)} and the rows: more than eight files"
    bare = [
        line
        for line in text.splitlines()
        if re.search(r'(?<!["\w])\$(out|root|cache|python)\b', line.split(" #")[0])
        and '"' not in line
    ]
    assert not bare, f"unquoted paths: {bare}"
    seconds = [int(n) for n in re.findall(r"sanitize \? \d+ : (\d+)", text)]
    assert len(seconds) == 2 and sum(seconds) <= 8 * 60 + 30
    if (shellcheck := shutil.which("shellcheck")) is not None:
        found = subprocess.run([shellcheck, str(ON_GPU)], capture_output=True, text=True)
        assert found.returncode == 0, found.stdout
