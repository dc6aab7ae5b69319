"""Text and conversations as batches: what is transformed, what is counted, what is padding."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.jigsaw.data import JigsawDataset, NoiseTokenizer, data_collator
from onepass.training.prompts import read_prompts

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
from support.tiny_language_model import CHAT, tokenizer  # noqa: E402

ASK = "What is the capital of France?"
SAY = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": ASK},
    {"role": "assistant", "content": "Paris, user."},
    {"role": "user", "content": "user"},  # a role's name, and the end of another content
]
STRIPS = (
    "{% for m in messages %}<{{ m.role }}>\n{{ m.content | trim }}\n</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)
# As reasoning models do: what was thought is left out of all answers but a last one.
THINKS = (
    "{% for m in messages %}<{{ m.role }}>"
    "{% if '</think>' in m.content %}"
    "{% if loop.last %}<think>{{ m.content.split('</think>')[0].split('<think>')[-1] }}</think>"
    "{% endif %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}</s>{% endfor %}"
)
TWICE = "{{ messages[0].content }}#" + CHAT
COUNTS = "{% for m in messages %}<{{ m.role }} {{ m.content | length }}>{{ m.content }}{% endfor %}"


def shown(batch: dict[str, Tensor], name: str, template: str = CHAT, row: int = 0) -> str:
    """The text of the tokens that a mask marks, with a bar for each gap."""
    made = tokenizer(template)
    parts, last = [], True
    for number, marked in zip(batch["input_ids"][row], batch[name][row].bool(), strict=True):
        if marked:
            parts.append(made.convert_ids_to_tokens(int(number)))
        elif last:
            parts.append("|")
        last = bool(marked)
    return "".join(parts).replace("Ġ", " ").replace("Ċ", "\n").strip("|")


def test_text_is_all_transformed_but_special_tokens() -> None:
    made = tokenizer()
    batch = NoiseTokenizer(made)(["<s>ab</s>", "abcdef</s>ghi"])
    assert batch["input_ids"].shape == (2, 16)
    assert {name: x.dtype for name, x in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "noise_mask": torch.bool,
        "loss_mask": torch.bool,
    }
    assert shown(batch, "noise_mask") == "ab" and batch["noise_mask"][0].tolist()[:4] == [
        False,
        True,
        True,
        False,
    ]
    assert shown(batch, "noise_mask", row=1) == "abcdef|ghi"
    assert torch.equal(batch["loss_mask"], batch["noise_mask"])
    assert batch["attention_mask"].sum(1).tolist() == [4, 10]
    assert not batch["noise_mask"][batch["attention_mask"] == 0].any()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == made.pad_token_id).all()
    one = NoiseTokenizer(made)("<s>ab</s>")
    assert torch.equal(one["input_ids"][0], batch["input_ids"][0, :8])


def test_contents_are_transformed_and_what_the_template_writes_is_not() -> None:
    made = tokenizer(CHAT)
    marking = NoiseTokenizer(made, transform_answers=True)
    batch = marking([SAY, SAY[:2]], add_generation_prompt=True)
    wanted = made.apply_chat_template(SAY, add_generation_prompt=True)["input_ids"]
    assert batch["input_ids"][0, : len(wanted)].tolist() == wanted
    contents = [turn["content"] for turn in SAY]
    assert shown(batch, "noise_mask") == "|".join(contents)
    assert shown(batch, "noise_mask", row=1) == "|".join(contents[:2])
    assert torch.equal(batch["loss_mask"], batch["noise_mask"])


def test_an_unknown_word_is_content() -> None:
    made = tokenizer()
    made.unk_token = "<unk>"
    assert shown(NoiseTokenizer(made)("ab<unk></s>"), "noise_mask") == "ab<unk>"
    made.unk_token = "</s>"  # as GPT-2 has it
    assert shown(NoiseTokenizer(made)("ab</s>"), "noise_mask") == "ab"


def test_options_of_roles() -> None:
    made = tokenizer(CHAT)
    batch = NoiseTokenizer(made)(SAY)
    assert shown(batch, "noise_mask") == shown(batch, "loss_mask") == f"Be brief.|{ASK}|user"
    batch = NoiseTokenizer(made, transform_system=False)(SAY)
    assert shown(batch, "noise_mask") == f"{ASK}|user"
    batch = NoiseTokenizer(made, transform_answers=True)(SAY)
    assert shown(batch, "noise_mask") == f"Be brief.|{ASK}|Paris, user.|user"
    for transforms in (False, True):
        batch = NoiseTokenizer(made, ignore_prompt_loss=True, transform_answers=transforms)(SAY)
        assert shown(batch, "loss_mask") == "Paris, user."
        assert shown(batch, "noise_mask").startswith("Be brief.|")


@pytest.mark.parametrize("template", [CHAT, STRIPS])
def test_whitespace_around_contents(template: str) -> None:
    turns = [
        {"role": "user", "content": "  user \n"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": " \n "},
        {"role": "user", "content": "\nuser"},
    ]
    batch = NoiseTokenizer(tokenizer(template))(turns)
    got = shown(batch, "noise_mask", template)
    assert got.split("|") == (["  user \n", "\nuser"] if template == CHAT else ["user"] * 2)


@pytest.mark.parametrize(
    ("template", "contents", "marked"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", [" a\n", "\nb\n"], " a\n\nb\n"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", ["a\n", "b\n"], "a\n|b\n"),
        ("{% for m in messages %}{{ '\\n' + m.content }}{% endfor %}", ["\na", "b"], "\na|b"),
        ("{% for m in messages %} {{ m.content | trim }}\n{% endfor %}", [" a\n", " b\n"], "a|b"),
        ("{% for m in messages %}#{{ m.content.rstrip() }}\n{% endfor %}", [" a\n", "b\n"], " a|b"),
        (
            "{% for m in messages %}#\n{{ m.content.lstrip('\\n') }} {% endfor %}",
            ["\n\n a ", "\n"],
            " a ",
        ),
        (  # where it looks into the whitespace, all that is there counts
            "{% for m in messages %}{% if m.content[0] == ' ' %}?{% endif %}#\n{{ m.content }}"
            "{% endfor %}",
            [" a", "\nb"],
            "\n a|\nb",
        ),
    ],
)
def test_whitespace_of_templates_is_theirs(template: str, contents: list[str], marked: str) -> None:
    turns = [{"role": "user", "content": content} for content in contents]
    got = shown(NoiseTokenizer(tokenizer(template))(turns), "noise_mask")
    assert got == marked


def test_a_template_that_leaves_thoughts_out() -> None:
    thought = "<think>secret plan</think>the answer"
    turns = [
        {"role": "user", "content": "ask"},
        {"role": "assistant", "content": thought},
        {"role": "user", "content": "again"},
        {"role": "assistant", "content": thought},
    ]
    batch = NoiseTokenizer(tokenizer(THINKS), transform_answers=True)(turns)
    got = shown(batch, "noise_mask", THINKS)
    for word in ("ask", "the answer", "again", "secret plan"):
        assert word in got  # with some of the markers around them
    assert not got.startswith("<user>")
    assert got.count("the answer") == 2 and got.count("secret plan") == 1


def test_a_content_that_the_template_writes_twice() -> None:
    batch = NoiseTokenizer(tokenizer(TWICE))(SAY[:2])
    assert shown(batch, "noise_mask", TWICE) == f"Be brief.|Be brief.|{ASK}"


def test_a_part_of_a_content_that_stands_elsewhere_is_transformed_too() -> None:
    template = "{{ messages[1].content.split('.')[0] }}#" + CHAT
    turns = [SAY[1], {"role": "user", "content": "A secret. Keep it."}]
    got = shown(NoiseTokenizer(tokenizer(template))(turns), "noise_mask", template)
    assert got.startswith("A secret") and got.endswith("A secret. Keep it.") and ASK in got


PIECE = "{% for m in messages %}<{{ m.role }}>"
PIECES = (
    PIECE + "{{ m.content.split('|')[1] }}({{ m.content }}){% endfor %}",
    PIECE + "({{ m.content }}){{ m.content.split('|')[1] }}{% endfor %}",
    PIECE + "{{ m.content.split('|')[1:-1] | join }}({{ m.content }}){% endfor %}",  # or nothing
    PIECE + "{{ m.content.split('|') | sort | first }}({{ m.content }}){% endfor %}",
    "{{ messages[1].content.split('|')[1] }}" + PIECE + "({{ m.content }}){% endfor %}",
    "{% for m in messages %}({{ m.content }}){% endfor %}{{ messages[0].content.split('|')[1] }}",
    # beside a content whose end is lost
    "{{ messages[0].content.split('|')[0] }}{{ messages[1].content.split('|')[1] }}#"
    + PIECE
    + "({{ m.content }}){% endfor %}{{ messages[1].content.split('|')[1] }}",
)


@pytest.mark.parametrize("template", PIECES)
def test_an_inner_piece_of_a_content_is_transformed_wherever_it_stands(template: str) -> None:
    turns = [
        {"role": "user", "content": "b|secret|c"},
        {"role": "assistant", "content": "z|a hidden|e"},
    ]
    made = tokenizer(template)
    batch = NoiseTokenizer(made)(turns)
    text = made.apply_chat_template(turns, tokenize=False)
    got = shown(batch, "noise_mask", template)
    assert text.count("secret") + text.count("a hidden") > 2
    for word in ("secret", "a hidden"):
        assert got.count(word) == text.count(word)


def test_a_second_line_that_stands_elsewhere_is_transformed() -> None:
    template = "{{ messages[0].content.split('\n')[1] }}#" + CHAT
    turns = [{"role": "user", "content": "one\ntwo words\nthree"}, SAY[1]]
    got = shown(NoiseTokenizer(tokenizer(template))(turns), "noise_mask", template)
    assert got.count("two words") == 2


CHATML = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_LIKE = (
    "<s>{% for m in messages %}<|header|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header|>assistant<|end|>\n\n{% endif %}"
)
INST = (  # the system prompt inside of the first message
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}{% else %}{% set sys = '' %}"
    "{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
    "<s>[INST] {{ (sys if loop.first else '') + m.content.strip() }} [/INST]"
    "{% else %} {{ m.content.strip() }} </s>{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE, STRIPS, INST, CHAT])
@pytest.mark.parametrize("first", [0, 1])
def test_usual_templates_are_marked_exactly(template: str, first: int) -> None:
    turns = [*SAY[first:], {"role": "assistant", "content": "two\nlines: 1|2|3 <b>\n\n1|2"}]
    marking = NoiseTokenizer(tokenizer(template), transform_answers=True)
    batch = marking(turns, add_generation_prompt=True)
    assert shown(batch, "noise_mask", template) == "|".join(turn["content"] for turn in turns)


def test_a_template_that_looks_into_contents_has_all_transformed() -> None:
    batch = NoiseTokenizer(tokenizer(COUNTS))(SAY[:2])
    assert shown(batch, "noise_mask") == f"<system 9>Be brief.<user {len(ASK)}>{ASK}"


def test_tokens_across_the_border_and_other_scripts() -> None:
    """Of a tokenizer that joins a marker's end and a content's start, and bytes of one letter."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=270, initial_alphabet=alphabet, special_tokens=["<pad>"], show_progress=False
    )
    raw.train_from_iterator([">na" * 50 + "ve" * 9], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>")
    made.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    turns = [{"role": "user", "content": "naïve 日本 "}, {"role": "user", "content": "nah"}]
    batch = NoiseTokenizer(made)(turns)
    ids, noised = batch["input_ids"][0], batch["noise_mask"][0]
    marked = made.decode(ids[noised])
    assert "naïve 日本" in marked and marked.endswith("nah") and "user" not in marked
    assert ">n" in marked  # the token that holds both


def test_padding_on_the_left_and_to_a_multiple() -> None:
    batch = NoiseTokenizer(tokenizer(), padding_side="left", pad_to_multiple_of=5)(
        ["abc", "abcdef"]
    )
    assert batch["attention_mask"].tolist()[0] == [0] * 7 + [1] * 3
    assert batch["noise_mask"].tolist()[1] == [False] * 4 + [True] * 6
    made = tokenizer()
    made.padding_side = "left"
    assert NoiseTokenizer(made)("abc")["attention_mask"].tolist() == [[0] * 5 + [1] * 3]


def test_truncation_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onepass"):
        batch = NoiseTokenizer(tokenizer(), max_length=11)(["abc", "a" * 12, "b" * 11])
    assert batch["input_ids"].shape == (3, 11)
    assert caplog.messages == ["1 of 3 entries have more than 11 tokens and lose their end"]
    made = tokenizer()
    made.model_max_length = 4
    assert NoiseTokenizer(made)("abcdef")["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    ("use", "error", "message"),
    [
        (lambda: NoiseTokenizer(tokenizer())(SAY), ValueError, "has no chat template"),
        (lambda: NoiseTokenizer(tokenizer())([]), ValueError, "got none"),
        (lambda: NoiseTokenizer(tokenizer())(""), ValueError, "got an empty one"),
        (lambda: NoiseTokenizer(tokenizer())("<s></s>"), ValueError, "text to transform: got none"),
        (lambda: NoiseTokenizer(tokenizer())(["a", "<s>"]), ValueError, "^entry 2 of 2: an entry"),
        (lambda: NoiseTokenizer(tokenizer())(["a", 3]), TypeError, "^entry 2 of 2: an entry"),  # type: ignore
        (lambda: NoiseTokenizer(tokenizer())([SAY, SAY]), ValueError, "^entry 1 of 2: .*template"),
        (lambda: JigsawDataset(tokenizer(), ["ab", SAY]), ValueError, "^entry 2: .*template"),
        (lambda: data_collator([]), ValueError, "items must hold at least one"),
        (lambda: NoiseTokenizer(tokenizer())([3]), TypeError, "list of messages: got int"),  # type: ignore
        (lambda: NoiseTokenizer(tokenizer(CHAT))([[]]), ValueError, "a conversation must be"),
        (
            lambda: NoiseTokenizer(tokenizer(CHAT))([{"role": "user", "content": [{"text": "a"}]}]),
            ValueError,
            r"must be a list of .*got \{'role'",
        ),
        (
            lambda: NoiseTokenizer(tokenizer("{{ raise_exception('no\nsuch turn') }}"))(SAY),
            ValueError,
            "the chat template refuses it: no",
        ),
        (lambda: NoiseTokenizer(tokenizer(), max_length=0), ValueError, "max_length .*got 0"),
        (lambda: NoiseTokenizer(tokenizer(), padding_side="top"), ValueError, "got 'top'"),
        (lambda: NoiseTokenizer(tokenizer(), pad_to_multiple_of=0), ValueError, "got 0"),
        (lambda: data_collator([{"labels": [1]}]), ValueError, "item 0 has no input_ids"),
        (
            lambda: data_collator([{"input_ids": [1, 2], "noise_mask": [True]}]),
            ValueError,
            r"as long as its input_ids, 2: got 2 \(attention\), 1 \(noise\)",
        ),
        (lambda: JigsawDataset(tokenizer(), ["a", "<s>"]), ValueError, "none of 2 entries"),
        (lambda: JigsawDataset(tokenizer(), "nowhere.jsonl"), FileNotFoundError, "no such file"),
    ],
)
def test_refused(use: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        use()
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_offsets_takes_text_alone() -> None:
    class Slow:
        """What of a tokenizer is asked, without places in the text."""

        is_fast, chat_template, padding_side, model_max_length = False, CHAT, "right", 10**30
        all_special_ids: list[int] = []
        pad_token_id = eos_token_id = None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(c) for c in text]}

    assert NoiseTokenizer(Slow())("abc")["input_ids"].tolist() == [[97, 98, 99, 0, 0, 0, 0, 0]]
    with pytest.raises(ValueError, match="need a fast tokenizer"):
        NoiseTokenizer(Slow())(SAY)


def test_files_become_items_and_batches(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    records: list[Any] = ["some text", {"messages": SAY}, {"text": "more"}, {"prompt": "x"}]
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    data = JigsawDataset(tokenizer(CHAT), file)
    assert len(data) == 3  # one token tells of nothing
    batch = data_collator([data[n] for n in range(len(data))])
    assert {x.shape for x in batch.values()} == {batch["input_ids"].shape}
    assert shown(batch, "noise_mask") == "some text"
    asked = [turn["content"] for turn in SAY if turn["role"] != "assistant"]
    assert shown(batch, "noise_mask", row=1) == "|".join(asked)
    assert len(JigsawDataset(tokenizer(CHAT), file, 1)) == 1
    again = JigsawDataset(tokenizer(CHAT), read_prompts(file))
    assert all(torch.equal(again[1][name], x) for name, x in data[1].items())
    with pytest.raises(ValueError, match=r"data.jsonl:2: .*has no chat template") as caught:
        JigsawDataset(tokenizer(), file)
    assert "\n" not in str(caught.value)
    mixed = JigsawDataset(NoiseTokenizer(tokenizer(CHAT), max_length=4), ["some text", SAY[:1]])
    assert len(mixed) == 1 and len(mixed[0]["input_ids"]) == 4  # nothing but markers is left


def test_an_empty_text_is_refused_where_it_gets_a_special_token() -> None:
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.bos_token_id)]
    )
    assert shown(NoiseTokenizer(made)("ab"), "noise_mask") == "ab"
    with pytest.raises(ValueError, match="got an empty one"):
        NoiseTokenizer(made)("")


@pytest.mark.parametrize(
    ("record", "templated", "plain"),
    [
        ({"prompt": "ask", "completion": " yes"}, "ask| yes", "ask yes"),
        ({"prompt": "ask", "prompt_id": "7", "answer": "yes"}, "ask|yes", "askyes"),
        ({"prompt": "ask", "response": ""}, "ask", "ask"),
        ({"text": "all of it", "output": "no part of it"}, "all of it", "all of it"),
        ({"prompt": "Be", "messages": SAY[:2]}, f"Be brief.|{ASK}", None),
        ({"prompt": SAY[:2], "completion": SAY[2:3]}, f"Be brief.|{ASK}|Paris, user.", None),
        ({"prompt": SAY[:2], "completion": "Paris."}, f"Be brief.|{ASK}|Paris.", None),
    ],
)
def test_records(tmp_path: Path, record: Any, templated: str, plain: str | None) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(record), "utf-8")

    def batch(template: str | None, **options: Any) -> Any:
        marking = NoiseTokenizer(tokenizer(template), **options)
        return data_collator([JigsawDataset(marking, file)[0]])

    assert shown(batch(CHAT, transform_answers=True), "noise_mask") == templated
    if plain is not None:
        assert shown(batch(None, transform_answers=True), "noise_mask") == plain
    if templated != "ask" and {"completion", "answer"} & set(record):
        answer = templated.rpartition("|")[2]
        for template in (CHAT,) if plain is None else (CHAT, None):
            prompt = shown(batch(template), "noise_mask")
            assert prompt and answer.strip() not in prompt
            counted = shown(batch(template, ignore_prompt_loss=True), "loss_mask")
            assert counted.strip() == answer.strip()


def test_a_bad_record_is_named(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "ab"}\n\n{"prompt": "cd", "answer": 7}\n', "utf-8")
    with pytest.raises(ValueError, match=r"data\.jsonl:3: the answer .*: got int$"):
        JigsawDataset(tokenizer(), file)
    file = tmp_path / "data.json"
    file.write_text(json.dumps(["ab", {"messages": [SAY[1]]}]), "utf-8")
    with pytest.raises(ValueError, match=r"data\.json: the entry 'What is .* no chat template"):
        JigsawDataset(tokenizer(), file)


def test_entries_that_are_left_out_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "onepass"):
        assert len(JigsawDataset(tokenizer(), ["ab", "c", "<s></s>"])) == 1
    assert caplog.messages == [
        "2 of 3 entries have one token or nothing to transform and are left out"
    ]


def test_rows_of_a_batch_keep_their_padding() -> None:
    batch = NoiseTokenizer(tokenizer())(["abc", "a longer text"])
    rows = [{name: x[n] for name, x in batch.items()} for n in range(2)]
    again = data_collator(rows)
    assert all(torch.equal(again[name], x) for name, x in batch.items())
    for row in rows:
        del row["noise_mask"], row["loss_mask"]
    assert torch.equal(data_collator(rows)["noise_mask"], batch["attention_mask"].bool())


def test_items_of_ids_alone() -> None:
    batch = data_collator([{"input_ids": [5, 6, 7]}, {"input_ids": [5], "noise_mask": [False]}])
    assert batch["noise_mask"].tolist() == [[True] * 3 + [False] * 5, [False] * 8]
    assert torch.equal(batch["loss_mask"], batch["noise_mask"])
