"""A model whose next tokens are written down beforehand: the decoding loop alone is under test."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from exafuse.config import RopeConfig
from exafuse.generation.generate import GenerationConfig, generate
from torch import Tensor


class ScriptedModel:
    """Row r answers ``script[r][0], script[r][1], ...`` under greedy choice, then zeros.

    ``calls`` lists the ids [batch, columns] of every ``next_logits``, ``caches`` the sizes wished.
    """

    def __init__(
        self,
        script: Sequence[Sequence[int]],
        vocab_size: int = 97,
        context: int = 64,
        generation_config: GenerationConfig | None = None,
        device: str = "cpu",
    ):
        self.config = SimpleNamespace(
            model_type="scripted",
            vocab_size=vocab_size,
            max_position_embeddings=context,
            rope=RopeConfig(),
        )
        self.device = torch.device(device)
        self.generation_config = generation_config or GenerationConfig()
        self.calls: list[Tensor] = []
        self.caches: list[tuple[int, int | None]] = []
        steps = max(map(len, script))
        self.logits = torch.zeros(steps + context, len(script), vocab_size, device=device)
        for row, tokens in enumerate(script):
            for step, token in enumerate(tokens):
                self.logits[step, row, token] = 5.0

    def new_cache(self, batch_size: int, max_length: int | None = None) -> ScriptedCache:
        self.calls = []
        self.caches.append((batch_size, max_length))
        return ScriptedCache()

    def next_logits(
        self, input_ids: Tensor, cache: ScriptedCache, attention_mask=None, progress=None
    ) -> Tensor:
        self.calls.append(input_ids.clone())  # the loop writes the next ones over them
        cache.length += input_ids.shape[1]
        if progress is not None:
            progress(input_ids.shape[1], input_ids.shape[1])
        return self.logits[len(self.calls) - 1]

    def generate(self, *args, **kwargs):
        return generate(self, *args, **kwargs)


class ScriptedCache:
    """Counts columns, as a KV cache does."""

    def __init__(self) -> None:
        self.length = 0

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, length: int) -> None:
        assert 0 <= length <= self.length
        self.length = length


class Collector:
    """A streamer that keeps what it is given."""

    def __init__(self) -> None:
        self.prompt: list[list[int]] = []
        self.steps: list[list[int]] = []
        self.ended = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        assert not self.ended
        if not self.prompt:
            assert value.dim() == 2
            self.prompt = value.tolist()
        else:
            assert value.dim() == 1
            self.steps.append(value.tolist())

    def end(self) -> None:
        self.ended += 1
