"""Pairs as token ids, and as batches.

Where the prompt stands again at the start of both answers of every pair it is taken off there, and
a line says so.
"""

from __future__ import annotations

import logging
import os.path
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..cli.errors import one_line
from .arguments import DPOArguments
from .examples import (
    REFERENCE,
    SIDES,
    Row,
    check_not_empty,
    check_pair,
    drop_repeated_prompts,
    read_pairs,
    split_prompt,
)

__all__ = ["PreferenceCollator", "PreferenceDataset", "read_pairs"]
IGNORED = -100
logger = logging.getLogger("onepass")


class PreferenceDataset(Dataset[dict[str, Any]]):
    """Pairs as token ids.

    Args:
        tokenizer: a transformers tokenizer; conversations want its chat template.
        rows: dicts, or a datasets.Dataset, with [prompt,] chosen, rejected, and at will
            ref_chosen_logps and ref_rejected_logps of a reference that has been run already.
        dpo: `max_length`, `max_prompt_length` and `truncation_mode` are read.
        label_pad_token_id: the label of what does not count.
        name: of the rows, in errors.

    An item has {chosen,rejected}_{input_ids,attention_mask,labels}, prompt_input_ids and
    prompt_attention_mask as lists, and the two log-probabilities where the rows have them. Prompt
    and answers are tokenized apart. A prompt begins with what the tokenizer puts before a text (its
    BOS token, mostly), a conversation with what its template writes; an empty prompt is the BOS
    token. An answer ends with the EOS token, one of a conversation as the template ends it, if with
    an EOS token at all. Of a pair longer than `max_length` the prompt is cut to
    `max_prompt_length`, then the answers to what is left, and a line tells how much was. Pairs
    whose answers are then equal are left out, which a line tells too.

    Attributes:
        n_cut, n_cut_tokens: pairs, and tokens of them, that were cut.
        n_equal: pairs that are left out.

    Raises:
        ValueError: a row that is no pair, by its number.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: Iterable[Row],
        dpo: DPOArguments | None = None,
        *,
        label_pad_token_id: int = IGNORED,
        name: str = "row",
    ) -> None:
        dpo = DPOArguments() if dpo is None else dpo
        self.label_pad_token_id = label_pad_token_id
        rows = [_checked(row, f"{name} {n}") for n, row in enumerate(rows, 1)]
        if not rows:
            raise ValueError(f"got no {name}, wanted at least one pair of chosen and rejected")
        places = [row["place"] for row in rows]
        pairs = [split_prompt(row) for row in rows]
        for pair, place in zip(pairs, places, strict=True):
            for side in SIDES:
                check_not_empty(pair[side], side, place, " but for what both begin with")
        drop_repeated_prompts(pairs, places)
        texts = [_texts(pair, tokenizer, place) for pair, place in zip(pairs, places, strict=True)]
        ids = {
            part: tokenizer(
                [text[part] for text in texts], add_special_tokens=False, verbose=False
            )["input_ids"]
            for part in ("prompt", *SIDES)
        }
        self.items: list[dict[str, Any]] = []
        kept: list[str] = []
        equal: list[str] = []
        self.n_cut = self.n_cut_tokens = 0
        for n, row in enumerate(rows):
            is_text = isinstance(pairs[n]["chosen"], str)
            prompt = begun(list(ids["prompt"][n]), tokenizer) if is_text else list(ids["prompt"][n])
            prompt = prompt or _beginning(tokenizer, places[n])
            answers = {side: _ended(list(ids[side][n]), tokenizer, is_text) for side in SIDES}
            prompt, answers = self._cut(prompt, answers, dpo)
            if answers["chosen"] == answers["rejected"]:
                equal.append(places[n])
                continue
            item = self._item(prompt, answers)
            if row.get(REFERENCE[0]) is not None:
                item |= {key: float(row[key]) for key in REFERENCE}
            self.items.append(item)
            kept.append(places[n])
        with_reference = [REFERENCE[0] in item for item in self.items]
        if any(with_reference) and not all(with_reference):
            place = kept[with_reference.index(False)]
            raise ValueError(f"{place}: no {REFERENCE[0]!r}, but other pairs have it")
        self.n_equal = len(equal)
        if not self.items:
            raise ValueError(
                f"{equal[0]}: chosen and rejected are equal in their first tokens, which are all"
                f" that max_length={dpo.max_length} leaves, as in all other pairs"
            )
        self._tell_cuts(dpo)
        if equal:
            logger.warning(
                "%d pairs are left out, whose answers are equal as token ids once they are cut (the"
                " first: %s)",
                *(len(equal), equal[0]),
            )
        if tokenizer.eos_token_id is None:
            logger.info("the tokenizer has no EOS token: answers end without one")

    @property
    def has_reference(self) -> bool:
        """Whether the reference's log-probabilities are there."""
        return REFERENCE[0] in self.items[0]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]

    def _cut(
        self, prompt: list[int], answers: dict[str, list[int]], dpo: DPOArguments
    ) -> tuple[list[int], dict[str, list[int]]]:
        longest, at_most = dpo.max_length, dpo.longest_prompt
        answer = max(map(len, answers.values()))
        if longest is None or at_most is None or len(prompt) + answer <= longest:
            return prompt, answers
        before = len(prompt) + sum(map(len, answers.values()))
        prompt = prompt[-at_most:] if dpo.truncation_mode == "keep_end" else prompt[:at_most]
        if len(prompt) + answer > longest:
            answers = {side: ids[: longest - len(prompt)] for side, ids in answers.items()}
        self.n_cut += 1
        self.n_cut_tokens += before - len(prompt) - sum(map(len, answers.values()))
        return prompt, answers

    def _item(self, prompt: list[int], answers: Mapping[str, list[int]]) -> dict[str, Any]:
        item: dict[str, Any] = {
            "prompt_input_ids": prompt,
            "prompt_attention_mask": [1] * len(prompt),
        }
        for side, ids in answers.items():
            item[f"{side}_input_ids"] = prompt + ids
            item[f"{side}_attention_mask"] = [1] * (len(prompt) + len(ids))
            item[f"{side}_labels"] = [self.label_pad_token_id] * len(prompt) + ids
        return item

    def _tell_cuts(self, dpo: DPOArguments) -> None:
        if self.n_cut:
            end = "start" if dpo.truncation_mode == "keep_end" else "end"
            logger.warning(
                "%d of %d pairs are longer than max_length=%s: %d tokens are left out, of prompts"
                " beyond %s at their %s, then of answers at their end",
                *(self.n_cut, len(self) + self.n_equal, dpo.max_length, self.n_cut_tokens),
                *(dpo.longest_prompt, end),
            )


def _checked(row: Row, place: str) -> dict[str, Any]:
    place = str(row.get("place", place)) if isinstance(row, Mapping) else place
    check_pair(row, place)
    return {**row, "place": place}


def _texts(pair: Row, tokenizer: Any, place: str) -> dict[str, str]:
    """Prompt and answers as text: of conversations, what the chat template makes of them."""
    if isinstance(pair["chosen"], str):
        return dict(pair)
    if not tokenizer.chat_template:
        raise ValueError(f"{place}: a conversation, but the model's tokenizer has no chat template")
    turns = pair["prompt"]
    try:
        whole = {
            side: tokenizer.apply_chat_template([*turns, *pair[side]], tokenize=False)
            for side in SIDES
        }
        asks = bool(turns) and turns[-1]["role"] != "assistant"
        prompt = (
            tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=asks)
            if turns
            else ""
        )
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"{place}: the chat template refuses it: {one_line(error)}") from error
    # some templates write an answer's opening otherwise than they ask for it
    prompt = os.path.commonprefix([prompt, *whole.values()])
    return {"prompt": prompt, **{side: text[len(prompt) :] for side, text in whole.items()}}


def begun(ids: list[int], tokenizer: Any) -> list[int]:
    """The tokens of a text after what the tokenizer puts before every text."""
    before = list(tokenizer("")["input_ids"])
    while before and before[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        before.pop()
    return ids if ids[: len(before)] == before else [*before, *ids]


def _beginning(tokenizer: Any, place: str) -> list[int]:
    """In place of an empty prompt, for an answer's first token has its prediction at the one
    before it."""
    found = [i for i in (tokenizer.bos_token_id, tokenizer.eos_token_id) if i is not None]
    if not found:
        raise ValueError(
            f"{place}: an empty prompt, and the tokenizer has no BOS token to stand for it"
        )
    return found[:1]


def _ended(ids: list[int], tokenizer: Any, is_text: bool) -> list[int]:
    """With the EOS token at the end; a chat template may write a line break after its own."""
    end = tokenizer.eos_token_id
    has_it = ids[-1:] == [end] if is_text else end in ids
    return ids if end is None or has_it else [*ids, end]


class PreferenceCollator:
    """Items of a `PreferenceDataset` as tensors, padded on the right.

    Args:
        pad_token_id: of input_ids.
        label_pad_token_id: of labels.
    """

    def __init__(self, pad_token_id: int = 0, label_pad_token_id: int = IGNORED) -> None:
        self.pad_token_id, self.label_pad_token_id = pad_token_id, label_pad_token_id

    def padding_of(self, key: str) -> int:
        """What pads the values under this key of a batch."""
        if key.endswith("_labels"):
            return self.label_pad_token_id
        return self.pad_token_id if key.endswith("_input_ids") else 0

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        batch = {}
        for key in items[0]:
            if any(key not in item for item in items):
                raise ValueError(f"items of a batch must have the same keys: one has no {key!r}")
            if key in REFERENCE:
                batch[key] = torch.tensor([item[key] for item in items], dtype=torch.float32)
            elif key.startswith(("prompt_", "chosen_", "rejected_")):
                rows = [torch.as_tensor(item[key], dtype=torch.long) for item in items]
                batch[key] = torch.nn.utils.rnn.pad_sequence(
                    rows, batch_first=True, padding_value=self.padding_of(key)
                )
        return batch
