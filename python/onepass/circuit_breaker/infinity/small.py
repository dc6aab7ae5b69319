"""The model and prompts of a run that names none: captions, and a small model of their pictures.

What is already complete in the folder is left as it is.
"""

from __future__ import annotations

import json
from pathlib import Path

from ...cli.files import replace_text
from ...training.made_once import wait_for
from ...training.run_folder import RunFolder, is_main_process, tell
from .captions import captions
from .config import CONFIG, WEIGHTS

MODEL, DATA = "base-model", "data"  # to be named in RunFolder.begin's `writes`
FILES = {  # name of the file, field of its entries
    "benign": ("sanitized_prompts.json", "sanitized_prompt"),
    "harmful": ("harmful_prompts.json", "prompt"),
}


def write_prompts(folder: Path) -> None:
    """Every caption of either kind, in the documented format."""
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (name, field) in FILES.items():
        prompts = [{field: caption} for caption in captions(kind)]
        text = json.dumps({"category": "general", "prompts": prompts}, indent=1)
        replace_text(folder / name, text + "\n")


def small_image_model(run: RunFolder, seed: int, steps: int) -> Path:
    """The folder of the model, made here unless it is there; the prompts lie in DATA beside it."""
    model, data = run.path / MODEL, run.path / DATA
    wanted = [
        *(model / name for name in (CONFIG, WEIGHTS)),
        *(data / name for name, _ in FILES.values()),
    ]

    def is_complete() -> bool:
        return all(path.is_file() for path in wanted)

    if is_complete():
        return model
    if not is_main_process():
        wait_for(is_complete, str(model))
        return model
    from ...cli.terminal import progress_bar
    from ...demo.train import one_thread
    from .pretrain import pretrain, small_model

    write_prompts(data)
    tell(f"no --model given: training a small one on pictures, {steps} steps, under a minute")
    made = small_model(seed)
    bar = progress_bar(steps, 0)
    with one_thread():
        losses = pretrain(made, steps=steps, seed=seed, after_step=lambda *_: bar.update())
    bar.close()
    tell(f"small model: nats per label: {losses[-1]:.2f}, untrained {losses[0]:.2f}")
    run.save(made.save_pretrained, MODEL)
    return model
