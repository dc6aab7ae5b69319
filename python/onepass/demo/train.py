"""The training loop, written out; both stages of the demo go through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from .stages import Stage

Notes = dict[str, float]


def make_optimizer(stage: Stage) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        stage.parameters,
        lr=stage.learning_rate(0),
        betas=(0.9, 0.95),
        weight_decay=stage.weight_decay,
    )


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one CPU thread inside.

    On matrices this small a second thread saves a fifth of the time on an idle machine, many
    threads lose it again, and on a busy one their waiting costs a multiple. The sums also come out
    the same whatever the number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    stage: Stage,
    optimizer: torch.optim.AdamW,
    *,
    start: int,
    max_gradient_norm: float,
    after_step: Callable[[int, Notes], None],
) -> None:
    """Do the steps from `start` on; `after_step` gets the number done and what to note down."""
    for step in range(start, stage.n_steps):
        for group in optimizer.param_groups:
            group["lr"] = stage.learning_rate(step)
        loss, noted = stage.loss(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(stage.parameters, max_gradient_norm)
        optimizer.step()
        after_step(step + 1, {"loss": loss.item(), "gradient_norm": norm.item(), **noted})
