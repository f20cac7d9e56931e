"""Which tests run in the same process under `pytest --numprocesses N --dist loadfile`.

A pytest plugin. A file's tests share what it prepares, so they stay together. The tests of
SEPARATE files take minutes each and share nothing: each goes wherever there is time.
"""

from __future__ import annotations

from typing import Any

import pytest

SEPARATE = ("test_sanitizers.py",)


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist, which need not be there
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Whole files, but for the separate ones; None leaves other kinds of distribution alone."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return nodeid if file.endswith(SEPARATE) else file

    return Scheduling(config, log)
