"""`JigsawTrainer`: a Stained Glass Transform and the adapter that understands it, trained together
as a transformers.Trainer."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed

from ..heads import unwrapped
from ..reduce import masked_mean
from ..training.hidden_states import blocks_of, make_lazy, same_draws
from ..training.lora import lora_in_blocks
from ..training.monitor import check_one_gpu, forget_evaluation, logs_step, means_of
from ..training.processes import is_sharded, shard_now, whole_state
from .arguments import JigsawArguments
from .cloak import TransformerCloak
from .data import data_collator
from .evaluate import facts_of
from .loss import jigsaw_sgt_loss_factory
from .models import (
    NoiseMaskedNoisyTransformerModel,
    NoisyOutput,
    PeftNoiseMaskedNoisyTransformerModel,
)

if TYPE_CHECKING:
    from peft import LoraConfig

    from ..training.flags import LoraFlags

ADAPTER, SGT = "adapter", "sgt"  # folders of a checkpoint


class JigsawModel(nn.Module):
    """Teacher and student over one base model, and their loss: one forward, as DDP wants it.

    Args:
        model: a causal language model with a PEFT adapter: with it the student, without it the
            teacher.
        cloak: the transform.
        jigsaw: of the loss. Without a cross-entropy in it both end at the distillation layer.

    Raises:
        ValueError: what the loss's factory refuses.
    """

    def __init__(self, model: nn.Module, cloak: TransformerCloak, jigsaw: JigsawArguments) -> None:
        super().__init__()
        options: dict[str, Any] = {
            "distillation_layer_index": jigsaw.distillation_layer_index,
            "truncated": jigsaw.is_truncated,
        }
        self.teacher = NoiseMaskedNoisyTransformerModel(model, cloak, **options)
        self.student = PeftNoiseMaskedNoisyTransformerModel(
            model, cloak, noise_cache=self.teacher.noise_cache, **options
        )
        self.loss, self.components, self.hyperparameters = jigsaw_sgt_loss_factory(
            self.teacher, self.student, **jigsaw.loss_options()
        )
        # The student has no weight that the teacher has not: a state has each once.
        self.register_state_dict_post_hook(_drop_student)
        self.register_load_state_dict_post_hook(_miss_no_student)

    @property
    def base(self) -> Any:
        """The model that both share, with its adapter."""
        return self.student.base_model

    @property
    def cloak(self) -> TransformerCloak:
        return self.student.cloak

    def run(self, **inputs: Any) -> tuple[NoisyOutput, NoisyOutput]:
        """What teacher and student return, of one sample of the noise."""
        return self.teacher(**inputs), self.student(**inputs)

    def forward(self, monitor: bool = False, **inputs: Any) -> dict[str, Tensor]:
        """`loss`, and detached its components by name; with `monitor` the means of `facts_of`."""
        teacher, student = self.run(**inputs)
        found = {"loss": self.loss(teacher.loss_mask)}
        for name, value in self.components().items():
            found[name.removeprefix("jigsaw_")] = value
        if monitor:
            for name, (values, mask) in facts_of(teacher, student).items():
                found[name] = masked_mean(values, mask)
        return found

    # FSDP asks for what it shards by itself; the rest goes to the root.
    @property
    def _no_split_modules(self) -> Any:
        return self.base._no_split_modules

    def get_input_embeddings(self) -> Any:
        return self.base.get_input_embeddings()

    def get_output_embeddings(self) -> Any:
        return self.base.get_output_embeddings()

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        self.base.tie_weights(*args, **kwargs)

    # The Trainer asks the model that it trains; older ones under the first name.
    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.base.gradient_checkpointing_enable(*args, **kwargs)

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        self.base.activation_checkpointing_enable(*args, **kwargs)


class JigsawTrainer(Trainer):
    """Trains a transform of the input embeddings that one adapter understands and the model below
    it does not.

    Args:
        model: a causal language model with a PEFT adapter, or without one if `peft_config` is
            given. Its head becomes lazy (`onepass.lazy_head`) where it can be.
        args: transformers.TrainingArguments. remove_unused_columns becomes False.
        jigsaw_args: weights of the loss, the transform.
        cloak: the transform; made as jigsaw_args say unless given.
        peft_config: an adapter to put on the model.
        others: as transformers.Trainer; data_collator is that of the items of
            `JigsawDataset` unless given.

    `trainer.model` is a `JigsawModel`. Each log of the training has jigsaw/<component> as means
    since the last one, and of its own step jigsaw/{kl_performance,kl_protection,kl_guardrails,
    agreement,abs_cosine,std}. What is saved are adapter/ (PEFT's) and sgt/, never the model below.
    """

    loss_is_scaled_for_ga = False  # a batch's mean: the Trainer divides it by the accumulation

    def __init__(
        self,
        model: nn.Module,
        args: Any = None,
        data_collator: Any = data_collator,
        train_dataset: Any = None,
        *,
        jigsaw_args: JigsawArguments | None = None,
        cloak: TransformerCloak | None = None,
        peft_config: Any = None,
        **others: Any,
    ) -> None:
        jigsaw = JigsawArguments() if jigsaw_args is None else jigsaw_args
        jigsaw.check()
        self.jigsaw_args = jigsaw
        args = TrainingArguments("trainer_output") if args is None else args
        set_seed(args.seed)  # the Trainer does so only later
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)  # type: ignore[arg-type]
        _check_adapter(unwrapped(model))
        if cloak is None:
            cloak = TransformerCloak.from_model(model, estimator=jigsaw.sgt_estimator)
        pair = JigsawModel(model, cloak, jigsaw)
        make_lazy(model)
        args.remove_unused_columns = False
        args.label_names = args.label_names or []
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # adapter and transform: all are used
        super().__init__(pair, args, data_collator, train_dataset, **others)
        check_one_gpu(self.args)
        self.model_accepts_loss_kwargs = False
        self._noted: dict[str, list[Tensor]] = defaultdict(list)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, also after an evaluation over several processes."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' optimizer; the transform's parameters have the learning rate of their own
        in groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        rate = self.jigsaw_args.sgt_learning_rate
        if made and rate is not None:
            of_cloak = {id(p) for p in self.pair.cloak.parameters()}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in of_cloak]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in of_cloak]
                    optimizer.add_param_group({**group, "params": own, "lr": rate})
        return optimizer

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; with `return_outputs` also a dict of its detached components."""
        found = model(
            monitor=model.training and logs_step(self, self.state.global_step + 1), **inputs
        )
        loss = found.pop("loss")
        if model.training:
            for name, value in found.items():
                self._noted[name].append(value.detach())
        return (loss, found) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """(loss, None, None): logits of four kinds are none to gather."""
        with torch.no_grad():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop, with the same noise each time and no draw from the training's."""
        shard_now(self, "run")
        with same_draws(self.model):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log, with the means of what the steps since the last one noted."""
        if self._noted and "loss" in logs:
            noted, self._noted = self._noted, defaultdict(list)
            logs = {**logs, **{f"jigsaw/{k}": v for k, v in means_of(self, noted).items()}}
        super().log(logs, *args, **kwargs)

    def whole_state(self) -> dict[str, Tensor] | None:
        """All weights, gathered, where the model is sharded over processes; else None."""
        return whole_state(self) if is_sharded(self) else None

    def save_adapter(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """The adapter as PEFT keeps it; of a sharded model, out of its `whole_state`."""
        own = _below("teacher.base_model.", state)
        self.pair.base.save_pretrained(folder, state_dict=own, save_embedding_layers=False)
        with contextlib.suppress(FileNotFoundError):
            (folder / "README.md").unlink()  # PEFT's unfilled form

    def save_sgt(self, folder: Path, state: dict[str, Tensor] | None = None) -> None:
        """The transform, as `TransformerCloak.from_pretrained` takes it; out of `whole_state`."""
        self.pair.cloak.save_pretrained(folder, _below("teacher.cloak.", state))

    @property
    def pair(self) -> JigsawModel:
        """The model, out of what trains it."""
        inner = unwrapped(self.model)
        assert isinstance(inner, JigsawModel)
        return inner

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.save_adapter(folder / ADAPTER, state_dict)
        self.save_sgt(folder / SGT, state_dict)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:  # what it has kept beside ours, which is in shards or knows them
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        from peft import set_peft_model_state_dict
        from safetensors.torch import load_file

        folder = Path(resume_from_checkpoint)
        adapter = load_file(folder / ADAPTER / "adapter_model.safetensors")
        set_peft_model_state_dict(self.pair.base, adapter)
        self.pair.cloak.load_state_dict(load_file(folder / SGT / "model.safetensors"))

    def _load_best_model(self) -> None:
        if is_sharded(self):
            super()._load_best_model()
        else:
            self._load_from_checkpoint(self.state.best_model_checkpoint)


def lora_config(model: nn.Module, lora: LoraFlags, jigsaw: JigsawArguments) -> LoraConfig:
    """LoRA on the linear layers of the blocks that run."""
    run = list(range(len(blocks_of(model))))
    if jigsaw.is_truncated and jigsaw.distillation_layer_index is not None:
        run = run[: run[jigsaw.distillation_layer_index] + 1]
    return lora_in_blocks(model, lora, run)


def _drop_student(_: nn.Module, state: dict[str, Any], prefix: str, __: object) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}student.")]:
        del state[name]


def _miss_no_student(_: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if "student." not in name]


def _below(start: str, state: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
    if state is None:
        return None
    return {name[len(start) :]: v for name, v in state.items() if name.startswith(start)}


def _check_adapter(model: Any) -> None:
    """ValueError without an adapter."""
    if not hasattr(model, "disable_adapter"):
        raise ValueError(
            f"model must have a PEFT adapter, {type(model).__name__} has none: pass peft_config"
        )
