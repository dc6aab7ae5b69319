"""Teacher and student: a causal language model on a super batch of embeddings before and after a
Stained Glass transform.

Rows [0:B] are clean, rows [B:2B] noisy, and both models see one sample of the noise. The embeddings
are the base model's own, frozen: whoever transforms them has no adapter.
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed, nn

from ..ops._check import check_same_device, check_weights, values_checked
from ..training.hidden_states import (
    adapter_off,
    blocks_of,
    capture,
    has_adapter,
    no_logits,
    only_blocks,
    trained_beside_adapter,
    training_mode,
    without_adapter,
)
from ..zero3 import shape_of
from .cloak import CloakOutput, TransformerCloak
from .input_losses import positions

RANKS_APART = 0x9E3779B97F4A7C15  # odd: no two ranks' bits agree


# Neither a tuple nor a mapping: what wraps a model for mixed precision copies those, tensor by
# tensor, and would make logits of lazy ones and two samples of one.
@dataclass(frozen=True, eq=False)
class NoisyOutput:
    """What a model made of B sequences before and after the transform, and the masks it used."""

    logits: Tensor | None  # [2B, S, V], lazy where the head is; None of a truncated model
    embeddings: Tensor | None  # [2B, S, D] output of the distillation layer, where one is kept
    clean_input_embeddings: Tensor  # [B, S, D]
    noisy_input_embeddings: Tensor
    means: Tensor
    stds: Tensor
    attention_mask: Tensor  # [B, S]
    noise_mask: Tensor  # [B, S] or [B, S, D], nowhere where attention_mask is 0
    loss_mask: Tensor  # [B, S]


class Sample(NamedTuple):
    """One sample of the noise for one batch."""

    clean: Tensor  # [B, S, D]
    cloaked: CloakOutput
    noise_mask: Tensor


Batch = tuple[Tensor | None, ...]


class NoiseCache:
    """One sample of the noise a batch for all models that share the cache.

    The first of them that runs on a batch draws it, the others take it, and with the last it is let
    go. A batch is the same where its tensors are, unchanged since, under the same gradient mode. A
    model that runs on a batch again draws anew.
    """

    def __init__(self) -> None:
        self._n_readers = 0
        self._waiting: set[int] = set()
        self._batch: Batch = ()
        self._state: tuple[Any, ...] = ()
        self._sample: Sample | None = None

    def join(self) -> int:
        """The number of a reader, for a model that shares the cache."""
        self._n_readers += 1
        return self._n_readers - 1

    def sample(self, reader: int, batch: Batch, draw: Callable[[], Sample]) -> Sample:
        """What another reader drew for these tensors, or what `draw` gives."""
        state = (torch.is_grad_enabled(), *map(_version, batch))
        is_same = (
            self._sample is not None
            and reader in self._waiting
            and state == self._state
            and all(a is b for a, b in zip(batch, self._batch, strict=True))
        )
        if not is_same:
            self._release()  # before another takes its memory
            self._sample = draw()
            self._batch, self._state = batch, state
            self._waiting = set(range(self._n_readers))
        sample = self._sample
        assert sample is not None
        self._waiting.discard(reader)
        if not self._waiting:
            self._release()
        return sample

    def _release(self) -> None:
        self._sample, self._batch, self._waiting = None, (), set()


def _version(tensor: Tensor | None) -> int | None:
    """Grows with each change in place; tensors made in inference mode do not count theirs."""
    return None if tensor is None or tensor.is_inference() else tensor._version


class NoiseMaskedNoisyTransformerModel(nn.Module):
    """The base model behind a transform: the teacher.

    Adapters and dropout are off while it runs. Its weights are frozen, while gradients pass through
    it to the transform. Nothing of it is checkpointed: a recomputation would come in the backward,
    when the adapters are on again.

    Args:
        base_model: a causal language model of transformers. One without adapters is frozen; of one
            with adapters of PEFT's (wrapped, or put into it) PEFT has frozen the rest.
        cloak: the transform, for embeddings of the model's hidden size.
        distillation_layer_index: decoder layer whose output to keep; negative ones count from the
            end; None keeps none.
        truncated: end after that layer, and make no logits.
        noise_cache: that of the model to share noise with.

    Raises:
        ValueError: a model without input embeddings, with adapters on them or trained ones, or of
        an encoder and a decoder; no such layer; truncated without a layer; a transform of another
        hidden size.

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
        weight = getattr(_input_embeddings(inner), "weight", None)
        kind = type(inner).__name__
        if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"{kind} has an encoder: wanted a causal language model")
        if not isinstance(weight, Tensor) or len(shape_of(weight)) != 2:
            raise ValueError(
                f"{kind} has no input embeddings: wanted get_input_embeddings() to return a layer"
                " with a weight [V, D]"
            )
        width = shape_of(weight)[1]
        if width != cloak.hidden_size:
            raise ValueError(
                f"the transform is for embeddings of size {cloak.hidden_size}, those of {kind} have"
                f" {width}: make one with TransformerCloak.from_model"
            )
        n_layers = len(blocks_of(base_model))
        layer = _layer_of(distillation_layer_index, n_layers)
        if truncated and layer is None:
            raise ValueError(
                "truncated=True needs a distillation_layer_index, the layer to end after: got None"
            )
        if not has_adapter(base_model):
            base_model.requires_grad_(False)
        elif has_adapter(_input_embeddings(inner)) or weight.requires_grad:
            raise ValueError(
                f"the input embeddings of {kind} are trained, but the transform starts from the"
                " base model's: leave them out of target_modules and modules_to_save"
            )
        elif foreign := trained_beside_adapter(base_model):
            raise ValueError(
                f"{foreign} is trained, but is no part of the adapter: the teacher would change"
                ' with it; use bias="none", and requires_grad_(False) for weights of the model'
            )
        self.base_model, self.cloak = base_model, cloak
        self.distillation_layer_index, self.is_truncated = layer, truncated
        self.n_layers = n_layers
        self.noise_cache = NoiseCache() if noise_cache is None else noise_cache
        self._reader = self.noise_cache.join()
        self._takes_positions = "position_ids" in inspect.signature(inner.forward).parameters

    def keep_layer(self, index: int | None) -> None:
        """Keep the output of this decoder layer from now on; None leaves it as it is.

        Raises:
            ValueError: no such layer, or another one is kept.
        """
        layer, kept = _layer_of(index, self.n_layers), self.distillation_layer_index
        if layer is None:
            return
        if kept not in (None, layer):
            raise ValueError(
                f"distillation_layer_index must be {kept}, which the model was built with: got"
                f" {index}"
            )
        self.distillation_layer_index = layer

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> NoisyOutput:
        """Run on the super batch.

        Args:
            input_ids: [B, S].
            attention_mask: [B, S]; None: all ones. Padding may be on either side.
            noise_mask: [B, S] or [B, S, D], nonzero where to transform, within attention_mask;
                None: all of it.
            loss_mask: [B, S] that protection and guardrails count; None: what is transformed.

        Raises:
            TypeError: not tensors. ValueError: shapes, dtypes, devices or ids that do not fit.
        """
        self._check(input_ids, attention_mask, noise_mask, loss_mask)
        batch = (input_ids, attention_mask, noise_mask)
        sample = self.noise_cache.sample(
            self._reader, batch, lambda: self._draw(*batch, seed=_training_seed(input_ids.device))
        )
        logits, embeddings = self._run(sample, attention_mask)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if loss_mask is None:
            noised = sample.noise_mask
            loss_mask = noised if noised.dim() == 2 else (noised != 0).any(-1)
        return NoisyOutput(
            logits,
            embeddings,
            sample.clean,
            sample.cloaked.noisy,
            sample.cloaked.means,
            sample.cloaked.stds,
            attention_mask,
            sample.noise_mask,
            loss_mask,
        )

    @torch.no_grad()
    def protect(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        noise_mask: Tensor | None = None,
        *,
        seed: Tensor | int | None = None,
    ) -> CloakOutput:
        """The transform of a prompt alone: its `noisy` is what
        `base_model.generate(inputs_embeds=..., attention_mask=...)` takes.

        Args:
            input_ids, attention_mask, noise_mask: as in `forward`.
            seed: of the noise, as in `TransformerCloak.forward`; None draws one from the operating
                system's generator: torch's repeats itself where an application seeds it.

        Raises:
            As `forward`.
        """
        if seed is None:
            seed = secrets.randbits(63)
        self._check(input_ids, attention_mask, noise_mask, None)
        return self._draw(input_ids, attention_mask, noise_mask, seed=seed).cloaked

    def _check(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        noise_mask: Tensor | None,
        loss_mask: Tensor | None,
    ) -> None:
        if not isinstance(input_ids, Tensor):
            raise TypeError(f"input_ids must be a torch.Tensor: got {type(input_ids).__name__}")
        shape, dtype = tuple(input_ids.shape), input_ids.dtype
        if dtype not in (torch.int64, torch.int32) or len(shape) != 2 or 0 in shape:
            raise ValueError(f"input_ids must be integers [B, S], not empty: got {dtype} {shape}")
        vocabulary, width = shape_of(self._embedding_layer().weight)
        if values_checked(input_ids):
            low, high = int(input_ids.min()), int(input_ids.max())
            if low < 0 or high >= vocabulary:
                raise ValueError(
                    f"input_ids must be from 0 to {vocabulary - 1}, the vocabulary: got"
                    f" {low if low < 0 else high}"
                )
        check_weights("attention_mask", attention_mask, shape)
        check_weights("loss_mask", loss_mask, shape)
        if noise_mask is not None:
            positions(noise_mask, (*shape, width))
        masks = {
            "attention_mask": attention_mask,
            "noise_mask": noise_mask,
            "loss_mask": loss_mask,
        }
        for name, mask in masks.items():
            if mask is not None:
                check_same_device(name, mask, "input_ids", input_ids)

    def _embedding_layer(self) -> Any:
        return _input_embeddings(without_adapter(self.base_model))

    def _draw(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        noise_mask: Tensor | None,
        *,
        seed: Tensor | int | None,
    ) -> Sample:
        with torch.no_grad():  # detached: training with checkpoints makes the layer's output a leaf
            clean = self._embedding_layer()(input_ids).detach()
        attended = None if attention_mask is None else attention_mask != 0
        if noise_mask is None:
            noised = torch.ones_like(input_ids, dtype=torch.bool) if attended is None else attended
        else:
            noised = noise_mask != 0
            if attended is not None:
                noised = noised & (attended if noised.dim() == 2 else attended.unsqueeze(-1))
        return Sample(clean, self.cloak(clean, noised, attention_mask, seed=seed), noised)

    def _run(
        self, sample: Sample, attention_mask: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits [2B, S, V], output of the distillation layer [2B, S, D])."""
        embeddings = torch.cat([sample.clean, sample.cloaked.noisy])
        inputs: dict[str, Any] = {"inputs_embeds": embeddings, "use_cache": False}
        if attention_mask is not None:
            inputs["attention_mask"] = torch.cat([attention_mask, attention_mask])
            if self._takes_positions:  # else padding on the left would count
                positions = ((attention_mask != 0).cumsum(-1) - 1).clamp_min(0)
                inputs["position_ids"] = torch.cat([positions, positions])
        layer = self.distillation_layer_index
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._mode())
            found: dict[int, Any] = {}
            if self.is_truncated:
                assert layer is not None
                stack.enter_context(only_blocks(self.base_model, layer + 1))
                stack.enter_context(no_logits(self.base_model))
            if layer is not None:
                found = stack.enter_context(capture(self.base_model, [layer], "block"))
            logits = self.base_model(**inputs).logits
        hidden = None if layer is None else found[layer]
        if hidden is not None and embeddings.requires_grad and not hidden.requires_grad:
            raise RuntimeError(
                f"the output of decoder layer {layer} has no gradient: with gradient checkpointing"
                " pass gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        return None if self.is_truncated else logits, hidden

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        """Adapters, dropout and (with the training mode) checkpoints off."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(training_mode(self.base_model, False))
            if has_adapter(self.base_model):
                stack.enter_context(adapter_off(self.base_model))
            yield


class PeftNoiseMaskedNoisyTransformerModel(NoiseMaskedNoisyTransformerModel):
    """The base model with its adapters on, in its own mode, behind a transform: the student.

    Args:
        base_model: as above, with adapters of PEFT's.
        cloak, noise_cache: those of the teacher, for one transform and one noise.
        others: as above.

    Raises:
        ValueError: as above, and for a model without adapters in its layers.
    """

    def __init__(self, base_model: nn.Module, cloak: TransformerCloak, **options: Any) -> None:
        if not has_adapter(without_adapter(base_model)):
            raise ValueError(
                f"{type(base_model).__name__} has no PEFT adapter in its layers: wrap it with"
                " peft.get_peft_model, with LoRA or another that is no prompt"
            )
        super().__init__(base_model, cloak, **options)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        yield


def _training_seed(device: torch.device) -> Tensor:
    """Of the next noise, from torch's generator; each process of a group has its own, though all
    begin with one seed."""
    seed = torch.randint(2**63 - 1, (), dtype=torch.int64, device=device)
    if distributed.is_available() and distributed.is_initialized():
        seed = seed ^ (distributed.get_rank() * RANKS_APART & (2**63 - 1))
    return seed


def _input_embeddings(inner: Any) -> Any:
    try:
        return inner.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _layer_of(index: int | None, n_layers: int) -> int | None:
    """The layer counted from 0; ValueError where the model has none of that number."""
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not -n_layers <= index < n_layers:
        raise ValueError(
            f"distillation_layer_index must be a decoder layer from {-n_layers} to {n_layers - 1}:"
            f" got {index!r}"
        )
    return index % n_layers
