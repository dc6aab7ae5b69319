"""The demo: what it leaves and says, its numbers, Ctrl-C and resuming, and what it refuses.

One run of `onepass demo --fast` as users start it, without a network; the rest on a model so small
that a whole run takes a second.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import io
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import onepass
from onepass import cli, demo
from onepass.cli import folder as cli_folder
from onepass.demo import checkpoint, corpus, settings

ROOT = Path(__file__).resolve().parents[1]
MISSING = [name for name in demo.NEEDED if importlib.util.find_spec(name) is None]
needs_extras = pytest.mark.skipif(
    bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install 'onepass[train,viz]'"
)
KINDS = ("code", "prose")
NUMBERS = {"nats_per_token", "nats_per_byte", "cosine_target_layers", "cosine_all_layers"}
TINY = dataclasses.replace(
    settings.FAST,
    vocab_size=300,
    window=24,
    text_chars=40_000,
    hidden_size=16,
    n_heads=2,
    n_layers=3,
    rows_of_each_kind=2,
    lm_steps=7,
    cb_steps=6,
    lora_rank=2,
    curve_points=3,  # every 3 steps, every 2 steps
    curve_rows=8,
    table_rows=8,
)
NO_NETWORK = """
import socket
def refuse(*args, **kwargs):
    raise AssertionError("the demo opened a connection")
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def child_environment(**extra: str) -> dict[str, str]:
    """As a user's shell would have it: nothing of conftest.py's, no terminal settings."""
    dropped = ("TRITON_INTERPRET", "COLUMNS", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_PROGRESS_BARS")
    inherited = {k: v for k, v in os.environ.items() if k not in dropped}
    return inherited | {"PYTHONPATH": str(ROOT / "python")} | extra


# --- the run that users see -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`onepass demo --fast` in a folder of its own, where every connection raises."""
    folder = tmp_path_factory.mktemp("fast")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NO_NETWORK)
    path = os.pathsep.join([str(folder / "site"), str(ROOT / "python")])
    started, before = time.perf_counter(), os.times()
    process = subprocess.run(
        [sys.executable, "-m", "onepass", "demo", "--fast"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env=child_environment(PYTHONPATH=path),
    )
    seconds, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system
    used -= before.children_user + before.children_system
    print(f"onepass demo --fast: {seconds:.1f} s, {used:.1f} s of processor time")
    assert process.returncode == 0, process.stderr
    output = folder / "onepass-demo"
    report = json.loads((output / "demo.json").read_text(encoding="utf-8"))
    return SimpleNamespace(
        folder=folder,
        output=output,
        stdout=process.stdout,
        stderr=process.stderr,
        # On a busy machine the clock on the wall measures the neighbours.
        seconds=min(seconds, used or seconds),  # Windows counts no children
        report=report,
    )


@needs_extras
def test_fast_run_breaks_code_and_keeps_prose(fast: SimpleNamespace) -> None:
    before, after = fast.report["before"], fast.report["after"]
    change = {k: after[k]["nats_per_token"] - before[k]["nats_per_token"] for k in KINDS}
    assert change["code"] > 2 and abs(change["prose"]) < 0.15, change
    assert after["code"]["cosine_target_layers"] < 0.5
    assert after["prose"]["cosine_target_layers"] > 0.9
    assert before["code"]["cosine_all_layers"] == before["prose"]["cosine_all_layers"] == 1
    # It had learnt something to break: log(1024) = 6.93 is what it knew at the start.
    start = fast.report["curve"][0]
    for kind in KINDS:
        assert start[kind]["nats_per_token"] == pytest.approx(math.log(1024), abs=0.2)
        assert before[kind]["nats_per_token"] < 5.2


@needs_extras
def test_fast_run_is_fast(fast: SimpleNamespace) -> None:
    """Imports included; on CPUs the demo keeps to one thread, so its clocks agree when idle."""
    assert fast.seconds < 40, f"{fast.seconds:.1f} s"


@needs_extras
def test_fast_run_prints_table_and_verdict_on_stdout(fast: SimpleNamespace) -> None:
    lines = fast.stdout.splitlines()
    assert re.split(r"\s{2,}", lines[1].strip()) == ["text", "before", "after", "change"]
    table = [re.split(r"\s{2,}", line) for line in lines[3:11]]
    assert [(row[0], row[1]) for row in table][::4] == [
        ("code", "nats per token"),
        ("prose", "nats per token"),
    ]
    for row in (table[0], table[4]):
        kind = row[0]
        before, after, change = map(float, row[2:])
        assert before == pytest.approx(fast.report["before"][kind]["nats_per_token"], abs=6e-4)
        assert after == pytest.approx(fast.report["after"][kind]["nats_per_token"], abs=6e-4)
        assert change == pytest.approx(after - before, abs=2e-3)
    assert lines[11:] == [
        fast.report["verdict"],
        "no step kept its logits, 1,024 x 1,024 of them (lazy_head)",
    ]
    assert lines[11].startswith("code is broken (+") and "prose is kept (" in lines[11]


@needs_extras
def test_fast_run_is_quiet_without_a_terminal(fast: SimpleNamespace) -> None:
    assert "\r" not in fast.stderr and "%|" not in fast.stderr and "it/s" not in fast.stderr
    assert "warn" not in fast.stderr.lower()
    said = [line.split(":")[0] for line in fast.stderr.splitlines()]
    told = ["code", "prose", "head", "language model", "circuit breaker"]
    assert said[1:6] == told and len(said) == 7
    assert fast.stderr.splitlines()[3] == "head: lm_head: fused, weight [1024, 96] float32"


@needs_extras
def test_fast_run_writes_its_folder_and_nothing_else(fast: SimpleNamespace) -> None:
    n_steps = settings.FAST.n_steps
    assert {p.name for p in fast.folder.iterdir()} == {"site", "onepass-demo"}
    assert {p.name for p in fast.output.iterdir()} == {
        f"checkpoint-{n_steps}",
        "demo.json",
        "curves.png",
    }
    pickles = [p for p in fast.output.rglob("*") if p.suffix in {".pt", ".pth", ".bin", ".pkl"}]
    assert not pickles


@needs_extras
def test_fast_run_reports_numbers_settings_and_versions(fast: SimpleNamespace) -> None:
    report = fast.report
    for when in ("before", "after"):
        assert {kind: set(report[when][kind]) for kind in KINDS} == dict.fromkeys(KINDS, NUMBERS)
    steps = settings.FAST.n_steps
    assert [entry["step"] for entry in report["steps"]] == list(range(1, steps + 1))
    assert all(math.isfinite(v) for entry in report["steps"] for v in entry.values())
    points = [point["step"] for point in report["curve"]]
    assert points[0] == 0 and settings.FAST.lm_steps in points and points[-1] == steps
    assert points == sorted(set(points))
    assert report["settings"] == json.loads(json.dumps(dataclasses.asdict(settings.FAST)))
    assert report["curve_windows"] == settings.FAST.curve_rows
    assert report["seed"] == 0 and report["device"] in ("cpu", "cuda")
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["seconds"]) == {"text", "language model", "circuit breaker"}
    for kind in KINDS:
        assert report["text"][kind]["held_out_tokens"] > 1000
        assert 0 < report["text"][kind]["padded_share"] < 0.2


@needs_extras
def test_fast_run_draws_a_picture(fast: SimpleNamespace) -> None:
    import numpy as np
    from matplotlib.image import imread

    assert (fast.output / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(fast.output / "curves.png")[..., :3]
    height, width = pixels.shape[:2]
    assert width >= 1000 and height >= 400
    for colour in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):  # a curve of each in either panel
        drawn = np.all(np.abs(pixels * 255 - colour) < 8, axis=-1)
        assert drawn[:, : width // 2].sum() > 100 and drawn[:, width // 2 :].sum() > 100


@needs_extras
def test_checkpoint_loads_with_plain_transformers_and_peft(fast: SimpleNamespace) -> None:
    """The artefacts need nothing of this package, and they are what the report speaks of."""
    from onepass.cli.terminal import quiet_libraries
    from onepass.demo import tokens

    folder = fast.output / f"checkpoint-{settings.FAST.n_steps}"
    with quiet_libraries():
        from peft import PeftModel
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        model = AutoModelForCausalLM.from_pretrained(folder)
        rows = {
            kind: tokens.rows_of(tokenizer, documents, settings.FAST.window)
            for kind, documents in held_out_documents().items()
        }
        nats: dict[tuple[str, str], float] = {}
        for when in ("before", "after"):
            if when == "after":
                model = PeftModel.from_pretrained(model, str(folder / "adapter"))
            for kind, r in rows.items():
                part = r.pick(slice(settings.FAST.table_rows))
                with torch.no_grad():
                    logits = model(input_ids=part.ids).logits
                nats[when, kind] = torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), part.labels.flatten()
                ).item()
    tolerance = 1e-4 if fast.report["device"] == "cpu" else 0.05  # bf16 on a GPU
    for (when, kind), value in nats.items():
        assert value == pytest.approx(fast.report[when][kind]["nats_per_token"], rel=tolerance)


def held_out_documents() -> dict[str, list[str]]:
    """The text that the table of the fast run is about, seed 0."""
    shuffle = random.Random(0)
    code = corpus.code_documents(shuffle, settings.FAST.text_chars)
    share = settings.FAST.held_out_share
    return {
        "code": corpus.split(code, shuffle, share).held_out,
        "prose": corpus.split(corpus.prose_documents(10**9), shuffle, share).held_out,
    }


# --- Ctrl-C and --resume --------------------------------------------------------------------------


@needs_extras
def test_ctrl_c_leaves_one_line_and_a_checkpoint(tmp_path: Path) -> None:
    # A runner in the background may ignore SIGINT and hand that down; a terminal does not.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from onepass.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "demo", "--fast", "--output", str(tmp_path)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=child_environment()
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if line.startswith("language model"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read().splitlines()
        assert process.stdout.read() == ""
    assert process.returncode == 130, rest
    assert len(rest) == 1, rest
    step = int(re.search(r"interrupted at step (\d+) of", rest[0])[1])  # type: ignore[index]
    assert rest[0] == (
        f"onepass demo: interrupted at step {step} of {settings.FAST.n_steps};"
        f" saved {tmp_path}/checkpoint-{step};"
        f" go on with: onepass demo --resume --output {tmp_path}"
    )
    assert [p.name for p in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    state = checkpoint.read_state(tmp_path / f"checkpoint-{step}")
    assert state.step == len(state.notes) == step and state.settings == settings.FAST

    from onepass.cli.terminal import quiet_libraries

    with quiet_libraries():
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"checkpoint-{step}")
    assert model(input_ids=torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@needs_extras
def test_ctrl_c_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "code_documents", interrupted)
    code, out, lines = tiny_run(tmp_path / "new")
    assert (code, out) == (130, "")
    told = "onepass demo: interrupted before the first checkpoint; nothing to go on from"
    assert lines == ["loading the libraries and the text", told]
    assert not (tmp_path / "new").exists()


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """`--fast` stands for the tiny settings."""
    monkeypatch.setattr(settings, "FAST", TINY)


def tiny_run(output: Path, *flags: str) -> tuple[int, str, list[str]]:
    """`onepass demo --output OUTPUT FLAGS` on the CPU: exit code, stdout, lines of stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        patch.setattr(sys, "stderr", err)
        code = cli.main(["demo", "--device", "cpu", "--output", str(output), *flags])
    return code, out.getvalue(), err.getvalue().splitlines()


def weights(output: Path) -> dict[str, bytes]:
    """Every tensor file of the one checkpoint in `output`."""
    (folder,) = output.glob("checkpoint-*")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run from beginning to end."""
    output = tmp_path_factory.mktemp("unbroken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "FAST", TINY)
        code, _, lines = tiny_run(output, "--fast")
    assert code == 0, lines
    return output


class Killed(Exception):
    """Stands for kill -9: nothing catches it on the way."""


@needs_extras
@pytest.mark.parametrize(
    "how, at_step, left_at",
    [
        ("ctrl-c", 2, 3),  # between the checkpoints of the first stage
        ("ctrl-c", 6, 7),  # at its last step
        ("ctrl-c", 9, 10),  # in the second
        ("kill", 5, 3),  # what the last checkpoint had not seen is done again
        ("kill", 10, 9),
    ],
)
@pytest.mark.usefixtures("tiny")
def test_resumed_run_equals_unbroken_run(
    how: str, at_step: int, left_at: int, unbroken: Path, tmp_path: Path, capsys: Any
) -> None:
    from onepass.demo import stages

    real = stages.batch

    def batch(rows: Any, sizes: Any, seed: int, step: int) -> Any:
        if step == at_step:
            if how == "kill":
                raise Killed
            signal.raise_signal(signal.SIGINT)
        return real(rows, sizes, seed, step)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "batch", batch)
        code, _, lines = tiny_run(tmp_path, "--fast")
    assert code == (130 if how == "ctrl-c" else 1), lines
    assert signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in tmp_path.iterdir()] == [f"checkpoint-{left_at}"]

    code, out, lines = tiny_run(tmp_path, "--resume")
    assert code == 0, lines
    assert weights(tmp_path) == weights(unbroken)
    resumed, whole = (json.loads((p / "demo.json").read_text()) for p in (tmp_path, unbroken))
    for same in ("before", "after", "curve", "steps", "settings", "text", "seed"):
        assert resumed[same] == whole[same], same
    assert out.splitlines()[-2] == whole["verdict"]


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_resuming_a_finished_run_reports_again(unbroken: Path, tmp_path: Path) -> None:
    (source,) = unbroken.glob("checkpoint-*")
    copy_tree(source, tmp_path / source.name)
    code, out, lines = tiny_run(tmp_path, "--resume", "--fast", "--seed", "0")
    assert code == 0 and not any("steps" in line for line in lines), lines
    again, whole = (json.loads((p / "demo.json").read_text()) for p in (tmp_path, unbroken))
    assert again["after"] == whole["after"]


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_run_again_overwrites_its_own_files_only(unbroken: Path, tmp_path: Path) -> None:
    (source,) = unbroken.glob("checkpoint-*")
    copy_tree(source, tmp_path / "checkpoint-99")  # of a longer run of ours
    foreign = {
        "notes.txt": "mine",
        "checkpoint-best/weights.txt": "mine",
        "checkpoints/checkpoint-7/state.json": '{"program": "another"}',
    }
    for name, text in foreign.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "curves.png").write_text("old")
    (tmp_path / f"{checkpoint.PARTIAL}xyz").mkdir()  # a killed run left it
    code, _, lines = tiny_run(tmp_path, "--fast")
    assert code == 0, lines
    assert {name: (tmp_path / name).read_text() for name in foreign} == foreign
    assert {p.name for p in tmp_path.iterdir()} == {
        *(name.partition("/")[0] for name in foreign),
        f"checkpoint-{TINY.n_steps}",
        "demo.json",
        "curves.png",
    }
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(rf"replacing the run of \d{{4}}-\S+ \d\d:\d\d in {tmp_path}", lines[0])


@needs_extras
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("dies_at", ["text", "step"])
def test_run_that_dies_leaves_no_results_of_the_one_before(
    dies_at: str, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onepass.demo import stages

    output = tmp_path / "demo"
    copy_tree(unbroken, output)
    before = {p.name for p in output.iterdir()}

    def killed(*_: object) -> None:
        raise Killed

    if dies_at == "text":
        monkeypatch.setattr(corpus, "code_documents", killed)
    else:
        monkeypatch.setattr(stages, "coefficients", killed)  # in the second stage
    code, _, lines = tiny_run(output, "--fast")
    assert code == 1 and "Killed" in lines[-2]
    assert lines[0].startswith("replacing the run of ") and lines[0].endswith(f" in {output}")
    # What has not begun takes nothing away.
    left = before if dies_at == "text" else {f"checkpoint-{TINY.lm_steps}"}
    assert {p.name for p in output.iterdir()} == left


def test_newest_checkpoint_is_the_one(tmp_path: Path) -> None:
    """Not the furthest: that may be what an older, longer run left."""
    for step, written in ((480, 1_000), (40, 3_000), (60, 2_000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        path = tmp_path / f"checkpoint-{step}" / checkpoint.STATE
        path.write_text(json.dumps({"program": checkpoint.PROGRAM}))
        os.utime(path, (written, written))
    assert checkpoint.find(tmp_path) == tmp_path / "checkpoint-40"


def copy_tree(source: Path, target: Path) -> None:
    import shutil

    shutil.copytree(source, target)


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_run_leaves_the_process_as_it_was(tmp_path: Path) -> None:
    """Random state, threads, warning filters, handlers; transformers' verbosity and bars."""
    from onepass.cli.terminal import quiet_libraries

    with quiet_libraries():
        from transformers.utils import logging
    logging.set_verbosity_info()
    logging.enable_progress_bar()
    random_state, python_state = torch.get_rng_state(), random.getstate()
    threads, filters = torch.get_num_threads(), list(warnings.filters)
    handler = signal.getsignal(signal.SIGINT)
    try:
        code, _, lines = tiny_run(tmp_path, "--fast")
        assert code == 0 and not any("warn" in line.lower() for line in lines), lines
        assert logging.get_verbosity() == logging.INFO and logging.is_progress_bar_enabled()
    finally:
        logging.set_verbosity_warning()
    assert torch.equal(torch.get_rng_state(), random_state) and random.getstate() == python_state
    assert (torch.get_num_threads(), list(warnings.filters)) == (threads, filters)
    assert signal.getsignal(signal.SIGINT) is handler


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_seed_decides_and_other_seeds_differ(unbroken: Path, tmp_path: Path) -> None:
    for name, seed in (("same", "0"), ("other", "1")):
        code, _, lines = tiny_run(tmp_path / name, "--fast", "--seed", seed)
        assert code == 0, lines
    assert weights(tmp_path / "same") == weights(unbroken)
    assert weights(tmp_path / "other") != weights(unbroken)


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_disk_full_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = json.dumps

    def dumps(value: Any, **options: Any) -> str:
        if isinstance(value, dict) and value.get("step", 0) > 3:
            raise OSError(28, "No space left on device")
        return real(value, **options)

    monkeypatch.setattr(checkpoint.json, "dumps", dumps)
    code, out, lines = tiny_run(tmp_path, "--fast")
    assert (code, out) == (1, "") and "No space left on device" in lines[-2]
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


# --- what it refuses ------------------------------------------------------------------------------


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test where a refusal comes after the text was read."""
    for name in ("prose_documents", "code_documents"):
        monkeypatch.setattr(corpus, name, lambda *_: pytest.fail("work had begun"))
    yield


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("name", demo.NEEDED)
def test_missing_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for needed in demo.NEEDED:
        found = None if needed == name else SimpleNamespace(__spec__=object())
        monkeypatch.setitem(sys.modules, needed, found)
    code, out, lines = tiny_run(tmp_path / "new")
    assert (code, out) == (1, "")
    assert lines == [
        f'onepass demo: needs {name}, not installed here: pip install "onepass[train,viz]"'
    ]
    assert not (tmp_path / "new").exists()


@pytest.mark.usefixtures("no_work")
@needs_extras
@pytest.mark.parametrize("below", ["", "deeper"])
def test_output_is_a_file(below: str, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    code, out, lines = tiny_run(taken / below)
    assert (code, out) == (2, "")
    assert lines == [
        f"onepass demo: --output: '{taken}' is a file, not a folder",
        "  name a folder of yours with --output DIR",
    ]
    assert taken.read_text() == "mine"


@pytest.mark.usefixtures("no_work")
@needs_extras
def test_output_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The refusal is simulated: root, as whom containers run tests, may write anywhere."""

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path))

    monkeypatch.setattr(cli_folder.tempfile, "TemporaryFile", refuse)
    code, out, lines = tiny_run(tmp_path / "new")
    assert (code, out, len(lines)) == (2, "", 2)
    assert lines[0].endswith(f"--output: cannot write to '{tmp_path / 'new'}': Permission denied")


@pytest.mark.usefixtures("no_work")
@needs_extras
@pytest.mark.parametrize("state", [None, "{", "[1]", '{"program": "another"}'])
def test_output_holds_checkpoints_of_another_program(state: str | None, tmp_path: Path) -> None:
    """A Trainer's folder, say; checkpoint-500 must not be replaced when step 500 comes."""
    folder = tmp_path / "checkpoint-500"
    folder.mkdir()
    if state is not None:
        (folder / checkpoint.STATE).write_text(state)
    code, out, lines = tiny_run(tmp_path)
    assert (code, out) == (2, "")
    assert lines == [
        f"onepass demo: --output: '{folder}' was made by another program",
        "  name another folder with --output DIR",
    ]
    assert checkpoint.find(tmp_path) is None and list(tmp_path.iterdir()) == [folder]


@pytest.mark.usefixtures("no_work", "tiny")
@needs_extras
@pytest.mark.parametrize("text", ["", "[1]", '{"program": "another"}'])
@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=" ".join)
def test_output_holds_a_report_of_another_program(
    text: str, flags: list[str], unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "demo"
    copy_tree(unbroken, output)
    (output / "demo.json").write_text(text)
    before = {p.name for p in output.iterdir()}
    code, out, lines = tiny_run(output, *flags)
    assert (code, out) == (2, "") and "--output" in lines[1]
    assert lines[0].endswith(f"'{output / 'demo.json'}' was made by another program")
    assert {p.name for p in output.iterdir()} == before
    assert (output / "demo.json").read_text() == text


@pytest.mark.usefixtures("no_work", "tiny")
@needs_extras
@pytest.mark.parametrize(
    "flags, told",
    [
        (["--resume"], ["--resume: no checkpoint in", "leave out --resume"]),
        (["--seed", "-1"], ["--seed: got '-1', wanted a whole number from 0"]),
        (["--seed", "1e3"], ["--seed: got '1e3', wanted a whole number"]),
        (["--seed", "99999999999"], ["--seed: got '99999999999', wanted a whole number"]),
        (["--seed"], ["--seed: got nothing"]),
        (["--output", ""], ["--output: got an empty name, wanted a folder"]),
        (["--device", "tpu"], ["--device: unknown value 'tpu'", "auto, cpu, cuda"]),
        (["--device", "cuda"], ["--device cuda: torch sees no GPU here", "--device cpu"]),
        (["--quick"], ["unknown option '--quick'"]),
        (["--fsat"], ["did you mean --fast?"]),
        (["--resum"], ["did you mean --resume?"]),
        (["now"], ["unexpected argument 'now'"]),
        (["--fast=yes"], ["--fast: takes no value, got 'yes'"]),
    ],
)
def test_wrong_invocation(
    flags: list[str], told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, out, lines = tiny_run(tmp_path / "new", *flags)
    assert (code, out) == (2, "") and len(lines) <= 3, lines
    for words in told:
        assert words in "\n".join(lines)
    assert not list(tmp_path.iterdir())


@needs_extras
@pytest.mark.usefixtures("no_work", "tiny")
def test_resume_with_other_flags(unbroken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, lines = tiny_run(unbroken, "--resume", "--seed", "5")
    assert code == 2 and f"--seed: got '5', but {unbroken}" in lines[0] and len(lines) <= 3
    monkeypatch.setattr(settings, "FAST", dataclasses.replace(TINY, hidden_size=32))
    code, _, lines = tiny_run(unbroken, "--resume", "--fast")
    assert code == 2 and "was made without it" in lines[0] and len(lines) <= 3


@needs_extras
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize(
    "change, told",
    [
        ({"schema": 0}, "was written by another version of onepass"),
        ({"settings": {"vocab_size": 3}}, "was made with other settings"),
        ({"text": "0123456789abcdef"}, "was trained on the text of another Python"),
    ],
)
def test_checkpoint_that_cannot_be_resumed(
    change: dict[str, Any], told: str, unbroken: Path, tmp_path: Path
) -> None:
    (source,) = unbroken.glob("checkpoint-*")
    copy_tree(source, tmp_path / source.name)
    path = tmp_path / source.name / checkpoint.STATE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    code, out, lines = tiny_run(tmp_path, "--resume")
    assert (code, out) == (1, "")
    assert told in lines[-1] and lines[-1].endswith("; leave out --resume to begin again")


@needs_extras
@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("keep", [0, 40])
@pytest.mark.parametrize(
    "name",
    [
        "state.json",
        "model.safetensors",
        "optimizer.safetensors",
        "adapter/adapter_model.safetensors",
    ],
)
def test_damaged_checkpoint_is_named(name: str, keep: int, unbroken: Path, tmp_path: Path) -> None:
    (source,) = unbroken.glob("checkpoint-*")
    copy_tree(source, tmp_path / source.name)
    path = tmp_path / source.name / name
    if name.startswith("optimizer"):  # read where a stage is half done
        state = json.loads((path.parent / "state.json").read_text())
        (path.parent / "state.json").write_text(json.dumps(state | {"step": TINY.n_steps - 1}))
    path.write_bytes(path.read_bytes()[:keep])
    code, out, lines = tiny_run(tmp_path, "--resume")
    assert (code, out) == (1, "")
    assert re.fullmatch(
        rf"onepass demo: {re.escape(str(path))} cannot be read: \w+: .+;"
        " leave out --resume to begin again",
        lines[-1],
    )
    if name == "state.json":  # and that works: the damaged one is known for ours
        code, _, lines = tiny_run(tmp_path, "--fast")
        assert code == 0, lines
        assert checkpoint.read_state(tmp_path / source.name).step == TINY.n_steps


def test_python_without_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(corpus.CorpusMissing, match="no pydoc_data.topics .* install"):
        corpus.prose_documents(10**9)
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(corpus.CorpusMissing, match="no Python source files"):
        corpus.code_documents(random.Random(0), 1000)


# --- its parts ------------------------------------------------------------------------------------


def test_prose_and_code_are_what_they_say() -> None:
    prose = corpus.prose_documents(10**9)
    assert sum(map(len, prose)) > 150_000
    paragraphs = [line for document in prose for line in document.splitlines()]
    assert len(set(paragraphs)) == len(paragraphs)
    assert not any(">>>" in p or "::=" in p or "====" in p for p in paragraphs)
    code = corpus.code_documents(random.Random(0), 200_000)
    assert 200_000 <= sum(map(len, code)) < 200_000 + corpus.CODE_FILE_CHARS
    assert not any(line.lstrip().startswith("#") for d in code for line in d.splitlines())
    some = corpus.prose_documents(20_000)
    assert some == prose[: len(some)] and sum(map(len, some[:-1])) < 20_000 <= sum(map(len, some))


def test_without_docstrings() -> None:
    source = (
        '"""Module."""\n# comment\nimport os  # kept\n\x0c\n\n'
        'def f(x):\n    """One\n    two."""\n    return "text"\n\n'
        "class A:\n    '''A.'''\n    b = '''not\n# a docstring'''\n"
    )
    assert corpus.without_docstrings(source) == (
        "import os  # kept\ndef f(x):\n    return \"text\"\nclass A:\n    b = '''not\n"
    )


def test_held_out_text_is_not_trained_on() -> None:
    shuffle = random.Random(3)
    for documents in (corpus.prose_documents(10**9), corpus.code_documents(shuffle, 300_000)):
        split = corpus.split(list(documents), shuffle, 0.1)
        assert sorted(split.train + split.held_out) == sorted(documents)
        assert not set(split.train) & set(split.held_out)
        share = sum(map(len, split.held_out)) / sum(map(len, documents))
        assert 0.07 < share <= 0.1
    assert corpus.split(["long", "short", "x"], shuffle, 0.1).held_out == ["x"]


@needs_extras
def test_rows_hold_the_text_and_its_successors() -> None:
    from onepass.demo import tokens

    documents = ["def f(x):\n    return x\n" * 5, "Zwölf Bücher – “quoted”.\n" * 3, "a\n", "b"]
    tokenizer = tokens.train_tokenizer(documents, 280)
    rows = tokens.rows_of(tokenizer, documents, 7)
    assert tokenizer.token_to_id(tokens.PADDING) == 0
    assert not rows.mask.all() and (rows.ids[~rows.mask] == 0).all()
    # Lossless: the windows' tokens decode to the documents, less those of a single token.
    text = tokenizer.decode(rows.ids[rows.mask].tolist())
    assert text == "".join(d for d in documents if len(tokenizer.encode(d).ids) > 1)
    n_labelled_bytes = 0
    for ids, mask, labels, n_bytes in zip(
        rows.ids, rows.mask, rows.labels, rows.n_bytes, strict=True
    ):
        n = int(mask.sum())
        assert n >= 2 and mask[:n].all()
        assert labels[: n - 1].tolist() == ids[1:n].tolist()
        assert (labels[n - 1 :] == tokens.IGNORED).all()
        n_labelled_bytes += int(n_bytes)
    # A label stands for its own bytes, and every token but a window's first is one.
    firsts = sum(len(tokenizer.decode([i]).encode()) for i in rows.ids[:, 0].tolist())
    assert n_labelled_bytes + firsts == len(text.encode())


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """A tiny model that knows nothing, with its adapter, and the tiny text."""
    from onepass.cli.terminal import quiet_libraries
    from onepass.demo import model, tokens

    with quiet_libraries():
        text = tokens.read_text(TINY, 0, torch.device("cpu"))
        base = model.language_model(TINY, text.tokenizer.get_vocab_size(), 0)
        original = {name: p.detach().clone() for name, p in base.state_dict().items()}
        adapted = model.with_adapter(base, TINY, 0)
    return SimpleNamespace(text=text, base=base, original=original, adapted=adapted)


@needs_extras
def test_batches_follow_from_seed_and_step(parts: SimpleNamespace) -> None:
    from onepass.demo import stages

    rows = parts.text.train
    first = stages.batch(rows, TINY, 0, 5)
    torch.rand(3)
    again = stages.batch(rows, TINY, 0, 5)
    assert torch.equal(first.ids, again.ids) and torch.equal(first.labels, again.labels)
    for seed, step in ((0, 6), (1, 5)):
        assert not torch.equal(first.ids, stages.batch(rows, TINY, seed, step).ids)
    n = TINY.rows_of_each_kind
    for half, kind in ((first.ids[:n], "code"), (first.ids[n:], "prose")):
        assert all((rows[kind].ids == row).all(-1).any() for row in half)


def test_coefficients_break_first_and_keep_last() -> None:
    from onepass.demo import stages

    pairs = [stages.coefficients(step, settings.FULL) for step in range(settings.FULL.cb_steps)]
    breaking, keeping = zip(*pairs, strict=True)
    alpha = settings.FULL.cb_coefficient
    assert all(b + k == pytest.approx(alpha) for b, k in pairs)
    assert list(breaking) == sorted(breaking, reverse=True) and breaking[-1] == 0
    assert keeping[0] == alpha / settings.FULL.cb_steps and keeping[-1] == alpha
    assert stages.coefficients(10**6, settings.FULL) == (0, alpha)


@needs_extras
def test_circuit_breaker_loss_is_its_formula(parts: SimpleNamespace) -> None:
    """Value against a transcription of the formula, token by token, padding left out."""
    from onepass.demo import model, stages

    rows, sizes = parts.text.train, dataclasses.replace(TINY, target_layers=(1, 2))
    stage = stages.circuit_breaker_stage(parts.adapted, rows, sizes, 0)
    step = next(s for s in range(99) if not stages.batch(rows, sizes, 0, 7 + s).mask.all())
    loss, _ = stage.loss(step)
    b = stages.batch(rows, sizes, 0, sizes.lm_steps + step)
    with torch.no_grad():
        after = [h.double() for h in model.hidden_states(parts.adapted, b.ids)]
        with model.original(parts.adapted):
            before = [h.double() for h in model.hidden_states(parts.adapted, b.ids)]
    n = sizes.rows_of_each_kind
    broken, kept = [], []
    for row in range(2 * n):
        for t in range(int(b.mask[row].sum())):
            pairs = [(f[row, t], o[row, t]) for f, o in zip(after, before, strict=True)]
            if row < n:
                for f, o in (pairs[1], pairs[2]):
                    broken.append(max(0.0, float(f @ o / (f.norm() * o.norm()))))
            else:
                kept += [float((f - o).norm() / o.norm()) for f, o in pairs[1:]]
    break_weight, keep_weight = stages.coefficients(step, sizes)
    expected = break_weight * sum(broken) / len(broken) + keep_weight * sum(kept) / len(kept)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@needs_extras
@pytest.mark.usefixtures("tiny")
def test_logits_are_lazy_in_every_step_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onepass.demo import evaluate, stages

    seen: dict[str, list[type]] = {"stages": [], "evaluate": []}

    def watched(name: str, real: Any) -> Any:
        def cross_entropy(logits: Any, *args: Any, **kwargs: Any) -> Any:
            seen[name].append(type(logits))
            with pytest.raises(onepass.MaterializedError):
                logits.exp()
            return real(logits, *args, **kwargs)

        return cross_entropy

    for name, module in (("stages", stages), ("evaluate", evaluate)):
        monkeypatch.setattr(module, "cross_entropy", watched(name, module.cross_entropy))
    code, _, lines = tiny_run(tmp_path, "--fast")
    assert code == 0, lines
    assert len(seen["stages"]) == TINY.lm_steps and len(seen["evaluate"]) > TINY.curve_points
    assert {kind for kinds in seen.values() for kind in kinds} == {onepass.LazyLogits}
    assert onepass.lazy_logits._strict.get() is False


@needs_extras
def test_padding_does_not_count(parts: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other ids where rows are padded: every loss and every evaluation stays to the bit."""
    from onepass.demo import evaluate, stages

    def measure() -> list[Any]:
        model_loss, _ = stages.language_model_stage(parts.base, rows, TINY, 0).loss(0)
        breaker_loss, _ = stages.circuit_breaker_stage(parts.adapted, rows, TINY, 0).loss(0)
        numbers = evaluate.of_adapted(parts.adapted, rows, TINY, 20)
        return [model_loss.item(), breaker_loss.item(), numbers]

    short = {k: r.pick((~r.mask).any(-1).nonzero()[:20, 0]) for k, r in parts.text.train.items()}
    rows = short
    as_padded = measure()
    rows = {k: dataclasses.replace(r, ids=r.ids.where(r.mask, 7)) for k, r in short.items()}
    assert all((rows[k].ids != short[k].ids).any() for k in KINDS)
    assert measure() == as_padded


@needs_extras
def test_jitter_leaves_the_point_without_gradient(parts: SimpleNamespace) -> None:
    """With lora_B = 0 the cosine is 1 and its gradient 0; the jitter is what lets it start."""
    from onepass.cli.terminal import quiet_libraries
    from onepass.demo import model, stages

    norms = {}
    for jitter in (0.0, TINY.lora_jitter):
        sizes = dataclasses.replace(TINY, lora_jitter=jitter)
        with quiet_libraries():
            base = model.language_model(sizes, parts.text.tokenizer.get_vocab_size(), 0)
            adapted = model.with_adapter(base, sizes, 0)
        stage = stages.circuit_breaker_stage(adapted, parts.text.train, sizes, 0)
        loss, noted = stage.loss(0)
        loss.backward()
        grads = [p.grad for p in stage.parameters if p.grad is not None]
        norms[jitter] = torch.stack([g.norm() for g in grads]).norm().item()
        assert noted["inner_product_code"] > 0.999
    assert norms[0.0] < 1e-5 < 1e-4 < norms[TINY.lora_jitter], norms


@needs_extras
def test_only_the_adapter_is_trained(parts: SimpleNamespace, unbroken: Path) -> None:
    from safetensors.torch import load_file

    from onepass.demo import stages

    stage = stages.circuit_breaker_stage(parts.adapted, parts.text.train, TINY, 0)
    trained = {id(p) for p in stage.parameters}
    names = [n for n, p in parts.adapted.named_parameters() if id(p) in trained]
    assert names and all("lora_" in name for name in names)
    # 7 projections in each block below the target layer, A and B
    assert len(names) == 7 * 2 * max(TINY.target_layers)
    loss, _ = stage.loss(1)
    loss.backward()
    now = parts.base.state_dict()
    for name, tensor in parts.original.items():
        assert torch.equal(tensor, now[_renamed(name, now)])
    # The tiny run's second stage left the first one's weights as they were.
    (folder,) = unbroken.glob("checkpoint-*")
    report = json.loads((unbroken / "demo.json").read_text())
    at_switch = next(p for p in report["curve"] if p["step"] == TINY.lm_steps)
    for kind in KINDS:
        assert report["before"][kind]["nats_per_token"] == at_switch[kind]["nats_per_token"]
    assert set(load_file(folder / "model.safetensors")) == set(parts.original)


def _renamed(name: str, state: dict[str, torch.Tensor]) -> str:
    """The name that peft gave a tensor of the model."""
    stem, _, leaf = name.rpartition(".")
    wrapped = f"{stem}.base_layer.{leaf}"
    return wrapped if wrapped in state else name


@needs_extras
@pytest.mark.parametrize(
    "terminal, variable, silent",
    [(True, None, False), (True, "1", True), (True, "0", False), (False, None, True)],
)
def test_progress_bar(
    terminal: bool, variable: str | None, silent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onepass.cli.terminal import progress_bar

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    if variable is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", variable)
    with progress_bar(10, 4) as bar:
        bar.update()
        bar.refresh()
    assert (stream.getvalue() == "") == silent
    assert silent or "5/10" in stream.getvalue()


@needs_extras
def test_verdict_says_what_came_out() -> None:
    from onepass.demo.report import verdict

    def numbers(code: float, prose: float) -> dict[str, dict[str, float]]:
        return {"code": {"nats_per_token": code}, "prose": {"nats_per_token": prose}}

    def told(code: float, prose: float) -> str:
        return verdict(numbers(4.0, 4.0), numbers(4.0 + code, 4.0 + prose))

    assert told(2.0, -0.1) == (
        "code is broken (+2.00 nats per token), prose is kept (-0.10 nats per token)"
    )
    assert "code is NOT broken (+0.90" in told(0.9, 0.0)
    assert "prose is NOT kept (-0.20" in told(2.0, -0.2)
    assert "code is NOT broken (-1.50" in told(-1.5, 0.0)
    nan = told(math.nan, math.nan)
    assert "code is NOT broken" in nan and "prose is NOT kept" in nan


@needs_extras
def test_picture_says_how_many_windows_are_behind_it(
    unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    from onepass.demo import report

    titles: list[str] = []

    def savefig(figure: Figure, path: Path, **_: Any) -> None:
        path.touch()
        titles.extend(axes.get_title() for axes in figure.axes)

    monkeypatch.setattr(Figure, "savefig", savefig)
    (folder,) = unbroken.glob("checkpoint-*")
    report.write_png(tmp_path / "curves.png", checkpoint.read_state(folder))
    assert len(titles) == 2 and all(title.endswith("(8 windows)") for title in titles)


@needs_extras
def test_table_breaks_no_word_in_forty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    from onepass.demo import report

    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", stream)
    for name, value in (("COLUMNS", "40"), ("TERM", "xterm"), ("NO_COLOR", "1")):
        monkeypatch.setenv(name, value)
    numbers = {kind: dict.fromkeys(report.LABELS, 10.0) for kind in KINDS}
    report.show(numbers, numbers)
    words = {word for label in report.LABELS.values() for word in label.split()}
    assert words | {"prose", "10.000", "+0.000"} <= set(stream.getvalue().split())


@needs_extras
def test_help_names_the_default_folder() -> None:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    assert f"./{demo.OUTPUT}" in parser.format_help()
    assert parser.parse_args([]).output == demo.OUTPUT


def test_runs_as_a_module() -> None:
    process = subprocess.run(
        [sys.executable, "-m", "onepass.demo", "--fsat"],
        capture_output=True,
        text=True,
        timeout=60,
        env=child_environment(),
    )
    assert process.returncode == 2 and "did you mean --fast?" in process.stderr


def run_example(name: str) -> tuple[list[str], str]:
    """Lines of stdout, and stderr."""
    process = subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "examples" / name)],
        capture_output=True,
        text=True,
        timeout=240,
        env=child_environment(OMP_NUM_THREADS="1"),
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.splitlines(), process.stderr


@needs_extras
def test_example_trains_the_same_with_lazy_head_in_less_memory() -> None:
    pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
    lines, _ = run_example("lazy_head_trainer.py")
    *steps, peak = lines[1 + next(i for i, line in enumerate(lines) if "lazy_head" in line) :]
    losses = [[float(value) for value in line.split()[1:]] for line in steps]
    assert len(losses) == 3
    for old, new in losses:
        assert new == pytest.approx(old, abs=2e-3)
    assert losses[0][0] > losses[-1][0]
    without, lazy = (int(n) for n in re.findall(r"(\d+) MB", peak))
    # Without, logits and their gradient stand side by side; with, one slab of at most 64 MB.
    assert without > 2 * 131 and lazy < 131 + 64


def test_example_trains_the_same_with_either_loss() -> None:
    (*table, last), stderr = run_example("train_tiny_lm.py")
    assert stderr == ""
    start, end = table[1].split(), table[-1].split()
    assert float(start[1]) > 5 > 3 > float(end[1])
    assert float(last.removeprefix("largest difference: ")) < 1e-4
