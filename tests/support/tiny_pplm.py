"""A tokenizer of whole words, with bags and heads that fit the tiny models."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .tiny_models import SIZES, D, V, tiny

BAG = ("war", "army", "tank", "soldier")
OTHER = ("star", "moon", "orbit")


def tokenizer() -> Any:
    """Words are tokens: four special ones, the bags', "the", "w0", "w1", ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *BAG, *OTHER, "the"]
    words += [f"w{n}" for n in range(V - len(words))]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def model(family: str = "gpt2_tied", device: str = "cpu") -> Any:
    """Of larger weights than those that models begin with, whose distributions are all but flat."""
    made = tiny(family, device)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.2 * values)
    return made.eval()


def head(class_size: int = 3) -> Any:
    from onepass.pplm import ClassificationHead

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = ClassificationHead(class_size, D)
        nn.init.normal_(made.mlp.weight, std=0.05)
    return made


__all__ = ["BAG", "D", "OTHER", "SIZES", "V", "head", "model", "tokenizer"]
