"""Indexes that contradict their shards, and folders with pickles or code in them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import checkpoint_files as files
import exafuse
import pytest
from exafuse import CheckpointError
from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from exafuse.weights.safetensors_file import JSON_LIMIT_BYTES, JSON_LIMIT_VALUES
from load_guard import guarded
from safetensors.torch import load, save_file

NORM = "model.norm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A good checkpoint in a single file."""
    return files.warmed(tmp_path / "checkpoint")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A good checkpoint in several shards."""
    return files.warmed(tmp_path / "checkpoint", max_shard_size="60KB")


def read_index(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX_NAME).read_text())["weight_map"]


def test_index_names_a_tensor_that_no_shard_holds(sharded: Path) -> None:
    weight_map = read_index(sharded)
    shard = weight_map[NORM]
    files.write_index(sharded, weight_map | {f"extra.{n}": shard for n in range(7)})
    files.refused(sharded, INDEX_NAME, "7 tensors are not in the shard", "'extra.4' and 2 more")


def test_index_names_the_wrong_shard(sharded: Path) -> None:
    weight_map = read_index(sharded)
    other = next(shard for shard in weight_map.values() if shard != weight_map[NORM])
    files.write_index(sharded, weight_map | {NORM: other})
    files.refused(sharded, INDEX_NAME, "1 tensors are not in the shard", repr(NORM))


def test_shards_hold_tensors_that_the_index_does_not_name(sharded: Path) -> None:
    weight_map = read_index(sharded)
    del weight_map[NORM]
    files.write_index(sharded, weight_map)
    files.refused(sharded, INDEX_NAME, "1 tensors that it does not name", repr(NORM))


def test_a_tensor_in_two_shards(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    names = list(load(first.read_bytes()))
    both = load(first.read_bytes()) | load(second.read_bytes())
    save_file(both, second)
    files.refused(sharded, second.name, "another shard also holds", repr(sorted(names)[0])[:20])


def test_a_missing_shard(sharded: Path) -> None:
    path = sorted(sharded.glob("*.safetensors"))[2]
    path.unlink()
    files.refused(sharded, path.name, "is missing")


def test_two_shards_swapped(sharded: Path) -> None:
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    first.rename(sharded / "x")
    second.rename(first)
    (sharded / "x").rename(second)
    files.refused(sharded, INDEX_NAME, "not in the shard it names")


@pytest.mark.slow
def test_index_of_a_million_tensors(folder: Path) -> None:
    weight_map = {f"t{n}": WEIGHTS_NAME for n in range(1_000_000)}
    files.write_index(folder, weight_map)
    files.refused(folder, INDEX_NAME, f"at most {JSON_LIMIT_BYTES} are read")
    short = {f"{n:x}": "a" for n in range(JSON_LIMIT_VALUES // 2 + 1)}
    (folder / INDEX_NAME).write_text(json.dumps({"weight_map": short}, separators=(",", ":")))
    files.refused(folder, INDEX_NAME, f"at most {JSON_LIMIT_VALUES} are read")


@pytest.mark.parametrize(
    "index",
    [
        {},
        {"metadata": {}},
        {"weight_map": {}},
        {"weight_map": []},
        {"weight_map": None},
        [],
        "x",
        1,
    ],
)
def test_index_without_a_weight_map(folder: Path, index: Any) -> None:
    (folder / INDEX_NAME).write_text(json.dumps(index))
    files.refused(folder, INDEX_NAME, "weight_map")


@pytest.mark.parametrize("fault", files.JSON_FAULTS)
def test_index_that_is_no_json_object(folder: Path, fault: str) -> None:
    (folder / INDEX_NAME).write_bytes(files.JSON_FAULTS[fault])
    files.refused(folder, INDEX_NAME)


def test_index_with_a_tensor_named_twice(sharded: Path) -> None:
    text = (sharded / INDEX_NAME).read_text()
    line = f'"{NORM}": "{read_index(sharded)[NORM]}"'
    (sharded / INDEX_NAME).write_text(text.replace(line, f"{line}, {line}"))
    files.refused(sharded, INDEX_NAME, NORM, "twice")


def test_index_beside_a_single_file_of_another_save(sharded: Path) -> None:
    shutil.copy(next(sharded.glob("*.safetensors")), sharded / WEIGHTS_NAME)
    files.refused(sharded, WEIGHTS_NAME, INDEX_NAME, "remove the one")


def test_index_that_names_the_single_file(folder: Path) -> None:
    files.write_index(folder, dict.fromkeys(files.read(folder), WEIGHTS_NAME))
    with guarded(folder):
        files.load(folder)


# ------------------------------------------------------------------------ pickles, code and nothing


class Trap:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".BIN"])
def test_pickles_are_never_opened(folder: Path, suffix: str) -> None:
    sprung = folder.parent / "sprung"
    pickled = pickle.dumps({"model.norm.weight": Trap(sprung)})
    for stem in ("pytorch_model", "consolidated.00", "model", "optimizer", "training_args"):
        (folder / f"{stem}{suffix}").write_bytes(pickled)
    (folder / "pytorch_model.bin.index.json").write_text("{}")
    with guarded(folder):
        files.load(folder)  # beside safetensors they are of no interest
    files.write_index(folder, dict.fromkeys(files.read(folder), f"model{suffix}"))
    files.refused(folder, INDEX_NAME, f"'model{suffix}' is a pickle file", "save_pretrained")
    (folder / INDEX_NAME).unlink()
    (folder / WEIGHTS_NAME).unlink()
    files.refused(folder, f"consolidated.00{suffix}", "never opens pickle", "use_safetensors=False")
    # A pickle under the right name is no safetensors file.
    (folder / WEIGHTS_NAME).write_bytes(pickled)
    files.refused(folder, WEIGHTS_NAME, "header")
    assert not sprung.exists()


CODE_KEYS = {
    "auto_map": {"AutoConfig": "configuration.Config", "AutoModelForCausalLM": "modeling.Model"},
    "_attn_implementation_internal": "owner/kernel",
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel:function",
    "trust_remote_code": True,
    "custom_pipelines": {"run": {"impl": "modeling.Run", "pt": ["AutoModel"]}},
    "_name_or_path": "../../modeling",
    "transformers_weights": "pytorch_model.bin",
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_code_in_the_folder_is_never_run(folder: Path) -> None:
    """Whatever a config says about code, loading opens only configs and weights, runs nothing."""
    sprung = folder.parent / "sprung"
    code = f"open({str(sprung)!r}, 'w')"
    for name in ("modeling", "configuration", "torch", "tqdm", "json", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(code)
    config = json.loads((folder / "config.json").read_text())
    exafuse.from_pretrained(folder, device="cpu")
    here = os.getcwd()
    os.chdir(folder)
    try:
        for key, value in CODE_KEYS.items():
            (folder / "config.json").write_text(json.dumps({**config, key: value}))
            with guarded(folder) as opened:
                exafuse.from_pretrained(folder, device="cpu")
            names = {os.path.basename(path) for path in opened if str(folder) in path}
            assert names == {"config.json", "generation_config.json", WEIGHTS_NAME}
    finally:
        os.chdir(here)
    assert not sprung.exists()


def test_folders_without_weights(folder: Path, tmp_path: Path) -> None:
    path = folder / WEIGHTS_NAME
    path.rename(folder / "weights.safetensors")
    files.refused(folder, WEIGHTS_NAME, INDEX_NAME, "got only 'weights.safetensors'")
    (folder / "weights.safetensors").unlink()
    files.refused(folder, WEIGHTS_NAME, INDEX_NAME, "there is neither")
    for wrong in (tmp_path / "nowhere", folder / "config.json", Path("a\0b")):
        with pytest.raises(CheckpointError, match="expected a checkpoint folder"):
            Checkpoint.open(wrong)


def test_an_unreadable_file(folder: Path, monkeypatch) -> None:
    def denied(*args: object, **kwargs: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("exafuse.weights.checkpoint.os.open", denied)
    with pytest.raises(CheckpointError, match=r"safetensors: cannot be opened: Permission denied"):
        Checkpoint.open(folder)
