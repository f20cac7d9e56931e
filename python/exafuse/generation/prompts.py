"""Prompts as callers hand them over -> one checked, left-padded batch of token ids.

Everything is checked here, before the first kernel runs: no id outside the vocabulary reaches an
embedding.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exafuse.batch import check_ids
from exafuse.strict_json import shorten

_ACCEPTED = "token ids [batch, seq], a list of ints, a list of such lists, or a tokenizer's output"


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts.

    Attributes:
        ids: int64 ``[batch, columns]`` on the model's device.
        mask: int64 ``[batch, columns]`` on the CPU, 0 = left padding; None where there is none.
        longest: tokens of the longest row, padding not counted.
    """

    ids: Tensor
    mask: Tensor | None
    longest: int


def split_mapping(inputs: object, attention_mask: object) -> tuple[object, object, dict[str, Any]]:
    """(ids, mask, other model inputs) of a tokenizer's output; what is no mapping stays as is."""
    if not isinstance(inputs, Mapping):
        return inputs, attention_mask, {}
    others = dict(inputs)
    ids = others.pop("input_ids", None)
    if ids is None:
        raise ValueError(f"inputs: expected the key 'input_ids', got {shorten(sorted(others))}")
    mask = others.pop("attention_mask", None)
    if mask is not None and attention_mask is not None:
        raise TypeError("attention_mask: given twice, in the mapping and as an argument; drop one")
    for name in ("token_type_ids", "mm_token_type_ids"):
        others.pop(name, None)  # tokenizers and processors add them; these families have no types
    return ids, mask if mask is not None else attention_mask, others


def read_prompt(
    ids: object,
    attention_mask: object,
    *,
    vocab_size: int,
    pad_token_id: int | None,
    eos_token_ids: tuple[int, ...],
    device: torch.device,
) -> Prompt:
    """Check prompts and make them a batch; lists of different lengths are padded at the left.

    Without a mask, a pad id that occurs in the ids and is no eos marks padding, as in transformers.
    Ragged lists take ``pad_token_id`` (ValueError if None) and know their padding by their lengths.

    Raises:
        ValueError: an empty prompt, ids that are no integers or lie outside 0..vocab_size - 1, a
            mask of another shape or with padding that is not at the left.
        TypeError: something that holds no ids, such as a str.
    """
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind != "i":
            raise ValueError(f"input_ids: expected int64 token ids, got numpy {ids.dtype}")
        ids = torch.from_numpy(ids)
    if isinstance(ids, Tensor):
        batch, mask = _checked_tensor(ids, vocab_size), _mask_of(attention_mask, ids.dim() == 1)
        padded = False
    else:
        rows = _checked_rows(ids, vocab_size)
        batch, mask, padded = _padded(rows, attention_mask, pad_token_id)
    if mask is not None and mask.shape != batch.shape:
        raise ValueError(
            f"attention_mask: expected the shape of the ids {list(batch.shape)}, "
            f"got {list(mask.shape)}"
        )
    hint = ""
    if not (mask is not None or padded or pad_token_id is None or pad_token_id in eos_token_ids):
        mask = batch.ne(pad_token_id).cpu()
        hint = (
            f" (taken from pad_token_id={pad_token_id}; pass attention_mask if it is a real token)"
        )
    if mask is None or bool(mask.all()):
        return Prompt(batch.to(device), None, batch.size(1))
    if not bool(mask[:, -1].all()) or bool((mask[:, 1:] < mask[:, :-1]).any()):
        wrong = (~mask[:, -1]) | (mask[:, 1:] < mask[:, :-1]).any(dim=1)
        raise ValueError(
            "attention_mask: expected padding at the left only, got some after a token in row "
            f"{int(wrong.int().argmax())}{hint}; set padding_side='left' in the tokenizer"
        )
    return Prompt(batch.to(device), mask.long(), int(mask.sum(dim=1).max()))


def _checked_tensor(ids: Tensor, vocab_size: int) -> Tensor:
    batch = ids[None] if ids.dim() == 1 else ids
    check_ids(batch, vocab_size)
    return batch.long()


def _checked_rows(ids: object, vocab_size: int) -> list[list[int]]:
    """Plain lists of ids, one a prompt, from a list of ints or a list of sequences of ints."""
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise TypeError(f"input_ids: expected {_ACCEPTED}; got {type(ids).__name__}")
    if not ids:
        raise ValueError("input_ids: expected at least one token, got an empty list")
    nested = [_is_row(item) for item in ids]
    rows = [list(row) for row in ids] if all(nested) else [list(ids)]
    result = []
    for row_index, row in enumerate(rows):
        if not row:
            raise ValueError(f"input_ids: expected at least one token in row {row_index}, got none")
        checked = []
        for column, item in enumerate(row):
            try:
                value = -1 if isinstance(item, bool) else operator.index(item)
            except TypeError:
                value = -1
            if not 0 <= value < vocab_size:
                raise _id_error(item, row_index, column, vocab_size)
            checked.append(value)
        result.append(checked)
    return result


def _is_row(item: object) -> bool:
    if isinstance(item, Tensor | np.ndarray):
        return item.ndim == 1
    return isinstance(item, Sequence) and not isinstance(item, str | bytes)


def _id_error(value: object, row: int, column: int, vocab_size: int) -> ValueError:
    return ValueError(
        f"input_ids: expected integers from 0 to {vocab_size - 1} (vocab_size {vocab_size}), "
        f"got {shorten(value)} at row {row}, column {column}"
    )


def _padded(
    rows: list[list[int]], attention_mask: object, pad_token_id: int | None
) -> tuple[Tensor, Tensor | None, bool]:
    """(ids, bool mask or None, whether rows had to be padded)."""
    columns = max(map(len, rows))
    if all(len(row) == columns for row in rows):
        return torch.tensor(rows), _mask_of(attention_mask, len(rows) == 1), False
    if pad_token_id is None:
        raise ValueError(
            "input_ids: rows of different lengths need a pad token and the model has no pad or eos "
            "id; pass generation_config=GenerationConfig(pad_token_id=...)"
        )
    ids = torch.tensor([[pad_token_id] * (columns - len(row)) + row for row in rows])
    lengths = [len(row) for row in rows]
    if isinstance(attention_mask, Tensor | np.ndarray):
        return ids, _mask_of(attention_mask, False), True
    ones: list[Any] = [[1] * n for n in lengths]
    marks = ones if attention_mask is None else attention_mask
    if not isinstance(marks, Sequence) or [_length(m) for m in marks] != lengths:
        raise ValueError(
            f"attention_mask: expected rows of {shorten(lengths)} values like the ids, "
            f"got {shorten(attention_mask)}"
        )
    return ids, _mask_of([[0] * (columns - len(m)) + list(m) for m in marks], False), True


def _length(item: object) -> int:
    return len(item) if isinstance(item, Sequence) else -1


def _mask_of(attention_mask: object, one_row: bool) -> Tensor | None:
    """A caller's mask as bool ``[batch, seq]`` on the CPU."""
    if attention_mask is None:
        return None
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as exc:
        raise ValueError(f"attention_mask: expected 0 and 1, [batch, seq]: {exc}") from None
    mask = mask[None] if mask.dim() == 1 and one_row else mask
    if mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [batch, seq], got {list(mask.shape)}")
    mask = mask.cpu()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError("attention_mask: expected only 0 (padding) and 1 (token)")
    return mask == 1
