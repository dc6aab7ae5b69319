"""Loading the model that a run's flags name, with one-line errors."""

from __future__ import annotations

from typing import Any

from ..cli.errors import Failed, one_line
from .flags import ModelFlags


def load_language_model(flags: ModelFlags, args: Any) -> tuple[Any, Any]:
    """(model, tokenizer) for training with `args`, a transformers.TrainingArguments.

    Weights have the dtype they were saved in, or on a CPU float32, unless the flags say another.

    Raises:
        Failed: no such model, or one that is not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    name, where = flags.model_name_or_path, {"revision": flags.model_revision}
    dtype: Any = flags.dtype
    if dtype == "auto" and args.device.type == "cpu":
        dtype = "float32"
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
    if flags.attn_implementation is not None:
        options["attn_implementation"] = flags.attn_implementation
    if flags.load_in_4bit or flags.load_in_8bit:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=flags.load_in_4bit,
            load_in_8bit=flags.load_in_8bit,
            bnb_4bit_quant_type=flags.bnb_4bit_quant_type,
            bnb_4bit_compute_dtype=torch.bfloat16 if args.bf16 else torch.float16,
        )
        options["device_map"] = {"": args.device}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
        model = AutoModelForCausalLM.from_pretrained(name, **where, **options)
    except (OSError, ValueError, ImportError) as error:
        raise Failed(f"--model: cannot load {name!r}: {one_line(error)}") from error
    model.config.use_cache = False
    if flags.load_in_4bit or flags.load_in_8bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, tokenizer
