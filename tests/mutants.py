"""Tests the tests: applies the defects of mutants.toml and asserts that somebody notices.

``mutants.py --all`` runs every mutant and writes the record, mutants.json: per source file its hash
(with all headers it includes), how many mutants were killed, and which survived. ``mutants.py
--changed`` runs the mutants of files whose hash differs from the record, for at most 15 minutes. A
survivor fails the run. ``--only TEXT`` runs those whose file or name contains the text.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from emulator import build, mutation  # noqa: E402
from emulator.mutation import Mutant, Verdict  # noqa: E402

LIST = HERE / "mutants.toml"
RECORD = HERE / "mutants.json"
MIN_KILLED = 0.95
TIME_LIMIT_S = 15 * 60


def read_list() -> list[Mutant]:
    """All mutants, in the order of the list."""
    with open(LIST, "rb") as file:
        return [
            Mutant(source, *entry)
            for source, entries in tomllib.load(file).items()
            for entry in entries
        ]


def read_record() -> dict[str, dict[str, object]]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def changed_files(mutants: list[Mutant]) -> list[str]:
    """Source files that changed since their mutants were last run, or that have other mutants."""
    record = read_record()
    counts = Counter(mutant.file for mutant in mutants)
    return [
        file
        for file, count in counts.items()
        if record.get(file, {}).get("hash") != mutation.source_hash(file)
        or record[file]["mutants"] != count
    ]


def write_record(verdicts: list[Verdict]) -> None:
    """Replaces the entries of the files whose mutants were all run."""
    record = read_record()
    for file in dict.fromkeys(verdict.mutant.file for verdict in verdicts):
        own = [verdict for verdict in verdicts if verdict.mutant.file == file]
        record[file] = {
            "hash": mutation.source_hash(file),
            "mutants": len(own),
            "killed": sum(verdict.outcome == "killed" for verdict in own),
            "survived": [v.mutant.name for v in own if v.outcome != "killed"],
        }
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


_workshop: mutation.Workshop | None = None
_deadline: float = float("inf")


def _start_worker(deadline: float) -> None:
    global _workshop, _deadline
    number = multiprocessing.current_process()._identity[0]
    _workshop = mutation.Workshop(build.ROOT / "build" / "mutants" / str(number))
    _deadline = deadline


def _judge(mutant: Mutant) -> Verdict | None:
    if time.monotonic() > _deadline:
        return None
    assert _workshop is not None
    return _workshop.judge(mutant)


def run(mutants: list[Mutant], jobs: int, deadline: float) -> tuple[list[Verdict], int]:
    """Verdicts, and how many mutants were not begun by the deadline. Prints each as it comes."""
    for variant in mutation.variants_of(mutants):
        build.build(variant)
    baseline = mutation.run_tests(
        sorted({test for mutant in mutants for test in mutation.tests_for(mutant)}),
        build.library("plain"),
        build.ROOT / "build" / "mutants.log",
    )
    if baseline is not None:
        sys.exit(f"the unchanged kernels fail {baseline} (see build/mutants.log): mend that first")
    verdicts, late = [], 0
    context = multiprocessing.get_context("fork")
    with context.Pool(jobs, _start_worker, (deadline,)) as pool:
        for verdict in pool.imap_unordered(_judge, mutants):
            if verdict is None:
                late += 1
                continue
            verdicts.append(verdict)
            mutant = verdict.mutant
            print(
                f"[{len(verdicts)}/{len(mutants)}] {verdict.outcome:8} {verdict.seconds:5.1f} s  "
                f"{mutant.file}: {mutant.name}" + (f"  ({verdict.by})" if verdict.by else ""),
                flush=True,
            )
    order = {mutant: i for i, mutant in enumerate(mutants)}
    return sorted(verdicts, key=lambda verdict: order[verdict.mutant]), late


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every mutant; writes the record")
    which.add_argument("--changed", action="store_true", help="files that differ from the record")
    which.add_argument("--only", metavar="TEXT", help="file or name contains this; no record")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()

    mutants = read_list()
    limit_s = float("inf")
    if arguments.changed:
        files = changed_files(mutants)
        mutants = [mutant for mutant in mutants if mutant.file in files]
        limit_s = TIME_LIMIT_S
    elif arguments.only:
        mutants = [m for m in mutants if arguments.only in f"{m.file}: {m.name}"]
    if not mutants:
        print("mutants: no file has changed since the record was written")
        return

    start = time.monotonic()
    verdicts, late = run(mutants, arguments.jobs, start + limit_s)
    killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    if arguments.all:
        write_record(verdicts)
    for verdict in verdicts:
        if verdict.outcome != "killed":
            mutant = verdict.mutant
            print(f"{verdict.outcome}: {mutant.file}: {mutant.name}\n  {verdict.by}")
    share = killed / len(verdicts) if verdicts else 1.0
    print(
        f"mutants: {killed} of {len(verdicts)} killed ({100 * share:.1f} %) in "
        f"{time.monotonic() - start:.0f} s, {late} did not get their turn"
    )
    if killed < len(verdicts):
        sys.exit(f"{len(verdicts) - killed} mutants survived: a test is missing for each")
    if share < MIN_KILLED:
        sys.exit(f"fewer than {100 * MIN_KILLED:.0f} % killed")


if __name__ == "__main__":
    main()
