"""What a jigsaw training is told, as a dataclass that HfArgumentParser takes too.

Names are those of `jigsaw_sgt_loss_factory` where it has them; what is ours stands last.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..training.flags import flag

ESTIMATORS = ("mlp", "transformer")  # as cloak.py has them, which needs torch
CAP_FORMS, CAP_SCOPES = ("sigmoid", "zero_at_zero"), ("mean", "token")
CE_WEIGHTS = (
    "jigsaw_ce_performance_loss_weight",
    "jigsaw_ce_protection_loss_weight",
    "jigsaw_clean_embeddings_guardrails_loss_weight",
)
L2_WEIGHTS = ("jigsaw_l2_performance_loss_weight", "jigsaw_l2_protection_loss_weight")


@dataclass
class JigsawArguments:
    """The loss and the transform."""

    absolute_cosine_similarity_penalty_weight: float = flag(4.0, "of |cos| to the embeddings")
    jigsaw_ce_performance_loss_weight: float = flag(2.5, "student on transformed text")
    jigsaw_ce_protection_loss_weight: float = flag(1.0, "teacher on transformed text")
    jigsaw_clean_embeddings_guardrails_loss_weight: float = flag(2.0, "student on clean text")
    jigsaw_ce_protection_max_loss: float | None = flag(4.0, "cap of protection, guardrails")
    jigsaw_ce_protection_loss_scaling_factor: float = flag(
        1.0, "of the cross-entropy in the cap's sigmoid", advanced=True
    )
    median_norm_penalty_weight: float = flag(
        0.1, "of the distance of norms from the vocabulary's median", advanced=True
    )
    mutual_information_loss_weight: float = flag(
        0.0001, "of the mutual information's estimate", advanced=True
    )
    distillation_layer_index: int | None = flag(
        None, "block whose outputs the two l2 losses compare", advanced=True
    )
    jigsaw_l2_performance_loss_weight: float = flag(
        0.0, "student on transformed text, at that block", advanced=True
    )
    jigsaw_l2_protection_loss_weight: float = flag(
        0.0, "teacher on transformed text, at that block", advanced=True
    )
    combine_noise_masks_for_mutual_information_sub_batches: bool = flag(
        True, "only features transformed in both halves", advanced=True
    )
    cap_guardrails: bool = flag(True, "cap guardrails, which have no bound else", advanced=True)
    cap_form: str = flag("sigmoid", "of the cap", choices=list(CAP_FORMS), advanced=True)
    cap_scope: str = flag("mean", "what is capped", choices=list(CAP_SCOPES), advanced=True)
    sgt_estimator: str = flag("mlp", "of means and deviations", choices=list(ESTIMATORS))
    sgt_learning_rate: float | None = flag(None, "of the transform (default: the adapter's)")
    model_max_length: int = flag(1024, "tokens of an example at most")

    @property
    def is_truncated(self) -> bool:
        """Whether the models end at the distillation layer: no cross-entropy wants their logits."""
        return not any(getattr(self, name) for name in CE_WEIGHTS)

    def loss_options(self) -> dict[str, Any]:
        """The keyword arguments of `jigsaw_sgt_loss_factory`."""
        ours = [f.name for f in fields(self) if not f.name.startswith("sgt_")]
        return {name: getattr(self, name) for name in ours if name != "model_max_length"}

    def check(self) -> None:
        """ValueError for what no training can be made of; a model is not needed."""
        for name in (*CE_WEIGHTS, *L2_WEIGHTS, "absolute_cosine_similarity_penalty_weight",
                     "median_norm_penalty_weight", "mutual_information_loss_weight"):  # fmt: skip
            value = getattr(self, name)
            if not abs(value) < float("inf"):
                raise ValueError(f"{name}: got {value}, wanted a finite number")
        layer = self.distillation_layer_index
        l2 = [name for name in L2_WEIGHTS if getattr(self, name)]
        if l2 and layer is None:
            raise ValueError(f"{l2[0]}: wanted distillation_layer_index with it")
        if layer is not None and not l2:
            raise ValueError(f"distillation_layer_index: got {layer}, but no l2 loss has a weight")
        if not any(getattr(self, name) for name in (CE_WEIGHTS[0], L2_WEIGHTS[0])):
            raise ValueError(
                f"{CE_WEIGHTS[0]}: got 0, wanted a weight on it or on {L2_WEIGHTS[0]}: nothing"
                " else makes the student work"
            )
        above_0: dict[str, float | None] = {
            "jigsaw_ce_protection_max_loss": self.jigsaw_ce_protection_max_loss,
            "jigsaw_ce_protection_loss_scaling_factor": (
                self.jigsaw_ce_protection_loss_scaling_factor
            ),
            "sgt_learning_rate": self.sgt_learning_rate,
        }
        for name, number in above_0.items():
            if number is not None and not 0 < number < float("inf"):
                raise ValueError(f"{name}: got {number}, wanted a number above 0")
        for name, choices in (("sgt_estimator", ESTIMATORS), ("cap_form", CAP_FORMS),
                              ("cap_scope", CAP_SCOPES)):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, wanted {choices}")
        if self.model_max_length < 2:
            raise ValueError(
                f"model_max_length: got {self.model_max_length}, wanted a number from 2 on"
            )
