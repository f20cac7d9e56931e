"""Runs suites of cases and prints them: what `exafuse bench` does."""

from __future__ import annotations

import datetime
import gc
import importlib
import importlib.util
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence

import exafuse
import torch
from exafuse import ops

from . import peers, roofline
from .case import Case, Contender, Inputs, Settings, Unsupported
from .machine import commit, describe_machine
from .results import Peer, Result, Row, finish
from .timing import clocks, error_against, one_line, sets_needed, time_calls

# Modules of cases, by suite; a suite of its own kind has one module with `run(settings)`.
CASES = {
    "ops": ("bench_rms_norm", "bench_qk_norm_rope", "bench_silu_and_mul"),
    "attention": ("bench_flash_attn", "bench_vision_attn"),
    "decode": ("bench_flash_attn_with_kvcache",),
}
RUNS = {"models": "bench_models", "overhead": "bench_overhead"}
SUITES = (*CASES, *RUNS)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

Say = Callable[[str], None]


class Bench:
    """One run: settings, who is there, and the time that is left.

    Args:
        settings: device, dtype, effort, peers.
        limit_s: cases that would begin after so many seconds are "not run".
        say: gets every line of the report as it is known.
    """

    def __init__(self, settings: Settings, limit_s: float = float("inf"), say: Say = print) -> None:
        self.settings, self.say = settings, say
        self.deadline = time.monotonic() + limit_s
        self.peers: dict[str, Peer] = peers.probe(settings.device, settings.peers)

    @torch.no_grad()
    def run(self, suites: Sequence[str], command: str = "") -> Result:
        """Every case of the suites; what fails is a row that says so."""
        started = time.monotonic()
        machine = describe_machine(self.settings.device)
        self.say(f"{machine['name']}, {machine['software']}")
        present = [f"{name} {peer.version}" for name, peer in self.peers.items() if peer.version]
        self.say(f"peers: {', '.join(present) or 'none'}")
        for name, peer in self.peers.items():
            if peer.problem not in ("", "not asked for"):
                self.say(f"without {name}: {peer.problem}")
        ceilings = roofline.measure(self.settings)
        self.say(
            f"ceilings: copy {ceilings.copy_gbps:,.0f} GB/s, read {ceilings.read_gbps:,.0f} GB/s, "
            f"{str(self.settings.dtype).removeprefix('torch.')} products "
            f"{ceilings.matmul_tflops:,.3g} TFLOP/s"
        )
        rows: list[Row] = []
        for suite in suites:
            for of_case in self._rows_of(suite):
                finish(of_case, ceilings)
                self.say_case(of_case)
                rows += of_case
        return Result(
            exafuse=exafuse.__version__,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            commit=commit(),
            command=command,
            seconds=time.monotonic() - started,
            quick=self.settings.quick,
            dtype=str(self.settings.dtype).removeprefix("torch."),
            machine=machine | {"clocks_after": clocks(self.settings.device)},
            peers=self.peers,
            ceilings=ceilings,
            rows=rows,
        )

    def _rows_of(self, suite: str) -> Iterator[list[Row]]:
        """The rows of one case after the other."""
        if suite in RUNS:
            yield from self._rows_of_module(suite)
            return
        for name in CASES[suite]:
            module = importlib.import_module(f".{name}", __package__)
            for case in module.cases(self.settings):
                yield self.measure(case)

    def _rows_of_module(self, suite: str) -> Iterator[list[Row]]:
        name = f"{__package__}.{RUNS[suite]}"
        if importlib.util.find_spec(name) is None:
            reason = "this version of exafuse has no benchmark of it"
            yield [Row(suite, suite, "all", "exafuse", "unsupported", reason)]
            return
        group: list[Row] = []
        for row in importlib.import_module(name).run(self.settings):
            if group and group[0].case_key != row.case_key:
                yield group
                group = []
            group.append(row)
        if group:
            yield group

    # ---- one case --------------------------------------------------------------------------------

    def measure(self, case: Case) -> list[Row]:
        """A row for exafuse and one for every peer that is there."""
        contenders = [c for c in case.contenders if not c.peer or self.peers[c.peer].version]
        rows = {c.name: blank_row(case, c, self.settings.device) for c in contenders}
        if time.monotonic() > self.deadline:
            for row in rows.values():
                row.status, row.reason = "not run", "time was up"
            return list(rows.values())
        # The compiler keeps a few versions of a function and then gives up on it.
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        device = self.settings.device
        try:
            sets, cold = self._sets(case)
            expected = case.expected(sets[0])
        except torch.OutOfMemoryError as error:
            for row in rows.values():
                row.status, row.reason = "out of memory", f"inputs: {one_line(error)}"
            free(device)
            return list(rows.values())
        before = clocks(device)
        for contender in contenders:
            self._compete(contender, rows[contender.name], sets, expected, cold)
        free(device)
        around = {"before": before, "after": clocks(device)}
        for row in rows.values():
            row.clocks = around
        return list(rows.values())

    def _sets(self, case: Case) -> tuple[list[Inputs], bool]:
        device = self.settings.device
        make = lambda seed: case.make(torch.Generator(device).manual_seed(seed))  # noqa: E731
        first = make(0)
        held_bytes = sum(x.nbytes for x in first.values() if isinstance(x, torch.Tensor))
        number, cold = sets_needed(case.bytes, held_bytes, device)
        return [first, *(make(seed) for seed in range(1, number))], cold

    def _compete(
        self,
        contender: Contender,
        row: Row,
        sets: Sequence[Inputs],
        expected: Sequence[torch.Tensor],
        cold: bool,
    ) -> None:
        """Check a contender, then time it; whatever it does ends up in its row."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # SDPA warns of each kernel it may not use
                call = contender.prepare(sets[0])
                outputs = call()
            row.error, wrong = error_against(outputs, expected)
            if wrong:
                row.status, row.reason = "wrong", wrong
                row.error = row.error if math.isfinite(row.error) else None
                return
            del outputs
            calls = [call, *(contender.prepare(inputs) for inputs in sets[1:])]
            timing = time_calls(calls, self.settings.device, self.settings.effort)
        except Unsupported as lack:
            row.status, row.reason = "unsupported", str(lack)
        except torch.OutOfMemoryError as error:
            row.status, row.reason = "out of memory", one_line(error)
            free(self.settings.device)
        except Exception as error:  # a peer's defect must not end the run, ours is one of many rows
            row.status, row.reason = "failed", one_line(error)
        else:
            row.status, row.reason, row.cold = "ok", timing.note, cold
            row.time_us, row.q1_us, row.q3_us = timing.median_us, timing.q1_us, timing.q3_us
            row.repeats, row.mode = timing.repeats, timing.mode

    # ---- printing --------------------------------------------------------------------------------

    def say_case(self, rows: Sequence[Row]) -> None:
        """A heading with the floor, then a line for each contender."""
        if not rows:
            return
        first = rows[0]
        floor = next((row for row in rows if row.floor_us is not None), None)
        cost = f"{first.bytes / 1e6:,.4g} MB"
        if first.flops:
            cost += f", {first.flops / 1e9:,.4g} GFLOP"
        if floor is not None and floor.floor_us is not None:
            cost += f", floor {floor.floor_us:,.4g} us ({floor.bound})"
        heading = f"{first.op}  {first.model} {first.case}".replace("  ", " ", 1).strip()
        self.say(f"\n{heading}" + (f": {cost}" if first.bytes else ""))
        for row in rows:
            self.say(f"  {line_of(row)}")


def line_of(row: Row) -> str:
    """A contender: time and quartiles, rates, percent of the floor, ratio to the best peer."""
    name = f"{row.contender} [{row.path}]" if row.path else row.contender
    if row.time_us is None or row.q1_us is None or row.q3_us is None:
        return f"{name:22} {row.status}: {row.reason}"
    text = f"{name:22} {row.time_us:10.2f} us [{row.q1_us:.2f}, {row.q3_us:.2f}]"
    if row.gbps is not None:
        text += f" {row.gbps:8.1f} GB/s"
    if row.tflops is not None:
        text += f" {row.tflops:8.3f} TFLOP/s"
    if row.percent is not None:
        text += f" {row.percent:6.1f} %"
    if row.ratio is not None:
        text += f" {row.ratio:6.2f}x {row.best_peer}"
    if row.mode == "events":
        text += "  (no graph)"
    return text


def blank_row(case: Case, contender: Contender, device: torch.device) -> Row:
    """The row of a contender before it has run."""
    path = "" if contender.peer else ops.path_for(device)
    return Row(
        suite=case.suite,
        op=case.op,
        case=case.name,
        contender=contender.name,
        status="not run",
        reason="not run",
        model=case.model,
        parameters=dict(case.parameters),
        path=path,
        bytes=case.bytes,
        flops=case.flops,
        bound="read" if case.reads else "",
    )


def free(device: torch.device) -> None:
    """Give back what a contender has left behind on a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


# ---- settings -----------------------------------------------------------------------------------


def default_device() -> str:
    """ "cuda" where torch sees a GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def settings_for(
    device: str | None, quick: bool, wanted: Iterable[str] | None, dtype: str | None
) -> Settings:
    """Settings from words; ValueError names the one that is wrong.

    The dtype is bfloat16 on a GPU and float32 on a CPU unless given.
    """
    name = device or default_device()
    try:
        place = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}") from error
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {name!r}")
    if place.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("device: torch sees no GPU here (torch.cuda.is_available() is False)")
        place = torch.device("cuda", place.index or 0)
        torch.cuda.set_device(place)
    kind = dtype or ("bfloat16" if place.type == "cuda" else "float32")
    if kind not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {kind!r}")
    os.environ.setdefault("FLASHINFER_JIT_VERBOSE", "0")
    return Settings(place, quick, None if wanted is None else tuple(wanted), DTYPES[kind])
