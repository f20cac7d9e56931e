"""Reads the compiled extension: what each kernel costs and which instructions it is made of.

    python tests/compiled_kernels.py [--write] [--binary FILE]

prints the table of registers and shared memory, or writes it to benchmarks/resources.json, which
tests/test_sass.py compares with the extension it finds. Needs cuobjdump and nvdisasm, which the
`test` extra installs, and c++filt of binutils.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "resources.json"

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)")
_USAGE = re.compile(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
# nvcc puts the source file's name into the name of its anonymous namespace, after the name's length
# and between two hashes.
_SOURCE = re.compile(r"_GLOBAL__N__[0-9a-f]{8}_(\d+)_")


class ToolMissing(RuntimeError):
    """A program that reads binaries is not installed."""


@dataclass
class Kernel:
    """One kernel of one architecture. Sizes in bytes; `shared` is what the code itself declares."""

    registers: int
    stack: int
    shared: int
    local: int
    opcodes: Counter[str] = field(default_factory=Counter)  # without modifiers: HMMA, LDSM, ...

    def problems(self) -> list[str]:
        """Why this kernel touches local memory, if it does: a spill or an indexed array."""
        found = [f"{name} {size} bytes" for name, size in self._sizes().items() if size]
        return found + [f"{n} {op}" for op, n in self.opcodes.items() if op in ("LDL", "STL")]

    def _sizes(self) -> dict[str, int]:
        return {"stack": self.stack, "local memory": self.local}


Kernels = dict[str, dict[str, Kernel]]  # by architecture, then by "source: kernel<arguments>"


def find_tool(name: str) -> str:
    """The program's path: of the registry's wheels, else of the system."""
    beside = [str(Path(folder, "nvidia", "cu13", "bin", name)) for folder in sys.path]
    found = next((path for path in map(shutil.which, [*beside, name]) if path), None)
    if found is None:
        raise ToolMissing(f"{name} is not installed: pip install '.[test]'")
    return found


def installed_extension() -> Path | None:
    """The extension of EXAFUSE_COMPILED, else of the installed package."""
    if os.environ.get("EXAFUSE_COMPILED"):
        return Path(os.environ["EXAFUSE_COMPILED"])
    package = importlib.util.find_spec("exafuse")
    spec = importlib.util.find_spec("exafuse._C") if package else None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".so") else None


def compiler_of(binary: Path) -> str:
    """Which nvcc built the extension: "13.0.88"; empty if it does not say."""
    found = re.search(rb"nvcc (\d+\.\d+\.\d+)\0", binary.read_bytes())
    return found[1].decode() if found else ""


def listed_archs(binary: Path) -> list[str]:
    """The architectures that the extension says it holds machine code for, sorted."""
    found = re.search(rb"\d+a?-(?:real|virtual)(?:,\d+a?-(?:real|virtual))*\0", binary.read_bytes())
    listed = found[0].decode() if found else ""
    return sorted(f"sm_{arch}" for arch in re.findall(r"(\d+a?)-real", listed))


def lines_of(*command: str, quiet: bool = False) -> Iterator[str]:
    """What one of the tools prints; `quiet` leaves out its warnings."""
    # cuobjdump looks for nvdisasm on the PATH.
    path = f"{Path(find_tool('nvdisasm')).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL if quiet else None,
        text=True,
        env={**os.environ, "PATH": path},
    ) as process:
        assert process.stdout is not None
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}")


def cleaned(text: str) -> str:
    """A demangled kernel as "kernel<arguments>"."""
    text = text.replace("(anonymous namespace)::", "").replace("exafuse::", "")
    text = text.replace("__nv_bfloat16", "bf16").replace("__half", "fp16")
    text = re.sub(r"\(bool\)([01])", lambda m: ("false", "true")[int(m[1])], text)
    text = re.sub(r"\([\w:]+\)(?=-?\d)", "", text)  # casts: of enumerators and numbers
    return re.sub(r"\(.*", "", text).removeprefix("void ")  # parameters


def readable(mangled: list[str]) -> dict[str, str]:
    """ "source: kernel<arguments>" for each mangled name; the source where the name tells it."""
    if shutil.which("c++filt") is None:
        raise ToolMissing("c++filt (binutils) is not installed")
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    names = {}
    for symbol, text in zip(mangled, done.stdout.splitlines(), strict=True):
        source = ""
        if match := _SOURCE.search(symbol):
            file = symbol[match.end() : match.end() + int(match[1])]
            source = f"{file.removesuffix('_cu')}: "
        names[symbol] = source + cleaned(text)
    return names


def read(binary: Path, disassemble: bool = True) -> Kernels:
    """Every kernel in the binary, for each architecture it holds machine code for."""
    archs: dict[str, dict[str, Kernel]] = {}
    arch = function = ""
    for line in lines_of(find_tool("cuobjdump"), "--dump-resource-usage", str(binary)):
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            function = match[1]
        elif match := _USAGE.match(line):
            archs.setdefault(arch, {})[function] = Kernel(*map(int, match.groups()))
    if disassemble:
        kernel: Kernel | None = None
        for line in lines_of(find_tool("cuobjdump"), "-sass", str(binary)):
            if match := _INSTRUCTION.match(line):
                assert kernel is not None
                kernel.opcodes[match[1]] += 1
            elif match := re.match(r"\s*Function : (\S+)", line):
                kernel = archs[arch][match[1]]
            elif match := re.match(r"arch = (\w+)", line):
                arch = match[1]
    names = readable(sorted({symbol for kernels in archs.values() for symbol in kernels}))
    shared = [name for name, count in Counter(names.values()).items() if count > 1]
    if shared:
        raise RuntimeError(f"two kernels share a name: {shared}")
    return {
        arch: {names[symbol]: kernel for symbol, kernel in kernels.items()}
        for arch, kernels in sorted(archs.items())
    }


def table_of(kernels: Kernels) -> dict[str, dict[str, list[int]]]:
    """Registers and shared bytes of each kernel, by name, then by architecture."""
    names = sorted({name for of_arch in kernels.values() for name in of_arch})
    return {
        name: {
            arch: [of_arch[name].registers, of_arch[name].shared]
            for arch, of_arch in kernels.items()
            if name in of_arch
        }
        for name in names
    }


def write_table(binary: Path) -> None:
    """Writes the table; architectures that this binary lacks keep what stands there."""
    os.environ["EXAFUSE_BACKEND"] = "emulated"
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "python")]
    from shared_memory import dynamic_shared_bytes

    shared = {name: size for name, size in dynamic_shared_bytes().items() if size}
    rows = table_of(read(binary, disassemble=False))
    if TABLE.exists():
        for name, of_arch in json.loads(TABLE.read_text())["kernels"].items():
            if name in rows:
                rows[name] = dict(sorted({**of_arch, **rows[name]}.items()))
    dynamic = ",\n".join(f"    {json.dumps(name)}: {size}" for name, size in shared.items())
    lines = ",\n".join(f"    {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
    TABLE.write_text(
        f'{{\n  "compiler": "{compiler_of(binary)}",\n'
        '  "columns": ["registers", "static shared bytes"],\n'
        f'  "kernels": {{\n{lines}\n  }},\n'
        f'  "dynamic shared bytes": {{\n{dynamic}\n  }}\n}}\n'
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.relative_to(ROOT)}")
    parser.add_argument("--binary", type=Path, help="default: the installed extension")
    arguments = parser.parse_args()
    binary = arguments.binary or installed_extension()
    if binary is None:
        sys.exit("the extension is not built: run `make install`, or name it with --binary")
    if arguments.write:
        write_table(binary)
    for arch, kernels in read(binary).items():
        for name, kernel in sorted(kernels.items()):
            notes = ", ".join(kernel.problems())
            print(f"{arch} {kernel.registers:3} registers {kernel.shared:6} B  {name}  {notes}")


if __name__ == "__main__":
    main()
