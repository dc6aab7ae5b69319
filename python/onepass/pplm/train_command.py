"""`onepass pplm train-discriminator`: a head that tells classes of text apart, to steer by.

Without --model it is a small model's, which tells prose from code. Imports nothing heavy before all
that can be refused has been.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cli.errors import Parser, UsageError, nearest, one_line, unknown
from ..dpo.command_line import check_installed, check_model, device_of, load_policy
from ..training.flags import Flags, ModelFlags, RunFlags, check_above_0, check_from, flag, parse
from ..training.run_folder import (
    CURVES,
    METRICS,
    SUMMARY,
    RunFolder,
    digest,
    read_run,
    tell,
    versions,
)
from .names import HEAD

if TYPE_CHECKING:
    from .discriminator import DiscriminatorV2

PROGRAM, SCHEMA, SYSTEM = "onepass pplm", 1, "pplm-discriminator"
NEEDED = ("transformers", "tokenizers", "safetensors", "tqdm", "matplotlib")
TABLES = {".csv": ",", ".tsv": "\t"}
LINES = (".jsonl", ".ndjson", ".json")
POOLS = {"mean": 2, "sum": 1}  # versions of the discriminator
SUMMARIES = {"train-discriminator": "train a head on a frozen model that tells classes apart"}
MAX_SHOWN = 8  # classes beside each other in a table
STILL_FALLING = 5e-3  # nats in the last epoch
PANELS: list[tuple[str, str, dict[str, str], dict[str, Any]]] = [
    ("Loss", "nats a text", {"loss": "trained on", "held_out_loss": "held out"}, {}),
    ("Accuracy", "share of texts", {"held_out_accuracy": "held out"}, {"ylim": (0, 1.02)}),
]
# What suits the small model, where nothing else is said.
SMALL = {"learning_rate": 5e-3, "epochs": 20, "max_length": 64}


class Rows(NamedTuple):
    """Texts and their classes."""

    texts: list[str]
    labels: list[str]


@dataclass
class DataFlags:
    """The data."""

    data: str | None = flag(
        None,
        "csv, tsv or jsonl (default: prose and code)",
        metavar="FILE",
        aliases=["--dataset_fp"],
    )
    val: str | None = flag(None, "to measure on, in place of a held-out share", metavar="FILE")
    text_column: str = flag("text", "the column of the texts", metavar="NAME")
    label_column: str = flag("label", "the column of the classes", metavar="NAME")
    max_length: int = flag(256, "tokens read of a text at most")
    held_out: float = flag(0.1, "share of each class to measure on")


@dataclass
class TrainFlags:
    """The head."""

    pool: str = flag("mean", "over the tokens", choices=list(POOLS))
    binary: bool = flag(False, "one logit for two classes, as PPLM.jl")
    default_class: str | None = flag(None, "what to steer to (default: the first)", metavar="NAME")
    epochs: int = flag(10, "passes over the texts")
    learning_rate: float = flag(1e-4, "of Adam")
    batch_size: int = flag(64, "texts a step")
    seed: int = flag(42, "of weights, split and order")


@dataclass
class OutputFlags:
    """The command."""

    output_dir: str = flag("onepass-discriminator", "folder of the head", metavar="DIR")
    overwrite: bool = flag(False, "replace an earlier one in the folder")
    json: bool = flag(False, "print JSON, not a table")
    device: str = flag("auto", "auto: the GPU where there is one", choices=["auto", "cpu", "cuda"])
    config: str | None = flag(None, "YAML file of flags", metavar="FILE")


FLAGS = (ModelFlags, DataFlags, TrainFlags, OutputFlags)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `onepass pplm` itself takes: the name of an action."""
    listed = "\n".join(f"  {name}  {told}" for name, told in SUMMARIES.items())
    parser.usage = f"{PROGRAM} ACTION [flags]"
    parser.description = f"Steering of generation by heads and bags of words.\n\n{listed}"
    parser.epilog = f"See also: {PROGRAM} ACTION --help, onepass generate pplm --help"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_tokens(tokens: Sequence[str]) -> int:
    """Run `onepass pplm` with `tokens`; returns the exit code."""
    if not tokens or tokens[0].startswith("-"):
        parser = Parser(prog=PROGRAM)
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if all(t == "--debug" for t in tokens):
            hint = f"see {PROGRAM} --help"
            raise UsageError("got no action", allowed=SUMMARIES, hint=hint, prog=PROGRAM)
        try:
            parser.parse_args(tokens)
        except UsageError as error:
            error.hint = f"flags follow the action: {PROGRAM} ACTION --flag"
            raise
    name, *rest = tokens
    if name not in SUMMARIES:
        raise unknown("action", name, SUMMARIES, prog=PROGRAM)
    try:
        return run(f"{PROGRAM} {name}", rest)
    except UsageError as error:
        error.prog = f"{PROGRAM} {name}"
        raise


def run(prog: str, tokens: Sequence[str]) -> int:
    """Refuse what cannot work, then train, write and print; returns the exit code."""
    told = f"{prog}: {SUMMARIES['train-discriminator']}. Without --model: a small one, on prose and"
    told += " code. Run it again to go on after an interruption."
    flags = parse(prog, FLAGS, tokens, description=told, training=False)
    rows = check(flags)
    folder = folder_of(flags)
    check_installed(NEEDED)
    from ..cli.terminal import quiet_libraries

    with quiet_libraries(), contextlib.ExitStack() as stack:
        stack.callback(folder.release)
        if rows is None:
            from ..demo.train import one_thread

            stack.enter_context(one_thread())  # what so small a model runs fastest on
        return _run(flags, folder, rows)


# -- what is refused ----------------------------------------------------------------------------


def check(flags: Flags) -> tuple[Rows, Rows | None] | None:
    """(rows to train on, rows to measure on where they are named); None for the embedded data.

    Raises:
        UsageError: what can be refused before libraries are loaded and files written.
    """
    data, head = flags[DataFlags], flags[TrainFlags]
    if flags[ModelFlags].model_name_or_path is not None:
        check_model(flags)
        if data.data is None:
            raise UsageError("--data: got nothing, wanted a file (csv, tsv, jsonl) with --model")
    elif data.data is not None:
        raise UsageError("--model: got nothing, wanted a model with --data: whose head is it?")
    elif data.val is not None:
        raise UsageError("--val: wanted --model and --data with it")
    else:
        flags.prefer(SMALL)
    for name in ("epochs", "batch_size"):
        check_from(name, getattr(head, name), 1)
    check_from("max_length", data.max_length, 2)
    check_from("seed", head.seed, 0)
    check_above_0("learning_rate", head.learning_rate)
    if not 0 <= data.held_out < 1:
        raise UsageError(f"--held_out: got {data.held_out}, wanted from 0 to below 1")
    if data.data is None:
        check_default_class(head, sorted(("code", "prose")))
        return None
    rows = read_rows(data.data, data, "--data")
    classes = Counter(rows.labels)
    if len(classes) < 2:
        raise UsageError(
            f"--data: {data.data}: all {len(rows.texts)} rows are of class {rows.labels[0]!r},"
            " wanted two classes or more"
        )
    if len(classes) == len(rows.texts) and len(classes) > 2:
        raise UsageError(
            f"--label_column: each row of {data.data} has a class of its own: is"
            f" {data.label_column!r} the column of the classes?"
        )
    if head.binary and len(classes) != 2:
        raise UsageError(f"--binary: {data.data} has {len(classes)} classes, wanted two")
    check_default_class(head, list(classes))
    if data.val is None:
        return rows, None
    val = read_rows(data.val, data, "--val")
    for label in val.labels:
        if label not in classes:
            meant = nearest(label, classes)
            raise UsageError(
                f"--val: {data.val}: class {label!r} is not in --data", allowed=classes, meant=meant
            )
    seen = set(rows.texts)
    kept = [pair for pair in zip(*val, strict=True) if pair[0] not in seen]
    if len(kept) < len(val.texts):
        tell(f"{len(val.texts) - len(kept)} texts of --val are in --data too: not measured on")
    if not kept:
        raise UsageError("--val: all of its texts are in --data, which is trained on")
    return rows, Rows([text for text, _ in kept], [label for _, label in kept])


def check_default_class(head: TrainFlags, classes: Sequence[str]) -> None:
    if head.default_class is not None and head.default_class not in classes:
        error = unknown("class", head.default_class, sorted(classes))
        error.message = f"--default_class: {error.message}"
        raise error


def read_rows(path: str, data: DataFlags, flag: str) -> Rows:
    """The rows of a file, each once.

    Raises:
        UsageError: no such file, column, text or class, by its line.
    """
    from ..training.prompts import utf8_text

    file = Path(path).expanduser()
    try:
        if file.suffix.lower() in LINES:
            found = _json_rows(file, data)
        elif file.suffix.lower() in TABLES:
            if not file.is_file():
                what = "is a folder, wanted a file" if file.is_dir() else "no such file"
                raise ValueError(f"{file}: {what}")
            found = _table_rows(file, utf8_text(file), data)
        else:
            wanted = ", ".join([*TABLES, *LINES])
            raise ValueError(f"{path!r} is no {wanted}")
        if not found:
            raise ValueError(f"{file}: holds no rows, wanted a text and its class in each")
    except (ValueError, OSError) as error:
        raise UsageError(f"{flag}: {one_line(error, 1000)}") from error
    once = list(dict.fromkeys(found))
    if len(once) < len(found):
        n = len(found) - len(once)
        tell(f"{flag}: {n} row{'s' * (n > 1)} came before: each is used once")
    return Rows([text for text, _ in once], [label for _, label in once])


def _table_rows(file: Path, text: str, data: DataFlags) -> list[tuple[str, str]]:
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter=TABLES[file.suffix.lower()], strict=True
    )
    columns = (data.text_column, data.label_column)
    found = []
    try:
        names = next(reader, [])
        for flag_name, column in zip(("text_column", "label_column"), columns, strict=True):
            if column not in names:
                listed = ", ".join(names[:12]) or "nothing"
                raise UsageError(
                    f"--{flag_name}: no column {column!r} in {file}, its first line has"
                    f" {one_line(listed, 200)}",
                    meant=nearest(column, names),
                    hint="the first line names the columns",
                )
        at = [names.index(column) for column in columns]
        for row in reader:
            if not row:
                continue
            where = f"{file}:{reader.line_num}"
            if len(row) != len(names):
                raise ValueError(f"{where}: {len(row)} fields, the first line has {len(names)}")
            found.append(_row(where, row[at[0]], row[at[1]], data))
    except csv.Error as error:
        raise ValueError(f"{file}:{reader.line_num}: not {file.suffix[1:]}: {error}") from None
    return found


def _json_rows(file: Path, data: DataFlags) -> list[tuple[str, str]]:
    from ..training.prompts import read_prompts

    found = []
    for number, prompt in enumerate(read_prompts(file, fields=(data.text_column,), what="text"), 1):
        where = f"{file}:{prompt.line}" if prompt.line else f"{file}: entry {number}"
        label = prompt.record.get(data.label_column)
        if not isinstance(label, str | int):
            got = f"{type(label).__name__} as" if data.label_column in prompt.record else "no"
            raise ValueError(
                f"{where}: got {got} {data.label_column!r} (--label_column), wanted a class: a name"
                " or a whole number"
            )
        found.append(_row(where, prompt.text, str(label), data))
    return found


def _row(where: str, text: str, label: str, data: DataFlags) -> tuple[str, str]:
    for value, column in ((text, data.text_column), (label, data.label_column)):
        if not value.strip():
            raise ValueError(f"{where}: {column!r} is empty")
    return text, label.strip()


def folder_of(flags: Flags) -> RunFolder:
    """The folder, which goes on where the same command ran before."""
    own = flags[OutputFlags]
    earlier = read_run(Path(own.output_dir)) if own.output_dir else None
    again = earlier is not None and earlier.get("system") == SYSTEM and not own.overwrite
    run = RunFlags(
        output_dir=own.output_dir,
        overwrite=own.overwrite,
        resume_from_checkpoint="true" if again else None,
    )
    kept = (run, *(flags[kind] for kind in (ModelFlags, DataFlags, TrainFlags)))
    return RunFolder(SYSTEM, Flags(kept, {}, set(), [], []), free=("data", "val"))


# -- the work -----------------------------------------------------------------------------------


def _run(flags: Flags, folder: RunFolder, rows: tuple[Rows, Rows | None] | None) -> int:
    from ..training import small_model

    data, own = flags[DataFlags], flags[OutputFlags]
    files = {"data": data.data, "val": data.val}
    digests = {name: digest(Path(f).expanduser().read_bytes()) for name, f in files.items() if f}
    made = (HEAD, f"{Path(HEAD).stem}.json", small_model.MODEL, small_model.DATA)
    early = rows is None or folder.resumes
    if folder.resumes:
        folder.go_on(digests)
    elif early:
        folder.begin(digests, writes=made)
    if rows is None:
        model = small_model.small_language_model(folder, flags[TrainFlags].seed, fast=True)
        flags[ModelFlags].model_name_or_path = str(model)
        rows = small_rows(folder.path)
    started = time.monotonic()
    discrim = train(flags, *rows)
    if not early:  # an earlier head stays until there is another
        folder.begin(digests, writes=made)
    facts = write(flags, folder, discrim)
    if own.json:
        from ..cli.files import strict_json

        print(strict_json(facts, indent=1))
    else:
        show(facts)
    tell_result(facts)
    files_told = f"{HEAD}, {Path(HEAD).stem}.json, {SUMMARY}, {CURVES}"
    tell(f"wrote {folder.path}: {files_told}; {time.monotonic() - started:.0f} s")
    return 0


def small_rows(folder: Path) -> tuple[Rows, Rows]:
    """Prose and code that the small model was trained on, and such that it was not."""
    from ..training.small_model import SIDES, data_files

    files, parts = data_files(folder), []
    for ending in ("", "_held_out"):
        found = []
        for side, kind in SIDES.items():
            lines = files[side + ending].read_text(encoding="utf-8").splitlines()
            found += [(text, kind) for line in lines if (text := json.loads(line)["text"]).strip()]
        found = list(dict.fromkeys(found))
        parts.append(Rows([text for text, _ in found], [kind for _, kind in found]))
    return parts[0], parts[1]


def train(flags: Flags, rows: Rows, val: Rows | None) -> DiscriminatorV2:
    """The trained discriminator.

    Raises:
        UsageError, Failed: what only the model and its tokenizer tell.
    """
    from ..cli.terminal import progress_bar
    from .discriminator import train_discriminator

    data, head, named = flags[DataFlags], flags[TrainFlags], flags[ModelFlags]
    model, tokenizer = load_policy(named, None, device_of(flags[OutputFlags].device))
    try:
        with progress_bar(len(rows.texts) + len(val.texts if val else ()), 0) as bar:
            bar.set_description("texts read")
            discrim = train_discriminator(
                rows.texts,
                rows.labels,
                head.batch_size,
                "Binary" if head.binary else "Multiclass",
                model=model,
                tokenizer=tokenizer,
                version=POOLS[head.pool],
                max_length=data.max_length,
                train_size=1 - data.held_out,
                lr=head.learning_rate,
                epochs=head.epochs,
                held_out=val,
                seed=head.seed,
                told=bar.update,
            )
    except ValueError as error:
        raise UsageError(f"--data: {one_line(error)}") from error
    name, vocab = str(named.model_name_or_path), discrim.metadata["class_vocab"]
    discrim.metadata["pretrained_model"] = (
        str(Path(name).resolve()) if Path(name).is_dir() else name
    )
    if head.default_class is not None:
        discrim.metadata["default_class"] = vocab[head.default_class]
    return discrim


def write(flags: Flags, folder: RunFolder, discrim: DiscriminatorV2) -> dict[str, Any]:
    """Write the folder's files, each whole or not at all; returns the summary."""
    from ..cli.files import replace_text, strict_json
    from ..training.curves import write_curves
    from .heads import save_discriminator

    report = discrim.report
    assert report is not None
    save_discriminator(discrim, file_name=HEAD, path=folder.path)
    lines = [strict_json(epoch) + "\n" for epoch in report.history]
    replace_text(folder.path / METRICS, "".join(lines))
    classes = list(discrim.metadata["class_vocab"])
    write_curves(folder, f"Discriminator: {_shortened(classes)}", PANELS)
    rows = report.confusion.sum(1).tolist()
    facts = {
        "program": f"{PROGRAM} train-discriminator",
        "schema": SCHEMA,
        "system": SYSTEM,
        "versions": versions(),
        **discrim.metadata,
        "embed_size": discrim.embed_size,
        "classes": classes,
        "trained_on": report.n_train,
        "held_out": report.n_held_out,
        "held_out_accuracy": report.accuracy,
        "largest_class": max(rows) / sum(rows) if any(rows) else None,
        "confusion": report.confusion.tolist(),
        "history": report.history,
    }
    folder.write_json(SUMMARY, facts)
    return facts


def show(facts: dict[str, Any]) -> None:
    """The table: how often each class is told right."""
    from ..cli.table import render

    table = facts["confusion"]
    title = f"Trained on {facts['trained_on']} texts, measured on {facts['held_out']} held out"
    if facts["held_out_accuracy"] is not None:
        title += f": accuracy {facts['held_out_accuracy']:.4f}"
        title += f" (the largest class alone {facts['largest_class']:.4f})"
    shown = facts["classes"][:MAX_SHOWN]
    few = len(shown) == len(facts["classes"])
    columns = ["class", "held out", "recall", "precision", *(f"as {c}" for c in shown if few)]
    rows = []
    for n, word in enumerate(shown):
        total, predicted = sum(table[n]), sum(row[n] for row in table)
        shares = [table[n][n] / of if of else None for of in (total, predicted)]
        cells = [None if share is None else f"{share:.3f}" for share in shares]
        rows.append([word, total, *cells, *(table[n] if few else [])])
    render(title, columns, rows)
    if not few:
        tell(f"... {len(facts['classes']) - MAX_SHOWN} classes more are in {SUMMARY}")


def tell_result(facts: dict[str, Any]) -> None:
    """What should give pause."""
    losses = [epoch.get("held_out_loss", epoch["loss"]) for epoch in facts["history"][-2:]]
    if losses[0] is not None and losses[0] - losses[1] > STILL_FALLING:
        tell("the loss was still falling: a higher --learning_rate or more --epochs would go on")
    if (
        facts["held_out_accuracy"] is not None
        and facts["held_out_accuracy"] <= facts["largest_class"]
    ):
        tell(
            "no better than always naming the largest class, such a head steers nothing: try"
            " --learning_rate 1e-2 and more --epochs (with --overwrite), or more texts"
        )


def _shortened(words: Sequence[str]) -> str:
    text = ", ".join(words)
    return text if len(text) <= 60 else text[:57] + "..."
