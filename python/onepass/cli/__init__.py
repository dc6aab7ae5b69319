"""The command `onepass` (also `python -m onepass`); dispatch.py is its table of commands.

Imports nothing of its own until `main` runs, so that Ctrl-C meets its handler from the start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onepass` with `argv` (sys.argv[1:] where None); returns the exit code."""
    try:
        from .dispatch import main as dispatch

        return dispatch(argv)
    except KeyboardInterrupt:
        print("onepass: interrupted", file=sys.stderr)
        return 130
