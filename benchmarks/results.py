"""What a run of the benchmarks leaves behind: one JSON file, and the check of its layout."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
STATUSES = ("ok", "wrong", "unsupported", "out of memory", "failed", "not run")


@dataclass
class Row:
    """One contender of one case. Times are per call, in microseconds.

    ``status`` other than "ok" has no times, and ``reason`` says why. ``bound`` names the ceiling
    that the floor comes from ("copy", "read", "matmul"); ``percent`` is floor over time.
    ``ratio`` is the time of the fastest peer over this one's: above 1 is faster than every peer.
    ``error`` is the relative error against the definition; ``mode`` how it was timed ("graph",
    "events", "host"); ``cold`` whether the inputs of a call had left the cache; ``clocks`` are
    those before and after the case.
    """

    suite: str
    op: str
    case: str
    contender: str
    status: str
    reason: str = ""
    model: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    path: str = ""  # of exafuse: cuda, emulated or reference
    time_us: float | None = None
    q1_us: float | None = None
    q3_us: float | None = None
    repeats: int = 0
    mode: str = ""
    cold: bool = False
    bytes: int = 0
    flops: int = 0
    gbps: float | None = None
    tflops: float | None = None
    floor_us: float | None = None
    bound: str = ""
    percent: float | None = None
    ratio: float | None = None
    best_peer: str = ""
    error: float | None = None
    clocks: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def case_key(self) -> tuple[str, str, str, str]:
        """The case, among those of all suites."""
        return self.suite, self.op, self.model, self.case

    @property
    def key(self) -> tuple[str, ...]:
        """What two runs are compared by."""
        return (*self.case_key, self.contender)


@dataclass
class Peer:
    """Whether a library was there: ``problem`` says why not."""

    version: str = ""
    problem: str = ""


@dataclass
class Ceilings:
    """What the device did in this run: bytes read and written, bytes read, multiply-adds."""

    copy_gbps: float
    read_gbps: float
    matmul_tflops: float


@dataclass
class Result:
    """One run."""

    exafuse: str
    date: str
    commit: str
    command: str
    seconds: float
    quick: bool
    dtype: str
    machine: dict[str, Any]
    peers: dict[str, Peer]
    ceilings: Ceilings
    rows: list[Row]
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain data; times with four significant digits or more, never NaN."""
        return typing.cast(dict[str, Any], _rounded(dataclasses.asdict(self)))


def from_dict(values: Any, where: str = "result") -> Result:
    """The run that ``values``, read from JSON, describe.

    Raises:
        ValueError: a field is missing, unknown or of another type; the message names it.
    """
    result: Result = _checked(Result, values, where)
    if result.schema != SCHEMA:
        raise ValueError(f"{where}.schema: expected {SCHEMA}, got {result.schema}")
    for i, row in enumerate(result.rows):
        place = f"{where}.rows[{i}]"
        if row.status not in STATUSES:
            raise ValueError(f"{place}.status: expected one of {STATUSES}, got {row.status!r}")
        if (row.status == "ok") != (row.time_us is not None):
            raise ValueError(f"{place}: expected a time if and only if the status is ok")
        if row.status != "ok" and not row.reason:
            raise ValueError(f"{place}.reason: expected one, as the status is {row.status!r}")
    return result


def read(file: Path) -> Result:
    """A result file, checked; ValueError names the file and what is wrong in it."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from error
    return from_dict(values, str(file))


def write(result: Result, file: Path) -> None:
    """Whole or not at all."""
    text = json.dumps(result.to_dict(), indent=1, allow_nan=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, file)


def write_csv(rows: Iterable[Row], file: Path) -> None:
    """A line a row; what is itself a table (parameters, clocks) as JSON."""
    names = [f.name for f in dataclasses.fields(Row)]
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(names)
        for row in rows:
            values = (getattr(row, name) for name in names)
            writer.writerow([json.dumps(v) if isinstance(v, dict) else _rounded(v) for v in values])


def finish(rows: Iterable[Row], ceilings: Ceilings) -> None:
    """Fill in what follows from the times of a case: rates, percent of the floor, ratios."""
    by_case: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        by_case.setdefault(row.case_key, []).append(row)
    for same_case in by_case.values():
        timed = [(row, row.time_us) for row in same_case if row.time_us is not None]
        peers = [
            (time, row.contender) for row, time in timed if not row.contender.startswith("exafuse")
        ]
        best_us, best = min(peers, default=(None, ""))
        for row, time_us in timed:
            if row.bytes:
                row.gbps = row.bytes / time_us / 1e3
                row.floor_us, row.bound = floor(row, ceilings)
                row.percent = 100 * row.floor_us / time_us
            if row.flops:
                row.tflops = row.flops / time_us / 1e6
            if best_us is not None:
                row.ratio, row.best_peer = best_us / time_us, best


def floor(row: Row, ceilings: Ceilings) -> tuple[float, str]:
    """Microseconds below which no version can go, and the ceiling that says so.

    ``row.bound`` is "read" beforehand where next to nothing is written.
    """
    moves = "read" if row.bound == "read" else "copy"
    rate = ceilings.read_gbps if moves == "read" else ceilings.copy_gbps
    moving_us = row.bytes / rate / 1e3
    computing_us = row.flops / ceilings.matmul_tflops / 1e6
    return max((moving_us, moves), (computing_us, "matmul"))


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 1 else float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def _checked(kind: Any, value: Any, where: str) -> Any:
    """``value`` as ``kind``: a dataclass, list, dict, union or plain type."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected an object, got {type(value).__name__}")
        hints = typing.get_type_hints(kind)
        needed = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        missing, unknown = needed - value.keys(), value.keys() - hints.keys()
        if missing or unknown:
            wrong = f"missing {sorted(missing)}" if missing else f"unknown {sorted(unknown)}"
            raise ValueError(f"{where}: {wrong}")
        return kind(**{n: _checked(hints[n], v, f"{where}.{n}") for n, v in value.items()})
    if origin is list and isinstance(value, list):
        return [_checked(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {n: _checked(arguments[1], v, f"{where}.{n}") for n, v in value.items()}
    plain = arguments if origin is types.UnionType else (kind,)
    accepted = {*plain, int} if float in plain else {*plain}
    if type(value) not in accepted:
        names = " or ".join(getattr(x, "__name__", str(x)) for x in plain)
        raise ValueError(f"{where}: expected {names}, got {value!r}")
    return value
