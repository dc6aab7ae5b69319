"""The inputs on which `onepass doctor` judges each op and loss, and the promises it holds them to.

A `Check` is one call of the public API on one hard input, beside the formula of references.py that
says the same. A promise is a property with no error to measure: it holds or it raises Broken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import references
from .references import (
    DIVERGENCES,
    HEAD,
    IGNORED,
    TARGET_HEAD,
    Tensors,
    capped,
    pick,
    reduced,
    statistics,
)

STATS = (
    "lse",
    "label_logit",
    "contrast_logit",
    "logp",
    "entropy",
    "logit_sum",
    "logp_sum",
    "sum_sq_probs",
    "argmax",
)
PAIRS = (*DIVERGENCES, "lse", "target_lse")
GAUSSIANS = ("mahalanobis", "log_det")
MOMENTS = ("dd", "xx", "yy", "xy", "difference_of_squares")


class Maker:
    """Draws the inputs of a check: the same numbers on every device, rounded to its dtype."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, offset: float = 0.0) -> Tensor:
        return torch.randn(*shape, generator=self.generator) * scale + offset

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape, generator=self.generator).to(self.device)

    def store(self, values: Tensor) -> Tensor:
        """`values` in the dtype and on the device of the check."""
        return values.to(self.dtype).to(self.device)

    def strided(self, values: Tensor) -> Tensor:
        """`values` [N, D] as every second row of a wider tensor of NaN, from its column 3 on."""
        n_rows, width = values.shape
        wide = self.store(torch.full((2 * n_rows, width + 6), math.nan))
        view = wide[::2, 3 : 3 + width]
        view.copy_(values)
        return view


class Check(NamedTuple):
    """One call of the public API on one input, and what to compare of it."""

    op: str  # the public name
    case: str  # what is hard about the input
    make: Callable[[Maker], Tensors]
    call: Callable[[Any, Tensors, str], Tensors]  # (onepass, inputs, impl) -> outputs by name
    formula: Callable[[Tensors], Tensors]
    leaves: tuple[str, ...] = ("logits",)
    only: tuple[str, ...] = ()  # outputs to compare; all of the call's where empty
    truth: Callable[[Tensors], Tensors] | None = None  # where the formula cancels in fp64 too
    exact: tuple[str, ...] = ()  # outputs held to the hard relative limit as well
    exact_gradient: tuple[str, Callable[[Tensors], Tensor]] | None = None  # of which output, where
    gradients: bool = True
    upstream: float = 1.75  # its standard deviation, or itself for one number; exact in bf16


# ------------------------------------------------------------------------------------- calls


def call_vocab_stats(api: Any, t: Tensors, impl: str) -> Tensors:
    want = STATS + (("bag_mass",) if "bag_weights" in t else ())
    stats = api.vocab_stats(
        t["logits"],
        t["labels"],
        contrast_labels=t["contrast"],
        bag_weights=t.get("bag_weights"),
        want=want,
        impl=impl,
    )
    facts = {name: getattr(stats, name) for name in want}
    found = pick(statistics(t["logits"].detach()), facts["argmax"])
    return facts | {"argmax": torch.where(t["labels"] == IGNORED, 0.0, found)}


def call_pair_stats(api: Any, t: Tensors, impl: str) -> Tensors:
    want = PAIRS if "target_logits" in t else ("cross_entropy", "lse")
    stats = api.vocab_pair_stats(
        t["logits"],
        t.get("target_logits"),
        target_probs=t.get("target_probs"),
        mask=t.get("mask"),
        want=want,
        impl=impl,
    )
    return {name: getattr(stats, name) for name in want}


def call_moments(api: Any, t: Tensors, impl: str) -> Tensors:
    x, y = ([t["x"], t["x2"]], [t["y"], t["y2"]]) if "x2" in t else (t["x"], t["y"])
    moments = api.row_moments(x, y, t.get("mask"), impl=impl)
    return {name: getattr(moments, name) for name in MOMENTS}


def call_distances(api: Any, t: Tensors, impl: str) -> Tensors:
    """|x - y|^2, and 1 - cos made of the moments in fp64: only the moments are judged."""
    moments = api.row_moments(t["x"], t["y"], impl=impl)
    dd, x_norm, y_norm = moments.dd.double(), moments.xx.double().sqrt(), moments.yy.double().sqrt()
    along = moments.difference_of_squares.double() / (x_norm + y_norm)
    return {"dd": moments.dd, "1 - cos": (dd - along.square()) / (2 * x_norm * y_norm)}


def call_gaussian(api: Any, t: Tensors, impl: str) -> Tensors:
    stats = api.gaussian_stats(
        t["x"], t["mean"], t["std"], t.get("mask"), location=t["location"], impl=impl
    )
    return {name: getattr(stats, name) for name in GAUSSIANS}


def call_cloak(api: Any, t: Tensors, impl: str) -> Tensors:
    rows = (t["x"], t["mean"], t["std"])
    return {"rows": api.cloak(*rows, t.get("mask"), seed=t["seed"], impl=impl)}


def lazy(api: Any, t: Tensors, names: tuple[str, str, str] = HEAD, **options: Any) -> Any:
    """LazyLogits, in several slabs where a slab costs no rounding: a CPU's product is rounded
    before it is added to those of other slabs."""
    hidden, matrix = (t[name] for name in names[:2])
    row_bytes = matrix.shape[0] * matrix.element_size()
    in_slabs = matrix.device.type != "cpu" or matrix.element_size() >= 4
    at_once = 4 * row_bytes if in_slabs else None
    return api.LazyLogits(hidden, matrix, t.get(names[2]), max_slab_bytes=at_once, **options)


def call_head_stats(
    api: Any, t: Tensors, impl: str, one_by_one: bool = False, **cap: Any
) -> Tensors:
    """All facts from one call, or each from a call of its own: gradients of one fact of a frozen
    head are made in the forward."""
    want = STATS + (("bag_mass",) if "bag_weights" in t else ())
    logits = lazy(api, t, **cap)
    facts: Tensors = {}
    for group in ((name,) for name in want) if one_by_one else (want,):
        stats = api.vocab_stats(
            logits,
            t["labels"],
            contrast_labels=t["contrast"],
            bag_weights=t.get("bag_weights"),
            want=group,
            impl=impl,
        )
        facts |= {name: getattr(stats, name) for name in group}
    with torch.no_grad():
        found = pick(statistics(references.head_logits(t, **cap)), facts["argmax"])
    return facts | {"argmax": torch.where(t["labels"] == IGNORED, 0.0, found)}


def call_head_pair_stats(api: Any, t: Tensors, impl: str, one_by_one: bool = False) -> Tensors:
    """As call_head_stats; the target is a head too where there are hidden states of it."""
    target = lazy(api, t, TARGET_HEAD) if "target_hidden" in t else t["target_logits"]
    logits = lazy(api, t)
    facts: Tensors = {}
    for want in ((name,) for name in DIVERGENCES) if one_by_one else (DIVERGENCES,):
        stats = api.vocab_pair_stats(logits, target, mask=t.get("mask"), want=want, impl=impl)
        facts |= {name: getattr(stats, name) for name in want}
    return facts


# ------------------------------------------------------------------------------------ inputs


def logits_and_labels(m: Maker, n_rows: int, vocab: int) -> Tensors:
    return {
        "logits": m.store(m.normal(n_rows, vocab, scale=3.0)),
        "labels": m.ids(vocab, n_rows),
        "contrast": m.ids(vocab, n_rows),
    }


def odd_vocabulary(m: Maker) -> Tensors:
    return logits_and_labels(m, 6, 509) | {"bag_weights": m.normal(509).to(m.device)}


def strided_rows(m: Maker) -> Tensors:
    strided = m.strided(m.normal(5, 333, scale=3.0))
    return logits_and_labels(m, 5, 333) | {"logits": strided, "labels": m.ids(333, 5, 2)[:, 0]}


def offset_rows(m: Maker) -> Tensors:
    return logits_and_labels(m, 6, 512) | {
        "logits": m.store(m.normal(6, 512, scale=3.0, offset=1e4))
    }


def ban(z: Tensor) -> Tensor:
    """-inf in every third column of row 0, and in row 1 for longer than a kernel's block."""
    z[0, ::3] = -math.inf
    z[1, : z.shape[1] - 18] = -math.inf
    return z


def banned_columns(m: Maker) -> Tensors:
    vocab = 4219
    z = ban(m.normal(3, vocab, scale=3.0))
    z[2, 1:] = -math.inf
    labels = torch.tensor([1, vocab - 1, 0]).to(m.device)
    weights = m.normal(vocab).to(m.device)
    return {"logits": m.store(z), "labels": labels, "contrast": labels, "bag_weights": weights}


def certain_rows(m: Maker) -> Tensors:
    """Each label leads by 40: in fp32 its probability rounds to 1, though 1 - p is no 0."""
    inputs = logits_and_labels(m, 4, 257)
    z = m.normal(4, 257).clamp(-2, 2)
    z.scatter_(1, inputs["labels"].cpu().unsqueeze(1), 40.0)
    return inputs | {"logits": m.store(z)}


def ignored_rows(m: Maker) -> Tensors:
    inputs = logits_and_labels(m, 6, 127)
    inputs["labels"][1::2] = IGNORED
    inputs["logits"][1::2] = math.nan
    return inputs


def label_column(t: Tensors) -> Tensor:
    """Where the logits [N, V] belong to their row's label."""
    return F.one_hot(t["labels"], t["logits"].shape[-1]).bool()


def pair(m: Maker, *shape: int, target: tuple[int, ...] | None = None) -> Tensors:
    return {
        "logits": m.store(m.normal(*shape, scale=3.0)),
        "target_logits": m.store(m.normal(*(target or shape), scale=3.0)),
    }


def strided_pair(m: Maker) -> Tensors:
    return {n: m.strided(m.normal(4, 333, scale=3.0)) for n in ("logits", "target_logits")}


def offset_pair(m: Maker) -> Tensors:
    return {
        "logits": m.store(m.normal(5, 512, scale=3.0, offset=1e4)),
        "target_logits": m.store(m.normal(5, 512, scale=3.0, offset=-5e3)),
    }


def banned_pair(m: Maker) -> Tensors:
    names = ("logits", "target_logits")
    return {n: m.store(ban(m.normal(3, 4219, scale=3.0))) for n in names}


def probabilities(m: Maker) -> Tensors:
    target = F.softmax(m.normal(5, 255, scale=2.0), dim=-1)
    target[:, ::5] = 0
    return {"logits": m.store(m.normal(5, 255, scale=3.0)), "target_probs": m.store(target)}


def masked_pair(m: Maker) -> Tensors:
    inputs = pair(m, 5, 509)
    inputs["logits"][1], inputs["target_logits"][3] = math.nan, math.nan
    return inputs | {"mask": torch.tensor([True, False, True, False, True]).to(m.device)}


def near_pair(m: Maker) -> Tensors:
    """A divergence near 1e-6, where a difference of two lse leaves no digit."""
    z = m.normal(4, 1021, scale=2.0)
    near = z + m.normal(4, 1021, scale=1e-3)
    return {"logits": m.store(z), "target_logits": m.store(near)}


def hidden(m: Maker, *shape: int) -> Tensors:
    return {"x": m.store(m.normal(*shape)), "y": m.store(m.normal(*shape))}


def strided_hidden(m: Maker) -> Tensors:
    return {"x": m.strided(m.normal(4, 333)), "y": m.strided(m.normal(4, 333))}


def layers(m: Maker) -> Tensors:
    return {n: m.store(m.normal(5, 257)) for n in ("x", "y", "x2", "y2")}


def masked_hidden(m: Maker) -> Tensors:
    inputs = hidden(m, 6, 129)
    inputs["x"][1], inputs["y"][4] = math.nan, math.nan
    return inputs | {"mask": torch.tensor([True, False, True, True, False, True]).to(m.device)}


def near_hidden(m: Maker) -> Tensors:
    """|x - y| / |y| of 1e-4, where xx + yy - 2 xy leaves no digit."""
    y = m.normal(4, 512)
    near = y * (1 + m.normal(4, 512, scale=1e-4))
    return {"x": m.store(near), "y": m.store(y)}


def gaussians(m: Maker, *shape: int) -> Tensors:
    """Rows, and of a Gaussian for each the mean in two parts and the standard deviations."""
    rows = {n: m.store(m.normal(*shape)) for n in ("x", "mean", "location")}
    return rows | {"std": m.store(0.25 + m.normal(*shape).abs())}


def strided_gaussians(m: Maker) -> Tensors:
    rows = {n: m.strided(m.normal(4, 333)) for n in ("x", "mean", "location")}
    return rows | {"std": m.strided(0.25 + m.normal(4, 333).abs())}


def paired_gaussians(m: Maker) -> Tensors:
    """Each of three rows under each of two Gaussians."""
    inputs = gaussians(m, 2, 257)
    return inputs | {"x": m.store(m.normal(3, 1, 257))}


def masked_gaussians(m: Maker) -> Tensors:
    """NaN, or a deviation of 0, where a row does not count."""
    inputs = gaussians(m, 6, 129)
    inputs["x"][1], inputs["mean"][4], inputs["std"][4] = math.nan, math.nan, 0.0
    return inputs | {"mask": torch.tensor([True, False, True, True, False, True]).to(m.device)}


def noise(m: Maker, *shape: int) -> Tensors:
    inputs = gaussians(m, *shape)
    seed = torch.tensor([1 << 40 | 7]).to(m.device)
    return {n: inputs[n] for n in ("x", "mean", "std")} | {"seed": seed}


def masked_noise(m: Maker) -> Tensors:
    """Rows of zeros, of which two stay that."""
    inputs = noise(m, 6, 129)
    inputs["mean"][1], inputs["std"][4] = math.nan, math.nan
    mask = torch.tensor([True, False, True, True, False, True]).to(m.device)
    return inputs | {"x": torch.zeros_like(inputs["x"]), "mask": mask}


def head(m: Maker, *shape: int, vocab: int = 253, names: tuple[str, str, str] = HEAD) -> Tensors:
    """Hidden states of `shape` and a head whose logits have a deviation of 3."""
    width = shape[-1]
    return {
        names[0]: m.store(m.normal(*shape)),
        names[1]: m.store(m.normal(vocab, width, scale=3 / math.sqrt(width))),
        names[2]: m.store(m.normal(vocab)),
    }


def as_head(m: Maker, z: Tensor, names: tuple[str, str, str] = HEAD) -> Tensors:
    """Logits z [N, V] as a head: hidden states that pick a column each, so that z comes out."""
    return {names[0]: m.store(torch.eye(len(z))), names[1]: m.store(z.T.contiguous())}


def head_and_labels(m: Maker) -> Tensors:
    ids = {"labels": m.ids(253, 5), "contrast": m.ids(253, 5)}
    return head(m, 5, 33) | ids | {"bag_weights": m.normal(253).to(m.device)}


def head_of_ignored_rows(m: Maker) -> Tensors:
    inputs = head_and_labels(m)
    inputs["labels"][1::2] = IGNORED
    inputs["hidden"][1::2] = math.nan
    return inputs


def certain_head(m: Maker) -> Tensors:
    inputs = certain_rows(m)
    return inputs | as_head(m, inputs.pop("logits").float().cpu())


def label_row(t: Tensors) -> Tensor:
    """Where the matrix [V, N] of `as_head` makes the logit of a row's label."""
    return F.one_hot(t["labels"], t["matrix"].shape[0]).bool().T


def head_and_target(m: Maker) -> Tensors:
    """Students [3, 4, D] of one teacher's logits."""
    return head(m, 3, 4, 33) | {"target_logits": m.store(m.normal(4, 253, scale=3.0))}


def two_heads(m: Maker) -> Tensors:
    """A student and a wider teacher, NaN where the mask leaves a row out."""
    inputs = head(m, 5, 33) | head(m, 5, 40, names=TARGET_HEAD)
    inputs["hidden"][1], inputs["target_hidden"][3] = math.nan, math.nan
    return inputs | {"mask": torch.tensor([True, False, True, False, True]).to(m.device)}


def near_heads(m: Maker) -> Tensors:
    inputs = {n: z.float().cpu() for n, z in near_pair(m).items()}
    return as_head(m, inputs["logits"]) | as_head(m, inputs["target_logits"], TARGET_HEAD)


# ------------------------------------------------------------------------------------ checks


def op_checks() -> list[Check]:
    """The checks of the families of row statistics, and of the first two on LazyLogits."""
    stats = partial(Check, "vocab_stats", call=call_vocab_stats, formula=references.vocab_stats)
    two = partial(
        Check,
        "vocab_pair_stats",
        call=call_pair_stats,
        formula=references.vocab_pair_stats,
        leaves=("logits", "target_logits"),
    )
    moments = partial(
        Check,
        "row_moments",
        call=call_moments,
        formula=references.row_moments,
        leaves=("x", "y"),
    )
    gaussian = partial(
        Check,
        "gaussian_stats",
        call=call_gaussian,
        formula=references.gaussian_stats,
        leaves=("x", "mean", "location", "std"),
    )
    cloak = partial(
        Check,
        "cloak",
        call=call_cloak,
        formula=references.cloak,
        leaves=("mean", "std"),
    )
    finite_stats = tuple(n for n in (*STATS, "bag_mass") if n not in ("logit_sum", "logp_sum"))
    return [
        stats(case="odd V", make=odd_vocabulary),
        stats(case="strided", make=strided_rows),
        stats(case="offset 1e4", make=offset_rows),
        # A sum over the vocabulary is -inf there, whoever makes it.
        stats(case="-inf columns", make=banned_columns, only=finite_stats),
        stats(case="ignored rows", make=ignored_rows),
        stats(
            case="gap 40",
            make=certain_rows,
            only=("logp", "entropy"),
            truth=references.vocab_stats_certain,
            exact=("logp", "entropy"),
            exact_gradient=("logp", label_column),
            upstream=2.0**40,  # so that the gradient is no subnormal in fp16
        ),
        two(case="odd V", make=lambda m: pair(m, 5, 509)),
        two(case="strided", make=strided_pair),
        two(case="offset 1e4", make=offset_pair),
        two(case="-inf columns", make=banned_pair),
        two(case="shared target", make=lambda m: pair(m, 3, 4, 255, target=(4, 255))),
        two(case="masked rows", make=masked_pair),
        two(case="probabilities", make=probabilities, leaves=("logits",)),
        two(
            case="near target",
            make=near_pair,
            only=("kl", "reverse_kl"),
            exact=("kl", "reverse_kl"),
            gradients=False,  # p - q of stored p and q: torch's own rounding noise
        ),
        moments(case="odd D", make=lambda m: hidden(m, 6, 1001)),
        moments(case="strided", make=strided_hidden),
        moments(case="list of layers", make=layers, leaves=("x", "y", "x2", "y2")),
        moments(case="masked rows", make=masked_hidden),
        moments(
            case="x near y",
            make=near_hidden,
            call=call_distances,
            formula=references.distances,
            exact=("dd", "1 - cos"),
            gradients=False,  # of 1 - cos: fp64 arithmetic of this check, not of the op
        ),
        gaussian(case="odd D", make=lambda m: gaussians(m, 6, 1001)),
        gaussian(case="strided", make=strided_gaussians),
        gaussian(case="pairs", make=paired_gaussians),
        gaussian(case="masked rows", make=masked_gaussians),
        cloak(case="odd D", make=lambda m: noise(m, 3, 101), leaves=("x", "mean", "std")),
        cloak(case="masked rows", make=masked_noise),
        *head_checks(),
    ]


def head_checks() -> list[Check]:
    """The checks of statistics on LazyLogits: trained heads, whose gradients are made by a second
    pass over the logits, and frozen ones."""
    stats = partial(
        Check, "LazyLogits", call=call_head_stats, formula=references.head_stats, leaves=HEAD
    )
    two = partial(
        Check, "LazyLogits", call=call_head_pair_stats, formula=references.head_pair_stats
    )
    cap: dict[str, Any] = {"scale": 0.5, "softcap": 4.0, "temperature": 0.75}
    return [
        stats(case="trained", make=head_and_labels),
        stats(case="trained, ignored rows", make=head_of_ignored_rows),
        stats(
            case="trained, softcap",
            make=head_and_labels,
            call=partial(call_head_stats, **cap),
            formula=partial(references.head_stats, **cap),
            leaves=HEAD[:2],  # fp16 rounds a capped bias' gradient anywhere; torch may be lucky
        ),
        stats(
            case="frozen",
            make=head_of_ignored_rows,
            call=partial(call_head_stats, one_by_one=True),
            leaves=("hidden",),
        ),
        stats(
            case="gap 40",
            make=certain_head,
            leaves=("matrix",),
            only=("logp", "entropy"),
            truth=references.head_stats_certain,
            exact=("logp", "entropy"),
            exact_gradient=("logp", label_row),
            upstream=2.0**40,
        ),
        two(case="pair, trained", make=head_and_target, leaves=(*HEAD, "target_logits")),
        two(case="pair of heads, trained", make=two_heads, leaves=(*HEAD, *TARGET_HEAD)),
        two(
            case="pair of heads, frozen",
            make=two_heads,
            call=partial(call_head_pair_stats, one_by_one=True),
            leaves=("hidden",),
        ),
        two(
            case="pair of heads, near target",
            make=near_heads,
            only=("kl", "reverse_kl"),
            exact=("kl", "reverse_kl"),
            leaves=("hidden",),
            gradients=False,
        ),
    ]


def loss_checks() -> list[Check]:
    """The checks of the losses over the row statistics."""
    return [
        *cross_entropy_checks(),
        *linear_cross_entropy_checks(),
        *masked_cross_entropy_checks(),
        *hidden_checks(),
        Check(
            "masked_mean",
            "odd N",
            lambda m: masked_rows(m, values=m.store(m.normal(7))),
            lambda api, t, _: {"loss": api.masked_mean(t["values"], t["mask"])},
            lambda t: {"loss": reduced(statistics(t["values"]), t)},
            leaves=("values",),
        ),
        Check(
            "global_mean",
            "one process",
            lambda m: masked_rows(m, values=m.store(m.normal(7))),
            lambda api, t, _: {"loss": api.global_mean(t["values"], t["mask"])},
            lambda t: {"loss": reduced(statistics(t["values"]), t)},
            leaves=("values",),
        ),
        Check(
            "reduce_rows",
            "num_items",
            lambda m: masked_rows(m, values=m.store(m.normal(7))),
            lambda api, t, _: {
                "loss": api.reduce_rows(statistics(t["values"]), t["mask"], num_items=3)
            },
            lambda t: {"loss": reduced(statistics(t["values"]), t, "sum") / 3},
            leaves=("values",),
        ),
    ]


def loss(
    name: str,
    case: str,
    make: Callable[[Maker], Tensors],
    formula: Callable[[Tensors], Tensor],
    leaves: tuple[str, ...],
    options: dict[str, Any],
    **limits: Any,
) -> Check:
    """A check of a loss that takes the tensors of `make` and plain `options`, all by keyword."""

    def call(api: Any, t: Tensors, impl: str) -> Tensors:
        return {"loss": getattr(api, name)(**t, **options, impl=impl)}

    return Check(name, case, make, call, lambda t: {"loss": formula(t)}, leaves=leaves, **limits)


def targets(m: Maker, n_rows: int, vocab: int, **others: Tensor) -> Tensors:
    logits = m.store(m.normal(n_rows, vocab, scale=3.0))
    return {"input": logits, "target": m.ids(vocab, n_rows)} | others


def some_ignored(m: Maker) -> Tensors:
    inputs = targets(m, 7, 509)
    inputs["target"][::3] = IGNORED
    return inputs


def certain_targets(m: Maker) -> Tensors:
    inputs = certain_rows(m)
    return {"input": inputs["logits"], "target": inputs["labels"]}


def cross_entropy_checks() -> list[Check]:
    def check(case: str, make: Callable[[Maker], Tensors], **options: Any) -> Check:
        def formula(t: Tensors) -> Tensor:
            z, target = statistics(t["input"]), t["target"]
            if target.is_floating_point():
                target = statistics(target)
            weight = t["weight"].to(z.dtype) if "weight" in t else None
            return F.cross_entropy(z, target, weight, **options)

        return loss("cross_entropy", case, make, formula, ("input",), options)

    def offset(m: Maker) -> Tensors:
        return targets(m, 5, 512) | {"input": m.store(m.normal(5, 512, offset=1e4))}

    def weighted(m: Maker) -> Tensors:
        return targets(m, 6, 255, weight=(m.normal(255).abs() + 0.5).to(m.device))

    def soft(m: Maker) -> Tensors:
        inputs = probabilities(m)
        return {"input": inputs["logits"], "target": inputs["target_probs"]}

    def strided(m: Maker) -> Tensors:
        strided = m.strided(m.normal(5, 333, scale=3.0))
        return {"input": strided, "target": m.ids(333, 5, 2)[:, 0]}

    return [
        check("ignored labels", some_ignored),
        check("strided", strided, reduction="none"),
        check("offset 1e4", offset),
        check("weights, smoothing", weighted, label_smoothing=0.1),
        check("probabilities", soft, reduction="none", label_smoothing=0.1),
        loss(
            "cross_entropy",
            "gap 40",
            certain_targets,
            lambda t: F.cross_entropy(statistics(t["input"]), t["target"], reduction="none"),
            ("input",),
            {"reduction": "none"},
            truth=lambda t: {
                "loss": -references.vocab_stats_certain(
                    {"logits": t["input"], "labels": t["target"]}
                )["logp"]
            },
            exact=("loss",),
            exact_gradient=(
                "loss",
                lambda t: label_column({"logits": t["input"], "labels": t["target"]}),
            ),
            upstream=2.0**40,
        ),
    ]


def linear_cross_entropy_checks() -> list[Check]:
    names = ("input", "linear_weight", "linear_bias")

    def make(m: Maker) -> Tensors:
        target = m.ids(253, 7)
        target[::3] = IGNORED
        return head(m, 7, 33, names=names) | {"target": target}

    def check(case: str, leaves: tuple[str, ...], **options: Any) -> Check:
        def formula(t: Tensors) -> Tensor:
            z = statistics(references.head_logits(t, names=names))
            return F.cross_entropy(z, t["target"], **options)

        return loss("linear_cross_entropy", case, make, formula, leaves, options)

    return [
        check("trained", names, label_smoothing=0.1),
        check("trained, row by row", names, reduction="none"),
        check("frozen", names[:1]),
    ]


def masked_rows(m: Maker, **tensors: Tensor) -> Tensors:
    """`tensors` of 7 rows, with a mask of weights and NaN in its two rows of weight 0."""
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0, 0.25])
    for tensor in tensors.values():
        if tensor.is_floating_point():
            tensor[weights == 0] = math.nan
    return tensors | {"mask": weights.to(m.device)}


def masked_tokens(m: Maker) -> Tensors:
    logits = m.store(m.normal(7, 509, scale=3.0))
    return masked_rows(m, logits=logits) | {"target": m.ids(509, 7)}


def saturated_tokens(m: Maker) -> Tensors:
    """A loss of 12 and a cap of slope e^-12, whose usual spelling s (1 - s) keeps three digits.

    Numbers that fp32 holds exactly: a rounding of the loss by u would move the slope by 12 u.
    """
    z = torch.full((4, 64), -80.0)
    labels = m.ids(63, 4)
    z.scatter_(1, labels.cpu().unsqueeze(1), -12.0)
    z[:, 63] = 0.0
    return {"logits": m.store(z), "target": labels}


def masked_cross_entropy_checks() -> list[Check]:
    def check(case: str, make: Callable[[Maker], Tensors], **kwargs: Any) -> Check:
        limits = {k: kwargs.pop(k) for k in ("exact_gradient",) if k in kwargs}
        rows = {k: kwargs[k] for k in ("label_smoothing", "z_loss") if k in kwargs}
        cap = (
            kwargs.get("max_loss", 0.0),
            kwargs.get("ce_scaling_factor", 1.0),
            kwargs.get("cap_form", "sigmoid"),
        )

        def formula(t: Tensors) -> Tensor:
            losses = references.token_losses(t, **rows)
            if "max_loss" not in kwargs:
                return reduced(losses, t, kwargs.get("reduction", "mean"))
            if kwargs.get("cap_scope") == "token":
                return reduced(capped(losses, *cap), t, kwargs.get("reduction", "mean"))
            return capped(reduced(losses, t), *cap)

        return loss("masked_cross_entropy", case, make, formula, ("logits",), kwargs, **limits)

    def soft(m: Maker) -> Tensors:
        inputs = probabilities(m)
        return {"logits": inputs["logits"], "target": inputs["target_probs"]}

    tokens = {"max_loss": 9.0, "cap_scope": "token", "cap_form": "zero_at_zero"}
    return [
        check("mask of weights", masked_tokens),
        check("smoothing, z-loss", masked_tokens, label_smoothing=0.1, z_loss=1e-3),
        check("probabilities", soft, z_loss=1e-3),
        check("capped mean", masked_tokens, max_loss=12.0, ce_scaling_factor=0.2),
        check("capped tokens", masked_tokens, **tokens, ce_scaling_factor=0.1, reduction="none"),
        check(
            "saturated cap",
            saturated_tokens,
            max_loss=3.0,
            exact_gradient=(
                "loss",
                lambda t: label_column({"logits": t["logits"], "labels": t["target"]}),
            ),
        ),
    ]


def hidden_checks() -> list[Check]:
    both = ("x", "target")

    def odd(m: Maker) -> Tensors:
        return masked_rows(m, x=m.store(m.normal(7, 129)), target=m.store(m.normal(7, 129)))

    def at_rest(m: Maker) -> Tensors:
        """x = target in a row: its value and its gradient are 0."""
        inputs = odd(m)
        inputs["x"][0] = inputs["target"][0]
        return inputs

    def strided(m: Maker) -> Tensors:
        return {n: m.strided(m.normal(5, 333)) for n in both}

    def near(m: Maker) -> Tensors:
        inputs = near_hidden(m)
        return {"x": inputs["x"], "target": inputs["y"]}

    def distance(case: str, make: Callable[[Maker], Tensors], form: str, **limits: Any) -> Check:
        options = {"normalization": form, "reduction": "none" if limits else "mean"}

        def formula(t: Tensors) -> Tensor:
            return reduced(references.distance_rows(t, form), t, options["reduction"])

        return loss("masked_normalized_l2", case, make, formula, both, options, **limits)

    def cosine(case: str, make: Callable[[Maker], Tensors], **options: Any) -> Check:
        def formula(t: Tensors) -> Tensor:
            x, target = references.hidden_pair(t)
            rows = (references.unit(x) * references.unit(target)).sum(-1)
            rows = rows.relu() if options.get("relu") else rows
            return reduced(rows.abs() if options.get("absolute") else rows, t)

        return loss("masked_inner_product", case, make, formula, both, options)

    return [
        distance("over |target|", at_rest, "target"),
        distance("over |target|^2", at_rest, "target_sq"),
        distance("unit vectors", at_rest, "unit"),
        distance("over D", at_rest, "dim"),
        distance("strided", strided, "target"),
        distance("x near target", near, "target", exact=("loss",)),
        distance("unit, x near target", near, "unit", exact=("loss",)),
        cosine("mask of weights", odd),
        cosine("relu", odd, relu=True),
        cosine("absolute", odd, absolute=True),
        cosine("strided", strided),
    ]


def all_checks() -> list[Check]:
    """Every check, op by op."""
    return [*op_checks(), *loss_checks()]


# ---------------------------------------------------------------------------------- promises


class Broken(Exception):
    """A promise that does not hold; the message says what was seen."""


class Promise(NamedTuple):
    """A property of an op that holds or raises Broken."""

    op: str
    name: str
    test: Callable[[Any, str, str], None]  # (onepass, device, impl)
    cpu_only: bool = False


def outputs(check: Check, api: Any, t: Tensors, impl: str) -> Tensors:
    """The differentiable outputs of a call on `t`, its leaves made to require a gradient."""
    for name in check.leaves:
        t[name].requires_grad_()
    return {n: o for n, o in check.call(api, t, impl).items() if o.requires_grad}


def nothing_counts(check: Check, api: Any, device: str, impl: str) -> None:
    """Every row masked or ignored, and NaN in all of them: 0 with a live graph, gradients 0."""
    t = check.make(Maker(torch.float32, device))
    for name, tensor in t.items():
        if name in check.leaves:
            tensor.fill_(math.nan)
        elif name == "mask":
            tensor.zero_()
        elif name in ("labels", "target"):
            tensor.fill_(IGNORED)
    found = outputs(check, api, t, impl)
    if not found:
        raise Broken("the result has no graph")
    for name, output in found.items():
        if bool((output != 0).any()):
            raise Broken(f"{name} is {float(output.detach().flatten()[0])}, wanted 0")
    total = torch.stack([o.sum() for o in found.values()]).sum()
    for name, gradient in zip(
        check.leaves, torch.autograd.grad(total, [t[n] for n in check.leaves]), strict=True
    ):
        if bool((gradient != 0).any()):
            raise Broken(f"the gradient of {name} is not 0")


def no_rows(check: Check, api: Any, device: str, impl: str) -> None:
    """An empty batch gives empty or zero results, and empty gradients."""
    t = check.make(Maker(torch.float32, device))
    n_rows = t[check.leaves[0]].shape[0]
    t = {n: v[:0].clone() if v.shape[0] == n_rows else v for n, v in t.items()}
    found = outputs(check, api, t, impl)
    for name, output in found.items():
        if bool((output != 0).any()):
            raise Broken(f"{name} of no rows is {float(output.detach().flatten()[0])}, wanted 0")
    total = torch.stack([o.sum() for o in found.values()]).sum()
    torch.autograd.grad(total, [t[n] for n in check.leaves])


def same_bits(check: Check, api: Any, device: str, impl: str) -> None:
    """Twice the same bits, forward and backward, and inputs left as they were."""

    def same(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)

    runs = []
    for _ in range(2):
        t = check.make(Maker(torch.bfloat16, device))
        before = {n: v.clone() for n, v in t.items()}
        found = outputs(check, api, t, impl)
        total = torch.stack([o.sum() for o in found.values()]).sum()
        gradients = torch.autograd.grad(total, [t[n] for n in check.leaves])
        runs.append([*found.values(), *gradients])
        for name, value in before.items():
            if not same(t[name].detach(), value):
                raise Broken(f"the caller's {name} was written to")
    if not all(same(a, b) for a, b in zip(*runs, strict=True)):
        raise Broken("two equal calls differ")


def refuses_label(check: Check, api: Any, device: str, impl: str) -> None:
    """A label outside the vocabulary is an IndexError, whichever side it is out on."""
    for below in (False, True):
        t = check.make(Maker(torch.float32, device))
        of_head = next((t[name] for name in ("matrix", "linear_weight") if name in t), None)
        vocab_size = t[check.leaves[0]].shape[-1] if of_head is None else of_head.shape[0]
        bad = -1 if below else vocab_size
        t["labels" if "labels" in t else "target"][0] = bad
        try:
            check.call(api, t, impl)
        except IndexError:
            continue
        raise Broken(f"label {bad} was accepted, wanted an IndexError")


def promises() -> list[Promise]:
    """Every promise, tested on the first check of its op that has what it needs."""
    by_op: dict[str, list[Check]] = {}
    for check in all_checks():
        by_op.setdefault(check.op, []).append(check)
    maker = Maker(torch.float32, "cpu")
    found = []
    for op, checks in by_op.items():
        for check in checks:
            inputs = check.make(maker)
            labels = inputs.get("labels", inputs.get("target"))
            has_labels = labels is not None and not labels.is_floating_point()
            if "mask" in inputs or (has_labels and "weight" not in inputs):
                maskable = check
                break
        with_labels = has_labels and "labels outside the vocabulary raise IndexError"
        found += [
            Promise(op, "0 and no NaN where no row counts", partial(nothing_counts, maskable)),
            Promise(op, "an empty batch is served", partial(no_rows, maskable)),
            Promise(op, "twice the same bits, inputs untouched", partial(same_bits, checks[0])),
        ]
        if with_labels:
            found.append(Promise(op, with_labels, partial(refuses_label, maskable), cpu_only=True))
    return found
