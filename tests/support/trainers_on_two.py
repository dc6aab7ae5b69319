"""The three trainers, and transformers' own over a lazy head, on two processes: curves, weights,
checkpoints and gathers. `curve` is the truth too, run alone in one process."""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from onepass import lazy_head
from onepass.circuit_breaker import (
    CircuitBreakerDataset,
    CircuitBreakerTrainer,
    LoraArguments,
    LorraArguments,
    lora_config,
)
from onepass.dpo import DPOArguments, DPOTrainer
from onepass.jigsaw import JigsawArguments, JigsawTrainer
from onepass.jigsaw import models as jigsaw_models
from onepass.jigsaw.data import JigsawDataset, NoiseTokenizer
from onepass.jigsaw.evaluate import attacks_on, measure
from onepass.jigsaw.trainer import lora_config as jigsaw_lora
from onepass.training.flags import LoraFlags
from onepass.training.lora import lora_in_blocks
from onepass.training.processes import shard_now
from onepass.training.prompts import Prompt

from .launched import allow
from .processes import answer, join, leave
from .tiny_language_model import model, tokenizer

STEPS, BATCHES = 3, 4  # BATCHES of one row a step, on all processes together
TEXTS = [f"the {word} barn{' is far' * (n % 3)} away" for n, word in enumerate("abcdefgh")]
CODE = [f"def f{n}(x):\n    return x{' + 1' * (n % 4)}\n" for n in range(8)]
REENTRANT = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
}
CHECKPOINTED = REENTRANT | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ENGINES = {"ddp": {}, "fsdp2": FSDP, "fsdp2_sharded_files": FSDP | {
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}}  # fmt: skip


def arguments(folder: Path, **options: Any) -> Any:
    n = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = dict(
        output_dir=str(folder), max_steps=STEPS, learning_rate=5e-3, lr_scheduler_type="linear",
        per_device_train_batch_size=1, gradient_accumulation_steps=BATCHES // n, logging_steps=1,
        report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False,
    )  # fmt: skip
    settings |= options
    known = transformers.TrainingArguments.__dataclass_fields__
    for name in ("gradient_checkpointing", "gradient_checkpointing_kwargs"):
        if name in settings and "activation_checkpointing" in known:  # its name from 5.2x on
            settings[name.replace("gradient", "activation")] = settings.pop(name)
    return transformers.TrainingArguments(**settings)


def circuit_breaker(folder: Path, frozen: bool = False, **options: Any) -> Any:
    base, lorra = model(), LorraArguments(lorra_alpha=10.0, init_jitter=0.1, model_max_length=32)
    data = CircuitBreakerDataset(tokenizer(), None, lorra, retain=TEXTS, harmful=CODE, val=CODE[:2])
    return CircuitBreakerTrainer(
        base,
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data,
        lorra_args=lorra,
        reference=model().requires_grad_(False) if frozen else "adapter_off",
        peft_config=lora_config(base, LoraArguments(lora_r=4, lora_dropout=0.0), lorra),
    )


def pairs() -> list[dict[str, str]]:
    return [
        {
            "prompt": f"is {text}?",
            "chosen": " yes" + "!" * n,
            "rejected": " no" + " never" * (n % 3),
        }
        for n, text in enumerate(TEXTS)
    ]


def dpo(
    folder: Path, rank: int = 4, dpo: dict[str, Any] | None = None, slab: int = 0, **options: Any
) -> Any:
    base = model(2)
    if slab:
        lazy_head(base, max_slab_bytes=slab)
    return DPOTrainer(
        base,
        args=arguments(folder, **options),
        train_dataset=pairs(),
        eval_dataset=pairs()[:5],
        tokenizer=tokenizer(),
        peft_config=lora_in_blocks(base, LoraFlags(lora_r=rank, lora_alpha=8)) if rank else None,
        dpo_args=DPOArguments(**(dpo or {})),
    )


def jigsaw(folder: Path, **options: Any) -> Any:
    base, settings = model(2), JigsawArguments()
    marking = NoiseTokenizer(tokenizer())
    prompts = [Prompt(text, {"text": text}, Path("texts"), None, None) for text in TEXTS]
    return JigsawTrainer(
        base,
        arguments(folder, **options),
        marking.collate,
        JigsawDataset(marking, prompts),
        jigsaw_args=settings,
        peft_config=jigsaw_lora(base, LoraFlags(lora_r=4, lora_dropout=0.0), settings),
    )


def stock(folder: Path, **options: Any) -> Any:
    """transformers' trainer and loss, divided by num_items_in_batch; rows have 1 to 8 labels."""

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    data = []
    for n, text in enumerate(TEXTS):
        ids = torch.tensor(tokenizer()(text)["input_ids"][:12])
        data.append({"input_ids": ids, "labels": torch.where(torch.arange(12) < 11 - n, -100, ids)})
    return transformers.Trainer(lazy_head(model(2)), arguments(folder, **options), collate, data)


# transformers 5.17 asks torch for the device "cpu:0" as DDP's optimizer is loaded.
LOADS_ON_CPU = '.type != "cpu"' in inspect.getsource(
    transformers.Trainer._load_optimizer_and_scheduler
)
SYSTEMS: dict[str, Callable[..., Any]] = {
    "circuit_breaker": circuit_breaker,
    "dpo": dpo,
    "jigsaw": jigsaw,
    "stock": stock,
}


@contextmanager
def one_noise() -> Iterator[None]:
    """The noise of a jigsaw batch by its place in the training, whichever process has it."""
    n, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    batches = iter(range(rank, 10**6, n))

    def seed(device: torch.device) -> Tensor:
        return torch.tensor(1000 + next(batches), dtype=torch.int64, device=device)

    with mock.patch.object(jigsaw_models, "_training_seed", seed):
        yield


def logged(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def measured(trainer: Any) -> dict[str, float]:
    if not isinstance(trainer, JigsawTrainer):
        return {"loss": trainer.evaluate()["eval_loss"]}
    shard_now(trainer, "run")  # as the command does
    pair: Any = trainer.model
    items = trainer.train_dataset
    batches = [trainer.data_collator([items[n], items[n + 1]]) for n in range(0, len(items), 2)]
    with mock.patch.object(jigsaw_models, "_training_seed", lambda device: torch.tensor(5)):
        return measure(pair, batches, attacks_on(pair.base, pair.cloak))


def curve(system: str, folder: Path, measures: bool = False, **options: Any) -> dict[str, Any]:
    """What a training logs, and the folder of what it saved."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SYSTEMS[system](folder, **options)
        found: dict[str, Any] = {}
        if measures:  # before the training, as the commands do
            found["before"] = measured(trainer)
        with one_noise():
            trainer.train()
        if measures:
            found["after"] = measured(trainer)
        trainer.save_model(str(folder / "saved"))
    return found | {"lines": logged(trainer)}


def weights(folder: Path) -> dict[str, Tensor]:
    """All that lies in a folder and those in it."""
    files = sorted(folder.rglob("*.safetensors"))
    assert files, f"nothing is saved in {folder}"
    return {f"{f.parent.name}/{name}": v for f in files for name, v in load_file(f).items()}


def check(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Equal up to another order of summation."""
    assert len(found["lines"]) == len(wanted["lines"])
    for line, truth in zip(found["lines"], wanted["lines"], strict=True):
        for name in set(line) & set(truth) - {"epoch"}:
            difference = abs(line[name] - truth[name])
            assert difference <= 2e-4 * abs(truth[name]) + 2e-5, (name, line, truth)
    for name in {"before", "after"} & wanted.keys():
        for fact, value in wanted[name].items():
            assert abs(found[name][fact] - value) <= 1e-3 * abs(value) + 1e-6, (name, fact, found)


def same_as(system: str, truths: Path, folder: Path, of: str = "", **options: Any) -> None:
    """The curve and what is saved are those of one process. `of`: the truth's name."""
    truth = truths / (of or system)
    check(curve(system, folder, **options), json.loads((truth / "curve.json").read_text()))
    dist.barrier()
    if os.environ.get("FSDP_STATE_DICT_TYPE") == "SHARDED_STATE_DICT":
        return  # transformers saves its checkpoints alone
    found, wanted = weights(folder / "saved"), weights(truth / "saved")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=2e-4, msg=name)


def refuses(system: str, folder: Path, error: type[Exception], text: str, **options: Any) -> None:
    try:
        curve(system, folder, **options)
    except error as told:
        assert text in str(told), told
        return
    raise AssertionError("nothing was refused")


def resumes(
    system: str, truths: Path, folder: Path, of: str = "", measures: bool = False, **options: Any
) -> None:
    """From a checkpoint, a new trainer goes on with the same curve."""
    every = {"save_strategy": "steps", "save_steps": 2}
    same_as(system, truths, folder, of, measures=measures, **every, **options)
    if "FSDP_VERSION" not in os.environ and "deepspeed" not in options and not LOADS_ON_CPU:
        return  # transformers cannot
    with warnings.catch_warnings(), one_noise():
        warnings.simplefilter("ignore")
        again = SYSTEMS[system](folder, **every, **options)
        if measures:
            measured(again)
        for _ in range(2 * BATCHES // dist.get_world_size()):  # what was drawn until then
            jigsaw_models._training_seed(torch.device("cpu"))
        again.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    check({"lines": logged(again)}, json.loads((truths / system / "curve.json").read_text()))


def gathers(folder: Path) -> None:
    """FSDP2 gathers the head once for the passes of a batch, the reference's too, and the backward;
    not for each of its slabs."""
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    real = getattr(dist, name)
    for slab in (0, 260 * 4 * 2):  # of two rows
        trainer = dpo(folder / str(slab), slab=slab, max_steps=1)
        shard_now(trainer)
        shard = trainer.model.get_output_embeddings().weight.to_local().flatten().clone()
        found: list[bool] = []

        def note(*args: Any, shard: Any = shard, found: Any = found, **kwargs: Any) -> Any:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            found.append(any(torch.equal(each.flatten(), shard) for each in given))
            return real(*args, **kwargs)

        with mock.patch.object(dist, name, note), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train()
        assert sum(found) == BATCHES // dist.get_world_size(), (slab, found)
        assert len(found) > 2 * sum(found), "the blocks are gathered too"


def cases(truths: Path, folder: Path) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {}

    def add(engine: str, name: str, case: Callable[..., None], *args: Any, **options: Any) -> None:
        def run() -> None:
            with mock.patch.dict(os.environ, ENGINES[engine]):
                case(*args, **options)

        found[f"{engine}-{name}"] = run

    precomputed = {"dpo": {"precompute_ref_log_probs": True}}
    for engine in ("ddp", "fsdp2"):
        for system, more in (
            ("circuit_breaker", {"frozen": True}), ("dpo", precomputed), ("jigsaw", {}),
        ):  # fmt: skip
            at = folder / engine / system
            add(engine, f"{system}-checkpointed", same_as, system, truths, at / "c",
                **CHECKPOINTED, **more)  # fmt: skip
            # A step runs it twice; older transformers call FSDP2's hooks inside of a checkpoint.
            old = "__call__" in vars(GradientCheckpointingLayer)
            if system == "circuit_breaker" and (engine == "ddp" or old):
                add(engine, f"{system}-reentrant", refuses, system, at / "r", RuntimeError,
                    "use_reentrant=True on several processes", **REENTRANT)  # fmt: skip
            else:
                add(engine, f"{system}-reentrant", same_as, system, truths, at / "r", **REENTRANT)
            add(engine, f"{system}-resumed", resumes, system, truths, at,
                of=f"{system}_measured", measures=True)  # fmt: skip
        at = folder / engine
        add(engine, "dpo-all_weights", same_as, "dpo", truths, at / "a", "all_weights", rank=0)
        add(engine, "stock", same_as, "stock", truths, at / "stock")
    for system in ("dpo", "jigsaw"):
        at = folder / "sharded_files" / system
        add("fsdp2_sharded_files", f"{system}-resumed", resumes, system, truths, at)
    add("fsdp2", "gathers", gathers, folder / "g")
    return found


TRUTHS: dict[str, tuple[str, dict[str, Any]]] = {
    **{system: (system, {}) for system in SYSTEMS},
    "circuit_breaker_measured": ("circuit_breaker", {"measures": True}),
    "dpo_measured": ("dpo", {"measures": True}),
    "jigsaw_measured": ("jigsaw", {"measures": True}),
    "all_weights": ("dpo", {"rank": 0}),
}
CASES = list(cases(Path(), Path()))


def truths(folder: Path) -> None:
    for name, (system, options) in TRUTHS.items():
        found = curve(system, folder / name, **options)
        (folder / name / "curve.json").write_text(json.dumps(found), encoding="utf-8")


def main(rank: int, rendezvous: str, truths: str, folder: str) -> None:
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}  # accelerate asks
    join(rank, rendezvous)
    allow()
    answer(cases(Path(truths), Path(folder)), Path(folder), rank)
    leave()


if __name__ == "__main__":
    if os.environ["WORLD_SIZE"] == "1":
        del os.environ["LOCAL_RANK"]  # no launch: accelerate joins nothing
        truths(Path(sys.argv[3]))
    else:
        main(int(sys.argv[1]), *sys.argv[2:])
