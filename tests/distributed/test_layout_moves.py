"""A run moves from layout to layout: parameters and optimizer state stay what they are, training goes on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed.layouts import assert_same, named, recipes, trained
from distributed.ranks import Ranks
from distributed.saved_layouts import build_and_save, tensors_in

from flame import schema
from flame.parallel.mesh import Layout
from flame.recipe import read_recipe
from flame.train.checkpoint import step_directory

recipe_of = pytest.fixture(recipes)

# the first trains two steps, each other one more
WAY = [
    {"tensor": 2, "shard": 2},
    {"pipeline": 2, "shard": 2},
    {},
    {"context": 2, "tensor": 2},
    {"pipeline": 2, "tensor": 2},
    {"context": 2, "pipeline": 2},
    {"replicate": 2, "shard": 2},
]
# Mamba2 has fused projections, HGRN2 a table that lies on the first stage
FAMILIES = ("gla", "llama", "gated_deltanet", "mamba2", "hgrn2")
WAYS = [
    pytest.param("gla", WAY[:3]),
    *(pytest.param(family, WAY, id=family, marks=pytest.mark.slow) for family in FAMILIES),
]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize(("family", "way"), WAYS)
def test_a_run_moves_between_layouts_and_trains_as_if_it_had_not(
    family, way, recipe_of, tmp_path: Path
) -> None:
    last = len(way) + 1
    alone = trained(recipe_of("alone", family, {}, steps=last), {})
    found = []
    for steps, layout in enumerate(way, start=2):
        found = trained(recipe_of("moved", family, layout, steps=steps), layout)
    assert_same(alone, found, {"moved": len(way)})

    # what one layout wrote, others read and write again, to the last bit
    kept = step_directory(tmp_path / "moved", last)
    written = tensors_in(kept)
    assert any(key.startswith("optimizer.") and key.endswith(".exp_avg") for key in written)
    for number, layout in enumerate(way[:-1]):
        text = schema.to_toml(read_recipe(recipe_of("moved", family, layout, steps=last)))
        again = tmp_path / f"again-{number}"
        ranks = Layout(**layout).ranks
        assert Ranks(ranks, build_and_save, text, str(kept), str(again)).codes() == [0] * ranks, named(layout)
        read = tensors_in(again)
        assert read.keys() == written.keys()
        assert [key for key in written if not torch.equal(written[key], read[key])] == [], named(layout)
        kept = again
