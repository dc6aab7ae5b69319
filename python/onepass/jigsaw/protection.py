"""What a transform does to one text: how far each token moves, and what attacks make of it."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attack import INFORMED, LIKELIHOOD, METRICS, NearestEmbedding
from .cloak import TransformerCloak

MAX_SEED = 2**63 - 1


@dataclass(frozen=True)
class Protection:
    """A text of S tokens under N draws of the noise. Tokens that are not transformed lie where they
    were; no mean counts them."""

    input_ids: Tensor  # [S]
    attention_mask: Tensor  # [S]
    noise_mask: Tensor  # [S] bool: transformed
    clean: Tensor  # [S, D]
    noisy: Tensor  # [S, D] under the first draw
    norm: Tensor  # [S] of the clean embeddings
    std: Tensor  # [S] mean over the features
    distance: Tensor  # [N, S] from clean to noisy
    cosine: Tensor  # [N, S]
    found: dict[str, Tensor]  # by attack: the ids [N, S] that it takes them for
    ranks: dict[str, Tensor]  # and 1 + the number of tokens that it finds likelier, [N, S]

    @property
    def n_draws(self) -> int:
        """N."""
        return self.distance.shape[0]

    @property
    def recovered(self) -> dict[str, Tensor]:
        """Where an attack finds the token itself, [N, S] bool by attack; "either": by L2 or by
        cosine."""
        hits = {name: ids == self.input_ids for name, ids in self.found.items()}
        return {**hits, "either": torch.stack([hits[metric] for metric in METRICS]).any(0)}

    def totals(self) -> dict[str, float | None]:
        """Means over the transformed tokens and the draws. recovered_*: the share that an attack
        finds; recovered_*_std: its standard deviation over the draws, None of one draw."""
        moved = self.noise_mask
        n = max(1, int(moved.sum()))
        totals: dict[str, float | None] = {
            "tokens": self.input_ids.numel(),
            "transformed": int(moved.sum()),
            "draws": self.n_draws,
            "abs_cosine": float(self.cosine.abs()[:, moved].sum()) / (n * self.n_draws),
            "distance": float(self.distance[:, moved].sum()) / (n * self.n_draws),
            "relative_distance": float(self.relative_distance[:, moved].sum()) / (n * self.n_draws),
            "std": float(self.std[moved].sum()) / n,
        }
        for name, hits in self.recovered.items():
            shares = hits[:, moved].double().sum(-1) / n  # [N]
            totals[f"recovered_{name}"] = float(shares.mean())
            totals[f"recovered_{name}_std"] = float(shares.std()) if self.n_draws > 1 else None
        return totals

    @property
    def relative_distance(self) -> Tensor:
        """The distance over the norm of the clean embedding, [N, S]; of a row of zeros inf."""
        at_rest = torch.zeros_like(self.distance)
        return torch.where(self.distance == 0, at_rest, self.distance / self.norm)


@torch.no_grad()
def protect(
    model: nn.Module,
    cloak: TransformerCloak,
    input_ids: Tensor,
    noise_mask: Tensor | None = None,
    *,
    seed: int | None = None,
    samples: int = 1,
    informed: bool = False,
) -> Protection:
    """Apply a transform to one text and attack what comes out.

    Args:
        model: with get_input_embeddings(), on one device with the transform and the tokens.
        cloak: the transform.
        input_ids: [S] tokens, without padding.
        noise_mask: [S] tokens to transform (nonzero); None: all.
        seed: of the first draw, from 0; draw k has seed + k. None takes one from the operating
            system: torch's own generator repeats itself where an application seeds it.
        samples: N, draws of the noise.
        informed: also attack as one who has the transform, under the name "informed": each
            embedding is taken for the token that it is likeliest to come from, by the mean and the
            noise that the transform gives each. What it finds the noise did not hide; looking at
            one token at a time no attack finds more of a text whose tokens are all equally likely.
            The transform runs on the whole vocabulary for that.

    Raises:
        TypeError: not tensors. ValueError: shapes or numbers that do not fit, no tokens, tokens
        without a row, a transform that makes embeddings that are not finite.
    """
    for name, tensor in (("input_ids", input_ids), ("noise_mask", noise_mask)):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor: got {type(tensor).__name__}")
        if tensor.dim() != 1 or tensor.shape != input_ids.shape or not len(tensor):
            wanted = "[S] with S of at least 1" if name == "input_ids" else "[S] as input_ids"
            raise ValueError(f"{name} must be {wanted}: got {list(tensor.shape)}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples must be an int of at least 1: got {samples!r}")
    first = secrets.randbelow(MAX_SEED - samples) if seed is None else seed
    if not 0 <= first <= MAX_SEED - samples:
        raise ValueError(f"seed must be from 0 to {MAX_SEED - samples}: got {seed}")
    layer: Any = model.get_input_embeddings()  # type: ignore[operator]
    n_rows = layer.weight.shape[0]
    if int(input_ids.max()) >= n_rows or int(input_ids.min()) < 0:
        raise ValueError(
            f"input_ids must be from 0 to {n_rows - 1}, the rows of the embeddings: got"
            f" {int(input_ids.min())} to {int(input_ids.max())}"
        )
    clean = layer(input_ids)  # [S, D]
    attended = torch.ones_like(input_ids)
    moved = attended.bool() if noise_mask is None else noise_mask != 0

    def draw(k: int) -> Any:
        drawn = torch.tensor(first + k, dtype=torch.int64, device=input_ids.device)
        return cloak(clean[None], moved[None], attended[None], seed=drawn)

    start = draw(0)
    x = clean.float()
    distances, cosines = [], []
    for k in range(samples):
        noisy = draw(k).noisy[0].float()
        distances.append((noisy - x).norm(dim=-1))
        cosines.append(torch.cosine_similarity(noisy, x, dim=-1))
    if not torch.stack(distances).isfinite().all():
        raise ValueError("the transform makes embeddings that are not finite: it is damaged")
    found, ranks = {}, {}
    attacks: list[tuple[str, str, TransformerCloak | None]] = [(m, m, None) for m in METRICS]
    if informed:
        attacks.append((INFORMED, LIKELIHOOD, cloak))
    for name, metric, known in attacks:  # one copy of the vocabulary at a time
        attack = NearestEmbedding(model, metric, known)
        pairs = [
            (attack(noisy), attack.ranks(noisy, input_ids))
            for noisy in (draw(k).noisy[0] for k in range(samples))
        ]
        found[name], ranks[name] = (torch.stack(x) for x in zip(*pairs, strict=True))
        del attack
    return Protection(
        input_ids=input_ids,
        attention_mask=attended,
        noise_mask=moved,
        clean=clean,
        noisy=start.noisy[0],
        norm=x.norm(dim=-1),
        std=start.stds[0].mean(-1),
        distance=torch.stack(distances),
        cosine=torch.stack(cosines),
        found=found,
        ranks=ranks,
    )
