"""Saving a model's weights: one safetensors file, or shards and their index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME
from exafuse.weights.names import HEAD, embedding_name, saved_name, unmerged_state_dict
from exafuse.weights.safetensors_file import CHUNK_BYTES, DTYPE_NAMES

_OURS = re.compile(
    r"model(-\d{5}-of-\d{5})?\.safetensors(\.partial)?|model\.safetensors\.index\.json(\.partial)?"
)


def save_weights(model: nn.Module, folder: str | Path, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write the model's weights as transformers would: same names, one file or shards and an index.

    A head that shares the embedding's memory is not written. The memory used is one chunk of a few
    MiB, whatever device the model is on. Weight files of an earlier save that are not part of this
    one are removed. If the save is interrupted, the folder holds the earlier weights, the new ones,
    or a set that loading refuses; never a mixture that loads.

    Raises:
        ValueError: a parameter is on the meta device or of a dtype safetensors does not have, or
            ``max_shard_bytes`` is not positive.
        OSError: the folder cannot be written.
    """
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: expected a positive number, got {max_shard_bytes}")
    tensors = unmerged_state_dict(model)
    for name, tensor in tensors.items():
        if tensor.is_meta or tensor.dtype not in DTYPE_NAMES:
            raise ValueError(f"{name}: cannot be saved from {tensor.device} as {tensor.dtype}")
    if HEAD in tensors and tensors[HEAD].is_set_to(tensors[embedding_name(tensors)]):
        del tensors[HEAD]
    tensors = {saved_name(name, model): tensor for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards = _split_into_shards(tensors, max_shard_bytes)
    files = [WEIGHTS_NAME]
    if len(shards) > 1:
        total = f"of-{len(shards):05d}.safetensors"
        files = [f"model-{number:05d}-{total}" for number in range(1, len(shards) + 1)]
    try:
        for file, shard in zip(files, shards, strict=True):
            write_safetensors(_partial(folder / file), shard)
        if len(shards) > 1:
            _write_index(_partial(folder / INDEX_NAME), files, shards)
            # Without an index, no shard is loaded while they are exchanged one by one.
            (folder / INDEX_NAME).unlink(missing_ok=True)
            files.append(INDEX_NAME)
        for file in files:
            os.replace(_partial(folder / file), folder / file)
    finally:
        for file in files:
            _partial(folder / file).unlink(missing_ok=True)
    for path in folder.iterdir():
        if _OURS.fullmatch(path.name) and path.name not in files:
            path.unlink()


def _partial(path: Path) -> Path:
    """The name a file has until it is complete."""
    return path.with_name(f"{path.name}.partial")


def _split_into_shards(
    tensors: Mapping[str, Tensor], max_shard_bytes: int
) -> list[dict[str, Tensor]]:
    """Consecutive tensors, as many to a shard as fit; one larger than the limit stands alone."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used = 0
        shards[-1][name] = tensor
        used += tensor.nbytes
    return shards


def _write_index(path: Path, files: list[str], shards: list[dict[str, Tensor]]) -> None:
    tensors = [tensor for shard in shards for tensor in shard.values()]
    index = {
        "metadata": {
            "total_size": sum(tensor.nbytes for tensor in tensors),
            "total_parameters": sum(tensor.numel() for tensor in tensors),
        },
        "weight_map": {
            name: file for file, shard in zip(files, shards, strict=True) for name in sorted(shard)
        },
    }
    path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file, chunk by chunk from whatever device they are on.

    Raises:
        OSError: the file cannot be written.
    """
    # Wide dtypes first keeps every tensor aligned to its own element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        tensor = tensors[name]
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.nbytes],
        }
        position += tensor.nbytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            flat = tensors[name].detach().reshape(-1)
            step = CHUNK_BYTES // flat.element_size()
            for start in range(0, flat.numel(), step):
                chunk = flat[start : start + step].cpu().view(torch.uint8)
                file.write(chunk.numpy().data)


def write_json(path: Path, content: Any) -> None:
    """Write a file of settings, keys sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
