"""How PPLM's next token is drawn: filters and samplers over the vocabulary, and the mixture of two.

Dathathri et al. 2020, arXiv 1912.02164: Uber's run_pplm.py (`top_k_filter`, `to_var`, the mixture)
and PPLM.jl's utils.jl (the rest). All work on the last dimension, of any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops._check import check_above_0, check_floating, check_number

BIG_CONST = 1e10  # as upstream: minus this is a logit without probability


def temp_softmax(logits: Tensor, t: float = 1.2) -> Tensor:
    """softmax(logits / t) over the last dimension, [..., V].

    Raises:
        ValueError: `t` is not above 0.
    """
    check_floating("logits", logits)
    check_above_0("t", t)
    return (logits / t).softmax(-1)


def top_k_filter(logits: Tensor, k: int, probs: bool = False) -> Tensor:
    """The logits [..., V] with all below the k-th largest of their row at -1e10, or probabilities
    with these at 0.

    What ties with the k-th largest is kept, so that more than `k` can be; k = 0 and k >= V keep
    all.
    """
    check_floating("logits", logits)
    check_k(k)
    if k == 0 or k >= logits.shape[-1]:
        return logits
    least = logits.topk(k).values[..., -1:]
    # half precision does not reach -1e10
    low = 0.0 if probs else max(-BIG_CONST, torch.finfo(logits.dtype).min)
    return logits.masked_fill(logits < least, low)


def fuse(log_p: Tensor, log_u: Tensor, gm_scale: float) -> Tensor:
    """log of P^gm_scale * U^(1 - gm_scale) over its sum, [..., V] in float32.

    Args:
        log_p, log_u: log-probabilities of the perturbed and the unperturbed model [..., V]; logits
            do as well, as factors of a whole row cancel.

    In logarithms, where powers of small probabilities do not underflow. What has probability 0 in
    one has 0 in the mixture, unless gm_scale is 0 or 1, which are U and P themselves.
    """
    check_number("gm_scale", gm_scale, 0.0, 1.0)
    if gm_scale == 0:
        return log_u.float().log_softmax(-1)
    if gm_scale == 1:
        return log_p.float().log_softmax(-1)
    return (gm_scale * log_p.float() + (1 - gm_scale) * log_u.float()).log_softmax(-1)


def top_k_sample(probs: Tensor, k: int = 10, generator: torch.Generator | None = None) -> Tensor:
    """A token of the `k` most probable, [..., 1] int64, as torch.multinomial's.

    Args:
        probs: [..., V], at least 0; they need not sum to 1.
        k: exactly so many are kept: of those that tie with the last, the first by id. k = 0 and
            k >= V keep all.
    """
    check_floating("probs", probs)
    check_k(k)
    if 0 < k < probs.shape[-1]:
        least = probs.topk(k).values[..., -1:]
        above, ties = probs > least, probs == least
        room = k - above.sum(-1, keepdim=True)
        probs = probs.masked_fill(~(above | (ties & (ties.cumsum(-1) <= room))), 0.0)
    return draw(probs, generator)


def nucleus_sample(
    probs: Tensor, p: float = 0.8, generator: torch.Generator | None = None
) -> Tensor:
    """A token of the most probable ones that together have at most `p`, [..., 1] int64.

    The most probable one is always among them (PPLM.jl drops it where it has more than `p` alone,
    which leaves 0 / 0).

    Args:
        probs: [..., V], at least 0; they need not sum to 1.
        p: between 0, the most probable token, and 1, all.
    """
    check_floating("probs", probs)
    check_number("p", p, 0.0, 1.0)
    if p == 1:  # where rounding would cost the least probable
        return draw(probs, generator)
    sorted_, ids = probs.float().sort(dim=-1, descending=True, stable=True)
    beyond = sorted_.cumsum(-1) > p * sorted_.sum(-1, keepdim=True)
    beyond[..., 0] = False
    return ids.gather(-1, draw(sorted_.masked_fill(beyond, 0.0), generator))


def draw(probs: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A token by these weights [..., V], of which none is below 0: [..., 1] int64."""
    rows = probs.reshape(-1, probs.shape[-1]).float()
    return torch.multinomial(rows, 1, generator=generator).reshape(*probs.shape[:-1], 1)


def to_var(
    x: Tensor, requires_grad: bool = False, volatile: bool = False, device: str = "cuda"
) -> Tensor:
    """`x` on the device, as a leaf of no graph; "cuda" where there is none means where it is.

    Upstream's, for code written with it; `volatile` is the old name of a tensor without gradients.
    """
    if device != "cuda" or torch.cuda.is_available():
        x = x.to(device)
    return x.detach().requires_grad_(requires_grad and not volatile)


def check_k(k: object) -> None:
    """TypeError or ValueError unless `k` is a whole number from 0."""
    if type(k) is not int:
        raise TypeError(f"k must be an int: got {type(k).__name__}")
    if k < 0:
        raise ValueError(f"k must be at least 0, which keeps all: got {k}")
