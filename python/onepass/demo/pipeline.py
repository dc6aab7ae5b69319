"""The demo from text to trained adapter: which stage follows which, what is kept on the way.

A run can be stopped after any step and, from the checkpoint it then leaves, goes on as though it
had not been: on a CPU the parameters come out bit for bit the same.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .. import lazy_head
from .. import report as report_heads
from ..cli.terminal import StopRequest, progress_bar, say
from . import checkpoint, evaluate, stages, tokens, train
from .model import language_model, original, with_adapter
from .settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel


class Stopped(Exception):
    """Ctrl-C during training; the checkpoint has been written."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, step)
        self.folder, self.step = folder, step


class Run:
    """Text, model and history of one run; `train` does both stages, or what is left of them."""

    adapted: PeftModel | None = None  # from the second stage on

    def __init__(
        self,
        settings: Settings,
        seed: int,
        device: torch.device,
        output: Path,
        resume_from: Path | None = None,
    ) -> None:
        started = time.perf_counter()
        self.settings, self.seed, self.output = settings, seed, output
        self.resume_from = resume_from
        self.text = tokens.read_text(settings, seed, device)
        self.state = checkpoint.State(settings, seed, self.text.fingerprint)
        if resume_from is not None:
            self.state = checkpoint.read_state(resume_from)
            if self.state.text != self.text.fingerprint:
                raise checkpoint.CannotResume(
                    f"{resume_from} was trained on the text of another Python: use that one"
                )
        self.base = language_model(settings, self.text.tokenizer.get_vocab_size(), seed)
        if resume_from is not None:
            checkpoint.load_weights(resume_from, self.base)
        self.base.to(device)
        # Taken here because peft renames the layers it wraps; the tensors stay the model's own.
        self.weights = self.base.state_dict()
        lazy_head(self.base)
        self._add_seconds("text", time.perf_counter() - started)
        for kind, size in self.text.sizes.items():
            say(
                f"{kind}: {size['train_tokens']:,} tokens to train on,"
                f" {size['held_out_tokens']:,} held out"
            )
        for head in report_heads(self.base).heads:
            say(f"head: {head}")

    def train(self) -> PeftModel:
        """Language model, then adapter; Stopped where Ctrl-C came in between."""
        settings, rows, seed = self.settings, self.text.train, self.seed
        with StopRequest() as stop, progress_bar(settings.n_steps, self.state.step) as bar:
            self._stop, self._bar = stop, bar
            stage = stages.language_model_stage(self.base, rows, settings, seed)
            if not self.state.curve:
                self._add_point()
            self._fit(stage, 0)
            self.adapted = with_adapter(self.base, settings, seed)
            if self.resume_from is not None and self.state.step > settings.lm_steps:
                checkpoint.load_adapter(self.resume_from, self.adapted)
            stage = stages.circuit_breaker_stage(self.adapted, rows, settings, seed)
            self._fit(stage, settings.lm_steps)
        return self.adapted

    def before_and_after(self) -> tuple[evaluate.Numbers, evaluate.Numbers]:
        """Held-out numbers of the table: adapter off, adapter on."""
        assert self.adapted is not None, "train() comes first"
        n_rows = self.settings.table_rows
        with original(self.adapted):
            before = evaluate.of_model(self.base, self.text.held_out, n_rows)
        after = evaluate.of_adapted(self.adapted, self.text.held_out, self.settings, n_rows)
        return before, after

    def _fit(self, stage: stages.Stage, first_step: int) -> None:
        """The stage's steps that are not done yet, counted from `first_step` over both stages."""
        done = self.state.step - first_step
        if done >= stage.n_steps:
            return
        optimizer = train.make_optimizer(stage)
        if done > 0 and self.resume_from is not None:
            checkpoint.load_optimizer(self.resume_from, optimizer)
        every = -(-stage.n_steps // self.settings.curve_points)
        said = time.perf_counter()
        say(f"{stage.name}: {stage.n_steps - done} steps")
        self._bar.set_description(stage.name)

        def after_step(done: int, notes: train.Notes) -> None:
            nonlocal said
            self.state.step = first_step + done
            self.state.notes.append({"step": self.state.step, **notes})
            self._bar.set_postfix(loss=f"{notes['loss']:.2f}", refresh=False)
            self._bar.update()
            due = done % every == 0 or done == stage.n_steps
            if due:
                self._add_point()
            if due or self._stop.made:
                now = time.perf_counter()
                self._add_seconds(stage.name, now - said)
                said = now
                folder = self._save(optimizer)
                if self._stop.made:
                    raise Stopped(folder, self.state.step)

        train.fit(
            stage,
            optimizer,
            start=done,
            max_gradient_norm=self.settings.max_gradient_norm,
            after_step=after_step,
        )

    def _add_point(self) -> None:
        """Held-out numbers at this step, for the curves."""
        if self.adapted is None:
            numbers = evaluate.of_model(self.base, self.text.held_out, self.settings.curve_rows)
        else:
            numbers = evaluate.of_adapted(
                self.adapted, self.text.held_out, self.settings, self.settings.curve_rows
            )
        self.state.curve.append({"step": self.state.step, **numbers})

    def _save(self, optimizer: torch.optim.Optimizer) -> Path:
        return checkpoint.save(
            self.output,
            self.state,
            tokenizer=self.text.tokenizer,
            model=self.base,
            weights=self.weights,
            adapted=self.adapted,
            optimizer=optimizer,
        )

    def _add_seconds(self, name: str, seconds: float) -> None:
        self.state.seconds[name] = self.state.seconds.get(name, 0.0) + seconds
