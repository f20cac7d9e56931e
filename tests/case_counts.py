"""The last line of a test run: how many cases ran emulated, on a GPU, or found no GPU.

A pytest plugin (`pytest_plugins = ["case_counts"]` in conftest.py). A passed test marked `emulated`
or `gpu` is one case of that kind, unless it reports how many it ran with `add_cases`. The counts
travel in the test's report: with several workers, the process that prints them ran none itself.
"""

from collections import Counter
from collections.abc import Generator, Iterator

import pytest

BACKENDS = ("emulated", "gpu")
PROPERTY = "cases"

_reported: Counter[str] = Counter()  # by add_cases, during the test that runs
_totals: Counter[str] = Counter()


def add_cases(backend: str, number: int) -> None:
    """Count `number` cases that the running test ran on `backend` ("emulated" or "gpu")."""
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if number < 0:
        raise ValueError(f"number: expected at least 0, got {number}")
    _reported[backend] += number


def summary() -> str:
    """The totals so far, in one line."""
    return (
        f"cases: {_totals['emulated']} ran emulated, {_totals['gpu']} ran on a GPU, "
        f"{_totals['skipped']} skipped for want of a GPU"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call":
        # A test that reports nothing itself is one case of the kind that it is marked as.
        marked = [backend for backend in BACKENDS if backend in item.keywords]
        report.user_properties.append((PROPERTY, dict(_reported or dict.fromkeys(marked, 1))))
        _reported.clear()
    return report


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and report.passed:
        _totals.update(dict(report.user_properties).get(PROPERTY, {}))
    elif report.skipped and "gpu" in report.keywords:
        _totals["skipped"] += 1


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    yield  # everything else that the summary holds comes first
    terminalreporter.write_line(summary())
