"""`onepass dpo frontier`: what it is told, what it leaves, and that nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from onepass.cli import main
from onepass.cli.errors import Failed, UsageError

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from onepass.dpo import frontier  # noqa: E402
from onepass.dpo.frontier import (  # noqa: E402
    FrontierFlags,
    Point,
    check_losses,
    own_options,
    points_of,
    train_tokens,
)
from onepass.dpo.reward import RewardFlags, parse_reward  # noqa: E402
from onepass.training.flags import RunFlags, parse  # noqa: E402
from support import tiny_reward  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
ROOT = Path(__file__).resolve().parents[1]
SMALLEST = (
    *("--reward", "support.tiny_reward:letters", "--num_answers", "6", "--max_new_tokens", "5"),
    *("--pairs_per_prompt", "4", "--max_steps", "2", "--learning_rate", "0.01", "--use_cpu"),
    *("--losses", "sigmoid,hinge:0.5:1", "--betas", "0.1", "--seed", "1"),
)
NAMES = ["hinge-beta0.5", "hinge-beta1.0", "sigmoid-beta0.1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dpo")
    tiny_reward.save(folder)
    return folder


def arguments(files: Path, out: Path) -> list[str]:
    model = ["--model", str(files / "model"), "--prompts", str(files / "prompts.txt")]
    return ["dpo", "frontier", *model, *SMALLEST, "--output_dir", str(out)]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the points that are trained from here on."""
    names: list[str] = []
    train = frontier._Work.train

    def noted(self: Any, point: Point, pairs: Path) -> None:
        names.append(point.name)
        train(self, point, pairs)

    monkeypatch.setattr(frontier._Work, "train", noted)
    yield names


# -- what it is told --------------------------------------------------------------------------


def test_each_loss_at_each_beta_or_at_its_own() -> None:
    points = points_of(["sigmoid", "hinge:1:2", "ipo"], ["0.1", "0.5"])
    assert points == [
        *(Point("sigmoid", 0.1), Point("sigmoid", 0.5), Point("hinge", 1.0), Point("hinge", 2.0)),
        *(Point("ipo", 0.1), Point("ipo", 0.5)),
    ]
    assert len({point.name for point in points}) == 6
    points = points_of(["jsd", "Sigmoid:0.1:0.10000001", "JSD"], ["0.1"])
    found = check_losses(points, FrontierFlags())
    assert found == [Point("JSD", 0.1), Point("sigmoid", 0.1), Point("sigmoid", 0.10000001)]
    assert len({point.name for point in found}) == 3
    for losses, betas in ((["sigmoid"], ["x"]), (["sigmoid:0"], ["1"]), (["hinge"], ["-1"])):
        with pytest.raises(UsageError, match="wanted a number above 0"):
            points_of(losses, betas)
    with pytest.raises(UsageError, match="wanted at least one"):
        points_of(["sigmoid"], [])


def test_a_training_gets_the_flags_that_were_given() -> None:
    tokens = ["--max_steps=3", "--output_dir=a", "--no_use_peft", "--model=m", "--alpha=0.5"]
    flags = parse("onepass dpo frontier", frontier.FLAGS, [*tokens, "--adam_beta2=0.9"])
    passed = train_tokens(flags)
    for wanted in ("--max_steps=3", "--use_peft=false", "--adam_beta2=0.9"):
        assert wanted in passed
    own = FrontierFlags(alpha=0.3, label_smoothing=0.1)
    for loss, options in (
        ("alpha", {"alpha": 0.3, "label_smoothing": 0.1}),
        ("exo_pair", {"label_smoothing": 0.1}),
        ("hinge", {}),
    ):
        assert own_options(Point(loss, 0.1), own) == options
        check_losses([Point(loss, 0.1)], own)
    assert not any(token.startswith(("--output_dir", "--model", "--lora_r")) for token in passed)


def test_the_notebooks_settings_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("onepass.training.models.check_folder", lambda *names: None)
    flags = frontier._parse("onepass dpo frontier", "", ["--config", "docs/dpo-imdb.yaml"])
    prompts, reward, points = frontier.check(flags)
    assert len(prompts) == 46 and points == [Point("hinge", 0.1), Point("sigmoid", 10.0)]
    assert (reward.kind, reward.label, reward.sign) == ("classifier", 0, -1)
    run = flags[RunFlags]
    assert (run.learning_rate, run.per_device_train_batch_size, run.num_train_epochs) == (
        *(1e-5, 8, 3),
    )


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ("--losses sigmiod", "--losses must be one of sigmoid"),
        ("--betas 0", "--betas: got '0', wanted a number above 0"),
        ("--betas many", "--betas: got 'many'"),
        ("--losses hinge:x", "--losses: got 'x'"),
        ("--reward prose", "--reward: got 'prose'"),
        ("--data nowhere.jsonl", "nowhere.jsonl: no such file"),
        ("--data {prompts}", "--data: "),
        ("--fast", "--fast: is of the model made here"),
        ("--accelerate_config multi_gpu", "--accelerate_config: "),
        ("--num_eval_answers 0", "--num_eval_answers: got 0"),
        ("--max_steps 0", "--max_steps: got 0"),
        ("--lora_r 0", "--lora_r: got 0"),
        ("--loses sigmoid", "did you mean --losses?"),
        ("--output_dir {files}", "has files of others in it"),
    ],
)
def test_what_is_refused(
    args: str, told: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = args.format(files=files, prompts=files / "prompts.txt").split()
    code = main([*arguments(files, tmp_path / "out"), *words])
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert told in err and len(err.splitlines()) <= 3
    assert not (tmp_path / "out").exists()


def test_pairs_without_their_model_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "frontier", "--data", "pairs.jsonl"]) == 2
    assert "--data: wanted --model with it" in capsys.readouterr().err


# -- what it leaves ---------------------------------------------------------------------------


def test_killed_between_points_it_goes_on(
    files: Path, tmp_path: Path, trained: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = out / "points" / "sigmoid-beta0.1" / "evaluation.json"
    dropped = ("TRITON_INTERPRET", "COLUMNS")
    env = {k: v for k, v in os.environ.items() if k not in dropped}
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests")])
    env |= {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "onepass", *arguments(files, out)]
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    ends = time.monotonic() + 120
    while not first.is_file() and process.poll() is None and time.monotonic() < ends:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    told = process.communicate()[1]
    assert first.is_file(), told
    known = {file: file.read_bytes() for file in (first, out / "pairs.jsonl", out / "start.json")}
    points = out / "points"
    assert not (points / "hinge-beta1.0").exists()

    code = main([*arguments(files, out)])
    table, told = capsys.readouterr()
    assert code == 0, told
    assert "1 of 3: sigmoid, beta 0.1: there already" in told
    assert trained == ["hinge-beta0.5", "hinge-beta1.0"]
    assert all(file.read_bytes() == content for file, content in known.items())

    facts = json.loads((out / "frontier.json").read_text())
    assert [(p["loss"], p["beta"]) for p in facts["points"]] == [
        *(("sigmoid", 0.1), ("hinge", 0.5), ("hinge", 1.0)),
    ]
    assert facts["start"]["kl_per_token"] == 0.0 and facts["failed"] == []
    for point in facts["points"]:
        assert point["kl_per_token"] > 0 and point["answers"] == 9
        assert point["token_entropy"] > 0 and point["reward_error"] >= 0
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in points.iterdir() if path.is_dir()) == NAMES
    assert (points / "hinge-beta1.0" / "adapter" / "adapter_config.json").is_file()
    rows = [line.split()[:2] for line in table.splitlines()[-3:]]
    assert rows == [["sigmoid", "0.1"], ["hinge", "0.5"], ["hinge", "1"]]

    trained.clear()
    assert main([*arguments(files, out)]) == 0 and trained == []
    assert capsys.readouterr().out == table
    # another loss joins what is there
    assert main([*arguments(files, out), "--losses", "ipo:0.2"]) == 0
    capsys.readouterr()
    assert trained == ["ipo-beta0.2"]
    facts = json.loads((out / "frontier.json").read_text())
    assert {p["loss"] for p in facts["points"]} == {"ipo", "hinge", "sigmoid"}
    assert len(facts["points"]) == 4
    code = main(["train", "dpo", "--output_dir", str(out), "--overwrite"])
    assert code == 2 and "has a run of dpo-frontier in it" in capsys.readouterr().err
    code = main(["train", "dpo", "--output_dir", str(out), "--resume_from_checkpoint"])
    assert code == 2 and "is one of dpo-frontier, wanted one of dpo" in capsys.readouterr().err
    code = main([*arguments(files, out), "--temperature", "0.7"])
    assert code == 2 and "--temperature: got 0.7, but the run was begun with 1.0" in (
        capsys.readouterr().err
    )
    words = files.parent / "words.txt"
    marks = []
    for word in ("the", "def"):
        words.write_text(word)
        reward = parse_reward(RewardFlags(reward=f"keyword:@{words}"))
        flags = frontier._parse("onepass dpo frontier", "", arguments(files, out)[2:])
        marks.append(frontier.fingerprints(flags, [], reward)["reward"])
    assert marks[0] != marks[1]
    changed = files.parent / "changed.txt"
    changed.write_text((files / "prompts.txt").read_text())
    code = main([*arguments(files, out), "--prompts", str(changed)])
    assert code == 2 and "--prompts: got" in capsys.readouterr().err


def test_all_weights_are_trained_where_no_adapter_is_wanted(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [*arguments(files, tmp_path), "--no_use_peft", "--losses", "JSD"]
    assert main(args) == 0, capsys.readouterr().err
    point = tmp_path / "points" / "JSD-beta0.1"
    assert (point / "model" / "config.json").is_file() and not (point / "adapter").exists()
    assert json.loads((point / "evaluation.json").read_text())["kl_per_token"] > 0


def test_other_prompts_under_the_same_name_are_refused(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(frontier._Work, "start", lambda self: (_ for _ in ()).throw(Failed("stop")))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a\nb\n")
    args = [*arguments(files, tmp_path / "out"), "--prompts", str(prompts)]
    assert main(args) == 1
    prompts.write_text("a\nc\n")
    assert main(args) == 2
    assert "the data (prompts) are not those the run began with" in capsys.readouterr().err
    prompts.write_text("a\nb\n")
    assert main(args) == 1  # and taken again


def test_a_point_that_fails_leaves_the_others(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train(self: Any, point: Point, pairs: Path) -> None:
        if point.loss == "hinge":
            raise Failed("the training ended with outputs that are not finite")

    def measured(self: Any, named: Any, adapter: Any, reference: Any = None) -> dict[str, Any]:
        return {"reward": 1.0, "reward_error": None, "token_entropy": 2.0, "kl_per_token": None}

    monkeypatch.setattr(frontier._Work, "train", train)
    monkeypatch.setattr(frontier._Work, "_measured", measured)
    place = frontier._Work.place

    def made(self: Any, point: Point) -> Path:
        folder = place(self, point)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr(frontier._Work, "place", made)
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    code = main([*arguments(files, tmp_path / "out"), "--data", str(data)])
    out, err = capsys.readouterr()
    assert code == 1 and "2 of 3: hinge, beta 0.5 failed: the training ended" in err
    assert "hinge (failed)" in out
    facts = json.loads((tmp_path / "out" / "frontier.json").read_text())
    assert len(facts["points"]) == 1 and [p["beta"] for p in facts["failed"]] == [0.5, 1.0]
