"""Every test of prefill once more, on the kernel of sm_90; and what only that kernel has."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import attention_caches
import kernel_backends
import pytest
import torch
from attention_sequences import BF16, FP16, normal
from emulator.control import SCHEDULES, Emulator
from kernel_backends import Backend, case_factor, emulator_library
from numeric import assert_bitwise_equal
from poison import layouts
from prefill_calls import (
    TILES_SM90,
    PrefillCall,
    random_cache_call,
    random_call,
    random_packed_call,
)
from test_attention_invariance import (
    test_chunks_of_a_prefill_give_the_same_bits,
    test_every_kind_of_cache_gives_the_same_bits,
    test_prefill_does_not_depend_on_the_batch,
)
from test_attention_needles import test_needles_at_the_edges_of_windows
from test_attention_visible import (
    test_many_queries_over_a_cache,
    test_packed_sequences,
    test_sequences_of_equal_lengths,
)
from test_flash_attn import (
    test_all_that_no_query_sees_may_be_anything,
    test_extreme_scores,
    test_more_blocks_than_a_short_grid_has,
    test_nothing_to_see,
    test_offsets_out_of_range_stay_inside,
    test_reads_no_byte_past_the_end,
    test_rows_far_apart,
    test_scores_that_are_not_finite,
    test_what_is_not_finite_stays_with_the_rows_that_see_it,
    test_writes_far_apart,
)
from test_vision_attn import test_random_frames

__all__ = [  # tests that are collected here once more, with the fixtures of this file
    "test_all_that_no_query_sees_may_be_anything",
    "test_chunks_of_a_prefill_give_the_same_bits",
    "test_every_kind_of_cache_gives_the_same_bits",
    "test_extreme_scores",
    "test_many_queries_over_a_cache",
    "test_more_blocks_than_a_short_grid_has",
    "test_needles_at_the_edges_of_windows",
    "test_nothing_to_see",
    "test_offsets_out_of_range_stay_inside",
    "test_packed_sequences",
    "test_prefill_does_not_depend_on_the_batch",
    "test_random_frames",
    "test_reads_no_byte_past_the_end",
    "test_rows_far_apart",
    "test_scores_that_are_not_finite",
    "test_sequences_of_equal_lengths",
    "test_what_is_not_finite_stays_with_the_rows_that_see_it",
    "test_writes_far_apart",
]

KERNEL = "prefill_sm90_kernel"


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """A GPU of sm_90 with so few SMs that blocks take several tiles of queries."""
    kernel_backends._emulated()  # builds it
    control = Emulator(emulator_library())
    control.set("gpu", "sm_90_small")
    yield control
    control.set("gpu", "sm_80")


@pytest.fixture(scope="module", params=kernel_backends.PARAMS)
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "gpu":
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a GPU of sm_90")
        return kernel_backends._gpu()
    request.getfixturevalue("emulator")
    return request.getfixturevalue("emulated")


@pytest.fixture(scope="module")
def emulated(emulator: Emulator) -> Backend:
    return dataclasses.replace(kernel_backends._emulated(), aligned_prefill_apart=True)


def took(emulator: Emulator, kernel: str) -> int:
    return sum(kernel in launch.kernel for launch in emulator.launches())


# --- random calls -------------------------------------------------------------------------------


def aligned(x: torch.Tensor) -> torch.Tensor:
    """`x`, or its values where the copy engine can read them."""
    steps = [stride for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True) if size > 1]
    is_aligned = x.data_ptr() % 16 == 0 and all(step > 0 and step % 8 == 0 for step in steps)
    return x if is_aligned else dict(layouts(x))["contiguous"]


def run_random(
    backend: Backend, emulator: Emulator, key: object, cases: int, make: Callable[..., Any]
) -> None:
    """Random calls that take this kernel, all of them, each held against the oracle."""
    choose = random.Random(f"sm_90 {key}")
    ours = others = 0
    for number in range(cases):
        call = make(choose, (key, number))
        call = call.but(q=aligned(call.q), k=aligned(call.k), v=aligned(call.v))
        label = f"case {key}/{number}: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}"
        run: dict[str, Any] = {"lse": choose.random() < 0.8}
        gaps = choose.choice([0, 0, 1, 8]), choose.choice([0, 0, 1, 8])
        run |= {"gaps": gaps, "offset": choose.choice([0, 0, 0, 1])}
        emulator.clear_launches()
        call.check(backend, f"{label}, window {call.window}", number % 6 == 0, **run)
        ours += took(emulator, KERNEL)
        others += took(emulator, "prefill_sm80_kernel") and call.k.numel() > 0
    if backend.name == "emulated":
        assert others == 0, (ours, others)
        assert ours > 0.7 * cases, (ours, others)  # some have no queries
    backend.count(cases)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(8))
def test_random_calls(share: int, backend: Backend, emulator: Emulator) -> None:
    run_random(backend, emulator, share, 440 * case_factor(), random_call)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_random_packed_calls(share: int, backend: Backend, emulator: Emulator) -> None:
    make = random_packed_call
    run_random(backend, emulator, ("packed", share), 260 * case_factor(), make)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [k for k in attention_caches.KINDS if k != "odd strides"])
def test_random_calls_with_a_history(kind: str, backend: Backend, emulator: Emulator) -> None:
    choose = random.Random(f"sm_90 {kind}")
    cases = 100 * case_factor()
    for number in range(cases):
        emulator.clear_launches()
        call = random_cache_call(choose, kind, ("sm_90", number))
        label = f"{kind} {number}: q {tuple(call.q.shape)}, lengths {call.cache_seqlens}"
        call.check(backend, f"{label}, window {call.window}", number % 6 == 0)
        if backend.name == "emulated":
            assert took(emulator, "prefill_sm80_kernel") == 0, label
    backend.count(cases)


@pytest.mark.sanitized
def test_random_calls_for_sanitizers(backend: Backend, emulator: Emulator) -> None:
    run_random(backend, emulator, "sanitized", 60, random_call)
    run_random(backend, emulator, "sanitized, packed", 30, random_packed_call)
    choose = random.Random("sanitized caches")
    for kind in attention_caches.KINDS:
        for number in range(3):
            random_cache_call(choose, kind, (kind, number)).check(backend, f"{kind} {number}")
    backend.count(90 + 3 * len(attention_caches.KINDS))


# --- which kernel serves ------------------------------------------------------------------------


@pytest.mark.sanitized
@pytest.mark.parametrize(
    ("change", "kernel"),
    [
        ("none", KERNEL),
        ("one element off", "prefill_sm80_kernel"),
        ("k repeated over heads", "prefill_sm80_kernel"),
        ("odd row stride", "prefill_sm80_kernel"),
        ("transposed", KERNEL),
    ],
)
def test_the_layout_chooses(
    change: str, kernel: str, emulator: Emulator, emulated: Backend
) -> None:
    q, k, v = (normal(1, 40, 2, 64, dtype=BF16, key=name) for name in "qkv")
    if change == "one element off":
        buffer = torch.zeros(q.numel() + 1, dtype=BF16)
        buffer[1:] = q.flatten()
        q = buffer[1:].view(q.shape)
    elif change == "k repeated over heads":
        k = k[:, :, :1].expand(k.shape)
    elif change == "odd row stride":
        wide = torch.zeros(1, 40, 2 * 64 + 1, dtype=BF16)
        v = wide.as_strided(v.shape, (40 * 129, 129, 64, 1)).copy_(v)
    elif change == "transposed":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    emulator.clear_launches()
    PrefillCall(q, k, v, (-1, 0)).check(emulated, change)
    assert took(emulator, kernel) == len(emulator.launches()) == 1


@pytest.mark.sanitized
def test_a_variable_chooses(
    emulator: Emulator, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    call = PrefillCall(*(normal(1, 40, 1, 64, dtype=BF16, key=name) for name in "qkv"))
    for value, kernel in (("sm80", "prefill_sm80_kernel"), ("sm90", KERNEL), ("", KERNEL)):
        monkeypatch.setenv("EXAFUSE_ATTENTION", value)
        emulator.clear_launches()
        call.run(emulated)
        assert took(emulator, kernel) == 1, value
    for value, problem in (
        ("sm70", "expected sm80, sm90 or sm90:128x128"),
        ("sm90:64x64", "no prefill tile of 64x64 is compiled for head_dim 64"),
        ("sm90:128x128x", "expected sm80, sm90"),
    ):
        monkeypatch.setenv("EXAFUSE_ATTENTION", value)
        with pytest.raises(ValueError, match=problem):
            call.run(emulated)
    monkeypatch.setenv("EXAFUSE_ATTENTION", "sm90")
    with pytest.raises(ValueError, match="whose strides are not zero"):
        call.but(k=call.k[:, :1].expand(call.k.shape)).run(emulated)
    emulator.set("gpu", "sm_80")
    with pytest.raises(ValueError, match="this GPU is sm_80"):
        call.run(emulated)
    emulator.set("gpu", "sm_90_small")


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", ["ring", "paged"])
def test_rings_and_pages_take_no_other_tile(
    kind: str, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile of 192 keys would run past the end of a page."""
    monkeypatch.setenv("EXAFUSE_ATTENTION", "sm90:128x192")
    choose = random.Random("forced")
    call = random_cache_call(choose, kind, "forced")
    while call.q.shape[-1] > 64:
        call = random_cache_call(choose, kind, "forced")
    with pytest.raises(ValueError, match="rings and pages take tiles of 128 keys, got 192"):
        call.run(emulated)


# --- every tile ---------------------------------------------------------------------------------


def long_call(choose: random.Random, dim: int, key: object) -> PrefillCall:
    """Several tiles of queries and keys, of several heads."""
    dtype = choose.choice([BF16, FP16])
    heads, kv_heads = choose.choice([(1, 1), (2, 1), (3, 1), (2, 2)])
    seqlen_q = choose.choice([1, 63, 64, 65, 127, 128, 129, 192, 193, 257, 300])
    seqlen_k = choose.choice([1, 127, 128, 129, 160, 176, 177, 192, 256, 257, 353, 421])
    q = normal(1, seqlen_q, heads, dim, dtype=dtype, key=(key, "q"))
    k, v = (normal(1, seqlen_k, kv_heads, dim, dtype=dtype, key=(key, name)) for name in "kv")
    window = choose.choice([(-1, -1), (-1, 0), (-1, 0), (50, 0), (130, 7), (0, 0), (300, -1)])
    return PrefillCall(q, k, v, window)


@pytest.mark.slow
@pytest.mark.parametrize("tile", TILES_SM90, ids=str)
def test_every_tile(
    tile: tuple[int, int, int], backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    cols, queries, keys = tile
    monkeypatch.setenv("EXAFUSE_ATTENTION", f"sm90:{queries}x{keys}")
    choose = random.Random(f"tile {tile}")
    cases = 40 * case_factor()
    for number in range(cases):
        dim = choose.choice([cols, cols, cols - 8, cols - 24])
        call = long_call(choose, dim, (tile, number))
        label = f"{tile} {number}: {tuple(call.q.shape)}, {tuple(call.k.shape)}, {call.window}"
        call.check(backend, label, number % 6 == 0)
    backend.count(cases)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_tiles_and_kernels_agree(
    dim: int, emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held to the oracle one by one already; here their logarithms of sums side by side."""
    choose = random.Random(f"agree {dim}")
    for number in range(6 * case_factor()):
        call = long_call(choose, dim, ("agree", number))
        results = []
        choices = [f"sm90:{q}x{k}" for cols, q, k in TILES_SM90 if cols == dim]
        for value in ["sm80", *choices]:
            monkeypatch.setenv("EXAFUSE_ATTENTION", value)
            results.append(call.run(emulated))
        for out, lse in results[1:]:
            torch.testing.assert_close(lse, results[0][1], rtol=2e-6, atol=2e-5)
            torch.testing.assert_close(out, results[0][0], rtol=2e-2, atol=2e-2)
    emulated.count(6 * case_factor())


# --- schedules ----------------------------------------------------------------------------------


def knobs(number: int) -> dict[str, Any]:
    """When copies land, and which warp hardly runs."""
    landing = ("latest", "early", "random")[number // 3 % 3]
    return {"landing": landing, "slow_warp": "chance" if number % 2 == 0 else number // 2 % 12}


@pytest.mark.slow
def test_every_schedule_gives_the_same(emulator: Emulator, emulated: Backend) -> None:
    """Orders of threads, times at which copies land and products complete, slow warps."""
    choose = random.Random("schedules of sm_90")
    calls = [
        long_call(choose, 64, "schedule 64").but(window=(-1, 0)),
        long_call(choose, 128, "schedule 128").but(window=(100, 0)),
        long_call(choose, 96, "schedule 96").but(window=(-1, -1)),
        PrefillCall(*(normal(1, 200, 2, 128, dtype=BF16, key=name) for name in "qkv"), (-1, 0)),
    ]
    dirty = PrefillCall(*(normal(1, 150, 1, 64, dtype=BF16, key=name) for name in "qkv"), (-1, 0))
    dirty.v[0, 100, 0, 5:9] = float("inf")
    calls.append(dirty)
    schedules = 0
    for call in calls:
        expected = call.run(emulated)
        for number in range(24 * case_factor()):
            with emulator.schedule(SCHEDULES[number % 3], seed=number, **knobs(number)):
                out, lse = call.run(emulated)
            label = f"schedule {number} of {tuple(call.q.shape)}"
            assert_bitwise_equal(out, expected[0], label)
            assert_bitwise_equal(lse, expected[1], label)
            schedules += 1
    assert schedules >= 100
    emulated.count(schedules)


@pytest.mark.slow
def test_schedules_of_caches(emulator: Emulator, emulated: Backend) -> None:
    choose = random.Random("schedules of caches")
    for kind in ("ring", "paged"):
        call = random_cache_call(choose, kind, ("schedule", kind))
        expected = call.run(emulated)
        for number in range(6 * case_factor()):
            with emulator.schedule("random", seed=number, **knobs(number)):
                result = call.run(emulated)
            label = f"{kind}, schedule {number}"
            assert_bitwise_equal(result.out, expected.out, label)
            assert_bitwise_equal(result.lse, expected.lse, f"lse of {label}")
    emulated.count(12 * case_factor())
