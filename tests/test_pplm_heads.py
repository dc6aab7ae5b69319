"""Classifier heads: saved and read back bit for bit; what is refused of other people's files."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from onepass.pplm import DiscriminatorV2, heads
from support.tiny_language_model import model
from support.tiny_models import D

VOCAB = {"good": 0, "bad": 1}
META = {"class_vocab": VOCAB, "default_class": 1, "pretrained_model": "tiny"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def head(class_size: int = 2, embed_size: int = 6) -> heads.ClassificationHead:
    torch.manual_seed(0)
    return heads.ClassificationHead(class_size, embed_size)


def keep(state: Any, name: str = "head.pt") -> Path:
    """What torch.save makes of it: a zip of data.pkl and of each tensor's bytes."""
    torch.save(state, name)
    return Path(name)


def same(one: heads.ClassificationHead, other: heads.ClassificationHead) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


# -- the head -----------------------------------------------------------------------------------


def test_a_head_is_one_linear_layer() -> None:
    made = head(3)
    hidden = torch.randn(2, 5, 6)
    assert torch.equal(made(hidden), hidden @ made.mlp.weight.T + made.mlp.bias)
    assert made.linear_layer is made.mlp and (made.class_size, made.embed_size) == (3, 6)
    assert list(made.state_dict()) == ["mlp.weight", "mlp.bias"]  # Uber's names
    assert made(hidden.bfloat16()).dtype == torch.float32
    for sizes in ((0, 6), (2, True), (2.0, 6)):
        with pytest.raises(ValueError, match="must be an int of at least 1"):
            heads.ClassificationHead(*sizes)  # type: ignore[arg-type]


def test_one_logit_is_a_binary_head() -> None:
    z = torch.randn(7, 1, requires_grad=True)
    y = torch.tensor([0, 1, 1, 0, 1, 0, 0])
    loss = torch.nn.functional.nll_loss(heads.class_logps(z), y)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], y.float())
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(heads.class_logps(z.expand(7, 3)), z.expand(7, 3).log_softmax(-1))


# -- saved and read -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bitwise(dtype: torch.dtype) -> None:
    made = head(2).to(dtype)
    file = heads.save_discriminator(made, file_name="x.safetensors", path="new/folder", args=META)
    assert sorted(p.name for p in file.parent.iterdir()) == ["x.json", "x.safetensors"]
    assert file.read_bytes() == heads.save_discriminator(made, path="b", args=META).read_bytes()
    read, meta = heads.load_head(file)
    assert same(made, read) and meta == META | {"class_size": 2, "embed_size": 6}
    assert json.loads(file.with_suffix(".json").read_text()) == meta
    assert read.mlp.weight.requires_grad and read.mlp.weight.dtype == dtype
    file.with_suffix(".json").unlink()
    assert heads.load_head(file)[1] == meta


def test_three_ways_to_a_head() -> None:
    made = head(2)
    file = heads.save_discriminator(made, discrim_name="toxicity", args=META)
    assert file == Path("pretrained_discriminators/toxicity.safetensors")
    named, meta = heads.ClassifierHead(load_from_pretrained=True, discrim="toxicity")
    placed, other = heads.ClassifierHead(load_from_pretrained=True, path=file)
    joined, _ = heads.ClassifierHead(
        load_from_pretrained=True, path=file.parent, file_name=file.name, discrim="custom"
    )
    assert all(same(made, one) for one in (named, placed, joined))
    assert meta == other and meta is not None and meta["default_class"] == 1
    random, none = heads.ClassifierHead(discrim="toxicity")
    assert none is None and (random.class_size, random.embed_size) == (1, 768)
    with pytest.raises(ValueError, match="discrim is not given"):
        heads.ClassifierHead(load_from_pretrained=True)
    for name in ("clickbait", "sentiment"):
        with pytest.raises(FileNotFoundError, match=r"train-discriminator.*path=") as caught:
            heads.ClassifierHead(load_from_pretrained=True, discrim=name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no head 'custom'"):
        heads.ClassifierHead(load_from_pretrained=True, discrim="custom")


@pytest.mark.parametrize("prefix", ["", "mlp.", "linear_layer.", "classifier_head.mlp."])
def test_files_of_torch_save(prefix: str) -> None:
    made = head(5)
    weights = {prefix + k.removeprefix("mlp."): v for k, v in made.state_dict().items()}
    assert same(made, heads.load_head(keep(weights))[0])
    config = {"class_size": 5, "embed_size": 6, "class_vocab": {"a": 4}, "default_class": 4}
    read, meta = heads.load_head(keep({"config_metadata": config, "weights": weights}))
    assert same(made, read) and meta == config
    half = {k: v.half() for k, v in weights.items()}
    assert heads.load_head(keep(half))[0].mlp.weight.dtype == torch.float32


def test_a_known_name_brings_its_classes() -> None:
    keep(head(5).state_dict(), "SST.pt")
    made, label = heads.get_classifier("sentiment", "very_positive", "cpu", weights="SST.pt")
    assert made is not None and not made.training and label == 2
    assert heads.get_classifier("sentiment", -1, "cpu", weights="SST.pt")[1] == 3
    assert heads.get_classifier("sentiment", 4, "cpu", weights="SST.pt")[1] == 4
    with pytest.raises(ValueError, match=r"very_positive \(2\).*0 to 4.*did you mean very_pos"):
        heads.get_classifier("sentiment", "very_positve", "cpu", weights="SST.pt")
    with pytest.raises(ValueError, match="no class 5"):
        heads.get_classifier("sentiment", 5, "cpu", weights="SST.pt")
    Path("meta.json").write_text(json.dumps({"class_vocab": {"meh": 1}, "default_class": 0}))
    found = heads.get_classifier("generic", "meh", "cpu", weights="SST.pt", meta="meta.json")
    assert found[1] == 1 and heads.get_classifier(None, 1, "cpu") == (None, None)
    with pytest.raises(ValueError, match="wanted weights"):
        heads.get_classifier("generic", 1, "cpu")
    own = head(2)
    assert heads.get_classifier(own, "1", "cpu") == (own, 1)
    with pytest.raises(ValueError, match="no default class: wanted a number from 0 to 1"):
        heads.get_classifier(own, -1, "cpu")
    assert heads.label_id({"class_size": 1}, 1) == 1  # of one logit


def test_a_head_of_another_size_is_told() -> None:
    language_model = model(1)
    heads.check_fits(head(2, D), language_model)
    with pytest.raises(ValueError, match=rf"6 numbers, those of tiny, but the model's have {D}"):
        heads.check_fits(head(2, 6), language_model, META)


# -- what is refused ----------------------------------------------------------------------------


class Hostile:
    """Makes a file where it is unpickled."""

    def __reduce__(self) -> Any:
        return open, ("pwned", "w")


def zipped(name: str, raw: bytes) -> Path:
    with zipfile.ZipFile("x.pt", "w") as archive:
        archive.writestr(name, raw)
    return Path("x.pt")


def written(name: str, raw: bytes) -> Path:
    Path(name).write_bytes(raw)
    return Path(name)


def tensors(name: str = "x.safetensors", config: str | None = None, **state: Any) -> Path:
    metadata = None if config is None else {heads.FORMAT: config}
    save_file(state, name, metadata=metadata)
    return Path(name)


W, B = torch.ones(2, 6), torch.zeros(2)
LAYER: Any = {"weight": W, "bias": B}
REFUSED: list[tuple[str, Callable[[], Path], str]] = [
    ("pickle", lambda: written("x.pt", pickle.dumps(Hostile())), "refused"),
    ("pickle inside", lambda: keep({"weight": W, "bias": Hostile()}), "refused"),
    ("a whole module", lambda: keep(head()), "refused"),
    ("pickle by suffix", lambda: written("x.safetensors", pickle.dumps(Hostile())), "damaged"),
    ("text", lambda: written("x.safetensors", b"hello"), "no safetensors, or damaged"),
    ("empty", lambda: written("x.safetensors", b""), "no safetensors, or damaged"),
    ("empty .pt", lambda: written("x.pt", b""), "refused"),
    ("a zip", lambda: zipped("x/data.pkl", b"\x80\x02."), "refused"),
    ("torch script", lambda: zipped("x/constants.pkl", b"\x80\x02)."), "refused"),
    ("a long header", lambda: written("x.safetensors", b"\xff" * 64), "damaged"),
    ("truncated", lambda: written("y.safetensors", tensors(**LAYER).read_bytes()[:-4]), "damaged"),
    ("truncated .pt", lambda: written("y.pt", keep(LAYER).read_bytes()[:-40]), "refused"),
    ("julia", lambda: written("x.bson", b"x"), "wanted a head as .safetensors"),
    ("a list", lambda: keep([W, B]), "got a list, wanted a state_dict"),
    ("a tensor", lambda: keep(W), "got a Tensor, wanted a state_dict"),
    ("numbers as names", lambda: keep({0: W, 1: B}), "wanted a state_dict"),
    ("nothing", lambda: keep({}), "has nothing, wanted one linear layer"),
    ("no bias", lambda: tensors(weight=W), "has 'weight', wanted one linear layer"),
    ("more", lambda: tensors(more=B + 1, **LAYER), "has 'bias', 'more', 'weight', wanted"),
    ("two layers", lambda: keep({f"{a}.{k}": v for a in "ab" for k, v in LAYER.items()}), "..."),
    ("two ends", lambda: keep({"a.weight": W, "b.weight": W, "a.bias": B}), "wanted one linear"),
    ("a vector", lambda: tensors(weight=W[0], bias=B), r"weight is float32 \[6\], wanted floats"),
    ("integers", lambda: tensors(weight=W.long(), bias=B), r"weight is int64 \[2, 6\]"),
    ("no classes", lambda: tensors(weight=W[:0], bias=B[:0]), r"float32 \[0, 6\]"),
    ("more classes", lambda: tensors(weight=W, bias=torch.zeros(3)), "has 2 classes, bias 3"),
    ("a bias of two dims", lambda: tensors(weight=W, bias=B[None]), r"wanted floats \[classes\]"),
    ("nan", lambda: tensors(weight=W / 0, bias=B), "weight holds NaN or inf"),
    ("not a tensor", lambda: keep({"weight": "W", "bias": B}), "weight is 'W', wanted a dense"),
    ("sparse", lambda: keep({"weight": W.to_sparse(), "bias": B}), "wanted a dense tensor"),
    ("on no device", lambda: keep({"weight": W.to("meta"), "bias": B}), "wanted a dense tensor"),
    ("any size", lambda: keep({"weight": torch.zeros(1).expand(10**6, 10**6), "bias": B}),
     "claims more numbers than the file has bytes"),
    ("config", lambda: keep({"config_metadata": 3, "weights": LAYER}), "config_metadata is 3"),
    ("size", lambda: tensors(config='{"class_size": 3}', **LAYER), "class_size is 3, but the wei"),
    ("hidden size", lambda: tensors(config='{"embed_size": "6"}', **LAYER), "embed_size is '6'"),
    ("no object", lambda: tensors(config="[]", **LAYER), "got a list, wanted one JSON object"),
    ("no JSON", lambda: tensors(config="{", **LAYER), "metadata are damaged: not JSON"),
    ("deep", lambda: tensors(config="[" * 10**5, **LAYER), "metadata are damaged: not JSON"),
    ("classes", lambda: tensors(config='{"class_vocab": ["a"]}', **LAYER), "class_vocab must be"),
    ("a class", lambda: tensors(config='{"class_vocab": {"a": 2}}', **LAYER), "is 2, wanted"),
    ("a class's kind", lambda: tensors(config='{"class_vocab": {"a": true}}', **LAYER), "is True"),
    ("default", lambda: tensors(config='{"default_class": -1}', **LAYER), "default_class is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "told"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_hostile_and_damaged_files_are_one_line(make: Callable[[], Path], told: str) -> None:
    file = make()
    with pytest.raises(ValueError, match=told) as caught:
        heads.load_head(file)
    text = str(caught.value)
    assert "\n" not in text and text.startswith(file.name) and len(text) < 300
    assert not os.path.exists("pwned")


def test_metadata_of_others() -> None:
    file = tensors(**LAYER)
    assert heads.load_head(file)[1] == {"class_size": 2, "embed_size": 6, "class_vocab": {}}
    for text, told in (("{", "not JSON"), ("3", "got 3, wanted one JSON object")):
        written("meta.json", text.encode())
        with pytest.raises(ValueError, match=f"meta.json: {told}"):
            heads.load_head(file, "meta.json")
    with pytest.raises(FileNotFoundError, match="no file of metadata: 'none.json'"):
        heads.load_head(file, "none.json")
    with pytest.raises(FileNotFoundError, match="no head in 'head.safetensors'"):
        heads.load_head(".")
    with pytest.raises(ValueError, match="ends in .safetensors"):
        heads.save_discriminator(head(), file_name="x.bson")
    with pytest.raises(ValueError, match=r"class_vocab\['bad'\] is 7"):
        heads.save_discriminator(head(), args={"class_vocab": {"bad": 7}})


@pytest.mark.parametrize("fails_at", ["head.safetensors", "head.json"])
def test_an_interrupted_save_leaves_whole_files(
    fails_at: str, monkeypatch: pytest.MonkeyPatch, elsewhere: Path
) -> None:
    old, new = head(), heads.ClassificationHead(3, 6)
    file = heads.save_discriminator(old, file_name="head.safetensors", path=".", args=META)
    real = Path.replace

    def interrupted(self: Path, target: Any) -> Any:
        if Path(target).name == fails_at:
            raise KeyboardInterrupt
        return real(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        heads.save_discriminator(new, file_name="head.safetensors", path=".")
    monkeypatch.undo()
    expected = old if fails_at == "head.safetensors" else new
    assert same(heads.load_head(elsewhere / file)[0], expected)
    assert sorted(p.name for p in elsewhere.iterdir()) == ["head.json", "head.safetensors"]


def test_a_head_that_is_given_keeps_its_mode() -> None:
    made = head().train()
    found, label = heads.get_classifier(made, 1)
    assert found is made and label == 1 and made.training
    heads.save_discriminator(made)
    read, _ = heads.get_classifier("custom_discrim", 1)
    assert read is not None and not read.training


def test_layers_and_discriminators_are_heads() -> None:
    layer = torch.nn.Linear(6, 3)
    found, label = heads.get_classifier(layer, 2)
    assert found is not None and found.mlp is layer and (found.class_size, label) == (3, 2)
    language_model = model()
    made = DiscriminatorV2(head(2, heads.hidden_size_of(language_model)), language_model)
    made.metadata |= META
    assert heads.get_classifier(made, "good") == (made.cl_head, 0)
    assert heads.get_classifier(made) == (made.cl_head, 1)
    with pytest.raises(TypeError, match="a discriminator is a name.*: got int"):
        heads.get_classifier(3)


@pytest.mark.parametrize("class_size", [1, 2, 5])
@pytest.mark.parametrize("told", [{}, {"class_vocab": {"a": 0, "b": 1}}, {"default_class": 1}])
def test_a_head_saved_by_a_known_name_comes_back_as_it_was(
    class_size: int, told: dict[str, Any]
) -> None:
    made = head(class_size)
    heads.save_discriminator(made, discrim_name="sentiment", args=told)
    for _ in range(2):
        read, meta = heads.ClassifierHead(load_from_pretrained=True, discrim="sentiment")
        assert same(made, read) and meta is not None
        if told or class_size != 5:
            assert meta["class_vocab"] == told.get("class_vocab", {})
            assert meta.get("default_class") == told.get("default_class")
        else:  # Uber's own, of whose classes his file says nothing
            assert meta["default_class"] == 3


def test_a_head_read_inside_inference_mode_takes_part_in_gradients() -> None:
    heads.save_discriminator(head(), args=META)
    with torch.inference_mode():
        read, _ = heads.load_head("pretrained_discriminators/custom_discrim.safetensors")
        found, _ = heads.get_classifier("custom_discrim")
    assert found is not None
    for made in (read, found):
        assert not any(parameter.is_inference() for parameter in made.parameters())
