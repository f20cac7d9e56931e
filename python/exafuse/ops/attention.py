"""The attention ops on the kernels of csrc/kernels/attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from exafuse import reference
from exafuse.ops.front_door import FrontDoor, P, R, documented_by, is_traced
from exafuse.reference._cache_check import check_longest, lengths_of
from exafuse.reference._check import check_count, check_heads, check_scale, check_window, refuse
from exafuse.reference.attention import refuse_pages

DECODE_QUERIES = 16  # up to as many queries a sequence, the decode kernel reads the keys faster


class Beyond(Protocol):
    """:meth:`FrontDoor.beyond`, or what stands for it."""

    def __call__(self, first: Tensor, definition: Callable[P, R], /) -> Callable[P, R]: ...


class AttentionOps(FrontDoor):
    """The ops of this file, on one backend."""

    @documented_by(reference.flash_attn_func)
    def flash_attn_func(
        self,
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
        kernels, fallback = self._attention_kernels("flash_attn_func", q, k, v, out, lse)
        if kernels is not None:
            refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
            left, right = check_window(window_size, causal)
            scale = check_scale(softmax_scale, q.shape[-1] if q.shape else 1)
            try:
                result = q.new_empty(q.shape) if out is None else out
                sums = _lse(q, lse, return_attn_probs)
                rest = (scale, left, right)
                if q.dim() == 4 and q.shape[1] <= DECODE_QUERIES:
                    self._few_queries(kernels, q, k, v, *rest, result, sums)
                else:
                    kernels.flash_attn_func(q, k, v, *rest, result, sums)
                self.written(out, lse)
                return (result, sums, None) if return_attn_probs and sums is not None else result
            except kernels.NotAPlainTensor:
                pass
        return fallback(q, reference.flash_attn_func)(
            *(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes),
            *(deterministic, return_attn_probs),
            out=out,
            lse=lse,
        )

    def _few_queries(
        self,
        kernels: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        left: int,
        right: int,
        out: Tensor,
        lse: Tensor | None,
    ) -> None:
        """flash_attn_func by the decode kernel: keys and values as a cache that is full."""
        workspace = _cache_workspace(kernels, q, None, k, None, left)
        try:
            kernels.flash_attn_with_kvcache(
                *(q, k, v, None, None, None, None, None, None, scale, left, right, None, 0, False),
                *(workspace, out, lse),
            )
        except kernels.NotAPlainTensor:
            raise
        except (ValueError, TypeError):  # names a cache that the caller knows nothing of
            kernels.flash_attn_func(q, k, v, scale, left, right, out, lse)
            raise

    @documented_by(reference.flash_attn_varlen_func)
    def flash_attn_varlen_func(
        self,
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
        kernels, fallback = self._attention_kernels("flash_attn_varlen_func", q, k, v, out, lse)
        if kernels is not None:
            refuse(dropout_p=dropout_p, softcap=softcap, alibi_slopes=alibi_slopes)
            refuse_pages(block_table)
            left, right = check_window(window_size, causal)
            scale = check_scale(softmax_scale, q.shape[-1] if q.shape else 1)
            check_count("max_seqlen_q", max_seqlen_q)
            check_count("max_seqlen_k", max_seqlen_k)
            try:
                result = q.new_empty(q.shape) if out is None else out
                sums = _lse(q, lse, return_attn_probs)
                kernels.flash_attn_varlen_func(
                    *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q),
                    *(scale, left, right, result, sums),
                )
                self.written(out, lse)
                return (result, sums, None) if return_attn_probs and sums is not None else result
            except kernels.NotAPlainTensor:
                pass
        return fallback(q, reference.flash_attn_varlen_func)(
            *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p),
            *(softmax_scale, causal, window_size, softcap, alibi_slopes, deterministic),
            *(return_attn_probs, block_table),
            out=out,
            lse=lse,
        )

    @documented_by(reference.flash_attn_with_kvcache)
    def flash_attn_with_kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None = None,
        v: Tensor | None = None,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        cache_seqlens: Tensor | int | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        block_table: Tensor | None = None,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        rotary_interleaved: bool = True,
        alibi_slopes: Tensor | None = None,
        num_splits: int = 0,
        return_softmax_lse: bool = False,
        *,
        cu_seqlens_q: Tensor | None = None,
        max_seqlen_q: int | None = None,
        ring: bool = False,
        out: Tensor | None = None,
        lse: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        kernels, fallback = self._attention_kernels(
            "flash_attn_with_kvcache", q, k_cache, v_cache, k, v, out, lse
        )
        if kernels is not None:
            if rotary_cos is not None or rotary_sin is not None:
                refuse(rotary_cos=rotary_cos, rotary_sin=rotary_sin)
            if type(softcap) is not float or softcap or alibi_slopes is not None:
                refuse(softcap=softcap, alibi_slopes=alibi_slopes)
            left, right = check_window(window_size, causal)
            shape = q.shape
            scale = check_scale(softmax_scale, shape[-1] if shape else 1)
            if cu_seqlens_q is not None:
                max_seqlen_q = check_longest(max_seqlen_q)
            lengths = cache_seqlens
            if lengths is not None and not isinstance(lengths, Tensor):
                batch = shape[0] if cu_seqlens_q is None else len(cu_seqlens_q) - 1
                lengths = lengths_of(lengths, batch, q.device)
            try:
                result = q.new_empty(q.shape) if out is None else out
                sums = _lse(q, lse, return_softmax_lse)
                workspace = _cache_workspace(kernels, q, max_seqlen_q, k_cache, block_table, left)
                kernels.flash_attn_with_kvcache(
                    *(q, k_cache, v_cache, k, v, lengths, cache_batch_idx, cache_leftpad),
                    *(block_table, scale, left, right, cu_seqlens_q, max_seqlen_q or 0, bool(ring)),
                    *(workspace, result, sums),
                )
                self.written(out, lse)
                if k is not None:
                    self.written(k_cache, v_cache)
                return (result, sums) if return_softmax_lse and sums is not None else result
            except kernels.NotAPlainTensor:
                pass
        return fallback(q, reference.flash_attn_with_kvcache)(
            *(q, k_cache, v_cache, k, v),
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            cache_leftpad=cache_leftpad,
            block_table=block_table,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            return_softmax_lse=return_softmax_lse,
            cu_seqlens_q=cu_seqlens_q,
            max_seqlen_q=max_seqlen_q,
            ring=ring,
            out=out,
            lse=lse,
        )

    @documented_by(reference.vision_attn)
    def vision_attn(
        self,
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
        kernels, fallback = self._attention_kernels("vision_attn", qkv, cos, sin, out)
        if kernels is not None:
            check_heads(num_heads, num_kv_heads)
            check_count("max_seqlen", max_seqlen)
            num_tokens, width = qkv.shape if qkv.dim() == 2 else (0, 0)
            head_dim = width // (num_heads + 2 * num_kv_heads)
            scale = check_scale(softmax_scale, head_dim or 1)
            try:
                result = out
                if result is None:
                    result = qkv.new_empty((num_tokens, num_heads, head_dim))
                num_bytes = kernels.vision_attn_workspace(
                    num_tokens, num_heads, num_kv_heads, head_dim, max_seqlen
                )
                kernels.vision_attn(
                    *(qkv, num_heads, num_kv_heads, cos, sin, cu_seqlens, max_seqlen, scale),
                    *(_workspace(qkv, num_bytes), result),
                )
                self.written(out)
                return result
            except kernels.NotAPlainTensor:
                pass
        return fallback(qkv, reference.vision_attn)(
            *(qkv, num_heads, num_kv_heads, cos, sin, cu_seqlens, max_seqlen, softmax_scale),
            out=out,
        )

    def _attention_kernels(self, op: str, q: Tensor, *others: Tensor | None) -> tuple[Any, Beyond]:
        """The extension for a call of ``op``, or None, and who takes it otherwise."""
        kernels = self.kernels(q, *others)
        if kernels is None:
            return None, self.beyond
        if q.dtype is torch.float32:
            self.say_once(f"{op} has no kernel for float32: it runs in plain PyTorch")
            return None, self.beyond if is_traced(q) else _plain
        return kernels, self.beyond


def _plain(_: Tensor, definition: Callable[P, R]) -> Callable[P, R]:
    return definition


def _lse(q: Tensor, lse: Tensor | None, wanted: bool) -> Tensor | None:
    """``[batch, num_heads, seqlen_q]`` or ``[num_heads, total_q]``, if it is wanted."""
    if lse is not None or not wanted:
        return lse
    shape = (*q.shape[:-3], *q.shape[-2:-1], *q.shape[-3:-2])
    return torch.empty(shape, dtype=torch.float32, device=q.device)


def _workspace(q: Tensor, num_bytes: int) -> Tensor | None:
    if num_bytes == 0:
        return None
    return torch.empty(num_bytes // 4, dtype=torch.float32, device=q.device)


def _cache_workspace(
    kernels: Any,
    q: Tensor,
    max_seqlen_q: int | None,
    k_cache: Tensor,
    block_table: Tensor | None,
    left: int,
) -> Tensor | None:
    """What flash_attn_with_kvcache needs. None as well for shapes that make no sense: the kernel's
    checks report those."""
    shape = q.shape
    try:
        capacity = k_cache.shape[1]
        if block_table is not None:
            capacity *= block_table.shape[1]
        if len(shape) == 4:
            sizes = (shape[0] * shape[1], shape[1], shape[2], shape[3], capacity, left)
        else:
            sizes = (shape[0], max_seqlen_q or 0, shape[1], shape[2], capacity, left)
    except (AttributeError, IndexError):
        return None
    return _workspace(q, _cache_workspace_bytes(kernels.flash_attn_with_kvcache_workspace, *sizes))


@functools.lru_cache(maxsize=4096)
def _cache_workspace_bytes(function: Any, *sizes: int) -> int:
    """The sizes of a decode step come again for every layer and every token."""
    return int(function(*sizes))
