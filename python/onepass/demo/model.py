"""The demo's model: a small Llama from random numbers, its LoRA adapter, its hidden states."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from .settings import Settings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

LORA_MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@contextlib.contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from `seed` inside, leave the caller's random state as it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def language_model(settings: Settings, vocab_size: int, seed: int) -> LlamaForCausalLM:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        architectures=[LlamaForCausalLM.__name__],
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.hidden_size * 8 // 3 // 8 * 8,
        num_hidden_layers=settings.n_layers,
        num_attention_heads=settings.n_heads,
        num_key_value_heads=settings.n_heads,
        max_position_embeddings=settings.window,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        use_cache=False,
    )
    with seeded(seed, torch.device("cpu")):
        model = LlamaForCausalLM(config)
        # Llama's own 0.02 suits a long training; with embeddings of unit size the residual
        # stream tells tokens apart from the first step, worth 1 to 1.5 nats after 100 steps.
        torch.nn.init.normal_(model.get_input_embeddings().weight)
    return model


def with_adapter(model: LlamaForCausalLM, settings: Settings, seed: int) -> PeftModel:
    """LoRA on all linear layers of the blocks below the highest target layer.

    LoRA starts with lora_B = 0: adapted and original states are equal, their cosine is 1, and
    there its gradient is exactly 0, so that circuit breaking would not start. A little noise on
    lora_B (`lora_jitter`) moves it off that point.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules=LORA_MODULES,
        layers_to_transform=list(range(max(settings.target_layers))),
        task_type="CAUSAL_LM",
    )
    with seeded(seed, model.device):
        adapted = get_peft_model(model, config)
        parameters = dict(adapted.named_parameters())
        with torch.no_grad():
            for name, lora_b in parameters.items():
                if "lora_B" in name:
                    lora_a = parameters[name.replace("lora_B", "lora_A")]
                    lora_b.normal_().mul_(settings.lora_jitter * lora_a.std())
    return adapted


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, fp32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def hidden_states(model: PeftModel, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All L+1 hidden states [B, T, D], embeddings first, without the vocabulary projection.

    No attention mask: rows are padded on the right and attention is causal, so no token of the
    text sees padding. Padding's own states are garbage that the loss masks leave out.
    """
    backbone = model.get_base_model().model
    with autocast(ids.device):
        return backbone(input_ids=ids, output_hidden_states=True).hidden_states


@contextlib.contextmanager
def original(model: PeftModel) -> Iterator[None]:
    """The model as it was before the adapter, without gradients."""
    with torch.no_grad(), model.disable_adapter():
        yield
