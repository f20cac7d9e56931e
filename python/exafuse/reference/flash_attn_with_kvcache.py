"""Attention over a contiguous, ring or paged cache, in plain PyTorch.

The cache is ``[rows, slots, num_kv_heads, head_dim]``. Absolute position p lives in slot p, or in
slot ``p % slots`` of a ring. ``cache_seqlens`` counts tokens seen; query j of a row stands at
position ``cache_seqlens - seqlen_q + j``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from exafuse.reference._cache_check import check_cache, check_longest, check_new, lengths_of
from exafuse.reference._check import (
    Shapes,
    check_device,
    check_float,
    check_heads,
    check_scale,
    check_tables,
    check_window,
    deliver,
    needs_grad,
    refuse,
)
from exafuse.reference.attention import QUERY_BLOCK, attend, join, offsets, visible_keys
from exafuse.reference.qk_norm_rope import write_cache


@dataclass(frozen=True)
class _CacheView:
    """A cache, however it is laid out, read as keys with absolute positions."""

    k_cache: Tensor
    v_cache: Tensor
    rows: Tensor | None  # cache_batch_idx
    block_table: Tensor | None
    lengths: Tensor  # [batch], tokens seen
    leftpad: Tensor | None
    ring: bool

    def attend(
        self,
        q: Tensor,
        batch: slice,
        softmax_scale: float,
        window_size: tuple[int, int],
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of ``q [rows of batch, seqlen_q, num_heads, head_dim]``."""
        lengths, seqlen_q = self.lengths[batch], q.shape[1]
        k, v = self._gather(self.k_cache, batch), self._gather(self.v_cache, batch)
        slots = k.shape[1]
        # On the CPU the lengths are at hand; a GPU would have to be waited for, so all its slots
        # are read and masked.
        shortest = longest = slots
        if not lengths.is_cuda and lengths.numel():
            shortest, longest = (max(0, min(slots, int(n))) for n in lengths.aminmax())
        seen_alike = shortest == longest > 0 and not lengths.is_cuda and self.leftpad is None
        inside = window_size[0] < 0 or longest <= window_size[0]
        if seqlen_q == 1 and seen_alike and inside and not (self.ring and longest == slots):
            return attend(q, k[:, :longest], v[:, :longest], None, softmax_scale, with_lse)
        # Slots that no query sees, unwritten or older than the window, may hold anything.
        poisoned = not seen_alike or window_size[0] >= 0
        slot = torch.arange(longest, device=q.device)[None]
        n = lengths[:, None].long()
        if not self.ring:
            n = n.clamp(max=slots)
        # A ring's slot holds the newest position congruent to it, negative if none was written.
        p = n - 1 - (n - 1 - slot) % slots if self.ring else torch.where(slot < n, slot, -1)
        if self.leftpad is not None:
            p = torch.where(p >= self.leftpad[batch, None], p, -1)
        i = n - seqlen_q + torch.arange(seqlen_q, device=q.device)[None]
        blocks = []
        for start in range(0, max(seqlen_q, 1), QUERY_BLOCK):
            stop, high = start + QUERY_BLOCK, longest
            if not (self.ring or window_size[1] < 0 or lengths.is_cuda):
                high = min(longest, longest - seqlen_q + min(stop, seqlen_q) + window_size[1])
                high = max(0, high)
            visible = visible_keys(i[:, start:stop], p[:, :high], window_size)
            block, keys, values = q[:, start:stop], k[:, :high], v[:, :high]
            blocks.append(attend(block, keys, values, visible, softmax_scale, with_lse, poisoned))
        return join(blocks)

    def _gather(self, cache: Tensor, batch: slice) -> Tensor:
        if self.block_table is not None:
            return cache[self.block_table[batch]].flatten(1, 2)
        return cache[batch] if self.rows is None else cache[self.rows[batch]]


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    ring: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new tokens over a cache that already holds (or is given here) their own keys.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``, or packed ``[total_q, num_heads,
            head_dim]`` with ``cu_seqlens_q``.
        k_cache, v_cache: ``[rows, slots, num_kv_heads, head_dim]``, any strides with last 1. rows
            is the batch, or the number of pages with ``block_table``.
        k, v: ``[batch, seqlen_new, num_kv_heads, head_dim]`` to append first (mutates the cache);
            what has no room is dropped.
        rotary_cos, rotary_sin, softcap, alibi_slopes: not implemented, a ValueError if set.
        cache_seqlens: int32 ``[batch]`` or an int: tokens seen, counting those of this call when
            k and v are None, and not counting them when k and v are given. None = all slots. 0
            after the append, or a negative length, = inactive row, output 0.
        cache_batch_idx: int32 ``[batch]``, the cache row of each sequence.
        cache_leftpad: int32 ``[batch]``, first visible position of each row.
        block_table: int32 ``[batch, max_pages]``; a page holds a multiple of 128 slots.
        softmax_scale, causal, window_size: as in :func:`flash_attn_func`.
        num_splits: accepted; results never depend on it.
        return_softmax_lse: also return the log-sum-exp.
        cu_seqlens_q, max_seqlen_q: offsets int32 ``[batch + 1]`` of packed queries, and at least
            the longest of them; both or neither. Kernels do not write rows beyond either.
        ring: position p lives in slot ``p % slots`` and cache_seqlens keeps growing past slots,
            a multiple of 128 and at least the left window plus the longest run of queries.
        out, lse: optional result buffers, apart from the inputs.

    Returns:
        out like q; with ``return_softmax_lse`` also lse fp32 ``[batch, num_heads, seqlen_q]``, or
        ``[num_heads, total_q]`` for packed q.
    """
    refuse(softcap=softcap, alibi_slopes=alibi_slopes, rotary_cos=rotary_cos, rotary_sin=rotary_sin)
    check_float("q", q)
    packed = cu_seqlens_q is not None
    shapes = Shapes()
    shapes.match(
        "q", q, *(("total_q",) if packed else ("batch", "seqlen_q")), "num_heads", "head_dim"
    )
    check_tables(
        q.device,
        cu_seqlens_q=cu_seqlens_q,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
    )
    starts = None
    batch, longest_q = q.shape[:2]
    if cu_seqlens_q is not None:
        Shapes().match("cu_seqlens_q", cu_seqlens_q, "batch + 1")
        longest_q = check_longest(max_seqlen_q)
        starts = offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", longest_q)
        batch = shapes.known["batch"] = len(starts) - 1
    by_batch = cache_batch_idx is None and block_table is None
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_float(name, cache, q.dtype)
        first = "batch" if by_batch else "rows"
        shapes.match(name, cache, first, "slots", "num_kv_heads", "head_dim")
    check_heads(shapes.known["num_heads"], shapes.known["num_kv_heads"])
    check_device(q.device, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    if needs_grad(q, k, v, k_cache, v_cache):
        raise ValueError("flash_attn_with_kvcache has no gradient: call it under torch.no_grad()")
    scale, window = check_scale(softmax_scale, q.shape[-1]), check_window(window_size, causal)
    for name, index in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if index is not None:
            shapes.match(name, index, "batch")
    if block_table is not None:
        shapes.match("block_table", block_table, "batch", "max_pages")
    new_tokens = check_new(k, v, q.dtype, shapes, cache_seqlens)
    check_cache(k_cache, cache_batch_idx, block_table, ring, window, max(longest_q, new_tokens))
    slots = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
    lengths = lengths_of(cache_seqlens, batch, q.device)
    if lengths is None:
        lengths = torch.full((batch,), slots, dtype=torch.int32, device=q.device)
    shapes.match("cache_seqlens", lengths, "batch")
    if k_cache.shape[0] == 0 and batch > 0:  # no rows at all: one that nobody has written to
        k_cache, v_cache = (x.new_zeros((1, *x.shape[1:])) for x in (k_cache, v_cache))
        lengths = torch.full_like(lengths, -1)
    last = k_cache.shape[0] - 1
    view = _CacheView(
        k_cache,
        v_cache,
        None if cache_batch_idx is None else cache_batch_idx.long().clamp(0, last),
        None if block_table is None else block_table.long().clamp(0, last),
        lengths,
        cache_leftpad,
        ring,
    )
    if k is not None and v is not None:
        _append(k, v, view, slots)
        view = replace(view, lengths=torch.where(lengths < 0, lengths, lengths + k.shape[1]))
    with_lse = return_softmax_lse or lse is not None
    lse_result: Tensor | None
    if starts is None:
        result, lse_result = view.attend(q, slice(None), scale, window, with_lse)
    else:
        outs, lses = [q[:0]], [q.new_zeros(q.shape[1], 0, dtype=torch.float32)]
        for b, (start, stop) in enumerate(pairwise(starts)):
            part, part_lse = view.attend(
                q[None, start:stop], slice(b, b + 1), scale, window, with_lse
            )
            outs.append(part[0])
            if part_lse is not None:
                lses.append(part_lse[0])
        result, lse_result = torch.cat(outs), torch.cat(lses, 1) if with_lse else None
    result = deliver(result, out)
    if lse_result is not None and with_lse:
        lse_result = deliver(lse_result, lse, "lse")
        return (result, lse_result) if return_softmax_lse else result
    return result


def _append(k: Tensor, v: Tensor, view: _CacheView, slots: int) -> None:
    """Write new keys and values behind ``view.lengths``; positions beyond the cache are
    dropped."""
    batch, seqlen_new = k.shape[:2]
    page = view.k_cache.shape[1]
    position = view.lengths[:, None].long() + torch.arange(seqlen_new, device=k.device)
    active = (view.lengths >= 0)[:, None]
    inside = active.expand_as(position) if view.ring else active & (position < slots)
    if view.ring:
        position = position % slots
    if view.block_table is not None and slots:
        column = (position // page).clamp(0, view.block_table.shape[1] - 1)
        row, slot = view.block_table.gather(1, column), position % page
    else:
        rows = view.rows if view.rows is not None else torch.arange(batch, device=k.device)
        row, slot = rows[:, None].expand_as(position), position
    mapping = torch.where(inside, row * page + slot, -1).flatten()
    write_cache(k.flatten(0, 1), v.flatten(0, 1), view.k_cache, view.v_cache, mapping)
