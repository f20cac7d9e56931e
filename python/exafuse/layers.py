"""The layers all text models share, written against a backend: ``exafuse.ops`` or its
reference."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor, nn

from exafuse import ops, reference
from exafuse.config import LayerPlan, ModelConfig
from exafuse.kv_cache import KVCache

BACKENDS = ("auto", "cuda", "emulated", "reference")


def resolve_backend(name: str) -> ModuleType:
    """The module of ops that ``backend=`` names."""
    if name not in BACKENDS:
        raise ValueError(f"backend: expected {', '.join(BACKENDS)}, got {name!r}")
    if name == "reference":
        return reference
    if name == "auto":
        return ops
    return ops.for_path(name)


@dataclass(frozen=True)
class Step:
    """What one pass over the layers needs beside the hidden states ``[num_tokens, hidden_size]``.

    Tokens are packed: rows of the batch one after the other, padding left out.
    """

    cos: Tensor  # fp32 [positions, head_dim / 2]
    sin: Tensor
    positions: Tensor  # int32 [num_tokens], table row of each token
    cu_seqlens: (
        Tensor | None
    )  # int32 [batch + 1]; None = every row brings the same number of tokens
    max_seqlen: int
    cache: KVCache | None
    slot_mappings: dict[int, Tensor]  # by the number of slots of a layer's cache


class RMSNorm(nn.Module):
    """The weight and eps of a norm; the layer that owns it calls the fused op that fits."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps


class Attention(nn.Module):
    """Merged projection, QK-norm and RoPE where the plan has them, attention, output
    projection."""

    def __init__(self, config: ModelConfig, plan: LayerPlan) -> None:
        super().__init__()
        self.index = plan.index
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        self.window_size = plan.window_size
        self.rope = plan.rope
        self.eps = config.rms_norm_eps
        heads = config.num_heads + 2 * config.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=config.o_bias
        )
        self.q_norm = RMSNorm(config.head_dim, self.eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, self.eps) if config.qk_norm else None

    def forward(self, x: Tensor, step: Step, backend: ModuleType) -> Tensor:
        """``x [num_tokens, hidden_size]`` -> the same shape."""
        prepare = (
            self.qkv_proj(x),
            self.num_heads,
            self.num_kv_heads,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            step.cos if self.rope else None,
            step.sin if self.rope else None,
            step.positions,
            self.eps,
        )
        if step.cache is None:
            assert step.cu_seqlens is not None
            q, k, v = backend.qk_norm_rope(*prepare)
            out = backend.flash_attn_varlen_func(
                q,
                k,
                v,
                step.cu_seqlens,
                step.cu_seqlens,
                step.max_seqlen,
                step.max_seqlen,
                causal=True,
                window_size=self.window_size,
            )
        else:
            cache = step.cache.layers[self.index]
            q = backend.qk_norm_rope_cache(
                *prepare,
                k_cache=cache.k,
                v_cache=cache.v,
                slot_mapping=step.slot_mappings[cache.k.shape[1]],
            )
            if step.cu_seqlens is None:
                q = q.view(-1, step.max_seqlen, self.num_heads, self.head_dim)
            out = backend.flash_attn_with_kvcache(
                q,
                cache.k,
                cache.v,
                cache_seqlens=step.cache.seqlens,
                causal=True,
                window_size=self.window_size,
                cu_seqlens_q=step.cu_seqlens,
                max_seqlen_q=step.max_seqlen,
                ring=cache.ring,
            )
        out_2d: Tensor = self.o_proj(out.reshape(x.shape[0], self.num_heads * self.head_dim))
        return out_2d


class MLP(nn.Module):
    """SwiGLU feed-forward: ``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = config.intermediate_size
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, backend: ModuleType) -> Tensor:
        """``x [num_tokens, hidden_size]`` -> the same shape."""
        out: Tensor = self.down_proj(backend.silu_and_mul(self.gate_up_proj(x)))
        return out
