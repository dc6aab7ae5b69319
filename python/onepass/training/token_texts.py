"""Tokens as the texts that they stand for, and texts as a table shows them."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

LONGEST = 32  # characters of a token in a table
# a byte by the letter that byte-level BPE writes for it (GPT-2's)
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in SHOWN]
BYTES = {chr(b): b for b in SHOWN} | {chr(256 + n): b for n, b in enumerate(OTHERS)}


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token as the text that it stands for; bytes that are a part of a character as <0xC3>,
    what is no text at all (a row without a token) by its name."""
    texts = []
    for token_id in ids:
        piece = tokenizer.convert_ids_to_tokens(int(token_id))
        text = tokenizer.decode([int(token_id)], clean_up_tokenization_spaces=False)
        if piece is None:
            text = f"<{int(token_id)}>"
        elif "\ufffd" in text and BYTES.keys() >= set(piece):
            decoded = bytes(BYTES[c] for c in piece).decode(errors="surrogateescape")
            text = "".join(
                f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in decoded
            )
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
