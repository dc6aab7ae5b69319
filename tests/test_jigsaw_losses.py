"""The documented jigsaw losses and the terms over input embeddings, against plain torch.

`plain_*` spell SPEC 1.4 to 1.6 out, one call for each loss: values and gradients, masks random,
empty and full, hard and soft targets, caps of either scope.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onepass import LazyLogits, strict
from onepass.jigsaw.activations import ActivationsDict
from onepass.jigsaw.input_losses import (
    cosine_similarity_loss,
    inverse_l2_power_law_loss,
    median_norm_loss,
    std_log_ratio_loss,
)
from onepass.jigsaw.losses import (
    compute_jigsaw_ce_losses,
    compute_jigsaw_l2_losses,
    compute_masked_cross_entropy,
    compute_masked_normalized_l2_loss,
)

B, S, D, V = 3, 5, 12, 97
MASKS = ("random", "empty", "full")
CAPS: list[dict[str, Any]] = [
    {"max_loss": None},
    {"max_loss": 4.0, "ce_scaling_factor": 0.5},
    {"max_loss": 4.0, "ce_scaling_factor": 0.5, "cap_scope": "token"},
    {"max_loss": 4.0, "ce_scaling_factor": 0.5, "cap_form": "zero_at_zero"},
]


def mask_of(kind: str, seed: int = 0) -> Tensor:
    if kind == "random":
        return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < 0.6
    return torch.full((B, S), kind == "full")


def plain_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask != 0, values, 0.0).sum() / max(int(mask.sum()), 1)


def plain_cap(
    loss: Tensor, max_loss: float | None, ce_scaling_factor: float = 1.0, cap_form: str = "sigmoid"
) -> Tensor:
    if max_loss is None:
        return loss
    squeezed = torch.sigmoid(ce_scaling_factor * loss)
    return max_loss * (squeezed if cap_form == "sigmoid" else 2 * squeezed - 1)


def plain_cross_entropy(rows: Tensor, mask: Tensor, cap: dict[str, Any]) -> Tensor:
    options = {name: value for name, value in cap.items() if name != "cap_scope"}
    if cap.get("cap_scope") == "token":
        return plain_mean(plain_cap(rows, **options), mask)
    return plain_cap(plain_mean(rows, mask), **options)


def soft_rows(logits: Tensor, target_logits: Tensor) -> Tensor:
    return -(F.softmax(target_logits, -1) * F.log_softmax(logits, -1)).sum(-1)


def both(
    function: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    *inputs: Tensor,
    tol: float = 1e-5,
) -> None:
    """Values and gradients of `function`, against `plain` in float64."""
    ours = [x.clone().requires_grad_() for x in inputs]
    theirs = [x.double().requires_grad_() for x in inputs]
    got, want = function(*ours), plain(*theirs)
    torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol)
    got.backward()
    want.backward()
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        other_grad = torch.zeros_like(other) if other.grad is None else other.grad
        scale = float(other_grad.abs().max()) or 1.0
        torch.testing.assert_close(mine.grad.double(), other_grad, rtol=tol, atol=tol * scale)


# -- compute_masked_cross_entropy -------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["3d", "rows"])
@pytest.mark.parametrize("cap", CAPS, ids=["none", "mean", "token", "zero"])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("soft", [True, False], ids=["soft", "hard"])
def test_masked_cross_entropy(soft: bool, kind: str, cap: dict[str, Any], flat: bool) -> None:
    torch.manual_seed(0)
    logits, mask = 3 * torch.randn(B, S, V), mask_of(kind)
    target = F.softmax(torch.randn(B, S, V), -1) if soft else torch.randint(V, (B, S))

    def plain(z: Tensor) -> Tensor:
        if soft:
            rows = -(target.double() * F.log_softmax(z, -1)).sum(-1)
        else:
            rows = F.cross_entropy(z.flatten(0, 1), target.flatten(), reduction="none").view(B, S)
        return plain_cross_entropy(rows, mask, cap)

    def ours(z: Tensor) -> Tensor:
        if flat:
            t = target.flatten(0, 1)
            return compute_masked_cross_entropy(z.flatten(0, 1), t, B, S, mask.flatten(), **cap)
        return compute_masked_cross_entropy(z, target, B, S, mask, **cap)

    both(ours, plain, logits)


def test_documented_arguments_are_positional() -> None:
    logits, target = torch.randn(B * S, V), torch.randint(V, (B * S,))
    capped = compute_masked_cross_entropy(logits, target, B, S, mask_of("full"), 4.0, 0.5)
    assert 2.0 < float(capped) < 4.0


def test_cap_stays_below_its_maximum_and_has_the_analytic_gradient() -> None:
    """d/d CE_i = max k s (1 - s) m_i / n, for the mean's cap."""
    torch.manual_seed(1)
    logits = (5 * torch.randn(B, S, V)).requires_grad_()
    target, mask = torch.randint(V, (B, S)), mask_of("random")
    loss = compute_masked_cross_entropy(logits, target, B, S, mask, 4.0, 0.5)
    assert 0 < loss.item() < 4
    loss.backward()
    wide = logits.detach().double()
    rows = F.cross_entropy(wide.flatten(0, 1), target.flatten(), reduction="none").view(B, S)
    s = torch.sigmoid(0.5 * plain_mean(rows, mask))
    slope = 4.0 * 0.5 * s * (1 - s) / mask.sum()
    of_rows = F.softmax(wide, -1) - F.one_hot(target, V)
    assert logits.grad is not None
    torch.testing.assert_close(
        logits.grad.double(),
        torch.where(mask[..., None], slope * of_rows, 0.0),
        rtol=1e-4,
        atol=1e-9,
    )


def test_scope_of_the_cap() -> None:
    """One outlier saturates the mean's cap: 4.000 against 3.116 token by token."""
    losses = torch.tensor([0.0, 1.0, 10.0, 100.0], dtype=torch.float64)
    # log(1 + exp(other)) is the cross-entropy of label 0 with logits (0, other).
    other = losses.expm1().log().clamp_min(-200.0).float()
    logits, target = torch.stack([torch.zeros(4), other], -1), torch.zeros(1, 4, dtype=torch.long)
    full = torch.ones(1, 4)
    mean = compute_masked_cross_entropy(logits, target, 1, 4, full, 4.0, 0.5)
    token = compute_masked_cross_entropy(logits, target, 1, 4, full, 4.0, 0.5, cap_scope="token")
    assert float(mean) == pytest.approx(4.0, abs=1e-3)
    assert float(token) == pytest.approx(3.116, abs=1e-3)


# -- compute_jigsaw_ce_losses -----------------------------------------------------------------


def weighted(losses: dict[str, Tensor]) -> Tensor:
    weights = torch.tensor([1.0, 0.7, 0.3], dtype=next(iter(losses.values())).dtype)
    return (torch.stack(list(losses.values())) * weights).sum()


def activations(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Leaves: hidden states of both super batches and a head."""
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(2 * B, S, D, generator=generator)
    student = teacher + 0.7 * torch.randn(2 * B, S, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    return {"teacher": teacher.to(dtype), "student": student.to(dtype), "weight": weight.to(dtype)}


def plain_three(
    teacher: Tensor, student: Tensor, attention: Tensor, loss_mask: Tensor, cap: dict[str, Any]
) -> dict[str, Tensor]:
    """SPEC 1.4, one call each."""
    clean, noisy = teacher[:B].detach(), teacher[B:]
    counted = attention & loss_mask
    return {
        "jigsaw_ce_performance_loss": plain_mean(soft_rows(student[B:], clean), attention),
        "jigsaw_ce_protection_loss": -plain_cross_entropy(soft_rows(noisy, clean), counted, cap),
        "jigsaw_clean_embeddings_guardrails_loss": -plain_mean(
            soft_rows(student[:B], clean), counted
        ),
    }


@pytest.mark.parametrize("form", ["logits", "lazy", "hidden"])
@pytest.mark.parametrize("cap", CAPS, ids=["none", "mean", "token", "zero"])
@pytest.mark.parametrize("kind", MASKS)
def test_three_cross_entropies(kind: str, cap: dict[str, Any], form: str) -> None:
    """One shared-target call equals three of their own, through logits that are there and not."""
    parts = activations()
    attention, loss_mask = mask_of("random", 3), mask_of(kind)
    if kind == "full":
        attention = mask_of("full")
    options = dict(cap)
    max_loss = options.pop("max_loss")
    factor = options.pop("ce_scaling_factor", 1.0)

    def ours(teacher: Tensor, student: Tensor) -> Tensor:
        given: Any = {}
        weight = parts["weight"]
        for name, hidden in (("teacher", teacher), ("student", student)):
            if form == "hidden":
                given[f"{name}_hidden"] = hidden
            else:
                lazy = form == "lazy"
                given[f"{name}_logits"] = LazyLogits(hidden, weight) if lazy else hidden @ weight.T
        if form == "hidden":
            given["lm_head_weight"] = weight
        with strict():
            losses = compute_jigsaw_ce_losses(
                given, B, S, V, attention, loss_mask, {}, max_loss, factor, **options
            )
        assert list(losses) == [
            "jigsaw_ce_performance_loss",
            "jigsaw_ce_protection_loss",
            "jigsaw_clean_embeddings_guardrails_loss",
        ]
        return weighted(losses)

    def plain(teacher: Tensor, student: Tensor) -> Tensor:
        weight = parts["weight"].double()
        found = plain_three(teacher @ weight.T, student @ weight.T, attention, loss_mask, cap)
        return weighted(found)

    both(ours, plain, parts["teacher"], parts["student"])


def test_bf16_logits() -> None:
    parts = activations(dtype=torch.bfloat16)
    full = mask_of("full")
    given: Any = {
        f"{side}_logits": (parts[side] @ parts["weight"].T) for side in ("teacher", "student")
    }
    got = compute_jigsaw_ce_losses(given, B, S, V, full, full, {}, None, 1.0)
    teacher, student = (given[f"{side}_logits"].double() for side in ("teacher", "student"))
    want = plain_three(teacher, student, full, full, {"max_loss": None})
    for name, loss in want.items():
        torch.testing.assert_close(got[name].double(), loss, rtol=1e-5, atol=1e-5)


def test_the_clean_teacher_is_never_differentiated() -> None:
    parts = activations()
    teacher, student = parts["teacher"].requires_grad_(), parts["student"].requires_grad_()
    given: Any = {
        "teacher_logits": LazyLogits(teacher, parts["weight"]),
        "student_logits": LazyLogits(student, parts["weight"]),
    }
    full = mask_of("full")
    losses = compute_jigsaw_ce_losses(given, B, S, V, full, full, {}, None, 1.0)
    weighted(losses).backward()
    assert teacher.grad is not None and student.grad is not None
    assert not teacher.grad[:B].any()
    assert teacher.grad[B:].any() and student.grad[:B].any() and student.grad[B:].any()


def test_argmax_targets_equal_labels() -> None:
    parts = activations()
    attention, loss_mask = mask_of("full"), mask_of("random")
    given: Any = {f"{n}_logits": parts[n] @ parts["weight"].T for n in ("teacher", "student")}
    got = compute_jigsaw_ce_losses(
        given, B, S, V, attention, loss_mask, {}, 4.0, 0.5, target="argmax"
    )
    labels = given["teacher_logits"][:B].argmax(-1)

    def rows(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(B, S)

    teacher, student = given["teacher_logits"], given["student_logits"]
    protection = 4.0 * torch.sigmoid(0.5 * plain_mean(rows(teacher[B:]), loss_mask))
    want = [plain_mean(rows(student[B:]), attention), -protection]
    want.append(-plain_mean(rows(student[:B]), loss_mask))
    torch.testing.assert_close(torch.stack(list(got.values())), torch.stack(want))


@pytest.mark.parametrize("cap", CAPS, ids=["none", "mean", "token", "zero"])
@pytest.mark.parametrize("target", ["soft", "argmax"])
def test_float_masks_weigh_once(target: str, cap: dict[str, Any]) -> None:
    parts = activations()
    generator = torch.Generator().manual_seed(5)
    attention = torch.rand(B, S, generator=generator)
    loss_mask = torch.rand(B, S, generator=generator) * (
        torch.rand(B, S, generator=generator) < 0.7
    )
    given: Any = {f"{n}_logits": parts[n] @ parts["weight"].T for n in ("teacher", "student")}
    options = dict(cap)
    max_loss, factor = options.pop("max_loss"), options.pop("ce_scaling_factor", 1.0)
    got = compute_jigsaw_ce_losses(
        given, B, S, V, attention, loss_mask, {}, max_loss, factor, target=target, **options
    )
    teacher, student = given["teacher_logits"].double(), given["student_logits"].double()
    q = teacher[:B].softmax(-1)
    if target == "argmax":
        q = F.one_hot(q.argmax(-1), V).double()

    def rows(logits: Tensor) -> Tensor:
        return -(q * logits.log_softmax(-1)).sum(-1)

    def mean(values: Tensor, weights: Tensor) -> Tensor:
        return (weights * values).sum() / weights.sum().clamp_min(1)

    squeeze = {name: value for name, value in cap.items() if name != "cap_scope"}
    if cap.get("cap_scope") == "token":
        protection = mean(plain_cap(rows(teacher[B:]), **squeeze), loss_mask)
    else:
        protection = plain_cap(mean(rows(teacher[B:]), loss_mask), **squeeze)
    want = [mean(rows(student[B:]), attention), -protection, -mean(rows(student[:B]), loss_mask)]
    for found, expected in zip(got.values(), want, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["logits", "lazy"])
@pytest.mark.parametrize("term", ["performance", "protection", "guardrails"])
def test_a_term_alone_and_other_losses_kept(term: str, form: str) -> None:
    parts = activations()
    given: Any = {}
    for name in ("teacher", "student"):
        lazy = LazyLogits(parts[name], parts["weight"])
        given[f"{name}_logits"] = lazy if form == "lazy" else parts[name] @ parts["weight"].T
    full, losses = mask_of("full"), {"mine": torch.ones(())}
    all_terms = compute_jigsaw_ce_losses(given, B, S, V, full, full, {}, None, 1.0)
    if term == "protection":
        del given["student_logits"]  # not needed, not asked for
    found = compute_jigsaw_ce_losses(given, B, S, V, full, full, losses, None, 1.0, terms=(term,))
    assert found is losses and len(found) == 2 and "mine" in found
    (name,) = set(found) - {"mine"}
    torch.testing.assert_close(found[name], all_terms[name])


def test_guardrails_can_be_capped() -> None:
    parts = activations()
    given: Any = {f"{n}_logits": parts[n] @ parts["weight"].T for n in ("teacher", "student")}
    full = mask_of("full")
    name = "jigsaw_clean_embeddings_guardrails_loss"
    plain = compute_jigsaw_ce_losses(given, B, S, V, full, full, {}, 4.0, 0.5)
    capped = compute_jigsaw_ce_losses(given, B, S, V, full, full, {}, 4.0, 0.5, cap_guardrails=True)
    torch.testing.assert_close(capped[name], -4.0 * torch.sigmoid(-0.5 * plain[name]))


@pytest.mark.parametrize("nan_at", ["teacher", "student"])
def test_nan_at_positions_that_do_not_count(nan_at: str) -> None:
    parts = activations()
    attention = mask_of("full")
    attention[:, 0] = False
    logits = {n: (parts[n] @ parts["weight"].T) for n in ("teacher", "student")}
    logits[nan_at][:, 0] = math.nan
    given: Any = {f"{n}_logits": z.requires_grad_() for n, z in logits.items()}
    losses = compute_jigsaw_ce_losses(given, B, S, V, attention, mask_of("full"), {}, 4.0, 0.5)
    total = weighted(losses)
    total.backward()
    assert total.isfinite()
    for z in logits.values():
        assert z.grad is not None and z.grad.isfinite().all() and not z.grad[:, 0].any()


# -- l2 ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalization", ["target", "target_sq", "unit", "dim"])
@pytest.mark.parametrize("kind", MASKS)
def test_l2(kind: str, normalization: str) -> None:
    parts, mask = activations(), mask_of(kind)

    def distance(s: Tensor, t: Tensor) -> Tensor:
        norm = t.norm(dim=-1)
        if normalization == "unit":
            return (F.normalize(s, dim=-1) - F.normalize(t, dim=-1)).norm(dim=-1)
        gap = (s - t).norm(dim=-1)
        return {"target": gap / norm, "target_sq": (gap / norm) ** 2, "dim": gap**2 / D}[
            normalization
        ]

    def ours(teacher: Tensor, student: Tensor) -> Tensor:
        given: Any = {"teacher_embeddings": teacher, "student_embeddings": student}
        losses = compute_jigsaw_l2_losses(given, 2 * B, mask, {}, normalization=normalization)
        alone = compute_masked_normalized_l2_loss(
            student[B:], teacher[:B], mask, normalization=normalization
        )
        torch.testing.assert_close(alone, losses["jigsaw_l2_performance_loss"])
        return losses["jigsaw_l2_performance_loss"] + 0.3 * losses["jigsaw_l2_protection_loss"]

    def plain(teacher: Tensor, student: Tensor) -> Tensor:
        clean = teacher[:B].detach()
        performance = plain_mean(distance(student[B:], clean), mask)
        return performance - 0.3 * plain_mean(distance(teacher[B:], clean), mask)

    both(ours, plain, parts["teacher"], parts["student"])


# -- input embeddings -------------------------------------------------------------------------


def embeddings() -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    x = torch.randn(B, S, D)
    return x, x + 0.8 * torch.randn(B, S, D)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("absolute", [False, True])
def test_cosine(absolute: bool, kind: str) -> None:
    x, noisy = embeddings()
    noisy[0] = -noisy[0]
    mask = mask_of(kind)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        cosine = F.cosine_similarity(a, b, dim=-1)
        return plain_mean(cosine.abs() if absolute else cosine, mask)

    both(lambda a, b: cosine_similarity_loss(a, b, mask, absolute=absolute), plain, x, noisy)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", ["token", "batch"])
def test_median_norm(form: str, kind: str) -> None:
    x, mean = embeddings()
    mask, median = mask_of(kind), 2.5

    def plain(a: Tensor, b: Tensor) -> Tensor:
        norms = (a + b).norm(dim=-1)
        if form == "token":
            return plain_mean((norms - median).abs(), mask)
        return (plain_mean(norms, mask) - median).abs() * bool(mask.any())

    both(lambda a, b: median_norm_loss(a, b, median, mask, form=form), plain, x, mean)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("form", ["mean", "entropy"])
@pytest.mark.parametrize("features", [False, True], ids=["positions", "features"])
def test_std_log_ratio(features: bool, form: str, kind: str) -> None:
    torch.manual_seed(3)
    stds, mask = torch.rand(B, S, D) + 0.1, mask_of(kind)
    if features:
        mask = mask[..., None] & (torch.rand(B, S, D) < 0.5)
    wide = (mask if features else mask[..., None]).expand(B, S, D)

    def plain(s: Tensor) -> Tensor:
        if form == "entropy":
            return plain_mean(-((s + 1e-8) / 2.0).log(), wide)
        mean = plain_mean(s, wide)
        return -(mean / 2.0).log() if wide.any() else mean

    both(lambda s: std_log_ratio_loss(s, mask, reference=2.0, form=form), plain, stds)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_power_law(exponent: float, kind: str) -> None:
    x, noisy = embeddings()
    mask = mask_of(kind)

    def plain(a: Tensor, b: Tensor) -> Tensor:
        distance = ((a - b).square().sum(-1) + 1e-12).sqrt() / 3.0
        return plain_mean(distance**-exponent, mask)

    def ours(a: Tensor, b: Tensor) -> Tensor:
        return inverse_l2_power_law_loss(
            a, b, mask, characteristic_length=3.0, exponent_of_decay=exponent
        )

    both(ours, plain, x, noisy)


@pytest.mark.parametrize("exponent", [1.0, 7.0, 20.0])
def test_power_law_of_embeddings_that_stay(exponent: float) -> None:
    """1e6 and no gradient, where the power itself overflows."""
    x = torch.randn(B, S, D).requires_grad_()
    loss = inverse_l2_power_law_loss(
        x.detach(), x, mask_of("full"), exponent_of_decay=exponent, characteristic_length=1e3
    )
    loss.backward()
    assert loss.item() == pytest.approx(1e6, rel=1e-4)
    assert x.grad is not None and not x.grad.any()


def test_power_law_is_one_at_the_characteristic_length() -> None:
    x = torch.zeros(1, 1, D)
    y = torch.full((1, 1, D), 3.0 / math.sqrt(D))
    loss = inverse_l2_power_law_loss(x, y, torch.ones(1, 1), characteristic_length=3.0)
    assert float(loss) == pytest.approx(1.0, rel=1e-6)


# -- what is refused --------------------------------------------------------------------------


def given(**changes: Any) -> ActivationsDict:
    logits = torch.randn(2 * B, S, V)
    states = torch.randn(2 * B, S, D)
    parts: Any = {
        "teacher_logits": logits,
        "student_logits": logits,
        "teacher_embeddings": states,
        "student_embeddings": states,
    }
    return {name: value for name, value in (parts | changes).items() if value is not None}  # type: ignore[return-value]


FULL = torch.ones(B, S)
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), FULL.long(), B, S + 1, FULL),
        ValueError,
        r"output_logits must have 3 x 6 .* rows: got shape \(3, 5, 97\)",
    ),
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), FULL.long()[:, 1:], B, S, FULL),
        ValueError,
        r"target_labels must hold class indices",
    ),
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), torch.rand(B, S, 9), B, S, FULL),
        ValueError,
        r"probabilities \[\.\.\., 97\]",
    ),
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), FULL.long(), B, S, FULL.T),
        ValueError,
        r"mask must be \[3, 5\] or \[15\]: got \(5, 3\)",
    ),
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), FULL.long(), B, S, FULL, 0.0),
        ValueError,
        "max_loss must be positive, or None for no cap: got 0.0",
    ),
    (
        lambda: compute_masked_cross_entropy(torch.randn(B, S, V), FULL.long() * V, B, S, FULL),
        IndexError,
        "is 97: wanted 0 <= label < 97",
    ),
    (
        lambda: compute_jigsaw_ce_losses(
            given(student_logits=torch.randn(B, S, V)), B, S, V, FULL, FULL, {}, None, 1.0
        ),
        ValueError,
        r"student_logits must be a super batch .* = \[6, 5, 97\].*got \[3, 5, 97\]",
    ),
    (
        lambda: compute_jigsaw_ce_losses(given(), B, S, V + 3, FULL, FULL, {}, None, 1.0),
        ValueError,
        r"teacher_logits must be a super batch",
    ),
    (
        lambda: compute_jigsaw_ce_losses(given(), B, S, V, FULL[:, 1:], FULL, {}, None, 1.0),
        ValueError,
        "attention_mask must have the shape",
    ),
    (
        lambda: compute_jigsaw_ce_losses(given(), B, S, V, FULL, FULL[1:], {}, None, 1.0),
        ValueError,
        "loss_mask must have the shape",
    ),
    (
        lambda: compute_jigsaw_ce_losses(given(), B, S, V, FULL, FULL, {}, -4.0, 1.0),
        ValueError,
        "jigsaw_ce_protection_max_loss must be positive, or None for no cap: got -4.0",
    ),
    (
        lambda: compute_jigsaw_ce_losses(
            given(), B, S, V, FULL, FULL, {}, None, 1.0, target="hard"
        ),
        ValueError,
        "target must be one of soft, argmax: got 'hard'",
    ),
    (
        lambda: compute_jigsaw_ce_losses(
            given(teacher_logits=None), B, S, V, FULL, FULL, {}, None, 1.0
        ),
        KeyError,
        "no 'teacher_logits'",
    ),
    (
        lambda: compute_jigsaw_l2_losses(given(), 2 * B + 1, FULL, {}),
        ValueError,
        "super_batch_size must be even, a clean and a noisy half: got 7",
    ),
    (
        lambda: compute_jigsaw_l2_losses(given(), 2 * B + 2, FULL, {}),
        ValueError,
        r"teacher_embeddings must be a super batch \[8, S, D\].*got \[6, 5, 12\]",
    ),
    (
        lambda: compute_jigsaw_l2_losses(given(), 2 * B, FULL[:, 1:], {}),
        ValueError,
        "loss_mask must have the shape",
    ),
    (
        lambda: inverse_l2_power_law_loss(
            torch.randn(B, S, D), torch.randn(B, S, D), FULL, exponent_of_decay=-1.0
        ),
        ValueError,
        "exponent_of_decay must be above 0: got -1.0",
    ),
    (
        lambda: cosine_similarity_loss(torch.randn(B, S, D), torch.randn(B, S, D), FULL[1:]),
        ValueError,
        r"noise_mask must be \[3, 5\] or \[3, 5, 12\]: got \[2, 5\]",
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_refused(case: int) -> None:
    call, error, message = WRONG[case]
    with pytest.raises(error, match=message):
        call()
