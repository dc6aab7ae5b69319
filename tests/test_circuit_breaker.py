"""Representation rerouting on language models: the published loss, term by term, and what it needs.

`published` is SPEC 4.2 in plain torch: layers stacked, padding multiplied to 0, all in float32.
"""

from __future__ import annotations

import copy
import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onepass.circuit_breaker.adapter import jitter, lora_config
from onepass.circuit_breaker.arguments import LoraArguments, LorraArguments
from onepass.circuit_breaker.hidden_states import check_layers
from onepass.circuit_breaker.loss import (
    Rerouting,
    compute_loss,
    reference_hidden_states,
    rerouting_loss,
)
from onepass.circuit_breaker.losses import (
    circuit_breaker_loss,
    monitored,
    retain_loss,
    schedule,
)
from onepass.ops.row_moments import row_moments
from onepass.training.hidden_states import blocks_of
from onepass.training.lora import linear_names

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

Batch = dict[str, Tensor]
VOCAB = 97


def wide(states: list[Tensor]) -> torch.dtype:
    return torch.promote_types(states[0].dtype, torch.float32)


def published_retain(hidden: list[Tensor], original: list[Tensor], mask: Tensor) -> Tensor:
    kept = mask.to(hidden[0].dtype).repeat(len(hidden), 1, 1).unsqueeze(-1)
    gap = torch.stack(hidden) * kept - torch.stack(original) * kept
    return torch.norm(gap, dim=-1, p=2, dtype=wide(hidden)).nanmean()


def published_break(
    hidden: list[Tensor], original: list[Tensor], mask: Tensor, scope: str = "token"
) -> Tensor:
    kept = mask.to(hidden[0].dtype).repeat(len(hidden), 1, 1)

    def unit(states: list[Tensor]) -> Tensor:
        stacked = torch.stack(states)
        return stacked / torch.norm(stacked, dim=-1, keepdim=True, dtype=wide(states))

    inner = (unit(hidden) * unit(original) * kept.unsqueeze(-1)).sum(-1)
    return (inner.relu().sum() if scope == "token" else inner.sum().relu()) / kept.sum()


def published(
    model: Any, inputs: Batch, layers: tuple[int, ...], retain: float, cb: float
) -> Tensor:
    def states(ending: str) -> tuple[Tensor, ...]:
        ids, mask = inputs[f"input_ids{ending}"], inputs[f"attention_mask{ending}"]
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states

    with model.disable_adapter(), torch.no_grad():
        model.eval()
        kept, broken = states(""), states("_circuit_breaker")
    model.train()
    now, now_broken = states(""), states("_circuit_breaker")
    retained = published_retain(list(now), list(kept), inputs["attention_mask"])
    turned = published_break(
        [now_broken[i] for i in layers],
        [broken[i] for i in layers],
        inputs["attention_mask_circuit_breaker"],
    )
    return retain * retained + cb * turned


def llama(n_layers: int = 4, **config: Any) -> Any:
    settings = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=n_layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings, **config))


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=64,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def gemma2() -> Any:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        sliding_window=4, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config)


def neox() -> Any:
    torch.manual_seed(0)
    config = transformers.GPTNeoXConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=4, max_position_embeddings=64, attention_dropout=0.0,
        hidden_dropout=0.0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config)


MODELS = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2, "gpt-neox": neox}


def adapted(model: nn.Module, moved: float = 0.02, dropout: float = 0.0, **lorra: Any) -> Any:
    """LoRA over all blocks, its lora_B off zero by `moved`."""
    lorra = {"transform_layers": "0,1,2,3", **lorra}
    config = lora_config(
        model, LoraArguments(lora_r=4, lora_dropout=dropout), LorraArguments(**lorra)
    )
    torch.manual_seed(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        wrapped = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name and moved:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * moved)
    return wrapped


def batch(padding: str = "right", n_rows: int = 3, length: int = 12) -> Batch:
    generator = torch.Generator().manual_seed(2)
    inputs = {}
    for n, ending in enumerate(("", "_circuit_breaker", "_val")):
        shape = (n_rows, length + n)  # the parts need not be of one length
        mask = torch.ones(shape, dtype=torch.long)
        for row in range(n_rows - 1):
            gone = slice(7 + row, None) if padding == "right" else slice(0, 5 - row)
            mask[row, gone] = 0
        inputs[f"input_ids{ending}"] = torch.randint(
            1, VOCAB, shape, generator=generator
        )  # 0 is the padding, a row of zeros
        inputs[f"attention_mask{ending}"] = mask
    return inputs


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got: dict[str, Tensor], want: dict[str, Tensor], within: float) -> None:
    """A parameter that one side has no gradient for has 0 on the other."""
    scale = max(float(g.abs().max()) for g in want.values())
    assert scale > 0
    for name in got.keys() | want.keys():
        nothing = torch.zeros_like(got[name] if name in got else want[name])
        gap = got.get(name, nothing) - want.get(name, nothing)
        assert float(gap.abs().max()) <= within * scale, name


# -- the losses on tensors --------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scope", ["token", "total"])
def test_losses_are_the_published_formulas(scope: str, masked: bool) -> None:
    torch.manual_seed(0)
    hidden = [torch.randn(2, 7, 16, dtype=torch.double, requires_grad=True) for _ in range(3)]
    original = [torch.randn(2, 7, 16, dtype=torch.double) for _ in range(3)]
    mask = torch.ones(2, 7, dtype=torch.long)
    if masked:
        mask[0, 4:] = 0
        mask[1, :2] = 0
    ours = [
        retain_loss(hidden, original, mask),
        circuit_breaker_loss(hidden, original, mask, relu_scope=scope),
    ]
    theirs = [
        published_retain(hidden, original, mask),
        published_break(hidden, original, mask, scope),
    ]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-6, atol=1e-7)
        got = torch.autograd.grad(one, hidden, retain_graph=True, allow_unused=True)
        want = torch.autograd.grad(other, hidden, allow_unused=True)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, rtol=1e-5, atol=1e-8)
    total = circuit_breaker_loss(hidden, original, mask, relu_scope="total")
    assert scope == "total" or ours[1].item() > total.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_and_torch_agree_with_the_published_formulas(
    impl: str, device: str, dtype: torch.dtype
) -> None:
    """On lists of layers whose width is no multiple of anything, padding on either side."""
    generator = torch.Generator().manual_seed(0)

    def layers() -> list[Tensor]:
        drawn = torch.randn(3, 2, 6, 77, generator=generator)
        return [layer.to(device, dtype) for layer in drawn]

    hidden, original = [h.requires_grad_() for h in layers()], layers()
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 1]], device=device)
    exact = [h.detach().double().requires_grad_() for h in hidden]
    truth = published_retain(exact, [o.double() for o in original], mask)
    truth = truth + published_break(exact, [o.double() for o in original], mask)
    ours = retain_loss(hidden, original, mask, impl=impl)
    ours = ours + circuit_breaker_loss(hidden, original, mask, impl=impl)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-6)
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    wanted = torch.autograd.grad(truth, exact)
    for got, want in zip(torch.autograd.grad(ours, hidden), wanted, strict=True):
        assert (got.double() - want).abs().max() <= rounding * want.abs().max()
        assert not got[mask == 0].any()


def test_retain_divides_by_all_tokens_or_by_those_that_count() -> None:
    hidden, original = torch.randn(2, 8, 4), torch.randn(2, 8, 4)
    mask = torch.zeros(2, 8, dtype=torch.bool)
    mask[:, :6] = True
    every = retain_loss(hidden, original, mask)
    unmasked = retain_loss(hidden, original, mask, retain_reduction="unmasked")
    torch.testing.assert_close(every, unmasked * 6 / 8)
    torch.testing.assert_close(unmasked, (hidden - original).norm(dim=-1)[mask].mean())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    """Error against fp64 from the same stored inputs, over that of the published formulas."""
    torch.manual_seed(0)
    hidden = [torch.randn(2, 64, 512).to(dtype).requires_grad_() for _ in range(3)]
    original = [(h.detach().float() + 0.05 * torch.randn(2, 64, 512)).to(dtype) for h in hidden]
    mask = (torch.arange(64) < 50).expand(2, 64)
    exact = [h.detach().double().requires_grad_() for h in hidden]
    exact_original = [o.double() for o in original]
    for ours, theirs in (
        (retain_loss, published_retain),
        (circuit_breaker_loss, published_break),
    ):
        truth = theirs(exact, exact_original, mask)
        one, other = ours(hidden, original, mask), theirs(hidden, original, mask)
        assert abs(one.item() - truth.item()) <= 1e-6 * abs(truth.item())
        want = torch.autograd.grad(truth, exact)
        unit = torch.finfo(dtype).eps / 2
        for got, there, reference in zip(
            torch.autograd.grad(one, hidden), torch.autograd.grad(other, hidden), want, strict=True
        ):
            error = (got.double() - reference).norm() / reference.norm()
            usual = (there.double() - reference).norm() / reference.norm()
            assert error <= max(1.05 * usual, unit)


def test_no_token_that_counts_gives_zero_and_a_live_graph() -> None:
    hidden = [torch.full((2, 5, 4), float("nan"), requires_grad=True) for _ in range(2)]
    original = [torch.randn(2, 5, 4) for _ in range(2)]
    mask = torch.zeros(2, 5, dtype=torch.long)
    for scope in ("token", "total"):
        loss = retain_loss(hidden, original, mask)
        loss = loss + circuit_breaker_loss(hidden, original, mask, relu_scope=scope)
        assert loss.item() == 0.0
        for gradient in torch.autograd.grad(loss, hidden):
            assert torch.equal(gradient, torch.zeros(2, 5, 4))


def test_a_nan_in_padding_does_not_leak_and_one_in_text_does() -> None:
    torch.manual_seed(0)
    hidden, original = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    mask = torch.tensor([[1, 1, 1, 0]])
    clean = [retain_loss(hidden, original, mask), circuit_breaker_loss(hidden, original, mask)]
    hidden[0, 3] = float("nan")
    assert [
        retain_loss(hidden, original, mask),
        circuit_breaker_loss(hidden, original, mask),
    ] == clean
    hidden[0, 0, 0] = float("nan")
    assert retain_loss(hidden, original, mask).isnan()  # the published nanmean would hide it


def test_at_rest_retain_is_zero_and_the_break_has_no_gradient() -> None:
    """The trap that `init_jitter` is for: SPEC 4.5."""
    state = torch.randn(2, 5, 8, requires_grad=True)
    rest = state.detach().clone()
    retained = retain_loss(state, rest)
    assert retained.item() == 0.0
    assert torch.equal(torch.autograd.grad(retained, state)[0], torch.zeros_like(rest))
    turned = circuit_breaker_loss(state, rest)
    assert turned.item() == pytest.approx(1.0, abs=1e-6)
    assert float(torch.autograd.grad(turned, state)[0].abs().max()) < 1e-6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: retain_loss(h, h[:, :3]), r"\(2, 5, 8\)"),
        (lambda h: retain_loss(h, h, torch.ones(2, 4)), r"mask .*\(2, 4\).*|\(2, 5\)"),
        (lambda h: retain_loss(h, h, retain_reduction="some"), "all, unmasked"),
        (lambda h: circuit_breaker_loss(h, h, relu_scope="row"), "token, total"),
        (lambda h: circuit_breaker_loss(h, h, eps=-1.0), "eps"),
        (lambda h: circuit_breaker_loss([h, h], [h]), "number of layers"),
        (lambda h: circuit_breaker_loss([], []), "number of layers"),
        (lambda h: schedule(1, 0, 1.0), "max_steps 0"),
        (lambda h: schedule(-1, 5, 1.0), "step -1"),
        (lambda h: schedule(1, 5, float("nan")), "alpha"),
        (lambda h: schedule(1, 5, 1.0, kind="linear"), "linear_converge"),
    ],
)
def test_wrong_calls_say_what_came_and_what_was_wanted(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        call(torch.randn(2, 5, 8))
    assert "\n" not in str(raised.value)


# -- the schedule -----------------------------------------------------------------------------


def test_schedule_of_the_published_steps() -> None:
    coefficients = [schedule(t, 150, 10.0) for t in (1, 75, 150, 300, 400)]
    retain = [r for r, _ in coefficients]
    assert retain == pytest.approx([10 / 300, 2.5, 5.0, 10.0, 10.0])
    assert [cb for _, cb in coefficients] == pytest.approx([10 - r for r in retain])
    assert retain == sorted(retain)


def test_other_schedules() -> None:
    assert schedule(7, 150, 10.0, "constant") == (5.0, 5.0)
    assert schedule(75, 150, 10.0, "readme_text") == schedule(75, 150, 10.0)[::-1]


# -- the loss of a step -----------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("layers", [(2, 3), (4,), (0, 1)])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_step_is_the_published_loss(name: str, layers: tuple[int, ...], padding: str) -> None:
    model, inputs = adapted(MODELS[name]()), batch(padding)
    expected = published(model, inputs, layers, 2.0, 3.0)
    want = gradients(model, expected)
    options = Rerouting(layers, full_layers=True)
    terms = rerouting_loss(model, inputs, (2.0, 3.0), options)
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    assert_same_gradients(gradients(model, terms.loss), want, within=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_by_default_the_model_ends_one_block_after_the_last_target(name: str) -> None:
    """As published: the model is cut there, its final norm after the last block that is left."""
    inputs, layers = batch(), (1, 2)
    whole: Any = MODELS[name]()
    cut = copy.deepcopy(whole)
    backbone = cut.transformer if name == "gpt2" else cut.model
    held = backbone.h if name == "gpt2" else backbone.layers
    setattr(backbone, "h" if name == "gpt2" else "layers", held[:3])
    cut.config.num_hidden_layers = 3
    expected = published(
        adapted(cut, transform_layers="-1", target_layers="1,2"), inputs, layers, 2.0, 3.0
    )
    model = adapted(whole, transform_layers="-1", target_layers="1,2")
    terms = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting(layers))
    torch.testing.assert_close(terms.loss, expected, rtol=1e-5, atol=1e-6)
    assert len(blocks_of(model)) == 4
    assert whole.config.num_hidden_layers == 4


def test_bfloat16_model_is_within_its_rounding() -> None:
    model, inputs = adapted(llama()), batch()
    exact = published(model, inputs, (2, 3), 2.0, 3.0)
    half = model.to(torch.bfloat16)
    ours = rerouting_loss(half, inputs, (2.0, 3.0), Rerouting((2, 3), full_layers=True)).loss
    theirs = published(half, inputs, (2, 3), 2.0, 3.0)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact.item()) <= max(1.5 * abs(theirs.item() - exact.item()), 0.02)


def test_block_convention_is_one_off_from_hidden_states() -> None:
    model, inputs = adapted(llama()), batch()
    hf = rerouting_loss(model, inputs, (0.0, 1.0), Rerouting((2, 3)))
    by_block = rerouting_loss(model, inputs, (0.0, 1.0), Rerouting((1, 2), "block"))
    assert torch.equal(hf.loss, by_block.loss)


def test_no_head_and_no_block_beyond_the_needed_runs() -> None:
    model = adapted(llama(n_layers=6), transform_layers="-1", target_layers="2")
    base = model.get_base_model()
    calls: dict[int, int] = {}
    for n, block in enumerate(base.model.layers):
        block.register_forward_hook(lambda *_, n=n: calls.update({n: calls.get(n, 0) + 1}))

    def forbidden(_: object) -> Tensor:
        raise AssertionError("the head ran")

    base.lm_head.forward = forbidden
    rerouting_loss(model, batch(), (1.0, 1.0), Rerouting((2,))).loss.backward()
    # retain: blocks 0 to 2, twice; harmful: 0 and 1, twice
    assert calls == {0: 4, 1: 4, 2: 2}
    assert base.lm_head.forward is forbidden  # another's patch is put back
    assert len(base.model.layers) == 6
    assert not any(
        isinstance(h, types.FunctionType) and h.__qualname__.startswith("capture")
        for m in base.modules()
        for h in m._forward_hooks.values()
    )


def test_monitoring_reports_all_parts_and_changes_nothing() -> None:
    model, inputs = adapted(llama(), dropout=0.1), batch()
    model.train()
    torch.manual_seed(3)
    quiet = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)))
    want = gradients(model, quiet.loss)
    torch.manual_seed(3)
    told = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)), monitor=True)
    assert torch.equal(quiet.loss, told.loss)
    assert_same_gradients(gradients(model, told.loss), want, within=0.0)
    sides = {
        f"{part}_{fact}"
        for part in ("retain", "cb", "val")
        for fact in ("cosine", "norm", "reference_norm")
    }
    assert set(told.facts) == sides | {"retain_loss", "cb_loss", "loss"}
    assert not any(fact.requires_grad for fact in told.facts.values())
    assert set(quiet.facts) == {"retain_loss", "cb_loss", "loss"}


def test_monitored_facts_are_means_over_tokens_that_count() -> None:
    hidden, original = (
        [torch.randn(2, 5, 8) for _ in range(3)],
        [torch.randn(2, 5, 8) for _ in range(3)],
    )
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    facts = monitored(row_moments(hidden, original, mask), mask)
    kept = mask.bool().expand(3, 2, 5)
    cosines = torch.cosine_similarity(torch.stack(hidden), torch.stack(original), dim=-1)
    torch.testing.assert_close(facts["cosine"], cosines[kept].mean())
    torch.testing.assert_close(facts["norm"], torch.stack(hidden).norm(dim=-1)[kept].mean())
    torch.testing.assert_close(
        facts["reference_norm"], torch.stack(original).norm(dim=-1)[kept].mean()
    )


def test_a_term_without_a_coefficient_costs_no_pass() -> None:
    """Published code fails there (t >= 300) with an unbound variable."""
    model, inputs = adapted(llama()), batch()
    passes: list[int] = []
    model.get_base_model().model.register_forward_hook(lambda *_: passes.append(1))
    terms = rerouting_loss(model, inputs, (2.0, 0.0), Rerouting((2,)))
    assert len(passes) == 2 and "cb_loss" not in terms.facts
    assert terms.loss.requires_grad
    nothing = rerouting_loss(model, inputs, (0.0, 0.0), Rerouting((2,)))
    assert nothing.loss.item() == 0.0
    nothing.loss.backward()


def test_modes_and_adapter_are_left_as_they_were() -> None:
    model, inputs = adapted(llama(), dropout=0.1), batch()
    model.train()
    frozen = model.get_base_model().model.layers[0].mlp.eval()
    first = next(p for n, p in model.named_parameters() if "lora_A" in n)
    first.requires_grad_(False)  # PEFT's own context would turn it on
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)), monitor=True).loss.backward()
    assert model.training and not frozen.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert not model.base_model.model.model.layers[0].self_attn.q_proj.disable_adapters


# -- references -------------------------------------------------------------------------------


def test_a_frozen_copy_and_precomputed_states_equal_the_adapter_off() -> None:
    base = llama()
    copied = copy.deepcopy(base)
    model, inputs = adapted(base), batch()
    off = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)))
    want = gradients(model, off.loss)
    frozen = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3), reference=copied))
    torch.testing.assert_close(frozen.loss, off.loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, frozen.loss), want, within=1e-6)
    stored = reference_hidden_states(model, inputs, Rerouting((2, 3)))
    options = Rerouting((2, 3), reference="precomputed")
    ready = rerouting_loss(model, {**inputs, **stored}, (2.0, 3.0), options, monitor=True)
    torch.testing.assert_close(ready.loss, off.loss, rtol=1e-6, atol=0)
    assert_same_gradients(gradients(model, ready.loss), want, within=1e-6)


def test_a_reference_of_another_dtype_is_compared_in_that_of_the_model() -> None:
    base = llama()
    copied = copy.deepcopy(base).to(torch.bfloat16)
    model, inputs = adapted(base), batch()
    same = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)))
    other = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3), reference=copied))
    assert other.loss.item() == pytest.approx(same.loss.item(), rel=0.02)


def test_a_full_model_trains_against_a_frozen_copy() -> None:
    model = llama()
    frozen = copy.deepcopy(model)
    jolt = torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data.add_(torch.randn(weight.shape, generator=jolt) * 0.01)
    loss = rerouting_loss(model, batch(), (1.0, 1.0), Rerouting((2,), reference=frozen)).loss
    assert gradients(model, loss)
    assert all(p.grad is None for p in frozen.parameters())


@pytest.mark.parametrize(
    ("options", "inputs", "error", "message"),
    [
        (Rerouting((5,)), {}, ValueError, r"from 0 to 4 \(4 blocks"),
        (Rerouting((4,), "block"), {}, ValueError, "from 0 to 3"),
        (Rerouting(()), {}, ValueError, "target_layers"),
        (Rerouting((2, 2)), {}, ValueError, "different"),
        (Rerouting((2,)), {"attention_mask": torch.ones(3, 9)}, ValueError, "attention_mask"),
        (
            Rerouting((2,)),
            {"input_ids_circuit_breaker": None},
            ValueError,
            "input_ids_circuit_breaker",
        ),
        (Rerouting((2,), reference="precomputed"), {}, ValueError, "reference_hidden_states"),
    ],
)
def test_a_batch_or_a_layer_that_does_not_fit(
    options: Rerouting, inputs: Batch, error: type[Exception], message: str
) -> None:
    given = {k: v for k, v in {**batch(), **inputs}.items() if v is not None}
    with pytest.raises(error, match=message) as raised:
        rerouting_loss(adapted(llama()), given, (1.0, 1.0), options)
    assert "\n" not in str(raised.value)


def test_no_adapter_where_one_is_the_reference() -> None:
    with pytest.raises(ValueError, match="needs a PEFT adapter, LlamaForCausalLM has none"):
        rerouting_loss(llama(), batch(), (1.0, 1.0), Rerouting((2,)))


def test_a_model_without_blocks_is_named() -> None:
    with pytest.raises(ValueError, match="no transformer blocks found in Linear"):
        check_layers(nn.Linear(2, 2), (0,), "block")


def test_gradient_checkpointing_gives_the_same_gradients_and_reentrant_is_refused() -> None:
    model, inputs = adapted(llama()), batch()
    model.train()
    want = gradients(model, rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3))).loss)
    base = model.get_base_model()
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    got = gradients(model, rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3))).loss)
    assert_same_gradients(got, want, within=1e-6)
    # The older kind of checkpoint: whole gradients where the block's inputs have one, else refused.
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, that no input has a gradient
        try:
            terms = rerouting_loss(model, inputs, (2.0, 3.0), Rerouting((2, 3)))
        except RuntimeError as error:
            assert "use_reentrant=True; set it to False" in str(error)
        else:
            assert_same_gradients(gradients(model, terms.loss), want, within=1e-6)


# -- the published method's place --------------------------------------------------------------


class PublishedTrainer:
    """What the published trainer has that its compute_loss uses."""

    def __init__(self) -> None:
        self.current_training_step = 0
        self.logged: list[dict[str, float]] = []

    def get_training_progress(self) -> float:
        return self.current_training_step / 300

    def log(self, logs: dict[str, float]) -> None:
        self.logged.append(logs)


def test_compute_loss_stands_in_for_the_published_method() -> None:
    model, inputs, trainer = adapted(llama()), batch(), PublishedTrainer()
    for step in range(1, 11):
        loss = compute_loss(
            trainer, model, inputs, target_layers=[2, 3], alpha=10.0, tokenizer=object(),
            num_items_in_batch=3, full_layers=True,
        )  # fmt: skip
        assert trainer.current_training_step == step
        retain, cb = schedule(step, 150, 10.0)
        if step in (1, 10):
            torch.testing.assert_close(
                loss, published(model, inputs, (2, 3), retain, cb), rtol=1e-5, atol=1e-6
            )
    assert len(trainer.logged) == 1
    assert trainer.logged[0]["circuit_breaker/cb_coeff"] == pytest.approx(
        schedule(10, 150, 10.0)[1]
    )
    assert "circuit_breaker/val_cosine" in trainer.logged[0]
    trainer.current_training_step = 399
    (late,) = compute_loss(trainer, model, inputs, [2, 3], 10.0, return_outputs=True)
    assert late.requires_grad  # published code has no loss there


def test_compute_loss_needs_no_trainer_of_its_kind() -> None:
    trainer = types.SimpleNamespace()
    loss = compute_loss(trainer, adapted(llama()), batch(), [2], 10.0)
    assert isinstance(loss, Tensor) and loss.requires_grad
    assert trainer.current_training_step == 1


# -- the adapter ------------------------------------------------------------------------------


def test_lora_starts_at_rest_and_jitter_moves_it() -> None:
    options, inputs = Rerouting((2, 3)), batch()
    model = adapted(llama(), moved=0.0)
    at_rest = rerouting_loss(model, inputs, (0.0, 1.0), options)
    assert at_rest.loss.item() == pytest.approx(1.0, abs=1e-6)
    still = max(float(g.abs().max()) for g in gradients(model, at_rest.loss).values())
    assert still < 1e-7
    assert jitter(model, 1e-4) == 4 * 7
    assert jitter(model, 1e-4) == 0  # what has moved is left alone
    moved = rerouting_loss(model, inputs, (0.0, 1.0), options)
    assert moved.loss.item() == pytest.approx(1.0, abs=1e-6)
    assert max(float(g.abs().max()) for g in gradients(model, moved.loss).values()) > 20 * still


def test_the_larger_the_jitter_the_larger_the_gradient() -> None:
    """SPEC 4.5: std 0.02 gives a gradient of order 0.1."""
    model, inputs = adapted(llama(), moved=0.02), batch()
    found = gradients(model, rerouting_loss(model, inputs, (0.0, 1.0), Rerouting((2, 3))).loss)
    assert max(float(g.abs().max()) for g in found.values()) > 1e-3


def test_lora_lies_on_the_blocks_up_to_the_last_target() -> None:
    model = llama(n_layers=6)
    config = lora_config(model, LoraArguments(), LorraArguments(target_layers="1,3"))
    assert config.layers_to_transform == [0, 1, 2, 3]
    assert set(config.target_modules) == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    assert linear_names(blocks_of(gpt2())) == ["c_attn", "c_proj", "c_fc"]


def test_layers_by_default_are_the_published_ones_in_proportion() -> None:
    assert LorraArguments().layers_of(32) == (10, 20)
    assert LorraArguments().layers_of(4) == (2, 3)
    assert LorraArguments().layers_of(1) == (1,)
    assert LorraArguments(target_layers="10,20").layers_of(32) == (10, 20)


@pytest.mark.parametrize(
    ("lorra", "lora", "message"),
    [
        ({"target_layers": "ten"}, {}, "target_layers must be whole numbers"),
        ({"target_layers": "9"}, {}, "target_layers must be numbers from 0 to 4"),
        ({"target_layers": "0"}, {}, "one of them above 0"),
        ({"target_layers": "2", "transform_layers": "2"}, {}, "lie above the target layers"),
        ({"transform_layers": "0,9"}, {}, "transform_layers must be from 0 to 3"),
        ({}, {"lora_target_modules": ["q_proj", "wq"]}, "no wq in the blocks"),
    ],
)
def test_adapters_that_do_not_fit(
    lorra: dict[str, Any], lora: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lora_config(llama(), LoraArguments(**lora), LorraArguments(**lorra))


def test_blocks_of_two_kinds_all_get_their_lora() -> None:
    """Hybrid models have attention in some blocks only."""
    model = llama()
    model.model.layers[2].self_attn.extra_proj = nn.Linear(4, 4)
    config = lora_config(model, LoraArguments(), LorraArguments(target_layers="2,3"))
    assert "extra_proj" in config.target_modules


def test_jitter_leaves_an_adapter_that_is_not_trained_alone() -> None:
    model = adapted(llama(), moved=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.add_adapter("other", model.peft_config["default"])
    jitter(model, 1e-4)
    moved = {n for n, p in model.named_parameters() if "lora_B" in n and p.any()}
    assert moved and not any("other" in name for name in moved)


def test_the_reference_is_a_constant() -> None:
    hidden = [torch.randn(1, 3, 8, requires_grad=True)]
    original = [torch.randn(1, 3, 8, requires_grad=True)]
    (retain_loss(hidden, original) + circuit_breaker_loss(hidden, original)).backward()
    assert hidden[0].grad is not None and original[0].grad is None


def test_watching_a_term_without_a_coefficient_draws_nothing() -> None:
    model, inputs = adapted(llama(), dropout=0.5), batch()
    model.train()
    draws = []
    for monitor in (False, True):
        torch.manual_seed(0)
        rerouting_loss(model, inputs, (1.0, 0.0), Rerouting((2,)), monitor=monitor)
        draws.append(torch.rand(1).item())
    assert draws[0] == draws[1]
