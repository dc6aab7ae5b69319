"""`onepass demo`: train a small language model on this machine, then break half of what it knows.

The text comes with the interpreter: the Python documentation as English prose, the standard
library as source code. A small Llama behind `lazy_head` learns both with `cross_entropy`; a LoRA
adapter then turns the hidden states of code away from where they were (`masked_inner_product`) and
holds those of prose in place (`masked_normalized_l2`).

This file is the command: it imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.errors import UsageError
from ..training.models import check_installed

if TYPE_CHECKING:
    import torch

    from .settings import Settings

OUTPUT = "onepass-demo"
# What the modules here import besides torch; all of it comes with the two extras.
NEEDED = ("transformers", "peft", "tokenizers", "safetensors", "tqdm", "matplotlib")
MAX_SEED = 2**32 - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass demo`."""
    parser.add_argument(
        "--fast", action="store_true", help="a smaller model and fewer steps: half a minute"
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        default=OUTPUT,
        help="folder for checkpoint-N/, demo.json and curves.png (default: ./%(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the GPU where torch sees one (cuda is also ROCm)",
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="N", help="of weights, batches and held-out text (default: 0)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on from the checkpoint in the output folder"
    )


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot work, then train and report; returns the exit code."""
    from . import checkpoint

    try:
        return _run(args)
    except KeyboardInterrupt:
        # Before training, or a second Ctrl-C: the first one in training raises Stopped.
        folder = checkpoint.find(Path(args.output))
        if folder is None:
            return _leave(130, "interrupted before the first checkpoint; nothing to go on from")
        return _leave(130, f"interrupted; {folder} is the last checkpoint; {_go_on(args.output)}")


def _run(args: argparse.Namespace) -> int:
    check_installed(NEEDED)
    if not args.output:
        raise UsageError("--output: got an empty name, wanted a folder")
    output = Path(args.output)
    resume_from, size, seed = _what_to_run(args, output)
    _check_output(output)
    device = _device(args.device)

    from . import checkpoint

    replaced = None if args.resume else checkpoint.earlier_run(output)
    if replaced is not None:
        date = time.strftime("%Y-%m-%d %H:%M", time.localtime(replaced))
        print(f"replacing the run of {date} in {output}", file=sys.stderr)
    print("loading the libraries and the text", file=sys.stderr, flush=True)
    from .. import strict
    from ..cli.terminal import quiet_libraries, say
    from . import report
    from .pipeline import Run, Stopped
    from .train import one_thread

    with quiet_libraries(), one_thread(), strict():  # an error, should anything need whole logits
        started = Run(size, seed, device, output, resume_from)
        checkpoint.remove_partial(output)
        if replaced is not None:
            checkpoint.remove_results(output)
        try:
            started.train()
        except Stopped as stopped:
            at = f"interrupted at step {stopped.step} of {size.n_steps}"
            return _leave(130, f"{at}; saved {stopped.folder}; {_go_on(args.output)}")
        before, after = started.before_and_after()
        results, picture = output / checkpoint.REPORT, output / checkpoint.PICTURE
        report.write_json(results, started.state, started.text, before, after, device)
        report.write_png(picture, started.state)
    say(f"wrote {results}, {picture}")
    report.show(before, after)
    print(report.memory(size, started.base.config.vocab_size))
    return 0


def _what_to_run(args: argparse.Namespace, output: Path) -> tuple[Path | None, Settings, int]:
    """The checkpoint to go on from and what it was made with, or None and what the flags ask."""
    from . import checkpoint, settings

    asked = settings.FAST if args.fast else settings.FULL
    if not args.resume:
        return None, asked, args.seed or 0
    folder = checkpoint.find(output)
    if folder is None:
        raise UsageError(
            f"--resume: no checkpoint in {str(output)!r}", hint="leave out --resume to begin a run"
        )
    state = checkpoint.read_state(folder)
    if args.fast and state.settings != settings.FAST:
        raise UsageError(f"--fast: {folder} was made without it", hint="leave out --fast")
    if args.seed not in (None, state.seed):
        raise UsageError(
            f"--seed: got '{args.seed}', but {folder} was made with '{state.seed}'",
            hint="leave out --seed",
        )
    return folder, state.settings, state.seed


def _check_output(output: Path) -> None:
    """UsageError where the run could not write, or would write over what is not its own."""
    from ..cli.folder import check_writable
    from . import checkpoint

    check_writable(output)
    taken = checkpoint.foreign(output) or checkpoint.foreign_report(output)
    if taken is not None:
        raise UsageError(
            f"--output: {str(taken)!r} was made by another program",
            hint="name another folder with --output DIR",
        )


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def _seed(text: str) -> int:
    try:
        seed = int(text)
    except ValueError:
        seed = -1
    if not 0 <= seed <= MAX_SEED:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, wanted a whole number from 0 to {MAX_SEED}"
        )
    return seed


def _go_on(output: str) -> str:
    """What to type to resume."""
    where = "" if output == OUTPUT else f" --output {shlex.quote(output)}"
    return f"go on with: onepass demo --resume{where}"


def _leave(code: int, line: str) -> int:
    print(f"onepass demo: {line}", file=sys.stderr)
    return code
