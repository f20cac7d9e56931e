"""Gradients of the ops, written out: what the registered ops differentiate by where no kernel does.

Each takes the gradients of an op's results and what the op was given, and returns the gradients
of its inputs, computed in fp32 and rounded once to the dtype of each input. Those of weights shared
by many rows are summed in fp32 before that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse.reference._check import full_fp32
from exafuse.reference.attention import QUERY_BLOCK, visible_keys
from exafuse.reference.qk_norm_rope import rotate_fp32


def rms_norm(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of ``x [..., hidden]`` and ``weight [hidden]``."""
    grad_x, grad_weight = _norm_fp32(grad.float(), x.float(), weight.float(), eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def add_rms_norm(
    grad: Tensor, grad_residual: Tensor, new_residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Of the sum (so of ``x`` and of ``residual``, which are the same) and of ``weight``."""
    grad_sum, grad_weight = _norm_fp32(grad.float(), new_residual.float(), weight.float(), eps)
    return (grad_sum + grad_residual.float()).to(new_residual.dtype), grad_weight.to(weight.dtype)


def silu_and_mul(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Of ``gate`` and ``up [..., intermediate_size]``."""
    g, x, y = grad.float(), gate.float(), up.float()
    sigmoid = torch.sigmoid(x)
    silu = x * sigmoid
    return (g * y * (sigmoid + silu * (1 - sigmoid))).to(gate.dtype), (g * silu).to(up.dtype)


def norm_rope(
    grad: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """Of ``x [num_tokens, heads, head_dim]`` and ``weight [head_dim]`` for the q or k part of
    ``qk_norm_rope``; a rotation is undone by the opposite one. Without a weight x is not needed."""
    g = grad.float()
    if cos is not None and sin is not None:
        assert positions is not None
        rows = positions.clamp(0, cos.shape[0] - 1)
        g = rotate_fp32(g, cos.index_select(0, rows).float(), -sin.index_select(0, rows).float())
    if weight is None or x is None:
        return g.to(grad.dtype), None
    grad_x, grad_weight = _norm_fp32(g, x.float(), weight.float(), eps)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


def attention(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Of q, k and v of ``flash_attn_func``, by recomputing blocks of the probabilities from lse
    (Dao et al. 2022).

    Args:
        grad, out, q: ``[batch, seqlen_q, num_heads, head_dim]``.
        k, v: ``[batch, seqlen_k, num_kv_heads, head_dim]``.
        lse: fp32 ``[batch, num_heads, seqlen_q]``; -inf for a row that saw nothing.
    """
    with full_fp32(q.device):
        return _attention(grad, q, k, v, out, lse, softmax_scale, window_size)


def _attention(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    batch, seqlen_q, num_heads, head_dim = q.shape
    seqlen_k, num_kv_heads = k.shape[1], k.shape[2]
    group = num_heads // num_kv_heads

    def by_kv_head(x: Tensor) -> Tensor:
        """[batch, seqlen, num_heads, d] -> [batch, num_kv_heads, group, seqlen, d] in fp32."""
        return x.float().reshape(batch, -1, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)

    keys = k.float().permute(0, 2, 1, 3)[:, :, None]  # [batch, num_kv_heads, 1, seqlen_k, d]
    values = v.float().permute(0, 2, 1, 3)[:, :, None]
    grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    positions = torch.arange(seqlen_k, device=q.device)[None]
    for start in range(0, seqlen_q, QUERY_BLOCK):
        rows = slice(start, min(start + QUERY_BLOCK, seqlen_q))
        query, d_out = by_kv_head(q[:, rows]), by_kv_head(grad[:, rows])
        at = torch.arange(rows.start, rows.stop, device=q.device)[None] + (seqlen_k - seqlen_q)
        hidden = ~visible_keys(at, positions, window_size)[:, None, None]
        log_sum = lse[:, :, rows].reshape(batch, num_kv_heads, group, -1, 1)
        log_sum = log_sum.masked_fill(log_sum == float("-inf"), 0.0)
        scores = (query @ keys.transpose(-1, -2)) * softmax_scale
        p = (scores - log_sum).exp().masked_fill(hidden, 0.0)
        row_sum = (d_out * by_kv_head(out[:, rows])).sum(-1, keepdim=True)
        d_scores = p * (d_out @ values.transpose(-1, -2) - row_sum) * softmax_scale
        d_query = (d_scores @ keys).permute(0, 3, 1, 2, 4)
        grad_q[:, rows] = d_query.reshape(batch, -1, num_heads, head_dim)
        grad_v += (p.transpose(-1, -2) @ d_out).sum(2).transpose(1, 2)
        grad_k += (d_scores.transpose(-1, -2) @ query).sum(2).transpose(1, 2)
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def attention_varlen(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    window_size: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The same for packed sequences: ``q [total_q, ...]``, ``k, v [total_k, ...]``, ``lse
    [num_heads, total_q]``."""
    grads = tuple(torch.zeros_like(x) for x in (q, k, v))
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b in range(len(starts_q) - 1):
        at_q = slice(starts_q[b], starts_q[b + 1])
        at_k = slice(starts_k[b], starts_k[b + 1])
        parts = attention(
            *(grad[None, at_q], q[None, at_q], k[None, at_k], v[None, at_k], out[None, at_q]),
            *(lse[None, :, at_q], softmax_scale, window_size),
        )
        for whole, part, at in zip(grads, parts, (at_q, at_k, at_k), strict=True):
            whole[at] = part[0]
    return grads[0], grads[1], grads[2]


def _norm_fp32(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Of x and weight in fp32, over the last dimension; weight is summed over all others."""
    inverse_rms = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    normed = x * inverse_rms
    weighted = grad * weight
    along = (weighted * normed).mean(-1, keepdim=True)
    grad_weight = (grad * normed).flatten(0, -2).sum(0)
    return inverse_rms * (weighted - normed * along), grad_weight
