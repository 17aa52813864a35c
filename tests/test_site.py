"""The documentation's site builds, with every link leading somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("material") is None,
    reason='mkdocs-material is not installed: pip install "flame[docs]"',
)


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_site_builds_with_every_page_and_needs_no_other_host(tmp_path: Path) -> None:
    done = build(ROOT / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 0, done.stderr
    pages = {p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")}
    assert {p for p in pages if not (tmp_path / "site" / p).exists()} == set()
    first = (tmp_path / "site" / "index.html").read_text()
    assert 'href="examples/own_model.py"' in first
    assert (tmp_path / "site" / "examples" / "own_model.py").exists()
    assert 'href="docs/' not in first
    assert re.findall(r'(?:src=|<link[^>]* href=)"(https?://[^"]*)', first) == []


@pytest.mark.parametrize(
    "text", ["[a page](nowhere.md)", "[a section](models.md#nowhere)", "[code](../no.py)"]
)
def test_a_link_to_nowhere_fails_the_build(text: str, tmp_path: Path) -> None:
    for folder in ("docs", "examples"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name in ("README.md", "CHANGELOG.md", "mkdocs.yml"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("configs/recipes", "src"):  # which pages name
        (tmp_path / folder).mkdir(parents=True)
    with (tmp_path / "docs" / "launch.md").open("a") as page:
        page.write(f"\n{text}\n")
    done = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert done.returncode == 1
    (found,) = [
        line for line in done.stderr.splitlines() if "WARNING" in line or "'launch.md' contains" in line
    ]
    assert "launch.md" in found
