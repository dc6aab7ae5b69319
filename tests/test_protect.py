"""`onepass protect` and what is behind it: the facts of a text, the attack's ranks, embeddings read
without their model, what is refused and what is left on disk."""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from onepass.cli import main
from onepass.jigsaw import attack
from onepass.jigsaw.attack import METRICS, NearestEmbedding
from onepass.jigsaw.cloak import TransformerCloak
from onepass.jigsaw.protection import Protection, protect
from onepass.jigsaw.transform_file import find_transform, read_settings

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.torch")
from onepass.jigsaw.embedding_layer import find_embeddings, load_embeddings  # noqa: E402
from onepass.training.token_texts import BYTES, quoted, token_texts  # noqa: E402
from support.tiny_language_model import CHAT, tokenizer  # noqa: E402
from support.tiny_models import D, V, tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
PYTHON = Path(__file__).resolve().parents[1] / "python"
TEXT = "the old barn"
SEEDED = ("--seed", "3", "--device", "cpu")


def transform(model: Any, **options: Any) -> TransformerCloak:
    """With weights as if it had been trained."""
    torch.manual_seed(0)
    cloak = TransformerCloak.from_model(model, **{"init_std": 0.8, **options})
    with torch.no_grad():
        for estimator in (cloak.mean_estimator, cloak.rho_estimator):
            last: Any = estimator[-1]
            last.weight.normal_(std=0.3)
    return cloak


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model/, and run/ with a transform for it as training leaves it."""
    folder = tmp_path_factory.mktemp("protect")
    config = tiny("llama").config
    config.vocab_size = 260
    torch.manual_seed(0)
    made = transformers.LlamaForCausalLM(config)
    made.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    base = str(folder / "model")
    transform(made, base_model_name_or_path=base).save_pretrained(folder / "run" / "sgt")
    return folder


def cli(capsys: pytest.CaptureFixture[str], *args: object) -> tuple[int, str, str]:
    code = main(["protect", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


# -- the facts of a text ----------------------------------------------------------------------


@pytest.fixture
def model(device: str) -> Any:
    return tiny("gemma3_softcap", device)  # whose layer scales its weight


@pytest.fixture
def ids(device: str) -> Tensor:
    return torch.randint(3, V, (12,), generator=torch.Generator().manual_seed(1)).to(device)


def rows_of(model: Any) -> Tensor:
    layer = model.get_input_embeddings()
    with torch.no_grad():
        rows: Tensor = layer(torch.arange(V, device=layer.weight.device))
    return rows


@pytest.mark.parametrize("estimator", ["mlp", "transformer"])
def test_facts_are_their_formulas(model: Any, ids: Tensor, device: str, estimator: str) -> None:
    cloak = transform(model, estimator=estimator).to(device)
    mask = torch.ones_like(ids)
    mask[[0, 5]] = 0
    done = protect(model, cloak, ids, mask, seed=7, samples=3)
    rows = rows_of(model)
    for k in range(3):
        seed = torch.tensor(7 + k, device=device)
        out = cloak(rows[ids][None], mask[None], torch.ones_like(ids)[None], seed=seed)
        noisy = out.noisy[0]
        if not k:
            assert torch.equal(done.noisy, noisy)
            torch.testing.assert_close(done.std, out.stds[0].mean(-1))
        torch.testing.assert_close(done.distance[k], (noisy - rows[ids]).norm(dim=-1))
        torch.testing.assert_close(
            done.cosine[k], torch.cosine_similarity(noisy, rows[ids], dim=-1)
        )
        distances = torch.cdist(noisy.double(), rows.double())
        angles = (
            torch.nn.functional.normalize(noisy, dim=-1)
            @ torch.nn.functional.normalize(rows, dim=-1).mT
        )
        for metric, scores in (("l2", -distances), ("cosine", angles)):
            assert torch.equal(done.found[metric][k], scores.argmax(-1))
            own = scores.gather(-1, ids[:, None])
            assert torch.equal(done.ranks[metric][k], 1 + (scores > own).sum(-1))
    assert torch.equal(done.clean, rows[ids])
    assert torch.equal(done.noisy[[0, 5]], rows[ids[[0, 5]]])
    torch.testing.assert_close(done.norm, rows[ids].norm(dim=-1))
    assert done.distance.shape == (3, 12) and done.n_draws == 3


def test_totals_leave_out_what_is_not_transformed(model: Any, ids: Tensor, device: str) -> None:
    mask = torch.ones_like(ids)
    mask[:4] = 0
    done = protect(model, transform(model).to(device), ids, mask, seed=0, samples=4)
    totals = done.totals()
    hits = torch.stack([done.found[m] == ids for m in METRICS])[..., 4:]
    shares = hits.any(0).double().mean(-1)
    assert totals["recovered_either"] == pytest.approx(float(shares.mean()))
    assert totals["recovered_either_std"] == pytest.approx(float(shares.std()))
    assert totals["recovered_l2"] == pytest.approx(float(hits[0].double().mean()))
    assert totals["abs_cosine"] == pytest.approx(float(done.cosine[:, 4:].abs().mean()))
    assert totals["distance"] == pytest.approx(float(done.distance[:, 4:].mean()))
    assert (totals["tokens"], totals["transformed"], totals["draws"]) == (12, 8, 4)
    none = protect(model, transform(model).to(device), ids, torch.zeros_like(ids), seed=0)
    assert none.totals()["recovered_either"] == 0 and none.totals()["recovered_l2_std"] is None
    assert torch.equal(none.noisy, none.clean)


def test_a_transform_that_does_nothing_hides_nothing(model: Any, ids: Tensor, device: str) -> None:
    still = TransformerCloak.from_model(model, init_std=1e-3).to(device)
    done = protect(model, still, ids, seed=0)
    assert done.totals()["recovered_l2"] == done.totals()["recovered_cosine"] == 1
    assert all(int(done.ranks[metric].max()) == 1 for metric in METRICS)


def test_who_has_the_transform(model: Any, ids: Tensor, device: str) -> None:
    cloak = transform(model).to(device)
    done = protect(model, cloak, ids, seed=0, samples=2, informed=True)
    assert list(done.found) == [*METRICS, "informed"]
    rows = rows_of(model)
    means, stds = (x[0].double() for x in cloak.estimate(rows[None]))
    for k in range(2):
        noisy = cloak(rows[ids][None], seed=torch.tensor(k, device=device)).noisy[0]
        off = (noisy.double()[:, None] - rows - means) / stds  # [S, V, D]
        scores = -(off.square() / 2 + stds.log()).sum(-1)
        assert torch.equal(done.found["informed"][k], scores.argmax(-1))
        own = scores.gather(-1, ids[:, None])
        assert torch.equal(done.ranks["informed"][k], 1 + (scores > own).sum(-1))
    totals = done.totals()
    assert totals["recovered_informed"] == pytest.approx(
        float((done.found["informed"] == ids).double().mean())
    )
    plain = torch.stack([done.found[metric] == ids for metric in METRICS]).any(0)
    assert torch.equal(done.recovered["either"], plain)
    with pytest.raises(ValueError, match='estimator "mlp"'):
        protect(model, transform(model, estimator="transformer").to(device), ids, informed=True)


def test_a_shift_alone_hides_nothing_from_who_has_it(
    files: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cloak = TransformerCloak.from_pretrained(files / "run" / "sgt")
    last: Any = cloak.rho_estimator[-1]
    torch.nn.init.zeros_(last.weight)
    torch.nn.init.constant_(last.bias, -9.0)  # hardly any noise
    last = cloak.mean_estimator[-1]
    torch.nn.init.normal_(last.weight, std=3.0)
    cloak.save_pretrained(tmp_path)
    args = ("--sgt", tmp_path, TEXT, *SEEDED, "--informed")
    code, out, _ = cli(capsys, *args, "--json")
    totals = json.loads(out)["totals"]
    assert code == 0 and totals["recovered_informed"] == 1 and totals["recovered_either"] < 0.5
    code, out, _ = cli(capsys, *args, "--samples", "2", "--png", tmp_path / "a.png")
    assert code == 0 and "; by one who has the transform 100.0% +- 0.0%;" in out
    assert out.splitlines()[1].endswith("hit, L2  hit, cosine  hit, informed")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_noise_in_most_features_hides_nothing_from_who_has_the_transform(
    model: Any, ids: Tensor, device: str
) -> None:
    cloak = TransformerCloak.from_model(model, init_std=1.9).to(device)
    last: Any = cloak.rho_estimator[-1]
    with torch.no_grad():
        last.bias[:8] = -3.0  # a hundredth of that of the others
    state = torch.get_rng_state()
    totals = protect(model, cloak, ids, seed=0, samples=20, informed=True).totals()
    assert torch.equal(torch.get_rng_state(), state)
    assert totals["recovered_informed"] == 1
    assert totals["recovered_l2"] is not None and totals["recovered_l2"] < 0.8


def test_noise_without_a_seed_is_not_torchs(model: Any, ids: Tensor, device: str) -> None:
    cloak = transform(model).to(device)

    def noisy() -> Tensor:
        torch.manual_seed(0)  # as applications do at their start
        return protect(model, cloak, ids).noisy

    assert not torch.equal(noisy(), noisy())


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [
        ({"input_ids": [1, 2]}, TypeError, "input_ids must be a torch.Tensor"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.long)}, ValueError, r"got \[1, 3\]"),
        ({"input_ids": torch.ones(0, dtype=torch.long)}, ValueError, r"got \[0\]"),
        ({"input_ids": torch.tensor([0, V])}, ValueError, f"from 0 to {V - 1}, .* got 0 to {V}"),
        ({"noise_mask": torch.ones(3)}, ValueError, "as input_ids"),
        ({"samples": 0}, ValueError, "samples must be"),
        ({"samples": True}, ValueError, "samples must be"),
        ({"seed": -1}, ValueError, "seed must be from 0"),
    ],
)
def test_what_protect_refuses(
    model: Any, ids: Tensor, device: str, bad: dict[str, Any], error: Any, words: str
) -> None:
    with pytest.raises(error, match=words):
        protect(model, transform(model).to(device), **{"input_ids": ids, **bad})


def test_a_transform_that_diverged(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cloak = TransformerCloak.from_pretrained(files / "run" / "sgt")
    cloak.mean_estimator[-1].bias.data[0] = float("nan")  # type: ignore[index, union-attr, operator]
    cloak.save_pretrained(tmp_path / "sgt")
    path = tmp_path / "a.safetensors"
    code, out, err = cli(capsys, "--sgt", tmp_path, TEXT, *SEEDED, "--output", path)
    assert (code, out) == (1, "") and "not finite" in err and not path.exists()


@pytest.mark.parametrize("metric", METRICS)
def test_ranks_do_not_depend_on_the_block(
    model: Any, ids: Tensor, device: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = NearestEmbedding(model, metric)
    torch.manual_seed(0)
    near = rows_of(model)[ids].view(3, 4, D) + torch.randn(3, 4, D, device=device)
    whole = found.ranks(near, ids.view(3, 4))
    monkeypatch.setattr(attack, "MAX_SCORES", 12 * 5)
    assert torch.equal(found.ranks(near, ids.view(3, 4)), whole)
    assert torch.equal(found(near) == ids.view(3, 4), whole == 1)
    assert 1 < int(whole.max()) <= V
    with pytest.raises(ValueError, match=r"input_ids must be \[3, 4\]"):
        found.ranks(near, ids)


# -- embeddings without their model -----------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2_tied", "gemma3_softcap", "phi_bias", "qwen3"])
def test_embeddings_are_read_alone(family: str, tmp_path: Path) -> None:
    whole = tiny(family)
    whole.save_pretrained(tmp_path, max_shard_size="12KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    stored = find_embeddings(str(tmp_path), config)
    assert stored is not None and stored.shape == (V, D)
    for file in set(index.values()) - {stored.path.name}:  # none of the others is opened
        (tmp_path / file).unlink()
    found: Any = load_embeddings(stored)
    ids = torch.arange(V)
    assert torch.equal(found.get_input_embeddings()(ids), whole.get_input_embeddings()(ids))
    left = {name for name, p in found.named_parameters() if p.numel() >= D * D}
    assert left <= {"embed_tokens.weight", "wte.weight", "wpe.weight"}
    assert config.num_hidden_layers == 2  # untouched


def test_models_whose_embeddings_cannot_be_read_alone(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    kept = safetensors.load_file(tmp_path / "model.safetensors")
    strange = {name.replace("embed_tokens", "words"): x for name, x in kept.items()}
    safetensors.save_file(strange, tmp_path / "model.safetensors")
    assert find_embeddings(str(tmp_path), config) is None
    twice = {**kept, "other.embed_tokens.weight": kept["model.embed_tokens.weight"].clone()}
    safetensors.save_file(twice, tmp_path / "model.safetensors")
    assert find_embeddings(str(tmp_path), config) is None
    (tmp_path / "model.safetensors").unlink()
    assert find_embeddings(str(tmp_path), config) is None


def test_the_whole_model_serves_otherwise(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ("--sgt", files / "run", TEXT, *SEEDED, "--json")
    code, alone, err = cli(capsys, *args)
    assert (code, err) == (0, "")
    monkeypatch.setattr("onepass.jigsaw.embedding_layer.find_embeddings", lambda *_: None)
    code, whole, err = cli(capsys, *args)
    assert (code, err) == (0, "the embeddings cannot be read alone: loading the whole model\n")
    assert whole == alone


# -- what is printed and written --------------------------------------------------------------


def test_the_table(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = cli(capsys, "--sgt", files / "run", TEXT, *SEEDED)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[1].split("  ")[0] == "token" and lines[1].endswith("nearest, cosine")
    assert len(lines) == 4 + len(TEXT)
    assert [line.split("'")[1] for line in lines[3:-1]] == list(TEXT)
    facts = json.loads(cli(capsys, "--sgt", files / "run", TEXT, *SEEDED, "--json")[1])
    marks = [line.count("* '") for line in lines[3:-1]]
    rows = facts["tokens"]
    assert marks == [int(r["recovered_l2"]) + int(r["recovered_cosine"]) for r in rows]
    assert 0 < sum(marks) < 2 * len(TEXT)
    assert lines[-1].startswith("12 of 12 tokens transformed; recovered by either attack ")
    assert f"mean |cos| {facts['totals']['abs_cosine']:.3f}" in lines[-1]


def test_json_is_what_protect_says(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = cli(
        capsys, "--sgt", files / "run" / "sgt", TEXT, *SEEDED, "--samples", "3", "--json"
    )
    facts = json.loads(out, parse_constant=pytest.fail)
    made = transformers.AutoModelForCausalLM.from_pretrained(files / "model")
    cloak = TransformerCloak.from_pretrained(files / "run" / "sgt")
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    done = protect(made, cloak, ids, seed=3, samples=3)
    assert facts["totals"] == done.totals()
    assert facts["model"] == str(files / "model") and facts["samples"] == 3
    assert facts["program"] == "onepass protect" and "seed" not in facts
    for row, distance, token_id in zip(
        facts["tokens"], done.distance.mean(0).tolist(), ids.tolist(), strict=True
    ):
        assert row["id"] == token_id and row["distance"] == distance and row["transformed"]
    hits = [row["recovered_either"] for row in facts["tokens"]]
    assert hits == done.recovered["either"].double().mean(0).tolist()


def test_several_draws_have_a_spread(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = cli(capsys, "--sgt", files / "run", TEXT, *SEEDED, "--samples", "5")
    lines = out.splitlines()
    assert lines[1].endswith("hit, L2  hit, cosine") and " +- " in lines[-1]
    assert "over 5 draws" in lines[-1]


def test_the_output_is_what_a_server_takes(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "sent.safetensors"
    code, _, err = cli(capsys, "--sgt", files / "run", TEXT, *SEEDED, "--output", path)
    assert (code, err) == (0, f"wrote {path}\n")
    sent = safetensors.load_file(path)
    made = transformers.AutoModelForCausalLM.from_pretrained(files / "model")
    cloak = TransformerCloak.from_pretrained(files / "run" / "sgt")
    ids = torch.tensor(tokenizer()(TEXT)["input_ids"])
    assert torch.equal(sent["inputs_embeds"][0], protect(made, cloak, ids, seed=3).noisy)
    assert torch.equal(sent["attention_mask"], torch.ones_like(ids)[None])
    with torch.no_grad():
        assert made(**sent).logits.shape == (1, len(ids), 260)
    with safetensors.safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # neither text nor seed goes out with it
    before = path.read_bytes()
    again = ("--sgt", files / "run", TEXT, "--seed", "4", "--device", "cpu", "--output", path)
    code, out, err = cli(capsys, *again)
    assert (code, out) == (2, "") and "--overwrite" in err and path.read_bytes() == before
    assert cli(capsys, *again, "--overwrite")[0] == 0
    assert path.read_bytes() != before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_output_is_whole_or_not_there(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full_disk(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(safetensors, "save_file", full_disk)
    path = tmp_path / "sent.safetensors"
    code, out, err = cli(capsys, "--sgt", files / "run", TEXT, *SEEDED, "--output", path)
    assert (code, out) == (1, "") and "No space left" in err and len(err.splitlines()) <= 2
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["x", "cost: $x_1$ & $2 ^{ \u7d75 " + TEXT * 9])
def test_the_picture(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    image = pytest.importorskip("matplotlib.image")
    path = tmp_path / "a.png"
    args = ("--sgt", files / "run", "--model", files / "model", *SEEDED, "--png", path)
    samples = "1" if len(text) == 1 else "3"
    text = text[:60]
    code, _, err = cli(capsys, *args, "--samples", samples, text)
    assert (code, err) == (0, f"wrote {path}\n")
    pixels = image.imread(path)
    assert pixels.shape[0] > 800 and pixels.shape[1] > 1200 and pixels.std() > 0.05
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_the_picture_of_tokens_that_are_not_transformed(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from onepass.jigsaw.report import principal_axes, write_png

    model = tiny("llama")
    for mask in (torch.zeros(5), torch.tensor([0, 1, 1, 0, 1])):
        done: Protection = protect(model, transform(model), torch.arange(5), mask, seed=0)
        write_png(tmp_path / "a.png", done, list("abcde"), model)
        assert (tmp_path / "a.png").stat().st_size > 10_000
    torch.manual_seed(0)
    rows = torch.randn(50, 6) * torch.tensor([9.0, 4, 1, 1, 1, 1]) + 3
    mean, axes, shares = principal_axes(rows)
    values, vectors = torch.linalg.eigh(torch.cov(rows.T))
    torch.testing.assert_close(mean, rows.mean(0))
    torch.testing.assert_close(shares, values.flip(0)[:2] / values.sum())
    torch.testing.assert_close(axes.abs(), vectors.flip(1)[:, :2].abs(), rtol=1e-4, atol=1e-4)


def test_tokens_as_text() -> None:
    made = tokenizer()
    ids = made("a \u00e9\x1b\n")["input_ids"]
    texts = token_texts(made, [*ids, 999])
    assert texts[:2] == ["a", " "] and texts[-1] == "<999>"
    assert texts[2:4] == ["<0xC3>", "<0xA9>"]  # halves of a character
    assert quoted("\x1b[2J") == "'\\x1b[2J'" and quoted("a" * 99) == repr("a" * 29 + "...")


def test_bytes_of_byte_level_tokens_as_text() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert set(alphabet) == set(BYTES)
    pieces = [*alphabet, "\u0120\u00c3", "\u0120a", "\u00ef\u00bf\u00bd"]
    made = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, []))
    made.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=made)
    assert token_texts(fast, [256, 257, 258]) == [" <0xC3>", " a", "\ufffd"]
    for n, piece in enumerate(alphabet):
        byte = BYTES[piece]
        assert token_texts(fast, [n]) == [chr(byte) if byte < 128 else f"<0x{byte:02X}>"]


# -- where things come from -------------------------------------------------------------------


def test_the_text_comes_from_anywhere(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    args = ("--sgt", files / "run", *SEEDED, "--json")
    wanted = cli(capsys, *args, "--", "two\nlines")[1]
    (tmp_path / "text").write_bytes(b"two\nlines\n")
    assert cli(capsys, *args, "--file", tmp_path / "text")[1] == wanted
    for more in (["-"], ["--file", "-"]):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"two\nlines\n")))
        assert cli(capsys, *args, *more)[1] == wanted


def test_a_conversation(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chat = tmp_path / "chat"
    shutil.copytree(files / "model", chat)
    tokenizer(CHAT).save_pretrained(chat)
    turns = [{"role": "system", "content": "Be"}, {"role": "user", "content": "hi you"}]
    run = tmp_path / "run"
    shutil.copytree(files / "run", run)
    args = ("--sgt", run, "--model", chat, *SEEDED, "--json", "--file", tmp_path / "c.json")
    wanted = "<system>Be</s><user>hi you</s><assistant>"
    for holds, transform_system in ((turns, True), ({"messages": turns}, False)):
        (tmp_path / "c.json").write_text(json.dumps(holds))
        record = {"program": "onepass train", "flags": {"transform_system": transform_system}}
        (run / "run.json").write_text(json.dumps(record))
        code, out, _ = cli(capsys, *args)
        rows = json.loads(out)["tokens"]
        assert code == 0 and "".join(row["token"] for row in rows) == wanted
        told = "".join(row["token"] for row in rows if row["transformed"])
        assert told == ("Behi you" if transform_system else "hi you")
        assert all(row["distance"] == 0 for row in rows if not row["transformed"])
    (tmp_path / "c.json").write_text(json.dumps([*turns, {"role": "assistant", "content": "ok"}]))
    rows = json.loads(cli(capsys, *args)[1])["tokens"]
    assert "".join(row["token"] for row in rows).endswith("</s><assistant>ok</s>")
    code, out, err = cli(capsys, *args, "--model", files / "model")
    assert (code, out) == (2, "") and "no chat template" in err


def test_a_run_is_found_after_a_move(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(files / "run", run)
    shutil.copytree(files / "model", run / "base-model")
    shutil.copytree(files / "run" / "sgt", run / "checkpoint-2" / "sgt")
    for folder in (run, run / "sgt", run / "checkpoint-2", run / "checkpoint-2" / "sgt"):
        code, out, _ = cli(capsys, "--sgt", folder, TEXT, *SEEDED, "--json")
        assert code == 0 and json.loads(out)["model"] == str(run / "base-model"), folder
    assert find_transform(run) == run / "sgt"
    assert read_settings(run / "sgt")["hidden_size"] == D


def saved(folder: Path, base: str | None, hidden_size: int = D) -> Path:
    TransformerCloak(hidden_size, base_model_name_or_path=base).save_pretrained(folder)
    return folder


def test_a_base_model_that_is_not_there(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    silent, gone = saved(tmp_path / "a", None), saved(tmp_path / "b", "/no/such/folder")
    for folder, words in ((silent, "does not say its base model"), (gone, "'/no/such/folder'")):
        code, out, err = cli(capsys, "--sgt", folder, TEXT, *SEEDED)
        assert (code, out) == (2, "") and words in err and "--model NAME_OR_DIR" in err
        assert cli(capsys, "--sgt", folder, TEXT, *SEEDED, "--model", files / "model")[0] == 0


# -- what is refused --------------------------------------------------------------------------


def test_refused_before_anything_is_loaded(files: Path, tmp_path: Path) -> None:
    run, (base, there) = str(files / "run"), (tmp_path / n for n in ("base", "there.png"))
    there.write_text("mine")
    base.mkdir()
    shutil.copy(files / "model" / "model.safetensors", base)
    damaged = saved(tmp_path / "damaged", None)
    (damaged / "model.safetensors").write_bytes(b"\x20" + b"\0" * 7 + b"{not json")
    context = tmp_path / "context"
    TransformerCloak(D, estimator="transformer").save_pretrained(context)
    crashed = tmp_path / "crashed"
    shutil.copytree(files / "run" / "sgt", crashed / "checkpoint-4" / "sgt")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    (tmp_path / "blank").write_bytes(b"\n")

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    good = ["--sgt", run, TEXT]
    refused: list[tuple[list[str], str]] = [
        ([TEXT], "--sgt"),
        (["--sgt", str(tmp_path / "no"), TEXT], "no such folder"),
        (["--sgt", str(there), TEXT], "is a file, wanted a folder"),
        (["--sgt", str(tmp_path), TEXT], "no sgt/model.safetensors or model.safetensors in"),
        (["--sgt", str(crashed), TEXT], "its checkpoint-4 has one"),
        (["--sgt", str(base), TEXT], "holds no transform of onepass"),
        (["--sgt", str(damaged), TEXT], "is damaged"),
        (["--sgt", run], "got no text"),
        (["--sgt", run, ""], "TEXT: the text is empty"),
        (["--sgt", run, " \n"], "TEXT: the text is empty"),
        (["--sgt", run, "--file", str(tmp_path / "blank")], "--file: the text is empty"),
        (["--sgt", run, "--file", str(tmp_path / "latin")], "is not UTF-8 text"),
        (["--sgt", run, "--file", str(tmp_path / "no")], "No such file"),
        (["--sgt", run, "--file", str(tmp_path)], "cannot read"),
        ([*good, "--file", str(there)], "both TEXT and --file"),
        (["--sgt", run, "--file", write("a.json", "{")], "is not JSON"),
        (["--sgt", run, "--file", write("b.json", "[]")], "holds no conversation"),
        (["--sgt", run, "--file", write("c.json", '[{"role": "user"}]')], "message 1: wanted"),
        (
            ["--sgt", run, "--file", write("d.json", '[{"role": "user", "content": " "}]')],
            "all messages are empty",
        ),
        ([*good, "--model", ""], "--model: got an empty name"),
        ([*good, "--model", str(tmp_path / "no")], "--model: no such folder"),
        ([*good, "--model", str(base)], "--model: no config.json"),
        ([*good, "--samples", "0"], "--samples: got '0', wanted a whole number from 1"),
        ([*good, "--seed", "-1"], "--seed: got '-1', wanted a whole number from 0"),
        ([*good, "--device", "gpu"], "did you mean cuda?"),
        ([*good, "--png", str(there)], "exists"),
        ([*good, "--png", "a.jpg"], "wanted a name that ends in .png"),
        ([*good, "--output", "a.pt"], "wanted a name that ends in .safetensors"),
        ([*good, "--output", str(there / "a.safetensors")], "is a file, not a folder"),
        (["--sgt", str(context), TEXT, "--informed"], "looks at more than one token"),
        ([*good, "--outptu", "a.safetensors"], "did you mean --output?"),
    ]
    script = (
        "import json, sys, importlib.util\n"
        "class Heavy:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('torch', 'transformers', 'numpy'): raise SystemError(name)\n"
        "sys.meta_path.insert(0, Heavy())\n"
        "from onepass.cli import main\n"
        "for args in json.load(sys.stdin):\n"
        "    print('exit', main(['protect', *args]), file=sys.stderr)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(PYTHON)}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps([args for args, _ in refused]),
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    told = done.stderr.split("exit 2\n")
    assert told.pop() == "" and len(told) == len(refused), done.stderr
    for (args, words), text in zip(refused, told, strict=True):
        assert words in text and len(text.splitlines()) <= 3, (args, text)
    assert there.read_text() == "mine"


def test_a_picture_without_matplotlib(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, out, err = cli(capsys, "--sgt", files / "run", TEXT, "--png", tmp_path / "a.png")
    assert (code, out) == (1, "")
    assert err == (
        'onepass protect: --png needs matplotlib, not installed here: pip install "onepass[viz]"\n'
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write")
def test_a_folder_that_cannot_be_written_to(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    path = tmp_path / "a.safetensors"
    code, _, err = cli(capsys, "--sgt", files / "run", TEXT, "--output", path)
    assert code == 2 and "cannot write to" in err


def test_refused_before_the_weights_are_read(
    files: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr("onepass.jigsaw.protect._embeddings", never)
    monkeypatch.setattr(TransformerCloak, "from_pretrained", never)
    code, _, err = cli(capsys, "--sgt", files / "run", "x" * 65, *SEEDED)
    assert code == 2 and "the text has 65 tokens, wanted 64 at most" in err
    wide = saved(tmp_path / "wide", str(files / "model"), 48)
    code, _, err = cli(capsys, "--sgt", wide, TEXT, *SEEDED)
    assert code == 2 and f"of size 48, those of {str(files / 'model')!r} have 32" in err
    assert not torch.cuda.is_available() or len(err.splitlines()) == 2
    if not torch.cuda.is_available():
        code, _, err = cli(capsys, "--sgt", files / "run", TEXT, "--device", "cuda")
        assert code == 2 and "torch sees no GPU" in err


def test_a_transform_that_does_not_fit_its_settings(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path, str(files / "model"))
    with safetensors.safe_open(folder / "model.safetensors", framework="pt") as file:
        metadata = file.metadata()
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    short = copy.copy(state)
    short.pop("mean_estimator.0.bias")
    safetensors.save_file(short, folder / "model.safetensors", metadata=metadata)
    code, out, err = cli(capsys, "--sgt", folder, TEXT, *SEEDED)
    assert (code, out) == (1, "") and "--sgt:" in err and "does not fit its settings" in err
    assert len(err.splitlines()) == 1
