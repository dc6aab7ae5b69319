"""What is timed: for each case its inputs, its sizes, its providers and the bytes it must move.

schema.py says what those words mean; heads.py has the cases that start from hidden states.
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from . import peers
from .dpo import DPO_CASES
from .heads import HEAD_CASES
from .jigsaw import JIGSAW_CASE
from .pplm import PPLM_CASE
from .schema import CAP, CAP_SLOPE, Case, Provider, Size, ours, peer, plain, wide
from .step_scores import STEP_SCORES_CASE

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from .schema import Function, Inputs, Outputs


TURNED_LAYERS = 2  # target layers of a circuit breaker


# ---- inputs


def _logits(size: Size, generator: torch.Generator, students: int = 1) -> torch.Tensor:
    """Normal logits with a standard deviation of 2, [N, V] or [K, N, V], with the size's stride."""
    import torch

    assert size.V is not None
    shape: tuple[int, ...] = (size.N, size.row_stride or size.V)
    if students > 1:
        shape = (students, *shape)
    dtype = getattr(torch, size.dtype)
    logits = torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)
    return logits.mul_(2)[..., : size.V]


def _label_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Logits and labels; half of the labels stand out by up to 20, as a trained model's do.

    Random logits alone keep every probability near 0 and so never show an error near 1.
    """
    import torch

    assert size.V is not None
    device = generator.device
    logits = _logits(size, generator)
    labels = torch.randint(size.V, (size.N,), generator=generator, device=device)
    lift = 20 * torch.rand(size.N, generator=generator, device=device)
    lift[1::2] = 0
    logits.scatter_add_(-1, labels[:, None], lift[:, None].to(logits.dtype))
    masked = torch.randperm(size.N, generator=generator, device=device)
    labels[masked[: round(size.N * size.masked)]] = -100
    return {"logits": logits, "labels": labels}


def _pair_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Students' logits near one teacher's, the usual state of a distillation."""
    target = _logits(size, generator)
    logits = _logits(size, generator, size.students).mul_(0.5).add_(target, alpha=0.9)
    return {"logits": logits, "target_logits": target}


def _soft_inputs(size: Size, generator: torch.Generator) -> Inputs:
    import torch

    target = _logits(size, generator).softmax(-1, dtype=torch.float32)
    return {"logits": _logits(size, generator), "target": target.to(getattr(torch, size.dtype))}


def _hidden_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """`layers` pairs of hidden states, each output near its target."""
    import torch

    assert size.D is not None
    dtype = getattr(torch, size.dtype)

    def states() -> torch.Tensor:
        shape = (size.N, size.D or 0)
        return torch.randn(shape, generator=generator, device=generator.device, dtype=dtype)

    target = [states() for _ in range(size.layers)]
    return {"x": [t + states().mul_(0.3) for t in target], "target": target}


def _gaussian_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Noisy rows beside the Gaussians that they were drawn from."""
    import torch

    shape = (size.N, size.D or 0)
    clean, mean, noise, spread = (
        torch.randn(shape, generator=generator, device=generator.device) for _ in range(4)
    )
    std = 0.1 + 0.5 * spread.abs()
    made = {"x": clean + mean + std * noise, "mean": mean, "location": clean, "std": std}
    dtype = getattr(torch, size.dtype)
    return {name: values.to(dtype) for name, values in made.items()}


def _cloak_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Embeddings, the Gaussians of their noise, a seed, and the noise that belongs to it."""
    import torch

    from ..ops._philox import Normals

    inputs = _gaussian_inputs(size, generator)
    seed = torch.tensor([20], device=generator.device)
    noise = Normals(seed).draw(0, inputs["x"].numel()).view(inputs["x"].shape)
    return {name: inputs[name] for name in ("x", "mean", "std")} | {"seed": seed, "noise": noise}


def _rerouting_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Hidden states of up to four sequences, the last tokens of each padding: all layers of prompts
    to retain, two of as many harmful ones."""
    import torch

    sequences = math.gcd(size.N, _counted(size), 4)
    retain = _hidden_inputs(size, generator)
    harmful = _hidden_inputs(dataclasses.replace(size, layers=TURNED_LAYERS), generator)
    inputs = retain | {f"harmful_{name}": layers for name, layers in harmful.items()}
    for name, layers in inputs.items():
        inputs[name] = [layer.view(sequences, -1, layer.shape[-1]) for layer in layers]
    mask = torch.ones(inputs["x"][0].shape[:-1], dtype=torch.bool, device=generator.device)
    mask[:, _counted(size) // sequences :] = False
    return inputs | {"mask": mask}


def _counted(size: Size) -> int:
    return size.N - round(size.N * size.masked)


# ---- plain torch: the baseline, and in fp64 the truth


def _cross_entropy_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(wide(inputs["logits"]), inputs["labels"]),)


def _logp_entropy_eager(inputs: Inputs) -> Outputs:
    logps = wide(inputs["logits"]).log_softmax(-1)
    logp = logps.gather(-1, inputs["labels"][:, None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def _bundle_eager(inputs: Inputs) -> Outputs:
    logits = wide(inputs["logits"])
    lse = logits.logsumexp(-1)
    logps = logits - lse[:, None]
    loss = -logps.gather(-1, inputs["labels"][:, None]).mean()
    entropy = -(logps.exp() * logps).sum(-1).mean()
    return loss, lse.square().mean(), entropy, CAP * (CAP_SLOPE * loss).sigmoid()


def _soft_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(wide(inputs["logits"]), wide(inputs["target"])),)


def _pair_facts_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = wide(inputs["logits"]).log_softmax(-1)
    logq = wide(inputs["target_logits"]).log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    log_mean = ((p + q) / 2).log()

    def divergence(log_model: torch.Tensor, log_truth: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_model, log_truth, reduction="none", log_target=True).sum(-1)

    jsd = (divergence(log_mean, logq) + divergence(log_mean, logp)) / 2
    return -(q * logp).sum(-1), divergence(logp, logq), divergence(logq, logp), jsd


def _kl_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = wide(inputs["logits"]).log_softmax(-1)
    logq = wide(inputs["target_logits"]).log_softmax(-1)
    return (F.kl_div(logp, logq, reduction="batchmean", log_target=True),)


def _jsd_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = wide(inputs["logits"]).log_softmax(-1)
    logq = wide(inputs["target_logits"]).log_softmax(-1)
    log_mean = ((logp.exp() + logq.exp()) / 2).log()
    to_target = F.kl_div(log_mean, logq, reduction="batchmean", log_target=True)
    to_output = F.kl_div(log_mean, logp, reduction="batchmean", log_target=True)
    return ((to_target + to_output) / 2,)


def _shared_teacher_eager(inputs: Inputs) -> Outputs:
    teacher = wide(inputs["target_logits"]).softmax(-1)
    logp = wide(inputs["logits"]).log_softmax(-1)
    losses = -(teacher * logp).sum(-1).mean(-1)  # [students]
    return tuple(losses.unbind())


def _hidden_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    l2, cosine = [], []
    for output, target in zip(inputs["x"], inputs["target"], strict=True):
        x, y = wide(output), wide(target)
        l2.append(((x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-6)).mean())
        cosine.append(F.cosine_similarity(x, y, dim=-1).mean())
    return sum(l2) / len(l2), sum(cosine) / len(cosine)  # type: ignore[return-value]


def _gaussian_eager(inputs: Inputs) -> Outputs:
    x, mean, location, std = (wide(inputs[n]) for n in ("x", "mean", "location", "std"))
    return ((x - location - mean) / std).square().sum(-1).mean(), std.log().sum(-1).mean()


def _cloak_eager(inputs: Inputs) -> Outputs:
    """Draws its noise, and adds that of the seed: or its result would be another one."""
    import torch

    x, mean, std = inputs["x"], inputs["mean"], inputs["std"]
    torch.randn_like(std)
    return ((x + mean + std * inputs["noise"]).to(x.dtype),)


def _rerouting_eager(inputs: Inputs) -> Outputs:
    """As published: layers stacked, masked copies, norms in fp32."""
    import torch

    x, target, mask = inputs["x"], inputs["target"], inputs["mask"]
    summed = torch.float64 if x[0].dtype == torch.float64 else torch.float32

    def norm(rows: torch.Tensor, keepdim: bool = False) -> torch.Tensor:
        return torch.norm(rows, dim=-1, p=2, keepdim=keepdim, dtype=summed)

    def stacked(layers: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        every = mask.to(x[0].dtype).repeat(len(layers), 1, 1)
        return torch.stack(layers), every

    (outputs, every), (targets, _) = stacked(x), stacked(target)
    every = every.unsqueeze(-1)
    retain = norm(outputs * every - targets * every).nanmean()
    (outputs, every), (targets, _) = map(stacked, (inputs["harmful_x"], inputs["harmful_target"]))
    outputs, targets = outputs / norm(outputs, True), targets / norm(targets, True)
    product = (outputs * targets) * every.unsqueeze(-1)
    return retain, product.sum(-1).relu().sum() / every.sum(dtype=summed)


# ---- torch's own single call, in the dtype it is given


def _cross_entropy_native() -> Function:
    from torch.nn import functional as F

    return lambda inputs: (F.cross_entropy(inputs["logits"], inputs["labels"]),)


def _soft_native() -> Function:
    from torch.nn import functional as F

    return lambda inputs: (F.cross_entropy(inputs["logits"], inputs["target"]),)


# ---- onepass


def _onepass_cross_entropy(impl: str) -> Function:
    from .. import cross_entropy

    return lambda inputs: (cross_entropy(inputs["logits"], inputs["labels"], impl=impl),)


def _onepass_logp_entropy(impl: str) -> Function:
    from .. import vocab_stats

    def function(inputs: Inputs) -> Outputs:
        stats = vocab_stats(inputs["logits"], inputs["labels"], want=("logp", "entropy"), impl=impl)
        return stats.logp, stats.entropy

    return function


def _onepass_bundle(impl: str) -> Function:
    from .. import vocab_stats

    def function(inputs: Inputs) -> Outputs:
        stats = vocab_stats(
            inputs["logits"], inputs["labels"], want=("logp", "lse", "entropy"), impl=impl
        )
        loss = -stats.logp.mean()
        capped = CAP * (CAP_SLOPE * loss).sigmoid()
        return loss, stats.lse.square().mean(), stats.entropy.mean(), capped

    return function


def _onepass_bundle_separate() -> Function:
    from .. import cross_entropy, masked_cross_entropy, vocab_stats

    def function(inputs: Inputs) -> Outputs:
        logits, labels = inputs["logits"], inputs["labels"]
        return (
            cross_entropy(logits, labels),
            vocab_stats(logits, want=("lse",)).lse.square().mean(),
            vocab_stats(logits, want=("entropy",)).entropy.mean(),
            masked_cross_entropy(logits, labels, max_loss=CAP, ce_scaling_factor=CAP_SLOPE),
        )

    return function


def _onepass_soft(impl: str) -> Function:
    from .. import cross_entropy

    return lambda inputs: (cross_entropy(inputs["logits"], inputs["target"], impl=impl),)


PAIR_FACTS = ("cross_entropy", "kl", "reverse_kl", "jsd")


def _onepass_pair_facts(impl: str) -> Function:
    from .. import vocab_pair_stats

    def function(inputs: Inputs) -> Outputs:
        stats = vocab_pair_stats(
            inputs["logits"], inputs["target_logits"], want=PAIR_FACTS, impl=impl
        )
        return tuple(getattr(stats, fact) for fact in PAIR_FACTS)

    return function


def _onepass_pair_mean(fact: str) -> Callable[[str], Function]:
    def load(impl: str) -> Function:
        from .. import vocab_pair_stats

        def function(inputs: Inputs) -> Outputs:
            stats = vocab_pair_stats(
                inputs["logits"], inputs["target_logits"], want=(fact,), impl=impl
            )
            return (getattr(stats, fact).mean(),)

        return function

    return load


def _onepass_shared_teacher(impl: str) -> Function:
    from .. import vocab_pair_stats

    def function(inputs: Inputs) -> Outputs:
        stats = vocab_pair_stats(
            inputs["logits"], inputs["target_logits"], want=("cross_entropy",), impl=impl
        )
        return tuple(stats.cross_entropy.mean(-1).unbind())

    return function


def _onepass_teacher_each() -> Function:
    from .. import vocab_pair_stats

    def function(inputs: Inputs) -> Outputs:
        target, want = inputs["target_logits"], ("cross_entropy",)
        return tuple(
            vocab_pair_stats(logits, target, want=want).cross_entropy.mean()
            for logits in inputs["logits"].unbind()
        )

    return function


def _onepass_hidden(impl: str) -> Function:
    from .. import row_moments

    def function(inputs: Inputs) -> Outputs:
        moments = row_moments(inputs["x"], inputs["target"], impl=impl)
        l2 = moments.dd.sqrt() / moments.yy.sqrt().clamp_min(1e-6)
        return l2.mean(), (moments.xy * (moments.xx * moments.yy).rsqrt()).mean()

    return function


def _onepass_gaussian(impl: str) -> Function:
    from .. import gaussian_stats

    def function(inputs: Inputs) -> Outputs:
        stats = gaussian_stats(
            inputs["x"], inputs["mean"], inputs["std"], location=inputs["location"], impl=impl
        )
        return stats.mahalanobis.mean(), stats.log_det.mean()

    return function


def _onepass_cloak(impl: str) -> Function:
    from .. import cloak

    def function(inputs: Inputs) -> Outputs:
        rows = (inputs["x"], inputs["mean"], inputs["std"])
        return (cloak(*rows, seed=inputs["seed"], impl=impl),)

    return function


def _onepass_rerouting(impl: str) -> Function:
    from ..circuit_breaker import circuit_breaker_loss, retain_loss

    def function(inputs: Inputs) -> Outputs:
        mask = inputs["mask"]
        turned, before = inputs["harmful_x"], inputs["harmful_target"]
        kept = retain_loss(inputs["x"], inputs["target"], mask, impl=impl)
        return kept, circuit_breaker_loss(turned, before, mask, impl=impl)

    return function


def _onepass_hidden_each() -> Function:
    import torch

    from .. import masked_inner_product, masked_normalized_l2

    def function(inputs: Inputs) -> Outputs:
        pairs = list(zip(inputs["x"], inputs["target"], strict=True))
        l2 = torch.stack([masked_normalized_l2(x, y) for x, y in pairs]).mean()
        return l2, torch.stack([masked_inner_product(x, y) for x, y in pairs]).mean()

    return function


# ---- the table


def _label_traffic(size: Size) -> tuple[int, int]:
    return _counted(size) * (size.V or 0), size.N * (size.V or 0)


def _pair_traffic(size: Size) -> tuple[int, int]:
    row = size.N * (size.V or 0)
    return (size.students + 1) * row, size.students * row


def _hidden_traffic(size: Size) -> tuple[int, int]:
    states = size.layers * size.N * (size.D or 0)
    return 2 * states, states


def _gaussian_traffic(size: Size) -> tuple[int, int]:
    return 4 * size.N * (size.D or 0), 3 * size.N * (size.D or 0)


def _rerouting_traffic(size: Size) -> tuple[int, int]:
    """Of the loss that holds all layers in place and of that which turns two away."""
    layers, width = size.layers + TURNED_LAYERS, size.D or 0
    return 2 * layers * _counted(size) * width, layers * size.N * width


_CROSS_ENTROPY = (
    *ours(_onepass_cross_entropy),
    *plain(_cross_entropy_eager),
    Provider("native", _cross_entropy_native, half_only=True),
    peer("liger-kernel", peers.liger_cross_entropy, gpu_only=True, overwrites=("logits",)),
    peer("quack-kernels", peers.quack_cross_entropy, gpu_only=True),
)
_LOGP_ENTROPY = (
    *ours(_onepass_logp_entropy),
    *plain(_logp_entropy_eager),
    peer("trl", peers.trl_logp_entropy),
)

# 32000, one token more, GPT-2, Llama 3, Qwen 2.5 without its padding, Gemma 2
VOCABULARIES = (32000, 32001, 50257, 128256, 151643, 256000)

CASES: tuple[Case, ...] = (
    Case(
        name="cross_entropy",
        what="mean cross-entropy of integer labels",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=_CROSS_ENTROPY,
        modes=("forward", "full"),
        traffic=_label_traffic,
        sizes={
            "cuda": (
                Size(8192, 128256),
                Size(8192, 151936),
                Size(1024, 128256),
                Size(4096, 50257),  # GPT-2: an odd number of columns and an odd stride
                Size(4096, 50257, row_stride=50304),  # the same, in padded rows
                Size(4096, 32001),  # one token was added to 32000
                Size(8192, 32000, dtype="float32"),
            ),
            "cpu": (
                Size(256, 32000, dtype="float32"),
                Size(128, 50257),
                Size(256, 32001, dtype="float32", row_stride=32064),
            ),
        },
    ),
    *HEAD_CASES,  # early: a time limit takes the last of each turn
    Case(
        name="every_vocabulary",
        what="the same for vocabularies and batches of any size: GB/s should not depend on them",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=(*ours(_onepass_cross_entropy), plain(_cross_entropy_eager)[0]),
        traffic=_label_traffic,
        sizes={
            "cuda": tuple(Size(4096, vocab_size) for vocab_size in VOCABULARIES),
            "cpu": (
                Size(64, 32001, dtype="float32"),
                Size(64, 32000, dtype="float32"),
            ),
        },
        more={
            "cuda": tuple(
                Size(n, v, row_stride=stride)
                for v in (32000, 50257)
                for stride in (None, v + 1 + v % 2)
                for n in (1, 16, 256, 16384)
            )
        },
    ),
    Case(
        name="masked_cross_entropy",
        what="mean cross-entropy where most rows do not count",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=_CROSS_ENTROPY,
        traffic=_label_traffic,
        sizes={
            "cuda": (Size(8192, 128256, masked=0.8), Size(8192, 128256, masked=0.5)),
            "cpu": (
                Size(256, 32000, dtype="float32", masked=0.8),
                Size(256, 32000, dtype="float32", masked=0.5),
            ),
        },
    ),
    Case(
        name="logp_entropy",
        what="log-probability of a label and entropy, for every row",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=_LOGP_ENTROPY,
        modes=("forward",),
        traffic=_label_traffic,
        sizes={
            "cuda": (Size(8192, 151936), Size(4096, 50257)),
            "cpu": (Size(256, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="generation_rows",
        what="log-probability and entropy of the few rows that a generation step makes",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=_LOGP_ENTROPY,
        modes=("forward",),
        traffic=_label_traffic,
        sizes={
            "cuda": tuple(Size(n, 151936) for n in (1, 4, 8)),
            "cpu": tuple(Size(n, 151936, dtype="float32") for n in (1, 4, 8)),
        },
    ),
    Case(
        name="loss_bundle",
        what="cross-entropy, z-loss, entropy and capped cross-entropy of the same logits",
        inputs=_label_inputs,
        wrt=("logits",),
        providers=(
            *ours(_onepass_bundle),
            Provider("onepass-separate", _onepass_bundle_separate),
            *plain(_bundle_eager),
        ),
        upstream=(1.0, 1e-4, -0.01, 0.5),
        traffic=_label_traffic,
        sizes={
            "cuda": (Size(8192, 128256),),
            "cpu": (Size(256, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="soft_cross_entropy",
        what="mean cross-entropy of target probabilities",
        inputs=_soft_inputs,
        wrt=("logits",),
        providers=(
            *ours(_onepass_soft),
            *plain(_soft_eager),
            Provider("native", _soft_native, half_only=True),
        ),
        traffic=_pair_traffic,
        sizes={
            "cuda": (Size(4096, 128256),),
            "cpu": (Size(128, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="pair_stats",
        what="soft cross-entropy, KL, reverse KL and JSD to a teacher, for every row",
        inputs=_pair_inputs,
        wrt=("logits",),
        providers=(*ours(_onepass_pair_facts), *plain(_pair_facts_eager)),
        traffic=_pair_traffic,
        launches=(3, 1),
        passes=2,  # the mean of two softmaxes is known once both are
        sizes={
            "cuda": (Size(2048, 128256),),
            "cpu": (Size(128, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="kl",
        what="mean KL divergence to a teacher",
        inputs=_pair_inputs,
        wrt=("logits",),
        providers=(
            *ours(_onepass_pair_mean("kl")),
            *plain(_kl_eager),
            peer("liger-kernel", peers.liger_kl, gpu_only=True),
        ),
        traffic=_pair_traffic,
        sizes={
            "cuda": (Size(4096, 128256),),
            "cpu": (Size(128, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="jsd",
        what="mean Jensen-Shannon divergence to a teacher",
        inputs=_pair_inputs,
        wrt=("logits",),
        providers=(
            *ours(_onepass_pair_mean("jsd")),
            *plain(_jsd_eager),
            peer("liger-kernel", peers.liger_jsd, gpu_only=True),
        ),
        traffic=_pair_traffic,
        launches=(3, 1),
        passes=2,  # the mean of two softmaxes is known once both are
        sizes={
            "cuda": (Size(4096, 128256),),
            "cpu": (Size(128, 32000, dtype="float32"),),
        },
    ),
    Case(
        name="shared_teacher",
        what="soft cross-entropy of three students against one teacher",
        inputs=_pair_inputs,
        wrt=("logits",),
        providers=(
            *ours(_onepass_shared_teacher),
            Provider("onepass-separate", _onepass_teacher_each),
            *plain(_shared_teacher_eager),
        ),
        upstream=(1.0, -0.5, -0.25),  # performance, protection, guardrails
        traffic=_pair_traffic,
        sizes={
            "cuda": (Size(2048, 128256, students=3),),
            "cpu": (Size(64, 32000, dtype="float32", students=3),),
        },
    ),
    Case(
        name="hidden_losses",
        what="normalized L2 and normalized inner product of hidden states, over layers",
        inputs=_hidden_inputs,
        wrt=("x",),
        providers=(
            *ours(_onepass_hidden),
            Provider("onepass-separate", _onepass_hidden_each),
            *plain(_hidden_eager),
        ),
        upstream=(1.0, 0.5),
        traffic=_hidden_traffic,
        launches=(1, 1),
        sizes={
            "cuda": (Size(8192, D=4096, layers=8), Size(2048, D=4096, layers=32)),
            "cpu": (Size(256, D=2048, dtype="float32", layers=8),),
        },
    ),
    Case(
        name="gaussian_stats",
        what="Mahalanobis distance and log-determinant of noisy rows under their Gaussians",
        inputs=_gaussian_inputs,
        wrt=("x", "mean", "std"),
        providers=(*ours(_onepass_gaussian), *plain(_gaussian_eager)),
        upstream=(0.5, 1.0),
        traffic=_gaussian_traffic,
        launches=(1, 1),
        sizes={
            "cuda": (Size(8192, D=4096), Size(8192, D=4096, dtype="float32")),
            "cpu": (Size(1024, D=2048, dtype="float32"), Size(1024, D=2048)),
        },
    ),
    Case(
        name="cloak",
        what="rows with Gaussian noise added, its gradient drawn again and not kept",
        inputs=_cloak_inputs,
        wrt=("mean", "std"),
        providers=(*ours(_onepass_cloak), *plain(_cloak_eager)),
        modes=("forward", "full"),
        has_roofline=False,  # its gradient reads what comes in, and not its inputs again
        sizes={
            "cuda": (Size(8192, D=4096), Size(8192, D=4096, dtype="float32")),
            "cpu": (Size(1024, D=2048, dtype="float32"), Size(1024, D=2048)),
        },
    ),
    Case(
        name="circuit_breaker",
        what="retain loss of all layers and circuit-breaker loss of two, hidden states of prompts",
        inputs=_rerouting_inputs,
        wrt=("x", "harmful_x"),
        providers=(*ours(_onepass_rerouting), *plain(_rerouting_eager)),
        upstream=(1.0, 0.5),
        traffic=_rerouting_traffic,
        launches=(2, 2),
        sizes={
            "cuda": (
                Size(8192, D=4096, layers=9, masked=0.25),
                Size(2048, D=4096, layers=33, masked=0.25),
            ),
            "cpu": (
                Size(1024, D=512, dtype="float32", layers=9, masked=0.25),
                Size(1024, D=512, layers=9, masked=0.25),
                Size(1024, D=512, dtype="float32", layers=9),
            ),
        },
    ),
    JIGSAW_CASE,
    *DPO_CASES,
    STEP_SCORES_CASE,
    PPLM_CASE,
)


def case(name: str) -> Case:
    """The case called `name`."""
    return next(case for case in CASES if case.name == name)


def provider_names() -> tuple[str, ...]:
    """Every provider of any case, in the order of the tables."""
    return tuple(dict.fromkeys(p.name for case in CASES for p in case.providers))
