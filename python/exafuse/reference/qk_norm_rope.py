"""Per-head RMSNorm of queries and keys, then rotary position embedding (RoPE, Su et al. 2021)."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse.reference._check import (
    Shapes,
    check_buffers,
    check_device,
    check_eps,
    check_float,
    check_heads,
    check_tables_constant,
    deliver,
    needs_grad,
)
from exafuse.reference.rms_norm import norm_fp32

Qkv = Tensor | tuple[Tensor, Tensor, Tensor]


def qkv_parts(qkv: Qkv) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(q, k, v)`` of a triple; of a packed tensor, itself and None."""
    if isinstance(qkv, Tensor):
        return qkv, None, None
    if not isinstance(qkv, tuple) or len(qkv) != 3:
        raise TypeError(
            f"qkv: expected a torch.Tensor or a tuple of q, k and v, got {type(qkv).__name__}"
        )
    return qkv


def split_qkv(qkv: Qkv, num_heads: int, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``[num_tokens, heads, head_dim]`` of q, k and v from the packed tensor or the
    triple."""
    check_heads(num_heads, num_kv_heads)
    total_heads = num_heads + 2 * num_kv_heads
    shapes = Shapes()
    if isinstance(qkv, Tensor):
        check_float("qkv", qkv)
        if qkv.dim() != 2 or qkv.shape[1] % total_heads:
            raise ValueError(
                "qkv: expected (num_tokens, (num_heads + 2 * num_kv_heads) * head_dim) with "
                f"{total_heads} heads in all, got {tuple(qkv.shape)}"
            )
        head_dim = qkv.shape[1] // total_heads
        packed = qkv.view(-1, total_heads, head_dim)
        last_k = num_heads + num_kv_heads
        return packed[:, :num_heads], packed[:, num_heads:last_k], packed[:, last_k:]
    q, _, _ = qkv_parts(qkv)
    check_float("q", q)
    split = []
    for name, tensor, heads in zip(
        "qkv", qkv, (num_heads, num_kv_heads, num_kv_heads), strict=True
    ):
        check_float(name, tensor, q.dtype)
        check_device(q.device, **{name: tensor})
        if tensor.dim() != 2 or tensor.shape[1] % heads:
            raise ValueError(
                f"{name}: expected (num_tokens, {heads} * head_dim), got {tuple(tensor.shape)}"
            )
        split.append(tensor.view(tensor.shape[0], heads, tensor.shape[1] // heads))
        shapes.match(name, split[-1], "num_tokens", heads, "head_dim")
    return split[0], split[1], split[2]


def rotate_fp32(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs ``(i, i + head_dim / 2)`` of ``x [num_tokens, heads, head_dim]`` in fp32."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    rotated = torch.addcmul(first * cos, second, sin, value=-1)
    return torch.cat((rotated, torch.addcmul(second * cos, first, sin)), dim=-1)


def _rows(
    cos: Tensor | None, sin: Tensor | None, positions: Tensor | None, q: Tensor
) -> tuple[Tensor, Tensor] | None:
    """fp32 cos and sin ``[num_tokens, head_dim / 2]`` of each token, or None without RoPE."""
    check_tables_constant(cos, sin)
    num_tokens, _, head_dim = q.shape
    if cos is None or sin is None:
        if cos is not None or sin is not None:
            raise ValueError("cos, sin: expected both tables or neither")
        return None
    if positions is None:
        raise ValueError(
            "positions: expected int32 (num_tokens,) when cos and sin are given, got None"
        )
    shapes = Shapes(num_tokens=num_tokens)
    shapes.match("positions", positions, "num_tokens")
    check_float("positions", positions, torch.int32)
    check_float("cos", cos)
    check_float("sin", sin, cos.dtype)
    shapes.match("cos", cos, "rows", head_dim // 2)
    shapes.match("sin", sin, "rows", head_dim // 2)
    check_device(q.device, cos=cos, sin=sin, positions=positions)
    if positions.device.type == "cpu" and num_tokens:
        low, high = (int(bound) for bound in positions.aminmax())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(
                f"positions: expected rows 0 to {cos.shape[0] - 1} of the tables, "
                f"got {low} to {high}"
            )
    return cos.index_select(0, positions).float(), sin.index_select(0, positions).float()


def _norm_rope(
    x: Tensor, weight: Tensor | None, rows: tuple[Tensor, Tensor] | None, eps: float
) -> Tensor:
    if weight is None and rows is None:
        return x
    if weight is not None:
        check_float("q_weight, k_weight", weight, x.dtype, torch.float32)
        Shapes(head_dim=x.shape[-1]).match("q_weight, k_weight", weight, "head_dim")
        check_device(x.device, **{"q_weight, k_weight": weight})
    y = x.float() if weight is None else norm_fp32(x, weight, eps)
    if rows is not None:
        y = rotate_fp32(y, *rows)
    return y.to(x.dtype)


def qk_norm_rope(
    qkv: Qkv,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
    *,
    out: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a merged projection and prepare q and k for attention in one pass.

    Args:
        qkv: ``[num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]``, or a tuple of q, k, v,
            each ``[num_tokens, heads * head_dim]`` with any row stride; head_dim a multiple of 8
            up to 128 on a GPU.
        num_heads, num_kv_heads: query heads and key/value heads.
        q_weight, k_weight: RMSNorm weights ``[head_dim]`` shared by all heads; None = no norm.
        cos, sin: ``[rows, head_dim / 2]``, fp32 or the dtype of ``qkv``; None = no RoPE.
        positions: int32 ``[num_tokens]``, the table row of each token.
        eps: of the norm.
        out: optional buffers for q, k, v; each may be its own part of the input.

    Returns:
        ``q [num_tokens, num_heads, head_dim]``, ``k`` and ``v [num_tokens, num_kv_heads,
        head_dim]``. Norm and rotation run in fp32 and are rounded once together; v is a view of
        the input unless ``out`` is given.
    """
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    check_eps(eps)
    rows = _rows(cos, sin, positions, q)
    if isinstance(qkv, Tensor) and q_weight is None and k_weight is None and rows is not None:
        # Without norms q and k are one run of heads: half the work on short inputs.
        heads = qkv.view(q.shape[0], num_heads + 2 * num_kv_heads, q.shape[2])[
            :, : num_heads + num_kv_heads
        ]
        heads = _norm_rope(heads, None, rows, eps)
        q, k = heads[:, :num_heads], heads[:, num_heads:]
    else:
        q, k = _norm_rope(q, q_weight, rows, eps), _norm_rope(k, k_weight, rows, eps)
    q_out, k_out, v_out = check_buffers(out, 3)
    return deliver(q, q_out, "out[0]"), deliver(k, k_out, "out[1]"), deliver(v, v_out, "out[2]")


def qk_norm_rope_cache(
    qkv: Qkv,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
    *,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """``qk_norm_rope`` that writes k and v into the cache instead of returning them.

    Args:
        qkv ... eps: as in :func:`qk_norm_rope`.
        k_cache, v_cache: ``[rows, slots, num_kv_heads, head_dim]``, any strides with last 1;
            mutated.
        slot_mapping: int64 ``[num_tokens]``, ``row * slots + slot``; negative or out of range =
            not written; no value twice.
        out: optional buffer for q; may be the q part of the input.

    Returns:
        ``q [num_tokens, num_heads, head_dim]``. Inference only: a needed gradient is a ValueError.
    """
    inputs = qkv if isinstance(qkv, tuple) else (qkv,)
    if needs_grad(*inputs, q_weight, k_weight, k_cache, v_cache):
        raise ValueError(
            "qk_norm_rope_cache writes the cache in place and has no gradient: "
            "call it under torch.no_grad(), or use qk_norm_rope"
        )
    q, k, v = qk_norm_rope(
        qkv, num_heads, num_kv_heads, q_weight, k_weight, cos, sin, positions, eps
    )
    write_cache(k, v, k_cache, v_cache, slot_mapping)
    return deliver(q, out)


def write_cache(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Scatter ``k, v [num_tokens, num_kv_heads, head_dim]`` to their slots; others are left
    alone."""
    shapes = Shapes(num_tokens=k.shape[0], num_kv_heads=k.shape[1], head_dim=k.shape[2])
    check_float("k_cache", k_cache, k.dtype)
    check_float("v_cache", v_cache, k.dtype)
    shapes.match("k_cache", k_cache, "rows", "slots", "num_kv_heads", "head_dim")
    shapes.match("v_cache", v_cache, "rows", "slots", "num_kv_heads", "head_dim")
    shapes.match("slot_mapping", slot_mapping, "num_tokens")
    check_float("slot_mapping", slot_mapping, torch.int64)
    check_device(k.device, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping)
    rows, slots = k_cache.shape[:2]
    if slot_mapping.numel() == 0 or rows * slots == 0:
        return
    valid = (slot_mapping >= 0) & (slot_mapping < rows * slots)
    if not slot_mapping.is_cuda:
        if not valid.all():
            k, v, slot_mapping = k[valid], v[valid], slot_mapping[valid]
    else:
        k, v, slot_mapping = _redirected(k, v, slot_mapping, valid, k_cache, v_cache)
    for cache, new in ((k_cache, k), (v_cache, v)):
        if cache.stride(0) == slots * cache.stride(1):
            cache.view(rows * slots, *cache.shape[2:]).index_copy_(0, slot_mapping, new)
        else:
            cache.index_put_((slot_mapping // slots, slot_mapping % slots), new)


def _redirected(
    k: Tensor, v: Tensor, slot_mapping: Tensor, valid: Tensor, k_cache: Tensor, v_cache: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The same writes without any that is not valid, and without a look at the device.

    Tokens that are not written repeat the write of the first one that is; where there is none, they
    write to slot 0 what it holds.
    """
    token = valid.int().argmax(0, keepdim=True)
    slot = slot_mapping.index_select(0, token).where(valid.any(), 0)
    first = [
        new.index_select(0, token).where(valid.any(), cache[0, :1])
        for cache, new in ((k_cache, k), (v_cache, v))
    ]
    k, v = (
        new.where(valid[:, None, None], other) for new, other in zip((k, v), first, strict=True)
    )
    return k, v, slot_mapping.where(valid, slot)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Rotate q and k; 2-D RoPE is the same op with another table.

    Args:
        q: ``[num_tokens, num_heads, head_dim]``.
        k: ``[num_tokens, num_kv_heads, head_dim]``.
        cos, sin: ``[rows, head_dim / 2]``, fp32 or the dtype of q.
        positions: int32 ``[num_tokens]``, the table row of each token.
        out: optional ``(q, k)`` buffers; may be ``(q, k)`` themselves.

    Returns:
        The rotated pair, fp32 inside, rounded once.
    """
    check_float("q", q)
    check_float("k", k, q.dtype)
    shapes = Shapes()
    shapes.match("q", q, "num_tokens", "num_heads", "head_dim")
    shapes.match("k", k, "num_tokens", "num_kv_heads", "head_dim")
    check_device(q.device, k=k)
    rows = _rows(cos, sin, positions, q)
    q_out, k_out = check_buffers(out, 2)
    return (
        deliver(_norm_rope(q, None, rows, 0.0), q_out, "out[0]"),
        deliver(_norm_rope(k, None, rows, 0.0), k_out, "out[1]"),
    )
