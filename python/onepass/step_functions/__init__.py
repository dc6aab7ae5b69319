"""Scores of next tokens: probability, entropy, contrasts, ..., by the names that inseq gave them.

`scores` is their definition, over rows of logits; `*_fn` are inseq's step functions made of it, and
`step_scores` scores a whole text in one forward. Names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AGGREGATE_MAP": ".registry",
    "STEP_SCORES_MAP": ".registry",
    "StepFunction": ".args",
    "StepFunctionArgs": ".args",
    "StepFunctionBaseArgs": ".args",
    "StepFunctionDecoderOnlyArgs": ".args",
    "StepFunctionEncoderDecoderArgs": ".args",
    "check_is_step_function": ".registry",
    "contrast_logits_diff_fn": ".functions",
    "contrast_logits_fn": ".functions",
    "contrast_prob_diff_fn": ".functions",
    "contrast_prob_fn": ".functions",
    "crossentropy_fn": ".functions",
    "entropy_fn": ".functions",
    "get_step_function": ".registry",
    "get_step_scores": ".registry",
    "in_context_pvi_fn": ".functions",
    "is_contrastive_step_function": ".registry",
    "kl_divergence_fn": ".functions",
    "last_logits": ".last_row",
    "list_step_functions": ".registry",
    "logit_fn": ".functions",
    "mc_dropout_prob_avg_fn": ".functions",
    "pcxmi_fn": ".functions",
    "perplexity_fn": ".functions",
    "probability_fn": ".functions",
    "register_step_function": ".registry",
    "scores": ".core",
    "step_scores": ".text",
    "top_p_size_fn": ".functions",
}
__all__ = [
    "AGGREGATE_MAP",
    "STEP_SCORES_MAP",
    "StepFunction",
    "StepFunctionArgs",
    "StepFunctionBaseArgs",
    "StepFunctionDecoderOnlyArgs",
    "StepFunctionEncoderDecoderArgs",
    "check_is_step_function",
    "contrast_logits_diff_fn",
    "contrast_logits_fn",
    "contrast_prob_diff_fn",
    "contrast_prob_fn",
    "crossentropy_fn",
    "entropy_fn",
    "get_step_function",
    "get_step_scores",
    "in_context_pvi_fn",
    "is_contrastive_step_function",
    "kl_divergence_fn",
    "last_logits",
    "list_step_functions",
    "logit_fn",
    "mc_dropout_prob_avg_fn",
    "pcxmi_fn",
    "perplexity_fn",
    "probability_fn",
    "register_step_function",
    "scores",
    "step_scores",
    "top_p_size_fn",
]

if TYPE_CHECKING:
    from .args import (
        StepFunction,
        StepFunctionArgs,
        StepFunctionBaseArgs,
        StepFunctionDecoderOnlyArgs,
        StepFunctionEncoderDecoderArgs,
    )
    from .core import scores
    from .functions import (
        contrast_logits_diff_fn,
        contrast_logits_fn,
        contrast_prob_diff_fn,
        contrast_prob_fn,
        crossentropy_fn,
        entropy_fn,
        in_context_pvi_fn,
        kl_divergence_fn,
        logit_fn,
        mc_dropout_prob_avg_fn,
        pcxmi_fn,
        perplexity_fn,
        probability_fn,
        top_p_size_fn,
    )
    from .last_row import last_logits
    from .registry import (
        AGGREGATE_MAP,
        STEP_SCORES_MAP,
        check_is_step_function,
        get_step_function,
        get_step_scores,
        is_contrastive_step_function,
        list_step_functions,
        register_step_function,
    )
    from .text import step_scores


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'onepass.step_functions' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
