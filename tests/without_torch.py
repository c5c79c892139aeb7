"""Pytest plugin for an environment with few packages, such as one without torch: tests that need others are skipped.

`pytest --noconftest -p tests.without_torch` where there is no torch, since the conftest files need it too. A missing
module of the project itself still is an error.
"""

import re
from collections.abc import Generator
from typing import Any

import pytest

_OWN = {"clients", "crane_serve", "relevance", "server", "tests"}
_MISSING = re.compile(r"ModuleNotFoundError: No module named '(\w+)")


def _skip(report: Any, place: str, missing: str) -> None:
    if missing not in _OWN:
        report.outcome, report.longrepr = "skipped", (place, 0, f"Skipped: needs {missing}")


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if report.failed and (missing := _MISSING.search(str(report.longrepr))):
        _skip(report, str(collector.path), missing.group(1))
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    report = yield
    error = None if call.excinfo is None else call.excinfo.value
    if isinstance(error, ModuleNotFoundError) and error.name is not None:
        _skip(report, str(item.path), error.name.partition(".")[0])
    return report
