"""`onepass env`: what a report about a fault must say, gathered without importing torch.

Versions come from the installed packages' metadata, drivers from the files that the kernel
modules show. Secrets among the environment variables are named, never shown.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .table import render

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "peft",
    "accelerate",
    "trl",
    "inseq",
    "datasets",
    "tokenizers",
    "safetensors",
    "rich",
    "matplotlib",
)
# Builds of Triton under other names: which of them is there decides what can run.
TRITON_BUILDS = ("pytorch-triton", "pytorch-triton-rocm", "pytorch-triton-xpu", "triton-windows")
HONOURED = re.compile(
    r"ONEPASS_\w+|TRITON_\w+|HF_\w+|TORCH\w*_LOGS|CUDA_VISIBLE_DEVICES|HIP_VISIBLE_DEVICES"
    r"|ZE_AFFINITY_MASK|LOCAL_KERNELS|USE_HUB_KERNELS|OMP_NUM_THREADS|OMP_WAIT_POLICY|NO_COLOR|CI"
)
SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|KEY|CREDENTIAL|AUTH")
IMPLEMENTATIONS = ("auto", "triton", "torch")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onepass env`."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--full", action="store_true", help="import torch too, and list the devices it sees"
    )


def run(args: argparse.Namespace) -> int:
    """Print the environment; returns the exit code."""
    facts = gather()
    if args.full:
        facts["torch"] = torch_facts()
    if args.json:
        print(json.dumps(facts, indent=2))
    else:
        render("onepass environment", ("what", "value"), list(_rows(facts)))
    impl = os.environ.get("ONEPASS_IMPL")
    if impl is not None and impl not in IMPLEMENTATIONS:
        allowed = ", ".join(IMPLEMENTATIONS)
        print(f"onepass env: ONEPASS_IMPL={impl!r} is none of {allowed}", file=sys.stderr)
    return 0


def gather() -> dict[str, Any]:
    """Versions, drivers and settings, without importing any of the packages."""
    from .. import __version__

    return {
        "onepass": __version__,
        "python": platform.python_version(),
        "executable": _without_home(sys.executable),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES}
        | {name: found for name in TRITON_BUILDS if (found := version(name))},
        "drivers": drivers(),
        "environment": settings(os.environ),
    }


def version(distribution: str) -> str | None:
    """The installed version of a distribution, None where there is none."""
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def drivers(root: Path = Path("/")) -> dict[str, str]:
    """Versions of the accelerator drivers whose kernel modules are loaded; empty without any."""
    found = {}
    for name in ("nvidia", "amdgpu", "xe", "i915"):
        try:
            found[name] = (root / f"sys/module/{name}/version").read_text().strip()
        except OSError:
            if (root / f"sys/module/{name}").is_dir():
                found[name] = "loaded, part of the Linux kernel"
    try:  # containers often hide /sys/module and still show this one
        line = (root / "proc/driver/nvidia/version").read_text()
        if match := re.search(r"\b\d{3}\.\d+(\.\d+)?\b", line):
            found["nvidia"] = match[0]
    except OSError:
        pass
    if "nvidia" not in found and (root / "usr/lib/wsl/lib/libcuda.so.1").exists():
        found["nvidia"] = "through WSL"
    return found


def settings(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that onepass and what it stands on honour; values of secrets left out."""
    shown = {}
    for name in sorted(environ):
        if HONOURED.fullmatch(name):
            value = re.sub(r"(?<=://)[^/@\s]*@", "", environ[name])  # user:password of a URL
            shown[name] = "(set, not shown)" if SECRET.search(name) else _without_home(value)
    return shown


def _without_home(path: str) -> str:
    """A path with ~ for the home folder, which holds the user's name."""
    home = os.path.expanduser("~")
    return "~" + path[len(home) :] if path.startswith(home + os.sep) else path


def torch_facts() -> dict[str, Any]:
    """What only torch can say: its build, the CPU's features, and each device."""
    import torch

    facts: dict[str, Any] = {
        "version": torch.__version__,
        "cuda build": torch.version.cuda,
        "rocm build": torch.version.hip,
        "threads": torch.get_num_threads(),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "devices": ["cpu"],
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts["devices"].append(
                f"cuda:{i}: {p.name}, {p.total_memory / 2**30:.0f} GiB,"
                f" {p.multi_processor_count} multiprocessors,"
                f" capability {p.major}.{p.minor}"
            )
    if torch.xpu.is_available():
        for i in range(torch.xpu.device_count()):
            q = torch.xpu.get_device_properties(i)
            facts["devices"].append(f"xpu:{i}: {q.name}, {q.total_memory / 2**30:.0f} GiB")
    return facts


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The facts as (what, value) rows; a package that is missing says so."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if name == "torch":
            devices = value["devices"]
            rows += [(f"torch: {k}", str(v)) for k, v in value.items() if k != "devices"]
            rows += [("device", d) for d in devices]
        elif name == "packages":
            rows += [(k, v or "not installed") for k, v in value.items()]
        elif name == "drivers":
            rows += [(f"driver: {k}", v) for k, v in value.items()] or [("driver", "none found")]
        elif name == "environment":
            rows += list(value.items())
        else:
            rows.append((name, str(value)))
    return rows
