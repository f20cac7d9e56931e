"""Tokens of images and videos in the text: features replace the embeddings of placeholder ids."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class VisionInputs:
    """Images and videos of one call; each kind's two tensors go together."""

    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    pixel_values_videos: Tensor | None = None
    video_grid_thw: Tensor | None = None

    def given(self) -> list[str]:
        """Names of the tensors that are there."""
        return [field.name for field in fields(self) if getattr(self, field.name) is not None]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Kind ("image", "video") -> pixel values and grids, of the kinds that are there.

        Raises:
            ValueError: one of the two is missing.
        """
        pairs = {}
        for kind, pixels, grid in (
            ("image", "pixel_values", "image_grid_thw"),
            ("video", "pixel_values_videos", "video_grid_thw"),
        ):
            both = getattr(self, pixels), getattr(self, grid)
            if (both[0] is None) != (both[1] is None):
                raise ValueError(f"{pixels}, {grid}: expected both of them or none")
            if both[0] is not None:
                pairs[kind] = both
        return pairs


@dataclass(frozen=True)
class Placeholders:
    """Features of one call and where they go."""

    features: Tensor  # [num_features, hidden_size]
    index: Tensor  # int64 [batch, columns], row of features; -1 = a token of the text

    @classmethod
    def of(cls, found: dict[str, tuple[Tensor, Tensor]]) -> Placeholders:
        """Match features to placeholders in order.

        Args:
            found: by kind ("image", "video"): a bool mask ``[batch, columns]`` of its
                placeholders, and its features ``[n, hidden_size]``.

        Raises:
            ValueError: a kind has more or fewer placeholders than features.
        """
        features = torch.cat([rows for _, rows in found.values()])
        first, index = 0, None
        for kind, (mask, rows) in found.items():
            number = int(mask.sum())
            if number != len(rows):
                raise ValueError(
                    f"{kind}_token_id, {kind}_grid_thw: expected {len(rows)} {kind} placeholders "
                    f"in the input, one for each token that the grids make, got {number}"
                )
            here = (mask.flatten().cumsum(0) - 1 + first).view(mask.shape)
            index = torch.where(mask, here, -1 if index is None else index)
            first += len(rows)
        assert index is not None
        return cls(features, index)

    def fill(self, embeds: Tensor, index: Tensor) -> Tensor:
        """``embeds [..., hidden_size]`` with the features in the cells of ``index [...]``."""
        features = self.features.to(embeds.dtype)[index.clamp(min=0)]
        return torch.where((index >= 0)[..., None], features, embeds)
