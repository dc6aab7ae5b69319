"""PPLM.jl's two ways to a text: `sample_pplm`, steered, and `sample_normal`, not.

A cache holds the unperturbed past; upstream runs the model on all tokens for each new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ops._check import check_choice, check_number
from ..training.flags import ModelFlags
from ..training.models import load_policy
from .adam import head_logits, logits_over, steer_hidden, steer_past, steer_probs
from .forward import Forward, check_model, check_places, run, steady
from .generate import padded
from .perturb import Goal
from .sampling import check_k, fuse, nucleus_sample, top_k_sample
from .settings import pplm

SAMPLERS = ("top_k", "nucleus")


def sample_pplm(
    args: pplm,
    *,
    tokenizer: Any = None,
    model: Any = None,
    prompt: str | Sequence[str] = "I hate the customs",
    sample_method: str = "top_k",
    add_eos_start: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """The prompt and what the steered model goes on with, args.max_length tokens.

    Args:
        tokenizer, model: of transformers; None is GPT-2, the medium one for heads of its size.
        prompt: a text, or several, which are drawn as one batch, each steered as if alone.
        sample_method: "top_k", with args.top_k, or "nucleus", with args.top_p.
        add_eos_start: begin with the EOS token, which the text then is without.
        seed: of the draws; or a `generator` on the model's device. None: torch's global state.

    Returns: the text, or a list of them. An EOS token in it ends nothing, as upstream.

    Raises:
        ValueError: a prompt without tokens or with more than the model takes, a model without a
        plain cache, a head or bag that does not fit it.
    """
    if tokenizer is None or model is None:
        tokenizer, model = _gpt2("gpt2-medium" if args.embed_size == 1024 else "gpt2")
    if args.cuda is not None and args.cuda[0]:
        model.to(torch.device("cuda", args.cuda[1]))
    pick = _sampler(sample_method, args.top_k, args.top_p)
    return _texts(
        AdamWalk(model, args.temperature, args, args.goal(args.method, model, tokenizer)),
        tokenizer, prompt, args.max_length, pick, add_eos_start, seed, generator,
    )  # fmt: skip


def sample_normal(
    *,
    prompt: str | Sequence[str] = "I hate the customs",
    tokenizer: Any = None,
    model: Any = None,
    max_length: int = 100,
    method: str = "top_k",
    k: int = 50,
    t: float = 1.2,
    p: float = 0.5,
    add_eos_start: bool = True,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Any:
    """The prompt and what the model goes on with, unsteered: `max_length` tokens of top-`k` or
    nucleus sampling (`p`) at temperature `t`. Else as `sample_pplm`."""
    if tokenizer is None or model is None:
        tokenizer, model = _gpt2("gpt2")
    pick = _sampler(method, k, p)
    walk = AdamWalk(model, t)
    return _texts(walk, tokenizer, prompt, max_length, pick, add_eos_start, seed, generator)


class AdamWalk:
    """A batch of texts, token by token: `start`, then `step` with each drawn token."""

    def __init__(
        self,
        model: Any,
        temperature: float,
        args: pplm | None = None,
        goal: Goal = Goal(),  # noqa: B008
    ) -> None:
        check_model(model)
        self.model, self.temperature, self.args, self.goal = model, temperature, args, goal
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.past: Tensor | None = None  # [L, 2, B, H, T, d], unperturbed
        self.mask: Tensor | None = None  # [B, T], where rows are padded
        self.pooled: tuple[Tensor, Tensor] | None = None  # sum and number of hidden states so far
        self.before: Tensor | None = None  # what seed_compat_offset takes the KL to

    def start(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """log-probabilities [B, V] of what follows tokens [B, S], padded on the left where the mask
        [B, S] is 0."""
        self.mask = mask
        args = self.args
        if args is None or args.perturb != "past" or tokens.shape[1] == 1:
            return self._next(tokens)
        offset = args.seed_compat_offset
        early = None if mask is None else mask[:, :-1]
        out = run(self.model, tokens[:, :-1], None, early, logits=offset)
        self.past = out.past()
        if offset:
            self.before = logits_over(out, self.temperature)
        return self._next(tokens[:, -1:])

    def step(self, token: Tensor) -> Tensor:
        """log-probabilities [B, V] of what follows the token [B, 1]."""
        if self.mask is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return self._next(token)

    def _next(self, tokens: Tensor) -> Tensor:
        args = self.args
        if args is not None and args.perturb == "past" and self.past is not None:
            return self._with_past(tokens, args)
        out = run(self.model, tokens, self.past, self.mask)
        if args is not None and args.perturb == "hidden":
            log_p, log_u = self._with_hidden(out, args)
        else:
            log_p = log_u = logits_over(out, self.temperature)
            if args is not None and args.perturb == "probs":
                probs = steer_probs(log_u.softmax(-1), self.goal, args, per_row=True)
                log_p = probs.log()
        self.past, self.before = out.past(), log_u
        return fuse(log_p, log_u, 0.0 if args is None else args.fusion_gm_scale)

    def _with_hidden(self, out: Forward, args: pplm) -> tuple[Tensor, Tensor]:
        logits_of = logits_like(out, self.model)
        rest = None if self.goal.bags else self._pool(out.hidden.float())
        last = out.hidden[:, -1]
        moved = steer_hidden(last, logits_of, self.goal, args, rest, per_row=True)
        log_p = logits_of(moved.last).float() / self.temperature
        return log_p, log_p if moved.log_u is None else moved.log_u

    def _pool(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Sum [B, D] and number [B, 1] of the hidden states before the last [B, S, D], with those
        of earlier steps."""
        counts = torch.ones_like(hidden[..., :1])
        if self.mask is not None:
            counts = self.mask[:, -hidden.shape[1] :].unsqueeze(-1).to(hidden)
            hidden = hidden.masked_fill(counts == 0, 0.0)
        total, n = self.pooled or (0.0, 0.0)
        rest = total + hidden[:, :-1].sum(1), n + counts[:, :-1].sum(1)
        self.pooled = rest[0] + hidden[:, -1], rest[1] + 1
        return rest

    def _with_past(self, token: Tensor, args: pplm) -> Tensor:
        assert self.past is not None
        target = self.before if args.seed_compat_offset else None
        moved = steer_past(
            self.model, token, self.past, self.goal, args, self.mask, target, per_row=True
        )
        out = run(self.model, token, moved.past, self.mask)
        log_p = logits_over(out, self.temperature)
        log_u = log_p if moved.log_u is None else moved.log_u
        self.past = out.past() if moved.unperturbed is None else moved.unperturbed
        self.before = log_u
        return fuse(log_p, log_u, args.fusion_gm_scale)


def logits_like(out: Forward, model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From hidden states [B, D] to logits as the model made `out.logits` of its own: by its head,
    and the cap and scale that follow it, where these are known."""
    head = getattr(out.logits, "onepass_head", None)
    if head is None:
        return head_logits(model)
    if len(head.hidden) > 1:  # an adapter on the head, which the module adds itself
        product = head_logits(model)
        return lambda last: head.cap.logits(product(last))  # type: ignore[no-any-return]
    return lambda last: head._replace(hidden=(last,), states=()).logits()  # type: ignore[no-any-return]


def new_tokens(
    walk: AdamWalk, ids: Tensor, mask: Tensor | None, n_new: int, pick: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """`n_new` tokens [B, 1], one by one, after ids [B, S]; mask [B, S] is 0 where they are padded
    on the left."""
    token, places = ids.to(walk.device), None if mask is None else mask.to(walk.device)
    with steady(walk.model):
        for n in range(n_new):
            log_probs = walk.step(token) if n else walk.start(token, places)
            token = pick(log_probs.exp())
            yield token


def _texts(
    walk: AdamWalk,
    tokenizer: Any,
    prompt: str | Sequence[str],
    n_new: int,
    pick: Callable[..., Tensor],
    add_eos_start: bool,
    seed: int | None,
    generator: torch.Generator | None,
) -> Any:
    if seed is not None:
        if generator is not None:
            raise ValueError("seed and generator exclude each other")
        generator = torch.Generator(walk.device).manual_seed(seed)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    rows = prompt_rows(tokenizer, prompts, add_eos_start)
    ids, mask = padded(tokenizer, rows)
    check_places(walk.model, ids.shape[1], n_new)
    drawn = new_tokens(walk, ids, mask, n_new, lambda probs: pick(probs, generator=generator))
    new = torch.cat(list(drawn), 1).tolist()
    texts = [
        tokenizer.decode([*row, *more][add_eos_start:], clean_up_tokenization_spaces=False)
        for row, more in zip(rows, new, strict=True)
    ]
    return texts[0] if isinstance(prompt, str) else texts


def prompt_rows(tokenizer: Any, prompts: Sequence[str], add_eos_start: bool) -> list[list[int]]:
    """Tokens of each prompt.

    Raises:
        ValueError: no prompt, or one without tokens.
    """
    first = [tokenizer.eos_token_id] if add_eos_start else []
    if first == [None]:
        raise ValueError("add_eos_start: the tokenizer has no EOS token: wanted False")
    rows = [first + tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
    if not rows or not all(rows):
        raise ValueError("prompt: got no text, wanted at least one of at least a token")
    return rows


def _sampler(method: str, k: int, p: float) -> Callable[..., Tensor]:
    check_choice("sample_method", method, SAMPLERS)
    check_k(k)
    check_number("p", p, 0.0, 1.0)
    if method == "top_k":
        return lambda probs, generator: top_k_sample(probs, k, generator)
    return lambda probs, generator: nucleus_sample(probs, p, generator)


def _gpt2(name: str) -> tuple[Any, Any]:
    model, tokenizer = load_policy(ModelFlags(name), None, torch.device("cpu"))
    return tokenizer, model
