"""What gets shipped: a wheel built from a copy of the checkout holds the whole package, no more.

The folders behind the symlinks in python/onepass are the risk: a checkout that lost its links
builds a wheel without kernels and ops and says nothing. Built both straight and by way of an sdist.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SIZE_LIMIT = 720_000  # Liger's is 910; a system, losses to command, is up to 100 kB of it

# A bare machine (a GPU box with torch and pytest alone) cannot build; the `test` extra brings this.
pytest.importorskip("setuptools", minversion="77", reason="builds need setuptools>=77")


def run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in: setuptools leaves build/ behind, and packs what lies in an older one."""
    copy = tmp_path_factory.mktemp("checkout")
    unwanted = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("kernels", "ops", "bench", "python"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=unwanted)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module", params=["straight", "by-sdist"])
def wheel(
    request: pytest.FixtureRequest, checkout: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp(request.param)
    python = (sys.executable, "-W", "ignore", "-m")
    if request.param == "straight":
        options = ("--no-deps", "--no-build-isolation", "--no-index", "-w", str(out))
        run(*python, "pip", "wheel", *options, ".", cwd=checkout)
    else:
        pytest.importorskip("build", reason="the sdist way needs the package build")
        run(*python, "build", "--no-isolation", "--outdir", str(out), ".", cwd=checkout)
    (built,) = out.glob("*.whl")
    return built


def package_files() -> set[str]:
    """Names inside the wheel that the checkout's files must have."""
    expected = {"onepass/py.typed"}
    for where, _, names in os.walk(ROOT / "python" / "onepass", followlinks=False):
        inside = Path(where).relative_to(ROOT / "python")
        shipped = (".py", ".txt")  # the lists of words of pplm/bags
        expected |= {(inside / name).as_posix() for name in names if name.endswith(shipped)}
    for folder in ("kernels", "ops", "bench"):
        found = {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert found, f"{folder}/ holds no Python file"
        expected |= {f"onepass/{name}" for name in found}
    return expected


def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - metadata == package_files()
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert wheel.stat().st_size <= SIZE_LIMIT


def test_metadata(wheel: Path) -> None:
    import onepass

    archive = zipfile.ZipFile(wheel)
    (place,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(place).decode())
    assert metadata["Version"] == onepass.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = metadata.get_all("Requires-Dist", [])
    # Triton comes with torch: naming it would put another one over a ROCm or XPU build's.
    assert [line for line in required if "extra ==" not in line] == ["torch>=2.11"]
    assert not [line for line in required if "<" in line.split(";")[0]], "an upper bound"
    scripts = archive.read(place.replace("METADATA", "entry_points.txt")).decode()
    assert "onepass = onepass.cli:main" in scripts


def test_wheel_works_away_from_the_checkout(wheel: Path, tmp_path: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(wheel)!r})
import onepass, torch
assert onepass.__file__.startswith({str(wheel)!r}), onepass.__file__
logits = torch.tensor([[0.0, 3.0], [1.0, -1.0]])
loss = onepass.cross_entropy(logits, torch.tensor([1, 0]))
torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, torch.tensor([1, 0])))
from onepass.cli import main
from onepass.pplm.names import read_words
assert "orbit" in read_words("space")
"""
    run(sys.executable, "-I", "-c", code, cwd=tmp_path)
