"""Normal numbers from a counter, on the torch path: those that kernels/gaussian.py makes.

Philox-4x32-10 (Salmon et al., SC 2011) keyed by a seed on the device, in 64-bit integers that hold
32-bit words; Box-Muller makes four normals of the four words of a counter.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Normals:
    """Standard normals, float32; room for a slab is made once."""

    def __init__(self, seed: Tensor) -> None:
        seed = seed.reshape(())
        halves = (seed & WORD, (seed >> 32) & WORD)
        self.keys = [
            [(half + turn * weyl) & WORD for half, weyl in zip(halves, WEYL, strict=True)]
            for turn in range(ROUNDS)
        ]
        self.device = seed.device
        self.room: dict[str, Tensor] = {}

    def _empty(self, name: str, dtype: torch.dtype, *shape: int) -> Tensor:
        """Room of this name, as large as the largest slab so far."""
        numel = math.prod(shape)
        if name not in self.room or self.room[name].numel() < numel:
            self.room[name] = torch.empty(numel, dtype=dtype, device=self.device)
        return self.room[name][:numel].view(shape)

    def _words(self, first: int, count: int) -> list[Tensor]:
        """The four words of counters first, first + 1, ...: all in the low halves; only words 0 and
        2 are clear above."""
        a, b, c, d, spare, other = (
            self._empty(name, torch.int64, count) for name in ("a", "b", "c", "d", "spare", "other")
        )
        torch.arange(first, first + count, out=spare)
        torch.bitwise_right_shift(spare, 32, out=b)
        torch.bitwise_and(spare, WORD, out=a)
        c.zero_()
        d.zero_()
        for key_a, key_c in self.keys:
            torch.mul(a, MULTIPLIERS[0], out=spare)  # wraps: its high half comes out signed
            torch.mul(c, MULTIPLIERS[1], out=other)
            torch.bitwise_right_shift(other, 32, out=a).bitwise_xor_(b).bitwise_xor_(key_a)
            torch.bitwise_right_shift(spare, 32, out=c).bitwise_xor_(d).bitwise_xor_(key_c)
            a.bitwise_and_(WORD)
            c.bitwise_and_(WORD)
            b, d, spare, other = other, spare, b, d
        return [a, b, c, d]

    def draw(self, first: int, count: int) -> Tensor:
        """The normals of elements first, first + 1, ...; the caller's until the next draw."""
        start, stop = first // 4, -(-(first + count) // 4)
        n = stop - start
        made = self._empty("made", torch.float32, n, 4)
        radius, angle, wave = (
            self._empty(name, torch.float32, n) for name in ("radius", "angle", "wave")
        )
        low = self._empty("low", torch.int32, n)
        a, b, c, d = self._words(start, n)
        for at, (radius_word, angle_word) in enumerate(((a, b), (c, d))):
            radius.copy_(radius_word).mul_(2.0**-32).add_(2.0**-33)
            radius.log_().mul_(-2.0).sqrt_()
            low.copy_(angle_word)  # the low half as a signed number: half turns in [-1, 1)
            angle.copy_(low).mul_(math.pi * 2.0**-31)
            torch.mul(torch.cos(angle, out=wave), radius, out=made[:, 2 * at])
            torch.mul(torch.sin(angle, out=wave), radius, out=made[:, 2 * at + 1])
        return made.view(-1)[first - 4 * start :][:count]
