"""The build: what each kind of wheel holds, what the extension links, what its kernels cost."""

import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
# What every Linux has beside a C++ program. Anything else would tie the wheel to a torch or a GPU.
ALLOWED_LIBRARIES = re.compile(
    r"(libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux[\w-]*)\.so\.\d+"
)


def load_backend() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "cmake/build_backend.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["build_backend"] = module  # dataclasses look their own module up
    spec.loader.exec_module(module)
    return module


backend = load_backend()


def run_backend(call: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `call` of the build backend in a fresh interpreter at the project's root, as pip does."""
    if importlib.util.find_spec("scikit_build_core") is None:
        pytest.skip("scikit-build-core is not installed: pip install '.[dev]'")
    clean = {name: x for name, x in os.environ.items() if not name.startswith("EXAFUSE_")}
    return subprocess.run(
        [sys.executable, "-c", f"import build_backend; build_backend.{call}"],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT / "cmake"), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def build_python_only(folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel into `folder`; its path and what the backend said."""
    done = run_backend(f"build_wheel({str(folder)!r})", **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel, done.stderr


def built_extension() -> Path:
    """The compiled extension of this environment; skips with a reason where there is none."""
    spec = importlib.util.find_spec("exafuse._C")
    if spec is not None and spec.origin is not None and spec.origin.endswith(".so"):
        return Path(spec.origin)
    if not importlib.metadata.packages_distributions().get("exafuse"):
        pytest.skip("exafuse runs from its sources here, it is not installed")
    if backend.find_system_nvcc():
        pytest.fail("there is nvcc, but the extension is not built: run `make install`")
    return pytest.skip("the extension is not built: no nvcc here")


# ---- wheels --------------------------------------------------------------------------------------


def test_python_only_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    wheel, said = build_python_only(tmp_path, EXAFUSE_CUDA="OFF")
    assert wheel.name == f"exafuse-{PYPROJECT['project']['version']}-py3-none-any.whl"
    assert said.count("Python only, without CUDA kernels (EXAFUSE_CUDA=OFF)") == 1
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        entry_points = archive.read(next(n for n in names if n.endswith("entry_points.txt")))
    assert b"exafuse=exafuse.cli:main" in entry_points.replace(b" ", b"")
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)

    package = ROOT / "python" / "exafuse"
    modules = {p.relative_to(package.parent).as_posix() for p in package.rglob("*.py*")}
    modules = {name for name in modules if "__pycache__" not in name}
    assert modules | {"exafuse/py.typed", "exafuse/benchmarks/__init__.py"} <= names
    for name in names:
        assert re.match(r"exafuse/|exafuse-[\d.]+\.dist-info/", name), name
        assert not re.search(r"__pycache__|\.so$|conftest", name), name
        assert re.search(r"benchmarks/results/(?!.+/ledger\.json$)", name) is None, name


def test_no_compiler_gives_a_python_only_wheel(tmp_path: Path) -> None:
    wheel, said = build_python_only(tmp_path, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Python only, without CUDA kernels (no C++ compiler found)" in said


def test_cuda_on_without_compiler_is_an_error(tmp_path: Path) -> None:
    done = run_backend(f"build_wheel({str(tmp_path)!r})", EXAFUSE_CUDA="ON", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "EXAFUSE_CUDA=ON, but no C++ compiler found" in done.stderr
    assert not list(tmp_path.iterdir())


def test_sdist_holds_what_a_build_needs(tmp_path: Path) -> None:
    done = run_backend(f"build_sdist({str(tmp_path)!r})")
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    build = {"CMakeLists.txt", "cmake/build_backend.py", "cmake/cuda.cmake", "pyproject.toml"}
    assert build | sources | {"LICENSE", "README.md", "python/exafuse/__init__.py"} <= names
    assert not any(name.startswith((".venv", ".cache", "build/")) for name in names)


# ---- which wheel ---------------------------------------------------------------------------------


@pytest.fixture
def bare_machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No setting in the environment; a compiler, no nvcc of any kind."""
    for name in ("EXAFUSE_CUDA", "EXAFUSE_NVCC", "CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(backend, "find_cxx", lambda: "c++")
    monkeypatch.setattr(backend, "find_system_nvcc", lambda: None)
    monkeypatch.setattr(backend, "find_wheels_nvcc", lambda: None)
    return monkeypatch


def test_system_nvcc_is_taken_first(bare_machine: pytest.MonkeyPatch) -> None:
    bare_machine.setattr(backend, "find_system_nvcc", lambda: Path("cuda/bin/nvcc"))
    plan = backend.make_plan()
    assert plan.kernels
    assert plan.requirements == ()
    settings = backend.settings_for(None, plan)
    assert settings["cmake.define.CMAKE_CUDA_COMPILER"] == str(Path("cuda/bin/nvcc"))


@pytest.mark.parametrize("wanted", [None, "wheels"])
def test_nvcc_wheels_join_the_build_requirements(
    bare_machine: pytest.MonkeyPatch, wanted: str | None
) -> None:
    if wanted:  # asked for by name: taken even where the system has nvcc
        bare_machine.setenv("EXAFUSE_NVCC", wanted)
        bare_machine.setattr(backend, "find_system_nvcc", lambda: Path("cuda/bin/nvcc"))
    plan = backend.make_plan()
    assert plan.kernels
    names = {requirement.partition("==")[0] for requirement in plan.requirements}
    parts = ("cuda-nvcc", "cuda-crt", "cuda-runtime", "cuda-cccl", "nvvm")
    assert names == {f"nvidia-{part}" for part in parts}
    assert {requirement.partition("==")[2] for requirement in plan.requirements} == {"13.0.*"}
    for name in names:
        assert CONSTRAINTS[name].startswith("13.0.")


def test_compiler_alone_gives_python_only_when_wheels_are_declined(
    bare_machine: pytest.MonkeyPatch,
) -> None:
    bare_machine.setenv("EXAFUSE_NVCC", "system")
    plan = backend.make_plan()
    assert not plan.kernels
    assert str(plan) == (
        "exafuse: building Python only, without CUDA kernels "
        "(no nvcc found, and EXAFUSE_NVCC=system)"
    )
    bare_machine.setenv("EXAFUSE_CUDA", "ON")
    with pytest.raises(SystemExit, match="EXAFUSE_CUDA=ON, but no nvcc found"):
        backend.make_plan()


def test_missing_nvcc_wheels_are_named_without_isolation(
    bare_machine: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(SystemExit, match=r"pip install .*nvidia-cuda-nvcc==13\.0.*"):
        backend.plan_for_build(None)


@pytest.mark.parametrize("name", ["EXAFUSE_CUDA", "EXAFUSE_NVCC"])
def test_unknown_setting_is_an_error(bare_machine: pytest.MonkeyPatch, name: str) -> None:
    bare_machine.setenv(name, "perhaps")
    with pytest.raises(SystemExit, match=rf"{name}: expected one of .*, got 'perhaps'"):
        backend.make_plan()


def test_setting_on_the_command_line_wins(bare_machine: pytest.MonkeyPatch) -> None:
    bare_machine.setenv("EXAFUSE_CUDA", "ON")
    assert not backend.make_plan({"cmake.define.EXAFUSE_CUDA": "off"}).kernels


# ---- import --------------------------------------------------------------------------------------

IMPORT_CHECK = """
import sys
for name in ("transformers", "exafuse._C", "exafuse._C_emulated", "torch.utils.cpp_extension"):
    sys.modules[name] = None  # importing it is an error from here on
import exafuse
assert exafuse.__version__
import torch
assert not torch.cuda.is_initialized()
x = torch.ones(2, 8)
assert torch.equal(exafuse.ops.rms_norm(x, x[0], 0.0), x)
print("imported without", sum(module is None for module in sys.modules.values()), "modules")
"""


def test_import_needs_no_extension_no_gpu_and_no_transformers() -> None:
    environment = {name: x for name, x in os.environ.items() if not name.startswith("EXAFUSE_")}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_CHECK],
        env={**environment, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "imported without 4 modules" in done.stdout


# ---- the extension -------------------------------------------------------------------------------


def test_extension_links_no_torch_and_no_cuda() -> None:
    extension = built_extension()
    readelf = shutil.which("readelf") or pytest.skip("readelf (binutils) is not installed")
    report = subprocess.run(
        [readelf, "--dynamic", "--wide", extension], capture_output=True, text=True, check=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", report)
    assert needed
    assert [name for name in needed if not ALLOWED_LIBRARIES.fullmatch(name)] == []
    assert "RPATH" not in report
    assert "RUNPATH" not in report


def test_extension_exports_its_module_only() -> None:
    extension = built_extension()
    nm = shutil.which("nm") or pytest.skip("nm (binutils) is not installed")
    report = subprocess.run(
        [nm, "--dynamic", "--defined-only", "--format=posix", extension],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = [line.split()[0] for line in report.splitlines()]
    assert "PyInit__C" in names
    # A visible CUDA runtime would be shared with, or taken from, another library of the process.
    assert [name for name in names if re.match(r"_*(cuda|cu[A-Z])", name)] == []


def test_extension_is_built_from_these_sources() -> None:
    built_extension()
    from exafuse import _C

    root = ROOT / "csrc"
    listing = "".join(
        f"{name} {hashlib.sha256((root / name).read_bytes()).hexdigest()}\n"
        for name in sorted(p.relative_to(root).as_posix() for p in root.rglob("*"))
        if name.endswith((".h", ".cuh", ".cpp", ".cu"))
    )
    info = _C.build_info()
    assert info["version"] == PYPROJECT["project"]["version"]
    assert info["source_hash"] == hashlib.sha256(listing.encode()).hexdigest(), "run make install"
    program = [sys.executable, str(ROOT / "cmake" / "kernel_hash.py")]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    assert info["kernel_hashes"] == printed.strip()
