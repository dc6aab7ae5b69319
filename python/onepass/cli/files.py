"""Files that are whole at every instant, and JSON that every reader takes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace` for text."""
    replace(path, lambda new: new.write_text(text, encoding="utf-8"))


def strict_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON, which has no NaN: a number that is none becomes null."""

    def finite(x: Any) -> Any:
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {k: finite(v) for k, v in x.items()}
        return [finite(v) for v in x] if isinstance(x, list | tuple) else x

    return json.dumps(finite(value), indent=indent, allow_nan=False)
