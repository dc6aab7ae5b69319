"""The three jigsaw cross-entropies' memory: no logits of any side, whatever is differentiated."""

from __future__ import annotations

import pytest
import torch

from onepass.bench.jigsaw import JIGSAW_CASE
from onepass.bench.measure import _peak_bytes, forward_backward
from onepass.bench.schema import Size
from onepass.ops.head import SLAB_BYTES_ON_CPU
from support.flops import counted_flops

PROVIDERS = {provider.name: provider for provider in JIGSAW_CASE.providers}


def peak_of(provider: str, size: Size, device: str) -> tuple[int, int]:
    """Bytes at the peak of forward and backward beyond the inputs; of the gradients."""
    function = PROVIDERS[provider].load()
    inputs = JIGSAW_CASE.inputs(size, torch.Generator(device).manual_seed(0))
    if provider == "onepass":  # what is made once
        forward_backward(function, inputs, JIGSAW_CASE)
    with _peak_bytes(torch.device(device)) as peak:
        _, gradients = forward_backward(function, inputs, JIGSAW_CASE)
    return peak[0], sum(g.numel() * g.element_size() for g in gradients)


def test_an_eighth_of_the_plain_transcription() -> None:
    size = Size(1024, 32000, 256, dtype="float32", masked=0.25)
    ours, gradients = peak_of("onepass", size, "cpu")
    plain, _ = peak_of("eager", size, "cpu")
    assert ours <= plain / 8, f"{ours / 2**20:.1f} MiB, plain {plain / 2**20:.1f}"
    # Slabs of both sides, the torch path's three temporaries of 4 MiB, and vectors of rows.
    assert ours <= gradients * 2 + SLAB_BYTES_ON_CPU + (16 << 20)


def test_more_rows_need_no_more_logits() -> None:
    few, many = (Size(n, 16000, 32, dtype="float32") for n in (1024, 4096))
    peaks = [peak_of("onepass", size, "cpu") for size in (few, many)]
    beside = [peak - 2 * gradients for peak, gradients in peaks]
    assert beside[1] <= beside[0] * 1.1 + (4 << 20)


@pytest.mark.parametrize(("wrt", "products"), [(("teacher", "student"), 7), ((), 4)])
def test_products_are_the_least(wrt: tuple[str, ...], products: int) -> None:
    """Four sides forward; backward those that are differentiated, the clean teacher never."""
    size = Size(64, 96, 24, dtype="float32")
    inputs = JIGSAW_CASE.inputs(size, torch.Generator().manual_seed(0))
    for name in wrt:
        inputs[name].requires_grad_()
    function = PROVIDERS["onepass"].load()

    def call() -> None:
        loss = torch.stack(function(inputs)).sum()
        if wrt:
            loss.backward()

    call()
    assert counted_flops(call) == products * 2 * 64 * 24 * 96
