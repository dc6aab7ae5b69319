"""`onepass train circuit-breaker`: representation rerouting of a causal language model.

Without --model and data it trains a small model on the interpreter's documentation and source code
first, then breaks the code. Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.errors import UsageError, one_line
from ..training.flags import (
    Flags,
    ModelFlags,
    RunFlags,
    check_above_0,
    check_from,
    check_lora_flags,
    check_share,
    flag,
    training_arguments,
)
from ..training.prompts import Prompt, read_prompts, split
from ..training.run_folder import RunFolder, fingerprints, tell
from .arguments import LoraArguments, LorraArguments, numbers
from .examples import REFUSAL, example_of
from .options import ADAPTER_OFF, FROZEN_COPY, PRECOMPUTED

if TYPE_CHECKING:
    import torch

SMALL = {  # what suits the small model, where nothing else is said
    "learning_rate": 5e-3,
    "lorra_alpha": 10.0,
    "lora_r": 8,
    "per_device_train_batch_size": 8,
    "gradient_checkpointing": False,
}
FILES = ("retain", "harmful", "retain_val", "harmful_val")
DEFAULTS = {
    "max_steps": 150,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 16,
}
REFERENCE = "reference"
STILL = 0.9  # a mean cosine above it is no circuit breaker
ADAPTER = ("adapter_model.safetensors", "adapter_config.json", "lorra_config.json", "README.md")
PANELS = [
    (
        "Losses",
        "mean since the last log",
        {"circuit_breaker/retain_loss": "retain", "circuit_breaker/cb_loss": "circuit breaker"},
        {},
    ),
    (
        "Cosine to the original states",
        "mean cosine",
        {
            "circuit_breaker/retain_cosine": "retain",
            "circuit_breaker/cb_cosine": "circuit breaker",
            "circuit_breaker/val_cosine": "validation",
        },
        {"ylim": (-1.05, 1.05)},
    ),
    (
        "Coefficients",
        "weight in the loss",
        {"circuit_breaker/retain_coeff": "retain", "circuit_breaker/cb_coeff": "circuit breaker"},
        {},
    ),
    (
        "Norm of the states",
        "mean norm",
        {
            "circuit_breaker/retain_norm": "retain",
            "circuit_breaker/cb_norm": "circuit breaker",
            "circuit_breaker/cb_reference_norm": "circuit breaker, original",
        },
        {},
    ),
]


@dataclass
class DataFlags:
    """The data."""

    retain: str | None = flag(None, "text to hold in place (json, jsonl, txt)", metavar="FILE")
    harmful: str | None = flag(None, "text to turn away (json, jsonl, txt)", metavar="FILE")
    retain_val: str | None = flag(None, "to measure on (default: a share)", metavar="FILE")
    harmful_val: str | None = flag(None, "to measure on (default: a share)", metavar="FILE")
    validation_ratio: float = flag(0.1, "that share; 0: measure on all")
    num_examples: int | None = flag(None, "of each kind at most (default: all)")
    fast: bool = flag(False, "a smaller model, where one is made here")
    category: str | None = flag(None, "leave out prompts of others")


FLAGS = (ModelFlags, DataFlags, LorraArguments, LoraArguments, RunFlags)


def check(flags: Flags) -> None:
    """UsageError for what can be refused before libraries are loaded and files written."""
    model, data, lorra = flags[ModelFlags], flags[DataFlags], flags[LorraArguments]
    missing = [n for n in ("retain", "harmful") if getattr(data, n) is None]
    if len(missing) == 1:
        raise UsageError(f"--{missing[0]}: got nothing, wanted a file beside the other side's")
    if missing and model.model_name_or_path is not None:
        raise UsageError(
            "--retain and --harmful: got no files, wanted both with --model",
            hint="leave out --model for a small model and text made here",
        )
    if missing and (data.retain_val or data.harmful_val):
        raise UsageError("--retain_val, --harmful_val: wanted --retain and --harmful with them")
    if data.fast and model.model_name_or_path is not None:
        raise UsageError("--fast: is of the model made here; leave it out with --model")
    if model.model_name_or_path is None:
        flags.prefer(SMALL)
        from ..demo import settings

        size = settings.FAST if data.fast else settings.FULL
        try:
            lorra.blocks_of(size.n_layers)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
    if model.load_in_8bit and model.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if flags.overrides.get("eval_strategy", "no") != "no" or flags.overrides.get("do_eval"):
        raise UsageError("--eval_strategy: held-out text is measured at the end; leave it out")
    if lorra.log_every is not None:
        flags[RunFlags].logging_steps = lorra.log_every
    _check_numbers(data, lorra, flags[LoraArguments])
    if not missing:
        for name in FILES:
            if (path := getattr(data, name)) is not None:  # resumed from anywhere
                setattr(data, name, str(Path(path).absolute()))
        found = read_data(data)
        if lorra.use_refusal_retain and not any(
            isinstance(prompt.record.get(REFUSAL), str) for prompt in found["harmful"]
        ):
            raise UsageError(f"--use_refusal_retain: no entry of {data.harmful} has {REFUSAL!r}")


def _check_numbers(data: DataFlags, lorra: LorraArguments, lora: LoraArguments) -> None:
    check_share("validation_ratio", data.validation_ratio)
    if data.num_examples is not None:
        check_from("num_examples", data.num_examples, 1)
    check_from("model_max_length", lorra.model_max_length, 2)
    check_from("init_jitter", lorra.init_jitter, 0)
    check_above_0("lorra_alpha", lorra.lorra_alpha)
    check_lora_flags(lora)
    try:
        if lorra.target_layers is not None:
            numbers("--target_layers", lorra.target_layers)
        numbers("--transform_layers", lorra.transform_layers)
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_data(data: DataFlags, seed: int = 0) -> dict[str, list[Prompt]]:
    """The prompts of `retain` and `harmful`, and of `retain_val` and `harmful_val`.

    Raises:
        UsageError: a file that is missing, empty or malformed, by file and line.
    """
    found: dict[str, list[Prompt]] = {}
    for side in ("retain", "harmful"):
        for name in (side, f"{side}_val"):
            if (path := getattr(data, name)) is None:
                continue
            try:
                found[name] = read_prompts(path, category=data.category)
                for prompt in found[name]:
                    example_of(prompt)
            except (ValueError, OSError) as error:
                raise UsageError(f"--{name}: {one_line(error, 1000)}") from error
        if f"{side}_val" not in found and data.validation_ratio:
            try:
                found[side], found[f"{side}_val"] = split(found[side], data.validation_ratio, seed)
            except ValueError as error:
                raise UsageError(f"--{error}") from error
    return found


def train(flags: Flags, run: RunFolder) -> int:
    """Train, then measure; returns the exit code."""
    from ..training import small_model

    data, lorra = flags[DataFlags], flags[LorraArguments]
    tell("loading the libraries")
    args = training_arguments(flags)
    writes = (*ADAPTER, REFERENCE, small_model.MODEL, small_model.DATA)
    begin = partial(run.begin, fingerprints({n: getattr(data, n) for n in FILES}), writes=writes)
    makes_model = flags[ModelFlags].model_name_or_path is None
    if makes_model:
        begin()
        folder = small_model.small_language_model(run, args.seed, data.fast)
        flags[ModelFlags].model_name_or_path = str(folder)
        if data.retain is None:
            files = small_model.data_files(run.path)
            data.retain, data.harmful = str(files["retain"]), str(files["harmful"])
            data.retain_val = str(files["retain_held_out"])
            data.harmful_val = str(files["harmful_held_out"])
    from ..cli.terminal import quiet_libraries

    with quiet_libraries():
        return _train(flags, run, args, read_data(data), lorra, None if makes_model else begin)


def _train(
    flags: Flags,
    run: RunFolder,
    args: Any,
    prompts: dict[str, list[Prompt]],
    lorra: LorraArguments,
    begin: Callable[[], None] | None,
) -> int:
    from ..training.curves import write_curves, write_summary
    from ..training.models import load_language_model
    from ..training.monitor import fit
    from ..training.processes import shard_now
    from ..training.push import push
    from .adapter import lora_config
    from .data import CircuitBreakerDataset, tokens_of
    from .evaluate import cosines, nats_per_token
    from .reference import precompute
    from .trainer import CircuitBreakerTrainer

    model, tokenizer = load_language_model(flags[ModelFlags], args)
    lorra = replace(lorra, model_max_length=_length(model, lorra))
    reference: str | torch.nn.Module = lorra.reference
    if reference == FROZEN_COPY:
        import copy

        reference = copy.deepcopy(model).requires_grad_(False)
    try:
        measured = {
            side: tokens_of(
                tokenizer,
                [example_of(p, tokenizer) for p in prompts.get(f"{side}_val", prompts[side])],
                lorra.model_max_length,
            )
            for side in ("retain", "harmful")
        }
        dataset: Any = CircuitBreakerDataset(
            tokenizer,
            flags[DataFlags].num_examples,
            lorra,
            retain=prompts["retain"],
            harmful=prompts["harmful"],
            val=prompts.get("harmful_val"),
            seed=args.seed,
        )
        trainer = CircuitBreakerTrainer(
            model,
            args,
            train_dataset=dataset,
            lorra_args=lorra,
            reference=reference,
            peft_config=lora_config(model, flags[LoraArguments], lorra),
        )
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    if begin is not None:
        begin()
    shard_now(trainer)
    size = args.per_device_eval_batch_size
    original = {
        s: nats_per_token(trainer.model, t, size, adapter=False) for s, t in measured.items()
    }
    if lorra.reference == PRECOMPUTED:
        before = trainer.rerouting_of(ADAPTER_OFF)
        tell(f"precomputing the hidden states of {len(dataset)} examples in {run.path / REFERENCE}")
        with trainer.compute_loss_context_manager():  # in the dtype that training sees
            trainer.train_dataset = precompute(trainer.model, dataset, before, run.path / REFERENCE)
    fit(trainer, run)
    save(run, trainer, lorra, flags)
    after = {s: nats_per_token(trainer.model, t, size) for s, t in measured.items()}
    turned = cosines(
        trainer.model,
        measured["retain"],
        measured["harmful"],
        trainer.rerouting_of(ADAPTER_OFF),
        size,
    )
    write_curves(run, "Circuit breaker", PANELS)
    rows = [
        [side, *(f"{x:.3f}" for x in (original[side], after[side])),
         f"{after[side] / original[side] - 1:+.1%}", f"{turned[side]:.3f}"]
        for side in measured
    ]  # fmt: skip
    title = "Held-out text" if "harmful_val" in prompts else "The training text (no validation)"
    write_summary(
        run,
        f"{title}: nats per token, and the cosine to the original hidden states",
        ["text", "original", "trained", "change", "cosine"],
        rows,
        nats_per_token={"original": original, "trained": after},
        cosine=turned,
        target_layers=list(trainer.rerouting.target_layers),
    )
    save(
        run,
        trainer,
        lorra,
        flags,
        {row[0]: " -> ".join(row[1:3]) + f", cosine {row[4]}" for row in rows},
    )
    push(run, trainer, (*ADAPTER, "metrics.jsonl", "curves.png", "summary.json"))
    tell(f"wrote {run.path}: {', '.join(ADAPTER[:2])}, metrics.jsonl, curves.png, summary.json")
    if turned["harmful"] > STILL:
        tell(
            f"the states of the harmful text have hardly turned (cosine {turned['harmful']:.2f}):"
            " train longer (--max_steps), or raise --learning_rate or --lorra_alpha"
        )
    return 0


def _length(model: Any, lorra: LorraArguments) -> int:
    """`model_max_length`, or what the model has positions for where that is less."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = lorra.model_max_length
    return min(positions, longest) if isinstance(positions, int) else longest


def save(
    run: RunFolder,
    trainer: Any,
    lorra: LorraArguments,
    flags: Flags,
    results: dict[str, str] | None = None,
) -> None:
    """The adapter as PEFT keeps it, with the card and what it was made with."""
    from ..training.card import model_card
    from ..training.processes import whole_state

    used = replace(lorra, target_layers=",".join(map(str, trainer.rerouting.target_layers)))
    state = whole_state(trainer)
    if not run.is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        (folder / "lorra_config.json").write_text(
            json.dumps(asdict(used), indent=1) + "\n", encoding="utf-8"
        )
        base = flags[ModelFlags].model_name_or_path or ""
        card = model_card(
            "Circuit breaker",
            base_model=base,
            tags=["circuit-breaker", "representation-rerouting"],
            text="A LoRA adapter that turns the hidden states of harmful text away from where they"
            " were, and holds those of all other text in place (Zou et al. 2024, arXiv 2406.04313)."
            " Load it with PEFT: `PeftModel.from_pretrained(base_model, folder)`.",
            facts={
                "nats per token": results or {},
                "rerouting": asdict(used),
                "adapter": asdict(flags[LoraArguments]),
            },
        )
        with contextlib.suppress(FileNotFoundError):
            (folder / "README.md").unlink()  # PEFT's unfilled form
        (folder / "README.md").write_text(card, encoding="utf-8")

    run.save(write)
