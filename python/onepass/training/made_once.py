"""What the main process of a launch makes, and the others wait for."""

from __future__ import annotations

import time
from collections.abc import Callable

from ..cli.errors import Failed

PATIENCE = 1800  # seconds


def wait_for(is_complete: Callable[[], bool], what: str) -> None:
    """Return once `is_complete`.

    Raises:
        Failed: it was not after PATIENCE.
    """
    ends = time.monotonic() + PATIENCE
    while not is_complete():
        if time.monotonic() > ends:
            raise Failed(f"waited {PATIENCE} s for the main process to make {what}")
        time.sleep(0.5)
