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

ROOT = build.ROOT
pytestmark = pytest.mark.emulated

# Wrong kernels that the plain build catches in every schedule, and the words it finds for them.
PLAIN = {
    "bug missing barrier before read": "nan",
    "bug divergent barrier": r"divergent sync_threads\(\)",
    "bug half the block skips the barrier": "sync_threads",
    "bug thread exits before the barrier": "ends while|can never be reached",
    "bug one warp meets one barrier more": "ends while|can never be reached",
    "bug named barrier with two counts": "named barrier 1|deadlock",
    "bug arrival nobody waits for": "32 of 64 arrivals left at named barrier 2",
    "bug warps wait at two named barriers": "deadlock.*bar_sync.*bar_sync",
    "bug lane missing from a collective": "lane 5 ends while lane|ended before",
    "bug one lane alone in a collective": "deadlock.*thread 0 in shfl",
    "bug collective at two places": "the lanes of the warp diverge",
    "bug lane outside its own mask": "does not name it",
    "bug shuffle from a lane outside the mask": "reads from lane 20",
    "bug full mask in a partial warp": "names lanes 16-31, which the block of 48 threads",
    "bug lanes taken to run in lockstep": "nan",
    "bug uninitialised shared read": "element 9 is -?nan",
    "bug shared write past the end": "written 0 bytes past its end",
    "bug shared index into the neighbour array": "nan",
    "bug shared memory smaller than taken": "takes 512 bytes.*gives it 256",
    "bug shared memory larger than taken": "528 bytes of shared memory, it takes 512",
    "bug misaligned vector access": "not aligned to 16 bytes",
    "bug wild pointer": "memory fault at address 0x40",
    "bug more local memory than a stack holds": "stack overflow",
    "bug wait that lets one copy too many fly": "nan|in flight",
    "bug buffer refilled too early": "nan",
    "bug copy awaited without a barrier": "nan",
    "bug thread exits with a copy in flight": "1 asynchronous copies in flight",
    "bug store into a copy in flight": "destination of an asynchronous copy was written",
    "bug source of a copy changes in flight": "source of an asynchronous copy changed",
    "bug copy to a misaligned shared address": "not aligned to 16 bytes",
    "bug global memory before griddep_wait": r"before griddep_wait\(\)",
    "bug dependent launch that never waits": r"no thread called griddep_wait\(\)",
    "bug grid.y beyond 65535": "exceeds .2147483647, 65535, 65535",
    "bug empty grid": "empty grid",
    "bug block of 1056 threads": "exceeds 1024 threads",
    "bug more shared memory than the GPU has": "sm_90 offers 232448",
    "bug approximation taken for exact": "expected 1.0",
    "bug rsqrt of a subnormal": "infinite",
    "bug fragment registers exchanged": "element 0 is",
    "bug ldmatrix without trans": "element 0 is",
    "bug movmatrix left out": "movmatrix: row 0, column 1",
    "bug mbarrier without fence_mbarrier_init": "no fence_mbarrier_init followed",
    "bug mbarrier without a barrier of the block": "no barrier of the block|not initialised yet",
    "bug mbarrier count too low": "overrun: it waits for phase",
    "bug mbarrier count too high": "deadlock.*1 of 5 arrivals",
    "bug parity of the empty wait": "deadlock.*needs 4 of 4 arrivals",
    "bug one phase left out": "twice in a row|tma_load in flight",
    "bug fewer bytes announced than copied": "awaits only 1024 more",
    "bug more bytes announced than copied": "2048 bytes, of which no copy brings 2048",
    "bug box refilled without waiting": "more arrivals at mbarrier|overrun",
    "bug box read without waiting": "tma_load in flight|row 0, column 0",
    "bug box released before it was used": "tma_load in flight|overrun|row 0, column 0",
    "bug store of a box without proxy fence": "tma_store meets.*not called fence_proxy_async since",
    "bug store of a box not waited for": "belongs to a tma_store that has not read it",
    "bug box not at a multiple of 1024": "shared address 0x480 is not a multiple of 1024",
    "bug two loads into one box": "0x400 belongs to a tma_load in flight",
    "bug store into a box in flight": "0x440 belongs to a tma_load in flight",
    "bug plain store into a box in flight": "was written while the copy was in flight",
    "bug tensor changes while a box is in flight": "the tensor changed while the copy was in fl",
    "bug load of a box nobody waits for": "the block ends with 1 TMA loads in flight",
    "bug thread exits with a box unread": "ends with a TMA store unread",
    "bug store of a box not committed": "ends with a TMA store unread",
    "bug box changes before it is read": "was written before tma_store_wait_read",
    "bug proxy fence of one thread for all": "where thread 1 has stored and not called fence_pro",
    "bug store_shared without proxy fence": "tma_store meets.*not called fence_proxy_async since",
    "bug stmatrix without proxy fence": "tma_store meets.*not called fence_proxy_async since",
    "bug mbarrier written over": "mbarrier_arrive: mbarrier 0x1000.* was written over",
    "bug mbarrier initialised twice": "mbarrier 0x1000 .initialised at .*boxes.cu:.*already",
    "bug mbarrier not at a multiple of 8": "not aligned to 8 bytes",
    "bug box loaded before griddep_wait": r"before griddep_wait\(\)",
    "bug more registers than the block has": "deadlock.*in setmaxnreg_inc",
    "bug setmaxnreg the wrong way": "setmaxnreg_dec to 176 registers: the thread has 168",
    "bug setmaxnreg in half a warpgroup": "setmaxnreg is for whole warpgroups",
    "bug elect_one in half a warp": "elect_one|ends while lane",
    "bug values read without waiting": "overrun|element 32 is",
    "bug wgmma without a fence": r"no wgmma_fence\(\) since the last commit",
    "bug wgmma never committed": r"no wgmma_commit\(\) closes",
    "bug wgmma never awaited": "ends with wgmma in flight",
    "bug wgmma accumulator not named": "does not name its accumulator",
    "bug wgmma operand not named": "does not name its operand a",
    "bug wgmma accumulator in flight": "names an accumulator still in flight",
    "bug wgmma accumulator written in flight": "accumulator of the wgmma.*written while in flight",
    "bug wgmma operand written in flight": "operand a of the wgmma.*written while in flight",
    "bug wgmma operand stored without a fence": "wgmma meets.*not called fence_proxy_async since",
    "bug wgmma of different operands": "another product than a warp of the same warpgroup",
    "bug wgmma of three warps": "issued 4 wgmma, warp 2 only 0",
    "bug wgmma step of 64 bytes": "inside the first row of an atom",
    "bug hopper mbarriers without a fence": "no fence_mbarrier_init followed",
    "bug hopper keys not empty": "more arrivals at mbarrier|overrun",
    "bug hopper half the bytes expected": "awaits only 0 more",
    "bug hopper parity of empty keys": "deadlock.*mbarrier_wait",
    "bug hopper empty count of one": "overrun|operand b of the wgmma.*overwritten while in flight",
    "bug hopper values behind the last key": "is off by -?nan",
    "bug hopper products without a fence": r"no wgmma_fence\(\) since the last commit",
    "bug hopper queries not awaited": "belongs to a tma_load in flight",
    "bug hopper values not awaited": "the thread was overrun",
    "bug hopper wait for one group too few": "names an accumulator still in flight",
    "bug hopper turn not passed": "deadlock.*bar_sync",
    "bug hopper barrier inside a turn": "deadlock.*bar_sync.*bar_sync",
    "bug hopper strides swapped": "bytes between groups of eight rows, expected 1024",
    "bug hopper step of 64 bytes": "inside the first row of an atom",
    "bug hopper adds to old scores": r"row \d+ is off by",
    "bug hopper output rescaled in flight": "accumulator of the wgmma.*written while in flight",
    "bug hopper output rescaled after the fence": r"written after wgmma_fence\(\)",
    "bug hopper probs packed in flight": "operand a of the wgmma.*written while in flight",
    "bug hopper output without a fence": "tma_store meets.*not called fence_proxy_async since",
    "bug hopper output not swizzled": r"row \d+ is off by",
    "bug hopper output not awaited": "belongs to a tma_store that has not read it",
}

# Those that come out when threads pause where others could overtake them, and when one warp is
# behind the others.
OVERTAKEN = {
    "bug hopper keys released early": "operand b of the wgmma.*overwritten while in flight",
    "bug hopper values released early": "operand b of the wgmma.*overwritten while in flight",
}
SLOW_WARP = {
    "bug one warp releases for all": "the thread was overrun",
    "bug hopper release by one warp of four": "operand b of the wgmma.*overwritten while in flight",
}

# Wherever copies land; one that has landed early hides what did not wait for it.
ANY_LANDING = [
    name
    for name in PLAIN
    if name.startswith("bug hopper ") and name != "bug hopper queries not awaited"
]

# Wrong kernels whose numbers may come out right, and the report of the sanitizer that sees them.
ASAN = {
    "bug shared read past the end": "use-after-poison",
    "bug shared write past the end": "use-after-poison",
    "bug shared index into the neighbour array": "use-after-poison",
    "bug global read past the end": "heap-buffer-overflow",
    "bug int32 offset": "signed integer overflow: 3 [*] 1073741824",
    "bug more local memory than a stack holds": "stack-overflow",
    "bug tensor map larger than its tensor": "heap-buffer-overflow",
}
TSAN = {
    "bug missing barrier before overwrite": "barriers.cu",
    "bug missing barrier before read": "barriers.cu",
    "bug two blocks race": "memory.cu",
    "bug counter without atomics": "memory.cu",
    "bug lanes taken to run in lockstep": "collectives.cu",
    "bug shuffle taken for a barrier": "collectives.cu",
    "bug copy awaited without a barrier": "copies.cu",
    "bug buffer refilled too early": "copies.cu",
    "bug two blocks store one box": "boxes.cu",
    "bug values read without waiting": "roles.cu",
}


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
