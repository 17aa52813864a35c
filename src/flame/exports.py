"""A run's checkpoints as folders that transformers loads: what a recipe says goes beside the weights."""

from __future__ import annotations

from pathlib import Path

from flame.models.export import DTYPES, SHARD_BYTES, export
from flame.origin import kept_generation_config, model_config
from flame.recipe import Recipe
from flame.train.checkpoint import step_directory
from flame.train.saved_tensors import SavedTensors


def write_checkpoint(recipe: Recipe, step: int, to: Path, dtype: str, shard_bytes: int = SHARD_BYTES) -> None:
    """Exports the checkpoint of `step` of the recipe's run to the folder `to`, reading a tensor at a time.

    Raises ModelError as `models.export.export` does.
    """
    export(
        SavedTensors(step_directory(recipe.directory, step)),
        model_config(recipe),
        Path(recipe.tokenizer.path),
        to,
        DTYPES[dtype],
        shard_bytes,
        step=step,
        generation_config=kept_generation_config(recipe),
        chat_template=chat_template(recipe),
    )


def chat_template(recipe: Recipe) -> Path | None:
    """The template that all conversations were rendered with, where it is not the tokenizer's own."""
    used = {source.chat_template for source in recipe.data.sources if source.chat is not None}
    only = next(iter(used)) if len(used) == 1 else None
    return Path(only) if only is not None else None
