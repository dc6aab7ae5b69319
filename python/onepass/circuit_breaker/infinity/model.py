"""A small autoregressive image transformer that is called as FoundationVision's Infinity is.

It predicts an image scale by scale, all cells of a scale at once: self-attention sees a cell's own
scale and the coarser ones, cross-attention the prompt. Modules have Infinity's names, so that
adapters aimed at those find their places here.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...training.hidden_states import blocks_of
from .config import CONFIG, WEIGHTS, InfinityConfig, read_config
from .quantizer import BitQuantizer
from .text import TextCondTuple

LORA_MODULES = ("mat_qkv", "mat_q", "mat_kv", "proj", "fc1", "fc2", "fcg")
POSITION_OCTAVES = 4

ScaleSchedule = Sequence[tuple[int, int, int]]


class SelfAttention(nn.Module):
    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        """x [B, L, C], visible [L, L] (which keys a query sees) -> [B, L, C]."""
        q, k, v = _heads(self.mat_qkv(x), self.num_heads, 3)
        return self.proj(_joined(F.scaled_dot_product_attention(q, k, v, attn_mask=visible)))


class CrossAttention(nn.Module):
    def __init__(self, embed_dim: int, kv_dim: int, num_heads: int, for_attn_pool: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.mat_q: nn.Module | nn.Parameter
        if for_attn_pool:  # one learned query in place of a sequence
            self.mat_q = nn.Parameter(torch.empty(1, 1, embed_dim))
        else:
            self.mat_q = nn.Linear(embed_dim, embed_dim)
        self.mat_kv = nn.Linear(kv_dim, 2 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, x: Tensor | None, text: Tensor, visible: Tensor) -> Tensor:
        """x [B, L, C] (None: the learned query), text [B, T, kv_dim], visible [B, 1, 1, T]."""
        if isinstance(self.mat_q, nn.Parameter):
            query = self.mat_q.expand(len(text), -1, -1)
        else:
            query = self.mat_q(x)
        (q,) = _heads(query, self.num_heads, 1)
        k, v = _heads(self.mat_kv(text), self.num_heads, 2)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k, v, attn_mask=visible)
        return self.proj(_joined(out))


class FFN(nn.Module):
    def __init__(self, embed_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, hidden)
        self.fc2 = nn.Linear(hidden, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class CrossAttnBlock(nn.Module):
    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        C = config.embed_dim
        self.norm = nn.LayerNorm(C, eps=config.norm_eps, elementwise_affine=False)
        self.sa = SelfAttention(C, config.num_heads)
        self.ca_norm = nn.LayerNorm(C, eps=config.norm_eps)
        self.ca = CrossAttention(C, C, config.num_heads, for_attn_pool=False)
        self.ffn = FFN(C, round(C * config.mlp_ratio))
        # gate, scale and shift of either branch, on top of what the prompt says of them
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, C))

    def forward(
        self, x: Tensor, cond_BD: Tensor, ca_kv: tuple[Tensor, Tensor], visible: Tensor
    ) -> Tensor:
        """x [B, L, C], cond_BD [B, 1, 6, C], ca_kv: text and its mask -> [B, L, C]."""
        gate1, gate2, scale1, scale2, shift1, shift2 = (self.ada_gss + cond_BD).unbind(2)
        x = x + (1 + gate1) * self.sa(self.norm(x) * (1 + scale1) + shift1, visible)
        x = x + self.ca(self.ca_norm(x), *ca_kv)
        return x + (1 + gate2) * self.ffn(self.norm(x) * (1 + scale2) + shift2)


class TextAttentivePool(nn.Module):
    def __init__(self, text_channels: int, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.ca = CrossAttention(embed_dim, text_channels, num_heads, for_attn_pool=True)

    def forward(self, text: Tensor, visible: Tensor) -> Tensor:
        """Each prompt as one vector [B, C]."""
        return self.ca(None, text, visible)[:, 0]


class AdaLNBeforeHead(nn.Module):
    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        C = config.embed_dim
        self.norm = nn.LayerNorm(C, eps=config.norm_eps, elementwise_affine=False)
        self.ada_lin = nn.Linear(C, 2 * C)

    def forward(self, x: Tensor, cond_BD: Tensor) -> Tensor:
        scale, shift = self.ada_lin(F.silu(cond_BD))[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class Infinity(nn.Module):
    """`model(text_cond_tuple, x_BLC_wo_prefix, scale_schedule) -> logits [B, L, V]`."""

    def __init__(self, config: InfinityConfig) -> None:
        super().__init__()
        self.config = config
        C = config.embed_dim
        self.cfg_uncond = nn.Parameter(torch.empty(config.text_maxlen, config.text_channels))
        self.text_norm = nn.RMSNorm(config.text_channels, eps=config.norm_eps)
        self.text_proj_for_sos = TextAttentivePool(config.text_channels, C, config.num_heads)
        self.text_proj_for_ca = nn.Sequential(
            nn.Linear(config.text_channels, C), nn.GELU(approximate="tanh"), nn.Linear(C, C)
        )
        self.pos_start = nn.Parameter(torch.empty(1, 1, C))
        self.lvl_embed = nn.Embedding(config.max_scales, C)
        self.pos_embed = nn.Linear(6 * POSITION_OCTAVES, C, bias=False)
        self.word_embed = nn.Linear(config.d_vae, C)
        self.shared_ada_lin = nn.Sequential(nn.SiLU(), nn.Linear(C, 6 * C))
        self.blocks = nn.ModuleList(CrossAttnBlock(config) for _ in range(config.depth))
        self.head_nm = AdaLNBeforeHead(config)
        self.head = nn.Linear(C, config.vocab_size)
        self.cond_drop_rate = config.cond_drop_rate
        self.is_gradient_checkpointing = False
        self._init_weights()

    def _init_weights(self) -> None:
        std = math.sqrt(1 / self.config.embed_dim / 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.trunc_normal_(module.weight, std=std)
            elif isinstance(module, CrossAttention) and isinstance(module.mat_q, nn.Parameter):
                nn.init.trunc_normal_(module.mat_q, std=std)
        nn.init.trunc_normal_(self.pos_start, std=std)
        nn.init.normal_(self.cfg_uncond, std=self.config.text_channels**-0.5)

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """In training keep no activation of the blocks but their inputs; backward makes them again.

        Forward hooks on a block then run a second time, in backward.
        """
        if (gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant: got True, wanted False: adapters get no gradient else")
        self.is_gradient_checkpointing = True

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """The same under the name that transformers calls it by from 5.2x on."""
        if every_n_layers != 1 or offload:
            raise ValueError(
                f"got every_n_layers={every_n_layers} and offload={offload}, wanted 1 and False"
            )
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_disable(self) -> None:
        self.is_gradient_checkpointing = False

    def forward(
        self, text_cond_tuple: TextCondTuple, x_BLC_wo_prefix: Tensor, scale_schedule: ScaleSchedule
    ) -> Tensor:
        """Logits [B, L, V] of every cell of every scale, L = sum of t*h*w.

        Args:
            text_cond_tuple: (kv_compact, lens, cu_seqlens_k, Ltext) of B prompts; see text.py.
            x_BLC_wo_prefix: [B, L-1, d_vae], for each cell of the scales after the first what the
                coarser ones have drawn there.
            scale_schedule: (t, h, w) of each scale; the first is (1, 1, 1).
        """
        self._check(text_cond_tuple, x_BLC_wo_prefix, scale_schedule)
        dtype = self.word_embed.weight.dtype
        kv_compact, lens, cu_seqlens_k, _ = text_cond_tuple
        kv_compact = kv_compact.to(self.device, dtype)
        if self.training and self.cond_drop_rate:
            dropped = torch.rand(len(lens)) < self.cond_drop_rate
            kv_compact = self._without_text(kv_compact, lens, dropped.tolist())
        text, text_visible = _padded(self.text_norm(kv_compact), lens, cu_seqlens_k)
        cond_BD = self.text_proj_for_sos(text, text_visible)
        ca_kv = self.text_proj_for_ca(text), text_visible
        cond_6 = self.shared_ada_lin(cond_BD).unflatten(-1, (1, 6, -1))  # [B, 1, 6, C]

        level, position = _places(scale_schedule, self.device)
        x = self.word_embed(x_BLC_wo_prefix.to(self.device, dtype))
        x = torch.cat([cond_BD[:, None] + self.pos_start, x], 1)
        x = x + self.lvl_embed(level) + self.pos_embed(position.to(dtype))
        visible = level[:, None] >= level[None, :]
        for block in self.blocks:
            if self.training and self.is_gradient_checkpointing:
                x = checkpoint(block, x, cond_6, ca_kv, visible, use_reentrant=False)
            else:
                x = block(x, cond_6, ca_kv, visible)
        return self.head(self.head_nm(x, cond_BD))

    def unconditional(self, text_cond_tuple: TextCondTuple) -> TextCondTuple:
        """What training puts in the place of prompts that it drops, with the same lengths."""
        kv_compact, lens, cu_seqlens_k, Ltext = text_cond_tuple
        kv_compact = kv_compact.to(self.device, self.cfg_uncond.dtype)
        return self._without_text(kv_compact, lens, [True] * len(lens)), lens, cu_seqlens_k, Ltext

    def _without_text(self, kv_compact: Tensor, lens: list[int], dropped: list[bool]) -> Tensor:
        parts = zip(kv_compact.split(lens), dropped, strict=True)
        return torch.cat([self.cfg_uncond[: len(kv)] if drop else kv for kv, drop in parts])

    def _check(
        self, text_cond_tuple: TextCondTuple, x_BLC_wo_prefix: Tensor, scale_schedule: ScaleSchedule
    ) -> None:
        config = self.config
        kv_compact, lens, cu_seqlens_k, Ltext = text_cond_tuple
        if kv_compact.shape != (sum(lens), config.text_channels):
            raise ValueError(
                f"kv_compact: got shape {tuple(kv_compact.shape)}, wanted [sum of lens, "
                f"text_channels], {(sum(lens), config.text_channels)}"
            )
        if not lens or min(lens) < 1 or max(lens) > config.text_maxlen or Ltext != max(lens):
            raise ValueError(
                f"lens: got {lens} with Ltext {Ltext}, wanted lengths from 1 to "
                f"{config.text_maxlen}, and Ltext the longest"
            )
        starts = [0, *accumulate(lens)]
        on_cpu = cu_seqlens_k.device.type == "cpu"  # elsewhere a look at the values would wait
        if cu_seqlens_k.shape != (len(starts),) or (on_cpu and cu_seqlens_k.tolist() != starts):
            got = cu_seqlens_k.tolist() if on_cpu else f"shape {tuple(cu_seqlens_k.shape)}"
            raise ValueError(
                f"cu_seqlens_k: got {got}, wanted the {len(starts)} sums of lens, {starts}"
            )
        if not scale_schedule or math.prod(scale_schedule[0]) != 1:
            raise ValueError(f"scale_schedule: got {scale_schedule}, wanted (1, 1, 1) as the first")
        if len(scale_schedule) > config.max_scales:
            raise ValueError(
                f"scale_schedule: got {len(scale_schedule)} scales, wanted at most "
                f"{config.max_scales}"
            )
        n_cells = sum(math.prod(scale) for scale in scale_schedule)
        if x_BLC_wo_prefix.shape != (len(lens), n_cells - 1, config.d_vae):
            raise ValueError(
                f"x_BLC_wo_prefix: got shape {tuple(x_BLC_wo_prefix.shape)}, wanted "
                f"[B, L-1, d_vae], {(len(lens), n_cells - 1, config.d_vae)}"
            )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each complete or not at all."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            config, weights = Path(partial, CONFIG), Path(partial, WEIGHTS)
            config.write_text(json.dumps(self.config.to_dict(), indent=2) + "\n", "utf-8")
            state = {name: value.contiguous() for name, value in self.state_dict().items()}
            save_file(state, weights, metadata={"format": "pt"})
            for file in (weights, config):
                os.replace(file, folder / file.name)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Infinity:
        """The model that `save_pretrained` wrote, in evaluation mode."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        config = read_config(folder)
        weights = Path(folder, WEIGHTS)
        if not weights.is_file():
            raise FileNotFoundError(f"{folder}: no {WEIGHTS} beside {CONFIG}")
        model = cls(config)
        try:
            model.load_state_dict(load_file(weights))
        except (SafetensorError, RuntimeError) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"{weights}: not the weights of this {CONFIG}: {why}") from None
        return model.eval()


def lora_target_modules(
    model: nn.Module, layers: Iterable[int], modules: Iterable[str] = LORA_MODULES
) -> list[str]:
    """`target_modules` for peft: the whole names of these linear layers in these blocks, wherever
    the model keeps its blocks (in chunks, too).

    peft's own layers_to_transform finds no block of a model whose `blocks` are at the top.
    """
    blocks, wanted = blocks_of(model), set(modules)
    chosen = {id(blocks[layer]) for layer in layers}
    return [
        f"{path}.{name}"
        for path, block in model.named_modules()
        if id(block) in chosen
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in wanted
    ]


@torch.no_grad()
def generate(
    model: Infinity,
    text_cond_tuple: TextCondTuple,
    quantizer: BitQuantizer,
    *,
    cfg: float = 1.0,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images [B, channels, H, W] of the prompts, scale by scale.

    Args:
        cfg: guidance; above 1 the logits move away from those without the prompt. Worth something
            only in a model trained with cond_drop_rate.
        temperature: of the draw; 0 takes the likeliest label.
        generator: on the CPU, where labels are drawn.
    """
    training = model.training
    model.eval()
    without = model.unconditional(text_cond_tuple)
    schedule = quantizer.scale_schedule
    n_prompts = len(text_cond_tuple[1])
    x = torch.zeros(n_prompts, 0, quantizer.channels, device=model.device)
    drawn: Tensor | None = None
    labels: list[Tensor] = []
    for scale, (_, h, w) in enumerate(schedule):
        if drawn is not None:
            x = torch.cat([x, quantizer.next_input(drawn, scale)], 1)
        logits = model(text_cond_tuple, x, schedule[: scale + 1])[:, -h * w :].float()
        if cfg != 1:
            other = model(without, x, schedule[: scale + 1])[:, -h * w :].float()
            logits = other + cfg * (logits - other)
        if temperature:
            p = (logits / temperature).softmax(-1).flatten(0, 1).cpu()
            found = torch.multinomial(p, 1, generator=generator).view(n_prompts, h * w)
        else:
            found = logits.argmax(-1)
        labels.append(found.to(model.device))
        added = quantizer.drawing(labels[-1], scale)
        drawn = added if drawn is None else drawn + added
    model.train(training)
    return quantizer.decode(labels)


def _heads(x: Tensor, num_heads: int, parts: int) -> tuple[Tensor, ...]:
    """[B, L, parts * C] -> `parts` tensors [B, heads, L, C / heads]."""
    return x.unflatten(-1, (parts, num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def _padded(kv_compact: Tensor, lens: list[int], cu_seqlens_k: Tensor) -> tuple[Tensor, Tensor]:
    """The packed text as rows [B, T, C], and what of them is text [B, 1, 1, T]."""
    starts = cu_seqlens_k.to(kv_compact.device, torch.int64)
    place = starts[:-1, None] + torch.arange(max(lens), device=kv_compact.device)
    visible = place < starts[1:, None]
    return kv_compact[place.where(visible, starts[:-1, None])], visible[:, None, None]


def _places(scale_schedule: ScaleSchedule, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each cell's scale [L], and where it lies in the image as waves [L, 6 * octaves]."""
    level, where = [], []
    for scale, (t, h, w) in enumerate(scale_schedule):
        middles = [(torch.arange(n, device=device) + 0.5) / n for n in (t, h, w)]
        where.append(torch.cartesian_prod(*middles))
        level += [scale] * (t * h * w)
    octaves = math.pi * 2.0 ** torch.arange(POSITION_OCTAVES, device=device)
    angles = (torch.cat(where)[..., None] * octaves).flatten(1)
    return torch.tensor(level, device=device), torch.cat([angles.sin(), angles.cos()], 1)
