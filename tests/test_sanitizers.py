"""The kernels under sanitizers, with contracted arithmetic, and how much of them the tests reach.

The address sanitizer and the contracted build run the kernels' own test files in a child process;
the thread sanitizer, which cannot load torch, runs random calls on numpy arrays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from case_counts import add_cases
from emulator import build, coverage, sanitizers
from emulator.control import SCHEDULES
from kernel_tests import all_tests

pytestmark = [pytest.mark.emulated, pytest.mark.slow]

TESTS = build.ROOT / "tests"
KERNEL_TESTS = all_tests()
CORNER_TESTS = "test_kernel_corners.py"
# What else reaches lines of the kernel sources: their host functions.
HOST_TESTS = (
    "test_bad_arguments.py",
    "test_bad_memory.py",
    "test_bad_gradients.py",
    "test_ops.py",
)
MIN_CASES_ASAN = 200  # per test file
CASES_TSAN = 24  # per op and schedule
CASES_TSAN_ATTENTION = CASES_TSAN // 4
MIN_COVERAGE = 0.95


def run_kernel_tests(variant: str, *files: str) -> sanitizers.Outcome:
    """Runs kernel test files in a child whose emulated ops come from another build."""
    build.build(variant)
    environment = sanitizers.environment(variant)
    environment["EXAFUSE_EMULATED_LIB"] = str(build.library(variant))
    environment["EXAFUSE_TEST_SUBSET"] = "sanitized"
    environment.pop("PYTEST_ADDOPTS", None)
    command = [
        *sanitizers.prefix(variant),
        *(sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"),
        *(str(TESTS / file) for file in files),
    ]
    done = subprocess.run(
        command,
        env=environment,
        cwd=build.ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    return sanitizers.Outcome(
        done.returncode, done.stdout, done.stderr, sanitizers.reports_in(done.stdout + done.stderr)
    )


def count_cases(outcome: sanitizers.Outcome) -> int:
    """The number on the last line of a test run; counted here as well."""
    found = re.search(r"cases: (\d+) ran emulated", outcome.stdout)
    assert found, outcome.stdout + outcome.stderr
    add_cases("emulated", int(found[1]))
    return int(found[1])


@pytest.mark.parametrize("file", KERNEL_TESTS)
def test_address_and_undefined_behaviour_sanitizers_find_nothing(file):
    outcome = run_kernel_tests("asan", file, CORNER_TESTS)
    assert outcome.reports == []
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-4000:]
    assert count_cases(outcome) >= MIN_CASES_ASAN


def test_contracted_multiply_adds_stay_within_the_tolerances():
    outcome = run_kernel_tests("fast", *KERNEL_TESTS, CORNER_TESTS)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    assert count_cases(outcome) >= MIN_CASES_ASAN


def run_race_cases(*arguments: str) -> sanitizers.Outcome:
    build.build("tsan")
    return sanitizers.run("tsan", ["tests/emulator/race_cases.py", *arguments])


def race_ops() -> set[str]:
    """Every op that the extension exports, so that a new one cannot be forgotten."""
    names = re.findall(r'm\.def\("(\w+)"', (build.ROOT / "csrc" / "bindings.cpp").read_text())
    ops = set(names) - {"build_info", "device_problem"}
    return {op for op in ops if not op.endswith("_workspace")}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_sanitizer_finds_nothing(schedule):
    factor = int(os.environ.get("EXAFUSE_TEST_CASES", "1"))
    cases = CASES_TSAN * factor
    outcome = run_race_cases("--cases", str(cases), "--schedule", schedule)
    assert outcome.reports == []
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    counts = dict(re.findall(r"^(\w+): (\d+)$", outcome.stdout, re.MULTILINE))
    wanted = {
        op: (CASES_TSAN_ATTENTION if "attn" in op else CASES_TSAN) * factor for op in race_ops()
    }
    assert counts == {op: str(number) for op, number in wanted.items()}
    add_cases("emulated", sum(wanted.values()))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_thread_sanitizer_finds_nothing_in_attention_on_sm_90(schedule):
    ops = sorted(op for op in race_ops() if op.startswith("flash_attn"))
    factor = int(os.environ.get("EXAFUSE_TEST_CASES", "1"))
    outcome = run_race_cases(
        *(part for op in ops for part in ("--op", op)),
        *("--cases", str(CASES_TSAN * factor), "--schedule", schedule, "--gpu", "sm_90_small"),
    )
    assert outcome.reports == []
    assert outcome.returncode == 0, outcome.stderr[-4000:]
    counts = dict(re.findall(r"^(\w+): (\d+)$", outcome.stdout, re.MULTILINE))
    assert counts == dict.fromkeys(ops, str(CASES_TSAN_ATTENTION * factor))
    add_cases("emulated", CASES_TSAN_ATTENTION * factor * len(ops))


def test_a_planted_race_fails_the_run():
    outcome = run_race_cases("--cases", "1", "--plant")
    assert outcome.returncode == 66
    assert any("racing_threads_kernel" in report for report in outcome.reports)


def test_the_kernel_tests_reach_the_lines_of_the_kernels(capsys):
    build.build("coverage")
    coverage.forget()
    outcome = run_kernel_tests("coverage", *KERNEL_TESTS, CORNER_TESTS, *HOST_TESTS)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    files = coverage.measure()
    with capsys.disabled():
        for name, file in files.items():
            print(f"\n{name}: {100 * file.share:.1f} % of {file.lines} lines", end="")
            print(f", missed {file.missed}" if file.missed else "", end="")
    kernels = [str(p.relative_to(build.ROOT)) for p in build.ROOT.glob("csrc/kernels/**/*.cu")]
    assert files.keys() >= set(kernels)
    missed = sum(len(file.missed) for file in files.values())
    assert missed <= (1 - MIN_COVERAGE) * sum(file.lines for file in files.values())
    for name in kernels:
        assert files[name].share >= MIN_COVERAGE, f"{name}: lines {files[name].missed} never ran"
