"""Random arrays for the race cases, as the kernels store them: bfloat16 as its bits in uint16."""

from __future__ import annotations

import numpy as np
import oracles


class Cases:
    """Draws numbers and arrays, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)

    def pick(self, *choices: object) -> object:
        return choices[self.random.integers(len(choices))]

    def number(self, low: int, high: int) -> int:
        return int(self.random.integers(low, high + 1))

    def values(self, dtype: str, *shape: int) -> np.ndarray:
        """Gaussian values that the dtype can hold."""
        return oracles.round_to(self.random.standard_normal(shape), dtype)

    def gapped(self, stored: np.ndarray) -> np.ndarray:
        """The same rows with a stride of their own, where the array has rows."""
        if stored.ndim < 2 or self.random.integers(2):
            return stored
        wide = np.zeros((*stored.shape[:-1], stored.shape[-1] + 8), stored.dtype)
        view = wide[..., : stored.shape[-1]]
        view[...] = stored
        return view


def store(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(dtype)
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def read(stored: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return stored.astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def empty(like: np.ndarray, dtype: str) -> np.ndarray:
    """NaN everywhere, until the kernel writes it."""
    return store(np.full(like.shape, np.nan), dtype)
