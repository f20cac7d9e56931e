"""Runs the kernel tests on the GPU here and writes what was seen: the GPU's ledger.

    python tests/gpu_ledger.py [--only KERNEL] [--force] [--minutes 7.5] [--results FOLDER]

For each kernel: its tests, then a part of them under each tool of compute-sanitizer. Every check is
a process of its own, and benchmarks/results/<gpu>/ledger.json is written after each. A check that
has passed is not run again as long as the kernel, the GPU, the driver and torch are the same. A run
stops before its time is up; the next one goes on from there.

Exit status: 0 every check passed (or is absent with its tool), 1 a check failed, 2 there is nothing
to run on, 3 time was up: run it again.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "cmake"), str(ROOT / "python")]

import gpu_checks  # noqa: E402
import kernel_hash  # noqa: E402

PASSED, FAILED, REFUSED, UNFINISHED = 0, 1, 2, 3
SCHEMA = 1
SHORTEST_S = 30  # a check that has less time left is not started


class CannotRun(Exception):
    """There is no GPU, or no extension built from these sources; the message says what to do."""


@dataclass(frozen=True)
class Machine:
    """What a result depends on besides the kernel."""

    gpu: str
    driver: str
    torch: str
    cuda: str  # of the extension

    @property
    def slug(self) -> str:
        """Name of the GPU's folder: "NVIDIA H200" is nvidia-h200."""
        return re.sub(r"[^a-z0-9]+", "-", self.gpu.lower()).strip("-")


def this_machine(hashes: dict[str, str]) -> Machine:
    """The GPU here, after making sure that the extension runs on it and is built from the tree."""
    torch = importlib.import_module("torch")
    if not torch.cuda.is_available():
        raise CannotRun("no GPU here: torch.cuda.is_available() is False")
    front_door = importlib.import_module("exafuse.ops.front_door")
    problem = front_door.cuda_problem()
    if problem:
        raise CannotRun(f"the CUDA kernels cannot run here: {problem}")
    build = importlib.import_module("exafuse._C").build_info()
    check_built(build.get("kernel_hashes", ""), hashes)
    return Machine(
        gpu=torch.cuda.get_device_name(0),
        driver=driver_version(),
        torch=torch.__version__,
        cuda=f"{build['cuda'] // 1000}.{build['cuda'] % 1000 // 10}",
    )


def check_built(built: str, hashes: dict[str, str]) -> None:
    """The extension must hold the kernels of the tree, or its results would be filed wrongly."""
    of_build = dict(pair.split("=") for pair in built.split(",") if pair)
    stale = [name for name, value in hashes.items() if of_build.get(name) != value]
    if stale:
        raise CannotRun(
            f"the extension was built from other sources of {', '.join(stale)}: run `make install`"
        )


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def commit() -> str | None:
    """The commit that is checked out, "-changed" if sources differ from it; None without git."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        )
        changed = subprocess.run(
            [*git, "status", "--porcelain", "csrc", "tests", "python"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("-changed" if changed.stdout.strip() else "")


class Ledger:
    """The file of one GPU: read if it is there, written whole after every check."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.file = folder / machine.slug / "ledger.json"
        self.machine = machine
        self.kernels: dict[str, dict[str, Any]] = {}
        if self.file.exists():
            self.kernels = json.loads(self.file.read_text(encoding="utf-8"))["kernels"]

    def entry(self, kernel: str, value: str, force: bool) -> dict[str, Any]:
        """The kernel's entry, a blank one if what it says is about something else."""
        about = {"hash": value, **asdict(self.machine)}
        entry = self.kernels.get(kernel, {})
        if force or any(entry.get(name) != x for name, x in about.items()):
            entry = about | {"checks": {}}
        for check in gpu_checks.CHECKS:
            entry["checks"].setdefault(check, {"verdict": "not run"})
        return entry

    def record(
        self, kernel: str, entry: dict[str, Any], check: str, result: dict[str, Any]
    ) -> None:
        entry["checks"][check] = result
        entry["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
        entry["commit"] = commit()
        self.kernels[kernel] = entry
        text = json.dumps(
            {"schema": SCHEMA, "gpu": self.machine.gpu, "kernels": self.kernels},
            indent=2,
            sort_keys=True,
        )
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(".partial")
        partial.write_text(text + "\n", encoding="utf-8")
        os.replace(partial, self.file)


@dataclass
class Session:
    """One run of this program; the fields are what tests replace."""

    machine: Machine
    hashes: dict[str, str]
    ledger: Ledger
    limit_s: float
    force: bool = False
    sanitizer: str | None = None
    run: gpu_checks.Run = gpu_checks.run_process
    clock: Callable[[], float] = time.monotonic
    deadline: float | None = None  # by the clock, of a run that has begun before

    def go(self) -> int:
        """Run what is not yet green; the exit status."""
        deadline = self.clock() + self.limit_s if self.deadline is None else self.deadline
        failed, late = [], []
        for kernel, check, entry in self.pending():
            label = f"{kernel}, {check}"
            left = deadline - self.clock()
            if left < min(SHORTEST_S, self.limit_s):
                late.append(label)
                continue
            result = self.check(kernel, check, left)
            if result is None:
                late.append(label)
                continue
            report(label, result)
            result.pop("tail", None)
            self.ledger.record(kernel, entry, check, result)
            if result["verdict"] == "failed":
                failed.append(label)
        print(f"ledger: {self.ledger.file}")
        if failed:
            print(f"{len(failed)} checks failed: {'; '.join(failed)}")
        if late:
            print(f"time is up, {len(late)} checks did not get their turn: run this again")
        return FAILED if failed else UNFINISHED if late else PASSED

    def pending(self) -> list[tuple[str, str, dict[str, Any]]]:
        """Kernel, check and ledger entry of what has not passed: what failed before comes last."""
        found = []
        for kernel, value in self.hashes.items():
            entry = self.ledger.entry(kernel, value, self.force)
            for check in gpu_checks.CHECKS:
                if entry["checks"][check]["verdict"] == "passed":
                    print(f"{kernel}, {check}: passed before, nothing has changed")
                else:
                    found.append((kernel, check, entry))
        return sorted(found, key=lambda item: item[2]["checks"][item[1]]["verdict"] == "failed")

    def check(self, kernel: str, check: str, left_s: float) -> dict[str, Any] | None:
        """The record of one check; None if it needs more than what is left of this run's time."""
        for file in gpu_checks.test_files(kernel):
            if not file.exists():
                return {"verdict": "failed", "why": f"there is no tests/{file.name}", "cases": 0}
        if check != "tests" and self.sanitizer is None:
            return {"verdict": "absent", "why": "compute-sanitizer was not found"}
        command = gpu_checks.command_for(check, kernel, self.sanitizer)
        print(f"{kernel}, {check}: running", flush=True)
        done = self.run(command, gpu_checks.environment_for(check, kernel), left_s)
        if done.code is None and left_s < 0.9 * self.limit_s:
            return None  # the next run starts with it, and gives it all the time there is
        return gpu_checks.judge(check, done)


def report(label: str, result: dict[str, Any]) -> None:
    counts = f", {result['cases']} cases" if "cases" in result else ""
    seconds = f" in {result['seconds']} s" if "seconds" in result else ""
    why = f": {result['why']}" if "why" in result else ""
    print(f"{label}: {result['verdict']}{counts}{seconds}{why}")
    for line in result.get("tail", []):
        print(f"    {line}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", metavar="KERNEL", help="this kernel alone, such as rms_norm")
    parser.add_argument("--force", action="store_true", help="run what has passed as well")
    parser.add_argument("--minutes", type=float, default=7.5, help="time for this run (7.5)")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)

    hashes = kernel_hash.kernel_hashes()
    if arguments.only is not None and arguments.only not in hashes:
        parser.error(f"--only: expected one of {', '.join(hashes)}, got {arguments.only!r}")
    try:
        machine = this_machine(hashes)
    except CannotRun as problem:
        print(f"gpu ledger: {problem}. Nothing was run, nothing was written.", file=sys.stderr)
        return REFUSED
    if arguments.only is not None:
        hashes = {arguments.only: hashes[arguments.only]}
    sanitizer = gpu_checks.find_sanitizer()
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}")
    print(f"compute-sanitizer: {sanitizer or 'not found; its checks are recorded as absent'}")
    return Session(
        machine=machine,
        hashes=hashes,
        ledger=Ledger(arguments.results, machine),
        limit_s=arguments.minutes * 60,
        force=arguments.force,
        sanitizer=sanitizer,
    ).go()


if __name__ == "__main__":
    sys.exit(main())
