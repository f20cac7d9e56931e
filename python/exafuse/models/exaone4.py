"""EXAONE 4.0: post-norm decoder layers with per-head QK-norm.

    x += norm(attention(x));  x += norm(mlp(x))

There is no input norm: both sublayers read the raw residual stream. Which layers slide and which
rotate (in a hybrid model only the sliding ones do) comes from the config's layer plan.
"""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from exafuse.config import LayerPlan, ModelConfig
from exafuse.layers import MLP, Attention, RMSNorm, Step


class PostNormLayer(nn.Module):
    """Attention, norm of its output; MLP, norm of its output."""

    def __init__(self, config: ModelConfig, plan: LayerPlan) -> None:
        super().__init__()
        self.self_attn = Attention(config, plan)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, delta: Tensor | None, step: Step, backend: ModuleType
    ) -> tuple[Tensor, None]:
        """``(x, None)`` in and out: nothing is left to add."""
        norm = self.post_attention_layernorm
        x = backend.rms_norm_add(self.self_attn(x, step, backend), x, norm.weight, norm.eps)
        norm = self.post_feedforward_layernorm
        x = backend.rms_norm_add(self.mlp(x, backend), x, norm.weight, norm.eps)
        return x, None
