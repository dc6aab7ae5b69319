"""Where a command writes: whether it can, found out before any work and without making anything."""

from __future__ import annotations

import tempfile
from pathlib import Path

from .errors import UsageError


def check_writable(folder: Path, flag: str = "--output", value: str = "DIR") -> None:
    """UsageError unless files can be made in `folder`, or where it is missing, `folder` itself.
    `value` is what the flag takes: DIR, or the FILE that goes there."""
    existing = folder
    try:
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        if not existing.is_dir():
            why = f"{str(existing)!r} is a file, not a folder"
        else:
            with tempfile.TemporaryFile(dir=existing):
                return
    except OSError as error:
        why = f"cannot write to {str(folder)!r}: {error.strerror}"
    wanted = "a folder" if value == "DIR" else "a file in a folder"
    raise UsageError(f"{flag}: {why}", hint=f"name {wanted} of yours with {flag} {value}")
