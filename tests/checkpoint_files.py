"""Checkpoint folders for the tests of loading: good ones, and the tools to spoil them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import tiny_models
import torch
import transformers
from exafuse import CheckpointError, reference, weights
from exafuse.checkpoint import INDEX_NAME, WEIGHTS_NAME
from exafuse.config import load_config
from exafuse.models.causal_lm import CausalLM
from torch import Tensor

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


# -------------------------------------------------------------------------------------------- guard

ALLOWED_BYTES = 64 * 2**20
_FORBIDDEN = (
    "compile",
    "ctypes.dlopen",
    "exec",
    "marshal.loads",
    "os.exec",
    "os.fork",
    "os.posix_spawn",
    "os.system",
    "pickle.find_class",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
)
_watching: list[tuple[str, Any]] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching is not None and (event in _FORBIDDEN or event in ("open", "import")):
        _watching.append((event, arguments[0] if arguments else None))


# A hook stays for the life of the process; it listens only inside ``guarded``.
sys.addaudithook(_audit)


@contextlib.contextmanager
def guarded(folder: Path, seconds: float = 2.0, blocked_after: float = 20.0) -> Iterator[None]:
    """Fail if the body runs code, opens a file elsewhere, takes too long or too much memory.

    The limit for memory is the size of the folder's files + 64 MiB. Time is the processor's, so
    that a busy machine changes nothing; a body that blocks is interrupted after ``blocked_after``.
    """
    global _watching
    file_bytes = sum(path.lstat().st_size for path in folder.iterdir())
    before = reset_peak_rss()
    tracemalloc.start()
    signal.signal(signal.SIGALRM, _too_slow)
    signal.setitimer(signal.ITIMER_REAL, blocked_after)
    start = time.process_time()
    _watching = []
    try:
        yield
    finally:
        events, _watching = _watching, None
        elapsed = time.process_time() - start
        signal.setitimer(signal.ITIMER_REAL, 0)
        traced = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    resident = peak_rss() - before
    assert elapsed < seconds, f"took {elapsed:.2f} s"
    for what, used in (("traced", traced), ("resident", resident)):
        assert used <= file_bytes + ALLOWED_BYTES, f"{what} memory grew by {used / 2**20:.0f} MiB"
    for event, argument in events:
        assert event not in _FORBIDDEN, f"{event}: {argument!r}"
        if event == "open" and not isinstance(argument, int):
            path = os.fsdecode(argument)
            inside = os.path.dirname(path) == str(folder.resolve())
            assert inside or path.startswith(("/proc/", "/sys/")), f"opened {path}"


def _too_slow(signum: int, frame: object) -> None:
    raise TimeoutError("the reader blocks")


def reset_peak_rss() -> int:
    """Set the kernel's mark of peak resident memory to the present and return it, in bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return peak_rss()


def peak_rss() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def refused(folder: Path, *words: str, **options: Any) -> str:
    """Load under guard, expect a CheckpointError whose text holds all words; return the text."""
    model = empty_model(folder)
    options.setdefault("tie_word_embeddings", model.config.tie_word_embeddings)
    with guarded(folder), pytest.raises(CheckpointError) as caught:
        weights.load_weights(model, folder, **options)
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} not in: {message}"
    assert len(message) < 2000
    assert all(parameter.is_meta for parameter in model.parameters())
    return message
