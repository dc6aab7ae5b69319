"""Checkpoints: `checkpoint-<step>/`, complete or absent, readable without this package.

A folder holds the model as transformers loads it, `adapter/` as peft saves it, `tokenizer.json`,
the optimizer's moments as safetensors and everything else as `state.json`. It is written under a
temporary name and renamed; only then is the one before it removed.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

PROGRAM = "onepass demo"
SCHEMA = 1
STATE = "state.json"
PARTIAL = ".checkpoint-partial-"


@dataclass
class State:
    """What a run has come to; with the weights and the optimizer it is all that is needed."""

    settings: Settings
    seed: int
    text: str  # fingerprint of the rows
    step: int = 0  # of both stages together
    notes: list[dict[str, float]] = field(default_factory=list)  # one entry a step
    curve: list[dict[str, Any]] = field(default_factory=list)  # one entry an evaluation
    seconds: dict[str, float] = field(default_factory=dict)  # of each stage, over all resumptions


class CannotResume(Exception):
    """There is no checkpoint, or not one that this version can go on from."""


def find(output: Path) -> Path | None:
    """The newest checkpoint of this program in `output`."""
    # By time, not by step: a run killed before it could clear away an older, longer one's.
    ours = [
        ((folder / STATE).stat().st_mtime_ns, step, folder)
        for step, folder in _folders(output)
        if _is_ours(folder)
    ]
    return max(ours)[-1] if ours else None


def foreign(output: Path) -> Path | None:
    """A folder in `output` with a checkpoint's name that another program made."""
    return next((folder for _, folder in _folders(output) if not _is_ours(folder)), None)


def _folders(output: Path) -> list[tuple[int, Path]]:
    named = [(p.name.removeprefix("checkpoint-"), p) for p in output.glob("checkpoint-*")]
    return [(int(step), folder) for step, folder in named if step.isdecimal()]


def _is_ours(folder: Path) -> bool:
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return state["program"] == PROGRAM
    except (OSError, ValueError, TypeError, KeyError):
        return False


def remove_partial(output: Path) -> None:
    """Clear away what a killed run was writing."""
    for folder in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> State:
    """The state in `folder`; CannotResume where another version wrote it."""
    raw = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if raw.get("schema") != SCHEMA:
        raise CannotResume(
            f"{folder} was written by another version of onepass; run again without --resume"
        )
    names = {f.name for f in fields(Settings)}
    if set(raw["settings"]) != names:
        raise CannotResume(
            f"{folder} was made with other settings than this version has;"
            " run again without --resume"
        )
    values: dict[str, Any] = {k: _value(v) for k, v in raw["settings"].items()}
    settings = Settings(**values)
    rest = {f.name: raw[f.name] for f in fields(State) if f.name != "settings"}
    return State(settings=settings, **rest)


def _value(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def save(
    output: Path,
    state: State,
    *,
    tokenizer: Tokenizer,
    model: LlamaForCausalLM,
    weights: dict[str, torch.Tensor],
    adapted: PeftModel | None,
    optimizer: torch.optim.Optimizer,
) -> Path:
    """Write `checkpoint-<step>` and remove the others; `weights` are the model's own, no LoRA."""
    from safetensors.torch import save_file

    temporary = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=output))
    try:
        # Not model.save_pretrained: under an adapter it writes the configuration, no weights.
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save(str(temporary / "tokenizer.json"))
        if adapted is not None:
            # "auto" would ask the hub whether the vocabulary was resized
            adapted.save_pretrained(str(temporary / "adapter"), save_embedding_layers=False)
            (temporary / "adapter" / "README.md").unlink(missing_ok=True)  # an unfilled form
        save_file(_flat(optimizer), temporary / "optimizer.safetensors")
        text = {"program": PROGRAM, "schema": SCHEMA, **asdict(state)}
        (temporary / STATE).write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o777 & ~_umask())  # mkdtemp's 0700 is for secrets
        final = output / f"checkpoint-{state.step}"
        if _is_ours(final):  # an earlier run's; rename replaces no folder with files in it
            shutil.rmtree(final)
        temporary.rename(final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for _, folder in _folders(output):
        if folder != final and _is_ours(folder):
            shutil.rmtree(folder)
    return final


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flat(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as one level of tensors, named `<parameter's number>.<field>`."""
    state = optimizer.state_dict()["state"]
    return {f"{n}.{k}": v.contiguous() for n, entry in state.items() for k, v in entry.items()}


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    from safetensors.torch import load_file

    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_weights(folder: Path, model: LlamaForCausalLM) -> None:
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"))


def load_adapter(folder: Path, adapted: PeftModel) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(adapted, load_file(folder / "adapter" / "adapter_model.safetensors"))
