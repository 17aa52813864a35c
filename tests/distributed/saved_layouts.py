"""What a checkpoint holds, and a model at any layout that loads and saves one."""

from __future__ import annotations

import tomllib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from flame import schema
from flame.guest import build_guest
from flame.models.registry import load_config
from flame.parallel.world import join_world
from flame.recipe import FILE, Recipe
from flame.resuming import open_data
from flame.train.checkpoint import load_tensors, tensors_of


def build_and_save(text: str, loaded: str, saved: str) -> int:
    """Builds the recipe's model at its layout, loads a checkpoint, if one is named, and saves all tensors."""
    recipe = schema.build(Recipe, tomllib.loads(text), FILE)
    world = join_world()
    config = load_config(recipe.model.config, recipe.model.module)
    guest = build_guest(recipe, world, open_data(recipe, world).catalog, config)
    if loaded:
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
