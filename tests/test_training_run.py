"""`onepass train` through a toy system: what a run leaves, kill -9, Ctrl-C, resumption.

The runs happen in forks of one process that has imported everything once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOY = ROOT / "tests" / "support" / "toy_system.py"
pytest.importorskip("transformers")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the toy server forks")

Toy = Callable[..., SimpleNamespace]
RESUME = "--resume_from_checkpoint"


def environment() -> dict[str, str]:
    dropped = ("TRITON_INTERPRET", "COLUMNS", "RANK", "WORLD_SIZE")
    inherited = {k: v for k, v in os.environ.items() if k not in dropped}
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return inherited | {"PYTHONPATH": path} | settings


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    command = [sys.executable, str(TOY), "--serve"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        yield process
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=30) == 0


@pytest.fixture
def toy(server: Any, tmp_path: Path) -> Toy:
    """Runs `onepass train toy --output_dir run ARGS` in an empty folder."""

    def run(*args: str, **env: str) -> SimpleNamespace:
        job = {"args": ["--output_dir", "run", *args], "env": env, "cwd": str(tmp_path)}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (tmp_path / name for name in ("out", "err"))
        return SimpleNamespace(code=code, out=out.read_text(), err=err.read_text())

    return run


def result(folder: Path) -> tuple[bytes, str]:
    return (folder / "model.safetensors").read_bytes(), (folder / "metrics.jsonl").read_text()


def test_a_run_leaves_what_it_promises(toy: Toy, tmp_path: Path) -> None:
    done = toy()
    assert done.code == 0 and done.err == "", done.err
    assert done.out.splitlines()[0] == "A line"
    folder = tmp_path / "run"
    assert sorted(p.name for p in folder.iterdir()) == [
        *("checkpoint-12", "curves.png", "metrics.jsonl", "model.safetensors"),
        *("run.json", "summary.json"),
    ]
    record = json.loads((folder / "run.json").read_text())
    assert (record["program"], record["system"]) == ("onepass train", "toy")
    assert record["flags"]["max_steps"] == 12 and record["data"] == {"points": "2.0"}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 3, 4, 6, 8, 9, 10, 12]
    assert {"step", "epoch", "loss", "learning_rate", "grad_norm"} == set(lines[0])
    assert json.loads((folder / "summary.json").read_text())["slope"] == 2.0
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


PLACES = [
    *("save_model", "write:5", "write:6", "write:7", "write:8", "_save_optimizer_and_scheduler"),
    *("_save_rng_state", "state", "rotate", "removal:1", "removal:2", "log:5"),
]


def test_killed_anywhere_in_a_save_and_resumed_it_is_the_unbroken_run(
    toy: Toy, tmp_path: Path
) -> None:
    assert toy().code == 0
    unbroken = result((tmp_path / "run").rename(tmp_path / "unbroken"))
    for place in PLACES:
        assert toy(TOY_DIE=place).code == 9, place
        found = sorted((tmp_path / "run").glob("checkpoint-*/trainer_state.json"))
        assert found, f"{place}: no checkpoint is left"
        done = toy(RESUME)
        assert done.code == 0, f"{place}: {done.err}"
        assert "going on from run/checkpoint-" in done.err, place
        assert len(done.err.splitlines()) <= 2, done.err
        assert result(tmp_path / "run") == unbroken, place
        assert len(list((tmp_path / "run").glob("*checkpoint*"))) == 1, place
        (tmp_path / "run").rename(tmp_path / place.replace(":", "-"))


def test_killed_before_the_first_checkpoint_it_begins_anew(toy: Toy, tmp_path: Path) -> None:
    assert toy(TOY_DIE="write:1").code == 9
    assert sorted((tmp_path / "run").glob("checkpoint-*"))
    done = toy(RESUME)
    assert done.code == 0
    assert done.err.splitlines() == [
        "removing run/checkpoint-3, half-written",
        "no checkpoint in run yet: beginning at step 0",
    ]


def test_killed_at_random_it_is_the_unbroken_run(toy: Toy, tmp_path: Path) -> None:
    assert toy().code == 0
    unbroken = result((tmp_path / "run").rename(tmp_path / "unbroken"))
    command = [sys.executable, str(TOY), "--output_dir", "run"]
    slow = environment() | {"TOY_SLOW": "0.05"}
    with subprocess.Popen(command, cwd=tmp_path, env=slow, stderr=subprocess.DEVNULL) as process:
        ends = time.monotonic() + 60
        while not (tmp_path / "run" / "checkpoint-6").exists() and time.monotonic() < ends:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    assert toy(RESUME).code == 0
    assert result(tmp_path / "run") == unbroken


def test_resuming_from_an_earlier_checkpoint_drops_the_later_ones(toy: Toy, tmp_path: Path) -> None:
    assert toy("--save_total_limit", "9").code == 0
    unbroken = result(tmp_path / "run")
    done = toy(f"{RESUME}=run/checkpoint-6", TOY_DIE="save_model:1")
    assert done.code == 9
    assert done.err.splitlines()[-1] == "going on from run/checkpoint-6"
    assert {p.name for p in (tmp_path / "run").glob("c*-*")} == {"checkpoint-3", "checkpoint-6"}
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4, 6, 8, 9]
    assert toy(RESUME).code == 0
    assert result(tmp_path / "run") == unbroken


def test_ctrl_c_saves_and_says_how_to_go_on(toy: Toy, tmp_path: Path) -> None:
    stopped = toy("--slope=3", TOY_STOP="5")
    assert (stopped.code, stopped.out) == (130, "")
    assert stopped.err == (
        "onepass train toy: interrupted at step 5 of 12; saved run/checkpoint-5; go on with:"
        " onepass train toy --output_dir run --resume_from_checkpoint\n"
    )
    assert toy(RESUME).code == 0  # with the slope of run.json
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run").rename(tmp_path / "stopped")
    assert toy("--slope=3").code == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights


def test_a_second_ctrl_c_does_not_wait(toy: Toy, tmp_path: Path) -> None:
    stopped = toy(TOY_STOP="5", TOY_TWICE="1")
    assert stopped.code == 130
    assert "interrupted; run/checkpoint-3 is the last checkpoint; go on with" in stopped.err
    assert len(stopped.err.splitlines()) == 1
    assert not (tmp_path / "run" / "checkpoint-5").exists()


def test_a_folder_in_use_is_left_alone(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("mine")
    for args in ([], ["--overwrite"], [RESUME]):
        done = toy(*args)
        assert done.code == 2 and 1 <= len(done.err.splitlines()) <= 3
        assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    (folder / "thesis.txt").unlink()
    assert toy().code == 0
    before = result(folder)
    for args in ([], ["--overwrite", RESUME]):
        done = toy(*args)
        assert done.code == 2 and result(folder) == before
    (folder / "notes.txt").write_text("mine")
    done = toy("--overwrite", "--max_steps", "4", "--seed", "1")
    assert done.code == 0 and done.err.startswith("replacing the run of 20")
    assert (folder / "notes.txt").read_text() == "mine"
    assert result(folder) != before and len(list(folder.glob("checkpoint-*"))) == 1


@pytest.mark.parametrize("flag", ["--max_steps=20", "--slope=3", "--adam_beta1=0.5", "--seed=7"])
def test_a_run_is_not_resumed_as_another(flag: str, toy: Toy, tmp_path: Path) -> None:
    assert toy(TOY_STOP="4").code == 130
    done = toy(RESUME, flag)
    assert done.code == 2
    first, hint = done.err.splitlines()
    assert flag.split("=")[0] in first and "was begun with" in first and "leave out" in hint
    assert toy(RESUME, "--save_steps", "4", "--logging_steps=1").code == 0


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    from onepass.training.monitor import drop_after, read_metrics

    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": null}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    drop_after(file, 2)
    assert file.read_text() == '{"step": 1, "loss": null}\n{"step": 2}\n'
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_two_processes_write_and_print_once(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2"]  # what accelerate starts, too
    command = [*launch, str(TOY), "--output_dir", "run", "--max_steps=4", "--use_cpu"]
    done = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("A line") == 1
    state = json.loads((tmp_path / "run" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["epoch"] == pytest.approx(0.8)  # of 40 points, 8 a step
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 3, 4]
