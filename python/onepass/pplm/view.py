"""Texts beside each other in a terminal, some of their words coloured."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

from ..cli.terminal import width_of

GAP = " | "
START, END = "\x1b[1;31m", "\x1b[0m"  # bold as well as red, which not everybody sees


class Marked(NamedTuple):
    """A text, and the spans of its characters that are coloured."""

    text: str
    spans: Sequence[tuple[int, int]] = ()


def colours(stream: TextIO) -> bool:
    """Whether colours are wanted there: a terminal, and no NO_COLOR (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return stream.isatty() and not plain


def side_by_side(
    heads: Sequence[str], texts: Sequence[Marked], width: int, colour: bool
) -> Iterator[str]:
    """Lines of the texts in columns under their heads, `width` characters in all."""
    each = max(8, (width - len(GAP) * (len(texts) - 1)) // len(texts))
    columns = [list(_wrapped(_visible(text), each)) for text in texts]
    yield GAP.join(_padded(head[:each], each) for head in heads).rstrip()
    yield "-+-".join("-" * each for _ in texts)
    for n in range(max(map(len, columns))):
        line = [column[n] if n < len(column) else Marked("") for column in columns]
        cells = []
        for cell in line:
            told = _coloured(cell) if colour else cell.text
            cells.append(told + " " * (each - width_of(cell.text)))
        yield GAP.join(cells).rstrip()


def _padded(text: str, width: int) -> str:
    return text + " " * (width - width_of(text))


def _visible(marked: Marked) -> Marked:
    """With what a terminal would obey escaped: all that does not print but line ends."""
    text, places = "", []
    for c in marked.text.replace("\t", " "):
        places.append(len(text))
        text += c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
    places.append(len(text))
    return Marked(text, [(places[a], places[b]) for a, b in marked.spans])


def _wrapped(marked: Marked, width: int) -> Iterator[Marked]:
    """Its lines, broken at blanks where there are any."""
    start = 0
    for line in marked.text.split("\n"):
        end_of_line = start + len(line)
        while True:
            end, used = start, 0
            while end < end_of_line and used + width_of(marked.text[end]) <= width:
                used += width_of(marked.text[end])
                end += 1
            if end < end_of_line:
                blank = marked.text.rfind(" ", start + 1, end + 1)
                end = blank if blank > start else end
            spans = [(max(a, start) - start, min(b, end) - start) for a, b in marked.spans]
            yield Marked(marked.text[start:end], [(a, b) for a, b in spans if a < b])
            start = end
            if start >= end_of_line:
                break
            if marked.text[start] == " ":  # the break stands for it
                start += 1
        start = end_of_line + 1


def _coloured(line: Marked) -> str:
    told, last = "", 0
    for a, b in line.spans:
        told += line.text[last:a] + START + line.text[a:b] + END
        last = b
    return told + line.text[last:]
