"""`onepass generate pplm`: text that a bag of words or a discriminator steers, beside text of the
same model that nothing steers.

Imports nothing heavy before all that can be refused without it has been.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..cli.errors import Failed, Parser, UsageError, one_line, unknown
from ..cli.folder import check_writable
from ..dpo.command_line import check_model, check_output
from ..training.flags import Flags, ModelFlags, check_above_0, check_from, flag, parse
from ..training.models import check_installed, device_of, find_adapter, load_policy
from ..training.run_folder import tell, versions
from .names import HEAD, find_head, read_words, split_names

if TYPE_CHECKING:
    from torch import Tensor

    from .bags import Bag
    from .perturb import Goal

PROGRAM, SCHEMA = "onepass generate", 1
METHODS = {"pplm": "steered by a bag of words (-B) or by a discriminator (-D)"}
NEEDED = ("transformers", "tokenizers", "safetensors", "tqdm")
FOLDER = "onepass-discriminator"  # that of `onepass pplm train-discriminator`
PROMPT = "The lake"  # Uber's
SPELT = {
    "-B": "--bag_of_words",
    "-D": "--discrim",
    "-M": "--model_name_or_path",
    "--pretrained_model": "--model_name_or_path",
    "-o": "--output",
}
VARIANTS, POOLS = ("uber", "hidden", "past", "probs"), ("sum", "mean")
# PPLM.jl's defaults, where its variants are asked for, and what they do not know.
JL: dict[str, Any] = {"stepsize": 0.01, "num_iterations": 2, "top_k": 50, "temperature": 1.1}
UBER = ("grad_length", "horizon_length", "window_length", "window_side", "decay", "gamma")
# What suits the small model, where nothing else is said. Over 24 texts its class goes from 0.21 to
# 0.86 by PPLM.jl's way on the past, at the same nats per token; by Uber's to 0.38 at 1.4 more.
SMALL: dict[str, Any] = {"prompt": "The", "length": 40, "sample": True, "num_samples": 3}
SMALL |= {"top_k": 10, "temperature": 1.0}
SMALL_STEPS, SMALL_CLASS = {"uber": 0.3, "hidden": 0.1, "past": 0.2, "probs": 0.01}, "code"


@dataclass
class TextFlags:
    """The text."""

    prompt: str | None = flag(
        None, f"what is gone on with [{PROMPT}]", aliases=["--cond_text"], metavar="TEXT"
    )
    prompts: str | None = flag(None, "several: json, jsonl, txt", metavar="FILE")
    uncond: bool = flag(False, "begin with the BOS token alone")
    length: int = flag(100, "new tokens, or as many as the model takes")
    num_samples: int = flag(1, "texts of each prompt")
    sample: bool = flag(False, "draw tokens (default: the likeliest)")
    temperature: float = flag(1.0, "of the steered model's logits")
    top_k: int = flag(10, "the likeliest tokens; 0: all")
    stop_strings: str | None = flag(None, "ends a text", metavar="TEXT")
    ignore_eos: bool = flag(False, "go on after an EOS token")
    seed: int = flag(0, "of the draws")


@dataclass
class SteerFlags:
    """What is steered to."""

    bag_of_words: str | None = flag(None, 'also -B: names or files, "a;b"', metavar="NAME")
    discrim: str | None = flag(None, "also -D: head's folder, file, name", metavar="NAME")
    class_label: str | None = flag(
        None, "a class by name, else number; -1: default", metavar="NAME"
    )
    discrim_weights: str | None = flag(None, "file of a known or generic head", metavar="FILE")
    discrim_meta: str | None = flag(None, "its metadata, JSON", metavar="FILE")
    variant: str = flag("uber", "or PPLM.jl's", choices=list(VARIANTS))
    stepsize: float = flag(0.02, "of a step on the past")
    num_iterations: int = flag(3, "steps a token")
    gm_scale: float = flag(0.9, "0: unsteered, 1: steered alone")
    kl_scale: float = flag(0.01, "weight of the KL between them")
    gamma: float = flag(1.5, "power of the gradient's norm")
    horizon_length: int = flag(1, "tokens that a head looks ahead")
    grad_length: int = flag(10000, "tokens that are steered")
    window_length: int = flag(0, "positions that move; 0: all")
    window_side: str = flag("first", "of the window", choices=["first", "last"])
    decay: bool = flag(False, "smaller steps on older positions")
    pool: str = flag(
        "sum", "PPLM.jl's, over tokens (default: the head's)", choices=list(POOLS), advanced=True
    )


@dataclass
class OutputFlags:
    """The command."""

    output: str | None = flag(None, "also -o: write JSON", metavar="FILE")
    overwrite: bool = flag(False, "replace it where it exists")
    json: bool = flag(False, "print JSON, not the texts")
    adapter: str | None = flag(None, "of PEFT, or a run's folder", metavar="DIR")
    device: str = flag("auto", "auto: the GPU where there is one", choices=["auto", "cpu", "cuda"])
    output_dir: str = flag(FOLDER, "of the small model", metavar="DIR")
    config: str | None = flag(None, "YAML file of flags", metavar="FILE")


FLAGS = (ModelFlags, TextFlags, SteerFlags, OutputFlags)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `onepass generate` itself takes: the name of a method."""
    listed = "\n".join(f"  {name}  {told}" for name, told in METHODS.items())
    parser.usage = f"{PROGRAM} METHOD [flags]"
    parser.description = f"Generate text with a language model.\n\nmethods:\n{listed}"
    parser.epilog = f"See also: {PROGRAM} METHOD --help"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_tokens(tokens: Sequence[str]) -> int:
    """Run `onepass generate` with `tokens`; returns the exit code."""
    if not tokens or tokens[0].startswith("-"):
        parser = Parser(prog=PROGRAM)
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if all(t == "--debug" for t in tokens):
            hint = f"see {PROGRAM} --help"
            raise UsageError("got no method", allowed=METHODS, hint=hint, prog=PROGRAM)
        try:
            parser.parse_args(tokens)
        except UsageError as error:
            error.hint = f"flags follow the method: {PROGRAM} pplm --flag"
            raise
    name, *rest = tokens
    if name not in METHODS:
        raise unknown("method", name, METHODS, prog=PROGRAM)
    try:
        return run(f"{PROGRAM} {name}", [spelt(token) for token in rest])
    except UsageError as error:
        error.prog = f"{PROGRAM} {name}"
        raise


def spelt(token: str) -> str:
    """The flag's own name in the place of a short or another one: -B x, -B=x, -Bx."""
    for short, name in SPELT.items():
        rest = token.removeprefix(short)
        if rest != token and (not rest or rest[0] == "=" or len(short) == 2):
            return f"{name}={rest.removeprefix('=')}" if rest else name
    return token


def run(prog: str, tokens: Sequence[str]) -> int:
    """Refuse what cannot work, then write and print; returns the exit code."""
    told = f"{prog}: text of a causal language model, {METHODS['pplm']}, beside text that nothing"
    told += " steers. Without --model: a small one, made here in half a minute."
    flags = parse(prog, FLAGS, tokens, description=told, training=False)
    prompts = check(flags)
    check_installed(NEEDED)
    from ..cli.terminal import quiet_libraries

    with quiet_libraries(), contextlib.ExitStack() as stack:
        started = time.monotonic()
        device = device_of(flags[OutputFlags].device)
        head = read_head(flags)
        if flags[ModelFlags].model_name_or_path is None:
            from ..demo.train import one_thread

            stack.enter_context(one_thread())  # what so small a model runs fastest on
            make_small(flags)
            head = read_head(flags)
        facts = write_texts(flags, prompts, head, device)
        facts["seconds"] = time.monotonic() - started
    own = flags[OutputFlags]
    finish(own, facts)
    return 0


# -- what is refused ----------------------------------------------------------------------------


def check(flags: Flags) -> list[str]:
    """The prompts, each once; "" is the BOS token alone.

    Raises:
        UsageError: what can be refused before libraries are loaded and files written.
    """
    text, steer, own = flags[TextFlags], flags[SteerFlags], flags[OutputFlags]
    if flags[ModelFlags].model_name_or_path is not None:
        check_model(flags)
    if own.adapter is not None:
        find_adapter(own.adapter)
    if steer.variant != "uber":
        # Adam makes a whole step of the KL's least gradient, which every token has.
        flags.prefer(JL | ({"kl_scale": 0.0} if steer.variant == "probs" else {}))
        for name in UBER:
            if name in flags.given:
                raise UsageError(f"--{name}: is of --variant uber, got {steer.variant}")
        if steer.bag_of_words is not None and steer.discrim is not None:
            raise UsageError(f"--variant {steer.variant}: takes -B or -D, got both")
        if steer.variant == "probs" and steer.bag_of_words is None:
            raise UsageError("--variant probs: wanted -B: a discriminator sees no probabilities")
    elif "pool" in flags.given:
        raise UsageError("--pool: is of PPLM.jl's variants (--variant hidden)")
    check_numbers(text, steer)
    for name in ("class_label", "discrim_weights", "discrim_meta"):
        alone = flags[ModelFlags].model_name_or_path is None and steer.bag_of_words is None
        if getattr(steer, name) is not None and steer.discrim is None:
            if name != "class_label" or not alone:
                raise UsageError(f"--{name}: wanted -D (a discriminator) with it")
    if steer.bag_of_words is None and steer.discrim is None:
        if flags[ModelFlags].model_name_or_path is not None or steer.variant == "probs":
            raise UsageError(
                "got neither -B (a bag of words) nor -D (a discriminator), wanted one of them"
            )
    check_names(steer)
    if flags[ModelFlags].model_name_or_path is None and steer.discrim is None:
        check_writable(Path(own.output_dir), "--output_dir")
    check_output(own, (".json",), needed=False)  # type: ignore[arg-type]
    return read_prompts(text)


def check_names(steer: SteerFlags) -> None:
    """UsageError for bags and heads that are not there."""
    try:
        for name in [] if steer.bag_of_words is None else split_names(steer.bag_of_words):
            read_words(name)
    except (ValueError, OSError) as error:
        raise UsageError(f"--bag_of_words: {one_line(error, 1000)}") from error
    try:
        if steer.discrim is not None and steer.discrim_weights is None:
            if steer.discrim == "generic":
                raise ValueError("generic: wanted --discrim_weights with it")
            find_head(steer.discrim)
    except (ValueError, OSError) as error:
        raise UsageError(f"--discrim: {one_line(error, 1000)}") from error


def check_numbers(text: TextFlags, steer: SteerFlags) -> None:
    for name in ("length", "num_samples"):
        check_from(name, getattr(text, name), 1)
    for name in ("top_k", "seed"):
        check_from(name, getattr(text, name), 0)
    check_above_0("temperature", text.temperature)
    names = ("stepsize", "num_iterations", "kl_scale", "gamma", "grad_length", "window_length")
    for name in names:
        check_from(name, getattr(steer, name), 0)
    check_from("horizon_length", steer.horizon_length, 1)
    if not 0 <= steer.gm_scale <= 1:
        raise UsageError(f"--gm_scale: got {steer.gm_scale}, wanted from 0 to 1")
    if steer.decay and not steer.window_length:
        raise UsageError("--decay: is along a window, wanted --window_length with it")
    if text.stop_strings == "":
        raise UsageError("--stop_strings: the text is empty")


def read_prompts(text: TextFlags) -> list[str]:
    from ..training import prompts

    sources = [name for name in ("prompt", "prompts") if getattr(text, name) is not None]
    sources += ["uncond"] if text.uncond else []
    if len(sources) > 1:
        raise UsageError(f"--{sources[0]} and --{sources[1]} exclude each other")
    if text.uncond:
        return [""]
    if text.prompts is None:
        if text.prompt is not None and not text.prompt.strip():
            raise UsageError("--prompt: the text is empty", hint="--uncond begins with none")
        return [] if text.prompt is None else [text.prompt]
    try:
        found = prompts.read_prompts(text.prompts)
    except (ValueError, OSError) as error:
        raise UsageError(f"--prompts: {one_line(error, 1000)}") from error
    return list(dict.fromkeys(prompt.text for prompt in found))


# -- bags, heads, models ------------------------------------------------------------------------


class Head(NamedTuple):
    """A discriminator's head, and what is told of it."""

    module: Any
    label: int
    meta: Mapping[str, Any]

    @property
    def class_name(self) -> str:
        vocab = self.meta.get("class_vocab") or {}
        return next((word for word, n in vocab.items() if n == self.label), str(self.label))


def read_head(flags: Flags) -> Head | None:
    """The head where one is asked for; it brings the model that it was trained on where none is
    named.

    Raises:
        UsageError: a file that is no head, no class of it.
    """
    from .heads import head_by_name, label_id

    steer, named = flags[SteerFlags], flags[ModelFlags]
    if steer.discrim is None:
        return None
    try:
        head, meta = head_by_name(steer.discrim, steer.discrim_weights, steer.discrim_meta)
    except (ValueError, OSError) as error:
        raise UsageError(f"--discrim: {one_line(error, 1000)}") from error
    try:
        label = label_id(meta, steer.class_label, "--class_label")
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    if named.model_name_or_path is None:
        named.model_name_or_path = meta.get("pretrained_model")
        if named.model_name_or_path is None:
            raise UsageError("--model: got nothing, and the head does not name the one it is of")
        tell(f"the model that the head was trained on: {named.model_name_or_path}")
        check_model(flags)
    return Head(head, label, meta)


def make_small(flags: Flags) -> None:
    """The small model and its head in the folder of `onepass pplm train-discriminator`, made where
    they are not there; what is steered to by default."""
    from ..training.small_model import MODEL
    from . import train_command

    steer, where = flags[SteerFlags], Path(flags[OutputFlags].output_dir)
    if steer.bag_of_words is None and not flags.given & {"variant", *UBER}:
        steer.variant = "past"
        flags.prefer(JL)
    flags.prefer(SMALL | {"stepsize": SMALL_STEPS[steer.variant]})
    has_model, has_head = (where / MODEL).is_dir(), (where / HEAD).is_file()
    if has_head and not has_model:
        raise UsageError(
            f"--output_dir: the head in {str(where)!r} is of another model than the small one",
            hint=f"steer by it with -D {where}, or name another folder with --output_dir DIR",
        )
    if not has_model or not (has_head or steer.bag_of_words is not None):
        with contextlib.redirect_stdout(sys.stderr):
            train_command.run("onepass pplm train-discriminator", ["--output_dir", str(where)])
    flags[ModelFlags].model_name_or_path = str(where / MODEL)
    if steer.bag_of_words is None:
        steer.discrim = str(where)
        steer.class_label = steer.class_label or SMALL_CLASS


# -- the work -----------------------------------------------------------------------------------


class Written(NamedTuple):
    """One text: what follows the prompt."""

    row: list[int]  # the prompt's tokens
    new: list[int]
    text: str
    losses: list[list[float]]  # of each steered token, before each of its steps
    spans: list[tuple[int, int]]  # of the bag's words in the text
    class_probability: float | None
    nats_per_token: float  # by the unsteered model


def write_texts(flags: Flags, prompts: list[str], head: Head | None, device: Any) -> dict[str, Any]:
    """All texts, written and measured; returns what the JSON holds, less how long it took.

    Raises:
        UsageError, Failed: what only the model and its tokenizer tell.
    """
    import torch

    from .bags import bag_weights, get_bag_of_words_indices
    from .perturb import Goal, check_goal

    text, steer, own = flags[TextFlags], flags[SteerFlags], flags[OutputFlags]
    adapter = None if own.adapter is None else find_adapter(own.adapter)
    model, tokenizer = load_policy(flags[ModelFlags], adapter, device)
    try:
        bags: tuple[Bag, ...] = ()
        if steer.bag_of_words is not None:
            indices = get_bag_of_words_indices(steer.bag_of_words, tokenizer)
            found = (bag_weights(words, device) for words in indices)
            bags = tuple(bag for bag in found if len(bag.ids))
        module = None if head is None else head.module.to(device).eval()
        goal = Goal(bags, module, 0 if head is None else head.label)
        if head is not None and head.meta.get("pool") in POOLS and "pool" not in flags.given:
            steer.pool = head.meta["pool"]
        check_goal(goal, model)
        prompts = prompts or [text.prompt or PROMPT]
        rows = begun(tokenizer, prompts)
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    fit_length(flags, model, max(map(len, rows)), head is not None)
    if text.num_samples > 1 and not text.sample:
        tell(f"without --sample the {text.num_samples} texts of a prompt are one")
        text.num_samples = 1
    every = [row for row in rows for _ in range(text.num_samples)]
    texts = []
    try:
        with torch.no_grad():
            for name, wanted in (("unsteered", None), ("steered", goal)):
                texts.append(write(flags, model, tokenizer, every, wanted, goal, name))
    except ValueError as error:
        raise UsageError(one_line(error, 1000)) from error
    except torch.cuda.OutOfMemoryError as error:
        raise Failed(f"out of memory: {len(every)} texts at once, wanted fewer") from error
    if all(before.new == after.new for before, after in zip(*texts, strict=True)):
        tell("steering changed no token: raise --stepsize")
    n = text.num_samples
    entries = [
        {
            "prompt": prompt,
            "unsteered": [as_dict(each) for each in texts[0][n * at : n * at + n]],
            "steered": [as_dict(each) for each in texts[1][n * at : n * at + n]],
        }
        for at, prompt in enumerate(prompts)
    ]
    kept = ("prompt", "prompts", "output", "overwrite", "json", "config")
    return {
        "program": f"{PROGRAM} pplm",
        "schema": SCHEMA,
        "versions": versions(),
        "model": flags[ModelFlags].model_name_or_path,
        "bag_of_words": steer.bag_of_words,
        "discrim": steer.discrim,
        "class": None if head is None else head.class_name,
        "settings": {k: v for k, v in flags.as_dict().items() if k not in kept},
        "mean": {
            "unsteered": means(texts[0], head is not None),
            "steered": means(texts[1], head is not None),
        },
        "texts": entries,
    }


def fit_length(flags: Flags, model: Any, n_tokens: int, with_head: bool) -> None:
    """A default --length that the model has no positions for becomes what it has.

    Raises:
        UsageError: one that was given.
    """
    from .forward import places_of

    text, steer = flags[TextFlags], flags[SteerFlags]
    limit = places_of(model)
    ahead = steer.horizon_length if with_head and steer.variant == "uber" else 0
    most = text.length if limit is None else limit - n_tokens + 1 - ahead
    if text.length <= most:
        return
    if "length" in flags.given or most < 1:
        raise UsageError(
            f"--length: got {text.length} after {n_tokens} tokens, the model has {limit} positions",
            hint=f"at most --length {most}" if most > 0 else "wanted a shorter prompt",
        )
    tell(f"--length {most}: the model has {limit} positions")
    text.length = most


def begun(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Tokens of each prompt after the BOS token, where the tokenizer has one."""
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for prompt in prompts:
        row = start + tokenizer.encode(prompt, add_special_tokens=False)
        if not row:
            if not prompt:
                raise ValueError(
                    "--uncond: the tokenizer has no BOS token to begin with: wanted --prompt"
                )
            raise ValueError(f"--prompt: no token: the tokenizer has none for {prompt!r}")
        rows.append(row)
    return rows


def write(
    flags: Flags,
    model: Any,
    tokenizer: Any,
    rows: Sequence[list[int]],
    goal: Goal | None,  # None: unsteered
    measured: Goal,
    name: str,
) -> list[Written]:
    """A text for each row, all at once."""
    from ..cli.terminal import progress_bar
    from .generate import Ends, written

    text = flags[TextFlags]
    eos = [] if text.ignore_eos else model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    ends = Ends(tokenizer, len(rows), eos, text.stop_strings)
    steps = by_uber if flags[SteerFlags].variant == "uber" else by_jl
    losses: list[list[list[float]]] = [[] for _ in rows]  # of each text, of each step
    with progress_bar(text.length, 0) as bar:
        bar.set_description(f"{name:>9}")
        bar.unit = " tokens"
        for of_step in steps(flags, model, tokenizer, rows, goal, ends):
            bar.update(1)
            for of_text, values in zip(losses, of_step, strict=True):
                of_text.append(values)
    found = []
    for row, new, of_row in zip(rows, ends.new, losses, strict=True):
        spans = spans_of(tokenizer, row[-1], new, measured)
        probability, nats = measure(model, row, new, measured)
        told = written(tokenizer, row[-1], new)
        found.append(Written(row, new, told, of_row[: len(new)], spans, probability, nats))
    return found


def by_uber(
    flags: Flags, model: Any, tokenizer: Any, rows: Any, goal: Goal | None, ends: Any
) -> Iterator[list[list[float]]]:
    """Of each step its losses, for each row one an iteration."""
    import torch

    from .generate import grow, padded
    from .perturb import Steps
    from .walk import Choice, Walk

    text, steer = flags[TextFlags], flags[SteerFlags]
    how = Steps(
        steer.stepsize,
        steer.num_iterations,
        steer.horizon_length,
        steer.window_length,
        steer.decay,
        steer.gamma,
        steer.kl_scale,
        steer.window_side,
    )
    choice = Choice(text.temperature, steer.gm_scale, text.top_k, text.sample)
    ids, mask = padded(tokenizer, rows)
    options: Any = {"mask": mask, "grad_length": steer.grad_length}
    walk = Walk(model, ids, goal, how, text.length, **options)
    generator = torch.Generator(model.device).manual_seed(text.seed)
    for found in grow(walk, choice, ends, generator):
        yield torch.stack(found.losses, 1).tolist() if found.losses else [[]] * len(rows)


def by_jl(
    flags: Flags, model: Any, tokenizer: Any, rows: Any, goal: Goal | None, ends: Any
) -> Iterator[list[list[float]]]:
    """The same, by PPLM.jl's way, which tells no losses."""
    import torch

    from .forward import check_places
    from .generate import padded
    from .perturb import Goal
    from .sample import AdamWalk, new_tokens
    from .sampling import top_k_sample
    from .settings import pplm

    text, steer = flags[TextFlags], flags[SteerFlags]
    args = None
    if goal is not None:
        asked: dict[str, Any] = {"method": "BoW", "bow_list": steer.bag_of_words}
        if goal.classifier is not None:
            asked = {"method": "Discrim", "discrim": goal.classifier}
            asked["target_class_id"] = goal.class_label
        args = pplm(
            perturb=steer.variant,
            stepsize=steer.stepsize,
            num_iterations=steer.num_iterations,
            temperature=text.temperature,
            fusion_gm_scale=steer.gm_scale,
            fusion_kl_scale=steer.kl_scale,
            pool=steer.pool,
            **asked,
        )
    generator = torch.Generator(model.device).manual_seed(text.seed)

    def pick(probs: Tensor) -> Tensor:
        if text.sample:
            tokens = top_k_sample(probs, text.top_k, generator)[:, 0]
        else:
            tokens = probs.argmax(-1)
        return ends.take(tokens).unsqueeze(1)  # type: ignore[no-any-return]

    ids, mask = padded(tokenizer, rows)
    check_places(model, ids.shape[1], text.length)
    walk = AdamWalk(model, text.temperature, args, goal or Goal())
    for _ in new_tokens(walk, ids, mask, text.length, pick):
        yield [[]] * len(rows)
        if all(ends.ended):
            return


# -- what is told of a text ---------------------------------------------------------------------


def spans_of(tokenizer: Any, last: int, new: list[int], goal: Goal) -> list[tuple[int, int]]:
    """Where the bag's words stand in the text, without the blanks before them."""
    from .generate import written

    ids = {token for bag in goal.bags for token in bag.ids.tolist()}
    spans = []
    for n, token in enumerate(new):
        if token in ids:
            start, text = (
                len(written(tokenizer, last, new[:n])),
                written(tokenizer, last, new[: n + 1]),
            )
            start += len(text[start:]) - len(text[start:].lstrip())
            spans.append((start, len(text)))
    return spans


def measure(model: Any, row: list[int], new: list[int], goal: Goal) -> tuple[float | None, float]:
    """The class's probability by the mean hidden state of the whole text, and the mean -log p of a
    new token, in nats, by the unsteered model."""
    import torch

    from .. import cross_entropy
    from .forward import run, steady
    from .heads import class_logps

    ids = torch.tensor([row + new], device=model.device)
    with steady(model, goal.classifier):
        out = model(input_ids=ids[:, :-1], use_cache=False)
        losses = cross_entropy(out.logits[0], ids[0, 1:], reduction="none")
        nats = float(losses[-len(new) :].float().mean())
        if goal.classifier is None:
            return None, nats
        hidden = run(model, ids, logits=False).hidden.float().mean(1)
        return float(class_logps(goal.classifier(hidden))[0, goal.class_label].exp()), nats


def as_dict(text: Written) -> dict[str, Any]:
    return {
        "text": text.text,
        "ids": text.new,
        "bag_words": [text.text[a:b] for a, b in text.spans],
        "spans": text.spans,
        "class_probability": text.class_probability,
        "nats_per_token": text.nats_per_token,
        "losses": text.losses,
    }


def means(texts: Sequence[Written], with_head: bool) -> dict[str, Any]:
    n = len(texts)
    return {
        "bag_words": sum(len(text.spans) for text in texts) / n,
        "class_probability": (
            sum(text.class_probability or 0.0 for text in texts) / n if with_head else None
        ),
        "nats_per_token": sum(text.nats_per_token for text in texts) / n,
        "tokens": sum(len(text.new) for text in texts) / n,
    }


def finish(own: OutputFlags, facts: dict[str, Any]) -> None:
    """Write the file, print the texts."""
    from ..cli.files import replace_text, strict_json

    told = strict_json(facts, indent=1)
    if own.output is not None:
        Path(own.output).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(own.output), told + "\n")
    if own.json:
        print(told)
    else:
        show(facts)
    wrote = f"wrote {own.output}; " if own.output is not None else ""
    tell(f"{wrote}{facts['seconds']:.0f} s")


def show(facts: dict[str, Any]) -> None:
    """The texts beside each other, and below them what steering changed."""
    from ..cli.table import render
    from ..training.token_texts import printable
    from .view import Marked, colours, side_by_side

    out = sys.stdout
    width = shutil.get_terminal_size((100, 24)).columns
    aims = [facts["bag_of_words"], facts["class"] and f"class {facts['class']}"]
    steered = f"steered: {', '.join(aim for aim in aims if aim)}"
    for entry in facts["texts"]:
        print(
            f"after {printable(entry['prompt'])}" if entry["prompt"] else "from nothing", file=out
        )
        for pair in zip(entry["unsteered"], entry["steered"], strict=True):
            texts = [Marked(each["text"].rstrip(), each["spans"]) for each in pair]
            for line in side_by_side(("unsteered", steered), texts, width, colours(out)):
                print(encodable(line, out), file=out)
            print(file=out)
    before, after = facts["mean"]["unsteered"], facts["mean"]["steered"]
    shown: dict[str, Callable[[Any], str]] = {
        "bag_words": lambda x: f"{x:.1f}",
        "class_probability": lambda x: f"{x:.3f}",
        "nats_per_token": lambda x: f"{x:.2f}",
    }
    names = ["bag_words"] if facts["bag_of_words"] else []
    names += ["class_probability"] if facts["class"] else []
    rows = [
        [name.replace("_", " "), *(shown[name](each[name]) for each in (before, after))]
        for name in (*names, "nats_per_token")
    ]
    n_texts = sum(len(entry["steered"]) for entry in facts["texts"])
    render(f"Mean of {n_texts} texts", ["measure", "unsteered", "steered"], rows)


def encodable(line: str, stream: Any) -> str:
    """What the stream cannot carry escaped."""
    encoding = stream.encoding or "ascii"
    return line.encode(encoding, "backslashreplace").decode(encoding)
