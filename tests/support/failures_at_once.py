"""Writes every failure to the file that ONEPASS_FAILURES names, as it happens.

pytest tells them at the end, which a run that is out of time does not reach. Load it with
`-p support.failures_at_once`, with the folder tests/ on PYTHONPATH.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    path = os.environ.get("ONEPASS_FAILURES")
    if report.failed and path and "PYTEST_XDIST_WORKER" not in os.environ:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(f"==== {report.nodeid} ({report.when})\n{report.longreprtext}\n")
