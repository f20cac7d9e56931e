"""Metadata and settings that are written in two places must agree."""

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CONSTRAINTS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_pins_cover_every_requirement_and_meet_its_floor() -> None:
    project = PYPROJECT["project"]
    installed = ("demo", "bench", "test", "dev")
    wanted = [*project["dependencies"], *PYPROJECT["build-system"]["requires"]]
    for extra in installed:
        wanted += project["optional-dependencies"][extra]
    pins = {canonical(name): pin for name, pin in CONSTRAINTS.items()}
    for requirement in wanted:
        name, floor = re.match(r"([\w.-]+(?:\[\w+\])?)(?:>=([\d.]+))?", requirement).groups()
        if name.startswith("exafuse["):
            continue
        specifier = requirement.partition(";")[0]
        assert floor is not None, f"{requirement}: expected a floor"
        assert not re.search(r"==|<|~=|!=", specifier), f"{requirement}: floors only"
        pin = tuple(map(int, re.findall(r"\d+", pins[canonical(name)])))
        assert pin >= tuple(map(int, floor.split("."))), requirement


def test_hooks_and_constraints_pin_the_same_tools() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    pinned = re.findall(r'"([\w-]+)==([\d.]+)"', hooks)
    assert {name for name, _ in pinned} == {"ruff", "clang-format"}
    for name, version in pinned:
        assert CONSTRAINTS[name] == version
    assert f"mypy {CONSTRAINTS['mypy']} " in hooks


def test_presets_agree_with_the_default_architectures() -> None:
    presets = json.loads((ROOT / "CMakePresets.json").read_text(encoding="utf-8"))
    lists = {
        preset["name"]: preset["cacheVariables"]["CMAKE_CUDA_ARCHITECTURES"].split(";")
        for preset in presets["configurePresets"]
    }
    cmake = (ROOT / "cmake/cuda.cmake").read_text(encoding="utf-8")
    assert f'set(CMAKE_CUDA_ARCHITECTURES "{";".join(lists["default"])}")' in cmake
    real = [arch.removesuffix("-real") for arch in lists["release"] if arch.endswith("-real")]
    assert real == ["80", "86", "89", "90a", "100", "120"]
    assert any(arch.endswith("-virtual") for arch in lists["release"])


def test_installed_version_is_the_declared_one() -> None:
    try:
        version = importlib.metadata.version("exafuse")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("exafuse runs from its sources here, it is not installed")
    assert version == PYPROJECT["project"]["version"]
