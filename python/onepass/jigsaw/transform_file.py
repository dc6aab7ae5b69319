"""Where a transform lies on disk and what it says of itself, read without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WEIGHTS, CONFIG = "model.safetensors", "config.json"
FORMAT = "onepass.jigsaw.TransformerCloak/1"
SGT = "sgt"  # its folder in that of a run
MAX_HEADER = 100_000_000  # bytes, as safetensors has it


def find_transform(folder: Path) -> Path:
    """The folder of the transform: `folder` itself, or sgt/ of a run or of its checkpoint.

    Raises:
        FileNotFoundError: no such folder, or no transform in it.
    """
    if not folder.is_dir():
        what = f"{str(folder)!r} is a file, wanted a folder"
        raise FileNotFoundError(what if folder.exists() else f"no such folder: {str(folder)!r}")
    for found in (folder / SGT, folder):
        if (found / WEIGHTS).is_file():
            return found
    text = f"no {SGT}/{WEIGHTS} or {WEIGHTS} in {str(folder)!r}"
    inside = sorted(p for p in folder.glob(f"checkpoint-*/{SGT}/{WEIGHTS}") if p.is_file())
    if inside:
        raise FileNotFoundError(f"{text}, but its {inside[-1].parents[1].name} has one: name that")
    raise FileNotFoundError(f"{text}: wanted a folder of onepass train jigsaw or save_pretrained")


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings that the transform in `folder` was made with, out of its weights' header.

    Raises:
        ValueError: a file of something else, or damaged.
    """
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER:
                raise ValueError("its header is too long")
            metadata = json.loads(file.read(length)).get("__metadata__") or {}
        if metadata.get("kind") != FORMAT:
            raise LookupError(f"{path} holds no transform of onepass ({FORMAT})")
        settings = json.loads(metadata["config"])
    except LookupError as error:
        raise ValueError(str(error).strip("'")) from error
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it has no header of safetensors") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("hidden_size"), int):
        raise ValueError(f"{path} is damaged: it does not say its hidden_size")
    return settings
