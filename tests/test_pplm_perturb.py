"""perturb_past against Uber's way written down plainly: every loss, window, step and spelling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import transformers as hf

from onepass.bench import plain_pplm as plain
from onepass.demo.train import one_thread
from onepass.pplm import PPLM_BOW, PPLM_BOW_DISCRIM, PPLM_DISCRIM, ClassificationHead, perturb_past
from onepass.pplm.cache import as_cache, pack
from onepass.pplm.forward import check_places, materialized, places_of, run, steady
from onepass.pplm.perturb import Steps, goal_of
from onepass.pplm.walk import Choice, Walk
from support import tiny_pplm
from support.tiny_models import FAMILIES, D, V, tiny

LOSSES = {"bow": PPLM_BOW, "discrim": PPLM_DISCRIM, "both": PPLM_BOW_DISCRIM}


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


def made(name: str, rows: int = 1, n_tokens: int = 9, scale: float = 10.0) -> tuple[Any, Tensor]:
    """A model whose random weights are large enough for it to have opinions, and ids."""
    model = tiny(name).eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(scale)
    generator = torch.Generator().manual_seed(1)
    return model, torch.randint(3, V, (rows, n_tokens), generator=generator)


def bags() -> list[Tensor]:
    """Two bags as one-hot rows, in the first of which a word stands twice."""
    words = torch.tensor([5, 17, 17, 40]), torch.tensor([60, 61])
    return [torch.nn.functional.one_hot(w, V).float() for w in words]


def head(n_classes: int = 3) -> ClassificationHead:
    torch.manual_seed(3)
    return ClassificationHead(n_classes, D).requires_grad_(False)


def inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What the loop knows before a token: pasts, the last token, logits and hidden states."""
    with torch.no_grad():
        _, past, _ = plain.run(model, None, input_ids=ids[:, :-1])
        logits, unpert_past, hidden = plain.run(model, None, input_ids=ids)
    return {
        "past": past,
        "model": model,
        "last": ids[:, -1:],
        "unpert_past": unpert_past,
        "unpert_logits": logits,
        "accumulated_hidden": hidden[:, :-1].sum(1),
        "one_hot_bows_vectors": bags(),
        "classifier": head(),
        "class_label": 2,
        "stepsize": 0.02,
    }


def assert_same(got: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    for mine, theirs in zip(got[0], wanted[0], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[1], wanted[1].detach(), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(got[2], torch.stack(wanted[2]), rtol=1e-4, atol=tolerance)
    losses = torch.tensor([float(x) for x in wanted[3]])
    torch.testing.assert_close(torch.stack(got[3]), losses, rtol=tolerance, atol=tolerance)


CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "window": {"window_length": 3},
    "decay": {"window_length": 5, "decay": True},
    "window longer than the past": {"window_length": 20, "decay": True},
    "gamma 1, five steps": {"gamma": 1.0, "num_iterations": 5, "stepsize": 0.05},
    "gamma 0": {"gamma": 0.0},
    "no KL": {"kl_scale": 0.0},
    "much KL": {"kl_scale": 2.0, "stepsize": 0.1},
    "two ahead": {"horizon_length": 2},
    "no step": {"stepsize": 0.0},
}


@pytest.mark.parametrize("name", ["gpt2_tied", "llama"])  # the second has 2 key-value heads of 4
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_transcription(name: str, loss: str, case: str) -> None:
    model, ids = made(name)
    options = inputs(model, ids) | CASES[case] | {"loss_type": LOSSES[loss]}
    assert_same(perturb_past(**options), plain.perturb_past(**options))


@pytest.mark.parametrize("loss", LOSSES)
def test_window_side_last(loss: str) -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": LOSSES[loss], "window_length": 3}
    got = perturb_past(**options, window_side="last")
    assert_same(got, plain.perturb_past(**options, side="last"))
    before, after = options["past"][0], got[0][0]
    assert torch.equal(before[..., :-3, :], after[..., :-3, :])
    assert not torch.equal(before[..., -3:, :], after[..., -3:, :])


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_coupled_as_upstream(loss: str) -> None:
    model, ids = made("gpt2_tied", rows=3)
    options = inputs(model, ids) | {"loss_type": LOSSES[loss]}
    assert_same(perturb_past(**options), plain.perturb_past(**options))


def test_largest_norm_is_carried_from_token_to_token() -> None:
    model, ids = made("gpt2_tied")
    first = inputs(model, ids[:, :6]) | {"loss_type": PPLM_BOW}
    second = inputs(model, ids) | {"loss_type": PPLM_BOW}
    got, wanted = perturb_past(**first), plain.perturb_past(**first)
    assert_same(
        perturb_past(**second, grad_norms=got[2]),
        plain.perturb_past(**second, grad_norms=wanted[2]),
    )
    assert (perturb_past(**second, grad_norms=got[2])[2] >= got[2]).all()


def test_no_iteration_changes_nothing() -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"num_iterations": 0}
    past, hidden, norms, losses = perturb_past(**options)
    assert all(map(torch.equal, past, options["past"]))
    assert hidden is None and norms is None and losses == []


def test_a_bag_without_any_probability_moves_nothing() -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": 1, "kl_scale": 0.0}
    with torch.no_grad():  # the head's bias, as it were: exp(-1000) is 0 in fp32
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(-model.lm_head.weight[5])
        model.transformer.ln_f.bias.mul_(1000 / model.lm_head.weight[5].square().sum())
    rows = torch.nn.functional.one_hot(torch.tensor([5]), V).float()
    past, _, _, losses = perturb_past(**options | {"one_hot_bows_vectors": [rows]})
    assert all(map(torch.equal, past, options["past"]))
    assert torch.stack(losses).isfinite().all()


def test_every_spelling_of_a_past_comes_back_as_it_came() -> None:
    model, ids = made("llama")
    options = inputs(model, ids)
    wanted = perturb_past(**options)[0]
    packed, ahead = torch.stack(options["past"]), torch.stack(options["unpert_past"])
    pairs = tuple((both[0], both[1]) for both in options["past"])
    got, *_ = perturb_past(**options | {"past": pairs, "unpert_past": as_cache(ahead)})
    assert isinstance(got, tuple) and all(isinstance(pair, tuple) for pair in got)
    assert all(torch.equal(torch.stack(pair), both) for pair, both in zip(got, wanted, strict=True))
    cache, *_ = perturb_past(**options | {"past": as_cache(packed)})
    assert torch.equal(pack(cache), torch.stack(wanted))
    with torch.no_grad():  # and serves the model
        model(ids[:, -1:], past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]


def test_caller_and_model_are_left_as_they_were() -> None:
    model, ids = made("gpt2_tied")
    model.train().requires_grad_(True)
    model.transformer.wpe.weight.requires_grad_(False)
    classifier = head().train().requires_grad_(True)
    options = inputs(model.eval(), ids) | {"classifier": classifier}
    model.train()
    cache, ahead = (as_cache(torch.stack(options[name])) for name in ("past", "unpert_past"))
    options |= {"past": cache, "unpert_past": ahead}
    tensors = [*model.parameters(), *classifier.parameters(), pack(cache), pack(ahead)]
    before = [tensor.detach().clone() for tensor in tensors]
    flags = [p.requires_grad for p in model.parameters()]
    got = perturb_past(**options)
    after = [*model.parameters(), *classifier.parameters(), pack(cache), pack(ahead)]
    assert all(map(torch.equal, before, after))
    assert cache.get_seq_length() == ids.shape[1] - 1 and ahead.get_seq_length() == ids.shape[1]
    assert all(p.grad is None for p in [*model.parameters(), *classifier.parameters()])
    assert [p.requires_grad for p in model.parameters()] == flags
    assert model.training and classifier.training and "forward" not in vars(model.lm_head)
    assert not any(t.requires_grad for t in (pack(got[0]), got[1], got[2], *got[3]))


def test_within_inference_mode_and_no_grad() -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids)
    wanted = perturb_past(**options)
    with torch.inference_mode():
        _, past, _ = plain.run(model, None, input_ids=ids[:, :-1])
        logits, ahead, _ = plain.run(model, None, input_ids=ids)
        got = perturb_past(
            **options | {"past": past, "unpert_past": ahead, "unpert_logits": logits}
        )
    assert all(map(torch.equal, got[0], wanted[0]))


def of_goal(options: dict[str, Any], past: list[Tensor]) -> tuple[float, float]:
    """What the bags have together, and the class's cross-entropy, of the token after this past."""
    with torch.no_grad():
        logits, ahead, _ = plain.run(options["model"], past, input_ids=options["last"])
    probs = logits[:, -1].softmax(-1)
    mass = sum(float((probs @ rows.t()).sum()) for rows in options["one_hot_bows_vectors"])
    loss = perturb_past(
        **options | {"past": past, "loss_type": 2, "kl_scale": 0.0, "num_iterations": 1}
    )[3][0]
    return mass, float(loss)


def test_bags_gain_and_class_losses_fall() -> None:
    """At SPEC's settings: stepsize .02, 3 iterations, 20 prompts; both all but always."""
    model = tiny_pplm.model().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    gained = fell = 0
    for _ in range(20):
        ids = torch.randint(3, V, (1, 8), generator=generator)
        options = inputs(model, ids)
        before = of_goal(options, options["past"])
        gained += of_goal(options, perturb_past(**options | {"loss_type": 1})[0])[0] > before[0]
        fell += of_goal(options, perturb_past(**options | {"loss_type": 2})[0])[1] < before[1]
    assert gained >= 18 and fell >= 18, (gained, fell)


def test_kl_holds_the_model_near() -> None:
    """Large steps, many of them: at the default ones the length of a step hides kl_scale."""
    model = tiny_pplm.model().requires_grad_(False)
    _, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": 1, "stepsize": 0.1, "num_iterations": 20}
    found = []
    for kl_scale in (0.0, 0.5, 5.0):
        past = perturb_past(**options | {"kl_scale": kl_scale})[0]
        with torch.no_grad():
            logits = plain.run(model, past, input_ids=ids[:, -1:])[0][:, -1]
        log_p, log_u = logits.log_softmax(-1), options["unpert_logits"][:, -1].log_softmax(-1)
        found.append(float((log_p.exp() * (log_p - log_u)).sum()))
    assert found[0] > found[1] > 2 * found[2], found


@pytest.mark.parametrize("name", ["gpt2_tied", "llama"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("case", "side"),
    [("defaults", "first"), ("window", "first"), ("decay", "last"), ("two ahead", "first")],
)
def test_rows_of_a_padded_batch_are_as_alone(name: str, loss: str, case: str, side: str) -> None:
    model, _ = made(name)
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(3, V, (1, n), generator=generator) for n in (9, 4, 7)]
    more = CASES[case] | {"loss_type": LOSSES[loss], "per_row": True, "window_side": side}
    alone = [perturb_past(**inputs(model, ids) | more) for ids in rows]
    mask = torch.tensor([[0] * (9 - ids.shape[1]) + [1] * ids.shape[1] for ids in rows])
    ids = torch.cat([torch.nn.functional.pad(ids, (9 - ids.shape[1], 0)) for ids in rows])
    options = inputs(model, ids) | more
    with torch.no_grad(), steady(model):
        before = run(model, ids[:, :-1], None, mask[:, :-1], logits=False)
        whole = run(model, ids, None, mask)
        assert whole.logits is not None
        logits = materialized(whole.logits)[:, None]
    hidden = (before.hidden * mask[:, :-1, None]).sum(1)
    options |= {"past": list(before.past()), "unpert_past": list(whole.past())}
    options |= {"unpert_logits": logits, "accumulated_hidden": hidden}
    got = perturb_past(**options, attention_mask=mask)
    for row, (past, total, norms, losses) in enumerate(alone):
        length = rows[row].shape[1] - 1
        for mine, theirs in zip(got[0], past, strict=True):
            close(mine[:, row, :, -length:], theirs[:, 0])
        assert got[1] is not None and total is not None
        close(got[1][row], total[0])
        close(got[2][:, row], norms[:, 0], 1e-4)
        close(torch.stack(got[3])[:, row], torch.stack(losses)[:, 0])


def close(got: Tensor, wanted: Tensor, rtol: float = 1e-5) -> None:
    torch.testing.assert_close(got, wanted, rtol=rtol, atol=1e-5)


class Widest(TorchDispatchMode):
    """The most rows of logits that an operation makes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor) and tensor.dim() > 1 and tensor.shape[-1] == V:
                if tensor.shape[-2] != D and not tensor._is_view():  # the head's weight, turned
                    self.rows = max(self.rows, tensor.numel() // V)
        return out


def test_no_logits_of_all_positions() -> None:
    model, ids = made("gpt2_tied", n_tokens=12)
    with Widest() as plainly:
        with torch.no_grad():
            model(ids)
    goal = goal_of(3, bags(), head(), 1)
    with Widest() as ours:
        walk = Walk(model, ids, goal, Steps(stepsize=0.02), 2)
        walk.append(Choice().token(walk.next()))
        walk.append(Choice().token(walk.next()))
    assert plainly.rows == 12 and ours.rows == 1


def test_bf16_steps_are_taken_in_fp32() -> None:
    model, ids = made("gpt2_tied")
    wanted = perturb_past(**inputs(model, ids))
    options = inputs(model.bfloat16(), ids)
    got = perturb_past(**options)
    assert got[0][0].dtype == torch.bfloat16 and got[2].dtype == torch.float32
    torch.testing.assert_close(got[0][0].float(), wanted[0][0], rtol=0.05, atol=0.05)
    options["classifier"] = torch.nn.Linear(D, 3).bfloat16()  # anybody's
    assert torch.stack(perturb_past(**options)[3]).isfinite().all()


SIZES: dict[str, Any] = {"vocab_size": V, "n_layer": 2, "n_head": 4}
NO_PAST = {
    "bert": lambda: hf.BertForMaskedLM(
        hf.BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ),
    "gpt": lambda: hf.OpenAIGPTLMHeadModel(hf.OpenAIGPTConfig(**SIZES, n_embd=D)),
    "rwkv": lambda: hf.RwkvForCausalLM(
        hf.RwkvConfig(vocab_size=V, hidden_size=D, num_hidden_layers=2)
    ),
    "xlnet": lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(**SIZES, d_model=D, d_inner=48)),
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"one_hot_bows_vectors": None, "classifier": None}, "neither a bag of words"),
    "no bag": ({"one_hot_bows_vectors": None, "loss_type": 1}, "no bag of words with a word"),
    "empty bag": ({"one_hot_bows_vectors": [torch.zeros(0, V)], "loss_type": 1}, "no bag of words"),
    "no head": ({"classifier": None, "loss_type": 2}, "steers by a classifier: got none"),
    "other type": ({"loss_type": 4}, "loss_type must be 1"),
    "class": ({"class_label": 3}, "class_label: got 3, wanted a class's number from 0 to 2"),
    "no class": ({"class_label": None}, "class_label: got None"),
    "head of another size": ({"classifier": ClassificationHead(3, 7)}, "hidden states of 7"),
    "bag of another size": ({"one_hot_bows_vectors": [torch.eye(200)]}, "token 199 is beyond"),
    "decay": ({"decay": True}, "decay is along a window"),
    "horizon": ({"horizon_length": 0}, "horizon_length must be at least 1"),
    "stepsize": ({"stepsize": -1.0}, "stepsize must be"),
    "side": ({"window_side": "left"}, "window_side must be one of first, last"),
    "last": ({"last": torch.tensor([[1, 2]])}, r"last must be \[B, 1\]"),
    "no past ahead": ({"unpert_past": None}, "a classifier looks ahead of unpert_past"),
    "no logits": ({"unpert_logits": None}, "wanted unpert_logits"),
    "mask": ({"attention_mask": torch.ones(1, 3)}, r"attention_mask must be \(1, 9\)"),
    "past": ({"past": []}, "past holds no token"),
    "floats for ids": (
        {"last": torch.ones(1, 1)},
        r"last must be .* ids: got \(1, 1\) torch.float",
    ),
    "three layers": (
        {"past": [torch.ones(2, 1, 4, 8, 8)] * 3},
        r"past .* \(3, 1, 8\): wanted \(2, 1, 8\)",
    ),
    "two rows": ({"past": [torch.ones(2, 2, 4, 8, 8)] * 2}, r"last must be \[B, 1\] = \(2, 1\)"),
    "two rows ahead": (
        {"unpert_past": [torch.ones(2, 2, 4, 9, 8)] * 2},
        r"unpert_past has layers, rows and tokens \(2, 2, 9\): wanted \(2, 1, 9\)",
    ),
    "no token ahead": (
        {"unpert_past": [torch.ones(2, 1, 4, 8, 8)] * 2},
        r"unpert_past .* \(2, 1, 8\): wanted \(2, 1, 9\)",
    ),
    "right padding": (
        {"attention_mask": torch.tensor([[1] * 8 + [0]])},
        "attention_mask must be 0 where a row is padded on its left",
    ),
    "three norms": ({"grad_norms": [1.0, 1.0, 1.0]}, r"grad_norms must be \(2,\): got \(3,\)"),
    "hidden of two": ({"accumulated_hidden": torch.ones(2, D)}, "accumulated_hidden must be"),
    "class of a layer": (
        {"classifier": torch.nn.Linear(D, 3), "class_label": 7},
        "class_label: got 7, wanted .* to 2",
    ),
}


def test_spellings_of_norms_masks_and_sums() -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": PPLM_BOW, "grad_norms": torch.ones(2)}
    wanted = perturb_past(**options)
    options |= {"grad_norms": [1.0, 1.0], "attention_mask": torch.ones(1, 9)}
    got = perturb_past(**options | {"classifier": lambda hidden: hidden})
    torch.testing.assert_close(got[0], wanted[0])
    none = perturb_past(**options | {"accumulated_hidden": None})[1]
    zero = perturb_past(**options | {"accumulated_hidden": 0})[1]
    assert none is not None and zero is not None and torch.equal(none, zero)


def test_the_floor_under_the_unperturbed_probabilities() -> None:
    """Where the unperturbed model has e^-60 the KL takes Uber's 1e-15, and is far smaller."""
    model, ids = made("gpt2_tied")
    options = inputs(model, ids) | {"loss_type": PPLM_BOW, "kl_scale": 1.0}
    logits = options["unpert_logits"].clone()
    likeliest = int(logits[0, -1].argmax())
    logits[0, -1, likeliest] -= 60.0
    options["unpert_logits"] = logits
    assert_same(perturb_past(**options), plain.perturb_past(**options))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    model, ids = made("gpt2_tied")
    changed, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message) as error:
        perturb_past(**inputs(model, ids) | changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("t5_encoder_decoder", "encoder-decoder"),
        ("falcon_h1_scale", "layer 0 keeps no keys"),
        ("bert", "BertForMaskedLM sees what comes after a token"),
        ("gpt", "OpenAIGPTLMHeadModel takes no past of keys and values"),
        ("rwkv", "RwkvForCausalLM takes no past of keys and values"),
        ("xlnet", "XLNetLMHeadModel takes no past of keys and values"),
    ],
)
def test_models_without_a_past_of_keys_and_values(name: str, message: str) -> None:
    model, ids = made("gpt2_tied")
    other = NO_PAST[name]() if name in NO_PAST else tiny(name)
    with pytest.raises(ValueError, match=message):
        perturb_past(**inputs(model, ids) | {"model": other})
    with pytest.raises(ValueError, match=message):
        Walk(other, ids, None, Steps(), 1)


def test_a_model_of_no_limit_has_positions() -> None:
    model, _ = made("gpt2_tied")
    assert places_of(model) == 64
    model.config.n_positions = -1
    assert places_of(model) is None
    check_places(model, 60, 60)


def test_a_model_made_inside_inference_mode() -> None:
    model, ids = made("gpt2_tied")
    options = inputs(model, ids)
    with torch.inference_mode():
        other = tiny("gpt2_tied")
    with pytest.raises(ValueError, match="GPT2LMHeadModel was made inside torch.inference_mode"):
        perturb_past(**options | {"model": other})


@pytest.mark.skipif("minicpm3_scale" not in FAMILIES, reason="transformers has it not yet")
def test_keys_and_values_of_unlike_sizes() -> None:
    model, ids = made("minicpm3_scale")
    with torch.no_grad(), pytest.raises(ValueError, match="the values of layer 0 are .* the keys"):
        pack(model(ids, use_cache=True).past_key_values)


def test_caches_that_keep_something_else() -> None:
    from transformers import DynamicCache

    mistral = tiny("mistral").eval()  # a window of 8
    ids = torch.randint(3, V, (1, 12))
    out = mistral(ids, use_cache=True)
    with pytest.raises(ValueError, match=r"keeps \(1, 2, 7, 8\) of 12 tokens.*DynamicCache\(\)"):
        pack(out.past_key_values)
    assert pack(mistral(ids, past_key_values=DynamicCache()).past_key_values).shape[-2] == 12
    with pytest.raises(ValueError, match="the keys of layer 1 are"):
        pack([torch.zeros(2, 1, 2, 3, 4), torch.zeros(2, 1, 2, 3, 5)])
    with pytest.raises(TypeError, match="got int"):
        pack(3)
    with pytest.raises(TypeError, match=r"got \(2, 2\) at layer 0"):
        pack([torch.zeros(2, 2)])
