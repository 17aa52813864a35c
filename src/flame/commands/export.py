"""`flame export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from flame.errors import CheckpointError, Exit, ModelError, RecipeError
from flame.exports import write_checkpoint
from flame.models.export import SHARD_BYTES
from flame.recipe import FILE, run_recipe
from flame.schema import count_option
from flame.train.checkpoint import problems, saved_steps, step_directory


def export(run: str, step: int | None, to: str, dtype: str, shard_size: str, ema: bool) -> Exit:
    """Writes the model of a run's checkpoint, or the average of its weights, to the folder `to`."""
    shard_bytes = count_option("--shard-size", shard_size)
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


def is_run(path: Path, step: int | None) -> bool:
    """Whether a path is a run's, else an export's, which has no `step`. Raises FlameError for any other."""
    if (path / FILE).exists():
        return True
    if not (path / "config.json").exists():
        raise ModelError(f"{path}: neither a run directory nor an exported model")
    if step is not None:
        raise RecipeError(f"--step: {path} is an exported model, which has no steps; name its run")
    return False


@contextmanager
def exported(path: Path, step: int | None = None) -> Generator[Path]:
    """The folder of an export, or a temporary one made of a run's checkpoint. Raises FlameError."""
    if not is_run(path, step):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        export_run(path, step, Path(scratch) / "model", "float32")
        yield Path(scratch) / "model"


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
