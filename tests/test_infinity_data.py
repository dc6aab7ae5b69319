"""The Infinity dataset and its collator: files, split, items, batches, encoders, errors."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from onepass.circuit_breaker.infinity.data import (
    InfinityCircuitBreakerDataset,
    build_circuit_breaker_dataset,
    data_collator_infinity,
)
from onepass.circuit_breaker.infinity.pretrain import small_model
from onepass.circuit_breaker.infinity.text import T5TextEncoder, WordEncoder, as_text_encoder

KEYS = {
    f"{name}{kind}"
    for name in ("text_cond_tuple", "input_ids", "attention_mask")
    for kind in ("", "_circuit_breaker", "_val")
}
BENIGN = [f"a red circle number {n}" + " or so" * (n % 3) for n in range(20)]
HARMFUL = [f"a blue triangle number {n}" for n in range(7)]
Make = Callable[..., InfinityCircuitBreakerDataset]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sanitized_prompts.json").write_text(json.dumps(BENIGN), "utf-8")
    (tmp_path / "harmful_prompts.json").write_text(json.dumps(HARMFUL), "utf-8")
    return tmp_path


@pytest.fixture
def make(folder: Path) -> Make:
    def make(**changes: Any) -> InfinityCircuitBreakerDataset:
        paths = {"harmful_prompts_path": folder, "sanitized_prompts_path": folder}
        options: dict[str, Any] = {"text_encoder": WordEncoder(), "validation_ratio": 0.2}
        return InfinityCircuitBreakerDataset(**(options | paths | changes))

    return make


def texts(prompts: list[Any]) -> list[str]:
    return [prompt.text for prompt in prompts]


# -- files and split --------------------------------------------------------------------------


def test_split(make: Make) -> None:
    dataset = make()
    assert texts(dataset.circuit_breaker) == HARMFUL
    assert len(dataset.validation) == 4 and len(dataset.retain) == 16
    assert sorted(texts(dataset.validation + dataset.retain)) == sorted(BENIGN)
    assert texts(dataset.validation) != BENIGN[:4]  # drawn
    assert len(dataset) == 4
    assert texts(make().retain) == texts(dataset.retain)
    assert texts(make(seed=1).retain) != texts(dataset.retain)
    assert len(make(validation_ratio=0.99).validation) == int(20 * 0.99)


def test_every_prompt_gets_its_turn(make: Make) -> None:
    dataset = make(max_caption_len=16)
    kinds = {"": dataset.retain, "_circuit_breaker": dataset.circuit_breaker}
    seen: dict[str, set[tuple[int, ...]]] = {kind: set() for kind in kinds}
    for epoch in range(4):
        dataset.set_epoch(epoch)
        for i in range(len(dataset)):
            for kind in kinds:
                seen[kind].add(tuple(dataset[i]["input_ids" + kind].tolist()))
    for kind, prompts in kinds.items():
        assert len(seen[kind]) == len(prompts)


def test_accelerate_moves_the_epoch_on(make: Make) -> None:
    accelerate = pytest.importorskip("accelerate")
    dataset = make()
    loader = accelerate.Accelerator(cpu=True).prepare(
        DataLoader(dataset, batch_size=2, collate_fn=data_collator_infinity)  # type: ignore[arg-type]
    )
    loader.set_epoch(3)
    assert dataset.epoch == 3


@pytest.mark.parametrize(
    ("present", "read"),
    [
        (["retain_prompts.json", "sanitized_prompts.json"], "retain_prompts.json"),
        (["cats_sanitized_prompts.json", "retain_prompts.json"], "cats_sanitized_prompts.json"),
        (["cats_sanitized_prompts.jsonl", "retain_prompts.json"], "cats_sanitized_prompts.jsonl"),
    ],
)
def test_sanitized_files_in_order(
    make: Make, tmp_path: Path, present: list[str], read: str
) -> None:
    side = tmp_path / "side"
    side.mkdir()
    for name in present:
        rows = [json.dumps(name + str(n)) for n in range(10)]
        text = "\n".join(rows) if name.endswith("l") else f"[{','.join(rows)}]"
        (side / name).write_text(text, "utf-8")
    dataset = make(sanitized_prompts_path=side, category="cats")
    assert {prompt.file.name for prompt in dataset.retain} == {read}


@pytest.mark.parametrize(
    ("present", "read"),
    [
        (["circuit_breaker_prompts.json", "harmful_prompts.json"], "circuit_breaker_prompts.json"),
        (["cats_prompts.json", "circuit_breaker_prompts.json"], "cats_prompts.json"),
    ],
)
def test_harmful_files_in_order(make: Make, tmp_path: Path, present: list[str], read: str) -> None:
    side = tmp_path / "side"
    side.mkdir()
    for name in present:
        (side / name).write_text(json.dumps([name]), "utf-8")
    assert texts(make(harmful_prompts_path=str(side), category="cats").circuit_breaker) == [read]


def test_one_file_of_pairs_serves_both_sides(make: Make, tmp_path: Path) -> None:
    pairs = [{"original_prompt": f"bad {n}", "sanitized_prompt": f"good {n}"} for n in range(10)]
    file = tmp_path / "pairs.json"
    file.write_text(json.dumps({"prompts": pairs}), "utf-8")
    dataset = make(harmful_prompts_path=file, sanitized_prompts_path=file)
    assert all(text.startswith("bad") for text in texts(dataset.circuit_breaker))
    assert all(text.startswith("good") for text in texts(dataset.retain + dataset.validation))


def test_category(make: Make, tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}", "category": "cats" if n % 2 else "dogs"} for n in range(10)]
    file = tmp_path / "mixed.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    dataset = make(harmful_prompts_path=file, category="cats")
    assert texts(dataset.circuit_breaker) == ["1", "3", "5", "7", "9"]
    assert len(make(harmful_prompts_path=file).circuit_breaker) == 10
    with pytest.raises(ValueError, match="no prompt of category 'birds', found cats, dogs"):
        make(harmful_prompts_path=file, category="birds")


def test_num_examples(make: Make) -> None:
    dataset = make(num_examples=3)
    assert (len(dataset.retain), len(dataset.circuit_breaker), len(dataset)) == (3, 3, 3)
    assert len(make(args=SimpleNamespace(num_examples=2)).retain) == 2
    assert len(make(num_examples=1000)) == 4


# -- items ------------------------------------------------------------------------------------


def check_condition(condition: Any, n_prompts: int) -> None:
    kv_compact, lens, starts, longest = condition
    assert isinstance(lens, list) and len(lens) == n_prompts and longest == max(lens)
    assert kv_compact.shape == (sum(lens), 32) and kv_compact.dtype == torch.float32
    assert isinstance(starts, Tensor) and starts.dtype == torch.int32
    assert starts.tolist() == [sum(lens[:n]) for n in range(n_prompts + 1)]


def test_items(make: Make) -> None:
    dataset = make()
    encoder = WordEncoder()
    for i in range(len(dataset)):
        item = dataset[i]
        assert item.keys() == KEYS
        sides = {
            "": dataset.retain,
            "_circuit_breaker": dataset.circuit_breaker,
            "_val": dataset.validation,
        }
        for kind, prompts in sides.items():
            condition, mask = item["text_cond_tuple" + kind], item["attention_mask" + kind]
            check_condition(condition, 1)
            assert item["input_ids" + kind].shape == mask.shape == (512,)
            assert condition[1] == [int(mask.sum())]  # as many features as tokens
            ids, mask = encoder.tokenize([prompts[i].text], 512)
            assert torch.equal(item["input_ids" + kind], ids[0])
            assert torch.equal(condition[0], encoder.features(ids, mask)[0])
    assert torch.equal(dataset[-1]["input_ids"], dataset[len(dataset) - 1]["input_ids"])
    with pytest.raises(IndexError, match="item 4 of 4"):
        dataset[4]
    assert len(list(dataset)) == 4  # type: ignore[call-overload]  # ends by the IndexError


def test_captions_are_cut(make: Make) -> None:
    item = make(max_caption_len=4)[0]
    assert item["input_ids"].shape == (4,) and item["text_cond_tuple"][1] == [4]


def test_without_validation(make: Make) -> None:
    dataset = make(validation_ratio=0)
    assert len(dataset) == len(HARMFUL)
    assert dataset[0].keys() == {key for key in KEYS if not key.endswith("_val")}


# -- batches ----------------------------------------------------------------------------------


def test_collator_there_and_back(make: Make) -> None:
    dataset = make()
    items = [dataset[i] for i in range(3)]
    batch = data_collator_infinity(items)
    assert batch.keys() == KEYS
    for key, value in batch.items():
        if not key.startswith("text_cond_tuple"):
            assert torch.equal(value, torch.stack([item[key] for item in items]))
            continue
        check_condition(value, 3)
        kv_compact, lens, starts, _ = value
        for i, item in enumerate(items):
            assert torch.equal(kv_compact[starts[i] : starts[i + 1]], item[key][0])
            assert lens[i : i + 1] == item[key][1]
    lens = batch["text_cond_tuple"][1]
    assert len(set(lens)) > 1  # prompts of several lengths, or the sums would prove little


def test_collator_through_a_loader_into_the_model(make: Make) -> None:
    model = small_model().eval()
    loader = DataLoader(make(), batch_size=3, collate_fn=data_collator_infinity)  # type: ignore[arg-type]
    schedule = [(1, 1, 1), (1, 2, 2)]
    sizes = []
    for batch in loader:
        n_prompts = len(batch["input_ids"])
        sizes.append(n_prompts)
        for kind in ("", "_circuit_breaker", "_val"):
            x = torch.zeros(n_prompts, 4, 3)
            assert model(batch["text_cond_tuple" + kind], x, schedule).shape == (n_prompts, 5, 8)
    assert sizes == [3, 1]


def test_collator_takes_numbers_and_refuses_the_rest() -> None:
    batch = data_collator_infinity([{"n": 1, "x": 0.5}, {"n": 2, "x": 1.5}])
    assert batch["n"].tolist() == [1, 2] and batch["x"].tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="got no items"):
        data_collator_infinity([])
    with pytest.raises(ValueError, match="got str under 'prompt', wanted tensors or numbers"):
        data_collator_infinity([{"prompt": "a"}])
    with pytest.raises(ValueError, match="'n' is in some items only"):
        data_collator_infinity([{"n": 1}, {"m": 1}])
    with pytest.raises(ValueError, match="'m' is in some items only"):
        data_collator_infinity([{"n": 1}, {"n": 1, "m": 1}])


# -- encoders ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 encoder of random weights with a tokenizer of a few words, saved as T5s are."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("t5")
    words = ["<pad>", "</s>", "<unk>", *"a red blue circle triangle number or so".split()]
    vocabulary = {word: n for n, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(folder)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 4}
    config = transformers.T5Config(vocab_size=len(words), **sizes)
    transformers.T5EncoderModel(config).save_pretrained(folder)
    return folder


def test_t5(t5: Path, make: Make) -> None:
    encoder = T5TextEncoder.from_pretrained(t5)
    dataset = make(text_encoder=str(t5))
    item = dataset[0]
    assert item.keys() == KEYS
    for kind in ("", "_circuit_breaker", "_val"):
        check_condition(item["text_cond_tuple" + kind], 1)
        ids, mask = item["input_ids" + kind][None], item["attention_mask" + kind][None]
        assert ids.shape == (1, 512)
        with torch.no_grad():  # over all 512 positions, as the published script does
            whole = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state[0]
        features = item["text_cond_tuple" + kind][0]
        torch.testing.assert_close(features, whole[: int(mask.sum())], atol=1e-5, rtol=1e-5)
    assert not encoder.model.training
    assert not any(p.requires_grad for p in encoder.model.parameters())
    half = T5TextEncoder.from_pretrained(t5, dtype=torch.bfloat16)
    assert half.features(*half.tokenize(["a red circle"]))[0].dtype == torch.float32


def test_where_the_encoder_comes_from(t5: Path, make: Make) -> None:
    loaded = T5TextEncoder.from_pretrained(t5)
    pair = {"text_encoder": loaded.model, "text_tokenizer": loaded.tokenizer}
    wanted = make(text_encoder=t5)[0]["text_cond_tuple"][0]
    for changes in (
        pair,
        {"text_encoder": None, "args": SimpleNamespace(**pair)},
        {"text_encoder": None, "args": SimpleNamespace(t5_path=str(t5))},
        {"text_encoder": None, "args": SimpleNamespace(text_encoder=loaded)},
    ):
        features = make(**changes)[0]["text_cond_tuple"][0]
        torch.testing.assert_close(features, wanted)


def test_encoders_refused(t5: Path, make: Make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="text_encoder: got nothing"):
        make(text_encoder=None)
    with pytest.raises(ValueError, match="text_encoder: got nothing"):
        make(text_encoder=None, args=SimpleNamespace(t5_path=""))
    with pytest.raises(ValueError, match="T5EncoderModel alone, wanted its text_tokenizer"):
        make(text_encoder=T5TextEncoder.from_pretrained(t5).model)
    for wrong in (3, T5TextEncoder.from_pretrained(t5).tokenizer):
        with pytest.raises(ValueError, match="text_encoder: got .*, wanted the name or folder"):
            as_text_encoder(wrong)
    with pytest.raises(FileNotFoundError, match="is no folder with a T5") as caught:
        as_text_encoder(tmp_path / "none")
    assert "\n" not in str(caught.value)


# -- the function, and what is refused --------------------------------------------------------


def test_built_as_the_training_script_does(folder: Path) -> None:
    args = SimpleNamespace(text_encoder=WordEncoder(), num_examples=1000)
    dataset = build_circuit_breaker_dataset(
        args,
        str(folder),
        {"1:1": 512},
        max_caption_len=64,
        short_prob=0.2,
        load_vae_instead_of_image=False,
        harmful_prompts_path=None,
        sanitized_prompts_path=None,
        validation_ratio=0.1,
        category="general",
        buffersize=10_000,
        pn="1M",
        online_t5=True,
    )
    assert isinstance(dataset, InfinityCircuitBreakerDataset)
    assert len(dataset) == 2 and dataset[1]["input_ids"].shape == (64,)


@pytest.mark.parametrize("ratio", [1, 1.5, -0.1, math.nan, math.inf])
def test_ratio_out_of_range(make: Make, ratio: float) -> None:
    with pytest.raises(ValueError, match=rf"validation_ratio must be .*: got {ratio}"):
        make(validation_ratio=ratio)


def test_a_split_that_leaves_nothing(make: Make, tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("a red circle", "utf-8")
    with pytest.raises(
        ValueError, match=r"validation_ratio=0.2 of 1 examples of .*one\.txt leaves"
    ):
        make(sanitized_prompts_path=file)
    assert len(make(sanitized_prompts_path=file, validation_ratio=0)) == 1
    file.write_text("a red circle\na blue square", "utf-8")
    dataset = make(sanitized_prompts_path=file)  # a share of 0.4 of a prompt is one
    assert len(dataset.retain) == len(dataset.validation) == 1


def test_arguments_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="num_examples: got 0"):
        make(num_examples=0)
    with pytest.raises(ValueError, match="max_caption_len: got 0"):
        make(max_caption_len=0)
    with pytest.raises(ValueError, match="harmful_prompts_path: got nothing"):
        make(harmful_prompts_path=None)
    with pytest.raises(ValueError, match="sanitized_prompts_path: got nothing"):
        make(sanitized_prompts_path="")


def test_files_refused(make: Make, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for name in ("harmful_prompts_path", "sanitized_prompts_path"):
        with pytest.raises(FileNotFoundError, match="found no prompt file, wanted"):
            make(**{name: empty})
        with pytest.raises(FileNotFoundError, match="no such file"):
            make(**{name: tmp_path / "none.json"})
    (empty / "harmful_prompts.json").write_text("[]", "utf-8")
    with pytest.raises(ValueError, match=r"harmful_prompts\.json: holds no prompt"):
        make(harmful_prompts_path=empty)
    (empty / "harmful_prompts.json").write_text('["a",\n{"prompt": 3}]', "utf-8")
    with pytest.raises(ValueError, match=r"harmful_prompts\.json: entry 2: got a number"):
        make(harmful_prompts_path=empty)
    (empty / "rows.jsonl").write_text('"a"\n{"sanitized_prompt": "b"}', "utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: got an object with sanitized_prompt"):
        make(harmful_prompts_path=empty / "rows.jsonl")
