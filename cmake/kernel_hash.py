"""Names the code of each kernel by a hash, so that a result can say which code it is about.

A kernel is a file csrc/kernels/<name>.cu. Its hash covers that file and every header below csrc
that it includes, directly or not, without comments and white space: what compiles to the same
kernel keeps its hash. Run as a program it prints `name=hash,name=hash,...`, which the build puts
into the extension.
"""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Numbers come before literals, because 1'000 is no start of one; literals before comments, because
# they may hold their marks.
_TOKEN = re.compile(
    r'(?P<code>R"(?P<mark>[^\s()\\]{0,16})\(.*?\)(?P=mark)"'
    r'|"(?:\\.|[^"\\\n])*"'
    r"|\b\d(?:'?[\w.])*"
    r"|'(?:\\.|[^'\\\n])+')"
    r"|//(?:\\\n|[^\n])*|/\*.*?\*/"
    r"|(?P<end>(?<!\\)\n[ \t]*(?P<directive>#)?)"
    r"|(?P<blank>(?:\s|\\\n)+)"
    r"|(?P<other>\w+|.)",
    re.DOTALL,
)
_WORD = re.compile(r"\w")


def normalized(source: str) -> str:
    """C++ `source` without comments, and with blanks only where they can matter.

    Kept are literals as they are, the line of a preprocessor directive as a line, one blank
    between two words or between two signs (`a - -b`), none beside a bracket, comma or semicolon.
    """
    out: list[str] = []
    blank = in_directive = False
    for match in _TOKEN.finditer("\n" + source):
        text = match["code"] or match["other"]
        if match["end"]:
            if in_directive or match["directive"]:
                out.append("\n")
            in_directive, blank = bool(match["directive"]), not match["directive"]
            if match["directive"]:
                out.append("#")
        elif text is None:
            blank = True
        else:
            if blank and out and _matters(out[-1][-1], text[0], in_directive):
                out.append(" ")
            blank = False
            out.append(text)
    return "".join(out).strip()


def _matters(left: str, right: str, in_directive: bool) -> bool:
    if left in "()[]{},;\n" or right in "()[]{},;":
        # Except in `#define A (x)`, which differs from `#define A(x)`.
        return in_directive and right == "(" and bool(_WORD.match(left))
    return bool(_WORD.match(left)) == bool(_WORD.match(right))


def includes(file: str, root: Path = CSRC) -> frozenset[str]:
    """The files below `root` that `file` includes, directly or not, itself among them.

    As a compiler does it, a name is looked for beside the including file first, then below `root`;
    headers found in neither place belong to the toolkit and do not count.
    """
    found: set[str] = set()
    waiting = [file]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        text = normalized((root / name).read_text(encoding="utf-8"))
        for header in re.findall(r'^#include ?[<"]([^>"]+)[>"]', text, re.MULTILINE):
            for place in ((root / name).parent / header, root / header):
                if place.is_file():
                    waiting.append(place.resolve().relative_to(root.resolve()).as_posix())
                    break
    return frozenset(found)


def source_hash(file: str, root: Path = CSRC) -> str:
    """SHA-256, in hex, of `file` (relative to `root`) and all that it includes."""
    digest = hashlib.sha256()
    for name in sorted(includes(file, root)):
        code = normalized((root / name).read_text(encoding="utf-8"))
        digest.update(f"{name} {len(code)}\n{code}\n".encode())
    return digest.hexdigest()


def kernel_hashes(root: Path = CSRC) -> dict[str, str]:
    """The hash of every kernel by its name: the file's path below kernels/ without `.cu`."""
    folder = root / "kernels"
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.cu"))
    return {name.removesuffix(".cu"): source_hash(f"kernels/{name}", root) for name in names}


def main() -> int:
    print(",".join(f"{name}={value}" for name, value in kernel_hashes().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
