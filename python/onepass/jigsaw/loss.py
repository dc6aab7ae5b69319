"""The loss of a jigsaw training step: factories over a noisy teacher and a noisy student.

Forward hooks keep what either model returned last. The loss takes both once, so that no step is
computed on the activations of another.
"""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..losses import (
    CAP_FORMS,
    CAP_SCOPES,
    NORMALIZATIONS,
    check_cap,
    masked_normalized_l2,
    one_minus_cosine,
)
from ..ops._check import check_above_0, check_choice, check_number, check_weights
from ..ops._launch import IMPLS
from ..ops.row_moments import row_moments
from ..reduce import masked_mean
from .activations import ActivationsDict, ComponentLossesDict, HyperparametersDict
from .embeddings import embedding_norms
from .entropy import ESTIMATORS, mutual_information_sub_batch
from .input_losses import (
    MEDIAN_NORM_FORMS,
    STD_FORMS,
    cosine_similarity_loss,
    inverse_l2_power_law_loss,
    median_norm_loss,
    std_log_ratio_loss,
)
from .losses import CE_NAMES, TARGETS, compute_jigsaw_ce_losses, compute_jigsaw_l2_losses
from .models import (
    NoiseMaskedNoisyTransformerModel,
    NoisyOutput,
    PeftNoiseMaskedNoisyTransformerModel,
)

LossFunctions = tuple[
    Callable[[Tensor], Tensor],
    Callable[[], ComponentLossesDict],
    Callable[[], HyperparametersDict],
]
Term = Callable[[Tensor], Tensor]  # of the loss mask


def jigsaw_sgt_loss_factory(
    noisy_teacher_model: NoiseMaskedNoisyTransformerModel,
    noisy_student_model: PeftNoiseMaskedNoisyTransformerModel,
    absolute_cosine_similarity_penalty_weight: float = 0.0,
    jigsaw_ce_performance_loss_weight: float = 0.0,
    jigsaw_ce_protection_loss_weight: float = 0.0,
    jigsaw_ce_protection_max_loss: float | None = None,
    jigsaw_ce_protection_loss_scaling_factor: float = 1.0,
    mutual_information_loss_weight: float = 0.0,
    median_norm_penalty_weight: float = 0.0,
    jigsaw_clean_embeddings_guardrails_loss_weight: float = 0.0,
    distillation_layer_index: int | None = None,
    jigsaw_l2_performance_loss_weight: float = 0.0,
    jigsaw_l2_protection_loss_weight: float = 0.0,
    combine_noise_masks_for_mutual_information_sub_batches: bool = True,
    *,
    target: str = "soft",
    cap_form: str = "sigmoid",
    cap_scope: str = "mean",
    cap_guardrails: bool = False,
    normalization: str = "target",
    median_norm_form: str = "token",
    mutual_information_estimator: str = "pairwise",
    symmetrise_mutual_information: bool = False,
    impl: str = "auto",
) -> LossFunctions:
    """The loss of Stained Glass training with a student that alone understands the transform.

    Args:
        noisy_teacher_model: base model and transform; what it returns is the target, and is kept
            from understanding transformed embeddings.
        noisy_student_model: the same base with adapters, and the same transform and noise.
        absolute_cosine_similarity_penalty_weight: of |cos(x, x~)|.
        jigsaw_ce_performance_loss_weight: of CE(S_n | T_c): the student works on transformed text.
        jigsaw_ce_protection_loss_weight: of -cap(CE(T_n | T_c)): the base does not.
        jigsaw_ce_protection_max_loss, jigsaw_ce_protection_loss_scaling_factor: that cap, see
            `compute_masked_cross_entropy`; None: no cap.
        mutual_information_loss_weight: of the estimate of I(x; x~), which is minimised.
        median_norm_penalty_weight: of | |x + mean| - median norm of the vocabulary |.
        jigsaw_clean_embeddings_guardrails_loss_weight: of -CE(S_c | T_c): the student does not work
            on clean text.
        distillation_layer_index: decoder layer whose output the two l2 losses compare; negative
            ones count from the end.
        jigsaw_l2_performance_loss_weight, jigsaw_l2_protection_loss_weight: of L2(S_n, T_c) and of
            -L2(T_n, T_c) there.
        combine_noise_masks_for_mutual_information_sub_batches: whether only features transformed in
            both halves of the batch count.
        others: as in `compute_jigsaw_ce_losses`, `compute_jigsaw_l2_losses`,
            `mutual_information_sub_batch` and `median_norm_loss`.

    Returns:
        (loss, components, hyperparameters). loss(loss_mask [B, S]) after a forward pass through
        both models, components() after that: once each, RuntimeError otherwise. A component of
        weight 0 is not computed, and not there. hyperparameters() may be called at any time.

    Raises:
        ValueError: an l2 loss without distillation_layer_index; a cross-entropy of a truncated
        model; weights that are not finite; max_loss not above 0; models that do not share their
        noise.

    Formula: sum of weight * component.
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    hyperparameters = _hyperparameters(locals())
    ce_weights = {
        "performance": jigsaw_ce_performance_loss_weight,
        "protection": jigsaw_ce_protection_loss_weight,
        "guardrails": jigsaw_clean_embeddings_guardrails_loss_weight,
    }
    l2_weights = {
        "performance": jigsaw_l2_performance_loss_weight,
        "protection": jigsaw_l2_protection_loss_weight,
    }
    check_cap(
        jigsaw_ce_protection_max_loss,
        jigsaw_ce_protection_loss_scaling_factor,
        "jigsaw_ce_protection_max_loss",
    )
    check_choice("target", target, TARGETS)
    check_choice("cap_form", cap_form, CAP_FORMS)
    check_choice("cap_scope", cap_scope, CAP_SCOPES)
    check_choice("impl", impl, IMPLS)
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_choice("median_norm_form", median_norm_form, MEDIAN_NORM_FORMS)
    check_choice("mutual_information_estimator", mutual_information_estimator, ESTIMATORS)
    ce_terms = tuple(term for term, weight in ce_weights.items() if weight)
    l2_terms = tuple(term for term, weight in l2_weights.items() if weight)
    if l2_terms and distillation_layer_index is None:
        raise ValueError(
            "distillation_layer_index must be a decoder layer where a jigsaw_l2 loss has a weight:"
            f" got None with jigsaw_l2_{l2_terms[0]}_loss_weight={l2_weights[l2_terms[0]]}"
        )
    run = _Run(noisy_teacher_model, noisy_student_model, distillation_layer_index)
    if ce_terms:
        name = CE_NAMES[ce_terms[0]]
        run.check_not_truncated(f"{name}_weight={ce_weights[ce_terms[0]]}")
    norm = run.median_norm() if median_norm_penalty_weight else None

    def components(
        teacher: NoisyOutput, student: NoisyOutput, loss_mask: Tensor
    ) -> ComponentLossesDict:
        found: ComponentLossesDict = {}
        x, noisy = teacher.clean_input_embeddings, teacher.noisy_input_embeddings
        mask = teacher.noise_mask
        activations = _activations(teacher, student)
        if absolute_cosine_similarity_penalty_weight:
            found["absolute_cosine_similarity_penalty"] = cosine_similarity_loss(
                x, noisy, mask, absolute=True, impl=impl
            )
        if ce_terms:
            batch_size, sequence_length = x.shape[:2]
            compute_jigsaw_ce_losses(
                activations,
                batch_size,
                sequence_length,
                activations["teacher_logits"].shape[-1],
                teacher.attention_mask,
                loss_mask,
                found,
                jigsaw_ce_protection_max_loss,
                jigsaw_ce_protection_loss_scaling_factor,
                terms=ce_terms,
                target=target,
                cap_form=cap_form,
                cap_scope=cap_scope,
                cap_guardrails=cap_guardrails,
                impl=impl,
            )
        if mutual_information_loss_weight:
            found["mutual_information_loss"] = mutual_information_sub_batch(
                teacher.means,
                teacher.stds,
                mask,
                x,
                noisy,
                combine_noise_masks_for_mutual_information_sub_batches,
                estimator=mutual_information_estimator,
                symmetrise=symmetrise_mutual_information,
                impl=impl,
            )
        if norm is not None:
            found["median_norm_penalty"] = median_norm_loss(
                x, teacher.means, norm, mask, form=median_norm_form, impl=impl
            )
        if l2_terms:
            compute_jigsaw_l2_losses(
                activations,
                2 * x.shape[0],
                torch.where(teacher.attention_mask != 0, loss_mask, 0),
                found,
                terms=l2_terms,
                normalization=normalization,
                impl=impl,
            )
        return found

    weights = {
        "absolute_cosine_similarity_penalty": absolute_cosine_similarity_penalty_weight,
        **{CE_NAMES[term]: weight for term, weight in ce_weights.items()},
        "mutual_information_loss": mutual_information_loss_weight,
        "median_norm_penalty": median_norm_penalty_weight,
        **{f"jigsaw_l2_{term}_loss": weight for term, weight in l2_weights.items()},
    }
    return run.functions(components, weights, hyperparameters)


def jigsaw_loss_factory(
    noisy_teacher_model: NoiseMaskedNoisyTransformerModel,
    noisy_student_model: PeftNoiseMaskedNoisyTransformerModel,
    distillation_layer_index: int | None,
    alpha: float,
    std_log_ratio_loss_weight: float,
    input_embedding_similarity_loss_weight: float,
    distillation_layer_cosine_distance_loss_weight: float,
    distillation_layer_l2_distance_loss_weight: float = 0.0,
    distillation_protection_l2_loss_weight: float = 0.0,
    apply_distillation_protection_loss_mask: bool = True,
    clean_embedding_performance_on_student_model_loss_weight: float = 0.0,
    inverse_l2_power_law_catalyst_loss_weight: float = 0.0,
    inverse_l2_power_law_characteristic_length: float = 1.0,
    inverse_l2_power_law_exponent_of_decay: float = 1.0,
    *,
    normalization: str = "target",
    std_log_ratio_form: str = "mean",
    impl: str = "auto",
) -> LossFunctions:
    """The loss of jigsaw training by distillation at one layer.

    Args:
        noisy_teacher_model, noisy_student_model: as in `jigsaw_sgt_loss_factory`.
        distillation_layer_index: decoder layer whose outputs are compared; None: the logits.
        alpha: from 0, only the models' outputs count, to 1, only the transform's strength.
        std_log_ratio_loss_weight: of minus the logarithm of the standard deviations, relative to
            the largest one the transform can have.
        input_embedding_similarity_loss_weight: of cos(x, x~).
        distillation_layer_cosine_distance_loss_weight: of 1 - cos(S_n, T_c).
        distillation_layer_l2_distance_loss_weight: of L2(S_n, T_c).
        distillation_protection_l2_loss_weight: of -L2(T_n, T_c).
        apply_distillation_protection_loss_mask: whether that one counts the loss mask's positions
            or, as all others here, the attention mask's.
        clean_embedding_performance_on_student_model_loss_weight: of -L2(S_c, T_c).
        inverse_l2_power_law_catalyst_loss_weight, inverse_l2_power_law_characteristic_length,
            inverse_l2_power_law_exponent_of_decay: of an inverse power of how far embeddings move.
        normalization: as in `compute_masked_normalized_l2_loss`.
        std_log_ratio_form: as in `std_log_ratio_loss`.
        impl: "auto" (Triton on a GPU, torch on a CPU), "triton" or "torch".

    Returns:
        As `jigsaw_sgt_loss_factory`.

    Raises:
        ValueError: alpha outside [0, 1]; an exponent or a length not above 0; weights that are not
        finite; truncated models without a layer; models that do not share their noise.

    Formula: (1 - alpha) * sum of weight * component over the outputs + alpha * the same sum over
    the input embeddings.
    Source: Stained Glass Engine 2.8.1, loss.jigsaw.
    """
    hyperparameters = _hyperparameters(locals())
    check_number("alpha", alpha, 0.0, 1.0)
    check_above_0(
        "inverse_l2_power_law_characteristic_length", inverse_l2_power_law_characteristic_length
    )
    check_above_0("inverse_l2_power_law_exponent_of_decay", inverse_l2_power_law_exponent_of_decay)
    check_choice("normalization", normalization, NORMALIZATIONS)
    check_choice("std_log_ratio_form", std_log_ratio_form, STD_FORMS)
    check_choice("impl", impl, IMPLS)
    run = _Run(noisy_teacher_model, noisy_student_model, distillation_layer_index)
    of_outputs = {
        "distillation_layer_cosine_distance_loss": distillation_layer_cosine_distance_loss_weight,
        "distillation_layer_l2_distance_loss": distillation_layer_l2_distance_loss_weight,
        "distillation_protection_l2_loss": distillation_protection_l2_loss_weight,
        "clean_embedding_performance_on_student_model_loss": (
            clean_embedding_performance_on_student_model_loss_weight
        ),
    }
    of_inputs = {
        "std_log_ratio_loss": std_log_ratio_loss_weight,
        "input_embedding_similarity_loss": input_embedding_similarity_loss_weight,
        "inverse_l2_power_law_catalyst_loss": inverse_l2_power_law_catalyst_loss_weight,
    }
    if distillation_layer_index is None and any(of_outputs.values()):
        run.check_not_truncated("distillation_layer_index=None, which compares logits")
    max_scale = run.max_std()

    def components(
        teacher: NoisyOutput, student: NoisyOutput, loss_mask: Tensor
    ) -> ComponentLossesDict:
        x, noisy, mask = (
            teacher.clean_input_embeddings,
            teacher.noisy_input_embeddings,
            teacher.noise_mask,
        )
        attended = teacher.attention_mask
        protected = attended
        if apply_distillation_protection_loss_mask:
            protected = torch.where(attended != 0, loss_mask, 0)
        outputs = (
            (teacher.logits, student.logits)
            if distillation_layer_index is None
            else (teacher.embeddings, student.embeddings)
        )

        @functools.cache  # logits of a lazy head are made once, and only the halves compared
        def half(model: int, noisy_half: bool) -> Tensor:
            whole, batch_size = outputs[model], x.shape[0]
            assert whole is not None
            rows = whole[batch_size:] if noisy_half else whole[:batch_size]
            made: Tensor = rows.materialize() if hasattr(rows, "materialize") else rows
            return made

        def l2(model: int, noisy_half: bool, counted: Tensor) -> Tensor:
            states, clean = half(model, noisy_half), half(0, False).detach()
            return masked_normalized_l2(
                states, clean, counted, normalization=normalization, impl=impl
            )

        def cosine_distance() -> Tensor:
            moments = row_moments(half(1, True), half(0, False).detach(), attended, impl=impl)
            return masked_mean(one_minus_cosine(moments), attended)

        terms: dict[str, Callable[[], Tensor]] = {
            "distillation_layer_cosine_distance_loss": cosine_distance,
            "distillation_layer_l2_distance_loss": lambda: l2(1, True, attended),
            "distillation_protection_l2_loss": lambda: -l2(0, True, protected),
            "clean_embedding_performance_on_student_model_loss": lambda: -l2(1, False, attended),
            "std_log_ratio_loss": lambda: std_log_ratio_loss(
                teacher.stds, mask, reference=max_scale, form=std_log_ratio_form
            ),
            "input_embedding_similarity_loss": lambda: cosine_similarity_loss(
                x, noisy, mask, impl=impl
            ),
            "inverse_l2_power_law_catalyst_loss": lambda: inverse_l2_power_law_loss(
                x,
                noisy,
                mask,
                characteristic_length=inverse_l2_power_law_characteristic_length,
                exponent_of_decay=inverse_l2_power_law_exponent_of_decay,
                impl=impl,
            ),
        }
        return {name: term() for name, term in terms.items() if weights[name]}

    weights = {name: (1 - alpha) * weight for name, weight in of_outputs.items()}
    weights |= {name: alpha * weight for name, weight in of_inputs.items()}
    return run.functions(components, weights, hyperparameters)


def _hyperparameters(arguments: Mapping[str, Any]) -> HyperparametersDict:
    """A factory's arguments but its models; ValueError for numbers that are not finite."""
    found: HyperparametersDict = {}
    for name, value in arguments.items():
        if name.endswith("_model"):
            continue
        if name.endswith("_weight"):
            check_number(name, value)
        found[name] = value
    return found


def _activations(teacher: NoisyOutput, student: NoisyOutput) -> ActivationsDict:
    found: ActivationsDict = {}
    if teacher.logits is not None and student.logits is not None:
        found |= {"teacher_logits": teacher.logits, "student_logits": student.logits}
    if teacher.embeddings is not None and student.embeddings is not None:
        found |= {
            "teacher_embeddings": teacher.embeddings,
            "student_embeddings": student.embeddings,
        }
    return found


def _keep(
    of: Callable[[], _Run | None], name: str, module: object, args: object, output: NoisyOutput
) -> None:
    if (run := of()) is not None:
        run.outputs[name], run.components = output, None


class _Run:
    """What both models returned last, and the functions that a factory returns."""

    def __init__(self, teacher: Any, student: Any, layer: int | None) -> None:
        self.teacher, self.student = teacher, student
        base, adapted = NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
        if not isinstance(teacher, base) or isinstance(teacher, adapted):
            raise TypeError(
                f"noisy_teacher_model must be a {base.__name__}: got {type(teacher).__name__}"
            )
        if not isinstance(student, adapted):
            raise TypeError(
                f"noisy_student_model must be a {adapted.__name__}: got {type(student).__name__}"
            )
        if teacher.noise_cache is not student.noise_cache or teacher.cloak is not student.cloak:
            raise ValueError(
                "teacher and student must share their transform and noise: build the student with"
                " cloak=teacher.cloak, noise_cache=teacher.noise_cache"
            )
        for model in (teacher, student):
            model.keep_layer(layer)
        self.outputs: dict[str, NoisyOutput] = {}
        self.components: ComponentLossesDict | None = None
        for name, model in (("teacher", teacher), ("student", student)):
            hook = model.register_forward_hook(partial(_keep, weakref.ref(self), name))
            weakref.finalize(self, hook.remove)  # with the functions that a factory returned

    def check_not_truncated(self, why: str) -> None:
        """ValueError where a model has no logits."""
        for name in ("teacher", "student"):
            if getattr(self, name).is_truncated:
                raise ValueError(
                    f"the {name} is truncated and makes no logits, but {why}: leave the"
                    " cross-entropies out, or do not truncate"
                )

    def median_norm(self) -> float:
        """Of the rows of the base model's input embeddings."""
        return float(embedding_norms(self.teacher.base_model).median())

    def max_std(self) -> float:
        """The largest standard deviation that the transform can have, 1 where it has no bound."""
        largest = self.teacher.cloak.max_std
        return largest if math.isfinite(largest) else 1.0

    def functions(
        self,
        components: Callable[[NoisyOutput, NoisyOutput, Tensor], ComponentLossesDict],
        weights: Mapping[str, float],
        hyperparameters: HyperparametersDict,
    ) -> LossFunctions:
        def loss(loss_mask: Tensor) -> Tensor:
            missing = [name for name in ("teacher", "student") if name not in self.outputs]
            if missing:
                raise RuntimeError(
                    f"no forward pass of the {' and the '.join(missing)} since the last loss: run"
                    " both models, then take the loss once"
                )
            teacher, student = self.outputs["teacher"], self.outputs["student"]
            if teacher.noisy_input_embeddings is not student.noisy_input_embeddings:
                raise RuntimeError(
                    "teacher and student ran on different batches or noise: run both on the same"
                    " tensors before the loss"
                )
            if not isinstance(loss_mask, Tensor):
                raise TypeError(f"loss_mask must be a torch.Tensor: got {type(loss_mask).__name__}")
            check_weights("loss_mask", loss_mask, teacher.clean_input_embeddings.shape[:-1])
            self.outputs.clear()
            found = components(teacher, student, loss_mask)
            total = teacher.noisy_input_embeddings.flatten()[:0].float().sum()  # 0, with a graph
            for name, component in found.items():
                total = total + weights[name] * component
            self.components = {name: component.detach() for name, component in found.items()}
            return total

        def get_component_losses() -> ComponentLossesDict:
            if self.components is None:
                raise RuntimeError(
                    "no components: take the loss after a forward pass of both models, then ask for"
                    " its components once"
                )
            found, self.components = self.components, None
            return found

        return loss, get_component_losses, lambda: dict(hyperparameters)
