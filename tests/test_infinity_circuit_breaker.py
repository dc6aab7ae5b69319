"""Rerouting of image models: the loss against plain torch, hidden states, masks, a real training.

`plain` is SPEC 4.2 to 4.4 in plain torch: hooks of its own, layers stacked.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from onepass.circuit_breaker import infinity
from onepass.circuit_breaker.adapter import jitter_weights
from onepass.circuit_breaker.infinity import (
    InfinityConfig,
    WordEncoder,
    compute_infinity_circuit_breaker_loss,
    data_collator_infinity,
    lora_target_modules,
)
from onepass.circuit_breaker.infinity.arguments import InfinityArguments
from onepass.circuit_breaker.infinity.loss import (
    _warn_of_text_mask,
    infinity_rerouting,
    infinity_rerouting_loss,
    noise,
)
from onepass.circuit_breaker.infinity.pretrain import small_model
from onepass.circuit_breaker.infinity.quantizer import SCALES, BitQuantizer
from onepass.circuit_breaker.infinity.task import WithPictures, label_loss
from onepass.circuit_breaker.infinity.text import TextCondTuple, text_cond_tuple
from onepass.circuit_breaker.infinity.weights import changed_weights, frozen_copy, unfreeze

TINY = InfinityConfig(embed_dim=16, depth=3, num_heads=2, text_channels=8, text_maxlen=16)
SCHEDULE = [(1, 1, 1), (1, 2, 2), (1, 3, 3)]
L, LENS = 14, [3, 1, 5]
PARTS = ("", "_circuit_breaker", "_val")
EPS = 1e-8


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """One thread, the same draws, a warning that has not been given."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _warn_of_text_mask.cache_clear()
    yield
    torch.set_num_threads(before)


def tiny(**changes: Any) -> Any:
    model = small_model(0, dataclasses.replace(TINY, **changes))
    drawn = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("ada_gss"):
                weight.normal_(std=0.3, generator=drawn)
    return model


def moved(model: nn.Module, by: float = 0.1) -> Any:
    """A copy with other weights."""
    other = copy.deepcopy(model)
    jitter_weights(other, by, seed=3)
    return other


def conditions(lens: list[int] = LENS, channels: int = 8) -> TextCondTuple:
    return text_cond_tuple([torch.randn(n, channels) for n in lens])


def batch(**more: Any) -> dict[str, Any]:
    prompts = {f"text_cond_tuple{part}": conditions() for part in PARTS}
    return {**prompts, "scale_schedule": SCHEDULE, **more}


def images(n: int = len(LENS)) -> Tensor:
    return torch.randn(n, L - 1, TINY.d_vae)


def trainer(reference: nn.Module, done: int = 30, of_all: int = 100) -> Any:
    return types.SimpleNamespace(reference_model=reference, prog_it=done, max_it=of_all)


def states(model: Any, condition: TextCondTuple, x: Tensor) -> Tensor:
    """Outputs of all blocks [layers, B, L, C]."""
    found: list[Tensor] = []
    hooks = [b.register_forward_hook(lambda _, __, out: found.append(out)) for b in model.blocks]
    model(condition, x, SCHEDULE)
    for hook in hooks:
        hook.remove()
    return torch.stack(found)


def plain(
    model: Any, original: Any, inputs: dict[str, Any], layers: list[int], p: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    x = inputs["x_BLC_wo_prefix"]
    now, now_broken = (states(model, inputs[f"text_cond_tuple{e}"], x) for e in PARTS[:2])
    with torch.no_grad():
        old, old_broken = (states(original, inputs[f"text_cond_tuple{e}"], x) for e in PARTS[:2])
    last = max(layers) + 1
    retain = torch.norm(now[:last] - old[:last], dim=-1).mean()
    h, o = now_broken[layers], old_broken[layers]
    unit_h = h / (h.norm(dim=-1, keepdim=True) + EPS)
    unit_o = o / (o.norm(dim=-1, keepdim=True) + EPS)
    broken = (unit_h * unit_o).sum(-1).relu().mean()
    return alpha * p * retain + alpha * (1 - p) * broken, retain, broken


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# -- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [[0, 1, 2], [1], [2, 0]])
def test_loss_and_gradients_are_those_of_plain_torch(layers: list[int]) -> None:
    original = tiny()
    model, inputs = moved(original), batch(x_BLC_wo_prefix=images())
    want = plain(model, original, inputs, layers, 0.3, 2.0)
    wanted = gradients(model, want[0])
    got = compute_infinity_circuit_breaker_loss(
        trainer(original), model, inputs, layers, alpha=2.0, return_outputs=True
    )
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = gradients(model, got[0])
    for name, gradient in wanted.items():
        if gradient.any():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert "head.weight" not in found  # no logits are made
    assert all(weight.grad is None for weight in original.parameters())


def test_relu_of_the_total_as_published_code_has_it() -> None:
    original = tiny()
    model, inputs = moved(original, 3.0), batch(x_BLC_wo_prefix=images())

    def broken(scope: str) -> float:
        found = compute_infinity_circuit_breaker_loss(
            trainer(original), model, inputs, [2], 1.0, True, relu_scope=scope
        )
        return float(found[2])

    assert 0 <= broken("total") < broken("token")


@pytest.mark.parametrize(
    ("trained", "p"),
    [
        (types.SimpleNamespace(), 0.5),
        (types.SimpleNamespace(prog_it=25, max_it=100), 0.25),
        (types.SimpleNamespace(prog_it=0, max_it=100), 0.0),
        (types.SimpleNamespace(prog_it=300, max_it=100), 1.0),
    ],
)
def test_progress_is_the_trainers(trained: Any, p: float) -> None:
    original = tiny()
    model, inputs = moved(original), batch(x_BLC_wo_prefix=images())
    total, retain, broken = compute_infinity_circuit_breaker_loss(
        trained, model, inputs, [1], 0.1, return_outputs=True, reference=original
    )
    torch.testing.assert_close(total, 0.1 * p * retain + 0.1 * (1 - p) * broken)
    assert retain > 0 and broken > 0 and total.requires_grad
    assert not retain.requires_grad and not broken.requires_grad


def test_at_the_start_the_harmful_side_has_a_gradient_only_off_the_point_of_rest() -> None:
    original, inputs = tiny(), batch()
    at_rest = copy.deepcopy(original)
    total, retain, broken = compute_infinity_circuit_breaker_loss(
        trainer(original, 0), at_rest, inputs, [1, 2], 1.0, True
    )
    assert retain == 0 and broken.item() == pytest.approx(1.0, abs=1e-6)
    still = max(float(g.abs().max()) for g in gradients(at_rest, total).values())
    nudged = moved(original, 1e-2)
    loss = compute_infinity_circuit_breaker_loss(trainer(original, 0), nudged, inputs, [1, 2], 1.0)
    assert isinstance(loss, Tensor)
    assert max(float(g.abs().max()) for g in gradients(nudged, loss).values()) > 50 * still


def test_an_item_counts_the_same_in_any_batch() -> None:
    original = tiny()
    model, x = moved(original), images()
    parts = {f"text_cond_tuple{e}": [conditions([n]) for n in LENS] for e in PARTS[:2]}

    def loss(rows: list[int]) -> Tensor:
        joined = {
            k: text_cond_tuple([v[i][0] for i in rows]) for k, v in parts.items()
        }  # the batch's cu_seqlens_k and Ltext
        inputs = {**joined, "x_BLC_wo_prefix": x[rows], "scale_schedule": SCHEDULE}
        found = compute_infinity_circuit_breaker_loss(trainer(original), model, inputs, [2])
        assert isinstance(found, Tensor)
        return found

    alone = torch.stack([loss([i]) for i in range(3)])
    torch.testing.assert_close(loss([0, 1, 2]), alone.mean(), rtol=1e-5, atol=1e-7)


def test_noise_stands_in_for_images_and_is_the_same_for_either_model() -> None:
    original, inputs = tiny(), batch()
    same = copy.deepcopy(original)
    loss = compute_infinity_circuit_breaker_loss(trainer(original, 100), same, inputs, [2])
    assert isinstance(loss, Tensor) and loss.item() == 0.0  # retain alone, at rest
    model = moved(original)

    def at(step: int, seed: int = 0) -> float:
        found = compute_infinity_circuit_breaker_loss(
            trainer(original, step, 10**9), model, inputs, [2], seed=seed
        )
        assert isinstance(found, Tensor)
        return found.item()

    assert at(3) == at(3) != at(4)
    assert at(3, seed=1) == pytest.approx(at(4))
    assert noise(model, 2, SCHEDULE, 0).shape == (2, L - 1, TINY.d_vae)


# -- prompts that are dropped, masks ----------------------------------------------------------


class Block(nn.Module):
    def __init__(self, told: str) -> None:
        super().__init__()
        self.linear, self.told = nn.Linear(6, 6), told
        self.output_hidden_states: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x + self.linear(x).tanh()
        if self.told == "output_hidden_states":
            self.output_hidden_states = self.kept
        return self.kept if not self.told else torch.full_like(self.kept, torch.nan).where(
            torch.tensor(False), self.kept
        )  # fmt: skip


class Telling(Block):
    def get_hidden_states(self) -> Tensor:
        return 2 * self.kept


class Chunk(nn.Module):
    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.module = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.module:
            x = block(x)
        return x


class Published(nn.Module):
    """What FoundationVision's Infinity does that matters here: blocks in chunks and unregistered,
    dropped prompts written into the text in any mode, a padded sequence."""

    def __init__(self, kind: type[Block] = Block, told: str = "", multiple: int = 1) -> None:
        super().__init__()
        self.unregistered_blocks = [kind(told) for _ in range(4)]
        self.block_chunks = nn.ModuleList(
            Chunk(list(self.unregistered_blocks[n : n + 2])) for n in (0, 2)
        )
        self.word_embed, self.text = nn.Linear(3, 6), nn.Linear(8, 6)
        self.head = nn.Linear(6, 8)
        self.cond_drop_rate, self.pad_to_multiplier = 1.0, multiple
        self.saw: list[Any] = []

    def forward(self, condition: TextCondTuple, x: Tensor, scale_schedule: Any) -> Tensor:
        text, lens, starts, _ = condition
        self.saw.append(scale_schedule)
        for start, length in zip(starts.tolist(), lens, strict=False):
            if random.random() < self.cond_drop_rate:
                text[start : start + length] = 0.0
        means = torch.stack([part.mean(0) for part in text.split(lens)])
        first = self.text(means)[:, None]
        x = torch.cat([first, self.word_embed(x) + first], 1)
        padding = -x.shape[1] % self.pad_to_multiplier
        x = nn.functional.pad(x, (0, 0, 0, padding))
        for chunk in self.block_chunks:
            x = chunk(x)
        return self.head(x[:, : x.shape[1] - padding])


def published(*kind: Any, **how: Any) -> Any:
    torch.manual_seed(2)
    return Published(*kind, **how)


def test_a_model_with_chunks_of_unregistered_blocks_and_prompts_it_would_drop() -> None:
    original = published()
    model, inputs = moved(original), batch()
    before = inputs["text_cond_tuple"][0].clone()
    loss = compute_infinity_circuit_breaker_loss(trainer(original), model, inputs, [1, 3], 1.0)
    assert isinstance(loss, Tensor)
    found = gradients(model, loss)
    assert any(name.startswith("block_chunks.1.module.1") for name in found)
    assert found["text.weight"].any()  # the text was read, by model and reference
    assert torch.equal(inputs["text_cond_tuple"][0], before)
    assert model.cond_drop_rate == original.cond_drop_rate == 1.0
    assert model.saw[0] == SCHEDULE
    other = {**inputs, "text_cond_tuple_circuit_breaker": conditions()}
    assert loss != compute_infinity_circuit_breaker_loss(
        trainer(original), model, other, [1, 3], 1.0
    )


def test_the_small_model_drops_no_prompt_either() -> None:
    original = tiny(cond_drop_rate=1.0)
    model, inputs = moved(original).train(), batch()
    first = compute_infinity_circuit_breaker_loss(trainer(original), model, inputs, [2])
    kept = compute_infinity_circuit_breaker_loss(trainer(original), model.eval(), inputs, [2])
    assert torch.equal(first, kept) and model.cond_drop_rate == 1.0  # type: ignore[arg-type]


def test_hidden_states_that_a_block_tells_by_itself() -> None:
    """get_hidden_states() here is twice the output: retain doubles, cosines do not."""
    plainly, telling = published(), published(Telling)
    tensor = published(Block, "output_hidden_states")
    inputs, found = batch(), {}
    for name, original in (("hook", plainly), ("method", telling), ("tensor", tensor)):
        model = moved(original)
        found[name] = compute_infinity_circuit_breaker_loss(
            trainer(original), model, inputs, [1, 2], 1.0, True
        )
    torch.testing.assert_close(found["method"][1], 2 * found["hook"][1])
    torch.testing.assert_close(found["method"][2], found["hook"][2])
    torch.testing.assert_close(found["tensor"], found["hook"])


def test_what_a_model_pads_does_not_count() -> None:
    plainly, padded = published(), published(multiple=8)
    inputs, options = batch(), infinity_rerouting([1, 2], retain_reduction="unmasked")
    found = []
    for original in (plainly, padded):
        how = dataclasses.replace(options, reference=original)
        terms = infinity_rerouting_loss(moved(original), inputs, (1.0, 1.0), how)
        found.append(terms.loss)
    torch.testing.assert_close(*found)


def test_a_text_mask_is_told_of_once_and_a_mask_of_the_states_is_used() -> None:
    original = tiny()
    model, inputs = moved(original), batch(x_BLC_wo_prefix=images())
    bare = compute_infinity_circuit_breaker_loss(trainer(original), model, inputs, [2])
    text = {f"attention_mask{e}": torch.ones(3, 512) for e in PARTS}
    with pytest.warns(UserWarning, match="the attention mask is the text's"):
        first = compute_infinity_circuit_breaker_loss(
            trainer(original), model, {**inputs, **text}, [2]
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compute_infinity_circuit_breaker_loss(trainer(original), model, {**inputs, **text}, [2])
    assert torch.equal(first, bare)  # type: ignore[arg-type]
    some = torch.ones(3, L, dtype=torch.long)
    some[:, 7:] = 0
    masked = compute_infinity_circuit_breaker_loss(
        trainer(original, 0), model, {**inputs, "attention_mask_circuit_breaker": some}, [2], 1.0
    )
    x = inputs["x_BLC_wo_prefix"]
    h, o = (states(m, inputs["text_cond_tuple_circuit_breaker"], x)[2] for m in (model, original))
    want = torch.cosine_similarity(h, o, dim=-1)[:, :7].relu().mean()
    torch.testing.assert_close(masked, want)
    nothing = {**inputs, "attention_mask_circuit_breaker": torch.zeros(3, L)}
    empty = compute_infinity_circuit_breaker_loss(trainer(original, 0), model, nothing, [2], 1.0)
    assert isinstance(empty, Tensor) and empty.item() == 0.0 and empty.requires_grad


@pytest.mark.parametrize(
    ("change", "layers", "message"),
    [
        ({"attention_mask": torch.ones(2, 512)}, [2], "attention_mask .* got \\(2, 512\\)"),
        ({}, [3], r"from 0 to 2 \(3 blocks"),
        ({}, [], "target_layers"),
        ({"text_cond_tuple_circuit_breaker": None}, [2], "no text_cond_tuple_circuit_breaker"),
    ],
)
def test_what_does_not_fit_is_named(
    change: dict[str, Any], layers: list[int], message: str
) -> None:
    original = tiny()
    inputs = {k: v for k, v in {**batch(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        compute_infinity_circuit_breaker_loss(trainer(original), moved(original), inputs, layers)


def test_nothing_to_compare_with() -> None:
    with pytest.raises(ValueError, match="needs a PEFT adapter, Infinity has none"):
        compute_infinity_circuit_breaker_loss(types.SimpleNamespace(), tiny(), batch(), [1])


def test_monitoring_tells_all_parts_and_changes_nothing() -> None:
    original = tiny()
    model, inputs = moved(original), batch()
    options = infinity_rerouting([1, 2], original)
    torch.manual_seed(5)
    quiet = infinity_rerouting_loss(model, inputs, (2.0, 3.0), options)
    want = gradients(model, quiet.loss)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    told = infinity_rerouting_loss(model, inputs, (2.0, 3.0), options, monitor=True)
    assert torch.equal(quiet.loss, told.loss) and torch.equal(torch.get_rng_state(), after)
    for name, gradient in gradients(model, told.loss).items():
        assert torch.equal(gradient, want[name])
    assert {"val_cosine", "val_norm", "cb_cosine", "retain_cosine"} < set(told.facts)
    assert not any(fact.requires_grad for fact in told.facts.values())


# -- weights, pictures ------------------------------------------------------------------------


def test_chosen_weights_of_chosen_blocks_train() -> None:
    model = tiny()
    names = unfreeze(model, InfinityArguments(selective_layers="0,2", unfreeze_attention=True))
    assert set(names) == {
        f"blocks.{n}.sa.mat_qkv.{part}" for n in (0, 2) for part in ("weight", "bias")
    }
    more = InfinityArguments(
        selective_layers="1", unfreeze_output=True, unfreeze_layernorm=True, unfreeze_mlp=True,
        unfreeze_cross_attention=True, freeze_embeddings=False,
    )  # fmt: skip
    found = unfreeze(model, more)
    tops = {name.split(".")[0] for name in found}
    assert tops == {"blocks", "word_embed", "lvl_embed", "pos_embed", "pos_start"}
    assert {name.split(".")[2] for name in found if name.startswith("blocks.")} == {
        *("sa", "ca", "ca_norm", "ffn", "ada_gss"),
    }
    assert "blocks.1.sa.mat_qkv.weight" not in found
    assert set(changed_weights(model)) == set(found)
    assert not any(weight.requires_grad for weight in frozen_copy(model).parameters())
    with pytest.raises(ValueError, match="unfreeze_mlp: the blocks 0 of Published have no weight"):
        unfreeze(published(), InfinityArguments(selective_layers="0", unfreeze_mlp=True))


def test_labels_whole_or_as_bits() -> None:
    logits, labels = torch.randn(2, 5, 8), torch.randint(8, (2, 5))
    want = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(label_loss(logits, labels), want)
    bits = torch.randint(2, (2, 5, 4))
    pairs = logits.view(2, 5, 4, 2).flatten(0, 2)
    want = nn.functional.cross_entropy(pairs, bits.flatten())
    torch.testing.assert_close(label_loss(logits, bits), want)
    torch.testing.assert_close(label_loss(logits, labels, [(1, 1, 5)]), label_loss(logits, labels))
    torch.testing.assert_close(label_loss(logits, bits, [(1, 1, 5)]), want)
    with pytest.raises(ValueError, match="do not go with logits"):
        label_loss(logits, labels[:, :4])


# -- the trainer ------------------------------------------------------------------------------

BENIGN = ["a red circle", "a blue square", "a green circle on white", "a yellow square"] * 2
HARMFUL = ["a red triangle", "a blue stripe", "a green triangle on white", "a yellow stripe"] * 2
needs_training = pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning")


def prompts(folder: Path) -> Any:
    import json

    for name, side in (("sanitized", BENIGN), ("harmful", HARMFUL)):
        (folder / f"{name}_prompts.json").write_text(json.dumps(side))
    return infinity.InfinityCircuitBreakerDataset(
        data_path=folder, text_encoder=WordEncoder(8), max_caption_len=12, validation_ratio=0.25
    )


def made(folder: Path, dataset: Any = None, steps: int = 12, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder), max_steps=steps, learning_rate=2e-2, lr_scheduler_type="constant",
        per_device_train_batch_size=4, logging_steps=4, report_to="none", save_strategy="no",
        use_cpu=True, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    torch.manual_seed(1)  # of lora_A
    model = options.pop("model", None) or tiny()
    return infinity.InfinityCircuitBreakerTrainer(
        model,
        arguments,
        train_dataset=prompts(folder) if dataset is None else dataset,
        infinity_args=InfinityArguments(
            **{"circuit_breaker_target_layers": "1,2", **options.pop("infinity_args", {})}
        ),
        scale_schedule=SCALES,
        peft_config=peft.LoraConfig(r=4, target_modules=lora_target_modules(model, range(3)))
        if options.pop("adapter", True)
        else None,
        **options,
    )


def logged(trained: Any) -> list[dict[str, float]]:
    return [line for line in trained.state.log_history if "circuit_breaker/cb_coeff" in line]


@needs_training
def test_training_turns_the_harmful_prompts(tmp_path: Path) -> None:
    ours = made(tmp_path, steps=60)
    before = {name: w.clone() for name, w in tiny().state_dict().items()}
    ours.train()
    first, *_, last = logged(ours)
    assert last["circuit_breaker/cb_cosine"] < 0.5 < last["circuit_breaker/retain_cosine"]
    assert last["circuit_breaker/retain_cosine"] > 0.9
    facts = {name.removeprefix("circuit_breaker/") for name in last if "/" in name}
    assert facts == {
        *("retain_coeff", "cb_coeff", "retain_loss", "cb_loss"),
        *(f"{part}_{fact}" for part in ("retain", "cb", "val")
          for fact in ("cosine", "norm", "reference_norm")),
    }  # fmt: skip
    assert last["circuit_breaker/cb_coeff"] == pytest.approx(0.05)
    base = ours.model.get_base_model().state_dict()
    for name, weight in base.items():
        if ".lora_" not in name:
            assert torch.equal(weight, before[name.replace(".base_layer", "")]), name
    assert (ours.prog_it, ours.max_it) == (60, 120)


@needs_training
def test_task_loss_is_added_where_the_batch_has_images(tmp_path: Path) -> None:
    dataset = WithPictures(prompts(tmp_path), BitQuantizer(), 0)
    ours = made(tmp_path, dataset)
    inputs = data_collator_infinity([dataset[0], dataset[1]])
    assert inputs["x_BLC_wo_prefix"].shape == (2, 84, 3) and inputs["labels"].shape == (2, 85)
    terms = ours.terms(ours.model, inputs, monitor=False)
    less = {k: v for k, v in inputs.items() if k != "labels"}
    alone = ours.terms(ours.model, less, monitor=False)
    torch.testing.assert_close(terms.loss, alone.loss + terms.facts["task_loss"])
    usual = made(tmp_path, dataset, infinity_args={"task_type": "t2i"}, steps=2)
    only = usual.terms(usual.model, inputs, monitor=True)
    assert set(only.facts) == {"task_loss", "loss"}
    torch.testing.assert_close(only.loss, only.facts["task_loss"])
    usual.train()
    with pytest.raises(ValueError, match="has nothing to train on"):
        usual.terms(usual.model, less, monitor=False)
    first = dataset[0]["labels"]
    assert torch.equal(first, dataset[0]["labels"])
    dataset.set_epoch(7)
    assert not torch.equal(first, dataset[0]["labels"])


@needs_training
def test_weights_train_against_a_frozen_copy_and_prediction_has_no_logits(tmp_path: Path) -> None:
    model = tiny()
    reference: Any = frozen_copy(model)
    unfreeze(model, InfinityArguments(selective_layers="0,1,2", unfreeze_mlp=True))
    ours = made(tmp_path, model=model, adapter=False, reference=reference)
    assert not torch.equal(model.blocks[0].ffn.fc1.weight, reference.blocks[0].ffn.fc1.weight)
    assert torch.equal(model.head.weight, reference.head.weight)
    ours.train()
    assert torch.equal(model.head.weight, reference.head.weight)
    inputs = data_collator_infinity([ours.train_dataset[0]])
    loss, logits, labels = ours.prediction_step(ours.model, inputs, True)
    assert loss.item() > 0 and logits is None and labels is None
    loss, facts = ours.compute_loss(ours.model, inputs, return_outputs=True, num_items_in_batch=3)
    assert loss.requires_grad and {"retain_loss", "cb_loss"} <= set(facts)


def test_public_names_load() -> None:
    assert set(infinity.__all__) <= set(dir(infinity))
    for name in infinity.__all__:
        assert getattr(infinity, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = infinity.nothing


def test_lora_finds_blocks_in_chunks() -> None:
    peft = pytest.importorskip("peft")
    model = published()
    names = lora_target_modules(model, [1, 2], ["mat_qkv", "fc1", "linear", "proj"])
    assert names and all(n.startswith(("block_chunks.0.", "block_chunks.1.")) for n in names)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    assert sum("lora_A" in name for name, _ in adapted.named_parameters()) == len(names)


@needs_training
def test_lora_that_the_model_passes_by_is_refused(tmp_path: Path) -> None:
    """FoundationVision's attention multiplies by a layer's weight and never calls the layer."""
    model = tiny()
    for block in model.blocks:
        layer = block.ffn.fc1

        def by_weight(x: Tensor, layer: Any = layer, ffn: Any = block.ffn) -> Tensor:
            hidden = nn.functional.linear(x, layer.weight, layer.bias)
            return ffn.fc2(nn.functional.gelu(hidden, approximate="tanh"))

        block.ffn.forward = by_weight
    with pytest.raises(RuntimeError, match=r"get no gradient .*fc1.*lora_target_modules"):
        made(tmp_path, model=model, steps=2).train()


@needs_training
def test_the_trainer_unfreezes_what_it_is_told(tmp_path: Path) -> None:
    model = tiny()
    told = {"unfreeze_mlp": True, "selective_layers": "0"}
    made(tmp_path, model=model, adapter=False, reference=copy.deepcopy(model), infinity_args=told)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(name.startswith("blocks.0.ffn.") for name in trained)


@needs_training
def test_the_data_set_is_told_its_epoch(tmp_path: Path) -> None:
    """accelerate tells the sampler instead where it shards batches over processes."""
    ours = made(tmp_path, steps=6)
    watch = next(c for c in ours.callback_handler.callbacks if type(c).__name__ == "_Watch")
    ours.state.epoch = 2.0
    watch.on_epoch_begin(ours.args, ours.state, ours.control)
    assert ours.train_dataset.epoch == 2


@pytest.mark.parametrize("alpha", [float("nan"), -1.0, float("inf")])
def test_an_alpha_that_is_no_weight_is_refused(alpha: float) -> None:
    original = tiny()
    with pytest.raises(ValueError, match="alpha"):
        compute_infinity_circuit_breaker_loss(
            trainer(original), moved(original), batch(), [1], alpha, scale_schedule=SCALES
        )
