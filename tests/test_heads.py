"""lazy_head on whole models: the same step as without, nothing else changed, and undone bit for
bit."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import onepass
from onepass import LazyLogits
from onepass.heads import LazyForward

pytest.importorskip("transformers", reason="the models are those of transformers")

from support.tiny_models import FAMILIES, V, assert_same_step, batch_of, llama, step, tiny

EVERY = list(FAMILIES)


@pytest.mark.parametrize("name", EVERY)
def test_same_step_and_undone_bit_for_bit(name: str, device: str) -> None:
    model, batch = tiny(name, device), batch_of(name, device)
    before = step(model, batch)
    with torch.no_grad():
        untouched = model(**batch)
    plain = {key: set(module.__dict__) for key, module in model.named_modules()}
    state = {key: value.clone() for key, value in model.state_dict().items()}

    assert onepass.lazy_head(model) is model
    with onepass.strict():
        after = step(model, batch)
    assert_same_step(after, before)
    logits, wanted = after[0].logits, before[0].logits
    assert isinstance(logits, LazyLogits)
    assert (logits.shape, logits.dtype) == (wanted.shape, wanted.dtype)
    torch.testing.assert_close(logits.materialize(), wanted, rtol=1e-5, atol=1e-6)
    assert (getattr(after[0], "aux_loss", None) is not None) == name.endswith("_aux")
    assert onepass.report(model).fused
    lazy_state = model.state_dict()
    assert list(lazy_state) == list(state)
    assert all(torch.equal(lazy_state[key], value) for key, value in state.items())

    assert onepass.unlazy_head(model) is model
    assert {key: set(module.__dict__) for key, module in model.named_modules()} == plain
    with torch.no_grad():
        again = model(**batch)
    assert type(again.logits) is Tensor
    assert torch.equal(again.logits, untouched.logits) and torch.equal(again.loss, untouched.loss)


@pytest.mark.parametrize("name", ["llama", "mixtral_aux"])
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_same_loss_in_every_mode(name: str, grad: bool, training: bool, device: str) -> None:
    # ArcticTraining#266: the loss was None in eval mode
    model, batch = tiny(name, device).train(training), batch_of(name, device)
    with torch.set_grad_enabled(grad):
        wanted = model(**batch).loss
        onepass.lazy_head(model)
        with onepass.strict():
            out = model(**batch)
    torch.testing.assert_close(out.loss, wanted, rtol=3e-6, atol=3e-6)
    assert out.loss.requires_grad == out.logits.requires_grad == grad


def test_unknown_kwargs_reach_the_model(device: str) -> None:
    # Liger-Kernel PR#1007: one more keyword broke the loss
    model, batch = tiny("llama", device), batch_of("llama", device)
    options = {"num_items_in_batch": 7, "some_future_flag": True}
    wanted = step(model, batch, **options)
    onepass.lazy_head(model)
    with onepass.strict():
        assert_same_step(step(model, batch, **options), wanted)


def test_a_loss_of_ones_own(device: str) -> None:
    model, batch = tiny("gemma2_softcap", device), batch_of("gemma2_softcap", device)
    ids, labels = batch["input_ids"], batch["labels"]

    def loss_and_grad() -> tuple[Tensor, Tensor]:
        model.zero_grad()
        logits = model(input_ids=ids).logits
        rows = logits[:, :-1].reshape(-1, V).float()
        loss = functional.cross_entropy(rows, labels[:, 1:].reshape(-1))
        loss.backward()
        grad = model.get_parameter("lm_head.weight").grad
        assert grad is not None
        return loss.detach(), grad.clone()

    wanted = loss_and_grad()
    with onepass.lazy_head_within(model), onepass.strict():
        got = loss_and_grad()
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi_bias"])
def test_autocast_at_creation(name: str, dtype: torch.dtype, device: str) -> None:
    model, batch = tiny(name, device).to(dtype), batch_of(name, device)
    with torch.autocast(device, torch.bfloat16):
        wanted = step(model, batch)
        onepass.lazy_head(model)
        with onepass.strict():
            got = step(model, batch)
            # outside of the model as inside: torch's loss is float32 under autocast
            rows, labels = got[0].logits.reshape(-1, V), batch["input_ids"].reshape(-1)
            assert functional.cross_entropy(rows, labels).dtype == torch.float32
    assert got[0].logits.dtype == wanted[0].logits.dtype == torch.bfloat16
    assert got[0].loss.dtype == wanted[0].loss.dtype
    assert_same_step(got, wanted, rtol=2e-2)
    assert {grad.dtype for grad in got[1].values()} == {dtype}


def test_a_frozen_head_is_cast_once_for_logits_that_live_together(device: str) -> None:
    """Else a teacher's and a student's of one head would not join without being made."""
    model = tiny("phi_bias", device)
    onepass.lazy_head(model)
    hidden = torch.randn(5, 32, device=device)
    with torch.autocast(device, torch.bfloat16), onepass.strict():
        of_trained = [model.lm_head(hidden) for _ in range(2)]
        weights = [logits.onepass_head.weight[0] for logits in of_trained]
        assert weights[0] is not weights[1]  # each a part of its own graph
        model.requires_grad_(False)
        with torch.no_grad():
            first = model.lm_head(hidden)
        second = model.lm_head(hidden)
        assert first.onepass_head.weight[0] is second.onepass_head.weight[0]
        assert torch.cat([first, second]).shape == (10, V)
        cast = weakref.ref(first.onepass_head.weight[0])
        with torch.no_grad():
            model.lm_head.weight.add_(1.0)
        third = model.lm_head(hidden)
        torch.testing.assert_close(
            third.materialize(), functional.linear(hidden, model.lm_head.weight, model.lm_head.bias)
        )
    del first, second, weights, of_trained
    gc.collect()
    assert cast() is None


# -- what stays ---------------------------------------------------------------------------------


def test_two_models_are_independent(device: str) -> None:
    # Liger-Kernel#772: the patch leaked to every model of the process
    first, second, batch = tiny("llama", device), tiny("llama", device), batch_of("llama", device)
    onepass.lazy_head(first)
    assert isinstance(first(**batch).logits, LazyLogits)
    assert type(second(**batch).logits) is Tensor
    onepass.lazy_head(second)
    onepass.unlazy_head(first)
    assert type(first(**batch).logits) is Tensor
    assert isinstance(second(**batch).logits, LazyLogits)


def test_within_restores_after_an_error(device: str) -> None:
    model = tiny("llama", device)
    with pytest.raises(KeyError), onepass.lazy_head_within(model) as same:
        assert same is model and onepass.report(model).fused
        raise KeyError
    assert not onepass.report(model).fused
    assert "forward" not in model.lm_head.__dict__


def test_a_copy_uses_its_own_weights(device: str) -> None:
    model, batch = onepass.lazy_head(tiny("llama", device)), batch_of("llama", device)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.mul_(2)
        wanted, got = model(**batch).logits.materialize(), twin(**batch).logits.materialize()
    torch.testing.assert_close(got, 2 * wanted)
    twin(**batch).loss.backward()
    assert model.lm_head.weight.grad is None and twin.lm_head.weight.grad is not None
    onepass.unlazy_head(twin)
    assert onepass.report(model).fused and not onepass.report(twin).fused
    head = copy.deepcopy(model.lm_head)
    assert head.forward.belongs_to(head)


@pytest.mark.parametrize("name", ["llama", "qwen2_tied"])
def test_saved_and_loaded_plainly(name: str, tmp_path: Path, device: str) -> None:
    model, batch = tiny(name, device), batch_of(name, device)
    model.save_pretrained(tmp_path / "plain")
    onepass.lazy_head(model).save_pretrained(tmp_path / "lazy")
    plain, lazy = (tmp_path / "plain", tmp_path / "lazy")
    assert {p.name for p in plain.iterdir()} == {p.name for p in lazy.iterdir()}
    for file in plain.iterdir():
        assert file.read_bytes() == (lazy / file.name).read_bytes(), file.name
    loaded = type(model).from_pretrained(lazy).to(device).train()
    assert type(loaded(**batch).logits) is Tensor  # the file knows nothing of it
    loaded = onepass.lazy_head(loaded)
    with onepass.strict():
        assert_same_step(step(loaded, batch), step(model, batch))


def test_parameters_are_read_when_called(device: str) -> None:
    model, batch = onepass.lazy_head(tiny("llama", device)), batch_of("llama", device)
    other = llama().to(device)
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        wanted = other(**batch).loss
        torch.testing.assert_close(model(**batch).loss, wanted)
        model.to(torch.bfloat16)
        assert model(**batch).logits.dtype == torch.bfloat16
        model.float()
        model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
        assert not model(**batch).logits.materialize().any()
    model.resize_token_embeddings(V + 3)
    assert model(**batch).logits.shape[-1] == V + 3
    assert onepass.report(model).fused == isinstance(model(**batch).logits, LazyLogits)


def test_an_optimizers_steps_are_the_same(device: str) -> None:
    def trained(lazy: bool) -> dict[str, Tensor]:
        model, batch = tiny("qwen2_tied", device), batch_of("qwen2_tied", device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        if lazy:
            onepass.lazy_head(model)
        for _ in range(3):
            step(model, batch)
            optimizer.step()
        return {name: p.detach() for name, p in model.named_parameters()}

    got, wanted = trained(True), trained(False)
    for name, value in wanted.items():
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_logits_of_before_a_step_are_not_read_after_it(device: str) -> None:
    model, batch = onepass.lazy_head(tiny("llama", device)), batch_of("llama", device)
    out, _ = step(model, batch)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(RuntimeError, match="written to after its forward .*optimizer"):
        out.logits.argmax(-1)
    with pytest.raises(RuntimeError, match="written to after its forward .*optimizer"):
        out.logits.detach().materialize()


def test_a_model_is_freed_without_the_garbage_collector() -> None:
    head = nn.Linear(4, 9)
    model = onepass.lazy_head(nn.ModuleDict({"head": head}), "head")
    gone = weakref.ref(head)
    gc.disable()
    try:
        del model, head
        assert gone() is None
    finally:
        gc.enable()


def test_a_head_that_transformers_does_not_know(device: str) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_logits = nn.Linear(4, 9)

        def forward(self, x: Tensor) -> Tensor:
            return self.to_logits(x)

    model = Own().to(device)
    x = torch.randn(3, 4, device=device)
    for head in ("to_logits", model.to_logits):
        with onepass.lazy_head_within(model, head):
            assert isinstance(model(x), LazyLogits)
            assert repr(onepass.report(model, head)) == (
                "Own: to_logits: fused, weight [9, 4] float32"
            )
    itself = nn.Linear(4, 9).to(device)
    with onepass.lazy_head_within(itself, head=itself):
        assert isinstance(itself(x), LazyLogits)


def test_a_linear_map_that_is_no_nn_linear(device: str) -> None:
    class Head(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.weight, self.factor = nn.Parameter(torch.randn(9, 4)), factor

        def forward(self, x: Tensor) -> Tensor:
            return self.factor * (x @ self.weight.T)

    plain = nn.ModuleDict({"head": Head(1.0)}).to(device)
    assert onepass.report(onepass.lazy_head(plain, "head"), "head").fused
    scaled = nn.ModuleDict({"head": Head(2.0)}).to(device)
    with pytest.raises(ValueError, match=r"\(Head\) does more than x @ weight.T \+ bias"):
        onepass.lazy_head(scaled, "head")


def test_forward_hooks_see_lazy_logits(device: str) -> None:
    model, batch = tiny("llama", device), batch_of("llama", device)
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    onepass.lazy_head(model)
    model(**batch)
    assert set(seen) == {LazyLogits}


def test_what_stands_in_forward_is_small() -> None:
    model = onepass.lazy_head(tiny("llama"))
    changed = [m for m in model.modules() if isinstance(m.__dict__.get("forward"), LazyForward)]
    assert changed == [model.lm_head]


def test_any_order_of_imports() -> None:
    # LlamaFactory#7175: patches that had to come before, or after, another package
    with onepass.lazy_head_within(tiny("llama")) as model:
        wanted = model(**batch_of("llama")).loss.item()
    code = """
import onepass
lazy_head, strict = onepass.lazy_head, onepass.strict
from support.tiny_models import batch_of, tiny
with strict():
    print(repr(lazy_head(tiny("llama"))(**batch_of("llama")).loss.item()))
"""
    tests = Path(__file__).resolve().parent
    path = os.pathsep.join([str(tests), str(tests.parent / "python")])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert float(done.stdout or "nan") == pytest.approx(wanted, rel=1e-6), done.stderr


def test_the_name_costs_no_compiler() -> None:
    code = "import sys, onepass; onepass.lazy_head; print('torch._dynamo' in sys.modules)"
    path = str(Path(__file__).resolve().parents[1] / "python")
    env = os.environ | {"PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr


def test_options_of_the_head() -> None:
    """Those of LazyLogits, for all that the head gives; a copy keeps them."""
    model = onepass.lazy_head(
        tiny("llama"), max_slab_bytes=1 << 20, compact=False, mode="recompute"
    )
    for each in (model, copy.deepcopy(model)):
        head = each(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits.onepass_head
        assert (head.max_slab_bytes, head.compact, head.mode) == (1 << 20, False, "recompute")
    with pytest.raises(ValueError, match="mode must be one of auto"):
        onepass.lazy_head(tiny("llama"), mode="fast")


def test_report_finds_a_head_that_was_named() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50))
    onepass.lazy_head(model, head="1")
    report = onepass.report(model)
    assert report.fused and "1: fused, weight [50, 16] float32" in repr(report)


def test_a_model_without_numbers_yet() -> None:
    model = onepass.lazy_head(tiny("llama").to("meta"))
    with pytest.raises(ValueError, match="is on meta, without numbers: load it first"):
        model(input_ids=torch.zeros(1, 3, dtype=torch.int64, device="meta"))
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    logits = model(input_ids=torch.zeros(1, 3, dtype=torch.int64)).logits
    assert isinstance(logits, onepass.LazyLogits)
