"""docs/recipes.md: every block is run, with the names on it mapped to small checkpoints of the
same family, and its results compared with plain transformers: the drop-in blocks without us."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import recipe_page
import talking_models
import torch
import torchvision_shim
from recipe_runs import HEADS, NAMES, PAGE, RECIPES, SEEING, check_against_plain, run
from test_processor import python


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The names on the page, and the folders that stand for them."""
    return {
        name: str(talking_models.save(family, tmp_path_factory.mktemp(family)))
        for name, family in NAMES.items()
    }


def skip_without(title: str) -> None:
    """Skip a recipe that cannot run here."""
    for package in RECIPES[title].needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{title}: needs the package {package}")
    conditions = {block.condition for block in PAGE[title]} - {None}
    assert conditions <= {"GPU only"}
    if conditions and not torch.cuda.is_available():
        pytest.skip(f"{title}: needs a GPU, torch finds none here")


def test_every_block_of_the_page_is_run() -> None:
    """A new recipe, or a new block of one, needs its line in the tables above."""
    known = RECIPES | SEEING
    assert list(PAGE) == [title for title in PAGE if title in known], "recipes without a test"
    for title, recipe in known.items():
        assert tuple(block.kind for block in PAGE[title]) == recipe.blocks, title


def test_the_page_links_to_every_recipe() -> None:
    text = recipe_page.PAGE.read_text()
    for title in PAGE:
        assert f"[{title}](#{title.lower().replace(' ', '-')})" in text, title


@pytest.mark.parametrize(
    "text",
    [
        "## A\n```python\nprint(1)\n```\n",
        "## A\n```sh\nls\n```\n",
        "```python\n# drop-in\n```\n",
        "## A\n  ```python\n  # drop-in\n  ```\n",
        "## A\n```python\n# drop-in\n",
        "## A\n## A\n",
    ],
    ids=["no kind", "language", "no recipe", "indented", "not closed", "twice"],
)
def test_a_block_that_would_not_be_run_is_an_error(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md:\d+: "):
        recipe_page.read(page)


@pytest.mark.parametrize(
    "title",
    [
        pytest.param(title, marks=[pytest.mark.slow] if title == "A server" else [])
        for title in RECIPES
        if title != "Heads and losses"
    ],
)
def test_recipe(
    title: str,
    folders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    skip_without(title)
    monkeypatch.chdir(tmp_path)  # blocks may write files
    ran = run(title, folders)
    ran.printed = capsys.readouterr().out
    check_against_plain(RECIPES[title], ran)
    if (check := RECIPES[title].check) is not None:
        check(ran)


@pytest.mark.parametrize(
    "family", ["llama", "exaone4", pytest.param("qwen2", marks=pytest.mark.slow)]
)
def test_heads(family: str, tmp_path: Path) -> None:
    """The same blocks with the models of each family."""
    folders = talking_models.save_heads(family, tmp_path)
    ran = run("Heads and losses", {name: folders[kind] for name, kind in HEADS.items()})
    check_against_plain(RECIPES["Heads and losses"], ran)


@pytest.mark.slow
def test_recipes_that_see() -> None:
    """tests/recipes_that_see.py, in a process that has torchvision."""
    if torchvision_shim.find() is None:
        pytest.skip(f"needs torchvision, installed or in {torchvision_shim.FOLDER}")
    done = python(
        *("-m", "pytest", "-q", "-p", "torchvision_shim", "-p", "no:cacheprovider"),
        str(Path(__file__).parent / "recipes_that_see.py"),
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert f"{len(SEEING)} passed" in done.stdout
