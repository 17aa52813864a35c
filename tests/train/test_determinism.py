"""What `run.deterministic` sets in each rank, before it trains."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from distributed.ranks import Ranks, metrics
from small_recipes import WriteRecipe

from flame import schema
from flame.recipe import read_recipe
from flame.train.keeping import step_directory

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
SETTING = {"seed = 7": "seed = 7\ndeterministic = true", 'warmup = "5 steps"': 'warmup = "1 steps"'}


def train_and_look(text: str, workspace: str | None, expected: str) -> int:
    """Trains a recipe; what must be set before the device is asked for is looked at there."""
    from flame import run
    from flame.train.recovery import StopFlag

    os.environ.pop(CUBLAS, None)
    if workspace is not None:
        os.environ[CUBLAS] = workspace
    torch.backends.cudnn.benchmark = True
    found: list[Any] = []
    join = run.join_world

    def look() -> Any:
        found.append((os.environ.get(CUBLAS), torch.are_deterministic_algorithms_enabled()))
        found.append((torch.is_deterministic_algorithms_warn_only_enabled(), torch.backends.cudnn.benchmark))
        return join()

    with mock.patch.object(run, "join_world", look):
        code = run.work(StopFlag(), text)
    assert found == [(expected, True), (False, False)], found
    return code


def saved_tensors(run: Path) -> dict[str, str]:
    """The digests of what each rank saved of parameters and optimizer."""
    files = json.loads((step_directory(run, 4) / "manifest.json").read_text())["files"]
    return {name: digest for name, digest in files.items() if name.endswith(".distcp")}


def test_two_deterministic_runs_are_the_same_bits(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    for name in ("first", "second"):
        recipe = schema.to_toml(read_recipe(write_recipe(name, "llama", steps=4, replaced=SETTING)))
        ranks = Ranks(2, train_and_look, recipe, None, ":4096:8")
        assert ranks.codes() == [0, 0]
    first, second = metrics(tmp_path / "first"), metrics(tmp_path / "second")
    assert [(r["loss"], r["grad_norm"]) for r in first] == [(r["loss"], r["grad_norm"]) for r in second]
    saved = [saved_tensors(tmp_path / name) for name in ("first", "second")]
    assert len(saved[0]) == 2 and saved[0] == saved[1]


def test_the_users_workspace_stays(write_recipe: WriteRecipe) -> None:
    recipe = schema.to_toml(read_recipe(write_recipe("run", "llama", steps=1, replaced=SETTING)))
    assert Ranks(1, train_and_look, recipe, ":16:8", ":16:8").codes() == [0]


def train_a_wild_kernel(text: str) -> int:
    """What torch says of a kernel without a deterministic form, where the model is."""
    from flame import run
    from flame.train.recovery import StopFlag

    def wild(*_: Any) -> None:
        torch.zeros(4).put_(torch.tensor([0, 0]), torch.ones(2))

    with mock.patch.object(run, "run_rank", wild):
        return run.work(StopFlag(), text)


def test_a_kernel_that_is_not_deterministic_is_named_and_ends_the_run(write_recipe: WriteRecipe) -> None:
    recipe = schema.to_toml(read_recipe(write_recipe("run", "llama", steps=1, replaced=SETTING)))
    ranks = Ranks(1, train_a_wild_kernel, recipe)
    assert ranks.codes() == [1]
    message = ranks.error()
    assert (
        message.startswith("run.deterministic: true, but") and "put_" in message and "leave it out" in message
    )
