"""Small models trained on any layout, and compared with one process."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from distributed.ranks import metrics, train_on
from models.small_models import SMALL, untied
from small_recipes import MODELS, WriteRecipe

from flame.parallel.mesh import Layout

WAYS = Layout.__slots__
LOSS, NORM = 2e-6, 1e-5  # float32 on a CPU; the loss absolute, the norm relative
RecipeOf = Callable[..., Path]


def named(layout: dict[str, Any]) -> str:
    return " x ".join(f"{way} {size}" for way, size in layout.items())


def heads(family: str) -> dict[str, int]:
    """Four heads where there are any: two tensor ranks have two each, which two context ranks divide."""
    config = SMALL[family]
    return {"num_heads": 4} if getattr(config, "num_heads", None) == 2 else {}


def recipes(write_recipe: WriteRecipe, monkeypatch: pytest.MonkeyPatch) -> RecipeOf:
    """A fixture: writes the recipe of a small model of a family on a layout."""

    def write(
        run: str,
        family: str,
        parallel: dict[str, Any],
        *,
        steps: int = 5,
        blocks: int = 2,
        replaced: dict[str, str] | None = None,
    ) -> Path:
        values = untied(family, blocks, vocab_size=384, **heads(family)).to_dict()
        monkeypatch.setitem(MODELS, family, json.loads(json.dumps(values)))
        lines = [f"{way} = {json.dumps(value)}" for way, value in parallel.items()]
        settings = {
            'warmup = "5 steps"': 'warmup = "2 steps"\ndecay = "constant"',
            'every = "4 steps"': 'every = "100 steps"',
            "[logging]": "\n".join(["[parallel]", *lines, "[logging]"]),
        }
        return write_recipe(run, family, steps=steps, replaced=settings | (replaced or {}))

    return write


def trained(recipe: Path, parallel: dict[str, Any]) -> list[dict[str, Any]]:
    sizes = {way: size for way, size in parallel.items() if way in WAYS}
    ranks = Layout(**sizes).ranks
    codes = train_on(ranks, recipe).codes(timeout=280)
    run = Path(tomllib.loads(recipe.read_text())["run"]["directory"])
    logs = "\n".join(log.read_text() for log in sorted((run / "logs").glob("rank-*.log")))
    assert codes == [0] * ranks, logs
    return metrics(run)


ALONE: dict[str, list[dict[str, Any]]] = {}  # what one process logs, by family


def assert_trains_the_same(
    recipe_of: RecipeOf, family: str, parallel: dict[str, Any], *, loss: float = LOSS, norm: float = NORM
) -> None:
    """Trains a family on a layout and, once, in one process."""
    if family not in ALONE:
        ALONE[family] = trained(recipe_of("alone", family, {}), {})
    run = named(parallel).replace(" ", "-")
    assert_same(ALONE[family], trained(recipe_of(run, family, parallel), parallel), parallel, loss, norm)


def assert_same(
    alone: list[dict[str, Any]],
    found: list[dict[str, Any]],
    parallel: dict[str, Any],
    loss: float = LOSS,
    norm: float = NORM,
) -> None:
    assert [record["rows_digest"] for record in found] == [record["rows_digest"] for record in alone]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in alone]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(alone, found, strict=True)]
    norms = [abs(1 - b["grad_norm"] / a["grad_norm"]) for a, b in zip(alone, found, strict=True)]
    print(f"{named(parallel)}: losses differ by {max(losses):.1e}, norms by {max(norms):.1e} of their size")
    assert max(losses) < loss
    assert max(norms) < norm
