"""frontier.png: a line a loss, its points by beta, the model that training started from a star."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..cli.files import replace
from ..training.curves import COLOURS, DASHES, MARKERS

BLACK = "black"


def write_chart(
    path: Path, start: Mapping[str, Any], points: Sequence[Mapping[str, Any]], reward: str
) -> None:
    """Write the picture, whole or not at all.

    Args:
        start, points: facts of `evaluate.measure`; points have a loss and a beta.
        reward: what it is called.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 5.2), layout="constrained")
    axes = figure.subplots()
    colours, markers, dashes = (*COLOURS, "0.45"), MARKERS + "P", (*DASHES, "-.")
    losses = list(dict.fromkeys(str(point["loss"]) for point in points))
    for n, loss in enumerate(losses):
        line = sorted((p for p in points if p["loss"] == loss), key=lambda p: p["beta"])
        x, y = [p["token_entropy"] for p in line], [p["reward"] for p in line]
        style: dict[str, Any] = {
            "color": colours[n % 7],
            "marker": markers[n % 7],
            "linestyle": dashes[n % 7],
        }
        axes.plot(x, y, label=loss, zorder=3, **style)
        errors = [p["reward_error"] or 0.0 for p in line]
        axes.errorbar(x, y, yerr=errors, fmt="none", ecolor=style["color"], alpha=0.5, capsize=2)
        for p in line:
            axes.annotate(
                f"{p['beta']:g}", (p["token_entropy"], p["reward"]), xytext=(5, 4),
                textcoords="offset points", fontsize=8, color=style["color"],
            )  # fmt: skip
    axes.errorbar(
        [start["token_entropy"]], [start["reward"]], yerr=[start["reward_error"] or 0.0],
        fmt="*", color=BLACK, markersize=14, capsize=2, label="the model as it is", zorder=4,
    )  # fmt: skip
    name = reward if len(reward) <= 40 else reward[:37] + "..."
    axes.set_xlabel("token entropy of the answers, nats")
    axes.set_ylabel(f"mean reward ({name}), with its standard error")
    axes.set_title("Reward against token entropy; the numbers are beta")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    replace(path, lambda new: figure.savefig(new, format="png", dpi=150))
