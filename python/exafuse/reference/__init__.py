"""Every op in plain PyTorch: the definition that the kernels are measured against, and the CPU
path.

Same names and signatures as :mod:`exafuse.ops`. All ops compute in fp32 from their inputs, round
once per output tensor and are differentiable, except those that write a cache.
"""

from exafuse.reference.attention import flash_attn_func, flash_attn_varlen_func
from exafuse.reference.flash_attn_with_kvcache import flash_attn_with_kvcache
from exafuse.reference.qk_norm_rope import apply_rope, qk_norm_rope, qk_norm_rope_cache
from exafuse.reference.rms_norm import add_rms_norm, rms_norm, rms_norm_add
from exafuse.reference.silu_and_mul import silu_and_mul
from exafuse.reference.vision_attn import vision_attn

__all__ = [
    "add_rms_norm",
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
