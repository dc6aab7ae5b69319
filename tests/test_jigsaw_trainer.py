"""`JigsawTrainer`: what it learns, logs, leaves alone, and goes on from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from onepass import LazyLogits, strict
from onepass.demo import train
from onepass.jigsaw.arguments import JigsawArguments
from onepass.jigsaw.attack import NearestEmbedding
from onepass.jigsaw.cloak import TransformerCloak
from onepass.jigsaw.evaluate import attacks_on, facts_of, measure
from onepass.jigsaw.trainer import JigsawTrainer, lora_config
from onepass.training.flags import LoraFlags
from support.after_evaluation import assert_forgets_evaluations
from support.tiny_jigsaw import moved
from support.tiny_language_model import BENIGN, HARMFUL, tokenizer
from support.tiny_models import SIZES

# PEFT asks transformers under a name that it has retired; the trainer warns where no GPU is.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning"),
]

STEPS = 6
NAMES = ("input_ids", "attention_mask", "noise_mask", "loss_mask")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small a second thread costs a multiple where the cores are busy."""
    with train.one_thread():
        yield


def model(n_layers: int = 2) -> Any:
    """With weights large enough to tell tokens apart: by transformers' own every KL is near 0."""
    sizes = SIZES | {"vocab_size": 260, "num_hidden_layers": n_layers, "initializer_range": 0.3}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([item[name] for item in items]) for name in NAMES}


def data() -> list[dict[str, Tensor]]:
    """Right-padded rows of 24; the first token is never transformed, the last two never counted."""
    items = []
    for text in BENIGN + HARMFUL:
        ids = tokenizer()(text)["input_ids"][:24]
        row = torch.tensor(ids + [0] * (24 - len(ids)))
        mask = (torch.arange(24) < len(ids)).long()
        noised, counted = mask.clone(), mask.clone()
        noised[0], counted[len(ids) - 2 :] = 0, 0
        items.append(dict(zip(NAMES, (row, mask, noised, counted), strict=True)))
    return items


def arguments(folder: Path, **options: Any) -> Any:
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, lr_scheduler_type="constant",
        per_device_train_batch_size=4, logging_steps=2, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.TrainingArguments(**{**settings, **options})


def trainer(
    folder: Path, base: Any = None, jigsaw: JigsawArguments | None = None, dropout: float = 0.0,
    rank: int = 8, evaluates: bool = False, **options: Any,
) -> JigsawTrainer:  # fmt: skip
    base = model() if base is None else base
    jigsaw = jigsaw or JigsawArguments()
    lora = LoraFlags(lora_r=rank, lora_alpha=rank, lora_dropout=dropout)
    return JigsawTrainer(
        base,
        arguments(folder, **options),
        collate,
        data(),
        eval_dataset=data()[:5] if evaluates else None,
        jigsaw_args=jigsaw,
        peft_config=lora_config(base, lora, jigsaw),
    )


def trained(of: JigsawTrainer) -> dict[str, Tensor]:
    """What the optimizer moves: adapter and transform."""
    return {k: v.detach().clone() for k, v in of.pair.named_parameters() if v.requires_grad}


def logged(of: JigsawTrainer) -> list[dict[str, float]]:
    return [line for line in of.state.log_history if "jigsaw/std" in line]


def equal(one: JigsawTrainer, other: JigsawTrainer) -> None:
    found = trained(other)
    for name, value in trained(one).items():
        assert torch.equal(value, found[name]), name


def test_only_the_student_learns_the_transform_and_the_base_stays_as_it_was(tmp_path: Path) -> None:
    """On random weights, which have little to agree on; the command's test has a trained model."""
    base = model()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    untouched = model().eval()
    ours = trainer(
        tmp_path, base, JigsawArguments(sgt_learning_rate=2e-2), rank=32, max_steps=150,
        learning_rate=1e-2, lr_scheduler_type="cosine", per_device_train_batch_size=12,
    )  # fmt: skip
    attacks = attacks_on(base, ours.pair.cloak)
    batches = [collate(data())]
    start = measure(ours.pair, batches, attacks)
    assert start["recovery_l2"] == start["recovery_cosine"] == 1 and start["abs_cosine"] > 0.99
    ours.train()
    found = measure(ours.pair, batches, attacks)
    assert found["kl_protection"] >= 10 * found["kl_performance"], found
    assert found["kl_guardrails"] >= 10 * found["kl_performance"], found
    assert found["abs_cosine"] < 0.6 and found["recovery_l2"] < 0.2, found
    assert found["agreement"] > 0.7, found
    after = dict(base.state_dict())  # PEFT puts base_layer into the names
    for name, value in before.items():
        where = name if name in after else name.replace(".weight", ".base_layer.weight")
        assert torch.equal(after[where], value), name
    ids = torch.arange(4, 24)[None]
    with torch.no_grad(), ours.pair.base.disable_adapter():
        logits = ours.pair.base.eval()(input_ids=ids).logits.materialize()
        assert torch.equal(logits, untouched(input_ids=ids).logits)


def test_the_loss_is_that_of_plain_torch(tmp_path: Path) -> None:
    jigsaw = JigsawArguments(cap_guardrails=False, distillation_layer_index=0,
                             jigsaw_l2_performance_loss_weight=0.5,
                             jigsaw_l2_protection_loss_weight=0.25)  # fmt: skip
    ours = trainer(tmp_path, jigsaw=jigsaw)
    ours.train()
    kept: dict[str, Any] = {}
    for name in ("teacher", "student"):
        getattr(ours.pair, name).register_forward_hook(
            lambda _, __, output, name=name: kept.update({name: output})
        )
    batch = collate(data()[:4])
    ours.pair.eval()
    with torch.no_grad(), strict():
        loss = ours.pair(**batch)["loss"]
    teacher, student = kept["teacher"], kept["student"]
    assert isinstance(teacher.logits, LazyLogits) and isinstance(student.logits, LazyLogits)
    clean, noisy, x, y = (
        *teacher.logits.materialize().chunk(2),
        teacher.clean_input_embeddings,
        teacher.noisy_input_embeddings,
    )
    student_clean, student_noisy = student.logits.materialize().chunk(2)
    attended, noised, counted = (batch[n].bool() for n in NAMES[1:])
    counted = counted & attended

    def cross_entropy(logits: Tensor, mask: Tensor) -> Tensor:
        return -(clean.softmax(-1) * logits.log_softmax(-1)).sum(-1)[mask].mean()

    def l2(states: Tensor) -> Tensor:
        target = teacher.embeddings[:4]
        return ((states - target).norm(dim=-1) / target.norm(dim=-1))[counted].mean()

    means, stds = teacher.means, teacher.stds
    both = (noised[:2] & noised[2:])[..., None].expand_as(x[:2])
    information = 0.5 * (
        (stds[2:] / stds[:2]).square().log() + ((y[:2] - x[2:] - means[2:]) / stds[2:]) ** 2 - 1
    )
    norm = model().get_input_embeddings().weight.norm(dim=-1).median()
    want = (
        4.0 * F.cosine_similarity(x, y, dim=-1).abs()[noised].mean()
        + 2.5 * cross_entropy(student_noisy, attended)
        - 1.0 * 4.0 * torch.sigmoid(cross_entropy(noisy, counted))
        - 2.0 * cross_entropy(student_clean, counted)
        + 0.0001 * information[both].mean()
        + 0.1 * ((x + means).norm(dim=-1) - norm).abs()[noised].mean()
        + 0.5 * l2(student.embeddings[4:])
        - 0.25 * l2(teacher.embeddings[4:])
    )
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)


def test_each_log_has_the_components_and_the_distances(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.train()
    lines = logged(ours)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        facts = {name.removeprefix("jigsaw/") for name in line if "/" in name}
        assert facts == {
            *("ce_performance_loss", "ce_protection_loss", "median_norm_penalty"),
            *("clean_embeddings_guardrails_loss", "absolute_cosine_similarity_penalty"),
            *("mutual_information_loss", "kl_performance", "kl_protection", "kl_guardrails"),
            *("agreement", "agreement_after", "abs_cosine", "std"),
        }
        assert line["jigsaw/kl_performance"] < line["jigsaw/ce_performance_loss"]
        assert -4 < line["jigsaw/ce_protection_loss"] < -2  # the cap
        assert 0 <= line["jigsaw/agreement"] <= 1


def test_a_term_of_weight_0_is_neither_computed_nor_logged(tmp_path: Path) -> None:
    ours = trainer(tmp_path, jigsaw=JigsawArguments(mutual_information_loss_weight=0.0))
    ours.train()
    assert "jigsaw/mutual_information_loss" not in logged(ours)[0]


def test_monitoring_does_not_change_the_training(tmp_path: Path) -> None:
    often = trainer(tmp_path / "a", dropout=0.1, logging_steps=1)
    never = trainer(tmp_path / "b", dropout=0.1, logging_steps=1000)
    for each in (often, never):
        torch.manual_seed(0)
        each.train()
    equal(often, never)


def test_accumulated_batches_count_as_one_step_and_one_loss(tmp_path: Path) -> None:
    """Of a loss that is a mean over rows of one length: no cap, and hardly any noise. Away from the
    start, where the gradient is the noise's."""
    rows = [item for item in data() if item["attention_mask"].all()][:4]
    assert len(rows) == 4
    jigsaw = JigsawArguments(
        jigsaw_ce_protection_max_loss=None, cap_guardrails=False, mutual_information_loss_weight=0.0
    )
    losses = []
    for name, batch_size, n_batches in (("a", 4, 1), ("b", 2, 2)):
        base = model()
        torch.manual_seed(0)
        ours = JigsawTrainer(
            base,
            arguments(
                tmp_path / name,
                per_device_train_batch_size=batch_size,
                gradient_accumulation_steps=n_batches,
                max_steps=3,
                logging_steps=1,
                learning_rate=1e-3,
            ),
            collate,
            rows,
            jigsaw_args=jigsaw,
            cloak=moved(TransformerCloak.from_model(base, scale=(1e-6, 1e-3), init_std=1e-4)),
            peft_config=lora_config(base, LoraFlags(lora_r=8, lora_dropout=0.0), jigsaw),
        )
        ours.train()
        losses.append([(line["loss"], line["grad_norm"]) for line in logged(ours)])
    for one, other in zip(*losses, strict=True):
        assert other == pytest.approx(one, rel=2e-2, abs=2e-3)


def test_a_resumed_training_is_bit_equal_and_its_checkpoint_has_no_base(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"dropout": 0.1, "lr_scheduler_type": "cosine"}
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=2, **settings)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    names = {str(f.relative_to(checkpoint)) for f in checkpoint.rglob("*") if f.is_file()}
    assert names == {
        *("adapter/adapter_model.safetensors", "adapter/adapter_config.json"),
        *("sgt/model.safetensors", "sgt/config.json"),
        *("optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"),
    }
    other = trainer(tmp_path / "b", **settings)
    other.train(resume_from_checkpoint=str(checkpoint))
    equal(whole, other)
    assert [line["loss"] for line in logged(whole)][1:] == [
        line["loss"] for line in logged(other) if line["step"] > 2
    ]
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert state["log_history"][-1]["jigsaw/agreement"] <= 1


def test_evaluation_gives_a_loss_and_leaves_no_trace(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a")
    plain.train()
    ours = trainer(tmp_path / "b", eval_strategy="steps", eval_steps=2, evaluates=True)
    ours.train()
    equal(plain, ours)
    found = [ours.evaluate(eval_dataset=data())["eval_loss"] for _ in range(2)]
    assert found[0] == found[1] and abs(found[0]) < 100
    loss, facts = ours.compute_loss(ours.pair, collate(data()), return_outputs=True, unknown=1)
    assert loss.requires_grad and "ce_performance_loss" in facts


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", dropout=0.1)
    saving = trainer(
        tmp_path / "b", dropout=0.1, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    for each in (plain, saving):
        torch.manual_seed(0)
        each.train()
    for one, two in zip(logged(plain), logged(saving), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-3)


def test_bf16_autocast_trains_without_logits(tmp_path: Path) -> None:
    ours = trainer(tmp_path, bf16=True, max_steps=12)
    with strict():
        ours.train()
    assert logged(ours)[-1]["loss"] < logged(ours)[0]["loss"]
    assert all(v.dtype == torch.float32 for v in trained(ours).values())


def test_the_transform_may_learn_at_a_rate_of_its_own(tmp_path: Path) -> None:
    ours = trainer(tmp_path, jigsaw=JigsawArguments(sgt_learning_rate=0.0625), weight_decay=0.1)
    optimizer = ours.create_optimizer()
    of_cloak = {id(p) for p in ours.pair.cloak.parameters()}
    seen = 0
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            seen += 1
            assert group["lr"] == (0.0625 if id(parameter) in of_cloak else 5e-3)
    assert seen == len(trained(ours))
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    ours.train()
    assert logged(ours)


def test_the_pair_loads_without_the_trainer(tmp_path: Path) -> None:
    ours = trainer(tmp_path)
    ours.train()
    ours.save_model(str(tmp_path / "pair"))
    loaded = peft.PeftModel.from_pretrained(model(), str(tmp_path / "pair" / "adapter")).eval()
    cloak = TransformerCloak.from_pretrained(tmp_path / "pair" / "sgt")
    ids, seed = torch.arange(4, 24)[None], torch.tensor(7)
    x = model().get_input_embeddings()(ids)
    ours.pair.eval()
    with torch.no_grad():
        noisy = cloak(x, seed=seed).noisy
        assert torch.equal(noisy, ours.pair.cloak(x, seed=seed).noisy)
        mine = ours.pair.base(inputs_embeds=noisy).logits.materialize()
        assert torch.equal(loaded(inputs_embeds=noisy).logits, mine)


def test_without_cross_entropies_both_models_end_at_the_layer(tmp_path: Path) -> None:
    jigsaw = JigsawArguments(
        jigsaw_ce_performance_loss_weight=0.0, jigsaw_ce_protection_loss_weight=0.0,
        jigsaw_clean_embeddings_guardrails_loss_weight=0.0, distillation_layer_index=1,
        jigsaw_l2_performance_loss_weight=1.0, jigsaw_l2_protection_loss_weight=0.1,
    )  # fmt: skip
    ours = trainer(tmp_path, model(3), jigsaw)
    assert {n.split(".layers.")[1][0] for n in trained(ours) if "lora_" in n} == {"0", "1"}
    ours.train()
    assert {n for n in logged(ours)[0] if "/" in n} == {
        f"jigsaw/{name}" for name in (
            "l2_performance_loss", "l2_protection_loss", "mutual_information_loss",
            "absolute_cosine_similarity_penalty", "median_norm_penalty", "abs_cosine", "std",
        )
    }  # fmt: skip
    ours.compute_loss(ours.pair, collate(data())).backward()  # DDP wants all weights used
    assert all(p.grad is not None for p in ours.pair.parameters() if p.requires_grad)


def test_what_is_measured_is_that_of_plain_torch(tmp_path: Path) -> None:
    ours = trainer(tmp_path, max_steps=40)
    ours.train()
    kept: list[Any] = []
    for name in ("teacher", "student"):
        getattr(ours.pair, name).register_forward_hook(lambda _, __, out: kept.append(out))
    found = measure(
        ours.pair, [collate(data())], attacks_on(ours.pair.base, ours.pair.cloak), seed=3
    )
    again = measure(
        ours.pair, [collate(data())], attacks_on(ours.pair.base, ours.pair.cloak), seed=3
    )
    assert found == again
    teacher, student = kept[:2]
    batch = collate(data())
    attended, noised, counted = (batch[n].bool() for n in NAMES[1:])
    clean, noisy = teacher.logits.materialize().log_softmax(-1).chunk(2)
    student_clean, student_noisy = student.logits.materialize().log_softmax(-1).chunk(2)
    for name, logits, mask in (
        ("performance", student_noisy, attended),
        ("protection", noisy, counted),
        ("guardrails", student_clean, counted),
    ):
        kl = (clean.exp() * (clean - logits)).sum(-1)[mask].mean()
        assert found[f"kl_{name}"] == pytest.approx(float(kl), rel=1e-3, abs=1e-6), name
    same = student_noisy.argmax(-1) == clean.argmax(-1)
    assert found["agreement"] == pytest.approx(float(same[attended].float().mean()))
    table = model().get_input_embeddings().weight
    nearest = torch.cdist(teacher.noisy_input_embeddings, table[None]).argmin(-1)
    recovered = (nearest == batch["input_ids"])[noised].float().mean()
    assert found["recovery_l2"] == pytest.approx(float(recovered))
    assert found["std"] == pytest.approx(float(teacher.stds.mean(-1)[noised].mean()), rel=1e-5)
    with strict():  # no logits
        facts_of(teacher, student)
        NearestEmbedding(ours.pair.base)(teacher.noisy_input_embeddings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_config": None}, "must have a PEFT adapter, LlamaForCausalLM has none"),
        (
            {"jigsaw_args": JigsawArguments(jigsaw_ce_protection_max_loss=0.0)},
            "jigsaw_ce_protection_max_loss: got 0.0",
        ),
        (
            {"jigsaw_args": JigsawArguments(jigsaw_l2_protection_loss_weight=1.0)},
            "wanted distillation_layer_index with it",
        ),
        ({"jigsaw_args": JigsawArguments(distillation_layer_index=1)}, "no l2 loss has a weight"),
        (
            {
                "jigsaw_args": JigsawArguments(
                    distillation_layer_index=9, jigsaw_l2_protection_loss_weight=1.0
                )
            },
            "from -2 to 1",
        ),
        (
            {"jigsaw_args": JigsawArguments(jigsaw_ce_performance_loss_weight=0.0)},
            "nothing else makes the student work",
        ),
        (
            {"jigsaw_args": JigsawArguments(median_norm_penalty_weight=float("nan"))},
            "median_norm_penalty_weight: got nan",
        ),
        ({"jigsaw_args": JigsawArguments(sgt_learning_rate=-1.0)}, "sgt_learning_rate: got -1"),
        ({"jigsaw_args": JigsawArguments(sgt_estimator="cnn")}, "sgt_estimator: got 'cnn'"),
        ({"cloak": TransformerCloak(8)}, "8"),
    ],
)
def test_what_does_not_fit_is_refused_before_training(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    base = model()
    settings: dict[str, Any] = {
        "train_dataset": data(),
        "peft_config": lora_config(base, LoraFlags(), JigsawArguments()),
    }
    with pytest.raises(ValueError, match=message):
        JigsawTrainer(base, arguments(tmp_path), **{**settings, **change})


def test_a_head_that_cannot_be_lazy_is_told_of_and_trained_with(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.5

    base = model()
    head = Own(base.config.hidden_size, 260, bias=False)
    head.weight = base.lm_head.weight
    base.lm_head = head
    with caplog.at_level("WARNING", logger="onepass"):
        ours = trainer(tmp_path, base)
    said = [r.getMessage() for r in caplog.records if "whole logits" in r.getMessage()]
    assert len(said) == 1 and "\n" not in said[0], [r.getMessage() for r in caplog.records]
    ours.train()
    assert logged(ours)[-1]["jigsaw/agreement"] > 0


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    ours = trainer(
        tmp_path, evaluates=True, max_steps=3, save_strategy="steps", save_steps=1,
        eval_strategy="steps", eval_steps=1, load_best_model_at_end=True,
        metric_for_best_model="loss", greater_is_better=True,
    )  # fmt: skip
    ours.train()
    from safetensors.torch import load_file

    best = Path(str(ours.state.best_model_checkpoint))
    assert best.name != "checkpoint-3", "the loss falls"
    saved = load_file(best / "sgt" / "model.safetensors")
    for name, value in ours.pair.cloak.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_a_trainer_without_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    base = model()
    lora = lora_config(base, LoraFlags(), JigsawArguments())
    ours = JigsawTrainer(base, train_dataset=data(), peft_config=lora)
    assert not ours.args.remove_unused_columns
    batch = next(iter(ours.get_train_dataloader()))
    assert set(batch) == set(NAMES)


def test_ddp_is_put_on_after_an_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_forgets_evaluations(trainer(tmp_path), monkeypatch)
