"""Which keys each query sees, exactly: the outputs themselves tell.

Over seqlen_q, seqlen_k, windows from 0 to beyond the sequence, residues of every tile, and packed,
contiguous, ring and paged keys; keys that no query sees are NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import attention_caches
import attention_codes
import numpy as np
import pytest
import torch
from attention_sequences import (
    BF16,
    FP16,
    WINDOWS,
    Sequence,
    any_length,
    any_window,
    normal,
    offsets,
)
from kernel_backends import Backend, backend, case_factor
from poison import poisoned

__all__ = ["backend"]  # a fixture

HEAD_DIMS = [64, 64, 64, 96, 128]

Combinations = set[tuple[Any, ...]]


def key_values(
    sequence: Sequence, window: tuple[int, int], period: int, head_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[seqlen_k, 1, head_dim]`: zeros and codes, NaN for a key that nobody sees."""
    codes = torch.arange(sequence.seqlen_k) % period
    values = attention_codes.values(codes, head_dim, dtype)
    unseen = torch.from_numpy(~sequence.visible(window).any(0)).nonzero()[:, 0]
    keys = torch.zeros_like(values)
    return keys.index_fill(0, unseen, torch.nan), values.index_fill(0, unseen, torch.nan)


def check(
    sequence: Sequence,
    window: tuple[int, int],
    period: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    what: str,
) -> None:
    """`out [seqlen_q, num_heads, head_dim]`, `lse [num_heads, seqlen_q]`."""
    expected = np.zeros((sequence.seqlen_q, period), dtype=bool)
    row, position = np.nonzero(sequence.visible(window))
    expected[row, position % period] = True
    for head in range(out.shape[1]):
        label = f"{what}, {sequence}, window {window}, head {head}"
        try:
            seen = attention_codes.seen(out[:, head], lse[head], period)
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from error
        wrong = seen != expected
        if wrong.any():
            row, code = (int(i[0]) for i in np.nonzero(wrong))
            raise AssertionError(
                f"{label}: query {row} must {'' if expected[row, code] else 'not '}see key "
                f"{code} (modulo {period}); {int(wrong.sum())} pairs are wrong"
            )


def split_rows(total: torch.Tensor, lengths: list[int], dim: int) -> list[torch.Tensor]:
    return list(total.cpu().split(lengths, dim=dim))


def run_packed(
    backend: Backend,
    sequences: list[Sequence],
    window: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> None:
    """All sequences in one call of flash_attn_varlen_func."""
    period = attention_codes.CHUNKS[dtype] * head_dim
    pairs = [key_values(s, window, period, head_dim, dtype) for s in sequences]
    lengths = [s.seqlen_q for s in sequences]
    q = normal(sum(lengths), 1, head_dim, dtype=dtype, key=window)
    k, v = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    give = backend.give
    out, lse, _ = backend.ops.flash_attn_varlen_func(
        *(give(q), give(k), give(v), give(offsets(lengths))),
        give(offsets([s.seqlen_k for s in sequences])),
        *(max(lengths), max(s.seqlen_k for s in sequences)),
        window_size=window,
        return_attn_probs=True,
    )
    parts = zip(sequences, split_rows(out, lengths, 0), split_rows(lse, lengths, 1), strict=True)
    for sequence, rows, sums in parts:
        check(sequence, window, period, rows, sums, "packed")


def run_equal(backend: Backend, choose: random.Random) -> Combinations:
    """flash_attn_func: one sequence, two heads."""
    head_dim, dtype = choose.choice(HEAD_DIMS), choose.choice([BF16, FP16])
    window = any_window(choose)
    sequence = Sequence(choose.choice([1, 2, 7, 16, 17, 40, 70]), any_length(choose, 200))
    k, v = (x[None] for x in key_values(sequence, window, 384, head_dim, dtype))
    q = normal(1, sequence.seqlen_q, 2, head_dim, dtype=dtype, key=window)
    out, lse, _ = backend.ops.flash_attn_func(
        *map(backend.give, (q, k, v)), window_size=window, return_attn_probs=True
    )
    check(sequence, window, 384, out[0].cpu(), lse[0].cpu(), "flash_attn_func")
    return {(sequence, window)}


def run_cached(
    backend: Backend,
    kind: str,
    sequences: list[Sequence],
    window: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    slots: int,
    packed: bool,
) -> None:
    """All sequences in one call of flash_attn_with_kvcache: equally many queries, or packed."""
    period = slots if kind == "ring" else attention_codes.CHUNKS[dtype] * head_dim
    pairs = [key_values(s, window, period, head_dim, dtype) for s in sequences]
    keys, values = (list(parts) for parts in zip(*pairs, strict=True))
    cache = attention_caches.store(kind, keys, values, slots, window)
    lengths = [s.seqlen_q for s in sequences]
    shape = (sum(lengths),) if packed else (len(lengths), lengths[0])
    q = normal(*shape, 1, head_dim, dtype=dtype, key=window)
    arguments: dict[str, Any] = {
        name: backend.give(value) if isinstance(value, torch.Tensor) else value
        for name, value in cache.arguments.items()
    }
    if any(s.leftpad for s in sequences):
        leftpad = torch.tensor([s.leftpad for s in sequences], dtype=torch.int32)
        arguments["cache_leftpad"] = backend.give(leftpad)
    if packed:
        arguments["cu_seqlens_q"] = backend.give(offsets(lengths))
        arguments["max_seqlen_q"] = max(lengths)
    seen = torch.tensor([s.seqlen_k for s in sequences], dtype=torch.int32)
    out, lse = backend.ops.flash_attn_with_kvcache(
        *map(backend.give, (q, cache.k, cache.v)),
        cache_seqlens=backend.give(seen),
        window_size=window,
        return_softmax_lse=True,
        **arguments,
    )
    rows = split_rows(out, lengths, 0) if packed else list(out.cpu())
    sums = split_rows(lse, lengths, 1) if packed else list(lse.cpu())
    for sequence, part, part_sums in zip(sequences, rows, sums, strict=True):
        check(sequence, window, period, part, part_sums, kind)


def cached_call(
    backend: Backend, choose: random.Random, kind: str, few: bool, batch: int
) -> Combinations:
    """One random call on a cache of `kind`: at most 16 queries a sequence if `few`."""
    head_dim, dtype = choose.choice(HEAD_DIMS), choose.choice([BF16, FP16])
    slots = choose.choice([256, 384]) if kind in ("ring", "paged") else 300
    packed = choose.random() < 0.5
    most = 16 if few else choose.choice([17, 33, 64, 70])
    window = any_window(choose)
    if kind == "ring":
        bounded = [w for w in WINDOWS if w + most <= slots]
        window = choose.choice(bounded), choose.choice([0, 0, -1, 3])
    longest = choose.choice([1, 2, 4, 8, 16]) if few else most
    sequences = []
    for _ in range(batch):
        seqlen_k = any_length(choose, slots)
        if kind == "ring" and choose.random() < 0.7:
            seqlen_k = choose.randrange(0, 4 * slots)
        leftpad = choose.choice([0, 0, seqlen_k // 3]) if kind != "ring" else 0
        sequences.append(
            Sequence(choose.randint(0, longest) if packed else longest, seqlen_k, leftpad)
        )
    run_cached(backend, kind, sequences, window, head_dim, dtype, slots, packed)
    return {(sequence, window) for sequence in sequences}


def run_many(backend: Backend, calls: int, call: Callable[[], Combinations]) -> None:
    """Counts lengths and windows that differ from each other."""
    backend.count(len(set().union(*(call() for _ in range(calls * case_factor())))))


def slow_but(quick: str) -> list[Any]:
    """Every kind of cache, all of them slow but one."""
    return [
        pytest.param(kind, marks=[] if kind == quick else pytest.mark.slow)
        for kind in attention_caches.KINDS
    ]


@pytest.mark.parametrize(
    "share", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 5))]
)
def test_packed_sequences(share: int, backend: Backend) -> None:
    choose = random.Random(f"packed {share}")

    def call() -> Combinations:
        most = choose.choice([16, 40, 70, 130])
        sequences = [
            Sequence(choose.randint(0, most), any_length(choose, choose.choice([33, 70, 130, 260])))
            for _ in range(40)
        ]
        window, head_dim = any_window(choose), choose.choice(HEAD_DIMS)
        run_packed(backend, sequences, window, head_dim, choose.choice([BF16, FP16]))
        return {(sequence, window) for sequence in sequences}

    run_many(backend, 20, call)


@pytest.mark.slow
def test_sequences_of_equal_lengths(backend: Backend) -> None:
    choose = random.Random("equal")
    run_many(backend, 250, lambda: run_equal(backend, choose))


@pytest.mark.parametrize("kind", slow_but("ring"))
def test_few_queries_over_a_cache(kind: str, backend: Backend) -> None:
    choose = random.Random(f"few {kind}")
    run_many(backend, 28, lambda: cached_call(backend, choose, kind, True, 40))


@pytest.mark.parametrize("kind", slow_but("paged"))
def test_many_queries_over_a_cache(kind: str, backend: Backend) -> None:
    choose = random.Random(f"many {kind}")
    run_many(backend, 14, lambda: cached_call(backend, choose, kind, False, 25))


def test_the_codes_tell_what_was_seen() -> None:
    """The method itself, on a plain mean of the values of known sets of keys."""
    choose = np.random.default_rng(5)
    for dtype, chunks in attention_codes.CHUNKS.items():
        codes = chunks * 64
        values = attention_codes.values(torch.arange(codes), 64, dtype)[:, 0].double()
        wanted = choose.random((200, codes)) < choose.random((200, 1))
        wanted[0], wanted[1] = False, True
        count = wanted.sum(1)
        with np.errstate(divide="ignore"):
            lse = torch.from_numpy(np.log(count)).float()
        sums = torch.from_numpy(wanted.astype(float)) @ values
        out = (sums / torch.from_numpy(np.maximum(count, 1))[:, None]).to(dtype)
        assert (attention_codes.seen(out, lse, codes) == wanted).all()
        with pytest.raises(AssertionError):
            attention_codes.seen(out.roll(1, 0), lse, codes)
        with pytest.raises(AssertionError, match="no mean of values"):
            attention_codes.seen(poisoned(200, 64, dtype=dtype), lse, codes)
