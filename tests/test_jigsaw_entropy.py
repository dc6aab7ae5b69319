"""onepass.jigsaw.entropy against plain transcriptions and against Gaussians of known entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.bench.measure import _peak_bytes
from onepass.jigsaw import entropy as module
from onepass.jigsaw import (
    gaussian_entropy_log_loss,
    gaussian_mixture_entropy,
    mutual_information_sub_batch,
    square_mahalanobis_distance,
    voronoi_characteristic_length,
)
from onepass.ops import gaussian

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
HALF_LOG = 0.5 * math.log(2 * math.pi)
PARTS = (
    "gaussian_mixture_mahalanobis_distance_loss",
    "gaussian_mixture_log_constants_and_determinant_loss",
)
NAMES = ("means", "stds", "clean", "noisy")

Batch = dict[str, Tensor]

# ---------------------------------------------------------------- helpers


def batch(
    device: str, sequences: int = 4, length: int = 3, width: int = 5, dtype: torch.dtype = FP32
) -> Batch:
    """A batch and the transform that made its noisy half, as leaves."""
    shape = (sequences, length, width)
    made = {"means": torch.randn(shape), "stds": 0.3 + torch.rand(shape)}
    made["clean"] = torch.randn(shape)
    made["noisy"] = made["clean"] + made["means"] + made["stds"] * torch.randn(shape)
    return {n: t.to(dtype).to(device).requires_grad_() for n, t in made.items()}


def mutual(b: Batch, mask: Tensor, *rest: Any, **options: Any) -> Tensor:
    return mutual_information_sub_batch(
        b["means"], b["stds"], mask, b["clean"], b["noisy"], *rest, **options
    )


def plain_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the features that count; 0 where none does."""
    keep = (mask if mask.dim() == values.dim() else mask[..., None]).expand(values.shape) != 0
    return torch.where(keep, values, 0.0).sum() / keep.sum().clamp_min(1)


def plain_pairwise(b: Batch, mask: Tensor, combine: bool = True) -> Tensor:
    half = len(mask) // 2
    own, other = slice(half), slice(half, 2 * half)
    kept = (mask[own] != 0) & (mask[other] != 0) if combine else mask[own] != 0
    gap = b["noisy"][own] - b["clean"][other] - b["means"][other]
    cross = HALF_LOG + b["stds"][other].log() + 0.5 * (gap / b["stds"][other]).square()
    return plain_mean(cross - HALF_LOG - 0.5 - b["stds"][own].log(), kept)


def plain_mixture(b: Batch, mask: Tensor, combine: bool = True) -> Tensor:
    """One sequence and one component at a time."""
    half = len(mask) // 2
    keep = (mask if mask.dim() == 3 else mask[..., None].expand(b["stds"].shape)) != 0
    kept = keep[:half] & keep[half : 2 * half].all(0) if combine else keep[:half]
    total, count = torch.zeros((), dtype=b["stds"].dtype), 0
    for a in range(half):
        logs = []
        for m in range(half, 2 * half):
            gap = b["noisy"][a] - b["clean"][m] - b["means"][m]
            log_p = -HALF_LOG - b["stds"][m].log() - 0.5 * (gap / b["stds"][m]).square()
            logs.append(log_p[kept[a]].sum())
        if kept[a].any():
            total = total - (torch.stack(logs).logsumexp(0) - math.log(half))
        count += int(kept[a].sum())
    own = plain_mean(HALF_LOG + 0.5 + b["stds"][:half].log(), kept)
    return total / max(count, 1) - own


def gradients(value: Tensor, b: Batch) -> list[Tensor]:
    found = torch.autograd.grad(value, list(b.values()), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(found, b.values(), strict=True)]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


MASKS = {
    "random": lambda b: torch.rand(b["stds"].shape[:2]) < 0.6,
    "features": lambda b: torch.rand(b["stds"].shape) < 0.6,
    "empty": lambda b: torch.zeros(b["stds"].shape[:2], dtype=torch.bool),
    "full": lambda b: torch.ones(b["stds"].shape[:2], dtype=torch.int64),
}

# ---------------------------------------------------------------- against transcriptions


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_mutual_information(
    impl: str, estimator: str, combine: bool, kind: str, device: str
) -> None:
    """Values and all gradients, an odd sequence left out."""
    b = batch(device, sequences=5)
    mask = MASKS[kind](b).to(device)
    got = mutual(b, mask, combine, estimator=estimator, impl=impl)
    plain = plain_mixture if estimator == "mixture" else plain_pairwise
    want = plain(b, mask, combine)
    close(got, want)
    for mine, theirs in zip(gradients(got, b), gradients(want, b), strict=True):
        close(mine, theirs)
        assert not mine[4].any()
    if kind == "empty":
        assert got == 0.0


@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_symmetrised(impl: str, estimator: str, device: str) -> None:
    b = batch(device, sequences=6)
    mask = (torch.rand(6, 3) < 0.7).to(device)
    swapped = {n: torch.cat([t[3:], t[:3]]) for n, t in b.items()}
    plain = plain_mixture if estimator == "mixture" else plain_pairwise
    want = (plain(b, mask) + plain(swapped, torch.cat([mask[3:], mask[:3]]))) / 2
    got = mutual(b, mask, estimator=estimator, symmetrise=True, impl=impl)
    close(got, want)
    for mine, theirs in zip(gradients(got, b), gradients(want, b), strict=True):
        close(mine, theirs)


def test_attention_mask(impl: str, device: str) -> None:
    b = batch(device)
    noise = (torch.rand(4, 3) < 0.8).to(device)
    attention = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1]]).to(device)
    for estimator in ("pairwise", "mixture"):
        got = mutual(b, noise, attention_mask=attention, estimator=estimator, impl=impl)
        close(got, mutual(b, noise & (attention != 0), estimator=estimator, impl=impl))
        features = noise[..., None].expand(4, 3, 5)
        close(got, mutual(b, features, attention_mask=attention, estimator=estimator, impl=impl))


@pytest.mark.parametrize("sequences", [0, 1])
@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_a_batch_without_two_halves(impl: str, estimator: str, sequences: int, device: str) -> None:
    b = batch(device, sequences=sequences)
    mask = torch.ones(sequences, 3).to(device)
    got = mutual(b, mask, estimator=estimator, symmetrise=True, impl=impl)
    assert got == 0.0 and got.requires_grad
    assert not any(grad.any() for grad in gradients(got, b))


@pytest.mark.parametrize("kind", MASKS)
def test_gaussian_mixture_entropy(impl: str, kind: str, device: str) -> None:
    """The result is the sum of the two parts that are logged."""
    b, other = batch(device), batch(device)
    mask = MASKS[kind](b).to(device)
    losses: dict[str, Tensor] = {"kept": torch.ones(())}
    got = gaussian_mixture_entropy(
        b["clean"], other["noisy"], b["means"], b["stds"], mask, losses, impl=impl
    )
    gap = other["noisy"] - b["clean"] - b["means"]
    distance = plain_mean(0.5 * (gap / b["stds"]).square(), mask)
    determinant = plain_mean(HALF_LOG + b["stds"].log(), mask)
    close(got, distance + determinant)
    assert list(losses) == ["kept", *PARTS]
    for name, want in zip(PARTS, (distance, determinant), strict=True):
        close(losses[name], want)
    leaves = {**b, "noisy": other["noisy"]}
    wanted = gradients(distance + determinant, leaves)
    for mine, theirs in zip(gradients(got, leaves), wanted, strict=True):
        close(mine, theirs)


def test_mutual_information_logs_the_same_parts(device: str) -> None:
    b = batch(device)
    mask = torch.ones(4, 3).to(device)
    losses: dict[str, Tensor] = {}
    got = mutual(b, mask, True, losses)
    assert tuple(losses) == PARTS
    own = HALF_LOG + 0.5 + b["stds"][:2].log().mean()
    close(got, losses[PARTS[0]] + losses[PARTS[1]] - own)
    mutual(b, mask, True, losses, symmetrise=True)
    there = gaussian_mixture_entropy(
        b["clean"][:2], b["noisy"][2:], b["means"][:2], b["stds"][:2], mask[:2]
    )
    here = gaussian_mixture_entropy(
        b["clean"][2:], b["noisy"][:2], b["means"][2:], b["stds"][2:], mask[:2]
    )
    close(losses[PARTS[0]] + losses[PARTS[1]], (there + here) / 2)
    mixture: dict[str, Tensor] = {}
    mutual(b, mask, True, mixture, estimator="mixture")
    assert mixture == {}


def test_square_mahalanobis_distance(impl: str, device: str) -> None:
    x, y = (torch.randn(2, 3, 7).to(device).requires_grad_() for _ in range(2))
    stds = (0.3 + torch.rand(3, 7)).to(device).requires_grad_()
    got = square_mahalanobis_distance(x, y, stds, impl=impl)
    want = ((x - y) / stds).square().sum(-1)
    assert got.shape == (2, 3)
    close(got, want)
    leaves = {"x": x, "y": y, "stds": stds}
    for mine, theirs in zip(
        gradients(got.sum(), leaves), gradients(want.sum(), leaves), strict=True
    ):
        close(mine, theirs, 1e-4)


@pytest.mark.parametrize("kind", [*MASKS, None])
def test_gaussian_entropy_log_loss(impl: str, kind: str | None, device: str) -> None:
    b = batch(device)
    mask = None if kind is None else MASKS[kind](b).to(device)
    got = gaussian_entropy_log_loss(b["stds"], mask, impl=impl)
    ones = torch.ones(4, 3).to(device)
    want = plain_mean(-(b["stds"] + 1e-8).log() - HALF_LOG - 0.5, ones if mask is None else mask)
    close(got, want)
    for mine, theirs in zip(gradients(got, b), gradients(want, b), strict=True):
        close(mine, theirs)
    assert math.isfinite(gaussian_entropy_log_loss(torch.zeros(2, 3).to(device), impl=impl))


@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_bf16(impl: str, estimator: str, device: str) -> None:
    b = batch(device, dtype=BF16)
    mask = torch.ones(4, 3).to(device)
    wide = {n: t.detach().float().requires_grad_() for n, t in b.items()}
    got = mutual(b, mask, estimator=estimator, impl=impl)
    want = mutual(wide, mask, estimator=estimator, impl="torch")
    assert got.dtype == FP32
    close(got, want)
    for mine, theirs in zip(gradients(got, b), gradients(want, wide), strict=True):
        assert mine.dtype == BF16
        close(mine.float(), theirs, 1e-2)


@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_gradcheck(estimator: str) -> None:
    b = batch("cpu", length=2, width=2, dtype=FP64)
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]])

    def value(*tensors: Tensor) -> Tensor:
        return mutual(dict(zip(NAMES, tensors, strict=True)), mask, estimator=estimator)

    assert torch.autograd.gradcheck(value, [b[n] for n in NAMES])


def test_what_does_not_count_never_leaks(impl: str, device: str) -> None:
    b = batch(device)
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]).to(device)
    dirty = {n: t.detach().clone() for n, t in b.items()}
    for name, tensor in dirty.items():
        tensor[mask == 0] = 0.0 if name == "stds" else math.nan
        tensor.requires_grad_()
    for estimator in ("pairwise", "mixture"):
        want = mutual(b, mask, estimator=estimator, impl=impl)
        got = mutual(dirty, mask, estimator=estimator, impl=impl)
        close(got, want)
        for mine, theirs in zip(gradients(got, dirty), gradients(want, b), strict=True):
            close(mine, theirs)


# ---------------------------------------------------------------- closed forms


def gaussian_batch(sequences: int, variance: float, sigma: float = 1.0) -> Batch:
    """One feature: x ~ N(0, variance), noise N(0, sigma^2); I = log(1 + variance / sigma^2) / 2."""
    clean = torch.randn(sequences, 1, 1, dtype=FP64) * math.sqrt(variance)
    stds = torch.full_like(clean, sigma)
    return {
        "means": torch.zeros_like(clean),
        "stds": stds,
        "clean": clean,
        "noisy": clean + stds * torch.randn_like(clean),
    }


def test_a_gaussian_of_known_information() -> None:
    """True 0.556 nats, the pairwise bound 2.04 (variance / sigma^2), the mixture within 5%."""
    b = gaussian_batch(3000, variance=2.04)
    mask = torch.ones(3000, 1)
    true = 0.5 * math.log(3.04)
    assert true == pytest.approx(0.556, abs=1e-3)
    mixture = float(mutual(b, mask, estimator="mixture", symmetrise=True))
    assert mixture == pytest.approx(true, rel=0.05)
    pairwise = float(mutual(b, mask, symmetrise=True))
    assert pairwise == pytest.approx(2.04, rel=0.1) and pairwise >= true


def test_the_entropy_of_a_mixture_far_apart() -> None:
    """M components of one deviation, nowhere near each other: a sequence tells which it is, log M
    nats of it, once its component is among those of the other half."""
    half, length, width = 8, 2, 3
    centres = 1e3 * torch.randn(half, length, width, dtype=FP64)
    stds = torch.full_like(centres, 0.7)
    noisy = [centres + stds * torch.randn_like(centres) for _ in range(2)]
    b = {
        "means": torch.zeros(2 * half, length, width, dtype=FP64),
        "stds": torch.cat([stds, stds]),
        "clean": torch.cat([centres, centres]),
        "noisy": torch.cat(noisy),
    }
    mask = torch.ones(2 * half, length)
    got = float(mutual(b, mask, estimator="mixture", symmetrise=True))
    # The squared noise is a sample of its mean 1.
    sample = torch.stack([(n - centres) / stds for n in noisy]).square().mean()
    want = math.log(half) / (length * width) + 0.5 * (float(sample) - 1)
    assert got == pytest.approx(want, rel=1e-9)


def test_identical_deviations_and_far_means_are_large() -> None:
    """The pairwise estimate grows with the squared distance; the mixture's ends at log M."""
    b = gaussian_batch(64, variance=1e6)
    mask = torch.ones(64, 1)
    assert float(mutual(b, mask)) > 1e5
    b["means"] = b["means"] - b["clean"]  # all at one place: nothing is told
    b["noisy"] = b["stds"] * torch.randn_like(b["stds"])
    for estimator in ("pairwise", "mixture"):
        assert abs(float(mutual(b, mask, estimator=estimator))) < 0.5


def test_mixture_is_below_pairwise(device: str) -> None:
    """Jensen: the mean of logarithms is below the logarithm of the mean."""
    for _ in range(5):
        b = batch(device, sequences=8)
        mask = torch.ones(8, 3).to(device)
        pairs = [
            mutual({n: torch.cat([t[:4], t[4:].roll(shift, 0)]) for n, t in b.items()}, mask)
            for shift in range(4)
        ]
        assert mutual(b, mask, estimator="mixture") <= torch.stack(pairs).mean() + 1e-5


# ---------------------------------------------------------------- the characteristic length


@pytest.mark.parametrize("rows", [2, 3, 100])
@pytest.mark.parametrize("q", [0.0, 0.05, 0.5, 1.0])
def test_characteristic_length(
    rows: int, q: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against all distances at once, in blocks of a few rows."""
    embeddings = torch.randn(rows, 12).to(device) + 100.0  # what all share costs no digits
    distance = torch.cdist(embeddings.double(), embeddings.double())
    distance.fill_diagonal_(math.inf)
    want = float(distance.amin(1).quantile(q))
    for numel in (1 << 22, 7 * rows, 1):
        monkeypatch.setattr(module, "BLOCK_NUMEL", numel)
        assert voronoi_characteristic_length(embeddings, q) == pytest.approx(want, rel=1e-4)


def test_equal_rows_are_at_distance_zero(device: str) -> None:
    embeddings = torch.randn(50, 64).to(device) * 30
    embeddings[10:40:3] = embeddings[9]
    assert voronoi_characteristic_length(embeddings, 0.1) == 0.0
    assert voronoi_characteristic_length(embeddings.bfloat16(), 0.1) == 0.0
    assert voronoi_characteristic_length(embeddings, 0.9) > 0


# ---------------------------------------------------------------- bad input

M, S, C, N = (torch.rand(4, 3, 5) + 0.1 for _ in range(4))
K = torch.ones(4, 3)
mi: Any = mutual_information_sub_batch
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "negative_std": (
        lambda: mi(M, -S, K, C, N), ValueError, r"stds_tensor\[0, 0, 0\] must be positive: got -"
    ),
    "zero_std": (lambda: mi(M, S * 0, K, C, N), ValueError, "must be positive: got 0.0"),
    "nan_std": (lambda: mi(M, S * math.nan, K, C, N), ValueError, "must be positive: got nan"),
    "mask_short": (lambda: mi(M, S, K[:, :2], C, N), ValueError, r"noise_mask must mark.*\(4, 2\)"),
    "mask_list": (lambda: mi(M, S, [1], C, N), TypeError, "noise_mask must be .*list"),
    "attention_of_features": (
        lambda: mi(M, S, K, C, N, attention_mask=S), ValueError, "attention_mask must mark"
    ),
    "shapes": (lambda: mi(M, S, K, C[:2], N), ValueError, r"clean_input_embeddings.*\(2, 3, 5\)"),
    "integers": (lambda: mi(M, S, K, C, N.long()), ValueError, "noisy_input_embeddings.*int64"),
    "estimator": (
        lambda: mi(M, S, K, C, N, estimator="knn"), ValueError, "pairwise, mixture: got 'knn'"
    ),
    "entropy_std": (
        lambda: gaussian_mixture_entropy(C, N, M, S - 1, K), ValueError, "stds.* must be positive"
    ),
    "log_loss_std": (
        lambda: gaussian_entropy_log_loss(S - 2), ValueError, "stds.* must be at least 0"
    ),
    "log_loss_mask": (
        lambda: gaussian_entropy_log_loss(S, K[:3]), ValueError, "noise_mask must mark"
    ),
    "distance_std": (
        lambda: square_mahalanobis_distance(C, N, S - 2), ValueError, "must be positive"
    ),
    "length_q": (lambda: voronoi_characteristic_length(S[0], 1.5), ValueError, "q must be .*1.5"),
    "length_one_row": (
        lambda: voronoi_characteristic_length(S[0, :1]), ValueError, r"V > 1.*\(1, 5\)"
    ),
    "length_batch": (lambda: voronoi_characteristic_length(S), ValueError, r"\(4, 3, 5\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    call, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_masked_std_may_be_anything() -> None:
    stds = S.clone()
    stds[:, 0] = 0.0
    mask = torch.tensor([[0, 1, 1]] * 4)
    assert torch.isfinite(mi(M, stds, mask, C, N))


@pytest.mark.parametrize("estimator", ["pairwise", "mixture"])
def test_compiled_is_eager(impl: str, estimator: str, device: str) -> None:
    mask = torch.ones(4, 3).to(device)

    def loss(means: Tensor, stds: Tensor, clean: Tensor, noisy: Tensor) -> Tensor:
        sides = {"means": means, "stds": stds, "clean": clean, "noisy": noisy}
        return mutual(sides, mask, estimator=estimator, symmetrise=True, impl=impl)

    b = batch(device)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**b)
    close(compiled, loss(**b))
    for mine, theirs in zip(gradients(compiled, b), gradients(loss(**b), b), strict=True):
        close(mine, theirs)


def test_no_pair_is_held_whole(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 x 8 pairs of sequences: the memory of the batch and of a slab, not of the pairs."""
    monkeypatch.setattr(gaussian, "SLAB_NUMEL", 1 << 12)
    b = batch(device, sequences=16, length=16, width=256)
    mask = torch.ones(16, 16).to(device)

    with _peak_bytes(torch.device(device)) as peak:
        mutual(b, mask, estimator="mixture", impl="torch").backward()
    own, one_of_pairs = (4 * n * 16 * 256 for n in (4 * 16, 8 * 8))
    assert peak[0] < 3 * own and 3 * own < 5 * one_of_pairs, peak[0] / own
