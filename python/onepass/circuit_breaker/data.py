"""Examples to retain and to break, as batches of token ids.

An example to break is a request and its answer: the request is padded on the left, the answer on
the right, so that they meet at one column of every batch.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .arguments import LorraArguments
from .examples import REFUSAL, Example, Source, example_of, read_source, refused

MULTIPLE = 8  # of a padded length
logger = logging.getLogger("onepass")


class CircuitBreakerDataset(Dataset[dict[str, Tensor]]):
    """Triples of an example to retain, one to break and one to watch.

    Args:
        tokenizer: a transformers tokenizer.
        num_examples: at most so many of each kind; None takes all.
        lorra_args: `model_max_length` and `use_refusal_retain` are read.
        model_name_or_path: not looked at; the published class takes it.
        retain, harmful: files, or lists of strings and records; see `example_of`.
        val: the examples to watch, harmful ones that are not trained on; optional.
        seed: of the order that examples are drawn in.

    An item has `input_ids` and `attention_mask` [1, S], `*_circuit_breaker` and, with val, `*_val`,
    each S the longest of its kind and at most `model_max_length`. There are as many items as
    examples of the rarer of retain and harmful; val begins again where it ends.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, empty or malformed, by file and line.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_examples: int | None = None,
        lorra_args: LorraArguments | None = None,
        model_name_or_path: str | None = None,
        *,
        retain: Source,
        harmful: Source,
        val: Source | None = None,
        seed: int = 0,
    ) -> None:
        lorra = LorraArguments() if lorra_args is None else lorra_args
        kept, broken = read_source(retain, "retain"), read_source(harmful, "harmful")
        examples = {
            "": [example_of(p, tokenizer) for p in kept],
            "_circuit_breaker": [example_of(p, tokenizer) for p in broken],
        }
        if val is not None:
            examples["_val"] = [example_of(p, tokenizer) for p in read_source(val, "val")]
        shuffle = random.Random(seed)
        for ending, kind in examples.items():
            if ending != "_val":
                shuffle.shuffle(kind)
        if lorra.use_refusal_retain:
            refusals = [p for p in broken if isinstance(p.record.get(REFUSAL), str)]
            if not refusals:
                raise ValueError(f"use_refusal_retain: no record of harmful has {REFUSAL!r}")
            answered = [p._replace(record=refused(p.record)) for p in refusals]
            examples[""][:0] = [example_of(p, tokenizer) for p in answered]
            shuffle.shuffle(examples[""])
        n_items = min(len(examples[""]), len(examples["_circuit_breaker"]))
        self.n_items = n_items if num_examples is None else min(n_items, num_examples)
        self.tokens = {
            ending: tokens_of(tokenizer, kind[: self.n_items], lorra.model_max_length)
            for ending, kind in examples.items()
        }

    def __len__(self) -> int:
        return self.n_items

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not -self.n_items <= index < self.n_items:
            raise IndexError(f"item {index} of {self.n_items}")
        item = {}
        for ending, (ids, mask) in self.tokens.items():
            row = index % len(ids)
            item[f"input_ids{ending}"] = ids[row : row + 1]
            item[f"attention_mask{ending}"] = mask[row : row + 1]
        return item


def tokens_of(
    tokenizer: Any, examples: Sequence[Example], max_length: int
) -> tuple[Tensor, Tensor]:
    """input_ids and attention_mask [n, S]: requests padded on the left, answers on the right.

    Where both are there each has half of `max_length`, and what is longer loses its end.
    """
    special = [not e.templated for e in examples]
    begins = [not e.templated and not e.request for e in examples]
    requests = _encoded(tokenizer, [e.request for e in examples], special)
    answers = _encoded(tokenizer, [e.answer for e in examples], begins)
    both = any(requests) and any(answers)
    at_most = max_length // 2 if both else max_length
    n_cut = sum(
        len(r) > at_most or len(a) > at_most for r, a in zip(requests, answers, strict=True)
    )
    if n_cut:
        logger.warning(
            "%d of %d examples have a side of more than %d tokens and lose its end",
            *(n_cut, len(examples), at_most),
        )
    left, right = (_padded_length(side, at_most) for side in (requests, answers))
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids = torch.full((len(examples), left + right), pad)
    mask = torch.zeros_like(ids)
    for row, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        request, answer = request[:at_most], answer[:at_most]
        here = slice(left - len(request), left + len(answer))
        ids[row, here] = torch.tensor(request + answer, dtype=ids.dtype)
        mask[row, here] = 1
    return ids, mask


def _encoded(tokenizer: Any, texts: Sequence[str], special: Sequence[bool]) -> list[list[int]]:
    """Token ids of each text, with the special tokens around it where `special` says so."""
    encoded: list[list[int]] = [[] for _ in texts]
    for wanted in (True, False):
        rows = [n for n, text in enumerate(texts) if text and special[n] == wanted]
        if rows:
            found = tokenizer([texts[n] for n in rows], add_special_tokens=wanted)["input_ids"]
            for n, ids in zip(rows, found, strict=True):
                encoded[n] = list(ids)
    return encoded


def _padded_length(side: list[list[int]], at_most: int) -> int:
    longest = min(max(map(len, side), default=0), at_most)
    return min(-(-longest // MULTIPLE) * MULTIPLE, at_most)


def data_collator(batch_list: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch of items: tensors joined along dimension 0, whole numbers as one tensor.

    Raises:
        ValueError: an item with a value of another kind, or of other keys than the first.
    """
    batch = {}
    for key in batch_list[0]:
        if any(key not in item for item in batch_list):
            raise ValueError(f"items of a batch must have the same keys: one has no {key!r}")
        values = [item[key] for item in batch_list]
        if all(isinstance(value, Tensor) for value in values):
            batch[key] = torch.cat(values, dim=0)
        elif all(isinstance(value, int) for value in values):
            batch[key] = torch.tensor(values)
        else:
            kind = type(values[0]).__name__
            raise ValueError(f"Return data type not implemented: {key} is {kind}")
    return batch
