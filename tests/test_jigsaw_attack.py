"""The attacks: against plain torch, without logits, on scaled embeddings and known transforms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onepass import strict
from onepass.jigsaw.attack import LIKELIHOOD, METRICS, NearestEmbedding, recovery_rate
from onepass.jigsaw.cloak import TransformerCloak
from support.tiny_language_model import model


class Scaled(nn.Embedding):
    """As Gemma 3 has it: the layer gives another row than its weight."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * 5.0


class Model(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def get_input_embeddings(self) -> nn.Module:
        return self.layer


def rows(n: int = 301, width: int = 24, kind: Any = nn.Embedding) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    layer = kind(n, width)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(n, 1) + 0.5)  # norms that tell the metrics apart
    return Model(layer), layer(torch.arange(n)).detach()


def plain(x: Tensor, table: Tensor, metric: str) -> Tensor:
    if metric == "l2":
        return torch.cdist(x.double(), table.double()).argmin(-1)
    return torch.cosine_similarity(x.double()[..., None, :], table.double(), dim=-1).argmax(-1)


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize("metric", METRICS)
def test_it_finds_the_row_that_plain_torch_finds(metric: str, kind: Any) -> None:
    base, table = rows(kind=kind)
    x = table[:99].view(3, 33, -1) + 3 * torch.randn(3, 33, table.shape[-1])
    with strict():
        found = NearestEmbedding(base, metric)(x)
    assert found.shape == (3, 33) and found.dtype == torch.int64
    assert torch.equal(found, plain(x, table, metric))
    assert not torch.equal(found, plain(x, table, METRICS[metric == "l2"]))  # they do differ


@pytest.mark.parametrize("metric", METRICS)
def test_what_is_not_moved_is_recovered_whole(metric: str) -> None:
    base = model()
    ids = torch.arange(4, 64).view(2, 30)
    x = base.get_input_embeddings()(ids)
    attack = NearestEmbedding(base, metric)
    mask = torch.ones_like(ids)
    assert recovery_rate(attack(x), ids, mask) == 1
    assert recovery_rate(attack(x + 0), ids.roll(1, 1), mask) == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert recovery_rate(attack(x), ids, mask) == 1
    assert recovery_rate(attack(x.bfloat16()), ids, mask) == 1


def uneven(base: nn.Module, table: Tensor, small: float, spread: float = 0.0) -> TransformerCloak:
    """Much noise, but for two features that have little."""
    cloak = TransformerCloak.from_model(base, scale=(1e-4, 4.0))
    stds = torch.full(table.shape[-1:], 3.0, dtype=torch.float64)
    stds[:2] = small
    mean, rho = (x[-1] for x in (cloak.mean_estimator, cloak.rho_estimator))
    with torch.no_grad():
        rho.bias.copy_(cloak.std_parameterization.inverse(stds))  # type: ignore[union-attr, operator]
        rho.weight.normal_(std=spread)  # type: ignore[union-attr, operator]
        mean.weight.normal_(std=0.1)  # type: ignore[union-attr, operator]
    return cloak


def likelihoods(x: Tensor, means: Tensor, stds: Tensor) -> Tensor:
    """[n, V] as the formula says, in float64."""
    means, stds = means.double(), stds.double()
    return torch.stack(
        [-(((row - means) / stds).square() / 2 + stds.log()).sum(-1) for row in x.double()]
    )


@pytest.mark.parametrize("kind", [nn.Embedding, Scaled])
@pytest.mark.parametrize(("small", "spread"), [(0.05, 0.0), (0.3, 0.02), (0.5, 0.1), (2e-4, 0.3)])
def test_who_has_the_transform_takes_the_likeliest(small: float, spread: float, kind: Any) -> None:
    base, table = rows(kind=kind)
    cloak = uneven(base, table, small, spread).requires_grad_(False)
    out = cloak(table[None], seed=torch.tensor(3))
    ids, x = torch.arange(len(table)), out.noisy[0]
    state = torch.get_rng_state()
    attack = NearestEmbedding(base, cloak=cloak)
    with strict():
        found = attack(x)
    assert torch.equal(torch.get_rng_state(), state)  # the noise of others stays what it was
    wanted = likelihoods(x, table + out.means[0], out.stds[0])
    assert (found == wanted.argmax(-1)).double().mean() > 0.99  # but for near ties
    own = wanted.gather(-1, ids[:, None])
    assert (attack.ranks(x, ids) == 1 + (wanted > own).sum(-1)).double().mean() > 0.97
    assert torch.equal(attack.ranks(x, ids) == 1, found == ids)
    by_distance = torch.cdist(x.double(), (table + out.means[0]).double()).argmin(-1)
    assert (found == ids).double().mean() > (by_distance == ids).double().mean() + 0.1


def test_little_noise_in_few_features_gives_the_tokens_away() -> None:
    base, table = rows(width=64)
    cloak = uneven(base, table, 0.02).requires_grad_(False)
    x = cloak(table[None], seed=torch.tensor(3)).noisy
    attack, ids = NearestEmbedding(base, cloak=cloak), torch.arange(len(table))[None]
    everywhere = torch.ones_like(ids)
    assert recovery_rate(attack(x), ids, everywhere) > 0.99
    assert recovery_rate(NearestEmbedding(base)(x), ids, everywhere) < 0.7


def test_a_shared_offset_does_not_cancel_the_likelihood_away() -> None:
    base, table = rows()
    with torch.no_grad():
        base.layer.weight.add_(5.0)  # type: ignore[operator, union-attr]
    table = base.layer(torch.arange(len(table))).detach()
    cloak = uneven(base, table, 0.05).requires_grad_(False)
    out = cloak(table[None], seed=torch.tensor(3))
    found = NearestEmbedding(base, LIKELIHOOD, cloak)(out.noisy[0])
    wanted = likelihoods(out.noisy[0], table + out.means[0], out.stds[0]).argmax(-1)
    assert (found == wanted).double().mean() > 0.99


def test_rounded_embeddings_do_not_mislead_the_likelihood() -> None:
    base, table = rows()
    cloak = uneven(base, table, 2e-4, 0.3).requires_grad_(False)
    base.bfloat16()
    x = cloak(base.layer(torch.arange(len(table)))[None], seed=torch.tensor(3)).noisy[0]
    ids = torch.arange(len(table))
    assert x.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (NearestEmbedding(base, cloak=cloak)(x) == ids).double().mean() > 0.99


@pytest.mark.parametrize("std_parameterization", ["cloak", "direct"])
def test_noise_that_is_nowhere(std_parameterization: str) -> None:
    base, table = rows()
    options: dict[str, Any] = {"scale": (0.0, 2.0), "std_parameterization": std_parameterization}
    cloak = TransformerCloak.from_model(base, **options).requires_grad_(False)
    nn.init.constant_(cloak.rho_estimator[-1].bias, -200.0)  # type: ignore[arg-type]
    found = NearestEmbedding(base, cloak=cloak)(cloak(table[None]).noisy)
    assert torch.equal(found[0], torch.arange(len(table)))


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_products_are_whole_and_the_setting_comes_back(precision: str) -> None:
    base, table = rows(width=64)
    cloak = uneven(base, table, 0.5, 0.02).requires_grad_(False)
    x = cloak(table[None], seed=torch.tensor(3)).noisy[0]
    attack = NearestEmbedding(base, cloak=cloak)
    wanted = attack(x)
    backends: Any = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = torch.get_float32_matmul_precision(), [b.fp32_precision for b in backends]
    try:
        torch.set_float32_matmul_precision(precision)
        told = [b.fp32_precision for b in backends]
        assert torch.equal(attack(x), wanted)
        assert torch.get_float32_matmul_precision() == precision
        assert [b.fp32_precision for b in backends] == told
    finally:
        torch.set_float32_matmul_precision(before[0])
        for backend, was in zip(backends, before[1], strict=True):
            backend.fp32_precision = was


def test_only_the_positions_of_the_mask_count() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    found = torch.tensor([[1, 0, 3, 0]])
    assert recovery_rate(found, ids, torch.tensor([[1, 1, 1, 0]])).item() == pytest.approx(2 / 3)
    assert recovery_rate(found, ids, torch.tensor([[False, True, False, True]])) == 0
    assert recovery_rate(found, ids, torch.zeros(1, 4)) == 0


def test_what_does_not_fit_is_refused() -> None:
    base, table = rows()
    with pytest.raises(ValueError, match="one of l2, cosine, likelihood: got 'l1'"):
        NearestEmbedding(base, "l1")
    with pytest.raises(ValueError, match="the metric 'likelihood' needs a cloak"):
        NearestEmbedding(base, LIKELIHOOD)
    with pytest.raises(ValueError, match="the metric 'cosine' looks at no cloak: leave it out"):
        NearestEmbedding(base, "cosine", TransformerCloak(24))
    with pytest.raises(ValueError, match='must have the estimator "mlp"'):
        NearestEmbedding(base, cloak=TransformerCloak(24, estimator="transformer"))
    with pytest.raises(ValueError, match=r"embeddings must be \[B, S, 23\]"):
        NearestEmbedding(base, cloak=TransformerCloak(23))
    with pytest.raises(ValueError, match="has no input embeddings"):
        NearestEmbedding(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"must be \[..., 24\] as the model's: got \[2, 3\]"):
        NearestEmbedding(base)(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="embeddings must be a torch.Tensor"):
        NearestEmbedding(base)([0.0] * 24)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape of input_ids"):
        recovery_rate(torch.zeros(2, 3), torch.zeros(2, 4), torch.ones(2, 4))
    with pytest.raises(ValueError, match="mask"):
        recovery_rate(torch.zeros(2, 4), torch.zeros(2, 4), torch.ones(4))
