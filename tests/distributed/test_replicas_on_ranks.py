"""A bit that flips in one copy of the model: found, named, and not in what comes out."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from distributed.ranks import Ranks, metrics, train_on, train_text
from distributed.supervised import events

from flame import schema
from flame.recipe import read_recipe
from flame.train.keeping import saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors

STEPS = 16
AT = 10  # the step after which a bit flips
EXACT = ("step", "tokens", "rows_digest", "loss", "grad_norm")


def with_a_flipped_bit(text: str, rank: str, marker: str) -> int:
    """Rank `rank` holds another parameter after step AT, for as long as `marker` is there."""
    from flame.train import loop

    train_step = loop.train_step

    def flip(model, shards, *args, seed, **kwargs):
        result = train_step(model, shards, *args, seed=seed, **kwargs)
        if os.environ["RANK"] == rank and seed[1] == AT and Path(marker).exists():
            with torch.no_grad():
                shards.pieces[2].local.view(-1).view(torch.int32)[3] ^= 1  # the smallest change there is
            if not marker.endswith("always"):
                Path(marker).unlink()
        return result

    loop.train_step = flip
    return train_text(text)


def copies(write_recipe, name: str, every: str, settings: str = "") -> Path:
    """A recipe of as many copies as there are ranks, or of two."""
    recipe = write_recipe(name, steps=STEPS)
    with recipe.open("a") as file:
        file.write(f'[recovery]\ncheck_replicas = "{every}"\n{settings}')
    return recipe


@pytest.mark.parametrize(
    ("ranks", "replicate", "every", "found_at", "named"),
    [(3, 3, "2 steps", 10, [1]), (3, 3, "100 steps", 12, [1]), (4, 2, "3 steps", 12, [1, 3])],
)
def test_a_copy_that_changed_is_named_and_the_run_goes_on_without_the_change(
    write_recipe, tmp_path: Path, ranks: int, replicate: int, every: str, found_at: int, named: list[int]
) -> None:
    recipe, run = copies(write_recipe, "run", every), tmp_path / "run"
    marker = tmp_path / "once"
    marker.touch()
    parallel = f"[parallel]\nreplicate = {replicate}\n"
    recipe.write_text(recipe.read_text() + parallel)
    text = schema.to_toml(read_recipe(recipe))
    assert Ranks(ranks, with_a_flipped_bit, text, "1", str(marker)).codes() == [0] * ranks
    (differ,) = events(run, "replicas_differ")
    assert (differ["step"], differ["ranks"], len(differ["parameters"])) == (found_at, named, 1)
    (gone_back,) = events(run, "rollback")
    assert "the copies of the parameters differ" in gone_back["why"]
    assert [e["step"] for e in events(run, "resume")] == [8]  # before the flip
    plain = write_recipe("undisturbed", steps=STEPS)
    plain.write_text(plain.read_text() + parallel)
    assert train_on(ranks, plain).codes() == [0] * ranks
    figures = [[[r[k] for k in EXACT] for r in metrics(tmp_path / d)] for d in ("run", "undisturbed")]
    assert figures[0] == figures[1]
    ours, theirs = (dict(SavedTensors(step_directory(tmp_path / d, STEPS))) for d in ("run", "undisturbed"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_copies_that_differ_again_and_again_end_the_run(write_recipe, tmp_path: Path) -> None:
    recipe, run = copies(write_recipe, "run", "1 steps", "max_rollbacks = 1\n"), tmp_path / "run"
    marker = tmp_path / "always"
    marker.touch()
    recipe.write_text(recipe.read_text() + "[parallel]\nreplicate = 2\n")
    ranks = Ranks(2, with_a_flipped_bit, schema.to_toml(read_recipe(recipe)), "0", str(marker))
    assert ranks.codes() == [1, 1]
    assert "a device or its memory is failing" in ranks.error()
    assert len(events(run, "replicas_differ")) == 2
    assert len(events(run, "rollback")) == 1
    assert saved_steps(run)[-1] == 8  # none holds the damage
