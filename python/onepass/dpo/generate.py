"""Answers drawn from a causal language model, many to each prompt, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..cli.errors import one_line
from ..cli.terminal import progress_bar
from ..training.generation import no_settings, padding_of
from ..training.hidden_states import training_mode
from .data import begun
from .examples import TextOrTurns


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the draws change with the batch size as they do with the seed."""

    num_answers: int = 50
    max_new_tokens: int = 48
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 64
    seed: int = 42


class Answer(NamedTuple):
    prompt: int  # its place among the prompts
    text: str
    ids: list[int]  # with the EOS token where it ended by itself

    def content(self, special: frozenset[int]) -> list[int]:
        """The tokens that are text."""
        return [token for token in self.ids if token not in special]


def texts_of(prompts: Sequence[TextOrTurns], tokenizer: Any) -> list[str]:
    """Prompts as text: conversations as the chat template writes them, up to where the assistant
    begins to answer.

    Raises:
        ValueError: a conversation that the template, or the lack of one, refuses.
    """
    return [p if isinstance(p, str) else _rendered(p, tokenizer) for p in prompts]


def _rendered(turns: list[dict[str, str]], tokenizer: Any) -> str:
    where = f"the conversation that ends with {turns[-1]['content'][-40:]!r}"
    if turns[-1]["role"] == "assistant":
        raise ValueError(f"{where}: its last turn is the assistant's: there is nothing to answer")
    if not tokenizer.chat_template:
        raise ValueError(f"{where}: the model's tokenizer has no chat template: wanted text")
    try:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # a template raises what it likes
        raise ValueError(f"{where}: the chat template refuses it: {one_line(error)}") from error


def prompt_ids(
    model: Any, tokenizer: Any, prompts: Sequence[TextOrTurns], n_new: int
) -> list[list[int]]:
    """Each prompt's tokens as the trainer has them.

    Raises:
        ValueError: one that leaves no room for `n_new` tokens.
    """
    texts = texts_of(prompts, tokenizer)
    ids: list[list[int]] = [
        begun(tokens, tokenizer) if isinstance(prompt, str) else tokens
        for prompt, tokens in zip(
            prompts, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True
        )
    ]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for prompt, tokens in zip(texts, ids, strict=True):
        if not tokens:
            raise ValueError(f"the prompt {prompt[:40]!r} has no tokens")
        if isinstance(positions, int) and len(tokens) + n_new > positions:
            raise ValueError(
                f"the prompt {prompt[:40]!r} has {len(tokens)} tokens, which with"
                f" max_new_tokens={n_new} is more than the {positions} that the model takes"
            )
    return ids


@torch.no_grad()
def sample_answers(
    model: Any, tokenizer: Any, prompts: Sequence[TextOrTurns], sampling: Sampling
) -> list[Answer]:
    """`num_answers` to each prompt, in the order of the prompts; drawn as `sampling` says and as
    nothing else does, the model's own settings but its EOS tokens being left out.

    Raises:
        ValueError: a prompt that is too long, a conversation without a chat template.
    """
    from transformers import GenerationConfig

    ids = prompt_ids(model, tokenizer, prompts, sampling.max_new_tokens)
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    stops = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
    config = GenerationConfig(
        do_sample=True,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        temperature=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        eos_token_id=ends,
        pad_token_id=padding_of(tokenizer),
        use_cache=True,
    )
    # Prompts of one length beside each other: little padding.
    rows = [p for p in range(len(ids)) for _ in range(sampling.num_answers)]
    order = sorted(range(len(rows)), key=lambda row: (len(ids[rows[row]]), row))
    answers: list[Answer | None] = [None] * len(rows)
    gpus = [model.device] if model.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=gpus),
        training_mode(model, False),
        no_settings(model),
        progress_bar(len(rows), 0) as bar,
    ):
        bar.set_description("answers")
        bar.unit = ""
        torch.manual_seed(sampling.seed)
        for start in range(0, len(rows), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            tokens = [ids[rows[row]] for row in batch]
            width = max(map(len, tokens))
            # padded on the left, so that all go on from the last column
            padded = [[padding_of(tokenizer)] * (width - len(t)) + t for t in tokens]
            mask = [[0] * (width - len(t)) + [1] * len(t) for t in tokens]
            out = model.generate(
                input_ids=torch.tensor(padded, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )
            for row, new in zip(batch, out[:, width:].tolist(), strict=True):
                end = next((n + 1 for n, token in enumerate(new) if token in stops), len(new))
                text = answer_text(tokenizer, ids[rows[row]], new[:end])
                answers[row] = Answer(rows[row], text, new[:end])
            bar.update(len(batch))
    return [answer for answer in answers if answer is not None]


def answer_text(tokenizer: Any, prompt: list[int], answer: list[int]) -> str:
    """What the answer adds to the prompt's text; alone some tokenizers drop its first blank."""
    how = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    before = tokenizer.decode(prompt, **how)
    whole = tokenizer.decode([*prompt, *answer], **how)
    if whole.startswith(before):
        return str(whole[len(before) :])
    return str(tokenizer.decode(answer, **how))
