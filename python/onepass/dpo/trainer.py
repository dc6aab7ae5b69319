"""`DPOTrainer`: a language model learns which of two answers is preferred, on transformers.Trainer.

Its arguments and methods are those of TRL's class of 2023, which the notebook's subclass was
written against; its flags, columns and metrics are those of TRL's of today.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.integrations import is_deepspeed_zero3_enabled

from ..cli.terminal import progress_bar
from ..heads import unwrapped
from ..training.hidden_states import (
    adapter_off,
    has_adapter,
    make_lazy,
    trained_beside_adapter,
    training_mode,
)
from ..training.monitor import check_one_gpu, forget_evaluation
from ..training.processes import (
    NO_SECOND,
    check_reference,
    is_sharded,
    prepare_reference,
    rounds,
    shard_now,
)
from .arguments import DPOArguments
from .data import IGNORED, PreferenceCollator, PreferenceDataset
from .examples import REFERENCE, SIDES
from .logps import SequenceLogps, ld_weights, sequence_logps, wpo_weights
from .losses import DPOLoss, dpo_loss

WANTED = ("entropy", "accuracy", "logits")
# Of TRL's class from 0.7 to 0.12: arguments, with the values that change nothing here, and methods
# that nothing calls.
OLD_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (None, False),
    "generate_during_eval": (False,),
    "max_target_length": (None,),
    "model_adapter_name": (None,),
    "ref_adapter_name": (None,),
    "force_use_ref_model": (False,),
    "dataset_num_proc": (None, 1),
    "model_init_kwargs": (None,),
    "ref_model_init_kwargs": (None,),
}
OLD_METHODS = {
    "get_batch_metrics": "get_batch_loss_metrics",
    "_get_batch_logps": "get_batch_logps",
    "tokenize_row": "nothing: pass a PreferenceDataset, or items of token ids, as train_dataset",
    "build_tokenized_answer": "nothing: pass a PreferenceDataset as train_dataset",
    "compute_reference_log_probs": "reference_logps",
    "null_ref_context": "reference_logps",
    "get_batch_samples_and_ref": "nothing: `onepass dpo evaluate` draws answers",
}
REFERENCE_FOLDER = "reference"  # of a checkpoint, where the reference moves
logger = logging.getLogger("onepass")


class _Forward(NamedTuple):
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_logits: Tensor
    rejected_logits: Tensor


class Forward(_Forward):
    """Four tensors as of old; `stats` is what the same pass over the vocabulary gave beside, of
    the chosen and then the rejected answers."""

    stats: SequenceLogps | None = None


class Metrics(dict[str, Tensor]):
    """Scalars by name as of old; `of_pairs` has each as it was made, and the sum and the count of
    every pair that it is the mean of [2, B]; `losses` [B]."""

    of_pairs: Mapping[str, tuple[Tensor, Tensor]] = {}
    losses: Tensor | None = None

    def rows(self, n_pairs: int, device: Any) -> Tensor:
        """Sums and counts of every pair [2, names, B]; where a subclass put a scalar of its own,
        that for each."""
        found = []
        for name, value in self.items():
            made, rows = self.of_pairs.get(name, (None, None))
            if rows is None or made is not value:
                own = torch.as_tensor(value, device=device).detach().float().expand(n_pairs)
                rows = torch.stack([own, torch.ones_like(own)])
            found.append(rows)
        return torch.stack(found, 1)


class DPOTrainer(Trainer):
    """Trains on pairs of a chosen and a rejected answer to a prompt.

    Args:
        model: a causal language model, or the name of one. Its head becomes lazy
            (`onepass.lazy_head`) where it can be.
        ref_model: the reference, or the name of one. Without it: the model with its PEFT adapter
            off; a model without an adapter is copied as it is here.
        beta, label_smoothing, loss_type, truncation_mode, max_length, max_prompt_length,
            precompute_ref_log_probs, disable_dropout, alpha, f_divergence_type: as `DPOArguments`
            has them; what is not None wins over `dpo_args`.
        args: transformers.TrainingArguments, or trl.DPOConfig, whose fields count where `dpo_args`
            is None. remove_unused_columns becomes False.
        data_collator: of the items of `PreferenceDataset`.
        label_pad_token_id, padding_value: what pads labels and ids (default: the pad token).
        train_dataset, eval_dataset: a datasets.Dataset or a list of dicts with [prompt,] chosen,
            rejected, or a `PreferenceDataset`. With ref_chosen_logps and ref_rejected_logps in it
            the reference does not run. eval_dataset may be a dict of them.
        tokenizer, processing_class: two names of one argument.
        model_init: makes the model, in place of `model`; called once.
        peft_config: an adapter to put on the model.
        dpo_args: what else the loss and the data are told.
        others: as transformers.Trainer; and arguments of TRL's class of 2023 that change nothing
            here, as is_encoder_decoder=False.

    With `precompute_ref_log_probs` the reference runs here, over all pairs, and is not kept.

    Each log has rewards/{chosen,rejected,accuracies,margins}, logps/{chosen,rejected},
    logits/{chosen,rejected}, entropy and mean_token_accuracy as means since the last one, and
    num_tokens since the beginning; `evaluate` has them of its data, with eval_ before them, and
    `predict` those of every pair, in its predictions, by name.
    """

    loss_is_scaled_for_ga = False  # a batch's mean: the Trainer divides it by the accumulation

    def __init__(
        self,
        model: Any = None,
        ref_model: Any = None,
        beta: float | None = None,
        label_smoothing: float | None = None,
        loss_type: str | Sequence[str] | None = None,
        args: Any = None,
        data_collator: Any = None,
        label_pad_token_id: int = IGNORED,
        padding_value: int | None = None,
        truncation_mode: str | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        tokenizer: Any = None,
        model_init: Any = None,
        callbacks: Any = None,
        optimizers: Any = (None, None),
        max_length: int | None = None,
        max_prompt_length: int | None = None,
        peft_config: Any = None,
        precompute_ref_log_probs: bool | None = None,
        disable_dropout: bool | None = None,
        alpha: float | None = None,
        f_divergence_type: str | None = None,
        *,
        dpo_args: DPOArguments | None = None,
        processing_class: Any = None,
        **others: Any,
    ) -> None:
        given: dict[str, Any] = {
            "beta": beta,
            "label_smoothing": label_smoothing,
            "loss_type": [loss_type] if isinstance(loss_type, str) else loss_type,
            "truncation_mode": truncation_mode,
            "max_length": max_length,
            "max_prompt_length": max_prompt_length,
            "precompute_ref_log_probs": precompute_ref_log_probs,
            "disable_dropout": disable_dropout,
            "alpha": alpha,
            "f_divergence_type": f_divergence_type,
        }
        dpo = DPOArguments.of(args) if dpo_args is None else dpo_args
        if alpha is not None and dpo_args is None:
            dpo.f_alpha_divergence_coef = None  # DPOConfig always has one
        dpo = replace(dpo, **{name: value for name, value in given.items() if value is not None})
        dpo.check(own_loss=type(self).dpo_loss is not DPOTrainer.dpo_loss)
        self._check_names(others)
        for name in ("compute_metrics", "compute_loss_func", "preprocess_logits_for_metrics"):
            if others.get(name) is not None:
                raise ValueError(
                    f"{name}: pairs have no predictions and no loss outside dpo_loss: leave it out,"
                    " or override get_batch_loss_metrics"
                )
        self.dpo_args = dpo
        self.beta, self.label_smoothing = dpo.beta, dpo.label_smoothing
        self.loss_type: Any = dpo.loss_type[0] if len(dpo.loss_type) == 1 else list(dpo.loss_type)
        self.alpha, self.f_divergence_type = dpo.alpha, dpo.f_divergence_type
        self.reference_free = dpo.reference_free
        self.label_pad_token_id = label_pad_token_id
        if tokenizer is not None and processing_class is not None:
            raise ValueError("tokenizer and processing_class are one argument: pass one of them")
        tokenizer = processing_class if tokenizer is None else tokenizer
        self.tokenizer = tokenizer
        args = TrainingArguments("trainer_output") if args is None else args
        if args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor: got {args.label_smoothing_factor}, which is of the"
                " Trainer's own loss: wanted label_smoothing"
            )
        set_seed(args.seed)  # the Trainer does so only later
        model = _model_of(model, model_init)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        train_dataset = self._as_pairs(train_dataset, "train_dataset")
        eval_dataset = self._as_pairs(eval_dataset, "eval_dataset")
        self.precomputes = dpo.precompute_ref_log_probs
        knows_reference = self.reference_free or _all_have_reference(train_dataset, eval_dataset)
        self.ref_model = self._reference(model, ref_model, needed=not knows_reference)
        # what keeps the model without its adapter from being the reference
        self._trained = trained_beside_adapter(model) if has_adapter(model) else "the model"
        for each in (model, self.ref_model):
            if each is not None:
                make_lazy(each)
                if dpo.disable_dropout:
                    without_dropout(each)
        args.remove_unused_columns = False
        args.label_names = args.label_names or []
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False
        if data_collator is None:
            data_collator = PreferenceCollator(
                _padding(padding_value, tokenizer), label_pad_token_id
            )
        self._beside: dict[str, Any] = {}
        self._totals: dict[tuple[str, ...], Tensor] = {}  # of training, since the last log
        self._measured: dict[tuple[str, ...], list[Tensor]] = {}  # of an evaluation's pairs
        self._seen: Tensor | int = 0
        super().__init__(
            model,
            args,
            data_collator,
            train_dataset,
            eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            **others,
        )
        check_one_gpu(self.args)
        self.model_accepts_loss_kwargs = False
        if self.ref_model is not None:
            self.ref_model = prepare_reference(self, self.ref_model)
        if dpo.sync_ref_model:
            if is_sharded(self):
                raise ValueError("sync_ref_model: is not for FSDP and DeepSpeed: leave it out")
            self.add_callback(SyncReference(self))
        if self.precomputes:
            check_reference(self, is_itself=True)
            self.train_dataset = self.precompute(train_dataset)
            self.eval_dataset = self.precompute(eval_dataset)
            self.ref_model = None
        elif knows_reference and not self.reference_free:
            logger.info("no reference runs: the pairs have %s", REFERENCE[0])

    def _check_names(self, others: dict[str, Any]) -> None:
        """ValueError for arguments and methods of old that would be left aside; takes those out
        that change nothing."""
        for name, harmless in OLD_ARGUMENTS.items():
            if name in others and (value := others.pop(name)) not in harmless:
                raise ValueError(f"{name}: got {value!r}, which is not supported: leave it out")
        for name, now in OLD_METHODS.items():
            if hasattr(type(self), name):
                raise ValueError(
                    f"{type(self).__name__}.{name} would never be called: override {now}"
                )

    # -- the data -----------------------------------------------------------------------------

    def _as_pairs(self, data: Any, name: str) -> Any:
        if data is None or isinstance(data, PreferenceDataset | str):
            return data
        if isinstance(data, Mapping):
            return {key: self._as_pairs(part, f"{name}[{key!r}]") for key, part in data.items()}
        if hasattr(data, "__len__") and len(data) and "chosen_labels" in data[0]:
            return data  # token ids already
        if self.tokenizer is None:
            raise ValueError(f"{name}: wanted a tokenizer with it, to make token ids of its text")
        return PreferenceDataset(
            self.tokenizer,
            data,
            self.dpo_args,
            label_pad_token_id=self.label_pad_token_id,
            name=f"{name}: row",
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """transformers' dataloader; of rows of text too."""
        kept, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:  # every pair is measured
            return super().get_eval_dataloader(self._as_pairs(eval_dataset, "eval_dataset"))
        finally:
            self.args.dataloader_drop_last = kept

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """transformers' dataloader; of rows of text too."""
        return super().get_test_dataloader(self._as_pairs(test_dataset, "test_dataset"))

    def concatenated_inputs(
        self, batch: Mapping[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Chosen and then rejected answers, padded to one length, as concatenated_{input_ids,
        attention_mask,labels} [2B, S]."""
        length = max(batch[f"{side}_input_ids"].shape[1] for side in SIDES)
        joined = {}
        for part in ("input_ids", "attention_mask", "labels"):
            padding = self._padding_of(part)
            joined[f"concatenated_{part}"] = torch.cat([
                nn.functional.pad(side, (0, length - side.shape[1]), value=padding)
                for side in (batch[f"{name}_{part}"] for name in SIDES)
            ])  # fmt: skip
        return joined

    def _padding_of(self, part: str) -> int:
        if part == "labels":
            return self.label_pad_token_id
        return getattr(self.data_collator, "pad_token_id", 0) if part == "input_ids" else 0

    # -- log-probabilities --------------------------------------------------------------------

    @staticmethod
    def get_batch_logps(
        logits: Tensor,
        labels: Tensor,
        average_log_prob: bool = False,
        label_pad_token_id: int = IGNORED,
        is_encoder_decoder: bool = False,
    ) -> Tensor:
        """Log-probabilities of sequences [B]: sums over the labels that are not padding, or with
        `average_log_prob` means. Logits at a position are of the label at the next one."""
        if is_encoder_decoder:
            raise ValueError("is_encoder_decoder: only decoders are supported")
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} must agree in"
                " batch and length"
            )
        labels = _ignored(labels, label_pad_token_id)
        return sequence_logps(logits, labels, average=average_log_prob).logps

    def concatenated_forward(self, model: nn.Module, batch: Mapping[str, Any]) -> Forward:
        """(chosen_logps, rejected_logps, chosen_logits, rejected_logits) of one run of the model;
        the log-probabilities are sums over the answers' tokens."""
        joined = self.concatenated_inputs(batch)
        n = len(batch["chosen_input_ids"])
        logits = model(
            input_ids=joined["concatenated_input_ids"],
            attention_mask=joined["concatenated_attention_mask"],
            use_cache=False,
        ).logits
        labels = _ignored(joined["concatenated_labels"], self.label_pad_token_id)
        stats = None
        own = type(self).get_batch_logps is not DPOTrainer.get_batch_logps
        if own and self.dpo_args.ld_alpha is not None:
            raise ValueError("ld_alpha: wanted the trainer's own get_batch_logps, which weights")
        if not own:
            stats = self._sequence_logps(logits, labels)
            logps = stats.logps
        else:
            logps = self.get_batch_logps(logits, labels)
        found = Forward(logps[:n], logps[n:], logits[:n], logits[n:])
        found.stats = stats
        return found

    def _sequence_logps(self, logits: Tensor, labels: Tensor) -> SequenceLogps:
        dpo = self.dpo_args
        weights = None if dpo.ld_alpha is None else ld_weights(labels, dpo.ld_alpha)
        if not torch.is_grad_enabled() and not self._measures:
            return sequence_logps(logits, labels, weights=weights)
        wanted = (*WANTED, "alignment") if dpo.use_weighting else WANTED
        return sequence_logps(logits, labels, weights=weights, want=wanted)

    _measures = False  # whether a pass without gradients is one of the model, not the reference's

    # -- the reference ------------------------------------------------------------------------

    def _reference(self, model: nn.Module, ref_model: Any, needed: bool) -> nn.Module | None:
        """A frozen module, or None where the adapter is switched off or nothing is to run."""
        dpo = self.dpo_args
        if ref_model is not None:
            if self.reference_free:
                raise ValueError("ref_model: got one, but reference_free leaves it out")
            if ref_model is model:
                raise ValueError(
                    "ref_model is the model itself, which is trained: leave it out for a copy"
                )
            ref_model = _model_of(ref_model, None)
        elif has_adapter(model):
            beside = trained_beside_adapter(model)
            if needed and beside is not None and not dpo.precompute_ref_log_probs:
                raise ValueError(
                    f"{beside} is trained, and stays so with the adapter off: pass a ref_model, or"
                    " precompute_ref_log_probs"
                )
        elif needed and not dpo.precompute_ref_log_probs:
            if is_deepspeed_zero3_enabled():  # whose shards a copy would share
                raise ValueError(NO_SECOND)
            ref_model = copy.deepcopy(model)
        if dpo.sync_ref_model and has_adapter(model):
            raise ValueError(
                "sync_ref_model: wanted a model without an adapter, whose weights the reference"
                " follows"
            )
        if dpo.sync_ref_model and ref_model is None:
            raise ValueError(
                f"sync_ref_model: all pairs have {REFERENCE[0]}, so that no reference runs that"
                " could follow: leave out the columns, or sync_ref_model"
            )
        return None if ref_model is None else ref_model.requires_grad_(False).eval()

    def reference_logps(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """(chosen, rejected): the columns of the batch where it has them, else the reference runs;
        with `reference_free` zeros."""
        if all(key in batch for key in REFERENCE):
            return batch[REFERENCE[0]], batch[REFERENCE[1]]
        if self.reference_free:
            zeros = torch.zeros(len(batch["chosen_input_ids"]), device=self.args.device)
            return zeros, zeros
        if self.precomputes:
            raise ValueError(
                f"the batch has no {REFERENCE[0]!r}, and the reference is not kept: pass this"
                " dataset as eval_dataset when the trainer is made"
            )
        if self.ref_model is None and self._trained is not None:
            raise ValueError(
                f"the batch has no {REFERENCE[0]!r}, which the other data have, and"
                f" {self._trained} is trained, so that no reference is left: pass a ref_model"
            )
        return self._run_reference(model, batch)

    def _run_reference(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        measures, self._measures = self._measures, False
        reference = model if self.ref_model is None else self.ref_model
        try:
            with torch.no_grad(), training_mode(reference, False):
                if self.ref_model is None and has_adapter(model):
                    with adapter_off(model):
                        found = self.concatenated_forward(model, batch)
                else:
                    found = self.concatenated_forward(reference, batch)
        finally:
            self._measures = measures
        return found[0], found[1]

    def precompute(self, data: Any) -> Any:
        """A `PreferenceDataset`, or a dict of them, with the reference's log-probabilities in its
        items; where they are there, itself."""
        if data is None:
            return None
        if isinstance(data, Mapping):
            return {name: self.precompute(part) for name, part in data.items()}
        if not isinstance(data, PreferenceDataset):
            raise ValueError(
                "precompute_ref_log_probs: wanted rows of text or a PreferenceDataset, got"
                f" {type(data).__name__}"
            )
        if data.has_reference:
            return data
        data = copy.copy(data)  # another trainer's reference may be another
        data.items = [dict(item) for item in data.items]
        size = self.dpo_args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        shard_now(self)
        starts = range(0, len(data), size)
        own = list(rounds(len(starts)))
        found: list[tuple[int, list[list[float]]]] = []
        with progress_bar(len(own), 0) as bar:
            bar.set_description("reference")
            for at, is_own in own:
                start = starts[at]
                batch = self._prepare_inputs(self.data_collator(data.items[start : start + size]))
                # the model itself gets its autocast only in the training
                with self.compute_loss_context_manager(), self.accelerator.autocast():
                    sides = self._run_reference(self.model, batch)
                if is_own:
                    found.append((start, torch.stack(sides, 1).float().tolist()))
                bar.update()
        for start, values in gather_object(found):  # of all processes
            for item, pair in zip(data.items[start : start + size], values, strict=True):
                item.update(zip(REFERENCE, pair, strict=True))
        return data

    # -- the loss -----------------------------------------------------------------------------

    def dpo_loss(
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_free: bool = False,
    ) -> DPOLoss:
        """(losses, chosen_rewards, rejected_rewards), each [B]; see `onepass.dpo.dpo_loss`.

        Within a step it also has the answers' lengths and weights, which the classic signature has
        no place for; called alone it takes the log-probabilities as they are given.
        """
        options = self.dpo_args.loss_options() | {
            "beta": self.beta,
            "loss_type": self.loss_type,
            "label_smoothing": self.label_smoothing,
            "alpha": self.alpha,
            "f_divergence": self.f_divergence_type,
        }
        return dpo_loss(
            policy_chosen_logps,
            policy_rejected_logps,
            reference_chosen_logps,
            reference_rejected_logps,
            reference_free,
            **options,
            **self._beside,
        )

    def _beside_logps(self, found: Any, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What the loss needs of a batch beside log-probabilities."""
        padding = self.label_pad_token_id
        chosen, rejected = ((batch[f"{s}_labels"][:, 1:] != padding).sum(-1) for s in SIDES)
        beside: dict[str, Any] = {
            "chosen_lengths": chosen,
            "rejected_lengths": rejected,
            "ipo_average": self.dpo_args.ipo_average,
        }
        stats = getattr(found, "stats", None)
        if self.dpo_args.use_weighting:
            if stats is None:
                raise ValueError("use_weighting: wanted the trainer's own concatenated_forward")
            beside["weights"] = wpo_weights(stats.alignment, stats.lengths)
        if stats is not None and stats.unweighted is not None:
            beside["chosen_nll"] = -stats.unweighted[: len(chosen)].sum() / chosen.sum().clamp(1)
        return beside

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: Mapping[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean loss of a batch, and its metrics by name as scalars on the device; with
        `train_eval="eval"` eval_ stands before the names."""
        self._measures = True
        try:
            found = self.concatenated_forward(model, batch)
        finally:
            self._measures = False
        chosen_logps, rejected_logps = found[0], found[1]
        n = len(chosen_logps)
        reference = self.reference_logps(model, batch)
        stats = getattr(found, "stats", None)
        self._beside = self._beside_logps(found, batch)
        try:
            losses, chosen, rejected = self.dpo_loss(
                chosen_logps, rejected_logps, *reference, self.reference_free
            )
        finally:
            self._beside = {}
        facts = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": chosen > rejected,
            "rewards/margins": chosen - rejected,
            "logps/chosen": chosen_logps.detach(),
            "logps/rejected": rejected_logps.detach(),
        }
        counts = [torch.ones_like(chosen)] * len(facts)
        if stats is not None:
            of_tokens = (stats.mean_logits, stats.entropy, stats.correct)
            logits, entropy, correct = (fact.unflatten(0, (2, n)) for fact in of_tokens)
            lengths = stats.lengths.unflatten(0, (2, n))
            facts |= {
                "logits/chosen": logits[0],
                "logits/rejected": logits[1],
                "entropy": entropy.sum(0),
                "mean_token_accuracy": correct[0],  # as TRL's, of the chosen answers
            }
            counts += [*lengths, lengths.sum(0), lengths[0]]
        with torch.no_grad():
            rows = torch.stack([
                torch.stack([value.float() for value in values])
                for values in (list(facts.values()), counts)
            ])  # fmt: skip
            sums, totals = rows.sum(-1)
            before = "eval_" if train_eval == "eval" else ""
            names = [before + name for name in facts]
            metrics = Metrics(zip(names, (sums / totals.clamp(min=1)).unbind(), strict=True))
        metrics.of_pairs = {
            name: (value, of_pairs)
            for (name, value), of_pairs in zip(metrics.items(), rows.unbind(1), strict=True)
        }
        metrics.losses = losses.detach()
        return losses.mean(), metrics

    def compute_loss(  # type: ignore[override]
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The loss of a batch; with `return_outputs` also a dict of its metrics."""
        kind = "train" if model.training else "eval"
        loss, metrics = self.get_batch_loss_metrics(model, inputs, kind)
        if model.training:
            self.store_metrics(metrics, kind, len(inputs["chosen_input_ids"]))
            self._seen = self._seen + sum(inputs[f"{side}_attention_mask"].sum() for side in SIDES)
        return (loss, metrics) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: Any = None,
    ) -> tuple[Tensor, None, None]:
        """(loss, None, None): a batch's logits are never made."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, metrics = self.compute_loss(model, inputs, return_outputs=True)
        self.store_metrics(metrics, "eval", len(inputs["chosen_input_ids"]))
        return loss.detach(), None, None

    # -- metrics ------------------------------------------------------------------------------

    def store_metrics(
        self, metrics: Mapping[str, Tensor], train_eval: str = "train", n_pairs: int = 1
    ) -> None:
        """Note a batch's metrics for the next log; nothing is read of the device."""
        metrics = metrics if isinstance(metrics, Metrics) else Metrics(metrics)
        if not metrics:
            return
        facts, names = metrics.rows(n_pairs, self.args.device), tuple(metrics)
        if train_eval == "train":
            self._totals[names] = facts.sum(-1) + self._totals.get(names, 0.0)
            return
        if metrics.losses is not None and metrics.losses.shape == (n_pairs,):
            loss = torch.stack([metrics.losses, torch.ones_like(metrics.losses)])
            facts, names = torch.cat([facts, loss[:, None].float()], 1), (*names, "loss")
        # of all processes, without the pairs that fill up the last batch
        found = self.gather_function(facts.permute(2, 0, 1).contiguous())
        self._measured.setdefault(names, []).append(found)

    def _means(self) -> dict[str, float]:
        """The means of what the training noted, over all processes, in one transfer a set."""
        found: dict[str, float] = {}
        totals, self._totals = self._totals, {}
        for names, facts in totals.items():
            sums, counts = self.accelerator.reduce(facts, reduction="sum").tolist()
            found |= {n: s / max(c, 1) for n, s, c in zip(names, sums, counts, strict=True)}
        return found

    def _count_tokens(self) -> int:
        """The tokens trained on since the beginning; trainer_state.json has them too."""
        if isinstance(self._seen, Tensor):
            new = self.accelerator.reduce(self._seen, reduction="sum")
            self._seen = 0
            self.state.num_input_tokens_seen = int(self.state.num_input_tokens_seen) + int(new)
        return int(self.state.num_input_tokens_seen)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """transformers' log, with the means of what the steps since the last one noted."""
        if "loss" in logs and self._totals:
            logs = {**logs, **self._means(), "num_tokens": self._count_tokens()}
        super().log(logs, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' loop, with the metrics of what it ran over; its predictions are those of
        every pair, by name."""
        shard_now(self)
        self._measured = {}
        found = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        of_pairs = {}
        for names, batches in self._measured.items():
            sums, counts = torch.cat(batches).cpu().unbind(1)
            means = sums.sum(0) / counts.sum(0).clamp(min=1)
            pairs = sums / counts.clamp(min=1)
            for name, mean, values in zip(names, means.tolist(), pairs.unbind(1), strict=True):
                name = name.removeprefix("eval_")
                found.metrics[f"{prefix}_{name}"] = mean
                of_pairs[name] = values.numpy()
        self._measured = {}
        return found._replace(predictions=of_pairs)

    # -- processes and checkpoints ------------------------------------------------------------

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' training, also after an evaluation over several processes."""
        forget_evaluation(self)
        return super().train(*args, **kwargs)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self._count_tokens()
        super()._save_checkpoint(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        if self.dpo_args.sync_ref_model and self.args.should_save:
            assert self.ref_model is not None
            of_reference: Any = unwrapped(self.ref_model)
            folder = Path(self.args.output_dir if output_dir is None else output_dir)
            of_reference.save_pretrained(folder / REFERENCE_FOLDER)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.dpo_args.sync_ref_model:
            from safetensors.torch import load_file

            assert self.ref_model is not None
            folder = Path(resume_from_checkpoint) / REFERENCE_FOLDER
            state: dict[str, Tensor] = {}
            for file in folder.glob("*.safetensors"):
                state |= load_file(file)
            if not state:
                raise ValueError(f"{folder}: no weights of the reference, wanted safetensors")
            reference = unwrapped(self.ref_model)
            found = reference.load_state_dict(state, strict=False)
            if found.unexpected_keys:
                raise ValueError(f"{folder}: of another model: {found.unexpected_keys[0]}")
            there = reference.state_dict()  # tied weights are saved once, under one of their names
            loaded = {there[name].data_ptr() for name in state}
            for name in found.missing_keys:
                if there[name].data_ptr() not in loaded:
                    raise ValueError(f"{folder}: no {name}: the reference is damaged")


class MyDPOTrainer(DPOTrainer):
    """The notebook's class: `alpha` comes first, the rest by keyword."""

    def __init__(self, alpha: float | None = None, **kwargs: Any) -> None:
        super().__init__(alpha=alpha, **kwargs)


class SyncReference(TrainerCallback):
    """Moves the reference a share of the way to the model, each so many steps."""

    def __init__(self, trainer: DPOTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        dpo, reference = self.trainer.dpo_args, self.trainer.ref_model
        if reference is None or state.global_step % dpo.ref_model_sync_steps:
            return
        model, share = unwrapped(self.trainer.model), dpo.ref_model_mixup_alpha
        with torch.no_grad():
            pairs = zip(unwrapped(reference).parameters(), model.parameters(), strict=True)
            for behind, ahead in pairs:
                behind.lerp_(ahead.to(behind), share)


def without_dropout(model: nn.Module) -> None:
    """Of probability 0: nn.Dropout and its kin, and every rate that a module keeps as a number
    under a name with "drop" in it, for attention among others."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def _model_of(model: Any, model_init: Any) -> Any:
    if (model is None) == (model_init is None):
        raise ValueError("wanted one of model and model_init")
    if model_init is not None:
        return model_init()
    if isinstance(model, str):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(model)
    return model


def _padding(value: int | None, tokenizer: Any) -> int:
    known = (
        value,
        getattr(tokenizer, "pad_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    return next((i for i in known if i is not None), 0)


def _ignored(labels: Tensor, label_pad_token_id: int) -> Tensor:
    if label_pad_token_id == IGNORED:
        return labels
    return labels.masked_fill(labels == label_pad_token_id, IGNORED)


def _each(data: Any) -> list[Any]:
    if data is None:
        return []
    return list(data.values()) if isinstance(data, Mapping) else [data]


def _all_have_reference(train: Any, evaluation: Any) -> bool:
    every = [data for data in (train, *_each(evaluation)) if data is not None]
    return bool(every) and all(getattr(data, "has_reference", False) for data in every)
