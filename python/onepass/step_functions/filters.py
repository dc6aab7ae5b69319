"""top_p and top_k as transformers' sampling has them: which tokens of a row are kept.

A row has to be sorted, and so to be there; callers bring few rows at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .ranges import check_range


def check_filter(top_k: object, top_p: object, min_tokens_to_keep: object, vocab_size: int) -> None:
    """TypeError or ValueError for what filters nothing sensibly."""
    check_range("top_p", top_p)
    check_range("top_k", top_k, vocab_size)
    check_range("min_tokens_to_keep", min_tokens_to_keep, vocab_size)


@torch.no_grad()
def top_p_kept(logits: Tensor, top_p: float, min_tokens_to_keep: int = 1) -> Tensor:
    """The likeliest tokens of each row that together have probability `top_p`, bool [..., V].

    Formula: a token is left out where the probabilities up to its own, summed from the smallest,
    are at most 1 - top_p; `min_tokens_to_keep` of the largest never are.
    """
    ascending, order = logits.sort(dim=-1)
    kept = _kept_of_ascending(ascending, top_p, min_tokens_to_keep)
    return torch.empty_like(kept).scatter_(-1, order, kept)


@torch.no_grad()
def top_p_count(logits: Tensor, top_p: float) -> Tensor:
    """How many tokens of each row `top_p_kept` keeps, int64 [...]."""
    return _kept_of_ascending(logits.sort(dim=-1).values, top_p, 1).sum(-1)


def _kept_of_ascending(ascending: Tensor, top_p: float, min_tokens_to_keep: int) -> Tensor:
    mass = ascending.softmax(-1).cumsum(-1).clamp_(max=1)  # a sum may round above 1
    kept = ~(mass <= 1 - top_p)  # NaN is kept, to be seen
    kept[..., -min_tokens_to_keep:] = True
    return kept


@torch.no_grad()
def top_k_kept(logits: Tensor, top_k: int, min_tokens_to_keep: int = 1) -> Tensor:
    """What is not below the k-th largest logit of its row, bool [..., V]."""
    k = max(top_k, min_tokens_to_keep)
    return ~(logits < logits.topk(k, dim=-1).values[..., -1:])  # NaN is kept, to be seen


@torch.no_grad()
def kept_of_both(
    logits: Tensor, other: Tensor, top_k: int, top_p: float, min_tokens_to_keep: int
) -> Tensor:
    """What top_p and then top_k leave of two rows by the sum of their logits, bool [..., V]."""
    both = logits + other
    kept = torch.ones_like(both, dtype=torch.bool)
    if top_p < 1:
        kept = top_p_kept(both, top_p, min_tokens_to_keep)
    if top_k > 0:
        kept = kept & top_k_kept(both.masked_fill(~kept, -torch.inf), top_k, min_tokens_to_keep)
    return kept
