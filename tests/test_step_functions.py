"""The scores' definition against formulas in fp64, written out for one row at a time.

Values and gradients of every score, with another row or another token of the same row as the
contrast, on whole and on lazy logits; what must hold among scores; masked vocabularies; what is
refused.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops.vocab_stats import vocab_stats
from onepass.step_functions import scores

core = importlib.import_module("onepass.step_functions.core")

N, V, D = 4, 37, 8
TARGET = torch.tensor([5, V - 1, 0, 11])
CONTRAST = torch.tensor([9, 2, 0, V - 1])
SINGLE = ("logit", "probability", "entropy", "crossentropy", "perplexity")
PAIRS = (
    *("contrast_logits", "contrast_prob", "contrast_logits_diff", "contrast_prob_diff"),
    *("pcxmi", "in_context_pvi"),
)
EVERY = (*SINGLE, *PAIRS, "kl_divergence", "mc_dropout_prob_avg", "top_p_size")


def kept_tokens(z: Tensor, top_k: int, top_p: float, least: int) -> list[int]:
    """The tokens of a row that the filter keeps, one at a time from the smallest."""
    p = z.exp() / z.exp().sum()
    order = sorted(range(len(z)), key=lambda v: z[v].item())
    kept, below = [], 0.0
    for place, v in enumerate(order):
        below += p[v].item()
        if below > 1 - top_p or place >= len(z) - least or top_p == 1:
            kept.append(v)
    if top_k:
        kept = kept[-max(top_k, least) :]
    return kept


def plain(
    name: str,
    z: Tensor,
    t: int,
    q: Tensor,
    c: int,
    noisy: Tensor,
    *,
    base: str = "e",
    logprob: bool = False,
    top_k: int = 0,
    top_p: float = 1.0,
    min_tokens_to_keep: int = 1,
    eps: float = 0.0,
) -> Tensor:
    """One score of one row z [V] in fp64, from its formula; q is the contrast's row."""
    p, r = z.exp() / z.exp().sum(), q.exp() / q.exp().sum()
    own, other = (p[t].log(), r[c].log()) if logprob else (p[t], r[c])
    if name == "logit":
        return z[t]
    if name == "probability":
        return own
    if name == "entropy":
        return -sum((x * x.log() for x in p if x.item() > 0), z.new_zeros(()))
    if name == "crossentropy":
        return -p[t].log2() if base == "2" else -p[t].log()
    if name == "perplexity":
        return 1 / p[t]
    if name == "contrast_logits":
        return q[c]
    if name == "contrast_prob":
        return other
    if name == "contrast_logits_diff":
        return z[t] - q[c]
    if name == "contrast_prob_diff":
        return own - other
    if name == "pcxmi":
        return -(p[t] / r[c]).log2()
    if name == "in_context_pvi":
        return -p[t].log() + r[c].log()
    if name == "mc_dropout_prob_avg":
        draws = noisy if logprob else noisy.exp()
        mean = draws.sum() / len(draws)
        deviation = ((draws - mean).square().sum() / (len(draws) - 1)).sqrt()
        return (own - mean) / (deviation + eps)
    if name == "top_p_size":
        return z.new_tensor(float(len(kept_tokens(z, 0, top_p, 1))))
    kept = kept_tokens((z + q).detach(), top_k, top_p, min_tokens_to_keep)
    a, b = z[kept].exp(), q[kept].exp()
    a, b = a / a.sum(), b / b.sum()
    terms = (x * (x / y).log() for x, y in zip(a, b, strict=True) if x.item() > 0)
    return sum(terms, z.new_zeros(()))


def plain_rows(name: str, z: Tensor, q: Tensor, noisy: Tensor, c: Tensor, **options: Any) -> Tensor:
    rows = zip(z, TARGET.tolist(), q, c.tolist(), noisy.unbind(1), strict=True)
    return torch.stack([plain(name, *row, **options) for row in rows])


def drawn(device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """logits, contrast logits [N, V] and log p of noisy runs [3, N]; the logits' values are those
    of `dtype`."""
    pick = torch.Generator().manual_seed(seed)
    z, q = (2 * torch.randn(N, V, generator=pick) for _ in range(2))
    noisy = torch.rand(3, N, generator=pick).log()
    return [z.to(device, dtype), q.to(device, dtype), noisy.to(device)]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bits": {"base": "2"},
    "logprob": {"logprob": True, "eps": 0.01},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.7},
    "both": {"top_k": 3, "top_p": 0.9, "min_tokens_to_keep": 5},
    "least": {"top_p": 0.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("same_row", [False, True], ids=["another_row", "same_row"])
def test_every_score_and_its_gradient(
    options: dict[str, Any], same_row: bool, impl: str, device: str
) -> None:
    names = [n for n in EVERY if not (same_row and n == "kl_divergence")]
    z, q, noisy = (tensor.requires_grad_() for tensor in drawn(device))
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in (z, q, noisy)]
    others: dict[str, Any] = {} if same_row else {"contrast_logits": q}
    others |= {"contrast_ids": CONTRAST.to(device), "noisy_logps": noisy, "impl": impl}
    got = scores(z, TARGET.to(device), names, **others, **options)
    assert list(got) == names
    for name in names:
        row = wide[0] if same_row else wide[1]
        wanted = plain_rows(name, wide[0], row, wide[2], CONTRAST, **options)
        assert got[name].dtype == (torch.int64 if name == "top_p_size" else torch.float32)
        result = got[name].detach().double().cpu()
        torch.testing.assert_close(result, wanted.detach(), rtol=1e-5, atol=1e-6, msg=name)
        if name == "top_p_size":
            assert not got[name].requires_grad
            continue
        weights = torch.linspace(0.5, 2, N)
        kwargs: Any = {"allow_unused": True, "materialize_grads": True, "retain_graph": True}
        slopes = torch.autograd.grad(got[name] @ weights.to(device), [z, q, noisy], **kwargs)
        true = torch.autograd.grad(wanted @ weights.double(), wide, **kwargs)
        for slope, right in zip(slopes, true, strict=True):
            size = max(1.0, float(right.abs().max()))
            torch.testing.assert_close(
                slope.double().cpu(), right, rtol=1e-4, atol=2e-6 * size, msg=name
            )


def test_gradients_by_finite_differences() -> None:
    z, q, _ = (tensor.double().requires_grad_() for tensor in drawn("cpu"))

    def of_all(z: Tensor, q: Tensor) -> tuple[Tensor, ...]:
        names = [*SINGLE, *PAIRS, "kl_divergence"]
        return tuple(scores(z, TARGET, names, contrast_logits=q, contrast_ids=CONTRAST).values())

    assert torch.autograd.gradcheck(of_all, (z, q), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_fp32(
    dtype: torch.dtype, impl: str, device: str
) -> None:
    z, q, noisy = drawn(device, dtype)
    got = scores(
        *(z, TARGET.to(device), EVERY),
        contrast_logits=q,
        contrast_ids=CONTRAST.to(device),
        noisy_logps=noisy,
        top_p=0.8,
        impl=impl,
    )
    z, q, noisy = (tensor.double().cpu() for tensor in (z, q, noisy))
    for name, value in got.items():
        wanted = plain_rows(name, z, q, noisy, CONTRAST, top_p=0.8)
        torch.testing.assert_close(value.double().cpu(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def test_masked_vocabulary(impl: str, device: str) -> None:
    """Columns of -inf have no probability, and add nothing to entropy or divergence."""
    z, q, noisy = drawn(device)
    z[:, 3:5] = q[:, 3:5] = -torch.inf
    z[1, 20:] = -torch.inf
    z[1, -1], q[1, -1] = 0.0, -torch.inf  # a target that the contrast cannot say
    z.requires_grad_()
    names = [*SINGLE, "contrast_prob", "contrast_prob_diff", "pcxmi", "top_p_size"]
    got = scores(
        *(z, TARGET.to(device), names),
        contrast_logits=q,
        top_p=1.0,
        impl=impl,
    )
    wide = z.detach().double().cpu().requires_grad_()
    for name, value in got.items():
        wanted = plain_rows(name, wide, q.double().cpu(), noisy.double().cpu(), TARGET)
        if name == "top_p_size":
            wanted = (wide > -torch.inf).sum(-1).double()
        torch.testing.assert_close(
            value.double().cpu(), wanted, rtol=1e-5, atol=1e-6, check_dtype=False, msg=name
        )
        assert not value.isnan().any()
    entropy = got["entropy"].sum()
    (slope,) = torch.autograd.grad(entropy, z)
    assert slope.isfinite().all() and (slope[z == -torch.inf] == 0).all()
    for options in ({}, {"top_k": 9}, {"top_p": 0.8}):
        rows = slice(2, 4)
        kl = scores(
            *(z[rows], TARGET[rows].to(device), ["kl_divergence"]),
            contrast_logits=q[rows],
            impl=impl,
            **options,
        )["kl_divergence"]
        for got_kl, own, other in zip(kl, wide[rows], q[rows].double().cpu(), strict=True):
            wanted = plain("kl_divergence", own, 0, other, 0, noisy[:, 0], **options)
            assert got_kl.item() == pytest.approx(wanted.item(), rel=1e-5)
        (slope,) = torch.autograd.grad(kl.sum(), z)
        assert slope.isfinite().all()


def test_a_target_of_probability_0() -> None:
    z, q, _ = drawn("cpu")
    z[0, TARGET[0]] = z[1, TARGET[1]] = z[1, CONTRAST[1]] = -torch.inf
    z.requires_grad_()
    got = scores(z, TARGET, [*SINGLE, *PAIRS], contrast_ids=CONTRAST)
    assert got["probability"][0] == 0 and got["perplexity"][0] == torch.inf
    wanted = z.double().softmax(-1)[0, CONTRAST[0]]
    assert float(got["contrast_prob"][0].detach()) == pytest.approx(wanted.item(), rel=1e-5)
    assert float(got["contrast_prob_diff"][0].detach()) == pytest.approx(-wanted.item(), rel=1e-5)
    assert got["contrast_prob"][1] == 0 and got["pcxmi"][0] == torch.inf
    (slope,) = torch.autograd.grad(got["contrast_prob"].sum(), z)
    assert slope.isfinite().all()


def test_identities() -> None:
    z, q, _ = (tensor.double() for tensor in drawn("cpu"))
    got = scores(z, TARGET, EVERY[:-2], contrast_logits=q, contrast_ids=CONTRAST)
    torch.testing.assert_close(got["pcxmi"] * math.log(2), got["in_context_pvi"])
    torch.testing.assert_close(got["perplexity"] * got["probability"], torch.ones(N).double())
    assert (got["entropy"] <= math.log(V)).all() and (got["kl_divergence"] > 0).all()
    bits = scores(z, TARGET, ["crossentropy", "perplexity"], base="2")
    torch.testing.assert_close(bits["crossentropy"] * math.log(2), got["crossentropy"])
    torch.testing.assert_close(bits["perplexity"], got["perplexity"])
    even = scores(torch.zeros(1, V), TARGET[:1], ["entropy", "top_p_size"], top_p=1.0)
    assert float(even["entropy"]) == pytest.approx(math.log(V))
    assert int(even["top_p_size"]) == V

    same: Any = [{"contrast_logits": z, "contrast_ids": TARGET}, {"contrast_logits": z}]
    for options in same:
        got = scores(z, TARGET, [*PAIRS, "kl_divergence"], **options)
        for name in ("contrast_prob_diff", "contrast_logits_diff", "pcxmi", "kl_divergence"):
            assert (got[name] == 0).all(), name
    row = scores(z, TARGET, PAIRS, contrast_ids=TARGET)
    assert (row["contrast_prob_diff"] == 0).all() and (row["pcxmi"] == 0).all()
    by_row = scores(z, TARGET, PAIRS, contrast_ids=CONTRAST)
    by_two = scores(z, TARGET, PAIRS, contrast_ids=CONTRAST, contrast_logits=z)
    torch.testing.assert_close(by_row, by_two)


def test_an_offset_of_the_row_changes_nothing() -> None:
    z, _, _ = drawn("cpu")
    z = (z * 64).round() / 64  # exact after the offset, too
    names = [
        "probability",
        "entropy",
        "crossentropy",
        "contrast_prob",
        "contrast_prob_diff",
        "pcxmi",
    ]
    near = scores(z, TARGET, names, contrast_ids=CONTRAST)
    far = scores(z + 4096, TARGET, names, contrast_ids=CONTRAST)
    torch.testing.assert_close(far, near, rtol=2e-6, atol=1e-7)


def test_a_vocabulary_of_50257(device: str) -> None:
    pick = torch.Generator().manual_seed(3)
    z, q = (3 * torch.randn(2, 50257, generator=pick) for _ in range(2))
    ids = torch.tensor([50256, 7])
    got = scores(
        *(z.to(device), ids.to(device), [*SINGLE, "kl_divergence", "pcxmi", "top_p_size"]),
        contrast_logits=q.to(device),
        top_p=0.9,
    )
    logp, logq = z.double().log_softmax(-1), q.double().log_softmax(-1)
    at = logp.gather(-1, ids[:, None])[:, 0]
    torch.testing.assert_close(got["crossentropy"].double().cpu(), -at, rtol=1e-6, atol=1e-6)
    entropy = -(logp.exp() * logp).sum(-1)
    torch.testing.assert_close(got["entropy"].double().cpu(), entropy, rtol=1e-6, atol=1e-6)
    order = (z + q).double().softmax(-1).sort(descending=True)
    for row in range(2):  # from the largest: the token that completes 0.9 is the last one kept
        n = int((order.values[row].cumsum(0) < 0.9).sum()) + 1
        kept = order.indices[row, :n]
        a, b = logp[row, kept].log_softmax(0), logq[row, kept].log_softmax(0)
        wanted = float((a.exp() * (a - b)).sum())
        assert float(got["kl_divergence"][row]) == pytest.approx(wanted, rel=1e-3)
        size = int((logp[row].exp().sort(descending=True).values.cumsum(0) < 0.9).sum()) + 1
        assert abs(int(got["top_p_size"][row]) - size) <= 2


# ---------------------------------------------------------------- lazily, and in one pass


@pytest.mark.parametrize("filters", [{}, {"top_k": 5, "top_p": 0.8}], ids=["whole", "filtered"])
def test_lazy_logits_are_not_made(filters: dict[str, Any], device: str) -> None:
    pick = torch.Generator().manual_seed(2)
    hidden, other, weight = (
        torch.randn(shape, generator=pick).to(device).requires_grad_()
        for shape in ((2, 3, D), (2, 3, D), (V, D))
    )
    ids = torch.randint(0, V, (2, 3), generator=pick).to(device)
    second = torch.randint(0, V, (2, 3), generator=pick).to(device)
    ids[0, 1] = -100
    noisy = torch.rand(2, 2, 3, generator=pick).log().to(device)
    results = []
    for lazy in (False, True):
        rows = [onepass.LazyLogits(h, weight) if lazy else h @ weight.T for h in (hidden, other)]
        with onepass.strict():
            got = scores(
                *(rows[0], ids, EVERY),
                contrast_logits=rows[1],
                contrast_ids=second,
                noisy_logps=noisy,
                **filters,
            )
        assert all(value.shape == ids.shape and value[0, 1] == 0 for value in got.values())
        total = torch.stack([v.sum() for v in got.values() if v.requires_grad]).sum()
        slopes = torch.autograd.grad(total, [hidden, other, weight])
        results.append(({k: v.detach() for k, v in got.items()}, slopes))
    torch.testing.assert_close(results[1], results[0], rtol=2e-4, atol=2e-5)


def test_one_pass_serves_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = []

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted.append(kwargs["want"])
        return vocab_stats(logits, *args, **kwargs)

    monkeypatch.setattr(core, "vocab_stats", counted)
    z, q, _ = drawn("cpu")
    scores(z, TARGET, SINGLE)
    assert wanted == [["entropy", "label_logit", "logp"]]
    wanted.clear()
    scores(z, TARGET, [*SINGLE, *PAIRS], contrast_ids=CONTRAST)
    assert len(wanted) == 1
    wanted.clear()
    scores(z, TARGET, [*SINGLE, *PAIRS], contrast_ids=CONTRAST, contrast_logits=q)
    assert wanted == [["entropy", "label_logit", "logp"], ["label_logit", "logp"]]
    wanted.clear()
    scores(z, TARGET, ["kl_divergence", "top_p_size"], contrast_logits=q)
    assert wanted == []


def test_rows_that_do_not_count_are_not_read() -> None:
    z, q, noisy = drawn("cpu")
    ids, second = TARGET.clone(), CONTRAST.clone()
    ids[0], second[1] = -100, -100
    z[0] = torch.nan
    z.requires_grad_()
    got = scores(z, ids, EVERY, contrast_logits=q, contrast_ids=second, noisy_logps=noisy)
    assert all(value[0] == 0 for value in got.values())
    for name in (*PAIRS, "kl_divergence"):
        assert got[name][1] == 0, name
    assert got["probability"][1] > 0
    floats = [value for value in got.values() if value.requires_grad]
    (slope,) = torch.autograd.grad(torch.stack([v[1:].sum() for v in floats]).sum(), z)
    assert slope.isfinite().all() and (slope[0] == 0).all()


def test_names_of_any_iterable() -> None:
    logits, ids = torch.randn(2, 5), torch.zeros(2, dtype=torch.int64)
    names: Any = iter(["logit", "entropy"])
    assert list(scores(logits, ids, names)) == ["logit", "entropy"]


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.5}])
def test_nan_is_not_hidden_by_a_filter(filters: dict[str, Any]) -> None:
    z, q = torch.randn(2, 3, V)
    z[1, 5] = math.nan
    names, ids = ["kl_divergence", "top_p_size"], torch.zeros(3, dtype=torch.int64)
    got = scores(z, ids, names, contrast_logits=q, **filters)
    assert got["kl_divergence"].isnan().tolist() == [False, True, False]
    assert got["top_p_size"][1] == V


def test_no_rows() -> None:
    empty = torch.zeros(0, V)
    ids = torch.zeros(0, dtype=torch.int64)
    names = [*SINGLE, "kl_divergence", "top_p_size", "mc_dropout_prob_avg"]
    noisy = torch.zeros(3, 0)
    got = scores(empty, ids, names, contrast_logits=empty, top_k=2, noisy_logps=noisy)
    assert all(value.shape == (0,) for value in got.values())


# ---------------------------------------------------------------- what is refused

Z, Q, _NOISY = drawn("cpu")
OTHER_WIDTH = {torch.float32: torch.float64, torch.float64: torch.float32}
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"names": ["entropi"]}, AttributeError, r"no score 'entropi'.*logit, probability"),
    "nothing": ({"names": []}, ValueError, "no score is asked for"),
    "no_tensor": ({"logits": [1.0]}, TypeError, "logits must be a torch.Tensor"),
    "integers": ({"logits": Z.long()}, ValueError, "logits must be float32"),
    "other_rows": ({"target_ids": TARGET[:2]}, ValueError, "target_ids must have one class index"),
    "float_ids": ({"target_ids": TARGET.float()}, ValueError, "target_ids must hold class indices"),
    "beyond": ({"target_ids": TARGET + V}, IndexError, r"target_ids\[0\] is 42"),
    "contrast_beyond": (
        {"names": ["pcxmi"], "contrast_ids": TARGET + V},
        IndexError,
        r"contrast_ids\[0\] is 42",
    ),
    "no_contrast": ({"names": ["pcxmi"]}, ValueError, "pcxmi needs contrast_ids or contrast_log"),
    "no_other_row": (
        {"names": ["kl_divergence"], "contrast_ids": CONTRAST},
        ValueError,
        "kl_divergence needs contrast_logits",
    ),
    "contrast_batch": (
        {"names": ["pcxmi"], "contrast_logits": Q[:2]},
        ValueError,
        r"contrast_logits must have the shape of logits, \(4, 37\): got \(2, 37\)",
    ),
    "contrast_dtype": (
        {"names": ["kl_divergence"], "contrast_logits": Q.to(OTHER_WIDTH[Q.dtype])},
        ValueError,
        "kl_divergence needs logits and contrast_logits both float64 or neither: got torch.float",
    ),
    "base": ({"base": "10"}, ValueError, "base must be one of e, 2: got '10'"),
    "impl": ({"impl": "jax"}, ValueError, "impl must be one of"),
    "top_p_above": ({"top_p": 1.1}, ValueError, "top_p must be between 0 and 1: got 1.1"),
    "top_p_below": ({"top_p": -0.1}, ValueError, "top_p must be between 0 and 1: got -0.1"),
    "top_p_nan": ({"top_p": math.nan}, ValueError, "top_p must be between"),
    "top_p_text": ({"top_p": "all"}, TypeError, "top_p must be a number"),
    "top_k_below": ({"top_k": -1}, ValueError, "top_k must be between 0 and 37.*: got -1"),
    "top_k_above": ({"top_k": V + 1}, ValueError, "top_k must be between 0 and 37.*: got 38"),
    "top_k_float": ({"top_k": 2.0}, TypeError, "top_k must be a whole number: got 2.0"),
    "keep_none": ({"min_tokens_to_keep": 0}, ValueError, "min_tokens_to_keep must be between 1"),
    "no_noise": ({"names": ["mc_dropout_prob_avg"]}, ValueError, "needs noisy_logps"),
    "one_noisy_run": (
        {"names": ["mc_dropout_prob_avg"], "noisy_logps": _NOISY[:1]},
        ValueError,
        r"noisy_logps must be \[n, ...\], n >= 2 runs of rows \(4,\): got \(1, 4\)",
    ),
    "eps": (
        {"names": ["mc_dropout_prob_avg"], "noisy_logps": _NOISY, "eps": -1.0},
        ValueError,
        "eps must be finite and at least 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_runs(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changed, kind, message = REFUSED[case]
    for op in ("vocab_stats", "vocab_pair_stats"):
        monkeypatch.setattr(core, op, None)
    given = {"logits": Z, "target_ids": TARGET, "names": ["probability"], **changed}
    with pytest.raises(kind, match=message):
        scores(**given)
