"""The house rules hold, and a breach of each is noticed."""

import shutil
from pathlib import Path

import lint_sources
import pytest


def test_this_tree_keeps_the_rules() -> None:
    assert list(lint_sources.findings(lint_sources.ROOT)) == []


BREACHES = {
    "launch syntax": ("csrc/kernels/a.cu", "void f() { k<<<1, 2>>>(); }"),
    "architecture macro": ("csrc/common/vec.cuh", "#if __CUDA_ARCH__ >= 900"),
    "inline assembly": ("csrc/kernels/a.cu", 'asm volatile("bar.sync 0;");'),
    "unfinished work": ("docs/a.md", "TO" + "DO: write this"),
    "path of one machine": ("python/a.py", "open('/ho" + "me/me/x')"),
}


@pytest.mark.parametrize("rule", BREACHES)
def test_breach_is_found(tmp_path: Path, rule: str) -> None:
    name, text = BREACHES[rule]
    path = tmp_path / name
    path.parent.mkdir(parents=True)
    path.write_text(f"\n{text}\n")
    (found,) = lint_sources.findings(tmp_path)
    assert found.startswith(f"{name}:2: {rule} ")


def test_comments_and_home_files_may_speak_of_it(tmp_path: Path) -> None:
    kernel = tmp_path / "csrc" / "kernels" / "a.cu"
    home = tmp_path / "csrc" / "common" / "ptx.cuh"
    for path in (kernel, home):
        path.parent.mkdir(parents=True)
    kernel.write_text('// asm("x") and k<<<1>>> differ\n/* __CUDA_ARCH__\n */ int x;\n')
    home.write_text('asm volatile("x");  // __CUDA_ARCH__\n')
    assert list(lint_sources.findings(tmp_path)) == []
    shutil.copy(home, kernel)
    assert [line.split(":")[2] for line in lint_sources.findings(tmp_path)] != []


def test_comments_keep_line_numbers() -> None:
    source = 'a /* b\nc */ d // e\n"// not a comment" // f\n'
    blanked = lint_sources.without_comments(source)
    assert [line.strip() for line in blanked.splitlines()] == ["a", "d", '"// not a comment"']
