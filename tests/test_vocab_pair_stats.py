"""vocab_pair_stats against independent fp64 truths: values, gradients, memory, bits, bad input.

Errors are in u (2^-24 in fp32) of each quantity's natural scale. A case may be 3 times as far off
as unfused torch, and 8 u are always granted; pooled over many rows ours may not exceed torch's by
more than 5 %. Near p = q, where unfused torch returns noise, the divergences are held to relative
errors against 60 digits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops import vocab_pair_stats as module
from support.environment import NO_INTERPRETER
from support.guard import count_bytes, guard
from support.pair_truth import LAYOUTS, PairTruth, laid_out, unfused_pair_facts
from support.truth import Truth, error_in_u, exact_divergences, worst_error

FACTS = onepass.VocabPairStats._fields
DIVERGENCES = ("kl", "reverse_kl", "jsd")
FACTOR, FLOOR = 3.0, 8.0  # torch in another summation order stays within these

FP32, BF16, FP16, FP64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

interpreted = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def shape_id(value: Any) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else dtype_id(value)


# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """The arguments of one call; `target` holds logits, or probabilities where `probs` is set."""

    logits: Tensor
    target: Tensor
    probs: bool = False
    mask: Tensor | None = None
    beta: float = 0.5
    want: tuple[str, ...] = field(default=FACTS)

    def __post_init__(self) -> None:
        if self.probs:
            self.want = ("cross_entropy", "lse")

    def stats(self, impl: str, logits: Tensor, target: Tensor) -> onepass.VocabPairStats:
        given: Any = {"target_probs" if self.probs else "target_logits": target}
        return onepass.vocab_pair_stats(
            logits,
            **given,
            mask=self.mask,
            want=self.want,
            jsd_beta=self.beta,
            impl=impl,
        )

    def leaves(self) -> tuple[Tensor, Tensor]:
        """Both sides in the memory they lie in, each asking for a gradient."""
        return self.logits.detach().requires_grad_(), self.target.detach().requires_grad_()

    @property
    def truth(self) -> PairTruth:
        return PairTruth(self.logits, self.target, probs=self.probs, beta=self.beta)

    def usual(self) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
        """The facts by torch's own functions, and the leaves to differentiate them by."""
        leaves = self.leaves()
        return unfused_pair_facts(*leaves, probs=self.probs, beta=self.beta), leaves

    def upstream(self, facts: Iterable[str] | None = None) -> dict[str, Tensor]:
        like = FP64 if self.logits.dtype == FP64 else FP32
        rows = self.logits.shape[:-1]
        return {
            fact: torch.randn(rows, dtype=like).to(self.logits.device)
            for fact in (self.want if facts is None else facts)
        }


def gradients(
    facts: onepass.VocabPairStats | dict[str, Tensor],
    leaves: Sequence[Tensor],
    upstream: Mapping[str, Tensor],
    **options: Any,
) -> tuple[Tensor, ...]:
    by_name = facts if isinstance(facts, dict) else facts._asdict()
    used = [name for name in upstream if name in by_name]
    found = torch.autograd.grad(
        [by_name[name] for name in used],
        leaves,
        [upstream[name] for name in used],
        allow_unused=True,
        **options,
    )
    pairs = zip(found, leaves, strict=True)
    return tuple(torch.zeros_like(leaf) if grad is None else grad for grad, leaf in pairs)


def check(got: Tensor, want: Truth, usual: Tensor | None, what: str) -> None:
    """Within 8 u of the natural scale, or 3 times as far off as unfused torch."""
    error = worst_error(got, want)
    theirs = 0.0 if usual is None else worst_error(usual, want)
    bar = max(FLOOR, FACTOR * theirs) if math.isfinite(theirs) else FLOOR
    assert error <= bar, f"{what}: {error:.3g} u, unfused torch {theirs:.3g} u"


def check_facts(case: Case, stats: onepass.VocabPairStats) -> None:
    usual, _ = case.usual()
    truths = case.truth.facts
    for fact in FACTS:
        got = getattr(stats, fact)
        if fact not in case.want:
            assert got is None, fact
            continue
        assert got.dtype == (FP64 if case.logits.dtype == FP64 else FP32)
        check(got, truths[fact], usual.get(fact), fact)


def check_gradients(
    case: Case, got: tuple[Tensor, ...], upstream: Mapping[str, Tensor], what: str = ""
) -> None:
    usual, leaves = case.usual()
    theirs: Sequence[Tensor | None] = (None, None)
    if set(upstream) <= set(usual):  # nobody writes a divergence of beta 0 or 1
        theirs = gradients(usual, leaves, upstream)
    sides = (("dlogits", case.logits), ("dtarget", case.target))
    for (name, side), grad, want, other in zip(
        sides, got, case.truth.gradients(upstream), theirs, strict=True
    ):
        assert grad.dtype == side.dtype
        check(grad, want, other, f"{what} {name}")


def check_everything(case: Case, impl: str) -> None:
    """All facts, the gradient of a random mix of them to both sides, and inputs left alone."""
    leaves = case.leaves()
    before = [(leaf.detach().clone(), leaf._version) for leaf in leaves]
    stats = case.stats(impl, *leaves)
    check_facts(case, stats)
    upstream = case.upstream()
    check_gradients(case, gradients(stats, leaves, upstream), upstream)
    for leaf, (values, version) in zip(leaves, before, strict=True):
        assert leaf._version == version and same_bits(leaf.detach(), values)


def same_bits(a: Any, b: Any) -> bool:
    """Equal in every bit but a NaN's payload; tuples field by field."""
    if isinstance(a, (tuple, list)):
        return all(same_bits(x, y) for x, y in zip(a, b, strict=True))
    if a is None or b is None:
        return a is b
    return (
        a.shape == b.shape
        and a.dtype == b.dtype
        and bool(((a == b) | (a.isnan() & b.isnan())).all())
        and bool((a.signbit() == b.signbit())[~a.isnan()].all())
    )


def pair_of(regime: str, n: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """fp32 logits and target logits [n, V] of one kind."""
    z, t = 3 * torch.randn(n, vocab_size), 3 * torch.randn(n, vocab_size)
    column = torch.randint(vocab_size, (n, 1))
    if regime == "near":
        z = t + 1e-3 * torch.randn(n, vocab_size)
    elif regime == "agreeing":  # both certain of one column: p - q cancels
        z, t = z.scatter(-1, column, 22.0), t.scatter(-1, column, 25.0)
    elif regime == "opposed":  # each certain of another column
        z, t = z.scatter(-1, column, 30.0), t.scatter(-1, (column + 1) % vocab_size, 30.0)
    elif regime == "sure_teacher":
        # KL below 0.3 although the likely columns of the student lie e^100 apart in the teacher
        z, t = torch.zeros_like(z), t.scatter(-1, column, 100.0)
        z = z.scatter(-1, column, math.log(4.0 * vocab_size))
    elif regime == "offset":  # a constant that cancels
        z, t = z + 1000.0, t + 1000.0
    elif regime == "offset_apart":
        z, t = z + 300.0, t - 300.0
    elif regime == "flat":
        z, t = 1e-3 * z, 1e-3 * t
    elif regime == "far":
        z, t = torch.rand_like(z) * 200 - 100, torch.rand_like(t) * 200 - 100
    elif regime == "wide":
        z, t = torch.rand_like(z) * 2e4 - 1e4, torch.rand_like(t) * 2e4 - 1e4
    elif regime == "ties":  # several maxima, and both sides share some
        z, t = torch.randint(3, z.shape).float(), torch.randint(3, t.shape).float()
    elif regime != "random":
        raise ValueError(regime)
    return z, t


def draw(
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: str,
    *,
    regime: str = "random",
    shared: int = 0,
    **options: Any,
) -> Case:
    """Logits of this shape against targets without its first `shared` dimensions."""
    rows, vocab_size = math.prod(shape[:-1]), shape[-1]
    z, t = pair_of(regime, rows, vocab_size)
    target_shape = shape[shared:]
    t = (t if rows else torch.randn(math.prod(target_shape[:-1]), vocab_size))[
        : math.prod(target_shape[:-1])
    ]
    return Case(
        z.view(shape).to(dtypes[0]).to(device),
        t.view(target_shape).to(dtypes[1]).to(device),
        **options,
    )


# ---------------------------------------------------------------- values and gradients

REGIMES = (
    "random", "near", "agreeing", "opposed", "sure_teacher", "offset", "offset_apart", "flat",
    "far", "wide", "ties",
)  # fmt: skip


@pytest.mark.parametrize("regime", REGIMES)
def test_every_fact_and_a_mix_of_gradients(impl: str, regime: str, device: str) -> None:
    n = 12 if impl == "torch" else 1  # the interpreter takes a tenth of a second a row
    check_everything(draw((n, 257), (FP32, FP32), device, regime=regime), impl)
    # Two columns: each probability is what the other leaves, so nothing averages out.
    check_everything(draw((n, 2), (FP32, FP32), device, regime=regime, beta=0.25), impl)


@pytest.mark.parametrize(
    "dtypes",
    [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, BF16), (FP16, FP32), (BF16, FP16)],
    ids=lambda d: f"{dtype_id(d[0])}-{dtype_id(d[1])}",
)
def test_low_and_mixed_precision(
    impl: str, dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    """A teacher in fp32 beside a student in bf16 is the usual case of distillation; each gradient
    comes in its own side's type."""
    n = 8 if impl == "torch" else 1
    for regime in ("random", "agreeing"):
        check_everything(draw((n, 203), dtypes, device, regime=regime), impl)


@pytest.mark.parametrize("regime", REGIMES)
def test_float64_is_calculated_in_float64(regime: str, device: str) -> None:
    """TRL's head calculates fp64 in fp32: errors of 10^5 u and more."""
    case = draw((3, 4, 65), (FP64, FP64), device, regime=regime, shared=1)
    check_everything(case, "torch")


@pytest.mark.parametrize(
    "vocab_size", [1, 2, 127, 1003, 16383, 16384, 16385, 17000], ids=lambda v: f"V{v}"
)
def test_vocabulary_sizes(impl: str, vocab_size: int, device: str) -> None:
    """One column; off every multiple; and the border of two segments, where the last columns of an
    aligned row have a program of their own."""
    case = draw(
        (1, vocab_size), (BF16, FP32), device, regime="agreeing" if vocab_size > 1 else "random"
    )
    check_everything(case, impl)
    if vocab_size == 1:
        stats = case.stats(impl, case.logits, case.target)
        for fact in ("cross_entropy", *DIVERGENCES):
            assert getattr(stats, fact).abs().max() == 0, fact


@pytest.mark.parametrize("shape", [(0, 5), (3, 0, 5), (0, 3, 5), (5, 33)], ids=shape_id)
def test_numbers_of_rows(impl: str, shape: tuple[int, ...], device: str) -> None:
    case = draw(shape, (FP32, FP32), device, shared=len(shape) - 2)
    check_everything(case, impl)


def test_a_row_without_leading_dimensions(impl: str, device: str) -> None:
    case = draw((37,), (FP32, FP32), device)
    check_everything(case, impl)
    assert case.stats(impl, case.logits, case.target).kl.shape == ()


@pytest.mark.parametrize("fact", FACTS)
def test_every_fact_alone(impl: str, fact: str, device: str) -> None:
    """What is wanted prunes the kernels, what has a gradient prunes the backward. A mix would hide
    a term forgotten (huggingface/trl#6625), or one that spoils its neighbour."""
    case = draw((2, 2, 131), (FP32, FP32), device, shared=1, want=(fact,), beta=0.3)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    check_facts(case, stats)
    upstream = case.upstream()
    got = gradients(stats, leaves, upstream, retain_graph=True)
    check_gradients(case, got, upstream, fact)
    truths = case.truth.gradients(upstream)
    for grad, want, leaf in zip(got, truths, leaves, strict=True):
        assert bool(grad.any()) == bool(want.value.any()), fact  # the truth is not 0 by chance
        # One side alone, the other frozen: the same bits.
        if want.value.any():
            alone = gradients(stats, [leaf], upstream, retain_graph=True)[0]
            assert same_bits(alone, grad)


@pytest.mark.parametrize("side", ["logits", "target"])
def test_a_frozen_side_gets_no_gradient(impl: str, side: str, device: str) -> None:
    case = draw((2, 1, 67), (FP32, FP32), device, shared=1)
    upstream = case.upstream()
    want = gradients(case.stats(impl, *(both := case.leaves())), both, upstream)
    z, t = case.leaves()
    frozen = (z.detach(), t) if side == "target" else (z, t.detach())
    stats = case.stats(impl, *frozen)
    got = gradients(
        stats, [t if side == "target" else z], upstream_of_differentiable(stats, upstream)
    )
    assert same_bits(got[0], want[1 if side == "target" else 0])


def upstream_of_differentiable(
    stats: onepass.VocabPairStats, upstream: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    return {name: up for name, up in upstream.items() if getattr(stats, name).requires_grad}


@pytest.mark.parametrize("kind", ["random", "expanded", "strided", "transposed", "zero", "2^40"])
def test_upstream_gradients(impl: str, kind: str, device: str) -> None:
    """NVIDIA/TransformerEngine#2139, linkedin/Liger-Kernel#1298: a gradient other than 1 was
    ignored; ROCm/TransformerEngine#409: an expanded one read as if it were contiguous."""
    case = draw((2, 2, 67), (FP32, BF16), device, shared=1)
    made = {
        "random": lambda g: g,
        "expanded": lambda g: g[:1, :1].expand(g.shape),
        "strided": lambda g: torch.stack((g, g * math.nan), -1).flatten(1)[:, ::2],
        "transposed": lambda g: g.t().contiguous().t(),
        "zero": torch.zeros_like,
        "2^40": lambda g: g * 2.0**40,
    }
    upstream = {fact: made[kind](g) for fact, g in case.upstream().items()}
    leaves = case.leaves()
    got = gradients(case.stats(impl, *leaves), leaves, upstream)
    check_gradients(case, got, upstream, kind)
    if kind == "zero":
        assert not any(grad.any() for grad in got)


@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jensen_shannon_weights(impl: str, beta: float, device: str) -> None:
    """At 0 and 1 the mixture is one of the sides: the divergence is 0 by its definition (TRL and
    Liger return a KL divergence there instead), and so are its gradients."""
    for regime in ("random", "opposed", "near"):
        case = draw((1, 131), (FP32, FP32), device, regime=regime, beta=beta, want=("jsd",))
        leaves = case.leaves()
        stats = case.stats(impl, *leaves)
        upstream = case.upstream()
        got = gradients(stats, leaves, upstream)
        if beta in (0.0, 1.0):
            assert stats.jsd.abs().max() == 0, regime
            assert not any(grad.any() for grad in got), regime
        else:
            check_facts(case, stats)
            check_gradients(case, got, upstream, regime)
            assert 0 <= stats.jsd.min() and stats.jsd.max() <= math.log(2.0) * (1 + 2.0**-22)


# ---------------------------------------------------------------- probabilities as targets


def probabilities(shape: tuple[int, ...], kind: str) -> Tensor:
    probs = torch.rand(shape)
    if kind == "normalized":
        return probs / probs.sum(-1, keepdim=True)
    if kind == "with_zeros":  # 0 log 0: a column that the teacher rules out
        return torch.where(torch.rand(shape) < 0.5, 0.0, probs)
    if kind == "one_hot":
        return torch.nn.functional.one_hot(probs.argmax(-1), shape[-1]).float()
    return probs


@pytest.mark.parametrize("kind", ["normalized", "unnormalized", "with_zeros", "one_hot"])
def test_target_probabilities(impl: str, kind: str, device: str) -> None:
    """Taken as they are: what does not sum to 1 is a weighting, and gets its own gradient."""
    for dtypes in ((FP32, FP32), (BF16, FP32)):
        z = 3 * torch.randn(2, 2, 131)
        case = Case(
            z.to(dtypes[0]).to(device),
            probabilities((2, 131), kind).to(dtypes[1]).to(device),
            probs=True,
        )
        check_everything(case, impl)


def test_target_probabilities_of_zero_hide_minus_infinity(impl: str, device: str) -> None:
    """0 * inf: the column is left out of the value, and its logit gets no gradient."""
    z = torch.randn(2, 40)
    z[:, ::3] = -math.inf
    probs = torch.rand(2, 40)
    probs[:, ::3] = 0.0
    case = Case(z.to(device), probs.to(device), probs=True)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    check_facts(case, stats)
    dlogits, dtarget = gradients(stats, leaves, {"cross_entropy": torch.ones(2).to(device)})
    wanted, on_target = case.truth.gradients({"cross_entropy": torch.ones(2)})
    check(dlogits, wanted, None, "dlogits")
    assert not dlogits[:, ::3].any()
    kept = torch.arange(40) % 3 != 0
    check(dtarget[:, kept], Truth(*(part[:, kept] for part in on_target)), None, "dtarget")


def test_segments_of_target_probabilities(impl: str, device: str) -> None:
    case = Case((3 * torch.randn(1, 17001)).to(device), torch.rand(1, 17001).to(device), probs=True)
    check_everything(case, impl)


# ---------------------------------------------------------------- one target for several rows


@pytest.mark.parametrize("k", [1, 2, 3, 5], ids=lambda k: f"K{k}")
def test_rows_share_a_target(impl: str, k: int, device: str) -> None:
    """Jigsaw's three outputs against one teacher, and more than one tile of them."""
    case = draw((k, 2, 131), (FP32, FP32), device, shared=1)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    check_facts(case, stats)
    upstream = case.upstream()
    dlogits, dtarget = gradients(stats, leaves, upstream)
    check_gradients(case, (dlogits, dtarget), upstream)
    if k > 1:  # the same as K calls: to the last bits, whose sums take another order
        one = Case(case.logits[-1], case.target)
        single = one.stats(impl, one.logits, one.target)
        for fact in FACTS:
            got, alone = getattr(stats, fact)[-1].cpu(), getattr(single, fact).cpu()
            scale = one.truth.facts[fact].scale
            assert worst_error(got, Truth(alone.double(), scale)) <= FLOOR, fact


def test_batches_share_a_batch_of_targets(impl: str, device: str) -> None:
    case = draw((2, 2, 2, 67), (FP32, FP32), device, shared=1, want=("kl",))
    check_everything(case, impl)
    assert case.stats(impl, case.logits, case.target).kl.shape == (2, 2, 2)


def test_two_leading_dimensions_share(impl: str, device: str) -> None:
    case = draw((2, 2, 1, 67), (FP32, FP32), device, shared=2, want=("reverse_kl",))
    check_everything(case, impl)


def test_a_whole_batch_shares_one_target(impl: str, device: str) -> None:
    """[N, V] against [V]: the one target gets the sum over more rows than a tile holds."""
    n = 33 if impl == "torch" else 9
    check_everything(draw((n, 40), (FP32, FP32), device, shared=1, want=("kl",)), impl)


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize("logits_layout", ["contiguous", "offset", "odd", "sliced"])
def test_layouts(impl: str, logits_layout: str, target_layout: str, device: str) -> None:
    """The two sides differently far from alignment, with NaN between the rows (Dao-AILab strides,
    NVIDIA/TransformerEngine#2402, pytorch/pytorch#132857)."""
    pair = (LAYOUTS.index(target_layout) + len(logits_layout)) % 3
    if impl == "triton" and pair:
        pytest.skip("a third of the combinations covers each layout of either side: 10 s saved")
    dtypes = ((FP32, FP32), (BF16, BF16), (BF16, FP32))[LAYOUTS.index(target_layout) % 3]
    case = draw((2, 2, 67), dtypes, device, want=("kl", "jsd"))
    case.logits = laid_out(case.logits, logits_layout)
    case.target = laid_out(case.target, target_layout)
    check_everything(case, impl)


@pytest.mark.parametrize("side", ["logits", "target", "pairs"])
def test_expanded_sides(impl: str, side: str, device: str) -> None:
    """Rows of stride 0; the gradient of an expanded view is the sum over its copies."""
    case = draw((2, 2, 67), (FP32, FP32), device, shared=1, want=("kl", "reverse_kl"))
    z, t = case.leaves()
    small = z[:1] if side == "pairs" else z[:, :1] if side == "logits" else z
    wide = small.expand(z.shape)
    small_t = t[:1] if side == "target" else t
    full = Case(
        wide.detach().contiguous(), small_t.expand(t.shape).detach().contiguous(), want=case.want
    )
    stats = case.stats(impl, wide, small_t.expand(t.shape))
    check_facts(full, stats)
    upstream = full.upstream()
    dz, dt = gradients(stats, [z, t], upstream)
    whole = full.leaves()
    want_z, want_t = gradients(full.stats(impl, *whole), whole, upstream)
    if side == "pairs":
        assert torch.allclose(dz[0], want_z.sum(0), rtol=1e-6, atol=1e-7) and not dz[1].any()
    if side == "logits":
        assert torch.allclose(dz[:, 0], want_z.sum(1), rtol=1e-6, atol=1e-7)
    if side == "target":
        assert torch.allclose(dt[0], want_t.sum(0), rtol=1e-6, atol=1e-7) and not dt[1].any()


@interpreted
def test_offsets_beyond_int32(tmp_path: Path) -> None:
    """Rows 2^30 elements apart, over a file of a few pages (fla-org/flash-linear-attention#1080):
    int32 offsets would wrap at row 2."""
    stride, n, vocab_size = 2**30 + 8, 3, 100

    def far_apart(name: str, dims: tuple[int, ...]) -> Tensor:
        shape = (*dims, vocab_size)
        size = (n - 1) * stride + vocab_size
        file = torch.from_file(str(tmp_path / name), shared=True, size=size, dtype=BF16)
        strides = (stride, 1) if len(dims) == 1 else (stride, vocab_size, 1)
        view = file.as_strided(shape, strides)
        return view.copy_(3 * torch.randn(shape))

    check_everything(Case(far_apart("z", (n,)), far_apart("t", (n,)), want=("kl",)), "triton")
    shared = Case(far_apart("k", (n, 1)), torch.randn(1, vocab_size), want=("kl", "jsd"))
    check_everything(shared, "triton")


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("kind", ["some", "all", "one_pair"])
def test_masked_rows_are_zero_and_never_leak(impl: str, kind: str, device: str) -> None:
    """NaN in a row that does not count reaches nothing: not its
    own facts, not its gradient, not the gradient of a target row that other pairs share (logits of
    1000: measured from nothing, their exponentials would be infinite)."""
    case = draw((2, 3, 67), (FP32, BF16), device, regime="offset", shared=1)
    mask = {
        "some": torch.tensor([[True, False, True], [False, False, True]]),
        "all": torch.zeros(2, 3, dtype=torch.bool),
        "one_pair": torch.tensor([[True, True, True], [False, False, False]]),
    }[kind].to(device)
    clean = Case(case.logits.clone(), case.target.clone())
    case.mask = mask
    case.logits[~mask] = math.nan
    case.target[~mask.any(0)] = math.nan  # rows that no counted pair uses are not read
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    upstream = case.upstream()
    got = gradients(stats, leaves, upstream)

    truths = clean.truth
    for fact in FACTS:
        value = getattr(stats, fact)
        assert not value[~mask].any(), fact
        want = truths.facts[fact]
        kept = Truth(*(torch.where(mask.cpu(), part, 0.0) for part in want))
        check(value, kept, None, fact)
    counted = {name: torch.where(mask, up, 0.0) for name, up in upstream.items()}
    wanted = truths.gradients(counted)
    for grad, want, name in zip(got, wanted, ("dlogits", "dtarget"), strict=True):
        check(grad, want, None, name)
    assert not got[0][~mask].any() and not got[1][~mask.any(0)].any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, FP32], ids=dtype_id)
def test_any_number_but_zero_counts(dtype: torch.dtype, device: str) -> None:
    case = draw((4, 33), (FP32, FP32), device, want=("kl",))
    mask = torch.tensor([0, 1, 1, 0]).to(dtype).to(device)
    case.mask = mask * 3 if dtype != torch.bool else mask
    masked = case.stats("torch", case.logits, case.target).kl
    case.mask = None
    full = case.stats("torch", case.logits, case.target).kl
    assert torch.equal(masked, torch.where(mask != 0, full, 0.0))


def test_masked_probabilities(impl: str, device: str) -> None:
    case = Case((3 * torch.randn(2, 3, 67)).to(device), torch.rand(3, 67).to(device), probs=True)
    upstream = case.upstream()
    mask = torch.tensor([[True, False, True], [False, False, True]]).to(device)
    truths = case.truth
    case.mask = mask
    case.logits[~mask] = math.nan
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    got = gradients(stats, leaves, upstream)
    counted = {name: torch.where(mask, up, 0.0) for name, up in upstream.items()}
    for fact in case.want:
        kept = Truth(*(torch.where(mask.cpu(), part, 0.0) for part in truths.facts[fact]))
        check(getattr(stats, fact), kept, None, fact)
    for grad, want in zip(got, truths.gradients(counted), strict=True):
        check(grad, want, None, "gradient")
    assert not got[0][~mask].any() and not got[1][1].any()


# ---------------------------------------------------------------- near p = q, and far from it


@dataclass(frozen=True)
class Near:
    """A student at a small distance from its teacher."""

    teacher: str  # "flat": 3 randn; "confident": one column 12 above the others
    column: int  # of the teacher's maximum
    distance: float
    vocab_size: int = 203

    def rows(self) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.column + int(1e6 * self.distance))
        t = torch.randn(self.vocab_size, generator=generator)
        t[self.column] = t.max() + (12.0 if self.teacher == "confident" else 0.5)
        return t + self.distance * torch.randn(self.vocab_size, generator=generator), t


# fp32 rows of 203 are each aligned differently: up to 3 columns at either end lie outside the
# vectors, where a kernel has other code.
NEAR = [
    Near(teacher, column % 203, distance)
    for teacher, distances in (("flat", (0.3, 1e-2, 1e-3, 1e-4)), ("confident", (0.3, 1e-2)))
    for distance, column in zip(distances, (-1, 0, 100, 1), strict=False)
] + [Near("flat", 202, 1e-4), Near("confident", 0, 1e-2), Near("confident", 201, 1e-3)]


@cache
def near_rows() -> tuple[Tensor, Tensor, dict[str, list[float]]]:
    z, t = (torch.stack(side) for side in zip(*(near.rows() for near in NEAR), strict=True))
    exact = [exact_divergences(a, b) for a, b in zip(z, t, strict=True)]
    return z, t, {name: [float(getattr(e, name)) for e in exact] for name in DIVERGENCES}


def test_divergences_near_zero(impl: str, device: str) -> None:
    """Down to 5e-9 within 2e-6 relative, where F.kl_div is off by 168x; the one-pass kernel's sums
    move their centre as they go, which was seen to cost up to 3.3e-6.

    JSD is a sum of positive terms, each from both normalisers: their errors of about 5 u do not
    cancel, but count in second order.
    """
    z, t, exact = near_rows()
    assert min(exact["kl"]) < 6e-9 and max(exact["kl"]) > 1e-2
    stats = onepass.vocab_pair_stats(z.to(device), t.to(device), want=DIVERGENCES, impl=impl)
    for fact in DIVERGENCES:
        got = getattr(stats, fact).cpu().double()
        want = torch.tensor(exact[fact], dtype=FP64)
        bar = (2e-6 if impl == "torch" else 4e-6) + (2e-14 / want if fact == "jsd" else 0.0)
        error = (got / want - 1).abs()
        at = int((error / bar).argmax())
        assert (error <= bar).all(), f"{fact} {error[at]:.2g} at {NEAR[at]}, {want[at]:.2g}"


@pytest.mark.parametrize("offset", [2.0, 8.0, 30.0])
def test_divergences_near_zero_of_rows_with_different_origins(
    impl: str, offset: float, device: str
) -> None:
    """A head knows no origin: a student may equal its teacher but for a constant. fp32 then knows
    their differences to u * offset; unfused torch knows no digit of a divergence of 5e-7."""
    t = torch.randn(1, 203)
    z = t + 1e-3 * torch.randn(1, 203) + offset
    stats = onepass.vocab_pair_stats(z.to(device), t.to(device), want=DIVERGENCES, impl=impl)
    exact = exact_divergences(z[0], t[0])
    for fact in DIVERGENCES:
        value = float(getattr(stats, fact))
        assert value == pytest.approx(float(getattr(exact, fact)), rel=5e-5 * offset), fact


def test_divergences_near_zero_over_two_segments(impl: str, device: str) -> None:
    """The teacher's maximum in the second segment: the first one's sums move to its centre."""
    z, t = (side[None] for side in Near("flat", 16700, 1e-3, 17001).rows())
    stats = onepass.vocab_pair_stats(z.to(device), t.to(device), want=DIVERGENCES, impl=impl)
    for fact, truth in PairTruth(z, t).facts.items():  # fp64 knows 5e-7 to 1e-8
        if fact in DIVERGENCES:
            assert float(getattr(stats, fact)) == pytest.approx(float(truth.value), rel=2e-6), fact


def test_equal_rows_have_no_divergence(impl: str, device: str) -> None:
    """Exactly 0 with exactly no gradient, though both sides are the same tensor."""
    same = (5 * torch.randn(3, 131)).to(device).requires_grad_()
    stats = onepass.vocab_pair_stats(same, same, want=DIVERGENCES, impl=impl)
    for fact in DIVERGENCES:
        value = getattr(stats, fact)
        (grad,) = torch.autograd.grad(value.sum(), same, retain_graph=True)
        assert not value.any(), fact
        assert grad.abs().max() <= 1e-7, fact


def test_rows_that_share_too_little_are_infinitely_far(impl: str, device: str) -> None:
    """Where one side rules out what the other holds likely the divergence is infinite, whether that
    is all of the mass or a single column of it; Jensen-Shannon is ln 2 at most."""
    inf = math.inf
    z = torch.tensor([[1.0, 2.0, -inf, -inf], [40.0, 0.0, 0.0, -inf], [1.0, 2.0, 0.5, -inf]])
    t = torch.tensor([[-inf, -inf, 0.0, 1.0], [41.0, 0.0, 0.0, 0.0], [2.0, 1.0, 0.5, -inf]])
    stats = onepass.vocab_pair_stats(
        z.to(device), t.to(device), want=("kl", "reverse_kl", "cross_entropy", "jsd"), impl=impl
    )
    assert stats.kl.isinf().tolist() == [True, True, False]
    assert stats.reverse_kl.isinf().tolist() == [True, False, False]
    assert stats.cross_entropy.isinf().tolist() == [True, True, False]
    assert stats.jsd[0].item() == pytest.approx(math.log(2), rel=1e-6)
    assert 0 < stats.kl[2].item() < inf and stats.jsd.isfinite().all()


@pytest.mark.parametrize("beta", [1e-1, 1e-2, 1e-4, 1e-6, 1 - 1e-2, 1 - 1e-4])
def test_lopsided_mixtures(beta: float, impl: str, device: str) -> None:
    """A mixture that is nearly all of one side: nothing cancels where p / m is nearly 1."""
    rows = 8 if impl == "triton" else 64
    z, t = 5 * torch.randn(rows, 200), 5 * torch.randn(rows, 200)
    p, q = z.double().softmax(-1), t.double().softmax(-1)
    m = beta * q + (1 - beta) * p
    want = beta * (q * (q / m).log()).sum(-1)
    ratio = beta * (q - p) / p  # m / p - 1
    want = want - (1 - beta) * (p * ratio.log1p()).sum(-1)
    got = onepass.vocab_pair_stats(
        z.to(device), t.to(device), want="jsd", jsd_beta=beta, impl=impl
    ).jsd
    error = ((got.cpu().double() - want) / want).abs()
    assert error.max() <= 1e-5, error.max()


@pytest.mark.parametrize("missing", [0.2, 1e-2, 1e-4, 1e-6], ids="{:g}".format)
@pytest.mark.parametrize("gap", [25.0, 45.0, 70.0, 100.0, math.inf], ids="gap{:g}".format)
def test_what_the_teacher_rules_out_costs_the_student(
    impl: str, gap: float, missing: float, device: str
) -> None:
    """A teacher without doubt (or filtered to its top tokens) and a student that leaves it some:
    KL = -log(1 - missing), all of it in columns that the teacher's softmax gives nothing.

    A one-pass sum weighted by that softmax does not see them.
    """
    if impl == "triton" and missing in (1e-2, 1e-4) and gap not in (70.0, math.inf):
        pytest.skip("the ends of the range do in the interpreter")
    z, t = torch.zeros(2, 60), torch.zeros(2, 60)
    z[:, 1:] = math.log(missing / (1 - missing) / 59)
    t[:, 1:] = -gap
    z[1], t[1] = z[1].flip(0), t[1].flip(0)  # the maximum comes last
    for fact, sides in (("kl", (z, t)), ("reverse_kl", (t, z))):
        case = Case(sides[0].to(device), sides[1].to(device), want=(fact,))
        truth = case.truth.facts[fact]
        assert truth.value == pytest.approx(-math.log1p(-missing), rel=1e-2)
        got = getattr(case.stats(impl, case.logits, case.target), fact)
        check(got, truth, unfused_pair_facts(case.logits, case.target)[fact], fact)


def test_minus_infinity(impl: str, device: str) -> None:
    """Banned tokens (huggingface/trl#7221: NaN). KL is infinite where p = 0 < q, and a column that
    both sides rule out counts nothing."""
    n, vocab_size = 6, 131
    z, t = 3 * torch.randn(n, vocab_size), 3 * torch.randn(n, vocab_size)
    inf = math.inf
    z[0, 5] = -inf
    t[1, 5] = -inf
    z[2, 5] = t[2, 5] = -inf
    z[3, :100] = t[3, :100] = -inf  # a whole block before the first number
    z[4, 1:] = t[4, 1:] = -inf  # one column left
    z[5, ::2] = -inf
    t[5, ::2] = t[5, 3] = -inf
    case = Case(z.to(device), t.to(device))
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    check_facts(case, stats)
    assert stats.kl.isinf().tolist() == [True, False, False, False, False, False]
    assert stats.cross_entropy.isinf().tolist() == stats.kl.isinf().tolist()
    assert stats.reverse_kl.isinf().tolist() == [False, True, False, False, False, True]
    assert stats.jsd.isfinite().all()
    # Gradients where the value is finite: 0 in a column that its own side rules out.
    finite = [2, 3, 4]
    upstream = {name: up[finite] for name, up in case.upstream().items()}
    inner = Case(case.logits[finite], case.target[finite])
    leaves = inner.leaves()
    got = gradients(inner.stats(impl, *leaves), leaves, upstream)
    check_gradients(inner, got, upstream)
    for grad, side in zip(got, leaves, strict=True):
        assert not grad[side.detach().isinf()].any()


def test_gradients_of_finite_facts_beside_minus_infinity(impl: str, device: str) -> None:
    """A filtered teacher: KL(q || p) and JSD are finite, though KL(p || q) is not."""
    n = 4 if impl == "torch" else 1
    z, t = 3 * torch.randn(n, 131), 3 * torch.randn(n, 131)
    t[:, ::2] = -math.inf
    for beta in (0.5, 0.3):
        case = Case(z.to(device), t.to(device), want=("cross_entropy", "kl", "jsd"), beta=beta)
        check_everything(case, impl)
        swapped = Case(t.to(device), z.to(device), want=("reverse_kl", "jsd"), beta=beta)
        check_everything(swapped, impl)


# A row that has no softmax comes to NaN by overflows and -inf + inf, of which NumPy tells.
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_a_row_without_any_number(impl: str, device: str) -> None:
    """-inf throughout defines no probability: lse is -inf, the rest NaN, other rows unharmed."""
    case = draw((3, 131), (FP32, FP32), device)
    clean = case.stats(impl, case.logits, case.target)
    case.logits[1] = -math.inf
    stats = case.stats(impl, case.logits, case.target)
    for fact in FACTS:
        value = getattr(stats, fact)
        assert same_bits(value[[0, 2]], getattr(clean, fact)[[0, 2]]), fact
    assert stats.lse[1] == -math.inf and same_bits(stats.target_lse, clean.target_lse)
    assert stats.cross_entropy[1].isnan() and stats.kl[1].isnan() and stats.jsd[1].isnan()


# ---------------------------------------------------------------- identities


def test_gradients_sum_to_nothing(impl: str, device: str) -> None:
    """A constant added to a row changes none of its probabilities; only lse moves with it."""
    case = draw((2, 2, 131), (FP32, FP32), device, shared=1)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    for fact in ("cross_entropy", *DIVERGENCES):
        upstream = case.upstream([fact])
        got = gradients(stats, leaves, upstream, retain_graph=True)
        for grad, want in zip(got, case.truth.gradients(upstream), strict=True):
            total = grad.cpu().double().sum(-1).abs()
            assert (total <= FLOOR * 2.0**-24 * want.scale.sum(-1)).all(), fact
    upstream = case.upstream(["lse"])
    dlogits, _ = gradients(stats, leaves, upstream, retain_graph=True)
    assert torch.allclose(dlogits.sum(-1), upstream["lse"], rtol=1e-5, atol=1e-6)


def test_cross_entropy_and_kl_pull_the_student_alike(impl: str, device: str) -> None:
    """KL = cross-entropy - entropy of the target, which the student's logits do not move."""
    case = draw((2, 2, 131), (FP32, FP32), device, shared=1)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    upstream = torch.randn(2, 2).to(device)
    by_cross, _ = gradients(stats, leaves, {"cross_entropy": upstream}, retain_graph=True)
    by_kl, _ = gradients(stats, leaves, {"kl": upstream}, retain_graph=True)
    assert same_bits(by_cross, by_kl)


def test_swapping_the_sides(impl: str, device: str) -> None:
    """KL(p || q) of one order is KL(q || p) of the other; JSD at 1/2 is symmetric."""
    case = draw((3, 131), (FP32, FP32), device)
    there = case.stats(impl, case.logits, case.target)
    back = case.stats(impl, case.target, case.logits)
    scales = case.truth.facts
    for fact, other in (("kl", "reverse_kl"), ("jsd", "jsd"), ("lse", "target_lse")):
        want = Truth(getattr(there, fact).cpu().double(), scales[fact].scale)
        assert worst_error(getattr(back, other).cpu(), want) <= 2.0, fact


def test_certain_pairs_keep_their_gradient(impl: str, device: str) -> None:
    """Both sides certain of one column: p - q of it is what they leave to the others, to full
    relative accuracy, not the difference of two numbers next to 1 (linkedin/Liger-Kernel#1329)."""
    z, t = torch.zeros(1, 60), torch.zeros(1, 60)
    z[0, 7], t[0, 7] = 26.0, 31.0
    case = Case(z.to(device), t.to(device), want=("kl",))
    leaves = case.leaves()
    dlogits, _ = gradients(case.stats(impl, *leaves), leaves, {"kl": torch.ones(1).to(device)})
    rest = [59 * math.exp(-gap) / (1 + 59 * math.exp(-gap)) for gap in (26.0, 31.0)]
    assert float(dlogits[0, 7]) == pytest.approx(rest[1] - rest[0], rel=1e-5)


def test_gradients_of_agreeing_but_flat_rows(impl: str, device: str) -> None:
    """The same maximum in both sides, at p = 1/500: there 1 - p has no digits to spare, p has."""
    z, t = 0.1 * torch.randn(1, 700), 0.1 * torch.randn(1, 700)
    z[0, 300], t[0, 300] = 0.6, 0.5
    case = Case(z.to(device), t.to(device), want=("kl", "reverse_kl"))
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    for fact in case.want:
        upstream = {fact: torch.ones(1).to(device)}
        got = gradients(stats, leaves, upstream, retain_graph=True)
        check_gradients(case, got, upstream, fact)


# ---------------------------------------------------------------- autograd and torch.compile


@pytest.mark.parametrize("fact", FACTS)
def test_gradcheck(fact: str) -> None:
    z, t = (torch.randn(2, 2, 5, dtype=FP64) for _ in range(2))
    mask = torch.tensor([[True, False], [True, True]])

    def value(z: Tensor, t: Tensor) -> Tensor:
        stats = onepass.vocab_pair_stats(z, t, mask=mask, want=fact, jsd_beta=0.3, impl="torch")
        return getattr(stats, fact)

    leaves = (z.requires_grad_(), t[0].clone().requires_grad_())
    assert torch.autograd.gradcheck(value, leaves)
    assert torch.autograd.gradgradcheck(value, leaves)


def test_gradcheck_of_probabilities_and_mixes() -> None:
    z = torch.randn(2, 1, 4, dtype=FP64, requires_grad=True)
    probs = torch.rand(1, 4, dtype=FP64, requires_grad=True)
    target = torch.randn(1, 4, dtype=FP64, requires_grad=True)

    def soft(z: Tensor, probs: Tensor) -> Tensor:
        stats = onepass.vocab_pair_stats(
            z, target_probs=probs, want=("cross_entropy", "lse"), impl="torch"
        )
        return stats.cross_entropy * stats.lse

    def mixed(z: Tensor, t: Tensor) -> Tensor:
        stats = onepass.vocab_pair_stats(z, t, want=FACTS, impl="torch")
        return (
            stats.kl * stats.reverse_kl + stats.jsd.exp() + stats.cross_entropy * stats.target_lse
        )

    for function, leaves in ((soft, (z, probs)), (mixed, (z, target))):
        assert torch.autograd.gradcheck(function, leaves)
        assert torch.autograd.gradgradcheck(function, leaves)


def test_double_backward_is_the_same_gradient(impl: str, device: str) -> None:
    """create_graph=True takes another path: its gradient must not differ, nor that of no rows."""
    for shape in ((2, 2, 33), (2, 0, 33)):
        case = draw(shape, (FP32, FP32), device, shared=1)
        leaves = case.leaves()
        stats = case.stats(impl, *leaves)
        upstream = case.upstream()
        again = gradients(stats, leaves, upstream, create_graph=True)
        check_gradients(case, tuple(grad.detach() for grad in again), upstream)
        assert all(grad.requires_grad for grad in again)


def test_backward_twice(impl: str, device: str) -> None:
    """linkedin/Liger-Kernel's cross-entropy multiplied its gradient again."""
    case = draw((2, 2, 67), (BF16, BF16), device, shared=1)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    upstream = case.upstream()
    first = gradients(stats, leaves, upstream, retain_graph=True)
    other = gradients(stats, leaves, case.upstream(["jsd"]), retain_graph=True)
    assert not same_bits(first, other)
    assert same_bits(first, gradients(stats, leaves, upstream))


def test_two_runs_are_bit_equal(impl: str, device: str) -> None:
    case = draw((2, 2, 1003), (BF16, FP32), device, shared=1)
    upstream = case.upstream()

    def once() -> tuple[Any, Any]:
        leaves = case.leaves()
        stats = case.stats(impl, *leaves)
        return tuple(stats), gradients(stats, leaves, upstream)

    assert same_bits(once(), once())


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_a_row_does_not_see_its_batch(impl: str, dtype: torch.dtype, device: str) -> None:
    """Bitwise, for any batch size and row order (vllm-project/vllm#32480)."""
    if impl == "torch" and device != "cpu":
        pytest.skip("torch's reductions on a GPU depend on the number of rows")
    case = draw((3, 1024), (dtype, dtype), device)
    leaves = case.leaves()
    stats = case.stats(impl, *leaves)
    upstream = case.upstream()
    got = gradients(stats, leaves, upstream)
    order = [2, 0]
    part = Case(case.logits[order], case.target[order])
    part_leaves = part.leaves()
    part_stats = part.stats(impl, *part_leaves)
    part_got = gradients(
        part_stats, part_leaves, {name: up[order] for name, up in upstream.items()}
    )
    for fact in FACTS:
        assert same_bits(getattr(part_stats, fact), getattr(stats, fact)[order]), fact
    assert same_bits(part_got, tuple(grad[order] for grad in got))


@pytest.mark.parametrize("probs", [False, True], ids=["logits", "probs"])
def test_opcheck(impl: str, probs: bool, device: str) -> None:
    """Schema, fake and autograd registration, aliasing, and the operators under AOT dispatch."""
    z = torch.randn(2, 1, 17).to(device).requires_grad_()
    t = torch.rand(1, 17).to(device).requires_grad_()
    mask = torch.tensor([True, False]).to(device)
    want = ["cross_entropy", "lse"] if probs else list(FACTS)
    args: Any = (z, t, mask, probs, want, 0.3, "", [], impl == "triton")
    torch.library.opcheck(torch.ops.onepass.vocab_pair_stats.default, args)


def test_opcheck_of_padded_views(impl: str, device: str) -> None:
    """Strides of the fake gradients must be those of the real ones (pytorch/pytorch#177115)."""
    z, t = (laid_out(torch.randn(1, 2, 17).to(device), "padded") for _ in range(2))
    z, t = z.requires_grad_(), t.requires_grad_()
    args: Any = (z, t, None, False, ["kl"], 0.5, "", [], impl == "triton")
    torch.library.opcheck(
        torch.ops.onepass.vocab_pair_stats.default,
        args,
        test_utils=("test_faketensor", "test_aot_dispatch_static"),
    )


def test_compiled_is_eager(impl: str, device: str) -> None:
    """fullgraph, to the bit (linkedin/Liger-Kernel#1338: 61.73 instead of 21.40)."""
    case = draw((2, 2, 67), (FP32, FP32), device, shared=1)
    mask = torch.tensor([[True, False], [True, True]]).to(device)

    def loss(z: Tensor, t: Tensor) -> Tensor:
        stats = onepass.vocab_pair_stats(z, t, mask=mask, want=FACTS, jsd_beta=0.3, impl=impl)
        return (stats.kl + stats.cross_entropy * stats.lse).sum() + stats.jsd.square().sum()

    eager_leaves, compiled_leaves = case.leaves(), case.leaves()
    eager = loss(*eager_leaves)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(*compiled_leaves)
    assert same_bits(eager, compiled)
    assert same_bits(
        torch.autograd.grad(eager, eager_leaves), torch.autograd.grad(compiled, compiled_leaves)
    )


# ---------------------------------------------------------------- memory


@interpreted
@pytest.mark.parametrize(
    "layouts, dtype",
    [
        (("contiguous", "contiguous"), BF16),
        (("odd", "contiguous"), FP32),
        (("offset", "padded"), BF16),
        (("sliced", "odd"), FP32),
    ],
    ids=lambda value: dtype_id(value) or "-".join(value),
)
def test_bounds_and_races(layouts: tuple[str, str], dtype: torch.dtype) -> None:
    """No load outside the rows, no store outside the gradients, no two programs at one address."""
    case = draw((3, 2, 131), (dtype, dtype), "cpu", shared=1)
    z, t = (
        laid_out(side, how) for side, how in zip((case.logits, case.target), layouts, strict=True)
    )
    mask = torch.tensor([[True, False], [True, True], [False, False]])
    with guard(z, t, mask):
        stats = onepass.vocab_pair_stats(
            z.requires_grad_(), t.requires_grad_(), mask=mask, want=FACTS, impl="triton"
        )
        torch.stack([fact.sum() for fact in stats]).sum().backward()


@interpreted
def test_bounds_of_probabilities_and_segments() -> None:
    z, t = laid_out(torch.randn(1, 16390), "odd"), laid_out(torch.rand(1, 16390), "offset")
    with guard(z, t):
        stats = onepass.vocab_pair_stats(z.requires_grad_(), target_probs=t, impl="triton")
        stats.cross_entropy.sum().backward()


ONCE = ("cross_entropy", "kl", "reverse_kl", "lse", "target_lse")


def tensor_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@interpreted
@pytest.mark.parametrize("k", [1, 3], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_every_byte_moves_once(k: int, dtype: torch.dtype) -> None:
    """Logits and targets read once forward and once backward, a shared target once for all its
    rows, gradients written once."""
    case = draw((k, 2, 256), (dtype, dtype), "cpu", shared=1, want=ONCE)
    leaves = case.leaves()
    with count_bytes() as forward:
        stats = case.stats("triton", *leaves)
    assert [forward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]
    with count_bytes() as backward:
        got = gradients(stats, leaves, case.upstream())
    assert backward.launches == ["vocab_pair_stats_backward_kernel"]
    assert [backward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]
    for grad in got:
        assert backward.written(grad) == backward.distinct_written(grad) == tensor_bytes(grad)
    big = sum(map(tensor_bytes, leaves))
    assert backward.written() == big
    # Beside them only numbers per row: 9 of 4 bytes a pair to read, 14 partial sums to and fro.
    assert backward.read() <= big + 4 * 16 * k * 2
    assert forward.read() <= big + 4 * 16 * k * 2 and forward.written() <= 4 * 32 * k * 2


@interpreted
def test_odd_rows_move_once_too() -> None:
    """Up to a vector at either end is left to the merging kernel, which reads it for each pair."""
    case = draw((3, 2, 259), (FP32, FP32), "cpu", shared=1, want=ONCE)
    leaves = case.leaves()
    with count_bytes() as forward:
        stats = case.stats("triton", *leaves)
    edges = 2 * 6 * 4 * 2  # two more pairs x at most 6 columns of 4 bytes x two rows
    assert forward.read(leaves[0]) == tensor_bytes(leaves[0])
    assert forward.distinct_read(leaves[1]) == tensor_bytes(leaves[1])
    assert forward.read(leaves[1]) <= tensor_bytes(leaves[1]) + edges
    with count_bytes() as backward:
        got = gradients(stats, leaves, case.upstream())
    assert [backward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]
    for grad in got:
        assert backward.written(grad) == backward.distinct_written(grad) == tensor_bytes(grad)


@interpreted
@pytest.mark.parametrize("k", [1, 3], ids=lambda k: f"K{k}")
def test_jensen_shannon_reads_twice(k: int) -> None:
    """Both normalisers come first: the second pass goes over every pair of rows, a shared target
    once for each. The backward reads once as ever."""
    case = draw((k, 2, 256), (FP32, FP32), "cpu", shared=1, want=("jsd",))
    leaves = case.leaves()
    with count_bytes() as forward:
        stats = case.stats("triton", *leaves)
    logits, target = leaves
    assert forward.read(logits) == 2 * tensor_bytes(logits)
    assert forward.read(target) == (1 + k) * tensor_bytes(target)
    with count_bytes() as backward:
        gradients(stats, leaves, case.upstream())
    assert [backward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]


@interpreted
def test_masked_rows_are_not_read() -> None:
    case = draw((2, 4, 256), (BF16, BF16), "cpu", shared=1)
    case.mask = torch.tensor([[True, False, False, True], [True, True, False, False]])
    row = 256 * 2
    leaves = case.leaves()
    with count_bytes() as forward:
        stats = case.stats("triton", *leaves)
    assert [forward.distinct_read(leaf) for leaf in leaves] == [4 * row, 3 * row]
    with count_bytes() as backward:
        got = gradients(stats, leaves, case.upstream())
    assert [backward.read(leaf) for leaf in leaves] == [4 * row, 3 * row]
    # Their zeros are written all the same.
    assert [backward.written(grad) for grad in got] == [tensor_bytes(grad) for grad in got]


@interpreted
@pytest.mark.parametrize(
    "layouts", [("sliced", "contiguous"), ("contiguous", "sliced")], ids="-".join
)
def test_sliced_batches_are_read_where_they_lie(layouts: tuple[str, str]) -> None:
    """logits[:, :-1] is what a loss of the next token gets: no copy of the logits for it."""
    case = draw((2, 2, 256), (FP32, FP32), "cpu", want=("kl",))
    leaves = [
        laid_out(side, how) for side, how in zip((case.logits, case.target), layouts, strict=True)
    ]
    with count_bytes() as forward:
        case.stats("triton", *leaves)
    assert [forward.read(leaf) for leaf in leaves] == [tensor_bytes(leaf) for leaf in leaves]


# ---------------------------------------------------------------- error budget


def row_errors(got: Tensor, want: Truth) -> Tensor:
    """The worst error of every row in u, 0.5 at least: below that nothing is better or worse."""
    errors = error_in_u(got.cpu(), want)
    if errors.dim() > 1:
        errors = errors.flatten(1).amax(-1) if errors.dim() > 2 else errors.amax(-1)
    return errors.clamp_min(0.5)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=dtype_id)
def test_pooled_error_is_within_five_percent_of_unfused_torch(
    impl: str, dtype: torch.dtype, device: str
) -> None:
    """The geometric mean over many rows of every fact and gradient, each measured
    against fp64; one row for one fact may be 3 times as far off above 8 u."""
    rows, pooled = (60 if impl == "torch" else 2), dict[str, list[Tensor]]()
    for regime in ("random", "near", "agreeing", "flat", "offset", "ties"):
        case = draw((rows, 101), (dtype, dtype), device, regime=regime)
        leaves = case.leaves()
        stats = case.stats(impl, *leaves)
        usual, usual_leaves = case.usual()
        truths = case.truth
        measured = {fact: (getattr(stats, fact), usual[fact], truths.facts[fact]) for fact in FACTS}
        upstream = case.upstream()
        ours = gradients(stats, leaves, upstream)
        theirs = gradients(usual, usual_leaves, upstream)
        sides = zip(ours, theirs, truths.gradients(upstream), strict=True)
        measured |= zip(("dlogits", "dtarget"), sides, strict=True)
        for name, (mine, other, want) in measured.items():
            mine_u, other_u = row_errors(mine.detach(), want), row_errors(other.detach(), want)
            bar = FACTOR * other_u.clamp_min(FLOOR)
            assert (mine_u <= bar).all(), f"{regime} {name}: {mine_u.max():.3g} u"
            pooled.setdefault(name, []).append((mine_u / other_u).log())
    ratios = {name: float(torch.cat(logs).mean().exp()) for name, logs in pooled.items()}
    assert len(ratios) == 8
    assert max(ratios.values()) <= 1.05, ratios


# ---------------------------------------------------------------- bad input


def test_explicit_triton_says_why_not(device: str) -> None:
    z = torch.randn(2, 5, dtype=FP64).to(device)
    with pytest.raises(ValueError, match="impl='triton' cannot serve this call: .*float64"):
        onepass.vocab_pair_stats(z, z, impl="triton")


Z, T = torch.randn(2, 3, 5), torch.randn(3, 5)
BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "logits_are_integers": ((Z.long(), T), {}, ValueError, "logits must be .*got torch.int64"),
    "logits_are_a_list": (([[1.0]], T), {}, TypeError, "logits must be a torch.Tensor: got list"),
    "logits_are_complex": ((Z.to(torch.complex64), T), {}, ValueError, "got torch.complex64"),
    "logits_are_a_scalar": ((Z[0, 0, 0], T), {}, ValueError, r"logits must be \[\.\.\., V\].*\(\)"),
    "no_vocabulary": ((Z[..., :0], T[..., :0]), {}, ValueError, r"V > 0: got shape \(2, 3, 0\)"),
    "no_target": ((Z,), {}, ValueError, "one of target_logits and target_probs: got neither"),
    "both_targets": ((Z, T), {"target_probs": T}, ValueError, "one of target_.* got both"),
    "target_is_integers": ((Z, T.int()), {}, ValueError, "target_logits must be .*got torch.int32"),
    "target_is_none_of_ours": ((Z, "teacher"), {}, TypeError, "target_logits must be .*got str"),
    "probs_are_bool": ((Z,), {"target_probs": T > 0}, ValueError, "target_probs .*got torch.bool"),
    "other_vocabulary": ((Z, T[:, :4]), {}, ValueError, r"\(2, 3, 5\).*got \(3, 4\)"),
    "other_rows": ((Z, T[:2]), {}, ValueError, r"target_logits .*\(2, 3, 5\).*got \(2, 5\)"),
    "target_has_more_dimensions": ((T, Z), {}, ValueError, r"\(3, 5\).*got \(2, 3, 5\)"),
    "target_would_broadcast": ((Z, T[:1]), {}, ValueError, r"\(2, 3, 5\).*got \(1, 5\)"),
    "one_side_is_float64": ((Z.double(), T), {}, ValueError, "both be float64 or neither.*float32"),
    "unknown_fact": ((Z, T), {"want": ("kl", "ckl")}, ValueError, "no 'ckl': choose among cross"),
    "divergence_of_probs": (
        (Z,), {"target_probs": T.softmax(-1), "want": "kl"}, ValueError, "'kl' needs target_logits",
    ),
    "beta_above_one": ((Z, T), {"want": "jsd", "jsd_beta": 1.5}, ValueError, "jsd_beta .*got 1.5"),
    "beta_is_negative": ((Z, T), {"jsd_beta": -0.1}, ValueError, "between 0 and 1: got -0.1"),
    "beta_is_nan": ((Z, T), {"jsd_beta": math.nan}, ValueError, "between 0 and 1: got nan"),
    "mask_of_targets": ((Z, T), {"mask": torch.ones(3)}, ValueError, r"\(2, 3\): got \(3,\)"),
    "mask_of_columns": ((Z, T), {"mask": torch.ones(2, 3, 5)}, ValueError, r"got \(2, 3, 5\)"),
    "mask_is_a_list": ((Z, T), {"mask": [1, 0, 1]}, TypeError, "mask .*Tensor: got list"),
    "unknown_impl": ((Z, T), {"impl": "cuda"}, ValueError, "impl must be one of .*got 'cuda'"),
    "nan_probabilities": ((Z,), {"target_probs": T * math.nan}, ValueError, "probs holds NaN"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the argument, what came and what was wanted; before anything runs."""

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("work was started")

    monkeypatch.setattr(module, "_vocab_pair_stats", never)
    args, kwargs, kind, message = BAD[name]
    with pytest.raises(kind, match=message) as caught:
        onepass.vocab_pair_stats(*args, **kwargs)
    assert "\n" not in str(caught.value)


def test_sides_on_two_devices() -> None:
    with pytest.raises(ValueError, match="target_logits is on meta, logits on cpu: move one"):
        onepass.vocab_pair_stats(Z, T.to("meta"))
