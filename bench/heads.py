"""The cases that start from hidden states [N, D] and a head [V, D]: what models train and score by.

Ours is LazyLogits, which never has all the logits at a time; what every provider of them has to
multiply at least is `gemms`, which is no loss and is not checked.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

from . import peers
from .schema import CAP, CAP_SLOPE, Case, NotHere, Provider, Size, ours, peer, plain, wide

if TYPE_CHECKING:
    import torch

    from .schema import Function, Inputs, Outputs

# ---- inputs


def _head_inputs(size: Size, generator: torch.Generator) -> Inputs:
    """A head, hidden states, labels; with the size's share of rows that do not count."""
    import torch

    hidden, weight, labels = STATES[size.inputs](size, generator)
    rows = torch.randperm(size.N, generator=generator, device=generator.device)
    labels[rows[: round(size.N * size.masked)]] = -100
    return {"hidden": hidden, "weight": weight, "labels": labels}


def _random_states(
    size: Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states that point at their own label's row of the head, half of them strongly."""
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)
    weight = torch.randn(size.V, size.D, generator=generator, device=device, dtype=dtype)
    weight.mul_(size.D**-0.5)
    labels = torch.randint(size.V, (size.N,), generator=generator, device=device)
    hidden = torch.randn(size.N, size.D, generator=generator, device=device, dtype=dtype).mul_(2)
    hidden[::2] += 10 * weight[labels[::2]]
    return hidden, weight, labels


def _trained_states(
    size: Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Drawn so that the probabilities are spread as a trained model's are; no model made them.

    Tokens have Zipf's frequencies, which the logits know (one direction of the hidden states); the
    label stands out by 4 to 20 in half of the rows and by up to 8 in the others. What skips small
    gradients finds as much to skip as on a small model's real text: README.md has the numbers.
    """
    import torch

    assert size.V is not None and size.D is not None
    device, dtype = generator.device, getattr(torch, size.dtype)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    log_frequency = -1.2 * torch.log(torch.arange(size.V, device=device) + 10.0)
    labels = torch.multinomial(log_frequency.exp(), size.N, replacement=True, generator=generator)
    weight = normal(size.V, size.D).mul_((size.D - 1) ** -0.5)
    hidden = normal(size.N, size.D).mul_(2)
    hidden[:, 0] = 8
    weight[:, 0] = (log_frequency - log_frequency.mean()) / 8
    lift = torch.rand(size.N, generator=generator, device=device)
    lift[::2] = 4 + 16 * lift[::2]
    lift[1::2] = 8 * lift[1::2]
    own = weight[labels, 1:].float()
    hidden[:, 1:] += (own * (lift / own.square().sum(-1))[:, None]).to(dtype)
    return hidden, weight, labels


DEMO_STEPS = 60


def _demo_states(
    size: Size, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of the demo's language model on text that it was not trained on, and its head.

    Real ones, of a model that is small and trained for seconds.
    """
    import torch

    try:
        from ..demo import model, settings, stages, tokens, train

        short = replace(settings.FAST, lm_steps=DEMO_STEPS)
        text = tokens.read_text(short, 0, generator.device)
        trained = model.language_model(short, text.tokenizer.get_vocab_size(), 0)
    except ImportError as error:
        raise NotHere(f"{error}: pip install 'onepass[train]'") from None
    trained.to(generator.device)
    stage = stages.language_model_stage(trained, text.train, short, 0)
    with train.one_thread():
        train.fit(
            stage,
            train.make_optimizer(stage),
            start=0,
            max_gradient_norm=short.max_gradient_norm,
            after_step=lambda *_: None,
        )
    states, following = [], []
    with torch.no_grad():
        for rows in text.held_out.values():
            counts = rows.labels != -100
            states.append(trained.model(input_ids=rows.ids).last_hidden_state[counts])
            following.append(rows.labels[counts])
    hidden, labels = torch.cat(states), torch.cat(following)
    drawn = torch.randperm(len(labels), generator=generator, device=generator.device)[: size.N]
    weight = trained.lm_head.weight.detach()
    assert (len(drawn), *weight.shape) == (size.N, size.V, size.D), "not the demo's sizes"
    dtype = getattr(torch, size.dtype)
    return hidden[drawn].to(dtype), weight.to(dtype), labels[drawn]


STATES = {"random": _random_states, "trained": _trained_states, "demo": _demo_states}

# ---- plain torch


def _logits(inputs: Inputs) -> torch.Tensor:
    from torch.nn import functional as F

    return wide(F.linear(inputs["hidden"], inputs["weight"]))


def _cross_entropy_eager(inputs: Inputs) -> Outputs:
    from torch.nn import functional as F

    return (F.cross_entropy(_logits(inputs), inputs["labels"]),)


def _logp_entropy_eager(inputs: Inputs) -> Outputs:
    logps = _logits(inputs).log_softmax(-1)
    logp = logps.gather(-1, inputs["labels"][:, None]).squeeze(-1)
    return logp, -(logps.exp() * logps).sum(-1)


def _four_losses_eager(inputs: Inputs) -> Outputs:
    logits = _logits(inputs)
    lse = logits.logsumexp(-1)
    logps = logits - lse[:, None]
    loss = -logps.gather(-1, inputs["labels"][:, None]).mean()
    entropy = -(logps.exp() * logps).sum(-1).mean()
    return loss, lse.square().mean(), entropy, CAP * (CAP_SLOPE * loss).sigmoid()


def _cross_entropy_native() -> Function:
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


def _gemms() -> Function:
    """The products alone, over the rows that count: logits, and in the backward what they lead to.

    The logits stand for their own gradient, so that nothing but the products takes time.
    """
    import torch

    class Products(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: torch.autograd.function.FunctionCtx, hidden: torch.Tensor, weight: torch.Tensor
        ) -> torch.Tensor:
            logits = hidden @ weight.T
            ctx.save_for_backward(hidden, weight, logits)
            return logits.new_zeros(())

        @staticmethod
        def backward(
            ctx: torch.autograd.function.FunctionCtx, *upstream: torch.Tensor
        ) -> tuple[torch.Tensor | None, ...]:
            hidden, weight, dlogits = ctx.saved_tensors  # type: ignore[attr-defined]
            need_hidden, need_weight = ctx.needs_input_grad  # type: ignore[attr-defined]
            return (
                dlogits @ weight if need_hidden else None,
                dlogits.T @ hidden if need_weight else None,
            )

    def function(inputs: Inputs) -> Outputs:
        hidden, counts = inputs["hidden"], inputs["labels"] != -100
        hidden = hidden if bool(counts.all()) else hidden[counts]
        return (Products.apply(hidden, inputs["weight"]),)

    return function


# ---- onepass


def _onepass_cross_entropy(impl: str) -> Function:
    from .. import LazyLogits, cross_entropy

    def function(inputs: Inputs) -> Outputs:
        logits = LazyLogits(inputs["hidden"], inputs["weight"])
        return (cross_entropy(logits, inputs["labels"], impl=impl),)

    return function


def _onepass_logp_entropy(impl: str) -> Function:
    from .. import LazyLogits, vocab_stats

    def function(inputs: Inputs) -> Outputs:
        logits = LazyLogits(inputs["hidden"], inputs["weight"])
        stats = vocab_stats(logits, inputs["labels"], want=("logp", "entropy"), impl=impl)
        return stats.logp, stats.entropy

    return function


def _onepass_four_losses(impl: str) -> Function:
    from .. import LazyLogits, vocab_stats

    def function(inputs: Inputs) -> Outputs:
        logits = LazyLogits(inputs["hidden"], inputs["weight"])
        stats = vocab_stats(logits, inputs["labels"], want=("logp", "lse", "entropy"), impl=impl)
        loss = -stats.logp.mean()
        capped = CAP * (CAP_SLOPE * loss).sigmoid()
        return loss, stats.lse.square().mean(), stats.entropy.mean(), capped

    return function


def _onepass_four_separate() -> Function:
    from .. import LazyLogits, cross_entropy, masked_cross_entropy, vocab_stats

    def function(inputs: Inputs) -> Outputs:
        logits, labels = LazyLogits(inputs["hidden"], inputs["weight"]), inputs["labels"]
        return (
            cross_entropy(logits, labels),
            vocab_stats(logits, want=("lse",)).lse.square().mean(),
            vocab_stats(logits, want=("entropy",)).entropy.mean(),
            masked_cross_entropy(logits, labels, max_loss=CAP, ce_scaling_factor=CAP_SLOPE),
        )

    return function


# ---- sizes: rows by the V and D of Llama-3-8B, Qwen2.5-0.5B and 7B, Gemma-2-2B

LLAMA, QWEN_SMALL, QWEN, GEMMA = (128256, 4096), (151936, 896), (152064, 3584), (256000, 2304)
MODELS = (LLAMA, QWEN_SMALL, QWEN, GEMMA)
BATCHES = (8192, 1024, 4096, 256)
MASKED = (0.8, 0.5, 0.95)


def _sizes(*first: Size) -> dict[str, tuple[Size, ...]]:
    """On a GPU those that tell most, in that order; on a CPU the small one for a quick look."""
    shape = (64000, 1024)
    on_cpu = (
        Size(256, 32000, 256, dtype="float32"),
        Size(1024, *shape, dtype="float32"),
        Size(1024, *shape),
    )
    return {"cuda": first, "cpu": on_cpu}


def _more(sizes: dict[str, tuple[Size, ...]]) -> dict[str, tuple[Size, ...]]:
    """The whole table: every batch of every model, and at the largest batch masks and spreads."""
    largest, on_cpu = BATCHES[0], sizes["cpu"][1:]
    on_cuda = [Size(n, *model) for n, model in product(BATCHES, MODELS)]
    on_cuda += [Size(largest, *model, masked=m) for model, m in product(MODELS, MASKED)]
    on_cuda += [Size(largest, *model, inputs="trained") for model in MODELS]
    masked = [Size(s.N, s.V, s.D, s.dtype, masked=m) for m, s in product(MASKED, on_cpu)]
    trained = [Size(s.N, s.V, s.D, s.dtype, inputs="trained") for s in on_cpu]
    demo = Size(1024, 1024, 96, dtype="float32", inputs="demo")
    return {
        "cuda": tuple(size for size in (*on_cuda, demo) if size not in sizes["cuda"]),
        "cpu": (*masked, *trained, demo),
    }


TRAINED_HEAD = _sizes(
    Size(8192, *LLAMA),
    Size(1024, *LLAMA),
    Size(8192, *LLAMA, masked=0.8),
    Size(8192, *LLAMA, inputs="trained"),
    Size(8192, *LLAMA, masked=0.5),
    Size(8192, *GEMMA),
    Size(8192, *QWEN_SMALL),
)
FROZEN_HEAD = _sizes(Size(8192, *LLAMA), Size(1024, *LLAMA), Size(8192, *LLAMA, masked=0.8))
STATISTICS = _sizes(Size(8192, *LLAMA), Size(1024, *LLAMA))

# ---- the table

FLOOR = Provider("gemms", _gemms, floor=True)
_CROSS_ENTROPY = (
    *ours(_onepass_cross_entropy),
    *plain(_cross_entropy_eager),
    FLOOR,
    Provider("native-chunked", _cross_entropy_native),
    peer("liger-kernel", peers.liger_head, gpu_only=True),
    peer("cut-cross-entropy", peers.cce_head),
    peer("quack-kernels", peers.quack_head, gpu_only=True),
    peer("trl", peers.trl_head),
)


def _one_loss() -> Function:
    return _onepass_cross_entropy("auto")


def _case(
    name: str,
    what: str,
    wrt: tuple[str, ...],
    providers: tuple[Provider, ...],
    sizes: dict[str, tuple[Size, ...]],
    modes: tuple[str, ...],
    foretold: bool = False,
    upstream: tuple[float, ...] = (1.0,),
) -> Case:
    return Case(
        name=name,
        what=what,
        inputs=_head_inputs,
        wrt=wrt,
        providers=providers,
        sizes=sizes,
        more=_more(sizes),
        modes=modes,
        foretold=foretold,
        upstream=upstream,
    )


HEAD_CASES: tuple[Case, ...] = (
    _case(
        "head_cross_entropy",
        "mean cross-entropy from hidden states and a head that is trained",
        ("hidden", "weight"),
        _CROSS_ENTROPY,
        TRAINED_HEAD,
        ("full", "forward"),
        foretold=True,
    ),
    _case(
        "head_cross_entropy_frozen",
        "the same with a frozen head, as below adapters and for attribution",
        ("hidden",),
        _CROSS_ENTROPY,
        FROZEN_HEAD,
        ("full",),
        foretold=True,
    ),
    _case(
        "head_logp_entropy",
        "log-probability and entropy of every row from hidden states and a frozen head",
        ("hidden",),
        (
            *ours(_onepass_logp_entropy),
            *plain(_logp_entropy_eager),
            FLOOR,
            peer("trl", peers.trl_head_logp_entropy),
        ),
        STATISTICS,
        ("forward", "full"),
    ),
    _case(
        "head_four_losses",
        "cross-entropy, z-loss, entropy and capped cross-entropy from one trained head",
        ("hidden", "weight"),
        (
            *ours(_onepass_four_losses),
            Provider("onepass-separate", _onepass_four_separate),
            Provider("onepass-one-loss", _one_loss, floor=True),
            *plain(_four_losses_eager),
            FLOOR,
        ),
        STATISTICS,
        ("full", "forward"),
        upstream=(1.0, 1e-4, -0.01, 0.5),
    ),
)
