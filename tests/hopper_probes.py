"""One instruction of sm_90a at a time against the formulas of common/ptx_sm90.cuh: where a copied
box lies in shared memory, and which elements a product multiplies.

    python tests/hopper_probes.py [--build] [--device cuda|emulated]

`--build` compiles build/hopper/probes.so with nvcc and does nothing else. All else that the sm_90a
kernels do rests on these readings, which the emulator shares: if a GPU disagrees, it is seen here
first. Exit status: 0 all right, 1 a probe failed, 2 nothing to run on.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "cmake"), str(ROOT / "python")]

import kernel_hash  # noqa: E402

SOURCE = ROOT / "tests" / "hopper_probes.cu"
LIBRARY = ROOT / "build" / "hopper" / "probes.so"

PASSED, FAILED, REFUSED = 0, 1, 2
BOX_COLUMNS, DEPTH, ROWS = 64, 128, 64
WIDTHS = (64, 96, 128, 160, 176, 192)
INTEGERS = {2: torch.int16, 4: torch.int32}
OPERANDS = ("depth along row", "depth by row", "from registers")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ProbeError(RuntimeError):
    """A probe that could not be run; the message is the library's."""


def swizzled(rows: Tensor) -> Tensor:
    """A panel ``[rows, 64]`` of 16-bit elements as it lies in shared memory, same shape.

    The eight 16-byte chunks of row r change places: chunk c goes to c xor (r mod 8).
    """
    chunks = rows.reshape(rows.shape[0], 8, 8)
    to = torch.arange(8)[None] ^ (torch.arange(rows.shape[0]) % 8)[:, None]
    return torch.empty_like(chunks).scatter_(1, to[..., None].expand_as(chunks), chunks).flatten(1)


def panels(matrix: Tensor) -> Tensor:
    """A matrix ``[rows, columns]`` as an operand in shared memory, flat: one panel of 64 columns
    after the other, the last one filled up with zeros."""
    missing = -matrix.shape[1] % BOX_COLUMNS
    wide = torch.nn.functional.pad(matrix, (0, missing))
    return torch.cat([swizzled(panel).flatten() for panel in wide.split(BOX_COLUMNS, dim=1)])


class Probes:
    """The functions of one library on one device."""

    def __init__(self, library: Path, device: str) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.exafuse_probe_error.restype = ctypes.c_char_p
        self.device = torch.device("cpu" if device == "emulated" else device)
        if device == "emulated" and self._library.exafuse_emulator_set(b"gpu", b"sm_90"):
            raise ProbeError("the emulator knows no GPU of sm_90")

    def give(self, tensor: Tensor) -> Tensor:
        """On the device, at a multiple of 256 bytes as CUDA gives them, same strides."""
        held = tensor.untyped_storage().nbytes()
        flat = torch.zeros(held + 256, dtype=torch.uint8, device=self.device)
        start = -flat.data_ptr() % 256
        # As whole numbers: moving a NaN as a number may change it.
        bits = tensor.view(INTEGERS[tensor.itemsize])
        found = flat[start : start + held].view(bits.dtype)
        found = found.as_strided(bits.shape, bits.stride(), found.storage_offset())
        return found.copy_(bits).view(tensor.dtype)

    def box(
        self, tensor: Tensor, rows: int, at: Sequence[int], image: Tensor, store: bool = False
    ) -> None:
        """Copies ``rows`` rows of 64 columns at (column, row, head, batch) of the tensor ``[batch,
        head, row, column]`` to the image, or the image there."""
        self._call(
            self._library.exafuse_probe_box,
            ctypes.c_int(store),
            ctypes.c_void_p(tensor.data_ptr()),
            ctypes.c_int(tensor.dtype == torch.bfloat16),
            (ctypes.c_int64 * 4)(*reversed(tensor.shape)),
            (ctypes.c_int64 * 3)(*reversed(tensor.stride()[:3])),
            ctypes.c_int(rows),
            (ctypes.c_int * 4)(*at),
            ctypes.c_void_p(image.data_ptr()),
        )

    def product(self, operands: str, a: Tensor, b: Tensor, d: Tensor) -> None:
        """d ``[64, n]`` float32 = a b, a and b as the kernel wants them."""
        self._call(
            self._library.exafuse_probe_product,
            ctypes.c_int(OPERANDS.index(operands)),
            ctypes.c_int(a.dtype == torch.bfloat16),
            ctypes.c_int(d.shape[1]),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in (a, b, d)),
        )

    def _call(self, function: Callable[..., int], *arguments: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if function(*arguments):
            raise ProbeError(self._library.exafuse_probe_error().decode())
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class BoxCase:
    """A box of a tensor ``[batch, row, head, column]``, as callers of attention lay it out."""

    what: str
    shape: tuple[int, int, int, int]  # batch, rows, heads, columns
    rows: int
    at: tuple[int, int, int, int]  # column, row, head, batch
    dtype: str = "bf16"
    spare: int = 0  # columns between one head and the next

    def tensor(self, seed: int) -> Tensor:
        """Any bits, NaN among them, as ``[batch, head, row, column]``."""
        *outer, columns = self.shape
        bits = torch.Generator().manual_seed(seed)
        size = (*outer, columns + self.spare)
        whole = torch.randint(-(1 << 15), 1 << 15, size, generator=bits, dtype=torch.int16)
        return whole.view(DTYPES[self.dtype])[..., :columns].transpose(1, 2)

    def inside(self) -> tuple[slice, slice, slice, slice]:
        """Which rows and columns of the box exist, and where in the tensor they lie."""
        column, row = self.at[:2]
        _, rows, _, columns = self.shape
        first, last = max(0, -row), max(0, min(self.rows, rows - row))
        left, right = max(0, -column), max(0, min(BOX_COLUMNS, columns - column))
        last, right = max(first, last), max(left, right)
        return (
            slice(first, last),
            slice(left, right),
            slice(row + first, row + last),
            slice(column + left, column + right),
        )


BOXES = (
    BoxCase("whole", (1, 64, 1, 64), 64, (0, 0, 0, 0)),
    BoxCase("second panel", (1, 130, 2, 128), 128, (64, 1, 1, 0)),
    BoxCase("fp16", (2, 200, 3, 64), 176, (0, 7, 2, 1), "fp16"),
    BoxCase("256 rows", (1, 300, 1, 64), 256, (0, 44, 0, 0)),
    BoxCase("rows behind the end", (2, 100, 2, 64), 128, (0, 90, 1, 0)),
    BoxCase("rows before the start", (2, 100, 2, 64), 64, (0, -5, 0, 1)),
    BoxCase("all rows outside", (1, 40, 1, 64), 64, (0, 64, 0, 0)),
    BoxCase("columns behind the end", (1, 70, 2, 80), 64, (64, 3, 1, 0)),
    BoxCase("one row", (1, 1, 1, 64), 64, (0, 0, 0, 0)),
    BoxCase("strides with gaps", (2, 96, 4, 64), 96, (0, 0, 3, 1), "bf16", 72),
)


def load_problem(probes: Probes, case: BoxCase) -> str:
    """ "" if a loaded box lies where the formula says, zeros outside the tensor."""
    tensor = case.tensor(seed=1)
    given = probes.give(tensor)
    image = probes.give(torch.full((case.rows, BOX_COLUMNS), 7.0, dtype=tensor.dtype))
    probes.box(given, case.rows, case.at, image)
    wanted = torch.zeros(case.rows, BOX_COLUMNS, dtype=torch.int16)
    rows, columns, from_rows, from_columns = case.inside()
    source = tensor.view(torch.int16)[case.at[3], case.at[2]]
    wanted[rows, columns] = source[from_rows, from_columns]
    return difference(image.view(torch.int16).cpu(), swizzled(wanted))


def store_problem(probes: Probes, case: BoxCase) -> str:
    """ "" if a stored box arrives, and nothing but what exists of it is written."""
    tensor = case.tensor(seed=2)
    given = probes.give(tensor)
    whole = BoxCase("", (1, case.rows, 1, BOX_COLUMNS), 0, case.at, case.dtype)
    box = whole.tensor(seed=3)[0, 0].view(torch.int16)
    probes.box(given, case.rows, case.at, probes.give(swizzled(box)), store=True)
    rows, columns, to_rows, to_columns = case.inside()
    wanted = tensor.view(torch.int16).clone()
    wanted[case.at[3], case.at[2], to_rows, to_columns] = box[rows, columns]
    return difference(given.view(torch.int16).cpu().flatten(0, 2), wanted.flatten(0, 2))


def product_problem(probes: Probes, operands: str, width: int, dtype: str) -> str:
    """ "" if the product of small whole numbers, which is exact in any order, is right."""
    bits = torch.Generator().manual_seed(width)
    a = torch.randint(-8, 9, (ROWS, DEPTH), generator=bits).to(DTYPES[dtype])
    b = torch.randint(-8, 9, (DEPTH, width), generator=bits).to(DTYPES[dtype])
    d = probes.give(torch.full((ROWS, width), float("nan")))
    a_given = a if operands == "from registers" else panels(a)
    b_given = panels(b.T if operands == "depth along row" else b)
    probes.product(operands, probes.give(a_given), probes.give(b_given), d)
    return difference(d.cpu(), a.float() @ b.float())


def difference(got: Tensor, wanted: Tensor) -> str:
    """ "" if equal, else how much differs and where first."""
    differs = got != wanted
    if not bool(differs.any()):
        return ""
    row, column = (int(i) for i in differs.nonzero()[0])
    return (
        f"{int(differs.sum())} of {wanted.numel()} elements differ; the first is [{row}, {column}]:"
        f" expected {wanted[row, column].item()}, got {got[row, column].item()}"
    )


def all_probes() -> Iterator[tuple[str, Callable[[Probes], str]]]:
    """Every probe by name, in the order in which a disagreement is best understood."""
    for case in BOXES:
        yield f"load, {case.what}", lambda probes, case=case: load_problem(probes, case)
    for case in BOXES:
        yield f"store, {case.what}", lambda probes, case=case: store_problem(probes, case)
    for operands in OPERANDS:
        for width in WIDTHS:
            for dtype in DTYPES:
                about = (operands, width, dtype)
                yield (
                    f"product, {operands}, {width} columns, {dtype}",
                    lambda probes, about=about: product_problem(probes, *about),
                )


def sources_hash() -> str:
    """Of the probes and of the wrappers that they are about, without comments and white space."""
    text = kernel_hash.normalized(SOURCE.read_text(encoding="utf-8"))
    for header in ("common/ptx_sm90.cuh", "common/tensor_map.h"):
        text += kernel_hash.source_hash(header)
    return hashlib.sha256(text.encode()).hexdigest()


def compile_library() -> Path:
    """Brings build/hopper/probes.so up to date; it runs on sm_90a alone."""
    note, wanted = LIBRARY.with_suffix(".hash"), sources_hash()
    if LIBRARY.exists() and note.exists() and note.read_text(encoding="utf-8") == wanted:
        return LIBRARY
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise ProbeError(f"{LIBRARY} is not built from these sources, and nvcc is not on the PATH")
    LIBRARY.parent.mkdir(parents=True, exist_ok=True)
    toolkit = Path(nvcc).resolve().parents[1] / "lib"  # of the registry's wheels
    command = [
        *(nvcc, "-std=c++20", "--expt-relaxed-constexpr", f"-I{ROOT / 'csrc'}"),
        *("-gencode", "arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler"),
        *("-fPIC,-fvisibility=hidden", f"-L{toolkit}", "-o", str(LIBRARY), str(SOURCE)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ProbeError(f"nvcc failed with {done.returncode}:\n{done.stdout}{done.stderr}")
    note.write_text(wanted, encoding="utf-8")
    return LIBRARY


def emulated_library() -> Path:
    """The same source in the emulator."""
    from emulator.build import build, library

    build("plain", target="_hopper_probes")
    return library("plain", "_hopper_probes")


def gpu_problem() -> str:
    """Why the probes cannot run on a GPU here; "" if they can."""
    if not torch.cuda.is_available():
        return "no GPU here: torch.cuda.is_available() is False"
    name, arch = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    return "" if arch == (9, 0) else f"{name} is sm_{arch[0]}{arch[1]}, expected sm_90"


def run(probes: Probes) -> int:
    """Runs all, prints a line each and a last one that says how many were right."""
    failed = total = 0
    for name, problem_of in all_probes():
        problem = problem_of(probes)
        total += 1
        failed += bool(problem)
        print(f"{name}: {problem or 'right'}", flush=True)
    print(f"probes: {total - failed} of {total} right")
    return FAILED if failed else PASSED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--build", action="store_true", help="compile only")
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    arguments = parser.parse_args()
    try:
        if arguments.build:
            print(compile_library())
            return PASSED
        if arguments.device == "emulated":
            return run(Probes(emulated_library(), "emulated"))
        problem = gpu_problem()
        if problem:
            print(f"probes: {problem}. Nothing was run.", file=sys.stderr)
            return REFUSED
        return run(Probes(compile_library(), "cuda"))
    except ProbeError as error:
        print(f"probes: {error}", file=sys.stderr)
        return FAILED


if __name__ == "__main__":
    sys.exit(main())
