"""Where LoRA lies in a model, of the flags that a command got."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from .flags import LoraFlags
from .hidden_states import blocks_of

if TYPE_CHECKING:
    from peft import LoraConfig


def lora_in_blocks(
    model: nn.Module, lora: LoraFlags, numbers: Sequence[int] | None = None, **others: Any
) -> LoraConfig:
    """LoRA on the linear layers of the blocks with these numbers (default: all); `others` go to
    peft's LoraConfig as they are."""
    from peft import LoraConfig

    if unknown := [
        name
        for name in lora.lora_modules_to_save
        if not any(path.split(".")[-1] == name for path, _ in model.named_modules())
    ]:
        raise ValueError(f"lora_modules_to_save: no module {', '.join(unknown)} in this model")
    blocks = blocks_of(model)
    numbers = range(len(blocks)) if numbers is None else numbers
    settings = {
        "target_modules": chosen_modules(lora, [blocks[n] for n in numbers]),
        "layers_to_transform": list(numbers),
        "fan_in_fan_out": any(type(m).__name__ == "Conv1D" for m in blocks[0].modules()),
        "task_type": "CAUSAL_LM",
    }
    return LoraConfig(**lora_settings(lora), **settings | others)


def lora_settings(lora: LoraFlags) -> dict[str, Any]:
    """What of the flags goes into peft's LoraConfig under any model."""
    return {
        "r": lora.lora_r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": list(lora.lora_modules_to_save) or None,
        "use_rslora": lora.use_rslora,
        "use_dora": lora.use_dora,
    }


def chosen_modules(lora: LoraFlags, blocks: Any, usual: Sequence[str] = ()) -> list[str]:
    """The linear layers in these blocks that get LoRA, by name: those of the flags, else those of
    the `usual` that there are, else all."""
    known = linear_names(blocks)
    asked = [name for name in lora.lora_target_modules if name != "all-linear"]  # PEFT's word
    modules = asked or [name for name in usual if name in known] or known
    if unknown := [name for name in modules if name not in known]:
        raise ValueError(
            f"lora_target_modules: no {', '.join(unknown)} in the blocks of this model;"
            f" it has {', '.join(known)}"
        )
    return list(modules)


def linear_names(blocks: Any) -> list[str]:
    """The names of the linear layers in a model's blocks, without their path; blocks may differ."""
    found: dict[str, None] = {}
    for name, module in (named for block in blocks for named in block.named_modules()):
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            found[name.rpartition(".")[2]] = None
    return list(found)


def has_lora(model: nn.Module) -> bool:
    """Whether an adapter of PEFT's kind lies in the model."""
    return any(isinstance(getattr(m, "lora_B", None), nn.ModuleDict) for m in model.modules())
