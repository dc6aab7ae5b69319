"""Every number the demo is run with, in one frozen record.

`FULL` and `FAST` are the two sizes users meet; tests make smaller ones with `dataclasses.replace`.
A checkpoint carries the record it was made with, so that a resumed run goes on with the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    # text
    vocab_size: int = 2048
    window: int = 128  # tokens a row; a document's last window is shorter and padded
    text_chars: int = 600_000  # of each kind, at most; of prose Python brings about 250_000
    held_out_share: float = 0.1
    # model
    hidden_size: int = 128
    n_layers: int = 4
    n_heads: int = 4
    # both stages
    rows_of_each_kind: int = 4  # a batch holds as many windows of prose as of code
    max_gradient_norm: float = 1.0
    # language model
    lm_steps: int = 400
    lm_learning_rate: float = 5e-3
    lm_warmup_steps: int = 10
    lm_weight_decay: float = 0.1
    # circuit breaker
    cb_steps: int = 80
    cb_learning_rate: float = 1e-2
    cb_coefficient: float = 10.0  # alpha: the largest value of either coefficient
    target_layers: tuple[int, ...] = (2,)  # hidden_states indices; 0 is the embeddings
    lora_rank: int = 32
    lora_alpha: int = 32
    lora_jitter: float = 1e-2  # std of lora_B at the start, as a share of the std of lora_A
    # evaluation
    curve_points: int = 10  # evaluations, each with a checkpoint, in each stage
    curve_rows: int = 24  # held-out windows of each kind behind a point of the curves
    table_rows: int = 96  # and behind the table

    @property
    def n_steps(self) -> int:
        return self.lm_steps + self.cb_steps


FULL = Settings()
FAST = Settings(
    vocab_size=1024,
    window=64,
    text_chars=300_000,
    hidden_size=96,
    rows_of_each_kind=8,
    lm_steps=120,
    cb_steps=60,
    curve_points=6,
    table_rows=150,
)
