"""What a finished run shows: a table and a verdict on stdout, `demo.json`, `curves.png`."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.files import replace, replace_text, strict_json
from ..cli.table import render
from .checkpoint import PROGRAM, SCHEMA, State
from .evaluate import Numbers
from .settings import Settings
from .stages import KINDS
from .tokens import Text

if TYPE_CHECKING:
    import torch
    from matplotlib.axes import Axes

# Okabe and Ito's blue and vermilion: apart for colour-blind readers and in grey.
COLOURS = {"code": "#D55E00", "prose": "#0072B2"}
MARKERS = {"code": "o", "prose": "s"}
BROKEN_BY = 1.0  # nats a token that code must lose for the verdict to call it broken
KEPT_WITHIN = 0.15  # and prose may change for it to be called kept
LABELS = {  # of short words, so that a terminal of 40 columns breaks none of them
    "nats_per_token": "nats per token",
    "nats_per_byte": "nats per byte",
    "cosine_target_layers": "cosine at target layer",
    "cosine_all_layers": "cosine at all layers",
}


def show(before: Numbers, after: Numbers) -> None:
    """The table and the verdict, to stdout."""
    rows = [
        [kind, label, *(f"{x:.3f}" for x in (old, new)), f"{new - old:+.3f}"]
        for kind in KINDS
        for name, label in LABELS.items()
        for old, new in [(before[kind][name], after[kind][name])]
    ]
    render("Held-out text, adapter off and on", ["text", "", "before", "after", "change"], rows)
    print(verdict(before, after))


def verdict(before: Numbers, after: Numbers) -> str:
    """What became of each kind, in one line that the thresholds above put into words."""
    change = {k: after[k]["nats_per_token"] - before[k]["nats_per_token"] for k in KINDS}
    code = "broken" if change["code"] > BROKEN_BY else "NOT broken"
    prose = "kept" if abs(change["prose"]) < KEPT_WITHIN else "NOT kept"
    return (
        f"code is {code} ({change['code']:+.2f} nats per token),"
        f" prose is {prose} ({change['prose']:+.2f} nats per token)"
    )


def memory(settings: Settings, vocab_size: int) -> str:
    """What became of the logits, in one line."""
    n_rows = len(KINDS) * settings.rows_of_each_kind * settings.window
    return f"no step kept its logits, {n_rows:,} x {vocab_size:,} of them (lazy_head)"


def write_json(
    path: Path, state: State, text: Text, before: Numbers, after: Numbers, device: torch.device
) -> None:
    """All numbers, what made them and how long it took."""
    from .. import __version__

    packages = ("torch", "transformers", "peft", "tokenizers", "safetensors", "matplotlib")
    report: dict[str, Any] = {
        "program": PROGRAM,
        "schema": SCHEMA,
        "verdict": verdict(before, after),
        "before": before,
        "after": after,
        "curve": state.curve,
        "curve_windows": state.settings.curve_rows,  # fewer than are behind before and after
        "steps": state.notes,
        "settings": asdict(state.settings),
        "seed": state.seed,
        "device": str(device),
        "text": text.sizes,
        "text_fingerprint": state.text,
        "seconds": state.seconds,
        "versions": {
            "python": platform.python_version(),
            "onepass": __version__,
            **{name: version(name) for name in packages},
        },
    }
    replace_text(path, strict_json(report, indent=1) + "\n")


def write_png(path: Path, state: State) -> None:
    """Cross-entropy over both stages; cosines over the second."""
    from matplotlib.figure import Figure

    switch = state.settings.lm_steps
    behind = f"({state.settings.curve_rows} windows)"
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for kind in KINDS:
        steps = [point["step"] for point in state.curve]
        style = {"color": COLOURS[kind], "marker": MARKERS[kind], "markersize": 4}
        nats = [point[kind]["nats_per_token"] for point in state.curve]
        left.plot(steps, nats, label=kind, **style)
        turned = [(s, p[kind]) for s, p in zip(steps, state.curve, strict=True) if s >= switch]
        cosines = [numbers["cosine_target_layers"] for _, numbers in turned]
        right.plot([s for s, _ in turned], cosines, label=kind, **style)
    left.set_title(f"Cross-entropy on held-out text {behind}")
    left.set_ylabel("nats per token")
    left.axvline(switch, color="0.5", linewidth=1, linestyle="--")
    left.annotate(
        "adapter starts", (switch, 0.97), xycoords=("data", "axes fraction"),
        xytext=(-5, 0), textcoords="offset points", ha="right", va="top", color="0.35",
    )  # fmt: skip
    layers = state.settings.target_layers
    plural = "layers" if len(layers) > 1 else "layer"
    which = f"{plural} {', '.join(map(str, layers))}"
    right.set_title(f"Cosine to the original states, {which} {behind}")
    right.set_ylabel("mean cosine")
    right.set_ylim(-0.3, 1.05)
    right.axhline(0, color="0.5", linewidth=1)
    for axes in (left, right):
        _finish(axes)
    figure.suptitle("A circuit breaker for source code: code breaks, prose stays")
    replace(path, lambda new: figure.savefig(new, format="png", dpi=150))


def _finish(axes: Axes) -> None:
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
