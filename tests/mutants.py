"""Tests the tests: applies the defects of mutants.toml and asserts that somebody notices.

``mutants.py --all`` runs every mutant and writes the record, mutants.json: per source file its hash
(with all headers it includes), which mutants were killed, by which tests, and which survived.
``mutants.py --changed`` runs the mutants that have no verdict on record for their file as it is
now, for at most 15 minutes. A survivor that is not on record fails the run, and so do too many of
them. ``--only TEXT`` runs those whose file or name contains the text; ``--new`` leaves out of them
what has its verdict, and ``--write`` puts the results on record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

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


def read_record() -> dict[str, dict[str, Any]]:
    """The record by file: hash, killed (who noticed, by the mutant's name), survived (names)."""
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def without_verdict(mutants: list[Mutant]) -> list[Mutant]:
    """Those that have none on record for the code as it is now."""
    record = read_record()
    hashes = {file: mutation.source_hash(file) for file in {mutant.file for mutant in mutants}}
    known = {file: entry for file, entry in record.items() if entry["hash"] == hashes.get(file)}
    return [
        mutant
        for mutant in mutants
        if mutant.file not in known
        or mutant.name not in {*known[mutant.file]["killed"], *known[mutant.file]["survived"]}
    ]


def write_record(verdicts: list[Verdict]) -> None:
    """Puts the verdicts on record, beside those of the same code; all else is forgotten."""
    listed = {(mutant.file, mutant.name) for mutant in read_list()}
    record = read_record()
    for verdict in verdicts:
        file, name = verdict.mutant.file, verdict.mutant.name
        value = mutation.source_hash(file)
        if record.get(file, {}).get("hash") != value:
            record[file] = {"hash": value, "killed": {}, "survived": []}
        entry = record[file]
        entry["killed"].pop(name, None)
        entry["survived"] = sorted({*entry["survived"]} - {name})
        if verdict.outcome == "killed":
            entry["killed"][name] = verdict.by
        else:
            entry["survived"] = sorted([*entry["survived"], name])
    for file, entry in record.items():
        entry["killed"] = {n: by for n, by in entry["killed"].items() if (file, n) in listed}
        entry["survived"] = [name for name in entry["survived"] if (file, name) in listed]
    record = {file: entry for file, entry in record.items() if entry["killed"] or entry["survived"]}
    RECORD.write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def killers() -> dict[tuple[str, str], str]:
    """The test that noticed a mutant when the record was written, by the mutant's file and name."""
    return {
        (file, name): test
        for file, entry in read_record().items()
        for name, test in entry["killed"].items()
        if "::" in test
    }


_workshop: mutation.Workshop | None = None
_deadline: float = float("inf")


def _start_worker(deadline: float) -> None:
    global _workshop, _deadline
    number = multiprocessing.current_process()._identity[0]
    _workshop = mutation.Workshop(build.ROOT / "build" / "mutants" / str(number), killers())
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
        sorted({test for mutant in mutants for test in mutation.corners_for(mutant)}),
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
    which.add_argument("--changed", action="store_true", help="what the record says nothing of")
    which.add_argument("--only", metavar="TEXT", help="file or name contains this")
    parser.add_argument("--write", action="store_true", help="with --only: write the record")
    parser.add_argument("--new", action="store_true", help="those alone without a verdict yet")
    parser.add_argument("--plain", action="store_true", help="without those of the sanitizers")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()

    mutants = read_list()
    limit_s = float("inf")
    if arguments.changed:
        mutants = without_verdict(mutants)
        limit_s = TIME_LIMIT_S
    elif arguments.only:
        mutants = [m for m in mutants if arguments.only in f"{m.file}: {m.name}"]
    if arguments.new:
        mutants = without_verdict(mutants)
    if arguments.plain:
        mutants = [m for m in mutants if m.check == "plain"]
    if not mutants:
        print("mutants: no file has changed since the record was written")
        return

    start = time.monotonic()
    verdicts, late = run(mutants, arguments.jobs, start + limit_s)
    killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    known = {(file, name) for file, entry in read_record().items() for name in entry["survived"]}
    if arguments.all or arguments.write:
        write_record(verdicts)
    new = []
    for verdict in verdicts:
        if verdict.outcome != "killed":
            mutant = verdict.mutant
            if (mutant.file, mutant.name) not in known:
                new.append(mutant.name)
            print(f"{verdict.outcome}: {mutant.file}: {mutant.name}\n  {verdict.by}")
    share = killed / len(verdicts) if verdicts else 1.0
    print(
        f"mutants: {killed} of {len(verdicts)} killed ({100 * share:.1f} %) in "
        f"{time.monotonic() - start:.0f} s, {late} did not get their turn"
    )
    if new:
        sys.exit(f"{len(new)} mutants survived that are not on record: a test is missing for each")
    if share < MIN_KILLED:
        sys.exit(f"fewer than {100 * MIN_KILLED:.0f} % killed")


if __name__ == "__main__":
    main()
