"""Exports of a run that trains: as `flame export` makes them, and made good where they are missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from distributed.ranks import metrics, train_on
from models.test_model_weights import same_bits, tensors

from flame import cli
from flame.models.export import exported_step
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps

EXPORT = '[export]\nat_end = true\nevery = "3 steps"\ndtype = "bfloat16"\n[logging]'


def test_exports_are_those_of_flame_export_and_the_run_is_the_same(write_recipe, tmp_path: Path) -> None:
    plain = write_recipe("plain", steps=8)
    recipe = write_recipe(
        "run", steps=8, replaced={"[logging]": EXPORT, 'every = "4 steps"': 'every = "4 steps"\nkeep = 9'}
    )
    assert train_on(2, plain).codes(300) == train_on(2, recipe).codes(300) == [0, 0]
    run = tmp_path / "run"
    assert saved_steps(run) == [3, 4, 6, 8], "a checkpoint where an export is due"
    assert sorted(p.name for p in (run / "exports").iterdir()) == ["step-00000003", "step-00000006"]
    for step, folder in (
        (3, run / "exports/step-00000003"),
        (6, run / "exports/step-00000006"),
        (8, run / "export"),
    ):
        out = tmp_path / f"out-{step}"
        ask = ["export", str(run), "--to", str(out), "--step", str(step), "--dtype", "bfloat16"]
        assert cli.run(ask) == 0
        assert same_bits(tensors(out), tensors(folder))
        assert exported_step(folder) == step
        assert {p.name for p in out.iterdir()} == {p.name for p in folder.iterdir()}
    assert [e["event"] for e in read_lines(run / "events.jsonl")][-2:] == ["exported", "done"]
    assert [r["loss"] for r in metrics(run)] == [r["loss"] for r in metrics(tmp_path / "plain")]


def test_an_export_that_cannot_be_written_stops_nothing_and_is_made_good(
    write_recipe, tmp_path: Path, capsys
) -> None:
    recipe, run = write_recipe("run", steps=6, replaced={"[logging]": EXPORT}), tmp_path / "run"
    run.mkdir()
    (run / "export").write_text("in the way")
    (run / "exports").write_text("in the way")
    assert train_on(1, recipe).codes(300) == [0]
    events = list(read_lines(run / "events.jsonl"))
    assert [e["step"] for e in events if e["event"] == "export_failed"] == [3, 6, 6]
    assert events[-1]["event"] == "done"
    (run / "export").unlink()
    assert cli.run(["train", str(recipe)]) == 0
    assert exported_step(run / "export") == 6
    assert "is finished: step 6 of 6" in capsys.readouterr().out
    assert json.loads((run / "export" / "config.json").read_text())["dtype"] == "bfloat16"
    shutil.rmtree(run / "export")
    assert train_on(1, recipe).codes(300) == [0]
    assert exported_step(run / "export") == 6
