"""A run's checkpoints as folders that transformers loads: what a recipe says goes beside the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from flame.data.config import BYTES
from flame.data.tokens import Tokenizer, load_tokenizer
from flame.errors import CheckpointError, ModelError, RecipeError
from flame.models.export import DTYPES, SHARD_BYTES, export, exported_step
from flame.models.families.own import OWN_FILE
from flame.origin import kept_generation_config, model_config
from flame.recipe import FILE, Recipe, run_recipe
from flame.train.checkpoint import problems
from flame.train.exporter import AT_END, Exporter
from flame.train.keeping import saved_steps, step_directory
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
    chats = [source for source in recipe.data.sources if source.chat is not None or source.prompt is not None]
    used = {source.chat_template for source in chats}
    only = next(iter(used)) if len(used) == 1 else None
    return Path(only) if only is not None else None


# ------------------------------------------------------------------------------ of any run


def export_run(
    run: Path,
    step: int | None,
    to: Path,
    dtype: str,
    shard_bytes: int = SHARD_BYTES,
    *,
    averaged: bool = False,
) -> int:
    """Exports the checkpoint of `step`, or the newest, of a run to the folder `to`; the step that was taken.

    Raises FlameError, as `write_checkpoint` does and where there is no such run or whole checkpoint.
    """
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


def exported_tokenizer(folder: Path) -> Any:
    """The tokenizer of an export: transformers', or flame's own (`data.tokens.Tokenizer`) where transformers
    has none for it: with a model of one's own, "bytes", and .tiktoken files."""
    if (folder / OWN_FILE).is_file() or not (folder / "tokenizer.json").is_file():
        return own_tokenizer(folder)
    make: Any = AutoTokenizer.from_pretrained
    return make(str(folder), local_files_only=True, trust_remote_code=False)


def own_tokenizer(folder: Path) -> Tokenizer:
    """flame's tokenizer of an export."""
    found = sorted(folder.glob("*.tiktoken"))
    file = folder if (folder / "tokenizer.json").is_file() else found[0] if found else BYTES
    return load_tokenizer(file, bos=False)
