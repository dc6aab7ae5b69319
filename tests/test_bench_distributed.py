"""`onepass bench --distributed`: its rows and tables from two processes, and how it is refused.

What the processes do stands in support/bench_on_two.py; they start once for all cases.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from onepass.bench import distributed
from onepass.cli import main
from onepass.cli.errors import Failed
from support.bench_on_two import CASES
from support.processes import run_processes

with_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch was built without gloo",
)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    run_processes(2, "bench_on_two", folder, str(folder))
    return folder


@with_gloo
@pytest.mark.parametrize("case", CASES)
def test_on_two_processes(case: str, answers: Path) -> None:
    for rank in range(2):
        assert (answers / f"{case}.{rank}").read_text("utf-8") == ""


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("alone")
def test_alone_it_says_how_to_launch_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--distributed", "--output", str(tmp_path / "rows")]) == 2
    said = capsys.readouterr()
    assert said.err.splitlines() == [
        "onepass bench: --distributed needs processes that torchrun starts",
        f"  {distributed.LAUNCH}",
    ]
    assert said.out == "" and not list(tmp_path.iterdir())


WRONG = {
    "its case without it": (["--case", "sharded_kl"], "--case sharded_kl goes with --distributed"),
    "another case": (["--distributed", "--case", "jsd"], "unknown case of --distributed 'jsd'"),
    "another provider": (
        ["--distributed", "--providers", "onepass,trl"],
        "unknown provider of --distributed 'trl'",
    ),
    "a limit": (["--distributed", "--time-limit", "3"], "--time-limit does not go with"),
    "a picture": (["--distributed", "--plot", "a.png"], "--plot does not go with"),
    "an action": (["plot", "--distributed"], "an action does not go with"),
}


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("what", WRONG)
def test_what_does_not_go_with_it(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    tokens, wanted = WRONG[what]
    assert main(["bench", *tokens]) == 2
    assert wanted in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_more_processes_than_gpus(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "99"), ("LOCAL_WORLD_SIZE", "99")):
        monkeypatch.setenv(name, value)
    command = ["bench", "--distributed", "--device", "cuda", "--output", str(tmp_path)]
    assert main(command) == 2
    assert "99 processes on this machine and" in capsys.readouterr().err


@pytest.mark.usefixtures("alone")
def test_it_lists_its_cases(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--distributed", "--list"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}: " in "\n" + out for name in distributed.names())
    assert out.count("loss-parallel") == 2  # of a cross-entropy, with a trained and a frozen head


def of_nccl(name: str, dtype: str, count: int) -> dict[str, object]:
    args = {"Collective name": name, "dtype": dtype, "In msg nelems": count}
    return {"name": "record_param_comms", "args": args}


def of_gloo(name: str, dtype: str, *shape: int) -> dict[str, object]:
    return {"name": f"gloo:{name}", "args": {"Input Dims": [list(shape)], "Input type": [dtype]}}


@pytest.mark.parametrize(
    ("event", "wanted"),
    [
        (of_gloo("all_gather", "float", 3, 4), ("all_gather", 48)),
        (of_gloo("all_reduce", "c10::BFloat16", 5), ("all_reduce", 10)),
        (of_gloo("all_reduce", "long int"), ("all_reduce", 8)),  # 0-dim
        (of_gloo("barrier", ""), None),
        (of_nccl("_allgather_base", "BFloat16", 6), ("all_gather", 12)),
        (of_nccl("allgather_into_tensor_coalesced", "Float", 6), ("all_gather", 24)),
        (of_nccl("allreduce", "Long", 5), ("all_reduce", 40)),
        (of_nccl("_reduce_scatter_base", "Half", 5), ("reduce_scatter", 10)),
        (of_nccl("wait", "", 0), None),
        ({"name": "aten::mm", "args": {}}, None),
        ({"name": "process_name"}, None),
    ],
)
def test_events_of_the_profiler(event: dict[str, object], wanted: tuple[str, int] | None) -> None:
    assert distributed._sent(event) == wanted


def test_a_dtype_that_is_unknown_is_no_guess() -> None:
    with pytest.raises(Failed, match="all_reduce in Float8_e4m3fn: unknown"):
        distributed._sent(of_nccl("allreduce", "Float8_e4m3fn", 5))
