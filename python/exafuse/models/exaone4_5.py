"""EXAONE 4.5: a vision tower whose tokens take the places of placeholder ids in the text.

Images and videos are encoded once, when the prompt is read; from there on they are tokens like any
other, at plain 1-D positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from exafuse.config import ModelConfig
from exafuse.errors import ConfigError
from exafuse.models.backbone import Backbone
from exafuse.models.causal_lm import CausalLM
from exafuse.models.heads import BaseModel
from exafuse.models.placeholders import Placeholders, VisionInputs
from exafuse.models.text_model import TextModel
from exafuse.models.vision_layout import read_grids
from exafuse.models.vision_tower import VisionOutput, VisionTower


class Exaone4_5Model(nn.Module):
    """Language model and tower, under the checkpoint's names."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if config.vision is None:
            raise ConfigError(
                "vision_config: expected the vision tower of an exaone4_5 model, got none"
            )
        self.language_model = TextModel(config)
        self.visual = VisionTower(config.vision)


class VisionBackbone(Backbone):
    """A body with a vision tower beside the language model."""

    has_vision = True
    trunk = Exaone4_5Model
    model: Exaone4_5Model

    @property
    def text(self) -> TextModel:
        return self.model.language_model

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> VisionOutput:
        """Encode images.

        Args:
            pixel_values: ``[num_patches, patch_values]``, of all images one after the other.
            image_grid_thw: int ``[images, 3]``, frames (1), rows and columns of patches of each.

        Returns:
            ``pooler_output`` has a tensor ``[tokens, hidden_size]`` for each image.

        Raises:
            ValueError: the grids are impossible or contradict ``pixel_values``.
        """
        return self._encode("image", pixel_values, image_grid_thw)

    def get_video_features(
        self, pixel_values_videos: Tensor, video_grid_thw: Tensor
    ) -> VisionOutput:
        """Encode videos, as :meth:`get_image_features`; frames do not see each other."""
        return self._encode("video", pixel_values_videos, video_grid_thw)

    def _encode(self, kind: str, pixel_values: Tensor, grid_thw: Tensor) -> VisionOutput:
        tower = self.model.visual
        grids = read_grids(kind, grid_thw, pixel_values, tower.config)
        hidden, tokens = tower(pixel_values.to(self.device), grids, self.backend)
        unit = tower.config.merge_unit
        return VisionOutput(hidden, tokens.split([t * h * w // unit for t, h, w in grids]))

    def _placeholders(
        self, input_ids: Tensor | None, embeds: Tensor | None, vision: VisionInputs
    ) -> Placeholders | None:
        image_id, video_id = self.config.image_token_id, self.config.video_token_id
        assert image_id is not None
        assert video_id is not None
        ids = {"image": image_id, "video": video_id}
        found = {}
        for kind, (pixels, grid_thw) in vision.pairs().items():
            features = torch.cat(self._encode(kind, pixels, grid_thw).pooler_output)
            found[kind] = (self._mask(input_ids, embeds, ids[kind]), features)
        return Placeholders.of(found) if found else None

    def _mask(self, input_ids: Tensor | None, embeds: Tensor | None, token_id: int) -> Tensor:
        """Where the placeholders are, bool ``[batch, columns]``: by id, or by their embedding."""
        if input_ids is not None:
            return input_ids.to(self.device).eq(token_id)
        assert embeds is not None
        return embeds.eq(self.text.embed_tokens.weight[token_id]).all(-1)


class Exaone4_5(VisionBackbone, CausalLM):
    """EXAONE 4.5 with its vision tower; made by ``from_pretrained`` or ``from_config``."""


class Exaone4_5Base(VisionBackbone, BaseModel):
    """EXAONE 4.5 without its output matrix and draft module."""
