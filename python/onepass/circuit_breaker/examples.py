"""From records of prompt files to requests and answers; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.errors import one_line
from ..training.prompts import Prompt, read_prompts

ASKS = ("text", "messages", "prompt", "original_prompt", "sanitized_prompt")
ANSWERS = ("completion", "response", "output", "answer")
REFUSAL = "llama3_output"


class Example(NamedTuple):
    """A request and its answer, either of which may be empty."""

    request: str
    answer: str
    templated: bool = False  # by a chat template, which writes the special tokens itself


Source = str | Path | Sequence[str | Mapping[str, Any] | Prompt]


def read_source(source: Source, name: str) -> list[Prompt]:
    """The records of a file, or of a list of strings, objects and prompts.

    Raises:
        FileNotFoundError, ValueError: as `read_prompts`.
    """
    if isinstance(source, str | Path):
        return read_prompts(source)
    if not source:
        raise ValueError(f"{name}: got an empty list, wanted at least one example")
    prompts = []
    for number, record in enumerate(source, 1):
        if not isinstance(record, Prompt):
            record = {"prompt": record} if isinstance(record, str) else dict(record)
            record = Prompt("", record, Path(name), number, None)
        prompts.append(record)
    return prompts


def example_of(prompt: Prompt, tokenizer: Any = None) -> Example:
    """A record's request and answer.

    Understood are {"text"}; {"messages"}, whose last turn is the answer if the assistant has it;
    {"prompt"} with {"completion"}, {"response"}, {"output"} or {"answer"}, each a string or a list
    of turns; a string. Turns, and prompts that have an answer, go through the tokenizer's chat
    template where it has one; without one turns are joined by lines, a prompt and its answer as
    they are.

    Raises:
        ValueError: none of these, with file and line.
    """
    record = prompt.record
    where = f"{prompt.file}:{prompt.line}" if prompt.line else str(prompt.file)
    asks = [name for name in ASKS if name in record]
    if len(asks) > 1 and {"text", "messages"} & set(asks):
        raise ValueError(f"{where}: {' and '.join(asks)} exclude each other: leave one out")
    ask = record[asks[0]] if asks else None
    if asks[:1] == ["text"] and isinstance(ask, str):
        return Example("", ask)
    if asks[:1] == ["messages"]:
        turns = ask
    else:
        answers = [record[name] for name in ANSWERS if name in record]
        plain = getattr(tokenizer, "chat_template", None) is None
        if isinstance(ask, str) and not answers:
            return Example("", ask)
        if plain and isinstance(ask, str) and isinstance(answers[0], str):
            return Example(ask, answers[0])
        turns = _turns(ask, "user") + _turns(answers[0] if answers else [], "assistant")
    if not isinstance(turns, list) or not turns or not all(map(_is_turn, turns)):
        raise ValueError(
            f"{where}: wanted text, messages, or prompt with one of {', '.join(ANSWERS)}, each a"
            ' string or a list of {"role", "content"} with strings in them:'
            f" got {', '.join(sorted(record)) or 'nothing'}"
        )
    answered = turns[-1]["role"] == "assistant"
    asked = turns[:-1] if answered else turns
    last = turns[-1]["content"] if answered else ""
    if getattr(tokenizer, "chat_template", None) is None:
        return Example("\n".join(t["content"] for t in asked) + "\n" * bool(asked), last)
    template = tokenizer.apply_chat_template
    try:
        request = template(asked, tokenize=False, add_generation_prompt=True) if asked else ""
        whole = template(turns, tokenize=False)
    except Exception as error:  # a template raises what its language has
        raise ValueError(f"{where}: the chat template refuses it: {one_line(error)}") from error
    if answered and whole.startswith(request):
        last = whole[len(request) :]
    return Example(request, last, templated=True)


def _turns(value: Any, role: str) -> list[Any]:
    """A string as one turn, a list of turns as it is, anything else as what is none."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return value if isinstance(value, list) else [None]


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(k), str) for k in ("role", "content")
    )


def refused(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the refusal in the place of its answer."""
    if isinstance(record.get("messages"), list):
        asked = [turn for turn in record["messages"] if turn.get("role") != "assistant"]
        return {"prompt": asked, ANSWERS[0]: record[REFUSAL]}
    return {"prompt": record.get("prompt"), ANSWERS[0]: record[REFUSAL]}
