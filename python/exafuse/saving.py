"""Saving a model's weights: one safetensors file, or shards and their index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from exafuse.checkpoint import INDEX_NAME, WEIGHTS_NAME
from exafuse.safetensors_file import DTYPE_NAMES, write_safetensors
from exafuse.weight_names import EMBEDDING, HEAD, unmerged_state_dict

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


def save_weights(model: nn.Module, folder: str | Path, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write the model's weights as transformers would: same names, one file or shards and an index.

    A head that shares the embedding's memory is not written. Files are written under temporary
    names and take their place at the end; weight files of an earlier save that are not part of this
    one are removed. The memory used is one chunk of a few MiB, whatever device the model is on.

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
    if HEAD in tensors and tensors[HEAD].is_set_to(tensors[EMBEDDING]):
        del tensors[HEAD]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)

    shards = _split_into_shards(tensors, max_shard_bytes)
    files = [
        WEIGHTS_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for file, shard in zip(files, shards, strict=True):
        write_safetensors(folder / f"{file}.partial", shard)
    for file in files:
        os.replace(folder / f"{file}.partial", folder / file)
    if len(shards) > 1:
        _write_index(folder, files, shards)
        files.append(INDEX_NAME)
    for path in folder.iterdir():
        ours = path.name in (WEIGHTS_NAME, INDEX_NAME) or _SHARD.fullmatch(path.name)
        if ours and path.name not in files:
            path.unlink()


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


def _write_index(folder: Path, files: list[str], shards: list[dict[str, Tensor]]) -> None:
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
    partial = folder / f"{INDEX_NAME}.partial"
    partial.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, folder / INDEX_NAME)
