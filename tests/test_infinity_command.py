"""`onepass train infinity-circuit-breaker`: its flags, what it refuses, whole small runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from onepass.circuit_breaker.infinity.captions import captions
from onepass.circuit_breaker.infinity.config import InfinityConfig
from onepass.circuit_breaker.infinity.model import Infinity
from onepass.circuit_breaker.infinity.pretrain import small_model
from onepass.circuit_breaker.infinity.trainer import InfinityCircuitBreakerTrainer
from onepass.cli.dispatch import main

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory':UserWarning"),
]

SYSTEM = "infinity-circuit-breaker"
ADAPTER = "adapter_model.safetensors"
TINY = InfinityConfig(embed_dim=16, depth=3, num_heads=2, text_channels=8, text_maxlen=24)

OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(6, 6)

    def forward(self, x):
        return x + self.fc1(x).tanh()

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.word_embed, self.text, self.head = nn.Linear(3, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, condition, x, scale_schedule):
        text, lens, _, _ = condition
        means = torch.stack([part.mean(0) for part in text.split(lens)])
        x = torch.cat([self.text(means)[:, None], self.word_embed(x)], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

def model():
    torch.manual_seed(0)
    return Own()

def nothing():
    return 3

def shallow():
    return nn.Linear(2, 2)
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def onepass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs the command in a folder with prompts and a model; returns code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    benign = {"category": "general", "prompts": captions("benign")[:20]}
    (tmp_path / "sanitized_prompts.json").write_text(json.dumps(benign))
    (tmp_path / "harmful_prompts.json").write_text(json.dumps(captions("harmful")[:20]))
    small_model(0, TINY).save_pretrained(tmp_path / "model")

    def run(*tokens: str) -> tuple[int, str, str]:
        code = main(["train", SYSTEM, *tokens])
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


PROMPTS = ("--harmful_prompts_path", ".", "--sanitized_prompts_path", ".")
GIVEN = ("--model", "model", *PROMPTS, "--circuit_breaker_target_layers", "1,2",
         "--selective_layers", "0,1,2", "--output_dir", "run")  # fmt: skip
QUICK = ("--max_steps", "8", "--save_steps", "4", "--logging_steps", "2", "--use_cpu",
         "--per_device_train_batch_size", "2", "--learning_rate", "1e-2",
         "--no_gradient_checkpointing")  # fmt: skip
RESUME = ("--output_dir", "run", "--resume_from_checkpoint")


# -- refusals: one line, exit code 2, before anything is written ------------------------------


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (("--harmful_prompts_path", "."), "--sanitized_prompts_path: got nothing"),
        (("--model", "model"), "wanted both with --model"),
        (("--category", "x"), "--category: wanted prompt files with it"),
        ((*PROMPTS, "--model", "none"), "--model: got 'none', wanted a folder"),
        ((*PROMPTS, "--model", "data"), "no config.json, wanted a folder of save_pretrained"),
        ((*PROMPTS, "--model", "m.n:f"), "--text_encoder: got nothing, wanted a T5"),
        (
            (*PROMPTS, "--model", "m.n:f", "--text_encoder", "t5", "--task_type", "t2i"),
            "--pictures are those of the small model",
        ),
        ((*GIVEN, "--circuit_breaker_target_layers", "3"), "wanted blocks from 0 to 2"),
        ((*GIVEN, "--circuit_breaker_target_layers", "one"), "must be whole numbers"),
        ((*GIVEN, "--circuit_breaker_target_layers", "1,1"), "must be different numbers from 0"),
        ((*GIVEN, "--selective_layers", "7"), "--selective_layers: got 7"),
        (
            (*GIVEN, "--circuit_breaker_target_layers", "0", "--selective_layers", "1"),
            "wanted blocks from 0 to 0: those after it are not run",
        ),
        ((*GIVEN, "--scale_schedule", "2x2"), "--scale_schedule must be the like of 1x1x1"),
        ((*GIVEN, "--scale_schedule", "1x2x2"), "--scale_schedule must begin with 1x1x1"),
        ((*GIVEN, "--validation_ratio", "1"), "--validation_ratio: got 1.0"),
        ((*GIVEN, "--validation_ratio", "nan"), "--validation_ratio: got nan"),
        ((*GIVEN, "--num_examples", "0"), "--num_examples: got 0"),
        ((*GIVEN, "--circuit_breaker_alpha", "-1"), "--circuit_breaker_alpha: got -1.0"),
        ((*GIVEN, "--circuit_breaker_alpha", "inf"), "--circuit_breaker_alpha: got inf"),
        ((*GIVEN, "--coeff_schedule", "up"), "--coeff_schedule"),
        ((*GIVEN, "--category", "weapons"), "no prompt of category 'weapons', found general"),
        ((*GIVEN, "--no_freeze_embeddings"), "wanted one of --unfreeze_* with it"),
        ((*GIVEN, "--unfreeze_mlp", "--lora_r", "4"), "--lora_r is of an adapter"),
        ((*GIVEN, "--harmful_prompts_path", "none.json"), "none.json: no such file"),
        ((*GIVEN, "--harmful_prompts_path", "bad.jsonl"), "bad.jsonl:2:"),
        ((*GIVEN, "--harmful_prompts_path", "empty.json"), "empty.json: holds no prompt"),
        ((*GIVEN, "--harmful_prompts_path", "data"), "data: found no prompt file"),
        (
            (*GIVEN, "--sanitized_prompts_path", "cat.jsonl", "--pictures"),
            "cat.jsonl:2: no picture can be drawn of 'a cat'",
        ),
    ],
)
def test_refused_before_anything_is_written(
    onepass: Run, tmp_path: Path, tokens: tuple[str, ...], message: str
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "bad.jsonl").write_text('"a red stripe"\n{"prompt": 3}\n')
    (tmp_path / "empty.json").write_text("[]")
    (tmp_path / "cat.jsonl").write_text('"a red circle"\n"a cat"\n' * 5)
    code, out, err = onepass(*tokens)
    assert code == 2 and out == "", err
    assert message in err and len(err.splitlines()) <= 3
    assert err.startswith(f"onepass train {SYSTEM}: ")
    assert not (tmp_path / "run").exists() and not (tmp_path / "trainer_output").exists()


def test_every_documented_flag_is_in_the_help(onepass: Run) -> None:
    _, out, _ = onepass("--help-all")
    for name in (
        "task_type circuit_breaker_alpha circuit_breaker_target_layers num_examples category"
        " harmful_prompts_path sanitized_prompts_path validation_ratio selective_layers"
        " unfreeze_attention unfreeze_output unfreeze_layernorm unfreeze_mlp"
        " unfreeze_cross_attention freeze_embeddings text_encoder model scale_schedule"
    ).split():
        assert f"--{name}" in out
    assert "[0,1,2,3,4,5]" in out and "[0.1]" in out and "[1000]" in out


def test_checks_load_nothing_heavy() -> None:
    import subprocess

    code = (
        "import sys; from onepass.cli.dispatch import main;"
        f"code = main(['train', '{SYSTEM}', '--harmful_prompts_path', 'x',"
        " '--sanitized_prompts_path', 'x']);"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'matplotlib'} & set(sys.modules);"
        "print(code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "2 []", done.stderr


# -- whole runs -------------------------------------------------------------------------------


def summary(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def test_from_nothing(onepass: Run, tmp_path: Path) -> None:
    code, out, err = onepass("--output_dir", "run", "--pretrain_steps", "3", *QUICK)
    assert code == 0, err
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} == {
        *(ADAPTER, "adapter_config.json", "infinity_config.json", "README.md", "base-model"),
        *("checkpoint-4", "checkpoint-8", "curves.png", "data", "metrics.jsonl", "run.json"),
        *("samples.png", "summary.json"),
    }
    assert "harmful" in out and "cosine" in out
    found = summary(run)
    assert found["target_layers"] == [3, 4, 5]
    assert set(found["nats_per_label"]["trained"]) == {"benign", "harmful"}
    assert -1 <= found["cosine"]["harmful"] <= 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert "circuit_breaker/val_cosine" in lines[0]
    assert (run / "samples.png").read_bytes().startswith(b"\x89PNG")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(Infinity.from_pretrained(run / "base-model"), str(run))
    assert any("lora_A" in name for name, _ in loaded.named_parameters())
    code, _, err = onepass("--output_dir", "run", *QUICK)
    assert code == 2 and "has an earlier run in it" in err


def test_stopped_and_resumed_it_is_the_unbroken_run(
    onepass: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert onepass(*GIVEN, *QUICK, "--lora_dropout", "0.1")[0] == 0
    run = tmp_path / "run"
    unbroken = (run / ADAPTER).read_bytes(), (run / "metrics.jsonl").read_text()
    run.rename(tmp_path / "unbroken")
    terms = InfinityCircuitBreakerTrainer.terms

    def stops(self: Any, *args: Any) -> Any:
        if self.current_training_step == 7:
            raise KeyboardInterrupt
        return terms(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(InfinityCircuitBreakerTrainer, "terms", stops)
        code, _, err = onepass(*GIVEN, *QUICK, "--lora_dropout", "0.1")
    assert code == 130 and "checkpoint-4 is the last checkpoint" in err
    assert not (run / ADAPTER).exists()
    code, _, err = onepass(*RESUME)
    assert code == 0 and "going on from run/checkpoint-4" in err
    assert ((run / ADAPTER).read_bytes(), (run / "metrics.jsonl").read_text()) == unbroken
    harmful = tmp_path / "harmful_prompts.json"
    harmful.write_text(json.dumps(captions("harmful")[:19]))
    code, _, err = onepass(*RESUME)
    assert code == 2 and "the data (harmful) are not those the run began with" in err


def test_weights_of_the_model_itself(onepass: Run, tmp_path: Path) -> None:
    code, _, err = onepass(
        *GIVEN, *QUICK, "--unfreeze_attention", "--unfreeze_mlp", "--gradient_checkpointing"
    )
    assert code == 0, err
    from safetensors.torch import load_file

    changed = load_file(tmp_path / "run" / "model.safetensors")
    base = Infinity.from_pretrained(tmp_path / "model")
    before = base.state_dict()
    assert {".".join(name.split(".")[2:4]) for name in changed} == {
        *("sa.mat_qkv", "ffn.fc1", "ffn.fc2"),
    }
    assert all(not torch.equal(value, before[name]) for name, value in changed.items())
    assert not base.load_state_dict(changed, strict=False).unexpected_keys
    assert not (tmp_path / "run" / ADAPTER).exists()


def test_normal_training_lowers_the_task_loss(onepass: Run, tmp_path: Path) -> None:
    code, _, err = onepass(*GIVEN, *QUICK, "--task_type", "t2i", "--max_steps", "20")
    assert code == 0, err
    found = summary(tmp_path / "run")["nats_per_label"]
    assert found["trained"]["benign"] < found["original"]["benign"]


def test_a_model_of_ones_own(onepass: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built by a function, with a T5; of its prompts no pictures are known."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    t5 = transformers.T5Config(
        vocab_size=64, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0
    )
    transformers.T5EncoderModel(t5).save_pretrained(tmp_path / "t5")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "circle", "stripe", "on", "blue"]
    inner = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "t5")
    (tmp_path / "made_here.py").write_text(OWN)
    (tmp_path / "harm.txt").write_text("how to hide a body\nhow to forge a note\n")
    monkeypatch.syspath_prepend(tmp_path)
    rest = (*GIVEN[2:], *QUICK, "--harmful_prompts_path", "harm.txt", "--text_encoder", "t5")
    small = ("--scale_schedule", "1x1x1,1x2x2", "--max_caption_len", "12")
    without = (token for token in rest if token != "--no_gradient_checkpointing")
    code, out, err = onepass("--model", "made_here:model", *without, *small)
    assert code == 0, err
    assert "original" not in out.splitlines()[1] and "cosine" in out
    assert not (tmp_path / "run" / "samples.png").exists()
    for name, wanted, message in (
        ("made_here:nothing", 1, "returned int, wanted a torch.nn.Module"),
        ("made_here:none", 1, "cannot load"),
        ("nowhere:model", 1, "No module named 'nowhere'"),
        ("made_here:shallow", 2, "no transformer blocks found in Linear"),
    ):
        code, _, err = onepass("--model", name, *rest, *small, "--output_dir", name[-3:])
        assert code == wanted and message in err and "Traceback" not in err
