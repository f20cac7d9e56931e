"""Videos from files and frames: the frames that were asked for, or one clear error."""

from __future__ import annotations

import io
import random
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import av
import exafuse
import numpy as np
import PIL.Image
import pytest
import torch
import vision_checkpoint
from exafuse.media import sampling
from exafuse.media.content import Medium
from exafuse.media.videos import VideoHeader, read_video

SMALL = "carphone_distorted.mp4"  # 176 x 144, 120 frames


def everything(_header: VideoHeader) -> None:
    """Choose all frames."""


def only(*indices: int):
    return lambda _header: indices


@pytest.fixture(scope="module")
def small() -> Path:
    return vision_checkpoint.clip(SMALL)


@pytest.fixture(scope="module")
def frames(small) -> np.ndarray:
    """All frames of the small clip, by PyAV and nothing of ours."""
    with av.open(str(small)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def remuxed(path: Path, target_path: Path, kind: str, **options: str) -> Path:
    """The same pictures in another container."""
    with (
        av.open(str(path)) as source,
        av.open(str(target_path), "w", format=kind, options=options) as target,
    ):
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return target_path


def made(pictures: Sequence[np.ndarray], codec: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as target:
        stream = target.add_stream(codec, rate=10)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for picture in pictures:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                target.mux(packet)
        for packet in stream.encode():
            target.mux(packet)
    return buffer.getvalue()


def saved(folder: Path, data: bytes, name: str = "clip.mp4") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# ---- what is read ---------------------------------------------------------------------------


def test_a_whole_clip(small, frames):
    seen = []
    got = read_video(small, seen.append)
    assert got.dtype == np.uint8
    assert got.shape == (120, 144, 176, 3)
    assert np.array_equal(got, frames)
    (header,) = seen
    assert (header.num_frames, header.width, header.height) == (120, 176, 144)
    assert header.fps == pytest.approx(30000 / 1001)
    assert np.array_equal(read_video(str(small), only(0, 1)), frames[:2])


@pytest.mark.parametrize("indices", [(0,), (3,), (119,), (0, 60, 119), (5, 5, 6), tuple(range(9))])
def test_chosen_frames(small, frames, indices):
    assert np.array_equal(read_video(small, only(*indices)), frames[list(indices)])


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [("bikes.mp4", (272, 640), 250), ("bigbuckbunny.mp4", (720, 1280), 132)],
)
def test_other_clips(name, size, count):
    path = vision_checkpoint.clip(name)
    got = read_video(path, lambda header: (0, header.num_frames // 20))
    assert got.shape == (2, *size, 3)
    assert not np.array_equal(got[0], got[1])
    assert count == _header_of(path).num_frames


def _header_of(path) -> VideoHeader:
    seen: list[VideoHeader] = []

    def stop(header):
        seen.append(header)
        raise KeyError

    with pytest.raises(KeyError):
        read_video(path, stop)
    return seen[0]


@pytest.mark.parametrize(
    "kind", ["matroska", "mpegts", "mov", "flv"], ids=lambda kind: f"in {kind}"
)
def test_other_containers(tmp_path, small, frames, kind):
    """Some of them do not say how many frames they hold."""
    path = remuxed(small, tmp_path / "clip", kind)
    assert _header_of(path).num_frames == 120
    assert np.array_equal(read_video(path, everything), frames)


def test_a_clip_on_its_side_is_turned_upright(tmp_path, small, frames):
    """What a telephone held upright writes: the rotation stands in the track's header."""
    for matrix, turns in (((0, 1, -1, 0), -1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)):
        data = bytearray(small.read_bytes())
        start = data.index(b"tkhd") + 4 + 40  # of the matrix, behind 40 bytes of version 0
        a, b, c, d = (value * 65536 for value in matrix)
        data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        got = read_video(saved(tmp_path, bytes(data)), only(0, 7))
        assert np.array_equal(got, np.rot90(frames[[0, 7]], turns, axes=(1, 2)))


def test_frames_instead_of_a_file(tmp_path, frames):
    few = frames[:3]
    pictures = [PIL.Image.fromarray(frame) for frame in few]
    pictures[1].save(tmp_path / "second.png")
    first_axes = np.ascontiguousarray(few.transpose(0, 3, 1, 2))
    for source in (
        few,
        list(few),
        tuple(pictures),
        [few[0], tmp_path / "second.png", torch.from_numpy(first_axes[2])],
        first_axes,
        torch.from_numpy(first_axes),
        few.astype(np.float32) / 255,
    ):
        assert np.array_equal(read_video(source, everything), few)
    assert np.array_equal(read_video(few, only(2, 0)), few[[2, 0]])
    assert np.array_equal(read_video(list(few), only(1)), few[[1]])
    grey = few[..., :1]
    assert np.array_equal(read_video(grey, everything), grey.repeat(3, axis=-1))


# ---- what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "error", "words"),
    [
        ([], ValueError, "at least one frame"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], ValueError, "one size"),
        ([np.zeros((4, 4, 3), np.uint8), "no.png"], exafuse.MediaError, "frame 1: no such file"),
        ([np.zeros((4, 4, 3), np.uint8), None], TypeError, "frame 1: expected a file"),
        (["https://example.org/0.png"], ValueError, "frame 0: .* download it first"),
        (np.zeros((0, 4, 4, 3), np.uint8), ValueError, r"got \[0, 4, 4, 3\]"),
        (np.zeros((4, 4, 3), np.uint8), ValueError, r"got \[4, 4, 3\]"),
        (np.zeros((2, 4, 4, 4), np.uint8), ValueError, r"got \[2, 4, 4, 4\]"),
        (np.zeros((2, 0, 4, 3), np.uint8), exafuse.MediaError, "4 x 0"),
        (np.full((2, 4, 4, 3), np.nan, np.float32), ValueError, "floats from 0 to 1"),
        (np.zeros((2, 4, 4, 3), np.int32), ValueError, "got int32"),
        (torch.full((2, 3, 4, 4), 2.0), ValueError, "floats from 0 to 1"),
        (b"ftypisom", TypeError, "expected a file"),
        (None, TypeError, "got None"),
        ("https://example.org/clip.mp4", ValueError, "download it first"),
        ("rtsp://example.org/live", ValueError, "download it first"),
        ("missing.mp4", exafuse.MediaError, "no such file"),
        ("concat:missing.mp4|missing.mp4", exafuse.MediaError, "no such file"),
        ("/dev/zero", exafuse.MediaError, "regular file"),
    ],
)
def test_what_is_no_video(tmp_path, monkeypatch, source, error, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=words):
        read_video(source, everything)


def sound() -> bytes:
    """An MP4 file with sound and no pictures."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 44100
        for packet in [*stream.encode(frame), *stream.encode()]:
            target.mux(packet)
    return buffer.getvalue()


def test_other_files(tmp_path, small):
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{small}\n#EXT-X-ENDLIST\n"
    script = f"ffconcat version 1.0\nfile '{small}'\n"
    picture = io.BytesIO()
    PIL.Image.new("RGB", (9, 9)).save(picture, "PNG")
    for name, data, words in (
        ("empty", b"", "cannot be read"),
        ("text", b"I am a film.\n", "cannot be read"),
        # They name another file, which must not be opened on their behalf.
        ("playlist", playlist.encode(), "cannot be read"),
        ("script", script.encode(), "cannot be read"),
        ("picture", picture.getvalue(), "cannot be read"),
        ("sound", sound(), "only sound or data"),
        ("zeros", bytes(5000), "cannot be read"),
    ):
        path = saved(tmp_path, data, f"{name}.mp4")
        with pytest.raises(exafuse.MediaError, match=words) as caught:
            read_video(path, everything, "messages[0], part 1 (video)")
        assert str(caught.value).startswith("messages[0], part 1 (video): ")


def test_the_playlist_would_have_been_played(tmp_path, small):
    """Without the list of formats the test above would show nothing."""
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{small}\n#EXT-X-ENDLIST\n"
    with av.open(str(saved(tmp_path, playlist.encode(), "list.m3u8"))) as container:
        assert container.format.name == "hls"


def outcome(path: Path) -> int | str:
    """How many frames there are, or "refused"; anything but a MediaError is a failure."""
    try:
        got = read_video(path, everything)
    except exafuse.MediaError:
        return "refused"
    assert got.dtype == np.uint8
    return len(got)


def test_a_truncated_clip(tmp_path, small):
    index_last = small.read_bytes()
    index_first = remuxed(small, tmp_path / "first", "mp4", movflags="faststart").read_bytes()
    assert index_last.index(b"moov") > index_last.index(b"mdat")
    assert index_first.index(b"moov") < index_first.index(b"mdat")
    assert outcome(saved(tmp_path, index_first)) == 120
    for data in (index_last, index_first):
        for percent in (0, 1, 10, 50, 80, 90):
            cut = data[: len(data) * percent // 100]
            assert outcome(saved(tmp_path, cut)) == "refused", percent


def test_a_truncated_clip_says_how_much_is_left(tmp_path):
    pictures = [np.full((32, 32, 3), 8 * i, np.uint8) for i in range(30)]
    data = made(pictures, "mpeg4", "matroska")
    path = saved(tmp_path, data[: int(len(data) * 0.6)])
    count = _header_of(path).num_frames
    assert 0 < count < 30  # no count in this header: what is there is what there is
    assert outcome(path) == count


def test_frames_that_the_header_promises_and_the_file_lacks(tmp_path, small):
    data = bytearray(small.read_bytes())
    # The number of samples stands in the table of their sizes.
    place = data.index(b"stsz") + 12
    assert struct.unpack_from(">I", data, place) == (120,)
    with av.open(io.BytesIO(bytes(data))) as container:
        keep = [p.size for p in container.demux(video=0)][:70]
    table = place + 4
    for index in range(len(keep), 120):
        struct.pack_into(">I", data, table + 4 * index, 0)
    with pytest.raises(exafuse.MediaError, match=r"damaged|cut off|decoded"):
        read_video(saved(tmp_path, bytes(data)), everything)


@pytest.mark.parametrize("part", ["header", "pictures", "anywhere"])
def test_damaged_bytes(tmp_path, small, part):
    data = small.read_bytes()
    index = data.index(b"moov")
    span = {"header": (index, len(data)), "pictures": (48, index), "anywhere": (0, len(data))}[part]
    noise = random.Random(part)
    results = set()
    for _ in range(12):
        damaged = bytearray(data)
        for _ in range(noise.choice([1, 3, 30])):
            damaged[noise.randrange(*span)] = noise.randrange(256)
        results.add(outcome(saved(tmp_path, bytes(damaged))) == "refused")
    assert True in results


def test_frames_that_change_their_size(tmp_path):
    """Two streams of one codec behind each other, as a broken recording has them."""
    first = made([np.zeros((32, 32, 3), np.uint8)] * 4, "mpeg2video", "mpegts")
    second = made([np.zeros((48, 64, 3), np.uint8)] * 4, "mpeg2video", "mpegts")
    with pytest.raises(exafuse.MediaError, match=r"one size|damaged|decoded"):
        read_video(saved(tmp_path, first + second), everything)


def test_a_refusal_of_the_header_is_passed_on_as_it_is(small):
    def refuse(_header):
        raise ValueError("too long for this model")

    with pytest.raises(ValueError, match=r"^too long for this model$"):
        read_video(small, refuse)


def test_without_pyav(monkeypatch, small, frames):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"exafuse\[vision\]"):
        read_video(small, everything)
    assert np.array_equal(read_video(frames[:2], everything), frames[:2])


# ---- which frames ---------------------------------------------------------------------------


def medium(source: object = "clip.mp4", **options: object) -> Medium:
    return Medium("video", source, "videos[0]", **options)


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        (medium(fps=2, num_frames=4), "fps or num_frames, got both"),
        (medium(fps=0), "positive number"),
        (medium(fps=-1.0), "positive number"),
        (medium(fps=float("nan")), "positive number"),
        (medium(fps=float("inf")), "positive number"),
        (medium(fps="2"), "positive number"),
        (medium(num_frames=0), "positive integer"),
        (medium(num_frames=2.0), "positive integer"),
        (medium(np.zeros((2, 4, 4, 3)), fps=2), "frames without a file have no rate"),
    ],
)
def test_wishes_that_cannot_be_met(wish, words):
    with pytest.raises(ValueError, match=words):
        sampling.check_sampling(wish)


def settings(**changes: object) -> SimpleNamespace:
    """What the sampling asks of a video processor that does not resize."""
    defaults = {"do_resize": False, "patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
    defaults |= {"do_sample_frames": False, "fps": None, "num_frames": None}
    return SimpleNamespace(**defaults | changes)


def test_frames_are_all_looked_at_unless_somebody_says_otherwise():
    header = VideoHeader(100, 25.0, 56, 56)
    assert sampling.choose_frames(settings(), medium(), header) is None
    assert sampling.choose_frames(settings(do_sample_frames=True), medium(), header) is None
    chosen = settings(do_sample_frames=True, fps=2)
    assert sampling.choose_frames(chosen, medium(np.zeros(4)), header) is None
    short = VideoHeader(2, 25.0, 56, 56)
    assert sampling.choose_frames(settings(), medium(num_frames=1), short) is None
    with pytest.raises(exafuse.MediaError, match="give num_frames"):
        sampling.choose_frames(settings(), medium(fps=2), VideoHeader(100, None, 56, 56))


def test_tokens_of_a_video_that_is_not_resized():
    assert sampling.video_tokens(settings(), 5, 56, 84, "videos[0]") == 3 * 2 * 3
    with pytest.raises(exafuse.MediaError, match="multiples of 28"):
        sampling.video_tokens(settings(), 5, 57, 84, "videos[0]")
    with pytest.raises(exafuse.MediaError, match="more than is decoded at once"):
        sampling.video_tokens(settings(), 3000, 560, 560, "videos[0]")
