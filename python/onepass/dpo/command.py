"""`onepass train dpo`: a causal language model learns which of two answers is preferred.

Without --model and --data it trains a small model on the interpreter's documentation and source
code first, then to go on in prose rather than in code. Imports nothing heavy before all that can be
refused has been.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
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
    default_of,
    flag,
    training_arguments,
)
from ..training.hub_data import DatasetFlags, serialized
from ..training.run_folder import TOKENIZER, RunFolder, digest, fingerprints, tell
from .arguments import DPOArguments

SMALL = {  # what suits the small model, where nothing else is said
    "learning_rate": 5e-4,
    "max_steps": 100,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 16,
    "gradient_checkpointing": False,
    "max_length": 128,
    "max_eval_samples": 96,
}
SMALL_FAST = SMALL | {"max_steps": 60, "max_length": 64}
DEFAULTS = {"learning_rate": 1e-5}
ADAPTER, MODEL = "adapter", "model"
PAIRS = {"data": "pairs.jsonl", "val": "pairs_held_out.jsonl"}  # where they are made here
WEAK = 0.6  # a share of pairs told apart below it is little learnt
FILES = ("README.md", "metrics.jsonl", "curves.png", "summary.json")
# what the table calls the facts of an evaluation
MEASURES = {
    "loss": "loss",
    "rewards/accuracies": "pairs told apart",
    "rewards/margins": "reward of chosen, less rejected",
    "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected",
    "logps/chosen": "log-probability of chosen",
    "logps/rejected": "log-probability of rejected",
    "entropy": "entropy of a token, nats",
    "mean_token_accuracy": "tokens that are the likeliest",
}
SHARES = ("rewards/accuracies", "mean_token_accuracy")
PANELS: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    ("Loss", "mean since the last log", {"loss": "training"}, {}),
    (
        "Pairs told apart",
        "share since the last log",
        {"rewards/accuracies": "reward of chosen above rejected"},
        {"ylim": (-0.05, 1.05)},
    ),
    (
        "Rewards",
        "mean since the last log",
        {
            "rewards/chosen": "chosen",
            "rewards/rejected": "rejected",
            "rewards/margins": "difference",
        },
        {},
    ),
    (
        "Log-probabilities",
        "mean since the last log, nats",
        {"logps/chosen": "chosen", "logps/rejected": "rejected"},
        {},
    ),
]


@dataclass
class DataFlags:
    """The data."""

    data: str | None = flag(None, "pairs: [prompt,] chosen, rejected (json, jsonl)", metavar="FILE")
    val: str | None = flag(None, "to measure on (default: a share)", metavar="FILE")
    validation_ratio: float = flag(0.1, "that share; 0: measure on all")
    max_train_samples: int | None = flag(None, "at most (default: all)", advanced=True)
    max_eval_samples: int | None = flag(None, "measured at most (default: all)")
    fast: bool = flag(False, "a smaller model, where one is made here")


@dataclass
class AdapterFlags(LoraFlags):
    """The adapter."""

    lora_dropout: float = flag(0.0, "share of inputs dropped, with --no_disable_dropout")
    use_peft: bool = flag(True, "train LoRA; off: all weights")


FLAGS = (ModelFlags, DataFlags, DatasetFlags, DPOArguments, AdapterFlags, RunFlags)


def check(flags: Flags) -> None:
    """UsageError for what can be refused before libraries are loaded and files written."""
    model, data, dpo = flags[ModelFlags], flags[DataFlags], flags[DPOArguments]
    adapter, dataset = flags[AdapterFlags], flags[DatasetFlags]
    dataset.check()
    if dataset.dataset_name is not None:
        for name in ("data", "val"):
            if getattr(data, name) is not None:
                raise UsageError(f"--{name}: --dataset_name has the pairs; leave one out")
        if model.model_name_or_path is None:
            raise UsageError("--dataset_name: wanted --model with it")
        if Path(dataset.dataset_name).is_dir():  # resumed from anywhere
            dataset.dataset_name = str(Path(dataset.dataset_name).absolute())
    elif data.data is None:
        if model.model_name_or_path is not None:
            raise UsageError(
                "--data: got no file, wanted one with --model",
                hint="leave out --model for a small model and pairs made here",
            )
        if data.val is not None:
            raise UsageError("--val: wanted --data with it")
    if data.fast and model.model_name_or_path is not None:
        raise UsageError("--fast: is of the model made here; leave it out with --model")
    if model.model_name_or_path is None:
        flags.prefer(SMALL_FAST if data.fast else SMALL)
    if model.load_in_8bit and model.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")
    if (model.load_in_8bit or model.load_in_4bit) and not adapter.use_peft:
        raise UsageError("--no_use_peft: weights in 4 or 8 bits are frozen; train an adapter")
    if flags.overrides.get("eval_strategy", "no") != "no" or flags.overrides.get("do_eval"):
        raise UsageError("--eval_strategy: held-out pairs are measured at the end; leave it out")
    check_share("validation_ratio", data.validation_ratio)
    for name in ("max_train_samples", "max_eval_samples"):
        if (number := getattr(data, name)) is not None:
            check_from(name, number, 1)
    check_lora_flags(adapter)
    if dpo.disable_dropout and adapter.lora_dropout:
        raise UsageError(
            "--lora_dropout: --disable_dropout, which is the default, takes it out",
            hint="add --no_disable_dropout, or leave out --lora_dropout",
        )
    check_used(flags)
    if dpo.sync_ref_model and adapter.use_peft:
        raise UsageError("--sync_ref_model: wanted --no_use_peft: an adapter's reference is fixed")
    if data.data is not None:
        for name in ("data", "val"):
            if (path := getattr(data, name)) is not None:  # resumed from anywhere
                setattr(data, name, str(Path(path).absolute()))
        read_data(data, dataset)
    try:
        dpo.check()  # last: it loads torch
    except (ValueError, TypeError) as error:
        raise UsageError(f"--{error}") from error


def check_used(flags: Flags) -> None:
    """UsageError for a flag that says what nothing would read."""
    dpo, adapter = flags[DPOArguments], flags[AdapterFlags]
    usual = {f.name: default_of(f) for kind in (dpo, adapter) for f in fields(kind)}
    now = vars(dpo) | vars(adapter)
    losses = [name.lower() for name in dpo.loss_type]
    alpha = "alpha" in losses or dpo.f_divergence_type.lower() in ("alpha", "alpha_divergence")
    of_lora = [f.name for f in fields(LoraFlags)]
    for used, names, by in (
        (alpha, ["alpha", "f_alpha_divergence_coef"], "the alpha divergence"),
        ("discopop" in losses, ["discopop_tau"], "--loss_type discopop"),
        ("ipo" in losses, ["ipo_average"], "--loss_type ipo"),
        (
            dpo.sync_ref_model,
            ["ref_model_mixup_alpha", "ref_model_sync_steps"],
            "--sync_ref_model",
        ),
        (
            dpo.precompute_ref_log_probs,
            ["precompute_ref_batch_size"],
            "--precompute_ref_log_probs",
        ),
        (adapter.use_peft, of_lora, "an adapter, not --no_use_peft"),
    ):
        for name in names:
            if not used and now[name] != usual[name]:
                raise UsageError(f"--{name}: is of {by}; leave it out")


def read_data(
    data: DataFlags, dataset: DatasetFlags, seed: int = 0
) -> dict[str, list[dict[str, Any]]]:
    """The pairs of `data`, and of `val` where there are any; or those of a dataset.

    Raises:
        UsageError: a file that is missing, empty or malformed, by file and line.
    """
    from ..training.prompts import Prompt, split
    from .examples import check_pair, read_preferences

    found: dict[str, list[Prompt]] = {}
    if data.data is not None and data.val == data.data:
        raise UsageError("--val: is --data itself: leave it out, or --validation_ratio 0")
    if dataset.dataset_name is not None:
        for part, rows in dataset.load().items():
            try:
                for row in rows:
                    check_pair(row, row["place"])
            except ValueError as error:
                raise UsageError(f"--dataset_name: {one_line(error, 1000)}") from error
            file = Path(dataset.dataset_name)
            found[part] = [Prompt("", row, file, None, None) for row in rows]
    for name in ("data", "val"):
        if (path := getattr(data, name)) is None:
            continue
        try:
            found[name] = read_preferences(path, dataset.names)
        except (ValueError, OSError) as error:
            raise UsageError(f"--{name}: {one_line(error, 1000)}") from error
    if "val" not in found and data.validation_ratio:
        # By prompt: pairs of one prompt share their answers.
        by_prompt: dict[str, list[Prompt]] = {}
        for entry in found["data"]:
            by_prompt.setdefault(_prompt_of(entry.record), []).append(entry)
        firsts = [entries[0] for entries in by_prompt.values()]
        try:
            parts = split(firsts, data.validation_ratio, seed, what="prompts")
        except ValueError as error:
            raise UsageError(f"--{error}", hint="name others with --val, or 0") from error
        held = {id(entry) for entry in parts[1]}
        found["data"], found["val"] = (
            [e for es in by_prompt.values() if (id(es[0]) in held) == held_out for e in es]
            for held_out in (False, True)
        )
    return {name: [entry.record for entry in entries] for name, entries in found.items()}


def _prompt_of(record: dict[str, Any]) -> str:
    """What pairs of one prompt have in common; texts without a prompt stand alone."""
    from .examples import split_prompt

    if record.get("prompt") or not isinstance(record["chosen"], str):
        return json.dumps(record.get("prompt") or split_prompt(record)["prompt"])
    return str(record["chosen"])


def small_pairs(folder: Path) -> dict[str, Path]:
    """Pairs of the small model's own text, made unless they are there: the prompt is the first
    third of a passage of the documentation, chosen how it goes on, rejected source code of as many
    tokens."""
    from ..cli.files import replace_text
    from ..training import small_model
    from ..training.run_folder import is_main_process

    texts = small_model.data_files(folder)
    files = {name: folder / small_model.DATA / file for name, file in PAIRS.items()}
    for name, ending in (("data", ""), ("val", "_held_out")):
        if files[name].is_file() or not is_main_process():
            continue
        prose, code = (_texts_of(texts[side + ending]) for side in ("retain", "harmful"))
        lines = []
        for passage, source in zip(prose, code, strict=False):  # windows of one length in tokens
            at, end = passage.rfind(" ", 0, len(passage) // 3), round(0.8 * len(passage))
            chosen = passage[at:end]
            rejected = source[: len(source) * len(chosen) // len(passage)]
            if at > 0 and rejected.strip():
                pair = {"prompt": passage[:at], "chosen": chosen, "rejected": rejected}
                lines.append(json.dumps(pair) + "\n")
        replace_text(files[name], "".join(lines))
    return files


def _texts_of(file: Path) -> list[str]:
    lines = file.read_text(encoding="utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def train(flags: Flags, run: RunFolder) -> int:
    """Train, then measure; returns the exit code."""
    from ..training import small_model
    from ..training.made_once import wait_for

    data, dataset = flags[DataFlags], flags[DatasetFlags]
    tell("loading the libraries")
    args = training_arguments(flags)
    writes = (ADAPTER, MODEL, *FILES, *TOKENIZER, small_model.MODEL, small_model.DATA)
    digests = fingerprints({"data": data.data, "val": data.val})
    pairs = None
    if dataset.dataset_name is not None:
        pairs = read_data(data, dataset, args.seed)
        digests["dataset"] = digest(serialized([row for rows in pairs.values() for row in rows]))
    begin = partial(run.begin, digests, writes=writes)
    makes_model = flags[ModelFlags].model_name_or_path is None
    if makes_model:
        begin()
        folder = small_model.small_language_model(run, args.seed, data.fast)
        flags[ModelFlags].model_name_or_path = str(folder)
        if data.data is None:
            files = small_pairs(run.path)
            wait_for(lambda: all(file.is_file() for file in files.values()), str(files["data"]))
            data.data, data.val = str(files["data"]), str(files["val"])
    from ..cli.terminal import quiet_libraries

    with quiet_libraries():
        pairs = read_data(data, dataset, args.seed) if pairs is None else pairs
        return _train(flags, run, args, pairs, None if makes_model else begin)


def _train(
    flags: Flags,
    run: RunFolder,
    args: Any,
    pairs: dict[str, list[dict[str, Any]]],
    begin: Callable[[], None] | None,
) -> int:
    from ..training.curves import write_curves, write_summary
    from ..training.lora import lora_in_blocks
    from ..training.models import load_language_model
    from ..training.monitor import fit
    from ..training.push import push
    from .data import PreferenceDataset
    from .trainer import DPOTrainer

    data, adapter = flags[DataFlags], flags[AdapterFlags]
    model, tokenizer = load_language_model(flags[ModelFlags], args)
    dpo = replace(flags[DPOArguments])
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and dpo.max_length is not None:
        dpo.max_length = min(positions, dpo.max_length)
    held_out = pairs.get("val", pairs["data"])
    try:
        dpo.check()
        dataset = PreferenceDataset(tokenizer, pairs["data"][: data.max_train_samples], dpo)
        measured = PreferenceDataset(tokenizer, held_out[: data.max_eval_samples], dpo)
        trainer = DPOTrainer(
            model,
            args=args,
            train_dataset=dataset,
            eval_dataset=measured,
            tokenizer=tokenizer,
            dpo_args=dpo,
            peft_config=lora_in_blocks(model, adapter) if adapter.use_peft else None,
        )
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    if begin is not None:
        begin()

    def measured_now() -> dict[str, float]:
        loader = trainer.get_eval_dataloader()
        found = trainer.evaluation_loop(loader, "measuring", prediction_loss_only=True).metrics
        return {name: float(found[f"eval_{name}"]) for name in MEASURES}

    before = measured_now()
    if not all(map(math.isfinite, before.values())):
        raise Failed("--model: its outputs on this data are not finite: it is damaged")
    fit(trainer, run)
    save_weights(run, trainer, tokenizer, adapter.use_peft)
    after = measured_now()
    if not all(map(math.isfinite, after.values())):
        raise Failed("the training ended with outputs that are not finite: lower --learning_rate")
    write_curves(run, "DPO", PANELS)
    rows = [
        [text, *(_shown(name, found[name]) for found in (before, after))]
        for name, text in MEASURES.items()
    ]
    title = "Held-out pairs" if "val" in pairs else "The training pairs (no validation)"
    as_it_was = "before the training"
    if not (dpo.reference_free or measured.has_reference and not dpo.precompute_ref_log_probs):
        as_it_was += ", where policy and reference are one,"
    cut = {"train": [dataset.n_cut, dataset.n_cut_tokens]}
    cut["measured"] = [measured.n_cut, measured.n_cut_tokens]
    equal = {"train": dataset.n_equal, "measured": measured.n_equal}
    write_summary(
        run,
        f"{title}: {as_it_was} and after",
        ["measure", "before", "after"],
        rows,
        before=before,
        after=after,
        n_pairs={"train": len(dataset), "measured": len(measured)},
        cut_pairs_and_tokens=cut,
        left_out_as_equal=equal,
        base_model=flags[ModelFlags].model_name_or_path,
    )
    save_card(run, tokenizer, flags, dpo, {row[0]: row[2] for row in rows})
    made = ADAPTER if adapter.use_peft else MODEL
    push(run, trainer, (f"{made}/*", *FILES, *TOKENIZER))
    tell(f"wrote {run.path}: {made}/, {', '.join(FILES)}")
    if after["rewards/accuracies"] < WEAK:
        tell(
            f"{after['rewards/accuracies']:.0%} of the pairs are told apart: train longer"
            " (--max_steps), or raise --learning_rate"
        )
    return 0


def _shown(name: str, value: float) -> str:
    return f"{value:.1%}" if name in SHARES else f"{value:.3f}"


def save_weights(run: RunFolder, trainer: Any, tokenizer: Any, uses_peft: bool) -> None:
    """adapter/ as PEFT keeps it, or model/."""
    from ..training.processes import whole_state

    state = whole_state(trainer)
    if not run.is_main:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)

    def write(folder: Path) -> None:
        if uses_peft:
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # PEFT's unfilled form
        else:
            model.save_pretrained(folder, state_dict=state)
            tokenizer.save_pretrained(folder)

    run.save(write, ADAPTER if uses_peft else MODEL)


def save_card(
    run: RunFolder, tokenizer: Any, flags: Flags, dpo: DPOArguments, results: dict[str, str]
) -> None:
    """README.md, and the tokenizer."""
    from ..training.card import model_card

    if not run.is_main:
        return
    uses_peft = flags[AdapterFlags].use_peft
    loads = (
        f"`PeftModel.from_pretrained(base_model, folder + '/{ADAPTER}')`"
        if uses_peft
        else f"`AutoModelForCausalLM.from_pretrained(folder + '/{MODEL}')`"
    )
    card = model_card(
        "DPO",
        base_model=flags[ModelFlags].model_name_or_path or "",
        tags=["dpo", "preference-optimization"],
        text="A language model trained on pairs of a chosen and a rejected answer (Rafailov et al."
        " 2023, arXiv 2305.18290; divergences after Wang et al. 2023, arXiv 2309.16240). Load it"
        f" with {loads}.",
        facts={
            "held-out pairs": results,
            "loss and data": asdict(dpo),
            "adapter": asdict(flags[AdapterFlags]) if uses_peft else {},
        },
    )

    def write(folder: Path) -> None:
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")

    run.save(write)
