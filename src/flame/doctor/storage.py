"""Where checkpoints go: whether there is room for them, and how fast they are written."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from flame.doctor.finding import Finding, fail, ok, warn
from flame.recipe import Recipe
from flame.train.checkpoint import saved_steps, step_directory

WRITTEN = 64 * 2**20  # bytes, to time the disk
PATIENCE_SECONDS = 300  # for one checkpoint
CLOCKS_APART_SECONDS = 10
SPARE = 2**30
RECORDS = 8 * 2**20  # of a checkpoint besides its tensors


def checkpoint_bytes(parameters: int, recipe: Recipe) -> int:
    """At most what one checkpoint takes: float32 weights, the optimizer's state and the average."""
    moments = 1 if recipe.optimizer.name == "sgd" else 2  # Muon's matrices have one
    return 4 * parameters * (1 + moments + (recipe.optimizer.ema is not None)) + RECORDS


def needed_bytes(parameters: int, recipe: Recipe) -> int:
    """What a run still needs: checkpoints kept, one being written, and exports, less those that are there."""
    kept = recipe.checkpoint.keep
    exports = int(recipe.export.at_end)
    if recipe.export.every is not None:
        exports += recipe.export.keep or 1
    there = sum(
        file.stat().st_size
        for step in saved_steps(recipe.directory)
        for file in step_directory(recipe.directory, step).iterdir()
        if file.is_file()
    )
    width = 4 if recipe.export.dtype == "float32" else 2
    whole = (kept + 1) * checkpoint_bytes(parameters, recipe) + exports * width * parameters
    return max(0, whole - there)


def existing(path: Path) -> Path:
    """The path, or what of it there is."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def storage(path: Path, recipe: Recipe | None, parameters: int | None) -> Iterator[Finding]:
    """The disk under `path`. `parameters`: of the recipe's model, where it is known."""
    folder = existing(path.absolute())
    try:
        speed, apart = written(folder)
    except OSError as error:
        fix = "choose another run.directory, or mend it"
        yield fail("disk", f"{folder} cannot be written: {error.strerror}", fix)
        return
    free = shutil.disk_usage(folder).free
    yield room(folder, free, recipe, parameters)
    yield pace(folder, speed, recipe, parameters)
    if abs(apart) > CLOCKS_APART_SECONDS:
        yield warn(
            "clock of the disk",
            f"{folder} is {apart:+.0f} s from this machine's clock",
            "synchronise the file server and this machine: chronyd on both",
        )


def room(folder: Path, free: int, recipe: Recipe | None, parameters: int | None) -> Finding:
    """Whether there is space for what the recipe keeps."""
    found = f"{free / 2**30:.1f} GiB free at {folder}"
    if recipe is None or parameters is None:
        return (
            ok("disk space", found)
            if free > SPARE
            else warn("disk space", found, "make room for checkpoints")
        )
    needed = needed_bytes(parameters, recipe)
    found += (
        f"; {recipe.checkpoint.keep} checkpoints and one being written need up to {needed / 2**30:.1f} GiB"
    )
    if free < needed:
        return fail("disk space", found, "free space, lower checkpoint.keep, or choose another run.directory")
    if free < needed + SPARE:
        return warn("disk space", found, "free some space: a full disk loses checkpoints")
    return ok("disk space", found)


def pace(folder: Path, speed: float, recipe: Recipe | None, parameters: int | None) -> Finding:
    """Whether a checkpoint is written in good time."""
    found = f"{speed / 1e6:,.0f} MB/s written at {folder}"
    if recipe is None or parameters is None:
        return ok("disk speed", found)
    seconds = checkpoint_bytes(parameters, recipe) / speed
    found += f", so a checkpoint takes up to {seconds:,.0f} s of one writer"
    if seconds > PATIENCE_SECONDS:
        return warn(
            "disk speed", found, "choose a faster disk as run.directory, or a longer checkpoint.every"
        )
    return ok("disk speed", found)


def written(folder: Path) -> tuple[float, float]:
    """Bytes per second written and synced, and how far the disk's clock is ahead of ours in seconds."""
    block = os.urandom(2**20)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".flame-doctor-") as file:
        began = time.perf_counter()
        for _ in range(WRITTEN // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - began
        return WRITTEN / seconds, os.fstat(file.fileno()).st_mtime - time.time()
