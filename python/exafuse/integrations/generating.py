"""A patched transformers model as a model that our generation, chat and command line can drive."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exafuse.config import ModelConfig
from exafuse.generation.config import GenerationConfig
from exafuse.generation.generate import generate


class PatchedModel:
    """What ``exafuse.chat`` and ``generate`` need of a model, by way of a transformers model.

    Attributes:
        model: the transformers model, patched or plain.
        config, generation_config: ours, of the same checkpoint.
    """

    keeps_cache = False  # transformers' sliding caches cannot go back by a token

    def __init__(
        self, model: Any, config: ModelConfig, generation_config: GenerationConfig
    ) -> None:
        self.model = model.eval()
        self.config = config
        self.generation_config = generation_config
        self.has_vision = config.vision is not None

    @property
    def device(self) -> torch.device:
        """Where ids go: the embedding's device."""
        device: torch.device = self.model.device
        return device

    def generate(self, inputs: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see :func:`exafuse.generation.generate.generate`, but for ``draft`` and
        ``cuda_graph``, which need a graph of our own. A GenerateOutput has no cache.

        Raises:
            ValueError: one of these is asked for.
        """
        for name in ("draft", "cuda_graph"):
            if kwargs.get(name):
                raise ValueError(
                    f"{name}: not for this model, which transformers runs; expected none, got "
                    f"{kwargs[name]!r}"
                )
        return generate(self, inputs, *args, **kwargs)

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Any:
        """An empty cache of transformers; ``max_length`` is of no use to it."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    @torch.no_grad()
    def next_logits(
        self,
        input_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        progress: Any = None,
        **media: Tensor,
    ) -> Tensor:
        """Feed the next tokens of every row and score the one after them.

        Args:
            input_ids: int64 ``[batch, columns]``.
            cache: from :meth:`new_cache`; gets the new keys and values.
            attention_mask: ``[batch, columns]`` of these columns, 0 = left padding; of the first
                call, the later ones have none.
            progress: called once, when all is done.
            media: pixel tensors and their grids.

        Returns:
            ``[batch, vocab_size]``, of each row's last token.
        """
        batch, columns = input_ids.shape
        padding = getattr(cache, "exafuse_padding", None)  # [batch, columns of the prompt]
        if attention_mask is not None and not bool(attention_mask.all()):
            padding = cache.exafuse_padding = attention_mask.to(self.device)
        options: dict[str, Any] = {}
        if padding is not None:
            seen = cache.get_seq_length() + columns
            real = padding.new_ones(batch, seen)
            real[:, : padding.shape[1]] = padding
            positions = (real.cumsum(1) - 1).clamp(min=0)[:, -columns:]
            options = {"attention_mask": real, "position_ids": positions}
        out = self.model(
            input_ids=input_ids.to(self.device),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
            **media,
        )
        if progress is not None:
            progress(columns, columns)
        logits: Tensor = out.logits[:, -1]
        return logits
