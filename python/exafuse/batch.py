"""From padded ``[batch, columns]`` input to packed tokens and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def to_device(numbers: Tensor, device: torch.device) -> Tensor:
    """A few numbers from the host, without waiting for what the device is still doing."""
    if device.type != "cuda":
        return numbers.to(device)
    return numbers.pin_memory().to(device, non_blocking=True)


@dataclass(frozen=True)
class Packing:
    """Which cells of a padded ``[batch, columns]`` block are tokens.

    ``index`` is None when every cell is one: packing and padding are then plain reshapes.
    """

    batch: int
    columns: int
    lengths: list[int]  # tokens of each row
    index: Tensor | None  # int64 [num_tokens], flat cells in row order
    mask: Tensor | None  # bool [batch, columns] on the CPU
    offsets: Tensor | None  # int64 [num_tokens], index of each token among its row's tokens

    @classmethod
    def of(cls, batch: int, columns: int, mask: Tensor | None, device: torch.device) -> Packing:
        """Packing of a block; ``mask [batch, columns]`` (on the CPU, bool) or None = no
        padding."""
        if mask is None or bool(mask.all()):
            return cls(batch, columns, [columns] * batch, None, None, None)
        offsets = (mask.cumsum(1) - 1)[mask]
        index = mask.flatten().nonzero().squeeze(1)
        lengths = mask.sum(1).tolist()
        return cls(batch, columns, lengths, index.to(device), mask, offsets.to(device))

    @property
    def uniform(self) -> bool:
        """Whether every row brings the same number of tokens."""
        return self.index is None

    def pack(self, x: Tensor) -> Tensor:
        """``[batch, columns, ...]`` -> ``[num_tokens, ...]``."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def pad(self, x: Tensor) -> Tensor:
        """``[num_tokens, ...]`` -> ``[batch, columns, ...]``, zeros where there is no token."""
        if self.index is None:
            return x.view(self.batch, self.columns, *x.shape[1:])
        flat = x.new_zeros(self.batch * self.columns, *x.shape[1:])
        padded = flat.index_put((self.index,), x)
        return padded.view(self.batch, self.columns, *x.shape[1:])

    def last_tokens(self, device: torch.device) -> Tensor:
        """int64 ``[batch]``, packed index of each row's last token; of a row without one, that of
        the row before, or -1."""
        if self.uniform:
            return torch.arange(1, self.batch + 1, device=device) * self.columns - 1
        return to_device(torch.tensor(self.lengths).cumsum(0) - 1, device)

    def last_states(self, x: Tensor, before: Tensor | None) -> Tensor | None:
        """The state of each row's last token, ``[batch, size]`` of ``x [num_tokens, size]``; a row
        without a token in this block keeps what it had ``before``."""
        if self.columns == 1 and self.uniform:
            return x
        if x.shape[0] == 0:
            return before
        rows = x[self.last_tokens(x.device).clamp(min=0)]
        if before is None or self.uniform:
            return rows
        empty = to_device(torch.tensor([n == 0 for n in self.lengths]), x.device)
        return torch.where(empty[:, None], before, rows)

    def rows(self, device: torch.device) -> Tensor:
        """int64 ``[num_tokens]``, the row of each token."""
        if self.index is not None:
            return self.index // self.columns
        return torch.arange(self.batch, device=device).repeat_interleave(self.columns)

    def token_offsets(self, device: torch.device) -> Tensor:
        """int64 ``[num_tokens]``, index of each token among this block's tokens of its row."""
        if self.offsets is not None:
            return self.offsets
        return torch.arange(self.columns, device=device).repeat(self.batch)

    def cu_seqlens(self, device: torch.device) -> Tensor:
        """int32 ``[batch + 1]`` offsets of the rows in the packed tokens."""
        starts = torch.tensor([0, *self.lengths]).cumsum(0)
        return to_device(starts.to(torch.int32), device)


def padding_mask(
    attention_mask: Tensor, batch: int, columns: int, cached: list[int], seen: int
) -> Tensor | None:
    """The bool CPU mask ``[batch, columns]`` of this call's columns, or None when nothing is
    padding.

    Args:
        attention_mask: ``[batch, seen + columns]`` or ``[batch, columns]``, 1 = token; padding
            sits at the left or the right of a row's tokens, never between them.
        batch, columns: of this call's input.
        cached: tokens of each row that are already in the cache.
        seen: padded columns already in the cache.

    Raises:
        ValueError: a wrong shape, a 4-D mask, padding between two tokens of this call, or another
            number of cached tokens than the cache holds.
    """
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            f"attention_mask: expected a torch.Tensor, got {type(attention_mask).__name__}"
        )
    if attention_mask.dim() != 2:
        raise ValueError(
            "attention_mask: expected 2-D (batch, columns), 1 for tokens and 0 for padding, got "
            f"{tuple(attention_mask.shape)}; for custom masks use transformers' own attention"
        )
    if attention_mask.shape[0] != batch or attention_mask.shape[1] not in (columns, seen + columns):
        raise ValueError(
            f"attention_mask: expected ({batch}, {seen + columns}), "
            f"got {tuple(attention_mask.shape)}"
        )
    whole = attention_mask.cpu() != 0
    mask = whole[:, -columns:]
    if whole.shape[1] > columns:
        for row, kept in enumerate(whole[:, :-columns].sum(1).tolist()):
            if kept != cached[row]:
                raise ValueError(
                    f"attention_mask: expected {cached[row]} cached tokens in row {row}, got "
                    f"{kept}: what was cached as a token cannot become padding, nor the reverse"
                )
    if bool(mask.all()):
        return None
    starts = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    if int(starts.max()) > 1:
        row = int(starts.argmax())
        raise ValueError(
            f"attention_mask: row {row} has padding between tokens; "
            "expected it at the left or the right"
        )
    return mask


def check_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Raise unless ``input_ids [batch, columns]`` holds integers inside the vocabulary."""
    if not isinstance(input_ids, Tensor):
        raise TypeError(f"input_ids: expected a torch.Tensor, got {type(input_ids).__name__}")
    if input_ids.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"input_ids: expected int64 token ids, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.numel() == 0:
        raise ValueError(
            f"input_ids: expected (batch, columns) with at least one token, "
            f"got {tuple(input_ids.shape)}"
        )
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"input_ids: expected ids from 0 to {vocab_size - 1}, got {wrong}")
