"""The nearest-embedding attack: against plain torch, without logits, on scaled embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onepass import strict
from onepass.jigsaw.attack import METRICS, NearestEmbedding, recovery_rate
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


def test_only_the_positions_of_the_mask_count() -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    found = torch.tensor([[1, 0, 3, 0]])
    assert recovery_rate(found, ids, torch.tensor([[1, 1, 1, 0]])).item() == pytest.approx(2 / 3)
    assert recovery_rate(found, ids, torch.tensor([[False, True, False, True]])) == 0
    assert recovery_rate(found, ids, torch.zeros(1, 4)) == 0


def test_what_does_not_fit_is_refused() -> None:
    base, table = rows()
    with pytest.raises(ValueError, match="metric must be one of l2, cosine: got 'l1'"):
        NearestEmbedding(base, "l1")
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
