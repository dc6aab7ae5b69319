"""Bags of words: lists of this package and files of a word a line, as token ids and one-hot rows.

Only a word that is one token after a space counts, as in Uber's run_pplm.py; one that stands twice
in a bag counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .names import read_words, split_names

logger = logging.getLogger("onepass")
MAX_TOLD = 12  # words named in a warning


class Bag(NamedTuple):
    """What a loss needs of a bag: mass = (softmax(logits)[..., ids] * weights).sum(-1)."""

    ids: Tensor  # [n] int64, each token once
    weights: Tensor  # [n] fp32, how often it stands in the bag


def get_bag_of_words_indices(
    bag_of_words_ids_or_paths: str | Sequence[str], tokenizer: Any
) -> list[list[list[int]]]:
    """Token ids of each word of each bag, as the word stands after a space inside a text.

    Args:
        bag_of_words_ids_or_paths: names of bags (`onepass.pplm.bags.bag_names()`) or paths of files
            of a word a line; a list, or one string, "military;space".
        tokenizer: of transformers.

    Returns: a list of bags, each a list of words, each a list of ids. Words of several tokens are
    in it and named in a warning: they do not count, nor do unknown ones, which are empty.

    Raises:
        FileNotFoundError, ValueError: see `read_words`; no bag has a word of one token.
    """
    names = split_names(bag_of_words_ids_or_paths)
    bags = []
    for name in names:
        words = read_words(name)
        bags.append([_encoded(word, tokenizer) for word in words])
        _tell_dropped(name, words, bags[-1])
    if not any(len(word) == 1 for bag in bags for word in bag):
        raise ValueError(
            f"bag of words {', '.join(names)}: no word is one token of this tokenizer, which leaves"
            " nothing to steer to; wanted shorter or more common words"
        )
    return bags


def build_bows_one_hot_vectors(
    bow_indices: list[list[list[int]]] | None, tokenizer: Any, device: Any = None
) -> list[Tensor] | None:
    """One-hot rows of each bag: fp32 [words of one token, V], V = len(tokenizer).

    Words of several tokens are left out; a word that stands twice has two rows. None gives None.
    """
    if bow_indices is None:
        return None
    made = []
    for bag in bow_indices:
        ids = torch.tensor([word[0] for word in bag if len(word) == 1], dtype=torch.int64)
        rows = torch.zeros(len(ids), len(tokenizer), device=device)
        made.append(rows.scatter_(1, ids.to(rows.device).unsqueeze(1), 1.0))
    return made


def bag_weights(one_hot_or_indices: Tensor | Sequence[Sequence[int]], device: Any = None) -> Bag:
    """One bag as its tokens and how often each stands in it: its one-hot rows, summed.

    Args:
        one_hot_or_indices: rows [n, V] of `build_bows_one_hot_vectors` (at will of other weights),
            or the words' ids of `get_bag_of_words_indices`.
        device: where the tensors go; None leaves a tensor's where it is.
    """
    if isinstance(one_hot_or_indices, Tensor):
        if one_hot_or_indices.dim() != 2:
            shape = tuple(one_hot_or_indices.shape)
            raise ValueError(f"a bag's one-hot rows must be [n, V]: got {shape}")
        total = one_hot_or_indices.detach().float().sum(0)
        ids = total.nonzero().flatten()
        return Bag(ids.to(device=device), total[ids].to(device=device))
    words = [word[0] for word in one_hot_or_indices if len(word) == 1]
    ids, counts = torch.tensor(words, dtype=torch.int64).unique(return_counts=True)
    return Bag(ids.to(device=device), counts.float().to(device=device))


def _encoded(word: str, tokenizer: Any) -> list[int]:
    """After a word rather than after a bare space, which tokenizers of SentencePiece would make a
    token of its own. Empty of a word that the tokenizer does not know."""
    before, both = (
        list(tokenizer.encode(text, add_special_tokens=False)) for text in ("the", f"the {word}")
    )
    if both[: len(before)] == before and len(both) > len(before):
        found = both[len(before) :]
    else:
        found = list(tokenizer.encode(f" {word}", add_special_tokens=False))
    return [] if found == [tokenizer.unk_token_id] else found


def _tell_dropped(name: str, words: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """A warning that names the words that do not count."""
    dropped = [word for word, word_ids in zip(words, ids, strict=True) if len(word_ids) != 1]
    if not words:
        logger.warning("bag of words %s is empty", name)
    elif dropped:
        more = f", ... ({len(dropped) - MAX_TOLD} more)" if len(dropped) > MAX_TOLD else ""
        logger.warning(
            "bag of words %s: %d of %d words are not one token and do not count: %s%s",
            *(name, len(dropped), len(words), ", ".join(dropped[:MAX_TOLD]), more),
        )
