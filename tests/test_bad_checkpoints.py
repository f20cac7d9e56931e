"""Weight files and indexes from a stranger: every fault ends in a CheckpointError that names it.

Each case also runs under ``checkpoint_files.guarded``: under two seconds, no memory beyond the
files' size + 64 MiB, no code run, nothing unpickled, no file opened outside the checkpoint folder.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from exafuse import CheckpointError, weights
from exafuse.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from exafuse.safetensors_file import JSON_LIMIT_BYTES, JSON_LIMIT_VALUES
from safetensors.torch import load, save_file

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good single-file checkpoint, loaded once, so that nothing is imported later."""
    path = tmp_path / "checkpoint"
    files.make(path)
    files.load(path)
    return path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in several shards."""
    path = tmp_path / "checkpoint"
    files.make(path, max_shard_size="60KB")
    files.load(path)
    return path


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
        with expected, files.guarded(folder, *limits):
            crime()
    with files.guarded(folder):
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


JSON_FAULTS = {
    "empty": b"",
    "zeros": b"\0" * 64,
    "not utf-8": b'{"\xff": 1}',
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "byte-order mark": b'\xef\xbb\xbf{"a": 1}',
    "array": b"[1, 2]",
    "string": b'"text"',
    "number": b"1",
    "null": b"null",
    "not json": b"{no json}",
    "unfinished": b'{"a": {"dtype": "F32"',
    "text after it": b'{} {"a": 1}',
    "comment": b"{} // done",
    "deep lists": b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep and unfinished": b"{" + b'"a":[' * 60_000,
    "nan": b'{"a": NaN}',
    "infinity": b'{"a": [-Infinity]}',
    "huge float": b'{"a": 1e999}',
    "huge integer": b'{"a": ' + b"9" * 100_000 + b"}",
    "many empty lists": b'{"a": [' + b"[]," * 1_300_000 + b"[]]}",
    "many keys": b"{" + b",".join(b'"%d":0' % n for n in range(350_000)) + b"}",
    "as many lists as allowed": b'{"a": [' + b"[]," * (JSON_LIMIT_VALUES // 2 - 2) + b"[]]}",
    "as many objects as allowed": b'{"a": [' + b'{"":9},' * (JSON_LIMIT_VALUES // 3 - 2) + b"{}]}",
    "one long string": b'{"' + b"a" * (JSON_LIMIT_BYTES - 100) + "\U0001f600".encode() + b'": 1}',
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_header_that_is_no_json_object(folder: Path, fault: str) -> None:
    files.write_raw(folder / WEIGHTS_NAME, JSON_FAULTS[fault], b"\0" * 64)
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
    files.refused(folder, str(folder), NORM, "expected [64]", f"got {shape}")


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


NASTY = [None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, 0.5, "", "F32", "BF16", [], {}, [0]]


def test_random_damage_to_the_header(folder: Path) -> None:
    """Any value of the header replaced by any nasty one: an error, or the tensors as they were."""
    header, data = files.split_file(folder / WEIGHTS_NAME)
    state, model = files.read(folder), files.load(folder)
    rng = random.Random(3)
    refusals = 0
    for _ in range(600):
        damaged = json.loads(json.dumps(header))
        name = rng.choice(list(damaged))
        target: Any = damaged
        keys = [name, rng.choice(list(damaged[name])), rng.randrange(2)]
        depth = rng.randint(1, 3)
        for key in keys[: depth - 1]:
            target = target[key]
        if isinstance(target, dict) or (isinstance(target, list) and len(target) > keys[2]):
            target[keys[depth - 1]] = rng.choice(NASTY)
        files.write_raw(folder / WEIGHTS_NAME, damaged, data)
        try:
            weights.load_weights(model, folder, tie_word_embeddings=False)
        except CheckpointError:
            refusals += 1
            continue
        loaded = weights.unmerged_state_dict(model)
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert refusals > 300


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


# ---------------------------------------------------------------------------------- I1: shard names

BAD_NAMES = [
    "../x.safetensors",
    "../checkpoint/model.safetensors",
    "/etc/passwd",
    "sub/model.safetensors",
    "./model.safetensors",
    "C:\\model.safetensors",
    "C:model.safetensors",
    "..\\x.safetensors",
    "model\0.safetensors",
    "model.safetensors\n",
    ".",
    "..",
    "",
    "~/model.safetensors\ud800",
    None,
    1,
    True,
    ["model.safetensors"],
    {"file": "model.safetensors"},
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_shard_names_that_are_no_plain_names(folder: Path, name: Any) -> None:
    outside = folder.parent / "x.safetensors"
    shutil.copy(folder / WEIGHTS_NAME, outside)
    (folder / "sub").mkdir()
    shutil.copy(folder / WEIGHTS_NAME, folder / "sub")
    weight_map = dict.fromkeys(files.read(folder), WEIGHTS_NAME)
    files.write_index(folder, {**weight_map, NORM: name})
    message = files.refused(folder, INDEX_NAME, "weight_map", NORM, "not a plain file name")
    assert message.isprintable()


@pytest.mark.parametrize("name", ["config.json", "weights", "model.safetensors.py", "x.gguf"])
def test_shards_that_are_no_safetensors(folder: Path, name: str) -> None:
    files.write_index(folder, dict.fromkeys(files.read(folder), name))
    shutil.copy(folder / WEIGHTS_NAME, folder / name) if name != "config.json" else None
    (folder / WEIGHTS_NAME).unlink()
    files.refused(folder, INDEX_NAME, repr(name), "no .safetensors file")


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is limited to some 100 bytes
        server.bind(path.name)
        os.chdir(here)


def make_folder(path: Path) -> None:
    path.mkdir()


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o20600, os.makedev(1, 5))
    except PermissionError:
        pytest.skip("making a device node needs root")


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_outside(path: Path) -> None:
    path.symlink_to("../outside.safetensors")


def link_outside_absolute(path: Path) -> None:
    path.symlink_to(path.parent.parent / "outside.safetensors")


def link_through_a_folder(path: Path) -> None:
    (path.parent / "inner").symlink_to("..")
    path.symlink_to("inner/outside.safetensors")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nothing.safetensors")


def link_to_a_fifo(path: Path) -> None:
    os.mkfifo(path.parent / "fifo")
    path.symlink_to("fifo")


def no_file(path: Path) -> None:
    assert not path.exists()


NOT_FILES = [
    make_fifo,
    make_socket,
    make_folder,
    make_device,
    link_to_device,
    link_outside,
    link_outside_absolute,
    link_through_a_folder,
    link_to_itself,
    link_to_nothing,
    link_to_a_fifo,
    no_file,
]


@pytest.mark.parametrize("place", NOT_FILES)
def test_shards_that_are_no_files_of_the_folder(sharded: Path, place) -> None:
    path = sorted(sharded.glob("*.safetensors"))[-1]
    shutil.copy(path, sharded.parent / "outside.safetensors")
    path.unlink()
    place(path)
    files.refused(sharded, path.name)


@pytest.mark.parametrize("place", NOT_FILES)
@pytest.mark.parametrize("name", [WEIGHTS_NAME, INDEX_NAME])
def test_single_files_and_indexes_that_are_no_files(folder: Path, name: str, place) -> None:
    shutil.copy(folder / WEIGHTS_NAME, folder.parent / "outside.safetensors")
    (folder / WEIGHTS_NAME).unlink()
    place(folder / name)
    files.refused(folder, name)


def test_links_that_stay_in_the_folder(sharded: Path) -> None:
    before = files.read(sharded)
    for number, path in enumerate(sorted(sharded.glob("*.safetensors"))):
        path.rename(sharded / f"blob-{number}")
        path.symlink_to(f"blob-{number}")
    with files.guarded(sharded):
        model = files.load(sharded)
    for name, tensor in weights.unmerged_state_dict(model).items():
        assert torch.equal(tensor, before[name])


def test_a_folder_reached_through_a_link(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert Checkpoint.open(link).tensors.keys() == files.read(folder).keys()


def test_blobs_are_for_snapshots_of_the_cache_only(folder: Path) -> None:
    """The links of the Hub's cache work in its layout, and only into its blobs."""
    repo = folder.parent / "models--owner--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(repo / "blobs" / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")
    assert NORM in Checkpoint.open(snapshot).tensors
    files.load(snapshot)
    # The same links one folder deeper, or in a folder of another name, lead outside.
    elsewhere = repo / "shots" / ("0" * 40)
    shutil.copytree(snapshot, elsewhere, symlinks=True)
    files.refused(elsewhere, WEIGHTS_NAME, "is a link to")
    # Beside the blobs is outside, too.
    (snapshot / WEIGHTS_NAME).unlink()
    (repo / "blobs" / f"hash-{WEIGHTS_NAME}").rename(repo / "stray")
    (snapshot / WEIGHTS_NAME).symlink_to("../../blobs/../stray")
    files_before = sorted(repo.rglob("*"))
    with pytest.raises(CheckpointError, match="is a link to"):
        Checkpoint.open(snapshot)
    assert sorted(repo.rglob("*")) == files_before


# ----------------------------------------------------------------------------- I2: index and shards


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX_NAME).read_text())["weight_map"]


def test_index_names_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    weight_map = read_index(sharded)
    shard = weight_map[NORM]
    files.write_index(sharded, weight_map | {f"extra.{n}": shard for n in range(7)})
    files.refused(sharded, INDEX_NAME, "7 tensors are not in the shard", "'extra.4' and 2 more")


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    weight_map = read_index(sharded)
    other = next(shard for shard in weight_map.values() if shard != weight_map[NORM])
    files.write_index(sharded, weight_map | {NORM: other})
    files.refused(sharded, INDEX_NAME, "1 tensors are not in the shard", repr(NORM))


def test_shards_hold_tensors_that_the_index_does_not_name(sharded: Path) -> None:
    weight_map = read_index(sharded)
    del weight_map[NORM]
    files.write_index(sharded, weight_map)
    files.refused(sharded, INDEX_NAME, "1 tensors that it does not name", repr(NORM))


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    names = list(load(first.read_bytes()))
    both = load(first.read_bytes()) | load(second.read_bytes())
    save_file(both, second)
    files.refused(sharded, second.name, "another shard also holds", repr(sorted(names)[0])[:20])


def test_a_missing_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.unlink()
    files.refused(sharded, path.name, "is missing")


def test_two_shards_swapped(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.rename(sharded / "x")
    second.rename(first)
    (sharded / "x").rename(second)
    files.refused(sharded, INDEX_NAME, "not in the shard it names")


def test_index_of_a_million_tensors(folder: Path) -> None:
    weight_map = {f"t{n}": WEIGHTS_NAME for n in range(1_000_000)}
    files.write_index(folder, weight_map)
    files.refused(folder, INDEX_NAME, f"at most {JSON_LIMIT_BYTES} are read")
    short = {f"{n:x}": "a" for n in range(JSON_LIMIT_VALUES // 2 + 1)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": short}, separators=(",", ":")))
    files.refused(folder, INDEX_NAME, f"at most {JSON_LIMIT_VALUES} are read")


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"metadata": {}},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": None},
        [],
        "x",
        1,
    ],
)
def test_index_without_a_weight_map(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index))
    files.refused(folder, INDEX_NAME, "weight_map")


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_index_that_is_no_json_object(folder: Path, fault: str) -> None:
    (folder / INDEX_NAME).write_bytes(JSON_FAULTS[fault])
    files.refused(folder, INDEX_NAME)


def test_index_with_a_tensor_named_twice(sharded: Path) -> None:
    text = (sharded / INDEX_NAME).read_text()
    line = f'"{NORM}": "{read_index(sharded)[NORM]}"'
    (sharded / INDEX_NAME).write_text(text.replace(line, f"{line}, {line}"))
    files.refused(sharded, INDEX_NAME, NORM, "twice")


def test_index_beside_a_single_file_of_another_save(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / WEIGHTS_NAME)
    files.refused(sharded, WEIGHTS_NAME, INDEX_NAME, "remove the one")


def test_index_that_names_the_single_file(folder: Path) -> None:
    files.write_index(folder, dict.fromkeys(files.read(folder), WEIGHTS_NAME))
    with files.guarded(folder):
        files.load(folder)


# --------------------------------------------------------------------------- I3: pickles and others


class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".BIN"])
def test_pickles_are_never_opened(folder: Path, suffix: str) -> None:
    sprung = folder.parent / "sprung"
    pickled = pickle.dumps({"model.norm.weight": Trap(sprung)})
    for stem in ("pytorch_model", "consolidated.00", "model", "optimizer", "training_args"):
        (folder / f"{stem}{suffix}").write_bytes(pickled)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with files.guarded(folder):
        files.load(folder)  # beside safetensors they are of no interest
    files.write_index(folder, dict.fromkeys(files.read(folder), f"model{suffix}"))
    files.refused(folder, INDEX_NAME, f"'model{suffix}' is a pickle file", "save_pretrained")
    (folder / INDEX_NAME).unlink()
    (folder / WEIGHTS_NAME).unlink()
    files.refused(folder, f"consolidated.00{suffix}", "never opens pickle", "use_safetensors=False")
    # A pickle under the right name is no safetensors file.
    (folder / WEIGHTS_NAME).write_bytes(pickled)
    files.refused(folder, WEIGHTS_NAME, "header")
    assert not sprung.exists()


def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    sprung = folder.parent / "sprung"
    code = f"open({str(sprung)!r}, 'w')"
    for name in ("modeling_exaone4.py", "configuration.py", "torch.py", "tqdm.py", "__init__.py"):
        (folder / name).write_text(code)
    here = os.getcwd()
    os.chdir(folder)
    try:
        with files.guarded(folder):
            files.load(folder)
    finally:
        os.chdir(here)
    assert not sprung.exists()


def test_folders_without_weights(folder: Path, tmp_path: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.rename(folder / "weights.safetensors")
    files.refused(folder, WEIGHTS_NAME, INDEX_NAME, "got only 'weights.safetensors'")
    (folder / "weights.safetensors").unlink()
    files.refused(folder, WEIGHTS_NAME, INDEX_NAME, "there is neither")
    for wrong in (tmp_path / "nowhere", folder / "config.json", Path("a\0b")):
        with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
            Checkpoint.open(wrong)


def test_an_unreadable_file(folder: Path, monkeypatch) -> None:
    def denied(*args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("exafuse.checkpoint.os.open", denied)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be opened: Permission denied"):
        Checkpoint.open(folder)
