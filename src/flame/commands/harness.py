"""Tasks of lm-evaluation-harness on an exported model."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from flame.errors import ModelError, RecipeError, nearest
from flame.models.export import load_exported


def run_tasks(
    folder: Path, tasks: list[str], include: str | None, shots: int | None, limit: int | None, batch_size: int
) -> dict[str, Any]:
    """The results of `tasks`, by name, as the harness gives them. `include`: a folder with more tasks.
    `limit`: the first so many examples of each. Raises FlameError."""
    try:
        harness: Any = import_module("lm_eval")
        models: Any = import_module("lm_eval.models.huggingface")
        managers: Any = import_module("lm_eval.tasks")
    except ImportError as error:
        raise RecipeError(
            f'--tasks needs lm-evaluation-harness ({error}); pip install "flame[eval]"'
        ) from None
    manager = manager_of(managers, tasks, include)
    model: Any = load_exported(folder)
    if not hasattr(model, "generate"):
        raise ModelError(f"{folder}: a model of your own: the harness takes transformers' models only")
    make: Any = AutoTokenizer.from_pretrained
    try:
        tokenizer = make(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder}: it has no tokenizer that transformers loads: {error}") from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wrapped = models.HFLM(pretrained=model.to(device), tokenizer=tokenizer, batch_size=batch_size)
    found = harness.simple_evaluate(
        model=wrapped,
        tasks=tasks,
        num_fewshot=shots,
        limit=limit,
        task_manager=manager,
        log_samples=False,
        bootstrap_iters=0,
    )
    return {name: plain(result) for name, result in found["results"].items()}


def manager_of(managers: Any, tasks: list[str], include: str | None) -> Any:
    """Who knows the tasks: those in `include` alone where they are all there, because the harness' own take
    seconds to list. Raises RecipeError for a task that nobody knows."""
    if include is not None and not Path(include).is_dir():
        raise RecipeError(f"--include: {include}: no such folder")
    manager: Any = None
    for defaults in (False, True) if include is not None else (True,):
        manager = managers.TaskManager(include_path=include, include_defaults=defaults)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    unknown = next(task for task in tasks if task not in manager.all_tasks)
    raise RecipeError(
        f'--tasks: no task is called "{unknown}"; {nearest(unknown, manager.all_tasks)}--include names a '
        "folder with tasks of your own"
    )


def plain(result: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a task; the harness writes \"acc,none\" where no filter was applied."""
    numbers = {name: value for name, value in result.items() if isinstance(value, (int, float))}
    return {name.removesuffix(",none"): value for name, value in numbers.items()}


def show(results: dict[str, Any]) -> None:
    """A table: a line a number."""
    table = Table()
    for column in ("task", "metric", "value"):
        table.add_column(column)
    for task, numbers in results.items():
        for name, value in numbers.items():
            table.add_row(task, name, f"{value:.4f}" if isinstance(value, float) else str(value))
    Console().print(table)
