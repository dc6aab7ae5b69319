"""Which numbers the options of step functions can be; imports nothing heavy."""

from __future__ import annotations

import sys

LEAST = {"top_k": 0, "min_tokens_to_keep": 1, "n_mcd_steps": 2, "seed": 0}  # whole numbers
MOST = {"top_p": 1.0, "eps": sys.float_info.max}  # numbers from 0 on
LARGEST = (1 << 63) - 1


def check_range(name: str, value: object, vocab_size: int = LARGEST) -> None:
    """Raises unless the option of that name can have this value: a whole number up to `vocab_size`,
    where that is known.

    Raises:
        TypeError: of another type. ValueError: out of its range.
    """
    if name in LEAST:
        if type(value) is not int:
            raise TypeError(f"{name} must be a whole number: got {value!r}")
        if not LEAST[name] <= value <= vocab_size:
            bounds = f"{LEAST[name]} or more"
            if vocab_size < LARGEST:
                bounds = f"between {LEAST[name]} and {vocab_size}, the vocabulary size"
            raise ValueError(f"{name} must be {bounds}: got {value}")
    if name in MOST:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number: got {value!r}")
        if not 0 <= value <= MOST[name]:
            bounds = "between 0 and 1" if name == "top_p" else "finite and at least 0"
            raise ValueError(f"{name} must be {bounds}: got {value}")
