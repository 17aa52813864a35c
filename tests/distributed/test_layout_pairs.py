"""Any two ways of sharing a model out over ranks, and any three, train what one process trains."""

from __future__ import annotations

from itertools import combinations

import pytest
from distributed.layouts import assert_trains_the_same, named, recipes

WAYS = ("replicate", "shard", "context", "tensor", "pipeline")
PAIRS = [dict.fromkeys(pair, 2) for pair in combinations(WAYS, 2)]
TRIPLES = [
    {"shard": 2, "tensor": 2, "pipeline": 2},
    {"shard": 2, "context": 2, "tensor": 2},
    {"shard": 2, "context": 2, "pipeline": 2},
]
ALL_FOUR = {"shard": 2, "context": 2, "tensor": 2, "pipeline": 2}
FAMILIES = ("llama", "gla", "gated_deltanet")


def cases(quick: dict[str, list[dict[str, int]]], layouts: list[dict[str, int]]) -> list:
    """Each family on each layout, slow but for those in `quick`."""
    return [
        pytest.param(
            family,
            layout,
            id=f"{family}: {named(layout)}",
            marks=() if layout in quick.get(family, []) else pytest.mark.slow,
        )
        for family in FAMILIES
        for layout in layouts
    ]


recipe_of = pytest.fixture(recipes)


@pytest.mark.parametrize(("family", "parallel"), cases({"gla": PAIRS}, PAIRS))
def test_two_ways_at_once_train_the_same(family: str, parallel: dict[str, int], recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, parallel)


@pytest.mark.parametrize(("family", "parallel"), cases({"gla": TRIPLES}, TRIPLES))
def test_three_ways_at_once_train_the_same(family: str, parallel: dict[str, int], recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, parallel)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_four_ways_at_once_train_the_same(family: str, recipe_of) -> None:
    assert_trains_the_same(recipe_of, family, ALL_FOUR)
