"""`onepass generate pplm`: what it refuses, the texts it writes, their measures and their places in
a terminal, and the small model that it makes where none is named."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

import torch

import onepass.pplm as PPLM
from onepass.cli import main
from onepass.demo.train import one_thread
from onepass.pplm import command, train_command, view
from onepass.training import small_model
from support import tiny_pplm
from support.tiny_pplm import BAG, OTHER, D

ROOT = Path(__file__).resolve().parents[1]
META = {"class_vocab": {"calm": 0, "loud": 1, "wild": 2}, "default_class": 1}


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


def save(folder: Path) -> None:
    tiny_pplm.model().save_pretrained(folder)
    tiny_pplm.tokenizer().save_pretrained(folder)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with model/, head.safetensors of it, wide.safetensors, war.txt, space.txt."""
    folder = tmp_path_factory.mktemp("pplm")
    save(folder / "model")
    own = META | {"pretrained_model": str(folder / "model")}
    PPLM.save_discriminator(tiny_pplm.head(3), path=folder, file_name="head.safetensors", args=own)
    wide = PPLM.ClassificationHead(2, D + 1)
    PPLM.save_discriminator(
        wide, path=folder, file_name="wide.safetensors", args={"default_class": 0}
    )
    for name, words in (("war", BAG), ("space", OTHER), ("none", ["two words"]), ("void", [])):
        (folder / f"{name}.txt").write_text("\n".join(words), encoding="utf-8")
    return folder


def asked(files: Path, *flags: str) -> list[str]:
    model = ["--model", str(files / "model"), "--prompt", "the w1 w2", "--length", "6"]
    return ["generate", "pplm", *model, "--device", "cpu", *flags]


def bag(files: Path) -> list[str]:
    return ["-B", str(files / "war.txt")]


def facts_of(capsys, *flags: str) -> dict[str, Any]:
    assert main([*flags, "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


# -- what is refused ----------------------------------------------------------------------------

WRONG: list[tuple[str, Callable[[Path], list[str]], str]] = [
    ("neither", lambda f: asked(f), "neither -B (a bag of words) nor -D (a discriminator)"),
    ("bag", lambda f: asked(f, "-B", "computer"), "did you mean computers?"),
    ("second bag", lambda f: asked(f, "-B", "space;spice"), "did you mean space?"),
    ("no bag", lambda f: asked(f, "-B", ";"), "no bag of words is named"),
    ("head", lambda f: asked(f, "-D", "sentiment"), "none is downloaded"),
    ("unknown head", lambda f: asked(f, "-D", "sentient"), "no head 'sentient'"),
    ("generic", lambda f: asked(f, "-D", "generic"), "--discrim_weights"),
    ("no class", lambda f: asked(f, "-D", str(f / "head.safetensors"), "--class_label", "clam"),
     "--class_label: no class 'clam': wanted calm (0)"),
    ("class of nothing", lambda f: asked(f, *bag(f), "--class_label", "1"), "wanted -D"),
    ("weights of nothing", lambda f: asked(f, *bag(f), "--discrim_weights", "x"), "wanted -D"),
    ("width", lambda f: asked(f, "-D", str(f / "wide.safetensors")), "of 33 numbers"),
    ("no head", lambda f: asked(f, "-D", str(f / "war.txt")), "wanted a head as .safetensors"),
    ("several tokens", lambda f: asked(f, "-B", str(f / "none.txt")), "no word is one token"),
    ("empty", lambda f: asked(f, "-B", str(f / "void.txt")), "no word is one token"),
    ("model", lambda f: ["generate", "pplm", "-M", "./none", *bag(f)], "no such folder: './none'"),
    ("two prompts", lambda f: asked(f, *bag(f), "--uncond"), "exclude each other"),
    ("empty prompt", lambda f: asked(f, *bag(f), "--prompt", " "), "--prompt: the text is empty"),
    ("no prompts", lambda f: [*asked(f, *bag(f))[:4], *bag(f), "--prompts", str(f / "void.txt")],
     "--prompts"),
    ("length", lambda f: asked(f, *bag(f), "--length", "0"), "--length: got 0"),
    ("long", lambda f: asked(f, *bag(f), "--length", "100"), "the model has 64"),
    ("long for PPLM.jl", lambda f: asked(f, *bag(f), "--length", "100", "--variant", "hidden"),
     "the model has 64"),
    ("top_k", lambda f: asked(f, *bag(f), "--top_k", "-1"), "--top_k: got -1"),
    ("gm_scale", lambda f: asked(f, *bag(f), "--gm_scale", "2"), "--gm_scale: got 2.0"),
    ("temperature", lambda f: asked(f, *bag(f), "--temperature", "0"), "--temperature: got 0.0"),
    ("decay", lambda f: asked(f, *bag(f), "--decay"), "--window_length with it"),
    ("variant", lambda f: asked(f, *bag(f), "--variant", "julia"), "uber, hidden, past, probs"),
    ("variant's", lambda f: asked(f, *bag(f), "--variant", "past", "--gamma", "1"), "variant uber"),
    ("uber's", lambda f: asked(f, *bag(f), "--pool", "mean"), "PPLM.jl's variants"),
    ("probs", lambda f: asked(f, "-D", str(f / "head.safetensors"), "--variant", "probs"),
     "sees no probabilities"),
    ("both", lambda f: asked(f, *bag(f), "-D", str(f / "head.safetensors"), "--variant", "past"),
     "takes -B or -D"),
    ("suffix", lambda f: asked(f, *bag(f), "-o", "x.txt"), "ends in .json"),
    ("exists", lambda f: asked(f, *bag(f), "-o", str(f / "model" / "config.json")), "--overwrite"),
    ("option", lambda f: asked(f, "--bag_of_word", "x"), "--bag_of_words"),
    ("method", lambda f: ["generate", "plm"], "did you mean pplm?"),
    ("no method", lambda f: ["generate"], "got no method"),
    ("flag first", lambda f: ["generate", "--length", "3"], "flags follow the method"),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "told"), [case[1:] for case in WRONG], ids=[c[0] for c in WRONG])
def test_what_cannot_work_is_told_in_a_line(files, capsys, flags, told, caplog):
    assert main(flags(files)) == 2
    out, err = capsys.readouterr()
    assert out == "" and told in err and len(err.strip().splitlines()) <= 3


def test_a_head_that_names_no_model_wants_one(tmp_path, capsys):
    file = PPLM.save_discriminator(tiny_pplm.head(3), path=tmp_path, args=META)
    assert main(["generate", "pplm", "-D", str(file)]) == 2
    assert "does not name the one it is of" in capsys.readouterr().err


# -- texts --------------------------------------------------------------------------------------


def test_a_bag(files, capsys):
    facts = facts_of(capsys, *asked(files, *bag(files), "--stepsize", "0.2"))
    model, tokenizer = tiny_pplm.model(), tiny_pplm.tokenizer()
    ids = tokenizer.encode("<s> the w1 w2")
    plain, (steered,), _, losses = PPLM.full_text_generation(
        model, tokenizer, ids, bag_of_words=str(files / "war.txt"), stepsize=0.2, length=6
    )
    (entry,) = facts["texts"]
    assert entry["prompt"] == "the w1 w2"
    assert entry["unsteered"][0]["ids"] == plain[0, len(ids) :].tolist()
    (one,) = entry["steered"]
    assert one["ids"] == steered[0, len(ids) :].tolist()
    assert one["text"].split() == tokenizer.decode(one["ids"]).split()
    assert one["losses"] == [[pytest.approx(float(x)) for x in step] for step in losses[0]]
    assert one["bag_words"] == [w for w in one["text"].split() if w in BAG]
    assert [one["text"][a:b] for a, b in one["spans"]] == one["bag_words"]
    assert facts["mean"]["steered"]["bag_words"] == len(one["bag_words"])
    log_p = model(steered).logits[0, :-1].detach().log_softmax(-1)
    nats = -log_p.gather(1, steered[0, 1:, None])[len(ids) - 1 :].mean()
    assert one["nats_per_token"] == pytest.approx(float(nats), rel=1e-4)
    assert facts["class"] is None and one["class_probability"] is None


def test_a_head_brings_its_model(files, capsys):
    head = str(files / "head.safetensors")
    flags = [
        "generate",
        "pplm",
        "-D",
        head,
        "--class_label",
        "wild",
        "--prompt",
        "the w1",
        "--length",
    ]
    facts = facts_of(capsys, *flags, "6", "--stepsize", "0.3", "--gamma", "1", "--device", "cpu")
    assert facts["model"] == str(files / "model") and facts["class"] == "wild"
    (one,) = facts["texts"][0]["steered"]
    ids = torch.tensor([tiny_pplm.tokenizer().encode("<s> the w1") + one["ids"]])
    hidden = tiny_pplm.model()(ids, output_hidden_states=True).hidden_states[-1]
    wanted = tiny_pplm.head(3)(hidden.mean(1)).softmax(-1)[0, 2].detach()
    assert one["class_probability"] == pytest.approx(float(wanted), rel=1e-4)
    means = facts["mean"]
    assert means["steered"]["class_probability"] > means["unsteered"]["class_probability"]


def test_bags_and_head_together(files, capsys):
    both = [
        "-B",
        f"{files / 'war.txt'};{files / 'space.txt'}",
        "-D",
        str(files / "head.safetensors"),
    ]
    facts = facts_of(capsys, *asked(files, *both, "--window_length", "2", "--window_side", "last"))
    assert facts["class"] == "loud" and facts["settings"]["window_side"] == "last"
    assert len(facts["texts"][0]["steered"][0]["ids"]) == 6


@pytest.mark.parametrize("variant", ["hidden", "past", "probs"])
def test_variants_of_pplm_jl(files, capsys, variant):
    facts = facts_of(capsys, *asked(files, *bag(files), "--variant", variant, "--stepsize", "0.1"))
    how: Any = {"perturb": variant, "stepsize": 0.1, "top_k": 1, "max_length": 6}
    if variant == "probs":  # whose KL moves every token by Adam's whole step
        how["fusion_kl_scale"] = 0.0
    args = PPLM.pplm(bow_list=str(files / "war.txt"), **how)
    text = PPLM.sample_pplm(
        args, tokenizer=tiny_pplm.tokenizer(), model=tiny_pplm.model(), prompt="<s> the w1 w2",
        add_eos_start=False,
    )  # fmt: skip
    got = facts["texts"][0]["steered"][0]["text"]
    assert text.split() == ["<s>", "the", "w1", "w2", *got.split()]
    settings = facts["settings"]
    assert (settings["num_iterations"], settings["top_k"], settings["temperature"]) == (2, 50, 1.1)


def test_several_samples_of_several_prompts_are_seeded(files, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("the w1 w2\nw3\n", encoding="utf-8")
    flags = [*asked(files)[:4], "--prompts", str(prompts), "--length", "5", *bag(files), "--sample"]
    flags += ["--num_samples", "3", "--stepsize", "0.2", "--device", "cpu"]
    found = [facts_of(capsys, *flags, "--seed", seed)["texts"] for seed in ("1", "1", "2")]
    assert found[0] == found[1] != found[2]
    assert [entry["prompt"] for entry in found[0]] == ["the w1 w2", "w3"]
    texts = [one["text"] for entry in found[0] for one in entry["steered"]]
    assert len(texts) == 6 and len(set(texts)) > 3
    for name in ("hidden", "past"):
        again = facts_of(capsys, *flags, "--variant", name)["texts"]
        assert [len(entry["steered"]) for entry in again] == [3, 3]


def test_samples_that_would_be_one_are_one(files, capsys):
    facts = facts_of(capsys, *asked(files, *bag(files), "--num_samples", "4"))
    assert len(facts["texts"][0]["steered"]) == 1


@pytest.mark.parametrize("variant", ["uber", "past"])
def test_texts_end(files, capsys, variant):
    flags = asked(files, *bag(files), "--variant", variant)
    whole = facts_of(capsys, *flags)["texts"][0]["unsteered"][0]
    word = tiny_pplm.tokenizer().decode(whole["ids"][2:3])
    cut = facts_of(capsys, *flags, "--stop_strings", word)["texts"][0]["unsteered"][0]
    assert cut["ids"] == whole["ids"][: whole["ids"].index(whole["ids"][2]) + 1]


def test_unconditioned(files, capsys):
    flags = [*asked(files)[:4], "--uncond", "--length", "4", *bag(files)]
    (entry,) = facts_of(capsys, *flags)["texts"]
    assert entry["prompt"] == "" and len(entry["steered"][0]["ids"]) == 4


# -- files and the terminal ---------------------------------------------------------------------


def test_the_file_holds_what_json_prints_and_is_whole(files, tmp_path, capsys):
    file = tmp_path / "new" / "texts.json"
    facts = facts_of(capsys, *asked(files, *bag(files)), "-o", str(file))
    written = json.loads(file.read_text())
    assert {k: v for k, v in written.items() if k != "seconds"} == {
        k: v for k, v in facts.items() if k != "seconds"
    }
    assert [path.name for path in file.parent.iterdir()] == ["texts.json"]
    assert main(asked(files, *bag(files), "-o", str(file))) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(asked(files, *bag(files), "-o", str(file), "--overwrite", "--length", "2")) == 0
    again = json.loads(file.read_text())
    assert len(again["texts"][0]["steered"][0]["ids"]) == 2


def test_texts_stand_beside_each_other(files, capsys):
    assert main(asked(files, *bag(files), "--stepsize", "0.3")) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == "after 'the w1 w2'"
    assert lines[1].startswith("unsteered ") and "| steered: " in lines[1]
    assert "bag words" in out and "nats per token" in out and "\x1b" not in out
    assert err.splitlines()[-1].endswith(" s")


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_bag_words_are_coloured_on_a_terminal(files, monkeypatch):
    mean = {"bag_words": 1.0, "nats_per_token": 2.0}
    facts = {
        "bag_of_words": "war", "class": None,
        "mean": {"unsteered": mean, "steered": mean},
        "texts": [{
            "prompt": "the",
            "unsteered": [{"text": " w1 w2", "spans": []}],
            "steered": [{"text": " war w2", "spans": [(1, 4)]}],
        }],
    }  # fmt: skip
    monkeypatch.setenv("TERM", "xterm")
    for no_colour in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_colour)
        out = Terminal()
        monkeypatch.setattr("sys.stdout", out)
        command.show(facts)
        assert (view.START + "war" + view.END in out.getvalue()) == (not no_colour)
        assert "war w2" in out.getvalue().replace(view.START, "").replace(view.END, "")
    monkeypatch.delenv("NO_COLOR")
    assert view.colours(Terminal()) and not view.colours(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not view.colours(Terminal())


def test_columns_wrap_at_blanks_and_keep_their_width():
    texts = [
        view.Marked("one two three\nfour", [(4, 7), (8, 13)]),
        view.Marked("\u6f22\u5b57\u6f22\u5b57\u6f22\u5b57 \x1b[31m", []),
    ]
    lines = list(view.side_by_side(("a", "b"), texts, 23, colour=False))
    assert lines == [
        "a          | b",
        "-----------+-----------",
        "one two    | \u6f22\u5b57\u6f22\u5b57\u6f22",
        "three      | \u5b57",
        "four       | \\x1b[31m",
    ]
    coloured = list(view.side_by_side(("a", "b"), texts, 23, colour=True))
    assert coloured[2].startswith(f"one {view.START}two{view.END}    | ")
    assert coloured[3].startswith(f"{view.START}three{view.END}      | ")
    plain = [line.replace(view.START, "").replace(view.END, "") for line in coloured]
    assert plain == lines


def test_an_endless_word_is_broken():
    lines = list(view.side_by_side(("a",), [view.Marked("x" * 20, [(6, 12)])], 8, colour=True))
    assert [line.count("x") for line in lines[2:]] == [8, 8, 4]


# -- the small model ----------------------------------------------------------------------------


def test_without_a_model_a_small_one_is_made_once(tmp_path, monkeypatch, capsys):
    calls = []

    def make(prog: str, tokens: list[str]) -> int:
        folder = Path(tokens[1])
        calls.append(folder)
        save(folder / small_model.MODEL)
        meta = {"class_vocab": {"code": 0, "prose": 1}, "default_class": 1}
        meta |= {"pretrained_model": str(folder / small_model.MODEL)}
        head = tiny_pplm.head(2)
        PPLM.save_discriminator(head, path=folder, file_name="head.safetensors", args=meta)
        print("a table")
        return 0

    monkeypatch.setattr(train_command, "run", make)
    own = ["generate", "pplm", "--output_dir", str(tmp_path / "own"), "--length", "5"]
    facts = facts_of(capsys, *own)
    assert facts["class"] == "code" and len(facts["texts"][0]["steered"]) == 3
    assert facts["settings"]["variant"] == "past"
    assert facts_of(capsys, *own, "--gamma", "1")["settings"]["variant"] == "uber"
    assert facts["texts"][0]["prompt"] == "The"
    prose = facts_of(capsys, *own, "--class_label", "prose")
    assert prose["class"] == "prose" and len(calls) == 1
    words = tmp_path / "war.txt"
    words.write_text("war", encoding="utf-8")
    facts = facts_of(capsys, *own, "-B", str(words), "--variant", "past", "--prompt", "w1")
    assert facts["class"] is None and facts["settings"]["stepsize"] == 0.2
    other = tmp_path / "other"
    PPLM.save_discriminator(tiny_pplm.head(2), path=other, file_name="head.safetensors")
    assert main(["generate", "pplm", "--output_dir", str(other)]) == 2
    assert "of another model than the small one" in capsys.readouterr().err
    assert len(calls) == 1


def test_a_length_is_what_the_model_has_positions_for(files, capsys):
    model = [
        "--model",
        str(files / "model"),
        "--prompt",
        "the w1 w2",
        "--device",
        "cpu",
        *bag(files),
    ]
    assert main(["generate", "pplm", *model, "--json"]) == 0
    out, err = capsys.readouterr()
    (text,) = json.loads(out)["texts"][0]["steered"]
    places = tiny_pplm.model().config.max_position_embeddings
    assert len(text["ids"]) == places - 4 + 1  # the last needs no place; <s> the w1 w2
    assert f"--length {places - 3}: the model has {places} positions" in err
    assert main(["generate", "pplm", *model, "--length", "5000"]) == 2
    assert f"at most --length {places - 3}" in capsys.readouterr().err


def test_short_flags_in_every_spelling(files, capsys):
    words = files / "war.txt"
    wanted = facts_of(capsys, *asked(files, "-B", str(words)))["texts"]
    for spelling in (f"-B{words}", f"-B={words}", f"--bag_of_words={words}"):
        assert facts_of(capsys, *asked(files, spelling))["texts"] == wanted


def test_a_head_is_pooled_as_it_was_trained(files, tmp_path, capsys):
    own = META | {"pool": "mean", "pretrained_model": str(files / "model")}
    PPLM.save_discriminator(tiny_pplm.head(3), path=tmp_path, file_name="h.safetensors", args=own)
    flags = asked(files, "-D", str(tmp_path / "h.safetensors"), "--variant", "hidden")
    assert facts_of(capsys, *flags)["settings"]["pool"] == "mean"
    assert facts_of(capsys, *flags, "--pool", "sum")["settings"]["pool"] == "sum"


def test_what_steered_nothing_is_told(files, capsys):
    assert main(asked(files, *bag(files), "--stepsize", "1e-9")) == 0
    assert "steering changed no token: raise --stepsize" in capsys.readouterr().err
    assert main(asked(files, *bag(files), "--stepsize", "0.5")) == 0
    assert "changed no token" not in capsys.readouterr().err


def test_the_default_writes_code_where_the_model_alone_does_not(tmp_path):
    """No model and no head given: both are made, and the head turns the text, at no cost in how
    likely the model finds it."""
    own, file = tmp_path / "own", tmp_path / "texts.json"
    flags = ["--device", "cpu", "--length", "24", "--num_samples", "8", "--sample"]
    code = main(["generate", "pplm", *flags, "--output_dir", str(own), "--output", str(file)])
    assert code == 0
    found = json.loads((own / "summary.json").read_text(encoding="utf-8"))
    assert found["held_out_accuracy"] > 0.95
    mean = json.loads(file.read_text(encoding="utf-8"))["mean"]
    steered, unsteered = mean["steered"], mean["unsteered"]
    assert steered["class_probability"] > unsteered["class_probability"] + 0.3
    assert steered["nats_per_token"] < unsteered["nats_per_token"] + 0.5


def test_the_page_names_every_flag():
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page[page.index("## onepass generate") :].split("\n## ")[0]
    for kind in command.FLAGS[1:]:
        for name in kind.__dataclass_fields__:
            assert f"`--{name}" in section, name


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecated
@pytest.mark.parametrize("variant", ["uber", "hidden"])
def test_an_adapter(files, tmp_path, capsys, variant):
    peft = pytest.importorskip("peft")
    how = {"fan_in_fan_out": True, "init_lora_weights": False}
    config = peft.LoraConfig(r=4, target_modules=["c_attn"], **how)
    peft.get_peft_model(tiny_pplm.model(), config).save_pretrained(tmp_path)
    flags = asked(files, *bag(files), "--variant", variant)
    plain = facts_of(capsys, *flags)["texts"]
    assert facts_of(capsys, *flags, "--adapter", str(tmp_path))["texts"] != plain
