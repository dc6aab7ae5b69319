"""What `onepass.jigsaw` offers, and what it costs to import."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from onepass import jigsaw

# The documented signatures: names and defaults, in order; ours come after, by keyword only.
DOCUMENTED = {
    "compute_masked_cross_entropy": (
        "output_logits target_labels batch_size sequence_length mask max_loss=None"
        " ce_scaling_factor=1.0"
    ),
    "compute_masked_normalized_l2_loss": "embeddings target_embeddings mask",
    "compute_jigsaw_ce_losses": (
        "activations batch_size sequence_length vocab_size attention_mask loss_mask losses"
        " jigsaw_ce_protection_max_loss jigsaw_ce_protection_loss_scaling_factor"
    ),
    "compute_jigsaw_l2_losses": "activations super_batch_size loss_mask losses",
    "jigsaw_loss_factory": (
        "noisy_teacher_model noisy_student_model distillation_layer_index alpha"
        " std_log_ratio_loss_weight input_embedding_similarity_loss_weight"
        " distillation_layer_cosine_distance_loss_weight"
        " distillation_layer_l2_distance_loss_weight=0.0"
        " distillation_protection_l2_loss_weight=0.0"
        " apply_distillation_protection_loss_mask=True"
        " clean_embedding_performance_on_student_model_loss_weight=0.0"
        " inverse_l2_power_law_catalyst_loss_weight=0.0"
        " inverse_l2_power_law_characteristic_length=1.0"
        " inverse_l2_power_law_exponent_of_decay=1.0"
    ),
    "jigsaw_sgt_loss_factory": (
        "noisy_teacher_model noisy_student_model absolute_cosine_similarity_penalty_weight=0.0"
        " jigsaw_ce_performance_loss_weight=0.0 jigsaw_ce_protection_loss_weight=0.0"
        " jigsaw_ce_protection_max_loss=None jigsaw_ce_protection_loss_scaling_factor=1.0"
        " mutual_information_loss_weight=0.0 median_norm_penalty_weight=0.0"
        " jigsaw_clean_embeddings_guardrails_loss_weight=0.0 distillation_layer_index=None"
        " jigsaw_l2_performance_loss_weight=0.0 jigsaw_l2_protection_loss_weight=0.0"
        " combine_noise_masks_for_mutual_information_sub_batches=True"
    ),
    "mutual_information_sub_batch": (
        "means_tensor stds_tensor noise_mask clean_input_embeddings noisy_input_embeddings"
        " combine_noise_masks_for_mutual_information_sub_batches=True losses=None"
    ),
    "gaussian_mixture_entropy": (
        "clean_embeddings transformed_embeddings means stds mask losses=None"
    ),
    "square_mahalanobis_distance": "x y stds",
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_documented_arguments_in_their_order(name: str) -> None:
    found = []
    for parameter in inspect.signature(getattr(jigsaw, name)).parameters.values():
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD:
            has_default = parameter.default is not parameter.empty
            found.append(parameter.name + (f"={parameter.default}" if has_default else ""))
        else:
            assert parameter.kind is parameter.KEYWORD_ONLY
    assert " ".join(found) == DOCUMENTED[name]


def test_every_name_loads() -> None:
    assert jigsaw.__all__ == sorted(jigsaw.__all__)
    assert set(jigsaw.__all__) <= set(dir(jigsaw))
    for name in jigsaw.__all__:
        assert getattr(jigsaw, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(jigsaw, "no_such_name")  # noqa: B009 -- mypy knows there is none


def test_losses_need_no_transformers() -> None:
    code = (
        "import sys; from onepass.jigsaw import jigsaw_sgt_loss_factory, compute_jigsaw_ce_losses;"
        "print(sorted({'transformers', 'peft', 'triton'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr
