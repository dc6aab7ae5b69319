"""What a training shows and leaves while it runs: metrics.jsonl, a bar, an answer to Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from ..cli.errors import Failed
from ..cli.files import replace_text, strict_json
from ..cli.terminal import StopRequest, progress_bar, quiet_libraries
from .processes import forget_measuring, is_sharded
from .run_folder import METRICS, STATE, RunFolder, latest_checkpoint, tell


class Stopped(Exception):
    """Ctrl-C during training; the checkpoint has been written."""

    def __init__(self, step: int, n_steps: int, checkpoint: Path | None) -> None:
        super().__init__(step, n_steps, checkpoint)
        self.step, self.n_steps, self.checkpoint = step, n_steps, checkpoint


def fit(trainer: Any, run: RunFolder) -> None:
    """`trainer.train` from the run's checkpoint on, monitored.

    Raises:
        Stopped: Ctrl-C came; a second one raises KeyboardInterrupt at once.
        Failed: the training had ended, and the checkpoint is DeepSpeed's.
    """
    for theirs in (PrinterCallback, ProgressCallback):  # they print to stdout
        trainer.remove_callback(theirs)
    forget_evaluation(trainer)
    if run.checkpoint is not None and _is_finished(run.checkpoint):
        if trainer.is_deepspeed_enabled:
            raise Failed(
                f"the training had come to its end at {run.checkpoint.name}, which DeepSpeed loads"
                " only to train on: raise --max_steps or --num_train_epochs"
            )
        tell(f"the training had come to its end at {run.checkpoint.name}")
        trainer._load_from_checkpoint(str(run.checkpoint))
        return
    with quiet_libraries(), StopRequest() as stop:
        trainer.add_callback(Monitor(run, stop))
        trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
        step, n_steps = trainer.state.global_step, trainer.state.max_steps
        if stop.made and step < n_steps:
            raise Stopped(step, n_steps, latest_checkpoint(run.path))


def _is_finished(checkpoint: Path) -> bool:
    """Whether it is of the last step; transformers would train one more."""
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    return bool(state["global_step"] >= state["max_steps"])


class Monitor(TrainerCallback):
    """Appends each log to metrics.jsonl and moves a bar; ends the training where `stop` is made."""

    def __init__(self, run: RunFolder, stop: StopRequest) -> None:
        self.run, self.stop, self.file = run, stop, run.path / METRICS
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        state.compute_steps(args, state.max_steps)  # a resumed state has those of its first run
        if self.run.is_main:
            drop_after(self.file, state.global_step)
            self.bar = progress_bar(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()
        if self._is_asked(control):
            control.should_save = control.should_training_stop = True
        if control.should_save:  # so that no mean of a log spans a checkpoint and a resumption
            control.should_log = True

    def _is_asked(self, control: Any) -> bool:
        """Whether to stop: all processes at the same step, asked only where they wait anyway."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return self.stop.made
        if not (control.should_log or control.should_save):
            return False
        asked: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(asked, self.stop.made)
        self.stop.made = any(asked)
        return self.stop.made

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if not self.run.is_main or not logs or "train_runtime" in logs:
            return
        line = strict_json({"step": state.global_step, "epoch": state.epoch, **logs})
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(line + "\n")
        if self.bar is not None and isinstance(logs.get("loss"), float):
            self.bar.set_postfix(loss=f"{logs['loss']:.3g}")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def logs_step(trainer: Any, step: int) -> bool:
    """Whether the log after this optimizer step is written: with `logging_steps`, and with each
    checkpoint, see Monitor."""
    state = trainer.state
    every = [max(int(n), 1) for n in (state.logging_steps, state.save_steps)]
    first = step == 1 and trainer.args.logging_first_step
    return first or step == state.max_steps or any(step % n == 0 for n in every)


def means_of(trainer: Any, noted: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The mean of what was noted under each name, over all processes, in one transfer."""
    means = torch.stack([torch.stack(list(values)).float().mean() for values in noted.values()])
    means = trainer.accelerator.reduce(means, reduction="mean")
    return dict(zip(noted, means.tolist(), strict=True))


def forget_evaluation(trainer: Any) -> None:
    """To be called before a training over several processes: an evaluation marks the model as
    prepared, and the training would leave DDP away, each process with gradients of its own; under
    FSDP2 it leaves the head whole, and a checkpoint is loaded into shards."""
    if trainer.is_deepspeed_enabled:
        forget_measuring(trainer)
    elif is_sharded(trainer):
        for module in trainer.model.modules():
            if hasattr(module, "reshard"):
                module.reshard()
    elif trainer.args.world_size > 1:
        trainer.model.__dict__.pop("_is_accelerate_prepared", None)


def check_one_gpu(args: Any) -> None:
    """ValueError where transformers would spread a batch over GPUs within this process."""
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} GPUs in one process are not supported: run under"
            " `accelerate launch`, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last one cut short by a kill is left out."""
    if not file.exists():
        return []
    lines = []
    for text in file.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines


def drop_after(file: Path, step: int) -> None:
    """Leave the metrics up to `step`, so that a resumed curve equals an unbroken one."""
    if file.exists():
        kept = [strict_json(line) + "\n" for line in read_metrics(file) if line["step"] <= step]
        replace_text(file, "".join(kept))
