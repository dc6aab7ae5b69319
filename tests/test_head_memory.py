"""The fused head's memory: the formula of docs/head.md, and what is left when it runs out."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import onepass
from onepass.bench.measure import _peak_bytes
from onepass.ops import head as module

ROWS, SIZE, VOCABULARY = 512, 64, 16000
PARTS = {"cpu": 32 << 20, "cuda": 0}  # beside a slab, whatever its size


def leaves(
    device: str, dtype: torch.dtype, frozen: bool, rows: int = ROWS
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(rows, SIZE, device=device).to(dtype).requires_grad_()
    weight = torch.randn(VOCABULARY, SIZE, device=device).to(dtype).requires_grad_(not frozen)
    return hidden, weight, torch.randint(VOCABULARY, (rows,), device=device)


def run(
    hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, **options: object
) -> list[Tensor]:
    """Forward and backward in slabs of so many rows."""
    limit = rows * VOCABULARY * hidden.element_size()
    lazy = onepass.LazyLogits(hidden, weight, max_slab_bytes=limit, **options)  # type: ignore[arg-type]
    loss = onepass.cross_entropy(lazy, labels)
    return list(torch.autograd.grad(loss, [t for t in (hidden, weight) if t.requires_grad]))


def allowance(hidden: Tensor, weight: Tensor, rows: int) -> int:
    """docs/head.md's sum, beside the gradients."""
    width, on_cpu = hidden.element_size(), hidden.device.type == "cpu"
    few = ROWS <= rows * (module.FEW_SLABS if on_cpu else 1)
    sums = 0 if width == 4 or few or not weight.requires_grad else 4 * weight.numel()
    products = sums if not on_cpu and ROWS > rows else 0
    return (
        rows * (VOCABULARY + SIZE) * width
        + PARTS[hidden.device.type]
        + 40 * ROWS
        + sums
        + products
        + (1 << 20)  # an allocator's rounding, a GEMM's workspace
    )


@pytest.mark.parametrize("mode", ["auto", "recompute"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rows", [64, 256, 512])
def test_peak_is_the_documented_sum(
    rows: int, dtype: torch.dtype, frozen: bool, mode: str, device: str
) -> None:
    hidden, weight, labels = leaves(device, dtype, frozen)
    run(hidden, weight, labels, rows, mode=mode)
    with _peak_bytes(hidden.device) as peak:
        grads = run(hidden, weight, labels, rows, mode=mode)
    results = sum(grad.numel() * grad.element_size() for grad in grads)
    assert peak[0] - results <= allowance(hidden, weight, rows)


def test_a_softcap_needs_no_second_slab() -> None:
    hidden, weight, labels = leaves("cpu", torch.float32, frozen=True, rows=2048)
    lazy = onepass.LazyLogits(hidden, weight, softcap=20.0, max_slab_bytes=1 << 30)
    with _peak_bytes(hidden.device) as peak:
        onepass.cross_entropy(lazy, labels).backward()
    assert peak[0] <= 2048 * VOCABULARY * 4 + PARTS["cpu"] + (4 << 20)


@pytest.fixture
def failing_second_slab(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Makes the product of every second slab run out of memory while the list is empty."""
    product, calls, mended = module.Slabs.product, [0], list[int]()

    def failing(*args: object) -> Tensor:
        calls[0] += 1
        if not mended and calls[0] % 2 == 0:
            raise torch.OutOfMemoryError("no memory for a slab")
        return product(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module.Slabs, "product", failing)
    yield mended


@pytest.mark.parametrize("mode", ["auto", "recompute"])
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
def test_running_out_of_memory_changes_nothing(
    frozen: bool, mode: str, device: str, failing_second_slab: list[int]
) -> None:
    hidden, weight, labels = leaves(device, torch.float32, frozen)
    before = [t.detach().clone() for t in (hidden, weight, labels)]
    with pytest.raises(torch.OutOfMemoryError):
        run(hidden, weight, labels, 256, mode=mode)
    for tensor, old in zip((hidden, weight, labels), before, strict=True):
        assert torch.equal(tensor, old) and tensor.grad is None
    failing_second_slab.append(1)
    again = run(hidden, weight, labels, 256, mode=mode)
    whole = torch.nn.functional.cross_entropy(hidden @ weight.T, labels)
    truth = torch.autograd.grad(whole, [t for t in (hidden, weight) if t.requires_grad])
    for got, expected in zip(again, truth, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-6 * scale)


def test_a_backward_may_come_twice(device: str) -> None:
    """The gradients made in the forward are scaled in place only in the last one."""
    hidden, weight, labels = leaves(device, torch.float32, frozen=False, rows=8)
    loss = onepass.cross_entropy(onepass.LazyLogits(hidden, weight), labels)
    first = torch.autograd.grad(3 * loss, [hidden, weight], retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = torch.autograd.grad(-0.5 * loss, [hidden, weight])
    for one, old, other in zip(first, kept, second, strict=True):
        assert torch.equal(one, old)
        torch.testing.assert_close(other, one * (-0.5 / 3), rtol=1e-6, atol=0)
