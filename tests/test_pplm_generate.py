"""Steered texts: Uber's functions against the plain transcription, batches, seeds, ends."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers as hf

from onepass.bench import plain_pplm as plain
from onepass.demo.train import one_thread
from onepass.pplm import (
    DiscriminatorV2,
    build_bows_one_hot_vectors,
    full_text_generation,
    generate_text_pplm,
    load_head,
    run_pplm_example,
    save_discriminator,
    steered,
    stream_pplm,
    train_discriminator,
)
from onepass.pplm.forward import soft_inputs
from onepass.pplm.generate import chosen
from support import tiny_models, tiny_pplm
from support.tiny_models import D, V

LOSSES = {"bow": 1, "discrim": 2, "both": 3}
WORDS = tiny_pplm.BAG


@pytest.fixture(autouse=True, scope="module")
def single() -> Iterator[None]:
    with one_thread():
        yield


def setting(family: str = "gpt2_tied") -> tuple[Any, Any]:
    model = tiny_pplm.model(family)
    model.generation_config.eos_token_id = None
    return model, tiny_pplm.tokenizer()


def indices() -> list[list[list[int]]]:
    tokenizer = tiny_pplm.tokenizer()
    return [[tokenizer.encode(word) for word in WORDS]]


def goal(**more: Any) -> dict[str, Any]:
    return {
        "bow_indices": indices(),
        "classifier": tiny_pplm.head().requires_grad_(False),
        "class_label": 1,
        "stepsize": 0.1,
        "length": 6,
    } | more


def prompt(n: int = 5, seed: int = 1) -> Tensor:
    return torch.randint(12, V, (1, n), generator=torch.Generator().manual_seed(seed))


def as_plain(how: dict[str, Any]) -> dict[str, Any]:
    """The transcription's arguments of the same goal."""
    rows = build_bows_one_hot_vectors(how["bow_indices"], tiny_pplm.tokenizer())
    taken = {k: v for k, v in how.items() if k not in ("bow_indices", "length")}
    return taken | {"one_hot_bows_vectors": rows}


@pytest.mark.parametrize("family", ["gpt2_tied", "llama"])
@pytest.mark.parametrize("loss", LOSSES)
def test_greedy_text_equals_the_plain_transcription(family: str, loss: str) -> None:
    model, tokenizer = setting(family)
    how = goal(loss_type=LOSSES[loss])
    ids, class_loss, losses = generate_text_pplm(model, tokenizer, prompt(), **how)
    walk = plain.Walk(model, prompt(), **as_plain(how))
    for _ in range(6):
        walk.append(walk.step().argmax(-1))
    assert ids.tolist() == walk.ids.tolist()
    got = torch.stack([torch.stack(found)[:, 0] for found in losses])
    wanted = torch.tensor([[float(x) for x in found] for found in walk.losses])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    if loss == "bow":
        assert class_loss == 0
    else:
        with torch.no_grad():  # of the text as it was before its last token
            hidden = model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
            scores = how["classifier"](hidden.mean(1))
        wanted_loss = nn.functional.cross_entropy(scores, torch.tensor([1]))
        torch.testing.assert_close(class_loss, wanted_loss, rtol=1e-5, atol=1e-5)


FAMILIES = ["mistral", "qwen3", "gemma2_softcap", "cohere_scale", "granite_scale", "phi_bias"]


def opt() -> Any:
    """Its head calls the decoder itself, not the base model."""
    sizes = {"hidden_size": D, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.OPTConfig(vocab_size=V, max_position_embeddings=64, **sizes)
    return hf.OPTForCausalLM(config)


def bart() -> Any:
    sizes = {"d_model": D, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}
    own = {"max_position_embeddings": 64, "is_decoder": True, "is_encoder_decoder": False}
    return hf.BartForCausalLM(hf.BartConfig(vocab_size=V, **sizes, **own))


@pytest.fixture
def more_families(monkeypatch: pytest.MonkeyPatch) -> None:
    for family in (opt, bart):
        monkeypatch.setitem(tiny_models.FAMILIES, family.__name__, family)


@pytest.mark.parametrize("family", [*FAMILIES, "mixtral_aux", "opt", "bart"])
def test_families_of_models(
    family: str, more_families: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows of attention that are exceeded, softcaps, scales and biases of heads."""
    model, tokenizer = setting(family)
    ids = prompt(14)
    how = goal(loss_type=3, length=2)
    got, _, losses = generate_text_pplm(model, tokenizer, ids, **how)
    # Uber's code knows no embedding layer that scales, as Gemma's does
    layer = model.get_input_embeddings()
    scaled = SimpleNamespace(weight=layer.weight * getattr(layer, "embed_scale", 1.0))
    monkeypatch.setattr(model, "get_input_embeddings", lambda: scaled)
    walk = plain.Walk(model, ids, **as_plain(how))
    for _ in range(2):
        walk.append(walk.step().argmax(-1))
    assert got.tolist() == walk.ids.tolist()
    found = torch.tensor([[float(x) for x in of_token] for of_token in losses])
    wanted = torch.tensor([[float(x) for x in of_token] for of_token in walk.losses])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2_tied", "gemma2_softcap"])
def test_the_mean_next_token_of_a_certain_model_is_that_token(family: str) -> None:
    model, _ = setting(family)
    layer = model.get_input_embeddings()
    got = soft_inputs(model, layer.weight[7:8])
    torch.testing.assert_close(got, layer(torch.tensor([[7]])))


@pytest.mark.parametrize(
    ("options", "plainly"),
    [
        ({"window_length": 2, "decay": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"gm_scale": 0.5, "top_k": 3, "kl_scale": 0.5}, {"gm_scale": 0.5, "top_k": 3}),
        ({"gm_scale": 1.0, "top_k": 0, "gamma": 1.0}, {"gm_scale": 1.0, "top_k": 0}),
    ],
)
def test_distributions_equal_the_plain_ones(
    options: dict[str, Any], plainly: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn from, token by token, by teacher forcing of the greedy text."""
    from onepass.pplm import sampling, walk

    model, tokenizer = setting()
    drawn: list[Tensor] = []

    def most(probs: Tensor, generator: Any = None) -> Tensor:
        drawn.append(probs)
        return probs.argmax(-1, keepdim=True)

    monkeypatch.setattr(walk, "draw", most)
    assert sampling.draw is not most
    how = goal(loss_type=1) | options
    generate_text_pplm(model, tokenizer, prompt(), sample=True, **how)
    of_steps = {k: v for k, v in as_plain(how).items() if k not in plainly}
    theirs = plain.Walk(model, prompt(), **of_steps)
    for mine in drawn:
        probs = theirs.step(**{"temperature": 1.0, "gm_scale": 0.9, "top_k": 10} | plainly)
        torch.testing.assert_close(mine, probs / probs.sum(), rtol=1e-4, atol=1e-6)
        theirs.append(probs.argmax(-1))


def test_limits() -> None:
    model, tokenizer = setting()
    ids = prompt()
    unsteered, _, none = generate_text_pplm(model, tokenizer, ids, perturb=False, length=6)
    assert none == []
    plain_ids = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert unsteered.tolist() == plain_ids.tolist()
    for limit in ({"stepsize": 0.0}, {"num_iterations": 0}, {"gm_scale": 0.0}, {"grad_length": 0}):
        same, _, _ = generate_text_pplm(model, tokenizer, ids, **goal() | limit)
        assert same.tolist() == unsteered.tolist(), limit
    steered, _, _ = generate_text_pplm(model, tokenizer, ids, **goal(stepsize=0.3, gm_scale=1.0))
    assert steered.tolist() != unsteered.tolist()


def test_grad_length_ends_the_steps_and_keeps_what_they_did() -> None:
    model, tokenizer = setting()
    whole, _, _ = generate_text_pplm(model, tokenizer, prompt(), **goal(length=2))
    ids, _, losses = generate_text_pplm(model, tokenizer, prompt(), **goal(grad_length=2))
    assert len(losses) == 2 and ids[:, :7].tolist() == whole.tolist()


def test_a_context_of_one_token_is_steered_from_the_second_on() -> None:
    model, tokenizer = setting()
    how = goal(loss_type=3)
    ids, _, losses = generate_text_pplm(model, tokenizer, None, **how)
    assert ids[0, 0] == tokenizer.bos_token_id and len(losses) == 5
    walk = plain.Walk(model, torch.tensor([[tokenizer.bos_token_id]]), **as_plain(how))
    for _ in range(6):
        walk.append(walk.step().argmax(-1))
    assert ids.tolist() == walk.ids.tolist()


@pytest.mark.parametrize("family", ["gpt2_tied", "llama", "mixtral_aux", "opt"])
def test_texts_of_a_batch_are_each_as_alone(family: str, more_families: None) -> None:
    model, tokenizer = setting(family)
    texts = [prompt(n, seed=n)[0].tolist() for n in (6, 1, 4)]
    how = goal(loss_type=3, window_length=3, window_side="last")
    ids, class_loss, losses = generate_text_pplm(model, tokenizer, texts, **how)
    assert ids.shape == (3, 12)
    class_losses = []
    for row, text in enumerate(texts):
        alone, of_class, wanted = generate_text_pplm(model, tokenizer, text, **how)
        class_losses.append(of_class)
        assert ids[row, 6 - len(text) :].tolist() == alone[0].tolist()
        got = [[float(x[row]) for x in found] for found in losses[-len(wanted) :]]
        torch.testing.assert_close(
            torch.tensor(got), torch.tensor([[float(x) for x in w] for w in wanted]),
            rtol=1e-4, atol=1e-5,
        )  # fmt: skip
    torch.testing.assert_close(class_loss, torch.stack(class_losses).mean())


@pytest.mark.parametrize("loss", LOSSES)
def test_a_row_without_a_past_takes_no_step(loss: str) -> None:
    """A gradient of norm 0 to the power -3."""
    model, tokenizer = setting()
    texts = [prompt(5)[0].tolist(), [7]]
    how = goal(loss_type=LOSSES[loss], gamma=3.0, length=4, stepsize=1e-8)
    ids, _, losses = generate_text_pplm(model, tokenizer, texts, **how)
    assert all(torch.stack(found).isfinite().all() for found in losses)
    for row, text in enumerate(texts):
        alone, _, _ = generate_text_pplm(model, tokenizer, text, **how)
        assert ids[row, 5 - len(text) :].tolist() == alone[0].tolist()


def test_a_row_that_has_ended_counts_no_more() -> None:
    model, tokenizer = setting()
    texts = [prompt(6, seed=0)[0].tolist(), prompt(4, seed=10)[0].tolist()]
    how = goal(loss_type=3)
    ids, _, _ = generate_text_pplm(model, tokenizer, texts, **how)
    first, second = ids[:, 6:].tolist()
    how["eos_token_id"] = next(token for token in first[1:4] if token not in second)
    end = first.index(how["eos_token_id"]) + 1
    _, class_loss, losses = generate_text_pplm(model, tokenizer, texts, **how)
    alone = [generate_text_pplm(model, tokenizer, text, **how) for text in texts]
    assert len(losses) == 6 and len(alone[0][2]) == end < 6
    torch.testing.assert_close(class_loss, torch.stack([found[1] for found in alone]).mean())
    ended = torch.stack([torch.stack(found) for found in losses]).isnan()
    assert ended[end:, :, 0].all() and not ended[:end, :, 0].any() and not ended[..., 1].any()


def test_a_classifier_measures_what_is_not_steered() -> None:
    model, tokenizer = setting()
    how = goal(loss_type=3, temperature=0.5)
    ids, class_loss, losses = generate_text_pplm(model, tokenizer, prompt(), perturb=False, **how)
    plainly, none, _ = generate_text_pplm(model, tokenizer, prompt(), perturb=False, length=6)
    full = how | {"length": 60, "perturb": False}  # 64 positions: nothing is looked ahead at
    assert generate_text_pplm(model, tokenizer, prompt(), **full)[0].shape == (1, 65)
    assert ids.tolist() == plainly.tolist() and losses == [] and none == 0
    with torch.no_grad():
        hidden = model(ids[:, :-1], output_hidden_states=True).hidden_states[-1]
        scores = how["classifier"](hidden.mean(1))
    wanted = nn.functional.cross_entropy(scores, torch.tensor([1]))
    torch.testing.assert_close(class_loss, wanted, rtol=1e-5, atol=1e-5)
    drawn = []
    for gm_scale in (0.0, 1.0):  # of the model at its temperature alone, nothing is fused
        how |= {"gm_scale": gm_scale, "sample": True, "generator": torch.Generator().manual_seed(0)}
        drawn.append(generate_text_pplm(model, tokenizer, prompt(), perturb=False, **how)[0])
    assert torch.equal(*drawn)


def test_a_model_in_training_is_steered_as_in_eval_mode() -> None:
    model, tokenizer = setting()
    linear = tiny_pplm.head().mlp
    how = goal(classifier=nn.Sequential(nn.Dropout(0.5), linear).train())
    wanted, _, of_eval = generate_text_pplm(
        model, tokenizer, prompt(), **how | {"classifier": linear}
    )
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    got, _, losses = generate_text_pplm(model.train(), tokenizer, prompt(), **how)
    assert got.tolist() == wanted.tolist() and model.training and how["classifier"].training
    for mine, theirs in zip(losses, of_eval, strict=True):
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs))


MASKS = {
    "on the right": [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]],
    "nothing else": [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "a hole": [[1, 0, 1, 1, 1], [1, 1, 1, 1, 1]],
    "other numbers": [[0, 1, 2, 2, 2], [1, 1, 1, 1, 1]],
    "halves": [[0.0, 0.5, 1, 1, 1], [1, 1, 1, 1, 1]],
}


@pytest.mark.parametrize("case", MASKS)
def test_masks_of_something_else_than_padding_on_the_left(case: str) -> None:
    model, tokenizer = setting()
    mask = torch.tensor(MASKS[case])
    ids = torch.cat([prompt(), prompt(seed=2)])
    with pytest.raises(ValueError, match="attention_mask must be 0 where a row is padded"):
        generate_text_pplm(model, tokenizer, ids, attention_mask=mask, **goal())
    steering = steered(tokenizer, discrim=tiny_pplm.head(), class_label=1)
    with pytest.raises(ValueError, match="attention_mask must be 0 where a row is padded"):
        model.generate(ids, attention_mask=mask, custom_generate=steering, max_new_tokens=2)


def test_a_model_that_would_count_padding(more_families: None) -> None:
    model, tokenizer = setting("bart")
    with pytest.raises(ValueError, match="BartForCausalLM takes no position_ids"):
        generate_text_pplm(model, tokenizer, [[5, 6, 7], [5, 6]], **goal())
    alike = generate_text_pplm(model, tokenizer, [[5, 6], [7, 8]], **goal(length=2))[0]
    assert alike.shape == (2, 4)


def test_masks_of_any_dtype() -> None:
    model, tokenizer = setting()
    ids, mask = prompt(), torch.tensor([[0, 0, 1, 1, 1]])
    found = [
        generate_text_pplm(model, tokenizer, ids, attention_mask=mask.to(dtype), **goal())[0]
        for dtype in (torch.int64, torch.bool, torch.float32)
    ]
    assert all(torch.equal(found[0], other) for other in found)


TARGETS = ["q_proj", "embed_tokens", "lm_head"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecated
def test_an_adapter_is_steered_with_its_model() -> None:
    peft = pytest.importorskip("peft")
    base, tokenizer = setting("llama")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=TARGETS, r=2)
    model = peft.get_peft_model(base, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:  # they begin as 0
            nn.init.normal_(parameter, std=0.3)
    how = goal(loss_type=3)
    got, _, losses = generate_text_pplm(model, tokenizer, prompt(), **how)
    for kind in (peft.PromptTuningConfig, peft.PrefixTuningConfig, peft.PromptEncoderConfig):
        prompts = peft.get_peft_model(
            setting("llama")[0], kind(task_type="CAUSAL_LM", num_virtual_tokens=2)
        )
        with pytest.raises(ValueError, match="prompt learning"):
            generate_text_pplm(prompts, tokenizer, prompt(), **how)
    walk = plain.Walk(model.merge_and_unload(), prompt(), **as_plain(how))
    for _ in range(6):
        walk.append(walk.step().argmax(-1))
    assert got.tolist() == walk.ids.tolist()
    found = torch.tensor([[float(x) for x in of_token] for of_token in losses])
    wanted = torch.tensor([[float(x) for x in of_token] for of_token in walk.losses])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_within_inference_mode(tmp_path: Path) -> None:
    model, tokenizer = setting()
    bag = str(tmp_path / "bag.txt")
    Path(bag).write_text("\n".join(WORDS), "utf-8")
    save_discriminator(
        tiny_pplm.head(), path=tmp_path, file_name="h.safetensors", args={"default_class": 1}
    )
    texts = [prompt(n)[0].tolist() for n in (5, 3)]
    how = goal(loss_type=3, length=3)
    wanted, _, _ = generate_text_pplm(model, tokenizer, texts, **how)
    with torch.inference_mode():
        mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
        ids = torch.tensor([texts[0], [0, 0, *texts[1]]])
        got, _, _ = generate_text_pplm(model, tokenizer, ids, attention_mask=mask, **how)
        streamed = list(stream_pplm(model, tokenizer, "w1 w2", length=2, bag_of_words=bag))
        how = {"discrim": str(tmp_path / "h.safetensors"), "bag_of_words": bag, "length": 2}
        full = full_text_generation(model, tokenizer, prompt(), num_samples=2, **how)
        steering = steered(tokenizer, discrim=how["discrim"], bag_of_words=bag)
        within = model.generate(prompt(), custom_generate=steering, max_new_tokens=2)
    assert got.tolist() == wanted.tolist()
    assert len(streamed) == 2 and within.shape == (1, 7)
    again = full_text_generation(model, tokenizer, prompt(), num_samples=2, **how)
    assert all(map(torch.equal, full[1], again[1]))


def test_a_past_that_is_given() -> None:
    model, tokenizer = setting()
    how = goal(loss_type=2)
    walk = plain.Walk(model, prompt(), **as_plain(how))
    for _ in range(2):
        walk.append(walk.step().argmax(-1))
    whole, _, losses = generate_text_pplm(model, tokenizer, prompt(), **how)
    how["length"] = 1
    ids, _, of_last = generate_text_pplm(model, tokenizer, walk.ids, past=walk.past, **how)
    assert ids.tolist() == whole[:, :8].tolist()
    torch.testing.assert_close(torch.stack(of_last[0]), torch.stack(losses[2]))
    with pytest.raises(ValueError, match=r"\(2, 1, 6\): wanted \(2, 1, 4\)"):
        generate_text_pplm(model, tokenizer, prompt(), past=walk.past, **how)


def test_what_changes_nothing_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = setting()
    (tmp_path / "bag.txt").write_text("\n".join(WORDS), "utf-8")
    full_text_generation(
        model, tokenizer, prompt(), 2, bag_of_words=str(tmp_path / "bag.txt"), length=1, step_size=5
    )
    told = [record.getMessage() for record in caplog.records]
    assert "full_text_generation does not know step_size: not used" in told
    assert "without sample=True all 2 steered texts are the same" in told


def test_full_text_generation(tmp_path: Path) -> None:
    model, tokenizer = setting()
    (tmp_path / "bag.txt").write_text("\n".join(WORDS), "utf-8")
    bag = str(tmp_path / "bag.txt")
    save_discriminator(
        tiny_pplm.head(), path=tmp_path, file_name="h.safetensors", args={"default_class": 1}
    )

    def run(seed: int = 0, **options: Any) -> Any:
        how: Any = {"bag_of_words": bag, "length": 5, "stepsize": 0.1} | options
        generator = torch.Generator().manual_seed(seed)
        return full_text_generation(model, tokenizer, prompt(), generator=generator, **how)

    unsteered, texts, class_losses, losses = run(discrim=str(tmp_path / "h.safetensors"))
    wanted, class_loss, _ = generate_text_pplm(
        model, tokenizer, prompt(), **goal(loss_type=3, length=5)
    )
    assert [text.tolist() for text in texts] == [wanted.tolist()]
    torch.testing.assert_close(class_losses[0], class_loss)
    assert len(losses) == 1 and len(losses[0]) == 5 and len(losses[0][0]) == 3
    plainly = generate_text_pplm(model, tokenizer, prompt(), perturb=False, length=5)[0]
    assert unsteered.tolist() == plainly.tolist()
    hot = run(sample=True, top_k=1, temperature=5.0)[0]  # which are of the steered texts
    assert torch.equal(hot, run(sample=True)[0]) and not torch.equal(hot, unsteered)
    three = run(num_samples=3, sample=True)
    assert len({tuple(text[0].tolist()) for text in three[1]}) > 1 and three[2] == []
    again = run(num_samples=3, sample=True)
    assert all(map(torch.equal, three[1], again[1])) and torch.equal(three[0], again[0])
    other = run(1, num_samples=3, sample=True)
    assert not all(map(torch.equal, three[1], other[1]))
    # rows are cut where they end
    stops = [int(token) for token in three[1][0][0, 6:8]]
    _, texts, _, losses = run(num_samples=3, sample=True, eos_token_id=stops)
    new = [text[0, 5:].tolist() for text in texts]
    assert any(len(row) < 5 for row in new)
    for row, found in zip(new, losses, strict=True):
        assert not set(row[:-1]) & set(stops) and (len(row) == 5 or row[-1] in stops)
        assert len(found) == len(row)


def test_stream_gives_what_generate_does() -> None:
    model, tokenizer = setting()
    how: dict[str, Any] = {"discrim": tiny_pplm.head(), "class_label": 1, "stepsize": 0.1}
    prompts = ["w1 w2 w3", "w4"]
    got = list(stream_pplm(model, tokenizer, prompts, length=5, **how))
    texts = [tokenizer.encode(text) for text in prompts]
    wanted, _, losses = generate_text_pplm(model, tokenizer, texts, **goal(loss_type=2, length=5))
    assert torch.stack([step.ids for step in got], 1).tolist() == wanted[:, 3:].tolist()
    assert [step.losses.shape for step in got] == [(3, 2)] * 5
    torch.testing.assert_close(got[2].losses, torch.stack(losses[2]))
    for row, text in enumerate(prompts):
        whole = tokenizer.decode(wanted[row], skip_special_tokens=True)
        assert whole == text + "".join(step.texts[row] for step in got)
    assert not any(got[-1].ended)


def test_stream_leaves_the_model_free_between_steps_and_ends() -> None:
    model, tokenizer = setting()
    how: dict[str, Any] = {"bag_of_words": None, "length": 6}
    whole = [int(step.ids) for step in stream_pplm(model, tokenizer, "w1 w2", **how)]
    third = next(n for n in range(1, 6) if whole[n] not in whole[:n])
    seen = []
    for step in stream_pplm(model, tokenizer, "w1 w2", eos_token_id=whole[third], **how):
        seen.append(int(step.ids))
        assert torch.is_grad_enabled() and type(model(prompt()).logits) is Tensor
        assert all(p.requires_grad for p in model.parameters())
    assert seen == whole[: third + 1] and step.ended == [True]
    word = tokenizer.decode(whole[third])
    stopped = list(stream_pplm(model, tokenizer, "w1 w2", stop_strings=[word], **how))
    assert len(stopped) == third + 1
    drawn = [
        [int(s.ids) for s in stream_pplm(model, tokenizer, "w1 w2", seed=seed, sample=True, **how)]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    two = list(stream_pplm(model, tokenizer, "w1 w2", seed=1, sample=True, num_samples=2, **how))
    assert len(two[0].ids) == 2


def test_run_pplm_example(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = setting()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "bag.txt").write_text("\n".join(WORDS), "utf-8")
    how: dict[str, Any] = {"bag_of_words": str(tmp_path / "bag.txt"), "length": 4, "no_cuda": True}
    got = run_pplm_example(str(tmp_path / "model"), "w1 w2", num_samples=2, sample=True, **how)
    assert len(got) == 2 and got[0][0] == tokenizer.encode("<s> w1 w2")
    assert got[0][1].shape == (1, 7) and got[0][2].shape == (1, 7)
    told = capsys.readouterr().out
    assert told.count("= Perturbed generated text") == 2 and "= Unperturbed" in told
    again = run_pplm_example(str(tmp_path / "model"), "w1 w2", num_samples=2, sample=True, **how)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(got, again, strict=True))


BEFORE_THE_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "no text": ({"cond_text": ""}, "cond_text is empty"),
    "no goal": ({"bag_of_words": None}, "neither a bag of words nor a discriminator"),
    "generic": ({"discrim": "generic"}, "wanted weights with it"),
    "absent": ({"discrim": "sentiment"}, "'sentiment' is not here"),
    "misspelt": ({"bag_of_words": "militry"}, "did you mean military"),
    "stepsize": ({"stepsize": -1.0}, "stepsize must be"),
    "samples": ({"num_samples": 0}, "num_samples must be at least 1"),
    "length": ({"length": -1}, "length must be at least 0"),
    "temperature": ({"temperature": 0.0}, "temperature must be above 0"),
    "class": ({"discrim": tiny_pplm.head(), "class_label": 9}, "no class 9"),
}


@pytest.mark.parametrize("case", BEFORE_THE_MODEL)
def test_run_pplm_example_refuses_before_it_loads(case: str) -> None:
    changed, message = BEFORE_THE_MODEL[case]
    how: dict[str, Any] = {"cond_text": "w1", "bag_of_words": "military"} | changed
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run_pplm_example("there is no such model", **how)


def test_what_is_refused() -> None:
    model, tokenizer = setting()

    def refused(message: str, **how: Any) -> None:
        context = how.pop("context", prompt())
        with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
            generate_text_pplm(model, tokenizer, context, **goal(loss_type=3) | how)

    refused("5 tokens and 61 new ones need 66 positions: the model has 64", length=61)
    refused("length must be at least 0", length=-1)
    refused("temperature must be above 0", temperature=0.0)
    refused("gm_scale must be between", gm_scale=1.5)
    refused("k must be at least 0", top_k=-1)
    refused("class_label: got 7, wanted .* to 2", classifier=nn.Linear(D, 3), class_label=7)
    refused(r"context must be ids .* torch.float32", context=torch.ones(1, 2))
    refused(
        r"rows and tokens \(3, 1, 4\): wanted \(2, 1, 4\)", past=[torch.ones(2, 1, 4, 4, 8)] * 3
    )
    refused(
        r"rows and tokens \(2, 3, 4\): wanted \(2, 1, 4\)", past=[torch.ones(2, 3, 4, 4, 8)] * 2
    )
    refused("has a text without a token", context=[])
    refused("has a text without a token", context=[[1], []])
    refused("attention_mask must be", attention_mask=torch.ones(1, 3))
    refused("stop_strings has an empty text", stop_strings=["a", ""])
    refused("neither a bag", loss_type=0, bow_indices=None, classifier=None)
    with pytest.raises(TypeError, match="no option 'kl': .*did you mean kl_scale"):
        chosen({"kl": 1})
    with pytest.raises(ValueError, match="grad_length must be at least 0"):
        steered(tokenizer, bag_of_words="military", grad_length=-1)
    with pytest.raises(ValueError, match="prompts: got none"):
        stream_pplm(model, tokenizer, [])
    with pytest.raises(TypeError, match="a discriminator is a name, a file.* got function"):
        full_text_generation(model, tokenizer, prompt(), discrim=lambda hidden: hidden)
    with pytest.raises(ValueError, match="neither a bag"):
        full_text_generation(model, tokenizer, prompt())
    with pytest.raises(FileNotFoundError, match="'sentiment' is not here"):
        full_text_generation(model, tokenizer, prompt(), discrim="sentiment")
    with pytest.raises(ValueError, match="context must be one text"):
        full_text_generation(model, tokenizer, [[5], [6]], bag_of_words="military")


def test_spellings_of_ids_and_classifiers() -> None:
    model, tokenizer = setting()
    made = tiny_pplm.head().requires_grad_(False)
    how = goal(loss_type=2, length=3)
    wanted, _, _ = generate_text_pplm(model, tokenizer, prompt(), **how)
    spelt: list[Any] = [prompt().numpy(), list(prompt()[0].numpy()), [prompt()[0].numpy()]]
    for context in spelt:
        assert torch.equal(generate_text_pplm(model, tokenizer, context, **how)[0], wanted)
    for classifier in (made.mlp, lambda hidden: made(hidden)):
        how["classifier"] = classifier
        assert torch.equal(generate_text_pplm(model, tokenizer, prompt(), **how)[0], wanted)
    discriminator = DiscriminatorV2(made, model)
    discriminator.metadata["class_vocab"] = {"this": 1}
    of_names: dict[str, Any] = {"class_label": "this", "stepsize": 0.1, "length": 3}
    full = full_text_generation(model, tokenizer, prompt(), discrim=discriminator, **of_names)
    assert torch.equal(full[1][0], wanted)
    of_names["class_label"] = 1
    full = full_text_generation(model, tokenizer, prompt(), discrim=made.mlp, **of_names)
    assert torch.equal(full[1][0], wanted)


def test_a_trained_head_steers(tmp_path: Path) -> None:
    """A head for texts of two halves of the vocabulary, saved, read again, over 32 draws."""
    model, tokenizer = setting()
    draw = random.Random(0)
    labels = [n % 2 for n in range(400)]
    texts = [" ".join(f"w{2 * draw.randrange(10) + side}" for _ in range(12)) for side in labels]
    made = train_discriminator(
        texts, labels, model=model, tokenizer=tokenizer, lr=0.05, epochs=20, train_size=0.5
    )
    assert made.report is not None and (made.report.accuracy or 0) > 0.9
    file = save_discriminator(made, path=tmp_path, file_name="side.safetensors")
    head, _ = load_head(file)
    assert torch.equal(head.mlp.weight, made.cl_head.mlp.weight)

    def probability(**how: Any) -> Tensor:
        """Of the class, of what was written, by the head's own measure of a text."""
        how |= {"discrim": head, "class_label": 1, "sample": True, "num_samples": 32}
        steps = list(stream_pplm(model, tokenizer, "the", length=16, seed=0, **how))
        ids = [step.ids for step in steps]
        written = [tokenizer.decode(row) for row in torch.stack(ids, 1)]
        return made.predict(written, tokenizer)[:, 1]

    steered, unsteered = probability(stepsize=0.1, gm_scale=0.95), probability(num_iterations=0)
    assert steered.mean() > unsteered.mean() + 0.1
    assert (steered > unsteered).sum() >= 24
