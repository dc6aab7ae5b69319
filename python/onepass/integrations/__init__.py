"""Other packages' trainers on this package's head, each imported only when it is asked for."""

from __future__ import annotations

from . import trl

__all__ = ["trl"]
