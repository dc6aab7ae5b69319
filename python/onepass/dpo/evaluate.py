"""What a policy's own answers say of it: reward, token entropy, variety, distance to a reference.

The entropy is that of the tokens counted over all answers, normalised once, in nats; the notebook
divides the counts anew after each text, which weighs a text by where it stands in the list.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..training.generation import padding_of
from ..training.hidden_states import lazy_within
from .examples import TextOrTurns
from .generate import Answer, Sampling, prompt_ids, sample_answers, texts_of

if TYPE_CHECKING:
    from .reward import Reward, Score

KL_BATCH = 16
GRAMS = (1, 2, 3)


def token_entropy(answers: Sequence[Sequence[int]]) -> float:
    """-sum_v p_v log p_v of the tokens' frequencies, in nats. It grows with the number of tokens:
    compare models by as many answers of each."""
    counts = Counter(token for answer in answers for token in answer)
    total = sum(counts.values())
    return math.fsum(-n / total * math.log(n / total) for n in counts.values()) + 0.0


def distinct(answers: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams over all n-grams of all answers (Li et al. 1510.03055); None: there are
    none."""
    grams = [tuple(a[i : i + n]) for a in answers for i in range(len(a) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def mean_and_error(values: Sequence[float], groups: Sequence[int]) -> tuple[float, float | None]:
    """The mean and its standard error. Values of one group, a prompt, are no independent draws:
    where there are several groups, the error is that of the mean of theirs."""
    by_group: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        by_group.setdefault(group, []).append(value)
    means = [math.fsum(v) / len(v) for v in by_group.values()]
    units = means if len(means) > 1 else list(values)
    mean = math.fsum(values) / len(values)
    centre = math.fsum(units) / len(units)
    if len(units) < 2:
        return mean, None
    variance = math.fsum((unit - centre) ** 2 for unit in units) / (len(units) - 1)
    return mean, math.sqrt(variance / len(units))


def kl_rows(policy_logits: Tensor, reference_logits: Tensor, counts: Tensor) -> Tensor:
    """KL(policy || reference) of the next token at every position that counts, [B, S], exact: a
    sum over the vocabulary, which of lazy logits is never held."""
    from ..ops.vocab_pair_stats import vocab_pair_stats

    found = vocab_pair_stats(
        reference_logits, target_logits=policy_logits, mask=counts, want=("kl",)
    )
    assert found.kl is not None
    return found.kl


@torch.no_grad()
def kl_of_answers(
    model: Any,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Answer],
    padding: int,
    batch_size: int = KL_BATCH,
) -> list[float]:
    """The divergences of each answer's tokens, summed.

    Args:
        reference: a model; None: the policy with its adapter switched off.

    Over answers drawn from the policy the mean is an unbiased estimate of the KL of the sequences,
    with a smaller variance than that of log p - log q of the drawn tokens. Drawn otherwise (top_k,
    top_p, another temperature) it is that of the models along these answers.
    """
    found: list[float] = []
    own = contextlib.nullcontext() if reference is None else lazy_within(reference, None)
    with lazy_within(model, None), own:
        for start in range(0, len(answers), batch_size):
            batch = answers[start : start + batch_size]
            rows = [[*prompts[a.prompt], *a.ids] for a in batch]
            width = max(map(len, rows))
            ids = torch.tensor([r + [padding] * (width - len(r)) for r in rows])
            mask = torch.zeros(ids.shape, dtype=torch.long)
            counts = torch.zeros(ids.shape, dtype=torch.bool)
            for i, (row, answer) in enumerate(zip(rows, batch, strict=True)):
                mask[i, : len(row)] = 1
                counts[i, len(row) - len(answer.ids) - 1 : len(row) - 1] = True
            given = {
                "input_ids": ids.to(model.device),
                "attention_mask": mask.to(model.device),
                "use_cache": False,
            }
            logits = model(**given).logits
            if reference is None:
                with model.disable_adapter():
                    other = model(**given).logits
            else:
                other = reference(**given).logits
            found += kl_rows(logits, other, counts.to(model.device)).double().sum(-1).tolist()
    return found


def measure(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[TextOrTurns],
    sampling: Sampling,
    reward: Reward,
    score: Score,
    *,
    reference: Any = None,
    score_prompt: bool = False,
) -> dict[str, Any]:
    """Facts of answers drawn from the model; of KL only where there is a reference, a model or one
    under the policy's adapter.

    Raises:
        ValueError: a prompt that is too long, vocabularies that differ.
        Failed: a reward that is no number.
    """
    answers = sample_answers(model, tokenizer, prompts, sampling)
    asked = texts_of(prompts, tokenizer)
    texts = [asked[a.prompt] + a.text if score_prompt else a.text for a in answers]
    rewards = reward.scores(score, texts)
    groups = [a.prompt for a in answers]
    special = frozenset(tokenizer.all_special_ids)
    tokens = [a.content(special) for a in answers]
    mean, error = mean_and_error(rewards, groups)
    facts: dict[str, Any] = {
        "prompts": len(prompts),
        "answers": len(answers),
        "tokens_per_answer": sum(map(len, tokens)) / len(tokens),
        "reward": mean,
        "reward_error": error,
        "token_entropy": token_entropy(tokens),
    }
    facts |= {f"distinct_{n}": distinct(tokens, n) for n in GRAMS}
    facts |= dict.fromkeys(("kl_per_token", "kl_per_sequence", "kl_per_sequence_error"))
    if reference is not None or hasattr(model, "disable_adapter"):
        ids = prompt_ids(model, tokenizer, prompts, sampling.max_new_tokens)
        sums = kl_of_answers(model, reference, ids, answers, padding_of(tokenizer))
        facts["kl_per_token"] = math.fsum(sums) / sum(len(a.ids) for a in answers)
        facts["kl_per_sequence"], facts["kl_per_sequence_error"] = mean_and_error(sums, groups)
    shown = range(0, len(answers), max(1, sampling.num_answers))
    facts["samples"] = [
        {"prompt": asked[answers[i].prompt], "answer": answers[i].text, "reward": rewards[i]}
        for i in list(shown)[:5]
    ]
    return facts
