"""Images of every kind: a defined picture or one clear error, never a crash."""

from __future__ import annotations

import io
import os
import random
import struct
import time
import zlib
from pathlib import Path

import exafuse
import numpy as np
import PIL.Image
import pytest
import torch
import vision_checkpoint
from exafuse.media import images
from exafuse.media.images import image_size, read_image

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
SHAPE = (24, 40)  # height, width


def picture(channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, uint8 [24, 40, channels], no two rows or columns alike."""
    noise = np.random.default_rng(seed).integers(0, 40, (*SHAPE, channels))
    rows, columns = np.mgrid[: SHAPE[0], : SHAPE[1]]
    ramp = np.stack([rows * 8, columns * 5, rows + columns * 4, 60 + rows * 7][:channels], axis=-1)
    return (ramp + noise).clip(0, 255).astype(np.uint8)


def encoded(image: PIL.Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def saved(folder: Path, data: bytes, name: str = "image") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def pixels(source: object) -> np.ndarray:
    image = read_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# ---- what a picture becomes -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_a_file_without_loss(tmp_path, kind):
    expected = picture()
    path = saved(tmp_path, encoded(PIL.Image.fromarray(expected), kind))
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(str(path)), expected)
    assert image_size(path) == (40, 24)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_a_file_with_loss(tmp_path, kind):
    path = saved(tmp_path, encoded(PIL.Image.fromarray(picture()), kind, quality=95))
    with PIL.Image.open(path) as image:
        assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))


def on_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return values * share + 255 * (1 - share)


def test_transparency_is_put_on_white(tmp_path):
    values = picture(4)
    path = saved(tmp_path, encoded(PIL.Image.fromarray(values), "PNG"))
    expected = on_white(values[..., :3], values[..., 3])
    assert abs(pixels(path) - expected).max() <= 1
    assert abs(pixels(values) - expected).max() <= 1
    values[..., 3] = 0
    assert (pixels(values) == 255).all()


def test_grey_with_transparency(tmp_path):
    values = picture(2)
    path = saved(tmp_path, encoded(PIL.Image.fromarray(values, "LA"), "PNG"))
    expected = on_white(values[..., :1].repeat(3, axis=-1), values[..., 1])
    assert abs(pixels(path) - expected).max() <= 1


def test_palettes(tmp_path):
    image = PIL.Image.fromarray(picture()).quantize(16)
    path = saved(tmp_path, encoded(image, "PNG"))
    assert np.array_equal(pixels(path), np.asarray(image.convert("RGB")))
    path = saved(tmp_path, encoded(image, "PNG", transparency=3))
    expected = np.asarray(image.convert("RGB")).copy()
    expected[np.asarray(image) == 3] = 255
    assert np.array_equal(pixels(path), expected)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV"])
def test_other_modes_are_converted(mode):
    image = PIL.Image.fromarray(picture()).convert(mode)
    assert np.array_equal(pixels(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["La", "RGBa"])
def test_premultiplied_transparency(mode):
    straight = PIL.Image.fromarray(picture(4)).convert({"La": "LA", "RGBa": "RGBA"}[mode])
    assert abs(pixels(straight.convert(mode)).astype(int) - pixels(straight)).max() <= 2


def test_a_cmyk_photograph(tmp_path):
    path = saved(
        tmp_path, encoded(PIL.Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95)
    )
    assert abs(pixels(path).astype(int) - picture()).mean() < 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bits_are_scaled_and_not_clipped(tmp_path, kind):
    values = np.arange(24 * 40, dtype=np.uint16).reshape(SHAPE) * 68
    path = saved(tmp_path, encoded(PIL.Image.fromarray(values), kind))
    expected = np.rint(values / 257)[..., None].repeat(3, axis=-1)
    assert np.array_equal(pixels(path), expected)
    assert np.array_equal(pixels(values), expected)
    as_int32 = PIL.Image.fromarray(values.astype(np.int32))
    assert as_int32.mode == "I"
    assert np.array_equal(pixels(as_int32), expected)


@pytest.mark.parametrize("values", [np.float32(0.5), np.int32(70000), np.int32(-1)])
def test_deeper_images_are_refused(values):
    image = PIL.Image.fromarray(np.full(SHAPE, values))
    with pytest.raises(exafuse.MediaError, match="expected 8 or 16 bits a channel"):
        read_image(image)


TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("orientation", [*TURNS, 0, 9, 255])
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "WEBP"])
def test_a_rotated_image_is_turned_upright(tmp_path, kind, orientation):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "TIFF": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[kind]
    path = saved(tmp_path, encoded(PIL.Image.fromarray(picture()), kind, exif=exif, **options))
    expected = TURNS.get(orientation, TURNS[1])(picture()).astype(int)
    got = pixels(path)
    assert got.shape == expected.shape
    assert abs(got - expected).mean() < (12 if kind == "JPEG" else 0.01)
    with PIL.Image.open(path) as image:  # opened by the caller: the same
        assert np.array_equal(pixels(image), got)


def test_a_damaged_tag_does_not_turn_anything(tmp_path):
    data = encoded(PIL.Image.fromarray(picture()), "PNG")
    broken = b"eXIf" + b"II*\x00\xff\xff\xff\xff"
    chunk = struct.pack(">I", 8) + broken + struct.pack(">I", zlib.crc32(broken))
    path = saved(tmp_path, data[:33] + chunk + data[33:])
    assert np.array_equal(pixels(path), picture())


@pytest.mark.parametrize("kind", ["GIF", "PNG", "TIFF", "WEBP"])
def test_the_first_frame_of_an_animation(tmp_path, kind):
    first, *rest = [
        PIL.Image.new("RGB", (40, 24), color) for color in ("#204060", "#ff0000", "#00ff00")
    ]
    data = encoded(first, kind, save_all=True, append_images=rest, lossless=True)
    with PIL.Image.open(io.BytesIO(data)) as image:
        assert image.n_frames == 3
    assert (pixels(saved(tmp_path, data)) == (0x20, 0x40, 0x60)).all()


def test_files_are_closed_again(tmp_path):
    path = saved(tmp_path, encoded(PIL.Image.fromarray(picture()), "TIFF"))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        read_image(path)
        image_size(path)
    with pytest.raises(exafuse.MediaError):
        read_image(saved(tmp_path, path.read_bytes()[:200], "cut"))
    assert len(os.listdir("/proc/self/fd")) == before


# ---- arrays and tensors ---------------------------------------------------------------------


def test_layouts_of_arrays_and_tensors():
    values = picture()
    first = np.ascontiguousarray(values.transpose(2, 0, 1))
    grey = values[..., 0]
    for source in (values, first, values[:, ::-1][:, ::-1], torch.from_numpy(first)):
        assert np.array_equal(pixels(source), values)
    for source in (grey, grey[..., None], grey[None], torch.from_numpy(grey.copy())):
        assert np.array_equal(pixels(source), grey[..., None].repeat(3, axis=-1))


def test_floats_are_levels_from_0_to_1():
    values = picture()
    for dtype in (np.float32, np.float64):
        assert np.array_equal(pixels(values.astype(dtype) / 255), values)
    tensor = torch.from_numpy(values).permute(2, 0, 1) / 255
    assert np.array_equal(pixels(tensor.requires_grad_()), values)
    near = pixels(tensor.bfloat16()).astype(int)
    assert abs(near - values).max() <= 1
    assert np.array_equal(pixels(values.astype(np.uint16) * 257), values)


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        (np.full((4, 4, 3), np.nan, np.float32), ValueError, "floats from 0 to 1"),
        (np.full((4, 4, 3), np.inf, np.float32), ValueError, "floats from 0 to 1"),
        (np.full((4, 4, 3), 1.5, np.float32), ValueError, "from 1.5 to 1.5"),
        (np.full((4, 4, 3), -0.1, np.float32), ValueError, "floats from 0 to 1"),
        (torch.full((3, 4, 4), torch.nan), ValueError, "floats from 0 to 1"),
        (np.zeros((4, 4, 3), np.int64), ValueError, "got int64"),
        (np.zeros((4, 4, 3), bool), ValueError, "got bool"),
        (np.zeros((4, 4, 3), complex), ValueError, "got complex128"),
        (np.array([["a"]]), ValueError, "uint8"),
        (np.zeros((5, 4, 2), np.uint8), ValueError, r"got \[5, 4, 2\]"),
        (np.zeros((2, 3, 4, 4), np.uint8), ValueError, r"got \[2, 3, 4, 4\]"),
        (np.zeros(4, np.uint8), ValueError, r"got \[4\]"),
        (np.zeros((), np.uint8), ValueError, r"got \[\]"),
        (np.zeros((0, 4, 3), np.uint8), exafuse.MediaError, "got a size of 4 x 0"),
        (np.zeros((4, 0), np.uint8), exafuse.MediaError, "got a size of 0 x 4"),
        (np.broadcast_to(np.uint8(0), (20000, 20000)), exafuse.MediaError, "at most 134,217,728"),
        (np.zeros((1, 201), np.uint8), exafuse.MediaError, "200 times the short side"),
        (b"\x89PNG", TypeError, "expected a file, a PIL image"),
        (None, TypeError, "got None"),
        (7, TypeError, "got 7"),
        ([1, 2], TypeError, "expected a file"),
        (PIL.Image.new("RGB", (0, 5)), exafuse.MediaError, "0 x 5"),
        (PIL.Image.new("L", (1, 1000)), exafuse.MediaError, "200 times"),
    ],
)
def test_what_is_no_picture(source, error, words):
    with pytest.raises(error, match=words) as caught:
        read_image(source, "messages[0], part 1 (image)")
    assert str(caught.value).startswith("messages[0], part 1 (image): ")


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (200, 1), (2, 3)])
def test_small_and_narrow_pictures_are_pictures(size):
    assert read_image(PIL.Image.new("RGB", size)).size == size


# ---- files that are none --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("https://example.org/cat.png", "download it first"),
        ("http://example.org/cat.png", "download it first"),
        ("HTTPS://EXAMPLE.ORG/CAT.PNG", "download it first"),
        ("ftp://example.org/cat.png", "download it first"),
        ("file:///etc/hostname", "download it first"),
        ("s3://bucket/cat.png", "download it first"),
        ("www.example.org/cat.png", "download it first"),
        ("data:image/png;base64,iVBORw0KGgo=", "decode it first"),
    ],
)
def test_a_url_is_to_be_downloaded_first(source, words):
    with pytest.raises(ValueError, match=words) as caught:
        read_image(source)
    assert not isinstance(caught.value, exafuse.MediaError)


@pytest.mark.parametrize("name", ["missing.png", "a\0b", "x" * 5000, "", "no/such/../folder.png"])
def test_no_such_file(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(exafuse.MediaError, match=r"no such file|no path|regular file"):
        read_image(name)


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dead").symlink_to(tmp_path / "nothing")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "dead", "/dev/zero"):
        with pytest.raises(exafuse.MediaError, match=r"regular file|no such file"):
            read_image(path)


OTHER_FILES = {
    "empty": b"",
    "text": b"I am a picture.\n",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>',
    "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
    "pdf": b"%PDF-1.7\n1 0 obj\n<<>>\nendobj\n",
    "fits": b"SIMPLE  =                    T".ljust(80) + b"END".ljust(2800),
    "psd": b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x09\0\0\0\x09\0\x08\0\3",
    "elf": b"\x7fELF" + bytes(100),
    "zip": b"PK\3\4" + bytes(100),
    "only a PNG signature": b"\x89PNG\r\n\x1a\n",
    "only a JPEG signature": b"\xff\xd8\xff\xe0",
    "wrong order of a PNG's bytes": b"\x89PNG\n\r\x1a\n" + bytes(100),
    "heif": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
    "ico": b"\0\0\1\0\1\0\x10\x10\0\0\1\0\x20\0" + bytes(60),
    "msp": b"DanM" + bytes(60),
    "zeros": bytes(10_000),
}


@pytest.mark.parametrize("name", list(OTHER_FILES))
def test_a_file_of_another_kind(tmp_path, name):
    with pytest.raises(
        exafuse.MediaError, match=r"got another kind of file or a damaged one|is damaged"
    ):
        read_image(saved(tmp_path, OTHER_FILES[name], "it.png"))


def png_header(width: int, height: int) -> bytes:
    """A PNG that promises this size and holds no pixels at all."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


@pytest.mark.parametrize(
    ("width", "height", "words"),
    [
        (12000, 12000, "at most 134,217,728 pixels, got 12000 x 12000"),
        (65500, 65500, "exceeds limit"),  # PIL's own bound
        (2**31 - 1, 2**31 - 1, "exceeds limit"),
        (100_000, 300, "200 times"),
        (1, 100_000, "200 times"),
        (0, 100, "got another kind of file or a damaged one"),
        (100, 0, "got another kind of file or a damaged one"),
    ],
)
def test_the_size_is_judged_before_anything_is_decoded(tmp_path, width, height, words):
    path = saved(tmp_path, png_header(width, height))
    for function in (image_size, read_image):
        with pytest.raises(exafuse.MediaError, match=words):
            function(path)


def test_an_image_within_the_bounds_without_pixels(tmp_path):
    path = saved(tmp_path, png_header(300, 200))
    assert image_size(path) == (300, 200)
    with pytest.raises(exafuse.MediaError, match="damaged"):
        read_image(path)


def test_a_small_file_that_unpacks_to_much(tmp_path, monkeypatch):
    """A 0.2 MB file of 65,500 x 65,500 pixels, with PIL's own bound switched off."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", None)
    data = png_header(65500, 65500)
    packed = zlib.compress(bytes(200_000_000), 9)
    chunk = b"IDAT" + packed
    bomb = data[:33] + struct.pack(">I", len(packed)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path = saved(tmp_path, bomb)
    assert len(bomb) < 300_000
    start = time.perf_counter()
    with pytest.raises(exafuse.MediaError, match="at most 134,217,728 pixels"):
        read_image(path)
    assert time.perf_counter() - start < 1


def test_a_text_chunk_that_unpacks_to_much(tmp_path):
    data = encoded(PIL.Image.fromarray(picture()), "PNG")
    chunk = b"zTXtcomment\0\0" + zlib.compress(bytes(100_000_000))
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    with pytest.raises(exafuse.MediaError):
        read_image(saved(tmp_path, data[:33] + packed + data[33:]))


# ---- damaged files --------------------------------------------------------------------------


def outcome(path: Path) -> tuple[int, int] | str:
    """The picture's size, or "refused"; anything but a MediaError is a failure."""
    try:
        image = read_image(path)
    except exafuse.MediaError:
        return "refused"
    assert image.mode == "RGB"
    return image.size


@pytest.mark.filterwarnings("ignore")  # PIL warns of what it then works around
@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_file(tmp_path, kind):
    data = encoded(PIL.Image.fromarray(picture()), kind)
    for cut in sorted({0, 1, 2, 4, 8, 12, *range(16, len(data), max(len(data) // 24, 1))}):
        got = outcome(saved(tmp_path, data[:cut]))
        # Half of the pixels are never taken for a picture.
        assert got == "refused" or (got == (40, 24) and cut > len(data) * 0.5), cut


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_bytes(tmp_path, kind):
    data = encoded(PIL.Image.fromarray(picture()), kind)
    noise = random.Random(kind)
    results = set()
    for _ in range(60):
        damaged = bytearray(data)
        for _ in range(noise.choice([1, 1, 2, 8, 40])):
            # Half of the damage is in the header.
            limit = noise.choice([min(64, len(data)), len(data)])
            damaged[noise.randrange(limit)] = noise.randrange(256)
        results.add(outcome(saved(tmp_path, bytes(damaged))) == "refused")
    assert True in results
    assert False in results or kind == "PNG"  # whose parts have check sums


@pytest.mark.filterwarnings("ignore")
def test_a_real_photograph_cut_anywhere(tmp_path):
    data = vision_checkpoint.photo("rocket.jpg").read_bytes()
    for percent in range(5, 100, 19):
        assert outcome(saved(tmp_path, data[: len(data) * percent // 100])) == "refused"
    assert outcome(saved(tmp_path, data)) == (640, 427)


def test_without_pillow(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"exafuse\[vision\]"):
        images.read_image("x.png")
