"""Two processes of gloo under `onepass bench --distributed`, for test_bench_distributed.py: what it
prints and writes, and what it says of a formula that is wrong."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from support.processes import answer, join, leave


def bench(*tokens: str) -> tuple[int, str]:
    """The exit code, and what went to stdout."""
    from onepass.bench import run
    from onepass.cli import main

    effort = {"cpu": (0.01, 2, 2)}
    out = io.StringIO()
    with contextlib.redirect_stdout(out), patch.object(run, "QUICK_EFFORT", effort):
        code = main(["bench", "--distributed", "--device", "cpu", "--quick", *tokens])
    return code, out.getvalue()


def sent(rows: list[dict[str, Any]], case: str, provider: str) -> list[tuple[Any, ...]]:
    (row,) = (r for r in rows if (r["case"], r["provider"]) == (case, provider))
    fields = ("pass", "kind", "count", "bytes")
    return [tuple(collective[name] for name in fields) for collective in row["collectives"]]


def rows_as_json(folder: Path, rank: int) -> None:
    """64 rows of which 48 count, in slabs of 16; D = 64; 4096 and 4095 columns, in fp32."""
    from onepass.bench import distributed, report

    code, out = bench("--json", "--output", str(folder / "json"))
    assert code == 0
    if rank:
        assert out == "", "the first rank alone prints"
        return
    told = json.loads(out)
    rows = told["rows"]
    assert rows == report.read_rows(Path(told["file"]))
    assert told["file"].endswith("-2-processes.json")
    assert all(tuple(row) == report.FIELDS for row in rows)
    assert {(row["status"], row["processes"], row["backend"]) for row in rows} == {
        ("ok", 2, "gloo")
    }
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 and row["reps"] == 2 for row in rows)
    assert {row["provider"] for row in rows} == set(distributed.PROVIDERS)
    assert {row["case"] for row in rows} == set(distributed.names())

    def forward(count: int, size: int) -> tuple[Any, ...]:
        return ("forward", "all_gather", count, size)

    d_hidden = ("backward", "all_reduce", 1, 64 * 64 * 4)
    for case in ("sharded_cross_entropy", "sharded_cross_entropy_frozen"):
        facts = 48 * 3 * 4
        assert sent(rows, case, "onepass") == [forward(5, 32 + 56 + facts), d_hidden]
        assert sent(rows, case, "onepass-dtensor") == [forward(4, 56 + facts), d_hidden]
        assert sent(rows, case, "gathered-logits") == [forward(1, 64 * 4096 * 4), d_hidden]
        assert sent(rows, case, "gathered-head") == [forward(1, 4096 * 64 * 4)]
        three = ("forward", "all_reduce", 3, 3 * 64 * 4)
        assert sent(rows, case, "loss-parallel") == [three, d_hidden]
    kl, every = 48 * 6 * 4, 48 * 11 * 4
    assert sent(rows, "sharded_kl", "onepass") == [forward(6, 64 + 56 + kl), d_hidden]
    assert sent(rows, "sharded_statistics", "onepass") == [forward(5, 88 + every), d_hidden]


def tables(folder: Path, rank: int) -> None:
    case = ("--case", "sharded_cross_entropy_frozen", "--providers", "onepass,gathered-head")
    code, out = bench("--mode", "forward", *case, "--output", str(folder / "tables"))
    assert code == 0
    assert not (rank and out)
    if not rank:
        lines = out.splitlines()
        table = lines[next(i for i, line in enumerate(lines) if line.startswith("collectives:")) :]
        ends = [line.split()[-6:] for line in table[3:]]
        assert ends == [
            ["onepass", "forward", "all_gather", "5", "664", "ok"],
            ["gathered-head", "forward", "all_gather", "1", "1,048,576", "-"],
        ]


def a_wrong_formula(folder: Path, rank: int) -> None:
    """One byte, and one kind of collective, that are not sent."""
    from onepass.bench.plan import Call, Collective

    forward = Call.forward
    options = ("--case", "sharded_cross_entropy", "--providers", "onepass,loss-parallel", "--json")
    wrong: dict[str, Callable[[Call], list[Collective]]] = {
        "forward": lambda call: [Collective(c.kind, c.count, c.bytes + 1) for c in forward(call)],
        "backward": lambda call: [Collective("all_gather", 1, 8)],
    }
    said = {
        "forward": "forward: 5 all_gather of 664 bytes, the formula says 5 of 665",
        "backward": "backward: 1 all_reduce of 16,384 bytes, the formula says 0 of 0",
    }
    for name, formula in wrong.items():
        with patch.object(Call, name, formula):
            code, out = bench(*options, "--output", str(folder / f"wrong_{name}"))
        assert code == 1, "on every rank"
        if rank:
            continue
        ours, theirs = json.loads(out)["rows"]
        assert (ours["status"], ours["why"], ours["ms"]) == ("refused", said[name], None)
        assert theirs["status"] == "ok" and theirs["ms"] > 0


def one_rank_refuses(folder: Path, rank: int) -> None:
    """What one rank alone finds wrong ends the provider on all of them."""
    from onepass.bench import distributed

    real = distributed.Ranks.shard

    @contextlib.contextmanager
    def other_rows() -> Iterator[None]:  # rank 1 expects the gradient of other rows of the head
        if not rank:
            yield
            return
        original = distributed.truth_of

        def shifted(*args: Any) -> Any:
            truth = original(*args)
            assert truth.gradients is not None
            truth.gradients = (truth.gradients[0], truth.gradients[1].roll(1, 0))
            return truth

        with patch.object(distributed, "truth_of", shifted):
            yield

    options = ("--case", "sharded_cross_entropy", "--providers", "onepass", "--json")
    with other_rows():
        code, out = bench(*options, "--output", str(folder / "refuses"))
    assert code == 1 and distributed.Ranks.shard is real
    if not rank:
        (row,) = json.loads(out)["rows"]
        assert row["status"] == "refused" and "gradient off by" in row["why"]


def unknown_names(folder: Path, rank: int) -> None:
    """The first rank says what is wrong, and all end."""
    for tokens in (("--case", "cross_entropy"), ("--providers", "eager"), ("--roofline",)):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            assert bench(*tokens)[0] == 2
        assert bool(err.getvalue()) == (rank == 0)


def rows_in_shards(folder: Path, rank: int) -> None:
    """Hidden states that are a DTensor in shards of rows, as docs/scaling.md says of them; gloo
    makes a reduce-scatter of an all-reduce, which is what shows."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from onepass import LazyLogits, cross_entropy
    from onepass.bench.distributed import counted
    from onepass.bench.plan import Collective

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    hidden, head = (
        distribute_tensor(torch.randn(n, 4), mesh, [Shard(0)]).requires_grad_() for n in (8, 6)
    )
    forward: list[Collective] = []
    backward: list[Collective] = []
    with counted(forward):
        loss = cross_entropy(LazyLogits(hidden, head), torch.arange(8) % 6)
    with counted(backward):
        loss.backward()
    assert forward == [Collective("all_gather", 3, 4 * 4 * 4 + 56 + 8 * 3 * 4)]
    assert backward == [Collective("all_reduce", 1, 8 * 4 * 4)]
    grad: Any = hidden.grad
    assert grad.to_local().shape == (4, 4)


CASES = {
    case.__name__: case
    for case in (
        *(rows_as_json, tables, a_wrong_formula, one_rank_refuses, unknown_names),
        rows_in_shards,
    )
}


def main(rank: int, rendezvous: str, folder: Path) -> None:
    join(rank, rendezvous)
    answer(
        {name: lambda case=case: case(folder, rank) for name, case in CASES.items()},  # type: ignore[misc]
        folder,
        rank,
    )
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
