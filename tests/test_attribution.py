"""Attribution: gradients against finite differences and plain autograd, completeness, what is left
as it was found, the table, the page, the picture and JSON.
"""

from __future__ import annotations

import html.parser
import io
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import CausalLMOutput

import onepass
from onepass import step_functions
from onepass.attribution import Attribution, attribute, load_all, methods, names, texts, view
from onepass.cli.terminal import width_of
from onepass.demo.train import one_thread
from onepass.step_functions import registry
from onepass.step_functions.core import PAIRED, SCORES
from onepass.training.hidden_states import lazy_within
from support.tiny_language_model import model as llama
from support.tiny_language_model import tokenizer
from support.tiny_models import D, tiny

TEXT, OTHER = "the old barn", "a red mill"
TOKENIZER = tokenizer()
IDS: list[int] = TOKENIZER(TEXT)["input_ids"]
METHODS = list(names.METHODS)


def gpt2(dtype: torch.dtype = torch.float64) -> Any:
    """Of weights large enough that its probabilities are far from uniform."""
    sizes = {"n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = hf.GPT2Config(
        vocab_size=260, bos_token_id=1, eos_token_id=2, initializer_range=0.15, **sizes
    )
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(config).to(dtype).eval()


def t5(dtype: torch.dtype = torch.float64) -> Any:
    sizes = {"d_model": D, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config = hf.T5Config(vocab_size=260, decoder_start_token_id=0, eos_token_id=2, **sizes)
    torch.manual_seed(0)
    return hf.T5ForConditionalGeneration(config).to(dtype).eval()


def bart() -> Any:
    config = hf.BartConfig(
        vocab_size=260, d_model=D, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4,
        decoder_start_token_id=2, max_position_embeddings=64, scale_embedding=True,
        forced_eos_token_id=None, init_std=0.15,
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.BartForConditionalGeneration(config).eval()


@pytest.fixture(autouse=True)
def one_core() -> Iterator[None]:
    with one_thread():
        yield


# -- formulas written out -----------------------------------------------------------------------

Formula = Callable[[Tensor, int, int, Tensor], Tensor]  # logits [V], target, other target, q [V]
FORMULAS: dict[str, Formula] = {
    "logit": lambda z, t, c, q: z[t],
    "probability": lambda z, t, c, q: z.softmax(-1)[t],
    "entropy": lambda z, t, c, q: -(z.softmax(-1) * z.log_softmax(-1)).sum(),
    "crossentropy": lambda z, t, c, q: -z.log_softmax(-1)[t],
    "contrast_prob_diff": lambda z, t, c, q: z.softmax(-1)[t] - z.softmax(-1)[c],
    "kl_divergence": lambda z, t, c, q: (
        z.softmax(-1) * (z.log_softmax(-1) - q.log_softmax(-1))
    ).sum(),
}
CONTRAST: dict[str, Any] = {
    "contrast_prob_diff": {"contrast_generated": " yes "},
    "kl_divergence": {"contrast_text": OTHER},
}
FOLLOWING = " near"


def rows_after(model: Any, ids: list[int], n: int) -> Tensor:
    """The logits of the last n positions but one, [n, V]."""
    with torch.no_grad():
        logits: Tensor = model(input_ids=torch.tensor([ids])).logits
    return logits[0, len(ids) - n - 1 : -1]


def plain(model: Any, target: str, method: str, n_steps: int = 8) -> tuple[Tensor, Tensor]:
    """(matrix, scores) of FOLLOWING after TEXT, prefix by prefix, on whole logits."""
    following = TOKENIZER(FOLLOWING)["input_ids"]
    ids, low = [*IDS, *following], len(IDS)
    others = TOKENIZER(" yes ")["input_ids"]
    q = rows_after(model, [*TOKENIZER(OTHER)["input_ids"], *following], len(following))
    embeds = model.get_input_embeddings()(torch.tensor(ids)).detach()
    matrix = torch.full((len(ids) - 1, len(following)), float("nan"), dtype=embeds.dtype)
    scores = []
    nodes, weights = methods.gauss_legendre(n_steps)
    along = list(zip(nodes.tolist(), weights.tolist(), strict=True))
    for t, token in enumerate(following):
        x = embeds[: low + t]

        def score(x: Tensor, t: int = t, token: int = token) -> Tensor:
            logits = model(inputs_embeds=x[None]).logits[0, -1]
            return FORMULAS[target](logits, token, others[t], q[t])

        total = torch.zeros_like(x)
        for alpha, weight in along if method == "integrated_gradients" else [(1.0, 1.0)]:
            leaf = (alpha * x).requires_grad_()
            total += weight * torch.autograd.grad(score(leaf), leaf)[0]
        scores.append(score(x).detach())
        found = total.norm(dim=-1) if method == "saliency" else (x * total).sum(-1)
        matrix[: low + t, t] = found
    return matrix, torch.stack(scores)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("target", FORMULAS)
def test_equals_autograd_on_whole_logits(method: str, target: str) -> None:
    made = gpt2()
    found = attribute(
        made, TOKENIZER, TEXT, generated=FOLLOWING, method=method, target=target, n_steps=8,
        baseline="zeros", **CONTRAST.get(target, {}),
    )  # fmt: skip
    matrix, scores = plain(made, target, method)
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-9, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(found.scores[target], scores, rtol=1e-9, atol=1e-12)
    assert found.matrix.isnan().sum() == 4 + 3 + 2 + 1
    assert found.tokens == list(TEXT + FOLLOWING[:-1]) and found.targets == list(FOLLOWING)


@pytest.mark.parametrize("target", FORMULAS)
def test_gradients_are_those_of_finite_differences(target: str) -> None:
    made = gpt2()
    following = TOKENIZER(FOLLOWING)["input_ids"]
    ids = torch.tensor([*IDS, *following])
    q = rows_after(made, [*TOKENIZER(OTHER)["input_ids"], *following], len(following))
    others = torch.tensor(TOKENIZER(" yes ")["input_ids"])
    places = torch.arange(len(IDS), len(ids))
    embeds = made.get_input_embeddings()(ids[:-1]).detach()
    contrast = methods.ContrastRows(others, q if target == "kl_divergence" else None)
    score = methods.Scores(made, ids[places], contrast, {}).of(target)
    with methods.frozen(made), lazy_within(made, methods.DOING):
        inputs = methods.Inputs(made, embeds, 0, places)
        everything = torch.arange(len(places))
        grads = methods.gradients(inputs, score, everything, embeds, embeds, None)
        h = 1e-5
        for s, d in ((0, 3), (5, 17), (11, 0), (11, 31), (14, 8)):
            ends = []
            for sign in (1, -1):
                moved = embeds.clone()
                moved[s, d] += sign * h
                with torch.no_grad():
                    ends.append(score(inputs.rows(moved), everything))
            wanted = (ends[0] - ends[1]) / (2 * h)
            got = grads[:, s, d]
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)
            assert not got[places <= s].any()  # what comes later is not seen


# -- encoder-decoders, families -----------------------------------------------------------------


def marian(kind: Any = hf.MarianMTModel, **more: Any) -> Any:
    """Scales after its table, where it embeds tokens itself."""
    config = hf.MarianConfig(
        vocab_size=260, d_model=D, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=4, decoder_attention_heads=4, pad_token_id=0,
        decoder_start_token_id=0, max_position_embeddings=64, scale_embedding=True,
        forced_eos_token_id=None, init_std=0.15, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    return kind(config).eval()


MODELS = [t5, bart, marian, gpt2]


@pytest.mark.parametrize("make", MODELS, ids=[make.__name__ for make in MODELS])
def test_embeddings_are_those_that_the_model_makes_of_tokens(make: Callable[[], Any]) -> None:
    made = make()
    found = attribute(made, TOKENIZER, TEXT, generated=FOLLOWING, target="logit")
    following = TOKENIZER(FOLLOWING)["input_ids"]
    if found.n_encoder:
        before = [made.config.decoder_start_token_id, *following[:-1]]
        given = {"input_ids": torch.tensor([IDS]), "decoder_input_ids": torch.tensor([before])}
    else:
        given = {"input_ids": torch.tensor([[*IDS, *following[:-1]]])}
    rows = made(**given).logits[0, -5:].detach()
    wanted = rows.gather(1, torch.tensor(following)[:, None])[:, 0]
    torch.testing.assert_close(found.scores["logit"], wanted, rtol=1e-4, atol=1e-5)


def test_what_each_part_multiplies_its_embeddings_by() -> None:
    """Marian's encoder does so to tokens alone, its decoder to embeddings too; BART's tables do."""
    root = D**0.5
    read = texts.Tokens(IDS, IDS, 1)
    assert methods.scales_of(marian().double(), read) == (root, 1.0)
    assert methods.scales_of(bart(), read) == methods.scales_of(t5(), read) == (1.0, 1.0)
    alone = marian(hf.MarianForCausalLM, is_decoder=True)
    assert methods.scales_of(alone, texts.Tokens([], IDS, 1)) == (1.0,)


def test_a_contrast_and_padding_are_scaled_too() -> None:
    made = marian()
    how: dict[str, Any] = {"generated": FOLLOWING, "contrast_text": TEXT}
    found = attribute(made, TOKENIZER, TEXT, target="kl_divergence", **how)
    assert float(found.scores["kl_divergence"].abs().max()) < 1e-6
    how = {"method": "integrated_gradients", "baseline": "pad", "n_steps": 64, "target": "logit"}
    found = attribute(made, TOKENIZER, TEXT, generated=FOLLOWING, **how)
    pads = torch.zeros(1, len(IDS), dtype=torch.long)
    z = made(
        input_ids=pads, attention_mask=torch.ones_like(pads),
        decoder_input_ids=torch.zeros(1, 5, dtype=torch.long),
    ).logits[0].detach()  # fmt: skip
    first = z[0, found.target_ids[0]]
    sums = found.scores["logit"][0] - first
    torch.testing.assert_close(found.matrix[:, 0].nansum(), sums, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_model_that_does_more_with_tokens_is_refused(
    part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = marian()
    inner = getattr(made.model, part)
    own = inner.forward

    def forward(input_ids: Any = None, inputs_embeds: Any = None, **how: Any) -> Any:
        if inputs_embeds is None:
            inputs_embeds = 3 * inner.embed_tokens(input_ids)
        return own(inputs_embeds=inputs_embeds, **how)

    monkeypatch.setattr(inner, "forward", forward)
    with pytest.raises(ValueError, match="MarianMTModel goes on differently after its embeddings"):
        attribute(made, TOKENIZER, TEXT, generated=FOLLOWING)


class Bypassed(hf.GPT2LMHeadModel):
    """Multiplies by its head's weight itself."""

    def forward(self, **given: Any) -> Any:
        hidden = self.transformer(**given)[0]
        return CausalLMOutput(logits=hidden @ self.lm_head.weight.T)


def test_a_head_that_is_not_called_gives_the_same() -> None:
    made = gpt2()
    wanted = attribute(made, TOKENIZER, TEXT)
    made.__class__ = Bypassed
    found = attribute(made, TOKENIZER, TEXT)
    torch.testing.assert_close(found.matrix, wanted.matrix, equal_nan=True)


@pytest.mark.parametrize("make", [t5, bart], ids=["t5", "bart"])
def test_an_encoder_decoder_has_rows_for_what_it_read_and_wrote(make: Callable[[], Any]) -> None:
    made = make()
    found = attribute(made, TOKENIZER, TEXT, generated=" near", method="input_x_gradient")
    n, following = len(IDS), TOKENIZER(" near")["input_ids"]
    assert found.n_encoder == n and found.matrix.shape == (n + 5, 5)
    encoder = made.get_encoder().get_input_embeddings()(torch.tensor([IDS])).detach()
    start = made.config.decoder_start_token_id
    decoder = made.get_decoder().get_input_embeddings()
    for t, token in enumerate(following):
        x = encoder.clone().requires_grad_()
        y = decoder(torch.tensor([[start, *following[:t]]])).detach().requires_grad_()
        logits = made(inputs_embeds=x, decoder_inputs_embeds=y).logits[0, -1]
        grads = torch.autograd.grad(logits.softmax(-1)[token], (x, y))
        wanted = torch.cat([(a * g)[0].sum(-1) for a, g in zip((x, y), grads, strict=True)])
        got = found.matrix[:, t]
        torch.testing.assert_close(got[: n + t + 1], wanted.detach(), rtol=1e-4, atol=1e-7)
        assert got[n + t + 1 :].isnan().all()


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "gemma2_softcap", "cohere_scale", "gpt2_tied", "phi_bias"]
)
def test_families_agree_with_autograd(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny(family).eval()
    ids = torch.randint(3, 90, (9,), generator=torch.Generator().manual_seed(1))
    read = texts.Tokens([], ids.tolist(), 6)
    monkeypatch.setattr(texts, "encode", lambda *args, **how: read)
    monkeypatch.setattr(methods, "token_texts", lambda tokenizer, ids: [str(i) for i in ids])
    with onepass.strict():
        found = attribute(made, TOKENIZER, TEXT, method="saliency")
    for t in range(3):
        x = made.get_input_embeddings()(ids[None, : 6 + t]).detach().requires_grad_()
        value = made(inputs_embeds=x).logits[0, -1].float().softmax(-1)[ids[6 + t]]
        wanted = torch.autograd.grad(value, x)[0][0].norm(dim=-1)
        torch.testing.assert_close(found.matrix[: 6 + t, t], wanted, rtol=1e-4, atol=1e-8)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers deprecated
def test_an_adapter_of_peft_is_in_it() -> None:
    import peft

    made = llama(2)
    plainly = attribute(made, TOKENIZER, TEXT)
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = attribute(peft.get_peft_model(made, config), TOKENIZER, TEXT)
    assert not torch.allclose(plainly.matrix, adapted.matrix, equal_nan=True)


def bert(kind: Any) -> Any:
    config = hf.BertConfig(
        vocab_size=260, hidden_size=D, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, max_position_embeddings=64, is_decoder=False,
        attn_implementation="eager",
    )  # fmt: skip
    return kind(config)


@pytest.mark.parametrize("tells", [True, False])
def test_a_model_that_sees_what_comes_after_is_refused(tells: bool) -> None:
    """Before it runs where it tells so, else by its gradients."""
    made, runs = bert(hf.BertLMHeadModel), []  # type: Any, list[int]
    made.register_forward_pre_hook(lambda *_: runs.append(1))
    if not tells:
        for module in made.modules():
            if hasattr(module, "is_causal"):
                module.is_causal = True
    with pytest.raises(ValueError, match="BertLMHeadModel sees what comes after a token"):
        attribute(made, TOKENIZER, TEXT)
    assert bool(runs) == (not tells)


@pytest.mark.parametrize("kind", [hf.BertModel, hf.GPT2Model])
def test_a_model_without_a_head_is_refused(kind: Any) -> None:
    made = bert(kind) if kind is hf.BertModel else gpt2().transformer
    with pytest.raises(ValueError, match=f"{kind.__name__} has no language-model head"):
        attribute(made, TOKENIZER, TEXT)


def test_bf16_is_near_float32() -> None:
    made = gpt2(torch.float32)
    exact = attribute(
        made, TOKENIZER, TEXT, method="integrated_gradients", n_steps=8, baseline="zeros"
    )
    rough = attribute(
        made.bfloat16(), TOKENIZER, TEXT, method="integrated_gradients", n_steps=8, baseline="zeros"
    )
    assert rough.matrix.dtype == torch.float32
    seen = ~exact.matrix.isnan()
    size = exact.matrix[seen].abs().max()
    assert (rough.matrix - exact.matrix)[seen].abs().max() < 0.1 * size


@pytest.mark.parametrize("target", ["probability", "perplexity", "kl_divergence", "entropy"])
@pytest.mark.parametrize("method", METHODS)
def test_fp16_keeps_the_gradients_of_small_and_large_scores(method: str, target: str) -> None:
    """At p < 1e-6 those of p are below what float16 has, those of 1 / p above."""
    made = gpt2(torch.float32)
    with torch.no_grad():
        made.lm_head.weight.mul_(4)
    made.half().float()  # both have the weights that float16 has
    how: dict[str, Any] = {"method": method, "target": target, "n_steps": 4, "generated": "!k~"}
    if target == "kl_divergence":
        how["contrast_text"] = OTHER
    exact = attribute(made, TOKENIZER, TEXT, **how, step_scores=["probability"])
    rough = attribute(made.half(), TOKENIZER, TEXT, **how)
    assert rough.matrix.dtype == torch.float32
    if target in ("probability", "perplexity"):
        assert float(exact.scores["probability"].min()) < 1e-6
    for t in range(3):
        wanted, got = (a.matrix[a.read[:, t], t] for a in (exact, rough))
        assert (got - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_what_is_not_finite_is_told_and_shown(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # all columns of the table

    def broken(rows: Tensor, ids: Tensor) -> Tensor:
        """Of the third target."""
        values = onepass.vocab_stats(rows, ids, want=("label_logit",)).label_logit
        return values * torch.where(ids == IDS[3], torch.inf, 1.0)

    with caplog.at_level(logging.WARNING, "onepass"):
        found = attribute(gpt2(), TOKENIZER, TEXT, target=broken, method="input_x_gradient")
    assert f"broken is not finite, or its gradient, of {TEXT[3]!r}" in caplog.text
    bad = found.read & ~found.matrix.isfinite()
    assert bad.any(0).tolist() == [TEXT[t + 1] == TEXT[3] for t in range(11)]
    assert found.matrix.isnan()[~found.read].all()
    table, gone = io.StringIO(), int(bad.sum())
    view.show(found, table)
    cells = table.getvalue().split()
    assert sum(cells.count(word) for word in ("nan", "inf", "-inf")) >= gone
    assert cells.count("-") == int((~found.read).sum())
    page = view.html([found])
    assert page.count("<td></td>") == int((~found.read).sum())
    view.write_png(tmp_path / "x.png", found)
    again = Attribution.from_dict(json.loads(found.to_json()))
    assert torch.equal(again.read, found.read)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "onepass"):
        attribute(gpt2(), TOKENIZER, TEXT)
    assert not caplog.text


@pytest.mark.parametrize("n_targets", [1, 3, 7])
def test_what_is_read_is_a_matter_of_positions(n_targets: int) -> None:
    found = attribute(gpt2(), TOKENIZER, TEXT, start=12 - n_targets)
    wanted = torch.arange(11)[:, None] < torch.arange(12 - n_targets, 12)
    assert torch.equal(found.read, wanted) and torch.equal(found.matrix.isnan(), ~wanted)


@pytest.mark.filterwarnings("ignore")  # what inseq's own libraries say
@pytest.mark.parametrize("method", METHODS[:2])
def test_equals_inseq(method: str) -> None:
    inseq = pytest.importorskip("inseq", reason="compares with inseq where it is installed")
    made, words = gpt2(torch.float32), tokenizer()
    words.unk_token = "<unk>"
    made.config._name_or_path = made.name_or_path = "tiny"
    theirs = inseq.load_model(made, method, tokenizer=words).attribute(
        TEXT, TEXT + FOLLOWING, step_scores=["entropy"], show_progress=False
    )[0]
    ours = attribute(
        made, TOKENIZER, TEXT, generated=TEXT + FOLLOWING, method=method, reduction="l2",
        step_scores=["entropy"],
    )  # fmt: skip
    wanted = theirs.target_attributions.norm(dim=-1)[:-1]  # the last token is not read
    seen = ~ours.matrix.isnan()
    torch.testing.assert_close(ours.matrix[seen], wanted[seen], rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(ours.scores["entropy"], theirs.step_scores["entropy"])


# -- integrated gradients -----------------------------------------------------------------------


@pytest.mark.parametrize("target", ["logit", "probability", "entropy"])
def test_integrated_gradients_sum_to_the_difference(target: str) -> None:
    made = gpt2()
    found = attribute(
        made, TOKENIZER, TEXT, method="integrated_gradients", target=target, baseline="pad",
        n_steps=200,
    )  # fmt: skip
    pad = made.get_input_embeddings()(torch.zeros(len(IDS) - 1, dtype=torch.long))
    with torch.no_grad():
        z = made(inputs_embeds=pad[None]).logits[0]
    wanted = found.scores[target] - torch.stack(
        [FORMULAS[target](z[t], IDS[t + 1], 0, z[t]) for t in range(len(z))]
    )
    sums = found.matrix.nansum(0)
    assert found.deltas is not None and found.n_steps == 200 and found.baseline == "pad"
    torch.testing.assert_close(found.deltas, sums - wanted, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(sums, wanted, rtol=1e-4, atol=1e-5)


def test_a_sum_that_is_missed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = gpt2()
    with caplog.at_level(logging.WARNING, "onepass"):
        attribute(made, TOKENIZER, TEXT, method="integrated_gradients", n_steps=1)
        assert "miss their sum" in caplog.text and caplog.text.endswith("raise n_steps\n")
        attribute(made, TOKENIZER, TEXT, method="integrated_gradients", baseline="zeros", n_steps=1)
    assert caplog.text.endswith("start from a token, --baseline pad\n")


def test_they_start_from_padding_or_the_end_and_from_zeros_where_there_is_neither() -> None:
    made, bare = gpt2(), tokenizer()
    how: dict[str, Any] = {"method": "integrated_gradients", "n_steps": 8}
    for pad, end, baseline in ((0, 2, "pad"), (None, 2, "pad"), (None, None, "zeros")):
        bare.pad_token = None if pad is None else TOKENIZER.pad_token
        bare.eos_token = None if end is None else TOKENIZER.eos_token
        found = attribute(made, bare, TEXT, **how)
        assert found.baseline == baseline
        start = torch.zeros(len(IDS) - 1, D)
        if baseline == "pad":
            start += made.get_input_embeddings().weight[end if pad is None else pad].detach()
        with torch.no_grad():
            p = made(inputs_embeds=start[None]).logits[0].softmax(-1)
        wanted = found.scores["probability"] - p.gather(-1, torch.tensor(IDS[1:])[:, None])[:, 0]
        assert found.deltas is not None
        torch.testing.assert_close(found.deltas, found.matrix.nansum(0) - wanted)


@pytest.mark.parametrize(("share", "told"), [(0.049, False), (0.051, True), (-0.051, True)])
def test_five_percent_are_missed(
    share: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = torch.tensor([2.0, -2.0])
    with caplog.at_level(logging.WARNING, "onepass"):
        methods._tell_deltas(share * wanted, wanted, True)
        methods._tell_deltas(torch.tensor([9e-5]), torch.tensor([0.0]), True)  # rounding
    assert ("of 2 of 2 targets miss their sum by more than 5 %" in caplog.text) == told
    assert caplog.text.count("miss") == int(told)


def test_nodes_integrate_polynomials() -> None:
    nodes, weights = methods.gauss_legendre(5)
    for power in range(10):
        assert float((weights * nodes**power).sum()) == pytest.approx(1 / (power + 1), rel=1e-12)
    nodes, weights = methods.gauss_legendre(1)
    assert nodes.tolist() == [0.5] and weights.tolist() == [1.0]


# -- what changes nothing, and is not changed ---------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_batch_size_changes_nothing(method: str) -> None:
    made = gpt2()
    found = [
        attribute(made, TOKENIZER, TEXT, method=method, n_steps=6, batch_size=size)
        for size in (1, 4, 7, None)
    ]
    for other in found[1:]:
        torch.testing.assert_close(
            other.matrix, found[0].matrix, rtol=1e-9, atol=1e-14, equal_nan=True
        )
    assert [f.batch_size for f in found[:3]] == [1, 4, 7]


@pytest.mark.parametrize("size", [1, 4, 7])
def test_dropouts_draws_are_those_of_the_targets_in_a_batch(size: int) -> None:
    how: dict[str, Any] = {"options": {"seed": 3, "n_mcd_steps": 4}}
    found = [
        attribute(gpt2(), TOKENIZER, TEXT, target="mc_dropout_prob_avg", batch_size=n, **how)
        for n in (None, size)
    ]
    torch.testing.assert_close(found[1].matrix, found[0].matrix, equal_nan=True)


def test_the_model_is_left_as_it_was() -> None:
    made = llama(2)
    made.train()
    made.model.layers[0].eval()
    made.model.layers[1].self_attn.q_proj.weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    modes = [m.training for m in made.modules()]
    wanted = [p.requires_grad for p in made.parameters()]
    state = torch.get_rng_state()
    attribute(made, TOKENIZER, TEXT, max_new_tokens=2, method="integrated_gradients", n_steps=3)
    with pytest.raises(ValueError, match="zero"):
        attribute(made, TOKENIZER, TEXT, target=lambda rows, ids: fail())
    assert [m.training for m in made.modules()] == modes
    assert [p.requires_grad for p in made.parameters()] == wanted
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in made.named_parameters())
    assert torch.equal(torch.get_rng_state(), state)
    assert not onepass.report(made).fused


def fail() -> Tensor:
    raise ValueError("divided by zero")


def test_only_last_positions_go_through_the_head() -> None:
    """No logits are made whole, and a head that is lazy already stays so."""
    made, shapes = onepass.lazy_head(llama(2)), []
    made.lm_head.register_forward_hook(lambda head, args, out: shapes.append(tuple(out.shape)))
    with onepass.strict():
        attribute(made, TOKENIZER, TEXT, step_scores=["entropy", "logit", "crossentropy"])
        attribute(made, TOKENIZER, TEXT, target="kl_divergence", contrast_text="the old mill")
    # a row for each target, and one that is compared with what the model makes of the tokens
    assert set(shapes) == {(11, 1, 260), (1, 1, 260)}
    assert onepass.report(made).fused


def test_a_head_that_cannot_be_lazy_is_told(caplog: pytest.LogCaptureFixture) -> None:
    made = llama(2)
    wanted = attribute(made, TOKENIZER, TEXT)
    own = made.lm_head.forward
    made.lm_head.forward = lambda hidden: own(hidden)
    with caplog.at_level(logging.WARNING, "onepass"):
        found = attribute(made, TOKENIZER, TEXT)
    assert "attributing with whole logits: lm_head has a forward" in caplog.text
    torch.testing.assert_close(found.matrix, wanted.matrix, rtol=1e-4, atol=1e-8, equal_nan=True)


class Small:
    """Memory for so many rows."""

    def __init__(self, model: Any, most: int) -> None:
        self.most, self.tried = most, []  # type: tuple[int, list[int]]
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tried.append(len(kwargs.get("inputs_embeds", [0])))
        if self.tried[-1] > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")


def test_too_large_a_batch_is_halved_once(caplog: pytest.LogCaptureFixture) -> None:
    made = llama(2)
    wanted = attribute(made, TOKENIZER, TEXT)
    memory = Small(made, 5)
    with caplog.at_level(logging.WARNING, "onepass"):
        found = attribute(made, TOKENIZER, TEXT, batch_size=10)
    assert memory.tried == [1, 1, 1, 10, 5, 5, 1] and found.batch_size == 5
    assert caplog.text.count("out of memory with 10 rows at once: going on with 5") == 1
    torch.testing.assert_close(found.matrix, wanted.matrix, rtol=1e-4, atol=1e-8, equal_nan=True)
    memory.most = 2
    with pytest.raises(RuntimeError, match="with 5 rows at once too: pass a smaller batch_size"):
        attribute(made, TOKENIZER, TEXT, batch_size=10)


# -- what can be asked --------------------------------------------------------------------------


def test_a_function_of_ones_own_is_a_target() -> None:
    made = gpt2()

    def twice(rows: Tensor, ids: Tensor) -> Tensor:
        return 2 * onepass.vocab_stats(rows, ids, want=("label_logit",)).label_logit

    def plainly(rows: Tensor, ids: Tensor) -> Tensor:
        return 2 * rows[torch.arange(len(ids)), ids]  # makes them, and warns of nothing

    found = attribute(made, TOKENIZER, TEXT, target=plainly)
    wanted = attribute(made, TOKENIZER, TEXT, target=twice)
    torch.testing.assert_close(found.matrix, wanted.matrix, equal_nan=True)
    found = attribute(made, TOKENIZER, TEXT, target=twice)
    wanted = attribute(made, TOKENIZER, TEXT, target="logit")
    torch.testing.assert_close(found.matrix, 2 * wanted.matrix, equal_nan=True)
    assert found.target == "twice"
    with pytest.raises(ValueError, match=r"must give a score a row, \[11\]: got \(\)"):
        attribute(made, TOKENIZER, TEXT, target=lambda rows, ids: torch.zeros(()))
    for flat in ("top_p_size", lambda rows, ids: torch.zeros(len(ids))):
        with pytest.raises(ValueError, match="has no gradient"):
            attribute(made, TOKENIZER, TEXT, target=flat)


@pytest.mark.parametrize("method", METHODS)
def test_inference_mode_changes_nothing(method: str) -> None:
    made = gpt2()
    wanted = attribute(made, TOKENIZER, TEXT, method=method, n_steps=2)
    with torch.inference_mode():
        found = attribute(made, TOKENIZER, TEXT, method=method, n_steps=2)
    assert found.matrix.nan_to_num().equal(wanted.matrix.nan_to_num())


def test_step_scores_of_any_iterable() -> None:
    names: Any = iter(["logit", "entropy"])
    found = attribute(gpt2(), TOKENIZER, TEXT, step_scores=names)
    assert list(found.scores) == ["probability", "logit", "entropy"]
    assert onepass.attribution.attribute is attribute


def test_two_scores_of_one_name_are_refused() -> None:
    def entropy(rows: Tensor, ids: Tensor) -> Tensor:
        return onepass.vocab_stats(rows, ids, want=("logp",)).logp

    with pytest.raises(ValueError, match="a function of the name 'entropy', which step_scores"):
        attribute(gpt2(), TOKENIZER, TEXT, target=entropy, step_scores=["entropy"])
    attribute(gpt2(), TOKENIZER, TEXT, target="entropy", step_scores=["entropy"])


def test_a_registered_step_function_is_a_target_and_a_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(registry, "STEP_SCORES_MAP", dict(registry.STEP_SCORES_MAP))

    def halved(args: Any, **kwargs: Any) -> Tensor:
        return 0.5 * step_functions.logit_fn(args)

    step_functions.register_step_function(halved, "halved")
    step_functions.register_step_function(halved, "logit", overwrite=True)  # as users may
    made = gpt2()
    found = attribute(made, TOKENIZER, TEXT, target="halved", step_scores=["logit", "entropy"])
    assert torch.equal(found.scores["halved"], found.scores["logit"])
    monkeypatch.undo()
    wanted = attribute(made, TOKENIZER, TEXT, target="logit")
    torch.testing.assert_close(found.matrix, 0.5 * wanted.matrix, equal_nan=True)


def test_every_step_function_is_taken() -> None:
    """All of one row in one pass; those that the command knows without loading torch."""
    assert set(names.STEP_FUNCTIONS) == set(SCORES)
    assert set(names.CONTRASTIVE) == {n for n, s in SCORES.items() if PAIRED & set(s.needs)}
    made = gpt2()
    options = {"top_p": 0.5, "n_mcd_steps": 3, "seed": 1}
    found = attribute(
        made, TOKENIZER, TEXT, generated=FOLLOWING, contrast_text=OTHER, options=options,
        target="mc_dropout_prob_avg", step_scores=list(SCORES),
    )  # fmt: skip
    assert set(found.scores) == set(SCORES)
    s = found.scores
    torch.testing.assert_close(s["perplexity"] * s["probability"], torch.ones(5).double())
    torch.testing.assert_close(s["pcxmi"] * torch.tensor(2.0).log(), s["in_context_pvi"])
    assert ((s["top_p_size"] >= 1) & (s["top_p_size"] < 260)).all()
    again = attribute(
        made, TOKENIZER, TEXT, generated=FOLLOWING, target="mc_dropout_prob_avg",
        options={"n_mcd_steps": 3, "seed": 1},
    )  # fmt: skip
    assert torch.equal(again.matrix.nan_to_num(), found.matrix.nan_to_num())
    bits = attribute(made, TOKENIZER, TEXT, target="crossentropy", options={"base": "2"})
    nats = attribute(made, TOKENIZER, TEXT, target="crossentropy")
    torch.testing.assert_close(bits.matrix * torch.tensor(2.0).log(), nats.matrix, equal_nan=True)


def test_reductions() -> None:
    made = gpt2()
    whole = {
        (m, r): attribute(made, TOKENIZER, TEXT, method=m, reduction=r).matrix
        for m in METHODS[:2]
        for r in names.REDUCTIONS
    }
    signs = {key: bool((matrix < 0).any()) for key, matrix in whole.items()}
    assert signs == {key: key == ("input_x_gradient", "sum") for key in whole}
    assert (whole["saliency", "sum"] >= whole["saliency", "l2"] - 1e-12).nansum() > 0


def test_targets_by_place_and_by_generation() -> None:
    made = gpt2()
    whole = attribute(made, TOKENIZER, TEXT)
    part = attribute(made, TOKENIZER, TEXT, start=4, end=7)
    torch.testing.assert_close(part.matrix, whole.matrix[:6, 3:6], equal_nan=True)
    written = attribute(made, TOKENIZER, TEXT, max_new_tokens=3)
    logits = made(input_ids=torch.tensor([IDS])).logits
    assert written.target_ids[0] == int(logits[0, -1].argmax())
    again = attribute(made, TOKENIZER, TEXT, generated=FOLLOWING)
    twice = attribute(made, TOKENIZER, TEXT, generated=TEXT + FOLLOWING)  # as inseq has it
    assert torch.equal(again.matrix.nan_to_num(), twice.matrix.nan_to_num())


def test_contrast_on_the_same_row_and_after_another_text() -> None:
    made = gpt2()
    same = attribute(
        made, TOKENIZER, TEXT, generated=FOLLOWING, target="contrast_prob_diff",
        contrast_generated=FOLLOWING,
    )  # fmt: skip
    assert not same.scores["contrast_prob_diff"].any() and not same.matrix.nan_to_num().any()
    found = attribute(
        made, TOKENIZER, TEXT, target="kl_divergence", contrast_text="THE OLD BARN", start=5
    )
    short = attribute(made, TOKENIZER, TEXT, target="pcxmi", contrast_text="THE O", end=5)
    assert short.matrix.shape == (4, 4)
    q = rows_after(made, TOKENIZER("THE OLD BARN")["input_ids"], 11)[4:]
    p = rows_after(made, IDS, 11)[4:]
    wanted = torch.stack([FORMULAS["kl_divergence"](a, 0, 0, b) for a, b in zip(p, q, strict=True)])
    torch.testing.assert_close(found.scores["kl_divergence"], wanted)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"method": "salience"}, "method must be one of saliency, input_x_gradient, integrated_gra"),
    ({"target": "probabilty"}, "target must be one of .*probability"),
    ({"step_scores": ["entropi"]}, "step_scores must be one of .*entropy"),
    ({"reduction": "max"}, "reduction must be one of l2, sum"),
    ({"baseline": "unk"}, "baseline must be one of zeros, pad"),
    ({"n_steps": 0}, "n_steps must be a whole number from 1 on: got 0"),
    ({"batch_size": 1.5}, "batch_size must be a whole number from 1 on: got 1.5"),
    ({"text": " "}, "text is empty"),
    ({"text": "a"}, "one token"),
    ({"text": "a" * 65}, "65 tokens, more than the 64"),
    ({"text": "a" * 60, "max_new_tokens": 5}, "65 tokens, more than the 64"),
    ({"generated": ""}, "generated is empty"),
    ({"generated": "a", "max_new_tokens": 2}, "exclude each other"),
    ({"options": {"topp": 0.5}}, "options must be one of base, .*got 'topp'"),
    ({"options": {"base": "10"}}, "base must be one of e, 2"),
    ({"options": {"base": "2"}}, "base is read by crossentropy, of which none is asked for"),
    ({"options": {"top_p": 5}}, "top_p must be between 0 and 1: got 5"),
    ({"options": {"top_p": float("nan")}}, "top_p must be between 0 and 1: got nan"),
    ({"options": {"eps": float("inf")}}, "eps must be finite and at least 0: got inf"),
    ({"options": {"top_k": -1}}, "top_k must be 0 or more: got -1"),
    ({"options": {"seed": -1}}, "seed must be 0 or more: got -1"),
    ({"options": {"top_p": 0.9}, "step_scores": ["entropy"]}, "kl_divergence or top_p_size"),
    ({"options": {"top_p": 0.9}, "target": lambda rows, ids: rows[:, 0]}, "none is asked for"),
    ({"target": "mc_dropout_prob_avg", "options": {"n_mcd_steps": 1}}, "n_mcd_steps must be 2"),
    ({"max_new_tokens": 0}, "max_new_tokens must be a whole number from 1 on: got 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number from 1 on: got 1.5"),
    ({"max_new_tokens": True}, "max_new_tokens must be a whole number from 1 on: got True"),
    ({"start": 1.0}, "start must be a whole number from 1 on: got 1.0"),
    ({"end": "2"}, "end must be a whole number from 1 on: got '2'"),
    ({"contrast_text": "abc"}, "contrast_text and contrast_generated are read by .*none is asked"),
    ({"start": 12}, "1 <= start < end <= 12: got 12 and 12"),
    ({"target": "kl_divergence"}, "kl_divergence compares: give contrast_text"),
    ({"target": "kl_divergence", "contrast_generated": "a" * 11}, "give contrast_text"),
    ({"target": "contrast_prob_diff", "contrast_text": "a"}, "one token"),
    (
        {"target": "contrast_prob_diff", "contrast_text": "abc"},
        "2 tokens to compare.*end=3",
    ),
]


@pytest.mark.parametrize(("asked", "told"), REFUSED, ids=[told[:24] for _, told in REFUSED])
def test_what_is_refused(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        attribute(gpt2(), TOKENIZER, **{"text": TEXT} | asked)


def test_types_are_refused() -> None:
    with pytest.raises(TypeError, match="text and generated must be strings: got list"):
        attribute(gpt2(), TOKENIZER, ["a"])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch.nn.Module: got str"):
        attribute("gpt2", TOKENIZER, TEXT)
    for words in (None, "gpt2"):
        kind = type(words).__name__
        with pytest.raises(TypeError, match=f"tokenizer must be one of transformers.*got {kind}"):
            attribute(gpt2(), words, TEXT)
    with pytest.raises(TypeError, match="step_scores must be a list"):
        attribute(gpt2(), TOKENIZER, TEXT, step_scores="entropy")
    for name, value in (
        *(("top_k", 5.0), ("n_mcd_steps", 2.0), ("min_tokens_to_keep", True), ("top_p", "1")),
        *(("eps", None), ("logprob", "no"), ("logprob", 1), ("seed", 0.5)),
    ):
        with pytest.raises(TypeError, match=f"{name} must be .*: got {value!r}"):
            attribute(gpt2(), TOKENIZER, TEXT, options={name: value})


def test_every_option_is_read_by_what_it_is_said_to_be_read_by() -> None:
    """Each changes the scores that read it, and no other."""
    values = {
        "base": "2", "logprob": True, "top_k": 9, "top_p": 0.4, "min_tokens_to_keep": 99,
        "eps": 1.0, "n_mcd_steps": 3, "seed": 2,
    }  # fmt: skip
    made = gpt2()
    how: dict[str, Any] = {"generated": FOLLOWING, "contrast_text": OTHER}
    how |= {"step_scores": list(SCORES), "end": len(IDS) + 2}
    before = {"seed": 1, "top_p": 0.9}
    plainly = attribute(made, TOKENIZER, TEXT, options=before, **how).scores
    for name, value in values.items():
        found = attribute(made, TOKENIZER, TEXT, options=before | {name: value}, **how).scores
        changed = {n for n in found if not torch.allclose(found[n], plainly[n], rtol=1e-9)}
        assert changed == set(names.READ[name]), name


# -- texts --------------------------------------------------------------------------------------


def appending() -> Any:
    """A tokenizer that ends each text with EOS."""
    from tokenizers.processors import TemplateProcessing

    made = tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", None, [("</s>", 2)])
    assert made("a")["input_ids"][-1] == 2
    return made


def test_an_end_that_the_tokenizer_appends_is_no_target() -> None:
    made, ends = gpt2(), appending()
    for generated in (None, FOLLOWING, TEXT + FOLLOWING):
        plainly = texts.encode(made, TOKENIZER, TEXT, generated)
        assert texts.encode(made, ends, TEXT, generated) == plainly
    written = texts.encode(made, ends, TEXT, None, 2)
    assert written == texts.encode(made, TOKENIZER, TEXT, None, 2)
    assert texts.encode(made, TOKENIZER, TEXT + "</s>").decoder == [*IDS, 2]  # the text's own
    both = texts.encode(t5(), ends, TEXT, FOLLOWING)
    following = TOKENIZER(FOLLOWING)["input_ids"]
    assert both == ([*IDS, 2], [0, *following, 2], 1)  # there the model has learnt it


def test_the_model_writes_to_its_end() -> None:
    made = gpt2()
    written = texts.encode(made, TOKENIZER, TEXT, None, 9).targets
    end = next(token for token in written[1:] if token != written[0])
    until = written[: written.index(end) + 1]
    made.generation_config.eos_token_id = end
    assert texts.encode(made, TOKENIZER, TEXT, None, 9).targets == until
    made.generation_config.eos_token_id = None  # then the tokenizer's
    words = tokenizer()
    words.eos_token = words.convert_ids_to_tokens(end)
    assert texts.encode(made, words, TEXT, None, 9).targets == until
    assert made.generation_config.eos_token_id is None


def test_a_decoder_begins_with_what_its_configs_say() -> None:
    made = t5()
    made.config.bos_token_id = 7
    for of_generation, of_config, wanted in ((5, 6, 5), (None, 6, 6), (None, None, 7)):
        made.generation_config.decoder_start_token_id = of_generation
        made.config.decoder_start_token_id = of_config
        assert texts.encode(made, TOKENIZER, TEXT, "a").decoder[0] == wanted
    made.config.bos_token_id = None
    with pytest.raises(ValueError, match="no decoder_start_token_id to begin with"):
        texts.encode(made, TOKENIZER, TEXT, "a")


# -- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_json_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    found = attribute(
        gpt2(dtype), TOKENIZER, "<b> & \u2028\"'", method="integrated_gradients", n_steps=3,
        step_scores=["entropy"],
    )  # fmt: skip
    found.save(tmp_path / "a.json")
    json.loads((tmp_path / "a.json").read_text(), parse_constant=lambda name: fail())
    (tmp_path / "b.json").write_text(json.dumps(json.loads(found.to_json()), indent=1))
    assert Attribution.load(tmp_path / "b.json").to_json() == found.to_json()  # by another program
    again = Attribution.load(tmp_path / "a.json")
    for name in Attribution.__dataclass_fields__:
        mine, theirs = getattr(found, name), getattr(again, name)
        pairs = {"": mine} if not isinstance(mine, dict) else mine
        others = {"": theirs} if not isinstance(theirs, dict) else theirs
        assert pairs.keys() == others.keys()
        for key, value in pairs.items():
            if isinstance(value, Tensor):
                torch.testing.assert_close(value, others[key], rtol=0, atol=0, equal_nan=True)
            else:
                assert value == others[key], name
    assert again.scores["entropy"].dtype == dtype


def test_other_files_are_refused(tmp_path: Path) -> None:
    found = attribute(llama(2), TOKENIZER, TEXT)
    path = tmp_path / "a.json"
    for text, told in (
        ("{", "a.json:1: "),
        ("[]", "not an attribution"),
        (json.dumps(found.as_dict() | {"schema": 9}).replace("NaN", "null"), "schema 9, wanted 1"),
        (json.dumps(found.as_dict() | {"matrix": [[1.0]]}), "not an attribution"),
        (json.dumps(found.as_dict() | {"tokens": ["a"]}).replace("NaN", "null"), "its matrix is"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=told):
            Attribution.load(path)
    path.write_text((found.to_json() + "\n") * 2)
    assert len(load_all(path)) == 2
    with pytest.raises(ValueError, match="holds 2 attributions"):
        Attribution.load(path)
    with pytest.raises(FileNotFoundError):
        Attribution.load(tmp_path / "none.json")


# -- what is shown ------------------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """Every tag closed where it has to be, no script, no link; the text of each cell."""

    VOID = {"meta"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.count: dict[str, int] = {}
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe")
        assert not {"src", "href", "onclick"} & {name for name, _ in attrs}
        self.count[tag] = self.count.get(tag, 0) + 1
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("span", "td", "th"):
            self.texts.append((self.open[-1], data))


def test_the_page_is_whole_and_escaped() -> None:
    text = "<script>&amp;\n"
    found = attribute(gpt2(), TOKENIZER, text, method="input_x_gradient", step_scores=["entropy"])
    page = view.html([found, found])
    parsed = Page(page)
    spans = "".join(data for tag, data in parsed.texts if tag == "span")
    assert spans == 2 * "<script>&amp;"  # the newline is only predicted
    assert parsed.texts.count(("th", "\\n")) == 2 and parsed.count["table"] == 2
    assert "<script" not in page and "http" not in page
    assert found._repr_html_() == view.html([found])
    assert {"p8", "n3"} <= set(page.replace('"', " ").split())  # above 0 and below


def long(n: int) -> Attribution:
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(n, n, generator=generator).triu()
    matrix[torch.ones(n, n).tril(-1).bool()] = float("nan")
    tokens = [f" tok{i % 10}" for i in range(n)]
    ids = list(range(n))
    scores = {"probability": torch.rand(n, generator=generator)}
    return Attribution(
        "x", tokens, ids, tokens, ids, 0, matrix, scores, None, "saliency", "probability", "sum"
    )


@pytest.mark.parametrize("n", [64, 512])
def test_the_page_is_small(n: int) -> None:
    """110 bytes for each token of the text and, where it is not too large, cell of the matrix."""
    page = view.html([long(n)])
    drawn = Page(page).count
    assert drawn["span"] == n and (drawn.get("td", 0) >= n * n) is (n == 64)
    assert len(page.encode()) <= 110 * (drawn["span"] + drawn.get("td", 0))


def test_colours_are_of_one_scale_and_readable() -> None:
    levels = range(-view.LEVELS, view.LEVELS + 1)
    colours = [view.colour_of(level) for level in levels]
    assert len(set(colours)) == len(colours) and view.colour_of(0) == "#ffffff"

    def luminance(colour: str) -> float:
        linear = []
        for i in (1, 3, 5):
            c = int(colour[i : i + 2], 16) / 255
            linear.append(c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4)
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    grey = [luminance(colour) for colour in colours]
    assert grey[: view.LEVELS + 1] == sorted(grey[: view.LEVELS + 1])  # stronger is darker
    assert grey[view.LEVELS :] == sorted(grey[view.LEVELS :], reverse=True)
    for colour, light in zip(colours, grey, strict=True):
        ink = 0.0 if view.ink_on(colour) == "black" else 1.0
        assert (max(light, ink) + 0.05) / (min(light, ink) + 0.05) >= 4.5  # WCAG 2, AA


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("colour", [True, False])
def test_the_table_in_a_terminal(colour: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    found = attribute(gpt2(), TOKENIZER, TEXT, step_scores=["entropy"])
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    if not colour:
        monkeypatch.setenv("NO_COLOR", "1")
    tty, plainly = Terminal(), io.StringIO()
    view.show(found, tty)
    view.show(found, plainly)
    assert ("\x1b[" in tty.getvalue()) is colour
    if not colour:
        stripped = [line.rstrip() for line in tty.getvalue().splitlines()]
        assert stripped == plainly.getvalue().splitlines()
    lines = plainly.getvalue().splitlines()
    assert lines[0].startswith("saliency of probability, L2 norm over the embedding")
    assert all(len(line) <= 60 for line in lines[1:])
    assert sum(line.startswith("entropy") for line in lines) > 1  # blocks of columns
    assert f"{float(found.matrix[0, 0]):.2g}" in lines[2]


def test_without_rich_the_table_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "rich.console", None)
    out = Terminal()
    view.show(long(60), out)
    assert "\x1b[" not in out.getvalue() and "the first 48 of 60 targets" in out.getvalue()


@pytest.mark.parametrize("n", [3, 200])
def test_the_picture(n: int, tmp_path: Path) -> None:
    view.write_png(tmp_path / "a.png", long(n))
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_labels_of_a_picture_are_within_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def keep(figure: Any, *args: Any, **how: Any) -> None:
        save(figure, *args, **how)
        extents = [axes.yaxis.label.get_window_extent() for axes in figure.axes]
        saved.append((figure.bbox.height, [(box.y0, box.y1) for box in extents]))

    monkeypatch.setattr(Figure, "savefig", keep)
    view.write_png(tmp_path / "a.png", long(3))
    [(height, labels)] = saved
    assert len(labels) == 2 and all(0 <= low < high <= height for low, high in labels), saved


def test_columns_of_a_terminal() -> None:
    assert [width_of(text) for text in ("ab", "e\u0301", "\u6f22", "a\u200d")] == [2, 1, 2, 1]


def test_a_prompt_before_what_was_generated_is_told(caplog: pytest.LogCaptureFixture) -> None:
    texts._tell_prompts.cache_clear()
    with caplog.at_level(logging.WARNING, "onepass"):
        found = attribute(gpt2(), TOKENIZER, "ha", generated="haha")
    assert found.targets == ["h", "a"]
    assert "what was generated begins with it: it is taken off there" in caplog.text


def test_padding_that_is_not_there_is_no_baseline() -> None:
    bare = tokenizer()
    bare.pad_token = bare.eos_token = None
    with pytest.raises(ValueError, match="baseline='pad': the tokenizer has no padding token"):
        attribute(gpt2(), bare, TEXT, method="integrated_gradients", baseline="pad")
