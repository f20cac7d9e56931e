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


def method_of(section: object) -> str | None:
    """The method that a ``quantization_config`` names, as far as it is one."""
    if not isinstance(section, Mapping):
        return None
    if section.get("load_in_4bit") is True or section.get("load_in_8bit") is True:
        return "bitsandbytes"  # whose older files name no method
    method = section.get("quant_method")
    return method if isinstance(method, str) else None


def describe_method(method: str | None) -> str:
    """Fit for a message, whatever a file says."""
    return shorten(method) if method else "an unnamed method"


def read_quantisation(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What the config.json of a checkpoint folder says of quantised weights, None if nothing, and
    what else it says.

    Raises:
        ConfigError: no JSON object.
    """
    values = read_json(folder / "config.json", "model configuration", CONFIG_LIMIT_BYTES)
    found = None
    if isinstance(values, dict):
        for part in (values, *(values.get(name) for name in _PARTS)):
            for key in KEYS:
                if isinstance(part, dict) and (section := part.pop(key, None)):
                    found = found or (section if isinstance(section, dict) else {})
    return found, values
