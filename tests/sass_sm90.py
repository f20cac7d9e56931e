"""Judges the machine code of the sm_90a prefill kernel: how many products it has, where it waits
for them, and whether the exponentials run beneath them.

    python tests/sass_sm90.py [--binary FILE]

compiles csrc/kernels/attention/prefill_sm90.cu, or reads a binary, and prints a line a variant.
What is judged here is decided by ptxas alone: it may serialise products, or draw a wait to another
place, without an error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import compiled_kernels

CSRC = compiled_kernels.ROOT / "csrc"
SOURCE = CSRC / "kernels" / "attention" / "prefill_sm90.cu"
ARCH = "sm_90a"
KERNEL = "prefill_sm90_kernel"

_INSTRUCTION = re.compile(
    r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.x]*)\s*(?P<rest>[^;]*);"
)
_VARIANT = re.compile(rf"{KERNEL}<(?P<dtype>\w+), (?P<cols>\d+), (?P<queries>\d+), (?P<keys>\d+)>")


@dataclass(frozen=True)
class Variant:
    """The template arguments of one compiled kernel."""

    dtype: str
    cols: int  # of the head, padded
    queries: int
    keys: int

    @classmethod
    def of(cls, name: str) -> Variant:
        """From a readable name, "prefill_sm90: prefill_sm90_kernel<bf16, 128, 128, 176>"."""
        found = _VARIANT.search(name)
        if found is None:
            raise LookupError(f"{name}: expected {KERNEL}<dtype, columns, queries, keys>")
        return cls(found["dtype"], *(int(found[part]) for part in ("cols", "queries", "keys")))

    @property
    def consumers(self) -> int:
        return self.queries // 64

    @property
    def all_registers(self) -> int:
        """Of a thread of each warpgroup, added up: what they start with is all that goes around."""
        groups = 1 + self.consumers
        return 65536 // (128 * groups) // 8 * 8 * groups

    def __str__(self) -> str:
        return f"{self.dtype} D={self.cols} {self.queries}x{self.keys}"


@dataclass(frozen=True)
class Listing:
    """What counts of one kernel's instructions, in the order of the code."""

    opcodes: Counter[str]  # with their modifiers
    products: Counter[str]  # by shape, "64x128x16"
    waits: tuple[int, ...]  # how many groups each wait for products leaves in flight
    exponentials: tuple[int, ...]  # before the first wait, between waits, after the last one
    registers: tuple[int, ...]  # what each setmaxnreg asks for
    highest_register: int

    @classmethod
    def of(cls, lines: Iterable[str]) -> Listing:
        """From the lines that cuobjdump -sass has for the kernel."""
        opcodes: Counter[str] = Counter()
        products: Counter[str] = Counter()
        waits: list[int] = []
        exponentials = [0]
        registers: list[int] = []
        highest = -1
        for line in lines:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            opcode, rest = match["opcode"], match["rest"]
            opcodes[opcode] += 1
            highest = max([highest, *map(int, re.findall(r"\bR(\d+)\b", rest))])
            if opcode.startswith("HGMMA."):
                products[opcode.split(".")[1]] += 1
            elif opcode.startswith("WARPGROUP.DEPBAR"):
                waits.append(_last_number(rest))
                exponentials.append(0)
            elif opcode.startswith("MUFU.EX2"):
                exponentials[-1] += 1
            elif opcode.startswith("USETMAXREG"):
                registers.append(_last_number(rest))
        return cls(opcodes, products, tuple(waits), tuple(exponentials), tuple(registers), highest)

    def count(self, start: str) -> int:
        """How many instructions have names that start so."""
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(start))

    def beneath(self) -> list[int]:
        """Exponentials between each wait that leaves a group in flight and the wait after it."""
        return [
            self.exponentials[i + 1]
            for i, (one, next_one) in enumerate(zip(self.waits, self.waits[1:], strict=False))
            if one == 1 and next_one == 0
        ]


def _last_number(operands: str) -> int:
    """Of "gsb0, 0x1": 1."""
    return int(re.findall(r"0x[0-9a-f]+", operands)[-1], 16)


def findings(variant: Variant, listing: Listing) -> list[str]:
    """What is wrong with a variant, a line each.

    The source multiplies queries and keys at two places (the first tile, and the loop), probs and
    values at two (the loop, and the last tile), each as a group; it waits for the scores of the
    first tile, in the loop for the scores with the group before still in flight and then for that,
    and for the last group.
    """
    found = []

    def expect(what: str, wanted: object, got: object) -> None:
        if got != wanted:
            found.append(f"{what}: expected {wanted}, got {got}")

    products: Counter[str] = Counter()
    products[f"64x{variant.keys}x16"] += 2 * variant.cols // 16
    products[f"64x{variant.cols}x16"] += 2 * variant.keys // 16
    expect("products (HGMMA)", dict(products), dict(listing.products))
    expect("starts of groups (WARPGROUP.ARRIVE)", 4, listing.count("WARPGROUP.ARRIVE"))
    expect("waits for products (WARPGROUP.DEPBAR)", (0, 1, 0, 0), listing.waits)
    # One a score of the tile that is this thread's, and one a row to rescale by.
    expect("exponentials beneath products", [variant.keys // 2 + 2], listing.beneath())
    expect("setmaxnreg", 2, len(listing.registers))
    if len(listing.registers) == 2:
        producer, consumer = sorted(listing.registers)
        limit = variant.all_registers
        if producer + variant.consumers * consumer > limit:
            found.append(f"registers: {producer} + {variant.consumers} x {consumer} > {limit}")
        if listing.highest_register >= consumer:
            found.append(f"registers: R{listing.highest_register} is used, {consumer} are there")
    expect("local memory (STL, LDL)", 0, listing.count("STL") + listing.count("LDL"))
    expect("loops over lanes (BRA.U.ANY)", 0, listing.count("BRA.U.ANY"))
    return found


def complaints(output: str) -> list[str]:
    """What ptxas says of wgmma and setmaxnreg: messages C7500 to C7599."""
    return [line.strip() for line in output.splitlines() if re.search(r"\(C75\d\d\)", line)]


def listings(binary: Path) -> dict[str, Listing]:
    """By readable name, every variant of the kernel in a cubin, an object or the extension."""
    tool = compiled_kernels.find_tool("cuobjdump")
    usage = [tool, "-arch", ARCH, "--dump-resource-usage", str(binary)]
    symbols = sorted(
        {
            found[1]
            for line in compiled_kernels.lines_of(*usage)
            if (found := re.match(r"\s*Function (\S+):", line)) and KERNEL in found[1]
        }
    )
    if not symbols:
        return {}
    lines: dict[str, list[str]] = {}
    symbol = ""
    # It warns of every cubin of the file that lacks the functions.
    sass = [tool, "-arch", ARCH, "-sass", "-fun", ",".join(symbols), str(binary)]
    for line in compiled_kernels.lines_of(*sass, quiet=True):
        if match := re.match(r"\s*Function : (\S+)", line):
            symbol = match[1]
        elif symbol:
            lines.setdefault(symbol, []).append(line)
    names = compiled_kernels.readable(symbols)
    return {names[symbol]: Listing.of(text) for symbol, text in sorted(lines.items())}


def compile_source(source: Path, cubin: Path) -> str:
    """Compiles for sm_90a as the extension's build does; what ptxas says."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise compiled_kernels.ToolMissing("nvcc is not on the PATH")
    done = subprocess.run(
        [
            *(nvcc, "-std=c++20", "--expt-relaxed-constexpr", f"-I{CSRC}", "-Xptxas=-v"),
            *("-gencode", f"arch=compute_{ARCH[3:]},code={ARCH}"),
            *("-cubin", "-o", str(cubin), str(source)),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"nvcc failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def line_of(variant: Variant, listing: Listing) -> str:
    """The figures of a variant."""
    products = " + ".join(f"{n} x {shape}" for shape, n in sorted(listing.products.items()))
    return (
        f"{variant}: {products}, {listing.count('WARPGROUP.ARRIVE')} groups, "
        f"waits {'/'.join(map(str, listing.waits))}, "
        f"ex2 {'/'.join(map(str, listing.exponentials))}, "
        f"setmaxnreg {'/'.join(map(str, listing.registers))}, R{listing.highest_register}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--binary", type=Path, help="read this instead of compiling")
    binary = parser.parse_args().binary
    wrong = []
    if binary is None:
        binary = compiled_kernels.ROOT / "build" / "prefill_sm90.cubin"
        binary.parent.mkdir(exist_ok=True)
        wrong = complaints(compile_source(SOURCE, binary))
    for name, listing in listings(binary).items():
        variant = Variant.of(name)
        print(line_of(variant, listing))
        wrong += [f"{variant}: {finding}" for finding in findings(variant, listing)]
    print("\n".join(wrong) or "nothing to complain of")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
