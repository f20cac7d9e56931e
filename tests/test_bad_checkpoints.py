"""Weight files from a stranger: every fault ends in a CheckpointError that names it.

Each case also runs under ``load_guard.guarded``: under two seconds, no memory beyond the
files' size + 64 MiB, no code run, nothing unpickled, no file opened outside the checkpoint folder.
"""

from __future__ import annotations

import json
import os
import pickle
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from exafuse.checkpoint import WEIGHTS_NAME, Checkpoint
from exafuse.safetensors_file import JSON_LIMIT_BYTES
from load_guard import guarded
from safetensors.torch import load, save_file

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in a single file."""
    return files.warmed(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in several shards."""
    return files.warmed(tmp_path / "checkpoint", max_shard_size="60KB")


def test_the_guard_itself(folder: Path, tmp_path: Path) -> None:
    """Each thing the guard forbids does make it fail."""
    (tmp_path / "outside").write_bytes(pickle.dumps(Path("x")))
    held = []
    crimes: list[tuple[str, Callable[[], Any]]] = [
        ("opened .*outside", lambda: open(tmp_path / "outside").close()),
        ("pickle.find_class", lambda: pickle.loads(pickle.dumps(Path("x")))),
        ("exec|compile", lambda: eval("1 + 1")),
        ("subprocess.Popen|os.posix_spawn|os.fork|os.system", lambda: os.system("true")),
        ("traced memory grew", lambda: held.append(bytearray(66 * 2**20))),
        ("resident memory grew", lambda: held.append(torch.ones(18 * 2**20))),
        ("took", lambda: sum(range(1_000_000))),
        ("blocks", lambda: time.sleep(10)),
    ]
    for words, crime in crimes:
        limits = {"took": (0.1, 20.0), "blocks": (2.0, 0.2)}.get(words, (2.0, 20.0))
        expected = pytest.raises((AssertionError, TimeoutError), match=words)
        with expected, guarded(folder, *limits):
            crime()
    with guarded(folder):
        files.load(folder)


# --------------------------------------------------------------------------- S1-S3: length and JSON


@pytest.mark.parametrize("size", range(8))
def test_shorter_than_the_length_field(folder: Path, size: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(path.read_bytes()[:size])
    files.refused(folder, WEIGHTS_NAME, "header too small", f"got {size}")


@pytest.mark.parametrize(
    "length", [2**63, 2**64 - 1, 100_000_001, 2**32, JSON_LIMIT_BYTES + 1, 1_000_000]
)
def test_header_length_beyond_the_limit_or_the_file(folder: Path, length: int) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(struct.pack("<Q", length) + path.read_bytes()[8:])
    files.refused(folder, WEIGHTS_NAME, "header length", str(length))


def test_a_huge_sparse_file_is_not_read(folder: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.write_bytes(struct.pack("<Q", 2**40) + b"{")
    os.truncate(path, 2**41)
    files.refused(folder, WEIGHTS_NAME, "header length", str(2**40))


@pytest.mark.parametrize("fault", files.JSON_FAULTS)
def test_header_that_is_no_json_object(folder: Path, fault: str) -> None:
    files.write_raw(folder / WEIGHTS_NAME, files.JSON_FAULTS[fault], b"\0" * 64)
    files.refused(folder, WEIGHTS_NAME)


# ------------------------------------------------------------------------------- S4: duplicate keys


def test_duplicate_tensor(folder: Path) -> None:
    header, data = files.split_file(folder / WEIGHTS_NAME)
    entry = json.dumps(header[NORM])
    text = json.dumps(header).replace('{"__metadata__"', f'{{"{NORM}": {entry}, "__metadata__"', 1)
    assert text.count(f'"{NORM}"') == 2
    files.write_raw(folder / WEIGHTS_NAME, text.encode(), data)
    files.refused(folder, WEIGHTS_NAME, NORM, "twice")


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_duplicate_field_of_a_tensor(folder: Path, field: str) -> None:
    header, data = files.split_file(folder / WEIGHTS_NAME)
    entry = json.dumps(header[NORM])
    twice = entry[:-1] + f', "{field}": {json.dumps(header[NORM][field])}}}'
    text = json.dumps(header).replace(entry, twice, 1)
    files.write_raw(folder / WEIGHTS_NAME, text.encode(), data)
    files.refused(folder, WEIGHTS_NAME, field, "twice")


# ------------------------------------------------------- S5-S7: offsets, shapes, dtypes of an entry


def spoil(folder: Path, **fields: Any) -> None:
    """Replace fields in the header entry of ``model.norm.weight`` (F32, [64], 256 bytes)."""
    header, data = files.split_file(folder / WEIGHTS_NAME)
    header[NORM] = {**header[NORM], **fields}
    files.write_raw(folder / WEIGHTS_NAME, header, data)


OFFSETS = {
    "negative": [-256, 0],
    "negative begin": [-1, 255],
    "reversed": [512, 256],
    "beyond the end": [10**7, 10**7 + 256],
    "far beyond": [2**53 + 1, 2**53 + 257],
    "largest": [2**63 - 257, 2**63 - 1],
    "wraps 64 bits": [2**64 - 256, 2**64],
    "floats": [0.0, 256.0],
    "strings": ["0", "256"],
    "booleans": [False, True],
    "one": [0],
    "three": [0, 128, 256],
    "none": [],
    "nested": [[0], [256]],
    "object": {"begin": 0, "end": 256},
    "null": None,
    "number": 256,
    "too small": [0, 128],
    "too large": [0, 512],
    "empty range": [0, 0],
}


@pytest.mark.parametrize("fault", OFFSETS)
def test_bad_offsets(folder: Path, fault: str) -> None:
    spoil(folder, data_offsets=OFFSETS[fault])
    files.refused(folder, WEIGHTS_NAME, NORM, "data_offsets")


def entries(*spans: tuple[int, int]) -> dict[str, Any]:
    """A header of byte tensors at these offsets."""
    return {
        f"tensor_{n}": {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}
        for n, (begin, end) in enumerate(spans)
    }


@pytest.mark.parametrize(
    ("spans", "size", "words"),
    [
        ([(0, 8), (4, 12)], 12, ["tensor_1", "overlaps"]),
        ([(0, 8), (0, 8)], 8, ["tensor_1", "overlaps"]),
        ([(0, 16), (4, 8)], 16, ["tensor_1", "overlaps"]),
        ([(0, 8), (12, 16)], 16, ["tensor_1", "follows a hole"]),
        ([(4, 8)], 8, ["tensor_0", "follows a hole"]),
        ([(8, 8), (0, 4)], 8, ["tensor_0", "follows a hole"]),
        ([(0, 8), (8, 17)], 16, ["tensor_1", "ends at byte"]),
        ([(0, 8), (8, 16)], 17, ["1 bytes follow the last tensor"]),
        ([], 1, ["1 bytes follow the last tensor"]),
    ],
)
def test_holes_overlaps_and_trailing_bytes(folder: Path, spans, size: int, words) -> None:
    files.write_raw(folder / WEIGHTS_NAME, entries(*spans), bytes(size))
    files.refused(folder, WEIGHTS_NAME, *words)


def test_offsets_in_any_order_are_fine(folder: Path) -> None:
    files.write_raw(folder / WEIGHTS_NAME, entries((8, 12), (0, 8), (12, 12), (8, 8)), bytes(12))
    tensors = Checkpoint.open(folder).tensors
    assert list(tensors) == ["tensor_1", "tensor_3", "tensor_0", "tensor_2"]


SHAPES = {
    "negative": [-64],
    "two negatives": [-8, -8],
    "overflow to the right size": [2**62, 4, 16],
    "overflow to zero": [2**32, 2**32],
    "one dimension of 2^63": [2**63],
    "large": [2**62, 4],
    "float": [64.0],
    "string": ["64"],
    "boolean": [True],
    "null inside": [None],
    "null": None,
    "number": 64,
    "object": {"0": 64},
    "nested": [[64]],
    "nine dimensions": [1] * 8 + [64],
    "10^4 dimensions": [1] * 10_000,
    "10^6 dimensions": [1] * 1_000_000,
    "wrong size": [63],
    "zero-size": [0],
    "zero-size in two dimensions": [64, 0],
}


@pytest.mark.parametrize("fault", SHAPES)
def test_bad_shapes(folder: Path, fault: str) -> None:
    spoil(folder, shape=SHAPES[fault])
    words = [] if fault == "10^6 dimensions" else [NORM, "shape"]
    files.refused(folder, WEIGHTS_NAME, *words)


@pytest.mark.parametrize("shape", [[1, 64], [64, 1], [8, 8], [64, 1, 1, 1]])
def test_a_shape_of_the_right_size_is_still_another_shape(folder: Path, shape: list[int]) -> None:
    spoil(folder, shape=shape)
    files.refused(folder, "FOLDER: 1 tensors have another shape", NORM, "expected [64]", f"got {shape}")


@pytest.mark.parametrize("shape", [[], [0], [3, 0]])
def test_scalars_and_empty_tensors_only_where_expected(folder: Path, shape: list[int]) -> None:
    state = files.read(folder)
    files.write(folder, {**state, NORM: torch.ones(shape)})
    files.refused(folder, NORM, "expected [64]", f"got {shape}")
    files.write(folder, {**state, "extra": torch.ones(shape)})
    files.refused(folder, "unexpected: 'extra'")


DTYPES = ["F33", "f32", "BF32", "float32", "F4", "F6_E2M3", "", "F32 ", 32, None, ["F32"], {}, True]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unknown_dtypes(folder: Path, dtype: Any) -> None:
    spoil(folder, dtype=dtype)
    files.refused(folder, WEIGHTS_NAME, NORM, "dtype: expected one of F64, F32")


@pytest.mark.parametrize("dtype", ["F64", "BF16", "F16", "I8", "U64", "BOOL", "F8_E4M3"])
def test_dtype_that_does_not_fill_the_bytes(folder: Path, dtype: str) -> None:
    spoil(folder, dtype=dtype)
    files.refused(folder, WEIGHTS_NAME, NORM, f"[64] of {dtype}", "hold 256")


@pytest.mark.parametrize(
    ("dtype", "shape"), [("I32", [64]), ("U32", [64]), ("I8", [256]), ("F8_E4M3", [256])]
)
def test_dtypes_that_are_no_weights(folder: Path, dtype: str, shape: list[int]) -> None:
    spoil(folder, dtype=dtype, shape=shape)
    message = files.refused(folder, NORM, dtype="bfloat16")
    assert dtype in message or str(shape) in message


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        "F32",
        7,
        {},
        {"dtype": "F32", "shape": [64]},
        {"dtype": "F32", "data_offsets": [0, 256]},
        {"shape": [64], "data_offsets": [0, 256]},
        {"dtype": "F32", "shape": [64], "data_offsets": [0, 256], "strides": [2]},
    ],
)
def test_entries_with_other_fields(folder: Path, entry: Any) -> None:
    header, data = files.split_file(folder / WEIGHTS_NAME)
    files.write_raw(folder / WEIGHTS_NAME, {**header, NORM: entry}, data)
    files.refused(folder, WEIGHTS_NAME, NORM, "expected exactly the fields")


@pytest.mark.parametrize("metadata", [None, [], "pt", 1, {"format": 1}, {"format": {"a": "b"}}])
def test_bad_metadata(folder: Path, metadata: Any) -> None:
    header, data = files.split_file(folder / WEIGHTS_NAME)
    files.write_raw(folder / WEIGHTS_NAME, {**header, "__metadata__": metadata}, data)
    files.refused(folder, WEIGHTS_NAME, "__metadata__")


def test_a_dtype_of_its_own_in_one_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[1]
    state = load(path.read_bytes())
    save_file({n: t.bfloat16() for n, t in state.items()}, path)
    files.refused(sharded, "dtype 'auto'", "F32", "BF16")


@pytest.mark.parametrize("name", ["", "\ud800", "a" * 100_000, "\0", "../../x", "__class__"])
def test_strange_tensor_names(folder: Path, name: str) -> None:
    header, data = files.split_file(folder / WEIGHTS_NAME)
    header[name] = header.pop(NORM)
    files.write_raw(folder / WEIGHTS_NAME, header, data)
    message = files.refused(folder, NORM, "unexpected")
    assert message.isprintable()
    message.encode()
