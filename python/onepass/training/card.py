"""The README.md of what a run made, with the metadata that the Hub reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .run_folder import versions


def model_card(
    title: str,
    *,
    base_model: str,
    tags: Sequence[str],
    text: str,
    facts: Mapping[str, Mapping[str, Any]],
) -> str:
    """A model card: what it is, what it was made with.

    Args:
        base_model: a Hub id goes into the metadata; a local folder is named in the text only.
        facts: settings by name, each group a table.
    """
    from huggingface_hub import ModelCardData

    on_the_hub = not Path(base_model).exists() and bool(base_model)
    data = ModelCardData(
        base_model=base_model if on_the_hub else None,
        library_name="peft",
        tags=["onepass", *tags],
    )
    lines = ["---", data.to_yaml(), "---", "", f"# {title}", "", text, ""]
    if not on_the_hub:
        lines += [f"Base model: a local folder, `{Path(base_model).name}`.", ""]
    for name, group in {**facts, "versions": versions()}.items():
        if not group:
            continue
        lines += [f"| {name} | |", "|---|---|"]
        cells = ([str(cell).replace("|", r"\|") for cell in row] for row in group.items())
        lines += [f"| {key} | {value} |" for key, value in cells] + [""]
    return "\n".join(lines)
