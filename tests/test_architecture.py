"""The house rules that a machine can check."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from flame.recipe import Recipe
from flame.schema import leaves

SRC = Path(__file__).parents[1] / "src" / "flame"
FILES = sorted(SRC.rglob("*.py"))
LAYERS = {"errors": 0, "schema": 0, "batch": 0, "titan": 0, "data": 1, "models": 2, "parallel": 3, "train": 4}
TOP = 5  # everything else: what people touch


def layer(room: str) -> int:
    return LAYERS.get(room, TOP)


def room_of(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from ((node.lineno, name) for name in names)


def upward(path: Path) -> list[str]:
    here = layer(room_of(path))
    found = [(line, name.split(".")) for line, name in imports(path)]
    inner = [(line, parts[1]) for line, parts in found if parts[0] == "flame" and len(parts) > 1]
    return [f"{path.name}:{line} imports {room}" for line, room in inner if layer(room) > here]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path: Path) -> None:
    assert upward(path) == []


def test_an_upward_import_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_architecture.SRC", tmp_path)
    bad = tmp_path / "data" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from flame.train import loop\n")
    assert upward(bad) == ["bad.py:2 imports train"]


def test_the_data_plane_knows_no_models_and_torch_only_where_it_hands_over() -> None:
    for path in (SRC / "data").glob("*.py"):
        for line, name in imports(path):
            root = name.split(".")[0]
            assert root not in ("transformers", "fla", "torchtitan"), f"{path}:{line} imports {name}"
            assert root != "torch" or path.name == "loader.py", f"{path}:{line} imports {name}"


def test_torchtitan_has_one_door() -> None:
    for path in FILES:
        if path.name != "titan.py":
            assert not [name for _, name in imports(path) if name.startswith("torchtitan")], path


def test_every_setting_is_read_by_something() -> None:
    sources = [p for p in FILES if p.name != "config.py"]
    read = {
        node.attr
        for path in sources
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    names = {leaf.path.rpartition(".")[2] for leaf in leaves(Recipe)}
    assert names - read == set()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_a_file_is_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    assert path.name != "utils.py"
    assert text.count("\n") <= 400, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            lines = (node.end_lineno or 0) - node.lineno + 1
            assert lines <= 70, f"{path}:{node.lineno} {node.name} has {lines} lines"
