"""`onepass doctor`: is every op and loss right on this machine, and does anything bypass them?

The checks stand in checks.py, their yardstick in references.py and measure.py; this file decides
where they run, prints what they found, and says how to mend what failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from .env import IMPLEMENTATIONS, gather, version
from .errors import UsageError, unknown
from .table import render

if TYPE_CHECKING:
    from .measure import Finding, Target

DEVICE = re.compile(r"auto|cpu|(cuda|xpu)(:\d+)?")
QUIET_SECONDS = 2.0  # progress shows only once a run takes longer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="DEVICE",
        help="auto (the CPU, and a GPU where there is one), cpu, cuda[:N] or xpu[:N]",
    )
    parser.add_argument(
        "--impl",
        choices=IMPLEMENTATIONS,
        default="auto",
        help="auto: torch on the CPU, Triton on a GPU; on the CPU too where TRITON_INTERPRET=1",
    )
    parser.add_argument(
        "--op",
        action="append",
        metavar="NAME",
        help="check only this op or loss; may be given several times",
    )


def run(args: argparse.Namespace) -> int:
    """Check, print, and return 1 on any miss."""
    if not DEVICE.fullmatch(args.device):
        raise unknown("device", args.device, ("auto", "cpu", "cuda", "cuda:N", "xpu", "xpu:N"))
    targets = choose_targets(args.device, args.impl)
    known = public_ops()
    for name in args.op or ():
        if name not in known:
            raise unknown("op", name, known)
    started = time.perf_counter()
    findings = examine(targets, args.op or known)
    seconds = time.perf_counter() - started
    missed = [f for f in findings if not f.passed]
    hazards = bypasses()
    if args.json:
        print(json.dumps(_report(targets, findings, hazards, seconds), indent=2, allow_nan=False))
    else:
        _print(targets, findings, hazards, seconds)
    return 1 if missed else 0


def public_ops() -> list[str]:
    """The functions of the public API, in the order in which their checks stand."""
    from .checks import all_checks

    return list(dict.fromkeys(check.op for check in all_checks()))


def choose_targets(device: str, impl: str) -> list[Target]:
    """Where to check, by what was asked and what this machine has."""
    import importlib.util

    import torch

    from .measure import Target

    has_triton = importlib.util.find_spec("triton") is not None
    interpreted = has_triton and os.environ.get("TRITON_INTERPRET") == "1"
    gpus = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    kind = device.partition(":")[0]
    here = ["auto", "cpu"]
    for gpu in gpus:
        here += [gpu, *(f"{gpu}:{i}" for i in range(getattr(torch, gpu).device_count()))]
    if device not in here:
        raise UsageError(f"--device: there is no {device!r} on this machine", allowed=here)
    targets = []
    if kind in ("auto", "cpu"):
        if impl != "triton":
            targets.append(Target("cpu", "torch"))
        if impl != "torch" and interpreted:
            targets.append(Target("cpu", "triton", interpreted=True))
    for gpu in gpus if kind == "auto" else [device] if kind in gpus else []:
        if impl == "torch":
            targets.append(Target(gpu, "torch"))
        elif has_triton and not interpreted:  # the interpreter's switch takes the kernels' place
            targets.append(Target(gpu, "triton"))
    if not targets:
        why = "Triton is not installed" if not has_triton else "no GPU here for Triton to run on"
        if has_triton and kind in gpus:
            why = "TRITON_INTERPRET=1 keeps Triton off the GPU: unset it"
        mend = "on a CPU: TRITON_INTERPRET=1 onepass doctor --impl triton, or --impl torch"
        raise UsageError(f"--impl {impl} --device {device}: {why}", hint=mend)
    return targets


def examine(targets: Sequence[Target], ops: Sequence[str]) -> list[Finding]:
    """What every check and promise of `ops` shows on every target."""
    import torch

    from .checks import Check, all_checks, promises
    from .measure import DTYPES, keep, measure

    onepass = sys.modules[__package__.rpartition(".")[0]]  # as users see it
    checks = [c for c in all_checks() if c.op in ops]
    promised = [p for p in promises() if p.op in ops]
    work: list[Any] = []
    for target in targets:
        on_cpu = target.device == "cpu"
        first = {check.op: check for check in reversed(checks)}
        for check in checks:
            # The interpreter is slow, and its bf16 is no GPU's: one case of each op has to do.
            short = target.interpreted and first[check.op] is not check
            work += [(target, check, dtype) for dtype in (("fp32",) if short else DTYPES)]
        work += [(target, p, "") for p in promised if on_cpu or not p.cpu_only]
    findings: list[Finding] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the inputs are small: more threads wait longer than they work
    try:
        with warnings.catch_warnings():
            # Triton's interpreter computes lanes that a kernel then discards; NumPy warns of them.
            warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"triton\.|numpy\.")
            for target, item, dtype in _with_progress(work):
                if isinstance(item, Check):
                    findings += measure(onepass, item, target, dtype)
                else:
                    findings.append(keep(onepass, item, target))
    finally:
        torch.set_num_threads(threads)
    return findings


def _with_progress(work: Sequence[Any]) -> Iterator[Any]:
    """`work`, counted in a line on stderr once it takes a while; nothing without a terminal."""
    shown = sys.stderr.isatty() and not os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS")
    started = time.perf_counter()
    told = False
    for done, item in enumerate(work):
        if shown and time.perf_counter() - started > QUIET_SECONDS:
            told = True
            line = f"checking {done}/{len(work)}: {item[1].op} on {item[0]}"
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        yield item
    if told:
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ report


def _report(
    targets: Sequence[Target], findings: Sequence[Finding], hazards: Sequence[dict], seconds: float
) -> dict[str, Any]:
    from .measure import MAX_RATIO, MAX_RELATIVE, NOISE

    def plain(finding: Finding) -> dict[str, Any]:
        values = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in finding._asdict().items()
        }
        return values | {"passed": finding.passed}

    missed = [f for f in findings if not f.passed]
    return {
        "passed": not missed,
        "seconds": round(seconds, 2),
        "limits": {"ratio": MAX_RATIO, "relative": MAX_RELATIVE, "noise": NOISE},
        "targets": [t._asdict() for t in targets],
        "findings": [plain(f) for f in findings],
        "mend": mends(missed),
        "hazards": list(hazards),
        "environment": gather(),
    }


def _print(
    targets: Sequence[Target], findings: Sequence[Finding], hazards: Sequence[dict], seconds: float
) -> None:
    from .measure import DTYPES, MAX_RATIO, MAX_RELATIVE, NOISE

    columns = ["value/gradient", *DTYPES, "exact", "result"]
    for target in targets:
        groups: dict[str, list[Finding]] = {}
        promises: dict[str, list[Finding]] = {}
        for finding in (f for f in findings if f.target == str(target)):
            if finding.case:
                name = finding.op if finding.output == "loss" else f"{finding.op}.{finding.output}"
                groups.setdefault(name, []).append(finding)
            else:
                promises.setdefault(finding.output, []).append(finding)
        rows = [[name, *_cells(group, DTYPES), _verdict(group)] for name, group in groups.items()]
        render(f"{target}: errors over those of unfused torch", columns, rows)
        print()
        kept = [
            [name, f"{sum(f.passed for f in group)} of {len(group)} ops", _verdict(group)]
            for name, group in promises.items()
        ]
        render(f"{target}: promises", ["promise", "kept by", "result"], kept)
        print()
    print(
        f"Ratios may reach {MAX_RATIO:g} (errors below {NOISE:g} units count as {NOISE:g}: noise);"
        f" exact results\nmay be off by {MAX_RELATIVE:g} relative. The worst of all inputs is"
        " shown; see docs/cli.md.\n"
    )
    missed = [f for f in findings if not f.passed]
    if missed:
        print(*mends(missed), "", sep="\n")
    if hazards:
        render(
            "installed packages that may bypass the losses",
            ["package", "version", "what to know"],
            [list(h.values()) for h in hazards],
        )
        print()
    verdict = f"{len(missed)} of {len(findings)} FAILED" if missed else f"{len(findings)} passed"
    print(f"onepass doctor: {verdict} in {seconds:.1f} s")


def _cells(group: Sequence[Finding], dtypes: Iterable[str]) -> list[str]:
    """The worst figures of a group: value/gradient for each dtype, and the relative error."""
    cells = []
    for dtype in dtypes:
        value = _worst([f.forward for f in group if f.dtype == dtype])
        gradient = _worst([f.gradient for f in group if f.dtype == dtype])
        cells.append(f"{_short(value)}/{_short(gradient)}")
    relative = _worst([f.relative for f in group])
    return [*cells, "-" if relative is None else f"{relative:.0e}"]


def _worst(values: Iterable[float | None]) -> float | None:
    """The largest of the values, NaN above all; None where there is none."""
    return max((math.inf if math.isnan(v) else v for v in values if v is not None), default=None)


def _short(ratio: float | None) -> str:
    """A ratio to one decimal where it is small, to three digits where it is not."""
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if ratio < 2.95 else f"{ratio:.3g}"


def _verdict(group: Sequence[Finding]) -> str:
    return "PASS" if all(f.passed for f in group) else "FAIL"


def mends(missed: Sequence[Finding]) -> list[str]:
    """What failed, worst case of each output, followed by what to do about it."""
    failed_on_torch = {(f.op, f.output) for f in missed if f.target.endswith("torch")}
    by_output: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in missed:
        by_output.setdefault((finding.op, finding.output, finding.target), []).append(finding)
    by_mend: dict[str, list[str]] = {}
    for (op, output, target), group in by_output.items():
        worst = max(group, key=_badness)
        where = f", case {worst.case!r} in {worst.dtype}" if worst.case else ""
        if target.endswith("torch") or (op, output) in failed_on_torch:
            mend = MENDS["torch"]
        else:
            mend = MENDS["interpreter" if target.endswith("interpreter") else "triton"]
        line = f"FAIL {op} {output} on {target}{where}: {_seen(worst)}"
        by_mend.setdefault(mend, []).append(line)
    return [line for mend, lines in by_mend.items() for line in (*lines, f"  mend: {mend}")]


MENDS = {
    "torch": "pip install --force-reinstall --no-deps onepass, and run this again; if it stays,"
    " report it with the output of --json",
    "interpreter": "nothing to do unless you debug kernels: a CPU uses the torch path; try another"
    " Triton (3.7 to 3.9), or report it with the output of --json",
    "triton": "set ONEPASS_IMPL=torch meanwhile; remove Triton's cache (TRITON_CACHE_DIR, else"
    " ~/.triton/cache) and run this again; if it stays, report it with the output of --json",
}


def _seen(finding: Finding) -> str:
    """What was measured, and what the limit is."""
    from .measure import MAX_RATIO, MAX_RELATIVE

    if finding.error is not None:
        return finding.error
    if finding.relative is not None and not finding.relative <= MAX_RELATIVE:
        return f"relative error {finding.relative:.1e}, at most {MAX_RELATIVE:g}"
    forward, gradient = finding.forward or 0.0, finding.gradient or 0.0
    what = "gradient" if gradient > forward else "value"
    return f"{what} {max(forward, gradient):.3g} times as far off as torch's, at most {MAX_RATIO:g}"


def _badness(finding: Finding) -> float:
    """How far beyond its limit a finding is, exceptions first."""
    from .measure import MAX_RATIO, MAX_RELATIVE

    if finding.error is not None:
        return math.inf
    over = [r / MAX_RATIO for r in (finding.forward, finding.gradient) if r is not None]
    over += [finding.relative / MAX_RELATIVE] if finding.relative is not None else []
    return max((math.inf if math.isnan(o) else o for o in over), default=0.0)


# ----------------------------------------------------------------------------------- hazards


def bypasses() -> list[dict[str, str]]:
    """Installed packages that can take a model's logits or its head away from onepass."""
    known = {
        "liger-kernel": (
            "its patched models return logits=None; patch with"
            " fused_linear_cross_entropy=False, and leave use_liger_kernel off"
        ),
        "cut-cross-entropy": "cce_patch makes a model return logits=None: do not call it",
        "unsloth": (
            "its models return no logits in training; set UNSLOTH_RETURN_LOGITS=1 before import"
        ),
    }
    found = []
    for name, advice in known.items():
        if present := version(name):
            found.append({"package": name, "version": present, "advice": advice})
    trl = version("trl")
    if trl and _at_least(trl, (1, 16)):
        advice = (
            "its trainers compute the loss from hidden states (add_fused_lm_head) and never call"
            " lm_head.forward: call onepass.integrations.trl.enable(), or use transformers.Trainer"
            " or a loop of your own"
        )
        found.append({"package": "trl", "version": trl, "advice": advice})
    return found


def _at_least(version_text: str, wanted: tuple[int, ...]) -> bool:
    """Whether a version like 1.16.0.dev0 is at least `wanted`, by its leading numbers."""
    numbers = [int(n) for n in re.findall(r"\d+", version_text)[: len(wanted)]]
    return tuple(numbers) >= wanted
