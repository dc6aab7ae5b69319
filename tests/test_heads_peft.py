"""lazy_head with PEFT: LoRA on the head is one more lazy term, whenever the adapter came."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onepass
from onepass import LazyLogits, MaterializedWarning

pytest.importorskip("transformers", reason="the models are those of transformers")
pytest.importorskip("peft", reason="the adapters are PEFT's")

import peft

from support.tiny_models import D, V, assert_same_step, batch_of, step, tiny

WITH_HEAD: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "lm_head"]}
# PEFT calls what its transformers deprecated, and says that a tied head wants care.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning"),
]


def adapted(model: Any, **options: Any) -> Any:
    """The model with adapters whose B is not zero, as at a start it is."""
    torch.manual_seed(2)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return model


CONFIGS: dict[str, dict[str, Any]] = {
    "body_only": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "head": WITH_HEAD,
    "head_rslora": WITH_HEAD | {"use_rslora": True, "lora_alpha": 32},
    "head_lora_bias": WITH_HEAD | {"lora_bias": True},
    "modules_to_save": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


CASES = [
    *((config, "llama") for config in CONFIGS if config != "head_lora_bias"),
    *(("head", family) for family in ("phi_bias", "gemma2_softcap", "granite_scale")),
    ("head_lora_bias", "phi_bias"),
    ("modules_to_save", "phi_bias"),
]


@pytest.mark.parametrize(("config", "family"), CASES)
def test_same_step(config: str, family: str, device: str) -> None:
    model, batch = adapted(tiny(family, device), **CONFIGS[config]), batch_of(family, device)
    wanted = step(model, batch)
    onepass.lazy_head(model)
    with onepass.strict():
        got = step(model, batch)
    assert_same_step(got, wanted)
    assert isinstance(got[0].logits, LazyLogits)
    heads = [name for name in got[1] if "lm_head" in name]
    trained = {"body_only": 0, "modules_to_save": 2 if family == "phi_bias" else 1}
    assert len(heads) == trained.get(config, 3 if config == "head_lora_bias" else 2)
    assert onepass.report(model).fused
    onepass.unlazy_head(model)
    assert torch.equal(step(model, batch)[0].logits, wanted[0].logits)


def test_two_terms_and_no_gradient_of_the_whole_matrix(device: str) -> None:
    model, batch = adapted(tiny("llama", device), **WITH_HEAD), batch_of("llama", device)
    onepass.lazy_head(model)
    assert [state.name.removeprefix("base_model.model.") for state in report(model)] == [
        "lm_head.base_layer",
        "lm_head.lora_B.default",
    ]
    out = model(**batch)
    weights = out.logits.onepass_head.weight
    assert [tuple(w.shape) for w in weights] == [(V, D), (V, 4)]
    assert [w.requires_grad for w in weights] == [False, True]
    out.loss.backward()
    assert model.get_output_embeddings().base_layer.weight.grad is None


def report(model: nn.Module) -> tuple[Any, ...]:
    found = onepass.report(model)
    assert found.fused, found
    return found.heads


def test_lazy_head_first(device: str) -> None:
    model, batch = onepass.lazy_head(tiny("llama", device)), batch_of("llama", device)
    wanted = step(adapted(tiny("llama", device), **CONFIGS["modules_to_save"]), batch)
    # modules_to_save copies the head, and with it its laziness
    saved = adapted(copy.deepcopy(model), **CONFIGS["modules_to_save"])
    with onepass.strict():
        assert_same_step(step(saved, batch), wanted)
    report(saved)
    body = adapted(copy.deepcopy(model), **CONFIGS["body_only"])
    with onepass.strict():
        step(body, batch)
    report(body)


def test_lazy_head_first_and_lora_on_the_head_says_what_to_do(device: str) -> None:
    batch = batch_of("llama", device)
    wanted = step(adapted(tiny("llama", device), **WITH_HEAD), batch)
    model = adapted(onepass.lazy_head(tiny("llama", device)), **WITH_HEAD)
    found = onepass.report(model)
    assert [state.fused for state in found.heads] == [True, False] and not found.fused
    with pytest.warns(MaterializedWarning, match="adapter added after lazy_head"):
        assert_same_step(step(model, batch), wanted)
    onepass.lazy_head(model)
    with onepass.strict():
        assert_same_step(step(model, batch), wanted)
    report(model)


@pytest.mark.parametrize("config", ["head", "modules_to_save"])
def test_disabled_switched_and_merged(config: str, device: str) -> None:
    model, batch = adapted(tiny("llama", device), **CONFIGS[config]), batch_of("llama", device)
    model.add_adapter("second", peft.LoraConfig(task_type="CAUSAL_LM", **CONFIGS[config]))
    for name, parameter in model.named_parameters():
        if "second" in name and "lm_head" in name:
            nn.init.normal_(parameter, std=0.3)

    def losses() -> list[Tensor]:
        found = []
        with torch.no_grad():
            for adapter in ("default", "second"):
                model.set_adapter(adapter)
                found.append(model(**batch).loss)
            with model.disable_adapter():
                found.append(model(**batch).loss)
            model.set_adapter("default")
            if config == "head":
                model.merge_adapter()
                found.append(model(**batch).loss)
                model.unmerge_adapter()
        return found

    wanted = losses()
    onepass.lazy_head(model)
    with onepass.strict():
        got = losses()
    assert len({round(float(loss), 5) for loss in wanted[:3]}) == 3
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_merge_and_unload_stays_lazy(device: str) -> None:
    model, batch = adapted(tiny("llama", device), **WITH_HEAD), batch_of("llama", device)
    wanted = model(**batch).loss
    merged = onepass.lazy_head(model).merge_and_unload()
    with onepass.strict():
        torch.testing.assert_close(merged(**batch).loss, wanted)
    report(merged)


@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_adapter_saved_and_loaded_with_plain_peft(family: str, tmp_path: Path, device: str) -> None:
    # peft#2018, #2777: adapters of tied heads came back wrong
    model, batch = adapted(tiny(family, device), **WITH_HEAD), batch_of(family, device)
    onepass.lazy_head(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    step(model, batch)
    optimizer.step()
    with warnings.catch_warnings(action="ignore"):  # PEFT's, of a tied head
        model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(tiny(family, device), tmp_path)
    with torch.no_grad():
        wanted = model(**batch).logits.materialize()
        torch.testing.assert_close(loaded(**batch).logits, wanted, rtol=1e-5, atol=1e-6)


def test_a_bfloat16_head_with_a_float32_adapter(device: str) -> None:
    model = adapted(tiny("llama", device).to(torch.bfloat16), **WITH_HEAD)
    batch = batch_of("llama", device)
    wanted = step(model, batch)
    onepass.lazy_head(model)
    with onepass.strict():
        got = step(model, batch)
    assert got[0].logits.dtype == wanted[0].logits.dtype == torch.bfloat16
    assert_same_step(got, wanted, rtol=2e-2)
    assert {grad.dtype for grad in got[1].values()} == {torch.float32}


def test_autocast(device: str) -> None:
    model, batch = adapted(tiny("llama", device), **WITH_HEAD), batch_of("llama", device)
    with torch.autocast(device, torch.bfloat16):
        wanted = step(model, batch)
        onepass.lazy_head(model)
        with onepass.strict():
            assert_same_step(step(model, batch), wanted, rtol=2e-2)


REFUSED: dict[str, Callable[[], Any]] = {
    "DoraLinearVariant": lambda: peft.LoraConfig(**WITH_HEAD, use_dora=True),
    "ia3": lambda: peft.IA3Config(
        target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM"
    ),
    "loha": lambda: peft.LoHaConfig(r=4, target_modules=["lm_head"]),
    "TrainableTokensWrapper": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj"], trainable_token_indices={"lm_head": [1, 2]}
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_adapters_on_the_head_are_refused(kind: str, device: str) -> None:
    model = peft.get_peft_model(tiny("llama", device), REFUSED[kind]())
    batch = batch_of("llama", device)
    wanted = step(model, batch)
    with pytest.raises(ValueError, match=kind):
        onepass.lazy_head(model)
    assert kind in repr(onepass.report(model))
    assert torch.equal(step(model, batch)[0].logits, wanted[0].logits)
