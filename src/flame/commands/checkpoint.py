"""`flame checkpoint`: a run's checkpoints listed, verified and pruned."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

from flame.errors import CheckpointError, Exit, RecipeError
from flame.recipe import run_recipe
from flame.schema import Duration
from flame.train.checkpoint import problems
from flame.train.journal import RunLock
from flame.train.keeping import MANIFEST, prune, read_record, saved_steps, step_directory

SET_ASIDE = ("partial", "replaced", "rolled-back")  # what else lies there, by the end of its name


def show(run: str) -> Exit:
    """Prints each checkpoint with its size, and what else lies beside them."""
    path = Path(run)
    run_recipe(path)
    for step in saved_steps(path):
        folder = step_directory(path, step)
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / MANIFEST).stat().st_mtime))
        tokens = read_record(path, step, "train.json")["tokens"]
        print(f"step {step:<9} {tokens:>16,} tokens  {size_mib(folder):>10,.1f} MiB  {saved}")
    for folder in beside(path):
        print(f"{folder.name}: {size_mib(folder):,.1f} MiB, not used")
    if not saved_steps(path):
        print(f"{path}: no checkpoint yet")
    return Exit.DONE


def verify(run: str, step: int | None) -> Exit:
    """Reads every file of every checkpoint, or of one. Raises CheckpointError where one is damaged."""
    path = Path(run)
    run_recipe(path)
    steps = saved_steps(path) if step is None else [known_step(path, step)]
    damaged: list[str] = []
    for number in steps:
        found = list(problems(step_directory(path, number)))
        print(f"step {number}: {'; '.join(found) if found else 'whole'}", flush=True)
        damaged += [f"step {number}"] if found else []
    if damaged:
        raise CheckpointError(
            f"{path}: {', '.join(damaged)} of {len(steps)} checkpoint(s) cannot be used; a resume passes "
            "over them, and goes on from the newest that is whole"
        )
    return Exit.DONE


def prune_run(run: str, keep: int | None, rolled_back: bool) -> Exit:
    """Deletes all checkpoints but those that the recipe's settings, or `keep`, say, and never the newest
    whole one. Only where nobody trains the run."""
    path = Path(run)
    settings = run_recipe(path).checkpoint
    if keep is not None and keep < 1:
        raise RecipeError(f"--keep: found {keep}, expected at least 1")
    lock = RunLock(path)
    try:
        gone = prune_locked(path, keep or settings.keep, settings.keep_every, rolled_back=rolled_back)
    finally:
        lock.release()
    print(f"deleted: {', '.join(map(str, gone)) or 'nothing'}; left: {saved_steps(path)}")
    return Exit.DONE


def prune_locked(path: Path, keep: int, every: Duration | None, *, rolled_back: bool) -> list[int | str]:
    """What was deleted: steps, and names of folders."""
    whole = next((s for s in reversed(saved_steps(path)) if not any(problems(step_directory(path, s)))), None)
    if whole is None:
        raise CheckpointError(
            f"{path}: none of its checkpoints is whole, so none is deleted; verify says why"
        )
    gone: list[int | str] = [*prune(path, keep, every, spare=[whole])]
    for folder in beside(path):
        if folder.name.endswith(".partial") or (rolled_back and ".rolled-back" in folder.name):
            shutil.rmtree(folder)
            gone.append(folder.name)
    return gone


def known_step(run: Path, step: int) -> int:
    """`step`, where the run has a checkpoint of it. Raises CheckpointError."""
    steps = saved_steps(run)
    if step not in steps:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; there are {steps}")
    return step


def beside(run: Path) -> list[Path]:
    """Folders that are no checkpoints: broken saves, and those set aside."""
    folders = sorted((run / "checkpoints").glob("step-*.*"))
    return [folder for folder in folders if folder.name.partition(".")[2].startswith(SET_ASIDE)]


def size_mib(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**20
