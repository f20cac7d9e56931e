"""Builds the emulated extension: ``python tests/emulator/build.py --variant plain``.

Incremental, into build/emulator/<variant>/. Variants: ``plain`` for everyday tests, ``fast`` the
same with contracted multiply-adds, ``asan`` AddressSanitizer and UndefinedBehaviorSanitizer,
``tsan`` ThreadSanitizer (takes numpy arrays), ``coverage`` for line coverage of csrc/kernels.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
VARIANTS = ("plain", "fast", "asan", "tsan", "coverage")


def folder_of(variant: str) -> Path:
    """Where a variant is built."""
    return ROOT / "build" / "emulator" / variant


def library(variant: str, module: str = "_C_emulated") -> Path:
    """The extension file of a variant; it need not exist yet."""
    return folder_of(variant) / f"{module}.so"


def build(variant: str, jobs: int = 2, verbose: bool = False, target: str = "all") -> Path:
    """Brings a variant up to date; gives back its folder or raises RuntimeError."""
    folder = folder_of(variant)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:  # two test runs may ask for the same variant
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "build.ninja").exists():
            _run(
                [
                    *("cmake", "-S", str(HERE), "-B", str(folder), "-G", "Ninja"),
                    f"-DEXAFUSE_EMULATOR_VARIANT={variant}",
                    f"-DPython_EXECUTABLE={sys.executable}",
                ],
                verbose,
            )
        _run(["cmake", "--build", str(folder), "--target", target, "-j", str(jobs)], verbose)
    return folder


def _run(command: list[str], verbose: bool) -> None:
    tools = Path(sys.executable).parent  # cmake and ninja of this environment
    # A sanitizer preloaded into this process has no business in the compiler.
    environment = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    environment["PATH"] = f"{tools}:{environment.get('PATH', '')}"
    done = subprocess.run(
        command, env=environment, capture_output=not verbose, text=True, check=False
    )
    if done.returncode != 0:
        output = "" if verbose else f":\n{done.stdout}\n{done.stderr}"
        raise RuntimeError(f"{' '.join(command)} failed with {done.returncode}{output}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variant", choices=VARIANTS, action="append", required=True)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--verbose", action="store_true")
    arguments = parser.parse_args()
    for variant in arguments.variant:
        try:
            print(build(variant, arguments.jobs, arguments.verbose))
        except RuntimeError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
