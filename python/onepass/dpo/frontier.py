"""`onepass dpo frontier`: train each loss at each beta, and draw reward against token entropy.

Without --model it is the notebook's experiment on the small model made here. A folder holds one
experiment: what is finished in it is not done again, and one of other settings is refused.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.errors import Failed, UsageError, one_line
from ..training.flags import (
    Flags,
    ModelFlags,
    RunFlags,
    check_from,
    check_lora_flags,
    check_run_flags,
    default_of,
    flag,
    parse,
)
from ..training.models import check_installed, load_policy
from ..training.run_folder import RunFolder, digest, read_run, recorded_flags, tell
from .command import DEFAULTS, AdapterFlags
from .command_line import (
    NEEDED,
    PairFlags,
    SamplingFlags,
    check_model,
    make_pairs,
    read_asked,
    shown,
)
from .examples import TextOrTurns
from .reward import Reward, RewardFlags, parse_reward

SYSTEM = "dpo-frontier"
LOSSES = ["sigmoid", "hinge", "ipo", "alpha", "JSD", "FKL", "RKL"]
POINTS, START, DATA, JSON, PNG = (
    "points",
    "start.json",
    "pairs.jsonl",
    "frontier.json",
    "frontier.png",
)
COLUMNS = {
    "reward": ("reward", "reward_error"),
    "entropy, nats": ("token_entropy",),
    "KL a token": ("kl_per_token",),
    "KL a sequence": ("kl_per_sequence",),
    "distinct 1": ("distinct_1",),
    "distinct 2": ("distinct_2",),
    "distinct 3": ("distinct_3",),
}
# Words that open prose as well as code: the small model goes on in either.
PROMPTS = (
    *("for", "if", "return", "class", "The", "import", "while", "with", "not", "in", "is", "from"),
    *("A", "None", "True", "def", "as", "and", "or", "print", "raise", "try", "assert", "global"),
)
SMALL = {  # what suits the small model, where nothing else is said
    "reward": "code",
    "reward_sign": -1,
    "losses": ["sigmoid", "hinge", "ipo"],
    "betas": ["0.1", "0.5"],
    "num_answers": 16,
    "num_eval_answers": 12,
    "pairs_per_prompt": 20,
    "max_new_tokens": 32,
    "generation_batch_size": 192,
    "learning_rate": 1e-3,
    "max_steps": 60,
    "gradient_checkpointing": False,
}
SMALL_FAST = SMALL | {
    "losses": ["sigmoid"],
    "betas": ["0.1"],
    "num_answers": 8,
    "num_eval_answers": 8,
    "max_new_tokens": 16,
    "max_steps": 20,
}


@dataclass
class FrontierFlags:
    """The experiment."""

    data: str | None = flag(None, "pairs (default: made of the model's answers)", metavar="FILE")
    losses: list[str] = flag(LOSSES, "--loss_type's; hinge:0.1:1 has betas of its own")
    betas: list[str] = flag(["0.05", "0.1", "0.5"], "how much the reference holds")
    alpha: float = flag(0.5, "of the loss alpha")
    label_smoothing: float = flag(0.0, "of the losses that have it", advanced=True)
    num_eval_answers: int = flag(3, "to each prompt, of each trained model")
    fast: bool = flag(False, "a smaller model, where one is made here")


FLAGS = (
    *(ModelFlags, FrontierFlags, SamplingFlags, PairFlags, RewardFlags, AdapterFlags, RunFlags),
)
# Flags of the run that are not those of a point's training.
NOT_PASSED = {
    *("output_dir", "overwrite", "resume_from_checkpoint", "config", "accelerate_config"),
    *("model_name_or_path", "push_to_hub", "run_name"),
}


class Point(NamedTuple):
    """One training."""

    loss: str
    beta: float

    @property
    def name(self) -> str:
        return f"{self.loss}-beta{self.beta!r}"


def run_frontier(prog: str, summary: str, tokens: Sequence[str]) -> int:
    """Refuse what cannot work, then do what is not done yet; returns the exit code."""
    flags = _parse(prog, summary, tokens)
    prompts, reward, points = check(flags)
    folder = RunFolder(SYSTEM, flags, free=("losses", "betas"))
    points = check_losses(points, flags[FrontierFlags])
    check_installed((*NEEDED, "accelerate", "matplotlib"))
    from ..cli.terminal import quiet_libraries

    with quiet_libraries(), contextlib.ExitStack() as stack:
        if flags[ModelFlags].model_name_or_path is None:
            from ..demo.train import one_thread

            stack.enter_context(one_thread())  # what so small a model runs fastest on
        stack.callback(folder.release)
        return _run(flags, folder, prompts, reward, points)


def _parse(prog: str, summary: str, tokens: Sequence[str]) -> Flags:
    """The flags; those of an experiment in the folder where it goes on."""

    def parsed(tokens: Sequence[str]) -> Flags:
        told = f"{prog}: {summary}. Run it again to go on after an interruption."
        return parse(
            *(prog, FLAGS, tokens),
            defaults=DEFAULTS,
            description=told,
            recorded=partial(recorded_flags, system=SYSTEM),
        )

    flags = parsed(tokens)
    run = flags[RunFlags]
    there = (read_run(Path(run.output_dir)) or {}).get("system") == SYSTEM
    if there and not run.overwrite and run.resume_from_checkpoint is None:
        flags = parsed([*tokens, "--resume_from_checkpoint"])
    if flags[ModelFlags].model_name_or_path is None:
        for name, value in (SMALL_FAST if flags[FrontierFlags].fast else SMALL).items():
            owner = next(v for v in flags.values if hasattr(v, name))
            if name not in flags.given:
                setattr(owner, name, value)
                flags.given.add(name)
    return flags


# -- what is refused ----------------------------------------------------------------------------


def check(flags: Flags) -> tuple[list[TextOrTurns], Reward, list[Point]]:
    """(prompts, reward, points) of the flags.

    Raises:
        UsageError: what can be refused before libraries are loaded and files written.
    """
    asked, own, run = flags[SamplingFlags], flags[FrontierFlags], flags[RunFlags]
    small = flags[ModelFlags].model_name_or_path is None
    if not small:
        check_model(flags)
    if own.fast and not small:
        raise UsageError("--fast: is of the model made here; leave it out with --model")
    if small and own.data is not None:
        raise UsageError("--data: wanted --model with it: whose answers are they?")
    if run.accelerate_config not in (None, "none"):
        raise UsageError("--accelerate_config: an experiment runs in one process; leave it out")
    check_run_flags(flags)
    check_lora_flags(flags[AdapterFlags])
    asked.check()
    check_from("num_answers", asked.num_answers, 2)
    check_from("num_eval_answers", own.num_eval_answers, 1)
    check_from("pairs_per_prompt", flags[PairFlags].pairs_per_prompt, 1)
    reward = parse_reward(flags[RewardFlags])
    prompts: list[TextOrTurns] = list(PROMPTS)
    if not small or asked.prompts is not None:
        prompts = read_asked(asked.prompts)
    for holder, name in ((asked, "prompts"), (own, "data")):
        if (path := getattr(holder, name)) is not None:  # gone on with from anywhere
            setattr(holder, name, str(Path(path).absolute()))
    if own.data is not None:
        from .examples import read_pairs

        try:
            read_pairs(own.data)
        except (ValueError, OSError) as error:
            raise UsageError(f"--data: {one_line(error, 1000)}") from error
    return prompts, reward, points_of(own.losses, own.betas)


def check_losses(points: Sequence[Point], asked: FrontierFlags) -> list[Point]:
    """The points by their losses' own names, each once; loads torch.

    Raises:
        UsageError: a loss that is none.
    """
    from .arguments import DPOArguments
    from .losses import loss_name

    found = []
    for point in points:
        try:
            DPOArguments(
                beta=point.beta, loss_type=[point.loss], **own_options(point, asked)
            ).check()
        except (ValueError, TypeError) as error:
            raise UsageError(f"--{str(error).replace('loss_type', 'losses', 1)}") from error
        found.append(Point(loss_name(point.loss), point.beta))
    return list(dict.fromkeys(found))


def own_options(point: Point, asked: FrontierFlags) -> dict[str, Any]:
    """alpha and label_smoothing, for a loss that has them."""
    from .losses import NOTEBOOK, SMOOTHED, loss_name

    loss, options = loss_name(point.loss), dict[str, Any]()
    if loss == "alpha":
        options["alpha"] = asked.alpha
    if asked.label_smoothing and loss in (*SMOOTHED, *NOTEBOOK):
        options["label_smoothing"] = asked.label_smoothing
    return options


def points_of(losses: Sequence[str], betas: Sequence[str]) -> list[Point]:
    """Each loss at each beta, or at its own: `hinge:0.1:1`.

    Raises:
        UsageError: a beta that is no number above 0.
    """
    points = []
    for word in losses:
        loss, *own = word.split(":")
        for text in own or betas:
            try:
                beta = float(text)
            except ValueError:
                beta = math.nan
            if not 0 < beta < math.inf:
                where = "--losses" if own else "--betas"
                raise UsageError(f"{where}: got {text!r}, wanted a number above 0")
            points.append(Point(loss, beta))
    if not points:
        raise UsageError("--losses, --betas: got nothing, wanted at least one of each")
    return points


# -- the work -----------------------------------------------------------------------------------


def fingerprints(flags: Flags, prompts: Sequence[TextOrTurns], reward: Reward) -> dict[str, str]:
    """Digests of what is read, so that an experiment goes on with the same."""
    found = {"prompts": json.dumps(prompts).encode()}
    if (data := flags[FrontierFlags].data) is not None:
        found["data"] = Path(data).read_bytes()
    found["reward"] = json.dumps(reward.contents()).encode()
    return {name: digest(raw) for name, raw in found.items()}


def _run(
    flags: Flags, folder: RunFolder, prompts: list[TextOrTurns], reward: Reward, points: list[Point]
) -> int:
    import torch

    from ..training import small_model

    own, run = flags[FrontierFlags], flags[RunFlags]
    cpu = run.use_cpu or not torch.cuda.is_available()
    device = torch.device("cpu" if cpu else "cuda")
    digests = fingerprints(flags, prompts, reward)
    if folder.resumes:
        folder.go_on(digests)
    else:
        made = (small_model.MODEL, small_model.DATA)
        folder.begin(digests, writes=(POINTS, START, DATA, JSON, PNG, *made))
    if flags[ModelFlags].model_name_or_path is None:
        model = small_model.small_language_model(folder, run.seed, own.fast)
        flags[ModelFlags].model_name_or_path = str(model)
    work = _Work(flags, folder, prompts, reward, device)
    started = time.monotonic()
    start = work.start()
    pairs = work.pairs() if own.data is None else Path(own.data)
    results: dict[Point, dict[str, Any]] = {}
    failed: dict[Point, str] = {}
    points += [point for point in work.finished() if point not in points]
    for number, point in enumerate(points, 1):
        where = f"{number} of {len(points)}: {point.loss}, beta {point.beta:g}"
        if (known := _read(work.place(point) / "evaluation.json")) is not None:
            tell(f"{where}: there already")
            results[point] = known
            continue
        tell(where)
        try:
            work.train(point, pairs)
            results[point] = work.evaluate(point)
        except _Interrupted:
            tell("interrupted; run the same command to go on")
            return 130
        except (Failed, UsageError) as error:
            failed[point] = one_line(error)
            tell(f"{where} failed: {one_line(error)}")
        _write(folder, flags, start, results, failed)
    _write(folder, flags, start, results, failed)
    _show(start, results, failed)
    tell(f"wrote {folder.path}: {JSON}, {PNG}, {POINTS}/; {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


class _Interrupted(Exception):
    """Ctrl-C in a training, which has saved its checkpoint."""


class _Work:
    """The stages of an experiment, each of which leaves a file when it is done."""

    def __init__(
        self,
        flags: Flags,
        folder: RunFolder,
        prompts: list[TextOrTurns],
        reward: Reward,
        device: Any,
    ) -> None:
        self.flags, self.folder, self.prompts = flags, folder, prompts
        self.reward, self.device = reward, device
        self.score = reward.load(device)

    def place(self, point: Point) -> Path:
        return self.folder.path / POINTS / point.name

    def finished(self) -> Iterator[Point]:
        """The points that are done, those of an earlier command too."""
        for file in sorted((self.folder.path / POINTS).glob("*/evaluation.json")):
            if (known := _read(file)) is not None:
                yield Point(known["loss"], known["beta"])

    def start(self) -> dict[str, Any]:
        """What the model that training starts from is worth."""
        known = _read(self.folder.path / START)
        if known is None:
            tell("measuring the model as it is")
            known = self._measured(self.flags[ModelFlags], None)
            known |= {"kl_per_token": 0.0, "kl_per_sequence": 0.0, "kl_per_sequence_error": 0.0}
            self.folder.write_json(START, known)
        return known

    def pairs(self) -> Path:
        """Pairs of the model's own answers."""
        path = self.folder.path / DATA
        if not path.is_file():
            asked, seed = self.flags[SamplingFlags], self.flags[RunFlags].seed
            tell(f"drawing {len(self.prompts) * asked.num_answers} answers for pairs")
            model, tokenizer = load_policy(self.flags[ModelFlags], None, self.device)
            counts = make_pairs(
                path,
                model,
                tokenizer,
                self.prompts,
                asked.sampling(seed + 1),  # other draws than those that are measured
                self.reward,
                self.score,
                self.flags[PairFlags].pairs_per_prompt,
                self.flags[RewardFlags].score_prompt,
            )
            from .pairs import told

            for line in told(counts, self.flags[PairFlags].pairs_per_prompt):
                tell(line)
        return path

    def train(self, point: Point, pairs: Path) -> None:
        """`onepass train dpo` in the point's folder, from where it was killed on."""
        from ..training.command import run_tokens

        place = self.place(point)
        tokens = ["dpo", f"--model={self.flags[ModelFlags].model_name_or_path}"]
        tokens += [f"--data={pairs}", f"--output_dir={place}", f"--loss_type={point.loss}"]
        tokens += [f"--beta={point.beta!r}", *train_tokens(self.flags)]
        options = own_options(point, self.flags[FrontierFlags])
        tokens += [f"--{name}={value!r}" for name, value in options.items()]
        if read_run(place) is not None:
            tokens.append("--resume_from_checkpoint")
        elif place.exists():  # killed before it had begun
            shutil.rmtree(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        log = place.with_suffix(place.suffix + ".log")
        with log.open("a", encoding="utf-8") as out, contextlib.redirect_stdout(out):
            code = run_tokens(tokens)
        if code == 130:
            raise _Interrupted
        if code:
            raise Failed(f"the training ended with code {code}")

    def evaluate(self, point: Point) -> dict[str, Any]:
        """What the trained model is worth; its file is the sign that the point is done."""
        place = self.place(point)
        named, adapter = self.flags[ModelFlags], place / "adapter"
        if self.flags[AdapterFlags].use_peft:
            facts = self._measured(named, adapter)
        else:
            whole = ModelFlags(str(place / "model"), dtype=named.dtype)
            reference, _ = load_policy(named, None, self.device)
            facts = self._measured(whole, None, reference)
        facts = {"loss": point.loss, "beta": point.beta, **facts}
        from ..cli.files import replace_text, strict_json

        replace_text(place / "evaluation.json", strict_json(facts, indent=1) + "\n")
        return facts

    def _measured(
        self, named: ModelFlags, adapter: Path | None, reference: Any = None
    ) -> dict[str, Any]:
        from .evaluate import measure

        run, own = self.flags[RunFlags], self.flags[FrontierFlags]
        model, tokenizer = load_policy(named, adapter, self.device)
        sampling = self.flags[SamplingFlags].sampling(run.seed, own.num_eval_answers)
        try:
            return measure(
                model,
                tokenizer,
                self.prompts,
                sampling,
                self.reward,
                self.score,
                reference=reference,
                score_prompt=self.flags[RewardFlags].score_prompt,
            )
        except ValueError as error:
            raise UsageError(f"--prompts: {one_line(error)}") from error


def train_tokens(flags: Flags) -> list[str]:
    """The flags of a point's training that are not its usual ones."""
    # All pairs are trained on, as in the notebook: the answers are what is judged.
    tokens = ["--validation_ratio=0", "--max_eval_samples=64", "--save_total_limit=1"]
    holders = (flags[ModelFlags], flags[AdapterFlags], flags[RunFlags])
    values = {f.name: getattr(h, f.name) for h in holders for f in fields(h)}
    usual = {f.name: default_of(f) for h in holders for f in fields(h)} | DEFAULTS
    values = {n: v for n, v in values.items() if v != usual[n] and n not in NOT_PASSED}
    for name, value in (values | flags.overrides).items():
        if isinstance(value, list):
            tokens += [f"--{name}", *map(str, value)] if value else []
        elif value is not None:
            tokens.append(f"--{name}={json.dumps(value) if isinstance(value, bool) else value}")
    return tokens


# -- what is shown ------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _write(
    folder: RunFolder,
    flags: Flags,
    start: Mapping[str, Any],
    results: Mapping[Point, Mapping[str, Any]],
    failed: Mapping[Point, str],
) -> None:
    """frontier.json and frontier.png of what is there so far."""
    from ..training.run_folder import versions
    from .chart import write_chart

    points = list(results.values())
    facts = {
        "program": "onepass dpo frontier",
        "schema": 1,
        "start": start,
        "points": points,
        "failed": [{"loss": p.loss, "beta": p.beta, "why": why} for p, why in failed.items()],
        "flags": flags.as_dict(),
        "versions": versions(),
    }
    folder.write_json(JSON, facts)
    sign = "" if flags[RewardFlags].reward_sign == 1 else "-"
    write_chart(folder.path / PNG, start, points, f"{sign}{flags[RewardFlags].reward}")


def _show(
    start: Mapping[str, Any],
    results: Mapping[Point, Mapping[str, Any]],
    failed: Mapping[Point, str],
) -> None:
    from ..cli.table import render

    def cells(facts: Mapping[str, Any]) -> list[str | None]:
        return [shown(dict(facts), names) for names in COLUMNS.values()]

    rows: list[list[Any]] = [["the model as it is", None, *cells(start)]]
    rows += [[p.loss, f"{p.beta:g}", *cells(facts)] for p, facts in results.items()]
    rows += [[f"{p.loss} (failed)", f"{p.beta:g}", *cells({})] for p in failed]
    render("Reward against token entropy", ["loss", "beta", *COLUMNS], rows)
