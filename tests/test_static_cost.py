"""The static cost model: counts of the emulator, their record, and a waste that must show."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build, cost, mutation
from emulator.control import Counts
from emulator.cost import Cost

ROOT = Path(__file__).resolve().parent.parent
PREFILL = "flash_attn_func, head_dim 64, 192 causal"


def counted(file, *arguments):
    """The costs that cost.py finds, in a process of its own: the ops choose their path once."""
    program = [sys.executable, str(ROOT / "tests" / "emulator" / "cost.py"), "--json", str(file)]
    done = subprocess.run([*program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {name: Cost(**values) for name, values in json.loads(file.read_text()).items()}


@pytest.fixture(scope="module")
def costs(tmp_path_factory):
    return counted(tmp_path_factory.mktemp("cost") / "cost.json")


@pytest.mark.emulated
def test_no_kernel_costs_more_than_is_on_record(costs):
    record = json.loads(cost.RECORD.read_text())
    assert cost.compare(costs, record) == [], "if it must: python tests/emulator/cost.py --write"
    assert set(record) == set(costs)


@pytest.mark.emulated
def test_counts_reach_the_floors_and_some_kernels_are_there(costs):
    for name, found in costs.items():
        assert found.mma >= found.least_mma, name
        assert found.global_read + found.global_written >= found.least_bytes, name
        assert (found.mma == 0) == (found.least_mma == 0), name
        # Tiles of 64 queries and keys: small cases do at most two or three times their share.
        assert found.mma <= 2.6 * found.least_mma, name
    # Everything is read once and written once, here to the byte: 16 rows of 2 x 512 to 512.
    silu = costs["silu_and_mul, head_dim 64, 16 x 512"]
    assert (silu.global_read, silu.global_written) == (2 * 16 * 512 * 2, 16 * 512 * 2)
    # Whole tiles without a mask leave nothing to waste.
    vision = costs["vision_attn, EXAONE-4.5 vision, 128 in windows of 64"]
    assert vision.mma == vision.least_mma
    # A decode step reads its window, not its context.
    whole = costs["flash_attn_with_kvcache, head_dim 64, batch 1, context 640 causal"]
    window = costs["flash_attn_with_kvcache, head_dim 64, batch 1, context 640 window 64"]
    assert window.global_read < whole.global_read / 8


@pytest.mark.emulated
@pytest.mark.slow
def test_a_planted_waste_is_found(costs, tmp_path):
    """The prefill kernel that fetches every tile of keys but the first twice is right, and late."""
    build.build("plain", target="_C_emulated")
    workshop = mutation.Workshop(tmp_path / "workshop", {})
    again = "ptx::cp_async_wait<0>(); k_own -= kPrefillTileKeys * p.k_strides.row;"
    mutant = mutation.Mutant(
        "kernels/attention/prefill_sm80.cu",
        "keys are loaded twice",
        "load_k(tile + 1);",
        f"load_k(tile + 1); {again} load_k(tile + 1);",
    )
    copy = tmp_path / "workshop" / "csrc" / mutant.file
    copy.write_text(mutation.apply(mutant, copy.read_text()))
    library = workshop.compile(["attention/prefill_sm80"], "plain")
    found = counted(tmp_path / "c.json", "--library", str(library), "--only", PREFILL)
    (reads, copies) = cost.compare(found, {PREFILL: costs[PREFILL]._asdict()})
    assert reads.startswith(f"{PREFILL}: global_read ")
    assert copies.startswith(f"{PREFILL}: shared_written ")
    # 192 keys in tiles of 64: of 1 + 2 + 3 tiles for each head, 0 + 1 + 2 come again.
    tile_bytes = 64 * 64 * 2
    assert found[PREFILL].global_read - costs[PREFILL].global_read == 8 * 3 * tile_bytes
    assert found[PREFILL].mma == costs[PREFILL].mma


def test_comparison_names_what_has_grown():
    known = Cost("k", 100, 1000, 1000, 10, 10, 5, 0, 50, 500)
    record = {"a": known._asdict(), "b": known._asdict()}
    assert cost.compare({"a": known, "b": known._replace(mma=105)}, record) == []
    assert cost.compare({"a": known._replace(mma=106, barriers=6, atomics=1)}, record) == [
        "a: mma 106, on record 100",
        "a: barriers 6, on record 5",
        "a: atomics 1, on record 0",
    ]
    assert cost.compare({"c": known}, record) == ["c: not on record"]
    assert Cost._fields[1:8] == Counts._fields


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("exafuse::(anonymous namespace)::rms_norm_kernel<float, 2>", "rms_norm_kernel"),
        ("void exafuse::combine_kernel<__half>(exafuse::Params)", "combine_kernel"),
    ],
)
def test_names_of_kernels(kernel, name):
    assert cost.short_name(kernel) == name
