"""`onepass train infinity-circuit-breaker`: rerouting of an Infinity-style image model.

Without --model and prompts it trains a small model on pictures of captions first, then breaks the
harmful ones. Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from ...cli.errors import Failed, UsageError, one_line
from ...training.flags import (
    Flags,
    LoraFlags,
    RunFlags,
    check_above_0,
    check_from,
    check_lora_flags,
    check_share,
    flag,
    training_arguments,
)
from ...training.prompts import Prompt
from ...training.run_folder import RunFolder, fingerprints, tell
from ..command import PANELS as SHARED_PANELS
from . import small
from .arguments import CIRCUIT_BREAKER, InfinityArguments, scale_schedule
from .captions import CAPTION, PHRASES
from .load import check_model
from .prompt_files import Sides, read_sides

SMALL = {  # what suits the small model, where nothing else is said
    "learning_rate": 1.5e-2,
    "lr_scheduler_type": "cosine",
    "circuit_breaker_target_layers": "3,4,5",
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 8,
    "gradient_checkpointing": False,
}
USUAL = {"learning_rate": 1e-3}  # and what of it changes for training as usual,
BESIDE_TASK = {"circuit_breaker_alpha": 10.0}  # and beside a task loss, which outweighs 0.1
DEFAULTS = {
    "max_steps": 150,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
}
WEIGHTS, SETTINGS, SAMPLES, README = (
    "model.safetensors",
    "infinity_config.json",
    "samples.png",
    "README.md",
)
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")
PANELS = [
    *SHARED_PANELS,
    ("Task", "nats per label", {"circuit_breaker/task_loss": "task loss"}, {}),
]


@dataclass
class InfinityModelFlags:
    """The model."""

    model: str | None = flag(None, "folder, or package.module:function")
    text_encoder: str | None = flag(None, "T5's name or folder (default: words)")
    scale_schedule: str | None = flag(None, "as 1x1x1,1x2x2 (default: the model's)", metavar="LIST")
    pretrain_steps: int = flag(250, "of the small model, where there is no --model", advanced=True)


@dataclass
class InfinityDataFlags:
    """The prompts."""

    harmful_prompts_path: str | None = flag(
        None, "prompts to turn away: file or folder", metavar="PATH"
    )
    sanitized_prompts_path: str | None = flag(
        None, "prompts to hold in place, likewise", metavar="PATH"
    )
    category: str | None = flag(None, "leave out prompts of others")
    num_examples: int = flag(1000, "of each kind at most")
    validation_ratio: float = flag(0.1, "of them held out, to measure")
    max_caption_len: int = flag(512, "tokens of a prompt at most", advanced=True)
    pictures: bool | None = flag(None, "draw the captions and add their task loss")


FLAGS = (InfinityModelFlags, InfinityDataFlags, InfinityArguments, LoraFlags, RunFlags)


def check(flags: Flags) -> None:
    """UsageError for what can be refused before libraries are loaded and files written."""
    model, data, args = (
        flags[InfinityModelFlags],
        flags[InfinityDataFlags],
        flags[InfinityArguments],
    )
    paths = ("harmful_prompts_path", "sanitized_prompts_path")
    missing = [name for name in paths if getattr(data, name) is None]
    if len(missing) == 1:
        raise UsageError(f"--{missing[0]}: got nothing, wanted a file beside the other side's")
    if missing and model.model is not None:
        raise UsageError(
            "--harmful_prompts_path and --sanitized_prompts_path: got nothing, wanted both with"
            " --model",
            hint="leave out --model for a small model and prompts made here",
        )
    if missing and data.category is not None:
        raise UsageError("--category: wanted prompt files with it")
    if model.model is None:
        beside_task = BESIDE_TASK if data.pictures else {}
        for name, value in (SMALL | (beside_task if args.breaks else USUAL)).items():
            owner = next((v for v in flags.values if hasattr(v, name)), None)
            if owner is not None and name not in flags.given:
                setattr(owner, name, value)
    _check_numbers(flags)
    _check_arguments(flags, args)
    if not args.breaks and data.pictures is None:
        data.pictures = True  # there is nothing else to train on
    _check_model(model, args, data, "max_caption_len" in flags.given)
    if flags.overrides.get("dataloader_persistent_workers"):
        raise UsageError(
            "--dataloader_persistent_workers: workers that stay do not see later epochs' prompts"
        )
    if not missing:
        sides = read_data(data, flags[RunFlags].seed)
        if data.pictures:
            _check_captions([*sides.retain, *sides.validation])


def _check_numbers(flags: Flags) -> None:
    data, args, lora = flags[InfinityDataFlags], flags[InfinityArguments], flags[LoraFlags]
    check_share("validation_ratio", data.validation_ratio)
    check_from("num_examples", data.num_examples, 1)
    check_from("max_caption_len", data.max_caption_len, 1)
    check_from("pretrain_steps", flags[InfinityModelFlags].pretrain_steps, 1)
    check_from("init_jitter", args.init_jitter, 0)
    check_above_0("circuit_breaker_alpha", args.circuit_breaker_alpha)
    check_lora_flags(lora)


def _check_arguments(flags: Flags, args: InfinityArguments) -> None:
    try:
        if "selective_layers" not in flags.given:  # as published: up to the last target
            args.selective_layers = ",".join(map(str, range(max(args.target_layers) + 1)))
        _ = args.trained_layers
        if flags[InfinityModelFlags].scale_schedule is not None:
            scale_schedule(flags[InfinityModelFlags].scale_schedule or "")
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if not args.unfrozen:
        if not args.freeze_embeddings:
            raise UsageError("--no_freeze_embeddings: wanted one of --unfreeze_* with it")
        return
    ours = {f.name for f in fields(LoraFlags)}
    if given := sorted(flags.given & ours):
        raise UsageError(f"--{given[0]} is of an adapter: there is none with --{args.unfrozen[0]}")


def _check_model(
    model: InfinityModelFlags, args: InfinityArguments, data: InfinityDataFlags, given: bool
) -> None:
    from .config import InfinityConfig

    pictures = bool(data.pictures)
    config: InfinityConfig | None = InfinityConfig()
    if model.model is not None:
        config = check_model(model.model)
    if config is None:
        if model.text_encoder is None:
            raise UsageError("--text_encoder: got nothing, wanted a T5 with a --model of your own")
        if pictures:
            wanted = "" if args.breaks else f"; --task_type {CIRCUIT_BREAKER} needs none"
            raise UsageError(f"--pictures are those of the small model, not of --model's{wanted}")
        return
    if given and data.max_caption_len > config.text_maxlen:
        raise UsageError(
            f"--max_caption_len: got {data.max_caption_len}, the model takes {config.text_maxlen}"
        )
    data.max_caption_len = min(data.max_caption_len, config.text_maxlen)
    try:
        args.check_layers(config.depth, pictures)
    except ValueError as error:
        raise UsageError(f"--{error}") from error


def read_data(data: InfinityDataFlags, seed: int) -> Sides:
    """The prompts of either side, and those that are held out.

    Raises:
        UsageError: a file that is missing, empty or malformed, by file and line.
    """
    assert data.harmful_prompts_path is not None and data.sanitized_prompts_path is not None
    try:
        return read_sides(
            data.harmful_prompts_path,
            data.sanitized_prompts_path,
            category=data.category,
            validation_ratio=data.validation_ratio,
            num_examples=data.num_examples,
            seed=seed,
        )
    except (ValueError, OSError) as error:
        raise UsageError(one_line(error, 1000)) from error


def _check_captions(prompts: Sequence[Prompt]) -> None:
    for prompt in sorted(prompts, key=lambda prompt: prompt.line or 0):
        if CAPTION.search(prompt.text) is None:
            where = f"{prompt.file}:{prompt.line}" if prompt.line else str(prompt.file)
            like = PHRASES[0].format("red circle on white")
            raise UsageError(
                f"--pictures: {where}: no picture can be drawn of {prompt.text[:60]!r}, wanted the"
                f" like of {like!r}"
            )


def _fingerprints(sides: Sides) -> dict[str, str]:
    """Of the files that were found under whatever name."""
    files = {"harmful": sides.circuit_breaker[0].file, "sanitized": sides.retain[0].file}
    return fingerprints(files)


def train(flags: Flags, run: RunFolder) -> int:
    """Train, then measure; returns the exit code."""
    model, data = flags[InfinityModelFlags], flags[InfinityDataFlags]
    tell("loading the libraries")
    args = training_arguments(flags)
    given = data.harmful_prompts_path is not None
    begin = partial(
        run.begin,
        _fingerprints(read_data(data, args.seed)) if given else {},
        writes=(*ADAPTER, WEIGHTS, SETTINGS, SAMPLES, README, small.MODEL, small.DATA),
    )
    makes_something = model.model is None or not given
    if makes_something:
        begin()
    if model.model is None:
        model.model = str(small.small_image_model(run, args.seed, model.pretrain_steps))
    if not given:
        data.harmful_prompts_path = data.sanitized_prompts_path = str(run.path / small.DATA)
    from ...cli.terminal import quiet_libraries

    with quiet_libraries():
        return _train(
            flags,
            run,
            args,
            model.model,
            read_data(data, args.seed),
            None if makes_something else begin,
        )


def _train(
    flags: Flags,
    run: RunFolder,
    args: Any,
    model_name: str,
    sides: Sides,
    begin: Callable[[], None] | None,
) -> int:
    from ...training.curves import write_curves, write_summary
    from ...training.monitor import fit
    from ...training.push import push
    from ..options import ADAPTER_OFF
    from . import evaluate
    from .load import load_model
    from .model import Infinity
    from .trainer import InfinityCircuitBreakerTrainer
    from .weights import frozen_copy, unfreeze

    ours, data = flags[InfinityArguments], flags[InfinityDataFlags]
    model = load_model(model_name).to(args.device)
    is_small = isinstance(model, Infinity)
    _check_checkpointing(flags, model, args)
    scales = _scales(flags, is_small)
    encoder = _text_encoder(flags, model, args)
    prompts = {
        "benign": [p.text for p in sides.validation or sides.retain],
        "harmful": [p.text for p in sides.circuit_breaker],
    }
    drawn = is_small and all(CAPTION.search(text) for some in prompts.values() for text in some)
    shown = {side: evaluate.to_sample(some) for side, some in prompts.items()} if drawn else {}

    def nats() -> dict[str, float]:
        return {
            side: evaluate.nats_per_label(model, some, encoder)
            for side, some in prompts.items()
            if drawn
        }

    def pictures() -> dict[str, Any]:
        return {side: evaluate.samples(model, some, encoder) for side, some in shown.items()}

    nats_before, pictures_before = nats(), pictures()
    reference: Any = ADAPTER_OFF
    adapter = None
    try:
        ours.check_layers(len(_blocks(model)), bool(data.pictures))
        if ours.unfrozen:
            reference = frozen_copy(model) if ours.breaks else ADAPTER_OFF
            trained = unfreeze(model, ours)
            tell(f"training {len(trained)} weights of blocks {ours.selective_layers} themselves")
        else:
            adapter = _lora(flags[LoraFlags], ours, model)
        trainer = InfinityCircuitBreakerTrainer(
            model,
            args,
            train_dataset=_dataset(data, encoder, args.seed),
            infinity_args=ours,
            reference=reference,
            scale_schedule=scales,
            peft_config=adapter,
        )
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    if begin is not None:
        begin()
    fit(trainer, run)
    save(run, trainer, flags, model_name, scales)
    nats_after, turned = nats(), {}
    if ours.breaks or not ours.unfrozen:
        for side, ending in (("benign", ""), ("harmful", "_circuit_breaker")):
            turned[side] = evaluate.cosine(
                trainer.model,
                prompts[side],
                ending,
                trainer.rerouting,
                encoder,
                scales,
                data.max_caption_len,
            )
    if run.is_main and shown:
        after = pictures()
        evaluate.write_samples(
            run.path / SAMPLES,
            {side: (shown[side], pictures_before[side], after[side]) for side in shown},
        )
    write_curves(
        run, "Circuit breaker of an image model", PANELS[:4] if not data.pictures else PANELS
    )
    rows = []
    for side in prompts:
        row = [side]
        if drawn:
            old, new = nats_before[side], nats_after[side]
            row += [f"{old:.3f}", f"{new:.3f}", f"{new / old - 1:+.1%}"]
        rows.append([*row, f"{turned[side]:.3f}" if turned else "-"])
    columns = ["prompts", *(["original", "trained", "change"] if drawn else []), "cosine"]
    measured = "nats per label of their pictures, and the cosine" if drawn else "the cosine"
    write_summary(
        run,
        f"Prompts: {measured} to the original hidden states",
        columns,
        rows,
        nats_per_label={"original": nats_before, "trained": nats_after},
        cosine=turned,
        target_layers=list(ours.target_layers),
    )
    results = ("metrics.jsonl", "curves.png", "summary.json", SAMPLES)
    push(run, trainer, (*ADAPTER, WEIGHTS, SETTINGS, README, *results))
    made = ADAPTER[0] if adapter is not None else WEIGHTS
    also = f", {SAMPLES}" if shown else ""
    tell(f"wrote {run.path}: {made}, metrics.jsonl, curves.png, summary.json{also}")
    return 0


def _blocks(model: Any) -> Sequence[Any]:
    from ...training.hidden_states import blocks_of

    return blocks_of(model)


def _check_checkpointing(flags: Flags, model: Any, args: Any) -> None:
    """Gradient checkpointing is on by default: off where the model cannot, unless it was asked."""
    names = ("gradient_checkpointing", "activation_checkpointing")
    if any(hasattr(model, f"{name}_enable") for name in names):
        return
    if flags[RunFlags].gradient_checkpointing and "gradient_checkpointing" in flags.given:
        raise Failed(
            f"--gradient_checkpointing: {type(model).__name__} has no method {names[0]}_enable:"
            " leave the flag out"
        )
    if flags[RunFlags].gradient_checkpointing:
        tell(f"no gradient checkpointing: {type(model).__name__} has no {names[0]}_enable")
    for name in names:
        if hasattr(args, name):
            setattr(args, name, False)


def _scales(flags: Flags, is_small: bool) -> list[tuple[int, int, int]]:
    from .loss import SCALE_SCHEDULE
    from .quantizer import SCALES

    given = flags[InfinityModelFlags].scale_schedule
    if given is not None:
        return scale_schedule(given)
    return list(SCALES if is_small else SCALE_SCHEDULE)


def _text_encoder(flags: Flags, model: Any, args: Any) -> Any:
    from .text import T5TextEncoder, WordEncoder

    name = flags[InfinityModelFlags].text_encoder
    if name is None:
        return WordEncoder(model.config.text_channels)
    try:
        encoder = T5TextEncoder.from_pretrained(name, device=args.device)
    except (ValueError, OSError, ImportError) as error:
        raise Failed(f"--text_encoder: {one_line(error)}") from error
    wanted = getattr(getattr(model, "config", None), "text_channels", None)
    (features,) = encoder.features(*encoder.tokenize(["a"], 8))
    if wanted is not None and features.shape[-1] != wanted:
        raise Failed(
            f"--text_encoder: {name} has features of {features.shape[-1]} channels, the model"
            f" wants {wanted}"
        )
    return encoder


def _dataset(data: InfinityDataFlags, encoder: Any, seed: int) -> Any:
    from .data import InfinityCircuitBreakerDataset
    from .quantizer import BitQuantizer
    from .task import WithPictures

    dataset = InfinityCircuitBreakerDataset(
        max_caption_len=data.max_caption_len,
        harmful_prompts_path=data.harmful_prompts_path,
        sanitized_prompts_path=data.sanitized_prompts_path,
        validation_ratio=data.validation_ratio,
        category=data.category,
        text_encoder=encoder,
        num_examples=data.num_examples,
        seed=seed,
    )
    return WithPictures(dataset, BitQuantizer(), seed) if data.pictures else dataset


def _lora(lora: LoraFlags, ours: InfinityArguments, model: Any) -> Any:
    from peft import LoraConfig

    from ...training.lora import chosen_modules, lora_settings
    from .model import LORA_MODULES, lora_target_modules

    modules = chosen_modules(lora, _blocks(model), LORA_MODULES)
    names = lora_target_modules(model, ours.trained_layers, modules)
    return LoraConfig(**lora_settings(lora), target_modules=names)


def save(
    run: RunFolder,
    trainer: Any,
    flags: Flags,
    model_name: str,
    scales: list[tuple[int, int, int]],
) -> None:
    """The adapter as PEFT keeps it, or the weights that were trained; with a card and settings."""
    from ...training.card import model_card
    from .weights import changed_weights

    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)  # whole, also if sharded
    if not run.is_main:
        return
    model, ours = trainer.accelerator.unwrap_model(trainer.model), flags[InfinityArguments]
    how = (
        "`model.load_state_dict(safetensors.torch.load_file('model.safetensors'), strict=False)`"
        if ours.unfrozen
        else "`PeftModel.from_pretrained(base_model, folder)`"
    )

    def write(folder: Path) -> None:
        if ours.unfrozen:
            from safetensors.torch import save_file

            save_file(changed_weights(model, state), folder / WEIGHTS, metadata={"format": "pt"})
        else:
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        settings = {**asdict(ours), "scale_schedule": scales}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        facts = {"rerouting": asdict(ours)}
        if not ours.unfrozen:
            facts["adapter"] = asdict(flags[LoraFlags])
        card = model_card(
            "Circuit breaker of an image model",
            base_model=model_name,
            tags=["circuit-breaker", "representation-rerouting", "text-to-image"],
            text="Turns the hidden states of an Infinity-style model under harmful prompts away"
            " from where they were, and holds those of all other prompts in place (Zou et al. 2024,"
            f" arXiv 2406.04313). Load it on the base model: {how}.",
            facts=facts,
        )
        with contextlib.suppress(FileNotFoundError):
            (folder / README).unlink()  # PEFT's unfilled form
        (folder / README).write_text(card, encoding="utf-8")

    run.save(write)
