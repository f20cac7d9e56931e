"""Windows, frames and positions of patches, and that the host looks at the grids once."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import exafuse
import pytest
import tiny_models
import tiny_vision
import torch
from exafuse import reference
from exafuse.config import VisionConfig
from exafuse.models.vision_layout import Grid, VisionLayout
from host_reads import HostReads
from torch import Tensor


def config(**changes: int) -> VisionConfig:
    sizes = {"depth": 1, "hidden_size": 32, "intermediate_size": 8, "num_heads": 2}
    sizes |= {"num_kv_heads": 1, "in_channels": 3, "patch_size": 14, "temporal_patch_size": 2}
    sizes |= {"spatial_merge_size": 2, "window_size": 56, "out_hidden_size": 8, **changes}
    floats = {"rope_theta": 1e4, "initializer_range": 0.02}
    return VisionConfig(**sizes, full_attention_blocks=(), **floats)


def layout(grids: list[Grid], **changes: int) -> VisionLayout:
    return VisionLayout.of(grids, config(**changes), torch.device("cpu"))


def test_ragged_windows_by_hand() -> None:
    """10 x 12 patches are 5 x 6 units: windows of 2 x 2, the last row of them 1 x 2."""
    found = layout([(1, 10, 12)])
    assert found.order.tolist()[:16] == [0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19]
    assert found.order.tolist()[-6:] == [24, 25, 26, 27, 28, 29]
    assert found.cu_windows.tolist() == [0, 16, 32, 48, 64, 80, 96, 104, 112, 120]
    assert found.cu_frames.tolist() == [0, 120]
    assert (found.max_window, found.max_frame) == (16, 120)
    assert found.cu_windows.dtype == found.cu_frames.dtype == torch.int32


def test_positions_by_hand() -> None:
    """Patches of a unit stand together: 00 01 10 11, then 02 03 12 13 of the next one."""
    found = layout([(1, 4, 4)], window_size=28)
    rows, columns = [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2, [0, 1, 0, 1, 2, 3, 2, 3] * 2
    frequencies = 1e4 ** (-torch.arange(0, 8, 2) / 8)
    angles = [
        torch.cat([r * frequencies, c * frequencies]) for r, c in zip(rows, columns, strict=True)
    ]
    torch.testing.assert_close(found.cos, torch.stack(angles).cos())
    torch.testing.assert_close(found.sin, torch.stack(angles).sin())


def walk(grids: list[Grid], side: int) -> tuple[list[int], list[int], list[int]]:
    """Order of the units, sizes of windows and of frames in units, by plain loops."""
    order: list[int] = []
    windows, frames = [], []
    first = 0
    for t, h, w in grids:
        for _ in range(t):
            for top in range(0, h, side):
                for left in range(0, w, side):
                    window = [
                        first + i * w + j
                        for i in range(top, min(top + side, h))
                        for j in range(left, min(left + side, w))
                    ]
                    order += window
                    windows.append(len(window))
            frames.append(h * w)
            first += h * w
    return order, windows, frames


def offsets(sizes: list[int], unit: int) -> list[int]:
    return [0, *(torch.tensor(sizes).cumsum(0) * unit).tolist()]


@pytest.mark.parametrize("seed", range(60))
def test_random_grids_against_loops(seed: int) -> None:
    rng = random.Random(seed)
    merge, side = rng.randint(1, 3), rng.randint(1, 5)
    units = [tuple(rng.randint(1, n) for n in (3, 9, 9)) for _ in range(rng.randint(1, 6))]
    grids = [(t, h * merge, w * merge) for t, h, w in units]
    found = layout(
        grids, spatial_merge_size=merge, window_size=14 * merge * side + rng.randint(0, 13)
    )
    order, windows, frames = walk(units, side)
    assert found.order.tolist() == order
    assert found.order[found.inverse].tolist() == list(range(len(order)))
    assert found.cu_windows.tolist() == offsets(windows, merge**2)
    assert found.cu_frames.tolist() == offsets(frames, merge**2)
    assert found.max_window >= max(windows) * merge**2
    assert found.max_window <= (side * merge) ** 2
    assert found.max_frame == max(frames) * merge**2


@torch.no_grad()
def test_grids_are_read_once_and_every_block_makes_one_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen pictures take as many ops as one, and no block waits for the device."""
    folder = tiny_models.save(tiny_vision.build(), tmp_path)
    model = exafuse.from_pretrained(folder, backend="reference", device="cpu")
    generator = torch.Generator().manual_seed(0)
    sizes = [[1, 2 * (1 + i % 5), 2 * (1 + i % 3)] for i in range(16)]
    reads = HostReads(monkeypatch)
    calls: Counter[str] = Counter()

    def counting(name: str):
        op = getattr(reads.not_counting(reference), name)

        def call(*args: Tensor, **kwargs: Tensor) -> Tensor:
            calls[name] += 1
            return op(*args, **kwargs)

        return call

    names = ("vision_attn", "rms_norm", "add_rms_norm", "silu_and_mul")
    model.backend = SimpleNamespace(**{name: counting(name) for name in names})  # type: ignore[assignment]
    seen = []
    for grids in (sizes[:1], sizes):
        pixels = tiny_vision.pixels(grids, 1176, generator)
        grid_thw = torch.tensor(grids)
        calls.clear()
        reads.counts.clear()
        with reads:
            model.get_image_features(pixels, grid_thw)
        assert reads.counts == {"tolist": 1}
        seen.append(dict(calls))
    assert seen[0] == seen[1]
    assert seen[0] == {"vision_attn": 4, "rms_norm": 1, "add_rms_norm": 8, "silu_and_mul": 4}
