"""Other packages' names and arguments over this package's losses, for code that moves here.

An argument of theirs does what it did there, or is refused in one line that says why; what only
tells their kernels how to work is accepted where the result here is at least as exact.
docs/migrate.md has the tables.
"""

from __future__ import annotations

from . import cce, liger

__all__ = ["cce", "liger"]
