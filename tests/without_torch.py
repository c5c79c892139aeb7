"""Pytest plugin for an environment without torch or what builds on it: tests that need one of those are skipped.

`pytest --noconftest -p tests.without_torch`, since the conftest files need torch too. A module that is missing for any
other reason still is an error.
"""

from collections.abc import Generator
from importlib.util import find_spec
from typing import Any

import pytest

ABSENT = [name for name in ("torch", "transformers", "vllm", "ray", "gradio") if find_spec(name) is None]


def _skipped(report: Any, place: str, missing: str) -> None:
    report.outcome, report.longrepr = "skipped", (place, 0, f"Skipped: needs {missing}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    for name in ABSENT if report.failed else ():
        if f"ModuleNotFoundError: No module named '{name}" in str(report.longrepr):
            _skipped(report, str(collector.path), name)
            break
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
    if missing in ABSENT:
        _skipped(report, str(item.path), missing)
    return report
