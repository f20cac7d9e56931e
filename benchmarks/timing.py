"""The one way everything here is timed. README.md in this folder says why it is done so.

A contender is a list of calls, one for each set of inputs. A GPU replays them as one CUDA graph
where they can be captured, so that neither Python nor launches are in the figure, and by events
otherwise. The sets together are larger than the cache and take turns, so that no call finds its
inputs there.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]

MAX_SETS = 64
# A replay shorter than this would show the time that starting a graph takes.
SHORTEST_REPLAY_US = 500.0
SLEEP_CYCLES = 2_000_000  # about a millisecond in which the host runs ahead of the GPU


@dataclass(frozen=True)
class Effort:
    """How often a case is repeated: at most ``repeats``, at least 3, about ``seconds`` long."""

    repeats: int
    seconds: float


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call: median and quartiles over the repeats, and the fastest."""

    median_us: float
    q1_us: float
    q3_us: float
    repeats: int
    mode: str  # graph, events or host
    best_us: float
    note: str = ""  # why a graph could not be had


def cache_bytes(device: torch.device) -> int:
    """The last-level cache; 0 where it is not known, and on a CPU, whose cases stay small."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0))


def sets_needed(moved_bytes: int, held_bytes: int, device: torch.device) -> tuple[int, bool]:
    """How many sets of inputs take turns, and whether a set has left the cache when it returns.

    Args:
        moved_bytes: what a call reads and writes of a set: a window, say, and not the whole cache.
        held_bytes: what a set takes of the memory.
        device: whose cache has to be filled.
    """
    cache = cache_bytes(device)
    if cache == 0:
        return 2, False
    wanted = -(-5 * cache // (2 * max(moved_bytes, 1)))
    free, _ = torch.cuda.mem_get_info(device)
    affordable = int(free // 4 // max(held_bytes, 1))
    number = max(1, min(max(2, wanted), MAX_SETS, affordable))
    return number, number * moved_bytes > 2 * cache


def time_calls(calls: Sequence[Call], device: torch.device, effort: Effort) -> Timing:
    """The time of one call, after as many unmeasured ones as everything lazy needs."""
    for call in calls:
        call()
    if device.type != "cuda":
        return _on_host(calls, effort)
    torch.cuda.synchronize(device)
    estimate_us = _events(lambda: [call() for call in calls], len(calls))
    rounds = max(1, int(SHORTEST_REPLAY_US / max(estimate_us * len(calls), 1.0)))
    rounds = min(rounds, max(1, 256 // len(calls)))
    many = [call for _ in range(rounds) for call in calls]
    note = ""
    try:
        replay = _captured(many)
        mode = "graph"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        note = f"no graph: {one_line(error)}"
        torch.cuda.synchronize(device)
        mode = "events"

        def replay() -> None:
            for call in many:
                call()

    replay()
    return _repeated(lambda: _events(replay, len(many)), len(many), effort, mode, note)


def _captured(calls: Sequence[Call]) -> Call:
    """The calls as one CUDA graph; RuntimeError if one of them cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # whatever a library sets up for a stream, before the capture
        calls[0]()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def _events(run: Call, count: int) -> float:
    """Microseconds of one of ``count`` calls; the host is ahead of the GPU when they start."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e3 / count


def _on_host(calls: Sequence[Call], effort: Effort) -> Timing:
    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) * 1e6 / len(calls)

    return _repeated(once, len(calls), effort, "host", "")


def _repeated(
    once: Callable[[], float], count: int, effort: Effort, mode: str, note: str
) -> Timing:
    times = [once()]
    affordable = int(effort.seconds * 1e6 / max(times[0] * count, 1e-3))
    repeats = max(3, min(effort.repeats, affordable))
    times += [once() for _ in range(repeats - 1)]
    q1, median, q3 = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(median, q1, q3, repeats, mode, min(times), note)


# ---- correctness ---------------------------------------------------------------------------------

# Relative errors in the 2-norm: of a whole output, and of its worst row (a row that nobody wrote).
TOLERANCE = {torch.float32: 1e-4, torch.float16: 2**-9, torch.bfloat16: 2**-7}
ROW_FACTOR = 8


def error_against(outputs: Sequence[Tensor], expected: Sequence[Tensor]) -> tuple[float, str]:
    """The largest relative error of the outputs, and what is wrong with them, or "".

    A NaN is an error wherever the definition has none.
    """
    if len(outputs) != len(expected):
        return float("inf"), f"expected {len(expected)} outputs, got {len(outputs)}"
    largest = 0.0
    for i, (found, wanted) in enumerate(zip(outputs, expected, strict=True)):
        if found.shape != wanted.shape:
            return float("inf"), (
                f"output {i}: expected shape {tuple(wanted.shape)}, got {tuple(found.shape)}"
            )
        a, b = found.detach().float(), wanted.detach().float()
        difference = (a - b).flatten(0, -2) if a.dim() > 1 else (a - b)[None]
        scale = b.norm().clamp_min(1e-30)
        error = float(difference.norm() / scale)
        rms_row = scale / max(difference.shape[0], 1) ** 0.5
        worst = float(difference.norm(dim=-1).max() / rms_row) if difference.numel() else 0.0
        largest = max(largest, error) if error == error else float("nan")
        tolerance = TOLERANCE[wanted.dtype]
        if not error <= tolerance:
            return error, f"output {i}: relative error {error:.2g}, allowed {tolerance:.2g}"
        if not worst <= ROW_FACTOR * tolerance * _widest_row(b):
            return error, f"output {i}: one row is off by {worst:.2g} of a typical row"
    return largest, ""


def _widest_row(wanted: Tensor) -> float:
    """The largest row of the definition over the typical one: long rows may err by more."""
    rows = wanted.flatten(0, -2) if wanted.dim() > 1 else wanted[None]
    norms = rows.norm(dim=-1)
    return max(1.0, float(norms.max() / norms.square().mean().sqrt().clamp_min(1e-30)))


# ---- the machine ---------------------------------------------------------------------------------

_CLOCK_FIELDS = {
    "sm_mhz": "clocks.sm",
    "memory_mhz": "clocks.mem",
    "watts": "power.draw",
    "celsius": "temperature.gpu",
}


def nvidia_smi(device: torch.device, fields: Sequence[str]) -> list[str]:
    """What nvidia-smi says of the GPU, in the order of ``fields``; empty where it is missing."""
    if device.type != "cuda":
        return []
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    command = [
        *("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"),
        f"--id={'GPU-' + uuid.removeprefix('GPU-') if uuid else device.index or 0}",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    values = [value.strip() for value in done.stdout.split(",")]
    return values if len(values) == len(fields) else []


def clocks(device: torch.device) -> dict[str, float]:
    """Clocks, power and temperature now; empty where nobody says."""
    found = {}
    values = nvidia_smi(device, list(_CLOCK_FIELDS.values()))
    for name, value in zip(_CLOCK_FIELDS, values, strict=False):
        try:
            found[name] = float(value)
        except ValueError:  # "[N/A]"
            continue
    return found


def one_line(error: BaseException, limit: int = 160) -> str:
    """Type and message of an error, on one line."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
