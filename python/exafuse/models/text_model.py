"""The trunk of every family: embedding, decoder layers, final norm."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor, nn

from exafuse.config import ModelConfig
from exafuse.layers import RMSNorm, Step
from exafuse.models.exaone4 import PostNormLayer
from exafuse.models.llama import PreNormLayer

# Qwen2 has Llama's layer: its biases and late windows are the config's business.
LAYERS = {
    "llama": PreNormLayer,
    "qwen2": PreNormLayer,
    "exaone4": PostNormLayer,
    "exaone4_5": PostNormLayer,
}


class TextModel(nn.Module):
    """Embedding, layers and final norm, over packed tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        # As in transformers, the embedding of the id that pads is not trained, though it be eos.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        layer = LAYERS[config.model_type]
        self.layers = nn.ModuleList(layer(config, plan) for plan in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeds: Tensor, step: Step, backend: ModuleType, collect: list[Tensor] | None = None
    ) -> Tensor:
        """``embeds [num_tokens, hidden_size]`` -> normed hidden states; ``collect`` gets each
        layer's."""
        x, delta = embeds, None
        for layer in self.layers:
            if collect is not None:
                collect.append(x if delta is None else x + delta)
            x, delta = layer(x, delta, step, backend)
        if delta is None:
            x = backend.rms_norm(x, self.norm.weight, self.norm.eps)
        else:
            x, _ = backend.add_rms_norm(delta, x, self.norm.weight, self.norm.eps)
        if collect is not None:
            collect.append(x)
        hidden: Tensor = x
        return hidden
