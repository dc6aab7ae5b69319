"""Other packages on this package's head and statistics, each imported only when it is asked for."""

from __future__ import annotations

from . import inseq, trl

__all__ = ["inseq", "trl"]
