"""`onepass train jigsaw`: what it refuses, what a run leaves, kill -9, two processes."""

from __future__ import annotations

import json
import os
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
from safetensors.torch import load_file
from torch import Tensor

from onepass.cli import main
from support.processes import run_processes
from support.tiny_language_model import save

PYTHON = Path(__file__).resolve().parents[1] / "python"
RUN = ["-m", "onepass", "train", "jigsaw"]
QUICK = [
    *("--use_cpu", "--per_device_train_batch_size", "3", "--learning_rate", "5e-3"),
    *("--logging_steps", "2", "--save_steps", "2", "--max_steps", "8"),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and retain.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, n_layers=2)
    return folder


def given(files: Path) -> list[str]:
    return ["--model", str(files / "model"), "--data", str(files / "retain.jsonl")]


def start(arguments: list[str], *launcher: str) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": str(PYTHON), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
    command = [sys.executable, *launcher, *RUN, *arguments]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(folder: Path) -> dict[str, Tensor]:
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return adapter | load_file(folder / "sgt" / "model.safetensors")


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- what is refused --------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


WRONG: list[tuple[str, Callable[[Path, Path], list[str]], str]] = [
    ("a model alone", lambda f, t: ["--model", str(f / "model")], "leave out --model"),
    ("val alone", lambda f, t: ["--val", str(f / "retain.jsonl")], "wanted --data with it"),
    ("no file", lambda f, t: [*given(f), "--data", str(t / "no.jsonl")], "no such file"),
    ("empty", lambda f, t: [*given(f), "--val", write(t, "e.jsonl", "\n")], "holds no prompt"),
    (
        "malformed line",
        lambda f, t: [*given(f), "--data", write(t, "d.jsonl", '{"text": "a"}\n{oops\n')],
        "d.jsonl:2",
    ),
    (
        "no text in an entry",
        lambda f, t: [*given(f), "--data", write(t, "d.json", '[{"text": "a"}, {"id": 1}]')],
        "d.json: entry 2",
    ),
    ("ratio of 1", lambda f, t: [*given(f), "--validation_ratio", "1"], "below 1"),
    ("ratio that takes all", lambda f, t: [
        *given(f), "--validation_ratio", "0.5", "--data", write(t, "one.txt", "one\n"),
    ], "leaves none to train on"),
    ("samples", lambda f, t: [*given(f), "--max_eval_samples", "0"], "from 1 on"),
    ("weight", lambda f, t: [
        *given(f), "--absolute_cosine_similarity_penalty_weight", "nan",
    ], "wanted a finite number"),
    ("weight word", lambda f, t: [
        *given(f), "--jigsaw_ce_performance_loss_weight", "much",
    ], "wanted a number"),
    ("no performance", lambda f, t: [
        *given(f), "--jigsaw_ce_performance_loss_weight", "0",
    ], "nothing else makes the student work"),
    ("cap", lambda f, t: [*given(f), "--jigsaw_ce_protection_max_loss", "0"], "above 0"),
    ("scaling", lambda f, t: [
        *given(f), "--jigsaw_ce_protection_loss_scaling_factor", "-1",
    ], "above 0"),
    ("l2 without a layer", lambda f, t: [
        *given(f), "--jigsaw_l2_performance_loss_weight", "1",
    ], "wanted distillation_layer_index with it"),
    ("layer without l2", lambda f, t: [
        *given(f), "--distillation_layer_index", "1",
    ], "no l2 loss has a weight"),
    ("layer of the small model", lambda f, t: [
        "--distillation_layer_index", "9", "--jigsaw_l2_performance_loss_weight", "1",
    ], "from -4 to 3"),
    ("cap form", lambda f, t: [*given(f), "--cap_form", "tanh"], "zero_at_zero"),
    ("estimator", lambda f, t: [*given(f), "--sgt_estimator", "mpl"], "mean mlp"),
    ("rate", lambda f, t: [*given(f), "--sgt_learning_rate", "0"], "above 0"),
    ("length", lambda f, t: [*given(f), "--model_max_length", "1"], "from 2 on"),
    ("rank", lambda f, t: [*given(f), "--lora_r", "0"], "from 1 on"),
    ("misspelt flag", lambda f, t: [
        *given(f), "--jigsaw_ce_protection_maxloss", "2",
    ], "mean --jigsaw_ce_protection_max_loss"),
    ("evaluation", lambda f, t: [*given(f), "--eval_strategy", "steps"], "measured at the end"),
    ("two quantisations", lambda f, t: [*given(f), "--load_in_8bit", "--load_in_4bit"], "exclude"),
    ("fast with a model", lambda f, t: [*given(f), "--fast"], "leave it out with --model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    out = tmp_path / "run"
    code = main(["train", "jigsaw", "--output_dir", str(out), *arguments(files, tmp_path)])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert message in said.err and len(said.err.splitlines()) <= 3, said.err
    assert not out.exists()


def test_what_only_the_model_tells_is_one_line_too(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = json.dumps({"messages": [{"role": "user", "content": "hello there"}]}) + "\n"
    for flags, code, message in (
        (
            ["--distillation_layer_index", "2", "--jigsaw_l2_protection_loss_weight", "1"],
            *(2, "from -2 to 1: the model has 2 blocks"),
        ),
        (["--lora_target_modules", "wq"], 2, "no wq in the blocks"),
        (["--lora_modules_to_save", "embed_tokens"], 2, "embeddings"),
        (["--data", write(tmp_path, "c.jsonl", 2 * chat)], 2, "no chat template"),
        (["--model", str(tmp_path / "none")], 2, "no such folder"),
    ):
        run = ["train", "jigsaw", *given(files), *QUICK, *flags]
        assert main([*run, "--output_dir", str(tmp_path / "run")]) == code, flags
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert "Traceback" not in said.err
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").iterdir()), flags


def test_help_is_quick_and_short() -> None:
    begun = time.monotonic()
    code, out, _ = finish(start(["--help"]))
    assert code == 0 and time.monotonic() - begun < 5
    assert len(out.splitlines()) <= 60
    for name in ("--model_name_or_path", "--data", "--val", "--lora_r"):
        assert name in out
    code, out, _ = finish(start(["--help-all"]))
    from onepass.jigsaw.arguments import JigsawArguments

    assert code == 0 and all(f"--{name}" in out for name in vars(JigsawArguments()))


# -- what a run leaves ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(start([*given(files), *QUICK, "--output_dir", str(folder)]))
    assert code == 0, err
    assert "KL, student on transformed text" in out and "tokens recovered" in out
    assert "Traceback" not in err and "Warning" not in err, err
    return folder


def test_a_run_leaves_a_pair_metrics_a_picture_and_a_summary(whole: Path) -> None:
    from onepass.jigsaw.cloak import TransformerCloak

    names = {path.name for path in whole.iterdir()}
    assert names >= {
        *("adapter", "sgt", "tokenizer.json", "README.md", "metrics.jsonl", "curves.png"),
        *("summary.json", "run.json", "checkpoint-6", "checkpoint-8"),
    }
    kept = {path.name for path in (whole / "adapter").iterdir()}
    assert kept == {"adapter_model.safetensors", "adapter_config.json"}
    assert {path.name for path in (whole / "sgt").iterdir()} == {"model.safetensors", "config.json"}
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in metrics(whole)] == [2, 4, 6, 8]
    assert "jigsaw/kl_protection" in metrics(whole)[0]
    summary = json.loads((whole / "summary.json").read_text())
    for when in ("before", "after"):
        assert set(summary[when]) == {
            *("kl_performance", "kl_protection", "kl_guardrails", "agreement"),
            *("recovery_l2", "recovery_cosine", "recovery_informed", "abs_cosine", "std"),
        }
    assert summary["before"]["recovery_l2"] == 1
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "Base model: a local folder" in card
    assert "median_norm_penalty_weight" in card and "tokens recovered" in card
    assert TransformerCloak.from_pretrained(whole / "sgt").max_std > 0


def test_a_second_run_into_the_folder_needs_overwrite(
    whole: Path, files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in whole.iterdir()}
    run = ["train", "jigsaw", *given(files), *QUICK, "--output_dir", str(whole)]
    assert main(run) == 2 and "has an earlier run in it" in capsys.readouterr().err
    assert main([*run, "--overwrite", "--lora_target_modules", "wq"]) == 2  # a start that fails
    assert {path.name: path.stat().st_mtime_ns for path in whole.iterdir()} == before


def test_killed_and_resumed_it_ends_with_the_same_bits(
    whole: Path, files: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start([*given(files), *QUICK, "--output_dir", str(folder)])
    ends = time.monotonic() + 120
    while time.monotonic() < ends and process.poll() is None:
        if (folder / "checkpoint-4" / "trainer_state.json").exists():
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (folder / "adapter").exists(), "it ended before the kill"
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(folder)]))
    assert code == 0, err
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(folder)[name]), name
    wanted = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(whole)]
    found = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(folder)]
    assert found == wanted
    summaries = [json.loads((f / "summary.json").read_text()) for f in (whole, folder)]
    assert summaries[0]["after"] == summaries[1]["after"]
    assert summaries[0]["before"] == summaries[1]["before"]
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(folder)]))
    assert code == 0 and "had come to its end at checkpoint-8" in err, err
    assert json.loads((folder / "summary.json").read_text())["after"] == summaries[0]["after"]


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)
def test_two_processes_train_and_have_the_gradients_of_one(files: Path, tmp_path: Path) -> None:
    run_processes(2, "jigsaw_on_two", tmp_path)
    flags = [*given(files), *QUICK, "--max_steps", "2", "--output_dir", str(tmp_path / "run")]
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    code, out, err = finish(start(flags, *launcher))
    assert code == 0 and out.count("tokens recovered, nearest by L2") == 1, err
    assert metrics(tmp_path / "run")[-1]["step"] == 2


def test_the_default_protects_and_the_student_alone_understands(tmp_path: Path) -> None:
    """No model and no data given: the small model, its documentation, measured on held-out text;
    then the files alone, by plain torch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from onepass.jigsaw.cloak import TransformerCloak

    folder = tmp_path / "run"
    flags = ["--fast", "--use_cpu", "--output_dir", str(folder)]
    code, out, err = finish(start(flags))
    assert code == 0, err
    found = json.loads((folder / "summary.json").read_text())["after"]
    assert found["kl_protection"] >= 10 * found["kl_performance"], found
    assert found["kl_guardrails"] >= 10 * found["kl_performance"], found
    assert found["abs_cosine"] < 0.6, found
    assert max(found["recovery_l2"], found["recovery_cosine"]) < 0.2, found
    assert found["agreement"] > 0.8 and found["agreement_after"] > 0.8, found
    assert metrics(folder)[-1]["step"] == 250 and "tokens recovered" in out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(folder / "base-model").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        student = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    cloak = TransformerCloak.from_pretrained(folder / "sgt").eval()
    lines = (folder / "data" / "retain_held_out.jsonl").read_text().splitlines()
    agreed, recovered, understood, n = 0.0, 0.0, 0.0, 0
    torch.manual_seed(0)
    with torch.no_grad():
        table = base.get_input_embeddings().weight
        for line in lines[:20]:
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"][:, :64]
            x = table[ids]
            noisy = cloak(x).noisy
            with student.disable_adapter():
                clean = student(inputs_embeds=x).logits.argmax(-1)
                teacher = student(inputs_embeds=noisy).logits.argmax(-1)
            agreed += float((student(inputs_embeds=noisy).logits.argmax(-1) == clean).sum())
            understood += float((teacher == clean).sum())
            recovered += float((torch.cdist(noisy, table[None]).argmin(-1) == ids).sum())
            n += ids.numel()
    assert agreed / n > 0.8 and recovered / n < 0.2 and understood / n < 0.5
