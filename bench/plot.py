"""A PNG from a file of benchmark rows: speed and peak memory of each provider against eager.

Left, how many times faster than eager (bars start at 1: to the right is faster); right, the share
of eager's peak memory. Colours are Okabe and Ito's, which colour-blind readers tell apart.
"""

from __future__ import annotations

from pathlib import Path

from .report import NotRows, Row, groups, ratio, replacing

COLOURS = {
    "onepass": "#0072B2",
    "onepass-torch": "#56B4E9",
    "onepass-separate": "#56B4E9",
    "onepass-one-loss": "#56B4E9",
    "compile": "#E69F00",
    "native": "#999999",
    "native-chunked": "#999999",
    "gemms": "#000000",
    "liger-kernel": "#009E73",
    "quack-kernels": "#CC79A7",
    "cut-cross-entropy": "#D55E00",
    "trl": "#F0E442",
}
HATCHES = {"onepass-separate": "///", "onepass-one-loss": "..."}
BAR = 0.17  # inches
GAP = 0.2  # inches between the groups


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture of `rows` to `path`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = {
        key: by_provider
        for key, by_provider in groups(rows).items()
        if by_provider.get("eager", {}).get("ms") is not None
    }
    if not shown:
        raise NotRows("no case has a timed eager provider, and every bar is relative to it")

    bars: list[tuple[float, Row, Row]] = []  # y in inches from the top, row, eager's row
    labels: list[tuple[float, str]] = []
    y = GAP
    for (case, size, mode), by_provider in shown.items():
        eager = by_provider["eager"]
        drawn = [
            row
            for name, row in by_provider.items()
            if name in COLOURS and row["status"] in ("ok", "refused", "failed")
        ]
        labels.append((y + BAR * len(drawn) / 2, f"{case} ({mode})\n{size}"))
        for row in drawn:
            bars.append((y + BAR / 2, row, eager))
            y += BAR
        y += max(GAP, 2.4 * BAR - BAR * len(drawn))  # two lines of label need their room

    top, bottom = 0.95, 0.5
    figure = Figure(figsize=(11, y + top + bottom), dpi=130, facecolor="white")
    figure.subplots_adjust(
        left=0.26, right=0.985, top=1 - top / (y + top + bottom), bottom=bottom / (y + top + bottom)
    )
    speed, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    figure.subplots_adjust(wspace=0.05)

    present: dict[str, None] = {}
    for at, row, eager in bars:
        name = row["provider"]
        present[name] = None
        style = {"color": COLOURS[name], "hatch": HATCHES.get(name), "height": 0.85 * BAR}
        faster, share = ratio(row, eager, "ms"), ratio(row, eager, "peak_mib")
        text = {"va": "center", "fontsize": 6.5, "color": "#222222"}
        if faster is None:
            speed.text(1.02, at, f"{name} {row['status']}", style="italic", **text)
            continue
        speed.barh(at, faster - 1, left=1, edgecolor="white", linewidth=0.3, **style)
        speed.annotate(
            f"{faster:.2f}x",
            (faster, at),
            xytext=(3 if faster >= 1 else -3, 0),
            textcoords="offset points",
            ha="left" if faster >= 1 else "right",
            **text,
        )
        if share is not None:
            memory.barh(at, share, edgecolor="white", linewidth=0.3, **style)
            memory.annotate(
                f"{share:.2f}x" if share >= 0.005 else "<0.01x",
                (share, at),
                xytext=(3, 0),
                textcoords="offset points",
                **text,
            )

    ratios = [r for _, row, eager in bars if (r := ratio(row, eager, "ms")) is not None] or [1.0]
    low, high = min(0.8, min(ratios) / 1.5), max(1.3, max(ratios) * 1.5)
    ticks = [t for t in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)]
    ticks = [t for t in ticks if low <= t <= high]
    speed.set_xscale("log")
    speed.set_xlim(low, high)
    speed.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    speed.minorticks_off()
    speed.set_xlabel("speed relative to eager (higher is better)", fontsize=8)
    memory.set_xlim(0, max(1.15, *memory.get_xlim()) * 1.08)
    memory.set_xlabel("peak memory relative to eager (lower is better)", fontsize=8)
    speed.set_ylim(y, 0)
    speed.set_yticks([at for at, _ in labels], [label for _, label in labels], fontsize=7)
    for axis in (speed, memory):
        axis.axvline(1, color="black", linewidth=0.8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.tick_params(axis="x", labelsize=7)
        axis.tick_params(axis="y", length=0)
        axis.spines[["top", "right", "left"]].set_visible(False)

    first = next(iter(shown.values()))["eager"]
    figure.suptitle(
        f"{first['device']}, torch {first['torch']}, {first['date'][:10]}; black line: eager torch",
        fontsize=9,
        y=1 - 0.16 / (y + top + bottom),
    )
    handles = [
        Patch(facecolor=COLOURS[n], hatch=HATCHES.get(n), edgecolor="white", label=n)
        for n in COLOURS
        if n in present
    ]
    figure.legend(
        handles=handles,
        loc="upper center",
        ncols=len(handles),
        frameon=False,
        fontsize=7.5,
        bbox_to_anchor=(0.5, 1 - 0.35 / (y + top + bottom)),
    )
    FigureCanvasAgg(figure)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
