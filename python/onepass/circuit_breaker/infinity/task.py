"""What an Infinity-style model is trained for: the labels of pictures under their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import cross_entropy
from .data import InfinityCircuitBreakerDataset
from .pictures import draw
from .quantizer import BitQuantizer

ODD = 1_000_003  # of a seed, so that neighbouring ones draw no picture twice


def label_loss(
    logits: Tensor, labels: Tensor, scale_schedule: Sequence[Sequence[int]] | None = None
) -> Tensor:
    """Mean cross-entropy in nats a label.

    Args:
        logits: [B, L, V]. labels: [B, L] of V kinds; or [B, L, d] bits, whose V = 2 d logits are
            those of either value of each bit, as in Infinity.
        scale_schedule: where given, a cell has the weight 1 / sqrt(cells of its scale), as in
            Infinity's reweight_loss_by_scale: the one cell of the first scale settles what all
            others are to draw.

    Raises:
        ValueError: labels that do not go with the logits.
    """
    bits = labels.shape[2] if labels.dim() == 3 else 1
    if labels.shape[:2] != logits.shape[:2] or (labels.dim() == 3 and logits.shape[-1] != 2 * bits):
        raise ValueError(
            f"labels {tuple(labels.shape)} do not go with logits {tuple(logits.shape)}: wanted"
            " [B, L], or [B, L, d] for 2 d logits"
        )
    rows = logits.reshape(labels.numel(), -1)
    if scale_schedule is None:
        return cross_entropy(rows, labels.flatten())
    losses = cross_entropy(rows, labels.flatten(), reduction="none").view(*labels.shape[:2], -1)
    n_cells = torch.tensor([t * h * w for t, h, w in scale_schedule], device=losses.device)
    weights = (1 / n_cells.sqrt()).repeat_interleave(n_cells)
    return (losses.mean(-1) * (weights / weights.sum())).sum(-1).mean()


def task_loss(
    model: nn.Module, inputs: Mapping[str, Any], scale_schedule: Sequence[tuple[int, int, int]]
) -> Tensor:
    """`label_loss` of a batch with `text_cond_tuple`, `x_BLC_wo_prefix` and `labels`."""
    text, *lengths = inputs["text_cond_tuple"]
    # A clone: Infinity writes what it drops into the text it was given.
    condition = (text.clone(), *lengths)
    logits = model(condition, inputs["x_BLC_wo_prefix"], scale_schedule=list(scale_schedule))
    return label_loss(logits, inputs["labels"], scale_schedule)


class WithPictures(Dataset[dict[str, Any]]):
    """Items of the dataset with a picture of the caption to retain, drawn anew in each epoch, as
    `x_BLC_wo_prefix` [L - 1, d] and `labels` [L].

    Raises:
        ValueError: a caption that pictures.py cannot draw, by file and line.
    """

    def __init__(
        self, dataset: InfinityCircuitBreakerDataset, quantizer: BitQuantizer, seed: int = 0
    ) -> None:
        self.dataset, self.quantizer, self.seed = dataset, quantizer, seed

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.__getitems__([i])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items = self.dataset.__getitems__(indices)
        for i, item in zip(indices, items, strict=True):
            number = (self.seed * ODD + self.dataset.epoch) * ODD + i
            generator = torch.Generator().manual_seed(number % 2**63)
            picture = draw(self.dataset.retained(i).text, generator)
            labels, images = self.quantizer.encode(picture[None])
            item |= {"x_BLC_wo_prefix": images[0], "labels": torch.cat(labels, 1)[0]}
        return items
