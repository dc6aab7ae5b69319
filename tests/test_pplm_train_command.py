"""`onepass pplm train-discriminator`: what it refuses by file and line, writes and prints, and what
an interruption leaves.
"""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.cli import main
from onepass.demo.train import one_thread
from onepass.pplm import heads, train_command
from onepass.pplm.discriminator import get_discriminator
from onepass.training import small_model
from support.tiny_language_model import model, save, tokenizer

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ["pplm", "train-discriminator"]
SIDES = {"early": "abcdefgh", "late": "stuvwxyz"}


def rows(n: int, seed: int = 0) -> list[dict[str, str]]:
    draw = random.Random(seed)
    found = []
    for _ in range(n):
        label = draw.choice(list(SIDES))
        text = "".join(draw.choice(SIDES[label]) for _ in range(draw.randint(8, 30)))
        found.append({"text": text, "label": label})
    return found


def table(path: Path, *lines: list[str], delimiter: str = ",") -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(lines)
    return str(path)


def jsonl(path: Path, *entries: Any) -> str:
    path.write_text("".join(json.dumps(e) + "\n" for e in entries), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ and data.jsonl."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, n_layers=2)
    jsonl(folder / "data.jsonl", *rows(200))
    return folder


@pytest.fixture(autouse=True)
def one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with one_thread():
        yield


def given(files: Path, data: str | None = None, *more: str) -> list[str]:
    where = ["--model", str(files / "model"), "--data", data or str(files / "data.jsonl")]
    return [*COMMAND, *where, "--learning_rate", "1e-2", "--epochs", "15", *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# -- what is refused ----------------------------------------------------------------------------

HEADER = ["text", "label"]
AB = [HEADER, ["a", "x"], ["b", "y"]]
BAD: list[tuple[str, Callable[[Path], str], str]] = [
    ("no file", lambda t: str(t / "none.csv"), "none.csv: no such file"),
    ("no jsonl", lambda t: str(t / "none.jsonl"), "none.jsonl: no such file"),
    ("a folder", lambda t: str(t), "is no .csv, .tsv, .jsonl"),
    ("a suffix", lambda t: jsonl(t / "x.xlsx"), "is no .csv, .tsv, .jsonl"),
    ("empty", lambda t: table(t / "x.csv"), "no column 'text' in"),
    ("a header alone", lambda t: table(t / "x.csv", HEADER), "x.csv: holds no rows"),
    ("empty jsonl", lambda t: jsonl(t / "x.jsonl"), "x.jsonl: holds no text"),
    ("no text column", lambda t: table(t / "x.csv", ["texts", "label"], ["a", "b"]),
     "--text_column: no column 'text'"),
    ("meant", lambda t: table(t / "x.csv", ["texts", "label"], ["a", "b"]), "did you mean texts?"),
    ("no label column", lambda t: table(t / "x.csv", ["text", "stars"], ["a", "5"]),
     "--label_column: no column 'label' in"),
    ("Uber's, without a header", lambda t: table(t / "x.tsv", ["good", "a b"], delimiter="\t"),
     "the first line names the columns"),
    ("an empty text", lambda t: table(t / "x.csv", *AB, [" ", "x"]), "x.csv:4: 'text' is empty"),
    ("an empty class", lambda t: table(t / "x.csv", *AB, ["c", ""]), "x.csv:4: 'label' is empty"),
    ("a field less", lambda t: table(t / "x.csv", *AB, ["c"]), "x.csv:4: 1 fields, the first line"),
    ("a field more", lambda t: table(t / "x.csv", *AB, ["c", "x", "z"]), "x.csv:4: 3 fields"),
    ("an open quote", lambda t: raw(t / "x.csv", b'text,label\n"a,x\nb,y\n'), "x.csv:3: not csv"),
    ("no UTF-8", lambda t: raw(t / "x.csv", b"text,label\n\xff,x\n"), "x.csv:2: not UTF-8"),
    ("one class", lambda t: table(t / "x.csv", HEADER, ["a", "x"], ["b", "x"]),
     "all 2 rows are of class 'x'"),
    ("a class each", lambda t: table(t / "x.csv", HEADER, *([c, c] for c in "abc")),
     "each row of"),
    ("no JSON", lambda t: raw(t / "x.jsonl", b'{"text": "a", "label": "x"}\n{\n'), "x.jsonl:2:"),
    ("no text", lambda t: jsonl(t / "x.jsonl", {"label": "x"}), "x.jsonl:1: got an object with la"),
    ("no class", lambda t: jsonl(t / "x.jsonl", *rows(1), {"text": "a"}),
     "x.jsonl:2: got no 'label' (--label_column), wanted a class"),
    ("a class that is none", lambda t: jsonl(t / "x.jsonl", {"text": "a", "label": [1]}),
     "x.jsonl:1: got list as 'label'"),
    ("a number", lambda t: jsonl(t / "x.jsonl", {"text": "a", "label": 0.5}), "got float as"),
    ("an empty text of json", lambda t: jsonl(t / "x.jsonl", {"text": "", "label": "x"}),
     "x.jsonl:1: got an empty"),
]  # fmt: skip


def raw(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(("make", "told"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_bad_data_is_told_by_file_and_line(
    make: Callable[[Path], str], told: str, files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = make(tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr("onepass.pplm.train_command.load_policy", None)
    assert main(given(files, path)) == 2
    said = capsys.readouterr()
    assert not said.out and told in said.err and len(said.err.splitlines()) <= 3, said.err
    assert contents(tmp_path) == before


WRONG: list[tuple[str, Callable[[Path, Path], list[str]], str]] = [
    ("data alone", lambda f, t: ["--data", str(f / "data.jsonl")], "--model: got nothing"),
    ("a model alone", lambda f, t: ["--model", str(f / "model")], "--data: got nothing"),
    ("val alone", lambda f, t: ["--val", "x.csv"], "--val: wanted --model and --data"),
    ("no folder", lambda f, t: ["--model", "./none", "--data", "x.csv"], "no such folder"),
    ("epochs", lambda f, t: given(f, None, "--epochs", "0")[2:], "--epochs: got 0"),
    ("rate", lambda f, t: given(f, None, "--learning_rate", "nan")[2:], "--learning_rate: got nan"),
    ("share", lambda f, t: given(f, None, "--held_out", "1")[2:], "--held_out: got 1.0"),
    ("length", lambda f, t: given(f, None, "--max_length", "1")[2:], "--max_length: got 1"),
    ("pool", lambda f, t: given(f, None, "--pool", "max")[2:], "allowed: mean, sum"),
    ("default", lambda f, t: given(f, None, "--default_class", "erly")[2:], "did you mean early?"),
    ("small default", lambda f, t: ["--default_class", "cod"], "did you mean code?"),
    ("three of two", lambda f, t: given(f, table(t / "x.csv", *AB, ["c", "z"], ["d", "z"]),
     "--binary")[2:], "has 3 classes, wanted two"),
    ("another's class", lambda f, t: given(f, None, "--val", table(t / "x.csv", *AB))[2:],
     "class 'x' is not in --data"),
    ("the same texts", lambda f, t: given(f, None, "--val", str(f / "data.jsonl"))[2:],
     "--val: all of its texts are in --data"),
    ("files of others", lambda f, t: given(f, raw(t / "d.csv", b"text,label\na,x\nb,y\n"),
     "--output_dir", str(t))[2:], "has files of others in it"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "told"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_cannot_work_is_refused(
    line: Callable[[Path, Path], list[str]], told: str, files: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("onepass.pplm.train_command.load_policy", None)
    words = line(files, tmp_path)
    before = contents(tmp_path)
    assert main([*COMMAND, *words]) == 2
    said = capsys.readouterr()
    assert not said.out and told in said.err, said.err
    assert contents(tmp_path) == before


# -- what is written and printed ----------------------------------------------------------------


def test_it_writes_a_head_that_can_be_used(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = given(files, None, "--output_dir", "out", "--default_class", "late")
    assert main(line) == 0
    said, out = capsys.readouterr(), tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["head.safetensors", "head.json", "summary.json", "curves.png", "metrics.jsonl", "run.json"]
    )
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    facts = json.loads((out / "summary.json").read_text())
    assert facts["held_out_accuracy"] > 0.9 and facts["classes"] == ["early", "late"]
    assert len(facts["history"]) == 16 and sum(map(sum, facts["confusion"])) == facts["held_out"]
    assert f"accuracy {facts['held_out_accuracy']:.4f}" in said.out and "as early" in said.out
    assert "wrote out: head.safetensors" in said.err and "\x1b" not in said.out
    head, meta = heads.load_head(out)
    assert meta == json.loads((out / "head.json").read_text())
    assert meta["pretrained_model"] == str((files / "model").resolve())
    assert heads.get_classifier("out", None)[1] == heads.get_classifier("out", "late")[1] == 1
    found = get_discriminator(model(2), load_from_pretrained=True, path=out)
    probs = found.predict(["abcabcabc", "zyxzyxzyx"], tokenizer())
    assert probs[0, 0] > 0.5 and probs[1, 1] > 0.5
    before = contents(out)
    assert main(line) == 0  # again: the same
    assert contents(out) == before
    assert main([*line, "--seed", "1"]) == 2
    assert "--seed: got 1, but the run was begun with 42" in capsys.readouterr().err
    assert contents(out) == before
    assert main([*line, "--seed", "1", "--overwrite"]) == 0
    assert not torch.equal(heads.load_head(out)[0].mlp.weight, head.mlp.weight)


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".ndjson"])
def test_files_of_each_kind_are_the_same_rows(
    suffix: str, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, path = rows(60), tmp_path / f"x{suffix}"
    own[0]["text"] += ', "quoted",\nover\ttwo lines'
    renamed = [{"body": r["text"], "id": n, "kind": r["label"]} for n, r in enumerate(own)]
    if suffix in (".csv", ".tsv"):
        lines = [[str(v) for v in r.values()] for r in renamed]
        table(
            path, list(renamed[0]), *lines, lines[3], delimiter={".csv": ",", ".tsv": "\t"}[suffix]
        )
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as spreadsheets write it
    elif suffix == ".json":
        path.write_text(json.dumps([*renamed, renamed[3]]))
    else:
        jsonl(path, *renamed, renamed[3])
    asked = train_command.DataFlags(text_column="body", label_column="kind")
    found = train_command.read_rows(str(path), asked, "--data")
    assert found == ([r["text"] for r in own], [r["label"] for r in own])
    assert "1 row came before" in capsys.readouterr().err


def test_json_val_and_one_logit(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    val = [*rows(30, seed=1), rows(1)[0]]
    line = given(files, None, "--val", jsonl(tmp_path / "val.jsonl", *val), "--binary", "--json")
    assert main([*line, "--pool", "sum", "--max_length", "12"]) == 0
    said = capsys.readouterr()
    facts = json.loads(said.out)
    assert facts == json.loads((tmp_path / "onepass-discriminator/summary.json").read_text())
    assert (facts["trained_on"], facts["held_out"], facts["pool"]) == (200, 30, "sum")
    assert "1 texts of --val are in --data too" in said.err
    assert "185 of 230 texts have more than 12 tokens and lose their end" in caplog.text
    head, meta = heads.load_head("onepass-discriminator")
    assert head.class_size == 1 and meta["class_vocab"] == {"early": 0, "late": 1}


def test_what_should_give_pause_is_told(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = [*given(files), "--epochs", "1", "--learning_rate", "1e-9", "--held_out", "0"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "measured on 0 held out\n" in said.out and "nothing" not in said.err
    line = [*given(files), "--output_dir", "b", "--epochs", "2", "--batch_size", "8"]
    assert main(line) == 0
    assert "the loss was still falling" in capsys.readouterr().err
    labels = [{"text": r["text"], "label": c} for r, c in zip(rows(40), "ab" * 20, strict=True)]
    line = [*given(files, jsonl(Path("n.jsonl"), *labels)), "--output_dir", "c"]
    assert main([*line, "--epochs", "1", "--learning_rate", "1e-9"]) == 0
    assert "always naming the largest class" in capsys.readouterr().err


def test_many_classes_make_a_short_table(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many = [{"text": f"{c} {n}", "label": c * 3} for n in range(4) for c in "abcdefghijkl"]
    assert main([*given(files, jsonl(tmp_path / "m.jsonl", *many)), "--held_out", "0.25"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 3 + 8 and "as aaa" not in said.out
    assert "4 classes more are in summary.json" in said.err


# -- without a model ----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tiny model in place of the small one, with texts; what was made is listed."""
    made: list[str] = []

    def make(run: Any, seed: int, fast: bool = False) -> Path:
        folder, texts = run.path / small_model.MODEL, small_model.data_files(run.path)
        if not folder.is_dir():
            made.append("model")
            run.save(lambda new: (model(2).save_pretrained(new), tokenizer().save_pretrained(new)),
                     small_model.MODEL)  # fmt: skip
            texts["retain"].parent.mkdir(exist_ok=True)
            sides = zip(("harmful", "retain"), SIDES, strict=True)
            for (name, side), (ending, n) in [
                (s, e) for s in list(sides) for e in (("", 80), ("_held_out", 20))
            ]:
                own = [{"text": r["text"]} for r in rows(2 * n, len(ending)) if r["label"] == side]
                jsonl(texts[name + ending], *own, {"text": " "})
        return folder

    monkeypatch.setattr(small_model, "small_language_model", make)
    return made


def test_without_a_model(
    small: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMAND) == 0
    out = tmp_path / "onepass-discriminator"
    facts = json.loads((out / "summary.json").read_text())
    assert facts["classes"] == ["code", "prose"] and facts["held_out_accuracy"] > 0.9
    assert facts["pretrained_model"] == str(out / "base-model")
    assert json.loads((out / "run.json").read_text())["flags"]["learning_rate"] == 5e-3
    before = contents(out)
    assert main(COMMAND) == 0 and contents(out) == before and small == ["model"]
    assert main([*COMMAND, "--overwrite", "--epochs", "1"]) == 0 and small == ["model"] * 2
    capsys.readouterr()


# -- interruptions ------------------------------------------------------------------------------

STEPS = ["train_command.load_policy", "discriminator._fit", "heads.save_discriminator"]


@pytest.mark.parametrize("step", [*STEPS, "curves", "summary"])
def test_ctrl_c_leaves_nothing_half_written(
    step: str, files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    where = {
        "curves": "onepass.training.curves.write_curves",
        "summary": "onepass.training.run_folder.RunFolder.write_json",
    }.get(step, f"onepass.pplm.{step}")
    line = given(files, None, "--output_dir", "out")
    if step == "summary":  # run.json is written by the same, at the start
        assert main(line) == 0
        (tmp_path / "out/summary.json").unlink()

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    assert main(line) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "onepass pplm: interrupted"
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    left = {p.name for p in (tmp_path / "out").glob("*")}
    assert not [name for name in left if "partial" in name] and "summary.json" not in left
    if step in STEPS[:2]:
        assert not left
    if (tmp_path / "out/head.safetensors").exists():
        heads.load_head("out")
    assert main(line) == 0  # goes on, and comes to the end
    assert (tmp_path / "out/summary.json").exists()


def test_an_earlier_head_stays_until_there_is_another(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = given(files, None, "--output_dir", "out", "--overwrite")
    assert main(line) == 0
    before = contents(tmp_path / "out")

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onepass.pplm.discriminator._fit", interrupt)
    assert main([*line, "--seed", "1"]) == 130
    assert contents(tmp_path / "out") == before


def test_a_killed_run_leaves_whole_files(files: Path, tmp_path: Path) -> None:
    """Killed in the middle of writing the head's file."""
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from onepass.cli import main\n"
        "Path.write_bytes = lambda path, raw: (open(path, 'wb', 0).write(raw[:99]),\n"
        "    os.kill(os.getpid(), signal.SIGKILL))\n"
        "main(sys.argv[1:])\n"
    )
    line = given(files, None, "--output_dir", str(tmp_path / "out"))
    env = os.environ | {"PYTHONPATH": str(ROOT / "python"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script, *line], capture_output=True, env=env)
    assert done.returncode == -signal.SIGKILL
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {n for n in names if not n.endswith(".partial")} == {"run.json"} and len(names) == 2
    assert main(line) == 0  # the folder's lock went with the process
    assert heads.load_head(tmp_path / "out")[0].class_size == 2
    assert not [p for p in (tmp_path / "out").iterdir() if p.name.endswith(".partial")]


def test_the_page_tells_every_flag() -> None:
    from dataclasses import fields

    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.split("## onepass pplm\n")[1].split("\n## ")[0]
    own = train_command.FLAGS[1:]
    named = [f.name for kind in own for f in fields(kind)] + ["model"]
    assert [name for name in named if f"`--{name}" not in section] == []
