"""Images from files, PIL, numpy or torch, as upright RGB pictures of 8 bits a channel.

What a header says is checked before anything is decoded. What the picture then becomes is defined
for every kind: rotated as its EXIF tag asks, transparency on white as transformers does it, 16 bits
scaled to 8 (PIL alone would clip them to white), the first frame of an animation.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from exafuse.errors import MediaError
from exafuse.media.sources import media_errors, regular_file
from exafuse.strict_json import shorten

if TYPE_CHECKING:
    from PIL.Image import Image

# 0.4 GB as RGB. Photographs of 100 megapixels pass.
MAX_PIXELS = 2**27
# What the processors of this family accept: longer side by shorter side.
MAX_ASPECT_RATIO = 200
# Formats that PIL decodes by itself; EPS, for one, would start another program.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

_ACCEPTED = "a file, a PIL image, an array or a tensor"
_ORIENTATION_TAG = 0x0112


def read_image(source: Any, where: str = "image") -> Image:
    """The picture behind ``source``, decoded, upright and in mode RGB.

    ``source``: path of a file in one of ``FORMATS``; PIL image; numpy array or torch tensor
    ``[height, width]``, ``[height, width, channels]`` or ``[channels, height, width]`` with 1, 3 or
    4 channels, uint8, uint16, or floats from 0 to 1. ``where`` begins every message.

    Raises ``MediaError`` for a file that is no picture, damaged or too large; ``ValueError`` /
    ``TypeError`` for anything else that is none of these, among them URLs.
    """
    with _opened(source, where) as image:
        what = f"{where}: the image is damaged or of a kind that cannot be converted"
        with media_errors(what):
            image.load()
            return _on_white(_eight_bits(_upright(image), where))


def image_size(source: Any, where: str = "image") -> tuple[int, int]:
    """(width, height) of what :func:`read_image` would read, which decodes nothing; upright or
    not."""
    with _opened(source, where) as image:
        return image.size


@contextmanager
def _opened(source: Any, where: str) -> Iterator[Image]:
    """``source`` as a PIL image of an accepted size, not decoded yet."""
    try:
        import PIL.Image
    except ImportError as error:
        raise ImportError(f'{where}: images need Pillow: pip install "exafuse[vision]"') from error
    if isinstance(source, str | os.PathLike):
        path = regular_file(source, where)
        with (
            media_errors(f"{where}: {path} cannot be read as an image"),
            warnings.catch_warnings(),
        ):
            # PIL's own bounds warn and raise; those below decide.
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)
            try:
                file = PIL.Image.open(path, formats=FORMATS)
            except PIL.UnidentifiedImageError:
                raise MediaError(
                    f"{where}: expected {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got another "
                    f"kind of file or a damaged one: {path}"
                ) from None
        with file:
            check_size(*file.size, where)
            yield file
        return
    is_image = isinstance(source, PIL.Image.Image)
    image: Image = source if is_image else _from_array(source, where)
    check_size(*image.size, where)
    yield image


def check_size(width: int, height: int, where: str) -> None:
    """Raise ``MediaError`` for a size in pixels that is not accepted."""
    if width < 1 or height < 1:
        raise MediaError(f"{where}: expected pixels, got a size of {width} x {height}")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{where}: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}; "
            "make it smaller first"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise MediaError(
            f"{where}: expected a long side of at most {MAX_ASPECT_RATIO} times the short side, "
            f"got {width} x {height}; cut it into pieces"
        )


def _upright(image: Image) -> Image:
    import PIL.Image

    turns = PIL.Image.Transpose
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a damaged tag says nothing about the picture
        return image
    turn = {
        2: turns.FLIP_LEFT_RIGHT,
        3: turns.ROTATE_180,
        4: turns.FLIP_TOP_BOTTOM,
        5: turns.TRANSPOSE,
        6: turns.ROTATE_270,
        7: turns.TRANSVERSE,
        8: turns.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _eight_bits(image: Image, where: str) -> Image:
    import numpy as np
    import PIL.Image

    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0 or values.max() > 65535:
        raise MediaError(
            f"{where}: expected 8 or 16 bits a channel, got {values.dtype} from {values.min():g} "
            f"to {values.max():g}; convert it first"
        )
    return PIL.Image.fromarray(_scaled_16_bits(values))


def _scaled_16_bits(values: Any) -> Any:
    """0..65535 to 0..255, rounded."""
    return ((values.astype("uint32") + 128) // 257).astype("uint8")


def _on_white(image: Image) -> Image:
    import PIL.Image

    if image.mode == "La":  # premultiplied grey: PIL leaves it by this way only
        image = image.convert("LA")
    has_alpha = image.mode == "RGBa" or "A" in image.getbands()
    if not has_alpha and image.info.get("transparency") is None:
        return image if image.mode == "RGB" else image.convert("RGB")
    image = image.convert("RGBA")
    white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
    return PIL.Image.alpha_composite(white, image).convert("RGB")


def _from_array(source: Any, where: str) -> Image:
    import numpy as np
    import PIL.Image

    values = as_numpy(source, where)
    shape = list(values.shape)
    if values.ndim == 3 and values.shape[0] in (1, 3, 4):  # before the last: as transformers
        values = np.moveaxis(values, 0, -1)
    if values.ndim == 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim != 2 and not (values.ndim == 3 and values.shape[-1] in (3, 4)):
        raise ValueError(
            f"{where}: expected an array [height, width], [height, width, channels] or "
            f"[channels, height, width] with 1, 3 or 4 channels, got {shape}"
        )
    check_size(values.shape[1], values.shape[0], where)
    return PIL.Image.fromarray(np.ascontiguousarray(eight_bit_array(values, where)))


def as_numpy(source: Any, where: str) -> Any:
    """The numpy array of an array or a tensor; ``TypeError`` for anything else."""
    import numpy as np
    import torch

    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        return (source.float() if source.is_floating_point() else source).numpy()
    if not isinstance(source, np.ndarray):
        raise TypeError(f"{where}: expected {_ACCEPTED}, got {shorten(source)}")
    return source


def eight_bit_array(values: Any, where: str) -> Any:
    """``values`` as uint8, from uint8, uint16 or floats from 0 to 1; ``ValueError`` for others."""
    import numpy as np

    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return _scaled_16_bits(values)
    if values.dtype.kind != "f":
        raise ValueError(
            f"{where}: expected uint8, uint16, or floats from 0 to 1, got {values.dtype}"
        )
    # Written so that NaN fails as well.
    if values.size and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"{where}: expected floats from 0 to 1, got values from {values.min():g} to "
            f"{values.max():g}; give bytes as uint8"
        )
    return np.rint(values * np.float32(255)).astype(np.uint8)
