"""The image and video processors of a checkpoint, from its own configuration files.

The arithmetic is transformers' (``Qwen2VLImageProcessor`` and ``Qwen2VLVideoProcessor``), but the
files are read here: only settings that these classes have are passed on, each checked, and no class
is taken from a file. Without torchvision the images go through ``Qwen2VLImageProcessorPil``, which
differs by one level of 8 bits in under one per cent of the values; there is no such class for
videos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exafuse.errors import ConfigError
from exafuse.strict_json import read_json, shorten

LIMIT_BYTES = 2**20
_FILE = "settings of the image and video processors"
# Files in which transformers looks for them, first one first; the nested file names its part.
_IMAGE_FILES = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))
_VIDEO_FILES = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
_CLASSES = (
    *("Qwen2VLImageProcessor", "Qwen2VLImageProcessorFast", "Qwen2VLImageProcessorPil"),
    "Qwen2VLVideoProcessor",
)
_FLAGS = ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb")
_VIDEO_FLAGS = ("do_sample_frames", "cap_pixels_per_frame")
_COUNTS = ("patch_size", "temporal_patch_size", "merge_size", "min_pixels", "max_pixels")
_VIDEO_COUNTS = ("num_frames", "min_frames", "max_frames", "max_video_tokens")
_MAX_COUNT = 2**31 - 1
# Of the vision part of config.json, by the processor's name for it; the defaults are those of
# transformers on either side.
_SHARED = {
    "patch_size": ("patch_size", 14),
    "merge_size": ("spatial_merge_size", 2),
    "temporal_patch_size": ("temporal_patch_size", 2),
}


@dataclass(frozen=True)
class Settings:
    """What the files say: keyword arguments of the two classes. None: the folder has no such file.

    ``video`` is what the files say about videos, which fall back on what they say about images.
    """

    image: Mapping[str, Any] | None
    video: Mapping[str, Any] | None


def read_settings(folder: Path, vision_config: Mapping[str, Any]) -> Settings:
    """The settings in ``folder``, checked against the vision part of its config.json.

    Raises ``ConfigError``, with the file and the key.
    """
    return Settings(
        _read(folder, _IMAGE_FILES, vision_config, is_video=False),
        _read(folder, _VIDEO_FILES, vision_config, is_video=True),
    )


def torchvision_problem() -> str | None:
    """Why torchvision cannot be used; None if it can."""
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        return f"torchvision is not installed ({error})"
    # A build for another torch fails with errors of any kind.
    except Exception as error:
        return f"torchvision is installed, but does not load: {error}"
    return None


def image_processor(settings: Mapping[str, Any]) -> Any:
    """transformers' image processor with these settings: the torchvision one where there is one."""
    problem = torchvision_problem()
    try:
        if problem is None:
            from transformers.models.qwen2_vl.image_processing_qwen2_vl import (
                Qwen2VLImageProcessor,
            )

            return Qwen2VLImageProcessor(**settings)
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )
    except Exception as error:
        # transformers imports what is installed, so a torchvision that does not load stops it.
        reason = problem or " ".join(str(error).split())[:300]
        raise ImportError(
            f"images cannot be prepared: {reason}. Install Pillow and a torchvision that fits this "
            'torch, pip install "exafuse[vision]", or no torchvision at all'
        ) from error
    return Qwen2VLImageProcessorPil(**settings)


def video_processor(settings: Mapping[str, Any]) -> Any:
    """transformers' video processor with these settings; ``ImportError`` without torchvision."""
    problem = torchvision_problem()
    if problem is not None:
        raise ImportError(
            f'videos need torchvision and PyAV: pip install "exafuse[vision]" ({problem})'
        )
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    if not hasattr(Qwen2VLVideoProcessor, "cap_pixels_per_frame"):  # an older transformers
        return Qwen2VLVideoProcessor(**settings)
    # Left open, transformers warns that its default will change; False is what it is now.
    return Qwen2VLVideoProcessor(**{"cap_pixels_per_frame": False, **settings})


def _read(
    folder: Path,
    files: tuple[tuple[str, str | None], ...],
    vision_config: Mapping[str, Any],
    *,
    is_video: bool,
) -> Mapping[str, Any] | None:
    for name, part in files:
        path = folder / name
        if not path.exists():
            continue
        values = read_json(path, _FILE, LIMIT_BYTES)
        where = str(path)
        if isinstance(values, dict) and part is not None:
            if part not in values:
                continue
            values, where = values[part], f"{path}: {part}"
        if not isinstance(values, dict):
            raise ConfigError(f"{where}: expected an object, got {shorten(values)}")
        return _checked(values, where, vision_config, is_video=is_video)
    return None


def _checked(
    values: dict[str, Any], where: str, vision_config: Mapping[str, Any], *, is_video: bool
) -> dict[str, Any]:
    """The settings among ``values`` that the class has. Others are ignored, as transformers does:
    files hold keys of other classes."""
    for key in ("image_processor_type", "video_processor_type"):
        if values.get(key) is not None and values[key] not in _CLASSES:
            raise ConfigError(
                f"{where}: {key}: expected one of {', '.join(_CLASSES)}, got {shorten(values[key])}"
            )
    result: dict[str, Any] = {}
    given = {key: value for key, value in values.items() if value is not None}
    for key in (*_FLAGS, *(_VIDEO_FLAGS if is_video else ())):
        if key in given:
            result[key] = _check(where, key, given[key], isinstance(given[key], bool), "a flag")
    for key in (*_COUNTS, *(_VIDEO_COUNTS if is_video else ())):
        if key in given:
            result[key] = _count(where, key, given[key])
    if "size" in given:
        result["size"] = _size(where, given)
    if "resample" in given:
        value = given["resample"]
        is_filter = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 5
        result["resample"] = _check(where, "resample", value, is_filter, "a filter from 0 to 5")
    for key in ("rescale_factor", *(("fps",) if is_video else ())):
        if key in given:
            positive = _is_number(given[key]) and given[key] > 0
            result[key] = _check(where, key, given[key], positive, "a positive number")
    for key in ("image_mean", "image_std"):
        if key in given:
            value = given[key]
            fits = (
                isinstance(value, list)
                and len(value) == 3
                and all(_is_number(x) and (key == "image_mean" or x > 0) for x in value)
            )
            result[key] = _check(where, key, value, fits, "three numbers, one for each channel")
    for key, (name, default) in _SHARED.items():
        expected = vision_config.get(name, default)
        if result.get(key, default) != expected:
            raise ConfigError(
                f"{where}: {key}: expected {name} of config.json's vision_config, "
                f"{shorten(expected)}, got {shorten(result.get(key, default))}"
            )
    return result


def _check(where: str, key: str, value: Any, fits: bool, what: str) -> Any:
    if not fits:
        raise ConfigError(f"{where}: {key}: expected {what}, got {shorten(value)}")
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _count(where: str, key: str, value: Any) -> int:
    fits = isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_COUNT
    return int(_check(where, key, value, fits, f"an integer from 1 to {_MAX_COUNT}"))


def _size(where: str, given: Mapping[str, Any]) -> dict[str, int]:
    """Bounds on a picture's pixels, under the names of today or those of older files."""
    value = given["size"]
    names = (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels"))
    bounds = {}
    for name, older in names:
        found = value.get(name, value.get(older)) if isinstance(value, dict) else None
        bounds[name] = _count(where, f"size.{name}", given.get(older, found))
    if bounds["shortest_edge"] > bounds["longest_edge"]:
        raise ConfigError(
            f"{where}: size: expected shortest_edge <= longest_edge (both count pixels), "
            f"got {shorten(value)}"
        )
    return bounds
