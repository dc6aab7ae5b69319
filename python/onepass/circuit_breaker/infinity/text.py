"""Text conditions of Infinity: prompts to tokens to features, packed without padding.

A condition is the tuple `(kv_compact, lens, cu_seqlens_k, Ltext)`: the features [sum(lens), C_text]
of all prompts one after another, their lengths, where each begins (int32 [n + 1]), the longest.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from ...cli.errors import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

MAX_LENGTH = 512  # tokens of a prompt, the end of the sentence included
TextCondTuple = tuple[Tensor, list[int], Tensor, int]


@runtime_checkable
class TextEncoder(Protocol):
    """What the dataset asks of a text encoder."""

    def tokenize(self, prompts: Sequence[str], max_length: int) -> tuple[Tensor, Tensor]:
        """input_ids and attention_mask, both int64 [n, max_length], padded on the right."""

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Features [length, C_text] in float32 of each row's tokens, padding left out."""


def text_cond_tuple(features: Sequence[Tensor]) -> TextCondTuple:
    """The condition of prompts with these features [length, C_text]."""
    return _packed(torch.cat(list(features)), [len(feature) for feature in features])


def batch_text_cond_tuples(conditions: Sequence[TextCondTuple]) -> TextCondTuple:
    """One condition of all the prompts of several, in order."""
    lens = [length for _, some, _, _ in conditions for length in some]
    return _packed(torch.cat([kv_compact for kv_compact, _, _, _ in conditions]), lens)


def _packed(kv_compact: Tensor, lens: list[int]) -> TextCondTuple:
    starts = torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=kv_compact.device)
    return kv_compact, lens, starts, max(lens)


class T5TextEncoder:
    """A T5 encoder of transformers with its tokenizer, as the published Infinity models use."""

    def __init__(self, model: T5EncoderModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> T5TextEncoder:
        """Load `google/flan-t5-xl`, say, or a folder with the same files."""
        from transformers import AutoTokenizer, T5EncoderModel

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(name_or_path))
            model = T5EncoderModel.from_pretrained(str(name_or_path), dtype=dtype)
        except OSError as error:
            raise FileNotFoundError(
                f"text_encoder: {name_or_path} is no folder with a T5, and transformers found none "
                f"by that name: {one_line(error)}"
            ) from None
        return cls(model.to(device), tokenizer)

    def tokenize(
        self, prompts: Sequence[str], max_length: int = MAX_LENGTH
    ) -> tuple[Tensor, Tensor]:
        tokens = self.tokenizer(
            list(prompts),
            max_length=max_length,
            padding="max_length",
            padding_side="right",  # the features of the first `length` positions are kept
            truncation=True,
            return_tensors="pt",
        )
        return tokens.input_ids, tokens.attention_mask

    @torch.no_grad()
    def features(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        lens = attention_mask.sum(-1).tolist()
        longest = max(lens)  # what lies beyond is padding for all
        device = self.model.device
        states = self.model(
            input_ids=input_ids[:, :longest].to(device),
            attention_mask=attention_mask[:, :longest].to(device),
        ).last_hidden_state.float()
        return [state[:length] for state, length in zip(states, lens, strict=True)]


class WordEncoder:
    """A stand-in for T5 that needs no files: a fixed random vector a word, with that of
    the word before (red square is not red circle) and one of the position.

    A word's row in the table is its checksum, so that the same words give the same features in
    every process; two of thirty words share a row with a probability of 1 in 20.
    """

    PAD, END = 0, 1
    VOCAB_SIZE = 8192

    def __init__(self, text_channels: int = 32) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.words = torch.randn(self.VOCAB_SIZE, text_channels, generator=drawn)
        self.positions = torch.randn(MAX_LENGTH, text_channels, generator=drawn) / 2

    def tokenize(
        self, prompts: Sequence[str], max_length: int = MAX_LENGTH
    ) -> tuple[Tensor, Tensor]:
        input_ids = torch.full((len(prompts), max_length), self.PAD)
        attention_mask = torch.zeros(len(prompts), max_length, dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            words = re.findall(r"\w+|[^\w\s]", prompt.lower())[: max_length - 1]
            ids = [2 + zlib.crc32(word.encode()) % (self.VOCAB_SIZE - 2) for word in words]
            ids.append(self.END)
            input_ids[row, : len(ids)] = torch.tensor(ids)
            attention_mask[row, : len(ids)] = 1
        return input_ids, attention_mask

    def features(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        lens = attention_mask.sum(-1).tolist()
        features = []
        for ids, length in zip(input_ids, lens, strict=True):
            words = self.words[ids[:length]]
            before = torch.cat([torch.zeros_like(words[:1]), words[:-1]])
            place = self.positions[torch.arange(length) % MAX_LENGTH]
            features.append(words + before + place)
        return features


def as_text_encoder(encoder: Any, tokenizer: Any = None) -> TextEncoder:
    """`encoder` itself where it has the two methods, or a T5 model with its `tokenizer`, or the
    name or folder of one."""
    if isinstance(encoder, str | Path):
        return T5TextEncoder.from_pretrained(encoder)
    if isinstance(encoder, TextEncoder):
        return encoder
    if isinstance(encoder, torch.nn.Module) and callable(tokenizer):
        return T5TextEncoder(encoder, tokenizer)
    got = type(encoder).__name__
    if isinstance(encoder, torch.nn.Module):
        raise ValueError(f"text_encoder: got a {got} alone, wanted its text_tokenizer as well")
    raise ValueError(
        f"text_encoder: got {got}, wanted the name or folder of a T5, a T5EncoderModel with "
        "text_tokenizer, or an object with tokenize() and features()"
    )
