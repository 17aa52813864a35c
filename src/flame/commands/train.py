"""`flame train` and `flame resume`: starts the ranks, or joins those that torchrun or srun started."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path

from flame import schema
from flame.errors import Exit
from flame.parallel.mesh import ranks_around
from flame.recipe import Recipe, check_ranks, read_recipe, refuse_other_run, run_recipe
from flame.train.config import check_trackers
from flame.train.lifeline import WARM_PARENT, StopFlag

# what the ranks import, done once in the parent they are forked from; nothing here touches a GPU ...
WARM = (
    "flame.train.loop",
    "flame.train.recovery",
    "flame.parallel.apply",
    "flame.data.loader",
    "transformers",
)
# ... as importing fla and Triton does where there is one
WARM_WITHOUT_GPU = ("flame.run", "fla.models", "torch.utils.tensorboard")


def train(
    path: str, flags: dict[str, str], ranks: int | None, dry: bool, gpu_memory: float, as_json: bool
) -> Exit:
    """Trains the recipe at `path` until it is done or stopped; `dry`: says what that needs, and ends."""
    stop = StopFlag()
    recipe = read_recipe(Path(path), flags)
    if dry:
        check_ranks(recipe, ranks or 1)
        from flame.commands.dry_run import dry_run  # torch and the models, which take seconds to import

        return dry_run(recipe, ranks or 1, gpu_memory, as_json=as_json)
    return start(recipe, ranks, stop)


def resume(run: str, flags: dict[str, str], ranks: int | None) -> Exit:
    """Goes on with a run directory's own recipe."""
    stop = StopFlag()
    run_recipe(Path(run))
    flags = {"run.directory": run, **flags}
    return start(read_recipe(Path(run) / "recipe.toml", flags), ranks, stop)


def start(recipe: Recipe, ranks: int | None, stop: StopFlag) -> Exit:
    """Joins the ranks around this process, or supervises `ranks` of its own (default: one a GPU, else 1).

    `stop` has taken the signals before anything heavy is imported; a supervisor takes them from it.
    """
    refuse_other_run(recipe)
    check_trackers(recipe.logging.trackers)
    around = ranks_around()
    if around is not None:
        return join(recipe, around, stop)
    if ranks is not None:
        check_ranks(recipe, ranks)
    return supervise(recipe, ranks)


def join(recipe: Recipe, ranks: int, stop: StopFlag) -> Exit:
    """Trains as one of the ranks that somebody else started and watches."""
    check_ranks(recipe, ranks)
    from flame.run import work

    return Exit(work(stop, schema.to_toml(recipe)))


def supervise(recipe: Recipe, ranks: int | None) -> Exit:
    """Starts the ranks and keeps them running."""
    # with NVML asked instead of the driver, looking for GPUs does not spoil them for forked processes
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with_gpu = has_gpu()
    warm_parent(WARM if with_gpu else (*WARM, *WARM_WITHOUT_GPU))

    # torch is imported here while the warm parent imports it too
    import torch

    from flame.train import recovery
    from flame.train.keeping import saved_steps

    saved, total = saved_steps(recipe.directory), recipe.total_steps
    if saved and total is not None and saved[-1] >= total:
        print(f"{recipe.directory} is finished: step {saved[-1]} of {total}")
        if recipe.export.at_end:
            from flame.exports import export_finished  # imports the models, which takes seconds

            export_finished(recipe, saved[-1])
        return Exit.DONE
    ranks = ranks or (torch.cuda.device_count() if with_gpu else 1) or 1
    check_ranks(recipe, ranks)
    recipe.directory.mkdir(parents=True, exist_ok=True)
    return recovery.supervise(
        entry,
        (schema.to_toml(recipe),),
        run=recipe.directory,
        ranks=ranks,
        max_restarts=recipe.run.max_restarts,
        config=recipe.recovery,
    )


def entry(stop: Callable[[], bool], text: str) -> int:
    """What a supervised rank runs; a function of its own, so that the supervisor need not import models."""
    from flame.run import work

    return work(stop, text)


def warm_parent(modules: Sequence[str]) -> None:
    """Begins, in the background, the process from which ranks are forked, with `modules` imported.

    None of them may touch a GPU when imported: a forked process could not use it then.
    """
    multiprocessing.set_forkserver_preload(["flame.train.lifeline", *modules])
    os.environ[WARM_PARENT] = "1"  # for the one that takes its place, too, should it be killed
    forkserver.ensure_running()


def has_gpu() -> bool:
    """Whether a CUDA driver is installed; loads its library, but does not touch the device."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True
