"""Hidden states of the model before training, made once for a whole data set and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..cli.files import replace
from ..training.processes import agreed, rounds
from .loss import Rerouting, reference_hidden_states

META = "reference.json"


class WithReference(Dataset[dict[str, Tensor]]):
    """Items of `dataset` with the keys that `Rerouting(reference="precomputed")` looks for.

    Each item's hidden states lie in a file of their own: L x S x D numbers a part, so this is for
    few target layers or short prompts; see `bytes_each`.
    """

    def __init__(self, dataset: Any, folder: str | Path) -> None:
        self.dataset, self.folder = dataset, Path(folder)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return {
            **self.dataset[index],
            **load_file(self.folder / f"{index % len(self)}.safetensors"),
        }

    def bytes_each(self) -> int:
        """Bytes on disk of one item's hidden states."""
        return (self.folder / "0.safetensors").stat().st_size


def precompute(
    model: nn.Module,
    dataset: Any,
    options: Rerouting,
    folder: str | Path,
    *,
    after_item: Callable[[], object] | None = None,
) -> WithReference:
    """The data set with its reference hidden states, made with the model's adapter off (or with the
    frozen copy that `options.reference` is), one item at a time.

    Args:
        options: with the reference to make them with: "adapter_off" or a frozen copy. Training then
            takes the same options with "precomputed".
        folder: gets an `<item>.safetensors` each; what is complete there is not made again, so an
            interrupted call can be repeated. It must be of the same model.
        after_item: called after each item, for a progress bar.

    Raises:
        ValueError: the folder holds hidden states of other layers or of other data.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    described = {
        "n_items": len(dataset),
        "target_layers": list(options.target_layers),
        "layer_convention": options.layer_convention,
        "full_layers": options.full_layers,
        "data": _digest(dataset),
    }
    meta = folder / META
    if meta.exists() and json.loads(meta.read_text(encoding="utf-8")) != described:
        raise ValueError(f"{folder} holds other hidden states than wanted ({described}): remove it")
    replace(meta, lambda new: new.write_text(json.dumps(described) + "\n", encoding="utf-8"))
    device = next(model.parameters()).device
    files = [folder / f"{index}.safetensors" for index in range(len(dataset))]
    missing = agreed([index for index, file in enumerate(files) if not file.exists()])
    for at, is_own in rounds(len(missing)):
        item = {name: value.to(device) for name, value in dataset[missing[at]].items()}
        states = reference_hidden_states(model, item, options)
        if is_own:
            stored = {name: value.cpu().contiguous() for name, value in states.items()}
            replace(files[missing[at]], partial(save_file, stored))
        if after_item is not None:
            after_item()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()
    return WithReference(dataset, folder)


def _digest(dataset: Any) -> str:
    """Of all that the hidden states depend on but the model."""
    digest = hashlib.sha256()
    for index in range(len(dataset)):
        for name, value in sorted(dataset[index].items()):
            digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
