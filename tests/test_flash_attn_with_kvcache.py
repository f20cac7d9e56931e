"""flash_attn_with_kvcache by the decode kernel: random calls, every split, corners."""

from __future__ import annotations

import random

import attention_caches
import numpy as np
import pytest
import torch
from attention_sequences import BF16, FP16, normal
from cache_calls import CacheCall, random_call, some_call, spoil
from emulator.control import SCHEDULES, Emulator
from exafuse.ops import front_door
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal
from poison import poisoned, sparse

__all__ = ["backend", "emulated"]  # fixtures

KINDS = attention_caches.KINDS
INT32 = torch.int32


def run_random(backend: Backend, kind: str, share: object, cases: int) -> None:
    choose = random.Random(f"cache {kind} {share}")
    for number in range(cases):
        call = random_call(choose, kind, (share, number))
        gaps = (choose.choice([0, 0, 1, 8]), choose.choice([0, 0, 1, 8]))
        label = (
            f"{kind} case {share}/{number}: q {tuple(call.q.shape)}, cache "
            f"{tuple(call.k_cache.shape)}, lengths {call.cache_seqlens}, window {call.window}"
        )
        call.check(backend, label, number % 6 == 0, gaps=gaps, offset=choose.choice([0, 0, 1]))
    backend.count(cases)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", range(4))
def test_random_calls(share: int, kind: str, backend: Backend) -> None:
    run_random(backend, kind, share, 210 * case_factor())


@pytest.mark.sanitized
@pytest.mark.parametrize("kind", KINDS)
def test_random_calls_for_sanitizers(kind: str, backend: Backend) -> None:
    run_random(backend, kind, "sanitized", 40)


# --- splits -------------------------------------------------------------------------------------


def overlapping(slots: int, dim: int, key: object) -> torch.Tensor:
    """`[1, slots, 1, dim]` of different keys in the memory of a few: each 8 elements on."""
    return normal(8 * slots + dim, dtype=BF16, key=key).as_strided((1, slots, 1, dim), (0, 8, 0, 1))


def long_call(slots: int, length: int, queries: int, left: int = -1) -> CacheCall:
    return CacheCall(
        normal(1, queries, 2, 64, dtype=BF16, key=length),
        *(overlapping(slots, 64, name) for name in "kv"),
        cache_seqlens=torch.tensor([length], dtype=INT32),
        window=(left, 0),
    )


@pytest.mark.sanitized
def test_every_number_of_splits(backend: Backend) -> None:
    """1 to 64, of 256 keys each."""
    choose = random.Random("splits")
    for splits in range(1, 65):
        length = 256 * splits - choose.choice([0, 0, 1, 100, 255])
        call = long_call(16384, length, choose.choice([1, 1, 3]))
        call.check(backend, f"{length} keys", peer=False)
    backend.count(64)


@pytest.mark.parametrize(
    "step", [16384, *(pytest.param(n, marks=pytest.mark.slow) for n in (32768, 65536))]
)
def test_steps_of_the_split_size(step: int, backend: Backend) -> None:
    for length in (step - 1, step, step + 1, step + step // 2 + 77):
        long_call(2 * step, length, 2).check(backend, f"{length} keys", peer=False)
    backend.count(4)


def test_windows_of_many_splits(backend: Backend) -> None:
    """A window that starts and ends anywhere within splits."""
    choose = random.Random("windows")
    cases = 24 * case_factor()
    for _ in range(cases):
        left = choose.choice([255, 256, 257, 1000, 4095, 5000])
        length = choose.randint(left, 40000)
        call = long_call(40064, length, choose.choice([1, 2, 16]), left)
        call.check(backend, f"{length} keys, window {left}", peer=False)
    backend.count(cases)


def test_long_positions(backend: Backend) -> None:
    """A ring that has seen as many tokens as 32 bits count, and pages that repeat."""
    keys, values = (normal(1, 256, 2, 64, dtype=FP16, key=name) for name in "kv")
    q = normal(1, 3, 4, 64, dtype=FP16, key="q")
    for length in (2**31 - 1, 2**31 - 2, 2**31 - 128, 2**31 - 129, 2**30 + 5):
        seen = torch.tensor([length], dtype=INT32)
        call = CacheCall(q, keys, values, seen, window=(200, 0), ring=True)
        call.check(backend, f"ring at {length}")
    pages = [normal(3, 128, 2, 64, dtype=FP16, key=("page", name)) for name in "kv"]
    table = torch.arange(1024).remainder(3).to(INT32)[None]
    for length in (1024 * 128, 1024 * 128 + 7, 100_003):
        seen = torch.tensor([length], dtype=INT32)
        call = CacheCall(q, *pages, seen, block_table=table, window=(3000, 0))
        call.check(backend, f"pages at {length}")
    backend.count(8)


# --- corners ------------------------------------------------------------------------------------


def small_call(queries: int = 2, batch: int = 2, slots: int = 128) -> CacheCall:
    caches = (normal(batch, slots, 1, 64, dtype=BF16, key=name) for name in "kv")
    seen = torch.tensor([7, 100][:batch], dtype=INT32)
    return CacheCall(normal(batch, queries, 2, 64, dtype=BF16, key="q"), *caches, seen)


@pytest.mark.sanitized
def test_numbers_out_of_range_stay_inside(backend: Backend) -> None:
    call = small_call()
    wild = torch.tensor([-(2**31), 2**31 - 1], dtype=INT32)
    call.but(cache_seqlens=wild).check(backend, "lengths")
    call.but(cache_batch_idx=wild).check(backend, "rows")
    call.but(cache_leftpad=wild).check(backend, "padding")
    call.but(block_table=wild[:, None]).check(backend, "pages")
    packed = call.but(q=call.q.flatten(0, 1), max_seqlen_q=2)
    for starts in ([0, 2, 4], [-5, 2, 99], [1, 1, 3]):
        packed.but(cu_seqlens_q=torch.tensor(starts, dtype=INT32)).check(backend, "offsets")
    new = [normal(2, 30, 1, 64, dtype=BF16, key=("new", name)) for name in "kv"]
    for lengths in ([-1, 99], [128, 2**31 - 1], [-(2**31), 0]):
        seen = torch.tensor(lengths, dtype=INT32)
        call.but(k=new[0], v=new[1], cache_seqlens=seen).check(backend, f"append at {lengths}")
    backend.count(10)


def test_nothing_to_see(backend: Backend) -> None:
    for queries, batch, slots in ((0, 2, 128), (2, 0, 128), (2, 2, 0), (16, 1, 128)):
        call = small_call(queries, batch, slots)
        call.check(backend, f"{queries} queries, {batch} sequences, {slots} slots")
        call.but(cache_seqlens=None).check(backend, "all slots")
    no_rows = small_call()
    no_rows = no_rows.but(
        k_cache=no_rows.k_cache[:0],
        v_cache=no_rows.v_cache[:0],
        cache_batch_idx=torch.zeros(2, dtype=INT32),
    )
    no_rows.check(backend, "a cache without rows")
    backend.count(9)


@pytest.mark.sanitized
def test_what_is_not_finite_shows_where_it_is_seen(backend: Backend) -> None:
    """And nowhere else, in calls of which some queries see a NaN and others do not."""
    choose = random.Random("not finite")
    cases = 30 * case_factor()
    for number in range(cases):
        queries = choose.randint(2, 16)
        kind = choose.choice(["contiguous", "ring", "paged"])
        call = some_call(choose, kind, 1, queries, number)
        spoil(choose, call, queries + 3)
        with np.errstate(invalid="ignore"):  # the judge subtracts infinities
            call.check(backend, f"{kind} case {number}: {queries} queries, {call.cache_seqlens}")
    backend.count(cases)


def test_extreme_scores(backend: Backend) -> None:
    """All very large, all very small, all equal, one that outweighs the rest, one sign only."""
    for dtype in (BF16, FP16):
        for factor in (1e4, -1e4, 1e-6, 0.0):
            q = torch.ones(1, 2, 4, 64, dtype=dtype)
            k = torch.full((1, 300, 2, 64), factor).to(dtype)
            k[:, 5::7] *= 0.875
            v = normal(1, 300, 2, 64, dtype=dtype, key=factor)
            CacheCall(q, k, v, scale=0.125).check(backend, f"{dtype} scores near {factor}")
    backend.count(8)


def test_rows_far_apart(backend: Backend) -> None:
    """Strides beyond 2^31 elements."""
    far = 2**31 + 8
    memory = sparse(3 * far, BF16)
    call = small_call(queries=3)
    k = memory.as_strided((2, 128, 1, 64), (far, 192, 64, 1), 0).copy_(call.k_cache)
    v = memory.as_strided((2, 128, 1, 64), (far, 192, 64, 1), 64).copy_(call.v_cache)
    q = memory.as_strided((2, 3, 2, 64), (far, 192, 64, 1), 10**6).copy_(call.q)
    call.but(q=q, k_cache=k, v_cache=v).check(backend, "far rows")
    slots = memory.as_strided((1, 3, 1, 64), (0, far // 2 * 2, 0, 1), 2 * 10**6)
    slots.copy_(call.k_cache[:1, :3])
    one = small_call(batch=1).but(k_cache=slots, v_cache=slots, cache_seqlens=None)
    one.check(backend, "far slots")
    backend.count(2)


@pytest.mark.sanitized
def test_every_schedule_gives_the_same(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    choose = random.Random("schedules")
    for number in range(12):
        call = random_call(choose, choose.choice(KINDS), ("schedule", number))
        call = call.but(k=None, v=None)  # an append would come before the next run
        results = []
        for schedule in SCHEDULES:
            with emulator.schedule(schedule, seed=number):
                results.append(call.run(emulated))
        for result in results[1:]:
            assert_bitwise_equal(result.out, results[0].out, f"call {number}")
            assert_bitwise_equal(result.lse, results[0].lse, f"lse of call {number}")
    emulated.count(12 * len(SCHEDULES))


def test_launches_do_not_depend_on_lengths(emulated: Backend) -> None:
    """What a captured step replays; one launch where no length can need a second split."""
    emulator = Emulator(emulator_library())
    for slots, kernels in ((256, 1), (1024, 2)):
        found = set()
        for length in (0, 1, 256, 257, 1024):
            call = small_call(batch=1, slots=slots)
            emulator.clear_launches()
            call.but(cache_seqlens=torch.tensor([length], dtype=INT32)).run(emulated)
            found.add(tuple(emulator.launches()))
        assert len(found) == 1
        assert len(found.pop()) == kernels


@pytest.mark.parametrize(
    ("workspace", "message"),
    [
        (None, "workspace: expected 1056 or more elements of float32, got None"),
        (torch.empty(1055), r"workspace: expected 1056 or more elements, got \(1055,\)"),
        (torch.empty(3000).half(), "workspace: expected dtype float32, got float16"),
        (torch.empty(3001)[1:], "workspace: expected data aligned to 16 bytes"),
    ],
)
def test_the_workspace_is_checked(
    workspace: torch.Tensor | None, message: str, emulated: Backend
) -> None:
    call = small_call(queries=1, slots=1024)
    out = poisoned(*call.q.shape, dtype=BF16)
    with pytest.raises(ValueError, match=message):
        front_door.load_emulated().flash_attn_with_kvcache(
            *(call.q, call.k_cache, call.v_cache, None, None, call.cache_seqlens, None, None),
            *(None, 0.125, -1, 0, None, 0, False, workspace, out, None),
        )
    assert out.isnan().all()


def test_the_workspace_lies_apart(emulated: Backend) -> None:
    call = small_call(queries=1, slots=1024)
    memory = torch.empty(2000)
    out = memory.view(BF16)[:256].view(call.q.shape)
    with pytest.raises(ValueError, match="workspace: expected memory apart from out"):
        front_door.load_emulated().flash_attn_with_kvcache(
            *(call.q, call.k_cache, call.v_cache, None, None, call.cache_seqlens, None, None),
            *(None, 0.125, -1, 0, None, 0, False, memory, out, None),
        )
