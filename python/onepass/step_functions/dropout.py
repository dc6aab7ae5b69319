"""Monte Carlo dropout: a model's answers with its dropout on, and everything as it was after."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..training.hidden_states import same_draws, training_mode
from .ranges import check_range


def check_dropout(model: nn.Module, n_mcd_steps: object, eps: float) -> None:
    """Raises unless there are two runs or more, and something in the model drops."""
    check_range("eps", eps)
    check_range("n_mcd_steps", n_mcd_steps)
    if not any(map(_drops, model.modules())):
        raise ValueError(
            f"no dropout in {type(model).__name__}: Monte Carlo dropout needs layers with a "
            "probability above 0 (set them in the model's config)"
        )


def _drops(module: nn.Module) -> bool:
    """Whether it is a dropout, or has a rate for torch.nn.functional.dropout."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    named = ((name, value) for name, value in vars(module).items() if "drop" in name)
    return any(isinstance(value, float) and value > 0 for _, value in named)


def noisy_runs(
    model: nn.Module, run: Callable[[], Tensor], n_mcd_steps: int, seed: int | None, grad: bool
) -> Tensor:
    """[n, ...] of what `run` gives while the model trains. Modes and random states are as before
    after; the draws begin at `seed`, or where the random state is."""
    with training_mode(model, True), same_draws(model), torch.set_grad_enabled(grad):
        with _seeded(model, seed):
            return torch.stack([run() for _ in range(n_mcd_steps)])


@contextlib.contextmanager
def _seeded(model: nn.Module, seed: int | None) -> Iterator[None]:
    if seed is not None:
        torch.default_generator.manual_seed(seed)
        for device in {p.device for p in model.parameters() if p.device.type == "cuda"}:
            generators: Any = torch.cuda.default_generators
            generators[device.index].manual_seed(seed)
    yield
