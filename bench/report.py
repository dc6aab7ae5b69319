"""Rows of results: their file, their tables, and their export in Liger's columns.

A row is one provider at one case, size and mode. Providers that were refused, failed, are not
installed or cannot run here have rows too, with `status` and `why` in place of numbers.
"""

from __future__ import annotations

import csv
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ..cli.table import render

Row = dict[str, Any]

# The row schema. The first sixteen are the ones to plot by; the rest say how they came about.
FIELDS = (
    *("case", "provider", "mode", "N", "V", "D", "dtype"),
    *("ms", "ms_p20", "ms_p80", "peak_mib", "gbps"),
    *("device", "torch", "triton", "provider_version", "commit", "date"),
    *("size", "status", "why", "reps", "host_ms", "first_call_s"),
    *("output_error", "gradient_error", "reference", "in_place"),
    *("threads", "load", "python", "onepass"),
    *("masked", "inputs", "gemm_units", "flops", "bytes", "launches"),
    *("predicted_ms", "predicted_on"),
    *("processes", "backend", "collectives"),  # of --distributed
)
STATUSES = ("ok", "refused", "failed", "not installed", "not here", "not run")


class NotRows(ValueError):
    """A file that does not hold benchmark rows; the message says what it holds."""


def read_rows(path: Path) -> list[Row]:
    """The rows in `path`."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise NotRows(
            f"{path} is not JSON ({error}); wanted a file that onepass bench wrote"
        ) from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) and "case" in r for r in rows):
        raise NotRows(f"{path} is JSON but no list of benchmark rows; move it away or name another")
    return rows


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends without error."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}.", suffix=path.suffix)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def append_rows(path: Path, rows: Iterable[Row]) -> None:
    """Add `rows` to the file, which is whole at every moment: written beside it, then renamed."""
    everything = (read_rows(path) if path.exists() else []) + list(rows)
    with replacing(path) as temporary:
        lines = ",\n".join(json.dumps(row) for row in everything)  # one row a line: diffs read well
        temporary.write_text(f"[\n{lines}\n]\n" if everything else "[]\n", encoding="utf-8")


def file_name(device: str) -> str:
    """`NVIDIA H200` -> `nvidia-h200.json`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


Group = tuple[str, str, str]


def groups(rows: Iterable[Row]) -> dict[Group, dict[str, Row]]:
    """The newest row of each provider by (case, size, mode), in the order of first appearance."""
    result: dict[Group, dict[str, Row]] = {}
    for row in rows:
        result.setdefault((row["case"], row["size"], row["mode"]), {})[row["provider"]] = row
    return result


def ratio(row: Row, baseline: Row | None, field: str) -> float | None:
    """baseline / row for `ms` (times faster), row / baseline for memory (share of its peak)."""
    ours, theirs = row.get(field), baseline.get(field) if baseline else None
    if ours is None or theirs is None:
        return None
    above, below = (theirs, ours) if field == "ms" else (ours, theirs)
    return above / below if below else None


def _number(value: float | None, digits: int = 3) -> str | None:
    """Three significant digits without an exponent."""
    if value is None:
        return None
    if value >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}" if value >= 1e-3 else f"{value:.1e}"


def print_details(rows: list[Row], stream: TextIO | None = None) -> None:
    """Every row with its spread, memory and bandwidth."""
    lines = []
    for (case, size, mode), by_provider in groups(rows).items():
        eager = by_provider.get("eager")
        for name, row in by_provider.items():
            faster, share = ratio(row, eager, "ms"), ratio(row, eager, "peak_mib")
            spread = None
            if row["ms"] is not None:
                spread = f"{_number(row['ms_p20'])}-{_number(row['ms_p80'])}"
            note = row["why"] or ("writes over its input" if row["in_place"] else "")
            lines.append(
                (
                    *(case, size, mode, name, _number(row["ms"]), spread),
                    f"{faster:.2f}x" if faster else None,
                    _number(row["peak_mib"]),
                    f"{share:.2f}x" if share is not None else None,
                    _number(row["gbps"]),
                    note if row["status"] == "ok" else f"{row['status']}: {note}".rstrip(": "),
                )
            )
    columns = ("case", "size", "mode", "provider", "ms", "20-80 %", "speed", "peak MiB")
    render("", (*columns, "memory", "GB/s", "note"), lines, stream=stream)


def print_rooflines(rows: Iterable[Row], stream: TextIO | None = None) -> None:
    """The least that each case costs, what a card would need for it, and on that card its share."""
    lines, cards = [], []
    for row in rows:
        if row.get("launches") is None and not row.get("gemm_units"):
            continue
        predicted, measured, card = row["predicted_ms"], row["ms"], row["predicted_on"]
        cards.append(card)
        is_there = card in row["device"] and measured is not None and predicted is not None
        lines.append(
            (
                *(row["case"], row["size"], row["mode"], row["provider"]),
                str(row["gemm_units"]) if row["gemm_units"] else None,
                _number(row["flops"] / 1e9) if row["flops"] else None,
                _number(row["bytes"] / 1e6),
                None if row["launches"] is None else str(row["launches"]),
                _number(predicted),
                _number(measured) if is_there else None,
                f"{measured / predicted:.2f}" if is_there else None,
            )
        )
    if not lines:
        return
    names = " and ".join(dict.fromkeys(cards))
    title = f"roofline: what has to be done, and what {names} would need for it (a prediction)"
    heads = ("case", "size", "mode", "provider", "GEMM units", "GFLOP", "MB", "launches")
    render(title, (*heads, "predicted ms", "measured", "/ predicted"), lines, stream=stream)


def print_collectives(rows: Iterable[Row], stream: TextIO | None = None) -> None:
    """What a rank puts into collectives, as measured, and whether the formula says so."""
    lines = []
    for row in rows:
        for sent in row["collectives"] or ():
            said = (sent["formula_count"], sent["formula_bytes"])
            fits = said == (sent["count"], sent["bytes"])
            lines.append(
                (
                    *(row["case"], row["size"], row["provider"], sent["pass"], sent["kind"]),
                    *(str(sent["count"]), f"{sent['bytes']:,}"),
                    None if said[0] is None else "ok" if fits else f"{said[0]}: {said[1]:,}",
                )
            )
    title = "collectives: what one rank puts in, from torch's profiler (docs/scaling.md)"
    heads = ("case", "size", "provider", "pass", "collective", "count", "bytes", "formula")
    render(title, heads, lines, stream=stream)


def print_summary(rows: list[Row], stream: TextIO | None = None) -> None:
    """Milliseconds and the speed relative to eager: a line a case, a column a provider."""
    tried = ("ok", "refused", "failed")
    providers = list(dict.fromkeys(r["provider"] for r in rows if r["status"] in tried))
    if "eager" in providers:  # the yardstick, then the rest
        providers = ["eager", *(p for p in providers if p != "eager")]

    def cell(by_provider: dict[str, Row], name: str) -> str | None:
        row = by_provider.get(name)
        if row is None or row["status"] not in tried:
            return None
        if row["status"] != "ok":
            return str(row["status"])
        faster = ratio(row, by_provider.get("eager"), "ms")
        time = _number(row["ms"]) or ""
        return time if name == "eager" or faster is None else f"{time} ({faster:.2f}x)"

    lines = [
        (f"{case} {size}", mode, *(cell(by_provider, name) for name in providers))
        for (case, size, mode), by_provider in groups(rows).items()
    ]
    title = "milliseconds, median (how many times faster than eager)"
    render(title, ("case", "mode", *providers), lines, stream=stream)


# Liger's benchmark CSV, so that its visualizer reads these results.
LIGER_COLUMNS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit"),
    *("x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80"),
    *("extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version"),
)


def write_csv(rows: Iterable[Row], path: Path) -> None:
    """Rows that were timed, in the columns of Liger-Kernel's all_benchmark_data.csv."""
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, LIGER_COLUMNS)
        writer.writeheader()
        for row in rows:
            if row["status"] != "ok":
                continue
            x = ("V", "vocabulary size") if row["V"] is not None else ("D", "hidden size")
            common = {
                "kernel_name": row["case"],
                "kernel_provider": row["provider"],
                "kernel_operation_mode": row["mode"],
                "x_name": x[0],
                "x_label": x[1],
                "x_value": row[x[0]],
                "extra_benchmark_config_str": json.dumps({"size": row["size"]}),
                "gpu_name": row["device"],
                "timestamp": row["date"].replace("T", " ")[:19],
                "liger_version": row["provider_version"] if "liger" in row["provider"] else "",
            }
            metrics = [("speed", "ms", row["ms"], row["ms_p20"], row["ms_p80"])]
            if row["peak_mib"] is not None:
                metrics.append(("memory", "MB", *[row["peak_mib"]] * 3))
            for name, unit, median, low, high in metrics:
                values = {"y_value_50": median, "y_value_20": low, "y_value_80": high}
                writer.writerow(common | values | {"metric_name": name, "metric_unit": unit})
