"""The loss of every head, as transformers computes it; labels are checked before anything runs.

A label outside its range ends a process that computes on a GPU, so it is refused on the host.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from exafuse.config.head import HeadConfig, ProblemType

IGNORED = -100  # a label that no loss counts
_INTEGERS = (torch.int64, torch.int32)


def check_kept(
    logits_to_keep: int | Tensor, labels: Tensor | None, shape: tuple[int, ...], vocab_size: int
) -> None:
    """Raise for labels or a choice of columns that do not fit ``shape``, batch and columns."""
    if isinstance(logits_to_keep, int) and logits_to_keep < 0:
        raise ValueError(f"logits_to_keep: expected 0 (all) or more, got {logits_to_keep}")
    if labels is None:
        return
    if isinstance(logits_to_keep, Tensor) or logits_to_keep or labels.shape != shape:
        raise ValueError(f"labels: expected {shape} (keep all logits), got {tuple(labels.shape)}")
    check_class_ids("labels", labels, shape, vocab_size)


def causal_lm_loss(
    logits: Tensor, labels: Tensor, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """Mean cross entropy of each token against the next label, in fp32; -100 is ignored.

    ``num_items_in_batch`` divides the sum in place of the number of labels.
    """
    if logits.shape[:2] != labels.shape:
        raise ValueError(
            f"labels: expected {tuple(logits.shape[:2])} (keep all logits), "
            f"got {tuple(labels.shape)}"
        )
    targets = F.pad(labels, (0, 1), value=IGNORED)[:, 1:].flatten().long().to(logits.device)
    return _cross_entropy(logits.float().flatten(0, 1), targets, num_items_in_batch)


def check_class_ids(name: str, labels: Tensor, shape: tuple[int, ...], num_labels: int) -> None:
    """Raise unless ``labels`` of this shape hold ids of classes, or -100 for none."""
    if tuple(labels.shape) != shape:
        raise ValueError(f"{name}: expected {shape}, got {tuple(labels.shape)}")
    if labels.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected int64 ids of classes, got {labels.dtype}")
    low, high = (int(bound) for bound in labels.masked_fill(labels == IGNORED, 0).aminmax())
    if low < 0 or high >= num_labels:
        raise ValueError(
            f"{name}: expected ids from 0 to {num_labels - 1}, or {IGNORED} to ignore one, got "
            f"{low if low < 0 else high}"
        )


def token_classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over ``[batch, columns]``, in fp32; -100 is ignored."""
    targets = labels.flatten().long().to(logits.device)
    return _cross_entropy(logits.float().flatten(0, 1), targets, None)


def problem_type_of(head: HeadConfig, labels: Tensor) -> ProblemType:
    """The config's, or what transformers concludes: regression for a single label, classes for
    integers, else a yes or no for each label."""
    if head.problem_type is not None:
        return head.problem_type
    if len(head.labels) == 1:
        return "regression"
    if labels.dtype in _INTEGERS:
        return "single_label_classification"
    return "multi_label_classification"


def check_sequence_labels(labels: Tensor, head: HeadConfig, batch: int) -> None:
    """Raise for labels that do not fit a batch of so many rows."""
    kind, num_labels = problem_type_of(head, labels), len(head.labels)
    if kind == "single_label_classification":
        check_class_ids("labels", labels.flatten(), (batch,), num_labels)
        return
    shapes: list[tuple[int, ...]] = [(batch, num_labels)]
    if kind == "regression" and num_labels == 1:
        shapes.append((batch,))
    if tuple(labels.shape) not in shapes:
        raise ValueError(
            f"labels: expected {' or '.join(map(str, shapes))} for problem_type {kind}, got "
            f"{tuple(labels.shape)}"
        )


def sequence_classification_loss(logits: Tensor, labels: Tensor, head: HeadConfig) -> Tensor:
    """Squared error, cross entropy or binary cross entropy of ``logits [batch, num_labels]``, in
    their dtype."""
    kind, labels = problem_type_of(head, labels), labels.to(logits.device)
    if kind == "single_label_classification":
        return _cross_entropy(logits, labels.flatten().long(), None)
    if not labels.is_floating_point():
        labels = labels.to(logits.dtype)
    if kind == "multi_label_classification":
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.mse_loss(logits, labels.view_as(logits))


def check_span(name: str, positions: Tensor, batch: int) -> None:
    """Raise unless ``positions`` are an integer for each row."""
    if tuple(positions.shape) not in ((batch,), (batch, 1)):
        raise ValueError(f"{name}: expected ({batch},), got {tuple(positions.shape)}")
    if positions.dtype not in _INTEGERS:
        raise ValueError(f"{name}: expected int64 columns, got {positions.dtype}")


def question_answering_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    num_items_in_batch: int | Tensor | None = None,
) -> Tensor:
    """Mean of the cross entropies of both ends over the columns.

    A position beyond the columns is ignored; one before them counts as the first.
    """
    columns = start_logits.shape[1]
    losses = [
        _cross_entropy(
            logits,
            positions.flatten().long().to(logits.device).clamp(0, columns),
            num_items_in_batch,
            ignored=columns,
        )
        for logits, positions in ((start_logits, start_positions), (end_logits, end_positions))
    ]
    return (losses[0] + losses[1]) / 2


def _cross_entropy(
    scores: Tensor,
    targets: Tensor,
    num_items_in_batch: int | Tensor | None,
    ignored: int = IGNORED,
) -> Tensor:
    """Mean over the targets that count, or their sum divided by ``num_items_in_batch``."""
    if num_items_in_batch is None:
        return F.cross_entropy(scores, targets, ignore_index=ignored)
    total = F.cross_entropy(scores, targets, ignore_index=ignored, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
