"""Tokens as the texts that they stand for, and texts as a table shows them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

LONGEST = 32  # characters of a token in a table


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the text that it stands for; one that is no text alone (a byte of a character,
    a row without a token) by its name."""
    texts = []
    for token_id in ids:
        piece = tokenizer.convert_ids_to_tokens(int(token_id))
        text = tokenizer.decode([int(token_id)], clean_up_tokenization_spaces=False)
        if piece is None:
            text = f"<{int(token_id)}>"
        elif not text or "\ufffd" in text:
            text = f"<{str(piece).strip('<>')}>"
        elif piece.startswith("\u2581") and not text.startswith(" "):  # SentencePiece's blank
            text = " " + text
        texts.append(text)
    return texts


def quoted(text: str, longest: int = LONGEST) -> str:
    """The text in quotes, unprintable characters escaped, cut to `longest`."""
    return repr(text if len(text) <= longest else text[: longest - 3] + "...")


def printable(text: str) -> str:
    """In quotes, with what stdout cannot carry escaped."""
    told = quoted(text)
    try:
        told.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return json.dumps(text)
    return told
