"""The LoRA adapter of a circuit breaker: where it lies, and how it gets off the point of rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..training.hidden_states import blocks_of
from ..training.lora import lora_in_blocks
from .arguments import LoraArguments, LorraArguments

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: nn.Module, lora: LoraArguments, lorra: LorraArguments) -> LoraConfig:
    """LoRA on the linear layers of the blocks that `lorra` transforms."""
    return lora_in_blocks(
        model,
        lora,
        lorra.blocks_of(len(blocks_of(model))),
        bias=lora.lora_bias,
        task_type="CAUSAL_LM" if hasattr(model, "get_output_embeddings") else None,
    )


@torch.no_grad()
def jitter(model: nn.Module, relative: float, seed: int = 0) -> int:
    """Give every lora_B that is 0 noise of `relative` times the deviation of its lora_A; returns
    how many there were.

    LoRA starts with lora_B = 0. Hidden states are then those of the reference, their cosine is 1,
    and there the circuit breaker's gradient is exactly 0: training would wait for rounding errors.
    """
    generator = torch.Generator().manual_seed(seed)
    n_moved = 0
    for module in model.modules():
        lora_a: Any = getattr(module, "lora_A", None)
        lora_b: Any = getattr(module, "lora_B", None)
        if not isinstance(lora_a, nn.ModuleDict) or not isinstance(lora_b, nn.ModuleDict):
            continue
        for name in lora_b:
            first: Any = lora_a[name]
            weight: Any = lora_b[name].weight
            if weight.requires_grad and not weight.any():
                deviation = first.weight.float().std().item()
                noise = torch.randn(weight.shape, generator=generator)
                weight.copy_(noise * (relative * deviation))
                n_moved += 1
    return n_moved


@torch.no_grad()
def jitter_weights(model: nn.Module, relative: float, seed: int = 0) -> int:
    """Give every weight that is trained noise of `relative` times its deviation, or of `relative`
    where it is constant; returns how many there were.

    For a model that is trained without an adapter, against a copy of itself: see `jitter`.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    for weight in trained:
        deviation = weight.float().std(correction=0).item() or 1.0
        noise = torch.randn(weight.shape, generator=generator) * (relative * deviation)
        weight.add_(noise.to(weight.device, weight.dtype))
    return len(trained)
