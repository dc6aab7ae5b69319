"""What a DPO training is told, as a dataclass that HfArgumentParser takes too.

Names are TRL's where it has them; what is ours or the notebook's stands last.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..training.flags import flag

TRUNCATION_MODES = ("keep_end", "keep_start")
WHOLE = (
    *("max_length", "max_prompt_length", "precompute_ref_batch_size"),
    *("ref_model_sync_steps",),
)


@dataclass
class DPOArguments:
    """The loss and the pairs."""

    beta: float = flag(0.1, "how much the reference holds")
    loss_type: list[str] = flag(["sigmoid"], "one or more of sigmoid, hinge, ipo, ...")
    loss_weights: list[float] | None = flag(None, "of several losses (default: 1)", advanced=True)
    f_divergence_type: str = flag("reverse_kl", "forward_kl, js_divergence, alpha_divergence")
    f_alpha_divergence_coef: float | None = flag(None, "1 - alpha, as TRL has it", advanced=True)
    label_smoothing: float = flag(0.0, "share of pairs that are the wrong way round")
    precompute_ref_log_probs: bool = flag(False, "run the reference once, before the training")
    precompute_ref_batch_size: int | None = flag(
        None, "then (default: the training's)", advanced=True
    )
    max_length: int | None = flag(1024, "tokens of prompt and answer at most")
    truncation_mode: str = flag(
        "keep_end", "of a long prompt", choices=list(TRUNCATION_MODES), advanced=True
    )
    disable_dropout: bool = flag(True, "that of the adapter too", advanced=True)
    sync_ref_model: bool = flag(False, "move the reference after the model", advanced=True)
    ref_model_mixup_alpha: float = flag(0.6, "by this share of the way", advanced=True)
    ref_model_sync_steps: int = flag(512, "each so many steps", advanced=True)
    ld_alpha: float | None = flag(
        None, "weight of what one answer has beyond the other's length", advanced=True
    )
    use_weighting: bool = flag(False, "weight pairs by their likelihood (WPO)", advanced=True)
    discopop_tau: float = flag(0.05, "temperature of discopop", advanced=True)
    alpha: float | None = flag(None, "of alpha_divergence (with --loss_type alpha: 1)")
    max_prompt_length: int | None = flag(
        None, "tokens of a prompt whose pair is too long (default: half)"
    )
    ipo_average: bool = flag(True, "ipo on means over tokens, not sums", advanced=True)
    reference_free: bool = flag(False, "no reference: its log-probabilities are 0", advanced=True)

    def __post_init__(self) -> None:
        if isinstance(self.loss_type, str):  # as TRL's config takes it
            self.loss_type = [self.loss_type]

    @property
    def longest_prompt(self) -> int | None:
        """What a prompt is cut to where a pair is longer than `max_length`."""
        if self.max_prompt_length is None and self.max_length is not None:
            return self.max_length // 2
        return self.max_prompt_length

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of `dpo_loss` that do not change with the batch."""
        return {
            "beta": self.beta,
            "loss_type": list(self.loss_type),
            "loss_weights": self.loss_weights,
            "f_divergence": self.f_divergence_type,
            "alpha": self.alpha,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
            "label_smoothing": self.label_smoothing,
            "discopop_tau": self.discopop_tau,
        }

    def check(self, own_loss: bool = False) -> None:
        """ValueError for what no training can be made of; a model is not needed.

        Args:
            own_loss: a subclass brings its own `dpo_loss`, whose names are its own.
        """
        for name in WHOLE:
            value = getattr(self, name)
            if value is not None and type(value) is not int:
                raise ValueError(f"{name}: got {value!r}, wanted a whole number")
        self._check_lengths()
        if self.ld_alpha is not None and not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha: got {self.ld_alpha}, wanted a number from 0 to 1")
        if not 0 <= self.ref_model_mixup_alpha <= 1:
            raise ValueError(
                f"ref_model_mixup_alpha: got {self.ref_model_mixup_alpha}, wanted a number from 0"
                " to 1"
            )
        if self.ref_model_sync_steps < 1:
            raise ValueError(
                f"ref_model_sync_steps: got {self.ref_model_sync_steps}, wanted a number from 1 on"
            )
        if self.sync_ref_model:
            for name in ("precompute_ref_log_probs", "reference_free"):
                if getattr(self, name):
                    raise ValueError(f"sync_ref_model: wanted a reference that runs, not {name}")
        if self.reference_free and self.precompute_ref_log_probs:
            raise ValueError("precompute_ref_log_probs: reference_free has no reference to run")
        if not own_loss:
            from .losses import check_loss

            try:
                check_loss(**self.loss_options(), weighted=self.use_weighting)
            except ValueError as error:  # it is named otherwise there
                text = str(error).replace("f_divergence ", "f_divergence_type ", 1)
                raise ValueError(text) from None

    @classmethod
    def of(cls, args: Any) -> DPOArguments:
        """What a TrainingArguments says of these, as TRL's DPOConfig does; defaults otherwise."""
        names = [f.name for f in fields(cls) if hasattr(args, f.name)]
        if "loss_type" not in names:
            return cls()
        return cls(**{name: getattr(args, name) for name in names})

    def _check_lengths(self) -> None:
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length: got {self.max_length}, wanted a number from 2 on")
        prompt = self.max_prompt_length
        if prompt is not None and prompt < 1:
            raise ValueError(f"max_prompt_length: got {prompt}, wanted a number from 1 on")
        if prompt is not None and self.max_length is None:
            raise ValueError(
                f"max_prompt_length: got {prompt} without max_length, beyond which alone prompts"
                " are cut: give both"
            )
        if prompt is not None and self.max_length is not None and prompt >= self.max_length:
            raise ValueError(
                f"max_prompt_length: got {prompt}, wanted less than max_length, {self.max_length}:"
                " nothing would be left of the answers"
            )
        if self.truncation_mode not in TRUNCATION_MODES:
            raise ValueError(
                f"truncation_mode: got {self.truncation_mode!r}, wanted keep_end or keep_start"
            )
        size = self.precompute_ref_batch_size
        if size is not None and size < 1:
            raise ValueError(f"precompute_ref_batch_size: got {size}, wanted a number from 1 on")
