"""Checks of what flash_attn_with_kvcache takes beside queries."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse.reference._check import Shapes, check_count, check_float, check_tables

TILE = 128  # absolute key tiles of the kernels: a page or a ring holds a multiple of it


def check_longest(max_seqlen_q: int | None) -> int:
    """``max_seqlen_q`` of packed queries, which only the caller knows without a look at the
    device."""
    if max_seqlen_q is None:
        raise ValueError("max_seqlen_q: expected the longest sequence of cu_seqlens_q, got None")
    return check_count("max_seqlen_q", max_seqlen_q)


def lengths_of(
    cache_seqlens: Tensor | int | None, batch: int, device: torch.device
) -> Tensor | None:
    """``cache_seqlens`` as an int32 tensor ``[batch]``, or None."""
    if cache_seqlens is None:
        return None
    if isinstance(cache_seqlens, int):
        check_count("cache_seqlens", cache_seqlens)
        return torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)
    check_tables(device, cache_seqlens=cache_seqlens)
    return cache_seqlens


def check_new(
    k: Tensor | None,
    v: Tensor | None,
    dtype: torch.dtype,
    shapes: Shapes,
    cache_seqlens: Tensor | int | None,
) -> int:
    """How many tokens a sequence appends."""
    if k is None and v is None:
        return 0
    if k is None or v is None:
        raise ValueError("k, v: expected both or neither")
    for name, tensor in (("k", k), ("v", v)):
        check_float(name, tensor, dtype)
        shapes.match(name, tensor, "batch", "seqlen_new", "num_kv_heads", "head_dim")
    if cache_seqlens is None:
        raise ValueError(
            "cache_seqlens: expected int32 (batch,) when k and v are appended, got None"
        )
    return k.shape[1]


def check_cache(
    k_cache: Tensor,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
    ring: bool,
    window_size: tuple[int, int],
    new_tokens: int,
) -> None:
    slots = k_cache.shape[1]
    if block_table is not None:
        if cache_batch_idx is not None:
            raise ValueError(
                "cache_batch_idx: expected None with block_table, which names the pages itself, "
                "got a tensor"
            )
        if ring:
            raise ValueError("ring: expected False with block_table: pages are no ring, got True")
        if slots % TILE:
            raise ValueError(f"k_cache: expected pages of a multiple of {TILE} slots, got {slots}")
    if ring:
        need = window_size[0] + new_tokens
        if window_size[0] < 0 or slots < need or slots % TILE or not slots:
            raise ValueError(
                "ring: expected a bounded left window and at least left + max_seqlen_q = "
                f"{need} slots, a multiple of {TILE}, got window_left={window_size[0]}, "
                f"slots={slots}"
            )
