"""Pairs of ways for each family, schedule and setting that may get in each other's way."""

from __future__ import annotations

from typing import Any

import pytest
from distributed.layouts import assert_same, assert_trains_the_same, recipes, trained

from flame.models.registry import families

# with heads that two tensor ranks and then two context ranks divide
PAIRS = [
    {"context": 2, "tensor": 2},
    {"tensor": 2, "pipeline": 2},
    {"context": 2, "pipeline": 2},
]
recipe_of = pytest.fixture(recipes)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family.name for family in families()])
def test_every_family_trains_the_same_on_these_pairs(family: str, recipe_of) -> None:
    for parallel in PAIRS:
        assert_trains_the_same(recipe_of, family, parallel, loss=2e-5, norm=2e-4)


SCHEDULES = ("gpipe", "interleaved", "zero_bubble", "zbv")


@pytest.mark.slow
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("beside", ["tensor", "context"])
@pytest.mark.parametrize("family", ["llama", "gla", "rwkv7", "hgrn2", "mamba2", "phi3"])
def test_every_schedule_goes_with_tensor_and_context_ranks(
    family: str, beside: str, schedule: str, recipe_of
) -> None:
    parallel: dict[str, Any] = {beside: 2, "pipeline": 2, "pipeline_schedule": schedule}
    alone = trained(recipe_of("alone", family, {}, blocks=4), {})
    assert_same(alone, trained(recipe_of("laid-out", family, parallel, blocks=4), parallel), parallel)
