"""Rows that lie on several processes: global_mean, count_items, shift_labels, and that a rank
without any row that counts has a live zero from every loss.

What the processes do stands in support/parallel_on_ranks.py; they start once for all cases.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import circuit_breaker, dpo, jigsaw
from onepass.compat import cce, liger
from onepass.jigsaw import input_losses
from support.processes import run_processes

ROOT = Path(__file__).resolve().parents[1]
V, D, B, S = 11, 8, 2, 3
HAS_GLOO = torch.distributed.is_available() and torch.distributed.is_gloo_available()
HAS_MODELS = all(importlib.util.find_spec(name) for name in ("transformers", "accelerate"))

# ---------------------------------------------------------------- several processes

OF_ROWS = ("means", "counts", "losses", "groups", "refused")
OF_MODELS = ("ddp", "fsdp2", "context_parallel", "trainer")
CASES = {2: (*OF_ROWS, *OF_MODELS), 4: (*OF_ROWS, "context_parallel")}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """A folder with a file for each case and rank of so many processes: what was raised there."""
    folders: dict[int, Path] = {}

    def of(n: int) -> Path:
        if n not in folders:
            folders[n] = tmp_path_factory.mktemp(f"of_{n}")
            run = [case for case in CASES[n] if HAS_MODELS or case in OF_ROWS]
            run_processes(n, "parallel_on_ranks", folders[n], " ".join(run), str(folders[n]))
        return folders[n]

    return of


@pytest.mark.skipif(not HAS_GLOO, reason="this torch was built without gloo")
@pytest.mark.parametrize(("n", "case"), [(n, case) for n, cases in CASES.items() for case in cases])
def test_processes(n: int, case: str, answers: Callable[[int], Path]) -> None:
    if case in OF_MODELS and not HAS_MODELS:
        pytest.skip("models and Trainer are those of transformers, over accelerate")
    for rank in range(n):
        assert (answers(n) / f"{case}.{rank}").read_text("utf-8") == ""


# ---------------------------------------------------------------- one process


@pytest.mark.parametrize(
    "mask", [None, [True, False, True], [1, 0, 2], [0.5, 0.0, 0.25], [0, 0, 0]]
)
def test_alone_it_is_the_mean(mask: Any, device: str) -> None:
    rows = torch.tensor([1.0, torch.nan if mask else 2.0, 4.0], device=device, requires_grad=True)
    weights = None if mask is None else torch.tensor(mask, device=device)
    for gradients in ("averaged", "summed"):
        for items in (None, 5, torch.tensor(5)):
            wanted = onepass.reduce_rows(rows, weights, num_items=items)
            got = onepass.global_mean(rows, weights, num_items=items, gradients=gradients)
            torch.testing.assert_close(got, wanted)
            grads = [torch.autograd.grad(loss, rows)[0] for loss in (got, wanted)]
            torch.testing.assert_close(*grads)


def test_twice_differentiable() -> None:
    mask = torch.tensor([1.0, 0.0, 2.0, 0.5])

    def loss(rows: Tensor) -> Tensor:
        return onepass.global_mean(rows.square(), mask).square()

    rows = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(loss, rows) and torch.autograd.gradgradcheck(loss, rows)


def test_narrow_rows_are_summed_wide(device: str) -> None:
    rows = torch.full((5000,), 1.0, dtype=torch.bfloat16, device=device)
    mean = onepass.global_mean(rows, rows > 0)
    assert mean.dtype == torch.float32 and float(mean) == 1.0
    assert int(onepass.count_items(mask=rows > 0)) == 5000


def test_counts_are_the_divisor_of_the_mean(device: str) -> None:
    labels = torch.tensor([[1, -100, 0], [-100, 2, 3]], device=device)
    for mask in (None, labels == 2, (labels == 2).int() * 4, torch.rand(2, 3, device=device)):
        logits = torch.randn(2, 3, V, device=device)
        wanted = onepass.masked_cross_entropy(logits, labels, mask)
        items = onepass.count_items(labels, mask).clamp_min(1)
        got = onepass.masked_cross_entropy(logits, labels, mask, num_items=items)
        torch.testing.assert_close(got, wanted)
        rows = onepass.masked_cross_entropy(
            logits, labels, None if mask is None else mask != 0, reduction="none"
        )
        kept = labels != -100 if mask is None else torch.where(labels != -100, mask, 0)
        torch.testing.assert_close(onepass.global_mean(rows, kept), wanted)


def test_labels_are_shifted_as_transformers_does() -> None:
    labels = torch.tensor([[5, 6, -100, 8], [1, 2, 3, 4]])
    shifted = onepass.shift_labels(labels)
    assert shifted.tolist() == [[6, -100, 8, -100], [2, 3, 4, -100]]
    # The number that transformers' Trainer divides by.
    assert int(onepass.count_items(shifted)) == int((labels[:, 1:] != -100).sum())
    assert onepass.shift_labels(labels, ignore_index=0)[:, -1].tolist() == [0, 0]
    assert onepass.shift_labels(labels[:, :0]).shape == (2, 0)
    assert onepass.shift_labels(labels[:, :1]).tolist() == [[-100], [-100]]
    halves = torch.stack([shifted[:, :2], shifted[:, 2:]])
    assert halves[0, 0].tolist() == [6, -100] and halves[0, 1].tolist() == [2, 3]


ROWS = torch.ones(3)
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "mask-shape": (
        lambda: onepass.global_mean(ROWS, torch.ones(2)),
        ValueError,
        "mask must have the shape of its rows, (3,): got (2,)",
    ),
    "mask-nan": (lambda: onepass.global_mean(ROWS, ROWS / 0 * 0), ValueError, "mask holds NaN"),
    "mask-graph": (
        lambda: onepass.global_mean(ROWS, ROWS.clone().requires_grad_()),
        ValueError,
        "mask is not differentiated: got one",
    ),
    "rows-complex": (
        lambda: onepass.global_mean(ROWS.to(torch.complex64)),
        ValueError,
        "rows must be float32, bfloat16, float16 or float64: got torch.complex64",
    ),
    "rows-list": (lambda: onepass.global_mean([1.0]), TypeError, "got list"),  # type: ignore[arg-type]
    "gradients": (
        lambda: onepass.global_mean(ROWS, gradients="mean"),
        ValueError,
        "gradients must be one of averaged, summed: got 'mean'",
    ),
    "num_items": (
        lambda: onepass.global_mean(ROWS, num_items=torch.ones(2)),
        ValueError,
        "num_items must be one number: got shape (2,)",
    ),
    "group": (
        lambda: onepass.global_mean(ROWS, None, "cp"),  # type: ignore[arg-type]
        ValueError,
        "process_group needs torch.distributed set up: got str",
    ),
    "nothing": (lambda: onepass.count_items(), TypeError, "count_items needs labels or a mask"),
    "labels-mask": (
        lambda: onepass.count_items(ROWS > 0),
        ValueError,
        "labels must hold integers: got torch.bool; a mask goes to mask=",
    ),
    "labels-shape": (
        lambda: onepass.count_items(ROWS.long(), ROWS[:2]),
        ValueError,
        "mask must have the shape of its rows, (3,): got (2,)",
    ),
    "count-list": (lambda: onepass.count_items([1]), TypeError, "got list"),  # type: ignore[arg-type]
    "mask-list": (lambda: onepass.count_items(None, [1]), TypeError, "got list"),  # type: ignore[arg-type]
    "mask-complex": (
        lambda: onepass.count_items(mask=ROWS.to(torch.complex64)),
        ValueError,
        "mask must be bool, integer or floating: got torch.complex64",
    ),
    "shift-float": (lambda: onepass.shift_labels(ROWS), ValueError, "labels must hold integers"),
    "shift-0": (
        lambda: onepass.shift_labels(torch.tensor(1)),
        ValueError,
        "labels must be [..., T]: got a single number",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    call, kind, said = WRONG[name]
    with pytest.raises(kind, match=re.escape(said)) as caught:
        call()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- a live zero from every loss

NOTHING = torch.zeros(B, S, dtype=torch.bool)
LABELS = torch.full((B, S), -100)
IDS = torch.arange(B * S).view(B, S) % V
mce = onepass.masked_cross_entropy


def flat(call: Callable[[Tensor, Tensor], Any]) -> Callable[[Tensor], Any]:
    return lambda logits: call(logits.view(B * S, V), LABELS.view(-1))


def jigsaw_ce(logits: Tensor, **options: Any) -> Any:
    twice = torch.cat([logits, logits])
    sides: Any = {"student_logits": twice, "teacher_logits": twice}
    found: Any = {}
    jigsaw.compute_jigsaw_ce_losses(sides, B, S, V, NOTHING, NOTHING, found, 4.0, 1.0, **options)
    return sum(found.values())


def dpo_of(logits: Tensor) -> Tensor:
    chosen, rejected = dpo.sequence_logps(logits, LABELS).logps.chunk(2)
    return dpo.dpo_loss(chosen, rejected, None, None, reference_free=True).losses.mean()


OF_LOGITS: dict[str, Callable[[Tensor], Any]] = {
    "cross_entropy": flat(onepass.cross_entropy),
    "cross_entropy sum": flat(lambda z, y: onepass.cross_entropy(z, y, reduction="sum")),
    "cross_entropy weighted": flat(lambda z, y: onepass.cross_entropy(z, y, torch.rand(V))),
    "masked_cross_entropy labels": lambda z: mce(z, LABELS),
    "masked_cross_entropy mask": lambda z: mce(z, IDS, NOTHING),
    "masked_cross_entropy weights": lambda z: mce(z, IDS, NOTHING.float()),
    "masked_cross_entropy items": lambda z: mce(z, LABELS, num_items=torch.tensor(7)),
    "masked_cross_entropy no items": lambda z: mce(z, LABELS, num_items=torch.tensor(0)),
    "masked_cross_entropy sum": lambda z: mce(z, LABELS, reduction="sum"),
    "masked_cross_entropy smoothed": lambda z: mce(z, LABELS, label_smoothing=0.1, z_loss=1e-3),
    "masked_cross_entropy capped": lambda z: mce(z, LABELS, max_loss=4.0),
    "masked_cross_entropy tokens capped": lambda z: mce(
        z, LABELS, max_loss=4.0, cap_scope="token", num_items=torch.tensor(3.0)
    ),
    "masked_cross_entropy probabilities": lambda z: mce(
        z, torch.full((B, S, V), 1 / V), NOTHING, num_items=torch.tensor(7)
    ),
    "global_mean": lambda z: onepass.global_mean(mce(z, LABELS, reduction="none"), NOTHING),
    "liger": flat(liger.LigerCrossEntropyLoss(lse_square_scale=1e-3)),
    "jigsaw masked": lambda z: jigsaw.compute_masked_cross_entropy(z, IDS, B, S, NOTHING, 4.0),
    "jigsaw": jigsaw_ce,
    "jigsaw argmax": lambda z: jigsaw_ce(z, target="argmax"),
    "dpo": dpo_of,
}
OF_HEAD: dict[str, Callable[[Tensor, Tensor, Tensor], Any]] = {
    "linear_cross_entropy": lambda h, w, y: onepass.linear_cross_entropy(h, w, y),
    "linear_cross_entropy sum": lambda h, w, y: onepass.linear_cross_entropy(
        h, w, y, reduction="sum", label_smoothing=0.1
    ),
    "liger": lambda h, w, y: liger.LigerFusedLinearCrossEntropyLoss()(w, h, y),
    "liger scaled": lambda h, w, y: liger.LigerFusedLinearCrossEntropyLoss(
        use_token_scaling=True, lse_square_scale=1e-3
    )(w, h, y),
    "cce": lambda h, w, y: cce.linear_cross_entropy(h, w, y),
    "cce sum": lambda h, w, y: cce.linear_cross_entropy(h, w, y, reduction="sum", softcap=5.0),
}


def of_layers(call: Callable[..., Tensor], **options: Any) -> Callable[[Tensor, Tensor], Any]:
    return lambda x, y: call([x, x * 2], [y, y], NOTHING, **options)


def jigsaw_l2(x: Tensor, y: Tensor) -> Any:
    sides: Any = {"student_embeddings": x.repeat(2, 1, 1), "teacher_embeddings": y.repeat(2, 1, 1)}
    found: Any = {}
    jigsaw.compute_jigsaw_l2_losses(sides, 2 * B, NOTHING, found)
    return sum(found.values())


def distance(x: Tensor, y: Tensor, normalization: str) -> Tensor:
    return onepass.masked_normalized_l2(x, y, NOTHING, normalization=normalization)


def median(x: Tensor, y: Tensor, form: str) -> Tensor:
    return input_losses.median_norm_loss(y, x, 1.0, NOTHING, form=form)


def deviations(x: Tensor, y: Tensor, form: str) -> Tensor:
    return input_losses.std_log_ratio_loss(x.square() + 0.1, NOTHING, form=form)


OF_STATES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    **{
        f"l2 {name}": functools.partial(distance, normalization=name)
        for name in ("target", "target_sq", "unit", "dim")
    },
    "cosine": lambda x, y: onepass.masked_inner_product(x, y, NOTHING, relu=True),
    "retain": of_layers(circuit_breaker.retain_loss),
    "retain unmasked": of_layers(circuit_breaker.retain_loss, retain_reduction="unmasked"),
    "circuit breaker": of_layers(circuit_breaker.circuit_breaker_loss),
    "circuit breaker total": of_layers(circuit_breaker.circuit_breaker_loss, relu_scope="total"),
    "jigsaw l2": jigsaw_l2,
    "jigsaw cosine": lambda x, y: input_losses.cosine_similarity_loss(y, x, NOTHING),
    "jigsaw power law": lambda x, y: input_losses.inverse_l2_power_law_loss(y, x, NOTHING),
    "jigsaw entropy": lambda x, y: jigsaw.gaussian_entropy_log_loss(x.square(), NOTHING),
    "jigsaw median token": functools.partial(median, form="token"),
    "jigsaw median batch": functools.partial(median, form="batch"),
    "jigsaw std mean": functools.partial(deviations, form="mean"),
    "jigsaw std entropy": functools.partial(deviations, form="entropy"),
}


def check_live_zero(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    assert loss.requires_grad and loss.isfinite()
    loss.backward()
    for leaf in leaves:
        assert leaf.grad is not None and not leaf.grad.any()


@pytest.mark.parametrize("mode", ["logits", "auto", "recompute", "frozen"])
@pytest.mark.parametrize("name", OF_LOGITS)
def test_live_zero_of_logits(name: str, mode: str) -> None:
    hidden = torch.randn(B, S, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=mode != "frozen")
    if mode == "logits":
        logits = hidden @ weight.t()
    else:
        logits = onepass.LazyLogits(hidden, weight, mode="auto" if mode == "frozen" else mode)
    leaves = [hidden] if mode == "frozen" else [hidden, weight]
    check_live_zero(OF_LOGITS[name](logits), leaves)


@pytest.mark.parametrize("n", [0, 4])
@pytest.mark.parametrize("name", OF_HEAD)
def test_live_zero_of_a_head(name: str, n: int) -> None:
    for frozen in (False, True):
        hidden = torch.randn(n, D, requires_grad=True)
        weight = torch.randn(V, D, requires_grad=not frozen)
        loss = OF_HEAD[name](hidden, weight, torch.full((n,), -100))
        check_live_zero(loss, [hidden] if frozen else [hidden, weight])


@pytest.mark.parametrize("name", OF_STATES)
def test_live_zero_of_hidden_states(name: str) -> None:
    x, y = torch.randn(B, S, D, requires_grad=True), torch.randn(B, S, D)
    check_live_zero(OF_STATES[name](x, y), [x])


@pytest.mark.parametrize("mode", ["logits", "auto", "ahead", "recompute", "frozen"])
def test_live_zero_of_no_rows(mode: str) -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    weight = torch.randn(V, D, requires_grad=mode != "frozen")
    labels = torch.zeros(0, dtype=torch.long)
    for items in (None, torch.tensor(7)):
        for rows_first in (False, True):
            if mode == "ahead" and rows_first:
                continue  # rows do not know their weights ahead
            if mode == "logits":
                logits = hidden @ weight.t()
            else:
                how = "auto" if mode == "frozen" else mode
                logits = onepass.LazyLogits(hidden, weight, mode=how)
            if rows_first:
                rows = mce(logits, labels, reduction="none")
                loss = onepass.global_mean(rows, labels != -100, num_items=items)
            else:
                loss = mce(logits, labels, num_items=items)
            check_live_zero(loss, [hidden] if mode == "frozen" else [hidden, weight])


# ---------------------------------------------------------------- the page


def test_the_page_runs() -> None:
    page = (ROOT / "docs" / "parallel.md").read_text("utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, re.S)
    assert snippets
    command = [sys.executable, "-W", "error", "-c", "\n".join(snippets)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
