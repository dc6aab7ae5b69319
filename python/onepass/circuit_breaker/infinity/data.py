"""Prompts to retain, to break and to validate on, as Infinity's training loop takes them.

Every item holds one prompt of each kind: its text condition and its padded tokens. There are no
images in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch.utils.data import Dataset

from ...training.prompts import Prompt, read_prompts
from ..examples import split
from .text import (
    MAX_LENGTH,
    TextEncoder,
    as_text_encoder,
    batch_text_cond_tuples,
    text_cond_tuple,
)

RETAIN_FILES = (
    "{category}_sanitized_prompts.json",
    "retain_prompts.json",
    "sanitized_prompts.json",
)
HARMFUL_FILES = ("{category}_prompts.json", "circuit_breaker_prompts.json", "harmful_prompts.json")
RETAIN_FIELDS = ("sanitized_prompt", "prompt", "original_prompt")
# Never sanitized_prompt: a file of pairs may be given as both sides.
HARMFUL_FIELDS = ("prompt", "original_prompt")


class InfinityCircuitBreakerDataset(Dataset[dict[str, Any]]):
    """Item i: the i-th prompt of each kind, under the keys that the README of the published
    training script names.

    The kind with the fewest prompts says how many items there are. In epoch e (`set_epoch`, which
    accelerate's data loaders call) the items go on where those of epoch e-1 ended, so that the
    other kinds' prompts all get their turn.
    """

    def __init__(
        self,
        args: Any = None,
        data_path: str | Path | None = None,
        data_load_reso: Any = None,
        max_caption_len: int = MAX_LENGTH,
        short_prob: float = 0.2,
        load_vae_instead_of_image: bool = False,
        harmful_prompts_path: str | Path | None = None,
        sanitized_prompts_path: str | Path | None = None,
        validation_ratio: float = 0.1,
        category: str | None = None,
        *,
        text_encoder: Any = None,
        text_tokenizer: Any = None,
        num_examples: int | None = None,
        seed: int = 0,
        **kw: Any,
    ) -> None:
        """Read and split the prompts; nothing is encoded before an item is asked for.

        Args:
            args: the training script's arguments; `text_encoder` and `text_tokenizer` (or
                `t5_path`) and `num_examples` are taken from it where they are not given here.
            data_path: stands in for either prompts path that is None.
            data_load_reso, short_prob, load_vae_instead_of_image, **kw: of Infinity's own dataset,
                whose arguments this one accepts; prompts without images need none of them.
            max_caption_len: tokens of a prompt; longer ones are cut, shorter ones padded.
            harmful_prompts_path: a file, or a folder with one of HARMFUL_FILES.
            sanitized_prompts_path: a file, or a folder with one of RETAIN_FILES.
            validation_ratio: share of the sanitized prompts, drawn by `seed`, that is validated on
                and not trained on; at least one prompt, or none with 0: items then have no *_val
                keys.
            category: prompts of other categories are left out; None takes all.
            text_encoder: see `text.as_text_encoder`: T5's name or folder, its model with
                `text_tokenizer`, or an object with tokenize() and features().
            num_examples: at most so many prompts to retain and to break.

        Raises:
            FileNotFoundError: no prompt file there.
            ValueError: a prompt file or an argument that does not serve; the message says why.
        """
        num_examples = getattr(args, "num_examples", None) if num_examples is None else num_examples
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples: got {num_examples}, wanted 1 or more")
        if max_caption_len < 1:
            raise ValueError(f"max_caption_len: got {max_caption_len}, wanted 1 or more")
        harmful = _path("harmful_prompts_path", harmful_prompts_path, data_path)
        sanitized = _path("sanitized_prompts_path", sanitized_prompts_path, data_path)

        self.circuit_breaker = read_prompts(
            harmful, names=_names(HARMFUL_FILES, category), category=category, fields=HARMFUL_FIELDS
        )[:num_examples]
        kept = read_prompts(
            sanitized, names=_names(RETAIN_FILES, category), category=category, fields=RETAIN_FIELDS
        )
        Random(seed).shuffle(kept)
        self.retain, self.validation = split(kept, validation_ratio, seed)
        self.retain = self.retain[:num_examples]
        self.max_caption_len = max_caption_len
        self.epoch = 0
        self.text_encoder = _text_encoder(args, text_encoder, text_tokenizer)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return min(len(prompts) for _, prompts in self._kinds())

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """The items of a batch, encoded together; torch's data loaders ask in this way."""
        rows: list[tuple[int, str, Prompt]] = []
        for number, i in enumerate(indices):
            if not -len(self) <= i < len(self):
                raise IndexError(f"item {i} of {len(self)}")
            turn = self.epoch * len(self) + i % len(self)
            rows += [(number, kind, some[turn % len(some)]) for kind, some in self._kinds()]
        input_ids, attention_mask = self.text_encoder.tokenize(
            [prompt.text for _, _, prompt in rows], self.max_caption_len
        )
        features = self.text_encoder.features(input_ids, attention_mask)
        items: list[dict[str, Any]] = [{} for _ in indices]
        for row, (number, kind, _) in enumerate(rows):
            items[number]["text_cond_tuple" + kind] = text_cond_tuple([features[row]])
            items[number]["input_ids" + kind] = input_ids[row]
            items[number]["attention_mask" + kind] = attention_mask[row]
        return items

    def _kinds(self) -> list[tuple[str, list[Prompt]]]:
        kinds = [("", self.retain), ("_circuit_breaker", self.circuit_breaker)]
        return [*kinds, ("_val", self.validation)] if self.validation else kinds


def build_circuit_breaker_dataset(
    args: Any,
    data_path: str | Path | None,
    data_load_reso: Any,
    max_caption_len: int = MAX_LENGTH,
    short_prob: float = 0.2,
    load_vae_instead_of_image: bool = False,
    harmful_prompts_path: str | Path | None = None,
    sanitized_prompts_path: str | Path | None = None,
    validation_ratio: float = 0.1,
    category: str | None = None,
    **kw: Any,
) -> InfinityCircuitBreakerDataset:
    """The dataset, called as Infinity's `build_t2i_dataset` is; arguments as there."""
    return InfinityCircuitBreakerDataset(
        args,
        data_path,
        data_load_reso,
        max_caption_len,
        short_prob,
        load_vae_instead_of_image,
        harmful_prompts_path,
        sanitized_prompts_path,
        validation_ratio,
        category,
        **kw,
    )


def data_collator_infinity(batch_list: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One batch of dataset items: text conditions packed into one, tensors stacked, numbers made
    into a tensor."""
    if not batch_list:
        raise ValueError("batch_list: got no items, wanted at least one")
    batch: dict[str, Any] = {}
    for key in dict.fromkeys(key for item in batch_list for key in item):
        if any(key not in item for item in batch_list):
            raise ValueError(f"batch_list: {key!r} is in some items only, wanted it in all")
        values = [item[key] for item in batch_list]
        if key.startswith("text_cond_tuple"):
            batch[key] = batch_text_cond_tuples(values)
        elif all(isinstance(value, torch.Tensor) for value in values):
            batch[key] = torch.stack(values)
        elif all(isinstance(value, int | float) for value in values):
            batch[key] = torch.tensor(values)
        else:
            raise ValueError(
                f"batch_list: got {type(values[0]).__name__} under {key!r}, wanted tensors or "
                "numbers (or a key text_cond_tuple...)"
            )
    return batch


def _path(name: str, path: str | Path | None, data_path: str | Path | None) -> Path:
    given = path or data_path
    if not given:
        raise ValueError(f"{name}: got nothing, wanted a file or a folder with prompts")
    return Path(given)


def _names(files: Sequence[str], category: str | None) -> list[str]:
    with_category = [name.format(category=category) for name in files]
    return with_category if category is not None else with_category[1:]


def _text_encoder(args: Any, text_encoder: Any, text_tokenizer: Any) -> TextEncoder:
    if text_encoder is None:
        text_encoder = getattr(args, "text_encoder", None)
        text_tokenizer = text_tokenizer or getattr(args, "text_tokenizer", None)
    if text_encoder is None:
        text_encoder = getattr(args, "t5_path", None) or None
    if text_encoder is None:
        raise ValueError(
            "text_encoder: got nothing, wanted the name or folder of a T5 or an encoder "
            "(text_encoder=, or args.text_encoder or args.t5_path)"
        )
    return as_text_encoder(text_encoder, text_tokenizer)
