"""The transform, its parameterizations, and the teacher and student behind it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import onepass
from onepass.jigsaw.cloak import TransformerCloak
from onepass.jigsaw.parameterizations import (
    BoundedMeanParameterization,
    CloakStandardDeviationParameterization,
    DirectStandardDeviationParameterization,
)
from onepass.jigsaw.transform_file import FORMAT

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from support.tiny_jigsaw import B, S, batch, moved, pair  # noqa: E402
from support.tiny_models import D, V, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FAMILIES = ("llama", "gpt2_tied", "gemma2_softcap", "gemma3_softcap", "qwen3", "phi_bias")


# -- parameterizations ------------------------------------------------------------------------


def test_standard_deviations_lie_in_their_interval_and_come_back() -> None:
    shape = CloakStandardDeviationParameterization((0.1, 2.0), shallow=3.0)
    rhos = torch.linspace(-20, 20, 101, dtype=torch.float64)
    stds = shape(rhos)
    assert (stds > 0.1).all() and (stds < 2.0).all() and (stds.diff() > 0).all()
    wanted = 0.1 + 1.9 * (1 + torch.tanh(rhos / 3.0)) / 2
    torch.testing.assert_close(stds, wanted)
    torch.testing.assert_close(shape.inverse(stds), rhos, rtol=1e-8, atol=1e-8)


def test_a_saturated_standard_deviation_keeps_its_direction() -> None:
    rhos = torch.tensor([-40.0, 40.0], requires_grad=True)
    CloakStandardDeviationParameterization((0.1, 2.0))(rhos).sum().backward()
    assert rhos.grad is not None and (rhos.grad > 0).all()


def test_bounded_mean() -> None:
    shape = BoundedMeanParameterization(1.5, init_shift=0.3)
    rhos = torch.linspace(-5, 5, 51, dtype=torch.float64)
    torch.testing.assert_close(shape(rhos), 1.5 * torch.tanh((rhos + 0.3) / 1.5))
    torch.testing.assert_close(shape.inverse(shape(rhos)), rhos, rtol=1e-9, atol=1e-9)


def test_direct_standard_deviation_clamps() -> None:
    shape = DirectStandardDeviationParameterization((0.1, 2.0))
    assert torch.equal(shape(torch.tensor([-1.0, 0.5, 7.0])), torch.tensor([0.1, 0.5, 2.0]))


@pytest.mark.parametrize("scale", [(-0.1, 1.0), (1.0, 1.0), (2.0, 1.0), (0.0, float("inf"))])
def test_scales_that_are_refused(scale: tuple[float, float]) -> None:
    for kind in (CloakStandardDeviationParameterization, DirectStandardDeviationParameterization):
        with pytest.raises(ValueError, match="scale must be .* with 0 <= min < max: got"):
            kind(scale)


# -- the transform ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ["mlp", "transformer"])
def test_a_new_transform_is_small_noise(estimator: str) -> None:
    cloak = TransformerCloak(D, estimator=estimator, init_std=0.02, embedding_scale=0.5)
    x = torch.randn(B, S, D)
    out = cloak(x)
    assert not out.means.any()
    torch.testing.assert_close(out.stds, torch.full_like(x, 0.01))
    assert float((out.noisy - x).detach().std()) == pytest.approx(0.01, rel=0.1)
    assert cloak.max_std == pytest.approx(1.0)


@pytest.mark.parametrize("estimator", ["mlp", "transformer"])
def test_masked_positions_come_out_to_the_bit(estimator: str) -> None:
    cloak = moved(TransformerCloak(D, estimator=estimator))
    x, noise = torch.randn(B, S, D), batch()["noise_mask"]
    noisy = cloak(x, noise, batch()["attention_mask"]).noisy
    assert torch.equal(noisy[noise == 0], x[noise == 0])
    assert (noisy != x).any(-1)[noise != 0].all()


def test_a_seed_makes_the_noise() -> None:
    cloak, x = moved(TransformerCloak(D)), torch.randn(B, S, D)
    first = cloak(x)
    assert torch.equal(cloak(x, seed=first.seed).noisy, first.noisy)
    assert not torch.equal(cloak(x).noisy, first.noisy)
    torch.manual_seed(5)
    one = cloak(x).noisy
    torch.manual_seed(5)
    assert torch.equal(cloak(x).noisy, one)


@pytest.mark.parametrize("estimator", ["mlp", "transformer"])
def test_an_estimate_draws_nothing(estimator: str) -> None:
    cloak = moved(TransformerCloak(D, estimator=estimator))
    x, mask = torch.randn(B, S, D), batch()["attention_mask"]
    state = torch.get_rng_state()
    means, stds = cloak.estimate(x, mask)
    assert torch.equal(torch.get_rng_state(), state)
    out = cloak(x, None, mask)
    assert torch.equal(means, out.means) and torch.equal(stds, out.stds)
    with pytest.raises(ValueError, match=r"embeddings must be \[B, S, 32\]: got \[7, 32\]"):
        cloak.estimate(x[0])


def test_context_is_causal_and_blind_to_padding() -> None:
    cloak = moved(TransformerCloak(D, estimator="transformer"))
    x, mask = torch.randn(1, S, D), torch.ones(1, S)
    mask[0, :2] = 0
    means = cloak(x, None, mask).means
    later, padded = x.clone(), x.clone()
    later[0, 5:] += 1
    padded[0, :2] += 1
    assert torch.equal(cloak(later, None, mask).means[0, 2:5], means[0, 2:5])
    assert torch.equal(cloak(padded, None, mask).means[0, 2:], means[0, 2:])
    assert not torch.equal(cloak(x, None, None).means[0, 2:], means[0, 2:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings(dtype: torch.dtype) -> None:
    out = moved(TransformerCloak(D))(torch.randn(B, S, D).to(dtype))
    assert out.noisy.dtype == dtype and out.stds.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert moved(TransformerCloak(D))(torch.randn(B, S, D)).noisy.dtype == torch.float32


@pytest.mark.parametrize("estimator", ["mlp", "transformer"])
def test_saved_and_loaded(estimator: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"mean_bound": 2.0, "scale": (0.01, 0.5), "shallow": 2.0}
    cloak = moved(TransformerCloak(D, estimator=estimator, embedding_scale=0.3, **options))
    cloak.save_pretrained(tmp_path / "sgt")
    assert sorted(p.name for p in (tmp_path / "sgt").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = TransformerCloak.from_pretrained(tmp_path / "sgt")
    assert again.config == cloak.config
    x, seed = torch.randn(B, S, D), torch.tensor(3)
    assert torch.equal(again(x, seed=seed).noisy, cloak(x, seed=seed).noisy)


def test_loading_what_is_none(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"no model.safetensors in .*: wanted the folder"):
        TransformerCloak.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="is damaged"):
        TransformerCloak.from_pretrained(tmp_path)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="holds no transform of onepass"):
        TransformerCloak.from_pretrained(tmp_path)
    cloak = TransformerCloak(D)
    cloak.config["hidden_size"] = D + 1
    cloak.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not fit its settings"):
        TransformerCloak.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "is damaged: it has no settings"),
        ("{not JSON", "settings that do not fit: Expecting property name"),
        ("[1]", "settings that do not fit: .*mapping"),
        ('{"hidden_size": 32, "colour": 1}', "settings that do not fit: .*'colour'"),
        ('{"estimator": "mlp"}', "settings that do not fit: .*'hidden_size'"),
        ('{"hidden_size": null}', "hidden_size must be an int of at least 1: got None"),
        ('{"hidden_size": 32, "init_std": "a"}', "init_std must be a number: got str"),
        ('{"hidden_size": 32, "shallow": "a"}', "shallow must be a number: got str"),
        ('{"hidden_size": 32, "scale": [1]}', "scale must be .min, max. .*got .1."),
        ('{"hidden_size": 32, "scale": ["a", "b"]}', "scale must be .min, max. .*got .'a', 'b'."),
        ('{"hidden_size": 32, "scale": 3}', "scale must be .min, max. .*got 3"),
        ('{"hidden_size": 1000000000000}', "settings that do not fit: "),
    ],
)
def test_damaged_settings_are_told_in_one_line(
    config: str | None, words: str, tmp_path: Path
) -> None:
    from safetensors.torch import save_file

    metadata = {"kind": FORMAT} if config is None else {"kind": FORMAT, "config": config}
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata=metadata)
    with pytest.raises(ValueError, match=words) as caught:
        TransformerCloak.from_pretrained(tmp_path)
    assert type(caught.value) is ValueError and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an int of at least 1: got 0"),
        ({"hidden_size": None}, "hidden_size must be an int of at least 1: got None"),
        ({"hidden_size": "8"}, "hidden_size must be an int of at least 1: got '8'"),
        ({"estimator_size": 2.5}, "estimator_size must be an int of at least 1: got 2.5"),
        ({"estimator": "rnn"}, "estimator must be one of mlp, transformer: got 'rnn'"),
        ({"init_std": 3.0}, "init_std must lie between 0.0001 and 2.0: got 3.0"),
        ({"embedding_scale": 0.0}, "embedding_scale must be above 0: got 0.0"),
        ({"mean_bound": -1.0}, "bound must be above 0: got -1.0"),
    ],
)
def test_transforms_that_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TransformerCloak(**{"hidden_size": D, **options})
    with pytest.raises(ValueError, match=r"embeddings must be \[B, S, 32\]: got \[2, 32\]"):
        TransformerCloak(D)(torch.randn(2, D))


def test_its_scale_is_that_of_the_vocabulary() -> None:
    model = tiny("gemma3_softcap")  # whose embedding layer multiplies by sqrt(D)
    cloak = TransformerCloak.from_model(model)
    rows = model.get_input_embeddings()(torch.arange(V)).detach()
    wanted = rows.norm(dim=-1).median() / D**0.5
    assert cloak.embedding_scale == pytest.approx(float(wanted))


# -- teacher and student ----------------------------------------------------------------------


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_super_batch_is_both_halves(family: str, left: bool) -> None:
    """Clean first, and equal to the base model on each half alone, padded on either side."""
    teacher, student = pair(family)
    inputs = batch(left)
    with torch.no_grad():
        out, trained = teacher(**inputs), student(**inputs)
    assert out.logits.shape == trained.logits.shape == (2 * B, S, V)
    assert out.noisy_input_embeddings is trained.noisy_input_embeddings
    model, counted = teacher.base_model, inputs["attention_mask"] != 0
    for row in range(B):
        kept = counted[row]
        ids = inputs["input_ids"][row][kept][None]
        noisy = out.noisy_input_embeddings[row][kept][None]
        for got, off in ((out.logits, True), (trained.logits, False)):
            context = model.disable_adapter() if off else onepass.strict()
            model.eval()
            with torch.no_grad(), context:
                clean = model(input_ids=ids, use_cache=False).logits[0]
                other = model(inputs_embeds=noisy, use_cache=False).logits[0]
            torch.testing.assert_close(got[row][kept], clean, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(got[B + row][kept], other, rtol=1e-4, atol=1e-4)
