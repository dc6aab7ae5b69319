"""The model and data of a run that names none: a small Llama on what every Python brings along.

It learns the documentation (to retain) and the standard library's source code (the harmful side),
with the demo's own text, model and training loop, and is saved as transformers and anyone's JSON
reader take it. What is already complete in the folder is left as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.files import replace_text
from ..cli.terminal import progress_bar
from .made_once import wait_for
from .run_folder import RunFolder, is_main_process, tell

if TYPE_CHECKING:
    from ..demo.settings import Settings
    from ..demo.tokens import Rows, Text

MODEL, DATA = "base-model", "data"  # to be named in RunFolder.begin's `writes`
SIDES = {"retain": "prose", "harmful": "code"}


def data_files(folder: Path) -> dict[str, Path]:
    """Where the texts are: retain, harmful, retain_held_out, harmful_held_out."""
    names = [side + part for side in SIDES for part in ("", "_held_out")]
    return {name: folder / DATA / f"{name}.jsonl" for name in names}


def small_language_model(run: RunFolder, seed: int, fast: bool = False) -> Path:
    """The folder of the model, made here unless it is there; the texts lie in `data_files`."""
    model, files = run.path / MODEL, data_files(run.path)

    def is_complete() -> bool:
        return model.is_dir() and all(file.is_file() for file in files.values())

    if is_complete():
        return model
    if not is_main_process():
        wait_for(is_complete, str(model))
        return model
    import torch

    from ..cli.terminal import quiet_libraries
    from ..demo import settings, tokens
    from ..demo.train import one_thread

    size = settings.FAST if fast else settings.FULL
    with quiet_libraries(), one_thread():
        text = tokens.read_text(size, seed, torch.device("cpu"))
        (run.path / DATA).mkdir(parents=True, exist_ok=True)
        for side, kind in SIDES.items():
            for part, rows in (("", text.train), ("_held_out", text.held_out)):
                lines = [json.dumps({"text": chunk}) + "\n" for chunk in _chunks(text, rows[kind])]
                replace_text(files[side + part], "".join(lines))
        tell("no --model given: training a small one on text of this Python's own, about a minute")
        _train(run, text, size, seed)
    return model


def _chunks(text: Text, rows: Rows) -> Iterator[str]:
    """The windows as text; bytes of a character cut in two at an end are left out."""
    for ids, mask in zip(rows.ids.tolist(), rows.mask.tolist(), strict=True):
        chunk = text.tokenizer.decode([i for i, is_text in zip(ids, mask, strict=True) if is_text])
        if chunk := chunk.strip("\ufffd"):
            yield chunk


def _train(run: RunFolder, text: Text, size: Settings, seed: int) -> None:
    from transformers import PreTrainedTokenizerFast

    from .. import lazy_head, unlazy_head
    from ..demo import evaluate, stages, train
    from ..demo.model import language_model
    from ..demo.tokens import PADDING

    model = language_model(size, text.tokenizer.get_vocab_size(), seed)
    lazy_head(model)
    stage = stages.language_model_stage(model, text.train, size, seed)
    with progress_bar(stage.n_steps, 0) as bar:
        bar.set_description("small model")
        train.fit(
            stage,
            train.make_optimizer(stage),
            start=0,
            max_gradient_norm=size.max_gradient_norm,
            after_step=lambda step, notes: bar.update(),
        )
    found = evaluate.of_model(model, text.held_out, size.table_rows)
    told = ", ".join(f"{kind} {found[kind]['nats_per_token']:.2f}" for kind in SIDES.values())
    tell(f"small model: nats per held-out token: {told}")
    unlazy_head(model)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=text.tokenizer, pad_token=PADDING, model_max_length=size.window
    )

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    run.save(write, MODEL)
