"""Which frames of a video are looked at, and how many tokens a picture of some size takes."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Sequence
from typing import Any

from exafuse.errors import MediaError
from exafuse.media.content import Medium
from exafuse.media.videos import VideoHeader
from exafuse.strict_json import shorten

# 1.6 GB of decoded frames: 64 of 3840 x 2160, or 580 of 1280 x 720.
MAX_VIDEO_PIXELS = 2**29


def check_sampling(medium: Medium) -> None:
    """Raise ``ValueError`` for wishes that cannot be met whatever the video is."""
    fps, num_frames = medium.fps, medium.num_frames
    if fps is not None and num_frames is not None:
        raise ValueError(f"{medium.where}: expected fps or num_frames, got both")
    if fps is not None and not (_is_number(fps) and math.isfinite(fps) and fps > 0):
        raise ValueError(f"{medium.where}: fps: expected a positive number, got {shorten(fps)}")
    if num_frames is not None and not (isinstance(num_frames, int) and num_frames > 0):
        raise ValueError(
            f"{medium.where}: num_frames: expected a positive integer, got {shorten(num_frames)}"
        )
    if fps is not None and not isinstance(medium.source, str | os.PathLike):
        raise ValueError(
            f"{medium.where}: fps: frames without a file have no rate; give num_frames, or choose "
            "the frames yourself"
        )


def choose_frames(processor: Any, medium: Medium, header: VideoHeader) -> Sequence[int] | None:
    """Indices of the frames to look at, by the video processor's own rule; None for all."""
    is_file = isinstance(medium.source, str | os.PathLike)
    wished = medium.fps is not None or medium.num_frames is not None
    if not wished and not (is_file and processor.do_sample_frames):
        return None
    rate, count = medium.fps, medium.num_frames
    if not wished:
        rate, count = processor.fps, processor.num_frames
    group = processor.temporal_patch_size
    if (rate is None and count is None) or header.num_frames <= group:
        return None
    if count is None and header.fps is None:
        raise MediaError(
            f"{medium.where}: fps: the file does not say how many frames it has a second; "
            "give num_frames"
        )
    from transformers.video_utils import VideoMetadata

    metadata = VideoMetadata(
        total_num_frames=header.num_frames,
        fps=header.fps,
        duration=header.num_frames / header.fps if header.fps else None,
        height=header.height,
        width=header.width,
    )
    if count is not None:  # the rule rounds to whole groups: not to none, not beyond the end
        count = min(max(count, group), header.num_frames // group * group)
        rate = None
    # The class fills in what is None from its own settings; what was wished goes without them.
    bare = copy.copy(processor)
    bare.fps = bare.num_frames = None
    indices = bare.sample_frames(metadata, num_frames=count, fps=rate)
    return [int(index) for index in indices]


def image_tokens(processor: Any, width: int, height: int, where: str) -> int:
    """How many tokens an image of this size takes in the prompt."""
    unit = int(processor.patch_size * processor.merge_size)
    if processor.do_resize:
        patches = processor.get_number_of_image_patches(height, width, {})
        return int(patches // processor.merge_size**2)
    _check_divisible(width, height, unit, where)
    return (width // unit) * (height // unit)


def video_tokens(processor: Any, num_frames: int, width: int, height: int, where: str) -> int:
    """How many tokens a video takes; ``MediaError`` if decoding it takes too much memory."""
    if num_frames * width * height > MAX_VIDEO_PIXELS:
        raise MediaError(
            f"{where}: {num_frames} frames of {width} x {height} are more than is decoded at once; "
            "look at fewer of them, with fps or num_frames, or make them smaller"
        )
    group = int(processor.temporal_patch_size)
    unit = int(processor.patch_size * processor.merge_size)
    if not processor.do_resize:
        _check_divisible(width, height, unit, where)
        return -(-num_frames // group) * (width // unit) * (height // unit)
    size = {name: processor.size[name] for name in ("shortest_edge", "longest_edge")}
    if getattr(processor, "cap_pixels_per_frame", False):  # not in older versions
        budget = int(processor.max_video_tokens * unit * unit * 0.9) * group // num_frames
        lowest = int(size["shortest_edge"] * 1.05)
        size["longest_edge"] = max(min(size["longest_edge"], budget), lowest)
    patches = processor.get_num_of_video_patches(num_frames, height, width, {"size": size})
    return int(patches // processor.merge_size**2)


def _check_divisible(width: int, height: int, unit: int, where: str) -> None:
    if width % unit or height % unit:
        raise MediaError(
            f"{where}: this checkpoint does not resize (do_resize is false): expected sides that "
            f"are multiples of {unit}, got {width} x {height}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
