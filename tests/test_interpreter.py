"""What the kernels rely on in Triton's interpreter, as tests/support/interpreter.py mends it.

The other tests take the interpreter's word for what a GPU would compute. These check the word:
against torch, NumPy in fp64 or exact fractions, wherever the two could differ.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from support.guard import guard
from support.interpreter import patched_interpreter, round_to_bf16_bits

kernels = pytest.importorskip("support.operation_kernels", reason="Triton is not installed")
pytestmark = pytest.mark.usefixtures("interpreter_only")


# ---------------------------------------------------------------- helpers


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, NaN to NaN, and zeros of the same sign."""
    return bool(
        torch.equal(actual.isnan(), expected.isnan())
        and torch.equal(actual.nan_to_num(), expected.nan_to_num())
        and torch.equal(actual.signbit() | actual.isnan(), expected.signbit() | expected.isnan())
    )


def run(operation: Any, x: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:
    y = torch.zeros_like(x) if y is None else y
    out = torch.empty_like(x)
    with np.errstate(all="ignore"):
        kernels.combine[(1,)](x, y, out, BLOCK=x.numel(), OPERATION=operation)
    return out


def ulps(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest distance from the fp64 value in units of its last fp32 place, subnormals too."""
    rounded = expected.float().numpy()
    assert np.isfinite(rounded).all()
    unit = np.spacing(np.abs(rounded)).astype(np.float64)
    return float(np.max(np.abs(actual.double().numpy() - expected.numpy()) / unit))


EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40, 3.4e38, 1.5, -7.25]


def edge_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of edge values, filled up with random ones to a power of two."""
    x = torch.tensor(EDGES).repeat_interleave(len(EDGES))
    y = torch.tensor(EDGES).repeat(len(EDGES))
    fill = 1024 - x.numel()
    return torch.cat([x, torch.randn(fill)]), torch.cat([y, torch.randn(fill)])


# ---------------------------------------------------------------- bf16


def test_bf16_rounding_is_torchs_bit_for_bit() -> None:
    """Every bf16 value with every kind of tail behind it: below, at and above half a unit."""
    heads = torch.arange(2**16, dtype=torch.int64) << 16
    for tail in (0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        bits = heads | tail
        x = torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
        ours = torch.from_numpy(round_to_bf16_bits(x.numpy()).view(np.int16)).view(torch.bfloat16)
        theirs = x.to(torch.bfloat16)
        assert torch.equal(ours.isnan(), theirs.isnan())
        finite = ~theirs.isnan()
        assert torch.equal(ours.view(torch.int16)[finite], theirs.view(torch.int16)[finite])


@pytest.mark.parametrize("source", [torch.float64, torch.float32, torch.float16, torch.int32])
def test_stores_to_bf16_round_as_torch_does(source: torch.dtype) -> None:
    x = (torch.randn(2048) * 300).to(source)
    out = torch.empty(2048, dtype=torch.bfloat16)
    kernels.convert[(2,)](x, out, BLOCK=1024)
    assert torch.equal(out, x.to(torch.bfloat16))
    if source.is_floating_point:
        kernels.convert_explicitly[(1,)](x, out, BLOCK=2048, ROUNDING=None)
        assert torch.equal(out, x.to(torch.bfloat16))


def test_truncation_is_still_to_be_had() -> None:
    x = torch.randn(256)
    out = torch.empty(256, dtype=torch.bfloat16)
    kernels.convert_explicitly[(1,)](x, out, BLOCK=256, ROUNDING="rtz")
    expected = (x.view(torch.int32) & ~0xFFFF).view(torch.float32)
    assert torch.equal(out.float(), expected)
    assert not torch.equal(out, x.to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_loads_exactly(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    out = torch.empty(2**16)
    kernels.convert[(1,)](x, out, BLOCK=2**16)
    assert same(out, x.float())


@pytest.mark.parametrize("source", [torch.float64, torch.float32])
def test_stores_to_fp16_round_as_torch_does(source: torch.dtype) -> None:
    x = torch.cat([torch.randn(1000), torch.tensor([65504.0, 6e-8, 2e-8, -0.0])]).to(source)
    x = torch.cat([x, x.new_zeros(20)])
    out = torch.empty(1024, dtype=torch.float16)
    kernels.convert[(1,)](x, out, BLOCK=1024)
    assert same(out, x.to(torch.float16))


@pytest.mark.parametrize(
    "operation", [kernels.add, kernels.multiply, kernels.is_less], ids=lambda op: op.__name__
)
def test_bf16_arithmetic_is_refused(operation: Any) -> None:
    x = torch.ones(4, dtype=torch.bfloat16)
    with pytest.raises(Exception, match="bf16 .*: the interpreter would compute on bit patterns"):
        run(operation, x, x)


def test_bf16_reductions_are_refused() -> None:
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    out = [torch.empty(1) for _ in range(3)]
    with pytest.raises(Exception, match="bf16 reduction or scan"):
        kernels.reduce_rows[(1,)](x, *out, torch.empty(1, dtype=torch.int32), WIDTH=4)


def test_the_patches_go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime import interpreter as theirs

    from support import interpreter as ours

    places = [(owner, name) for owner, name, _ in ours._replacements(theirs)]
    before = [getattr(owner, name) for owner, name in places]
    with patched_interpreter():  # the tests' own patch is in: nothing to add
        assert before == [getattr(owner, name) for owner, name in places]
    monkeypatch.setattr(ours, "_patched", 0)
    with patched_interpreter():
        for (owner, name), old in zip(places, before, strict=True):
            assert getattr(owner, name) is not old
    assert before == [getattr(owner, name) for owner, name in places]


# ---------------------------------------------------------------- arithmetic


@pytest.mark.parametrize(
    ("operation", "reference"),
    [
        (kernels.add, torch.add),
        (kernels.subtract, torch.sub),
        (kernels.multiply, torch.mul),
        (kernels.divide, torch.div),
        (kernels.square_root, lambda x, y: x.double().sqrt().float()),  # torch's own is a unit off
        (kernels.magnitude, lambda x, y: x.abs()),
        (kernels.is_less, lambda x, y: (x < y).float()),
        (kernels.choose_first_if_larger, lambda x, y: torch.where(x > y, x, y)),
    ],
    ids=lambda value: getattr(value, "__name__", "torch"),
)
def test_fp32_is_ieee(operation: Any, reference: Any) -> None:
    """Divisions and roots are exact here and 1-2 units off on a GPU: budgets have to allow it."""
    x, y = edge_pairs()
    assert same(run(operation, x, y), reference(x, y))


def test_fma_rounds_once() -> None:
    x, y = torch.randn(512), torch.randn(512)
    z = -(x * y) * (1 + torch.randn(512) * torch.tensor([0.0, 2.0**-24, 1e-3, 1.0]).repeat(128))
    out = torch.empty(512)
    kernels.fused[(1,)](x, y, z, out, BLOCK=512)
    lists = x.tolist(), y.tolist(), z.tolist()
    exact = [Fraction(a) * Fraction(b) + Fraction(c) for a, b, c in zip(*lists, strict=True)]
    for value, truth in zip(out.tolist(), exact, strict=True):
        ends = np.array([-np.inf, np.inf], np.float32)
        others = np.nextafter(np.float32(value), ends).tolist()
        assert abs(Fraction(value) - truth) <= min(abs(Fraction(n) - truth) for n in others)
    assert (out != x * y + z).sum() > 256, "rounding twice would have to differ here"


def test_fma_rounds_once_where_fp64_would_round_twice() -> None:
    """Beside a tie of fp32 by less than fp64 can tell: the side decides."""
    out = torch.empty(1)
    x = torch.tensor([1.0 + 2.0**-12])  # squared: 1 + 2^-11 + 2^-24, a tie that goes to even
    kernels.fused[(1,)](x, x, torch.tensor([2.0**-60]), out, BLOCK=1)
    assert out.item() == 1.0 + 2.0**-11 + 2.0**-23
    kernels.fused[(1,)](x, x, torch.tensor([-(2.0**-60)]), out, BLOCK=1)
    assert out.item() == 1.0 + 2.0**-11


def test_maximum_ignores_nan_as_a_gpu_does() -> None:
    x, y = edge_pairs()
    for operation, reference in ((kernels.larger, torch.fmax), (kernels.smaller, torch.fmin)):
        expected = reference(x, y)
        actual = run(operation, x, y)
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num())
    assert same(run(kernels.larger_or_nan, x, y).abs(), torch.maximum(x, y).abs())


def test_exp_and_log_are_good_to_three_units() -> None:
    """A GPU's exp is |x| units off: only its exactness at these points may be relied on."""
    x = torch.linspace(-103.0, 88.0, 8192)
    assert ulps(run(kernels.exponential, x), x.double().exp()) <= 3.0
    assert ulps(run(kernels.exponential_of_2, x), x.double().exp2()) <= 3.0
    x = torch.exp(torch.linspace(-80.0, 80.0, 8192))
    assert ulps(run(kernels.logarithm, x), x.double().log()) <= 3.0
    edges = torch.tensor([0.0, -math.inf, math.inf, math.nan])
    assert same(run(kernels.exponential, edges), torch.tensor([1.0, 0.0, math.inf, math.nan]))
    assert same(
        run(kernels.logarithm, edges), torch.tensor([-math.inf, math.nan, math.inf, math.nan])
    )


def test_int32_products_wrap_and_int64_do_not() -> None:
    x = torch.tensor([2**30, 2**31 - 1, -(2**31), 50257], dtype=torch.int32)
    y = torch.tensor([5, 2, -1, 65536], dtype=torch.int32)
    wrapped = ((x.long() * y + 2**31) % 2**32 - 2**31).to(torch.int32)
    assert torch.equal(run(kernels.multiply, x, y), wrapped)
    out = torch.empty(4, dtype=torch.int64)
    kernels.combine[(1,)](x, y, out, BLOCK=4, OPERATION=kernels.wide_multiply)
    assert torch.equal(out, x.long() * y.long())


def test_integer_division_truncates() -> None:
    x = torch.tensor([-7, 7, -8, 7], dtype=torch.int32)
    y = torch.tensor([2, -2, 2, 2], dtype=torch.int32)
    assert run(kernels.floor_divide, x, y).tolist() == [-3, -3, -4, 3]
    assert run(kernels.remainder, x, y).tolist() == [-1, 1, 0, 1]


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("other", [0.0, -math.inf, -2.5])
def test_masked_lanes_get_other(dtype: torch.dtype, other: float) -> None:
    """The lanes beyond the mask are not even read: behind them lies nothing the guard allows."""
    x, out = torch.randn(5).to(dtype), torch.empty(8, dtype=dtype)
    with guard(x, out):
        kernels.masked[(1,)](x, out, 5, OTHER=other, BLOCK=8)
    assert torch.equal(out, torch.cat([x, torch.full((3,), other, dtype=dtype)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_masked_lanes_without_other_are_poison(dtype: torch.dtype) -> None:
    x, out = torch.randn(5).to(dtype), torch.zeros(8, dtype=dtype)
    kernels.masked_without_other[(1,)](x, out, 5, BLOCK=8)
    assert torch.equal(out[:5], x)
    assert out[5:].isnan().all()
    labels, seen = torch.arange(5), torch.zeros(8, dtype=torch.int64)
    kernels.masked_without_other[(1,)](labels, seen, 5, BLOCK=8)
    assert seen.tolist() == [0, 1, 2, 3, 4] + [0x7A7A7A7A7A7A7A7A] * 3


# ---------------------------------------------------------------- order


def test_cumulative_sums_run_left_to_right() -> None:
    x = torch.randn(512) * 1000
    out = torch.empty(512)
    kernels.running_sum[(1,)](x, out, BLOCK=512)
    total, expected = np.float32(0), []
    for value in x.numpy():
        total = np.float32(total + value)
        expected.append(total)
    assert out.tolist() == [float(value) for value in expected]


def test_loops_carry_values_in_order() -> None:
    """Lane i adds columns i, i + 16, i + 32, ... in that order, the last ones masked."""
    x = torch.randn(85) * 1000
    out = torch.empty(16)
    kernels.sum_in_a_loop[(1,)](x, out, 85, BLOCK=16)
    expected = torch.zeros(16)
    for row in torch.nn.functional.pad(x, (0, 11)).view(6, 16):
        expected = expected + row
    assert torch.equal(out, expected)


def test_reductions_over_a_row() -> None:
    x = torch.randn(4, 256)
    x[1, 7] = x[1, 200] = 9.0  # a tie: the lowest place wins
    x[2, :] = -math.inf
    x[3, 0] = math.inf
    total, top, low = torch.empty(4), torch.empty(4), torch.empty(4)
    place = torch.empty(4, dtype=torch.int32)
    kernels.reduce_rows[(4,)](x, total, top, low, place, WIDTH=256)
    assert same(top, x.amax(1)) and same(low, x.amin(1))
    assert place.tolist() == [int(x[0].argmax()), 7, 0, 0]
    finite = x[:2].double().sum(1)
    assert ((total[:2] - finite).abs() <= 1e-6 * x[:2].abs().double().sum(1)).all()
    again = torch.empty(4)
    kernels.reduce_rows[(4,)](x, again, top, low, place, WIDTH=256)
    assert same(total, again)


def test_reduction_of_pairs_by_a_function_of_ours() -> None:
    x = torch.tensor([3.0, -1.0, 8.0, 8.0, 2.0, -math.inf, 0.0, 7.0])
    value, place = torch.empty(1), torch.empty(1, dtype=torch.int32)
    kernels.reduce_pairs[(1,)](x, value, place, WIDTH=8)
    assert (value.item(), place.item()) == (8.0, 2)


@pytest.mark.parametrize("extra", [None, 0.5])
def test_branches_on_scalars(extra: float | None) -> None:
    """A row whose label is negative is left alone; None is an absent pointer."""
    labels = torch.tensor([3, -100, 0])
    out = torch.full((3,), -1.0)
    pointer = None if extra is None else torch.tensor([extra])
    kernels.branch_on_scalars[(3,)](labels, pointer, out)
    assert out.tolist() == [3.0 + (extra or 0.0), -1.0, 23.0 + (extra or 0.0)]
