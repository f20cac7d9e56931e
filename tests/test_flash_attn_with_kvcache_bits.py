"""flash_attn_with_kvcache by the decode kernel: what must be the same bits.

A row is the same in any batch, a query alone and among others, a token in any kind of cache.
"""

from __future__ import annotations

import random

import attention_caches
import numpy as np
import pytest
import torch
from attention_sequences import BF16, normal
from cache_calls import CacheCall, some_call, spoil
from kernel_backends import Backend, backend, case_factor
from numeric import assert_bitwise_equal

__all__ = ["backend"]  # a fixture

KINDS = attention_caches.KINDS
INT32 = torch.int32


def assert_same(backend: Backend, one: CacheCall, rows: tuple[slice, slice], many: object) -> None:
    """`one` by itself gives the rows (batch, query) of the results `many` = (out, lse)."""
    alone = one.run(backend)
    out, lse = many  # type: ignore[misc]
    assert_bitwise_equal(alone.out, out[rows], f"out of {rows}")
    assert_bitwise_equal(alone.lse, lse[rows[0], :, rows[1]], f"lse of {rows}")


@pytest.mark.parametrize("kind", ["contiguous", "ring", "paged"])
def test_a_row_of_a_batch_is_the_row_alone(kind: str, backend: Backend) -> None:
    choose = random.Random(f"batch {kind}")
    cases = 30 * case_factor()
    for number in range(cases):
        call = some_call(choose, kind, 5, choose.choice([1, 1, 3]), number)
        result = call.run(backend)
        for b in range(5):
            row = slice(b, b + 1)
            one = call.but(q=call.q[row], cache_seqlens=call.cache_seqlens[row])  # type: ignore[index]
            if call.block_table is not None:
                one = one.but(block_table=call.block_table[row])
            else:
                one = one.but(k_cache=call.k_cache[row], v_cache=call.v_cache[row])
            assert_same(backend, one, (row, slice(None)), (result.out, result.lse))
    backend.count(5 * cases)


@pytest.mark.parametrize("kind", ["contiguous", "ring", "paged"])
def test_queries_together_are_each_alone(kind: str, backend: Backend) -> None:
    """Also where some of them see NaN and infinities and others do not."""
    choose = random.Random(f"queries {kind}")
    cases = 24 * case_factor()
    for number in range(cases):
        queries = choose.randint(2, 16)
        call = some_call(choose, kind, 1, queries, number)
        length = int(call.cache_seqlens[0])  # type: ignore[index]
        if number % 2:
            spoil(choose, call, queries + 3)
            with np.errstate(invalid="ignore"):  # the judge subtracts infinities
                call.check(backend, f"{kind} case {number} with NaN")
        result = call.run(backend)
        for i in range(queries):
            seen = torch.tensor([length - queries + 1 + i], dtype=INT32)
            one = call.but(q=call.q[:, i : i + 1], cache_seqlens=seen)
            assert_same(backend, one, (slice(None), slice(i, i + 1)), (result.out, result.lse))
    backend.count(cases)


def test_all_kinds_of_caches_give_the_same(backend: Backend) -> None:
    """With more slots than needed, too, which changes the launch."""
    choose = random.Random("kinds")
    cases = 40 * case_factor()
    for number in range(cases):
        queries, dim = choose.choice([1, 2, 7]), choose.choice([64, 96])
        lengths = [choose.randint(queries, 640) for _ in range(2)]
        window = (choose.choice([0, 63, 64, 100, 249]), 0)
        q = normal(2, queries, 4, dim, dtype=BF16, key=number)
        keys, values = (
            [normal(n, 1, dim, dtype=BF16, key=(number, name, n)) for n in lengths] for name in "kv"
        )
        seen = torch.tensor(lengths, dtype=INT32)
        results = []
        for kind in KINDS:
            slots = 256 if kind == "ring" else choose.choice([640, 768, 1408])
            cache = attention_caches.store(kind, keys, values, slots, number)
            call = CacheCall(q, cache.k, cache.v, seen, window=window, **cache.arguments)
            results.append(call.run(backend))
        for kind, result in zip(KINDS[1:], results[1:], strict=True):
            assert_bitwise_equal(result.out, results[0].out, kind)
            assert_bitwise_equal(result.lse, results[0].lse, f"lse of {kind}")
    backend.count(len(KINDS) * cases)


@pytest.mark.parametrize("left", [0, 39, 100])
def test_a_ring_across_its_window_and_after_rollbacks(left: int, backend: Backend) -> None:
    """Drafts of up to 4 tokens are appended to a ring, some taken back; at every step the result is
    that of a full cache computed anew."""
    choose = random.Random(f"rollback {left}")
    dim, high = 64, 0
    ring = attention_caches.empty("ring", 1, 128, 1, dim, BF16)
    k_cache, v_cache = ring.k, ring.v
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    marks = {n + d for n in (left + 1, 2 * left + 2, 3 * left + 10) for d in (-1, 0, 1)}
    steps = 0
    while len(keys) < 3 * left + 12:
        before = len(keys)
        ahead = [n - before for n in marks if 0 < n - before <= 5]
        count = min(ahead, default=choose.randint(1, 5))
        new = [normal(1, count, 1, dim, dtype=BF16, key=(left, steps, name)) for name in "kv"]
        keys += list(new[0][0])
        values += list(new[1][0])
        high = max(high, len(keys))
        q = normal(1, count, 3, dim, dtype=BF16, key=(left, steps))
        seen = torch.tensor([before], dtype=INT32)
        call = CacheCall(q, k_cache, v_cache, seen, *new, window=(left, 0), ring=True)
        result = call.run(backend)
        k_cache, v_cache = result.k_cache, result.v_cache
        full = [torch.stack(x)[None] for x in (keys, values)]
        anew = CacheCall(q, *full, torch.tensor([len(keys)], dtype=INT32), window=(left, 0))
        wanted = anew.check(backend, f"{before} + {count} tokens")
        assert_bitwise_equal(result.out, wanted.out, f"ring at {before} + {count} tokens")
        assert_bitwise_equal(result.lse, wanted.lse, f"lse of the ring at {before} + {count}")
        back = choose.choice([0, 0, 1, 3])
        if len(keys) not in marks and len(keys) - back >= max(high - 128 + left, before):
            del keys[len(keys) - back :], values[len(values) - back :]
        steps += 1
    backend.count(steps)
