"""From text to rows of token ids: a byte-level BPE tokenizer and padded windows.

Byte-level, so every text can be written and no id for "unknown" is needed. Id 0 is the padding;
`Rows.mask` says where the text is, and every loss and mean of the demo goes through it.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from . import corpus
from .settings import Settings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

PADDING = "<pad>"
IGNORED = -100


@dataclass(frozen=True)
class Rows:
    """N windows of T tokens, padded on the right."""

    ids: torch.Tensor  # [N, T]; 0 where padded
    mask: torch.Tensor  # [N, T] bool; True on text
    labels: torch.Tensor  # [N, T] the next token; IGNORED on padding and at a window's end
    n_bytes: torch.Tensor  # [N] bytes of UTF-8 that a row's labels stand for

    def __len__(self) -> int:
        return len(self.ids)

    def pick(self, index: slice | torch.Tensor) -> Rows:
        return Rows(self.ids[index], self.mask[index], self.labels[index], self.n_bytes[index])

    def to(self, device: torch.device) -> Rows:
        fields = (self.ids, self.mask, self.labels, self.n_bytes)
        return Rows(*(field.to(device) for field in fields))

    @property
    def n_tokens(self) -> int:
        return int(self.mask.sum())


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def rows_of(tokenizer: Tokenizer, documents: list[str], window: int) -> Rows:
    """Cut every document into windows of `window` tokens; windows never join two documents."""
    pieces: list[list[int]] = []
    n_bytes: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids, tokens = encoding.ids, encoding.tokens  # each access copies the whole list
        for start in range(0, len(ids) - 1, window):  # one token alone predicts nothing
            piece = ids[start : start + window]
            pieces.append(piece)
            # In the byte-level alphabet a token has one character for each of its bytes.
            n_bytes.append(sum(map(len, tokens[start + 1 : start + len(piece)])))
    lengths = torch.tensor([len(piece) for piece in pieces])
    mask = torch.arange(window) < lengths[:, None]
    ids_2d = torch.zeros(len(pieces), window, dtype=torch.long)
    ids_2d[mask] = torch.tensor([token for piece in pieces for token in piece])
    labels = torch.full_like(ids_2d, IGNORED)
    labels[:, :-1] = ids_2d[:, 1:].masked_fill(~mask[:, 1:], IGNORED)
    return Rows(ids_2d, mask, labels, torch.tensor(n_bytes))


def fingerprint(*rows: Rows) -> str:
    """A digest of the token ids: two interpreters bring different text."""
    digest = hashlib.sha256()
    for r in rows:
        digest.update(r.ids.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Text:
    """Both kinds of text, tokenized."""

    tokenizer: Tokenizer
    train: dict[str, Rows]
    held_out: dict[str, Rows]
    sizes: dict[str, dict[str, float]]  # for the report
    fingerprint: str


def read_text(settings: Settings, seed: int, device: torch.device) -> Text:
    """The same rows for the same interpreter, settings and seed."""
    shuffle = random.Random(seed)
    code = corpus.code_documents(shuffle, settings.text_chars)
    prose = corpus.prose_documents(settings.text_chars)
    splits = {
        "code": corpus.split(code, shuffle, settings.held_out_share),
        "prose": corpus.split(prose, shuffle, settings.held_out_share),
    }
    documents = [document for split in splits.values() for document in split.train]
    tokenizer = train_tokenizer(documents, settings.vocab_size)
    train = {k: rows_of(tokenizer, s.train, settings.window) for k, s in splits.items()}
    held_out = {k: rows_of(tokenizer, s.held_out, settings.window) for k, s in splits.items()}
    sizes = {
        kind: {
            "train_chars": sum(map(len, split.train)),
            "train_tokens": train[kind].n_tokens,
            "held_out_chars": sum(map(len, split.held_out)),
            "held_out_tokens": held_out[kind].n_tokens,
            "padded_share": 1 - train[kind].n_tokens / train[kind].ids.numel(),
        }
        for kind, split in splits.items()
    }
    return Text(
        tokenizer,
        {kind: rows.to(device) for kind, rows in train.items()},
        {kind: rows.to(device) for kind, rows in held_out.items()},
        sizes,
        fingerprint(*train.values(), *held_out.values()),
    )
