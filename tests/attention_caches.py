"""The same keys and values in every kind of cache, all that holds no token being NaN.

cache = attention_caches.store("ring", keys, values, slots=256)
ops.flash_attn_with_kvcache(q, cache.k, cache.v, cache_seqlens=lengths, **cache.arguments)
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from poison import poisoned

# contiguous; rows in another order (cache_batch_idx); ring; pages; [rows, heads, slots, dim] in
# memory; rows and slots apart by an odd number of elements
KINDS = ("contiguous", "rows", "ring", "paged", "heads first", "odd strides")
PAGE = 128


@dataclass(frozen=True)
class Cache:
    """Caches `[rows, slots, num_kv_heads, head_dim]` and how to read them."""

    k: torch.Tensor
    v: torch.Tensor
    arguments: dict[str, Any] = field(default_factory=dict)

    def write(self, b: int, position: int, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put keys and values `[tokens, num_kv_heads, head_dim]` of sequence b at `position`."""
        for i in range(k.shape[0]):
            row, slot = self.place(b, position + i)
            self.k[row, slot], self.v[row, slot] = k[i], v[i]

    def place(self, b: int, position: int) -> tuple[int, int]:
        """Row (or page) and slot of an absolute position of sequence b."""
        slots = self.k.shape[1]
        if "block_table" in self.arguments:
            return int(self.arguments["block_table"][b, position // slots]), position % slots
        index = self.arguments.get("cache_batch_idx")
        return (b if index is None else int(index[b])), position % slots


def empty(
    kind: str,
    batch: int,
    slots: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: object = 0,
) -> Cache:
    """A cache of `kind` for sequences of up to `slots` tokens each (a ring: any number), all NaN.

    `paged` rounds the slots up to whole pages, which lie in random order among unused ones.
    """
    choose = random.Random(repr((kind, batch, slots, seed)))
    arguments: dict[str, Any] = {}
    rows = batch
    if kind == "paged":
        pages = -(-slots // PAGE)
        rows, slots = batch * pages + 2, PAGE
        order = choose.sample(range(rows), batch * pages)
        arguments["block_table"] = torch.tensor(order, dtype=torch.int32).view(batch, pages)
    elif kind == "rows":
        rows = batch + 2
        order = choose.sample(range(rows), batch)
        arguments["cache_batch_idx"] = torch.tensor(order, dtype=torch.int32)
    elif kind == "ring":
        arguments["ring"] = True
    elif kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")

    def make() -> torch.Tensor:
        shape = (rows, slots, kv_heads, head_dim)
        if kind == "heads first":
            return poisoned(rows, kv_heads, slots, head_dim, dtype=dtype).transpose(1, 2)
        if kind == "odd strides":
            row = kv_heads * head_dim + 3
            whole = poisoned(rows * (slots * row + 5), dtype=dtype)
            return whole.as_strided(shape, (slots * row + 5, row, head_dim, 1))
        return poisoned(*shape, dtype=dtype)

    return Cache(make(), make(), arguments)


def store(
    kind: str,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    slots: int,
    seed: object = 0,
) -> Cache:
    """`empty` filled with `keys[b]`, `values[b]`, `[tokens, kv_heads, head_dim]` from position 0.

    A ring keeps the newest `slots` of them.
    """
    _, kv_heads, head_dim = keys[0].shape
    cache = empty(kind, len(keys), slots, kv_heads, head_dim, keys[0].dtype, seed)
    for b, (k, v) in enumerate(zip(keys, values, strict=True)):
        start = max(0, k.shape[0] - slots) if kind == "ring" else 0
        positions = torch.arange(start, k.shape[0])
        if "block_table" in cache.arguments:
            row = cache.arguments["block_table"][b].long()[positions // PAGE]
            slot = positions % PAGE
        else:
            index = cache.arguments.get("cache_batch_idx")
            row = torch.full_like(positions, b if index is None else int(index[b]))
            slot = positions % cache.k.shape[1]
        cache.k[row, slot], cache.v[row, slot] = k[start:], v[start:]
    return cache
