"""How far an op is from the truth, next to how far unfused torch is from it.

An error is counted in units: the fp32 roundoff at the scale of the result, once the rounding of
the result to its own dtype is granted. A value's scale is 1 + |value|, or what its formula names;
a gradient's is the largest of its row, or of the terms it sums up. Errors below `NOISE` units are
what torch differs by from torch in another order of summation, so they count as `NOISE`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import Broken, Check, Maker, Promise
from .errors import one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NOISE = 8.0
MAX_RATIO = 3.0
MAX_RELATIVE = 1e-6  # of the results that others lose to cancellation
UNIT = 2.0**-24
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SUBNORMAL = {torch.float16: 2.0**-24}  # the smallest step; that of the others is of no matter


class Target(NamedTuple):
    """Where the checks run: a device, and the implementation asked for on it."""

    device: str
    impl: str
    interpreted: bool = False

    def __str__(self) -> str:
        return f"{self.device}, {'Triton interpreter' if self.interpreted else self.impl}"


class Finding(NamedTuple):
    """What one output of one check showed, or `error`: what was raised or broken instead."""

    op: str
    output: str
    case: str
    target: str
    dtype: str
    forward: float | None = None  # error over torch's error
    gradient: float | None = None
    relative: float | None = None  # held to MAX_RELATIVE
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing was raised and every limit is kept (NaN keeps none)."""
        ratios = [r for r in (self.forward, self.gradient) if r is not None]
        near = self.relative is None or self.relative <= MAX_RELATIVE
        return self.error is None and near and all(r <= MAX_RATIO for r in ratios)


def keep(api: Any, promise: Promise, target: Target) -> Finding:
    """A finding without numbers: whether `promise` holds on `target`."""
    where = (promise.op, promise.name, "", str(target), "fp32")
    try:
        promise.test(api, target.device, target.impl)
    except Broken as error:
        return Finding(*where, error=one_line(error))
    except Exception as error:
        return Finding(*where, error=raised(error))
    return Finding(*where)


def measure(api: Any, check: Check, target: Target, dtype: str) -> Iterator[Finding]:
    """A finding for each output of `check`; a single one where the call itself fails."""
    try:
        yield from _measure(api, check, target, dtype)
    except Exception as error:
        yield Finding(check.op, "call", check.case, str(target), dtype, error=raised(error))


def raised(error: Exception) -> str:
    """An unexpected exception in one line."""
    return f"{type(error).__name__}: {one_line(error, 200)}"


def _measure(api: Any, check: Check, target: Target, dtype: str) -> Iterator[Finding]:
    def inputs(exact: bool = False) -> dict[str, Tensor]:
        made = check.make(Maker(DTYPES[dtype], target.device))
        if exact:
            made = {n: (t.double() if t.is_floating_point() else t).cpu() for n, t in made.items()}
        return {n: t.detach().requires_grad_(n in check.leaves) for n, t in made.items()}

    ours, plain, exact = inputs(), inputs(), inputs(exact=True)
    got = check.call(api, ours, target.impl)
    baseline, truth = check.formula(plain), check.formula(exact)
    if check.truth is not None:
        truth |= check.truth(exact)
    for output in check.only or got:
        want = truth[output].detach()
        scale = truth.get(f"scale of {output}", want.abs()) + 1
        forward = ratio(units(got[output], want, scale), units(baseline[output], want, scale))
        relative = relative_error(got[output], want) if output in check.exact else None
        gradient = None
        if check.gradients and truth[output].requires_grad:
            up = upstream(want, check)
            mine = gradients(got[output], [ours[n] for n in check.leaves], up)
            theirs = gradients(baseline[output], [plain[n] for n in check.leaves], up)
            right = gradients(truth[output], [exact[n] for n in check.leaves], up)
            gradient = 0.0
            for leaf, m, t, r in zip(check.leaves, mine, theirs, right, strict=True):
                size = r.abs().amax(-1, keepdim=True)
                if (terms := truth.get(f"terms of {output} at {leaf}")) is not None:
                    terms = terms * up.abs().reshape(*up.shape, *[1] * (terms.dim() - up.dim()))
                    while terms.dim() > r.dim():  # what several rows share: a target, a head
                        terms = terms.sum(0)
                    size = torch.maximum(size, terms.amax(-1, keepdim=True))
                # Triton's interpreter truncates to bf16 where every GPU rounds.
                steps = 2 if target.interpreted and dtype == "bf16" else 1
                gradient = max(gradient, ratio(units(m, r, size, steps), units(t, r, size)))
            if check.exact_gradient is not None and check.exact_gradient[0] == output:
                at = check.exact_gradient[1](exact)
                off = relative_error(mine[0].cpu()[at], right[0][at])
                relative = off if relative is None else max(relative, off)
        where = (check.op, output, check.case, str(target), dtype)
        yield Finding(*where, forward, gradient, relative)


def upstream(output: Tensor, check: Check) -> Tensor:
    """The gradient that arrives at an output, in fp32: never 1, and 0 in the last of many rows."""
    up = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)) * check.upstream
    if output.dim() and output.shape[-1] > 3:
        up[..., -1] = 0
    return up


def gradients(output: Tensor, leaves: Sequence[Tensor], up: Tensor) -> list[Tensor]:
    """The gradients at `leaves` of an upstream with NaN between its elements; the graph stays."""
    up = up.to(output.device, output.dtype)
    up = torch.stack([up, torch.full_like(up, math.nan)], -1)[..., 0]
    found = torch.autograd.grad(output, leaves, up, retain_graph=True, allow_unused=True)
    pairs = zip(found, leaves, strict=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in pairs]


def units(got: Tensor, want: Tensor, scale: Tensor, roundings: int = 1) -> float:
    """The largest error of `got` in units of `scale`; inf for a wrong shape, NaN or infinity."""
    if got.shape != want.shape:
        return math.inf
    value = got.detach().cpu().double()
    wanted = want.isfinite()
    if not torch.equal(value[~wanted], want[~wanted]) or not bool(value[wanted].isfinite().all()):
        return math.inf
    if not bool(wanted.any()):
        return 0.0
    grant = roundings * _grant(got.dtype, want)
    error = ((value - want).abs() - grant).clamp_min(0) / (scale.detach() * UNIT + 1e-300)
    return float(error[wanted].max())


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest error of `got` relative to `want`, its own rounding below fp32 granted."""
    value = got.detach().cpu().double()
    grant = _grant(got.dtype, want) if got.dtype in ROUNDING else 0.0
    error = ((value - want).abs() - grant).clamp_min(0) / want.abs().clamp_min(1e-30)
    return float(error.max()) if bool(value.isfinite().all()) else math.inf


def _grant(dtype: torch.dtype, want: Tensor) -> Tensor:
    """What rounding `want` to `dtype` may cost."""
    return want.abs() * ROUNDING.get(dtype, UNIT) + SUBNORMAL.get(dtype, 2.0**-126)


def ratio(ours: float, torchs: float) -> float:
    """The error of onepass over that of torch; where torch has no finite result, over noise."""
    return max(ours, NOISE) / (max(torchs, NOISE) if math.isfinite(torchs) else NOISE)
