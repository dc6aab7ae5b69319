"""Tables on stdout: rich where it is installed and stdout is a terminal, aligned text otherwise.

The plain form is ASCII where the caller's cells are, one row a line, so that a log, a pipe and a
mail carry it unharmed. Columns whose cells are all numbers are aligned to the right.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TextIO

ONE = r"(?:[-+]?[\d.][\d.,]*(?:e[-+]?\d+)?\s?(?:%|x|s|ms|us|MiB|GiB|GB/s)?|[-+]?inf|nan|-)"
NUMBER = re.compile(rf"{ONE}(/{ONE})?|")
STYLES = {"PASS": "green", "FAIL": "bold red", "ok": "green"}


def render(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    stream: TextIO | None = None,
) -> None:
    """Print `rows` under `columns` to `stream` (stdout where None); None cells show as "-"."""
    out = sys.stdout if stream is None else stream
    cells = [["-" if c is None else str(c) for c in row] for row in rows]
    for row in cells:
        if len(row) != len(columns):
            raise ValueError(f"table row has {len(row)} cells for {len(columns)} columns: {row}")
    right = [
        bool(cells) and all(NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))
    ]
    if not (out.isatty() and _render_rich(title, columns, cells, right, out)):
        out.write(plain(title, columns, cells, right))


def plain(
    title: str, columns: Sequence[str], cells: Sequence[Sequence[str]], right: Sequence[bool]
) -> str:
    """The table as aligned text, each line ended and none with trailing blanks."""
    widths = [max(len(row[i]) for row in [columns, *cells]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, right, strict=True)
        return "  ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in pairs).rstrip()

    head = [title] if title else []
    return "\n".join([*head, line(columns), line(["-" * w for w in widths]), *map(line, cells), ""])


def _render_rich(
    title: str,
    columns: Sequence[str],
    cells: Sequence[Sequence[str]],
    right: Sequence[bool],
    out: TextIO,
) -> bool:
    """Draw with rich; False where it is not installed. Cells are text, never markup."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        return False
    table = Table(title=Text(title), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.collapse_padding = True
    for column, is_right in zip(columns, right, strict=True):
        table.add_column(Text(column), justify="right" if is_right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(c, style=STYLES.get(c, "")) for c in row))
    Console(file=out).print(table)  # rich itself honours NO_COLOR and TERM
    return True
