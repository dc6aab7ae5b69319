"""A teacher and a student over one tiny model; adapter and transform have weights that count."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import Tensor

from onepass.jigsaw.cloak import TransformerCloak
from onepass.jigsaw.models import (
    NoiseMaskedNoisyTransformerModel,
    PeftNoiseMaskedNoisyTransformerModel,
)

from .tiny_models import V, tiny

B, S = 3, 7


def batch(left: bool = False, seed: int = 0) -> dict[str, Tensor]:
    """Three sequences of 7, 5 and 4 tokens, the first token of each not transformed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (B, S), generator=generator)
    mask = torch.ones(B, S, dtype=torch.long)
    for row, n in ((1, 5), (2, 4)):
        mask[row, slice(0, S - n) if left else slice(n, S)] = 0
    noise = mask.clone()
    for row in range(B):
        noise[row, int(mask[row].nonzero()[0])] = 0
    return {"input_ids": ids, "attention_mask": mask, "noise_mask": noise}


def adapted(base: Any) -> Any:
    config = peft.LoraConfig(
        r=4,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        lora_dropout=0.0,
        fan_in_fan_out=type(base).__name__.startswith("GPT2"),
    )
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return model


def pair(family: str = "llama", **options: Any) -> tuple[Any, Any]:
    model = adapted(tiny(family))
    cloak = moved(TransformerCloak.from_model(model, **options.pop("cloak", {})))
    teacher = NoiseMaskedNoisyTransformerModel(model, cloak, **options)
    student = PeftNoiseMaskedNoisyTransformerModel(
        model, cloak, noise_cache=teacher.noise_cache, **options
    )
    return teacher, student


def moved(cloak: TransformerCloak) -> TransformerCloak:
    """With weights as if it had been trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for estimator in (cloak.mean_estimator, cloak.rho_estimator):
            last: Any = estimator[-1]
            last.weight.normal_(std=0.3)
    return cloak
