"""Whether a checkpoint's weights are quantised, and how: what config.json says of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from exafuse.config.limits import CONFIG_LIMIT_BYTES
from exafuse.strict_json import read_json, shorten

KEYS: Final = ("quantization_config", "compression_config")
_PARTS: Final = ("text_config", "vision_config")

ROUTE: Final = (
    "unquantised weights (bfloat16, float16 or float32); take the original checkpoint "
    "(quantize= quantises it while loading), or load this one with transformers and call "
    "exafuse.patch(model), as `exafuse generate` and `exafuse chat` do by themselves"
)


def method_of(section: object) -> str:
    """The method that a ``quantization_config`` names, fit for a message."""
    method = section.get("quant_method") if isinstance(section, Mapping) else None
    return shorten(method) if method else "an unnamed method"


def read_quantisation(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """The method by which the weights of a checkpoint folder are quantised, or None, and what else
    its config.json says.

    Raises:
        ConfigError: no JSON object.
    """
    values = read_json(folder / "config.json", "model configuration", CONFIG_LIMIT_BYTES)
    method = None
    if isinstance(values, dict):
        for part in (values, *(values.get(name) for name in _PARTS)):
            for key in KEYS:
                if isinstance(part, dict) and (section := part.pop(key, None)):
                    method = method or method_of(section)
    return method, values
