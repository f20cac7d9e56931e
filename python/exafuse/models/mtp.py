"""The multi-token prediction head of EXAONE 4.5: drafts tokens beyond the next one.

With the embedding ``e`` of token t + 1 and the model's hidden state ``h`` of token t (after the
final norm), both normed, the head computes

    x = fc([e ; h]);  h' = norm(layer(x))

and the model's own output matrix turns ``h'`` into scores of token t + 2. The layer is one of the
model's (post-norm, QK-norm), with a window and a cache of its own: entry t of that cache belongs to
the pair (hidden state t, token t + 1). To draft further the head goes on from its own ``h'``.
"""

from __future__ import annotations

import dataclasses
from types import ModuleType

import torch
from torch import Tensor, nn

from exafuse.batch import Packing
from exafuse.config import ModelConfig
from exafuse.errors import ConfigError
from exafuse.kv_cache import KVCache
from exafuse.layers import RMSNorm, Step
from exafuse.models.exaone4 import PostNormLayer
from exafuse.models.stepping import next_step
from exafuse.rotary import RotaryTable


class MTPHead(nn.Module):
    """One draft layer between two norms; parameters are named as ``mtp.*`` in the checkpoint.

    Raises:
        ConfigError: the config has another number of draft layers than one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if len(config.mtp_layer_types) != 1:
            raise ConfigError(
                f"num_nextn_predict_layers: expected 1, got {len(config.mtp_layer_types)}; "
                "load the checkpoint with mtp=False"
            )
        hidden, eps = config.hidden_size, config.rms_norm_eps
        # The head as a model of its own: what its cache and its layer need to know.
        self.config = dataclasses.replace(
            config, num_layers=1, layer_types=config.mtp_layer_types, mtp_layer_types=()
        )
        self.pre_fc_norm_embedding = RMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = RMSNorm(hidden, eps)
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.layers = nn.ModuleList(PostNormLayer(self.config, plan) for plan in self.config.layers)
        self.norm = RMSNorm(hidden, eps)

    def forward(self, embeds: Tensor, hidden: Tensor, step: Step, backend: ModuleType) -> Tensor:
        """Hidden states ``[num_tokens, hidden_size]`` that the output matrix scores.

        Args:
            embeds: ``[num_tokens, hidden_size]``, of the tokens after those of ``hidden``.
            hidden: ``[num_tokens, hidden_size]``, the model's after its final norm, or the head's
                own of the step before.
            step: packed like them.
            backend: the ops.
        """
        norm = self.pre_fc_norm_embedding
        e = backend.rms_norm(embeds, norm.weight, norm.eps)
        norm = self.pre_fc_norm_hidden
        h = backend.rms_norm(hidden, norm.weight, norm.eps)
        x = self.fc(torch.cat((e, h), dim=-1))
        for layer in self.layers:
            x, _ = layer(x, None, step, backend)
        out: Tensor = backend.rms_norm(x, self.norm.weight, self.norm.eps)
        return out

    def new_cache(
        self, batch_size: int, max_length: int | None = None, chunk: int = 2048
    ) -> KVCache:
        """An empty cache of the head's layer; arguments as for :class:`KVCache`."""
        weight = self.fc.weight
        return KVCache(
            self.config,
            batch_size,
            dtype=weight.dtype,
            device=weight.device,
            max_length=max_length,
            chunk=chunk,
        )

    def advance(
        self,
        embeds: Tensor,
        hidden: Tensor,
        packing: Packing,
        cache: KVCache,
        rotary: RotaryTable,
        backend: ModuleType,
    ) -> Tensor:
        """The next pairs of every row through the head and into its cache.

        Args:
            embeds, hidden: as in :meth:`forward`, packed by ``packing``, which has a token at
                least.
            cache: from :meth:`new_cache`.
            rotary: the model's table; positions count pairs, which rotates like counting tokens.
            backend: the ops.

        Returns:
            ``[num_tokens, hidden_size]``.
        """
        cache.num_positions += max(packing.lengths)
        cos, sin = rotary(cache.num_positions, embeds.device, cache.rotary_state)
        step = next_step(cache, packing, cos, sin)
        out: Tensor = self(embeds, hidden, step, backend)
        return out
