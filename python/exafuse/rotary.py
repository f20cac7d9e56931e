"""Rotary position embedding: frequencies of the six types, and tables of their cosines and sines.

The formulas and their fp32 evaluation order are those of transformers (``modeling_rope_utils``), so
that the tables are bitwise those that the checkpoint's own code computes on a CPU. All start from
``theta ** (-2 i / head_dim)`` for pair i; an angle is position * frequency, in fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from exafuse.config.rope import RopeConfig

T = TypeVar("T")

_FIRST_ROWS = 256


def rope_frequencies(
    rope: RopeConfig, head_dim: int, max_position_embeddings: int, num_positions: int | None = None
) -> Tensor:
    """Radians per position of every rotated pair: fp32 ``[head_dim / 2]`` on the CPU.

    ``num_positions`` is the length that two types depend on: longrope changes to its long factors
    beyond the original length, dynamic stretches the base beyond ``max_position_embeddings``. None
    means a length within the original context.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    if rope.rope_type == "dynamic":
        return _dynamic(rope, exponents, head_dim, max_position_embeddings, num_positions)
    powers: Tensor = rope.theta**exponents
    if rope.rope_type == "linear":
        return (1.0 / powers) / _given(rope.factor, "factor")
    if rope.rope_type == "llama3":
        return _llama3(rope, 1.0 / powers)
    if rope.rope_type == "yarn":
        return _yarn(rope, powers, head_dim, max_position_embeddings)
    if rope.rope_type == "longrope":
        long = (num_positions or 0) > _original_length(rope)
        factors = rope.long_factor if long else rope.short_factor
        return 1.0 / (torch.tensor(_given(factors, "factors"), dtype=torch.float32) * powers)
    return 1.0 / powers


def attention_factor(rope: RopeConfig, max_position_embeddings: int) -> float:
    """What cosines and sines are multiplied with; not 1 in yarn and longrope only."""
    if rope.rope_type not in ("yarn", "longrope"):
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    factor = _extension(rope, max_position_embeddings)
    if rope.rope_type == "longrope":
        if factor <= 1.0:
            return 1.0
        return math.sqrt(1 + math.log(factor) / math.log(_original_length(rope)))
    if rope.mscale and rope.mscale_all_dim:
        return _yarn_mscale(factor, rope.mscale) / _yarn_mscale(factor, rope.mscale_all_dim)
    return _yarn_mscale(factor, 1.0)


@dataclass
class RotaryState:
    """How far one cache has come: the largest length that any call on it has had.

    Only the dynamic type reads it. ``num_positions`` 0 means nothing yet.
    """

    num_positions: int = 0

    def advance(self, num_positions: int, max_position_embeddings: int) -> int:
        """Take note of a call that reaches ``num_positions``; returns the length it is rotated for.

        The length never shrinks while calls reach the original context, because the cached keys
        carry its base; a call that stays below that context starts anew.
        """
        if num_positions < max_position_embeddings:
            self.num_positions = num_positions
        else:
            self.num_positions = max(self.num_positions, num_positions)
        return self.num_positions


@dataclass
class _Rows:
    cos: Tensor
    sin: Tensor


class RotaryTable:
    """Cosines and sines of positions 0, 1, 2 ... for one model, cached per device.

    Tables grow by doubling, up to ``max_position_embeddings`` rows or what a call asks for. Where
    the frequencies depend on the length (dynamic, longrope) each call gets those of its own length:
    callers ask once per forward, for the whole batch, before they split it into chunks.
    """

    def __init__(self, rope: RopeConfig, head_dim: int, max_position_embeddings: int) -> None:
        self.rope = rope
        self.head_dim = head_dim
        self.max_position_embeddings = max_position_embeddings
        self.attention_factor = attention_factor(rope, max_position_embeddings)
        # By device and by the length that the frequencies were made for (0: the original context).
        self._rows: dict[tuple[torch.device, int], _Rows] = {}

    def __call__(
        self, num_positions: int, device: torch.device | str, state: RotaryState | None = None
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, fp32 ``[rows >= num_positions, head_dim / 2]``, times the attention factor.

        Args:
            num_positions: the call's largest position + 1, over the whole batch.
            device: where the tables shall lie.
            state: the cache's, updated in place; None: the call is the first of its conversation.
        """
        if num_positions < 1:
            raise ValueError(f"num_positions: expected at least 1, got {num_positions}")
        device = _with_index(torch.device(device))
        key = (device, self._length_key(num_positions, state))
        rows = self._rows.get(key)
        if rows is None or rows.cos.shape[0] < num_positions:
            if self.rope.rope_type == "dynamic" and key[1]:
                self._forget_stretched(device)
            rows = self._make(num_positions, device, key[1], rows)
            self._rows[key] = rows
        return rows.cos, rows.sin

    def _length_key(self, num_positions: int, state: RotaryState | None) -> int:
        """0 for the frequencies of the original context, else the length of the stretched ones."""
        if self.rope.rope_type == "dynamic":
            state = RotaryState() if state is None else state
            length = state.advance(num_positions, self.max_position_embeddings)
            return length if length > self.max_position_embeddings else 0
        original = self.rope.original_max_position_embeddings
        if self.rope.rope_type == "longrope" and original is not None and num_positions > original:
            return original + 1
        return 0

    def _make(
        self, num_positions: int, device: torch.device, length: int, old: _Rows | None
    ) -> _Rows:
        count = max(_FIRST_ROWS, 2 * old.cos.shape[0] if old is not None else 0)
        limit = self.max_position_embeddings
        if self.rope.rope_type == "longrope" and not length:
            limit = min(limit, self.rope.original_max_position_embeddings or limit)
        if self.rope.rope_type == "dynamic" and length:
            limit = length  # one call further the frequencies are others
        # Beyond the limit tables go on doubling: one more row a token would mean a new table each.
        count = max(num_positions, count if num_positions > limit else min(count, limit))
        frequencies = rope_frequencies(
            self.rope, self.head_dim, self.max_position_embeddings, length or None
        )
        # Tables outlive the call: made under inference mode they could never serve a training step.
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(count, dtype=torch.float32, device=device)
            angles = positions[:, None] * frequencies.to(device)
            return _Rows(angles.cos() * self.attention_factor, angles.sin() * self.attention_factor)

    def _forget_stretched(self, device: torch.device) -> None:
        """Drop the tables of other stretched lengths: each serves one length, and lengths grow."""
        for key in [key for key in self._rows if key[0] == device and key[1]]:
            del self._rows[key]


def _dynamic(
    rope: RopeConfig, exponents: Tensor, head_dim: int, max_positions: int, length: int | None
) -> Tensor:
    factor = _given(rope.factor, "factor")
    power = head_dim / (head_dim - 2)
    if length is None or length <= max_positions:
        base = rope.theta * float((factor * max_positions / max_positions - (factor - 1)) ** power)
        powers: Tensor = base**exponents
        return 1.0 / powers
    # transformers has the length as an integer tensor here, so that the base is computed in fp32.
    stretched = torch.tensor(length, dtype=torch.float32) * factor / max_positions
    powers = (rope.theta * (stretched - (factor - 1)) ** power) ** exponents
    return 1.0 / powers


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    factor, original = _given(rope.factor, "factor"), _original_length(rope)
    low = _given(rope.low_freq_factor, "low_freq_factor")
    high = _given(rope.high_freq_factor, "high_freq_factor")
    wavelengths = 2 * math.pi / frequencies
    slow = wavelengths > original / low
    fast = wavelengths < original / high
    smooth = (original / wavelengths - low) / (high - low)
    between = (1 - smooth) * frequencies / factor + smooth * frequencies
    return torch.where(slow, frequencies / factor, torch.where(fast, frequencies, between))


def _yarn(rope: RopeConfig, powers: Tensor, head_dim: int, max_positions: int) -> Tensor:
    factor, original = _extension(rope, max_positions), _original_length(rope)

    def pair_that_turns(turns: float) -> float:
        """The (fractional) pair that makes so many full turns within the original context."""
        return (head_dim * math.log(original / (turns * 2 * math.pi))) / (2 * math.log(rope.theta))

    first = pair_that_turns(rope.beta_fast or 32)
    last = pair_that_turns(rope.beta_slow or 1)
    if rope.truncate is not False:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001
    ramp = torch.clamp(
        (torch.arange(head_dim // 2, dtype=torch.float32) - first) / (last - first), 0, 1
    )
    keep = 1 - ramp
    return 1.0 / (factor * powers) * (1 - keep) + 1.0 / powers * keep


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _extension(rope: RopeConfig, max_position_embeddings: int) -> float:
    """How many times longer than the original context."""
    if rope.factor is not None:
        return rope.factor
    return max_position_embeddings / _original_length(rope)


def _original_length(rope: RopeConfig) -> int:
    return _given(rope.original_max_position_embeddings, "original_max_position_embeddings")


def _given(value: T | None, name: str) -> T:
    if value is None:
        raise ValueError(f"rope: expected {name} for this type of RoPE, got None")
    return value


def _with_index(device: torch.device) -> torch.device:
    """ "cuda" and "cuda:0" name one device; the table must not be made twice."""
    if device.index is not None or device.type in ("cpu", "meta"):
        return device
    return torch.empty(0, device=device).device
