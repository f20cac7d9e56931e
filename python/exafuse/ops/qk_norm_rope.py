"""QK-norm, RoPE and the cache write on the kernel of csrc/kernels/qk_norm_rope.cu."""

from __future__ import annotations

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, documented_by
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


def _head_dim(q: Tensor, heads: int) -> int:
    """Of outputs still to be made; the kernel's checks report a shape that makes no sense."""
    return q.shape[-1] // heads if q.dim() > 0 and heads > 0 else 0
