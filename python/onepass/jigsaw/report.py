"""The picture of a protected text: how far each token moved, where to, and what an attack found."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..cli.files import replace
from ..training.curves import COLOURS
from .protection import Protection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, VERMILION, GREEN, PURPLE = COLOURS[:4]
GREY, PALE = "0.35", "0.78"
MAX_BARS = 48
MAX_LINES = 48  # from clean to noisy
N_ROWS = 1000  # of the vocabulary
LABEL = 14  # characters


def write_png(path: Path, done: Protection, texts: Sequence[str], model: nn.Module) -> None:
    """Write the picture, whole or not at all.

    Args:
        done: of `protect`, texts: its tokens as text, model: for its embeddings.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8.4), layout="constrained")
    axes: dict[str, Axes] = figure.subplot_mosaic(
        [["bars", "bars"], ["map", "ranks"]], height_ratios=(1, 1.25)
    )
    _bars(axes["bars"], done, texts)
    _map(axes["map"], done, vocabulary_sample(model))
    _ranks(axes["ranks"], done, model.get_input_embeddings().weight.shape[0])  # type: ignore[operator, union-attr]
    for one in axes.values():
        one.spines[["top", "right"]].set_visible(False)
    totals = done.totals()
    draws = f", mean of {done.n_draws} draws" if done.n_draws > 1 else ""
    known = ""
    if "recovered_informed" in totals:
        known = f"; {totals['recovered_informed']:.1%} by one who has the transform"
    figure.suptitle(
        f"Nearest-embedding attack, L2 or cosine: {totals['recovered_either']:.1%} of"
        f" {totals['transformed']} transformed tokens recovered{known}{draws}"
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a token of a script without a font
        replace(path, lambda new: figure.savefig(new, format="png", dpi=130))


def vocabulary_sample(model: nn.Module, n: int = N_ROWS) -> Tensor:
    """At most n rows of the vocabulary, evenly apart, as the embedding layer gives them, [n, D]."""
    layer: Any = model.get_input_embeddings()  # type: ignore[operator]
    size = layer.weight.shape[0]
    ids = torch.linspace(0, size - 1, min(n, size), device=layer.weight.device).long()
    with torch.no_grad():
        rows: Tensor = layer(ids).float()
    return rows


def principal_axes(rows: Tensor, n: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(mean [D], axes [D, n], share of the variance along each [n]) of rows [R, D]."""
    mean = rows.mean(0)
    _, sizes, axes = torch.linalg.svd(rows - mean, full_matrices=False)
    variance = sizes.square()
    return mean, axes[:n].T, variance[:n] / variance.sum().clamp_min(1e-30)


def _bars(axes: Axes, done: Protection, texts: Sequence[str]) -> None:
    """Distance over norm of each token, of several draws the mean."""
    from matplotlib.patches import Patch

    n = min(len(texts), MAX_BARS)
    heights = done.relative_distance.mean(0)[:n].tolist()
    hit = done.recovered["either"].any(0)[:n].tolist()
    sent = done.noise_mask[:n].tolist()
    given = [h and s for h, s in zip(hit, sent, strict=True)]
    bars = axes.bar(range(n), heights, color=[VERMILION if g else BLUE for g in given])
    for bar, is_given in zip(bars, given, strict=True):
        if is_given:
            bar.set_hatch("////")
            bar.set_edgecolor("white")
    clear = [i for i in range(n) if not sent[i]]
    if clear:
        axes.plot(clear, [0] * len(clear), "x", color=GREY, label="sent as it is")
    axes.set_xticks(range(n))
    labels = [repr(t if len(t) <= LABEL else t[: LABEL - 2] + "..") for t in texts[:n]]
    axes.set_xticklabels(labels, rotation=90, fontsize=7, family="monospace", parse_math=False)
    axes.set_xlim(-0.7, n - 0.3)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("distance / |clean embedding|")
    which = f", the first {n} of {len(texts)} tokens" if n < len(texts) else ""
    of = "mean movement" if done.n_draws > 1 else "movement"
    axes.set_title(f"{of.capitalize()} of each token{which}")
    ever = " in any draw" if done.n_draws > 1 else ""
    shown = [Patch(color=BLUE, label="not recovered")]
    shown.append(
        Patch(facecolor=VERMILION, hatch="////", edgecolor="white", label=f"recovered{ever}")
    )
    axes.legend(
        handles=[*shown, *axes.lines],
        frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.1,
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.3)


def _map(axes: Axes, done: Protection, rows: Tensor) -> None:
    """Clean and noisy embeddings of the first draw over the vocabulary, on its principal axes."""
    mean, directions, shares = principal_axes(rows)

    def flat(x: Tensor) -> tuple[list[float], list[float]]:
        first, second = ((x.float() - mean) @ directions).T.tolist()
        return first, second

    moved = done.noise_mask.nonzero()[:MAX_LINES, 0]
    hit = done.recovered["either"][0][moved].tolist()
    clean, noisy = flat(done.clean[moved]), flat(done.noisy[moved])
    axes.scatter(
        *flat(rows), s=6, color=PALE, linewidths=0, label=f"vocabulary, {len(rows)} rows", zorder=1
    )
    for i, is_hit in enumerate(hit):
        line = {"color": VERMILION if is_hit else BLUE, "alpha": 0.45, "linewidth": 0.8}
        style = "--" if is_hit else "-"
        ends = ([clean[0][i], noisy[0][i]], [clean[1][i], noisy[1][i]])
        axes.plot(*ends, style, zorder=2, **line)  # type: ignore[arg-type]
    axes.scatter(*clean, s=22, color=GREY, marker="o", label="clean", zorder=3)
    for wanted, colour, marker, name in (
        (False, BLUE, "^", "transformed"),
        (True, VERMILION, "X", "transformed and recovered"),
    ):
        at = [i for i, is_hit in enumerate(hit) if is_hit is wanted]
        if at:
            x, y = [noisy[0][i] for i in at], [noisy[1][i] for i in at]
            axes.scatter(
                x, y, s=34, color=colour, marker=marker, edgecolors="white", linewidths=0.5,
                label=name, zorder=4,
            )  # fmt: skip
    axes.set_aspect("equal", adjustable="datalim")
    labels = [
        f"axis {k} ({share:.1%} of the vocabulary's variance)"
        for k, share in zip("12", shares.tolist(), strict=True)
    ]
    axes.set(xlabel=labels[0], ylabel=labels[1])
    n = int(done.noise_mask.sum())
    which = f", the first {len(moved)} of {n} tokens" if len(moved) < n else ""
    which += ", first draw" if done.n_draws > 1 else ""
    axes.set_title(f"Embeddings along 2 of {rows.shape[1]} principal axes{which}")
    axes.legend(frameon=False, fontsize=8, loc="best")
    axes.grid(alpha=0.3)


def _ranks(axes: Axes, done: Protection, vocab_size: int) -> None:
    """Where the true token stands in the attacks' order, over all draws."""
    decades = [10**k for k in range(1, 12) if 10**k <= vocab_size]
    edges = [1, 2, *decades, vocab_size + 1]
    bins = list(zip(edges[:-1], edges[1:], strict=True))
    places = torch.arange(len(bins), dtype=torch.float64)
    styles = {
        "l2": (BLUE, "", "nearest by L2"),
        "cosine": (GREEN, "....", "nearest by cosine"),
        "informed": (PURPLE, "\\\\\\\\", "by one who has the transform"),
    }
    width = 0.8 / len(done.ranks)
    for i, metric in enumerate(done.ranks):
        colour, hatch, label = styles[metric]
        ranks = done.ranks[metric][:, done.noise_mask].flatten().cpu()
        n = max(1, len(ranks))
        shares = [float(((ranks >= low) & (ranks < high)).sum()) / n for low, high in bins]
        at = (places + (i - (len(done.ranks) - 1) / 2) * width).tolist()
        style = {"color": colour, "hatch": hatch, "edgecolor": "white"}
        axes.bar(at, shares, width, label=label, **style)  # type: ignore[arg-type]
    chance = [(high - low) / vocab_size for low, high in bins]
    axes.plot(
        places.tolist(), chance, linestyle="none", marker="_", markersize=20, markeredgewidth=2,
        color="black", label="by chance",
    )  # fmt: skip
    names = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in bins]
    axes.set_xticks(places.tolist(), names, rotation=45, ha="right", fontsize=8)
    axes.set_ylim(0, 1)
    axes.set_xlabel(f"rank among the {vocab_size:,} of the vocabulary; 1 is recovered")
    axes.set_ylabel("share of transformed tokens")
    axes.set_title("Rank of the true token in the attack's eyes", pad=24)
    axes.legend(
        frameon=False, fontsize=8, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1),
        columnspacing=1, handletextpad=0.5,
    )  # fmt: skip
    axes.grid(axis="y", alpha=0.3)
