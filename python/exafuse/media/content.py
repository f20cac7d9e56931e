"""The images and videos of a conversation: which messages show them, and where they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from exafuse.strict_json import shorten
from exafuse.text.messages import Message

Kind = Literal["image", "video"]

# Where a part may hold its source; "url" stands for what others call so and is a file here.
_SOURCE_KEYS = {
    "image": ("image", "path", "url", "image_url", "base64"),
    "video": ("video", "path", "url"),
}
_VIDEO_OPTIONS = ("fps", "num_frames")


@dataclass(frozen=True)
class Medium:
    """One image or video. ``fps`` / ``num_frames``: which frames of a video are looked at; None
    leaves it to the checkpoint. ``where`` names it in messages."""

    kind: Kind
    source: Any
    where: str
    fps: float | None = None
    num_frames: int | None = None


def split_media(messages: Sequence[Message]) -> tuple[Sequence[Message], list[Medium]]:
    """The messages with bare image and video parts, as chat templates expect them, and what the
    parts show, in order.

    Parts are ``{"type": "image", "image": source}`` and ``{"type": "video", "video": source}``,
    with ``"fps"`` or ``"num_frames"`` if wanted. Raises ``ValueError`` for a part without source.
    """
    bare: list[Message] = []
    media: list[Medium] = []
    # What is no list of messages is refused where all messages are checked.
    is_list = isinstance(messages, list | tuple)
    for position, message in enumerate(messages if is_list else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, list | tuple):
            parts = []
            for number, part in enumerate(content):
                kind = _kind(part)
                if kind is not None:
                    where = f"messages[{position}], part {number} ({kind})"
                    media.append(_medium(kind, part, where))
                    part = {"type": kind}
                parts.append(part)
            message = {**message, "content": parts}
        bare.append(message)
    return (bare if is_list else messages), media


def check_part_types(messages: Sequence[Message]) -> None:
    """Raise ``ValueError`` for parts that are neither text nor picture: templates drop them."""
    for position, message in enumerate(messages if isinstance(messages, list | tuple) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for part in content if isinstance(content, list | tuple) else ():
            kind = part.get("type") if isinstance(part, Mapping) else None
            if isinstance(part, Mapping) and kind not in ("text", "image", "video"):
                raise ValueError(
                    f"messages[{position}]: type: expected text, image or video, "
                    f"got {shorten(kind)}"
                )


def _kind(part: object) -> Kind | None:
    name = part.get("type") if isinstance(part, Mapping) else None
    if name == "image_url":
        return "image"
    return name if name in ("image", "video") else None


def _medium(kind: Kind, part: Mapping[str, Any], where: str) -> Medium:
    keys = [key for key in _SOURCE_KEYS[kind] if part.get(key) is not None]
    if len(keys) != 1:
        raise ValueError(
            f"{where}: expected one source, under the key {kind!r}, got "
            f"{' and '.join(keys) or shorten(sorted(map(str, part)))}"
        )
    if keys == ["base64"]:
        raise ValueError(f"{where}: base64 is not accepted; decode it and give the PIL image")
    source = part[keys[0]]
    if isinstance(source, Mapping):  # {"type": "image_url", "image_url": {"url": ...}}
        source = source.get("url")
    options = {key: part.get(key) for key in _VIDEO_OPTIONS} if kind == "video" else {}
    return Medium(kind, source, where, **options)
