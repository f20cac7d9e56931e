"""The GPU ledger without a GPU: what is run, how it is judged, and what a later run leaves out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import gpu_checks
import gpu_ledger
import pytest
from gpu_checks import CHECKS, TOOLS, Finished
from gpu_ledger import Ledger, Machine, Session

H200 = Machine("NVIDIA H200", "580.65.06", "2.13.0+cu130", "13.0")
HASHES = {"rms_norm": "aa" * 32, "silu_and_mul": "bb" * 32}
COUNTS = "cases: 0 ran emulated, 1234 ran on a GPU, 0 skipped for want of a GPU\n"
GREEN = "12 passed, 40 deselected in 3.50s\nlargest error in ulps: bfloat16 0.5, float32 0.75\n"
GREEN += COUNTS
RED = "2 failed, 10 passed in 3.50s\n" + COUNTS


def output_of(check: str, tests: str = GREEN, findings: int = 0) -> str:
    summary = {
        "tests": "",
        "racecheck": f"========= RACECHECK SUMMARY: {findings} hazards displayed (0 errors, 0 w)\n",
    }
    return tests + summary.get(check, f"========= ERROR SUMMARY: {findings} errors\n")


class FakeGpu:
    """Answers for the processes; `answers` replaces the green one of a (kernel, check)."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Finished] = {}
        self.ran: list[tuple[str, str]] = []
        self.limits: list[float] = []
        self.now = 0.0
        self.seconds = 10.0

    def __call__(self, command, environment, limit_s) -> Finished:
        check = command[command.index("--tool") + 1] if "--tool" in command else "tests"
        kernel = Path(command[-1]).stem.removeprefix("test_")
        assert ("PYTORCH_NO_CUDA_MEMORY_CACHING" in environment) == (check != "tests")
        self.ran.append((kernel, check))
        self.limits.append(limit_s)
        self.now += self.seconds
        return self.answers.get((kernel, check), Finished(0, output_of(check), self.seconds))


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def go(gpu: FakeGpu, tmp_path: Path) -> Callable[..., tuple[int, dict]]:
    """Runs a session; its status and the kernels of the ledger that it wrote."""

    def run(hashes=HASHES, machine=H200, **changes) -> tuple[int, dict]:
        gpu.ran.clear()
        ledger = Ledger(tmp_path, machine)
        options = {"limit_s": 450.0, "sanitizer": "compute-sanitizer", **changes}
        status = Session(machine, hashes, ledger, run=gpu, clock=lambda: gpu.now, **options).go()
        return status, json.loads((tmp_path / "nvidia-h200" / "ledger.json").read_text())["kernels"]

    return run


def test_green_run_records_everything(gpu, go) -> None:
    status, kernels = go()
    assert status == gpu_ledger.PASSED
    assert gpu.ran == [(kernel, check) for kernel in HASHES for check in CHECKS]
    entry = kernels["rms_norm"]
    assert entry["hash"] == HASHES["rms_norm"]
    assert [entry[n] for n in ("gpu", "driver", "torch", "cuda")] == list(vars(H200).values())
    assert entry["date"]
    assert "commit" in entry
    tests = entry["checks"]["tests"]
    assert (tests["verdict"], tests["cases"], tests["failures"]) == ("passed", 1234, 0)
    assert tests["largest_error_ulps"] == {"bfloat16": 0.5, "float32": 0.75}
    assert {entry["checks"][tool]["findings"] for tool in TOOLS} == {0}
    assert {check["verdict"] for check in entry["checks"].values()} == {"passed"}


def test_second_run_does_nothing_and_force_everything(gpu, go) -> None:
    _, first = go()
    status, second = go()
    assert (status, gpu.ran, second) == (gpu_ledger.PASSED, [], first)
    go(force=True)
    assert len(gpu.ran) == 10


@pytest.mark.parametrize(
    ("check", "code", "output", "why"),
    [
        ("tests", 1, RED, "2 tests failed"),
        ("tests", 1, RED.replace("2 failed", "1 error"), "1 tests failed"),
        ("tests", -11, "Fatal Python error: Segmentation fault", "status -11 before its counts"),
        ("tests", 5, GREEN.replace("1234", "0"), "no case ran on the GPU"),
        ("tests", 0, GREEN.replace("0 skipped", "3 skipped"), "3 tests skipped"),
        ("tests", 3, GREEN, "ended with status 3"),
        ("memcheck", 86, output_of("memcheck", findings=4), "4 findings of memcheck"),
        ("racecheck", 86, output_of("racecheck", findings=1), "1 findings of racecheck"),
        ("initcheck", 0, GREEN, "compute-sanitizer gave no summary"),
        ("synccheck", 255, "========= Error: Target application terminated", "before its counts"),
        ("synccheck", 1, output_of("synccheck", RED), "2 tests failed"),
    ],
)
def test_failures_are_recorded_and_tried_again(gpu, go, check, code, output, why) -> None:
    gpu.answers["rms_norm", check] = Finished(code, output, 1.0)
    status, kernels = go()
    assert status == gpu_ledger.FAILED
    record = kernels["rms_norm"]["checks"][check]
    assert record["verdict"] == "failed"
    assert why in record["why"]
    assert len(gpu.ran) == 10  # one failure keeps no other check from running
    gpu.answers.clear()
    status, kernels = go()
    assert (status, gpu.ran) == (gpu_ledger.PASSED, [("rms_norm", check)])
    assert kernels["rms_norm"]["checks"][check]["verdict"] == "passed"


def test_missing_sanitizer_is_recorded(gpu, go, capsys) -> None:
    status, kernels = go(sanitizer=None)
    assert status == gpu_ledger.PASSED
    assert gpu.ran == [(kernel, "tests") for kernel in HASHES]
    printed = capsys.readouterr().out
    for tool in TOOLS:
        assert kernels["rms_norm"]["checks"][tool]["verdict"] == "absent"
        assert f"rms_norm, {tool}: absent: compute-sanitizer was not found" in printed
    go()  # now it is installed
    assert gpu.ran == [(kernel, tool) for kernel in HASHES for tool in TOOLS]


def test_time_is_up_and_the_next_run_goes_on(gpu, go) -> None:
    gpu.seconds = 200.0
    status, kernels = go()
    assert status == gpu_ledger.UNFINISHED
    assert gpu.ran == [("rms_norm", check) for check in CHECKS[:3]]
    assert kernels["rms_norm"]["checks"]["synccheck"] == {"verdict": "not run"}
    seen = list(gpu.ran)
    while status == gpu_ledger.UNFINISHED:
        status, kernels = go()
        seen += gpu.ran
    assert status == gpu_ledger.PASSED
    assert seen == [(kernel, check) for kernel in HASHES for check in CHECKS]


def test_only_a_check_that_had_all_the_time_fails_for_want_of_it(gpu, go) -> None:
    gpu.seconds = 100.0
    gpu.answers["rms_norm", "memcheck"] = Finished(None, "", 350.0)
    status, kernels = go()
    assert kernels["rms_norm"]["checks"]["memcheck"]["verdict"] == "not run"
    assert status == gpu_ledger.UNFINISHED
    status, kernels = go()
    assert gpu.ran[0] == ("rms_norm", "memcheck")
    assert status == gpu_ledger.FAILED
    assert "its limit" in kernels["rms_norm"]["checks"]["memcheck"]["why"]
    go()
    assert gpu.ran == [("silu_and_mul", "initcheck"), ("rms_norm", "memcheck")]  # that one last


def test_only_a_changed_kernel_is_run_again(gpu, go) -> None:
    go()
    _, kernels = go(HASHES | {"rms_norm": "cc" * 32})
    assert gpu.ran == [("rms_norm", check) for check in CHECKS]
    assert kernels["rms_norm"]["hash"] == "cc" * 32


@pytest.mark.parametrize("change", ["driver", "torch", "cuda"])
def test_another_driver_or_torch_runs_everything(gpu, go, change) -> None:
    go()
    go(machine=Machine(**vars(H200) | {change: "1.0"}))
    assert len(gpu.ran) == 10


def test_a_kernel_without_tests_fails(gpu, go) -> None:
    status, kernels = go({"no_such_kernel": "dd" * 32}, sanitizer=None)
    assert (status, gpu.ran) == (gpu_ledger.FAILED, [])
    assert kernels["no_such_kernel"]["checks"]["tests"]["why"].startswith("there is no tests/test_")


def test_refused_without_gpu(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu_ledger.main(["--results", str(tmp_path)]) == gpu_ledger.REFUSED
    assert "no GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_refused_without_kernels(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("exafuse.ops.front_door.cuda_problem", lambda: "no extension")
    assert gpu_ledger.main(["--results", str(tmp_path)]) == gpu_ledger.REFUSED
    assert "the CUDA kernels cannot run here: no extension" in capsys.readouterr().err


def test_refused_with_another_build() -> None:
    built = ",".join(f"{name}={value}" for name, value in HASHES.items())
    gpu_ledger.check_built(built, HASHES)
    for old in ("", built.replace("a", "c")):
        with pytest.raises(gpu_ledger.CannotRun, match=r"sources of rms_norm.*make install"):
            gpu_ledger.check_built(old, HASHES)


def test_processes_end_at_their_limit() -> None:
    code = "import subprocess, sys; print('x', flush=True);"
    code += "subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    done = gpu_checks.run_process([sys.executable, "-c", code], {}, 2.0)
    assert done.code is None
    assert done.output == "x\n"
    assert done.seconds < 30


def test_a_kernel_behind_another_is_chosen() -> None:
    """An sm_90 GPU would run the tests of the sm_80 kernel on its own one."""
    environment = gpu_checks.environment_for("tests", "attention/prefill_sm80")
    assert environment["EXAFUSE_ATTENTION"] == "sm80"
    for kernel in ("attention/prefill_sm90", "attention/decode", "rms_norm"):
        assert "EXAFUSE_ATTENTION" not in gpu_checks.environment_for("tests", kernel)


def test_programs_named_compute_sanitizer(monkeypatch, tmp_path) -> None:
    """A stand-in runs the real pytest command; without a GPU nothing of it may look green."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\nwhile [ "$1" != "-m" ]; do last=$1; shift; done\n'
        '"$last" "$@"\necho "========= ERROR SUMMARY: 0 errors"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert gpu_checks.find_sanitizer() == str(tool)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    command = gpu_checks.command_for("memcheck", "silu_and_mul", str(tool))
    environment = gpu_checks.environment_for("memcheck")
    done = gpu_checks.run_process(command, environment, 120.0)
    record = gpu_checks.judge("memcheck", done)
    assert record["findings"] == 0, done.output
    assert record["verdict"] == "failed"
    assert "no case ran on the GPU" in record["why"]
    assert "tests skipped" in record["why"]
