"""onepass.cross_entropy is torch.nn.functional.cross_entropy, argument by argument.

Truth is torch's own function in fp64 on the numbers as stored. An error is allowed eight units of
the fp32 sums' natural scale, whatever the logits' dtype, and the gradient's own rounding on top.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onepass

BAR = 8.0  # units of natural scale: the floor above which torch's own order of sums stays
HALF = {torch.bfloat16, torch.float16}
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHAPES = {  # logits; the class dimension is the second where there are two or more
    "C": (5,),
    "N,C": (3, 7),
    "one-row": (1, 129),
    "one-class": (4, 1),
    "N,C,d": (2, 5, 3),
    "N,C,d,e": (2, 4, 1, 3),
}


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def classes_last(x: Tensor) -> Tensor:
    return x if x.dim() < 3 else x.movedim(1, -1)


def classes_second(x: Tensor) -> Tensor:
    return x if x.dim() < 3 else x.movedim(-1, 1)


def rows_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[:-1] if len(shape) < 3 else (shape[0], *shape[2:])


def labels_for(shape: tuple[int, ...], device: str, ignored: int | None = None) -> Tensor:
    """Labels of `shape`'s rows, every third one `ignored`."""
    classes = shape[-1] if len(shape) < 3 else shape[1]
    labels = torch.randint(0, classes, rows_of(shape), device=device)
    if ignored is not None and labels.dim():
        flat = labels.view(-1)
        flat[1::3] = ignored
    return labels


def probabilities_for(shape: tuple[int, ...], device: str) -> Tensor:
    logits = 2 * torch.randn(shape, device=device)
    return logits.softmax(-1 if len(shape) < 3 else 1)


def natural_scales(
    input: Tensor,
    target: Tensor,
    upstream: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of absolute terms behind the loss, d input and d target: what rounding scales with.

    Logits lie as far below their maximum as `gap`, and exp's error grows with that.
    """
    z = classes_last(input.detach().double())
    classes = z.shape[-1]
    w = z.new_ones(classes) if weight is None else weight.detach().double().abs()
    share = label_smoothing / classes * w
    if target.is_floating_point():
        spread = (1 - label_smoothing) * classes_last(target.detach().double()).abs() * w + share
        of_row = z.new_ones(z.shape[:-1])
        signed = of_row
    else:
        counts = target != ignore_index
        label = torch.where(counts, target, 0).long()
        spread = (1 - label_smoothing) * F.one_hot(label, classes) * w + share
        spread = spread * counts.unsqueeze(-1)
        of_row = w[label] * counts
        signed = (w if weight is None else weight.detach().double())[label] * counts
    logp, gap = z.log_softmax(-1), (z - z.amax(-1, keepdim=True)).abs()
    rows = (spread * (1 + logp.abs())).sum(-1)
    scale = upstream.detach().double().abs()
    if reduction == "mean" and signed.sum() != 0:
        # weights of both signs: the denominator cancels, and its relative error grows
        scale = scale * of_row.sum() / signed.sum().square()
    loss = (rows * scale).sum() if reduction != "none" else rows
    scale = scale.expand(rows.shape).unsqueeze(-1)
    d_input = scale * (spread.sum(-1, keepdim=True) * logp.exp() * (1 + gap) + spread)
    d_target = scale * w * (1 + logp.abs())
    return loss, classes_second(d_input), classes_second(d_target)


def assert_close(actual: Tensor, expected: Tensor, scale: Tensor, what: str) -> None:
    """Within BAR units of the accumulation dtype, and half a place of the dtype it is stored in."""
    accumulation = torch.float64 if actual.dtype == torch.float64 else torch.float32
    stored = torch.finfo(actual.dtype)
    allowed = BAR * unit(accumulation) * scale
    # Below the smallest normal number a probability has few bits or none, and GPUs flush it to 0.
    allowed = allowed + unit(actual.dtype) * expected.abs() + stored.smallest_normal
    error = (actual.double() - expected).abs()
    worst = (error - allowed).max() if error.numel() else torch.zeros(())
    assert worst <= 0, (
        f"{what}: error {float(error.max()):.3g}, at most "
        f"{float((error / allowed).max()):.3g} of what is allowed"
    )


def check(
    input: Tensor,
    target: Tensor,
    impl: str,
    *,
    upstream: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Ours against torch in fp64 on the same stored numbers: the value and every gradient."""
    ours = input.detach().requires_grad_()
    truth = input.detach().double().requires_grad_()
    by_probabilities = target.is_floating_point()
    our_target, true_target = target.detach(), target.detach()
    if by_probabilities:
        our_target = our_target.requires_grad_()
        true_target = true_target.double().requires_grad_()
    exact = dict(options)
    if options.get("weight") is not None:
        exact["weight"] = options["weight"].double()

    expected = F.cross_entropy(truth, true_target, **exact)
    actual = onepass.cross_entropy(ours, our_target, **options, impl=impl)
    assert actual.shape == expected.shape
    assert actual.dtype == (torch.float64 if input.dtype == torch.float64 else torch.float32)
    if upstream is None:
        # not ones: a gradient made in the forward pass would ignore this (NVIDIA/TE#2139)
        upstream = torch.randn(expected.shape, device=input.device)
    actual.backward(upstream.to(actual.dtype))
    expected.backward(upstream.double())
    assert ours.grad is not None and ours.grad.dtype == input.dtype
    assert ours.grad.shape == input.shape

    if options.get("reduction", "mean") == "mean" and not expected.isfinite().all():
        # no row counts, or only rows of weight 0: the one difference of value that is documented
        assert actual.item() == 0.0
        assert not ours.grad.any()
        return actual
    assert truth.grad is not None
    loss_scale, grad_scale, target_scale = natural_scales(input, target, upstream, **options)
    plain = natural_scales(input, target, torch.ones_like(upstream), **options)[0]
    assert_close(actual.detach(), expected.detach(), plain, "loss")
    assert loss_scale.isfinite().all()
    assert_close(ours.grad, truth.grad, grad_scale, "d input")
    if by_probabilities:
        assert our_target.grad is not None and true_target.grad is not None
        assert our_target.grad.dtype == target.dtype
        assert_close(our_target.grad, true_target.grad, target_scale, "d target")
    return actual


# ---------------------------------------------------------------- torch's own sample inputs


def op_info() -> Any:
    pytest.importorskip("expecttest", reason="torch's op_db needs expecttest")
    from torch.testing._internal.common_methods_invocations import op_db

    (info,) = (op for op in op_db if op.name == "nn.functional.cross_entropy")
    return info


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_opinfo_samples(dtype: torch.dtype, impl: str, device: str) -> None:
    """Every sample that torch tests its own function with, forward and gradient."""
    info = op_info()
    assert dtype in info.supported_dtypes(device)
    samples = list(info.sample_inputs(device, dtype, requires_grad=True))
    assert len(samples) > 10
    if impl == "triton" and dtype == torch.float64:
        for sample in samples:
            with pytest.raises(ValueError, match="float64 is served by the torch path only"):
                onepass.cross_entropy(sample.input, *sample.args, **sample.kwargs, impl=impl)
        return
    for sample in samples:
        (target,) = sample.args
        check(sample.input, target, impl, **sample.kwargs)


# ---------------------------------------------------------------- the signature


def test_signature_is_torchs() -> None:
    """A call by position must mean the same; `impl` can only be given by name."""
    theirs = inspect.signature(F.cross_entropy).parameters
    ours = dict(inspect.signature(onepass.cross_entropy).parameters)
    assert ours.pop("impl").kind is inspect.Parameter.KEYWORD_ONLY
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        assert ours[name].default == parameter.default, name
        assert ours[name].kind is parameter.kind, name


def test_all_arguments_by_position(impl: str, device: str) -> None:
    logits = torch.randn(4, 6, device=device)
    labels = torch.tensor([0, 2, 5, 2], device=device)
    weight = torch.rand(6, device=device)
    arguments = (labels, weight, None, 2, None, "sum", 0.25)
    expected = F.cross_entropy(logits.double(), labels, weight.double(), *arguments[2:])
    actual = onepass.cross_entropy(logits, *arguments, impl=impl)
    scale = natural_scales(logits, labels, torch.ones((), device=device), weight, 2, "sum", 0.25)
    assert_close(actual, expected, scale[0], "loss")


@pytest.mark.parametrize("reduce", [None, True, False])
@pytest.mark.parametrize("size_average", [None, True, False])
def test_deprecated_reduction_arguments(
    size_average: bool | None, reduce: bool | None, device: str
) -> None:
    """torch still takes them, warns, and lets them beat `reduction`."""
    logits, labels = torch.randn(3, 5, device=device), torch.tensor([1, -100, 4], device=device)
    deprecated = size_average is not None or reduce is not None

    def expecting_a_warning() -> Any:
        if not deprecated:
            return nullcontext()
        return pytest.warns(UserWarning, match="size_average and reduce args will be deprecated")

    with expecting_a_warning():
        expected = F.cross_entropy(logits, labels, None, size_average, -100, reduce, "sum")
    with expecting_a_warning():
        actual = onepass.cross_entropy(logits, labels, None, size_average, -100, reduce, "sum")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- options


WEIGHTS: dict[str, Callable[[int], Tensor | None]] = {
    "unweighted": lambda classes: None,
    "positive": lambda classes: torch.rand(classes) + 0.1,
    "some-zero": lambda classes: (torch.arange(classes) % 2).float() * 1.5,
    "some-negative": lambda classes: torch.linspace(-0.5, 2.0, classes),
}


@pytest.mark.parametrize("ignore_index", [-100, 3, 255, -1], ids=lambda i: f"ignore{i}")
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0], ids=lambda s: f"smooth{s}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_class_indices(
    weights: str, label_smoothing: float, ignore_index: int, device: str
) -> None:
    """Every option with every other one. 3 is a class of the vocabulary: it is then no label."""
    shape = (6, 7)
    logits = 3 * torch.randn(shape, device=device)
    labels = labels_for(shape, device, ignored=ignore_index)
    weight = WEIGHTS[weights](7)
    for reduction in ("mean", "sum", "none"):
        check(
            logits,
            labels,
            "torch",
            weight=None if weight is None else weight.to(device),
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0], ids=lambda s: f"smooth{s}")
@pytest.mark.parametrize("weights", WEIGHTS)
def test_probabilities(weights: str, label_smoothing: float, device: str) -> None:
    """The gradient of the target is compared too: distillation differentiates a teacher by it."""
    shape = (4, 7)
    logits, target = 3 * torch.randn(shape, device=device), probabilities_for(shape, device)
    weight = WEIGHTS[weights](7)
    for reduction in ("mean", "sum", "none"):
        check(
            logits,
            target,
            "torch",
            weight=None if weight is None else weight.to(device),
            label_smoothing=label_smoothing,
            reduction=reduction,
        )


# A few corners of the same grid, since the interpreter takes a quarter of a second for each.
@pytest.mark.parametrize(
    ("weights", "label_smoothing", "ignore_index", "reduction", "soft"),
    [
        ("unweighted", 0.0, -100, "mean", False),
        ("some-negative", 0.1, 3, "mean", False),
        ("some-zero", 1.0, 255, "none", False),
        ("positive", 0.1, -100, "sum", False),
        ("unweighted", 0.0, -100, "mean", True),
        ("some-negative", 0.1, -100, "none", True),
        ("positive", 0.0, -100, "sum", True),
    ],
)
def test_kernels_take_the_options(
    weights: str,
    label_smoothing: float,
    ignore_index: int,
    reduction: str,
    soft: bool,
    impl: str,
    device: str,
) -> None:
    shape = (4, 7)
    logits = 3 * torch.randn(shape, device=device)
    target = probabilities_for(shape, device)
    weight = WEIGHTS[weights](7)
    check(
        logits,
        target if soft else labels_for(shape, device, ignored=ignore_index),
        impl,
        weight=None if weight is None else weight.to(device),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        reduction=reduction,
    )


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, soft: bool, impl: str, device: str) -> None:
    shape = SHAPES[name]
    target = probabilities_for(shape, device) if soft else labels_for(shape, device, ignored=-100)
    check(torch.randn(shape, device=device), target, impl, reduction="none")


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_long_row(soft: bool, impl: str, device: str) -> None:
    """More columns than one program reads, and no multiple of any tile: the parts are merged."""
    shape = (2, 16384 + 301)
    target = probabilities_for(shape, device) if soft else labels_for(shape, device)
    weight = None if soft else torch.rand(shape[1], device=device)
    check(3 * torch.randn(shape, device=device), target, impl, weight=weight, label_smoothing=0.1)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_label_dtypes(dtype: torch.dtype, impl: str, device: str) -> None:
    """torch takes uint8 and int64; a label 200 must not turn negative on the way."""
    classes = 120 if dtype == torch.int8 else 201
    logits = torch.randn(2, classes, device=device)
    labels = torch.tensor([classes - 1, 0], device=device)
    expected = F.cross_entropy(logits.double(), labels, reduction="none")
    if dtype == torch.uint8:
        theirs = F.cross_entropy(logits, labels.to(dtype), reduction="none")
        torch.testing.assert_close(theirs.double(), expected)
    actual = onepass.cross_entropy(logits, labels.to(dtype), reduction="none", impl=impl)
    scale = natural_scales(logits, labels, torch.ones(2, device=device), reduction="none")[0]
    assert_close(actual, expected, scale, "loss")


@pytest.mark.parametrize(
    "layout", ["transposed", "every-other-column", "wide-stride", "reversed-batch", "channels-last"]
)
def test_layouts(layout: str, impl: str, device: str) -> None:
    """What lies between the elements of a view is NaN: reading it shows."""
    if layout == "transposed":
        logits = torch.randn(9, 3, device=device).t()
    elif layout == "every-other-column":
        storage = torch.full((3, 18), float("nan"), device=device)
        logits = storage[:, ::2].copy_(torch.randn(3, 9))
    elif layout == "wide-stride":
        storage = torch.full((3, 40), float("nan"), device=device)
        logits = storage[:, 1:10].copy_(torch.randn(3, 9))
    elif layout == "reversed-batch":
        logits = torch.randn(6, 9, device=device)[::2]
    else:
        logits = torch.randn(2, 5, 2, 2, device=device).to(memory_format=torch.channels_last)
    labels = labels_for(tuple(logits.shape), device, ignored=-100)
    check(logits, labels, impl, reduction="sum")


# ---------------------------------------------------------------- rows that do not count


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("ignore_index", [-100, 2], ids=["outside", "inside"])
def test_all_ignored_is_zero_with_a_live_graph(
    ignore_index: int, weighted: bool, label_smoothing: float, impl: str, device: str
) -> None:
    """torch gives NaN, and its chunked op NaN gradients (NVIDIA/Megatron-LM#1764, ROCm/aiter#5165).

    The graph has to live on: the other ranks of a sharded model wait for this one's backward.
    """
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    labels = torch.full((2,), ignore_index, device=device)
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if weighted:
        options["weight"] = torch.rand(5, device=device)
    assert F.cross_entropy(logits, labels, **options).isnan()
    for reduction in ("mean", "sum", "none") if impl == "torch" else ("mean",):
        loss = onepass.cross_entropy(logits, labels, **options, reduction=reduction, impl=impl)
        assert loss.requires_grad
        assert not loss.any()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert not gradient.any()


def test_only_zero_weights_is_zero_too(impl: str, device: str) -> None:
    logits = torch.randn(2, 5, device=device, requires_grad=True)
    labels = torch.tensor([1, 3], device=device)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device)
    assert F.cross_entropy(logits, labels, weight).isnan()
    loss = onepass.cross_entropy(logits, labels, weight, impl=impl)
    loss.backward()
    assert loss.item() == 0.0
    assert logits.grad is not None and not logits.grad.any()


def test_weights_that_cancel_follow_torch(device: str) -> None:
    """The mean's denominator is 0 although rows count: torch says infinity, and 0 would be news."""
    logits = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]], device=device)
    labels = torch.tensor([0, 1], device=device)
    weight = torch.tensor([1.0, -1.0, 1.0], device=device)
    expected = F.cross_entropy(logits, labels, weight)
    assert expected.isinf()
    assert onepass.cross_entropy(logits, labels, weight).item() == expected.item()


@pytest.mark.parametrize("shape", [(0, 5), (0, 5, 3), (2, 5, 0)], ids=str)
def test_no_rows(shape: tuple[int, ...], impl: str, device: str) -> None:
    logits = torch.randn(shape, device=device, requires_grad=True)
    labels = torch.empty(rows_of(shape), dtype=torch.int64, device=device)
    for reduction in ("mean", "sum", "none"):
        loss = onepass.cross_entropy(logits, labels, reduction=reduction, impl=impl)
        assert loss.shape == (labels.shape if reduction == "none" else ())
        assert not loss.any()
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert gradient.shape == logits.shape


@pytest.mark.parametrize("filler", [float("nan"), float("inf"), -float("inf")], ids=str)
def test_ignored_row_is_not_read(filler: float, impl: str, device: str) -> None:
    # rows at a 16-byte stride: bits depend on a row's own alignment, and deleting rows moves them
    logits = torch.randn(3, 8, device=device)
    labels = torch.tensor([2, 4, 5], device=device)
    clean = logits[[0, 2]].clone().requires_grad_()
    onepass.cross_entropy(clean, labels[[0, 2]], ignore_index=4, impl=impl).backward()
    logits[1] = filler
    logits.requires_grad_()
    onepass.cross_entropy(logits, labels, ignore_index=4, impl=impl).backward()
    assert logits.grad is not None and clean.grad is not None
    assert torch.equal(logits.grad[[0, 2]], clean.grad)
    assert not logits.grad[1].any()


def test_banned_classes(impl: str, device: str) -> None:
    """-inf logits (a banned token) where no label points: value and gradient as torch's."""
    logits = torch.randn(3, 9, device=device)
    logits[:, 0] = -torch.inf  # the first column, from which an online softmax starts
    logits[1, 2:7] = -torch.inf
    labels = torch.tensor([1, 8, 3], device=device)
    ours, truth = logits.clone().requires_grad_(), logits.double().requires_grad_()
    onepass.cross_entropy(ours, labels, impl=impl).backward()
    F.cross_entropy(truth, labels).backward()
    assert ours.grad is not None and truth.grad is not None
    torch.testing.assert_close(ours.grad.double(), truth.grad, rtol=1e-6, atol=1e-7)
    assert not ours.grad[logits == -torch.inf].any()
    impossible = onepass.cross_entropy(logits[:1], labels[:1] * 0, impl=impl)
    assert impossible.item() == torch.inf


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("offset", [-200.0, 200.0])
def test_all_logits_far_from_zero(offset: float, soft: bool, impl: str, device: str) -> None:
    """Lanes past the row must not be taken for logits of 0, nor their exponential overflow."""
    shape = (2, 5)
    target = probabilities_for(shape, device) if soft else labels_for(shape, device)
    check(torch.randn(shape, device=device) + offset, target, impl)


# ---------------------------------------------------------------- property: any call, any options


def drawn_calls(dtypes: list[torch.dtype]) -> Any:
    from hypothesis import strategies as st

    @st.composite
    def call(draw: Any) -> dict[str, Any]:
        dims = draw(st.integers(1, 4))
        sizes = [draw(st.integers(0 if d > 1 else 1, 3)) for d in range(dims - 1)]
        classes = draw(st.sampled_from([1, 2, 3, 5, 17]))
        shape = (classes,) if dims == 1 else (sizes[0], classes, *sizes[1:])
        return {
            "shape": shape,
            "seed": draw(st.integers(0, 2**16)),
            "spread": draw(st.sampled_from([0.0, 1.0, 30.0])),
            "offset": draw(st.sampled_from([0.0, -100.0])),
            "dtype": draw(st.sampled_from(dtypes)),
            "soft": draw(st.booleans()),
            "weights": draw(st.sampled_from(sorted(WEIGHTS))),
            "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
            "ignore_index": draw(st.sampled_from([-100, 0, 1, 1000])),
            "ignored_share": draw(st.sampled_from([0.0, 0.5, 1.0])),
            "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
            "upstream": draw(st.sampled_from([1.0, -2.5, 2.0**-20, 2.0**20])),
        }

    return call()


def make_call(drawn: dict[str, Any], device: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(drawn["seed"])
    shape = drawn["shape"]
    classes = shape[-1] if len(shape) < 3 else shape[1]
    logits = torch.randn(shape, generator=generator) * drawn["spread"] + drawn["offset"]
    options: dict[str, Any] = {
        "weight": WEIGHTS[drawn["weights"]](classes),
        "label_smoothing": drawn["label_smoothing"],
        "reduction": drawn["reduction"],
    }
    if drawn["soft"]:
        target = torch.randn(shape, generator=generator).softmax(-1 if len(shape) < 3 else 1)
        # torch wants one dtype; the kernels upcast
        target = target.to(drawn["dtype"])
    else:
        options["ignore_index"] = drawn["ignore_index"]
        target = torch.randint(0, classes, rows_of(shape), generator=generator)
        ignored = torch.rand(target.shape, generator=generator) < drawn["ignored_share"]
        target = torch.where(ignored, drawn["ignore_index"], target)
    if options["weight"] is not None:
        options["weight"] = options["weight"].to(device)
    return logits.to(device, drawn["dtype"]), target.to(device), options


def test_any_call_agrees_with_torch(impl: str, device: str) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    slow = impl == "triton" and device == "cpu"
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    if impl == "torch":
        dtypes.append(torch.float64)

    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    if not slow:  # a failure in the interpreter would take minutes to shrink
        phases.append(hypothesis.Phase.shrink)

    @hypothesis.settings(max_examples=8 if slow else 200, phases=phases)
    @hypothesis.given(drawn_calls(dtypes))
    def holds(drawn: dict[str, Any]) -> None:
        logits, target, options = make_call(drawn, device)
        rows = logits.numel() // max(1, classes_last(logits).shape[-1])
        hypothesis.assume(not slow or rows <= 4)
        if options["reduction"] == "mean" and options["weight"] is not None:
            counts = torch.ones_like(target, dtype=torch.bool)
            if not drawn["soft"]:
                counts = target != options["ignore_index"]
                picked = options["weight"][target[counts]]
                # a denominator near 0 is torch's own noise
                hypothesis.assume(
                    picked.numel() == 0 or abs(picked.sum()) > 0.01 or not picked.any()
                )
        size = target.shape if not drawn["soft"] else rows_of(tuple(logits.shape))
        shape = size if options["reduction"] == "none" else ()
        upstream = torch.full(shape, drawn["upstream"], device=device)
        if logits.dtype == torch.float16:
            upstream = upstream.clamp(-4.0, 4.0)  # the gradient itself has to fit into fp16
        check(logits, target, impl, upstream=upstream, **options)

    holds()


# ---------------------------------------------------------------- differentiation


GRADCHECKED: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": [0.5, 2.0, 0.0, 1.0, -0.25]},
    "smoothed": {"label_smoothing": 0.2},
    "smoothed-weighted-none": {
        "label_smoothing": 0.2,
        "weight": [0.5, 2.0, 0.1, 1.0, 3.0],
        "reduction": "none",
    },
}


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
@pytest.mark.parametrize("options", GRADCHECKED)
def test_gradcheck_twice(options: str, soft: bool, device: str) -> None:
    """First and second derivatives in fp64; of the probabilities too."""
    keywords = dict(GRADCHECKED[options])
    if "weight" in keywords:
        keywords["weight"] = torch.tensor(keywords["weight"], dtype=torch.float64, device=device)
    logits = torch.randn(3, 5, dtype=torch.float64, device=device, requires_grad=True)
    labels = torch.tensor([1, -100, 3], device=device)
    if soft:
        target = torch.randn(3, 5, dtype=torch.float64, device=device).softmax(-1).requires_grad_()

        def loss(z: Tensor, q: Tensor) -> Tensor:
            return onepass.cross_entropy(z, q, **keywords)

        assert torch.autograd.gradcheck(loss, (logits, target))
        assert torch.autograd.gradgradcheck(loss, (logits, target))
    else:
        assert torch.autograd.gradcheck(
            lambda z: onepass.cross_entropy(z, labels, **keywords), (logits,)
        )
        assert torch.autograd.gradgradcheck(
            lambda z: onepass.cross_entropy(z, labels, **keywords), (logits,)
        )


def test_learned_class_weights(device: str) -> None:
    """torch differentiates the weights of probabilities, and refuses to for class indices."""
    logits, target = torch.randn(4, 5, device=device), probabilities_for((4, 5), device)
    ours = torch.rand(5, device=device, requires_grad=True)
    theirs = ours.detach().double().requires_grad_()
    onepass.cross_entropy(logits, target, ours).backward()
    F.cross_entropy(logits.double(), target.double(), theirs).backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-6, atol=1e-7)


def test_probabilities_of_another_dtype(device: str) -> None:
    """fp64 targets made by numpy meet fp32 logits: torch promotes."""
    logits, target = torch.randn(4, 5, device=device), probabilities_for((4, 5), device).double()
    expected = F.cross_entropy(logits, target)
    actual = onepass.cross_entropy(logits, target)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- drop-in


def train(
    loss_function: Callable[..., Tensor], device: str, soft: bool
) -> tuple[list[float], list[float], list[Tensor]]:
    """Ten steps of a small classifier: losses, gradient norms, and the parameters at the end."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Tanh(), nn.Linear(8, 11)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    tokens = torch.randint(0, 11, (10, 5), device=device)
    losses, norms = [], []
    for step in range(10):
        target = torch.roll(tokens[step], -1)
        if soft:
            target = F.one_hot(target, 11).float() * 0.9 + 0.1 / 11
        else:
            target[-1] = -100
        optimizer.zero_grad()
        loss = loss_function(model(tokens[step]), target, label_smoothing=0.0 if soft else 0.1)
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        losses.append(loss.item())
    return losses, norms, [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("soft", [False, True], ids=["indices", "probabilities"])
def test_ten_training_steps_are_the_same(soft: bool, impl: str, device: str) -> None:
    """Losses may agree while gradients do not (linkedin/Liger-Kernel#1329): norms, weights too."""
    if soft and impl == "triton":
        pytest.skip(
            "one training run through the interpreter is enough: the other is 10 steps more"
        )

    def ours(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
        return onepass.cross_entropy(logits, target, **options, impl=impl)

    our_losses, our_norms, our_parameters = train(ours, device, soft)
    losses, norms, parameters = train(F.cross_entropy, device, soft)
    assert our_losses == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert our_norms == pytest.approx(norms, rel=1e-6, abs=1e-6)
    for ours_after, theirs_after in zip(our_parameters, parameters, strict=True):
        torch.testing.assert_close(ours_after, theirs_after, rtol=1e-6, atol=1e-6)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2), "nothing was learned"


@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "weighted"])
def test_smoothed_probabilities_round_the_gradient_once(
    weighted: bool, impl: str, device: str
) -> None:
    """The two parts of a smoothed loss cancel here: rounding each to bf16 first shows their parts.

    (linkedin/Liger-Kernel#1432 is the same mistake, in a divergence.)
    """
    classes = 300
    logits = torch.randn(2, classes, device=device).to(torch.bfloat16)
    p = logits.float().softmax(-1)
    target = (2 * p - 1 / classes).to(torch.bfloat16)  # half of it and half of 1/C make p
    weight = torch.full((classes,), 3.0, device=device) if weighted else None
    check(logits, target, impl, weight=weight, label_smoothing=0.5, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits(dtype: torch.dtype, impl: str, device: str) -> None:
    """fp32 out of 16-bit logits, without a rounding between: torch's own result is 16-bit."""
    logits = (4 * torch.randn(3, 40, device=device)).to(dtype)
    loss = check(logits, labels_for((3, 40), device), impl, reduction="none")
    assert F.cross_entropy(logits, labels_for((3, 40), device)).dtype == dtype
    assert not torch.equal(loss, loss.to(dtype).float()), "rounded to the logits' dtype on the way"


def test_autocast(impl: str, device: str) -> None:
    """Under autocast our loss of bf16 logits is that of the upcast ones. So is torch's on a CPU; on
    CUDA torch rounds its loss to bf16, so the upcast is spelled out."""
    weights = torch.randn(9, 6, device=device)
    hidden, labels = torch.randn(3, 6, device=device), torch.tensor([8, -100, 2], device=device)
    results = []
    for loss_function in (
        lambda z, y: F.cross_entropy(z.float(), y),
        lambda z, y: onepass.cross_entropy(z, y, impl=impl),
    ):
        head = weights.clone().requires_grad_()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            logits = F.linear(hidden, head)
            assert logits.dtype == torch.bfloat16
            loss = loss_function(logits, labels)
        assert loss.dtype == torch.float32
        loss.backward()
        assert head.grad is not None
        results.append((loss.detach(), head.grad))
    (theirs, their_grad), (ours, our_grad) = results
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    # d logits is rounded to bf16 in both, from fp32 numbers a few units apart: one place at most
    torch.testing.assert_close(our_grad, their_grad, rtol=2**-7, atol=2**-9)


# ---------------------------------------------------------------- torch.compile


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, dict[str, Any]] = {
    "plain": {},
    "smoothed": {"label_smoothing": 0.1},
    "weighted": {"weight": True},
    "ignored-class": {"ignore_index": 2, "reduction": "sum"},
    "none": {"reduction": "none"},
    "probabilities": {"soft": True},
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_in_one_graph_is_bit_equal(name: str, device: str) -> None:
    """No graph break (pytorch/torchtune#2741, axolotl#3721), and the numbers of eager mode."""
    options = dict(COMPILED[name])
    shape = (5, 7)
    logits = torch.randn(shape, device=device)
    target = labels_for(shape, device, ignored=options.get("ignore_index", -100))
    if options.pop("soft", False):
        target = probabilities_for(shape, device)
    if options.pop("weight", False):
        options["weight"] = torch.rand(7, device=device)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return onepass.cross_entropy(2 * z, y, **options).sum() / 3

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        z = logits.clone().requires_grad_()
        value = function(z, target)
        value.backward()
        assert z.grad is not None
        results.append((value.detach(), z.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.usefixtures("dynamo")
def test_compiled_with_growing_batches(impl: str, device: str) -> None:
    """One dynamic graph serves every batch size, with the kernels inside."""
    compiled = torch.compile(
        lambda z, y: onepass.cross_entropy(z, y, impl=impl),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    for rows in (2, 3, 5):
        logits = torch.randn(rows, 7, device=device, requires_grad=True)
        labels = labels_for((rows, 7), device, ignored=-100)
        expected = onepass.cross_entropy(logits, labels, impl=impl)
        assert torch.equal(compiled(logits, labels), expected)


# ---------------------------------------------------------------- calls that torch rejects too


def wrong_calls() -> Iterator[Any]:
    """Calls that torch.nn.functional.cross_entropy answers with an exception (on the CPU)."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    soft = logits.softmax(-1)
    image, pixels = torch.randn(2, 5, 3, 3), (torch.arange(18) % 5).view(2, 3, 3)

    def case(name: str, *arguments: Any, **keywords: Any) -> Any:
        return pytest.param(arguments, keywords, id=name)

    yield case("fewer-labels", logits, labels[:2])
    yield case("more-labels", logits, torch.tensor([0, 4, 2, 1]))
    yield case("labels-of-two-dimensions", logits, labels[:, None])
    yield case("scalar-label-for-rows", logits, torch.tensor(1))
    yield case("row-of-labels-for-one-row", logits[0], labels)
    yield case("pixels-transposed", image[..., :2], pixels[:, :2])
    yield case("pixels-without-batch", image, pixels[0])
    yield case("classes-last", torch.randn(2, 3, 5), torch.ones(2, 3, dtype=torch.int64))
    yield case("label-is-the-number-of-classes", logits, torch.tensor([0, 5, 2]))
    yield case("label-is-negative", logits, torch.tensor([0, -1, 2]))
    yield case("label-is-the-lowest-integer", logits, torch.tensor([0, -(2**63), 2]))
    yield case("-100-while-another-is-ignored", logits, torch.tensor([0, -100, 2]), ignore_index=1)
    yield case("pixel-out-of-range", image, pixels + 4)
    yield case("bool-labels", logits, labels > 1)
    yield case("complex-labels", logits, labels + 0j)
    yield case("integer-logits", logits.long(), labels)
    yield case("bool-logits", logits > 0, labels)
    yield case("complex-logits", logits + 0j, labels)
    yield case("scalar-logits", torch.tensor(1.0), torch.tensor(0))
    yield case("list-of-logits", [[0.0, 1.0]], labels[:1])
    yield case("list-of-labels", logits, [0, 4, 2])
    yield case("no-target", logits, None)
    yield case("short-weight", logits, labels, torch.ones(4))
    yield case("long-weight", logits, labels, torch.ones(6))
    yield case("scalar-weight", logits, labels, torch.tensor(1.0))
    yield case("weight-per-element", logits, labels, torch.ones(3, 5))
    yield case("integer-weight", logits, labels, torch.ones(5, dtype=torch.int64))
    yield case("list-of-weights", logits, labels, [1.0] * 5)
    yield case("weight-wants-gradient", logits, labels, torch.ones(5, requires_grad=True))
    yield case("short-weight-for-probabilities", logits, soft, torch.ones(4))
    yield case("probabilities-of-other-width", logits, soft[:, :4])
    yield case("probabilities-of-other-length", logits, soft[:2])
    yield case("probabilities-transposed", image[..., :2], image[..., :2].softmax(1).mT)
    yield case("ignore-index-for-probabilities", logits, soft, ignore_index=2)
    yield case("ignore-index-None", logits, labels, ignore_index=None)
    yield case("ignore-index-1.5", logits, labels, ignore_index=1.5)
    yield case("unknown-reduction", logits, labels, reduction="avg")
    yield case("reduction-None", logits, labels, reduction=None)
    yield case("smoothing-above-1", logits, labels, label_smoothing=1.1)
    yield case("smoothing-text", logits, labels, label_smoothing="0.1")
    yield case("smoothing-None", logits, labels, label_smoothing=None)
    yield case("no-classes", logits[:, :0], labels)
    yield case("unknown-keyword", logits, labels, smoothing=0.1)


@pytest.mark.parametrize(("arguments", "keywords"), list(wrong_calls()))
def test_what_torch_rejects(
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both raise: ours ValueError, TypeError or IndexError, and IndexError for a wrong label."""
    # torch on the CPU: its GPU kernels answer a wrong label with a device-side assertion
    with pytest.raises((RuntimeError, ValueError, TypeError, IndexError)) as theirs:
        F.cross_entropy(*arguments, **keywords)
    monkeypatch.setenv("ONEPASS_STRICT", "1")  # labels are looked at on a GPU too
    here: list[Any] = [
        a.detach().to(device).requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    before = [a.detach().clone() for a in here if isinstance(a, Tensor)]
    with pytest.raises((ValueError, TypeError, IndexError)) as ours:
        onepass.cross_entropy(*here, **keywords)
    if "out of bounds" in str(theirs.value) and arguments[0].numel():
        assert ours.type is IndexError
    for tensor, copy in zip((a for a in here if isinstance(a, Tensor)), before, strict=True):
        assert torch.equal(tensor, copy)


@pytest.mark.parametrize("label_smoothing", [-0.1, float("nan")])
def test_what_torch_lets_pass(label_smoothing: float) -> None:
    """torch checks the upper bound alone, and takes a negative or NaN smoothing for none."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    unsmoothed = F.cross_entropy(logits, labels)
    assert F.cross_entropy(logits, labels, label_smoothing=label_smoothing) == unsmoothed
    with pytest.raises(ValueError, match=r"label_smoothing must be between 0\.0 and 1\.0: got"):
        onepass.cross_entropy(logits, labels, label_smoothing=label_smoothing)


def test_the_wrong_calls_are_not_wrong_by_accident() -> None:
    """The corpus' healthy call passes in both, so that each case fails for its own reason."""
    logits, labels = torch.randn(3, 5), torch.tensor([0, 4, 2])
    for weight, smoothing in itertools.product((None, torch.ones(5)), (0.0, 1.0)):
        F.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
        onepass.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
