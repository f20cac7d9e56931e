"""Images and a video for a prompt, made directly: random pixels, placeholder ids, no processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exafuse.config import ModelConfig


def with_pictures(
    ids: Tensor, config: ModelConfig, seed: int = 0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Put two images and a video into a prompt.

    The grids are larger than a window and no multiple of it, so that windows at the right and at
    the bottom are ragged; the second image is a single token.

    Args:
        ids: int64 ``[1, prompt_tokens]`` of text; placeholder ids in it are replaced.
        config: of a model with a vision tower.
        seed: of the pixels, which are normal and exact in bfloat16.

    Returns:
        The ids with placeholders, and the model's inputs for them.
    """
    vision = config.vision
    assert vision is not None
    merge, side = vision.spatial_merge_size, vision.window_units
    images = [[1, merge * (2 * side + 1), merge * (side + 1)], [1, merge, merge]]
    videos = [[2, merge * side, merge * (side + 1)]]
    generator = torch.Generator().manual_seed(seed)

    def pixels(grids: list[list[int]]) -> Tensor:
        count = sum(math.prod(grid) for grid in grids)
        values = torch.randn(count, vision.patch_values, generator=generator)
        return values.bfloat16().float()

    def stand_in(grid: list[int], token_id: int | None) -> Tensor:
        assert token_id is not None
        return torch.full((math.prod(grid) // vision.merge_unit,), token_id)

    taken = (config.image_token_id, config.video_token_id)
    free = next(i for i in range(config.vocab_size) if i not in taken)
    text = torch.where(torch.isin(ids[0], torch.tensor(taken)), free, ids[0])
    first, second, rest = text.tensor_split(3)
    pieces = (
        *(first, stand_in(images[0], config.image_token_id)),
        *(second, stand_in(images[1], config.image_token_id)),
        *(stand_in(videos[0], config.video_token_id), rest),
    )
    inputs = {
        "pixel_values": pixels(images),
        "image_grid_thw": torch.tensor(images),
        "pixel_values_videos": pixels(videos),
        "video_grid_thw": torch.tensor(videos),
    }
    return torch.cat(pieces)[None], inputs
