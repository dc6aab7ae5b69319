"""head_stats: the facts and gradients of whole logits, from hidden states and a head."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import onepass
from onepass.ops import head as module
from onepass.ops.head import Head, head_stats
from onepass.ops.vocab_stats import VocabStats
from support.environment import NO_TRITON

SMOOTH = tuple(fact for fact in VocabStats._fields if fact != "argmax")


@dataclass
class Case:
    hidden: list[Tensor]
    weight: list[Tensor]
    bias: Tensor | None
    given: dict[str, Any]
    softcap: float = 0.0
    scale: float = 1.0

    @property
    def head(self) -> Head:
        return Head(tuple(self.hidden), tuple(self.weight), self.bias, self.softcap, self.scale)

    @property
    def leaves(self) -> list[Tensor]:
        """What a gradient is asked for."""
        of_head = [*self.weight, *([] if self.bias is None else [self.bias])]
        return [t for t in (*self.hidden, *of_head) if t.requires_grad]

    def lazy(self, want: Sequence[str], impl: str, max_slab_bytes: int | None = None) -> Any:
        labels, contrast, bag = (
            self.given.get(name) for name in ("labels", "contrast_labels", "bag_weights")
        )
        head = self.head._replace(max_slab_bytes=max_slab_bytes)
        return VocabStats(*head_stats(head, labels, contrast, bag, want, impl)[2:])

    def whole(self, want: Sequence[str], impl: str) -> Any:
        return onepass.vocab_stats(self.head.logits(), want=want, impl=impl, **self.given)


def draw(
    device: str,
    *,
    dtype: torch.dtype = torch.float32,
    sizes: Sequence[int] = (16,),
    vocab_size: int = 61,
    rows: int = 7,
    bias: bool = False,
    frozen: bool = False,
    ignored: Sequence[int] = (),
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Case:
    def normal(*shape: int, trained: bool) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, requires_grad=trained)

    labels = torch.randint(vocab_size, (rows,), device=device)
    labels[list(ignored)] = -100
    contrast = torch.randint(vocab_size, (rows,), device=device)
    facts = torch.float64 if dtype == torch.float64 else torch.float32
    bag = torch.rand(vocab_size, dtype=facts, device=device)
    return Case(
        [normal(rows, size, trained=True) for size in sizes],
        [normal(vocab_size, size, trained=not frozen) for size in sizes],
        normal(vocab_size, trained=not frozen) if bias else None,
        {"labels": labels, "contrast_labels": contrast, "bag_weights": bag},
        softcap,
        scale,
    )


def gradients(stats: Any, facts: Sequence[str], leaves: list[Tensor]) -> list[Tensor]:
    """Of a sum with other weights for every row and fact, the same at every call."""
    total = torch.zeros((), dtype=torch.float64, device=leaves[0].device)
    for at, fact in enumerate(facts):
        values = getattr(stats, fact).double()
        total = total + (values * torch.linspace(-1, 1 + at, len(values)).to(values)).sum()
    return list(torch.autograd.grad(total, leaves))


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "two_terms": {"sizes": (16, 3), "bias": True},
    "softcap": {"softcap": 3.0, "bias": True},
    "scaled": {"scale": 0.25},
    "softcap_scaled": {"softcap": 2.0, "scale": 3.0, "sizes": (16, 4)},
    "ignored": {"ignored": (0, 3, 6), "bias": True},
    "all_ignored": {"ignored": range(7)},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("want", [("logp",), ("entropy",), SMOOTH], ids=["logp", "entropy", "all"])
def test_equals_whole_logits(
    want: Sequence[str], shape: str, frozen: bool, impl: str, device: str
) -> None:
    case = draw(device, frozen=frozen, **SHAPES[shape])
    slab = 2 * 61 * 4 if impl == "torch" else None  # several slabs of two rows
    lazy, whole = case.lazy(want, impl, slab), case.whole(want, impl)
    for fact in want:
        torch.testing.assert_close(getattr(lazy, fact), getattr(whole, fact), msg=fact)
    for got, expected in zip(
        gradients(lazy, want, case.leaves), gradients(whole, want, case.leaves), strict=True
    ):
        scale = float(expected.abs().max())  # sums over rows and columns in another order
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * scale)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_slab_sizes_change_nothing(frozen: bool, device: str) -> None:
    """To the last bit for facts and hidden gradients; dW is summed slab by slab."""
    case = draw(device, frozen=frozen, rows=12, ignored=(4, 7))
    results = []
    for rows in (2, 5, 12):  # never a slab of one row, which libraries multiply in another way
        stats = case.lazy(("logp",), "torch", rows * 61 * 4)
        logp = stats.logp
        d_hidden, *d_head = gradients(stats, ("logp",), case.leaves)
        results.append((logp, d_hidden, d_head))
    for logp, d_hidden, d_head in results[1:]:
        assert torch.equal(logp, results[0][0])
        assert torch.equal(d_hidden, results[0][1])
        for got, expected in zip(d_head, results[0][2], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_rows_may_stay_as_zeros(frozen: bool, impl: str, device: str) -> None:
    """compact=False: no wait for the device, the same numbers, and no leak of NaN."""
    case = draw(device, ignored=(1, 5), bias=True, frozen=frozen)
    with torch.no_grad():
        case.hidden[0][1] = math.nan
    results = []
    for compact in (False, True):
        head = case.head._replace(compact=compact)
        outputs = head_stats(head, case.given["labels"], None, None, ("logp",), impl)
        logp = VocabStats(*outputs[2:]).logp
        results.append([logp, *torch.autograd.grad(logp.sum(), case.leaves)])
    for blind, compacted in zip(*results, strict=True):
        torch.testing.assert_close(blind, compacted, rtol=1e-6, atol=1e-6)


def test_mode_overrides_the_choice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted_products(monkeypatch)
    case, results = draw(device, frozen=True), []
    for mode, products in (("ahead", 1), ("recompute", 2)):
        calls.clear()
        head = case.head._replace(mode=mode)
        outputs = head_stats(head, case.given["labels"], None, None, ("logp",), "torch")
        results.append(torch.autograd.grad(outputs[2 + SMOOTH.index("logp")].sum(), case.leaves))
        assert len(calls) == products
    torch.testing.assert_close(*results)
    trained = draw(device).head._replace(mode="ahead")
    with pytest.raises(ValueError, match="mode='ahead' needs a frozen head .* of a trained head"):
        head_stats(trained, case.given["labels"], None, None, ("logp",), "torch")
    with pytest.raises(ValueError, match="mode must be one of auto, ahead, recompute: got 'fast'"):
        onepass.LazyLogits(case.hidden[0], case.weight[0], mode="fast")


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_gradcheck(frozen: bool, softcap: float) -> None:
    case = draw("cpu", dtype=torch.float64, frozen=frozen, softcap=softcap, bias=True, ignored=(2,))
    small = draw("cpu", dtype=torch.float64, vocab_size=5, rows=3, sizes=(4,), bias=True)
    case.hidden, case.weight = small.hidden, small.weight
    case.bias = small.bias
    case.given = {"labels": torch.tensor([1, -100, 4])}
    assert case.bias is not None
    for t in (*case.weight, case.bias):
        t.requires_grad_(not frozen)

    def values(*_: Tensor) -> tuple[Tensor, ...]:
        stats = case.lazy(("logp", "entropy"), "torch")
        only = case.lazy(("logp",), "torch")
        return stats.logp, stats.entropy, only.logp

    assert torch.autograd.gradcheck(values, case.leaves)
    assert torch.autograd.gradgradcheck(values, case.leaves)


def counted_products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows with every slab of logits that is made."""
    calls: list[str] = []
    product = module.Slabs.product

    def counted(*args: Any) -> Tensor:
        calls.append("product")
        return product(*args)

    monkeypatch.setattr(module.Slabs, "product", counted)
    return calls


def test_a_frozen_head_is_multiplied_twice(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for the logits, once for the gradient, both in the forward; the backward only scales."""
    calls = counted_products(monkeypatch)
    case = draw(device, frozen=True)
    stats = case.lazy(("logp",), "torch")
    assert calls == ["product"]
    gradients(stats, ("logp",), case.leaves)
    assert calls == ["product"]


@pytest.mark.parametrize("of", [("logp",), ("logp", "entropy"), ("entropy",)], ids=",".join)
def test_facts_that_are_only_looked_at_cost_no_pass(
    of: tuple[str, ...], impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradient_of a frozen head's gradient is made ahead though more is wanted; a gradient
    that was not announced comes all the same, and right."""
    calls = counted_products(monkeypatch)
    case = draw(device, frozen=True, ignored=(2,))
    want = ("logp", "entropy", "logit_sum", "argmax")
    logits = onepass.LazyLogits(case.hidden[0], case.weight[0])
    labels = case.given["labels"]
    stats = onepass.vocab_stats(logits, labels, want=want, gradient_of=("logp",), impl=impl)
    got = gradients(stats, of, case.leaves)
    assert len(calls) == (1 if of == ("logp",) else 2)
    whole = onepass.vocab_stats(case.head.logits(), labels, want=want, impl=impl)
    for ours, expected in zip(got, gradients(whole, of, case.leaves), strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-6 * scale)


def test_masked_rows_leak_nothing(impl: str, device: str) -> None:
    case = draw(device, ignored=(1, 5))
    with torch.no_grad():
        case.hidden[0][1] = math.nan
        case.hidden[0][5] = math.inf
    stats = case.lazy(("logp", "lse"), impl)
    grads = gradients(stats, ("logp", "lse"), case.leaves)
    assert not stats.logp[[1, 5]].any() and not stats.lse[[1, 5]].any()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[0][[1, 5]].any()


@pytest.mark.parametrize("name", ["labels", "contrast_labels"])
@pytest.mark.parametrize("label", [61, -1])
def test_labels_outside_the_vocabulary_are_named(
    label: int, name: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONEPASS_STRICT", "1")
    case = draw(device)
    case.given[name][2] = label
    with pytest.raises(IndexError, match=rf"^{name}\[2\] is {label}: wanted 0 <= label < 61"):
        case.lazy(("logp", "contrast_logit"), impl)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_while_a_graph_is_captured_no_row_is_left_out(
    frozen: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor may one that does not count leak NaN into the head's gradient."""
    if NO_TRITON:
        pytest.skip(NO_TRITON)
    case = draw(device, ignored=(1, 5), bias=True, frozen=frozen)
    with torch.no_grad():
        case.hidden[0][1] = math.nan
    results = []
    for in_capture in (False, True):
        monkeypatch.setattr(module, "capturing", lambda t, answer=in_capture: answer)
        stats = case.lazy(("logp",), "triton")
        results.append([stats.logp, *gradients(stats, ("logp",), case.leaves)])
    for compacted, blind in zip(*results, strict=True):
        torch.testing.assert_close(blind, compacted, rtol=1e-6, atol=1e-6)


def test_a_slab_must_hold_a_row(device: str) -> None:
    case = draw(device)
    with pytest.raises(ValueError, match=r"max_slab_bytes .* 244 bytes: got 243"):
        case.lazy(("lse",), "torch", 243)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("ahead", ["", "logp"])
def test_opcheck(ahead: str, frozen: bool, device: str) -> None:
    case = draw(device, frozen=frozen, bias=True, ignored=(2,))
    shares = [torch.ones(7, device=device)] if ahead and not frozen else []
    need, of_head = [bool(ahead)], [bool(ahead) and not frozen]
    args: Any = (
        case.hidden, case.weight, case.bias, 0.0, 1.0, case.given["labels"], None, None, "logp",
        4, True, ahead, shares, False, True, "", [], need, of_head, of_head[0], False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.onepass.head_stats.default, args)


@pytest.mark.parametrize("shape", ["bias", "two_terms", "softcap", "ignored", "all_ignored"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_foretold_gradients(
    frozen: bool, shape: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss that knows its rows' weights has both gradients made in the forward: one product for
    the logits in all, and the same gradients, whatever the loss is multiplied by later."""
    case = draw(device, frozen=frozen, **SHAPES[shape])
    weights = torch.linspace(0.5, 2, 7, device=device)
    shares = {"logp": -weights, "logp_sum": 0.1 * weights}
    whole = case.whole(("logp", "logp_sum"), impl)
    calls = counted_products(monkeypatch)
    stats = VocabStats(
        *head_stats(
            case.head, case.given["labels"], None, case.given["bag_weights"], ("logp", "logp_sum"),
            impl, shares,
        )[2:]
    )  # fmt: skip
    grads = []
    for facts in (stats, whole):
        loss = (weights * (0.1 * facts.logp_sum - facts.logp)).sum() * 3.0
        grads.append(torch.autograd.grad(loss, case.leaves))
    assert calls == ["product"] * (0 if shape == "all_ignored" else 1)
    for got, expected in zip(*grads, strict=True):
        size = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * size)


def test_a_wrong_forecast_is_seen(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "values_checked", lambda tensor: True)
    case = draw(device)
    shares = {"logp": torch.ones(7, device=device)}
    stats = head_stats(case.head, case.given["labels"], None, None, ("logp",), "torch", shares)
    logp = VocabStats(*stats[2:]).logp
    with pytest.raises(RuntimeError, match="foretold its upstream gradients"):
        (logp * torch.arange(7, device=device)).sum().backward()


def float64_of(case: Case) -> Case:
    """The same numbers, exactly, with gradients of their own."""

    def wide(t: Tensor) -> Tensor:
        return t.detach().double().requires_grad_(t.requires_grad)

    bias = None if case.bias is None else wide(case.bias)
    given = {**case.given, "bag_weights": case.given["bag_weights"].double()}
    return Case(
        [wide(t) for t in case.hidden],
        [wide(t) for t in case.weight],
        bias,
        given,
        case.softcap,
        case.scale,
    )


def unfused(case: Case, want: Sequence[str]) -> Any:
    """As code does it without this package: logits in the dtype given, upcast, then the cap."""
    z = functional.linear(case.hidden[0], case.weight[0], case.bias)
    z = z.to(torch.promote_types(z.dtype, torch.float32)) * case.scale
    if case.softcap:
        z = case.softcap * torch.tanh(z / case.softcap)
    logp, labels = z.log_softmax(-1), case.given["labels"]
    facts = {
        "logp": logp.gather(-1, labels[:, None]).squeeze(-1),
        "entropy": -(logp.exp() * logp).sum(-1),
    }
    return SimpleNamespace(**{fact: facts[fact] for fact in want})


@pytest.mark.parametrize("shape", ["plain", "bias", "softcap"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_errors_are_no_larger_than_unfused(
    dtype: torch.dtype, frozen: bool, shape: str, impl: str, device: str
) -> None:
    """A bias or a cap costs no rounding of its own; root mean square over all, against float64."""
    want = ("logp", "entropy")
    ours: list[list[float]] = []
    theirs: list[list[float]] = []
    rows, draws = (8, 2) if impl == "triton" and device == "cpu" else (32, 4)  # interpreted: slow
    for _ in range(draws):
        case = draw(device, dtype=dtype, frozen=frozen, rows=rows, **SHAPES[shape])
        exact = float64_of(case)
        truth = unfused(exact, want)
        truth = [truth.logp, truth.entropy, *gradients(truth, want, exact.leaves)]
        for stats, errors in ((case.lazy(want, impl), ours), (unfused(case, want), theirs)):
            found = [stats.logp, stats.entropy, *gradients(stats, want, case.leaves)]
            errors.append(
                [
                    float(((a.double() - b).norm() / b.norm()).detach())
                    for a, b in zip(found, truth, strict=True)
                ]
            )
    for at, (own, other) in enumerate(
        zip(torch.tensor(ours).mean(0), torch.tensor(theirs).mean(0), strict=True)
    ):
        assert own <= 1.05 * other, at


def test_float16_gradients_wait_for_the_loss_scale(device: str) -> None:
    """A gradient made before the scale of the loss is known would be rounded to float16's zero."""
    case = draw(device, dtype=torch.float16, rows=16, vocab_size=257)
    exact = float64_of(case)
    grads = []
    for each, scale in ((case, 2.0**15), (exact, 2.0**15)):
        hidden, weight = each.hidden[0], each.weight[0]
        lazy = onepass.LazyLogits(hidden, weight, softcap=0.5)
        loss = onepass.cross_entropy(lazy, case.given["labels"])
        grads.append(torch.autograd.grad(loss * scale, [hidden, weight]))
    for got, expected in zip(*grads, strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        assert error <= 2.0**-10


@pytest.mark.parametrize("upstream", [1.0, 0.25, 1024.0])
def test_a_power_of_two_upstream_costs_no_rounding(upstream: float, device: str) -> None:
    """What the mean divides by is in the gradients that are made ahead."""
    case = draw(device, dtype=torch.bfloat16, rows=7, ignored=(2,))
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    loss = onepass.cross_entropy(lazy, case.given["labels"])
    plain = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    scaled = torch.autograd.grad(loss * upstream, case.leaves)
    assert all(torch.equal(a * upstream, b) for a, b in zip(plain, scaled, strict=True))


def test_no_rows_at_all(impl: str, device: str) -> None:
    case = draw(device, rows=0)
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    loss = onepass.cross_entropy(lazy, case.given["labels"], impl=impl)
    assert loss == 0
    grads = torch.autograd.grad(loss, case.leaves)
    assert not any(grad.any() for grad in grads)


def test_a_term_that_is_frozen_costs_no_product(device: str) -> None:
    """LoRA on a frozen head: gradients of its two small matrices, none of the size of the head."""
    case = draw(device, sizes=(16, 3), rows=9)
    case.weight[0].requires_grad_(False)
    first, second = (onepass.LazyLogits(case.hidden[k], case.weight[k]) for k in (0, 1))
    lazy = first + second
    made = module.Gradients(
        case.hidden, case.weight, None, module.Need.of(case.hidden, case.weight, None)
    )
    assert [tuple(t.shape) for t in made.all] == [(9, 16), (9, 3), (61, 3)]
    labels = case.given["labels"]
    for loss, whole in (
        (onepass.cross_entropy(lazy, labels), functional.cross_entropy(case.head.logits(), labels)),
        (
            onepass.vocab_stats(lazy, labels, want=("logp", "entropy")).logp.square().sum(),
            case.head.logits().log_softmax(-1).gather(-1, labels[:, None]).square().sum(),
        ),
    ):
        got = torch.autograd.grad(loss, case.leaves)
        for a, b in zip(got, torch.autograd.grad(whole, case.leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_what_comes_to_a_row_that_does_not_count_is_nothing(trained: bool, device: str) -> None:
    """sqrt at 0 sends an infinite gradient, times 0, to the rows that a mask leaves out."""
    case = draw(device, frozen=not trained, ignored=(0, 4))
    labels = case.given["labels"]
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    shares = {"logp": torch.ones(7, device=device)} if trained else None
    logp = onepass.vocab_stats(lazy, labels, want=("logp",), shares=shares).logp
    upstream = torch.full_like(logp, 2.0).where(labels != -100, math.nan)
    for grad in torch.autograd.grad(logp, case.leaves, upstream):
        assert grad.isfinite().all()


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_shares_of_any_size(size: float, device: str) -> None:
    case = draw(device)
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    mask = torch.linspace(0.5, 2, 7, device=device) * size
    loss = onepass.masked_cross_entropy(lazy, case.given["labels"], mask, reduction="sum")
    whole = onepass.masked_cross_entropy(
        case.head.logits(), case.given["labels"], mask, reduction="sum"
    )
    got = torch.autograd.grad(loss, case.leaves)
    for a, b in zip(got, torch.autograd.grad(whole, case.leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * float(b.abs().max()))


def test_an_upstream_near_a_power_of_two_is_not_one(device: str) -> None:
    case = draw(device, dtype=torch.float64)
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    loss = onepass.cross_entropy(lazy, case.given["labels"])
    plain = torch.autograd.grad(loss, case.leaves, retain_graph=True)
    near = torch.autograd.grad(loss * (1 + 9e-7), case.leaves)
    for a, b in zip(near, plain, strict=True):
        torch.testing.assert_close(a, b * (1 + 9e-7), rtol=1e-13, atol=0)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_no_rows_twice(frozen: bool, device: str) -> None:
    case = draw(device, rows=0, frozen=frozen)
    lazy = onepass.LazyLogits(case.hidden[0], case.weight[0])
    loss = onepass.cross_entropy(lazy, case.given["labels"], reduction="sum")
    for _ in range(2):
        loss.backward(retain_graph=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_cast_to_float64(dtype: torch.dtype, device: str) -> None:
    """Facts and gradients are made in the hidden states' width, whatever the logits are cast to."""
    case = draw(device, dtype=dtype)
    labels, (hidden, weight) = case.given["labels"], (case.hidden[0], case.weight[0])
    lazy: Any = onepass.LazyLogits(hidden, weight)
    loss = functional.cross_entropy(lazy.double(), labels)
    masked = onepass.masked_cross_entropy(lazy.double(), labels, label_smoothing=0.1)
    probs = torch.rand(7, 61, dtype=torch.float64, device=device)
    soft = onepass.masked_cross_entropy(lazy.double(), probs)
    assert loss.dtype == torch.float64
    whole = (hidden @ weight.T).double()
    expected = functional.cross_entropy(whole, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    got = torch.autograd.grad(loss, [hidden, weight])
    for a, b in zip(got, torch.autograd.grad(expected, [hidden, weight]), strict=True):
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max()))
    for other in (masked, soft):
        assert all(g.isfinite().all() for g in torch.autograd.grad(other, [hidden, weight]))
