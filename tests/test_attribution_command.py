"""`onepass attribute`: what it refuses, writes and prints, going on after an interruption, and the
model that it makes where none is named.
"""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tqdm import tqdm

from onepass.attribution import Attribution, command, load_all, methods, names
from onepass.cli import main
from onepass.cli.errors import Parser
from onepass.demo.train import one_thread
from onepass.training import small_model
from onepass.training.models import weights_digest
from support.tiny_language_model import model as small
from support.tiny_language_model import save, tokenizer
from support.tiny_models import D

TEXTS = ["the old barn", "a red, wide mill", "near the river"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/."""
    folder = tmp_path_factory.mktemp("tiny")
    save(folder, n_layers=2)
    return folder


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


def given(files: Path, *texts: str) -> list[str]:
    return ["attribute", "--model", str(files / "model"), "--text", *(texts or TEXTS[:1])]


def write(folder: Path, name: str, *rows: Any) -> str:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


# -- what is refused ----------------------------------------------------------------------------

WRONG: list[tuple[str, Callable[[Path, Path], list[str]], str]] = [
    ("no text", lambda f, t: ["--model", str(f / "model")], "--text: got nothing"),
    ("empty text", lambda f, t: given(f, " ")[1:], "--text: the text is empty"),
    ("no such folder", lambda f, t: ["--model", "./none", "--text", "a b"], "no such folder"),
    ("an empty name", lambda f, t: ["--model", "", "--text", "a b"], "--model: got an empty name"),
    ("method", lambda f, t: [*given(f)[1:], "-a", "salience"], "did you mean saliency?"),
    ("target", lambda f, t: [*given(f)[1:], "-fn", "probabilty"], "did you mean probability?"),
    ("scores", lambda f, t: [*given(f)[1:], "--step_scores", "logit,entropi"], "allowed: logit"),
    ("contrast", lambda f, t: [*given(f)[1:], "-fn", "kl_divergence"], "--contrast_text, another"),
    ("tokens in the place of a text", lambda f, t: [
        *given(f)[1:], "--step_scores", "kl_divergence", "--contrast_generated", "a",
    ], "kl_divergence has nothing to compare with\n  --contrast_text, another text\n"),
    ("a contrast in vain", lambda f, t: [*given(f)[1:], "--contrast_text", "a b"],
     "--contrast_text: is read by contrastive step functions, of which none is asked for"),
    ("bytes", lambda f, t: [*given(f)[1:], "--text", "\udcff"], "--text: '\\udcff' is not UTF-8"),
    ("bytes that follow", lambda f, t: [*given(f)[1:], "-g", "\udcff"], "'\\udcff' is not UTF-8"),
    ("nowhere", lambda f, t: [*given(f)[1:], "-o", write(t, "x", "") + "/y.jsonl"],
     "name a file in a folder of yours with --save_path FILE"),
    ("baseline", lambda f, t: [*given(f)[1:], "--baseline", "unk"], "allowed: zeros, pad"),
    ("steps", lambda f, t: [*given(f)[1:], "--n_steps", "0"], "--n_steps: got 0"),
    ("batch", lambda f, t: [*given(f)[1:], "-bs", "0"], "--batch_size: got 0"),
    ("options", lambda f, t: [*given(f)[1:], "--attribution_kwargs", "{"], "is not JSON"),
    ("an option", lambda f, t: [*given(f)[1:], "--attribution_kwargs", '{"topp": 1}'], "top_p?"),
    ("an option's type", lambda f, t: [*given(f)[1:], "--attribution_kwargs", '{"top_k": 5.0}'],
     "--attribution_kwargs: top_k must be a whole number: got 5.0"),
    ("an option's range", lambda f, t: [*given(f)[1:], "--attribution_kwargs", '{"top_p": 5}'],
     "--attribution_kwargs: top_p must be between 0 and 1: got 5"),
    ("an option in vain", lambda f, t: [*given(f)[1:], "--attribution_kwargs", '{"base": "2"}'],
     "base is read by crossentropy, of which none is asked for"),
    ("no object", lambda f, t: [*given(f)[1:], "--attribution_kwargs", "[]"], "wanted an object"),
    ("too many follow", lambda f, t: [*given(f)[1:], "-g", "a", "b"], "got 2, wanted one for each"),
    ("nothing follows", lambda f, t: [*given(f)[1:], "-g", ""], "--generated: the text is empty"),
    ("written and given", lambda f, t: [*given(f)[1:], "-g", "a", "--max_new_tokens", "3"],
     "exclude each other"),
    ("two sources", lambda f, t: [*given(f)[1:], "--file", "x.txt"], "exclude each other"),
    ("no file", lambda f, t: ["--model", str(f / "model"), "--file", str(t / "x.txt")],
     "no such file"),
    ("bad entry", lambda f, t: [
        "--model", str(f / "model"), "--file",
        write(t, "x.jsonl", {"text": "a b"}, {"text": "a", "generated": 3}),
    ], "x.jsonl:2: 'generated' is no string"),
    ("ending", lambda f, t: [*given(f)[1:], "-o", str(t / "x.txt")], ".json or .jsonl"),
    ("ending of the picture", lambda f, t: [*given(f)[1:], "--viz_path", "x.svg"], ".html or .png"),
    ("a folder", lambda f, t: [*given(f)[1:], "-o", str(folder(t / "d.json"))], "is a folder"),
    ("there already", lambda f, t: [*given(f)[1:], "-o", write(t, "x.json", "{}")],
     "--overwrite replaces it"),
    ("under a file", lambda f, t: [*given(f)[1:], "-o", write(t, "x", "") + "/y.json"],
     "is a file, not a folder"),
    ("another's lines", lambda f, t: [*given(f)[1:], "-o", write(t, "x.jsonl", {"a": 1})],
     "was made by another program"),
    ("no lines", lambda f, t: [*given(f)[1:], "-o", write(t, "x.jsonl", "a")],
     "was made by another program"),
    ("another's torn line", lambda f, t: [*given(f)[1:], "-o", torn(t)],
     "was made by another program"),
    ("several in one", lambda f, t: [*given(f, *TEXTS)[1:], "-o", str(t / "x.json")],
     "of 3 wanted .jsonl"),
    ("several in a picture", lambda f, t: [*given(f, *TEXTS)[1:], "--viz_path", "x.png"],
     "of 3 wanted .html"),
    ("fast with a model", lambda f, t: [*given(f)[1:], "--fast"], "leave it out with --model"),
    ("adapter alone", lambda f, t: ["--adapter", "x"], "--adapter: wanted --model with it"),
    ("no adapter", lambda f, t: [*given(f)[1:], "--adapter", str(t)], "no adapter_config.json"),
]  # fmt: skip


def torn(folder: Path) -> str:
    """Another program's only line, without an end."""
    (folder / "x.jsonl").write_text('{"text": "mine"')
    return str(folder / "x.jsonl")


def folder(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("arguments", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG]
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: Any, message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    line = arguments(files, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr("onepass.attribution.command.load_policy", None)
    code = main(["attribute", *line])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert message in said.err and len(said.err.splitlines()) <= 3, said.err
    assert contents(tmp_path) == before


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def test_what_only_the_model_tells_is_one_line_too(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for line, told in (
        (given(files, "a" * 65), "text makes 65 tokens, more than the 64"),
        ([*given(files), "-s", "12"], "1 <= start < end <= 12"),
        ([*given(files), "-fn", "top_p_size"], "has no gradient"),
    ):
        assert main([*line, "--hide"]) == 2
        assert told in capsys.readouterr().err
    bad = tmp_path / "model"
    bad.mkdir()
    (bad / "config.json").write_text("{}")
    assert main(["attribute", "--model", str(bad), "--text", "a b"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


# -- what is written and printed ----------------------------------------------------------------


def test_one_text(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, page = tmp_path / "new" / "x.json", tmp_path / "new" / "x.html"
    line = [*given(files), "-a", "integrated_gradients", "--n_steps", "4", "-fn", "logit"]
    line += ["--step_scores", "entropy,probability", "-g", " near", "-bs", "3"]
    assert main([*line, "-o", str(out), "--viz_path", str(page)]) == 0
    said = capsys.readouterr()
    found = Attribution.load(out)
    assert found.matrix.shape == (16, 5) and found.batch_size == 3 and found.n_steps == 4
    assert list(found.scores) == ["logit", "entropy", "probability"]
    assert "integrated gradients (4 steps from pad) of logit, sum" in said.out
    assert "\ndelta " in said.out and "\x1b" not in said.out
    assert f"wrote {out}" in said.err and "3 rows at once on cpu" in said.err
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in out.parent.iterdir()) == ["x.html", "x.json"]
    picture = tmp_path / "x.png"
    line += ["-o", str(out), "--overwrite", "--viz_path", str(picture), "--hide", "-bs", "1"]
    assert main(line) == 0
    said = capsys.readouterr()
    assert "1 row at once on cpu" in said.err
    assert said.out == "" and picture.read_bytes().startswith(b"\x89PNG")


def test_json_on_stdout_is_what_is_saved(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*given(files), "--json", "-o", str(tmp_path / "x.json")]) == 0
    printed = Attribution.from_dict(json.loads(capsys.readouterr().out))
    saved = Attribution.load(tmp_path / "x.json")
    assert torch.equal(printed.matrix.nan_to_num(7), saved.matrix.nan_to_num(7))


def test_files_are_there_before_a_table_is(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: Any) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("onepass.attribution.view.show", gone)
    line = [*given(files, *TEXTS), "-o", str(tmp_path / "x.jsonl")]
    assert main([*line, "--viz_path", str(tmp_path / "x.html")]) == 1
    assert len(load_all(tmp_path / "x.jsonl")) == 3
    assert (tmp_path / "x.html").read_text().count("<table>") == 3


def test_without_stdout(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it under `>&-`
    assert main([*given(files), "-o", str(tmp_path / "x.json")]) == 0
    sys.stdout.close()
    assert Attribution.load(tmp_path / "x.json").text == TEXTS[0]
    assert "Error" not in capsys.readouterr().err


def test_what_is_given_twice_is_taken_together(files: Path, tmp_path: Path) -> None:
    line = [*given(files), "--text", TEXTS[1], "-g", " a", "-g", " b", "--step_scores", "logit"]
    line += ["--step_scores", "entropy", "pcxmi,logit", "--contrast_text", "a red", "--hide"]
    assert main([*line, "-o", str(tmp_path / "x.jsonl")]) == 0
    found = load_all(tmp_path / "x.jsonl")
    assert [(a.text, a.targets) for a in found] == [(TEXTS[0], [" ", "a"]), (TEXTS[1], [" ", "b"])]
    assert list(found[0].scores) == ["probability", "logit", "entropy", "pcxmi"]


def test_inseqs_names_are_the_same_flags(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours = ["--text", TEXTS[0], "--generated", " near", "--reduction", "sum", "--batch_size", "2"]
    theirs = ["--input_texts", TEXTS[0], "--generated_texts", TEXTS[0] + " near"]
    theirs += ["--attribution_aggregators", "sum", "-bs", "2", "--attribution_method", "saliency"]
    theirs += ["--attributed_fn", "probability", "--dev", "cpu"]
    printed = []
    for flag, line in (("--model", ours), ("--model_name_or_path", theirs)):
        assert main(["attribute", flag, str(files / "model"), *line]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_texts_of_a_file_and_a_data_set(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": TEXTS[0], "generated": " near"}, {"text": TEXTS[1]}]
    model = ["attribute", "--model", str(files / "model"), "--hide"]
    out = tmp_path / "x.jsonl"
    assert main([*model, "--file", write(tmp_path, "in.jsonl", *rows), "-o", str(out)]) == 0
    assert [len(a.targets) for a in load_all(out)] == [5, len(TEXTS[1]) - 1]
    folder(tmp_path / "set")
    write(tmp_path / "set", "train.jsonl", *[{"body": text} for text in TEXTS])
    line = [*model, "--dataset_name", str(tmp_path / "set")]
    assert main([*line, "--input_text_field", "text"]) == 2
    assert "--input_text_field: no texts in 'text', the dataset has body" in capsys.readouterr().err
    line += ["--input_text_field", "body", "-o", str(tmp_path / "y.jsonl")]
    assert main(line) == 0
    assert [a.text for a in load_all(tmp_path / "y.jsonl")] == TEXTS


# -- going on -----------------------------------------------------------------------------------


class Counted:
    """Attributes, counts, and stops at text `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.real, self.stop, self.texts = methods.attribute, stop, []  # type: Any, int | None, list[str]

    def __call__(self, model: Any, tokenizer: Any, text: str, **how: Any) -> Attribution:
        if len(self.texts) == self.stop:
            raise KeyboardInterrupt
        self.texts.append(text)
        return self.real(model, tokenizer, text, **how)


def test_finished_texts_are_not_done_again(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    line = [*given(files, *TEXTS, TEXTS[0]), "--hide"]  # one of them twice
    assert main([*line, "-o", str(whole)]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(methods, "attribute", Counted(stop=2))
        assert main([*line, "-o", str(out)]) == 130
    assert len(load_all(out)) == 2
    with out.open("a") as file:
        file.write('{"program": "onepass attr')  # as a kill leaves it
    again = Counted()
    monkeypatch.setattr(methods, "attribute", again)
    capsys.readouterr()
    assert main([*line, "-o", str(out), "--viz_path", str(tmp_path / "x.html")]) == 0
    assert again.texts == TEXTS[2:] and "2 of 3 texts are in" in capsys.readouterr().err
    assert out.read_bytes() == whole.read_bytes()
    assert (tmp_path / "x.html").read_text().count("<table>") == 3
    monkeypatch.setattr("onepass.attribution.command.load_policy", None)  # nothing is left to do
    assert main([*line, "-o", str(out)]) == 0
    capsys.readouterr()
    assert main([*line, "-o", str(out), "-fn", "logit"]) == 2
    told = capsys.readouterr().err
    assert "--attributed_fn: got 'logit', but" in told and "begun with 'probability'" in told
    assert out.read_bytes() == whole.read_bytes()


def test_dropout_is_seeded_unless_its_seed_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes: dict[str, Any] = {"vocab_size": 260, "n_embd": D, "n_layer": 1, "n_head": 4}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, resid_pdrop=0.4)).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    line = [*given(tmp_path, *TEXTS[:2]), "--hide", "--step_scores", "mc_dropout_prob_avg", "-o"]
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    assert main([*line, str(whole)]) == 0
    out.write_bytes(whole.read_bytes()[:-20])
    assert main([*line, str(out)]) == 0
    assert out.read_bytes() == whole.read_bytes()
    line += [str(out), "--attribution_kwargs"]
    capsys.readouterr()
    assert main([*line, '{"seed": 1}']) == 2
    assert "'seed': 1}, but" in capsys.readouterr().err
    assert main([*line, '{"seed": null}', "--overwrite"]) == 0
    assert out.read_bytes() != whole.read_bytes()


def test_a_line_cut_short_is_cut_off_only_when_another_follows(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole.jsonl", tmp_path / "x.jsonl"
    line = [*given(files, *TEXTS), "--hide", "-o"]
    assert main([*line, str(whole)]) == 0
    wanted = whole.read_bytes()
    begin = wanted.index(b"\n") + 1
    for n in (60, begin - 2, begin + 1, begin + 200, len(wanted) - 2):
        out.write_bytes(wanted[:n])
        with monkeypatch.context() as patch:  # the command fails for another reason
            patch.setattr(command, "load_policy", Counted(stop=0))
            assert main([*line, str(out)]) == 130
        assert out.read_bytes() == wanted[:n]
        assert main([*line, str(out)]) == 0
        assert out.read_bytes() == wanted
    again = Counted()
    monkeypatch.setattr(methods, "attribute", again)
    for n in (begin - 1, len(wanted) - 1):  # lines that lack their end alone
        out.write_bytes(wanted[:n])
        again.texts.clear()
        assert main([*line, str(out)]) == 0
        assert again.texts == (TEXTS[1:] if n < begin else [])
        assert out.read_bytes() == (wanted if n < begin else wanted[:-1])


def test_what_another_command_writes_meanwhile_stays(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, real = tmp_path / "x.jsonl", methods.attribute
    line = ["--hide", "-o", str(out)]

    def slowly(*args: Any, **how: Any) -> Attribution:
        monkeypatch.setattr(methods, "attribute", real)
        assert main([*given(files, *TEXTS[:2]), *line, "--overwrite"]) == 0
        return real(*args, **how)

    for more in ([], ["--overwrite"]):
        monkeypatch.setattr(methods, "attribute", slowly)
        assert main([*given(files, TEXTS[2]), *line, *more]) == 1
        assert "something else has written to" in capsys.readouterr().err
        assert [a.text for a in load_all(out)] == TEXTS[:2]
    assert main([*given(files, TEXTS[2]), *line]) == 0
    assert [a.text for a in load_all(out)] == TEXTS


def test_a_bad_text_is_told_and_the_others_are_done(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "x.jsonl", tmp_path / "x.html"
    line = [*given(files, TEXTS[0], "a", TEXTS[1]), "-o", str(out), "--viz_path", str(page)]
    for n_new in (2, 0):
        assert main([*line, "--json"]) == 1
        said = capsys.readouterr()
        assert "text 2 of 3: text has one token" in said.err
        assert said.err.splitlines()[-1].endswith("1 of 3 texts could not be attributed")
        assert [a.text for a in load_all(out)] == TEXTS[:2]
        assert said.out == out.read_text()  # those that were finished too
        assert (f"wrote {out}" in said.err) == (n_new > 0)
        assert page.read_text().count("<table>") == 2
        page.unlink()
    assert main([*given(files, "a", "b"), "--viz_path", str(tmp_path / "y.html")]) == 1
    assert "2 of 2 texts" in capsys.readouterr().err and not (tmp_path / "y.html").exists()


@pytest.mark.parametrize("n_texts", [1, 3])
def test_one_bar_over_all_texts(
    n_texts: int, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bars = []

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, n_steps: int, done: int) -> None:
            super().__init__(total=n_steps, file=sys.stderr)
            bars.append(self)

    for module in (command, methods):
        monkeypatch.setattr(module, "progress_bar", Bar)
    assert main(given(files, *TEXTS[:n_texts])) == 0
    assert [(bar.n, bar.total) for bar in bars] == [(11, 11) if n_texts == 1 else (3, 3)]
    said = capsys.readouterr()
    assert said.out.count("saliency of probability") == n_texts and "it/s" not in said.out


def test_results_are_not_kept(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Attribution]] = []
    most, real = [], methods.attribute

    def attribute(*args: Any, **how: Any) -> Attribution:
        most.append(sum(one() is not None for one in made))
        found = real(*args, **how)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(methods, "attribute", attribute)
    line = given(files, *TEXTS, "the wide barn")
    assert main([*line, "-o", str(tmp_path / "x.jsonl")]) == 0
    assert most == [0, 1, 1, 1]
    del made[:], most[:]
    monkeypatch.setattr(Attribution, "from_dict", None)  # nor are those that were finished
    assert main([*line, "-o", str(tmp_path / "x.jsonl"), "--json"]) == 0
    assert main([*line, "--hide", "--viz_path", str(tmp_path / "x.html")]) == 0
    assert most == [0, 1, 2, 3]


def test_going_on_with_what_follows_each(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, again = tmp_path / "x.jsonl", Counted()
    line = [*given(files, *TEXTS[:2]), "--hide", "-o", str(out), "-g", " near"]
    assert main([*line, " or"]) == 0
    monkeypatch.setattr(methods, "attribute", again)
    assert main([*line, " and"]) == 0 and again.texts == TEXTS[1:2]
    assert [len(a.targets) for a in load_all(out)] == [5, 3, 4]
    assert main([*given(files, TEXTS[0]), "--hide", "-o", str(out)]) == 0  # and with nothing
    assert again.texts == [TEXTS[1], TEXTS[0]]


def test_every_setting_must_be_the_same(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.jsonl"
    assert main([*given(files), "--hide", "-o", str(out)]) == 0
    more = ["--n_steps", "7", "--baseline", "zeros"]  # which no saliency reads
    assert main([*given(files), "--hide", "-o", str(out), *more]) == 0
    row = json.loads(out.read_text())
    names = set(row["asked"]) - {"generated", "weights"}
    assert len(names) == 17
    for name in names:
        other = row | {"asked": row["asked"] | {name: "another"}}
        out.write_text(json.dumps(other) + "\n")
        capsys.readouterr()
        assert main([*given(files), "--hide", "-o", str(out)]) == 2, name
        assert f"--{name}: got " in capsys.readouterr().err


def test_other_weights_under_the_same_name_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, n_layers=2)
    out = tmp_path / "x.jsonl"
    assert main([*given(tmp_path), "--hide", "-o", str(out)]) == 0
    before = out.read_bytes()
    made = small(2)
    with torch.no_grad():
        made.lm_head.weight[3, 5] += 1
    made.save_pretrained(tmp_path / "model")
    capsys.readouterr()
    assert main([*given(tmp_path, *TEXTS), "--hide", "-o", str(out)]) == 2
    assert f"--model: got other weights than those that {str(out)!r}" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert main([*given(tmp_path, *TEXTS), "--hide", "-o", str(out), "--overwrite"]) == 0
    assert len(load_all(out)) == 3


def test_the_digest_of_weights(device: str) -> None:
    made = small()
    wanted = weights_digest(made.bfloat16())
    assert weights_digest(made.to(device)) == weights_digest(made.float()) == wanted
    assert weights_digest(small().bfloat16().double()) == wanted
    for name in ("model.layers.0.input_layernorm.weight", "lm_head.weight"):
        other = small().bfloat16()
        with torch.no_grad():
            other.get_parameter(name).flatten()[-1] += 1
        assert weights_digest(other) != wanted


def test_overwrite_begins_anew(files: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.jsonl"
    assert main([*given(files, *TEXTS), "-o", str(out), "--hide"]) == 0
    assert main([*given(files), "-o", str(out), "--overwrite", "--hide", "-fn", "logit"]) == 0
    assert [a.target for a in load_all(out)] == ["logit"]


# -- models -------------------------------------------------------------------------------------


def test_an_encoder_decoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    config = hf.T5Config(vocab_size=260, decoder_start_token_id=0, eos_token_id=2, **sizes)
    hf.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    line = ["attribute", "--model", str(tmp_path), "--text", TEXTS[0]]
    assert main(line) == 2
    assert "needs generated, or max_new_tokens" in capsys.readouterr().err
    assert main([*line, "--max_new_tokens", "3"]) == 0
    assert f"the encoder read the first {len(TEXTS[0])}" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecated
def test_an_adapter(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft

    made = hf.AutoModelForCausalLM.from_pretrained(files / "model")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(made, config).save_pretrained(tmp_path)
    for more in ([], ["--adapter", str(tmp_path)]):
        assert main([*given(files), *more]) == 0
    tables = capsys.readouterr().out.split("saliency")
    assert len(tables) == 3 and tables[1] != tables[2]


def test_without_a_model_a_small_one_is_made_once(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That `small_language_model` makes it is another test's; here one that is there is taken."""
    asked = []

    def made(run: Any, seed: int, fast: bool) -> Path:
        asked.append((run.path, seed, fast))
        return files / "model"

    monkeypatch.setattr(small_model, "small_language_model", made)
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["attribute", "--fast"]) == 0
        said = capsys.readouterr()
        assert said.out.startswith("saliency of probability") and "'Return" not in said.out[:80]
    assert asked == [(Path("onepass-attribute"), 42, True)] * 2
    for text in TEXTS[:2]:  # a file of the model made here is gone on with
        assert main(["attribute", "--fast", "-o", str(files / "x.jsonl"), "--text", text]) == 0
    assert len(load_all(files / "x.jsonl")) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["onepass-attribute"]
    assert main(["attribute"]) == 2  # the one there was made with --fast
    assert "holds the smaller of the models made here\n  add --fast, or" in capsys.readouterr().err
    assert main(["attribute", "--text", TEXTS[0], "--output_dir", str(tmp_path / "b")]) == 0


def test_the_help_and_the_page_name_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    chosen = (*names.METHODS, *names.BASELINES, *names.REDUCTIONS, *names.STEP_FUNCTIONS)
    assert all(name in told for name in chosen)
    page = (Path(__file__).resolve().parents[1] / "docs" / "cli.md").read_text()
    parser = Parser(prog="onepass attribute")
    command.add_arguments(parser)
    for flag in set(parser._flags()) - {"-h", "--help", "-m", "--hide_attributions"}:
        assert f"`{flag}" in page, flag
    for name in (*names.METHODS, *names.STEP_FUNCTIONS, *names.OPTIONS):
        assert f"`{name}`" in page or f'"{name}"' in page, name


def test_texts_that_came_before_and_texts_of_others_are_told(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "x.jsonl"
    assert main([*given(files, TEXTS[0], TEXTS[0]), "-o", str(out), "--hide"]) == 0
    assert "1 texts came before: each is done once" in capsys.readouterr().err
    assert main([*given(files, TEXTS[1]), "-o", str(out), "--hide"]) == 0
    assert f"{out} has 1 other texts, which stay in it" in capsys.readouterr().err
    assert len(load_all(out)) == 2
