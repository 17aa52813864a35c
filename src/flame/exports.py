"""A run's checkpoints as folders that transformers loads: what a recipe says goes beside the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from flame.errors import CheckpointError
from flame.models.export import DTYPES, SHARD_BYTES, export, exported_step
from flame.origin import kept_generation_config, model_config
from flame.recipe import Recipe
from flame.train.checkpoint import problems
from flame.train.exporter import AT_END, Exporter
from flame.train.keeping import step_directory
from flame.train.saved_tensors import SavedTensors


class Interruptible(SavedTensors):
    """Calls `look_up` before each tensor, which raises to give up."""

    def __init__(self, path: Path, look_up: Callable[[], None], *, averaged: bool) -> None:
        super().__init__(path, averaged=averaged)
        self._look_up = look_up

    def __getitem__(self, name: str) -> torch.Tensor:
        self._look_up()
        return super().__getitem__(name)


def write_checkpoint(
    recipe: Recipe,
    step: int,
    to: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    look_up: Callable[[], None] = lambda: None,
    *,
    averaged: bool = False,
) -> None:
    """Exports the checkpoint of `step` of the recipe's run to the folder `to`, reading a tensor at a time.
    `averaged`: the running average of its weights.

    Raises ModelError as `models.export.export` does, and CheckpointError where the disk takes no more.
    """
    try:
        export(
            Interruptible(step_directory(recipe.directory, step), look_up, averaged=averaged),
            model_config(recipe),
            Path(recipe.tokenizer.path),
            to,
            DTYPES[dtype],
            shard_bytes,
            step=step,
            generation_config=kept_generation_config(recipe),
            chat_template=chat_template(recipe),
        )
    except OSError as error:
        raise CheckpointError(f"{to}: step {step} could not be exported: {error}") from error


def exporter_of(recipe: Recipe, rank: int) -> Exporter:
    """What makes exports while the recipe's run trains."""

    def write(step: int, to: Path, look_up: Callable[[], None]) -> None:
        write_checkpoint(recipe, step, to, recipe.export.dtype, look_up=look_up)

    return Exporter(recipe.directory, recipe.export, write if rank == 0 else None)


def export_finished(recipe: Recipe, step: int) -> None:
    """What a run's end owes where `export.at_end` was asked for and did not happen. Raises FlameError."""
    to = recipe.directory / AT_END
    if not recipe.export.at_end or exported_step(to) == step:
        return
    path = step_directory(recipe.directory, step)
    problem = next(problems(path), None)
    if problem is not None:
        raise CheckpointError(f"{path}: {problem}; it cannot be exported")
    write_checkpoint(recipe, step, to, recipe.export.dtype)
    print(f"{to}: the model after step {step}", flush=True)


def chat_template(recipe: Recipe) -> Path | None:
    """The template that all conversations were rendered with, where it is not the tokenizer's own."""
    used = {source.chat_template for source in recipe.data.sources if source.chat is not None}
    only = next(iter(used)) if len(used) == 1 else None
    return Path(only) if only is not None else None
