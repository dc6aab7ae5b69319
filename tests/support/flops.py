"""Matrix products, counted by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def products(call: Callable[[], object], batched: bool = False) -> list[tuple[int, int, int]]:
    """(rows, inner, columns) of the matrix products that `call` makes, in torch's operators and in
    ours alike; `batched` ones, as attention's, are passed over or fail."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profiler:
        call()
    found = []
    for event in profiler.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is not None:
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            found.append((rows, inner, columns))
        elif event.name == "mkldnn::_linear_pointwise":  # a b^T
            (rows, inner), (columns, _) = event.input_shapes[:2]
            found.append((rows, inner, columns))
        elif event.name in ("aten::bmm", "aten::baddbmm"):
            assert batched, "a product that is not counted"
    return found


def counted_flops(call: Callable[[], object]) -> int:
    """FLOP of the matrix products that `call` makes."""
    return sum(2 * rows * inner * columns for rows, inner, columns in products(call))
