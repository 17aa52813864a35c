"""Any two ways of sharing a model out over ranks, and any three, train what one process trains."""

from __future__ import annotations

import json
import tomllib
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from distributed.ranks import metrics, train_on
from models.small_models import untied
from small_recipes import MODELS

from flame.parallel.mesh import Layout

WAYS = ("replicate", "shard", "context", "tensor", "pipeline")
PAIRS = [dict.fromkeys(pair, 2) for pair in combinations(WAYS, 2)]
TRIPLES = [
    {"shard": 2, "tensor": 2, "pipeline": 2},
    {"shard": 2, "context": 2, "tensor": 2},
    {"shard": 2, "context": 2, "pipeline": 2},
]
ALL_FOUR = {"shard": 2, "context": 2, "tensor": 2, "pipeline": 2}
# four heads: two tensor ranks have two each, which two context ranks can exchange
HEADS = {"llama": {}, "gla": {"num_heads": 4}, "gated_deltanet": {"num_heads": 4}}
LOSS, NORM = 2e-6, 1e-5  # float32 on a CPU; the loss absolute, the norm relative


def named(layout: dict[str, Any]) -> str:
    return " x ".join(f"{way} {size}" for way, size in layout.items())


def cases(quick: dict[str, list[dict[str, int]]], layouts: list[dict[str, int]]) -> list:
    """Each family on each layout, slow but for those in `quick`."""
    return [
        pytest.param(
            family,
            layout,
            id=f"{family}: {named(layout)}",
            marks=() if layout in quick.get(family, []) else pytest.mark.slow,
        )
        for family in HEADS
        for layout in layouts
    ]


@pytest.fixture
def recipe_of(write_recipe, monkeypatch):
    """Writes the recipe of a small model on a layout; further settings by table and name."""

    def write(run: str, family: str, parallel: dict[str, Any], *, steps: int = 5, blocks: int = 2) -> Path:
        values = untied(family, blocks, vocab_size=384, **HEADS.get(family, {})).to_dict()
        monkeypatch.setitem(MODELS, family, json.loads(json.dumps(values)))
        lines = [f"{way} = {json.dumps(value)}" for way, value in parallel.items()]
        replaced = {
            'warmup = "5 steps"': 'warmup = "2 steps"\ndecay = "constant"',
            'every = "4 steps"': 'every = "100 steps"',
            "[logging]": "\n".join(["[parallel]", *lines, "[logging]"]),
        }
        return write_recipe(run, family, steps=steps, replaced=replaced)

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


def assert_trains_the_same(recipe_of, family: str, parallel: dict[str, Any]) -> None:
    if family not in ALONE:
        ALONE[family] = trained(recipe_of("alone", family, {}), {})
    assert_same(ALONE[family], trained(recipe_of("laid-out", family, parallel), parallel), parallel)


def assert_same(alone: list[dict[str, Any]], found: list[dict[str, Any]], parallel: dict[str, Any]) -> None:
    assert [record["rows_digest"] for record in found] == [record["rows_digest"] for record in alone]
    assert [record["tokens"] for record in found] == [record["tokens"] for record in alone]
    losses = [abs(a["loss"] - b["loss"]) for a, b in zip(alone, found, strict=True)]
    norms = [abs(1 - b["grad_norm"] / a["grad_norm"]) for a, b in zip(alone, found, strict=True)]
    print(f"{named(parallel)}: losses differ by {max(losses):.1e}, norms by {max(norms):.1e} of their size")
    assert max(losses) < LOSS
    assert max(norms) < NORM


@pytest.mark.parametrize(("family", "parallel"), cases({"gla": PAIRS}, PAIRS))
def test_two_ways_at_once_train_the_same(family: str, parallel: dict[str, int], recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, parallel)


@pytest.mark.parametrize(("family", "parallel"), cases({"gla": TRIPLES}, TRIPLES))
def test_three_ways_at_once_train_the_same(family: str, parallel: dict[str, int], recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("family", HEADS)
def test_four_ways_at_once_train_the_same(family: str, recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, ALL_FOUR)
