"""The two ceilings of a device, measured in the run that uses them, and what attention costs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .case import FULL, Settings
from .results import Ceilings
from .timing import time_calls


def measure(settings: Settings) -> Ceilings:
    """Copy and read bandwidth on buffers far larger than the cache, and the matrix rate."""
    copy, read = _bandwidths(settings)
    return Ceilings(copy, read, _matrix_rate(settings))


def _rate(settings: Settings, call: Callable[[], object], amount: float) -> float:
    """``amount`` in thousands a microsecond of the call, at its fastest: a ceiling is no median."""
    return amount / 1e3 / time_calls([call], settings.device, FULL).best_us


def _bandwidths(settings: Settings) -> tuple[float, float]:
    num_bytes = (1 << 30) if settings.device.type == "cuda" else (1 << 25)
    source = torch.ones(num_bytes // 4, device=settings.device)
    target = torch.empty_like(source)
    copy = _rate(settings, lambda: target.copy_(source), 2 * num_bytes)
    # A sum, or a maximum, reads and writes nothing; the faster of the two is the ceiling.
    return copy, max(_rate(settings, reduce, num_bytes) for reduce in (source.sum, source.amax))


def _matrix_rate(settings: Settings) -> float:
    size = 8192 if settings.device.type == "cuda" else 512
    generator = torch.Generator(settings.device).manual_seed(0)
    # Random numbers: a product of zeros draws less power and runs faster than any real one.
    a, b = (
        torch.randn(size, size, device=settings.device, generator=generator).to(settings.dtype)
        for _ in range(2)
    )
    return _rate(settings, lambda: a @ b, 2 * size**3 / 1e3)


def visible_pairs(seqlen_q: int, seqlen_k: int, left: int, right: int) -> int:
    """Pairs of a query and a key it sees; bounds as in flash_attn_func, -1 = open."""
    total = 0
    for query in range(seqlen_k - seqlen_q, seqlen_k):
        low = 0 if left < 0 else max(0, query - left)
        high = seqlen_k - 1 if right < 0 else min(seqlen_k - 1, query + right)
        total += max(0, high - low + 1)
    return total


def attention_flops(pairs: int, num_heads: int, head_dim: int) -> int:
    """Scores and their product with the values."""
    return 4 * pairs * num_heads * head_dim
