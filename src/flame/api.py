"""flame from Python: what `flame train`, `flame export` and `flame generate` do, as functions."""

from __future__ import annotations

import os
import signal
import threading
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from flame import schema
from flame.errors import Exit, RecipeError
from flame.exports import export_run, exported, exported_tokenizer
from flame.models.export import DTYPES, exported_step, load_exported
from flame.parallel.mesh import ranks_around
from flame.recipe import Recipe, check, check_ranks, make_absolute, refuse_other_run, run_recipe
from flame.run import work
from flame.schema import count_option
from flame.train.config import check_trackers
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps
from flame.train.lifeline import STOP_SIGNALS

# of a rank alone; it talks to nobody, and takes a port that is free
ALONE = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "0",
}


@dataclass(frozen=True)
class Trained:
    """How far a run has come."""

    directory: Path  # of the run
    step: int  # of its newest checkpoint
    finished: bool  # False: a signal stopped it, with its state saved; `train` goes on with it

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, of the run's earlier attempts too."""
        return list(read_lines(self.directory / "metrics.jsonl"))


@dataclass(frozen=True)
class LoadedRun:
    """A model as it was saved, ready for use."""

    model: nn.Module  # on the CPU, float32, in evaluation mode
    tokenizer: Any
    recipe: Recipe
    step: int

    @property
    def config(self) -> Any:
        """The model's; None where a model of one's own has none."""
        return getattr(self.model, "config", None)


def train(recipe: Recipe) -> Trained:
    """Trains a recipe in this process until it is done or stopped, or goes on with its run: alone, or as one
    of the ranks that torchrun or srun started. Every rank gets the same answer.

    Nothing supervises it: an error is raised here and starts nothing again. In the main thread SIGINT,
    SIGTERM and SIGUSR1, once training has begun, save the state and end it; a second one does what it did
    before. The recipe is checked again, and stays as it is. Raises FlameError.
    """
    if dist.is_initialized():
        raise RecipeError(
            "train: torch.distributed has a process group already; flame makes its own: call "
            "torch.distributed.destroy_process_group() first"
        )
    recipe = _checked(recipe)
    ranks = ranks_around()
    check_ranks(recipe, ranks or 1)
    try:
        with _stop_signals() as stop, _alone(ranks is None):
            code = work(stop, schema.to_toml(recipe))
    finally:
        if ranks is None and dist.is_initialized():  # of several, another one may be waiting in it
            dist.destroy_process_group()
    steps = saved_steps(recipe.directory)
    return Trained(recipe.directory, steps[-1] if steps else 0, code == Exit.DONE)


def load_run(run: str | Path, step: int | None = None) -> LoadedRun:
    """The model and the tokenizer of a run's checkpoint: of `step`, or the newest.

    The model is what `flame export` and transformers' AutoModelForCausalLM give, one of one's own what its
    file defines. The tokenizer is transformers', or flame's own where transformers has none for it: a model
    of one's own, "bytes", and .tiktoken files. Raises FlameError.
    """
    recipe = run_recipe(Path(run))
    with exported(Path(run), step) as folder:
        taken = exported_step(folder)
        assert taken is not None, "it was exported just now"
        return LoadedRun(load_exported(folder), exported_tokenizer(folder), recipe, taken)


def export(
    run: str | Path,
    to: str | Path,
    *,
    step: int | None = None,
    dtype: str = "float32",
    shard_size: str = "5B",
    ema: bool = False,
) -> int:
    """Writes a run's model as a folder that transformers loads, as `flame export` does; the step taken.

    `step`: the checkpoint, else the newest. `dtype`: of the weights. `shard_size`: the most bytes of a file.
    `ema`: the average of the weights, which `optimizer.ema` keeps. Raises FlameError.
    """
    if dtype not in DTYPES:
        raise RecipeError(f'export: dtype: found "{dtype}", expected one of {", ".join(DTYPES)}')
    return export_run(Path(run), step, Path(to), dtype, count_option("shard_size", shard_size), averaged=ema)


def _checked(recipe: Recipe) -> Recipe:
    """A copy that has passed what a recipe from a file passes."""
    recipe = schema.build(Recipe, tomllib.loads(schema.to_toml(recipe)), "recipe")
    check(recipe, "recipe")
    make_absolute(recipe)
    refuse_other_run(recipe)
    check_trackers(recipe.logging.trackers)
    return recipe


@contextmanager
def _alone(alone: bool) -> Generator[None]:
    """Within, this process is the only rank, where it is `alone`."""
    names = (*ALONE, "RAYON_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    if alone:
        os.environ.update(ALONE)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _stop_signals() -> Generator[Callable[[], bool]]:
    """Gives what says whether one has come. A signal does what it did before until that is asked for the
    first time, since nothing has been trained that could be saved; and so does a second one."""
    before: dict[int, Any] = {}
    asked = came = False

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: object) -> None:
        nonlocal came
        restore()
        if not asked:
            signal.raise_signal(number)
        came = True

    def stop() -> bool:
        nonlocal asked
        asked = True
        return came

    if threading.current_thread() is threading.main_thread():  # others cannot take signals
        before |= {number: signal.signal(number, on_signal) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        restore()
