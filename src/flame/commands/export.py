"""`flame export`: a checkpoint becomes a folder that transformers loads."""

from __future__ import annotations

from pathlib import Path

import torch

from flame.errors import CheckpointError, Exit
from flame.models.export import export as write_export
from flame.models.registry import load_config
from flame.recipe import run_recipe
from flame.train.checkpoint import problems, read_model_tensors, saved_steps, step_directory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export(run: str, step: int | None, to: str, dtype: str, ema: bool) -> Exit:
    """Writes the model of a run's checkpoint, or the average of its weights, to the folder `to`."""
    step = export_run(Path(run), step, Path(to), dtype, averaged=ema)
    what = "average of the model" if ema else "model"
    print(f"{to}: the {what} of {run} after step {step}; transformers' AutoModelForCausalLM loads it")
    return Exit.DONE


def export_run(run: Path, step: int | None, to: Path, dtype: str, *, averaged: bool = False) -> int:
    """The same, silently; the step that was taken."""
    recipe = run_recipe(run)
    step = choose_step(run, step)
    path = step_directory(run, step)
    problem = next(problems(path), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; choose another with --step: {saved_steps(run)}")
    config = load_config(recipe.model.config, recipe.model.module)
    weights = read_model_tensors(path, averaged=averaged)
    write_export(weights, config, Path(recipe.tokenizer.path), to, DTYPES[dtype])
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
