"""Weight files cut short, with flipped bits, or changed while they are read."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
from exafuse import CheckpointError
from exafuse.weights import loading as weights
from exafuse.weights.checkpoint import WEIGHTS_NAME, Checkpoint

pytestmark = pytest.mark.slow  # thousands of loads


def truncated_loads(folder: Path, path: Path, sizes: list[int]) -> None:
    """Cut a file to each size in turn; every load must end in our exception."""
    whole = path.read_bytes()
    for size in sizes:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=path.name):
            Checkpoint.open(folder)
    path.write_bytes(whole)
    Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("family", "shard", "tied"),
    [
        ("llama", "1GB", False),
        ("qwen2", "1GB", True),
        ("exaone4", "1GB", False),
        ("exaone4", "60KB", False),
        ("llama", "60KB", True),
    ],
)
def test_truncation_at_every_header_byte_and_percent(tmp_path: Path, family, shard, tied) -> None:
    files.make(tmp_path, family, shard, tie_word_embeddings=tied)
    path = sorted(tmp_path.glob("*.safetensors"))[-1]
    header_end = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    size = path.stat().st_size
    steps = {header_end + (size - header_end) * percent // 100 for percent in range(100)}
    truncated_loads(tmp_path, path, [*range(header_end), *sorted(steps), size - 1])


def test_flipped_bits_fail_cleanly_or_change_no_other_tensor(tmp_path: Path) -> None:
    """A damaged header is an error, or harmless; a damaged value stays in its own tensor."""
    files.make(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    whole, state = path.read_bytes(), files.read(tmp_path)
    header_end = 8 + int.from_bytes(whole[:8], "little")
    model = files.load(tmp_path)
    rng = random.Random(1)
    refusals = 0
    for trial in range(3000):
        damaged = bytearray(whole)
        end = header_end if trial % 10 else len(whole)
        damaged[rng.randrange(end)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            weights.load_weights(model, tmp_path, tie_word_embeddings=False)
        except CheckpointError:
            refusals += 1
            continue
        loaded = files.without_tied_head(model)
        equal = [torch.equal(loaded[name], tensor) for name, tensor in state.items()]
        assert equal.count(False) <= (0 if damaged[:header_end] != whole[:header_end] else 1)
    assert refusals > 2000


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path)
    path = tmp_path / WEIGHTS_NAME
    checkpoint = Checkpoint.open(tmp_path)
    last = max(checkpoint.tensors.values(), key=lambda info: info.offset)
    with checkpoint.open_shard(WEIGHTS_NAME) as shard:
        os.truncate(path, last.offset + 4)
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated while"):
            shard.read_into(last, torch.empty(last.shape))
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        checkpoint.read(last.name)


def test_a_file_that_is_replaced_between_header_and_data(tmp_path: Path) -> None:
    files.make(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    shutil.copy(tmp_path / WEIGHTS_NAME, tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / WEIGHTS_NAME)
    with pytest.raises(CheckpointError, match="changed after its header was read"):
        checkpoint.read("model.norm.weight")
    with pytest.raises(CheckpointError, match=r"there is no tensor 'model\.nrom\.weight'"):
        checkpoint.read("model.nrom.weight")


NASTY = [None, True, -1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64, 0.5, "", "F32", "BF16", [], {}, [0]]


def test_random_damage_to_the_header(tmp_path: Path) -> None:
    """Any value of the header replaced by any nasty one: an error, or the tensors as they were."""
    folder = files.warmed(tmp_path / "checkpoint")
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
