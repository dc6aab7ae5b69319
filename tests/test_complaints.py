"""What users of other losses complained about, and the bug classes behind it, as tests of ours.

Repositories: L = linkedin/Liger-Kernel, C = apple/ml-cross-entropy, P = pytorch/pytorch, TE =
NVIDIA/TransformerEngine, M = NVIDIA/Megatron-LM, V = verl-project/verl. A theme that stands in
another file as well as it would here is a line of this table (test_ and .py left out):

    P#90793 int32 offsets         vocab_stats: test_rows_more_than_two_billion_elements_apart
    L#1432 rounded divergences    vocab_pair_stats: test_divergences_near_zero
    L#551 entropy, its gradient   vocab_stats: test_every_gradient_alone
    C#59 -inf logits              vocab_stats: test_hard_rows
    FA#2789, L#916 out of bounds  vocab_stats: test_no_alignment_leaves_the_row
    L#802 num_items               losses: test_micro_batches_add_up
    M#1764, aiter#5165 all masked losses: test_all_masked (in cross_entropy: test_all_ignored...)
    TE#2476 mean over ignored     losses: test_masked_rows_change_nothing
    TRL, saturated caps           losses: test_saturated_cap_keeps_its_direction
    M#1627 label smoothing        cross_entropy: test_class_indices
    TT#2741, axolotl#3721 breaks  cross_entropy: test_compiled_in_one_graph_is_bit_equal
    FLA#1241 odd widths           losses: test_hidden_loss_is_its_formula

Fused heads, PEFT on them and sharded vocabularies come with the head; two processes share nothing.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onepass
from onepass.ops import _check, _launch, gaussian, row_moments, vocab_pair_stats, vocab_stats
from support.environment import NO_TRITON

UNIT = 2.0**-24
NAN = float("nan")
ROOT = Path(__file__).parents[1]


def grads(loss: Tensor, *leaves: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, leaves, upstream, retain_graph=True)


def exact_gradient(logits: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """(p - onehot) * upstream in fp64, and the natural scale that its error may be measured in."""
    z = logits.detach().double()
    p = z.softmax(-1)
    hot = F.one_hot(labels.clamp_min(0), z.shape[-1])
    up = (upstream.double() * (labels != -100)).unsqueeze(-1)
    gap = z.amax(-1, keepdim=True) - z
    return up * (p - hot), up.abs() * (p * (1 + gap) + hot)


def assert_gradient(actual: Tensor, logits: Tensor, labels: Tensor, upstream: Tensor) -> None:
    expected, scale = exact_gradient(logits, labels, upstream)
    stored = torch.finfo(actual.dtype)
    allowed = (
        8 * UNIT * scale + stored.eps / 2 * expected.abs() + stored.smallest_normal * stored.eps
    )
    assert bool(((actual.double() - expected).abs() <= allowed).all())


# ---------------------------------------------------------------- A. precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_true_class_gradient_as_p_nears_1(dtype: torch.dtype, impl: str, device: str) -> None:
    """L#1329: p - 1 is all rounding from a gap of 17 on; random logits never show it."""
    gaps = [5.0, 12.0, 20.0, 40.0, 80.0]
    z = torch.zeros(len(gaps), 4)
    z[:, 1:] = -1000.0
    z[:, 2] = -torch.tensor(gaps)
    z = z.to(device, dtype).requires_grad_()
    labels = torch.zeros(len(gaps), dtype=torch.int64, device=device)
    loss = onepass.cross_entropy(z, labels, reduction="none", impl=impl)
    loss.sum().backward()
    rest = torch.tensor(gaps, dtype=torch.float64, device=device).neg().exp()
    assert z.grad is not None
    bar = 1e-6 + torch.finfo(dtype).eps / 2
    for actual, expected in (
        (-z.grad[:, 0], rest / (1 + rest)),
        (z.grad[:, 2], rest / (1 + rest)),
    ):
        assert float(((actual - expected) / expected).abs().max()) <= bar
    assert float(((loss.detach() - rest.log1p()) / rest.log1p()).abs().max()) <= 1e-6


@pytest.mark.parametrize("offset", [-1024.0, 4096.0])
def test_offset_of_all_logits_costs_nothing(offset: float, impl: str, device: str) -> None:
    """P#195829: lse - z_y pays the offset's rounding twice, 297 times torch's error at 10,000."""
    z = torch.randint(-64, 64, (3, 50), device=device) / 16  # exact, shifted too
    labels = torch.tensor([0, 31, -100], device=device)
    results = []
    for logits in (z, z + offset):
        logits = logits.clone().requires_grad_()
        loss = onepass.cross_entropy(logits, labels, reduction="none", impl=impl)
        results.append((loss, *grads(loss.sum(), logits)))
    for plain, shifted in zip(*results, strict=True):
        assert torch.equal(plain, shifted)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_is_summed_in_fp32(reduction: str, impl: str, device: str) -> None:
    """torch's chunked linear_cross_entropy sums in bf16: 8.0 for 10.02. bf16 ends at 256."""
    rows = 3000 if impl == "torch" or device != "cpu" else 16
    logits = (4 * torch.randn(rows, 6, device=device)).to(torch.bfloat16)
    labels = torch.randint(0, 6, (rows,), device=device)
    expected = F.cross_entropy(logits.double(), labels, reduction=reduction)
    for loss in (
        onepass.cross_entropy(logits, labels, reduction=reduction, impl=impl),
        onepass.masked_cross_entropy(logits, labels, reduction=reduction, impl=impl),
    ):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_fp16_gradient_is_scaled_before_it_is_rounded(impl: str, device: str) -> None:
    """L#512: a gradient made in the forward pass has underflowed when the loss scale comes."""
    logits = torch.randn(3, 200, device=device).half().requires_grad_()
    labels = torch.tensor([0, 199, 7], device=device)
    scale, items = 2.0**16, 20_000_000  # one item's share of the batch is below fp16's reach
    loss = onepass.masked_cross_entropy(logits, labels, num_items=items, impl=impl)
    (gradient,) = grads(scale * loss, logits)
    assert_gradient(gradient, logits, labels, torch.full((3,), scale / items, device=device))
    (unscaled,) = grads(loss, logits)
    assert not unscaled[0, 1:].any(), "no underflow to guard against: this tests nothing"


def test_fp16_training_is_not_stuck_near_8(device: str) -> None:
    """L#512 itself: 2981 = e^8 tokens, fp16 logits, a scaled loss, and the loss has to fall."""
    vocab_size, scale = 2981, 1024.0
    table = nn.Parameter(torch.zeros(5, vocab_size, device=device))
    optimizer = torch.optim.SGD([table], lr=30.0)
    labels = torch.tensor([3, 2980, 17, 256, -100], device=device)
    losses = []
    for _ in range(8):
        loss = onepass.cross_entropy(table.half(), labels)
        (scale * loss).backward()
        assert table.grad is not None
        table.grad /= scale
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(8.0, abs=1e-3)
    assert losses[-1] < 0.5


@pytest.mark.parametrize("vocab_size", [1, 2, 7, 127, 129, 1000])
def test_vocabulary_off_every_tile(vocab_size: int, impl: str, device: str) -> None:
    """V#2656, V#2899: a tail read as logit 0 beats real logits of -60: log-prob +123."""
    logits = torch.randn(2, vocab_size, device=device) - 60
    logits.requires_grad_()
    labels = torch.tensor([0, vocab_size - 1], device=device)
    upstream = torch.tensor([1.0, -2.0], device=device)
    loss = onepass.cross_entropy(logits, labels, reduction="none", impl=impl)
    (gradient,) = grads(loss, logits, upstream=upstream)
    expected = F.cross_entropy(logits.detach().double(), labels, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    assert_gradient(gradient, logits, labels, upstream)


def test_16_bit_logits_give_fp32_losses(impl: str, device: str) -> None:
    """open-instruct#1387, prime-rl#2441: policy ratios need log-probs that bf16 cannot hold."""
    logits = (3 * torch.randn(2, 60, device=device)).to(torch.bfloat16)
    labels = torch.tensor([5, 59], device=device)
    for loss in (
        onepass.cross_entropy(logits, labels, reduction="none", impl=impl),
        onepass.masked_cross_entropy(logits, labels, reduction="none", impl=impl),
    ):
        expected = F.cross_entropy(logits.double(), labels, reduction="none")
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------- B. reduction, scaling, plumbing


UPSTREAMS: dict[str, Callable[[str], Tensor]] = {
    "random": lambda device: torch.randn(4, device=device),
    "one-hot": lambda device: torch.tensor([0.0, 0.0, 1.0, 0.0], device=device),
    "zeros": lambda device: torch.zeros(4, device=device),
    "huge": lambda device: torch.full((4,), 2.0**40, device=device),
    "tiny": lambda device: torch.full((4,), 2.0**-40, device=device),
    # stride 0, as .sum() hands it back: read past its one element by ROCm/TransformerEngine#336
    "expanded": lambda device: torch.tensor(3.0, device=device).expand(4),
    "strided": lambda device: torch.tensor([2.0, NAN, -1.0, NAN, 0.5, NAN, 4.0, NAN])[::2].to(
        device
    ),
    "row-of-a-matrix": lambda device: torch.randn(4, 3, device=device)[:, 1],
}


@pytest.mark.parametrize("kind", UPSTREAMS)
def test_unreduced_gradient_follows_its_upstream(kind: str, impl: str, device: str) -> None:
    """L#678, L#968, L#1298: wrong or zero gradients of reduction="none"; TE#2139: taken for 1."""
    logits = torch.randn(4, 9, device=device, requires_grad=True)
    labels = torch.tensor([0, 8, 3, -100], device=device)
    upstream = UPSTREAMS[kind](device)
    loss = onepass.cross_entropy(logits, labels, reduction="none", impl=impl)
    (gradient,) = grads(loss, logits, upstream=upstream)
    assert_gradient(gradient, logits, labels, upstream)
    assert bool(gradient.any()) == (kind != "zeros")


@pytest.mark.parametrize("kind", ["one-hot", "expanded", "strided"])
def test_upstream_of_hidden_losses_and_probabilities(kind: str, impl: str, device: str) -> None:
    """The same for the other two ops: each row's gradient is its own upstream's multiple."""
    upstream = UPSTREAMS[kind](device)
    x, target = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    for loss in (
        lambda x: onepass.masked_inner_product(x, target, reduction="none", impl=impl),
        lambda x: onepass.masked_cross_entropy(x, target.softmax(-1), reduction="none", impl=impl),
    ):
        leaf = x.clone().requires_grad_()
        rows = loss(leaf)
        (ones,) = grads(rows, leaf, upstream=torch.ones(4, device=device))
        (gradient,) = grads(rows, leaf, upstream=upstream)
        torch.testing.assert_close(gradient, ones * upstream.unsqueeze(-1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("factor", [1024.0, 2.0**-10, -1.0])
def test_scaled_loss_scales_its_gradient_exactly(factor: float, impl: str, device: str) -> None:
    """TE#2139: powers of two change no digit, so every bit of the gradient must follow."""
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    loss = onepass.cross_entropy(logits, torch.tensor([1, 8], device=device), impl=impl)
    assert torch.equal(grads(factor * loss, logits)[0], factor * grads(loss, logits)[0])


def test_loss_is_not_zero_and_trains(impl: str, device: str) -> None:
    """L#507: zero loss, no gradient. The logits are no leaf, as behind a real head."""
    head = nn.Linear(6, 11).to(device)
    loss = onepass.cross_entropy(
        head(torch.randn(3, 6, device=device)), torch.tensor([1, 2, -100], device=device), impl=impl
    )
    loss.backward()
    assert loss.item() > 0.1
    assert all(p.grad is not None and bool(p.grad.any()) for p in head.parameters())


LABEL_SLICES: dict[str, Callable[[Tensor], Tensor]] = {
    "shifted": lambda labels: torch.cat([labels.new_zeros(2, 1), labels], 1)[:, 1:],
    "transposed": lambda labels: labels.t().contiguous().t(),
    "every-other": lambda labels: torch.stack([labels, labels * 0 + 77], -1)[..., 0],
    "expanded": lambda labels: labels[:1, :1].expand(2, 3),
    # 8 bytes past a 16-byte address, where flash-attention's 128-bit loads of labels fault
    "misaligned": lambda labels: torch.cat([labels.new_zeros(1), labels.flatten()])[1:].view(2, 3),
}


@pytest.mark.parametrize("kind", LABEL_SLICES)
def test_labels_cut_out_of_a_batch(kind: str, impl: str, device: str) -> None:
    """TE#2402, TE#2734 and flash-attention: labels[:, 1:] is what every causal model passes."""
    logits = torch.randn(2, 4, 9, device=device)[:, :-1]
    labels = torch.tensor([[0, 8, -100], [3, 3, 1]], device=device)
    cut = LABEL_SLICES[kind](labels)
    if kind == "misaligned":
        assert cut.data_ptr() % 16 == 8
    plain = cut.clone(memory_format=torch.contiguous_format)
    expected = onepass.masked_cross_entropy(logits, plain, impl=impl)
    assert torch.equal(onepass.masked_cross_entropy(logits, cut, impl=impl), expected)
    truth = F.cross_entropy(logits.double().transpose(1, 2), cut)
    torch.testing.assert_close(expected.double(), truth, rtol=1e-6, atol=1e-6)


def test_z_loss_does_not_leak_into_the_reported_loss(impl: str, device: str) -> None:
    """allenai/OLMo-core#702: the cross-entropy in the log was the sum of both.

    One pass gives both terms, the logged one untouched, and their sum is the z_loss option.
    """
    logits = (2 * torch.randn(3, 40, device=device)).requires_grad_()
    labels, weight = torch.tensor([0, 39, -100], device=device), 1e-2
    facts = onepass.vocab_stats(logits, labels, want=("logp", "lse"), impl=impl)
    reported = -facts.logp.sum() / 2
    penalty = weight * facts.lse.square().sum() / 2
    plain = onepass.masked_cross_entropy(logits, labels, impl=impl)
    both = onepass.masked_cross_entropy(logits, labels, z_loss=weight, impl=impl)
    assert torch.equal(reported, plain)
    assert penalty.item() > 0.01
    torch.testing.assert_close(both, plain + penalty, rtol=1e-6, atol=1e-6)
    (summed,) = grads(both, logits)
    (apart,) = grads(reported + penalty, logits)
    torch.testing.assert_close(summed, apart, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- C. all rows masked


@pytest.mark.parametrize("loss", ["cross_entropy", "masked_cross_entropy", "l2", "inner_product"])
def test_step_on_a_batch_without_labels_keeps_the_weights(
    loss: str, impl: str, device: str
) -> None:
    """M#1764, M#1765: one rank's empty share gives NaN gradients, and Adam never recovers."""
    torch.manual_seed(5)
    head = nn.Linear(6, 11).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.1, weight_decay=0.0)
    before = [p.detach().clone() for p in head.parameters()]
    out = head(torch.randn(2, 6, device=device))
    ignored = torch.full((2,), -100, device=device)
    value = {
        "cross_entropy": lambda: onepass.cross_entropy(out, ignored, impl=impl),
        "masked_cross_entropy": lambda: onepass.masked_cross_entropy(
            out, ignored, z_loss=1e-3, label_smoothing=0.1, impl=impl
        ),
        "l2": lambda: onepass.masked_normalized_l2(out, out.detach(), ignored > 0, impl=impl),
        "inner_product": lambda: onepass.masked_inner_product(
            out, out.detach(), ignored > 0, impl=impl
        ),
    }[loss]()
    value.backward()
    assert value.item() == 0.0
    norm = nn.utils.clip_grad_norm_(head.parameters(), 1.0, error_if_nonfinite=True)
    assert norm.item() == 0.0
    optimizer.step()
    for parameter, old in zip(head.parameters(), before, strict=True):
        assert torch.equal(parameter, old)


@pytest.mark.parametrize("poison", [NAN, torch.inf, -torch.inf], ids=str)
def test_masked_logits_never_leak(poison: float, impl: str, device: str) -> None:
    """Through torch eager NaN leaks in 4,856 of 100,000 drawn cases: 0 * NaN is NaN."""
    logits = torch.randn(3, 9, device=device)
    logits[1] = poison
    logits.requires_grad_()
    labels = torch.tensor([0, 4, 8], device=device)
    weights = torch.tensor([1.0, 0.0, 0.5], device=device)
    loss = onepass.masked_cross_entropy(
        logits, labels, weights, z_loss=1e-3, label_smoothing=0.1, impl=impl
    )
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite() and logits.grad.isfinite().all() and not logits.grad[1].any()


def test_ignored_rows_do_not_borrow_label_0(impl: str, device: str) -> None:
    """torch's chunked op recomputes ignored rows with label 0: a banned token 0 makes them NaN."""
    logits = torch.randn(3, 9, device=device)
    logits[:, 0] = -torch.inf
    logits.requires_grad_()
    loss = onepass.cross_entropy(logits, torch.tensor([-100, 5, -100], device=device), impl=impl)
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite() and logits.grad.isfinite().all()


# ---------------------------------------------------------------- D., I. launches


@dataclass
class Launch:
    """What a kernel was asked to do: its grid in three dimensions, and the widths of its tiles."""

    kernel: str
    grid: tuple[int, int, int]
    meta: dict[str, Any]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of every kernel, none of which runs: what they would fill stays as it is."""
    pytest.importorskip("triton", reason=NO_TRITON or "Triton is not installed")
    from onepass.kernels import gaussian as gaussian_kernels
    from onepass.kernels import row_moments as moments_kernels
    from onepass.kernels import vocab_pair_stats as pair_kernels
    from onepass.kernels import vocab_stats as stats_kernels

    seen: list[Launch] = []

    class Recorder:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            x, y, z = (*grid, 1, 1)[:3]
            return lambda *args, **meta: seen.append(Launch(self.name, (x, y, z), meta))

    for module in (stats_kernels, pair_kernels, moments_kernels, gaussian_kernels):
        for name in list(vars(module)):
            if name.startswith(("vocab_", "row_", "gaussian_", "cloak_")) and name.endswith(
                "_kernel"
            ):
                monkeypatch.setattr(module, name, Recorder(name))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that CPU tensors may go there
    return seen


@pytest.mark.parametrize("rows", [1, 8])
def test_few_long_rows_occupy_the_gpu(rows: int, launches: list[Launch]) -> None:
    """C#15, L#1454: one program a row leaves 131 of 132 multiprocessors idle while generating."""
    logits = torch.zeros(rows, 128_256, requires_grad=True)
    labels = torch.zeros(rows, dtype=torch.int64)
    onepass.cross_entropy(logits, labels, impl="triton").backward()
    onepass.cross_entropy(logits, logits.detach(), impl="triton").backward()
    reading = [launch for launch in launches if "merge" not in launch.kernel]
    assert {launch.kernel for launch in reading} == {
        "vocab_stats_kernel",
        "vocab_stats_backward_kernel",
        "vocab_pair_stats_kernel",
        "vocab_pair_stats_backward_kernel",
    }
    for launch in reading:
        assert math.prod(launch.grid) >= 7 * rows, launch.kernel


MANY = 70_000
MANY_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "labels": lambda x: onepass.cross_entropy(x, x[:, 0].long(), impl="triton"),
    "probabilities": lambda x: onepass.masked_cross_entropy(x, x.detach(), impl="triton"),
    "hidden": lambda x: onepass.masked_normalized_l2(x, x.detach(), impl="triton"),
    "gaussian": lambda x: onepass.gaussian_stats(
        x, x, x.detach() + 1, impl="triton"
    ).mahalanobis.sum(),
    "cloak": lambda x: onepass.cloak(x, x, x, impl="triton").sum(),
    "shared-by-two": lambda x: onepass.vocab_pair_stats(
        x.view(2, -1, 2), x.detach()[: MANY // 2], want="jsd", impl="triton"
    ).jsd.sum(),
    # one distribution over the labels that the whole batch shares
    "shared-by-all": lambda x: onepass.vocab_pair_stats(
        x, x.detach()[0], want="kl", impl="triton"
    ).kl.sum(),
}


@pytest.mark.parametrize("name", MANY_ROWS)
def test_many_rows_fit_into_a_launch(name: str, launches: list[Launch]) -> None:
    """L#1294: the second and third dimension of a grid end at 65,535, and sequences do not.

    A tile that grows with the rows ends at Triton's 2^20 elements.
    """
    x = torch.zeros(MANY, 2, requires_grad=True)
    MANY_ROWS[name](x).backward()
    assert any("backward" in launch.kernel for launch in launches)
    for launch in launches:
        assert launch.grid[0] <= 2**31 - 1, launch.kernel
        assert max(launch.grid[1:]) <= 65_535, launch.kernel
        assert launch.meta.get("PAIRS", 1) * launch.meta.get("BLOCK", 1) <= 2**20, launch.kernel


# ---------------------------------------------------------------- E. memory


def peak_bytes(call: Callable[[], object], device: str, tmp_path: Path) -> int:
    """What `call` holds at most beyond what there was."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    trace = tmp_path / "trace.json"
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    steps = sorted(
        (event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"
    )
    held = peak = 0
    for _, step in steps:
        held += step
        peak = max(peak, held)
    return peak


def test_no_second_copy_of_the_logits(device: str, tmp_path: Path) -> None:
    """L#1439, unsloth-zoo#947: an fp32 copy of bf16 logits is four times the gradient's share.

    Forward and backward hold the gradient and a working set that does not grow with the rows.
    """
    logits = torch.randn(512, 8000, device=device).to(torch.bfloat16).requires_grad_()
    labels = torch.randint(0, 8000, (512,), device=device)
    onepass.cross_entropy(logits[:1], labels[:1]).backward()  # code and caches load once
    logits.grad = None
    gradient = logits.numel() * logits.element_size()
    peak = peak_bytes(lambda: onepass.cross_entropy(logits, labels).backward(), device, tmp_path)
    assert gradient <= peak <= gradient + (8 << 20)


# ---------------------------------------------------------------- F. torch.compile


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda z, y, m, x: onepass.cross_entropy(z, y),
    "masked_cross_entropy": lambda z, y, m, x: onepass.masked_cross_entropy(
        z, y, m, max_loss=50.0, ce_scaling_factor=0.01, z_loss=1e-3, cap_scope="token"
    ),
    "masked_cross_entropy-soft": lambda z, y, m, x: onepass.masked_cross_entropy(
        z, x.softmax(-1), m
    ),
    "masked_normalized_l2": lambda z, y, m, x: onepass.masked_normalized_l2(z, x, m),
    "masked_inner_product": lambda z, y, m, x: onepass.masked_inner_product(z, x, m, relu=True),
    "masked_mean": lambda z, y, m, x: onepass.masked_mean(z.square().sum(-1), m),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=["bool", "float"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_with_ignored_labels(name: str, mask_dtype: torch.dtype, device: str) -> None:
    """L#1338: with ignored labels the compiled loss was 21.40 and the eager one 61.73, silently."""
    logits, other = torch.randn(6, 9, device=device), torch.randn(6, 9, device=device)
    labels = torch.tensor([-100, 8, -100, 3, -100, -100], device=device)
    mask = torch.tensor([1, 1, 1, 0, 1, 1], device=device).to(mask_dtype)

    def step(z: Tensor) -> Tensor:
        return COMPILED[name](z, labels, mask, other)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        z = logits.clone().requires_grad_()
        loss = function(z)
        loss.backward()
        assert z.grad is not None
        results.append((loss.detach(), z.grad))
    (eager, eager_grad), (compiled, compiled_grad) = results
    assert eager.item() > 0
    assert torch.equal(eager, compiled)
    assert torch.equal(eager_grad, compiled_grad)


# ---------------------------------------------------------------- G. devices, host synchronisation


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_launches_on_the_device_of_its_tensors(device: str) -> None:
    """L#401, L#593, unsloth-zoo#395: Triton launches on the current device, here the wrong one."""
    second = f"{device}:1"
    labels = torch.tensor([0, 4], device=second)
    logits = torch.randn(2, 5, device=second, requires_grad=True)
    with torch.cuda.device(0):
        loss = onepass.cross_entropy(logits, labels)
        loss.backward()
    assert loss.device == logits.device
    expected = F.cross_entropy(logits.detach().double(), labels)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-6, atol=1e-6)


def every_loss(device: str) -> dict[str, Callable[[], Tensor]]:
    """One step of each public loss on tensors of its own, for the GPU's rules."""
    z = torch.randn(8, 50, device=device, requires_grad=True)
    x = torch.randn(8, 50, device=device)
    y = torch.randint(0, 50, (8,), device=device)
    y[3] = -100
    m = torch.rand(8, device=device)
    w = torch.rand(50, device=device)
    n = torch.tensor(7, device=device)
    return {
        "cross_entropy": lambda: onepass.cross_entropy(z, y, w, label_smoothing=0.1),
        "probabilities": lambda: onepass.cross_entropy(z, x.softmax(-1), w),
        "masked": lambda: onepass.masked_cross_entropy(z, y, m, max_loss=4.0, num_items=n),
        "l2": lambda: onepass.masked_normalized_l2(z, x, m),
        "inner_product": lambda: onepass.masked_inner_product(z, x, m),
        "mean": lambda: onepass.masked_mean(z.sum(-1), m),
    }


LOSSES = list(every_loss("cpu"))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("name", LOSSES)
def test_no_wait_for_the_gpu(name: str, device: str) -> None:
    """L#1292: an .item() on the way stalls the queue in every step."""
    if device != "cuda":
        pytest.skip("the interpreter was asked for: kernels run on the CPU")
    loss = every_loss(device)[name]
    loss().backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has no graphs to capture")
# The leaf's node of autograd remembers the stream of the warm-up, torch's own recipe for a capture.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_captured_graph_follows_its_labels(device: str) -> None:
    """tritonbench#477: a replay has to see labels, and ignored ones, that changed meanwhile."""
    if device != "cuda":
        pytest.skip("the interpreter was asked for: kernels run on the CPU")
    logits = torch.randn(6, 300, device=device, requires_grad=True)
    labels = torch.randint(0, 300, (6,), device=device)

    def step() -> tuple[Tensor, Tensor]:
        loss = onepass.cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
        return loss, gradient

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradient = step()
    for ignored in (0, 3, 6):
        labels.copy_(torch.randint(0, 300, (6,)))
        labels[:ignored] = -100
        graph.replay()
        expected, expected_gradient = step()
        assert torch.equal(loss, expected)
        assert torch.equal(gradient, expected_gradient)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has one kind of memory")
@pytest.mark.parametrize("name", ["masked", "l2", "inner_product", "mean"])
def test_mask_from_the_tokenizer_lies_on_the_cpu(name: str, device: str) -> None:
    """No loss moves a mask behind its caller's back, which would wait for the device: each says
    where it is, ahead of torch's own long message."""
    x, target = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device)
    labels = torch.tensor([0, 8, 2, -100], device=device)
    call = {
        "masked": lambda m: onepass.masked_cross_entropy(x, labels, m),
        "l2": lambda m: onepass.masked_normalized_l2(x, target, m),
        "inner_product": lambda m: onepass.masked_inner_product(x, target, m),
        "mean": lambda m: onepass.masked_mean(x[:, 0], m),
    }[name]
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    call(mask.to(device))
    with pytest.raises(ValueError, match=f"^mask is on cpu, .* on {device}:0: move one of them$"):
        call(mask)


# ---------------------------------------------------------------- J. in-place, aliasing, repeats


def calls_of_every_loss(impl: str) -> dict[str, tuple[Callable[..., Tensor], list[str]]]:
    """Each loss of tensors drawn by name."""
    return {
        "cross_entropy": (
            lambda z, y, w: onepass.cross_entropy(z, y, w, label_smoothing=0.1, impl=impl),
            ["logits", "labels", "class_weights"],
        ),
        "probabilities": (
            lambda z, q: onepass.cross_entropy(z, q, impl=impl),
            ["logits", "probabilities"],
        ),
        "masked_cross_entropy": (
            lambda z, y, m: onepass.masked_cross_entropy(
                z, y, m, ignore_index=2, max_loss=4.0, z_loss=1e-3, impl=impl
            ),
            ["logits", "labels", "weights"],
        ),
        "masked_normalized_l2": (
            lambda x, t, m: onepass.masked_normalized_l2(x, t, m, impl=impl),
            ["logits", "other", "weights"],
        ),
        "masked_inner_product": (
            lambda x, t, m: onepass.masked_inner_product(x, t, m, impl=impl),
            ["logits", "other", "weights"],
        ),
    }


def drawn(device: str) -> dict[str, Tensor]:
    return {
        "logits": torch.randn(3, 9, device=device),
        "labels": torch.tensor([8, 2, 5], device=device),
        "probabilities": torch.randn(3, 9, device=device).softmax(-1),
        "other": torch.randn(3, 9, device=device),
        "weights": torch.tensor([0.5, 0.0, 2.0], device=device),
        "class_weights": torch.rand(9, device=device),
    }


EVERY = list(calls_of_every_loss("torch"))


@pytest.mark.parametrize("name", EVERY)
def test_backward_twice_and_nothing_is_touched(name: str, impl: str, device: str) -> None:
    """Liger multiplies its stored gradient anew in each backward, quack too; unsloth#5002 writes
    the gradient over logits that others still read.

    Here: inputs keep their bits and version, a gradient that its owner overwrites is not the next
    one's memory, and the same call again gives the same bits (P#71367).
    """
    loss, names = calls_of_every_loss(impl)[name]
    tensors = {key: drawn(device)[key] for key in names}
    tensors["logits"].requires_grad_()
    before = {key: (tensor.detach().clone(), tensor._version) for key, tensor in tensors.items()}
    value = loss(*tensors.values())
    (first,) = grads(value, tensors["logits"])
    kept = first.clone()
    first.fill_(NAN)
    (second,) = grads(value, tensors["logits"])
    assert torch.equal(second, kept) and bool(kept.any())
    for key, tensor in tensors.items():
        assert torch.equal(tensor, before[key][0]), f"{key} was written"
        assert tensor._version == before[key][1], f"{key} was written"
    again = loss(*tensors.values())
    assert torch.equal(again, value)
    assert torch.equal(grads(again, tensors["logits"])[0], kept)


def test_logits_used_elsewhere_get_both_gradients(impl: str, device: str) -> None:
    """unsloth#5002: an auxiliary term on the same logits."""
    logits = torch.randn(2, 9, device=device, requires_grad=True)
    labels = torch.tensor([3, -100], device=device)
    loss = onepass.cross_entropy(logits, labels, impl=impl)
    (alone,) = grads(loss, logits)
    penalty = logits.square().sum()
    (loss + penalty).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, alone + 2 * logits.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", EVERY)
def test_overwritten_logits_are_noticed(name: str, device: str) -> None:
    """What autograd saved and someone changed gives an error, not a wrong gradient."""
    loss, names = calls_of_every_loss("torch")[name]
    tensors = [drawn(device)[key] for key in names]
    leaf = tensors[0].requires_grad_()
    tensors[0] = leaf * 1
    value = loss(*tensors)
    tensors[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("name", EVERY)
def test_each_input_alone_gets_its_gradient(name: str, impl: str, device: str) -> None:
    """T#6625: a branch that only one output or one side needs is not forgotten."""
    loss, names = calls_of_every_loss(impl)[name]
    differentiable = [key for key in names if key in ("logits", "other", "probabilities")]
    together = drawn(device)
    leaves = [together[key].requires_grad_() for key in differentiable]
    expected = grads(loss(*(together[key] for key in names)), *leaves)
    for key, gradient in zip(differentiable, expected, strict=True):
        tensors = {k: t.detach() for k, t in together.items()}
        tensors[key] = tensors[key].clone().requires_grad_()
        (alone,) = grads(loss(*(tensors[k] for k in names)), tensors[key])
        assert torch.equal(alone, gradient)


# ---------------------------------------------------------------- which implementation runs


def ran(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> str:
    """ "triton" or "torch": where the forward pass went."""
    seen: list[str] = []
    for module in (vocab_stats, vocab_pair_stats, row_moments, gaussian):
        for kind in ("torch", "triton"):
            name = f"_forward_{kind}"
            original = getattr(module, name)

            def watched(*args: Any, kind: str = kind, original: Any = original) -> Any:
                seen.append(kind)
                return original(*args)

            monkeypatch.setattr(module, name, watched)
    call()
    assert len(set(seen)) == 1
    return seen[0]


SMALL = torch.tensor([[0.0, 1.0, 2.0]])
CALLS: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda z, **more: onepass.cross_entropy(z, z[:, 0].long(), **more),
    "probabilities": lambda z, **more: onepass.cross_entropy(z, z.softmax(-1), **more),
    "masked_cross_entropy": lambda z, **more: onepass.masked_cross_entropy(
        z, z[:, 0].long(), **more
    ),
    "masked_normalized_l2": lambda z, **more: onepass.masked_normalized_l2(z, z + 1, **more),
    "masked_inner_product": lambda z, **more: onepass.masked_inner_product(z, z + 1, **more),
    "gaussian_stats": lambda z, **more: onepass.gaussian_stats(z, z, z + 1, **more).mahalanobis,
}


@pytest.mark.parametrize("name", CALLS)
def test_environment_sets_the_default(
    name: str, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONEPASS_IMPL moves every loss, an argument wins over it, and a typo is an error."""
    z = SMALL.to(device)
    monkeypatch.setenv("ONEPASS_IMPL", impl)
    with monkeypatch.context() as patch:
        assert ran(patch, lambda: CALLS[name](z)) == impl
    if impl == "triton":
        with monkeypatch.context() as patch:
            assert ran(patch, lambda: CALLS[name](z, impl="torch")) == "torch"
        # a preference: where Triton cannot serve, torch does
        with monkeypatch.context() as patch:
            assert ran(patch, lambda: CALLS[name](z.double())) == "torch"
    monkeypatch.setenv("ONEPASS_IMPL", "cuda")
    with pytest.raises(ValueError, match=r"ONEPASS_IMPL must be one of auto, triton, torch: got"):
        CALLS[name](z)


@pytest.mark.parametrize("yes", ["1", "true", "on", "yes", "y"])
def test_every_way_to_ask_for_the_interpreter(yes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton reads all of these as yes, so its kernels do run then."""
    pytest.importorskip("triton", reason=NO_TRITON or "Triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", yes)
    assert _launch.choose("triton", SMALL)


QUESTIONS = """
import importlib, json, sys
import torch
import onepass
from onepass.ops import _launch

z = torch.tensor([[0.0, 1.0, 2.0]])
y = torch.tensor([2])
answers = {}

def ask(name, **options):
    call = {
        "hidden": lambda: onepass.masked_normalized_l2(z, z + 1, **options),
        "soft": lambda: onepass.cross_entropy(z, z.softmax(-1), **options),
        "double": lambda: onepass.cross_entropy(z.double(), y, **options),
    }.get(name.split("-")[0], lambda: onepass.cross_entropy(z, y, **options))
    try:
        answers[name] = [call().item(), ""]
    except Exception as error:
        answers[name] = [None, f"{type(error).__name__}: {error}"]

for name in ("labels", "hidden", "soft", "double"):
    ask(name, impl="triton")
    ask(name + "-auto")
sys.modules["triton"] = None  # what an import of a package that is not there leaves behind
found = importlib.reload(_launch).HAS_TRITON  # as a fresh process would see it
assert not found
for module in list(sys.modules.values()):
    if getattr(module, "__name__", "").startswith("onepass.ops.") and hasattr(module, "choose"):
        module.choose = _launch.choose
ask("labels-without", impl="triton")
ask("double-without", impl="triton")
ask("labels-auto-without")
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, list[Any]]:
    """What the losses say on the CPU of a process in which nobody asked for the interpreter."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("TRITON_INTERPRET", "ONEPASS_IMPL", "ONEPASS_STRICT")
    }
    environment["ONEPASS_IMPL"] = "triton"  # only a wish: "auto" still serves CPU tensors
    environment["PYTHONPATH"] = str(ROOT / "python")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", QUESTIONS],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    answers: dict[str, list[Any]] = json.loads(done.stdout)
    return answers


@pytest.mark.parametrize("name", ["labels", "hidden", "soft", "double", "double-without"])
def test_triton_on_a_cpu_says_why_not(name: str, answers: dict[str, list[Any]]) -> None:
    """Triton's own answer is "0 active drivers ([]). There should only be one." """
    value, message = answers[name]
    assert value is None
    assert message.startswith("ValueError: impl='triton' cannot serve this call: ")
    assert "\n" not in message and "active drivers" not in message
    assert "tensors are on cpu" in message and "TRITON_INTERPRET=1" in message
    assert ("float64 is served by the torch path only" in message) == name.startswith("double")
    if name.endswith("-without"):
        assert "triton is not installed" in message, "every reason in one sentence"


@pytest.mark.parametrize(
    "name", ["labels-auto", "hidden-auto", "soft-auto", "double-auto", "labels-auto-without"]
)
def test_auto_serves_a_cpu(name: str, answers: dict[str, list[Any]]) -> None:
    """With Triton wished for and not possible, and without Triton at all."""
    value, message = answers[name]
    assert message == ""
    z = SMALL.double()
    expected = {
        "hidden": 1 / 14**0.5 * 3**0.5,
        "soft": F.cross_entropy(z, z.softmax(-1)).item(),
    }.get(name.split("-")[0], F.cross_entropy(z, torch.tensor([2])).item())
    if name == "hidden-auto":
        expected = onepass.masked_normalized_l2(SMALL, SMALL + 1, impl="torch").item()
    assert value == pytest.approx(expected, rel=1e-6)


# ---------------------------------------------------------------- ONEPASS_STRICT


def test_values_are_checked_where_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU always; on a device, where a look costs a wait, only if the user asks for it."""
    elsewhere = torch.empty(1, device="meta")
    for value, looked_at in ((None, False), ("0", False), ("1", True)):
        if value is None:
            monkeypatch.delenv("ONEPASS_STRICT", raising=False)
        else:
            monkeypatch.setenv("ONEPASS_STRICT", value)
        assert _check.values_checked(elsewhere) is looked_at
        assert _check.values_checked(SMALL)


@pytest.mark.parametrize("label", [5, 2**31, -1, -(2**40), -100])
def test_wrong_label_on_a_device(
    label: int, impl: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P#117532: an illegal access some steps later. Here NaN in that row alone; checked: an error.

    -100 is such a label too while another one is ignored: its row must not drop out in silence.
    On the CPU the check is put out of the way, to see what the kernels themselves do.
    """
    logits = torch.randn(3, 5, device=device, requires_grad=True)
    labels = torch.tensor([1, label, 4], device=device)
    if device != "cpu":
        monkeypatch.setenv("ONEPASS_STRICT", "1")
    with pytest.raises(IndexError):
        onepass.cross_entropy(logits, labels, ignore_index=1000, impl=impl)
    if impl == "torch":
        return  # its gather checks the range on either device
    monkeypatch.delenv("ONEPASS_STRICT", raising=False)
    for name, module in list(sys.modules.items()):
        if name.startswith("onepass.") and hasattr(module, "values_checked"):
            monkeypatch.setattr(module, "values_checked", lambda tensor: False)
    rows = onepass.cross_entropy(logits, labels, ignore_index=1000, reduction="none", impl=impl)
    assert rows.isnan().tolist() == [False, True, False]
    (gradient,) = grads(rows[[0, 2]].sum(), logits)
    assert gradient[[0, 2]].isfinite().all()
