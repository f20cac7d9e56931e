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
from exafuse.weights.checkpoint import WEIGHTS_NAME
from exafuse.weights.safetensors_file import JSON_LIMIT_BYTES
from load_guard import guarded

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in a single file."""
    return files.warmed(tmp_path / "checkpoint")


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


@pytest.mark.parametrize("surplus", [1, 8, 9])
def test_header_length_just_beyond_the_file(folder: Path, surplus: int) -> None:
    content = (folder / WEIGHTS_NAME).read_bytes()
    length = len(content) - 8 + surplus
    (folder / WEIGHTS_NAME).write_bytes(struct.pack("<Q", length) + content[8:])
    files.refused(
        folder, WEIGHTS_NAME, f"header length: {length} bytes, but only {length - surplus}"
    )


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
