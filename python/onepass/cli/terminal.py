"""How a run behaves in a terminal: its progress bar, its silence, its answer to Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import unicodedata
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

LIBRARIES = ("transformers", "peft", "accelerate", "torch", "matplotlib")


def say(line: str) -> None:
    """A line to stderr, above the bar where there is one."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)


def above_bar() -> AbstractContextManager[None]:
    """No bar inside, so that stdout can be written to; again after."""
    from tqdm.auto import tqdm

    told: AbstractContextManager[None] = tqdm.external_write_mode()
    return told


def width_of(text: str) -> int:
    """Columns of a terminal: East Asian characters take two, marks on another none."""
    shown = (c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf"))
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in shown)


def progress_bar(n_steps: int, done: int) -> Any:
    """tqdm on stderr; silent without a terminal or where the Hub's bars are switched off."""
    from tqdm.auto import tqdm

    switched_off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper()
    return tqdm(
        total=n_steps,
        initial=done,
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
        disable=not sys.stderr.isatty() or switched_off in {"1", "ON", "YES", "TRUE"},
    )


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No bars, notices or deprecation warnings of the libraries inside; restored after."""
    with warnings.catch_warnings():
        for library in LIBRARIES:
            warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        from transformers.utils import logging

        verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if bars:
                logging.enable_progress_bar()


class StopRequest:
    """Ctrl-C as a question that training asks after a step; a second Ctrl-C does not wait."""

    def __init__(self) -> None:
        self.made = False
        self._previous: Any = None

    def __enter__(self) -> StopRequest:
        in_main_thread = threading.current_thread() is threading.main_thread()
        # Other threads cannot set handlers; a job put in the background ignores Ctrl-C on purpose.
        if in_main_thread and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, *_: object) -> None:
        self.made = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
