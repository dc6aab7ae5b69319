"""Gradients of next-token scores with respect to the embeddings that the model reads.

A target is a row of a batch: a copy of the embeddings up to it, whose last position alone goes
through the (lazy) head. What stands to its right a causal model does not see, so that rows of one
batch are as long as the longest needs and nothing is padded.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..cli.terminal import progress_bar
from ..heads import find_head
from ..lazy_logits import LazyLogits
from ..ops._check import check_choice
from ..step_functions import list_step_functions, scores
from ..step_functions.dropout import check_dropout, noisy_runs
from ..step_functions.on_rows import is_own, row_function, score_of_rows
from ..training.hidden_states import check_language_model, lazy_within, training_mode
from ..training.token_texts import token_texts
from . import texts
from .names import BASELINES, CONTRASTIVE, METHODS, REDUCTIONS, check_options
from .result import Attribution, positions_read

logger = logging.getLogger("onepass")

POSITIONS_ON_CPU = 4096  # of a batch; more at once are not faster there
ACTIVATIONS = 40  # numbers a layer keeps for its backward, over the hidden size, at a position
DOING = "attributing"
ROWS = 64  # of logits in fp32, at once
MAX_TOLD = 5  # targets of a line
LARGE_DELTA = 0.05  # of what the attributions should sum to

Target = str | Callable[[Tensor, Tensor], Tensor]
Score = Callable[[Tensor, Tensor], Tensor]  # logits [B, V] and places among the targets [B] to [B]


def attribute(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    generated: str | None = None,
    max_new_tokens: int | None = None,
    start: int | None = None,
    end: int | None = None,
    method: str = "saliency",
    target: Target = "probability",
    step_scores: Sequence[str] = (),
    options: Mapping[str, Any] | None = None,
    contrast_text: str | None = None,
    contrast_generated: str | None = None,
    reduction: str | None = None,
    n_steps: int = 50,
    baseline: str | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Attribution:
    """How much each token that the model read had to do with the score of each token it went on to.

    With e [S, D] the embeddings of what is read, f the target's score of a next token, x0 the
    baseline:

        saliency              df/de
        input_x_gradient      e * df/de
        integrated_gradients  (e - x0) * integral_0^1 df/de(x0 + a (e - x0)) da

    Args:
        model: a causal language model of transformers, or one with an encoder; also with an adapter
            of PEFT. Its modes, weights and their requires_grad are left as found.
        text: what is read. Of a causal model alone each of its tokens but the first is a target.
        generated: what the model wrote after it (or, with an encoder, beside it): the targets. The
            text may stand before it once more.
        max_new_tokens: let the model write so many, the likeliest one after the other.
        start, end: the targets' places in the sequence, the first token's being 0; `start` is the
            length of the prompt.
        target: a step function's name, or a function of logits [B, V] and target_ids [B] to [B].
            The logits are `onepass.LazyLogits` where the head can be lazy: this package's losses
            and statistics take them as they are, what torch has no statistic for makes them, and
            `materialize()` gives them plain.
        step_scores: step functions that are told of each target beside it.
        options: of the step functions (base, logprob, top_k, top_p, n_mcd_steps, ...), as
            `onepass.step_functions.scores` has them: perplexity is 1 / p. Functions that were
            registered are called with a forward_output and target_ids alone.
        contrast_text, contrast_generated: what contrastive functions compare with, token by token:
            another text before the same targets, or other targets, or both.
        reduction: over D, "l2" or "sum". A saliency's sum is of magnitudes, the others' signed.
            None: "l2" of a saliency, else "sum".
        n_steps: nodes of the integral (Gauss-Legendre).
        baseline: "zeros", or "pad": the embedding of the padding token or, as in inseq, of the
            token of the end where there is none. None: "pad", "zeros" where there is neither.
        batch_size: rows, each a target and a node, at once; None: by the memory there is. It is
            halved once where memory runs out.
        progress: draw a bar on a terminal.

    Raises:
        ValueError: an empty or too long text, an unknown name, an option out of its range or that
            no score reads, a score without a gradient, a model that does more with tokens than to
            embed them, has no language-model head or sees what comes after a token. TypeError: a
            model or tokenizer that is none, a text that is no string, an option of another type.

    Sources: Simonyan et al. 1312.6034, Shrikumar et al. 1605.01713, Sundararajan et al. 1703.01365.
    """
    check_language_model(model)
    if not callable(tokenizer):
        kind = type(tokenizer).__name__
        raise TypeError(f"tokenizer must be one of transformers, loaded: got {kind}")
    if isinstance(step_scores, str):
        raise TypeError(f"step_scores must be a list of names: got {step_scores!r}")
    step_scores = list(step_scores)
    reduction = _check(method, target, step_scores, reduction, baseline)
    for name, value in (
        *(("n_steps", n_steps), ("batch_size", batch_size), ("max_new_tokens", max_new_tokens)),
        *(("start", start), ("end", end)),
    ):
        if value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"{name} must be a whole number from 1 on: got {value!r}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if baseline == "pad" and pad is None:
        raise ValueError(
            "baseline='pad': the tokenizer has no padding token: set its pad_token, or take zeros"
        )
    baseline = baseline or ("zeros" if pad is None else "pad")
    how, names = dict(options or {}), [target, *step_scores]
    check_options(how, names)
    if (contrast_text, contrast_generated) != (None, None) and not set(CONTRASTIVE) & set(names):
        raise ValueError(
            f"contrast_text and contrast_generated are read by {', '.join(CONTRASTIVE)}, of which"
            " none is asked for"
        )
    with (
        torch.inference_mode(False),
        training_mode(model, False),
        frozen(model),
        lazy_within(model, DOING),
    ):
        read = texts.encode(model, tokenizer, text, generated, max_new_tokens)
        low = read.first if start is None else start
        high = len(read.decoder) if end is None else end
        if not 1 <= low < high <= len(read.decoder):
            n = len(read.decoder)
            raise ValueError(f"start and end must be 1 <= start < end <= {n}: got {low} and {high}")
        scales, other = scales_of(model, read), None
        if contrast_text is not None or contrast_generated is not None:
            follows = generated is not None or max_new_tokens is not None
            other = _contrast(
                model,
                tokenizer,
                text,
                read,
                scales,
                follows,
                contrast_text,
                contrast_generated,
                low,
                high,
            )
        _check_contrast(names, other)
        embeds = embeddings_of(model, read, scales)[: len(read.encoder) + high - 1]
        inputs = Inputs(model, embeds, len(read.encoder), torch.arange(low, high))
        ids = torch.tensor(read.decoder[low:high], device=embeds.device)
        n_runs, seed = how.pop("n_mcd_steps", 5), how.pop("seed", None)
        scored = Scores(model, ids, other, how)
        if "mc_dropout_prob_avg" in names:
            scored.draw(inputs, n_runs, seed)
        everything = torch.arange(len(ids), device=embeds.device)
        with torch.no_grad():
            found = scored.named(list(dict.fromkeys(names)), inputs.rows(embeds), everything)
        x0 = None
        if method == "integrated_gradients":
            x0 = torch.zeros_like(embeds)
            if baseline == "pad":
                padding, n = [pad] * len(embeds), len(read.encoder)
                x0 = embeddings_of(model, texts.Tokens(padding[:n], padding[n:], 0), scales)
        matrix, deltas, size = _attributed(
            inputs, scored.of(target), method, reduction, x0, n_steps, batch_size, found[target],
            progress,
        )  # fmt: skip
    result = Attribution(
        text=text,
        tokens=token_texts(tokenizer, [*read.encoder, *read.decoder[: high - 1]]),
        token_ids=[*read.encoder, *read.decoder[: high - 1]],
        targets=token_texts(tokenizer, read.decoder[low:high]),
        target_ids=read.decoder[low:high],
        n_encoder=len(read.encoder),
        matrix=matrix.cpu(),
        scores={_name(name): value.to(matrix.dtype).cpu() for name, value in found.items()},
        deltas=None if deltas is None else deltas.cpu(),
        method=method,
        target=_name(target),
        reduction=reduction,
        n_steps=n_steps if deltas is not None else None,
        baseline=baseline if deltas is not None else None,
        batch_size=size,
    )
    _tell_not_finite(result)
    return result


# -- what is checked ----------------------------------------------------------------------------


def _check(
    method: str,
    target: Target,
    step_scores: Sequence[str],
    reduction: str | None,
    baseline: str | None,
) -> str:
    """The reduction, after everything that can be refused without a model has been."""
    check_choice("method", method, METHODS)
    known = tuple(list_step_functions())
    if not callable(target):
        check_choice("target", target, known)
    for name in step_scores:
        check_choice("step_scores", name, known)
    if not isinstance(target, str) and _name(target) in step_scores:
        raise ValueError(
            f"target is a function of the name {_name(target)!r}, which step_scores have too:"
            " rename it"
        )
    if reduction is not None:
        check_choice("reduction", reduction, REDUCTIONS)
    if baseline is not None:
        check_choice("baseline", baseline, BASELINES)
    return reduction or ("l2" if method == "saliency" else "sum")


def _check_contrast(names: Sequence[Target], other: ContrastRows | None) -> None:
    for name in names:
        if name not in CONTRASTIVE:
            continue
        if other is None:
            raise ValueError(f"{name} compares: give contrast_text or contrast_generated")
        if name == "kl_divergence" and other.rows is None:
            raise ValueError("kl_divergence compares what follows two texts: give contrast_text")


# -- the model ----------------------------------------------------------------------------------


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter has a gradient inside; those that had, have again after."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def only_rows(model: nn.Module, row: Tensor, last: Tensor) -> Iterator[list[bool]]:
    """The head is given the hidden states [B, 1, D] at these places only; what it gives is that of
    all where nothing was seen."""
    seen: list[bool] = []

    def pick(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(True)
        return args[0][row, last][:, None], *args[1:]

    hook = find_head(model, None)[1].register_forward_pre_hook(pick)
    try:
        yield seen
    finally:
        hook.remove()


def embeddings_of(model: Any, read: texts.Tokens, scales: Sequence[float]) -> Tensor:
    """What the model reads, as embeddings [R, D]: those of the encoder's tokens, the decoder's."""
    parts = zip(_parts(model, read), scales, strict=True)
    with torch.no_grad():
        return torch.cat([_embed(part, ids, model.device) * scale for (part, ids), scale in parts])


def scales_of(model: Any, read: texts.Tokens) -> tuple[float, ...]:
    """What a model multiplies the rows of its tables by where it embeds tokens itself, and not
    where it is given embeddings, as Marian's encoder does and its decoder does not: of each part
    1 or its `embed_scale`, whichever gives the row of logits that tokens give.

    Raises:
        ValueError: neither does.
    """
    choices = itertools.product(*(_scales(part) for part, _ in _parts(model, read)))
    last = torch.tensor([len(read.decoder) - 1])
    errors: dict[tuple[float, ...], float] = {}
    with torch.no_grad():
        for scales in choices:
            embeds = embeddings_of(model, read, scales)[:-1]
            inputs = Inputs(model, embeds, len(read.encoder), last)
            if not errors:
                own = _whole(inputs.row_of_tokens(read)).float()
            errors[scales] = float((_whole(inputs.rows(embeds)).float() - own).abs().max())
    best = min(errors, key=lambda scales: errors[scales])
    rounding = max(1e-3, 16 * torch.finfo(embeds.dtype).eps)
    if errors[best] > rounding * float(own.abs().max()):
        raise ValueError(
            f"{type(model).__name__} goes on differently after its embeddings than after its"
            " tokens: it does more with tokens than to embed them, which gradients of embeddings"
            " miss"
        )
    return best


def _parts(model: Any, read: texts.Tokens) -> list[tuple[Any, Sequence[int]]]:
    """What embeds, and which tokens."""
    if not read.encoder:
        return [(model, read.decoder)]
    return [(model.get_encoder(), read.encoder), (model.get_decoder(), read.decoder)]


def _scales(part: Any) -> set[float]:
    table = part.get_input_embeddings()
    owners = (m for m in part.modules() if any(child is table for child in m.children()))
    return {1.0, getattr(next(owners, part), "embed_scale", 1.0)}


def _embed(part: Any, ids: Sequence[int], device: Any) -> Tensor:
    found: Tensor = part.get_input_embeddings()(torch.tensor([ids], device=device))[0]
    return found


def _whole(rows: Tensor) -> Tensor:
    return rows.materialize() if isinstance(rows, LazyLogits) else rows


@dataclass
class Inputs:
    """A model and what it reads: embeddings [R, D], the encoder's first; `places` [T] are those of
    the targets in the decoder's sequence."""

    model: Any
    embeds: Tensor
    n_encoder: int
    places: Tensor

    def lengths(self, targets: Tensor | None = None) -> Tensor:
        """How many of the R come before each target."""
        return self.n_encoder + (self.places if targets is None else self.places[targets])

    def rows(self, embeds: Tensor, targets: Tensor | None = None) -> Tensor:
        """The logits that each target is drawn from: of embeddings [R, D] all, [T, V], of [B, R, D]
        that of the `targets` [B], [B, V]."""
        x = embeds if targets is not None else embeds[None]
        last = (self.places if targets is None else self.places[targets]).to(x.device) - 1
        row = torch.zeros_like(last) if targets is None else torch.arange(len(x), device=x.device)
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device)
        if self.n_encoder:
            n = self.n_encoder
            given = {"inputs_embeds": x[:, :n], "attention_mask": mask[:, :n]}
            given["decoder_inputs_embeds"] = x[:, n:]
        else:
            given = {"inputs_embeds": x, "attention_mask": mask}
        return self._run(row, last, given)

    def row_of_tokens(self, read: texts.Tokens) -> Tensor:
        """The last target's logits [1, V], where the model embeds the tokens itself."""
        device, last = self.embeds.device, self.places[-1:] - 1
        tokens = torch.tensor([read.decoder[: int(self.places[-1])]], device=device)
        given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if self.n_encoder:
            encoder = torch.tensor([read.encoder], device=device)
            given = {"input_ids": encoder, "attention_mask": torch.ones_like(encoder)}
            given["decoder_input_ids"] = tokens
        last = last.to(device)
        return self._run(torch.zeros_like(last), last, given)

    def _run(self, row: Tensor, last: Tensor, given: dict[str, Tensor]) -> Tensor:
        with only_rows(self.model, row, last) as seen:
            try:
                logits: Tensor = self.model(**given, use_cache=False).logits
            except TypeError as error:
                kind = type(self.model).__name__
                raise ValueError(f"{kind} does not run on embeddings: {error}") from error
        return logits[:, 0] if seen else logits[row, last]

    def batch_size(self) -> int:
        """How many rows fit into half of the memory that is free."""
        n_positions, device = len(self.embeds), self.embeds.device
        if device.type != "cuda":
            return max(1, POSITIONS_ON_CPU // n_positions)
        config = self.model.config.get_text_config()
        numbers = ACTIVATIONS * config.hidden_size * config.num_hidden_layers * n_positions
        free, _ = torch.cuda.mem_get_info(device)
        return max(1, free // 2 // (numbers * self.embeds.element_size()))


# -- the score ----------------------------------------------------------------------------------


@dataclass
class ContrastRows:
    """What contrastive functions compare with: tokens [T], and logits [T, V] after another text."""

    ids: Tensor
    rows: Tensor | None


def _contrast(
    model: Any,
    tokenizer: Any,
    text: str,
    read: texts.Tokens,
    scales: Sequence[float],
    follows: bool,
    other_text: str | None,
    other_generated: str | None,
    low: int,
    high: int,
) -> ContrastRows:
    """That of the targets from `low` to `high`, which are the text's own or follow it."""
    before = text if other_text is None else other_text
    if other_generated is not None:
        other = texts.encode(model, tokenizer, before, other_generated, None, "contrast_text")
    elif follows:  # the same tokens after another text
        encoder, start = texts.prompt(model, tokenizer, before, "contrast_text")
        other = texts.Tokens(encoder, start + read.targets, len(start))
    else:
        other = texts.encode(model, tokenizer, before, None, None, "contrast_text")
    skipped, n = low - read.first, high - low
    if skipped < 0:
        raise ValueError(f"with a contrast start must be at least {read.first}: got {low}")
    if len(other.targets) < skipped + n:
        raise ValueError(
            f"the contrast has {len(other.targets)} tokens to compare with {skipped + n}, one by"
            f" one: end={read.first + len(other.targets)} leaves the others out"
        )
    targets = slice(skipped, skipped + n)
    ids = torch.tensor(other.targets[targets], device=model.device)
    if other_text is None:
        return ContrastRows(ids, None)
    places = torch.arange(len(other.decoder))[other.first :][targets]
    embeds = embeddings_of(model, other, scales)[:-1]
    with torch.no_grad():
        rows = Inputs(model, embeds, len(other.encoder), places).rows(embeds)
    return ContrastRows(ids, rows)


@dataclass
class Scores:
    """Step functions of the targets' rows."""

    model: Any
    ids: Tensor  # [T]
    contrast: ContrastRows | None
    options: dict[str, Any]
    noisy: Tensor | None = None  # [n, T] log p under dropout

    def draw(self, inputs: Inputs, n: int, seed: int | None) -> None:
        """Run the model under dropout, for mc_dropout_prob_avg; what comes of it is held fixed."""
        check_dropout(self.model, n, self.options.get("eps", 0.0))

        def run() -> Tensor:
            return -scores(inputs.rows(inputs.embeds), self.ids, ["crossentropy"])["crossentropy"]

        self.noisy = noisy_runs(self.model, run, n, seed, False)

    def named(self, names: Sequence[Target], rows: Tensor, at: Tensor) -> dict[Target, Tensor]:
        """Each [B], of logits [B, V] of the targets `at` [B]; all that are ours in one call."""
        ids, own = self.ids[at], [n for n in names if isinstance(n, str) and is_own(n)]
        found: dict[Target, Tensor] = {}
        if own:
            how = dict(self.options)
            if self.contrast is not None:
                how["contrast_ids"] = self.contrast.ids[at]
                if self.contrast.rows is not None:
                    how["contrast_logits"] = self.contrast.rows[at]
            if self.noisy is not None:
                how["noisy_logps"] = self.noisy[:, at]
            found.update(scores(rows, ids, own, **how))
        for name in names:
            if name not in found:
                function = row_function(self.model, name) if isinstance(name, str) else name
                found[name] = score_of_rows(function, _name(name), rows, ids)
        return {name: found[name] for name in names}

    def of(self, target: Target) -> Score:
        return lambda rows, at: self.named([target], rows, at)[target]


def _name(target: Target) -> str:
    return target if isinstance(target, str) else getattr(target, "__name__", "function")


# -- the methods --------------------------------------------------------------------------------


def gauss_legendre(n: int) -> tuple[Tensor, Tensor]:
    """Nodes in (0, 1) and weights, [n] each, fp64 (Golub and Welsch 1969)."""
    k = torch.arange(1, n, dtype=torch.float64)
    beside = k / (4 * k * k - 1).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(beside, 1) + torch.diag(beside, -1))
    return (nodes + 1) / 2, vectors[0].square()


def _attributed(
    inputs: Inputs,
    score: Score,
    method: str,
    reduction: str,
    baseline: Tensor | None,
    n_steps: int,
    batch_size: int | None,
    values: Tensor,
    progress: bool,
) -> tuple[Tensor, Tensor | None, int]:
    """(matrix [R, T], convergence deltas [T] of a baseline, the rows at once in the end)."""
    exact = torch.float64 if inputs.embeds.dtype == torch.float64 else torch.float32
    embeds = inputs.embeds.to(exact)
    moved = embeds if baseline is None else embeds - baseline.to(exact)
    nodes, weights = gauss_legendre(n_steps) if baseline is not None else (None, None)
    n_targets = len(inputs.places)
    matrix = embeds.new_zeros(len(embeds), n_targets)
    begun: Tensor | None = None  # the sum of a target whose nodes are not all done
    per_target = 1 if nodes is None else n_steps
    jobs = n_targets * per_target
    size = min(jobs, batch_size or inputs.batch_size())
    halved, done = False, 0
    sums: list[Tensor] = []
    with progress_bar(jobs, 0) if progress else contextlib.nullcontext() as bar:
        while done < jobs:
            job = torch.arange(done, min(done + size, jobs))
            targets, step = job // per_target, job % per_target
            alpha = None if nodes is None else nodes[step].to(embeds)
            try:
                grads = gradients(inputs, score, targets, embeds, moved, alpha)
            except RuntimeError as error:
                if not _is_out_of_memory(error) or len(job) == 1:
                    raise
                if halved:
                    raise RuntimeError(
                        f"out of memory with {len(job)} rows at once too: pass a smaller batch_size"
                    ) from error
                halved, size = True, len(job) // 2
                logger.warning(
                    "out of memory with %d rows at once: going on with %d", len(job), size
                )
                continue
            if weights is not None:
                grads = grads * weights[step].to(grads)[:, None, None]
            n = grads.shape[1]
            after = torch.arange(n) >= inputs.lengths(targets)[:, None]
            if ((grads.abs().amax(-1) > 0) & after.to(grads.device)).any():
                kind = type(inputs.model).__name__
                raise ValueError(f"{kind} sees what comes after a token: wanted a causal model")
            which, counts = targets.unique_consecutive(return_counts=True)
            if nodes is not None:  # in one order, whatever the device
                grads = torch.stack([part.sum(0) for part in grads.split(counts.tolist())])
            if begun is not None:
                grads[0, : len(begun)] += begun
            whole = len(which) - int(step[-1] < per_target - 1)
            begun = grads[-1] if whole < len(which) else None
            grads = grads[:whole] if method == "saliency" else grads[:whole] * moved[:n]
            sums.append(grads.sum((1, 2)))
            matrix[:n, which[:whole].to(matrix.device)] = _reduced(grads, method, reduction).T
            done += len(job)
            if bar is not None:
                bar.update(len(job))
    matrix.masked_fill_(~positions_read(*matrix.shape).to(matrix.device), float("nan"))
    if baseline is None:
        return matrix, None, size
    with torch.no_grad():
        everything = torch.arange(n_targets, device=embeds.device)
        at_baseline = score(inputs.rows(baseline.to(inputs.embeds.dtype)), everything)
    wanted = values.to(exact) - at_baseline.to(exact)
    deltas = torch.cat(sums) - wanted
    _tell_deltas(deltas, wanted, bool(baseline.any()))
    return matrix, deltas, size


def gradients(
    inputs: Inputs,
    score: Score,
    targets: Tensor,
    embeds: Tensor,
    moved: Tensor,
    alpha: Tensor | None,
) -> Tensor:
    """df/dx [B, n, D] of the rows' targets, of the dtype of `embeds`, where `alpha` [B] of the way
    from the baseline lie behind them; on the embeddings themselves where it is None."""
    n = int(inputs.lengths(targets).max())
    x = embeds[:n].expand(len(targets), -1, -1)
    if alpha is not None:
        x = x - (1 - alpha)[:, None, None] * moved[:n]
    x = x.to(inputs.embeds.dtype).contiguous().requires_grad_()
    at = targets.to(x.device)
    with torch.enable_grad():
        rows = inputs.rows(x, targets)
        value = score(rows, at)
        if not value.requires_grad:
            raise ValueError(
                "target has no gradient: it does not change smoothly with the logits that follow"
                " this text (contrast_prob and contrast_logits are of the other text alone)"
            )
        if rows.dtype != torch.float16:
            return torch.autograd.grad(value.sum(), x)[0].to(embeds.dtype)
        factors = _factors(rows.detach(), score, at)
        grads = torch.autograd.grad((value * factors).sum(), x)[0]
    return grads.to(embeds.dtype) / factors[:, None, None]


def _factors(rows: Tensor, score: Score, at: Tensor) -> Tensor:
    """Of each row the power of 2 [B] that brings the largest df/dlogits to 1: in float16 smaller
    ones are lost, those of p at p = 1e-8 altogether, and larger ones are inf."""
    exponents = []
    for some, which in zip(rows.split(ROWS), at.split(ROWS), strict=True):
        z = _whole(some).float().requires_grad_()
        (grads,) = torch.autograd.grad(score(z, which).sum(), z)
        exponents.append(grads.abs().amax(-1).log2().round())
    found = torch.cat(exponents).nan_to_num(0.0, 0.0, 0.0)
    return found.clamp(-126, 126).neg().exp2()


def _reduced(found: Tensor, method: str, reduction: str) -> Tensor:
    """[k, n, D] to [k, n]."""
    if reduction == "l2":
        return found.norm(dim=-1)
    return (found.abs() if method == "saliency" else found).sum(-1)


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _tell_deltas(deltas: Tensor, wanted: Tensor, from_a_token: bool) -> None:
    """A line where attributions do not sum to what they should. At embeddings of 0 the norms of
    layers jump, which no number of steps mends."""
    large = deltas.abs() > (LARGE_DELTA * wanted.abs()).clamp_min(1e-4)
    if large.any():
        logger.warning(
            "integrated gradients of %d of %d targets miss their sum by more than %d %% (%.2g at"
            " most): %s",
            int(large.sum()), len(deltas), round(100 * LARGE_DELTA), float(deltas.abs().max()),
            "raise n_steps" if from_a_token else "start from a token, --baseline pad",
        )  # fmt: skip


def _tell_not_finite(result: Attribution) -> None:
    """A line for each score that is NaN or inf of a target, or its attributions are."""
    lost = (result.matrix.isfinite() | ~result.read).all(0).logical_not()
    for name, values in result.scores.items():
        bad = ~values.isfinite() | (lost if name == result.target else False)
        if bad.any():
            places = bad.nonzero()[:, 0].tolist()
            told = ", ".join(repr(result.targets[t]) for t in places[:MAX_TOLD])
            more = f" and {len(places) - MAX_TOLD} more" if len(places) > MAX_TOLD else ""
            logger.warning("%s is not finite, or its gradient, of %s%s", name, told, more)
