"""What a rank goes on from: the data as the run knows them, and what its checkpoint or its beginning says."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from flame.data.catalog import Catalog, fingerprint, open_catalog
from flame.data.changes import rejoin
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.errors import DataError, ModelError
from flame.guest import Guest
from flame.models.matching import config_record, differing
from flame.origin import begin_with, check_origin
from flame.parallel.mesh import Layout
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.checkpoint import load_tensors
from flame.train.journal import event
from flame.train.keeping import read_record, step_directory
from flame.train.loop import Progress
from flame.train.rollback import Skipped, inherit


@dataclass(frozen=True)
class Data:
    """What every rank knows of the data."""

    plan: DataPlan
    catalog: Catalog
    fingerprint: dict[str, Any]


def open_data(recipe: Recipe, world: World) -> Data:
    """Rank 0 looks at the files; the others are told."""
    plan = recipe.plan

    def look() -> tuple[Catalog, dict[str, Any]]:
        catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
        return catalog, fingerprint(catalog, plan)

    catalog, seal = world.from_rank_zero(look)
    return Data(plan, catalog, seal)


def rejoin_data(recipe: Recipe, world: World, data: Data, run: Path, step: int) -> tuple[Data, DataState]:
    """The data as a run (this one, or one that it branches off) knows them, and its place in them. Raises
    DataError where they are others."""
    state = DataState.from_json(read_record(run, step, "data.json"))

    def look() -> tuple[Data, DataState]:
        try:
            found = rejoin(data.catalog, data.plan, state, accept=recipe.data.accept_changed_sources)
        except DataError as error:
            raise DataError(f"{run} was started with other data: {error}") from None
        if found.changes:
            event(recipe.directory, "sources_changed", step=step, changes=found.changes)
        return Data(data.plan, found.catalog, fingerprint(found.catalog, data.plan)), found.state

    return world.from_rank_zero(look)


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says besides its tensors; a fresh run's is empty."""

    progress: Progress = field(default_factory=Progress)
    data: DataState | None = None
    micro_batch_rows: list[int] | None = None  # for each stage of the data
    layout: Layout | None = None
    origin: dict[str, Any] | None = None  # what the run began with, other than fresh weights
    resumed: bool = False  # from a checkpoint of its own


def load_saved(recipe: Recipe, world: World, guest: Guest, state: DataState, step: int) -> Saved:
    """Loads a checkpoint. Raises FlameError where it belongs to another model."""
    train_record = read_record(recipe.directory, step, "train.json")
    origin = train_record.pop("origin", None)
    check_origin(recipe, origin)
    extra = {key: train_record.pop(key, None) for key in ("micro_batch_rows", "ranks", "layout", "model")}
    for name, old, new in differing(extra["model"], config_record(guest.config)):
        raise ModelError(
            f"{recipe.directory} was started with another model: {name} is {old!r} there and {new!r} "
            f"in {recipe.model.module or recipe.model.config or recipe.model.init_from}"
        )
    path = step_directory(recipe.directory, step)
    load_tensors(guest.model, guest.shards, guest.optimizer, path, world.checkpoint)
    layout = saved_layout(extra)
    return Saved(Progress(**train_record), state, extra["micro_batch_rows"], layout, origin, True)


def saved_layout(record: dict[str, Any]) -> Layout | None:
    """The layout that a checkpoint was saved on; older runs wrote down their ranks alone."""
    return Layout(**record["layout"]) if record.get("layout") else None


def begin_anew(
    recipe: Recipe, world: World, guest: Guest, data: Data, skipped: Skipped
) -> tuple[Data, Saved, Skipped]:
    """What a run without a checkpoint of its own begins with: fresh weights, given ones, or another run's.
    Where it goes on in another's data, the rows that one skips are `skipped`, too. Raises FlameError."""
    origin, trunk = begin_with(recipe, world, guest.config, guest.model, guest.shards, guest.optimizer)
    if trunk is None:
        return data, Saved(origin=origin), skipped
    data, state = rejoin_data(recipe, world, data, trunk.run, trunk.step)
    record = read_record(trunk.run, trunk.step, "train.json")
    progress = Progress(**{f.name: record[f.name] for f in fields(Progress) if f.name in record})
    progress.health = {}  # of another model than this, where parts of it begin anew
    skipped = world.from_rank_zero(lambda: inherit(recipe.directory, trunk.run))
    return data, Saved(progress, state, record["micro_batch_rows"], saved_layout(record), origin), skipped
