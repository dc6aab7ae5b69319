"""The model that --model names: the small one's folder, or a function of an importable module."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from ...cli.errors import Failed, UsageError, one_line
from .config import InfinityConfig, read_config

FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def check_model(name: str) -> InfinityConfig | None:
    """The configuration of the model in the folder `name`; None where `name` is a function.

    Raises:
        UsageError: neither.
    """
    if not Path(name).exists() and FUNCTION.fullmatch(name):
        return None
    if not Path(name).is_dir():
        raise UsageError(
            f"--model: got {name!r}, wanted a folder of save_pretrained, or package.module:function"
        )
    try:
        return read_config(name)
    except (ValueError, OSError) as error:
        raise UsageError(f"--model: {one_line(error)}") from error


def load_model(name: str) -> Any:
    """The model itself.

    Raises:
        Failed: it cannot be loaded, or what the function returns is no module.
    """
    from torch import nn

    from .model import Infinity

    try:
        if check_model(name) is not None:
            return Infinity.from_pretrained(name)
        module, _, function = name.partition(":")
        made = getattr(importlib.import_module(module), function)()
    except (ValueError, OSError, ImportError, AttributeError, TypeError) as error:
        raise Failed(f"--model: cannot load {name!r}: {one_line(error)}") from error
    if not isinstance(made, nn.Module):
        raise Failed(f"--model: {name} returned {type(made).__name__}, wanted a torch.nn.Module")
    return made
