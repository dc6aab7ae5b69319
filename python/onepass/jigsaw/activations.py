"""What a jigsaw loss is made of, and what it is told of by name."""

from __future__ import annotations

from typing import TypedDict

from torch import Tensor

# Components by name, 0-dim, in the sign in which they are minimised.
ComponentLossesDict = dict[str, Tensor]
# What a loss was made with, by the factory's parameter names.
HyperparametersDict = dict[str, "float | int | bool | str | None"]


class ActivationsDict(TypedDict, total=False):
    """Activations of a teacher and a student that ran on one super batch: the clean half first,
    rows [0:B], then the noisy half [B:2B].

    In the place of either logits may stand final hidden states, with the head that they share; no
    logits are then made.
    """

    teacher_logits: Tensor  # [2B, S, V], a tensor or LazyLogits
    student_logits: Tensor
    teacher_hidden: Tensor  # [2B, S, D] after the last norm
    student_hidden: Tensor
    lm_head_weight: Tensor  # [V, D]
    lm_head_bias: Tensor  # [V]
    teacher_embeddings: Tensor  # [2B, S, D] output of the distillation layer
    student_embeddings: Tensor
    clean_input_embeddings: Tensor  # [B, S, D]
    noisy_input_embeddings: Tensor
    means: Tensor  # [B, S, D]
    stds: Tensor
    noise_mask: Tensor  # [B, S] or [B, S, D]
