"""The single questions that :mod:`exafuse.cli.info` asks about an installation.

Each probe returns plain data or raises; whoever calls it guards it. Standard library only: torch
and the package's other modules are imported inside the probes that are about them.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from exafuse.cli.info_ledger import UNVERIFIED, built_hashes, verdicts

PACKAGE_FOLDER = Path(__file__).resolve().parents[1]
LIBRARIES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "tqdm",
)
OPTIONAL_LIBRARIES = (
    "matplotlib",
    "torchao",
    "bitsandbytes",
    "gguf",
    "pillow",
    "av",
    "torchvision",
)
LOWEST = {"torch": (2, 10), "transformers": (5, 8)}

Probe = Callable[[], Any]


# ---- package and build --------------------------------------------------------------------------


def _version() -> str:
    try:
        return importlib.metadata.version("exafuse")
    except importlib.metadata.PackageNotFoundError:
        from exafuse import __version__

        return f"{__version__} (not installed, imported from a folder)"


def _build_info() -> dict[str, Any]:
    """``_C.build_info()``, or {} for a Python-only installation; a binary that does not load
    raises."""
    if importlib.util.find_spec("exafuse._C") is None:
        return {}
    extension = importlib.import_module("exafuse._C")
    return dict(extension.build_info())


def _archs(build: Mapping[str, Any]) -> list[str]:
    archs = build.get("archs") or []
    return (
        [part for part in archs.replace(";", ",").split(",") if part]
        if isinstance(archs, str)
        else list(archs)
    )


def _mode() -> str:
    build = _build_info()
    if not build:
        return "Python only: no compiled extension, every op takes the reference path"
    if not _archs(build):
        return "C++ extension without CUDA: every op takes the reference path"
    return "CUDA extension"


def _build_row(name: str) -> Probe:
    def probe() -> Any:
        return _build_info().get(name)

    return probe


def _extension_file() -> str | None:
    spec = importlib.util.find_spec("exafuse._C")
    return None if spec is None else spec.origin


# ---- GPU ----------------------------------------------------------------------------------------


def _gpus() -> list[dict[str, str]] | str:
    fields = ("name", "compute_cap", "memory.total", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return "none found (no nvidia-smi on this machine)"
    if done.returncode != 0:
        first = (done.stderr or done.stdout).strip().splitlines()
        raise RuntimeError(f"nvidia-smi: {first[0] if first else f'exit {done.returncode}'}")
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows] or "none found"


def _driver_cuda() -> str | None:
    """The newest CUDA version that the installed driver can run; None without a driver."""
    for name in ("libcuda.so.1", "libcuda.so", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int(0)
        code = driver.cuDriverGetVersion(ctypes.byref(version))
        if code != 0:
            raise RuntimeError(f"cuDriverGetVersion returned {code}")
        return _cuda_version(version.value)
    return None


def _cuda_version(value: Any) -> str | None:
    """13000 -> "13.0"; text passes through."""
    if isinstance(value, int):
        return f"{value // 1000}.{value % 1000 // 10}" if value else None
    return str(value) if value else None


def _cuda_match() -> str:
    built, driver = _cuda_version(_build_info().get("cuda")), _driver_cuda()
    if built is None:
        return "extension built without CUDA"
    if driver is None:
        return f"built with CUDA {built}; no driver here"
    if int(driver.split(".")[0]) < int(built.split(".")[0]):
        return f"built with CUDA {built}, but the driver runs at most {driver}: update the driver"
    return f"built with CUDA {built}, driver runs up to {driver}: fits"


def _arch_match() -> str | list[str]:
    """Whether the binary holds code for each GPU found (machine code, or PTX to translate)."""
    gpus, archs = _gpus(), _archs(_build_info())
    if isinstance(gpus, str):
        return "no GPU to match"
    if not archs:
        return "no GPU code in this build"
    return [f"{gpu['name']}: {_code_for(gpu['compute_cap'], archs)}" for gpu in gpus]


def _code_for(compute_cap: str, archs: list[str]) -> str:
    major, minor = (int(part) for part in compute_cap.split(".")[:2])
    best = ""
    for arch in archs:
        number, _, form = arch.partition("-")
        specific = number.endswith(("a", "f"))  # runs on exactly this architecture or family
        digits = int(number.rstrip("af").removeprefix("sm_"))
        if form != "virtual" and digits // 10 == major and digits % 10 <= minor:
            if not specific or digits == 10 * major + minor:
                best = f"machine code {arch}"
        elif form in ("virtual", "") and not specific and digits <= 10 * major + minor:
            best = best or f"PTX {arch}, translated by the driver at first use"
    return best or f"no code for compute capability {compute_cap} (built for {', '.join(archs)})"


# ---- libraries ----------------------------------------------------------------------------------


def _library(name: str) -> Probe:
    def probe() -> str:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        lowest = LOWEST.get(name)
        numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
        if lowest and numbers < lowest:
            return f"{version} (too old: {'.'.join(map(str, lowest))} or newer is needed)"
        return version

    return probe


def _optional_libraries() -> dict[str, str]:
    found = {name: _library(name)() for name in OPTIONAL_LIBRARIES}
    return {name: version for name, version in found.items() if version != "not installed"}


def _torch_build() -> str:
    torch = importlib.import_module("torch")
    gpu = f"sees {torch.cuda.device_count()} GPU(s)" if torch.cuda.is_available() else "sees no GPU"
    dlpack = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    exchange = "" if dlpack else "; no DLPack exchange interface, so the extension cannot be called"
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}, {gpu}{exchange}"


def _pictures() -> str:
    """What a model that sees can be shown here."""
    parts = importlib.import_module("exafuse.media.parts")
    if importlib.util.find_spec("PIL") is None:
        return 'none: pip install "exafuse[vision]"'
    problem = parts.torchvision_problem()
    if problem is None and importlib.util.find_spec("av") is None:
        problem = "PyAV is not installed; frames in memory can be shown"
    if problem is None:
        return "images and videos"
    return f'images; for videos pip install "exafuse[vision]" ({problem})'


# ---- ops and verification -----------------------------------------------------------------------


def _paths() -> dict[str, dict[str, str]]:
    """``{op: {"path": cuda, emulated or reference, "reason": text}}``."""
    ops = importlib.import_module("exafuse.ops")
    return {name: {"path": path, "reason": why} for name, (path, why) in ops.paths().items()}


def _ledgers() -> list[Path]:
    """Ledgers of kernel runs on GPUs, beside the installed benchmarks or in the source tree."""
    roots = (PACKAGE_FOLDER / "benchmarks", PACKAGE_FOLDER.parents[1] / "benchmarks")
    return [file for root in roots for file in sorted(root.glob("results/*/ledger.json"))]


def _verified() -> str | dict[str, str]:
    build = _build_info()
    if not _archs(build):
        return "no kernels compiled, nothing to verify"
    return verdicts(built_hashes(build), _ledgers()) or UNVERIFIED


def _environment() -> dict[str, str]:
    names = ("CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("EXAFUSE_") or name in names
    }


PROBES: dict[str, dict[str, Probe]] = {
    "package": {
        "exafuse": _version,
        "folder": lambda: str(PACKAGE_FOLDER),
        "python": lambda: f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform,
        "environment": _environment,
    },
    "build": {
        "mode": _mode,
        "extension": _extension_file,
        "architectures": lambda: ", ".join(_archs(_build_info())) or None,
        "compiler": _build_row("compiler"),
        "cuda": lambda: _cuda_version(_build_info().get("cuda")),
        "source hash": _build_row("source_hash"),
    },
    "gpu": {
        "devices": _gpus,
        "driver CUDA": _driver_cuda,
        "CUDA versions": _cuda_match,
        "code for it": _arch_match,
    },
    "libraries": {
        **{name: _library(name) for name in LIBRARIES},
        "optional": _optional_libraries,
        "import torch": _torch_build,
        "pictures": _pictures,
    },
    "ops": {"path of each op": _paths, "kernels": _verified},
}
