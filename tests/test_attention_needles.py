"""Needles: one key that changes beyond all bounds, at the edges of what the queries see.

A key just inside a window changes every query that sees it; one just outside changes not a bit.
"""

from __future__ import annotations

import random

import attention_caches
import numpy as np
import pytest
import torch
from attention_sequences import (
    BF16,
    FP16,
    WINDOWS,
    Sequence,
    any_window,
    normal,
    offsets,
)
from kernel_backends import Backend, backend, case_factor

__all__ = ["backend"]  # a fixture

HEAD_DIM = 64
SLOTS = 256

Tensors = list[torch.Tensor]


def attend(
    backend: Backend,
    kind: str,
    q: torch.Tensor,
    keys: Tensors,
    values: Tensors,
    window: tuple[int, int],
) -> torch.Tensor:
    """`q [batch, seqlen_q, num_heads, HEAD_DIM]` over the keys of each sequence, packed or in a
    cache; the result on the CPU."""
    lengths = [k.shape[0] for k in keys]
    batch, seqlen_q = q.shape[:2]
    if kind == "packed":
        out = backend.ops.flash_attn_varlen_func(
            backend.give(q.flatten(0, 1)),
            *(backend.give(torch.cat(x)) for x in (keys, values)),
            *(backend.give(offsets(n)) for n in ([seqlen_q] * batch, lengths)),
            *(seqlen_q, max(lengths)),
            window_size=window,
        )
        return out.cpu().unflatten(0, (batch, seqlen_q))
    cache = attention_caches.store(kind, keys, values, SLOTS)
    table = cache.arguments.get("block_table")
    return backend.ops.flash_attn_with_kvcache(
        *map(backend.give, (q, cache.k, cache.v)),
        cache_seqlens=backend.give(torch.tensor(lengths, dtype=torch.int32)),
        block_table=backend.give_optional(table),
        window_size=window,
        ring=kind == "ring",
    ).cpu()


def changed_rows(before: torch.Tensor, after: torch.Tensor) -> np.ndarray:
    """`[rows]`, whether every head of a row `[rows, heads, head_dim]` differs in some bit; a row
    of which only some heads differ is an error."""
    heads = (before.view(torch.int16) != after.view(torch.int16)).any(2)
    assert torch.equal(heads.any(1), heads.all(1)), "a key changed some heads and not others"
    return heads.any(1).numpy()


def edge(choose: random.Random, sequence: Sequence, window: tuple[int, int]) -> int:
    """A position one inside or one outside what some query sees."""
    at = sequence.seqlen_k - sequence.seqlen_q + choose.randrange(sequence.seqlen_q)
    candidates = [at, at + 1]
    for side, sign in zip(window, (-1, 1), strict=True):
        if side >= 0:
            candidates += [at + sign * side, at + sign * (side + 1)]
    return min(max(choose.choice(candidates), 0), sequence.seqlen_k - 1)


@pytest.mark.parametrize(
    "kind",
    ["ring", *(pytest.param(k, marks=pytest.mark.slow) for k in ("packed", "contiguous", "paged"))],
)
@pytest.mark.parametrize("few", [True, False], ids=["decode", "prefill"])
def test_needles_at_the_edges_of_windows(few: bool, kind: str, backend: Backend) -> None:
    choose = random.Random(f"needles {kind} {few}")
    batch, calls = 20, 6 * case_factor()
    for number in range(calls):
        dtype = choose.choice([BF16, FP16])
        longest = choose.choice([1, 4, 16]) if few else choose.choice([17, 40, 65])
        window = any_window(choose)
        if kind == "ring":
            window = choose.choice([w for w in WINDOWS if w + longest <= SLOTS]), 0
        most = 3 * SLOTS if kind == "ring" else SLOTS
        sequences = [Sequence(longest, choose.randint(longest, most)) for _ in range(batch)]
        lengths = [s.seqlen_k for s in sequences]
        keys = [normal(n, 1, HEAD_DIM, dtype=dtype, key=(number, n, "k")) for n in lengths]
        values = [normal(n, 1, HEAD_DIM, dtype=dtype, key=(number, n, "v")) for n in lengths]
        q = normal(batch, longest, 2, HEAD_DIM, dtype=dtype, key=number)

        before = attend(backend, kind, q, keys, values, window)
        needles = [edge(choose, sequence, window) for sequence in sequences]
        for b, position in enumerate(needles):
            keys[b][position], values[b][position] = 0, 1000
        after = attend(backend, kind, q, keys, values, window)
        for b, (sequence, position) in enumerate(zip(sequences, needles, strict=True)):
            expected = sequence.visible(window)[:, position]
            wrong = changed_rows(before[b], after[b]) != expected
            assert not wrong.any(), (
                f"{kind}: {sequence}, window {window}, key {position} changed: query "
                f"{int(np.flatnonzero(wrong)[0])} must {'' if expected[wrong][0] else 'not '}change"
            )
    backend.count(calls * batch)
