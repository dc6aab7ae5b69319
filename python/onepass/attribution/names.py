"""The names and options that can be asked for; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..step_functions.ranges import check_range

PROGRAM, SCHEMA = "onepass attribute", 1  # of JSON
METHODS = ("saliency", "input_x_gradient", "integrated_gradients")
REDUCTIONS = ("l2", "sum")
BASELINES = ("zeros", "pad")
CONTRASTIVE = (
    *("contrast_logits", "contrast_prob", "contrast_logits_diff", "contrast_prob_diff"),
    *("pcxmi", "in_context_pvi", "kl_divergence"),
)
STEP_FUNCTIONS = (  # of onepass.step_functions, which loads torch
    *("logit", "probability", "entropy", "crossentropy", "perplexity"),
    *CONTRASTIVE,
    *("mc_dropout_prob_avg", "top_p_size"),
)
READ = {  # which of them read an option
    "base": ("crossentropy",),
    "logprob": ("probability", "contrast_prob", "contrast_prob_diff", "mc_dropout_prob_avg"),
    "top_k": ("kl_divergence",),
    "top_p": ("kl_divergence", "top_p_size"),
    "min_tokens_to_keep": ("kl_divergence",),
    "eps": ("mc_dropout_prob_avg",),
    "n_mcd_steps": ("mc_dropout_prob_avg",),
    "seed": ("mc_dropout_prob_avg",),
}
OPTIONS = tuple(READ)


def check_options(options: Mapping[str, Any], scores: Sequence[Any]) -> None:
    """Raises unless each option has a value that it can have and one of the `scores` reads it.

    Raises:
        TypeError: of another type. ValueError: no such option, no such value, read by none.
    """
    for name, value in options.items():
        if name not in READ:
            raise ValueError(f"options must be one of {', '.join(OPTIONS)}: got {name!r}")
        if name == "base" and value not in ("e", "2"):
            raise ValueError(f"base must be one of e, 2: got {value!r}")
        if name == "logprob" and not isinstance(value, bool):
            raise TypeError(f"logprob must be True or False: got {value!r}")
        if name != "seed" or value is not None:
            check_range(name, value)
        if not set(READ[name]) & {score for score in scores if isinstance(score, str)}:
            readers = " or ".join(READ[name])
            raise ValueError(f"{name} is read by {readers}, of which none is asked for")
