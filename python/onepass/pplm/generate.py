"""Steered text: Uber's generate_text_pplm, full_text_generation and run_pplm_example by their names
and defaults, batched, seeded and with ends, and a generator that gives tokens as they come.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..cli.errors import nearest
from ..training.generation import padding_of
from .bags import bag_weights, get_bag_of_words_indices
from .cache import pack
from .heads import get_classifier, read_meta
from .names import KNOWN, read_words, split_names
from .perturb import PPLM_DISCRIM, Goal, Steps, check_count, goal_of
from .walk import Choice, Next, Walk

logger = logging.getLogger("onepass")
Context = Sequence[int] | Sequence[Sequence[int]] | Tensor
Names = str | Sequence[str]
Stops = str | Sequence[str]


class Step(NamedTuple):
    """A new token of each row; rows that ended before get padding and no text."""

    ids: Tensor  # [B]
    texts: list[str]  # what each row's text grew by
    losses: Tensor  # [iterations, B], before each step on the past; [0, B] where none was taken;
    # NaN in rows that ended before
    ended: list[bool]  # by an EOS token or a stop string, now or before


def generate_text_pplm(
    model: Any,
    tokenizer: Any,
    context: Context | None = None,
    past: Any = None,
    device: Any = None,
    perturb: bool = True,
    bow_indices: Sequence[Any] | None = None,
    classifier: Any = None,
    class_label: int | None = None,
    loss_type: int = 0,
    length: int = 100,
    stepsize: float = 0.02,
    temperature: float = 1.0,
    top_k: int = 10,
    sample: bool = False,
    num_iterations: int = 3,
    grad_length: int = 10000,
    horizon_length: int = 1,
    window_length: int = 0,
    decay: bool = False,
    gamma: float = 1.5,
    gm_scale: float = 0.9,
    kl_scale: float = 0.01,
    verbosity_level: int = 1,
    *,
    window_side: str = "first",
    attention_mask: Tensor | None = None,
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: Stops | None = None,
) -> tuple[Tensor, Any, list[list[Tensor]]]:
    """(ids [B, S + new], the class's loss, losses of each token), as Uber's.

    Args:
        context: ids of one text, or of several, which are padded on the left; None begins with the
            tokenizer's BOS token. Each row is steered as if it were alone.
        past: of all tokens of the context but the last, perturbed before; see `perturb_past`.
        perturb: False writes with the model alone; a classifier then measures.
        bow_indices: of each bag its words' ids (`get_bag_of_words_indices`), or a `Bag`.
        classifier, class_label, loss_type: see `perturb_past`.
        length: new tokens; fewer where all rows end before.
        stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale,
        window_side: see `perturb.Steps`. temperature, top_k, sample, gm_scale: see `walk.Choice`.
        grad_length: tokens after which the past is perturbed no more.
        device, verbosity_level: Uber's; all is where the model is, nothing is printed.
        attention_mask: [B, S], 0 where the context is padded on the left.
        generator: of the draws, on the model's device.
        eos_token_id, stop_strings: where a row ends, and is padded from there; Uber's code has no
            ends.

    Returns:
        the class's loss is that of the unperturbed model's mean hidden state over a row's text
        until it ended, a mean over rows; 0 without a classifier. Losses: of each token that was
        steered one [B] an iteration, NaN in rows that ended before.

    Raises:
        ValueError: neither bag nor classifier, no context and no BOS token, what does not fit.
    """
    goal = None
    if perturb:
        goal = goal_of(loss_type, bow_indices, classifier, class_label)
    elif classifier is not None:  # to measure
        goal = goal_of(PPLM_DISCRIM, None, classifier, class_label)
    how = Steps(
        stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale, window_side
    )
    choice = Choice(temperature, gm_scale, top_k, sample)
    ids, mask = padded(tokenizer, context, attention_mask)
    before = None if past is None else pack(past)
    ends = Ends(tokenizer, len(ids), eos_token_id, stop_strings)
    walk = Walk(
        model, ids, goal, how, length, mask=mask, grad_length=grad_length, past=before,
        steers=perturb,
    )  # fmt: skip
    losses = [found.losses for found in grow(walk, choice, ends, generator)]
    class_loss = 0 if walk.class_losses is None else walk.class_losses.mean()
    return walk.ids, class_loss, [found for found in losses if found]


def full_text_generation(
    model: Any,
    tokenizer: Any,
    context: Context | None = None,
    num_samples: int = 1,
    device: Any = None,
    bag_of_words: Names | None = None,
    discrim: Any = None,
    class_label: str | int | None = None,
    length: int = 100,
    stepsize: float = 0.02,
    temperature: float = 1.0,
    top_k: int = 10,
    sample: bool = False,
    num_iterations: int = 3,
    grad_length: int = 10000,
    horizon_length: int = 1,
    window_length: int = 0,
    decay: bool = False,
    gamma: float = 1.5,
    gm_scale: float = 0.9,
    kl_scale: float = 0.01,
    verbosity_level: int = 1,
    *,
    discrim_weights: Any = None,
    discrim_meta: Any = None,
    window_side: str = "first",
    generator: torch.Generator | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: Stops | None = None,
    **kwargs: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[list[list[Tensor]]]]:
    """(unperturbed ids [1, S'], perturbed ones of each sample, class losses, losses), as Uber's.

    Args:
        context: ids of one text; None begins with the BOS token.
        num_samples: perturbed texts; they are one batch, each steered as if it were alone.
        bag_of_words: names of bags or files, "a;b" or a list.
        discrim, class_label, discrim_weights, discrim_meta: see `get_classifier`.
        kwargs: taken and not used, as upstream; a warning names them.
        The others are those of `generate_text_pplm`; the unperturbed text has top_k 10 and
        temperature 1 whatever they are, as upstream.

    Returns: losses are of each sample, of each token that was steered, of each iteration a number.

    Raises:
        ValueError: neither bag nor discriminator. FileNotFoundError: one that is not there.
    """
    check_count("num_samples", num_samples, 1)
    if kwargs:
        logger.warning("full_text_generation does not know %s: not used", ", ".join(kwargs))
    if num_samples > 1 and not sample:
        logger.warning("without sample=True all %d steered texts are the same", num_samples)
    how = Steps(
        stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale, window_side
    )
    choice = Choice(temperature, gm_scale, top_k, sample)
    ids, _ = padded(tokenizer, context)
    if len(ids) > 1:
        raise ValueError(f"context must be one text, which num_samples repeats: got {len(ids)}")
    of_head = (discrim, class_label, discrim_weights, discrim_meta)
    goal = goal_by_name(model.device, tokenizer, bag_of_words, *of_head)
    plain = Ends(tokenizer, 1, eos_token_id, stop_strings)
    unsteered = Walk(model, ids, None, how, length)
    for _ in grow(unsteered, Choice(sample=sample), plain, generator):
        pass
    ends = Ends(tokenizer, num_samples, eos_token_id, stop_strings)
    walk = Walk(model, ids.expand(num_samples, -1), goal, how, length, grad_length=grad_length)
    losses = [found.losses for found in grow(walk, choice, ends, generator)]
    rows = range(num_samples)
    texts = [walk.ids[row : row + 1, : ids.shape[1] + len(ends.new[row])] for row in rows]
    by_row = [
        [[loss[row] for loss in found] for found in losses[: len(ends.new[row])] if found]
        for row in rows
    ]
    class_losses = [] if walk.class_losses is None else list(walk.class_losses)
    return unsteered.ids, texts, class_losses, by_row


def run_pplm_example(
    pretrained_model: str = "gpt2-medium",
    cond_text: str = "",
    uncond: bool = False,
    num_samples: int = 1,
    bag_of_words: Names | None = None,
    discrim: Any = None,
    discrim_weights: Any = None,
    discrim_meta: Any = None,
    class_label: str | int | None = -1,
    length: int = 100,
    stepsize: float = 0.02,
    temperature: float = 1.0,
    top_k: int = 10,
    sample: bool = False,
    num_iterations: int = 3,
    grad_length: int = 10000,
    horizon_length: int = 1,
    window_length: int = 0,
    decay: bool = False,
    gamma: float = 1.5,
    gm_scale: float = 0.9,
    kl_scale: float = 0.01,
    seed: int = 0,
    no_cuda: bool = False,
    colorama: bool = False,
    verbosity: str = "regular",
) -> list[tuple[list[int], Tensor, Tensor]]:
    """Loads a model, prints its text and the steered ones, and returns of each sample the ids of
    (prompt, steered text, unsteered text).

    Args:
        pretrained_model: a name or folder; the one that the discriminator was trained on instead,
            where its metadata name another, as upstream.
        cond_text: what is written on, after the BOS token; with `uncond` that token alone.
        seed: of the draws.
        no_cuda: stay on the CPU.
        colorama, verbosity: Uber's; `onepass generate pplm` colours.
        The others are those of `full_text_generation`.

    Raises:
        ValueError: no cond_text without `uncond`, neither bag nor discriminator.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_count("num_samples", num_samples, 1)
    check_count("length", length, 0)
    check_count("grad_length", grad_length, 0)
    Steps(stepsize, num_iterations, horizon_length, window_length, decay, gamma, kl_scale)
    Choice(temperature, gm_scale, top_k, sample)
    if not cond_text and not uncond:
        raise ValueError("cond_text is empty: wanted text, or uncond=True")
    if not bag_of_words and discrim is None:
        raise ValueError("neither a bag of words nor a discriminator: wanted one of them, or both")
    for name in split_names(bag_of_words) if bag_of_words else ():
        read_words(name)
    get_classifier(discrim, class_label, weights=discrim_weights, meta=discrim_meta)
    known = KNOWN.get(discrim, {}) if isinstance(discrim, str) else {}
    own = read_meta(discrim_meta).get("pretrained_model") or known.get("pretrained_model")
    if own and own != pretrained_model:
        logger.warning("the discriminator is of %s: that is loaded, not %s", own, pretrained_model)
        pretrained_model = own
    model = AutoModelForCausalLM.from_pretrained(pretrained_model)
    model.to("cpu" if no_cuda or not torch.cuda.is_available() else "cuda")
    tokenizer = AutoTokenizer.from_pretrained(pretrained_model)
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompt = start if uncond else start + tokenizer.encode(cond_text, add_special_tokens=False)
    unsteered, steered, _, _ = full_text_generation(
        model,
        tokenizer,
        prompt or None,
        num_samples,
        bag_of_words=bag_of_words,
        discrim=discrim,
        class_label=class_label,
        length=length,
        stepsize=stepsize,
        temperature=temperature,
        top_k=top_k,
        sample=sample,
        num_iterations=num_iterations,
        grad_length=grad_length,
        horizon_length=horizon_length,
        window_length=window_length,
        decay=decay,
        gamma=gamma,
        gm_scale=gm_scale,
        kl_scale=kl_scale,
        discrim_weights=discrim_weights,
        discrim_meta=discrim_meta,
        generator=torch.Generator(model.device).manual_seed(seed),
    )
    print(f"= Prefix of sentence =\n{tokenizer.decode(prompt)}\n")
    print(f"= Unperturbed generated text =\n{tokenizer.decode(unsteered[0])}\n")
    for n, text in enumerate(steered, 1):
        print(f"= Perturbed generated text {n} =\n{tokenizer.decode(text[0])}\n")
    return [(prompt, text, unsteered) for text in steered]


def stream_pplm(
    model: Any,
    tokenizer: Any,
    prompts: str | Sequence[str],
    *,
    bag_of_words: Names | None = None,
    discrim: Any = None,
    class_label: str | int | None = None,
    discrim_weights: Any = None,
    discrim_meta: Any = None,
    length: int = 100,
    num_samples: int = 1,
    seed: int | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    stop_strings: Stops | None = None,
    **options: Any,
) -> Iterator[Step]:
    """A `Step` for each new token, as it comes: `for step in stream_pplm(...): print(step.texts)`.

    Args:
        prompts: one or several; the tokenizer's special tokens are put around them as it does.
        bag_of_words, discrim, class_label, discrim_weights, discrim_meta: see
            `full_text_generation`; with neither bag nor discriminator nothing is steered.
        num_samples: rows of each prompt, beside each other.
        seed: of the draws; None takes torch's own random state.
        eos_token_id: where a row ends; None is the model's, an empty list none.
        options: the fields of `perturb.Steps` (stepsize is 0.02 here) and `walk.Choice`, and
            `grad_length`.

    Raises:
        TypeError, ValueError: at once, before anything runs. The model can be used between steps.
    """
    check_count("num_samples", num_samples, 1)
    how, choice, grad_length = chosen(options)
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not texts:
        raise ValueError("prompts: got none, wanted a text")
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [tokenizer.encode(text) or start for text in texts for _ in range(num_samples)]
    ids, mask = padded(tokenizer, rows)
    goal = None
    if bag_of_words or discrim is not None:
        of_head = (discrim, class_label, discrim_weights, discrim_meta)
        goal = goal_by_name(model.device, tokenizer, bag_of_words, *of_head)
    if eos_token_id is None:
        eos_token_id = model.generation_config.eos_token_id
    ends = Ends(tokenizer, len(ids), eos_token_id, stop_strings)
    walk = Walk(model, ids, goal, how, length, mask=mask, grad_length=grad_length)
    generator = None if seed is None else torch.Generator(model.device).manual_seed(seed)

    def stepping() -> Iterator[Step]:
        told = [""] * len(ids)
        for found in grow(walk, choice, ends, generator):
            texts = []
            for row, new in enumerate(ends.new):
                text = written(tokenizer, rows[row][-1], new)
                texts.append(text[len(told[row]) :])
                told[row] = text
            losses = torch.stack(found.losses) if found.losses else torch.empty(0, len(ids))
            yield Step(walk.ids[:, -1], texts, losses, list(ends.ended))

    return stepping()


# -- their parts ----------------------------------------------------------------------------------


class Ends:
    """Where the rows of a batch end, and what they wrote until then.

    Args:
        eos_token_id: ids that end a row; they are its last token.
        stop_strings: texts that end a row, with the token that completes one.
    """

    def __init__(
        self,
        tokenizer: Any,
        n_rows: int,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: Stops | None = None,
    ) -> None:
        found = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.eos = frozenset(found or ())
        self.strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or ())
        if "" in self.strings:
            raise ValueError("stop_strings has an empty text, which stands everywhere")
        self.tokenizer, self.padding = tokenizer, padding_of(tokenizer)
        self.new: list[list[int]] = [[] for _ in range(n_rows)]
        self.ended = [False] * n_rows

    def take(self, tokens: Tensor) -> Tensor:
        """The tokens [B], padding in rows that have ended before."""
        was = tokens.new_tensor(self.ended, dtype=torch.bool)
        for row, token in enumerate(tokens.tolist()):
            if not self.ended[row]:
                self.new[row].append(token)
                self.ended[row] = token in self.eos or self._stops(self.new[row])
        return tokens.masked_fill(was, self.padding)

    def _stops(self, new: list[int]) -> bool:
        text = self.tokenizer.decode(new) if self.strings else ""
        return any(string in text for string in self.strings)


def grow(
    walk: Walk, choice: Choice, ends: Ends, generator: torch.Generator | None
) -> Iterator[Next]:
    """Tokens until the walk's length is there or all rows have ended."""
    for _ in range(walk.length):
        if all(ends.ended):
            return
        found = walk.next()
        tokens = ends.take(choice.token(found, generator))
        walk.append(tokens, ends.ended)
        yield found


def padded(
    tokenizer: Any, context: Context | None, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """ids [B, S] and, where rows are padded on the left, their mask [B, S].

    Raises:
        ValueError: no token: of a row, or none at all and no BOS token to begin with.
    """
    if context is None:
        if tokenizer.bos_token_id is None:
            raise ValueError("no context, and the tokenizer has no BOS token: wanted a token")
        context = [tokenizer.bos_token_id]
    if isinstance(context, Tensor):
        ids = context[None] if context.dim() == 1 else context
        if ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
            got = f"{tuple(ids.shape)} {ids.dtype}"
            raise ValueError(f"context must be ids [S] or [B, S]: got {got}")
        return ids, attention_mask
    rows: Any = context if len(context) and hasattr(context[0], "__len__") else [context]
    width = max(map(len, rows))
    if not all(map(len, rows)):
        raise ValueError("context has a text without a token: wanted at least one")
    if attention_mask is not None and any(len(row) != width for row in rows):
        raise ValueError("attention_mask is of rows of one length: got rows of several")
    left = [width - len(row) for row in rows]
    filled = [[padding_of(tokenizer)] * n + list(row) for n, row in zip(left, rows, strict=True)]
    if attention_mask is None and any(left):
        attention_mask = torch.tensor([[0] * n + [1] * (width - n) for n in left])
    return torch.tensor(filled), attention_mask


def goal_by_name(
    device: Any,
    tokenizer: Any,
    bag_of_words: Names | None,
    discrim: Any,
    class_label: str | int | None,
    discrim_weights: Any = None,
    discrim_meta: Any = None,
) -> Goal:
    """Bags and head by their names.

    Raises:
        ValueError: neither, or what does not fit. FileNotFoundError: one that is not there.
    """
    bags = get_bag_of_words_indices(bag_of_words, tokenizer) if bag_of_words else []
    of_files: Any = {"weights": discrim_weights, "meta": discrim_meta}
    classifier, label = get_classifier(discrim, class_label, device, **of_files)
    return goal_of(0, [bag_weights(bag) for bag in bags], classifier, label)


def chosen(options: Mapping[str, Any]) -> tuple[Steps, Choice, int]:
    """(how to step, how to choose, grad_length) by Uber's names and, for text, his defaults.

    Raises:
        TypeError: an option that is none.
    """
    kinds = {field.name: kind for kind in (Steps, Choice) for field in fields(kind)}
    del kinds["per_row"]
    for name in options:
        if name not in kinds and name != "grad_length":
            meant = nearest(name, [*kinds, "grad_length"])
            mend = f"; did you mean {meant}?" if meant else ""
            raise TypeError(f"no option {name!r}: wanted {', '.join(kinds)}, grad_length{mend}")
    given: Any = {"stepsize": 0.02} | dict(options)
    grad_length = given.pop("grad_length", 10000)
    check_count("grad_length", grad_length, 0)
    how = Steps(**{k: v for k, v in given.items() if kinds[k] is Steps})
    return how, Choice(**{k: v for k, v in given.items() if kinds[k] is Choice}), grad_length


def written(tokenizer: Any, last: int, new: list[int]) -> str:
    """What new tokens add to a text that ends with the token `last`: some tokenizers drop the blank
    before the first. A character that is not complete is left out."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode([last], **how)
    whole = tokenizer.decode([last, *new], **how)
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new, **how)
    return str(text).rstrip("\ufffd")
