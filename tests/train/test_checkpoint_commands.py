"""`flame checkpoint`: what it shows, finds and deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flame.cli import run as flame
from flame.train.checkpoint import file_seal
from flame.train.journal import RunLock
from flame.train.keeping import saved_steps, step_directory


@pytest.fixture
def run(write_recipe, tmp_path: Path) -> Path:
    """A run directory with made-up checkpoints of steps 100 to 500, its own recipe in it."""
    recipe = write_recipe()
    path = tmp_path / "run"
    path.mkdir()
    (path / "recipe.toml").write_text(recipe.read_text())
    for step in range(100, 600, 100):
        folder = step_directory(path, step)
        folder.mkdir(parents=True)
        (folder / "train.json").write_text(json.dumps({"step": step, "tokens": 1000 * step}))
        manifest = {"format": 1, "step": step, "files": {"train.json": file_seal(folder / "train.json")}}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    (path / "checkpoints" / "step-00000450.rolled-back").mkdir()
    (path / "checkpoints" / "step-00000550.partial").mkdir()
    return path


def damage(run: Path, step: int) -> None:
    (step_directory(run, step) / "train.json").write_text('{"step": 1, "tokens": 9}')


def test_checkpoints_and_what_lies_beside_them_are_listed(run: Path, capsys) -> None:
    assert flame(["checkpoint", "list", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[:5]] == ["100", "200", "300", "400", "500"]
    assert "500,000 tokens" in lines[4]
    assert [line.partition(":")[0] for line in lines[5:]] == [
        "step-00000450.rolled-back",
        "step-00000550.partial",
    ]


def test_a_damaged_checkpoint_is_named_and_the_exit_code_is_1(run: Path, capsys) -> None:
    assert flame(["checkpoint", "verify", str(run)]) == 0
    damage(run, 300)
    assert flame(["checkpoint", "verify", str(run), "--step", "200"]) == 0
    assert flame(["checkpoint", "verify", str(run)]) == 1
    printed = capsys.readouterr()
    assert "step 300: train.json holds" in printed.out
    assert "step 300 of 5 checkpoint(s) cannot be used" in printed.err
    assert flame(["checkpoint", "verify", str(run), "--step", "7"]) == 1


def test_pruning_spares_the_newest_whole_one(run: Path, capsys) -> None:
    damage(run, 400)
    damage(run, 500)
    assert flame(["checkpoint", "prune", str(run), "--keep", "1"]) == 0
    assert saved_steps(run) == [300, 400, 500]  # 400 is old enough for a rollback
    names = [p.name for p in (run / "checkpoints").glob("*.*")]
    assert names == ["step-00000450.rolled-back"]
    assert flame(["checkpoint", "prune", str(run), "--rolled-back"]) == 0
    assert not list((run / "checkpoints").glob("*.*"))
    damage(run, 300)
    assert flame(["checkpoint", "prune", str(run)]) == 1
    assert "none of its checkpoints is whole" in capsys.readouterr().err
    assert len(saved_steps(run)) == 3


def test_a_run_that_is_trained_is_not_pruned(run: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr("flame.train.journal.LOCK_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(RunLock, "_try", lambda self: False)
    assert flame(["checkpoint", "prune", str(run), "--keep", "1"]) == 1
    assert "another trainer holds this run" in capsys.readouterr().err
    assert len(saved_steps(run)) == 5
