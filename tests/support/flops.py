"""Matrix products, counted by torch's profiler."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def counted_flops(call: Callable[[], object]) -> int:
    """FLOP of the matrix products that `call` makes, in torch's operators and in ours alike."""
    with profile(
        activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True
    ) as profiler:
        call()
    total = 0
    for event in profiler.events():
        first = {"aten::mm": 0, "aten::addmm": 1, "aten::addmm_": 1}.get(event.name)
        if first is not None:
            (rows, inner), (_, columns) = event.input_shapes[first : first + 2]
            total += 2 * rows * inner * columns
        elif event.name == "mkldnn::_linear_pointwise":  # a b^T
            (rows, inner), (columns, _) = event.input_shapes[:2]
            total += 2 * rows * inner * columns
        assert event.name not in ("aten::bmm", "aten::baddbmm"), "a product that is not counted"
    return total
