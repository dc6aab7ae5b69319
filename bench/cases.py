"""What is timed: for each case its inputs, its sizes, its providers and the bytes it must move.

A provider is a function of the case's inputs that returns a tuple of tensors. "eager" is always
the plain torch one, and run on fp64 copies of the inputs it is also the truth that every provider
is held to before it is timed. Torch and the peers are imported when a provider is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from . import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    Inputs = dict[str, Any]
    Outputs = tuple[torch.Tensor, ...]
    Function = Callable[[Inputs], Outputs]


class NotHere(Exception):
    """A provider's reason not to run on this machine, as its table row shall say it."""


@dataclass(frozen=True)
class Size:
    """One point of a case. `N` rows of `V` logits, of `D` hidden states, or of both."""

    N: int
    V: int | None = None
    D: int | None = None
    dtype: str = "bfloat16"
    row_stride: int | None = None  # of the logits, where it is not V
    masked: float = 0.0  # share of rows whose label is -100
    students: int = 1  # rows of logits for each row of the target
    layers: int = 1  # pairs of hidden states

    @property
    def label(self) -> str:
        """The size as it is written in tables and stored in rows."""
        name = "x".join(str(n) for n in (self.N, self.D, self.V) if n is not None)
        notes = [f"{name} {self.dtype}"]
        if self.row_stride is not None:
            notes.append(f"stride {self.row_stride}")
        if self.masked:
            notes.append(f"{self.masked:.0%} masked")
        if self.students > 1:
            notes.append(f"{self.students} students")
        if self.layers > 1:
            notes.append(f"{self.layers} layers")
        return ", ".join(notes)


@dataclass(frozen=True)
class Provider:
    """One way to compute a case: `load()` imports what it needs and returns the function."""

    name: str
    load: Callable[[], Function]
    distribution: str | None = None  # a peer's name on the package index
    gpu_only: bool = False
    half_only: bool = False  # the same as eager in fp32, so listed for bf16 and fp16 alone
    compiled: bool = False  # worth a compiler run: left out of --quick
    overwrites: tuple[str, ...] = ()  # inputs that it destroys; restored before every call


@dataclass(frozen=True)
class Case:
    """A row of the benchmark."""

    name: str
    what: str
    inputs: Callable[[Size, torch.Generator], Inputs]
    wrt: tuple[str, ...]  # the inputs that get a gradient; a list of tensors counts as one
    providers: tuple[Provider, ...]
    sizes: Mapping[str, tuple[Size, ...]]  # by device type; --quick takes the first
    modes: tuple[str, ...] = ("full",)
    # Elements that any provider must read in a pass, and gradients it must write; None where
    # arithmetic and not memory sets the time.
    traffic: Callable[[Size], tuple[int, int]] | None = None
    upstream: tuple[float, ...] = (1.0,)  # for scalar outputs; per-row outputs draw theirs

    def bytes_moved(self, size: Size, mode: str) -> int | None:
        """Bytes of the big tensors that `mode` must move when its passes are separate."""
        if self.traffic is None:
            return None
        read, written = self.traffic(size)
        elements = {"forward": read, "backward": read + written, "full": 2 * read + written}[mode]
        return elements * (4 if size.dtype == "float32" else 2)

    def at(self, size: Size, dtype: str | None) -> Size:
        """`size` in another dtype, where one was asked for."""
        return size if dtype is None else replace(size, dtype=dtype)


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


def _head_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """Hidden states that point at their own label's row of the head, half of them strongly."""
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)
    weight = torch.randn(size.V, size.D, generator=generator, device=device, dtype=dtype)
    weight.mul_(size.D**-0.5)
    labels = torch.randint(size.V, (size.N,), generator=generator, device=device)
    hidden = torch.randn(size.N, size.D, generator=generator, device=device, dtype=dtype).mul_(2)
    hidden[::2] += 10 * weight[labels[::2]]
    return {"hidden": hidden, "weight": weight, "labels": labels}


# ---- plain torch: the baseline, and in fp64 the truth


def _wide(x: torch.Tensor) -> torch.Tensor:
    """fp16 and bf16 as fp32, the upcast that training code does before its loss."""
    return x.float() if x.element_size() < 4 else x


def _cross_entropy_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(_wide(inputs["logits"]), inputs["labels"]),)


def _logp_entropy_eager(inputs: Inputs) -> Outputs:
    logps = _wide(inputs["logits"]).log_softmax(-1)
    logp = logps.gather(-1, inputs["labels"][:, None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


CAP, CAP_SLOPE = 20.0, 0.2  # so that the capped loss of these inputs is neither flat nor saturated


def _bundle_eager(inputs: Inputs) -> Outputs:
    logits = _wide(inputs["logits"])
    lse = logits.logsumexp(-1)
    logps = logits - lse[:, None]
    loss = -logps.gather(-1, inputs["labels"][:, None]).mean()
    entropy = -(logps.exp() * logps).sum(-1).mean()
    return loss, lse.square().mean(), entropy, CAP * (CAP_SLOPE * loss).sigmoid()


def _soft_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(_wide(inputs["logits"]), _wide(inputs["target"])),)


def _pair_facts_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = _wide(inputs["logits"]).log_softmax(-1)
    logq = _wide(inputs["target_logits"]).log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    log_mean = ((p + q) / 2).log()

    def divergence(log_model: torch.Tensor, log_truth: torch.Tensor) -> torch.Tensor:
        return F.kl_div(log_model, log_truth, reduction="none", log_target=True).sum(-1)

    jsd = (divergence(log_mean, logq) + divergence(log_mean, logp)) / 2
    return -(q * logp).sum(-1), divergence(logp, logq), divergence(logq, logp), jsd


def _kl_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = _wide(inputs["logits"]).log_softmax(-1)
    logq = _wide(inputs["target_logits"]).log_softmax(-1)
    return (F.kl_div(logp, logq, reduction="batchmean", log_target=True),)


def _jsd_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logp = _wide(inputs["logits"]).log_softmax(-1)
    logq = _wide(inputs["target_logits"]).log_softmax(-1)
    log_mean = ((logp.exp() + logq.exp()) / 2).log()
    to_target = F.kl_div(log_mean, logq, reduction="batchmean", log_target=True)
    to_output = F.kl_div(log_mean, logp, reduction="batchmean", log_target=True)
    return ((to_target + to_output) / 2,)


def _shared_teacher_eager(inputs: Inputs) -> Outputs:
    teacher = _wide(inputs["target_logits"]).softmax(-1)
    logp = _wide(inputs["logits"]).log_softmax(-1)
    losses = -(teacher * logp).sum(-1).mean(-1)  # [students]
    return tuple(losses.unbind())


def _hidden_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    l2, cosine = [], []
    for output, target in zip(inputs["x"], inputs["target"], strict=True):
        x, y = _wide(output), _wide(target)
        l2.append(((x - y).norm(dim=-1) / y.norm(dim=-1).clamp_min(1e-6)).mean())
        cosine.append(F.cosine_similarity(x, y, dim=-1).mean())
    return sum(l2) / len(l2), sum(cosine) / len(cosine)  # type: ignore[return-value]


def _head_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    logits = F.linear(inputs["hidden"], inputs["weight"])
    return (F.cross_entropy(_wide(logits), inputs["labels"]),)


# ---- torch's own single call, in the dtype it is given


def _cross_entropy_native() -> Function:
    from torch.nn import functional as F

    return lambda inputs: (F.cross_entropy(inputs["logits"], inputs["labels"]),)


def _soft_native() -> Function:
    from torch.nn import functional as F

    return lambda inputs: (F.cross_entropy(inputs["logits"], inputs["target"]),)


def _head_native() -> Function:
    from torch import nn
    from torch.nn import functional as F

    if not hasattr(F, "linear_cross_entropy"):
        raise NotHere("F.linear_cross_entropy needs torch >= 2.13")
    options = nn.LinearCrossEntropyOptions()  # without options it is eager's two calls

    def function(inputs: Inputs) -> Outputs:
        loss = F.linear_cross_entropy(
            inputs["hidden"], inputs["weight"], inputs["labels"], options=options
        )
        return (loss,)

    return function


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


def _onepass_hidden_each() -> Function:
    import torch

    from .. import masked_inner_product, masked_normalized_l2

    def function(inputs: Inputs) -> Outputs:
        pairs = list(zip(inputs["x"], inputs["target"], strict=True))
        l2 = torch.stack([masked_normalized_l2(x, y) for x, y in pairs]).mean()
        return l2, torch.stack([masked_inner_product(x, y) for x, y in pairs]).mean()

    return function


def _onepass_head(impl: str) -> Function:
    from .. import LazyLogits, cross_entropy

    def function(inputs: Inputs) -> Outputs:
        logits = LazyLogits(inputs["hidden"], inputs["weight"])
        return (cross_entropy(logits, inputs["labels"], impl=impl),)

    return function


# ---- the table


def _compiled(function: Function) -> Callable[[], Function]:
    def load() -> Function:
        import torch

        return torch.compile(function, dynamic=False)

    return load


def _ours(load: Callable[[str], Function]) -> tuple[Provider, ...]:
    """The package as installed, and its torch path where that is another one."""
    return (
        Provider("onepass", lambda: load("auto")),
        Provider("onepass-torch", lambda: load("torch"), gpu_only=True),
    )


def _plain(function: Function) -> tuple[Provider, ...]:
    return (
        Provider("eager", lambda: function),
        Provider("compile", _compiled(function), compiled=True),
    )


def _peer(name: str, load: Callable[[], Function], **options: Any) -> Provider:
    return Provider(name, load, distribution=name, **options)


def _label_traffic(size: Size) -> tuple[int, int]:
    counted = size.N - round(size.N * size.masked)
    return counted * (size.V or 0), size.N * (size.V or 0)


def _pair_traffic(size: Size) -> tuple[int, int]:
    row = size.N * (size.V or 0)
    return (size.students + 1) * row, size.students * row


def _hidden_traffic(size: Size) -> tuple[int, int]:
    states = size.layers * size.N * (size.D or 0)
    return 2 * states, states


_CROSS_ENTROPY = (
    *_ours(_onepass_cross_entropy),
    *_plain(_cross_entropy_eager),
    Provider("native", _cross_entropy_native, half_only=True),
    _peer("liger-kernel", peers.liger_cross_entropy, gpu_only=True, overwrites=("logits",)),
    _peer("quack-kernels", peers.quack_cross_entropy, gpu_only=True),
)
_LOGP_ENTROPY = (
    *_ours(_onepass_logp_entropy),
    *_plain(_logp_entropy_eager),
    _peer("trl", peers.trl_logp_entropy),
)

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
            *_ours(_onepass_bundle),
            Provider("onepass-separate", _onepass_bundle_separate),
            *_plain(_bundle_eager),
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
            *_ours(_onepass_soft),
            *_plain(_soft_eager),
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
        providers=(*_ours(_onepass_pair_facts), *_plain(_pair_facts_eager)),
        traffic=_pair_traffic,
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
            *_ours(_onepass_pair_mean("kl")),
            *_plain(_kl_eager),
            _peer("liger-kernel", peers.liger_kl, gpu_only=True),
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
            *_ours(_onepass_pair_mean("jsd")),
            *_plain(_jsd_eager),
            _peer("liger-kernel", peers.liger_jsd, gpu_only=True),
        ),
        traffic=_pair_traffic,
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
            *_ours(_onepass_shared_teacher),
            Provider("onepass-separate", _onepass_teacher_each),
            *_plain(_shared_teacher_eager),
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
            *_ours(_onepass_hidden),
            Provider("onepass-separate", _onepass_hidden_each),
            *_plain(_hidden_eager),
        ),
        upstream=(1.0, 0.5),
        traffic=_hidden_traffic,
        sizes={
            "cuda": (Size(8192, D=4096, layers=8), Size(2048, D=4096, layers=32)),
            "cpu": (Size(256, D=2048, dtype="float32", layers=8),),
        },
    ),
    Case(
        name="head_cross_entropy",
        what="mean cross-entropy from hidden states and the head's weight",
        inputs=_head_inputs,
        wrt=("hidden", "weight"),
        providers=(
            *_ours(_onepass_head),
            *_plain(_head_eager),
            Provider("native", _head_native),
            _peer("liger-kernel", peers.liger_head, gpu_only=True),
            _peer("cut-cross-entropy", peers.cce_head),
            _peer("quack-kernels", peers.quack_head, gpu_only=True),
            _peer("trl", peers.trl_head),
        ),
        sizes={
            "cuda": (Size(8192, 128256, 4096), Size(1024, 128256, 4096)),
            "cpu": (Size(256, 32000, 256, dtype="float32"),),
        },
    ),
)


def case(name: str) -> Case:
    """The case called `name`."""
    return next(case for case in CASES if case.name == name)


def provider_names() -> tuple[str, ...]:
    """Every provider of any case, in the order of the tables."""
    return tuple(dict.fromkeys(p.name for case in CASES for p in case.providers))
