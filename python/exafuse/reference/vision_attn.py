"""The attention of a vision transformer: 2-D RoPE, then non-causal attention inside packed
segments."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from exafuse.reference._check import (
    Shapes,
    check_device,
    check_float,
    check_scale,
    check_tables,
    check_tables_constant,
    check_tensor,
    deliver,
    full_fp32,
)
from exafuse.reference.attention import attend_all, offsets
from exafuse.reference.qk_norm_rope import rotate_fp32, split_qkv

OPEN = (-1, -1)  # the window of attention without a mask


def vision_attn(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Rotate q and k, then attend without a causal mask inside each segment.

    Args:
        qkv: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``; kernels take bf16 and
            fp16, head_dim a multiple of 8 up to 128; fp32 runs in plain PyTorch.
        num_heads, num_kv_heads: query heads and key/value heads.
        cos, sin: fp32 ``[num_tokens, head_dim / 2]``, one row a token.
        cu_seqlens: int32 ``[segments + 1]``: windows or whole frames.
        max_seqlen: at least the longest segment; kernels do not write rows beyond it, nor those
            behind the last segment.
        softmax_scale: finite and > 0; default ``head_dim ** -0.5``.
        out: optional result buffer, apart from the inputs.

    Returns:
        ``[num_tokens, num_heads, head_dim]``. The rotation runs in fp32; rotated q and k are
        rounded to the dtype of ``qkv`` before the scores, the output once more.
    """
    check_tensor("qkv", qkv)
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    head_dim = q.shape[2]
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number, got {head_dim}")
    check_tables_constant(cos, sin)
    shapes = Shapes(num_tokens=q.shape[0])
    check_float("cos", cos, torch.float32)
    check_float("sin", sin, torch.float32)
    shapes.match("cos", cos, "num_tokens", head_dim // 2)
    shapes.match("sin", sin, "num_tokens", head_dim // 2)
    check_tables(qkv.device, cu_seqlens=cu_seqlens)
    Shapes().match("cu_seqlens", cu_seqlens, "segments + 1")
    check_device(qkv.device, cos=cos, sin=sin)
    scale = check_scale(softmax_scale, head_dim)
    starts = offsets("cu_seqlens", cu_seqlens, q.shape[0], "max_seqlen", max_seqlen)
    q, k = (rotate_fp32(x.float(), cos, sin).to(x.dtype) for x in (q, k))
    segments = [q[:0]]
    for start, stop in pairwise(starts):
        rows = slice(start, stop)
        out_rows, _ = attend_all(q[None, rows], k[None, rows], v[None, rows], scale, OPEN, False)
        segments.append(out_rows[0])
    with full_fp32(qkv.device):  # autocast would have cat look for a dtype
        joined = torch.cat(segments)
    return deliver(joined, out)
