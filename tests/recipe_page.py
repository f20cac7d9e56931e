"""docs/recipes.md taken apart into recipes and blocks, and what turns a drop-in block into plain
transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "recipes.md"
KINDS = ("own graph", "drop-in")
HEADING = re.compile(r"## (?P<title>.+)")
FENCE = re.compile(r"```(?P<language>\w*)")
FIRST_LINE = re.compile(r"# (?P<kind>own graph|drop-in)(, (?P<condition>.+))?")
# A block without these is what a user of transformers alone would write.
OURS = (
    (re.compile(r"^ *exafuse\.patch\(.+\).*\n", re.MULTILINE), ""),
    (re.compile(r"with exafuse\.patched_transformers\(\):"), "if True:"),
    (re.compile(r"\bregister\(\)"), '"eager"'),
)


@dataclass(frozen=True)
class Block:
    """One fenced block. ``kind``: own graph, drop-in, or console. ``condition``: what its first
    line says it needs, None if it runs anywhere."""

    recipe: str
    kind: str
    condition: str | None
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.recipe}, {self.kind}, line {self.line}"

    def run(self, namespace: dict[str, Any], replaced: Mapping[str, str]) -> None:
        """Execute the block, with names of checkpoints and files ``replaced`` by those here;
        errors name the line of the page."""
        source = replace(self.source, replaced)
        code = compile("\n" * (self.line - 1) + source, str(PAGE), "exec")
        exec(code, namespace)

    def plain(self) -> Block:
        """The same without us; of a block in which nothing is ours, the block itself."""
        source = self.source
        for pattern, replacement in OURS:
            source = pattern.sub(replacement, source)
        return Block(self.recipe, self.kind, self.condition, self.line, source)


def replace(source: str, replaced: Mapping[str, str]) -> str:
    """``source`` with every key of ``replaced`` exchanged for its value."""
    for old, new in replaced.items():
        source = source.replace(old, new)
    return source


def read(page: Path = PAGE) -> dict[str, list[Block]]:
    """The recipes of the page by title, each with its blocks in order.

    Raises:
        ValueError: a block of an unknown language, outside a recipe, without the first line that
            says its kind, or never closed.
    """
    recipes: dict[str, list[Block]] = {}
    title, opened = None, None
    for number, line in enumerate(page.read_text().splitlines(keepends=True), 1):
        if opened is not None:
            if line.rstrip() == "```":
                recipes[title].append(_block(page, title, *opened))
                opened = None
            else:
                opened[2].append(line)
        elif heading := HEADING.match(line):
            title = heading["title"].strip()
            if title in recipes:
                raise ValueError(f"{page}:{number}: two recipes named {title!r}")
            recipes[title] = []
        elif fence := FENCE.match(line.lstrip()):
            if title is None or line != line.lstrip():
                raise ValueError(f"{page}:{number}: a block outside a recipe, or indented")
            opened = (fence["language"], number + 1, [])
    if opened is not None:
        raise ValueError(f"{page}:{opened[1]}: a block that is not closed")
    return recipes


def _block(page: Path, recipe: str, language: str, line: int, lines: list[str]) -> Block:
    if language == "console":
        return Block(recipe, "console", None, line, "".join(lines))
    first = FIRST_LINE.fullmatch(lines[0].rstrip()) if lines else None
    if language != "python" or first is None:
        raise ValueError(
            f"{page}:{line}: expected a console block, or a python block that begins with "
            f"'# own graph' or '# drop-in', got {language or 'no language'}"
        )
    return Block(recipe, first["kind"], first["condition"], line, "".join(lines))
