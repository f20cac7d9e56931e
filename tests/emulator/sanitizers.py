"""Runs Python programs under a sanitizer build of the emulator and reads the reports."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

from emulator.build import ROOT, folder_of

# A report counts if it names a source file of ours; torch, numpy and Python have their own.
_OURS = re.compile(r"/(csrc|tests/emulator)/|_C_emulated|_honesty")
_REPORT = re.compile(
    r"^(?:=+\n)?(?:WARNING: ThreadSanitizer|==\d+==ERROR: AddressSanitizer|.*runtime error: ).*?"
    r"(?=^SUMMARY|^=+$|\Z)",
    re.MULTILINE | re.DOTALL,
)


class Outcome(NamedTuple):
    """How a sanitized program ended."""

    returncode: int
    stdout: str
    stderr: str
    reports: list[str]


@cache
def _runtime(name: str) -> str:
    """The shared library of a sanitizer runtime, as the compiler knows it."""
    found = subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not os.path.isabs(found):
        raise RuntimeError(f"g++ has no {name}: install the sanitizer runtimes of GCC")
    return found


def prefix(variant: str) -> list[str]:
    """What stands before the program: TSan needs its memory where it expects it."""
    return ["setarch", "-R"] if variant == "tsan" else []


def environment(variant: str) -> dict[str, str]:
    """The variables under which Python loads an extension of this variant."""
    result = {**os.environ, "OMP_NUM_THREADS": "1"}
    if variant == "asan":
        result["LD_PRELOAD"] = f"{_runtime('libasan.so')} {_runtime('libstdc++.so')}"
        result["ASAN_OPTIONS"] = "detect_leaks=0"
        result["UBSAN_OPTIONS"] = "print_stacktrace=1:halt_on_error=1"
    elif variant == "tsan":
        result["LD_PRELOAD"] = _runtime("libtsan.so")
        result["TSAN_OPTIONS"] = "history_size=7:halt_on_error=0:exitcode=66"
    result["PYTHONPATH"] = os.pathsep.join(
        [str(folder_of(variant)), str(ROOT / "tests"), str(ROOT / "python")]
    )
    return result


def reports_in(text: str) -> list[str]:
    """The sanitizer reports in a program's output that name a source file of ours."""
    return [report for report in _REPORT.findall(text) if _OURS.search(report)]


def run(variant: str, program: list[str], timeout: float = 600) -> Outcome:
    """Runs ``python *program`` with the extension modules of ``variant`` on its path."""
    done = subprocess.run(
        [*prefix(variant), sys.executable, *program],
        env=environment(variant),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=Path(ROOT),
    )
    return Outcome(done.returncode, done.stdout, done.stderr, reports_in(done.stderr))
