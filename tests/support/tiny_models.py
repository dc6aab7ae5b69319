"""Tiny random models of the families that lazy_head is proven on, and one training step of each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

V, D = 97, 32
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"output_router_logits": True}  # adds the auxiliary loss
IMAGE = V - 1


def llava() -> nn.Module:
    vision = hf.CLIPVisionConfig(
        hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        image_size=8, patch_size=4, projection_dim=D,
    )  # fmt: skip
    text = hf.LlamaConfig(**SIZES)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    return hf.LlavaForConditionalGeneration(config)


def minicpm() -> nn.Module:
    """Hidden states divided before the head."""
    sizes = SIZES | {"num_key_value_heads": 4}
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
    dims = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "dim_model_base": 16}
    return hf.MiniCPM3ForCausalLM(hf.MiniCPM3Config(**sizes, **ranks, **dims))


def falcon_h1() -> nn.Module:
    mamba = {"mamba_d_ssm": D, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    config = hf.FalconH1Config(**SIZES, **mamba, mamba_n_groups=1, lm_head_multiplier=0.5)
    return hf.FalconH1ForCausalLM(config)


def gpt2() -> nn.Module:
    sizes = {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = hf.GPT2Config(vocab_size=V, bos_token_id=1, eos_token_id=2, **sizes)
    return hf.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    sizes = {"d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=V, decoder_start_token_id=0, dropout_rate=0.0, **sizes)
    return hf.T5ForConditionalGeneration(config)


def llama(**options: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES | options))


SOFTCAP = {"head_dim": 8, "final_logit_softcapping": 3.0}
FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=8)),
    "qwen2_tied": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, head_dim=8)),
    "gemma2_softcap": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, **SOFTCAP)),
    "gemma3_softcap": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, **SOFTCAP)),
    "phi_bias": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SIZES | {"num_key_value_heads": 4})),
    "gpt2_tied": gpt2,
    "cohere_scale": lambda: hf.CohereForCausalLM(hf.CohereConfig(**SIZES, logit_scale=0.25)),
    "granite_scale": lambda: hf.GraniteForCausalLM(hf.GraniteConfig(**SIZES, logits_scaling=3.0)),
    **({"minicpm3_scale": minicpm} if hasattr(hf, "MiniCPM3ForCausalLM") else {}),
    "falcon_h1_scale": falcon_h1,
    "mixtral_aux": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**SIZES, **MOE, num_local_experts=4)
    ),
    "qwen2_moe_aux": lambda: hf.Qwen2MoeForCausalLM(
        hf.Qwen2MoeConfig(
            **SIZES, **MOE, num_experts=4, moe_intermediate_size=16,
            shared_expert_intermediate_size=16,
        )
    ),
    "qwen3_moe_aux": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(
            **SIZES, **MOE, head_dim=8, num_experts=4, num_experts_per_tok=2,
            moe_intermediate_size=16,
        )
    ),
    "llava_vision": llava,
    "t5_encoder_decoder": t5,
}  # fmt: skip


def tiny(name: str, device: str = "cpu") -> Any:
    """A model of that family with seeded weights and without dropout, which draws at random."""
    torch.manual_seed(0)
    model = FAMILIES[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.to(device).train()


def batch_of(name: str, device: str = "cpu") -> dict[str, Tensor]:
    """Two rows of nine tokens, labels with a masked start, an image where the model sees one."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, IMAGE, (2, 9), generator=generator)
    labels = ids.clone()
    labels[0, :3] = -100
    batch = {"input_ids": ids, "labels": labels}
    if name == "llava_vision":
        ids[:, 1:5] = IMAGE
        batch["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    return {key: value.to(device) for key, value in batch.items()}


def step(
    model: nn.Module, batch: dict[str, Tensor], **options: Any
) -> tuple[Any, dict[str, Tensor]]:
    """The output of the model's own forward, and every gradient of its loss by name."""
    model.zero_grad(set_to_none=True)
    out = model(**batch, **options)
    out.loss.backward()
    named = model.named_parameters()
    return out, {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same_step(
    got: tuple[Any, dict[str, Tensor]], wanted: tuple[Any, dict[str, Tensor]], rtol: float = 3e-6
) -> None:
    """Loss and gradients alike, to `rtol` of the largest entry of any gradient."""
    (out, grads), (other, expected) = got, wanted
    torch.testing.assert_close(out.loss, other.loss, rtol=rtol, atol=rtol)
    assert grads.keys() == expected.keys()
    size = max(float(grad.abs().max()) for grad in expected.values())
    for name, grad in grads.items():
        torch.testing.assert_close(
            grad,
            expected[name],
            rtol=rtol,
            atol=rtol * size,
            msg=name,
        )
