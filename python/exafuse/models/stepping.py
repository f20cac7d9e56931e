"""From packed tokens and a cache to what the layers need for them; the cache counts them."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse.batch import Packing, to_device
from exafuse.kv_cache import KVCache
from exafuse.layers import Step


def next_step(
    cache: KVCache, packing: Packing, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Step:
    """The step in which every row of a cache goes on with the tokens of ``packing``.

    The cache gets room for them and counts them; the layers write their keys and values.

    Args:
        cache: advanced by ``packing.lengths`` tokens.
        packing: of this call's columns; at least one token in all.
        cos, sin: fp32 ``[positions, head_dim / 2]``.
        positions: int ``[num_tokens]`` for RoPE; None = each row goes on where it stopped,
            counting real tokens.
    """
    device = cache.seqlens.device
    cache.reserve(max(cache.lengths) + max(packing.lengths))
    if packing.columns == 1 and packing.uniform:
        rows, slots = None, cache.seqlens.long()
        positions = cache.next_positions if positions is None else positions
        cache.next_positions = positions + 1
    else:
        rows, offsets = packing.rows(device), packing.token_offsets(device)
        slots = cache.seqlens.long()[rows] + offsets
        if positions is None:
            positions = cache.next_positions[rows] + offsets
        after = positions[packing.last_tokens(device).clamp(min=0)] + 1
        if not packing.uniform:
            empty = to_device(torch.tensor([n == 0 for n in packing.lengths]), device)
            after = torch.where(empty, cache.next_positions, after)
        cache.next_positions = after
    step = Step(
        cos=cos,
        sin=sin,
        positions=positions.to(torch.int32),
        cu_seqlens=None if packing.uniform else packing.cu_seqlens(device),
        max_seqlen=max(packing.lengths),
        cache=cache,
        slot_mappings=cache.slot_mappings(slots, rows),
    )
    cache.advance(packing.lengths, packing.columns, packing.mask)
    return step


def fixed_step(cache: KVCache, cos: Tensor, sin: Tensor) -> Step:
    """The step in which every row of a cache goes on with one token, counted on the device only.

    Nothing in it depends on numbers of the host that change from step to step: lengths and
    positions stay where they are and are advanced in place.

    Args:
        cache: with room for the token; its host part is told with ``count_step``.
        cos, sin: fp32 ``[positions, head_dim / 2]``, for all positions to come.
    """
    step = Step(
        cos=cos,
        sin=sin,
        positions=cache.next_positions.to(torch.int32),
        cu_seqlens=None,
        max_seqlen=1,
        cache=cache,
        slot_mappings=cache.slot_mappings(cache.seqlens.long()),
    )
    cache.next_positions += 1
    cache.seqlens += 1
    return step
