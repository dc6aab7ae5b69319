"""Lazy heads under DeepSpeed's ZeRO: on two gloo processes, where DeepSpeed is installed (what they
do stands in support/zero_on_two.py), and with stand-ins of what DeepSpeed does to a head.
"""

from __future__ import annotations

import importlib.util
import weakref
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import onepass
from onepass import LazyLogits
from support.processes import run_processes

CASES = (
    "zero3",
    "gathers",
    "stages_1_and_2",
    "accumulation",
    "frozen_head",
    "head_alone",
    "lora",
    "checkpointing",
    "checkpointed_head",
    "own_module",
    "partitioned_before",
    "half_precision",
    "two_uses",
    "evaluation_and_later",
    "trainer",
    "bad_use",
)
NEEDED = ("deepspeed", "transformers", "accelerate", "peft")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each case and rank: what was raised there."""
    if MISSING:
        pytest.skip(f"the engine is DeepSpeed's, under models and trainers: no {MISSING[0]}")
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch was built without gloo")
    folder = tmp_path_factory.mktemp("two_processes")
    run_processes(2, "zero_on_two", folder, " ".join(CASES), str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes(case: str, answers: Path) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""


# ---------------------------------------------------------------- stand-ins

V, D = 37, 8


def in_deepspeed(function: Any) -> Any:
    """The function as one of DeepSpeed's own."""
    names, closure = {"__name__": "deepspeed.stand_in"}, function.__closure__
    return FunctionType(function.__code__, names, closure=closure)


def identity(told: list[Any]) -> Any:
    """PreBackwardFunctionForModule of deepspeed/runtime/zero/parameter_offload.py, which tells what
    gradient it got."""

    class Identity(torch.autograd.Function):
        @staticmethod
        @in_deepspeed
        def forward(outputs: Tensor) -> Tensor:
            return outputs.detach()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            told.append(grads[0])
            return grads

    return Identity


def parts() -> tuple[Tensor, nn.Parameter, nn.Parameter, Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, D, generator=generator, requires_grad=True)
    weight = nn.Parameter(torch.randn(V, D, generator=generator))
    bias = nn.Parameter(torch.randn(V, generator=generator))
    return hidden, weight, bias, torch.randint(V, (5,), generator=generator)


def of_zero3(parameter: Tensor) -> Any:
    sharded: Any = parameter
    sharded.ds_id, sharded.ds_shape = 3, parameter.shape
    sharded.ds_status = SimpleNamespace(name="AVAILABLE")
    return sharded


def release(parameter: Any) -> None:
    parameter.ds_status.name = "NOT_AVAILABLE"
    parameter.data = torch.empty(0)


def gather(parameter: Any, whole: Tensor) -> None:
    parameter.ds_status.name, parameter.data = "AVAILABLE", whole


@pytest.mark.parametrize("learns", ["all", "hidden", "weight", "bias"])
def test_gradients_pass_what_the_logits_passed(learns: str) -> None:
    """The identity's backward gathers the head: before the head's gradient and that of what the
    hidden states came from, and given nothing of the logits' size."""
    hidden, weight, bias, labels = parts()
    named = {"hidden": hidden, "weight": weight, "bias": bias}
    for name, tensor in named.items():
        tensor.requires_grad_(learns in ("all", name))
    learning = [t for t in named.values() if t.requires_grad]
    logits = functional.linear(hidden, weight, bias)
    wanted = torch.autograd.grad(functional.cross_entropy(logits, labels), learning)

    order: list[Any] = []
    lazy = LazyLogits(hidden, weight, bias)
    for _ in range(2):  # as the module's output, and its parent's
        lazy = identity(order).apply(lazy)
    for tensor in learning:
        tensor.register_post_accumulate_grad_hook(lambda _: order.append("gradient"))
    with onepass.strict():
        functional.cross_entropy(lazy, labels).backward()
    assert order == [None, None, *["gradient"] * len(learning)]
    for tensor, grad in zip(learning, wanted, strict=True):
        torch.testing.assert_close(tensor.grad, grad)


def test_what_detaches_still_does() -> None:
    hidden, weight, bias, labels = parts()
    same = identity([])
    lazy = LazyLogits(hidden, weight, bias)
    for without in (lazy.detach(), same.apply(lazy).detach(), lazy.data):
        assert not functional.cross_entropy(without, labels).requires_grad
    with torch.no_grad():
        passed = same.apply(lazy)
    assert not functional.cross_entropy(passed, labels).requires_grad
    passed = same.apply(lazy)
    with torch.inference_mode():  # whoever looks first: the graph is there
        passed.argmax(-1)
    functional.cross_entropy(passed, labels).backward()
    assert hidden.grad is not None and weight.grad is not None and bias.grad is not None


def test_probabilities_do_not_pass() -> None:
    hidden, weight, bias, _ = parts()
    probs = LazyLogits(hidden, weight, bias).softmax(-1)
    with pytest.raises(RuntimeError, match="lazy probabilities cannot pass DeepSpeed's hooks"):
        identity([]).apply(probs)
    assert not probs.detach().requires_grad
    with torch.no_grad():
        probs = LazyLogits(hidden, weight, bias).softmax(-1)
        assert torch.equal(identity([]).apply(probs).argmax(-1), probs.argmax(-1))


def test_a_hook_of_deepspeeds_scales_every_gradient() -> None:
    hidden, weight, bias, labels = parts()
    wanted = torch.autograd.grad(
        functional.cross_entropy(functional.linear(hidden, weight, bias), labels),
        [hidden, weight, bias],
    )
    for removed in (False, True):
        lazy = LazyLogits(hidden, weight, bias)
        other = functional.cross_entropy(lazy, labels)
        handle = lazy.register_hook(in_deepspeed(lambda grad: grad / 4))
        if removed:
            handle.remove()
        loss = functional.cross_entropy(lazy, labels)
        # The loss that was taken before does not pass the hook.
        grads = torch.autograd.grad(loss + 3 * other, [hidden, weight, bias])
        for grad, whole in zip(grads, wanted, strict=True):
            torch.testing.assert_close(grad, whole * (4 if removed else 3.25))


def test_a_gathered_head_is_held_when_it_is_released() -> None:
    hidden, weight, bias, labels = parts()
    logits = functional.linear(hidden, weight, bias)
    wanted = torch.autograd.grad(functional.cross_entropy(logits, labels), [hidden, weight, bias])
    head, at = of_zero3(weight), of_zero3(bias)
    whole, whole_bias = head.data, at.data
    lazy = LazyLogits(hidden, head, at)
    release(head)
    release(at)
    with pytest.raises(ValueError, match=r"sharded by ZeRO-3; gather it first \(.*Gathered"):
        LazyLogits(hidden, head, at)
    with pytest.raises(ValueError, match="bias must be a whole tensor: got a weight sharded"):
        LazyLogits(hidden, whole, at)
    torch.testing.assert_close(lazy.logsumexp(-1), logits.logsumexp(-1))
    torch.testing.assert_close(lazy.materialize(), logits)
    loss = functional.cross_entropy(lazy, labels)
    with pytest.raises(RuntimeError, match="gradient came when ZeRO-3 had released its weight"):
        loss.backward(retain_graph=True)
    gather(head, whole)
    gather(at, whole_bias)
    for grad, expected in zip(torch.autograd.grad(loss, [hidden, head, at]), wanted, strict=True):
        torch.testing.assert_close(grad, expected)


def test_what_was_gathered_goes_with_the_logits() -> None:
    """No cycle keeps it: a gathered head may be a gigabyte."""
    hidden, weight, _, labels = parts()
    lazy = identity([]).apply(LazyLogits(hidden, of_zero3(weight)))
    for keep in (True, False):
        loss = functional.cross_entropy(lazy, labels)
        held = weakref.ref(lazy.onepass_head.weight[0])
        loss.backward(retain_graph=keep)
        assert held() is not None
    del lazy
    assert held() is None


def test_lazy_head_takes_a_head_in_shards() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, V)

    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = Model()
    release(of_zero3(model.head.weight))
    onepass.lazy_head(model, "head")
    assert str(onepass.report(model, "head")) == "Model: head: fused, weight [37, 8] float32"
    with pytest.raises(ValueError, match="weight must be a whole tensor: got a weight sharded"):
        model.head(torch.randn(2, D))
    model.head = Own(D, V)
    release(of_zero3(model.head.weight))
    with pytest.raises(ValueError, match=r"\(Own\) is not torch.nn.Linear; nothing was changed"):
        onepass.lazy_head(model, "head")
