"""A run moves from layout to layout: parameters and optimizer state stay what they are, training goes on."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed.layouts import assert_same, named, recipes, trained
from distributed.ranks import Ranks

from flame import schema
from flame.models.registry import load_config
from flame.parallel.mesh import Layout
from flame.parallel.world import join_world
from flame.recipe import FILE, Recipe, read_recipe
from flame.run import build_guest, open_data
from flame.train.checkpoint import load_tensors, step_directory, tensors_of

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


def load_and_save(text: str, loaded: str, saved: str) -> int:
    """Builds the recipe's model at its layout, loads a checkpoint's tensors into it and saves them."""
    recipe = schema.build(Recipe, tomllib.loads(text), FILE)
    world = join_world()
    config = load_config(recipe.model.config, recipe.model.module)
    guest = build_guest(recipe, world, open_data(recipe, world).catalog, config)
    load_tensors(guest.model, guest.shards, guest.optimizer, Path(loaded), world.checkpoint)
    state = tensors_of(guest.model, guest.shards, guest.optimizer)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(saved), process_group=world.checkpoint)
    dist.destroy_process_group()
    return 0


def tensors_in(path: Path) -> dict[str, torch.Tensor]:
    reader = dcp.FileSystemReader(path)
    saved = reader.read_metadata().state_dict_metadata
    state = {key: torch.empty(meta.size, dtype=meta.properties.dtype) for key, meta in saved.items()}
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


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
        assert Ranks(ranks, load_and_save, text, str(kept), str(again)).codes() == [0] * ranks, named(layout)
        read = tensors_in(again)
        assert read.keys() == written.keys()
        assert [key for key in written if not torch.equal(written[key], read[key])] == [], named(layout)
        kept = again
