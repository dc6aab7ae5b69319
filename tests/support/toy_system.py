"""A system of `onepass train` as small as one can be: a line fitted to points.

Run as a program it is `onepass train toy` with the arguments given. TOY_DIE names a place in the
saving of a checkpoint where the process ends as by kill -9; TOY_STOP a step at which Ctrl-C comes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onepass.cli.errors import UsageError
from onepass.training.flags import Flags, LoraFlags, ModelFlags, RunFlags, flag
from onepass.training.run_folder import RunFolder


@dataclass
class ToyFlags:
    """The line."""

    slope: float = flag(2.0, "of the points")
    kinds: list[str] = flag(["a"], "names of points")
    shape: str = flag("round", "of a point", choices=["round", "square"])
    centre: bool = flag(True, "points around 0")
    secret: str | None = flag(None, "told by --help-all only", advanced=True)


FLAGS = (ModelFlags, LoraFlags, ToyFlags, RunFlags)
DEFAULTS = {
    "max_steps": 12,
    "save_steps": 3,
    "logging_steps": 2,
    "learning_rate": 0.1,
    "per_device_train_batch_size": 4,
    "save_total_limit": 1,
}


def check(flags: Flags) -> None:
    if flags[ToyFlags].slope == 0:
        raise UsageError("--slope: got 0, wanted a slope")


def train(flags: Flags, run: RunFolder) -> int:
    import torch
    from transformers import Trainer

    from onepass.training.curves import write_curves, write_summary
    from onepass.training.flags import training_arguments
    from onepass.training.monitor import fit

    torch.set_num_threads(1)
    run.begin(data={"points": str(flags[ToyFlags].slope)}, writes=["model.safetensors"])
    arguments = training_arguments(flags)

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = torch.nn.Linear(3, 1)
            self.dropout = torch.nn.Dropout(0.2)  # so that a resumed run needs the random state

        def forward(self, x: Any, y: Any) -> dict[str, Any]:
            if os.environ.get("TOY_SLOW"):
                time.sleep(float(os.environ["TOY_SLOW"]))
            return {"loss": (self.line(self.dropout(x)).squeeze(-1) - y).square().mean()}

    torch.manual_seed(arguments.seed)
    model = Line()
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    points = [{"x": row, "y": flags[ToyFlags].slope * row.sum()} for row in x]
    arguments.gradient_checkpointing = False
    if hasattr(arguments, "activation_checkpointing"):
        arguments.activation_checkpointing = False  # a plain module has none
    trainer = Trainer(model=model, args=arguments, train_dataset=points)  # type: ignore[arg-type]
    die_at(os.environ.get("TOY_DIE", ""), trainer)
    stop_at(int(os.environ.get("TOY_STOP", "0")), trainer)
    fit(trainer, run)
    if run.is_main:
        from safetensors.torch import save_file

        run.save(lambda folder: save_file(model.state_dict(), folder / "model.safetensors"))
    write_curves(run, "A line", [("Loss", "mean square", {"loss": "train"}, {"yscale": "log"})])
    write_summary(run, "A line", ["step", "slope"], [[trainer.state.global_step, 2.0]], slope=2.0)
    return 0


def die_at(place: str, trainer: Any) -> None:
    """End the process at "NAME" or "NAME:N": before the N-th call (from 1), or within it."""
    import shutil

    import torch
    from transformers import trainer as module
    from transformers.trainer_callback import TrainerState

    name, _, number = place.partition(":")
    calls = [0]

    def due() -> bool:
        calls[0] += 1
        return calls[0] == int(number or 2)

    def before(owner: Any, attribute: str) -> None:
        plain = getattr(owner, attribute)

        def dying(*args: Any, **kwargs: Any) -> Any:
            if due():
                os._exit(9)
            return plain(*args, **kwargs)

        setattr(owner, attribute, dying)

    def half_a_state(self: Any, path: str) -> None:
        plain_state(self, path)
        if due():
            os.truncate(path, os.path.getsize(path) // 2)
            os._exit(9)

    def half_a_removal(path: Any, *args: Any, **kwargs: Any) -> None:
        if due():
            for file in sorted(Path(path).iterdir())[:2]:
                file.unlink()
            os._exit(9)
        plain_removal(path, *args, **kwargs)

    plain_state, plain_removal = TrainerState.save_to_json, shutil.rmtree
    if name in ("save_model", "_save_optimizer_and_scheduler", "_save_rng_state"):
        before(trainer, name)
    elif name == "write":
        before(torch, "save")
    elif name == "state":
        TrainerState.save_to_json = half_a_state  # type: ignore[method-assign]
    elif name == "rotate":
        before(module, "rotate_checkpoints")
    elif name == "removal":
        shutil.rmtree = half_a_removal  # type: ignore[assignment]
    elif name == "log":
        before(trainer, "log")
    else:
        assert not name, name


def stop_at(step: int, trainer: Any) -> None:
    from transformers import TrainerCallback

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGINT)
                if os.environ.get("TOY_TWICE"):
                    os.kill(os.getpid(), signal.SIGINT)

    if step:
        trainer.add_callback(Interrupt())


def serve() -> None:
    """Jobs as JSON lines, each run in a fork of this process: importing takes longer than they."""
    import importlib

    from onepass.cli import main

    for name in ("curves", "monitor"):
        importlib.import_module(f"onepass.training.{name}")
    importlib.import_module("matplotlib.figure")
    importlib.import_module("transformers.trainer")
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if not child:
            os.chdir(job["cwd"])
            for number, name in ((0, os.devnull), (1, "out"), (2, "err")):
                os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(job["env"])
            code = 99
            try:
                code = main(["train", "toy", *job["args"]])
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    from onepass.cli import main
    from onepass.training.command import SYSTEMS, System

    SYSTEMS["toy"] = System("toy_system", "fit a line")
    if sys.argv[1:] == ["--serve"]:
        serve()
    else:
        sys.exit(main(["train", "toy", *sys.argv[1:]]))
