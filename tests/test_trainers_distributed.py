"""The trainers under DDP and FSDP2 on two gloo processes: the curves and weights of one process.

What the processes do stands in support/trainers_on_two.py; they start once for all cases.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from support.processes import run_processes
from support.tiny_language_model import save

pytest.importorskip("transformers", reason="the trainers are transformers'")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")
pytest.importorskip("peft", reason="the adapters are PEFT's")

from support import trainers_on_two as two  # noqa: E402

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


COMPILED = {"TRITON_INTERPRET": "0"}  # torch's own code: Triton's interpreter takes minutes


@pytest.fixture(scope="module")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder for each training in one process: curve.json and saved/."""
    folder = tmp_path_factory.mktemp("truths")
    with mock.patch.dict(os.environ, COMPILED):
        run_processes(1, "trainers_on_two", folder, str(folder))
    return folder


@pytest.fixture(scope="module")
def answers(truths: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    folder = tmp_path_factory.mktemp("two_processes")
    with mock.patch.dict(os.environ, COMPILED):
        run_processes(2, "trainers_on_two", folder, str(truths), str(folder))
    return folder


@pytest.mark.parametrize("case", two.CASES)
def test_two_processes(case: str, answers: Path) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""


# -- launched ---------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--use_cpu", "--per_device_train_batch_size", "1", "--learning_rate", "5e-3"),
    *("--logging_steps", "1", "--save_steps", "2", "--max_steps", "4", "--validation_ratio", "0"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, and what the trainings of support/trainers_on_two.py read."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, n_layers=2)
    for name, rows in (
        ("pairs", two.pairs()),
        ("retain", [{"text": text} for text in two.TEXTS]),
        ("harmful", [{"text": text} for text in two.CODE]),
    ):
        lines = [json.dumps(row) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def command(system: str, files: Path, folder: Path, *more: str) -> list[str]:
    texts = ("--retain", str(files / "retain.jsonl"), "--harmful", str(files / "harmful.jsonl"))
    given: tuple[str, ...] = {
        "dpo": ("--data", str(files / "pairs.jsonl")),
        "circuit-breaker": (*texts, "--lora_dropout", "0", "--model_max_length", "32"),
    }[system]
    model = ("--model", str(files / "model"))
    return ["train", system, *model, *given, *QUICK, "--output_dir", str(folder), *more]


def launch(engine: str, arguments: list[str], **env: str) -> tuple[int, str, str, float]:
    """The exit code, what was said, and the seconds it took, of two processes that a file of
    examples/ is for, but on CPUs."""
    config = ROOT / "examples" / "accelerate" / f"{engine}.yaml"
    start = ("-m", "accelerate.commands.launch", "--config_file", str(config))
    ours = ("--num_processes", "2", "--main_process_port", "0", "-m", "support.launched")
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")])
    env = os.environ | COMPILED | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | env
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, *start, *ours, *arguments],
        env=env, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr, time.monotonic() - began


def metrics(folder: Path) -> dict[str, object]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {"lines": [json.loads(line) for line in lines]}


def told(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("onepass train")]


def lost(system: str) -> str:
    return f"onepass train {system}: rank 1 of 2 ended or hangs (what was said stands above)"


@pytest.mark.parametrize(("engine", "system"), [("ddp", "circuit-breaker"), ("fsdp2", "dpo")])
def test_a_killed_process_ends_the_other_and_the_run_goes_on(
    engine: str, system: str, files: Path, tmp_path: Path
) -> None:
    """Killed in the third step; the whole run of one process has the same curve."""
    if engine == "ddp" and not two.LOADS_ON_CPU:
        pytest.skip("this transformers loads no optimizer on CPUs of several processes")
    whole, folder = tmp_path / "whole", tmp_path / "run"
    accumulates = "--gradient_accumulation_steps"
    alone = [sys.executable, "-m", "onepass", *command(system, files, whole, accumulates, "4")]
    path = {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    subprocess.run(alone, env=os.environ | COMPILED | path, check=True, timeout=200)
    flags = command(system, files, folder, accumulates, "2")
    code, _, err, seconds = launch(engine, flags, DIES="1,2")
    assert code == 1 and seconds < 120, err
    last = f"{folder / 'checkpoint-2'} is the last checkpoint"
    go_on = f"onepass train {system} --output_dir {folder} --resume_from_checkpoint"
    assert told(err) == [f"{lost(system)}; {last}; go on, under the same launcher, with: {go_on}"]
    resumed = ["train", system, "--output_dir", str(folder), "--resume_from_checkpoint"]
    code, _, err, _ = launch(engine, resumed)
    assert code == 0, err
    two.check(metrics(folder), metrics(whole))
    made = "adapter/adapter_model.safetensors" if system == "dpo" else "adapter_model.safetensors"
    found, wanted = load_file(folder / made), load_file(whole / made)
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-4, msg=key)


def test_a_process_that_hangs_ends_the_other_in_time(files: Path, tmp_path: Path) -> None:
    more = ("--ddp_timeout", "5", "--gradient_accumulation_steps", "2")
    flags = command("dpo", files, tmp_path / "run", *more)
    code, _, err, seconds = launch("ddp", flags, HANGS="1,0")
    assert code == 1 and seconds < 120, err
    assert told(err) == [f"{lost('dpo')}; no checkpoint yet"]


def test_example_of_zero3_is_accelerates() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    read = load_config_from_file(str(ROOT / "examples" / "accelerate" / "zero3.yaml"))
    assert read.distributed_type == "DEEPSPEED" and read.deepspeed_config["zero_stage"] == 3
