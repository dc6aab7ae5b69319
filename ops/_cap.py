"""What stands between a head's product u and the logits: a softcap and a scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._launch import accumulation_dtype


class Cap(NamedTuple):
    """logits = scale * softcap * tanh(u / softcap); a softcap of 0 is none."""

    softcap: float = 0.0
    scale: float = 1.0

    @property
    def is_none(self) -> bool:
        return self.softcap == 0 and self.scale == 1

    def logits(self, u: Tensor) -> Tensor:
        """In the accumulation dtype, where anything is to be done."""
        if self.is_none:
            return u
        u = u.to(accumulation_dtype(u.dtype))
        if self.softcap == 0:
            return u * self.scale
        return torch.tanh(u / self.softcap) * (self.softcap * self.scale)

    def gradient(self, dlogits: Tensor, u: Tensor) -> Tensor:
        """The gradient of u from that of the logits.

        The slope is 4 e / (1 + e)^2 with e = exp(-2 |u / softcap|): 1 - tanh^2 would be 0 long
        before a capped logit stops to move.
        """
        if self.softcap:
            e = torch.exp(u.to(accumulation_dtype(u.dtype)).abs() * (-2 / self.softcap))
            dlogits = dlogits * (4 * e / (1 + e).square())
        return dlogits if self.scale == 1 else dlogits * self.scale

    @property
    def for_kernels(self) -> tuple[float | None, float | None]:
        """The two as kernels take them, None where there is nothing to do."""
        return self.softcap or None, None if self.scale == 1 else self.scale


NO_CAP = Cap()
