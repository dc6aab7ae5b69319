"""Captions of pictures that code can draw; nothing here needs torch.

Those of circles and squares are the benign side, those of triangles and stripes stand for what a
circuit breaker is to unlearn.
"""

from __future__ import annotations

import re
from itertools import product

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
