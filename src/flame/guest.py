"""The guest of a run: the model as one rank holds it, parallelised, with its loss and its optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed import ProcessGroup

from flame.data.catalog import Catalog
from flame.errors import FlameError, ModelError, RecipeError
from flame.kernels import compute_dtype
from flame.models.build import build_on_meta, initialize
from flame.models.family import Family
from flame.models.registry import family_of
from flame.parallel.apply import apply_parallelism, meet_ranks
from flame.parallel.fsdp import settle
from flame.parallel.mesh import Layout, Meshes, Place, build_meshes, resolve_layout
from flame.parallel.pipeline import Parts, Stages, present_blocks
from flame.parallel.support import check_layout, check_lengths
from flame.parallel.tensor import divide
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.stages import compiles, pipeline_stages, stage_modules
from flame.train.groups import ParameterGroups, group_parameters
from flame.train.loss import LossModule
from flame.train.optimizer import Optimizers, build_optimizer
from flame.train.pipeline import Pipeline, StageModule
from flame.train.shards import Shards, WholeModel


@dataclass(frozen=True)
class Guest:
    """The model as this rank holds it, and how to train it."""

    config: Any
    family: Family
    model: nn.Module  # as transformers knows it, or this rank's parts of it; its parameters are sharded
    passes: LossModule | Pipeline  # what a step's micro-batches go through
    size: int  # parameters of the whole model
    shards: Shards
    optimizer: Optimizers
    compute: torch.dtype
    layout: Layout
    place: Place  # this rank's
    meshes: Meshes | None  # None where there is one rank
    stages: Stages | None  # of a pipeline


def build_guest(recipe: Recipe, world: World, catalog: Catalog, config: Any) -> Guest:
    """The model, parallelised, with its initial weights and its optimizer."""
    origin = recipe.model.module or recipe.model.config or str(recipe.model.init_from)
    family = family_of(config)
    if catalog.vocab_size > config.vocab_size:
        raise ModelError(
            f"{origin}: vocab_size is {config.vocab_size}, but the tokenizer "
            f"{recipe.tokenizer.path} has {catalog.vocab_size} ids; raise it, or take another tokenizer"
        )
    layout = resolve_layout(recipe.parallel, world.size)
    stages = check_fits(recipe, world, family, config, layout)
    compute = compute_dtype(recipe, world.device)
    if compute == torch.bfloat16:  # what little is left in float32 then may use the tensor cores too
        torch.set_float32_matmul_precision("high")
    whole = build_model(origin, config)
    groups = parameter_groups(recipe, family, whole)
    size = sum(parameter.numel() for parameter in whole.parameters())
    place = layout.place(world.rank)
    meshes = build_meshes(layout, world.device.type) if world.size > 1 else None
    modules = divided(recipe, family, config, whole, meshes, stages, place, compute)
    for module in modules:
        apply_parallelism(
            module,
            present_blocks(family, module.guest),
            meshes,
            compute=compute,
            compile_blocks=compiles(recipe, family, stages, world.device),
            memory=recipe.memory,
            keep_gathered=recipe.parallel.freed_after != "forward",
        )
        initialize(module.guest, config, recipe.run.seed, world.device)
        settle(module)
    model = modules[0].guest if len(modules) == 1 else Parts(module.guest for module in modules)
    passes: LossModule | Pipeline = modules[0]
    pipeline = meshes.pipeline.get_group() if meshes is not None and meshes.pipeline is not None else None
    if stages is not None and pipeline is not None:
        passes = Pipeline(cast("Sequence[StageModule]", modules), stages, pipeline, world.device, compute)
    shards = WholeModel(model, compute) if meshes is None else shards_of(recipe, model, pipeline)
    optimizer = build_optimizer(shards, recipe.optimizer, groups, fused=world.device.type == "cuda")
    return Guest(
        config, family, model, passes, size, shards, optimizer, compute, layout, place, meshes, stages
    )


def shards_of(recipe: Recipe, model: nn.Module, pipeline: ProcessGroup | None) -> Shards:
    """The parameters of a model that lies on several ranks."""
    return Shards(
        model,
        pipeline,
        reduce_each=recipe.parallel.reduce == "micro_batch",
        gather_once=recipe.parallel.freed_after == "step",
    )


def parameter_groups(recipe: Recipe, family: Family, whole: nn.Module) -> ParameterGroups:
    """How each parameter of the whole model is updated."""
    return group_parameters(
        recipe.optimizer,
        {name: tuple(parameter.shape) for name, parameter in whole.named_parameters()},
        undecayed=family.no_weight_decay(whole),
        matrices=family.matrices(whole),
        embeddings=family.embeddings(whole),
    )


def divided(
    recipe: Recipe,
    family: Family,
    config: Any,
    whole: nn.Module,
    meshes: Meshes | None,
    stages: Stages | None,
    place: Place,
    compute: torch.dtype,
) -> Sequence[LossModule]:
    """The model, on meta, with its loss, divided over tensor ranks and then cut into this rank's stages."""
    exchange = meet_ranks(meshes)

    def build() -> nn.Module:
        model = whole if stages is None else build_on_meta(config)
        if exchange is not None:
            divide(model, family, exchange)
        return model

    if stages is None:
        model = build()
        modules = [LossModule(model, family.hidden, family.head(model), recipe.loss.z_loss)]
    else:
        modules = stage_modules(recipe, family, config, stages, place.pipeline, whole, build, compute)
    if exchange is not None:
        for module in modules:
            module.divide_vocabulary(exchange)
    return modules


def check_fits(recipe: Recipe, world: World, family: Family, config: Any, layout: Layout) -> Stages | None:
    """The stages of a pipeline, if there is one. Raises RecipeError where model, data or what else the recipe
    asks for do not go with the layout."""
    check_layout(family, config, layout, recipe.parallel.context_method)
    check_lengths((stage.sequence_length for stage in recipe.plan.stages), layout)
    check_validation(recipe, layout)
    return pipeline_stages(recipe, world, recipe.plan, family, config, layout)


def check_validation(recipe: Recipe, layout: Layout) -> None:
    """Raises RecipeError where a validation calls the model itself, of which no rank has all."""
    asking = {
        "validation.prompts": bool(recipe.validation.prompts),
        "validation.hook": recipe.validation.hook is not None,
    }
    asked = [name for name, is_asked in asking.items() if is_asked and recipe.validation.every is not None]
    for way, does in (("tensor", "divides"), ("pipeline", "shares out")):
        if asked and (size := getattr(layout, way)) > 1:
            raise RecipeError(
                f"{asked[0]}: needs a whole model on each rank, which parallel.{way} = {size} {does}; "
                "leave one of them out, or use parallel.shard"
            )


def build_model(path: str, config: Any) -> nn.Module:
    """The model on meta. Raises ModelError where its own code refuses the config."""
    try:
        return build_on_meta(config)
    except FlameError:
        raise
    except Exception as error:  # a guest's constructor raises whatever it likes
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: the model cannot be built from this config: {reason}; mend it") from error
