"""What held-out text tells: how much of it is still known, how far its hidden states turned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..losses import cross_entropy
from ..training.hidden_states import lazy_within, training_mode
from .hidden_states import as_reference
from .loss import Rerouting, part_facts
from .options import ADAPTER_OFF

IGNORED = -100
Tokens = tuple[Tensor, Tensor]  # input_ids, attention_mask [n, S]


def _batches(tokens: Tokens, batch_size: int, device: torch.device) -> Iterator[Tokens]:
    ids, mask = tokens
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        yield ids[part].to(device), mask[part].to(device)


@torch.no_grad()
def nats_per_token(
    model: nn.Module, tokens: Tokens, batch_size: int = 8, *, adapter: bool = True
) -> float:
    """Cross-entropy of the next token, over all tokens that have one before them.

    Args:
        model: a causal language model; `adapter=False` switches its PEFT adapter off.
        tokens: input_ids and attention_mask [n, S].
    """
    total = torch.zeros((), dtype=torch.float64)
    n_tokens = 0
    off = contextlib.nullcontext(model) if adapter else as_reference(model, ADAPTER_OFF)
    with off, training_mode(model, False), lazy_within(model, "measuring"):
        for ids, mask in _batches(tokens, batch_size, next(model.parameters()).device):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            known = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
            labels = torch.where(known, ids[:, 1:], IGNORED).flatten()
            loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum")
            total += loss.double().cpu()
            n_tokens += int(known.sum())
    return float(total) / max(n_tokens, 1)


@torch.no_grad()
def cosines(
    model: nn.Module, retain: Tokens, harmful: Tokens, options: Rerouting, batch_size: int = 8
) -> dict[str, float]:
    """Mean cosine of hidden states to those of the reference: `retain` at the layers that retain
    holds, `harmful` at the target layers."""
    sums = {"retain": 0.0, "harmful": 0.0}
    counts = dict.fromkeys(sums, 0)
    device = next(model.parameters()).device
    with training_mode(model, False):
        for name, tokens, ending in (
            ("retain", retain, ""),
            ("harmful", harmful, "_circuit_breaker"),
        ):
            for ids, mask in _batches(tokens, batch_size, device):
                both = {f"input_ids{ending}": ids, f"attention_mask{ending}": mask}
                facts = part_facts(model, both, ending, options)
                sums[name] += float(facts["cosine"]) * int(mask.sum())
                counts[name] += int(mask.sum())
    return {name: total / max(counts[name], 1) for name, total in sums.items()}
