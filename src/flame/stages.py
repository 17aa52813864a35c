"""A recipe's pipeline: whether it can be, and the stages that this rank has of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from flame.data.loader import rows_of_rank
from flame.data.plan import DataPlan
from flame.errors import RecipeError
from flame.kernels import fresh_micro_batch_rows
from flame.models.family import Family
from flame.parallel.mesh import Layout
from flame.parallel.pipeline import Part, Stages, check_micro_batches, plan_stages, split_blocks
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.pipeline import StageModule


def pipeline_stages(
    recipe: Recipe, world: World, plan: DataPlan, family: Family, config: Any, layout: Layout
) -> Stages | None:
    """The stages of a pipeline, None where there is none.

    Raises RecipeError where the model, its compiling or the steps do not fit the schedule.
    """
    stages = plan_stages(recipe.parallel, family, config, layout)
    if stages is None:
        return None
    if recipe.model.compile and stages.order.splits_backward:
        raise RecipeError(
            f"model.compile: true, but the schedule {stages.schedule} takes the backward pass of a block "
            "apart, which a compiled one does not stand; leave it out, or use 1f1b or interleaved"
        )
    rows = fresh_micro_batch_rows(recipe, plan, layout.data_ranks, world.device, stages.count)
    most = [len(rows_of_rank(plan, stage, 0, layout.data_ranks)) for stage in plan.stages]
    note = check_micro_batches(stages, [-(-n // size) for n, size in zip(most, rows, strict=True)])
    if note is not None and world.rank == 0:
        print(note, flush=True)
    return stages


def compiles(recipe: Recipe, family: Family, stages: Stages | None, device: torch.device) -> bool:
    """Whether blocks are compiled."""
    if recipe.model.compile is not None:
        return recipe.model.compile
    apart = stages is not None and stages.order.splits_backward
    return family.compiles and device.type == "cuda" and not apart


def stage_modules(
    recipe: Recipe,
    family: Family,
    config: Any,
    stages: Stages,
    rank: int,
    whole: nn.Module,
    build: Callable[[], nn.Module],
    compute: torch.dtype,
) -> list[StageModule]:
    """The stages of one rank of the pipeline. `whole`: the model on meta; `build` gives such a one each time
    anew, divided over tensor ranks where there are some."""
    counts = split_blocks(family, whole, stages, recipe.parallel.pipeline_split)
    return [
        StageModule(
            Part(build(), family, config, counts, stage, tensor=recipe.parallel.tensor),
            family,
            compute,
            recipe.loss.z_loss,
            backward_twice=stages.order.splits_backward,
        )
        for stage in stages.of(rank)
    ]
