"""Checkpoints: `checkpoint-<step>/`, complete or absent, readable without this package.

A folder holds the model as transformers loads it, `adapter/` as peft saves it, `tokenizer.json`,
the optimizer's moments as safetensors and everything else as `state.json`. It is written under a
temporary name and renamed; only then is the one before it removed.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.errors import Failed, one_line
from .settings import Settings

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM

PROGRAM = "onepass demo"
SCHEMA = 1
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
REPORT, PICTURE = "demo.json", "curves.png"  # of a finished run
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


class CannotResume(Failed):
    """The checkpoint is damaged, or not one that this version can go on from."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what}; leave out --resume to begin again")


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
    ours = _says_ours(folder / STATE)
    # A file that cannot be read tells nothing; under these two names together it is ours, damaged.
    return (folder / OPTIMIZER).is_file() if ours is None else ours


def _says_ours(path: Path) -> bool | None:
    """Whether a JSON file names this program as its writer; None where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return None
    return isinstance(found, dict) and found.get("program") == PROGRAM


def foreign_report(output: Path) -> Path | None:
    """The file in the place of the report that another program made."""
    report = output / REPORT
    return report if report.exists() and not _says_ours(report) else None


def earlier_run(output: Path) -> float | None:
    """When the newest file of an earlier run in `output` was written; None without such a run."""
    folder = find(output)
    files = [output / REPORT, *([folder / STATE] if folder else [])]
    return max((file.stat().st_mtime for file in files if file.exists()), default=None)


def remove_results(output: Path) -> None:
    """Remove the report and the picture of the run that a new one takes the place of."""
    for name in (PICTURE, REPORT):  # the report last: it says whose they are
        (output / name).unlink(missing_ok=True)


def remove_partial(output: Path) -> None:
    """Clear away what a killed run was writing."""
    for folder in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> State:
    """The state in `folder`; CannotResume where it is damaged or another version's."""
    with _readable(folder / STATE):
        raw = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if raw.get("schema") != SCHEMA:
            raise CannotResume(f"{folder} was written by another version of onepass")
        if set(raw["settings"]) != {f.name for f in fields(Settings)}:
            raise CannotResume(f"{folder} was made with other settings than this version has")
        values: dict[str, Any] = {k: _value(v) for k, v in raw["settings"].items()}
        rest = {f.name: raw[f.name] for f in fields(State) if f.name != "settings"}
        return State(settings=Settings(**values), **rest)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """CannotResume with the file's name for what goes wrong while it is read."""
    try:
        yield
    except Failed:
        raise
    except Exception as error:  # each format has exceptions of its own
        why = f"{type(error).__name__}: {one_line(error)}"
        if isinstance(error, OSError):
            why = error.strerror or one_line(error)
        raise CannotResume(f"{path} cannot be read: {why}") from error


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

    output.mkdir(parents=True, exist_ok=True)
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
        save_file(_flat(optimizer), temporary / OPTIMIZER)
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


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    with _readable(path):
        return load_file(path)


def load_optimizer(folder: Path, optimizer: torch.optim.Optimizer) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in _tensors(folder / OPTIMIZER).items():
        number, _, moment = name.partition(".")
        state.setdefault(int(number), {})[moment] = tensor
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def load_weights(folder: Path, model: LlamaForCausalLM) -> None:
    model.load_state_dict(_tensors(folder / "model.safetensors"))


def load_adapter(folder: Path, adapted: PeftModel) -> None:
    from peft import set_peft_model_state_dict

    set_peft_model_state_dict(adapted, _tensors(folder / "adapter" / "adapter_model.safetensors"))
