"""One rank of a run: where data meets model. Everything is built here, then `train.loop` drives it."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tomllib
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import orjson
import torch
import torch.distributed as dist

from flame import schema
from flame.batch import Counts
from flame.data.catalog import check_skipped
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.determinism import be_deterministic, naming_kernels
from flame.environment import device_name, environment
from flame.errors import Exit
from flame.exports import export_finished, exporter_of
from flame.guest import Guest, build_guest
from flame.held_out import make_validation
from flame.kernels import fresh_micro_batch_rows, kernels_of, rehearse, shapes_of
from flame.models.flops import peak_flops
from flame.models.kernel_platform import check_kernels
from flame.models.kernels import Tuner
from flame.models.matching import config_record
from flame.origin import in_words, model_config
from flame.parallel.context import PartOfRows
from flame.parallel.world import World, join_world
from flame.recipe import FILE, Recipe, refuse_other_run
from flame.resuming import Data, Saved, begin_anew, load_saved, open_data, rejoin_data
from flame.train.agreement import Agreement
from flame.train.checkpoint import Checkpointer, newest_sound
from flame.train.exporter import remove_unfinished
from flame.train.groups import FILE as GROUPS_FILE
from flame.train.journal import Journal, RunLock, SkipLog, event, replace_file
from flame.train.keeping import remove_leftovers, saved_steps
from flame.train.loop import Job, train
from flame.train.metrics import Meter, Screen
from flame.train.mirror import Mirror
from flame.train.rollback import RolledBack, RowsLeft, Skipped, set_aside
from flame.train.schedule import Schedule
from flame.train.trackers import Trackers
from flame.train.validation import Validation
from flame.watching import guard_of, pace_of, replicas_of


def work(stop: Callable[[], bool], recipe_text: str) -> int:
    """Trains the recipe as this rank; the exit code. Raises FlameError for what the user can mend."""
    recipe = schema.build(Recipe, tomllib.loads(recipe_text), FILE)
    share_cores()
    if recipe.run.deterministic:
        be_deterministic()
    world = join_world()
    held: list[RunLock] = []
    try:
        world.from_rank_zero(lambda: take_directory(recipe, held))
        quiet_other_ranks(recipe, world)
        with naming_kernels(), kernels_of(world, recipe.directory) as tuner:
            while (code := run_rank(recipe, world, stop, tuner)) is None:
                gc.collect()  # the next model needs the memory of this one
        dist.destroy_process_group()
        return code
    finally:
        for lock in held:
            lock.release()


def share_cores() -> None:
    """Gives each of this machine's ranks its part of the cores, unless the user has said otherwise."""
    mine = str(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    os.environ.setdefault("RAYON_NUM_THREADS", mine)  # the tokenizer's threads
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(mine))


def take_directory(recipe: Recipe, held: list[RunLock]) -> None:
    """Rank 0 makes the run directory its own."""
    held.append(RunLock(recipe.directory))
    refuse_other_run(recipe)
    mirror = mirror_of(recipe)
    if mirror is not None and not saved_steps(recipe.directory):
        mirror.fetch(lambda: refuse_other_run(recipe))
    remove_leftovers(recipe.directory)
    remove_unfinished(recipe.directory)


def mirror_of(recipe: Recipe) -> Mirror | None:
    """Who keeps a copy of the checkpoints elsewhere, where that is asked for."""
    url = recipe.checkpoint.upload
    return None if url is None else Mirror(recipe.directory, url)


def quiet_other_ranks(recipe: Recipe, world: World) -> None:
    """Every rank but 0 says what it has to say in RUN/logs/rank-N.log."""
    if world.rank == 0:
        return
    path = recipe.directory / "logs" / f"rank-{world.rank}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(log, stream.fileno())
    os.close(log)


def run_rank(recipe: Recipe, world: World, stop: Callable[[], bool], tuner: Tuner | None) -> Exit | None:
    """Builds data and model, loads what was saved, and trains. None where the run has gone back before a
    bad step and goes on from there."""
    config = model_config(recipe)
    for note in check_kernels([config.model_type], world.device):
        if world.rank == 0:
            print(note, flush=True)
    data = open_data(recipe, world)
    guest = build_guest(recipe, world, data.catalog, config)
    skipped = world.from_rank_zero(lambda: set_aside(recipe.directory))
    step = newest_sound(recipe.directory, world.checkpoint)
    if step is not None:
        data, state = rejoin_data(recipe, world, data, recipe.directory, step)
        saved = load_saved(recipe, world, guest, state, step)
    else:
        data, saved, skipped = begin_anew(recipe, world, guest, data, skipped)
    total = recipe.total_steps
    if saved.resumed and total is not None and saved.progress.step >= total:
        if world.rank == 0:
            print(f"{recipe.directory} is finished: step {saved.progress.step} of {total}")
            export_finished(recipe, saved.progress.step)
        return Exit.DONE

    rows = micro_batch_rows(recipe, data.plan, guest, world.device, saved)
    validation = make_validation(recipe, world, guest, data.catalog, data.plan, rows[0])
    begin(recipe, world, guest, saved)
    if tuner is not None:
        shapes = shapes_of(data.plan, rows)
        rehearse(tuner, world, guest.family, guest.config, guest.compute, shapes, guest.layout.tensor)
    trackers = begin_trackers(recipe, world, saved)
    journal, screen = None, None
    if world.rank == 0:
        journal = Journal(
            recipe.directory,
            saved.progress.step,
            tensorboard=recipe.logging.tensorboard,
            trackers=trackers,
        )
        screen = Screen(total, saved.progress.step)
    if validation is not None:
        validation.journal = journal
    data_rank, data_ranks = guest.place.data, guest.layout.data_ranks
    with Loader(data.catalog, data.plan, data_rank, data_ranks, rows, saved.data) as loader:
        try:
            job = make_job(
                recipe, world, stop, guest, data, saved, skipped, loader, rows, journal, screen, validation
            )
            try:
                return train(job)
            except RolledBack:
                job.exporter.abandon()
                job.checkpointer.uploaded()
                return None
        finally:
            if journal is not None and screen is not None:
                screen.close()
                journal.close()


def micro_batch_rows(
    recipe: Recipe, plan: DataPlan, guest: Guest, device: torch.device, saved: Saved
) -> list[int]:
    """Rows of a micro-batch, for each stage of the data. `auto` is resolved once and kept while the layout
    is the same."""
    if (
        saved.layout == guest.layout
        and saved.micro_batch_rows is not None
        and recipe.batch.micro_batch_rows is None
    ):
        return saved.micro_batch_rows
    stages = guest.stages.count if guest.stages is not None else 0
    return fresh_micro_batch_rows(recipe, plan, guest.layout.data_ranks, device, stages)


# ------------------------------------------------------------------------------------ assembly


def begin(recipe: Recipe, world: World, guest: Guest, saved: Saved) -> None:
    """Writes down who trains what, where."""
    pids = world.gather(os.getpid())
    if world.rank != 0:
        return
    run, step = recipe.directory, saved.progress.step
    replace_file(run / FILE, schema.to_toml(recipe).encode())
    described = {**environment(world.device), "origin": saved.origin}
    replace_file(run / "environment.json", orjson.dumps(described, option=orjson.OPT_INDENT_2))
    name = "resume" if saved.resumed else "start"
    told = {"origin": saved.origin} if saved.origin is not None and not saved.resumed else {}
    event(run, name, step=step, ranks=world.size, host=socket.gethostname(), pids=pids, **told)
    print(
        f"{f'resuming after step {step}' if saved.resumed else in_words(saved.origin)}: "
        f"{guest.family.name}, {guest.size:,} parameters, {world.size} rank(s) on {described['device']}",
        flush=True,
    )
    groups = guest.optimizer.groups
    replace_file(run / GROUPS_FILE, orjson.dumps(groups.records(), option=orjson.OPT_INDENT_2))
    if recipe.optimizer.groups or recipe.optimizer.name == "muon":
        print(groups.table(), flush=True)


def begin_trackers(recipe: Recipe, world: World, saved: Saved) -> Trackers | None:
    """Those of rank 0, if the recipe names any. Raises RecipeError on every rank."""
    begun: list[Trackers] = []

    def take() -> None:
        begun.append(Trackers(recipe.directory, recipe.logging, schema.plain(recipe), new=not saved.resumed))

    if recipe.logging.trackers:
        world.from_rank_zero(take)
    return begun[0] if begun else None


def make_meter(
    world: World,
    guest: Guest,
    data: Data,
    saved: Saved,
    journal: Journal | None,
    screen: Screen | None,
) -> Meter:
    """Who counts the steps."""
    per = guest.family.flops(guest.config)
    peak = peak_flops(device_name(world.device), guest.compute)

    def flops(counts: Counts) -> float:
        return per.per_token * counts.tokens + per.per_pair * counts.attended

    return Meter(
        flops=flops,
        peak_flops=peak * world.size if peak is not None else None,
        device=world.device,
        updates_skipped=saved.progress.updates_skipped,
        sources=[source.name for source in data.catalog.sources],
        journal=journal,
        screen=screen,
        counts_loss=guest.place.tensor == 0,
    )


def make_job(
    recipe: Recipe,
    world: World,
    stop: Callable[[], bool],
    guest: Guest,
    data: Data,
    saved: Saved,
    skipped: Skipped,
    loader: Loader,
    rows: list[int],
    journal: Journal | None,
    screen: Screen | None,
    validation: Validation | None,
) -> Job:
    """Puts the pieces into the loop's hands."""
    columns, lanes = loader.columns, data.plan.lanes
    nothing_read = DataState(0, np.zeros((lanes, len(columns)), np.int64), columns, data.fingerprint)
    start = nothing_read if saved.data is None else saved.data
    context = guest.meshes.context if guest.meshes is not None else None
    reader = loader if context is None else PartOfRows(loader, context, recipe.parallel.context_method)
    exporter = exporter_of(recipe, world.rank)
    keeping = recipe.checkpoint.keep, recipe.checkpoint.keep_every
    mirror = mirror_of(recipe) if world.rank == 0 else None
    checkpointer = Checkpointer(recipe.directory, world.checkpoint, *keeping, exporter, mirror)
    health, begun = saved.progress.health, 0 if saved.resumed else saved.progress.step

    def data_record(state: DataState) -> dict[str, Any]:
        return {**state.to_json(), "skipped_rows": skipped.to_json()}

    return Job(
        run=recipe.directory,
        seed=recipe.run.seed,
        total_steps=recipe.total_steps,
        clip_norm=recipe.optimizer.clip_norm,
        checkpoint_every=recipe.checkpoint.every,
        logging_every=recipe.logging.every,
        guest=guest.model,
        model=guest.passes,
        device=world.device,
        shards=guest.shards,
        optimizer=guest.optimizer,
        schedule=Schedule.of(recipe.schedule, recipe.optimizer, recipe.total_steps, data.plan.steps_of),
        rows=RowsLeft(reader.next_step, skipped),
        agreement=Agreement(world.control, world.rank, len(recipe.data.sources), speaks=guest.place.speaks),
        checkpointer=checkpointer,
        exporter=exporter,
        export_every=recipe.export.every,
        meter=make_meter(world, guest, data, saved, journal, screen),
        validation=validation,
        skip_log=SkipLog(recipe.directory),
        rank=world.rank,
        place=guest.place,
        progress=saved.progress,
        guard=guard_of(recipe, world, guest, data.plan, skipped, checkpointer, health=health, begun=begun),
        replicas=replicas_of(recipe, world, guest, checkpointer),
        pace=pace_of(recipe, world, guest),
        beginning=None if saved.resumed else data_record(start),
        should_stop=stop,
        check_records=lambda total: check_skipped(data.catalog, total, recipe.data.max_skipped_fraction),
        data_record=lambda step, lanes: data_record(DataState(step, lanes, columns, data.fingerprint)),
        extra_record={
            "micro_batch_rows": rows,
            "layout": asdict(guest.layout),
            "model": config_record(guest.config),
            "origin": saved.origin,
        },
    )
