"""Loading and saving checkpoints: every tensor in its place, bit for bit, and within the memory."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
import transformers
from exafuse import CheckpointError, DoesNotFitError, memory, weights
from exafuse.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from exafuse.safetensors_file import CHUNK_BYTES, write_safetensors

FAMILIES = list(files.VARIANTS)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(
            actual[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)
        ), name


def without_tied_head(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    state = weights.unmerged_state_dict(model)
    if model.config.tie_word_embeddings:
        assert state.pop("lm_head.weight") is not None
    return state


# --------------------------------------------------------------------------------------- round trip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shard", ["1GB", "60KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_byte_equal(tmp_path: Path, family, shard, tied, dtype) -> None:
    source, saved = tmp_path / "source", tmp_path / "saved"
    hf = files.make(source, family, shard, DTYPES[dtype], tie_word_embeddings=tied)
    assert ((source / INDEX_NAME).exists()) == (shard == "60KB")
    original = files.read(source)
    assert ("lm_head.weight" in original) == (not tied)

    model = files.load(source)
    assert model.dtype == DTYPES[dtype]
    assert_same(without_tied_head(model), original)

    weights.save_weights(model, saved, max_shard_bytes=60_000 if shard == "60KB" else 10**9)
    assert ((saved / INDEX_NAME).exists()) == (shard == "60KB")
    assert_same(files.read(saved), original)
    shutil.copy(source / "config.json", saved)
    again = type(hf).from_pretrained(saved, dtype=DTYPES[dtype])
    expected = {n: t for n, t in hf.state_dict().items() if "rotary" not in n}
    assert_same(again.state_dict(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_lands_in_its_place(tmp_path: Path, family: str) -> None:
    files.make(tmp_path, family)
    state = files.read(tmp_path)
    # A different constant in each tensor: k_norm in q_norm's place, or v's rows in k's, would show.
    value = {name: float(1 + index) for index, name in enumerate(sorted(state))}
    files.write(tmp_path, {name: torch.full_like(t, value[name]) for name, t in state.items()})
    model = files.load(tmp_path)
    parts = {
        "qkv_proj": [
            ("q_proj", "num_heads"),
            ("k_proj", "num_kv_heads"),
            ("v_proj", "num_kv_heads"),
        ],
        "gate_up_proj": [("gate_proj", None), ("up_proj", None)],
    }
    seen = set()
    for name, parameter in model.named_parameters():
        merged = name.split(".")[-2]
        start = 0
        for part, heads in parts.get(merged, [(merged, None)]):
            source = name.replace(merged, part)
            rows = len(parameter) // len(parts.get(merged, [0]))
            if heads is not None:
                rows = getattr(model.config, heads) * model.config.head_dim
            assert torch.equal(
                parameter[start : start + rows], torch.full_like(state[source], value[source])
            ), source
            start += rows
            seen.add(source)
        assert start == len(parameter), name
    assert seen == state.keys()


def test_tensors_may_lie_in_any_order_and_any_shard(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    rng = random.Random(5)
    names = list(state)
    rng.shuffle(names)
    weight_map = {name: f"part-{rng.randint(1, 3)}.safetensors" for name in names}
    for shard in set(weight_map.values()):
        write_safetensors(tmp_path / shard, {n: state[n] for n in names if weight_map[n] == shard})
    files.write_index(tmp_path, weight_map, metadata={"total_size": 1})
    assert_same(without_tied_head(files.load(tmp_path)), state)


# --------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dropped_tensor_is_named(tmp_path: Path, family: str) -> None:
    files.make(tmp_path, family)
    state = files.read(tmp_path)
    for name in state:
        files.write(tmp_path, {other: t for other, t in state.items() if other != name})
        message = files.refused(tmp_path, "1 tensors are missing", repr(name))
        assert ("tie_word_embeddings is false" in message) == (name == "lm_head.weight")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_scale",
        "model.layers.4.mlp.down_proj.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.qkv_proj.weight",
        "lm_head.bias",
        "model.lm_head.weight",
        "score.weight",
        "rotary_emb.inv_freq.weight",
        "model.model.norm.weight",
    ],
)
def test_an_added_tensor_is_named(tmp_path: Path, name: str) -> None:
    files.make(tmp_path)
    files.write(tmp_path, {**files.read(tmp_path), name: torch.zeros(3)})
    files.refused(tmp_path, "1 tensors are unexpected", repr(name))


def test_a_renamed_tensor_is_missing_and_unexpected(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    state["model.layers.1.self_attn.q_normal.weight"] = state.pop(
        "model.layers.1.self_attn.q_norm.weight"
    )
    files.write(tmp_path, state)
    files.refused(tmp_path, "'model.layers.1.self_attn.q_norm.weight'", "q_normal")


def test_at_most_five_names_are_listed(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    dropped = sorted(name for name in state if "layers.2." in name)
    for name in dropped:
        state[f"{name}.{'x' * 5000}\n\x1b[31m"] = state.pop(name)
    files.write(tmp_path, state)
    message = files.refused(tmp_path, f"{len(dropped)} tensors are missing", "and 6 more")
    assert sum(name in message.split("unexpected")[0] for name in dropped) == 5
    assert "\x1b" not in message
    assert "\n" not in message


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misshapen_tensor_is_named(tmp_path: Path, family: str) -> None:
    files.make(tmp_path, family)
    state = files.read(tmp_path)
    for name, tensor in state.items():
        longer = torch.cat([tensor, tensor[:1]])
        files.write(tmp_path, {**state, name: longer})
        files.refused(tmp_path, repr(name), f"got {list(longer.shape)}", str(list(tensor.shape)))
    name = "model.layers.0.mlp.down_proj.weight"
    for wrong in (state[name].T, state[name].flatten(), state[name][None], torch.zeros(())):
        files.write(tmp_path, {**state, name: wrong})
        files.refused(tmp_path, repr(name), f"got {list(wrong.shape)}")


def test_heads_cannot_be_moved_between_q_and_k(tmp_path: Path) -> None:
    """Rows that add up to the merged matrix are not enough: each part has its own count."""
    files.make(tmp_path)
    state = files.read(tmp_path)
    q, k = (f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")
    both = torch.cat([state[q], state[k]])
    files.write(tmp_path, {**state, q: both[:48], k: both[48:]})
    files.refused(tmp_path, "2 tensors have another shape", q, k)


def test_rotary_tables_and_mtp_are_left_out(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "model.rotary_emb.inv_freq": torch.ones(8),
        "mtp.fc.weight": torch.full((64, 128), torch.nan, dtype=torch.float16),
    }
    files.write(tmp_path, {**state, **extra})
    assert_same(without_tied_head(files.load(tmp_path, check_finite=True)), state)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_backbone_prefixes(tmp_path: Path, prefix: str) -> None:
    files.make(tmp_path, "llama")
    state = files.read(tmp_path)
    renamed = {
        prefix + n.removeprefix("model.") if n.startswith("model.") else n: t
        for n, t in state.items()
    }
    assert renamed.keys() != state.keys()
    files.write(tmp_path, renamed)
    assert_same(without_tied_head(files.load(tmp_path)), state)
    # The message uses the file's own spelling for what is wrong with the file.
    files.write(tmp_path, {**renamed, f"{prefix}norm.weight": torch.zeros(3)})
    files.refused(tmp_path, f"'{prefix}norm.weight'", "got [3]")


def test_mixed_prefixes_are_refused(tmp_path: Path) -> None:
    files.make(tmp_path, "llama")
    state = files.read(tmp_path)
    # Either of the two could be the one that is meant.
    files.write(tmp_path, {**state, "norm.weight": state["model.norm.weight"] + 1})
    files.refused(tmp_path, "expected one prefix", "'norm.weight'")


# ------------------------------------------------------------------------------------- tied weights


def test_tied_head_is_the_embedding_itself(tmp_path: Path) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    model = files.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_tied_with_an_equal_head_in_the_file(tmp_path: Path, recwarn) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    files.write(tmp_path, {**state, "lm_head.weight": state["model.embed_tokens.weight"]})
    model = files.load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not recwarn.list
    weights.save_weights(model, tmp_path / "saved")
    assert_same(files.read(tmp_path / "saved"), state)


def test_tied_with_another_head_in_the_file(tmp_path: Path) -> None:
    hf = files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    head = state["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1  # the last value of all
    files.write(tmp_path, {**state, "lm_head.weight": head})
    with pytest.warns(UserWarning, match="tie_word_embeddings is true"):
        model = files.load(tmp_path)
    assert torch.equal(model.lm_head.weight, head)
    assert_same(weights.unmerged_state_dict(model), files.read(tmp_path))
    theirs = type(hf).from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, head)
    weights.save_weights(model, tmp_path / "saved")
    assert_same(files.read(tmp_path / "saved"), files.read(tmp_path))


def test_tied_without_an_embedding(tmp_path: Path) -> None:
    files.make(tmp_path, "qwen2", tie_word_embeddings=True)
    state = files.read(tmp_path)
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    files.write(tmp_path, state)
    files.refused(tmp_path, "1 tensors are missing: 'model.embed_tokens.weight'")


# ------------------------------------------------------------------------------------------- dtypes


@pytest.mark.parametrize("wanted", ["auto", None, "float32", "float16", "bfloat16", torch.float16])
@pytest.mark.parametrize("stored", DTYPES)
def test_casts(tmp_path: Path, stored: str, wanted) -> None:
    files.make(tmp_path)
    state = {name: t.to(DTYPES[stored]) for name, t in files.read(tmp_path).items()}
    files.write(tmp_path, state)
    model = files.load(tmp_path, dtype=wanted)
    if wanted in ("auto", None):
        target = DTYPES[stored]
    else:
        target = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    assert_same(without_tied_head(model), {name: t.to(target) for name, t in state.items()})
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_casts_of_tensors_longer_than_a_chunk(tmp_path: Path) -> None:
    count = CHUNK_BYTES // 4 * 2 + 12345
    values = torch.arange(count, dtype=torch.float32)
    write_safetensors(tmp_path / WEIGHTS_NAME, {"a": torch.ones(3), "x": values})
    checkpoint = Checkpoint.open(tmp_path)
    assert torch.equal(checkpoint.read("x"), values)
    out = torch.empty(count, dtype=torch.bfloat16)
    with checkpoint.open_shard(WEIGHTS_NAME) as shard:
        shard.read_into(checkpoint.tensors["x"], out)
    assert torch.equal(out, values.to(torch.bfloat16))


def test_mixed_dtypes_need_an_explicit_one(tmp_path: Path) -> None:
    files.make(tmp_path, max_shard_size="60KB")
    state = files.read(tmp_path)
    mixed = {n: t.bfloat16() if "proj" in n else t for n, t in state.items()}
    files.write(tmp_path, mixed)
    files.refused(tmp_path, "dtype 'auto'", "is F32", "is BF16", "dtype='bfloat16'")
    model = files.load(tmp_path, dtype="bfloat16")
    assert_same(without_tied_head(model), {n: t.bfloat16() for n, t in state.items()})


@pytest.mark.parametrize(
    "stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.float64]
)
def test_other_dtypes_are_refused(tmp_path: Path, stored: torch.dtype) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    files.write(tmp_path, {**state, name: state[name].to(stored)})
    for dtype in ("auto", "bfloat16"):
        files.refused(tmp_path, WEIGHTS_NAME, name, "expected F32, F16 or BF16", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float64", "int8", "half-precision", "nn", torch.int32, 16])
def test_unknown_dtype_argument(tmp_path: Path, dtype) -> None:
    files.make(tmp_path)
    with pytest.raises(ValueError, match="dtype: expected 'auto'"):
        files.load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.self_attn.v_proj.weight"])
def test_check_finite_names_the_tensor(tmp_path: Path, name: str, bad: float) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    state[name][-1, -1] = bad
    files.write(tmp_path, state)
    files.refused(tmp_path, WEIGHTS_NAME, name, "NaN or Inf", check_finite=True)
    assert_same(without_tied_head(files.load(tmp_path)), state)


def test_check_finite_sees_an_overflow_of_the_cast(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    state["model.norm.weight"][7] = 1e6
    files.write(tmp_path, state)
    files.load(tmp_path, check_finite=True)
    words = ("'model.norm.weight'", "torch.float16")
    files.refused(tmp_path, *words, dtype="float16", check_finite=True)


# ------------------------------------------------------------------------------------------- memory

RSS_SCRIPT = """
import sys
from pathlib import Path
import checkpoint_files as files
folder = Path(sys.argv[1])
files.load(folder.parent / "tiny")
for dtype in sys.argv[2:]:
    before = files.reset_peak_rss()
    model = files.load(folder, dtype=dtype)
    print(files.peak_rss() - before, sum(p.nbytes for p in model.parameters()))
    del model
"""


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
    monkeypatch.setattr("exafuse.checkpoint.read_tensor", lambda *a, **k: read.append(a))
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


# --------------------------------------------------------------------------------------- truncation


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
        loaded = without_tied_head(model)
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


# ------------------------------------------------------------------------------------------- saving


def test_shards_and_index_of_a_save(tmp_path: Path) -> None:
    files.make(tmp_path)
    model = files.load(tmp_path)
    state = without_tied_head(model)
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
    assert_same(without_tied_head(files.load(out)), files.read(tmp_path))


def test_saving_over_the_source(tmp_path: Path) -> None:
    files.make(tmp_path, max_shard_size="60KB")
    before = files.read(tmp_path)
    weights.save_weights(files.load(tmp_path), tmp_path)
    assert_same(files.read(tmp_path), before)


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


# ---------------------------------------------------------------------------------------------- GPU


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", ["auto", "bfloat16"])
def test_load_to_and_save_from_a_gpu(tmp_path: Path, wanted: str) -> None:
    files.make(tmp_path, max_shard_size="60KB")
    state = files.read(tmp_path)
    model = files.load(tmp_path, device="cuda", dtype=wanted, check_finite=True)
    assert model.device.type == "cuda"
    weights.save_weights(model, tmp_path / "out", max_shard_bytes=60_000)
    dtype = torch.bfloat16 if wanted == "bfloat16" else torch.float32
    assert_same(files.read(tmp_path / "out"), {name: t.to(dtype) for name, t in state.items()})
    free = memory.free_bytes(torch.device("cuda"))
    with pytest.raises(DoesNotFitError, match="on cuda"):
        memory.check_fits(free + 2**33, "cuda", "a test")
