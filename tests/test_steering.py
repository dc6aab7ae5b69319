"""steering_stats: bag masses, KL and the softmax's mean embedding of one position."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from onepass import LazyLogits
from onepass.ops import steering as module
from onepass.ops.steering import Steering, logits_and_soft_embedding, steering_stats

V, D, E = 61, 8, 5
BAGS = [
    (torch.tensor([3, 7, 60]), torch.tensor([1.0, 2.0, 1.0])),
    (torch.tensor([0]), torch.ones(1)),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def plain(logits: Tensor, log_u: Tensor, embedding: Tensor) -> Steering:
    probs = logits.softmax(-1)
    weights = torch.zeros(len(BAGS), logits.shape[-1], dtype=logits.dtype)
    for row, (ids, of_ids) in zip(weights, BAGS, strict=True):
        row[ids] = of_ids.to(logits.dtype)
    kl = (probs * (probs.clamp_min(1e-300).log() - log_u)).sum(-1)
    return Steering(probs @ weights.T, kl, probs @ embedding)


def weighed(found: Steering) -> Tensor:
    """A loss of all facts, each row and column with a weight of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for i, fact in enumerate(found):
        assert fact is not None
        total = total + (fact.double() * draw(*fact.shape, seed=50 + i)).sum()
    return total


@pytest.mark.parametrize("slab_bytes", [None, 1, 13 * D * 8])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("n_rows", [1, 3])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_lazy_logits_give_what_whole_ones_do(
    monkeypatch: pytest.MonkeyPatch, n_rows: int, tied: bool, slab_bytes: int | None, scale: float
) -> None:
    """The bias of the untied head has a logit of -inf, and one row's logits are far apart."""
    if slab_bytes is not None:
        monkeypatch.setattr(module, "SLAB_BYTES_ON_CPU", slab_bytes)
    hidden = draw(n_rows, D).requires_grad_()
    hidden.data[0] *= 30
    weight = draw(V, D, seed=1)
    bias = None if tied else draw(V, seed=2)
    if bias is not None:
        bias[7] = -torch.inf
    embedding = weight if tied else draw(V, E, seed=3)
    log_u = draw(n_rows, V, seed=4).log_softmax(-1)
    logits = scale * (hidden @ weight.T + (0 if bias is None else bias))
    wanted = plain(logits, log_u, embedding)
    lazy = LazyLogits(hidden, weight, bias, scale=scale)
    found = steering_stats(lazy, bags=BAGS, log_u=log_u, embedding=embedding)
    whole = steering_stats(logits, bags=BAGS, log_u=log_u, embedding=embedding)
    for mine in (found, whole):
        for name, value, truth in zip(Steering._fields, mine, wanted, strict=True):
            torch.testing.assert_close(value, truth, rtol=1e-10, atol=1e-12, msg=name)
    (truth,) = torch.autograd.grad(weighed(wanted), hidden, retain_graph=True)
    assert truth.isfinite().all()
    for mine in (found, whole):
        (gradient,) = torch.autograd.grad(weighed(mine), hidden, retain_graph=True)
        torch.testing.assert_close(gradient, truth, rtol=1e-9, atol=1e-11)


def test_gradients_by_finite_differences() -> None:
    hidden = draw(2, D).requires_grad_()
    weight, log_u = draw(V, D, seed=1), draw(2, V, seed=4).log_softmax(-1)

    def facts(hidden: Tensor) -> tuple[Tensor, ...]:
        lazy = LazyLogits(hidden, weight)
        return tuple(steering_stats(lazy, bags=BAGS, log_u=log_u, embedding=weight))  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(facts, (hidden,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_worse_than_whole_logits(dtype: torch.dtype) -> None:
    hidden, weight = draw(4, D, dtype=torch.float32).to(dtype), draw(V, D, seed=1).to(dtype)
    truth = (hidden.double() @ weight.double().T).softmax(-1) @ weight.double()
    found = logits_and_soft_embedding(LazyLogits(hidden, weight), weight, 5 * D * 4)[1]
    whole = module.soft_embedding_reference(hidden @ weight.T, weight)[1]
    assert found.dtype == torch.float32
    error, allowed = (found - truth).abs().max(), (whole - truth).abs().max()
    assert error <= 1.1 * allowed + 8 * torch.finfo(dtype).eps


def test_heads_that_cannot_be_read_in_slabs_are_right_too() -> None:
    """A softcap, and a head or embedding that is trained: its gradient is there."""
    hidden, weight = draw(2, D).requires_grad_(), draw(V, D, seed=1).requires_grad_()
    lazy = LazyLogits(hidden, weight, softcap=2.0)
    logits, soft = logits_and_soft_embedding(lazy, weight)
    wanted = 2 * ((hidden @ weight.T) / 2).tanh()
    torch.testing.assert_close(logits, wanted)
    torch.testing.assert_close(soft, wanted.softmax(-1) @ weight)
    mine = torch.autograd.grad(soft.square().sum(), [hidden, weight])
    truth = torch.autograd.grad((wanted.softmax(-1) @ weight).square().sum(), [hidden, weight])
    torch.testing.assert_close(mine, truth)


def test_only_what_is_asked_for() -> None:
    found = steering_stats(draw(2, V))
    assert found.masses.shape == (2, 0) and found.kl is None and found.soft_embedding is None


def test_weights_are_not_read_after_they_changed() -> None:
    hidden, weight = draw(2, D), draw(V, D)
    lazy = LazyLogits(hidden, weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="written to"):
        steering_stats(lazy, embedding=weight)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"logits": draw(2, 3, V)}, r"logits must be \[B, V\]: got shape \(2, 3, 61\)"),
        ({"log_u": draw(2, V - 1)}, r"log_u must have the shape of the logits, \(2, 61\)"),
        ({"embedding": draw(V - 1, E)}, r"embedding must be \[61, E\].*got shape \(60, 5\)"),
        ({"embedding": torch.ones(V, E, dtype=torch.int64)}, "embedding must be"),
        ({"log_u": draw(2, V).to("meta")}, "log_u is on meta, logits on cpu"),
    ],
)
def test_wrong_calls_say_what_was_wanted(given: dict[str, Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        steering_stats(**{"logits": draw(2, V), **given})  # type: ignore[arg-type]
