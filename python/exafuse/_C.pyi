"""The compiled extension: kernels on raw tensors, without allocation, gradients or defaults.

Contracts in csrc/ops.h and csrc/ops_backward.h; use :mod:`exafuse.ops`.
"""

from typing import TypedDict

from torch import Tensor

class NotAPlainTensor(TypeError):
    """The tensor has no plain memory: fake, meta, wrapped by a transform, or a subclass."""

class BuildInfo(TypedDict):
    version: str
    source_hash: str
    kernel_hashes: str
    archs: str
    compiler: str
    cuda: int
    backend: str

def build_info() -> BuildInfo: ...
def device_problem() -> str: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, residual_out: Tensor
) -> None: ...
def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor) -> None: ...
def qk_norm_rope(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
    q_out: Tensor,
    k_out: Tensor,
    v_out: Tensor | None,
) -> None: ...
def qk_norm_rope_cache(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor | None,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor,
) -> None: ...
def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_out: Tensor,
    k_out: Tensor,
) -> None: ...
def silu_and_mul(gate: Tensor, up: Tensor | None, out: Tensor) -> None: ...
def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def vision_attn(
    qkv: Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    softmax_scale: float,
    workspace: Tensor | None,
    out: Tensor,
) -> None: ...
def vision_attn_workspace(
    num_tokens: int, num_heads: int, num_kv_heads: int, head_dim: int, max_seqlen: int
) -> int: ...
def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    window_left: int,
    window_right: int,
    cu_seqlens_q: Tensor | None,
    max_seqlen_q: int,
    ring: bool,
    workspace: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None: ...
def flash_attn_with_kvcache_workspace(
    total_q: int,
    max_seqlen_q: int,
    num_heads: int,
    head_dim: int,
    key_capacity: int,
    window_left: int,
) -> int: ...
def rms_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    grad_x: Tensor,
    grad_weight: Tensor | None,
    workspace: Tensor | None,
) -> None: ...
def add_rms_norm_backward(
    grad: Tensor,
    grad_residual: Tensor,
    new_residual: Tensor,
    weight: Tensor,
    eps: float,
    grad_sum: Tensor,
    grad_weight: Tensor | None,
    workspace: Tensor | None,
) -> None: ...
def rms_norm_backward_workspace(num_rows: int, hidden: int, element_size: int) -> int: ...
def qk_norm_rope_backward(
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
    workspace: Tensor | None,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor | None,
    d_q_weight: Tensor | None,
    d_k_weight: Tensor | None,
) -> None: ...
def qk_norm_rope_backward_workspace(num_tokens: int, head_dim: int, element_size: int) -> int: ...
def silu_and_mul_backward(
    grad: Tensor,
    gate: Tensor,
    up: Tensor | None,
    grad_gate: Tensor,
    grad_up: Tensor | None,
) -> None: ...
