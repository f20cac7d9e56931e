"""Set-up of every test: offline, seeded from the test's own id, one thread per small tensor op."""

from __future__ import annotations

import os
import zlib

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

pytest_plugins = ["case_counts", "scheduling"]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """Every test is reproducible alone and in any order."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True, scope="session")
def _few_threads() -> None:
    """Tiny matrices run slower on several threads than on one."""
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped with a reason where torch finds no GPU.

    EXAFUSE_TEST_SUBSET=mark: of files that mark some of their tests so, these alone are run.
    """
    subset = os.environ.get("EXAFUSE_TEST_SUBSET")
    if subset:
        files = {item.path for item in items if subset in item.keywords}
        items[:] = [item for item in items if item.path not in files or subset in item.keywords]
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU: torch finds none here"))
