"""The cases as pytest-benchmark entries: `pytest bench/test_speed.py`, outside the test suite.

One entry for each provider of each case at its first size, on the GPU where there is one.
`pytest bench/test_speed.py -k cross_entropy --benchmark-group-by=group` compares within a case.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as run.py does, before torch loads
pytest.importorskip("pytest_benchmark", reason="needs pytest-benchmark: onepass[bench]")

from onepass.bench.cases import CASES  # noqa: E402
from onepass.bench.schema import Case, NotHere, Provider, Size  # noqa: E402

if TYPE_CHECKING:
    from onepass.bench.measure import Contender

ENTRIES = [
    pytest.param(case, provider, mode, id=f"{case.name}-{mode}-{provider.name}")
    for case in CASES
    for mode in case.modes
    for provider in case.providers
]


@pytest.fixture(scope="module")
def device() -> Any:
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _contender(case: Case, provider: Provider, mode: str, size: Size, device: Any) -> Contender:
    """The provider after its check, or a skip that says why it cannot be here."""
    import torch

    from onepass.bench.measure import Contender, truth
    from onepass.cli.env import version

    if provider.distribution is not None and version(provider.distribution) is None:
        pytest.skip(f"{provider.distribution} is not installed")
    if provider.gpu_only and device.type != "cuda":
        pytest.skip("runs on a GPU only")
    if provider.half_only and size.dtype == "float32":
        pytest.skip("the same as eager in fp32")
    try:
        function = provider.load()
    except NotHere as error:
        pytest.skip(str(error))
    inputs = case.inputs(size, torch.Generator(device).manual_seed(0))
    contender = Contender(provider.name, function, inputs, case, mode, provider.overwrites)
    if not provider.floor:
        contender.check(truth(case, inputs, mode != "forward"), size.dtype)
    return contender


@pytest.mark.filterwarnings("default")  # peers' own
@pytest.mark.parametrize(("case", "provider", "mode"), ENTRIES)
def test_speed(benchmark: Any, device: Any, case: Case, provider: Provider, mode: str) -> None:
    """Times one provider; its row group is the case, size and mode."""
    import torch

    size = case.sizes[device.type][0]
    contender = _contender(case, provider, mode, size, device)
    benchmark.group = f"{case.name} {size.label} {mode}"

    def timed() -> None:
        contender.call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark.pedantic(timed, setup=contender.prepare, rounds=5, warmup_rounds=1)
