"""One check of one kernel on a GPU: its test file, alone or under a tool of compute-sanitizer.

Every check is a process of its own: one illegal access makes all later calls of its process fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kernel_tests import environment_of, tests_of

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
CHECKS = ("tests", *TOOLS)
STRIDE = 4  # of the cases under a tool, which makes kernels 10 to 100 times slower
ERROR_EXIT = 86
TAIL_LINES = 40


class Finished(NamedTuple):
    """A process that ended, or was ended at its limit (`code` None)."""

    code: int | None
    output: str
    seconds: float


Run = Callable[[list[str], Mapping[str, str], float], Finished]


def run_process(command: list[str], environment: Mapping[str, str], limit_s: float) -> Finished:
    """Run to the end or the limit; stdout and stderr together."""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        env=dict(environment),
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # so that the limit ends the program under a tool, too
    )
    try:
        output, _ = process.communicate(timeout=limit_s)
        code: int | None = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        code = None
    return Finished(code, output, time.monotonic() - start)


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH, of the CUDA toolkit, or of the registry's wheel."""
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    if nvcc:
        roots.append(str(Path(nvcc).resolve().parents[1]))
    roots += [str(Path(folder, "nvidia", "cu13")) for folder in sys.path if folder]
    places = [str(Path(root, "bin", "compute-sanitizer")) for root in roots if root]
    return next((p for p in map(shutil.which, ["compute-sanitizer", *places]) if p), None)


def test_files(kernel: str) -> list[Path]:
    """The kernel's tests, whether they exist or not."""
    return [TESTS / name for name in tests_of(kernel)]


def command_for(check: str, kernel: str, sanitizer: str | None) -> list[str]:
    """The command line of a check; tools need the path of compute-sanitizer."""
    options = ["-q", "-m", "gpu", "-o", "timeout=0"]
    options += ["-p", "no:cacheprovider", "-p", "gpu_selection"]
    pytest = [sys.executable, "-m", "pytest", *options, *map(str, test_files(kernel))]
    if check == "tests":
        return pytest
    assert sanitizer is not None
    return [
        *(sanitizer, "--tool", check, "--error-exitcode", str(ERROR_EXIT)),
        # torch asks questions that the driver answers with an error code; wrong launches of ours
        # raise in the extension.
        *("--report-api-errors", "no", "--target-processes", "application-only"),
        *("--print-limit", "20"),
        *pytest,
    ]


def environment_for(check: str, kernel: str = "") -> dict[str, str]:
    """The environment of a check: this one, without what would change what is tested, and with
    what chooses the kernel where its op has several."""
    kept = {name: x for name, x in os.environ.items() if not name.startswith("EXAFUSE_")}
    kept.pop("PYTEST_ADDOPTS", None)
    kept.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    paths = [str(TESTS), str(ROOT / "python"), *kept.get("PYTHONPATH", "").split(os.pathsep)]
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    kept |= environment_of(kernel)
    if check != "tests":
        # torch's cache hands out parts of large blocks, in which no access is out of bounds.
        kept["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        kept["EXAFUSE_TEST_STRIDE"] = str(STRIDE)
    return kept


def judge(check: str, done: Finished) -> dict[str, Any]:
    """What a finished process says: ``verdict`` "passed" or "failed", counts, and why it failed.

    Passed are only runs in which cases ran, none failed and none was skipped; under a tool, it must
    also have printed a summary without findings.
    """
    found = re.search(r"cases: \d+ ran emulated, (\d+) ran on a GPU, (\d+) skipped", done.output)
    cases, skipped = (int(found[1]), int(found[2])) if found else (0, 0)
    # The last line of pytest that counts; with -q it has no frame.
    counted = re.findall(r"^=*\s?(\d+ (?:failed|passed|error).* in [\d.]+s.*)$", done.output, re.M)
    failures = sum(map(int, re.findall(r"(\d+) (?:failed|errors?)\b", (counted or [""])[-1])))
    problems = []
    if done.code is None:
        problems.append(f"ended after {done.seconds:.0f} s, its limit")
    elif failures:
        problems.append(f"{failures} tests failed")
    elif not found:
        problems.append(f"ended with status {done.code} before its counts")
    elif not cases:
        problems.append("no case ran on the GPU")
    if skipped:
        problems.append(f"{skipped} tests skipped")
    record: dict[str, Any] = {"cases": cases, "failures": failures}
    if check != "tests":
        findings = _findings(done.output)
        record["findings"] = findings
        if findings is None:
            problems.append("compute-sanitizer gave no summary")
        elif findings:
            problems.append(f"{findings} findings of {check}")
    else:
        record["largest_error_ulps"] = _largest_errors(done.output)
    if not problems and done.code != 0:
        problems.append(f"ended with status {done.code}")
    record["seconds"] = round(done.seconds, 1)
    record["verdict"] = "failed" if problems else "passed"
    if problems:
        record["why"] = "; ".join(problems)
        record["tail"] = done.output.splitlines()[-TAIL_LINES:]
    return record


def _findings(output: str) -> int | None:
    found = re.findall(r"={9} (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards?)", output)
    return sum(map(int, found)) if found else None


def _largest_errors(output: str) -> dict[str, float] | None:
    found = re.search(r"^largest error in ulps: (.+)$", output, re.MULTILINE)
    if not found:
        return None
    pairs = (pair.split(" ") for pair in found[1].split(", "))
    return {dtype: float(value) for dtype, value in pairs}
