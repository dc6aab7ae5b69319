"""Pairs: which files and rows are read, which are refused, and the tokens that they become."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.dpo import DPOArguments, PreferenceCollator, PreferenceDataset, read_pairs
from onepass.dpo.examples import split_prompt
from onepass.dpo.generate import prompt_ids
from support.tiny_language_model import CHAT, tokenizer
from support.tiny_language_model import model as tiny

USER = {"role": "user", "content": "two and two?"}
FOUR = {"role": "assistant", "content": "four"}
FIVE = {"role": "assistant", "content": "five"}
PAIR = {"prompt": "two and two?", "chosen": " four", "rejected": " five, I think"}


def text(ids: list[int]) -> str:
    found: str = tokenizer().decode(ids)
    return found


def dataset(rows: list[Any], template: str | None = None, **options: Any) -> PreferenceDataset:
    return PreferenceDataset(tokenizer(template), rows, DPOArguments(**options))


def write(folder: Path, name: str, *rows: Any) -> Path:
    body = json.dumps(list(rows)) if name.endswith(".json") else ""
    body = body or "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(body, encoding="utf-8")
    return folder / name


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p.json", "p.jsonl"])
def test_files_are_read_with_the_place_of_each_pair(tmp_path: Path, name: str) -> None:
    other = {"chosen": [USER, FOUR], "rejected": [USER, FIVE], "score": 3}
    found = read_pairs(write(tmp_path, name, PAIR, other))
    assert [{k: v for k, v in row.items() if k != "place"} for row in found] == [PAIR, other]
    ending = ": entry 2" if name == "p.json" else ":2"
    assert found[1]["place"] == f"{tmp_path / name}{ending}"


BAD: list[tuple[str, Any, str]] = [
    ("no chosen", {"prompt": "a", "rejected": "b"}, "got an object with prompt, rejected, wanted"),
    ("no rejected", {"prompt": "a", "chosen": "b"}, "no 'rejected', wanted chosen and rejected"),
    ("null", {"chosen": "b", "rejected": None}, "no 'rejected'"),
    ("a string", "text", "no 'chosen'"),
    ("a number", {**PAIR, "rejected": 3}, "got a number as 'rejected', wanted a string or a list"),
    ("a list of strings", {**PAIR, "rejected": ["a"]}, "got a list as 'rejected'"),
    ("a prompt's kind", {**PAIR, "prompt": 1.5}, "got a number as 'prompt'"),
    ("empty chosen", {**PAIR, "chosen": ""}, "got an empty chosen"),
    ("blank rejected", {**PAIR, "rejected": " \n"}, "'rejected' is empty"),
    ("no turns", {"chosen": [USER, FOUR], "rejected": []}, "'rejected' is empty"),
    ("equal", {**PAIR, "rejected": PAIR["chosen"]}, "are equal: there is nothing to prefer"),
    ("mixed", {"chosen": [USER, FOUR], "rejected": "b"}, "wanted both alike"),
    ("prompt of other kind", {**PAIR, "prompt": [USER]}, "got a list as 'prompt' and a string"),
    ("other prompt", {"prompt": "x", "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
     "got a string as 'prompt' and a list as 'chosen'"),
    ("one logp", {**PAIR, "ref_chosen_logps": -1.0}, "got 'ref_chosen_logps' alone"),
    ("a word", {**PAIR, "ref_chosen_logps": "a", "ref_rejected_logps": 1}, "a finite number"),
    ("nan", {**PAIR, "ref_chosen_logps": 1, "ref_rejected_logps": float("nan")}, "finite number"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_pair_is_named_by_its_line(tmp_path: Path, row: Any, message: str) -> None:
    file = write(tmp_path, "p.jsonl", PAIR, row)
    with pytest.raises(ValueError, match=re.escape(f"{file}:2: ")) as caught:
        read_pairs(file)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "message"), [b[1:] for b in BAD if isinstance(b[1], dict)],
    ids=[b[0] for b in BAD if isinstance(b[1], dict)],
)  # fmt: skip
def test_a_bad_row_is_named_by_its_number(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^row 2: ") as caught:
        dataset([PAIR, row])
    if not message.startswith(("got an object", "got an empty")):
        assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_rows_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1: got a string, wanted an object"):
        dataset(["text"])
    with pytest.raises(ValueError, match="got no row, wanted at least one pair"):
        dataset([])


# -- prompts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"chosen": "the cat sat", "rejected": "the car sat"}, "the", " cat sat", " car sat"),
        ({"chosen": "yes", "rejected": "no"}, "", "yes", "no"),
        ({"chosen": "a b", "rejected": "a b c"}, "a", " b", " b c"),
        ({"chosen": "Q?\nA", "rejected": "Q?\nB"}, "Q?", "\nA", "\nB"),
        ({"chosen": [USER, FOUR], "rejected": [USER, FIVE]}, [USER], [FOUR], [FIVE]),
        (
            {"prompt": USER["content"], "chosen": [USER, FOUR], "rejected": [USER, FIVE]},
            *([USER], [FOUR], [FIVE]),
        ),
        ({"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}, [USER], [FOUR], [FIVE]),
    ],
)
def test_the_prompt_is_the_column_or_what_both_begin_with(
    row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any
) -> None:
    assert split_prompt(row) == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_side_that_is_all_prompt_is_refused() -> None:
    rows = [{"chosen": [USER], "rejected": [USER, FIVE]}]
    with pytest.raises(ValueError, match="row 1: 'chosen' is empty but for what both begin with"):
        dataset(rows, CHAT)


def test_a_prompt_that_all_answers_repeat_is_taken_off(caplog: pytest.LogCaptureFixture) -> None:
    """As in the notebook, whose answers are whole generations."""
    repeating = [
        {"prompt": f"Movie {n}", "chosen": f"Movie {n} is good", "rejected": f"Movie {n} is bad"}
        for n in range(3)
    ]
    plain = [{**row, **{s: row[s][len(row["prompt"]) :] for s in ("chosen", "rejected")}}
             for row in repeating]  # fmt: skip
    with caplog.at_level(logging.WARNING, "onepass"):
        found = dataset(repeating)
    assert "all 3 pairs repeat their prompt" in caplog.text and "taken off" in caplog.text
    assert found.items == dataset(plain).items
    caplog.clear()
    with caplog.at_level(logging.WARNING, "onepass"):
        mixed = dataset([plain[0], repeating[1]])
    assert "1 of 2 pairs repeat their prompt" in caplog.text and "row 2" in caplog.text
    assert text(mixed[1]["chosen_input_ids"]) == "Movie 1Movie 1 is good</s>"
    only = {"prompt": "a", "chosen": "a", "rejected": "ab"}
    with pytest.raises(ValueError, match="row 1: 'chosen' is empty once its prompt is taken off"):
        dataset([only])
    turns = {"prompt": [USER], "chosen": [USER, FOUR], "rejected": [USER, FIVE]}
    assert dataset([turns], CHAT).items == dataset([{**turns, "chosen": [FOUR],
                                                     "rejected": [FIVE]}], CHAT).items  # fmt: skip


# -- token ids --------------------------------------------------------------------------------


def test_answers_end_with_eos_and_prompts_do_not_count() -> None:
    [item] = dataset([PAIR]).items
    prompt = item["prompt_input_ids"]
    assert text(prompt) == "two and two?" and item["prompt_attention_mask"] == [1] * len(prompt)
    for side in ("chosen", "rejected"):
        ids, labels = item[f"{side}_input_ids"], item[f"{side}_labels"]
        assert text(ids) == PAIR["prompt"] + PAIR[side] + "</s>"
        assert labels == [-100] * len(prompt) + ids[len(prompt) :]
        assert item[f"{side}_attention_mask"] == [1] * len(ids)


def test_conversations_go_through_the_chat_template() -> None:
    [item] = dataset([{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}], CHAT).items
    assert text(item["chosen_input_ids"]) == "<user>two and two?</s><assistant>four</s>"
    answer = [i for i in item["chosen_labels"] if i != -100]
    assert text(answer) == "four</s>"  # one EOS, the template's own
    assert item["chosen_input_ids"].count(tokenizer().eos_token_id) == 2
    with pytest.raises(ValueError, match="row 1: a conversation, but .* no chat template"):
        dataset([{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}])
    refusing = "{{ raise_exception('no such\nrole') }}"
    with pytest.raises(ValueError, match="row 1: the chat template refuses it: ") as caught:
        dataset([{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}], refusing)
    assert "\n" not in str(caught.value)


def test_a_prompt_begins_as_the_tokenizer_begins_a_text() -> None:
    """As Llama's and Gemma's do with their BOS token; a chat template writes its own."""
    from tokenizers.processors import TemplateProcessing

    begins = tokenizer(CHAT)
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    [item] = PreferenceDataset(begins, [PAIR]).items
    assert item["prompt_input_ids"] == begins(PAIR["prompt"])["input_ids"][:-1]
    assert item["chosen_input_ids"].count(1) == 1 and item["chosen_labels"].count(2) == 1
    [there] = PreferenceDataset(begins, [{**PAIR, "prompt": "<s>" + PAIR["prompt"]}]).items
    assert there["prompt_input_ids"] == item["prompt_input_ids"]
    turns = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
    [chat] = PreferenceDataset(begins, [turns]).items
    assert text(chat["prompt_input_ids"]).startswith("<user>")
    for prompt, ids in ((PAIR["prompt"], item), ([USER], chat)):
        [drawn] = prompt_ids(tiny(1), begins, [prompt], 1)
        assert drawn == ids["prompt_input_ids"]


def test_a_template_may_go_on_after_its_eos() -> None:
    """As ChatML does, with a line break."""
    turns = {"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}
    for template, ends in ((CHAT.replace("</s>", "</s>\n"), "four</s>\n"),
                           (CHAT.replace("</s>", "\n"), "four\n</s>")):  # fmt: skip
        [item] = dataset([turns], template).items
        assert text([i for i in item["chosen_labels"] if i != -100]) == ends


def test_pairs_that_are_equal_once_cut_are_left_out_and_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    alike = {"prompt": "01", "chosen": "abcdefg", "rejected": "abcdefh"}
    with caplog.at_level(logging.WARNING, "onepass"):
        found = dataset([alike, PAIR | {"prompt": "0"}, alike], max_length=8, max_prompt_length=2)
    assert len(found) == 1 and found.n_equal == 2 and found.n_cut == 3
    assert text(found[0]["prompt_input_ids"]) == "0"
    assert "3 of 3 pairs are longer" in caplog.text
    assert "2 pairs are left out" in caplog.text and "the first: row 1" in caplog.text
    with pytest.raises(ValueError, match="row 1: chosen and rejected are equal in their first"):
        dataset([alike], max_length=8)


def test_an_empty_prompt_is_the_bos_token() -> None:
    [item] = dataset([{"prompt": "", "chosen": "a", "rejected": "b"}]).items
    assert item["chosen_input_ids"][0] == tokenizer().bos_token_id
    assert item["chosen_labels"][0] == -100
    bare = tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(ValueError, match="row 1: an empty prompt, and the tokenizer has no BOS"):
        PreferenceDataset(bare, [{"chosen": "a", "rejected": "b"}])
    [item] = PreferenceDataset(bare, [PAIR]).items
    assert text(item["chosen_input_ids"]) == "two and two? four"


CUTS: list[tuple[dict[str, Any], str, str, str]] = [
    # a token is a byte; the longer answer has 7 with its EOS
    ({"max_length": 17}, "0123456789", "ab</s>", "cdefgh</s>"),
    ({"max_length": 16}, "23456789", "ab</s>", "cdefgh</s>"),
    ({"max_length": 16, "truncation_mode": "keep_start"}, "01234567", "ab</s>", "cdefgh</s>"),
    ({"max_length": 10, "max_prompt_length": 4}, "6789", "ab</s>", "cdefgh"),
    ({"max_length": 4}, "89", "ab", "cd"),
    ({"max_length": 12, "max_prompt_length": 11}, "0123456789", "ab", "cd"),
    ({"max_length": None}, "0123456789", "ab</s>", "cdefgh</s>"),
]


@pytest.mark.parametrize(("options", "prompt", "chosen", "rejected"), CUTS)
def test_what_is_too_long_is_cut_counted_and_told(
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    prompt: str,
    chosen: str,
    rejected: str,
) -> None:
    short = {"prompt": "0", "chosen": "a", "rejected": "b"}
    with caplog.at_level(logging.WARNING, "onepass"):
        found = dataset(
            [short, {"prompt": "0123456789", "chosen": "ab", "rejected": "cdefgh"}], **options
        )
    assert text(found[0]["chosen_input_ids"]) == "0a</s>"
    assert text(found[1]["prompt_input_ids"]) == prompt
    assert text(found[1]["chosen_input_ids"]) == prompt + chosen
    assert text(found[1]["rejected_input_ids"]) == prompt + rejected
    n_left = sum(len(t.replace("</s>", ".")) for t in (prompt, chosen, rejected))
    assert found.n_cut_tokens == 20 - n_left
    assert found.n_cut == (n_left < 20)
    if n_left < 20:
        assert f"1 of 2 pairs are longer than max_length={options['max_length']}" in caplog.text
        assert f": {20 - n_left} tokens are left out" in caplog.text
    else:
        assert not caplog.text


def test_log_probabilities_of_the_reference_are_in_all_pairs_or_in_none() -> None:
    known = {**PAIR, "ref_chosen_logps": -3, "ref_rejected_logps": -4.5}
    found = dataset([known, known])
    assert found.has_reference and found[1]["ref_rejected_logps"] == -4.5
    with pytest.raises(ValueError, match="row 2: no 'ref_chosen_logps', but other pairs have it"):
        dataset([known, PAIR])


# -- batches ----------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right() -> None:
    rows = [PAIR, {"prompt": "a", "chosen": "bc", "rejected": "d"}]
    known = [{**row, "ref_chosen_logps": -3.0, "ref_rejected_logps": -4.0} for row in rows]
    batch = PreferenceCollator(9)(dataset(known).items)
    assert set(batch) == {
        *(f"{s}_{k}" for s in ("chosen", "rejected")
          for k in ("input_ids", "attention_mask", "labels")),
        *("prompt_input_ids", "prompt_attention_mask", "ref_chosen_logps", "ref_rejected_logps"),
    }  # fmt: skip
    n = 1 + 2 + 1
    assert batch["chosen_input_ids"][1, n:].unique().tolist() == [9]
    assert batch["chosen_attention_mask"].sum(-1).tolist() == [12 + 5 + 1, n]
    assert batch["chosen_labels"][1, n:].unique().tolist() == [-100]
    assert batch["ref_rejected_logps"].equal(torch.tensor([-4.0, -4.0]))
    with pytest.raises(ValueError, match="one has no 'ref_chosen_logps'"):
        PreferenceCollator()([*dataset(known).items, *dataset([PAIR]).items])


def test_rows_need_not_be_dicts_of_ours(tmp_path: Path) -> None:
    from datasets import Dataset

    make: Callable[..., Any] = Dataset.from_list
    turns = [{"prompt": [USER], "chosen": [FOUR], "rejected": [FIVE]}]
    for rows, template in (([PAIR], None), (turns, CHAT)):
        assert dataset(make(rows), template).items == dataset(rows, template).items
