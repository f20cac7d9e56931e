"""`exafuse bench`: runs the suites, writes and draws what was asked for."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from . import plots, report, results
from .machine import slug
from .run import SUITES, Bench, settings_for


def run(arguments: argparse.Namespace) -> int:
    """0, or 1 if a result was wrong, exafuse failed, or the baseline was missed by over 5 %."""
    if arguments.cost:
        from . import static_cost

        return static_cost.show(arguments.json)
    wanted = arguments.peers.split(",") if arguments.peers is not None else None
    settings = settings_for(
        arguments.device,
        arguments.quick,
        [p for p in wanted if p] if wanted else wanted,
        arguments.dtype,
    )
    settings = dataclasses.replace(settings, profile=arguments.profile)
    chosen = arguments.suite or ["all"]
    suites = SUITES if "all" in chosen else tuple(s for s in SUITES if s in chosen)
    baseline = results.read(Path(arguments.baseline)) if arguments.baseline else None
    if arguments.png:
        plots.check_matplotlib()
    if arguments.minutes is not None and not arguments.minutes > 0:
        raise ValueError(f"minutes: expected more than 0, got {arguments.minutes}")
    limit_s = 60 * arguments.minutes if arguments.minutes else float("inf")
    bench = Bench(settings, limit_s, say=lambda text: print(text, flush=True))
    result = bench.run(suites, "exafuse bench " + shlex.join(sys.argv[2:]))
    results.from_dict(result.to_dict())  # what is written can be read
    if arguments.json:
        results.write(result, Path(arguments.json))
    if arguments.csv:
        results.write_csv(result.rows, Path(arguments.csv))
    if arguments.results:
        save(result, Path(arguments.results))
    if arguments.png:
        for file in plots.draw([result], Path(arguments.png)):
            print(f"drawn: {file}")
    bad = [row for row in result.rows if row.status == "wrong"]
    bad += [r for r in result.rows if r.contender == "exafuse" and r.status == "failed"]
    for row in bad:
        print(f"{row.status}: {row.op} {row.model} {row.case}, {row.contender}: {row.reason}")
    slower = []
    if baseline is not None:
        slower = report.compare(result, baseline)
        print("\n".join(slower) if slower else "no row is over 5 % slower than the baseline")
    print(f"\n{len(result.rows)} rows in {result.seconds:.0f} s")
    return 1 if bad or slower else 0


def save(result: results.Result, folder: Path) -> list[Path]:
    """A file for each suite below the folder of the GPU; the torch version is in its name."""
    version = str(result.machine["torch"]).partition("+")[0]
    files = []
    for suite in dict.fromkeys(row.suite for row in result.rows):
        rows = [row for row in result.rows if row.suite == suite]
        file = folder / slug(result.machine["name"]) / f"{suite}-torch{version}.json"
        part = results.from_dict(result.to_dict())
        part.rows = [row for row in part.rows if row.suite == suite]
        assert len(part.rows) == len(rows)
        results.write(part, file)
        print(f"written: {file}")
        files.append(file)
    return files
