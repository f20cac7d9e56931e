"""Line coverage of the kernels under the emulator, by gcov."""

from __future__ import annotations

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from emulator.build import ROOT, folder_of


class FileCoverage(NamedTuple):
    """Lines of one source file: how many hold code, and which of them never ran."""

    lines: int
    missed: list[int]

    @property
    def share(self) -> float:
        return 1.0 - len(self.missed) / self.lines if self.lines else 1.0


def forget() -> None:
    """Removes the counts of earlier runs."""
    for counts in folder_of("coverage").rglob("*.gcda"):
        counts.unlink()


def measure(prefix: str = "csrc/kernels/") -> dict[str, FileCoverage]:
    """Coverage of each source file whose path in the project starts with ``prefix``.

    A line of a template counts as run if it ran in any of its instances.
    """
    ran: dict[str, dict[int, bool]] = defaultdict(dict)
    for counts in folder_of("coverage").rglob("*.gcda"):
        done = subprocess.run(
            ["gcov", "--json-format", "--stdout", str(counts)],
            capture_output=True,
            text=True,
            check=True,
            cwd=counts.parent,
        )
        for document in done.stdout.splitlines():
            for file in json.loads(document)["files"]:
                path = Path(file["file"]).resolve()
                if not path.is_relative_to(ROOT):
                    continue
                name = str(path.relative_to(ROOT))
                if not name.startswith(prefix):
                    continue
                for line in file["lines"]:
                    number = line["line_number"]
                    ran[name][number] = ran[name].get(number, False) or line["count"] > 0
    return {
        name: FileCoverage(len(lines), sorted(n for n, hit in lines.items() if not hit))
        for name, lines in sorted(ran.items())
    }
