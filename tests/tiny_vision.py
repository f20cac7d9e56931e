"""Small random EXAONE 4.5 models, built by transformers, and pictures for them as pixel values."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers
from torch import Tensor

IMAGE, VIDEO = 7, 8  # the placeholder ids
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1, 3],
}
TEXT = {
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
}


def build(
    text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, seed: int = 0
) -> transformers.PreTrainedModel:
    """An fp32 eager model with weights far from their start values."""
    text = {**tiny_models.BASE, **TEXT, **(text or {}), "model_type": "exaone4_5_text"}
    vision = {**VISION, **(vision or {}), "out_hidden_size": text["hidden_size"]}
    config = transformers.Exaone4_5_Config(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=text.pop("tie_word_embeddings", False),
    )
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = "eager"
    model = transformers.Exaone4_5_ForConditionalGeneration(config).eval()
    return tiny_models.randomise(model, seed)


def load(folder: Path, **kwargs: Any) -> transformers.PreTrainedModel:
    """transformers' model of a folder."""
    return transformers.AutoModelForImageTextToText.from_pretrained(folder, **kwargs).eval()


@dataclass
class Prompt:
    """Ids ``[batch, columns]`` with placeholders, and the pixels that belong to them."""

    ids: Tensor
    vision: dict[str, Tensor] = field(default_factory=dict)


# Older transformers (5.8) has 10000 built in.
TOWER_HAS_ROPE_BASE = hasattr(transformers.Exaone4_5_VisionConfig(), "rope_parameters")


def pixels(grids: list[list[int]], patch_values: int, generator: torch.Generator) -> Tensor:
    """Random pixel values of images or videos."""
    count = sum(t * h * w for t, h, w in grids)
    return torch.randn(count, patch_values, generator=generator)


def make_prompt(
    config: transformers.Exaone4_5_Config,
    images: list[list[int]],
    videos: list[list[int]],
    generator: torch.Generator,
    text_tokens: int = 4,
) -> Prompt:
    """One row: pieces of text around each image and each video."""
    vision = config.vision_config
    merge = vision.spatial_merge_size
    patch_values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    vocab = config.text_config.vocab_size
    pieces, prompt = [], Prompt(torch.empty(0))
    for token, name, grids in (
        (IMAGE, "pixel_values", images),
        (VIDEO, "pixel_values_videos", videos),
    ):
        for t, h, w in grids:
            pieces += [torch.randint(9, vocab, (text_tokens,), generator=generator)]
            pieces += [torch.full((t * h * w // merge**2,), token)]
        if grids:
            prompt.vision[name] = pixels(grids, patch_values, generator)
            grid_name = "image_grid_thw" if token == IMAGE else "video_grid_thw"
            prompt.vision[grid_name] = torch.tensor(grids)
    pieces += [torch.randint(9, vocab, (text_tokens,), generator=generator)]
    prompt.ids = torch.cat(pieces)[None]
    return prompt


@dataclass(frozen=True)
class Case:
    """One random configuration, and grids in patches."""

    seed: int
    text: dict[str, Any]
    vision: dict[str, Any]
    images: list[list[int]]
    videos: list[list[int]]

    def __str__(self) -> str:
        v = self.vision
        kind = f"{v['num_heads']}x{v['num_key_value_heads']}of{v['hidden_size'] // v['num_heads']}"
        return f"{self.seed}-{kind}-m{v['spatial_merge_size']}-w{v['window_size']}"

    def build(self) -> transformers.PreTrainedModel:
        """transformers' model of this configuration."""
        return build(self.text, self.vision, self.seed)

    def prompt(self, config: transformers.Exaone4_5_Config) -> Prompt:
        """The images and videos in one row of text."""
        generator = torch.Generator().manual_seed(self.seed)
        return make_prompt(config, self.images, self.videos, generator, 1 + self.seed % 6)


def random_case(seed: int, tower_heads: tuple[int, ...] = (4, 8, 12, 16, 24)) -> Case:
    """A legal configuration: MQA, GQA and MHA towers, odd grids, windows that do not fit."""
    rng = random.Random(seed)
    text = dict(tiny_models.random_case(3 * seed + 302).overrides)  # an EXAONE 4 text model
    kv = rng.choice([1, 2, 3])
    group = rng.choice([1, 1, 2, 3, 4])
    if seed % 3 == 0:
        kv, group = 1, rng.randint(2, 6)
    heads, merge, patch = kv * group, rng.choice([1, 2, 2, 2, 3]), rng.choice([2, 3, 14])
    depth = rng.randint(1, 4)
    side = rng.choice([1, 2, 2, 3, 4])
    vision = {
        "depth": depth,
        "num_heads": heads,
        "num_key_value_heads": kv,
        "hidden_size": heads * rng.choice(tower_heads),
        "intermediate_size": rng.choice([24, 40, 56]),
        "in_channels": rng.choice([1, 3]),
        "patch_size": patch,
        "temporal_patch_size": rng.choice([1, 2]),
        "spatial_merge_size": merge,
        "window_size": merge * patch * side + rng.randint(0, merge * patch - 1),
        "fullatt_block_indexes": sorted(rng.sample(range(depth), rng.randint(0, depth))),
        "rope_parameters": {"rope_type": "axial", "rope_theta": rng.choice([1e4, 500.0])},
    }
    if not TOWER_HAS_ROPE_BASE:
        del vision["rope_parameters"]

    def grid(frames: int) -> list[int]:
        return [frames, merge * rng.randint(1, 7), merge * rng.randint(1, 7)]

    images = [grid(1) for _ in range(rng.choice([0, 1, 1, 2, 4]))]
    videos = [grid(rng.randint(1, 3)) for _ in range(rng.choice([0, 1, 2]))]
    return Case(seed, text, vision, images or ([] if videos else [grid(1)]), videos)
