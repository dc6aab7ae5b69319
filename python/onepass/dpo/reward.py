"""Rewards of texts: words counted, signs of code counted, a classifier's logit, anyone's function.

What can be refused is so without any library; `load` imports what a reward needs.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..cli.errors import Failed, UsageError, nearest, one_line
from ..training.flags import flag

Score = Callable[[Sequence[str]], Sequence[float]]
KINDS = ("keyword:WORD,WORD", "keyword:@FILE", "code", "classifier:MODEL", "MODULE:FUNCTION")
CODE_SIGNS = frozenset("_=()[]{}<>+*/\\|&^%$#@~\n\t")
BATCH_SIZE = 32


@dataclass
class RewardFlags:
    """The reward."""

    reward: str | None = flag(None, "keyword:A,B code classifier:DIR MODULE:FUNC")
    reward_sign: int = flag(1, "1, or -1 to want less of it", choices=[1, -1])
    reward_label: int = flag(0, "of a classifier: the logit that counts")
    score_prompt: bool = flag(False, "prompt and answer, not the answer")


class Reward(NamedTuple):
    """A reward as it was asked for: `kind` is keyword, code, classifier or function."""

    kind: str
    what: Any  # the words, the model, or (module, function)
    label: int = 0
    sign: int = 1

    def load(self, device: Any = "cpu") -> Score:
        """The function of texts.

        Raises:
            Failed: what it needs cannot be loaded.
        """
        if self.kind == "keyword":
            return keyword_counts(self.what)
        if self.kind == "code":
            return code_shares
        if self.kind == "classifier":
            return classifier(self.what, self.label, device)
        return function(*self.what)

    def contents(self) -> list[str]:
        """What tells it apart from another one of the same name: words, a module's source, the
        sizes of a classifier's files."""
        if self.kind == "keyword":
            return list(self.what)
        if self.kind == "function":
            spec = importlib.util.find_spec(self.what[0])
            source = Path(spec.origin) if spec is not None and spec.origin else None
            return [source.read_text(errors="replace")] if source and source.is_file() else []
        if self.kind == "classifier" and Path(self.what).is_dir():
            files = sorted(f for f in Path(self.what).iterdir() if f.is_file())
            return [f"{file.name}: {file.stat().st_size}" for file in files]
        return []

    def scores(self, score: Score, texts: Sequence[str]) -> list[float]:
        """`sign` times the scores.

        Raises:
            Failed: not a finite number for each text.
        """
        if not texts:
            return []
        try:
            found = [float(value) for value in score(texts)]
        except (TypeError, ValueError) as error:
            raise Failed(f"--reward: wanted a number for each text: {one_line(error)}") from error
        if len(found) != len(texts):
            raise Failed(f"--reward: got {len(found)} numbers for {len(texts)} texts")
        for value, text in zip(found, texts, strict=True):
            if not math.isfinite(value):
                raise Failed(f"--reward: got {value} for {one_line(repr(text), 80)}")
        return [self.sign * value for value in found]


def parse_reward(flags: RewardFlags) -> Reward:
    """The reward that the flags ask for.

    Raises:
        UsageError: none, or one that cannot be.
    """
    asked = flags.reward
    if not asked:
        raise UsageError("--reward: got nothing, wanted one of these", allowed=KINDS)
    kind, colon, what = asked.partition(":")
    if asked == "code":
        return Reward("code", None, sign=flags.reward_sign)
    if not colon or not kind or not what:
        meant = nearest(kind, ("keyword:", "code", "classifier:"))
        raise UsageError(f"--reward: got {asked!r}", allowed=KINDS, meant=meant)
    if kind == "keyword":
        return Reward("keyword", _words(what), sign=flags.reward_sign)
    if kind == "classifier":
        from ..training.models import check_folder

        check_folder(what, "--reward")
        if flags.reward_label < 0:
            raise UsageError(f"--reward_label: got {flags.reward_label}, wanted 0 or more")
        return Reward("classifier", what, flags.reward_label, flags.reward_sign)
    return Reward("function", _function(asked, kind, what), sign=flags.reward_sign)


def _words(what: str) -> tuple[str, ...]:
    if what.startswith("@"):
        try:
            found = Path(what[1:]).read_text(encoding="utf-8").split()
        except OSError as error:
            raise UsageError(f"--reward: cannot read {what[1:]!r}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UsageError(f"--reward: {what[1:]!r} is not UTF-8 text") from error
    else:
        found = [word.strip() for word in what.split(",")]
    words = tuple(dict.fromkeys(word.lower() for word in found if word))
    if not words:
        raise UsageError(f"--reward: no word in {what!r}")
    return words


def _function(asked: str, module: str, name: str) -> tuple[str, str]:
    hint = "a module of yours is found from the folder you are in"
    if not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise UsageError(f"--reward: got {asked!r}", allowed=KINDS, hint=hint)
    _find_own_modules()
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        found = None
    if found is None:
        meant = nearest(f"{module}:", ("keyword:", "classifier:"))
        if meant == f"{module}:":
            raise UsageError(f"--reward: {meant} wants what to score by behind it", hint=hint)
        raise UsageError(f"--reward: no module {module!r}", meant=meant, hint=hint)
    return module, name


def _find_own_modules() -> None:
    """The command `onepass`, unlike python -m, does not look into the folder it is run in."""
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())


# -- the rewards ------------------------------------------------------------------------------


def keyword_counts(words: Sequence[str]) -> Score:
    """How often any of the words stands in a text, whole and in whatever case."""
    pattern = re.compile(
        rf"(?<!\w)(?:{'|'.join(re.escape(word) for word in words)})(?!\w)", re.IGNORECASE
    )
    return lambda texts: [float(len(pattern.findall(text))) for text in texts]


def code_shares(texts: Sequence[str]) -> list[float]:
    """How much a text looks like source code, in [0, 1]: the share of its characters that are
    signs of operators, brackets, underscores and line ends, or blanks that indent a line."""
    shares = []
    for text in texts:
        signs = sum(character in CODE_SIGNS for character in text)
        indents = sum(len(blanks) for blanks in re.findall(r"(?<=\n) +", text))
        shares.append((signs + indents) / max(1, len(text)))
    return shares


def classifier(name: str, label: int, device: Any, batch_size: int = BATCH_SIZE) -> Score:
    """Logit `label` of a sequence classifier of transformers; long texts are cut to what it takes.

    The notebook's -logits[0][0] is label 0 with a sign of -1.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, found = AutoModelForSequenceClassification.from_pretrained(
            name, output_loading_info=True
        )
    except Exception as error:  # each kind of tokenizer file has errors of its own
        why = one_line(error) or type(error).__name__
        raise Failed(f"--reward: cannot load {name!r} as a classifier: {why}") from error
    if missing := sorted(found["missing_keys"]):
        raise Failed(f"--reward: {name!r} has no weights for {missing[0]}: not a classifier")
    if label >= model.config.num_labels:
        raise Failed(
            f"--reward_label: got {label}, but {name!r} has {model.config.num_labels} labels"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    if tokenizer.pad_token is None:
        batch_size = 1
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = min(n for n in (tokenizer.model_max_length, positions) if isinstance(n, int))
    model = model.eval().to(device)

    @torch.no_grad()
    def score(texts: Sequence[str]) -> list[float]:
        scores: list[float] = []
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(
                list(texts[start : start + batch_size]),
                return_tensors="pt",
                truncation=True,
                max_length=longest,
                padding=batch_size > 1,
            ).to(device)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            scores += model(**given).logits[:, label].float().tolist()
        return scores

    return score


def function(module: str, name: str) -> Score:
    """`module:name`, called with a list of texts."""
    _find_own_modules()
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module is anyone's
        why = f"{type(error).__name__}: {one_line(error)}"
        raise Failed(f"--reward: cannot load {module}:{name}: {why}") from error
    if not callable(found):
        raise Failed(f"--reward: {module}:{name} is no function")

    def score(texts: Sequence[str]) -> Sequence[float]:
        try:
            scores: Sequence[float] = found(list(texts))
        except Exception as error:
            why = f"{type(error).__name__}: {one_line(error)}"
            raise Failed(f"--reward: {module}:{name} fails: {why}") from error
        return scores

    return score
