"""The names that can be asked for; imports nothing."""

from __future__ import annotations

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
OPTIONS = (  # of step functions
    *("base", "logprob", "top_k", "top_p", "min_tokens_to_keep", "eps", "n_mcd_steps", "seed"),
)
