"""Ranks that hang without dying: found, named, ended, and the run goes on as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on, wait_for_step
from distributed.supervised import ended, events, said, supervised, work

STEPS = 20
AT = 13  # the step at which a rank hangs
EXACT = ("step", "tokens", "rows_digest", "loss", "grad_norm")
PATIENCE = "[recovery]\nhang_seconds = 4\nsave_seconds = 8\n"


def blocked_in_data(stop: Callable[[], bool], text: str, fifo: str) -> int:
    """A rank 1 whose source gives nothing any more, the first time it comes to step AT."""
    from flame.data.loader import Loader

    read = Loader.next_step

    def next_step(self):
        rows = read(self)
        if os.environ["RANK"] == "1" and rows.step == AT and Path(fifo).exists():
            Path(fifo).read_text()  # nobody ever writes
        return rows

    Loader.next_step = next_step
    return work(stop, text)


def blocked_in_forward(stop: Callable[[], bool], text: str, fifo: str) -> int:
    """A rank 1 whose model comes to no end, the first time it comes to step AT; the others wait in FSDP."""
    from flame.train import loop

    train_step = loop.train_step

    def endless(*args, seed, **kwargs):
        if os.environ["RANK"] == "1" and seed[1] == AT and Path(fifo).exists():
            while True:
                time.sleep(0.01)
        return train_step(*args, seed=seed, **kwargs)

    loop.train_step = endless
    return work(stop, text)


def assert_named_and_undisturbed(write_recipe, run: Path, phase: str | None) -> str:
    """The stacks of all ranks."""
    (hang,) = events(run, "hang")
    (lost,) = events(run, "rank_lost")
    assert hang["rank"] == lost["rank"] == 1
    assert phase is None or hang["phase"] == phase
    assert hang["seconds"] >= hang["limit_seconds"] >= 4
    assert "hung for" in lost["how"]
    stacks = Path(hang["stacks"]).read_text()
    assert stacks.startswith("=== rank 1  <- the rank behind")
    assert "=== rank 0\n" in stacks
    assert "rank 1 is behind" in said(run)
    assert train_on(2, write_recipe("undisturbed", steps=STEPS)).codes() == [0, 0]
    figures = [[[r[k] for k in EXACT] for r in metrics(d)] for d in (run, run.parent / "undisturbed")]
    assert figures[0] == figures[1]
    return stacks


def patient(write_recipe) -> Path:
    recipe = write_recipe(steps=STEPS)
    recipe.write_text(recipe.read_text() + PATIENCE)
    return recipe


def test_a_stopped_rank_is_named_and_replaced_in_seconds(write_recipe, tmp_path: Path) -> None:
    process = supervised(patient(write_recipe), 2, work)
    run = tmp_path / "run"
    wait_for_step(run, AT)
    os.kill(events(run, "start")[0]["pids"][1], signal.SIGSTOP)
    assert ended(process) == 0, said(run)
    stacks = assert_named_and_undisturbed(write_recipe, run, None)
    assert "process state T" in stacks
    assert "most recent call first" in stacks.partition("=== rank 0")[0], (
        "it is let go on to say where it was"
    )
    (restart,) = events(run, "restart")
    assert list(restart["parts"]) == ["detect", "stop", "start", "load", "data", "first_step"]
    assert restart["seconds"] == pytest.approx(sum(restart["parts"].values()), abs=0.01)
    assert restart["parts"]["detect"] >= 4
    assert "training again after" in said(run)


@pytest.mark.parametrize(
    ("blocked", "phase", "where"),
    [
        pytest.param(blocked_in_data, "data", "next_step", marks=pytest.mark.slow),
        pytest.param(blocked_in_forward, "computing", "endless", marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_blocks_is_named_with_where_it_is(
    write_recipe, tmp_path: Path, blocked: Callable[..., int], phase: str, where: str
) -> None:
    fifo, run = tmp_path / "fifo", tmp_path / "run"
    os.mkfifo(fifo)
    process = supervised(patient(write_recipe), 2, blocked, str(fifo))
    wait_for_step(run, AT - 1)
    while not events(run, "hang") and process.is_alive():
        time.sleep(0.01)
    fifo.unlink()  # the next attempt gets through
    assert ended(process) == 0, said(run)
    stacks = assert_named_and_undisturbed(write_recipe, run, phase)
    assert f"in {where}" in stacks.partition("=== rank 0")[0]
