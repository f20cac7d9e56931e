"""The emulator tells the truth: wrong kernels are caught by the build named for them."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build, sanitizers
from emulator.control import LANDINGS, SCHEDULES, Emulator
from emulator.mistakes import ANY_LANDING, ASAN, OVERTAKEN, PLAIN, SLOW_WARP, TSAN

ROOT = build.ROOT
pytestmark = pytest.mark.emulated


@pytest.fixture(scope="module")
def honesty():
    """The plain build's module of honesty cases, on the newer of the emulated GPUs."""
    return _load("plain")


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(build.library("plain", "_honesty"))


def _load(variant: str):
    build.build(variant)
    spec = importlib.util.spec_from_file_location("_honesty", build.library(variant, "_honesty"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Emulator(build.library(variant, "_honesty")).set("gpu", "sm_90")
    return module


def test_every_wrong_kernel_is_named_here(honesty):
    wrong = {name for name in honesty.names() if name.startswith("bug ")}
    named = PLAIN.keys() | OVERTAKEN.keys() | SLOW_WARP.keys() | ASAN.keys() | TSAN.keys()
    assert wrong == named
    assert len(wrong) >= 16


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", PLAIN)
def test_plain_build_catches(honesty, emulator, name, schedule):
    with (
        emulator.schedule(schedule, seed=7),
        pytest.raises((RuntimeError, AssertionError)) as caught,
    ):
        honesty.run(name)
    assert re.search(PLAIN[name], str(caught.value), re.DOTALL), caught.value


@pytest.mark.parametrize("landing", LANDINGS[1:])
@pytest.mark.parametrize("name", ANY_LANDING)
def test_plain_build_catches_whenever_copies_land(honesty, emulator, name, landing):
    with (
        emulator.schedule("random", seed=8, landing=landing),
        pytest.raises((RuntimeError, AssertionError), match=f"(?s){PLAIN[name]}"),
    ):
        honesty.run(name)


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("name", OVERTAKEN)
def test_pauses_bring_out_what_is_overtaken(honesty, emulator, name, landing):
    for seed in (1, 2, 3):
        with (
            emulator.schedule("random", seed, landing),
            pytest.raises(RuntimeError, match=f"(?s){OVERTAKEN[name]}"),
        ):
            honesty.run(name)


@pytest.mark.parametrize("landing", LANDINGS)
@pytest.mark.parametrize("schedule", ["forward", "reverse"])
@pytest.mark.parametrize("name", SLOW_WARP)
def test_a_slow_warp_brings_out_who_does_not_wait_for_it(
    honesty, emulator, name, schedule, landing
):
    with (
        emulator.schedule(schedule, 7, landing, slow_warp=5),
        pytest.raises((RuntimeError, AssertionError), match=f"(?s){SLOW_WARP[name]}"),
    ):
        honesty.run(name)


def test_a_correct_kernel_of_sm_90_has_the_same_bits_in_a_hundred_schedules(honesty, emulator):
    warps = 12
    for seed in range(108):
        schedule = SCHEDULES[seed % 3]
        landing = LANDINGS[seed // 3 % 3]
        slow_warp = "chance" if seed % 2 == 0 else seed // 9 % warps
        with emulator.schedule(schedule, seed, landing, slow_warp):
            honesty.run("ok hopper attention")  # compares with its first run in this process


def test_correct_kernels_pass_in_every_schedule(honesty, emulator):
    right = [name for name in honesty.names() if name.startswith("ok ")]
    assert len(right) >= 8
    for name in right:
        for schedule in SCHEDULES:
            for seed in (1, 2, 3):
                with emulator.schedule(schedule, seed):
                    honesty.run(name)


def test_a_failure_names_kernel_block_thread_and_line_and_leaves_the_process_usable(honesty):
    for _ in range(3):
        with pytest.raises(RuntimeError, match="lane 5 ends") as caught:
            honesty.run("bug lane missing from a collective")
        message = str(caught.value)
        assert "missing_lane_kernel" in message
        assert "block (0, 0, 0), thread (5, 0, 0) of grid (1, 1, 1), block (32, 1, 1)" in message
        source = (ROOT / "tests" / "emulator" / "bugs" / "collectives.cu").read_text().splitlines()
        line = int(re.search(r"tests/emulator/bugs/collectives\.cu:(\d+)", message)[1])
        assert "ptx::shfl_xor(value, 1)" in source[line - 1]
        honesty.run("ok ldmatrix x4")


def test_memory_faults_are_failures_of_the_launch(honesty):
    for name in ("bug wild pointer", "bug more local memory than a stack holds") * 3:
        with pytest.raises(RuntimeError, match=r"bugs/memory\.cu:\d+ in .*_kernel"):
            honesty.run(name)
        honesty.run("ok warps leave early")


def test_emulated_gpu_sets_limits_and_instructions(honesty, emulator):
    honesty.run("stmatrix, which sm_80 lacks")
    emulator.set("gpu", "sm_80")
    try:
        with pytest.raises(RuntimeError, match="stmatrix needs sm_90"):
            honesty.run("stmatrix, which sm_80 lacks")
        with pytest.raises(RuntimeError, match="mbarrier_init needs sm_90"):
            honesty.run("ok boxes through two stages")
        with pytest.raises(RuntimeError, match="elect_one needs sm_90"):
            honesty.run("bug elect_one in half a warp")
        with pytest.raises(RuntimeError, match="sm_80 offers 166912"):
            honesty.run("bug more shared memory than the GPU has")
    finally:
        emulator.set("gpu", "sm_90")


def test_boxes_are_counted_whole_in_shared_memory_and_by_what_lies_inside_in_global(
    honesty, emulator
):
    emulator.clear_launches()
    with emulator.counting():
        honesty.run("ok boxes through two stages")
    (counts,) = emulator.counts()
    rows, boxes, box_bytes = 5 * 16 + 3, 6, 16 * 128
    assert counts.global_read == counts.global_written == rows * 128
    assert counts.shared_written == 2 * boxes * box_bytes  # loaded; stored by threads
    assert counts.shared_read == boxes * box_bytes + rows * 128  # by threads; to be stored


def test_exact_arithmetic_can_be_chosen(honesty, emulator):
    emulator.set("mma", "double")
    try:
        honesty.run("ok mma bf16")
        honesty.run("ok mma fp16")
    finally:
        emulator.set("mma", "single")


def test_wgmma_count_as_so_many_m16n8k16(honesty, emulator):
    rows, depth = 64, 64
    emulator.clear_launches()
    with emulator.counting():
        honesty.run("ok wgmma bf16, a in registers")
    mma = [counts.mma for counts in emulator.counts()]
    widths = (64, 96, 128, 160, 176, 192)
    assert mma == [rows // 16 * (columns // 8) * (depth // 16) for columns in widths]


def test_launches_are_recorded(honesty, emulator):
    emulator.clear_launches()
    honesty.run("ok dependent launches")
    launches = emulator.launches()
    assert [re.search(r"::(\w+)\(", launch.kernel)[1] for launch in launches] == [
        "dependent_kernel",
        "dependent_kernel",
    ]
    assert launches[0].grid == (1, 1, 1)
    assert launches[0].block == (32, 1, 1)


@pytest.mark.parametrize(
    ("name", "value"), [("schedule", "sideways"), ("seed", "x"), ("gpu", "sm_75"), ("color", "red")]
)
def test_unknown_options_are_refused(emulator, name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        emulator.set(name, value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ASAN)
def test_address_and_undefined_behaviour_sanitizers_catch(name):
    build.build("asan")
    outcome = sanitizers.run("asan", ["tests/emulator/run_honesty.py", name], timeout=120)
    assert outcome.returncode != 0, outcome.stdout
    assert any(re.search(ASAN[name], report) for report in outcome.reports), outcome.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", TSAN)
def test_thread_sanitizer_catches(name):
    build.build("tsan")
    outcome = sanitizers.run("tsan", ["tests/emulator/run_honesty.py", name], timeout=120)
    assert outcome.returncode == 66, outcome.stderr
    assert any("data race" in report and TSAN[name] in report for report in outcome.reports)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_sanitizers_find_nothing_in_correct_kernels(honesty, variant):
    build.build(variant)
    right = [name for name in honesty.names() if name.startswith("ok ")]
    for schedule in SCHEDULES:
        outcome = sanitizers.run(
            variant, ["tests/emulator/run_honesty.py", "--schedule", schedule, *right], timeout=300
        )
        assert outcome.reports == []
        assert outcome.returncode == 0, outcome.stderr
        assert outcome.stdout.count(": passed") == len(right), outcome.stdout


@pytest.mark.slow
def test_a_caught_failure_is_no_report_of_the_sanitizer(honesty):
    build.build("tsan")
    name = "bug lane missing from a collective"
    outcome = sanitizers.run("tsan", ["tests/emulator/run_honesty.py", name, "ok mma bf16"])
    assert outcome.reports == []
    assert "lane 5 ends" in outcome.stdout
    assert "ok mma bf16: passed" in outcome.stdout


@pytest.mark.slow
def test_contracted_arithmetic_passes_too():
    fast = _load("fast")
    for name in fast.names():
        if name.startswith("ok "):
            fast.run(name)


_NAME = re.compile(r"(?:^|\s|\*|&)(\w*[^\W_])\((?=[^;{]*\)[^;{]*\{)")


def _functions(path: Path) -> set[str]:
    """Names of the functions, structs and constants that a header defines for kernels to use."""
    text = re.sub(r"//[^\n]*", "", path.read_text())
    text = text.replace("__device__", "").replace("__forceinline__", "")
    functions = set(_NAME.findall(text)) - {"if", "for", "while", "switch"}
    types = set(re.findall(r"(?:struct|class) (\w+) \{", text))
    constants = set(re.findall(r"inline constexpr [^=;]*?(\w+) = ", text))
    return functions | types | constants


@pytest.mark.parametrize(
    ("header", "cuda_only"),
    [
        ("ptx.cuh", {"dynamic_smem", "SharedArena"}),
        ("ptx_sm90.cuh", {"pin"}),
        ("launch.h", {"throw_cuda_error", "check_cuda", "allow_shared_memory"}),
    ],
)
def test_headers_offer_what_the_kernels_headers_offer(header, cuda_only):
    real = _functions(ROOT / "csrc" / "common" / header)
    emulated = _functions(ROOT / "tests" / "emulator" / "common" / header)
    assert len(real) > 10
    assert real - emulated <= cuda_only


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gdb") is None, reason="gdb is not installed")
def test_breakpoints_in_kernels_work_in_gdb():
    build.build("plain")
    source = ROOT / "tests" / "emulator" / "bugs" / "tricky.cu"
    line = 1 + next(i for i, text in enumerate(source.read_text().splitlines()) if "peers" in text)
    commands = [
        "set breakpoint pending on",
        f"break tricky.cu:{line} if threadIdx.x == 9 && blockIdx.x == 2",
        "run",
        "print bin",
        "print blockIdx.x",
        "kill",
    ]
    program = [sys.executable, "tests/emulator/run_honesty.py", "ok atomics across blocks"]
    arguments = [part for command in commands for part in ("-ex", command)]
    done = subprocess.run(
        ["gdb", "-batch", "-nx", *arguments, "--args", *program],
        env=sanitizers.environment("plain"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "histogram_kernel" in done.stdout, done.stdout + done.stderr
    assert "$1 = 2" in done.stdout  # thread 2 * 64 + 9 = 137 counts into bin 2
    assert "$2 = 2" in done.stdout
