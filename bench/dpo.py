"""A DPO step from hidden states: the sigmoid loss of pairs under one frozen head, and its gradient.

With the reference: both models' hidden states, as under an adapter whose reference is the same
model without it. Without: the reference's log-probabilities came with the data.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .peers import liger_dpo, trl_dpo
from .schema import Case, Provider, Size, ours, peer, plain, wide

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .schema import Function, Inputs, Outputs

SEQUENCES = 16  # eight pairs: the chosen answers, then the rejected ones
BETA = 0.1


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Labels stand beside the hidden states that predict them; a share of them is prompt, at the
    start of every sequence. The policy lies near its reference."""
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)
    length = size.N // SEQUENCES

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    reference = normal(SEQUENCES, length, size.D)
    labels = torch.randint(size.V, (SEQUENCES, length), generator=generator, device=device)
    labels[:, : round(length * size.masked)] = -100
    inputs = {
        "hidden": reference + 0.05 * normal(SEQUENCES, length, size.D),
        "reference": reference,
        "weight": normal(size.V, size.D).mul_(size.D**-0.5),
        "labels": labels,
    }
    with torch.no_grad():
        inputs["reference_logps"] = torch.cat(
            [
                _logps(reference[n : n + 1], inputs["weight"], labels[n : n + 1])
                for n in range(SEQUENCES)
            ]
        )
    return inputs


def _logps(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    from torch.nn import functional as F

    logps = wide(F.linear(hidden, weight)).log_softmax(-1)
    counts = labels != -100
    at = logps.gather(-1, labels.clamp_min(0)[..., None]).squeeze(-1)
    return (at * counts).sum(-1)


def _reference_eager(inputs: Inputs, given: bool) -> torch.Tensor:
    import torch

    if given:
        logps: torch.Tensor = inputs["reference_logps"]
        return logps
    with torch.no_grad():
        return _logps(inputs["reference"], inputs["weight"], inputs["labels"])


def _eager(given: bool) -> Function:
    def function(inputs: Inputs) -> Outputs:
        from torch.nn import functional as F

        policy = _logps(inputs["hidden"], inputs["weight"], inputs["labels"])
        chosen, rejected = (policy - _reference_eager(inputs, given)).chunk(2)
        return (-F.logsigmoid(BETA * (chosen - rejected)).mean(),)

    return function


def _onepass(given: bool) -> Callable[[str], Function]:
    def load(impl: str) -> Function:
        import torch

        from ..dpo import dpo_loss, sequence_logps
        from ..lazy_logits import LazyLogits

        def logps(inputs: Inputs, name: str) -> torch.Tensor:
            logits = LazyLogits(inputs[name], inputs["weight"])
            return sequence_logps(logits, inputs["labels"], shift=False, impl=impl).logps

        def function(inputs: Inputs) -> Outputs:
            chosen, rejected = logps(inputs, "hidden").chunk(2)
            with torch.no_grad():
                reference = inputs["reference_logps"] if given else logps(inputs, "reference")
            loss = dpo_loss(chosen, rejected, *reference.chunk(2), beta=BETA)
            return (loss.losses.mean(),)

        return function

    return load


def _gemms(given: bool) -> Function:
    """The products alone: of the policy forward and backward, of the reference forward; the logits
    stand for their own gradient."""
    import torch

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx,
            hidden: torch.Tensor,
            reference: torch.Tensor,
            weight: torch.Tensor,
        ) -> torch.Tensor:
            if not given:
                reference.flatten(0, 1) @ weight.T
            ctx.save_for_backward(hidden, weight, hidden.flatten(0, 1) @ weight.T)
            return weight.new_zeros(())

        @staticmethod
        def backward(
            ctx: torch.autograd.function.FunctionCtx, *upstream: torch.Tensor
        ) -> tuple[torch.Tensor | None, ...]:
            hidden, weight, logits = ctx.saved_tensors  # type: ignore[attr-defined]
            return (logits @ weight).view_as(hidden), None, None

    return lambda inputs: (Products.apply(inputs["hidden"], inputs["reference"], inputs["weight"]),)


LLAMA = (128256, 4096)
SIZES = {
    "cuda": (Size(16384, *LLAMA), Size(8192, *LLAMA, masked=0.5)),
    "cpu": (Size(2048, 32000, 256, dtype="float32"), Size(2048, 32000, 256)),
}


def _case(name: str, what: str, given: bool, peers: tuple[Provider, ...]) -> Case:
    return Case(
        name=name,
        what=what,
        inputs=_inputs,
        wrt=("hidden",),
        providers=(
            *ours(_onepass(given)),
            *plain(_eager(given)),
            Provider("gemms", lambda: _gemms(given), floor=True),
            *peers,
        ),
        sizes=SIZES,
        has_roofline=False,
    )


DPO_CASES = (
    _case(
        "dpo",
        "sigmoid DPO of eight pairs, policy and reference under one frozen head",
        False,
        (
            peer("liger-kernel", lambda: liger_dpo(BETA), gpu_only=True),
            peer("trl", lambda: trl_dpo(BETA)),
        ),
    ),
    _case(
        "dpo_precomputed",
        "the same, with the reference's log-probabilities given",
        True,
        (),
    ),
)
