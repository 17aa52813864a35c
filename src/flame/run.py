"""One rank of a run: where data meets model. Everything is built here, then `train.loop` drives it."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import orjson
import torch
import torch.distributed as dist
from torch import nn

from flame import schema
from flame.batch import Counts
from flame.data.catalog import Catalog, check_skipped, fingerprint, open_catalog
from flame.data.changes import rejoin
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.environment import device_name, environment
from flame.errors import DataError, Exit, FlameError, ModelError
from flame.kernels import compute_dtype, fresh_micro_batch_rows, kernels_of, rehearse, shapes_of
from flame.models.build import build_on_meta, initialize
from flame.models.family import Family
from flame.models.flops import peak_flops
from flame.models.kernel_platform import check_kernels
from flame.models.kernels import Tuner
from flame.models.registry import family_of, load_config
from flame.parallel.apply import apply_parallelism
from flame.parallel.fsdp import settle
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import World, join_world
from flame.recipe import FILE, Recipe, refuse_other_run
from flame.train.agreement import Agreement
from flame.train.checkpoint import Checkpointer, load_tensors, newest_sound
from flame.train.journal import Journal, RunLock, SkipLog, event, replace_file
from flame.train.keeping import read_record, remove_leftovers, step_directory
from flame.train.loop import Job, Progress, train
from flame.train.loss import LossModule
from flame.train.metrics import Meter, Screen
from flame.train.optimizer import build_optimizer
from flame.train.rollback import Guard, RolledBack, RowsLeft, Skipped, set_aside
from flame.train.schedule import Schedule
from flame.train.shards import Shards, WholeModel


def work(stop: Callable[[], bool], recipe_text: str) -> int:
    """Trains the recipe as this rank; the exit code. Raises FlameError for what the user can mend."""
    recipe = schema.build(Recipe, tomllib.loads(recipe_text), FILE)
    share_cores()
    world = join_world()
    held: list[RunLock] = []
    world.from_rank_zero(lambda: take_directory(recipe, held))
    quiet_other_ranks(recipe, world)
    with kernels_of(world, recipe.directory) as tuner:
        while (code := run_rank(recipe, world, stop, tuner)) is None:
            gc.collect()  # the next model needs the memory of this one
    dist.destroy_process_group()
    for lock in held:
        lock.release()
    return code


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
    remove_leftovers(recipe.directory)


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
    config = load_config(recipe.model.config, recipe.model.module)
    for note in check_kernels([config.model_type], world.device):
        if world.rank == 0:
            print(note, flush=True)
    data = open_data(recipe, world)
    guest = build_guest(recipe, world, data.catalog, config)
    skipped = world.from_rank_zero(lambda: set_aside(recipe.directory))
    step = newest_sound(recipe.directory, world.checkpoint)
    saved = Saved()
    if step is not None:
        data, state = rejoin_data(recipe, world, data, step)
        saved = load_saved(recipe, world, guest, state, step)
    total = recipe.total_steps
    if total is not None and saved.progress.step >= total:
        if world.rank == 0:
            print(f"{recipe.directory} is finished: step {saved.progress.step} of {total}")
        return Exit.DONE

    rows = micro_batch_rows(recipe, data.plan, world, saved)
    begin(recipe, world, guest, saved)
    if tuner is not None:
        rehearse(tuner, world, guest.family, guest.config, guest.compute, shapes_of(data.plan, rows))
    journal, screen = None, None
    if world.rank == 0:
        journal = Journal(recipe.directory, saved.progress.step, tensorboard=recipe.logging.tensorboard)
        screen = Screen(total, saved.progress.step)
    with Loader(data.catalog, data.plan, world.rank, world.size, rows, saved.data) as loader:
        try:
            return train(
                make_job(recipe, world, stop, guest, data, saved, skipped, loader, rows, journal, screen)
            )
        except RolledBack:
            return None
        finally:
            if journal is not None and screen is not None:
                screen.close()
                journal.close()


# ---------------------------------------------------------------------------------------- data


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


def rejoin_data(recipe: Recipe, world: World, data: Data, step: int) -> tuple[Data, DataState]:
    """The data as the run knows them, and its place in them. Raises DataError where they are others."""
    state = DataState.from_json(read_record(recipe.directory, step, "data.json"))

    def look() -> tuple[Data, DataState]:
        try:
            found = rejoin(data.catalog, data.plan, state, accept=recipe.data.accept_changed_sources)
        except DataError as error:
            raise DataError(f"{recipe.directory} was started with other data: {error}") from None
        if found.changes:
            event(recipe.directory, "sources_changed", step=step, changes=found.changes)
        return Data(data.plan, found.catalog, fingerprint(found.catalog, data.plan)), found.state

    return world.from_rank_zero(look)


def micro_batch_rows(recipe: Recipe, plan: DataPlan, world: World, saved: Saved) -> list[int]:
    """Rows of a micro-batch, for each stage of the data. `auto` is resolved once and kept while the number
    of ranks is the same."""
    if (
        saved.ranks == world.size
        and saved.micro_batch_rows is not None
        and recipe.batch.micro_batch_rows is None
    ):
        return saved.micro_batch_rows
    return fresh_micro_batch_rows(recipe, plan, world.size, world.device)


# --------------------------------------------------------------------------------------- model


@dataclass(frozen=True)
class Guest:
    """The model as this rank holds it, and how to train it."""

    config: Any
    family: Family
    model: nn.Module  # as transformers knows it; its parameters are sharded
    with_loss: LossModule
    shards: Shards
    optimizer: torch.optim.Optimizer
    compute: torch.dtype


def build_guest(recipe: Recipe, world: World, catalog: Catalog, config: Any) -> Guest:
    """The model, parallelised, with its initial weights and its optimizer."""
    origin = recipe.model.module or recipe.model.config
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
    with_loss = LossModule(model, family.hidden, family.head(model))
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
    optimizer = build_optimizer(shards, recipe.optimizer, family.no_weight_decay(model), fused=on_gpu)
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


# -------------------------------------------------------------------------------------- resume


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says besides its tensors; a fresh run's is empty."""

    progress: Progress = field(default_factory=Progress)
    data: DataState | None = None
    micro_batch_rows: list[int] | None = None  # for each stage of the data
    ranks: int | None = None


def load_saved(recipe: Recipe, world: World, guest: Guest, state: DataState, step: int) -> Saved:
    """Loads a checkpoint. Raises FlameError where it belongs to another model."""
    train_record = read_record(recipe.directory, step, "train.json")
    extra = {key: train_record.pop(key) for key in ("micro_batch_rows", "ranks", "model")}
    for name, old, new in differing(extra["model"], model_record(guest.config)):
        raise ModelError(
            f"{recipe.directory} was started with another model: {name} is {old!r} there and {new!r} "
            f"in {recipe.model.module or recipe.model.config}"
        )
    path = step_directory(recipe.directory, step)
    load_tensors(guest.model, guest.shards, guest.optimizer, path, world.checkpoint)
    return Saved(Progress(**train_record), state, extra["micro_batch_rows"], extra["ranks"])


def model_record(config: Any) -> dict[str, Any]:
    """The config as a checkpoint keeps it; what transformers notes of itself does not count."""
    record = cast("dict[str, Any]", orjson.loads(config.to_json_string(use_diff=False)))
    for name in ("transformers_version", "_name_or_path", "architectures", "dtype"):
        record.pop(name, None)
    return record


def differing(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """The keys in which two records differ. Keys that one of them lacks came with another version."""
    return [(key, old[key], new[key]) for key in sorted(old.keys() & new.keys()) if old[key] != new[key]]


# ------------------------------------------------------------------------------------ assembly


def begin(recipe: Recipe, world: World, guest: Guest, saved: Saved) -> None:
    """Writes down who trains what, where."""
    pids = world.gather(os.getpid())
    if world.rank != 0:
        return
    run, step = recipe.directory, saved.progress.step
    replace_file(run / FILE, schema.to_toml(recipe).encode())
    described = environment(world.device)
    replace_file(run / "environment.json", orjson.dumps(described, option=orjson.OPT_INDENT_2))
    name = "resume" if step else "start"
    event(run, name, step=step, ranks=world.size, host=socket.gethostname(), pids=pids)
    parameters = sum(p.numel() for p in guest.model.parameters())
    print(
        f"{'resuming after step ' + str(step) if step else 'starting'}: {guest.family.name}, "
        f"{parameters:,} parameters, {world.size} rank(s) on {described['device']}",
        flush=True,
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
) -> Job:
    """Puts the pieces into the loop's hands."""
    per = guest.family.flops(guest.config)
    peak = peak_flops(device_name(world.device), guest.compute)
    columns = loader.columns
    keeping = recipe.checkpoint.keep, recipe.checkpoint.keep_every
    checkpointer = Checkpointer(recipe.directory, world.checkpoint, *keeping)
    guard = Guard.of(recipe.recovery, checkpointer, world.control, data.plan, skipped, saved.progress.health)

    def data_record(step: int, lanes: Any) -> dict[str, Any]:
        state = DataState(step, lanes, columns, data.fingerprint)
        return {**state.to_json(), "skipped_rows": skipped.to_json()}

    def flops(counts: Counts) -> float:
        return per.per_token * counts.tokens + per.per_pair * counts.attended

    return Job(
        run=recipe.directory,
        seed=recipe.run.seed,
        total_steps=recipe.total_steps,
        clip_norm=recipe.optimizer.clip_norm,
        checkpoint_every=recipe.checkpoint.every,
        logging_every=recipe.logging.every,
        guest=guest.model,
        model=guest.with_loss,
        device=world.device,
        shards=guest.shards,
        optimizer=guest.optimizer,
        schedule=Schedule.of(recipe.schedule, recipe.optimizer, recipe.total_steps, data.plan.steps_of),
        rows=RowsLeft(loader.next_step, skipped),
        agreement=Agreement(world.control, world.rank, len(recipe.data.sources)),
        checkpointer=checkpointer,
        meter=Meter(
            flops=flops,
            peak_flops=peak * world.size if peak is not None else None,
            device=world.device,
            updates_skipped=saved.progress.updates_skipped,
            sources=[source.name for source in data.catalog.sources],
            journal=journal,
            screen=screen,
        ),
        skip_log=SkipLog(recipe.directory),
        rank=world.rank,
        progress=saved.progress,
        guard=guard,
        should_stop=stop,
        check_records=lambda total: check_skipped(data.catalog, total, recipe.data.max_skipped_fraction),
        data_record=data_record,
        extra_record={
            "micro_batch_rows": rows,
            "ranks": world.size,
            "model": model_record(guest.config),
        },
    )
