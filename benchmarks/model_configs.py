"""Configs of the released models, for random weights of their sizes; small ones for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import EXAONE_1_2B, EXAONE_32B, LLAMA_3_8B, QWEN2_7B, ModelShape

LONG_ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
VISION = {
    "depth": 28,
    "hidden_size": 2048,
    "intermediate_size": 5120,
    "num_heads": 32,
    "num_key_value_heads": 8,
    "window_size": 112,
    "out_hidden_size": 5120,
    "fullatt_block_indexes": [6, 13, 20, 27],
}
SMALL_VISION = VISION | {
    **{"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 4},
    **{"num_key_value_heads": 2, "out_hidden_size": 64, "fullatt_block_indexes": [1]},
}


@dataclass(frozen=True)
class BenchModel:
    """A model to build: its name, its config as in config.json, patches of one image or none."""

    name: str
    config: dict[str, Any]
    image_grid: tuple[int, int, int] | None = None

    @property
    def text(self) -> dict[str, Any]:
        """The language model's part of the config."""
        part: dict[str, Any] = self.config.get("text_config", self.config)
        return part


def _config(shape: ModelShape, model_type: str, **values: Any) -> dict[str, Any]:
    kinds = ["full_attention"] * shape.num_layers
    if shape.window is not None:
        kinds = [
            "full_attention" if i % 4 == 3 else "sliding_attention" for i in range(shape.num_layers)
        ]
    config = {
        "model_type": model_type,
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.num_layers,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        **values,
    }
    if model_type.startswith("exaone4"):
        config |= {"layer_types": kinds, "sliding_window": shape.window}
    return config


_EXAONE = {"rope_theta": 1e6, "rope_scaling": LONG_ROPE, "max_position_embeddings": 131072}
_TEXT_4_5 = _config(EXAONE_32B, "exaone4_5_text", vocab_size=153600, **_EXAONE)
_IDS_4_5 = {"image_token_id": 67, "video_token_id": 68}
RELEASED = (
    BenchModel("EXAONE-4.0-32B", _config(EXAONE_32B, "exaone4", vocab_size=102400, **_EXAONE)),
    BenchModel(
        "EXAONE-4.0-1.2B",
        _config(EXAONE_1_2B, "exaone4", vocab_size=102400, **_EXAONE)
        | {"tie_word_embeddings": True, "max_position_embeddings": 65536},
    ),
    BenchModel(
        "EXAONE-4.5-33B",
        {"model_type": "exaone4_5", "text_config": _TEXT_4_5, "vision_config": VISION, **_IDS_4_5},
        image_grid=(1, 74, 98),  # 1,036 x 1,372 pixels
    ),
    BenchModel(
        "Llama-3-8B",
        _config(
            *(LLAMA_3_8B, "llama"),
            **{"vocab_size": 128256, "rope_theta": 5e5, "max_position_embeddings": 8192},
        ),
    ),
    BenchModel(
        "Qwen2-7B",
        _config(
            *(QWEN2_7B, "qwen2"),
            **{"vocab_size": 152064, "rope_theta": 1e6, "max_position_embeddings": 32768},
        ),
    ),
)

_SMALL = ModelShape("small", 64, 96, 4, 2, 16, 4)
_SMALL_HYBRID = ModelShape("small", 64, 96, 4, 2, 16, 4, window=32, sliding_layers=3)
_SHORT = {"vocab_size": 512, "max_position_embeddings": 1024, "rope_theta": 1e4}
SMALL = (
    BenchModel("small EXAONE 4", _config(_SMALL_HYBRID, "exaone4", **_SHORT)),
    BenchModel(
        "small EXAONE 4.5",
        {
            "model_type": "exaone4_5",
            "text_config": _config(_SMALL_HYBRID, "exaone4_5_text", **_SHORT),
            "vision_config": SMALL_VISION,
            **_IDS_4_5,
        },
        image_grid=(1, 12, 8),
    ),
    BenchModel("small Llama", _config(_SMALL, "llama", **_SHORT)),
    BenchModel("small Qwen2", _config(_SMALL, "qwen2", **_SHORT)),
)


@dataclass(frozen=True)
class Lengths:
    """What is measured of each model: prompts of one row, and (batch, context) of decoding."""

    models: tuple[BenchModel, ...]
    prompts: tuple[int, ...]
    decode: tuple[tuple[int, int], ...]
    steps: int  # of decoding that are timed together


def lengths(device: str, quick: bool) -> Lengths:
    """The cases of a kind of device; ``quick`` ones are few, and tiny on a CPU."""
    if device != "cuda":
        return Lengths(SMALL, (32,) if quick else (32, 256), ((1, 48), (2, 48)), 4 if quick else 16)
    if quick:
        return Lengths(RELEASED[:2], (2048,), ((1, 1024), (8, 8192)), 32)
    decode = tuple((batch, c) for batch in (1, 8, 32) for c in (1024, 8192, 32768, 131072))
    return Lengths(RELEASED, (1024, 8192, 32768), decode, 64)
