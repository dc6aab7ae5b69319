"""What text tells of a transform and its student: how far each model lies from the clean teacher,
how often the student says what it would, and what an attack recovers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..training.hidden_states import same_draws, training_mode
from .attack import INFORMED, METRICS, NearestEmbedding, by_token
from .input_losses import positions
from .losses import COMPARED, half_of, soft_rows

if TYPE_CHECKING:
    from .cloak import TransformerCloak
    from .models import NoisyOutput
    from .trainer import JigsawModel

Facts = dict[str, tuple[Tensor, Tensor]]  # values and the weights they count with, [B, S] each


@torch.no_grad()
def facts_of(teacher: NoisyOutput, student: NoisyOutput) -> Facts:
    """Of every position: KL(T_c || S_n), KL(T_c || T_n) and KL(T_c || S_c) as kl_performance,
    kl_protection and kl_guardrails, whether S_n's most likely token is T_c's (agreement, and on
    clean tokens that follow transformed ones agreement_after), |cos| of
    the embeddings to the transformed ones (abs_cosine) and the mean deviation (std). Of truncated
    models the last two."""
    clean, noisy = teacher.clean_input_embeddings, teacher.noisy_input_embeddings
    attended = teacher.attention_mask
    moved = positions(teacher.noise_mask, clean.shape) & (attended != 0)
    facts: Facts = {
        "abs_cosine": (torch.cosine_similarity(clean.float(), noisy.float(), dim=-1).abs(), moved),
        "std": (teacher.stds.float().mean(-1), moved),
    }
    if teacher.logits is None or student.logits is None:
        return facts
    counted = torch.where(attended != 0, teacher.loss_mask, 0)
    n = clean.shape[0]
    target = teacher.logits[:n]
    logits = {"teacher": teacher.logits, "student": student.logits}
    chosen = {term: (logits[model], half_of(term, n)) for term, (model, _) in COMPARED.items()}
    masks = {term: counted for term in chosen} | {"performance": attended}
    for term, values in soft_rows(chosen, target, masks, fact="kl").items():
        facts[f"kl_{term}"] = (values, masks[term])
    same = (student.logits[n:].argmax(-1) == target.argmax(-1)).float()
    after = (moved.cumsum(-1) > 0) & ~moved & (attended != 0)
    return {**facts, "agreement": (same, attended), "agreement_after": (same, after)}


def attacks_on(model: nn.Module, cloak: TransformerCloak) -> dict[str, NearestEmbedding]:
    """The nearest-embedding attack by each metric, and that of one who has the transform as it is
    now, where that looks at each token alone."""
    attacks = {metric: NearestEmbedding(model, metric) for metric in METRICS}
    if by_token(cloak):
        attacks[INFORMED] = NearestEmbedding(model, cloak=cloak)
    return attacks


@torch.no_grad()
def measure(
    pair: JigsawModel,
    batches: Iterable[Mapping[str, Any]],
    attacks: Mapping[str, NearestEmbedding],
    seed: int = 0,
) -> dict[str, float]:
    """Means over all positions of the batches of what `facts_of` says, and the share of the
    transformed tokens that each attack recovers (recovery_l2, recovery_cosine, ...); what no
    position counts for is left out.

    Args:
        pair: as JigsawTrainer trains it.
        batches: of the collator.
        attacks: of `attacks_on`.
        seed: of the noise; the state of the random generators stays as it was.
    """
    sums: dict[str, float] = defaultdict(float)
    counts: dict[str, float] = defaultdict(float)
    device = next(pair.parameters()).device
    with training_mode(pair, False), same_draws(pair):
        torch.manual_seed(seed)
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items()}
            teacher, student = pair.run(**inputs)
            facts = facts_of(teacher, student)
            _, moved = facts["abs_cosine"]
            for name, attack in attacks.items():
                found = attack(teacher.noisy_input_embeddings) == inputs["input_ids"]
                facts[f"recovery_{name}"] = (found.float(), moved)
            for name, (values, mask) in facts.items():
                sums[name] += float(torch.where(mask != 0, values * mask, 0).double().sum())
                counts[name] += float(mask.double().sum())
    return {name: total / counts[name] for name, total in sums.items() if counts[name]}
