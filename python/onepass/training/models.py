"""Loading the model that a run's flags name, with one-line errors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..cli.errors import Failed, UsageError, one_line
from .flags import ModelFlags
from .run_folder import digest


def check_folder(name: str, flag: str = "--model") -> None:
    """UsageError for a path that holds no model, which transformers would look for on the Hub."""
    path = Path(name).expanduser()
    looks_local = name.startswith((".", "~", "/")) or name.count("/") > 1
    if path.is_file():
        raise UsageError(f"{flag}: {name!r} is a file, wanted the folder it lies in")
    if not path.exists():
        if looks_local:
            raise UsageError(f"{flag}: no such folder: {name!r}")
        return
    if not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise UsageError(f"{flag}: {name!r} is an adapter, wanted the model it is of")
        raise UsageError(f"{flag}: no config.json in {name!r}, wanted a model of transformers")


def check_installed(needed: Iterable[str]) -> None:
    """Failed where a library is missing."""
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise Failed(
            f'needs {", ".join(missing)}, not installed here: pip install "onepass[train,viz]"'
        )


def find_adapter(name: str) -> Path:
    """The folder with adapter_config.json: `name`, or adapter/ in the folder of a run.

    Raises:
        UsageError: there is none.
    """
    for folder in (Path(name), Path(name) / "adapter"):
        if (folder / "adapter_config.json").is_file():
            return folder
    raise UsageError(f"--adapter: no adapter_config.json in {name!r}, wanted an adapter of PEFT")


def device_of(name: str) -> Any:
    """The torch.device that --device names."""
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _why(error: Exception) -> str:
    return one_line(error) or type(error).__name__


def load_language_model(
    flags: ModelFlags, args: Any, *, with_encoder: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer) for training with `args`, a transformers.TrainingArguments.

    Args:
        with_encoder: an encoder-decoder too, where its config says that it is one.

    Weights have the dtype they were saved in, or on a CPU float32, unless the flags say another.

    Raises:
        Failed: no such model, or one that is not a causal language model.
    """
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForSeq2SeqLM,
        AutoTokenizer,
    )

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
    check_folder(str(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where)
    except Exception as error:  # each kind of tokenizer file has errors of its own
        raise Failed(f"--model: no tokenizer can be made from {name!r}: {_why(error)}") from error
    kind = AutoModelForCausalLM
    try:
        if with_encoder and AutoConfig.from_pretrained(name, **where).is_encoder_decoder:
            kind = AutoModelForSeq2SeqLM
        model, found = kind.from_pretrained(name, **where, **options, output_loading_info=True)
    except Exception as error:  # transformers', torch's and safetensors' own
        raise Failed(
            f"--model: cannot load {name!r} as a causal language model: {_why(error)}"
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise Failed(
            f"--model: {name!r} has no weights for {len(missing)} parameters of"
            f" {type(model).__name__} ({missing[0]}, ...): not a causal language model, or damaged"
        )
    model.config.use_cache = False
    if flags.load_in_4bit or flags.load_in_8bit:
        from peft import prepare_model_for_kbit_training

        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model, tokenizer


def load_policy(
    model: ModelFlags, adapter: Path | None, device: Any, *, with_encoder: bool = False
) -> tuple[Any, Any]:
    """(model, tokenizer) to draw from."""
    args = SimpleNamespace(device=device, bf16=False)
    made, tokenizer = load_language_model(model, args, with_encoder=with_encoder)
    if not (model.load_in_4bit or model.load_in_8bit):
        made = made.to(device)
    if adapter is not None:
        from peft import PeftModel

        try:
            made = PeftModel.from_pretrained(made, str(adapter))
        except Exception as error:  # PEFT's, torch's and safetensors' own
            raise Failed(
                f"--adapter: {str(adapter)!r} does not fit the model: {_why(error)}"
            ) from error
    return made.eval().requires_grad_(False), tokenizer


def weights_digest(model: Any) -> str:
    """What tells a model's weights apart: of matrices the xor of each row, which is the same on
    every device, and where they are cast to a wider dtype."""
    import torch

    parts = []
    for name, value in model.state_dict().items():
        rows = value.view(torch.uint8) if value.element_size() == 1 else value
        rows = rows.double() if rows.dim() < 2 else torch.hash_tensor(rows, dim=-1)
        parts.append(name.encode() + rows.cpu().numpy().tobytes())
    return digest(b"".join(parts))
