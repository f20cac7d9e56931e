"""Llama 2 and 3: pre-norm decoder layers.

    residual += attention(norm(residual));  residual += mlp(norm(residual))

Each addition and the norm that follows it are one op, so a layer takes the previous sublayer's
output (``delta``) not yet added to the residual stream, and leaves its own that way.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from exafuse.config import LayerPlan, ModelConfig
from exafuse.layers import MLP, Attention, RMSNorm, Step


class PreNormLayer(nn.Module):
    """Input norm, attention, post-attention norm, MLP."""

    def __init__(self, config: ModelConfig, plan: LayerPlan) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, plan)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, residual: Tensor, delta: Tensor | None, step: Step, backend: ModuleType
    ) -> tuple[Tensor, Tensor]:
        """``(residual, delta)`` in and out; the layer's value is their sum."""
        norm = self.input_layernorm
        if delta is None:
            x = backend.rms_norm(residual, norm.weight, norm.eps)
        else:
            x, residual = backend.add_rms_norm(delta, residual, norm.weight, norm.eps)
        norm = self.post_attention_layernorm
        attention = self.self_attn(x, step, backend)
        x, residual = backend.add_rms_norm(attention, residual, norm.weight, norm.eps)
        return residual, self.mlp(x, backend)
