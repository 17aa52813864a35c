"""What a new run begins with: fresh weights, a folder of weights, or another run's checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import orjson
import torch
from torch import Tensor, nn

from flame.errors import CheckpointError, FlameError, ModelError, RecipeError
from flame.models.families.own import OWN_FILE
from flame.models.matching import Source, differences, match
from flame.models.pretrained import fill, folder_config
from flame.models.registry import load_config
from flame.models.weights import find_weights, open_weights
from flame.parallel.world import World
from flame.recipe import FILE, Recipe, run_recipe, split_start
from flame.train.checkpoint import load_tensors, shared_problem
from flame.train.journal import event
from flame.train.keeping import read_record, saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors
from flame.train.shards import Shards

KEPT = "model"  # RUN/model: what else than weights was in the folder that a run began from
GENERATION = "generation_config.json"


def model_config(recipe: Recipe) -> Any:
    """The config of a recipe's model: its own, or that of the weights it begins from.

    A run that has a checkpoint has a copy of the latter, and does not need the folder again. Raises
    ModelError.
    """
    model = recipe.model
    if model.config or model.module is not None or model.init_from is None:
        return load_config(model.config, model.module)
    kept = recipe.directory / KEPT
    if (kept / "config.json").is_file() and saved_steps(recipe.directory):
        return folder_config(kept)
    folder = Path(model.init_from)
    return folder_config(folder) if folder.is_dir() else load_config(model.init_from)


def kept_generation_config(recipe: Recipe) -> Path | None:
    """That of the weights a run began from, where they had one."""
    kept = recipe.directory / KEPT / GENERATION
    return kept if kept.is_file() else None


def in_words(origin: dict[str, Any] | None) -> str:
    """What a new run begins with, from what its records say of it."""
    if origin is None:
        return "starting"
    if "init_from" in origin:
        return f"starting from the weights of {origin['init_from']}"
    return f"branching off {origin['run']} after step {origin['step']}, with its {', '.join(origin['parts'])}"


def begin_with(
    recipe: Recipe,
    world: World,
    config: Any,
    model: nn.Module,
    shards: Shards,
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, Any] | None, Trunk | None]:
    """Fills a fresh model with what the recipe names, if anything. What the run's records say of it; and the
    trunk, where the run goes on in its data too. Raises FlameError."""
    if recipe.model.init_from is not None:
        return begin_from_weights(recipe, world, config, model, shards), None
    if recipe.run.start_from is None:
        return None, None
    trunk = begin_from_run(recipe, world, config, model, shards, optimizer)
    if "data" not in recipe.run.start_from_parts:
        return trunk.record, None
    total = recipe.total_steps
    if total is not None and total < trunk.step:
        raise RecipeError(
            f'run.start_from_parts: with "data" steps go on from {trunk.run}\'s {trunk.step}, but the run '
            f"has {total}; give a longer run.steps or run.tokens, or leave the part out: they then begin at 0"
        )
    return trunk.record, trunk


# ------------------------------------------------------------------------------------- weights


def begin_from_weights(
    recipe: Recipe, world: World, config: Any, model: nn.Module, shards: Shards
) -> dict[str, Any]:
    """Fills the model from `model.init_from`; what the run's records say of it."""
    spec = str(recipe.model.init_from)
    world.from_rank_zero(lambda: find_weights(spec))  # fetches from the hub; other nodes do it below
    folder = find_weights(spec)
    weights = open_weights(folder)
    source = fill(targets_of(model, shards), weights, config, recipe.run.exclude)
    shards.updated()
    if world.rank == 0:
        keep_beside(folder, recipe.directory / KEPT)
        tell_differences(source, config)
    return {
        "init_from": spec,
        "digest": world.from_rank_zero(weights.digest),
        "exclude": recipe.run.exclude,
        "differs": differences(source, config),
    }


def targets_of(model: nn.Module, shards: Shards) -> dict[str, tuple[Tensor, Tensor]]:
    """Where values go, by name: float32 parameters as the optimizer has them, and buffers."""
    parameters = {id(piece.parameter): piece.local.detach() for piece in shards.pieces}
    held = cast("Mapping[str, Tensor]", model.state_dict(keep_vars=True))
    return {name: (tensor, parameters.get(id(tensor), tensor.detach())) for name, tensor in held.items()}


def keep_beside(folder: Path, kept: Path) -> None:
    """Copies what a resume and an export need of the folder, so that it may go."""
    shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in ("config.json", GENERATION, OWN_FILE):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, kept / name)


def tell_differences(source: Source, config: Any) -> None:
    """Says in which settings the recipe's model is another one, where the weights fit all the same."""
    for difference in differences(source, config):
        print(f"note: {source.origin} has other settings: {difference}", flush=True)


def check_origin(recipe: Recipe, origin: dict[str, Any] | None) -> None:
    """Refuses to go on with a run that began from other weights. They are looked at only where they are
    said to lie elsewhere than when the run began. Raises RecipeError."""
    spec = recipe.model.init_from
    begun = (origin or {}).get("init_from")
    if spec == begun:
        return
    if spec is not None and origin is not None and begun is not None:
        found = open_weights(find_weights(spec)).digest()
        if found == origin["digest"]:
            return
    raise RecipeError(
        f"{recipe.directory} holds another recipe's run: model.init_from is {begun or 'none'} there and "
        f"{spec or 'none'} here, with other weights; choose another run.directory, or give what it began with"
    )


# ---------------------------------------------------------------------------------- another run


@dataclass(frozen=True)
class Trunk:
    """The checkpoint that a run branches off."""

    run: Path
    step: int
    record: dict[str, Any]  # what the branch's own records say of it


def begin_from_run(
    recipe: Recipe,
    world: World,
    config: Any,
    model: nn.Module,
    shards: Shards,
    optimizer: torch.optim.Optimizer,
) -> Trunk:
    """Fills model and, where asked for, optimizer from `run.start_from`. Raises FlameError."""
    spec, parts = str(recipe.run.start_from), recipe.run.start_from_parts
    run, step = choose_checkpoint(recipe, world)
    path = step_directory(run, step)
    with_optimizer = "optimizer" in parts
    try:
        record = read_record(run, step, "train.json")
        saved = SavedTensors(path)
        shapes = {name: saved.shape(name) for name in saved}
        source = Source(f"{run}, step {step}", shapes, cast("dict[str, Any]", record["model"]))
        check_fits(recipe, run, source, config, with_optimizer)
        found = match(source, config, recipe.run.exclude)
        load_tensors(
            model,
            shards,
            optimizer,
            path,
            world.checkpoint,
            with_optimizer=with_optimizer,
            exclude=found.excluded,
        )
    except FlameError:
        raise
    except Exception as error:  # DCP wraps whatever a file's loss raises
        raise CheckpointError(
            f"{path}: cannot be read ({type(error).__name__}: {str(error)[:200]}); was it deleted meanwhile, "
            "by its own run? raise checkpoint.keep there, or branch off a later step"
        ) from error
    if world.rank == 0:
        tell_differences(source, config)
    told = {
        "start_from": spec,
        "run": str(run),
        "step": step,
        "tokens": record["tokens"],
        "parts": parts,
        "exclude": recipe.run.exclude,
        "differs": differences(source, config),
    }
    return Trunk(run, step, told)


def check_fits(recipe: Recipe, run: Path, source: Source, config: Any, with_optimizer: bool) -> None:
    """Refuses what would load and mean something else."""
    tied = "tie_word_embeddings"
    if source.config.get(tied) is False and getattr(config, tied, None) is True:
        raise ModelError(
            f"{source.origin}: its embedding and head are two matrices, which the recipe's model ties: set "
            f"{tied} = false in its config"
        )
    if with_optimizer:
        name = run_recipe(run).optimizer.name
        if name != recipe.optimizer.name:
            raise RecipeError(
                f'run.start_from_parts: "optimizer": {run} was trained with {name}, and this recipe has '
                f'{recipe.optimizer.name}; leave the part out, or give optimizer.name = "{name}"'
            )


def choose_checkpoint(recipe: Recipe, world: World) -> tuple[Path, int]:
    """The run and step that `run.start_from` means: the step named, or the newest that is whole.

    A branch that has to begin again before its first own checkpoint takes the step that it took before.
    """
    spec = str(recipe.run.start_from)

    def look() -> tuple[Path, int | None, list[int]]:
        run, step = split_start(spec)
        if not (run / FILE).exists():
            raise CheckpointError(f"run.start_from: {run}: no run here (it holds no {FILE})")
        if run.resolve() == recipe.directory.resolve():
            raise RecipeError(f"run.start_from: {run} is this run itself; choose another run.directory")
        steps = saved_steps(run)
        if not steps:
            raise CheckpointError(f"run.start_from: {run}: no checkpoint there yet")
        step = taken_before(recipe.directory, spec) if step is None else step
        if step is not None and step not in steps:
            there = ", ".join(map(str, steps))
            raise CheckpointError(f"run.start_from: {run}: no checkpoint of step {step}; there are {there}")
        return run, step, steps

    run, wanted, steps = world.from_rank_zero(look)
    broken: list[str] = []
    for step in reversed(steps) if wanted is None else [wanted]:
        problem = shared_problem(step_directory(run, step), world.checkpoint)
        if problem is None:
            return run, step
        broken.append(f"step {step}: {problem}")
        if world.rank == 0:
            event(recipe.directory, "checkpoint_rejected", step=step, why=f"{run}: {problem}")
    others = ", ".join(str(step) for step in steps if step != wanted) or "none"
    raise CheckpointError(
        f"run.start_from: {run}: not whole: {'; '.join(broken)}; "
        + (f"other steps there: {others}" if wanted is not None else "restore one of its checkpoints")
    )


def taken_before(directory: Path, spec: str) -> int | None:
    """The step that a branch began from, if it began once already."""
    try:
        noted = orjson.loads((directory / "environment.json").read_bytes())["origin"]
        return int(noted["step"]) if noted["start_from"] == spec else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
