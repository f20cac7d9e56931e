"""Which padded columns of a cache hold tokens of which row."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Block:
    """Padded columns that were fed; ``mask`` says which cells were tokens, None = all of them."""

    columns: int
    mask: Tensor | None

    def first(self, columns: int) -> Block:
        """The first so many columns of it."""
        columns = min(max(columns, 0), self.columns)
        return Block(columns, None if self.mask is None else self.mask[:, :columns])

    def lengths(self, batch_size: int) -> list[int]:
        """Tokens of each row."""
        if self.mask is None:
            return [self.columns] * batch_size
        counts: list[int] = self.mask.sum(1).tolist()
        return counts


@dataclass(frozen=True)
class Ragged:
    """Columns after which rows differ in length: row r fills the first ``tokens[r]`` of them."""

    tokens: tuple[int, ...]

    @property
    def columns(self) -> int:
        """As many as the longest row fills."""
        return max(self.tokens)

    def first(self, columns: int) -> Ragged:
        """The first so many columns of it."""
        return Ragged(tuple(min(max(columns, 0), tokens) for tokens in self.tokens))

    def lengths(self, batch_size: int) -> list[int]:
        """Tokens of each row."""
        return list(self.tokens)


@dataclass(frozen=True)
class Mark:
    """A state of a cache that its rows can go back to; see ``KVCache.keep_after``."""

    columns: int
    lengths: tuple[int, ...]  # tokens of each row
    num_positions: int


def first_columns(blocks: list[Block | Ragged], columns: int) -> list[Block | Ragged]:
    """The blocks of the first so many columns."""
    kept, start = [], 0
    for block in blocks:
        part = block.first(columns - start)
        if part.columns:
            kept.append(part)
        start += block.columns
    return kept


def row_lengths(blocks: list[Block | Ragged], batch_size: int) -> list[int]:
    """Tokens of each row in all blocks."""
    parts = [block.lengths(batch_size) for block in blocks]
    return [sum(row) for row in zip(*parts, strict=True)] if parts else [0] * batch_size
