"""What a finished run shows: curves.png of its metrics, summary.json and a table on stdout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..cli.files import replace
from ..cli.table import render
from .monitor import read_metrics
from .run_folder import CURVES, METRICS, PROGRAM, SCHEMA, SUMMARY, RunFolder, versions

# Okabe and Ito's: apart for colour-blind readers; the markers and dashes also in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS, DASHES = "os^Dvx", ("-", "--", "-.", ":", "-", "--")
# title, label of the y axis, {metric: label}, what goes to Axes.set (ylim=..., yscale=...)
Panel = tuple[str, str, Mapping[str, str], Mapping[str, Any]]


def write_curves(run: RunFolder, title: str, panels: Sequence[Panel]) -> None:
    """curves.png: two panels a row; a metric that was never logged is left out."""
    if not run.is_main:
        return
    from matplotlib.figure import Figure

    lines = read_metrics(run.path / METRICS)
    columns = min(len(panels), 2)
    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.8 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid, panels, strict=False):
        heading, ylabel, metrics, options = panel
        for i, (name, label) in enumerate(metrics.items()):
            points = [(x["step"], x[name]) for x in lines if x.get(name) is not None]
            if points:
                style = {"marker": MARKERS[i % 6], "linestyle": DASHES[i % 6], "markersize": 3}
                axes.plot(*zip(*points, strict=True), color=COLOURS[i % 6], label=label, **style)
        axes.set(title=heading, xlabel="training step", ylabel=ylabel, **options)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.lines:
            axes.legend(frameon=False)
    figure.suptitle(title)
    replace(run.path / CURVES, lambda new: figure.savefig(new, format="png", dpi=150))


def write_summary(
    run: RunFolder,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    **facts: Any,
) -> None:
    """summary.json with `facts`, and the table to stdout."""
    if not run.is_main:
        return
    head = {"program": PROGRAM, "schema": SCHEMA, "system": run.system, "versions": versions()}
    table = {"title": title, "columns": list(columns), "rows": [list(row) for row in rows]}
    run.write_json(SUMMARY, head | facts | {"table": table})
    render(title, columns, rows)
