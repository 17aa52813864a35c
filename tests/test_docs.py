"""What the documentation says of files, tests, commands and settings is so."""

from __future__ import annotations

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import pytest
from models.test_model_registry import PARAMETERS

from flame import schema
from flame.cli import make_parser
from flame.commands.models import support, table
from flame.models.registry import families
from flame.recipe import Recipe, check

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src" / "flame"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def test_the_list_of_settings_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_recipes.py"))["page"]()
    assert (ROOT / "docs" / "recipes.md").read_text() == made, "run: python docs/make_recipes.py"


@each_page
def test_links_lead_to_files(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text)
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_tour_names_every_file_once() -> None:
    tour = (ROOT / "docs" / "tour.md").read_text()
    files = [p for p in sorted(SRC.rglob("*.py")) if p.name != "__init__.py"]
    named = {str(p.relative_to(SRC)): tour.count(f"`{p.relative_to(SRC)}`") for p in files}
    assert {name: count for name, count in named.items() if count != 1} == {}
    there = {*named, *(f"{folder}/__init__.py" for folder in ("report", "commands"))}
    assert set(re.findall(r"`([a-z_/]+\.py)`", tour)) <= there, "a file that is not there"


@each_page
def test_tests_that_are_named_exist(page: Path) -> None:
    written = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page.read_text())
    assert [name for name in named if f"def {name}(" not in written] == []


@each_page
def test_commands_are_commands(page: Path) -> None:
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines()]
    for line in lines:
        words = shlex.split(line, comments=True)
        if words and words[0] == "flame":
            _, unknown = make_parser().parse_known_args(words[1:])
            assert unknown == [], line
        elif words and words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), line
        elif words and words[0] == "python":
            assert (ROOT / words[1]).is_file(), line


@each_page
def test_recipes_that_are_shown_are_recipes(page: Path) -> None:
    for block in blocks(page, "toml"):
        recipe = schema.build(Recipe, tomllib.loads(block), page.name)
        check(recipe, page.name)


def test_the_readme_lists_every_family_and_only_those() -> None:
    table = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table == [family.name for family in families()]


def test_the_readmes_table_of_families_is_what_flame_models_prints() -> None:
    text = (ROOT / "README.md").read_text()
    (shown,) = re.findall(r"<!-- flame models --markdown -->\n(.*?)\n<!-- /flame models -->", text, re.DOTALL)
    assert shown == table([support(family) for family in families()]), "run: flame models --markdown"


def test_the_page_on_models_has_every_config_with_its_parameters() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \| ([\d,]+) \|", (ROOT / "docs/models.md").read_text(), re.MULTILINE)
    assert {name: int(count.replace(",", "")) for name, count in rows} == PARAMETERS


def test_the_readmes_file_tree_is_the_repositorys() -> None:
    (tree,) = blocks(ROOT / "README.md", "text")
    named = [line.split()[0] for line in tree.splitlines() if line.strip()]
    assert [name for name in named if not (ROOT / name).exists()] == []
    top = {name.split("/")[0] for name in named}
    kept = {p.name for p in ROOT.iterdir() if not p.name.startswith(".") and p.name not in ("build", "runs")}
    assert kept - top == set()
