"""What a call of a model returns: fields named as in transformers, for every head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from exafuse.kv_cache import KVCache


class BodyOutput(NamedTuple):
    """What the body leaves for a head."""

    hidden: Tensor  # [batch, columns, hidden_size] after the final norm, 0 in padding
    cache: KVCache | None
    hidden_states: tuple[Tensor, ...] | None  # of every layer, if asked for


class ModelOutput:
    """A dataclass that is also indexable by position or name among the fields that are set."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


@dataclass
class CausalLMOutput(ModelOutput):
    """Of a language model."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [batch, columns kept, vocab_size]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # num_layers + 1, the last after the final norm
    attentions: None = None


@dataclass
class BaseModelOutput(ModelOutput):
    """Of a model without a head."""

    last_hidden_state: Tensor | None = None  # [batch, columns, hidden_size], after the final norm
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """Of a sequence classification."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [batch, num_labels]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclass
class TokenClassifierOutput(ModelOutput):
    """Of a token classification."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [batch, columns, num_labels]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None


@dataclass
class QuestionAnsweringOutput(ModelOutput):
    """Of extractive question answering."""

    loss: Tensor | None = None
    start_logits: Tensor | None = None  # [batch, columns]
    end_logits: Tensor | None = None  # [batch, columns]
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: None = None
