"""A rank's kernels, made ready before its first step: known choices, parallel compiling, one rehearsal."""

from __future__ import annotations

import logging
import os
import time
import tomllib
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flame import schema
from flame.batch import IGNORED
from flame.data.plan import DataPlan
from flame.models.family import Family
from flame.models.kernel_choices import Choices
from flame.models.kernel_compiler import Compiler
from flame.models.kernel_platform import (
    ask_for_gpu,
    check_kernels,
    choice_folders,
    compiled_parts,
    platform_of,
    use_compiled_folders,
    user_folder,
)
from flame.models.kernels import Tuner, installed
from flame.models.registry import family_of
from flame.origin import model_config
from flame.parallel.world import World
from flame.recipe import FILE, Recipe
from flame.train.config import OptimizerConfig
from flame.train.groups import group_parameters
from flame.train.lifeline import die_with_parent
from flame.train.optimizer import build_optimizer
from flame.train.rehearsal import forward_backward, made_up_batch, small_model
from flame.train.step import train_step

AUTO_TOKENS = 65536  # of a micro-batch on a GPU, where micro_batch_rows is auto
RUN_FOLDER = "kernels"  # in a run directory: the choices that the run was trained with
WARM_STEPS = 3
OFF_VARIABLE = "FLAME_KERNELS"  # "plain" leaves Triton's autotuners as they are
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a stage's micro-batches."""

    rows: int
    length: int
    longest: int  # of a document's pieces


@contextmanager
def kernels_of(world: World, run: Path | None) -> Generator[Tuner | None]:
    """Within, this rank's autotuned kernels are chosen as rank 0's. None on a CPU, or where switched off.

    Choices of the run itself go first, so that a resumed run computes as before; then the user's, then
    flame's. New ones are written to the run's and the user's folder.
    """
    if world.device.type != "cuda" or os.environ.get(OFF_VARIABLE) == "plain":
        yield None
        return
    platform = platform_of(world.device)
    use_compiled_folders(platform)
    mine, shipped = choice_folders(platform)
    run_own = run / RUN_FOLDER / platform.folder if run is not None else None
    folders = [folder for folder in (run_own, mine, shipped) if folder is not None]
    known = world.from_rank_zero(lambda: Choices.read(folders).known)
    save_to: list[Path] = []
    if world.local_rank == 0:
        save_to = [mine] if world.rank or run_own is None else [run_own, mine]
    choices = Choices(known, save_to)
    if world.rank == 0 and run_own is not None and known:
        choices.write(run_own, platform.triton)
    store = world.store if world.size > 1 else None
    compiler = compiler_of(world.local_rank)
    tuner = Tuner(choices, compiler, platform.triton, rank=world.rank, store=store)
    with installed(tuner):
        yield tuner


def compiler_of(local_rank: int) -> Compiler:
    """One rank of a node compiles for all on all cores; what the others meet alone they compile on few."""
    cores = len(os.sched_getaffinity(0))
    return Compiler(cores if local_rank == 0 else max(1, cores // 8), die_with_parent)


def shapes_of(plan: DataPlan, rows: list[int]) -> list[Shape]:
    """The micro-batches of a plan's stages; `rows`: of each stage's."""
    return [
        Shape(n, stage.sequence_length, stage.max_document_length)
        for n, stage in zip(rows, plan.stages, strict=True)
    ]


def fresh_micro_batch_rows(recipe: Recipe, plan: DataPlan, ranks: int, device: torch.device) -> list[int]:
    """The same for a run that has no checkpoint.

    On a CPU it is one row, so that a row's gradient is the same bits whichever rank has it.
    """
    if recipe.batch.micro_batch_rows is not None:
        return [recipe.batch.micro_batch_rows] * len(plan.stages)
    if device.type == "cpu":
        return [1] * len(plan.stages)
    return [
        max(1, min(-(-stage.rows_per_step // ranks), AUTO_TOKENS // stage.sequence_length))
        for stage in plan.stages
    ]


def compute_dtype(recipe: Recipe, device: torch.device) -> torch.dtype:
    """bfloat16 on GPUs, float32 on CPU, unless the recipe says otherwise."""
    default = "bfloat16" if device.type == "cuda" else "float32"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[recipe.precision.compute or default]


def rehearse(
    tuner: Tuner, world: World, family: Family, config: Any, compute: torch.dtype, shapes: list[Shape]
) -> None:
    """Sends all that the first step needs to be compiled, on one rank of each node."""
    if world.local_rank != 0:
        return
    begun = time.monotonic()
    list_kernels(tuner, world.device, family, config, compute, shapes)
    if world.rank == 0 and tuner.compiler.compiled:
        print(
            f"compiling {tuner.compiler.compiled} kernel candidates in {tuner.compiler.processes} processes "
            f"(listed in {time.monotonic() - begun:.1f} s)",
            flush=True,
        )


def list_kernels(
    tuner: Tuner, device: torch.device, family: Family, config: Any, compute: torch.dtype, shapes: list[Shape]
) -> None:
    """Runs a thinned model without launching a kernel, so that they are compiled in the background. A model
    whose code does not stand it is left to be compiled as it runs."""
    try:
        # blocks that torch compiles call their kernels through inductor, which compiles in parallel by itself
        model, _ = small_model(config, family, compute, device, compile_blocks=False)
        with tuner.rehearsing():
            for shape in dict.fromkeys(shapes):
                batch = made_up_batch(shape.rows, shape.length, shape.longest, config.vocab_size, device)
                forward_backward(model, batch)
    except Exception as error:  # a guest's code raises whatever it likes: training shows whether it matters
        _log.warning("kernels are compiled as they are needed: %s: %s", type(error).__name__, error)
        tuner.announce()
    torch.cuda.empty_cache()


def prepare(text: str, ranks: int | None) -> dict[str, Any]:
    """Makes all kernels ready that a recipe needs on one of `ranks` GPUs (default: this machine's), by
    training a thinned model for a few steps; what was done, how long it took, and where it lies.

    Raises FlameError without a GPU, or where the model cannot be trained on it.
    """
    begun = time.monotonic()
    ask_for_gpu()
    device = torch.device("cuda", 0)
    recipe = schema.build(Recipe, tomllib.loads(text), FILE)
    config = model_config(recipe)
    for note in check_kernels([config.model_type], device):
        print(note, flush=True)
    platform = platform_of(device)
    use_compiled_folders(platform)
    mine, shipped = choice_folders(platform)
    choices = Choices.read([mine, shipped], [mine])
    if choices.known:
        choices.write(mine, platform.triton)
    tuner = Tuner(choices, compiler_of(0), platform.triton)
    with installed(tuner):
        first = _train_thinned(recipe, config, tuner, ranks or torch.cuda.device_count(), begun)
    return {
        "gpu": platform.gpu,
        "folder": str(user_folder(platform)),
        "compiled": {part: str(path) for part, path in compiled_parts(platform).items()},
        "first_step_seconds": first,
        "seconds": time.monotonic() - begun,
        "processes": tuner.compiler.processes,
        "submitted": tuner.compiler.compiled,
        "tuned": [
            {
                "kernel": tuned.key.kernel,
                "candidates": tuned.candidates,
                "waited_seconds": round(tuned.compile_seconds, 2),
                "timing_seconds": round(tuned.timing_seconds, 2),
            }
            for tuned in tuner.tuned
        ],
    }


def _train_thinned(recipe: Recipe, config: Any, tuner: Tuner, ranks: int, begun: float) -> float:
    """Seconds from `begun` to the end of the first step. Further steps have other documents, which compiled
    blocks may be compiled for again."""
    device, family = torch.device("cuda", 0), family_of(config)
    compute = compute_dtype(recipe, device)
    if compute == torch.bfloat16:
        torch.set_float32_matmul_precision("high")
    compiled = family.compiles if recipe.model.compile is None else recipe.model.compile
    plan = recipe.plan
    shapes = list(dict.fromkeys(shapes_of(plan, fresh_micro_batch_rows(recipe, plan, ranks, device))))
    list_kernels(tuner, device, family, config, compute, shapes)
    model, shards = small_model(config, family, compute, device, compile_blocks=compiled)
    # the recipe's own optimizer has no kernels to prepare, and its patterns may name layers that are not here
    groups = group_parameters(
        OptimizerConfig(),
        {piece.name: tuple(piece.parameter.shape) for piece in shards.pieces},
        undecayed=family.no_weight_decay(model.get_submodule("guest")),
    )
    optimizer = build_optimizer(shards, OptimizerConfig(), groups, fused=True)
    first: float | None = None
    for step in range(WARM_STEPS):
        for shape in shapes:
            batch = made_up_batch(
                shape.rows, shape.length, shape.longest, config.vocab_size, device, seed=step
            )
            predicted = int((batch.labels != IGNORED).sum())
            train_step(
                model,
                shards,
                optimizer,
                [batch],
                predicted=predicted,
                clip_norm=recipe.optimizer.clip_norm,
                seed=(recipe.run.seed, step),
            )
            torch.cuda.synchronize()
            first = first or time.monotonic() - begun
    return first or 0.0
