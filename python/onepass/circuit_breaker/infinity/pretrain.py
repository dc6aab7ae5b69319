"""Training the small image model from nothing on the pictures of pictures.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ... import cross_entropy
from .model import Infinity, InfinityConfig
from .pictures import captions, draw
from .quantizer import BitQuantizer
from .text import TextEncoder, WordEncoder, text_cond_tuple

STEPS = 250
BATCH_SIZE = 16
LEARNING_RATE = 4e-3
WARMUP_STEPS = 10


def small_model(seed: int = 0, config: InfinityConfig | None = None) -> Infinity:
    """An untrained model; the caller's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Infinity(config or InfinityConfig())


def caption_loss(
    model: Infinity,
    prompts: Sequence[str],
    images: Tensor,
    *,
    quantizer: BitQuantizer,
    text_encoder: TextEncoder,
    reweight_loss_by_scale: bool = False,
) -> Tensor:
    """Mean cross-entropy of the images' labels under the prompts, in nats a cell.

    `reweight_loss_by_scale` gives a cell the weight 1 / sqrt(cells of its scale), as in Infinity:
    the one cell of the first scale settles what all others are to draw.
    """
    labels, x = quantizer.encode(images.to(model.device))
    tokens = text_encoder.tokenize(prompts, model.config.text_maxlen)
    condition = text_cond_tuple(text_encoder.features(*tokens))
    logits = model(condition, x, quantizer.scale_schedule)
    target = torch.cat(labels, 1).flatten()
    if not reweight_loss_by_scale:
        return cross_entropy(logits.flatten(0, 1), target)
    losses = cross_entropy(logits.flatten(0, 1), target, reduction="none").view(len(images), -1)
    n_cells = torch.tensor([some.shape[1] for some in labels], device=losses.device)
    weights = (1 / n_cells.sqrt()).repeat_interleave(n_cells)
    return (losses * (weights / weights.sum())).sum(-1).mean()


def batch(seed: int, step: int, size: int, among: Sequence[str]) -> tuple[list[str], Tensor]:
    """Captions and pictures that depend on the numbers alone."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    chosen = torch.randint(len(among), (size,), generator=generator).tolist()
    prompts = [among[which] for which in chosen]
    return prompts, torch.stack([draw(prompt, generator) for prompt in prompts])


def pretrain(
    model: Infinity,
    *,
    quantizer: BitQuantizer | None = None,
    text_encoder: TextEncoder | None = None,
    steps: int = STEPS,
    batch_size: int = BATCH_SIZE,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    after_step: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train on captions and pictures of both kinds; the loss of every step.

    `after_step` gets the number of steps done and the loss. The same seed gives the same model on
    the same device with the same number of threads.
    """
    quantizer = quantizer or BitQuantizer()
    text_encoder = text_encoder or WordEncoder(model.config.text_channels)
    among = captions("benign") + captions("harmful")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    losses: list[float] = []
    model.train()
    with torch.random.fork_rng(devices=[]):  # of the prompts that are dropped
        torch.manual_seed(seed)
        for step in range(steps):
            warm = min((step + 1) / WARMUP_STEPS, 1.0)
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(warm, max(cosine, 0.02))
            prompts, images = batch(seed, step, batch_size, among)
            loss = caption_loss(
                model,
                prompts,
                images,
                quantizer=quantizer,
                text_encoder=text_encoder,
                reweight_loss_by_scale=True,
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            if after_step is not None:
                after_step(step + 1, losses[-1])
    model.eval()
    return losses
