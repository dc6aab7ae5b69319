"""Wrong calls of every public function: one line that names the argument, what came, what fits.

The line comes at once: within four frames of the caller, before an operator has begun to work, and
with every tensor as it was.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass

NAN, INF = float("nan"), float("inf")
FRAMES = 4
# A label is looked at where labels are read: inside the operator, behind torch's dispatcher, since
# torch.compile could not trace an exception that depends on a tensor's values.
FRAMES_TO_LABELS = 10


def fresh(device: str) -> SimpleNamespace:
    """Tensors that fit each other: 4 rows, 5 classes, 6 hidden units."""
    t = SimpleNamespace(
        z=torch.randn(4, 5),
        y=torch.tensor([0, 4, -100, 2]),
        q=torch.randn(4, 5).softmax(-1),
        m=torch.tensor([1.0, 0.0, 0.5, 2.0]),
        w=torch.rand(5),
        x=torch.randn(4, 6),
        t=torch.randn(4, 6),
        image=torch.randn(2, 5, 3, 3),
        pixels=torch.zeros(2, 3, 3, dtype=torch.int64),
    )
    return SimpleNamespace(**{name: tensor.to(device) for name, tensor in vars(t).items()})


def poked(tensor: Tensor, index: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[index] = value
    return tensor


@dataclass
class Wrong:
    """A call, the exception it earns, the argument to name, and what else the line has to hold."""

    call: Callable[[SimpleNamespace], object]
    error: type[Exception]
    argument: str
    words: tuple[str, ...]
    frames: int = FRAMES


def wrong(
    call: Callable[[SimpleNamespace], object],
    error: type[Exception],
    argument: str,
    *words: str,
    frames: int = FRAMES,
) -> Wrong:
    return Wrong(call, error, argument, words, frames)


# Any: what these calls get wrong, a type checker would mostly have told.
ce: Any = onepass.cross_entropy
mce: Any = onepass.masked_cross_entropy
l2: Any = onepass.masked_normalized_l2
ip: Any = onepass.masked_inner_product
mean: Any = onepass.masked_mean
stats: Any = onepass.vocab_stats
pair: Any = onepass.vocab_pair_stats
moments: Any = onepass.row_moments
gauss: Any = onepass.gaussian_stats
cloak: Any = onepass.cloak


def forward_mode(function: Any, at: torch.Tensor) -> Any:
    """Calls `function` on a dual tensor."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch scripts its own rules on the way
        with torch.autograd.forward_ad.dual_level():
            return function(torch.autograd.forward_ad.make_dual(at, torch.ones_like(at)))


LABELS = {"frames": FRAMES_TO_LABELS}
REDUCTIONS = ("mean", "sum", "none")

CROSS_ENTROPY: dict[str, Wrong] = {
    "list-of-logits": wrong(lambda t: ce([[0.0]], t.y), TypeError, "input", "list", "torch.Tensor"),
    "integer-logits": wrong(lambda t: ce(t.z.long(), t.y), ValueError, "input", "int64", "float32"),
    "bool-logits": wrong(lambda t: ce(t.z > 0, t.y), ValueError, "input", "torch.bool", "float32"),
    "complex-logits": wrong(lambda t: ce(t.z + 0j, t.y), ValueError, "input", "complex64"),
    "float8-logits": wrong(
        lambda t: ce(t.z.to(torch.float8_e4m3fn), t.y), ValueError, "input", "float8_e4m3fn"
    ),
    "scalar-logits": wrong(lambda t: ce(t.z[0, 0], t.y[0]), ValueError, "input", "scalar", "[C]"),
    "no-classes": wrong(lambda t: ce(t.z[:, :0], t.y), ValueError, "input", "(4, 0)"),
    "no-target": wrong(lambda t: ce(t.z, None), TypeError, "target", "NoneType", "torch.Tensor"),
    "list-of-labels": wrong(lambda t: ce(t.z, [1, 2, 3, 4]), TypeError, "target", "list"),
    "bool-labels": wrong(lambda t: ce(t.z, t.y > 0), ValueError, "target", "torch.bool"),
    "complex-labels": wrong(lambda t: ce(t.z, t.y + 0j), ValueError, "target", "complex64"),
    "too-few-labels": wrong(lambda t: ce(t.z, t.y[:3]), ValueError, "target", "(3,)", "(4,)"),
    "column-of-labels": wrong(lambda t: ce(t.z, t.y[:, None]), ValueError, "target", "(4, 1)"),
    "scalar-label": wrong(lambda t: ce(t.z, t.y[0]), ValueError, "target", "()", "(4,)"),
    "transposed-pixels": wrong(
        lambda t: ce(t.image[..., :2], t.pixels[:, :2]), ValueError, "target", "(2, 2, 3)"
    ),
    "probabilities-of-wrong-width": wrong(
        lambda t: ce(t.z, t.q[:, :4]), ValueError, "target", "(4, 4)", "(4, 5)"
    ),
    "label-5-of-5": wrong(
        lambda t: ce(t.z, poked(t.y, 1, 5)), IndexError, "target", "[1]", "is 5", "< 5", **LABELS
    ),
    "label-minus-3": wrong(
        lambda t: ce(t.z, poked(t.y, 3, -3)), IndexError, "target", "[3]", "is -3", **LABELS
    ),
    "label-minus-100-not-ignored": wrong(
        lambda t: ce(t.z, t.y, ignore_index=2), IndexError, "target", "[2]", "is -100", **LABELS
    ),
    "weight-list": wrong(lambda t: ce(t.z, t.y, [1.0] * 5), TypeError, "weight", "list"),
    "weight-integer": wrong(lambda t: ce(t.z, t.y, t.w.long()), ValueError, "weight", "int64"),
    "weight-short": wrong(lambda t: ce(t.z, t.y, t.w[:4]), ValueError, "weight", "(4,)", "5"),
    "weight-matrix": wrong(lambda t: ce(t.z, t.y, t.z), ValueError, "weight", "(4, 5)", "5"),
    "weight-nan": wrong(lambda t: ce(t.z, t.y, poked(t.w, 3, NAN)), ValueError, "weight", "NaN"),
    "weight-wants-gradient": wrong(
        lambda t: ce(t.z, t.y, t.w.requires_grad_()), ValueError, "weight", "detach()"
    ),
    "reduction-unknown": wrong(
        lambda t: ce(t.z, t.y, reduction="avg"), ValueError, "reduction", "'avg'", *REDUCTIONS
    ),
    "reduction-none-itself": wrong(
        lambda t: ce(t.z, t.y, reduction=None), ValueError, "reduction", "None", *REDUCTIONS
    ),
    "smoothing-above-1": wrong(
        lambda t: ce(t.z, t.y, label_smoothing=1.5), ValueError, "label_smoothing", "1.5", "1.0"
    ),
    "smoothing-below-0": wrong(
        lambda t: ce(t.z, t.y, label_smoothing=-0.1), ValueError, "label_smoothing", "-0.1", "0.0"
    ),
    "smoothing-nan": wrong(
        lambda t: ce(t.z, t.y, label_smoothing=NAN), ValueError, "label_smoothing", "nan"
    ),
    "smoothing-text": wrong(
        lambda t: ce(t.z, t.y, label_smoothing="0.1"), TypeError, "label_smoothing", "str"
    ),
    "ignore-index-for-probabilities": wrong(
        lambda t: ce(t.z, t.q, ignore_index=2), ValueError, "ignore_index", "2", "-100"
    ),
    "ignore-index-none": wrong(
        lambda t: ce(t.z, t.y, ignore_index=None), TypeError, "ignore_index", "NoneType", "int"
    ),
    "ignore-index-fraction": wrong(
        lambda t: ce(t.z, t.y, ignore_index=1.5), TypeError, "ignore_index", "float", "int"
    ),
    "impl-unknown": wrong(
        lambda t: ce(t.z, t.y, impl="cuda"), ValueError, "impl", "'cuda'", "auto", "triton", "torch"
    ),
    "impl-of-probabilities": wrong(
        lambda t: ce(t.z, t.q, impl=None), ValueError, "impl", "None", "auto", "triton", "torch"
    ),
    "triton-for-float64": wrong(
        lambda t: ce(t.z.double(), t.y, impl="triton"), ValueError, "impl", "float64", frames=5
    ),
}

MASKED_CROSS_ENTROPY: dict[str, Wrong] = {
    "list-of-logits": wrong(lambda t: mce([[0.0]], t.y), TypeError, "logits", "list"),
    "integer-logits": wrong(lambda t: mce(t.z.long(), t.y), ValueError, "logits", "int64"),
    "scalar-logits": wrong(
        lambda t: mce(t.z[0, 0], t.y[0]), ValueError, "logits", "()", "[..., V]"
    ),
    "no-vocabulary": wrong(lambda t: mce(t.z[:, :0], t.y), ValueError, "logits", "(4, 0)"),
    "no-target": wrong(lambda t: mce(t.z, None), TypeError, "target", "NoneType"),
    "bool-labels": wrong(lambda t: mce(t.z, t.y > 0), ValueError, "target", "torch.bool"),
    "complex-labels": wrong(lambda t: mce(t.z, t.y + 0j), ValueError, "target", "complex64"),
    "too-few-labels": wrong(lambda t: mce(t.z, t.y[:3]), ValueError, "target", "(3,)", "(4,)"),
    "classes-second": wrong(
        lambda t: mce(t.image, t.pixels), ValueError, "target", "(2, 3, 3)", "(2, 5, 3)"
    ),
    "probabilities-of-wrong-width": wrong(
        lambda t: mce(t.z, t.q[:, :4]), ValueError, "target", "(4, 4)", "(4, 5)"
    ),
    "probabilities-with-nan": wrong(
        lambda t: mce(t.z, poked(t.q, 1, NAN)), ValueError, "target", "NaN"
    ),
    "label-out-of-range": wrong(
        lambda t: mce(t.z, poked(t.y, 0, 77)), IndexError, "target", "[0]", "is 77", "< 5", **LABELS
    ),
    "label-in-a-batch": wrong(
        lambda t: mce(t.z.view(2, 2, 5), poked(t.y, 3, 77).view(2, 2)),
        IndexError,
        "target",
        "[1, 1]",
        "is 77",
        **LABELS,
    ),
    "mask-list": wrong(lambda t: mce(t.z, t.y, [1, 1, 1, 0]), TypeError, "mask", "list"),
    "mask-of-logits": wrong(lambda t: mce(t.z, t.y, t.z > 0), ValueError, "mask", "(4, 5)", "(4,)"),
    "mask-to-broadcast": wrong(
        lambda t: mce(t.z, t.y, t.m[:1]), ValueError, "mask", "(1,)", "(4,)"
    ),
    "mask-nan": wrong(lambda t: mce(t.z, t.y, poked(t.m, 1, NAN)), ValueError, "mask", "NaN"),
    "mask-complex": wrong(lambda t: mce(t.z, t.y, t.m + 0j), ValueError, "mask", "complex64"),
    "max-loss-0": wrong(lambda t: mce(t.z, t.y, max_loss=0), ValueError, "max_loss", "0", "None"),
    "max-loss-negative": wrong(
        lambda t: mce(t.z, t.y, max_loss=-2.5), ValueError, "max_loss", "-2.5"
    ),
    "max-loss-nan": wrong(lambda t: mce(t.z, t.y, max_loss=NAN), ValueError, "max_loss", "nan"),
    "max-loss-infinite": wrong(
        lambda t: mce(t.z, t.y, max_loss=float("inf")), ValueError, "max_loss", "inf", "None"
    ),
    "max-loss-text": wrong(lambda t: mce(t.z, t.y, max_loss="4"), TypeError, "max_loss", "str"),
    "scaling-nan": wrong(
        lambda t: mce(t.z, t.y, max_loss=4.0, ce_scaling_factor=NAN),
        ValueError,
        "ce_scaling_factor",
        "nan",
    ),
    "cap-form-unknown": wrong(
        lambda t: mce(t.z, t.y, cap_form="tanh"),
        ValueError,
        "cap_form",
        "'tanh'",
        "sigmoid",
        "zero_at_zero",
    ),
    "cap-scope-unknown": wrong(
        lambda t: mce(t.z, t.y, cap_scope="row"), ValueError, "cap_scope", "'row'", "mean", "token"
    ),
    "cap-of-no-mean": wrong(
        lambda t: mce(t.z, t.y, max_loss=4.0, reduction="none"),
        ValueError,
        "reduction",
        "none",
        'cap_scope="token"',
    ),
    "reduction-unknown": wrong(
        lambda t: mce(t.z, t.y, reduction="batchmean"), ValueError, "reduction", *REDUCTIONS
    ),
    "smoothing-above-1": wrong(
        lambda t: mce(t.z, t.y, label_smoothing=2), ValueError, "label_smoothing", "2"
    ),
    "z-loss-nan": wrong(lambda t: mce(t.z, t.y, z_loss=NAN), ValueError, "z_loss", "nan"),
    "z-loss-text": wrong(lambda t: mce(t.z, t.y, z_loss="1e-4"), TypeError, "z_loss", "str"),
    "num-items-negative": wrong(
        lambda t: mce(t.z, t.y, num_items=-1), ValueError, "num_items", "-1"
    ),
    "num-items-text": wrong(lambda t: mce(t.z, t.y, num_items="8"), TypeError, "num_items", "str"),
    "num-items-of-each-row": wrong(
        lambda t: mce(t.z, t.y, num_items=t.m), ValueError, "num_items", "(4,)"
    ),
    "ignore-index-none": wrong(
        lambda t: mce(t.z, t.y, ignore_index=None), TypeError, "ignore_index", "NoneType", "int"
    ),
    "impl-unknown": wrong(
        lambda t: mce(t.z, t.y, impl="Triton"), ValueError, "impl", "'Triton'", "triton"
    ),
    "misspelt-option": wrong(lambda t: mce(t.z, t.y, maxloss=4.0), TypeError, "maxloss"),
}

HIDDEN: dict[str, Wrong] = {
    "l2-list": wrong(lambda t: l2([1.0], t.t), TypeError, "x", "list", "torch.Tensor"),
    "l2-integer": wrong(lambda t: l2(t.x.long(), t.t.long()), ValueError, "x", "int64", "float32"),
    "l2-no-target": wrong(lambda t: l2(t.x, None), TypeError, "target", "NoneType"),
    "l2-shapes": wrong(lambda t: l2(t.x, t.t[:, :5]), ValueError, "target", "(4, 5)", "(4, 6)"),
    "l2-to-broadcast": wrong(lambda t: l2(t.x, t.t[:1]), ValueError, "target", "(1, 6)", "(4, 6)"),
    "l2-dtypes": wrong(
        lambda t: l2(t.x, t.t.bfloat16()), ValueError, "target", "float32", "bfloat16"
    ),
    "l2-devices": wrong(lambda t: l2(t.x, t.t.to("meta")), ValueError, "target", "meta"),
    "l2-scalars": wrong(lambda t: l2(t.x[0, 0], t.t[0, 0]), ValueError, "x", "[..., D]"),
    "l2-no-width": wrong(lambda t: l2(t.x[:, :0], t.t[:, :0]), ValueError, "x", "(4, 0)", "D > 0"),
    "l2-mask-shape": wrong(lambda t: l2(t.x, t.t, t.x > 0), ValueError, "mask", "(4, 6)", "(4,)"),
    "l2-mask-list": wrong(lambda t: l2(t.x, t.t, [1, 1, 0, 0]), TypeError, "mask", "list"),
    "l2-mask-nan": wrong(lambda t: l2(t.x, t.t, poked(t.m, 0, NAN)), ValueError, "mask", "NaN"),
    "l2-normalization": wrong(
        lambda t: l2(t.x, t.t, normalization="l2"),
        ValueError,
        "normalization",
        "'l2'",
        "target",
        "target_sq",
        "unit",
        "dim",
    ),
    "l2-eps-negative": wrong(lambda t: l2(t.x, t.t, eps=-1.0), ValueError, "eps", "-1.0"),
    "l2-eps-nan": wrong(lambda t: l2(t.x, t.t, eps=NAN), ValueError, "eps", "nan"),
    "l2-eps-none": wrong(lambda t: l2(t.x, t.t, eps=None), TypeError, "eps", "NoneType"),
    "l2-reduction": wrong(
        lambda t: l2(t.x, t.t, reduction="average"), ValueError, "reduction", *REDUCTIONS
    ),
    "l2-impl": wrong(lambda t: l2(t.x, t.t, impl="numpy"), ValueError, "impl", "'numpy'", "torch"),
    "ip-both-gates": wrong(
        lambda t: ip(t.x, t.t, relu=True, absolute=True), ValueError, "relu", "absolute"
    ),
    "ip-integer-target": wrong(lambda t: ip(t.x, t.t.int()), ValueError, "target", "int32"),
    "ip-shapes": wrong(lambda t: ip(t.x, t.t[:2]), ValueError, "target", "(2, 6)", "(4, 6)"),
    "ip-devices": wrong(lambda t: ip(t.x, t.t.to("meta")), ValueError, "target", "meta"),
    "ip-eps-negative": wrong(lambda t: ip(t.x, t.t, eps=-0.5), ValueError, "eps", "-0.5"),
    "ip-eps-text": wrong(lambda t: ip(t.x, t.t, eps="0"), TypeError, "eps", "str"),
    "ip-mask-nan": wrong(lambda t: ip(t.x, t.t, poked(t.m, 0, NAN)), ValueError, "mask", "NaN"),
    "ip-positional-flag": wrong(
        lambda t: ip(t.x, t.t, t.m, True), TypeError, "masked_inner_product"
    ),
    "ip-reduction": wrong(
        lambda t: ip(t.x, t.t, reduction=""), ValueError, "reduction", *REDUCTIONS
    ),
    "ip-impl": wrong(lambda t: ip(t.x, t.t, impl="numpy"), ValueError, "impl", "'numpy'", "torch"),
    "mean-of-list": wrong(lambda t: mean([1.0, 2.0]), TypeError, "values", "list", "torch.Tensor"),
    "items-of-a-sum": wrong(
        lambda t: mce(t.z, t.y, num_items=3, reduction="sum"), ValueError, "num_items", '"sum"'
    ),
    "items-nan": wrong(
        lambda t: mce(t.z, t.y, num_items=torch.tensor(NAN)), ValueError, "num_items", "nan"
    ),
    "forward-mode": wrong(
        lambda t: forward_mode(lambda z: ce(z, t.y), t.z),
        NotImplementedError,
        "input",
        "forward-mode",
        "backward",
        frames=9,
    ),
    "torch-func-grad": wrong(
        lambda t: torch.func.grad(lambda z: ce(z, t.y))(t.z),
        NotImplementedError,
        "input",
        "torch.func",
        "backward",
        frames=9,
    ),
    "torch-func-grad-hidden": wrong(
        lambda t: torch.func.grad(lambda x: l2(x, t.t))(t.x),
        NotImplementedError,
        "x",
        "torch.func",
        "backward",
        frames=9,
    ),
    "mean-of-complex": wrong(lambda t: mean(t.m + 0j), ValueError, "values", "complex64"),
    "mean-mask-list": wrong(lambda t: mean(t.m, [1, 1, 1, 0]), TypeError, "mask", "list"),
    "mean-mask-shape": wrong(lambda t: mean(t.m, t.z > 0), ValueError, "mask", "(4, 5)", "(4,)"),
    "mean-mask-to-broadcast": wrong(lambda t: mean(t.z, t.m), ValueError, "mask", "(4,)", "(4, 5)"),
    "mean-mask-nan": wrong(lambda t: mean(t.m, poked(t.m, 1, NAN)), ValueError, "mask", "NaN"),
}

OPS: dict[str, Wrong] = {
    "stats-list": wrong(lambda t: stats([[0.0]]), TypeError, "logits", "list"),
    "stats-integers": wrong(lambda t: stats(t.z.int()), ValueError, "logits", "int32", "float32"),
    "stats-scalar": wrong(lambda t: stats(t.z[0, 0]), ValueError, "logits", "()", "[..., V]"),
    "stats-no-vocabulary": wrong(
        lambda t: stats(t.z[:, :0]), ValueError, "logits", "(4, 0)", "V > 0"
    ),
    "stats-float-labels": wrong(lambda t: stats(t.z, t.y.float()), ValueError, "labels", "float32"),
    "stats-bool-labels": wrong(lambda t: stats(t.z, t.y > 0), ValueError, "labels", "torch.bool"),
    "stats-list-of-labels": wrong(lambda t: stats(t.z, [1, 2, 3, 4]), TypeError, "labels", "list"),
    "stats-label-shape": wrong(lambda t: stats(t.z, t.y[1:]), ValueError, "labels", "(3,)", "(4,)"),
    "stats-label-range": wrong(
        lambda t: stats(t.z, poked(t.y, 1, 5)), IndexError, "labels", "[1]", "is 5", **LABELS
    ),
    "stats-contrast-range": wrong(
        lambda t: stats(t.z, contrast_labels=poked(t.y, 1, -2), want="contrast_logit"),
        IndexError,
        "contrast_labels",
        "[1]",
        "is -2",
        **LABELS,
    ),
    "stats-contrast-shape": wrong(
        lambda t: stats(t.z, contrast_labels=t.y[:2]), ValueError, "contrast_labels", "(2,)", "(4,)"
    ),
    "stats-want-unknown": wrong(
        lambda t: stats(t.z, want=("perplexity",)), ValueError, "want", "'perplexity'", "entropy"
    ),
    "stats-want-number": wrong(lambda t: stats(t.z, want=5), TypeError, "want", "5"),
    "stats-logp-of-what": wrong(lambda t: stats(t.z, want=("logp",)), ValueError, "want", "labels"),
    "stats-mass-of-what": wrong(
        lambda t: stats(t.z, want=("bag_mass",)), ValueError, "want", "bag_weights"
    ),
    "stats-bag-shape": wrong(
        lambda t: stats(t.z, bag_weights=t.w[:3], want="bag_mass"),
        ValueError,
        "bag_weights",
        "(3,)",
        "(5,)",
    ),
    "stats-bag-integers": wrong(
        lambda t: stats(t.z, bag_weights=t.w.long()), ValueError, "bag_weights", "int64"
    ),
    "stats-bag-nan": wrong(
        lambda t: stats(t.z, bag_weights=poked(t.w, 0, NAN)), ValueError, "bag_weights", "NaN"
    ),
    "stats-bag-wants-gradient": wrong(
        lambda t: stats(t.z, bag_weights=t.w.requires_grad_()),
        ValueError,
        "bag_weights",
        "detach()",
    ),
    "stats-mask-shape": wrong(
        lambda t: stats(t.z, mask=t.m[:3]), ValueError, "mask", "(3,)", "(4,)"
    ),
    "stats-mask-list": wrong(lambda t: stats(t.z, mask=[True] * 4), TypeError, "mask", "list"),
    "stats-mask-inf": wrong(
        lambda t: stats(t.z, mask=poked(t.m, 1, INF)), ValueError, "mask", "inf"
    ),
    "stats-labels-elsewhere": wrong(
        lambda t: stats(t.z, t.y.to("meta")), ValueError, "labels", "meta", "move"
    ),
    "stats-sparse": wrong(lambda t: stats(t.z.to_sparse()), ValueError, "logits", "sparse"),
    "stats-gradient-of-what": wrong(
        lambda t: stats(t.z, t.y, gradient_of=("entropy",)), ValueError, "gradient_of", "entropy"
    ),
    "stats-impl": wrong(lambda t: stats(t.z, impl="gpu"), ValueError, "impl", "'gpu'", "triton"),
    "pair-alone": wrong(
        lambda t: pair(t.z), ValueError, "target_logits", "target_probs", "neither"
    ),
    "pair-both": wrong(
        lambda t: pair(t.z, t.z, target_probs=t.q), ValueError, "target_probs", "both"
    ),
    "pair-list": wrong(lambda t: pair(t.z, [[0.0]]), TypeError, "target_logits", "list"),
    "pair-integers": wrong(lambda t: pair(t.z, t.z.long()), ValueError, "target_logits", "int64"),
    "pair-shape": wrong(
        lambda t: pair(t.z, t.z[:, :4]), ValueError, "target_logits", "(4, 4)", "(4, 5)"
    ),
    "pair-target-larger": wrong(
        lambda t: pair(t.z, t.z.expand(2, 4, 5)), ValueError, "target_logits", "(2, 4, 5)", "(4, 5)"
    ),
    "pair-float64-with-float32": wrong(
        lambda t: pair(t.z, t.z.double()), ValueError, "target_logits", "float64", "float32"
    ),
    "pair-devices": wrong(lambda t: pair(t.z, t.z.to("meta")), ValueError, "target_logits", "meta"),
    "pair-want-unknown": wrong(
        lambda t: pair(t.z, t.z, want="tvd"), ValueError, "want", "'tvd'", "reverse_kl", "jsd"
    ),
    "pair-want-number": wrong(lambda t: pair(t.z, t.z, want=5), TypeError, "want", "5"),
    "pair-kl-of-probabilities": wrong(
        lambda t: pair(t.z, target_probs=t.q, want=("kl",)), ValueError, "want", "'kl'", "log()"
    ),
    "pair-probabilities-with-nan": wrong(
        lambda t: pair(t.z, target_probs=poked(t.q, 2, NAN)), ValueError, "target_probs", "NaN"
    ),
    "pair-beta-above-1": wrong(
        lambda t: pair(t.z, t.z, want="jsd", jsd_beta=1.5), ValueError, "jsd_beta", "1.5", "1"
    ),
    "pair-beta-nan": wrong(
        lambda t: pair(t.z, t.z, want="jsd", jsd_beta=NAN), ValueError, "jsd_beta", "nan"
    ),
    "pair-beta-text": wrong(lambda t: pair(t.z, t.z, jsd_beta="a"), TypeError, "jsd_beta", "str"),
    "pair-mask-shape": wrong(
        lambda t: pair(t.z, t.z, mask=t.m[:3]), ValueError, "mask", "(3,)", "(4,)"
    ),
    "pair-no-vocabulary": wrong(
        lambda t: pair(t.z[:, :0], t.z[:, :0]), ValueError, "logits", "(4, 0)", "V > 0"
    ),
    "pair-impl": wrong(lambda t: pair(t.z, t.z, impl="gpu"), ValueError, "impl", "'gpu'", "triton"),
    "moments-number": wrong(lambda t: moments(5, t.t), TypeError, "x", "int", "torch.Tensor"),
    "moments-none": wrong(lambda t: moments(t.x, None), TypeError, "y", "NoneType"),
    "moments-shapes": wrong(lambda t: moments(t.x, t.t[:3]), ValueError, "y", "(3, 6)", "(4, 6)"),
    "moments-dtypes": wrong(
        lambda t: moments(t.x, t.t.half()), ValueError, "y", "float16", "float32"
    ),
    "moments-devices": wrong(lambda t: moments(t.x, t.t.to("meta")), ValueError, "y", "meta"),
    "moments-scalars": wrong(lambda t: moments(t.x[0, 0], t.t[0, 0]), ValueError, "x", "[..., D]"),
    "moments-no-layers": wrong(lambda t: moments([], []), ValueError, "x", "0"),
    "moments-layer-counts": wrong(
        lambda t: moments([t.x, t.x], [t.t]), ValueError, "y", "2", "1", "layers"
    ),
    "moments-list-with-tensor": wrong(
        lambda t: moments([t.x], t.t), TypeError, "y", "Tensor", "list"
    ),
    "moments-tensor-with-list": wrong(
        lambda t: moments(t.x, [t.t]), TypeError, "y", "list", "Tensor"
    ),
    "moments-layers-differ": wrong(
        lambda t: moments([t.x, t.z], [t.t, t.z]), ValueError, "x", "[1]", "(4, 5)", "(4, 6)"
    ),
    "moments-layer-integer": wrong(
        lambda t: moments([t.x, t.x.int()], [t.t, t.t.int()]), ValueError, "x", "[1]", "int32"
    ),
    "moments-mask-shape": wrong(
        lambda t: moments(t.x, t.t, t.x > 0), ValueError, "mask", "(4, 6)", "(4,)"
    ),
    "moments-mask-list": wrong(
        lambda t: moments(t.x, t.t, [1, 0, 1, 0]), TypeError, "mask", "list"
    ),
    "moments-impl": wrong(lambda t: moments(t.x, t.t, impl="gpu"), ValueError, "impl", "'gpu'"),
    "gauss-integers": wrong(
        lambda t: gauss(t.x.int(), t.t, t.t), ValueError, "x", "int32", "float32"
    ),
    "gauss-widths": wrong(
        lambda t: gauss(t.x, t.t, t.t[:, :5]), ValueError, "x", "(4, 6)", "(4, 5)"
    ),
    "gauss-rows": wrong(lambda t: gauss(t.x[:3], t.t, t.t), ValueError, "x", "(3, 6)", "(4, 6)"),
    "gauss-mask": wrong(
        lambda t: gauss(t.x, t.t, t.t, t.m[:3]), ValueError, "mask", "(3,)", "(4,)"
    ),
    "cloak-std": wrong(lambda t: cloak(t.x, t.t, t.t[:3]), ValueError, "std", "(3, 6)", "(4, 6)"),
    "cloak-seed": wrong(lambda t: cloak(t.x, t.t, t.t, seed=7), TypeError, "seed", "int"),
    "cloak-forward-mode": wrong(
        lambda t: forward_mode(lambda x: cloak(x, t.t, t.t), t.x), NotImplementedError, "x"
    ),
}

CORPUS: dict[str, Wrong] = {
    f"{group}-{name}": case
    for group, cases in (
        ("cross_entropy", CROSS_ENTROPY),
        ("masked_cross_entropy", MASKED_CROSS_ENTROPY),
        ("hidden", HIDDEN),
        ("ops", OPS),
    )
    for name, case in cases.items()
}


class WorkBegan(BaseException):
    """Not an Exception, so that nothing takes it for the error that was due."""


@pytest.fixture
def at_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator may get to work; values are looked at on a GPU too."""

    def began(*args: Any) -> None:
        raise WorkBegan

    for module in ("vocab_stats", "vocab_pair_stats", "row_moments", "gaussian"):
        for implementation in ("torch", "triton"):
            monkeypatch.setattr(
                sys.modules[f"onepass.ops.{module}"], f"_forward_{implementation}", began
            )
    monkeypatch.setenv("ONEPASS_STRICT", "1")


def frames_below(traceback: TracebackType | None, code: Any) -> int:
    """How many calls lie between the line of the caller and the one that raised; `together`, which
    stands around a call and passes its errors on, is none."""
    depth, seen = 0, False
    while traceback is not None:
        around = traceback.tb_frame.f_code.co_filename.endswith("_together.py")
        depth += seen and not around
        seen = seen or traceback.tb_frame.f_code is code
        traceback = traceback.tb_next
    assert seen
    return depth


@pytest.mark.usefixtures("at_rest")
@pytest.mark.parametrize("name", CORPUS)
def test_wrong_call(name: str, device: str) -> None:
    case, tensors = CORPUS[name], fresh(device)
    before = {key: (value.clone(), value._version) for key, value in vars(tensors).items()}
    with pytest.raises(case.error) as raised:
        case.call(tensors)
    message = str(raised.value)
    assert raised.type is case.error
    assert "\n" not in message and len(message) <= 250, message
    assert re.search(rf"(?<![\w.]){re.escape(case.argument)}(?!\w)", message), (
        f"{message!r} does not name {case.argument}"
    )
    for word in case.words:
        assert word in message, f"{message!r} does not say {word!r}"
    for key, (value, version) in before.items():
        now = getattr(tensors, key)
        assert torch.equal(now, value) and now._version == version, f"{key} was written"
    depth = frames_below(raised.tb, case.call.__code__)
    assert depth <= case.frames, f"raised {depth} frames below the caller"


def test_corpus_is_wide() -> None:
    """Every public function is called wrongly, in ten ways at least but for the smallest."""
    assert len(CORPUS) >= 130
    called = " ".join(" ".join(case.call.__code__.co_names) for case in CORPUS.values()).split()
    for short in ("ce", "mce", "l2", "ip", "stats", "pair", "moments"):
        assert called.count(short) >= 10, short
    assert called.count("mean") >= 6


@pytest.mark.usefixtures("at_rest")
def test_the_right_calls_reach_the_operator(device: str) -> None:
    """Each function's healthy call gets past every check: the corpus fails for its own reasons."""
    t = fresh(device)
    for call in (
        lambda: ce(t.z, t.y, t.w, label_smoothing=0.1),
        lambda: ce(t.z, t.q),
        lambda: mce(t.z, t.y, t.m, max_loss=4.0, num_items=3, z_loss=1e-4),
        lambda: l2(t.x, t.t, t.m),
        lambda: ip(t.x, t.t, t.m, relu=True, eps=1e-8),
        lambda: stats(t.z, t.y, bag_weights=t.w, mask=t.m, want="logp_sum"),
        lambda: pair(t.z, t.z, mask=t.m, want="jsd"),
        lambda: moments([t.x, t.x], [t.t, t.t], t.m),
    ):
        with pytest.raises(WorkBegan):
            call()
    assert mean(t.m, t.m).item() > 0
