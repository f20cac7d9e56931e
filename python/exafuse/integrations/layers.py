"""The forward methods that :func:`exafuse.patch` gives to the layers of transformers models.

Each takes the backend's ops, ``self`` (the transformers layer, whose own parameters and submodules
it uses, so that quantised, wrapped, sharded and offloaded ones go on working) and what the original
takes. A norm whose weight may be elsewhere between its own calls, or that somebody listens to, is
called as it is instead of fused.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from exafuse.integrations.transformers import NAME, attention, say_once

# On a patched layer: what stood in its __dict__ as forward. On that forward: that it is ours.
FORWARD = "_exafuse_forward"


class RopeRows(NamedTuple):
    """What a patched rotary embedding gives to the layers, instead of (cos, sin).

    ``cos, sin [rows, head_dim / 2]``: the rows that transformers computed, whose second half
    repeats the first; ``positions`` int32 ``[batch * seqlen]``: the row of each token.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor


def rope_rows(cos: Tensor, sin: Tensor, batch: int, seqlen: int) -> RopeRows:
    """``cos, sin [batch or 1, seqlen, head_dim]`` as the rope kernel reads them, without a copy of
    the tables."""
    half = cos.shape[-1] // 2
    rows = torch.arange(cos.shape[0] * seqlen, dtype=torch.int32, device=cos.device)
    if cos.shape[0] != batch:
        rows = rows.repeat(batch)
    return RopeRows(cos.flatten(0, 1)[:, :half], sin.flatten(0, 1)[:, :half], rows)


def rotary_embedding(ops: ModuleType, self: nn.Module, *args: Any, **kwargs: Any) -> RopeRows:
    """The tables of the original, arranged once for all layers."""
    x = args[0] if args else kwargs["x"]
    cos, sin = type(self).forward(self, *args, **kwargs)
    return rope_rows(cos, sin, x.shape[0], x.shape[1])


def rms_norm(ops: ModuleType, self: Any, hidden_states: Tensor) -> Tensor:
    """``weight * x / rms(x)``, rounded once."""
    out: Tensor = ops.rms_norm(hidden_states, self.weight, self.variance_epsilon)
    return out


def mlp(ops: ModuleType, self: Any, x: Tensor) -> Tensor:
    """``down(silu(gate(x)) * up(x))``; another activation stays transformers' own."""
    if not isinstance(self.act_fn, _SILU):
        say_once(f"the MLP stays as it is: its activation is {type(self.act_fn).__name__}")
        plain: Tensor = type(self).forward(self, x)
        return plain
    out: Tensor = self.down_proj(ops.silu_and_mul(self.gate_proj(x), self.up_proj(x)))
    return out


def self_attention(
    ops: ModuleType,
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """QK-norm and RoPE in one launch, the model's own cache, then the attention that the model is
    set to (ours unless the user has chosen another since)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    batch, seqlen = hidden_states.shape[:2]
    qkv = tuple(
        projection(hidden_states).flatten(0, 1)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    # Heads come from the tensors: under tensor parallelism a process holds a share of them.
    num_heads, num_kv_heads = (x.shape[-1] // self.head_dim for x in qkv[:2])
    q_weight = k_weight = None
    eps = 0.0
    if hasattr(self, "q_norm"):
        if _fusible(self.q_norm) and _fusible(self.k_norm):
            q_weight, k_weight = self.q_norm.weight, self.k_norm.weight
            eps = self.q_norm.variance_epsilon
        else:
            by_head = (x.unflatten(1, (-1, self.head_dim)) for x in qkv[:2])
            q, k = (
                norm(x).flatten(1)
                for norm, x in zip((self.q_norm, self.k_norm), by_head, strict=True)
            )
            qkv = (q, k, qkv[2])
    rope: RopeRows | tuple[None, None, None] = (None, None, None)
    # EXAONE: with sliding windows in the model, its global layers have no positions.
    if getattr(self, "sliding_window", None) is None or getattr(self, "is_sliding", True):
        rope = position_embeddings
        if not isinstance(rope, RopeRows):
            cos, sin = position_embeddings
            rope = rope_rows(cos, sin, batch, seqlen)
    q, k, v = ops.qk_norm_rope(qkv, num_heads, num_kv_heads, q_weight, k_weight, *rope, eps)
    query, key, value = (x.unflatten(0, (batch, seqlen)).transpose(1, 2) for x in (q, k, v))
    if past_key_values is not None:
        key, value = past_key_values.update(key, value, self.layer_idx)
    name = self.config._attn_implementation
    function: Any = functools.partial(attention, backend=ops)
    if name != NAME:
        function = ALL_ATTENTION_FUNCTIONS.get(name) or _eager(self)
    out, weights = function(
        self,
        query,
        key,
        value,
        attention_mask,
        scaling=self.scaling,
        dropout=self.attention_dropout if self.training else 0.0,
        sliding_window=_window(self),
        **kwargs,
    )
    return self.o_proj(out.reshape(batch, seqlen, -1)), weights


def vision_attention(
    ops: ModuleType,
    self: Any,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: Any = None,
    max_seqlen: int | None = None,
    **kwargs: Any,
) -> Tensor:
    """One launch for all windows or frames, 2-D RoPE included."""
    cos, sin = (table[:, : self.head_dim // 2].float() for table in position_embeddings)
    if max_seqlen is None:  # called by itself: the patched tower says it, from the grid
        max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max())
    qkv = self.qkv(hidden_states)
    cu_seqlens = cu_seqlens.to(torch.int32)
    heads = self.num_heads, self.num_key_value_heads
    out = ops.vision_attn(qkv, *heads, cos, sin, cu_seqlens, max_seqlen, self.scaling)
    projected: Tensor = self.proj(out.flatten(1))
    return projected


def vision_tower(
    ops: ModuleType, self: Any, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any
) -> Any:
    """Says once per call how long windows and frames can be, so that no layer asks the device."""
    frames = [height * width for _, height, width in grid_thw.tolist()]
    kwargs.setdefault("max_seqlen", max(frames, default=0))
    kwargs.setdefault("max_window_seqlen", (self.window_size // self.patch_size) ** 2)
    return type(self).forward(self, hidden_states, grid_thw=grid_thw, **kwargs)


def pre_norm_layer(
    ops: ModuleType, self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Llama, Qwen2: the addition of the attention and the norm that follows are one launch."""
    normed = self.input_layernorm(hidden_states)
    attended, _ = self.self_attn(normed, **_keywords(args, kwargs))
    normed, residual = _add_then_norm(ops, self.post_attention_layernorm, attended, hidden_states)
    out: Tensor = residual + self.mlp(normed)
    return out


def post_norm_layer(
    ops: ModuleType, self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """EXAONE: norm and addition are one launch, after the attention and after the MLP."""
    attended, _ = self.self_attn(hidden_states, **_keywords(args, kwargs))
    x = _norm_then_add(ops, self.post_attention_layernorm, attended, hidden_states)
    return _norm_then_add(ops, self.post_feedforward_layernorm, self.mlp(x), x)


def vision_block(
    ops: ModuleType, self: Any, hidden_states: Tensor, cu_seqlens: Tensor, **kwargs: Any
) -> Tensor:
    """The tower's pre-norm layer: the first addition and the second norm are one launch."""
    attended = self.attn(self.norm1(hidden_states), cu_seqlens=cu_seqlens, **kwargs)
    normed, x = _add_then_norm(ops, self.norm2, attended, hidden_states)
    out: Tensor = x + self.mlp(normed)
    return out


def _fusible(norm: nn.Module) -> bool:
    """Whether the norm may be run by its weight alone: nothing hooks into its calls or wraps them,
    as tensor parallelism does to sum the gradient of a weight that every process has."""
    forward = hasattr(norm, "_hf_hook") or norm._forward_hooks or norm._forward_pre_hooks
    backward = norm._backward_hooks or norm._backward_pre_hooks
    return not forward and not backward and hasattr(norm.forward, FORWARD)


def _add_then_norm(
    ops: ModuleType, norm: Any, x: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    """``norm(x + residual)`` and the sum."""
    if _fusible(norm) and x.dtype == residual.dtype:  # autocast mixes dtypes
        normed, total = ops.add_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
        return normed, total
    total = residual + x
    return norm(total), total


def _norm_then_add(ops: ModuleType, norm: Any, x: Tensor, residual: Tensor) -> Tensor:
    """``residual + norm(x)``."""
    if _fusible(norm) and x.dtype == residual.dtype:
        out: Tensor = ops.rms_norm_add(x, residual, norm.weight, norm.variance_epsilon)
        return out
    total: Tensor = residual + norm(x)
    return total


_SILU = (SiLUActivation, nn.SiLU)
_LAYER_ARGUMENTS = (
    "attention_mask",
    "position_ids",
    "past_key_values",
    "use_cache",
    "position_embeddings",
)


def _keywords(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a decoder layer behind hidden_states, by name."""
    return {**dict(zip(_LAYER_ARGUMENTS, args, strict=False)), **kwargs}


def _window(layer: Any) -> int | None:
    """The window of an attention layer, where it has one."""
    window: int | None = getattr(layer, "sliding_window", None)
    return window if getattr(layer, "is_sliding", True) else None


def _eager(layer: Any) -> Any:
    return sys.modules[type(layer).__module__].eager_attention_forward
