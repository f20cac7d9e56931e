"""Times every tile of the sm_90a prefill kernel on one shape, beside the sm_80 kernel and the
attention of other libraries.

    python tests/hopper_timings.py --shape "D=128 causal 8k" --out FILE

Each contender is compared with the definition before it is timed, by the one helper that times
everything (benchmarks/README.md). Exit status: 0, or 1 if one of ours is not right or not timed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from prefill_calls import TILES_SM90

from benchmarks import bench_flash_attn, bench_vision_attn, roofline
from benchmarks.case import Call, Case, Contender, Inputs, Settings
from benchmarks.results import Row, finish
from benchmarks.run import Bench
from benchmarks.shapes import EXAONE_1_2B, EXAONE_32B, EXAONE_VISION, QWEN_VISION, ModelShape
from benchmarks.shapes import VisionShape as Vision

CHOICE = "EXAFUSE_ATTENTION"  # read by the extension at every call
PEERS = ("sdpa-cudnn", "sdpa-flash", "varlen", "flash-attn-4")
CUDNN = "sdpa-cudnn"
OURS = "exafuse"
CAUSAL, ALL = (-1, 0), (-1, -1)
HEADS_OF_96 = ModelShape("heads of 96", 3072, 8192, 32, 8, 96, 1)


@dataclass(frozen=True)
class Goal:
    """What the fastest of ours is to reach: TFLOP/s at least, or milliseconds at most."""

    tflops: float | None = None
    ms: float | None = None

    def __str__(self) -> str:
        return f">= {self.tflops:g} TFLOP/s" if self.tflops else f"<= {self.ms:g} ms"

    def reached(self, time_us: float, flops: int) -> bool:
        if self.tflops is not None:
            return flops / time_us / 1e6 >= self.tflops
        assert self.ms is not None
        return time_us / 1e3 <= self.ms


@dataclass(frozen=True)
class Shape:
    """A call that is timed; a vision tower attends within one whole frame."""

    name: str
    model: ModelShape | Vision
    queries: int
    keys: int
    window: tuple[int, int] = CAUSAL
    goal: Goal | None = None

    @property
    def tiles(self) -> list[str]:
        """What EXAFUSE_ATTENTION may be here: every tile compiled for these columns."""
        cols = next(c for c in (64, 96, 128) if self.model.head_dim <= c)
        return [f"sm90:{queries}x{keys}" for c, queries, keys in TILES_SM90 if c == cols]

    def case(self, settings: Settings) -> Case:
        if isinstance(self.model, Vision):
            return bench_vision_attn._case(settings, self.model, [self.queries], "one segment")
        return bench_flash_attn._dense(settings, self.model, self.queries, self.keys, self.window)


SHAPES = (
    Shape("D=128 causal 8k", EXAONE_32B, 8192, 8192, goal=Goal(tflops=640)),
    Shape("D=128 causal 32k", EXAONE_32B, 32768, 32768, goal=Goal(tflops=670)),
    Shape("D=128 window 4096, 32k", EXAONE_32B, 32768, 32768, (4095, 0), Goal(ms=4.22)),
    Shape("D=64 causal 8k", EXAONE_1_2B, 8192, 8192, goal=Goal(tflops=470)),
    Shape("vision D=64, frame of 16k", EXAONE_VISION, 16384, 16384, ALL, Goal(tflops=500)),
    Shape("D=128 causal 2k", EXAONE_32B, 2048, 2048),
    Shape("D=128 all 8k", EXAONE_32B, 8192, 8192, ALL),
    Shape("D=128 chunk of 512 on 32k", EXAONE_32B, 512, 32768),
    Shape("D=64 causal 32k", EXAONE_1_2B, 32768, 32768),
    Shape("D=64 all 8k", EXAONE_1_2B, 8192, 8192, ALL),
    Shape("D=96 causal 8k", HEADS_OF_96, 8192, 8192),
    Shape("vision D=80, frame of 16k", QWEN_VISION, 16384, 16384, ALL),
)


def shape_of(name: str) -> Shape:
    """The shape of that name; LookupError names them all."""
    found = next((shape for shape in SHAPES if shape.name == name), None)
    if found is None:
        raise LookupError(f"expected one of {', '.join(s.name for s in SHAPES)}; got {name!r}")
    return found


@contextmanager
def choosing(choice: str) -> Iterator[None]:
    """Calls inside take the kernel and tile of this name; "" is what the extension prefers."""
    before = os.environ.pop(CHOICE, None)
    if choice:
        os.environ[CHOICE] = choice
    try:
        yield
    finally:
        os.environ.pop(CHOICE, None)
        if before is not None:
            os.environ[CHOICE] = before


def forced(contender: Contender, choice: str) -> Contender:
    """The contender with another choice, made at each call."""

    def prepare(inputs: Inputs) -> Call:
        call = contender.prepare(inputs)

        def chosen() -> Any:
            with choosing(choice):
                return call()

        return chosen

    return dataclasses.replace(contender, name=f"{OURS} {choice}".strip(), prepare=prepare)


def contenders(shape: Shape, of_case: Sequence[Contender]) -> list[Contender]:
    """What is preferred, every tile, the sm_80 kernel, then the peers."""
    ours = next(c for c in of_case if not c.peer)
    choices = ["", *shape.tiles, "sm80"]
    return [*(forced(ours, choice) for choice in choices), *(c for c in of_case if c.peer in PEERS)]


def measure(shape: Shape, settings: Settings) -> list[Row]:
    """A row for each contender that is there."""
    bench = Bench(settings)
    case = shape.case(settings)
    case = dataclasses.replace(case, contenders=contenders(shape, case.contenders))
    with torch.no_grad():
        rows = bench.measure(case)
        finish(rows, roofline.measure(settings))
    bench.say_case(rows)
    return rows


# ---- what the rows say -------------------------------------------------------------------------


def fastest(rows: Sequence[Mapping[str, Any]], choices: str) -> Mapping[str, Any] | None:
    """The fastest row that was timed, of contenders whose names start so."""
    timed = [row for row in rows if row["status"] == "ok" and row["contender"].startswith(choices)]
    return min(timed, key=lambda row: row["time_us"], default=None)


def verdict(shape: Shape, rows: Sequence[Mapping[str, Any]]) -> str:
    """One line: the fastest tile, its rate, what cuDNN needs, whether the goal is reached."""
    best = fastest(rows, f"{OURS} sm90:")
    if best is None:
        return f"{shape.name}: no tile was timed"
    time_us, flops = best["time_us"], best["flops"]
    text = f"{shape.name}: {best['contender'].removeprefix(OURS).strip()} {time_us:.1f} us, "
    text += f"{flops / time_us / 1e6:.0f} TFLOP/s"
    preferred = next((row for row in rows if row["contender"] == OURS), None)
    if preferred is not None and preferred["status"] == "ok":
        text += f", preferred {preferred['time_us'] / time_us:.2f}x its time"
    cudnn = fastest(rows, CUDNN)
    text += ", no cuDNN" if cudnn is None else f", cuDNN {cudnn['time_us'] / time_us:.2f}x"
    if shape.goal is not None:
        word = "reached" if shape.goal.reached(time_us, flops) else "MISSED"
        text += f", goal {shape.goal} {word}"
    return text


def problems(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why the shape does not count as timed: whatever one of ours says but "ok"."""
    return [
        f"{row['contender']}: {row['status']}: {row['reason']}"
        for row in rows
        if row["contender"].startswith(OURS) and row["status"] != "ok"
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--shape", required=True, help="one of SHAPES, by name")
    parser.add_argument("--out", type=Path, required=True, help="where the rows go, as JSON")
    arguments = parser.parse_args()
    shape = shape_of(arguments.shape)
    settings = Settings(torch.device("cuda"), peers=PEERS)
    rows = [dataclasses.asdict(row) for row in measure(shape, settings)]
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(verdict(shape, rows))
    for problem in problems(rows):
        print(problem)
    return 1 if problems(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
