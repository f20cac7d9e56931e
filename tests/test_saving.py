"""Saving weights: names, shards, index, and what an interrupted save leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import checkpoint_files as files
import pytest
import torch
import transformers
from exafuse import CheckpointError
from exafuse.models.causal_lm import CausalLM
from exafuse.weights import loading as weights
from exafuse.weights import saving
from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME


def test_shards_and_index_of_a_save(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    state = files.without_tied_head(model)
    weights.save_weights(model, tmp_path / "saved", max_shard_bytes=30_000)
    index = json.loads((tmp_path / "saved" / INDEX_NAME).read_text())
    assert index["metadata"] == {
        "total_size": sum(t.nbytes for t in state.values()),
        "total_parameters": sum(t.numel() for t in state.values()),
    }
    assert index["weight_map"].keys() == state.keys()
    paths = sorted((tmp_path / "saved").glob("*.safetensors"))
    assert [p.name for p in paths] == sorted(set(index["weight_map"].values()))
    assert paths[-1].name == f"model-{len(paths):05d}-of-{len(paths):05d}.safetensors"
    assert len(paths) > 10
    for path in paths:
        header, data = files.split_file(path)
        assert header.pop("__metadata__") == {"format": "pt"}
        assert len(data) <= 30_000
        assert (path.stat().st_size - len(data)) % 8 == 0
        assert all(index["weight_map"][name] == path.name for name in header)
    weights.save_weights(model, tmp_path / "each", max_shard_bytes=1)
    assert len(list((tmp_path / "each").glob("*.safetensors"))) == len(state)


def test_a_save_removes_what_an_earlier_one_left(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    out = tmp_path / "out"
    weights.save_weights(model, out, max_shard_bytes=60_000)
    (out / "adapter.safetensors").write_text("another's")
    weights.save_weights(model, out)
    assert sorted(p.name for p in out.iterdir()) == ["adapter.safetensors", WEIGHTS_NAME]
    weights.save_weights(model, out, max_shard_bytes=100_000)
    names = sorted(p.name for p in out.iterdir())
    assert WEIGHTS_NAME not in names
    assert INDEX_NAME in names
    assert not any("partial" in name for name in names)
    shutil.copy(tmp_path / "config.json", out)
    files.assert_same(files.without_tied_head(files.load(out)), files.read(tmp_path))


def test_a_shard_is_filled_to_the_limit(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    total = sum(t.nbytes for t in files.read(tmp_path).values())
    weights.save_weights(model, tmp_path / "exact", max_shard_bytes=total)
    assert [p.name for p in (tmp_path / "exact").iterdir()] == [WEIGHTS_NAME]
    weights.save_weights(model, tmp_path / "less", max_shard_bytes=total - 1)
    assert len(list((tmp_path / "less").glob("*.safetensors"))) == 2


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path, max_shard_size="60KB")
    model = files.load(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    write = saving.write_safetensors

    def write_half(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        write(path, tensors)
        if "00003" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_safetensors", write_half)
    with pytest.raises(OSError, match="No space left"):
        weights.save_weights(model, tmp_path, max_shard_bytes=50_000)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_saving_over_the_source(tmp_path: Path) -> None:
    files.make(tmp_path, max_shard_size="60KB")
    before = files.read(tmp_path)
    weights.save_weights(files.load(tmp_path), tmp_path)
    files.assert_same(files.read(tmp_path), before)


def test_saving_replaces_a_link_and_not_its_target(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    blob = tmp_path / "blob"
    blob.write_text("shared with others")
    (out / WEIGHTS_NAME).symlink_to(blob)
    weights.save_weights(model, out)
    assert blob.read_text() == "shared with others"
    assert not (out / WEIGHTS_NAME).is_symlink()


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    with pytest.raises(ValueError, match="max_shard_bytes: expected a positive number, got 0"):
        weights.save_weights(model, tmp_path / "out", max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"cannot be saved from meta"):
        weights.save_weights(files.empty_model(tmp_path), tmp_path / "out")
    model.model.norm.weight = torch.nn.Parameter(torch.ones(64, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"model\.norm\.weight: cannot be saved .*complex64"):
        weights.save_weights(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_reads_a_saved_folder_without_complaint(tmp_path: Path) -> None:
    hf = files.make(tmp_path, "exaone4")
    weights.save_weights(files.load(tmp_path), tmp_path / "out", max_shard_bytes=100_000)
    shutil.copy(tmp_path / "config.json", tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(12)[None]
    assert torch.equal(again(ids).logits, hf(ids).logits)


def save_until(
    fatal_step: int, model: CausalLM, out: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> bool:
    """Save, but die at the given renaming or removal of a file; whether it came to that."""
    left = fatal_step
    replace, unlink = os.replace, Path.unlink

    def count_down() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    def counted_replace(*arguments: Any) -> None:
        count_down()
        replace(*arguments)

    def counted_unlink(path: Path, missing_ok: bool = False) -> None:
        count_down()
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr(saving.os, "replace", counted_replace)
        patched.setattr(Path, "unlink", counted_unlink)
        weights.save_weights(model, out, max_shard_bytes=limit)
    return left < 0


EARLIER = {"nothing": None, "single": 10**9, "three shards": 200_000, "more shards": 50_000}


@pytest.mark.parametrize("earlier", EARLIER)
@pytest.mark.parametrize("limit", [10**9, 200_000, 60_000], ids=["single", "three", "many"])
def test_an_interrupted_save_never_leaves_a_mixture(
    tmp_path: Path, monkeypatch, earlier: str, limit: int
) -> None:
    """Killed at any step, the folder holds the earlier weights, the new ones, or is refused."""
    files.make(tmp_path)
    old, new = files.load(tmp_path), files.load(tmp_path)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(1)
    states = {"old": files.without_tied_head(old), "new": files.without_tied_head(new)}
    outcomes = []
    for fatal_step in range(100):
        out = tmp_path / f"out-{fatal_step}"
        if EARLIER[earlier] is not None:
            weights.save_weights(old, out, max_shard_bytes=EARLIER[earlier])
        died = save_until(fatal_step, new, out, limit, monkeypatch)
        shutil.copy(tmp_path / "config.json", out)
        try:
            loaded = files.without_tied_head(files.load(out))
        except CheckpointError:
            outcomes.append("refused")
        else:
            same = (
                which
                for which, state in states.items()
                if all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
            )
            outcomes.append(next(same, "a mixture"))
        if not died:
            break
    assert outcomes[0] == ("old" if EARLIER[earlier] else "refused")
    assert outcomes[-1] == "new"
    assert set(outcomes) <= {"old", "new", "refused"}
    assert not list(out.glob("*.partial"))
