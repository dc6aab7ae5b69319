"""Bags of words: which words count under which tokenizer, rows and weights, what is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.pplm import bags, names

WORDS = ["army", "navy", "ship", "armada"]
CORPUS = ["the army the navy the ship"] * 8
GPT2_SPACE = "\u0120"


def trained(kind: str) -> Any:
    """A tokenizer in which the first three of WORDS are one token after a space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "words":
        vocabulary = {word: n for n, word in enumerate(["<unk>", "the", *WORDS[:3]])}
        made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")
    made = Tokenizer(models.BPE(byte_fallback=False))
    if kind == "bytes":  # as GPT-2's
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:  # as SentencePiece's, which puts a blank before the first word too
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        made.decoder = decoders.Metaspace(prepend_scheme="always")
        alphabet = sorted(set("".join(WORDS) + "\u2581"))
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<s>")


@pytest.fixture(scope="module")
def gpt2() -> Any:
    return trained("bytes")


def bag_file(folder: Path, *lines: str, name: str = "bag.txt") -> str:
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("kind", ["bytes", "blanks", "words"])
def test_a_word_counts_as_it_stands_in_a_text(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    [bag] = bags.get_bag_of_words_indices([bag_file(tmp_path, *WORDS)], tokenizer)
    inside = tokenizer.encode("the army the navy the ship", add_special_tokens=False)[1::2]
    assert [ids for ids in bag if len(ids) == 1] == [[i] for i in inside]
    assert len(bag) == 4 and len(bag[3]) != 1  # in pieces, or unknown


def test_as_upstream_spells_it(gpt2: Any, tmp_path: Path) -> None:
    """run_pplm.py: add_prefix_space=True, no special tokens, stripped lines; then rows whose
    single id is set to 1."""
    path = bag_file(tmp_path, " navy ", "army", "navy", "armada")
    found = bags.get_bag_of_words_indices([path], gpt2)
    plain = [gpt2.encode(f" {w}", add_special_tokens=False) for w in ("navy", "army", "navy")]
    assert found[0][:3] == plain and all(len(ids) == 1 for ids in plain)
    made = bags.build_bows_one_hot_vectors(found, gpt2)
    assert made is not None
    rows = made[0]
    expected = torch.zeros(3, len(gpt2)).scatter_(1, torch.tensor(plain), 1)
    assert torch.equal(rows, expected) and rows.dtype == torch.float32


def test_weights_are_the_rows_summed(gpt2: Any, tmp_path: Path) -> None:
    path = bag_file(tmp_path, "navy", "army", "navy", "armada")
    indices = bags.get_bag_of_words_indices(path, gpt2)
    made = bags.build_bows_one_hot_vectors(indices, gpt2)
    assert made is not None
    of_ids, of_rows = bags.bag_weights(indices[0]), bags.bag_weights(made[0])
    for one, other in zip(of_ids, of_rows, strict=True):
        assert torch.equal(one, other) and one.dtype == other.dtype
    assert of_ids.ids.dtype == torch.int64 and sorted(of_ids.weights.tolist()) == [1.0, 2.0]
    probs = torch.randn(2, len(gpt2)).softmax(-1)
    upstream = (probs @ made[0].T).sum(-1)
    torch.testing.assert_close((probs[:, of_ids.ids] * of_ids.weights).sum(-1), upstream)
    with pytest.raises(ValueError, match=r"must be \[n, V\]"):
        bags.bag_weights(probs[0])


def test_names_of_several(gpt2: Any, tmp_path: Path) -> None:
    paths = [bag_file(tmp_path, w, name=f"{w}.txt") for w in WORDS[:2]]
    joined = bags.get_bag_of_words_indices(f"{paths[0]}; {paths[1]};", gpt2)
    assert joined == bags.get_bag_of_words_indices(paths, gpt2) and len(joined) == 2
    assert bags.build_bows_one_hot_vectors(None, gpt2) is None
    unnamed: list[Any] = ["", " ; ", []]
    for nothing in unnamed:
        with pytest.raises(ValueError, match="no bag of words is named"):
            bags.get_bag_of_words_indices(nothing, gpt2)
    with pytest.raises(TypeError, match="got int"):
        bags.get_bag_of_words_indices([3], gpt2)  # type: ignore[list-item]


def test_bags_of_the_package() -> None:
    assert {"military", "science", "space", "computers", "legal"} <= set(names.bag_names())
    assert len(names.bag_names()) >= 6
    for name in names.bag_names():
        words = names.read_words(name)
        assert 50 <= len(words) == len(set(words)) and words == sorted(words)
        assert all(w.isalpha() and w == w.lower() and w.isascii() for w in words), name


def test_words_that_do_not_count_are_named(
    gpt2: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "onepass")
    good = bag_file(tmp_path, *WORDS)
    empty = bag_file(tmp_path, "", " ", name="empty.txt")
    long = bag_file(tmp_path, *(f"armada{n}" for n in range(20)), name="long.txt")
    found = bags.get_bag_of_words_indices([good, empty, long], gpt2)
    assert [sum(len(w) == 1 for w in bag) for bag in found] == [3, 0, 0]
    told = [record.getMessage() for record in caplog.records]
    assert f"bag of words {good}: 1 of 4 words are not one token and do not count: armada" in told
    assert f"bag of words {empty} is empty" in told
    assert any(t.startswith(f"bag of words {long}: 20 of 20") and "(8 more)" in t for t in told)
    rows = bags.build_bows_one_hot_vectors(found, gpt2)
    assert rows is not None and [tuple(r.shape) for r in rows[1:]] == [(0, len(gpt2))] * 2
    assert len(bags.bag_weights(found[1]).ids) == len(bags.bag_weights(rows[1]).ids) == 0
    for nothing in (empty, long):
        with pytest.raises(ValueError, match="leaves nothing to steer to"):
            bags.get_bag_of_words_indices([nothing], gpt2)
    caplog.clear()
    few = bag_file(tmp_path, WORDS[0], "armada1", "armada2", name="few.txt")
    bags.get_bag_of_words_indices([few], gpt2)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == f"bag of words {few}: 1 of 3 words are one token and count: {WORDS[0]}"


def test_what_is_no_bag(gpt2: Any, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("army\nêtre\n".encode("latin-1"))
    wrong: list[tuple[str, type[Exception], str]] = [
        ("milatary", FileNotFoundError, "wanted computers, .*did you mean military"),
        ("https://a.b/c.txt", FileNotFoundError, "no file is called 'https"),
        (str(tmp_path), ValueError, "is a folder: wanted computers"),
        (str(tmp_path / "latin.txt"), ValueError, "latin.txt:2: not UTF-8"),
    ]
    for name, kind, told in wrong:
        with pytest.raises(kind, match=told) as caught:
            bags.get_bag_of_words_indices([name], gpt2)
        assert "\n" not in str(caught.value)
