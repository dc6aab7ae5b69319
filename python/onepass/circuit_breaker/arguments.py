"""What a circuit-breaker training is told, as dataclasses that HfArgumentParser takes too.

Names and defaults are those of the published scripts (GraySwan's); what is ours stands last.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..training.flags import LoraFlags
from .options import ADAPTER_OFF, REFERENCES, RELU_SCOPES, RETAIN_REDUCTIONS, SCHEDULES

PUBLISHED_TARGETS, PUBLISHED_LAYERS = (10, 20), 32


@dataclass
class LorraArguments:
    """The rerouting."""

    target_layers: str | None = field(
        default=None,
        metadata={"help": "hidden_states to turn (default: 10,20 of 32, in proportion)"},
    )
    transform_layers: str = field(
        default="-1",
        metadata={"help": "blocks that get LoRA; -1: up to the last target"},
    )
    lorra_alpha: float = field(default=5.0, metadata={"help": "sum of both coefficients"})
    full_layers: bool = field(
        default=False, metadata={"help": "retain at all layers, not to the last target"}
    )
    coeff_schedule: str = field(
        default="linear_converge",
        metadata={"help": "of the coefficients over the steps", "choices": list(SCHEDULES)},
    )
    sc_loss_type: str = field(
        default="orig_act_dotprod",
        metadata={"help": "the published loss", "choices": ["orig_act_dotprod"], "advanced": True},
    )
    use_refusal_retain: bool = field(
        default=False,
        metadata={
            "help": "also retain the refusals in the harmful file (field llama3_output)",
            "advanced": True,
        },
    )
    sc_train_seq_type: str = field(
        default="all_text",
        metadata={"help": "tokens that count", "choices": ["all_text"], "advanced": True},
    )
    log_every: int | None = field(
        default=None, metadata={"help": "another name of --logging_steps", "advanced": True}
    )
    model_max_length: int = field(default=1024, metadata={"help": "tokens of an example at most"})
    reference: str = field(
        default=ADAPTER_OFF,
        metadata={"help": "of the original states", "choices": list(REFERENCES)},
    )
    retain_reduction: str = field(
        default="all",
        metadata={
            "help": "what retain divides by",
            "choices": list(RETAIN_REDUCTIONS),
            "advanced": True,
        },
    )
    relu_scope: str = field(
        default="token",
        metadata={
            "help": "what the positive part is taken of",
            "choices": list(RELU_SCOPES),
            "advanced": True,
        },
    )
    init_jitter: float = field(
        default=1e-4,
        metadata={
            "help": "noise on lora_B at the start, relative to lora_A; without any the circuit"
            " breaker has no gradient",
            "advanced": True,
        },
    )

    def layers_of(self, n_blocks: int) -> tuple[int, ...]:
        """`target_layers` as numbers, for a model of `n_blocks` blocks.

        Raises:
            ValueError: not numbers.
        """
        if self.target_layers is not None:
            return numbers("target_layers", self.target_layers)
        scaled = (-(-n * n_blocks // PUBLISHED_LAYERS) for n in PUBLISHED_TARGETS)
        return tuple(dict.fromkeys(scaled))

    def blocks_of(self, n_blocks: int) -> list[int]:
        """The blocks that get an adapter, for a model of `n_blocks` blocks."""
        chosen = numbers("transform_layers", self.transform_layers)
        n_reached = min(max(self.layers_of(n_blocks)) + 1, n_blocks)
        top = max(self.layers_of(n_blocks))
        if not 0 < top <= n_blocks or min(self.layers_of(n_blocks)) < 0:
            raise ValueError(
                f"target_layers must be numbers from 0 to {n_blocks} ({n_blocks} blocks), one of"
                f" them above 0: got {self.target_layers}"
            )
        if -1 in chosen:
            return list(range(n_reached))
        if min(chosen) >= top:
            raise ValueError(
                f"transform_layers {self.transform_layers} lie above the target layers: an adapter"
                f" below {top} is wanted"
            )
        n_run = n_blocks if self.full_layers else n_reached
        wrong = [block for block in chosen if not 0 <= block < n_run]
        if wrong:
            beyond = "" if n_run == n_blocks else " (the blocks after it run with full_layers only)"
            raise ValueError(
                f"transform_layers must be from 0 to {n_run - 1}{beyond}, or -1: got {wrong}"
            )
        return list(chosen)


@dataclass
class LoraArguments(LoraFlags):
    """The adapter."""

    lora_alpha: int = field(default=16, metadata={"help": "scale, over the rank"})
    lora_bias: str = field(
        default="none",
        metadata={
            "help": "biases to train",
            "choices": ["none"],  # others are not switched off with the adapter
            "advanced": True,
        },
    )


def numbers(name: str, text: str) -> tuple[int, ...]:
    """Layer numbers, written with commas between them."""
    try:
        return tuple(int(part) for part in str(text).split(","))
    except ValueError:
        raise ValueError(f"{name} must be whole numbers, as 10,20: got {text!r}") from None
