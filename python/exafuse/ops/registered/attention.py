"""The attention ops as registered ops. The backward recomputes the probabilities from lse, in plain
PyTorch; a kernel for it can take its place behind the same schema."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse.ops.registered.library import (
    check_writable,
    differentiate,
    differentiate_once,
    direct,
    like,
    register,
    registered,
)
from exafuse.reference import backward
from exafuse.reference._check import (
    check_scale,
    check_tables_constant,
    check_window,
    deliver,
    needs_grad,
    refuse,
)
from exafuse.reference.attention import refuse_pages
from exafuse.reference.qk_norm_rope import rotate_fp32, split_qkv

_QKV = "Tensor q, Tensor k, Tensor v"
_WINDOW = "float softmax_scale, SymInt window_left, SymInt window_right"
_OFFSETS = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
_CACHE = (
    "Tensor? cache_seqlens, Tensor? cache_batch_idx, Tensor? cache_leftpad, Tensor? block_table,"
    f" {_WINDOW}, Tensor? cu_seqlens_q, SymInt? max_seqlen_q, bool ring"
)
_VISION = (
    "Tensor qkv, SymInt num_heads, SymInt num_kv_heads, Tensor cos, Tensor sin,"
    " Tensor cu_seqlens, SymInt max_seqlen, float softmax_scale"
)


def _lse(q: Tensor) -> Tensor:
    """[batch, num_heads, seqlen_q], or [num_heads, total_q] of packed queries."""
    *batch, tokens, heads, _ = q.shape
    return q.new_empty((*batch, heads, tokens), dtype=torch.float32)


def _run_func(
    q: Tensor, k: Tensor, v: Tensor, scale: float, left: int, right: int
) -> tuple[Tensor, Tensor]:
    out, lse, _ = direct.flash_attn_func(
        q, k, v, softmax_scale=scale, window_size=(left, right), return_attn_probs=True
    )
    return out, lse


def _run_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, max_q: int, max_k: int,
    scale: float, left: int, right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse, _ = direct.flash_attn_varlen_func(
        *(q, k, v, starts_q, starts_k, max_q, max_k),
        softmax_scale=scale,
        window_size=(left, right),
        return_attn_probs=True,
    )
    return out, lse


def _run_cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, seqlens: Tensor | None, rows: Tensor | None,
    leftpad: Tensor | None, pages: Tensor | None, scale: float, left: int, right: int,
    cu_seqlens_q: Tensor | None, max_seqlen_q: int | None, ring: bool,
    k: Tensor | None = None, v: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = direct.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=seqlens,
        cache_batch_idx=rows,
        cache_leftpad=leftpad,
        block_table=pages,
        softmax_scale=scale,
        window_size=(left, right),
        return_softmax_lse=True,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        ring=ring,
    )
    return out, lse


register(
    f"flash_attn_func({_QKV}, {_WINDOW}) -> (Tensor, Tensor)",
    _run_func,
    lambda q, *rest: (like(q), _lse(q)),
)
register(
    f"flash_attn_varlen_func({_QKV}, {_OFFSETS}, {_WINDOW}) -> (Tensor, Tensor)",
    _run_varlen,
    lambda q, *rest: (like(q), _lse(q)),
)
register(
    f"flash_attn_backward(Tensor grad, {_QKV}, Tensor out, Tensor lse, {_WINDOW})"
    " -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, out, lse, scale, left, right: backward.attention(
        grad, q, k, v, out, lse, scale, (left, right)
    ),
    lambda grad, q, k, v, *rest: (like(q), like(k), like(v)),
)
register(
    f"flash_attn_varlen_backward(Tensor grad, {_QKV}, Tensor out, Tensor lse, {_OFFSETS},"
    f" {_WINDOW}) -> (Tensor, Tensor, Tensor)",
    lambda grad, q, k, v, out, lse, starts_q, starts_k, max_q, max_k, scale, left, right: (
        backward.attention_varlen(grad, q, k, v, out, lse, starts_q, starts_k, scale, (left, right))
    ),
    lambda grad, q, k, v, *rest: (like(q), like(k), like(v)),
)
# Two ops, so that a call that appends nothing does not seem to write the caches.
register(
    f"flash_attn_with_kvcache(Tensor q, Tensor k_cache, Tensor v_cache, {_CACHE})"
    " -> (Tensor, Tensor)",
    _run_cache,
    lambda q, *rest: (like(q), _lse(q)),
)
register(
    f"flash_attn_append_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, {_CACHE},"
    " Tensor k, Tensor v) -> (Tensor, Tensor)",
    _run_cache,
    lambda q, *rest: (like(q), _lse(q)),
)
register(
    f"vision_attn({_VISION}) -> Tensor",
    lambda *arguments: direct.vision_attn(*arguments),
    lambda qkv, num_heads, num_kv_heads, *rest: qkv.new_empty(
        (qkv.shape[0], num_heads, qkv.shape[1] // (num_heads + 2 * num_kv_heads))
    ),
)


def _vision_backward(
    grad: Tensor, qkv: Tensor, num_heads: int, num_kv_heads: int, cos: Tensor, sin: Tensor,
    cu_seqlens: Tensor, max_seqlen: int, scale: float,
) -> Tensor:  # fmt: skip
    q, k, v = split_qkv(qkv, num_heads, num_kv_heads)
    q, k = (rotate_fp32(x.float(), cos.float(), sin.float()).to(x.dtype) for x in (q, k))
    starts = (cu_seqlens, cu_seqlens)
    out, lse = _run_varlen(q, k, v, *starts, max_seqlen, max_seqlen, scale, -1, -1)
    grads = backward.attention_varlen(grad, q, k, v, out, lse, *starts, scale, (-1, -1))
    unrotated = [rotate_fp32(x.float(), cos.float(), -sin.float()) for x in grads[:2]]
    return torch.cat([x.to(qkv.dtype).flatten(1) for x in (*unrotated, grads[2])], 1)


register(
    f"vision_attn_backward(Tensor grad, {_VISION}) -> Tensor",
    _vision_backward,
    lambda grad, qkv, *rest: like(qkv),
)


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.numbers = [x for x in inputs[3:] if not isinstance(x, Tensor)]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:3], *output, *(x for x in inputs[3:] if isinstance(x, Tensor)))


def _attention_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return (*registered.flash_attn_backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 3)


def _varlen_gradient(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    grads = registered.flash_attn_varlen_backward(grad, *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * 7)


def _save_vision(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.arguments = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))


def _vision_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    arguments = [next(saved) if x is None else x for x in ctx.arguments]
    return (registered.vision_attn_backward(grad, *arguments), *[None] * 7)


differentiate("flash_attn_func", _save_attention, _attention_gradient)
differentiate("flash_attn_varlen_func", _save_attention, _varlen_gradient)
differentiate("vision_attn", _save_vision, _vision_gradient)
differentiate_once("flash_attn_backward", of="flash_attn_func")
differentiate_once("flash_attn_varlen_backward", of="flash_attn_varlen_func")
differentiate_once("vision_attn_backward")


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
    """As :func:`exafuse.reference.flash_attn_func`."""
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    scale = check_scale(softmax_scale, q.shape[-1])
    window = check_window(window_size, causal)
    result, log_sums = registered.flash_attn_func(q, k, v, scale, *window)
    return _deliver(result, log_sums, out, lse, return_attn_probs)


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
    """As :func:`exafuse.reference.flash_attn_varlen_func`."""
    refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
    refuse_pages(block_table)
    scale = check_scale(softmax_scale, q.shape[-1])
    window = check_window(window_size, causal)
    offsets = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    result, log_sums = registered.flash_attn_varlen_func(q, k, v, *offsets, scale, *window)
    return _deliver(result, log_sums, out, lse, return_attn_probs)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    *,
    cache_seqlens: Tensor | int | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    return_softmax_lse: bool = False,
    cu_seqlens_q: Tensor | None = None,
    max_seqlen_q: int | None = None,
    ring: bool = False,
    out: Tensor | None = None,
    lse: Tensor | None = None,
    **others: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """As :func:`exafuse.reference.flash_attn_with_kvcache`."""
    others.pop("num_splits", None)
    refuse(**{name: value for name, value in others.items() if name != "rotary_interleaved"})
    if needs_grad(q, k, v, k_cache, v_cache):
        raise ValueError("flash_attn_with_kvcache has no gradient: call it under torch.no_grad()")
    scale = check_scale(softmax_scale, q.shape[-1])
    window = check_window(window_size, causal)
    if isinstance(cache_seqlens, int):
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        cache_seqlens = q.new_full((batch,), cache_seqlens, dtype=torch.int32)
    tables = (cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    arguments = (q, k_cache, v_cache, *tables, scale, *window, cu_seqlens_q, max_seqlen_q, ring)
    if k is None:
        result, log_sums = registered.flash_attn_with_kvcache(*arguments)
    else:
        check_writable(k_cache=k_cache, v_cache=v_cache)
        result, log_sums = registered.flash_attn_append_kvcache(*arguments, k, v)
    result = deliver(result, out)
    if lse is not None:
        log_sums = deliver(log_sums, lse, "lse")
    return (result, log_sums) if return_softmax_lse else result


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
    """As :func:`exafuse.reference.vision_attn`."""
    head_dim = qkv.shape[1] // (num_heads + 2 * num_kv_heads)
    scale = check_scale(softmax_scale, head_dim)
    check_tables_constant(cos, sin)
    heads = (qkv, num_heads, num_kv_heads)
    return deliver(registered.vision_attn(*heads, cos, sin, cu_seqlens, max_seqlen, scale), out)


def _deliver(
    result: Tensor, log_sums: Tensor, out: Tensor | None, lse: Tensor | None, with_lse: bool
) -> Tensor | tuple[Tensor, Tensor, None]:
    result = deliver(result, out)
    if lse is not None:
        log_sums = deliver(log_sums, lse, "lse")
    return (result, log_sums, None) if with_lse else result
