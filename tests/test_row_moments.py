"""row_moments against independent fp64 sums: values, gradients, layers, memory, bits, bad input.

Errors are in u (2^-24 in fp32) of the sum of the terms' magnitudes; for dd, xx and yy that is the
sum itself, so their errors are relative, however close x is to y. Unfused torch is the measure: 3
times its error per row above 8 u, 5 % more than its error pooled over many rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.bench.measure import _peak_bytes
from onepass.ops import row_moments as module
from support.environment import NO_INTERPRETER, NO_TRITON
from support.guard import count_bytes, guard
from support.pair_truth import LAYOUTS, laid_out, moments, moments_gradients
from support.truth import Truth, error_in_u, exact_pair, relative_error, worst_error

MOMENTS = onepass.RowMoments._fields
FACTOR, FLOOR = 3.0, 8.0  # torch in another summation order stays within these

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
LOW = (FP32, BF16, FP16)

interpreted = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)

Layers = list[Tensor]


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def shape_id(value: Any) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else dtype_id(value)


# ---------------------------------------------------------------- helpers


def draw(
    shape: tuple[int, ...], dtype: torch.dtype, device: str, *, distance: float | None = None
) -> tuple[Tensor, Tensor]:
    """Two independent sets of rows, or y and an x at that relative distance from it."""
    wide = torch.float64 if dtype == FP64 else FP32
    y = torch.randn(shape, dtype=wide) + 0.3
    x = torch.randn(shape, dtype=wide) - 0.1
    x = x if distance is None else y + distance * x
    return x.to(dtype).to(device), y.to(dtype).to(device)


def leaves_of(*tensors: Tensor) -> Layers:
    return [tensor.detach().requires_grad_() for tensor in tensors]


def unfused(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The sums as anyone would write them, on rows that go up to fp32 first."""
    wide = torch.float64 if x.dtype == FP64 else FP32
    a, b = x.to(wide), y.to(wide)
    terms = ((a - b).square(), a.square(), b.square(), a * b, (a - b) * (a + b))
    return dict(zip(MOMENTS, (term.sum(-1) for term in terms), strict=True))


def upstream_for(shape: Sequence[int], like: Tensor, names: Iterable[str] = MOMENTS) -> Any:
    dtype = FP64 if like.dtype == FP64 else FP32
    return {name: torch.randn(tuple(shape), dtype=dtype).to(like.device) for name in names}


def gradients(
    stats: onepass.RowMoments | dict[str, Tensor],
    leaves: Sequence[Tensor],
    upstream: Mapping[str, Tensor],
    **options: Any,
) -> list[Tensor]:
    by_name = stats if isinstance(stats, dict) else stats._asdict()
    outputs = [by_name[name] for name in upstream]
    found = torch.autograd.grad(outputs, leaves, list(upstream.values()), **options)
    return list(found)


def check(got: Tensor, want: Truth, usual: Tensor | None, what: str) -> None:
    """Within 8 u of the terms' magnitudes, or 3 times as far off as unfused torch."""
    error = worst_error(got.cpu(), want)
    theirs = 0.0 if usual is None else worst_error(usual.cpu(), want)
    bar = max(FLOOR, FACTOR * theirs) if math.isfinite(theirs) else FLOOR
    assert error <= bar, f"{what}: {error:.3g} u, unfused torch {theirs:.3g} u"


def check_moments(stats: onepass.RowMoments, x: Tensor, y: Tensor) -> None:
    """Against rows x, y [..., D]; for layers, stacked ones."""
    usual = unfused(x.detach(), y.detach())
    for name, want in moments(x, y).items():
        got = getattr(stats, name)
        assert got.dtype == (FP64 if x.dtype == FP64 else FP32), name
        check(got, want, usual[name], name)


def check_gradients(
    got: Sequence[Tensor], x: Tensor, y: Tensor, upstream: Mapping[str, Tensor], what: str = ""
) -> None:
    leaves = leaves_of(x, y)
    theirs = torch.autograd.grad(
        [unfused(*leaves)[name] for name in upstream],
        leaves,
        list(upstream.values()),
        allow_unused=True,
    )
    wanted = moments_gradients(x, y, upstream)
    for name, grad, want, usual in zip(("dx", "dy"), got, wanted, theirs, strict=True):
        assert grad.dtype == x.dtype
        check(grad, want, usual, f"{what} {name}")


def check_everything(x: Tensor, y: Tensor, impl: str) -> None:
    """All moments, the gradient of a random mix of them to both sides, and inputs left alone."""
    leaves = leaves_of(x, y)
    before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
    stats = onepass.row_moments(*leaves, impl=impl)
    assert stats.dd.shape == x.shape[:-1]
    check_moments(stats, x, y)
    upstream = upstream_for(x.shape[:-1], x)
    check_gradients(gradients(stats, leaves, upstream), x, y, upstream)
    for leaf, (values, version) in zip(leaves, before, strict=True):
        assert leaf._version == version and same_bits(leaf.detach(), values)


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
@pytest.mark.parametrize("hidden_size", [1, 7, 128, 1000, 4097], ids=lambda d: f"D{d}")
def test_every_moment_and_a_mix_of_gradients(
    impl: str, hidden_size: int, dtype: torch.dtype, device: str
) -> None:
    """One column, less than a block, whole blocks, and an odd number of them and one more."""
    x, y = draw((3, hidden_size), dtype, device)
    check_everything(x, y, impl)


@pytest.mark.parametrize("shape", [(5,), (0, 8), (2, 0, 8), (1, 1), (2, 3, 40), (2, 1, 2, 40)])
def test_shapes(impl: str, shape: tuple[int, ...], device: str) -> None:
    x, y = draw(shape, FP32, device)
    check_everything(x, y, impl)


def test_float64_is_calculated_in_float64(device: str) -> None:
    x, y = draw((2, 3, 333), FP64, device)
    check_everything(x, y, "torch")
    check_everything(*draw((3, 333), FP64, device, distance=1e-9), "torch")


@pytest.mark.parametrize("name", MOMENTS)
def test_every_moment_alone(impl: str, name: str, device: str) -> None:
    """A mix would hide a term forgotten, or one that spoils its neighbour."""
    x, y = draw((2, 131), FP32, device)
    leaves = leaves_of(x, y)
    stats = onepass.row_moments(*leaves, impl=impl)
    upstream = upstream_for((2,), x, [name])
    got = gradients(stats, leaves, upstream, retain_graph=True)
    check_gradients(got, x, y, upstream, name)
    for at, side in enumerate(("xx", "yy")):
        assert bool(got[at].any()) == (name not in ("xx", "yy") or name == side)


SUBSETS = [s for n in range(1, 5) for s in combinations(MOMENTS, n)]


@pytest.mark.parametrize("layers", [1, 2], ids=lambda n: f"L{n}")
def test_every_subset_of_moments(impl: str, layers: int, device: str) -> None:
    """What is not wanted is None; what is has the bits that it has among all five, and the same
    gradient to both sides, also where not all that is wanted is used."""
    xs, ys = ([torch.randn(2, 67).to(device) for _ in range(layers)] for _ in range(2))
    mask = torch.tensor([True, False]).to(device)
    for at, want in enumerate(SUBSETS):
        leaves = leaves_of(*xs, *ys)
        x: Any = leaves[:layers] if layers > 1 else leaves[0]
        y: Any = leaves[layers:] if layers > 1 else leaves[1]
        everything = onepass.row_moments(x, y, mask, impl=impl)
        stats = onepass.row_moments(x, y, mask, want=want, impl=impl)
        for name in MOMENTS:
            got = getattr(stats, name)
            assert got is None if name not in want else same_bits(got, getattr(everything, name))
        used = want[: 1 + at % len(want)]
        upstream = upstream_for(stats[MOMENTS.index(want[0])].shape, xs[0], used)
        options = {"allow_unused": True}
        alone = gradients(stats, leaves, upstream, **options)
        assert same_bits(alone, gradients(everything, leaves, upstream, **options))
        assert any(grad.any() for grad in alone) and not any(grad[1].any() for grad in alone)


def test_wants_in_any_form(impl: str, device: str) -> None:
    x, y = draw((3, 8), FP32, device)
    everything = onepass.row_moments(x, y, impl=impl)
    one = onepass.row_moments(x, y, want="xy", impl=impl)
    assert [m is None for m in one] == [name != "xy" for name in MOMENTS]
    assert same_bits(one.xy, everything.xy)
    twice = onepass.row_moments(x, y, want=["yy", "xx", "yy"], impl=impl)
    assert same_bits((twice.xx, twice.yy), (everything.xx, everything.yy))
    assert not any(m is not None for m in onepass.row_moments(x, y, want=(), impl=impl))


def test_double_backward_of_a_subset(impl: str, device: str) -> None:
    x, y = draw((3, 33), FP32, device)
    leaves = leaves_of(x, y)
    stats = onepass.row_moments(leaves[0], leaves[1], want=("dd", "xy"), impl=impl)
    upstream = upstream_for((3,), x, ("dd", "xy"))
    again = gradients(stats, leaves, upstream, create_graph=True)
    check_gradients([grad.detach() for grad in again], x, y, upstream)
    torch.autograd.grad(again[0].sum(), leaves)


@pytest.mark.parametrize("side", [0, 1], ids=["x", "y"])
def test_a_frozen_side_gets_no_gradient(impl: str, side: int, device: str) -> None:
    """The target of a retain loss is frozen: the same bits for the other side."""
    x, y = draw((3, 131), BF16, device)
    both = leaves_of(x, y)
    upstream = upstream_for((3,), x)
    want = gradients(onepass.row_moments(*both, impl=impl), both, upstream)
    rows = [x.detach(), y.detach()]
    leaf = rows[side] = rows[side].requires_grad_()
    stats = onepass.row_moments(*rows, impl=impl)
    (got,) = gradients(stats, [leaf], upstream)
    assert same_bits(got, want[side])


def test_nothing_to_differentiate(impl: str, device: str) -> None:
    stats = onepass.row_moments(*draw((3, 8), FP32, device), impl=impl)
    assert not any(moment.requires_grad for moment in stats)


def test_the_same_rows_on_both_sides(impl: str, device: str) -> None:
    """dd and the difference of squares are exactly 0, and so are their gradients; of the others
    both sides' gradients arrive at the one leaf."""
    (x,) = leaves_of(draw((3, 131), FP32, device)[0])
    stats = onepass.row_moments(x, x, impl=impl)
    assert not stats.dd.any() and not stats.difference_of_squares.any()
    assert same_bits(stats.xx, stats.yy) and same_bits(stats.xx, stats.xy)
    ones = torch.ones(3).to(device)
    (nothing,) = gradients(stats, [x], {"dd": ones}, retain_graph=True)
    assert not nothing.any()
    (twice,) = gradients(stats, [x], {"xy": ones}, retain_graph=True)
    assert same_bits(twice, (2 * x).detach())
    (difference,) = gradients(stats, [x], {"difference_of_squares": ones})
    assert not difference.any()


@pytest.mark.parametrize("kind", ["expanded", "strided", "transposed", "zero", "2^40"])
def test_upstream_gradients(impl: str, kind: str, device: str) -> None:
    """NVIDIA/TransformerEngine#2139, linkedin/Liger-Kernel#1298: a gradient other than 1 was
    ignored; ROCm/TransformerEngine#409: an expanded one read as if it were contiguous."""
    x, y = draw((2, 3, 67), BF16, device)
    made = {
        "expanded": lambda g: g[:1, :1].expand(g.shape),
        "strided": lambda g: torch.stack((g, g * math.nan), -1).flatten(1)[:, ::2],
        "transposed": lambda g: g.t().contiguous().t(),
        "zero": torch.zeros_like,
        "2^40": lambda g: g * 2.0**40,
    }
    upstream = {name: made[kind](g) for name, g in upstream_for((2, 3), x).items()}
    leaves = leaves_of(x, y)
    got = gradients(onepass.row_moments(*leaves, impl=impl), leaves, upstream)
    check_gradients(got, x, y, upstream, kind)
    if kind == "zero":
        assert not any(grad.any() for grad in got)


# ---------------------------------------------------------------- x near y


@pytest.mark.parametrize("distance", [1e-1, 1e-2, 1e-4, 1e-6], ids="{:g}".format)
def test_close_rows_in_fp32(impl: str, distance: float, device: str) -> None:
    """xx + yy - 2 xy is off by 2.6e-3, 25 and 2,470 times the truth at 1e-2, 1e-4 and 1e-5, and
    1 - cos of the plain form likewise."""
    x, y = draw((2, 1000), FP32, device, distance=distance)
    stats = onepass.row_moments(x, y, impl=impl)
    check_moments(stats, x, y)
    for row in range(2):
        exact = exact_pair(x[row], y[row])
        assert float(exact.relative_distance_squared) < 3 * distance**2
        dd, xx, yy, _, difference = (float(moment[row]) for moment in stats)
        assert relative_error(dd / yy, exact.relative_distance_squared) <= 1e-6
        lengths = math.sqrt(xx) * math.sqrt(yy)
        longer = difference / (math.sqrt(xx) + math.sqrt(yy))
        assert relative_error((dd - longer**2) / (2 * lengths), exact.one_minus_cosine) <= 1e-6
    check_everything(x, y, impl)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=dtype_id)
def test_close_rows_in_low_precision(impl: str, dtype: torch.dtype, device: str) -> None:
    """A difference of two bf16 numbers is exact in fp32: rows that differ in the last bit of a few
    small entries, 1e-6 of their length apart."""
    y = torch.cat([torch.full((2, 900), 50.0), torch.full((2, 100), 0.05)], -1).to(dtype)
    x = y.clone()
    x[:, 990:] = (x[:, 990:].float() * (1 + 2.0 ** (-7 if dtype == BF16 else -6))).to(dtype)
    x, y = x.to(device), y.to(device)
    stats = onepass.row_moments(x, y, impl=impl)
    for row in range(2):
        exact = exact_pair(x[row], y[row]).relative_distance_squared
        assert 0 < float(exact) < 1e-11
        assert relative_error(float(stats.dd[row]) / float(stats.yy[row]), exact) <= 1e-6
    check_everything(x, y, impl)


# ---------------------------------------------------------------- layers


def layer_layouts(kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Layers:
    """Three layers of these rows, as a model may hand them out."""
    values = [torch.randn(shape).to(dtype).to(device) for _ in range(3)]
    if kind == "stacked":  # views of one storage
        return list(torch.stack(values))
    if kind == "interleaved":  # [..., L, D]: rows of one layer lie L rows apart
        return [layer for layer in torch.stack(values, -2).unbind(-2)]
    if kind == "different":
        return [
            laid_out(v, how) for v, how in zip(values, ("padded", "strided", "odd"), strict=True)
        ]
    return [laid_out(value, kind) for value in values]


KINDS = ("contiguous", "stacked", "interleaved", "different", "offset", "odd", "sliced")


@pytest.mark.parametrize("kinds", [(kind, "contiguous") for kind in KINDS] + [("offset", "odd")])
def test_layers(impl: str, kinds: tuple[str, str], device: str) -> None:
    """Lists are not stacked; different storages, strides and alignments in one launch. Those of
    one field come with the layers in front.

    interleaved and offset: layers that do not start at an aligned address, which a table of
    addresses promises; a copy must have the stride that the launch is told.
    """
    dtype = LOW[KINDS.index(kinds[0]) % 3]
    xs, ys = (layer_layouts(kind, (2, 2, 131), dtype, device) for kind in kinds)
    x_leaves, y_leaves = leaves_of(*xs), leaves_of(*ys)
    stats = onepass.row_moments(x_leaves, y_leaves, impl=impl)
    assert stats.dd.shape == (3, 2, 2)
    x, y = torch.stack(xs), torch.stack(ys)
    check_moments(stats, x, y)
    upstream = upstream_for((3, 2, 2), x)
    got = gradients(stats, x_leaves + y_leaves, upstream)
    check_gradients([torch.stack(got[:3]), torch.stack(got[3:])], x, y, upstream, kinds[0])
    # The same as three calls. A kernel that is told an aligned stride may load, and so sum, in
    # another order than the one that reads a table of addresses.
    for at in range(3):
        single = onepass.row_moments(xs[at], ys[at], impl=impl)
        together = tuple(moment[at] for moment in stats)
        if impl == "triton" and device != "cpu":
            torch.testing.assert_close(tuple(single), together, rtol=1e-6, atol=1e-5)
        else:
            assert same_bits(tuple(single), together)


def test_one_layer_in_a_list_is_a_list(impl: str, device: str) -> None:
    x, y = draw((3, 33), FP32, device)
    stats = onepass.row_moments([x], [y], impl=impl)
    assert stats.dd.shape == (1, 3)
    check_moments(stats, x[None], y[None])
    assert onepass.row_moments((x,), (y,), impl=impl).xy.shape == (1, 3)


def test_layers_of_which_some_ask_for_gradients(impl: str, device: str) -> None:
    xs, ys = (layer_layouts("contiguous", (3, 67), FP32, device) for _ in range(2))
    xs[1].requires_grad_()
    ys[2].requires_grad_()
    stats = onepass.row_moments(xs, ys, impl=impl)
    upstream = upstream_for((3, 3), xs[0])
    got = gradients(stats, [xs[1], ys[2]], upstream)
    x, y = torch.stack(xs).detach(), torch.stack(ys).detach()
    wanted = moments_gradients(x, y, upstream)
    check(got[0], Truth(*(part[1] for part in wanted[0])), None, "dx[1]")
    check(got[1], Truth(*(part[2] for part in wanted[1])), None, "dy[2]")


def test_one_layer_of_several_used(impl: str, device: str) -> None:
    """The gradient of one layer's moments reaches no other layer."""
    xs, ys = (layer_layouts("contiguous", (2, 67), FP32, device) for _ in range(2))
    leaves = leaves_of(*xs)
    stats = onepass.row_moments(leaves, ys, impl=impl)
    got = torch.autograd.grad(stats.dd[1].sum() + stats.xy[1].sum(), leaves)
    assert not got[0].any() and not got[2].any()
    ones = torch.ones(2).to(device)
    want, _ = moments_gradients(xs[1], ys[1], {"dd": ones, "xy": ones})
    check(got[1], want, None, "dx[1]")


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("y_layout", LAYOUTS)
@pytest.mark.parametrize("x_layout", ["contiguous", "offset", "odd"])
def test_layouts(impl: str, x_layout: str, y_layout: str, device: str) -> None:
    """Sides differently far from alignment, with NaN between the rows."""
    dtype = LOW[LAYOUTS.index(y_layout) % 3]
    x, y = draw((2, 2, 67), dtype, device)
    check_everything(laid_out(x, x_layout), laid_out(y, y_layout), impl)


def test_expanded_rows(impl: str, device: str) -> None:
    """One direction against all rows: stride 0, and a gradient summed over the copies."""
    x, y = draw((3, 67), FP32, device)
    leaf = y[:1].detach().requires_grad_()
    wide = leaf.expand(3, 67)
    stats = onepass.row_moments(x, wide, impl=impl)
    check_moments(stats, x, wide.detach())
    upstream = upstream_for((3,), x)
    (got,) = gradients(stats, [leaf], upstream)
    want = moments_gradients(x, wide.detach(), upstream)[1]
    check(got[0], Truth(want.value.sum(0), want.scale.sum(0)), None, "dy")


@interpreted
def test_offsets_beyond_int32(tmp_path: Path) -> None:
    """Rows 2^30 elements apart, over a file of a few pages (fla-org/flash-linear-attention#1080):
    int32 offsets would wrap at row 2."""
    stride, n, hidden_size = 2**30 + 8, 3, 100
    sides = []
    for name in "xy":
        size = (n - 1) * stride + hidden_size
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=BF16)
        view = file.as_strided((n, hidden_size), (stride, 1))
        sides.append(view.copy_(torch.randn(n, hidden_size)))
    check_everything(sides[0], sides[1], "triton")


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", ["some", "all", "none"])
@pytest.mark.parametrize("layers", [1, 3], ids=lambda n: f"L{n}")
def test_masked_rows_are_zero_and_never_leak(
    impl: str, kind: str, layers: int, device: str
) -> None:
    """NaN in a row that does not count reaches nothing: not its moments, not its gradient."""
    masks = {"some": [[1, 0, 1], [0, 0, 1]], "all": [[0, 0, 0]] * 2, "none": [[1, 1, 1]] * 2}
    mask = torch.tensor(masks[kind], dtype=torch.bool).to(device)
    xs, ys = ([torch.randn(2, 3, 67).to(device) for _ in range(layers)] for _ in range(2))
    for rows in (*xs, *ys):
        rows[~mask] = math.nan
    leaves = leaves_of(*xs, *ys)
    if layers == 1:
        stats = onepass.row_moments(leaves[0], leaves[1], mask, impl=impl)
    else:
        stats = onepass.row_moments(leaves[:layers], leaves[layers:], mask, impl=impl)
    shape = (2, 3) if layers == 1 else (layers, 2, 3)
    kept = mask.expand(shape)
    x, y = ((side[0] if layers == 1 else torch.stack(side)) for side in (xs, ys))
    x, y = (torch.where(kept[..., None], side, 0.0) for side in (x, y))
    check_moments(stats, x, y)
    upstream = upstream_for(shape, x)
    got = gradients(stats, leaves, upstream)
    for grad in got:
        assert not grad[~mask].any()
    counted = {name: torch.where(kept, up, 0.0) for name, up in upstream.items()}
    sides = [got[:layers], got[layers:]]
    joined = [side[0] if layers == 1 else torch.stack(side) for side in sides]
    check_gradients(joined, x, y, counted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, FP32], ids=dtype_id)
def test_any_number_but_zero_counts(impl: str, dtype: torch.dtype, device: str) -> None:
    x, y = draw((4, 33), FP32, device)
    mask = torch.tensor([0, 1, 1, 0]).to(dtype).to(device)
    mask = mask if dtype == torch.bool else mask * 3
    masked = onepass.row_moments(x, y, mask, impl=impl)
    full = onepass.row_moments(x, y, impl=impl)
    for got, want in zip(masked, full, strict=True):
        assert torch.equal(got, torch.where(mask != 0, want, 0.0))


PATTERNS = ("padded", "left", "islands", "random", "one", "last", "none", "all")


def pattern(kind: str, rows: int) -> Tensor:
    """Which of `rows` rows, of two sequences, count."""
    mask = torch.zeros(2, rows // 2, dtype=torch.bool)
    if kind == "padded":
        mask[0, :-7], mask[1, :11] = True, True
    elif kind == "left":
        mask[:, rows // 3 :] = True
    elif kind == "islands":
        mask[:, ::9] = mask[:, 4:7] = True
    elif kind == "random":
        mask = torch.rand(mask.shape) < 0.7
    elif kind == "one":
        mask[1, 3] = True
    elif kind == "last":
        mask[:, -1] = True
    elif kind == "all":
        mask[:] = True
    return mask.view(-1)


@pytest.mark.parametrize("dtype", [FP32, BF16, FP64], ids=dtype_id)
@pytest.mark.parametrize("kind", PATTERNS)
def test_slabs_and_gaps(
    kind: str, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The torch path reads short gaps and jumps over long ones, in slabs: the same bits for the
    rows that count, exact zeros for the others whatever they and their upstream gradient hold."""
    monkeypatch.setattr(module, "FEWEST_PARTS", 1)
    monkeypatch.setattr(module, "SLAB_NUMEL", 5 * 33)
    monkeypatch.setattr(module, "SHORT_GAP", 3 * 33)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    mask = pattern(kind, 60).to(device)
    rows = [side for _ in range(2) for side in draw((60, 33), dtype, device)]
    spoilt = [torch.where(mask[:, None], side, math.nan) for side in rows]
    leaves = leaves_of(*spoilt)
    stats = onepass.row_moments(leaves[:2], leaves[2:], mask, impl="torch")
    wide = leaves_of(*(torch.where(mask[:, None], side, 0.0) for side in rows))
    whole = onepass.row_moments(wide[:2], wide[2:], impl="torch")
    assert same_bits(tuple(stats), tuple(whole))
    upstream = upstream_for((2, 60), leaves[0])
    bad = {name: torch.where(mask, up, math.inf) for name, up in upstream.items()}
    got, want = gradients(stats, leaves, bad), gradients(whole, wide, upstream)
    for grad, expected in zip(got, want, strict=True):
        assert same_bits(grad[mask], expected[mask])
        assert not grad[~mask].any()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_a_few_slabs_beside_the_gradients(dtype: torch.dtype) -> None:
    """The torch path needs no memory of the size of the rows."""
    layers, shape = 8, (4096, 512)
    xs, ys = ([torch.randn(shape).to(dtype) for _ in range(layers)] for _ in "xy")
    leaves = leaves_of(*xs)
    mask = torch.arange(4096) % 1024 < 800
    with _peak_bytes(torch.device("cpu")) as peak:
        stats = onepass.row_moments(leaves, ys, mask, want=("dd", "xy"))
        grads = torch.autograd.grad((stats.dd + stats.xy).sum(), leaves)
    parts = max(module.FEWEST_PARTS, torch.get_num_threads())
    slab = 4 * min(parts * module.SLAB_NUMEL, math.prod(shape))
    assert peak[0] <= sum(map(tensor_bytes, grads)) + 4 * slab + (4 << 20)


# ---------------------------------------------------------------- autograd and torch.compile


@pytest.mark.parametrize("name", MOMENTS)
def test_gradcheck(name: str) -> None:
    x, y = (torch.randn(2, 2, 4, dtype=FP64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[True, False], [True, True]])

    def value(x: Tensor, y: Tensor) -> Tensor:
        return getattr(onepass.row_moments(x, y, mask, impl="torch"), name)

    assert torch.autograd.gradcheck(value, (x, y))
    assert torch.autograd.gradgradcheck(value, (x, y))


def test_gradcheck_of_layers_and_mixes() -> None:
    leaves = tuple(torch.randn(2, 3, dtype=FP64, requires_grad=True) for _ in range(4))

    def mixed(*rows: Tensor) -> Tensor:
        stats = onepass.row_moments(rows[:2], rows[2:], impl="torch")
        cosine = stats.xy / (stats.xx * stats.yy).sqrt()
        return cosine * stats.dd + stats.difference_of_squares.square()

    assert torch.autograd.gradcheck(mixed, leaves)
    assert torch.autograd.gradgradcheck(mixed, leaves)


@pytest.mark.parametrize("shape", [(2, 3, 33), (2, 0, 33)], ids=shape_id)
def test_double_backward_is_the_same_gradient(
    impl: str, shape: tuple[int, ...], device: str
) -> None:
    """create_graph=True takes another path: its gradient must not differ, nor that of no rows."""
    x, y = draw(shape, FP32, device)
    mask = (torch.arange(math.prod(shape[:-1])) % 2 == 0).view(shape[:-1]).to(device)
    x, y = (torch.where(mask[..., None], side, 0.0) for side in (x, y))
    leaves = leaves_of(x, y)
    stats = onepass.row_moments(leaves[0], leaves[1], mask, impl=impl)
    upstream = upstream_for(shape[:-1], x)
    again = gradients(stats, leaves, upstream, create_graph=True)
    assert all(grad.requires_grad for grad in again)
    check_gradients([grad.detach() for grad in again], x, y, upstream)


def test_backward_twice(impl: str, device: str) -> None:
    """A backward that consumes its state doubles or zeroes the second gradient."""
    x, y = draw((3, 67), BF16, device)
    leaves = leaves_of(x, y)
    stats = onepass.row_moments(*leaves, impl=impl)
    upstream = upstream_for((3,), x)
    first = gradients(stats, leaves, upstream, retain_graph=True)
    other = gradients(stats, leaves, upstream_for((3,), x), retain_graph=True)
    assert not same_bits(first, other)
    assert same_bits(first, gradients(stats, leaves, upstream))


def test_two_runs_are_bit_equal(impl: str, device: str) -> None:
    x, y = draw((2, 3, 4097), BF16, device)
    upstream = upstream_for((2, 3), x)

    def once() -> tuple[Any, Any]:
        leaves = leaves_of(x, y)
        stats = onepass.row_moments(*leaves, impl=impl)
        return tuple(stats), gradients(stats, leaves, upstream)

    assert same_bits(once(), once())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_a_row_does_not_see_its_batch(impl: str, dtype: torch.dtype, device: str) -> None:
    """Bitwise, for any number and order of rows, alone or masked among others."""
    if impl == "torch" and device != "cpu":
        pytest.skip("torch's reductions on a GPU depend on the number of rows")
    x, y = draw((5, 1003), dtype, device)
    stats = onepass.row_moments(x, y, impl=impl)
    order = [3, 0]
    part = onepass.row_moments(x[order], y[order], impl=impl)
    mask = torch.tensor([True, False, False, True, False]).to(device)
    masked = onepass.row_moments(x, y, mask, impl=impl)
    for whole, some, kept in zip(stats, part, masked, strict=True):
        assert same_bits(some, whole[order])
        assert same_bits(kept[mask], whole[mask])


@pytest.mark.parametrize("layers", [1, 2], ids=lambda n: f"L{n}")
def test_opcheck(impl: str, layers: int, device: str) -> None:
    """Schema, fake and autograd registration, aliasing, and the operators under AOT dispatch."""
    sides = [leaves_of(*(torch.randn(2, 2, 9).to(device) for _ in range(layers))) for _ in "xy"]
    mask = torch.tensor([True, False, True, True]).to(device)
    for want in (MOMENTS, ("xy", "dd")):
        args = (*sides, mask, list(want), impl == "triton")
        torch.library.opcheck(torch.ops.onepass.row_moments.default, args)


def test_compiled_is_eager(impl: str, device: str) -> None:
    """fullgraph, to the bit, for a pair and for layers (linkedin/Liger-Kernel#1338)."""
    mask = torch.tensor([[True, False, True], [True, True, False]]).to(device)

    def loss(*rows: Tensor) -> Tensor:
        one = onepass.row_moments(rows[0], rows[1], impl=impl)
        many = onepass.row_moments(rows[:2], rows[2:], mask, want=("xx", "xy"), impl=impl)
        return (one.dd / one.yy).sum() + (many.xy * many.xx).sum()

    rows = [torch.randn(2, 3, 67).to(device) for _ in range(4)]
    eager_leaves, compiled_leaves = leaves_of(*rows), leaves_of(*rows)
    eager = loss(*eager_leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    assert same_bits(eager, compiled)
    assert same_bits(
        torch.autograd.grad(eager, eager_leaves), torch.autograd.grad(compiled, compiled_leaves)
    )


# ---------------------------------------------------------------- memory


@interpreted
@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("kind", ["odd", "padded", "interleaved", "layers"])
def test_bounds_and_races(kind: str, dtype: torch.dtype) -> None:
    """No load outside the rows, no store outside the gradients, no two programs at one address;
    the addresses of a table stand for tensors that a launch never sees."""
    mask = torch.tensor([[True, False], [True, True]])
    if kind in ("odd", "padded"):
        sides = [[laid_out(torch.randn(2, 2, 131).to(dtype), kind)] for _ in "xy"]
    else:
        layout = "contiguous" if kind == "layers" else kind
        sides = [layer_layouts(layout, (2, 2, 131), dtype, "cpu") for _ in "xy"]
    xs, ys = (leaves_of(*side) for side in sides)
    with guard(xs, ys, mask):
        stats = onepass.row_moments(xs, ys, mask, impl="triton")
        torch.stack(list(stats)).sum().backward()


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@interpreted
@pytest.mark.parametrize("layers", [1, 3], ids=lambda n: f"L{n}")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_every_byte_moves_once(layers: int, dtype: torch.dtype) -> None:
    """One launch a pass, whatever the number of layers: rows read once forward and once backward,
    gradients written once."""
    sides = [[torch.randn(2, 1003).to(dtype) for _ in range(layers)] for _ in "xy"]
    if layers > 1:  # a table promises aligned addresses: rows that start there are not copied
        sides = [[laid_out(row, "padded") for row in side] for side in sides]
    xs, ys = (leaves_of(*side) for side in sides)
    leaves = [*xs, *ys]
    with count_bytes() as forward:
        stats = onepass.row_moments(xs, ys, impl="triton")
    assert forward.launches == ["row_moments_kernel"]
    assert [forward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]
    assert forward.written() == 5 * 4 * 2 * layers
    with count_bytes() as backward:
        got = gradients(stats, leaves, upstream_for((layers, 2), xs[0]))
    assert backward.launches == ["row_moments_backward_kernel"]
    assert [backward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]
    for grad in got:
        assert backward.written(grad) == backward.distinct_written(grad) == tensor_bytes(grad)
    big = sum(map(tensor_bytes, leaves))
    assert backward.written() == big
    # Beside the rows only 5 numbers a row, and 2 or 4 addresses a row from the tables.
    assert forward.read() <= big + 2 * 8 * 2 * layers
    assert backward.read() <= big + (5 * 4 + 4 * 8 * 2) * 2 * layers


@interpreted
@pytest.mark.parametrize("want", [("dd",), ("xx", "yy", "xy")], ids="-".join)
def test_only_the_moments_that_are_wanted_are_written(want: tuple[str, ...]) -> None:
    x, y = draw((3, 200), BF16, "cpu")
    with count_bytes() as forward:
        onepass.row_moments(x, y, want=want, impl="triton")
    assert forward.written() == 4 * 3 * len(want)
    assert forward.read() <= 2 * tensor_bytes(x)


@interpreted
def test_masked_rows_are_not_read() -> None:
    x, y = leaves_of(*draw((2, 3, 200), BF16, "cpu"))
    mask = torch.tensor([[True, False, False], [True, True, False]])
    row = 200 * 2
    with count_bytes() as forward:
        stats = onepass.row_moments(x, y, mask, impl="triton")
    assert [forward.read(side) for side in (x, y)] == [3 * row] * 2
    with count_bytes() as backward:
        got = gradients(stats, [x, y], upstream_for((2, 3), x))
    assert [backward.read(side) for side in (x, y)] == [3 * row] * 2
    # Their zeros are written all the same.
    assert [backward.written(grad) for grad in got] == [tensor_bytes(grad) for grad in got]


@interpreted
def test_only_the_gradient_that_is_asked_for_is_written() -> None:
    x, y = draw((2, 200), FP32, "cpu")
    (leaf,) = leaves_of(x)
    stats = onepass.row_moments(leaf, y, impl="triton")
    with count_bytes() as backward:
        (grad,) = gradients(stats, [leaf], upstream_for((2,), x))
    assert backward.written() == backward.written(grad) == tensor_bytes(x)


# ---------------------------------------------------------------- error budget


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_pooled_error_is_within_five_percent_of_unfused_torch(
    impl: str, dtype: torch.dtype, device: str
) -> None:
    """The geometric mean over many rows of every moment and gradient, each
    measured against fp64; one row may be 3 times as far off above 8 u."""
    pooled = dict[str, list[Tensor]]()
    rows = 60 if impl == "torch" else 12
    for hidden_size in (64, 1000):
        for distance in (None, 1e-2):
            x, y = draw((rows, hidden_size), dtype, device, distance=distance)
            leaves, usual_leaves = leaves_of(x, y), leaves_of(x, y)
            stats, usual = onepass.row_moments(*leaves, impl=impl), unfused(*usual_leaves)
            upstream = upstream_for((rows,), x)
            truths = moments(x, y)
            measured = {name: (getattr(stats, name), usual[name], truths[name]) for name in MOMENTS}
            sides = zip(
                gradients(stats, leaves, upstream),
                gradients(usual, usual_leaves, upstream),
                moments_gradients(x, y, upstream),
                strict=True,
            )
            measured |= zip(("dx", "dy"), sides, strict=True)
            for name, (mine, other, want) in measured.items():
                mine_u, other_u = (
                    error_in_u(got.detach().cpu(), want).view(rows, -1).amax(-1).clamp_min(0.5)
                    for got in (mine, other)
                )
                assert (mine_u <= FACTOR * other_u.clamp_min(FLOOR)).all(), name
                pooled.setdefault(name, []).append((mine_u / other_u).log())
    ratios = {name: float(torch.cat(logs).mean().exp()) for name, logs in pooled.items()}
    assert len(ratios) == 7
    assert max(ratios.values()) <= 1.05, ratios


def test_layers_one_by_one_while_a_graph_is_captured(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No table of addresses then: a replay would copy it from memory that is long gone."""
    if NO_TRITON:
        pytest.skip(NO_TRITON)
    x, y = ([torch.randn(5, 40, device=device, requires_grad=True) for _ in range(3)] for _ in "xy")
    mask = torch.tensor([1, 0, 1, 1, 0], device=device)
    results = []
    for in_capture in (False, True):
        monkeypatch.setattr(module, "capturing", lambda t, answer=in_capture: answer)
        moments = onepass.row_moments(x, y, mask, impl="triton")
        grads = torch.autograd.grad(torch.stack(tuple(moments)).sum(), [*x, *y])
        results.append([*moments, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---------------------------------------------------------------- bad input

X, Y = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
BAD: dict[str, tuple[tuple[Any, ...], type[Exception], str]] = {
    "x_is_integers": ((X.long(), Y.long()), ValueError, "x must be .*got torch.int64"),
    "y_is_integers": ((X, Y.int()), ValueError, "y must be .*got torch.int32"),
    "x_is_an_array": ((X.numpy(), Y), TypeError, "x must be a torch.Tensor or .*got ndarray"),
    "y_is_a_list": ((X, [Y]), TypeError, "both lists of layers: got Tensor and list"),
    "y_is_none": ((X, None), TypeError, "y must be a torch.Tensor or .*NoneType"),
    "other_shape": ((X, Y[:, :2]), ValueError, r"x and y must agree.*\(2, 3, 5\).*\(2, 2, 5\)"),
    "other_width": ((X, Y[..., :4]), ValueError, r"\(2, 3, 5\).*\(2, 3, 4\)"),
    "would_broadcast": ((X, Y[:1]), ValueError, r"\(2, 3, 5\).*\(1, 3, 5\)"),
    "other_dtype": ((X, Y.bfloat16()), ValueError, r"x and y must agree.*float32.*bfloat16"),
    "scalars": ((X[0, 0, 0], Y[0, 0, 0]), ValueError, r"x must be \[\.\.\., D\] .*got shape \(\)"),
    "no_columns": ((X[..., :0], Y[..., :0]), ValueError, r"D > 0.*\(2, 3, 0\)"),
    "numbers_of_layers": (([X, X], [Y]), ValueError, "same number of layers: got 2 and 1"),
    "no_layers": (([], []), ValueError, "same number of layers: got 0 and 0"),
    "layer_shapes": (([X, X[:1]], [Y, Y[:1]]), ValueError, r"layers must agree.*\(1, 3, 5\)"),
    "layer_dtypes": (
        ([X, X.half()], [Y, Y.half()]), ValueError, r"layers must agree.*x\[1\].*float16",
    ),
    "a_layer_is_none": (([X, None], [Y, Y]), TypeError, r"x\[1\] must be .*got NoneType"),
    "mask_of_columns": ((X, Y, torch.ones(2, 3, 5)), ValueError, r"\(2, 3\): got \(2, 3, 5\)"),
    "mask_of_one_row": ((X, Y, torch.ones(3)), ValueError, r"mask .*\(2, 3\): got \(3,\)"),
    "want_unknown": ((X, Y, None, ("dd", "yx")), ValueError, "want has no 'yx': choose among dd"),
    "mask_is_a_list": ((X, Y, [1, 0]), TypeError, r"mask .*torch.Tensor: got list"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the argument, what came and what was wanted; before anything runs."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(module, "_row_moments", never)
    args, kind, message = BAD[name]
    options = {"want": args[3]} if len(args) > 3 else {}
    with pytest.raises(kind, match=message) as caught:
        onepass.row_moments(*args[:3], **options)
    assert "\n" not in str(caught.value)


def test_sides_on_two_devices() -> None:
    with pytest.raises(ValueError, match="meta.*cpu|cpu.*meta"):
        onepass.row_moments(X, Y.to("meta"))


@pytest.mark.parametrize("impl_name", ["cuda", None, 1])
def test_unknown_implementation(impl_name: Any) -> None:
    with pytest.raises(ValueError, match="impl must be one of auto, triton, torch: got"):
        onepass.row_moments(X, Y, impl=impl_name)
