"""File names in an index, and files in the folder, that are not what they should be."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from exafuse import CheckpointError
from exafuse.weights import loading as weights
from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint, open_plain
from load_guard import guarded

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in a single file."""
    return files.warmed(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in several shards."""
    return files.warmed(tmp_path / "checkpoint", max_shard_size="60KB")


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


@pytest.mark.parametrize("name", [name for name in BAD_NAMES if isinstance(name, str)])
def test_only_plain_names_are_opened(folder: Path, name: str) -> None:
    with (
        guarded(folder) as opened,
        pytest.raises(CheckpointError, match=r"is not a plain file name in the checkpoint folder$"),
    ):
        open_plain(folder, name)
    assert opened == []


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
    with guarded(sharded):
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
