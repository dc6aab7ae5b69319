"""The command line of `onepass bench`: its options, and what they may be.

Cases, runner and tables are imported once an option needs them: `--help` loads none of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..cli.errors import UsageError, unknown
from . import DTYPES, MODES

DEFAULT_FOLDER = "onepass-bench"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass bench`."""
    add = parser.add_argument
    actions = ("run", "plot", "csv")
    add(
        "action",
        nargs="?",
        default="run",
        choices=actions,
        metavar="ACTION",
        help="run (the default), or plot or csv: a file of rows into a picture or a table",
    )
    add("file", nargs="?", type=Path, metavar="FILE", help="plot, csv: the JSON rows to read")
    add("-o", "--out", type=Path, metavar="FILE", help="plot, csv: the file to write")
    add("--case", action="append", type=_case, metavar="NAME", help="only this (repeatable)")
    add("--list", action="store_true", help="list cases, sizes and providers, and stop")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: cuda if any")
    add("--dtype", choices=DTYPES, help="instead of each size's own")
    add("--mode", action="append", choices=MODES, help="instead of each case's own (repeatable)")
    add("--providers", type=_providers, metavar="A,B", help="only these; eager is the yardstick")
    add(
        "--quick",
        action="store_true",
        help="first sizes (on a CPU a quarter), few turns, no compile",
    )
    help_output = f"folder for <device>.json, made if missing (default: ./{DEFAULT_FOLDER})"
    add("--all-sizes", action="store_true", help="the sizes that --list calls more, too")
    add("--roofline", action="store_true", help="predict the GPU sizes, run nothing, and stop")
    add("--distributed", action="store_true", help="sharded heads, under torchrun; own cases")
    add("--output", type=Path, default=Path(DEFAULT_FOLDER), metavar="DIR", help=help_output)
    add("--plot", type=Path, metavar="PNG", help="draw this run's rows too")
    add("--json", action="store_true", help="print environment and rows as JSON, not tables")
    add("--threads", type=_positive(int), metavar="N", help="CPU threads (default: torch's)")
    help_limit = "start no further size after this many seconds"
    add("--time-limit", type=_positive(float), metavar="S", help=help_limit)


def _positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"got {text!r}, wanted a number above 0")
        return value

    parse.__name__ = kind.__name__  # argparse names the type in its error
    return parse


def _case(name: str) -> str:
    from .cases import CASES
    from .distributed import names as distributed

    names = [*(case.name for case in CASES), *distributed()]
    if name not in names:
        raise unknown("case", name, names)
    return name


def _providers(text: str) -> tuple[str, ...]:
    from .cases import provider_names
    from .distributed import PROVIDERS

    known = tuple(dict.fromkeys((*provider_names(), *PROVIDERS)))
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise UsageError(f"--providers: got {text!r}, wanted names", allowed=known)
    for name in names:
        if name not in known:
            raise unknown("provider", name, known)
    return names


def run(args: argparse.Namespace) -> int:
    """Do what the command line asked; returns the exit code."""
    from .run import run

    return run(args)


def main(argv: Sequence[str] | None = None) -> int:
    """`onepass bench` with `argv` (sys.argv[1:] where None); returns the exit code."""
    from ..cli import main as dispatch

    return dispatch(["bench", *(sys.argv[1:] if argv is None else argv)])
