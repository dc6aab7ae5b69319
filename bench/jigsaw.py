"""The three cross-entropies of jigsaw training: hidden states of a teacher and a student on clean
and on noisy text, under one frozen head.

Ours reads the clean teacher once for all three and never has the logits; plain torch makes all four
and compares them in three calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .schema import CAP, CAP_SLOPE, Case, Provider, Size, ours, plain, wide

if TYPE_CHECKING:
    import torch

    from .schema import Function, Inputs, Outputs

SEQUENCES = 4  # that the rows of either half are


def _inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Super batches, the clean half first; noisy teacher and clean student lie far from the clean
    teacher, the noisy student near it. A share of the positions counts for performance alone."""
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)
    sequences = SEQUENCES if size.N % SEQUENCES == 0 else 1

    def normal(rows: int, width: int) -> torch.Tensor:
        return torch.randn(rows, width, generator=generator, device=device, dtype=dtype)

    clean = normal(size.N, size.D)
    near, far, other = (normal(size.N, size.D) for _ in range(3))
    shape = (2 * sequences, -1, size.D)
    counted = torch.rand(sequences, size.N // sequences, generator=generator, device=device)
    return {
        "teacher": torch.cat([clean, clean + far]).view(shape),
        "student": torch.cat([clean + other, clean + 0.3 * near]).view(shape),
        "weight": normal(size.V, size.D).mul_(size.D**-0.5),
        "attention_mask": torch.ones_like(counted, dtype=torch.bool),
        "loss_mask": counted >= size.masked,
    }


def _eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    teacher, student = (wide(F.linear(inputs[n], inputs["weight"])) for n in ("teacher", "student"))
    half = teacher.shape[0] // 2
    clean, every = teacher[:half].detach(), inputs["attention_mask"]

    def cross_entropy(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        rows = -(F.softmax(clean, -1) * F.log_softmax(logits, -1)).sum(-1)
        return (rows * mask).sum() / mask.sum().clamp_min(1)

    protection = cross_entropy(teacher[half:], inputs["loss_mask"])
    return (
        cross_entropy(student[half:], every),
        -CAP * (CAP_SLOPE * protection).sigmoid(),
        -cross_entropy(student[:half], inputs["loss_mask"]),
    )


def _onepass(impl: str) -> Function:
    from ..jigsaw.losses import compute_jigsaw_ce_losses

    def function(inputs: Inputs) -> Outputs:
        sequences, length = inputs["loss_mask"].shape
        losses = compute_jigsaw_ce_losses(
            {
                "teacher_hidden": inputs["teacher"],
                "student_hidden": inputs["student"],
                "lm_head_weight": inputs["weight"],
            },
            sequences,
            length,
            inputs["weight"].shape[0],
            inputs["attention_mask"],
            inputs["loss_mask"],
            {},
            CAP,
            CAP_SLOPE,
            impl=impl,
        )
        return tuple(losses.values())

    return function


def _gemms() -> Function:
    """The products alone: of all four sides forward, of the three that are differentiated
    backward; the logits stand for their own gradient."""
    import torch

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx,
            teacher: torch.Tensor,
            student: torch.Tensor,
            weight: torch.Tensor,
        ) -> torch.Tensor:
            logits = [side.flatten(0, 1) @ weight.T for side in (teacher, student)]
            ctx.save_for_backward(teacher, weight, *logits)
            return weight.new_zeros(())

        @staticmethod
        def backward(
            ctx: torch.autograd.function.FunctionCtx, *upstream: torch.Tensor
        ) -> tuple[torch.Tensor | None, ...]:
            states, weight, teacher, student = ctx.saved_tensors  # type: ignore[attr-defined]
            rows = teacher.shape[0] // 2
            noisy = torch.nn.functional.pad(teacher[rows:] @ weight, (0, 0, rows, 0))
            return noisy.view_as(states), (student @ weight).view_as(states), None

    return lambda inputs: (Products.apply(inputs["teacher"], inputs["student"], inputs["weight"]),)


JIGSAW_CASE = Case(
    name="jigsaw_cross_entropies",
    what="performance, capped protection and guardrails against one teacher, a frozen head",
    inputs=_inputs,
    wrt=("teacher", "student"),
    providers=(*ours(_onepass), *plain(_eager), Provider("gemms", _gemms, floor=True)),
    upstream=(1.0, 1.0, 0.05),
    sizes={
        "cuda": (Size(2048, 128256, 4096, masked=0.25), Size(8192, 32000, 2048, masked=0.25)),
        "cpu": (Size(1024, 32000, 256, dtype="float32"), Size(1024, 32000, 256)),
    },
    has_roofline=False,
)
