"""Six scores of every token of a text, from hidden states and a head: what attribution tools log.

`eager` makes all logits once and each score apart. `step-by-step` is what a tool does that scores
while it generates: for each token the head over all that came before, of which the last row counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .schema import Case, Provider, Size, ours, plain, wide

if TYPE_CHECKING:
    import torch

    from .schema import Function, Inputs, Outputs

NAMES = (
    *("logit", "probability", "entropy", "crossentropy", "perplexity"),
    "contrast_prob_diff",
)


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)

    def tokens() -> torch.Tensor:
        assert size.V is not None
        return torch.randint(size.V, (size.N,), generator=generator, device=device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return {
        "hidden": normal(size.N, size.D),
        "weight": normal(size.V, size.D).mul_(size.D**-0.5),
        "labels": tokens(),
        "contrast": tokens(),
    }


def _each_apart(logits: torch.Tensor, ids: torch.Tensor, contrast: torch.Tensor) -> Outputs:
    """The six of rows [n, V], each from the logits again."""

    def at(rows: torch.Tensor, which: torch.Tensor) -> torch.Tensor:
        return rows.gather(-1, which[:, None]).squeeze(-1)

    logits = wide(logits)
    logp = logits.log_softmax(-1)
    return (
        at(logits, ids),
        at(logits.softmax(-1), ids),
        -(logp.exp() * logp).sum(-1),
        -at(logits.log_softmax(-1), ids),
        (-at(logits.log_softmax(-1), ids)).exp(),
        at(logits.softmax(-1), ids) - at(logits.softmax(-1), contrast),
    )


def _eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logits = F.linear(inputs["hidden"], inputs["weight"])
    return _each_apart(logits, inputs["labels"], inputs["contrast"])


def _step_by_step(inputs: Inputs) -> Outputs:
    import torch
    from torch.nn import functional as F

    found = []
    for step in range(len(inputs["labels"])):
        logits = F.linear(inputs["hidden"][: step + 1], inputs["weight"])[-1:]
        of_step = slice(step, step + 1)
        found.append(_each_apart(logits, inputs["labels"][of_step], inputs["contrast"][of_step]))
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def _onepass(impl: str) -> Function:
    from ..lazy_logits import LazyLogits
    from ..step_functions import scores
    from ..step_functions.text import CPU_SLAB_BYTES

    def function(inputs: Inputs) -> Outputs:
        slab = CPU_SLAB_BYTES if inputs["hidden"].device.type == "cpu" else None
        logits = LazyLogits(inputs["hidden"], inputs["weight"], max_slab_bytes=slab)
        found = scores(logits, inputs["labels"], NAMES, contrast_ids=inputs["contrast"], impl=impl)
        return tuple(found[name] for name in NAMES)

    return function


STEP_SCORES_CASE = Case(
    name="step_scores",
    what="six scores of every token of a text, from hidden states and a head",
    inputs=_inputs,
    wrt=("hidden",),
    providers=(
        *ours(_onepass),
        *plain(_eager),
        Provider("step-by-step", lambda: _step_by_step),
    ),
    sizes={
        "cuda": (Size(2048, 128256, 4096),),
        "cpu": (Size(512, 50257, 64, dtype="float32"),),
    },
    modes=("forward",),
    has_roofline=False,
)
