"""Reading one safetensors file, strictly and without memory maps.

A file is eight bytes (little-endian length N of the header), N bytes of JSON that map each
tensor's name to its dtype, shape and byte range, and the tensors' bytes, back to back. Everything
the header says is checked before a byte of any tensor is read or a byte of memory is allocated
for one: a file from a stranger can be wrong, but it cannot make the reader allocate, overlap or
read outside itself.

Tensors are read with plain reads into their destination. A memory map would be as fast, but a file
that is truncated while it is mapped kills the process with SIGBUS; a short read is an exception.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exafuse.errors import CheckpointError
from exafuse.strict_json import parse_json

# A tensor's entry takes some 120 bytes of JSON and a checkpoint of these families has at most a few
# thousand tensors. The format allows 100,000,000 bytes; parsed, that much JSON can fill gigabytes.
JSON_LIMIT_BYTES = 4 * 2**20
JSON_LIMIT_VALUES = 200_000
CHUNK_BYTES = 16 * 2**20
MAX_DIMS = 8

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Called with the part of the destination just filled and the number of bytes it took in the file.
OnChunk = Callable[[Tensor, int], None]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` bytes at ``offset`` (from the start) of the file
    ``file``."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int


def quote(value: object, limit: int = 100) -> str:
    """``repr`` of something that came from a file, cut to ``limit`` characters."""
    # Cut before repr: a hostile string may be megabytes long.
    text = repr(value[:limit] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[:limit] + "..."


def first_five(names: list[str]) -> str:
    """The first five names and how many more there are, for an error message."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(quote(name) for name in names[:5]) + more


def parse_bounded_json(data: bytes | bytearray, what: str) -> Any:
    """Strict JSON whose parsed form stays small; ``what`` names the file in every error."""
    # Every value but the outermost stands behind one of these bytes, so this bounds their number
    # before any of them becomes an object.
    num_values = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if num_values > JSON_LIMIT_VALUES:
        raise CheckpointError(
            f"{what}: the JSON holds up to {num_values} values, at most {JSON_LIMIT_VALUES} are "
            "read; this is no header or index of a supported model"
        )
    return parse_json(data, what, CheckpointError)


def read_header(file: io.FileIO, file_name: str, what: str) -> dict[str, TensorInfo]:
    """Read and check the header of an open safetensors file.

    Args:
        file: the file, opened for unbuffered reading.
        file_name: its name, stored in each ``TensorInfo``.
        what: its path, for error messages.

    Returns:
        Every tensor of the file, in the order of the bytes. Together they cover the data part
        exactly.

    Raises:
        CheckpointError: names the file and the tensor or field that is wrong.
    """
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise CheckpointError(
            f"{what}: header too small: expected a file of at least 8 bytes, got {size}"
        )
    prefix = bytearray(8)
    read_bytes(file, 0, memoryview(prefix), what)
    header_bytes = int.from_bytes(prefix, "little")
    if header_bytes > JSON_LIMIT_BYTES:
        raise CheckpointError(
            f"{what}: header length: {header_bytes} bytes, at most {JSON_LIMIT_BYTES} are read; "
            "the file is damaged or is no safetensors file"
        )
    if header_bytes > size - 8:
        raise CheckpointError(
            f"{what}: header length: {header_bytes} bytes, but only {size - 8} follow; "
            "the file is damaged or its download is incomplete"
        )
    header = bytearray(header_bytes)
    read_bytes(file, 8, memoryview(header), what)
    if not header.startswith(b"{"):
        raise CheckpointError(f"{what}: header: expected a JSON object that starts with '{{'")
    entries = parse_bounded_json(header, f"{what}: header")
    _check_metadata(entries.pop("__metadata__", {}), what)
    data_start = 8 + header_bytes
    infos = [
        _tensor_info(name, entry, file_name, data_start, what) for name, entry in entries.items()
    ]
    return _check_coverage(infos, data_start, size, what)


def _check_metadata(metadata: object, what: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{what}: __metadata__: expected an object of strings")


def _tensor_info(
    name: str, entry: object, file_name: str, data_start: int, what: str
) -> TensorInfo:
    where = f"{what}: tensor {quote(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        got = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
        raise CheckpointError(
            f"{where}: expected exactly the fields dtype, shape, data_offsets; got {quote(got)}"
        )
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise CheckpointError(
            f"{where}: dtype: expected one of {', '.join(DTYPES)}; got {quote(entry['dtype'])}"
        )
    shape = _non_negative_ints(entry["shape"])
    if shape is None or len(shape) > MAX_DIMS:
        raise CheckpointError(
            f"{where}: shape: expected at most {MAX_DIMS} whole numbers from 0 to 2^63 - 1; "
            f"got {quote(entry['shape'])}"
        )
    offsets = _non_negative_ints(entry["data_offsets"])
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets: expected two whole numbers, begin <= end; "
            f"got {quote(entry['data_offsets'])}"
        )
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes >= 2**63:
        raise CheckpointError(f"{where}: shape: {list(shape)} overflows: {nbytes} bytes")
    if nbytes != end - begin:
        raise CheckpointError(
            f"{where}: shape {list(shape)} of {entry['dtype']} takes {nbytes} bytes, "
            f"but data_offsets [{begin}, {end}] hold {end - begin}"
        )
    return TensorInfo(name, dtype, shape, file_name, data_start + begin, nbytes)


def _non_negative_ints(value: object) -> tuple[int, ...] | None:
    """The list as a tuple, or None if it is no list of whole numbers from 0 to 2^63 - 1."""
    # type() and not isinstance(): a JSON true is a bool, and a bool is an int.
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**63 for v in value):
        return None
    return tuple(value)


def _check_coverage(
    infos: list[TensorInfo], data_start: int, size: int, what: str
) -> dict[str, TensorInfo]:
    """The tensors in the order of their bytes, which must fill the file without hole or
    overlap."""
    infos.sort(key=lambda info: (info.offset, info.nbytes))
    position = data_start
    for info in infos:
        if info.offset != position:
            fault = "overlaps the tensor before it" if info.offset < position else "follows a hole"
            raise CheckpointError(
                f"{what}: tensor {quote(info.name)}: data_offsets: it starts at byte "
                f"{info.offset - data_start} of the data and {fault}, expected "
                f"{position - data_start}"
            )
        position += info.nbytes
        if position > size:
            raise CheckpointError(
                f"{what}: tensor {quote(info.name)}: data_offsets: it ends at byte {position} of "
                f"a file of {size} bytes; the file is damaged or its download is incomplete"
            )
    if position != size:
        raise CheckpointError(
            f"{what}: {size - position} bytes follow the last tensor; the file is damaged"
        )
    return {info.name: info for info in infos}


def read_bytes(file: io.FileIO, offset: int, view: memoryview, what: str) -> None:
    """Fill ``view`` from byte ``offset`` of the file; a file that ends before that is an error."""
    try:
        file.seek(offset)
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise CheckpointError(
                    f"{what}: the file ended at byte {offset + done}, expected "
                    f"{len(view) - done} more; it was truncated while it was being read"
                )
            done += count
    except OSError as error:
        raise CheckpointError(f"{what}: cannot be read: {error.strerror}") from error


def read_tensor(
    file: io.FileIO,
    info: TensorInfo,
    out: Tensor,
    what: str,
    staging: Tensor | None = None,
    on_chunk: OnChunk | None = None,
) -> None:
    """Read a tensor's bytes into ``out``, casting if the dtypes differ.

    Args:
        out: contiguous, ``info.shape``, any device. On the CPU and with the file's dtype the bytes
            go straight into it; otherwise they pass through ``staging``, never as a whole tensor.
        staging: uint8, CPU, at least ``CHUNK_BYTES`` long (pinned makes copies to a GPU faster).
        on_chunk: called after each chunk.
    """
    flat = out.detach().view(-1)
    step = CHUNK_BYTES // info.dtype.itemsize
    direct = flat.device.type == "cpu" and flat.dtype == info.dtype
    if staging is None:
        staging = torch.empty(0 if direct else CHUNK_BYTES, dtype=torch.uint8)
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        num_bytes = part.numel() * info.dtype.itemsize
        raw = part.view(torch.uint8) if direct else staging[:num_bytes]
        offset = info.offset + start * info.dtype.itemsize
        read_bytes(file, offset, raw.numpy().data, what)
        if not direct:
            # To the device first: a GPU casts faster than the CPU does.
            part.copy_(raw.view(info.dtype).to(part.device))
        if on_chunk is not None:
            on_chunk(part, num_bytes)
