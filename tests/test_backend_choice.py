"""EXAFUSE_BACKEND, `for_path` and `paths`: what is chosen, and what is said where it is missing."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch
from exafuse import ops, reference
from exafuse.errors import BackendError
from exafuse.ops import front_door
from exafuse.ops.front_door import FrontDoor
from kernel_backends import Backend, emulated, emulator_library

__all__ = ["emulated"]  # a fixture


def test_auto_says_once_why_a_gpu_runs_plain_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(front_door, "extension_problem", lambda: "the driver is too old")
    door = FrontDoor("auto")
    door._takes_cpu = True  # as if this tensor were on a GPU
    with caplog.at_level(logging.WARNING, logger="exafuse"):
        assert door.kernels(torch.zeros(1)) is None
        assert door.kernels(torch.zeros(1)) is None
    assert [record.message for record in caplog.records] == [
        "exafuse runs in plain PyTorch on this GPU: the driver is too old"
    ]


def test_cuda_on_demand_is_an_error_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front_door, "extension_problem", lambda: "the driver is too old")
    door = FrontDoor("cuda")
    door._takes_cpu = True
    with pytest.raises(BackendError, match="backend 'cuda' cannot run here: the driver is too old"):
        door.kernels(torch.zeros(1))


def test_an_old_build_says_rebuild(monkeypatch: pytest.MonkeyPatch) -> None:
    old = ModuleType("exafuse._C")
    needed = (*front_door.KERNELS, *front_door.GRADIENTS, *front_door.WORKSPACES)
    old.__dict__.update({name: None for name in needed if name != "apply_rope"})
    old.__dict__["NotAPlainTensor"] = TypeError
    monkeypatch.setitem(sys.modules, "exafuse._C", old)
    with pytest.raises(BackendError, match=r"exafuse\._C is an old build that lacks apply_rope"):
        front_door.load_cuda()
    assert (
        "rebuild it, in the folder with exafuse's sources: pip install" in front_door.cuda_problem()
    )
    with pytest.raises(
        BackendError, match="rebuild it, in the folder with exafuse's sources: pip install"
    ):
        ops.Ops("cuda")._load()


def test_a_binary_that_does_not_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> ModuleType:
        raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.30' not found")

    monkeypatch.setattr(front_door, "load_cuda", broken)
    monkeypatch.setattr(front_door.importlib.util, "find_spec", lambda name: object())
    assert "does not load: libstdc++.so.6" in front_door.cuda_problem()
    monkeypatch.setattr(front_door.importlib.util, "find_spec", lambda name: None)
    assert "without its compiled extension" in front_door.cuda_problem()


def test_old_gpus_and_missing_gpus_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extension = ModuleType("exafuse._C")
    extension.device_problem = lambda: "no NVIDIA driver was found"  # type: ignore[attr-defined]
    monkeypatch.setattr(front_door, "load_cuda", lambda: extension)
    assert front_door.cuda_problem() == "no NVIDIA driver was found"
    extension.device_problem = lambda: ""  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "this torch sees no GPU" in front_door.cuda_problem()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    capabilities = {None: (7, 5), 0: (9, 0), 1: (7, 5)}  # of the current GPU, and of two
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.get)
    assert "compute capability 7.5, the kernels need 8.0" in front_door.cuda_problem()
    assert front_door.gpu_problem(0) == ""


def test_each_gpu_is_asked_for_itself_and_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []
    monkeypatch.setattr(front_door, "extension_problem", lambda: "")
    monkeypatch.setattr(front_door, "gpu_problem", lambda i: asked.append(i) or "too old" * i)
    auto, cuda = FrontDoor("auto"), FrontDoor("cuda")
    with caplog.at_level(logging.WARNING, logger="exafuse"):
        assert [auto._gpu_fits(index) for index in (0, 1, 0, 1)] == [True, False, True, False]
    assert asked == [0, 1]
    assert [r.message for r in caplog.records] == [
        "exafuse runs in plain PyTorch on cuda:1: too old"
    ]
    with pytest.raises(BackendError, match="backend 'cuda' cannot run here: too old"):
        cuda._gpu_fits(1)
    assert auto.path_for(torch.device("cuda", 1)) == ("reference", "too old")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_the_environment_chooses_for_all_ops(emulated: Backend) -> None:
    code = "from exafuse import ops; print(ops.path, set(p for p, _ in ops.paths().values()))"
    done = run_python(code, EXAFUSE_BACKEND="reference")
    assert done.stdout.split() == ["reference", "{'reference'}"]
    done = run_python(
        code, EXAFUSE_BACKEND="emulated", EXAFUSE_EMULATED_LIB=str(emulator_library())
    )
    assert done.stdout.startswith("emulated ")
    assert "'emulated'" in done.stdout
    done = run_python(code, EXAFUSE_BACKEND="gpu")
    assert "EXAFUSE_BACKEND: expected auto, cuda, reference, emulated, got 'gpu'" in done.stderr


def test_a_missing_emulator_says_how_to_build_it() -> None:
    code = """
import torch
from exafuse import ops
print(ops.paths()["rms_norm"])
try:
    ops.rms_norm(torch.ones(8), torch.ones(8), 1e-6)
except ops.BackendError as error:
    print(error)
try:
    ops.for_path("emulated")
except ops.BackendError as error:
    print(error)
"""
    done = run_python(code, EXAFUSE_BACKEND="emulated", EXAFUSE_EMULATED_LIB="missing.so")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3
    for line in done.stdout.splitlines():
        assert "is not built (no file missing.so)" in line
        assert "python tests/emulator/build.py --variant plain" in line


def test_importing_ops_loads_no_extension() -> None:
    code = (
        "import exafuse.ops, sys; print([m for m in sys.modules if '_C' in m and 'exafuse' in m])"
    )
    assert run_python(code).stdout.strip() == "[]"


def test_paths_name_every_op_with_a_reason() -> None:
    paths = ops.paths()
    assert list(paths) == ops.__all__
    for name, (path, reason) in paths.items():
        assert path in ("cuda", "emulated", "reference")
        assert reason, name
    if not torch.cuda.is_available() and ops.path == "auto":
        assert {path for path, _ in paths.values()} == {"reference"}


def test_path_for_a_device(emulated: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda, other = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
    assert FrontDoor("emulated").path_for(cpu)[0] == "emulated"
    assert FrontDoor("emulated").path_for(cuda)[0] == "reference"
    assert FrontDoor("reference").path_for(cuda)[0] == "reference"
    assert FrontDoor("auto").path_for(cpu) == ("reference", "cpu tensors have no kernels")
    assert FrontDoor("auto").path_for(other)[0] == "reference"
    monkeypatch.setattr(front_door, "extension_problem", lambda: "")
    monkeypatch.setattr(front_door, "gpu_problem", lambda index: "")
    assert FrontDoor("auto").path_for(cuda) == ("cuda", "CUDA kernel")
    monkeypatch.setattr(front_door, "extension_problem", lambda: "no driver")
    assert FrontDoor("cuda").path_for(cuda) == ("reference", "no driver")
    if ops.path == "auto":
        assert ops.path_for(cpu) == "reference"


def test_for_path_gives_a_module_of_its_own(emulated: Backend) -> None:
    assert ops.for_path("auto") is ops
    module = ops.for_path("emulated")
    assert module is ops.for_path("emulated")
    assert module.path == "emulated"
    for name in ops.__all__:
        assert callable(getattr(module, name))
        assert getattr(module, name) is not getattr(ops, name)
    with pytest.raises(BackendError, match="backend: expected auto, cuda, reference, emulated"):
        ops.for_path("tpu")
    if front_door.cuda_problem():
        with pytest.raises(BackendError, match="backend 'cuda' cannot run here: "):
            ops.for_path("cuda")


def test_what_runs_another_way_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    door = FrontDoor("auto")
    with caplog.at_level(logging.WARNING, logger="exafuse"):
        for _ in range(2):
            door.say_once("this runs in plain PyTorch")
            door.say_once("so does that")
    messages = [record.message for record in caplog.records]
    assert messages == ["this runs in plain PyTorch", "so does that"]


@pytest.mark.parametrize("backend", ["auto", "emulated", "reference"])
def test_attention_runs_on_every_path(backend: str, emulated: Backend) -> None:
    q, k, v = (torch.randn(1, 4, heads, 16) for heads in (2, 1, 1))
    module = ops.for_path(backend)
    expected = reference.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(module.flash_attn_func(q, k=k, v=v, causal=True), expected)
