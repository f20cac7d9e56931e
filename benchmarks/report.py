"""Tables of stored results: `python -m exafuse.benchmarks.report --help`.

In a checkout: ``python -m benchmarks.report --readme README.md`` writes the numbers of the README
between its two markers, from benchmarks/results/<gpu>/*.json.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .results import Result, Row, read

FOLDER = Path(__file__).resolve().parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
UNMEASURED = "not yet measured on a GPU"
TOLERANCE = 1.05


def load(folder: Path = FOLDER) -> list[Result]:
    """Every stored run on a GPU, by folder and name."""
    files = [file for file in sorted(folder.glob("*/*.json")) if file.name != "ledger.json"]
    results = [read(file) for file in files]
    return [result for result in results if result.machine.get("device") != "cpu"]


# ---- comparisons ---------------------------------------------------------------------------------


def compare(new: Result, old: Result) -> list[str]:
    """A line for each row of exafuse that is over 5 % slower than before, or was timed and is not.

    Raises:
        ValueError: the runs are of different machines, dtypes or sizes.
    """
    for what in ("dtype", "quick"):
        if getattr(new, what) != getattr(old, what):
            raise ValueError(
                f"baseline: expected a run with {what} {getattr(new, what)}, "
                f"got one with {getattr(old, what)}"
            )
    if new.machine["name"] != old.machine["name"]:
        raise ValueError(
            f"baseline: expected a run on {new.machine['name']}, got one on {old.machine['name']}"
        )
    before = {row.key: row for row in old.rows if row.contender == "exafuse"}
    lines = []
    for row in new.rows:
        known = before.get(row.key)
        if known is None or known.time_us is None or row.status == "not run":
            continue
        label = f"{row.op} {row.model} {row.case}"
        if row.time_us is None:
            lines.append(f"{label}: {row.status}, was {known.time_us:.2f} us ({row.reason})")
        elif row.time_us > TOLERANCE * known.time_us:
            change = 100 * (row.time_us / known.time_us - 1)
            lines.append(
                f"{label}: {row.time_us:.2f} us, was {known.time_us:.2f} us (+{change:.0f} %)"
            )
    return lines


def across_versions(results: Sequence[Result]) -> list[str]:
    """Contenders whose times under two versions of torch on one GPU differ by over 5 %."""
    lines = []
    for i, first in enumerate(results):
        for second in results[i + 1 :]:
            versions = (first.machine["torch"], second.machine["torch"])
            if first.machine["name"] != second.machine["name"] or len(set(versions)) == 1:
                continue
            times = {row.key: row.time_us for row in first.rows if row.time_us}
            for row in second.rows:
                one = times.get(row.key)
                if one is None or row.time_us is None:
                    continue
                if max(one, row.time_us) > TOLERANCE * min(one, row.time_us):
                    lines.append(
                        f"{row.contender}, {row.op} {row.model} {row.case}: {one:.2f} us with "
                        f"torch {versions[0]}, {row.time_us:.2f} us with {versions[1]}"
                    )
    return lines


# ---- tables --------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; columns of numbers are aligned right."""
    lines = [list(header), *(list(row) for row in rows)]
    right = [
        len(lines) > 1 and all(_is_number(line[i]) for line in lines[1:])
        for i in range(len(header))
    ]
    marks = ["---:" if is_right else "---" for is_right in right]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], marks, *lines[1:]])


def _is_number(text: str) -> bool:
    return text.strip("-.,0123456789 x%") == ""


def about(result: Result) -> str:
    """GPU, driver, clocks, versions, commit and date of a run, on one line."""
    machine = result.machine
    parts = [f"**{machine['name']}**"]
    if machine.get("driver"):
        parts.append(f"driver {machine['driver']}")
    clocks = [machine.get(when, {}).get("sm_mhz") for when in ("clocks_before", "clocks_after")]
    if all(clocks):
        parts.append(f"SM clock {clocks[0]:.0f} MHz before, {clocks[1]:.0f} after")
    parts += [f"torch {machine['torch']}", f"{result.dtype}", f"commit {result.commit or '?'}"]
    ceilings = result.ceilings
    return (
        f"{', '.join(parts)}, {result.date[:10]}. Ceilings of this run: copy "
        f"{ceilings.copy_gbps:,.0f} GB/s, read {ceilings.read_gbps:,.0f} GB/s, products "
        f"{ceilings.matmul_tflops:,.4g} TFLOP/s."
    )


def markdown(result: Result) -> str:
    """Every row of a run: a table for each op, a column for each contender."""
    parts = [about(result)]
    known = [f"{name} {peer.version}" for name, peer in result.peers.items() if peer.version]
    absent = [f"{name} ({peer.problem})" for name, peer in result.peers.items() if peer.problem]
    parts.append(f"Peers: {', '.join(known) or 'none'}. Absent: {', '.join(absent) or 'none'}.")
    for suite, op in dict.fromkeys((row.suite, row.op) for row in result.rows):
        rows = [row for row in result.rows if (row.suite, row.op) == (suite, op)]
        names = list(dict.fromkeys(row.contender for row in rows))
        cases: dict[tuple[str, str], dict[str, Row]] = {}
        for row in rows:
            cases.setdefault((row.model, row.case), {})[row.contender] = row
        times = [f"{name} us" for name in names]
        header = ["model", "case", "floor us", *times, "of floor", "ratio"]
        lines = []
        for (model, case), by_name in cases.items():
            first = next(iter(by_name.values()))
            ours = by_name.get("exafuse", first)
            floor = next((r.floor_us for r in by_name.values() if r.floor_us is not None), None)
            lines.append(
                [
                    *(model or "-", case, _number(floor)),
                    *(_cell(by_name.get(name)) for name in names),
                    *(_percent(ours), _ratio(ours)),
                ]
            )
        parts.append(f"### {suite}: {op}\n\n{table(header, lines)}")
    return "\n\n".join(parts) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return _number(row.time_us) if row.time_us is not None else row.status


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(row: Row) -> str:
    return "-" if row.percent is None else f"{row.percent:.0f} %"


def _ratio(row: Row) -> str:
    return "-" if row.ratio is None else f"{row.ratio:.2f}x"


# ---- README --------------------------------------------------------------------------------------


def readme_section(results: Sequence[Result]) -> str:
    """What stands between the markers: the heaviest case of every op and model, on every GPU."""
    if not results:
        return f"Speed: {UNMEASURED}."
    parts = []
    for result in results:
        heaviest: dict[tuple[str, str], Row] = {}
        for row in result.rows:
            if row.contender == "exafuse" and row.floor_us is not None:
                known = heaviest.get((row.op, row.model))
                if known is None or (known.floor_us or 0) < row.floor_us:
                    heaviest[row.op, row.model] = row
        lines = [
            [
                *(f"`{row.op}`", row.model, row.case, _number(row.time_us)),
                *(_percent(row), _ratio(row), row.best_peer or "-"),
            ]
            for row in heaviest.values()
        ]
        if lines:
            header = ["op", "model", "case", "us", "of floor", "over best peer", "best peer"]
            parts += [about(result), table(header, lines)]
    return "\n\n".join(parts) if parts else f"Speed: {UNMEASURED}."


def updated_readme(text: str, results: Sequence[Result]) -> str:
    """The README with its numbers replaced.

    Raises:
        ValueError: a marker is missing, or stands there twice.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"README: expected {BEGIN!r} and then {END!r}, once each")
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{readme_section(results)}\n{END}{tail}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print tables of stored results, or write them where they belong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of <gpu>/*.json")
    parser.add_argument("--readme", type=Path, help="write the numbers between its markers")
    parser.add_argument("--png", type=Path, help="draw into DIR/<gpu>")
    arguments = parser.parse_args(argv)
    try:
        results = load(arguments.results)
        if arguments.readme:
            text = updated_readme(arguments.readme.read_text(encoding="utf-8"), results)
            arguments.readme.write_text(text, encoding="utf-8")
        else:
            print("\n".join(markdown(result) for result in results) or UNMEASURED)
            print("\n".join(across_versions(results)))
        if arguments.png:
            from .machine import slug
            from .plots import draw

            for result in results:
                draw([result], arguments.png / slug(result.machine["name"]))
    except (ValueError, OSError, ImportError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
