"""Images and videos to tensors: judged by their sizes first, then read one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from exafuse.media import sampling
from exafuse.media.content import Medium
from exafuse.media.images import image_size, read_image
from exafuse.media.videos import VideoHeader, read_video


class Processors(Protocol):
    """What pictures are prepared with. The two processors are loaded at first use."""

    image_token_id: int
    video_token_id: int
    max_tokens: int

    @property
    def image_processor(self) -> Any: ...

    @property
    def video_processor(self) -> Any: ...


def prepare(
    processors: Processors, media: Sequence[Medium]
) -> tuple[dict[str, Any], dict[int, list[int]]]:
    """(tensors as ``EncodedChat.inputs`` has them, the tokens of each picture by placeholder id).

    The sizes of all images are known, and what they take of the model's tokens accepted, before the
    first one is decoded; a video's before its frames are.
    """
    import torch

    images = [medium for medium in media if medium.kind == "image"]
    videos = [medium for medium in media if medium.kind == "video"]
    for medium in videos:
        sampling.check_sampling(medium)
    left = processors.max_tokens
    for medium in images:
        width, height = image_size(medium.source, medium.where)
        tokens = sampling.image_tokens(processors.image_processor, width, height, medium.where)
        left = _spend(processors, left, tokens, medium)
    features: dict[str, list[Any]] = {}
    for medium in images:  # one by one: only one is held decoded
        picture = read_image(medium.source, medium.where)
        _collect(features, processors.image_processor(images=[picture], return_tensors="pt"))
    for medium in videos:
        frames, left = _read_frames(processors, medium, left)
        prepared = processors.video_processor(
            videos=[frames], do_sample_frames=False, return_tensors="pt"
        )
        _collect(features, prepared)
    data = {name: torch.cat(tensors) for name, tensors in features.items()}
    counts: dict[int, list[int]] = {processors.image_token_id: [], processors.video_token_id: []}
    if images:
        merged = processors.image_processor.merge_size**2
        counts[processors.image_token_id] = _tokens(data["image_grid_thw"], merged)
    if videos:
        merged = processors.video_processor.merge_size**2
        counts[processors.video_token_id] = _tokens(data["video_grid_thw"], merged)
    return data, counts


def _read_frames(processors: Processors, medium: Medium, left: int) -> tuple[Any, int]:
    """(the frames of a video that are looked at, the tokens that are left behind it)."""
    processor = processors.video_processor
    left_behind = left

    def choose(header: VideoHeader) -> Sequence[int] | None:
        nonlocal left_behind
        indices = sampling.choose_frames(processor, medium, header)
        count = header.num_frames if indices is None else len(indices)
        size = header.width, header.height
        tokens = sampling.video_tokens(processor, count, *size, medium.where)
        left_behind = _spend(processors, left, tokens, medium)
        return indices

    return read_video(medium.source, choose, medium.where), left_behind


def _spend(processors: Processors, left: int, tokens: int, medium: Medium) -> int:
    if tokens > left:
        advice = "; look at fewer frames, with fps or num_frames" * (medium.kind == "video")
        raise ValueError(
            f"{medium.where}: takes {tokens:,} tokens, and {left:,} of the "
            f"{processors.max_tokens:,} that the model can read are left{advice}"
        )
    return left - tokens


def _collect(features: dict[str, list[Any]], prepared: Mapping[str, Any]) -> None:
    for name, tensor in prepared.items():
        features.setdefault(name, []).append(tensor)


def _tokens(grid_thw: Any, merged: int) -> list[int]:
    """Tokens of each picture in ``grid_thw [pictures, 3]``, of ``merged`` patches each."""
    counts: list[int] = (grid_thw.prod(dim=-1) // merged).tolist()
    return counts
