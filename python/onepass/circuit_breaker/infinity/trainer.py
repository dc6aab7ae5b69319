"""`InfinityCircuitBreakerTrainer`: the rerouting of an Infinity-style model as a Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..arguments import LorraArguments
from ..loss import Rerouting, Terms
from ..options import ADAPTER_OFF
from ..trainer import CircuitBreakerTrainer
from .arguments import InfinityArguments
from .data import data_collator_infinity
from .loss import infinity_rerouting, infinity_rerouting_loss, schedule_of
from .task import task_loss
from .weights import unfreeze


class _Watch(TrainerCallback):
    """Tells the data set its epoch, which launchers do not; looks whether all that is to be trained
    is reached."""

    def __init__(self, trainer: InfinityCircuitBreakerTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if hasattr(self.trainer.train_dataset, "set_epoch"):
            self.trainer.train_dataset.set_epoch(int(state.epoch + 1e-6))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step or args.deepspeed:
            return
        weights = self.trainer.model.named_parameters()
        if idle := [
            name for name, weight in weights if weight.requires_grad and weight.grad is None
        ]:
            raise RuntimeError(
                f"{len(idle)} weights are to be trained and get no gradient ({idle[0]}): a layer"
                " whose weight the model uses without calling the layer has no use for LoRA; name"
                " others in lora_target_modules, or train it itself (unfreeze_*)"
            )


class InfinityCircuitBreakerTrainer(CircuitBreakerTrainer):
    """Turns an image model's hidden states under harmful prompts away, holds all others in place.

    Args:
        model: called as Infinity is, with a PEFT adapter, or without one if `peft_config` is given
            or if `reference` is a frozen copy.
        args: transformers.TrainingArguments. remove_unused_columns becomes False.
        infinity_args: layers, coefficients, losses.
        reference: the model before training: "adapter_off" or a frozen module.
        scale_schedule: (t, h, w) of each scale, where batches do not say.
        others: as `CircuitBreakerTrainer`; data_collator is that of the batches of
            `InfinityCircuitBreakerDataset` unless given.

    A batch with `x_BLC_wo_prefix` and `labels` has a task loss too; the loss is the sum. With a
    task_type that is not "circuit_breaker" it is the task loss alone. Logs are those of
    `CircuitBreakerTrainer`, and circuit_breaker/task_loss.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Any = data_collator_infinity,
        train_dataset: Any = None,
        *,
        infinity_args: InfinityArguments | None = None,
        reference: str | nn.Module = ADAPTER_OFF,
        scale_schedule: Sequence[Sequence[int]] | None = None,
        **others: Any,
    ) -> None:
        self.infinity_args = InfinityArguments() if infinity_args is None else infinity_args
        self.needs_adapter = self.infinity_args.breaks
        self.scale_schedule = scale_schedule
        lorra = self.infinity_args.lorra()
        if self.infinity_args.unfrozen:
            unfreeze(model, self.infinity_args)
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            lorra_args=lorra,
            reference=reference,
            **others,
        )
        self.add_callback(_Watch(self))

    def make_rerouting(
        self, model: nn.Module, lorra: LorraArguments, reference: str | nn.Module
    ) -> Rerouting:
        """What a step compares, of what the trainer was told."""
        return infinity_rerouting(
            self.infinity_args.target_layers,
            reference,
            retain_reduction=lorra.retain_reduction,
            relu_scope=lorra.relu_scope,
        )

    @property
    def reference_model(self) -> nn.Module | None:
        """The frozen copy, where the reference is one."""
        reference = self.rerouting.reference
        return reference if isinstance(reference, nn.Module) else None

    @property
    def prog_it(self) -> int:
        """The optimizer step under way, from 1."""
        return self.current_training_step

    @property
    def max_it(self) -> int:
        """Twice the steps of the training: the schedule ends at a progress of 1/2, as published
        for language models. Up to 1 the harmful side would be left alone at the end, and return."""
        return 2 * max(self.state.max_steps, 1)

    def coefficients(self) -> tuple[float, float]:
        """(retain_coeff, cb_coeff) at the progress made."""
        return super().coefficients() if self.infinity_args.breaks else (0.0, 0.0)

    def terms(self, model: nn.Module, inputs: dict[str, Any], monitor: bool) -> Terms:
        """The loss of a batch, and what to log of it."""
        scales = schedule_of(inputs, self.scale_schedule)
        loss: Tensor | None = None
        facts: dict[str, Tensor] = {}
        if self.infinity_args.breaks and "text_cond_tuple_circuit_breaker" in inputs:
            # Attention masks are the text's: the image's tokens all count.
            prompts = {k: v for k, v in inputs.items() if not k.startswith("attention_mask")}
            loss, facts = infinity_rerouting_loss(
                model,
                prompts,
                self.coefficients(),
                self.rerouting,
                scale_schedule=scales,
                seed=self.args.seed + self.prog_it,
                monitor=monitor,
            )
        if "labels" in inputs:
            task = task_loss(model, inputs, scales)
            loss = task if loss is None else loss + task
            facts = {**facts, "task_loss": task.detach()}
        if loss is None:
            raise ValueError(
                f"a batch of {', '.join(sorted(inputs))} has nothing to train on: wanted"
                " text_cond_tuple_circuit_breaker with task_type='circuit_breaker', or labels"
            )
        return Terms(loss, {**facts, "loss": loss.detach()})
