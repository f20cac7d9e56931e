"""What generation needs of a model: read the next tokens into a cache, score the one after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from exafuse.batch import Packing, padding_mask
from exafuse.config import ModelConfig
from exafuse.kv_cache import KVCache
from exafuse.layers import resolve_backend
from exafuse.models.mtp import MTPHead
from exafuse.models.placeholders import Placeholders, VisionInputs
from exafuse.models.stepping import next_step
from exafuse.models.text_model import TextModel
from exafuse.rotary import RotaryTable

PREFILL_CHUNK = 2048
Progress = Callable[[int, int], None]


class Decoder(nn.Module):
    """Trunk, output matrix and, where the checkpoint has one, draft module; reads tokens step by
    step.

    ``mtp`` is the draft module or None.
    """

    has_vision = False

    def __init__(
        self,
        config: ModelConfig,
        backend: ModuleType,
        trunk: Callable[[ModelConfig], nn.Module] = TextModel,
    ) -> None:
        super().__init__()
        self.config = config
        self.backend = backend
        self.model = trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.text.embed_tokens.weight
        self.mtp = MTPHead(config) if config.mtp_layer_types else None
        self.rotary = RotaryTable(config.rope, config.head_dim, config.max_position_embeddings)
        self.prefill_chunk = PREFILL_CHUNK
        self.eval()

    def __getstate__(self) -> dict[str, Any]:
        # A module cannot be pickled or deep-copied; its path says how to find it again.
        return self.__dict__ | {"backend": getattr(self.backend, "path", "reference")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.backend = resolve_backend(state["backend"])

    @property
    def text(self) -> TextModel:
        """The language model's embedding, layers and final norm."""
        assert isinstance(self.model, TextModel)
        return self.model

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of token ids."""
        return self.text.embed_tokens

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.text.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of every hidden state."""
        return self.text.embed_tokens.weight.dtype

    def new_cache(self, batch_size: int, max_length: int | None = None) -> KVCache:
        """An empty cache for ``batch_size`` rows that grows when needed.

        Args:
            batch_size: number of rows.
            max_length: tokens a row will reach, when known; reserved at once, so nothing grows
                later.
        """
        return KVCache(
            self.config,
            batch_size,
            dtype=self.dtype,
            device=self.device,
            max_length=max_length,
            chunk=self.prefill_chunk,
        )

    def next_logits(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **vision: Tensor,
    ) -> Tensor:
        """Feed the next tokens of every row and score the one after them.

        Arguments as for :meth:`next_hidden`.

        Returns:
            ``[batch, vocab_size]`` in the model's dtype, of each row's last token.
        """
        hidden = None
        for packing, _, x in self.next_hidden(input_ids, cache, attention_mask, progress, **vision):
            hidden = packing.last_states(x, hidden)
        logits: Tensor = self.lm_head(hidden)
        return logits

    def next_hidden(
        self,
        input_ids: Tensor,
        cache: KVCache,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **vision: Tensor,
    ) -> Iterator[tuple[Packing, Tensor, Tensor]]:
        """Feed the next tokens of every row, chunk by chunk.

        Positions count real tokens. Without ``attention_mask`` and images nothing waits for the
        device.

        Args:
            input_ids: int64 ``[batch, columns]``.
            cache: from :meth:`new_cache`; gets the new keys and values.
            attention_mask: ``[batch, columns]`` of these columns, 0 = padding.
            progress: called with (columns done, columns in all) after every prefill chunk.
            vision: pixel_values, image_grid_thw, pixel_values_videos and video_grid_thw of the
                images and videos whose placeholders are in ``input_ids``.

        Yields:
            For each chunk: its packing; what entered the first layer and what left the final norm,
            packed ``[num_tokens, hidden_size]``.
        """
        batch, columns = input_ids.shape
        self._check_cache(cache, batch)
        mask, new = None, columns
        if attention_mask is not None:
            mask = padding_mask(attention_mask, batch, columns, cache.lengths, cache.seen)
        if mask is not None:
            new = int(mask.sum(1).max())
            if new == 0:
                raise ValueError("attention_mask: expected a token in some row, got padding only")
        places = self._placeholders(input_ids, None, VisionInputs(**vision))
        with cache.transaction():
            cache.num_positions += new
            cos, sin = self.rotary(cache.num_positions, self.device, cache.rotary_state)
            for start in range(0, columns, cache.chunk):
                span = slice(start, min(start + cache.chunk, columns))
                part = None if mask is None else mask[:, span]
                packing = Packing.of(batch, span.stop - start, part, self.device)
                embeds = self.text.embed_tokens(packing.pack(input_ids[:, span]))
                if places is not None:
                    embeds = places.fill(embeds, packing.pack(places.index[:, span]))
                yield packing, embeds, self._run(embeds, packing, cache, cos, sin, None)
                if progress is not None:
                    progress(span.stop, columns)

    def _placeholders(
        self, input_ids: Tensor | None, embeds: Tensor | None, vision: VisionInputs
    ) -> Placeholders | None:
        """Features of images and videos, and their places in the ids or, without these, in
        ``embeds``; None without images and videos."""
        if given := vision.given():
            raise ValueError(f"{', '.join(given)}: expected None, this model has no vision tower")
        return None

    def _check_cache(self, cache: KVCache, batch: int) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(
                "past_key_values: expected the KVCache that an earlier call returned, "
                f"got {type(cache).__name__}"
            )
        if cache.batch_size != batch:
            raise ValueError(
                f"past_key_values: holds {cache.batch_size} rows, the input has {batch}"
            )

    def _run(
        self,
        embeds: Tensor,
        packing: Packing,
        cache: KVCache,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor | None,
        collect: list[Tensor] | None = None,
    ) -> Tensor:
        """One chunk of packed tokens through the layers, written to the cache.

        ``positions`` for RoPE; None = each row goes on where it stopped, counting real tokens.
        """
        if embeds.shape[0] == 0:  # padding in every row
            cache.advance(packing.lengths, packing.columns, packing.mask)
            if collect is not None:
                collect += [embeds] * (self.config.num_layers + 1)
            return embeds
        step = next_step(cache, packing, cos, sin, positions)
        hidden: Tensor = self.text(embeds, step, self.backend, collect)
        return hidden
