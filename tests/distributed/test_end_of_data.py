"""A run whose data end before its steps do, or that has no other length, ends cleanly with its data."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on, wait_for_step

from flame import cli
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps

ENDS = {
    'name = "python"': 'name = "python"\nmax_epochs = 1',
    "[data]": "[data]\nmax_document_length = 64",
    "tokens_per_step = 768": "tokens_per_step = 1536",
    'warmup = "5 steps"': 'warmup = "5 steps"\ndecay = "constant"',
    'every = "4 steps"': 'every = "40 steps"',
    "[logging]": '[logging]\nevery = "9 steps"',
}


@pytest.mark.slow
def test_a_run_without_a_length_ends_with_its_data_on_any_ranks(write_recipe, tmp_path: Path, capsys) -> None:
    no_length = ENDS | {"steps = 30": ""}
    assert train_on(1, write_recipe("one", replaced=no_length)).codes() == [0]
    run, recipe = tmp_path / "run", write_recipe("run", replaced=no_length)
    ranks = train_on(2, recipe)
    wait_for_step(run, 9)
    ranks.signal(signal.SIGTERM)
    assert ranks.codes() == [75, 75]
    assert train_on(3, recipe).codes() == [0, 0, 0]

    one, other = metrics(tmp_path / "one"), metrics(run)
    assert one[-1]["tokens"] == other[-1]["tokens"]
    assert one[-1]["rows_digest"] == other[-1]["rows_digest"], "the last step is logged"
    assert one[-1]["documents"] == 60
    events = list(read_lines(run / "events.jsonl"))
    assert events[-1]["event"] == "done"
    assert events[-1]["why"] == "the data ended"
    assert events[-1]["step"] == other[-1]["step"] == max(saved_steps(run))
    assert cli.run(["status", str(run)]) == 0
    assert f"step         {other[-1]['step']}, until the data end" in capsys.readouterr().out

    assert train_on(2, recipe).codes() == [0, 0], "starting it again finds nothing left to do"
    assert metrics(run) == other


def test_a_length_past_the_datas_end_is_an_estimate(write_recipe, tmp_path: Path) -> None:
    recipe = write_recipe(steps=5000, replaced=ENDS)
    assert train_on(1, recipe).codes() == [0]
    assert metrics(tmp_path / "run")[-1]["step"] < 5000


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"steps = 30": ""}, "run: give steps or tokens"),
        ({"steps = 30": "", 'name = "python"': 'name = "python"\nmax_epochs = 2'}, "schedule.decay: cosine"),
    ],
)
def test_a_run_whose_length_nobody_knows_is_refused(
    write_recipe, capsys, replaced: dict[str, str], says: str
) -> None:
    assert cli.run(["train", str(write_recipe(replaced=replaced))]) == 1
    assert says in capsys.readouterr().err
