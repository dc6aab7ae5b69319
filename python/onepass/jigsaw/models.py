"""A causal language model behind a Stained Glass Transform: the teacher, and the student with
adapters.

Both run on one super batch, the clean half first, and on one sample of the noise.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..training.hidden_states import (
    adapter_off,
    blocks_of,
    capture,
    has_adapter,
    no_logits,
    only_blocks,
    training_mode,
    without_adapter,
)
from .cloak import CloakOutput, TransformerCloak


class NoisyOutput(NamedTuple):
    """What a model made of a super batch of B clean and B noisy sequences, in that order."""

    logits: Tensor | None  # [2B, S, V], lazy where the head is; None of a truncated model
    embeddings: Tensor | None  # [2B, S, D] output of the distillation layer, where there is one
    clean_input_embeddings: Tensor  # [B, S, D]
    noisy_input_embeddings: Tensor
    means: Tensor
    stds: Tensor
    attention_mask: Tensor  # [B, S]
    noise_mask: Tensor  # [B, S] or [B, S, D]
    loss_mask: Tensor  # [B, S]


class Sample(NamedTuple):
    """A batch before and after the transform, with its masks."""

    clean: Tensor  # [B, S, D]
    cloaked: CloakOutput
    attention_mask: Tensor
    noise_mask: Tensor


class NoiseCache:
    """One sample of the noise for both models of a pair.

    The first of the two that runs on a batch draws it, the second takes it, and it is let go. A
    model that runs on a batch again draws anew.
    """

    def __init__(self) -> None:
        self._sample: Sample | None = None
        self._batch: tuple[Tensor | None, ...] = ()
        self._owner: object = None

    def take(self, reader: object, batch: tuple[Tensor | None, ...]) -> Sample | None:
        """The sample that another reader drew for these very tensors."""
        mine = self._owner is not reader and len(batch) == len(self._batch)
        if not mine or any(a is not b for a, b in zip(batch, self._batch, strict=True)):
            return None
        sample = self._sample
        self._sample, self._batch, self._owner = None, (), None
        return sample

    def put(self, owner: object, batch: tuple[Tensor | None, ...], sample: Sample) -> None:
        """Keep what `owner` drew for the other one."""
        self._sample, self._batch, self._owner = sample, batch, owner


class NoiseMaskedNoisyTransformerModel(nn.Module):
    """A frozen causal language model that sees embeddings before and after a transform.

    Adapters in the base model are off while it runs, and so is dropout; gradients reach the
    transform and nothing else.

    Args:
        base_model: a causal language model of transformers, alone, which freezes it, or with a PEFT
            adapter.
        cloak: the transform, for embeddings of the model's hidden size.
        distillation_layer_index: decoder layer whose output to keep; negative ones count from the
            end. None: none.
        truncated: the model ends after that layer and makes no logits.
        noise_cache: of the model to share the noise with.

    Raises:
        ValueError: a model without input embeddings or decoder layers, a layer that it has not, a
        transform of another hidden size, truncated without a layer.

    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """

    def __init__(
        self,
        base_model: nn.Module,
        cloak: TransformerCloak,
        *,
        distillation_layer_index: int | None = None,
        truncated: bool = False,
        noise_cache: NoiseCache | None = None,
    ) -> None:
        super().__init__()
        inner = without_adapter(base_model)
        layer = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, Tensor):
            raise ValueError(f"{type(inner).__name__} has no input embeddings to transform")
        if getattr(inner.config, "is_encoder_decoder", False):
            raise ValueError(f"{type(inner).__name__} is no causal language model")
        if weight.shape[-1] != cloak.hidden_size:
            raise ValueError(
                f"the transform is for embeddings of size {cloak.hidden_size}, those of"
                f" {type(inner).__name__} have {weight.shape[-1]}"
            )
        self.base_model, self.cloak = base_model, cloak
        self.noise_cache = NoiseCache() if noise_cache is None else noise_cache
        self.n_layers = len(blocks_of(base_model))
        self.is_truncated = truncated
        self.distillation_layer_index: int | None = None
        self.keep_layer(distillation_layer_index)
        if truncated and distillation_layer_index is None:
            raise ValueError("truncated=True wants a distillation_layer_index to end after")
        if not has_adapter(base_model):  # PEFT has frozen all but its own
            base_model.requires_grad_(False)
        accepted = inspect.signature(inner.forward).parameters
        self._takes_positions = "position_ids" in accepted

    def keep_layer(self, index: int | None) -> None:
        """Keep the output of that decoder layer from now on; None changes nothing.

        Raises:
            ValueError: no such layer, or another than the one that is kept.
        """
        if index is None:
            return
        n = self.n_layers
        if isinstance(index, bool) or not isinstance(index, int) or not -n <= index < n:
            raise ValueError(
                f"distillation_layer_index must be a decoder layer from {-n} to {n - 1}: got"
                f" {index!r}"
            )
        if self.distillation_layer_index not in (None, index % n):
            raise ValueError(
                f"distillation_layer_index {index} is not the one that the model was built with,"
                f" {self.distillation_layer_index}"
            )
        self.distillation_layer_index = index % n

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """Adapters and dropout off. Without training mode nothing is checkpointed either: its
        recomputation would come later, with the adapters on."""
        with training_mode(self.base_model, False), contextlib.ExitStack() as stack:
            if has_adapter(self.base_model):
                stack.enter_context(adapter_off(self.base_model))
            yield

    def embed(self, input_ids: Tensor) -> Tensor:
        """The clean embeddings [B, S, D] of token ids [B, S]."""
        with torch.no_grad():
            embeddings: Tensor = without_adapter(self.base_model).get_input_embeddings()(input_ids)
        return embeddings

    def protect(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        *,
        seed: Tensor | None = None,
    ) -> CloakOutput:
        """The transform of a prompt, for `base_model.generate(inputs_embeds=...)`.

        Args:
            input_ids, attention_mask: [B, S]. noise_mask: [B, S] or [B, S, D]; where None, all that
                the attention mask has.
            seed: see `TransformerCloak`.

        Raises:
            TypeError: not tensors. ValueError: shapes that do not fit.
        """
        return self._draw(input_ids, attention_mask, noise_mask, seed).cloaked

    def _draw(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        noise_mask: Tensor | None,
        seed: Tensor | None = None,
    ) -> Sample:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be a torch.Tensor: got {type(input_ids).__name__}")
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise ValueError(
                f"input_ids must be whole numbers [B, S]: got {input_ids.dtype}"
                f" {list(input_ids.shape)}"
            )
        attended = _mask("attention_mask", attention_mask, input_ids.shape)
        if attended is None:
            attended = torch.ones_like(input_ids)
        noised = _mask("noise_mask", noise_mask, input_ids.shape, self.cloak.hidden_size)
        if noised is None:
            noised = attended
        clean = self.embed(input_ids)
        return Sample(clean, self.cloak(clean, noised, attended, seed=seed), attended, noised)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> NoisyOutput:
        """Run the model on the clean and the noisy half.

        Args:
            input_ids: [B, S]. attention_mask: [B, S]; where None, all tokens.
            noise_mask: [B, S] or [B, S, D] to transform; where None, what attention_mask has.
            loss_mask: [B, S] that protection and guardrails count; where None, what noise_mask has.

        Raises:
            TypeError: not tensors. ValueError: shapes that do not fit.
        """
        counted = _mask("loss_mask", loss_mask, input_ids.shape)
        batch = (input_ids, attention_mask, noise_mask)
        sample = self.noise_cache.take(self, batch)
        if sample is None:
            sample = self._draw(input_ids, attention_mask, noise_mask)
            self.noise_cache.put(self, batch, sample)
        if counted is None:
            noised = sample.noise_mask
            counted = noised if noised.dim() == 2 else (noised != 0).any(-1)
        logits, embeddings = self._run(sample)
        return NoisyOutput(
            logits,
            embeddings,
            sample.clean,
            sample.cloaked.noisy,
            sample.cloaked.means,
            sample.cloaked.stds,
            sample.attention_mask,
            sample.noise_mask,
            counted,
        )

    def _run(self, sample: Sample) -> tuple[Tensor | None, Tensor | None]:
        """(logits [2B, S, V], hidden states [2B, S, D] of the distillation layer)."""
        attention_mask = torch.cat([sample.attention_mask] * 2)
        inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
        inputs["inputs_embeds"] = torch.cat([sample.clean, sample.cloaked.noisy])
        if self._takes_positions:  # else padding on the left would be counted
            inputs["position_ids"] = ((attention_mask != 0).cumsum(-1) - 1).clamp_min(0)
        layer = self.distillation_layer_index
        with self._mode(), contextlib.ExitStack() as stack:
            found: dict[int, Any] = {}
            if layer is not None:
                found = stack.enter_context(capture(self.base_model, [layer], "block"))
            if self.is_truncated and layer is not None:
                stack.enter_context(only_blocks(self.base_model, layer + 1))
                stack.enter_context(no_logits(self.base_model))
            logits = self.base_model(**inputs).logits
        return None if self.is_truncated else logits, None if layer is None else found[layer]


class PeftNoiseMaskedNoisyTransformerModel(NoiseMaskedNoisyTransformerModel):
    """The same with a PEFT adapter, which is on and trained, in the mode that the model is in.

    Build it with `noise_cache=teacher.noise_cache` and the teacher's `cloak`.

    Raises:
        ValueError: also a base model without an adapter, or with trained input embeddings.
    """

    def __init__(self, base_model: nn.Module, cloak: TransformerCloak, **options: Any) -> None:
        if not has_adapter(base_model):
            raise ValueError(
                f"{type(base_model).__name__} has no PEFT adapter: wrap it with peft.get_peft_model"
            )
        embeddings = without_adapter(base_model).get_input_embeddings()
        if any(p.requires_grad for p in embeddings.parameters()):
            raise ValueError(
                "the adapter trains the input embeddings, which the transform starts from: leave"
                " them out of target_modules and modules_to_save"
            )
        super().__init__(base_model, cloak, **options)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        yield


def _mask(name: str, mask: Any, shape: torch.Size, hidden_size: int | None = None) -> Tensor | None:
    """The mask, after checking that it has a flag for each token, or for each feature."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor: got {type(mask).__name__}")
    allowed = [tuple(shape)] + ([(*shape, hidden_size)] if hidden_size is not None else [])
    if tuple(mask.shape) not in allowed:
        wanted = " or ".join(str(list(a)) for a in allowed)
        raise ValueError(f"{name} must be {wanted}, as the input_ids: got {list(mask.shape)}")
    return mask
