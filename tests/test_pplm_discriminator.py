"""Discriminators: representations equal to plain ones, the training to a plain loop, a head that
learns, the model left as it was.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.demo.train import one_thread
from onepass.pplm import discriminator as d
from onepass.pplm import heads
from support.tiny_language_model import model, tokenizer
from support.tiny_models import D

SIDES = ("abcdefgh", "stuvwxyz")  # a class is the half of the alphabet that its letters are from


def task(n: int, seed: int = 0) -> tuple[list[str], list[int]]:
    draw = random.Random(seed)
    labels = [draw.randint(0, 1) for _ in range(n)]
    return [
        "".join(draw.choice(SIDES[label]) for _ in range(draw.randint(5, 30))) for label in labels
    ], labels


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def llama() -> Any:
    return model(2)


@pytest.fixture(scope="module")
def bytes_() -> Any:
    return tokenizer()


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=260, n_positions=64, n_embd=D, n_layer=2, n_head=2)
    )


def plain(language_model: Any, ids: list[int], pool: str) -> Tensor:
    """One text alone, through transformers' own hidden states."""
    given = torch.tensor([ids])
    with torch.no_grad():
        out = language_model.eval()(given, output_hidden_states=True)
    hidden = out.hidden_states[-1][0]
    return hidden.mean(0) if pool == "mean" else hidden.sum(0)


# -- representations ----------------------------------------------------------------------------


@pytest.mark.parametrize("pool", ["mean", "sum"])
@pytest.mark.parametrize("make", [lambda: model(2), gpt2], ids=["llama", "gpt2"])
def test_representations_are_those_of_each_text_alone(
    make: Callable[[], Any], pool: str, bytes_: Any
) -> None:
    language_model, texts = make(), task(11)[0]
    seen: list[int] = []
    hook = language_model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: seen.append(out.shape[-1])
    )
    told: list[int] = []
    how: Any = {"pool": pool, "batch_size": 4, "told": told.append}
    found = d.representations(language_model, bytes_, texts, **how)
    hook.remove()
    assert set(seen) == {0} and told == [4, 4, 3]  # a head that makes nothing
    start = [bytes_.bos_token_id]
    for row, text in zip(found, texts, strict=True):
        ids = start + bytes_.encode(text, add_special_tokens=False)
        torch.testing.assert_close(row, plain(language_model, ids, pool), rtol=1e-5, atol=1e-5)


def test_padding_may_hold_anything(llama: Any) -> None:
    ids = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5])
    first = d.pooled(llama, ids, mask)
    assert torch.equal(first, d.pooled(llama, ids.masked_fill(mask == 0, 7), mask))
    torch.testing.assert_close(first[1], d.pooled(llama, ids[1:, :4])[0])
    torch.testing.assert_close(d.pooled(llama, ids, mask, "sum"), first * mask.sum(1, keepdim=True))


def test_long_texts_lose_their_end(
    llama: Any, bytes_: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ids = d.token_ids(bytes_, ["a" * 100, "b"], llama, max_length=10)
    assert [len(row) for row in ids] == [10, 2] and ids[0][0] == bytes_.bos_token_id
    assert "1 of 2 texts have more than 10 tokens and lose their end" in caplog.text
    assert len(d.token_ids(bytes_, ["a" * 100], llama)[0]) == 64  # as many as the model takes
    with pytest.raises(ValueError, match="text 1: 101 tokens, the model takes 64"):
        d.token_ids(bytes_, ["a" * 100], llama, max_length=None)
    for text in ("", " \n"):
        with pytest.raises(ValueError, match="text 2: is empty"):
            d.token_ids(bytes_, ["a", text], llama)
    assert d.token_ids(bytes_, ["a"], llama, eos_token=2)[0][0] == 2


# -- training -----------------------------------------------------------------------------------


def test_a_head_learns_and_comes_back(llama: Any, bytes_: Any, tmp_path: Path) -> None:
    texts, labels = task(600)
    found = d.train_discriminator(texts, labels, model=llama, tokenizer=bytes_, lr=1e-2, epochs=20)
    report = found.report
    assert report is not None and report.accuracy is not None and report.accuracy > 0.9
    assert (report.n_train, report.n_held_out) == (540, 60)
    n_of = [labels.count(c) for c in (0, 1)]  # a tenth of each class
    assert report.confusion.sum(1).tolist() == [n - round(0.9 * n) for n in n_of]
    assert int(report.confusion.trace()) == round(report.accuracy * 60)
    first, last = report.history[0], report.history[-1]
    assert first["epoch"] == 0 and last["step"] == 20 * 9
    assert last["held_out_accuracy"] == report.accuracy and last["loss"] < 0.3
    file = heads.save_discriminator(found, path=tmp_path)
    again = d.get_discriminator(llama, load_from_pretrained=True, path=file)
    for name, value in found.cl_head.state_dict().items():
        assert torch.equal(value, again.cl_head.state_dict()[name])
    other, truth = task(50, seed=1)
    probs = found.predict(other, bytes_)
    assert torch.equal(probs, again.predict(other, bytes_))
    assert (probs.argmax(-1) == torch.tensor(truth)).float().mean() > 0.9
    torch.testing.assert_close(probs.sum(-1), torch.ones(50))
    assert again.metadata["class_vocab"] == {"0": 0, "1": 1}
    assert again.metadata["default_class"] == 0 and again.metadata["pool"] == "mean"


@pytest.mark.parametrize("kind", ["Multiclass", "Binary"])
def test_it_is_adam_on_the_cross_entropy(kind: str, llama: Any, bytes_: Any) -> None:
    """All texts in one batch, so that the order has no part in it."""
    texts, labels = task(40)
    made = d.train_discriminator(
        texts, labels, 64, kind, model=llama, tokenizer=bytes_, held_out=task(8, 1), seed=3
    )
    torch.manual_seed(3)
    layer = torch.nn.Linear(D, 1 if kind == "Binary" else 2)
    x = d.representations(llama, bytes_, texts)
    y = torch.tensor(labels)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-4)
    losses = []
    for _ in range(10):
        z = layer(x)
        if kind == "Binary":
            loss = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], y.float())
        else:
            loss = torch.nn.functional.cross_entropy(z, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(made.cl_head.mlp.weight, layer.weight, rtol=1e-5, atol=1e-6)
    assert made.report is not None and made.report.n_held_out == 8
    assert [e["loss"] for e in made.report.history[1:]] == pytest.approx(losses, abs=1e-5)


def test_seeded_and_the_same_without_a_cache(llama: Any, bytes_: Any) -> None:
    state = torch.get_rng_state()
    weights = []
    for how in ({}, {}, {"cached": False}, {"seed": 1}):
        made = d.train_discriminator(
            *task(40),
            8,
            model=llama,
            tokenizer=bytes_,
            epochs=2,
            **how,  # type: ignore[arg-type]
        )
        weights.append(made.cl_head.mlp.weight.detach())
    assert torch.equal(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2])
    assert not torch.allclose(weights[0], weights[3])
    assert torch.equal(torch.get_rng_state(), state)


def test_the_model_stays_as_it_was(bytes_: Any) -> None:
    language_model = model(2).train()
    language_model.model.layers[0].eval()
    language_model.lm_head.weight.requires_grad_(False)
    modes = [m.training for m in language_model.modules()]
    before = {k: v.clone() for k, v in language_model.state_dict().items()}
    made = d.train_discriminator(*task(20), model=language_model, tokenizer=bytes_, epochs=1)
    assert [m.training for m in language_model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in language_model.state_dict().items())
    assert all(p.grad is None for p in language_model.parameters())
    trained = [n for n, p in language_model.named_parameters() if not p.requires_grad]
    assert trained == ["lm_head.weight"]
    assert [n for n, _ in made.named_parameters()] == ["cl_head.mlp.weight", "cl_head.mlp.bias"]


def test_an_interruption_leaves_the_model_usable(llama: Any, bytes_: Any) -> None:
    def interrupt(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        d.train_discriminator(*task(20), model=llama, tokenizer=bytes_, told=interrupt)
    assert llama(torch.tensor([[5, 6]])).logits.shape == (1, 2, 260)


def test_names_and_hyperparams(
    llama: Any, bytes_: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    texts, labels = task(30)
    names = [("good", "bad")[y] for y in labels]
    asked = d.HyperParams(batchsize=4, epochs=1, lr=1e-3, target_class=1)
    made = d.train_discriminator(texts, names, model=llama, tokenizer=bytes_, args=asked)
    assert made.cl_head.class_size == 1
    assert made.metadata["class_vocab"] == {"bad": 0, "good": 1}
    assert made.metadata["default_class"] == 1
    theirs = d.HyperParams()
    found = (theirs.batchsize, theirs.classification_type, theirs.num_classes, theirs.cached)
    assert found == (8, "Binary", 2, True)
    assert (theirs.lr, theirs.epochs, theirs.log_interval) == (1e-6, 20, 100)
    # digits by their value, not by the alphabet
    assert d.numbered(["a"] * 3, ["10", "9", "10"])[0] == ["9", "10"]
    every = d.train_discriminator(
        texts, labels, model=llama, tokenizer=bytes_, train_size=1.0, epochs=1, version=1
    )
    assert every.report is not None and every.report.accuracy is None and every.pool == "sum"
    again = d.train_discriminator(texts, labels, model=llama, tokenizer=bytes_, discrim=every)
    assert again is every
    file = heads.save_discriminator(every)
    same = d.get_discriminator(llama, load_from_pretrained=True, path=file)
    assert same.pool == "sum" == same.metadata["pool"]


def test_versions(llama: Any) -> None:
    ids = torch.randint(4, 260, (2, 5), generator=torch.Generator().manual_seed(0))
    first, second = (d.get_discriminator(llama, version=v, class_size=3) for v in (1, 2))
    assert type(first) is d.DiscriminatorV1 and type(second) is d.DiscriminatorV2
    torch.testing.assert_close(
        first.avg_representation(ids), 5 * second.avg_representation(ids), rtol=1e-5, atol=1e-5
    )
    x = second.avg_representation(ids)
    assert torch.equal(second(ids), second(x, cached=True)) and second(ids).shape == (2, 3)
    assert torch.equal(second(ids), second.cl_head(x))


WRONG: list[tuple[str, Callable[[Any, Any], Any], str]] = [
    ("fewer labels", lambda m, t: ((["a", "b"], [0]), {}), "2 texts and 1 labels"),
    ("one string", lambda m, t: (("ab", [0, 1]), {}), "one string and 2 labels"),
    ("nothing", lambda m, t: (([], []), {}), "0 texts"),
    ("one class", lambda m, t: ((["a", "b"], ["x", "x"]), {}), "all 2 labels are 'x'"),
    ("an empty text", lambda m, t: ((["a", " "], [0, 1]), {}), "text 2: is empty"),
    ("floats", lambda m, t: ((["a", "b"], [0.5, 1.0]), {}), "all numbers from 0: got float"),
    ("mixed", lambda m, t: ((["a", "b"], [0, "x"]), {}), "got int, str"),
    ("negative", lambda m, t: ((["a", "b"], [-1, 1]), {}), "label 1: got -1, wanted one of 0, 1"),
    ("beyond", lambda m, t: ((["a", "b"], [0, 2], 8, "Multiclass", 2), {}), "label 2: got 2"),
    ("names", lambda m, t: ((["a", "b"], ["x", "y"], 8, "Multiclass", 3), {}), "num_classes=3"),
    ("type", lambda m, t: ((["a", "b"], [0, 1], 8, "binary"), {}), "must be Multiclass or Binary"),
    ("three of two", lambda m, t: ((["a"] * 3, [0, 1, 2], 8, "Binary"), {}), "got 3 classes"),
    ("batch", lambda m, t: ((["a", "b"], [0, 1], 0), {}), "batchsize must be an int of at least 1"),
    ("rate", lambda m, t: ((["a", "b"], [0, 1]), {"lr": 0.0}), "lr must be above 0"),
    ("share", lambda m, t: ((["a", "b"], [0, 1]), {"train_size": 0.0}), "train_size must be above"),
    ("no tokenizer", lambda m, t: ((["a", "b"], [0, 1]), {"tokenizer": None}), "tokenizer: got no"),
    ("size", lambda m, t: ((["a", "b"], [0, 1]), {"args": d.HyperParams(embed_size=768)}),
     "embed_size is 768, but"),
    ("target", lambda m, t: ((["a", "b"], [0, 1]), {"args": d.HyperParams(target_class=2)}),
     "target_class is 2"),
    ("a known class", lambda m, t: ((["a", "b"], ["x", "y"]), {"held_out": (["c"], ["z"])}),
     "label 1: got 'z', wanted one of x, y"),
    ("another discriminator", lambda m, t: (
        (["a"] * 3, [0, 1, 2]), {"discrim": d.get_discriminator(m, class_size=2)},
    ), "discrim has 2 classes, the labels 3"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "told"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_cannot_be_trained_is_refused(
    call: Callable[[Any, Any], Any], told: str, llama: Any, bytes_: Any
) -> None:
    args, how = call(llama, bytes_)
    with pytest.raises(ValueError, match=told) as caught:
        d.train_discriminator(*args, **{"model": llama, "tokenizer": bytes_} | how)
    assert "\n" not in str(caught.value)


def test_heads_that_do_not_fit(llama: Any) -> None:
    with pytest.raises(ValueError, match=f"hidden states of 6 numbers, but the model's have {D}"):
        d.DiscriminatorV2(heads.ClassificationHead(2, 6), llama)
    with pytest.raises(ValueError, match="embed_size=7, but the head reads"):
        d.DiscriminatorV1(heads.ClassificationHead(2, D), llama, 7)
    with pytest.raises(ValueError, match="version must be 1 or 2"):
        d.get_discriminator(llama, version=3)
