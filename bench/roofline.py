"""What a case must cost ours: matrix products, bytes, launches; and what a card would need for it.

The milliseconds are a prediction, not a measurement: the phases of a case wait for each other, so
each takes the longer of its arithmetic and its traffic, and they add up. Temporaries, vectors of
one number a row and the launches themselves are left out: they show as measured / predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from .schema import Case, Size


class Card(NamedTuple):
    """What a card sustains: of a bf16 product in FLOP/s, of its memory in bytes/s."""

    name: str
    flops: float
    bandwidth: float


# H200: 76% and 90% of what the data sheet says, as dense bf16 products and row kernels are reported
# to reach. H100: three products of this shape at 728 TFLOP/s (huggingface/trl#7244), row kernels at
# 3.0 TB/s (QuACK's README). Reported by others, not measured here.
CARDS = (Card("H200", 750e12, 4.3e12), Card("H100", 728e12, 3.0e12))


class Phase(NamedTuple):
    """Work that can overlap with itself and with nothing before or after."""

    what: str
    flops: float
    bytes: float


@dataclass(frozen=True)
class Roofline:
    """The least that one provider does in one mode of a case."""

    products: int  # matrix products over all rows that count, 2 N D V FLOP each
    launches: int | None  # of Triton kernels; None where there are none of ours
    phases: tuple[Phase, ...]
    has_peak: bool = True  # whether a card's FLOP/s are those of this dtype

    @property
    def gemm_units(self) -> int:
        """N D V multiply-adds, twice for each."""
        return 2 * self.products

    @property
    def flops(self) -> float:
        return sum(phase.flops for phase in self.phases)

    @property
    def bytes(self) -> float:
        return sum(phase.bytes for phase in self.phases)

    def milliseconds(self, card: Card) -> float | None:
        """The phases one after another; None for products in a dtype without a known peak."""
        if self.flops and not self.has_peak:
            return None
        seconds = (max(p.flops / card.flops, p.bytes / card.bandwidth) for p in self.phases)
        return 1e3 * sum(seconds)


def card_of(device: str) -> Card | None:
    """The card that a device's name stands for."""
    return next((card for card in CARDS if card.name in device), None)


def predict(case: Case, size: Size, mode: str, provider: str) -> Roofline | None:
    """The roofline of `onepass` and of the bare products; None of others, who plan otherwise."""
    if provider not in ("onepass", "gemms") or not case.has_roofline:
        return None
    if case.traffic is not None:
        return _of_logits(case, size, mode)
    return _of_head(case, size, mode, bare=provider == "gemms")


def columns(case: Case, size: Size, mode: str, provider: str, device: str) -> dict[str, Any]:
    """What a row of results says of it, for its own card or else for the first of CARDS."""
    roofline = predict(case, size, mode, provider)
    if roofline is None:
        return {}
    card = card_of(device) or CARDS[0]
    ms = roofline.milliseconds(card)
    return {
        "gemm_units": roofline.gemm_units,
        "flops": round(roofline.flops),
        "bytes": round(roofline.bytes),
        "launches": roofline.launches,
        "predicted_ms": None if ms is None else round(ms, 5),
        "predicted_on": card.name,
    }


def _width(size: Size) -> int:
    return 4 if size.dtype == "float32" else 2


def _of_logits(case: Case, size: Size, mode: str) -> Roofline:
    assert case.traffic is not None
    read, written = case.traffic(size)
    forward = Phase("facts", 0, case.passes * read * _width(size))
    backward = Phase("gradient", 0, (read + written) * _width(size))
    phases = {"forward": (forward,), "backward": (backward,), "full": (forward, backward)}[mode]
    launches = {"forward": case.launches[0], "backward": case.launches[1]}
    return Roofline(0, launches.get(mode, sum(case.launches)), phases)


def _of_head(case: Case, size: Size, mode: str, bare: bool) -> Roofline:
    from ..ops.head import SLAB_BYTES_ON_GPU

    assert size.V is not None and size.D is not None
    width, is_trained = _width(size), "weight" in case.wrt
    rows = size.N - round(size.N * size.masked)
    slabs = 1 if bare else max(1, -(-rows // (SLAB_BYTES_ON_GPU // (size.V * width))))
    states, head, logits = (width * n for n in (rows * size.D, size.V * size.D, rows * size.V))
    # The head's gradient: one slab writes it in its dtype, more are summed in fp32.
    sums = head if slabs == 1 else 4 * size.V * size.D

    flops = 2 * rows * size.D * size.V
    product = Phase("product", flops, states + slabs * head + logits)
    facts, gradient = Phase("facts", 0, logits), Phase("gradient", 0, 2 * logits)
    result = head if bare else (2 * slabs - 1) * sums
    of_head = Phase("product", flops, states + logits + result)
    made = [product, of_head] if is_trained else [product]  # as many bytes towards the states
    if bare:
        forward, backward, launches = [product], made, None
    else:
        # Once an upstream gradient is known: scaled and rounded, where the forward made it.
        scaled = [Phase("scaled", 0, 2 * states + (sums + head if is_trained else 0))]
        forward, backward = [product, facts], [product, gradient, *made, *scaled]
        if case.foretold and mode != "forward":
            forward, backward = [*forward, gradient, *made], scaled
        per_slab = {"forward": case.launches[0], "full": sum(case.launches)}
        per_slab["backward"] = 0 if case.foretold else case.launches[1]
        launches = slabs * per_slab[mode]
    phases = {"forward": forward, "backward": backward, "full": [*forward, *backward]}[mode]
    products = sum(phase.flops > 0 for phase in phases)
    return Roofline(products, launches, tuple(phases), has_peak=size.dtype != "float32")
