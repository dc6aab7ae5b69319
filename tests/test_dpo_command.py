"""`onepass train dpo`: what it refuses, what a run leaves, kill -9, two processes, the default."""

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

from onepass.cli import main
from onepass.dpo.command import DataFlags, read_data
from onepass.training.hub_data import DatasetFlags
from support.tiny_dpo import pairs
from support.tiny_language_model import save

PYTHON = Path(__file__).resolve().parents[1] / "python"
RUN = ["-m", "onepass", "train", "dpo"]
QUICK = [
    *("--use_cpu", "--per_device_train_batch_size", "3", "--learning_rate", "5e-3"),
    *("--logging_steps", "2", "--save_steps", "2", "--max_steps", "8"),
    *("--validation_ratio", "0.2"),
]
FACTS = {
    *("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
    *("logps/chosen", "logps/rejected", "entropy", "mean_token_accuracy"),
}


def write(folder: Path, name: str, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and pairs.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, n_layers=2)
    write(folder, "pairs.jsonl", *pairs())
    return folder


def given(files: Path) -> list[str]:
    return ["--model", str(files / "model"), "--data", str(files / "pairs.jsonl")]


def start(arguments: list[str], *launcher: str, **env: str) -> subprocess.Popen[str]:
    env |= {**os.environ, "PYTHONPATH": str(PYTHON), "OMP_NUM_THREADS": "1", "NO_COLOR": "1"} | env
    command = [sys.executable, *launcher, *RUN, *arguments]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


# -- what is refused --------------------------------------------------------------------------

WRONG: list[tuple[str, Callable[[Path, Path], list[str]], str]] = [
    ("a model alone", lambda f, t: ["--model", str(f / "model")], "leave out --model"),
    ("val alone", lambda f, t: ["--val", str(f / "pairs.jsonl")], "wanted --data with it"),
    ("no file", lambda f, t: [*given(f), "--data", str(t / "no.jsonl")], "no such file"),
    ("empty", lambda f, t: [*given(f), "--val", write(t, "e.jsonl")], "holds no pair"),
    ("malformed line", lambda f, t: [
        *given(f), "--data", write(t, "d.jsonl", pairs()[0], "{oops"),
    ], "d.jsonl:2"),
    ("no rejected", lambda f, t: [
        *given(f), "--data", write(t, "d.jsonl", pairs()[0], {"prompt": "a", "chosen": "b"}),
    ], "d.jsonl:2: no 'rejected'"),
    ("equal", lambda f, t: [
        *given(f), "--data", write(t, "d.jsonl", {"chosen": "b", "rejected": "b"}),
    ], "d.jsonl:1: 'chosen' and 'rejected' are equal"),
    ("ratio of 1", lambda f, t: [*given(f), "--validation_ratio", "1"], "below 1"),
    ("ratio that takes all", lambda f, t: [
        *given(f), "--data", write(t, "one.jsonl", pairs()[0]),
    ], "leaves none to train on"),
    ("samples", lambda f, t: [*given(f), "--max_eval_samples", "0"], "from 1 on"),
    ("beta", lambda f, t: [*given(f), "--beta", "0"], "--beta must"),
    ("smoothing", lambda f, t: [*given(f), "--label_smoothing", "0.5"], "--label_smoothing must"),
    ("loss", lambda f, t: [*given(f), "--loss_type", "sigmoid,kl"], "--loss_type must be one of"),
    ("weights", lambda f, t: [*given(f), "--loss_weights", "1", "2"], "--loss_weights must hold"),
    ("divergence", lambda f, t: [*given(f), "--f_divergence_type", "kl"],
     "--f_divergence_type must be one of"),
    ("combination", lambda f, t: [
        *given(f), "--loss_type", "apo_zero", "--f_divergence_type", "FKL",
    ], "has no f-divergence"),
    ("prompt length", lambda f, t: [
        *given(f), "--max_length", "9", "--max_prompt_length", "9",
    ], "--max_prompt_length: got 9"),
    ("truncation", lambda f, t: [*given(f), "--truncation_mode", "keep_non"], "keep_end"),
    ("batch of the reference", lambda f, t: [
        *given(f), "--precompute_ref_log_probs", "--precompute_ref_batch_size", "0",
    ], "from 1 on"),
    ("batch of no reference", lambda f, t: [*given(f), "--precompute_ref_batch_size", "2"],
     "is of --precompute_ref_log_probs"),
    ("dropout that is taken out", lambda f, t: [*given(f), "--lora_dropout", "0.1"],
     "--no_disable_dropout"),
    ("sync of an adapter", lambda f, t: [*given(f), "--sync_ref_model"], "--no_use_peft"),
    ("rank", lambda f, t: [*given(f), "--lora_r", "0"], "from 1 on"),
    ("misspelt flag", lambda f, t: [*given(f), "--f_divergence", "FKL"], "f_divergence_type"),
    ("evaluation", lambda f, t: [*given(f), "--eval_strategy", "steps"], "measured at the end"),
    ("two quantisations", lambda f, t: [*given(f), "--load_in_8bit", "--load_in_4bit"], "exclude"),
    ("bits and all weights", lambda f, t: [*given(f), "--load_in_4bit", "--no_use_peft"],
     "are frozen"),
    ("dropped tokens of smoothing", lambda f, t: [*given(f), "--label_smoothing_factor", "0.1"],
     "is of transformers' own loss"),
    ("alpha for nothing", lambda f, t: [*given(f), "--alpha", "0.5"], "--alpha: is of the alpha"),
    ("a temperature for nothing", lambda f, t: [*given(f), "--discopop_tau", "0.1"],
     "--loss_type discopop"),
    ("a rank for nothing", lambda f, t: [*given(f), "--no_use_peft", "--lora_r", "4"],
     "--lora_r: is of an adapter"),
    ("an empty batch", lambda f, t: [*given(f), "--per_device_eval_batch_size", "0"],
     "--per_device_eval_batch_size: got 0"),
    ("no weights", lambda f, t: [
        *given(f), "--loss_type", "sigmoid,ipo", "--loss_weights", "0,0",
    ], "--loss_weights must not all be 0"),
    ("itself", lambda f, t: [*given(f), "--val", str(f / "pairs.jsonl")], "is --data itself"),
    ("two data", lambda f, t: [*given(f), "--dataset_name", "a/b"], "leave one out"),
    ("a dataset without a model", lambda f, t: ["--dataset_name", "a/b"], "wanted --model"),
    ("a name twice", lambda f, t: [*given(f), "--rename_column", "a=prompt", "b=prompt"],
     "'prompt' is named twice"),
    ("a name that is none", lambda f, t: [*given(f), "--rename_column", "questoin=text"],
     "no column 'questoin' to rename, it has chosen, prompt, rejected"),
    ("a name that is there", lambda f, t: [*given(f), "--rename_column", "prompt=rejected"],
     "'prompt' is to be 'rejected', which is there already"),
    ("no new name", lambda f, t: [*given(f), "--rename_column", "yes"], "wanted old=new"),
    ("no alpha", lambda f, t: [*given(f), "--f_divergence_type", "alpha_divergence"],
     "--alpha must be a number for f_divergence_type"),
    ("smoothed hinge", lambda f, t: [
        *given(f), "--loss_type", "hinge", "--label_smoothing", "0.1",
    ], "--label_smoothing is of sigmoid"),
    ("fast with a model", lambda f, t: [*given(f), "--fast"], "leave it out with --model"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str
) -> None:
    out = tmp_path / "run"
    ratio = ["--validation_ratio", "0.2"]
    code = main(["train", "dpo", "--output_dir", str(out), *ratio, *arguments(files, tmp_path)])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert message in said.err and len(said.err.splitlines()) <= 3, said.err
    assert not out.exists()


def test_what_only_the_model_tells_is_one_line_too(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    user, chosen, rejected = (
        {"role": role, "content": text}
        for role, text in (("user", "hello"), ("assistant", "yes"), ("assistant", "no"))
    )
    chat = {"chosen": [user, chosen], "rejected": [user, rejected]}
    for flags, code, message in (
        (["--lora_target_modules", "wq"], 2, "no wq in the blocks"),
        (["--lora_modules_to_save", "head"], 2, "no module head in this model"),
        (
            ["--data", write(tmp_path, "c.jsonl", *[chat] * 5), "--validation_ratio", "0"],
            2,
            "no chat template",
        ),
        (["--model", str(tmp_path / "none")], 2, "no such folder"),
    ):
        run = ["train", "dpo", *given(files), *QUICK, *flags]
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
    for name in ("--model_name_or_path", "--data", "--val", "--beta", "--loss_type", "--lora_r"):
        assert name in out
    code, out, _ = finish(start(["--help-all"]))
    from onepass.dpo import DPOArguments

    assert code == 0 and all(f"--{name}" in out for name in vars(DPOArguments()))


# -- what a run leaves ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    code, out, err = finish(start([*given(files), *QUICK, "--output_dir", str(folder)]))
    assert code == 0, err
    assert "pairs told apart" in out and "entropy of a token" in out
    assert "Traceback" not in err and "Warning" not in err, err
    return folder


def test_a_run_leaves_an_adapter_metrics_a_picture_and_a_summary(whole: Path) -> None:
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        *("adapter", "tokenizer.json", "README.md", "metrics.jsonl", "curves.png"),
        *("summary.json", "run.json", "checkpoint-6", "checkpoint-8"),
    }
    kept = {path.name for path in (whole / "adapter").iterdir()}
    assert kept == {"adapter_model.safetensors", "adapter_config.json"}
    assert (whole / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [line["step"] for line in metrics(whole)] == [2, 4, 6, 8]
    assert {"rewards/margins", "entropy", "num_tokens"} <= set(metrics(whole)[0])
    found = summary(whole)
    assert set(found["before"]) == set(found["after"]) == FACTS
    assert found["before"]["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert found["n_pairs"] == {"train": 5, "measured": 1}
    assert found["cut_pairs_and_tokens"] == {"train": [0, 0], "measured": [0, 0]}
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft") and "Base model: a local folder" in card
    assert "label_smoothing" in card and "pairs told apart" in card


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
    one, other = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (whole, folder))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    wanted = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(whole)]
    found = [{k: v for k, v in line.items() if "epoch" not in k} for line in metrics(folder)]
    assert found == wanted
    for when in ("before", "after"):
        assert summary(whole)[when] == summary(folder)[when]
    code, _, err = finish(start(["--resume_from_checkpoint", "--output_dir", str(folder)]))
    assert code == 0 and "had come to its end at checkpoint-8" in err, err
    assert summary(folder)["after"] == summary(whole)["after"]


def test_pairs_of_one_prompt_stay_together(tmp_path: Path) -> None:
    """Held out is a share of the prompts, with all of their pairs."""
    rows = [{**row, "rejected": f"{row['rejected']} {n}"} for row in pairs() for n in range(5)]
    file = write(tmp_path, "many.jsonl", *rows)
    found = read_data(DataFlags(data=file, validation_ratio=0.4), DatasetFlags())
    assert {name: len(part) for name, part in found.items()} == {"data": 20, "val": 10}
    train, held_out = ({row["prompt"] for row in found[name]} for name in ("data", "val"))
    assert not train & held_out
    bare = write(tmp_path, "bare.jsonl", *({k: r[k] for k in ("chosen", "rejected")} for r in rows))
    found = read_data(DataFlags(data=bare, validation_ratio=0.2), DatasetFlags())
    assert not {r["chosen"] for r in found["data"]} & {r["chosen"] for r in found["val"]}


def test_a_folder_is_one_runs_at_a_time(files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    many = [*given(files), *QUICK, "--max_steps", "5000", "--save_steps", "5000"]
    first = start([*many, "--output_dir", str(folder)])
    ends = time.monotonic() + 120
    while time.monotonic() < ends and not (folder / "metrics.jsonl").exists():
        time.sleep(0.02)
    code, _, err = finish(start([*many, "--output_dir", str(folder), "--overwrite"]))
    first.kill()
    first.communicate()
    assert code == 2 and "another run is writing to" in err, err
    assert (folder / "metrics.jsonl").exists()


def test_all_weights_may_be_trained_and_what_is_cut_is_told(files: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "run"
    flags = ["--no_use_peft", "--max_length", "32", "--loss_type", "hinge,ipo", "--max_steps", "2"]
    flags += ["--loss_weights", "1,0.5", "--dataloader_drop_last"]
    flags += ["--precompute_ref_log_probs", "--f_divergence_type", "js_divergence"]
    code, _, err = finish(start([*given(files), *QUICK, *flags, "--output_dir", str(folder)]))
    assert code == 0, err
    assert "are longer than max_length=32" in err
    assert summary(folder)["cut_pairs_and_tokens"]["train"][0] == 5
    assert not (folder / "adapter").exists()
    made = AutoModelForCausalLM.from_pretrained(folder / "model")
    start_at = load_file(files / "model" / "model.safetensors")
    assert not torch.equal(made.lm_head.weight, start_at["lm_head.weight"])


def test_a_dataset_and_columns_of_other_names(whole: Path, files: Path, tmp_path: Path) -> None:
    """A folder of `datasets` trains as the same rows in a file do."""
    folder = tmp_path / "own"
    folder.mkdir()
    rows = [{"good": p["chosen"], "bad": p["rejected"], "question": p["prompt"]} for p in pairs()]
    file = write(folder, "train.jsonl", *rows)
    names = ["--rename_column", "good=chosen", "bad=rejected", "question=prompt"]
    model = ["--model", str(files / "model")]
    cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for n, data in enumerate((["--data", file], ["--dataset_name", str(folder)])):
        run = tmp_path / f"run{n}"
        begun = start([*model, *data, *names, *QUICK, "--output_dir", str(run)], **cache)
        code, _, err = finish(begun)
        assert code == 0, err
        one, other = (
            load_file(each / "adapter" / "adapter_model.safetensors") for each in (whole, run)
        )
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    write(folder, "test.jsonl", {**rows[0], "bad": rows[0]["good"]})
    for flags, told in (
        (names[:2], "own[train]: row 1: no 'rejected', wanted chosen and rejected; it has"),
        (names, "own[test]: row 1: 'chosen' and 'rejected' are equal"),
        ([*names, "--dataset_test_split", "validatoin"], "has no split 'validatoin'"),
        ([*names, "--dataset_train_split", "trian"], "has no split 'trian'\n  allowed: "),
        (["--rename_column", "god=chosen"], "--rename_column: no column 'god', the dataset has"),
        (["--dataset_name", str(tmp_path / "none")], "cannot be loaded: "),
    ):
        run = tmp_path / "refused"
        data = ["--dataset_name", str(folder), *flags]
        code, _, err = finish(start([*model, *data, "--output_dir", str(run)], **cache))
        assert code == 2 and told in err and "Traceback" not in err, err
        assert not run.exists()


@pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)
def test_two_processes_train_as_one(files: Path, tmp_path: Path) -> None:
    """Batches of 1 on each are one's batches of 2, after a measurement of the model, too, whose
    last batch is not whole."""
    val = write(tmp_path, "val.jsonl", *pairs()[:5])
    found = []
    for name, size, launcher in (
        ("one", "2", ()),
        ("two", "1", ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")),
    ):
        folder = tmp_path / name
        flags = [*given(files), *QUICK, "--val", val, "--max_steps", "2"]
        flags += ["--per_device_train_batch_size", size, "--per_device_eval_batch_size", "2"]
        flags += ["--precompute_ref_log_probs"]
        flags += ["--output_dir", str(folder)]
        code, out, err = finish(start(flags, *launcher))
        assert code == 0 and out.count("pairs told apart") == 1, err
        line = {f"train {key}": value for key, value in metrics(folder)[-1].items()}
        found.append(line | summary(folder)["after"])
    for key in (*FACTS, "train step", "train loss", "train rewards/margins", "train num_tokens"):
        assert found[1][key] == pytest.approx(found[0][key], rel=1e-4, abs=1e-5), key


def test_the_default_prefers_prose_on_held_out_pairs(tmp_path: Path) -> None:
    """No model and no data given: the small model and its text; then the files alone, by plain
    torch."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "run"
    code, out, err = finish(start(["--fast", "--use_cpu", "--output_dir", str(folder)]))
    assert code == 0, err
    found = summary(folder)["after"]
    assert found["rewards/accuracies"] > 0.9 and found["loss"] < 0.3, found
    assert metrics(folder)[-1]["step"] == 60 and "pairs told apart" in out
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        base = AutoModelForCausalLM.from_pretrained(folder / "base-model").eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        policy = PeftModel.from_pretrained(base, str(folder / "adapter")).eval()
    lines = (folder / "data" / "pairs_held_out.jsonl").read_text().splitlines()[:20]

    def logp(prompt: str, answer: str) -> float:
        start, end = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, answer))
        ids = torch.tensor([start + end])
        every = policy(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return float(every.gather(-1, ids[0, 1:, None])[len(start) - 1 :].sum())

    right = 0
    with torch.no_grad():
        for line in lines:
            pair = json.loads(line)
            rewards = []
            for side in ("chosen", "rejected"):
                trained = logp(pair["prompt"], pair[side])
                with policy.disable_adapter():
                    rewards.append(trained - logp(pair["prompt"], pair[side]))
            right += rewards[0] > rewards[1]
    assert right >= 18
