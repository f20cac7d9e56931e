"""From a checkpoint folder to its :class:`Processor`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exafuse.errors import TemplateError
from exafuse.media.parts import read_settings
from exafuse.media.processor import DEFAULT_MAX_TOKENS, Processor
from exafuse.strict_json import shorten

MODEL_TYPE = "exaone4_5"
# Placeholder by the tokenizer's own name for it, transformers' default, key and default in
# config.json.
_TOKENS = (
    ("image_token", "<|image_pad|>", "image_token_id", 67),
    ("video_token", "<|video_pad|>", "video_token_id", 68),
)


def make_processor(folder: Path, config: Mapping[str, Any], tokenizer: Any) -> Processor:
    """The processor of a checkpoint with a vision tower.

    ``config``: the content of config.json. Raises ``ConfigError`` for processor settings that are
    malformed or do not fit the model, ``TemplateError`` for a tokenizer without placeholders.
    """
    vision = config.get("vision_config")
    settings = read_settings(folder, vision if isinstance(vision, dict) else {})
    names = {}
    added = tokenizer.get_added_vocab()
    for name, default, key, default_id in _TOKENS:
        token = str(getattr(tokenizer, name, None) or default)
        expected = config.get(key, default_id)
        # Only an added token is kept out of what users write.
        if token not in added:
            raise TemplateError(
                f"{folder}: expected {token} among the tokenizer's added tokens, where the model's "
                f"{name.split('_')[0]}s go; tokenizer and config.json belong to different "
                "checkpoints"
            )
        if added[token] != expected:
            raise TemplateError(
                f"{folder}: {key}: expected the id of {token} in the tokenizer, {added[token]}, "
                f"got {shorten(expected)} in config.json"
            )
        names[name] = token
    return Processor(
        tokenizer,
        settings,
        image_token=names["image_token"],
        video_token=names["video_token"],
        max_tokens=_context(config),
    )


def _context(config: Mapping[str, Any]) -> int:
    text = config.get("text_config")
    value = text.get("max_position_embeddings") if isinstance(text, dict) else None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        return DEFAULT_MAX_TOKENS
    return min(value, 2**20)
