"""Functions and modules with other packages' arguments give what those packages give.

The reference of each is written out in plain torch; where torch (2.13), cut-cross-entropy or
Liger-Kernel is there, the original itself is one more. Their kernels run in Triton's interpreter.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import onepass
from onepass.compat import cce, liger
from support.environment import INTERPRETING

V, D, N = 37, 16, 10
# Any: what these calls get wrong, a type checker would mostly have told.
lce: Any = onepass.linear_cross_entropy
theirs: Any = getattr(functional, "linear_cross_entropy", None)
NO_TORCH = "this torch has no linear_cross_entropy (2.13 brought it)"
Options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors: a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def inputs(device: str, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    labels = torch.randint(0, V, (N,))
    labels[2], labels[7] = -100, -100
    t = SimpleNamespace(
        h=torch.randn(N, D, dtype=dtype),
        w=(torch.randn(V, D) / 2).to(dtype),
        b=torch.randn(V, dtype=dtype),
        heads=(torch.randn(V, 2, 3, D) / 2).to(dtype),
        biases=torch.randn(V, 2, 3, dtype=dtype),
        classes=torch.rand(V, dtype=dtype) + 0.5,
    )
    t = SimpleNamespace(**{k: v.to(device) for k, v in vars(t).items()})
    for name in ("h", "w", "b", "heads", "biases"):
        getattr(t, name).requires_grad_(True)
    t.y = labels.to(device)
    t.places = torch.randint(0, V, (N, 2, 3)).to(device)
    t.places[4, 1] = -100
    t.q = torch.rand(N, V).softmax(-1).to(device, dtype)
    t.q_places = torch.rand(N, V, 2, 3).softmax(1).to(device, dtype)
    return t


def with_gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    """The loss, and the gradients of its rows' sum under weights that tell them apart."""
    upstream = torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape)
    grads = torch.autograd.grad((loss * upstream).sum(), leaves, retain_graph=True)
    return [loss.detach(), *grads]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for ours, reference in zip(got, expected, strict=True):
        assert ours.shape == reference.shape
        size = float(reference.detach().abs().max()) if reference.numel() else 0.0
        torch.testing.assert_close(
            ours, reference.to(ours.dtype), rtol=4e-6, atol=2e-6 * max(size, 1e-3)
        )


# ---------------------------------------------------------------- torch

CALLS: dict[str, Callable[[SimpleNamespace], dict[str, Any]]] = {
    "plain": lambda t: {},
    "bias": lambda t: {"linear_bias": t.b},
    "sum": lambda t: {"reduction": "sum"},
    "none": lambda t: {"reduction": "none"},
    "weights": lambda t: {"weight": t.classes},
    "weights-none": lambda t: {"weight": t.classes, "reduction": "none"},
    "smoothing": lambda t: {"label_smoothing": 0.1},
    "everything": lambda t: {
        "linear_bias": t.b,
        "weight": t.classes,
        "label_smoothing": 0.2,
        "reduction": "sum",
    },
    "ignore-5": lambda t: {"ignore_index": 5},
}


def written_out(t: SimpleNamespace, target: Tensor, **given: Any) -> Tensor:
    """F.linear, then F.cross_entropy: with heads at places where `t.head` has more dimensions."""
    bias, head = given.pop("linear_bias", None), t.head
    logits = functional.linear(t.h, head.flatten(0, -2), None if bias is None else bias.flatten())
    if given.get("ignore_index", 0) is None:
        del given["ignore_index"]
    return functional.cross_entropy(logits.view(-1, *head.shape[:-1]), target, **given)


@pytest.mark.parametrize("name", CALLS)
def test_linear_cross_entropy(name: str, impl: str, device: str) -> None:
    t = inputs(device)
    t.head = t.w
    given = CALLS[name](t)
    target = t.y.clone()
    if name == "ignore-5":
        target[target == -100] = 5
    leaves = [t.h, t.w, *([t.b] if "linear_bias" in given else [])]
    with onepass.strict():
        got = lce(t.h, t.w, target, **given, impl=impl)
    ours = with_gradients(got, *leaves)
    close(ours, with_gradients(written_out(t, target, **given), *leaves))
    if theirs is not None:
        close(ours, with_gradients(theirs(t.h, t.w, target, **given), *leaves))


@pytest.mark.parametrize("probabilities", [False, True], ids=["labels", "probabilities"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "ignore-5"])
def test_a_head_at_every_place(name: str, probabilities: bool, device: str) -> None:
    t = inputs(device)
    t.head = t.heads
    given = CALLS[name](t)
    if "linear_bias" in given:
        given["linear_bias"] = t.biases
    leaves = [t.h, t.heads, *([t.biases] if "linear_bias" in given else [])]
    target = t.q_places if probabilities else t.places
    with onepass.strict():
        got = lce(t.h, t.heads, target, **given)
    ours = with_gradients(got, *leaves)
    close(ours, with_gradients(written_out(t, target, **given), *leaves))
    if theirs is not None:
        close(ours, with_gradients(theirs(t.h, t.heads, target, **given), *leaves))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_probabilities(reduction: str, device: str) -> None:
    t = inputs(device)
    given: dict[str, Any] = {"reduction": reduction, "label_smoothing": 0.1, "weight": t.classes}
    with onepass.strict():
        got = lce(t.h, t.w, t.q, linear_bias=t.b, **given)
    logits = functional.linear(t.h, t.w, t.b)
    close(
        with_gradients(got, t.h, t.w),
        with_gradients(functional.cross_entropy(logits, t.q, **given), t.h, t.w),
    )


def test_one_sample(impl: str, device: str) -> None:
    t = inputs(device)
    choices: list[dict[str, Any]] = [{}, {"reduction": "none"}]
    for given in choices:
        got = lce(t.h[0], t.w, t.y[0], **given, impl=impl)
        reference = functional.cross_entropy(functional.linear(t.h[0], t.w), t.y[0], **given)
        close(with_gradients(got, t.h, t.w), with_gradients(reference, t.h, t.w))


def test_nothing_counts(impl: str, device: str) -> None:
    t = inputs(device)
    nobody = torch.full_like(t.y, -100)
    for rows in (slice(None), slice(0, 0)):
        loss = lce(t.h[rows], t.w, nobody[rows], impl=impl)
        grads = with_gradients(loss, t.h, t.w)
        assert all(float(value.abs().sum()) == 0 for value in grads)


def test_half_precision_is_no_worse_than_torch(impl: str, device: str) -> None:
    t = inputs(device, torch.bfloat16)
    leaves = [t.h, t.w, t.b]
    exact = [leaf.detach().double().requires_grad_(True) for leaf in leaves]
    logits = functional.linear(*exact)
    truth = with_gradients(functional.cross_entropy(logits, t.y, reduction="none"), *exact)
    eager = with_gradients(
        functional.cross_entropy(functional.linear(*leaves), t.y, reduction="none"), *leaves
    )
    got = lce(t.h, t.w, t.y, linear_bias=t.b, reduction="none", impl=impl)
    assert got.dtype == torch.float32
    ours = with_gradients(got, *leaves)
    assert [grad.dtype for grad in ours[1:]] == [torch.bfloat16] * 3
    for mine, torchs, right in zip(ours, eager, truth, strict=True):
        budget = float((torchs.double() - right).norm())
        assert float((mine.double() - right).norm()) <= 1.05 * budget + 2**-9 * float(right.norm())


def test_autocast_decides_the_dtype_of_the_product(device: str) -> None:
    t = inputs(device)
    with torch.autocast(device, torch.bfloat16):
        ours = lce(t.h, t.w, t.y, linear_bias=t.b)
        fused = liger.LigerFusedLinearCrossEntropyLoss()(t.w, t.h, t.y, t.b)
        cut = cce.linear_cross_entropy(t.h, t.w, t.y, t.b)
    narrow = [leaf.detach().bfloat16() for leaf in (t.h, t.w, t.b)]
    reference = lce(*narrow[:2], t.y, linear_bias=narrow[2])
    for loss in (ours, fused, cut):
        assert isinstance(loss, Tensor) and loss.dtype == torch.float32
        assert torch.equal(loss.detach(), reference)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, (t.h, t.w, t.b)))
    double = lce(t.h.double(), t.w.double(), t.y)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(lce(t.h.double(), t.w.double(), t.y), double), (
            "autocast leaves float64 alone"
        )


OPTIONS: dict[str, tuple[dict[str, Any], int | None]] = {  # what is asked, rows a slab
    "default": ({}, None),
    "one-chunk": ({"chunking_method": None}, N),
    "rows": ({"batch_chunk_size": 3}, 3),
    "aspect": ({"chunking_method": "aspect_ratio"}, 4),  # ceil(10 / ceil(37 / 16)) = 4
    "aspect-2": ({"chunking_method": "aspect_ratio:2"}, 2),
    "aspect-64": ({"chunking_method": "aspect_ratio:64"}, 1),
    "both-agree": ({"chunking_method": "aspect_ratio", "batch_chunk_size": 4}, 4),
    "accurate": ({"acc_policy": "accurate", "acc_dtype": torch.float32}, None),
    "retain": ({"allow_retain_graph": True, "acc_policy": "compact"}, None),
}


@pytest.mark.skipif(Options is None, reason=NO_TORCH)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    t = inputs(device)
    asked, rows = OPTIONS[name]
    made: list[int | None] = []
    lazy = onepass.head_loss.LazyLogits  # type: ignore[attr-defined]

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["max_slab_bytes"])
        return lazy(*args, **kwargs)

    monkeypatch.setattr(onepass.head_loss, "LazyLogits", noted)  # type: ignore[attr-defined]
    loss = lce(t.h, t.w, t.y, options=Options(**asked))
    assert made == [None if rows is None else rows * V * 4]
    ours = with_gradients(loss, t.h, t.w)
    close(ours, with_gradients(theirs(t.h, t.w, t.y, options=Options(**asked)), t.h, t.w))


def test_module(device: str) -> None:
    t = inputs(device)
    for places, target in (((), t.y), ((2, 3), t.places)):
        ours = onepass.nn.LinearCrossEntropyLoss(
            D, V, out_features=places, bias=True, weight=t.classes, label_smoothing=0.1
        ).to(device)
        assert {k: tuple(v.shape) for k, v in ours.state_dict().items()} == {
            "weight": (V,),
            "linear.weight": (V * max(1, 3 * len(places)), D),
            "linear.bias": (V * max(1, 3 * len(places)),),
        }
        got = [ours(t.h, target), *torch.autograd.grad(ours(t.h, target), list(ours.parameters()))]
        t.head = ours.linear.weight.view(V, *places, D)
        loss = written_out(
            t, target, linear_bias=ours.linear.bias, weight=t.classes, label_smoothing=0.1
        )
        close(got, [loss, *torch.autograd.grad(loss, list(ours.parameters()))])
        assert f"out_features={places}" in repr(ours)
        if theirs is not None:
            other = torch.nn.LinearCrossEntropyLoss(
                D, V, out_features=places, bias=True, weight=t.classes, label_smoothing=0.1
            ).to(device)
            other.load_state_dict(ours.state_dict())
            close([ours(t.h, target).detach()], [other(t.h, target).detach()])


# ---------------------------------------------------------------- Liger


def liger_written_out(
    logits: Tensor, y: Tensor, weights: Tensor | None, asked: dict[str, Any]
) -> dict[str, Tensor]:
    """Liger's loss in plain torch: per-row terms, its two denominators, its token scaling."""
    if asked.get("softcap"):
        logits = asked["softcap"] * torch.tanh(logits / asked["softcap"])
    ignored = asked.get("ignore_index", -100)
    counted, reduction = y != ignored, asked.get("reduction", "mean")
    ce = functional.cross_entropy(
        logits, y, weights, ignore_index=ignored, reduction="none",
        label_smoothing=asked.get("label_smoothing", 0.0),
    )  # fmt: skip
    z = asked.get("lse_square_scale", 0.0) * logits.logsumexp(-1).square() * counted
    safe = torch.where(counted, y, 0)
    if asked.get("use_token_scaling"):
        p = logits.softmax(-1).gather(-1, safe[:, None]).squeeze(-1).detach()
        ce, z = ce * p, z * p
    right = (logits.argmax(-1) == y).float() * counted
    if reduction == "mean":
        share = counted.float() if weights is None else weights[safe] * counted
        ce, z = ce.sum() / share.sum(), z.sum() / counted.sum()
    elif reduction == "sum":
        ce, z = ce.sum(), z.sum()
    return {
        "loss": ce + z,
        "z_loss": z.detach(),
        "token_accuracy": right if reduction == "none" else right.sum() / counted.sum(),
        "predicted_tokens": torch.where(counted, logits.argmax(-1), -1),
    }


RETURNS = {"return_z_loss": True, "return_token_accuracy": True, "return_predicted_tokens": True}
LIGER: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignore-3": {"ignore_index": 3},
    "z-loss": {"lse_square_scale": 1e-2},
    "smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 3.0},
    "all-returns": {**RETURNS, "lse_square_scale": 1e-2},
    "all-returns-none": {**RETURNS, "lse_square_scale": 1e-2, "reduction": "none"},
    "returns-without-z": {**RETURNS, "reduction": "sum"},
    "accuracy": {"return_token_accuracy": True},
    "mixed": {"softcap": 4.0, "label_smoothing": 0.2, "lse_square_scale": 1e-3},
}
SCALED: dict[str, dict[str, Any]] = {
    "scaling": {"use_token_scaling": True},
    "scaling-none": {"use_token_scaling": True, "reduction": "none", **RETURNS},
    "scaling-z": {"use_token_scaling": True, "lse_square_scale": 1e-2, "return_z_loss": True},
}


def liger_labels(t: SimpleNamespace, asked: dict[str, Any]) -> Tensor:
    best = functional.linear(t.h, t.w, t.b).argmax(-1)
    y = torch.where(torch.arange(N, device=best.device) < 2, best, t.y)  # two predictions are right
    return torch.where(y == -100, asked["ignore_index"], y) if "ignore_index" in asked else y


def told(out: Any) -> dict[str, Tensor]:
    if isinstance(out, Tensor):
        return {"loss": out}
    names = ("loss", "z_loss", "token_accuracy", "predicted_tokens")
    return {name: getattr(out, name) for name in names if getattr(out, name) is not None}


def compare_liger(
    ours: Any, reference: dict[str, Tensor], asked: dict[str, Any], leaves: list[Tensor]
) -> None:
    got = told(ours)
    wanted = {"loss", *(k[len("return_") :] for k in asked if k.startswith("return_"))}
    assert set(got) == wanted
    for name in wanted - {"loss"}:
        assert not got[name].requires_grad
        close([got[name]], [reference[name].detach()])
    close(with_gradients(got["loss"], *leaves), with_gradients(reference["loss"], *leaves))


@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", [*LIGER, *SCALED])
def test_liger_fused_linear(name: str, weighted: bool, device: str) -> None:
    t = inputs(device)
    asked = {**LIGER, **SCALED}[name]
    y, weights = liger_labels(t, asked), t.classes if weighted else None
    with onepass.strict():
        module = liger.LigerFusedLinearCrossEntropyLoss(ce_weight=weights, **asked)
        out = module(t.w, t.h, y, t.b)
    reference = liger_written_out(functional.linear(t.h, t.w, t.b), y, weights, asked)
    compare_liger(out, reference, asked, [t.h, t.w, t.b])


@pytest.mark.parametrize("lazy", [False, True], ids=["logits", "lazy"])
@pytest.mark.parametrize("weighted", [False, True], ids=["even", "weighted"])
@pytest.mark.parametrize("name", LIGER)
def test_liger_cross_entropy(name: str, weighted: bool, lazy: bool, device: str) -> None:
    t = inputs(device)
    asked = LIGER[name]
    y, weights = liger_labels(t, asked), t.classes if weighted else None
    logits = functional.linear(t.h, t.w, t.b)
    before = logits.detach().clone()
    with onepass.strict():
        given = onepass.LazyLogits(t.h, t.w, t.b) if lazy else logits
        out = liger.LigerCrossEntropyLoss(weight=weights, **asked)(given, y)
    compare_liger(out, liger_written_out(logits, y, weights, asked), asked, [t.h, t.w, t.b])
    assert torch.equal(logits, before)


# Liger's kernel calls `.to` on numbers (a cap, sums of class weights) that are plain Python floats
# in the interpreter, which has no such method: those options have the twin above alone.
@pytest.mark.skipif(not INTERPRETING, reason="on a GPU Liger takes GPU tensors: see bench/")
@pytest.mark.parametrize("name", [k for k, v in (LIGER | SCALED).items() if "softcap" not in v])
def test_liger_itself(name: str, device: str) -> None:
    original = pytest.importorskip(
        "liger_kernel.transformers", reason="Liger-Kernel is not installed: its twin is tested"
    )
    t = inputs(device)
    asked = {**LIGER, **SCALED}[name]
    y = liger_labels(t, asked)
    outs = [
        told(package.LigerFusedLinearCrossEntropyLoss(**asked)(t.w, t.h, y, t.b))
        for package in (liger, original)
    ]
    assert set(outs[0]) == set(outs[1])
    for fact in set(outs[0]) - {"loss"}:
        close([outs[0][fact].detach()], [outs[1][fact].detach()])
    close(*(with_gradients(out["loss"], t.h, t.w, t.b) for out in outs))


# ---------------------------------------------------------------- CCE

CCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "shift-true": {"shift": True},
    "shift-2-none": {"shift": 2, "reduction": "none"},
    "softcap": {"softcap": 2.0, "shift": True},
    "ignore-3": {"ignore_index": 3, "shift": 1},
    "no-filter": {"filter_eps": None, "filter_e_grad": False, "filter_c_grad": False},
    "fp32-sums": {"filter_eps": 1e-5, "accum_e_fp32": True, "accum_c_fp32": True},
    "kahan": {"use_kahan": True, "filter_eps": "high", "impl": "cce_kahan_full_c"},
    "compiled": {"impl": "torch_compile"},
}


def cce_inputs(device: str) -> SimpleNamespace:
    t = inputs(device)
    t.e = torch.randn(2, 5, D, device=device).requires_grad_(True)
    t.targets = torch.where(t.y == -100, 3, t.y).view(2, 5)
    t.targets[0, 3] = -100
    return t


def cce_written_out(t: SimpleNamespace, bias: Tensor | None, asked: dict[str, Any]) -> Any:
    shift, cap = int(asked.get("shift", 0)), asked.get("softcap")
    e, y = t.e[:, : t.e.shape[1] - shift], t.targets[:, shift:]
    logits = functional.linear(e, t.w, bias)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    given = {k: asked[k] for k in ("reduction", "ignore_index") if k in asked}
    if "ignore_index" in asked:
        y = torch.where(y == -100, 3, y)
    loss = functional.cross_entropy(logits.flatten(0, 1), y.flatten(), **given)
    lse = logits.logsumexp(-1) * (y != asked.get("ignore_index", -100))
    return (loss.view(y.shape) if loss.dim() else loss), lse


@pytest.mark.parametrize("with_bias", [False, True], ids=["bare", "bias"])
@pytest.mark.parametrize("name", CCE)
def test_cce(name: str, with_bias: bool, impl: str, device: str) -> None:
    t = cce_inputs(device)
    bias, asked = t.b if with_bias else None, CCE[name]
    targets = t.targets
    if "ignore_index" in asked:
        targets = torch.where(targets == -100, 3, targets)
    leaves = [t.e, t.w, *([t.b] if with_bias else [])]
    given = {"impl": impl, **asked}
    expected, expected_lse = cce_written_out(t, bias, asked)
    with onepass.strict():
        loss = cce.linear_cross_entropy(t.e, t.w, targets, bias, **given)
        again, lse = cce.linear_cross_entropy(t.e, t.w, targets, bias, return_lse=True, **given)
    close(with_gradients(loss, *leaves), with_gradients(expected, *leaves))
    # The two lie one pass apart: with the lse the gradient is made in the backward.
    close([again.detach()], [loss.detach()])
    ours = again.sum() + (lse * 0.1).square().sum()
    reference = expected.sum() + (expected_lse * 0.1).square().sum()
    close(with_gradients(ours, *leaves), with_gradients(reference, *leaves))
    close([lse.detach()], [expected_lse.detach()])


def test_cce_casts_the_classifier(device: str) -> None:
    t = cce_inputs(device)
    e = t.e.detach().bfloat16()
    got = cce.linear_cross_entropy(e, t.w, t.targets, t.b)
    assert torch.equal(got, cce.linear_cross_entropy(e, t.w.bfloat16(), t.targets, t.b.bfloat16()))


@pytest.mark.skipif(not INTERPRETING, reason="on a GPU the bench compares with CCE's kernels")
@pytest.mark.parametrize("name", ["plain", "sum", "none", "shift-true", "softcap", "ignore-3"])
def test_cce_itself(name: str, device: str) -> None:
    original = pytest.importorskip(
        "cut_cross_entropy", reason="cut-cross-entropy is not installed: its twin is tested"
    )
    t = cce_inputs(device)
    asked = CCE[name]
    targets = t.targets
    if "ignore_index" in asked:
        targets = torch.where(targets == -100, 3, targets)
    ours = cce.linear_cross_entropy(t.e, t.w, targets, **asked)
    # Its torch implementation, as written: compiling it takes a minute.
    with torch.compiler.set_stance("force_eager"):
        reference = original.linear_cross_entropy(
            t.e, t.w, targets, impl="torch_compile", **{**asked, "shift": bool(asked.get("shift"))}
        )
        close(with_gradients(ours, t.e, t.w), with_gradients(reference, t.e, t.w))


def test_cce_takes_its_enum(device: str) -> None:
    t = cce_inputs(device)
    kind = SimpleNamespace(name="TORCH_COMPILE")
    assert torch.equal(
        cce.linear_cross_entropy(t.e, t.w, t.targets, impl=kind).detach(),
        cce.linear_cross_entropy(t.e, t.w, t.targets, impl="torch").detach(),
    )


# ---------------------------------------------------------------- wrong calls

cut: Any = cce.linear_cross_entropy
fused: Any = liger.LigerFusedLinearCrossEntropyLoss
plain: Any = liger.LigerCrossEntropyLoss
module: Any = onepass.nn.LinearCrossEntropyLoss
Call = Callable[[SimpleNamespace], object]

WRONG: dict[str, tuple[Call, type[Exception], tuple[str, ...]]] = {
    "list": (lambda t: lce([[0.0]], t.w, t.y), TypeError, ("input", "list")),
    "list-head": (lambda t: lce(t.h, [[0.0]], t.y), TypeError, ("linear_weight", "list")),
    "wide-input": (lambda t: lce(t.h[None], t.w, t.y), ValueError, ("input", "(1, 10, 16)")),
    "widths": (lambda t: lce(t.h, t.w[:, :9], t.y), ValueError, ("linear_weight", "(37, 9)")),
    "dtypes": (
        lambda t: lce(t.h, t.w.bfloat16(), t.y),
        ValueError,
        ("linear_weight", "float32", "bfloat16"),
    ),
    "bias": (
        lambda t: lce(t.h, t.w, t.y, linear_bias=t.b[:5]),
        ValueError,
        ("linear_bias", "(5,)"),
    ),
    "ignored-probabilities": (
        lambda t: lce(t.h, t.w, t.q, ignore_index=2),
        ValueError,
        ("ignore_index=2", "probabilities"),
    ),
    "reduction": (lambda t: lce(t.h, t.w, t.y, reduction="avg"), ValueError, ("reduction", "avg")),
    "impl": (lambda t: lce(t.h, t.w, t.y, impl="cce"), ValueError, ("impl", "'cce'")),
    "label": (lambda t: lce(t.h, t.w, t.y + 40), IndexError, ("target", "37")),
    "options": (lambda t: lce(t.h, t.w, t.y, options={}), TypeError, ("options", "dict")),
    "places-unbatched": (
        lambda t: lce(t.h[0], t.heads, t.places[0]),
        ValueError,
        ("input", "(37, 2, 3, 16)"),
    ),
    "places-bias": (
        lambda t: lce(t.h, t.heads, t.places, linear_bias=t.b),
        ValueError,
        ("linear_bias", "(37, 2, 3)", "(37,)"),
    ),
    "places-target": (
        lambda t: lce(t.h, t.heads, t.y),
        ValueError,
        ("target", "(10, 2, 3)", "(10,)"),
    ),
    "module-weight": (
        lambda t: module(D, V, weight=t.classes[:3]),
        ValueError,
        ("weight", "(37,)", "(3,)"),
    ),
    "module-reduction": (lambda t: module(D, V, reduction=""), ValueError, ("reduction",)),
    "liger-smoothing": (lambda t: fused(label_smoothing=2.0), ValueError, ("label_smoothing",)),
    "liger-reduction": (lambda t: plain(reduction="batchmean"), ValueError, ("batchmean",)),
    "liger-softcap": (lambda t: plain(softcap=0.0), ValueError, ("softcap", "above 0")),
    "liger-negative-cap": (lambda t: fused(softcap=-3.0), ValueError, ("softcap", "-3.0")),
    "liger-accum": (
        lambda t: fused(accum_dtype=torch.bfloat16),
        ValueError,
        ("accum_dtype", "bfloat16", "float32"),
    ),
    "liger-swapped": (
        lambda t: fused()(t.h, t.w[:, :9], t.y),
        ValueError,
        ("_input", "lin_weight", "(37, 9)"),
    ),
    "liger-ce-weight": (
        lambda t: fused(ce_weight=t.classes[:3])(t.w, t.h, t.y),
        ValueError,
        ("ce_weight", "(3,)", "37"),
    ),
    "liger-probabilities": (
        lambda t: plain()(t.h @ t.w.T, t.q),
        ValueError,
        ("target", "class indices"),
    ),
    "liger-unknown": (lambda t: fused(chunks=3), TypeError, ("chunks",)),
    "cce-parallel": (
        lambda t: cut(t.h, t.w, t.y, vocab_parallel_options=object()),
        ValueError,
        ("vocab_parallel_options", "gather"),
    ),
    "cce-old-order": (
        lambda t: cut(t.h, t.w, t.y, -100),
        TypeError,
        ("bias", "-100", "ignore_index by name"),
    ),
    "cce-shift": (lambda t: cut(t.h, t.w, t.y, shift=10), ValueError, ("shift", "[0, 10)", "10")),
    "cce-shift-back": (lambda t: cut(t.h, t.w, t.y, shift=-1), ValueError, ("shift", "-1")),
    "cce-shift-text": (lambda t: cut(t.h, t.w, t.y, shift="1"), ValueError, ("shift",)),
    "cce-impl": (lambda t: cut(t.h, t.w, t.y, impl="cuda"), ValueError, ("impl", "cce_exact")),
    "cce-filter": (lambda t: cut(t.h, t.w, t.y, filter_eps="low"), TypeError, ("filter_eps",)),
    "cce-targets": (lambda t: cut(t.h, t.w, t.y[:4]), ValueError, ("targets", "(10,)", "(4,)")),
    "cce-reduction": (lambda t: cut(t.h, t.w, t.y, reduction=None), ValueError, ("reduction",)),
    "cce-softcap": (lambda t: cut(t.h, t.w, t.y, softcap=0), ValueError, ("softcap",)),
}
if Options is not None:
    WRONG |= {
        "options-acc": (
            lambda t: lce(t.h, t.w, t.y, options=Options(acc_dtype=torch.float16)),
            ValueError,
            ("options.acc_dtype", "float16", "float32"),
        ),
        "options-both": (
            lambda t: lce(
                t.h,
                t.w,
                t.y,
                options=Options(chunking_method="aspect_ratio", batch_chunk_size=9),
            ),
            ValueError,
            ("batch_chunk_size", "9", "4"),
        ),
    }


@pytest.mark.parametrize("name", WRONG)
def test_wrong_call_in_one_line(name: str, device: str) -> None:
    call, error, words = WRONG[name]
    with pytest.raises(error) as caught:
        call(inputs(device))
    said = str(caught.value)
    assert said and "\n" not in said
    for word in words:
        assert re.search(re.escape(word), said), f"{word!r} is not in: {said}"


def test_modules_are_attributes_of_the_package() -> None:
    assert {"compat", "integrations", "nn"} <= set(dir(onepass))
    assert onepass.compat.liger is liger and onepass.compat.cce is cce
    assert onepass.integrations.trl.__name__ == "onepass.integrations.trl"
    assert onepass.nn.LinearCrossEntropyLoss.__module__ == "onepass.nn"
