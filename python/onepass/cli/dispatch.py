"""The commands of `onepass`: a dispatcher that loads only what is asked for.

`onepass --help` and a misspelt command cost no import beyond argparse; a command's module is
imported once it has been named. Results go to stdout, all else to stderr; exit codes: 0 done,
1 failed at run time, 2 wrong invocation, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

from .errors import Failed, Parser, UsageError, one_line, unknown

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Command(NamedTuple):
    """A subcommand: `module` offers `add_arguments(parser)` and `run(args) -> int | None`, or
    `run_tokens(tokens) -> int` where its flags depend on what comes first."""

    module: str  # relative to the package
    summary: str
    description: str


COMMANDS = {
    "doctor": Command(
        ".cli.doctor",
        "check every op and loss on the devices at hand",
        "Check every public op and loss against an fp64 reference on the devices at hand, and"
        " print its error over that of unfused torch. Exit code 1 on any miss.",
    ),
    "env": Command(
        ".cli.env",
        "versions, drivers and settings, to paste into a report",
        "Print the versions, drivers and environment variables that matter to onepass.",
    ),
    "bench": Command(
        ".bench.command",
        "time the ops and losses against torch and other packages",
        "Time the ops and losses against torch and against other packages where installed.",
    ),
    "demo": Command(
        ".demo",
        "train a small language model, then break one half of it and keep the other",
        "Train a small language model on text found on this machine, then adapt it with the"
        " losses of onepass so that it forgets code and keeps prose.",
    ),
    "train": Command(
        ".training.command",
        "train a system on your model and data: circuit-breaker, ...",
        "Train with the losses of onepass.",
    ),
    "dpo": Command(
        ".dpo.command_line",
        "make preference pairs, judge a model's answers, compare losses",
        "Preferences from a reward, and what training on them brings.",
    ),
    "pplm": Command(
        ".pplm.train_command",
        "train heads that generation is steered by",
        "Steering of generation by heads and bags of words.",
    ),
    "generate": Command(
        ".pplm.command",
        "write text that a bag of words or a discriminator steers",
        "Text of a language model, steered.",
    ),
    "attribute": Command(
        ".attribution.command",
        "show which tokens a model's next-token scores come from",
        "Attribute a language model's next-token scores to the tokens that it read, by gradients."
        " Without --model it trains a small one first, in a minute.",
    ),
    "protect": Command(
        ".jigsaw.protect",
        "transform a text's embeddings, show what an attack recovers",
        "Apply a trained Stained Glass Transform to a text and print, for each token, how far its"
        " embedding moved and what the nearest-embedding attack recovers.",
    ),
}
# The extra in pyproject.toml that brings a module.
EXTRAS = {
    **dict.fromkeys(("transformers", "tokenizers", "peft", "accelerate", "datasets"), "train"),
    **dict.fromkeys(("safetensors", "tqdm", "yaml"), "train"),
    **dict.fromkeys(("matplotlib", "rich"), "viz"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `onepass` with `argv` (sys.argv[1:] where None); returns the exit code."""
    tokens = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in tokens
    prog = "onepass"
    for stream in ("stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed by the caller (`>&-`)
            setattr(sys, stream, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        try:
            at = next((i for i, t in enumerate(tokens) if not t.startswith("-")), len(tokens))
            _top_level_options(tokens[:at])
            if at == len(tokens):
                raise UsageError("got no command", allowed=COMMANDS, hint="see onepass --help")
            name = tokens[at]
            if name not in COMMANDS:
                flags = ("--help", "--version")
                raise unknown("command", name, COMMANDS, prog=prog, also=flags)
            prog = f"onepass {name}"
            code = _run(name, tokens[at + 1 :])
        except SystemExit as stop:  # argparse after --help, or a command's own sys.exit
            if isinstance(stop.code, str):
                raise Failed(stop.code) from stop
            code = stop.code or OK
        sys.stdout.flush()  # here, so that a closed pipe or a full disk is caught below
        return code
    except KeyboardInterrupt:
        return _complain(debug, INTERRUPTED, f"{prog}: interrupted")
    except BrokenPipeError:
        _forget_stdout()
        return FAILED
    except UsageError as error:
        error.prog = error.prog or prog
        return _complain(debug, USAGE, *error.lines())
    except Failed as error:
        return _complain(debug, FAILED, f"{prog}: {one_line(error, 1000)}")
    except ModuleNotFoundError as error:
        return _complain(debug, FAILED, f"{prog}: {_missing(error)}")
    except Exception as error:
        mend = "  run it again with --debug for the traceback"
        return _complain(debug, FAILED, f"{prog}: {_told(error)}", mend)


def _top_level_options(tokens: Sequence[str]) -> None:
    """Serve --help and --version; refuse an option that belongs after the command."""
    commands = "\n".join(f"  {name:<9} {command.summary}" for name, command in COMMANDS.items())
    parser = Parser(
        prog="onepass",
        usage="onepass COMMAND [options]      (or: python -m onepass COMMAND [options])",
        description="onepass (Triton losses): losses of language models that read the logits once."
        f"\n\ncommands:\n{commands}",
        epilog="Results go to stdout, messages to stderr. Exit codes: 0 done, 1 failed,\n"
        "2 wrong invocation, 130 interrupted. See also: onepass COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    try:
        args = parser.parse_args(tokens)
    except UsageError as error:
        error.hint = "a command's own options follow it: onepass COMMAND --option"
        raise
    if args.version:
        from .. import __version__

        print(f"onepass {__version__}")
        raise SystemExit(OK)


def _run(name: str, tokens: Sequence[str]) -> int:
    """Import the command's module, parse its options, run it."""
    import importlib

    command = COMMANDS[name]
    module = importlib.import_module(command.module, __package__.rpartition(".")[0])
    if hasattr(module, "run_tokens"):
        return int(module.run_tokens(tokens))
    parser = Parser(prog=f"onepass {name}", description=command.description)
    module.add_arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return int(module.run(parser.parse_args(tokens)) or OK)


def _told(error: Exception) -> str:
    """An exception as one line; the type's name only where the message alone would not do."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = one_line(error)
    if text and type(error) is RuntimeError:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _missing(error: ModuleNotFoundError) -> str:
    """One line that says what to install for a module that is not there."""
    name = (error.name or "").partition(".")[0]
    if not name.isidentifier():  # raised by hand, with a sentence for a name
        return one_line(error)
    if name == "onepass":
        return f"{error.name} is not in this installation: pip install --force-reinstall onepass"
    wanted = f"'onepass[{EXTRAS[name]}]'" if name in EXTRAS else name
    return f"needs {name}, which is not installed: pip install {wanted}"


def _forget_stdout() -> None:
    """The reader (`| head`) has gone; the interpreter's own flush at exit must not complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        pass  # stdout is no file here: the caller replaced it, and its flush is theirs


def _complain(debug: bool, code: int, *lines: str) -> int:
    """Write `lines` to stderr, after the traceback under --debug; returns `code`."""
    if debug:
        import traceback

        traceback.print_exc()
    print(*lines, sep="\n", file=sys.stderr)
    return code
