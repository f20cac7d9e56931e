"""The vision tower of EXAONE 4.5: ``vision_config`` -> VisionConfig."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from exafuse.config.fields import REQUIRED, Fields
from exafuse.config.keys import check_unimplemented, report_unread
from exafuse.config.limits import MAX_HEAD_DIM, MAX_HEADS, MAX_HIDDEN, MAX_INTERMEDIATE, MAX_LAYERS

_MAX_PATCH: Final = 2**10
_MAX_WINDOW: Final = 2**16
_DEFAULT_THETA: Final = 10000.0
# Sizes that are said a second time under other names, and what the tower has no use for.
_KNOWN: Final = (
    "architectures",
    "dtype",
    "in_chans",
    "spatial_patch_size",
    "tokens_per_second",
    "torch_dtype",
)


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """A tower of ``depth`` blocks over patches of images and videos.

    ``window_size`` is in pixels. ``full_attention_blocks`` lists the blocks that attend within a
    whole frame; the others attend within windows. A square of ``spatial_merge_size`` patches a
    side becomes one token of ``out_hidden_size`` for the language model.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    spatial_merge_size: int
    window_size: int
    out_hidden_size: int
    full_attention_blocks: tuple[int, ...]
    rope_theta: float
    initializer_range: float

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads

    @property
    def patch_values(self) -> int:
        """Numbers in one patch, in the order channel, frame, row, column."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one token."""
        return self.spatial_merge_size**2

    @property
    def window_units(self) -> int:
        """Side of a whole window, in tokens of the language model."""
        return self.window_size // self.spatial_merge_size // self.patch_size

    def num_parameters(self) -> int:
        """Number of weights."""
        hidden, width = self.hidden_size, self.intermediate_size
        qkv_rows = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention = (hidden + 1) * qkv_rows + (hidden + 1) * hidden
        block = attention + 2 * (hidden + 1) * width + (width + 1) * hidden + 2 * hidden
        merged = self.merge_unit * hidden
        merger = hidden + (merged + 1) * merged + (merged + 1) * self.out_hidden_size
        return self.patch_values * hidden + self.depth * block + merger

    def to_dict(self) -> dict[str, object]:
        """The ``vision_config`` entry of a config.json."""
        return {
            "model_type": "exaone4_5_vision",
            "depth": self.depth,
            "hidden_size": self.hidden_size,
            "hidden_act": "silu",
            "intermediate_size": self.intermediate_size,
            "num_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "in_channels": self.in_channels,
            "patch_size": self.patch_size,
            "temporal_patch_size": self.temporal_patch_size,
            "spatial_merge_size": self.spatial_merge_size,
            "window_size": self.window_size,
            "out_hidden_size": self.out_hidden_size,
            "fullatt_block_indexes": list(self.full_attention_blocks),
            "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
            "initializer_range": self.initializer_range,
        }


def read_vision(fields: Fields, text_hidden_size: int) -> VisionConfig:
    """``vision_config``; keys that it lacks are transformers' class defaults, which are not the
    released tower."""
    if fields.string("model_type", "exaone4_5_vision") != "exaone4_5_vision":
        raise fields.error("model_type", "exaone4_5_vision")
    check_unimplemented(fields)
    depth = fields.integer("depth", 32, 1, MAX_LAYERS)
    config = VisionConfig(
        depth=depth,
        hidden_size=fields.integer("hidden_size", 3584, 1, MAX_HIDDEN),
        intermediate_size=fields.integer("intermediate_size", 3420, 1, MAX_INTERMEDIATE),
        num_heads=fields.integer("num_heads", 16, 1, MAX_HEADS),
        num_kv_heads=fields.integer("num_key_value_heads", 8, 1, MAX_HEADS),
        in_channels=fields.integer("in_channels", 3, 1, _MAX_PATCH),
        patch_size=fields.integer("patch_size", 14, 1, _MAX_PATCH),
        temporal_patch_size=fields.integer("temporal_patch_size", 2, 1, _MAX_PATCH),
        spatial_merge_size=fields.integer("spatial_merge_size", 2, 1, _MAX_PATCH),
        window_size=fields.integer("window_size", 112, 1, _MAX_WINDOW),
        out_hidden_size=fields.integer("out_hidden_size", 3584, 1, MAX_HIDDEN),
        full_attention_blocks=_read_full_blocks(fields, depth),
        rope_theta=_read_theta(fields),
        initializer_range=fields.number("initializer_range", 0.02, 0.0, 1.0),
    )
    _check_sizes(fields, config, text_hidden_size)
    report_unread(fields, known=_KNOWN)
    return config


def _read_full_blocks(fields: Fields, depth: int) -> tuple[int, ...]:
    """Blocks beyond the depth do not exist: the default names block 31 whatever the depth is."""
    key = "fullatt_block_indexes"
    blocks = fields.integers(key, (7, 15, 23, 31), 0, MAX_LAYERS)
    return tuple(sorted({block for block in blocks if block < depth}))


def _read_theta(fields: Fields) -> float:
    """The base of the frequencies. Files of transformers 4 do not give it."""
    rope = fields.section("rope_parameters")
    if rope is None:
        return _DEFAULT_THETA
    if rope.string("rope_type", "axial") not in ("axial", "default"):
        raise rope.error("rope_type", "axial (rows and columns of an image)")
    theta = rope.optional_number("rope_theta", 1.0, 1e18, above=True) or _DEFAULT_THETA
    report_unread(rope)
    return theta


def _check_sizes(fields: Fields, config: VisionConfig, text_hidden_size: int) -> None:
    heads = config.num_heads
    if config.hidden_size % heads or config.head_dim % 4 or config.head_dim > MAX_HEAD_DIM:
        expected = (
            f"num_heads ({heads}) times a multiple of 4: half of a head turns with the row, half "
            "with the column"
        )
        raise fields.error("hidden_size", expected, f"{config.hidden_size}")
    if fields.has("head_dim") and (
        fields.integer("head_dim", REQUIRED, 1, MAX_HEAD_DIM) != config.head_dim
    ):
        raise fields.error("head_dim", f"hidden_size / num_heads ({config.head_dim})")
    if heads % config.num_kv_heads:
        expected = f"a divisor of num_heads ({heads})"
        raise fields.error("num_key_value_heads", expected, f"{config.num_kv_heads}")
    if not config.window_units:
        side = config.spatial_merge_size * config.patch_size
        expected = f"at least {side} pixels (spatial_merge_size times patch_size)"
        raise fields.error("window_size", expected, f"{config.window_size}")
    if config.out_hidden_size != text_hidden_size:
        expected = f"text_config.hidden_size ({text_hidden_size})"
        raise fields.error("out_hidden_size", expected, f"{config.out_hidden_size}")
