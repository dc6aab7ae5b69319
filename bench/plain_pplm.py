"""Uber's PPLM written down plainly: one delta a layer, kept by numpy, whole logits, no shortcuts.

What run_pplm.py computes, in its order and with its waste: all tokens are run again without a cache
for every new one, each gradient goes through the host, and the graph of a token's last forward is
kept and differentiated once more at the next. Rows of a batch are coupled as they are there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BOW, DISCRIM, BOW_DISCRIM = 1, 2, 3
TINY = 1e-15


def run(model: Any, past: list[Tensor] | None, **inputs: Any) -> tuple[Tensor, list[Tensor], Any]:
    """Logits, the past that follows as a tensor a layer, and the last hidden states."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer, both in enumerate(past or []):
        cache.update(both[0], both[1], layer)
    out = model(**inputs, past_key_values=cache, use_cache=True, output_hidden_states=True)
    after = [torch.stack([layer.keys, layer.values]) for layer in out.past_key_values.layers]
    return out.logits, after, out.hidden_states[-1]


def window(like: Tensor, length: int, decay: bool, side: str = "first") -> Tensor:
    """Ones where the past moves, [T, 1]; upstream's side is the first, its help says last."""
    n_past = like.shape[-2]
    if not 0 < length < n_past:
        return torch.ones(n_past, 1, device=like.device)
    inside = torch.arange(1, length + 1) / length if decay else torch.ones(length)
    outside = torch.zeros(n_past - length)
    both = (inside, outside) if side == "first" else (outside, inside)
    return torch.cat(both)[:, None].to(like.device)


def perturb_past(
    past: list[Tensor],
    model: Any,
    last: Tensor,
    unpert_past: list[Tensor] | None = None,
    unpert_logits: Tensor | None = None,
    accumulated_hidden: Tensor | None = None,
    grad_norms: list[Tensor] | None = None,
    stepsize: float = 0.01,
    one_hot_bows_vectors: Any = None,
    classifier: Any = None,
    class_label: Any = None,
    loss_type: int = 0,
    num_iterations: int = 3,
    horizon_length: int = 1,
    window_length: int = 0,
    decay: bool = False,
    gamma: float = 1.5,
    kl_scale: float = 0.01,
    side: str = "first",
) -> tuple[list[Tensor], Any, list[Tensor] | None, list[Any]]:
    deltas = [np.zeros(tuple(p.shape), "float32") for p in past]
    so_far: Any = 0 if accumulated_hidden is None else accumulated_hidden
    mask = window(past[0], window_length, decay, side)
    n_past, device = past[0].shape[-2], past[0].device
    hidden_sum: Any = None
    losses = []
    for _ in range(num_iterations):
        leaves = [torch.from_numpy(d).to(device).requires_grad_() for d in deltas]
        moved = [(p + leaf).to(p.dtype) for p, leaf in zip(past, leaves, strict=True)]
        logits, _, hidden = run(model, moved, input_ids=last)
        hidden_sum = so_far + hidden.sum(1).detach()
        probs = F.softmax(logits[:, -1, :], dim=-1)
        loss: Any = 0.0
        if loss_type in (BOW, BOW_DISCRIM):
            for one_hot in one_hot_bows_vectors:
                loss = loss - torch.log((probs @ one_hot.t()).sum())
        if loss_type in (DISCRIM, BOW_DISCRIM):
            assert unpert_past is not None
            ahead = unpert_past
            embedding = model.get_input_embeddings().weight.detach()
            for _ in range(horizon_length):
                soft = probs[:, None] @ embedding
                _, ahead, next_hidden = run(model, ahead, inputs_embeds=soft)
                hidden_sum = hidden_sum + next_hidden.sum(1)
            prediction = classifier(hidden_sum / (n_past + 1 + horizon_length))
            wanted = torch.tensor([class_label] * len(prediction), device=device)
            loss = loss + F.cross_entropy(prediction, wanted)
        if kl_scale > 0:
            assert unpert_logits is not None
            unpert_probs = F.softmax(unpert_logits[:, -1, :], dim=-1)
            unpert_probs = unpert_probs + TINY * (unpert_probs <= TINY).float()
            kept = probs + TINY * (probs <= TINY).float().detach()
            loss = loss + kl_scale * (kept * (kept / unpert_probs).log()).sum()
        losses.append(loss.detach().cpu().numpy())
        loss.backward()
        grads = [leaf.grad * mask for leaf in leaves if leaf.grad is not None]
        if grad_norms is not None and loss_type == BOW:
            grad_norms = [
                torch.max(n, torch.norm(g)) for n, g in zip(grad_norms, grads, strict=True)
            ]
        else:
            grad_norms = [torch.norm(g) + TINY for g in grads]
        steps = [
            (-stepsize * (g / n**gamma)).cpu().numpy()
            for g, n in zip(grads, grad_norms, strict=True)
        ]
        deltas = [d + step for d, step in zip(deltas, steps, strict=True)]
        past = [p.detach() for p in past]  # until here with the graph of the token before
    leaves = [torch.from_numpy(d).to(device).requires_grad_() for d in deltas]
    moved = [(p + leaf).to(p.dtype) for p, leaf in zip(past, leaves, strict=True)]
    return moved, hidden_sum, grad_norms, losses


class Walk:
    """generate_text_pplm's loop, a token at a time: what it keeps from one to the next."""

    def __init__(
        self, model: Any, ids: Tensor, *, past: list[Tensor] | None = None, **options: Any
    ) -> None:
        self.model, self.ids, self.options = model, ids, options
        self.past = past
        self.grad_norms: list[Tensor] | None = None
        self.losses: list[list[Any]] = []
        with torch.no_grad():
            if past is None and ids.shape[1] > 1:
                _, self.past, _ = run(model, None, input_ids=ids[:, :-1])

    def step(self, *, top_k: int = 10, gm_scale: float = 0.9, temperature: float = 1.0) -> Tensor:
        """The fused and filtered probabilities of the next token, [B, V]."""
        model, last = self.model, self.ids[:, -1:]
        with torch.no_grad():
            unpert_logits, unpert_past, unpert_hidden = run(model, None, input_ids=self.ids)
        past = self.past
        if past is not None and self.options.get("num_iterations", 3):
            past, _, self.grad_norms, losses = perturb_past(
                past,
                model,
                last,
                unpert_past=unpert_past,
                unpert_logits=unpert_logits,
                accumulated_hidden=unpert_hidden[:, :-1].sum(1),
                grad_norms=self.grad_norms,
                **self.options,
            )
            self.losses.append(losses)
        logits, self.past, _ = run(model, past, input_ids=last)
        with torch.no_grad():
            probs = F.softmax(logits[:, -1] / temperature, dim=-1)
            unpert_probs = F.softmax(unpert_logits[:, -1], dim=-1)
            fused = probs**gm_scale * unpert_probs ** (1 - gm_scale)
            if top_k:
                least = torch.topk(fused, top_k)[0][:, -1:]
                fused = torch.where(fused < least, torch.zeros_like(fused), fused)
            if fused.sum() <= 1:
                fused = fused / fused.sum()
        return fused

    def append(self, tokens: Tensor) -> None:
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)


def generate(model: Any, ids: Tensor, length: int, **options: Any) -> Tensor:
    """Greedy text, [B, S + length]."""
    walk = Walk(model, ids, **options)
    for _ in range(length):
        walk.append(walk.step().argmax(-1))
    return walk.ids
