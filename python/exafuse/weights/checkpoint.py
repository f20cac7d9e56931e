"""A checkpoint folder: which safetensors files it consists of and which tensors they hold.

The folder is not trusted. Only plain file names inside it are opened (or, in a snapshot of the
Hub's cache, the blobs its links point to), only regular files, and never a pickle.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exafuse.errors import CheckpointError
from exafuse.weights.safetensors_file import (
    JSON_LIMIT_BYTES,
    OnChunk,
    TensorInfo,
    first_five,
    parse_bounded_json,
    quote,
    read_bytes,
    read_header,
    read_tensor,
)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
CONVERT_HINT = (
    "exafuse never opens pickle files, because opening one can run code. If you trust its author, "
    "convert it once with transformers: AutoModelForCausalLM.from_pretrained(folder, "
    "use_safetensors=False, dtype='auto').save_pretrained(new_folder)"
)


@dataclass(frozen=True)
class FileStamp:
    """What tells a file from another that later takes its name."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @staticmethod
    def of(file: io.FileIO) -> FileStamp:
        status = os.fstat(file.fileno())
        return FileStamp(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


def open_plain(folder: Path, name: str) -> io.FileIO:
    """Open a regular file of a checkpoint folder for unbuffered reading.

    Args:
        folder: the folder, its own path free of symbolic links (``Path.resolve``).
        name: a plain file name. A link must stay inside the folder; in a snapshot folder of the
            Hub's cache (``<repo>/snapshots/<revision>``) it may also point into ``<repo>/blobs``.

    Raises:
        CheckpointError: the name is no plain name, leads outside, is missing or no regular file.
    """
    if not is_plain_name(name):
        raise CheckpointError(
            f"{folder}: {quote(name)} is not a plain file name in the checkpoint folder"
        )
    path = folder / name
    target = Path(os.path.realpath(path))
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if target.parent not in allowed:
        raise CheckpointError(
            f"{path}: is not a plain file name in the checkpoint folder: it is a link to {target}; "
            "put the file itself into the folder"
        )
    try:
        # Looked at before it is opened, since opening a device can have effects; NONBLOCK and the
        # second look are for a FIFO or a link that takes the name in between.
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise CheckpointError(f"{path}: is not a plain file in the checkpoint folder")
        flags = os.O_RDONLY
        for flag in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):
            flags |= getattr(os, flag, 0)
        descriptor = os.open(target, flags)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is missing; the download may be incomplete") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    file = io.FileIO(descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise CheckpointError(f"{path}: is not a plain file in the checkpoint folder")
    return file


def is_plain_name(name: str) -> bool:
    """Whether a string is a file's name and nothing else, on any operating system."""
    return name.isprintable() and name not in ("", ".", "..") and not set(name) & set("/\\:")


class ShardReader:
    """One open safetensors file of a checkpoint."""

    def __init__(self, file: io.FileIO, path: Path, staging: Tensor | None) -> None:
        self.path = path
        self._file = file
        self._staging = staging

    def read_into(self, info: TensorInfo, out: Tensor, on_chunk: OnChunk | None = None) -> None:
        """Fill ``out`` (contiguous, ``info.shape``; any device, cast if its dtype differs)."""
        read_tensor(self._file, info, out, str(self.path), self._staging, on_chunk)


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder, every header read and checked, no tensor read yet."""

    folder: Path
    tensors: dict[str, TensorInfo]
    stamps: dict[str, FileStamp]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read and check the index, if there is one, and the header of every shard.

        Raises:
            CheckpointError: names the file and the field or tensor that is wrong.
        """
        try:
            root = Path(folder).resolve(strict=True)
            present = sorted(os.listdir(root))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}: expected a checkpoint folder: {error}") from error
        files, weight_map = _shard_files(root, present)
        tensors: dict[str, TensorInfo] = {}
        stamps: dict[str, FileStamp] = {}
        for name in files:
            with open_plain(root, name) as file:
                found = read_header(file, name, str(root / name))
                stamps[name] = FileStamp.of(file)
            twice = [tensor for tensor in found if tensor in tensors]
            if twice:
                raise CheckpointError(
                    f"{root / name}: {len(twice)} tensors that another shard also holds: "
                    f"{first_five(twice)}"
                )
            tensors.update(found)
        if weight_map is not None:
            _check_index(root, weight_map, tensors)
        return cls(root, tensors, stamps)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the safetensors files, in the order they are read."""
        return tuple(self.stamps)

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors, in the files' dtypes."""
        return sum(info.nbytes for info in self.tensors.values())

    @contextmanager
    def open_shard(self, name: str, staging: Tensor | None = None) -> Iterator[ShardReader]:
        """Open one of ``files`` for reading, after checking that it is still the file of
        ``open``."""
        path = self.folder / name
        with open_plain(self.folder, name) as file:
            if FileStamp.of(file) != self.stamps[name]:
                raise CheckpointError(f"{path}: the file changed after its header was read")
            yield ShardReader(file, path, staging)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the file's shape and dtype."""
        info = self.tensors.get(name)
        if info is None:
            raise CheckpointError(f"{self.folder}: there is no tensor {quote(name)}")
        out = torch.empty(info.shape, dtype=info.dtype)
        with self.open_shard(info.file) as shard:
            shard.read_into(info, out)
        return out


def _shard_files(root: Path, present: list[str]) -> tuple[list[str], dict[str, str] | None]:
    """The names of the weight files and, if the checkpoint has an index, its weight map."""
    if INDEX_NAME in present:
        weight_map = _read_index(root)
        files = sorted(set(weight_map.values()))
        if WEIGHTS_NAME in present and WEIGHTS_NAME not in files:
            raise CheckpointError(
                f"{root}: holds {WEIGHTS_NAME} and {INDEX_NAME}, which does not name it; "
                "remove the one that does not belong to this checkpoint"
            )
        return files, weight_map
    if WEIGHTS_NAME in present:
        return [WEIGHTS_NAME], None
    shards = [name for name in present if name.endswith(".safetensors")]
    if shards:
        raise CheckpointError(
            f"{root}: expected {WEIGHTS_NAME} or {INDEX_NAME}; got only {first_five(shards)}"
        )
    pickles = [name for name in present if name.lower().endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(
            f"{root}: expected {WEIGHTS_NAME} or {INDEX_NAME}; got only {first_five(pickles)}. "
            + CONVERT_HINT
        )
    raise CheckpointError(f"{root}: expected {WEIGHTS_NAME} or {INDEX_NAME}; there is neither")


def _read_index(root: Path) -> dict[str, str]:
    """The weight map of the index: tensor name -> file name; the file names are checked."""
    what = str(root / INDEX_NAME)
    with open_plain(root, INDEX_NAME) as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_LIMIT_BYTES:
            raise CheckpointError(f"{what}: {size} bytes, at most {JSON_LIMIT_BYTES} are read")
        data = bytearray(size)
        read_bytes(file, 0, memoryview(data), what)
    index = parse_bounded_json(data, what)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{what}: weight_map: expected an object of tensor and file names")
    for tensor, name in weight_map.items():
        where = f"{what}: weight_map: tensor {quote(tensor)}"
        if not isinstance(name, str) or not is_plain_name(name):
            raise CheckpointError(
                f"{where}: {quote(name)} is not a plain file name in the checkpoint folder"
            )
        if name.lower().endswith(PICKLE_SUFFIXES):
            raise CheckpointError(f"{where}: {quote(name)} is a pickle file. {CONVERT_HINT}")
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{where}: {quote(name)} is no .safetensors file")
    return weight_map


def _check_index(root: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    """Every tensor of the index must be in the shard it names, and no shard may hold others."""
    lacking = [
        name
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].file != file
    ]
    if lacking:
        raise CheckpointError(
            f"{root / INDEX_NAME}: weight_map: {len(lacking)} tensors are not in the shard it "
            f"names: {first_five(lacking)}"
        )
    surplus = [name for name in tensors if name not in weight_map]
    if surplus:
        raise CheckpointError(
            f"{root / INDEX_NAME}: weight_map: the shards hold {len(surplus)} tensors that it does "
            f"not name: {first_five(surplus)}"
        )
