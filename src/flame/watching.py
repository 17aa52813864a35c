"""Who watches the steps of a run: for bad ones, for copies of the model that differ, and for slow ranks."""

from __future__ import annotations

from typing import Any

from flame.data.plan import DataPlan
from flame.guest import Guest
from flame.parallel.pipeline import Parts, present_blocks
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.checkpoint import Checkpointer
from flame.train.health import Health
from flame.train.pace import Pace
from flame.train.replicas import Replicas
from flame.train.rollback import Guard, Skipped


def guard_of(
    recipe: Recipe,
    world: World,
    guest: Guest,
    plan: DataPlan,
    skipped: Skipped,
    checkpointer: Checkpointer,
    *,
    health: dict[str, Any],
    begun: int,
) -> Guard:
    """Against bad steps. `health`: what a checkpoint holds of it. `begun`: the step that a run without a
    checkpoint of its own goes back to."""

    def stage_of(step: int) -> int:
        return plan.stage_number(plan.window_at(step)[0])

    return Guard(
        run=recipe.directory,
        rank=world.rank,
        health=Health(recipe.recovery, world.control, stage_of, health, counts_loss=guest.place.tensor == 0),
        skipped=skipped,
        first_row=plan.first_row,
        most=recipe.recovery.max_rollbacks,
        wait=checkpointer.wait,
        begun=begun,
    )


def replicas_of(recipe: Recipe, world: World, guest: Guest, checkpointer: Checkpointer) -> Replicas | None:
    """For the copies of the model, where that is asked for and there are several."""
    every = recipe.recovery.check_replicas
    if every is None:
        return None
    if guest.layout.replicate == 1:
        if world.rank == 0:
            print("note: recovery.check_replicas: with parallel.replicate = 1 there is nothing to compare")
        return None
    return Replicas(
        recipe.directory,
        guest.shards,
        world.control,
        every=every,
        most=recipe.recovery.max_rollbacks,
        wait=checkpointer.wait,
        place=(guest.place.tensor, guest.place.pipeline),
    )


def pace_of(recipe: Recipe, world: World, guest: Guest) -> Pace | None:
    """For slow ranks, where there are several ranks."""
    factor, window = recipe.recovery.straggler_factor, int(recipe.recovery.straggler_window.amount)
    if world.size == 1 or factor <= 0:
        return None
    parts = guest.model.parts if isinstance(guest.model, Parts) else [guest.model]
    return Pace(
        recipe.directory,
        world.control,
        world.device,
        [block for part in parts for block in present_blocks(guest.family, part)],
        window=window,
        factor=factor,
        stage=guest.place.pipeline,
    )
