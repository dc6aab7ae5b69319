"""Times the cases and writes the rows, as the options of command.py ask.

No provider is timed before its outputs and gradients agree with the reference; one that does not
is listed as refused, one that cannot run here is listed with the reason. Rows are saved after
every size, so an interrupted run keeps what it measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli.env import version
from ..cli.errors import Failed, UsageError, one_line
from ..cli.folder import check_writable
from . import peers, roofline
from .cases import CASES
from .report import (
    FIELDS,
    NotRows,
    Row,
    append_rows,
    file_name,
    print_details,
    print_rooflines,
    print_summary,
    read_rows,
    write_csv,
)
from .schema import Case, NotHere, Provider, Size

if TYPE_CHECKING:
    from .measure import Contender
    from .schema import Function, Inputs

# Seconds of timing for the providers of one size and mode together, fewest and most turns.
EFFORT = {"cpu": (2.0, 5, 50), "cuda": (1.0, 10, 100)}
QUICK_EFFORT = {"cpu": (0.8, 3, 20), "cuda": (0.3, 5, 30)}


def run(args: argparse.Namespace) -> int:
    """Do what the command line asked; returns the exit code."""
    if args.distributed:
        from .distributed import run_distributed

        return run_distributed(args)
    for name in args.case or ():
        if name not in {case.name for case in CASES}:
            raise UsageError(f"--case {name} goes with --distributed")
    if args.list:
        return _list()
    if args.action != "run":
        return _convert(args)
    if args.file is not None:
        raise UsageError(f"unexpected argument '{args.file}'", hint="run takes options only")
    if args.out is not None:
        hint = "--output DIR for the rows, --plot PNG for the picture"
        raise UsageError("-o/--out goes with plot and csv", hint=hint)
    cases = [case for case in CASES if args.case is None or case.name in args.case]
    theirs = list(dict.fromkeys(p.name for case in cases for p in case.providers))
    if args.providers is not None and not set(args.providers) & set(theirs):
        raise UsageError("--providers: none of them serves these cases", allowed=theirs)
    if args.roofline:
        return _predict(cases, args)
    check_writable(args.output)
    if args.plot is not None:
        _require_matplotlib()
        _require_folder(args.plot, made=args.output)
        if args.providers is not None and "eager" not in args.providers:
            raise UsageError("--plot draws ratios to eager: add eager to --providers")
    # Read when torch loads. By default a thread that waits spins, on the core of one that works.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    device = torch.device(_device_type(args.device))
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = gather(device)
    path = args.output / file_name(environment["device"])
    if path.exists():
        try:
            read_rows(path)  # now, not after minutes of timing
        except NotRows as error:
            raise UsageError(str(error)) from None
    load, cores = environment["load"], os.cpu_count() or 1
    if load is not None and load > cores:
        say(f"onepass bench: load {load:g} on {cores} cores: others use them, times will vary")

    started = time.monotonic()
    rows: list[Row] = []
    interrupted = False
    try:
        with _terminable():
            for case, size in sizes_of(cases, device.type, args):
                limit = args.time_limit
                late = limit is not None and time.monotonic() - started > limit
                say(f"{case.name}  {size.label}" + ("  not run: time limit" if late else ""))
                why = f"time limit of {limit:g} s" if late else None
                new = run_size(case, size, device, args, environment, not_run=why)
                args.output.mkdir(parents=True, exist_ok=True)
                append_rows(path, new)
                rows += new
    except KeyboardInterrupt:
        interrupted = True
    added = f"added {len(rows)} row" + ("s" if len(rows) != 1 else "")
    order = [case.name for case in cases]
    rows.sort(key=lambda row: order.index(row["case"]))
    if args.json:
        print(json.dumps({"environment": environment, "file": str(path), "rows": rows}, indent=1))
    elif rows:
        for name, value in environment.items():
            absent = "not installed" if name in {"triton", *peers.PACKAGES} else "unknown"
            print(f"{name:<18} {absent if value is None else value}")
        print()
        print_details(rows)
        print()
        print_summary(rows)
        print()
        print_rooflines(rows)
    if interrupted:
        kept = f"; {added} to {path}" if rows else " before the first row"
        say(f"onepass bench: interrupted{kept}")
        return 130
    say(f"{added} to {path} ({time.monotonic() - started:.0f} s)")
    if args.plot is not None:
        from .plot import draw

        try:
            draw(rows, args.plot)
        except NotRows as error:
            say(f"onepass bench: no picture: {error}")
            return 1
        say(f"picture in {args.plot}")
    ours = [r for r in rows if r["provider"].startswith("onepass")]
    return 1 if any(r["status"] in ("refused", "failed") for r in ours) else 0


@contextmanager
def _terminable() -> Iterator[None]:
    """`timeout` and batch systems end a run with SIGTERM: like Ctrl-C, it keeps the tables."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _list() -> int:
    for case in CASES:
        print(f"{case.name}: {case.what}")
        for device, sizes in case.sizes.items():
            print(f"    {device:<10} " + "; ".join(size.label for size in sizes))
            if case.more.get(device):
                print(f"    {'more':<10} " + "; ".join(size.label for size in case.more[device]))
        print(f"    {'providers':<10} " + ", ".join(p.name for p in case.providers))
        print(f"    {'modes':<10} " + ", ".join(case.modes))
    return 0


def _predict(cases: Sequence[Case], args: argparse.Namespace) -> int:
    """The rooflines of the GPU sizes, which nobody has to run."""
    blank = dict.fromkeys(FIELDS) | {"device": ""}
    rows = [
        blank
        | {"case": case.name, "size": size.label, "mode": mode, "provider": provider.name}
        | roofline.columns(case, size, mode, provider.name, "")
        for case, size in sizes_of(cases, "cuda", args)
        for mode in args.mode or case.modes
        for provider in case.providers
        if args.providers is None or provider.name in args.providers
    ]
    if args.json:
        print(json.dumps([row for row in rows if row["predicted_on"]], indent=1))
    else:
        print_rooflines(rows)
    return 0


def _convert(args: argparse.Namespace) -> int:
    if args.file is None or args.out is None:
        usage = f"onepass bench {args.action} FILE -o OUT"
        lacks = "a FILE of rows to read" if args.file is None else "-o with the file to write"
        raise UsageError(f"{args.action} needs {lacks}", hint=usage)
    _require_folder(args.out)
    if args.action == "plot":
        _require_matplotlib()
    try:
        rows = [
            row
            for row in read_rows(args.file)
            if (args.case is None or row["case"] in args.case)
            and (args.mode is None or row["mode"] in args.mode)
            and (args.providers is None or row["provider"] in args.providers)
        ]
    except NotRows as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"cannot read {args.file}: {error.strerror}") from None
    if args.action == "csv":
        write_csv(rows, args.out)
        return 0
    from .plot import draw

    try:
        draw(rows, args.out)
    except NotRows as error:
        raise UsageError(f"{args.file}: {error}") from None
    return 0


def _require_matplotlib() -> None:
    from importlib.util import find_spec

    if find_spec("matplotlib") is None:
        raise Failed("a picture needs matplotlib: pip install 'onepass[bench]'")


def _require_folder(path: Path, made: Path | None = None) -> None:
    """UsageError where a file cannot be `path`; the folder `made` will be there in time."""
    if path.parent != made and not path.parent.is_dir():
        raise UsageError(
            f"no folder {path.parent} for {path.name}", hint="make it, or name another"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder, wanted the name of a file in it")


def _device_type(asked: str) -> str:
    import torch

    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here", hint="use --device cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if asked == "auto" else asked


def gather(device: Any) -> dict[str, Any]:
    """What a reader needs to redo the figures: device, versions, commit, peers."""
    import platform

    import torch

    from .. import __version__

    triton = version("triton")
    for name in ("pytorch-triton", "pytorch-triton-rocm", "triton-windows"):
        triton = triton or version(name)
    threads = torch.get_num_threads()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {threads} thread" + ("s" if threads > 1 else "")
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
        "onepass": __version__,
        "commit": _commit(),
        "threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        **{name: version(name) for name in peers.PACKAGES},
    }


def _cpu_name() -> str:
    import platform

    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this file lies in, "+" where it was changed; None outside one."""
    import subprocess

    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=here,
            capture_output=True,
            text=True,
            timeout=10,
        )
        tracked = subprocess.run(
            ["git", "ls-files", "--error-unmatch", Path(__file__).name],
            cwd=here,
            capture_output=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Installed below someone else's checkout (a .venv in it), its commit would say nothing.
    return done.stdout.strip() or None if tracked.returncode == 0 else None


def sizes_of(
    cases: Sequence[Case], device: str, args: argparse.Namespace
) -> list[tuple[Case, Size]]:
    """Every case's first size, then the second ones: a time limit takes the least from any case."""
    sizes = {}
    for case in cases:
        of_device = case.sizes[device][:1] if args.quick else case.sizes[device]
        if args.all_sizes:
            of_device += case.more.get(device, ())
        if args.quick and device == "cpu":
            of_device = tuple(replace(size, N=-(-size.N // 4)) for size in of_device)
        sizes[case.name] = list(dict.fromkeys(case.at(size, args.dtype) for size in of_device))
    most = max(len(found) for found in sizes.values())
    return [
        (case, sizes[case.name][turn])
        for turn in range(most)
        for case in cases
        if turn < len(sizes[case.name])
    ]


def _why_not(provider: Provider, device: Any, args: argparse.Namespace) -> tuple[str, str] | None:
    """Status and reason of a provider that is not to be loaded here; None where it is."""
    if provider.distribution is not None and version(provider.distribution) is None:
        return "not installed", f"pip install {provider.distribution}"
    if provider.gpu_only and device.type != "cuda":
        return "not here", "runs on a GPU only"
    if args.quick and provider.compiled and args.providers is None:
        return "not run", "left out of --quick"
    return None


def _asked(provider: Provider, size: Size, device: Any, args: argparse.Namespace) -> bool:
    """Whether the provider belongs in this size's table at all."""
    if args.providers is not None:
        return provider.name in args.providers
    if provider.half_only and size.dtype == "float32":
        return False  # it is what eager does
    return not (provider.name == "onepass-torch" and device.type == "cpu")  # it is "onepass" there


def run_size(
    case: Case,
    size: Size,
    device: Any,
    args: argparse.Namespace,
    environment: dict[str, Any],
    *,
    not_run: str | None = None,
) -> list[Row]:
    """Check, time and weigh the providers of a case at one size; returns their rows."""
    import torch

    from . import measure

    modes = tuple(args.mode or case.modes)
    providers = [p for p in case.providers if _asked(p, size, device, args)]
    rows: dict[tuple[str, str], Row] = {
        (mode, p.name): blank(case, size, mode, p, environment) for mode in modes for p in providers
    }

    def close(provider: Provider, mode: str, status: str, why: str) -> None:
        rows[mode, provider.name].update(status=status, why=why)

    def close_all(provider: Provider, status: str, why: str) -> None:
        for mode in modes:
            close(provider, mode, status, why)

    if not_run is not None:
        for provider in providers:
            close_all(provider, "not run", not_run)
        return list(rows.values())

    if any(p.compiled and _why_not(p, device, args) is None for p in providers):
        torch.compiler.reset()  # a second shape would be compiled for any shape, and slower
    try:
        inputs = case.inputs(size, torch.Generator(device).manual_seed(0))
        reference = measure.truth(case, inputs, any(mode != "forward" for mode in modes))
    except torch.OutOfMemoryError:
        for provider in providers:
            close_all(provider, "not run", "no memory for the inputs and their reference")
        return list(rows.values())
    except NotHere as error:
        for provider in providers:
            close_all(provider, "not here", str(error))
        return list(rows.values())
    ready: dict[str, list[Contender]] = {mode: [] for mode in modes}
    for provider in providers:
        if (reason := _why_not(provider, device, args)) is not None:
            close_all(provider, *reason)
            continue
        try:
            function = provider.load()
        except NotHere as error:
            close_all(provider, "not here", str(error))
            continue
        except Exception as error:  # a peer's import may raise anything at all
            close_all(provider, "failed", told(error))
            continue
        for mode in modes:
            contender, status, why = _admit(
                provider, function, inputs, case, mode, size.dtype, reference
            )
            row = rows[mode, provider.name]
            row["reference"] = None if provider.floor else reference.precision
            row["output_error"] = contender.errors.get("output") if contender else None
            row["gradient_error"] = contender.errors.get("gradient") if contender else None
            if status != "ok":
                close(provider, mode, status, why)
            elif contender is not None:
                ready[mode].append(contender)
    del reference  # several fp64 copies of the inputs
    if device.type == "cuda":
        torch.cuda.empty_cache()

    effort = (QUICK_EFFORT if args.quick else EFFORT)[device.type]
    for mode in modes:
        failures = measure.time_all(ready[mode], *effort)
        for contender in ready[mode]:
            row = rows[mode, contender.name]
            if contender.name in failures:
                row.update(status="failed", why=told(failures[contender.name]))
            else:
                row.update(measured(contender, case.bytes_moved(size, mode)))
    return list(rows.values())


def _admit(
    provider: Provider,
    function: Function,
    inputs: Inputs,
    case: Case,
    mode: str,
    dtype: str,
    reference: Any,
) -> tuple[Contender | None, str, str]:
    """The contender after its check, with the status and reason where it is not to be timed."""
    from . import measure

    contender = None
    try:
        contender = measure.Contender(
            provider.name, function, inputs, case, mode, provider.overwrites
        )
        if provider.floor:
            contender.first_call()
        else:
            contender.check(reference, dtype)
    except measure.Refused as refusal:
        return contender, "refused", str(refusal)
    except Exception as error:  # a peer may raise anything at all; its row says what
        return contender, "failed", told(error)
    return contender, "ok", ""


def told(error: Exception) -> str:
    if type(error).__name__ == "OutOfMemoryError":
        return "out of memory"  # the allocator's own text is a paragraph
    return f"{type(error).__name__}: {one_line(error, 160)}".rstrip(": ")


def blank(
    case: Case, size: Size, mode: str, provider: Provider, environment: dict[str, Any]
) -> Row:
    from datetime import UTC, datetime

    row: Row = dict.fromkeys(FIELDS)
    if provider.distribution is not None:
        of_provider = environment[provider.distribution]
    else:
        of_provider = environment["onepass" if provider.name.startswith("onepass") else "torch"]
    shared = ("device", "torch", "triton", "commit", "threads", "load", "python", "onepass")
    row.update({name: environment[name] for name in shared})
    row.update(
        case=case.name,
        provider=provider.name,
        mode=mode,
        N=size.N,
        V=size.V,
        D=size.D,
        dtype=size.dtype,
        size=size.label,
        masked=size.masked,
        inputs=size.inputs,
        status="ok",
        why="",
        in_place=bool(provider.overwrites),
        provider_version=of_provider,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    row.update(roofline.columns(case, size, mode, provider.name, environment["device"]))
    return row


def measured(contender: Contender, bytes_moved: int | None) -> Row:
    from .measure import quantile

    ms, low, high = (quantile(contender.ms, q) for q in (0.5, 0.2, 0.8))
    host = quantile(contender.host_ms, 0.5) if contender.host_ms else None
    return {
        "ms": round(ms, 5),
        "ms_p20": round(low, 5),
        "ms_p80": round(high, 5),
        "reps": len(contender.ms),
        "host_ms": None if host is None else round(host, 5),
        "first_call_s": round(contender.first_call_s or 0.0, 3),
        "peak_mib": None if contender.peak_mib is None else round(contender.peak_mib, 3),
        "gbps": None if bytes_moved is None else round(bytes_moved / ms / 1e6, 4),
    }
