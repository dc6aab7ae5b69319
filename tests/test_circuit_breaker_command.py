"""`onepass train circuit-breaker`: what it refuses, what a run leaves, kill -9, two processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from onepass.cli import main
from support.tiny_language_model import HARMFUL, save

PYTHON = Path(__file__).resolve().parents[1] / "python"
RUN = ["-m", "onepass", "train", "circuit-breaker"]
QUICK = [
    *("--use_cpu", "--per_device_train_batch_size", "3", "--learning_rate", "5e-3"),
    *("--logging_steps", "2", "--save_steps", "2", "--max_steps", "8"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/, retain.jsonl and harmful.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


def given(files: Path) -> list[str]:
    sides = ("--retain", str(files / "retain.jsonl"), "--harmful", str(files / "harmful.jsonl"))
    return ["--model", str(files / "model"), *sides]


def start(arguments: list[str], *launcher: str, **more: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(PYTHON), "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **more}
    command = [sys.executable, *launcher, *RUN, *arguments]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- what is refused --------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


WRONG: list[tuple[str, Callable[[Path, Path], list[str]], str]] = [
    ("one side", lambda f, t: ["--retain", str(f / "retain.jsonl")], "--harmful: got nothing"),
    ("a model alone", lambda f, t: ["--model", str(f / "model")], "leave out --model"),
    ("no file", lambda f, t: [*given(f), "--harmful", str(t / "no.jsonl")], "no such file"),
    ("empty", lambda f, t: [*given(f), "--retain", write(t, "e.jsonl", "\n")], "holds no prompt"),
    (
        "malformed line",
        lambda f, t: [*given(f), "--harmful", write(t, "h.jsonl", '{"text": "a"}\n{oops\n')],
        "h.jsonl:2",
    ),
    (
        "no text in an entry",
        lambda f, t: [*given(f), "--harmful", write(t, "h.json", '[{"text": "a"}, {"id": 1}]')],
        "h.json: entry 2",
    ),
    (
        "unknown category",
        lambda f, t: [
            *given(f),
            *("--harmful", write(t, "c.json", '[{"prompt": "a", "category": "x"}]')),
            *("--category", "y"),
        ],
        "no prompt of category 'y', found x",
    ),
    ("ratio of 1", lambda f, t: [*given(f), "--validation_ratio", "1"], "below 1"),
    ("ratio below 0", lambda f, t: [*given(f), "--validation_ratio", "-0.1"], "below 1"),
    ("ratio that takes all", lambda f, t: [
        *given(f), "--validation_ratio", "0.5", "--retain", write(t, "one.txt", "one\n"),
    ], "leaves none to train on"),
    ("layers", lambda f, t: [*given(f), "--target_layers", "2;3"], "whole numbers"),
    ("alpha", lambda f, t: [*given(f), "--lorra_alpha", "0"], "above 0"),
    ("alpha word", lambda f, t: [*given(f), "--lorra_alpha", "much"], "wanted a number"),
    ("rank", lambda f, t: [*given(f), "--lora_r", "0"], "from 1 on"),
    ("dropout", lambda f, t: [*given(f), "--lora_dropout", "1"], "below 1"),
    ("jitter", lambda f, t: [*given(f), "--init_jitter", "nan"], "from 0 on"),
    ("examples", lambda f, t: [*given(f), "--num_examples", "0"], "from 1 on"),
    ("schedule", lambda f, t: [*given(f), "--coeff_schedule", "linear"], "linear_converge"),
    ("reference", lambda f, t: [*given(f), "--reference", "adapter_of"], "mean adapter_off"),
    ("loss type", lambda f, t: [*given(f), "--sc_loss_type", "l2"], "orig_act_dotprod"),
    ("misspelt flag", lambda f, t: [*given(f), "--targets_layers", "2"], "mean --target_layers"),
    ("wrong completion", lambda f, t: [
        *given(f), "--harmful", write(t, "w.jsonl", '{"prompt": "a", "completion": 5}\n'),
    ], "w.jsonl:1"),
    ("no refusals", lambda f, t: [*given(f), "--use_refusal_retain"], "no entry of"),
    ("evaluation", lambda f, t: [*given(f), "--eval_strategy", "steps"], "measured at the end"),
    ("two quantisations", lambda f, t: [*given(f), "--load_in_8bit", "--load_in_4bit"], "exclude"),
    ("fast with a model", lambda f, t: [*given(f), "--fast"], "leave it out with --model"),
    ("layers of the small model", lambda f, t: ["--target_layers", "9"], "from 0 to 4"),
    ("bias", lambda f, t: [*given(f), "--lora_bias", "all"], "none"),
    ("tracker", lambda f, t: [*given(f), "--report_to", "wandbb"], "did you mean wandb"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    out = tmp_path / "run"
    code = main(["train", "circuit-breaker", "--output_dir", str(out), *arguments(files, tmp_path)])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert message in said.err and len(said.err.splitlines()) <= 3, said.err
    assert not out.exists()


def test_what_only_the_model_tells_is_one_line_too(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(files / "model", damaged)
    weights = load_file(damaged / "model.safetensors")
    del weights["model.layers.1.self_attn.k_proj.weight"]
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "empty").mkdir()
    for flags, code, message in (
        (["--target_layers", "9"], 2, "from 0 to 4 (4 blocks"),
        (["--target_layers", "0"], 2, "from 0 to 4 (4 blocks"),
        (["--transform_layers", "0,7"], 2, "transform_layers must be from 0 to 3"),
        (["--target_layers", "2", "--transform_layers", "2"], 2, "lie above the target layers"),
        (["--lora_target_modules", "wq"], 2, "no wq in the blocks"),
        (["--lora_modules_to_save", "lm_head"], 2, "the output head"),
        (["--model", str(tmp_path / "none")], 2, "no such folder"),
        (["--model", str(tmp_path / "empty")], 2, "no config.json in"),
        (["--model", str(damaged)], 1, "has no weights for 1 parameters"),
    ):
        run = ["train", "circuit-breaker", *given(files), *QUICK, *flags]
        assert main([*run, "--output_dir", str(tmp_path / "run")]) == code, flags
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert "Traceback" not in said.err
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir()), flags


def test_a_start_that_fails_leaves_the_earlier_run(
    whole: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    run = ["train", "circuit-breaker", *given(files), *QUICK, "--output_dir", str(whole)]
    assert main([*run, "--overwrite", "--target_layers", "99"]) == 2
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before
    capsys.readouterr()


def test_a_finished_run_is_not_trained_on(whole: Path) -> None:
    before = adapter(whole), metrics(whole)
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(whole)]))
    assert code == 0 and "had come to its end at checkpoint-8" in err, err
    assert metrics(whole) == before[1]
    assert all(torch.equal(value, adapter(whole)[name]) for name, value in before[0].items())


def test_another_number_of_processes_is_refused(whole: Path) -> None:
    env = {"WORLD_SIZE": "2", "RANK": "0"}
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(whole)], **env))
    assert code == 2 and "2 processes, but the run was begun with 1" in err, err


def test_help_is_quick_and_short() -> None:
    begun = time.monotonic()
    code, out, _ = finish(start(["--help"]))
    assert code == 0 and time.monotonic() - begun < 5
    assert len(out.splitlines()) <= 60
    for name in ("--model_name_or_path", "--retain", "--harmful", "--target_layers", "--lora_r"):
        assert name in out


# -- what a run leaves ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(start([*given(files), *QUICK, "--output_dir", str(folder)]))
    assert code == 0, err
    assert "retain" in out and "harmful" in out and "cosine" in out
    assert "Traceback" not in err and "Warning" not in err, err
    return folder


def test_a_run_leaves_an_adapter_metrics_a_picture_and_a_summary(whole: Path, files: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("adapter_model.safetensors", "adapter_config.json", "lorra_config.json", "README.md"),
        *(
            "metrics.jsonl",
            "curves.png",
            "summary.json",
            "run.json",
            "checkpoint-6",
            "checkpoint-8",
        ),
    }
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((whole / "lorra_config.json").read_text())["target_layers"] == "2,3"
    summary = json.loads((whole / "summary.json").read_text())
    assert set(summary["nats_per_token"]) == {"original", "trained"}
    assert summary["target_layers"] == [2, 3]
    assert [line["step"] for line in metrics(whole)] == [2, 4, 6, 8]
    assert "circuit_breaker/val_cosine" in metrics(whole)[0]
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "lorra_alpha" in card
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # PEFT's, of a name that transformers retired
        loaded = AutoPeftModelForCausalLM.from_pretrained(str(whole))
    with torch.no_grad():
        ids = torch.arange(4, 24)[None]
        on = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            assert not torch.equal(on, loaded(input_ids=ids).logits)


def test_a_second_run_into_the_folder_needs_overwrite(
    whole: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    code = main(["train", "circuit-breaker", *given(files), *QUICK, "--output_dir", str(whole)])
    assert code == 2 and "has an earlier run in it" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


@pytest.mark.parametrize("after", [2, 6])
def test_killed_and_resumed_it_ends_with_the_same_bits(
    whole: Path, files: Path, tmp_path: Path, after: int
) -> None:
    folder = tmp_path / "run"
    process = start([*given(files), *QUICK, "--output_dir", str(folder)])
    ends = time.monotonic() + 120
    while time.monotonic() < ends and process.poll() is None:
        if (folder / "metrics.jsonl").exists() and (folder / f"checkpoint-{after}").exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "adapter_model.safetensors").exists(), "it ended before the kill"
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(folder)]))
    assert code == 0, err
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(folder)[name]), name
    wanted = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(whole)]
    found = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(folder)]
    assert found == wanted


def test_two_processes_train_as_one_that_accumulates(files: Path, tmp_path: Path) -> None:
    """huggingface/trl#7245: gradients that nobody synchronised."""
    flags = [*given(files), *QUICK, "--lora_dropout", "0", "--validation_ratio", "0"]
    flags += ["--max_steps", "3", "--logging_steps", "1"]
    one = [*flags, "--gradient_accumulation_steps", "2", "--output_dir", str(tmp_path / "one")]
    two = [*flags, "--output_dir", str(tmp_path / "two")]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for process in (start(one), start(two, *launcher)):
        code, _, err = finish(process)
        assert code == 0, err
    for alone, together in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-3)
        for name in ("retain_loss", "cb_loss", "cb_cosine"):
            key = f"circuit_breaker/{name}"
            assert together[key] == pytest.approx(alone[key], rel=1e-3, abs=1e-5)


def test_precomputed_states_on_disk_train_as_those_made_on_the_fly(
    whole: Path, files: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    flags = [*given(files), *QUICK, "--reference", "precomputed", "--output_dir", str(folder)]
    code, _, err = finish(start(flags))
    assert code == 0, err
    for one, other in zip(metrics(whole), metrics(folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert len(list((folder / "reference").glob("*.safetensors"))) == len(HARMFUL) - 1


def test_a_config_file_gives_the_flags(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    names = [
        f"{name[2:]}: {value}"
        for name, value in zip(given(files)[::2], given(files)[1::2], strict=True)
    ]
    config = write(tmp_path, "run.yaml", "\n".join([
        *names, "use_cpu: true", "learning-rate: 1e-3", "max_steps: 2", "logging_steps: 1",
        "target_layers: 1,2", "per_device_train_batch_size: 2",
        f"output_dir: {folder}",
    ]))  # fmt: skip
    code, _, err = finish(start(["--config", config, "--lorra_alpha", "7"]))
    assert code == 0, err
    saved = json.loads((folder / "lorra_config.json").read_text())
    assert saved["target_layers"] == "1,2" and saved["lorra_alpha"] == 7.0
    first = metrics(folder)[0]
    assert first["circuit_breaker/retain_coeff"] + first[
        "circuit_breaker/cb_coeff"
    ] == pytest.approx(7)


def test_the_default_breaks_code_and_keeps_prose(tmp_path: Path) -> None:
    """No model and no data given: the small model, 150 steps, measured on held-out text."""
    folder = tmp_path / "run"
    code, out, err = finish(start(["--fast", "--output_dir", str(folder)]))
    assert code == 0, err
    summary = json.loads((folder / "summary.json").read_text())
    original, trained = summary["nats_per_token"]["original"], summary["nats_per_token"]["trained"]
    assert summary["cosine"]["harmful"] < 0.3 and summary["cosine"]["retain"] > 0.95
    assert trained["retain"] < 1.05 * original["retain"]
    assert trained["harmful"] > original["harmful"] + 2.0
    last = metrics(folder)[-1]
    assert last["step"] == 150 and last["circuit_breaker/val_cosine"] < 0.3
    assert "retain" in out and "harmful" in out


def test_epochs_that_are_typed_win_over_the_default_of_steps(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = [*given(files), *QUICK[:-2], "--num_train_epochs", "1", "--output_dir", str(folder)]
    code, _, err = finish(start(flags))
    assert code == 0, err
    assert metrics(folder)[-1]["step"] == 2  # five examples, three a step
    assert "hardly turned" in err  # and so little training is no circuit breaker


def test_logs_and_checkpoints_may_be_had_more_often_on_resumption(
    files: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    rare = [*QUICK[:-6], "--logging_steps", "4", "--save_steps", "4", "--max_steps", "8"]
    process = start([*given(files), *rare, "--output_dir", str(folder)])
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not (folder / "checkpoint-4" / "trainer_state.json").exists():
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    often = ["--logging_steps", "1", "--resume_from_checkpoint", "--output_dir", str(folder)]
    code, _, err = finish(start(often))
    assert code == 0, err
    assert [line["step"] for line in metrics(folder)] == [4, 5, 6, 7, 8]
