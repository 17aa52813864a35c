"""Exports beside training: of finished checkpoints alone, and never in the way of the run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flame.schema import Duration
from flame.train.config import ExportConfig
from flame.train.exporter import Exporter, exported_steps, remove_unfinished
from flame.train.journal import read_lines


def config(**settings: Any) -> ExportConfig:
    return ExportConfig(**{"at_end": True, "every": Duration(2, "steps"), "dtype": "float32", **settings})


def writes(step: int, to: Path, look_up: Callable[[], None]) -> None:
    to.mkdir(parents=True)
    look_up()


def told(run: Path) -> list[tuple[str, int]]:
    return [(e["event"], e["step"]) for e in read_lines(run / "events.jsonl")]


def test_only_what_was_asked_for_is_exported_and_the_newest_are_kept(tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, config(keep=2), writes)
    for step in (2, 4, 5, 6):
        if step != 5:
            exporter.want(step)
        exporter.committed(step)
    exporter.finish(7)
    assert exported_steps(tmp_path) == [4, 6]
    assert (tmp_path / "export").is_dir()
    assert told(tmp_path) == [("exported", 2), ("exported", 4), ("exported", 6), ("exported", 7)]
    assert exporter.held() == set()


def test_a_failure_is_an_event_and_the_next_export_works(tmp_path: Path, capsys) -> None:
    def full(step: int, to: Path, look_up: Callable[[], None]) -> None:
        if step == 2:
            raise OSError(28, "No space left on device")
        writes(step, to, look_up)

    exporter = Exporter(tmp_path, config(), full)
    for step in (2, 4, 6):
        exporter.want(step)
        if step == 6:
            exporter.lost(step, "rank 1: OSError")
        else:
            exporter.committed(step)
    exporter.finish(6)
    assert sorted(told(tmp_path)) == [
        ("export_failed", 2),
        ("export_failed", 6),
        ("exported", 4),
        ("exported", 6),
    ]
    whys = [e["why"] for e in read_lines(tmp_path / "events.jsonl") if e["event"] == "export_failed"]
    assert sorted(whys) == ["OSError: [Errno 28] No space left on device", "rank 1: OSError"]
    assert "step 2 could not be exported" in capsys.readouterr().out


def test_its_checkpoint_is_held_and_a_stop_gives_it_up(tmp_path: Path) -> None:
    begun, stopped = threading.Event(), threading.Event()

    def slow(step: int, to: Path, look_up: Callable[[], None]) -> None:
        begun.set()
        assert stopped.wait(30)
        look_up()

    exporter = Exporter(tmp_path, config(), slow)
    for step in (2, 4):
        exporter.want(step)
        exporter.committed(step)
    assert begun.wait(30)
    assert exporter.held() == {2, 4}
    exporter._stop.set()
    stopped.set()
    exporter.abandon()
    assert exporter.held() == set()
    assert told(tmp_path) == [("export_failed", 2), ("export_failed", 4)]
    assert all("the run was stopped" in e["why"] for e in read_lines(tmp_path / "events.jsonl"))


def test_other_ranks_export_nothing(tmp_path: Path) -> None:
    exporter = Exporter(tmp_path, config(), None)
    exporter.want(2)
    exporter.committed(2)
    exporter.finish(2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [".export.a1b2c3d4", "exports/.step-00000002.old.a1b2c3d4"])
def test_what_a_crash_left_is_removed_and_nothing_else(tmp_path: Path, name: str) -> None:
    for kept in ("export", "exports/step-00000002", ".exports-of-mine", ".git"):
        (tmp_path / kept).mkdir(parents=True)
    (tmp_path / name).mkdir()
    remove_unfinished(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".exports-of-mine", ".git", "export", "exports"]
    assert [p.name for p in (tmp_path / "exports").iterdir()] == ["step-00000002"]
