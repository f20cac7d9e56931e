"""What a safetensors header may not say about a tensor: offsets, shapes, dtypes, other fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from exafuse.weights.checkpoint import WEIGHTS_NAME, Checkpoint
from exafuse.weights.safetensors_file import JSON_LIMIT_VALUES
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


def spoil(folder: Path, **fields: Any) -> None:
    """Replace fields in the header entry of ``model.norm.weight`` (F32, [64], 256 bytes)."""
    header, data = files.split_file(folder / WEIGHTS_NAME)
    header[NORM] = {**header[NORM], **fields}
    files.write_raw(folder / WEIGHTS_NAME, header, data)


MALFORMED_OFFSETS = {
    "negative": [-256, 0],
    "negative begin": [-1, 255],
    "reversed": [512, 256],
    "wraps 64 bits": [2**64 - 256, 2**64],
    "floats": [0.0, 256.0],
    "strings": ["0", "256"],
    "booleans": [False, True],
    "boolean begin": [False, 256],
    "one": [0],
    "three": [0, 128, 256],
    "none": [],
    "nested": [[0], [256]],
    "object": {"begin": 0, "end": 256},
    "null": None,
    "number": 256,
}


@pytest.mark.parametrize("fault", MALFORMED_OFFSETS)
def test_offsets_that_are_no_range(folder: Path, fault: str) -> None:
    spoil(folder, data_offsets=MALFORMED_OFFSETS[fault])
    files.refused(folder, WEIGHTS_NAME, NORM, "data_offsets: expected two whole numbers")


@pytest.mark.parametrize("offsets", [[0, 128], [0, 512], [0, 0], [0, 2**63 - 1]])
def test_offsets_of_another_size(folder: Path, offsets: list[int]) -> None:
    spoil(folder, data_offsets=offsets)
    words = f"takes 256 bytes, but data_offsets {offsets} hold {offsets[1]}"
    files.refused(folder, WEIGHTS_NAME, NORM, words)


@pytest.mark.parametrize("begin", [10**7, 2**53 + 1, 2**63 - 257])
def test_offsets_beyond_the_end(folder: Path, begin: int) -> None:
    spoil(folder, data_offsets=[begin, begin + 256])
    # The hole that the tensor leaves behind is found first.
    files.refused(folder, WEIGHTS_NAME, "data_offsets", "follows a hole")


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
        ([(0, 8), (4, 12)], 16, ["tensor_1", "overlaps"]),
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


MALFORMED_SHAPES = {
    "negative": [-64],
    "two negatives": [-8, -8],
    "one dimension of 2^63": [2**63],
    "float": [64.0],
    "string": ["64"],
    "boolean": [True, 64],
    "null inside": [None],
    "null": None,
    "number": 64,
    "object": {"0": 64},
    "nested": [[64]],
    "nine dimensions": [1] * 8 + [64],
    "10^4 dimensions": [1] * 10_000,
}


@pytest.mark.parametrize("fault", MALFORMED_SHAPES)
def test_shapes_that_are_none(folder: Path, fault: str) -> None:
    spoil(folder, shape=MALFORMED_SHAPES[fault])
    files.refused(folder, WEIGHTS_NAME, NORM, "shape: expected at most 8 whole numbers")


@pytest.mark.parametrize(
    "shape", [[2**62, 4, 16], [2**32, 2**32], [2**62, 4], [2**61], [2**62] * 8]
)
def test_shapes_whose_size_overflows(folder: Path, shape: list[int]) -> None:
    spoil(folder, shape=shape)
    files.refused(folder, WEIGHTS_NAME, NORM, "shape", "overflows")


@pytest.mark.parametrize("shape", [[63], [65], [0], [64, 0], [2**62, 0], [], [2**60]])
def test_shapes_that_do_not_fill_the_bytes(folder: Path, shape: list[int]) -> None:
    spoil(folder, shape=shape)
    files.refused(folder, WEIGHTS_NAME, NORM, f"shape {shape} of F32 takes", "hold 256")


def test_a_shape_of_a_million_dimensions(folder: Path) -> None:
    spoil(folder, shape=[1] * 1_000_000)
    files.refused(folder, WEIGHTS_NAME, f"at most {JSON_LIMIT_VALUES} are read")


@pytest.mark.parametrize("shape", [[1, 64], [64, 1], [8, 8], [64, 1, 1, 1]])
def test_a_shape_of_the_right_size_is_still_another_shape(folder: Path, shape: list[int]) -> None:
    spoil(folder, shape=shape)
    files.refused(
        folder, "FOLDER: 1 tensors have another shape", NORM, "expected [64]", f"got {shape}"
    )


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
