"""Entropies and divergences as they are spelled in plain torch, on LazyLogits: fused, and right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical
from torch.nn import functional

from onepass import LazyLogits, MaterializedError, MaterializedWarning, strict, vocab_pair_stats
from onepass.lazy_probs import LazyProbs

V, D, D_TEACHER = 37, 8, 12
LABELS = torch.tensor([[1, 5, 0], [36, 7, 2]])


@pytest.fixture
def parts(device: str) -> list[Tensor]:
    shapes = ((2, 3, D), (V, D), (2, 3, D_TEACHER), (V, D_TEACHER))
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


def kl(reduction: str, log_target: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
    def spelled(z: Tensor, t: Tensor) -> Tensor:
        target = t.log_softmax(-1) if log_target else t.softmax(-1)
        log_q = functional.log_softmax(z, dim=-1)
        return functional.kl_div(log_q, target, reduction=reduction, log_target=log_target)

    return spelled


def weighed(z: Tensor, t: Tensor) -> Tensor:
    p, log_p = t.softmax(-1), t.log_softmax(-1)
    return (p * (log_p - z.log_softmax(-1))).sum(-1)


SPELLED: dict[str, Callable[[Any, Any], Any]] = {
    "entropy": lambda z, t: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "entropy_of_log": lambda z, t: -(z.softmax(-1) * z.softmax(-1).log()).sum(dim=-1),
    "entropy_from_exp": lambda z, t: (
        -(z.log_softmax(-1) * z.log_softmax(-1).exp()).sum(-1, keepdim=True)
    ),
    "entropy_by_lse": lambda z, t: (
        torch.logsumexp(z, dim=-1) - torch.sum(functional.softmax(z, dim=-1) * z, dim=-1)
    ),
    "entropy_of_float": lambda z, t: (
        -(functional.softmax(z, -1, dtype=torch.float32) * z.float().log_softmax(-1)).sum(-1)
    ),
    "cross_entropy": lambda z, t: -(t.softmax(-1) * z.log_softmax(-1)).sum(-1),
    "mean_logit": lambda z, t: (t.softmax(-1) * z).sum(-1),
    "scaled": lambda z, t: 2 * (t.softmax(-1) * -z.log_softmax(-1) / 3).sum(-1),
    "kl": weighed,
    "kl_reversed": lambda z, t: weighed(t, z),
    "kl_mean": kl("mean"),
    "kl_sum": kl("sum"),
    "kl_batchmean": kl("batchmean"),
    "kl_rows": lambda z, t: kl("none")(z, t).sum(-1),
    "kl_log_target": kl("batchmean", log_target=True),
    "kl_rows_log_target": lambda z, t: kl("none", log_target=True)(z, t).sum(-1),
    "kl_of_rows": lambda z, t: weighed(z[:, 1:].reshape(-1, V), t[:, 1:].reshape(-1, V)),
    "kl_tempered": lambda z, t: kl("batchmean")(z / 2.0, t / 2.0) * 4,
    "softmax_gather": lambda z, t: z.softmax(-1).gather(-1, LABELS[..., None].to(z.device)),
    "own_logsumexp": lambda z, t: (z - z.logsumexp(dim=-1, keepdim=True)).gather(
        -1, LABELS[..., None].to(z.device)
    ),
    "categorical_entropy": lambda z, t: Categorical(logits=z).entropy(),
    "categorical_log_prob": lambda z, t: Categorical(logits=z).log_prob(LABELS.to(z.device)),
    "categorical_unchecked": lambda z, t: Categorical(logits=z, validate_args=False).entropy(),
    "max": lambda z, t: z.max(-1).values,
    "max_log_prob": lambda z, t: torch.max(z.log_softmax(-1), dim=-1, keepdim=True)[0],
    "softmax_max": lambda z, t: z.softmax(-1).max(-1).values,
    "by_axis": lambda z, t: (z.softmax(-1) * z.log_softmax(-1)).sum(axis=-1),
    "of_pieces": lambda z, t: sum(
        (p * q).sum(-1)
        for p, q in zip(z.softmax(-1).unbind(1), z.log_softmax(-1).unbind(1), strict=True)
    ),
    "of_a_half": lambda z, t: (z.softmax(-1) * t.log_softmax(-1)).chunk(2)[1].sum(-1),
}


def close(got: Tensor, expected: Tensor) -> None:
    size = float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=3e-6 * size)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")  # torch's, of kl_div
@pytest.mark.parametrize("softcap", [None, 3.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("name", SPELLED)
def test_spelled_in_torch(name: str, softcap: float | None, parts: list[Tensor]) -> None:
    spelled = SPELLED[name]
    with strict():
        got = spelled(
            LazyLogits(*parts[:2], softcap=softcap), LazyLogits(*parts[2:], softcap=softcap)
        )
    expected = spelled(
        *(
            LazyLogits(*of, softcap=softcap).materialize()  # type: ignore[attr-defined]
            for of in (parts[:2], parts[2:])
        )
    )
    assert type(got) is Tensor
    assert got.dtype == expected.dtype
    close(got, expected)
    upstream = torch.linspace(-1, 2, got.numel(), device=got.device).view_as(got)
    grads, wanted = (
        torch.autograd.grad(values, parts, upstream, allow_unused=True)
        for values in (got, expected)
    )
    for a, b in zip(grads, wanted, strict=True):
        if b is None or not b.any():
            assert a is None or not a.any()
        else:
            assert a is not None
            close(a, b)


def test_columns_of_max(parts: list[Tensor]) -> None:
    lazy, logits = LazyLogits(*parts[:2]), functional.linear(*parts[:2])
    with strict():
        assert torch.equal(lazy.max(-1).indices, logits.max(-1).indices)
        assert torch.equal(Categorical(logits=lazy).logits.argmax(-1), logits.argmax(-1))

        assert torch.equal(lazy.softmax(-1).argmax(-1), logits.argmax(-1))
        with torch.no_grad():
            close(lazy.amax(dim=-1), logits.amax(-1))


def test_products_without_gradients(parts: list[Tensor]) -> None:
    lazy, logits = LazyLogits(*parts[:2]), functional.linear(*parts[:2])
    p, log_p = lazy.softmax(-1), lazy.log_softmax(-1)
    with strict(), torch.no_grad():
        product = p * log_p
        entropy = -(lazy.softmax(-1) * lazy.log_softmax(-1))
        with pytest.MonkeyPatch.context() as patch:  # no statistics of a head against itself
            patch.setattr("onepass.lazy_probs.vocab_pair_stats", None)
            close(entropy.sum(-1), Categorical(logits=logits).entropy())
        assert torch.cat([lazy[:1], lazy[1:]]).shape == logits.shape
    assert not product.sum(-1).requires_grad


def test_autocast_dtypes(parts: list[Tensor]) -> None:
    """Those of torch on a CPU; on a GPU softmax and its kin are float32."""
    hidden, weight = (t.detach().bfloat16() for t in parts[:2])
    device = hidden.device.type
    if device not in ("cpu", "cuda"):
        pytest.skip("of other devices nothing is promised")
    with torch.autocast(device, torch.bfloat16):
        lazy, whole = LazyLogits(hidden, weight), functional.linear(hidden, weight)
        for of in (
            lambda z: z.sum(-1),
            lambda z: z.logsumexp(-1),
            lambda z: z.softmax(-1),
            lambda z: z.log_softmax(-1),
            lambda z: functional.kl_div(z.log_softmax(-1), z.softmax(-1), reduction="sum"),
            lambda z: functional.cross_entropy(z[0], LABELS[0].to(z.device)),
        ):
            assert of(lazy).dtype == of(whole).dtype


def test_a_small_divergence_keeps_its_digits(device: str) -> None:
    """KL of nearly equal distributions, spelled as torch code spells it, where torch's is noise."""
    hidden = torch.randn(4, D, dtype=torch.float64)
    weight = torch.randn(V, D, dtype=torch.float64)
    near = hidden + 1e-4 * torch.randn(4, D, dtype=torch.float64)
    exact = vocab_pair_stats(near @ weight.T, hidden @ weight.T, want=("kl",)).kl
    h, n, w = (t.to(device, torch.float32) for t in (hidden, near, weight))
    exact = vocab_pair_stats(
        LazyLogits(n.double(), w.double()), LazyLogits(h.double(), w.double()), want=("kl",)
    ).kl
    with strict():
        got = weighed(LazyLogits(n, w), LazyLogits(h, w))
    # the products' own rounding moves a logit by 1e-7, and a divergence of 1e-7 by as much as this
    assert ((got.double() - exact).abs() <= 2e-2 * exact).all()


WHOLE: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "probabilities": lambda z, t: z.softmax(-1).square(),
    "mixture": lambda z, t: 0.5 * (z.softmax(-1) + t.softmax(-1)),
    "unsummed": lambda z, t: torch.tanh(z.softmax(-1) * z.log_softmax(-1)),
    "other_dimension": lambda z, t: (z.softmax(-1) * z.log_softmax(-1)).sum(1),
    "log_ratio": lambda z, t: (z.log_softmax(-1) - t.log_softmax(-1)).exp(),
    "negative_argmax": lambda z, t: (-z.log_softmax(-1)).argmax(-1),
    "kl_of_probabilities": lambda z, t: functional.kl_div(
        z.log_softmax(-1), torch.full_like(z, 1 / V), reduction="sum"
    ),
    "top": lambda z, t: z.softmax(-1).topk(3).values,
    "amax": lambda z, t: z.amax(-1),
    "columns": lambda z, t: z.softmax(-1)[..., :5].sum(-1),
    "columns_gathered": lambda z, t: z.softmax(-1)[..., :5].gather(
        -1, LABELS[..., None].to(z.device) % 5
    ),
    "columns_of_a_product": lambda z, t: (z.softmax(-1) * z)[..., :-4].sum(-1),
    "columns_of_a_distribution": lambda z, t: Categorical(logits=z).probs[:, :, 2:],
    "column": lambda z, t: z.softmax(-1)[..., 3],
    "split_columns": lambda z, t: z.softmax(-1).split(20, -1)[0],
    "selected_columns": lambda z, t: z.softmax(-1).index_select(-1, LABELS[0].to(z.device)),
    "transposed_columns": lambda z, t: z.softmax(-1).transpose(-1, 0),
    "flattened_columns": lambda z, t: z.softmax(-1).flatten(),
}


@pytest.mark.parametrize("name", WHOLE)
def test_anything_else_is_made_whole_and_said(name: str, parts: list[Tensor]) -> None:
    def lazies() -> tuple[Tensor, Tensor]:
        return LazyLogits(*parts[:2]), LazyLogits(*parts[2:])

    with strict(), pytest.raises(MaterializedError, match="needs whole"):
        WHOLE[name](*lazies())
    with pytest.warns(MaterializedWarning, match=r"test_lazy_probs.py:\d+"):
        got = WHOLE[name](*lazies())
    expected = WHOLE[name](functional.linear(*parts[:2]), functional.linear(*parts[2:]))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_nan_is_seen_by_a_distribution(parts: list[Tensor]) -> None:
    with torch.no_grad():
        parts[0][0, 0] = torch.nan
    lazy = LazyLogits(*parts[:2])
    # whose message shows the logits
    with pytest.warns(MaterializedWarning), pytest.raises(ValueError, match="parameter logits"):
        Categorical(logits=lazy, validate_args=True)


def test_reads_as_what_it_stands_for(parts: list[Tensor]) -> None:
    z = LazyLogits(*parts[:2])
    product = 2 * (z.softmax(-1) * z.log_softmax(-1))
    assert isinstance(product, LazyProbs)
    text = repr(product)
    assert text.startswith("LazyProbs([2, 3, 37], torch.float32: 2 * softmax(LazyLogits(")
    assert "log_softmax" in text


def test_cannot_be_written_into(parts: list[Tensor]) -> None:
    p = LazyLogits(*parts[:2]).softmax(-1)
    with pytest.raises(RuntimeError, match=r"use the out-of-place mul\b"):
        p.mul_(2)
    with pytest.raises(RuntimeError, match=r"out-of-place torch.where"):
        p[..., 0] = 0
