"""`onepass dpo ACTION`: pairs from a model's own answers, what its answers are worth, both for many
losses. Imports nothing heavy before all that can be refused has been.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.errors import Failed, Parser, UsageError, one_line, unknown
from ..training.flags import Flags, ModelFlags, check_above_0, check_from, flag, parse
from ..training.models import (
    check_folder,
    check_installed,
    device_of,
    find_adapter,
    load_policy,
)
from .examples import TextOrTurns, is_conversation
from .reward import Reward, RewardFlags, Score, parse_reward

if TYPE_CHECKING:
    from .generate import Sampling

PROGRAM, SCHEMA = "onepass dpo", 1
NEEDED = ("transformers", "peft", "tokenizers", "safetensors", "tqdm")
MEASURES = {
    "reward": ("reward", "reward_error"),
    "token entropy, nats": ("token_entropy",),
    "KL to the reference, a token": ("kl_per_token",),
    "KL to the reference, a sequence": ("kl_per_sequence", "kl_per_sequence_error"),
    "distinct 1-grams": ("distinct_1",),
    "distinct 2-grams": ("distinct_2",),
    "distinct 3-grams": ("distinct_3",),
    "tokens an answer": ("tokens_per_answer",),
}


@dataclass
class SamplingFlags:
    """The answers."""

    prompts: str | None = flag(None, "what is answered (json, jsonl, txt)", metavar="FILE")
    num_answers: int = flag(50, "to each prompt")
    max_new_tokens: int = flag(48, "of an answer at most")
    min_new_tokens: int = flag(0, "and at least", advanced=True)
    temperature: float = flag(1.0, "of the draws")
    top_k: int = flag(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = flag(1.0, "draw from so much of the probability")
    generation_batch_size: int = flag(64, "answers at once")

    def check(self) -> None:
        """UsageError for what cannot be drawn."""
        for name in ("num_answers", "max_new_tokens", "generation_batch_size"):
            check_from(name, getattr(self, name), 1)
        for name in ("min_new_tokens", "top_k"):
            check_from(name, getattr(self, name), 0)
        if self.min_new_tokens > self.max_new_tokens:
            text = f"--min_new_tokens: got {self.min_new_tokens}"
            raise UsageError(f"{text}, more than --max_new_tokens={self.max_new_tokens}")
        check_above_0("temperature", self.temperature)
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top_p: got {self.top_p}, wanted above 0 and at most 1")

    def sampling(self, seed: int, num_answers: int | None = None) -> Sampling:
        from .generate import Sampling

        return Sampling(
            num_answers=num_answers or self.num_answers,
            max_new_tokens=self.max_new_tokens,
            min_new_tokens=self.min_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            batch_size=self.generation_batch_size,
            seed=seed,
        )


@dataclass
class PairFlags:
    """The pairs."""

    pairs_per_prompt: int = flag(50, "different ones, drawn at random")


@dataclass
class OtherModels:
    """The other models."""

    adapter: str | None = flag(None, "of PEFT, or the folder of a run with one", metavar="DIR")
    reference: str | None = flag(
        None, "model for the KL (default: that under --adapter)", metavar="NAME_OR_DIR"
    )


@dataclass
class ActionFlags:
    """The command."""

    output: str | None = flag(None, "file to write", metavar="FILE")
    overwrite: bool = flag(False, "replace it where it exists")
    json: bool = flag(False, "print JSON, not a table")
    device: str = flag("auto", "auto: the GPU where there is one", choices=["auto", "cpu", "cuda"])
    seed: int = flag(42, "of all draws")
    config: str | None = flag(None, "YAML file of flags", metavar="FILE")


# -- the dispatcher ---------------------------------------------------------------------------

SUMMARIES = {
    "pairs": "draw answers to prompts, score them, write pairs of them",
    "evaluate": "reward, token entropy, variety and KL of a model's answers",
    "frontier": "train each loss at each beta, draw reward against token entropy",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `onepass dpo` itself takes: the name of an action."""
    width = max(map(len, SUMMARIES))
    listed = "\n".join(f"  {name:<{width}}  {told}" for name, told in SUMMARIES.items())
    parser.usage = "onepass dpo ACTION [flags]"
    parser.description = f"Preferences from a reward, and what training on them brings.\n\n{listed}"
    parser.epilog = "See also: onepass dpo ACTION --help, onepass train dpo --help"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run_tokens(tokens: Sequence[str]) -> int:
    """Run `onepass dpo` with `tokens`; returns the exit code."""
    if not tokens or tokens[0].startswith("-"):
        parser = Parser(prog=PROGRAM)
        add_arguments(parser)
        parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if all(t == "--debug" for t in tokens):
            hint = "see onepass dpo --help"
            raise UsageError("got no action", allowed=SUMMARIES, hint=hint, prog=PROGRAM)
        try:
            parser.parse_args(tokens)
        except UsageError as error:
            error.hint = "flags follow the action: onepass dpo ACTION --flag"
            raise
    name, *rest = tokens
    if name not in SUMMARIES:
        raise unknown("action", name, SUMMARIES, prog=PROGRAM)
    prog = f"{PROGRAM} {name}"
    try:
        if name == "frontier":
            from .frontier import run_frontier

            return run_frontier(prog, SUMMARIES[name], rest)
        kinds, defaults, run = ACTIONS[name]
        told = f"{prog}: {SUMMARIES[name]}."
        flags = parse(prog, kinds, rest, defaults=defaults, description=told, training=False)
        return run(flags)
    except UsageError as error:
        error.prog = prog
        raise


# -- what the actions share -------------------------------------------------------------------


def check_model(flags: Flags) -> None:
    """UsageError for a model that is none."""
    model = flags[ModelFlags]
    if not model.model_name_or_path:
        raise UsageError("--model: got nothing, wanted a folder or the name of a model")
    check_folder(model.model_name_or_path)
    if model.load_in_8bit and model.load_in_4bit:
        raise UsageError("--load_in_8bit and --load_in_4bit exclude each other")


def read_asked(path: str | None) -> list[TextOrTurns]:
    """The prompts of a file, texts or conversations, each once.

    Raises:
        UsageError: no file, or one without prompts.
    """
    from ..training.prompts import read_prompts

    if not path:
        raise UsageError("--prompts: got nothing, wanted a file (json, jsonl, txt)")
    try:
        found = read_prompts(path)
    except (ValueError, OSError) as error:
        raise UsageError(f"--prompts: {one_line(error, 1000)}") from error
    asked: dict[str, TextOrTurns] = {}
    for number, prompt in enumerate(found, 1):
        turns = next((v for v in prompt.record.values() if isinstance(v, list)), None)
        if turns is None:
            asked.setdefault(json.dumps(prompt.text), prompt.text)
        elif is_conversation(turns):
            asked.setdefault(json.dumps(turns), turns)
        else:
            where = f"{path}:{prompt.line}" if prompt.line else f"{path}: entry {number}"
            raise UsageError(
                f'--prompts: {where}: got a list, wanted text or {{"role": ..., "content": text}}'
            )
    return list(asked.values())


def check_output(action: ActionFlags, suffixes: Sequence[str], needed: bool) -> None:
    """UsageError where the file could not be written."""
    from ..cli.folder import check_writable

    name, wanted = action.output, " or ".join(suffixes)
    if name is None:
        if needed:
            raise UsageError(f"--output: got nothing, wanted a file that ends in {wanted}")
        return
    path = Path(name)
    if path.suffix not in suffixes:
        raise UsageError(f"--output: got {name!r}, wanted a name that ends in {wanted}")
    if path.is_dir():
        raise UsageError(f"--output: {name!r} is a folder, wanted a file")
    if path.exists() and not action.overwrite:
        raise UsageError(f"--output: {name!r} exists", hint="--overwrite replaces it")
    check_writable(path.parent)


# -- pairs ------------------------------------------------------------------------------------


def make_pairs(
    path: Path,
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TextOrTurns],
    sampling: Sampling,
    reward: Reward,
    score: Score,
    pairs_per_prompt: int,
    score_prompt: bool,
) -> dict[str, int]:
    """Write pairs of the model's answers; returns what was made and left out.

    Raises:
        Failed: no pair could be made.
    """
    from .generate import sample_answers, texts_of
    from .pairs import draw_pairs, write_pairs

    try:
        texts = texts_of(prompts, tokenizer)
        drawn = sample_answers(model, tokenizer, prompts, sampling)
    except ValueError as error:
        raise UsageError(f"--prompts: {one_line(error)}") from error
    values = reward.scores(
        score, [texts[a.prompt] + a.text if score_prompt else a.text for a in drawn]
    )
    answers: list[list[str]] = [[] for _ in prompts]
    scores: list[list[float]] = [[] for _ in prompts]
    for answer, value in zip(drawn, values, strict=True):
        answers[answer.prompt].append(answer.text)
        scores[answer.prompt].append(value)
    pairs, counts = draw_pairs(prompts, answers, scores, pairs_per_prompt, sampling.seed)
    if not pairs:
        raise Failed(
            "no pair: all answers to a prompt score alike; draw more (--num_answers), or want"
            " another --reward"
        )
    write_pairs(path, pairs)
    return counts


def run_pairs(flags: Flags) -> int:
    """`onepass dpo pairs`."""
    asked, action, wanted = flags[SamplingFlags], flags[ActionFlags], flags[RewardFlags]
    n_pairs = flags[PairFlags].pairs_per_prompt
    check_model(flags)
    asked.check()
    check_from("num_answers", asked.num_answers, 2)
    check_from("pairs_per_prompt", n_pairs, 1)
    check_from("seed", action.seed, 0)
    reward = parse_reward(wanted)
    prompts = read_asked(asked.prompts)
    check_output(action, (".jsonl",), needed=True)
    check_installed(NEEDED)
    from ..cli.files import strict_json
    from ..cli.table import render
    from ..cli.terminal import quiet_libraries
    from .pairs import told

    device = device_of(action.device)
    path = Path(str(action.output))
    with quiet_libraries():
        score = reward.load(device)
        model, tokenizer = load_policy(flags[ModelFlags], None, device)
        path.parent.mkdir(parents=True, exist_ok=True)
        how = (reward, score, n_pairs, wanted.score_prompt)
        counts = make_pairs(path, model, tokenizer, prompts, asked.sampling(action.seed), *how)
    if action.json:
        facts = {"program": f"{PROGRAM} pairs", "schema": SCHEMA, "output": str(path)}
        print(strict_json(facts | {"counts": counts}, indent=1))
    else:
        rows = [[name.replace("_", " "), n] for name, n in counts.items()]
        render(f"Pairs in {path}", ["what", "number"], rows)
    for line in told(counts, n_pairs):
        print(line, file=sys.stderr)
    return 0


# -- evaluate ---------------------------------------------------------------------------------


def run_evaluate(flags: Flags) -> int:
    """`onepass dpo evaluate`."""
    asked, action, wanted = flags[SamplingFlags], flags[ActionFlags], flags[RewardFlags]
    others = flags[OtherModels]
    check_model(flags)
    adapter = None if others.adapter is None else find_adapter(others.adapter)
    if others.reference is not None:
        check_folder(others.reference, "--reference")
    asked.check()
    check_from("seed", action.seed, 0)
    reward = parse_reward(wanted)
    prompts = read_asked(asked.prompts)
    check_output(action, (".json",), needed=False)
    check_installed(NEEDED)
    from ..cli.files import replace_text, strict_json
    from ..cli.table import render
    from ..cli.terminal import quiet_libraries
    from .evaluate import measure

    device = device_of(action.device)
    with quiet_libraries():
        score = reward.load(device)
        model, tokenizer = load_policy(flags[ModelFlags], adapter, device)
        reference = None
        if others.reference is not None:
            named = ModelFlags(others.reference, dtype=flags[ModelFlags].dtype)
            reference, _ = load_policy(named, None, device)
            check_same_vocabulary(model, reference, others.reference)
        try:
            facts = measure(
                model,
                tokenizer,
                prompts,
                asked.sampling(action.seed),
                reward,
                score,
                reference=reference,
                score_prompt=wanted.score_prompt,
            )
        except ValueError as error:
            raise UsageError(f"--prompts: {one_line(error)}") from error
    head = {"program": f"{PROGRAM} evaluate", "schema": SCHEMA, "reward_asked": wanted.reward}
    head |= {"model": flags[ModelFlags].model_name_or_path, "adapter": others.adapter}
    text = strict_json({**head, "reference": others.reference, **facts}, indent=1)
    if action.output is not None:
        Path(action.output).parent.mkdir(parents=True, exist_ok=True)
        replace_text(Path(action.output), text + "\n")
    if action.json:
        print(text)
    else:
        title = f"{facts['answers']} answers to {facts['prompts']} prompts"
        rows = [[label, shown(facts, names)] for label, names in MEASURES.items()]
        render(title, ["measure", "value"], rows)
    if action.output is not None:
        print(f"wrote {action.output}", file=sys.stderr)
    return 0


def check_same_vocabulary(model: Any, reference: Any, name: str) -> None:
    """Failed where the reference has other tokens."""
    sizes = [m.config.get_text_config().vocab_size for m in (model, reference)]
    if sizes[0] != sizes[1]:
        raise Failed(
            f"--reference: {name!r} has a vocabulary of {sizes[1]}, the model one of {sizes[0]}:"
            " their KL has no meaning"
        )


def shown(facts: dict[str, Any], names: Sequence[str]) -> str | None:
    """A fact, with its standard error where it has one."""
    told = [f"{facts[name]:#.3g}" for name in names if facts.get(name) is not None]
    return " +- ".join(told) or None


ACTIONS: dict[str, tuple[tuple[type, ...], dict[str, Any], Callable[[Flags], int]]] = {
    "pairs": ((ModelFlags, SamplingFlags, RewardFlags, PairFlags, ActionFlags), {}, run_pairs),
    "evaluate": (
        (ModelFlags, OtherModels, SamplingFlags, RewardFlags, ActionFlags),
        {"num_answers": 3},
        run_evaluate,
    ),
}
