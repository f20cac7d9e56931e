"""House rules that no formatter knows, checked over every file that git tracks.

    python tests/lint_sources.py

* CUDA syntax that g++ cannot read stays where the emulator replaces it: `<<<` and the architecture
  macro in csrc/common/launch.h and csrc/common/ptx*.cuh, inline assembly in ptx*.cuh alone.
* No unfinished work, no path of somebody's machine, in any text.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = (".h", ".cuh", ".cpp", ".cu")
ASM_HOMES = tuple(f"csrc/common/ptx{part}.cuh" for part in ("", "_sm90", "_wgmma"))
CUDA_SYNTAX_HOMES = ("csrc/common/launch.h", *ASM_HOMES)


class Rule(NamedTuple):
    """A pattern that must not occur, and what to do instead."""

    name: str
    pattern: re.Pattern[str]
    remedy: str


LAUNCH = Rule("launch syntax", re.compile("<<<"), "use launch() of common/launch.h")
ARCH_MACRO = Rule("architecture macro", re.compile("__CUDA_ARCH__"), "let common/ptx.cuh choose")
ASM = Rule("inline assembly", re.compile(r"\basm\b\s*(volatile\s*)?\("), "wrap it in ptx.cuh")
TEXT_RULES = (
    Rule(
        "unfinished work",
        re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X|HA" r"CK)\b"),
        "finish it or leave it out",
    ),
    Rule(
        "path of one machine",
        # An invented author may have a home, in a test of files that name one.
        re.compile(r"(?<![\w.\-/}])/(home/(?!author/)|(mnt|opt|root|tmp|work|Users)/)\w"),
        "use a relative path or a temporary folder",
    ),
)


def tracked_files(root: Path) -> list[Path]:
    """Files that git tracks below `root` and that exist; every file, where there is no git."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached"]
    listing = subprocess.run(command, capture_output=True, check=False)
    if listing.returncode:
        return [path for path in root.rglob("*") if path.is_file()]
    names = listing.stdout.decode().split("\0")
    return [root / name for name in names if name and (root / name).is_file()]


def without_comments(source: str) -> str:
    """C++ `source` with its comments blanked, line numbers kept."""

    def blank(match: re.Match[str]) -> str:
        text = match.group()
        return text if text[0] in "\"'" else re.sub(r"[^\n]", " ", text)

    # Literals are matched so that a comment's mark inside one is not taken for a comment.
    token = r'"(?:\\.|[^"\\\n])*"' r"|'(?:\\.|[^'\\\n])+'|//[^\n]*|/\*.*?\*/"
    return re.sub(token, blank, source, flags=re.DOTALL)


def rules_for(name: str) -> list[Rule]:
    """The rules of the kernels' sources that bind file `name`."""
    if not name.startswith("csrc/") or not name.endswith(SOURCE_SUFFIXES):
        return []
    rules = [] if name in CUDA_SYNTAX_HOMES else [LAUNCH, ARCH_MACRO]
    return rules if name in ASM_HOMES else [*rules, ASM]


def findings(root: Path) -> Iterator[str]:
    """One line `file:line: rule: remedy` for each breach below `root`."""
    for path in tracked_files(root):
        name = path.relative_to(root).as_posix()
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        code = without_comments(text) if name.endswith(SOURCE_SUFFIXES) else text
        checks = [(text, rule) for rule in TEXT_RULES]
        checks += [(code, rule) for rule in rules_for(name)]
        for where, rule in checks:
            for match in rule.pattern.finditer(where):
                line = where.count("\n", 0, match.start()) + 1
                yield f"{name}:{line}: {rule.name} {match.group()!r}: {rule.remedy}"


def main() -> int:
    found = list(findings(ROOT))
    print("\n".join(found) if found else "house rules: no findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
