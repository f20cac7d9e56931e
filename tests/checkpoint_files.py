"""Checkpoint folders for the tests of loading: good ones, and the tools to spoil them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from exafuse import CheckpointError, reference
from exafuse.config import load_config
from exafuse.models.causal_lm import CausalLM
from exafuse.weights import loading as weights
from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME
from exafuse.weights.safetensors_file import JSON_LIMIT_BYTES, JSON_LIMIT_VALUES
from load_guard import guarded
from torch import Tensor, nn

# One variant of each family, with every optional tensor the family knows.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
    "qwen2": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
    "exaone4": {"num_hidden_layers": 4, "sliding_window": 5, "sliding_window_pattern": 4},
}


def make(
    folder: Path,
    family: str = "exaone4",
    max_shard_size: str = "1GB",
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> transformers.PreTrainedModel:
    """A tiny transformers model and its checkpoint in ``folder``."""
    model = tiny_models.build(family, **{**VARIANTS[family], **overrides}).to(dtype)
    tiny_models.save(model, folder, max_shard_size=max_shard_size)
    return model


def read(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in a folder, by the format's own library."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        # From bytes: load_file maps the file, and the tensors would follow when a test rewrites it.
        tensors |= safetensors.torch.load(path.read_bytes())
    return tensors


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replace the weights of a folder by one file with these tensors."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        path.unlink()
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, folder / WEIGHTS_NAME, metadata={"format": "pt"})


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> None:
    """A safetensors file with any header (bytes as they are, else as JSON) and any length field."""
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    stated = len(encoded) if length is None else length
    path.write_bytes(stated.to_bytes(8, "little") + encoded + data)


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_index(folder: Path, weight_map: object, **fields: Any) -> None:
    """An index; ``weight_map`` may be anything."""
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map, **fields}))


def empty_model(folder: Path) -> CausalLM:
    """The folder's model on the meta device."""
    with torch.device("meta"):
        return CausalLM(load_config(folder), reference)


def load(folder: Path, **options: Any) -> CausalLM:
    """The folder's model with its weights, as ``from_pretrained`` loads them."""
    model = empty_model(folder)
    options.setdefault("tie_word_embeddings", model.config.tie_word_embeddings)
    weights.load_weights(model, folder, **options)
    return model


def warmed(folder: Path, **options: Any) -> Path:
    """A good checkpoint, loaded once, so that nothing is imported when it is loaded under guard."""
    make(folder, **options)
    load(folder)
    return folder


def refused(folder: Path, *words: str, **options: Any) -> str:
    """Load under guard, expect a CheckpointError whose text holds all words; return the text."""
    model = empty_model(folder)
    options.setdefault("tie_word_embeddings", model.config.tie_word_embeddings)
    with guarded(folder), pytest.raises(CheckpointError) as caught:
        weights.load_weights(model, folder, **options)
    message = str(caught.value)
    assert str(folder.resolve()) in message
    # The folder's own name holds words of the test's name.
    message = message.replace(str(folder.resolve()), "FOLDER")
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert len(message) < 2000
    assert all(parameter.is_meta for parameter in model.parameters())
    return message


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(
            actual[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def without_tied_head(model: nn.Module) -> dict[str, Tensor]:
    state = weights.unmerged_state_dict(model)
    if model.config.tie_word_embeddings:
        assert state.pop("lm_head.weight") is not None
    return state


# What a header or an index must not be.
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
