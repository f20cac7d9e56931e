"""`make gpu-hopper` without a GPU: what is run and in which order, what a later run leaves out, how
timings are read."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_ledger
import hopper_gpu
import hopper_timings
import pytest
import torch
from gpu_checks import CHECKS, Finished
from hopper_gpu import KERNEL, Programme
from hopper_timings import SHAPES, Goal, Shape, choosing, contenders, verdict
from prefill_calls import TILES_SM90
from test_gpu_ledger import H200, RED, output_of

from benchmarks.case import Contender
from benchmarks.shapes import EXAONE_1_2B, EXAONE_32B

ROOT = Path(__file__).resolve().parent.parent
TIMINGS = [f"timing {shape.name}" for shape in SHAPES]
WHOLE = ["probes", *CHECKS, *TIMINGS]


def row(contender: str, time_us: float | None, flops: int = 10**12) -> dict[str, Any]:
    status = "failed" if time_us is None else "ok"
    reason = "RuntimeError: launch" if time_us is None else ""
    return {"contender": contender, "time_us": time_us, "flops": flops} | {
        "status": status,
        "reason": reason,
    }


ROWS = [
    row("exafuse", 1650.0),
    row("exafuse sm90:128x128", 1600.0),
    row("exafuse sm90:128x176", 1500.0),
    row("exafuse sm80", 2400.0),
    row("sdpa-cudnn", 1560.0),
    row("flash-attn-4", None),
]


class FakeGpu:
    """Answers for the processes; `answers` replaces the green one of a piece or a check."""

    def __init__(self) -> None:
        self.answers: dict[str, Finished] = {}
        self.ran: list[str] = []
        self.limits: list[float] = []
        self.now = 0.0
        self.seconds = 10.0
        self.rows: list[dict[str, Any]] = ROWS

    def __call__(self, command, environment, limit_s) -> Finished:
        assert "EXAFUSE_ATTENTION" not in environment
        output = "all right\n"
        if "--out" in command:
            name = f"timing {command[command.index('--shape') + 1]}"
            if name not in self.answers:
                Path(command[-1]).write_text(json.dumps(self.rows))
        elif command[-1].endswith("hopper_probes.py"):
            name = "probes"
        else:
            assert command[-1].endswith("test_prefill_sm90.py")
            name = command[command.index("--tool") + 1] if "--tool" in command else "tests"
            output = output_of(name)
        self.ran.append(name)
        self.limits.append(limit_s)
        self.now += self.seconds
        return self.answers.get(name, Finished(0, output, self.seconds))


@pytest.fixture
def gpu() -> FakeGpu:
    return FakeGpu()


@pytest.fixture
def go(gpu: FakeGpu, tmp_path: Path) -> Callable[..., int]:
    """Runs a programme; its exit status."""

    def run(**changes: Any) -> int:
        gpu.ran.clear()
        gpu.limits.clear()
        options = {"kernel_hash": "aa" * 32, "probes_hash": "bb" * 32, "limit_s": 450.0} | changes
        options = {"machine": H200, "sanitizer": "compute-sanitizer"} | options
        return Programme(results=tmp_path, run=gpu, clock=lambda: gpu.now, **options).go()

    return run


def test_everything_runs_in_order_once(gpu, go, tmp_path, capsys) -> None:
    assert go() == gpu_ledger.PASSED
    assert gpu.ran == WHOLE
    ledger = json.loads((tmp_path / "nvidia-h200" / "ledger.json").read_text())
    assert set(ledger["kernels"]) == {KERNEL}
    assert {c["verdict"] for c in ledger["kernels"][KERNEL]["checks"].values()} == {"passed"}
    files = {path.name for path in (tmp_path / "nvidia-h200" / "hopper").iterdir()}
    assert len(files) == 1 + len(SHAPES)  # and nothing partial
    assert {"probes.json", "timing-d-128-causal-8k.json"} <= files
    printed = capsys.readouterr().out
    for shape in SHAPES:
        assert f"  {shape.name}: sm90:128x176 1500.0 us, 667 TFLOP/s" in printed
    assert go() == gpu_ledger.PASSED
    assert gpu.ran == []
    assert "fastest tile of each shape" in capsys.readouterr().out
    assert go(force=True) == gpu_ledger.PASSED
    assert gpu.ran == WHOLE


def test_the_next_run_goes_on_and_no_piece_outlives_its_run(gpu, go) -> None:
    gpu.seconds = 100.0
    seen = []
    runs = 0
    status = gpu_ledger.UNFINISHED
    while status == gpu_ledger.UNFINISHED:
        status = go()
        runs += 1
        assert all(limit <= 450.0 for limit in gpu.limits)
        assert len(gpu.ran) <= 5  # 4 x 100 s, and one that begins before the end
        seen += gpu.ran
    assert status == gpu_ledger.PASSED
    assert runs >= 4
    assert seen == WHOLE


def test_a_piece_cut_short_gets_all_the_time_of_the_next_run(gpu, go) -> None:
    gpu.seconds = 100.0
    cut = "racecheck"
    gpu.answers[cut] = Finished(None, "", 100.0)
    assert go() == gpu_ledger.UNFINISHED
    assert cut in gpu.ran
    gpu.answers.clear()
    assert go() == gpu_ledger.UNFINISHED
    assert gpu.ran[0] == cut
    assert gpu.limits[0] == 450.0
    name = TIMINGS[-1]
    gpu.seconds = 10.0
    gpu.answers[name] = Finished(None, "", 10.0)
    assert go() == gpu_ledger.UNFINISHED
    gpu.answers.clear()
    assert go() == gpu_ledger.PASSED
    assert gpu.ran == [name]


def test_wrong_probes_stop_everything(gpu, go, tmp_path, capsys) -> None:
    gpu.answers["probes"] = Finished(1, "product, depth by row, 64 columns, bf16: 3 of 8\n", 1.0)
    assert go() == gpu_ledger.FAILED
    assert gpu.ran == ["probes"]
    assert "product, depth by row, 64 columns" in capsys.readouterr().out
    record = json.loads((tmp_path / "nvidia-h200" / "hopper" / "probes.json").read_text())
    assert record["why"] == "ended with status 1"
    assert go(keep_going=True) == gpu_ledger.FAILED
    assert gpu.ran == WHOLE
    gpu.answers.clear()
    assert go() == gpu_ledger.PASSED
    assert gpu.ran == ["probes"]


@pytest.mark.parametrize(
    ("check", "done"),
    [
        ("tests", Finished(1, RED, 1.0)),
        ("memcheck", Finished(86, output_of("memcheck", findings=4), 1.0)),
    ],
)
def test_a_wrong_kernel_is_not_timed(gpu, go, check, done, capsys) -> None:
    gpu.answers[check] = done
    assert go() == gpu_ledger.FAILED
    assert gpu.ran == WHOLE[: 1 + len(CHECKS)]
    assert "is not timed" in capsys.readouterr().out
    assert go(keep_going=True) == gpu_ledger.FAILED
    assert gpu.ran == [check, *TIMINGS]


def test_a_timing_that_fails_is_tried_again_last(gpu, go, tmp_path) -> None:
    gpu.answers[TIMINGS[0]] = Finished(1, "exafuse: wrong: output 0\n", 1.0)
    assert go() == gpu_ledger.FAILED
    assert gpu.ran == WHOLE
    gpu.answers[TIMINGS[1]] = Finished(0, "", 1.0)  # writes no rows
    assert go(kernel_hash="cc" * 32) == gpu_ledger.FAILED
    file = tmp_path / "nvidia-h200" / "hopper" / "timing-d-128-causal-32k.json"
    assert json.loads(file.read_text())["why"] == "ended with status 0 and no rows"
    gpu.answers.clear()
    assert go(kernel_hash="cc" * 32) == gpu_ledger.PASSED
    assert gpu.ran == TIMINGS[:2]


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"kernel_hash": "cc" * 32}, WHOLE[1:]),
        ({"probes_hash": "cc" * 32}, ["probes"]),
        ({"machine": dataclasses.replace(H200, driver="999")}, WHOLE),
        ({"machine": dataclasses.replace(H200, torch="3.0")}, WHOLE),
        ({}, []),
    ],
)
def test_what_has_changed_is_run_again(gpu, go, change, again) -> None:
    go()
    assert go(**change) == gpu_ledger.PASSED
    assert gpu.ran == again


def test_missing_sanitizer_does_not_keep_from_timing(gpu, go) -> None:
    assert go(sanitizer=None) == gpu_ledger.PASSED
    assert gpu.ran == ["probes", "tests", *TIMINGS]


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert hopper_gpu.main(["--results", str(tmp_path)]) == gpu_ledger.REFUSED
    assert "no GPU here" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_on_another_gpu_it_says_so(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert hopper_gpu.main(["--results", str(tmp_path)]) == gpu_ledger.REFUSED
    assert "NVIDIA A100 is sm_80, expected sm_90" in capsys.readouterr().err


def test_hashes_and_files_are_told_apart() -> None:
    pieces = [hopper_gpu.probes_piece(), *hopper_gpu.timing_pieces()]
    assert len({piece.file for piece in pieces}) == len(pieces)
    assert len(hopper_gpu.probes_hash()) == 64
    assert hopper_gpu.probes_hash() == hopper_gpu.probes_hash()


# ---- timings -------------------------------------------------------------------------------------


def test_every_tile_is_timed_on_some_shape() -> None:
    timed = {(shape.model.head_dim, tile) for shape in SHAPES for tile in shape.tiles}
    assert {(c, f"sm90:{q}x{k}") for c, q, k in TILES_SM90} <= timed
    assert len({shape.name for shape in SHAPES}) == len(SHAPES)
    with pytest.raises(LookupError, match="D=128 causal 8k"):
        hopper_timings.shape_of("D=7")


def test_heads_between_two_sizes_take_the_larger_one() -> None:
    shape = next(shape for shape in SHAPES if shape.model.head_dim == 80)
    assert shape.tiles == ["sm90:128x128", "sm90:128x160"]


def test_each_contender_chooses_at_each_call(monkeypatch) -> None:
    monkeypatch.setenv("EXAFUSE_ATTENTION", "sm80")
    chosen = []

    def prepare(inputs):
        return lambda: chosen.append(os.environ.get("EXAFUSE_ATTENTION"))

    peers = [Contender(name, prepare, name) for name in ("sdpa-math", "sdpa-cudnn")]
    found = contenders(Shape("", EXAONE_1_2B, 1, 1), [Contender("exafuse", prepare), *peers])
    names = ["exafuse", *(f"exafuse sm90:{t}" for t in ("128x128", "192x128", "128x192"))]
    assert [c.name for c in found] == [*names, "exafuse sm80", "sdpa-cudnn"]
    calls = [c.prepare({}) for c in found]
    for call in (*calls, calls[0]):
        call()
    tiles = ["sm90:128x128", "sm90:192x128", "sm90:128x192"]
    assert chosen == [None, *tiles, "sm80", "sm80", None]  # the peer sees what was there
    with pytest.raises(ZeroDivisionError), choosing("sm90"):
        _ = 1 // 0
    assert os.environ["EXAFUSE_ATTENTION"] == "sm80"


def test_verdicts() -> None:
    shape = Shape("long", EXAONE_32B, 1, 1, goal=Goal(tflops=640))
    line = verdict(shape, ROWS)
    assert line == (
        "long: sm90:128x176 1500.0 us, 667 TFLOP/s, preferred 1.10x its time, cuDNN 1.04x, "
        "goal >= 640 TFLOP/s reached"
    )
    slow = dataclasses.replace(shape, goal=Goal(ms=1.4))
    assert verdict(slow, ROWS).endswith("goal <= 1.4 ms MISSED")
    assert "no cuDNN" in verdict(shape, ROWS[:4])
    assert verdict(shape, [ROWS[-1]]) == "long: no tile was timed"
    assert hopper_timings.problems(ROWS) == []  # what others lack is no problem of ours
    assert hopper_timings.problems([*ROWS, row("exafuse sm90:1x1", None)]) == [
        "exafuse sm90:1x1: failed: RuntimeError: launch"
    ]


SMALL = """
import dataclasses, json, sys, torch
from exafuse import ops
import hopper_timings
from benchmarks.case import Settings
from benchmarks.shapes import ModelShape
model = ModelShape("tiny", 64, 64, 2, 1, 64, 1)
shape = hopper_timings.Shape("tiny", model, 130, 130, goal=hopper_timings.Goal(tflops=1e6))
settings = Settings(torch.device("cpu"), quick=True, peers=("sdpa-flash",))
rows = hopper_timings.measure(shape, settings)
rows = [dataclasses.asdict(row) for row in rows]
print(hopper_timings.verdict(shape, rows))
print("problems:", hopper_timings.problems(rows))
"""


@pytest.mark.emulated
def test_a_shape_is_measured_on_the_emulator() -> None:
    from kernel_backends import _emulated, emulator_library

    _emulated()
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "python")]
    chosen = {"EXAFUSE_BACKEND": "emulated", "EXAFUSE_EMULATOR_GPU": "sm_90"}
    chosen |= {"EXAFUSE_EMULATED_LIB": str(emulator_library())}
    done = subprocess.run(
        [sys.executable, "-c", SMALL],
        env={**os.environ, **chosen, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny: sm90:" in done.stdout
    assert "goal >= 1e+06 TFLOP/s MISSED" in done.stdout
    assert "problems: []" in done.stdout
    for choice in ("sm90:128x128", "sm90:192x128", "sm90:128x192", "sm80"):
        assert f"exafuse {choice}" in done.stdout
