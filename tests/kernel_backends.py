"""The backends that kernel tests run on: the emulator always, a GPU where there is one.

`backend` is a fixture of both. Inputs and guarded outputs are made on the CPU (poison.py); `give`
carries a view to the backend's device with its strides, its alignment and the bytes around it, and
`take_back` returns what a kernel wrote, together with what it must not have written.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from case_counts import add_cases
from exafuse import ops
from exafuse.ops import front_door
from poison import Guarded


@dataclass(frozen=True)
class Backend:
    """The ops on one path, and how tensors come and go."""

    name: str  # "emulated" or "gpu", as case_counts knows them
    ops: ModuleType
    device: torch.device
    # Whether prefill takes another kernel where rows are not aligned, with other bits.
    aligned_prefill_apart: bool = False

    def give(self, view: torch.Tensor) -> torch.Tensor:
        """`view` on the device: same strides, same offset within a buffer of the same bytes."""
        if self.device.type == "cpu":
            return view
        flat = view.as_strided((view.untyped_storage().nbytes() // view.element_size(),), (1,), 0)
        return flat.to(self.device).as_strided(view.shape, view.stride(), view.storage_offset())

    def give_optional(self, view: torch.Tensor | None) -> torch.Tensor | None:
        return None if view is None else self.give(view)

    def take_back(self, given: torch.Tensor, guarded: Guarded, label: str) -> torch.Tensor:
        """The output on the CPU, after the check that nothing around it was written."""
        if self.device.type != "cpu":
            whole = given.as_strided(guarded._buffer.shape, (1,), 0)
            guarded._buffer.copy_(whole)
        guarded.check(label)
        return guarded.tensor

    def count(self, cases: int) -> None:
        add_cases(self.name, cases)


def _emulated() -> Backend:
    if "EXAFUSE_EMULATED_LIB" not in os.environ:
        from emulator.build import build

        build("plain", target="_C_emulated")
    return Backend("emulated", ops.for_path("emulated"), torch.device("cpu"))


def _gpu() -> Backend:
    is_sm90 = torch.cuda.get_device_capability() == (9, 0)
    return Backend("gpu", ops.for_path("cuda"), torch.device("cuda"), is_sm90)


_MAKERS: dict[str, Callable[[], Backend]] = {"emulated": _emulated, "gpu": _gpu}


PARAMS = [
    pytest.param("emulated", marks=pytest.mark.emulated),
    pytest.param("gpu", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=PARAMS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return _MAKERS[request.param]()


@pytest.fixture(scope="module")
def emulated() -> Backend:
    """The emulator alone, for what only it can vary: schedules, virtual memory, guard pages."""
    return _emulated()


def cuda_extension() -> ModuleType:
    if importlib.util.find_spec("exafuse._C") is None:
        pytest.skip("exafuse._C is not installed: a build without CUDA")
    return importlib.import_module("exafuse._C")


@pytest.fixture(params=["_C", "_C_emulated"])
def extension(request: pytest.FixtureRequest) -> ModuleType:
    if request.param == "_C":
        return cuda_extension()
    request.getfixturevalue("emulated")  # builds it
    return front_door.load_emulated()


def emulator_library() -> Path:
    """The file that the emulated ops come from."""
    if "EXAFUSE_EMULATED_LIB" in os.environ:
        return Path(os.environ["EXAFUSE_EMULATED_LIB"])
    from emulator.build import library

    return library("plain")


def case_factor() -> int:
    """How many times the usual number of random cases: EXAFUSE_TEST_CASES, default 1."""
    return int(os.environ.get("EXAFUSE_TEST_CASES", "1"))
