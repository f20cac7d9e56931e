"""Where the patches of images and videos go: windows, frames and positions, once per call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exafuse.config import VisionConfig

Grid = tuple[int, int, int]


def read_grids(
    name: str, grid_thw: Tensor, pixel_values: Tensor, config: VisionConfig
) -> list[Grid]:
    """``grid_thw [n, 3]`` (frames, rows, columns of patches) as numbers; waits for the device.

    Raises:
        TypeError: no tensors.
        ValueError: a grid that cannot be, or that contradicts ``pixel_values [num_patches,
            patch_values]``; ``name`` ("image", "video") stands in the message.
    """
    pixels, grid = f"{name} pixel values", f"{name}_grid_thw"
    for what, tensor in ((pixels, pixel_values), (grid, grid_thw)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{what}: expected a torch.Tensor, got {type(tensor).__name__}")
    if grid_thw.dim() != 2 or grid_thw.shape[1] != 3 or not len(grid_thw):
        raise ValueError(f"{grid}: expected (n >= 1, 3), got {tuple(grid_thw.shape)}")
    if grid_thw.is_floating_point() or grid_thw.is_complex() or grid_thw.dtype == torch.bool:
        raise ValueError(f"{grid}: expected integers, got {grid_thw.dtype}")
    if not pixel_values.is_floating_point():
        raise ValueError(f"{pixels}: expected floating point, got {pixel_values.dtype}")
    merge = config.spatial_merge_size
    grids = [(int(t), int(h), int(w)) for t, h, w in grid_thw.tolist()]
    for frames, rows, columns in grids:
        if min(frames, rows, columns) < 1 or rows % merge or columns % merge:
            raise ValueError(
                f"{grid}: expected positive numbers, rows and columns in multiples of {merge}, "
                f"got {(frames, rows, columns)}"
            )
    expected = (sum(t * h * w for t, h, w in grids), config.patch_values)
    if tuple(pixel_values.shape) != expected:
        raise ValueError(
            f"{pixels}: expected {expected} by {grid}, got {tuple(pixel_values.shape)}"
        )
    return grids


@dataclass(frozen=True)
class VisionLayout:
    """What the blocks of the tower need to know about one call, on their device.

    A unit is a square of patches that becomes one token. Units come image by image, frame by frame
    and row by row; ``order`` sorts them so that each window is in one piece. A window is a square
    of units of one frame; those at the right and the bottom may be smaller.
    """

    order: Tensor  # int64 [num_units], place in the input of each unit in window order
    inverse: Tensor  # int64 [num_units], place in window order of each unit of the input
    cos: Tensor  # fp32 [num_patches, head_dim / 2], rows in window order
    sin: Tensor
    cu_windows: Tensor  # int32 [windows + 1], in patches
    cu_frames: Tensor  # int32 [frames + 1]
    max_window: int  # patches
    max_frame: int

    @classmethod
    def of(cls, grids: list[Grid], config: VisionConfig, device: torch.device) -> VisionLayout:
        """Layout of images and videos of ``(frames, rows, columns)`` patches each.

        Everything is found on the host from the grids; nothing waits for the device.
        """
        merge, side, unit = config.spatial_merge_size, config.window_units, config.merge_unit
        windows, rows, columns, frame_sizes = [], [], [], []
        first_window = 0
        for frames, height, width in grids:
            high, wide = height // merge, width // merge
            frame, row, column = torch.meshgrid(
                torch.arange(frames), torch.arange(high), torch.arange(wide), indexing="ij"
            )
            down, across = -(-high // side), -(-wide // side)
            windows.append(first_window + (frame * down + row // side) * across + column // side)
            first_window += frames * down * across
            rows.append(row)
            columns.append(column)
            frame_sizes += [high * wide * unit] * frames
        window = torch.cat([x.flatten() for x in windows])
        order = window.argsort(stable=True)  # inside a window units stay row by row
        inner = torch.arange(merge)
        row = _patches(rows, order, merge, inner.repeat_interleave(merge))
        column = _patches(columns, order, merge, inner.repeat(merge))
        cos, sin = _rotations(row.to(device), column.to(device), config)
        whole_window = (side * merge) ** 2
        return cls(
            order=order.to(device),
            inverse=order.argsort().to(device),
            cos=cos,
            sin=sin,
            cu_windows=_offsets(window.bincount() * unit, device),
            cu_frames=_offsets(torch.tensor(frame_sizes), device),
            max_window=min(whole_window, max(frame_sizes)),
            max_frame=max(frame_sizes),
        )


def _patches(units: list[Tensor], order: Tensor, merge: int, inner: Tensor) -> Tensor:
    """A coordinate of units -> int64 ``[num_patches]``, the same of their patches in order."""
    coordinate = torch.cat([x.flatten() for x in units])[order]
    return (coordinate[:, None] * merge + inner).flatten()


def _rotations(row: Tensor, column: Tensor, config: VisionConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of ``[row * w, column * w]``, with head_dim / 4 frequencies w each."""
    width = config.head_dim // 2
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=row.device) / width
    frequencies = 1.0 / config.rope_theta**exponents
    positions = torch.stack([row, column], dim=1).to(torch.float32)
    angles = (positions[:, :, None] * frequencies).flatten(1)
    return angles.cos(), angles.sin()


def _offsets(sizes: Tensor, device: torch.device) -> Tensor:
    return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)]).to(torch.int32).to(device)
