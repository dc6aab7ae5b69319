"""`DPOTrainer`: what it learns, its references, its metrics, what it refuses and goes on from."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from onepass import LazyLogits, strict
from onepass.demo import train
from onepass.dpo import (
    DPOArguments,
    DPOTrainer,
    MyDPOTrainer,
    PreferenceDataset,
    sequence_logps,
)
from onepass.dpo.trainer import without_dropout
from support.tiny_dpo import arguments, pairs, trainer
from support.tiny_language_model import model, tokenizer
from support.tiny_models import gpt2

# PEFT asks transformers under a name that it has retired.
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning")]

METRICS = {
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("logps/chosen", "logps/rejected", "logits/chosen", "logits/rejected"),
    *("entropy", "mean_token_accuracy"),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On matrices this small a second thread costs a multiple where the cores are busy."""
    with train.one_thread():
        yield


def trained(of: DPOTrainer) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in of.model.named_parameters() if v.requires_grad}


def logged(of: DPOTrainer) -> list[dict[str, float]]:
    return [line for line in of.state.log_history if "rewards/margins" in line]


def equal(one: DPOTrainer, other: DPOTrainer) -> None:
    found = trained(other)
    for name, value in trained(one).items():
        assert torch.equal(value, found[name.replace("module.", "")]), name


def batch(of: DPOTrainer, rows: slice = slice(0, 4)) -> dict[str, Tensor]:
    found: dict[str, Tensor] = of.data_collator(of.train_dataset.items[rows])
    return found


def moved(of: DPOTrainer) -> DPOTrainer:
    """Away from the start, where policy and reference are one."""
    generator = torch.Generator().manual_seed(3)
    for parameter in of.model.parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.add_(0.05 * noise)
    return of


def plain_logps(of: Any, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    logits = of(input_ids=ids, attention_mask=mask).logits
    logits = logits.materialize() if isinstance(logits, LazyLogits) else logits
    logp = logits[:, :-1].float().log_softmax(-1)
    target, counts = labels[:, 1:].clamp(0), labels[:, 1:] != -100
    return (logp.gather(-1, target[..., None])[..., 0] * counts).sum(-1)


# -- what it learns ---------------------------------------------------------------------------

NOTEBOOK = {
    "sigmoid": math.log(2), "hinge": 1.0, "ipo": 1 / (4 * 0.1**2), "alpha": math.log(2),
    "JSD": math.log(2), "FKL": math.log(2), "RKL": math.log(2),
}  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOK)
@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "whole"])
def test_sixty_steps_tell_all_pairs_apart(tmp_path: Path, name: str, rank: int) -> None:
    ours = trainer(
        tmp_path, kind=MyDPOTrainer, of={"loss_type": name, "alpha": 0.5, "beta": 0.1}, rank=rank,
        max_steps=60, logging_steps=1, per_device_train_batch_size=6,
        learning_rate=5e-3 if rank else 1e-3,
    )  # fmt: skip
    with strict():
        ours.train()
    lines = logged(ours)
    assert lines[0]["loss"] == pytest.approx(NOTEBOOK[name], rel=1e-5)
    assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["rewards/accuracies"] == 1 and lines[-1]["rewards/margins"] > 0
    assert lines[-1]["loss"] < 0.9 * lines[0]["loss"]


def test_the_step_is_that_of_plain_torch(tmp_path: Path) -> None:
    ours = moved(trainer(tmp_path, dpo=DPOArguments(beta=0.3, label_smoothing=0.1)))
    reference = model(2).eval()
    found = batch(ours)
    loss, metrics = ours.compute_loss(ours.model, found, return_outputs=True, unknown=1)
    loss.backward()
    got = {k: p.grad.clone() for k, p in ours.model.named_parameters() if p.requires_grad}
    ours.model.zero_grad()
    sides = []
    for side in ("chosen", "rejected"):
        inputs = [found[f"{side}_{part}"] for part in ("input_ids", "labels", "attention_mask")]
        with torch.no_grad():
            theirs = plain_logps(reference, *inputs)
        sides.append((plain_logps(ours.model, *inputs), theirs))
    (chosen, chosen_ref), (rejected, rejected_ref) = sides
    delta = 0.3 * ((chosen - chosen_ref) - (rejected - rejected_ref))
    want = (-0.9 * F.logsigmoid(delta) - 0.1 * F.logsigmoid(-delta)).mean()
    torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
    want.backward()
    for name, parameter in ours.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-6)
    wanted = {
        "rewards/chosen": 0.3 * (chosen - chosen_ref).mean(),
        "rewards/rejected": 0.3 * (rejected - rejected_ref).mean(),
        "rewards/margins": delta.mean(),
        "rewards/accuracies": (delta > 0).float().mean(),
        "logps/chosen": chosen.mean(),
        "logps/rejected": rejected.mean(),
    }
    entropies = []
    for side in ("chosen", "rejected"):
        ids, labels, mask = (
            found[f"{side}_{k}"] for k in ("input_ids", "labels", "attention_mask")
        )
        logits = ours.model(input_ids=ids, attention_mask=mask).logits.materialize()[:, :-1].float()
        target, logp = labels[:, 1:], logits.log_softmax(-1)
        counts = target != -100
        entropies.append(-(logp.exp() * logp).sum(-1)[counts])
        wanted[f"logits/{side}"] = logits[counts].mean()
        if side == "chosen":
            wanted["mean_token_accuracy"] = (logits.argmax(-1) == target)[counts].float().mean()
    wanted["entropy"] = torch.cat(entropies).mean()
    assert metrics.keys() == wanted.keys() == METRICS
    for name, value in wanted.items():
        torch.testing.assert_close(metrics[name], value.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("average", [True, False])
def test_ipo_is_of_means_or_of_sums(tmp_path: Path, average: bool) -> None:
    ours = moved(
        trainer(tmp_path, dpo=DPOArguments(beta=0.5, loss_type=["ipo"], ipo_average=average))
    )
    found = batch(ours)
    loss = ours.compute_loss(ours.model, found)
    forward = ours.concatenated_forward(ours.model, found)
    reference = ours.reference_logps(ours.model, found)
    lengths = [(found[f"{s}_labels"] != -100).sum(-1) for s in ("chosen", "rejected")]
    chosen, rejected = (
        (p - r) / (n if average else 1)
        for p, r, n in zip(forward[:2], reference, lengths, strict=True)
    )
    torch.testing.assert_close(loss, (chosen - rejected - 1).square().mean())


def test_items_of_token_ids_and_a_tied_head_are_taken(tmp_path: Path) -> None:
    base = gpt2()
    items = [
        {f"{part}_{key}": value for part, ids in (("chosen", [5, 6, 7 + n]), ("rejected", [5, 8]))
         for key, value in (("input_ids", ids), ("attention_mask", [1] * len(ids)),
                            ("labels", [-100, *ids[1:]]))}
        for n in range(4)
    ]  # fmt: skip
    ours = DPOTrainer(base, args=arguments(tmp_path), train_dataset=items, beta=0.5)  # type: ignore[arg-type]
    with strict():
        ours.train()
    assert logged(ours)[-1]["rewards/margins"] > 0


# -- references -------------------------------------------------------------------------------


def test_the_adapter_off_is_an_explicit_copy(tmp_path: Path) -> None:
    off = trainer(tmp_path / "a")
    given = trainer(tmp_path / "b", of={"ref_model": model(2)})
    for each in (off, given):
        each.train()
    equal(off, given)
    assert logged(off) == logged(given)
    found = batch(off)
    assert off.ref_model is None and given.ref_model is not None
    ours, theirs = (each.reference_logps(each.model, found) for each in (off, given))
    assert all(map(torch.equal, ours, theirs))
    assert all(off.model.get_submodule(n).training for n in ("base_model", "base_model.model"))


def test_without_an_adapter_a_copy_is_made_and_does_not_move(tmp_path: Path) -> None:
    base = model(2)
    ours = trainer(tmp_path, base, rank=0)
    ours.train()
    start = model(2)
    assert ours.ref_model is not None and ours.ref_model is not base
    for name, parameter in ours.ref_model.named_parameters():
        assert torch.equal(parameter, start.get_parameter(name)) and not parameter.requires_grad
    assert any(not torch.equal(p, start.get_parameter(n)) for n, p in base.named_parameters())


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "whole"])
@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_precomputed_is_on_the_fly(tmp_path: Path, rank: int, loss: str) -> None:
    now = trainer(tmp_path / "a", rank=rank, of={"loss_type": loss}, learning_rate=1e-3)
    ahead = trainer(
        tmp_path / "b", rank=rank, learning_rate=1e-3,
        of={"loss_type": loss, "precompute_ref_log_probs": True, "eval_dataset": pairs()[:3]},
    )  # fmt: skip
    assert ahead.ref_model is None
    # as from a dataset that has them
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    rows = [
        {**row, **{c: item[c] for c in columns}}
        for row, item in zip(pairs(), ahead.train_dataset.items, strict=True)
    ]
    given = trainer(
        tmp_path / "c", rank=rank, learning_rate=1e-3,
        of={"loss_type": loss, "train_dataset": rows},
    )  # fmt: skip
    for each in (now, ahead, given):
        each.train()
    equal(ahead, given)
    for one, other in zip(logged(now), logged(ahead), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["rewards/margins"] == pytest.approx(other["rewards/margins"], abs=1e-4)
    assert ahead.evaluate()["eval_rewards/margins"] > 0
    with pytest.raises(ValueError, match="the reference is not kept"):
        ahead.evaluate(pairs()[:2])
    if rank:  # the model without its adapter is one all the same
        assert "eval_loss" in given.evaluate(pairs()[:2])
        return
    with pytest.raises(ValueError, match="the model is trained, so that no reference is left"):
        given.evaluate(pairs()[:2])


def test_precomputing_leaves_the_data_as_they_are(tmp_path: Path) -> None:
    data = PreferenceDataset(tokenizer(), pairs())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        other = type(model(2))(model(2).config)
    for base in (model(2), other):
        ours = trainer(
            tmp_path, base, rank=0, max_steps=1, logging_steps=1, learning_rate=0.0,
            of={"precompute_ref_log_probs": True, "train_dataset": data},
        )  # fmt: skip
        assert not data.has_reference and ours.train_dataset.has_reference
        ours.train()
        assert logged(ours)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "whole"])
def test_precomputed_under_bf16_is_the_policy_at_the_start(tmp_path: Path, rank: int) -> None:
    ours = trainer(
        tmp_path, rank=rank, bf16=True, max_steps=1, logging_steps=1, learning_rate=0.0,
        per_device_train_batch_size=6, of={"precompute_ref_log_probs": True},
    )  # fmt: skip
    ours.train()
    [line] = logged(ours)
    assert line["rewards/chosen"] == line["rewards/rejected"] == 0
    assert line["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_without_a_reference_rewards_are_of_the_policy_alone(tmp_path: Path) -> None:
    ours = trainer(tmp_path, dpo=DPOArguments(reference_free=True), rank=0)
    ours.train()
    assert ours.ref_model is None
    line = logged(ours)[0]
    assert line["rewards/chosen"] == pytest.approx(0.1 * line["logps/chosen"], rel=1e-5)


def test_the_reference_may_follow(tmp_path: Path) -> None:
    dpo = DPOArguments(sync_ref_model=True, ref_model_sync_steps=2, ref_model_mixup_alpha=0.5)
    ours = trainer(tmp_path, dpo=dpo, rank=0, max_steps=2)
    ours.train()
    start = model(2)
    assert ours.ref_model is not None
    for name, parameter in ours.model.named_parameters():
        half = (start.get_parameter(name) + parameter) / 2
        torch.testing.assert_close(ours.ref_model.get_parameter(name), half)


def test_dropout_is_off_in_both_or_in_the_reference_alone(tmp_path: Path) -> None:
    base = gpt2()
    assert any(isinstance(m, torch.nn.Dropout) and m.p for m in base.modules())
    without_dropout(base)
    assert not any(isinstance(m, torch.nn.Dropout) and m.p for m in base.modules())
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"hidden_size": 16, "ffn_dim": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    opt = OPTForCausalLM(
        OPTConfig(vocab_size=50, word_embed_proj_dim=16, dropout=0.5, layerdrop=0.5, **sizes)
    ).train()
    without_dropout(opt)  # a functional one, of a rate that a module keeps
    ids = torch.arange(20)[None]
    assert torch.equal(opt(ids).logits, opt(ids).logits)
    lora = trainer(tmp_path, of={"disable_dropout": False})
    lora.train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p for m in lora.model.modules())
    found = batch(lora)
    lora.model.train()
    one, two = (lora.reference_logps(lora.model, found)[0] for _ in range(2))
    assert torch.equal(one, two)


# -- invariances ------------------------------------------------------------------------------


def test_padding_and_prompts_do_not_count(tmp_path: Path) -> None:
    ours = moved(trainer(tmp_path))
    found = batch(ours)
    logps = ours.concatenated_forward(ours.model, found)[:2]
    wide = dict(found)
    for key, value in found.items():
        wide[key] = F.pad(value, (0, 5), value=-100 if key.endswith("labels") else 0)
    for one, other in zip(logps, ours.concatenated_forward(ours.model, wide)[:2], strict=True):
        torch.testing.assert_close(one, other)
    for row in range(4):
        alone = ours.concatenated_forward(ours.model, batch(ours, slice(row, row + 1)))
        torch.testing.assert_close(alone[0][0], logps[0][row])
        torch.testing.assert_close(alone[1][0], logps[1][row])
    logits = torch.randn(2, 6, 9)
    labels = torch.tensor([[-100, -100, 3, 4, 5, -100], [-100, 2, 3, -100, -100, -100]])
    sums = DPOTrainer.get_batch_logps(logits, labels)
    other = logits.clone()
    other[:, 4:] = 0  # what predicts padding
    other[0, :1] = 0  # and what predicts the prompt
    assert torch.equal(sums, DPOTrainer.get_batch_logps(other, labels))
    means = DPOTrainer.get_batch_logps(logits, labels, average_log_prob=True)
    torch.testing.assert_close(means, sums / torch.tensor([3, 2]))
    marked = labels.masked_fill(labels == -100, -1)
    assert torch.equal(sums, DPOTrainer.get_batch_logps(logits, marked, label_pad_token_id=-1))
    with pytest.raises(ValueError, match="must agree in batch and length"):
        DPOTrainer.get_batch_logps(logits, labels[:, 1:])


@pytest.mark.parametrize("loss", [*NOTEBOOK, "sft", "sigmoid_norm"])
def test_an_answer_of_no_tokens_counts_0(tmp_path: Path, loss: str) -> None:
    ours = moved(trainer(tmp_path, of={"loss_type": loss}))
    found = batch(ours)
    found["rejected_labels"] = torch.full_like(found["rejected_labels"], -100)
    forward = ours.concatenated_forward(ours.model, found)
    assert torch.equal(forward[1], torch.zeros(4))
    value, metrics = ours.compute_loss(ours.model, found, return_outputs=True)
    value.backward()
    assert value.isfinite() and all(metric.isfinite() for metric in metrics.values())
    grads = [p.grad for p in ours.model.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)


def test_other_labels_for_padding_train_the_same(tmp_path: Path) -> None:
    plain, other = trainer(tmp_path / "a"), trainer(tmp_path / "b", of={"label_pad_token_id": -7})
    for each in (plain, other):
        each.train()
    equal(plain, other)


# -- metrics, accumulation, checkpoints -------------------------------------------------------


def test_logs_have_the_names_of_trl(tmp_path: Path) -> None:
    ours = trainer(tmp_path, of={"eval_dataset": pairs()[:5]})
    ours.train()
    lines = logged(ours)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for line in lines:
        assert {name for name in line if name in METRICS} == METRICS
        assert 0 < line["entropy"] <= math.log(260) and 0 <= line["mean_token_accuracy"] <= 1
        assert line["rewards/margins"] == pytest.approx(
            line["rewards/chosen"] - line["rewards/rejected"], abs=1e-5
        )
    assert [line["num_tokens"] for line in lines] == sorted(line["num_tokens"] for line in lines)
    per_epoch = sum(
        len(item[f"{side}_input_ids"])
        for item in ours.train_dataset.items
        for side in ("chosen", "rejected")
    )
    assert lines[-1]["num_tokens"] == 3 * per_epoch
    found = ours.evaluate()
    assert {f"eval_{name}" for name in METRICS} <= set(found)
    assert "eval_num_tokens" not in found
    whole: Any = ours.get_batch_loss_metrics(ours.model.eval(), ours.data_collator(
        ours.eval_dataset.items), "eval")[1]  # fmt: skip
    for name in METRICS:  # of batches of 4 and 1
        assert found[f"eval_{name}"] == pytest.approx(float(whole[f"eval_{name}"]), rel=1e-4)
    assert found["eval_loss"] == pytest.approx(float(whole.losses.mean()), rel=1e-5)
    predicted = ours.predict(pairs()[:5])
    assert predicted.metrics["test_rewards/margins"] == pytest.approx(
        found["eval_rewards/margins"], rel=1e-5
    )
    assert predicted.predictions.keys() == METRICS | {"loss"}
    torch.testing.assert_close(torch.tensor(predicted.predictions["loss"]), whole.losses)


def test_metrics_of_a_subclass_and_training_without_logs(tmp_path: Path) -> None:
    class Own(DPOTrainer):
        def get_batch_loss_metrics(self, *args: Any) -> Any:
            loss, metrics = super().get_batch_loss_metrics(*args)
            before = "eval_" if args[-1] == "eval" else ""
            metrics[before + "three"] = torch.tensor(3.0)
            metrics[before + "entropy"] = metrics[before + "entropy"] * 0 - 1
            del metrics[before + "logps/chosen"]
            return loss, metrics

    ours = trainer(
        tmp_path, kind=Own, logging_strategy="no", max_steps=3, of={"eval_dataset": pairs()[:5]}
    )
    ours.train()
    [totals] = ours._totals.values()  # and not one for each step
    assert totals.shape == (2, len(METRICS))
    found = ours.evaluate()
    assert found["eval_three"] == 3.0 and found["eval_entropy"] == -1
    assert "eval_logps/chosen" not in found and found["eval_rewards/accuracies"] > 0
    assert ours._count_tokens() > 0 and ours._seen == 0


def test_evaluation_takes_rows_and_leaves_no_trace(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a")
    ours = trainer(
        tmp_path / "b", eval_strategy="steps", eval_steps=2,
        of={"eval_dataset": {"x": pairs()[:3], "y": pairs()[3:]}},
    )  # fmt: skip
    for each in (plain, ours):
        each.train()
    equal(plain, ours)
    assert logged(plain) == logged(ours)
    assert any("eval_x_rewards/margins" in line for line in ours.state.log_history)
    one, two = (ours.evaluate(pairs()[:4]) for _ in range(2))
    assert one["eval_loss"] == two["eval_loss"]


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    losses = []
    for name, size, n in (("a", 4, 1), ("b", 2, 2)):
        ours = trainer(
            tmp_path / name, per_device_train_batch_size=size, gradient_accumulation_steps=n,
            logging_steps=1, max_steps=3, of={"train_dataset": pairs()[:4]}, learning_rate=1e-3,
        )  # fmt: skip
        ours.train()
        losses.append(logged(ours))
    for one, other in zip(*losses, strict=True):
        for name in ("loss", "rewards/margins", "grad_norm", "num_tokens"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "whole"])
def test_a_resumed_training_is_bit_equal(tmp_path: Path, rank: int) -> None:
    settings: dict[str, Any] = {"lr_scheduler_type": "cosine", "rank": rank}
    if not rank:
        settings["dpo"] = DPOArguments(sync_ref_model=True, ref_model_sync_steps=1)
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=2, **settings)
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() == bool(rank)
    other = trainer(tmp_path / "b", **settings)
    other.train(resume_from_checkpoint=str(checkpoint))
    equal(whole, other)
    assert logged(whole) == logged(other)
    if not rank:
        from safetensors.torch import load_file, save_file

        [file] = (checkpoint / "reference").glob("*.safetensors")
        state = load_file(file)
        state.pop("model.layers.0.mlp.up_proj.weight")
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match="up_proj.weight: the reference is damaged"):
            trainer(tmp_path / "c", **settings).train(resume_from_checkpoint=str(checkpoint))


def test_bf16_autocast_and_checkpointing_train_without_logits(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a")
    saving = trainer(
        tmp_path / "b", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    half = trainer(tmp_path / "c", bf16=True, max_steps=20)
    with strict():
        for each in (plain, saving, half):
            each.train()
    assert logged(saving)[-1]["loss"] == pytest.approx(logged(plain)[-1]["loss"], rel=1e-3)
    assert logged(half)[-1]["rewards/accuracies"] == 1


# -- options ----------------------------------------------------------------------------------


def test_the_length_of_an_answer_may_weigh_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, none = (
        moved(trainer(tmp_path / str(a), dpo=DPOArguments(ld_alpha=a))) for a in (1.0, 0.0)
    )
    plain = moved(trainer(tmp_path / "plain"))
    found = batch(plain)
    assert torch.equal(full.compute_loss(full.model, found), plain.compute_loss(plain.model, found))
    chosen, rejected = none.concatenated_forward(none.model, found)[:2]
    for row in range(4):
        counted = [(found[f"{s}_labels"][row] != -100).sum() for s in ("chosen", "rejected")]
        for side, value in (("chosen", chosen), ("rejected", rejected)):
            labels = found[f"{side}_labels"][row : row + 1].clone()
            places = (labels[0] != -100).nonzero()[int(min(counted)) :, 0]
            labels[0, places] = -100
            ids, mask = (
                found[f"{side}_{k}"][row : row + 1] for k in ("input_ids", "attention_mask")
            )
            torch.testing.assert_close(value[row], plain_logps(none.model, ids, labels, mask)[0])
    # what sft means is of all tokens
    both = DPOArguments(ld_alpha=0.0, loss_type=["sigmoid", "sft"], loss_weights=[0.0, 1.0])
    mixed = moved(trainer(tmp_path / "mixed", dpo=both))
    chosen = plain.concatenated_forward(plain.model, found)[0]
    n = (found["chosen_labels"] != -100).sum()
    calls = []

    def noted(*args: Any, **kwargs: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return sequence_logps(*args, **kwargs)

    monkeypatch.setattr("onepass.dpo.trainer.sequence_logps", noted)
    with strict():
        loss = mixed.compute_loss(mixed.model, found)
    torch.testing.assert_close(loss, -chosen.sum() / n)
    assert calls == [True, False]  # one pass of the policy, one of the reference


def test_pairs_may_weigh_by_their_likelihood(tmp_path: Path) -> None:
    ours = moved(trainer(tmp_path, dpo=DPOArguments(use_weighting=True)))
    plain = moved(trainer(tmp_path))
    found = batch(ours)
    loss = ours.compute_loss(ours.model, found)
    losses = plain.dpo_loss(
        *plain.concatenated_forward(plain.model, found)[:2],
        *plain.reference_logps(plain.model, found),
    ).losses
    log_weights = []
    for side in ("chosen", "rejected"):
        ids, labels, mask = (
            found[f"{side}_{k}"] for k in ("input_ids", "labels", "attention_mask")
        )
        logits = ours.model(input_ids=ids, attention_mask=mask).logits.materialize()
        logp = logits[:, :-1].float().log_softmax(-1)
        target, counts = labels[:, 1:].clamp(0), labels[:, 1:] != -100
        aligned = logp.gather(-1, target[..., None])[..., 0] - (2 * logp).logsumexp(-1)
        log_weights.append((aligned * counts).sum(-1) / counts.sum(-1))
    weights = (log_weights[0] + log_weights[1]).exp().detach()
    torch.testing.assert_close(loss, (losses * weights).mean(), rtol=1e-4, atol=1e-7)
    ours.train()


class Notebook(DPOTrainer):
    """As the notebook has it, with one branch."""

    def __init__(self, alpha: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.alpha = 1 if alpha is None else alpha

    def dpo_loss(  # type: ignore[override]
        self,
        policy_chosen_logps: Tensor,
        policy_rejected_logps: Tensor,
        reference_chosen_logps: Tensor,
        reference_rejected_logps: Tensor,
        reference_free: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        assert self.loss_type == "mine" and not reference_free and self.alpha == 3
        logits = policy_chosen_logps - policy_rejected_logps
        logits = logits - (reference_chosen_logps - reference_rejected_logps)
        losses = -F.logsigmoid(self.beta * logits) * (1 - self.label_smoothing)
        rewards = self.beta * (policy_chosen_logps - reference_chosen_logps).detach()
        return losses, rewards, self.beta * (policy_rejected_logps - reference_rejected_logps)


def test_the_notebooks_subclass_trains_with_a_loss_of_its_own(tmp_path: Path) -> None:
    own = trainer(tmp_path / "a", kind=Notebook, of={"alpha": 3, "loss_type": "mine"})
    plain = trainer(tmp_path / "b")
    for each in (own, plain):
        each.train()
    for one, other in zip(logged(own), logged(plain), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    ours = trainer(tmp_path / "c", kind=MyDPOTrainer, of={"alpha": 0.5, "loss_type": "alpha"})
    w, x, y, z = (torch.tensor([value]) for value in (-1.0, -2.0, -1.5, -1.0))
    losses, chosen, rejected = ours.dpo_loss(w, x, y, z)
    u = torch.tensor([0.5, -1.0])
    score = (1 - torch.exp(-0.5 * u)) / 0.5
    torch.testing.assert_close(losses[0], -F.logsigmoid(0.1 * (score[0] - score[1])))
    torch.testing.assert_close(torch.cat([chosen, rejected]), 0.1 * u)


def test_a_datasets_dataset_is_taken(tmp_path: Path) -> None:
    from datasets import Dataset

    plain = trainer(tmp_path / "a")
    ours = trainer(tmp_path / "b", of={"train_dataset": Dataset.from_list(pairs())})
    for each in (plain, ours):
        each.train()
    equal(plain, ours)


def test_trls_config_is_read(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", exc_type=ImportError)
    config = trl.DPOConfig(
        str(tmp_path), beta=0.5, loss_type=["ipo"], max_length=20, f_alpha_divergence_coef=0.3,
        precompute_ref_log_probs=True, report_to="none", use_cpu=True, bf16=False,
    )  # fmt: skip
    ours = trainer(tmp_path, of={"args": config})
    assert ours.dpo_args.loss_type == ["ipo"] and ours.beta == 0.5 and ours.precomputes
    assert max(len(item["chosen_input_ids"]) for item in ours.train_dataset.items) == 20
    assert trainer(tmp_path, of={"args": config, "beta": 0.2, "alpha": 0.9}).beta == 0.2


# -- refusals ---------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("beta", {"beta": 0.0}, "beta must"),
    ("beta nan", {"beta": math.nan}, "beta must"),
    ("smoothing", {"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\)"),
    ("loss", {"loss_type": "sigmoidal"}, "loss_type must be one of sigmoid, hinge, ipo"),
    ("divergence", {"f_divergence_type": "kl"}, "f_divergence_type must be one of reverse_kl"),
    (
        "combination",
        {"loss_type": "bco_pair", "f_divergence_type": "forward_kl"},
        "'bco_pair' has no f-divergence",
    ),
    ("alpha twice", {"alpha": 1.0, "dpo_args": DPOArguments(f_alpha_divergence_coef=0.5)},
     "alpha is 1 - f_alpha_divergence_coef"),
    ("truncation", {"truncation_mode": "keep_all"}, "wanted keep_end or keep_start"),
    ("length", {"max_length": 1}, "max_length: got 1"),
    ("prompt", {"max_length": 8, "max_prompt_length": 8}, "nothing would be left of the answers"),
    ("half a step", {"dpo_args": DPOArguments(ref_model_sync_steps=2.5)},  # type: ignore[arg-type]
     "ref_model_sync_steps: got 2.5, wanted a whole number"),
    ("ld_alpha", {"dpo_args": DPOArguments(ld_alpha=1.5)}, "from 0 to 1"),
    ("mixup", {"dpo_args": DPOArguments(ref_model_mixup_alpha=2)}, "from 0 to 1"),
    ("weighted sort", {"dpo_args": DPOArguments(loss_type=["aot"], use_weighting=True)},
     "sorts the batch"),
    ("sync of an adapter", {"dpo_args": DPOArguments(sync_ref_model=True)},
     "wanted a model without an adapter"),
    ("sync of an adapter and a model",
     {"dpo_args": DPOArguments(sync_ref_model=True), "ref_model": model(2)},
     "wanted a model without an adapter"),
    ("sync and columns",
     {"dpo_args": DPOArguments(sync_ref_model=True), "peft_config": None,
      "train_dataset": [{**pairs()[0], "ref_chosen_logps": -1, "ref_rejected_logps": -2}]},
     "so that no reference runs that could follow"),
    ("metrics", {"compute_metrics": lambda found: {}}, "compute_metrics: pairs have no"),
    ("loss function", {"compute_loss_func": lambda *a, **k: 0}, "compute_loss_func: pairs have no"),
    ("smoothing of the Trainer's", {
        "args": arguments(Path("trainer_output"), label_smoothing_factor=0.1)
    }, "wanted label_smoothing"),
    ("an argument of old", {"is_encoder_decoder": True}, "is_encoder_decoder: got True, which is"),
    ("no length", {"dpo_args": DPOArguments(max_length=None, max_prompt_length=8)},
     "max_prompt_length: got 8 without max_length"),
    ("no alpha", {"f_divergence_type": "alpha_divergence"}, "alpha must be a number for f_diverg"),
    ("smoothed hinge", {"label_smoothing": 0.1, "loss_type": "hinge"}, "of sigmoid, sigmoid_norm"),
    ("sync and precompute", {"dpo_args": DPOArguments(sync_ref_model=True,
                                                      precompute_ref_log_probs=True)},
     "wanted a reference that runs"),
    ("free and given", {"dpo_args": DPOArguments(reference_free=True), "ref_model": model(2)},
     "reference_free leaves it out"),
    ("no tokenizer", {"tokenizer": None}, "wanted a tokenizer"),
    ("two tokenizers", {"processing_class": tokenizer()}, "one argument"),
    ("two models", {"model_init": lambda: model(2)}, "one of model and model_init"),
    ("no column", {"train_dataset": [pairs()[0], {"prompt": "a", "chosen": "b"}]},
     "train_dataset: row 2: no 'rejected'"),
    ("equal", {"eval_dataset": [{"chosen": "a", "rejected": "a"}]},
     "eval_dataset: row 1: 'chosen' and 'rejected' are equal"),
]  # fmt: skip


@pytest.mark.parametrize(("given", "message"), [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_what_cannot_work_is_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        trainer(tmp_path, of=given)
    assert "\n" not in str(caught.value)


def test_weights_of_tokens_want_the_trainers_own_logps(tmp_path: Path) -> None:
    class Own(DPOTrainer):
        def get_batch_logps(self, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
            return super().get_batch_logps(*args, **kwargs)

    ours = trainer(tmp_path, kind=Own, dpo=DPOArguments(ld_alpha=0.5))
    with pytest.raises(ValueError, match="ld_alpha: wanted the trainer's own get_batch_logps"):
        ours.train()
    assert DPOArguments(loss_type="hinge").loss_type == ["hinge"]  # type: ignore[arg-type]


def test_methods_of_old_that_nothing_calls_are_refused(tmp_path: Path) -> None:
    class Older(DPOTrainer):
        def get_batch_metrics(self, *args: Any) -> Any:
            raise NotImplementedError

    with pytest.raises(ValueError, match="Older.get_batch_metrics would never be called: override"):
        trainer(tmp_path, kind=Older)
    harmless = {"is_encoder_decoder": False, "generate_during_eval": False, "dataset_num_proc": 1}
    trainer(tmp_path, of=harmless)


def test_a_model_is_not_its_own_reference(tmp_path: Path) -> None:
    base = model(2)
    with pytest.raises(ValueError, match="the model itself"):
        trainer(tmp_path, base, rank=0, of={"ref_model": base})
    with pytest.raises(ValueError, match="only decoders"):
        DPOTrainer.get_batch_logps(torch.zeros(1, 2, 3), torch.zeros(1, 2).long(),
                                   is_encoder_decoder=True)  # fmt: skip


def test_a_head_that_cannot_be_lazy_is_told_and_trains(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = copy.deepcopy(model(2))
    base.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, base.lm_head.weight)
    with caplog.at_level(logging.WARNING, "onepass"):
        whole = trainer(tmp_path / "a", base)
    assert "training with whole logits" in caplog.text
    lazy = trainer(tmp_path / "b")
    for each in (whole, lazy):
        each.train()
    for one, other in zip(logged(whole), logged(lazy), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_dataset_made_before_is_taken_as_it_is(tmp_path: Path) -> None:
    data = PreferenceDataset(tokenizer(), pairs())
    ours = trainer(tmp_path, of={"train_dataset": data})
    assert ours.train_dataset is data
