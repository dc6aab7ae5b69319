"""Flags from plain dataclasses, and a transformers.TrainingArguments from flags.

A field's metadata may hold help, choices, aliases, metavar and advanced (told by --help-all only).
--like_this and --like-this are one flag; a bool is --flag, --flag true|false or --no_flag. What is
a field of TrainingArguments and none of ours is accepted too, and parsed by transformers.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib.util
import json
import os
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from ..cli.errors import Failed, Parser, UsageError, nearest

if typing.TYPE_CHECKING:
    from transformers import TrainingArguments

T = TypeVar("T")
Known = Callable[[], frozenset[str]]  # the names of flags that are not ours, read if need be
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
HELP_AT, HELP_WIDTH = 35, 43  # of the 78 columns that argparse takes of 80
METAVARS = {int: "N", float: "X", str: "TEXT", bool: ""}


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with what its flag needs."""
    metadata["help"] = help
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelFlags:
    """The model."""

    model_name_or_path: str | None = flag(
        None, "also --model: folder or Hub id", aliases=["--model"]
    )
    model_revision: str = flag("main", "branch, tag or commit on the Hub", advanced=True)
    dtype: str = flag("auto", "of the weights", choices=["auto", "float32", "bfloat16", "float16"])
    attn_implementation: str | None = flag(None, "eager, sdpa, flash_attention_2", advanced=True)
    load_in_8bit: bool = flag(False, "frozen weights in 8 bits (bitsandbytes)", advanced=True)
    load_in_4bit: bool = flag(False, "frozen weights in 4 bits (bitsandbytes)", advanced=True)
    bnb_4bit_quant_type: str = flag(
        "nf4", "of --load_in_4bit", choices=["nf4", "fp4"], advanced=True
    )


@dataclass
class LoraFlags:
    """The adapter."""

    lora_r: int = flag(16, "rank")
    lora_alpha: int = flag(32, "scale, over the rank")
    lora_dropout: float = flag(0.05, "share of inputs dropped")
    lora_target_modules: list[str] = flag([], "layers (default: all linear ones)")
    lora_modules_to_save: list[str] = flag([], "modules trained whole", advanced=True)
    use_rslora: bool = flag(False, "scale over the rank's square root", advanced=True)
    use_dora: bool = flag(False, "magnitude and direction apart", advanced=True)


@dataclass
class RunFlags:
    """The run."""

    output_dir: str = flag("trainer_output", "folder of the run", metavar="DIR")
    overwrite: bool = flag(False, "replace an earlier run in the folder")
    resume_from_checkpoint: str | None = flag(
        None, "from the last checkpoint, or DIR", metavar="DIR", const="true"
    )
    max_steps: int = flag(-1, "optimizer steps; -1: by epochs")
    num_train_epochs: float = flag(3.0, "passes over the data")
    per_device_train_batch_size: int = flag(8, "examples a device and step")
    gradient_accumulation_steps: int = flag(1, "batches a step")
    learning_rate: float = flag(5e-5, "its peak")
    lr_scheduler_type: str = flag(
        "linear", "course of the learning rate", metavar="NAME", advanced=True
    )
    warmup_steps: float = flag(0.0, "steps, or share of them below 1", advanced=True)
    weight_decay: float = flag(0.0, "of AdamW", advanced=True)
    max_grad_norm: float = flag(1.0, "gradients are clipped to it", advanced=True)
    gradient_checkpointing: bool = flag(True, "saves memory")
    bf16: bool | None = flag(None, "autocast (default: where it runs)")
    use_cpu: bool = flag(False, "even where there is a GPU")
    seed: int = flag(42, "of weights, order and dropout")
    logging_steps: float = flag(10, "steps between logs")
    save_steps: float = flag(50, "steps between checkpoints")
    save_total_limit: int | None = flag(2, "checkpoints kept", advanced=True)
    report_to: list[str] = flag(["none"], "trackers: tensorboard, wandb, ...")
    run_name: str | None = flag(None, "for the trackers", advanced=True)
    push_to_hub: bool = flag(False, "upload what is saved", advanced=True)
    hub_model_id: str | None = flag(None, "repository to upload to", advanced=True)
    config: str | None = flag(None, "YAML file of flags", metavar="FILE")
    accelerate_config: str | None = flag(
        None, "launch: multi_gpu, fsdp2, zero3, ...", metavar="NAME"
    )


@dataclass
class Flags:
    """Parsed flags: `flags[Kind]` is the instance of that dataclass, or of one below it."""

    values: tuple[Any, ...]
    overrides: dict[str, Any]  # fields of TrainingArguments that are none of ours
    given: set[str]  # typed, in the config file or in the resumed run's; others are defaults
    tokens: list[str]  # the command line, less
    launch: list[str]  # the flags for `accelerate launch`

    def __getitem__(self, kind: type[T]) -> T:
        return next(value for value in self.values if isinstance(value, kind))

    def prefer(self, values: Mapping[str, Any]) -> None:
        """Take these, by name, where nothing was given."""
        for name, value in values.items():
            if name in self.given:
                continue
            owner = next((v for v in self.values if hasattr(v, name)), None)
            if owner is None:
                self.overrides[name] = value
            else:
                setattr(owner, name, value)

    def as_dict(self) -> dict[str, Any]:
        """All flags by name, less secrets."""
        named = {f.name: getattr(v, f.name) for v in self.values for f in fields(v)}
        return {k: v for k, v in (named | self.overrides).items() if not k.endswith("token")}


# -- the parser -------------------------------------------------------------------------------


def add_flags(
    parser: argparse.ArgumentParser,
    kinds: Iterable[type],
    defaults: Mapping[str, Any],
    every: bool = False,
) -> None:
    """An argument group for each dataclass; advanced flags are hidden unless `every`."""
    for kind in kinds:
        title = (kind.__doc__ or kind.__name__).splitlines()[0].rstrip(".")
        group = parser.add_argument_group(title)
        hints = typing.get_type_hints(kind)
        for f in fields(kind):
            _add(group, f, hints[f.name], defaults, every)


def _add(group: Any, f: Any, hint: Any, defaults: Mapping[str, Any], every: bool) -> None:
    meta, default = f.metadata, defaults.get(f.name, default_of(f))
    base, is_list = _base(hint)
    how: dict[str, Any] = {"default": default, "type": _boolean if base is bool else base}
    how["choices"] = meta.get("choices")
    if base is bool:
        how |= {"nargs": "?", "const": True, "metavar": "BOOL"}
    else:
        how["metavar"] = meta.get("metavar", "NAME" if how["choices"] else METAVARS[base])
    if is_list:
        how["nargs"] = "+"
    if "const" in meta:
        how |= {"nargs": "?", "const": meta["const"]}
    text = meta.get("help", "")
    if how["choices"] and not all(str(choice) in text for choice in how["choices"]):
        text += ": " + ", ".join(map(str, how["choices"]))
    shown = ",".join(map(str, default)) if is_list and default else default
    if isinstance(shown, bool):
        shown = "on" if shown else None
    told = "" if shown in (None, []) or "default" in text else f" [{shown}]"
    if not every:  # a line a flag
        text = textwrap.shorten(text, HELP_WIDTH - len(told), placeholder=" ...")
    text = (text + told).replace("%", "%%")
    hidden = meta.get("advanced") and not every
    group.add_argument(
        f"--{f.name}", *meta.get("aliases", ()), help=argparse.SUPPRESS if hidden else text, **how
    )


def default_of(f: Any) -> Any:
    """The default of a dataclass field."""
    return f.default if f.default is not MISSING else f.default_factory()


def _base(hint: Any) -> tuple[type, bool]:
    """The type of one value, and whether a flag takes several."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is list:
        return typing.get_args(hint)[0], True
    return hint, False


def _boolean(text: str) -> bool:
    if text.lower() in TRUE + FALSE:
        return text.lower() in TRUE
    raise argparse.ArgumentTypeError(f"got {text!r}, wanted true or false")


class Help(argparse.HelpFormatter):
    """A flag a line where it fits: `--flag N`, its help beside it."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=HELP_AT)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = action.option_strings[0]
        shown = action.metavar if action.metavar not in ("", "BOOL") else None
        return f"{names} {shown}" if shown and action.nargs != 0 else names


def parse(
    prog: str,
    kinds: Sequence[type],
    tokens: Sequence[str],
    *,
    defaults: Mapping[str, Any] | None = None,
    description: str = "",
    recorded: Callable[[Path], Mapping[str, Any]] = lambda folder: {},
    training: bool = True,
) -> Flags:
    """The flags in `tokens`; `recorded(output_dir)` brings those of the run to go on with.
    TrainingArguments' are taken too where they are for a `training`.

    Raises:
        UsageError: an unknown flag or key, or a value that is none.
    """
    every = "--help-all" in tokens
    parser = Parser(
        prog=prog,
        usage=f"{prog} [flags]",
        description=description,
        epilog="[x]: the default; --no_flag: off."
        + (" Any flag of TrainingArguments is taken too." if training else "")
        + ("" if every else " All flags: --help-all"),
        formatter_class=Help,
        add_help=False,
    )
    parser.add_argument("-h", "--help", "--help-all", action="help", help=argparse.SUPPRESS)
    parser.add_argument("--debug", action="store_true", help=argparse.SUPPRESS)
    add_flags(parser, kinds, defaults or {}, every)
    aliases = {a: f"--{f.name}" for k in kinds for f in fields(k) for a in _aliases(f)}
    ours = {f.name for kind in kinds for f in fields(kind)}
    if every or "--help" in tokens or "-h" in tokens:
        parser.parse_args(["--help"])
    known: Known = training_fields if training else frozenset
    lists = {f.name for k in kinds for f in fields(k) if _base(typing.get_type_hints(k)[f.name])[1]}
    typed, rest = _split(tokens, ours, aliases)
    typed = _spread(typed, lists)
    first = parser.parse_args(typed)
    mapping = _read_config(Path(first.config)) if first.config else {}
    file_tokens, file_rest = _config_tokens(first.config, mapping, ours, aliases, known)
    file_tokens = _spread(file_tokens, lists)
    try:
        parser.parse_args(file_tokens)
    except UsageError as error:
        error.message = f"{first.config}: {error.message}"
        raise
    space = parser.parse_args([*file_tokens, *typed])
    accelerate = getattr(space, "accelerate_config", None)
    theirs, launch = _sort_out(parser, [*file_rest, *rest], accelerate, known)
    overrides = _training_overrides(prog, theirs)
    given = {t[2:].split("=")[0] for t in [*file_tokens, *typed] if t.startswith("--")} & ours
    given |= set(overrides)
    values = vars(space)
    if values.get("resume_from_checkpoint") not in (None, "false"):
        path = Path(values["resume_from_checkpoint"])
        if "output_dir" not in given and path.name.startswith("checkpoint-"):
            values["output_dir"] = str(path.parent)
        for name, value in recorded(Path(values["output_dir"])).items():
            if name in given or name in ("output_dir", "resume_from_checkpoint", "overwrite"):
                continue
            (values if name in ours else overrides)[name] = value
            given.add(name)
    made = tuple(kind(**{f.name: values[f.name] for f in fields(kind)}) for kind in kinds)
    return Flags(made, overrides, given, [*typed, *theirs], launch)


def _aliases(f: Any) -> list[str]:
    return list(f.metadata.get("aliases", ()))


def _split(
    tokens: Sequence[str], ours: set[str], aliases: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """(tokens of our flags in one spelling, flags that are not ours with their values)."""
    mine: list[str] = []
    rest: list[str] = []
    into = mine
    for token in tokens:
        if token.startswith("--") and len(token) > 2:
            name, equals, value = token.partition("=")
            name = aliases.get(name, name)
            key = name[2:].replace("-", "_")
            if key.startswith("no_") and key[3:] in ours and key not in ours and not equals:
                key, equals, value = key[3:], "=", "false"
            known = key in ours or key in ("help", "help_all", "debug")
            into = mine if known else rest
            token = (f"--{key}" if key in ours else name) + equals + value
        into.append(token)
    return mine, rest


def _spread(tokens: Sequence[str], lists: set[str]) -> list[str]:
    """Values of flags that take several, each a token of its own: a,b as a b."""
    spread: list[str] = []
    several = False
    for token in tokens:
        if token.startswith("--"):
            name, equals, value = token.partition("=")
            several = name[2:] in lists
            if not (several and "," in value):
                spread.append(token)
                continue
            spread.append(name)
            token = value
        spread += [part for part in token.split(",") if part] if several else [token]
    return spread


# -- the config file --------------------------------------------------------------------------


def _read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; its `env:` block goes into the environment."""
    try:
        import yaml
    except ModuleNotFoundError:
        raise Failed("--config needs yaml: pip install 'onepass[train]'") from None
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: {error.strerror}: {str(path)!r}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        why = getattr(error, "problem", None) or "not UTF-8 text"
        raise UsageError(f"--config: {where} is not YAML: {why}") from error
    found = {} if found is None else found
    if not isinstance(found, dict):
        raise UsageError(
            f"--config: {path} holds no mapping", hint="write a line a flag: name: value"
        )
    variables = found.pop("env", None) or {}
    if not isinstance(variables, dict) or any(
        isinstance(v, dict | list) or v is None for v in variables.values()
    ):
        raise UsageError(f"{path}: env: wanted a mapping of names to values")
    os.environ.update({str(k): str(v) for k, v in variables.items()})
    return {str(k): v for k, v in found.items()}


def _config_tokens(
    file: str | None,
    mapping: Mapping[str, Any],
    ours: set[str],
    aliases: Mapping[str, str],
    known: Known,
) -> tuple[list[str], list[str]]:
    """The file's keys as flags: (ours, others)."""
    mine: list[str] = []
    rest: list[str] = []
    for spelt, value in mapping.items():
        key = aliases.get(f"--{spelt}", spelt).removeprefix("--").replace("-", "_")
        if key == "config" or (key not in ours and key not in known()):
            names = [*ours - {"config"}, *known()]
            meant = nearest(key, names)
            raise UsageError(f"{file}: unknown key {spelt!r}", meant=meant, hint="keys are flags")
        if value is None:
            continue
        if isinstance(value, list):
            made = [f"--{key}", *map(str, value)]
        else:
            plain = json.dumps(value) if isinstance(value, dict | bool) else value
            made = [f"--{key}={plain}"]
        (mine if key in ours else rest).extend(made)
    return mine, rest


# -- transformers -----------------------------------------------------------------------------


@functools.cache
def training_fields() -> frozenset[str]:
    """Names of TrainingArguments' fields, read from its source: importing it takes seconds."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        raise Failed("needs transformers, which is not installed: pip install 'onepass[train]'")
    tree = ast.parse(Path(found.origin).with_name("training_args.py").read_text("utf-8"))
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    [found_class] = [c for c in classes if c.name == "TrainingArguments"]
    named = [n.target for n in found_class.body if isinstance(n, ast.AnnAssign)]
    return frozenset(t.id for t in named if isinstance(t, ast.Name) and not t.id.startswith("_"))


def _sort_out(
    parser: Parser, tokens: Sequence[str], accelerate: str | None, known: Known
) -> tuple[list[str], list[str]]:
    """Flags that are not ours: (TrainingArguments', the launcher's)."""
    theirs: list[str] = []
    launch: list[str] = []
    into = theirs
    for token in tokens:
        if token.startswith("--"):
            name = token.partition("=")[0]
            key = name[2:].replace("-", "_")
            if key in known():
                into, token = theirs, token.replace(name, f"--{key}", 1)
            elif key.removeprefix("no_") in known() and name == token:
                into, token = theirs, f"--{key.removeprefix('no_')}=false"
            elif accelerate and key in _launcher_flags():
                into = launch
            else:
                meant = nearest(name, [*parser._flags(), *(f"--{n}" for n in known())])
                hint = f"see {parser.prog} --help"
                text = f"unknown option {name!r}"
                raise UsageError(text, meant=meant, hint=hint, prog=parser.prog)
        into.append(token)
    return theirs, launch


def _training_overrides(prog: str, tokens: Sequence[str]) -> dict[str, Any]:
    """The values of TrainingArguments' own flags."""
    if not tokens:
        return {}
    from transformers import HfArgumentParser, TrainingArguments

    class Theirs(HfArgumentParser, Parser):
        """transformers' parser with our errors."""

    values = vars(Theirs(TrainingArguments, prog=prog).parse_args(tokens))
    named = {t[2:].partition("=")[0] for t in tokens if t.startswith("--")}
    return {name: values[name] for name in sorted(named)}


def _launcher_flags() -> set[str]:
    from accelerate.commands.launch import launch_command_parser

    options = launch_command_parser()._option_string_actions
    return {o.lstrip("-").replace("-", "_") for o in options}


TRACKERS = {  # the module that each needs
    **{n: n for n in ("mlflow", "trackio", "wandb", "swanlab", "clearml", "codecarbon", "dvclive")},
    **{"comet_ml": "comet_ml", "neptune": "neptune", "azure_ml": "azureml", "dagshub": "dagshub"},
    "flyte": "flytekit",
}
SCHEDULERS = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"),
    *("constant_with_warmup", "reduce_lr_on_plateau", "cosine_with_min_lr", "warmup_stable_decay"),
    *("cosine_warmup_with_min_lr", "greedy"),
)


def check_run_flags(flags: Flags) -> None:
    """UsageError for what can be refused of a run's flags before anything is loaded."""
    run = flags[RunFlags]
    if (size := flags.overrides.get("per_device_eval_batch_size", 1)) < 1:
        raise UsageError(f"--per_device_eval_batch_size: got {size}, wanted a number from 1 on")
    if flags.overrides.get("label_smoothing_factor"):
        raise UsageError(
            "--label_smoothing_factor: is of transformers' own loss, which is not used here; leave"
            " it out"
        )
    positive = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_train_epochs")
    for name in (*positive, "logging_steps", "save_steps"):
        if getattr(run, name) <= 0:
            raise UsageError(f"--{name}: got {getattr(run, name)}, wanted a number above 0")
    for name in ("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps", "seed"):
        if not 0 <= getattr(run, name) < float("inf"):
            raise UsageError(f"--{name}: got {getattr(run, name)}, wanted a number from 0 on")
    if run.max_steps == 0 or run.max_steps < -1:
        raise UsageError(f"--max_steps: got {run.max_steps}, wanted a number above 0, or -1")
    if run.save_total_limit is not None and run.save_total_limit < 1:
        raise UsageError(f"--save_total_limit: got {run.save_total_limit}, wanted 1 or more")
    if run.lr_scheduler_type not in SCHEDULERS:
        meant = nearest(run.lr_scheduler_type, SCHEDULERS)
        text = f"--lr_scheduler_type: unknown value {run.lr_scheduler_type!r}"
        raise UsageError(text, allowed=SCHEDULERS, meant=meant)
    for tracker in run.report_to:
        if tracker in ("none", "all"):
            continue
        if tracker not in (*TRACKERS, "tensorboard"):
            allowed = ["none", "all", "tensorboard", *TRACKERS]
            meant = nearest(tracker, allowed)
            raise UsageError(
                f"--report_to: unknown tracker {tracker!r}", allowed=allowed, meant=meant
            )
        modules = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else TRACKERS[tracker]
        names = (modules,) if isinstance(modules, str) else modules
        if not any(importlib.util.find_spec(name) for name in names):
            raise UsageError(
                f"--report_to: {tracker} is not installed", hint=f"pip install {names[0]}"
            )


def check_from(name: str, value: float, least: float) -> None:
    """UsageError unless a flag's number is finite and at least `least`."""
    if not least <= value < float("inf"):
        raise UsageError(f"--{name}: got {value}, wanted a number from {least} on")


def check_above_0(name: str, value: float) -> None:
    """UsageError unless a flag's number is finite and above 0."""
    if not 0 < value < float("inf"):
        raise UsageError(f"--{name}: got {value}, wanted a number above 0")


def check_share(name: str, value: float) -> None:
    """UsageError unless a flag's number is a share that leaves something."""
    if not 0 <= value < 1:
        raise UsageError(f"--{name}: got {value}, wanted from 0 to below 1")


def check_lora_flags(lora: LoraFlags) -> None:
    """UsageError for an adapter that cannot be."""
    check_from("lora_r", lora.lora_r, 1)
    check_from("lora_alpha", lora.lora_alpha, 1)
    check_share("lora_dropout", lora.lora_dropout)


OURS = ("overwrite", "resume_from_checkpoint", "config", "accelerate_config")


def training_arguments(flags: Flags, **defaults: Any) -> TrainingArguments:
    """transformers.TrainingArguments of the flags; `defaults` are a system's own, flags win."""
    import torch
    from transformers import TrainingArguments

    from .run_folder import n_processes

    run = flags[RunFlags]
    known = {f.name for f in fields(TrainingArguments) if f.init}
    asked = {f.name: getattr(run, f.name) for f in fields(RunFlags) if f.name not in OURS}
    if run.bf16 is None:
        half = flags.overrides.get("fp16") or run.use_cpu
        asked["bf16"] = not half and _has_bf16(torch)
    if run.warmup_steps >= 1 or run.warmup_steps == 0:
        asked["warmup_steps"] = int(run.warmup_steps)
    kwargs = {
        "remove_unused_columns": False,
        "disable_tqdm": True,  # monitor.py has a bar of its own, on stderr
        "save_strategy": "steps",
        "logging_strategy": "steps",
        "dataloader_pin_memory": torch.cuda.is_available() and not run.use_cpu,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        **defaults,
        **asked,
        **flags.overrides,
    }
    if "activation_checkpointing" in known:  # the name from transformers 5.2x on
        for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
            kwargs.setdefault(name.replace("gradient", "activation"), kwargs.pop(name))
    for name in sorted(set(kwargs) - known):
        if name in flags.given:
            raise UsageError(f"--{name}: this version of transformers has no such argument")
        del kwargs[name]
    if n_processes() > 1:
        _join(torch, kwargs)
    try:
        return TrainingArguments(**kwargs)
    except (ValueError, TypeError) as error:
        raise UsageError(f"transformers refuses these flags: {error}") from error


def _join(torch: Any, kwargs: dict[str, Any]) -> None:
    """Meet the other processes, on CPUs: transformers has no --ddp_timeout there, and without
    --use_cpu it would leave each by itself."""
    from .run_folder import tell

    if torch.accelerator.is_available() and not kwargs["use_cpu"]:
        return
    kwargs["use_cpu"] = True
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        tell("FSDP: accelerate shards on GPUs alone; on CPUs each process has the whole model")
    if not torch.distributed.is_initialized():
        seconds = int(kwargs.get("ddp_timeout", 1800))
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=seconds))


def _has_bf16(torch: Any) -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported())
    return bool(hasattr(torch, "xpu") and torch.xpu.is_available())
