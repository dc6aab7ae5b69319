"""The sizes of the small model and the file that holds them; nothing here needs torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "model.safetensors", "config.json"
MODEL_TYPE = "onepass-infinity"


@dataclass  # not frozen: transformers.Trainer sets use_cache on any model.config
class InfinityConfig:
    embed_dim: int = 64
    depth: int = 6
    num_heads: int = 4
    mlp_ratio: float = 2.0
    text_channels: int = 32  # of the text encoder
    text_maxlen: int = 512
    d_vae: int = 3  # channels of x_BLC_wo_prefix
    vocab_size: int = 8
    max_scales: int = 15
    cond_drop_rate: float = 0.0  # share of prompts that training drops, for guidance later
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for field in fields(self):
            value, whole = getattr(self, field.name), field.type == "int"
            number = isinstance(value, int if whole else int | float) and value is not True
            if not number or value < (1 if whole else 0):
                wanted = "a whole number from 1" if whole else "a number from 0"
                raise ValueError(f"{field.name}: got {value!r}, wanted {wanted}")
        if self.embed_dim % self.num_heads:
            raise ValueError(
                f"embed_dim: got {self.embed_dim}, wanted a multiple of num_heads, {self.num_heads}"
            )
        if self.cond_drop_rate > 1:
            raise ValueError(f"cond_drop_rate: got {self.cond_drop_rate}, wanted 0 to 1")

    def to_dict(self) -> dict[str, Any]:
        return {"model_type": MODEL_TYPE, **asdict(self)}


def read_config(folder: str | Path) -> InfinityConfig:
    """The configuration of a saved model, without its weights."""
    path = Path(folder, CONFIG)
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no {CONFIG}, wanted a folder of save_pretrained")
    try:
        raw = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(raw, dict) or raw.pop("model_type", None) != MODEL_TYPE:
        raise ValueError(f"{path}: not of a model of this kind, wanted model_type {MODEL_TYPE!r}")
    known = {field.name for field in fields(InfinityConfig)}
    if unknown := sorted(set(raw) - known):
        raise ValueError(f"{path}: unknown {', '.join(unknown)}; saved by another version")
    try:
        return InfinityConfig(**raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
