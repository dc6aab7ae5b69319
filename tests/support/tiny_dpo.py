"""Pairs, a tiny model and its `DPOTrainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from onepass.dpo import DPOArguments, DPOTrainer
from onepass.training.flags import LoraFlags
from onepass.training.lora import lora_in_blocks

from .tiny_language_model import BENIGN, model, tokenizer

STEPS = 6


def pairs() -> list[dict[str, Any]]:
    """Six prompts; chosen says yes, rejected no, and their lengths differ."""
    return [
        {
            "prompt": f"is {text}?",
            "chosen": " yes, it is" + "!" * n,
            "rejected": " no" + " never" * (n % 3),
        }
        for n, text in enumerate(BENIGN)
    ]


def arguments(folder: Path, **options: Any) -> Any:
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=4, per_device_eval_batch_size=4, logging_steps=2,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **options})


def trainer(
    folder: Path, base: Any = None, dpo: DPOArguments | None = None, *, rank: int = 4,
    kind: type[DPOTrainer] = DPOTrainer, of: dict[str, Any] | None = None, **options: Any,
) -> DPOTrainer:  # fmt: skip
    """With LoRA of `rank`, or of rank 0 with all weights trained; `of` goes to the trainer,
    `options` to its TrainingArguments."""
    base = model(2) if base is None else base
    lora = lora_in_blocks(base, LoraFlags(lora_r=rank, lora_alpha=2 * rank)) if rank else None
    return kind(**{
        "model": base,
        "args": arguments(folder, **options),
        "train_dataset": pairs(),
        "tokenizer": tokenizer(),
        "peft_config": lora,
        "dpo_args": dpo,
    } | (of or {}))  # fmt: skip
