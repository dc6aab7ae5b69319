"""sequence_logps: log-probabilities of answers, from logits and from a lazy head alike; what does
not count has no say, and a head makes no more products than it must."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.dpo import SequenceLogps, ld_weights, sequence_logps, wpo_weights
from support.environment import DEVICE
from support.flops import counted_flops

B, S, D, V = 4, 9, 12, 37
WANT = ("entropy", "accuracy", "logits", "alignment")
KEPT = [(3, 8), (2, 9), (3, 6), (5, 6)]  # of every row, the tokens of the answer


def answers(seed: int = 0) -> Tensor:
    """Labels [B, S] with -100 at the prompts and the padding."""
    pick = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, V, (B, S), generator=pick)
    place = torch.arange(S)
    counts = torch.stack([(place >= first) & (place < last) for first, last in KEPT])
    return ids.masked_fill(~counts, -100).to(DEVICE)


def head(dtype: torch.dtype = torch.float64, frozen: bool = True) -> tuple[Tensor, Tensor]:
    pick = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, D, generator=pick, dtype=torch.float64)
    weight = torch.randn(V, D, generator=pick, dtype=torch.float64)
    return (
        hidden.to(DEVICE, dtype).requires_grad_(),
        weight.to(DEVICE, dtype).requires_grad_(not frozen),
    )


def plain(logits: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """The facts of every token that counts, of every row, one token at a time."""
    rows = []
    for row, ids in zip(logits, labels, strict=True):
        facts: dict[str, list[Tensor]] = {name: [] for name in ("logp", *WANT)}
        for t in range(1, S):
            if ids[t] == -100:
                continue
            z, y = row[t - 1], ids[t]
            p = z.exp() / z.exp().sum()
            facts["logp"].append(p[y].log())
            facts["entropy"].append(-(p * p.log()).sum())
            facts["accuracy"].append((z.argmax() == y).to(z.dtype))
            facts["logits"].append(z.mean())
            facts["alignment"].append(p[y].log() - (p * p).sum().log())
        empty = row.new_zeros(0)
        rows.append({k: torch.stack(v) if v else empty for k, v in facts.items()})
    return rows


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
def test_is_the_sum_over_the_tokens_that_count(lazy: bool) -> None:
    hidden, weight = head()
    labels = answers()
    with torch.no_grad():  # one token that is the likeliest
        hidden[1, 3] = 4 * weight[labels[1, 4]]
    logits = onepass.LazyLogits(hidden, weight) if lazy else hidden @ weight.T
    rows = plain(hidden.detach() @ weight.T, labels)
    with onepass.strict():
        got = sequence_logps(logits, labels, want=WANT)
    assert isinstance(got, SequenceLogps)
    assert got.lengths.tolist() == [last - first for first, last in KEPT]
    for fact, value in zip(("logp", *WANT), (got.logps, *got[2:-1]), strict=True):
        assert value is not None and value.requires_grad == (fact == "logp"), fact
        expected = torch.stack([row[fact].sum() for row in rows])
        torch.testing.assert_close(value.detach().to(expected), expected, msg=fact)
    assert got.correct is not None and int(got.correct[1]) >= 1

    with onepass.strict():
        mean = sequence_logps(logits, labels, average=True)
    assert mean[2:] == (None,) * 5
    torch.testing.assert_close(mean.logps, got.logps / got.lengths)


@pytest.mark.parametrize("impl", ["auto", "torch"])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("want", [(), WANT], ids=["bare", "everything"])
@pytest.mark.parametrize("weighted", [False, True], ids=["all", "weighted"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_lazy_equals_plain(
    average: bool, weighted: bool, want: tuple[str, ...], frozen: bool, impl: str
) -> None:
    labels = answers()
    upstream = torch.tensor([0.3, -1.2, 2.0, 0.7], dtype=torch.float64, device=DEVICE)
    weights = torch.rand(B, S, dtype=torch.float64, device=DEVICE) if weighted else None

    def run(lazy: bool) -> tuple[list[Tensor], list[Tensor]]:
        hidden, weight = head(frozen=frozen)
        logits = onepass.LazyLogits(hidden, weight) if lazy else hidden @ weight.T
        with onepass.strict():
            got = sequence_logps(
                logits, labels, weights=weights, average=average, want=want, impl=impl
            )
        leaves = [hidden] if frozen else [hidden, weight]
        total = (got.logps * upstream).sum()
        if weighted:  # without the weights in the same pass, as for sft beside LD-DPO
            assert got.unweighted is not None
            total = total + (got.unweighted * upstream.flip(0)).sum()
        grads = torch.autograd.grad(total, leaves)
        return [t.detach() for t in got if t is not None], list(grads)

    (values, grads), (expected, expected_grads) = run(True), run(False)
    assert len(values) == 2 + len(want) + weighted
    assert all(float(grad.abs().sum()) > 0 for grad in grads)
    for got, wanted in zip([*values, *grads], [*expected, *expected_grads], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
def test_gradients(lazy: bool) -> None:
    hidden, weight = head()
    labels = answers()
    weights = torch.rand(B, S, dtype=torch.float64, device=DEVICE)

    def logps(hidden: Tensor) -> Tensor:
        logits = onepass.LazyLogits(hidden, weight) if lazy else hidden @ weight.T
        return sequence_logps(logits, labels, weights=weights, average=True).logps

    assert torch.autograd.gradcheck(logps, [hidden], raise_exception=True)


# ---------------------------------------------------------------- what has no say


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
def test_prompt_and_padding_have_no_say(lazy: bool) -> None:
    hidden, weight = head()
    labels = answers()
    predicts = torch.zeros(B, S, dtype=torch.bool, device=DEVICE)
    predicts[:, :-1] = labels[:, 1:] != -100
    noise = torch.where(predicts[..., None], 0.0, 7.0)

    def run(states: Tensor, ids: Tensor) -> tuple[list[Tensor], Tensor]:
        states = states.detach().requires_grad_()
        logits = onepass.LazyLogits(states, weight) if lazy else states @ weight.T
        got = sequence_logps(logits, ids, want=WANT)
        (grad,) = torch.autograd.grad(got.logps.sum(), states)
        return [t.detach() for t in got if t is not None], grad

    expected, expected_grad = run(hidden, labels)
    others, grad = run(hidden + noise, labels)
    for got, wanted in zip(others, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(grad, expected_grad)
    assert float(grad[~predicts].abs().max()) == 0

    # Padding, on either side.
    pad, ids = hidden.new_full((B, 3, D), 5.0), labels.new_full((B, 3), -100)
    for states, padded in (
        (torch.cat([hidden, pad], 1), torch.cat([labels, ids], 1)),
        (torch.cat([pad, hidden], 1), torch.cat([ids, labels], 1)),
    ):
        for got, wanted in zip(run(states, padded)[0], expected, strict=True):
            torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("lazy", [False, True], ids=["plain", "lazy"])
@pytest.mark.parametrize("average", [False, True], ids=["sum", "mean"])
def test_answers_without_tokens(average: bool, lazy: bool) -> None:
    labels = answers()
    labels[1] = -100
    for ids in (labels, torch.full_like(labels, -100)):
        hidden, weight = head()
        logits = onepass.LazyLogits(hidden, weight) if lazy else hidden @ weight.T
        got = sequence_logps(logits, ids, average=average, want=WANT)
        for value in (t.detach() for t in got if t is not None):
            assert float(value[1]) == 0
        assert int(got.lengths[1]) == 0
        got.logps.sum().backward()
        assert hidden.grad is not None and hidden.grad.isfinite().all()
        assert float(hidden.grad[1].abs().max()) == 0


def test_the_first_label_is_predicted_by_nothing() -> None:
    hidden, weight = head()
    labels = answers()
    labels[:, 0] = 3
    got = sequence_logps(hidden @ weight.T, labels)
    assert torch.equal(got.lengths, sequence_logps(hidden @ weight.T, answers()).lengths)
    torch.testing.assert_close(got.logps, sequence_logps(hidden @ weight.T, answers()).logps)


def test_labels_that_are_shifted_already() -> None:
    hidden, weight = head()
    logits, labels = hidden @ weight.T, answers()
    shifted = torch.cat([labels[:, 1:], labels.new_full((B, 1), -100)], 1)
    weights = torch.rand(B, S, dtype=torch.float64, device=DEVICE)
    moved = torch.cat([weights[:, 1:], weights[:, :1]], 1)
    torch.testing.assert_close(
        sequence_logps(logits, shifted, shift=False, weights=moved, want=WANT)[:2],
        sequence_logps(logits, labels, weights=weights, want=WANT)[:2],
    )


def test_precision_of_half_logits() -> None:
    hidden, weight = head(torch.bfloat16)
    got = sequence_logps(onepass.LazyLogits(hidden, weight), answers(), want=WANT)
    assert got.logps.dtype == torch.float32
    exact = sequence_logps(hidden.double() @ weight.double().T, answers())
    torch.testing.assert_close(got.logps.double(), exact.logps, rtol=0.02, atol=0.1)


# ---------------------------------------------------------------- work


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's profiler tells shapes of CPU operators here")
@pytest.mark.parametrize("want", [(), WANT], ids=["bare", "everything"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_of_the_head(dtype: torch.dtype, want: tuple[str, ...]) -> None:
    """Of the tokens that count: the policy's logits and its gradient, the reference's logits. On a
    CPU in bfloat16 the policy's logits twice: a gradient made ahead would be rounded twice."""
    unit = sum(last - first for first, last in KEPT) * D * V
    hidden, weight = head(dtype)
    labels = answers()

    def policy() -> None:
        lazy = onepass.LazyLogits(hidden, weight)
        sequence_logps(lazy, labels, want=want).logps.square().sum().backward()

    def reference() -> None:
        with torch.no_grad():
            got = sequence_logps(onepass.LazyLogits(hidden, weight), labels, want=want)
        assert not got.logps.requires_grad

    assert counted_flops(policy) == (6 if dtype == torch.bfloat16 else 4) * unit
    assert counted_flops(reference) == 2 * unit


# ---------------------------------------------------------------- LD-DPO and WPO


def formula_of_ld(logps: Tensor, labels: Tensor, ld_alpha: float) -> Tensor:
    """Shared part and tail, one token at a time."""
    total = []
    half = len(labels) // 2
    lengths = [int((row[1:] != -100).sum()) for row in labels]
    for i, row in enumerate(labels):
        shared = min(lengths[i % half], lengths[i % half + half])
        place, value = 0, logps.new_zeros(())
        for t in range(1, labels.shape[1]):
            if row[t] != -100:
                place += 1
                value = value + logps[i, t - 1] * (1 if place <= shared else ld_alpha)
        total.append(value)
    return torch.stack(total)


@pytest.mark.parametrize("first_counts", [False, True], ids=["prompted", "from-the-start"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0])
def test_ld_weights(ld_alpha: float, first_counts: bool) -> None:
    hidden, weight = head()
    labels = answers()
    labels[0, 5] = -100  # a gap, as between the turns of a conversation
    if first_counts:
        labels[2, :3] = 4
    weights = ld_weights(labels, ld_alpha)
    assert weights.shape == labels.shape and weights.dtype == torch.float32
    logits = hidden @ weight.T
    ids = labels[:, 1:].clamp(min=0)[..., None]
    logps = logits[:, :-1].log_softmax(-1).gather(-1, ids).squeeze(-1)
    got = sequence_logps(logits, labels, weights=weights)
    expected = formula_of_ld(logps, labels, ld_alpha)
    torch.testing.assert_close(got.logps, expected, rtol=1e-6, atol=1e-6)
    unweighted = sequence_logps(logits, labels)
    assert torch.equal(got.lengths, unweighted.lengths)
    assert (ld_alpha == 1) == bool(torch.allclose(got.logps, unweighted.logps))


def test_ld_weights_of_labels_that_are_shifted_already() -> None:
    labels = answers()
    shifted = torch.cat([labels[:, 1:], labels.new_full((B, 1), -100)], 1)
    moved = ld_weights(shifted, 0.3, shift=False)[:, :-1]
    counts = labels[:, 1:] != -100
    assert torch.equal(moved[counts], ld_weights(labels, 0.3)[:, 1:][counts])


def test_wpo_weights() -> None:
    hidden, weight = head()
    labels = answers()
    labels[3] = -100
    got = sequence_logps(hidden @ weight.T, labels, want=("alignment",))
    assert got.alignment is not None
    weights = wpo_weights(got.alignment, got.lengths)
    rows = plain((hidden @ weight.T).detach(), labels)
    means = [row["alignment"].mean() if len(row["logp"]) else torch.zeros(()) for row in rows]
    expected = torch.stack([(means[i] + means[i + 2]).exp() for i in range(2)]).to(weights)
    torch.testing.assert_close(weights, expected)
    assert not weights.requires_grad


# ---------------------------------------------------------------- what is refused


def test_what_does_not_fit() -> None:
    hidden, weight = (t.detach() for t in head())
    logits, labels = hidden @ weight.T, answers()
    numbers: Any = labels.tolist()
    refused: list[tuple[Any, type[Exception], str]] = [
        (lambda: sequence_logps(logits[0], labels[0]), ValueError, r"must be \[B, S, V\]"),
        (lambda: sequence_logps(logits, labels[:, 1:]), ValueError, r"labels .*\(4, 9\): got \(4,"),
        (lambda: sequence_logps(logits, labels.float()), ValueError, "labels must hold class ind"),
        (lambda: sequence_logps(numbers, labels), TypeError, "logits must be a torch"),
        (lambda: sequence_logps(logits, labels, want=["loss"]), ValueError, "want has no 'loss'"),
        (
            lambda: sequence_logps(logits, labels, weights=logits[:, 1:, 0]),
            ValueError,
            "weights must have the shape of its rows",
        ),
        (
            lambda: sequence_logps(logits, labels, weights=labels),
            ValueError,
            "weights must be float32",
        ),
        (lambda: ld_weights(labels, 1.5), ValueError, "ld_alpha must be between 0.0 and 1.0"),
        (lambda: ld_weights(labels[:3], 0.5), ValueError, r"labels must be \[2B, S\]"),
        (lambda: ld_weights(numbers, 0.5), TypeError, "labels must be a torch.Tensor"),
        (lambda: wpo_weights(torch.ones(3), torch.ones(3)), ValueError, r"must be \[2B\]"),
        (lambda: wpo_weights(torch.ones(4), torch.ones(2)), ValueError, "lengths must have the"),
    ]
    if DEVICE == "cpu":
        wrong = labels.masked_fill(labels >= 0, V)
        refused.append((lambda: sequence_logps(logits, wrong), IndexError, "labels"))
    for call, error, said in refused:
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value)
