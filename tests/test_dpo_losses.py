"""dpo_loss: every loss under every divergence against a transcription in plain exponentials and
logarithms, the identities among them, and what extreme or unfit arguments get."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass.dpo
from onepass.dpo import check_loss
from onepass.dpo.losses import (
    DIVERGENCES,
    LINKS,
    LOSS_TYPES,
    NOTEBOOK,
    OF_SCORES,
    SMOOTHED,
    SORTING,
)

dpo_loss: Any = onepass.dpo.dpo_loss  # called with lists and dicts of arguments
BETA, EPS, A, TAU = 0.7, 0.1, 0.4, 0.05
PAIRS = [
    *((name, divergence) for name in OF_SCORES for divergence in DIVERGENCES),
    *((name, "reverse_kl") for name in LINKS if name not in OF_SCORES),
]
SEVEN = ("sigmoid", "hinge", "ipo", "alpha", "JSD", "FKL", "RKL")


def logps(n: int = 5, scale: float = 1.5, seed: int = 0) -> list[Tensor]:
    """Policy's chosen and rejected, reference's chosen and rejected; float64."""
    pick = torch.Generator().manual_seed(seed)
    mean = torch.tensor([-12.0, -14.0, -12.5, -13.5], dtype=torch.float64)
    noise = torch.randn(4, n, generator=pick, dtype=torch.float64)
    return list(mean[:, None] + scale * noise)


def lengths(n: int = 5) -> dict[str, Any]:
    return {"chosen_lengths": torch.arange(3, 3 + n), "rejected_lengths": torch.arange(n, 0, -1)}


# ---------------------------------------------------------------- the transcription


def f(name: str, u: Tensor, a: float) -> Tensor:
    """The divergence's generator, in the probability ratio u itself."""
    if name == "reverse_kl" or (name == "alpha_divergence" and a == 0):
        return u * u.log()
    if name == "forward_kl":
        return -u.log()
    if name == "js_divergence":
        return u * u.log() - (u + 1) * ((u + 1) / 2).log()
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


def score(name: str, r: float, a: float) -> float:
    """f'(u) - f'(1), from autograd."""
    u = torch.tensor([math.exp(r), 1.0], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(f(name, u, a).sum(), u)
    return float(slope[0] - slope[1])


def sig(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cdpo(x: float) -> float:
    return -(1 - EPS) * math.log(sig(x)) - EPS * math.log(sig(-x))


Plain = Callable[[dict[str, float]], float]
PLAIN: dict[str, Plain] = {
    "sigmoid": lambda p: cdpo(BETA * p["d"]),
    "hinge": lambda p: max(0.0, 1 - BETA * p["d"]),
    "ipo": lambda p: (p["d"] - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda p: (
        sig(BETA * p["d"]) * math.log(sig(BETA * p["d"]) / (1 - EPS))
        + sig(-BETA * p["d"]) * math.log(sig(-BETA * p["d"]) / EPS)
    ),
    "nca_pair": lambda p: (
        -math.log(sig(BETA * p["rw"]))
        - math.log(sig(-BETA * p["rw"])) / 2
        - math.log(sig(-BETA * p["rl"])) / 2
    ),
    "robust": lambda p: (
        (-(1 - EPS) * math.log(sig(BETA * p["d"])) + EPS * math.log(sig(-BETA * p["d"])))
        / (1 - 2 * EPS)
    ),
    "bco_pair": lambda p: -math.log(sig(BETA * p["rw"]) * sig(-BETA * p["rl"])),
    "sppo_hard": lambda p: (p["rw"] - 0.5 / BETA) ** 2 + (p["rl"] + 0.5 / BETA) ** 2,
    "aot": lambda p: cdpo(BETA * (p["sorted policy"] - p["sorted reference"])),
    "aot_unpaired": lambda p: cdpo(BETA * (p["sorted rw"] - p["sorted rl"])),
    "apo_zero": lambda p: 1 - sig(BETA * p["rw"]) + sig(BETA * p["rl"]),
    "apo_down": lambda p: sig(BETA * p["rw"]) + 1 - sig(BETA * (p["rw"] - p["rl"])),
    "discopop": lambda p: (
        -(1 - sig(BETA * p["d"] / TAU)) * math.log(sig(BETA * p["d"]))
        + sig(BETA * p["d"] / TAU) * math.exp(-BETA * p["d"])
    ),
    "sft": lambda p: p["nll"],
    "sigmoid_norm": lambda p: cdpo(BETA * p["mean d"]),
    "slic_hf": lambda p: max(0.0, 1 / BETA - p["pw"] + p["pl"]),
}


def transcribed(
    name: str, divergence: str, given: list[Tensor], a: float = A, ipo_average: bool = False
) -> list[float]:
    pw, pl, qw, ql = (t.tolist() for t in given)
    n = len(pw)
    long = [t.tolist() for t in lengths(n).values()]
    rw, rl = [x - y for x, y in zip(pw, qw, strict=True)], [pl[i] - ql[i] for i in range(n)]
    sw, sl = [score(divergence, r, a) for r in rw], [score(divergence, r, a) for r in rl]
    out = []
    for i in range(n):
        facts = {
            "pw": pw[i], "pl": pl[i], "rw": rw[i], "rl": rl[i], "d": sw[i] - sl[i],
            "mean d": sw[i] / long[0][i] - sl[i] / long[1][i],
            "sorted policy": sorted(pw[j] - pl[j] for j in range(n))[i],
            "sorted reference": sorted(qw[j] - ql[j] for j in range(n))[i],
            "sorted rw": sorted(rw)[i], "sorted rl": sorted(rl)[i],
            "nll": -sum(pw) / sum(long[0]),
        }  # fmt: skip
        if ipo_average:
            facts["d"] = facts["mean d"]
        out.append(PLAIN[name](facts))
    return out


def smoothing(name: str) -> dict[str, float]:
    """For the losses that take it."""
    return {"label_smoothing": EPS} if name in (*SMOOTHED, *NOTEBOOK) else {}


def options(name: str, divergence: str = "reverse_kl", n: int = 5) -> dict[str, Any]:
    return {
        "loss_type": name,
        "f_divergence": divergence,
        "beta": BETA,
        "alpha": A,
        **smoothing(name),
        **lengths(n),
    }


def test_the_transcription_knows_every_loss() -> None:
    assert set(PLAIN) == set(LINKS) and len(LINKS) == 16
    assert set(LOSS_TYPES) == {*LINKS, "alpha", "JSD", "FKL", "RKL"}


@pytest.mark.parametrize(("name", "divergence"), PAIRS)
def test_is_the_transcription(name: str, divergence: str) -> None:
    given = logps()
    expected = torch.tensor(transcribed(name, divergence, given), dtype=torch.float64)
    got = dpo_loss(*given, **options(name, divergence))
    torch.testing.assert_close(got.losses, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(got.chosen_rewards, BETA * (given[0] - given[2]))
    torch.testing.assert_close(got.rejected_rewards, BETA * (given[1] - given[3]))
    single = dpo_loss(*[t.float() for t in given], **options(name, divergence))
    assert single.losses.dtype == torch.float32
    torch.testing.assert_close(single.losses.double(), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_ipo_averages_on_request(divergence: str) -> None:
    given = logps()
    expected = transcribed("ipo", divergence, given, ipo_average=True)
    got = dpo_loss(*given, ipo_average=True, **options("ipo", divergence)).losses
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert not torch.allclose(got, dpo_loss(*given, **options("ipo", divergence)).losses)


@pytest.mark.parametrize(("name", "divergence"), PAIRS)
def test_gradients(name: str, divergence: str) -> None:
    given = [t.requires_grad_() for t in logps()]

    def losses(*leaves: Tensor) -> Tensor:
        return dpo_loss(*leaves, **options(name, divergence)).losses

    assert torch.autograd.gradcheck(losses, given, raise_exception=True)


@pytest.mark.parametrize(("name", "divergence"), PAIRS)
def test_rewards_carry_no_gradient(name: str, divergence: str) -> None:
    given = [t.requires_grad_() for t in logps()]
    got = dpo_loss(*given, **options(name, divergence))
    assert got.losses.requires_grad and got.losses.shape == (5,)
    assert not got.chosen_rewards.requires_grad and not got.rejected_rewards.requires_grad


# ---------------------------------------------------------------- identities


def losses_of(name: str, given: list[Tensor] | None = None, **others: Any) -> Tensor:
    settings = {"loss_type": name, "beta": BETA, **others}
    return dpo_loss(*(logps() if given is None else given), **settings).losses


def test_identities() -> None:
    close: Any = torch.testing.assert_close
    close(losses_of("RKL"), losses_of("sigmoid"), rtol=0, atol=0)
    close(losses_of("alpha"), losses_of("FKL"), rtol=0, atol=0)
    close(losses_of("alpha", alpha=1.0), losses_of("FKL"), rtol=0, atol=0)
    close(losses_of("alpha", alpha=0.0), losses_of("RKL"), rtol=0, atol=0)
    close(losses_of("alpha", alpha=9e-7), losses_of("RKL"), rtol=0, atol=0)
    close(losses_of("alpha", alpha=2e-6), losses_of("RKL"), rtol=1e-4, atol=1e-4)
    close(losses_of("alpha", alpha=-2e-6), losses_of("RKL"), rtol=1e-4, atol=1e-4)
    for a in (-0.7, 0.0, 0.3, 1.0, 2.5):
        theirs = losses_of("alpha", f_alpha_divergence_coef=1 - a)
        close(losses_of("alpha", alpha=a), theirs)
    for name, divergence in NOTEBOOK.items():
        named: dict[str, Any] = {"f_divergence": divergence, "alpha": 1.0}
        close(losses_of(name), losses_of("sigmoid", **named), rtol=0, atol=0)
        close(losses_of("hinge", f_divergence=name, alpha=1.0), losses_of("hinge", **named))
    close(losses_of("slic_hf") * BETA, losses_of("hinge", reference_free=True))
    close(losses_of("robust"), losses_of("sigmoid"))
    one: dict[str, Any] = {"chosen_lengths": torch.ones(5), "rejected_lengths": torch.ones(5)}
    close(losses_of("sigmoid_norm", **one), losses_of("sigmoid"))
    close(losses_of("ipo", ipo_average=True, **one), losses_of("ipo"))
    one_pair = logps(1)
    for name in SORTING:
        close(losses_of(name, one_pair), losses_of("sigmoid", one_pair))


@pytest.mark.parametrize("name", NOTEBOOK)
def test_names_of_the_notebook_in_any_case(name: str) -> None:
    expected = losses_of(name)
    for spelled in (name.lower(), name.upper(), name.title()):
        assert torch.equal(losses_of(spelled), expected)
        assert torch.equal(losses_of("sigmoid", f_divergence=spelled, alpha=1.0), expected)
    assert torch.equal(losses_of("Sigmoid"), losses_of("sigmoid"))


@pytest.mark.parametrize("name", ["FKL", "RKL", "JSD", "alpha", "sigmoid"])
def test_rejected_answers_matter(name: str) -> None:
    """The notebook's FKL and RKL read the chosen answer twice: constant, without a gradient."""
    given = [t.requires_grad_() for t in logps()]
    losses = losses_of(name, given)
    chosen, rejected = torch.autograd.grad(losses.sum(), given[:2])
    assert (chosen < 0).all() and (rejected > 0).all()
    assert (losses - math.log(2)).abs().min() > 1e-3
    likelier = [given[0], given[1] + 1, *given[2:]]
    assert (losses_of(name, likelier) > losses).all()


def test_smoothing_is_honoured_by_the_names_of_the_notebook() -> None:
    for name in ("sigmoid", *NOTEBOOK):
        swapped = logps()
        swapped = [swapped[1], swapped[0], swapped[3], swapped[2]]
        expected = 0.8 * losses_of(name) + 0.2 * losses_of(name, swapped)
        torch.testing.assert_close(losses_of(name, label_smoothing=0.2), expected)


@pytest.mark.parametrize("beta", [0.1, BETA, 10.0])
@pytest.mark.parametrize("name", SEVEN)
def test_loss_where_policy_is_reference(name: str, beta: float) -> None:
    pw, pl, *_ = (t.float() for t in logps())
    losses = dpo_loss(pw, pl, pw, pl, beta=beta, loss_type=name).losses
    expected = {"hinge": 1.0, "ipo": 1 / (4 * beta**2)}.get(name, math.log(2))
    torch.testing.assert_close(losses, torch.full((5,), expected))


def test_reference_free() -> None:
    pw, pl, qw, ql = logps()
    zero = torch.zeros_like(pw)
    for name in LOSS_TYPES:
        settings = {"loss_type": name, "beta": BETA, **smoothing(name), **lengths()}
        expected = dpo_loss(pw, pl, zero, zero, **settings)
        for got in (
            dpo_loss(pw, pl, qw, ql, True, **settings),
            dpo_loss(pw, pl, None, None, True, **settings),
        ):
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b)


# ---------------------------------------------------------------- extremes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("alpha", [A, 1.0, -1.0, 3.0])
def test_finite_at_the_extremes(alpha: float, dtype: torch.dtype) -> None:
    sizes = (-2000.0, -200.0, -80.5, 0.0, 80.5, 200.0, 2000.0)
    rw, rl = torch.tensor(list(itertools.product(sizes, sizes)), dtype=dtype).unbind(-1)
    zero = torch.zeros_like(rw)
    long = {"chosen_lengths": torch.ones_like(rw), "rejected_lengths": torch.ones_like(rw)}
    for (name, divergence), beta in itertools.product(PAIRS, (0.01, 0.1, 10.0)):
        leaves = [rw.clone().requires_grad_(), rl.clone().requires_grad_()]
        settings = options(name, divergence) | {"beta": beta, "alpha": alpha} | long
        losses, *_ = dpo_loss(*leaves, zero, zero, **settings)
        assert losses.isfinite().all() and losses.mean().isfinite(), (name, divergence, beta)
        losses.mean().backward()
        for leaf in leaves:
            grad = torch.zeros(1) if leaf.grad is None else leaf.grad
            assert grad.isfinite().all(), (name, divergence, beta, grad)


def test_where_the_bounds_lie() -> None:
    """An exponent stops at 80, an ipo error at 1e17, alpha is 0 below 1e-6: flat from there on, and
    nothing before."""
    zero = torch.zeros(1)

    def slope(name: str, r: float) -> float:
        leaf = torch.tensor([r], requires_grad=True)
        dpo_loss(leaf, zero, zero, zero, loss_type=name, beta=1.0).losses.backward()
        assert leaf.grad is not None
        return abs(float(leaf.grad))

    assert slope("FKL", -79.5) > 0 and slope("FKL", -80.5) == 0
    assert slope("discopop", -79.5) > 0
    assert slope("ipo", 0.9e17) > 0 and slope("ipo", 1.1e17) == 0
    given = logps()
    ratio = [given[0] - given[2], given[1] - given[3]]
    for a in (1.1e-6, 1e-5, 5e-3):
        score = [(1 - torch.exp(-a * r)) / a for r in ratio]
        expected = -(BETA * (score[0] - score[1])).sigmoid().log()
        got = losses_of("alpha", given, alpha=a)
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)
        assert not torch.equal(got, losses_of("RKL", given))


def test_the_widest_dtype_counts() -> None:
    given = logps()
    expected = losses_of("sigmoid", given)
    got = losses_of("sigmoid", [given[0].float(), *given[1:]])
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


def test_a_wrong_pair_still_pulls() -> None:
    """At a log-ratio of 200 the wrong way round, no loss that is steep there has lost its slope."""
    for name in ("sigmoid", "hinge", "ipo", "JSD", "RKL", "robust", "discopop", "sppo_hard"):
        leaves = [torch.tensor([-200.0], requires_grad=True), torch.tensor([200.0])]
        zero = torch.zeros(1)
        dpo_loss(*leaves, zero, zero, loss_type=name, **smoothing(name)).losses.backward()
        assert leaves[0].grad is not None and float(leaves[0].grad) < 0, name


def test_zero_length_answers() -> None:
    given = [t.float().requires_grad_() for t in logps(2)]
    none: dict[str, Any] = {
        "chosen_lengths": torch.tensor([0, 4]),
        "rejected_lengths": torch.tensor([0, 0]),
    }
    for name in ("ipo", "sigmoid_norm", "sft"):
        losses = losses_of(name, given, ipo_average=True, **none)
        assert losses.isfinite().all()
        grads = torch.autograd.grad(losses.sum(), given, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)


def test_half_precision_is_computed_in_float32() -> None:
    given = [t.bfloat16() for t in logps()]
    got = losses_of("ipo", given)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, losses_of("ipo", [t.float() for t in given]), rtol=0, atol=0)


def test_no_pairs() -> None:
    none = [torch.zeros(0)] * 4
    for name in LOSS_TYPES:
        assert losses_of(name, none, **smoothing(name), **lengths(0)).shape == (0,)


# ---------------------------------------------------------------- mixtures and weights


def test_a_mixture_is_the_weighted_sum() -> None:
    names, factors = ("sigmoid", "FKL", "bco_pair", "sft"), (0.8, 0.0, 0.2, 2.0)
    expected = sum(
        factor * losses_of(name, **lengths()) for name, factor in zip(names, factors, strict=True)
    )
    given = logps()
    settings = {"loss_type": names, "beta": BETA, **lengths()}
    got = dpo_loss(*given, loss_weights=factors, **settings).losses
    torch.testing.assert_close(got, expected)
    plain = dpo_loss(*given, **settings).losses
    torch.testing.assert_close(plain, sum(losses_of(name, **lengths()) for name in names))


def test_a_mixture_keeps_each_names_divergence() -> None:
    got = dpo_loss(*logps(), beta=BETA, loss_type=["JSD", "hinge"], f_divergence="reverse_kl")
    torch.testing.assert_close(got.losses, losses_of("JSD") + losses_of("hinge"))


def test_weights_scale_pairs_and_are_not_differentiated() -> None:
    weights = torch.rand(5, dtype=torch.float64, requires_grad=True)
    given = [t.requires_grad_() for t in logps()]
    got = dpo_loss(*given, beta=BETA, weights=weights).losses
    torch.testing.assert_close(got, losses_of("sigmoid") * weights.detach())
    got.sum().backward()
    assert weights.grad is None and given[0].grad is not None


def test_nll_of_weighted_sums_is_passed() -> None:
    nll = torch.tensor(1.25, dtype=torch.float64, requires_grad=True)
    got = losses_of("sft", chosen_nll=nll)
    assert torch.equal(got.detach(), torch.full((5,), 1.25, dtype=torch.float64))
    got.mean().backward()
    assert float(nll.grad) == pytest.approx(1.0)  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is refused

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"beta": 0}, ValueError, "^beta must be above 0: got 0"),
    ({"beta": -1.0}, ValueError, "^beta must be above 0: got -1.0"),
    ({"beta": math.nan}, ValueError, "^beta must be finite: got nan"),
    ({"beta": "0.1"}, TypeError, "^beta must be a number: got str"),
    ({"label_smoothing": 0.5}, ValueError, r"^label_smoothing must lie in \[0, 0.5\): got 0.5"),
    ({"label_smoothing": -0.1}, ValueError, r"^label_smoothing must lie in \[0, 0.5\): got -0.1"),
    ({"loss_type": "kto"}, ValueError, "^loss_type must be one of sigmoid, hinge, .*RKL: got 'kto"),
    ({"loss_type": ["hinge", 3]}, TypeError, "^loss_type must be a name, as 'sigmoid': got int"),
    ({"loss_type": []}, TypeError, "^loss_type must be a name, or a list of names"),
    ({"f_divergence": "tv"}, ValueError, "^f_divergence must be one of reverse_kl, .*: got 'tv'"),
    ({"alpha": 0.5, "f_alpha_divergence_coef": 0.5}, ValueError, "^alpha is 1 - .*give one"),
    ({"alpha": "1"}, TypeError, "^alpha must be a number"),
    ({"loss_type": ["hinge", "ipo"], "loss_weights": [1.0]}, ValueError, "^loss_weights must hold"),
    ({"loss_weights": [-1.0]}, ValueError, "^loss_weights must be finite and at least 0"),
    ({"loss_weights": 1.0}, TypeError, "^loss_weights must be a list"),
    (
        {"loss_type": ["hinge", "ipo"], "label_smoothing": 0.1},
        ValueError,
        "^label_smoothing is of sigmoid, .* alone: got 0.1 for hinge, ipo; leave it out",
    ),
    ({"f_divergence": "alpha"}, ValueError, "^alpha must be a number for f_divergence 'alpha'"),
    ({"loss_type": "exo_pair"}, ValueError, "^label_smoothing must be above 0 for exo_pair"),
    ({"loss_type": "FKL", "f_divergence": "JSD"}, ValueError, "^loss_type 'FKL' is .*leave one"),
    ({"discopop_tau": 0.0}, ValueError, "^discopop_tau must be above 0"),
]


@pytest.mark.parametrize(("given", "error", "said"), BAD, ids=lambda value: str(value)[:40])
def test_options_that_do_not_fit(given: Any, error: Any, said: str) -> None:
    for call in (lambda: check_loss(**given), lambda: dpo_loss(*logps(), **given)):
        with pytest.raises(error, match=said) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


@pytest.mark.parametrize("divergence", [name for name in DIVERGENCES if name != "reverse_kl"])
@pytest.mark.parametrize("name", [name for name in LINKS if name not in OF_SCORES])
def test_losses_without_f_divergence(name: str, divergence: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' has no f-divergence, since its partition"):
        check_loss(name, f_divergence=divergence, alpha=A)
    check_loss(name, f_divergence="reverse_kl")
    with pytest.raises(ValueError, match=name):
        check_loss(["hinge", name], f_divergence=divergence, alpha=A)


@pytest.mark.parametrize("name", SORTING)
def test_sorted_losses_take_no_weights(name: str) -> None:
    with pytest.raises(ValueError, match="sorts the batch"):
        dpo_loss(*logps(), loss_type=name, weights=torch.ones(5))


def test_tensors_that_do_not_fit() -> None:
    pw, pl, qw, ql = logps()
    refused: list[tuple[list[Any], dict[str, Any], type[Exception], str]] = [
        ([pw.tolist(), pl, qw, ql], {}, TypeError, "policy_chosen_logps must be a torch.Tensor"),
        ([pw.long(), pl, qw, ql], {}, ValueError, "policy_chosen_logps must be float32.*int64"),
        ([pw, pl.long(), qw, ql], {}, ValueError, "policy_rejected_logps must be float32"),
        ([pw, pl, qw.bool(), ql], {}, ValueError, "reference_chosen_logps must be float32"),
        ([pw, pl[:4], qw, ql], {}, ValueError, r"policy_rejected_logps .*\(5,\): got \(4,\)"),
        ([pw, pl, qw, ql[:1]], {}, ValueError, r"reference_rejected_logps .*\(5,\): got \(1,\)"),
        ([pw[:, None], pl, qw, ql], {}, ValueError, r"must be \[B\].*: got shape \(5, 1\)"),
        ([pw[0], pl[0], qw[0], ql[0]], {}, ValueError, r"got shape \(\)"),
        ([pw, pl, None, ql], {}, ValueError, "are None: pass them, or reference_free=True"),
        ([pw, pl.to("meta"), qw, ql], {}, ValueError, "policy_rejected_logps is on meta"),
        ([pw, pl, qw, ql], {"loss_type": "sft"}, ValueError, "chosen_lengths is None"),
        ([pw, pl, qw, ql], {"loss_type": "sigmoid_norm"}, ValueError, "chosen_lengths is None"),
        (
            [pw, pl, qw, ql],
            {"loss_type": "ipo", "ipo_average": True, "chosen_lengths": torch.ones(5)},
            ValueError,
            "rejected_lengths is None",
        ),
        ([pw, pl, qw, ql], {"weights": torch.ones(2)}, ValueError, r"weights .*got \(2,\)"),
        ([pw, pl, qw, ql], {"loss_type": "sft", "chosen_nll": pw}, ValueError, "0-dim"),
        ([pw, pl, qw, ql], {"loss_type": "sft", "chosen_nll": 1.0}, ValueError, "got float"),
    ]
    for given, others, error, said in refused:
        with pytest.raises(error, match=said) as caught:
            dpo_loss(*given, **others)
        assert "\n" not in str(caught.value)


def test_names_load_on_demand() -> None:
    for name in onepass.dpo.__all__:
        if name in ("dpo_loss", "DPOLoss", "sequence_logps", "ld_weights", "wpo_weights"):
            assert getattr(onepass.dpo, name).__module__.startswith("onepass.dpo.")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        onepass.dpo.nothing  # noqa: B018
