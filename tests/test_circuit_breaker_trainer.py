"""`CircuitBreakerTrainer`: what it learns, logs, leaves alone, and goes on from."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from onepass.circuit_breaker import (
    CircuitBreakerDataset,
    CircuitBreakerTrainer,
    LoraArguments,
    LorraArguments,
    Rerouting,
    compute_loss,
    data_collator,
    lora_config,
    precompute,
    schedule,
)
from onepass.circuit_breaker.evaluate import cosines, nats_per_token
from support.after_evaluation import assert_forgets_evaluations
from support.tiny_language_model import BENIGN, HARMFUL, model, tokenizer

# PEFT asks transformers under a name that it has retired; the trainer warns where no GPU is.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning"),
]

STEPS = 12


def arguments(folder: Path, **options: Any) -> Any:
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=3, logging_steps=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **options})


def data(**options: Any) -> CircuitBreakerDataset:
    sides: dict[str, Any] = {"retain": BENIGN, "harmful": HARMFUL, "val": HARMFUL[:2]}
    return CircuitBreakerDataset(tokenizer(), **{**sides, **options})


def trainer(
    folder: Path, base: Any = None, dropout: float = 0.0, lorra: LorraArguments | None = None,
    dataset: Any = None, reference: Any = "adapter_off", **options: Any,
) -> CircuitBreakerTrainer:  # fmt: skip
    base = model() if base is None else base
    lorra = lorra or LorraArguments(lorra_alpha=10.0)
    torch.manual_seed(5)  # of lora_A
    return CircuitBreakerTrainer(
        base,
        arguments(folder, **options),
        train_dataset=data() if dataset is None else dataset,
        lorra_args=lorra,
        reference=reference,
        peft_config=lora_config(base, LoraArguments(lora_r=4, lora_dropout=dropout), lorra),
    )


def adapter(of: CircuitBreakerTrainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in of.model.named_parameters() if "lora_" in k}


def logged(of: CircuitBreakerTrainer) -> list[dict[str, float]]:
    return [line for line in of.state.log_history if "circuit_breaker/cb_coeff" in line]


def test_training_turns_harmful_text_and_leaves_the_model_below_as_it_was(tmp_path: Path) -> None:
    base = model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    ours = trainer(tmp_path, base, max_steps=40, logging_steps=1)
    ours.train()
    first, *_, last = logged(ours)
    assert first["circuit_breaker/cb_cosine"] > 0.9 > 0.5 > last["circuit_breaker/cb_cosine"]
    assert last["circuit_breaker/retain_cosine"] > 0.8
    wrapped = ours.model
    for name, value in before.items():  # PEFT puts base_layer into the names
        where = dict(wrapped.get_base_model().state_dict())
        found = where.get(name)
        if found is None:
            found = where[name.replace(".weight", ".base_layer.weight")]
        assert torch.equal(found, value), name
    ids = torch.arange(4, 24)[None]
    untouched = model()
    with torch.no_grad(), wrapped.disable_adapter():
        assert torch.equal(
            wrapped.eval()(input_ids=ids).logits, untouched.eval()(input_ids=ids).logits
        )


def test_each_log_has_the_coefficients_losses_cosines_and_norms(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.train()
    lines = logged(ours)
    assert [line["step"] for line in lines] == [4, 8, 12]
    for line in lines:
        facts = {name.removeprefix("circuit_breaker/") for name in line if "/" in name}
        assert facts == {
            *("retain_coeff", "cb_coeff", "retain_loss", "cb_loss"),
            *(f"{part}_{fact}" for part in ("retain", "cb", "val")
              for fact in ("cosine", "norm", "reference_norm")),
        }  # fmt: skip
        coefficients = schedule(int(line["step"]), STEPS, 10.0)
        assert line["circuit_breaker/retain_coeff"] == pytest.approx(coefficients[0])
        assert line["circuit_breaker/cb_coeff"] == pytest.approx(coefficients[1])
    assert lines[-1]["circuit_breaker/cb_coeff"] == pytest.approx(5.0)  # progress 1/2 at the end


def test_monitoring_does_not_change_the_training(tmp_path: Path) -> None:
    often = trainer(tmp_path / "a", dropout=0.1, logging_steps=1)
    never = trainer(tmp_path / "b", dropout=0.1, logging_steps=1000, dataset=data(val=None))
    for each in (often, never):
        torch.manual_seed(0)
        each.train()
    for name, value in adapter(often).items():
        assert torch.equal(value, adapter(never)[name]), name


def test_accumulated_batches_count_as_one_step_and_one_loss(tmp_path: Path) -> None:
    """The schedule counts optimizer steps, and the loss of 2 x 3 examples is near that of 6."""
    whole = trainer(tmp_path / "a", per_device_train_batch_size=6, max_steps=4, logging_steps=1)
    parts = trainer(
        tmp_path / "b", per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4,
        logging_steps=1,
    )  # fmt: skip
    for each in (whole, parts):
        each.train()
    for one, other in zip(logged(whole), logged(parts), strict=True):
        assert one["circuit_breaker/cb_coeff"] == other["circuit_breaker/cb_coeff"]
        assert other["loss"] == pytest.approx(one["loss"], rel=0.05)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.3)


@pytest.mark.parametrize("kind", ["frozen_copy", "precomputed"])
def test_another_reference_trains_to_the_same_adapter(tmp_path: Path, kind: str) -> None:
    off = trainer(tmp_path / "off")
    off.train()
    base = model()
    dataset: Any = data()
    if kind == "frozen_copy":
        other = trainer(tmp_path / "other", base, reference=copy.deepcopy(base))
    else:
        calls: list[int] = []
        layers = LorraArguments().layers_of(4)
        stored = precompute(
            base, dataset, Rerouting(layers, reference=base), tmp_path / "states",
            after_item=lambda: calls.append(1),
        )  # fmt: skip
        assert len(calls) == len(stored) == len(dataset) and stored.bytes_each() > 0
        other = trainer(tmp_path / "other", base, dataset=stored, reference="precomputed")
    other.train()
    for one, two in zip(logged(off), logged(other), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
    gaps = [(v - adapter(other)[n]).abs().max() for n, v in adapter(off).items()]
    assert float(max(gaps)) < 1e-3


def test_precomputed_states_are_made_once_and_those_of_other_layers_are_refused(
    tmp_path: Path,
) -> None:
    base = model()
    dataset = data()
    options = Rerouting((2,), reference=base)
    precompute(base, dataset, options, tmp_path)
    made = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    (tmp_path / "1.safetensors").unlink()
    precompute(base, dataset, options, tmp_path)
    again = {file.name: file.stat().st_mtime_ns for file in tmp_path.glob("*.safetensors")}
    assert again.keys() == made.keys()
    assert [name for name in made if made[name] != again[name]] == ["1.safetensors"]
    with pytest.raises(ValueError, match="holds other hidden states"):
        precompute(base, dataset, Rerouting((3,), reference=base), tmp_path)


def test_a_resumed_training_is_bit_equal(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "a", dropout=0.1, save_strategy="steps", save_steps=4)
    whole.train()
    other = trainer(tmp_path / "b", dropout=0.1)
    other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    for name, value in adapter(whole).items():
        assert torch.equal(value, adapter(other)[name]), name
    assert [line["loss"] for line in logged(whole)] == [line["loss"] for line in logged(other)]


def test_evaluation_gives_a_loss_and_leaves_no_trace(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.train()
    before, noted = adapter(ours), {k: list(v) for k, v in ours._noted.items()}
    found = ours.evaluate(eval_dataset=data())
    assert 0 < found["eval_loss"] < 100
    assert {k: list(v) for k, v in ours._noted.items()} == noted
    assert all(torch.equal(v, adapter(ours)[n]) for n, v in before.items())


def test_the_adapter_loads_with_plain_peft(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.train()
    ours.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    names = {file.name for file in (tmp_path / "adapter").iterdir()} - {"training_args.bin"}
    assert not [name for name in names if name.endswith((".pt", ".bin", ".pkl"))], names
    loaded = peft.PeftModel.from_pretrained(model(), str(tmp_path / "adapter")).eval()
    ids = torch.arange(4, 24)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, ours.model.eval()(input_ids=ids).logits)


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a")
    saving = trainer(
        tmp_path / "b", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    plain.train()
    saving.train()
    for one, two in zip(logged(plain), logged(saving), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    ours = trainer(tmp_path, bf16=True)
    ours.train()
    assert logged(ours)[-1]["loss"] < logged(ours)[0]["loss"]
    assert all(v.dtype == torch.float32 for v in adapter(ours).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_config": None}, "needs a PEFT adapter"),
        ({"lorra_args": LorraArguments(target_layers="9")}, r"from 0 to 4 \(4 blocks"),
        ({"lorra_args": LorraArguments(target_layers="x")}, "whole numbers"),
        ({"reference": "off"}, "adapter_off, precomputed"),
        ({"lorra_args": LorraArguments(relu_scope="row")}, "token, total"),
        (
            {"peft_config": peft.LoraConfig(target_modules=["q_proj"], bias="all")},
            "biases that stay on",
        ),
        (
            {
                "peft_config": peft.LoraConfig(
                    target_modules=["q_proj"], modules_to_save=["lm_head"]
                )
            },
            "head is among what the adapter trains",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = model()
    lorra = LorraArguments()
    settings: dict[str, Any] = {
        "train_dataset": data(),
        "lorra_args": lorra,
        "peft_config": lora_config(base, LoraArguments(), lorra),
    }
    with pytest.raises(ValueError, match=message):
        CircuitBreakerTrainer(base, arguments(tmp_path), **{**settings, **change})


def test_jitter_is_seeded_and_can_be_left_out(tmp_path: Path) -> None:
    def start(jitter: float, seed: int = 0) -> dict[str, Tensor]:
        lorra = LorraArguments(init_jitter=jitter)
        return {
            k: v
            for k, v in adapter(trainer(tmp_path, lorra=lorra, seed=seed)).items()
            if "lora_B" in k
        }

    assert all(not v.any() for v in start(0.0).values())
    one, same, other = start(1e-4), start(1e-4), start(1e-4, seed=1)
    assert all(torch.equal(v, same[k]) for k, v in one.items())
    assert any(not torch.equal(v, other[k]) for k, v in one.items())
    assert all(0 < float(v.abs().max()) < 1e-3 for v in one.values())


def test_measurement_is_that_of_plain_torch(tmp_path: Path) -> None:
    from onepass.circuit_breaker.data import tokens_of
    from onepass.circuit_breaker.examples import Example

    ours = trainer(tmp_path)
    ours.train()
    tokens = tokens_of(tokenizer(), [Example("", text) for text in BENIGN + HARMFUL], 64)
    wrapped = ours.model.eval()
    with torch.no_grad():
        logits = wrapped(input_ids=tokens[0], attention_mask=tokens[1]).logits[:, :-1]
        labels = torch.where(tokens[1][:, 1:] != 0, tokens[0][:, 1:], -100)
        want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    assert nats_per_token(wrapped, tokens, 5) == pytest.approx(want.item(), rel=1e-5)
    assert nats_per_token(wrapped, tokens, 5, adapter=False) != pytest.approx(want.item(), rel=1e-5)
    found = cosines(wrapped, tokens, tokens, Rerouting((2, 3)), 5)
    assert found == cosines(wrapped, tokens, tokens, Rerouting((2, 3)), 5)
    with torch.no_grad(), wrapped.disable_adapter():
        before = wrapped(input_ids=tokens[0], attention_mask=tokens[1], output_hidden_states=True)
    with torch.no_grad():
        now = wrapped(input_ids=tokens[0], attention_mask=tokens[1], output_hidden_states=True)
    pairs = [(now.hidden_states[layer], before.hidden_states[layer]) for layer in (2, 3)]
    kept = tokens[1].bool()
    each = [torch.cosine_similarity(a, b, dim=-1)[kept].mean() for a, b in pairs]
    assert found["harmful"] == pytest.approx(torch.stack(each).mean().item(), abs=1e-5)


def test_the_state_of_a_training_is_json(tmp_path: Path) -> None:
    ours = trainer(tmp_path, save_strategy="steps", save_steps=STEPS)
    ours.train()
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["log_history"][-1]["circuit_breaker/cb_cosine"] < 1


def test_the_published_function_and_a_schedule_of_ones_own_work_in_a_subclass(
    tmp_path: Path,
) -> None:
    class Ours(CircuitBreakerTrainer):
        def get_training_progress(self) -> float:
            return 1.0

    base = model()
    lorra = LorraArguments(lorra_alpha=10.0)
    ours = Ours(
        base, arguments(tmp_path), train_dataset=data(), lorra_args=lorra,
        peft_config=lora_config(base, LoraArguments(lora_r=4), lorra),
    )  # fmt: skip
    assert ours.coefficients() == (10.0, 0.0)
    batch = data_collator([data()[0], data()[1]])
    before = ours.current_training_step
    loss = compute_loss(ours, ours.model, batch, [2, 3], 10.0)
    assert isinstance(loss, Tensor) and ours.current_training_step == before + 1


def test_ddp_is_put_on_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_forgets_evaluations(trainer(tmp_path), monkeypatch)
