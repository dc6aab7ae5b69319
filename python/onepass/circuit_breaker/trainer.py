"""`CircuitBreakerTrainer`: representation rerouting as a transformers.Trainer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from ..heads import unwrapped
from ..training.hidden_states import blocks_of
from ..training.lora import has_lora
from ..training.monitor import check_one_gpu, forget_evaluation, logs_step, means_of
from ..training.processes import prepare_reference, shard_now
from .adapter import jitter, jitter_weights
from .arguments import LorraArguments
from .data import data_collator
from .loss import Rerouting, Terms, log_of, rerouting_loss
from .losses import at_progress
from .options import ADAPTER_OFF


class CircuitBreakerTrainer(Trainer):
    """Turns the hidden states of harmful prompts away, holds all others in place.

    Args:
        model: a causal language model with a PEFT adapter, or without one if `peft_config` is
            given, or if `reference` is a frozen copy.
        args: transformers.TrainingArguments. remove_unused_columns becomes False.
        lorra_args: layers, coefficients, losses.
        reference: the model before training: "adapter_off", a frozen module, or "precomputed": the
            batches bring the keys of `reference_hidden_states`.
        peft_config: an adapter to put on the model.
        others: as transformers.Trainer; data_collator is that of the batches of
            `CircuitBreakerDataset` unless given.

    Each log of the training has circuit_breaker/{retain,cb}_{coeff,loss} as means since the last
    one, and of its own step the cosine to the reference and both norms, for retain, cb and val.
    """

    needs_adapter = True  # where the reference is the model with its adapter off
    loss_is_scaled_for_ga = False  # a batch's mean: the Trainer divides it by the accumulation

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Any = data_collator,
        train_dataset: Any = None,
        *,
        lorra_args: LorraArguments | None = None,
        reference: str | nn.Module = ADAPTER_OFF,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        lorra = LorraArguments() if lorra_args is None else lorra_args
        self.lorra_args = lorra
        self.rerouting = self.make_rerouting(model, lorra, reference)
        self.rerouting.check(model)
        args = TrainingArguments("trainer_output") if args is None else args
        if peft_config is not None:
            from peft import get_peft_model

            set_seed(args.seed)  # the Trainer does so only later
            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        inner = unwrapped(model)
        _check_trained(inner, reference)
        if (
            self.needs_adapter
            and reference == ADAPTER_OFF
            and not hasattr(inner, "disable_adapter")
        ):
            raise ValueError(
                f"reference={ADAPTER_OFF!r} needs a PEFT adapter, {type(inner).__name__} has none:"
                " pass peft_config, or a frozen copy as reference"
            )
        args.remove_unused_columns = False
        args.label_names = args.label_names or []
        if args.ddp_find_unused_parameters is None:
            # Each step runs the model twice, to different depths; every weight of the adapter is
            # used by one of the two, and DDP would take it for unused in the other.
            args.ddp_find_unused_parameters = False
        super().__init__(model, args, data_collator, train_dataset, **others)
        check_one_gpu(self.args)
        self.model_accepts_loss_kwargs = False
        if isinstance(reference, nn.Module):  # to the device, and under the model's autocast
            prepare_reference(self, reference)
        if lorra.init_jitter and isinstance(reference, nn.Module) and not has_lora(inner):
            jitter_weights(inner, lorra.init_jitter, self.args.seed)
        elif lorra.init_jitter:
            jitter(inner, lorra.init_jitter, self.args.seed)
        self.current_training_step = 1
        self._noted: dict[str, list[Tensor]] = defaultdict(list)

    def make_rerouting(
        self, model: nn.Module, lorra: LorraArguments, reference: str | nn.Module
    ) -> Rerouting:
        """What a step compares, of what the trainer was told."""
        return Rerouting(
            target_layers=lorra.layers_of(len(blocks_of(model))),
            reference=reference,
            full_layers=lorra.full_layers,
            retain_reduction=lorra.retain_reduction,
            relu_scope=lorra.relu_scope,
        )

    def rerouting_of(self, reference: str | nn.Module) -> Rerouting:
        """The trainer's `rerouting` against another reference."""
        return replace(self.rerouting, reference=reference)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, also after an evaluation over several processes."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def get_training_progress(self) -> float:
        """Where the schedule stands: 1/2 at the end of the training."""
        return min(self.current_training_step / (2 * max(self.state.max_steps, 1)), 0.5)

    def coefficients(self) -> tuple[float, float]:
        """(retain_coeff, cb_coeff) at the progress made."""
        lorra = self.lorra_args
        return at_progress(self.get_training_progress(), lorra.lorra_alpha, lorra.coeff_schedule)

    def terms(self, model: nn.Module, inputs: dict[str, Any], monitor: bool) -> Terms:
        """The loss of a batch, and what to log of it."""
        coefficients = self.coefficients()
        return rerouting_loss(model, inputs, coefficients, self.rerouting, monitor=monitor)

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; with `return_outputs` also a dict of its detached terms."""
        if model.training:
            self.current_training_step = self.state.global_step + 1  # optimizer steps, not batches
        terms = self.terms(
            model, inputs, model.training and logs_step(self, self.current_training_step)
        )
        if model.training:
            for name, value in terms.facts.items():
                self._noted[name].append(value)
        return (terms.loss, terms.facts) if return_outputs else terms.loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """(loss, None, None): a batch has no logits."""
        with torch.no_grad():
            terms = self.terms(model, self._prepare_inputs(inputs), monitor=False)
        return terms.loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop, also before the training, of a model that is sharded."""
        shard_now(self)
        return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log, with the means of what the steps since the last one noted."""
        if self._noted and "loss" in logs:
            noted, self._noted = self._noted, defaultdict(list)
            del noted["loss"]  # the Trainer's own
            logs = {**logs, **log_of(means_of(self, noted), self.coefficients())}
        super().log(logs, *args, **kwargs)


def _check_trained(model: Any, reference: str | nn.Module) -> None:
    """ValueError for trained weights that no step reaches, or that no switch turns off."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if isinstance(head, nn.Module) and any(p.requires_grad for p in head.parameters()):
        if hasattr(model, "peft_config"):
            raise ValueError(
                "the output head is among what the adapter trains, but never runs: leave it out of"
                " lora_modules_to_save and target_modules"
            )
    configs = getattr(model, "peft_config", {})
    biases = {getattr(config, "bias", "none") for config in configs.values()} - {"none"}
    if biases and reference == ADAPTER_OFF:
        raise ValueError(
            f"bias={sorted(biases)[0]!r} trains biases that stay on with the adapter off: use"
            ' bias="none", or a frozen copy as reference'
        )
