"""One call of ``generate``: its arguments, checked, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from exafuse.batch import Packing
from exafuse.config import ModelConfig
from exafuse.generation.config import GenerationConfig
from exafuse.generation.prompts import Prompt
from exafuse.generation.sampling import LogitsProcessor, ScoreChain, TokenDraw
from exafuse.generation.settings import Settings, context_length, total_length
from exafuse.generation.stopping import StoppingCriterion, StopStrings, Streamer

Progress = Callable[[int, int], None]
_RESERVED_TOKENS = 1024  # a growing cache is given room for this many new tokens at once


class GenerativeModel(Protocol):
    """What generation needs of a model.

    With drafts it also needs ``next_hidden``, ``lm_head`` and ``prefill_chunk``, and for its own
    drafts ``mtp``.
    """

    config: ModelConfig
    generation_config: GenerationConfig

    @property
    def device(self) -> torch.device: ...

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Any: ...

    def next_logits(
        self,
        input_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **media: Tensor,
    ) -> Tensor: ...


class DraftedModel(GenerativeModel, Protocol):
    """What generation with drafts needs of a model."""

    lm_head: Callable[[Tensor], Tensor]
    prefill_chunk: int

    def next_hidden(
        self,
        input_ids: Tensor,
        cache: Any,
        attention_mask: Tensor | None = None,
        progress: Progress | None = None,
        **media: Tensor,
    ) -> Iterator[tuple[Packing, Tensor, Tensor]]: ...


@dataclass(frozen=True, kw_only=True)
class Call:
    """Attributes named as the arguments of ``generate`` are those arguments, checked.

    ``media`` are the pixel tensors by name: they go with the prompt and with nothing after it.
    """

    model: Any
    prompt: Prompt
    settings: Settings
    processors: tuple[LogitsProcessor, ...]
    criteria: tuple[StoppingCriterion, ...]
    streamer: Streamer | None
    tokenizer: Any
    draw: TokenDraw
    keep_cache: bool
    keep_scores: bool
    progress: Progress | None
    media: Mapping[str, Tensor]
    cuda_graph: bool = False

    @cached_property
    def total(self) -> int:
        """Columns of the output at most."""
        context = context_length(self.model.config)
        return total_length(self.settings, self.prompt.ids.shape[1], self.prompt.longest, context)

    @cached_property
    def pad_id(self) -> int | None:
        """What continues a row that has ended, or None where such rows go on."""
        # As in transformers: without any notion of eos, finished rows are not padded.
        named = any(hasattr(criterion, "eos_token_id") for criterion in self.criteria)
        return self.settings.pad_token_id if self.settings.eos_token_ids or named else None

    @cached_property
    def eos_ids(self) -> Tensor:
        """int64 ``[number of ids]`` on the model's device."""
        return torch.tensor(self.settings.eos_token_ids, dtype=torch.int64).to(self.model.device)

    @cached_property
    def reserved(self) -> int:
        """Tokens a row of the cache is made for."""
        columns = self.prompt.ids.shape[1]
        grown = min(self.total, columns + _RESERVED_TOKENS)
        return self.total if self.settings.static_cache or self.cuda_graph else grown

    @property
    def end(self) -> int:
        """Tokens of the longest row at most, its answer included."""
        return self.prompt.longest + self.total - self.prompt.ids.shape[1]

    @property
    def no_text(self) -> Tensor:
        """int64 ``[batch, 0]``, for a chain without callables, which alone look at the text."""
        return self.prompt.ids[:, :0]

    def rope_change(self, num_draft_tokens: int = 0) -> int | None:
        """The number of positions beyond which RoPE takes other frequencies, if the answer may get
        there from below; None if it cannot."""
        rope = self.model.config.rope
        limits = {
            "dynamic": self.model.config.max_position_embeddings,
            "longrope": rope.original_max_position_embeddings,
        }
        limit = limits.get(rope.rope_type)
        if limit is None or self.end + num_draft_tokens <= limit:
            return None
        from_below = rope.rope_type == "dynamic" or self.prompt.longest <= limit
        return limit if from_below else None

    @property
    def do_sample(self) -> bool:
        """Whether tokens are drawn."""
        return self.settings.sampling.do_sample

    def score_chain(self) -> ScoreChain:
        """From logits to scores, at the end of the prompt."""
        return ScoreChain(
            self.settings.sampling,
            self.prompt.ids,
            self.prompt.mask,
            self.model.config.vocab_size,
            self.processors,
        )

    def stop_strings(self) -> StopStrings | None:
        """Who watches for the stop strings, if there are any."""
        if not self.settings.stop_strings:
            return None
        if self.tokenizer is None:
            raise ValueError("stop_strings: expected the model's tokenizer too, as tokenizer=")
        ids = self.prompt.ids.cpu().numpy()
        return StopStrings(self.tokenizer, self.settings.stop_strings, ids)
