"""The subprocess behind aot.py: compiles for GPUs that are not here, without TRITON_INTERPRET.

Reads a JSON file of jobs, writes one of raw results: resource usage and the machine code's text.
    python aot_worker.py jobs.json results.json
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any


def _find(reference: dict[str, str]) -> Any:
    """The function itself: by import where that yields the same file, else from the file."""
    try:
        module = importlib.import_module(reference["module"])
    except ImportError:
        module = None
    if module is None or Path(module.__file__ or "").resolve() != Path(reference["file"]).resolve():
        name = "aot_" + Path(reference["file"]).stem
        module = sys.modules.get(name)
        if module is None:
            spec = importlib.util.spec_from_file_location(name, reference["file"])
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            spec.loader.exec_module(module)
    return getattr(module, reference["name"])


def _constexpr(value: Any) -> Any:
    """What Triton takes for a constexpr that travelled as JSON."""
    import triton.language as tl

    if not isinstance(value, dict):
        return value
    return _find(value["fn"]) if "fn" in value else tl.dtype(value["dtype"])


def _compile(job: dict[str, Any]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _find(job["fn"])
    constexprs = {name: _constexpr(value) for name, value in job["constexprs"].items()}
    signature = {name: job["signature"].get(name, "constexpr") for name in kernel.arg_names}
    attrs = {
        (position,): [["tt.divisibility", 16]]
        for position, name in enumerate(kernel.arg_names)
        if name in job["multiples_of_16"]
    }
    if job["target"].startswith("sm_"):
        target = GPUTarget("cuda", int(job["target"].removeprefix("sm_")), 32)
    else:
        target = GPUTarget("hip", job["target"], 64)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    return triton.compile(source, target=target, options=job["options"])


def _output(*command: str) -> str:
    run = subprocess.run(command, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{Path(command[0]).name}: {run.stderr.strip() or run.returncode}")
    return run.stdout


def _read_cubin(cubin: bytes, name: str, folder: str) -> dict[str, Any]:
    """Registers, stack and the disassembly, by the tools that come with Triton."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".cubin", delete=False) as file:
        file.write(cubin)
    usage = _output(str(tools / "cuobjdump"), "--dump-resource-usage", file.name)
    line = usage[usage.index(f"Function {name}:") :].splitlines()[1]
    numbers = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return {
        "code": _output(str(tools / "nvdisasm"), "-c", file.name),
        "registers": numbers["REG"],
        "stack_bytes": numbers["STACK"] + numbers["LOCAL"],
    }


def _read_amdgcn(text: str) -> dict[str, Any]:
    def number(key: str) -> int:
        found = re.search(rf"^\s+(?:- )?\.{key}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no .{key} in the kernel's metadata")
        return int(found.group(1))

    return {
        "code": text,
        "registers": number("vgpr_count"),
        "stack_bytes": number("private_segment_fixed_size"),
        "vgpr_spills": number("vgpr_spill_count"),
        "sgpr_spills": number("sgpr_spill_count"),
    }


def main() -> None:
    jobs_file, results_file = map(Path, sys.argv[1:])
    request = json.loads(jobs_file.read_text())
    sys.path[:] = request["path"]
    results: list[dict[str, Any]] = []
    # Disassembling is another program's work: it fills the second core while this one compiles.
    readings: list[tuple[dict[str, Any], Future[dict[str, Any]]]] = []
    with ThreadPoolExecutor(2) as pool:
        for job in request["jobs"]:
            result: dict[str, Any] = {}
            results.append(result)
            try:
                compiled = _compile(job)
                result["name"] = compiled.metadata.name
                result["shared_bytes"] = compiled.metadata.shared
                if "cubin" in compiled.asm:
                    cubin = compiled.asm["cubin"]
                    reading = pool.submit(
                        _read_cubin, cubin, result["name"], str(results_file.parent)
                    )
                else:
                    reading = pool.submit(_read_amdgcn, compiled.asm["amdgcn"])
                readings.append((result, reading))
            except Exception as error:  # reported per job: one bad kernel must not hide the others
                result["error"] = f"{type(error).__name__}: {error}"
        for result, reading in readings:
            try:
                result.update(reading.result())
            except Exception as error:
                result["error"] = f"{type(error).__name__}: {error}"
    results_file.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
