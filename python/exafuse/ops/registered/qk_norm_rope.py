"""qk_norm_rope, its cache-writing form and apply_rope as registered ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse.ops.registered.library import (
    check_writable,
    differentiate,
    direct,
    like,
    register,
    registered,
)
from exafuse.reference import backward
from exafuse.reference._check import check_buffers, check_tables_constant, deliver, needs_grad
from exafuse.reference.qk_norm_rope import Qkv, qkv_parts, split_qkv

_QKV = "Tensor q, Tensor? k, Tensor? v, SymInt num_heads, SymInt num_kv_heads"
_ROPE = "Tensor? q_weight, Tensor? k_weight, Tensor? cos, Tensor? sin, Tensor? positions, float eps"


def _parts(
    q: Tensor, k: Tensor | None, v: Tensor | None, num_heads: int, num_kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Views [num_tokens, heads, head_dim] of the packed tensor or the triple."""
    return split_qkv(q if k is None or v is None else (q, k, v), num_heads, num_kv_heads)


def _run(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    qkv = q if k is None or v is None else (q, k, v)
    given = {x.untyped_storage().data_ptr() for x in (q, k, v) if x is not None}
    # v always is a view of the input, q and k are where there is neither norm nor rotation.
    return tuple(
        x.clone(memory_format=torch.contiguous_format)
        if x.untyped_storage().data_ptr() in given
        else x
        for x in direct.qk_norm_rope(qkv, *rest)
    )


def _run_cache(q: Tensor, k: Tensor | None, v: Tensor | None, *rest: Any) -> Tensor:
    *arguments, k_cache, v_cache, slot_mapping = rest
    qkv = q if k is None or v is None else (q, k, v)
    out: Tensor = direct.qk_norm_rope_cache(
        qkv, *arguments, k_cache=k_cache, v_cache=v_cache, slot_mapping=slot_mapping
    )
    return out


def _backward(
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    *rope: Any,
) -> tuple[Tensor, ...]:
    q_part, k_part, _ = _parts(q, k, v, num_heads, num_kv_heads)
    d_q, d_q_weight = backward.norm_rope(grad_q, q_part, q_weight, *rope)
    d_k, d_k_weight = backward.norm_rope(grad_k, k_part, k_weight, *rope)
    inputs = [x.flatten(1) for x in (d_q, d_k, grad_v)]
    if k is None:
        inputs = [torch.cat(inputs, 1), grad_q.new_empty(0), grad_q.new_empty(0)]
    weights = [x if x is not None else grad_q.new_empty(0) for x in (d_q_weight, d_k_weight)]
    given = {x.untyped_storage().data_ptr() for x in (grad_q, grad_k, grad_v)}
    return tuple(
        x.clone() if x.untyped_storage().data_ptr() in given and x.numel() else x
        for x in (*inputs, *weights)
    )


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor, q: Tensor, k: Tensor | None, v: Tensor | None,
    num_heads: int, num_kv_heads: int, q_weight: Tensor | None, k_weight: Tensor | None, *rope: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    given = (q, k, v, q_weight, k_weight)
    return tuple(grad_q.new_empty(0) if x is None else like(x) for x in given)


register(
    f"qk_norm_rope({_QKV}, {_ROPE}) -> (Tensor, Tensor, Tensor)",
    _run,
    lambda q, k, v, num_heads, num_kv_heads, *rest: tuple(
        map(like, _parts(q, k, v, num_heads, num_kv_heads))
    ),
)
register(
    f"qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor grad_v, {_QKV}, {_ROPE})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
register(
    f"qk_norm_rope_cache({_QKV}, {_ROPE}, Tensor(a!) k_cache, Tensor(b!) v_cache,"
    " Tensor slot_mapping) -> Tensor",
    _run_cache,
    lambda q, k, v, num_heads, num_kv_heads, *rest: like(
        _parts(q, k, v, num_heads, num_kv_heads)[0]
    ),
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors = (*inputs[:3], *inputs[5:10])
    ctx.given = tuple(x is not None for x in tensors)
    ctx.heads, ctx.eps = inputs[3:5], inputs[10]
    ctx.save_for_backward(*(x for x in tensors if x is not None))


def _gradient(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    tensors = [next(saved) if given else None for given in ctx.given]
    results = registered.qk_norm_rope_backward(
        *grads, *tensors[:3], *ctx.heads, *tensors[3:], ctx.eps
    )
    d = [x if given else None for x, given in zip(results, ctx.given[:5], strict=True)]
    return (*d[:3], None, None, *d[3:], None, None, None, None)


differentiate("qk_norm_rope", _save, _gradient)


def qk_norm_rope(
    qkv: Qkv, *arguments: Any, out: tuple[Tensor, Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`exafuse.reference.qk_norm_rope`, v in memory of its own."""
    check_tables_constant(*arguments[4:6])
    results = registered.qk_norm_rope(*qkv_parts(qkv), *arguments)
    q, k, v = _deliver_all(results, out)
    return q, k, v


def qk_norm_rope_cache(
    qkv: Qkv,
    *arguments: Any,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`exafuse.reference.qk_norm_rope_cache`."""
    q, k, v = qkv_parts(qkv)
    check_tables_constant(*arguments[4:6])
    if needs_grad(q, k, v, k_cache, v_cache, *arguments[2:4]):
        raise ValueError("qk_norm_rope_cache has no gradient: call it under torch.no_grad()")
    check_writable(k_cache=k_cache, v_cache=v_cache)
    result = registered.qk_norm_rope_cache(q, k, v, *arguments, k_cache, v_cache, slot_mapping)
    return deliver(result, out)


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    *,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """As :func:`exafuse.reference.apply_rope`: :func:`qk_norm_rope` without norms."""
    check_tables_constant(cos, sin)
    packed = (q.flatten(1), k.flatten(1), k.flatten(1))
    heads = q.shape[1], k.shape[1]
    results = registered.qk_norm_rope(*packed, *heads, None, None, cos, sin, positions, 0.0)
    q, k = _deliver_all(results[:2], out)
    return q, k


def _deliver_all(results: tuple[Tensor, ...], out: Any) -> list[Tensor]:
    buffers = check_buffers(out, len(results))
    return [deliver(x, buffers[i], f"out[{i}]") for i, x in enumerate(results)]
