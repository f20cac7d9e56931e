"""The build backend: scikit-build-core, after choosing what this machine can build.

One of three wheels comes out, the same for `pip install .`, `pip wheel .` and `pip install -e .`:

* kernels, compiled by the system's nvcc;
* kernels, compiled by nvcc from the registry's wheels, which join the build requirements;
* Python only, where CUDA was declined or there is no C++ compiler. The reference path is complete,
  so nothing but speed is lost; compiling C++ without the kernels would add nothing.

`EXAFUSE_CUDA` = AUTO (default), ON (anything but kernels is an error) or OFF, also as
`-C cmake.define.EXAFUSE_CUDA=...`. `EXAFUSE_NVCC` = auto (default), system or wheels.

Run as a program it prints the choice, or with `--requirements` the packages that a build without
isolation needs to have installed first.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

ConfigSettings = dict[str, "list[str] | str"]

# One 13.0 series: the parts of a toolkit must match each other.
NVCC_WHEELS = [
    "nvidia-cuda-cccl==13.0.*",
    "nvidia-cuda-crt==13.0.*",
    "nvidia-cuda-nvcc==13.0.*",
    "nvidia-cuda-runtime==13.0.*",
    "nvidia-nvvm==13.0.*",
]
CUDA_SETTING = "cmake.define.EXAFUSE_CUDA"


@dataclass(frozen=True)
class Plan:
    """What is built, with which nvcc (None: wheels that are not installed yet), and why."""

    kernels: bool
    reason: str
    nvcc: Path | None = None
    requirements: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = "with CUDA kernels" if self.kernels else "Python only, without CUDA kernels"
        return f"exafuse: building {what} ({self.reason})"


def choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    """`value` if it is one of `allowed`, whatever its case; otherwise an error that names them."""
    for word in allowed:
        if value.lower() == word.lower():
            return word
    raise SystemExit(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


def find_cxx() -> str | None:
    """The C++ compiler that CMake would take."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((path for path in map(shutil.which, names) if path), None)


def find_system_nvcc() -> Path | None:
    """nvcc by CUDACXX, CUDA_HOME, CUDA_PATH, PATH, then /usr/local/cuda."""
    if os.environ.get("CUDACXX"):
        found = shutil.which(os.environ["CUDACXX"])
        if found is None:
            raise SystemExit(f"CUDACXX: no such program: {os.environ['CUDACXX']!r}")
        return Path(found)
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    in_roots = [str(Path(root, "bin", "nvcc")) for root in roots if root]
    for name in (*in_roots[:-1], "nvcc", in_roots[-1]):
        found = shutil.which(name)
        if found:
            return Path(found)
    return None


def find_wheels_nvcc() -> Path | None:
    """nvcc of the registry's wheels, where they are installed for this Python."""
    for folder in sys.path:
        nvcc = Path(folder or ".", "nvidia", "cu13", "bin", "nvcc")
        if nvcc.is_file():
            return nvcc.resolve()
    return None


def make_plan(settings: ConfigSettings | None = None) -> Plan:
    """Decide what to build from the settings, the environment and what is installed."""
    asked = str((settings or {}).get(CUDA_SETTING) or os.environ.get("EXAFUSE_CUDA") or "AUTO")
    cuda = choice("EXAFUSE_CUDA", asked, ("AUTO", "ON", "OFF"))
    source = choice(
        "EXAFUSE_NVCC", os.environ.get("EXAFUSE_NVCC") or "auto", ("auto", "system", "wheels")
    )
    missing = None
    if cuda == "OFF":
        return Plan(False, "EXAFUSE_CUDA=OFF")
    if not sys.platform.startswith("linux"):
        missing = "kernels are built on Linux only"
    elif find_cxx() is None:
        missing = "no C++ compiler found"
    if missing is None:
        nvcc = None if source == "wheels" else find_system_nvcc()
        if nvcc is not None:
            return Plan(True, f"nvcc: {nvcc}", nvcc)
        if source != "system":
            return Plan(True, "nvcc: registry wheels", find_wheels_nvcc(), tuple(NVCC_WHEELS))
        missing = "no nvcc found, and EXAFUSE_NVCC=system"
    if cuda == "ON":
        raise SystemExit(f"EXAFUSE_CUDA=ON, but {missing}")
    return Plan(False, missing)


def settings_for(settings: ConfigSettings | None, plan: Plan) -> ConfigSettings:
    """scikit-build-core's settings for the plan, added to the user's."""
    merged = dict(settings or {})
    merged.pop(CUDA_SETTING, None)
    if not plan.kernels:
        return {**merged, "wheel.cmake": "false", "wheel.py-api": "py3"}
    if plan.nvcc is not None:
        merged["cmake.define.CMAKE_CUDA_COMPILER"] = str(plan.nvcc)
    return {**merged, "cmake.define.EXAFUSE_CUDA": "ON"}


def plan_for_build(settings: ConfigSettings | None) -> Plan:
    """The plan of a build that starts now: what it needs must be installed."""
    plan = make_plan(settings)
    if plan.kernels and plan.nvcc is None:
        raise SystemExit(
            "exafuse: no nvcc found. Install CUDA 13, or build with isolation, or run\n"
            f"    pip install {' '.join(repr(name) for name in NVCC_WHEELS)}\n"
            "or build without kernels: EXAFUSE_CUDA=OFF"
        )
    print(plan, file=sys.stderr, flush=True)
    return plan


def get_requires_for_build_wheel(config_settings: ConfigSettings | None = None) -> list[str]:
    from scikit_build_core import build

    plan = make_plan(config_settings)
    requires = build.get_requires_for_build_wheel(settings_for(config_settings, plan))
    return [*requires, *plan.requirements]


def get_requires_for_build_editable(config_settings: ConfigSettings | None = None) -> list[str]:
    from scikit_build_core import build

    plan = make_plan(config_settings)
    requires = build.get_requires_for_build_editable(settings_for(config_settings, plan))
    return [*requires, *plan.requirements]


def get_requires_for_build_sdist(config_settings: ConfigSettings | None = None) -> list[str]:
    from scikit_build_core import build

    return build.get_requires_for_build_sdist(config_settings)


def build_wheel(
    wheel_directory: str,
    config_settings: ConfigSettings | None = None,
    metadata_directory: str | None = None,
) -> str:
    from scikit_build_core import build

    settings = settings_for(config_settings, plan_for_build(config_settings))
    return build.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str,
    config_settings: ConfigSettings | None = None,
    metadata_directory: str | None = None,
) -> str:
    from scikit_build_core import build

    settings = settings_for(config_settings, plan_for_build(config_settings))
    return build.build_editable(wheel_directory, settings, metadata_directory)


def build_sdist(sdist_directory: str, config_settings: ConfigSettings | None = None) -> str:
    from scikit_build_core import build

    return build.build_sdist(sdist_directory, config_settings)


if __name__ == "__main__":
    print("\n".join(make_plan().requirements) if "--requirements" in sys.argv else make_plan())
