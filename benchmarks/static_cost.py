"""`exafuse bench --cost`: the static cost model, which a source checkout alone can run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MODEL = Path(__file__).resolve().parent.parent / "tests" / "emulator" / "cost.py"


def show(json_file: str | None) -> int:
    """Counts of every kernel on the emulator, printed; 1 if one costs more than is on record.

    Raises:
        ImportError: this is an installed package, without the emulator.
    """
    if not MODEL.is_file():
        raise ImportError(
            "cost: counts the kernels' instructions on the emulator, which only a source checkout "
            "has; run it there"
        )
    command = [sys.executable, str(MODEL)]
    if json_file:
        command += ["--json", json_file]
    return subprocess.run(command, check=False).returncode
