"""Keys and values of every layer of one batch: linear buffers that grow, rings on sliding layers.

Absolute position p of a row lives in slot p, or in slot ``p % slots`` of a ring. A ring of
``round_up(W - 1 + chunk, 128)`` slots holds everything a chunk of queries and its window can see.
Padding is never stored: ``lengths`` counts real tokens of each row, ``seen`` counts padded
    columns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from exafuse.batch import to_device
from exafuse.cache_columns import Block, Mark, Ragged, first_columns, row_lengths
from exafuse.config import ModelConfig
from exafuse.rotary import RotaryState
from exafuse.weights.memory import check_fits

_UNCHECKED_BYTES = 2**26  # less than this is not worth asking the machine for
TILE = 128  # kernels walk key tiles of this many absolute positions


@dataclass
class LayerCache:
    """``k, v [batch, slots, num_kv_heads, head_dim]`` of one layer."""

    k: Tensor
    v: Tensor
    ring: bool


class KVCache:
    """The cache of one batch; made by ``model.new_cache``, advanced by the model's own calls.

    Args:
        config: geometry and the window of each layer.
        batch_size: number of rows.
        dtype, device: of the stored keys and values.
        max_length: tokens a row will reach, when known: full layers then never have to grow.
        chunk: the longest run of tokens the model feeds at once; a ring keeps it beside the
            window.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int | None = None,
        chunk: int = 2048,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.chunk = chunk
        self.seen = 0
        self.next_positions = torch.zeros(batch_size, dtype=torch.int64, device=device)  # for RoPE
        self.num_positions = 0  # on the host: no row's next position is larger
        self._blocks: list[Block | Ragged] = []
        self._spoiled = False
        self.lengths = [0] * batch_size  # on the host
        self.seqlens = torch.zeros(
            batch_size, dtype=torch.int32, device=device
        )  # the same, on device
        self.rotary_state = RotaryState()
        self.high_water = [0] * batch_size  # most tokens each row ever held: what rings overwrote
        self._ring_slots = [
            None if plan.window_size[0] < 0 else _round_up(plan.window_size[0] + chunk)
            for plan in config.layers
        ]
        shape = (batch_size, 0, config.num_kv_heads, config.head_dim)
        self._slot_bytes = batch_size * config.num_kv_heads * config.head_dim * dtype.itemsize
        self.layers = [
            LayerCache(
                torch.empty(shape, dtype=dtype, device=device),
                torch.empty(shape, dtype=dtype, device=device),
                ring=False,
            )
            for _ in config.layers
        ]
        self._rows = torch.arange(batch_size, device=device)
        self._windows = [plan.window_size[0] for plan in config.layers]
        self.reserve(max_length or TILE)

    def reserve(self, length: int) -> None:
        """Make room for ``length`` tokens a row; growing copies what is stored, rings stay.

        Raises:
            DoesNotFitError: the larger buffers do not fit the free memory; nothing has changed.
        """
        larger: list[tuple[LayerCache, int, bool]] = []
        for layer, ring_slots in zip(self.layers, self._ring_slots, strict=True):
            slots = layer.k.shape[1]
            if layer.ring or length <= slots:
                continue
            grown = _round_up(max(length, 2 * slots))
            # A linear buffer as long as the ring is that ring: p % slots == p for all it holds.
            ring = ring_slots is not None and grown >= ring_slots
            larger.append((layer, ring_slots if ring and ring_slots else grown, ring))
        num_bytes = sum(2 * slots * self._slot_bytes for _, slots, _ in larger)
        if num_bytes > _UNCHECKED_BYTES:
            rows = "row" if self.batch_size == 1 else "rows"
            what = f"a cache of {length} tokens in {self.batch_size} {rows}"
            check_fits(num_bytes, self.seqlens.device, what)
        used = max(self.lengths)
        for layer, slots, ring in larger:
            k, v = _grow(layer.k, slots, used), _grow(layer.v, slots, used)
            layer.k, layer.v, layer.ring = k, v, ring

    def slot_mappings(self, positions: Tensor, rows: Tensor | None = None) -> dict[int, Tensor]:
        """int64 ``[num_tokens]`` cache slots of tokens, by the number of slots of a layer.

        Args:
            positions: int ``[num_tokens]``, absolute position of each token in its row's cache.
            rows: int64 ``[num_tokens]``, cache row of each token; None = one token per row.
        """
        rows = self._rows if rows is None else rows
        mappings: dict[int, Tensor] = {}
        for layer in self.layers:
            slots = layer.k.shape[1]
            if slots not in mappings:
                mappings[slots] = rows * slots + (positions % slots if layer.ring else positions)
        return mappings

    def advance(self, new_lengths: list[int], columns: int, mask: Tensor | None = None) -> None:
        """Count tokens about to be written.

        Args:
            new_lengths: tokens of each row.
            columns: of the padded input.
            mask: bool ``[batch, columns]`` on the CPU, where the tokens are; None = everywhere.
        """
        uniform = len(set(new_lengths)) == 1
        step: int | Tensor = new_lengths[0]
        if not uniform:
            step = torch.tensor(new_lengths, dtype=torch.int32).to(self.seqlens.device)
        self.seqlens = self.seqlens + step
        self._count(new_lengths, columns, mask)

    def count_step(self) -> None:
        """Count one token of every row that the device has counted by itself."""
        self._count([1] * self.batch_size, 1, None)
        self.num_positions += 1

    def _count(self, new_lengths: list[int], columns: int, mask: Tensor | None) -> None:
        last = self._blocks[-1] if self._blocks else None
        if mask is None and isinstance(last, Block) and last.mask is None:
            self._blocks[-1] = Block(last.columns + columns, None)
        else:
            self._blocks.append(Block(columns, mask))
        self.lengths = [old + new for old, new in zip(self.lengths, new_lengths, strict=True)]
        self.seen += columns
        self.high_water = [max(pair) for pair in zip(self.high_water, self.lengths, strict=True)]

    def get_seq_length(self) -> int:
        """Padded columns fed so far (for unpadded input: tokens)."""
        return self.seen

    @property
    def nbytes(self) -> int:
        """Bytes of all key and value buffers."""
        return sum(layer.k.nbytes + layer.v.nbytes for layer in self.layers)

    def crop(self, length: int) -> None:
        """Forget everything after the first ``length`` padded columns.

        Raises:
            ValueError: a ring has already overwritten keys that the shortened rows would need.
        """
        if not 0 <= length <= self.seen:
            raise ValueError(f"length: expected 0 to {self.seen}, got {length}")
        blocks = first_columns(self._blocks, length)
        lengths = row_lengths(blocks, self.batch_size)
        problem = self._overwritten(lengths)
        if problem:
            raise ValueError(f"length: {problem}")
        self._cut(lengths, blocks)

    def mark(self) -> Mark:
        """The present state, for :meth:`keep_after`."""
        return Mark(self.seen, tuple(self.lengths), self.num_positions)

    def keep_after(self, mark: Mark, tokens: list[int]) -> None:
        """Forget what rows hold beyond their first ``tokens[r]`` tokens after a mark.

        Rows may keep different numbers of tokens. From the mark on, padded columns then count from
        each row's first token, as if every row had been padded at the right.

        Raises:
            ValueError: a row does not hold so many tokens, or a ring has already overwritten keys
                that the shortened row would need.
        """
        lengths = [start + kept for start, kept in zip(mark.lengths, tokens, strict=True)]
        for row, (kept, held) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not mark.lengths[row] <= kept <= held:
                raise ValueError(
                    f"tokens: expected 0 to {held - mark.lengths[row]} in row {row}, "
                    f"got {tokens[row]}"
                )
        problem = self._overwritten(lengths)
        if problem:
            raise ValueError(f"tokens: {problem}")
        blocks = first_columns(self._blocks, mark.columns)
        if max(tokens):
            uniform = len(set(tokens)) == 1
            blocks.append(Block(tokens[0], None) if uniform else Ragged(tuple(tokens)))
        self._cut(lengths, blocks)
        self.num_positions = mark.num_positions + max(tokens)

    def _cut(self, lengths: list[int], blocks: list[Block | Ragged]) -> None:
        """Shorten the rows, which nothing forbids, to what ``blocks`` describe."""
        removed = [old - new for old, new in zip(self.lengths, lengths, strict=True)]
        device = self.seqlens.device
        self.next_positions = self.next_positions - to_device(torch.tensor(removed), device)
        self.lengths, self._blocks = lengths, blocks
        self.seen = sum(block.columns for block in blocks)
        self.seqlens = to_device(torch.tensor(lengths, dtype=torch.int32), device)
        # An emptied row starts anew, whatever its slots once held.
        self.high_water = [h if n else 0 for h, n in zip(self.high_water, lengths, strict=True)]
        self.next_positions = self.next_positions * (self.seqlens > 0)

    def _overwritten(self, lengths: list[int]) -> str:
        """Why the rows cannot go back to ``lengths``, or an empty string."""
        for layer, window_left in zip(self.layers, self._windows, strict=True):
            slots = layer.k.shape[1]
            for row, (kept, written) in enumerate(zip(lengths, self.high_water, strict=True)):
                oldest = written - slots + window_left
                if layer.ring and written > slots and 0 < kept < oldest:
                    return (
                        f"row {row} of a sliding-window layer can be cut back to {oldest} tokens "
                        f"at most ({written} were written into {slots} slots), got {kept}"
                    )
        return ""

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """A call that fails inside leaves the cache as it was.

        Where it had already overwritten keys that are still needed, the cache is spoiled instead,
        and every later call says so.
        """
        if self._spoiled:
            raise ValueError(
                "past_key_values: an interrupted call has overwritten keys of this cache; "
                "start again with a new one"
            )
        state = copy.copy(self.rotary_state)
        before = (self.lengths, self.seqlens, self.seen, self.next_positions, self.num_positions)
        blocks = list(self._blocks)
        try:
            yield
        except BaseException:
            self._spoiled = bool(self._overwritten(before[0]))
            self.lengths, self.seqlens, self.seen, self.next_positions, self.num_positions = before
            self._blocks, self.rotary_state = blocks, state
            raise


def _round_up(length: int) -> int:
    return -(-length // TILE) * TILE


def _grow(old: Tensor, slots: int, used: int) -> Tensor:
    # Not zeroed: slots beyond a row's length are masked by position and never reach a result.
    new = old.new_empty(old.shape[0], slots, *old.shape[2:])
    new[:, :used] = old[:, :used]
    return new
