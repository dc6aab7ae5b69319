"""`onepass protect`: apply a Stained Glass Transform to a text and show what an attack recovers.

Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.errors import Failed, UsageError, one_line
from ..training.token_texts import printable, token_texts
from .transform_file import SGT, find_transform, read_settings

if TYPE_CHECKING:
    import torch

    from .protection import Protection

PROGRAM, SCHEMA = "onepass protect", 1
SUFFIXES = {"output": ".safetensors", "png": ".png"}
MAX_SEED = 2**62  # leaves room for the draws after the first
MAX_SAMPLES = 100_000
MAX_TOKENS = 2**31  # too long a text is refused, not cut
MARK = "*"
NAMES = {"l2": "L2", "cosine": "cosine", "informed": "informed"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass protect`."""
    add = parser.add_argument
    add("text", metavar="TEXT", nargs="?", help="the text to protect; - reads standard input")
    add(
        "--sgt",
        metavar="DIR",
        required=True,
        help="the transform: output_dir of onepass train jigsaw, or a folder of save_pretrained",
    )
    add(
        "--file", metavar="FILE", help="take the text from a file (.json: a conversation); -: stdin"
    )
    add(
        "--model",
        metavar="NAME_OR_DIR",
        help="the base model, where --sgt does not say it or it has moved",
    )
    add("--samples", type=_number(1, MAX_SAMPLES), default=1, metavar="N", help="draws of noise")
    add(
        "--informed",
        action="store_true",
        help="also attack as one who has the transform: runs it on the whole vocabulary",
    )
    add(
        "--seed",
        type=_number(0, MAX_SEED),
        metavar="N",
        help="of the noise, to draw it again (default: secret). Whoever knows it can take it off",
    )
    add(
        "--output",
        metavar="FILE.safetensors",
        help="write what a server is sent: inputs_embeds, attention_mask",
    )
    add("--png", metavar="FILE.png", help="write a picture of it")
    add("--overwrite", action="store_true", help="replace these files where they exist")
    add("--json", action="store_true", help="print JSON")
    add(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto takes the GPU where torch sees one (cuda is also ROCm)",
    )


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot work, then protect, write and print; returns the exit code."""
    folder, settings = _transform(args.sgt)
    if args.informed and settings.get("estimator") == "transformer":
        text = "--informed: this transform looks at more than one token, which it cannot invert"
        raise UsageError(text, hint="leave out --informed")
    base = _base_model(args.model, folder, settings)
    _check_files(args)
    entry = _entry(args)
    from ..cli.terminal import quiet_libraries

    with quiet_libraries():
        tokens, done, model = _protect(args, entry, folder, int(settings["hidden_size"]), base)
        files = _write(args, tokens, done, model)
    if args.json:
        from ..cli.files import strict_json

        told = {"sgt": str(folder), "model": base, "samples": args.samples}
        facts = {"program": PROGRAM, "schema": SCHEMA, **told, **as_dict(done, tokens)}
        print(strict_json(facts, indent=1))
    else:
        show(done, tokens)
    if files:
        print(f"wrote {', '.join(files)}", file=sys.stderr)
    return 0


# -- what is refused ----------------------------------------------------------------------------


def _transform(name: str) -> tuple[Path, dict[str, Any]]:
    try:
        folder = find_transform(Path(name))
        return folder, read_settings(folder)
    except (FileNotFoundError, ValueError) as error:
        raise UsageError(f"--sgt: {one_line(error, 1000)}") from error


def _runs(folder: Path) -> tuple[Path, ...]:
    """The folders that may be that of the run which the transform in `folder` is of."""
    run = folder.absolute()
    run = run.parent if run.name == SGT else run
    return (run, run.parent) if run.name.startswith("checkpoint-") else (run,)


def _base_model(asked: str | None, folder: Path, settings: dict[str, Any]) -> str:
    """The model that --model names, or else that the run or the transform does."""
    from ..training.models import check_folder
    from ..training.small_model import MODEL

    if asked is not None:
        if not asked:
            raise UsageError("--model: got an empty name")
        check_folder(asked)
        return asked
    named = settings.get("base_model_name_or_path")
    own = [str(r / MODEL) for r in _runs(folder) if (r / MODEL / "config.json").is_file()]
    hint = "name it with --model NAME_OR_DIR"
    if own:  # made by the run; moves with it
        return own[0]
    if not isinstance(named, str) or not named:
        raise UsageError(f"--sgt: {str(folder)!r} does not say its base model", hint=hint)
    try:
        check_folder(named)
    except UsageError as error:
        text = f"--sgt: the base model {named!r} of the transform is not here any more"
        raise UsageError(text, hint=hint) from error
    return named


def _check_files(args: argparse.Namespace) -> None:
    """UsageError where a file could not be written, Failed where its library is missing."""
    from ..cli.folder import check_writable

    for flag, suffix in SUFFIXES.items():
        if (name := getattr(args, flag)) is None:
            continue
        path = Path(name)
        if path.suffix != suffix:
            raise UsageError(f"--{flag}: got {name!r}, wanted a name that ends in {suffix}")
        if path.is_dir():
            raise UsageError(f"--{flag}: {name!r} is a folder, wanted a file")
        if path.exists() and not args.overwrite:
            raise UsageError(f"--{flag}: {name!r} exists", hint="--overwrite replaces it")
        check_writable(path.parent, f"--{flag}")
    if args.png is not None and importlib.util.find_spec("matplotlib") is None:
        raise Failed('--png needs matplotlib, not installed here: pip install "onepass[viz]"')


def _entry(args: argparse.Namespace) -> str | list[dict[str, str]]:
    """The text of the argument, the file or standard input; the newline that ends a file is none
    of its own. A .json file's conversation."""
    if (args.text is None) == (args.file is None):
        got = "no text" if args.text is None else "both TEXT and --file"
        raise UsageError(f"got {got}, wanted TEXT, - for standard input or --file FILE")
    source, where = (args.file, "--file") if args.text is None else (args.text, "TEXT")
    try:
        if source == "-":
            text = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        elif args.file is not None:
            data = Path(source).read_bytes()
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
        else:
            text = str(source)
    except UnicodeDecodeError as error:
        raise UsageError(f"{where}: {source!r} is not UTF-8 text") from error
    except OSError as error:
        raise UsageError(f"{where}: cannot read {source!r}: {error.strerror}") from error
    if not text.strip():
        raise UsageError(f"{where}: the text is empty")
    return _messages(source, text) if args.file is not None and is_json(source) else text


def is_json(name: str) -> bool:
    """Whether --file takes a file of this name for a conversation."""
    return name.lower().endswith(".json")


def _messages(name: str, text: str) -> list[dict[str, str]]:
    wanted = 'wanted a list of {"role": ..., "content": text}, or an object with it as "messages"'
    hint = "JSON that is itself the text comes in from standard input: --file -"
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--file: {name!r} is not JSON: {one_line(error)}", hint=hint) from error
    if isinstance(found, dict):
        found = found.get("messages")
    if not isinstance(found, list) or not found:
        raise UsageError(f"--file: {name!r} holds no conversation, {wanted}", hint=hint)
    for number, turn in enumerate(found, 1):
        fields = [turn.get(n) for n in ("role", "content")] if isinstance(turn, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise UsageError(f"--file: {name!r}: message {number}: {wanted}", hint=hint)
    if not any(turn["content"].strip() for turn in found):
        raise UsageError(f"--file: {name!r}: all messages are empty")
    return found


def _number(low: int, high: int) -> Any:
    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            wanted = f"wanted a whole number from {low} to {high}"
            raise argparse.ArgumentTypeError(f"got {text!r}, {wanted}")
        return value

    return number


def _device(name: str) -> torch.device:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


# -- the work -----------------------------------------------------------------------------------


def _protect(
    args: argparse.Namespace,
    entry: str | list[dict[str, str]],
    folder: Path,
    hidden_size: int,
    base: str,
) -> tuple[Any, Protection, Any]:
    """(tokenizer, what came of the text, a model of which only the embeddings matter)."""
    device = _device(args.device)
    from transformers import AutoConfig, AutoTokenizer

    from .cloak import TransformerCloak
    from .embedding_layer import find_embeddings
    from .protection import protect

    try:
        config = AutoConfig.from_pretrained(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
    except Exception as error:  # each kind of tokenizer file has errors of its own
        why = one_line(error) or type(error).__name__
        raise Failed(f"cannot load the base model {base!r}: {why}") from error
    input_ids, noise_mask = _tokens(tokenizer, entry, _what_is_transformed(folder))
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(longest, int) and len(input_ids) > longest:
        n = len(input_ids)
        raise UsageError(f"the text has {n} tokens, wanted {longest} at most, as the model takes")
    stored = find_embeddings(base, config)
    if stored is not None:
        _check_width(hidden_size, stored.shape[-1], base)
    try:
        cloak = TransformerCloak.from_pretrained(folder)
    except (ValueError, TypeError) as error:
        raise Failed(f"--sgt: {one_line(error)}") from error
    model = _embeddings(base, stored)
    _check_width(hidden_size, model.get_input_embeddings().weight.shape[-1], base)
    at = [x.to(device) for x in (input_ids, noise_mask)]
    options = {"seed": args.seed, "samples": args.samples, "informed": args.informed}
    try:
        done = protect(model.to(device), cloak.to(device), *at, **options)
    except ValueError as error:
        raise Failed(f"{base!r} and {str(folder)!r}: {one_line(error)}") from error
    return tokenizer, done, model


def _what_is_transformed(folder: Path) -> dict[str, Any]:
    """What of a conversation the run that the transform is of transformed beside its prompts, as
    NoiseTokenizer takes it."""
    from ..training.run_folder import recorded_flags

    def recorded(run: Path) -> dict[str, Any]:
        return recorded_flags(run, "jigsaw")

    flags: dict[str, Any] = next(filter(None, map(recorded, _runs(folder))), {})
    names = ("transform_system", "transform_answers")
    return {name: flags[name] for name in names if isinstance(flags.get(name), bool)}


def _tokens(
    tokenizer: Any, entry: str | list[dict[str, str]], transformed: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, noise_mask) [S], as in training; of a conversation that the assistant has not
    had the last word in, up to where it begins to answer."""
    from .data import NoiseTokenizer

    marking = NoiseTokenizer(tokenizer, max_length=MAX_TOKENS, pad_to_multiple_of=1, **transformed)
    answers = not isinstance(entry, str) and entry[-1]["role"] != "assistant"
    try:
        batch = marking(entry, add_generation_prompt=answers)
    except ValueError as error:
        raise UsageError(f"{'TEXT' if isinstance(entry, str) else '--file'}: {error}") from error
    return batch["input_ids"][0], batch["noise_mask"][0]


def _check_width(wanted: int, found: int, base: str) -> None:
    if wanted != found:
        raise UsageError(
            f"--sgt: the transform is for embeddings of size {wanted}, those of {base!r} have"
            f" {found}",
            hint="name the model that it was trained for with --model",
        )


def _embeddings(base: str, stored: Any) -> Any:
    """A model with the base model's input embeddings, and with nothing else where it can be had."""
    from transformers import AutoModelForCausalLM

    from .embedding_layer import load_embeddings

    model = None if stored is None else load_embeddings(stored)
    if model is not None:
        return model
    print("the embeddings cannot be read alone: loading the whole model", file=sys.stderr)
    try:
        return AutoModelForCausalLM.from_pretrained(base).eval().requires_grad_(False)
    except (OSError, ValueError, ImportError) as error:
        why = one_line(error) or type(error).__name__
        raise Failed(f"cannot load the base model {base!r}: {why}") from error


def _write(args: argparse.Namespace, tokenizer: Any, done: Protection, model: Any) -> list[str]:
    """Write the files asked for; returns their names."""
    from ..cli.files import replace

    written = []
    for name in (args.output, args.png):
        if name is not None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
    if args.output is not None:
        from safetensors.torch import save_file

        sent = {
            "inputs_embeds": done.noisy[None].contiguous().cpu(),
            "attention_mask": done.attention_mask[None].contiguous().cpu(),
        }
        replace(Path(args.output), lambda new: save_file(sent, new, metadata={"format": "pt"}))
        written.append(args.output)
    if args.png is not None:
        from .report import write_png

        write_png(Path(args.png), done, token_texts(tokenizer, done.input_ids.tolist()), model)
        written.append(args.png)
    return written


# -- what is shown ------------------------------------------------------------------------------


def as_dict(done: Protection, tokenizer: Any) -> dict[str, Any]:
    """What is known of each token and of all, for JSON. Of several draws distances and cosines are
    means, recovered is the share of them, and the nearest token is that of the first."""
    texts = token_texts(tokenizer, done.input_ids.tolist())
    nearest = {m: ids[0].tolist() for m, ids in done.found.items()}
    named = {m: token_texts(tokenizer, ids) for m, ids in nearest.items()}
    columns: dict[str, list[Any]] = {
        "id": done.input_ids.tolist(),
        "token": texts,
        "transformed": done.noise_mask.tolist(),
        "norm": done.norm.tolist(),
        "distance": done.distance.mean(0).tolist(),
        "relative_distance": done.relative_distance.mean(0).tolist(),
        "cosine": done.cosine.mean(0).tolist(),
        "std": done.std.tolist(),
    }
    for metric in done.found:
        columns[f"nearest_{metric}"] = named[metric]
        columns[f"nearest_{metric}_id"] = nearest[metric]
        columns[f"rank_{metric}"] = done.ranks[metric][0].tolist()
    for metric, hits in done.recovered.items():
        columns[f"recovered_{metric}"] = hits.double().mean(0).tolist()
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return {"tokens": rows, "totals": done.totals()}


def show(done: Protection, tokenizer: Any) -> None:
    """The table and the line of totals, to stdout."""
    from ..cli.table import render

    several = done.n_draws > 1
    facts = as_dict(done, tokenizer)
    rows = []
    for fact in facts["tokens"]:
        row = [printable(fact["token"]), "yes" if fact["transformed"] else "no"]
        numbers = ("norm", "distance", "relative_distance", "cosine", "std")
        row += [
            f"{fact[name]:#.3g}" if name != "cosine" else f"{fact[name]:.2f}" for name in numbers
        ]
        for metric in done.found:
            mark = MARK if fact[f"nearest_{metric}_id"] == fact["id"] else " "
            row.append(f"{mark} {printable(fact[f'nearest_{metric}'])}")
        if several:
            row += [f"{fact[f'recovered_{metric}']:.0%}" for metric in done.found]
        rows.append(row)
    columns = ["token", "noise", "|x|", "moved", "/ |x|", "cos", "std"]
    taken = {"informed": "likeliest"}
    columns += [f"{taken.get(metric, 'nearest')}, {NAMES[metric]}" for metric in done.found]
    if several:
        columns += [f"hit, {NAMES[metric]}" for metric in done.found]
    title = f"What the nearest embedding gives away ({MARK} the token itself)"
    if several:
        title += f"; first of {done.n_draws} draws, moved, cos and hit over all"
    render(title, columns, rows)
    print(totals_line(facts["totals"]))


def totals_line(totals: dict[str, Any]) -> str:
    """The totals in words."""

    def share(name: str) -> str:
        spread = totals[f"recovered_{name}_std"]
        told = f"{totals[f'recovered_{name}']:.1%}"
        return told if spread is None else f"{told} +- {spread:.1%}"

    n, moved, draws = totals["tokens"], totals["transformed"], totals["draws"]
    if not moved:
        return f"none of {n} tokens transformed"
    over = f" over {draws} draws" if draws > 1 else ""
    by_metric = ", ".join(f"{NAMES[metric]} {share(metric)}" for metric in ("l2", "cosine"))
    known = ""
    if "recovered_informed" in totals:
        known = f"; by one who has the transform {share('informed')}"
    return (
        f"{moved} of {n} tokens transformed; recovered{over} by either attack {share('either')}"
        f" ({by_metric}){known}; mean |cos| {totals['abs_cosine']:.3f}; mean distance"
        f" {totals['distance']:#.3g}, {totals['relative_distance']:#.3g} |x|"
    )
