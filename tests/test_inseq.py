"""The contract with inseq: after `install()` its unchanged calls give the scores and attributions
that they gave before, from one row of logits a step; an inseq that has moved what is replaced is
told apart before anything changes."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import onepass
from support.flops import products
from support.tiny_language_model import save, tokenizer
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
    "ignore:a score that is differentiated compares tokens:UserWarning",  # and ours of the same
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
    np.random.seed(0)  # for gradient_shap
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
            close = torch.isclose(ours[name], expected, rtol, rtol * size, equal_nan=True)
            assert close.all(), f"{name}: {ours[name]} and not {expected}"


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


# ---------------------------------------------------------------- attributions

METHODS: dict[str, dict[str, Any]] = {
    "saliency": {},
    "input_x_gradient": {},
    # Batches of one: inseq has no contrast for more rows than texts.
    "integrated_gradients": {"n_steps": 4, "internal_batch_size": 1},
}


@pytest.mark.parametrize("attributed", ["probability", "contrast_prob_diff"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attributions(family: str, method: str, attributed: str) -> None:
    model = loaded(family, method)
    text, target, _, contrast = TEXTS[model.is_encoder_decoder]
    options = {"attributed_fn": attributed, "attribute_target": model.is_encoder_decoder}
    options |= METHODS[method]
    if attributed == "contrast_prob_diff":
        options["contrast_targets"] = contrast
    if method == "integrated_gradients":
        options["return_convergence_delta"] = True
    expected = attribute(model, text, target, **options)
    bridge.install()
    assert_same(attribute(model, text, target, **options), expected)


ATTRIBUTED: dict[str, dict[str, Any]] = {
    "logit": {},
    "log-probability": {"attributed_fn": "probability", "logprob": True},
    "entropy": {},
    "pcxmi": {"contrast": True},
    "contrast_logits": {"contrast": True},
    "contrast_logits_diff": {"contrast": True, "contrast_force_inputs": True},
    "kl_divergence": {"contrast": True, "contrast_force_inputs": True},
    "in_context_pvi": {"contrast": True, "step_scores": [*ONE_ROW[:3], "pcxmi"]},
    "mc_dropout_prob_avg": {"one_step": True},
}


@pytest.mark.filterwarnings("ignore:Forcing contrastive inputs:UserWarning")  # inseq's own
@pytest.mark.parametrize("name", ATTRIBUTED)
def test_attributed_functions(name: str) -> None:
    model = loaded("gpt2", "input_x_gradient")
    text, target, short, contrast = TEXTS[False]
    options = {"attributed_fn": name} | ATTRIBUTED[name]
    if options.pop("contrast", False):
        options["contrast_targets"] = contrast
    target = short if options.pop("one_step", False) else target
    expected = attribute(model, text, target, **options)
    model.model.eval()
    bridge.install()
    assert_same(attribute(model, text, target, **options), expected)


OTHERS = ["deeplift", "gradient_shap", "layer_gradient_x_activation", "occlusion", "attention"]


@pytest.mark.filterwarnings("ignore")  # captum's own
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods(method: str) -> None:
    model = loaded("gpt2")
    model.model.set_attn_implementation("eager")  # the one that gives attention weights
    text, target, *_ = TEXTS[False]
    expected = attribute(model, text, target, method=method)
    bridge.install()
    assert_same(attribute(model, text, target, method=method), expected)


# ---------------------------------------------------------------- batches, sources, alignments

SOURCES = ["the old barn", "a wide mill!"]
TARGETS = ["red mill", "big barn"]


@pytest.mark.parametrize("method", ["dummy", "saliency"])
def test_batch(method: str) -> None:
    model = loaded("t5", method)
    options = {
        "attributed_fn": "crossentropy",  # of two texts inseq's own can be attributed
        "step_scores": ONE_ROW,  # and no contrasts, which inseq has for one text at a time
        "attribute_target": True,
    }
    expected = attribute(model, SOURCES, TARGETS, **options)
    assert len(expected) == 2
    bridge.install()
    assert_same(attribute(model, SOURCES, TARGETS, **options), expected)


def test_batch_that_is_generated() -> None:
    """Rows padded on the left, and a head that is whole while the model generates."""
    model = loaded("llama", "saliency")
    options: dict[str, Any] = {"step_scores": ["logit", "probability", "entropy"]}
    options |= {
        "generation_args": {"max_new_tokens": 3, "suppress_tokens": [*range(36), *range(98, V)]}
    }
    expected = attribute(model, ["the old", "a mill"], **options)
    bridge.install()
    assert_same(attribute(model, ["the old", "a mill"], **options), expected)


def test_finished_rows_are_left_out() -> None:
    model = loaded("bart", "saliency")
    options = {"step_scores": ["probability", "entropy", "logit"]}
    texts = SOURCES, ["red mill", "barn"]
    expected = attribute(model, *texts, **options)
    bridge.install()
    assert_same(attribute(model, *texts, **options), expected)


def test_contrast_sources() -> None:
    model = loaded("t5", "saliency")
    text, target, *_ = TEXTS[True]
    options = {
        "attributed_fn": "probability",
        "step_scores": ["pcxmi", "kl_divergence", "contrast_prob"],
        "contrast_sources": "a new barn",
    }
    expected = attribute(model, text, target, **options)
    bridge.install()
    assert_same(attribute(model, text, target, **options), expected)


@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_alignments(family: str) -> None:
    """A contrast of another length, its positions given."""
    model = loaded(family, "saliency")
    text, target, *_ = TEXTS[model.is_encoder_decoder]
    start = 0 if model.is_encoder_decoder else len(text)
    contrast = target[:start] + " a" + target[start:].replace("l", "n")
    options = {
        "attributed_fn": "contrast_prob_diff",
        "step_scores": ["contrast_logits", "pcxmi", "contrast_prob_diff"],
        "contrast_targets": contrast,
        "contrast_targets_alignments": [(at, at + 2) for at in range(start, len(target))],
    }
    expected = attribute(model, text, target, **options)
    bridge.install()
    assert_same(attribute(model, text, target, **options), expected)


# ---------------------------------------------------------------- what theirs cannot


def test_crossentropy_of_a_single_text() -> None:
    bridge.install()
    model = loaded("gpt2", "saliency")
    told = attribute(
        model, "the old", "the old mill", attributed_fn="crossentropy", step_scores=ONE_ROW
    )[0]
    torch.testing.assert_close(told["crossentropy"], -told["probability"].log())
    torch.testing.assert_close(told["perplexity"], 2 ** told["crossentropy"])
    assert told["target_attributions"].isfinite().any()


@pytest.mark.parametrize("filters", [{"top_k": 5}, {"top_p": 0.6}, {"top_k": 9, "top_p": 0.8}])
def test_filtered_divergence_is_finite(filters: dict[str, Any]) -> None:
    """inseq's own takes -inf from -inf."""
    bridge.install()
    options = {"step_scores": ["kl_divergence"], "contrast_targets": "the red barn", **filters}
    found = attribute(loaded("gpt2"), "the old", "the old mill", **options)[0]["kl_divergence"]
    assert (found > 1e-4).all()


def test_nucleus_of_each_text() -> None:
    """inseq's own counts a batch as one."""
    model = loaded("t5")
    options = {"step_scores": ["top_p_size"], "top_p": 0.7}
    expected = [attribute(model, s, t, **options)[0] for s, t in zip(SOURCES, TARGETS, strict=True)]
    bridge.install()
    assert_same(attribute(model, SOURCES, TARGETS, **options), expected)


def test_dropout_leaves_the_mode_and_the_random_state() -> None:
    bridge.install()
    model = loaded("gpt2")
    before = [module.training for module in model.modules()]
    options = {"step_scores": ["mc_dropout_prob_avg", "entropy"]}
    told = attribute(model, "the old", "the old mill", **options)
    assert [module.training for module in model.modules()] == before
    assert_same(told, attribute(model, "the old", "the old mill", **options))
    alone = attribute(model, "the old", "the old mill", step_scores=["entropy"])[0]
    assert_same([{"entropy": told[0]["entropy"]}], [alone])  # no step after is random


REFUSED: dict[str, tuple[dict[str, Any], type[Exception]]] = {
    "kl-attributed": (
        {"attributed_fn": "kl_divergence", "contrast_targets": "the red barn"},
        RuntimeError,
    ),
    "contrast-of-expanded-inputs": (
        {
            "attributed_fn": "contrast_prob_diff",
            "contrast_targets": "the red barn",
            "method": "integrated_gradients",
            "n_steps": 3,
        },
        ValueError,
    ),
    "source-of-a-decoder": (
        {"step_scores": ["contrast_prob"], "contrast_sources": "the red"},
        ValueError,
    ),
    "top-k-too-large": (
        {"step_scores": ["kl_divergence"], "contrast_targets": "the red barn", "top_k": V + 1},
        ValueError,
    ),
    "top-p-below-zero": (
        {"step_scores": ["kl_divergence"], "contrast_targets": "the red barn", "top_p": -0.5},
        ValueError,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_as_by_theirs(name: str) -> None:
    options, error = REFUSED[name]
    model = loaded("gpt2", "saliency")
    for _ in range(2):
        with pytest.raises(error):
            attribute(model, "the old", "the old mill", **options)
        bridge.install()


def test_no_dropout() -> None:
    bridge.install()
    model = loaded("llama")
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    with pytest.raises(ValueError, match="no dropout"):
        attribute(model, "the old", "the old mill", step_scores=["mc_dropout_prob_avg"])
    options = {"step_scores": ["mc_dropout_prob_avg"], "n_mcd_steps": 1}
    with pytest.raises(ValueError, match="2 or more"):
        attribute(loaded("gpt2"), "the old", "the old mill", **options)


# ---------------------------------------------------------------- what is run


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_one_row_of_logits_a_step(family: str) -> None:
    """However many scores: theirs multiply the head by every position."""
    model = loaded(family)
    text, target, _, contrast = TEXTS[model.is_encoder_decoder]
    last = len(target) - (not model.is_encoder_decoder)  # a start token comes first there
    options: dict[str, Any] = {
        "step_scores": [*ONE_ROW[:3], *CONTRAST],
        "contrast_targets": contrast,
    }
    options |= {"attr_pos_start": last, "attr_pos_end": last + 1}

    def rows_of_head(**given: Any) -> int:
        made = products(lambda: attribute(model, text, target, **options | given), batched=True)
        assert not any(rows == V for rows, *_ in made), "a gradient of the head"
        return sum(rows for rows, inner, columns in made if (inner, columns) == (D, V))

    assert rows_of_head() >= 5 * last  # the step's, and each contrast's
    bridge.install()
    assert rows_of_head() == 2  # the step's, and the contrast's of all
    assert rows_of_head(method="saliency") <= 4  # the differentiated one, and once more backward
    steps = {"method": "integrated_gradients", "n_steps": 5, "internal_batch_size": 5}
    assert rows_of_head(**steps) <= 2 + 2 * 5


def test_logits_are_never_whole() -> None:
    model = loaded("gpt2", "saliency")
    bridge.install()
    with onepass.strict():
        attribute(
            model, "the old", "the old mill", step_scores=["kl_divergence", "top_p_size"],
            contrast_targets="the red barn", top_p=0.9,
        )  # fmt: skip


# ---------------------------------------------------------------- the model, and others' functions


def is_lazy(model: Any) -> bool:
    ids = torch.tensor([[5, 6]])
    inputs = {"decoder_input_ids": ids} if model.is_encoder_decoder else {}
    return isinstance(model.model(ids, **inputs).logits, onepass.LazyLogits)


def test_a_head_that_was_exchanged_is_found_again() -> None:
    model = loaded("gpt2", "saliency")
    bridge.install()
    with bridge.lazy_where_possible(model.model):
        assert is_lazy(model)
    model.model.resize_token_embeddings(model.model.config.vocab_size + 8)
    with bridge.lazy_where_possible(model.model):
        assert is_lazy(model)
    assert not is_lazy(model)


def test_the_model_is_as_it_was() -> None:
    model = loaded("gpt2", "saliency")
    forward = dict(vars(model.model.lm_head))
    bridge.install()
    attribute(model, "the old", "the old mill")
    assert not is_lazy(model) and dict(vars(model.model.lm_head)) == forward
    with pytest.raises(RuntimeError, match="not enough"), bridge.lazy_where_possible(model.model):
        raise RuntimeError("not enough memory")
    assert not is_lazy(model)
    assert model.generate("the old", max_new_tokens=2)


def test_a_model_that_is_lazy_stays_lazy() -> None:
    model = loaded("gpt2", "saliency")
    expected = attribute(model, "the old", "the old mill", step_scores=["entropy"])
    onepass.lazy_head(model.model)
    bridge.install()
    assert_same(attribute(model, "the old", "the old mill", step_scores=["entropy"]), expected)
    assert is_lazy(model)
    bridge.uninstall()
    assert is_lazy(model)


class Doubled(torch.nn.Module):
    """A head that is no matrix."""

    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * torch.nn.functional.linear(hidden, self.weight)


def test_a_head_that_cannot_be_lazy() -> None:
    model = loaded("gpt2", "saliency")
    model.model.lm_head = Doubled(model.model.lm_head)
    options = {"step_scores": ["entropy", "logit"]}
    expected = attribute(model, "the old", "the old mill", **options)
    bridge.install()
    with pytest.warns(UserWarning, match="every position: lm_head.*does more than") as said:
        got = attribute(model, "the old", "the old mill", **options)
    assert_same(got, expected)
    assert len(said) == 1


def test_a_model_from_a_folder(tmp_path: Path) -> None:
    folder = str(save(tmp_path))
    options = {"step_scores": ["entropy", "probability"], "attributed_fn": "entropy"}
    expected = attribute(inseq.load_model(folder, "saliency"), "the old", "the old mill", **options)
    bridge.install()
    got = attribute(inseq.load_model(folder, "saliency"), "the old", "the old mill", **options)
    assert_same(got, expected)


def test_functions_of_others() -> None:
    def margin(args: Any) -> Tensor:
        logits = args.attribution_model.output2logits(args.forward_output)
        first, second = logits.softmax(-1).topk(2).values.unbind(-1)
        return first - second

    model = loaded("gpt2", "saliency")
    inseq.register_step_function(margin, "margin")
    try:
        options = {"attributed_fn": "margin", "step_scores": ["margin", "entropy"]}
        expected = attribute(model, "the old", "the old mill", **options)
        bridge.install()
        with pytest.warns(onepass.MaterializedWarning):
            got = attribute(model, "the old", "the old mill", **options)
        assert_same(got, expected)
        assert REGISTRY["margin"] is margin
    finally:
        del REGISTRY["margin"]


def test_functions_registered_with_onepass(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = importlib.import_module("onepass.step_functions.registry")
    monkeypatch.setattr(ours, "STEP_SCORES_MAP", dict(ours.STEP_SCORES_MAP))
    monkeypatch.setattr(onepass.step_functions, "STEP_SCORES_MAP", ours.STEP_SCORES_MAP)

    def halved(args: Any) -> Tensor:
        return 0.5 * onepass.step_functions.probability_fn(args)

    for name in ("halved", "probability"):
        ours.register_step_function(halved, name, overwrite=True)
    for _ in range(2):
        bridge.install()
        assert REGISTRY["probability"] is onepass.step_functions.probability_fn
        assert REGISTRY["halved"] is halved
    model = loaded("gpt2", "saliency")
    options: dict[str, Any] = {"step_scores": ["halved", "probability"]}
    scores = attribute(model, "the old", "the old mill", **options)[0]
    torch.testing.assert_close(scores["halved"], 0.5 * scores["probability"])
    bridge.uninstall()
    assert as_before()


def test_overwrite(monkeypatch: pytest.MonkeyPatch) -> None:
    def their_own(args: Any) -> None: ...

    entropy: Any = their_own
    monkeypatch.setitem(REGISTRY, "entropy", entropy)
    bridge.install(overwrite=False)
    assert REGISTRY["entropy"] is entropy and REGISTRY["logit"] is not THEIRS["logit"]
    bridge.install()
    assert REGISTRY["entropy"] is onepass.step_functions.entropy_fn
    bridge.uninstall()
    assert REGISTRY["entropy"] is entropy and REGISTRY["logit"] is THEIRS["logit"]


# ---------------------------------------------------------------- putting it there, and back


def test_on_and_off_and_on() -> None:
    bridge.uninstall()
    for _ in range(2):
        bridge.install()
        there = dict(REGISTRY), [kind.get_forward_output for kind in KINDS]
        assert there[0] == onepass.step_functions.STEP_SCORES_MAP
        bridge.install()
        assert there == (dict(REGISTRY), [kind.get_forward_output for kind in KINDS])
        bridge.uninstall()
        assert as_before()


def test_another_patch_on_top_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    bridge.install()
    other: Any = object()
    with monkeypatch.context() as patch:
        patch.setitem(REGISTRY, "entropy", other)
        patch.setattr(KINDS[0], "get_forward_output", other)
        bridge.uninstall()
        assert REGISTRY["entropy"] is other and KINDS[0].get_forward_output is other
    REGISTRY.update(THEIRS)
    KINDS[0].get_forward_output = FORWARDS[0]


def one_sentence(caught: pytest.ExceptionInfo[BaseException]) -> str:
    said = str(caught.value)
    assert "\n" not in said and len(said) < 250, said
    return said


def newer(self: Any, batch: Any) -> None: ...


def with_more(args: Any, logprob: bool = False, unit: str = "nat") -> None: ...


with_more.__module__ = scores_home.__name__
MOVED: dict[str, tuple[Any, str, Any, str]] = {
    "registry-gone": (scores_home, "STEP_SCORES_MAP", None, "STEP_SCORES_MAP.*is not there"),
    "function-gone": (REGISTRY, "entropy", None, "'entropy'.*is not there"),
    "function-changed": (REGISTRY, "probability", with_more, r"takes \(args, logprob, unit\)"),
    "class-gone": (models_home, KINDS[1].__name__, None, "EncoderDecoder.*is not there"),
    "forward-gone": (KINDS[0], "get_forward_output", None, "get_forward_output.*is not there"),
    "forward-changed": (KINDS[1], "get_forward_output", newer, r"takes \(self, batch\)"),
}


@pytest.mark.parametrize("name", MOVED)
def test_says_so_when_it_has_moved(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home, attribute_name, value, words = MOVED[name]
    with monkeypatch.context() as patch:
        if isinstance(home, dict):
            patch.setitem(home, attribute_name, value)
        else:
            patch.setattr(home, attribute_name, value)
        before = dict(REGISTRY), [kind.get_forward_output for kind in KINDS]
        with pytest.raises(RuntimeError, match=words) as caught:
            bridge.install()
        assert "0.7.1" in one_sentence(caught)
        assert before == (dict(REGISTRY), [kind.get_forward_output for kind in KINDS])


@pytest.mark.parametrize("version", [None, "0.6.0"])
def test_needs_inseq(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", find)
    with pytest.raises(
        ImportError, match=f"found.*{version or ''}.*pip install 'inseq>=0.7.1'"
    ) as caught:
        bridge.install()
    one_sentence(caught)
