"""step_scores: a whole text from one forward is what the step functions say, one step at a time.

On tiny models of three families, contrasts included; padding on either side; no logits made; modes,
generators and heads as they were after; what is refused.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import onepass
from onepass.bench.measure import _peak_bytes
from onepass.step_functions import (
    StepFunctionDecoderOnlyArgs,
    StepFunctionEncoderDecoderArgs,
    get_step_scores,
    is_contrastive_step_function,
    list_step_functions,
    logit_fn,
    registry,
    step_scores,
)
from onepass.step_functions.text import CPU_SLAB_BYTES
from support.tiny_models import D, V, tiny

core = importlib.import_module("onepass.step_functions.core")
BART: dict[str, Any] = {
    "vocab_size": V, "d_model": D, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    **{f"{side}_layers": 1 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
}  # fmt: skip
COUNT_FROM_THE_EDGE = {  # their positions, and take none
    "bart_encoder_decoder": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "bart": lambda: hf.BartForCausalLM(hf.BartConfig(**BART)),
}
MODELS = ("gpt2_tied", "llama", "t5_encoder_decoder", *COUNT_FROM_THE_EDGE)
DRAW = torch.Generator().manual_seed(6)
B, S = 2, 7
TEXT = torch.randint(3, V, (B, S), generator=DRAW)
OTHER = torch.randint(3, V, (B, S), generator=DRAW)
SOURCE = torch.randint(3, V, (B, 4), generator=DRAW)
OTHER_SOURCE = torch.randint(3, V, (B, 5), generator=DRAW)
NAMES = [name for name in list_step_functions() if name != "mc_dropout_prob_avg"]
SINGLE = ["logit", "probability", "entropy", "crossentropy", "perplexity"]


def model_of(name: str, dropout: float = 0.0) -> Any:
    torch.manual_seed(0)
    make = COUNT_FROM_THE_EDGE.get(name)
    model: Any = tiny(name).eval() if make is None else make().eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        for rate in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, dropout)
    return model


def inputs(name: str, text: Tensor = TEXT, source: Tensor = SOURCE) -> dict[str, Any]:
    if name.endswith("encoder_decoder"):
        return {"input_ids": source, "decoder_input_ids": text}
    return {"input_ids": text}


def one_at_a_time(name: str, model: Any, scores: list[str], **extra: Any) -> dict[str, Tensor]:
    """The step functions over each prefix in turn, [B, S - 1]."""
    columns: dict[str, list[Tensor]] = {score: [] for score in scores}
    for t in range(1, S):
        given = inputs(name, TEXT[:, :t])
        with torch.no_grad():
            output = model(**given)
        first = (model, output, TEXT[:, t], TEXT[:, :t])
        args: Any = StepFunctionDecoderOnlyArgs(*first)
        if "decoder_input_ids" in given:
            args = StepFunctionEncoderDecoderArgs(*first, encoder_input_ids=SOURCE)
        for score in scores:
            own = {"top_p": 0.8} if score in ("top_p_size", "kl_divergence") else {}
            if is_contrastive_step_function(score):
                own |= extra
            with torch.no_grad():
                columns[score].append(get_step_scores(score, args, own))
    return {score: torch.stack(values, 1) for score, values in columns.items()}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in got.items():
        right = wanted[name]
        if name == "perplexity":  # the step function raises 2 to nats
            right = right.log2().exp()
        assert value.shape == right.shape and not value.requires_grad
        torch.testing.assert_close(value, right, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_a_text_is_its_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(name)
    wanted = one_at_a_time(name, model, NAMES, contrast_targets=OTHER)
    passes: list[Any] = []
    vocab_stats = core.vocab_stats

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs["want"])
        return vocab_stats(*args, **kwargs)

    monkeypatch.setattr(core, "vocab_stats", counted)
    with onepass.strict():
        got = step_scores(model, **inputs(name), scores=NAMES, contrast_ids=OTHER, top_p=0.8)
    close(got, wanted)
    assert len(passes) == 2  # one of the text's rows, one of the contrast's
    assert not onepass.report(model).fused  # the head is as it was


def test_another_source() -> None:
    name = "t5_encoder_decoder"
    model = model_of(name)
    scores = [score for score in NAMES if is_contrastive_step_function(score)]
    extras: list[dict[str, Any]] = [{}, {"contrast_targets": OTHER}]
    for extra in extras:
        wanted = one_at_a_time(name, model, scores, contrast_sources=OTHER_SOURCE, **extra)
        got = step_scores(
            *(model, SOURCE, scores),
            decoder_input_ids=TEXT,
            contrast_source_ids=OTHER_SOURCE,
            contrast_ids=extra.get("contrast_targets"),
            top_p=0.8,
        )
        close(got, wanted)


def test_aligned_positions() -> None:
    """A text without its context, against itself with it."""
    model = model_of("llama")
    longer = torch.cat([OTHER[:, :3], TEXT], 1)
    pairs = [(t, t + 3) for t in range(S)]
    scores = ["pcxmi", "in_context_pvi", "contrast_prob", "kl_divergence"]
    extra: dict[str, Any] = {"contrast_targets": longer, "contrast_targets_alignments": pairs}
    wanted = one_at_a_time("llama", model, scores, **extra)
    got = step_scores(
        *(model, TEXT, scores),
        contrast_ids=longer,
        contrast_targets_alignments=pairs,
        top_p=0.8,
    )
    close(got, wanted)
    with pytest.raises(IndexError, match="contrast_ids have 10 tokens.*positions 5 to 10"):
        beyond = [(t, t + 4) for t in range(S)]
        extra = {"contrast_ids": longer, "contrast_targets_alignments": beyond}
        step_scores(model, TEXT, scores, **extra)


def test_other_tokens_in_the_same_context() -> None:
    model = model_of("gpt2_tied")
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    scores = ["probability", "contrast_prob", "contrast_prob_diff", "contrast_logits_diff"]
    got = step_scores(model, TEXT, scores, contrast_ids=OTHER, same_context=True)
    handle.remove()
    assert len(runs) == 1
    with torch.no_grad():
        p = model(TEXT).logits[:, :-1].softmax(-1)
    theirs = p.gather(-1, OTHER[:, 1:, None])[..., 0]
    torch.testing.assert_close(got["contrast_prob"], theirs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(got["contrast_prob_diff"], got["probability"] - theirs)
    same = step_scores(model, TEXT, scores, contrast_ids=TEXT, same_context=True)
    assert (same["contrast_prob_diff"] == 0).all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_count(name: str, side: str) -> None:
    model = model_of(name)
    padding = torch.zeros(B, 3, dtype=torch.int64)
    order = (padding, TEXT) if side == "left" else (TEXT, padding)
    padded, mask = torch.cat(order, 1), torch.cat([(t != 0).long() for t in order], 1)
    mask_name = "decoder_attention_mask" if name.endswith("encoder_decoder") else "attention_mask"
    scores = [*SINGLE, "top_p_size", "pcxmi", "kl_divergence"]
    others = torch.cat([padding, OTHER] if side == "left" else [OTHER, padding], 1)
    masks: dict[str, Any] = {mask_name: mask, "contrast_attention_mask": mask}
    source = torch.cat([padding, SOURCE] if side == "left" else [SOURCE, padding], 1)
    given = {**inputs(name, padded, source), "scores": scores, "contrast_ids": others}
    if "decoder_input_ids" in given:
        masks["attention_mask"] = (source != 0).long()
    got = step_scores(model, **given, **masks)
    halves = {key: value * 0.5 for key, value in masks.items()}
    again = step_scores(model, **given, **halves)
    assert all(torch.equal(value, again[score]) for score, value in got.items())
    alone = step_scores(model, **inputs(name), scores=scores, contrast_ids=OTHER)
    real = slice(3, None) if side == "left" else slice(None, S - 1)
    for score, value in got.items():
        torch.testing.assert_close(value[:, real], alone[score], rtol=1e-4, atol=1e-5, msg=score)
        rest = value[:, :3] if side == "left" else value[:, S - 1 :]
        assert (rest == 0).all(), score


@pytest.mark.parametrize("name", MODELS)
def test_mc_dropout_over_a_text(name: str) -> None:
    model = model_of(name, 0.2).train()
    model.get_input_embeddings().eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    state = torch.get_rng_state()
    given: dict[str, Any] = {
        **inputs(name),
        "scores": ["probability", "mc_dropout_prob_avg"],
        "n_mcd_steps": 6,
    }
    with onepass.strict():
        got = step_scores(model, **given)
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == modes

    def probabilities() -> Tensor:
        with torch.no_grad():
            p = model(**inputs(name)).logits[:, :-1].softmax(-1)
        return p.gather(-1, TEXT[:, 1:, None])[..., 0]

    model.train()
    noisy = torch.stack([probabilities() for _ in range(6)])
    model.eval()
    p = probabilities()
    torch.testing.assert_close(got["probability"], p, rtol=1e-5, atol=1e-7)
    wanted = (p - noisy.mean(0)) / noisy.std(0)
    torch.testing.assert_close(got["mc_dropout_prob_avg"], wanted, rtol=2e-3, atol=2e-3)

    seeded = step_scores(model, **given, seed=3)["mc_dropout_prob_avg"]
    torch.rand(3)
    assert step_scores(model, **given, seed=3)["mc_dropout_prob_avg"].equal(seeded)
    assert not step_scores(model, **given, seed=4)["mc_dropout_prob_avg"].equal(seeded)


def test_runs_in_evaluation_mode_without_gradients() -> None:
    model = model_of("gpt2_tied", 0.5)
    calm = step_scores(model, TEXT, SINGLE)
    trained = step_scores(model.train(), TEXT, SINGLE)
    assert model.training and all(module.training for module in model.modules())
    for name in SINGLE:
        assert trained[name].equal(calm[name]) and not calm[name].requires_grad
    bits = step_scores(model, TEXT, ["crossentropy", "perplexity"], base="2")
    torch.testing.assert_close(bits["perplexity"], bits["crossentropy"].exp2())
    torch.testing.assert_close(bits["perplexity"], calm["perplexity"])
    logp = step_scores(model, TEXT, ["probability"], logprob=True)["probability"]
    torch.testing.assert_close(logp, -calm["crossentropy"])


def test_heads_that_are_lazy_already_and_heads_that_cannot_be(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = model_of("llama")
    wanted = step_scores(model, TEXT, SINGLE)
    onepass.lazy_head(model)
    with onepass.strict():
        got = step_scores(model, TEXT, SINGLE)
    assert onepass.report(model).fused  # still
    onepass.unlazy_head(model)
    torch.testing.assert_close(got, wanted)

    class Inside(nn.Module):  # a head that is no matrix
        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: Tensor) -> Tensor:
            logits: Tensor = self.head(hidden)
            return logits

    model.lm_head = Inside(model.lm_head)
    with caplog.at_level(logging.WARNING, logger="onepass"):
        got = step_scores(model, TEXT, SINGLE)
    torch.testing.assert_close(got, wanted)
    assert "scoring with whole logits" in caplog.text


def test_bf16() -> None:
    model = model_of("llama").bfloat16()
    got = step_scores(model, TEXT, SINGLE)
    with torch.no_grad():
        logp = model(TEXT).logits[:, :-1].double().log_softmax(-1)
    wanted = -logp.gather(-1, TEXT[:, 1:, None])[..., 0]
    assert got["crossentropy"].dtype == torch.float32
    torch.testing.assert_close(got["crossentropy"].double(), wanted, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", MODELS)
def test_registered_functions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "STEP_SCORES_MAP", dict(registry.STEP_SCORES_MAP))
    monkeypatch.setattr(importlib.import_module("onepass.step_functions.text"), "ROWS", 5)

    def margin(args: Any, **_: Any) -> Tensor:
        """Of logits that it makes."""
        best = args.forward_output.logits[:, -1].topk(2, dim=-1).values
        return best[:, 0] - best[:, 1] + args.target_ids

    def halved(args: Any, **_: Any) -> Tensor:
        return 0.5 * logit_fn(args)

    registry.register_step_function(margin, "margin")
    registry.register_step_function(halved, "logit", overwrite=True)
    model = model_of(name)
    mask = torch.tensor([[1] * S, [1] * 4 + [0] * 3])
    mask_name = "decoder_attention_mask" if name.endswith("encoder_decoder") else "attention_mask"
    scores = ["margin", "probability", "logit"]
    given: dict[str, Any] = {**inputs(name), mask_name: mask}
    got = step_scores(model, **given, scores=scores)
    assert list(got) == scores and step_scores(model, **given, scores="margin").keys() == {"margin"}
    with torch.no_grad():
        z = model(**given).logits[:, :-1]
    best = z.topk(2, dim=-1).values
    counts = mask[:, 1:]
    wanted = (best[..., 0] - best[..., 1] + TEXT[:, 1:]) * counts
    torch.testing.assert_close(got["margin"], wanted)
    own = z.gather(-1, TEXT[:, 1:, None])[..., 0]
    torch.testing.assert_close(got["logit"], own * 0.5 * counts)
    registry.register_step_function(lambda args: args.target_ids[0], "first")
    with pytest.raises(ValueError, match=r"first must give a score a row, \[5\]: got \(\)"):
        step_scores(model, **given, scores=["first"])


# ---------------------------------------------------------------- what is refused

T5: dict[str, Any] = {"model": "t5_encoder_decoder", "decoder_input_ids": TEXT}
PCXMI = {"scores": ["pcxmi"]}
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "unknown": ({"scores": ["entropi"]}, AttributeError, r"no step function 'entropi'.*top_p_size"),
    "no_score": ({"scores": []}, ValueError, "no score is asked for"),
    "no_model": ({"model": None}, TypeError, "model must be a torch.nn.Module: got NoneType"),
    "words": ({"input_ids": "text"}, TypeError, "input_ids must be a torch.Tensor: got str"),
    "one_row": ({"input_ids": TEXT[0]}, ValueError, r"input_ids must be token ids \[B, S\]"),
    "one_token": ({"input_ids": TEXT[:, :1]}, ValueError, r"S >= 2: got torch.int64 \(2, 1\)"),
    "floats": ({"input_ids": TEXT.float()}, ValueError, "input_ids must be token ids.*float32"),
    "too long": (
        {"input_ids": torch.ones(1, 3000, dtype=torch.int64)},
        ValueError,
        "a text has 3000 tokens, more than the",
    ),
    "no such token": (
        {"input_ids": TEXT + 5000}, IndexError,
        r"^input_ids\[0, 0\] is 5027: wanted 0 <= label < 97 \(the vocabulary size\)$",
    ),
    "ignored token": (
        {"input_ids": torch.where(TEXT == TEXT[0, 2], -100, TEXT)}, IndexError,
        r"^input_ids\[0, 2\] is -100: .* size\)$",
    ),
    "ignored token of the contrast": (
        {**PCXMI, "contrast_ids": torch.where(OTHER == OTHER[0, 1], -100, OTHER)}, IndexError,
        r"^contrast_ids\[0, 1\] is -100",
    ),
    "ignored token of a source": (
        {"model": "t5_encoder_decoder", "input_ids": SOURCE - 200, "decoder_input_ids": TEXT},
        IndexError, r"^input_ids\[0, 0\] is -",
    ),
    "truth": ({"input_ids": TEXT > 9}, ValueError, r"input_ids must be token ids.*torch.bool"),
    "no text": ({"input_ids": TEXT[:0]}, ValueError, r"input_ids must be .*B >= 1.*\(0, 7\)"),
    "pairs": (
        {**PCXMI, "contrast_ids": OTHER, "contrast_targets_alignments": [1, 2]}, ValueError,
        r"contrast_targets_alignments must be pairs of positions.*\[1, 2\]",
    ),
    "mask of a decoder": (
        {"decoder_attention_mask": torch.ones_like(TEXT)}, ValueError,
        "decoder_attention_mask is for encoder-decoder models: pass attention_mask",
    ),
    "mask of no contrast": (
        {"contrast_attention_mask": torch.ones_like(TEXT)}, ValueError, "contrast_attention_mask:",
    ),
    "no head": ({"model": hf.GPT2Model}, ValueError, "GPT2Model has no language-model head"),
    "encoder": ({"model": hf.BertForMaskedLM}, ValueError, "BertForMaskedLM sees what comes after"),
    "hole": (
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 0]])},
        ValueError,
        "the mask of text 1 is 0 between tokens: wanted padding before or after",
    ),
    "hole of the contrast": (
        {**PCXMI, "contrast_ids": OTHER, "contrast_attention_mask": TEXT != TEXT[0, 2]},
        ValueError,
        "the mask of text 0 is 0 between tokens",
    ),
    "mask": (
        {"attention_mask": TEXT[:, 1:]},
        ValueError,
        r"the mask of input_ids must have the shape of its rows, \(2, 7\): got \(2, 6\)",
    ),
    "decoder_ids": ({"decoder_input_ids": TEXT}, ValueError, "decoder_input_ids are for encoder-"),
    "no_decoder_ids": (
        {**T5, "decoder_input_ids": None},
        ValueError,
        "an encoder-decoder model needs decoder_input_ids",
    ),
    "sources": (
        {**T5, "input_ids": SOURCE[:1]}, ValueError,
        "input_ids must be as many texts as are scored, 2: got 1",
    ),
    "no_contrast": (PCXMI, ValueError, "pcxmi needs contrast_ids: got None"),
    "contrast_batch": (
        {**PCXMI, "contrast_ids": OTHER[:1]},
        ValueError,
        "contrast_ids must be as many texts as are scored, 2: got 1",
    ),
    "contrast_short": (
        {**PCXMI, "contrast_ids": OTHER[:, :-1]},
        IndexError,
        "contrast_ids have 6 tokens: wanted one before and at each of the positions 1 to 6",
    ),
    "contrast_source": (
        {**PCXMI, "contrast_source_ids": SOURCE},
        ValueError,
        "contrast_source_ids are for encoder-decoder models",
    ),
    "same_context": (
        {"scores": ["kl_divergence"], "contrast_ids": OTHER, "same_context": True},
        ValueError,
        "kl_divergence compares two contexts: leave same_context out",
    ),
    "no_dropout": ({"scores": ["mc_dropout_prob_avg"]}, ValueError, "no dropout in GPT2LMHeadMod"),
    "one_run": (
        {"scores": ["mc_dropout_prob_avg"], "n_mcd_steps": 1},
        ValueError,
        "n_mcd_steps must be 2 or more",
    ),
    "top_p": ({"top_p": 1.5}, ValueError, "top_p must be between 0 and 1: got 1.5"),
    "top_k": ({"top_k": -2}, ValueError, "top_k must be between 0 and 97"),
    "base": ({"base": "10"}, ValueError, "base must be one of e, 2"),
}  # fmt: skip


CONFIGS: dict[Any, Any] = {
    hf.GPT2Model: hf.GPT2Config(n_embd=D, n_layer=1, n_head=4, vocab_size=V),
    hf.BertForMaskedLM: hf.BertConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_the_model_runs(case: str) -> None:
    changed, kind, message = REFUSED[case]
    given: dict[str, Any] = {
        "model": "gpt2_tied",
        "input_ids": TEXT,
        "scores": ["probability"],
        **changed,
    }
    if given["model"] is not None:
        make = given["model"]
        given["model"] = model_of(make) if isinstance(make, str) else make(CONFIGS[make])
        given["model"].register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(kind, match=message):
        step_scores(**given)


def test_memory_is_an_eighth_of_a_texts_logits() -> None:
    """Peak of six scores of 512 tokens and 50257 logits, on a CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(512, 16, generator=generator)
    weight = torch.randn(50257, 16, generator=generator) / 4
    ids, others = torch.randint(50257, (2, 512), generator=generator)
    names = [*SINGLE, "contrast_prob_diff"]

    def run() -> None:
        rows = onepass.LazyLogits(hidden, weight, max_slab_bytes=CPU_SLAB_BYTES)
        with torch.no_grad():
            core.scores(rows, ids, names, contrast_ids=others)

    run()
    with _peak_bytes(torch.device("cpu")) as peak:
        run()
    assert peak[0] < 512 * 50257 * 4 / 8
