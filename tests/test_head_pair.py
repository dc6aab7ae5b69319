"""head_pair_stats: pair statistics of logits that are never whole, on either side."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import LazyLogits
from onepass.ops import head_pair as module
from onepass.ops.vocab_pair_stats import FACTS

V, D, D_TARGET = 61, 16, 24
PROBS = ("cross_entropy", "lse")


class Pair:
    """A student's and a teacher's parts, lazily or whole."""

    def __init__(
        self,
        device: str,
        *,
        students: tuple[int, ...] = (),
        frozen: bool = False,
        softcap: float | None = None,
        bias: bool = False,
        dtype: torch.dtype = torch.float32,
        rows: int = 6,
        teacher_trains: bool = True,
    ) -> None:
        def normal(*shape: int, trained: bool = True) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device, requires_grad=trained)

        head = not frozen
        self.student = [normal(*students, rows, D), normal(V, D, trained=head)]
        self.teacher = [
            normal(rows, D_TARGET, trained=teacher_trains),
            normal(V, D_TARGET, trained=head and teacher_trains),
        ]
        if bias:
            self.student.append(normal(V, trained=head))
            self.teacher.append(normal(V, trained=head and teacher_trains))
        self.options = {"softcap": softcap, "scale": 0.5 if softcap else 1.0}

    def lazy(self, parts: list[Tensor], max_slab_bytes: int | None = None) -> Tensor:
        return LazyLogits(*parts, **self.options, max_slab_bytes=max_slab_bytes)  # type: ignore[arg-type]

    @property
    def leaves(self) -> list[Tensor]:
        return [t for t in (*self.student, *self.teacher) if t.requires_grad]


def gradients(stats: Any, want: tuple[str, ...], leaves: list[Tensor]) -> list[Any]:
    total = torch.zeros((), device=leaves[0].device, dtype=torch.float64)
    for at, fact in enumerate(want):
        values = getattr(stats, fact).double()
        weights = torch.linspace(-1, 1 + at, values.numel()).to(values).view_as(values)
        total = total + (values * weights).sum()
    return list(torch.autograd.grad(total, leaves, allow_unused=True))


def compare(got: list[Any], expected: list[Any]) -> None:
    for a, b in zip(got, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
            continue
        torch.testing.assert_close(a, b, rtol=2e-5, atol=4e-6 * float(b.detach().abs().max()))


SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "shared": {"students": (3,)},
    "softcap": {"softcap": 4.0},
    "teacher_fixed": {"teacher_trains": False},
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("lazy_sides", ["both", "student", "teacher"])
@pytest.mark.parametrize("want", [("cross_entropy",), FACTS], ids=["ce", "all"])
def test_equals_whole_logits(
    want: tuple[str, ...], lazy_sides: str, shape: str, frozen: bool, device: str
) -> None:
    pair = Pair(device, frozen=frozen, **SHAPES[shape])
    mask = torch.ones(pair.student[0].shape[:-1], dtype=torch.bool, device=device)
    mask[..., 1] = False
    mask.view(-1)[-1] = False  # one student's row, where several share a target
    slab = 2 * 4 * V * (4 if "students" in SHAPES[shape] else 2)  # two rows or four

    def sides(student: bool, teacher: bool) -> tuple[Tensor, Tensor]:
        s, t = pair.lazy(pair.student, slab), pair.lazy(pair.teacher, slab)
        return (
            s if student else s.materialize(),  # type: ignore[attr-defined]
            t if teacher else t.materialize(),  # type: ignore[attr-defined]
        )

    results = []
    for is_lazy in (True, False):
        z, t = sides(is_lazy and lazy_sides != "teacher", is_lazy and lazy_sides != "student")
        with onepass.strict():
            stats = onepass.vocab_pair_stats(z, t, mask=mask, want=want, jsd_beta=0.3, impl="torch")
        results.append([[getattr(stats, f) for f in want], gradients(stats, want, pair.leaves)])
    compare(results[0][0], results[1][0])
    compare(results[0][1], results[1][1])


@pytest.mark.parametrize("students", [(), (3,)], ids=["one", "shared"])
@pytest.mark.parametrize("softcap", [None, 4.0], ids=["plain", "softcap"])
def test_kernels_give_the_same(
    softcap: float | None, students: tuple[int, ...], impl: str, device: str
) -> None:
    pair = Pair(device, students=students, softcap=softcap, rows=3)
    mask = torch.ones(pair.student[0].shape[:-1], dtype=torch.bool, device=device)
    mask.view(-1)[0] = False
    lazy, whole = (
        onepass.vocab_pair_stats(z, t, mask=mask, want=FACTS, impl=impl)
        for z, t in (
            (pair.lazy(pair.student), pair.lazy(pair.teacher)),
            (
                LazyLogits(*pair.student, **pair.options).materialize(),  # type: ignore[arg-type]
                LazyLogits(*pair.teacher, **pair.options).materialize(),  # type: ignore[arg-type]
            ),
        )
    )
    compare(list(lazy), list(whole))
    compare(gradients(lazy, FACTS, pair.leaves), gradients(whole, FACTS, pair.leaves))


def test_probabilities(impl: str, device: str) -> None:
    pair = Pair(device, bias=True)
    probs = torch.randn(6, V, device=device).softmax(-1).requires_grad_(True)
    leaves = [*pair.student, probs]
    lazy, whole = (
        onepass.vocab_pair_stats(z, target_probs=probs, want=PROBS, impl=impl)
        for z in (pair.lazy(pair.student), LazyLogits(*pair.student).materialize())
    )
    compare([lazy.cross_entropy, lazy.lse], [whole.cross_entropy, whole.lse])
    compare(gradients(lazy, PROBS, leaves), gradients(whole, PROBS, leaves))


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The hidden size of every product that makes logits."""
    calls: list[int] = []
    product = module.head_product

    def counted(hidden: Any, *rest: Any) -> Tensor:
        calls.append(hidden[0].shape[-1])
        return product(hidden, *rest)

    monkeypatch.setattr(module, "head_product", counted)
    return calls


def test_one_product_serves_a_teacher_of_many(products: list[int], device: str) -> None:
    """Three students, one teacher, all frozen: a product for each side, none in the backward."""
    pair = Pair(device, students=(3,), frozen=True, teacher_trains=False)
    stats = onepass.vocab_pair_stats(pair.lazy(pair.student), pair.lazy(pair.teacher))
    assert products == [D, D_TARGET]
    gradients(stats, ("cross_entropy",), pair.leaves)
    assert products == [D, D_TARGET]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_loss_foretells_its_gradients(reduction: str, products: list[int], device: str) -> None:
    pair = Pair(device)
    probs = torch.randn(6, V, device=device).softmax(-1)
    mask = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.25], device=device)
    grads = []
    for z in (pair.lazy(pair.student), LazyLogits(*pair.student).materialize()):
        loss = onepass.masked_cross_entropy(z, probs, mask, reduction=reduction)
        grads.append(torch.autograd.grad(3 * loss, pair.student))
    assert products == [D]
    compare(*map(list, grads))


@pytest.mark.parametrize("lazy_sides", ["both", "student", "teacher"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
def test_gradcheck(softcap: float | None, lazy_sides: str) -> None:
    torch.manual_seed(3)
    sizes = ((2, 3, 4), (5, 4), (5,), (3, 2), (5, 2))
    parts = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in sizes]
    mask = torch.tensor([[True, True, False], [True, False, False]])

    def values(h: Tensor, w: Tensor, b: Tensor, h_t: Tensor, w_t: Tensor) -> Any:
        z, t = LazyLogits(h, w, b, softcap=softcap), LazyLogits(h_t, w_t, softcap=softcap)
        stats = onepass.vocab_pair_stats(
            z if lazy_sides != "teacher" else z.materialize(),
            t if lazy_sides != "student" else t.materialize(),
            mask=mask,
            want=FACTS,
        )
        return tuple(stats)

    assert torch.autograd.gradcheck(values, parts)
    assert torch.autograd.gradgradcheck(values, parts)


@pytest.mark.parametrize("students", [(), (2,)], ids=["one", "shared"])
def test_masked_rows_leak_nothing(students: tuple[int, ...], impl: str, device: str) -> None:
    pair = Pair(device, students=students, rows=3)
    mask = torch.ones(pair.student[0].shape[:-1], dtype=torch.bool, device=device)
    mask.view(-1)[1] = False
    with torch.no_grad():
        pair.student[0].view(-1, D)[1] = math.nan
        if not students:
            pair.teacher[0][1] = math.inf
    stats = onepass.vocab_pair_stats(
        pair.lazy(pair.student), pair.lazy(pair.teacher), mask=mask, want=("kl",), impl=impl
    )
    assert stats.kl.view(-1)[1] == 0 and stats.kl.isfinite().all()
    for grad in gradients(stats, ("kl",), pair.leaves):
        assert grad.isfinite().all()


def test_no_row_counts(impl: str, device: str) -> None:
    pair = Pair(device)
    nothing = torch.zeros(6, dtype=torch.bool, device=device)
    z, t = pair.lazy(pair.student), pair.lazy(pair.teacher)
    stats = onepass.vocab_pair_stats(z, t, mask=nothing, want=("kl", "jsd"), impl=impl)
    assert not stats.kl.any() and not stats.jsd.any()
    assert not any(g.any() for g in gradients(stats, ("kl", "jsd"), pair.leaves))


def test_slab_sizes_change_nothing(device: str) -> None:
    pair = Pair(device, students=(2,), frozen=True, teacher_trains=False)
    results = []
    for rows in (1, 4, 6):
        budget = rows * 3 * V * 4
        z, t = pair.lazy(pair.student, budget), pair.lazy(pair.teacher)
        stats = onepass.vocab_pair_stats(z, t, want=("kl",))
        results.append([stats.kl, *gradients(stats, ("kl",), pair.leaves)])
    for other in results[1:]:
        for got, expected in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"max_slab_bytes .* 732 bytes: got 731"):
        onepass.vocab_pair_stats(pair.lazy(pair.student, 731), pair.lazy(pair.teacher))


@pytest.mark.parametrize(
    "call",
    [
        lambda z, t: onepass.vocab_pair_stats(z, t[:-1]),
        lambda z, t: onepass.vocab_pair_stats(z, t[..., :-1]),
    ],
    ids=["rows", "vocabulary"],
)
def test_bad_shapes(call: Callable[..., Any], device: str) -> None:
    pair = Pair(device)
    with pytest.raises(ValueError, match="target_logits must have the shape of logits"):
        call(pair.lazy(pair.student), pair.lazy(pair.teacher))


def test_opcheck(device: str) -> None:
    pair = Pair(device, students=(2,), rows=3)
    h, w = pair.student
    h_t, w_t = pair.teacher
    mask = torch.tensor([True] * 5 + [False], device=device)
    args: Any = (
        [h], [w], None, 0.0, 1.0, [h_t], [w_t], None, 0.0, 1.0, mask, False, "kl", 0.5, 2, True,
        "", [], False, True, "", [], [False], [False], False, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.onepass.head_pair_stats.default, args)


def test_weights_written_to_since_are_seen(device: str) -> None:
    pair = Pair(device)
    z, t = pair.lazy(pair.student), pair.lazy(pair.teacher)
    with torch.no_grad():
        pair.teacher[1].mul_(2)
    with pytest.raises(RuntimeError, match="written to after its forward"):
        onepass.vocab_pair_stats(z, t)


def test_mode_and_compact(products: list[int], device: str) -> None:
    pair = Pair(device, frozen=True, teacher_trains=False)
    probs = torch.randn(6, V, device=device).softmax(-1)
    mask = torch.tensor([True, False, True, True, True, True], device=device)
    results = []
    options: list[dict[str, Any]] = [{}, {"mode": "recompute"}, {"compact": False}]
    for given in options:
        z = LazyLogits(*pair.student, **given)
        stats = onepass.vocab_pair_stats(z, target_probs=probs, mask=mask)
        results.append(gradients(stats, ("cross_entropy",), pair.leaves))
    assert products == [D] * 4  # twice where it is made again
    for other in results[1:]:
        compare(other, results[0])
    with pytest.raises(ValueError, match="mode='ahead' needs a frozen head and one"):
        onepass.vocab_pair_stats(
            LazyLogits(*pair.student, mode="ahead"), target_probs=probs, want=PROBS
        )
