"""The extension's contract: its stub and its signatures, and those of the ops.

Runs on the CUDA extension where it is installed (no GPU is needed: the device is checked last) and
on the emulated one.
"""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from exafuse import ops, reference
from kernel_backends import cuda_extension, emulated, extension

__all__ = ["emulated", "extension"]  # fixtures

ROOT = Path(__file__).resolve().parents[1]
STUB = ROOT / "python" / "exafuse" / "_C.pyi"


@pytest.mark.parametrize("name", reference.__all__)
def test_ops_have_the_signatures_of_the_reference(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(m, name)) for m in (ops, reference))
    assert ours == theirs
    assert getattr(ops, name).__doc__


def test_ops_and_reference_have_the_same_names() -> None:
    assert sorted(ops.__all__) == sorted(reference.__all__)


def stub_functions() -> dict[str, list[str]]:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return {
        f.name: [f"{a.arg}: {ast.unparse(a.annotation or a)}" for a in f.args.args]
        for f in functions
    }


def test_the_stub_matches_the_module(extension: ModuleType) -> None:
    stub = stub_functions()
    public = {name for name in dir(extension) if not name.startswith("_")}
    assert public == {*stub, "NotAPlainTensor"}
    for name, arguments in stub.items():
        signature = getattr(extension, name).__doc__.splitlines()[0]
        inside = re.match(rf"{name}\((.*)\) ->", signature)
        assert inside is not None, signature
        words = inside[1].replace("torch.Tensor", "Tensor")
        words = words.replace("typing.SupportsInt | typing.SupportsIndex", "int")
        assert words == ", ".join(arguments), name


def test_build_info(extension: ModuleType) -> None:
    info = extension.build_info()
    names = {"version", "source_hash", "kernel_hashes", "archs", "compiler", "cuda", "backend"}
    assert set(info) == names
    assert info["backend"] == ("emulated" if "emulated" in extension.__name__ else "cuda")
    assert extension.NotAPlainTensor.__mro__[1] is TypeError


def test_importing_the_extension_imports_no_torch() -> None:
    cuda_extension()
    code = "import exafuse._C, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
