"""inseq 0.7.1's step functions, by its names and arguments: scores [B] of the token that follows.

crossentropy is in nats and perplexity 2 to its power, which is not 1 / p: so inseq has it since
0.5, and so it is here; `scores` and the functions of `legacy` have perplexity 1 / p.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .args import StepFunctionArgs
from .contrast import Alignments, contrast_of, run_again
from .core import SCORES, Options, counted, kl_rows, scores
from .dropout import check_dropout, noisy_runs
from .filters import check_filter
from .last_row import last_facts, last_logits, last_pair, last_targets

CURRENT = Options(base="e", power="2")


def of_row(name: str, forward_output: Any, target_ids: Tensor, options: Options) -> Tensor:
    """A score of the last position's own row, 0 of a target of -100."""
    score = SCORES[name]
    found = score.of(last_facts(forward_output, target_ids, score.needs), options)
    return counted(found, last_targets(target_ids, found))


def _of_step(name: str, args: StepFunctionArgs, options: Options = CURRENT) -> Tensor:
    return of_row(name, args.forward_output, args.target_ids, options)


def logit_fn(args: StepFunctionArgs) -> Tensor:
    """z_t, the target's logit."""
    return _of_step("logit", args)


def probability_fn(args: StepFunctionArgs, logprob: bool = False) -> Tensor:
    """p_t, the target's probability, or its logarithm."""
    return _of_step("probability", args, Options(logprob))


def entropy_fn(args: StepFunctionArgs) -> Tensor:
    """-sum_v p_v log p_v of the next token, in nats."""
    return _of_step("entropy", args)


def crossentropy_fn(args: StepFunctionArgs) -> Tensor:
    """-log p_t, in nats."""
    return _of_step("crossentropy", args)


def perplexity_fn(args: StepFunctionArgs) -> Tensor:
    """2 to the power of the cross-entropy in nats, p_t ** -log(2)."""
    return _of_step("perplexity", args)


def _of_contrast(name: str, args: StepFunctionArgs, options: Options, *given: Any) -> Tensor:
    contrast = contrast_of(args, *given)
    rows = last_logits(args.forward_output)
    target = last_targets(args.target_ids, rows)
    if contrast.output is args.forward_output:
        ids, logprob = last_targets(contrast.target_ids, rows), options.logprob
        return scores(rows, target, [name], contrast_ids=ids, logprob=logprob)[name]
    facts = last_pair(
        name, args.forward_output, args.target_ids, contrast.output, contrast.target_ids
    )
    return counted(SCORES[name].of(facts, options), target)


def contrast_logits_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """The logit of the contrast's token in the contrast's context.

    Args of this and the other contrasts:
        contrast_sources: another source of an encoder-decoder model: texts, an encoding of inseq,
            or ids [B, T].
        contrast_targets: another text, the same way, whose beginning is as long as the prefix;
            its next token is the contrast's. Without it, that is the target.
        contrast_targets_alignments: pairs of a position of the text and one of the contrast.
        contrast_force_inputs: use the contrast's context where the score is differentiated, too:
            without it, only another token of the step's own row is compared then.
        skip_special_tokens: encode without them.

    Raises:
        ValueError: another batch size, a source for a decoder-only model, no model to run.
        IndexError: a contrastive text that ends before the step.
    """
    return _of_contrast(
        *("contrast_logits", args, Options()),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def contrast_prob_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    logprob: bool = False,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """The probability of the contrast's token in the contrast's context, or its log; arguments
    as of `contrast_logits_fn`.
    """
    return _of_contrast(
        *("contrast_prob", args, Options(logprob)),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def contrast_logits_diff_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """The target's logit less the contrast's; arguments as of `contrast_logits_fn`.

    Source: Yin and Neubig 2202.10419.
    """
    return _of_contrast(
        *("contrast_logits_diff", args, Options()),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def contrast_prob_diff_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    logprob: bool = False,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """The target's probability less the contrast's, or of their logarithms; arguments as of
    `contrast_logits_fn`.

    Source: Yin and Neubig 2202.10419.
    """
    return _of_contrast(
        *("contrast_prob_diff", args, Options(logprob)),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def pcxmi_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """log2 of the contrast's probability over the target's; arguments as of `contrast_logits_fn`.

    Source: Yin et al. 2109.07446.
    """
    return _of_contrast(
        *("pcxmi", args, Options()),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def in_context_pvi_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """`pcxmi_fn` in nats; arguments as of `contrast_logits_fn`.

    Source: Lu et al. 2310.12300.
    """
    return _of_contrast(
        *("in_context_pvi", args, Options()),
        *(contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )


def kl_divergence_fn(
    args: StepFunctionArgs,
    contrast_sources: Any = None,
    contrast_targets: Any = None,
    contrast_targets_alignments: Alignments = None,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens_to_keep: int = 1,
    contrast_force_inputs: bool = False,
    skip_special_tokens: bool = False,
) -> Tensor:
    """KL(step || contrast) of the next token, in nats; arguments as of `contrast_logits_fn`, the
    filter's as of `scores`.

    Raises:
        RuntimeError: to be differentiated without `contrast_force_inputs`. ValueError: a filter's
        numbers out of range.
    """
    if args.is_attributed_fn and not contrast_force_inputs:
        raise RuntimeError(
            "kl_divergence compares two contexts, and gradients do not pass through the contrast's:"
            " pass contrast_force_inputs=True to attribute it all the same"
        )
    rows = last_logits(args.forward_output)
    filters = (top_k, top_p, min_tokens_to_keep)
    check_filter(*filters, rows.shape[-1])
    contrast = contrast_of(
        *(args, contrast_sources, contrast_targets, contrast_targets_alignments),
        *(contrast_force_inputs, skip_special_tokens),
    )
    others = last_logits(contrast.output).to(rows.device)
    found = kl_rows(rows, others, *filters, None, "auto")
    return counted(found, last_targets(args.target_ids, found))


def mc_dropout_prob_avg_fn(
    args: StepFunctionArgs,
    n_mcd_steps: int = 5,
    logprob: bool = False,
    eps: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """How many standard deviations p_t lies above the mean of `n_mcd_steps` runs with dropout.

    Args:
        n_mcd_steps: runs, 2 or more.
        logprob: of log p_t instead.
        eps: added to the deviation; at 0, a deviation of 0 gives inf or NaN.
        seed: of the dropout (default: from where torch's random state is).

    The model's modes and torch's random states are as they were after, so that a second call with
    the same inputs gives the same. Gradients pass through the noisy runs where the score is to be
    differentiated.

    Raises:
        ValueError: n_mcd_steps below 2, a model without dropout, no model to run.
    """
    model = args.attribution_model
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"mc_dropout_prob_avg runs the model again: attribution_model is {type(model).__name__}"
        )
    check_dropout(model, n_mcd_steps, eps)
    own = last_facts(args.forward_output, args.target_ids, ["logp"])

    def run() -> Tensor:
        logp: Tensor = last_facts(run_again(args), args.target_ids, ["logp"]).logp
        return logp.to(own.logp.device)

    grad = args.is_attributed_fn and torch.is_grad_enabled()
    noisy = noisy_runs(model, run, n_mcd_steps, seed, grad)
    facts = own._replace(noisy=noisy)
    found = SCORES["mc_dropout_prob_avg"].of(facts, Options(logprob, eps=eps))
    return counted(found, last_targets(args.target_ids, found))


def top_p_size_fn(args: StepFunctionArgs, top_p: float) -> Tensor:
    """How many of the likeliest tokens have probability `top_p` together, int64 [B].

    inseq counts those of all rows together; a batch of one is the same.

    Raises:
        ValueError: top_p outside [0, 1].
    """
    rows = last_logits(args.forward_output)
    target = last_targets(args.target_ids, rows)
    return scores(rows, target, ["top_p_size"], top_p=top_p)["top_p_size"]
