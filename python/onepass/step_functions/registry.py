"""Step functions by name, with inseq's functions to look them up and to add to them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from inspect import signature
from typing import Any

from torch import Tensor

from . import functions
from .args import StepFunction
from .core import SCORES

# logit: logit_fn, probability: probability_fn, ...
STEP_SCORES_MAP: dict[str, StepFunction] = {
    name: getattr(functions, f"{name}_fn") for name in SCORES
}
# how scores of the tokens of a span become one, as inseq has it
AGGREGATE_MAP: dict[str, dict[str, str]] = {
    "spans": {
        "probability": "prod",
        "entropy": "sum",
        "crossentropy": "sum",
        "perplexity": "prod",
        "contrast_prob": "prod",
        "contrast_prob_diff": "prod",
        "pcxmi": "sum",
        "kl_divergence": "sum",
        "mc_dropout_prob_avg": "prod",
    }
}
logger = logging.getLogger("onepass")


def check_is_step_function(identifier: str) -> None:
    """AttributeError, with the known ones, for a name that is no step function's."""
    if identifier not in STEP_SCORES_MAP:
        raise AttributeError(
            f"no step function {identifier!r}: the known ones are {', '.join(STEP_SCORES_MAP)} "
            "(register_step_function adds one)"
        )


def get_step_function(score_identifier: str) -> StepFunction:
    """The step function of that name; AttributeError where there is none."""
    check_is_step_function(score_identifier)
    return STEP_SCORES_MAP[score_identifier]


def get_step_scores(
    score_identifier: str, step_fn_args: Any, step_fn_extra_args: Mapping[str, Any] | None = None
) -> Tensor:
    """The scores [B] of a step by the function of that name, with arguments of its own."""
    return get_step_function(score_identifier)(step_fn_args, **(step_fn_extra_args or {}))


def list_step_functions() -> list[str]:
    """The names of all step functions."""
    return list(STEP_SCORES_MAP)


def register_step_function(
    fn: StepFunction,
    identifier: str,
    aggregate_map: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> None:
    """Add a step function.

    Args:
        fn: called with `StepFunctionArgs` and its own keyword arguments; gives [B].
        identifier: its name.
        aggregate_map: by aggregator ("spans"), how scores of several tokens become one.
        overwrite: put it in the place of another of that name.

    Raises:
        ValueError: the name is taken. TypeError: not a function, or not a name.
    """
    if not callable(fn):
        raise TypeError(f"fn must be callable: got {type(fn).__name__}")
    if not isinstance(identifier, str):
        raise TypeError(f"identifier must be a string: got {identifier!r}")
    if identifier in STEP_SCORES_MAP:
        if not overwrite:
            raise ValueError(f"{identifier!r} is a step function: overwrite=True replaces it")
        logger.warning("step function %s is replaced", identifier)
    STEP_SCORES_MAP[identifier] = fn
    for aggregator, how in (aggregate_map or {}).items():
        AGGREGATE_MAP.setdefault(aggregator, {})[identifier] = how


def is_contrastive_step_function(step_fn_id: str) -> bool:
    """Whether it takes `contrast_targets`."""
    return "contrast_targets" in signature(get_step_function(step_fn_id)).parameters
