"""The prefill kernel, through flash_attn_func, flash_attn_varlen_func and caches: random calls
against the definition, and what is known to go wrong."""

from __future__ import annotations

import random

import attention_caches
import pytest
import torch
from attention_oracle import visible
from attention_sequences import BF16, FP16, normal, offsets
from emulator.control import SCHEDULES, Emulator
from kernel_backends import Backend, backend, case_factor, emulated, emulator_library
from numeric import assert_bitwise_equal
from poison import before_guard_page, poisoned, sparse
from prefill_calls import (
    PrefillCall,
    extension,
    random_cache_call,
    random_call,
    random_packed_call,
)

__all__ = ["backend", "emulated"]  # fixtures

INT32 = torch.int32
NAN, INF = float("nan"), float("inf")


# --- random calls -------------------------------------------------------------------------------


def run_random(backend: Backend, key: object, cases: int, packed: bool) -> None:
    choose = random.Random(f"prefill {key}")
    for number in range(cases):
        make = random_packed_call if packed else random_call
        call = make(choose, (key, number))
        label = (
            f"case {key}/{number}: q {tuple(call.q.shape)}, k {tuple(call.k.shape)}, window "
            f"{call.window}, offsets {call.cu_seqlens_q}, {call.cu_seqlens_k}"
        )
        call.check(
            backend,
            label,
            number % 6 == 0,
            gaps=(choose.choice([0, 0, 1, 8]), choose.choice([0, 0, 1, 8])),
            offset=choose.choice([0, 0, 0, 1]),
            lse=choose.random() < 0.8,
        )
    backend.count(cases)


def run_random_caches(backend: Backend, kind: str, key: object, cases: int) -> None:
    choose = random.Random(f"prefill {kind} {key}")
    for number in range(cases):
        call = random_cache_call(choose, kind, (key, number))
        label = f"{kind} {key}/{number}: q {tuple(call.q.shape)}, lengths {call.cache_seqlens}"
        call.check(backend, f"{label}, window {call.window}", number % 6 == 0)
    backend.count(cases)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(8))
def test_random_calls(share: int, backend: Backend) -> None:
    run_random(backend, share, 440 * case_factor(), packed=False)


@pytest.mark.slow
@pytest.mark.parametrize("share", range(4))
def test_random_packed_calls(share: int, backend: Backend) -> None:
    run_random(backend, ("packed", share), 260 * case_factor(), packed=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", attention_caches.KINDS)
def test_random_calls_with_a_history(kind: str, backend: Backend) -> None:
    run_random_caches(backend, kind, "history", 80 * case_factor())


@pytest.mark.sanitized
def test_random_calls_for_sanitizers(backend: Backend) -> None:
    run_random(backend, "sanitized", 130, packed=False)
    run_random(backend, "sanitized, packed", 60, packed=True)
    for kind in attention_caches.KINDS:
        run_random_caches(backend, kind, "sanitized", 4)


# --- NaN and infinity ---------------------------------------------------------------------------


def small_call(
    queries: int, keys: int, dim: int = 64, dtype: torch.dtype = BF16, offset: int = 0
) -> PrefillCall:
    """Causal, one head; `offset` elements short of alignment."""
    q, k, v = (
        normal(n * dim + offset, dtype=dtype, key=(name, n, dim))[offset:].view(1, n, 1, dim)
        for name, n in zip("qkv", (queries, keys, keys), strict=True)
    )
    return PrefillCall(q, k, v, (-1, 0))


def seen(call: PrefillCall) -> torch.Tensor:
    """`[queries, keys]`: who sees whom."""
    queries, keys = call.q.shape[1], call.k.shape[1]
    return torch.from_numpy(visible(queries, 0, keys, 0, keys, call.window))


@pytest.mark.sanitized
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
def test_what_is_not_finite_stays_with_the_rows_that_see_it(
    dtype: torch.dtype, backend: Backend
) -> None:
    """Rows that do not see the key keep their bits; the others get NaN and infinities exactly."""
    choose = random.Random(f"not finite {dtype}")
    cases = 90 * case_factor()
    for number in range(cases):
        queries, keys = choose.choice([(33, 70), (20, 20), (40, 130), (5, 200), (70, 64), (1, 1)])
        window = choose.choice([(-1, 0), (-1, 0), (5, 0), (31, 0), (64, 3), (0, 0), (-1, -1)])
        dim = choose.choice([64, 80, 96, 128, 128])
        call = small_call(queries, keys, dim, dtype, choose.choice([0, 0, 1]))
        call = call.but(window=window)
        finite, _ = call.run(backend)
        k, v = call.k.clone(), call.v.clone()
        touched = set()
        for _ in range(choose.choice([1, 1, 2, 8])):
            where = v if choose.random() < 0.8 else k
            key = choose.randrange(keys)
            where[0, key, 0, choose.randrange(dim)] = choose.choice([NAN, NAN, INF, -INF])
            touched.add(key)
        dirty = call.but(k=k, v=v)
        label = f"case {number}: {queries} x {keys} of {dim}, window {window}, keys {touched}"
        out, _ = dirty.check(backend, label)
        clean = ~seen(dirty)[:, sorted(touched)].any(1)
        assert_bitwise_equal(out[0, clean], finite[0, clean], label)
    backend.count(2 * cases)


def test_all_that_no_query_sees_may_be_anything(backend: Backend) -> None:
    for window in ((3, 0), (-1, 0), (0, 2)):
        call = small_call(40, 300).but(window=window)
        unseen = ~seen(call).any(0)
        k, v = call.k.clone(), call.v.clone()
        k[:, unseen], v[:, unseen] = NAN, INF
        out, _ = call.but(k=k, v=v).check(backend, f"window {window}")
        assert_bitwise_equal(out, call.run(backend)[0], f"window {window}")
    backend.count(6)


def test_scores_that_are_not_finite(backend: Backend) -> None:
    """One score of +inf, all of -inf, a query of NaN: as the definition has it."""
    for dtype in (BF16, FP16):
        call = small_call(20, 90, dtype=dtype)
        q, k = call.q.clone(), call.k.clone()
        q[0, :, 0, 3] = 1.0
        k[0, 40, 0, 3] = INF
        call.but(q=q, k=k).check(backend, "one score of infinity")
        k[..., 3] = -INF
        call.but(q=q, k=k).check(backend, "all scores of minus infinity")
        q[0, 5] = NAN
        call.but(q=q).check(backend, "a query of NaN")
    backend.count(6)


def test_extreme_scores(backend: Backend) -> None:
    """All very large, all very small, all equal, one that outweighs the rest, one sign only."""
    for dtype in (BF16, FP16):
        for factor in (1e4, -1e4, 1e-6, 0.0):
            q = torch.ones(1, 40, 2, 64, dtype=dtype)
            k = torch.full((1, 150, 1, 64), factor).to(dtype)
            k[:, 5::7] *= 0.875
            v = normal(1, 150, 1, 64, dtype=dtype, key=factor)
            for window in ((-1, -1), (30, 0)):
                call = PrefillCall(q, k, v, window, scale=0.125)
                call.check(backend, f"{dtype} scores near {factor}")
    backend.count(16)


# --- corners ------------------------------------------------------------------------------------


@pytest.mark.sanitized
def test_offsets_out_of_range_stay_inside(backend: Backend) -> None:
    """Whatever cu_seqlens holds: clamped to the tensors, an end before its start is its start."""
    q = normal(40, 2, 64, dtype=BF16, key="q")
    k, v = (normal(90, 1, 64, dtype=BF16, key=name) for name in "kv")
    low, high = -(2**31), 2**31 - 1
    tables = [
        ([0, 20, 40], [0, 45, 90]),
        ([low, 20, high], [low, 45, high]),
        ([-5, 10, 1000], [80, 20, 95]),
        ([3, 3, 39], [high, low, high]),
        ([high, high, high], [0, 10, 20]),
    ]
    for queries, keys in tables:
        for longest in (0, 7, 20, 40, 5000):
            call = PrefillCall(
                *(q, k, v, (-1, 0), None),
                *(torch.tensor(x, dtype=INT32) for x in (queries, keys)),
                longest,
            )
            call.check(backend, f"offsets {queries}, {keys}, at most {longest}")
    # Rows of two sequences at once are nobody's in particular, but nothing else is written.
    tangled = torch.tensor([0, 30, 10, 40], dtype=INT32)
    PrefillCall(q, k, v, (-1, 0), None, tangled, tangled, 40).run(backend)
    backend.count(26)


def test_nothing_to_see(backend: Backend) -> None:
    for batch, queries, keys in ((0, 3, 3), (2, 0, 3), (2, 3, 0), (1, 130, 0), (0, 0, 0)):
        shape = [(batch, queries, 4, 64), (batch, keys, 2, 64), (batch, keys, 2, 64)]
        q, k, v = (normal(*s, dtype=FP16, key=name) for name, s in zip("qkv", shape, strict=True))
        PrefillCall(q, k, v).check(backend, f"{batch} x {queries} x {keys}")
    # More queries than keys: the first ones stand before every key.
    call = small_call(70, 3)
    out, lse = call.check(backend, "70 queries, 3 keys")
    assert lse is not None
    assert lse[0, 0, :67].isneginf().all()
    assert not out[0, :67].any()
    backend.count(6)


def test_rows_far_apart(backend: Backend) -> None:
    """Strides beyond 2^31 elements, of tokens, heads and sequences."""
    far = 2**31 + 8
    memory = sparse(3 * far, BF16)
    q, k, v = (normal(2, n, 2, 64, dtype=BF16, key=n) for n in (20, 30, 31))
    v = v[:, :30]
    for name, strides in (
        ("sequences", (far, 384, 64, 1)),
        ("heads", (64, 384, far, 1)),
    ):
        views = [memory.as_strided(x.shape, strides, 128 * i) for i, x in enumerate((q, k, v))]
        for view, x in zip(views, (q, k, v), strict=True):
            view.copy_(x)
        PrefillCall(*views, (-1, 0)).check(backend, f"{name} far apart")
    short = [x[:1, :2, :1] for x in (q, k, v)]
    views = [memory.as_strided(x.shape, (64, far, 64, 1), 64 * i) for i, x in enumerate(short)]
    for view, x in zip(views, short, strict=True):
        view.copy_(x)
    PrefillCall(*views, (-1, 0)).check(backend, "tokens far apart")
    backend.count(3)


def test_writes_far_apart(emulated: Backend) -> None:
    far = 2**31 + 8
    q = normal(2, 3, 2, 64, dtype=BF16, key="far")
    out = sparse(2 * far, BF16).as_strided(q.shape, (far, 128, 64, 1))
    lse = sparse(2 * far, torch.float32).as_strided((2, 2, 3), (3, far, 1))
    extension(emulated).flash_attn_func(q, q, q, 0.125, -1, 0, out, lse)
    call = PrefillCall(q, q, q, (-1, 0))
    call.expected().check(out.clone(), lse.clone())
    emulated.count(1)


@pytest.mark.parametrize("dim", [8, 64, 80, 128])
def test_reads_no_byte_past_the_end(dim: int, emulated: Backend) -> None:
    for queries, keys in ((1, 1), (33, 65), (20, 127)):
        call = small_call(queries, keys, dim, FP16)
        q, k, v = (before_guard_page(tuple(x.shape), FP16) for x in (call.q, call.k, call.v))
        for end, x in zip((q, k, v), (call.q, call.k, call.v), strict=True):
            end.copy_(x)
        out = before_guard_page(tuple(q.shape), FP16)
        lse = before_guard_page((1, 1, queries), torch.float32)
        extension(emulated).flash_attn_func(q, k, v, dim**-0.5, -1, 0, out, lse)
        call.expected().check(out, lse, f"{queries} x {keys}")
    emulated.count(3)


def test_more_blocks_than_a_short_grid_has(backend: Backend) -> None:
    """66,000 sequences, all but a few of them empty."""
    lengths = [0] * 66000
    for number in (0, 32768, 65535, 65999):
        lengths[number] = 3
    q, k, v = (normal(12, 1, 64, dtype=BF16, key=name) for name in "qkv")
    results = []
    for table in (offsets(lengths), offsets([3, 3, 3, 3])):
        results.append(PrefillCall(q, k, v, (-1, 0), None, table, table, 3).run(backend))
    for among_many, alone in zip(*results, strict=True):
        assert_bitwise_equal(among_many, alone)
    backend.count(1)


def test_launches_do_not_depend_on_lengths(emulated: Backend) -> None:
    """What a captured step replays: one kernel, a block for each head, sequence and 128 queries."""
    emulator = Emulator(emulator_library())
    q, k, v = (normal(200, 3, 64, dtype=BF16, key=name) for name in "qkv")
    for starts in ([0, 200, 200], [0, 1, 1], [0, 100, 200]):
        table = torch.tensor(starts, dtype=INT32)
        emulator.clear_launches()
        PrefillCall(q, k, v, (-1, 0), None, table, table, 200).run(emulated)
        (launch,) = emulator.launches()
        assert "prefill_sm80_kernel" in launch.kernel
        assert launch.grid == (2 * 3 * 2, 1, 1)
        assert launch.block == (128, 1, 1)


@pytest.mark.sanitized
def test_every_schedule_gives_the_same(emulated: Backend) -> None:
    emulator = Emulator(emulator_library())
    choose = random.Random("schedules")
    calls = [random_call(choose, ("schedule", number)) for number in range(10)]
    dirty = small_call(70, 130, 96)
    dirty.v[0, 100, 0, 5:9] = INF
    calls.append(dirty)
    for number, call in enumerate(calls):
        results = []
        for schedule in SCHEDULES:
            with emulator.schedule(schedule, seed=number):
                results.append(call.run(emulated))
        for out, lse in results[1:]:
            assert_bitwise_equal(out, results[0][0], f"call {number}")
            assert_bitwise_equal(lse, results[0][1], f"lse of call {number}")
    emulated.count(len(calls) * len(SCHEDULES))


def test_outputs_may_not_be_inputs(emulated: Backend) -> None:
    q = normal(1, 20, 1, 64, dtype=BF16, key="q")
    with pytest.raises(ValueError, match="out: expected memory apart from q, got an overlap"):
        extension(emulated).flash_attn_func(q, q.clone(), q.clone(), 0.125, -1, 0, q, None)
    out = poisoned(*q.shape, dtype=BF16)
    lse = out.view(torch.float32).flatten()[:20].view(1, 1, 20)
    with pytest.raises(ValueError, match="expected memory apart from"):
        extension(emulated).flash_attn_func(q, q, q, 0.125, -1, 0, out, lse)
