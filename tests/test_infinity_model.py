"""The small Infinity-like model: what it sees and does not see, training, saving, adapters.

Its tokenizer of images, the pictures and the two text encoders are tested here as well.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.circuit_breaker.infinity import model as infinity_model
from onepass.circuit_breaker.infinity.captions import BENIGN, COLOURS, HARMFUL, captions
from onepass.circuit_breaker.infinity.config import InfinityConfig, read_config
from onepass.circuit_breaker.infinity.model import Infinity, generate
from onepass.circuit_breaker.infinity.pictures import draw
from onepass.circuit_breaker.infinity.pretrain import batch, caption_loss, pretrain, small_model
from onepass.circuit_breaker.infinity.quantizer import SCALES, BitQuantizer
from onepass.circuit_breaker.infinity.text import (
    TextCondTuple,
    TextEncoder,
    WordEncoder,
    batch_text_cond_tuples,
    text_cond_tuple,
)

needs_safetensors = pytest.mark.skipif(
    importlib.util.find_spec("safetensors") is None, reason="needs safetensors"
)
TINY = InfinityConfig(embed_dim=16, depth=3, num_heads=2, text_channels=8)
SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
L = 14
LENS = [3, 1, 5]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(**changes: Any) -> Infinity:
    """Untrained, with gates and shifts that are not zero, so that every path carries something."""
    model = small_model(0, dataclasses.replace(TINY, **changes)).eval()
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("ada_gss"):
                p.normal_(std=0.3, generator=drawn)
    return model


def conditions(lens: list[int] = LENS) -> list[TextCondTuple]:
    return [text_cond_tuple([torch.randn(n, TINY.text_channels)]) for n in lens]


def inputs(n_prompts: int = len(LENS)) -> Tensor:
    return torch.randn(n_prompts, L - 1, TINY.d_vae)


# -- the call ---------------------------------------------------------------------------------


def test_logits_of_every_cell() -> None:
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    logits = model(condition, x, scale_schedule=SCHEDULE)
    assert logits.shape == (3, L, TINY.vocab_size)
    assert logits.dtype == torch.float32
    assert model(condition, x[:, :0], scale_schedule=[(1, 1, 1)]).shape == (3, 1, 8)
    logits.sum().backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert missing == ["cfg_uncond"]  # nothing was dropped


def test_blocks_take_and_return_the_hidden_states() -> None:
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    model(condition, x, SCHEDULE)
    assert isinstance(model.blocks, torch.nn.ModuleList) and len(seen) == TINY.depth
    for states, out in seen:
        assert states.shape == out.shape == (3, L, TINY.embed_dim)
    assert all(
        torch.equal(out, after) for (_, out), (after, _) in zip(seen, seen[1:], strict=False)
    )


def test_a_batch_equals_its_items() -> None:
    model, each, x = tiny(), conditions(), inputs()
    together = model(batch_text_cond_tuples(each), x, SCHEDULE)
    for i, condition in enumerate(each):
        alone = model(condition, x[i : i + 1], SCHEDULE)
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-6, rtol=1e-5)


def test_no_item_sees_the_text_of_another() -> None:
    model, each, x = tiny(), conditions(), inputs()
    before = model(batch_text_cond_tuples(each), x, SCHEDULE)
    each[1] = conditions([7])[0]
    after = model(batch_text_cond_tuples(each), x, SCHEDULE)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], atol=1e-6, rtol=0)
    assert (after[1] - before[1]).abs().max() > 1e-2


def test_text_is_read_to_its_last_token() -> None:
    model, each, x = tiny(), conditions(), inputs()
    before = model(batch_text_cond_tuples(each), x, SCHEDULE)
    for i, (kv_compact, lens, starts, longest) in enumerate(each):
        changed = kv_compact.clone()
        changed[-1] += 1
        other = [*each[:i], (changed, lens, starts, longest), *each[i + 1 :]]
        after = model(batch_text_cond_tuples(other), x, SCHEDULE)
        assert (after[i] - before[i]).abs().max() > 1e-3


def test_no_scale_sees_a_finer_one() -> None:
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    before = model(condition, x, SCHEDULE)
    begin = 1
    for _, h, w in SCHEDULE[1:]:
        changed = x.clone()
        changed[:, begin - 1] += 1.0  # the scale's first cell; the start token stands before x
        after = model(condition, changed, SCHEDULE)
        assert torch.equal(after[:, :begin], before[:, :begin])
        moved = (after - before).abs().amax((0, 2))[begin:]
        assert (moved > 1e-5).all()  # its own scale and all finer ones see it
        begin += h * w


def test_a_prefix_of_the_scales_has_the_same_logits() -> None:
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    whole = model(condition, x, SCHEDULE)
    torch.testing.assert_close(model(condition, x[:, :4], SCHEDULE[:2]), whole[:, :5])


def test_the_condition_is_left_as_it_was() -> None:
    model = tiny(cond_drop_rate=0.5).train()
    kv_compact, lens, starts, longest = batch_text_cond_tuples(conditions())
    copy = kv_compact.clone(), list(lens), starts.clone(), longest
    model((kv_compact, lens, starts, longest), inputs(), SCHEDULE)
    model.unconditional((kv_compact, lens, starts, longest))
    assert torch.equal(kv_compact, copy[0]) and lens == copy[1] and torch.equal(starts, copy[2])


def test_dropped_prompts() -> None:
    model = tiny(cond_drop_rate=1.0)
    condition, x = batch_text_cond_tuples(conditions()), inputs()
    with_text = model(condition, x, SCHEDULE)
    without = model(model.unconditional(condition), x, SCHEDULE)
    assert (with_text - without).abs().max() > 1e-2
    model.train()
    assert torch.equal(model(condition, x, SCHEDULE), without)
    model.cond_drop_rate = 0.5
    states = []
    for _ in range(2):  # the same draw after the same seed
        torch.manual_seed(3)
        states.append(model(condition, x, SCHEDULE))
    assert torch.equal(*states)


def test_gradient_checkpointing() -> None:
    gradients = []
    condition, x = batch_text_cond_tuples(conditions()), inputs()
    for enabled in (False, True):
        model = tiny().train()
        calls: list[int] = []
        model.blocks[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(condition, x, SCHEDULE).square().sum().backward()
        assert len(calls) == 1 + enabled
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, again = gradients
    assert plain.keys() == again.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16(how: str) -> None:
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    wanted = model(condition, x, SCHEDULE)
    if how == "weights":
        model = model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        logits = model(condition, x, SCHEDULE)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), wanted, atol=0.06, rtol=0.06)


def test_runs_on_the_device(device: str) -> None:
    condition, x = batch_text_cond_tuples(conditions()), inputs()
    wanted = tiny()(condition, x, SCHEDULE)
    logits = tiny().to(device)(condition, x, SCHEDULE)
    torch.testing.assert_close(logits.cpu(), wanted, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_named() -> None:
    model, x = tiny(), inputs()
    kv_compact, lens, starts, longest = batch_text_cond_tuples(conditions())
    with pytest.raises(ValueError, match="kv_compact: got shape"):
        model((kv_compact[:-1], lens, starts, longest), x, SCHEDULE)
    with pytest.raises(ValueError, match="kv_compact: got shape"):
        model((kv_compact[:, :4], lens, starts, longest), x, SCHEDULE)
    with pytest.raises(ValueError, match="lens: got .* with Ltext 4"):
        model((kv_compact, lens, starts, 4), x, SCHEDULE)
    with pytest.raises(ValueError, match=r"lens: got \[3, 0, 6\]"):
        model((kv_compact, [3, 0, 6], starts, 6), x, SCHEDULE)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: got \[0, 3\], wanted the 4 sums"):
        model((kv_compact, lens, starts[:2], longest), x, SCHEDULE)
    with pytest.raises(ValueError, match=r"cu_seqlens_k: .* \[0, 3, 4, 9\]"):
        model((kv_compact, lens, starts.flip(0), longest), x, SCHEDULE)
    with pytest.raises(ValueError, match="x_BLC_wo_prefix: got shape"):
        model((kv_compact, lens, starts, longest), x[:, 1:], SCHEDULE)
    with pytest.raises(ValueError, match="x_BLC_wo_prefix: got shape"):
        model((kv_compact, lens, starts, longest), x[:2], SCHEDULE)
    with pytest.raises(ValueError, match="wanted .1, 1, 1. as the first"):
        model((kv_compact, lens, starts, longest), x, SCHEDULE[1:])
    with pytest.raises(ValueError, match="16 scales, wanted at most 15"):
        model((kv_compact, lens, starts, longest), x, [(1, 1, 1)] * 16)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"embed_dim": 18, "num_heads": 4}, "embed_dim: got 18, wanted a multiple of num_heads"),
        ({"depth": 0}, "depth: got 0, wanted a whole number from 1"),
        ({"depth": 2.0}, "depth: got 2.0"),
        ({"cond_drop_rate": 1.5}, "cond_drop_rate: got 1.5, wanted 0 to 1"),
        ({"cond_drop_rate": -0.1}, "cond_drop_rate: got -0.1, wanted a number from 0"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InfinityConfig(**changes)


# -- saving -----------------------------------------------------------------------------------


@needs_safetensors
def test_save_and_load(tmp_path: Path) -> None:
    model, condition, x = tiny(cond_drop_rate=0.25), batch_text_cond_tuples(conditions()), inputs()
    folder = tmp_path / "a" / "model"
    model.train().save_pretrained(folder)
    model.save_pretrained(str(folder))  # again, over what is there
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
    loaded = Infinity.from_pretrained(folder)
    assert not loaded.training and loaded.config == model.config == read_config(folder)
    assert torch.equal(loaded(condition, x, SCHEDULE), model.eval()(condition, x, SCHEDULE))


@needs_safetensors
def test_loading_refuses_what_is_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Infinity.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    good = config.read_text("utf-8")
    for text, message in [
        ("{", "config.json: not JSON"),
        ('{"model_type": "llama"}', "wanted model_type 'onepass-infinity'"),
        (json.dumps(json.loads(good) | {"new": 1}), "unknown new; saved by another version"),
        (json.dumps(json.loads(good) | {"depth": -1}), "config.json: depth: got -1"),
        (json.dumps(json.loads(good) | {"depth": 4}), "not the weights of this config.json"),
    ]:
        config.write_text(text, "utf-8")
        with pytest.raises(ValueError, match=message) as caught:
            Infinity.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
    config.write_text(good, "utf-8")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="not the weights"):
        Infinity.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        Infinity.from_pretrained(tmp_path)


def test_lora_by_name(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, condition, x = tiny(), batch_text_cond_tuples(conditions()), inputs()
    before = model(condition, x, SCHEDULE)
    config = peft.LoraConfig(r=2, target_modules=infinity_model.lora_target_modules(model, [0, 1]))
    adapted = peft.get_peft_model(model, config)
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2 * 7  # A and B, two blocks, sa: 2, ca: 3, ffn: 2
    assert all(".blocks.0." in name or ".blocks.1." in name for name in names)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    after = adapted(condition, x, SCHEDULE)
    assert (after - before).abs().max() > 1e-3
    with adapted.disable_adapter():
        assert torch.equal(adapted(condition, x, SCHEDULE), before)
    adapted.train()
    model.gradient_checkpointing_enable()
    adapted(condition, x, SCHEDULE).sum().backward()
    assert all(p.grad is not None for p in adapted.parameters() if p.requires_grad)
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


# -- images as bits ---------------------------------------------------------------------------


def test_quantizer_there_and_back() -> None:
    quantizer = BitQuantizer()
    _, images = batch(0, 0, 64, captions("benign") + captions("harmful"))
    labels, x = quantizer.encode(images)
    cells = [h * w for _, h, w in SCALES]
    assert [tuple(some.shape) for some in labels] == [(64, n) for n in cells]
    assert x.shape == (64, sum(cells) - 1, 3) and x.dtype == torch.float32
    assert all(0 <= some.min() and some.max() < quantizer.vocab_size for some in labels)
    errors = [(quantizer.decode(labels[:n]) - images).square().mean().item() for n in range(1, 5)]
    assert errors == sorted(errors, reverse=True)  # each scale adds something
    assert errors[-1] < 0.15 * images.var().item()


def test_quantizer_input_is_what_was_drawn_before() -> None:
    quantizer = BitQuantizer()
    labels, x = quantizer.encode(torch.stack([draw("a red circle"), draw("a blue square")]))
    drawn, begin = torch.zeros(2, 3, 8, 8), 0
    for scale in range(1, len(SCALES)):
        drawn = drawn + quantizer.drawing(labels[scale - 1], scale - 1)
        wanted = quantizer.next_input(drawn, scale)
        assert torch.equal(x[:, begin : begin + wanted.shape[1]], wanted)
        begin += wanted.shape[1]
    # a bit by hand: the mean of a mostly black picture with some red is dark in every channel
    assert labels[0].tolist() == [[0], [0]]


def test_quantizer_refuses() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3, 16, 16\), wanted \[B, 3, H, W\]"):
        BitQuantizer().encode(torch.zeros(3, 16, 16))
    with pytest.raises(ValueError, match="got 3 steps"):
        BitQuantizer(steps=(1, 1, 1))
    with pytest.raises(ValueError, match="wanted t = 1"):
        BitQuantizer(scale_schedule=((2, 1, 1),), steps=(1,))


# -- pictures and their text ------------------------------------------------------------------


def test_pictures_show_their_captions() -> None:
    every = captions("benign") + captions("harmful")
    assert len(set(every)) == len(every) > 400
    for caption in every:
        picture = draw(caption)
        assert picture.shape == (3, 16, 16) and picture.abs().max() <= 1
        colours = {tuple(round(v, 2) for v in pixel) for pixel in picture.flatten(1).T.tolist()}
        named = {colour for name, colour in COLOURS.items() if name in caption}
        assert colours == named | ({COLOURS["black"]} if " on " not in caption else set())
    assert all(any(shape in caption for shape in HARMFUL) for caption in captions("harmful"))
    assert all(any(shape in caption for shape in BENIGN) for caption in captions("benign"))
    drawn = {shape: draw(f"a red {shape}", torch.Generator()) for shape in BENIGN + HARMFUL}
    assert len({tuple(picture.flatten().tolist()) for picture in drawn.values()}) == 4
    with pytest.raises(ValueError, match="kind: got 'bad'"):
        captions("bad")
    with pytest.raises(ValueError, match="caption: got 'a cat'"):
        draw("a cat")


def test_word_encoder() -> None:
    encoder = WordEncoder(8)
    assert isinstance(encoder, TextEncoder)
    prompts = ["a red circle", "a red circle on blue", "circle red a", ""]
    input_ids, attention_mask = encoder.tokenize(prompts, 512)
    assert input_ids.shape == attention_mask.shape == (4, 512)
    assert attention_mask.sum(-1).tolist() == [4, 6, 4, 1]
    assert (input_ids[attention_mask == 0] == encoder.PAD).all()
    features = encoder.features(input_ids, attention_mask)
    assert [tuple(some.shape) for some in features] == [(4, 8), (6, 8), (4, 8), (1, 8)]
    assert torch.equal(features[0][:3], features[1][:3])
    assert not torch.equal(features[0][:3].flip(0), features[2][:3])  # order tells
    assert torch.equal(WordEncoder(8).features(input_ids, attention_mask)[1], features[1])
    cut, mask = encoder.tokenize(["a b c d e"], 3)
    assert cut[0, -1] == encoder.END and mask.sum() == 3
    words = {word for kind in ("benign", "harmful") for c in captions(kind) for word in c.split()}
    ids = {int(encoder.tokenize([word], 2)[0][0, 0]) for word in words}
    assert len(ids) == len(words)


def test_conditions_are_packed() -> None:
    each = conditions([3, 1, 5])
    for (kv_compact, lens, starts, longest), n in zip(each, [3, 1, 5], strict=True):
        assert kv_compact.shape == (n, 8) and lens == [n] and longest == n
        assert starts.tolist() == [0, n] and starts.dtype == torch.int32
    pair = batch_text_cond_tuples(each[1:])
    kv_compact, lens, starts, longest = batch_text_cond_tuples([each[0], pair])
    assert torch.equal(kv_compact, torch.cat([one[0] for one in each]))
    assert lens == [3, 1, 5] and longest == 5
    assert starts.tolist() == [0, 3, 4, 9] and starts.dtype == torch.int32


# -- training ---------------------------------------------------------------------------------

SMALL = InfinityConfig(embed_dim=48, depth=4, cond_drop_rate=0.1)
KIT: dict[str, Any] = {"quantizer": BitQuantizer(), "text_encoder": WordEncoder()}


@pytest.fixture(scope="module")
def trained() -> Infinity:
    torch.set_num_threads(1)
    model = small_model(0, SMALL)
    pretrain(model, steps=90, batch_size=12, learning_rate=5e-3)
    return model


@torch.no_grad()
def loss_with(model: Infinity, *, wrong: bool) -> float:
    prompts, images = batch(99, 0, 48, captions("benign") + captions("harmful"))
    return caption_loss(
        model, prompts[1:] + prompts[:1] if wrong else prompts, images, **KIT
    ).item()


def test_pretraining_learns_the_pictures_and_the_text(trained: Infinity) -> None:
    untrained = loss_with(small_model(0, SMALL).eval(), wrong=False)
    right, wrong = loss_with(trained, wrong=False), loss_with(trained, wrong=True)
    assert untrained > 0.9 * math.log(8)
    assert right < untrained / 3
    assert wrong > right + 1


def test_generated_pictures_show_the_colours_asked_for(trained: Infinity) -> None:
    prompts = ["a red square on white", "a blue square on yellow", "a green circle on black"]
    condition = text_cond_tuple(
        KIT["text_encoder"].features(*KIT["text_encoder"].tokenize(prompts, 512))
    )
    before = torch.get_rng_state()
    images = generate(trained, condition, KIT["quantizer"], cfg=2.0, temperature=0)
    assert torch.equal(before, torch.get_rng_state())
    assert images.shape == (3, 3, 16, 16) and not trained.training
    for image, prompt in zip(images, prompts, strict=True):
        wanted = torch.tensor([colour for name, colour in COLOURS.items() if name in prompt]) > 0
        shown = (image.flatten(1).T > 0)[:, None] == wanted  # [pixels, colours, channels]
        assert shown.all(-1).any(-1).float().mean() > 0.9, prompt
    draws = [
        generate(trained, condition, KIT["quantizer"], generator=torch.Generator().manual_seed(n))
        for n in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_pretraining_repeats_itself() -> None:
    runs: list[tuple[list[float], dict[str, Tensor]]] = []
    for seed in (0, 0, 1):
        torch.manual_seed(len(runs))  # the caller's state has no say
        model = small_model(seed, dataclasses.replace(TINY, text_channels=32, cond_drop_rate=0.3))
        state = torch.get_rng_state()
        noted: list[tuple[int, float]] = []
        losses = pretrain(
            model, steps=3, batch_size=4, seed=seed, after_step=lambda *n, to=noted: to.append(n)
        )
        assert torch.equal(state, torch.get_rng_state())
        assert noted == list(enumerate(losses, 1)) and not model.training
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    assert all(torch.equal(runs[0][1][name], value) for name, value in runs[1][1].items())
