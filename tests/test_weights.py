"""Loading checkpoints: every tensor in its place, bit for bit, in the dtype that is asked for."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import checkpoint_files as files
import pytest
import torch
from exafuse import DoesNotFitError
from exafuse.weights import loading as weights
from exafuse.weights import memory
from exafuse.weights.checkpoint import INDEX_NAME, WEIGHTS_NAME, Checkpoint
from exafuse.weights.safetensors_file import CHUNK_BYTES
from exafuse.weights.saving import write_safetensors

FAMILIES = list(files.VARIANTS)
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    files.assert_same(files.without_tied_head(model), original)

    weights.save_weights(model, saved, max_shard_bytes=60_000 if shard == "60KB" else 10**9)
    assert ((saved / INDEX_NAME).exists()) == (shard == "60KB")
    files.assert_same(files.read(saved), original)
    shutil.copy(source / "config.json", saved)
    again = type(hf).from_pretrained(saved, dtype=DTYPES[dtype])
    expected = {n: t for n, t in hf.state_dict().items() if "rotary" not in n}
    files.assert_same(again.state_dict(), expected)


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
    files.assert_same(files.without_tied_head(files.load(tmp_path)), state)


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
    expected = {name: t.to(target) for name, t in state.items()}
    files.assert_same(files.without_tied_head(model), expected)
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
    files.assert_same(files.without_tied_head(model), {n: t.bfloat16() for n, t in state.items()})


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
    files.assert_same(files.without_tied_head(files.load(tmp_path)), state)


def test_check_finite_sees_an_overflow_of_the_cast(tmp_path: Path) -> None:
    files.make(tmp_path)
    state = files.read(tmp_path)
    state["model.norm.weight"][7] = 1e6
    files.write(tmp_path, state)
    files.load(tmp_path, check_finite=True)
    words = ("'model.norm.weight'", "torch.float16")
    files.refused(tmp_path, *words, dtype="float16", check_finite=True)


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
    expected = {name: t.to(dtype) for name, t in state.items()}
    files.assert_same(files.read(tmp_path / "out"), expected)
    free = memory.free_bytes(torch.device("cuda"))
    with pytest.raises(DoesNotFitError, match="on cuda"):
        memory.check_fits(free + 2**33, "cuda", "a test")
