"""qk_norm_rope, its cache-writing form and apply_rope as registered ops."""

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
    like_if,
    register,
    registered,
)
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


def _fake_backward(
    grad_q: Tensor, grad_k: Tensor, grad_v: Tensor | None, q: Tensor | None, k: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, cos: Any, sin: Any, positions: Any,
    eps: float, q_weight_grad: bool, k_weight_grad: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    num_tokens, num_heads, head_dim = grad_q.shape
    num_kv_heads = grad_k.shape[1]
    if grad_v is None:
        d_q = grad_q.new_empty((num_tokens, num_heads * head_dim))
        d_k = grad_q.new_empty((num_tokens, num_kv_heads * head_dim))
    else:
        d_q = grad_q.new_empty((num_tokens, (num_heads + 2 * num_kv_heads) * head_dim))
        d_k = grad_q.new_empty(0)
    of_weights = (
        grad_q.new_empty(0) if weight is None else like_if(wanted, weight)
        for weight, wanted in ((q_weight, q_weight_grad), (k_weight, k_weight_grad))
    )
    return d_q, d_k, *of_weights


register(
    f"qk_norm_rope({_QKV}, {_ROPE}) -> (Tensor, Tensor, Tensor)",
    _run,
    lambda q, k, v, num_heads, num_kv_heads, *rest: tuple(
        map(like, _parts(q, k, v, num_heads, num_kv_heads))
    ),
)
register(
    "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, Tensor? grad_v, Tensor? q, Tensor? k,"
    f" {_ROPE}, bool q_weight_grad, bool k_weight_grad) -> (Tensor, Tensor, Tensor, Tensor)",
    lambda *arguments: direct.qk_norm_rope_backward(*arguments),
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
    q, k, _, *heads, q_weight, k_weight, cos, sin, positions, ctx.eps = inputs
    ctx.heads, ctx.packed = heads, k is None
    # What has no norm is not needed: a rotation is undone without it. Nor is v.
    if ctx.packed:
        q = q if q_weight is not None or k_weight is not None else None
    else:
        q, k = q if q_weight is not None else None, k if k_weight is not None else None
    tensors = (q, k, q_weight, k_weight, cos, sin, positions)
    ctx.given = tuple(x is not None for x in tensors)
    ctx.save_for_backward(*(x for x in tensors if x is not None))


def _gradient(ctx: Any, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
    saved = iter(ctx.saved_tensors)
    q, k, q_weight, k_weight, *table = (next(saved) if given else None for given in ctx.given)
    if ctx.packed and q is not None:
        q, k, _ = _parts(q, None, None, *ctx.heads)
    else:
        q, k = (x if x is None else x.unflatten(1, (-1, grad_q.shape[2])) for x in (q, k))
    wanted = ctx.needs_input_grad[5:7]
    d_q, d_k, *d_weights = registered.qk_norm_rope_backward(
        *(grad_q, grad_k, grad_v if ctx.packed else None),
        *(q if q_weight is not None else None, k if k_weight is not None else None),
        *(q_weight, k_weight, *table, ctx.eps, *wanted),
    )
    inputs = (d_q, None, None) if ctx.packed else (d_q, d_k, grad_v.flatten(1))
    of_weights = (x if is_wanted else None for x, is_wanted in zip(d_weights, wanted, strict=True))
    return (*inputs, None, None, *of_weights, None, None, None, None)


differentiate("qk_norm_rope", _save, _gradient)
differentiate_once("qk_norm_rope_backward")


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
