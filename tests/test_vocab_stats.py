"""vocab_stats against independent fp64 truths: values, gradients, memory, bits, bad input.

Errors are in u (2^-24 in fp32) of each quantity's natural scale. A case may be 3 times as far off
as unfused torch, and 8 u are always granted; pooled over many cases ours may not exceed torch's by
more than 5 %. The hard limits (p near 1, entropy near 0) stand in test_numerics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass.ops import vocab_stats as vocab_stats_module
from onepass.ops._launch import Rows, gradient_like
from onepass.ops.vocab_stats import COEFFICIENTS
from support import truth
from support.environment import ACCELERATOR, NO_INTERPRETER, NO_TRITON
from support.guard import count_bytes, guard

LOW = (torch.float32, torch.bfloat16, torch.float16)
FACTS = onepass.VocabStats._fields
SMOOTH = tuple(fact for fact in FACTS if fact != "argmax")
FACTOR, FLOOR = 3.0, 8.0  # torch itself, in another summation order, breaks lower bars by chance

interpreted = pytest.mark.skipif(bool(NO_INTERPRETER), reason=NO_INTERPRETER)


def dtype_id(value: Any) -> str | None:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def shape_id(value: Any) -> str | None:
    return "x".join(map(str, value)) if isinstance(value, tuple) else dtype_id(value)


# ---------------------------------------------------------------- cases


@dataclass
class Case:
    """The arguments of one call."""

    logits: Tensor
    labels: Tensor | None = None
    contrast_labels: Tensor | None = None
    bag_weights: Tensor | None = None
    mask: Tensor | None = None

    @property
    def extras(self) -> dict[str, Tensor | None]:
        return {"contrast_labels": self.contrast_labels, "bag_weights": self.bag_weights}

    @property
    def counted_labels(self) -> Tensor | None:
        """Labels as a truth wants them: a row that the mask leaves out is one labelled -100."""
        if self.mask is None:
            return self.labels
        labels = torch.zeros_like(self.mask, dtype=torch.int64)
        labels = labels if self.labels is None else self.labels.long()
        return torch.where(self.mask != 0, labels, truth.IGNORED)

    def possible(self, facts: Iterable[str] = FACTS) -> tuple[str, ...]:
        """Those facts that these arguments allow."""
        needs = {"label_logit": self.labels, "logp": self.labels}
        needs |= {"contrast_logit": self.contrast_labels, "bag_mass": self.bag_weights}
        return tuple(fact for fact in facts if fact not in needs or needs[fact] is not None)

    def stats(
        self, impl: str, want: Sequence[str] | None = None, logits: Tensor | None = None
    ) -> onepass.VocabStats:
        extras: dict[str, Any] = self.extras
        return onepass.vocab_stats(
            self.logits if logits is None else logits,
            self.labels,
            **extras,
            mask=self.mask,
            want=self.possible() if want is None else want,
            impl=impl,
        )

    def gradient(self, impl: str, upstream: Mapping[str, Tensor]) -> Tensor:
        """dlogits of one call under these upstream gradients."""
        leaf = self.logits.detach().requires_grad_()
        stats = self.stats(impl, tuple(upstream), leaf)
        return gradient_of(stats, leaf, upstream)

    def true_facts(self) -> dict[str, truth.Truth]:
        return truth.vocab_facts(self.logits, self.counted_labels, **self.extras)

    def true_gradient(self, upstream: Mapping[str, Tensor]) -> truth.Truth:
        return truth.vocab_gradient(self.logits, self.counted_labels, upstream, **self.extras)

    def usual(self) -> tuple[dict[str, Tensor], Tensor]:
        """The facts by torch's own functions, and the leaf to differentiate them by."""
        leaf = self.logits.detach().clone().requires_grad_()
        return truth.unfused_vocab_facts(leaf, self.counted_labels, **self.extras), leaf


def gradient_of(
    stats: onepass.VocabStats | dict[str, Tensor],
    leaf: Tensor,
    upstream: Mapping[str, Tensor],
    **options: Any,
) -> Tensor:
    facts = stats if isinstance(stats, dict) else stats._asdict()
    outputs = [facts[name] for name in upstream]
    return torch.autograd.grad(outputs, leaf, list(upstream.values()), **options)[0]


def draw(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    spread: float = 3.0,
    offset: float = 0.0,
) -> Case:
    """Random logits with labels, contrast labels of which the last is -100, and vocabulary weights
    some of which are 0."""
    rows, vocab_size = shape[:-1], shape[-1]
    contrast = torch.randint(vocab_size, rows)
    if contrast.numel() > 1:
        contrast.view(-1)[-1] = truth.IGNORED
    bag = torch.rand(vocab_size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    bag = torch.where(torch.rand(vocab_size) < 0.3, 0.0, bag)
    wide = torch.randn(shape, dtype=torch.float64) * spread + offset
    return Case(
        wide.to(dtype).to(device),
        torch.randint(vocab_size, rows).to(device),
        contrast.to(device),
        bag.to(device),
    )


def random_upstream(case: Case, facts: Iterable[str]) -> dict[str, Tensor]:
    """Gradients of both signs; the sums over V get smaller ones, lest they drown the others."""
    like = torch.float64 if case.logits.dtype == torch.float64 else torch.float32
    rows = case.logits.shape[:-1]
    small = {"logit_sum": 0.01, "logp_sum": 0.01}
    return {
        fact: (torch.randn(rows, dtype=like) * small.get(fact, 1.0)).to(case.logits.device)
        for fact in facts
    }


def check(got: Tensor, want: truth.Truth, usual: Tensor | None, what: str) -> None:
    """Within 8 u of the natural scale, or 3 times as far off as unfused torch."""
    error = truth.worst_error(got, want)
    theirs = 0.0 if usual is None else truth.worst_error(usual, want)
    bar = max(FLOOR, FACTOR * theirs) if math.isfinite(theirs) else FLOOR
    assert error <= bar, f"{what}: {error:.3g} u, unfused torch {theirs:.3g} u"


def check_facts(case: Case, stats: onepass.VocabStats, facts: Iterable[str] | None = None) -> None:
    wanted, (usual, _) = case.true_facts(), case.usual()
    for fact in case.possible() if facts is None else facts:
        got = getattr(stats, fact)
        assert got.dtype == (
            torch.int64
            if fact == "argmax"
            else torch.float64
            if case.logits.dtype == torch.float64
            else torch.float32
        )
        check(got, wanted[fact], usual.get(fact), fact)


def check_gradient(case: Case, got: Tensor, upstream: Mapping[str, Tensor], what: str) -> None:
    assert got.dtype == case.logits.dtype
    usual, leaf = case.usual()
    check(got, case.true_gradient(upstream), gradient_of(usual, leaf, upstream), what)


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


# ---------------------------------------------------------------- values and gradients

SHAPES = [
    (0, 5),
    (1,),  # no leading dimension, and the smallest vocabulary: p = 1, entropy 0
    (3, 1),
    (7, 2),
    (1003,),
    (2, 127),
    (2, 128),  # exactly one block
    (2, 2, 1003),
    # Around the border of two segments: with the alignment's slack, 16381 columns get a second
    # segment that holds none of them.
    (1, 16381),
    (1, 16384),
    (1, 16391),
]


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_every_fact_and_a_mix_of_gradients(
    impl: str, shape: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    case = draw(shape, dtype, device)
    check_facts(case, case.stats(impl))
    upstream = random_upstream(case, SMOOTH)
    check_gradient(case, case.gradient(impl, upstream), upstream, "dlogits")


@pytest.mark.parametrize("shape", [(0, 5), (1,), (7, 2), (2, 3, 1003), (2, 16391)], ids=shape_id)
def test_float64_is_calculated_in_float64(shape: tuple[int, ...], device: str) -> None:
    """TRL's head calculates fp64 in fp32: errors of 10^5 u and more."""
    case = draw(shape, torch.float64, device)
    check_facts(case, case.stats("torch"))
    upstream = random_upstream(case, SMOOTH)
    check_gradient(case, case.gradient("torch", upstream), upstream, "dlogits")


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_every_gradient_alone(impl: str, dtype: torch.dtype, device: str) -> None:
    """huggingface/trl#6625 forgot the gradient of one output: a mix would hide a small one."""
    case = draw((2, 131), dtype, device)
    leaf = case.logits.detach().requires_grad_()
    stats = case.stats(impl, logits=leaf)
    for fact in SMOOTH:
        upstream = random_upstream(case, [fact])
        got = gradient_of(stats, leaf, upstream, retain_graph=True)
        check_gradient(case, got, upstream, fact)
        assert case.true_gradient(upstream).value.abs().max() > 0, fact


@pytest.mark.parametrize("seed", range(6))
def test_random_mixes_of_wants_and_gradients(impl: str, seed: int, device: str) -> None:
    """What is wanted prunes the kernels, what has a gradient prunes the backward: neither may
    change the rest."""
    torch.manual_seed(seed)
    case = draw((2, 300), LOW[seed % 3], device)
    wanted = [fact for fact in FACTS if torch.rand(()) < 0.6] or ["lse"]
    used = [fact for fact in wanted if fact != "argmax" and torch.rand(()) < 0.6] or ["lse"]
    leaf = case.logits.detach().requires_grad_()
    stats = case.stats(impl, tuple({*wanted, *used}), leaf)
    check_facts(case, stats, {*wanted, *used})
    assert [fact for fact in FACTS if getattr(stats, fact) is None] == [
        fact for fact in FACTS if fact not in {*wanted, *used}
    ]
    upstream = random_upstream(case, used)
    check_gradient(case, gradient_of(stats, leaf, upstream), upstream, str(used))


def test_default_wants(impl: str, device: str) -> None:
    case = draw((3, 50), torch.float32, device)
    bare = onepass.vocab_stats(case.logits, impl=impl)
    assert [fact for fact in FACTS if getattr(bare, fact) is not None] == ["lse"]
    labelled = onepass.vocab_stats(case.logits, case.labels, impl=impl)
    assert [fact for fact in FACTS if getattr(labelled, fact) is not None] == ["lse", "logp"]
    single = onepass.vocab_stats(case.logits, want="entropy", impl=impl)
    check_facts(case, single, ["entropy"])
    assert not case.stats(impl, logits=case.logits.requires_grad_()).argmax.requires_grad


@dataclass
class Upstream:
    """How the gradient that arrives at the [B, S] facts is made from random values [B, S]."""

    of: Callable[[Tensor], Tensor]
    dtypes: tuple[torch.dtype, ...] = LOW


UPSTREAMS = {
    "random": Upstream(lambda g: g),
    "zero": Upstream(torch.zeros_like),
    # ROCm/TransformerEngine#409: an expanded gradient was read as if it were contiguous
    "expanded": Upstream(lambda g: g[:1, :1].expand(g.shape)),
    "transposed": Upstream(lambda g: g.t().contiguous().t()),
    "every_second": Upstream(lambda g: torch.stack((g, g * math.nan), -1).flatten(1)[:, ::2]),
    "one_row_only": Upstream(
        lambda g: torch.where(torch.arange(g.numel()).to(g.device) == 4, g.flatten(), 0.0).view(
            g.shape
        )
    ),
    # fp16 would overflow, as it should: the smaller one underflows there by design
    "2^40": Upstream(lambda g: g * 2.0**40, (torch.float32, torch.bfloat16)),
    "2^-40": Upstream(lambda g: g * 2.0**-40, (torch.float32, torch.bfloat16)),
}


@pytest.mark.parametrize("kind", UPSTREAMS)
def test_upstream_gradients(impl: str, kind: str, device: str) -> None:
    """NVIDIA/TransformerEngine#2139, linkedin/Liger-Kernel#1298: a gradient other than 1 was
    ignored."""
    for dtype in UPSTREAMS[kind].dtypes:
        case = draw((2, 3, 131), dtype, device)
        upstream = {
            fact: UPSTREAMS[kind].of(g)
            for fact, g in random_upstream(case, ("logp", "entropy")).items()
        }
        got = case.gradient(impl, upstream)
        check_gradient(case, got, upstream, str(dtype))
        if kind == "zero":
            assert not got.any()
        if kind == "one_row_only":
            assert got[1, 1].any() and not got.flatten(0, 1)[[0, 1, 2, 3, 5]].any()


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_upstream_times_a_power_of_two_is_exact(impl: str, dtype: torch.dtype, device: str) -> None:
    """A loss scale changes nothing but the exponent, fp16's underflow aside
    (linkedin/Liger-Kernel#512)."""
    case = draw((3, 300), dtype, device)
    upstream = random_upstream(case, SMOOTH)
    plain = case.gradient(impl, upstream)
    scaled = case.gradient(impl, {fact: g * 16 for fact, g in upstream.items()})
    normal = plain.abs() >= torch.finfo(dtype).tiny
    assert normal.float().mean() > 0.9
    assert same_bits(scaled[normal], plain[normal] * 16)


# ---------------------------------------------------------------- layouts


def padded(wide: Tensor, columns: int, start: int = 0) -> Tensor:
    """A copy whose rows lie `columns` further apart, with NaN between them."""
    shape = (*wide.shape[:-1], wide.shape[-1] + columns)
    storage = torch.full(shape, math.nan, dtype=wide.dtype, device=wide.device)
    storage[..., start : start + wide.shape[-1]] = wide
    return storage[..., start : start + wide.shape[-1]]


def offset_start(wide: Tensor, elements: int) -> Tensor:
    """A contiguous copy that starts some elements into its storage, with NaN before."""
    storage = torch.full((elements + wide.numel(),), math.nan).to(wide.device, wide.dtype)
    storage[elements:] = wide.flatten()
    return storage[elements:].view(wide.shape)


def every_second(wide: Tensor) -> Tensor:
    return torch.stack((wide, torch.full_like(wide, math.nan)), 1).flatten(0, 1)[::2]


def sequence_slice(wide: Tensor) -> Tensor:
    """logits[:, :-1], as every language model's loss takes it."""
    batch = wide.view(2, -1, wide.shape[-1])
    last = torch.full_like(batch[:, :1], math.nan)
    return torch.cat((batch, last), 1)[:, :-1]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda wide: wide,
    "padded_to_16_bytes": lambda wide: padded(wide, -wide.shape[-1] % 8),
    "padded_by_3": lambda wide: padded(wide, 3),
    "padded_on_both_sides": lambda wide: padded(wide, 5, 2),
    "padded_by_100": lambda wide: padded(wide, 100),
    "starts_at_1": lambda wide: offset_start(wide, 1),
    "starts_at_3": lambda wide: offset_start(wide, 3),
    # Another library's memory: the storage itself starts off a 16-byte address.
    "unaligned_storage": lambda wide: torch.from_dlpack(offset_start(wide, 1)),
    "transposed": lambda wide: wide.t().contiguous().t(),
    "expanded_rows": lambda wide: wide[:1].expand(4, -1),
    "every_second_row": every_second,
    "every_second_column": lambda wide: torch.stack((wide, wide * math.nan), -1).flatten(-2)[
        :, ::2
    ],
    "sequence_slice": sequence_slice,
    "sequence_slice_padded": lambda wide: padded(sequence_slice(wide), 5, 2),
    "sequence_first": lambda wide: wide.view(2, 2, -1).transpose(0, 1),
    "four_dimensions": lambda wide: wide.view(2, 1, 2, -1).transpose(0, 2),
}


@pytest.mark.parametrize(
    "layout, dtype",
    [(layout, torch.bfloat16) for layout in LAYOUTS]
    + [(layout, torch.float32) for layout in ("padded_by_3", "starts_at_1", "unaligned_storage")],
    ids=lambda value: dtype_id(value) or value,
)
def test_layouts(impl: str, layout: str, dtype: torch.dtype, device: str) -> None:
    """NVIDIA/TransformerEngine#2402, pytorch/pytorch#132857: strides taken for granted. NaN lies
    wherever no logit does."""
    plain = draw((4, 131), dtype, device)
    case = draw((4, 131), dtype, device)
    case.logits = LAYOUTS[layout](plain.logits)
    rows = case.logits.shape[:-1]
    assert case.logits.isfinite().all()
    assert case.labels is not None and case.contrast_labels is not None
    case.labels, case.contrast_labels = case.labels.view(rows), case.contrast_labels.view(rows)
    check_facts(case, case.stats(impl))
    upstream = random_upstream(case, SMOOTH)
    got = case.gradient(impl, upstream)
    check_gradient(case, got, upstream, layout)
    assert got.shape == case.logits.shape


@pytest.mark.parametrize("layout", ["padded_to_16_bytes", "padded_by_3", "sequence_slice"])
def test_gradient_through_the_view_of_a_leaf(impl: str, layout: str, device: str) -> None:
    """What lies beside the view belongs to the leaf and gets exactly 0; in a gradient that keeps
    the padded stride the padding is 0 too, since a GEMM may multiply it (oneDNN#5717).
    """
    case = draw((4, 131), torch.bfloat16, device)
    view = LAYOUTS[layout](case.logits)
    leaf = view._base if view._base is not None else view
    leaf = leaf.detach().requires_grad_()
    inner = leaf.as_strided(view.shape, view.stride(), view.storage_offset())
    assert case.labels is not None
    stats = onepass.vocab_stats(inner, case.labels.view(view.shape[:-1]), impl=impl)
    (dview,) = torch.autograd.grad(stats.logp.sum(), inner, retain_graph=True)
    stats.logp.sum().backward()
    assert leaf.grad is not None
    covered = leaf.grad.as_strided(view.shape, view.stride(), view.storage_offset())
    assert same_bits(covered, dview)
    assert dview.abs().sum() == leaf.grad.abs().sum() > 0
    everything = dview.as_strided((dview.untyped_storage().nbytes() // 2,), (1,), 0)
    assert everything.isfinite().all()


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, "strided", "expanded"])
def test_label_layouts(impl: str, kind: Any, device: str) -> None:
    """int64 slices off a 16-byte address and other integers (flash-attention's label slices)."""
    case = draw((2, 3, 131), torch.float32, device)
    assert case.labels is not None and case.contrast_labels is not None
    if kind == "strided":
        wrong = torch.full_like(case.labels, 10**6)
        labels = torch.stack((wrong, case.labels), -1).flatten(1)[:, 1::2]
        contrast = case.contrast_labels.t().contiguous().t()
    elif kind == "expanded":
        case.labels = labels = case.labels[:1].expand(2, 3)
        case.contrast_labels = contrast = case.contrast_labels[:, :1].expand(2, 3)
    else:
        labels, contrast = case.labels.to(kind), case.contrast_labels.to(kind)
    got = onepass.vocab_stats(
        case.logits, labels, contrast_labels=contrast, want=("logp", "contrast_logit"), impl=impl
    )
    check_facts(case, got, ("logp", "contrast_logit"))


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "strided"])
def test_bag_weight_layouts(impl: str, kind: str, device: str) -> None:
    case = draw((2, 131), torch.float32, device)
    assert case.bag_weights is not None
    case.bag_weights = case.bag_weights.bfloat16().float()
    weights = case.bag_weights
    if kind == "strided":
        given = torch.stack((weights, weights * math.nan), -1).flatten()[::2]
    else:
        given = weights.to(getattr(torch, kind))
    want = ("bag_mass", "logp_sum")
    check_facts(
        case, onepass.vocab_stats(case.logits, bag_weights=given, want=want, impl=impl), want
    )


# ---------------------------------------------------------------- hard cases


def hard_row(columns: int, device: str) -> Tensor:
    """[1, columns] fp32 logits, the same in every test."""
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(1, columns, generator=generator).to(device) * 2


def minus_infinity_at(columns: int, which: slice | Sequence[int]) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        logits = hard_row(columns, device)
        logits[:, which] = -math.inf
        finite = int(logits[0].isfinite().nonzero()[-1])
        return Case(logits, torch.tensor([finite], device=device))

    return make


def label_is_banned(device: str) -> Case:
    logits = hard_row(300, device)
    logits[:, 7] = -math.inf
    return Case(logits, torch.tensor([7], device=device))


def row_of(value: float, columns: int = 300) -> Callable[[str], Case]:
    return lambda device: Case(
        torch.full((1, columns), value, device=device), torch.tensor([5], device=device)
    )


def with_logit(value: float, column: int, label: int) -> Callable[[str], Case]:
    def make(device: str) -> Case:
        logits = hard_row(300, device)
        logits[:, column] = value
        return Case(logits, torch.tensor([label], device=device))

    return make


def label_in(column: int, columns: int) -> Callable[[str], Case]:
    return lambda device: Case(hard_row(columns, device), torch.tensor([column], device=device))


def tied(device: str) -> Case:
    """Few values, many times each; the label is one of several maxima."""
    logits = hard_row(300, device).round()
    at = logits[0].argmax()
    logits[:, [3, 150, 299]] = logits[0, at].clone()
    return Case(logits, torch.tensor([150], device=device))


HARD: dict[str, Callable[[str], Case]] = {
    "a_banned_column": minus_infinity_at(300, [4]),
    # huggingface/trl#7221, #7251: an online softmax that starts from -inf meets -inf - -inf
    "banned_prefix_longer_than_a_block": minus_infinity_at(4500, slice(0, 4200)),
    "banned_first_segment": minus_infinity_at(16500, slice(0, 16400)),
    "banned_tail": minus_infinity_at(4500, slice(10, 4500)),
    "all_banned_but_one": minus_infinity_at(300, [*range(150), *range(151, 300)]),
    "all_banned_but_the_last": minus_infinity_at(4501, slice(0, 4500)),
    "banned_label": label_is_banned,  # its loss is infinite, its gradient is not
    "whole_row_banned": row_of(-math.inf),
    "plus_infinity": with_logit(math.inf, 9, 5),
    "plus_infinity_at_the_label": with_logit(math.inf, 9, 9),
    "nan": with_logit(math.nan, 9, 5),
    "nan_in_the_last_column": with_logit(math.nan, 299, 5),
    "ties": tied,
    "equal": row_of(0.0),
    "huge_and_equal": row_of(30000.0),
    "huge_and_negative": row_of(-30000.0),
    "far_above_the_rest": with_logit(200.0, 9, 9),
    "far_above_the_label": with_logit(200.0, 9, 5),
    # cut-cross-entropy#59, verl#2656: the tail of the vocabulary lost or read as 0
    "label_in_the_first_column": label_in(0, 1003),
    "label_in_the_last_column": label_in(1002, 1003),
    "label_in_the_second_segment": label_in(16390, 16391),
}


UNALIGNED = ["nan_in_the_last_column", "label_in_the_last_column", "banned_tail", "ties"]


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in HARD] + [(name, torch.bfloat16) for name in UNALIGNED],
    ids=lambda value: dtype_id(value) or value,
)
def test_hard_rows(impl: str, name: str, dtype: torch.dtype, device: str) -> None:
    case = HARD[name](device)
    case.logits = case.logits.to(dtype)
    case.bag_weights = torch.ones(case.logits.shape[-1], device=device)
    if name != "whole_row_banned":
        case.bag_weights[case.logits[0] == -math.inf] = 0.0  # banned: no weight either
    facts = [fact for fact in case.possible() if "nan" not in name or fact != "argmax"]
    check_facts(case, case.stats(impl, facts), facts)
    # Where logits are banned their sum is -inf and tells nothing more.
    smooth = [fact for fact in facts if fact not in ("argmax", "logit_sum")]
    upstream = random_upstream(case, smooth)
    check_gradient(case, case.gradient(impl, upstream), upstream, name)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("banned", ["half", "all_but_one", "all"])
def test_rows_masked_by_the_lowest_number(
    impl: str, banned: str, dtype: torch.dtype, device: str
) -> None:
    """torch.finfo(dtype).min is how many write -inf. A row of nothing else is uniform, not empty:
    it is finite."""
    logits = hard_row(300, device).to(dtype)
    which = {"half": slice(0, 150), "all_but_one": slice(0, 299), "all": slice(None)}[banned]
    logits[:, which] = torch.finfo(dtype).min
    case = Case(logits, torch.tensor([299], device=device))
    facts = ("lse", "label_logit", "logp", "entropy", "sum_sq_probs", "argmax")
    check_facts(case, case.stats(impl, facts), facts)
    upstream = random_upstream(case, ("lse", "logp", "entropy"))
    check_gradient(case, case.gradient(impl, upstream), upstream, banned)


@pytest.mark.parametrize("label", [-1, 300, 2**32 + 3])
@pytest.mark.parametrize("fact", ["logp", "label_logit", "contrast_logit"])
def test_an_unchecked_bad_label_spoils_its_row_only(
    fact: str, label: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU nobody reads the labels: the row of a bad one is NaN, and so is its gradient, which
    an optimizer or a gradient norm then shows; no other row changes."""
    if NO_TRITON:
        pytest.skip(NO_TRITON)
    monkeypatch.setattr(vocab_stats_module, "values_checked", lambda tensor: False)
    logits = torch.randn(3, 300, device=device, requires_grad=True)
    name = "contrast_labels" if fact == "contrast_logit" else "labels"

    def row_gradients(labels: list[int]) -> tuple[Tensor, Tensor]:
        ids = torch.tensor(labels, device=device)
        given: dict[str, Any] = {name: ids}
        stats = onepass.vocab_stats(logits, **given, want=fact, impl="triton")
        values = getattr(stats, fact)
        return values, torch.autograd.grad(values.sum(), logits)[0]

    values, bad = row_gradients([1, label, 2])
    _, good = row_gradients([1, 4, 2])
    assert values.isnan().tolist() == [False, True, False]
    assert bad[1].isnan().any() and torch.equal(bad[::2], good[::2])


@pytest.mark.parametrize("cut", [(slice(None), slice(0, -1)), (slice(None), slice(1, None))])
def test_gradients_of_slices_are_aligned_as_their_logits(
    cut: tuple[slice, slice], device: str
) -> None:
    """logits[:, :-1] with an odd vocabulary: the backward moves 16 bytes at once all the same."""
    logits = torch.zeros(2, 40, 257, dtype=torch.bfloat16, device=device)[cut]
    gradient = gradient_like(logits)
    assert gradient.shape == logits.shape
    assert Rows.of(logits).same_shift(Rows.of(gradient))
    few = torch.zeros(2, 64, 8, device=device)[:, :4]  # of whose memory most is not theirs
    assert gradient_like(few.expand(3, 2, 4, 8)).is_contiguous()


@pytest.mark.parametrize("column", [0, 130, 299])
def test_a_bad_row_stays_alone(impl: str, column: int, device: str) -> None:
    """NaN or infinity in one row that counts changes no bit of another."""
    case = draw((3, 300), torch.float32, device)
    upstream = random_upstream(case, SMOOTH)
    clean, clean_gradient = case.stats(impl), case.gradient(impl, upstream)
    for bad in (math.nan, math.inf):
        case.logits[1, column] = bad
        stats, gradient = case.stats(impl), case.gradient(impl, upstream)
        for fact in FACTS:
            assert same_bits(getattr(stats, fact)[::2], getattr(clean, fact)[::2]), fact
        assert stats.entropy[1].isnan() and stats.logp[1].isnan() and gradient[1].isnan().any()
        assert same_bits(gradient[::2], clean_gradient[::2])


TIES: dict[str, tuple[int, Any, int]] = {
    "all_equal": (1003, slice(None), 0),
    "in_one_block": (1003, [5, 6], 5),
    "across_lanes_against_order": (5000, [4097, 2049, 1], 1),  # each in another turn of the loop
    "in_the_unaligned_head_and_the_middle": (1003, [0, 500], 0),
    "in_the_middle_and_the_tail": (1003, [500, 1002], 500),
    "across_segments": (16500, [300, 16400], 300),
    "later_segment_later_lane": (16500, [16399, 16485], 16399),
}


@pytest.mark.parametrize("name", TIES)
def test_argmax_is_the_first_of_equal_maxima(impl: str, name: str, device: str) -> None:
    columns, which, first = TIES[name]
    logits = hard_row(columns, device)
    logits[:, which] = 50.0
    shifted = offset_start(logits, 3)
    for rows in (logits, shifted, logits.bfloat16()):
        got = onepass.vocab_stats(rows, want=("argmax", "lse"), impl=impl)
        assert got.argmax.tolist() == [first]
    negative_zero = torch.zeros(1, columns, device=device)
    negative_zero[0, 0] = -0.0  # equal to 0, and the first
    assert onepass.vocab_stats(negative_zero, want="argmax", impl=impl).argmax.tolist() == [0]


# ---------------------------------------------------------------- rows that do not count


def masked_case(kind: str, dtype: torch.dtype, device: str) -> tuple[Case, Tensor]:
    """A case of 4 rows, and which of them count."""
    case = draw((4, 300), dtype, device)
    assert case.labels is not None
    counts = torch.tensor([True, False, True, False], device=device)
    if kind == "labels":
        case.labels = torch.where(counts, case.labels, truth.IGNORED)
    elif kind == "mask_without_labels":
        case.labels, case.mask = None, counts
    elif kind == "both":  # either is enough
        case.labels[1] = truth.IGNORED
        case.mask = counts | torch.tensor([False, True, False, False], device=device)
    else:
        case.mask = counts.to({"bool_mask": torch.bool, "int_mask": torch.int32}.get(kind, dtype))
        case.mask = case.mask * 0.25 if kind == "float_mask" else case.mask
    return case, counts


MASKS = ["labels", "bool_mask", "int_mask", "float_mask", "both", "mask_without_labels"]


@pytest.mark.parametrize("kind", MASKS)
def test_rows_that_do_not_count(impl: str, kind: str, device: str) -> None:
    """Facts and gradients are exactly 0 there, whatever the row holds and whatever arrives."""
    case, counts = masked_case(kind, torch.float32, device)
    upstream = random_upstream(case, case.possible(SMOOTH))
    clean, clean_gradient = case.stats(impl), case.gradient(impl, upstream)
    check_facts(case, clean)
    check_gradient(case, clean_gradient, upstream, kind)
    # uxlfoundation/oneDNN, huggingface/trl, pytorch: NaN of an ignored row leaks into the rest
    for poison in (math.nan, math.inf):
        case.logits[~counts] = poison
        stats = case.stats(impl)
        assert same_bits(stats, clean)
        gradient = case.gradient(impl, upstream)
        assert same_bits(gradient, clean_gradient)
        assert not gradient[~counts].any()
        for fact in case.possible():
            assert not getattr(stats, fact)[~counts].any(), fact
            assert getattr(stats, fact)[counts].abs().sum() > 0, fact
    wild = {fact: torch.where(counts, g, math.nan) for fact, g in upstream.items()}
    assert same_bits(case.gradient(impl, wild), clean_gradient)


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
@pytest.mark.parametrize("kind", ["labels", "mask"])
def test_no_row_counts(impl: str, kind: str, dtype: torch.dtype, device: str) -> None:
    """NVIDIA/Megatron-LM#1764: a rank without a target must still have a live graph, and zeros."""
    case = draw((3, 131), dtype, device)
    case.logits[:] = math.nan
    if kind == "labels":
        assert case.labels is not None
        case.labels = torch.full_like(case.labels, truth.IGNORED)
    else:
        case.mask = torch.zeros(3, dtype=torch.bool, device=device)
    leaf = case.logits.detach().requires_grad_()
    stats = case.stats(impl, logits=leaf)
    assert all(not getattr(stats, fact).any() for fact in FACTS)
    total = sum(getattr(stats, fact).sum() for fact in SMOOTH)
    assert isinstance(total, Tensor) and total.requires_grad
    total.backward()
    assert leaf.grad is not None and leaf.grad.shape == leaf.shape and not leaf.grad.any()


def test_a_masked_row_may_hold_any_label(impl: str, device: str) -> None:
    """A collator's filler is often outside the vocabulary."""
    case = draw((3, 131), torch.float32, device)
    assert case.labels is not None
    mask = torch.tensor([1, 0, 1], device=device)
    clean = onepass.vocab_stats(case.logits, case.labels, mask=mask, impl=impl)
    labels = case.labels.clone()
    labels[1] = 10**12
    assert same_bits(onepass.vocab_stats(case.logits, labels, mask=mask, impl=impl), clean)


# ---------------------------------------------------------------- labels outside the vocabulary


@pytest.mark.parametrize("bad", [-1, 131, 2**31, -(2**40), -99, -101])
def test_label_out_of_range_is_an_index_error(
    impl: str, bad: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """pytorch/pytorch#117532; TRL's head takes them all and returns -lse. On a CPU values are
    looked at in any case, on a GPU on request."""
    if device != "cpu":
        monkeypatch.setenv("ONEPASS_STRICT", "1")
    case = draw((2, 3, 131), torch.float32, device)
    assert case.labels is not None and case.contrast_labels is not None
    for name, ids in (("labels", case.labels), ("contrast_labels", case.contrast_labels)):
        ids[1, 1] = bad
        with pytest.raises(IndexError, match=rf"{name}.*{bad}.*131"):
            case.stats(impl)
        ids[1, 1] = 0


@pytest.mark.parametrize("bad", [-1, 131, 2**31 + 5, 2**32 + 3, -(2**40)])
def test_unchecked_label_out_of_range_is_nan_and_reads_nothing(
    bad: int, device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Without the check (a GPU by default) the kernel itself has to stay inside the row: NaN, never
    somebody else's memory."""
    if not NO_INTERPRETER:
        monkeypatch.setattr(vocab_stats_module, "values_checked", lambda tensor: False)
    elif ACCELERATOR is None:
        pytest.skip(NO_INTERPRETER)
    case = draw((3, 131), torch.float32, device)
    assert case.labels is not None and case.contrast_labels is not None
    case.contrast_labels[:] = 3
    upstream = random_upstream(case, SMOOTH)
    clean, clean_gradient = case.stats("triton"), case.gradient("triton", upstream)
    case.labels[1] = bad
    case.contrast_labels[2] = bad
    if NO_INTERPRETER:
        stats, gradient = case.stats("triton"), case.gradient("triton", upstream)
    else:
        with guard(case.logits):
            stats, gradient = case.stats("triton"), case.gradient("triton", upstream)
    assert stats.logp.isnan().tolist() == [False, True, False]
    assert stats.label_logit.isnan().tolist() == [False, True, False]
    assert stats.contrast_logit.isnan().tolist() == [False, False, True]
    for fact in ("lse", "entropy", "argmax"):
        assert same_bits(getattr(stats, fact), getattr(clean, fact))
    assert same_bits(gradient[0], clean_gradient[0])


# ---------------------------------------------------------------- the same bits


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_backward_twice_gives_the_same_bits(impl: str, dtype: torch.dtype, device: str) -> None:
    """Liger's cross-entropy and quack multiply a saved gradient in place: wrong the second time."""
    case = draw((3, 300), dtype, device)
    leaf = case.logits.detach().requires_grad_()
    stats = case.stats(impl, logits=leaf)
    upstream = random_upstream(case, SMOOTH)
    first = gradient_of(stats, leaf, upstream, retain_graph=True)
    kept = first.clone()
    second = gradient_of(stats, leaf, upstream)
    assert same_bits(first, kept) and same_bits(second, kept)
    assert first.data_ptr() != second.data_ptr()


def test_two_runs_give_the_same_bits(impl: str, device: str) -> None:
    case = draw((2, 16391), torch.bfloat16, device)
    upstream = random_upstream(case, SMOOTH)
    assert same_bits(case.stats(impl), case.stats(impl))
    assert same_bits(case.gradient(impl, upstream), case.gradient(impl, upstream))


@pytest.mark.parametrize(
    "dtype, vocab_size",
    [(torch.float32, 304), (torch.bfloat16, 16400)],
    ids=lambda value: dtype_id(value) or str(value),
)
def test_a_row_does_not_depend_on_its_batch(
    dtype: torch.dtype, vocab_size: int, device: str, triton_here: None
) -> None:
    """Row order, batch size and leading shape change no bit (vllm-project/vllm#27229 and others);
    rows at a 16-byte stride, for the alignment decides which lane adds up what."""
    case = draw((4, vocab_size), dtype, device)
    upstream = random_upstream(case, SMOOTH)
    stats, gradient = case.stats("triton"), case.gradient("triton", upstream)

    def rearranged(change: Callable[[Tensor], Tensor]) -> tuple[onepass.VocabStats, Tensor]:
        assert case.labels is not None and case.contrast_labels is not None
        other = Case(
            change(case.logits), change(case.labels), change(case.contrast_labels), case.bag_weights
        )
        return other.stats("triton"), other.gradient(
            "triton", {fact: change(g) for fact, g in upstream.items()}
        )

    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "reversed": lambda t: t.flip(0),
        "alone": lambda t: t[2:3],
        "no_batch": lambda t: t[2],
        "leading_shape": lambda t: t.reshape(2, 2, *t.shape[1:]),
        "sequence_slice": lambda t: torch.cat(
            (t.unflatten(0, (2, 2)), t.unflatten(0, (2, 2))[:, :1]), 1
        )[:, :-1],
    }
    for name, change in changes.items():
        other, other_gradient = rearranged(change)
        for fact in FACTS:
            assert same_bits(getattr(other, fact), change(getattr(stats, fact))), (name, fact)
        assert same_bits(other_gradient, change(gradient)), name


@pytest.fixture
def triton_here() -> None:
    if NO_TRITON:
        pytest.skip(NO_TRITON)


@pytest.mark.parametrize("layout", ["contiguous", "padded_by_3", "sequence_slice"])
def test_no_input_is_written(impl: str, layout: str, device: str) -> None:
    """unslothai/unsloth#5002: an in-place backward corrupted logits that were used elsewhere."""
    case = draw((4, 131), torch.bfloat16, device)
    case.logits = LAYOUTS[layout](case.logits)
    assert case.labels is not None and case.contrast_labels is not None
    rows = case.logits.shape[:-1]
    case.labels, case.contrast_labels = case.labels.view(rows), case.contrast_labels.view(rows)
    case.labels.view(-1)[0] = truth.IGNORED
    case.mask = torch.ones(rows, device=device)
    upstream = random_upstream(case, SMOOTH)
    whole = case.logits.as_strided((case.logits.untyped_storage().nbytes() // 2,), (1,), 0)
    given = [whole, case.labels, case.contrast_labels, case.bag_weights, case.mask]
    tensors: list[Any] = [t for t in [*given, *upstream.values()] if t is not None]
    before = [(t.clone(), t._version) for t in tensors]
    case.gradient(impl, upstream)
    for tensor, (copy, version) in zip(tensors, before, strict=True):
        assert tensor._version == version and same_bits(tensor, copy)


# ---------------------------------------------------------------- error budget


BUDGET_FACTS = ("lse", "logp", "entropy")
REGIMES = {"flat": (1.0, 0.0), "usual": (3.0, 0.0), "peaked": (8.0, 0.0), "offset": (2.0, 30.0)}


@pytest.mark.parametrize("dtype", LOW, ids=dtype_id)
def test_pooled_error_is_no_worse_than_torch(impl: str, dtype: torch.dtype, device: str) -> None:
    """The geometric mean of the error over all cases of a stratum: at most 1.05 times that of
    torch's logsumexp, log_softmax and their autograd. One case tells nothing, summation order alone
    moves it by 3x."""
    slow = impl == "triton" and device == "cpu"
    rows = 4 if slow else 32
    logs: dict[str, list[float]] = {}

    def pooled(result: Tensor, want: truth.Truth) -> float:
        # Half a u at least: below that it is chance which of two roundings hits.
        return float(truth.error_in_u(result, want).clamp_min(0.5).log().mean())

    def note(name: str, got: Tensor, usual: Tensor, want: truth.Truth) -> None:
        check(got, want, usual, name)
        logs.setdefault(name, []).append(pooled(got, want) - pooled(usual, want))

    for spread, offset in REGIMES.values():
        for vocab_size in (127, 1003):
            case = draw((rows, vocab_size), dtype, device, spread=spread, offset=offset)
            leaf = case.logits.detach().requires_grad_()
            stats, (usual, usual_leaf) = case.stats(impl, BUDGET_FACTS, leaf), case.usual()
            wanted = case.true_facts()
            for fact in BUDGET_FACTS:
                note(fact, getattr(stats, fact), usual[fact], wanted[fact])
            for fact in ("lse", "logp"):
                upstream = random_upstream(case, [fact])
                got = gradient_of(stats, leaf, upstream, retain_graph=True)
                theirs = gradient_of(usual, usual_leaf, upstream, retain_graph=True)
                note(f"d {fact}", got, theirs, case.true_gradient(upstream))
    ratios = {name: math.exp(sum(values) / len(values)) for name, values in logs.items()}
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


# ---------------------------------------------------------------- memory


def test_rows_more_than_two_billion_elements_apart(impl: str, device: str, tmp_path: Path) -> None:
    """int32 offsets wrap (fla-org/flash-linear-attention#1080, pytorch/pytorch#190857). A sparse
    file holds the rows where memory could not."""
    stride, rows, vocab_size = 2**30 + 8, 3, 100
    elements = (rows - 1) * stride + vocab_size
    if device == "cpu":
        path = tmp_path / "sparse"
        with open(path, "wb") as file:
            file.truncate(elements * 2)
        storage = torch.from_file(str(path), shared=True, size=elements, dtype=torch.bfloat16)
    else:
        storage = torch.zeros(elements, dtype=torch.bfloat16, device=device)
    wide = storage.as_strided((rows, vocab_size), (stride, 1))
    case = draw((rows, vocab_size), torch.bfloat16, device)
    wide.copy_(case.logits)
    for view, shape in ((wide, (rows,)), (wide[:, None], (rows, 1)), (wide[None], (1, rows))):
        assert case.labels is not None and case.contrast_labels is not None
        apart = Case(
            view.view(*shape, vocab_size),
            case.labels.view(shape),
            case.contrast_labels.view(shape),
            case.bag_weights,
        )
        upstream = random_upstream(apart, ("logp", "entropy"))
        # The guard makes a fault of what would end the process.
        with nullcontext() if NO_INTERPRETER else guard(wide):
            stats, gradient = apart.stats(impl), apart.gradient(impl, upstream)
        check_facts(apart, stats)
        check_gradient(apart, gradient, upstream, str(shape))


@pytest.mark.skipif(
    ACCELERATOR is None, reason="needs 20 GB and a minute without a GPU: see the sparse file above"
)
def test_more_than_two_billion_logits(device: str) -> None:
    rows, vocab_size = 2**31 // 131072 + 8, 131072
    logits = torch.zeros(rows, vocab_size, dtype=torch.bfloat16, device=device)
    last = draw((4, vocab_size), torch.bfloat16, device)
    assert last.labels is not None
    logits[-4:] = last.logits
    labels = torch.zeros(rows, dtype=torch.int64, device=device)
    labels[-4:] = last.labels
    leaf = logits.requires_grad_()
    stats = onepass.vocab_stats(leaf, labels, want=("logp", "entropy"), impl="triton")
    (got,) = torch.autograd.grad(stats.logp.sum() + stats.entropy.sum(), leaf)
    ones = {"logp": torch.ones(4, device=device), "entropy": torch.ones(4, device=device)}
    assert same_bits(got[-4:], last.gradient("triton", ones))
    assert same_bits(stats.logp[-4:], last.stats("triton", ("logp", "entropy")).logp)


COUNTED = ["contiguous", "padded_by_3", "padded_on_both_sides", "starts_at_3", "sequence_slice"]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("layout", COUNTED)
def test_every_byte_is_moved_once(layout: str, dtype: torch.dtype, device: str) -> None:
    """Logits are read once forward and once backward, dlogits written once, in rows that count;
    other rows are not read, and get only their zeros. Nothing leaves the view, nothing races."""
    case = draw((4, 1003), dtype, device)
    case.logits = LAYOUTS[layout](case.logits)
    rows = case.logits.shape[:-1]
    assert case.labels is not None and case.contrast_labels is not None
    case.labels, case.contrast_labels = case.labels.view(rows), case.contrast_labels.view(rows)
    case.labels.view(-1)[1] = case.labels.view(-1)[2] = truth.IGNORED
    case.contrast_labels.view(-1)[0] = 77
    case.bag_weights = None  # as long as a row, so it would count
    leaf = case.logits.detach().requires_grad_()
    views = leaf.detach()
    flat = [*views] if len(rows) == 1 else [row for sequence in views for row in sequence]
    size, vocab_size = leaf.element_size(), leaf.shape[-1]

    with guard(leaf), count_bytes() as forward:
        stats = case.stats("triton", case.possible(), leaf)
    for row, read_twice in zip(flat, (2, 0, 0, 1), strict=True):
        # The label's logit and the contrast's are picked once more.
        counted = vocab_size * size if read_twice else 0
        assert forward.distinct_read(row) == counted
        assert forward.read(row) == counted + read_twice * size
    assert forward.written(leaf) == 0
    logits_read = forward.read(leaf)
    assert forward.read() - logits_read + forward.written() <= 4 * 1024  # per-row numbers only
    assert forward.launches == ["vocab_stats_kernel", "vocab_stats_merge_kernel"]

    upstream = random_upstream(case, case.possible(SMOOTH))
    with guard(leaf), count_bytes() as backward:
        dlogits = gradient_of(stats, leaf, upstream)
    for row, counts in zip(flat, (True, False, False, True), strict=True):
        assert backward.read(row) == backward.distinct_read(row) == counts * vocab_size * size
    assert backward.written(leaf) == 0 and backward.read(dlogits) == 0
    assert backward.written(dlogits) == backward.distinct_written(dlogits) == 4 * vocab_size * size
    assert backward.read() - backward.read(leaf) <= 4 * 1024
    assert backward.launches == ["vocab_stats_backward_kernel"]


@interpreted
def test_every_byte_is_moved_once_over_several_segments(device: str) -> None:
    case = draw((1, 33001), torch.bfloat16, device)
    case.bag_weights = None
    leaf = case.logits.detach().requires_grad_()
    with guard(leaf), count_bytes() as forward:
        stats = case.stats("triton", ("lse", "entropy"), leaf)
    assert forward.read(leaf) == forward.distinct_read(leaf) == 33001 * 2
    with guard(leaf), count_bytes() as backward:
        dlogits = gradient_of(stats, leaf, random_upstream(case, ("lse", "entropy")))
    assert backward.read(leaf) == backward.distinct_read(leaf) == 33001 * 2
    assert backward.written(dlogits) == backward.distinct_written(dlogits) == 33001 * 2


@interpreted
@pytest.mark.parametrize("vocab_size", [1, 2, 7, 9, 128])
@pytest.mark.parametrize("start", range(0, 8, 3))
def test_no_alignment_leaves_the_row(vocab_size: int, start: int, device: str) -> None:
    """Every way in which a short row can lie across 16-byte vectors, its neighbours being NaN."""
    case = draw((2, vocab_size), torch.bfloat16, device)
    case.logits = padded(offset_start(case.logits, start), 3, 1)
    upstream = random_upstream(case, ("logp", "logp_sum"))
    with guard(case.logits):
        stats, gradient = case.stats("triton"), case.gradient("triton", upstream)
    check_facts(case, stats)
    check_gradient(case, gradient, upstream, "dlogits")


# ---------------------------------------------------------------- torch's own checks


def forward_arguments(case: Case, impl: str, want: Sequence[str]) -> tuple[Any, ...]:
    rows = (case.labels, case.contrast_labels)
    flat = (None if t is None else t.reshape(-1) for t in rows)
    return (case.logits, *flat, case.bag_weights, list(want), "", [], impl == "triton")


OPCHECKED = {
    "everything": ((2, 3, 19), FACTS, "contiguous"),
    "padded": ((2, 19), ("lse", "entropy"), "padded_by_3"),
}


@pytest.mark.parametrize("name", OPCHECKED)
def test_opcheck(impl: str, name: str, device: str) -> None:
    """Schema (no input written, no alias), fake tensors, autograd registration, AOT dispatch."""
    shape, want, layout = OPCHECKED[name]
    case = draw(shape, torch.float32, device)
    case.logits = LAYOUTS[layout](case.logits)
    forward = torch.ops.onepass.vocab_stats.default
    outputs = forward(*forward_arguments(case, impl, want))
    given = forward_arguments(case, impl, want)
    leaf = case.logits.detach().requires_grad_()
    torch.library.opcheck(forward, (leaf, *given[1:]))
    given_now = COEFFICIENTS if name == "everything" else COEFFICIENTS[:2]
    coefficients = [
        torch.randn(outputs[0].numel(), device=device) if c in given_now else None
        for c in COEFFICIENTS
    ]
    backward = torch.ops.onepass.vocab_stats_backward.default
    row_max, row_rest = (t.reshape(-1) for t in outputs[:2])
    torch.library.opcheck(
        backward, (*given[:4], row_max, row_rest, *coefficients, impl == "triton")
    )


def smooth_outputs(case: Case, facts: Sequence[str]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    def call(logits: Tensor) -> tuple[Tensor, ...]:
        stats = case.stats("torch", facts, logits)
        return tuple(getattr(stats, fact) for fact in facts)

    return call


GRADCHECKED = ["everything", "ignored_rows", "sequence_slice", "one_column", "banned_column"]


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck_and_gradgradcheck(name: str, device: str) -> None:
    shape = {"one_column": (2, 1), "sequence_slice": (2, 2, 5)}.get(name, (3, 6))
    case = draw(shape, torch.float64, device, spread=1.0)
    facts = list(SMOOTH)
    assert case.labels is not None
    if name == "ignored_rows":
        case.labels[1] = truth.IGNORED
    if name == "sequence_slice":
        case.logits = torch.cat((case.logits, case.logits[:, :1]), 1)[:, :-1]
    leaf = case.logits.detach().requires_grad_()
    call = smooth_outputs(case, facts)
    if name == "banned_column":
        column = torch.arange(6, device=device) == 2
        case.labels = case.labels * 0
        case.bag_weights = torch.where(column, 0.0, 1.0).double()
        facts = ["lse", "logp", "entropy", "sum_sq_probs", "bag_mass", "logp_sum"]
        inner = smooth_outputs(case, facts)

        def call(logits: Tensor) -> tuple[Tensor, ...]:
            return inner(torch.where(column, -math.inf, logits))

    assert torch.autograd.gradcheck(call, (leaf,))
    assert torch.autograd.gradgradcheck(call, (leaf,))


@pytest.mark.parametrize("kind", ["random", "ties", "confident", "ignored"])
def test_double_backward_in_float32(impl: str, kind: str, device: str) -> None:
    """Right, or an error, but never silently wrong. Of several equal maxima only one stays out of
    the sum, and the second derivative must not see that."""
    case = draw((3, 40), torch.float32, device)
    assert case.labels is not None
    if kind == "ties":
        case.logits = case.logits.round()
        case.logits[:, [1, 20]] = 9.0
        case.labels[:] = 20
    if kind == "confident":
        case.logits[:, 3] = 25.0
        case.labels[:] = 3
    if kind == "ignored":
        case.labels[1] = truth.IGNORED
    upstream = random_upstream(case, SMOOTH)
    direction = torch.randn(case.logits.shape).to(device)

    def second(make: Callable[[Tensor], Any], logits: Tensor) -> tuple[Tensor, Tensor]:
        leaf = logits.detach().requires_grad_()
        weights = {f: g.to(logits.dtype).requires_grad_() for f, g in upstream.items()}
        first = gradient_of(make(leaf), leaf, weights, create_graph=True)
        assert first.requires_grad
        to_weights = list(weights.values())
        both = torch.autograd.grad(
            (first * direction.to(first.dtype)).sum(), [leaf, *to_weights], allow_unused=True
        )
        return both[0], torch.stack([g for g in both[1:] if g is not None])

    def usual(leaf: Tensor) -> dict[str, Tensor]:
        assert case.bag_weights is not None
        return truth.unfused_vocab_facts(
            leaf,
            case.labels,
            contrast_labels=case.contrast_labels,
            bag_weights=case.bag_weights.to(leaf.dtype),
        )

    ours = second(lambda leaf: case.stats(impl, SMOOTH, leaf), case.logits)
    exact = second(usual, case.logits.double())
    theirs = second(usual, case.logits)
    for got, want, other in zip(ours, exact, theirs, strict=True):
        # A second derivative has no small natural scale of its own: p (1 - p) is a difference.
        size = 1 + want.abs().amax(-1, keepdim=True)
        error, usual_error = (float(((t - want).abs() / size).max()) for t in (got, other))
        assert error <= max(FLOOR * 2**-24, FACTOR * usual_error), (kind, usual_error)


def test_create_graph_gives_the_same_gradient(impl: str, device: str) -> None:
    """Another code path makes it, in torch operations; it has the same budget."""
    case = draw((4, 131), torch.bfloat16, device)
    assert case.labels is not None
    case.labels[2] = truth.IGNORED
    leaf = case.logits.detach().requires_grad_()
    upstream = random_upstream(case, SMOOTH)
    got = gradient_of(case.stats(impl, SMOOTH, leaf), leaf, upstream, create_graph=True)
    check_gradient(case, got, upstream, "create_graph")
    assert not got[2].any()


@pytest.mark.parametrize("layout", ["contiguous", "padded_by_3", "sequence_slice"])
def test_compiled_equals_eager(layout: str, device: str) -> None:
    """linkedin/Liger-Kernel#1338: compiled with ignored labels, silently wrong."""
    case = draw((4, 131), torch.bfloat16, device)
    case.logits = LAYOUTS[layout](case.logits)
    rows = case.logits.shape[:-1]
    assert case.labels is not None and case.contrast_labels is not None
    case.labels, case.contrast_labels = case.labels.view(rows), case.contrast_labels.view(rows)
    case.labels.view(-1)[0] = truth.IGNORED

    def loss(logits: Tensor) -> Tensor:
        stats = case.stats("torch", SMOOTH, logits)
        return sum((getattr(stats, fact) * 0.5).sum() for fact in SMOOTH)  # type: ignore[return-value]

    results = []
    torch._dynamo.reset()
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = case.logits.detach().requires_grad_()
        value = call(leaf)
        results.append((value.detach(), torch.autograd.grad(value, leaf)[0]))
    assert same_bits(results[0], results[1])


def test_without_gradient(impl: str, device: str) -> None:
    case = draw((3, 131), torch.bfloat16, device)
    leaf = case.logits.detach().requires_grad_()
    with_grad = case.stats(impl, logits=leaf)
    assert all(getattr(with_grad, fact).requires_grad for fact in SMOOTH)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            without = case.stats(impl, logits=leaf)
        assert not any(getattr(without, fact).requires_grad for fact in FACTS)
        assert same_bits(without, with_grad)


def test_autocast(impl: str, device: str) -> None:
    """Statistics of bf16 logits are fp32 under autocast too, and gradients reach fp32 weights."""
    torch.manual_seed(3)
    hidden = torch.randn(4, 16, device=device)
    weight = torch.randn(131, 16, device=device, requires_grad=True)
    labels = torch.randint(131, (4,), device=device)
    with torch.autocast(device, torch.bfloat16):
        logits = hidden @ weight.t()
        assert logits.dtype == torch.bfloat16
        inside = onepass.vocab_stats(logits, labels, want=("logp", "entropy"), impl=impl)
    outside = onepass.vocab_stats(logits, labels, want=("logp", "entropy"), impl=impl)
    assert inside.logp.dtype == torch.float32 and same_bits(inside, outside)
    got, expected = (
        torch.autograd.grad((s.logp + s.entropy).sum(), weight, retain_graph=True)[0]
        for s in (inside, outside)
    )
    assert got.dtype == torch.float32 and got.any() and same_bits(got, expected)


# ---------------------------------------------------------------- properties


def examples(impl: str, device: str) -> int:
    return 6 if impl == "triton" and device == "cpu" else 25


def on_a_grid(shape: tuple[int, ...], device: str, seed: int) -> Tensor:
    """Multiples of 1/8 up to 8: sums with small integers are exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, shape, generator=generator) / 8).to(device)


@pytest.mark.parametrize(
    "law", ["shift", "permutation", "padding", "split", "gradient_sums", "rows_are_alone"]
)
def test_properties(impl: str, law: str, device: str) -> None:
    """Laws that need no reference, on shapes and values that hypothesis draws and shrinks."""
    hypothesis = pytest.importorskip("hypothesis", reason="property tests need hypothesis")
    from hypothesis import strategies as st

    @hypothesis.settings(max_examples=examples(impl, device))
    @hypothesis.given(
        rows=st.integers(1, 3),
        vocab_size=st.integers(2, 300),
        seed=st.integers(0, 2**16),
        extra=st.integers(1, 40),
        dtype=st.sampled_from((torch.float32, torch.bfloat16)),
    )
    def holds(rows: int, vocab_size: int, seed: int, extra: int, dtype: torch.dtype) -> None:
        logits = on_a_grid((rows, vocab_size), device, seed)
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(vocab_size, (rows,), generator=generator).to(device)
        case = Case(logits.to(dtype), labels)
        LAWS[law](case, impl, extra, generator)

    holds()


LAW_FACTS = ("lse", "logp", "entropy", "sum_sq_probs")


def law_shift(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """softmax(z + c) = softmax(z), to the bit where z + c is exact; lse grows by c."""
    case = Case(case.logits.float(), case.labels)
    moved = Case(case.logits + 4 * extra, case.labels)
    stats, other = case.stats(impl, LAW_FACTS), moved.stats(impl, LAW_FACTS)
    assert same_bits(stats[3:5], other[3:5]) and same_bits(stats.sum_sq_probs, other.sum_sq_probs)
    check(other.lse, moved.true_facts()["lse"], None, "lse")
    upstream = random_upstream(case, ("logp", "entropy"))
    assert same_bits(case.gradient(impl, upstream), moved.gradient(impl, upstream))


def law_permutation(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """The order of the vocabulary is nothing but a name: each within its own budget, and the same
    label's logit to the bit."""
    assert case.labels is not None
    order = torch.randperm(case.logits.shape[-1], generator=generator).to(case.labels.device)
    other = Case(case.logits[:, order], order.argsort()[case.labels])
    stats, renamed = case.stats(impl), other.stats(impl)
    assert same_bits(stats.label_logit, renamed.label_logit)
    wanted = case.true_facts()
    for fact in LAW_FACTS:
        check(getattr(renamed, fact), wanted[fact], None, fact)
    upstream = random_upstream(case, LAW_FACTS)
    want = case.true_gradient(upstream)
    want = truth.Truth(want.value[:, order], want.scale[:, order])
    check(other.gradient(impl, upstream), want, None, "dlogits")


def law_padding(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """Columns of -inf change nothing and get a gradient of exactly 0 (verl-project/verl#2656)."""
    banned = torch.full((case.logits.shape[0], extra), -math.inf).to(case.logits)
    wider = Case(torch.cat((case.logits, banned), 1), case.labels)
    stats = wider.stats(impl, (*LAW_FACTS, "argmax"))
    wanted = case.true_facts()
    for fact in (*LAW_FACTS, "argmax"):
        check(getattr(stats, fact), wanted[fact], None, fact)
    upstream = random_upstream(case, LAW_FACTS)
    got = wider.gradient(impl, upstream)
    assert not got[:, -extra:].any()
    check(got[:, :-extra], case.true_gradient(upstream), None, "dlogits")


def law_split(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """A column made two, each ln 2 lower: lse stays, the entropy grows by p ln 2."""
    case = Case(case.logits.float(), case.labels)
    column = extra % case.logits.shape[-1]
    half = case.logits[:, column : column + 1] - math.log(2)
    wider = Case(torch.cat((case.logits, half), 1), case.labels)
    wider.logits[:, column] = half[:, 0]
    stats, split = case.stats(impl), wider.stats(impl)
    wanted = wider.true_facts()
    tolerance = 2**-24 * (FLOOR * (wanted["lse"].scale + wanted["entropy"].scale) + 8)
    p = (case.logits[:, column].double() - stats.lse.double()).exp()
    assert ((split.lse.double() - stats.lse.double()).abs() <= tolerance).all()
    growth = split.entropy.double() - stats.entropy.double()
    assert ((growth - p * math.log(2)).abs() <= tolerance).all()


def law_gradient_sums(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """A shift of the row changes only lse and the sum of logits, so other gradients sum to 0."""
    for fact, total in (("logp", 0.0), ("entropy", 0.0), ("sum_sq_probs", 0.0), ("lse", 1.0)):
        upstream = random_upstream(case, [fact])
        want = case.true_gradient(upstream)
        rounding = truth.unit_roundoff(case.logits.dtype) * want.value.abs().sum(-1)
        tolerance = rounding + FLOOR * 2**-24 * want.scale.sum(-1)
        sums = case.gradient(impl, upstream).double().sum(-1)
        assert ((sums - total * upstream[fact].double()).abs() <= tolerance).all(), fact


def law_rows_are_alone(case: Case, impl: str, extra: int, generator: torch.Generator) -> None:
    """What a row gives does not depend on the rows beside it, at one 16-byte stride."""
    rows = case.logits.shape[0]
    width = -(-case.logits.shape[-1] // 8) * 8
    wide = torch.full((rows, width), -math.inf).to(case.logits)
    wide[:, : case.logits.shape[-1]] = case.logits
    case = Case(wide, case.labels)
    assert case.labels is not None
    upstream = random_upstream(case, ("logp", "entropy"))
    stats, gradient = case.stats(impl), case.gradient(impl, upstream)
    last = Case(case.logits[rows - 1 :], case.labels[rows - 1 :])
    alone = last.gradient(impl, {fact: g[rows - 1 :] for fact, g in upstream.items()})
    check(alone, last.true_gradient({f: g[rows - 1 :] for f, g in upstream.items()}), None, "alone")
    if impl == "triton":  # torch's own sums depend on the number of rows
        assert same_bits(alone, gradient[rows - 1 :])
        assert same_bits(last.stats(impl).entropy, stats.entropy[rows - 1 :])


LAWS: dict[str, Callable[[Case, str, int, torch.Generator], None]] = {
    "shift": law_shift,
    "permutation": law_permutation,
    "padding": law_padding,
    "split": law_split,
    "gradient_sums": law_gradient_sums,
    "rows_are_alone": law_rows_are_alone,
}


# ---------------------------------------------------------------- bad input


LOGITS = torch.zeros(3, 5)
LABELS = torch.zeros(3, dtype=torch.int64)

# What is wrong, the call, the error, and words that must stand in it: the argument, what came,
# what was wanted.
WRONG: dict[str, tuple[dict[str, Any], Any, list[str]]] = {
    "logits_list": ({"logits": [[1.0, 2.0]]}, TypeError, ["logits", "list", "Tensor"]),
    "logits_integer": ({"logits": LABELS}, ValueError, ["logits", "int64", "float32"]),
    "logits_bool": ({"logits": LOGITS > 0}, ValueError, ["logits", "bool", "bfloat16"]),
    "logits_complex": ({"logits": LOGITS + 0j}, ValueError, ["logits", "complex64", "float16"]),
    "logits_float8": (
        {"logits": LOGITS.to(torch.float8_e5m2)},
        ValueError,
        ["logits", "float8_e5m2", "float16"],
    ),
    "logits_scalar": ({"logits": LOGITS[0, 0]}, ValueError, ["logits", "()", "[..., V]"]),
    "logits_no_column": ({"logits": LOGITS[:, :0]}, ValueError, ["(3, 0)", "V > 0"]),
    "labels_too_many": ({"labels": torch.zeros(4).long()}, ValueError, ["labels", "(4,)", "(3,)"]),
    "labels_too_deep": ({"labels": LABELS[:, None]}, ValueError, ["labels", "(3, 1)", "(3,)"]),
    "labels_float": ({"labels": LABELS.float()}, ValueError, ["labels", "float32", "integer"]),
    "labels_bool": ({"labels": LABELS > 0}, ValueError, ["labels", "bool", "integer"]),
    "labels_complex": ({"labels": LABELS + 0j}, ValueError, ["labels", "complex64", "integer"]),
    "labels_list": ({"labels": [0, 1, 2]}, TypeError, ["labels", "list", "torch.Tensor"]),
    "labels_above": (
        {"labels": torch.tensor([0, 5, 7])},
        IndexError,
        ["labels[1]", "is 5", "< 5", "-100"],
    ),
    "labels_below": ({"labels": LABELS - 1}, IndexError, ["labels[0]", "is -1", "0 <="]),
    "contrast_too_many": (
        {"contrast_labels": torch.zeros(4).long()},
        ValueError,
        ["contrast_labels", "(4,)", "(3,)"],
    ),
    "contrast_float": (
        {"contrast_labels": LABELS.half()},
        ValueError,
        ["contrast_labels", "float16", "integer"],
    ),
    "contrast_above": ({"contrast_labels": LABELS + 9}, IndexError, ["contrast_labels[0]", "is 9"]),
    "mask_too_many": ({"mask": torch.ones(4)}, ValueError, ["mask", "(4,)", "(3,)"]),
    "mask_of_logits": ({"mask": LOGITS > 0}, ValueError, ["mask", "(3, 5)", "(3,)"]),
    "mask_list": ({"mask": [1, 1, 0]}, TypeError, ["mask", "list", "torch.Tensor"]),
    "bag_weights_rows": (
        {"bag_weights": torch.ones(3)},
        ValueError,
        ["bag_weights", "(3,)", "(5,)"],
    ),
    "bag_weights_integer": (
        {"bag_weights": torch.ones(5, dtype=torch.int32)},
        ValueError,
        ["bag_weights", "int32", "float32"],
    ),
    "bag_weights_list": ({"bag_weights": [1.0] * 5}, TypeError, ["bag_weights", "list", "Tensor"]),
    "bag_weights_gradient": (
        {"bag_weights": torch.ones(5, requires_grad=True)},
        ValueError,
        ["bag_weights", "detach()"],
    ),
    "bag_weights_nan": (
        {"bag_weights": torch.tensor([1.0, math.nan, 1.0, 1.0, 1.0])},
        ValueError,
        ["bag_weights", "NaN"],
    ),
    "want_unknown": ({"want": ("lse", "probs")}, ValueError, ["want", "'probs'", "entropy"]),
    "want_unknown_alone": ({"want": "prob"}, ValueError, ["want", "'prob'", "sum_sq_probs"]),
    "want_number": ({"want": 3}, (TypeError, ValueError), ["want", "3"]),
    "want_logp_without_labels": ({"want": "logp"}, ValueError, ["want", "'logp'", "labels"]),
    "want_label_logit_without_labels": ({"want": "label_logit"}, ValueError, ["want", "labels"]),
    "want_contrast_without_labels": (
        {"want": "contrast_logit"},
        ValueError,
        ["want", "'contrast_logit'", "contrast_labels"],
    ),
    "want_bag_mass_without_weights": (
        {"want": "bag_mass"},
        ValueError,
        ["want", "'bag_mass'", "bag_weights"],
    ),
    "impl_unknown": ({"impl": "cuda"}, ValueError, ["impl", "'cuda'", "auto", "triton", "torch"]),
    "impl_none": ({"impl": None}, ValueError, ["impl", "None", "auto"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_bad_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the argument, says what came and what was wanted, before any work."""
    arguments, error, words = WRONG[name]
    if error is not IndexError and "nan" not in name:  # values are read inside the operator

        def untouched(*args: Any) -> None:
            raise AssertionError("work had begun")

        monkeypatch.setattr(vocab_stats_module, "_vocab_stats", untouched)
    with pytest.raises(error) as caught:
        onepass.vocab_stats(**{"logits": LOGITS, **arguments})
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message and len(message) <= 250


def test_triton_says_all_reasons_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=r"impl='triton'.*cpu.*float64"):
        onepass.vocab_stats(LOGITS.double(), impl="triton")


def test_environment_chooses_the_implementation(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONEPASS_IMPL is a preference for "auto": a typo is an error, an argument wins over it."""
    monkeypatch.setenv("ONEPASS_IMPL", "fast")
    with pytest.raises(ValueError, match="ONEPASS_IMPL.*auto, triton, torch.*'fast'"):
        onepass.vocab_stats(LOGITS)
    chosen: list[bool] = []
    original = vocab_stats_module._vocab_stats

    def watched(*args: Any) -> Any:
        chosen.append(args[-1])
        return original(*args)

    monkeypatch.setattr(vocab_stats_module, "_vocab_stats", watched)
    monkeypatch.setenv("ONEPASS_IMPL", "torch")
    onepass.vocab_stats(LOGITS)
    monkeypatch.setenv("ONEPASS_IMPL", "triton")
    onepass.vocab_stats(LOGITS.double())  # what Triton cannot serve goes to torch
    onepass.vocab_stats(LOGITS, impl="torch")
    assert chosen == [False, False, False]
    if not NO_INTERPRETER:
        onepass.vocab_stats(LOGITS)
        assert chosen[-1] is True
