"""Calls of flash_attn_with_kvcache on the extension itself: what they are made of, run with
guarded outputs and a workspace of exactly the bytes it asks for, and what they must return."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import attention_caches
import attention_oracle
import torch
from attention_sequences import BF16, FP16, WINDOWS, any_length, normal, offsets
from exafuse.ops import front_door
from kernel_backends import Backend
from poison import Guarded, layouts

HEAD_DIMS = [8, 16, 24, 32, 40, 64, 64, 64, 72, 80, 96, 104, 128, 128]
HEADS = [(1, 1), (1, 1), (2, 1), (3, 3), (4, 2), (5, 1), (6, 2), (7, 1), (8, 2), (12, 1)]
SPECIAL = [float("nan"), float("inf"), -float("inf")]
LENGTHS_Q = [1, 1, 1, 1, 2, 3, 4, 5, 8, 15, 16]


@dataclass(frozen=True)
class Result:
    """On the CPU; the caches as the call left them."""

    out: torch.Tensor
    lse: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor


@dataclass(frozen=True)
class CacheCall:
    """The arguments of one call, on the CPU, in whatever layout."""

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    cache_seqlens: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None
    cache_batch_idx: torch.Tensor | None = None
    cache_leftpad: torch.Tensor | None = None
    block_table: torch.Tensor | None = None
    window: tuple[int, int] = (-1, 0)
    cu_seqlens_q: torch.Tensor | None = None
    max_seqlen_q: int = 0
    ring: bool = False
    scale: float | None = None

    def but(self, **changes: Any) -> CacheCall:
        return dataclasses.replace(self, **changes)

    @property
    def softmax_scale(self) -> float:
        return self.q.shape[-1] ** -0.5 if self.scale is None else self.scale

    def workspace_bytes(self, kernels: Any) -> int:
        packed = self.cu_seqlens_q is not None
        total_q = self.q.shape[0] if packed else self.q.shape[0] * self.q.shape[1]
        longest = self.max_seqlen_q if packed else self.q.shape[1]
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        capacity = self.k_cache.shape[1] * pages
        sizes = (total_q, longest, *self.q.shape[-2:], capacity, self.window[0])
        return int(kernels.flash_attn_with_kvcache_workspace(*sizes))

    def run(self, backend: Backend, gaps: tuple[int, int] = (0, 0), offset: int = 0) -> Result:
        """Call the kernels. `gaps` lie behind each head and each token of out, which starts
        `offset` elements into its buffer."""
        load = front_door.load_emulated if backend.name == "emulated" else front_door.load_cuda
        kernels: Any = load()
        *front, tokens, heads, dim = self.q.shape
        head = dim + gaps[0]
        token = heads * head + gaps[1]
        strides = (*(tokens * token for _ in front), token, head, 1)
        out = Guarded(tuple(self.q.shape), self.q.dtype, strides, offset)
        lse = Guarded((*front, heads, tokens), torch.float32, offset=offset)
        needed = self.workspace_bytes(kernels)
        workspace = Guarded((needed // 4,), torch.float32) if needed else None
        give = backend.give_optional
        k_cache, v_cache = backend.give(self.k_cache), backend.give(self.v_cache)
        given = backend.give(out.tensor), backend.give(lse.tensor)
        scratch = None if workspace is None else backend.give(workspace.tensor)
        kernels.flash_attn_with_kvcache(
            *(backend.give(self.q), k_cache, v_cache, give(self.k), give(self.v)),
            *(give(self.cache_seqlens), give(self.cache_batch_idx), give(self.cache_leftpad)),
            *(give(self.block_table), self.softmax_scale, *self.window),
            *(give(self.cu_seqlens_q), self.max_seqlen_q, self.ring, scratch, *given),
        )
        if workspace is not None and scratch is not None:
            backend.take_back(scratch, workspace, "workspace")
        return Result(
            backend.take_back(given[0], out, "out"),
            backend.take_back(given[1], lse, "lse"),
            k_cache.cpu(),
            v_cache.cpu(),
        )

    def expected(self) -> attention_oracle.Expected:
        return attention_oracle.flash_attn_with_kvcache(
            *(self.q, self.k_cache, self.v_cache, self.k, self.v, self.cache_seqlens),
            *(self.cache_batch_idx, self.cache_leftpad, self.block_table, self.softmax_scale),
            *(False, self.window, self.cu_seqlens_q, self.max_seqlen_q or None, self.ring),
        )

    def check(self, backend: Backend, label: str, peer: bool = True, **layout: Any) -> Result:
        """Run, and hold everything against the oracle."""
        expected = self.expected()  # before the caches change
        result = self.run(backend, **layout)
        expected.check(result.out, result.lse, label, peer)
        if self.k is not None:
            expected.check_caches(result.k_cache, result.v_cache, f"cache of {label}")
        return result


def random_call(choose: random.Random, kind: str, key: object) -> CacheCall:
    """Any heads, head dimension, dtype, lengths, window, padding, new tokens, packed or not."""
    dtype = choose.choice([BF16, FP16])
    heads, kv_heads = choose.choice(HEADS)
    dim = choose.choice(HEAD_DIMS)
    batch = choose.choice([1, 1, 2, 3])
    lengths_q = [choose.choice(LENGTHS_Q)] * batch
    packed = choose.random() < 0.25
    if packed:
        lengths_q = [choose.choice([0, *LENGTHS_Q]) for _ in range(batch)]
    longest = max(lengths_q)
    slots = choose.choice([128, 128, 256, 384, 640])
    left = choose.choice([-1, -1, choose.choice(WINDOWS), choose.choice(WINDOWS), 5000])
    new = choose.choice([0, 0, longest, 1, 7])
    if kind == "ring":
        slots = choose.choice([128, 256])
        left = choose.choice([w for w in WINDOWS if w + max(longest, new) <= slots])
    most = 3 * slots if kind == "ring" else slots
    lengths = [any_length(choose, most) for _ in range(batch)]
    if choose.random() < 0.1:
        lengths[-1] = most
    keys, values = (
        [normal(n, kv_heads, dim, dtype=dtype, key=(key, name, b)) for b, n in enumerate(lengths)]
        for name in "kv"
    )
    cache = attention_caches.store(kind, keys, values, slots, key)
    seen = list(lengths)
    if choose.random() < 0.05:
        seen[0] = -3
    elif lengths[0] == slots and kind != "ring" and not new:
        seen[0] = 10**6
    table = torch.int32
    leftpad = None
    if choose.random() < 0.2:
        leftpad = torch.tensor([choose.randint(0, n) for n in lengths], dtype=table)
    shape = (sum(lengths_q),) if packed else (batch, longest)
    q = normal(*shape, heads, dim, dtype=dtype, key=(key, "q"))
    fresh: list[torch.Tensor | None] = [None, None]
    if new:
        tokens = (batch, new, kv_heads, dim)
        fresh = [normal(*tokens, dtype=dtype, key=(key, "new", name)) for name in "kv"]
    if choose.random() < 0.3:
        q = choose.choice(list(layouts(q)))[1]
        fresh = [x if x is None else choose.choice(list(layouts(x)))[1] for x in fresh]
    v_cache = cache.v
    if choose.random() < 0.2:  # apart from the keys in its strides
        v_cache = choose.choice(list(layouts(v_cache)))[1]
    return CacheCall(
        *(q, cache.k, v_cache, torch.tensor(seen, dtype=table), fresh[0], fresh[1]),
        cache_leftpad=leftpad,
        window=(left, choose.choice([0, 0, 0, -1, choose.choice(WINDOWS)])),
        cu_seqlens_q=offsets(lengths_q) if packed else None,
        max_seqlen_q=longest if packed else 0,
        scale=choose.choice([None, None, 0.05, 0.3]),
        **cache.arguments,
    )


def some_call(choose: random.Random, kind: str, batch: int, queries: int, key: object) -> CacheCall:
    """Several splits, a window or none, tokens anywhere."""
    dtype = choose.choice([BF16, FP16])
    slots, dim = choose.choice([256, 640]), choose.choice([64, 64, 80, 128])
    left = choose.choice([0, 17, 100, 256 - queries, 600])
    if kind == "ring":
        left, slots = min(left, 256 - queries), 256
    elif choose.random() < 0.4:
        left = -1
    most = 640 if kind == "ring" else slots
    lengths = [max(queries, any_length(choose, most)) for _ in range(batch)]
    keys, values = (
        [normal(n, 2, dim, dtype=dtype, key=(key, name, b)) for b, n in enumerate(lengths)]
        for name in "kv"
    )
    cache = attention_caches.store(kind, keys, values, slots, key)
    return CacheCall(
        normal(batch, queries, 2 * choose.choice([1, 3, 5]), dim, dtype=dtype, key=(key, "q")),
        *(cache.k, cache.v, torch.tensor(lengths, dtype=torch.int32)),
        window=(left, 0),
        **cache.arguments,
    )


def spoil(choose: random.Random, call: CacheCall, reach: int) -> None:
    """Puts NaN and infinities into some of the newest `reach` keys and values of a sequence."""
    assert call.cache_seqlens is not None
    length = int(call.cache_seqlens[0])
    table = {} if call.block_table is None else {"block_table": call.block_table}
    cache = attention_caches.Cache(call.k_cache, call.v_cache, table)
    for _ in range(3):
        row, slot = cache.place(0, max(0, length - choose.randint(1, reach)))
        if choose.random() < 0.7:
            cache.v[row, slot, 0, choose.randrange(8)] = choose.choice(SPECIAL)
        else:
            cache.k[row, slot, 0, choose.randrange(8)] = SPECIAL[0]
