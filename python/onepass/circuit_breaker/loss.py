"""One step's loss of representation rerouting, for a Hugging Face causal language model.

`compute_loss` stands in for the published trainer method; `rerouting_loss` is what it and
`CircuitBreakerTrainer` are made of.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops._check import check_choice, check_number
from ..ops.row_moments import RowMoments
from ..training.hidden_states import blocks_of, same_draws, training_mode
from ..training.processes import fails_twice
from .hidden_states import all_layers, as_reference, check_layers, language_model_states
from .losses import (
    at_progress,
    circuit_breaker_of,
    layer_moments,
    monitored,
    retain_of,
    schedule,
)
from .options import ADAPTER_OFF, PRECOMPUTED, RELU_SCOPES, RETAIN_REDUCTIONS, SCHEDULES

RETAIN, BREAK, VALIDATE = "", "_circuit_breaker", "_val"  # how the keys of a batch end
PUBLISHED_STEPS = 150  # of a training; the published method divides its step counter by twice that
LOG_EVERY = 10
WATCHED = ("dd", "xx", "yy", "xy")  # moments behind either loss, the cosine and the norms


@dataclass(frozen=True)
class Rerouting:
    """What a step compares, and how.

    Attributes:
        target_layers: layers at which harmful prompts are turned away.
        layer_convention: "hf_hidden_states" (0 the embeddings, l the output of l blocks, the last
            after the final norm) or "block" (l the output of block l).
        reference: the model before training: "adapter_off" (PEFT's disable_adapter), a frozen
            copy, or "precomputed" (the batch has `reference_hidden_states` [B, L, S, D] and
            `reference_hidden_states_circuit_breaker`, see `reference_hidden_states`).
        full_layers: whether retain looks at all layers. Else the model ends at the block of the
            number of the last target layer, as the published script cuts it, and no later one runs.
        retain_reduction, relu_scope, eps, impl: of `retain_loss` and `circuit_breaker_loss`.
    """

    target_layers: tuple[int, ...]
    layer_convention: str = "hf_hidden_states"
    reference: str | nn.Module = ADAPTER_OFF
    full_layers: bool = False
    retain_reduction: str = "all"
    relu_scope: str = "token"
    eps: float = 0.0
    impl: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.reference, nn.Module):
            check_choice("reference", self.reference, (ADAPTER_OFF, PRECOMPUTED))
        check_choice("retain_reduction", self.retain_reduction, RETAIN_REDUCTIONS)
        check_choice("relu_scope", self.relu_scope, RELU_SCOPES)
        check_number("eps", self.eps, 0.0)

    def check(self, model: nn.Module) -> None:
        """ValueError unless `model` has the target layers."""
        check_layers(model, self.target_layers, self.layer_convention)

    def retain_layers(self, n_blocks: int) -> list[int]:
        """The layers that retain holds in place, of a model of `n_blocks` blocks."""
        if not self.full_layers:
            n_blocks = min(max(self.target_layers) + 1, n_blocks)
        return all_layers(n_blocks, self.layer_convention)


class Terms(NamedTuple):
    """A step's loss, and what there is to log of it, detached, by name."""

    loss: Tensor
    facts: dict[str, Tensor]


class Runs(NamedTuple):
    """How a model runs on the part of a batch whose keys end in a given way."""

    # (model, inputs, ending, layers) -> hidden states [B, S, D] of the layers
    states: Callable[[nn.Module, Mapping[str, Any], str, Sequence[int]], list[Tensor]]
    # (inputs, ending, a hidden state) -> its tokens that count, [B, S], or None for all
    mask: Callable[[Mapping[str, Any], str, Tensor], Tensor | None]
    # the key, less its ending, that a part is there by
    key: str = "input_ids"


def language_model_runs(options: Rerouting, n_blocks: int) -> Runs:
    """How token ids run through a language model."""

    def states(
        model: nn.Module, inputs: Mapping[str, Any], ending: str, layers: Sequence[int]
    ) -> list[Tensor]:
        if f"input_ids{ending}" not in inputs:
            raise ValueError(f"the batch has no input_ids{ending}: it has {sorted(inputs)}")
        ids, mask = inputs[f"input_ids{ending}"], inputs.get(f"attention_mask{ending}")
        # Retain's model ends where its layers do; a target layer is never the last by being cut.
        final = max(layers) if ending == RETAIN and not options.full_layers else n_blocks
        return language_model_states(
            model, ids, mask, layers, layer_convention=options.layer_convention, final=final
        )

    return Runs(states, attention_mask)


def rerouting_loss(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coefficients: tuple[float, float],
    options: Rerouting,
    *,
    monitor: bool = False,
) -> Terms:
    """retain_coeff * retain_loss + cb_coeff * circuit_breaker_loss of one batch.

    Args:
        model: a causal language model, in any of its wrappers; its modes are left as they were.
        inputs: `input_ids`, `attention_mask` [B, S] of prompts to retain, `*_circuit_breaker` of
            those to break, and, looked at only to monitor, `*_val`.
        coefficients: (retain_coeff, cb_coeff); a term whose coefficient is 0 is not computed.
        monitor: also the cosines and norms of all three parts; validation without a graph.

    Raises:
        ValueError: layers that the model has not, no adapter where one is the reference, masks of
        another shape, a part of the batch that is missing.
        RuntimeError: reentrant checkpoints on several processes.
    """
    options.check(model)
    if min(coefficients) > 0 and fails_twice(model):
        raise RuntimeError(
            "gradient checkpointing with use_reentrant=True on several processes: a step runs the"
            " model twice, and DDP and DeepSpeed take a weight's gradient once; pass"
            " gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    n_blocks = len(blocks_of(model))
    runs = language_model_runs(options, n_blocks)
    layers = options.retain_layers(n_blocks)
    return loss_of_parts(model, inputs, coefficients, options, runs, layers, monitor=monitor)


def loss_of_parts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    coefficients: tuple[float, float],
    options: Rerouting,
    runs: Runs,
    retain_layers: Sequence[int],
    *,
    monitor: bool,
    every_term: bool = False,
) -> Terms:
    """`rerouting_loss` of any model, by the way it `runs`; with `every_term` the facts have a term
    whose coefficient is 0, too."""
    loss: Tensor | None = None
    facts: dict[str, Tensor] = {}
    targets = options.target_layers
    for name, ending, layers, wanted, coefficient in (
        ("retain", RETAIN, retain_layers, ("dd",), coefficients[0]),
        ("cb", BREAK, targets, ("xx", "yy", "xy"), coefficients[1]),
    ):
        if coefficient <= 0 and not monitor and not every_term:
            continue
        graph = coefficient > 0 and torch.is_grad_enabled()
        want = WATCHED if monitor else wanted
        moments, mask = _compare(model, inputs, ending, layers, options, runs, want, graph)
        with torch.set_grad_enabled(graph):
            if name == "retain":
                term = retain_of(moments, mask, options.retain_reduction)
            else:
                term = circuit_breaker_of(moments, mask, options.relu_scope, options.eps)
        facts[f"{name}_loss"] = term.detach()
        if coefficient > 0:
            loss = coefficient * term if loss is None else loss + coefficient * term
        if monitor:
            facts |= {f"{name}_{fact}": v for fact, v in monitored(moments, mask).items()}
    if monitor and f"{runs.key}{VALIDATE}" in inputs:
        moments, mask = _compare(model, inputs, VALIDATE, targets, options, runs, WATCHED, False)
        facts |= {f"val_{fact}": v for fact, v in monitored(moments, mask).items()}
    if loss is None:
        loss = next(p for p in model.parameters() if p.requires_grad).sum() * 0.0
    return Terms(loss, facts | {"loss": loss.detach()})


def _compare(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ending: str,
    layers: Sequence[int],
    options: Rerouting,
    runs: Runs,
    want: tuple[str, ...],
    graph: bool,
) -> tuple[RowMoments, Tensor | None]:
    """Moments [L, B, S] of a part's hidden states and the reference's, and the part's mask."""
    before = _reference_states(model, inputs, ending, layers, options, runs)
    with ExitStack() as stack:
        if ending == VALIDATE or not graph:  # looked at only
            stack.enter_context(training_mode(model, False))
            stack.enter_context(same_draws(model))
        stack.enter_context(torch.set_grad_enabled(graph))
        after = runs.states(model, inputs, ending, layers)
        if graph and not any(state.requires_grad for state in after):
            raise RuntimeError(
                "hidden states without a gradient: nothing is trained, or gradient checkpointing"
                " runs with use_reentrant=True; set it to False"
            )
        mask = runs.mask(inputs, ending, after[0])
        # Autocast makes a norm's output wider than the layers before it; a copy may have another
        # dtype, and stored states come from outside of autocast.
        widest = functools.reduce(torch.promote_types, (state.dtype for state in after))
        after = [state.to(widest) for state in after]
        before = [b.to(a.dtype) for a, b in zip(after, before, strict=True)]
        return layer_moments(after, before, mask, options.impl, want), mask


@torch.no_grad()
def part_facts(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ending: str,
    options: Rerouting,
    runs: Runs | None = None,
) -> dict[str, Tensor]:
    """What monitoring tells of the part of a batch whose keys end so: "" at the layers that retain
    holds, else at the target layers."""
    options.check(model)
    n_blocks = len(blocks_of(model))
    layers = options.target_layers if ending else options.retain_layers(n_blocks)
    runs = language_model_runs(options, n_blocks) if runs is None else runs
    return monitored(*_compare(model, inputs, ending, layers, options, runs, WATCHED, graph=False))


def reference_hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], options: Rerouting
) -> dict[str, Tensor]:
    """The keys that reference="precomputed" looks for in a batch, made of the batch and the model
    before training: `reference_hidden_states` and `..._circuit_breaker`, [B, L, S, D] each."""
    options.check(model)
    n_blocks = len(blocks_of(model))
    runs = language_model_runs(options, n_blocks)
    targets = list(options.target_layers)
    parts = {RETAIN: options.retain_layers(n_blocks), BREAK: targets}
    if f"input_ids{VALIDATE}" in inputs:
        parts[VALIDATE] = targets
    return {
        f"reference_hidden_states{ending}": torch.stack(
            _reference_states(model, inputs, ending, layers, options, runs), dim=1
        )
        for ending, layers in parts.items()
    }


def _reference_states(
    model: nn.Module,
    inputs: Mapping[str, Any],
    ending: str,
    layers: Sequence[int],
    options: Rerouting,
    runs: Runs,
) -> list[Tensor]:
    if options.reference != PRECOMPUTED:
        with as_reference(model, options.reference) as original:
            return [state.detach() for state in runs.states(original, inputs, ending, layers)]
    key = f"reference_hidden_states{ending}"
    if key not in inputs:
        raise ValueError(f"reference='precomputed' needs {key!r} in the batch: {sorted(inputs)}")
    found = inputs[key]
    if found.dim() != 4 or found.shape[1] != len(layers):
        raise ValueError(
            f"{key} must be [B, L, S, D] of {len(layers)} layers: got {tuple(found.shape)}"
        )
    return list(found.unbind(1))


def attention_mask(inputs: Mapping[str, Any], ending: str, state: Tensor) -> Tensor | None:
    """The attention mask, of one flag for each hidden state."""
    mask = inputs.get(f"attention_mask{ending}")
    if mask is not None and mask.shape != state.shape[:-1]:
        raise ValueError(
            f"attention_mask{ending} {tuple(mask.shape)} must match the hidden states'"
            f" {tuple(state.shape[:-1])}"
        )
    return mask


def compute_loss(
    self: Any,
    model: nn.Module,
    inputs: Mapping[str, Any],
    target_layers: Sequence[int],
    alpha: float,
    return_outputs: bool = False,
    tokenizer: Any = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor]:
    """The loss of one training step, in the place of the published trainer method.

    Args:
        self: the trainer. Its `current_training_step` goes up by one before it is used; progress is
            its `get_training_progress()`, where it has that, else the step over 300.
        model, inputs: as in `rerouting_loss`.
        target_layers: hidden_states indices; alpha: the largest value of either coefficient.
        return_outputs: (loss,) instead of loss.
        tokenizer: not looked at. kwargs: the fields of `Rerouting` by name, `full_layers` True
            unless given; what else a Trainer passes is not looked at.

    Every tenth step the facts of `rerouting_loss` go to `self.log`, named circuit_breaker/*.

    Formula: p = min(progress, 1); alpha p retain_loss + alpha (1 - p) circuit_breaker_loss.
    Source: Zou et al. 2024, Circuit Breakers (arXiv 2406.04313).
    """
    step = getattr(self, "current_training_step", 0) + 1
    self.current_training_step = step
    ours = {name: v for name, v in kwargs.items() if name in Rerouting.__dataclass_fields__}
    # The published script cuts its model itself, where it does.
    options = Rerouting(**{"full_layers": True, **ours, "target_layers": tuple(target_layers)})
    if hasattr(self, "get_training_progress"):
        coefficients = at_progress(self.get_training_progress(), alpha, SCHEDULES[0])
    else:
        coefficients = schedule(step, PUBLISHED_STEPS, alpha)
    monitor = step % LOG_EVERY == 0 and hasattr(self, "log")
    terms = rerouting_loss(model, inputs, coefficients, options, monitor=monitor)
    if monitor:
        self.log(log_of(terms.facts, coefficients))
    return (terms.loss,) if return_outputs else terms.loss


def log_of(facts: Mapping[str, Any], coefficients: tuple[float, float]) -> dict[str, float]:
    """Facts under the names they have in a log."""
    named = {"retain_coeff": coefficients[0], "cb_coeff": coefficients[1], **facts}
    return {f"circuit_breaker/{name}": float(value) for name, value in named.items()}
