"""Drafts of the multi-token prediction head, by us and by a plain head of transformers' modules.

transformers itself drops the head's weights. ``PlainHead`` puts them into its EXAONE 4 decoder
layer and norms, computes with eager attention and no cache, and starts anew for every draft.
Both sides answer the same question: the scores of token t + 2 for every token t of a text, then
those of the drafts after its last token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from exafuse.batch import Packing
from exafuse.config import ModelConfig


def draft_logits(model: Any, embeds: Tensor, hidden: Tensor, drafted: Tensor) -> Tensor:
    """Our head, through its cache, as ``generate`` runs it.

    Args:
        model: ours, with a head (``model.mtp``).
        embeds: ``[n, hidden_size]``, what entered the first layer for tokens 1 to n of a text (the
            embeddings, with the features of images in their places).
        hidden: ``[n, hidden_size]``, the model's states of tokens 0 to n - 1 after its final norm.
        drafted: int64 ``[steps]``, the tokens to go on with after token n.

    Returns:
        fp32 ``[n + steps, vocab_size]``.
    """
    cache = model.mtp.new_cache(1, None, model.prefill_chunk)
    states = []

    def advance(embeds: Tensor, hidden: Tensor) -> Tensor:
        packing = Packing.of(1, embeds.shape[0], None, embeds.device)
        out: Tensor = model.mtp.advance(embeds, hidden, packing, cache, model.rotary, model.backend)
        states.append(out)
        return out[-1:]

    chunks = [torch.split(x, cache.chunk) for x in (embeds, hidden)]
    for part in zip(*chunks, strict=True):
        last = advance(*part)
    for token in drafted:
        last = advance(model.text.embed_tokens(token[None]), last)
    logits: Tensor = model.lm_head(torch.cat(states))
    return logits.float()


class PlainHead:
    """The head of a checkpoint, made of transformers' modules.

    Args:
        config: the model's.
        weights: by checkpoint name; those that begin with "mtp." are used. All must be there.
        device, dtype: what to compute on and in.

    Raises:
        KeyError: the weights are not those of a head with one layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        from transformers.models.exaone4 import modeling_exaone4 as theirs

        settings = _their_config(config)
        hidden, eps = config.hidden_size, config.rms_norm_eps
        with torch.device(device):
            self._head = nn.Module()
            for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
                self._head.add_module(name, theirs.Exaone4RMSNorm(hidden, eps=eps))
            self._head.add_module("fc", nn.Linear(2 * hidden, hidden, bias=False))
            layer = theirs.Exaone4DecoderLayer(settings, layer_idx=0)
            self._head.add_module("layers", nn.ModuleList([layer]))
            # Not cast to a narrower type: its frequencies would be rounded.
            self._rotary = theirs.Exaone4RotaryEmbedding(settings)
        self._head.to(dtype).eval().requires_grad_(False)
        own = self._head.state_dict()
        self._head.load_state_dict({name: weights[f"mtp.{name}"] for name in own})
        self._window = config.mtp_layers[0].window_size[0]

    @torch.no_grad()
    def draft_logits(
        self,
        embeds: Tensor,
        hidden: Tensor,
        drafted: Tensor,
        embed: Callable[[Tensor], Tensor],
        lm_head: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """As :func:`draft_logits`, with the embedding and the output matrix to use."""
        states = self.states(embeds, hidden)
        for token in drafted:
            embeds = torch.cat((embeds, embed(token[None])))
            hidden = torch.cat((hidden, states[-1:]))
            # Entries of earlier drafts come from their own states again, so none of them changes.
            states = torch.cat((states, self.states(embeds, hidden)[-1:]))
        return lm_head(states).float()

    def states(self, embeds: Tensor, hidden: Tensor) -> Tensor:
        """``[n, hidden_size]`` twice -> the head's states ``[n, hidden_size]``."""
        head: Any = self._head
        e, h = head.pre_fc_norm_embedding(embeds), head.pre_fc_norm_hidden(hidden)
        x = head.fc(torch.cat((e, h), dim=-1))[None]
        positions = torch.arange(x.shape[1], device=x.device)
        distance = positions[:, None] - positions
        visible = distance >= 0
        if self._window >= 0:
            visible &= distance <= self._window
        mask = torch.zeros(visible.shape, dtype=x.dtype, device=x.device)
        mask = mask.masked_fill(~visible, torch.finfo(x.dtype).min)[None, None]
        rotation = self._rotary(x, positions[None])
        y = head.layers[0](x, attention_mask=mask, position_embeddings=rotation)
        out: Tensor = head.norm(y)[0]
        return out


def relative_error(ours: Tensor, plain: Tensor) -> float:
    """The largest relative L2 distance of a row."""
    ours, plain = ours.double(), plain.double()
    return float((torch.linalg.vector_norm(ours - plain, dim=-1) / plain.norm(dim=-1)).max())


def _their_config(config: ModelConfig) -> Any:
    from transformers import Exaone4Config

    rope = config.rope.to_dict() or {"rope_type": "default"}
    settings = Exaone4Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        sliding_window=config.sliding_window,
        layer_types=list(config.mtp_layer_types),
        rope_parameters={**rope, "rope_theta": config.rope.theta},
    )
    settings._attn_implementation = "eager"
    return settings
