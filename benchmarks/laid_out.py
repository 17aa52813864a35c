"""A recipe of configs/recipes on this machine's own text."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import tomli_w
from text import prepare


def lay_out(
    recipe: str | Path, folder: Path, *, characters: int, vocabulary: int = 32000, **sections: dict[str, Any]
) -> Path:
    """`folder`/recipe.toml: the recipe with other text and a run in `folder`/run, `sections` over its own."""
    text, tokenizer = prepare(folder, characters, vocabulary)
    values = tomllib.loads(Path(recipe).read_text())
    values["run"] = {"directory": str(folder / "run")}
    values["model"]["config"] = str(Path(values["model"]["config"]).absolute())
    values["tokenizer"]["path"] = str(tokenizer)
    values["data"]["sources"] = [{"name": "python", "files": str(text)}]
    values["logging"] = {"tensorboard": False}
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    path = folder / "recipe.toml"
    path.write_text(tomli_w.dumps(values))
    return path
