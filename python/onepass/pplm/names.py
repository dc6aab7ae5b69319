"""The names that commands and functions take: bags of words, heads, and where their files are.

Imports nothing heavy, so that a wrong name is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..cli.errors import nearest
from ..training.prompts import utf8_text

FOLDER = "pretrained_discriminators"  # PPLM.jl's, in the working directory
HEAD = "head.safetensors"  # its name in the folder of `onepass pplm train-discriminator`
TORCH = (".pt", ".pth", ".bin")
TRAIN = "onepass pplm train-discriminator --model M --data FILE --output_dir DIR"
# What Uber's run_pplm.py says of the heads that it downloads; nothing is downloaded here.
KNOWN: dict[str, dict[str, Any]] = {
    "clickbait": {
        "class_size": 2,
        "embed_size": 1024,
        "class_vocab": {"non_clickbait": 0, "clickbait": 1},
        "default_class": 1,
        "pretrained_model": "gpt2-medium",
    },
    "sentiment": {
        "class_size": 5,
        "embed_size": 1024,
        "class_vocab": {"very_positive": 2, "very_negative": 3},
        "default_class": 3,
        "pretrained_model": "gpt2-medium",
    },
    "toxicity": {
        "class_size": 2,
        "embed_size": 1024,
        "class_vocab": {"non_toxic": 0, "toxic": 1},
        "default_class": 0,
        "pretrained_model": "gpt2-medium",
    },
}


def bag_names() -> list[str]:
    """The bags of this package."""
    return sorted(
        file.name.removesuffix(".txt") for file in (files(__package__) / "bags").iterdir()
    )


def split_names(bags: str | Sequence[str]) -> list[str]:
    """Names or paths from a list of them, or from one string as Uber's `-B` takes it, "a;b".

    Raises:
        ValueError: none is named.
    """
    words = bags.split(";") if isinstance(bags, str) else list(bags)
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"bags of words are names or paths: got {type(word).__name__}")
    if not (names := [word.strip() for word in words if word.strip()]):
        raise ValueError(f"no bag of words is named: wanted {_wanted()}")
    return names


def read_words(name_or_path: str) -> list[str]:
    """The words of a bag of this package or of a UTF-8 file with a word a line, blank lines left
    out.

    Raises:
        FileNotFoundError: neither such a bag nor such a file.
        ValueError: a folder, or no UTF-8.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in bag_names():
        text = (files(__package__) / "bags" / f"{name_or_path}.txt").read_text(encoding="utf-8")
    elif path.is_dir():
        raise ValueError(f"bag of words {name_or_path!r} is a folder: wanted {_wanted()}")
    elif path.is_file():
        text = utf8_text(path)
    else:
        meant = nearest(name_or_path, bag_names())
        mend = f"; did you mean {meant}?" if meant else ""
        raise FileNotFoundError(
            f"no bag of words and no file is called {name_or_path!r}: wanted {_wanted()}{mend}"
        )
    return [word for line in text.splitlines() if (word := line.strip())]


def _wanted() -> str:
    return f"{', '.join(bag_names())}, or a file of a word a line"


def find_head(name: str) -> Path:
    """The file of a head: `name` as a path, or a file in ./pretrained_discriminators called so.

    Raises:
        FileNotFoundError: neither, with what to do.
    """
    path = Path(name).expanduser()
    if name not in KNOWN and path.exists():
        return path
    for suffix in ("", ".safetensors", *TORCH):
        found = Path(FOLDER) / f"{name}{suffix}"
        if found.is_file():
            return found
    if name in KNOWN:
        raise FileNotFoundError(
            f"the head {name!r} is not here, and none is downloaded: train one ({TRAIN}) and give"
            f" its folder, or give the file of one for {KNOWN[name]['pretrained_model']} as"
            f" path= (--discrim_weights)"
        )
    raise FileNotFoundError(
        f"no head {name!r}: wanted the folder or the file of one, or of {', '.join(KNOWN)} with"
        f" its file; to train one: {TRAIN}"
    )
