"""The contract with inseq: after `install()` its unchanged calls give the scores and attributions
that they gave before, from one row of logits a step; an inseq that has moved what is replaced is
told apart before anything changes."""

from __future__ import annotations

import dataclasses
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import onepass
from support.flops import products
from support.tiny_language_model import tokenizer
from support.tiny_models import SIZES

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # inseq leaves a file open as it is imported
    inseq = pytest.importorskip("inseq", reason="inseq is optional", exc_type=ImportError)
bridge: Any = onepass.integrations.inseq
scores_home = importlib.import_module("inseq.attr.step_functions")
models_home = importlib.import_module("inseq.models")
REGISTRY = scores_home.STEP_SCORES_MAP
THEIRS = dict(REGISTRY)
KINDS = (models_home.DecoderOnlyAttributionModel, models_home.EncoderDecoderAttributionModel)
FORWARDS = [kind.get_forward_output for kind in KINDS]

V, D = 260, 32  # bytes and four special tokens
pytestmark = pytest.mark.filterwarnings(
    "ignore:Contrastive inputs do not match:UserWarning",  # inseq's own
    "ignore:Input Tensor .* did not already require gradients:UserWarning",  # captum's own
)


def as_before() -> bool:
    forwards = [kind.get_forward_output for kind in KINDS]
    return {**REGISTRY} == THEIRS and forwards == FORWARDS


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """One thread for small tensors, and inseq as it is before and after every test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert as_before()
    yield
    torch.set_num_threads(threads)
    bridge.uninstall()
    assert as_before()


# ---------------------------------------------------------------- the models and their texts


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=D, n_layer=2, n_head=4, n_positions=64, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, initializer_range=0.2,
        )
    )  # fmt: skip


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SIZES | {"vocab_size": V, "attention_dropout": 0.1}
    return LlamaForCausalLM(LlamaConfig(**sizes, initializer_range=0.2))


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=V, d_model=D, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
            bos_token_id=1, eos_token_id=2, decoder_start_token_id=0,
        )
    )  # fmt: skip


def bart() -> Any:
    from transformers import BartConfig, BartForConditionalGeneration

    made = BartForConditionalGeneration(
        BartConfig(
            vocab_size=V, d_model=D, encoder_layers=1, decoder_layers=1, pad_token_id=0,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
            decoder_ffn_dim=48, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
            decoder_start_token_id=2, forced_eos_token_id=None, init_std=0.2,
        )
    )  # fmt: skip
    made.final_logits_bias.copy_(torch.linspace(-1, 1, V))  # it adds to the logits of its head
    return made


FAMILIES = {"gpt2": gpt2, "llama": llama, "t5": t5, "bart": bart}
# The text, its continuation, one character of it, another continuation.
TEXTS = {
    False: ("the old", "the old mill", "the oldm", "the red barn"),
    True: ("the old barn", "red mill", "r", "big barn"),
}


def loaded(family: str, method: str = "dummy") -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FAMILIES[family]()
    return inseq.load_model(model, method, tokenizer=tokenizer(), device="cpu")


Told = dict[str, Tensor]


def attribute(model: Any, *texts: Any, **options: Any) -> list[Told]:
    """What inseq tells of each text: step scores by their names, and the attributions."""
    torch.manual_seed(0)  # for the dropout of mc_dropout_prob_avg
    out = model.attribute(*texts, show_progress=False, **options)
    told = []
    for each in out.sequence_attributions:
        values = {name: score for name, score in (each.step_scores or {}).items()}
        for name in ("source_attributions", "target_attributions"):
            if getattr(each, name) is not None:
                values[name] = getattr(each, name)
        told.append(values)
    return told


def assert_same(got: list[Told], wanted: list[Told]) -> None:
    """Values to 1e-5; attributions, which are as small as the model's weights make them, to 1e-4
    of the largest."""
    assert len(got) == len(wanted)
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.keys() == theirs.keys() and ours
        for name, expected in theirs.items():
            size = 1.0
            rtol = 1e-5
            if name.endswith("attributions"):
                size, rtol = float(expected[expected.isfinite()].abs().max()), 1e-4
                assert size > 0, name
            assert ours[name].dtype == expected.dtype, name
            torch.testing.assert_close(
                ours[name],
                expected,
                rtol=rtol,
                atol=rtol * size,
                equal_nan=True,
                msg=lambda m, n=name: f"{n}: {m}",
            )


def their_crossentropy(name: str) -> Any:
    """inseq's own, with target_ids and result of shape [B]: of a single text inseq makes scalars of
    both, which torch's cross_entropy and inseq itself refuse."""

    def with_a_batch(args: Any) -> Tensor:
        ids = args.target_ids.reshape(-1)
        found: Tensor = THEIRS[name](dataclasses.replace(args, target_ids=ids))
        return found.reshape(-1)

    return with_a_batch


ONE_ROW = ["logit", "probability", "entropy", "crossentropy", "perplexity"]
CONTRAST = ["contrast_logits", "contrast_prob", "contrast_logits_diff", "contrast_prob_diff"]
SCORES: dict[str, dict[str, Any]] = {
    "one-row": {"step_scores": ONE_ROW},
    "log-probability": {"step_scores": ["probability", "perplexity"], "logprob": True},
    "contrast": {"step_scores": [*CONTRAST, "probability"], "contrast": True},
    "contrast-log": {"step_scores": CONTRAST[1::2], "contrast": True, "logprob": True},
    "information": {
        "step_scores": ["pcxmi", "kl_divergence", "in_context_pvi", "entropy"],
        "contrast": True,
    },
    "dropout": {"step_scores": ["mc_dropout_prob_avg"], "one_step": True},
    "dropout-log": {
        "step_scores": ["mc_dropout_prob_avg"],
        "one_step": True,
        "n_mcd_steps": 3,
        "logprob": True,
    },
    "nucleus": {"step_scores": ["top_p_size", "logit"], "top_p": 0.7},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", SCORES)
def test_step_scores(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(SCORES[name])
    model = loaded(family)
    text, target, short, contrast = TEXTS[model.is_encoder_decoder]
    if options.pop("contrast", False):
        options["contrast_targets"] = contrast
    # inseq's mc_dropout leaves the model in training, and every later step is random.
    target = short if options.pop("one_step", False) else target
    with monkeypatch.context() as patch:
        for crossentropy in ("crossentropy", "perplexity"):
            patch.setitem(REGISTRY, crossentropy, their_crossentropy(crossentropy))
        expected = attribute(model, text, target, **options)
    model.model.eval()
    bridge.install()
    assert_same(attribute(model, text, target, **options), expected)
    assert not model.model.training
