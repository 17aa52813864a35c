"""Commands that look at a run or its data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on

from flame import cli
from flame.train.journal import event


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert cli.run([str(a) for a in arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_status_says_how_far_a_run_is(write_recipe, tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    assert train_on(1, write_recipe(steps=9)).codes() == [0]
    last = metrics(run)[-1]
    lines = dict(line.strip().split(maxsplit=1) for line in output(capsys, "status", run).splitlines())
    assert lines[f"{run}:"] == "done"
    assert lines["step"] == "9 of 9 (100.0 %)"
    assert lines["tokens"] == f"{last['tokens']:,}, epoch {last['epoch']}"
    assert lines["loss"] == f"{last['loss']:.4f}"
    counted = last["sources"]["python"]
    assert counted["tokens"] == last["tokens"]
    assert (counted["documents"], counted["cut"]) == (last["documents"], last["documents_cut"])
    assert lines["source"].startswith(f"python: {last['tokens']:,} tokens, {last['documents']} documents (")
    assert lines["checkpoints"] == "step 4, step 8, step 9"
    assert lines["events"] == "checkpoint_saved 3, done 1, start 1"


def test_status_tells_a_stop_a_failure_and_a_run_that_goes_on_apart(
    write_recipe, tmp_path: Path, capsys
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(write_recipe().read_text())
    states: list[str] = []
    for name in (None, "start", "signal", "resume", "failed"):
        if name is not None:
            event(run, name, step=0)
        states.append(output(capsys, "status", run).splitlines()[0].partition(": ")[2])
    assert states == ["no step yet", "no step yet", "stopped by a signal", "no step yet", "failed"]


def test_preview_prints_the_same_rows_however_many_readers(write_recipe, tmp_path: Path, capsys) -> None:
    recipe = write_recipe()
    ask = ["data", "preview", recipe, "--steps", "2:6"]
    one = output(capsys, *ask, "--json", "--ranks", 1)
    assert output(capsys, *ask, "--json", "--ranks", 5) == one
    steps = [json.loads(line) for line in one.splitlines()]
    assert [s["step"] for s in steps] == [2, 3, 4, 5]
    for step in steps:
        assert [sum(segment[4] for segment in row) for row in step["rows"]] == [64] * 12
        assert {segment[0] for row in step["rows"] for segment in row} == {"python"}
    tables = output(capsys, *ask, "--ranks", 1)
    assert output(capsys, *ask, "--ranks", 5) == tables
    assert [line.strip() for line in tables.splitlines() if line.startswith("step ")] == [
        "step 2",
        "step 3",
        "step 4",
        "step 5",
    ]
    assert list(tmp_path.glob("run*")) == [recipe], "looking leaves nothing behind"


def test_preview_takes_recipe_flags(write_recipe, capsys) -> None:
    ask = ["data", "preview", write_recipe(), "--json"]
    assert output(capsys, *ask, "--run.seed=8") != output(capsys, *ask)
    assert len(json.loads(output(capsys, *ask, "--batch.tokens-per-step", "128"))["rows"]) == 2


@pytest.mark.parametrize(
    "options", [["--steps", "3:3"], ["--steps", "x"], ["--ranks", "13"], ["--ranks", "0"]]
)
def test_preview_refuses_what_it_cannot_read(write_recipe, capsys, options: list[str]) -> None:
    assert cli.run(["data", "preview", str(write_recipe()), *options]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("flame: ")
    assert err.count("\n") == 1
