"""How PPLM's next token is drawn: filters, samplers and the mixture, against what they are defined
as, at ties, at k = 0 and beyond V, with logits of -inf, and seeded."""

from __future__ import annotations

import pytest
import torch

from onepass.pplm.sampling import (
    fuse,
    nucleus_sample,
    temp_softmax,
    to_var,
    top_k_filter,
    top_k_sample,
)

N_DRAWS = 2000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shares(sample, probs, **options) -> torch.Tensor:
    """How often each token is drawn, of one row."""
    tokens = sample(probs.expand(N_DRAWS, -1), generator=seeded(), **options)
    assert tokens.shape == (N_DRAWS, 1)
    return tokens.flatten().bincount(minlength=len(probs)) / N_DRAWS


def test_temp_softmax():
    logits = torch.randn(2, 5, generator=seeded())
    torch.testing.assert_close(temp_softmax(logits), torch.softmax(logits / 1.2, -1))
    assert torch.equal(temp_softmax(logits, t=1.0), torch.softmax(logits, -1))
    with pytest.raises(ValueError, match="t must be above 0"):
        temp_softmax(logits, t=0)


def test_filter_keeps_ties_at_the_kth_value():
    logits = torch.tensor([[3.0, 1.0, 2.0, 2.0, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    low = -1e10
    wanted = [[3.0, low, 2.0, 2.0, low], [0.0] * 5]
    assert top_k_filter(logits, 2).tolist() == wanted
    probs = logits.softmax(-1)
    kept = top_k_filter(probs, 2, probs=True)
    assert torch.equal(kept > 0, torch.tensor(wanted) > low)
    assert torch.equal(kept[kept > 0], probs[kept > 0])
    assert top_k_filter(logits[0], 2).tolist() == wanted[0]  # a row alone


@pytest.mark.parametrize("k", [0, 5, 6, 1000])
def test_filter_of_all(k):
    logits = torch.randn(2, 5, generator=seeded())
    assert torch.equal(top_k_filter(logits, k), logits)
    assert torch.equal(top_k_filter(logits.softmax(-1), k, probs=True), logits.softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_filtered_logits_of_any_dtype_have_no_probability(dtype):
    logits = torch.tensor([[1.0, 0.0, -float("inf"), 2.0]], dtype=dtype)
    probs = top_k_filter(logits, 2).softmax(-1)
    assert (probs[0, [1, 2]] == 0).all()
    assert torch.isclose(probs.sum(), torch.ones((), dtype=dtype))


@pytest.mark.parametrize("k", [-1, 2.0, True])
def test_filter_refuses(k):
    with pytest.raises((TypeError, ValueError), match="^k must be"):
        top_k_filter(torch.zeros(1, 5), k)
    with pytest.raises((TypeError, ValueError), match="^k must be"):
        top_k_sample(torch.ones(1, 5), k)


def test_fused_is_the_normalised_product_of_powers():
    log_p, log_u = (torch.randn(2, 3, 7, generator=seeded(s)).log_softmax(-1) for s in (0, 1))
    for gm_scale in (0.3, 0.9):
        product = log_p.exp() ** gm_scale * log_u.exp() ** (1 - gm_scale)
        wanted = product / product.sum(-1, keepdim=True)
        torch.testing.assert_close(fuse(log_p, log_u, gm_scale).exp(), wanted)
        logits = fuse(log_p + 5, log_u - 3, gm_scale)
        torch.testing.assert_close(logits.exp(), wanted)
    torch.testing.assert_close(fuse(log_p, log_u, 1.0), log_p)
    torch.testing.assert_close(fuse(log_p, log_u, 0.0), log_u)
    with pytest.raises(ValueError, match="gm_scale"):
        fuse(log_p, log_u, 1.1)


@pytest.mark.parametrize("gm_scale", [0.0, 0.5, 1.0])
def test_fused_without_nan_where_logits_are_minus_infinity(gm_scale):
    inf = float("inf")
    log_p = torch.tensor([[0.0, -inf, 1.0, -inf]]).log_softmax(-1)
    log_u = torch.tensor([[0.0, 1.0, -inf, -inf]]).log_softmax(-1)
    probs = fuse(log_p, log_u, gm_scale).exp()
    wanted = {0.0: log_u.exp(), 0.5: torch.tensor([[1.0, 0, 0, 0]]), 1.0: log_p.exp()}[gm_scale]
    torch.testing.assert_close(probs, wanted)
    for sample in (top_k_sample, nucleus_sample):
        assert probs[0, int(sample(probs, generator=seeded()))] > 0


def test_fused_where_powers_underflow():
    log_p = torch.tensor([[0.0, -200.0, -400.0]])
    wanted = (0.9 * log_p.double() + 0.1 * log_p.double()).log_softmax(-1)
    torch.testing.assert_close(fuse(log_p, log_p, 0.9), wanted.float())


def test_top_k_draws_by_the_kept_probabilities():
    probs = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    wanted = torch.tensor([0, 0.3, 0.2, 0, 0.25]) / 0.75
    for weights in (probs, 7 * probs):
        torch.testing.assert_close(shares(top_k_sample, weights, k=3), wanted, atol=0.04, rtol=0)
    for k in (0, 5, 100):
        torch.testing.assert_close(shares(top_k_sample, probs, k=k), probs, atol=0.04, rtol=0)


def test_top_k_keeps_exactly_k_of_ties_the_first():
    found = shares(top_k_sample, torch.tensor([0.1, 0.2, 0.3, 0.2, 0.2]), k=3)
    assert (found > 0).tolist() == [False, True, True, True, False]


def test_nucleus_draws_from_the_most_probable():
    probs = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25])
    wanted = torch.tensor([0, 0.3, 0.2, 0, 0.25]) / 0.75
    for weights in (probs, 7 * probs):
        torch.testing.assert_close(
            shares(nucleus_sample, weights, p=0.8), wanted, atol=0.04, rtol=0
        )
    torch.testing.assert_close(shares(nucleus_sample, probs, p=1.0), probs, atol=0.04, rtol=0)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.8])
def test_nucleus_keeps_a_dominant_token(p):
    """D-C4: PPLM.jl divides 0 by 0 there."""
    assert shares(nucleus_sample, torch.tensor([0.05, 0.9, 0.05]), p=p).tolist() == [0, 1, 0]


@pytest.mark.parametrize("sample", [top_k_sample, nucleus_sample])
def test_draws_are_seeded_and_leave_the_global_state(sample):
    probs = torch.full((64,), 1 / 64)
    state = torch.random.get_rng_state()
    first = [int(sample(probs, generator=seeded(3))) for _ in range(2)]
    assert first[0] == first[1]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sample(probs, generator=seeded()).shape == (1,)
    assert sample(probs.expand(2, 3, -1), generator=seeded()).shape == (2, 3, 1)
    many = {int(sample(probs, generator=seeded(s))) for s in range(8)}
    assert len(many) > 1


def test_to_var():
    source = torch.ones(2, requires_grad=True) * 2
    for device in ("cpu", "cuda"):
        leaf = to_var(source, requires_grad=True, device=device)
        assert leaf.is_leaf and leaf.requires_grad and leaf.tolist() == [2.0, 2.0]
    assert not to_var(source, requires_grad=True, volatile=True, device="cpu").requires_grad
