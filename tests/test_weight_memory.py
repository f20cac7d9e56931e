"""What loading takes: memory within its bounds, refusal before it is too late, a progress bar."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from exafuse import CheckpointError, DoesNotFitError
from exafuse.weights import loading as weights
from exafuse.weights import memory
from exafuse.weights.checkpoint import Checkpoint
from exafuse.weights.safetensors_file import CHUNK_BYTES

RSS_SCRIPT = """
import sys
from pathlib import Path
import checkpoint_files as files
import load_guard
folder = Path(sys.argv[1])
files.load(folder.parent / "tiny")
for dtype in sys.argv[2:]:
    before = load_guard.reset_peak_rss()
    model = files.load(folder, dtype=dtype)
    print(load_guard.peak_rss() - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


@pytest.mark.slow
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "vocab_size": 4096}
    files.make(tmp_path / "tiny", "llama")
    (tmp_path / "big").mkdir()
    config = json.loads((tmp_path / "tiny/config.json").read_text())
    (tmp_path / "big/config.json").write_text(json.dumps({**config, **sizes}))
    big = files.empty_model(tmp_path / "big").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in big.parameters():
            parameter.fill_(0.5)
    weights.save_weights(big, tmp_path / "big", max_shard_bytes=40_000_000)
    del big
    assert len(Checkpoint.open(tmp_path / "big").files) >= 3
    printed = subprocess.run(
        [sys.executable, "-c", RSS_SCRIPT, str(tmp_path / "big"), "bfloat16", "float32"],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        text=True,
    ).stdout.splitlines()
    assert len(printed) == 2
    for line in printed:
        grown, model_bytes = map(int, line.split())
        assert model_bytes > 50e6
        # One chunk for the cast, and what the allocator rounds up: far below a shard.
        assert grown <= model_bytes + 2 * CHUNK_BYTES, f"{grown} for {model_bytes}"


def test_does_not_fit_before_the_first_tensor_is_read(tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path)
    needed = sum(t.nbytes for t in files.read(tmp_path).values())
    read = []
    monkeypatch.setattr("exafuse.weights.checkpoint.read_tensor", lambda *a, **k: read.append(a))
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed - 1)
    size = f"{needed / 2**20:.1f}"
    with pytest.raises(
        DoesNotFitError, match=f"needs {size} MiB on cpu, {size} MiB are f"
    ) as caught:
        files.load(tmp_path)
    for way_out in ("bfloat16", "device_map", "context"):
        assert way_out in str(caught.value)
    assert not read
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed)
    files.load(tmp_path)
    assert read


def test_free_memory_of_the_machine() -> None:
    free = memory.free_bytes(torch.device("cpu"))
    assert free is not None
    assert 2**24 < free < 2**50
    memory.check_fits(free // 2, "cpu", "a test")
    with pytest.raises(DoesNotFitError, match=r"a test: needs .* GiB on cpu"):
        memory.check_fits(2**60, "cpu", "a test")
    assert memory.free_bytes(torch.device("meta")) is None


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_the_memory(tmp_path: Path, version: int) -> None:
    limit, used, reclaim = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        if version == 1
        else ("memory.max", "memory.current", "inactive_file")
    )
    root = tmp_path / "cgroup" / ("memory" if version == 1 else "")
    (tmp_path / "self").mkdir()
    line = "4:cpu,memory:/outer/inner\n9:name=x:/\n" if version == 1 else "0::/outer/inner\n"
    (tmp_path / "self/cgroup").write_text(line)

    def group(path: str, limit_text: str, used_bytes: int, reclaimable: int) -> None:
        (root / path).mkdir(parents=True, exist_ok=True)
        (root / path / limit).write_text(limit_text + "\n")
        (root / path / used).write_text(f"{used_bytes}\n")
        (root / path / "memory.stat").write_text(f"cache 5\n{reclaim} {reclaimable}\n")

    def available() -> list[int]:
        return list(memory._available_in_control_groups(tmp_path, tmp_path / "cgroup"))

    assert available() == []  # the group's files are not to be seen
    group("outer/inner", "max" if version == 2 else str(2**63 - 4096), 10**9, 0)
    assert available() == []
    group("outer", "1000000", 400000, 100000)
    assert available() == [700000]
    group("outer/inner", "500000", 600000, 0)
    assert available() == [0, 700000]


def test_progress_bar_only_on_a_terminal(tmp_path: Path, monkeypatch, capsys) -> None:
    files.make(tmp_path)
    capsys.readouterr()
    files.load(tmp_path, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    files.load(tmp_path, progress=False)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    files.load(tmp_path, progress=True)
    shown = capsys.readouterr().err
    assert "Loading weights: 100%" in shown
    total = sum(tensor.nbytes for tensor in files.read(tmp_path).values())
    assert f"{total / 1000:.0f}k/{total / 1000:.0f}k" in shown


def test_a_failed_load_leaves_the_model_as_it_was(tmp_path: Path, monkeypatch) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    before = dict(model.named_parameters())
    state = files.read(tmp_path)
    state["model.norm.weight"][0] = torch.nan
    files.write(tmp_path, state)
    with pytest.raises(CheckpointError, match="NaN"):
        weights.load_weights(model, tmp_path, tie_word_embeddings=False, check_finite=True)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
