"""gaussian_stats and cloak against fp64 and plain-Python Philox: values, gradients, masks, memory.

Errors are in u (2^-24 in fp32) of what one rounding of each term would move. Unfused torch is the
measure: 3 times its error per row above 8 u, 5 % more than its error pooled over many rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops import gaussian as module
from onepass.ops._philox import Normals
from support.environment import DEVICE, NO_INTERPRETER
from support.guard import count_bytes, guard
from support.pair_truth import laid_out
from support.truth import Truth, error_in_u, worst_error

cloak: Any = onepass.cloak  # the tests unpack lists of its arguments
STATS = onepass.GaussianStats._fields
SIDES = ("x", "mean", "location", "std")
FACTOR, FLOOR = 3.0, 8.0  # torch in another summation order stays within these

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LOW = (FP32, BF16, FP16)

interpreted = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)

Parts = dict[str, Tensor]


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


# ---------------------------------------------------------------- helpers


def draw(shape: Sequence[int], dtype: torch.dtype, device: str) -> Parts:
    """Rows, means, locations and standard deviations of this shape."""
    wide = FP64 if dtype == FP64 else FP32
    made = {name: torch.randn(*shape, dtype=wide) for name in SIDES}
    made["std"] = 0.2 + made["std"].abs()
    return {name: values.to(dtype).to(device) for name, values in made.items()}


def leaves_of(parts: Parts) -> Parts:
    return {name: part.detach().requires_grad_() for name, part in parts.items()}


def call(parts: Parts, mask: Tensor | None = None, **options: Any) -> onepass.GaussianStats:
    return onepass.gaussian_stats(
        parts.get("x"),
        parts.get("mean"),
        parts["std"],
        mask,
        location=parts.get("location"),
        **options,
    )


def marks(mask: Tensor | None, parts: Parts, rank: int) -> Tensor:
    """The mask as bool that broadcasts to the features."""
    if mask is None:
        return torch.ones((), dtype=torch.bool, device=parts["std"].device)
    return (mask if mask.dim() == rank else mask[..., None]) != 0


def unfused(parts: Parts, mask: Tensor | None = None) -> dict[str, Tensor]:
    """As anyone would write it, on rows that go up to fp32 first."""
    rank = max(part.dim() for part in parts.values())
    keep = marks(mask, parts, rank)
    wide = FP64 if any(part.dtype == FP64 for part in parts.values()) else FP32
    up = {name: part.to(wide) for name, part in parts.items()}
    std = torch.where(keep, up["std"], 1.0)
    found = {"log_det": torch.where(keep, std.log(), 0.0)}
    if "x" in up:
        d = up["x"]
        for name in ("location", "mean"):
            d = d - up[name] if name in up else d
        found["mahalanobis"] = (torch.where(keep, d, 0.0) / std).square()
    lead = torch.broadcast_shapes(*(term.shape for term in found.values()))
    return {name: found[name].expand(lead).sum(-1) for name in STATS if name in found}


def truths(parts: Parts, mask: Tensor | None = None) -> dict[str, Truth]:
    """Both facts in fp64, with what one rounding of each input and term would move."""
    exact = {name: part.detach().cpu().double() for name, part in parts.items()}
    mask = None if mask is None else mask.cpu()
    values = unfused(exact, mask)
    keep = marks(mask, exact, max(part.dim() for part in exact.values()))
    s = torch.where(keep, exact["std"], 1.0)
    size = sum(torch.where(keep, exact[n], 0.0).abs() for n in SIDES[:3] if n in exact)
    terms = {"log_det": torch.where(keep, s.log().abs() + 1e-3, 0.0)}
    if "x" in exact:
        d = exact["x"] - exact.get("location", 0.0) - exact.get("mean", 0.0)
        z = torch.where(keep, d, 0.0) / s
        terms["mahalanobis"] = z.square() + 2 * z.abs() * size / s
    return {
        name: Truth(value, terms[name].sum(-1).expand(value.shape))
        for name, value in values.items()
    }


def gradient_truths(
    parts: Parts, upstream: dict[str, Tensor], mask: Tensor | None = None
) -> dict[str, Truth]:
    """Differentiated by hand, in fp64."""
    exact = {name: part.detach().cpu().double() for name, part in parts.items()}
    mask = None if mask is None else mask.cpu()
    keep = marks(mask, exact, max(part.dim() for part in exact.values()))
    up = {name: g.detach().cpu().double()[..., None] for name, g in upstream.items()}
    nothing = torch.zeros(())
    on_distance, on_log = up.get("mahalanobis", nothing), up.get("log_det", nothing)
    s = torch.where(keep, exact["std"], 1.0)
    size = sum(torch.where(keep, exact[n], 0.0).abs() for n in SIDES[:3] if n in exact)
    x = exact.get("x", torch.zeros_like(s))
    d = torch.where(keep, x - exact.get("location", 0.0) - exact.get("mean", 0.0), 0.0)
    pull = 2 * on_distance * d / s.square()
    scale = 2 * on_distance.abs() * size / s.square()
    slopes = {name: (pull if name == "x" else -pull, scale) for name in SIDES[:3]}
    slopes["std"] = (
        -pull * d / s + on_log / s,
        2 * scale * d.abs() / s + (on_log / s).abs(),
    )
    return {
        name: Truth(
            *(
                torch.where(keep, part, 0.0)
                .expand(torch.broadcast_shapes(part.shape, keep.shape))
                .sum_to_size(exact[name].shape)
                for part in slopes[name]
            )
        )
        for name in exact
    }


def check(got: Tensor, want: Truth, usual: Tensor | None, what: str) -> None:
    """Within 8 u of what a rounding moves, or 3 times as far off as unfused torch."""
    error = worst_error(got.cpu(), want)
    theirs = 0.0 if usual is None else worst_error(usual.cpu(), want)
    bar = max(FLOOR, FACTOR * theirs) if math.isfinite(theirs) else FLOOR
    assert error <= bar, f"{what}: {error:.3g} u, unfused torch {theirs:.3g} u"


def upstream_for(stats: onepass.GaussianStats) -> dict[str, Tensor]:
    return {
        name: torch.randn(fact.shape, dtype=fact.dtype).to(fact.device)
        for name, fact in stats._asdict().items()
        if fact is not None
    }


def gradients(
    stats: onepass.GaussianStats, leaves: Parts, upstream: dict[str, Tensor], **options: Any
) -> Parts:
    outputs = [getattr(stats, name) for name in upstream]
    found = torch.autograd.grad(outputs, list(leaves.values()), list(upstream.values()), **options)
    return dict(zip(leaves, found, strict=True))


def check_everything(parts: Parts, impl: str, mask: Tensor | None = None) -> None:
    """Both facts and the gradient of a random mix of them to all sides; inputs left alone."""
    leaves = leaves_of(parts)
    before = [part.detach().clone() for part in leaves.values()]
    stats = call(leaves, mask, impl=impl)
    usual_leaves = leaves_of(parts)
    usual = unfused(usual_leaves, mask)
    for name, want in truths(parts, mask).items():
        got = getattr(stats, name)
        assert got.dtype == (FP64 if parts["std"].dtype == FP64 else FP32), name
        check(got, want, usual[name], name)
    upstream = upstream_for(stats)
    got = gradients(stats, leaves, upstream)
    theirs = torch.autograd.grad(
        [usual[name] for name in upstream], list(usual_leaves.values()), list(upstream.values())
    )
    wanted = gradient_truths(parts, upstream, mask)
    for (name, grad), other in zip(got.items(), theirs, strict=True):
        assert grad.dtype == parts[name].dtype and grad.shape == parts[name].shape
        check(grad, wanted[name], other, f"d{name}")
    for part, values in zip(leaves.values(), before, strict=True):
        assert same_bits(part.detach(), values)


def same_bits(a: Any, b: Any) -> bool:
    """Equal in every bit but a NaN's payload; tuples field by field."""
    if isinstance(a, (tuple, list)):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
        and bool((a.signbit() == b.signbit())[~a.isnan()].all())
    )


# ---------------------------------------------------------------- values and gradients


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("hidden_size", [1, 7, 128, 1000, 2049], ids=lambda d: f"D{d}")
def test_both_facts_and_a_mix_of_gradients(
    impl: str, hidden_size: int, dtype: torch.dtype, device: str
) -> None:
    check_everything(draw((3, hidden_size), dtype, device), impl)


@pytest.mark.parametrize("shape", [(5,), (0, 8), (2, 0, 8), (1, 1), (2, 3, 40), (2, 1, 2, 40)])
def test_shapes(impl: str, shape: tuple[int, ...], device: str) -> None:
    check_everything(draw(shape, FP32, device), impl)


def test_float64_is_calculated_in_float64(device: str) -> None:
    check_everything(draw((2, 3, 333), FP64, device), "torch")


@pytest.mark.parametrize("left_out", [("location",), ("mean",), ("mean", "location")])
def test_without_mean_or_location(impl: str, left_out: tuple[str, ...], device: str) -> None:
    parts = draw((3, 67), FP32, device)
    check_everything({n: part for n, part in parts.items() if n not in left_out}, impl)


@pytest.mark.parametrize("name", STATS)
def test_each_fact_alone(impl: str, name: str, device: str) -> None:
    """The other is None; the same bits as together, gradients too."""
    leaves = leaves_of(draw((3, 131), BF16, device))
    both = call(leaves, impl=impl)
    one = call(leaves, want=name, impl=impl)
    assert [fact is None for fact in one] == [field != name for field in STATS]
    assert same_bits(getattr(one, name), getattr(both, name))
    upstream = {name: torch.randn(3).to(device)}
    got = [
        torch.autograd.grad(
            getattr(stats, name), list(leaves.values()), upstream[name], allow_unused=True
        )
        for stats in (both, one)
    ]
    for together, alone in zip(*got, strict=True):
        assert (together is None) == (alone is None)
        assert together is None or same_bits(together, alone)
    assert (got[1][0] is None) == (name == "log_det")


def test_a_log_determinant_needs_nothing_but_std(impl: str, device: str) -> None:
    parts = draw((3, 33), FP32, device)
    stats = onepass.gaussian_stats(None, None, parts["std"], want=("log_det",), impl=impl)
    assert stats.mahalanobis is None
    check(stats.log_det, truths(parts)["log_det"], None, "log_det")
    unread = torch.full_like(parts["x"], math.nan)
    again = onepass.gaussian_stats(unread, unread, parts["std"], want="log_det", impl=impl)
    assert same_bits(stats.log_det, again.log_det)


def test_mixed_dtypes(impl: str, device: str) -> None:
    """bf16 embeddings with the means and deviations of a transform that is kept in fp32."""
    parts = draw((3, 67), FP32, device)
    parts["x"], parts["location"] = parts["x"].bfloat16(), parts["location"].bfloat16()
    check_everything(parts, impl)


# ---------------------------------------------------------------- broadcasting


def pairs(dtype: torch.dtype, device: str, a: int = 2, m: int = 3, d: int = 37) -> Parts:
    """Every one of `a` sequences against every one of `m` components."""
    parts = draw((m, 2, d), dtype, device)
    x = torch.randn(a, 2, d).to(dtype).to(device)
    return {"x": x[:, None], **{n: parts[n][None] for n in ("mean", "location", "std")}}


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_every_sequence_with_every_component(impl: str, dtype: torch.dtype, device: str) -> None:
    parts = pairs(dtype, device)
    assert call(parts, impl=impl).mahalanobis.shape == (2, 3, 2)
    check_everything(parts, impl)
    for mask in (torch.rand(2, 1, 2) < 0.5, torch.rand(1, 3, 2, 37) < 0.5):
        check_everything(parts, impl, mask.to(device))


@pytest.mark.parametrize(
    "shapes", [((4, 3, 9), (9,), (3, 9), (1, 3, 9)), ((9,), (2, 9), (2, 9), (9,))]
)
def test_fewer_dimensions(impl: str, shapes: Sequence[tuple[int, ...]], device: str) -> None:
    made = {n: draw(shape, FP32, device)[n] for n, shape in zip(SIDES, shapes, strict=True)}
    check_everything(made, impl)


def test_more_ways_to_broadcast_than_a_kernel_knows(impl: str, device: str) -> None:
    shapes = ((2, 1, 2, 1, 9), (1, 2, 1, 2, 9), (2, 1, 2, 1, 9), (1, 2, 1, 2, 9))
    made = {n: draw(shape, FP32, device)[n] for n, shape in zip(SIDES, shapes, strict=True)}
    check_everything(made, impl)


def test_an_empty_side_of_a_broadcast(impl: str, device: str) -> None:
    """Sums over no rows: gradients of 0, not what lay in memory."""
    leaves = leaves_of(pairs(FP32, device, a=0))
    stats = call(leaves, impl=impl)
    assert stats.mahalanobis.shape == (0, 3, 2)
    for grad in gradients(stats, leaves, upstream_for(stats)).values():
        assert not grad.any()


def test_expanded_views(impl: str, device: str) -> None:
    """Stride 0, within a row too, and a gradient summed over the copies."""
    parts = draw((3, 67), FP32, device)
    one, all_alike = (torch.tensor(v, device=device).requires_grad_() for v in ([0.3], 1.7))
    parts["mean"] = one.expand(67)
    parts["std"] = all_alike.expand(3, 67)
    leaves = {"x": parts["x"].detach().requires_grad_(), **{n: parts[n] for n in SIDES[1:]}}
    stats = call(leaves, impl=impl)
    upstream = upstream_for(stats)
    found = torch.autograd.grad(
        [stats.mahalanobis, stats.log_det], [one, all_alike], list(upstream.values())
    )
    detached = {n: part.detach().contiguous() for n, part in leaves.items()}
    want = gradient_truths(detached, upstream)
    for grad, truth in zip(found, (want["mean"], want["std"]), strict=True):
        check(
            grad.reshape(()), Truth(truth.value.sum(), truth.scale.sum()), None, "of an expansion"
        )


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["padded", "offset", "odd", "sliced", "strided", "transposed"])
def test_layouts(impl: str, layout: str, device: str) -> None:
    parts = draw((2, 2, 67), LOW[len(layout) % 3], device)
    for name in SIDES[::2]:
        parts[name] = laid_out(parts[name], layout)
    check_everything(parts, impl)


@interpreted
def test_offsets_beyond_int32(tmp_path: Path) -> None:
    """Rows 2^30 elements apart, over a file of a few pages: int32 offsets would wrap at row 2."""
    stride, n, hidden_size = 2**30 + 8, 3, 100
    parts = draw((n, hidden_size), BF16, "cpu")
    for name in SIDES:
        size = (n - 1) * stride + hidden_size
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=BF16)
        parts[name] = file.as_strided((n, hidden_size), (stride, 1)).copy_(parts[name])
    check_everything(parts, "triton")
    seed = torch.tensor(3)
    rows = (parts["x"], parts["mean"], parts["std"])
    got = cloak(*rows, seed=seed, impl="triton")
    assert torch.allclose(got, cloak(*rows, seed=seed, impl="torch"), rtol=0.02, atol=0.02)


# ---------------------------------------------------------------- masks


def masks(kind: str, features: bool, device: str) -> Tensor:
    shape = (2, 3, 67) if features else (2, 3)
    mask = {"some": torch.rand(shape) < 0.5, "all": torch.ones(shape), "none": torch.zeros(shape)}
    return (mask[kind] != 0).to(device)


@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize("features", [False, True], ids=["rows", "features"])
def test_what_is_masked_is_zero_and_never_leaks(
    impl: str, kind: str, features: bool, device: str
) -> None:
    """Neither NaN nor a deviation of 0 nor an upstream NaN reaches anything from there."""
    parts, mask = draw((2, 3, 67), FP32, device), masks(kind, features, device)
    hidden = ~(mask if features else mask[..., None].expand(2, 3, 67))
    clean = {name: part.clone() for name, part in parts.items()}
    for name in SIDES:
        parts[name][hidden] = 0.0 if name == "std" else math.nan
        clean[name][hidden] = 1.0 if name == "std" else 0.0
    parts["std"].view(-1)[::2][hidden.view(-1)[::2]] = math.nan
    leaves = leaves_of(parts)
    stats = call(leaves, mask, impl=impl)
    for name, want in truths(clean, mask).items():
        check(getattr(stats, name), want, None, name)
    upstream = upstream_for(stats)
    wanted = gradient_truths(clean, upstream, mask)
    if not features:
        for name, up in upstream.items():
            upstream[name] = torch.where(mask, up, math.nan)
    got = gradients(stats, leaves, upstream, retain_graph=True)
    again = gradients(stats, leaves, upstream, create_graph=True)
    for name in SIDES:
        for grad in (got[name], again[name]):
            assert not grad[hidden].any(), name
            check(grad.detach(), wanted[name], None, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, FP32], ids=dtype_id)
def test_any_number_but_zero_counts(impl: str, dtype: torch.dtype, device: str) -> None:
    parts = draw((4, 33), FP32, device)
    mask = torch.tensor([0, 1, 1, 0]).to(dtype).to(device)
    mask = mask if dtype == torch.bool else mask * 3
    for got, want in zip(call(parts, mask, impl=impl), call(parts, impl=impl), strict=True):
        assert torch.equal(got, torch.where(mask != 0, want, 0.0))
    rows = (parts["x"], parts["mean"], parts["std"])
    seed = torch.tensor(5, device=device)
    noisy = cloak(*rows, mask, seed=seed, impl=impl)
    assert same_bits(noisy[mask == 0], parts["x"][mask == 0])


def test_small_slabs_are_the_same(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The torch path in boxes of few rows: the same bits, and gradients summed over boxes."""
    parts = leaves_of(pairs(FP32, device, a=3, m=4))
    mask = (torch.rand(1, 4, 2, 37) < 0.5).to(device)
    whole = call(parts, mask, impl="torch")
    upstream = upstream_for(whole)
    want = gradients(whole, parts, upstream)
    seed = torch.tensor(11, device=device)
    noisy = cloak(*(parts[n][0] for n in ("location", "mean", "std")), seed=seed)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for rows in (1, 3, 7, 100):
        monkeypatch.setattr(module, "SLAB_NUMEL", rows * 37)
        stats = call(parts, mask, impl="torch")
        assert same_bits(tuple(stats), tuple(whole))
        for name, grad in gradients(stats, parts, upstream).items():
            torch.testing.assert_close(grad, want[name])
        again = cloak(*(parts[n][0] for n in ("location", "mean", "std")), seed=seed)
        assert same_bits(noisy.detach(), again.detach())


# ---------------------------------------------------------------- autograd and torch.compile


@pytest.mark.parametrize("name", STATS)
def test_gradcheck(name: str) -> None:
    parts = draw((2, 2, 4), FP64, "cpu")
    parts["mean"], parts["std"] = parts["mean"][:1], parts["std"][:, :1]
    leaves = tuple(leaves_of(parts).values())
    mask = torch.rand(2, 2, 4) < 0.7

    def value(*sides: Tensor) -> Tensor:
        stats = call(dict(zip(SIDES, sides, strict=True)), mask, impl="torch")
        return getattr(stats, name) * (stats.log_det if name == "mahalanobis" else 1.0)

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_gradcheck_of_cloak() -> None:
    parts = leaves_of(draw((2, 3, 5), FP64, "cpu"))
    leaves = [parts["x"], parts["mean"][0].detach().requires_grad_(), parts["std"]]
    mask, seed = torch.rand(2, 3, 5) < 0.6, torch.tensor(3)

    def value(*sides: Tensor) -> Tensor:
        return cloak(*sides, mask, seed=seed, impl="torch").square()

    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_double_backward_is_the_same_gradient(impl: str, device: str) -> None:
    leaves = leaves_of(pairs(FP32, device))
    mask = (torch.rand(2, 1, 2) < 0.5).to(device)
    stats = call(leaves, mask, impl=impl)
    upstream = upstream_for(stats)
    first = gradients(stats, leaves, upstream, retain_graph=True)
    again = gradients(stats, leaves, upstream, create_graph=True)
    for name in SIDES:
        assert again[name].requires_grad
        torch.testing.assert_close(again[name], first[name])


def test_backward_twice(impl: str, device: str) -> None:
    leaves = leaves_of(draw((3, 67), BF16, device))
    stats = call(leaves, impl=impl)
    upstream = upstream_for(stats)
    first = gradients(stats, leaves, upstream, retain_graph=True)
    assert same_bits(list(first.values()), list(gradients(stats, leaves, upstream).values()))


def test_only_the_gradients_that_are_asked_for(impl: str, device: str) -> None:
    parts = draw((3, 131), BF16, device)
    leaves = leaves_of(parts)
    stats = call(leaves, impl=impl)
    upstream = upstream_for(stats)
    want = gradients(stats, leaves, upstream)
    for name in SIDES:
        leaf = parts[name].detach().requires_grad_()
        alone = call({**parts, name: leaf}, impl=impl)
        assert same_bits(gradients(alone, {name: leaf}, upstream)[name], want[name])
    assert not any(fact.requires_grad for fact in call(parts, impl=impl))


@pytest.mark.parametrize("kind", ["expanded", "strided", "zero", "2^40"])
def test_upstream_gradients(impl: str, kind: str, device: str) -> None:
    parts = draw((2, 3, 67), FP32, device)
    made = {
        "expanded": lambda g: g[:1, :1].expand(g.shape),
        "strided": lambda g: torch.stack((g, g * math.nan), -1).flatten(1)[:, ::2],
        "zero": torch.zeros_like,
        "2^40": lambda g: g * 2.0**40,
    }
    leaves = leaves_of(parts)
    stats = call(leaves, impl=impl)
    upstream = {name: made[kind](g) for name, g in upstream_for(stats).items()}
    wanted = gradient_truths(parts, upstream)
    for name, grad in gradients(stats, leaves, upstream).items():
        check(grad, wanted[name], None, f"{kind} d{name}")


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_a_row_does_not_see_its_batch(impl: str, dtype: torch.dtype, device: str) -> None:
    if impl == "torch" and device != "cpu":
        pytest.skip("torch's reductions on a GPU depend on the number of rows")
    parts = draw((5, 1003), dtype, device)
    some = call({name: part[[3, 0]] for name, part in parts.items()}, impl=impl)
    for whole, part in zip(call(parts, impl=impl), some, strict=True):
        assert same_bits(part, whole[[3, 0]])


def test_opcheck(impl: str, device: str) -> None:
    """Schema, fake and autograd registration, aliasing, and the operators under AOT dispatch."""
    triton = impl == "triton"
    parts = leaves_of(pairs(FP32, device, d=9))
    mask = torch.tensor([[[True, False]], [[True, True]]])[..., None].to(device)
    sides = [parts[name] for name in SIDES]
    op = torch.ops.onepass.gaussian_stats.default
    for args in (
        (*sides, mask, list(STATS), triton),
        (*sides[:2], None, sides[3], None, ["mahalanobis"], triton),
        (None, None, None, sides[3], None, ["log_det"], triton),
    ):
        torch.library.opcheck(op, args)
    rows = [parts[n].detach()[0].clone().requires_grad_() for n in ("location", "mean", "std")]
    seed = torch.tensor(3, device=device)
    for flags in (None, mask[0, :, :]):
        torch.library.opcheck(torch.ops.onepass.cloak.default, (*rows, flags, seed, triton))


def test_compiled_is_eager(impl: str, device: str) -> None:
    """fullgraph, to the bit; the seed too, drawn inside."""
    mask = torch.tensor([[True, False, True], [True, True, False]]).to(device)

    def loss(x: Tensor, mean: Tensor, location: Tensor, std: Tensor) -> Tensor:
        noisy = cloak(x, mean, std, mask, impl=impl)
        stats = onepass.gaussian_stats(noisy, mean, std, mask, location=location, impl=impl)
        return (stats.mahalanobis + stats.log_det).sum()

    parts = draw((2, 3, 67), FP32, device)
    eager_leaves, compiled_leaves = leaves_of(parts), leaves_of(parts)
    torch.manual_seed(4)
    eager = loss(**eager_leaves)
    torch.manual_seed(4)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**compiled_leaves)
    assert same_bits(eager, compiled)
    assert same_bits(
        torch.autograd.grad(eager, list(eager_leaves.values())),
        torch.autograd.grad(compiled, list(compiled_leaves.values())),
    )


# ---------------------------------------------------------------- memory


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@interpreted
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("kind", ["odd", "padded", "sliced"])
def test_bounds_and_races(kind: str, dtype: torch.dtype) -> None:
    """No load outside the rows, no store outside the gradients, no two programs at one address."""
    parts = draw((2, 2, 131), dtype, "cpu")
    sides = leaves_of({name: laid_out(part, kind) for name, part in parts.items()})
    mask = torch.tensor([[True, False], [True, True]])
    features = torch.rand(2, 2, 131) < 0.5
    seed = torch.tensor(7)
    with guard(list(sides.values()), mask, features, seed):
        for flags in (mask, features):
            stats = call(sides, flags, impl="triton")
            rows = (sides["x"], sides["mean"], sides["std"])
            noisy = cloak(*rows, flags, seed=seed, impl="triton")
            (stats.mahalanobis + stats.log_det + noisy.sum(-1)).sum().backward()
        paired = {"x": sides["x"][:, None], **{n: sides[n][None] for n in SIDES[1:]}}
        call(paired, impl="triton").mahalanobis.sum().backward()


@interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_every_byte_moves_once(dtype: torch.dtype) -> None:
    leaves = leaves_of(draw((2, 1003), dtype, "cpu"))
    with count_bytes() as forward:
        stats = call(leaves, impl="triton")
    assert forward.launches == ["gaussian_stats_kernel"]
    assert [forward.read(leaf) for leaf in leaves.values()] == [2 * 1003 * dtype.itemsize] * 4
    assert forward.written() == 2 * 4 * 2 and forward.read() == 4 * 2 * 1003 * dtype.itemsize
    with count_bytes() as backward:
        got = gradients(stats, leaves, upstream_for(stats))
    assert backward.launches == ["gaussian_stats_backward_kernel"]
    assert [backward.read(leaf) for leaf in leaves.values()] == [2 * 1003 * dtype.itemsize] * 4
    for grad in got.values():
        assert backward.written(grad) == backward.distinct_written(grad) == tensor_bytes(grad)
    assert backward.written() == sum(map(tensor_bytes, got.values()))
    assert backward.read() == 4 * 2 * 1003 * dtype.itemsize + 2 * 4 * 2


@interpreted
def test_a_log_determinant_reads_std_alone() -> None:
    parts = draw((3, 200), BF16, "cpu")
    (std,) = leaves_of({"std": parts["std"]}).values()
    with count_bytes() as forward:
        stats = call({**parts, "std": std}, want="log_det", impl="triton")
    assert forward.read() == forward.read(std) == tensor_bytes(std)
    with count_bytes() as backward:
        stats.log_det.sum().backward()
    assert backward.read(std) == tensor_bytes(std) and backward.read() <= tensor_bytes(std) + 12


@interpreted
def test_masked_rows_are_not_read() -> None:
    leaves = leaves_of(draw((2, 3, 200), BF16, "cpu"))
    mask = torch.tensor([[True, False, False], [True, True, False]])
    row = 200 * 2
    with count_bytes() as forward:
        stats = call(leaves, mask, impl="triton")
    assert [forward.read(side) for side in leaves.values()] == [3 * row] * 4
    with count_bytes() as backward:
        got = gradients(stats, leaves, upstream_for(stats))
    assert [backward.read(side) for side in leaves.values()] == [3 * row] * 4
    # Their zeros are written all the same.
    assert [backward.written(g) for g in got.values()] == [6 * row] * 4


@interpreted
def test_broadcast_sides_are_not_copied() -> None:
    """Pairs of 4 x 3: two launches, each gradient written once, in the shape of its own side."""
    leaves = leaves_of(pairs(FP32, "cpu", a=4, m=3, d=64))
    with count_bytes() as forward:
        stats = call(leaves, impl="triton")
    for leaf in leaves.values():
        assert forward.distinct_read(leaf) == tensor_bytes(leaf)
    upstream = upstream_for(stats)
    with count_bytes() as backward:
        got = gradients(stats, leaves, upstream)
    assert backward.launches == ["gaussian_stats_backward_kernel"] * 2
    assert backward.written() == sum(map(tensor_bytes, got.values()))


@interpreted
@pytest.mark.parametrize("hidden_size", [1003, 1024])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_cloak_moves_every_byte_once(dtype: torch.dtype, hidden_size: int) -> None:
    """Three reads and a write; back one read and a write per gradient: no noise in memory."""
    parts = leaves_of(draw((2, hidden_size), dtype, "cpu"))
    rows = [parts[n] for n in ("x", "mean", "std")]
    seed, size = torch.tensor(1), 2 * hidden_size * dtype.itemsize
    with count_bytes() as forward:
        out = cloak(*rows, seed=seed, impl="triton")
    assert forward.launches == ["cloak_kernel"]
    assert forward.read() == 3 * size + 2 * 8 and forward.written() == size
    upstream = torch.randn(2, hidden_size).to(dtype)
    with count_bytes() as backward:
        torch.autograd.grad(out, rows, upstream)
    assert backward.launches == ["cloak_backward_kernel"]
    assert backward.read() == size + 2 * 8 and backward.written() == size


# ---------------------------------------------------------------- error budget


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_pooled_error_is_within_five_percent_of_unfused_torch(
    impl: str, dtype: torch.dtype, device: str
) -> None:
    pooled = dict[str, list[Tensor]]()
    rows = 60 if impl == "torch" else 12
    for hidden_size in (64, 1000):
        parts = draw((rows, hidden_size), dtype, device)
        leaves, usual_leaves = leaves_of(parts), leaves_of(parts)
        stats, usual = call(leaves, impl=impl), unfused(usual_leaves)
        upstream = upstream_for(stats)
        wanted = truths(parts) | gradient_truths(parts, upstream)
        mine = stats._asdict() | gradients(stats, leaves, upstream)
        found = torch.autograd.grad(
            [usual[n] for n in upstream], list(usual_leaves.values()), list(upstream.values())
        )
        theirs = usual | dict(zip(usual_leaves, found, strict=True))
        for name, want in wanted.items():
            mine_u, other_u = (
                error_in_u(got[name].detach().cpu(), want).view(rows, -1).amax(-1).clamp_min(0.5)
                for got in (mine, theirs)
            )
            assert (mine_u <= FACTOR * other_u.clamp_min(FLOOR)).all(), name
            pooled.setdefault(name, []).append((mine_u / other_u).log())
    ratios = {name: float(torch.cat(logs).mean().exp()) for name, logs in pooled.items()}
    assert len(ratios) == 6
    assert max(ratios.values()) <= 1.05, ratios


# ---------------------------------------------------------------- the noise


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox-4x32-10 in Python's integers (Salmon et al., SC 2011)."""
    (a, b, c, d), (k, m) = counter, key
    for _ in range(10):
        first, second = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b = (second >> 32) ^ b ^ k, second & 0xFFFFFFFF
        c, d = (first >> 32) ^ d ^ m, first & 0xFFFFFFFF
        k, m = (k + 0x9E3779B9) & 0xFFFFFFFF, (m + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


def test_known_answers_of_philox() -> None:
    """Those that Random123 publishes for ten rounds of four words."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0)
    known = {
        (0,) * 6: "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (ones,) * 6: "408f276d 41c83b0e a20bc7c6 6d5451fd",
        pi: "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for words, answer in known.items():
        assert " ".join(f"{word:08x}" for word in philox(words[:4], words[4:])) == answer


def plain_normal(seed: int, element: int) -> float:
    """The normal of one element, in double precision of a radius' word that float32 rounded."""
    seed &= 2**64 - 1
    at = element // 4
    words = philox((at & 0xFFFFFFFF, at >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))
    first, second = words[2 * (element % 4 // 2) :][:2]
    uniform = float(torch.tensor(float(first)).mul(2.0**-32).add(2.0**-33))
    radius = math.sqrt(-2 * math.log(uniform))
    angle = math.pi * (second - (second >> 31 << 32)) / 2.0**31  # a signed word
    return radius * (math.sin(angle) if element % 2 else math.cos(angle))


SEEDS = (0, 1, 2**31 + 5, 2**62 + 12345678901, -7)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("hidden_size", [3, 8, 37])
def test_the_noise_is_philox_at_the_element(
    impl: str, seed: int, hidden_size: int, device: str
) -> None:
    """x = mean = 0 and std = 1 leave the noise alone."""
    rows = 5
    zeros = torch.zeros(rows, hidden_size, device=device)
    key = torch.tensor(seed, device=device)
    got = cloak(zeros, zeros, zeros + 1, seed=key, impl=impl).flatten().tolist()
    for element, value in enumerate(got):
        want = plain_normal(seed, element)
        assert abs(value - want) <= 2e-6 * max(1.0, abs(want)), element


@pytest.mark.parametrize("first", [2**34 - 6, 2**40 + 2, 2**44])
def test_elements_beyond_32_bits(first: int) -> None:
    """Their counters have a second word."""
    got = Normals(torch.tensor(9)).draw(first, 11).tolist()
    for at, value in enumerate(got):
        assert abs(value - plain_normal(9, first + at)) <= 1e-5


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("hidden_size", [1, 2, 7, 128, 1025])
def test_both_implementations_draw_the_same(
    impl: str, hidden_size: int, dtype: torch.dtype, device: str
) -> None:
    """To a rounding of the result's type."""
    if impl == "torch":
        pytest.skip("the other implementation compares")
    parts = leaves_of(draw((2, 3, hidden_size), dtype, device))
    rows = [parts[n] for n in ("x", "mean", "std")]
    seed = torch.tensor(1234567890123, device=device)
    upstream = torch.randn(2, 3, hidden_size).to(dtype).to(device)
    found = []
    for name in ("torch", "triton"):
        out = cloak(*rows, seed=seed, impl=name)
        found.append([out, *torch.autograd.grad(out, rows, upstream)])
    tolerance = max(4e-6, torch.finfo(dtype).eps)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_noise_is_normal() -> None:
    """Moments up to the eighth, the share beyond 1, 2, 3 and 4, and no correlation at any lag."""
    n = 1 << 20
    eps = Normals(torch.tensor(17)).draw(0, n).double()
    sigma = 1 / math.sqrt(n)
    for power, (want, spread) in {
        1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170), 8: (105, 2016000),
    }.items():  # fmt: skip
        assert abs(float((eps**power).mean()) - want) < 5 * sigma * math.sqrt(spread), power
    for bound in (1, 2, 3, 4):
        share = math.erfc(bound / math.sqrt(2))
        found = float((eps.abs() > bound).double().mean())
        assert abs(found - share) < 5 * sigma * math.sqrt(share), bound
    assert 4.5 < float(eps.abs().max()) < 6.8
    for lag in (1, 2, 3, 4, 5, 8, 64, 1024, 4096):
        assert abs(float((eps[:-lag] * eps[lag:]).mean())) < 5 * sigma, lag
        assert abs(float((eps[:-lag] ** 2 * eps[lag:] ** 2).mean()) - 1) < 5 * sigma * 8, lag
    other = Normals(torch.tensor(18)).draw(0, n).double()
    assert abs(float((eps * other).mean())) < 5 * sigma


def test_the_largest_noise_is_finite() -> None:
    """The radius of the smallest and of the largest word."""
    smallest, largest = 2.0**-33, 2.0**32 * 2.0**-32
    assert math.sqrt(-2 * math.log(smallest)) < 6.77
    assert math.sqrt(-2 * math.log(largest)) == 0.0


def test_noise_does_not_depend_on_the_rows_after_it(impl: str, device: str) -> None:
    """Nor rows on one another: the same seed, a longer batch, the same beginning."""
    zeros = torch.zeros(6, 10, device=device)
    seed = torch.tensor(5, device=device)
    long = cloak(zeros, zeros, zeros + 1, seed=seed, impl=impl)
    short = cloak(zeros[:4], zeros[:4], zeros[:4] + 1, seed=seed, impl=impl)
    shaped = cloak(*(t.view(2, 3, 10) for t in (zeros, zeros, zeros + 1)), seed=seed)
    assert same_bits(short, long[:4])
    torch.testing.assert_close(shaped.view(6, 10), long, rtol=0, atol=4e-6)
    assert len({tuple(row) for row in long.tolist()}) == 6


# ---------------------------------------------------------------- cloak


def plain_cloak(rows: Sequence[Tensor], mask: Tensor | None, seed: Tensor) -> Tensor:
    """x + m (mean + std eps) in fp64, the noise by the torch path."""
    x, mean, std = (t.detach().cpu().double() for t in rows)
    eps = Normals(seed.cpu()).draw(0, x.numel()).view(x.shape).double()
    noisy = x + mean + std * eps
    if mask is None:
        return noisy
    return torch.where((mask if mask.dim() == x.dim() else mask[..., None]).cpu(), noisy, x)


@pytest.mark.parametrize("dtype", [*LOW, FP64], ids=dtype_id)
@pytest.mark.parametrize("kind", ["none", "rows", "features"])
def test_cloak_and_its_gradient(impl: str, kind: str, dtype: torch.dtype, device: str) -> None:
    if dtype == FP64 and impl == "triton":
        pytest.skip("float64 is served by the torch path only")
    parts = draw((2, 3, 67), dtype, device)
    mask = {"none": None, "rows": (2, 3), "features": (2, 3, 67)}[kind]
    flags = None if mask is None else (torch.rand(mask) < 0.5).to(device)
    parts = leaves_of(parts)
    rows = [parts[n] for n in ("x", "mean", "std")]
    seed = torch.tensor(99, device=device)
    out = cloak(*rows, flags, seed=seed, impl=impl)
    assert out.dtype == dtype and out.shape == (2, 3, 67)
    want = plain_cloak(rows, flags, seed)
    # The noise is float32's on any device, and a GPU's sine is not a CPU's to the last bit.
    exact = dtype == FP64 and device == "cpu"
    tolerance = 1e-12 if exact else max(4e-6, torch.finfo(dtype).eps)
    torch.testing.assert_close(out.cpu().double(), want, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(2, 3, 67, dtype=FP64).to(dtype).to(device)
    dx, dmean, dstd = torch.autograd.grad(out, rows, upstream, retain_graph=True)
    keep = marks(flags, parts, 3).cpu()
    g = upstream.cpu().double()
    eps = Normals(seed.cpu()).draw(0, g.numel()).view(g.shape).double()
    assert same_bits(dx, upstream)
    assert same_bits(dmean, torch.where(keep.to(device), upstream, 0.0).to(dtype))
    slope = torch.where(keep, g * eps, 0.0)
    torch.testing.assert_close(dstd.cpu().double(), slope, rtol=tolerance, atol=tolerance)
    again = torch.autograd.grad(out, rows, upstream.requires_grad_(), create_graph=True)
    for first, second in zip((dx, dmean, dstd), again, strict=True):
        torch.testing.assert_close(second.detach(), first, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_what_is_not_cloaked_keeps_its_bits(impl: str, dtype: torch.dtype, device: str) -> None:
    """-0, subnormals, infinities and NaN too, whatever mean, std and the upstream gradient hold."""
    x = torch.tensor([0.0, -0.0, 1e-40, math.inf, -math.inf, math.nan, 1.5, -3.0]).repeat(2, 1)
    x = x.to(dtype).to(device)
    bad = torch.full_like(x, math.nan)
    for mask in (torch.tensor([0, 0]), torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1]] * 2)):
        mask = mask.to(device)
        rows = [t.clone().requires_grad_() for t in (x, bad, bad)]
        out = cloak(*rows, mask, impl=impl)
        hidden = (mask if mask.dim() == 2 else mask[:, None]).expand(2, 8) == 0
        assert same_bits(out.detach()[hidden], x[hidden])
        upstream = torch.where(hidden, math.nan, 1.0).to(dtype)
        for grad in torch.autograd.grad(out, rows[1:], upstream):
            assert not grad[hidden].any()


@pytest.mark.parametrize("shape", [(5,), (0, 8), (2, 0, 8), (1, 1), (2, 1, 2, 40)])
def test_cloak_of_any_shape(impl: str, shape: tuple[int, ...], device: str) -> None:
    parts = leaves_of(draw(shape, FP32, device))
    rows = [parts[n] for n in ("x", "mean", "std")]
    seed = torch.tensor([3], device=device)
    out = cloak(*rows, seed=seed, impl=impl)
    want = plain_cloak(rows, None, seed).float()
    torch.testing.assert_close(out.cpu(), want, rtol=4e-6, atol=4e-6)
    out.sum().backward()
    assert rows[2].grad is not None and rows[2].grad.shape == torch.Size(shape)


@pytest.mark.parametrize("layout", ["padded", "offset", "odd", "strided", "transposed"])
def test_cloak_of_any_layout(impl: str, layout: str, device: str) -> None:
    parts = draw((2, 2, 67), FP32, device)
    rows = [laid_out(parts["x"], layout), parts["mean"][0], laid_out(parts["std"], layout)]
    rows = [row.requires_grad_() for row in rows]
    seed = torch.tensor(3, device=device)
    out = cloak(*rows, seed=seed, impl=impl)
    whole = [row.expand(2, 2, 67) for row in rows]
    want = plain_cloak(whole, None, seed).float()
    torch.testing.assert_close(out.cpu(), want, rtol=4e-6, atol=4e-6)
    upstream = torch.randn(2, 2, 67).to(device).transpose(0, 1).contiguous().transpose(0, 1)
    grads = torch.autograd.grad(out, rows, upstream)
    torch.testing.assert_close(grads[1], upstream.sum(0))


def test_cloak_of_fp32_parameters_on_bf16_rows(impl: str, device: str) -> None:
    parts = draw((3, 64), FP32, device)
    rows = [parts["x"].bfloat16(), parts["mean"], parts["std"]]
    rows = [row.requires_grad_() for row in rows]
    out = cloak(*rows, seed=torch.tensor(1, device=device), impl=impl)
    assert out.dtype == BF16
    out.sum().backward()
    assert [row.grad.dtype for row in rows if row.grad is not None] == [BF16, FP32, FP32]


def test_a_seed_that_is_drawn(impl: str, device: str) -> None:
    """torch.manual_seed repeats it; otherwise every call has new noise."""
    zeros = torch.zeros(2, 8, device=device)
    rows = (zeros, zeros, zeros + 1)
    torch.manual_seed(1)
    first, second = (cloak(*rows, impl=impl) for _ in range(2))
    torch.manual_seed(1)
    assert same_bits(cloak(*rows, impl=impl), first)
    assert not torch.equal(first, second)


def test_nothing_of_the_noise_is_kept(impl: str, device: str) -> None:
    """Between forward and backward there is a seed and a mask."""
    parts = leaves_of(draw((4, 256), FP32, device))
    kept = list[Tensor]()

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    mask = torch.tensor([True, False, True, True]).to(device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        cloak(parts["x"], parts["mean"], parts["std"], mask, impl=impl)
    assert sum(tensor.numel() for tensor in kept) == 4 + 1


@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA graphs")
def test_a_replayed_graph_has_new_noise(device: str) -> None:
    zeros = torch.zeros(4, 64, device=device)
    cloak(zeros, zeros, zeros + 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cloak(zeros, zeros, zeros + 1)
    seen = []
    for _ in range(3):
        graph.replay()
        seen.append(out.clone())
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])


# ---------------------------------------------------------------- bad input

X, Y = torch.randn(2, 3, 5), torch.rand(2, 3, 5) + 0.1
SEED = torch.tensor(1)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "x_is_integers": (lambda s, c: s(X.long(), X, Y), ValueError, "x must be .*int64"),
    "x_is_none": (lambda s, c: s(None, X, Y), TypeError, "x must be .*NoneType"),
    "std_is_none": (lambda s, c: s(X, X, None), TypeError, "std must be .*NoneType"),
    "mean_is_a_list": (lambda s, c: s(X, [X], Y), TypeError, "mean must be .*list"),
    "other_width": (lambda s, c: s(X, X[..., :4], Y), ValueError, r"mean and std.*4\).*5\)"),
    "no_broadcast": (lambda s, c: s(X, X[:, :2], Y), ValueError, r"must broadcast: .*\(2, 2, 5\)"),
    "no_columns": (lambda s, c: s(X, X, Y[..., :0]), ValueError, r"std must be .*D > 0"),
    "scalar_std": (lambda s, c: s(X, X, Y[0, 0, 0]), ValueError, r"std must be \[\.\.\., D\]"),
    "mask_short": (lambda s, c: s(X, X, Y, torch.ones(3)), ValueError, r"mask must mark rows"),
    "mask_wrong": (lambda s, c: s(X, X, Y, torch.ones(2, 4)), ValueError, r"got \(2, 4\)"),
    "mask_thin": (lambda s, c: s(X, X, Y, torch.ones(2, 3, 1)), ValueError, r"got \(2, 3, 1\)"),
    "mask_is_a_list": (lambda s, c: s(X, X, Y, [1]), TypeError, "mask must be .*list"),
    "want_unknown": (lambda s, c: s(X, X, Y, want="maha"), ValueError, "want has no 'maha'"),
    "impl_unknown": (lambda s, c: s(X, X, Y, impl="cuda"), ValueError, "impl must be one of"),
    "two_devices": (lambda s, c: s(X.to("meta"), X, Y), ValueError, "meta.*cpu"),
    "cloak_integers": (lambda s, c: c(X.int(), X, Y), ValueError, "x must be .*int32"),
    "cloak_scalar": (lambda s, c: c(X[0, 0, 0], X, Y), ValueError, r"x must be \[\.\.\., D\]"),
    "cloak_mean": (lambda s, c: c(X, X[:, :2], Y), ValueError, r"mean must broadcast to x.*2, 2"),
    "cloak_std_big": (lambda s, c: c(X[0], X[0], Y), ValueError, "std must broadcast to x"),
    "cloak_dtypes": (lambda s, c: c(X, X, Y.half()), ValueError, "one dtype: got .*float16"),
    "cloak_mask": (lambda s, c: c(X, X, Y, torch.ones(3)), ValueError, "mask must mark rows"),
    "seed_is_an_int": (lambda s, c: c(X, X, Y, seed=3), TypeError, "seed must be .*int"),
    "seed_is_int32": (lambda s, c: c(X, X, Y, seed=SEED.int()), ValueError, "one int64: .*int32"),
    "two_seeds": (lambda s, c: c(X, X, Y, seed=SEED.expand(2)), ValueError, r"shape \(2,\)"),
    "seed_elsewhere": (lambda s, c: c(X, X, Y, seed=SEED.to("meta")), ValueError, "is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the argument, what came and what was wanted; before anything runs."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(module, "_gaussian_stats", never)
    monkeypatch.setattr(module, "_cloak", never)
    wrong, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        wrong(onepass.gaussian_stats, onepass.cloak)
    assert "\n" not in str(caught.value)
