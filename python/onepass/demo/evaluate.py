"""What a model knows of held-out text, and how far its hidden states have turned.

Cross-entropy in nats a token and a byte, and the mean cosine between the hidden states with the
adapter on and off; everything is a sum over unpadded tokens divided once at the end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from .. import cross_entropy, masked_inner_product
from .model import autocast, hidden_states, original
from .settings import Settings
from .stages import KINDS
from .tokens import IGNORED, Rows

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

Numbers = dict[str, dict[str, float]]  # kind -> what -> value
ROWS_AT_ONCE = 32


@torch.no_grad()
def nats(model: PeftModel | LlamaForCausalLM, rows: Rows) -> dict[str, float]:
    """Cross-entropy of the next token, over all tokens and over all bytes of `rows`."""
    total = 0.0
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows.pick(slice(start, start + ROWS_AT_ONCE))
        with autocast(part.ids.device):
            logits = model(input_ids=part.ids).logits
        total += cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="sum").item()
    return {
        "nats_per_token": total / int((rows.labels != IGNORED).sum()),
        "nats_per_byte": total / int(rows.n_bytes.sum()),
    }


@torch.no_grad()
def cosines(model: PeftModel, rows: Rows, settings: Settings) -> dict[str, float]:
    """Mean cosine of adapted and original states, at the target layers and at all of them."""
    per_layer = torch.zeros(settings.n_layers + 1, dtype=torch.float64)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        part = rows.pick(slice(start, start + ROWS_AT_ONCE))
        with original(model):
            before = hidden_states(model, part.ids)
        after = hidden_states(model, part.ids)
        for layer, (a, o) in enumerate(zip(after, before, strict=True)):
            per_layer[layer] += masked_inner_product(a, o, part.mask, reduction="sum").item()
    per_layer /= rows.n_tokens
    return {
        "cosine_target_layers": per_layer[list(settings.target_layers)].mean().item(),
        "cosine_all_layers": per_layer[1:].mean().item(),
    }


def of_model(model: LlamaForCausalLM, held_out: Mapping[str, Rows], n_rows: int) -> Numbers:
    """Each kind's numbers; without an adapter the hidden states are the original ones."""
    same = {"cosine_target_layers": 1.0, "cosine_all_layers": 1.0}
    return {kind: nats(model, held_out[kind].pick(slice(n_rows))) | same for kind in KINDS}


def of_adapted(
    model: PeftModel, held_out: Mapping[str, Rows], settings: Settings, n_rows: int
) -> Numbers:
    """Each kind's numbers with the adapter on."""
    parts = {kind: held_out[kind].pick(slice(n_rows)) for kind in KINDS}
    return {kind: nats(model, r) | cosines(model, r, settings) for kind, r in parts.items()}
