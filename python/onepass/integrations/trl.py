"""TRL's fused language-model head, replaced by ours while `enable()` holds.

From release 1.16 on, TRL's trainers take log-probabilities from hidden states by themselves and
never call `lm_head.forward`: what they call instead is one autograd function under a private name.
`enable()` puts ours there, `disable()` puts theirs back.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module, metadata
from typing import Any

from torch import Tensor

from ..head_loss import lazy_product
from ..ops.vocab_stats import vocab_stats

LEAST = (1, 16)
HOME, NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
ARGUMENTS = (
    "hidden",
    "weight",
    "bias",
    "targets",
    "temperature",
    "chunk_size",
    "final_logit_softcapping",
    "logit_scale",
    "outputs",
)
EXTRAS = {
    "entropy": "entropy",
    "log_sum_sq_probs": "sum_sq_probs",
    "mean_logits": "logit_sum",
    "is_top1": "argmax",
}  # TRL's name: ours

_theirs: Any = None  # what stood under NAME before enable()


class HeadLogProbs:
    """What `enable()` puts in the place of TRL's ChunkedLogProbFunction."""

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: Sequence[str] = tuple(EXTRAS),
    ) -> tuple[Tensor | None, ...]:
        """(log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1) of `targets`, [N] each, None
        for what `outputs` does not name; float32 (float64 for float64), is_top1 bool.

        Args:
            hidden: [N, D]. weight: [V, D]. bias: [V]. targets: [N] token ids. Weight and bias are
                cast to the dtype of hidden, all three to autocast's where that is on.
            temperature: divides the logits, after the cap.
            chunk_size: columns of TRL's tiles; ours are rows, so that it has no say.
            final_logit_softcapping: cap of the logits, or None. logit_scale: multiplies them
                before it.
            outputs: TRL's names of what is wanted beside log_probs.

        log_probs and entropy are differentiable, as in TRL.
        """
        if hasattr(weight, "ds_id"):
            # ZeRO-3 gathers the weight for this call alone, and for a backward that asks for it.
            warnings.warn(
                "the head is sharded by DeepSpeed ZeRO-3, which onepass does not serve: TRL's own "
                "fused head computes it",
                stacklevel=2,
            )
            given = (hidden, weight, bias, targets, temperature, chunk_size)
            out: tuple[Tensor | None, ...] = _theirs.apply(
                *given, final_logit_softcapping, logit_scale, outputs
            )
            return out
        dtype = hidden.dtype
        logits = lazy_product(
            hidden,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            ("hidden", "weight", "bias"),
            softcap=final_logit_softcapping,
            scale=logit_scale,
            temperature=temperature,
        )
        extras = [ours for theirs, ours in EXTRAS.items() if theirs in outputs]
        # Entropy is differentiated by few losses: they pay for it, the others do not.
        stats = vocab_stats(logits, targets, want=("logp", *extras), gradient_of=("logp",))

        def told(theirs: str) -> Tensor | None:
            return getattr(stats, EXTRAS[theirs]) if theirs in outputs else None

        squares, total, best = told("log_sum_sq_probs"), told("mean_logits"), told("is_top1")
        return (
            stats.logp,
            told("entropy"),
            None if squares is None else squares.detach(),
            None if total is None else total.detach() / weight.shape[0],
            None if best is None else best == targets,
        )


def enable() -> None:
    """Puts onepass's head under every TRL trainer that uses `add_fused_lm_head`, for models that
    already have one too; a second call changes nothing.

    Served: SFTTrainer (loss types nll and dft), DPOTrainer (all loss types and f-divergences),
    KTOTrainer, GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer. Not served, since they call other
    functions of TRL: DistillationTrainer (ChunkedDivergenceFunction) and what reads whole logits
    (`compute_loss_func`, label smoothing, RewardTrainer). A head that is sharded by DeepSpeed
    ZeRO-3 stays with TRL's function, with a warning.

    The gradient of a weight that is cast for the product (float32 under bfloat16 autocast) is
    summed in float32 and rounded once to the product's dtype, as by torch's own autocast; TRL's is
    not rounded.

    Raises:
        ImportError: TRL is missing or older than 1.16. RuntimeError: this TRL has moved the
        function that is replaced, or changed its arguments. Nothing is changed then.
    """
    global _theirs
    home, version = _home()
    current = getattr(home, NAME, None)
    if current is HeadLogProbs:
        return
    forward = getattr(current, "forward", None)
    came = () if forward is None else tuple(inspect.signature(forward).parameters)[1:]
    if came != ARGUMENTS:
        moved = "is not there" if current is None else f"takes ({', '.join(came)})"
        raise RuntimeError(
            f"{HOME}.{NAME}, which onepass.integrations.trl replaces, {moved} in trl {version}: "
            "nothing was changed; use trl 1.16"
        )
    _theirs = current
    setattr(home, NAME, HeadLogProbs)


def disable() -> None:
    """Puts TRL's own function back, the same object; changes nothing where ours is not there."""
    home = sys.modules.get(HOME)
    if home is not None and getattr(home, NAME, None) is HeadLogProbs:
        setattr(home, NAME, _theirs)


@contextlib.contextmanager
def enabled() -> Iterator[None]:
    """`enable()` within, and after it what was there before."""
    home = sys.modules.get(HOME)
    before = getattr(home, NAME, None) is HeadLogProbs
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


def _home() -> tuple[Any, str]:
    """TRL's module that holds the name, and TRL's version."""
    wanted = ".".join(str(part) for part in LEAST)
    mend = f"pip install 'trl>={wanted}'"
    try:
        version = metadata.version("trl")
    except metadata.PackageNotFoundError:
        raise ImportError(
            f"onepass.integrations.trl needs trl {wanted} or newer: none found; {mend}"
        ) from None
    parts = version.split(".")[:2]
    if tuple(int(part) for part in parts if part.isdigit()) < LEAST:
        raise ImportError(
            f"onepass.integrations.trl needs trl {wanted} or newer: found {version}; {mend}"
        )
    return import_module(HOME), version
