"""What mkdocs does besides: README is the site's first page, and the examples that pages link to are there.

Named in mkdocs.yml. Links that lead nowhere in the repository stay, so that `--strict` finds them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#:]+)((?:#[^)]*)?)\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds README.md, CHANGELOG.md and the examples."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    files.append(File.generated(config, "changelog.md", content=(ROOT / "CHANGELOG.md").read_text()))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.is_file():
            name = f"examples/{path.name}"
            files.append(File.generated(config, name, content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links that are right in the repository into those that are right on the site."""
    uri = page.file.src_uri
    outside = {"index.md": "README.md", "changelog.md": "CHANGELOG.md"}.get(uri)
    here = ROOT / (outside or f"docs/{uri}")

    def placed(link: re.Match[str]) -> str:
        target = (here.parent / link[2]).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return link[0]
        name = target.relative_to(ROOT).as_posix()
        if target.is_dir():
            return f"`{name}`"
        name = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}.get(name, name.removeprefix("docs/"))
        return f"[{link[1]}]({'../' * uri.count('/')}{name}{link[3]})"

    return LINK.sub(placed, markdown)
