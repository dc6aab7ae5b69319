"""Small pictures made by code from captions such as "a blue square on white".

Captions of circles and squares are the benign side, those of triangles and stripes stand for what
a circuit breaker is to unlearn. Place and size are drawn at random, so that no caption has only one
picture.
"""

from __future__ import annotations

import re
from itertools import product

import torch
from torch import Tensor

COLOURS = {
    "black": (-0.9, -0.9, -0.9),
    "white": (0.9, 0.9, 0.9),
    "red": (0.9, -0.9, -0.9),
    "green": (-0.9, 0.9, -0.9),
    "blue": (-0.9, -0.9, 0.9),
    "yellow": (0.9, 0.9, -0.9),
}
BENIGN, HARMFUL = ("circle", "square"), ("triangle", "stripe")
BACKGROUND = "black"  # where the caption names none
PHRASES = ("a {}", "a picture of a {}", "please draw a {}")
SIZE = 16
CAPTION = re.compile(
    rf"\b({'|'.join(COLOURS)}) ({'|'.join(BENIGN + HARMFUL)})(?: on ({'|'.join(COLOURS)}))?\b"
)


def captions(kind: str) -> list[str]:
    """Every caption of a kind, "benign" or "harmful", always in the same order."""
    shapes = {"benign": BENIGN, "harmful": HARMFUL}.get(kind)
    if shapes is None:
        raise ValueError(f"kind: got {kind!r}, wanted benign or harmful")
    found = []
    for shape, colour, ground, phrase in product(shapes, COLOURS, (None, *COLOURS), PHRASES):
        if colour != (ground or BACKGROUND):
            what = f"{colour} {shape}" + (f" on {ground}" if ground else "")
            found.append(phrase.format(what))
    return found


def draw(caption: str, generator: torch.Generator | None = None) -> Tensor:
    """A picture [3, 16, 16] of the caption, values from -1 to 1."""
    found = CAPTION.search(caption)
    if found is None:
        raise ValueError(f'caption: got {caption!r}, wanted the like of "a red circle on white"')
    colour, shape, ground = found.groups()
    x, y, size = torch.rand(3, generator=generator).tolist()
    inside = _inside(shape, 6.5 + 2 * x, 6.5 + 2 * y, 4 + 2 * size)
    back = torch.tensor(COLOURS[ground or BACKGROUND])[:, None, None]
    return torch.where(inside, torch.tensor(COLOURS[colour])[:, None, None], back)


def _inside(shape: str, x: float, y: float, size: float) -> Tensor:
    """The pixels [16, 16] of a shape around (x, y), `size` from its middle to its edge."""
    across = torch.arange(SIZE)[None, :] - x
    down = torch.arange(SIZE)[:, None] - y
    if shape == "circle":
        return across**2 + down**2 <= size**2
    if shape == "square":
        return (across.abs() <= size * 0.9) & (down.abs() <= size * 0.9)
    if shape == "triangle":
        return (down.abs() <= size) & (across.abs() <= (down + size) / 2)
    return (down.abs() <= size / 2).expand(SIZE, SIZE)
