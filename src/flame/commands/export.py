"""`flame export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

from flame.errors import CheckpointError, Exit, RecipeError
from flame.exports import write_checkpoint
from flame.models.export import SHARD_BYTES
from flame.recipe import run_recipe
from flame.schema import parse_count
from flame.train.checkpoint import problems, saved_steps, step_directory


def export(run: str, step: int | None, to: str, dtype: str, shard_size: str, ema: bool) -> Exit:
    """Writes the model of a run's checkpoint, or the average of its weights, to the folder `to`."""
    try:
        shard_bytes = parse_count(shard_size)
    except ValueError as error:
        raise RecipeError(f"--shard-size: found {shard_size}, expected {error}") from None
    if shard_bytes < 1:
        raise RecipeError(f"--shard-size: found {shard_size}, expected at least 1")
    step = export_run(Path(run), step, Path(to), dtype, shard_bytes, averaged=ema)
    what = "average of the model" if ema else "model"
    print(f"{to}: the {what} of {run} after step {step}; transformers' AutoModelForCausalLM loads it")
    return Exit.DONE


def export_run(
    run: Path,
    step: int | None,
    to: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    *,
    averaged: bool = False,
) -> int:
    """The same, silently; the step that was taken."""
    recipe = run_recipe(run)
    recipe.run.directory = str(run)  # it may have moved
    step = choose_step(run, step)
    path = step_directory(run, step)
    problem = next(problems(path), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; choose another with --step: {saved_steps(run)}")
    write_checkpoint(recipe, step, to, dtype, shard_bytes, averaged=averaged)
    return step


def choose_step(run: Path, step: int | None) -> int:
    """`step`, or the newest one saved. Raises CheckpointError where there is no such checkpoint."""
    steps = saved_steps(run)
    if not steps:
        raise CheckpointError(f"{run}: no checkpoint yet; train it first")
    if step is None:
        return steps[-1]
    if step not in steps:
        raise CheckpointError(f"{run}: no checkpoint of step {step}; there are {steps}")
    return step
