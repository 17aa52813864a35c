"""The guest of a run: the model as one rank holds it, parallelised, with its loss and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from flame.data.catalog import Catalog
from flame.errors import FlameError, ModelError
from flame.kernels import compute_dtype
from flame.models.build import build_on_meta, initialize
from flame.models.family import Family
from flame.models.registry import family_of
from flame.parallel.apply import apply_parallelism
from flame.parallel.fsdp import settle
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.groups import group_parameters
from flame.train.loss import LossModule
from flame.train.optimizer import Optimizers, build_optimizer
from flame.train.shards import Shards, WholeModel


@dataclass(frozen=True)
class Guest:
    """The model as this rank holds it, and how to train it."""

    config: Any
    family: Family
    model: nn.Module  # as transformers knows it; its parameters are sharded
    with_loss: LossModule
    shards: Shards
    optimizer: Optimizers
    compute: torch.dtype


def build_guest(recipe: Recipe, world: World, catalog: Catalog, config: Any) -> Guest:
    """The model, parallelised, with its initial weights and its optimizer."""
    origin = recipe.model.module or recipe.model.config or str(recipe.model.init_from)
    family = family_of(config)
    if catalog.vocab_size > config.vocab_size:
        raise ModelError(
            f"{origin}: vocab_size is {config.vocab_size}, but the tokenizer "
            f"{recipe.tokenizer.path} has {catalog.vocab_size} ids; raise it, or take another tokenizer"
        )
    compute = compute_dtype(recipe, world.device)
    if compute == torch.bfloat16:  # what little is left in float32 then may use the tensor cores too
        torch.set_float32_matmul_precision("high")
    model = build_model(origin, config)
    groups = group_parameters(
        recipe.optimizer,
        {name: tuple(parameter.shape) for name, parameter in model.named_parameters()},
        undecayed=family.no_weight_decay(model),
        matrices=family.matrices(model),
        embeddings=family.embeddings(model),
    )
    with_loss = LossModule(model, family.hidden, family.head(model), recipe.loss.z_loss)
    layout = resolve_layout(recipe.parallel, world.size)
    mesh = data_mesh(layout, world.device.type) if world.size > 1 else None
    on_gpu = world.device.type == "cuda"
    apply_parallelism(
        with_loss,
        [block for _, block in family.blocks(model)],
        mesh,
        compute=compute,
        compile_blocks=(family.compiles and on_gpu) if recipe.model.compile is None else recipe.model.compile,
    )
    initialize(model, config, recipe.run.seed, world.device)
    settle(with_loss)
    shards = Shards(model) if mesh is not None else WholeModel(model, compute)
    optimizer = build_optimizer(shards, recipe.optimizer, groups, fused=on_gpu)
    return Guest(config, family, model, with_loss, shards, optimizer, compute)


def build_model(path: str, config: Any) -> nn.Module:
    """The model on meta. Raises ModelError where its own code refuses the config."""
    try:
        return build_on_meta(config)
    except FlameError:
        raise
    except Exception as error:  # a guest's constructor raises whatever it likes
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: the model cannot be built from this config: {reason}; mend it") from error
