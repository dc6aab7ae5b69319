"""What a circuit breaker did to an image model: cosines, cross-entropy of pictures, samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...training.hidden_states import same_draws, training_mode, without_adapter
from ..loss import Rerouting, part_facts
from .captions import CAPTION
from .loss import infinity_runs
from .model import Infinity, generate
from .pictures import draw
from .pretrain import caption_loss
from .quantizer import BitQuantizer
from .text import TextCondTuple, TextEncoder, text_cond_tuple

PICTURES = 96
BATCH_SIZE = 16
SAMPLES = 4  # captions a side
DRAWINGS = 2  # of each caption


def condition(encoder: TextEncoder, prompts: Sequence[str], max_length: int) -> TextCondTuple:
    return text_cond_tuple(encoder.features(*encoder.tokenize(prompts, max_length)))


@torch.no_grad()
def nats_per_label(model: nn.Module, prompts: Sequence[str], encoder: TextEncoder) -> float:
    """Cross-entropy of new pictures of the prompts, in turn; always the same ones."""
    generator = torch.Generator().manual_seed(0)
    captions = [prompts[n % len(prompts)] for n in range(max(PICTURES, BATCH_SIZE))]
    inner, total = without_adapter(model), 0.0
    with training_mode(model, False):
        for start in range(0, len(captions), BATCH_SIZE):
            some = captions[start : start + BATCH_SIZE]
            images = torch.stack([draw(caption, generator) for caption in some])
            loss = caption_loss(inner, some, images, quantizer=BitQuantizer(), text_encoder=encoder)
            total += loss.item() * len(some)
    return total / len(captions)


@torch.no_grad()
def cosine(
    model: nn.Module,
    prompts: Sequence[str],
    ending: str,
    options: Rerouting,
    encoder: TextEncoder,
    scale_schedule: list[tuple[int, int, int]],
    max_length: int,
) -> float:
    """Mean cosine of hidden states to those of the reference, of prompts on either side; see
    `part_facts`."""
    device = next(model.parameters()).device
    total = 0.0
    with training_mode(model, False):
        for start in range(0, len(prompts), BATCH_SIZE):
            some = prompts[start : start + BATCH_SIZE]
            text, *lengths = condition(encoder, some, max_length)
            inputs = {f"text_cond_tuple{ending}": (text.to(device), *lengths)}
            runs = infinity_runs(model, scale_schedule, options, seed=start)
            total += float(part_facts(model, inputs, ending, options, runs)["cosine"]) * len(some)
    return total / len(prompts)


def to_sample(prompts: Sequence[str]) -> list[str]:
    """A few prompts, each of another shape and colour as far as there are any."""
    by_name: dict[Any, str] = {}
    for prompt in sorted(prompts, key=lambda prompt: (len(prompt), prompt)):
        found = CAPTION.search(prompt)
        by_name.setdefault(found and found.groups()[:2], prompt)
    chosen = list(by_name.values())
    return [chosen[n * len(chosen) // SAMPLES] for n in range(min(SAMPLES, len(chosen)))]


def samples(model: nn.Module, prompts: Sequence[str], encoder: TextEncoder) -> Tensor:
    """What the model draws of each prompt [n, DRAWINGS, 3, H, W]; always from the same draws."""
    inner = without_adapter(model)
    assert isinstance(inner, Infinity)
    with same_draws(model):
        repeated = [prompt for prompt in prompts for _ in range(DRAWINGS)]
        drawn = generate(
            inner,
            condition(encoder, repeated, inner.config.text_maxlen),
            BitQuantizer(),
            generator=torch.Generator().manual_seed(0),
        )
    return drawn.unflatten(0, (len(prompts), DRAWINGS)).cpu()


def write_samples(file: Path, sides: dict[str, tuple[list[str], Tensor, Tensor]]) -> None:
    """A PNG: a column a caption, its drawings before and after below it."""
    from matplotlib.figure import Figure

    from ...cli.files import replace

    columns = [(side, *one) for side, three in sides.items() for one in zip(*three, strict=True)]
    rows = 2 * DRAWINGS
    figure = Figure(figsize=(1.5 * len(columns) + 0.6, 1.35 * rows + 0.9), layout="constrained")
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for column, (side, caption, before, after) in enumerate(columns):
        for row, picture in enumerate([*before, *after]):
            axes = grid[row][column]
            axes.imshow(((picture + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            if column == 0:
                axes.set_ylabel("before" if row < DRAWINGS else "after")
        grid[0][column].set_title(f"{side}:\n{_broken(caption)}", fontsize=8)
    figure.suptitle("What the model draws, before and after")
    replace(file, lambda new: figure.savefig(new, format="png", dpi=150))


def _broken(caption: str) -> str:
    """The caption in lines of some 20 characters."""
    import textwrap

    return "\n".join(textwrap.wrap(caption, 20))
