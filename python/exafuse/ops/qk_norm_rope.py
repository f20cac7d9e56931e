"""QK-norm, RoPE and the cache write on the kernel of csrc/kernels/qk_norm_rope.cu, and gradients on
that of qk_norm_rope_backward.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by, with_rows
from exafuse.reference import backward
from exafuse.reference._check import check_buffers, check_heads
from exafuse.reference.qk_norm_rope import Qkv, qkv_parts


class RopeOps(FrontDoor):
    """The ops of this file, on one backend."""

    @documented_by(reference.qk_norm_rope)
    def qk_norm_rope(
        self,
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
        q, k, v = qkv_parts(qkv)
        outputs = q_out, k_out, v_out = check_buffers(out, 3)
        kernels = self.kernels(q, k, v, q_weight, k_weight, cos, sin, *outputs)
        if kernels is not None:
            try:
                value = v_out
                if q_out is None or k_out is None:
                    heads = num_heads if k is not None else num_heads + 2 * num_kv_heads
                    head_dim = _head_dim(q, heads)
                    q_out = q.new_empty((*q.shape[:1], num_heads, head_dim))
                    k_out = q.new_empty((*q.shape[:1], num_kv_heads, head_dim))
                kernels.qk_norm_rope(
                    *(q, k, v, num_heads, num_kv_heads, q_weight, k_weight),
                    *(cos, sin, positions, eps, q_out, k_out, v_out),
                )
                if value is None:  # the shapes are known to be right by now
                    tail = q[:, -num_kv_heads * k_out.shape[2] :] if v is None else v
                    return q_out, k_out, tail.view(k_out.shape)
                self.written(q_out, k_out, value)
                return q_out, k_out, value
            except kernels.NotAPlainTensor:
                pass
            except OverflowError:  # a number that C++ cannot hold
                check_heads(num_heads, num_kv_heads)
                raise
        return self.beyond(q, reference.qk_norm_rope)(
            *(qkv, num_heads, num_kv_heads, q_weight, k_weight, cos, sin, positions, eps), out=out
        )

    @documented_by(reference.qk_norm_rope_cache)
    def qk_norm_rope_cache(
        self,
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
        q, k, v = qkv_parts(qkv)
        kernels = self.kernels(*(q, k, v, q_weight, k_weight, cos, sin), k_cache, v_cache, out)
        if kernels is not None:
            try:
                q_out = out
                if q_out is None:
                    heads = num_heads if k is not None else num_heads + 2 * num_kv_heads
                    q_out = q.new_empty((*q.shape[:1], num_heads, _head_dim(q, heads)))
                kernels.qk_norm_rope_cache(
                    *(q, k, v, num_heads, num_kv_heads, q_weight, k_weight, cos, sin, positions),
                    *(eps, k_cache, v_cache, slot_mapping, q_out),
                )
                self.written(k_cache, v_cache, out)
                return q_out
            except kernels.NotAPlainTensor:
                pass
            except OverflowError:  # a number that C++ cannot hold
                check_heads(num_heads, num_kv_heads)
                raise
        return self.beyond(q, reference.qk_norm_rope_cache)(
            *(qkv, num_heads, num_kv_heads, q_weight, k_weight, cos, sin, positions, eps),
            k_cache=k_cache,
            v_cache=v_cache,
            slot_mapping=slot_mapping,
            out=out,
        )

    @documented_by(reference.apply_rope)
    def apply_rope(
        self,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        *,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        q_out, k_out = check_buffers(out, 2)
        kernels = self.kernels(q, k, cos, sin, q_out, k_out)
        if kernels is None:
            return self.beyond(q, reference.apply_rope)(q, k, cos, sin, positions, out=out)
        try:
            q_out = torch.empty_like(q) if q_out is None else q_out
            k_out = torch.empty_like(k) if k_out is None else k_out
            kernels.apply_rope(q, k, cos, sin, positions, q_out, k_out)
        except kernels.NotAPlainTensor:
            return self.beyond(q, reference.apply_rope)(q, k, cos, sin, positions, out=out)
        if out is not None:
            self.written(q_out, k_out)
        return q_out, k_out

    def qk_norm_rope_backward(
        self,
        grad_q: Tensor,
        grad_k: Tensor,
        grad_v: Tensor | None,
        q: Tensor | None,
        k: Tensor | None,
        q_weight: Tensor | None,
        k_weight: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
        positions: Tensor | None,
        eps: float,
        q_weight_grad: bool,
        k_weight_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of what ``qk_norm_rope`` was given.

        Args:
            grad_q: ``[num_tokens, num_heads, head_dim]``.
            grad_k: ``[num_tokens, num_kv_heads, head_dim]``.
            grad_v: as ``grad_k`` if the gradient of a packed ``qkv`` is wanted, None if those of q
                and k alone are: that of v is ``grad_v`` itself.
            q, k: as the gradients, what the op was given; None where there is no norm.
            q_weight ... eps: as in ``qk_norm_rope``.
            q_weight_grad, k_weight_grad: whether gradients of weights are wanted.

        Returns:
            Those of the packed ``qkv [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim]`` and
            an empty tensor, or of q and of k; then of ``q_weight`` and of ``k_weight``, empty
            tensors where they are not wanted.
        """
        kernels = self.kernels(grad_q, grad_k, grad_v, q, k, q_weight, k_weight)
        if kernels is not None:
            try:
                results, parts = _new_gradients(grad_q, grad_k, grad_v is not None)
                d_weights = [
                    torch.empty_like(weight, memory_format=torch.contiguous_format)
                    if weight is not None and wanted
                    else None
                    for weight, wanted in ((q_weight, q_weight_grad), (k_weight, k_weight_grad))
                ]
                workspace = None
                if any(x is not None for x in d_weights):
                    workspace = _weight_workspace(kernels, grad_q)
                kernels.qk_norm_rope_backward(
                    *(x if x is None else with_rows(x) for x in (grad_q, grad_k, grad_v)),
                    *(q, k, q_weight, k_weight, cos, sin, positions, eps),
                    *(workspace, *parts, *d_weights),
                )
                of_q, of_k = (grad_q.new_empty(0) if x is None else x for x in d_weights)
                return *results, of_q, of_k
            except kernels.NotAPlainTensor:
                pass
        rope = (cos, sin, positions, eps)
        d_q, d_q_weight = backward.norm_rope(grad_q, q, q_weight, *rope)
        d_k, d_k_weight = backward.norm_rope(grad_k, k, k_weight, *rope)
        of_q, of_k = (
            x if x is not None and wanted else grad_q.new_empty(0)
            for x, wanted in ((d_q_weight, q_weight_grad), (d_k_weight, k_weight_grad))
        )
        if grad_v is None:
            return d_q.flatten(1), d_k.flatten(1), of_q, of_k
        packed = torch.cat([x.flatten(1) for x in (d_q, d_k, grad_v)], 1)
        return packed, grad_q.new_empty(0), of_q, of_k


def _new_gradients(
    grad_q: Tensor, grad_k: Tensor, is_packed: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]:
    """The two tensors that the backward op returns, and its parts as heads: q, k and v."""
    num_tokens, num_heads, head_dim = grad_q.shape
    num_kv_heads = grad_k.shape[1]
    if not is_packed:
        d_q = grad_q.new_empty((num_tokens, num_heads * head_dim))
        d_k = grad_q.new_empty((num_tokens, num_kv_heads * head_dim))
        return (d_q, d_k), (d_q.view(grad_q.shape), d_k.view(grad_k.shape), None)
    heads = num_heads + 2 * num_kv_heads
    packed = grad_q.new_empty((num_tokens, heads * head_dim))
    views = packed.view(num_tokens, heads, head_dim)
    q, k, v = torch.split(views, [num_heads, num_kv_heads, num_kv_heads], 1)
    return (packed, grad_q.new_empty(0)), (q, k, v)


def _weight_workspace(kernels: Any, grad_q: Tensor) -> Tensor:
    sizes = grad_q.shape[0], grad_q.shape[2], grad_q.element_size()
    num_bytes = kernels.qk_norm_rope_backward_workspace(*sizes)
    return torch.empty(num_bytes // 4, dtype=torch.float32, device=grad_q.device)


def _head_dim(q: Tensor, heads: int) -> int:
    """Of outputs still to be made; the kernel's checks report a shape that makes no sense."""
    return q.shape[-1] // heads if q.dim() > 0 and heads > 0 else 0
