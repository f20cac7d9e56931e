"""The hash of a kernel: deaf to comments and blanks, not to code, wherever it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "cmake"))

import kernel_hash  # noqa: E402

KERNEL = """// A kernel.
#include "common/a.h"
#include <cuda_bf16.h>
#define SUM(x) (x) + 1
__global__ void f(int* p) { *p = SUM(1'000) - -3; }  // adds
const char* name = "a // b";
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in {
        "kernels/k.cu": KERNEL,
        "kernels/beside.h": "int beside;\n",
        "common/a.h": '#pragma once\n  #  include "b.h"\n#include "../kernels/beside.h"\n',
        "common/b.h": '#include "common/a.h"\ninline int b = 1;\n',
        "common/other.h": "int other;\n",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def change(file: Path, old: str, new: str) -> None:
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))


def test_headers_are_followed(tree: Path) -> None:
    files = {"kernels/k.cu", "common/a.h", "common/b.h", "kernels/beside.h"}
    assert kernel_hash.includes("kernels/k.cu", tree) == files


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/k.cu", "// A kernel.\n", "/* Another\n * one. */\n\n"),
        ("kernels/k.cu", "  // adds", ""),
        ("kernels/k.cu", "{ *p", "{\n  // store\n  *p"),
        ("kernels/k.cu", "f(int* p)", "f( int *p )"),
        ("kernels/k.cu", "#define SUM(x) (x) + 1", "#define SUM(x) \\\n  (x) + 1  // one more"),
        ("common/b.h", "int b = 1;", "int b=1; // b\n"),
        ("common/other.h", "other", "different"),
    ],
)
def test_same_code_same_hash(tree: Path, file: str, old: str, new: str) -> None:
    before = kernel_hash.kernel_hashes(tree)
    change(tree / file, old, new)
    assert kernel_hash.kernel_hashes(tree) == before


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("kernels/k.cu", "1'000", "1'001"),
        ("kernels/k.cu", "- -3", "--3"),
        ("kernels/k.cu", "SUM(x) (x)", "SUM (x) (x)"),
        ("kernels/k.cu", "a // b", "a // c"),
        ("kernels/k.cu", "a // b", "a //  b"),
        ("kernels/k.cu", "<cuda_bf16.h>", "<cuda_fp16.h>"),
        ("kernels/k.cu", "(x) + 1\n", "(x) + 1 "),
        ("common/b.h", "b = 1", "b = 2"),
        ("kernels/beside.h", "int", "long"),
    ],
)
def test_other_code_other_hash(tree: Path, file: str, old: str, new: str) -> None:
    before = kernel_hash.kernel_hashes(tree)
    change(tree / file, old, new)
    assert kernel_hash.kernel_hashes(tree) != before


def test_the_build_is_told_the_hash_of_every_kernel() -> None:
    program = [sys.executable, str(ROOT / "cmake" / "kernel_hash.py")]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout.strip()
    hashes = dict(pair.split("=") for pair in printed.split(","))
    assert hashes == kernel_hash.kernel_hashes()
    kernels = (ROOT / "csrc" / "kernels").rglob("*.cu")
    assert {path.stem for path in kernels} == {name.rpartition("/")[2] for name in hashes}
    assert len(set(hashes.values())) == len(hashes)
