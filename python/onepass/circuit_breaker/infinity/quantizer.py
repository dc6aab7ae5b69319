"""Images as residual bits, scale by scale, the way of Infinity's tokenizer; nothing is trained.

Each scale says with one bit a colour channel whether the image is lighter or darker, on average
over the cell, than what the coarser scales have drawn. The bits of a cell make one label.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SCALES = ((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 8, 8))
# How much a bit lightens or darkens. On the pictures of pictures.py a squared error of 0.091, of a
# variance of 0.78; 0.062 of it comes from the 8 x 8 cells alone.
STEPS = (0.6, 0.3, 0.5, 0.5)


class BitQuantizer:
    """`encode` makes labels and the model's input of images, `decode` images of labels."""

    def __init__(
        self,
        scale_schedule: tuple[tuple[int, int, int], ...] = SCALES,
        steps: tuple[float, ...] = STEPS,
        image_size: int = 16,
        channels: int = 3,
    ) -> None:
        if len(steps) != len(scale_schedule):
            raise ValueError(f"got {len(steps)} steps, wanted one for each of {scale_schedule}")
        if any(t != 1 for t, _, _ in scale_schedule):
            raise ValueError(f"scale_schedule: got {scale_schedule}, wanted t = 1: still images")
        self.scale_schedule = [(t, h, w) for t, h, w in scale_schedule]
        self.steps, self.image_size, self.channels = steps, image_size, channels

    @property
    def vocab_size(self) -> int:
        return 2**self.channels

    def encode(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Labels [B, h*w] of each scale and x_BLC_wo_prefix [B, L-1, channels], what the scales
        before have drawn, of images [B, channels, H, W] with values from -1 to 1."""
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(
                f"images: got shape {tuple(images.shape)}, wanted [B, {self.channels}, H, W]"
            )
        wanted = F.adaptive_avg_pool2d(images.float(), self.scale_schedule[-1][1:])
        drawn = torch.zeros_like(wanted)
        labels: list[Tensor] = []
        inputs: list[Tensor] = []
        for scale, (_, h, w) in enumerate(self.scale_schedule):
            if scale:
                inputs.append(self.next_input(drawn, scale))
            residual = F.adaptive_avg_pool2d(wanted - drawn, (h, w))
            bits = (residual > 0).flatten(2).transpose(1, 2)  # [B, h*w, channels]
            labels.append((bits << torch.arange(self.channels, device=bits.device)).sum(-1))
            drawn = drawn + self.drawing(labels[-1], scale)
        empty = wanted.new_zeros(len(wanted), 0, self.channels)
        return labels, torch.cat([empty, *inputs], 1)

    def decode(self, labels: list[Tensor]) -> Tensor:
        """Images [B, channels, image_size, image_size] as far as the scales given say."""
        drawn = sum(self.drawing(some, scale) for scale, some in enumerate(labels))
        assert isinstance(drawn, Tensor)
        return F.interpolate(drawn, size=(self.image_size, self.image_size)).clamp(-1, 1)

    def drawing(self, labels: Tensor, scale: int) -> Tensor:
        """What one scale adds [B, channels, h, w], at the size of the last scale."""
        _, h, w = self.scale_schedule[scale]
        channels = torch.arange(self.channels, device=labels.device)
        signs = (labels.unsqueeze(-1) >> channels & 1) * 2.0 - 1.0
        cells = (self.steps[scale] * signs).transpose(1, 2).unflatten(2, (h, w))
        return F.interpolate(cells, size=self.scale_schedule[-1][1:])

    def next_input(self, drawn: Tensor, scale: int) -> Tensor:
        """The model's input [B, h*w, channels] at `scale`, of what is drawn up to there."""
        _, h, w = self.scale_schedule[scale]
        return F.adaptive_avg_pool2d(drawn, (h, w)).flatten(2).transpose(1, 2)
