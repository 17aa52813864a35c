"""A rank that is slower than the others is named; one that is not, is not."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from distributed.ranks import Ranks, train_text
from distributed.supervised import events

from flame import schema
from flame.recipe import read_recipe

STEPS = 45
WINDOW = '[recovery]\nstraggler_window = "10 steps"\nstraggler_factor = 2.5\n'


def watched(write_recipe, steps: int = STEPS) -> Path:
    recipe = write_recipe(steps=steps)
    recipe.write_text(recipe.read_text() + WINDOW)
    return recipe


def with_a_slow_model(text: str) -> int:
    """Rank 1 takes 0.1 s more for each of its two blocks from step 11 on; the others wait in FSDP."""
    from flame.train import loop

    train_step = loop.train_step

    def slow(model, *args, seed, **kwargs):
        if os.environ["RANK"] == "1" and seed[1] == 11:
            for block in model.guest.model.layers:
                forward = block.forward
                block.forward = lambda *a, forward=forward, **k: (time.sleep(0.1), forward(*a, **k))[1]
        return train_step(model, *args, seed=seed, **kwargs)

    loop.train_step = slow
    return train_text(text)


def with_slow_data(text: str) -> int:
    """Rank 1 waits for its rows from step 21 on."""
    from flame.data.loader import Loader

    read = Loader.next_step

    def next_step(self):
        rows = read(self)
        if os.environ["RANK"] == "1" and rows.step >= 20:
            time.sleep(0.2)
            object.__setattr__(rows, "wait_seconds", rows.wait_seconds + 0.2)
        return rows

    Loader.next_step = next_step
    return train_text(text)


@pytest.mark.slow
def test_a_rank_whose_model_is_slow_is_named_once(write_recipe, tmp_path: Path) -> None:
    ranks = Ranks(3, with_a_slow_model, schema.to_toml(read_recipe(watched(write_recipe))))
    assert ranks.codes() == [0, 0, 0]
    (named,) = [e for e in events(tmp_path / "run", "straggler") if e["rank"] == 1]
    assert (named["phase"], named["step"], named["steps"]) == ("computing", 20, 10)
    assert 0.2 <= named["seconds"] < named["step_seconds"]


def test_a_rank_whose_data_are_slow_is_named_with_that(write_recipe, tmp_path: Path) -> None:
    ranks = Ranks(2, with_slow_data, schema.to_toml(read_recipe(watched(write_recipe))))
    assert ranks.codes() == [0, 0]
    found = [e for e in events(tmp_path / "run", "straggler") if e["phase"] == "data"]
    (named,) = found
    assert (named["rank"], named["step"]) == (1, 30)
    assert 0.2 <= named["seconds"] < 0.4
