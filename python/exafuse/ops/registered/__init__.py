"""The ops as torch operators ``torch.ops.exafuse.*``: for ``torch.compile``, autograd, export and
tensors that are more than memory (fake, traced, wrapped).

A registered op costs some microseconds more than a direct call, so the front door takes it only
where something has to see the op. Each has a schema, a result for fake tensors, kernels for CPU and
CUDA and a gradient whose computation is a registered op too, so that compiled training sees one
node there. The functions take the arguments of :mod:`exafuse.reference`, in its order.
"""

from exafuse.ops.registered.attention import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    vision_attn,
)
from exafuse.ops.registered.batching import register_rules
from exafuse.ops.registered.qk_norm_rope import apply_rope, qk_norm_rope, qk_norm_rope_cache
from exafuse.ops.registered.rms_norm import add_rms_norm, rms_norm, rms_norm_add
from exafuse.ops.registered.sharding import allow_dtensors
from exafuse.ops.registered.silu_and_mul import silu_and_mul

__all__ = [
    "add_rms_norm",
    "allow_dtensors",
    "apply_rope",
    "flash_attn_func",
    "flash_attn_varlen_func",
    "flash_attn_with_kvcache",
    "qk_norm_rope",
    "qk_norm_rope_cache",
    "rms_norm",
    "rms_norm_add",
    "silu_and_mul",
    "vision_attn",
]

register_rules()
