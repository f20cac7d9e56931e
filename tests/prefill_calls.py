"""Calls of flash_attn_func and flash_attn_varlen_func on the extension itself, and of
flash_attn_with_kvcache with more queries than the decode kernel takes: what random ones are made
of, run with guarded outputs, and what they must return."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any

import attention_caches
import attention_oracle
import torch
from attention_sequences import BF16, FP16, WINDOWS, any_length, any_window, normal, offsets
from cache_calls import CacheCall
from exafuse.ops import front_door
from kernel_backends import Backend
from poison import Guarded, layouts

HEAD_DIMS = [*range(8, 136, 8), 64, 64, 64, 64, 80, 80, 96, 128, 128, 128, 128]
FEW_HEADS = [(1, 1), (1, 1), (2, 1), (2, 2), (3, 1)]
HEADS = [*FEW_HEADS, (4, 1), (5, 1), (6, 1), (7, 1), (8, 1), (4, 2), (6, 2), (3, 3)]
# Most cases keep to one warp of 32 queries and three tiles of 64 keys: the emulator is slow.
LENGTHS_Q = [0, 1, 2, 3, 5, 7, 8, 13, 15, 16, 17, 23, 29, 31, 32]
LONG_Q = [33, 40, 47, 63, 64, 65, 97, 127, 128, 129, 131]
LENGTHS_K = [0, 1, 2, 3, 7, 16, 31, 32, 33, 61, 63, 64, 65, 66, 67, 101, 127, 128, 129, 131, 150]

# (columns, queries, keys) of every tile that the kernel of sm_90 is compiled for.
TILES_SM90 = [
    (64, 128, 128),
    (64, 192, 128),
    (64, 128, 192),
    (96, 128, 128),
    (96, 128, 160),
    (128, 128, 128),
    (128, 128, 176),
]


def extension(backend: Backend) -> Any:
    return front_door.load_emulated() if backend.name == "emulated" else front_door.load_cuda()


@dataclass(frozen=True)
class PrefillCall:
    """The arguments of one call, on the CPU, in whatever layout; packed with cu_seqlens."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    window: tuple[int, int] = (-1, -1)
    scale: float | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    max_seqlen_q: int = 0

    def but(self, **changes: Any) -> PrefillCall:
        return dataclasses.replace(self, **changes)

    def run(
        self, backend: Backend, gaps: tuple[int, int] = (0, 0), offset: int = 0, lse: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Out and lse. `gaps` lie behind each head and each token of out, which starts `offset`
        elements into its buffer."""
        *front, tokens, heads, dim = self.q.shape
        head = dim + gaps[0]
        token = heads * head + gaps[1]
        strides = (*(tokens * token for _ in front), token, head, 1)
        out = Guarded(tuple(self.q.shape), self.q.dtype, strides, offset)
        sums = Guarded((*front, heads, tokens), torch.float32, offset=offset)
        given = backend.give(out.tensor), backend.give(sums.tensor)
        q, k, v = (backend.give(x) for x in (self.q, self.k, self.v))
        scale = dim**-0.5 if self.scale is None else self.scale
        rest = (scale, *self.window, given[0], given[1] if lse else None)
        if self.cu_seqlens_q is None:
            extension(backend).flash_attn_func(q, k, v, *rest)
        else:
            tables = (backend.give_optional(x) for x in (self.cu_seqlens_q, self.cu_seqlens_k))
            extension(backend).flash_attn_varlen_func(q, k, v, *tables, self.max_seqlen_q, *rest)
        return (
            backend.take_back(given[0], out, "out"),
            backend.take_back(given[1], sums, "lse") if lse else None,
        )

    def expected(self) -> attention_oracle.Expected:
        arguments = {"softmax_scale": self.scale, "window_size": self.window}
        if self.cu_seqlens_q is None:
            return attention_oracle.flash_attn_func(self.q, self.k, self.v, **arguments)
        return attention_oracle.flash_attn_varlen_func(
            *(self.q, self.k, self.v, self.cu_seqlens_q, self.cu_seqlens_k, self.max_seqlen_q),
            **arguments,
        )

    def check(
        self, backend: Backend, label: str, peer: bool = True, **run: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run, and hold every element against the oracle."""
        out, lse = self.run(backend, **run)
        self.expected().check(out, lse, label, peer)
        return out, lse


def any_layout(choose: random.Random, x: torch.Tensor) -> torch.Tensor:
    """`x`, or the same values elsewhere; or, repeated by a stride of 0, others."""
    if x.numel() == 0 or choose.random() < 0.4:
        return x
    if choose.random() < 0.2:
        dim = choose.choice(range(x.ndim - 1))
        return x.narrow(dim, 0, 1).expand(x.shape)
    return choose.choice(list(layouts(x)))[1]


def any_heads(choose: random.Random, small: bool) -> tuple[int, int, int, torch.dtype]:
    """Heads, kv heads, head dimension, dtype."""
    heads, kv_heads = choose.choice(HEADS if small else FEW_HEADS)
    return heads, kv_heads, choose.choice(HEAD_DIMS), choose.choice([BF16, FP16])


def random_call(choose: random.Random, key: object) -> PrefillCall:
    """A batch of equal lengths."""
    long = choose.random() < 0.12
    seqlen_q = choose.choice(LONG_Q if long else LENGTHS_Q)
    seqlen_k = choose.choice([seqlen_q, choose.choice(LENGTHS_K), choose.choice(LENGTHS_K)])
    heads, kv_heads, dim, dtype = any_heads(choose, not long and seqlen_k <= 67)
    batch = 1 if long or heads > 3 else choose.choice([1, 1, 2])
    if choose.random() < 0.15:  # as a model's projection leaves them
        seqlen_k = seqlen_q
        whole = normal(batch, seqlen_q, heads + 2 * kv_heads, dim, dtype=dtype, key=key)
        q, k, v = whole.split([heads, kv_heads, kv_heads], dim=2)
    else:
        shapes = [(seqlen_q, heads), (seqlen_k, kv_heads), (seqlen_k, kv_heads)]
        q, k, v = (
            any_layout(choose, normal(batch, *shape, dim, dtype=dtype, key=(key, name)))
            for name, shape in zip("qkv", shapes, strict=True)
        )
    scale = choose.choice([None, None, None, 0.05, 0.3])
    return PrefillCall(q, k, v, any_window(choose), scale)


def random_packed_call(choose: random.Random, key: object) -> PrefillCall:
    """Up to four sequences of any lengths, empty ones among them."""
    heads, kv_heads, dim, dtype = any_heads(choose, False)
    number = choose.choice([0, 1, 2, 3, 4]) if heads < 3 else 2
    lengths_q = [choose.choice([0, *LENGTHS_Q]) for _ in range(number)]
    if number == 1:
        lengths_q = [choose.choice(LONG_Q)]
    lengths_k = [choose.choice([n, n, choose.choice(LENGTHS_K)]) for n in lengths_q]
    q = normal(sum(lengths_q), heads, dim, dtype=dtype, key=(key, "q"))
    k, v = (normal(sum(lengths_k), kv_heads, dim, dtype=dtype, key=(key, x)) for x in "kv")
    longest = max(lengths_q, default=0)
    return PrefillCall(
        *(any_layout(choose, x) for x in (q, k, v)),
        window=any_window(choose),
        cu_seqlens_q=offsets(lengths_q),
        cu_seqlens_k=offsets(lengths_k),
        max_seqlen_q=choose.choice([longest, longest, longest + 1, 5000]),
    )


def random_cache_call(choose: random.Random, kind: str, key: object) -> CacheCall:
    """A prefill with a history: 17 to 70 queries of each sequence, or packed."""
    heads, kv_heads, dim, dtype = any_heads(choose, False)
    batch = 2 if heads < 3 else 1
    longest = choose.choice([17, 18, 24, 31, 32, 32, 33, 64, 70])
    packed = choose.random() < 0.4
    lengths_q = [choose.choice([0, 1, 17, longest]) if packed else longest for _ in range(batch)]
    slots = choose.choice([128, 128, 256, 384])
    left = choose.choice([-1, choose.choice(WINDOWS), choose.choice(WINDOWS)])
    if kind == "ring":
        left = choose.choice([w for w in WINDOWS if w + longest <= slots])
    lengths = [any_length(choose, 3 * slots if kind == "ring" else slots) for _ in range(batch)]
    keys, values = (
        [normal(n, kv_heads, dim, dtype=dtype, key=(key, name, b)) for b, n in enumerate(lengths)]
        for name in "kv"
    )
    cache = attention_caches.store(kind, keys, values, slots, key)
    leftpad = None
    if choose.random() < 0.2:
        leftpad = torch.tensor([choose.randint(0, n) for n in lengths], dtype=torch.int32)
    shape = (sum(lengths_q),) if packed else (batch, longest)
    return CacheCall(
        *(normal(*shape, heads, dim, dtype=dtype, key=(key, "q")), cache.k, cache.v),
        torch.tensor(lengths, dtype=torch.int32),
        cache_leftpad=leftpad,
        window=(left, choose.choice([0, 0, 0, -1, choose.choice(WINDOWS)])),
        cu_seqlens_q=offsets(lengths_q) if packed else None,
        max_seqlen_q=longest if packed else 0,
        **cache.arguments,
    )
