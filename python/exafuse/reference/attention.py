"""Scaled dot-product attention with flash-attn 2's names and meaning, in plain PyTorch.

Masks are two bounds per query. With absolute positions p of keys and i of queries, a key is
visible iff ``i - left <= p <= i + right`` (an open bound is -1; ``causal`` is right = 0) and p
exists. Queries stand at the end of the keys (bottom-right): query j of ``seqlen_q`` has position
``seqlen_k - seqlen_q + j``. A query that sees nothing gives 0 and a log-sum-exp of -inf.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from exafuse.reference._check import (
    Shapes,
    check_count,
    check_device,
    check_float,
    check_heads,
    check_scale,
    check_tables,
    check_window,
    deliver,
    full_fp32,
    refuse,
)

QUERY_BLOCK = (
    512  # scores are [heads, QUERY_BLOCK, keys] at a time, so memory grows linearly in keys
)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    softmax_scale: float,
    with_lse: bool,
    poisoned: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one block of queries of a batch, fp32 inside.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``.
        k, v: ``[batch, seqlen_k, num_kv_heads, head_dim]``.
        visible: bool ``[batch or 1, seqlen_q, seqlen_k]``; None = every query sees every key.
        softmax_scale: multiplies the scores.
        with_lse: also return the log-sum-exp.
        poisoned: keys that no query sees may hold anything, NaN included.

    Returns:
        out like q, and lse fp32 ``[batch, num_heads, seqlen_q]`` or None.
    """
    with full_fp32(q.device):
        return _attend(q, k, v, visible, softmax_scale, with_lse, poisoned)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    softmax_scale: float,
    with_lse: bool,
    poisoned: bool,
) -> tuple[Tensor, Tensor | None]:
    if visible is None and not with_lse:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2).float(),
            k.transpose(1, 2).float(),
            v.transpose(1, 2).float(),
            scale=softmax_scale,
            enable_gqa=q.shape[2] != k.shape[2],
        )
        return out.transpose(1, 2).to(q.dtype), None
    batch, seqlen_q, num_heads, head_dim = q.shape
    num_kv_heads, rows = k.shape[2], num_heads // k.shape[2] * seqlen_q
    keys, values = k.permute(0, 2, 3, 1).float(), v.permute(0, 2, 1, 3).float()
    queries = q.permute(0, 2, 1, 3).float() * softmax_scale
    scores = queries.reshape(batch, num_kv_heads, rows, head_dim) @ keys
    if visible is not None:
        by_head = scores.view(batch, num_kv_heads, num_heads // num_kv_heads, seqlen_q, k.shape[1])
        scores = by_head.masked_fill(~visible[:, None, None], float("-inf")).flatten(2, 3)
        if poisoned:  # 0 * NaN would leak out of a slot never written
            values = values.masked_fill(~visible.any(1)[:, None, :, None], 0.0)
    lse = scores.logsumexp(dim=-1, keepdim=True)
    # An empty row has lse -inf and only scores of -inf: subtracting 0 gives exp(-inf) = 0.
    probabilities = (scores - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
    out = (probabilities @ values).reshape(batch, num_heads, seqlen_q, head_dim)
    return out.permute(0, 2, 1, 3).to(q.dtype), lse.reshape(batch, num_heads, seqlen_q)


def visible_keys(q_positions: Tensor, k_positions: Tensor, window_size: tuple[int, int]) -> Tensor:
    """Mask ``[batch or 1, seqlen_q, seqlen_k]`` of a window; negative key positions are no keys."""
    left, right = window_size
    i, p = q_positions[:, :, None], k_positions[:, None, :]
    visible = p >= 0
    if left >= 0:
        visible = visible & (p >= i - left)
    if right >= 0:
        visible = visible & (p <= i + right)
    return visible.expand(-1, i.shape[1], -1)


def join(blocks: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries, one after the other."""
    if len(blocks) == 1:
        return blocks[0]
    lses = [lse for _, lse in blocks if lse is not None]
    return torch.cat([out for out, _ in blocks], 1), torch.cat(lses, 2) if lses else None


def attend_all(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
    with_lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """Blocks of queries over the keys they can see; queries stand at the end of the keys.

    Args and returns as in :func:`attend`, keys at positions 0, 1, 2, ...
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    left, right = window_size
    blocks = []
    for start in range(0, max(seqlen_q, 1), QUERY_BLOCK):
        block = q[:, start : start + QUERY_BLOCK]
        first = seqlen_k - seqlen_q + start
        end = first + block.shape[1]
        high = seqlen_k if right < 0 else min(max(end + right, 0), seqlen_k)
        low = 0 if left < 0 else min(max(first - left, 0), high)
        i = torch.arange(first, end, device=q.device)[None]
        p = torch.arange(low, high, device=q.device)[None]
        visible = visible_keys(i, p, window_size)
        keys, values = k[:, low:high], v[:, low:high]
        masked = left >= 0 or right >= 0
        blocks.append(attend(block, keys, values, visible, softmax_scale, with_lse, masked))
    return join(blocks)


def check_qkv(q: Tensor, k: Tensor, v: Tensor, *dims: str) -> Shapes:
    """Match q ``[*dims[:half], num_heads, head_dim]`` and k, v ``[*dims[half:], num_kv_heads,
    head_dim]``."""
    check_float("q", q)
    check_float("k", k, q.dtype)
    check_float("v", v, q.dtype)
    half = len(dims) // 2
    shapes = Shapes()
    shapes.match("q", q, *dims[:half], "num_heads", "head_dim")
    shapes.match("k", k, *dims[half:], "num_kv_heads", "head_dim")
    shapes.match("v", v, *dims[half:], "num_kv_heads", "head_dim")
    check_heads(shapes.known["num_heads"], shapes.known["num_kv_heads"])
    check_device(q.device, k=k, v=v)
    return shapes


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention over equally long sequences.

    Args:
        q: ``[batch, seqlen_q, num_heads, head_dim]``; kernels take bf16 and fp16, any strides with
            last 1, and head_dim a multiple of 8 up to 128; fp32 runs in plain PyTorch.
        k, v: ``[batch, seqlen_k, num_kv_heads, head_dim]``; num_heads is a multiple of
            num_kv_heads and query head h reads kv head ``h // (num_heads // num_kv_heads)``.
        dropout_p, softcap, alibi_slopes: not implemented, a ValueError unless left at the default.
        softmax_scale: finite and > 0; default ``head_dim ** -0.5``.
        causal: the right bound of the window is 0, aligned bottom-right (torch's SDPA: top-left).
        window_size: ``(left, right)``, inclusive of both ends and beside the query itself; -1 =
            open. A model's ``sliding_window=W`` counts the query, it is ``(W - 1, 0)`` here.
        deterministic: accepted; results never depend on it.
        return_attn_probs: also return the log-sum-exp.
        out, lse: optional result buffers, apart from the inputs.

    Returns:
        ``[batch, seqlen_q, num_heads, head_dim]``; with ``return_attn_probs`` the triple (out,
        lse fp32 ``[batch, num_heads, seqlen_q]``, None). A row that sees no key is 0 with lse
        -inf.
    """
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    check_qkv(q, k, v, "batch", "seqlen_q", "batch", "seqlen_k")
    scale, window = check_scale(softmax_scale, q.shape[3]), check_window(window_size, causal)
    with_lse = return_attn_probs or lse is not None
    result, lse_result = attend_all(q, k, v, scale, window, with_lse)
    result = deliver(result, out)
    if lse_result is not None and with_lse:
        lse_result = deliver(lse_result, lse, "lse")
        return (result, lse_result, None) if return_attn_probs else result
    return result


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention over packed sequences of different lengths.

    Args:
        q: ``[total_q, num_heads, head_dim]``.
        k, v: ``[total_k, num_kv_heads, head_dim]``.
        cu_seqlens_q, cu_seqlens_k: int32 ``[batch + 1]``, where each sequence starts; the last
            entry is the total. Sequence b of q attends to sequence b of k only. Kernels do not
            wait for these numbers: rows of q behind the last of them are not written.
        max_seqlen_q, max_seqlen_k: at least the longest of each; kernels do not write the queries
            of a sequence beyond it.
        block_table: paged keys belong to :func:`flash_attn_with_kvcache`; a ValueError here.
        others: as in :func:`flash_attn_func`.

    Returns:
        ``[total_q, num_heads, head_dim]``; with ``return_attn_probs`` (out, lse fp32
        ``[num_heads, total_q]``, None).
    """
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    refuse_pages(block_table)
    shapes = check_qkv(q, k, v, "total_q", "total_k")
    check_tables(q.device, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    shapes.match("cu_seqlens_q", cu_seqlens_q, "batch + 1")
    shapes.match("cu_seqlens_k", cu_seqlens_k, "batch + 1")
    scale, window = check_scale(softmax_scale, q.shape[2]), check_window(window_size, causal)
    starts_q = offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    starts_k = offsets("cu_seqlens_k", cu_seqlens_k, k.shape[0], "max_seqlen_k", max_seqlen_k)
    with_lse = return_attn_probs or lse is not None
    outs, lses = [q[:0]], [q.new_zeros(q.shape[1], 0, dtype=torch.float32)]
    for b in range(len(starts_q) - 1):
        rows, cols = slice(*starts_q[b : b + 2]), slice(*starts_k[b : b + 2])
        part, part_lse = attend_all(
            q[rows][None], k[cols][None], v[cols][None], scale, window, with_lse
        )
        outs.append(part[0])
        if part_lse is not None:
            lses.append(part_lse[0])
    with full_fp32(q.device):  # autocast would have cat look for a dtype
        joined = torch.cat(outs)
    result = deliver(joined, out)
    if not with_lse:
        return result
    lse_result = deliver(torch.cat(lses, 1), lse, "lse")
    return (result, lse_result, None) if return_attn_probs else result


def refuse_pages(block_table: Tensor | None) -> None:
    """Raise for paged keys where they have no place."""
    if block_table is not None:
        raise ValueError("block_table: paged keys are read by flash_attn_with_kvcache only")


def offsets(
    name: str, cu_seqlens: Tensor, total: int, longest_name: str, longest: int
) -> list[int]:
    """The numbers of ``cu_seqlens``; raises unless they rise from 0 to ``total`` in steps of at
    most ``longest``."""
    check_count(longest_name, longest)
    starts: list[int] = cu_seqlens.tolist()
    if not starts or starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
        raise ValueError(f"{name}: expected offsets rising from 0 to {total}, got {starts[:8]}")
    needed = max((b - a for a, b in pairwise(starts)), default=0)
    if longest < needed:
        raise ValueError(f"{longest_name}: expected at least {needed}, got {longest}")
    return starts
