"""Sequences of an attention call: their lengths, their windows, and who sees whom."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from attention_oracle import Mask, visible
from poison import generator

BF16, FP16 = torch.bfloat16, torch.float16
NEAR_TILES = [n + d for n in (32, 64, 128, 192, 256) for d in (-1, 0, 1)]
WINDOWS = [0, 1, 2, 3, 5, 15, 16, 17, 31, 32, 33, 62, 63, 64, 65, 100, 126, 127, 128, 129, 200]


def any_window(choose: random.Random) -> tuple[int, int]:
    left = choose.choice([-1, choose.choice(WINDOWS), choose.choice(WINDOWS), 5000])
    return left, choose.choice([0, 0, 0, -1, choose.choice(WINDOWS)])


def any_length(choose: random.Random, most: int) -> int:
    near = [n for n in NEAR_TILES if n <= most]
    return choose.choice([choose.randint(0, most), choose.randint(0, most), choose.choice(near)])


@dataclass(frozen=True)
class Sequence:
    """One of the sequences of a call."""

    seqlen_q: int
    seqlen_k: int  # tokens seen
    leftpad: int = 0

    def visible(self, window: tuple[int, int]) -> Mask:
        """`[seqlen_q, seqlen_k]`."""
        return visible(self.seqlen_q, self.leftpad, self.seqlen_k, 0, self.seqlen_k, window)


def offsets(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def normal(*shape: int, dtype: torch.dtype, key: object) -> torch.Tensor:
    return torch.randn(shape, generator=generator("sequences", shape, key)).to(dtype)
