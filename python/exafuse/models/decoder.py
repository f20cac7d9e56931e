"""What generation needs of a model: read the next tokens into a cache, score the one after them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

from torch import Tensor, nn

from exafuse.batch import Packing, padding_mask
from exafuse.config import ModelConfig
from exafuse.kv_cache import KVCache
from exafuse.models.backbone import Backbone
from exafuse.models.mtp import MTPHead
from exafuse.models.placeholders import VisionInputs
from exafuse.models.stepping import fixed_step

Progress = Callable[[int, int], None]


class Decoder(Backbone):
    """Trunk, output matrix and, where the checkpoint has one, draft module; reads tokens step by
    step.

    ``mtp`` is the draft module or None.
    """

    def __init__(self, config: ModelConfig, backend: ModuleType) -> None:
        super().__init__(config, backend)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.text.embed_tokens.weight
        self.mtp = MTPHead(config) if config.mtp_layer_types else None
        self.eval()

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

    def fixed_rotary(self, cache: KVCache, num_positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin for :meth:`fixed_logits`, of all positions up to the answer's end."""
        return self.rotary(num_positions, self.device, cache.rotary_state)

    def fixed_logits(self, ids: Tensor, cache: KVCache, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Feed one token of every row and score the one after it; can be captured in a CUDA graph.

        Args:
            ids: int64 ``[batch]``.
            cache: with room for the token; counts it on the device, in place. Its host part has
                to be told with ``count_step``, after this call and after every replay.
            rotary: from :meth:`fixed_rotary`.

        Returns:
            ``[batch, vocab_size]`` in the model's dtype.
        """
        step = fixed_step(cache, *rotary)
        logits: Tensor = self.lm_head(self.text(self.text.embed_tokens(ids), step, self.backend))
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
