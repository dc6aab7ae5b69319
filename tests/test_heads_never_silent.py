"""Where fusing is asked and cannot happen, a line says why and nothing is changed: no silent no-op.

Each case breaks one thing that users have: a quantised, sharded, wrapped or replaced head, a rival
that goes past the head. Rivals are told by the module that a function was written in, so functions
of modules with their names stand for them.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import onepass
from onepass import LazyLogits

pytest.importorskip("transformers", reason="the models are those of transformers")

from support.tiny_models import batch_of, llama, step, tiny

Model = Any
Case = tuple[Callable[[pytest.MonkeyPatch], Model], str]


def nothing(self: Any, *args: Any, **kwargs: Any) -> None:
    return None


def same(x: Any) -> Any:
    return x


def written_in(module: str, function: Any = nothing) -> Any:
    """That function as if it had been written in a module of that name."""
    names = {"__name__": module, "functools": functools}
    return types.FunctionType(function.__code__, names, function.__name__)


def with_head(**changed: Any) -> Model:
    """A model whose head has other attributes than its own."""
    model = tiny("llama")
    for name, value in changed.items():
        if name == "weight":
            del model.lm_head.weight
        setattr(model.lm_head, name, value)
    return model


def class_in(module: str, name: str = "Linear4bit", base: type = nn.Linear) -> Model:
    model = tiny("llama")
    model.lm_head.__class__ = type(name, (base,), {"__module__": module})
    return model


def quantised_dynamically(_: pytest.MonkeyPatch) -> Model:
    model = tiny("llama")
    with warnings.catch_warnings(action="ignore"):  # torch gives it up for torchao
        model.lm_head = torch.ao.nn.quantized.dynamic.Linear(32, 97)
    return model


def without_head(_: pytest.MonkeyPatch) -> Model:
    return tiny("llama").model


def lazy_already(_: pytest.MonkeyPatch) -> Model:
    return onepass.lazy_head(tiny("llama"))


def convolution(_: pytest.MonkeyPatch) -> Model:
    from transformers.pytorch_utils import Conv1D

    model = tiny("llama")
    model.lm_head = Conv1D(97, 32)
    return model


def sequential(_: pytest.MonkeyPatch) -> Model:
    model = tiny("llama")
    model.lm_head = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 97))
    return model


def subclassed(own: Callable[..., Tensor]) -> Callable[[pytest.MonkeyPatch], Model]:
    def make(_: pytest.MonkeyPatch) -> Model:
        model = tiny("llama")
        model.lm_head.__class__ = type("NormedHead", (nn.Linear,), {"forward": own})
        return model

    return make


def forward_replaced(module: str) -> Callable[[pytest.MonkeyPatch], Model]:
    def make(_: pytest.MonkeyPatch) -> Model:
        model = tiny("llama")
        model.forward = types.MethodType(written_in(module), model)
        return model

    return make


def class_forward_replaced(module: str) -> Callable[[pytest.MonkeyPatch], Model]:
    def make(patch: pytest.MonkeyPatch) -> Model:
        model = tiny("llama")
        patch.setattr(type(model), "forward", written_in(module))
        return model

    return make


def wrapping(kind: Any) -> Any:
    @functools.wraps(kind.forward)
    def fused(self, *args, **kwargs):  # type: ignore[no-untyped-def]
        return None

    return fused


def trl_fused(_: pytest.MonkeyPatch) -> Model:
    """As add_fused_lm_head does: functools.wraps gives the new forward the old one's module."""
    model = tiny("llama")
    fused = written_in("trl.trainer.utils", wrapping)(type(model))
    model.forward = types.MethodType(fused, model)
    assert model.forward.__module__.startswith("transformers.")
    return model


def accelerate_wrapped_rival(_: pytest.MonkeyPatch) -> Model:
    """Under what accelerate puts around a forward: autocast, and outputs in float32."""
    from accelerate.utils import convert_outputs_to_fp32

    model = forward_replaced("liger_kernel.transformers.model.llama")(_)
    model.forward = convert_outputs_to_fp32(model.forward)
    return model


def loss_replaced(patch: pytest.MonkeyPatch) -> Model:
    patch.setattr(functional, "cross_entropy", written_in("liger_kernel.transformers.functional"))
    return tiny("llama")


def loss_function_replaced(_: pytest.MonkeyPatch) -> Model:
    model = tiny("llama")
    model.loss_function = written_in("unsloth_zoo.loss_utils")
    return model


def under_peft(_: pytest.MonkeyPatch) -> Model:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    model = forward_replaced("cut_cross_entropy.transformers.llama")(_)
    return peft.LoraModel(model, peft.LoraConfig(target_modules=["q_proj"]), "default")


def dora(_: pytest.MonkeyPatch) -> Model:
    peft = pytest.importorskip("peft", reason="the adapters are PEFT's")
    config = peft.LoraConfig(target_modules=["lm_head"], use_dora=True)
    return peft.LoraModel(tiny("llama"), config, "default")


def head_forward_replaced(_: pytest.MonkeyPatch) -> Model:
    model = tiny("llama")
    model.lm_head.forward = written_in("some_package.heads", same)
    return model


def hook_that_makes(_: pytest.MonkeyPatch) -> Model:
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, out: torch.zeros(1, 97))
    return model


def called_past_forward(_: pytest.MonkeyPatch) -> Model:
    def call(self: nn.Linear, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight)

    model = tiny("llama")
    model.lm_head.__class__ = type("Direct", (nn.Linear,), {"__call__": call})
    return model


def offloaded(_: pytest.MonkeyPatch) -> Model:
    accelerate = pytest.importorskip("accelerate", reason="the hooks are accelerate's")
    model = tiny("llama")
    accelerate.cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
    return model


def fsdp1_shard(_: pytest.MonkeyPatch) -> Model:
    return with_head(weight=nn.Parameter(torch.zeros(97 * 32)))


class Subclass(Tensor):
    """Stands for the weights of torchao, which are tensors of classes of their own."""


def torchao_weight(_: pytest.MonkeyPatch) -> Model:
    weight = torch.zeros(97, 32).as_subclass(Subclass)
    return with_head(weight=nn.Parameter(weight))


def fp8_weight(_: pytest.MonkeyPatch) -> Model:
    weight = torch.zeros(97, 32).to(torch.float8_e4m3fn)
    return with_head(weight=nn.Parameter(weight, requires_grad=False))


def int8_weight(_: pytest.MonkeyPatch) -> Model:
    weight = torch.zeros(97, 32, dtype=torch.int8)
    return with_head(weight=nn.Parameter(weight, requires_grad=False))


NOT_OURS = "forward of its own already, from some_package.heads"
CASES: dict[str, Case] = {
    "no_head": (without_head, r"LlamaModel has no output head .*pass head="),
    "twice": (lazy_already, r"lm_head is lazy already: onepass.unlazy_head"),
    "bitsandbytes": (
        lambda _: class_in("bitsandbytes.nn.modules"),
        r"lm_head is quantised \(bitsandbytes.nn.modules.Linear4bit\)",
    ),
    "awq": (lambda _: class_in("awq.modules.linear", "WQLinear"), "is quantised .*WQLinear"),
    "torch_quantised": (quantised_dynamically, r"is quantised \(Linear\)"),
    "torchao": (torchao_weight, "weight of type Subclass, not a plain tensor"),
    "fp8": (fp8_weight, "is quantised .*float8_e4m3fn"),
    "int8": (int8_weight, "is quantised .*torch.int8"),
    "fsdp1": (
        fsdp1_shard,
        "FSDP1 shards it: call lazy_head before",
    ),
    "offloaded": (offloaded, "offloaded by accelerate"),
    "conv1d": (convolution, r"\(Conv1D\) is not x @ weight.T \+ bias"),
    "sequential": (sequential, r"\(Sequential\) has no weight \[V, D\]"),
    "scaled_head": (
        subclassed(lambda self, x: functional.linear(x, self.weight) * 2),
        r"\(NormedHead\) does more than x @ weight.T \+ bias",
    ),
    "normed_head": (
        subclassed(lambda self, x: functional.linear(x, functional.normalize(self.weight))),
        r"\(NormedHead\) does more than",
    ),
    "other_signature": (subclassed(lambda self, x, labels: x), r"\(NormedHead\) is not x @"),
    "head_forward": (head_forward_replaced, NOT_OURS),
    "head_hook": (hook_that_makes, "gives Tensor for a row.* or one of its forward hooks"),
    "head_call": (called_past_forward, "lm_head gives Tensor for a row, not LazyLogits: .*Direct"),
    "trl": (trl_fused, "forward is trl's.* add_fused_lm_head"),
    "liger_instance": (
        forward_replaced("liger_kernel.transformers.model.llama"),
        "LlamaForCausalLM.forward is liger_kernel's, which does without the head: .*apply_liger",
    ),
    "liger_class": (class_forward_replaced("liger_kernel.transformers.model.llama"), "liger_k"),
    "liger_loss": (loss_replaced, "torch.nn.functional.cross_entropy is liger_kernel's"),
    "liger_under_accelerate": (accelerate_wrapped_rival, "forward is liger_kernel's"),
    "cce": (class_forward_replaced("cut_cross_entropy.transformers.llama"), "cut_cross_entropy's"),
    "cce_under_peft": (under_peft, "LlamaForCausalLM.forward is cut_cross_entropy's"),
    "unsloth": (class_forward_replaced("unsloth.models.llama"), "forward is unsloth's"),
    "unsloth_compiled": (
        class_forward_replaced("unsloth_compiled_module_llama"),
        "forward is unsloth's",
    ),
    "unsloth_loss": (loss_function_replaced, "loss_function is unsloth's"),
    "axolotl": (class_forward_replaced("axolotl.integrations.liger.models"), "is axolotl's"),
    "data_parallel": (lambda _: nn.DataParallel(tiny("llama")), "DataParallel copies modules"),
    "dora": (dora, "adapter of kind DoraLinearVariant, which is no sum of linear terms"),
}


def forwards(model: nn.Module) -> dict[str, Any]:
    return {
        name: (module.__class__, dict(module.__dict__)) for name, module in model.named_modules()
    }


@pytest.mark.parametrize("name", CASES)
def test_says_why_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, message = CASES[name]
    model = make(monkeypatch)
    before = forwards(model)
    with pytest.raises(ValueError, match=message) as caught:
        onepass.lazy_head(model)
    assert "\n" not in str(caught.value)
    assert forwards(model) == before
    found = onepass.report(model)
    if name not in ("head_hook", "head_call", "twice"):  # those take a row to see
        assert not found.fused and "\n" not in repr(found)
    assert found.fused == (name == "twice")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda m: onepass.lazy_head(cast(Any, "gpt2")), TypeError, "torch.nn.Module: got str"),
        (lambda m: onepass.lazy_head(m, "lm_heads"), ValueError, "'lm_heads' names no module of"),
        (lambda m: onepass.lazy_head(m, nn.Linear(2, 3)), ValueError, "is no module of Llama"),
        (lambda m: onepass.lazy_head(m, cast(Any, 3)), TypeError, "head must be .*: got int"),
        (lambda m: onepass.unlazy_head(m), ValueError, "no head of LlamaForCausalLM is lazy"),
        (lambda m: onepass.unlazy_head(cast(Any, [m])), TypeError, "got list"),
        (lambda m: onepass.report(cast(Any, None)), TypeError, "got NoneType"),
        (lambda m: onepass.lazy_head_within(m.model).__enter__(), ValueError, "no output head"),
    ],
)
def test_bad_input(call: Callable[[Any], Any], error: type[Exception], message: str) -> None:
    model = tiny("llama")
    before = forwards(model)
    with pytest.raises(error, match=message):
        call(model)
    assert forwards(model) == before


def test_a_rival_that_comes_later_is_reported() -> None:
    model = onepass.lazy_head(tiny("llama"))
    assert onepass.report(model).fused
    model.forward = types.MethodType(written_in("liger_kernel.transformers.model.llama"), model)
    assert repr(onepass.report(model)).startswith(
        "LlamaForCausalLM: lm_head: not fused, LlamaForCausalLM.forward is liger_kernel's"
    )
    del model.forward
    assert onepass.report(model).fused
    model.lm_head.forward = written_in("some_package.heads")
    assert NOT_OURS in repr(onepass.report(model))


def test_report_reads_as_a_line_a_head() -> None:
    model = tiny("qwen2_tied")
    assert repr(onepass.report(model)) == (
        "Qwen2ForCausalLM: lm_head: not fused, onepass.lazy_head makes it so"
    )
    tied = "fused, weight [97, 32] float32 tied to model.embed_tokens.weight"
    assert repr(onepass.report(onepass.lazy_head(model))) == f"Qwen2ForCausalLM: lm_head: {tied}"


def test_a_weight_that_is_no_plain_tensor_when_called() -> None:
    model = onepass.lazy_head(tiny("llama"))
    weight = torch.zeros(97, 32).as_subclass(Subclass)
    model.lm_head.weight = nn.Parameter(weight)
    with pytest.raises(TypeError, match="weight came as Subclass, not as a plain tensor"):
        model(**batch_of("llama"))


def test_heads_under_accelerates_hooks(device: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks", reason="the hooks are accelerate's")
    batch, wanted = (
        batch_of("llama", device),
        step(tiny("llama", device), batch_of("llama", device)),
    )

    def hooked(model: Model) -> Model:
        hook = hooks.AlignDevicesHook(execution_device=device, io_same_device=True)
        hooks.add_hook_to_module(model.lm_head, hook)
        return model

    for model in (
        onepass.lazy_head(hooked(tiny("llama", device))),
        hooked(onepass.lazy_head(tiny("llama", device))),
    ):
        assert onepass.report(model).fused
        with onepass.strict():
            assert isinstance(model(**batch).logits, LazyLogits)
        onepass.unlazy_head(model)
        assert torch.equal(step(model, batch)[0].logits, wanted[0].logits)
        hooks.remove_hook_from_module(model.lm_head)
        assert torch.equal(step(model, batch)[0].logits, wanted[0].logits)


def test_a_model_on_meta_gets_its_weights_later() -> None:
    with torch.device("meta"):
        model = onepass.lazy_head(llama())
    assert onepass.report(model).fused
    model.to_empty(device="cpu")
    model.load_state_dict(tiny("llama").state_dict())
    assert model.lm_head.forward(torch.zeros(2, 32)).materialize().shape == (2, 97)
