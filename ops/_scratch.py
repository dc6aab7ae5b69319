"""Room for slabs on the torch path: made once, then used by one slab after another.

On a CPU fresh memory costs as much as an exponential: its pages come one by one from the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """Named matrices [n_rows, row_numel], each made when first asked for."""

    def __init__(
        self, n_rows: int, row_numel: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.shape = (n_rows, row_numel)
        self.dtype, self.device = dtype, device
        self.held: dict[str, Tensor] = {}

    def room(self, name: str, n_rows: int) -> Tensor:
        """The first rows of the matrix of that name, holding what they held."""
        if name not in self.held:
            self.held[name] = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return self.held[name][:n_rows]

    def load(self, name: str, rows: Tensor) -> Tensor:
        """The rows themselves where they need no cast."""
        return rows if rows.dtype == self.dtype else self.room(name, len(rows)).copy_(rows)
