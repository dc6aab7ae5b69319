"""`onepass attribute`: which tokens a model's next-token scores come from, as table, page, picture.

Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cli.errors import Failed, UsageError, one_line, unknown
from ..cli.terminal import above_bar, progress_bar, say
from ..training.flags import Flags, Help, ModelFlags, RunFlags, check_from
from ..training.models import (
    check_folder,
    check_installed,
    device_of,
    find_adapter,
    load_policy,
    weights_digest,
)
from .names import (
    BASELINES,
    CONTRASTIVE,
    METHODS,
    OPTIONS,
    PROGRAM,
    REDUCTIONS,
    SCHEMA,
    STEP_FUNCTIONS,
    check_options,
)

if TYPE_CHECKING:
    from ..training.run_folder import RunFolder
    from .result import Attribution

FOLDER = "onepass-attribute"  # of the small model
TEXT, NEW_TOKENS = "Return a list of the words in the", 8  # where none is given
NEEDED = ("transformers", "tokenizers", "safetensors", "tqdm")
SUFFIXES = {"save_path": (".json", ".jsonl"), "viz_path": (".html", ".png")}
FIRST = f'{{"program": "{PROGRAM}"'.encode()  # of each line of ours
DTYPES = ("auto", "float32", "bfloat16", "float16")


class Asked(NamedTuple):
    """One text."""

    text: str
    generated: str | None


@dataclass
class SmallFlags:
    """The small model, as its folder's run.json has it."""

    fast: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass attribute`."""
    parser.formatter_class = Help
    parser.usage = "onepass attribute [--model M --text TEXT] [options]"
    add = parser.add_argument
    add(
        "--model", "--model_name_or_path", "-m", metavar="NAME_OR_DIR",
        help="folder or Hub id (default: a small one)",
    )  # fmt: skip
    add("--model_revision", metavar="NAME", default="main", help="branch, tag or commit")
    add("--adapter", metavar="DIR", help="of PEFT, or the folder of a run")
    add("--dtype", choices=DTYPES, metavar="NAME", default="auto", help="of the weights")
    add(
        "--text", "--input_texts", "-i", nargs="+", action="extend", metavar="TEXT", dest="texts",
        help="one text or several",
    )  # fmt: skip
    add("--file", metavar="FILE", help="texts: json, jsonl, txt")
    add("--dataset_name", metavar="NAME", help="texts: of the Hub, or a folder")
    add("--dataset_split", metavar="NAME", default="train", help="its split [train]")
    add("--input_text_field", metavar="NAME", default="text", help="its column [text]")
    add(
        "--generated", "--generated_texts", "-g", nargs="+", action="extend", metavar="TEXT",
        help="what follows each text: the targets",
    )  # fmt: skip
    add("--max_new_tokens", type=int, metavar="N", help="or let the model write N tokens")
    add("--start_pos", "-s", type=int, metavar="N", help="first target, counted from 0")
    add("--end_pos", "-e", type=int, metavar="N", help="end of the targets")
    add(
        "--attribution_method", "-a", choices=METHODS, metavar="NAME", default=METHODS[0],
        help=f"{', '.join(METHODS)} [{METHODS[0]}]",
    )  # fmt: skip
    add(
        "--attributed_fn", "-fn", metavar="NAME", default="probability",
        help=f"step function, the target: {', '.join(STEP_FUNCTIONS)} [probability]",
    )  # fmt: skip
    add(
        "--step_scores", nargs="+", action="extend", metavar="NAME", default=[],
        help="step functions told beside",
    )  # fmt: skip
    add("--attribution_kwargs", metavar="JSON", help='their options: {"top_p": 0.9}')
    add("--contrast_text", metavar="TEXT", help="read by contrastive functions")
    add("--contrast_generated", metavar="TEXT", help="tokens that they compare with")
    add("--n_steps", type=int, metavar="N", default=50, help="of integrated gradients [50]")
    add(
        "--baseline", choices=BASELINES, metavar="NAME",
        help="zeros, pad [pad, zeros where there is none]",
    )  # fmt: skip
    add(
        "--reduction", "--attribution_aggregators", choices=REDUCTIONS, metavar="NAME",
        help="over the embedding: l2, sum",
    )  # fmt: skip
    add(
        "--save_path", "--output", "-o", metavar="FILE",
        help="write .json, or .jsonl (run again: goes on)",
    )  # fmt: skip
    add("--viz_path", metavar="FILE", help="write .html or .png")
    add("--overwrite", action="store_true", help="replace these where they exist")
    add("--hide", "--hide_attributions", action="store_true", help="print no table")
    add("--json", action="store_true", help="print JSON, not a table")
    add("--batch_size", "-bs", type=int, metavar="N", help="rows at once (default: by memory)")
    add(
        "--device", "--dev", choices=("auto", "cpu", "cuda"), metavar="NAME", default="auto",
        help="auto, cpu, cuda [auto]",
    )  # fmt: skip
    add("--output_dir", metavar="DIR", default=FOLDER, help=f"of the small model [./{FOLDER}]")
    add("--fast", action="store_true", help="a smaller one, in seconds")


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot work, then attribute, write and print; returns the exit code."""
    asked = check(args)
    asks = settings(args)
    before = begun(args, asked, asks)
    folder = None if args.model is not None else small_folder(args)
    check_installed(NEEDED)
    from ..cli.terminal import quiet_libraries

    with quiet_libraries(), contextlib.ExitStack() as stack:
        work = None
        if any(one not in before.done for one in asked):
            if folder is not None:
                from ..demo.train import one_thread

                stack.enter_context(one_thread())  # what so small a model runs fastest on
                args.model = str(small_model(folder, args.fast))
            work, asks["weights"] = worker(args, len(asked) == 1)
            if before.weights - {asks["weights"]}:
                raise UsageError(
                    f"--model: got other weights than those that {args.save_path!r} was begun with",
                    hint="--overwrite begins anew",
                )
        kept, later, n_new, n_bad = go_through(args, asked, asks, before, work)
    for file in write(args, kept, n_new):
        print(f"wrote {file}", file=sys.stderr)
    for number, one in enumerate(later):
        tell(one, number > 0)
    if n_bad:
        raise Failed(f"{n_bad} of {len(asked)} texts could not be attributed")
    return 0


# -- what is refused ----------------------------------------------------------------------------


def check(args: argparse.Namespace) -> list[Asked]:
    """The texts, each once.

    Raises:
        UsageError: what can be refused before libraries are loaded and files written.
    """
    if args.model is not None:
        if not args.model:
            raise UsageError("--model: got an empty name")
        check_folder(args.model)
        if args.fast:
            raise UsageError("--fast: is of the model made here; leave it out with --model")
    elif args.adapter is not None:
        raise UsageError("--adapter: wanted --model with it")
    if args.adapter is not None:
        find_adapter(args.adapter)
    args.step_scores = [n for word in args.step_scores for n in word.split(",") if n]
    for flag, names in (("attributed_fn", [args.attributed_fn]), ("step_scores", args.step_scores)):
        for name in names:
            if name not in STEP_FUNCTIONS:
                raise _unknown(flag, "step function", name, STEP_FUNCTIONS)
            given = {None} != {args.contrast_text, args.contrast_generated}
            hint = "--contrast_text, another text"
            if name != "kl_divergence":
                hint += ", or --contrast_generated, other tokens"
            elif args.contrast_text is None:
                given = False
            if name in CONTRASTIVE and not given:
                raise UsageError(f"--{flag}: {name} has nothing to compare with", hint=hint)
    for flag in ("contrast_text", "contrast_generated"):
        if getattr(args, flag) is not None:
            _check_text(flag, getattr(args, flag))
            if not {args.attributed_fn, *args.step_scores} & set(CONTRASTIVE):
                raise UsageError(
                    f"--{flag}: is read by contrastive step functions, of which none is asked for",
                    allowed=CONTRASTIVE,
                )
    args.attribution_kwargs = _options(args.attribution_kwargs)
    try:
        check_options(args.attribution_kwargs, [args.attributed_fn, *args.step_scores])
    except (TypeError, ValueError) as error:
        raise UsageError(f"--attribution_kwargs: {error}") from error
    if "mc_dropout_prob_avg" in (args.attributed_fn, *args.step_scores):
        args.attribution_kwargs.setdefault("seed", 0)  # the same numbers when it goes on
    for name in ("n_steps", "batch_size", "max_new_tokens", "start_pos", "end_pos"):
        if getattr(args, name) is not None:
            check_from(name, getattr(args, name), 1)
    if args.generated is not None and args.max_new_tokens is not None:
        raise UsageError("--generated and --max_new_tokens exclude each other")
    every = read_texts(args)
    asked = list(dict.fromkeys(every))
    if len(asked) < len(every):
        again = len(every) - len(asked)
        print(f"{again} texts came before: each is done once", file=sys.stderr)
    check_files(args, len(asked))
    return asked


def _options(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"--attribution_kwargs: {text!r} is not JSON: {one_line(error)}"
        ) from error
    if not isinstance(found, dict):
        raise UsageError(f'--attribution_kwargs: got {text!r}, wanted an object: {{"top_p": 0.9}}')
    for name in found:
        if name not in OPTIONS:
            raise _unknown("attribution_kwargs", "option", name, OPTIONS)
    return found


def _unknown(flag: str, kind: str, name: str, allowed: Sequence[str]) -> UsageError:
    error = unknown(kind, name, allowed)
    error.message = f"--{flag}: {error.message}"
    return error


def read_texts(args: argparse.Namespace) -> list[Asked]:
    """Those of --text, --file or --dataset_name; without any that of the small model."""
    sources = [n for n in ("texts", "file", "dataset_name") if getattr(args, n) is not None]
    if len(sources) > 1:
        raise UsageError("--text, --file and --dataset_name exclude each other")
    if not sources:
        if args.model is not None:
            raise UsageError("--text: got nothing, wanted a text, --file or --dataset_name")
        if args.generated is None and args.max_new_tokens is None:
            args.max_new_tokens = NEW_TOKENS
        args.texts = [TEXT]
    if args.texts is None and args.generated is not None:
        raise UsageError('--generated: goes with --text; in a file it is "generated" of an entry')
    if args.file is not None:
        found = _of_file(args.file)
    elif args.dataset_name is not None:
        found = _of_dataset(args)
    else:
        following = args.generated or [None] * len(args.texts)
        if len(following) != len(args.texts):
            n = len(args.texts)
            raise UsageError(f"--generated: got {len(following)}, wanted one for each of {n} texts")
        found = [Asked(*pair) for pair in zip(args.texts, following, strict=True)]
    for text, generated in found:
        _check_text("text", text.strip() and text)
        if generated is not None:
            _check_text("generated", generated)
    return found


def _check_text(flag: str, text: str) -> None:
    if not text:
        raise UsageError(f"--{flag}: the text is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"--{flag}: {text[:40]!r} is not UTF-8") from None


def _of_file(name: str) -> list[Asked]:
    from ..training.prompts import read_prompts

    try:
        entries = read_prompts(name)
    except (ValueError, OSError) as error:
        raise UsageError(f"--file: {one_line(error, 1000)}") from error
    found = []
    for number, entry in enumerate(entries, 1):
        generated = entry.record.get("generated")
        if generated is not None and not isinstance(generated, str):
            where = f"{name}:{entry.line}" if entry.line else f"{name}: entry {number}"
            raise UsageError(f"--file: {where}: 'generated' is no string")
        found.append(Asked(entry.text, generated))
    return found


def _of_dataset(args: argparse.Namespace) -> list[Asked]:
    from ..training.hub_data import DatasetFlags

    name, field = args.dataset_name, args.input_text_field
    rows = DatasetFlags(name, dataset_train_split=args.dataset_split).load()["data"]
    if not rows or not all(isinstance(row.get(field), str) for row in rows):
        columns = ", ".join(n for n in (rows[0] if rows else {}) if n != "place") or "nothing"
        raise UsageError(f"--input_text_field: no texts in {field!r}, the dataset has {columns}")
    return [Asked(row[field], None) for row in rows]


def check_files(args: argparse.Namespace, n_texts: int) -> None:
    """UsageError where a file could not be written, Failed where its library is missing."""
    from ..cli.folder import check_writable

    for flag, suffixes in SUFFIXES.items():
        if (name := getattr(args, flag)) is None:
            continue
        path = Path(name)
        if path.suffix not in suffixes:
            wanted = " or ".join(suffixes)
            raise UsageError(f"--{flag}: got {name!r}, wanted a name that ends in {wanted}")
        if path.is_dir():
            raise UsageError(f"--{flag}: {name!r} is a folder, wanted a file")
        if path.exists() and not args.overwrite and path.suffix != ".jsonl":
            raise UsageError(f"--{flag}: {name!r} exists", hint="--overwrite replaces it")
        if n_texts > 1 and path.suffix in (".json", ".png"):
            many = ".jsonl" if path.suffix == ".json" else ".html"
            raise UsageError(f"--{flag}: {name!r} holds one text, of {n_texts} wanted {many}")
        check_writable(path.parent, f"--{flag}", "FILE")
        if path.suffix == ".png" and importlib.util.find_spec("matplotlib") is None:
            raise Failed('--viz_path needs matplotlib, not installed: pip install "onepass[viz]"')


# -- what is done already -----------------------------------------------------------------------


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the rows of one file must have in common."""
    names = (
        *("model", "model_revision", "adapter", "dtype", "fast", "max_new_tokens", "start_pos"),
        *("end_pos", "attribution_method", "attributed_fn", "step_scores", "contrast_text"),
        *("contrast_generated", "n_steps", "baseline", "reduction", "attribution_kwargs"),
    )
    unread = () if args.attribution_method == "integrated_gradients" else ("n_steps", "baseline")
    return {name: None if name in unread else getattr(args, name) for name in names}


@dataclass
class Begun:
    """What a .jsonl file holds: of each finished text where its line begins; where the next line
    goes, and what ends the one before it; the weights that its lines are of; how it was left."""

    done: dict[Asked, int]
    left: tuple[int, int] | None = None  # bytes, and when it was written
    end: int = 0
    tail: bytes = b""
    weights: set[str] = field(default_factory=set)


def begun(args: argparse.Namespace, asked: Sequence[Asked], now: dict[str, Any]) -> Begun:
    """Those of the texts that --save_path holds already. A line that a kill cut short is not among
    them, and the next one replaces it.

    Raises:
        UsageError: it holds something else.
    """
    path, found = Path(args.save_path or ""), Begun({})
    if path.suffix != ".jsonl" or not path.exists():
        return found
    found.left = _as_left(path.stat())
    if args.overwrite:
        return found
    wanted, others = set(asked), 0
    try:
        with path.open("rb") as file:
            for line in file:
                where = file.tell() - len(line)
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    if line.endswith(b"\n") or not (where or line.startswith(FIRST)):
                        raise
                    break  # cut short
                one = _asked(path, row, now)
                found.weights.add(str(row["asked"].get("weights")))
                others += one not in wanted
                if one in wanted:
                    found.done[one] = where
                found.end = where + len(line)
                found.tail = b"" if line.endswith(b"\n") else b"\n"
    except (OSError, ValueError, RecursionError) as error:
        raise _foreign(path) from error
    if others:
        print(f"{path} has {others} other texts, which stay in it", file=sys.stderr)
    if found.done:
        print(f"{len(found.done)} of {len(asked)} texts are in {path} already", file=sys.stderr)
    return found


def _asked(path: Path, row: Any, now: dict[str, Any]) -> Asked:
    """Whose row it is; UsageError where it was made by something else than `now`."""
    ours = isinstance(row, dict) and (row.get("program"), row.get("schema")) == (PROGRAM, SCHEMA)
    if not ours or not isinstance(row.get("asked"), dict):
        raise _foreign(path)
    before = row["asked"]
    for name, value in now.items():
        if before.get(name) != value:
            raise UsageError(
                f"--{name}: got {value!r}, but {str(path)!r} was begun with {before.get(name)!r}",
                hint="--overwrite begins anew",
            )
    return Asked(str(row.get("text")), before.get("generated"))


def add_line(path: Path, line: str, before: Begun) -> None:
    """Put it behind the whole lines that are there.

    Raises:
        Failed: something else has written to the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    added = before.tail + line.encode() + b"\n"
    with path.open("ab") as file:
        now = os.fstat(file.fileno())
        if now.st_size if before.left is None else _as_left(now) != before.left:
            raise Failed(
                f"--save_path: something else has written to {str(path)!r} meanwhile: name another"
                " file, or run this again when that is done"
            )
        file.truncate(before.end)
        file.write(added)
        file.flush()
        before.left = _as_left(os.fstat(file.fileno()))
    before.end, before.tail = before.end + len(added), b""


def _as_left(found: os.stat_result) -> tuple[int, int]:
    return found.st_size, found.st_mtime_ns


def line_at(path: Path, where: int) -> str:
    with path.open("rb") as file:
        file.seek(where)
        return file.readline().decode().rstrip("\n")


def _foreign(path: Path) -> UsageError:
    text = f"--save_path: {str(path)!r} was made by another program"
    return UsageError(text, hint="--overwrite replaces it")


# -- the model made here ------------------------------------------------------------------------


def small_folder(args: argparse.Namespace) -> RunFolder:
    """The folder of the small model, which an earlier run may have made."""
    from ..training.run_folder import RunFolder, read_run

    where = args.output_dir
    earlier = read_run(Path(where)) if where else None
    again = None if earlier is None else "true"
    before = (earlier or {}).get("flags", {}).get("fast", args.fast)
    if before != args.fast:
        mend = "add" if before else "leave out"
        raise UsageError(
            f"--output_dir: {where!r} holds the {'smaller' if before else 'larger'} of the models"
            " made here",
            hint=f"{mend} --fast, or name another folder with --output_dir DIR",
        )
    own = RunFlags(output_dir=where, resume_from_checkpoint=again)
    return RunFolder("attribute", Flags((own, SmallFlags(args.fast)), {}, set(), [], []))


def small_model(folder: RunFolder, fast: bool) -> Path:
    from ..training import small_model

    if folder.earlier is None:
        folder.begin(writes=(small_model.MODEL, small_model.DATA))
    else:
        folder.go_on({})
    try:
        return small_model.small_language_model(folder, RunFlags().seed, fast)
    finally:
        folder.release()


# -- the work -----------------------------------------------------------------------------------


def worker(args: argparse.Namespace, alone: bool) -> tuple[Callable[[Asked], Attribution], str]:
    """Load the model; returns what attributes a text, one `alone` with a bar, and the digest of the
    weights."""
    from . import methods

    device = device_of(args.device)
    flags = ModelFlags(args.model, model_revision=args.model_revision, dtype=args.dtype)
    adapter = None if args.adapter is None else find_adapter(args.adapter)
    model, tokenizer = load_policy(flags, adapter, device, with_encoder=True)

    def work(one: Asked) -> Attribution:
        return methods.attribute(
            model,
            tokenizer,
            one.text,
            generated=one.generated,
            max_new_tokens=None if one.generated is not None else args.max_new_tokens,
            start=args.start_pos,
            end=args.end_pos,
            method=args.attribution_method,
            target=args.attributed_fn,
            step_scores=args.step_scores,
            options=args.attribution_kwargs,
            contrast_text=args.contrast_text,
            contrast_generated=args.contrast_generated,
            reduction=args.reduction,
            n_steps=args.n_steps,
            baseline=args.baseline,
            batch_size=args.batch_size,
            progress=alone,
        )

    return work, weights_digest(model)


def _counted(asked: Sequence[Asked]) -> Generator[Asked]:
    """Each in turn, of several with a bar, above which warnings are told."""
    if len(asked) == 1:
        yield asked[0]
        return
    from tqdm.contrib.logging import logging_redirect_tqdm

    with logging_redirect_tqdm([logging.getLogger("onepass")]), progress_bar(len(asked), 0) as bar:
        for one in asked:
            yield one
            bar.update()


def tell(one: str | Attribution, again: bool) -> None:
    """Print a line of JSON, or a table, below another with a line between."""
    from .view import show

    with above_bar():
        if isinstance(one, str):
            print(one)
            return
        if again:
            print()
        show(one)


def go_through(
    args: argparse.Namespace,
    asked: Sequence[Asked],
    asks: dict[str, Any],
    before: Begun,
    work: Callable[[Asked], Attribution] | None,
) -> tuple[list[Attribution], list[str | Attribution], int, int]:
    """Attribute each text that is not finished; add it to a .jsonl file as soon as it is there, and
    print it where no file is made at the end. Of several a bad one is told and left out.

    Returns: the attributions that a file at the end is made of, what is to be printed after it, how
    many are new and how many bad.
    """
    from ..cli.files import strict_json
    from .result import Attribution

    save_path = args.save_path or ""
    lines = Path(save_path) if save_path.endswith(".jsonl") else None
    keeps = args.viz_path is not None or save_path.endswith(".json")
    kept, n_new, n_bad, size = [], 0, 0, None
    later: list[str | Attribution] = []
    with contextlib.closing(_counted(asked)) as each:
        for number, one in enumerate(each, 1):
            if one in before.done:
                assert lines is not None
                line = line_at(lines, before.done[one])
                if keeps:
                    try:
                        kept.append(Attribution.from_dict(json.loads(line)))
                    except ValueError as error:
                        raise Failed(
                            f"--save_path: {str(lines)!r}: text {number}: {error}"
                        ) from error
                if args.json and keeps:
                    later.append(line)
                elif args.json:
                    tell(line, False)
                continue
            assert work is not None
            try:
                found = work(one)
            except ValueError as error:
                if len(asked) == 1:
                    raise UsageError(one_line(error)) from error
                n_bad += 1
                say(f"text {number} of {len(asked)}: {one_line(error)}")
                continue
            if keeps:
                kept.append(found)
            if lines is not None or args.json:
                its = asks | {"generated": one.generated}
                line = strict_json(found.as_dict() | {"asked": its})
            if lines is not None:
                add_line(lines, line, before)
            if args.json or not args.hide:
                printed = line if args.json else found
                if keeps:
                    later.append(printed)
                else:
                    tell(printed, n_new > 0)
            n_new, size = n_new + 1, found.batch_size
    if size is not None:
        rows = "1 row" if size == 1 else f"{size} rows"
        print(f"{rows} at once on {device_of(args.device)}", file=sys.stderr)
    return kept, later, n_new, n_bad


def write(args: argparse.Namespace, found: Sequence[Attribution], n_new: int) -> list[str]:
    """Write the files that are made at the end; returns the names of all that were written."""
    from ..cli.files import replace_text
    from .view import html, write_png

    wrote = []
    if args.save_path is not None and args.save_path.endswith(".jsonl"):
        if n_new:
            wrote.append(args.save_path)
    elif args.save_path is not None:
        Path(args.save_path).parent.mkdir(parents=True, exist_ok=True)
        found[0].save(args.save_path)
        wrote.append(args.save_path)
    if args.viz_path is not None and found:
        Path(args.viz_path).parent.mkdir(parents=True, exist_ok=True)
        if args.viz_path.endswith(".png"):
            write_png(Path(args.viz_path), found[0])
        else:
            replace_text(Path(args.viz_path), html(found))
        wrote.append(args.viz_path)
    return wrote
