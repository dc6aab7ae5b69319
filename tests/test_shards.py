"""Vocabularies in shards: every statistic, pair statistic and loss of a sharded head, forward and
backward, is that of the whole one, and what goes between the ranks is a few numbers a row."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from onepass import LazyLogits
from onepass.ops.vocab_pair_stats import FACTS as PAIR_FACTS
from onepass.ops.vocab_stats import FACTS
from support.ranks import Alone, Ranks

V, D, N = 37, 5, 6
LAYOUTS = {"even": (19, 18), "uneven": (3, 20, 14), "empty": (36, 1, 0, 0), "one": (37,)}


class Case:
    """Hidden states [2, 3, D], a head [V, D], labels on all shards."""

    def __init__(self, dtype: torch.dtype = torch.float32, size: float = 1.0) -> None:
        gen = torch.Generator().manual_seed(3)
        self.hidden = (size * torch.randn(2, 3, D, generator=gen)).to(dtype)
        self.weight = torch.randn(V, D, generator=gen).to(dtype)
        self.bias = torch.randn(V, generator=gen).to(dtype)
        self.labels = torch.tensor([[0, 36, 2], [20, 3, 35]])
        self.contrast = torch.tensor([[36, 1, -100], [5, 22, 0]])
        self.bag = torch.rand(V, generator=gen)
        self.upstream = torch.randn(2, 3, len(FACTS), generator=gen)

    def leaves(self, frozen: bool, bias: bool) -> list[Tensor]:
        found = [self.hidden.clone().requires_grad_()]
        found += [t.clone().requires_grad_(not frozen) for t in (self.weight, self.bias)]
        return found if bias else found[:2]


def part(tensor: Tensor, sizes: tuple[int, ...], rank: int) -> Tensor:
    return tensor.detach().split(list(sizes))[rank].clone().requires_grad_(tensor.requires_grad)


def both(
    case: Case,
    sizes: tuple[int, ...],
    loss: Callable[[Tensor], Tensor],
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool = False,
    bias: bool = True,
    **options: Any,
) -> tuple[list[Tensor], list[list[Tensor]], Ranks]:
    """(value, gradients) of the whole head, and of each rank with its part of the head's gathered
    into whole ones."""

    def run(leaves: list[Tensor], **where: Any) -> list[Tensor]:
        logits = LazyLogits(leaves[0], leaves[1], *leaves[2:], **options, **where)
        value = loss(logits)
        if value.requires_grad:
            value.backward()
        return [value.detach(), *(t.grad for t in leaves if t.requires_grad and t.grad is not None)]

    whole = case.leaves(frozen, bias)
    wanted = run([t.detach().requires_grad_(t.requires_grad) for t in whole])
    ranks = Ranks(len(sizes), monkeypatch)

    def on_rank(rank: int) -> list[Tensor]:
        own = [part(t, sizes, rank) for t in whole[1:]]
        hidden = whole[0].detach().clone().requires_grad_()
        return run([hidden, *own], process_group=ranks)

    found = ranks.run(on_rank)
    gathered = [
        [*of_rank[:2], *(torch.cat(grads) for grads in zip(*(f[2:] for f in found), strict=True))]
        for of_rank in found
    ]
    return wanted, gathered, ranks


def check(wanted: list[Tensor], found: list[list[Tensor]], rtol: float = 2e-5) -> None:
    for of_rank in found:
        assert len(of_rank) == len(wanted)
        for value, truth in zip(of_rank, wanted, strict=True):
            size = float(truth.abs().max()) if truth.numel() else 0.0
            torch.testing.assert_close(value, truth, rtol=rtol, atol=rtol * size)


def mixed(stats: Any, case: Case) -> Tensor:
    """All facts at once, each weighed by numbers of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for at, (name, fact) in enumerate(stats._asdict().items()):
        if fact is not None and name != "argmax":
            total = total + (fact.double() * case.upstream[..., at % len(FACTS)]).sum()
    return total


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("fact", [*FACTS, "all"])
def test_every_statistic(
    fact: str, frozen: bool, layout: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case()
    case.labels[1, 1] = -100
    want = FACTS if fact == "all" else (fact,)

    def loss(logits: Tensor) -> Tensor:
        stats = onepass.vocab_stats(
            logits, case.labels, contrast_labels=case.contrast, bag_weights=case.bag,
            want=want, impl=impl,
        )  # fmt: skip
        return stats.argmax.sum() if fact == "argmax" else mixed(stats, case)

    wanted, found, _ = both(case, LAYOUTS[layout], loss, monkeypatch, frozen)
    check(wanted, found)


class Teacher:
    """A target over the same vocabulary from another hidden size."""

    def __init__(self) -> None:
        gen = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(2, 3, D + 2, generator=gen)
        self.weight = torch.randn(V, D + 2, generator=gen)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("fact", [*PAIR_FACTS, "all"])
def test_every_pair_statistic(
    fact: str, layout: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides sharded and trained; a pair that does not count."""
    case, teacher, sizes = Case(), Teacher(), LAYOUTS[layout]
    mask = torch.tensor([[True, True, False], [True, True, True]])
    want = PAIR_FACTS if fact == "all" else (fact,)

    def run(z: list[Tensor], t: list[Tensor], **where: Any) -> list[Tensor]:
        stats = onepass.vocab_pair_stats(
            LazyLogits(*z, **where), LazyLogits(*t, **where), mask=mask, want=want, jsd_beta=0.3,
            impl=impl,
        )  # fmt: skip
        mixed(stats, case).backward()
        facts = [f.detach() for f in stats if f is not None]
        return [*facts, *(x.grad for x in (z[0], t[0], z[1], t[1]) if x.grad is not None)]

    def leaves() -> tuple[list[Tensor], list[Tensor]]:
        z, t = [case.hidden, case.weight], [teacher.hidden, teacher.weight]
        return [x.clone().requires_grad_() for x in z], [x.clone().requires_grad_() for x in t]

    wanted = run(*leaves())
    ranks = Ranks(len(sizes), monkeypatch)

    def on_rank(rank: int) -> list[Tensor]:
        z, t = leaves()
        z[1], t[1] = part(z[1], sizes, rank), part(t[1], sizes, rank)
        return run(z, t, process_group=ranks)

    found = ranks.run(on_rank)
    whole = [torch.cat(pair) for pair in zip(*(f[-2:] for f in found), strict=True)]
    check(wanted, [[*of_rank[:-2], *whole] for of_rank in found])


# ---------------------------------------------------------------- digits, on given logits


def on_logits(
    op: str, tensors: list[Tensor], rest: list[Any], sizes: tuple[int, ...], impl: str,
    monkeypatch: pytest.MonkeyPatch,
) -> list[Tensor]:  # fmt: skip
    """The operator's outputs on rank 0 and, of all ranks together, the gradient of the last ones'
    sum with respect to the first tensor."""
    ranks = Ranks(len(sizes), monkeypatch)

    def on_rank(rank: int) -> list[Tensor]:
        own = [t.split(list(sizes), dim=-1)[rank].clone() for t in tensors]
        own[0].requires_grad_()
        run = getattr(torch.ops.onepass, op).default
        outputs = run(*own, *rest, ranks.group_name, list(sizes), impl == "triton")
        sum(o.sum() for o in outputs if o.requires_grad and o.numel()).backward()
        return [*(o.detach() for o in outputs), own[0].grad]  # type: ignore[list-item]

    found = ranks.run(on_rank)
    return [*found[0][:-1], torch.cat([f[-1] for f in found], dim=-1)]


@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("apart", [1e-4, 1e-2, 1.0, 30.0])
def test_divergences_keep_their_digits(
    apart: float, offset: float, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KL, reverse KL and JSD down to 1e-9: between the shards' shares as within them."""
    gen = torch.Generator().manual_seed(11)
    z = 3 * torch.randn(4, V, generator=gen) + offset
    t = z + apart * torch.randn(4, V, generator=gen)
    want = ["kl", "reverse_kl", "jsd"]
    for sizes in LAYOUTS.values():
        rest = [None, False, want, 0.3]
        outputs = on_logits("vocab_pair_stats", [z[None], t], rest, sizes, impl, monkeypatch)
        p, q = z.double().softmax(-1), t.double().softmax(-1)
        m = 0.3 * q + 0.7 * p
        kl = (q * (q / p).log()).sum(-1)
        reverse = (p * (p / q).log()).sum(-1)
        jsd = 0.3 * (q * (q / m).log()).sum(-1) + 0.7 * (p * (p / m).log()).sum(-1)
        for at, truth in ((7, kl), (8, reverse), (9, jsd)):
            torch.testing.assert_close(outputs[at][0].double(), truth, rtol=4e-6, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_of_peaked_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shares from 1 down to nothing: what e^80 cannot make visible does not count as near."""
    gen = torch.Generator().manual_seed(14)
    want = ["kl", "reverse_kl", "jsd"]
    for size in (30.0, 60.0, 100.0):
        z, t = (size * torch.randn(400, 40, generator=gen).to(dtype) for _ in range(2))
        log_p, log_q = z.double().log_softmax(-1), t.double().log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        reverse = (log_p.exp() * (log_p - log_q)).sum(-1)
        for sizes in ((20, 20), (4, 1, 35)):
            rest = [None, False, want, 0.3]
            outputs = on_logits("vocab_pair_stats", [z[None], t], rest, sizes, "torch", monkeypatch)
            for at, truth in ((7, kl), (8, reverse)):
                torch.testing.assert_close(outputs[at][0].double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gap", [10.0, 30.0, 80.0])
def test_certain_rows_keep_their_digits(
    gap: float, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """logp and entropy near 0 and the gradient -(1 - p) of the label, on the label's shard, from
    what the other shards hold."""
    gen = torch.Generator().manual_seed(12)
    z = torch.randn(4, V, generator=gen)
    labels = torch.tensor([0, 1, 22, 36])
    z[range(4), labels] += gap
    truth = z.double().requires_grad_()
    log_p = truth.log_softmax(-1)
    rest = (truth - truth.gather(-1, labels[:, None])).exp().scatter(-1, labels[:, None], 0.0)
    logp = -rest.sum(-1).log1p()
    entropy = -(log_p.exp() * log_p).scatter(-1, labels[:, None], 0.0).sum(-1) - logp.exp() * logp
    (logp + entropy).sum().backward()
    digits = max(2e-6, gap * 2**-24)  # z - max rounds by as much, and its exponential with it
    assert truth.grad is not None
    for sizes in LAYOUTS.values():
        given = [labels, None, None, ["logp", "entropy"]]
        outputs = on_logits("vocab_stats", [z], given, sizes, impl, monkeypatch)
        facts = dict(zip(("row_max", "row_rest", *FACTS), outputs, strict=False))
        torch.testing.assert_close(facts["logp"].double(), logp.detach(), rtol=digits, atol=0)
        torch.testing.assert_close(facts["entropy"].double(), entropy.detach(), rtol=digits, atol=0)
        torch.testing.assert_close(
            outputs[-1].double(), truth.grad, rtol=2e-5, atol=3e-6 * float(truth.grad.abs().max())
        )


@pytest.mark.parametrize("ruled_out", ["a shard", "all but one column", "all", "none, one is NaN"])
def test_rows_with_inf(ruled_out: str, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts that the whole rows have, where columns are -inf or NaN."""
    gen = torch.Generator().manual_seed(13)
    z = torch.randn(3, V, generator=gen)
    columns = {"a shard": slice(0, 19), "all but one column": slice(1, V), "all": slice(0, V)}
    if ruled_out in columns:
        z[1, columns[ruled_out]] = -torch.inf
    else:
        z[1, 20] = torch.nan
    labels = torch.tensor([0, 0, 30])
    want = ["lse", "logp", "entropy", "sum_sq_probs", "argmax"]
    rest: list[Any] = [labels, None, None, want]
    run = torch.ops.onepass.vocab_stats.default
    wanted = run(z, *rest, "", [], impl == "triton")
    for sizes in ((19, 18), (3, 16, 18)):
        found = on_logits("vocab_stats", [z], rest, sizes, impl, monkeypatch)
        for name, value, truth in zip(("top", "rest", *FACTS), found, wanted, strict=False):
            if name in ("lse", "logp", "entropy", "sum_sq_probs") or ruled_out in columns:
                torch.testing.assert_close(value, truth, equal_nan=True, msg=name)


@pytest.mark.parametrize("lost", [1e-7, 1e-3, 0.4])
def test_columns_that_one_side_rules_out(lost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL where the rows are equal but for a shard of columns that have no probability on one side:
    -log(1 - lost), and infinite the other way; cross-entropies too."""
    gen = torch.Generator().manual_seed(15)
    z = torch.randn(4, 20, generator=gen)
    shift = (
        torch.tensor(lost / (1 - lost)).log() + z[:, :12].logsumexp(-1) - z[:, 12:].logsumexp(-1)
    )
    z[:, 12:] += shift[:, None]
    t = z.clone()
    t[:, 12:] = -torch.inf
    want = ["cross_entropy", "kl", "reverse_kl"]
    rest: list[Any] = [None, False, want, 0.5]
    for sizes in ((12, 8), (5, 7, 8)):
        outputs = on_logits("vocab_pair_stats", [z[None], t], rest, sizes, "torch", monkeypatch)
        exact = torch.full((1, 4), -lost, dtype=torch.float64).log1p().neg()
        torch.testing.assert_close(outputs[7].double(), exact, rtol=3e-6 + 3e-7 / lost, atol=0)
        assert (outputs[8] == torch.inf).all()
        outputs = on_logits("vocab_pair_stats", [t[None], z], rest, sizes, "torch", monkeypatch)
        assert (outputs[6] == torch.inf).all() and (outputs[7] == torch.inf).all()
        of_probs: list[Any] = [None, True, ["cross_entropy"], 0.5]
        q = z.softmax(-1)
        outputs = on_logits("vocab_pair_stats", [t[None], q], of_probs, sizes, "torch", monkeypatch)
        assert (outputs[6] == torch.inf).all()


def test_equal_rows_are_at_rest(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Divergences of rows that differ by a constant are 0, and no rounding makes them negative."""
    gen = torch.Generator().manual_seed(16)
    z = 5 * torch.randn(200 if impl == "torch" else 12, 37, generator=gen)
    for offset in (0.0, 0.3, 7.0):
        rest: list[Any] = [None, False, ["kl", "reverse_kl", "jsd"], 0.5]
        pair = [z[None], z + offset]
        outputs = on_logits("vocab_pair_stats", pair, rest, (3, 20, 14), impl, monkeypatch)
        for fact in outputs[7:10]:
            assert fact.min() >= (-1e-9 if fact is outputs[9] else 0) and fact.max() < 1e-6


# ---------------------------------------------------------------- losses


def teacher_of(case: Case) -> Tensor:
    return Case(size=0.5).hidden.flip(0) @ case.weight.T


LOSSES: dict[str, Callable[[Tensor, Case], Tensor]] = {
    "F.cross_entropy": lambda z, c: torch.nn.functional.cross_entropy(
        z.view(-1, V), c.labels.view(-1), label_smoothing=0.1
    ),
    "class weights": lambda z, c: onepass.cross_entropy(z.view(-1, V), c.labels.view(-1), c.bag),
    "masked_cross_entropy": lambda z, c: onepass.masked_cross_entropy(
        z, c.labels, c.contrast, max_loss=5.0, z_loss=1e-3, ignore_index=36
    ),
    "capped rows": lambda z, c: onepass.masked_cross_entropy(
        z, c.labels, max_loss=2.0, cap_scope="token", ce_scaling_factor=0.7
    ),
    "soft targets": lambda z, c: onepass.masked_cross_entropy(z, teacher_of(c).softmax(-1)),
    "log_softmax, gather": lambda z, c: (
        -z.float().log_softmax(-1).gather(-1, c.labels[..., None]).mean()
    ),
    "logsumexp": lambda z, c: z.logsumexp(-1).square().mean(),
    "entropy, spelled": lambda z, c: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1).mean(),
    "kl_div to a whole teacher": lambda z, c: onepass.vocab_pair_stats(
        z, teacher_of(c), want=("kl", "reverse_kl", "jsd")
    ).kl.mean(),
    "softcap and scale": lambda z, c: torch.nn.functional.cross_entropy(
        (torch.tanh(z / 3) * 3 / 0.7).view(-1, V), c.labels.view(-1)
    ),
    "rows with temperatures": lambda z, c: (z / c.bag[:3, None]).logsumexp(-1).sum(),
    "rows sliced and joined": lambda z, c: torch.nn.functional.cross_entropy(
        torch.cat([z[:, 1:].reshape(-1, V), z[:, 0]]), c.labels.view(-1)
    ),
    "whole, to the ear": lambda z, c: z.materialize().square().mean(),  # type: ignore[attr-defined]
    "a bias for all": lambda z, c: (z + c.bag).logsumexp(-1).mean(),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name: str, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    wanted, found, _ = both(case, (3, 20, 14), lambda z: LOSSES[name](z, case), monkeypatch, frozen)
    check(wanted, found)


@pytest.mark.parametrize("mode", ["auto", "ahead", "recompute"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "blind"])
@pytest.mark.parametrize("slab_rows", [1, 4])
def test_modes_and_slabs(
    slab_rows: int, compact: bool, mode: str, impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slabs hold the same rows on all ranks, whatever their own columns: each merges in step."""
    case = Case()
    case.labels[0, 1] = -100

    def loss(z: Tensor) -> Tensor:
        return onepass.masked_cross_entropy(z, case.labels, case.bag[:6].view(2, 3), impl=impl)

    options: dict[str, Any] = {
        "max_slab_bytes": 4 * V * slab_rows,
        "compact": compact,
        "mode": mode,
    }
    for sizes in ((3, 20, 14), (36, 1, 0, 0)):
        wanted, found, ranks = both(case, sizes, loss, monkeypatch, **options)
        check(wanted, found)
        slabs = -(-(5 if compact else 6) // (4 * V * slab_rows // (4 * max(sizes))))
        kinds = [kind for kind, *_ in ranks.counted]
        assert kinds.count("all_reduce") == 1  # of d hidden
        assert kinds.count("all_gather") == 1 + compact + slabs  # layout, agreement, facts


def test_bfloat16(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Facts to the last digits; each rank's part of d hidden rounds once before the sum."""
    case = Case(torch.bfloat16)

    def loss(z: Tensor) -> Tensor:
        return onepass.masked_cross_entropy(z, case.labels, impl=impl)

    wanted, found, _ = both(case, (3, 20, 14), loss, monkeypatch)
    for of_rank in found:
        torch.testing.assert_close(of_rank[0], wanted[0], rtol=1e-6, atol=0)
        for value, truth in zip(of_rank[1:], wanted[1:], strict=True):
            size = float(truth.abs().max())
            torch.testing.assert_close(value, truth, rtol=2**-7, atol=2**-7 * size)


def test_lora_on_a_sharded_head(impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """z = h W^T + (h A^T) B^T, B in shards as W: A learns from the sum over all ranks."""
    case, sizes = Case(), (3, 20, 14)
    gen = torch.Generator().manual_seed(7)
    a, b = torch.randn(2, D, generator=gen), torch.randn(V, 2, generator=gen)

    def run(weight: Tensor, b: Tensor, **where: Any) -> list[Tensor]:
        hidden, down = (t.clone().requires_grad_() for t in (case.hidden, a))
        up = b.clone().requires_grad_()
        z: Any = LazyLogits(hidden, weight, **where)
        z = z + LazyLogits(hidden @ down.T, up, **where) * 0.5
        loss = onepass.masked_cross_entropy(z, case.labels, impl=impl)
        loss.backward()
        return [loss.detach(), hidden.grad, down.grad, up.grad]  # type: ignore[list-item]

    wanted = run(case.weight, b)
    ranks = Ranks(3, monkeypatch)

    def on_rank(rank: int) -> list[Tensor]:
        own = (t.split(list(sizes))[rank] for t in (case.weight, b))
        return run(*own, process_group=ranks)

    found = ranks.run(on_rank)
    up = torch.cat([f[-1] for f in found])
    check(wanted, [[*f[:-1], up] for f in found])


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 1)])
def test_a_scale_that_learns(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is that of all columns, on every rank."""
    case, sizes = Case(), (3, 20, 14)
    start = 1 + torch.rand(shape, generator=torch.Generator().manual_seed(8))

    def run(weight: Tensor, **where: Any) -> list[Tensor]:
        scale = start.clone().requires_grad_()
        z = LazyLogits(case.hidden, weight, **where) * scale
        loss = onepass.masked_cross_entropy(z / (scale + 1), case.labels)
        loss.backward()
        return [loss.detach(), scale.grad]  # type: ignore[list-item]

    ranks = Ranks(3, monkeypatch)
    found = ranks.run(lambda rank: run(case.weight.split(list(sizes))[rank], process_group=ranks))
    check(run(case.weight), found)


def test_what_goes_between_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers a row and d hidden: nothing that grows with the vocabulary."""
    case = Case()
    for want in (("logp",), tuple(f for f in FACTS if f != "argmax")):
        _, _, ranks = both(
            case,
            (3, 20, 14),
            lambda z, want=want: mixed(  # type: ignore[misc]
                onepass.vocab_stats(
                    z, case.labels, contrast_labels=case.contrast, bag_weights=case.bag, want=want
                ),
                case,
            ),
            monkeypatch,
        )
        layout, agreed, facts, gradient = ranks.counted
        assert layout[1] == (4,) and agreed[1] == (7,)
        assert facts[0] == "all_gather" and facts[1][1:] == (N,) and facts[1][0] <= len(FACTS) + 2
        assert gradient[:2] == ("all_reduce", (2, 3, D))


def test_no_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.hidden, case.labels = case.hidden[:, :0], case.labels[:, :0]
    wanted, found, _ = both(
        case, (3, 20, 14), lambda z: onepass.masked_cross_entropy(z, case.labels), monkeypatch
    )
    check(wanted, found)


def test_all_rows_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A live zero, and zeros for gradients, on every rank."""
    case = Case()
    case.labels[:] = -100
    _, found, _ = both(
        case, (3, 20, 14), lambda z: onepass.masked_cross_entropy(z, case.labels), monkeypatch
    )
    for of_rank in found:
        assert len(of_rank) == 4 and not any(t.any() for t in of_rank)


def test_a_whole_teacher_beside_a_sharded_student(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head is fixed, its hidden states learn from the columns of all ranks."""
    case, teacher, sizes = Case(), Teacher(), (3, 20, 14)

    def run(weight: Tensor, **where: Any) -> list[Tensor]:
        states = [t.clone().requires_grad_() for t in (case.hidden, teacher.hidden)]
        z = LazyLogits(states[0], weight, **where)
        t = LazyLogits(states[1], teacher.weight)
        pair = onepass.vocab_pair_stats(z, t, want=PAIR_FACTS, impl=impl)
        mixed(pair, case).backward()
        return [*(f.detach() for f in pair), *(t.grad for t in states)]  # type: ignore[list-item]

    ranks = Ranks(3, monkeypatch)
    found = ranks.run(lambda rank: run(case.weight.split(list(sizes))[rank], process_group=ranks))
    check(run(case.weight), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_error_budget(dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the truth in float64 no further than unfused torch over the same shards: its loss
    from whole logits, its d hidden as the sum of the ranks' products, rounded as they are."""
    gen = torch.Generator().manual_seed(21)
    n, width, vocab_size, parts = 48, 32, 512, 4
    hidden = torch.randn(n, width, generator=gen).to(dtype)
    weight = (torch.randn(vocab_size, width, generator=gen) / 4).to(dtype)
    labels = torch.randint(0, vocab_size, (n,), generator=gen)

    def loss_of(logits: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, labels)

    leaves = [t.double().requires_grad_() for t in (hidden, weight)]
    loss_of(leaves[0] @ leaves[1].T).backward()
    truth = [leaf.grad for leaf in leaves]
    logits = (hidden @ weight.T).requires_grad_()
    loss_of(logits.float()).backward()
    assert logits.grad is not None
    dlogits = logits.grad.chunk(parts, 1)
    shards = weight.chunk(parts)
    products = torch.stack([d @ w for d, w in zip(dlogits, shards, strict=True)])
    of_torch = [products.sum(0), logits.grad.T @ hidden]

    def on_rank(rank: int) -> list[Tensor]:
        own = [hidden.clone().requires_grad_(), shards[rank].clone().requires_grad_()]
        z = LazyLogits(*own, process_group=ranks)
        onepass.masked_cross_entropy(z, labels, impl=impl).backward()
        return [t.grad for t in own]  # type: ignore[misc]

    ranks = Ranks(parts, monkeypatch)
    found = ranks.run(on_rank)
    ours = [found[0][0], torch.cat([f[1] for f in found])]
    for own, theirs, exact in zip(ours, of_torch, truth, strict=True):
        assert exact is not None

        def error(value: Tensor, exact: Tensor = exact) -> float:
            return float((value.double() - exact).square().mean().sqrt())

        assert error(own) <= 1.05 * error(theirs)


# ---------------------------------------------------------------- bad input


def refused(
    n: int, call: Callable[[int, Ranks], Any], monkeypatch: pytest.MonkeyPatch
) -> list[BaseException]:
    """What every rank raises; fails where one does not, or waits for another."""
    ranks = Ranks(n, monkeypatch)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        ranks.run(lambda rank: call(rank, ranks))
    assert all(error is not None for error in ranks.raised)
    found = [error for error in ranks.raised if error is not None]
    assert not any(isinstance(error, Alone) for error in found)
    return found


def test_parts_that_make_no_head(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, hidden = torch.randn(V, D), torch.randn(4, D)

    def gaps(rank: int, ranks: Ranks) -> None:
        own = weight[:10] if rank == 0 else weight[12:]
        LazyLogits(hidden, own, process_group=ranks, vocab_offset=12 * rank)

    for rank, error in enumerate(refused(2, gaps, monkeypatch)):
        said = str(error)
        assert f"rank {rank}: the ranks' parts must cover the vocabulary" in said
        assert "12 on rank 1" in said and "wanted [0, 10]" in said

    def columns(rank: int, ranks: Ranks) -> None:
        own = weight[:, : 3 + rank]
        LazyLogits(hidden[:, : 3 + rank], own, process_group=ranks)

    for error in refused(2, columns, monkeypatch):
        assert "one D: got D = 3 on rank 0, 4 on rank 1" in str(error)

    def one_is_wrong(rank: int, ranks: Ranks) -> None:
        LazyLogits(hidden, weight if rank else "weight", process_group=ranks)  # type: ignore[arg-type]

    def bias_is_wrong(rank: int, ranks: Ranks) -> None:
        bias = torch.randn(V - rank)
        LazyLogits(hidden, weight, bias, process_group=ranks)

    assert "bias must be one number for each of this rank's rows, (37,)" in str(
        refused(2, bias_is_wrong, monkeypatch)[1]
    )

    def below_0(rank: int, ranks: Ranks) -> None:
        LazyLogits(hidden, weight, process_group=ranks, vocab_offset=-1 if rank else None)

    assert "vocab_offset must be an int of 0 or more: got -1" in str(
        refused(2, below_0, monkeypatch)[1]
    )

    own, other = refused(2, one_is_wrong, monkeypatch)
    assert "weight must be a torch.Tensor: got str" in str(own)
    assert "rank 1: another rank of the group refuses" in str(other)
    assert "refused on rank 0, fine on rank 1" in str(other)


@pytest.mark.parametrize("what", ["number of rows", "labels", "max_slab_bytes", "call", "dtype"])
def test_ranks_that_do_not_do_the_same(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()

    def call(rank: int, ranks: Ranks) -> None:
        odd = rank == 1
        hidden = case.hidden[: 1 if odd and what == "number of rows" else 2]
        labels = case.labels[: len(hidden)].clone()
        dtype = torch.float64 if odd and what == "dtype" else torch.float32
        if odd and what == "labels":  # the same ones, elsewhere
            labels = labels.flip(1)
        slab = 4 * V * (2 if odd and what == "max_slab_bytes" else 1)
        own = case.weight.split([19, 18])[rank].to(dtype).requires_grad_(odd and what == "call")
        z = LazyLogits(hidden.to(dtype), own, process_group=ranks, max_slab_bytes=8 * slab)
        onepass.masked_cross_entropy(z, labels)

    for rank, error in enumerate(refused(2, call, monkeypatch)):
        said = str(error)
        assert said.startswith(f"rank {rank}: ranks that share a vocabulary must")
        assert what in said and "on rank 0" in said and "on rank 1" in said


def test_labels_that_no_rank_has(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.labels[1, 2] = V

    def call(rank: int, ranks: Ranks) -> None:
        z = LazyLogits(case.hidden, case.weight.split([19, 18])[rank], process_group=ranks)
        onepass.vocab_stats(z, case.labels)

    ranks = Ranks(2, monkeypatch)
    with pytest.raises(IndexError, match=r"labels\[5\] is 37: wanted 0 <= label < 37"):
        ranks.run(lambda rank: call(rank, ranks))
    assert all(isinstance(error, IndexError) for error in ranks.raised)
    from onepass.ops._shards import ELSEWHERE, Shard

    ids = torch.tensor([18, 19, 36, 37, -1, -100])
    assert Shard("", (19, 18), 1).labels(ids).tolist() == [ELSEWHERE, 0, 17, -1, -1, -100]  # type: ignore[union-attr]
    assert Shard("", (19, 18), 0).ids(None, ids)[1].tolist() == [18, -100, -100, -1, -1, -100]


def test_sums_of_unlike_shards_are_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()

    def call(rank: int) -> tuple[Tensor, str]:
        z: Any = LazyLogits(case.hidden, case.weight.split([19, 18])[rank], process_group=ranks)
        whole: Any = LazyLogits(case.hidden, case.weight)
        with warnings.catch_warnings(action="ignore", category=onepass.MaterializedWarning):
            both = z + whole
        return both, type(both).__name__

    ranks = Ranks(2, monkeypatch)
    for both, kind in ranks.run(call):
        assert kind == "Tensor"
        torch.testing.assert_close(both, 2 * case.hidden @ case.weight.T)


def test_what_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    case, sizes = Case(), (19, 18)

    def twice(rank: int, ranks: Ranks) -> None:
        hidden = case.hidden.clone().requires_grad_()
        z = LazyLogits(hidden, case.weight.split([19, 18])[rank], process_group=ranks)
        torch.autograd.grad(z.logsumexp(-1).sum(), hidden, create_graph=True)

    def trained_teacher(rank: int, ranks: Ranks) -> None:
        z = LazyLogits(case.hidden, case.weight.split([19, 18])[rank], process_group=ranks)
        onepass.vocab_pair_stats(z, torch.randn(2, 3, V, requires_grad=True))

    for error in refused(2, twice, monkeypatch):
        assert "create_graph=True is not served" in str(error)
    for error in refused(2, trained_teacher, monkeypatch):
        assert "must be sharded too, or fixed: got (2, 3, 37)" in str(error)
    assert sizes == (19, 18)
    hidden, weight = case.hidden, case.weight
    with pytest.raises(ValueError, match="process_group needs torch.distributed set up: got str"):
        LazyLogits(hidden, weight, process_group="tp")
    with pytest.raises(ValueError, match="vocab_offset needs process_group=: got Parameter"):
        LazyLogits(hidden, torch.nn.Parameter(weight), vocab_offset=0)
    with pytest.raises(ValueError, match="mesh_dim needs a weight that is a DTensor"):
        LazyLogits(hidden, weight, mesh_dim="tp")
