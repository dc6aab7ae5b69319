"""An attribution as a table for the terminal, as a page and as a picture, in one scale of colours.

A cell's colour is its share of the largest magnitude in its column: from white to blue, and below 0
to vermilion, which colour-blind readers tell apart and grey shows as strength.
"""

from __future__ import annotations

import html as escaping
import math
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from ..cli.files import replace
from ..cli.terminal import width_of
from ..training.curves import COLOURS
from ..training.token_texts import printable

if TYPE_CHECKING:
    from torch import Tensor

    from .result import Attribution

ABOVE, BELOW = COLOURS[:2]
LEVELS = 8
LONGEST = 14  # characters of a token over a column
MAX_SHOWN = 48  # targets in a terminal
MAX_CELLS = 96 * 96  # of a page's table
MAX_LABELS = 80  # along an axis of a picture


class Cell(NamedTuple):
    text: str
    share: float | None = None  # None: no colour


def shares(attribution: Attribution) -> Tensor:
    """The matrix over the largest magnitude of each column, [R, T]; NaN as there."""
    sizes = attribution.matrix.nan_to_num(0.0, 0.0, 0.0).abs().amax(0)
    return attribution.matrix / sizes.clamp_min(1e-38)


def level_of(share: float) -> int:
    return 0 if math.isnan(share) else round(LEVELS * max(-1.0, min(1.0, share)))


def colour_of(level: int) -> str:
    """The background of a level from -LEVELS to LEVELS, as #rrggbb."""
    end = ABOVE if level >= 0 else BELOW
    strength = abs(level) / LEVELS
    parts = (int(end[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(255 + (part - 255) * strength):02x}" for part in parts)


def ink_on(colour: str) -> str:
    """Black or white, whichever contrasts more (WCAG 2's luminance)."""
    linear = [(int(colour[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "black" if luminance > 0.18 else "white"


def title_of(attribution: Attribution) -> str:
    """What the numbers are."""
    method = attribution.method.replace("_", " ")
    if attribution.n_steps is not None:
        method += f" ({attribution.n_steps} steps from {attribution.baseline})"
    norm = "L2 norm" if attribution.reduction == "l2" else "sum"
    return f"{method} of {attribution.target}, {norm} over the embedding"


def notes_of(attribution: Attribution) -> list[tuple[str, list[float]]]:
    """What is told of each target beside its column: name and numbers."""
    rows = [(name, value.tolist()) for name, value in attribution.scores.items()]
    if attribution.deltas is not None:
        rows.append(("delta", attribution.deltas.tolist()))
    return rows


def number(value: float, read: bool = True) -> str:
    return f"{value:.2g}" if read else "-"


# -- the terminal -------------------------------------------------------------------------------


def show(attribution: Attribution, stream: TextIO | None = None) -> None:
    """Print it to `stream` (stdout where None): rows are read, columns are written. With rich and a
    terminal in colours, without or under NO_COLOR as the same text."""
    out = sys.stdout if stream is None else stream
    n_shown = min(len(attribution.targets), MAX_SHOWN)
    width = shutil.get_terminal_size((100, 24)).columns
    lines = list(lines_of(attribution, n_shown, width))
    heading = f"{title_of(attribution)}; rows are read, columns predicted"
    if attribution.n_encoder:
        heading += f"; the encoder read the first {attribution.n_encoder}"
    if n_shown < len(attribution.targets):
        heading += f"; the first {n_shown} of {len(attribution.targets)} targets"
    lines.insert(0, [Cell(heading)])
    if not (out.isatty() and _show_rich(lines, out)):
        out.write("".join("".join(c.text for c in line).rstrip() + "\n" for line in lines))


def lines_of(attribution: Attribution, n_shown: int, width: int) -> Iterator[list[Cell]]:
    """The table in as many blocks of columns as the width asks for."""
    labels = [printable(token) for token in attribution.tokens]
    notes = notes_of(attribution)
    first = max(map(width_of, [*labels, *(name for name, _ in notes)]))
    heads = [_cut(printable(token)) for token in attribution.targets]
    colours, read = shares(attribution).tolist(), attribution.read.tolist()
    cells = [
        [number(*cell) for cell in zip(*row, strict=True)]
        for row in zip(attribution.matrix.tolist(), read, strict=True)
    ]
    last = 0
    while last < n_shown:
        columns: list[tuple[int, int]] = []  # the target and its width
        used = first
        while last < n_shown:
            texts = [heads[last], *(row[last] for row in cells)]
            texts += [number(values[last]) for _, values in notes]
            wide = max(map(width_of, texts))
            if columns and used + wide + 2 > width:
                break
            columns.append((last, wide))
            used, last = used + wide + 2, last + 1
        yield _line("", [(Cell(heads[t]), w) for t, w in columns], first)
        for label, row, shade, seen in zip(labels, cells, colours, read, strict=True):
            if any(seen[t] for t, _ in columns):
                drawn = [(Cell(row[t], shade[t]), w) for t, w in columns]
                yield _line(label, drawn, first)
        for name, values in notes:
            yield _line(name, [(Cell(number(values[t])), w) for t, w in columns], first)
        if last < n_shown:
            yield []


def _line(label: str, cells: Sequence[tuple[Cell, int]], first: int) -> list[Cell]:
    line = [Cell(label + " " * (first - width_of(label)))]
    for cell, wide in cells:
        line += [Cell("  "), Cell(" " * (wide - width_of(cell.text)) + cell.text, cell.share)]
    return line


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 2] + ".."


def _show_rich(lines: Sequence[Sequence[Cell]], out: TextIO) -> bool:
    """False where rich is not installed."""
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        return False
    console = Console(file=out, highlight=False)
    for line in lines:
        text = Text()
        for cell in line:
            level = 0 if cell.share is None else level_of(cell.share)
            colour = colour_of(level)
            text.append(cell.text, style=f"{ink_on(colour)} on {colour}" if level else "")
        console.print(text, soft_wrap=True)  # rich itself honours NO_COLOR and TERM
    return True


# -- the page -----------------------------------------------------------------------------------

RULES = (
    ".opa{font-family:monospace;color:black;background:white;padding:.5em}"
    ".opa span,.opa th{white-space:pre;font-weight:normal}"
    ".opa td{text-align:right;padding:0 .4em}"
)


def html(attributions: Sequence[Attribution]) -> str:
    """A page by itself, without script or link: of each text its tokens, coloured by their mean
    share over the targets, and below them the matrix where it is not too large."""
    levels = [(level, colour_of(level)) for level in range(-LEVELS, LEVELS + 1) if level]
    rules = RULES + "".join(
        f".opa .{_class(level)}{{background:{colour};color:{ink_on(colour)}}}"
        for level, colour in levels
    )
    body = "".join(_section(each) for each in attributions)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Attribution</title>'
        f'<style>{rules}</style></head><body><div class="opa">{body}</div></body></html>\n'
    )


def _section(attribution: Attribution) -> str:
    share = shares(attribution)
    told = f"<h2>{_escaped(title_of(attribution))}</h2>\n"
    mean = share.nanmean(1).tolist()
    spans = (_tag("span", _visible(t), m) for t, m in zip(attribution.tokens, mean, strict=True))
    told += f"<p>{''.join(spans)}</p>\n"
    if share.numel() > MAX_CELLS:
        return told + "<p>The matrix is too large for a page; JSON and PNG have it.</p>\n"
    heads = "".join(f"<th>{_escaped(_visible(token))}</th>" for token in attribution.targets)
    rows = [f"<tr><th></th>{heads}</tr>"]
    matrix, read = attribution.matrix.tolist(), attribution.read.tolist()
    for token, values, line, seen in zip(
        attribution.tokens, matrix, share.tolist(), read, strict=True
    ):
        cells = (
            _tag("td", number(v), s) if r else "<td></td>"
            for v, s, r in zip(values, line, seen, strict=True)
        )
        rows.append(f"<tr><th>{_escaped(_visible(token))}</th>{''.join(cells)}</tr>")
    for name, values in notes_of(attribution):
        cells = (f"<td>{number(v)}</td>" for v in values)
        rows.append(f"<tr><th>{_escaped(name)}</th>{''.join(cells)}</tr>")
    lines = "\n".join(rows)
    return f"{told}<p>Rows are read, columns predicted.</p>\n<table>{lines}</table>\n"


def _tag(name: str, text: str, share: float) -> str:
    level = level_of(share)
    kind = f' class="{_class(level)}"' if level else ""
    return f"<{name}{kind}>{_escaped(text)}</{name}>"


def _class(level: int) -> str:
    return f"{'p' if level > 0 else 'n'}{abs(level)}"


def _escaped(text: str) -> str:
    return escaping.escape(text, quote=False)


def _visible(text: str) -> str:
    """With line ends, control characters and the like escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -- the picture --------------------------------------------------------------------------------


def write_png(path: Path, attribution: Attribution) -> None:
    """Write the matrix as a heat map, whole or not at all."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n_rows, n_columns = attribution.matrix.shape
    size = (min(20.0, 3.5 + 0.3 * n_columns), min(20.0, max(3.6, 2.2 + 0.22 * n_rows)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    signed = bool((attribution.matrix < 0).any())
    ends = [BELOW, "white", ABOVE] if signed else ["white", ABOVE]
    colours = LinearSegmentedColormap.from_list("shares", ends).with_extremes(bad="0.9")
    shown = axes.imshow(
        shares(attribution).numpy(), cmap=colours, vmin=-1 if signed else 0, vmax=1,
        aspect="auto", interpolation="nearest",
    )  # fmt: skip
    lost = (~attribution.matrix.isfinite() & attribution.read).nonzero()
    axes.plot(lost[:, 1], lost[:, 0], "x", color="black", scalex=False, scaley=False)
    _label(axes.xaxis, attribution.targets, rotation=90)
    _label(axes.yaxis, attribution.tokens)
    axes.set(xlabel="predicted", ylabel="read")
    bar = figure.colorbar(shown)
    bar.set_label("share of the column's largest magnitude", fontsize=8)
    figure.suptitle(title_of(attribution), fontsize=9, wrap=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token of a script without a font
        replace(path, lambda new: figure.savefig(new, format="png", dpi=130))


def _label(axis: Any, tokens: Sequence[str], **how: Any) -> None:
    """Each token, or every n-th where there are many."""
    step = -(-len(tokens) // MAX_LABELS)
    places = range(0, len(tokens), step)
    labels = [_cut(_visible(tokens[i]).replace(" ", "\u00b7")) for i in places]
    axis.set_ticks(list(places), labels, fontsize=7, family="monospace", parse_math=False, **how)
