"""What a training of an Infinity-style model is told, as a dataclass; nothing here needs torch.

Names and defaults are those of the published script; what is ours stands last.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...training.flags import flag
from ..arguments import LorraArguments, numbers
from ..options import RELU_SCOPES, RETAIN_REDUCTIONS, SCHEDULES

CIRCUIT_BREAKER = "circuit_breaker"
# The weights that each switch trains, by what follows blocks.N. in their names.
UNFROZEN = {
    "unfreeze_attention": ("sa.mat_qkv", "sa.mat_q", "sa.mat_k", "sa.mat_v", "sa.q_bias",
                           "sa.v_bias", "sa.scale_mul", "sa.scale_mul_1H11"),
    "unfreeze_output": ("sa.proj", "ca.proj"),
    "unfreeze_layernorm": ("ca_norm", "ada_gss", "ada_lin", "norm"),
    "unfreeze_mlp": ("ffn",),
    "unfreeze_cross_attention": ("ca.mat_q", "ca.mat_kv", "ca.mat_k", "ca.mat_v", "ca.q_bias",
                                "ca.v_bias", "ca.scale_mul", "ca.scale_mul_1H1"),
}  # fmt: skip
EMBEDDINGS = ("word_embed", "lvl_embed", "pos_embed", "pos_start", "pos_1LC", "norm0_ve")


@dataclass
class InfinityArguments:
    """The rerouting."""

    task_type: str = flag(CIRCUIT_BREAKER, "any other: on pictures")
    circuit_breaker_alpha: float = flag(0.1, "sum of both coefficients")
    circuit_breaker_target_layers: str = flag("0,1,2,3,4,5", "blocks that turn", metavar="LIST")
    selective_layers: str = flag(
        "0,1,2,3,4,5", "blocks trained (default: up to the target)", metavar="LIST"
    )
    unfreeze_attention: bool = flag(False, "their self-attention itself, not LoRA")
    unfreeze_output: bool = flag(False, "the projections out of attention")
    unfreeze_layernorm: bool = flag(False, "the norms, gates, scales and shifts")
    unfreeze_mlp: bool = flag(False, "the feed-forward layers")
    unfreeze_cross_attention: bool = flag(False, "the attention to the text")
    freeze_embeddings: bool = flag(True, "off: they, too")
    coeff_schedule: str = flag(
        "linear_converge",
        "of the coefficients over the steps",
        choices=list(SCHEDULES),
        advanced=True,
    )
    retain_reduction: str = flag(
        "all", "what retain divides by", choices=list(RETAIN_REDUCTIONS), advanced=True
    )
    relu_scope: str = flag(
        "token", "what the positive part is taken of", choices=list(RELU_SCOPES), advanced=True
    )
    init_jitter: float = flag(
        1e-2,
        "relative noise on what is trained at the start; without any the circuit breaker has no"
        " gradient",
        advanced=True,
    )

    @property
    def breaks(self) -> bool:
        """Whether the circuit breaker is on."""
        return self.task_type == CIRCUIT_BREAKER

    @property
    def target_layers(self) -> tuple[int, ...]:
        return layers("circuit_breaker_target_layers", self.circuit_breaker_target_layers)

    @property
    def trained_layers(self) -> tuple[int, ...]:
        return layers("selective_layers", self.selective_layers)

    @property
    def unfrozen(self) -> list[str]:
        """The switches that are on; with none of them an adapter is trained."""
        return [name for name in UNFROZEN if getattr(self, name)]

    def check_layers(self, n_blocks: int, whole: bool = False) -> None:
        """ValueError unless a model of `n_blocks` blocks has the layers, and they are run: none
        beyond the last target layer is, but for a task loss (`whole`)."""
        last = max(self.target_layers)
        if self.breaks and last >= n_blocks:
            raise ValueError(
                f"circuit_breaker_target_layers: got {last}, wanted blocks from 0 to"
                f" {n_blocks - 1}: the model has {n_blocks}"
            )
        run = n_blocks if whole or not self.breaks else last + 1
        if wrong := [layer for layer in self.trained_layers if layer >= run]:
            why = f"the model has {n_blocks}" if run == n_blocks else "those after it are not run"
            raise ValueError(
                f"selective_layers: got {','.join(map(str, wrong))}, wanted blocks from 0 to"
                f" {run - 1}: {why}"
            )

    def lorra(self) -> LorraArguments:
        """The same under the names of language models."""
        return LorraArguments(
            target_layers=self.circuit_breaker_target_layers,
            lorra_alpha=self.circuit_breaker_alpha,
            coeff_schedule=self.coeff_schedule,
            retain_reduction=self.retain_reduction,
            relu_scope=self.relu_scope,
            init_jitter=self.init_jitter if self.breaks else 0.0,
        )


def layers(name: str, text: str) -> tuple[int, ...]:
    """Numbers of blocks, with commas between them.

    Raises:
        ValueError: no numbers, below 0, or one twice.
    """
    found = numbers(name, text)
    if min(found) < 0 or len(set(found)) < len(found):
        raise ValueError(f"{name} must be different numbers from 0: got {text!r}")
    return found


def scale_schedule(text: str) -> list[tuple[int, int, int]]:
    """(t, h, w) of each scale, of "1x1x1,1x2x2,1x4x4".

    Raises:
        ValueError: written in another way, or with a first scale of more than one token.
    """
    try:
        found = [tuple(int(side) for side in scale.split("x")) for scale in text.split(",")]
    except ValueError:
        found = []
    if not found or any(len(scale) != 3 or min(scale) < 1 for scale in found):
        raise ValueError(f"scale_schedule must be the like of 1x1x1,1x2x2,1x4x4: got {text!r}")
    if found[0] != (1, 1, 1):
        raise ValueError(f"scale_schedule must begin with 1x1x1: got {text!r}")
    return [(t, h, w) for t, h, w in found]
