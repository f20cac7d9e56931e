"""The attention of a vision transformer: 2-D RoPE, then non-causal attention inside packed
segments."""

from __future__ import annotations

from torch import Tensor

from exafuse.reference._check import Shapes, deliver
from exafuse.reference.attention import flash_attn_varlen_func
from exafuse.reference.qk_norm_rope import rotate_fp32, split_qkv


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
        qkv: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``.
        num_heads, num_kv_heads: query heads and key/value heads.
        cos, sin: fp32 ``[num_tokens, head_dim / 2]``, one row a token.
        cu_seqlens: int32 ``[segments + 1]``: windows or whole frames.
        max_seqlen: the longest segment.
        softmax_scale: default ``head_dim ** -0.5``.
        out: optional result buffer.

    Returns:
        ``[num_tokens, num_heads, head_dim]``. The rotation runs in fp32; rotated q and k are
        rounded to the dtype of ``qkv`` before the scores, the output once more.
    """
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    shapes = Shapes(num_tokens=q.shape[0])
    shapes.match("cos", cos, "num_tokens", q.shape[2] // 2)
    shapes.match("sin", sin, "num_tokens", q.shape[2] // 2)
    q, k = (rotate_fp32(x.float(), cos.float(), sin.float()).to(x.dtype) for x in (q, k))
    result = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, softmax_scale=softmax_scale
    )
    assert isinstance(result, Tensor)  # no lse was asked for
    return deliver(result, out)
