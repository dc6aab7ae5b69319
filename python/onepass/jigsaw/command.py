"""`onepass train jigsaw`: a transform of the input embeddings and the adapter that understands it.

Without --model and --data it trains a small model on the interpreter's documentation first.
Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..cli.errors import Failed, UsageError, one_line
from ..training.flags import (
    Flags,
    LoraFlags,
    ModelFlags,
    RunFlags,
    check_from,
    check_lora_flags,
    check_share,
    flag,
    training_arguments,
)
from ..training.prompts import Prompt, read_prompts, split
from ..training.run_folder import TOKENIZER, RunFolder, fingerprints, tell
from .arguments import JigsawArguments

SMALL = {  # what suits the small model, where nothing else is said
    "learning_rate": 5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "max_steps": 400,
    "lora_r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": False,
    "model_max_length": 128,
    "max_eval_samples": 96,
    "adam_beta2": 0.95,
}
SMALL_FAST = SMALL | {  # of half as many positions
    "max_steps": 250,
    "lora_r": 96,
    "lora_alpha": 96,
    "per_device_train_batch_size": 8,
    "model_max_length": 64,
}
DEFAULTS = {"learning_rate": 1e-4}
ADAPTER, SGT = "adapter", "sgt"
WEAK = 0.2  # a share of recovered tokens above it is little protection
AGREES = 0.8  # a share of next tokens below it is a student that answers otherwise
FILES = ("README.md", "metrics.jsonl", "curves.png", "summary.json")
# what the table calls the facts of `measure`
MEASURES = {
    "kl_performance": "KL, student on transformed text",
    "kl_protection": "KL, teacher on transformed text",
    "kl_guardrails": "KL, student on clean text",
    "agreement": "next token of student, as teacher's",
    "agreement_after": "the same, after the transformed prompt",
    "recovery_l2": "tokens recovered, nearest by L2",
    "recovery_cosine": "tokens recovered, nearest by cosine",
    "recovery_informed": "tokens recovered, given the transform",
    "abs_cosine": "|cos| to the clean embeddings",
    "std": "standard deviation of the noise",
}
SHARES = ("agreement", "agreement_after", "recovery_l2", "recovery_cosine", "recovery_informed")
PANELS: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    (
        "Distance to the clean teacher",
        "KL at the step, nats",
        {
            "jigsaw/kl_performance": "student, transformed text",
            "jigsaw/kl_protection": "teacher, transformed text",
            "jigsaw/kl_guardrails": "student, clean text",
        },
        {"yscale": "log"},
    ),
    (
        "Student and transform",
        "mean at the step",
        {"jigsaw/agreement": "agreement", "jigsaw/abs_cosine": "|cos| to clean embeddings"},
        {"ylim": (-0.05, 1.05)},
    ),
    (
        "Components of the loss",
        "mean since the last log",
        {
            "jigsaw/ce_performance_loss": "performance",
            "jigsaw/ce_protection_loss": "protection",
            "jigsaw/clean_embeddings_guardrails_loss": "guardrails",
            "jigsaw/absolute_cosine_similarity_penalty": "|cos|",
            "jigsaw/median_norm_penalty": "median norm",
            "jigsaw/mutual_information_loss": "mutual information",
        },
        {"yscale": "symlog"},
    ),
    ("Noise", "mean standard deviation", {"jigsaw/std": "of the transform"}, {}),
]


@dataclass
class DataFlags:
    """The data."""

    data: str | None = flag(None, "text or prompts (json, jsonl, txt)", metavar="FILE")
    val: str | None = flag(None, "to measure on (default: a share)", metavar="FILE")
    validation_ratio: float = flag(0.1, "that share; 0: measure on all")
    max_train_samples: int | None = flag(None, "at most (default: all)", advanced=True)
    max_eval_samples: int | None = flag(None, "measured at most (default: all)")
    transform_system: bool = flag(True, "transform system prompts too", advanced=True)
    transform_answers: bool = flag(False, "transform the assistant's messages", advanced=True)
    ignore_prompt_loss: bool = flag(
        False, "count the assistant's messages only, of conversations", advanced=True
    )
    fast: bool = flag(False, "a smaller model, where one is made here")


FLAGS = (ModelFlags, DataFlags, JigsawArguments, LoraFlags, RunFlags)


def check(flags: Flags) -> None:
    """UsageError for what can be refused before libraries are loaded and files written."""
    model, data, jigsaw = flags[ModelFlags], flags[DataFlags], flags[JigsawArguments]
    if data.data is None:
        if model.model_name_or_path is not None:
            raise UsageError(
                "--data: got no file, wanted one with --model",
                hint="leave out --model for a small model and text made here",
            )
        if data.val is not None:
            raise UsageError("--val: wanted --data with it")
    if data.fast and model.model_name_or_path is not None:
        raise UsageError("--fast: is of the model made here; leave it out with --model")
    if model.model_name_or_path is None:
        flags.prefer(SMALL_FAST if data.fast else SMALL)
    if model.load_in_8bit and model.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if flags.overrides.get("eval_strategy", "no") != "no" or flags.overrides.get("do_eval"):
        raise UsageError("--eval_strategy: held-out text is measured at the end; leave it out")
    check_share("validation_ratio", data.validation_ratio)
    for name in ("max_train_samples", "max_eval_samples"):
        if (number := getattr(data, name)) is not None:
            check_from(name, number, 1)
    check_lora_flags(flags[LoraFlags])
    try:
        jigsaw.check()
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if model.model_name_or_path is None and jigsaw.distillation_layer_index is not None:
        from ..demo import settings

        _check_layer(jigsaw, (settings.FAST if data.fast else settings.FULL).n_layers)
    if data.data is not None:
        for name in ("data", "val"):
            if (path := getattr(data, name)) is not None:  # resumed from anywhere
                setattr(data, name, str(Path(path).absolute()))
        read_data(data)


def _check_layer(jigsaw: JigsawArguments, n_layers: int) -> None:
    layer = jigsaw.distillation_layer_index
    if layer is not None and not -n_layers <= layer < n_layers:
        raise UsageError(
            f"--distillation_layer_index: got {layer}, wanted a number from {-n_layers} to"
            f" {n_layers - 1}: the model has {n_layers} blocks"
        )


def read_data(data: DataFlags, seed: int = 0) -> dict[str, list[Prompt]]:
    """The entries of `data`, and of `val` where there are any.

    Raises:
        UsageError: a file that is missing, empty or malformed, by file and line.
    """
    found: dict[str, list[Prompt]] = {}
    for name in ("data", "val"):
        if (path := getattr(data, name)) is None:
            continue
        try:
            found[name] = read_prompts(path)
        except (ValueError, OSError) as error:
            raise UsageError(f"--{name}: {one_line(error, 1000)}") from error
    if "val" not in found and data.validation_ratio:
        try:
            found["data"], found["val"] = split(found["data"], data.validation_ratio, seed)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    return found


def asked(prompts: list[Prompt], seed: int) -> list[Prompt]:
    """Texts as prompts and what follows them: cut in two at a space of the second half."""
    draw, found = random.Random(seed), []
    for prompt in prompts:
        text = prompt.text
        at = text.rfind(" ", 0, round(len(text) * draw.uniform(0.6, 0.95)))
        record = {"prompt": text[:at], "completion": text[at:]} if at > 0 else {"text": text}
        found.append(prompt._replace(text=record.get("prompt", text), record=record))
    return found


def train(flags: Flags, run: RunFolder) -> int:
    """Train, then measure; returns the exit code."""
    from ..training import small_model

    data = flags[DataFlags]
    tell("loading the libraries")
    args = training_arguments(flags)
    writes = (ADAPTER, SGT, *FILES, *TOKENIZER, small_model.MODEL, small_model.DATA)
    begin = partial(run.begin, fingerprints({"data": data.data, "val": data.val}), writes=writes)
    small_text = False
    makes_model = flags[ModelFlags].model_name_or_path is None
    if makes_model:
        begin()
        folder = small_model.small_language_model(run, args.seed, data.fast)
        flags[ModelFlags].model_name_or_path = str(folder)
        small_text = data.data is None
        if small_text:
            files = small_model.data_files(run.path)
            data.data, data.val = str(files["retain"]), str(files["retain_held_out"])
    from ..cli.terminal import quiet_libraries

    with quiet_libraries():
        prompts = read_data(data)
        if small_text:
            prompts = {name: asked(part, args.seed) for name, part in prompts.items()}
        return _train(flags, run, args, prompts, None if makes_model else begin)


def _train(
    flags: Flags,
    run: RunFolder,
    args: Any,
    prompts: dict[str, list[Prompt]],
    begin: Callable[[], None] | None,
) -> int:
    from ..training.curves import write_curves, write_summary
    from ..training.hidden_states import blocks_of
    from ..training.models import load_language_model
    from ..training.monitor import fit
    from ..training.processes import shard_now
    from ..training.push import push
    from .data import JigsawDataset, NoiseTokenizer
    from .evaluate import attacks_on, measure
    from .trainer import JigsawTrainer, lora_config

    data = flags[DataFlags]
    name = flags[ModelFlags].model_name_or_path
    if name is not None and Path(name).is_dir():  # told to those who load the pair from elsewhere
        flags[ModelFlags].model_name_or_path = str(Path(name).absolute())
    model, tokenizer = load_language_model(flags[ModelFlags], args)
    jigsaw = replace(flags[JigsawArguments])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int):
        jigsaw.model_max_length = min(positions, jigsaw.model_max_length)
    _check_layer(jigsaw, len(blocks_of(model)))
    try:
        marking = NoiseTokenizer(
            tokenizer,
            max_length=jigsaw.model_max_length,
            transform_system=data.transform_system,
            transform_answers=data.transform_answers,
            ignore_prompt_loss=data.ignore_prompt_loss,
        )
        dataset = JigsawDataset(marking, prompts["data"], data.max_train_samples)
        held_out = prompts.get("val", prompts["data"])
        measured = JigsawDataset(marking, held_out, data.max_eval_samples)
        trainer = JigsawTrainer(
            model,
            args,
            marking.collate,
            dataset,
            jigsaw_args=jigsaw,
            peft_config=lora_config(model, flags[LoraFlags], jigsaw),
        )
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    if begin is not None:
        begin()
    shard_now(trainer, "run")
    size = args.per_device_eval_batch_size
    starts = range(0, len(measured), size)
    pair: Any = trainer.model

    def measured_now() -> dict[str, float]:
        batches = (
            marking.collate([measured[i] for i in range(s, min(s + size, len(measured)))])
            for s in starts
        )
        with trainer.accelerator.autocast():
            return measure(pair, batches, attacks_on(pair.base, pair.cloak), args.seed)

    before = measured_now()
    if not all(map(math.isfinite, before.values())):
        raise Failed("--model: its outputs on this data are not finite: it is damaged")
    fit(trainer, run)
    save(run, trainer, tokenizer, flags, jigsaw)
    after = measured_now()
    if not all(map(math.isfinite, after.values())):
        raise Failed("the training ended with outputs that are not finite: lower --learning_rate")
    write_curves(run, "Jigsaw", PANELS)
    rows = [
        [text, *(_shown(name, found[name]) for found in (before, after))]
        for name, text in MEASURES.items()
        if name in after
    ]
    title = "Held-out text" if "val" in prompts else "The training text (no validation)"
    write_summary(
        run,
        f"{title}: distances to the teacher on clean text, before the training and after",
        ["measure", "before", "after"],
        rows,
        before=before,
        after=after,
        base_model=flags[ModelFlags].model_name_or_path,
    )
    save(run, trainer, tokenizer, flags, jigsaw, {row[0]: row[2] for row in rows})
    push(run, trainer, (f"{ADAPTER}/*", f"{SGT}/*", *FILES, *TOKENIZER))
    tell(f"wrote {run.path}: {ADAPTER}/, {SGT}/, {', '.join(FILES)}")
    recovered = max(after["recovery_l2"], after["recovery_cosine"])
    if recovered > WEAK:
        tell(
            f"the nearest embedding still gives {recovered:.0%} of the tokens away: train longer"
            " (--max_steps), or raise --learning_rate or"
            " --absolute_cosine_similarity_penalty_weight"
        )
    if after.get("agreement", 1.0) < AGREES:
        tell(
            f"the student's next token is the teacher's in {after['agreement']:.0%} only: train"
            " longer, raise --lora_r, or lower --learning_rate if the loss does not fall"
        )
    if (informed := after.get("recovery_informed", 0.0)) > WEAK:
        tell(
            f"who has the transform recovers {informed:.0%} of the tokens: keep it from those who"
            " see what it makes of text, or raise --mutual_information_loss_weight"
        )
    return 0


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name in SHARES else f"{value:.3f}"


def save(
    run: RunFolder,
    trainer: Any,
    tokenizer: Any,
    flags: Flags,
    jigsaw: JigsawArguments,
    results: dict[str, str] | None = None,
) -> None:
    """adapter/ and sgt/, the tokenizer and the card."""
    from ..training.card import model_card

    state = trainer.whole_state()
    if not run.is_main:
        return
    run.save(lambda folder: trainer.save_adapter(folder, state), ADAPTER)
    run.save(lambda folder: trainer.save_sgt(folder, state), SGT)
    base = flags[ModelFlags].model_name_or_path or ""
    card = model_card(
        "Jigsaw",
        base_model=base,
        tags=["jigsaw", "stained-glass-transform"],
        text=f"A transform of input embeddings (`{SGT}/`) and a LoRA adapter (`{ADAPTER}/`) that"
        " understands what it makes of them; the base model does not, nor does the adapted one"
        " understand clean embeddings. Load them with"
        f" `onepass.jigsaw.TransformerCloak.from_pretrained(folder + '/{SGT}')` and"
        f" `PeftModel.from_pretrained(base_model, folder + '/{ADAPTER}')`; the client sends"
        f" `cloak(embeddings).noisy`, the server answers with `model.generate(inputs_embeds=...)`."
        f" `{SGT}/` is the client's: who has it may undo what it does (see `recovered, given the"
        " transform`). Do not publish it beside the adapter.",
        facts={
            "held-out text": results or {},
            "loss and transform": asdict(jigsaw),
            "adapter": asdict(flags[LoraFlags]),
        },
    )

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    run.save(write)
