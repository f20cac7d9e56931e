"""Pytest plugin of GPU runs: fewer tests for the slow tools, and the largest error seen.

EXAFUSE_TEST_STRIDE=n keeps every n-th case of each parametrised test, the first one always; an n
that divides no number of parameters meets every value of each. The last line says how large the
errors were, where the judges of numeric.py keep account of it.
"""

import os
from collections import Counter
from collections.abc import Callable

import numeric
import pytest


@pytest.hookimpl(trylast=True)  # after the selection by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    stride = int(os.environ.get("EXAFUSE_TEST_STRIDE", "1"))
    seen: Counter[str] = Counter()
    kept, dropped = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        (dropped if seen[function] % stride else kept).append(item)
        seen[function] += 1
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = kept


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    largest: Callable[[], dict[str, float]] = getattr(numeric, "largest_errors", dict)
    errors = [f"{dtype} {value:.4g}" for dtype, value in sorted(largest().items())]
    if errors:
        terminalreporter.write_line(f"largest error in ulps: {', '.join(errors)}")
