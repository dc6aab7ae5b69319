"""A stand-in."""

from __future__ import annotations

from typing import Any

NAMES = ("logit", "probability", "entropy", "crossentropy", "contrast_prob_diff", "kl_divergence")


def list_step_functions() -> list[str]:
    return list(NAMES)


def scores(
    logits: Any, target_ids: Any, names: Any, *, contrast_logits: Any = None, contrast_ids: Any = None
) -> Any:
    z = logits.materialize() if hasattr(logits, "materialize") else logits
    logp = z.log_softmax(-1)

    def at(x: Any, ids: Any) -> Any:
        return x.gather(-1, ids[..., None])[..., 0]

    out = {
        "logit": lambda: at(z, target_ids),
        "probability": lambda: at(logp, target_ids).exp(),
        "crossentropy": lambda: -at(logp, target_ids),
        "entropy": lambda: -(logp.exp() * logp).sum(-1),
        "contrast_prob_diff": lambda: at(logp, target_ids).exp() - at(logp, contrast_ids).exp(),
        "kl_divergence": lambda: (
            logp.exp() * (logp - (contrast_logits.materialize() if hasattr(contrast_logits, "materialize") else contrast_logits).log_softmax(-1))
        ).sum(-1),
    }
    return {n: out[n]() for n in names}
