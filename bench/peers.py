"""Other packages' answers to the same cases, each called the way its own documentation calls it.

Every function here loads its package and returns a function of the case's inputs; what it raises
(not installed, needs another device) becomes a visible line of the table, never a missing one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Inputs = dict[str, Any]
    Outputs = tuple[torch.Tensor, ...]
    Function = Callable[[Inputs], Outputs]

# Import name and distribution name of each peer, for versions and for "not installed".
PACKAGES = {
    "liger-kernel": "liger_kernel",
    "quack-kernels": "quack",
    "cut-cross-entropy": "cut_cross_entropy",
    "trl": "trl",
}


def liger_cross_entropy() -> Function:
    """Liger writes the gradient over the logits it is given: the case restores them every time."""
    from liger_kernel.transformers.functional import liger_cross_entropy as cross_entropy

    return lambda inputs: (cross_entropy(inputs["logits"], inputs["labels"]),)


def _logps(logits: torch.Tensor) -> torch.Tensor:
    import torch

    return logits.log_softmax(-1, dtype=torch.float32)


def liger_kl() -> Function:
    """Forward KL, mean over rows; Liger takes log-probabilities, so its users pay log_softmax.

    In fp32, as eager does: in bf16 the log-probabilities are rounded beyond what the check allows.
    """
    from liger_kernel.transformers.functional import liger_kl_div

    def function(inputs: Inputs) -> Outputs:
        student, teacher = _logps(inputs["logits"]), _logps(inputs["target_logits"])
        return (liger_kl_div(student, teacher, reduction="batchmean", log_target=True),)

    return function


def liger_jsd() -> Function:
    """Jensen-Shannon divergence at beta 0.5, mean over rows, of log-probabilities as above."""
    from liger_kernel.transformers.functional import liger_jsd as jsd

    def function(inputs: Inputs) -> Outputs:
        student, teacher = _logps(inputs["logits"]), _logps(inputs["target_logits"])
        return (jsd(student, teacher, beta=0.5),)

    return function


def liger_head() -> Function:
    """Liger's fused linear cross-entropy."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return lambda inputs: (
        liger_fused_linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["labels"]),
    )


def quack_cross_entropy() -> Function:
    """QuACK's cross-entropy with a gradient of its own (its in-place backward is an option)."""
    from quack.cross_entropy import cross_entropy

    return lambda inputs: (cross_entropy(inputs["logits"], inputs["labels"]),)


def quack_head() -> Function:
    """QuACK's chunked linear cross-entropy, at its default chunk."""
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda inputs: (
        chunked_linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["labels"]),
    )


def cce_head() -> Function:
    """Cut Cross-Entropy: its Triton kernels on a GPU, its torch.compile path on a CPU."""
    from cut_cross_entropy import linear_cross_entropy

    def function(inputs: Inputs) -> Outputs:
        impl = "cce" if inputs["hidden"].is_cuda else "torch_compile"
        loss = linear_cross_entropy(inputs["hidden"], inputs["weight"], inputs["labels"], impl=impl)
        return (loss,)

    return function


def trl_logp_entropy() -> Function:
    """TRL's log-probability and entropy: one function since 1.16, a pair of functions before."""
    from trl.trainer import utils

    both = getattr(utils, "selective_log_softmax_and_entropy", None)
    if both is not None:
        return lambda inputs: both(inputs["logits"], inputs["labels"])
    return lambda inputs: (
        utils.selective_log_softmax(inputs["logits"], inputs["labels"]),
        utils.entropy_from_logits(inputs["logits"]),
    )


def _trl_statistics(outputs: tuple[str, ...]) -> Function:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer import utils

    chunk = getattr(utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 32768)

    def function(inputs: Inputs) -> Outputs:
        labels = inputs["labels"].clamp_min(0)  # it has no index to ignore
        result: Outputs = ChunkedLogProbFunction.apply(
            inputs["hidden"], inputs["weight"], None, labels, 1.0, chunk, None, 1.0, outputs
        )
        return result

    return function


def trl_head() -> Function:
    """TRL's chunked log-probabilities of a head, averaged over a mask as its trainers do."""
    statistics = _trl_statistics(())

    def function(inputs: Inputs) -> Outputs:
        counts = inputs["labels"] != -100
        logp = statistics(inputs)[0]
        return (-(logp * counts).sum() / counts.sum(),)

    return function


def trl_head_logp_entropy() -> Function:
    """The same with the entropy of every row."""
    statistics = _trl_statistics(("entropy",))
    return lambda inputs: statistics(inputs)[:2]


def liger_dpo(beta: float) -> Function:
    """Liger's chunked DPO, a pair at a time, its reference included. It makes the head's gradient
    whether that is asked for or not."""
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss = LigerFusedLinearDPOLoss(beta=beta)

    def function(inputs: Inputs) -> Outputs:
        weight, hidden = inputs["weight"], inputs["hidden"]
        result = loss(
            weight,
            hidden,
            inputs["labels"],
            ref_input=inputs["reference"],
            ref_weight=weight,
        )
        return (result[0],)

    return function


def trl_dpo(beta: float) -> Function:
    """TRL's chunked log-probabilities of policy and reference, summed and compared as in its
    DPOTrainer."""
    import torch
    from torch.nn import functional as F

    statistics = _trl_statistics(())

    def logps(inputs: Inputs, name: str) -> torch.Tensor:
        labels = inputs["labels"]
        rows = {
            "hidden": inputs[name].flatten(0, 1),
            "weight": inputs["weight"],
            "labels": labels.flatten(),
        }
        return (statistics(rows)[0].view_as(labels) * (labels != -100)).sum(-1)

    def function(inputs: Inputs) -> Outputs:
        chosen, rejected = logps(inputs, "hidden").chunk(2)
        with torch.no_grad():
            ref_chosen, ref_rejected = logps(inputs, "reference").chunk(2)
        return (-F.logsigmoid(beta * (chosen - ref_chosen - rejected + ref_rejected)).mean(),)

    return function
