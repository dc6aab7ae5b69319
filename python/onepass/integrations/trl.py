"""TRL's fused language-model head, and on request DPO's losses, replaced by ours while `enable()`
holds.

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
from importlib import import_module
from typing import Any

from torch import Tensor

from ..dpo.logps import ld_weights, wpo_weights
from ..dpo.losses import dpo_loss
from ..head_loss import lazy_product
from ..ops.vocab_stats import vocab_stats
from ._installed import installed_version

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

DPO_HOME, DPO_NAME = "trl.trainer.dpo_trainer", "_compute_loss"
DPO_ARGUMENTS = ("self", "model", "inputs", "return_outputs")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # where TRL takes label_smoothing

_theirs: Any = None  # what stood under NAME before enable()
_their_loss: Any = None  # and DPOTrainer's _compute_loss before enable(losses=True)


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


def dpo_compute_loss(self: Any, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
    """What `enable(losses=True)` puts in the place of DPOTrainer._compute_loss: forwards and
    metrics stay TRL's, the loss is `dpo_loss` of the same log-probabilities."""
    told: list[Any] = []  # the policy's, and then the reference's where it runs

    def note(module: Any, args: Any, output: Any) -> None:
        if getattr(output, "log_probs", None) is not None:
            told.append(output)

    models = [m for m in (self.model, self.ref_model) if m is not None]
    hooks = [m.register_forward_hook(note) for m in models]
    options = (self.loss_types, self.loss_weights, self.f_divergence_type)
    try:
        # A loss that TRL knows: it is not used, and costs what [B] numbers cost.
        self.loss_types, self.loss_weights, self.f_divergence_type = (
            ["sigmoid"],
            [1.0],
            "reverse_kl",
        )
        result = _their_loss(self, model, inputs, return_outputs)
    finally:
        self.loss_types, self.loss_weights, self.f_divergence_type = options
        for hook in hooks:
            hook.remove()
    if len(told) != (1 if self.precompute_ref_logps else 2):
        raise RuntimeError(
            f"DPOTrainer's models gave log-probabilities {len(told)} times in one loss, not once "
            "each, so that it is not known whose they are: enable() without losses=True"
        )
    mask = inputs["completion_mask"]
    counts = mask[:, 1:]
    weights = counts
    if self.ld_alpha is not None:
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        weights = counts * ld_weights(labels, self.ld_alpha)[:, 1:]
    # Prompt-learning adapters put virtual tokens before the real ones.
    tokens = [out.log_probs[:, -counts.shape[1] :] for out in told]
    chosen, rejected = (tokens[0] * weights).sum(1).chunk(2)
    if self.precompute_ref_logps:
        reference = (inputs["ref_chosen_logps"], inputs["ref_rejected_logps"])
    else:
        reference = (tokens[1] * weights).sum(1).chunk(2)
    lengths = counts.sum(1)
    all_lengths = mask.sum(1).chunk(2)  # as TRL divides, a first token that nothing predicts too
    pair_weights = None
    if self.use_weighting:
        squares = told[0].log_sum_sq_probs[:, -counts.shape[1] :]
        pair_weights = wpo_weights(((tokens[0] - squares) * counts).sum(1), lengths)
    nll = -(tokens[0] * counts).chunk(2)[0].sum() / lengths.chunk(2)[0].sum().clamp(min=1)
    loss: Any = 0.0
    for loss_type, factor in zip(self.loss_types, self.loss_weights, strict=True):
        losses, *_ = dpo_loss(
            chosen,
            rejected,
            *reference,
            beta=self.beta,
            loss_type=loss_type,
            f_divergence=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            label_smoothing=self.label_smoothing if loss_type in SMOOTHED else 0.0,
            ipo_average=True,
            chosen_lengths=all_lengths[0],
            rejected_lengths=all_lengths[1],
            chosen_nll=nll,
            weights=pair_weights,
            discopop_tau=self.args.discopop_tau,
        )
        loss = loss + factor * losses.mean()
    if self.aux_loss_enabled:
        loss = loss + self.router_aux_loss_coef * told[0].aux_loss
    return (loss, result[1]) if return_outputs else loss


def enable(*, losses: bool = False) -> None:
    """Puts onepass's head under every TRL trainer that uses `add_fused_lm_head`, for models that
    already have one too; a second call changes nothing but what it adds.

    Served: SFTTrainer (loss types nll and dft), DPOTrainer (all loss types and f-divergences),
    KTOTrainer, GRPOTrainer, RLOOTrainer and AsyncGRPOTrainer. Not served, since they call other
    functions of TRL: DistillationTrainer (ChunkedDivergenceFunction) and what reads whole logits
    (`compute_loss_func`, label smoothing, RewardTrainer). A head that is sharded by DeepSpeed
    ZeRO-3 stays with TRL's function, with a warning.

    The gradient of a weight that is cast for the product (float32 under bfloat16 autocast) is
    summed in float32 and rounded once to the product's dtype, as by torch's own autocast; TRL's is
    not rounded.

    Args:
        losses: DPOTrainer's losses, too, come from `onepass.dpo.dpo_loss`: the same numbers for
            TRL's loss types, finite where its forward KL overflows, and loss types that it has not
            (`DPOConfig(loss_type=["slic_hf"])`, the notebook's JSD, FKL, RKL and alpha, whose
            coefficient is 1 - f_alpha_divergence_coef). Trainers and subclasses that are there
            already get them as well, but for one that has its own `_compute_loss`.

    Raises:
        ImportError: TRL is missing or older than 1.16. RuntimeError: this TRL has moved the
        function that is replaced, or changed its arguments. Nothing is changed then.
    """
    global _theirs, _their_loss
    home, version = _home()
    current = getattr(home, NAME, None)
    if current is not HeadLogProbs:
        forward = getattr(current, "forward", None)
        came = () if forward is None else tuple(inspect.signature(forward).parameters)[1:]
        _check_arguments(f"{HOME}.{NAME}", current, came, ARGUMENTS, version)
    if losses:
        trainer = getattr(import_module(DPO_HOME), "DPOTrainer", None)
        method = getattr(trainer, DPO_NAME, None)
        if method is not dpo_compute_loss:
            came = () if method is None else tuple(inspect.signature(method).parameters)
            named = f"{DPO_HOME}.DPOTrainer.{DPO_NAME}"
            _check_arguments(named, method, came, DPO_ARGUMENTS, version)
            _their_loss = method
            setattr(trainer, DPO_NAME, dpo_compute_loss)
    if current is not HeadLogProbs:
        _theirs = current
        setattr(home, NAME, HeadLogProbs)


def disable() -> None:
    """Puts TRL's own functions back, the same objects; changes nothing where ours are not there."""
    home = sys.modules.get(HOME)
    if home is not None and getattr(home, NAME, None) is HeadLogProbs:
        setattr(home, NAME, _theirs)
    _disable_losses()


def _disable_losses() -> None:
    if _losses_enabled():
        setattr(sys.modules[DPO_HOME].DPOTrainer, DPO_NAME, _their_loss)


def _losses_enabled() -> bool:
    trainer = getattr(sys.modules.get(DPO_HOME), "DPOTrainer", None)
    return getattr(trainer, DPO_NAME, None) is dpo_compute_loss


@contextlib.contextmanager
def enabled(*, losses: bool = False) -> Iterator[None]:
    """`enable()` within, and after it what was there before."""
    home = sys.modules.get(HOME)
    before = getattr(home, NAME, None) is HeadLogProbs
    losses_before = _losses_enabled()
    enable(losses=losses)
    try:
        yield
    finally:
        if not losses_before:
            _disable_losses()
        if not before:
            disable()


def _check_arguments(
    name: str, value: object, came: tuple[str, ...], wanted: tuple[str, ...], version: str
) -> None:
    """RuntimeError unless what is to be replaced is there and takes the arguments of ours."""
    if came != wanted:
        moved = "is not there" if value is None else f"takes ({', '.join(came)})"
        raise RuntimeError(
            f"{name}, which onepass.integrations.trl replaces, {moved} in trl {version}: "
            "nothing was changed; use trl 1.16"
        )


def _home() -> tuple[Any, str]:
    """TRL's module that holds the name, and TRL's version."""
    version = installed_version("trl", LEAST)
    return import_module(HOME), version
