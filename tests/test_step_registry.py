"""The step functions by name, as inseq 0.7 calls them and as 0.4 did, on tiny models.

What each gives of a model's output; contrasts from another context; dropout that leaves no trace;
one pass over a row for all of a step's scores; the registry; what is refused.
"""

from __future__ import annotations

import importlib
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import onepass
from onepass import step_functions as steps
from onepass.ops.vocab_stats import vocab_stats
from onepass.step_functions import (
    STEP_SCORES_MAP,
    StepFunctionDecoderOnlyArgs,
    StepFunctionEncoderDecoderArgs,
    get_step_function,
    get_step_scores,
    legacy,
)
from support.tiny_models import V, tiny

core = importlib.import_module("onepass.step_functions.core")
MODELS = ("gpt2_tied", "llama", "t5_encoder_decoder")
SINGLE = ("logit", "probability", "entropy", "crossentropy", "perplexity")
CONTRASTS = (
    *("contrast_logits", "contrast_prob", "contrast_logits_diff", "contrast_prob_diff"),
    *("pcxmi", "in_context_pvi", "kl_divergence"),
)
TEXT = torch.tensor([[5, 9, 33, 12, 70, 8], [61, 7, 7, 90, 3, 44]])
OTHER = torch.tensor([[5, 80, 33, 13, 71, 8], [61, 17, 6, 91, 33, 4]])
SOURCE = torch.tensor([[4, 8, 15, 16], [23, 42, 6, 9]])
OTHER_SOURCE = torch.tensor([[4, 8, 15], [23, 24, 6]])
S = 4  # tokens of the prefix
TARGET = TEXT[:, S]


def model_of(name: str, dropout: float = 0.0) -> Any:
    """In evaluation mode; with dropout where a number is given."""
    model = tiny(name).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    return model


def forward(model: Any, text: Tensor, source: Tensor = SOURCE) -> Any:
    if model.config.is_encoder_decoder:
        return model(input_ids=source, decoder_input_ids=text)
    return model(input_ids=text)


def step(model: Any, attribution_model: Any = None, **changed: Any) -> Any:
    """The arguments of a step function after the first S tokens."""
    given: dict[str, Any] = {
        "attribution_model": model if attribution_model is None else attribution_model,
        "target_ids": TARGET,
        "decoder_input_ids": TEXT[:, :S],
        "decoder_attention_mask": torch.ones(2, S, dtype=torch.int64),
        **changed,
    }
    if "forward_output" not in given:
        with torch.no_grad():
            given["forward_output"] = forward(model, TEXT[:, :S])
    if not model.config.is_encoder_decoder:
        return StepFunctionDecoderOnlyArgs(**given)
    mask, embed = torch.ones_like(SOURCE), model.get_input_embeddings()
    if isinstance(attribution_model, Words):
        given |= {"decoder_input_embeds": embed(TEXT[:, :S]), "encoder_input_embeds": embed(SOURCE)}
    return StepFunctionEncoderDecoderArgs(
        encoder_input_ids=SOURCE, encoder_attention_mask=mask, **given
    )


def last_logp(model: Any, text: Tensor, source: Tensor = SOURCE) -> tuple[Tensor, Tensor]:
    """Logits and log p [B, V] after a text, fp64."""
    with torch.no_grad():
        logits = forward(model, text, source).logits[:, -1].double()
    return logits, logits.log_softmax(-1)


def at(rows: Tensor, ids: Tensor) -> Tensor:
    return rows.gather(-1, ids[:, None])[:, 0]


def close(got: Tensor, wanted: Tensor, name: str = "") -> None:
    assert got.dtype == torch.float32 and got.shape == (2,), name
    torch.testing.assert_close(got.detach().double(), wanted, rtol=1e-5, atol=1e-6, msg=name)


def singles(logits: Tensor, logp: Tensor) -> dict[str, Tensor]:
    t = at(logp, TARGET)
    return {
        "logit": at(logits, TARGET),
        "probability": t.exp(),
        "entropy": -(logp.exp() * logp).sum(-1),
        "crossentropy": -t,
        "perplexity": 2**-t,  # as inseq has it: 2 to the power of nats
    }


def contrasts(own: Any, theirs: Any, ids: Tensor) -> dict[str, Tensor]:
    (z, logp), (q, logq) = own, theirs
    t, c = at(logp, TARGET), at(logq, ids)
    return {
        "contrast_logits": at(q, ids),
        "contrast_prob": c.exp(),
        "contrast_logits_diff": at(z, TARGET) - at(q, ids),
        "contrast_prob_diff": t.exp() - c.exp(),
        "pcxmi": (c - t) / math.log(2),
        "in_context_pvi": c - t,
        "kl_divergence": (logp.exp() * (logp - logq)).sum(-1),
    }


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The facts that each pass over a row was asked for."""
    wanted: list[Any] = []

    def counted(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        wanted.append(kwargs["want"])
        return vocab_stats(logits, *args, **kwargs)

    monkeypatch.setattr(core, "vocab_stats", counted)
    return wanted


@pytest.fixture
def registry() -> Iterator[None]:
    """The registries as they were, after."""
    before, spans = dict(STEP_SCORES_MAP), dict(steps.AGGREGATE_MAP["spans"])
    yield
    STEP_SCORES_MAP.clear()
    STEP_SCORES_MAP.update(before)
    steps.AGGREGATE_MAP.clear()
    steps.AGGREGATE_MAP["spans"] = spans


# ---------------------------------------------------------------- scores of one row


@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_of_a_step(name: str, lazy: bool, passes: list[Any]) -> None:
    model = model_of(name)
    z, logp = last_logp(model, TEXT[:, :S])
    wanted = singles(z, logp)
    if lazy:
        onepass.lazy_head(model)
    args = step(model)
    with onepass.strict(lazy):
        for score, value in wanted.items():
            close(get_step_scores(score, args), value, score)
        logprob = get_step_function("probability")(args, logprob=True)
        size = get_step_function("top_p_size")(args, top_p=0.8)
    close(logprob, -wanted["crossentropy"])
    assert len(passes) == 1, passes
    p = logp.exp().sort(descending=True).values.cumsum(-1)
    assert size.tolist() == ((p < 0.8).sum(-1) + 1).tolist()


@pytest.mark.parametrize("lazy", [False, True], ids=["whole", "lazy"])
def test_gradients_reach_the_embeddings(lazy: bool) -> None:
    model = model_of("llama")
    embeds = model.get_input_embeddings()(TEXT[:, :S]).detach().requires_grad_()
    slopes: list[dict[str, Tensor]] = []
    for ours in (False, True):
        if ours and lazy:
            onepass.lazy_head(model)
        found = {}
        for score in SINGLE:
            output = model(inputs_embeds=embeds)
            if ours:
                args = step(model, forward_output=output, is_attributed_fn=True)
                value = get_step_scores(score, args)
            else:
                logits = output.logits[:, -1]
                value = singles(logits, logits.log_softmax(-1))[score]
            (found[score],) = torch.autograd.grad(value.sum(), embeds)
        slopes.append(found)
    for score, slope in slopes[0].items():
        size = float(slope.abs().max())
        torch.testing.assert_close(slopes[1][score], slope, rtol=1e-4, atol=1e-5 * size, msg=score)


def test_a_pass_is_shared_within_a_forward_only(passes: list[Any]) -> None:
    model = model_of("gpt2_tied")
    args = step(model)
    for score in SINGLE:
        get_step_scores(score, args)
    assert len(passes) == 1
    other = step(model, forward_output=args.forward_output, target_ids=OTHER[:, S])
    assert not get_step_scores("logit", other).equal(get_step_scores("logit", args))
    assert len(passes) == 3  # other tokens, and the first ones again
    TARGET.add_(1)  # written to: no longer the tokens that were scored
    changed = get_step_scores("logit", args)
    TARGET.sub_(1)
    close(changed, at(last_logp(model, TEXT[:, :S])[0], TARGET + 1))

    logits = args.forward_output.logits
    before = get_step_scores("entropy", args)
    logits.mul_(0.5)
    assert not get_step_scores("entropy", args).equal(before)

    n = len(passes)
    graph = step(model, forward_output=forward(model, TEXT[:, :S]))
    with torch.no_grad():
        assert not get_step_scores("probability", graph).requires_grad
    assert get_step_scores("probability", graph).requires_grad
    assert passes[n:] == [["entropy", "label_logit", "logp"], ["logp"]]
    for score in ("crossentropy", "entropy", "perplexity", "entropy"):
        assert get_step_scores(score, graph).requires_grad
    assert passes[n + 2 :] == [["entropy"]]  # differentiated, a fact has a pass of its own

    gone = weakref.ref(graph.forward_output)
    facts = weakref.ref(graph.forward_output.logits)
    del graph
    assert gone() is None and facts() is None  # nothing of a forward outlives it


def test_nothing_is_kept_in_inference_mode() -> None:
    """It counts no writes."""
    model = model_of("gpt2_tied")
    with torch.inference_mode():
        args, other = step(model), OTHER.clone()

        def found() -> list[Tensor]:
            extra = {"contrast_targets": other}
            return [get_step_scores("logit", args), get_step_scores("contrast_prob", args, extra)]

        before = found()
        args.forward_output.logits.mul_(0.5)
        other.copy_(TEXT.flip(0))
        assert not any(map(torch.equal, before, found()))


def test_outputs_of_any_kind_and_targets_of_any_shape() -> None:
    @dataclass(frozen=True)
    class Frozen:
        logits: Tensor

    z = torch.randn(1, 3, 11)
    for output in (SimpleNamespace(logits=z), Frozen(z)):
        for ids in (torch.tensor(4), torch.tensor([4]), torch.tensor([[4]])):
            args = StepFunctionDecoderOnlyArgs(None, output, ids)
            assert get_step_scores("logit", args).tolist() == [float(z[0, -1, 4])]
    with pytest.raises(ValueError, match=r"a token for each of the 1 rows.*got shape \(2,\)"):
        get_step_scores("logit", StepFunctionDecoderOnlyArgs(None, output, torch.tensor([4, 5])))


# ---------------------------------------------------------------- contrasts


class Words:
    """What step functions ask of inseq's AttributionModel, around a tiny model; its words are
    numbers."""

    def __init__(self, model: Any) -> None:
        self.model, self.formatter, self.n_runs = model, self, 0

    def encode(self, texts: Any, as_targets: bool = False, add_special_tokens: bool = True) -> Any:
        texts = [texts] if isinstance(texts, str) else texts
        ids = torch.tensor([[int(word) for word in text.split()] for text in texts])
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))

    def embed(self, ids: Tensor, as_targets: bool = False) -> Any:
        embeds: Tensor = self.model.get_input_embeddings()(ids)
        return embeds

    def convert_args_to_batch(self, args: Any) -> Any:
        return args

    def get_forward_output(self, batch: Any, use_embeddings: bool = True) -> Any:
        self.n_runs += 1
        if not use_embeddings:
            return self.model(batch.decoder_input_ids, attention_mask=batch.decoder_attention_mask)
        return self.model(
            inputs_embeds=batch.encoder_input_embeds,
            attention_mask=batch.encoder_attention_mask,
            decoder_inputs_embeds=batch.decoder_input_embeds,
            decoder_attention_mask=batch.decoder_attention_mask,
        )


def words(ids: Tensor) -> list[str]:
    return [" ".join(map(str, row)) for row in ids.tolist()]


@pytest.mark.parametrize("by_words", [False, True], ids=["ids", "words"])
@pytest.mark.parametrize("name", MODELS)
def test_contrasts_with_another_text(name: str, by_words: bool, passes: list[Any]) -> None:
    model = model_of(name)
    outer = Words(model) if by_words else model
    text: Any = words(OTHER) if by_words else OTHER
    args = step(model, outer)
    before = dict(vars(args))
    own, theirs = last_logp(model, TEXT[:, :S]), last_logp(model, OTHER[:, :S])
    n = len(passes)
    with torch.no_grad():
        for score, value in contrasts(own, theirs, OTHER[:, S]).items():
            close(get_step_scores(score, args, {"contrast_targets": text}), value, score)
        same = get_step_scores("pcxmi", args)
    assert vars(args) == before  # nothing of it was put elsewhere
    assert (same.abs() < 1e-6).all()
    assert len(passes) - n == 3  # one of each row; `same` runs the model on its own inputs
    if isinstance(outer, Words):
        assert outer.n_runs == 2


def test_contrasts_with_another_source() -> None:
    model = model_of("t5_encoder_decoder")
    own = last_logp(model, TEXT[:, :S])
    theirs = last_logp(model, TEXT[:, :S], OTHER_SOURCE)
    args = step(model, Words(model))
    for score, value in contrasts(own, theirs, TARGET).items():
        got = get_step_scores(score, args, {"contrast_sources": words(OTHER_SOURCE)})
        close(got, value, score)
    both = last_logp(model, OTHER[:, :S], OTHER_SOURCE)
    for score, value in contrasts(own, both, OTHER[:, S]).items():
        extra = {"contrast_sources": OTHER_SOURCE, "contrast_targets": OTHER}
        close(get_step_scores(score, args, extra), value, score)


def test_contrasts_at_aligned_positions() -> None:
    model = model_of("gpt2_tied")
    own, theirs = last_logp(model, TEXT[:, :S]), last_logp(model, OTHER[:, :2])
    pairs = [(1, 1), (S, 3), (S, 2)]
    for aligned in (pairs, [pairs, []]):
        extra: dict[str, Any] = {"contrast_targets": OTHER, "contrast_targets_alignments": aligned}
        for score, value in contrasts(own, theirs, OTHER[:, 2]).items():
            close(get_step_scores(score, step(model), extra), value, score)
    as_json: dict[str, Any] = {
        "contrast_targets": OTHER,
        "contrast_targets_alignments": [[1, 1], [S, 2]],
    }
    close(get_step_scores("contrast_prob", step(model), as_json), at(theirs[1], OTHER[:, 2]).exp())
    with pytest.raises(ValueError, match=r"must be pairs of positions, \[\(ours, theirs\)"):
        extra = {"contrast_targets": OTHER, "contrast_targets_alignments": [[1, 2, 3]]}
        get_step_scores("pcxmi", step(model), extra)
    with pytest.raises(ValueError, match="have no pair for position 4"):
        extra = {"contrast_targets": OTHER, "contrast_targets_alignments": [(1, 1)]}
        get_step_scores("pcxmi", step(model), extra)


def test_a_contrast_that_is_written_to_is_another() -> None:
    model = model_of("gpt2_tied")
    args, other = step(model), OTHER.clone()
    extra = {"contrast_targets": other}
    with torch.no_grad():
        first = get_step_scores("contrast_prob", args, extra)
        other.copy_(TEXT.flip(0))
        got = get_step_scores("contrast_prob", args, extra)
    assert not torch.equal(first, got)
    _, logp = last_logp(model, other[:, :S])
    close(got, at(logp, other[:, S]).exp())


@pytest.mark.parametrize("style", ["current", "legacy"])
def test_a_contrast_may_be_padded(style: str) -> None:
    model = model_of("gpt2_tied")
    mask = torch.ones_like(OTHER)
    mask[0, 0] = 0
    with torch.no_grad():
        own = model(input_ids=TEXT[:, :S]).logits[:, -1].double().softmax(-1)
        logits = [model(OTHER[:1, 1:S]).logits[:, -1], model(OTHER[1:, :S]).logits[:, -1]]
        other = torch.cat(logits).double().softmax(-1)
        wanted = at(own, TARGET) - at(other, OTHER[:, S])
        args = step(model)
        if style == "current":
            text: Any = SimpleNamespace(input_ids=OTHER, attention_mask=mask)
            got = get_step_scores("contrast_prob_diff", args, {"contrast_targets": text})
        else:
            text = {"contrast_ids": OTHER, "contrast_attention_mask": mask}
            got = legacy.contrast_prob_diff_fn(**vars(args), **text)
    close(got, wanted)
    plain = model(input_ids=OTHER[:, :S]).logits[:, -1].softmax(-1)
    assert not torch.allclose(at(plain, OTHER[:, S]).double(), at(other, OTHER[:, S]), rtol=1e-4)


def test_a_contrast_leaves_one_row_behind(passes: list[Any]) -> None:
    """Neither the logits of the whole prefix nor a cache of its keys and values."""
    model = model_of("llama")
    args = step(model)
    with torch.no_grad(), onepass.strict():
        get_step_scores("pcxmi", args, {"contrast_targets": OTHER})
    [(_, _, kept)] = args.forward_output._onepass_contrasts
    assert "past_key_values" not in vars(kept.output) and kept.output.logits.shape[:2] == (2, 1)
    assert isinstance(kept.output.logits, onepass.LazyLogits)
    args = step(model, Words(model))  # whose head gives whole logits
    with torch.no_grad():
        get_step_scores("pcxmi", args, {"contrast_targets": OTHER})
    [(_, _, kept)] = args.forward_output._onepass_contrasts
    assert kept.output.logits.untyped_storage().nbytes() == 4 * 2 * V


def test_filtered_divergence() -> None:
    model = model_of("gpt2_tied")
    (z, _), (q, _) = last_logp(model, TEXT[:, :S]), last_logp(model, OTHER[:, :S])
    extra = {"contrast_targets": OTHER, "top_k": 5}
    kept = (z + q).topk(5).indices
    a, b = z.gather(-1, kept).log_softmax(-1), q.gather(-1, kept).log_softmax(-1)
    close(get_step_scores("kl_divergence", step(model), extra), (a.exp() * (a - b)).sum(-1))


def test_a_differentiated_contrast_is_another_token_of_the_row() -> None:
    model = model_of("gpt2_tied")
    own = last_logp(model, TEXT[:, :S])
    own_prefix = torch.cat([TEXT[:, :S], OTHER[:, S:]], 1)
    output = forward(model, TEXT[:, :S])
    args = step(model, forward_output=output, is_attributed_fn=True)
    wanted = contrasts(own, own, OTHER[:, S])
    for score in CONTRASTS[:-1]:
        got = get_step_scores(score, args, {"contrast_targets": own_prefix})
        close(got, wanted[score], score)
        assert got.requires_grad
    with pytest.warns(UserWarning, match="contrast_force_inputs=True uses them"):
        got = get_step_scores("pcxmi", args, {"contrast_targets": OTHER})
    close(got, wanted["pcxmi"])
    theirs = last_logp(model, OTHER[:, :S])
    forced = {"contrast_targets": OTHER, "contrast_force_inputs": True}
    for score, value in contrasts(own, theirs, OTHER[:, S]).items():
        close(get_step_scores(score, args, forced), value, score)
    with pytest.raises(RuntimeError, match="pass contrast_force_inputs=True"):
        get_step_scores("kl_divergence", args, {"contrast_targets": OTHER})


REFUSED_CONTRASTS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "batch": ({"contrast_targets": OTHER[:1]}, ValueError, "as many texts as are scored, 2: got 1"),
    "short": ({"contrast_targets": OTHER[:, :S]}, IndexError, "end after 4 tokens.*position 4"),
    "source": ({"contrast_sources": SOURCE}, ValueError, "contrast_sources are for encoder"),
    "words": ({"contrast_targets": "5 9 33"}, ValueError, "pass token ids"),
    "floats": ({"contrast_targets": OTHER.float()}, ValueError, "contrast_targets must be token"),
    "beyond": ({"contrast_targets": OTHER + 97}, IndexError, r"contrast_targets\[0, 0\] is"),
    "ignored": ({"contrast_targets": OTHER * 0 - 100}, IndexError, r"contrast_targets\[0, 0\] is"),
    "pairs": (
        {"contrast_targets": OTHER, "contrast_targets_alignments": [1, 2]},
        ValueError,
        r"contrast_targets_alignments must be pairs of positions.*\[1, 2\]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_CONTRASTS)
def test_contrasts_that_cannot_be(case: str) -> None:
    extra, kind, message = REFUSED_CONTRASTS[case]
    with pytest.raises(kind, match=message):
        get_step_scores("contrast_prob", step(model_of("llama")), extra)


def test_a_target_that_does_not_count_scores_0() -> None:
    model = model_of("gpt2_tied", 0.2)
    targets = torch.stack([TARGET[0], torch.tensor(-100)])
    args = step(model, target_ids=targets)
    alone = step(model, forward_output=args.forward_output)
    for name in STEP_SCORES_MAP:
        extra: dict[str, Any] = {"contrast_targets": OTHER} if name in CONTRASTS else {}
        extra |= {"top_p": 0.5} if name == "top_p_size" else {}
        extra |= {"seed": 0} if name.startswith("mc_") else {}
        got, both = (get_step_scores(name, each, extra) for each in (args, alone))
        assert got[1] == 0 and got[0] == both[0], name
    for fn in (legacy.probability_fn, legacy.perplexity_fn):
        assert fn(**vars(args))[1] == 0


def test_more_that_cannot_be() -> None:
    model = model_of("t5_encoder_decoder")
    with pytest.raises(ValueError, match="contrast_sources must be as many texts"):
        get_step_scores("pcxmi", step(model), {"contrast_sources": SOURCE[:1]})
    z = SimpleNamespace(logits=torch.randn(2, S, V))
    alone = StepFunctionDecoderOnlyArgs(None, z, torch.tensor([1, 2]), TEXT[:, :S])
    with pytest.raises(ValueError, match="attribution_model is None"):
        get_step_scores("pcxmi", alone, {"contrast_targets": OTHER})
    for top in ({"top_p": 1.5}, {"top_k": V + 1}, {"top_k": -1}, {"min_tokens_to_keep": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(top))} must be between"):
            get_step_scores("kl_divergence", alone, top)
    for top_p in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"top_p must be between 0 and 1: got {top_p}"):
            get_step_scores("top_p_size", alone, {"top_p": top_p})


# ---------------------------------------------------------------- dropout


def drawn_like(model: Any, n: int, run: Callable[[], Any]) -> Tensor:
    """p of the targets [n, B] in that many runs in training mode, from where the generator is."""
    state = torch.get_rng_state()
    model.train()
    with torch.no_grad():
        probs = [at(run().logits[:, -1].double().softmax(-1), TARGET) for _ in range(n)]
    model.eval()
    torch.set_rng_state(state)
    return torch.stack(probs)


@pytest.mark.parametrize("name", MODELS)
def test_mc_dropout(name: str) -> None:
    model = model_of(name, 0.2)
    model.get_input_embeddings().train()  # each module has a mode of its own
    modes = [module.training for module in model.modules()]
    args = step(model)
    output = args.forward_output
    torch.manual_seed(11)
    noisy = drawn_like(model, 6, lambda: forward(model, TEXT[:, :S]))
    model.get_input_embeddings().train()
    p = last_logp(model, TEXT[:, :S])[1].exp()
    wanted = (at(p, TARGET) - noisy.mean(0)) / noisy.std(0)
    state = torch.get_rng_state()
    got = get_step_scores("mc_dropout_prob_avg", args, {"n_mcd_steps": 6})
    torch.testing.assert_close(got.double(), wanted, rtol=2e-3, atol=2e-3)
    assert torch.get_rng_state().equal(state)
    assert [module.training for module in model.modules()] == modes
    assert args.forward_output is output and not got.requires_grad
    assert get_step_scores("mc_dropout_prob_avg", args, {"n_mcd_steps": 6}).equal(got)

    fn = get_step_function("mc_dropout_prob_avg")
    seeded = fn(args, seed=3)
    torch.rand(5)
    assert fn(args, seed=3).equal(seeded) and not fn(args, seed=4).equal(seeded)
    assert torch.get_rng_state().ne(state).any()  # of the five numbers alone
    assert not fn(args, seed=3, logprob=True).equal(seeded)
    assert (fn(args, seed=3, eps=1e3).abs() < 1e-3).all()


def test_what_goes_wrong_in_a_noisy_run_leaves_no_trace() -> None:
    model = model_of("gpt2_tied", 0.2)
    args = step(model)
    state = torch.get_rng_state()

    def broken(*_: Any) -> None:
        torch.rand(3)
        raise KeyError("broken")

    handle = model.register_forward_pre_hook(broken)
    with pytest.raises(KeyError, match="broken"):
        get_step_scores("mc_dropout_prob_avg", args)
    handle.remove()
    assert not any(module.training for module in model.modules())
    assert torch.get_rng_state().equal(state)


def test_noisy_runs_are_differentiated_where_the_score_is() -> None:
    model = model_of("t5_encoder_decoder", 0.2)
    embed = model.get_input_embeddings()
    source = embed(SOURCE).detach().requires_grad_()
    text = embed(TEXT[:, :S]).detach()
    mask = torch.ones_like(SOURCE)

    def score(attributed: bool) -> Tensor:
        output = model(inputs_embeds=source, attention_mask=mask, decoder_inputs_embeds=text)
        args = StepFunctionEncoderDecoderArgs(
            *(model, output, TARGET, TEXT[:, :S], text, None, attributed, SOURCE, source, mask)
        )
        return get_step_scores("mc_dropout_prob_avg", args, {"seed": 5, "n_mcd_steps": 3})

    through_both, through_one = score(True), score(False)
    torch.testing.assert_close(through_both, through_one)
    slopes = [torch.autograd.grad(s.sum(), source)[0] for s in (through_both, through_one)]
    assert not torch.allclose(slopes[0], slopes[1], rtol=1e-2)

    model.double()
    source = source.detach().double().requires_grad_()
    text = text.double()
    (slope,) = torch.autograd.grad(score(True).sum(), source)
    with torch.no_grad():
        step_size = 1e-3  # T5 norms in fp32
        along = torch.randn(source.shape, dtype=torch.float64)
        found = []
        for sign in (1, -1):
            source += sign * step_size * along
            found.append(float(score(True).sum()))
            source -= sign * step_size * along
    rate = (found[0] - found[1]) / (2 * step_size)
    assert rate == pytest.approx(float((slope * along).sum()), rel=5e-3)


def test_dropout_that_is_not_there() -> None:
    args = step(model_of("gpt2_tied"))
    with pytest.raises(ValueError, match="no dropout in GPT2LMHeadModel"):
        get_step_scores("mc_dropout_prob_avg", args)
    dropping = step(model_of("gpt2_tied", 0.1))
    for n in (1, 0, -3):
        with pytest.raises(ValueError, match=f"n_mcd_steps must be 2 or more.*got {n}"):
            get_step_scores("mc_dropout_prob_avg", dropping, {"n_mcd_steps": n})
    with pytest.raises(TypeError, match="n_mcd_steps must be a whole number: got 2.5"):
        get_step_scores("mc_dropout_prob_avg", dropping, {"n_mcd_steps": 2.5})
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        get_step_scores("mc_dropout_prob_avg", dropping, {"eps": -1.0})
    dropping.attribution_model = None
    with pytest.raises(ValueError, match="runs the model again: attribution_model is NoneType"):
        get_step_scores("mc_dropout_prob_avg", dropping)


# ---------------------------------------------------------------- the style of inseq 0.4


@pytest.mark.parametrize("name", ["gpt2_tied", "t5_encoder_decoder"])
def test_legacy_functions_are_in_bits(name: str) -> None:
    model = model_of(name)
    given = dict(vars(step(model)))
    z, logp = last_logp(model, TEXT[:, :S])
    own = singles(z, logp)
    wanted = own | {
        "crossentropy": own["crossentropy"] / math.log(2),
        "perplexity": 1 / own["probability"],
    }
    for score, value in wanted.items():
        fn = getattr(legacy, f"{score}_fn")
        close(fn(**given), value, score)
        close(fn(given["attribution_model"], given["forward_output"], target_ids=TARGET), value)
    close(legacy.entropy_fn(None, given["forward_output"]), own["entropy"])

    theirs = last_logp(model, OTHER[:, :S])
    contrast = legacy.contrast_prob_diff_fn(
        **given, contrast_ids=OTHER, contrast_attention_mask=torch.ones_like(OTHER)
    )
    close(contrast, contrasts((z, logp), theirs, OTHER[:, S])["contrast_prob_diff"])
    embedding = dict(vars(step(model, Words(model)))) | {"decoder_input_embeds": None}
    again = legacy.contrast_prob_diff_fn(**embedding, contrast_ids=OTHER)
    torch.testing.assert_close(again, contrast)
    with pytest.raises(IndexError, match="contrast_ids end after 4 tokens"):
        legacy.contrast_prob_diff_fn(**given, contrast_ids=OTHER[:, :S])
    with pytest.raises(ValueError, match="contrast_ids must be as many texts"):
        legacy.contrast_prob_diff_fn(**given, contrast_ids=OTHER[:1])
    with pytest.raises(ValueError, match="contrast_prob_diff needs contrast_ids: got None"):
        legacy.contrast_prob_diff_fn(**given)


@pytest.mark.parametrize("name", ["gpt2_tied", "t5_encoder_decoder"])
def test_legacy_mc_dropout(name: str) -> None:
    model, aux = model_of(name), model_of(name, 0.2)
    given = dict(vars(step(model)))
    torch.manual_seed(4)
    noisy = drawn_like(aux, 10, lambda: forward(aux, TEXT[:, :S]))
    p = at(last_logp(model, TEXT[:, :S])[1].exp(), TARGET)
    state = torch.get_rng_state()
    got = legacy.mc_dropout_prob_avg_fn(**given, aux_model=aux)
    torch.testing.assert_close(
        got.double(), (p - noisy.mean(0)) / noisy.std(0), rtol=2e-3, atol=2e-3
    )
    assert torch.get_rng_state().equal(state)
    assert not any(module.training for module in aux.modules())


def test_legacy_refusals() -> None:
    model, aux = model_of("gpt2_tied"), model_of("gpt2_tied", 0.2)
    given = dict(vars(step(model)))
    mc = legacy.mc_dropout_prob_avg_fn
    with pytest.raises(ValueError, match="needs aux_model.*got NoneType"):
        mc(**given)
    with pytest.raises(ValueError, match="no dropout in GPT2LMHeadModel"):
        mc(**given, aux_model=model)
    with pytest.raises(ValueError, match="n_mcd_steps must be 2 or more"):
        mc(**given, aux_model=aux, n_mcd_steps=1)
    with pytest.raises(ValueError, match="category, decoder-only: got encoder-decoder"):
        mc(**given, aux_model=model_of("t5_encoder_decoder", 0.2))
    aux.config.vocab_size = 11
    with pytest.raises(ValueError, match="vocabulary, 97 tokens: got 11"):
        mc(**given, aux_model=aux)
    aux.config.vocab_size = 97
    aux.config.name_or_path = "another"
    with pytest.warns(UserWarning, match="aux_model is 'another'"):
        mc(**given, aux_model=aux, n_mcd_steps=2)


# ---------------------------------------------------------------- the registry


def test_the_registry_has_inseq_s_names() -> None:
    names = [
        *SINGLE,
        *("contrast_logits", "contrast_prob", "contrast_logits_diff", "contrast_prob_diff"),
        *("pcxmi", "kl_divergence", "in_context_pvi", "mc_dropout_prob_avg", "top_p_size"),
    ]
    assert steps.list_step_functions() == names
    for name in names:
        fn = get_step_function(name)
        assert fn is getattr(steps, f"{name}_fn") and fn.__doc__
        assert steps.is_contrastive_step_function(name) == (name in CONTRASTS)
        steps.check_is_step_function(name)
    assert set(steps.__all__) <= set(dir(steps))
    for name in steps.__all__:
        assert getattr(steps, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        getattr(steps, "no_such_name")  # noqa: B009 -- mypy knows there is none


def test_unknown_names_list_the_known(registry: None) -> None:
    steps.register_step_function(lambda args: args.target_ids, "mine")
    for ask in (
        get_step_function,
        steps.check_is_step_function,
        steps.is_contrastive_step_function,
    ):
        with pytest.raises(AttributeError, match="no step function 'entropi'.*entropy.*mine"):
            ask("entropi")
    with pytest.raises(AttributeError, match="no step function 'entropi'"):
        get_step_scores("entropi", None)


def test_register(registry: None, caplog: pytest.LogCaptureFixture) -> None:
    def margin_fn(args: Any, scale: float = 1.0) -> Tensor:
        top = steps.last_logits(args.forward_output).topk(2).values
        return scale * (top[:, 0] - top[:, 1])

    with pytest.raises(TypeError, match="identifier must be a string: got 3"):
        steps.register_step_function(margin_fn, 3)  # type: ignore[arg-type]
    steps.register_step_function(margin_fn, "margin", {"spans": "mean", "subwords": "max"})
    args = step(model_of("gpt2_tied"))
    assert get_step_scores("margin", args, {"scale": 2.0}).equal(2 * margin_fn(args))
    assert steps.AGGREGATE_MAP["spans"]["margin"] == "mean"
    assert steps.AGGREGATE_MAP["subwords"] == {"margin": "max"}
    assert steps.AGGREGATE_MAP["spans"]["entropy"] == "sum"
    assert steps.list_step_functions()[-1] == "margin"
    assert not steps.is_contrastive_step_function("margin")
    with pytest.raises(ValueError, match="'margin' is a step function: overwrite=True replaces it"):
        steps.register_step_function(steps.logit_fn, "margin")
    assert get_step_function("margin") is margin_fn
    with caplog.at_level(logging.WARNING, logger="onepass"):
        steps.register_step_function(steps.logit_fn, "margin", overwrite=True)
    assert get_step_function("margin") is steps.logit_fn and "replaced" in caplog.text
    with pytest.raises(TypeError, match="fn must be callable: got str"):
        steps.register_step_function("margin", "margin")  # type: ignore[arg-type]

    legacy.register_step_function(legacy.perplexity_fn, "perplexity")
    got, p = get_step_scores("perplexity", args), get_step_scores("probability", args)
    torch.testing.assert_close(got * p, torch.ones(2))
