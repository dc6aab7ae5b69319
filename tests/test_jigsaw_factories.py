"""The factories: totals against SPEC 1.7 in plain torch, and the contract of what they return."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import onepass
from onepass.jigsaw.loss import jigsaw_loss_factory, jigsaw_sgt_loss_factory
from onepass.jigsaw.models import (
    NoiseMaskedNoisyTransformerModel,
    NoisyOutput,
    PeftNoiseMaskedNoisyTransformerModel,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")
from support.tiny_jigsaw import B, S, batch, pair  # noqa: E402
from support.tiny_models import D  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
LOSS_MASK = torch.tensor([[0, 1, 1, 1, 0, 1, 1], [0, 1, 0, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1, 1]])


def plain_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask != 0, values, 0.0).sum() / (mask != 0).sum().clamp_min(1)


def halves(states: Tensor) -> tuple[Tensor, Tensor]:
    return states[:B].double(), states[B:].double()


def plain_sgt(
    teacher: NoisyOutput, student: NoisyOutput, weights: dict[str, float], median: float
) -> dict[str, Tensor]:
    """Every component of jigsaw_sgt_loss_factory, named as there."""
    attended, noised = teacher.attention_mask, teacher.noise_mask
    counted = attended * LOSS_MASK
    assert teacher.logits is not None and student.logits is not None
    (clean, noisy), (guarded, performing) = halves(teacher.logits), halves(student.logits)
    q = clean.softmax(-1).detach()

    def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
        return plain_mean(-(q * logits.log_softmax(-1)).sum(-1), mask)

    x, moved = teacher.clean_input_embeddings.double(), teacher.noisy_input_embeddings.double()
    means, stds = teacher.means.double(), teacher.stds.double()
    half = B // 2
    both = (noised[:half] * noised[half : 2 * half])[..., None].expand(half, S, D)
    z = (moved[:half] - x[half : 2 * half] - means[half : 2 * half]) / stds[half : 2 * half]
    mutual = 0.5 * (2 * (stds[half : 2 * half] / stds[:half]).log() + z**2 - 1)
    assert teacher.embeddings is not None and student.embeddings is not None
    (t_c, t_n), (_, s_n) = halves(teacher.embeddings), halves(student.embeddings)
    norm = t_c.norm(dim=-1).detach()
    components = {
        "absolute_cosine_similarity_penalty": plain_mean(
            F.cosine_similarity(x, moved, dim=-1).abs(), noised
        ),
        "jigsaw_ce_performance_loss": cross_entropy(performing, attended),
        "jigsaw_ce_protection_loss": -4 * torch.sigmoid(0.5 * cross_entropy(noisy, counted)),
        "mutual_information_loss": plain_mean(mutual, both),
        "median_norm_penalty": plain_mean(((x + means).norm(dim=-1) - median).abs(), noised),
        "jigsaw_clean_embeddings_guardrails_loss": -cross_entropy(guarded, counted),
        "jigsaw_l2_performance_loss": plain_mean((s_n - t_c.detach()).norm(dim=-1) / norm, counted),
        "jigsaw_l2_protection_loss": -plain_mean((t_n - t_c.detach()).norm(dim=-1) / norm, counted),
    }
    return {name: components[name] for name in weights}


SGT_WEIGHTS = {
    "absolute_cosine_similarity_penalty": 0.7,
    "jigsaw_ce_performance_loss": 1.0,
    "jigsaw_ce_protection_loss": 0.9,
    "mutual_information_loss": 0.01,
    "median_norm_penalty": 0.1,
    "jigsaw_clean_embeddings_guardrails_loss": 0.05,
    "jigsaw_l2_performance_loss": 0.3,
    "jigsaw_l2_protection_loss": 0.2,
}


def trained(*models: Any) -> dict[str, Any]:
    return {n: p for model in models for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lazy", [False, True])
def test_sgt_total_components_and_gradients(lazy: bool) -> None:
    # Deviations that are not tiny: their squares divide what the mutual information sums.
    cloak = {"scale": (0.2, 2.0), "init_std": 0.5}
    teacher, student = pair(distillation_layer_index=0, cloak=cloak)
    if lazy:
        onepass.lazy_head(teacher.base_model.get_base_model())
    kept: list[NoisyOutput] = []
    for model in (teacher, student):
        model.register_forward_hook(lambda *call: kept.append(call[2]))
    weights: dict[str, Any] = {f"{name}_weight": w for name, w in SGT_WEIGHTS.items()}
    loss, components, hyperparameters = jigsaw_sgt_loss_factory(
        teacher,
        student,
        jigsaw_ce_protection_max_loss=4.0,
        jigsaw_ce_protection_loss_scaling_factor=0.5,
        distillation_layer_index=0,
        **weights,
    )

    def run(shared: bool) -> Tensor:
        kept.clear()
        torch.manual_seed(0)
        inputs = batch()
        teacher(**inputs)
        student(**(inputs if shared else batch()))
        return loss(LOSS_MASK)

    with pytest.raises(RuntimeError, match="ran on different batches or noise"):
        run(shared=False)
    with onepass.strict():
        total = run(shared=True)
        total.backward()
    found = components()
    got = {n: p.grad.clone() for n, p in trained(teacher, student).items() if p.grad is not None}
    assert list(found) == list(plain_sgt_names())
    if lazy:
        onepass.unlazy_head(teacher.base_model.get_base_model())
    teacher.zero_grad()
    student.zero_grad()
    torch.manual_seed(0)
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    rows = teacher.base_model.get_input_embeddings().weight
    median = float(rows.detach().norm(dim=-1).median())
    wanted = plain_sgt(kept[-2], kept[-1], SGT_WEIGHTS, median)
    whole = torch.stack([SGT_WEIGHTS[name] * wanted[name] for name in SGT_WEIGHTS]).sum()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.detach(), rtol=1e-5, atol=1e-6)
        assert not found[name].requires_grad
    torch.testing.assert_close(total.detach().double(), whole.detach(), rtol=1e-5, atol=1e-6)
    whole.backward()
    truth = {n: p.grad for n, p in trained(teacher, student).items() if p.grad is not None}
    assert got.keys() == truth.keys() == trained(teacher, student).keys()
    for name, gradient in truth.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-5 * scale + 1e-8)
    assert hyperparameters()["jigsaw_ce_protection_max_loss"] == 4.0
    assert hyperparameters() == hyperparameters()


def plain_sgt_names() -> list[str]:
    """In the order in which they are computed."""
    return [
        "absolute_cosine_similarity_penalty",
        "jigsaw_ce_performance_loss",
        "jigsaw_ce_protection_loss",
        "jigsaw_clean_embeddings_guardrails_loss",
        "mutual_information_loss",
        "median_norm_penalty",
        "jigsaw_l2_performance_loss",
        "jigsaw_l2_protection_loss",
    ]


def test_distillation_total() -> None:
    teacher, student = pair(distillation_layer_index=1)
    kept: list[NoisyOutput] = []
    for model in (teacher, student):
        model.register_forward_hook(lambda *call: kept.append(call[2]))
    weights = (0.3, 0.2, 1.0, 0.5, 0.4)
    loss, components, hyperparameters = jigsaw_loss_factory(
        teacher, student, 1, 0.25, *weights, True, 0.6, 0.7, 1.5, 2.0
    )
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    total = loss(LOSS_MASK)
    found = components()
    t, s = kept
    attended, noised = t.attention_mask, t.noise_mask
    assert t.embeddings is not None and s.embeddings is not None
    (t_c, t_n), (s_c, s_n) = halves(t.embeddings), halves(s.embeddings)
    x, moved = t.clean_input_embeddings.double(), t.noisy_input_embeddings.double()

    def l2(states: Tensor, mask: Tensor) -> Tensor:
        return plain_mean((states - t_c).norm(dim=-1) / t_c.norm(dim=-1), mask)

    distance = (moved - x).norm(dim=-1)
    sigma = (t.stds.double() * noised[..., None]).sum() / (noised.sum() * D)
    wanted = {
        "distillation_layer_cosine_distance_loss": plain_mean(
            1 - F.cosine_similarity(s_n, t_c, dim=-1), attended
        ),
        "distillation_layer_l2_distance_loss": l2(s_n, attended),
        "distillation_protection_l2_loss": -l2(t_n, attended * LOSS_MASK),
        "clean_embedding_performance_on_student_model_loss": -l2(s_c, attended),
        "std_log_ratio_loss": -(sigma / teacher.cloak.max_std).log(),
        "input_embedding_similarity_loss": plain_mean(
            F.cosine_similarity(x, moved, dim=-1), noised
        ),
        "inverse_l2_power_law_catalyst_loss": plain_mean((distance / 1.5) ** -2.0, noised),
    }
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].double(), value.detach(), rtol=1e-5, atol=1e-6)
    factor = dict(zip(wanted, (1.0, 0.5, 0.4, 0.6, 0.3, 0.2, 0.7), strict=True))
    parts = [factor[name] * value.item() for name, value in wanted.items()]
    outputs, of_inputs = sum(parts[:4]), sum(parts[4:])
    assert total.item() == pytest.approx(0.75 * outputs + 0.25 * of_inputs, rel=1e-5)
    assert hyperparameters()["inverse_l2_power_law_exponent_of_decay"] == 2.0
    assert hyperparameters()["alpha"] == 0.25


@pytest.mark.parametrize("lazy", [False, True])
def test_without_a_layer_the_logits_are_compared(lazy: bool) -> None:
    teacher, student = pair()
    if lazy:  # rows of the whole vocabulary are what this loss is about: they are made
        onepass.lazy_head(teacher.base_model.get_base_model())
    loss, components, _ = jigsaw_loss_factory(teacher, student, None, 0.0, 0.3, 0.2, 1.0)
    inputs = batch()
    out = [m(**inputs) for m in (teacher, student)]
    loss(LOSS_MASK).backward()
    found = components()
    assert list(found) == ["distillation_layer_cosine_distance_loss"], "alpha = 0 leaves no others"
    if not lazy:
        wanted = 1 - F.cosine_similarity(out[1].logits[B:], out[0].logits[:B], dim=-1)
        torch.testing.assert_close(
            found["distillation_layer_cosine_distance_loss"],
            plain_mean(wanted, inputs["attention_mask"]).detach(),
        )


@pytest.mark.parametrize("name", SGT_WEIGHTS)
def test_a_component_of_weight_0_is_not_there(name: str) -> None:
    teacher, student = pair()
    options: dict[str, Any] = {"distillation_layer_index": 0 if "l2" in name else None}
    loss, components, _ = jigsaw_sgt_loss_factory(
        teacher, student, **options | {f"{name}_weight": 1.0}
    )
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    loss(LOSS_MASK)
    assert list(components()) == [name]


def test_no_weight_at_all_is_0_with_a_graph() -> None:
    teacher, student = pair()
    loss, components, _ = jigsaw_sgt_loss_factory(teacher, student)
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    total = loss(LOSS_MASK)
    total.backward()
    assert total.item() == 0 and components() == {}


def test_each_function_once_after_both_forward_passes() -> None:
    teacher, student = pair()
    loss, components, hyperparameters = jigsaw_sgt_loss_factory(
        teacher, student, jigsaw_ce_performance_loss_weight=1.0
    )
    inputs = batch()
    assert hyperparameters()["jigsaw_ce_performance_loss_weight"] == 1.0
    with pytest.raises(RuntimeError, match="no forward pass of the teacher and the student"):
        loss(LOSS_MASK)
    teacher(**inputs)
    with pytest.raises(RuntimeError, match="no forward pass of the student"):
        loss(LOSS_MASK)
    with pytest.raises(RuntimeError, match="no components"):
        components()
    student(**inputs)
    with pytest.raises(RuntimeError, match="no components"):
        components()
    loss(LOSS_MASK)
    with pytest.raises(RuntimeError, match="no forward pass of the teacher and the student"):
        loss(LOSS_MASK)
    components()
    with pytest.raises(RuntimeError, match="no components"):
        components()
    teacher(**inputs)
    with pytest.raises(RuntimeError, match="no forward pass of the student"):
        loss(LOSS_MASK)


def test_nothing_is_held_once_the_loss_is_taken() -> None:
    import gc
    import weakref

    teacher, student = pair()
    loss, components, _ = jigsaw_sgt_loss_factory(
        teacher, student, jigsaw_ce_performance_loss_weight=1.0
    )
    inputs = batch()
    outs = [teacher(**inputs), student(**inputs)]
    watched = [weakref.ref(t) for out in outs for t in (out.logits, out.noisy_input_embeddings)]
    del outs
    loss(LOSS_MASK).backward()
    gc.collect()
    assert all(ref() is None for ref in watched)
    components()


BAD_OPTIONS = {"cap_form": "linear", "cap_scope": "row", "impl": "cuda"}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_options_that_are_refused_before_any_forward(name: str) -> None:
    options: dict[str, Any] = {name: BAD_OPTIONS[name]}
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        jigsaw_sgt_loss_factory(*pair(), **options)


REFUSED: list[tuple[Callable[[Any, Any], Any], str]] = [
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, jigsaw_l2_protection_loss_weight=0.5),
        "distillation_layer_index must be a decoder layer .* None with"
        " jigsaw_l2_protection_loss_weight=0.5",
    ),
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, median_norm_penalty_weight=math.nan),
        "median_norm_penalty_weight must be finite: got nan",
    ),
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, jigsaw_ce_protection_max_loss=0.0),
        "jigsaw_ce_protection_max_loss must be positive",
    ),
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, distillation_layer_index=7),
        "distillation_layer_index must be a decoder layer from -2 to 1: got 7",
    ),
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, target="hard"),
        "target must be one of soft, argmax: got 'hard'",
    ),
    (
        lambda t, s: jigsaw_sgt_loss_factory(t, s, mutual_information_estimator="exact"),
        "mutual_information_estimator must be one of pairwise, mixture: got 'exact'",
    ),
    (
        lambda t, s: jigsaw_loss_factory(t, s, 0, 1.5, 0.0, 0.0, 0.0),
        "alpha must be between 0.0 and 1.0: got 1.5",
    ),
    (
        lambda t, s: jigsaw_loss_factory(
            t, s, 0, 0.5, 0.0, 0.0, 0.0, inverse_l2_power_law_exponent_of_decay=0.0
        ),
        "inverse_l2_power_law_exponent_of_decay must be above 0: got 0.0",
    ),
    (
        lambda t, s: jigsaw_loss_factory(
            t, s, 0, 0.5, 0.0, 0.0, 0.0, inverse_l2_power_law_characteristic_length=-1.0
        ),
        "inverse_l2_power_law_characteristic_length must be above 0: got -1.0",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refused(case: int) -> None:
    make, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        make(*pair())


def test_truncated_models_have_no_cross_entropy() -> None:
    teacher, student = pair(distillation_layer_index=0, truncated=True)
    with pytest.raises(
        ValueError, match="truncated and makes no logits, but jigsaw_ce_performance"
    ):
        jigsaw_sgt_loss_factory(
            teacher, student, jigsaw_ce_performance_loss_weight=1.0, distillation_layer_index=0
        )
    with pytest.raises(ValueError, match="distillation_layer_index=None, which compares logits"):
        jigsaw_loss_factory(teacher, student, None, 0.5, 0.0, 0.0, 1.0)
    loss, components, _ = jigsaw_sgt_loss_factory(
        teacher, student, jigsaw_l2_performance_loss_weight=1.0, distillation_layer_index=0
    )
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    loss(LOSS_MASK).backward()
    assert list(components()) == ["jigsaw_l2_performance_loss"]


def test_models_that_do_not_share_their_noise() -> None:
    teacher, student = pair()
    other = PeftNoiseMaskedNoisyTransformerModel(student.base_model, student.cloak)
    with pytest.raises(ValueError, match="must share their transform and noise"):
        jigsaw_sgt_loss_factory(teacher, other)
    another = NoiseMaskedNoisyTransformerModel(
        teacher.base_model, pair()[0].cloak, noise_cache=student.noise_cache
    )
    with pytest.raises(ValueError, match="must share their transform and noise"):
        jigsaw_loss_factory(another, student, 0, 0.5, 0.0, 0.0, 0.0)


def test_loss_masks_that_do_not_fit() -> None:
    teacher, student = pair()
    loss, _, _ = jigsaw_sgt_loss_factory(teacher, student, jigsaw_ce_performance_loss_weight=1.0)
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    with pytest.raises(ValueError, match=r"loss_mask must have the shape of its rows, \(3, 7\)"):
        loss(LOSS_MASK.T)


def test_a_base_model_in_bf16() -> None:
    """The transform stays in float32; every component is near that of a float32 base."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher, student = pair(
            distillation_layer_index=0, cloak={"scale": (0.2, 2.0), "init_std": 0.5}
        )
        teacher.base_model.to(dtype)
        onepass.lazy_head(teacher.base_model.get_base_model())
        weights: dict[str, Any] = {f"{name}_weight": w for name, w in SGT_WEIGHTS.items()}
        sgt = jigsaw_sgt_loss_factory(teacher, student, distillation_layer_index=0, **weights)
        at_layer = jigsaw_loss_factory(
            teacher, student, 0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, True, 1.0, 1.0
        )
        inputs = batch()
        torch.manual_seed(0)
        teacher(**inputs)
        student(**inputs)
        losses = [made[0](LOSS_MASK) for made in (sgt, at_layer)]
        sum(losses[1:], losses[0]).backward()
        assert all(p.grad is not None for p in teacher.cloak.parameters())
        found.append({**sgt[1](), **at_layer[1]()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=2e-2, atol=2e-2)


def test_hooks_go_with_the_functions_that_they_serve() -> None:
    teacher, student = pair()
    before = [len(m._forward_hooks) for m in (teacher, student)]
    made = [jigsaw_sgt_loss_factory(teacher, student) for _ in range(3)]
    assert [len(m._forward_hooks) for m in (teacher, student)] == [n + 3 for n in before]
    del made
    gc.collect()
    assert [len(m._forward_hooks) for m in (teacher, student)] == before


def test_a_loss_mask_that_does_not_fit_costs_no_step() -> None:
    teacher, student = pair()
    loss, components, _ = jigsaw_sgt_loss_factory(
        teacher, student, jigsaw_ce_performance_loss_weight=1.0
    )
    inputs = batch()
    teacher(**inputs)
    student(**inputs)
    with pytest.raises(ValueError, match="loss_mask must have the shape"):
        loss(LOSS_MASK.T)
    loss(LOSS_MASK)
    teacher(**inputs)
    with pytest.raises(RuntimeError, match="no components"):
        components()  # of a batch that is not the last any more


def test_options_reach_the_mutual_information() -> None:
    found = []
    for symmetrise in (False, True):
        teacher, student = pair(cloak={"scale": (0.2, 2.0), "init_std": 0.5})
        loss, components, _ = jigsaw_sgt_loss_factory(
            teacher,
            student,
            mutual_information_loss_weight=1.0,
            symmetrise_mutual_information=symmetrise,
        )
        inputs = batch()
        torch.manual_seed(0)
        teacher(**inputs)
        student(**inputs)
        loss(LOSS_MASK)
        found.append(float(components()["mutual_information_loss"]))
    assert found[0] != pytest.approx(found[1], rel=1e-3)


@pytest.mark.parametrize("heads", ["adapter on the head", "one of them lazy"])
def test_teacher_and_student_of_different_heads(heads: str) -> None:
    """No logits are made of either; the values are those of logits."""
    import peft

    from onepass.jigsaw.cloak import TransformerCloak
    from support.tiny_models import tiny

    found = []
    for lazy in (False, True):
        base = tiny("llama")
        names = ["q_proj", "lm_head"] if heads == "adapter on the head" else ["q_proj"]
        model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=names))
        with torch.no_grad():
            for index, (name, weight) in enumerate(model.named_parameters()):
                if "lora_B" in name:
                    torch.manual_seed(index)
                    weight.normal_(std=0.2)
        torch.manual_seed(0)
        cloak = TransformerCloak.from_model(base)
        teacher = NoiseMaskedNoisyTransformerModel(
            tiny("llama") if heads == "one of them lazy" else model, cloak
        )
        student = PeftNoiseMaskedNoisyTransformerModel(
            model, cloak, noise_cache=teacher.noise_cache
        )
        if lazy:
            onepass.lazy_head(base)
        loss, components, _ = jigsaw_sgt_loss_factory(
            teacher,
            student,
            jigsaw_ce_performance_loss_weight=1.0,
            jigsaw_ce_protection_loss_weight=1.0,
            jigsaw_clean_embeddings_guardrails_loss_weight=0.1,
        )
        inputs = batch()
        torch.manual_seed(0)
        teacher(**inputs)
        student(**inputs)
        with onepass.strict():
            loss(LOSS_MASK).backward()
        found.append(components())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-5)
