"""Videos from files, decoded by PyAV, or as frames: uint8 RGB ``[frames, height, width, 3]``.

Only container formats of single files are accepted: a playlist could name other files and
addresses, which the decoder would then open. A clip that ends early is an error, not a shorter
clip.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exafuse.errors import MediaError
from exafuse.media.images import as_numpy, check_size, eight_bit_array, image_size, read_image
from exafuse.media.sources import media_errors, regular_file

if TYPE_CHECKING:
    import numpy as np

# Demuxers of FFmpeg that read nothing but the file itself.
FORMATS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2", "matroska", "webm", "avi", "mpegts", "mpeg"),
    *("mpegvideo", "flv", "ogg", "asf", "gif", "apng"),
)
# Frames of the header that may be missing, as edit lists and rounded durations do it.
TOLERATED_LOSS = 0.02


@dataclass(frozen=True)
class VideoHeader:
    """What is known before decoding. ``fps`` None: the file does not say."""

    num_frames: int
    fps: float | None
    width: int
    height: int


# From the header to the indices of the frames to decode, in order; None for all of them.
ChooseFrames = Callable[[VideoHeader], Sequence[int] | None]


def read_video(source: Any, choose: ChooseFrames, where: str = "video") -> np.ndarray[Any, Any]:
    """The chosen frames of a video, upright, uint8 RGB ``[frames, height, width, 3]``.

    ``source``: path of a file; a list of images of one size, each as :func:`read_image` takes it;
    array or tensor ``[frames, height, width, channels]`` or ``[frames, channels, height, width]``.
    ``choose`` sees the header before anything is decoded, and may refuse it.

    Raises ``MediaError`` for a file that is no video, is damaged or cut off; ``ValueError`` /
    ``TypeError`` for anything else that is none of these; ``ImportError`` without PyAV.
    """
    if isinstance(source, str | os.PathLike):
        return _decode(source, choose, where)
    if isinstance(source, list | tuple):
        return _from_images(source, choose, where)
    return _from_array(source, choose, where)


def _decode(
    source: str | os.PathLike[str], choose: ChooseFrames, where: str
) -> np.ndarray[Any, Any]:
    header = read_header(source, where)
    path = regular_file(source, where)
    indices = choose(header)  # outside: what it raises is not about the file
    wanted = range(header.num_frames) if indices is None else indices
    with media_errors(f"{where}: {path} cannot be decoded"), _opened(path) as container:
        return _frames(container, header, wanted, f"{where}: {path}")


def read_header(source: str | os.PathLike[str], where: str = "video") -> VideoHeader:
    """What a video file says about itself; nothing is decoded. Errors as :func:`read_video`."""
    path = regular_file(source, where)
    try:
        import av  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f'{where}: video files need PyAV: pip install "exafuse[vision]"'
        ) from error
    with media_errors(f"{where}: {path} cannot be read as a video"), _opened(path) as container:
        header = _header(container, f"{where}: {path}")
    check_size(header.width, header.height, where)
    return header


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """PyAV's container, over an open file: the decoder itself opens nothing."""
    import av

    options = {"format_whitelist": ",".join(FORMATS), "protocol_whitelist": "file"}
    with path.open("rb") as file, av.open(file, options=options) as container:
        yield container


def _header(container: Any, what: str) -> VideoHeader:
    if not container.streams.video:
        raise MediaError(f"{what} has no pictures, only sound or data")
    stream = container.streams.video[0]
    rate = stream.average_rate
    # Where the header has no count, packets are counted, which decodes nothing.
    count = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
    return VideoHeader(count, float(rate) if rate else None, stream.width, stream.height)


def _frames(
    container: Any, header: VideoHeader, wanted: Sequence[int], what: str
) -> np.ndarray[Any, Any]:
    """The frames with the ``wanted`` indices, which may repeat."""
    import numpy as np

    copies = Counter(wanted)
    needed = max(copies, default=-1) + 1
    frames: np.ndarray[Any, Any] | None = None
    seen = filled = 0
    for index, frame in enumerate(container.decode(video=0)):
        if index >= needed:
            break
        seen = index + 1
        if not copies[index]:
            continue
        picture = frame.to_ndarray(format="rgb24")
        if turns := round(frame.rotation / 90) % 4:
            picture = np.rot90(picture, turns)
        if frames is None:
            frames = np.empty((len(wanted), *picture.shape), dtype=np.uint8)
        _check_one_size(picture.shape, frames.shape[1:], what)
        frames[filled : filled + copies[index]] = picture
        filled += copies[index]
    if frames is None or seen < (1 - TOLERATED_LOSS) * needed:
        raise MediaError(
            f"{what} is cut off or damaged: expected {header.num_frames} frames, "
            f"{seen} can be decoded"
        )
    return frames[:filled]


def _check_one_size(got: Sequence[int], expected: Sequence[int], what: str) -> None:
    if tuple(got) != tuple(expected):
        raise MediaError(
            f"{what}: expected frames of one size, got {expected[1]} x {expected[0]} and "
            f"{got[1]} x {got[0]}"
        )


def _from_images(images: Sequence[Any], choose: ChooseFrames, where: str) -> np.ndarray[Any, Any]:
    import numpy as np

    if not images:
        raise ValueError(f"{where}: expected at least one frame, got none")
    sizes = [image_size(image, f"{where}, frame {i}") for i, image in enumerate(images)]
    indices = choose(VideoHeader(len(images), None, *max(sizes)))
    chosen = range(len(images)) if indices is None else indices
    pictures = [np.asarray(read_image(images[i], f"{where}, frame {i}")) for i in chosen]
    for picture in pictures:
        _check_one_size(picture.shape, pictures[0].shape, where)
    return np.stack(pictures)


def _from_array(source: Any, choose: ChooseFrames, where: str) -> np.ndarray[Any, Any]:
    import numpy as np

    values = as_numpy(source, where)
    if values.ndim == 4 and values.shape[1] in (1, 3):
        values = np.moveaxis(values, 1, -1)
    if values.ndim != 4 or values.shape[-1] not in (1, 3) or not len(values):
        raise ValueError(
            f"{where}: expected an array [frames, height, width, channels] or "
            f"[frames, channels, height, width] with 1 or 3 channels, got {list(values.shape)}"
        )
    frames, height, width, channels = values.shape
    check_size(width, height, where)
    indices = choose(VideoHeader(frames, None, width, height))
    values = eight_bit_array(values if indices is None else values[list(indices)], where)
    return np.ascontiguousarray(values if channels == 3 else np.repeat(values, 3, axis=-1))
