"""What one rank wants or cannot do reaches all ranks at the same step."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from distributed.ranks import Ranks, metrics

from flame import schema
from flame.batch import Counts, StepRows
from flame.data.loader import Loader
from flame.errors import DataError
from flame.parallel.world import join_world
from flame.recipe import read_recipe
from flame.train.agreement import Agreement
from flame.train.keeping import saved_steps

WORLD = 3


def outcomes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


def write_outcome(folder: Path, rank: int, agreed: Any) -> None:
    fields = {name: getattr(agreed, name) for name in ("epoch", "save", "stop", "failed_rank")}
    arrays = {name: getattr(agreed, name).tolist() for name in ("records", "sources", "epochs")}
    record = {"counts": vars_of(agreed.counts), **arrays, **fields}
    (folder / f"{rank}.json").write_text(json.dumps(record))


def vars_of(counts: Counts) -> list[int]:
    return [getattr(counts, name) for name in Counts.__slots__]


def rows_of(rank: int) -> StepRows:
    # what the exchange reads of a step's rows, each rank's own
    counts = Counts(100 + rank, 90 + rank, rank, 1, 2**40, 2**62 + rank, 5)
    records = np.array([[rank, 0, 0, 1], [10, rank, 2, 0]], np.int64)
    sources = np.array([[rank, 1, 0], [7, 0, rank]], np.int64)
    epochs = np.array([5 - rank, 9 + rank], np.int64)
    rows: Any = SimpleNamespace(
        counts=counts, records=records, sources=sources, epoch=5 - rank, epochs=epochs
    )
    return rows


def exchange(folder: Path, wishes: dict[int, dict[str, bool]]) -> int:
    """Each rank proposes its rows and wishes; a rank that failed has no rows."""
    world = join_world()
    agreement = Agreement(world.control, world.rank, sources=2)
    wish = wishes.get(world.rank, {})
    rows = None if wish.get("failed") else rows_of(world.rank)
    write_outcome(folder, world.rank, agreement.settle(agreement.propose(rows, **wish)))
    return 0


def exchanged(folder: Path, wishes: dict[int, dict[str, bool]]) -> dict[str, Any]:
    """The outcome, which must be the same on every rank."""
    assert Ranks(WORLD, exchange, folder, wishes).codes() == [0] * WORLD
    first, *others = outcomes(folder)
    assert others == [first] * (WORLD - 1)
    return first


def test_counts_are_summed_and_the_digest_wraps_around(tmp_path: Path) -> None:
    found = exchanged(tmp_path, {})
    digest = (3 * 2**62 + 3 + 2**63) % 2**64 - 2**63
    assert found["counts"] == [303, 273, 3, 3, 3 * 2**40, digest, 15]
    assert digest < 0, "three times 2^62 is more than an int64 holds"
    assert found["records"] == [[3, 0, 0, 3], [30, 3, 6, 0]]
    assert found["sources"] == [[3, 3, 0], [21, 0, 3]]
    assert found["epoch"] == 3, "the smallest"
    assert found["epochs"] == [3, 9], "the smallest of each source"
    assert (found["save"], found["stop"], found["failed_rank"]) == (False, False, None)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_what_one_rank_wishes_all_do(tmp_path: Path, rank: int) -> None:
    found = exchanged(tmp_path, {rank: {"stop": True}, (rank + 1) % WORLD: {"save": True}})
    assert (found["save"], found["stop"], found["failed_rank"]) == (True, True, None)


def test_a_rank_without_rows_counts_nothing_and_is_named(tmp_path: Path) -> None:
    found = exchanged(tmp_path, {0: {"failed": True}})
    assert found["failed_rank"] == 0
    assert found["counts"][:3] == [203, 183, 3]
    assert found["epoch"] == 3


def gather(folder: Path) -> int:
    world = join_world()
    agreement = Agreement(world.control, world.rank, sources=1)
    own = np.zeros((WORLD, 2), np.int64)
    own[world.rank] = world.rank + 1
    summed = agreement.sum_state(own)
    message = agreement.gather_message(f"rank {world.rank}'s" if world.rank else None)
    assert own.sum() == 2 * (world.rank + 1), "the rank's own state is not touched"
    (folder / f"{world.rank}.json").write_text(json.dumps({"state": summed.tolist(), "message": message}))
    return 0


def test_states_are_put_together_and_the_first_message_goes_to_all(tmp_path: Path) -> None:
    assert Ranks(WORLD, gather, tmp_path).codes() == [0] * WORLD
    assert outcomes(tmp_path) == [{"state": [[1, 1], [2, 2], [3, 3]], "message": "rank 1's"}] * WORLD


# ----------------------------------------------------------------------------- in the real loop


class Disturbed(Loader):
    """A loader to which something happens on rank 1 when it is asked for the rows of step 5."""

    what = ""
    stop = False

    def next_step(self) -> StepRows:
        rows = super().next_step()
        if rows.step == 4 and os.environ["RANK"] == "1":
            if self.what == "failure":
                raise DataError("a.jsonl: the disk is on fire")
            Disturbed.stop = True
        return rows


def train_disturbed(text: str, what: str) -> int:
    import flame.run

    Disturbed.what = what
    flame.run.Loader = Disturbed
    return flame.run.work(lambda: Disturbed.stop, text)


@pytest.mark.parametrize("what", ["failure", "stop"])
def test_what_befalls_one_rank_stops_all_before_the_same_step_with_the_last_one_saved(
    write_recipe, tmp_path: Path, what: str
) -> None:
    recipe = write_recipe(replaced={'every = "4 steps"': 'every = "100 steps"'})
    text = schema.to_toml(read_recipe(recipe))
    ranks = Ranks(WORLD, train_disturbed, text, what)
    assert ranks.codes() == [1 if what == "failure" else 75] * WORLD
    assert saved_steps(tmp_path / "run") == [4]
    assert [r["step"] for r in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    if what == "failure":
        assert [ranks.error() for _ in range(WORLD)] == ["a.jsonl: the disk is on fire"] * WORLD
