"""What nvcc makes of the kernels, as far as it can be read without a GPU: wide accesses stay wide,
nothing lives in local memory, every kernel waits for its predecessor."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
KERNEL_FILES = sorted((CSRC / "kernels").glob("*.cu"))
ENTRY = re.compile(r"^\.visible \.entry (\w+)\(|^\.entry (\w+)\(|^\.weak \.entry (\w+)\(", re.M)
ACCESS = re.compile(r"\b(?:ld|st)\.(?:global|shared|local)[.\w]*")
# Scalars that kernels read one by one: positions and slots.
SCALARS = {"ld.global.nc.s32", "ld.global.nc.s64"}
# Template arguments, mangled, of the kernels that take aligned rows: elements of a vector, or the
# flag itself, last; in rms_norm_backward the flag of a weight follows it.
WIDE = re.compile(
    r"rms_norm_backward_kernelI\w+Lb1ELb[01]EEEv"
    r"|^(?!.*rms_norm_backward).*(?:Li8|fLi4|Lb1)EEEv"
)
# Vectors of 8 bytes.
HALF_WIDE = re.compile(r"heads(?:_backward)?_kernelI\w*(?:bfloat16|half)Li4E(?:Lb[01]E)?Lb1E")
# The kernels with a gradient of the weight, and how a block writes its part of it: once, after all
# its rows, an element at a time. Every row moves in whole vectors there too.
WITH_PARTIALS = re.compile(
    r"rms_norm_backward_kernelI\w+Lb1ELb1EEEv|heads_backward_kernelI\w+Li[48]ELb1ELb1EEEv"
)
PARTIAL_STORES = {"st.global.f32", "st.global.f64"}


def entries(ptx: str) -> dict[str, str]:
    """Each kernel's mangled name and its text."""
    found = list(ENTRY.finditer(ptx))
    ends = [match.start() for match in found[1:]] + [len(ptx)]
    return {
        next(filter(None, match.groups())): ptx[match.start() : end]
        for match, end in zip(found, ends, strict=True)
    }


@pytest.fixture(scope="module", params=KERNEL_FILES, ids=lambda path: path.stem)
def kernels(request: pytest.FixtureRequest) -> dict[str, str]:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on the PATH")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}"),
            *("-gencode", "arch=compute_90,code=compute_90", "-ptx", "-o", "-", request.param),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return entries(done.stdout)


@pytest.mark.slow
def test_aligned_rows_move_in_whole_vectors(kernels: dict[str, str]) -> None:
    checked = 0
    for name, text in kernels.items():
        if not WIDE.search(name):
            continue
        widths = {"v2.u32"} if HALF_WIDE.search(name) else set()
        widths |= {"v4.u32", "v4.f32"}
        scalars = SCALARS | (PARTIAL_STORES if WITH_PARTIALS.search(name) else set())
        accesses = {a for a in ACCESS.findall(text) if "global" in a} - scalars
        assert accesses, name
        narrow = {a for a in accesses if not any(a.endswith(width) for width in widths)}
        assert not narrow, f"{name}: {sorted(narrow)}"
        checked += 1
    # sum_partials reads an element a thread, neighbours in a row: a warp's reads are whole sectors.
    assert checked >= 3 or all("sum_partials_kernel" in name for name in kernels)


@pytest.mark.slow
def test_every_kernel_waits_for_its_predecessor_and_needs_no_local_memory(
    kernels: dict[str, str],
) -> None:
    for name, text in kernels.items():
        assert not re.search(r"\b(ld|st)\.local|__local_depot", text), name
        first_access = next(
            (m.start() for m in ACCESS.finditer(text) if "global" in m.group()), len(text)
        )
        assert 0 <= text.find("griddepcontrol.wait;") < first_access, name
        assert "griddepcontrol.launch_dependents;" in text, name
