"""The command line: start-up time, wrong invocations, exit codes, `env`, `doctor`, tables.

Doctor is judged by what it says of broken ops: every mutant below is a fault that some package
shipped, and doctor must fail on it, by the check that is there for it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import onepass
from onepass import cli
from onepass.cli import checks, dispatch, doctor, env, errors, folder, table
from onepass.cli.measure import Finding, Target

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = tuple(dispatch.COMMANDS)


def process_environment(**extra: str) -> dict[str, str]:
    """The environment of a child process, without what conftest.py sets for the tests."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COLUMNS")}
    return inherited | {"PYTHONPATH": str(ROOT / "python")} | extra


def onepass_process(*args: str, **extra: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "onepass", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=process_environment(**extra),
    )


def fastest(*command: str, runs: int = 5) -> float:
    """Seconds that the fastest of several runs took."""
    # Of processor time: on a busy machine the clock on the wall measures the neighbours.
    times = []
    for _ in range(runs):
        started, before = time.perf_counter(), os.times()
        subprocess.run(
            [sys.executable, *command], check=True, capture_output=True, env=process_environment()
        )
        after = os.times()
        used = after.children_user + after.children_system
        used -= before.children_user + before.children_system
        times.append(used or time.perf_counter() - started)  # Windows counts no children
    return min(times)


# --------------------------------------------------------------------------------- start-up


@pytest.mark.parametrize(
    ("args", "budget"),
    [
        (["--help"], 0.10),
        (["--version"], 0.10),
        (["env"], 0.20),
        (["env", "--json"], 0.20),
        *((([command, "--help"]), 0.30) for command in COMMANDS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else f"{value}s",
)
def test_starts_within_its_budget(args: list[str], budget: float) -> None:
    taken = fastest("-m", "onepass", *args)
    if taken > budget:  # what this machine asks of any Python program is not ours to save
        taken -= fastest("-c", "pass")
    assert taken <= budget


@pytest.mark.parametrize(
    ("args", "own"),
    [
        ("--help", []),
        ("env", []),
        ("dotcor", []),
        ("doctor --help", []),
        ("bench --help", ["onepass.bench", "onepass.bench.command"]),
        ("demo --help", ["onepass.demo"]),
        ("dpo --help", []),
        ("pplm --help", []),
        ("pplm train-discriminator --help", []),
        ("generate --help", []),
        ("generate pplm --help", []),
        ("generate pplm -B computer", []),
        ("generate pplm -D ./none", []),
        ("attribute --help", []),
        ("protect --help", []),
    ],
)
def test_loads_no_heavy_module(args: str, own: list[str]) -> None:
    script = (
        "import sys; from onepass.cli import main; main(sys.argv[1:])\n"
        "heavy = {'torch', 'numpy', 'triton', 'transformers', 'rich'} & set(sys.modules)\n"
        "own = {m for m in sys.modules if m.startswith(('onepass.bench', 'onepass.demo'))}\n"
        "print(*sorted(heavy | own), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *args.split()],
        capture_output=True,
        text=True,
        env=process_environment(),
    )
    assert done.stderr.splitlines()[-1].split() == own


@pytest.mark.parametrize("loading", ["argparse", "onepass.bench.command", "onepass.demo"])
def test_ctrl_c_while_modules_load_is_one_line(loading: str) -> None:
    command = loading.split(".")[1] if "." in loading else "env"
    script = (
        "import sys\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {loading!r}: raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        f"from onepass.cli import main; sys.exit(main([{command!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=process_environment()
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert re.fullmatch(r"onepass( \w+)?: interrupted\n", done.stderr)


@pytest.mark.parametrize("args", [[], *([c] for c in COMMANDS)], ids=lambda a: " ".join(a) or "-")
def test_help_is_short_and_on_stdout(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*args, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert 5 < len(out.splitlines()) <= 60
    assert all(name in out for name in COMMANDS) or args


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"onepass {onepass.__version__}\n"


def test_module_and_script_are_the_same_program() -> None:
    done = onepass_process("doctr")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("onepass: unknown command 'doctr'\n")


# ------------------------------------------------------------------------ wrong invocations


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A command `toy` with every kind of argument; its `run` is what the test says."""
    module: Any = ModuleType("onepass.toy")

    def add_arguments(parser: Any) -> None:
        parser.add_argument("mode", choices=("fast", "slow"))
        parser.add_argument("--steps", type=int, default=1)
        parser.add_argument("--rate", type=float)
        parser.add_argument("--output-dir")
        parser.add_argument("--sizes", nargs="+", type=int)
        parser.add_argument("--pair", nargs=2)
        parser.add_argument("--level", type=int, choices=(1, 2, 3))
        parser.add_argument("--seed", type=int, required=True)
        parser.add_argument("--keep", type=share)
        group = parser.add_mutually_exclusive_group()
        group.add_argument("--quiet", action="store_true")
        group.add_argument("--verbose", action="store_true")

    def share(text: str) -> float:
        import argparse

        if not 0 <= float(text) <= 1:
            raise argparse.ArgumentTypeError(f"got {text}, wanted a share between 0 and 1")
        return float(text)

    module.add_arguments, module.run = add_arguments, lambda args: 0
    monkeypatch.setitem(sys.modules, "onepass.toy", module)
    monkeypatch.setitem(dispatch.COMMANDS, "toy", dispatch.Command(".toy", "a toy", "A toy."))
    return SimpleNamespace(module=module)


# What is typed, and what the message has to name: what came, then what is allowed or meant.
WRONG = [
    ("", ["no command", "doctor, env, bench, demo"]),
    ("doctr", ["'doctr'", "did you mean doctor?"]),
    ("Doctor", ["'Doctor'", "did you mean doctor?"]),
    ("benchmark", ["'benchmark'", "did you mean bench?"]),
    ("evn", ["'evn'", "did you mean env?"]),
    ("help", ["'help'", "doctor, env, bench, demo", "did you mean --help?"]),
    ("version", ["'version'", "did you mean --version?"]),
    ("-V", ["'-V'", "did you mean --version?"]),
    ("xyzzy env", ["'xyzzy'", "doctor, env, bench, demo", "onepass --help"]),
    ("--hepl", ["'--hepl'", "did you mean --help?"]),
    ("--verison", ["'--verison'", "did you mean --version?"]),
    ("--json env", ["'--json'", "a command's own options follow it"]),
    ("-x", ["'-x'", "--help"]),
    ("--version=2", ["--version", "takes no value", "'2'"]),
    ("env --jsn", ["'--jsn'", "did you mean --json?"]),
    ("env --JSON", ["'--JSON'", "did you mean --json?"]),
    ("env --ful", ["'--ful'", "did you mean --full?"]),
    ("env --json=yes", ["--json", "takes no value", "'yes'"]),
    ("env json", ["'json'", "onepass env --help"]),
    ("env -j", ["'-j'", "--json"]),
    ("env --xyzzy", ["'--xyzzy'", "--json, --full", "onepass env --help"]),
    ("doctor --devcie cpu", ["'--devcie'", "did you mean --device?"]),
    ("doctor --device", ["--device", "got nothing", "wanted a value"]),
    ("doctor --device gpu", ["'gpu'", "auto, cpu, cuda", "did you mean cuda?"]),
    ("doctor --device cuda0", ["'cuda0'", "did you mean cuda?"]),
    ("doctor --device cpu:1", ["'cpu:1'", "auto, cpu, cuda"]),
    ("doctor --device cuda:99", ["'cuda:99'", "auto, cpu"]),
    ("doctor --impl", ["--impl", "got nothing", "auto, triton, torch"]),
    ("doctor --impl trition", ["'trition'", "did you mean triton?"]),
    ("doctor --impl=Torch", ["'Torch'", "did you mean torch?"]),
    ("doctor --impl torch --device cuda:0:1", ["'cuda:0:1'"]),
    ("doctor --impl --json", ["--impl", "got nothing", "auto, triton, torch"]),
    ("doctor --op vocab_stat", ["'vocab_stat'", "did you mean vocab_stats?"]),
    ("doctor --op crossentropy", ["'crossentropy'", "did you mean cross_entropy?"]),
    ("doctor --op", ["--op", "got nothing"]),
    ("doctor cross_entropy", ["'cross_entropy'", "onepass doctor --help"]),
    ("doctor --dev cpu", ["'--dev'", "did you mean --device?"]),
    ("bench --csae ce", ["'--csae'", "did you mean --case?"]),
    ("bench --case nosuchcase", ["'nosuchcase'", "allowed:"]),
    ("bench --case", ["--case", "got nothing"]),
    ("bench plto", ["onepass bench: no action 'plto'", "did you mean plot?"]),
    ("bench --threads none", ["--threads", "'none'", "a whole number"]),
    ("bench --threads 0", ["--threads: got '0'", "above 0"]),
    ("bench --providers ,", ["--providers: got ','", "onepass, onepass-torch, eager"]),
    ("bench --device cdua", ["'cdua'", "did you mean cuda?"]),
    ("bench --device gpu", ["--device", "'gpu'", "did you mean cuda?"]),
    ("bench --output {file}", ["--output: '{file}' is a file, not a folder"]),
    ("bench --output {file}/below", ["--output: '{file}' is a file, not a folder"]),
    ("demo --fsat", ["'--fsat'", "did you mean --fast?"]),
    ("demo now", ["'now'"]),
    ("demo --device gpu", ["--device", "'gpu'", "did you mean cuda?"]),
    ("train", ["got no system", "circuit-breaker"]),
    ("train circuit-braker", ["'circuit-braker'", "did you mean circuit-breaker?"]),
    ("train --fast", ["'--fast'", "flags follow the system"]),
    ("train circuit-breaker --max_stepps 3", ["'--max_stepps'", "did you mean --max_steps?"]),
    ("train circuit-breaker --max_steps many", ["--max_steps", "'many'", "a whole number"]),
    ("train circuit-breaker --output_dir {file}", ["--output_dir: '{file}' is a file"]),
    ("dpo", ["got no action", "pairs, evaluate, frontier"]),
    ("dpo frontir", ["'frontir'", "did you mean frontier?"]),
    ("dpo --model x", ["'--model'", "flags follow the action"]),
    ("dpo pairs --model {file}", ["--model: '{file}' is a file"]),
    ("dpo pairs --modle x", ["'--modle'", "did you mean --model?"]),
    ("dpo frontier --betas 0", ["--betas: got '0'", "above 0"]),
    ("pplm", ["got no action", "train-discriminator"]),
    ("pplm train", ["unknown action 'train'", "did you mean train-discriminator?"]),
    ("pplm --data x", ["'--data'", "flags follow the action"]),
    ("pplm train-discriminator --modle x", ["'--modle'", "did you mean --model?"]),
    ("pplm train-discriminator --model {file}", ["--model: '{file}' is a file"]),
    ("pplm train-discriminator --epochs few", ["--epochs", "'few'", "a whole number"]),
    ("pplm train-discriminator --output_dir {file}", ["--output_dir: '{file}' is a file"]),
    ("generate", ["got no method", "pplm"]),
    ("generate plm", ["unknown method 'plm'", "did you mean pplm?"]),
    ("generate --length 3", ["'--length'", "flags follow the method"]),
    ("generate pplm --lenght 3", ["'--lenght'", "did you mean --length?"]),
    ("generate pplm -B computer", ["no bag of words", "did you mean computers?"]),
    ("generate pplm -D nowhere", ["no head 'nowhere'", "clickbait, sentiment, toxicity"]),
    ("generate pplm -M {file} -B space", ["--model: '{file}' is a file"]),
    ("generate pplm --output_dir {file}", ["--output_dir: '{file}' is a file"]),
    ("attribute --model {file}", ["--model: '{file}' is a file, wanted the folder"]),
    ("attribute --modle x", ["'--modle'", "did you mean --model?"]),
    ("attribute --model {file} -a saliancy", ["'saliancy'", "did you mean saliency?"]),
    ("attribute --n_steps few", ["--n_steps", "'few'", "a whole number"]),
    ("protect", ["required", "--sgt"]),
    ("protect --sgt {file} text", ["--sgt: '{file}' is a file, wanted a folder"]),
    ("protect --stg a text", ["'--stg'", "did you mean --sgt?"]),
    ("protect --sgt a --samples some", ["--samples", "'some'", "a whole number"]),
    ("toy", ["required", "mode, --seed"]),
    ("toy fast", ["required", "--seed"]),
    ("toy fats --seed 1", ["no mode 'fats'", "fast, slow", "did you mean fast?"]),
    ("toy fast --seed one", ["--seed", "'one'", "a whole number"]),
    ("toy fast --seed 1.5", ["--seed", "'1.5'", "a whole number"]),
    ("toy fast --seed 1 --rate quick", ["--rate", "'quick'", "a number"]),
    ("toy fast --seed 1 --step 3", ["'--step'", "did you mean --steps?"]),
    ("toy fast --seed 1 --output_dir x", ["'--output_dir'", "did you mean --output-dir?"]),
    ("toy fast --seed 1 --sizes", ["--sizes", "got nothing", "at least one"]),
    ("toy fast --seed 1 --sizes 1 two", ["--sizes", "'two'", "a whole number"]),
    ("toy fast --seed 1 --pair a", ["--pair", "wanted 2 arguments"]),
    ("toy fast --seed 1 --level 4", ["--level", "'4'", "1, 2, 3"]),
    ("toy fast --seed 1 --quiet --verbose", ["--verbose", "not allowed with", "--quiet"]),
    ("toy fast --seed 1 --keep 1.5", ["--keep", "1.5", "between 0 and 1"]),
    ("toy fast slow --seed 1", ["'slow'", "unexpected"]),
    ("toy fast --seed 1 --no-such-thing=3", ["'--no-such-thing'", "allowed:"]),
]


@pytest.mark.parametrize(("line", "named"), WRONG, ids=[line or "-" for line, _ in WRONG])
def test_wrong_invocation_is_told_in_three_lines(
    line: str,
    named: list[str],
    toy: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("in the way")
    fill = {"{file}": str(tmp_path / "file")}

    def filled(text: str) -> str:
        return text.replace("{file}", fill["{file}"])

    code = cli.main(filled(line).split())
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert 1 <= len(err.splitlines()) <= 3
    assert err.startswith("onepass")
    for part in named:
        assert filled(part) in err
    assert [p.name for p in tmp_path.iterdir()] == ["file"]  # nothing was started


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len({line for line, _ in WRONG}) >= 40
    assert {line.split()[0] for line, _ in WRONG if line} >= set(COMMANDS)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_debug_adds_the_traceback_to_a_usage_error(
    first: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["doctor", "--impl", "tritn"]
    assert cli.main(["--debug", *args] if first else [*args, "--debug"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" in err and err.endswith("did you mean triton?\n")


def test_a_folder_is_judged_without_making_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (".", "new", "new/below", tmp_path / "new"):
        folder.check_writable(Path(name))
    with pytest.raises(errors.UsageError, match="File name too long"):
        folder.check_writable(Path("n" * 1000))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "x")

    # Simulated: root, as whom containers run tests, may write anywhere.
    monkeypatch.setattr(folder.tempfile, "TemporaryFile", refuse)
    with pytest.raises(errors.UsageError, match="cannot write to 'new': Permission denied"):
        folder.check_writable(Path("new"))
    assert not list(tmp_path.iterdir())


def test_long_lists_of_allowed_values_are_cut() -> None:
    names = [f"case-{i:02}" for i in range(60)]
    lines = errors.unknown("case", "case07", names).lines()
    assert len(lines) == 3 and "(36 more)" in lines[1]
    assert lines[2] == "  did you mean case-07?"


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("CROSS-ENTROPY", "cross_entropy"),
        ("masked", "masked_l2"),
        ("row", "row_moments"),
        ("qqq", None),
    ],
)
def test_nearest(word: str, meant: str | None) -> None:
    assert (
        errors.nearest(word, ["cross_entropy", "masked_mean", "masked_l2", "row_moments"]) == meant
    )


# ------------------------------------------------------------------------------- exit codes


def raising(error: BaseException) -> Callable[[Any], int]:
    def run(args: Any) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        (KeyboardInterrupt(), 130, "onepass toy: interrupted\n"),
        (RuntimeError("no memory\nat all"), 1, "onepass toy: no memory\n"),
        (KeyError("x"), 1, "onepass toy: KeyError: 'x'\n"),
        (ValueError(""), 1, "onepass toy: ValueError\n"),
        (PermissionError(13, "Permission denied", "/a"), 1, "onepass toy: Permission denied: /a\n"),
        (ModuleNotFoundError("x", name="peft.tuners"), 1, "pip install 'onepass[train]'\n"),
        (ModuleNotFoundError("x", name="matplotlib"), 1, "pip install 'onepass[viz]'\n"),
        (ModuleNotFoundError("x", name="torch"), 1, "needs torch, which is not installed"),
        (errors.UsageError("no such thing", hint="try another"), 2, "no such thing\n  try another"),
        (SystemExit("gave up"), 1, "onepass toy: gave up\n"),
        (errors.Failed("needs x: get it"), 1, "onepass toy: needs x: get it\n"),
        (SystemExit(3), 3, ""),
    ],
    ids=lambda e: type(e).__name__ if isinstance(e, BaseException) else None,
)
def test_exit_code_and_message(
    error: BaseException,
    code: int,
    told: str,
    toy: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    toy.module.run = raising(error)
    assert cli.main(["toy", "fast", "--seed", "1"]) == code
    out, err = capsys.readouterr()
    assert out == "" and told in err and len(err.splitlines()) <= 2
    if isinstance(error, errors.Failed | SystemExit):
        assert "--debug" not in err  # there is nothing more to learn
    if isinstance(error, Exception):
        assert cli.main(["toy", "fast", "--seed", "1", "--debug"]) == code
        assert "Traceback" in capsys.readouterr().err


def test_a_package_that_is_not_installed_names_its_extra() -> None:
    """The extras that messages name exist in pyproject.toml and bring what they say."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = {"yaml": "pyyaml"}
    for module, extra in dispatch.EXTRAS.items():
        wanted = [re.split(r"[<>=\[ ]", w)[0] for w in project["optional-dependencies"][extra]]
        assert packages.get(module, module) in wanted


@pytest.mark.skipif(sys.platform == "win32", reason="shell pipes")
def test_a_reader_that_goes_away_leaves_no_traceback() -> None:
    script = f"{sys.executable} -m onepass env --json | true"
    done = subprocess.run(
        ["sh", "-c", script], capture_output=True, text=True, env=process_environment()
    )
    assert done.stderr == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "onepass", "env"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=process_environment(),
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "onepass env: No space left on device"
    assert "Traceback" not in done.stderr


# -------------------------------------------------------------------------------------- env


def test_env_json_holds_what_a_report_needs() -> None:
    from importlib import metadata

    done = onepass_process(
        "env", "--json", ONEPASS_IMPL="torch", HF_TOKEN="hf_secret", NO_COLOR="1", CI="true"
    )
    assert done.returncode == 0 and done.stderr == ""
    facts = json.loads(done.stdout)
    assert facts["onepass"] == onepass.__version__
    assert facts["python"] == sys.version.split()[0]
    assert facts["packages"]["torch"] == metadata.version("torch")
    assert set(env.PACKAGES) <= set(facts["packages"])
    shown = facts["environment"]
    assert shown["ONEPASS_IMPL"] == "torch" and shown["CI"] == "true" and shown["NO_COLOR"] == "1"
    assert "hf_secret" not in done.stdout and "HF_TOKEN" in shown


def test_env_says_that_a_package_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(env, "PACKAGES", ("torch", "no-such-package"))
    assert cli.main(["env"]) == 0
    assert re.search(r"^no-such-package +not installed$", capsys.readouterr().out, re.MULTILINE)


def test_env_warns_of_an_implementation_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONEPASS_IMPL", "cuda")
    assert cli.main(["env"]) == 0
    assert (
        capsys.readouterr().err
        == "onepass env: ONEPASS_IMPL='cuda' is none of auto, triton, torch\n"
    )


def test_env_shows_settings_but_no_secrets() -> None:
    shown = env.settings(
        {
            "HF_ENDPOINT": "https://user:password@hub.example/api",
            "HF_TOKEN": "hf_1",
            "HF_API_KEY": "hf_2",
            "TRITON_CACHE_DIR": os.path.expanduser("~/cache"),
            "PATH": "/bin",
            "CIRCUS": "1",
        }
    )
    assert shown == {
        "HF_API_KEY": "(set, not shown)",
        "HF_ENDPOINT": "https://hub.example/api",
        "HF_TOKEN": "(set, not shown)",
        "TRITON_CACHE_DIR": "~/cache",
    }


def test_env_reads_drivers_from_files(tmp_path: Path) -> None:
    assert env.drivers(tmp_path) == {}
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    (tmp_path / "sys/module/amdgpu/version").write_text("6.10.5\n")
    (tmp_path / "sys/module/xe").mkdir()
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build\n"
        "GCC version:  gcc version 13.3.0\n"
    )
    assert env.drivers(tmp_path) == {
        "amdgpu": "6.10.5",
        "xe": "loaded, part of the Linux kernel",
        "nvidia": "580.95.05",
    }


def test_env_full_lists_devices(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env", "--full", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)["torch"]
    assert facts["version"] == torch.__version__ and facts["devices"][0] == "cpu"
    assert len(facts["devices"]) == 1 + torch.cuda.device_count() + torch.xpu.device_count()


# ----------------------------------------------------------------------------------- doctor


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """`onepass doctor --json` on the torch path: its exit code and what it found."""

    def run(*args: str, impl: str = "torch") -> tuple[int, dict[str, Any]]:
        code = cli.main(["doctor", "--device", "cpu", "--impl", impl, "--json", *args])
        return code, json.loads(capsys.readouterr().out)

    return run


def test_doctor_passes_in_time_and_covers_the_public_functions(
    report: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    code, found = report()
    missed = [f for f in found["findings"] if not f["passed"]]
    assert missed == [] and code == 0 and found["passed"] and found["mend"] == []
    assert found["seconds"] <= 20
    functions = {n for n in onepass.__all__ if n.islower() and not n.startswith("_")}
    of_models = {"lazy_head", "lazy_head_within", "report", "strict", "unlazy_head"}
    of_labels = {"count_items", "shift_labels"}
    public = functions - of_models - of_labels | {"LazyLogits"}
    assert {f["op"] for f in found["findings"]} == public
    of_heads = {f["case"] for f in found["findings"] if f["op"] == "LazyLogits"}
    assert of_heads >= {"trained", "frozen", "pair of heads, trained", "pair of heads, frozen"}
    measured = [f for f in found["findings"] if f["forward"] is not None]
    assert {f["dtype"] for f in measured} == {"fp32", "bf16", "fp16"}
    for op in public:
        assert any(f["gradient"] is not None for f in measured if f["op"] == op)
    exact = {(f["op"], f["output"]) for f in measured if f["relative"] is not None}
    assert exact >= {
        ("vocab_stats", "logp"),
        ("vocab_stats", "entropy"),
        ("vocab_pair_stats", "kl"),
        ("row_moments", "1 - cos"),
        ("LazyLogits", "logp"),
        ("LazyLogits", "kl"),
        ("cross_entropy", "loss"),
        ("masked_cross_entropy", "loss"),
        ("masked_normalized_l2", "loss"),
    }


class ScaleGradient(torch.autograd.Function):
    """The identity, with a gradient that is off."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *up: torch.Tensor) -> tuple[torch.Tensor, None]:
        return up[0] * ctx.factor, None


def with_field(name: str, change: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A mutant of an op that changes one field of its result: change(value, *tensors)."""

    def mutate(op: Callable[..., Any]) -> Callable[..., Any]:
        def mutant(*args: Any, **kwargs: Any) -> Any:
            stats = op(*args, **kwargs)
            value = getattr(stats, name)
            return stats if value is None else stats._replace(**{name: change(value, *args)})

        return mutant

    return mutate


def on_result(change: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A mutant of a loss: change(loss, **its keywords)."""

    def mutate(op: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: change(op(*args, **kwargs), **kwargs)

    return mutate


def on_input(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A mutant that changes the first floating tensor before the op sees it."""

    def mutate(op: Callable[..., Any]) -> Callable[..., Any]:
        def mutant(*args: Any, **kwargs: Any) -> Any:
            if args:
                return op(change(args[0]), *args[1:], **kwargs)
            first = next(iter(kwargs))
            return op(**kwargs | {first: change(kwargs[first])})

        return mutant

    return mutate


def usual_logp(value: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """label_logit - lse in fp32: what costs other packages their digits."""
    counts = labels != -100
    z = torch.where(counts[:, None], logits.float(), 0.0)
    at = torch.where(counts, labels, 0)[:, None]
    return torch.where(counts, z.gather(-1, at)[:, 0] - z.logsumexp(-1), 0.0)


def naive_cross_entropy(value: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    kwargs.pop("impl")
    floats: dict[str, Any] = {
        n: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
        for n, v in kwargs.items()
    }
    return torch.nn.functional.cross_entropy(**floats)


def unchecked(op: Callable[..., Any]) -> Callable[..., Any]:
    """Labels out of range wrap around instead of raising."""

    def mutant(logits: Any, labels: Any, **kwargs: Any) -> Any:
        wrapped = torch.where(labels == -100, labels, labels % logits.shape[-1])
        return op(logits, wrapped, **kwargs)

    return mutant


def scribbling(op: Callable[..., Any]) -> Callable[..., Any]:
    """Writes into the caller's tensor."""

    def mutant(x: Any, y: Any, *args: Any, **kwargs: Any) -> Any:
        result = op(x, y, *args, **kwargs)
        with torch.no_grad():
            (y[0] if isinstance(y, list) else y).mul_(2)
        return result

    return mutant


def wavering(op: Callable[..., Any]) -> Callable[..., Any]:
    """Differs by one bit between two calls, as a float atomic would."""
    calls = iter(range(10**9))

    def mutant(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs) * (1 + 2.0**-23 * (next(calls) % 2))

    return mutant


# (op, what is wrong, how to make it so, what doctor has to name)
MUTANTS: list[tuple[str, str, Callable[..., Any], str]] = [
    ("vocab_stats", "lse off by 1e-5", with_field("lse", lambda v, *_: v * (1 + 1e-5)), "lse"),
    ("vocab_stats", "logp as a difference", with_field("logp", usual_logp), "logp"),
    (
        "vocab_stats",
        "entropy without gradient",
        with_field("entropy", lambda v, *_: v.detach().requires_grad_()),
        "entropy",
    ),
    (
        "vocab_stats",
        "entropy's gradient off by 1e-2",
        with_field("entropy", lambda v, *_: ScaleGradient.apply(v, 1.01)),
        "entropy",
    ),
    (
        "vocab_stats",
        "bf16 statistics",
        with_field("sum_sq_probs", lambda v, *_: v.bfloat16().float()),
        "sum_sq_probs",
    ),
    ("vocab_stats", "labels unchecked", unchecked, "IndexError"),
    (
        "vocab_stats",
        "NaN of ignored rows",
        with_field("lse", lambda v, z, *_: v + 0 * z.sum(-1)),
        "lse",
    ),
    (
        "vocab_pair_stats",
        "kl the wrong way round",
        lambda op: lambda *a, **k: (lambda s: s._replace(kl=s.reverse_kl))(op(*a, **k)),
        "kl",
    ),
    (
        "vocab_pair_stats",
        "no gradient to the target",
        lambda op: lambda z, t=None, **k: op(z, None if t is None else t.detach(), **k),
        "cross_entropy",
    ),
    (
        "row_moments",
        "|x - y|^2 as xx + yy - 2 xy",
        lambda op: lambda *a, **k: (lambda m: m._replace(dd=m.xx + m.yy - 2 * m.xy))(op(*a, **k)),
        "dd",
    ),
    ("row_moments", "in place", scribbling, "inputs untouched"),
    (
        "gaussian_stats",
        "without the location",
        lambda op: lambda *a, location=None, **k: op(*a, **k),
        "mahalanobis",
    ),
    (
        "gaussian_stats",
        "log-determinant of the variances",
        lambda op: lambda *a, **k: (lambda s: s._replace(log_det=2 * s.log_det))(op(*a, **k)),
        "log_det",
    ),
    (
        "cloak",
        "other noise in the backward",
        lambda op: (
            lambda x, mean, std, *a, **k: (
                op(x, mean, std.detach(), *a, **k) + (std - std.detach()).nan_to_num()
            )
        ),
        "gradient",
    ),
    ("cloak", "another seed", lambda op: lambda *a, seed, **k: op(*a, seed=seed + 1, **k), "rows"),
    (
        "LazyLogits",
        "hidden states rounded to bf16",
        on_input(lambda x: x.bfloat16().to(x.dtype)),
        "label_logit",
    ),
    (
        "LazyLogits",
        "softcap left out",
        lambda op: lambda *a, softcap=None, **k: op(*a, **k),
        "case 'trained, softcap'",
    ),
    ("LazyLogits", "bias left out", lambda op: lambda h, w, b=None, **k: op(h, w, **k), "kl"),
    (
        "LazyLogits",
        "gradient of the head off by 1e-2",
        lambda op: lambda h, w, *a, **k: op(h, ScaleGradient.apply(w, 1.01), *a, **k),
        "logp",
    ),
    (
        "LazyLogits",
        "gradient off by 1e-2 where the head is frozen",
        lambda op: (
            lambda h, w, *a, **k: op(
                h if w.requires_grad else ScaleGradient.apply(h, 1.01), w, *a, **k
            )
        ),
        "case 'pair of heads, frozen'",
    ),
    (
        "linear_cross_entropy",
        "bias left out",
        lambda op: lambda linear_bias=None, **k: op(**k),
        "loss",
    ),
    ("cross_entropy", "1 - p lost at p near 1", on_result(naive_cross_entropy), "loss"),
    (
        "cross_entropy",
        "gradient of 1 assumed",
        on_result(lambda v, **_: ScaleGradient.apply(v, 0.5)),
        "loss",
    ),
    (
        "masked_cross_entropy",
        "mean over all rows",
        on_result(lambda v, mask=None, **_: v if mask is None else v * mask.sum() / mask.numel()),
        "loss",
    ),
    (
        "masked_normalized_l2",
        "x rounded to bf16",
        on_input(lambda x: x.bfloat16().to(x.dtype)),
        "loss",
    ),
    (
        "masked_inner_product",
        "off by 1e-5",
        on_result(lambda v, **_: v + 1e-5),
        "0 and no NaN where no row counts",
    ),
    ("masked_normalized_l2", "not repeatable", wavering, "twice the same bits"),
    (
        "masked_mean",
        "NaN where no row counts",
        lambda op: lambda values, mask: (values * mask).sum() / mask.sum(),
        "0 and no NaN where no row counts",
    ),
    (
        "reduce_rows",
        "num_items left out",
        lambda op: lambda *args, num_items=None, **kwargs: op(*args, **kwargs),
        "loss",
    ),
    ("masked_mean", "raises", lambda op: lambda *a: 1 / 0, "ZeroDivisionError"),
]


@pytest.mark.parametrize(
    ("op", "mutate", "named"),
    [(op, mutate, named) for op, _, mutate, named in MUTANTS],
    ids=[f"{op}: {what}" for op, what, _, _ in MUTANTS],
)
def test_doctor_fails_on_a_broken_op(
    op: str,
    mutate: Callable[..., Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    report: Callable[..., tuple[int, dict[str, Any]]],
) -> None:
    monkeypatch.setattr(onepass, op, mutate(getattr(onepass, op)))
    code, found = report("--op", op)
    assert code == 1 and not found["passed"]
    failures = [line for line in found["mend"] if line.startswith(f"FAIL {op} ")]
    assert any(named in line for line in failures)
    assert found["mend"][-1].startswith("  mend: ")


def test_doctor_prints_the_failure_and_its_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = onepass.masked_mean
    monkeypatch.setattr(onepass, "masked_mean", lambda v, mask=None: right(v, mask) * 1.001)
    assert cli.main(["doctor", "--impl", "torch", "--device", "cpu", "--op", "masked_mean"]) == 1
    out = capsys.readouterr().out
    assert re.search(r"^masked_mean +\S+/\S+ .* FAIL$", out, re.MULTILINE)
    assert "FAIL masked_mean loss on cpu, torch, case 'odd N' in fp32: gradient " in out
    assert "  mend: pip" in out
    assert re.search(r"^onepass doctor: \d+ of \d+ FAILED in", out, re.MULTILINE)


def test_doctor_runs_the_kernels_in_the_interpreter(
    report: Callable[..., tuple[int, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("kernels run compiled here, and Triton decides that when it is imported")
    code, found = report("--op", "row_moments", impl="triton")
    assert code == 0
    assert found["targets"] == [{"device": "cpu", "impl": "triton", "interpreted": True}]
    assert {f["target"] for f in found["findings"]} == {"cpu, Triton interpreter"}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine with so many GPUs, with or without Triton and its interpreter."""

    def make(gpus: int = 0, triton: bool = True, interpret: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.xpu, "is_available", lambda: False)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: triton or None)
        monkeypatch.setenv("TRITON_INTERPRET", "1" if interpret else "0")

    return make


CPU, GPU = Target("cpu", "torch"), Target("cuda", "triton")
INTERPRETED = Target("cpu", "triton", interpreted=True)


@pytest.mark.parametrize(
    ("has", "device", "impl", "expected"),
    [
        ({}, "auto", "auto", [CPU]),
        ({"interpret": True}, "auto", "auto", [CPU, INTERPRETED]),
        ({"interpret": True}, "cpu", "triton", [INTERPRETED]),
        ({"interpret": True, "triton": False}, "auto", "auto", [CPU]),
        ({"gpus": 2}, "auto", "auto", [CPU, GPU]),
        ({"gpus": 2}, "cuda:1", "auto", [Target("cuda:1", "triton")]),
        ({"gpus": 1}, "cuda", "torch", [Target("cuda", "torch")]),
        ({"gpus": 1}, "auto", "triton", [GPU]),
        ({"gpus": 1, "interpret": True}, "auto", "auto", [CPU, INTERPRETED]),
    ],
)
def test_doctor_checks_what_the_machine_has(
    machine: Callable[..., None],
    has: dict[str, Any],
    device: str,
    impl: str,
    expected: list[Target],
) -> None:
    machine(**has)
    assert doctor.choose_targets(device, impl) == expected


@pytest.mark.parametrize(
    ("has", "device", "impl", "told"),
    [
        ({}, "cuda", "auto", "there is no 'cuda' on this machine"),
        ({"gpus": 2}, "cuda:2", "auto", "there is no 'cuda:2' on this machine"),
        ({}, "auto", "triton", "no GPU here for Triton to run on"),
        ({"gpus": 1, "triton": False}, "cuda", "auto", "Triton is not installed"),
        ({"gpus": 1, "interpret": True}, "cuda", "triton", "unset it"),
    ],
)
def test_doctor_refuses_what_the_machine_has_not(
    machine: Callable[..., None], has: dict[str, Any], device: str, impl: str, told: str
) -> None:
    machine(**has)
    with pytest.raises(errors.UsageError, match=re.escape(told)) as caught:
        doctor.choose_targets(device, impl)
    assert len(caught.value.lines()) <= 3


def test_doctor_lists_packages_that_bypass_the_losses(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"liger-kernel": "0.8.5", "trl": "1.16.0", "unsloth": "2026.10.9"}
    monkeypatch.setattr(doctor, "version", installed.get)
    assert [h["package"] for h in doctor.bypasses()] == ["liger-kernel", "unsloth", "trl"]
    monkeypatch.setattr(doctor, "version", {"trl": "1.9.1"}.get)
    assert doctor.bypasses() == []
    monkeypatch.setattr(doctor, "version", {"trl": "1.16.0.dev0"}.get)
    assert cli.main(["doctor", "--impl", "torch", "--device", "cpu", "--op", "masked_mean"]) == 0
    assert "add_fused_lm_head" in capsys.readouterr().out


def test_doctor_counts_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = [(CPU, SimpleNamespace(op="row_moments"), "fp32")] * 3
    monkeypatch.setattr(doctor, "QUIET_SECONDS", -1.0)
    assert list(doctor._with_progress(work)) == work
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(doctor._with_progress(work)) == work
    assert "checking 2/3: row_moments on cpu, torch" in capsys.readouterr().err
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    list(doctor._with_progress(work))
    assert capsys.readouterr().err == ""


def test_a_finding_with_nan_never_passes() -> None:
    kept = Finding("op", "out", "case", "cpu, torch", "fp32", 1.0, 3.0, 1e-6)
    nan = float("nan")
    assert kept.passed
    assert not any(kept._replace(forward=v).passed for v in (nan, 3.1, float("inf")))
    assert not any(kept._replace(gradient=v).passed for v in (nan, 3.1))
    assert not any(kept._replace(relative=v).passed for v in (nan, 1.1e-6))
    assert not kept._replace(error="ValueError: x").passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_input_is_made_of_the_dtype_and_layout_it_promises(dtype: torch.dtype) -> None:
    for check in checks.all_checks():
        inputs = check.make(checks.Maker(dtype, "cpu"))
        assert {inputs[leaf].dtype for leaf in check.leaves} == {dtype}
        again = check.make(checks.Maker(dtype, "cpu"))
        assert all(torch.equal(a.nan_to_num(), again[n].nan_to_num()) for n, a in inputs.items())
        if check.case == "strided":
            assert not any(inputs[leaf].is_contiguous() for leaf in check.leaves)


# ----------------------------------------------------------------------------------- tables


class Terminal:
    """A text stream that says it is a terminal."""

    def __init__(self) -> None:
        self.text = ""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


ROWS: list[list[object]] = [["a [b] row", 1.5, "PASS"], ["other", None, "FAIL"]]


def test_plain_table_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    table.render("title", ["name", "ms", "result"], ROWS)
    assert capsys.readouterr().out == (
        "title\n"
        "name        ms  result\n"
        "---------  ---  ------\n"
        "a [b] row  1.5  PASS\n"
        "other        -  FAIL\n"
    )


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    yield Terminal()


def test_rich_draws_on_a_terminal(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    table.render("title", ["name", "ms", "result"], ROWS, stream=terminal)
    assert "\x1b[32mPASS" in terminal.text and "a [b] row" in terminal.text
    monkeypatch.setenv("NO_COLOR", "1")
    terminal.text = ""
    table.render("title", ["name", "ms", "result"], ROWS, stream=terminal)
    assert "PASS" in terminal.text and "\x1b[3" not in terminal.text


def test_a_terminal_without_rich_gets_the_plain_table(
    terminal: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    table.render("title", ["name", "ms", "result"], ROWS, stream=terminal)
    assert terminal.text.splitlines()[1] == "name        ms  result"


def test_a_row_of_the_wrong_length_is_an_error() -> None:
    with pytest.raises(ValueError, match="1 cells for 2 columns"):
        table.render("", ["a", "b"], [["x"]])


def test_an_empty_table_has_its_head(capsys: pytest.CaptureFixture[str]) -> None:
    table.render("", ["a", "b"], [])
    assert capsys.readouterr().out == "a  b\n-  -\n"


# --------------------------------------------------------------------------- documentation


def test_the_page_tells_every_command_and_option() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    assert all(f"`onepass {name}`" in page for name in COMMANDS)
    parser = errors.Parser(prog="onepass doctor")
    doctor.add_arguments(parser)
    flags = set(parser._flags()) - {"-h", "--help"}
    assert flags and all(f"`{flag}" in page for flag in flags)
    for name in ("ONEPASS_IMPL", "ONEPASS_STRICT", "TRITON_INTERPRET", "NO_COLOR"):
        assert f"`{name}`" in page
    assert [int(c) for c in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)] == [0, 1, 2, 130]
