"""A tiny Llama with a byte-level tokenizer as transformers files, and sentences to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from .tiny_models import SIZES

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
BENIGN = [f"the {a} {b} near the river" for a in ("old", "red", "wide") for b in ("barn", "mill")]
HARMFUL = [f"def f{n}(x):\n    return x + {n}\n" for n in range(6)]


def tokenizer(template: str | None = None) -> Any:
    """Bytes are tokens, after four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*special, *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    if template is not None:
        fast.chat_template = template
    return fast


def model(n_layers: int = 4) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | {"vocab_size": 260, "num_hidden_layers": n_layers}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes))


def save(folder: Path, n_layers: int = 4) -> Path:
    """The model's folder, and retain.jsonl and harmful.jsonl beside it."""
    model(n_layers).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, texts in (("retain", BENIGN), ("harmful", HARMFUL)):
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder / "model"
