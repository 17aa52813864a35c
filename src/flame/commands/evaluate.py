"""`flame eval`: a model's loss on held out text, or its results on tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flame.data.catalog import Catalog, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan
from flame.data.validation import open_validation, own_validation_data
from flame.data.validation_set import read_validation_set
from flame.errors import Exit, RecipeError
from flame.exports import choose_step, exported, is_run
from flame.kernels import AUTO_TOKENS, compute_dtype
from flame.models.build import build_on_meta, initialize
from flame.models.export import load_exported
from flame.models.family import Family
from flame.models.pretrained import folder_config
from flame.models.registry import family_of
from flame.origin import model_config
from flame.recipe import Recipe, run_recipe
from flame.schema import count_option
from flame.train.keeping import step_directory
from flame.train.loss import LossModule
from flame.train.saved_tensors import SavedTensors
from flame.train.validation import evaluating, figures_of, loss_sums

DEFAULT_LENGTH = 2048  # of rows, where neither a run nor an option says another


def evaluate(
    model: str,
    step: int | None,
    files: list[str] | None,
    text: str | None,
    tokens: str | None,
    length: int | None,
    tasks: str | None,
    include: str | None,
    shots: int | None,
    limit: int | None,
    batch_size: int,
    as_json: bool,
) -> Exit:
    """Prints what a model, an export or a run's checkpoint, is worth. `files` or the run's validation set are
    for the loss, `tasks` (names with commas) for the harness."""
    path = Path(model)
    if tasks is not None:
        if files:
            raise RecipeError("--tasks and --files: give one of the two")
        # the harness and what it needs are an extra, and take seconds to import
        from flame.commands.harness import run_tasks, show

        with exported(path, step) as folder:
            results = run_tasks(folder, tasks.split(","), include, shots, limit, batch_size)
        print(json.dumps(results, indent=2)) if as_json else show(results)
        return Exit.DONE
    most = None if tokens is None else count_option("--tokens", tokens)
    figures = held_out_loss(path, step, files or [], text, most, length)
    if as_json:
        print(json.dumps(figures, indent=2))
        return Exit.DONE
    several = len(figures["sources"]) > 1
    for name, one in (("all", figures), *figures["sources"].items()) if several else ((model, figures),):
        bits = "" if one["bits_per_byte"] is None else f", {one['bits_per_byte']:.4f} bits per byte"
        print(
            f"{name}: loss {one['loss']:.4f}{bits}, over {one['predicted']:,} predicted tokens of "
            f"{one['documents']:,} documents"
        )
    return Exit.DONE


def held_out_loss(
    path: Path, step: int | None, files: list[str], text: str | None, tokens: int | None, length: int | None
) -> dict[str, Any]:
    """The figures of a `validation` event. `files`: else the run's own validation set is taken. Raises
    FlameError."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if is_run(path, step):
        recipe = run_recipe(path)
        recipe.run.directory = str(path)  # it may have moved
        guest, family = of_checkpoint(path, recipe, step, device)
        tokenizer, longest = recipe.tokenizer, recipe.data.sequence_length
    else:
        if not files:
            raise RecipeError(f"{path} is an exported model, which names no data: give --files")
        recipe, config = None, folder_config(path)
        guest, family = load_exported(path), family_of(config)
        limit = getattr(config, "max_position_embeddings", None)
        tokenizer = TokenizerConfig(str(path.absolute()))
        longest = min(DEFAULT_LENGTH, limit) if isinstance(limit, int) else DEFAULT_LENGTH
    length = longest if length is None else length
    data = (
        data_of_files(files, text, tokens, length, tokenizer) if files else data_of_run(path, recipe, tokens)
    )
    rows = read_validation_set(*data)
    size = max(1, AUTO_TOKENS // rows.length) if device.type == "cuda" else 1
    model = LossModule(guest.to(device), family.hidden, family.head(guest))
    with evaluating(model, device):
        sums = loss_sums(model, share := rows.share(0, 1, size), device)
    return figures_of(share, sums)


def of_checkpoint(
    run: Path, recipe: Recipe, step: int | None, device: torch.device
) -> tuple[nn.Module, Family]:
    """The model of a run's checkpoint, as it was trained."""
    config = model_config(recipe)
    family, model = family_of(config), build_on_meta(config)
    initialize(model, config, recipe.run.seed, torch.device("cpu"))
    model.load_state_dict(dict(SavedTensors(step_directory(run, choose_step(run, step)))), strict=False)
    compute = compute_dtype(recipe, device)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(compute)
    return model, family


def data_of_run(path: Path, recipe: Recipe | None, tokens: int | None) -> tuple[Catalog, DataPlan]:
    """What a run holds out."""
    assert recipe is not None
    if tokens is not None:
        recipe.validation.tokens = tokens
    plan = recipe.plan
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    try:
        return open_validation(recipe.validation, recipe.data, recipe.tokenizer, catalog, plan, Path())
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}; or give --files") from None


def data_of_files(
    files: list[str], text: str | None, tokens: int | None, length: int, tokenizer: TokenizerConfig
) -> tuple[Catalog, DataPlan]:
    """All documents of some files, seen from the working directory."""
    source = SourceConfig("files", files, text=text)
    config = DataConfig([source], length)
    plan = DataPlan.of(config, length, seed=0)
    return own_validation_data([source], config, tokenizer, plan, Path.cwd(), tokens)
