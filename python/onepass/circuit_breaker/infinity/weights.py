"""Training chosen weights of the model itself, in place of an adapter."""

from __future__ import annotations

import copy
import re

from torch import Tensor, nn

from ...training.hidden_states import blocks_of
from .arguments import EMBEDDINGS, UNFROZEN, InfinityArguments


def frozen_copy(model: nn.Module) -> nn.Module:
    """The model as it is now, for a reference."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def unfreeze(model: nn.Module, arguments: InfinityArguments) -> list[str]:
    """Let only the weights that `arguments` say train; returns their names.

    Raises:
        ValueError: a switch that no weight of the model goes by.
    """
    model.requires_grad_(False)
    blocks = blocks_of(model)
    for switch in arguments.unfrozen:
        parts = "|".join(re.escape(part) for part in UNFROZEN[switch])
        wanted = re.compile(rf"(.*\.)?({parts})(\..*)?")
        chosen = [
            weight
            for layer in arguments.trained_layers
            for name, weight in blocks[layer].named_parameters()
            if wanted.fullmatch(name)
        ]
        if not chosen:
            raise ValueError(
                f"{switch}: the blocks {arguments.selective_layers} of {type(model).__name__} have"
                f" no weight of {', '.join(UNFROZEN[switch])}"
            )
        for weight in chosen:
            weight.requires_grad_(True)
    if not arguments.freeze_embeddings:
        embeddings = [w for n, w in model.named_parameters() if set(n.split(".")) & set(EMBEDDINGS)]
        if not embeddings:
            raise ValueError(
                f"freeze_embeddings: {type(model).__name__} has none of {', '.join(EMBEDDINGS)}"
            )
        for weight in embeddings:
            weight.requires_grad_(True)
    return [name for name, weight in model.named_parameters() if weight.requires_grad]


def changed_weights(model: nn.Module, state: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights that were trained, by name, for model.load_state_dict(strict=False)."""
    state = dict(model.state_dict()) if state is None else state
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value.detach().contiguous() for name, value in state.items() if name in trained}
