"""`exafuse info`: what it says, and that no broken installation keeps it from saying it."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import exafuse
import pytest
from exafuse.cli import info, info_probes
from exafuse.cli.commands import main
from exafuse.media import parts

BUILD = {
    "version": "0.1.0",
    "source_hash": "ab" * 32,
    "archs": "80-real,90a-real,90-virtual",
    "compiler": "nvcc 13.0.88",
    "cuda": 13000,
}


@pytest.fixture
def build(monkeypatch):
    """A build of our choice in the place of the installed one."""

    def choose(**changes):
        monkeypatch.setattr(info_probes, "_build_info", lambda: BUILD | changes)

    choose()
    return choose


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """A program of that name, alone in PATH, that prints the given lines."""

    def choose(output, code=0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\ncat <<'END'\n{output}\nEND\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")

    return choose


def all_paths(path, reason=""):
    return lambda: {"rms_norm": {"path": path, "reason": reason}}


def test_command_runs_here(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for section in info_probes.PROBES:
        assert f"\n{section}\n" in f"\n{text}"
    assert importlib.metadata.version("torch") in text
    assert "rms_norm" in text


def test_json_has_every_row(capsys):
    assert main(["info", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["schema"] == 1
    for section, probes in info_probes.PROBES.items():
        assert set(result[section]) == set(probes)
    assert result["ops"]["path of each op"]["rms_norm"]["path"] in ("cuda", "emulated", "reference")


def test_subprocess_on_a_machine_without_anything(tmp_path):
    """No PATH, no home, no GPU library: still a full report and exit code 0."""
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "PATH": str(tmp_path)}
    argv = [sys.executable, "-m", "exafuse", "info"]
    done = subprocess.run(
        argv, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "none found (no nvidia-smi on this machine)" in done.stdout


@pytest.mark.parametrize("failure", [RuntimeError("bad\nluck"), SystemExit(3), OSError(), KeyError])
def test_every_probe_may_fail(monkeypatch, capsys, failure):
    def broken():
        raise failure

    for section, probes in info_probes.PROBES.items():
        for name in probes:
            with monkeypatch.context() as patch:
                patch.setitem(probes, name, broken)
                assert main(["info"]) == 0
                text = capsys.readouterr().out
                assert main(["info", "--json", "--strict"]) == 1
                result = json.loads(capsys.readouterr().out)
            kind = (failure if isinstance(failure, type) else type(failure)).__name__
            assert result[section][name]["error"].startswith(kind)
            assert "\n" not in result[section][name]["error"]
            row = next(line for line in text.splitlines() if line.startswith(f"  {name} "))
            assert f"error: {kind}" in row
            assert any(problem.startswith(f"{section}, {name}: ") for problem in result["problems"])


def test_all_probes_fail_at_once(monkeypatch):
    def broken():
        raise MemoryError

    for probes in info_probes.PROBES.values():
        for name in probes:
            monkeypatch.setitem(probes, name, broken)
    text = info.render(info.report())
    assert text.count("error: MemoryError") == sum(map(len, info_probes.PROBES.values()))


def test_extension_that_does_not_load(monkeypatch):
    def broken():
        raise ImportError("libfoo.so.1: cannot open shared object file")

    monkeypatch.setattr(info_probes, "_build_info", broken)
    result = info.report()
    assert "libfoo.so.1" in result["build"]["mode"]["error"]
    assert any("does not load: rebuild" in advice for advice in result["advice"])


def test_python_only_build_advises_against_the_cached_wheel(monkeypatch):
    monkeypatch.setattr(info_probes, "_build_info", dict)
    result = info.report()
    assert result["build"]["mode"].startswith("Python only")
    assert result["ops"]["kernels"] == "no kernels compiled, nothing to verify"
    assert any("--no-cache-dir" in advice for advice in result["advice"])


@pytest.mark.parametrize("editable", [False, True])
def test_advice_names_the_folder_with_the_sources(monkeypatch, tmp_path, editable):
    """No package index has exafuse: what pip noted on installing says where it came from."""
    monkeypatch.setattr(info_probes, "_build_info", dict)
    folder = tmp_path / "my sources"
    folder.mkdir()
    origin = {"url": folder.as_uri(), "dir_info": {"editable": True} if editable else {}}
    found = SimpleNamespace(read_text=lambda _name: json.dumps(origin))
    monkeypatch.setattr(info, "distribution", lambda _name: found)
    (advice,) = info.report()["advice"]
    assert advice.endswith(
        "`pip install --force-reinstall --no-cache-dir --no-deps .` in the "
        "folder with exafuse's sources"
    )
    (folder / "pyproject.toml").write_text("")
    (advice,) = info.report()["advice"]
    flag = "--editable " if editable else ""
    assert advice.endswith(f"--no-deps {flag}'{folder}'`")
    for text in (None, "{", "[]", '{"url": 7}', '{"url": "https://example.org/x.whl"}'):
        found.read_text = lambda _name, text=text: text
        (advice,) = info.report()["advice"]
        assert advice.endswith("sources")


@pytest.mark.parametrize(
    ("problem", "missing", "expected"),
    [
        (None, (), "images and videos"),
        (None, ("av",), "images; for videos"),
        ("torchvision is not installed", (), "(torchvision is not installed)"),
        ("torchvision is not installed", ("PIL",), "none: pip install"),
    ],
)
def test_what_can_be_shown_to_a_model(monkeypatch, problem, missing, expected):
    find = importlib.util.find_spec
    monkeypatch.setattr(parts, "torchvision_problem", lambda: problem)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in missing else find("json")
    )
    assert expected in info_probes.PROBES["libraries"]["pictures"]()


def test_build_without_cuda(build):
    build(archs="", cuda=0, compiler="gcc 12.2.0")
    result = info.report()
    assert result["build"]["mode"].startswith("C++ extension without CUDA")
    assert result["build"]["cuda"] is None
    assert any("--no-cache-dir" in advice for advice in result["advice"])


def test_cuda_build_is_described(build, monkeypatch):
    monkeypatch.setattr(info_probes, "_ledgers", list)
    result = info.report()
    assert result["build"]["mode"] == "CUDA extension"
    assert result["build"]["architectures"] == "80-real, 90a-real, 90-virtual"
    assert result["build"]["cuda"] == "13.0"
    assert result["ops"]["kernels"] == "compiled, not yet verified on a GPU"
    assert not any("--no-cache-dir" in advice for advice in result["advice"])


def test_gpu_and_fitting_driver(build, nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA H200, 9.0, 143771 MiB, 580.65.06")
    monkeypatch.setattr(info_probes, "_driver_cuda", lambda: "13.0")
    monkeypatch.setitem(info_probes.PROBES["ops"], info.PATHS, all_paths("cuda"))
    result = info.report()
    assert result["gpu"]["devices"][0]["name"] == "NVIDIA H200"
    assert result["gpu"]["CUDA versions"].endswith("fits")
    assert result["gpu"]["code for it"] == ["NVIDIA H200: machine code 90a-real"]
    assert not [problem for problem in result["problems"] if "GPU" in problem]


def test_gpu_with_an_old_driver(build, nvidia_smi, monkeypatch):
    nvidia_smi("Tesla T4, 7.5, 15360 MiB, 535.1")
    monkeypatch.setattr(info_probes, "_driver_cuda", lambda: "12.2")
    monkeypatch.setitem(info_probes.PROBES["ops"], info.PATHS, all_paths("reference", "too old"))
    problems = "\n".join(info.report()["problems"])
    assert "the driver runs at most 12.2: update the driver" in problems
    assert "no code for compute capability 7.5" in problems
    assert "these ops do not use it: rms_norm" in problems


def test_nvidia_smi_that_fails_hangs_or_babbles(nvidia_smi, monkeypatch):
    nvidia_smi("NVIDIA-SMI has failed because it could not talk to the driver", code=9)
    assert "could not talk" in info.report()["gpu"]["devices"]["error"]
    nvidia_smi("what?")
    assert "ValueError" in info.report()["gpu"]["devices"]["error"]

    def hang(command, timeout, **_options):
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hang)
    assert "TimeoutExpired" in info.report()["gpu"]["devices"]["error"]


def test_driver_version_is_asked_of_libcuda(monkeypatch):
    class Driver:
        @staticmethod
        def cuDriverGetVersion(pointer):
            pointer._obj.value = 12040
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _name: Driver)
    assert info.report()["gpu"]["driver CUDA"] == "12.4"


@pytest.mark.parametrize(
    ("capability", "archs", "words"),
    [
        ("8.0", ["80-real"], "machine code 80-real"),
        ("8.9", ["80-real"], "machine code 80-real"),
        ("9.0", ["80-real", "90a-real"], "machine code 90a-real"),
        ("10.0", ["80-real", "90a-real"], "no code for compute capability 10.0"),
        ("10.0", ["80-real", "90a-real", "90-virtual"], "PTX 90-virtual"),
        ("12.0", ["120"], "machine code 120"),
        ("12.1", ["90-virtual", "120-real"], "machine code 120-real"),
        ("7.5", ["80-real", "80-virtual"], "no code"),
    ],
)
def test_code_for_an_architecture(capability, archs, words):
    assert words in info_probes._code_for(capability, archs)


def test_libraries_too_old_or_missing(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "tqdm":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"torch": "2.9.1+cu128", "transformers": "5.8.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = info.report()
    assert "2.10 or newer is needed" in result["libraries"]["torch"]
    assert result["libraries"]["transformers"] == "5.8.0"
    problems = "\n".join(result["problems"])
    assert "torch: 2.9.1+cu128 (too old" in problems
    assert "tqdm: not installed" in problems


def test_package_folder_is_the_package():
    assert (info_probes.PACKAGE_FOLDER / "__init__.py").samefile(exafuse.__file__)
    assert info.report()["package"]["folder"] == str(info_probes.PACKAGE_FOLDER)


def test_environment_shows_only_what_concerns_us(monkeypatch):
    monkeypatch.setenv("EXAFUSE_BACKEND", "reference")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    text = info.to_json(info.report())
    assert '"EXAFUSE_BACKEND": "reference"' in text
    assert "hf_secret" not in text


def test_strict_without_problems_is_0(monkeypatch, capsys):
    monkeypatch.setattr(info, "_problems", lambda _result: [])
    assert main(["info", "--strict"]) == 0
    assert "\nproblems\n" not in capsys.readouterr().out


def test_imports_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import exafuse.cli.info;"
        " new = {name.split('.')[0] for name in set(sys.modules) - before};"
        " print(sorted(new - sys.stdlib_module_names - {'exafuse'}))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(info.__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
