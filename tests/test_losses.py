"""The masked losses against their formulas, written here once more in fp64.

An error is allowed a few units of the natural scale of the fp32 sums, and the gradient's own
rounding to its dtype. Where a loss has a hard limit (a saturated cap, equal rows) the bar is 1e-6,
relative.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.losses import sigmoid_cap

UNIT = 2.0**-24
BAR = 8.0
HARD = 1e-6  # relative, in fp32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


# ---------------------------------------------------------------- the formulas, in fp64


def truth_rows(
    logits: Tensor, target: Tensor, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropy of every row; a label outside of the vocabulary stands for any other."""
    logp = logits.log_softmax(-1)
    if target.is_floating_point():
        rows = -(target * logp).sum(-1)
        if label_smoothing:  # the target becomes (1 - s) q + s / V
            rows = (1 - label_smoothing) * rows - label_smoothing * logp.mean(-1)
    else:
        label = torch.where((target < 0) | (target >= logits.shape[-1]), 0, target).long()
        rows = -logp.gather(-1, label.unsqueeze(-1)).squeeze(-1)
        rows = (1 - label_smoothing) * rows - label_smoothing * logp.mean(-1)
    return rows + z_loss * logits.logsumexp(-1).square()


def truth_reduced(
    rows: Tensor, weights: Tensor | None, reduction: str = "mean", num_items: Any = None
) -> Tensor:
    weights = torch.ones_like(rows) if weights is None else weights.to(rows.dtype)
    rows = torch.where(weights == 0, 0.0, rows) * weights
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    count = max(float(weights.sum()), 1.0) if num_items is None else float(num_items)
    return rows.sum() / count


def truth_cap(loss: Tensor, max_loss: float, k: float, form: str) -> Tensor:
    squeezed = 1 / (1 + (-k * loss).exp())
    return max_loss * (squeezed if form == "sigmoid" else 2 * squeezed - 1)


def truth_distance(x: Tensor, target: Tensor, normalization: str, eps: float) -> Tensor:
    distance, length = (x - target).norm(dim=-1), target.norm(dim=-1).clamp_min(eps)
    if normalization == "target":
        return distance / length
    if normalization == "target_sq":
        return (distance / length).square()
    if normalization == "dim":
        return distance.square() / x.shape[-1]
    return (x / x.norm(dim=-1, keepdim=True) - target / target.norm(dim=-1, keepdim=True)).norm(
        dim=-1
    )


def truth_cosine(x: Tensor, target: Tensor, relu: bool, absolute: bool, eps: float) -> Tensor:
    lengths = (x.norm(dim=-1) + eps) * (target.norm(dim=-1) + eps)
    cosine = (x * target).sum(-1) / lengths
    if relu:
        cosine = cosine.clamp_min(0)
    return cosine.abs() if absolute else cosine


def assert_close(
    actual: Tensor, expected: Tensor, scale: Tensor | float, what: str, bar: float = BAR
) -> None:
    """Within `bar` units of scale, and half a place of the dtype that `actual` is stored in."""
    actual, expected = actual.detach(), expected.detach()
    stored = torch.finfo(actual.dtype)
    unit = UNIT if actual.dtype != torch.float64 else stored.eps / 2
    allowed = bar * unit * scale + stored.eps / 2 * expected.abs()
    allowed = allowed + stored.smallest_normal * stored.eps
    error = (actual.double() - expected).abs()
    assert bool((error <= allowed).all()), (
        f"{what}: error {float(error.max()):.3g}, {float((error / allowed).max()):.3g} times "
        "what is allowed"
    )


# ---------------------------------------------------------------- masked_cross_entropy


MASKS: dict[str, Callable[[], Tensor | None]] = {
    "no-mask": lambda: None,
    "bool": lambda: torch.tensor([[True, True, False], [True, False, True]]),
    "int": lambda: torch.tensor([[1, 1, 0], [1, 0, 1]]),
    "float": lambda: torch.tensor([[0.5, 2.0, 0.0], [1.0, 0.0, 0.25]]),
    "negative": lambda: torch.tensor([[-0.5, 3.0, 0.0], [1.0, 0.0, 2.25]]),
    "sum-below-1": lambda: torch.tensor([[0.25, 0.125, 0.0], [0.125, 0.0, 0.25]]),
    "none-counts": lambda: torch.zeros(2, 3, dtype=torch.bool),
}
LABELS = torch.tensor([[4, 0, 7], [-100, 3, 12]])
VOCAB = 13


def draw_target(soft: bool, device: str) -> Tensor:
    if soft:
        return torch.randn(2, 3, VOCAB, device=device).softmax(-1)
    return LABELS.to(device)


def check_cross_entropy(
    logits: Tensor,
    target: Tensor,
    mask: Tensor | None,
    impl: str,
    *,
    max_loss: float | None = None,
    ce_scaling_factor: float = 1.0,
    cap_form: str = "sigmoid",
    cap_scope: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    num_items: Any = None,
    reduction: str = "mean",
) -> Tensor:
    """Value and gradient of one call against the formulas."""
    ours = logits.detach().clone().requires_grad_()
    actual = onepass.masked_cross_entropy(
        ours,
        target,
        mask,
        max_loss=max_loss,
        ce_scaling_factor=ce_scaling_factor,
        cap_form=cap_form,
        cap_scope=cap_scope,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        num_items=num_items,
        reduction=reduction,
        impl=impl,
    )
    z = logits.detach().double().requires_grad_()
    soft = target.is_floating_point()
    exact_target = target.double() if soft else target
    rows = truth_rows(z, exact_target, label_smoothing, z_loss)
    weights = torch.ones_like(rows) if mask is None else mask.to(rows.dtype)
    if not soft:
        weights = weights * (target != -100)
    losses = rows
    if max_loss is not None and cap_scope == "token":
        losses = truth_cap(rows, max_loss, ce_scaling_factor, cap_form)
    expected = truth_reduced(losses, weights, reduction, num_items)
    if max_loss is not None and cap_scope == "mean":
        expected = truth_cap(expected, max_loss, ce_scaling_factor, cap_form)

    upstream = torch.randn(expected.shape, device=logits.device)
    actual.backward(upstream)
    (of_rows,) = torch.autograd.grad(expected, rows, upstream.double(), retain_graph=True)
    expected.backward(upstream.double())
    assert actual.shape == expected.shape and actual.dtype == torch.float32
    assert ours.grad is not None and z.grad is not None and ours.grad.dtype == logits.dtype

    # an error of the loss moves a cap's slope by as much of itself
    steep = 1.0
    if max_loss is not None:
        steep = 1 + abs(ce_scaling_factor) * float(rows.detach().abs().max())
    logp = z.detach().log_softmax(-1)
    p, gap = logp.exp(), z.detach().amax(-1, keepdim=True) - z.detach()
    pulled = 1 + 2 * z_loss * z.detach().logsumexp(-1, keepdim=True).abs()
    if soft:
        spread = exact_target.abs()
    else:
        spread = torch.nn.functional.one_hot(target.clamp_min(0), VOCAB).double()
    spread = (1 - label_smoothing) * spread + label_smoothing / VOCAB
    grad_scale = of_rows.abs().unsqueeze(-1) * steep * (pulled * p * (1 + gap) + spread)
    value_scale = 1 + expected.detach().abs()
    if reduction != "none":
        absolute = (weights.abs() * (1 + rows.detach().abs())).sum()
        value_scale = value_scale + absolute / max(1.0, float(weights.sum()))
        if reduction == "sum":
            value_scale = value_scale + absolute
    assert_close(actual, expected, steep * value_scale, "loss")
    assert_close(ours.grad, z.grad, grad_scale, "d logits")
    # a row that does not count gets exactly nothing
    assert not ours.grad[weights == 0].any()
    return actual


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("mask", MASKS)
def test_cross_entropy_is_its_formula(mask: str, soft: bool, device: str) -> None:
    """Each mask with each target, under every mix of smoothing, z-loss and reduction."""
    logits = 3 * torch.randn(2, 3, VOCAB, device=device)
    target, rows = draw_target(soft, device), MASKS[mask]()
    rows = None if rows is None else rows.to(device)
    for label_smoothing in (0.0, 0.1):
        for z_loss in (0.0, 1e-2):
            for reduction in ("mean", "sum", "none"):
                check_cross_entropy(
                    logits,
                    target,
                    rows,
                    "torch",
                    label_smoothing=label_smoothing,
                    z_loss=z_loss,
                    reduction=reduction,
                )


@pytest.mark.parametrize(
    ("mask", "soft", "options"),
    [
        ("float", False, {"label_smoothing": 0.1, "z_loss": 1e-2}),
        ("bool", True, {"label_smoothing": 0.1, "z_loss": 1e-2}),
        ("negative", False, {"max_loss": 4.0, "ce_scaling_factor": 0.5, "cap_scope": "token"}),
        ("int", True, {"max_loss": 3.0, "cap_form": "zero_at_zero"}),
        ("no-mask", False, {"reduction": "none"}),
    ],
)
def test_kernels_give_the_same(
    mask: str, soft: bool, options: dict[str, Any], impl: str, device: str
) -> None:
    rows = MASKS[mask]()
    check_cross_entropy(
        3 * torch.randn(2, 3, VOCAB, device=device),
        draw_target(soft, device),
        None if rows is None else rows.to(device),
        impl,
        **options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy_of_any_dtype(dtype: torch.dtype, impl: str, device: str) -> None:
    """fp32 out of 16-bit logits; the gradient is rounded once."""
    logits = (3 * torch.randn(2, 3, VOCAB, device=device)).to(dtype)
    check_cross_entropy(logits, LABELS.to(device), None, impl, z_loss=1e-3, label_smoothing=0.1)


@pytest.mark.parametrize("num_items", [4, 2.5, torch.tensor(7), torch.tensor(3.0)], ids=str)
def test_num_items_divides(num_items: Any, device: str) -> None:
    """What Hugging Face's trainer passes under gradient accumulation: a number or a tensor."""
    if isinstance(num_items, Tensor):
        num_items = num_items.to(device)
    logits = torch.randn(2, 3, VOCAB, device=device)
    for mask in ("no-mask", "float"):
        rows = MASKS[mask]()
        rows = None if rows is None else rows.to(device)
        check_cross_entropy(logits, LABELS.to(device), rows, "torch", num_items=num_items)


def test_integer_mask_counts_and_does_not_weigh(device: str) -> None:
    """Packed batches number their documents in the mask (1 1 2 2 3 0): each row counts once."""
    logits, labels = torch.randn(6, VOCAB, device=device), torch.arange(6, device=device)
    packed = torch.tensor([1, 1, 2, 2, 3, 0], device=device)
    x, y = torch.randn(6, 8, device=device), torch.randn(6, 8, device=device)
    for loss in (
        lambda mask: onepass.masked_cross_entropy(logits, labels, mask),
        lambda mask: onepass.masked_normalized_l2(x, y, mask),
        lambda mask: onepass.masked_inner_product(x, y, mask),
        lambda mask: onepass.masked_mean(x[:, 0], mask),
    ):
        assert torch.equal(loss(packed), loss(packed != 0))


def test_labels_outside_the_vocabulary_in_masked_rows(impl: str, device: str) -> None:
    """A padding label that is no token is nobody's business where the mask is 0."""
    logits = torch.randn(3, 5, device=device)
    labels = torch.tensor([1, 99, -7], device=device)
    mask = torch.tensor([True, False, False], device=device)
    loss = onepass.masked_cross_entropy(logits, labels, mask, impl=impl)
    alone = onepass.masked_cross_entropy(logits[:1], labels[:1], impl=impl)
    assert torch.equal(loss, alone)


@pytest.mark.parametrize("ignore_index", [0, 12, 255])
def test_ignore_index_inside_and_outside_the_vocabulary(ignore_index: int, device: str) -> None:
    logits = torch.randn(2, 3, VOCAB, device=device, requires_grad=True)
    labels = torch.tensor([[4, ignore_index, 7], [ignore_index, 3, 1]], device=device)
    loss = onepass.masked_cross_entropy(logits, labels, ignore_index=ignore_index)
    (gradient,) = torch.autograd.grad(loss, logits)
    kept = labels != ignore_index
    plain = onepass.masked_cross_entropy(logits, labels.clamp_max(12), kept)
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    assert not gradient[~kept].any() and bool(gradient[kept].any())


# ---------------------------------------------------------------- the cap


def logits_with_loss(losses: list[float], device: str) -> Tensor:
    """Two classes, label 0: the other's logit that makes each row lose exactly so much."""
    wanted = torch.tensor(losses, dtype=torch.float64)
    other = wanted.expm1().log().clamp_min(-200.0)
    return torch.stack([torch.zeros_like(other), other], -1).float().to(device)


def test_the_specifications_example(device: str, impl: str) -> None:
    """CE = [0, 1, 10, 100], max = 4, k = .5: one outlier saturates the mean, not the tokens."""
    logits = logits_with_loss([0.0, 1.0, 10.0, 100.0], device)
    labels = torch.zeros(4, dtype=torch.int64, device=device)

    def capped(**options: Any) -> float:
        return onepass.masked_cross_entropy(
            logits, labels, max_loss=4.0, ce_scaling_factor=0.5, impl=impl, **options
        ).item()

    assert capped(cap_scope="token") == pytest.approx(3.116, abs=5e-4)
    assert capped(cap_scope="mean") == pytest.approx(4.000, abs=5e-4)
    assert capped() == capped(cap_scope="mean", cap_form="sigmoid"), "the defaults"
    assert capped(cap_scope="token", cap_form="zero_at_zero") == pytest.approx(2.232, abs=5e-4)


def test_cap_at_no_loss(device: str) -> None:
    """The literal form starts at half of the cap; the other form at 0."""
    logits = logits_with_loss([0.0, 0.0], device)
    labels = torch.zeros(2, dtype=torch.int64, device=device)
    for scope in ("mean", "token"):
        half = onepass.masked_cross_entropy(logits, labels, max_loss=6.0, cap_scope=scope)
        nothing = onepass.masked_cross_entropy(
            logits, labels, max_loss=6.0, cap_scope=scope, cap_form="zero_at_zero"
        )
        assert (half.item(), nothing.item()) == (3.0, 0.0)


def test_scaling_factor_means_nothing_without_a_cap(device: str) -> None:
    logits, labels = torch.randn(3, 5, device=device), torch.tensor([0, 1, 2], device=device)
    scaled = onepass.masked_cross_entropy(logits, labels, ce_scaling_factor=0.01)
    assert torch.equal(scaled, onepass.masked_cross_entropy(logits, labels))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("scope", ["mean", "token"])
@pytest.mark.parametrize("form", ["sigmoid", "zero_at_zero"])
def test_cap_is_its_formula(form: str, scope: str, reduction: str, device: str) -> None:
    if scope == "mean" and reduction == "none":
        pytest.skip("there is no mean to cap; test_errors.py holds the refusal")
    logits = 3 * torch.randn(2, 3, VOCAB, device=device)
    mask = MASKS["float"]()
    assert mask is not None
    for max_loss, k in ((4.0, 0.5), (0.5, 3.0), (100.0, 0.01)):
        for soft in (False, True):
            check_cross_entropy(
                logits,
                draw_target(soft, device),
                mask.to(device),
                "torch",
                max_loss=max_loss,
                ce_scaling_factor=k,
                cap_form=form,
                cap_scope=scope,
                reduction=reduction,
                z_loss=1e-3,
            )


@pytest.mark.parametrize("loss", [1e-6, 1e-3, 0.1, 3.0])
def test_zero_at_zero_near_zero(loss: float, device: str) -> None:
    """2 s - 1 cancels there: as small as the loss is, its capped value has all of its digits."""
    x = torch.tensor(loss, device=device)
    exact = 50 * torch.tanh(x.double() * 0.02 / 2).item()
    assert sigmoid_cap(x, 50.0, 0.02, "zero_at_zero").item() == pytest.approx(exact, rel=HARD)


SATURATED = [8.0, 12.0, 17.0, 20.0, 40.0, 60.0]


@pytest.mark.parametrize("form", ["sigmoid", "zero_at_zero"])
def test_saturated_slope(form: str, device: str) -> None:
    """d cap / d loss = max k e / (1 + e)^2, where torch's s (1 - s) is 0 from 17 on."""
    x = torch.tensor(SATURATED + [-v for v in SATURATED], device=device, requires_grad=True)
    sigmoid_cap(x, 4.0, 0.5, form).sum().backward()
    exact = x.detach().double() / 2
    slope = 4 * 0.5 / (exact.exp() + 2 + (-exact).exp()) * (2 if form == "zero_at_zero" else 1)
    assert x.grad is not None
    assert float(((x.grad - slope) / slope).abs().max()) <= HARD
    lost = torch.sigmoid(x.detach())
    assert not (lost * (1 - lost))[3:6].all(), "the naive slope would do: this tests nothing"


@pytest.mark.parametrize("scope", ["mean", "token"])
@pytest.mark.parametrize("k", [1.0, 0.5])
def test_saturated_cap_keeps_its_direction(k: float, scope: str, impl: str, device: str) -> None:
    """A protection loss at its cap still has to know where to go: scaled losses from 8 to 60.

    The gap of the logits is the loss, exactly, so that the slope is asked for at a known place.
    """
    wanted = SATURATED if impl == "torch" else [8.0, 20.0, 60.0]
    groups = [[v] for v in wanted] if scope == "mean" else [wanted]
    for group in groups:
        gaps = torch.tensor(group, dtype=torch.float64) / k
        z = torch.full((len(group), 5), -1000.0)
        z[:, 1], z[:, 3] = 0.0, -gaps.float()
        z = z.to(device).requires_grad_()
        labels = torch.full((len(group),), 3, device=device)
        onepass.masked_cross_entropy(
            z, labels, max_loss=4.0, ce_scaling_factor=k, cap_scope=scope, impl=impl
        ).backward()
        truth = z.detach().double()
        p = truth.softmax(-1)
        p[:, 3] -= 1
        x = k * truth_rows(truth, labels).unsqueeze(-1)
        slope = 4 * k / (x.exp() + 2 + (-x).exp()) / len(group)
        expected = slope * p
        assert z.grad is not None
        big = expected != 0
        assert float(((z.grad - expected)[big] / expected[big]).abs().max()) <= HARD
        assert not z.grad[~big].any()


# ---------------------------------------------------------------- gradient accumulation


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"label_smoothing": 0.1, "z_loss": 1e-3},
        {"max_loss": 4.0, "cap_scope": "token"},
    ],
    ids=["plain", "smoothed-z", "token-cap"],
)
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_micro_batches_add_up(as_tensor: bool, options: dict[str, Any], device: str) -> None:
    """linkedin/Liger-Kernel#802: the sum over micro-batches of unequal size is the full batch.

    One of them has no label at all.
    """
    weights = torch.randn(VOCAB, 8, device=device)
    hidden = torch.randn(9, 8, device=device)
    labels = torch.tensor([1, -100, 3, 4, -100, -100, 5, 6, 2], device=device)
    full, parts = (weights.clone().requires_grad_() for _ in range(2))
    loss = onepass.masked_cross_entropy(hidden @ full.t(), labels, **options)
    loss.backward()
    count: Any = (labels != -100).sum()
    if not as_tensor:
        count = int(count)
    total = torch.zeros((), device=device)
    for rows in (slice(0, 4), slice(4, 6), slice(6, 9)):
        part = onepass.masked_cross_entropy(
            hidden[rows] @ parts.t(), labels[rows], **options, num_items=count
        )
        part.backward()
        total += part.detach()
    assert full.grad is not None and parts.grad is not None
    torch.testing.assert_close(total, loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(parts.grad, full.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_items", [0, torch.tensor(0)], ids=["number", "tensor"])
def test_no_items_in_the_whole_batch(num_items: Any, device: str) -> None:
    """Every micro-batch is masked, so the trainer counts 0 items: still 0, never 0 / 0."""
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    labels = torch.full((2,), -100, device=device)
    loss = onepass.masked_cross_entropy(logits, labels, num_items=num_items)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


# ---------------------------------------------------------------- hidden-state losses


def l2(normalization: str, eps: float = 1e-6) -> tuple[Any, Any]:
    return (
        lambda x, t, mask=None, **more: onepass.masked_normalized_l2(
            x, t, mask, normalization=normalization, eps=eps, **more
        ),
        lambda x, t: truth_distance(x, t, normalization, eps),
    )


def cosine(relu: bool = False, absolute: bool = False, eps: float = 0.0) -> tuple[Any, Any]:
    return (
        lambda x, t, mask=None, **more: onepass.masked_inner_product(
            x, t, mask, relu=relu, absolute=absolute, eps=eps, **more
        ),
        lambda x, t: truth_cosine(x, t, relu, absolute, eps),
    )


HIDDEN: dict[str, tuple[Any, Any]] = {
    "l2-target": l2("target"),
    "l2-target-large-eps": l2("target", eps=100.0),
    "l2-target_sq": l2("target_sq"),
    "l2-unit": l2("unit"),
    "l2-dim": l2("dim"),
    "cosine": cosine(),
    "cosine-relu": cosine(relu=True),
    "cosine-absolute": cosine(absolute=True),
    "cosine-eps": cosine(eps=0.5),
}
L2 = [name for name in HIDDEN if name.startswith("l2")]
COSINES = [name for name in HIDDEN if name.startswith("cosine")]


def hidden_pair(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor]:
    """Rows at angles of every kind, so that ReLU and the absolute value have both signs to see."""
    x, noise = torch.randn(shape, device=device), torch.randn(shape, device=device)
    sign = torch.linspace(-1, 1, x[..., 0].numel(), device=device).view(shape[:-1])
    return x, sign.unsqueeze(-1) * x + noise


def check_hidden(
    name: str,
    x: Tensor,
    target: Tensor,
    mask: Tensor | None,
    impl: str,
    reduction: str,
) -> None:
    loss, formula = HIDDEN[name]
    ours = [t.detach().clone().requires_grad_() for t in (x, target)]
    actual = loss(*ours, mask, reduction=reduction, impl=impl)
    # what lies in rows that do not count may be anything, and the truth never sees it
    weights = torch.ones(x.shape[:-1], device=x.device) if mask is None else mask.double()
    kept = (weights != 0).unsqueeze(-1)
    exact = [torch.where(kept, t, 1.0).double().detach().requires_grad_() for t in (x, target)]
    expected = truth_reduced(formula(*exact), weights, reduction)
    upstream = torch.randn(expected.shape, device=x.device)
    actual.backward(upstream)
    expected.backward(upstream.double())
    assert actual.shape == expected.shape
    assert actual.dtype == torch.float32
    spread = weights.abs().sum() / weights.sum().clamp_min(1) if reduction == "mean" else 1.0
    rows = (1 + formula(*exact).detach().abs()).max() * weights.abs().max()
    assert_close(actual, expected, rows * (spread + x.shape[0]), name)
    for given, true, side in zip(ours, exact, ("x", "target"), strict=True):
        assert given.grad is not None and true.grad is not None
        assert given.grad.dtype == x.dtype
        # the two parts of a row's gradient, along x and along the target, are of one size
        scale = true.grad.abs().amax(-1, keepdim=True)
        assert_close(given.grad, true.grad, scale, f"{name}: d {side}", bar=2 * BAR)
        assert not given.grad[weights == 0].any()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_loss_is_its_formula(name: str, mask: str, device: str) -> None:
    """Value and both gradients, under every mask and reduction; masked rows hold NaN."""
    x, target = hidden_pair((2, 3, 33), device)
    rows = MASKS[mask]()
    if rows is not None:
        rows = rows.to(device)
        x[rows == 0], target[rows == 0] = NAN, torch.inf
    for reduction in ("mean", "sum", "none"):
        check_hidden(name, x, target, rows, "torch", reduction)


@pytest.mark.parametrize("name", HIDDEN)
def test_kernels_give_the_same_hidden_loss(name: str, impl: str, device: str) -> None:
    x, target = hidden_pair((2, 2, 140), device)
    mask = torch.tensor([[0.5, 0.0], [2.0, 1.0]], device=device)
    x[0, 1], target[0, 1] = torch.inf, NAN
    check_hidden(name, x, target, mask, impl, "sum")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["l2-target", "l2-unit", "cosine-relu"])
def test_hidden_loss_of_16_bit_states(
    name: str, dtype: torch.dtype, impl: str, device: str
) -> None:
    x, target = (t.to(dtype) for t in hidden_pair((3, 40), device))
    check_hidden(name, x, target, None, impl, "mean")


@pytest.mark.parametrize("name", HIDDEN)
def test_one_row_without_batch(name: str, device: str) -> None:
    x, target = hidden_pair((1, 7), device)
    loss, formula = HIDDEN[name]
    for reduction in ("mean", "sum", "none"):
        actual = loss(x[0], target[0], reduction=reduction)
        assert actual.shape == ()
        assert actual.item() == pytest.approx(formula(x[0].double(), target[0].double()).item())


@pytest.mark.parametrize("name", L2)
def test_equal_rows_are_at_rest(name: str, impl: str, device: str) -> None:
    """x = target: distance 0 and gradient 0, not the NaN of sqrt at 0."""
    x = torch.randn(3, 65, device=device, requires_grad=True)
    target = x.detach().clone().requires_grad_()
    loss = HIDDEN[name][0](x, target, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    for side in (x, target):
        assert side.grad is not None and not side.grad.any()


@pytest.mark.parametrize("name", ["cosine", "cosine-relu", "cosine-absolute"])
def test_equal_rows_have_cosine_one(name: str, impl: str, device: str) -> None:
    """And no direction to turn: the gradient is rounding, relative to 1 / |x|."""
    x = torch.randn(3, 65, device=device, requires_grad=True)
    loss = HIDDEN[name][0](x, x.detach().clone(), reduction="none", impl=impl)
    loss.sum().backward()
    assert float((loss.detach() - 1).abs().max()) <= 4 * UNIT
    assert x.grad is not None
    assert float((x.grad * x.detach().norm(dim=-1, keepdim=True)).abs().max()) <= 8 * UNIT
    opposite = onepass.masked_inner_product(x.detach(), -x.detach(), reduction="none", impl=impl)
    assert float((opposite + 1).abs().max()) <= 4 * UNIT


def test_relu_lets_only_positive_cosines_through(device: str) -> None:
    """Circuit breakers stop pushing once representations are orthogonal."""
    x = torch.tensor([[1.0, 1.0], [1.0, -3.0], [1.0, -1.0]], device=device, requires_grad=True)
    target = torch.tensor([[1.0, 1.0]] * 3, device=device)
    loss = onepass.masked_inner_product(x, target, relu=True, reduction="none")
    torch.testing.assert_close(loss.detach().cpu(), torch.tensor([1.0, 0.0, 0.0]))
    loss.sum().backward()
    assert x.grad is not None and not x.grad[1:].any()
    plain = onepass.masked_inner_product(x, target, reduction="none")
    assert plain[1].item() == pytest.approx(-2 / 20**0.5)
    unsigned = onepass.masked_inner_product(x, target, absolute=True, reduction="none")
    torch.testing.assert_close(unsigned, plain.abs())


@pytest.mark.parametrize("zero", ["x", "target", "both"])
@pytest.mark.parametrize("name", ["cosine", "cosine-relu", "cosine-absolute", "l2-unit"])
def test_rows_without_direction(name: str, zero: str, impl: str, device: str) -> None:
    """A zero row has no angle: cosine 0, distance 1 from any other, gradient 0 in either case; its
    neighbour is left alone."""
    x, target = hidden_pair((2, 8), device)
    alone = HIDDEN[name][0](x[1:], target[1:], reduction="none", impl=impl)
    if zero != "target":
        x[0] = 0
    if zero != "x":
        target[0] = 0
    x.requires_grad_()
    target.requires_grad_()
    loss = HIDDEN[name][0](x, target, reduction="none", impl=impl)
    loss.sum().backward()
    far = name == "l2-unit" and zero != "both"
    assert loss[0].item() == pytest.approx(1.0 if far else 0.0, rel=1e-6)
    assert torch.equal(loss[1:], alone)
    for side in (x, target):
        assert side.grad is not None and side.grad.isfinite().all()
        assert not side.grad[0].any()


def test_zero_targets_are_as_long_as_eps(impl: str, device: str) -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], device=device, requires_grad=True)
    target = torch.zeros(2, 2, device=device, requires_grad=True)
    rows = onepass.masked_normalized_l2(x, target, eps=0.5, reduction="none", impl=impl)
    assert rows.tolist() == pytest.approx([10.0, 0.0])
    rows.sum().backward()
    assert x.grad is not None and target.grad is not None
    # (x - t) / (|x - t| eps): the length eps is a constant there
    torch.testing.assert_close(x.grad.cpu(), torch.tensor([[1.2, 1.6], [0.0, 0.0]]))
    torch.testing.assert_close(target.grad, -x.grad)
    squares = onepass.masked_normalized_l2(
        x, target, eps=0.5, normalization="target_sq", reduction="none", impl=impl
    )
    assert squares.tolist() == pytest.approx([100.0, 0.0])


@pytest.mark.parametrize("relative", [1e-2, 1e-4, 1e-5, 1e-6])
@pytest.mark.parametrize("name", ["l2-target", "l2-target_sq", "l2-unit", "l2-dim"])
def test_distance_of_nearly_equal_rows(name: str, relative: float, impl: str, device: str) -> None:
    """xx + yy - 2 xy and 1 - cos are noise there: 2.6e-3 off at 1e-2, 2,470 times at 1e-5."""
    target = torch.randn(2, 256, device=device)
    x = (target * (1 + relative * torch.randn(2, 256, device=device))).requires_grad_()
    loss, formula = HIDDEN[name]
    rows = loss(x, target, reduction="none", impl=impl)
    rows.sum().backward()
    # fp64 itself loses half of its digits to the unit vectors' difference: 1e-10 there, enough
    exact = x.detach().double().requires_grad_()
    expected = formula(exact, target.double())
    expected.sum().backward()
    assert float(((rows - expected) / expected).detach().abs().max()) <= HARD
    assert x.grad is not None and exact.grad is not None
    length = exact.grad.norm(dim=-1, keepdim=True)
    assert float(((x.grad - exact.grad) / length).abs().max()) <= HARD


# ---------------------------------------------------------------- masked_mean


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_masked_mean_is_its_formula(dtype: torch.dtype, device: str) -> None:
    values = torch.randn(2, 3, dtype=dtype, device=device, requires_grad=True)
    for make in MASKS.values():
        mask = make()
        mask = None if mask is None else mask.to(device)
        mean = onepass.masked_mean(values, mask)
        expected = truth_reduced(values.double(), mask)
        assert mean.dtype == dtype and mean.shape == ()
        torch.testing.assert_close(mean.double(), expected, rtol=1e-6, atol=1e-6)
        (gradient,) = torch.autograd.grad(mean, values)
        weights = torch.ones(2, 3, device=device) if mask is None else mask.float()
        torch.testing.assert_close(gradient, (weights / weights.sum().clamp_min(1)).to(dtype))


def test_masked_mean_of_nothing(device: str) -> None:
    for values in (torch.randn(3, device=device), torch.empty(0, device=device)):
        values.requires_grad_()
        mean = onepass.masked_mean(values, torch.zeros(values.shape, device=device))
        assert mean.item() == 0.0
        (gradient,) = torch.autograd.grad(mean, values)
        assert not gradient.any()
    assert onepass.masked_mean(torch.empty(0, device=device)).item() == 0.0


@pytest.mark.parametrize("poison", [NAN, torch.inf, -torch.inf], ids=str)
def test_masked_mean_does_not_read_masked_rows(poison: float, device: str) -> None:
    values = torch.tensor([1.0, poison, 3.0], device=device, requires_grad=True)
    mean = onepass.masked_mean(values, torch.tensor([1, 0, 1], device=device))
    mean.backward()
    assert mean.item() == 2.0
    assert values.grad is not None and values.grad.tolist() == [0.5, 0.0, 0.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_mean_accumulates_in_fp32(dtype: torch.dtype, device: str) -> None:
    """bf16 cannot count past 256, and fp16 cannot hold a sum of 65,520."""
    values = torch.full((1000,), 300.0, dtype=dtype, device=device)
    values[0] = 44.0
    mask = torch.ones(1000, dtype=torch.bool, device=device)
    mask[1] = False
    mean = onepass.masked_mean(values, mask)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx((44 + 998 * 300) / 999, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool], ids=str)
def test_masked_mean_of_integers(dtype: torch.dtype, device: str) -> None:
    """An accuracy is a mean of booleans."""
    values = torch.tensor([1, 0, 1, 1], device=device).to(dtype)
    mean = onepass.masked_mean(values, torch.tensor([1, 1, 1, 0], device=device))
    assert mean.item() == pytest.approx(2 / 3, rel=1e-6)
    assert mean.dtype == torch.float32


def test_reductions_ignore_how_the_rows_lie(device: str) -> None:
    """A transposed mask and values of other strides belong together by index."""
    values, mask = torch.randn(3, 4, device=device), torch.rand(4, 3, device=device) > 0.4
    turned = onepass.masked_mean(values.t(), mask)
    plain = onepass.masked_mean(values.t().contiguous(), mask.contiguous())
    torch.testing.assert_close(turned, plain)


# ---------------------------------------------------------------- what all of them share


CROSS_ENTROPIES: dict[str, dict[str, Any]] = {
    "ce": {},
    "ce-smoothed-z": {"label_smoothing": 0.1, "z_loss": 1e-2},
    "ce-capped-mean": {"max_loss": 3.0, "ce_scaling_factor": 0.5},
    "ce-capped-token": {"max_loss": 3.0, "cap_scope": "token", "cap_form": "zero_at_zero"},
}
ALL = [*CROSS_ENTROPIES, *HIDDEN]


def any_loss(name: str, soft: bool = False) -> Callable[..., Tensor]:
    """loss(x, other, mask): `other` holds labels' logits for the cross-entropies."""
    if name in HIDDEN:
        return HIDDEN[name][0]

    def loss(x: Tensor, other: Tensor, mask: Tensor | None, **more: Any) -> Tensor:
        target = other.softmax(-1) if soft else other.nan_to_num().argmax(-1)
        return onepass.masked_cross_entropy(x, target, mask, **CROSS_ENTROPIES[name], **more)

    return loss


@pytest.mark.parametrize("soft", [False, True], ids=["", "soft"])
@pytest.mark.parametrize("name", ALL)
def test_gradcheck_twice(name: str, soft: bool, device: str) -> None:
    """First and second derivatives in fp64 on both sides, with a row that does not count."""
    if soft and name in HIDDEN:
        pytest.skip("only the cross-entropies have a soft target")
    loss = any_loss(name, soft)
    x, other = (
        t.double().requires_grad_(i == 0 or soft or name in HIDDEN)
        for i, t in enumerate(hidden_pair((3, 4), device))
    )
    mask = torch.tensor([1.0, 0.0, 0.7], device=device)
    rows = "mean" if name == "ce-capped-mean" else "none"
    assert torch.autograd.gradcheck(lambda x, y: loss(x, y, mask, reduction=rows), (x, other))
    assert torch.autograd.gradgradcheck(lambda x, y: loss(x, y, mask), (x, other), fast_mode=True)


@pytest.mark.parametrize("name", ["ce", "ce-capped-token", "l2-target", "cosine"])
def test_mask_weights_can_be_learned(name: str, device: str) -> None:
    """A float mask weighs rows, so it has a gradient like any weight."""
    x, other = (t.double() for t in hidden_pair((4, 5), device))
    mask = torch.tensor([0.5, 1.5, 2.0, 0.25], dtype=torch.float64, device=device)
    assert torch.autograd.gradcheck(
        lambda mask: any_loss(name)(x, other, mask), (mask.requires_grad_(),)
    )


@pytest.mark.parametrize("name", ALL)
def test_all_masked(name: str, impl: str, device: str) -> None:
    """0 with a live graph and zero gradients, whatever the rows hold.

    But a capped mean of 0 is the cap of 0, and that is half of the cap in the literal form.
    """
    x = torch.full((2, 5), NAN, device=device, requires_grad=True)
    other = torch.full((2, 5), NAN, device=device)
    mask = torch.zeros(2, dtype=torch.bool, device=device)
    loss = any_loss(name)(x, other, mask, impl=impl)
    assert loss.item() == (1.5 if name == "ce-capped-mean" else 0.0)
    assert loss.requires_grad
    loss.backward()
    assert x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("name", ALL)
def test_masked_rows_change_nothing(name: str, impl: str, device: str) -> None:
    """Bit for bit: masking rows is deleting them (NVIDIA/TransformerEngine#2476)."""
    x, other = hidden_pair((4, 8), device)  # rows at a 16-byte stride, wherever they lie
    mask = torch.tensor([True, False, True, False], device=device)
    loss = any_loss(name)
    small = x[mask].clone().requires_grad_()
    expected = loss(small, other[mask], None, impl=impl)
    expected.backward()
    x[~mask] = NAN
    x.requires_grad_()
    if name in HIDDEN:
        other[~mask] = torch.inf
    actual = loss(x, other, mask, impl=impl)
    actual.backward()
    assert torch.equal(actual, expected)
    assert x.grad is not None and small.grad is not None
    assert torch.equal(x.grad[mask], small.grad)
    assert not x.grad[~mask].any()


def test_soft_targets_of_masked_rows_may_be_nan(impl: str, device: str) -> None:
    """A padded teacher's probabilities are 0 / 0: the mask is what says so."""
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    target = torch.randn(2, 5, device=device).softmax(-1)
    target[1] = NAN
    mask = torch.tensor([True, False], device=device)
    loss = onepass.masked_cross_entropy(logits, target, mask, impl=impl)
    loss.backward()
    alone = onepass.masked_cross_entropy(logits[:1], target[:1], impl=impl)
    assert torch.equal(loss, alone)
    assert logits.grad is not None and logits.grad.isfinite().all()


def test_soft_targets_receive_gradient(impl: str, device: str) -> None:
    """-log p of the student, times the row's weight; 0 where the row does not count."""
    logits = torch.randn(3, 6, device=device)
    target = torch.randn(3, 6, device=device).softmax(-1).requires_grad_()
    mask = torch.tensor([0.5, 0.0, 2.0], device=device)
    onepass.masked_cross_entropy(logits, target, mask, impl=impl).backward()
    expected = -logits.double().log_softmax(-1) * (mask / 2.5).unsqueeze(-1)
    assert target.grad is not None
    assert_close(target.grad, expected, 1 + expected.abs(), "d target")


@pytest.mark.parametrize("name", ALL)
def test_leading_dimensions_are_kept(name: str, device: str) -> None:
    if name == "ce-capped-mean":
        pytest.skip("it has no rows to return")
    x, other = hidden_pair((2, 3, 2, 7), device)
    rows = any_loss(name)(x, other, None, reduction="none")
    flat = any_loss(name)(x.flatten(0, 2), other.flatten(0, 2), None, reduction="none")
    assert rows.shape == (2, 3, 2)
    assert torch.equal(rows.flatten(), flat)
    total = any_loss(name)(x, other, None, reduction="sum")
    torch.testing.assert_close(total, rows.sum(), rtol=1e-6, atol=1e-6)
    mean = any_loss(name)(x, other, None)
    torch.testing.assert_close(mean, rows.mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5)], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_no_rows(name: str, shape: tuple[int, ...], impl: str, device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    other = torch.randn(shape, device=device)
    loss = any_loss(name)(x, other, None, impl=impl)
    loss.backward()
    assert loss.item() == (1.5 if name == "ce-capped-mean" else 0.0)
    assert x.grad is not None and x.grad.shape == shape


@pytest.mark.parametrize("normalization", ["target", "target_sq", "unit", "dim"])
def test_a_nan_in_a_row_that_counts_shows(normalization: str) -> None:
    x, target = torch.randn(3, 8), torch.randn(3, 8)
    x[1, 2] = float("nan")
    distances = onepass.masked_normalized_l2(
        x, target, normalization=normalization, reduction="none"
    )
    assert distances.isnan().tolist() == [False, True, False]
    cosines = onepass.masked_inner_product(x, target, reduction="none")
    assert cosines.isnan().tolist() == [False, True, False]
