"""``exafuse bench``: the kernels and models beside their peers and their physical limit."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from exafuse.cli.registry import Run, command

SUITES = ("ops", "attention", "decode", "models", "overhead")
PACKAGE = "exafuse.benchmarks"


@command("bench", "Time the kernels and models beside their peers and their physical limit.")
def _bench(parser: argparse.ArgumentParser) -> Run:
    add = parser.add_argument
    add("--suite", choices=(*SUITES, "all"), action="append", help="(repeatable; default: all)")
    add("--peers", metavar="A,B", help="these peers only (default: all that are installed)")
    add("--device", help="cpu, cuda, cuda:1 (default: the GPU if there is one)")
    add("--dtype", choices=("bfloat16", "float16", "float32"), help="default: bfloat16 on a GPU")
    add("--quick", action="store_true", help="fewer and smaller cases")
    add("--minutes", type=float, metavar="N", help="begin no case after N minutes")
    add("--json", metavar="FILE", help="write the results")
    add("--csv", metavar="FILE", help="write the rows as a table")
    add("--png", metavar="DIR", help="draw the results (matplotlib)")
    add("--profile", metavar="DIR", help="of whole models: a trace, and where a step goes")
    add("--results", metavar="DIR", help="write DIR/<gpu>/<suite>-torch<version>.json")
    add("--baseline", metavar="FILE", help="an earlier --json: list what is over 5 %% slower")
    add("--cost", action="store_true", help="instruction counts of the kernels on the emulator")

    def run(arguments: argparse.Namespace) -> int:
        return int(load("command").run(arguments))

    return run


def load(module: str) -> ModuleType:
    """A module of the benchmarks: of the installed package, else of the source tree around it.

    Raises:
        ImportError: neither is there.
    """
    if importlib.util.find_spec(PACKAGE) is None:
        folder = Path(__file__).resolve().parents[3] / "benchmarks"
        _load_from(folder)
    return importlib.import_module(f"{PACKAGE}.{module}")


def _load_from(folder: Path) -> Any:
    """Enter the folder as the package ``exafuse.benchmarks``."""
    start = folder / "__init__.py"
    if not start.is_file():
        raise ImportError(
            "the benchmarks are not installed with this exafuse, and there is no source tree "
            f"around it ({folder}): reinstall exafuse"
        )
    spec = importlib.util.spec_from_file_location(
        PACKAGE, start, submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return package
