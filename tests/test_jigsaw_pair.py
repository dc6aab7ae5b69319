"""Teacher and student: one super batch, one sample of the noise, gradients that reach what they
should and nothing else, and what is refused."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onepass import LazyLogits, lazy_head, strict
from onepass.jigsaw.cloak import TransformerCloak
from onepass.jigsaw.models import (
    NoiseMaskedNoisyTransformerModel,
    PeftNoiseMaskedNoisyTransformerModel,
)

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("safetensors")
from support.tiny_models import V, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT's, of transformers

FAMILIES = ("gpt2_tied", "llama", "gemma2_softcap", "qwen3")
B, S, D = 2, 7, 32
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1] * S])


def ids_of(seed: int = 0) -> Tensor:
    return torch.randint(3, V - 1, (B, S), generator=torch.Generator().manual_seed(seed))


def moved(cloak: TransformerCloak) -> TransformerCloak:
    """One that has learned something: a fresh one's means are 0 and its deviations all one."""
    with torch.no_grad():
        for estimator in (cloak.mean_estimator, cloak.rho_estimator):
            last: Any = estimator[-1]
            last.weight.normal_(0, 0.3)
    return cloak


def adapted(base: Any, inject: bool = False) -> Any:
    """With LoRA that does something, wrapped by PEFT or put into the model."""
    from peft import LoraConfig, get_peft_model, inject_adapter_in_model

    names = ["c_attn"] if hasattr(base, "transformer") else ["q_proj", "v_proj"]
    config = LoraConfig(r=4, target_modules=names, fan_in_fan_out=names == ["c_attn"])
    model = inject_adapter_in_model(config, base) if inject else get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return model


def pair(family: str = "llama", inject: bool = False, **options: Any) -> tuple[Any, Any]:
    model = adapted(tiny(family), inject)
    cloak = moved(TransformerCloak.from_model(model, estimator_size=16))
    teacher = NoiseMaskedNoisyTransformerModel(model, cloak, **options)
    student = PeftNoiseMaskedNoisyTransformerModel(
        model, cloak, noise_cache=teacher.noise_cache, **options
    )
    return teacher, student


@pytest.mark.parametrize("mask", [None, LEFT, LEFT.flip(1)], ids=["whole", "left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_clean_halves_are_the_models_own(family: str, mask: Tensor | None) -> None:
    teacher, student = pair(family, distillation_layer_index=0)
    model, ids = teacher.base_model, ids_of()
    model.eval()
    options: dict[str, Any] = {"attention_mask": mask, "output_hidden_states": True}
    if mask is not None:
        options["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        with model.disable_adapter():
            base = model(ids, **options)
        on = model(ids, **options)
        t, s = teacher(ids, mask), student(ids, mask)
    real = torch.ones(B, S, dtype=torch.bool) if mask is None else mask.bool()
    for got, wanted in ((t, base), (s, on)):
        torch.testing.assert_close(got.logits[:B][real], wanted.logits[real])
        torch.testing.assert_close(got.embeddings[:B][real], wanted.hidden_states[1][real])
        with_noise = model(inputs_embeds=got.noisy_input_embeddings, **options)
        if got is s:
            torch.testing.assert_close(got.logits[B:][real], with_noise.logits[real])
    assert (t.logits - s.logits).abs().max() > 1e-3
    assert torch.equal(t.noise_mask, real) and torch.equal(t.loss_mask, real)
    assert torch.equal(t.noisy_input_embeddings[~real], t.clean_input_embeddings[~real])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_left_padded_prompt_gives_what_it_gives_alone(family: str) -> None:
    teacher, _ = pair(family)
    ids = ids_of()
    with torch.no_grad():
        padded, alone = teacher(ids, LEFT), teacher(ids[:1, 3:])
    torch.testing.assert_close(padded.logits[0, 3:], alone.logits[0], rtol=1e-4, atol=1e-5)


def test_one_sample_in_either_order_then_another() -> None:
    teacher, student = pair()
    ids, other = ids_of(), ids_of(1)
    seen = []
    for models in ((teacher, student), (student, teacher)):
        first, second = (model(ids) for model in models)
        assert first.noisy_input_embeddings is second.noisy_input_embeddings
        seen.append(first.noisy_input_embeddings)
    assert not torch.equal(*seen)
    first, again = teacher(ids), teacher(ids)
    assert not torch.equal(first.noisy_input_embeddings, again.noisy_input_embeddings)
    assert student(ids).noisy_input_embeddings is again.noisy_input_embeddings
    assert teacher(ids).noisy_input_embeddings is not student(other).noisy_input_embeddings


def test_a_batch_that_changes_is_another_batch() -> None:
    teacher, student = pair()
    ids, mask = ids_of(), torch.ones(B, S, dtype=torch.long)
    first = teacher(ids, mask)
    ids[0, 0] = 5
    second = student(ids, mask)
    assert second.noisy_input_embeddings is not first.noisy_input_embeddings
    first = teacher(ids, mask)
    second = student(ids, mask.clone())
    assert second.noisy_input_embeddings is not first.noisy_input_embeddings
    with torch.no_grad():
        first = teacher(ids)
    assert student(ids).noisy_input_embeddings.requires_grad


def test_the_cache_keeps_nothing_that_all_have_read() -> None:
    teacher, student = pair()
    ids = ids_of()
    alive = [weakref.ref(teacher(ids).noisy_input_embeddings)]
    assert alive[0]() is not None  # for the student
    alive += [weakref.ref(student(ids).noisy_input_embeddings)]
    gc.collect()
    assert [ref() for ref in alive] == [None, None]


@pytest.mark.parametrize("inject", [False, True], ids=["peft", "injected"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpoints"])
def test_gradients(inject: bool, checkpointing: bool) -> None:
    """As those of two plain passes over separate models, whatever is recomputed."""
    ids = ids_of()

    def grads(separate: bool, checkpoint: bool) -> dict[str, Tensor]:
        torch.manual_seed(3)
        teacher, student = pair(inject=inject)
        model, cloak = teacher.base_model, teacher.cloak
        if separate:
            teacher = NoiseMaskedNoisyTransformerModel(
                tiny("llama"), cloak, noise_cache=student.noise_cache
            )
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(4)
        t, s = teacher(ids, LEFT), student(ids, LEFT)
        assert all(module.training for module in model.modules())
        (t.logits[B:].square().mean() - s.logits.square().mean()).backward()
        found = {f"cloak.{n}": p.grad for n, p in cloak.named_parameters()}
        lora = {n.replace("base_model.model.", ""): p for n, p in model.named_parameters()}
        for name, parameter in lora.items():
            assert parameter.requires_grad == ("lora_" in name), name
            assert (parameter.grad is not None) == ("lora_" in name), name
            if "lora_" in name:
                found[name] = parameter.grad
        return {name: grad for name, grad in found.items() if grad is not None}

    wanted, got = grads(separate=True, checkpoint=False), grads(False, checkpointing)
    assert wanted.keys() == got.keys() and all(grad.any() for grad in wanted.values())
    for name, grad in wanted.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-6, msg=name)


def test_protection_trains_the_transform_alone() -> None:
    teacher, _ = pair()
    teacher(ids_of()).logits[B:].square().mean().backward()
    trained = {name for name, p in teacher.named_parameters() if p.grad is not None}
    assert trained == {f"cloak.{name}" for name, _ in teacher.cloak.named_parameters()}


@pytest.mark.parametrize("index", [0, 1, -1])
@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_models_end_at_the_layer(family: str, index: int) -> None:
    ran: list[int] = []
    teacher, student = pair(family, distillation_layer_index=index)
    for model, kind in ((teacher, type(teacher)), (student, type(student))):
        short = kind(model.base_model, model.cloak, distillation_layer_index=index, truncated=True)
        torch.manual_seed(1)
        whole = model(ids_of())
        ran.clear()
        layers = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2][0]
        hooks = [
            block.register_forward_hook(lambda *_, n=n: ran.append(n))  # type: ignore[misc]
            for n, block in enumerate(layers)
        ]
        torch.manual_seed(1)
        out = short(ids_of())
        for hook in hooks:
            hook.remove()
        assert ran == list(range(index % 2 + 1)) and out.logits is None
        torch.testing.assert_close(out.embeddings, whole.embeddings)
        assert whole.logits.shape == (2 * B, S, V) and model(ids_of()).logits.shape[-1] == V


def test_lazy_logits_stay_lazy() -> None:
    teacher, student = pair()
    lazy_head(teacher.base_model)
    plain, _ = pair()
    with strict():
        t, s = teacher(ids_of()), student(ids_of())
        for out in (t, s):
            assert type(out.logits) is LazyLogits
            assert type(out.logits[:B]) is LazyLogits and type(out.logits[B:]) is LazyLogits
    clean = t.logits[:B].materialize() if hasattr(t.logits, "materialize") else t.logits[:B] + 0
    torch.testing.assert_close(clean, plain(ids_of()).logits[:B])


def test_a_protected_prompt_can_be_generated_from() -> None:
    for family in FAMILIES:
        _, student = pair(family)
        ids = ids_of()
        shown = student.protect(ids, LEFT, seed=7)
        assert not shown.noisy.requires_grad
        assert torch.equal(shown.noisy, student.protect(ids, LEFT, seed=7).noisy)
        assert not torch.equal(shown.noisy, student.protect(ids, LEFT).noisy)
        student.base_model.eval()
        options = {"attention_mask": LEFT, "max_new_tokens": 3, "do_sample": False}
        said = student.base_model.generate(
            inputs_embeds=shown.noisy, pad_token_id=0, eos_token_id=None, **options
        )
        assert said.shape == (B, 3)
        positions = (LEFT.cumsum(-1) - 1).clamp_min(0)
        with torch.no_grad():
            out = student.base_model(
                inputs_embeds=shown.noisy, attention_mask=LEFT, position_ids=positions
            )
        assert torch.equal(said[:, 0], out.logits[:, -1].argmax(-1))


def test_a_base_without_adapters_is_frozen() -> None:
    base = tiny("llama")
    teacher = NoiseMaskedNoisyTransformerModel(base, TransformerCloak.from_model(base))
    assert not any(parameter.requires_grad for parameter in base.parameters())
    assert teacher(ids_of()).logits.requires_grad  # through the transform


def test_keep_layer() -> None:
    teacher, _ = pair()
    teacher.keep_layer(None)
    assert teacher.distillation_layer_index is None
    teacher.keep_layer(-1)
    teacher.keep_layer(1)
    assert teacher.distillation_layer_index == 1
    with pytest.raises(ValueError, match="must be 1, which the model was built with: got 0"):
        teacher.keep_layer(0)
    with pytest.raises(ValueError, match="from -2 to 1: got 2"):
        teacher.keep_layer(2)


def test_reentrant_checkpoints_are_told() -> None:
    _, student = pair(distillation_layer_index=0)
    model = student.base_model.train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    try:
        embeddings = student(ids_of()).embeddings
    except RuntimeError as error:
        assert "use_reentrant" in str(error)
    else:  # hooks of this transformers run outside of the checkpoint
        assert embeddings.requires_grad


def test_refused_models() -> None:
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    base = tiny("llama")
    cloak = TransformerCloak.from_model(base)
    teacher, student = NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel
    on_embeddings = get_peft_model(tiny("llama"), LoraConfig(target_modules=["embed_tokens"]))
    prompts = get_peft_model(
        tiny("llama"), PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    )
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: teacher(base, TransformerCloak(8)), "of size 8, those of Llama.* have 32"),
        (lambda: teacher(nn.Linear(3, 3), cloak), "Linear has no input embeddings"),
        (lambda: teacher(tiny("t5_encoder_decoder"), cloak), "has an encoder"),
        (lambda: teacher(base, cloak, distillation_layer_index=2), "from -2 to 1: got 2"),
        (lambda: teacher(base, cloak, distillation_layer_index=-3), "got -3"),
        (lambda: teacher(base, cloak, truncated=True), "needs a distillation_layer_index"),
        (lambda: student(base, cloak), "has no PEFT adapter in its layers"),
        (lambda: student(prompts, cloak), "has no PEFT adapter in its layers"),
        (lambda: student(on_embeddings, cloak), "input embeddings of Llama.* are trained"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            make()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"input_ids": torch.zeros(S, dtype=torch.long)}, ValueError, r"\[B, S\]"),
        ({"input_ids": torch.zeros(B, S)}, ValueError, "integers .*float32"),
        ({"input_ids": torch.zeros(0, S, dtype=torch.long)}, ValueError, "not empty"),
        ({"input_ids": torch.full((B, S), V)}, ValueError, f"from 0 to {V - 1}.*got {V}"),
        ({"input_ids": torch.full((B, S), -1)}, ValueError, "got -1"),
        ({"input_ids": [[1, 2]]}, TypeError, "must be a torch.Tensor: got list"),
        ({"attention_mask": torch.ones(B, S + 1)}, ValueError, "attention_mask .*(2, 8)"),
        ({"loss_mask": torch.ones(B)}, ValueError, "loss_mask"),
        ({"noise_mask": torch.ones(B, S, D + 1)}, ValueError, "noise_mask"),
        ({"noise_mask": torch.ones(B)}, ValueError, "noise_mask"),
    ],
)
def test_refused_batches(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    teacher, _ = pair()
    with pytest.raises(error, match=message) as caught:
        teacher(**{"input_ids": ids_of(), **changes})
    assert "\n" not in str(caught.value)


def test_masks_of_tokens_and_features() -> None:
    teacher, _ = pair()
    noise = torch.rand(B, S, D) < 0.5
    counted = torch.ones(B, S, dtype=torch.long)
    out = teacher(ids_of(), LEFT, noise, counted)
    assert out.loss_mask is counted
    assert torch.equal(out.noise_mask, noise & LEFT.bool().unsqueeze(-1))
    same = out.noisy_input_embeddings == out.clean_input_embeddings
    assert torch.equal(same, ~out.noise_mask)
    out = teacher(ids_of(), LEFT, noise)
    assert torch.equal(out.loss_mask, LEFT.bool() & noise.any(-1))
    out = teacher(ids_of())
    assert bool(out.attention_mask.all()) and out.attention_mask.shape == (B, S)


def test_the_factories_take_the_pair() -> None:
    from onepass.jigsaw.loss import jigsaw_loss_factory, jigsaw_sgt_loss_factory

    teacher, student = pair()
    teacher.base_model.train()
    loss, components, _ = jigsaw_sgt_loss_factory(
        teacher,
        student,
        absolute_cosine_similarity_penalty_weight=1.0,
        jigsaw_ce_performance_loss_weight=1.0,
        jigsaw_ce_protection_loss_weight=1.0,
        jigsaw_ce_protection_max_loss=4.0,
        jigsaw_clean_embeddings_guardrails_loss_weight=0.05,
        mutual_information_loss_weight=0.1,
        median_norm_penalty_weight=0.1,
        distillation_layer_index=-1,
        jigsaw_l2_performance_loss_weight=0.1,
    )
    ids = ids_of()
    out = teacher(ids, LEFT)
    student(ids, LEFT)
    total = loss(out.loss_mask)
    total.backward()
    assert len(components()) == 7 and total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in teacher.cloak.parameters())
    truncated = pair(distillation_layer_index=0, truncated=True)
    with pytest.raises(ValueError, match="truncated"):
        jigsaw_sgt_loss_factory(*truncated, jigsaw_ce_performance_loss_weight=1.0)
    loss, _, _ = jigsaw_loss_factory(*truncated, 0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0)
    out = truncated[0](ids, LEFT)
    truncated[1](ids, LEFT)
    assert loss(out.loss_mask).isfinite()


def test_protection_draws_noise_that_no_seed_of_torchs_foretells() -> None:
    teacher, _ = pair()
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(teacher.protect(ids_of()))
    assert int(drawn[0].seed) != int(drawn[1].seed)
    assert not torch.equal(drawn[0].noisy, drawn[1].noisy)


def test_a_pair_can_be_copied() -> None:
    """Both copies share the noise with each other, and with nobody else."""
    model = nn.ModuleList(pair())
    teacher, student = copy.deepcopy(model)
    ids = ids_of()
    noisy = [each(ids).noisy_input_embeddings for each in (teacher, student, model[0])]
    assert noisy[0] is noisy[1] and noisy[2] is not noisy[0]


@pytest.mark.parametrize("what", ["bias", "norm"])
def test_weights_trained_beside_the_adapter(what: str) -> None:
    from peft import LoraConfig, get_peft_model

    base = tiny("qwen2_tied")  # with biases
    bias = "all" if what == "bias" else "none"
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], bias=bias))
    if what == "norm":
        base.model.norm.weight.requires_grad_(True)
    cloak = TransformerCloak.from_model(model)
    for kind in (NoiseMaskedNoisyTransformerModel, PeftNoiseMaskedNoisyTransformerModel):
        with pytest.raises(ValueError, match="is trained, but is no part of the adapter"):
            kind(model, cloak)


def test_processes_of_a_group_draw_noise_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, _ = pair()
    drawn = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (0, 1, 2):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        torch.manual_seed(0)
        drawn.append(teacher(ids_of()).noisy_input_embeddings)
    assert not any(torch.equal(drawn[a], drawn[b]) for a, b in ((0, 1), (1, 2), (0, 2)))
