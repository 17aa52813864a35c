"""When gradients are reduced changes memory and traffic, and not what is trained."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.layouts import ALONE, assert_trains_the_same, named, recipes, trained

recipe_of = pytest.fixture(recipes)

# a step of 12 rows has 12, 6, 4 or 6 micro-batches of a row on each of these ranks
EACH = {"reduce": "micro_batch"}
LLAMA_RANKS: list[dict[str, Any]] = [{"shard": 2}, {"shard": 3}, {"replicate": 2}]
SLOW: list[dict[str, Any]] = [{"replicate": 2, "shard": 2}, {"shard": 2, "tensor": 2}]


@pytest.mark.parametrize(
    "parallel", [*LLAMA_RANKS, *(pytest.param(ways, marks=pytest.mark.slow) for ways in SLOW)], ids=named
)
def test_gradients_reduced_with_every_micro_batch_train_the_same(parallel, recipe_of) -> None:
    assert_trains_the_same(recipe_of, "llama", parallel | EACH)


def test_one_rank_has_nothing_to_reduce(recipe_of) -> None:
    found = trained(recipe_of("one", "llama", EACH), EACH)
    if "llama" not in ALONE:
        ALONE["llama"] = trained(recipe_of("alone", "llama", {}), {})
    assert [r["loss"] for r in found] == [r["loss"] for r in ALONE["llama"]]


@pytest.mark.slow
def test_a_recurrent_model_trains_the_same(recipe_of) -> None:
    assert_trains_the_same(recipe_of, "gla", {"shard": 2} | EACH)
