"""The LoRA adapter of a circuit breaker: where it lies, and how it gets off the point of rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .arguments import LoraArguments, LorraArguments
from .hidden_states import blocks_of

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_config(model: nn.Module, lora: LoraArguments, lorra: LorraArguments) -> LoraConfig:
    """LoRA on the linear layers of the blocks that `lorra` transforms."""
    from peft import LoraConfig

    blocks = blocks_of(model)
    transformed = lorra.blocks_of(len(blocks))
    known = linear_names([blocks[n] for n in transformed])
    modules = list(lora.lora_target_modules) or known
    if unknown := [name for name in modules if name not in known]:
        raise ValueError(
            f"lora_target_modules: no {', '.join(unknown)} in the blocks of this model;"
            f" it has {', '.join(known)}"
        )
    return LoraConfig(
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        bias=lora.lora_bias,
        target_modules=modules,
        modules_to_save=list(lora.lora_modules_to_save) or None,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        layers_to_transform=transformed,
        fan_in_fan_out=any(type(m).__name__ == "Conv1D" for m in blocks[0].modules()),
        task_type="CAUSAL_LM" if hasattr(model, "get_output_embeddings") else None,
    )


def linear_names(blocks: Any) -> list[str]:
    """The names of the linear layers in a model's blocks, without their path; blocks may differ."""
    found: dict[str, None] = {}
    for name, module in (named for block in blocks for named in block.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[name.rpartition(".")[2]] = None
    return list(found)


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
        pairs = getattr(module, "lora_A", None), getattr(module, "lora_B", None)
        if not all(isinstance(side, nn.ModuleDict) for side in pairs):
            continue
        for name, lora_b in pairs[1].items():  # type: ignore[union-attr]
            weight = lora_b.weight
            if weight.requires_grad and not weight.any():
                deviation = pairs[0][name].weight.float().std().item()  # type: ignore[index]
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


def has_lora(model: nn.Module) -> bool:
    """Whether an adapter of PEFT's kind lies in the model."""
    return any(isinstance(getattr(m, "lora_B", None), nn.ModuleDict) for m in model.modules())
