"""What a step of steering needs of the last position, from one pass over the head's weights: bag
masses, the KL to the unperturbed distribution and the softmax's mean embedding.

A slab of the vocabulary at a time goes through the cache: its logits and its share of the mean
embedding in the forward, all of its gradient in the backward. The logits of one position are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._check import check_floating, check_logits, check_same_device
from ._launch import GPU_TYPES, accumulation_dtype
from .head import Head, onednn_product, serves_onednn

SLAB_BYTES_ON_CPU = 2 << 20  # of weights: their second use finds them in a core's cache

Bag = tuple[Tensor, Tensor]  # token ids [n] int64, each once; their weights [n]


class Steering(NamedTuple):
    """Per row; None where it was not asked for."""

    masses: Tensor  # [B, n_bags]: sum over a bag of weight times probability
    kl: Tensor | None = None  # [B] nats
    soft_embedding: Tensor | None = None  # [B, E]


def soft_embedding_reference(logits: Tensor, embedding: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: logits [B, V] in the accumulation dtype and softmax(logits) @ embedding
    [B, E]."""
    logits = logits.to(accumulation_dtype(logits.dtype))
    probs = logits.softmax(-1)
    return logits, (probs.to(embedding.dtype) @ embedding).to(logits.dtype)


def _parts(weight: Tensor, slab_bytes: int | None) -> list[slice]:
    """The vocabulary in slabs; whole on a GPU, where a launch costs more than the second read."""
    n_tokens, width = weight.shape
    if slab_bytes is None:
        on_gpu = weight.device.type in GPU_TYPES
        slab_bytes = weight.nbytes if on_gpu else SLAB_BYTES_ON_CPU
    step = max(1, slab_bytes // (weight.element_size() * max(1, width)))
    return [slice(i, min(i + step, n_tokens)) for i in range(0, n_tokens, step)]


class _SoftEmbedding(torch.autograd.Function):
    """soft_embedding_reference of a frozen head's logits, scale (hidden weight^T + bias)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # [B, D]
        weight: Tensor,  # [V, D]
        bias: Tensor | None,  # [V]
        embedding: Tensor,  # [V, E], read with the weights: mostly they are the same
        scale: float,
        slab_bytes: int | None,
    ) -> tuple[Tensor, Tensor]:
        facts = accumulation_dtype(hidden.dtype)
        n_rows = hidden.shape[0]
        logits = hidden.new_empty(n_rows, weight.shape[0], dtype=facts)
        top = hidden.new_full((n_rows, 1), torch.finfo(facts).min, dtype=facts)
        mass = torch.zeros_like(top)
        total = hidden.new_zeros(n_rows, embedding.shape[1], dtype=facts)
        parts = _parts(weight, slab_bytes)
        for part in parts:
            product = hidden @ weight[part].T
            if bias is not None:
                product = product + bias[part]
            z = torch.mul(product.to(facts), scale, out=logits[:, part])
            higher = torch.maximum(top, z.amax(-1, keepdim=True))
            e = (z - higher).exp_()
            shrink = (top - higher).exp_()
            mass.mul_(shrink).add_(e.sum(-1, keepdim=True))
            total.mul_(shrink).add_(e.to(embedding.dtype) @ embedding[part])
            top = higher
        soft = total.div_(mass)
        ctx.save_for_backward(weight, embedding, logits, top + mass.log(), soft)
        ctx.parts, ctx.scale, ctx.dtype = parts, scale, hidden.dtype
        return logits, soft

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogits: Tensor, dsoft: Tensor) -> Any:  # type: ignore[override]
        weight, embedding, logits, lse, soft = ctx.saved_tensors
        mean = (dsoft * soft).sum(-1, keepdim=True)
        along = dsoft.to(embedding.dtype)
        total = logits.new_zeros(logits.shape[0], weight.shape[1])
        for part in ctx.parts:
            probs = (logits[:, part] - lse).exp_()
            dz = (along @ embedding[part].T).to(logits.dtype).sub_(mean).mul_(probs)
            dz += dlogits[:, part]
            total += dz.to(weight.dtype) @ weight[part]
        return total.mul_(ctx.scale).to(ctx.dtype), None, None, None, None, None


class _FrozenProduct(torch.autograd.Function):
    """hidden weight^T + bias through oneDNN, for gradients to the hidden states alone: of GPT-2's
    head and 1, 2 or 4 rows in 11, 14, 16 ms, where torch.mm needs 14, 29, 27 (one core)."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return onednn_product(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:  # type: ignore[override]
        return d @ ctx.saved_tensors[0], None, None


def _logits(head: Head) -> Tensor:
    """The logits [B, V], of one position: smaller by far than what makes them."""
    given = [t for t in (head.weight[0], head.bias) if t is not None]
    hidden = head.hidden[0]
    frozen = len(head.weight) == 1 and head.shard is None
    frozen = frozen and not any(t.requires_grad for t in given)
    if not (frozen and hidden.requires_grad and serves_onednn(hidden, *given)):
        return head.logits()
    head.check_weights()
    product = _FrozenProduct.apply(hidden, head.weight[0], head.bias)  # type: ignore[no-untyped-call]
    return head.cap.logits(product)


def logits_and_soft_embedding(
    logits: Tensor,  # [B, V], or LazyLogits
    embedding: Tensor,  # [V, E]
    slab_bytes: int | None = None,  # of the head's weights
) -> tuple[Tensor, Tensor]:
    """The logits [B, V] and their softmax's mean embedding [B, E], in the accumulation dtype."""
    head: Head | None = getattr(logits, "onepass_head", None)
    if head is None:
        return soft_embedding_reference(logits, embedding)
    frozen = not any(
        t is not None and t.requires_grad for t in (*head.weight, head.bias, embedding)
    )
    if len(head.weight) > 1 or head.softcap or head.shard is not None or not frozen:
        return soft_embedding_reference(head.logits(), embedding)
    head.check_weights()
    hidden = head.hidden[0].reshape(-1, head.hidden[0].shape[-1])
    return _SoftEmbedding.apply(  # type: ignore[no-any-return, no-untyped-call]
        hidden, head.weight[0], head.bias, embedding, head.scale, slab_bytes
    )


def steering_stats(
    logits: Tensor,
    *,
    bags: Sequence[Bag] = (),
    log_u: Tensor | None = None,
    embedding: Tensor | None = None,
) -> Steering:
    """What steering differentiates, of the logits of one position per row.

    Args:
        logits: [B, V] float32, bfloat16 or float16, or `onepass.LazyLogits`: then the head's
            weights are read once here and once in the backward, which serves hidden states alone.
        bags: of each bag the token ids [n] int64, each once, and their weights [n].
        log_u: [B, V] log-probabilities of the unperturbed model, without gradient.
        embedding: [V, E] input embeddings.

    Returns:
        Steering, float32 (float64 for float64 logits), differentiable.

    Raises:
        TypeError: not a tensor. ValueError: shapes, dtypes or devices that do not fit.

    Formula: with p = softmax(logits): masses_k = sum_{v in bag k} w_v p_v,
    kl = sum_v p_v (log p_v - log u_v), soft_embedding = p @ embedding.
    """
    check_logits(logits)
    if logits.dim() != 2:
        raise ValueError(f"logits must be [B, V]: got shape {tuple(logits.shape)}")
    if embedding is not None:
        check_floating("embedding", embedding)
        check_same_device("embedding", embedding, "logits", logits)
        if embedding.dim() != 2 or embedding.shape[0] != logits.shape[1]:
            raise ValueError(
                f"embedding must be [{logits.shape[1]}, E], as the logits have that many tokens: "
                f"got shape {tuple(embedding.shape)}"
            )
    for name, given in (("log_u", log_u), *((f"bags[{i}]", b[0]) for i, b in enumerate(bags))):
        if given is not None:
            check_same_device(name, given, "logits", logits)
    if log_u is not None and log_u.shape != logits.shape:
        raise ValueError(
            f"log_u must have the shape of the logits, {tuple(logits.shape)}: "
            f"got {tuple(log_u.shape)}"
        )
    soft = None
    if embedding is not None:
        logits, soft = logits_and_soft_embedding(logits, embedding)
    elif (head := getattr(logits, "onepass_head", None)) is not None:
        logits = _logits(head)
    logits = logits.to(accumulation_dtype(logits.dtype))
    log_p = logits.log_softmax(-1)
    kl = None
    if log_u is not None:
        probs = log_p.exp()
        gap = torch.where(probs == 0, 0.0, log_p - log_u.detach())  # 0 log 0 is 0
        kl = (probs * gap).sum(-1)
    masses = [(log_p[:, ids].exp() * weights.to(log_p.dtype)).sum(-1) for ids, weights in bags]
    of_bags = torch.stack(masses, -1) if masses else log_p.new_zeros(len(log_p), 0)
    return Steering(of_bags, kl, soft)
