"""What the GPU ledgers say about the kernels of this build.

A ledger, ``benchmarks/results/<gpu>/ledger.json``, is written by ``make test-gpu``. For each kernel
it holds a hash of the sources and the verdicts of the tests and sanitizers that ran on them; the
extension knows the hashes that it was built from. Equal hashes make a verdict one about this build.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

UNVERIFIED = "compiled, not yet verified on a GPU"


def built_hashes(build: Mapping[str, Any]) -> dict[str, str]:
    """``build_info()["kernel_hashes"]`` as ``{kernel: hash}``."""
    pairs = str(build.get("kernel_hashes") or "").split(",")
    return {name: value for name, _, value in (pair.partition("=") for pair in pairs) if name}


def verdicts(built: Mapping[str, str], ledgers: Iterable[Path]) -> dict[str, str]:
    """For each kernel of the build, what is known of it on each GPU that has a ledger.

    Raises:
        ValueError: a ledger is no JSON, or not of this layout; the message names the file.
    """
    texts: dict[str, list[str]] = {name: [] for name in built}
    for file in ledgers:
        try:
            ledger = json.loads(file.read_text(encoding="utf-8"))
            gpu, entries = ledger["gpu"], ledger["kernels"]
            for name in built.keys() & entries.keys():
                texts[name].append(_verdict(gpu, entries[name], built[name]))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{file}: expected a ledger of GPU runs, got {reason}") from error
    return {name: "; ".join(known) or UNVERIFIED for name, known in texts.items()}


def _verdict(gpu: str, entry: Mapping[str, Any], built: str) -> str:
    if entry["hash"] != built:
        return f"changed since its run on {gpu} ({entry['date']})"
    checks: Mapping[str, Mapping[str, Any]] = entry["checks"]
    failed = [name for name, check in checks.items() if check["verdict"] == "failed"]
    if failed:
        return f"FAILED on {gpu} ({', '.join(failed)}; {entry['date']})"
    if checks.get("tests", {}).get("verdict") != "passed":
        return f"run on {gpu} not finished ({entry['date']})"
    missing = [name for name, check in checks.items() if check["verdict"] != "passed"]
    without = f", without {', '.join(missing)}" if missing else ""
    return f"verified on {gpu} ({checks['tests']['cases']} cases, {entry['date']}{without})"
