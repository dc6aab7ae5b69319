"""`onepass train SYSTEM`: parse, refuse, claim the folder, then let the system train.

A system's module offers FLAGS (dataclasses, in the order of help), `check(flags)` (UsageError for
all that can be refused before anything heavy is loaded) and `train(flags, run) -> int`, and may
offer DEFAULTS, by flag name. Only the main process of a launch writes and prints.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..cli.errors import Parser, UsageError, nearest, unknown
from .flags import Flags, RunFlags, check_run_flags, parse
from .models import check_installed
from .run_folder import (
    RunFolder,
    is_main_process,
    latest_checkpoint,
    n_processes,
    recorded_flags,
    tell,
)


class System(NamedTuple):
    """A system's module, relative to the package, and what it does."""

    module: str
    summary: str


SYSTEMS = {
    "circuit-breaker": System(
        ".circuit_breaker.command", "turn a language model's states of harmful text away"
    ),
    "dpo": System(".dpo.command", "teach a language model which of two answers is preferred"),
    "infinity-circuit-breaker": System(
        ".circuit_breaker.infinity.command", "the same for an autoregressive image model"
    ),
    "jigsaw": System(
        ".jigsaw.command", "transform a language model's embeddings so that one adapter reads them"
    ),
}
NEEDED = ("transformers", "accelerate", "peft", "tokenizers", "safetensors", "tqdm", "matplotlib")
# TRL's names; the number of processes is that of the devices unless --num_processes says another.
_FSDP = (
    *("--use_fsdp", "--fsdp_auto_wrap_policy=TRANSFORMER_BASED_WRAP"),
    *("--fsdp_state_dict_type=FULL_STATE_DICT", "--fsdp_cpu_ram_efficient_loading=true"),
)
ACCELERATE = {
    "single_gpu": ("--num_processes=1",),
    "multi_gpu": ("--multi_gpu",),
    "fsdp1": (*_FSDP, "--fsdp_version=1", "--fsdp_use_orig_params=true"),
    "fsdp2": (*_FSDP, "--fsdp_version=2"),
    "zero1": ("--use_deepspeed", "--zero_stage=1"),
    "zero2": ("--use_deepspeed", "--zero_stage=2"),
    "zero3": ("--use_deepspeed", "--zero_stage=3", "--zero3_save_16bit_model=true"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `onepass train` itself takes: the name of a system."""
    width = max(map(len, SYSTEMS))
    listed = "\n".join(f"  {name:<{width}}  {s.summary}" for name, s in SYSTEMS.items())
    parser.usage = "onepass train SYSTEM [flags]"
    parser.description = (
        f"Train with the losses of onepass. Systems:\n{listed}\n\n"
        "A run's folder gets checkpoint-N/, metrics.jsonl, curves.png, summary.json and run.json."
    )
    parser.epilog = "See also: onepass train SYSTEM --help"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_tokens(tokens: Sequence[str]) -> int:
    """Run `onepass train` with `tokens`; returns the exit code."""
    if not tokens or tokens[0].startswith("-"):
        parser = Parser(prog="onepass train")
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if all(t == "--debug" for t in tokens):
            raise UsageError("got no system", allowed=SYSTEMS, hint="see onepass train --help")
        try:
            parser.parse_args(tokens)
        except UsageError as error:
            error.hint = "flags follow the system: onepass train SYSTEM --flag"
            raise
    name, *rest = tokens
    if name not in SYSTEMS:
        raise unknown("system", name, SYSTEMS, prog="onepass train")
    if is_main_process():
        return _train(name, rest)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            return _train(name, rest)
        except UsageError:
            return 2  # the main process tells it


def _train(name: str, tokens: Sequence[str]) -> int:
    prog, system = f"onepass train {name}", SYSTEMS[name]
    module = importlib.import_module(system.module, __package__.rpartition(".")[0])
    flags = parse(
        prog,
        module.FLAGS,
        tokens,
        defaults=getattr(module, "DEFAULTS", None),
        description=f"onepass train {name}: {system.summary}.",
        recorded=partial(recorded_flags, system=name),
    )
    if "num_train_epochs" in flags.given and "max_steps" not in flags.given:
        flags[RunFlags].max_steps = -1  # a system's default would win over what was typed
    try:
        check_run_flags(flags)
        launch = _launch_flags(flags)
        module.check(flags)
        folder = RunFolder(name, flags)
    except UsageError as error:
        error.prog = prog
        raise
    check_installed(NEEDED)
    if launch is not None:
        again = ["-m", "onepass", "train", name, *flags.tokens, "--accelerate_config=none"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *again]
        sys.stdout.flush()
        sys.stderr.flush()
        os.execv(sys.executable, command)
    from .monitor import Stopped
    from .processes import together

    same = ", under the same launcher," if n_processes() > 1 else ""
    go_on = f"go on{same} with: {prog} --output_dir {shlex.quote(str(folder.path))}"
    go_on += " --resume_from_checkpoint"
    try:
        with together(lambda told: f"{prog}: {told}; {_where(folder.path, go_on)}"):
            return int(module.train(flags, folder) or 0)
    except UsageError as error:
        error.prog = prog
        raise
    except Stopped as stopped:
        at = f"interrupted at step {stopped.step} of {stopped.n_steps}; saved {stopped.checkpoint}"
        tell(f"{prog}: {at}; {go_on}")
    except KeyboardInterrupt:
        tell(f"{prog}: interrupted; {_where(folder.path, go_on)}")
    finally:
        folder.release()
    return 130


def _where(folder: Path, go_on: str) -> str:
    last = latest_checkpoint(folder)
    return "no checkpoint yet" if last is None else f"{last} is the last checkpoint; {go_on}"


def _launch_flags(flags: Flags) -> list[str] | None:
    """The launcher's flags for --accelerate_config; None where it was not asked for."""
    name = flags[RunFlags].accelerate_config
    if name in (None, "none"):
        return None
    if name in ACCELERATE:
        # bf16 is TrainingArguments' to say, and what is not said accelerate warns of
        plain = ("--mixed_precision=no", "--dynamo_backend=no", "--num_machines=1")
        chosen = [*plain, *ACCELERATE[name]]
    elif os.path.isfile(name):
        chosen = [f"--config_file={name}"]
    else:
        meant = nearest(name, ACCELERATE)
        text = f"--accelerate_config: {name!r} is neither a name nor a file"
        raise UsageError(text, allowed=ACCELERATE, meant=meant)
    return [*chosen, *flags.launch]
