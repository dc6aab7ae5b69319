"""Prompt records, token batches and splits of circuit breakers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.circuit_breaker.arguments import LorraArguments
from onepass.circuit_breaker.data import CircuitBreakerDataset, data_collator, tokens_of
from onepass.circuit_breaker.examples import Example, example_of, read_source
from onepass.training.prompts import split
from support.tiny_language_model import BENIGN, CHAT, HARMFUL, tokenizer


def example(record: Any, template: str | None = None) -> Example:
    (prompt,) = read_source([record], "test")
    return example_of(prompt, tokenizer(template))


@pytest.mark.parametrize(
    ("record", "request_", "answer"),
    [
        ("just text", "", "just text"),
        ({"text": "just text"}, "", "just text"),
        ({"prompt": "ask"}, "", "ask"),
        ({"original_prompt": "ask"}, "", "ask"),
        ({"sanitized_prompt": "ask", "category": "x"}, "", "ask"),
        ({"prompt": "ask", "completion": "answer"}, "ask", "answer"),
        ({"prompt": "ask", "response": "answer"}, "ask", "answer"),
        ({"prompt": "ask", "output": "answer", "category": "x"}, "ask", "answer"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "a\n",
            "b",
        ),
        ({"messages": [{"role": "user", "content": "a"}]}, "a\n", ""),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}],
                "completion": [{"role": "assistant", "content": "b"}],
            },
            "s\na\n",
            "b",
        ),
    ],
)
def test_records_become_a_request_and_its_answer(record: Any, request_: str, answer: str) -> None:
    assert example(record) == Example(request_, answer)


def test_a_chat_template_writes_requests_and_answers() -> None:
    found = example({"prompt": "ask", "completion": "answer"}, CHAT)
    assert found == Example("<user>ask</s><assistant>", "answer</s>", templated=True)
    assert example({"text": "plain"}, CHAT) == Example("", "plain")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": []},
        {"messages": [{"role": "user"}]},
        {"messages": "hi"},
        {"id": 3},
        {"text": None},
        {"prompt": "a", "completion": 3},
        {"prompt": "a", "completion": None},
        {"prompt": 3},
    ],
)
def test_a_record_that_is_none_of_these_is_named(record: Any) -> None:
    with pytest.raises(ValueError, match="test:1: wanted text, messages, or prompt"):
        example(record)


def test_requests_are_padded_on_the_left_and_answers_on_the_right() -> None:
    examples = [Example("ab", "xyz"), Example("abcd", "x")]
    ids, mask = tokens_of(tokenizer(), examples, max_length=64)
    assert ids.shape == mask.shape == (2, 16)
    assert mask.tolist() == [
        [0] * 6 + [1] * 2 + [1] * 3 + [0] * 5,
        [0] * 4 + [1] * 4 + [1] * 1 + [0] * 7,
    ]
    assert (ids[mask == 0] == 0).all()
    assert tokenizer().decode(ids[0][mask[0] == 1].tolist()) == "abxyz"


def test_long_sides_lose_their_end_and_text_alone_has_the_whole_length() -> None:
    ids, mask = tokens_of(tokenizer(), [Example("a" * 50, "b" * 50)], max_length=20)
    assert mask.shape == (1, 20) and mask.all()
    assert tokenizer().decode(ids[0].tolist()) == "a" * 10 + "b" * 10
    _, alone = tokens_of(tokenizer(), [Example("", "b" * 50)], max_length=20)
    assert alone.shape == (1, 20) and alone.all()


def dataset(**options: Any) -> CircuitBreakerDataset:
    return CircuitBreakerDataset(
        tokenizer(), **{"retain": BENIGN, "harmful": HARMFUL, "val": HARMFUL[:2], **options}
    )


def test_items_have_the_published_keys_and_shapes_and_collate() -> None:
    data = dataset()
    keys = {
        f"{k}{e}" for k in ("input_ids", "attention_mask") for e in ("", "_circuit_breaker", "_val")
    }
    assert len(data) == 6 and set(data[0]) == keys
    assert all(value.shape[0] == 1 and value.dim() == 2 for value in data[0].values())
    batch = data_collator([data[0], data[1], data[2]])
    assert {k: v.shape for k, v in batch.items()} == {
        k: (3, v.shape[1]) for k, v in data[0].items()
    }
    assert torch.equal(batch["input_ids"][1:2], data[1]["input_ids"])
    assert torch.equal(data[2]["input_ids_val"], data[0]["input_ids_val"])  # val begins again
    with pytest.raises(IndexError):
        data[6]


def test_the_rarer_kind_says_how_many_and_num_examples_caps() -> None:
    assert len(dataset(harmful=HARMFUL[:4])) == 4
    assert len(dataset(num_examples=3)) == 3
    assert set(dataset(val=None)[0]) == {
        f"{key}{ending}"
        for key in ("input_ids", "attention_mask")
        for ending in ("", "_circuit_breaker")
    }


def test_order_is_drawn_by_the_seed() -> None:
    def ids(seed: int) -> list[list[int]]:
        data = dataset(seed=seed)
        return [data[n]["input_ids"][0].tolist() for n in range(len(data))]

    assert ids(0) == ids(0) != ids(1)
    assert sorted(ids(0)) == sorted(ids(1))


def test_refusals_join_what_is_retained() -> None:
    harmful = [{"prompt": f"p{n}", "output": "yes", "llama3_output": "I cannot"} for n in range(4)]
    lorra = LorraArguments(use_refusal_retain=True)
    data = CircuitBreakerDataset(
        tokenizer(),
        None,
        lorra,
        retain=[{"prompt": "p", "completion": "fine"}] * 4,
        harmful=harmful,
    )
    texts = [
        tokenizer().decode(data[n]["input_ids"][0][data[n]["attention_mask"][0] == 1].tolist())
        for n in range(4)
    ]
    assert any("I cannot" in text for text in texts)
    with pytest.raises(ValueError, match="no record of harmful has 'llama3_output'"):
        dataset(lorra_args=lorra)


def test_the_split_is_seeded_whole_and_never_takes_all() -> None:
    prompts = read_source([f"t{n}" for n in range(10)], "test")
    left, out = split(prompts, 0.25, seed=0)
    assert len(out) == 2 and sorted(left + out, key=prompts.index) == prompts
    assert split(prompts, 0.25, seed=0) == (left, out) != split(prompts, 0.25, seed=1)
    assert split(prompts, 0.0, seed=0) == (prompts, [])
    assert len(split(prompts, 0.01, seed=0)[1]) == 1
    for ratio in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"from 0 to below 1"):
            split(prompts, ratio, seed=0)
    with pytest.raises(ValueError, match="leaves none to train on"):
        split(prompts[:1], 0.5, seed=0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ('{"text": "a"}\n{"text": 3}\n', r"retain.jsonl:2"),
        ('{"text": "a"}\nnot json\n', r"retain.jsonl:2"),
        ('{"prompt": "a"}\n{"answer": "b"}\n', r"retain.jsonl:2"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "retain.jsonl"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        dataset(retain=file)
    with pytest.raises(FileNotFoundError, match="no such file"):
        dataset(retain=tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="empty list"):
        dataset(retain=[])


def test_files_are_read_as_lists_are(tmp_path: Path) -> None:
    file = tmp_path / "harmful.json"
    file.write_text(json.dumps({"prompts": HARMFUL}), encoding="utf-8")
    assert torch.equal(
        dataset(harmful=file)[0]["input_ids_circuit_breaker"],
        dataset()[0]["input_ids_circuit_breaker"],
    )


def test_the_collator_takes_numbers_and_refuses_the_rest() -> None:
    assert data_collator([{"n": 1}, {"n": 2}])["n"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="Return data type not implemented: n is str"):
        data_collator([{"n": "a"}, {"n": "b"}])
    with pytest.raises(ValueError, match="one has no 'n'"):
        data_collator([{"n": 1}, {}])


def test_a_prompt_beside_a_text_is_not_dropped_in_silence() -> None:
    with pytest.raises(ValueError, match="text and prompt exclude each other"):
        example({"text": "a", "prompt": "b"})


def test_a_chat_template_that_refuses_names_the_record() -> None:
    with pytest.raises(ValueError, match="test:1: the chat template refuses it: no system"):
        example(
            {"messages": [{"role": "system", "content": "a"}]},
            "{{ raise_exception('no system') }}",
        )


def test_examples_that_are_cut_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    tokens_of(tokenizer(), [Example("", "b" * 50), Example("", "b")], max_length=20)
    assert "1 of 2 examples have a side of more than 20 tokens" in caplog.text
