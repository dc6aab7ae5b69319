"""Functions that were registered, or are a user's own, over rows of logits: each row as a step."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from ..lazy_logits import MaterializedWarning
from . import functions
from .args import StepFunctionDecoderOnlyArgs
from .core import SCORES
from .registry import get_step_function

RowFunction = Callable[[Tensor, Tensor], Tensor]  # of logits [N, V] and tokens [N], [N]


def is_own(name: str) -> bool:
    """Whether it is a step function of this package that nobody has replaced."""
    return name in SCORES and get_step_function(name) is getattr(functions, f"{name}_fn")


def row_function(model: object, name: str) -> RowFunction:
    """The step function of that name, called with a forward_output and target_ids alone."""

    def function(rows: Tensor, ids: Tensor) -> Tensor:
        from transformers.modeling_outputs import CausalLMOutput

        output, differentiated = CausalLMOutput(logits=rows[:, None]), torch.is_grad_enabled()
        args = StepFunctionDecoderOnlyArgs(model, output, ids, is_attributed_fn=differentiated)
        return get_step_function(name)(args)

    return function


def score_of_rows(function: RowFunction, name: str, rows: Tensor, ids: Tensor) -> Tensor:
    """Its scores [N]. It may make the logits of these rows, without a warning.

    Raises:
        ValueError: it gives something else.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MaterializedWarning)
        found = function(rows, ids)
    if not isinstance(found, Tensor) or found.shape != ids.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{name} must give a score a row, [{len(ids)}]: got {got}")
    return found
