"""Bags of words: lists of this package and files of a word a line, as token ids and one-hot rows.

Only a word that is one token after a space counts, as in Uber's run_pplm.py; one that stands twice
in a bag counts twice.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .names import bag_names, read_words, split_names

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
    words = [read_words(name) for name in names]
    bags = [[_encoded(word, tokenizer) for word in bag] for bag in words]
    if not any(map(_n_counting, bags)):
        own = {
            bag: _n_counting(_encoded(w, tokenizer) for w in read_words(bag)) for bag in bag_names()
        }
        most = max(own, key=own.__getitem__)
        mend = f"; {most} has {own[most]}" if own[most] else ""
        raise ValueError(
            f"bag of words {', '.join(names)}: no word is one token of this tokenizer, which leaves"
            f" nothing to steer to: wanted shorter or more common words{mend}"
        )
    for name, of_bag, ids in zip(names, words, bags, strict=True):
        _tell_dropped(name, of_bag, ids)
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


def _n_counting(bag: Iterable[Sequence[int]]) -> int:
    return sum(len(word) == 1 for word in bag)


def _tell_dropped(name: str, words: Sequence[str], ids: Sequence[Sequence[int]]) -> None:
    """A warning that names the words that do not count, or those that do where they are few."""
    parts: tuple[list[str], list[str]] = ([], [])
    for word, word_ids in zip(words, ids, strict=True):
        parts[len(word_ids) == 1].append(word)
    dropped, kept = parts
    if not words:
        logger.warning("bag of words %s is empty", name)
    elif dropped:
        few = 0 < len(kept) < len(dropped)
        named, told = (
            (kept, "one token and count") if few else (dropped, "not one token and do not count")
        )
        more = f", ... ({len(named) - MAX_TOLD} more)" if len(named) > MAX_TOLD else ""
        logger.warning(
            "bag of words %s: %d of %d words are %s: %s%s",
            *(name, len(named), len(words), told, ", ".join(named[:MAX_TOLD]), more),
        )
