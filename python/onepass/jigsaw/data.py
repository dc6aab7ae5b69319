"""Text and conversations as batches of token ids that say which tokens a transform is for.

Of a conversation those are the contents of its messages; what the chat template writes around them
stays as it is. Where a template reworks a content so that its ends are lost, what lies between its
neighbours counts as content, and where it also writes a piece of one everything does: rather a
marker too many than a word too few.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..cli.errors import one_line
from ..ops._check import check_choice
from ..training.prompts import FIELDS, Prompt, read_prompts

MULTIPLE = 8  # of a padded length
SIDES = ("left", "right")
SYSTEM = ("system", "developer")  # the roles that are a system prompt
ASSISTANT = "assistant"
ANSWERS = ("completion", "response", "output", "answer")  # the fields of a prompt's answer
MARKS = 0xF0000  # the first of the private characters that stand at the ends of contents
logger = logging.getLogger("onepass")

Conversation = Sequence[Mapping[str, Any]]
Entry = str | Conversation
Span = tuple[int, int]  # of characters, the end not in it


class Encoded(NamedTuple):
    """The tokens of one entry, and whether each is transformed and counted."""

    input_ids: list[int]
    noise_mask: list[bool]
    loss_mask: list[bool]


class Answered(NamedTuple):
    """A prompt and its answer as plain text, where there is no chat template."""

    prompt: str
    answer: str


class NoiseTokenizer:
    """A tokenizer that also marks what a transform is for.

    Args:
        tokenizer: of transformers; a fast one for conversations.
        max_length: at most so many tokens, what is longer loses its end; None: the model_max_length
            of the tokenizer.
        transform_system: whether system prompts are transformed.
        transform_answers: whether the assistant's messages are. They are not where the model itself
            generates them: what it wrote comes back to it clean.
        ignore_prompt_loss: whether protection and guardrails count the assistant's messages only;
            otherwise they count all that is transformed.
        padding_side: "left" or "right"; None: the tokenizer's.
        pad_to_multiple_of: a padded length is one, or max_length.

    Special tokens and padding are neither transformed nor counted.

    Source: Stained Glass Engine, NoiseTokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        transform_system: bool = True,
        transform_answers: bool = False,
        ignore_prompt_loss: bool = False,
        padding_side: str | None = None,
        pad_to_multiple_of: int = MULTIPLE,
    ) -> None:
        if not hasattr(tokenizer, "padding_side"):
            kind = type(tokenizer).__name__
            raise TypeError(f"tokenizer must be one of transformers: got {kind}")
        self.padding_side = tokenizer.padding_side if padding_side is None else padding_side
        check_choice("padding_side", self.padding_side, SIDES)
        if max_length is None:  # where a tokenizer has none it says 10^30
            max_length = int(min(tokenizer.model_max_length, sys.maxsize))
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0: got {value!r}")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.transform_system, self.transform_answers = transform_system, transform_answers
        self.ignore_prompt_loss = ignore_prompt_loss
        self.pad_to_multiple_of = pad_to_multiple_of
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special = {
            *tokenizer.all_special_ids,
            *(number for number, token in added.items() if token.special),
        }
        # A word that the vocabulary has not is content, where its token is no other's.
        unknown = getattr(tokenizer, "unk_token_id", None)
        if unknown not in (tokenizer.eos_token_id, getattr(tokenizer, "bos_token_id", None)):
            self._special -= {unknown}

    def __call__(
        self, entries: Entry | Sequence[Entry], *, add_generation_prompt: bool = False
    ) -> dict[str, Tensor]:
        """A batch: input_ids and attention_mask (int64), noise_mask and loss_mask (bool), [B, S].

        Args:
            entries: texts and conversations (lists of {"role", "content"}), or one of either.
            add_generation_prompt: let conversations end where the assistant begins to answer.

        Raises:
            TypeError, ValueError: an entry that is neither, is empty or has nothing to transform;
            a conversation where there is no chat template, or that it refuses. Of several entries
            it is said which.
        """
        one = isinstance(entries, str) or (bool(entries) and isinstance(entries[0], Mapping))
        listed: Any = [entries] if one else list(entries)
        if not listed:
            raise ValueError("entries must be texts or conversations: got none")
        return self.pad(self._all(listed, add_generation_prompt))

    def encode(self, entries: Iterable[Entry]) -> list[Encoded]:
        """The tokens of each entry, without padding; raises as a call does."""
        return self._all(list(entries), False)

    def pad(self, encoded: Sequence[Encoded]) -> dict[str, Tensor]:
        """The batch of what `encode` gave, padded on this tokenizer's side with its token."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return data_collator(
            [e._asdict() for e in encoded],
            pad_token_id=next((number for number in known if number is not None), 0),
            padding_side=self.padding_side,
            pad_to_multiple_of=self.pad_to_multiple_of,
            max_length=self.max_length,
        )

    def collate(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of items of `JigsawDataset`, padded likewise: a Trainer's data_collator."""
        return self.pad([Encoded(**item) for item in items])

    def _all(self, entries: Sequence[Any], add_generation_prompt: bool) -> list[Encoded]:
        encoded = []
        for number, entry in enumerate(entries, 1):
            place = f"entry {number} of {len(entries)}: " if len(entries) > 1 else ""
            with _named(place):
                encoded.append(self._whole(entry, add_generation_prompt))
                if not any(encoded[-1].noise_mask):
                    raise ValueError("an entry must have text to transform: got none")
        return self._cut(encoded)

    def _cut(self, encoded: Sequence[Encoded]) -> list[Encoded]:
        at_most = self.max_length
        if n_cut := sum(len(e.input_ids) > at_most for e in encoded):
            logger.warning(
                "%d of %d entries have more than %d tokens and lose their end",
                *(n_cut, len(encoded), at_most),
            )
        return [Encoded(ids[:at_most], n[:at_most], c[:at_most]) for ids, n, c in encoded]

    def _whole(self, entry: Any, add_generation_prompt: bool) -> Encoded:
        if isinstance(entry, str):
            encoded = self._text(entry)
        elif isinstance(entry, Answered):
            encoded = self._answered(entry)
        elif isinstance(entry, Sequence):
            encoded = self._conversation(entry, add_generation_prompt)
        else:
            raise TypeError(
                f"an entry must be a string or a list of messages: got {type(entry).__name__}"
            )
        if not entry or not encoded.input_ids:  # what is empty may get a special token
            raise ValueError("an entry must have tokens: got an empty one")
        return encoded

    def _text(self, text: str) -> Encoded:
        ids = list(self.tokenizer(text, verbose=False)["input_ids"])
        noised = [number not in self._special for number in ids]
        return Encoded(ids, noised, list(noised))

    def _answered(self, entry: Answered) -> Encoded:
        """Tokens of the prompt by itself, as it will be when an answer is generated."""
        ids = list(self.tokenizer(entry.prompt, verbose=False)["input_ids"])
        n_end = next((n for n, i in enumerate(reversed(ids)) if i not in self._special), len(ids))
        ids, end = ids[: len(ids) - n_end], ids[len(ids) - n_end :]
        answer = list(
            self.tokenizer(entry.answer, add_special_tokens=False, verbose=False)["input_ids"]
        )
        whole = [*ids, *answer, *end]
        answered = slice(len(ids), len(ids) + len(answer))
        noised = [number not in self._special for number in whole]
        counted = list(noised)
        if not self.transform_answers:
            noised[answered] = [False] * len(answer)
        if not self.ignore_prompt_loss:
            return Encoded(whole, noised, list(noised))
        counted[: answered.start] = [False] * len(ids)
        return Encoded(whole, noised, counted)

    def _conversation(self, turns: Conversation, add_generation_prompt: bool) -> Encoded:
        if not turns or not all(map(_is_turn, turns)):
            raise ValueError(
                'a conversation must be a list of {"role": ..., "content": text}: got'
                f" {_shown(turns)}"
            )
        name = type(self.tokenizer).__name__
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                f"{name} has no chat template, so that nobody knows how it would write messages:"
                " set tokenizer.chat_template, or pass texts"
            )
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"{name} does not tell where its tokens lie in the text: conversations need a fast"
                " tokenizer"
            )

        def render(contents: Sequence[str]) -> str:
            messages = [
                {**turn, "content": content} for turn, content in zip(turns, contents, strict=True)
            ]
            rendered: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            return rendered

        contents = [turn["content"] for turn in turns]
        try:
            text = render(contents)
        except Exception as error:  # a template raises what its language has
            raise ValueError(f"the chat template refuses it: {one_line(error)}") from error
        spans = _spans(text, contents, render)
        noised_spans, counted_spans = [], []
        for turn, own in zip(turns, spans, strict=True):
            is_noised = self.transform_system or turn["role"] not in SYSTEM
            if is_answer := turn["role"] == ASSISTANT:
                is_noised = self.transform_answers
            noised_spans += own if is_noised else []
            counted_spans += own if (is_answer if self.ignore_prompt_loss else is_noised) else []
        found = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        ids, offsets = list(found["input_ids"]), found["offset_mapping"]
        plain = [number not in self._special for number in ids]
        noised, counted = (
            [is_plain and _touches(o, own) for is_plain, o in zip(plain, offsets, strict=True)]
            for own in (noised_spans, counted_spans)
        )
        return Encoded(ids, noised, counted)


class JigsawDataset(Dataset[dict[str, Any]]):
    """The entries of a file, or of a list, as the trainer takes them.

    Args:
        tokenizer: a NoiseTokenizer, or one of transformers.
        source: a file as `read_prompts` takes it; or texts, conversations and its prompts. A record
            with "messages" (or another of its fields holding messages) is a conversation; so are a
            prompt and its "completion" (or "response", "output", "answer"), which are one text
            where there is no chat template.
        num_examples: at most so many; None takes all.

    An item has input_ids, noise_mask and loss_mask, [S] each. Entries of one token, or with nothing
    to transform, have nothing to tell of and are left out, with a warning.

    Raises:
        FileNotFoundError, TypeError, ValueError: as `read_prompts` and `NoiseTokenizer`, with file
        and line; or where nothing is left.
    """

    def __init__(
        self,
        tokenizer: Any,
        source: str | Path | Sequence[Entry | Prompt],
        num_examples: int | None = None,
    ) -> None:
        if not isinstance(tokenizer, NoiseTokenizer):
            tokenizer = NoiseTokenizer(tokenizer)
        entries = read_prompts(source) if isinstance(source, str | Path) else source
        encoded = []
        for number, entry in enumerate(entries[:num_examples], 1):
            with _named(_place(entry, number)):
                encoded.append(tokenizer._whole(_entry(entry, tokenizer.tokenizer), False))
        kept = [e for e in tokenizer._cut(encoded) if len(e.input_ids) > 1 and any(e.noise_mask)]
        if not kept:
            raise ValueError(f"none of {len(encoded)} entries has text to transform")
        if n_left := len(encoded) - len(kept):
            logger.warning(
                "%d of %d entries have one token or nothing to transform and are left out",
                *(n_left, len(encoded)),
            )
        self.encoded = kept

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: torch.tensor(x) for name, x in self.encoded[index]._asdict().items()}


def data_collator(
    items: Sequence[Mapping[str, Any]],
    *,
    pad_token_id: int = 0,
    padding_side: str = "right",
    pad_to_multiple_of: int = MULTIPLE,
    max_length: int | None = None,
) -> dict[str, Tensor]:
    """A batch of items, as a call of NoiseTokenizer returns it.

    Args:
        items: each with input_ids [S], and attention_mask, noise_mask and loss_mask [S], or
            without: then all tokens are attended to, noise is for all of these, and what is
            transformed is counted.
        pad_token_id: what stands in the padding, which attention_mask leaves out.
        padding_side, pad_to_multiple_of: of the padding.
        max_length: to which a length that is no multiple may be padded.

    Raises:
        ValueError: no items, one without input_ids, or whose masks have another length.
    """
    check_choice("padding_side", padding_side, SIDES)
    if not items:
        raise ValueError("items must hold at least one: got none")
    rows = []
    for number, item in enumerate(items):
        if "input_ids" not in item:
            raise ValueError(f"item {number} has no input_ids: got {', '.join(item) or 'nothing'}")
        ids = torch.as_tensor(item["input_ids"], dtype=torch.long)
        attended = torch.as_tensor(item.get("attention_mask", [1] * len(ids)), dtype=torch.long)
        noised = torch.as_tensor(item.get("noise_mask", attended), dtype=torch.bool)
        counted = torch.as_tensor(item.get("loss_mask", noised), dtype=torch.bool)
        lengths = [len(mask) for mask in (attended, noised, counted)]
        if lengths != [len(ids)] * 3:
            raise ValueError(
                f"item {number} must have masks as long as its input_ids, {len(ids)}: got"
                f" {lengths[0]} (attention), {lengths[1]} (noise) and {lengths[2]} (loss)"
            )
        rows.append((ids, attended, noised, counted))
    longest = max(len(ids) for ids, *_ in rows)
    length = -(-longest // pad_to_multiple_of) * pad_to_multiple_of
    if max_length is not None:
        length = max(min(length, max_length), longest)
    shape = (len(rows), length)
    batch = {
        "input_ids": torch.full(shape, pad_token_id),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "noise_mask": torch.zeros(shape, dtype=torch.bool),
        "loss_mask": torch.zeros(shape, dtype=torch.bool),
    }
    for row, (ids, attended, noised, counted) in enumerate(rows):
        here = slice(0, len(ids)) if padding_side == "right" else slice(length - len(ids), length)
        batch["input_ids"][row, here] = ids
        batch["attention_mask"][row, here] = attended
        batch["noise_mask"][row, here] = noised
        batch["loss_mask"][row, here] = counted
    return batch


@contextmanager
def _named(place: str) -> Iterator[None]:
    """What is wrong with an entry is said with its place."""
    try:
        yield
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{place}{error}") from error


def _place(entry: Any, number: int) -> str:
    if not isinstance(entry, Prompt):
        return f"entry {number}: "
    if entry.line is not None:
        return f"{entry.file}:{entry.line}: "
    # Prompts may have been drawn from a document: their number here is not that of theirs there.
    return f"{entry.file}: the entry {entry.text[:40]!r}: "


def _entry(entry: Any, tokenizer: Any) -> Any:
    """The text or the conversation of a record, with its answer."""
    if not isinstance(entry, Prompt):
        return entry
    record = entry.record
    if isinstance(record.get("messages"), list):
        return record["messages"]
    field = next((name for name in FIELDS if name in record), "text")
    ask = record[field] if isinstance(record.get(field), list) else entry.text
    answer = next((record[name] for name in ANSWERS if record.get(name)), None)
    if answer is None or field == "text":
        return ask
    if not isinstance(answer, str | list):
        raise ValueError(
            "the answer to a prompt must be a string or a list of messages: got"
            f" {type(answer).__name__}"
        )
    if isinstance(ask, str) and isinstance(answer, str):
        if getattr(tokenizer, "chat_template", None) is None:
            return Answered(ask, answer)
    return [*_turns(ask, "user"), *_turns(answer, ASSISTANT)]


def _turns(value: str | list[Any], role: str) -> list[Any]:
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _is_turn(turn: Any) -> bool:
    return isinstance(turn, Mapping) and all(
        isinstance(turn.get(name), str) for name in ("role", "content")
    )


def _shown(turns: Any) -> str:
    wrong = next((turn for turn in turns if not _is_turn(turn)), None)
    return "none" if wrong is None else one_line(ValueError(repr(wrong)[:80]))


def _spans(text: str, contents: Sequence[str], render: Any) -> list[list[Span]]:
    """Where each content lies in the rendered text; a content may be there more than once.

    The template is given the contents again with a private character at both ends of what strip()
    leaves of each, and is asked for where those end up; then without the whitespace around them, so
    that what still is there between two ends is its own; then with nothing between the characters,
    so that what it also writes of the inside of a content is not taken for its own text.
    """
    first = MARKS
    while any(first <= ord(c) < first + 2 * len(contents) for c in "".join([text, *contents])):
        first += 2 * len(contents)
    cores = [content.strip() for content in contents]
    marked = [chr(first + 2 * n) + core + chr(first + 2 * n + 1) for n, core in enumerate(cores)]
    within, alone, bare = [], [], []
    for content, core, own in zip(contents, cores, marked, strict=True):
        within.append(content.replace(core, own, 1) if core else content)
        alone.append(own if core else content)
        bare.append(content.replace(core, own[0] + own[-1], 1) if core else content)
    everything: list[list[Span]] = [[(0, len(text))] if core else [] for core in cores]
    try:
        gaps, marks = _gaps(render(within), first, len(contents))
        own_gaps, own_marks = _gaps(render(alone), first, len(contents))
        without, _ = _gaps(render(bare), first, len(contents))
    except Exception:  # refuses what is like the content and is not it
        return everything
    if "".join(gaps) != text:  # depends on more than where the contents stand
        return everything
    if marks != own_marks:
        own_gaps = [gap.strip() for gap in gaps]
    befores = ["", *(contents[mark // 2] for mark in marks)]
    kept = [_kept(*its) for its in zip(gaps, own_gaps, befores, strict=True)]
    ends: list[tuple[int, int]] = []  # place in the text, which mark
    place = 0
    for n, mark in enumerate(marks):
        place += len(gaps[n])
        ends.append((place + kept[n + 1][0] if mark % 2 else place - kept[n][1], mark))
    spans: list[list[Span]] = []
    lost = []
    for n, core in enumerate(cores):
        starts = [place for place, mark in ends if mark == 2 * n]
        stops = [place for place, mark in ends if mark == 2 * n + 1]
        spans.append(list(zip(starts, stops, strict=False)))
        if core and (not starts or len(starts) != len(stops) or any(a > b for a, b in spans[n])):
            lost.append(n)
    for n in lost:
        left = [place for place, mark in ends if mark // 2 == n]
        begin = max((b for known in spans[:n] for _, b in known), default=0)
        stop = min(
            (a for known in spans[n + 1 :] for a, _ in known if a >= begin), default=len(text)
        )
        spans[n] = [(min([begin, *left]), max([stop, *left]))]
    if not _is_templates(_outside(text, spans), "".join(without), bool(lost)):
        return everything
    return spans


def _outside(text: str, spans: Sequence[Sequence[Span]]) -> list[str]:
    """What of the text is in no span, in pieces."""
    pieces, place = [], 0
    for start, stop in sorted(span for own in spans for span in own):
        pieces.append(text[place : max(place, start)])
        place = max(place, stop)
    return [*pieces, text[place:]]


def _is_templates(pieces: Sequence[str], without: str, some_lost: bool) -> bool:
    """Whether these pieces of a text are, but for whitespace, what the template writes without the
    contents; where spans reach into that, whether they are in it, in order."""
    pieces, without = ["".join(piece.split()) for piece in pieces], "".join(without.split())
    if not some_lost:
        return "".join(pieces) == without
    begin, *middle, end = pieces
    if not (without.startswith(begin) and without.endswith(end)):
        return False
    place, stop = len(begin), len(without) - len(end)
    for piece in middle:
        at = without.find(piece, place, stop)
        if at < 0:
            return False
        place = at + len(piece)
    return place <= stop


def _gaps(rendered: str, first: int, n_contents: int) -> tuple[list[str], list[int]]:
    """The text before each mark and after the last one, and the marks."""
    parts = re.split(f"([{chr(first)}-{chr(first + 2 * n_contents - 1)}])", rendered)
    return parts[::2], [ord(mark) - first for mark in parts[1::2]]


def _kept(gap: str, own: str, before: str) -> tuple[int, int]:
    """How much whitespace around the template's own text is that of the contents before and after;
    where that text is not there, all that could be."""
    find = str.rfind if before[-1:].isspace() else str.find
    at = find(gap, own)
    if at < 0 or (gap[:at] + gap[at + len(own) :]).strip():
        own = gap.strip()
        at = find(gap, own)
    return at, len(gap) - at - len(own)


def _touches(token: Span, spans: Sequence[Span]) -> bool:
    """Whether a token has a character in a span; one without characters (tokenizers leave spaces
    out of their places) whether it lies in one or at its end."""
    start, stop = token
    if start == stop:
        return any(a <= start <= b and a < b for a, b in spans)
    return any(start < b and stop > a for a, b in spans)
