"""A static cost model: what every kernel does, counted on the emulator, beside what it must do.

    python tests/emulator/cost.py [--write | --json FILE] [--library FILE]

For small cases of the benchmarks: matrix instructions, bytes asked of global and of shared memory,
barriers, over the floor: each input read once and each output written once, the products of visible
pairs alone. Numbers that only a change of the kernels moves, so a wasteful kernel shows without a
GPU. ``--write`` puts them on record in benchmarks/static_cost.json, which tests/test_static_cost.py
compares with the kernels as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
RECORD = ROOT / "benchmarks" / "static_cost.json"
TOLERANCE = 1.05
MMA_FLOPS = 2 * 16 * 8 * 16  # of one m16n8k16

if __name__ == "__main__":  # the ops choose their path when they are imported
    os.environ["EXAFUSE_BACKEND"] = "emulated"
    sys.path[:0] = [str(ROOT), str(ROOT / "python"), str(ROOT / "tests")]


class Cost(NamedTuple):
    """One op on one case: counts of all its launches, and the floors of the first three.

    Bytes of shared memory are those of matrix loads and stores and of asynchronous copies.
    """

    kernels: str
    mma: int
    global_read: int
    global_written: int
    shared_read: int
    shared_written: int
    barriers: int
    atomics: int
    least_mma: int
    least_bytes: int

    def text(self) -> str:
        """One line: what is counted, and how many times the floor it is."""
        moved = self.global_read + self.global_written
        mma = " " * 20
        if self.least_mma:
            mma = f"{self.mma:7} mma ({self.mma / self.least_mma:5.2f}x)"
        return (
            f"{mma}  {moved / 1024:9.1f} KiB global ({moved / self.least_bytes:5.2f}x)  "
            f"{(self.shared_read + self.shared_written) / 1024:9.1f} KiB shared  "
            f"{self.barriers:5} barriers"
        )


def cases() -> Iterator[Any]:
    """Cases of the benchmarks, on shapes that the emulator runs in a second."""
    import torch

    from benchmarks import (
        bench_flash_attn,
        bench_flash_attn_with_kvcache,
        bench_qk_norm_rope,
        bench_rms_norm,
        bench_silu_and_mul,
        bench_vision_attn,
    )
    from benchmarks.case import Settings
    from benchmarks.shapes import ModelShape, Sizes

    wide = ModelShape("head_dim 128", 1024, 512, 4, 1, 128, 1, post_norm=True, qk_norm=True)
    slim = ModelShape("head_dim 64", 768, 512, 8, 2, 64, 1, window=64)

    class Small(Settings):
        @property
        def sizes(self) -> Sizes:
            return Sizes(
                models=(wide, slim),
                tokens=(16,),
                prefill=(192,),
                chunks=(),
                packed=(96, 33),
                decode=((1, 640), (2, 130)),
                drafts=((4, 300),),
                vision_tokens=128,
            )

    settings = Small(torch.device("cpu"), dtype=torch.bfloat16)
    for module in (
        *(bench_rms_norm, bench_qk_norm_rope, bench_silu_and_mul, bench_flash_attn),
        *(bench_flash_attn_with_kvcache, bench_vision_attn),
    ):
        yield from module.cases(settings)


def measure(library: Path, only: str = "") -> dict[str, Cost]:
    """Counts of every case whose name contains ``only``, by "op, model, case".

    The ops must already run emulated, from ``library``.
    """
    import torch

    from emulator.control import Counts, Emulator

    emulator = Emulator(library)
    found = {}
    for case in cases():
        name = f"{case.op}, {case.model}, {case.name}"
        if only not in name:
            continue
        call = case.contenders[0].prepare(case.make(torch.Generator().manual_seed(0)))
        emulator.clear_launches()
        with torch.no_grad(), emulator.counting():
            call()
        total = Counts(*(sum(numbers) for numbers in zip(*emulator.counts(), strict=True)))
        kernels = dict.fromkeys(record.kernel for record in emulator.launches())
        found[name] = Cost(
            ", ".join(map(short_name, kernels)), *total, -(-case.flops // MMA_FLOPS), case.bytes
        )
    return found


def short_name(kernel: str) -> str:
    """The name of a kernel without namespaces, arguments and template arguments."""
    bare = kernel.replace("(anonymous namespace)::", "").partition("<")[0].partition("(")[0]
    return bare.split()[-1].rpartition("::")[2]


def compare(found: Mapping[str, Cost], record: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for every count that is over 5 % higher than on record, and for what is not on it."""
    lines = []
    for name, cost in found.items():
        known = record.get(name)
        if known is None:
            lines.append(f"{name}: not on record")
            continue
        for what in Cost._fields[1:8]:
            now, before = getattr(cost, what), known[what]
            if now > TOLERANCE * before:
                lines.append(f"{name}: {what} {now}, on record {before}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="put the counts on record")
    parser.add_argument("--json", type=Path, help="write the counts here")
    parser.add_argument("--library", type=Path, help="an emulated extension (default: build it)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    library = arguments.library
    if library is None:
        from emulator import build

        print("bringing the emulated kernels up to date", file=sys.stderr, flush=True)
        build.build("plain", jobs=1, target="_C_emulated")
        library = build.library("plain")
    os.environ["EXAFUSE_EMULATED_LIB"] = str(library)
    found = measure(library, arguments.only)
    print("counts of one call on the emulator, and how many times the floor they are")
    for op in dict.fromkeys(name.partition(",")[0] for name in found):
        print(f"\n{op}")
        for name, cost in found.items():
            if name.partition(",")[0] == op:
                print(f"  {name.partition(', ')[2]}  [{cost.kernels}]\n    {cost.text()}")
    values = {name: cost._asdict() for name, cost in found.items()}
    if arguments.json or arguments.write:
        text = json.dumps(values, indent=1) + "\n"
        (arguments.json or RECORD).write_text(text, encoding="utf-8")
    if arguments.write or arguments.json or not RECORD.exists():
        return 0
    worse = compare(found, json.loads(RECORD.read_text(encoding="utf-8")))
    print("\n" + ("\n".join(worse) or "nothing costs more than on record"))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
