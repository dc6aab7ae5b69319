"""Flags of `onepass train`: dataclasses, TrainingArguments, the config file, the launcher."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from onepass import cli
from onepass.cli.errors import UsageError
from onepass.training import command, flags
from onepass.training.flags import LoraFlags, ModelFlags, RunFlags
from support import toy_system
from support.toy_system import ToyFlags

ROOT = Path(__file__).resolve().parents[1]
pytest.importorskip("transformers")


def parse(*tokens: str, **defaults: Any) -> flags.Flags:
    return flags.parse("toy", toy_system.FLAGS, tokens, defaults=toy_system.DEFAULTS | defaults)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`onepass train toy`, in an empty folder."""
    monkeypatch.setitem(command.SYSTEMS, "toy", command.System("support.toy_system", "a line"))
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------ flags


def test_defaults_are_the_systems() -> None:
    made = parse()
    assert made[RunFlags].max_steps == 12 and made[RunFlags].num_train_epochs == 3.0
    assert made[ToyFlags].kinds == ["a"] and made[LoraFlags].lora_target_modules == []
    assert made.given == set() and made.overrides == {}


@pytest.mark.parametrize(
    ("tokens", "name", "value"),
    [
        (["--max_steps", "5"], "max_steps", 5),
        (["--max-steps=5"], "max_steps", 5),
        (["--learning-rate", "1e-3"], "learning_rate", 1e-3),
        (["--overwrite"], "overwrite", True),
        (["--overwrite", "true"], "overwrite", True),
        (["--overwrite=False"], "overwrite", False),
        (["--centre", "no"], "centre", False),
        (["--no_centre"], "centre", False),
        (["--no-gradient-checkpointing"], "gradient_checkpointing", False),
        (["--bf16", "false"], "bf16", False),
        (["--model", "gpt2"], "model_name_or_path", "gpt2"),
        (["--model=gpt2"], "model_name_or_path", "gpt2"),
        (["--kinds", "a", "b"], "kinds", ["a", "b"]),
        (["--kinds", "a,b"], "kinds", ["a", "b"]),
        (["--kinds", "a", "--kinds", "b"], "kinds", ["b"]),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", "true"),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--shape", "square"], "shape", "square"),
        (["--secret", "s"], "secret", "s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_flag_can_be_written_in_several_ways(tokens: list[str], name: str, value: Any) -> None:
    made = parse(*tokens)
    assert made.as_dict()[name] == value and made.given == {name}


def test_flags_of_training_arguments_are_taken() -> None:
    made = parse(
        "--adam_beta1", "0.8", "--optim=adafactor", "--no-prediction-loss-only", "--seed=3"
    )
    assert made.overrides == {
        "adam_beta1": 0.8,
        "optim": "adafactor",
        "prediction_loss_only": False,
    }
    assert made[RunFlags].seed == 3
    assert made.given == {"adam_beta1", "optim", "prediction_loss_only", "seed"}
    assert "hub_token" not in parse("--hub_token", "secret").as_dict()


def test_the_names_of_training_arguments_are_all_known() -> None:
    from dataclasses import fields

    import transformers
    from transformers.trainer_utils import SchedulerType

    found = {f.name for f in fields(transformers.TrainingArguments) if not f.name.startswith("_")}
    assert flags.training_fields() == found
    assert {s.value for s in SchedulerType} <= set(flags.SCHEDULERS)
    ours = {f.name for f in fields(RunFlags)} - set(flags.OURS)
    assert ours <= found


# ---------------------------------------------------------------------------- the config file


def test_a_config_file_gives_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOY_COLOUR", "none")
    file = tmp_path / "c.yaml"
    file.write_text(
        "max_steps: 7\nslope: 3\nkinds: [x, y]\ncentre: false\nseed: null\nlearning_rate: 1e-3\n"
        "adam_beta1: 0.7\nlr_scheduler_kwargs: {num_cycles: 2}\nenv:\n  TOY_COLOUR: red\n"
    )
    made = parse("--config", str(file), "--max_steps=9")
    assert made[RunFlags].max_steps == 9 and made[RunFlags].seed == 42
    assert made[RunFlags].learning_rate == 1e-3  # which YAML 1.1 reads as text
    assert (made[ToyFlags].slope, made[ToyFlags].centre) == (3.0, False)
    assert made[ToyFlags].kinds == ["x", "y"]
    assert made.overrides["adam_beta1"] == 0.7
    assert json.loads(made.overrides["lr_scheduler_kwargs"]) == {"num_cycles": 2}
    assert os.environ["TOY_COLOUR"] == "red"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("max_stepps: 3", "unknown key 'max_stepps'\n  did you mean max_steps?"),
        ("max_steps: many", "--max_steps: got 'many', wanted a whole number"),
        ("- max_steps", "holds no mapping"),
        ("max_steps: [", "c.yaml:2 is not YAML"),
        ("env: 3", "env: wanted a mapping"),
        (
            "shape: roundd",
            "unknown value 'roundd'\n  allowed: round, square\n  did you mean round?",
        ),
    ],
)
def test_a_wrong_config_file(text: str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text + "\n")
    with pytest.raises(UsageError) as raised:
        parse("--config", str(file))
    lines = raised.value.lines()
    assert told in "\n".join(lines) and str(file) in lines[0] and len(lines) <= 3


# ---------------------------------------------------------------------------------- refusals

WRONG = {
    "": "got no system",
    "toyy": "did you mean toy?",
    "--max_steps 3": "flags follow the system",
    "toy --max_stepps 3": "did you mean --max_steps?",
    "toy --adam_bta1 3": "did you mean --adam_beta1?",
    "toy --max_steps": "wanted a value",
    "toy --max_steps many": "wanted a whole number",
    "toy --max_steps 0": "above 0, or -1",
    "toy --learning_rate -1": "from 0 on",
    "toy --learning_rate nan": "from 0 on",
    "toy --per_device_train_batch_size 0": "above 0",
    "toy --save_total_limit 0": "wanted 1 or more",
    "toy --overwrite maybe": "wanted true or false",
    "toy --shape rund": "did you mean round?",
    "toy --adam_beta1 much": "got 'much', wanted a number",
    "toy --optim admw": "unknown value 'admw'",
    "toy --lr_scheduler_type cosin": "did you mean cosine?",
    "toy --report_to wandbb": "did you mean wandb?",
    "toy --report_to neptune": "neptune is not installed",
    "toy --slope 0": "wanted a slope",
    "toy round": "unexpected argument 'round'",
    "toy --config none.yaml": "No such file",
    "toy --accelerate_config zero4": "did you mean zero",
    "toy --accelerate_config zero3 --num_processses 2": "unknown option '--num_processses'",
    "toy --resume_from_checkpoint": "no run in 'trainer_output'",
    "toy --resume_from_checkpoint x/checkpoint-3": "no run in 'x'",
    "toy --output_dir=": "got an empty name",
    "toy --output_dir /dev/null/x": "is a file, not a folder",
    "toy --output_dir /proc/x": "cannot write to '/proc/x'",
    "toy --debugg": "did you mean --debug?",
}


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("tokens", WRONG, ids=lambda text: text or "-")
def test_wrong_invocation(tokens: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["train", *tokens.split()]) == 2
    out, err = capsys.readouterr()
    assert WRONG[tokens] in err, err
    assert out == "" and 1 <= len(err.splitlines()) <= 3
    assert err.startswith("onepass train")
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------- help


@pytest.mark.usefixtures("toy")
def test_help_is_short_and_help_all_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["train", "toy", "--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 45 and max(map(len, short.splitlines())) <= 80
    assert "--slope X" in short and "--secret" not in short and "The line:" in short
    assert cli.main(["train", "toy", "--help-all"]) == 0
    every = capsys.readouterr().out
    assert "--secret TEXT" in every and "--hub_model_id" in every
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in command.SYSTEMS)


@pytest.mark.parametrize("name", command.SYSTEMS)
def test_each_systems_help_is_a_page(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not importlib.util.find_spec("onepass" + command.SYSTEMS[name].module):
        pytest.skip("not there yet")
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["train", name, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 60


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests/support'); import toy_system\n"
        "from onepass.training.command import SYSTEMS, System\n"
        "from onepass.cli import main\n"
        "SYSTEMS['toy'] = System('toy_system', 'a line'); main(['train', 'toy', '--help'])\n"
        "heavy = {'torch', 'numpy', 'transformers', 'yaml', 'accelerate'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=True, timeout=60)


# ------------------------------------------------------------------------- TrainingArguments


def arguments(*tokens: str, **defaults: Any) -> Any:
    return flags.training_arguments(parse(*tokens, "--output_dir", "x"), **defaults)


def test_training_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    made = arguments("--adam_beta1=0.8", "--warmup_steps", "4", adam_beta2=0.9, weight_decay=0.3)
    assert (made.max_steps, made.learning_rate, made.save_total_limit) == (12, 0.1, 1)
    assert (made.adam_beta1, made.adam_beta2, made.weight_decay) == (0.8, 0.9, 0.0)
    assert made.remove_unused_columns is False and made.report_to == []
    assert made.warmup_steps == 4 and isinstance(made.warmup_steps, int)
    assert made.gradient_checkpointing is True
    assert made.gradient_checkpointing_kwargs == {"use_reentrant": False}
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "has", "bf16", "fp16"),
    [
        ([], True, True, False),
        ([], False, False, False),
        (["--no_bf16"], True, False, False),
        (["--use_cpu"], True, False, False),
    ],
)
def test_bf16_follows_the_device(
    tokens: list[str], has: bool, bf16: bool, fp16: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flags, "_has_bf16", lambda torch: has)
    # which refuses bf16 where there is none
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda self: None)
    made = arguments(*tokens)
    assert (made.bf16, made.fp16) == (bf16, fp16)


def test_what_a_version_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    made = parse("--output_dir", "x")
    made.overrides["flux"] = 1
    flags.training_arguments(made)  # a default of ours: dropped
    made.given.add("flux")
    with pytest.raises(UsageError, match="--flux: this version of transformers has no such"):
        flags.training_arguments(made)
    with pytest.raises(UsageError, match="transformers refuses these flags"):
        arguments("--lr_scheduler_kwargs", "{]", "--output_dir", "x")


# -------------------------------------------------------------------------------- the launch


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("name", [*command.ACCELERATE, "file.yaml"])
def test_accelerate_config_starts_again_once(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launch = importlib.import_module("accelerate.commands.launch")

    started: list[list[str]] = []

    def execv(program: str, argv: list[str]) -> None:
        started.append(argv)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", execv)
    if name == "file.yaml":
        (tmp_path / name).write_text("num_processes: 2\n")
    typed = ["--seed", "2", "--num_processes", "2", "--accelerate_config", name, "--max-steps=2"]
    assert cli.main(["train", "toy", *typed]) == 0
    [argv] = started
    assert argv[1:3] == ["-m", "accelerate.commands.launch"]
    args = launch.launch_command_parser().parse_args(argv[3:])
    assert args.num_processes == 2 and args.module and args.training_script == "onepass"
    again = args.training_script_args
    assert again[:2] == ["train", "toy"] and "--num_processes" not in again
    made = parse(*again[2:])
    assert (made[RunFlags].accelerate_config, made[RunFlags].seed) == ("none", 2)
    assert made[RunFlags].max_steps == 2
    wanted: dict[str, Callable[[], bool]] = {
        "multi_gpu": lambda: args.multi_gpu,
        "fsdp2": lambda: args.use_fsdp and str(args.fsdp_version) == "2",
        "zero3": lambda: args.use_deepspeed and args.zero_stage == 3,
    }
    assert wanted.get(name, lambda: True)()


# --------------------------------------------------------------------------- the small model


def test_the_small_model_is_made_once_and_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import transformers

    from onepass.demo import settings
    from onepass.training import small_model
    from onepass.training.run_folder import RunFolder

    tiny = replace(settings.FAST, lm_steps=2, text_chars=30_000, table_rows=4, vocab_size=300)
    monkeypatch.setattr(settings, "FAST", tiny)
    run = RunFolder("toy", parse("--output_dir", str(tmp_path / "run")))
    run.begin(writes=[small_model.MODEL, small_model.DATA])
    made = small_model.small_language_model(run, 0, fast=True)
    assert made == tmp_path / "run" / "base-model"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(os.listdir(made))
    files = small_model.data_files(run.path)
    assert set(files) == {"retain", "harmful", "retain_held_out", "harmful_held_out"}
    texts = {
        n: [json.loads(x)["text"] for x in f.read_text().splitlines()] for n, f in files.items()
    }
    assert all(texts.values()) and not set(texts["retain"]) & set(texts["retain_held_out"])
    before = {file: file.stat().st_mtime_ns for file in [*files.values(), *made.iterdir()]}
    small_model.small_language_model(run, 0, fast=True)
    assert before == {file: file.stat().st_mtime_ns for file in before}
    model = transformers.AutoModelForCausalLM.from_pretrained(made)
    tokenizer = transformers.AutoTokenizer.from_pretrained(made)
    batch = tokenizer(texts["harmful"][:3], return_tensors="pt", padding=True)
    assert tokenizer.pad_token_id == model.config.pad_token_id == 0
    assert model(input_ids=batch["input_ids"]).logits.shape[-1] == model.config.vocab_size


def test_the_flags_of_ecosystem_are_there() -> None:
    names = {*parse()[ModelFlags].__dict__, *parse()[LoraFlags].__dict__}
    trls = (
        "model_name_or_path model_revision dtype attn_implementation lora_r lora_alpha lora_dropout"
        " lora_target_modules lora_modules_to_save use_rslora use_dora load_in_8bit load_in_4bit"
        " bnb_4bit_quant_type"
    )
    assert set(trls.split()) <= names
