"""What a call of a language model returns, and the loss it may contain."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from exafuse.kv_cache import KVCache


@dataclass
class CausalLMOutput:
    """Fields as in transformers; also indexable by position or name among those that are set."""

    loss: Tensor | None = None
    logits: Tensor | None = None  # [batch, columns kept, vocab_size]
    past_key_values: KVCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # num_layers + 1, the last after the final norm
    attentions: None = None

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are set, in order."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())


def check_kept(
    logits_to_keep: int | Tensor, labels: Tensor | None, batch: int, columns: int
) -> None:
    """Raise for labels or a choice of columns that do not fit ``[batch, columns]``."""
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: expected 0 (all) or more, got {logits_to_keep}")
    if labels is None:
        return
    if isinstance(logits_to_keep, Tensor) or logits_to_keep or labels.shape != (batch, columns):
        raise ValueError(
            f"labels: expected {(batch, columns)} (keep all logits), got {tuple(labels.shape)}"
        )


def causal_lm_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """Mean cross entropy of each token against the next label, in fp32; -100 is ignored."""
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: expected {tuple(logits.shape[:2])} (keep all logits), "
            f"got {tuple(labels.shape)}"
        )
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten().to(logits.device)
    scores = logits.float().flatten(0, 1)
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets, ignore_index=-100)
    total = F.cross_entropy(scores, targets, ignore_index=-100, reduction="sum")
    return total / num_items_in_batch
