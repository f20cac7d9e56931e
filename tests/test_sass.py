"""What the compiler made of the kernels, read from the extension itself: nothing lives in local
memory, the attention kernels use the tensor cores, registers are those on record."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import compiled_kernels
import pytest
from compiled_kernels import Kernels
from kernel_backends import Backend, emulated
from shared_memory import dynamic_shared_bytes
from test_build import built_extension

__all__ = ["emulated"]  # a fixture

ROOT = Path(__file__).resolve().parent.parent
KERNEL_FOLDER = ROOT / "csrc" / "kernels"

MAX_BYTES = 40 * 10**6  # of every architecture together; a wheel is no larger

# Instructions that a kernel must hold, by its name "source: kernel<arguments>"; the first pattern
# that matches says. HMMA and HGMMA multiply on the tensor cores, LDSM loads fragments for the
# first; LDGSTS and UTMALDG copy to shared memory while others work, UTMASTG copies from there, and
# SYNCS is a barrier that counts what has arrived.
NEEDED = (
    (r"\S+: (combine|append)\w*_kernel", ()),  # splits are added up, slots are written: no products
    # On Hopper products of a warpgroup and copies of whole boxes take their place.
    (r"prefill_sm90: ", ("HGMMA", "UTMALDG", "UTMASTG", "SYNCS")),
    (r"prefill\w*: ", ("HMMA", "LDSM", "LDGSTS")),
    (r"decode\w*: ", ("HMMA", "LDSM", "LDGSTS")),
    (r"vision_rope: ", ()),  # the rotation of whole frames
    (r"vision\w*: ", ("HMMA", "LDSM")),
    (r"(rms_norm|qk_norm_rope|silu_and_mul)(_backward)?: ", ()),
    (r"sum_partials: ", ()),
)


def needed_by(name: str) -> tuple[str, ...]:
    """The instructions that kernel `name` must hold; a kernel that no pattern knows is an error."""
    for pattern, opcodes in NEEDED:
        if re.match(pattern, name):
            return opcodes
    raise LookupError(f"{name}: say in NEEDED which instructions it must hold")


def findings(kernels: Kernels) -> list[str]:
    """One line for each thing that is wrong with a kernel."""
    found = []
    for arch, of_arch in kernels.items():
        for name, kernel in of_arch.items():
            found += [f"{arch} {name}: {problem}" for problem in kernel.problems()]
            missing = [op for op in needed_by(name) if not kernel.opcodes[op]]
            found += [f"{arch} {name}: no {op}" for op in missing]
    return found


@pytest.fixture(scope="module")
def extension() -> Path:
    named = compiled_kernels.installed_extension()
    return named or built_extension()


@pytest.fixture(scope="module")
def kernels(extension: Path) -> Kernels:
    return read(extension)


def read(binary: Path) -> Kernels:
    try:
        return compiled_kernels.read(binary)
    except compiled_kernels.ToolMissing as error:
        return pytest.skip(str(error))


def test_every_kernel_source_is_there_for_every_architecture(
    extension: Path, kernels: Kernels
) -> None:
    listed = compiled_kernels.listed_archs(extension)
    # Sources that are named for one architecture are compiled for it, listed or not.
    assert set(kernels) == {*listed, "sm_90a"}
    sources = [path for path in KERNEL_FOLDER.rglob("*.cu") if "__global__" in path.read_text()]
    for arch, of_arch in kernels.items():
        compiled = {name.partition(": ")[0] for name in of_arch}
        wanted = {
            path.stem
            for path in sources
            if (arch == "sm_90a" if path.stem.endswith("_sm90") else arch in listed)
        }
        assert compiled == wanted, arch


def test_no_local_memory_and_the_instructions_that_count(kernels: Kernels) -> None:
    assert findings(kernels) == []
    for arch, of_arch in kernels.items():
        registers = max(kernel.registers for kernel in of_arch.values())
        print(f"{arch}: {len(of_arch)} kernels, at most {registers} registers, no spill")


def test_the_extension_stays_small(extension: Path) -> None:
    assert extension.stat().st_size <= MAX_BYTES


def test_registers_and_shared_memory_are_those_on_record(extension: Path, kernels: Kernels) -> None:
    record = json.loads(compiled_kernels.TABLE.read_text())
    compiler = compiled_kernels.compiler_of(extension)
    if compiler != record["compiler"]:
        pytest.skip(f"recorded with nvcc {record['compiler']}, this extension is of {compiler}")
    found = compiled_kernels.table_of(kernels)
    archs = {arch for row in record["kernels"].values() for arch in row} & kernels.keys()
    listed = archs & {*compiled_kernels.listed_archs(extension)}

    def of_archs(rows: dict[str, dict[str, list[int]]], name: str) -> dict[str, list[int]] | None:
        here = archs if name.partition(": ")[0].endswith("_sm90") else listed
        return {a: n for a, n in rows[name].items() if a in here} if name in rows else None

    changed = {}
    for name in sorted(record["kernels"].keys() | found.keys()):
        before, now = of_archs(record["kernels"], name), of_archs(found, name)
        if before != now:
            changed[name] = (before, now)
    assert changed == {}, "after a look at it: python tests/compiled_kernels.py --write"


@pytest.mark.emulated
def test_dynamic_shared_memory_is_that_on_record(emulated: Backend) -> None:
    found = dynamic_shared_bytes()
    record = json.loads(compiled_kernels.TABLE.read_text())
    assert {name: size for name, size in found.items() if size} == record["dynamic shared bytes"]
    # Each kernel on record was launched, and no other.
    assert set(found) == {name.partition(": ")[2] for name in record["kernels"]}


# ---- the gate itself -----------------------------------------------------------------------------

# Far more values than 24 registers hold, an array with an index of the data's, and neither.
PLANTED = """
namespace {
__global__ void __launch_bounds__(1024, 2) spilling_kernel(volatile float* p) {
  float kept[64];
  for (int i = 0; i < 64; ++i) kept[i] = p[threadIdx.x + 1024 * i];
  for (int i = 0; i < 64; ++i) p[threadIdx.x + 1024 * i] = kept[i] * kept[(i * 7 + 3) % 64];
}
__global__ void indexing_kernel(float* p, const int* at) {
  float kept[64] = {};
  for (int i = 0; i < 64; ++i) kept[at[i]] += p[i];
  p[threadIdx.x] = kept[at[threadIdx.x]];
}
template <int kSteps>
__global__ void clean_kernel(float* p) { p[threadIdx.x] *= kSteps; }
}  // namespace
void launch(float* p, int* at) {
  spilling_kernel<<<1, 1024>>>(p);
  indexing_kernel<<<1, 16>>>(p, at);
  clean_kernel<2><<<1, 16>>>(p);
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    folder = tmp_path_factory.mktemp("planted")
    (folder / "decode_planted.cu").write_text(PLANTED)
    subprocess.run(
        [nvcc, "-arch=sm_80", "-c", "-o", "planted.o", "decode_planted.cu"],
        cwd=folder,
        check=True,
    )
    return read(folder / "planted.o")


def test_a_planted_spill_is_seen(planted: Kernels) -> None:
    of_arch = planted["sm_80"]
    assert set(of_arch) == {
        "decode_planted: spilling_kernel",
        "decode_planted: indexing_kernel",
        "decode_planted: clean_kernel<2>",
    }
    for name in ("spilling_kernel", "indexing_kernel"):
        kernel = of_arch[f"decode_planted: {name}"]
        assert kernel.stack > 0
        assert kernel.opcodes["STL"] > 0
        assert kernel.opcodes["LDL"] > 0
    clean = of_arch["decode_planted: clean_kernel<2>"]
    assert clean.problems() == []
    assert clean.opcodes["LDG"] == clean.opcodes["STG"] == 1
    assert of_arch["decode_planted: spilling_kernel"].registers <= 32


def test_the_findings_name_kernel_and_instruction(planted: Kernels) -> None:
    found = findings(planted)
    assert "sm_80 decode_planted: clean_kernel<2>: no HMMA" in found
    assert "sm_80 decode_planted: clean_kernel<2>: no LDGSTS" in found
    assert any(re.match(r"sm_80 decode_planted: spilling_kernel: \d+ STL", line) for line in found)
    assert any(re.match(r".*indexing_kernel: stack \d+ bytes", line) for line in found)


@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("prefill_sm80: prefill_kernel<bf16, 128>", 3),
        ("prefill_sm90: prefill_sm90_kernel<bf16, 128, 128, 176>", 4),
        ("decode: decode_kernel<fp16, 64>", 3),
        ("decode: combine_kernel<fp16>", 0),
        ("vision_attn_window: vision_window_kernel<bf16, 96>", 2),
        ("silu_and_mul: silu_and_mul_kernel<float, 4>", 0),
    ],
)
def test_expectations_go_by_name(name: str, needs: int) -> None:
    assert len(needed_by(name)) == needs


def test_a_kernel_without_expectation_is_refused() -> None:
    with pytest.raises(LookupError, match="NEEDED"):
        needed_by("novel: novel_kernel<float>")
