"""lazy_head under what trains and evaluates models: transformers.Trainer, generate, torch.compile
and gradient checkpointing, each against the same without."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import onepass
from onepass import LazyLogits, MaterializedWarning

pytest.importorskip("transformers", reason="the models are those of transformers")
pytest.importorskip("accelerate", reason="transformers.Trainer needs it")

import transformers as hf

from support.tiny_models import V, assert_same_step, batch_of, step, tiny

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

ROWS = torch.Generator().manual_seed(5)
DATA = [
    {"input_ids": ids, "labels": torch.where(torch.arange(9) < cut, -100, ids)}
    for ids, cut in zip(
        torch.randint(3, V - 1, (12, 9), generator=ROWS), [0, 3, 5, 1] * 3, strict=True
    )
]


def trainer(model: Any, folder: Path, device: str, **options: Any) -> Any:
    own = {k: options.pop(k) for k in list(options) if k in OF_TRAINER}
    arguments = hf.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        max_steps=3,
        learning_rate=1e-2,
        report_to="none",
        save_strategy="no",
        use_cpu=device == "cpu",
        logging_steps=1,
        disable_tqdm=True,
        **options,
    )
    return hf.Trainer(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:8], **own)


OF_TRAINER = ("compute_metrics", "preprocess_logits_for_metrics", "compute_loss_func")
TRAINED: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "bf16": {"bf16": True, "gradient_accumulation_steps": 2},
    "label_smoothing": {"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2},
    "label_smoothing_bf16": {"label_smoothing_factor": 0.1, "bf16": True},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.parametrize("how", TRAINED)
def test_trainer_takes_the_same_steps(how: str, tmp_path: Path, device: str) -> None:
    # Liger-Kernel#1082: the loss was right and grad_norm 100 times off
    family = "qwen2_tied" if how == "accumulation" else "llama"

    def trained(lazy: bool) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        model = tiny(family, device)
        run = trainer(onepass.lazy_head(model) if lazy else model, tmp_path, device, **TRAINED[how])
        with onepass.strict(lazy):
            run.train()
        return run.state.log_history, {n: p.detach() for n, p in model.named_parameters()}

    (logs, weights), (wanted_logs, wanted) = trained(True), trained(False)
    rough = how.endswith("bf16")
    for key in ("loss", "grad_norm"):
        got = [entry[key] for entry in logs if key in entry]
        expected = [entry[key] for entry in wanted_logs if key in entry]
        assert len(got) == 3
        # a tenth of a thousandth is what transformers rounds a logged loss to
        np.testing.assert_allclose(got, expected, rtol=2e-2 if rough else 1e-4, atol=1e-4)
    if not rough:  # AdamW's first steps are signs: one that is in doubt moves a weight by lr
        for name, value in wanted.items():
            apart = (weights[name] - value).abs()
            assert float((apart > 1e-4).float().mean()) < 0.01, name


def accuracy(given: Any, compute_result: bool = True) -> dict[str, float]:
    """Of arrays, or of tensors batch by batch; of logits, or of their argmax."""
    ids, labels = given.predictions, given.label_ids
    if ids.ndim == 3:
        assert ids.shape[-1] == V
        ids = ids.argmax(-1)
    right = (ids[:, :-1] == labels[:, 1:])[labels[:, 1:] != -100]
    return {"accuracy": float(right.sum() / right.shape[0]), "ids": float(ids.sum())}


EVALUATED: dict[str, dict[str, Any]] = {
    "loss_only": {},
    "metrics": {"compute_metrics": accuracy},
    "metrics_of_argmax": {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    },
    "batched_metrics": {"compute_metrics": accuracy, "batch_eval_metrics": True},
    "bf16": {"compute_metrics": accuracy, "bf16": True},
    "bf16_full": {"compute_metrics": accuracy, "bf16_full_eval": True},
    "smoothed": {"compute_metrics": accuracy, "label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("how", EVALUATED)
def test_trainer_evaluates_the_same(how: str, tmp_path: Path, device: str) -> None:
    # unsloth#3126, #1548: compute_metrics got logits that were empty
    def evaluated(lazy: bool) -> dict[str, float]:
        model = tiny("llama", device)
        model = onepass.lazy_head(model) if lazy else model
        run = trainer(model, tmp_path, device, **EVALUATED[how])
        nothing_made = lazy and how in ("loss_only", "metrics_of_argmax", "batched_metrics")
        with onepass.strict(nothing_made), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", MaterializedWarning)
            found: dict[str, float] = run.evaluate()
        of_ours = [str(w.message) for w in said if w.category is MaterializedWarning]
        assert len(of_ours) == len(set(of_ours)) <= 3, of_ours
        return {k: v for k, v in found.items() if k.split("_")[-1] in ("loss", "accuracy", "ids")}

    got, wanted = evaluated(True), evaluated(False)
    assert got.keys() == wanted.keys() and "eval_loss" in got
    rough = how.startswith("bf16")
    assert ("eval_ids" in got) == (how != "loss_only")
    for key, value in wanted.items():
        rel = 2e-2 if rough else 1e-5  # in bfloat16 two largest logits may be one
        assert got[key] == pytest.approx(value, rel=rel, abs=0.05 * rough), key


def test_trainer_predicts_the_logits(tmp_path: Path, device: str) -> None:
    def predicted(lazy: bool) -> Any:
        model = tiny("gemma2_softcap", device)
        run = trainer(onepass.lazy_head(model) if lazy else model, tmp_path, device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MaterializedWarning)
            return run.predict(DATA[:8])

    got, wanted = predicted(True), predicted(False)
    assert isinstance(got.predictions, np.ndarray)
    np.testing.assert_allclose(got.predictions, wanted.predictions, rtol=1e-4, atol=1e-5)


def test_trainer_with_a_loss_function_of_ones_own(tmp_path: Path, device: str) -> None:
    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1]
        return onepass.masked_cross_entropy(logits, labels[:, 1:], num_items=num_items_in_batch)

    def trained(lazy: bool) -> list[float]:
        model = tiny("llama", device)
        run = trainer(
            onepass.lazy_head(model) if lazy else model, tmp_path, device, compute_loss_func=loss
        )
        with onepass.strict(lazy):
            run.train()
        return [entry["loss"] for entry in run.state.log_history if "loss" in entry]

    np.testing.assert_allclose(trained(True), trained(False), rtol=1e-4, atol=1e-4)


GENERATED: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sample": {"do_sample": True, "top_k": 10, "temperature": 0.8, "top_p": 0.9},
    "beams": {"num_beams": 3, "do_sample": False},
    "scores": {"do_sample": False, "output_scores": True, "return_dict_in_generate": True},
    "processors": {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "without_cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize(
    ("how", "family"), [*((how, "llama") for how in GENERATED), ("greedy", "t5_encoder_decoder")]
)
def test_generates_the_same_tokens(how: str, family: str, device: str) -> None:
    model, ids = tiny(family, device).eval(), batch_of("llama", device)["input_ids"][:, :5]

    def tokens() -> Tensor:
        torch.manual_seed(3)
        mask = torch.ones_like(ids)
        found = model.generate(ids, attention_mask=mask, max_new_tokens=6, **GENERATED[how])
        sequences: Tensor = found.sequences if how == "scores" else found
        return sequences

    wanted = tokens()
    onepass.lazy_head(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert torch.equal(tokens(), wanted)
    of_ours = [str(w.message) for w in said if w.category is MaterializedWarning]
    # once for a place, however many steps there are
    assert len(of_ours) == len(set(of_ours)) <= 3, of_ours
    if how in ("greedy", "without_cache"):
        assert not of_ours
        with onepass.strict():
            tokens()


@pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])
@pytest.mark.parametrize("family", ["llama", "qwen2_tied"])
def test_gradient_checkpointing(family: str, reentrant: bool, device: str) -> None:
    model, batch = tiny(family, device), batch_of(family, device)
    wanted = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    onepass.lazy_head(model)
    with onepass.strict():
        assert_same_step(step(model, batch, use_cache=False), wanted)


def test_the_whole_model_checkpointed(device: str) -> None:
    from torch.utils.checkpoint import checkpoint

    model, batch = onepass.lazy_head(tiny("llama", device)), batch_of("llama", device)
    wanted = step(model, batch)

    def logits(ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    model.zero_grad()
    with onepass.strict():
        lazy = checkpoint(logits, batch["input_ids"], use_reentrant=False)
        assert isinstance(lazy, LazyLogits)
        loss = torch.nn.functional.cross_entropy(
            lazy[:, :-1].reshape(-1, V), batch["labels"][:, 1:].reshape(-1)
        )
        loss.backward()
    torch.testing.assert_close(loss, wanted[0].loss)
    torch.testing.assert_close(model.lm_head.weight.grad, wanted[1]["lm_head.weight"])


def small(device: str) -> Any:
    """With a softcap and one layer: compiling is most of the time."""
    model = tiny("gemma2_softcap", device)
    model.model.layers = model.model.layers[:1]
    return model


@pytest.fixture
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# The compiler's front end is what meets the head; the rest of it is run once.
COMPILED = [("before", "aot_eager"), ("after_running", "eager")]


@pytest.mark.filterwarnings("ignore::UserWarning")  # the compiler's own, of a graph break
@pytest.mark.parametrize(("when", "backend"), COMPILED)
def test_compiled(when: str, backend: str, device: str, fresh_compiler: Any) -> None:
    model, batch = small(device), batch_of("gemma2_softcap", device)
    ids, labels = batch["input_ids"], batch["labels"]
    wanted = step(model, batch)
    if when == "before":
        onepass.lazy_head(model)
    compiled: Any = torch.compile(model, backend=backend)
    if when == "after_running":
        assert type(compiled(**batch).logits) is Tensor
    if when != "before":
        onepass.lazy_head(compiled)
    assert onepass.report(compiled).fused
    for _ in range(2):
        model.zero_grad()
        with onepass.strict():
            out = compiled(**batch)
            out.loss.backward()
        assert isinstance(out.logits, LazyLogits)
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        assert_same_step((out, grads), wanted, rtol=1e-5)
    # a loss outside, in eager
    model.zero_grad()
    with onepass.strict():
        logits = compiled(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, V), labels[:, 1:].reshape(-1)
        )
        loss.backward()
    torch.testing.assert_close(loss, wanted[0].loss)
    onepass.unlazy_head(compiled)
    assert type(compiled(**batch).logits) is Tensor


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_compiled_loss_of_lazy_logits(device: str, fresh_compiler: Any) -> None:
    model, batch = onepass.lazy_head(small(device)), batch_of("llama", device)
    wanted = step(model, batch)

    @torch.compile(backend="eager")
    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        logits = model(input_ids=ids).logits
        rows = logits[:, :-1].reshape(-1, V)
        return torch.nn.functional.cross_entropy(rows, labels[:, 1:].reshape(-1)) * 2

    model.zero_grad()
    with onepass.strict():
        loss = loss_of(batch["input_ids"], batch["labels"])
        loss.backward()
    torch.testing.assert_close(loss, 2 * wanted[0].loss)
    torch.testing.assert_close(
        model.lm_head.weight.grad, 2 * wanted[1]["model.embed_tokens.weight"], rtol=1e-5, atol=1e-7
    )
