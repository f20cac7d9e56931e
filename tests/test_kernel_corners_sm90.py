"""Few calls of the prefill kernel of sm_90, each with much in it that may go wrong.

Small enough for every mutant: one or two calls for each way through the kernel, in the schedule in
which copies land and products complete as late as they may.
"""

from __future__ import annotations

import os
import random
from unittest import mock

import attention_caches
import pytest
import torch
from attention_sequences import BF16, FP16, normal
from emulator.control import Emulator
from kernel_backends import Backend
from prefill_calls import TILES_SM90, PrefillCall, random_cache_call
from test_prefill_sm90 import emulated, emulator

__all__ = ["emulated", "emulator"]  # fixtures


def tensors(
    queries: int, keys: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    shapes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    return [normal(1, *s, dim, dtype=dtype, key=n) for n, s in zip("qkv", shapes, strict=True)]


@pytest.mark.parametrize("tile", TILES_SM90, ids=str)
def test_tiles(
    tile: tuple[int, int, int], emulated: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several works a block, each of several tiles with ragged ends."""
    cols, queries, keys = tile
    monkeypatch.setenv("EXAFUSE_ATTENTION", f"sm90:{queries}x{keys}")
    PrefillCall(*tensors(300, 2 * keys + 37, 4, 2, cols, BF16), (-1, 0)).check(emulated, "causal")
    call = PrefillCall(*tensors(130, 3 * keys + 1, 2, 1, cols - 8, FP16), (keys + 9, 2))
    call.check(emulated, "window")


def test_packed(emulated: Backend) -> None:
    lengths_q, lengths_k = [0, 70, 130, 1, 64], [9, 70, 260, 0, 129]
    q = normal(sum(lengths_q), 2, 64, dtype=BF16, key="q")
    k, v = (normal(sum(lengths_k), 1, 64, dtype=BF16, key=name) for name in "kv")
    starts = [
        torch.tensor([0, *torch.tensor(n).cumsum(0).tolist()], dtype=torch.int32)
        for n in (lengths_q, lengths_k)
    ]
    for window in ((-1, 0), (-1, -1), (30, 0)):
        PrefillCall(q, k, v, window, None, *starts, 130).check(emulated, f"packed, {window}")


@pytest.mark.parametrize("kind", attention_caches.KINDS)
def test_caches(kind: str, emulated: Backend) -> None:
    choose = random.Random(f"corners {kind}")
    for number in range(3):
        random_cache_call(choose, kind, ("corner", number)).check(emulated, f"{kind} {number}")


def test_what_is_not_finite(emulated: Backend) -> None:
    for dtype in (BF16, FP16):
        q, k, v = tensors(150, 150, 1, 1, 64, dtype)
        v[0, 100, 0, 5:9] = float("inf")
        v[0, 20, 0, 63] = float("nan")
        PrefillCall(q, k, v, (-1, 0)).check(emulated, f"{dtype}, causal")
        PrefillCall(q, k, v, (40, 0)).check(emulated, f"{dtype}, window")
    # Weights that round to zero: zero times infinity is NaN here as in whole tiles.
    sharp = PrefillCall(8 * q, k, v, (-1, 0))
    ours, _ = sharp.run(emulated)
    with mock.patch.dict(os.environ, EXAFUSE_ATTENTION="sm80"):
        theirs, _ = sharp.run(emulated)
    assert ours.isinf().any()
    assert ours.isnan().sum() > 150
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


def test_what_is_not_finite_in_one_tile_of_many(emulated: Backend) -> None:
    """Blocks that have seen other tiles, with and without, before: what they noted is past."""
    q, k, v = tensors(300, 300, 12, 12, 64, BF16)
    for head, token in enumerate((5, 290, 130, 200, 270, 60), start=4):
        v[0, token, head, 7] = float("nan")
    for window in ((200, 0), (-1, 0)):
        PrefillCall(q, k, v, window).check(emulated, f"window {window}")


def test_a_slow_warp(emulated: Backend, emulator: Emulator) -> None:
    call = PrefillCall(*tensors(260, 500, 2, 1, 64, BF16), (-1, -1))
    expected = call.run(emulated)
    schedules = [("random", warp, "latest", warp) for warp in range(12)]
    schedules += [(o, 1, "early", warp) for warp in range(12) for o in ("forward", "reverse")]
    for order, seed, landing, warp in schedules:
        with emulator.schedule(order, seed=seed, landing=landing, slow_warp=warp):
            for ours, theirs in zip(call.run(emulated), expected, strict=True):
                assert torch.equal(ours, theirs), (order, seed, landing, warp)
