"""All that is to be known of the sm_90a prefill kernel from a GPU: `make gpu-hopper`.

    python tests/hopper_gpu.py [--minutes 7.5] [--force] [--keep-going] [--results FOLDER]

In this order, because each part rests on the one before: probes of single instructions
(hopper_probes.py), the kernel's tests and compute-sanitizer (gpu_ledger.py, which writes the
ledger), timings of every tile beside other libraries (hopper_timings.py). Each piece is a process
of its own that ends within the time of a run, and its result a file in
benchmarks/results/<gpu>/hopper. A run stops before its time is up; the next one goes on from there,
and leaves out what was right of the same sources on the same machine.

Exit status: 0 all was right, 1 something was not, 2 there is nothing to run on, 3 time was up: run
it again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "cmake"), str(ROOT / "python")]

import gpu_checks  # noqa: E402
import gpu_ledger  # noqa: E402
import hopper_probes  # noqa: E402
import hopper_timings  # noqa: E402
import kernel_hash  # noqa: E402
from gpu_ledger import FAILED, PASSED, REFUSED, SHORTEST_S, UNFINISHED  # noqa: E402

KERNEL = "attention/prefill_sm90"
PROBES = "probes"


@dataclass(frozen=True)
class Piece:
    """A process; its name is that of its result's file."""

    name: str
    command: tuple[str, ...]  # the file that it writes comes last, where it writes one
    shape: hopper_timings.Shape | None = None

    @property
    def file(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") + ".json"


def probes_piece() -> Piece:
    return Piece(PROBES, (sys.executable, str(ROOT / "tests" / "hopper_probes.py")))


def timing_pieces() -> list[Piece]:
    script = (sys.executable, str(ROOT / "tests" / "hopper_timings.py"))
    return [
        Piece(f"timing {shape.name}", (*script, "--shape", shape.name, "--out"), shape)
        for shape in hopper_timings.SHAPES
    ]


def probes_hash() -> str:
    """Of what is compiled, and of what is compared with it."""
    text = Path(hopper_probes.__file__).read_text(encoding="utf-8")
    return hashlib.sha256((hopper_probes.sources_hash() + text).encode()).hexdigest()


def environment() -> dict[str, str]:
    """Of every piece: nothing chooses for it, and it finds the benchmarks."""
    found = gpu_checks.environment_for("tests", KERNEL)
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), found["PYTHONPATH"]])
    return found


@dataclass
class Programme:
    """One run; the fields are what tests replace."""

    machine: gpu_ledger.Machine
    kernel_hash: str
    probes_hash: str
    results: Path
    limit_s: float
    force: bool = False
    keep_going: bool = False
    sanitizer: str | None = None
    run: gpu_checks.Run = gpu_checks.run_process
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.folder = self.results / self.machine.slug / "hopper"
        self.deadline = self.clock() + self.limit_s

    def go(self) -> int:
        """Runs what is not yet right, in order; the exit status."""
        status = self.pieces([probes_piece()])
        if status == FAILED and not self.keep_going:
            print("the GPU does not do what the wrappers say: nothing else was run")
            return FAILED
        statuses = [status, self.ledger()]
        if FAILED in statuses and not self.keep_going:
            print("a kernel that is not right is not timed: --keep-going does it all the same")
            return FAILED
        if UNFINISHED not in statuses:
            statuses.append(self.pieces(timing_pieces()))
        self.report()
        for outcome in (FAILED, UNFINISHED):
            if outcome in statuses:
                return outcome
        return PASSED

    def left(self) -> float:
        return self.deadline - self.clock()

    # ---- pieces --------------------------------------------------------------------------------

    def pieces(self, wanted: Sequence[Piece]) -> int:
        """Runs those that have not been right; what failed before comes last."""
        waiting = []
        for piece in wanted:
            before = self.stored(piece)
            if not self.force and before.get("verdict") == "passed":
                print(f"{piece.name}: passed before, nothing has changed")
            else:
                waiting.append((before.get("verdict") == "failed", piece))
        statuses = [PASSED]
        for _, piece in sorted(waiting, key=lambda item: item[0]):
            statuses.append(self.piece(piece))
        return FAILED if FAILED in statuses else max(statuses)

    def piece(self, piece: Piece) -> int:
        """Runs one, and stores what came of it."""
        left = self.left()
        if left < min(SHORTEST_S, self.limit_s):
            print(f"{piece.name}: time is up")
            return UNFINISHED
        print(f"{piece.name}: running", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        rows_file = self.folder / f"{piece.file}.rows"
        rows_file.unlink(missing_ok=True)
        command = [*piece.command, *([str(rows_file)] if piece.shape else [])]
        done = self.run(command, environment(), left)
        if done.code is None and left < 0.9 * self.limit_s:
            print(f"{piece.name}: needs more than the {left:.0f} s that were left")
            return UNFINISHED
        record: dict[str, Any] = {"about": self.about(piece), "seconds": round(done.seconds, 1)}
        if piece.shape is not None and rows_file.exists():
            record["rows"] = json.loads(rows_file.read_text(encoding="utf-8"))
        rows_file.unlink(missing_ok=True)
        lacks_rows = piece.shape is not None and not record.get("rows")
        passed = done.code == 0 and not lacks_rows
        record["verdict"] = "passed" if passed else "failed"
        if not passed:
            why = f"ended after {done.seconds:.0f} s, its limit"
            if done.code is not None:
                why = f"ended with status {done.code}" + (" and no rows" if lacks_rows else "")
            record["why"] = why
            record["tail"] = done.output.splitlines()[-gpu_checks.TAIL_LINES :]
        self.store(piece, record)
        print(f"{piece.name}: {record['verdict']} in {record['seconds']} s")
        shown = record.get("tail", done.output.splitlines()[-1:])
        print("\n".join(f"    {line}" for line in shown))
        return PASSED if passed else FAILED

    def about(self, piece: Piece) -> dict[str, str]:
        """What a result is about; another one does not count."""
        value = self.probes_hash if piece.name == PROBES else self.kernel_hash
        return {"hash": value, **asdict(self.machine)}

    def stored(self, piece: Piece) -> Mapping[str, Any]:
        """The result that is there; empty if there is none, or it is about something else."""
        file = self.folder / piece.file
        if not file.exists():
            return {}
        record = json.loads(file.read_text(encoding="utf-8"))
        return record if record["about"] == self.about(piece) else {}

    def store(self, piece: Piece, record: Mapping[str, Any]) -> None:
        partial = self.folder / f"{piece.file}.partial"
        partial.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, self.folder / piece.file)

    # ---- tests, sanitizers, report -------------------------------------------------------------

    def ledger(self) -> int:
        """The kernel's entry in the ledger of this GPU."""
        return gpu_ledger.Session(
            machine=self.machine,
            hashes={KERNEL: self.kernel_hash},
            ledger=gpu_ledger.Ledger(self.results, self.machine),
            limit_s=self.limit_s,
            force=self.force,
            sanitizer=self.sanitizer,
            run=self.run,
            clock=self.clock,
            deadline=self.deadline,
        ).go()

    def report(self) -> None:
        """The fastest tile of every shape that has been timed, in any run."""
        print("\nfastest tile of each shape:")
        for piece in timing_pieces():
            assert piece.shape is not None
            rows = self.stored(piece).get("rows")
            line = hopper_timings.verdict(piece.shape, rows) if rows else "not timed yet"
            print(f"  {line}" if rows else f"  {piece.shape.name}: {line}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=7.5, help="time for this run (7.5)")
    parser.add_argument("--force", action="store_true", help="run what was right as well")
    parser.add_argument("--keep-going", action="store_true", help="time whatever was found before")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args(argv)
    try:
        problem = hopper_probes.gpu_problem()
        if problem:
            raise gpu_ledger.CannotRun(problem)
        hashes = kernel_hash.kernel_hashes()
        machine = gpu_ledger.this_machine(hashes)
        hopper_probes.compile_library()
    except (gpu_ledger.CannotRun, hopper_probes.ProbeError) as reason:
        print(f"gpu-hopper: {reason}. Nothing was run, nothing was written.", file=sys.stderr)
        return REFUSED
    sanitizer = gpu_checks.find_sanitizer()
    print(f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}")
    print(f"compute-sanitizer: {sanitizer or 'not found; its checks are recorded as absent'}")
    return Programme(
        machine=machine,
        kernel_hash=hashes[KERNEL],
        probes_hash=probes_hash(),
        results=arguments.results,
        limit_s=arguments.minutes * 60,
        force=arguments.force,
        keep_going=arguments.keep_going,
        sanitizer=sanitizer,
    ).go()


if __name__ == "__main__":
    sys.exit(main())
